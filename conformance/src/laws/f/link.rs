//! F4: the network between a backend and its broker, broken in the middle of the work.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use wilco::{Broker, Deadline, Message, MessageId, QueueName};

use super::{
    back,
    crew::{Crew, note_publish},
    is_outage, proxy, via,
};
use crate::{
    check::{CheckError, CheckResult, Cx},
    ledger::{self, Event, History, Minimum},
    proxy::{After, Toward},
    support::*,
    workload::{finish, publish, settle, verdict},
};

/// Publishers and a consumer at work while all connections are reset, or cut at a random byte, again
/// and again: they go on by themselves, and the ledger is clean.
pub async fn f4_resets_and_cuts_lose_nothing(cx: &Cx) -> CheckResult {
    const FAULTS: usize = 24;
    const PUBLISHERS: usize = 3;
    let (faults, proxy) = proxy(cx).await?;
    let mut rng = cx.rng();
    let history = super::history(cx);
    let control = cx.connect().await?;
    let name = limited(&*control, "f4-resets", 10_000).await?;
    let over = Arc::new(AtomicBool::new(false));
    let mut tasks = Vec::new();
    for n in 0..PUBLISHERS {
        let (broker, name) = (via(faults, &proxy).await?, name.clone());
        let (history, over, mut rng) = (Arc::clone(&history), Arc::clone(&over), rng.fork());
        tasks.push(tokio::spawn(async move {
            let mut sent = 0;
            while !over.load(Ordering::Relaxed) {
                sent += 1;
                publish(&*broker, &name, &format!("p{n}-{sent}"), &history, &mut rng).await?;
                tokio::time::sleep(Duration::from_millis(rng.u64(0..6))).await;
            }
            broker.close(long()).await?;
            Ok(())
        }));
    }
    let broker = via(faults, &proxy).await?;
    let mut consumer = attach(&*broker, &name, 8).await?;
    let guest = {
        let (history, over, name) = (Arc::clone(&history), Arc::clone(&over), name.clone());
        let mut rng = rng.fork();
        tokio::spawn(async move {
            while !over.load(Ordering::Relaxed) {
                let wait = Duration::from_millis(200);
                if let Ok(delivery) = tokio::time::timeout(wait, consumer.next()).await {
                    settle(delivery?, &name, &history, &mut rng).await;
                }
            }
            consumer.close(long()).await?;
            broker.close(long()).await?;
            Ok(())
        })
    };
    tasks.push(guest);
    let breaking = async {
        for n in 0..FAULTS {
            goes_on(&history, back(cx)).await?;
            history.note(Event::Fault {
                what: "connections are broken".into(),
            });
            history.note(Event::Down);
            match n % 3 {
                0 => proxy.reset(),
                1 => proxy.cut(Toward::Broker, After::Bytes(rng.u64(1..4_000)), rng.bool()),
                _ => proxy.cut(Toward::Client, After::Bytes(rng.u64(1..2_000)), rng.bool()),
            }
            goes_on(&history, back(cx)).await?;
            history.note(Event::Up);
        }
        Ok(())
    };
    let went: Result<(), CheckError> = breaking.await;
    over.store(true, Ordering::Relaxed);
    join_all(tasks).await?;
    went?;
    finish(cx, &*control, &name, &history).await?;
    let minimum = Minimum {
        confirmed: FAULTS as u64 * 10,
        faults: FAULTS as u64,
    };
    verdict(cx, &history, minimum)
}

/// Waits until something is confirmed and something is received, from now on.
async fn goes_on(history: &History, within: Duration) -> Result<(), CheckError> {
    const ENOUGH: usize = 10;
    let (since, started) = (history.mark(), Instant::now());
    loop {
        let stored = history.count(&since, |entry| {
            let stored = ledger::Answer::Stored;
            matches!(entry.event, Event::Answer { answer, .. } if answer == stored)
        });
        let came = history.count(&since, |entry| {
            matches!(entry.event, Event::Delivery { .. })
        });
        if stored >= ENOUGH && came >= ENOUGH {
            return Ok(());
        }
        if started.elapsed() > within {
            return Err(CheckError::failed(
                format!("publishers and consumer are back within {within:?}"),
                format!("{stored} confirmed, {came} received"),
            ));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Every connection silently dead, with new ones to be had: it is noticed, and publisher, consumer
/// and responder are back by themselves within the bound. So too when a hole swallows everything in
/// one direction, or in both, new connections too, and then heals.
pub async fn f4_a_black_hole_is_noticed(cx: &Cx) -> CheckResult {
    let (faults, proxy) = proxy(cx).await?;
    let control = cx.connect().await?;
    let (host, guest) = (via(faults, &proxy).await?, via(faults, &proxy).await?);
    let mut crew = Crew::hire(cx, host, guest, "f4-hole").await?;
    let history = crew.office.history.clone();
    let holes: [(&str, &[Toward]); 4] = [
        ("half-open", &[]),
        ("swallowed to the broker", &[Toward::Broker]),
        ("swallowed to the client", &[Toward::Client]),
        ("swallowed", &[Toward::Broker, Toward::Client]),
    ];
    let mut slowest = Duration::ZERO;
    for (n, (what, ways)) in holes.into_iter().enumerate() {
        crew.work(back(cx)).await?;
        history.note(Event::Fault { what: what.into() });
        history.note(Event::Down);
        if ways.is_empty() {
            proxy.half_open();
        } else {
            for toward in ways {
                proxy.swallow(*toward);
            }
            // Longer than anybody needs to notice; calls end by their deadlines meanwhile.
            let limit = Deadline::after(cx.takeover() + Duration::from_secs(2));
            let id = format!("into-{n}");
            while !limit.has_passed() {
                let failed = super::fails_in_time(
                    "publish",
                    super::TRY,
                    |_| false,
                    |by| crew.office.publish(&id, by),
                );
                failed.await?;
            }
            proxy.heal();
        }
        let started = Instant::now();
        crew.work(back(cx))
            .await
            .map_err(|error| after(what, error))?;
        slowest = slowest.max(started.elapsed());
        // What is half-open stays so: nobody may need it.
        history.note(Event::Up);
    }
    let name = crew.office.name.clone();
    crew.dismiss().await?;
    finish(cx, &*control, &name, &history).await?;
    let minimum = Minimum {
        confirmed: holes.len() as u64 * 2,
        faults: holes.len() as u64,
    };
    let evidence = verdict(cx, &history, minimum)?;
    Ok(evidence.and("ms until all were back, at most", slowest.as_millis()))
}

fn after(what: &str, error: CheckError) -> CheckError {
    match error {
        CheckError::Failed(mut failure) => {
            failure.expected = format!("after {what}: {}", failure.expected);
            CheckError::Failed(failure)
        }
        other => other,
    }
}

/// A slow link is slow and nothing else: everything works, no delivery comes twice, and what has too
/// little time for it ends by its deadline with its outcome unknown.
pub async fn f4_a_slow_link_is_only_slow(cx: &Cx) -> CheckResult {
    const DELAY: Duration = Duration::from_millis(150);
    const RATE: u64 = 128 * 1024;
    const MESSAGES: usize = 6;
    let (faults, proxy) = proxy(cx).await?;
    let control = cx.connect().await?;
    let (host, guest) = (via(faults, &proxy).await?, via(faults, &proxy).await?);
    proxy.delay(DELAY);
    proxy.bandwidth(Some(RATE));
    let lane = self::guest("f4-slow")?;
    let name = queue(&*host, "f4-slow").await?;
    let history = super::history(cx);
    // As long on its way as the link makes it.
    let body = vec![b'x'; RATE as usize];
    let large = Message::new("check", body.clone())?.with_id(MessageId::new("large")?);
    let (stored, took) = timed("a publish", host.publish(&name, large, long())).await?;
    stored?;
    let least = Duration::from_secs(1);
    expect(
        took >= least,
        format!("the link is slow: {least:?}"),
        format!("{took:?}"),
    )?;
    for n in 0..MESSAGES {
        note_publish(&*host, &name, &format!("m{n}"), long(), &history).await?;
    }
    let too_short = small_time(&*host, &name, &history).await?;
    let mut consumer = attach(&*guest, &name, 2).await?;
    let first = receive(&mut *consumer).await?;
    same(
        "the large body's size",
        first.message.body.len(),
        body.len(),
    )?;
    same("attempt", first.attempt, 1)?;
    first.ack(long()).await?;
    for n in 0..MESSAGES {
        let delivery = receive(&mut *consumer).await?;
        history.note(Event::delivery(&name, &delivery));
        same(
            "the message",
            delivery.message.id.to_string(),
            format!("m{n}"),
        )?;
        same("attempt", delivery.attempt, 1)?;
        super::crew::note_ack(&name, delivery, long(), &history).await?;
    }
    let mut responder = attach_lane(&*guest, &lane).await?;
    let asked = async {
        let request = asked(&mut *responder).await?;
        request.reply("y".into(), long()).await?;
        Ok::<_, CheckError>(())
    };
    let ((answer, took), replied) = tokio::join!(
        async {
            let started = Instant::now();
            let answer = host.request(&lane, "x".into(), long()).await;
            (answer, started.elapsed())
        },
        asked
    );
    replied?;
    same("the answer", answer?.as_ref(), b"y")?;
    expect(
        took >= DELAY * 4,
        format!("there and back, twice: {:?}", DELAY * 4),
        format!("{took:?}"),
    )?;
    drop(responder);
    consumer.close(long()).await?;
    guest.close(long()).await?;
    host.close(long()).await?;
    finish(cx, &*control, &name, &history).await?;
    history.note(Event::Fault {
        what: "the link was slow all along".into(),
    });
    let minimum = Minimum {
        confirmed: MESSAGES as u64,
        faults: 1,
    };
    let evidence = verdict(cx, &history, minimum)?;
    Ok(evidence.and("publishes with too little time", too_short))
}

/// Publishes that have less time than one way takes.
async fn small_time(
    host: &dyn Broker,
    name: &QueueName,
    history: &History,
) -> Result<usize, CheckError> {
    const TRIES: usize = 4;
    for n in 0..TRIES {
        let limit = Duration::from_millis(50);
        let id = format!("short-{n}");
        let (result, took) = timed(
            "a publish",
            note_publish(host, name, &id, limit.into(), history),
        )
        .await?;
        let error = must_fail("a publish without the time for it", result)?;
        expect(is_outage(&error), "its deadline is over", &error)?;
        expect(
            took < limit + super::GRACE,
            format!("it ends by its deadline, {limit:?}"),
            format!("{took:?}"),
        )?;
    }
    Ok(TRIES)
}
