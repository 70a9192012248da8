//! P1, P2, P4, P9: what Ok, a refusal and a deadline mean.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use wilco::{
    Deadline, ErrorKind, Outcome,
    broker::{DeleteMode, QueueSpec},
    durability::Level,
};

use crate::{
    check::{CheckResult, Cx, Evidence},
    support::*,
};

/// At the moment of Ok the message is there for every other handle.
pub async fn p1_ok_means_stored_for_everybody(cx: &Cx) -> CheckResult {
    const TIMES: u64 = 200;
    let handles = handles(cx, 2).await?;
    let name = queue(&*handles[0], "p1").await?;
    for n in 1..=TIMES {
        put(&*handles[0], &name, format!("m{n}")).await?;
        same(
            "ready at the moment of Ok",
            handles[1].status(&name, long()).await?.ready,
            n,
        )?;
    }
    let expected: Vec<_> = (1..=TIMES).map(|n| format!("m{n}")).collect();
    same("messages", drain(&*handles[1], &name).await?, expected)?;
    Ok(Evidence::of("publishes", TIMES))
}

/// What was Ok is there after a restart of the broker, at any level above memory.
pub async fn p1_ok_outlives_a_restart(cx: &Cx) -> CheckResult {
    const TIMES: usize = 64;
    let broker = cx.connect().await?;
    let name = queue(&*broker, "p1-restart").await?;
    let tasks = (0..TIMES).map(|n| {
        let (broker, name) = (Arc::clone(&broker), name.clone());
        tokio::spawn(async move { put(&*broker, &name, format!("m{n:02}")).await })
    });
    join_all(tasks.collect::<Vec<_>>()).await?;
    let level = broker.durability(long()).await?.level;
    drop(broker);
    cx.server.restart().await?;
    let broker = cx.connect().await?;
    if level >= Level::Process {
        let mut ids = drain(&*broker, &name).await?;
        ids.sort();
        let expected: Vec<_> = (0..TIMES).map(|n| format!("m{n:02}")).collect();
        same("messages after the restart", ids, expected)?;
    }
    Ok(Evidence::of("publishes", TIMES).and("restarts", 1))
}

/// Full and too large: an error that says `NotStored`, inside the deadline.
pub async fn p2_a_refusal_is_not_stored(cx: &Cx) -> CheckResult {
    const TIMES: usize = 50;
    let broker = cx.connect().await?;
    let name = guest("p2")?.queue();
    broker
        .declare(&QueueSpec::new(name.clone()).with_max_messages(1), long())
        .await?;
    put(&*broker, &name, "fits").await?;
    for n in 0..TIMES {
        let publish = broker.publish(&name, named(format!("over-{n}"))?, long());
        let (answer, took) = timed("publish to a full queue", publish).await?;
        let error = must_be("publish to a full queue", answer, &ErrorKind::BrokerRefused)?;
        same("outcome", error.outcome(), Some(Outcome::NotStored))?;
        expect(
            error.is_retryable(),
            "a refusal for now can be tried again",
            &error,
        )?;
        expect(
            took < ROUND_TRIP,
            "an answer within a round trip",
            format!("{took:?}"),
        )?;
    }
    let big = Bytes::from(vec![b'x'; 64 << 20]);
    match broker.publish(&name, message(big)?, long()).await {
        Ok(_) => same("a queue of one message takes 64 MiB more", true, false)?,
        Err(error) => {
            let kind = error.kind().clone();
            let refused = matches!(kind, ErrorKind::TooLarge { .. } | ErrorKind::BrokerRefused);
            expect(refused, "TooLarge or BrokerRefused", short(&kind))?;
            same("outcome", error.outcome(), Some(Outcome::NotStored))?;
        }
    }
    same(
        "messages",
        drain_full(&broker, &name).await?,
        vec!["fits".into()],
    )?;
    Ok(Evidence::of("refusals", TIMES + 1))
}

/// `NotStored` is final, whatever the reason was: none of them is in a drain, now or later.
pub async fn p4_not_stored_never_shows_up(cx: &Cx) -> CheckResult {
    const TIMES: usize = 300;
    let broker = cx.connect().await?;
    let name = guest("p4")?.queue();
    let spec = QueueSpec::new(name.clone()).with_max_messages(TIMES as u64 / 3);
    broker.declare(&spec, long()).await?;
    let seed = cx.options.seed;
    let tasks = (0..TIMES).map(|n| {
        let (broker, name) = (Arc::clone(&broker), name.clone());
        tokio::spawn(async move {
            // Some deadlines are too short for any broker, some for a slow one.
            let mut rng = fastrand::Rng::with_seed(seed ^ n as u64);
            let deadline = match n % 3 {
                0 => Deadline::after(Duration::from_micros(rng.u64(0..2_000))),
                _ => long(),
            };
            let id = format!("m{n}");
            Ok((
                id.clone(),
                broker.publish(&name, named(id)?, deadline).await,
            ))
        })
    });
    let answers = join_all(tasks.collect::<Vec<_>>()).await?;
    let there = drain_full(&broker, &name).await?;
    let mut not_stored = 0;
    for (id, answer) in answers {
        match answer.map_err(|error| error.outcome()) {
            Ok(_) => expect(there.contains(&id), "Ok is stored", id)?,
            Err(Some(Outcome::NotStored)) => {
                not_stored += 1;
                expect(
                    !there.contains(&id),
                    "NotStored is final",
                    format!("{id} was stored"),
                )?;
            }
            Err(Some(Outcome::Unknown)) => {}
            Err(None) => expect(false, "a failed publish has an outcome", id)?,
        }
    }
    expect(not_stored > 0, "some are refused", "none")?;
    Ok(Evidence::of("publishes", TIMES).and("not stored", not_stored))
}

/// All that is in a full queue, acked; then one more look, for what arrives late.
async fn drain_full(
    broker: &Arc<dyn wilco::Broker>,
    name: &wilco::QueueName,
) -> Result<Vec<String>, crate::check::CheckError> {
    let mut consumer = attach(&**broker, name, 16).await?;
    let mut ids = Vec::new();
    while broker.status(name, long()).await?.messages() > 0 {
        let delivery = receive(&mut *consumer).await?;
        ids.push(delivery.message.id.to_string());
        delivery.ack(long()).await?;
    }
    consumer.close(long()).await?;
    ids.extend(drain(&**broker, name).await?);
    Ok(ids)
}

/// Each operation ends at its deadline at the latest, also at one that has passed already.
pub async fn p9_nothing_waits_past_its_deadline(cx: &Cx) -> CheckResult {
    const SLACK: Duration = Duration::from_millis(750);
    let broker = cx.connect().await?;
    let name = queue(&*broker, "p9").await?;
    let lane = guest("p9")?;
    let mut calls = 0;
    for after in [0, 1, 5, 50].map(Duration::from_millis) {
        let deadline = || Deadline::after(after);
        let spec = QueueSpec::new(name.clone());
        let mut times = Vec::new();
        let (_, took) = timed("declare", broker.declare(&spec, deadline())).await?;
        times.push(("declare", took));
        let published = broker.publish(&name, message("x")?, deadline());
        let (answer, took) = timed("publish", published).await?;
        if let Err(error) = answer {
            expect(
                error.outcome().is_some(),
                "a failed publish has an outcome",
                error,
            )?;
        }
        times.push(("publish", took));
        times.push((
            "status",
            timed("status", broker.status(&name, deadline())).await?.1,
        ));
        times.push(("list", timed("list", broker.list(deadline())).await?.1));
        let consume = broker.consume(&name, prefetch(1), deadline());
        let (consumer, took) = timed("consume", consume).await?;
        times.push(("consume", took));
        if let Ok(consumer) = consumer {
            times.push(("close", timed("close", consumer.close(deadline())).await?.1));
        }
        let letters = broker.dead_letters(&name, None, count(1), deadline());
        times.push(("dead_letters", timed("dead_letters", letters).await?.1));
        times.push((
            "durability",
            timed("durability", broker.durability(deadline())).await?.1,
        ));
        let asked = broker.request(&lane, "x".into(), deadline());
        times.push(("request", timed("request", asked).await?.1));
        times.push((
            "respond",
            timed("respond", broker.respond(&lane, deadline())).await?.1,
        ));
        for (what, took) in times {
            calls += 1;
            let expected = format!("{what} ends within {after:?}");
            expect(took < after + SLACK, expected, format!("{took:?}"))?;
        }
    }
    broker.delete(&name, DeleteMode::Discard, long()).await?;
    let (closed, _) = timed("close", broker.close(long())).await?;
    closed?;
    let (closed, _) = timed("a second close", broker.close(long())).await?;
    closed?;
    let (answer, took) = timed("status after close", broker.status(&name, long())).await?;
    must_be("status after close", answer, &ErrorKind::Closed)?;
    expect(took < ROUND_TRIP, "Closed at once", format!("{took:?}"))?;
    let answer = broker.publish(&name, message("x")?, long()).await;
    let error = must_be("publish after close", answer, &ErrorKind::Closed)?;
    same("outcome", error.outcome(), Some(Outcome::NotStored))?;
    Ok(Evidence::of("calls", calls + 4))
}
