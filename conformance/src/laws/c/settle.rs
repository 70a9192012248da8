//! C2, C3, C4, C14: what an ack's Ok means, and what one without Ok means.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use wilco::{Deadline, broker::DeleteMode};

use crate::{
    agent::Agent,
    check::{CheckResult, Cx, Evidence},
    support::*,
};

/// What was acked does not come again: not to the next consumer, not to another handle.
pub async fn c2_an_acked_delivery_never_comes_back(cx: &Cx) -> CheckResult {
    const MESSAGES: usize = 200;
    let handles = handles(cx, 2).await?;
    let name = queue(&*handles[0], "c2").await?;
    for n in 0..MESSAGES {
        put(&*handles[0], &name, format!("m{n}")).await?;
    }
    let mut consumer = attach(&*handles[0], &name, 16).await?;
    let mut acked = HashSet::new();
    let mut retried = HashSet::new();
    while acked.len() < MESSAGES {
        let delivery = receive(&mut *consumer).await?;
        let id = delivery.message.id.clone();
        expect(!acked.contains(&id), "what was acked does not come", &id)?;
        if acked.len() % 50 == 0 && retried.insert(id.clone()) {
            // Acked on its second delivery: the first must not haunt it.
            delivery.retry(Duration::ZERO, long()).await?;
        } else {
            delivery.ack(long()).await?;
            acked.insert(id);
        }
    }
    consumer.close(long()).await?;
    for broker in &handles {
        same(
            "what comes after all was acked",
            drain(&**broker, &name).await?,
            vec![],
        )?;
    }
    Ok(Evidence::of("acks", MESSAGES))
}

/// Not after a restart of the broker either; what was not acked does.
pub async fn c2_an_ack_outlives_a_restart(cx: &Cx) -> CheckResult {
    const MESSAGES: usize = 100;
    let broker = cx.connect().await?;
    let name = queue(&*broker, "c2-restart").await?;
    for n in 0..MESSAGES {
        put(&*broker, &name, format!("m{n:02}")).await?;
    }
    let mut consumer = attach(&*broker, &name, 16).await?;
    let mut held = Vec::new();
    for n in 0..MESSAGES / 2 {
        let delivery = receive(&mut *consumer).await?;
        if n % 10 == 0 {
            held.push(delivery);
        } else {
            delivery.ack(long()).await?;
        }
    }
    let left: Vec<_> = held
        .iter()
        .map(|delivery| delivery.message.id.to_string())
        .collect();
    let before = broker.status(&name, long()).await?.messages();
    cx.server.restart().await?;
    drop((held, consumer, broker));
    let broker = cx.connect().await?;
    until_status(&*broker, &name, "all ready", |status| {
        status.ready == before
    })
    .await?;
    let there = drain(&*broker, &name).await?;
    same("messages after the restart", there.len() as u64, before)?;
    for id in &left {
        expect(there.contains(id), "what was not acked is there", id)?;
    }
    Ok(Evidence::of("acks", MESSAGES as u64 - before).and("restarts", 1))
}

/// An ack that never said Ok: the message comes again, or its ack did arrive; one of both, and
/// nothing stays in between. An ack that was never sent always comes again.
pub async fn c3_an_ack_without_ok_leaves_the_message_or_not(cx: &Cx) -> CheckResult {
    const MESSAGES: usize = 120;
    let broker = cx.connect().await?;
    let name = queue(&*broker, "c3").await?;
    for n in 0..MESSAGES {
        put(&*broker, &name, format!("m{n:03}")).await?;
    }
    let mut consumer = attach(&*broker, &name, 1).await?;
    // What each ack said: Some(true) for Ok, Some(false) for never sent, None for not known.
    let mut said: BTreeMap<String, Option<bool>> = BTreeMap::new();
    let mut acks = 0;
    while said.len() < MESSAGES {
        let delivery = receive(&mut *consumer).await?;
        let id = delivery.message.id.to_string();
        let before = said.get(&id).copied();
        expect(
            before != Some(Some(true)),
            "after Ok it never comes again",
            &id,
        )?;
        let now = match acks % 6 {
            0 => cut_after(0, delivery.ack(long()))
                .await
                .map_or(Some(false), |_| None),
            5 => match delivery.ack(Deadline::after(Duration::ZERO)).await {
                Ok(()) => Some(true),
                Err(_) => None,
            },
            polls => cut_after(polls, delivery.ack(long()))
                .await
                .and_then(|ack| ack.ok())
                .map(|()| true),
        };
        acks += 1;
        said.insert(id, now);
    }
    consumer.close(long()).await?;
    let there = drain(&*broker, &name).await?;
    same("left", broker.status(&name, long()).await?.messages(), 0)?;
    let mut again = acks - MESSAGES;
    for (id, said) in &said {
        let comes = there.contains(id);
        again += usize::from(comes);
        match said {
            Some(true) => expect(!comes, "after Ok it never comes again", id)?,
            Some(false) => expect(comes, "an ack that was never sent: it comes again", id)?,
            None => {}
        }
    }
    Ok(Evidence::of("acks", acks).and("came again", again))
}

/// A handle whose connection was closed, or whose queue went, settles nothing and says so; least of
/// all another message.
pub async fn c4_a_stale_handle_settles_nothing(cx: &Cx) -> CheckResult {
    const ROUNDS: usize = 8;
    let other = cx.connect().await?;
    for round in 0..ROUNDS {
        let name = queue(&*other, "c4").await?;
        let broker = cx.connect().await?;
        for n in 0..3 {
            put(&*other, &name, format!("old-{n}")).await?;
        }
        let mut consumer = attach(&*broker, &name, 3).await?;
        let mut stale = Vec::new();
        for _ in 0..3 {
            stale.push(receive(&mut *consumer).await?);
        }
        let by_close = round % 2 == 0;
        let expected = if by_close {
            broker.close(long()).await?;
            drop(consumer);
            vec!["old-0".to_owned(), "old-1".into(), "old-2".into()]
        } else {
            other.delete(&name, DeleteMode::Discard, long()).await?;
            queue(&*other, "c4").await?;
            // As many new ones, in the places that the old ones had.
            for n in 0..3 {
                put(&*other, &name, format!("new-{n}")).await?;
            }
            vec!["new-0".to_owned(), "new-1".into(), "new-2".into()]
        };
        // The messages are in other hands when the stale handles are used.
        let mut next = attach(&*other, &name, 3).await?;
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(receive(&mut *next).await?);
        }
        for (n, delivery) in stale.into_iter().enumerate() {
            let id = delivery.message.id.clone();
            let settled = match n {
                0 => timed("a stale ack", delivery.ack(long())).await?.0,
                1 => {
                    timed("a stale retry", delivery.retry(Duration::ZERO, long()))
                        .await?
                        .0
                }
                _ => {
                    timed("a stale reject", delivery.dead_letter("stale", long()))
                        .await?
                        .0
                }
            };
            must_fail(&format!("settling {id} with a stale handle"), settled)?;
        }
        let status = other.status(&name, long()).await?;
        same("[in flight, dead]", [status.in_flight, status.dead], [3, 0])?;
        let mut ids: Vec<_> = held
            .iter()
            .map(|held| held.message.id.to_string())
            .collect();
        ids.sort();
        same("messages in other hands", ids, expected)?;
        for delivery in held {
            delivery.ack(long()).await?;
        }
        next.close(long()).await?;
        other.delete(&name, DeleteMode::IfEmpty, long()).await?;
    }
    Ok(Evidence::of("stale settlements", ROUNDS * 3))
}

/// A process that slept longer than its lease: its ack is Ok and the message gone, or it fails and
/// the message is another's; never both, never neither.
pub async fn c4_a_paused_process_settles_only_what_it_still_has(cx: &Cx) -> CheckResult {
    let broker = cx.connect().await?;
    let name = queue(&*broker, "c4-paused").await?;
    put(&*broker, &name, "contested").await?;
    let mut agent = Agent::start(cx).await?;
    agent.attach(&name, 1).await?;
    agent.receive().await?;
    agent.pause()?;
    let pause = cx.takeover() + Duration::from_secs(1);
    let taken = tokio::time::timeout(pause, async {
        let mut consumer = attach(&*broker, &name, 1).await?;
        let delivery = receive(&mut *consumer).await?;
        Ok::<_, crate::check::CheckError>((consumer, delivery))
    })
    .await;
    agent.resume()?;
    let acked = agent.settle_ack("contested").await?;
    match taken {
        Ok(taken) => {
            let (consumer, delivery) = taken?;
            expect(!acked, "one of two holders can ack", "the stale one did")?;
            delivery.ack(long()).await?;
            consumer.close(long()).await?;
        }
        Err(_) => {
            agent.kill().await?;
            let there = drain(&*broker, &name).await?;
            same(
                "deliveries after the ack's answer",
                there.len(),
                usize::from(!acked),
            )?;
        }
    }
    same("left", broker.status(&name, long()).await?.messages(), 0)?;
    Ok(Evidence::of("pauses", 1).and("paused ms", pause.as_millis()))
}

/// The last ack, then at once the close: no acked message comes back, from 32 tasks at once either.
pub async fn c14_a_close_after_the_last_ack_loses_none(cx: &Cx) -> CheckResult {
    const ROUNDS: usize = 10;
    const MESSAGES: usize = 100;
    let other = cx.connect().await?;
    let name = queue(&*other, "c14").await?;
    for round in 0..ROUNDS {
        for n in 0..MESSAGES {
            put(&*other, &name, format!("r{round}-{n}")).await?;
        }
        let broker = cx.connect().await?;
        let mut consumer = attach(&*broker, &name, 32).await?;
        let mut acks = tokio::task::JoinSet::new();
        for _ in 0..MESSAGES {
            let delivery = receive(&mut *consumer).await?;
            if round % 2 == 0 {
                delivery.ack(long()).await?;
            } else {
                acks.spawn(delivery.ack(long()));
            }
        }
        while let Some(ack) = acks.join_next().await {
            ack.map_err(|error| crate::check::CheckError::failed("no panic", error))??;
        }
        match round % 3 {
            0 => broker.close(long()).await?,
            1 => drop((consumer, broker)),
            _ => consumer.close(long()).await?,
        }
        same(
            "acked ones that came back",
            drain(&*other, &name).await?,
            vec![],
        )?;
    }
    Ok(Evidence::of("acks", ROUNDS * MESSAGES).and("closes", ROUNDS))
}
