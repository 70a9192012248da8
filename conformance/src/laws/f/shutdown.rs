//! F8: shutdown, with the broker there and with the broker down.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use wilco::{Broker, ErrorKind, Outcome, QueueName};

use super::{GRACE, is_outage, killable};
use crate::{
    check::{CheckError, CheckResult, Cx, Evidence},
    harness::Faults,
    support::*,
};

/// Shut down again and again with a full buffer and publishes under way: what was acked is gone, what
/// was only buffered comes for the first time, nothing is dead, and each publish that was under way
/// tells the truth.
pub async fn f8_a_shutdown_burns_no_count(cx: &Cx) -> CheckResult {
    const ROUNDS: usize = 12;
    const LIMIT: u32 = 3;
    const UNDER_WAY: usize = 16;
    let control = cx.connect().await?;
    let name = limited(&*control, "f8", LIMIT).await?;
    let other = queue(&*control, "f8-other").await?;
    let mut rng = cx.rng();
    let mut left = BTreeSet::new();
    for n in 0..ROUNDS * 2 {
        put(&*control, &name, format!("m{n:02}")).await?;
        left.insert(format!("m{n:02}"));
    }
    let (mut stored, mut refused) = (BTreeSet::new(), BTreeSet::new());
    for round in 0..ROUNDS {
        let broker = cx.connect().await?;
        let mut consumer = attach(&*broker, &name, 16).await?;
        let delivery = receive(&mut *consumer).await?;
        same("attempt", delivery.attempt, 1)?;
        let id = delivery.message.id.to_string();
        let publishes: Vec<_> = (0..UNDER_WAY)
            .map(|n| {
                let (broker, other) = (Arc::clone(&broker), other.clone());
                tokio::spawn(async move {
                    let id = format!("r{round}-{n}");
                    let result = broker.publish(&other, named(id.as_str())?, long()).await;
                    Ok((id, result.map(drop)))
                })
            })
            .collect();
        delivery.ack(long()).await?;
        left.remove(&id);
        // Some have their answers by then, some are on their way, some have not begun.
        tokio::time::sleep(Duration::from_micros(rng.u64(0..8_000))).await;
        // In turn the consumer first, and the handle with everything on it.
        if round % 2 == 0 {
            consumer.close(long()).await?;
        }
        let (closed, took) = timed("a close", broker.close(long())).await?;
        closed?;
        expect(took < LONG / 2, "a close ends soon", format!("{took:?}"))?;
        for (id, result) in join_all(publishes).await? {
            match result {
                Ok(()) => drop(stored.insert(id)),
                Err(error) if error.outcome() == Some(Outcome::NotStored) => {
                    refused.insert(id);
                }
                Err(error) => {
                    let kind = format!("{error} ({:?})", error.kind());
                    let closed = *error.kind() == ErrorKind::Closed || is_outage(&error);
                    expect(closed, "a publish cut short by a close says so", kind)?;
                }
            }
        }
    }
    same("dead letters", control.status(&name, long()).await?.dead, 0)?;
    let mut consumer = attach(&*control, &name, 4).await?;
    let mut seen = BTreeSet::new();
    for _ in &left {
        let delivery = receive(&mut *consumer).await?;
        same("attempt of what was only buffered", delivery.attempt, 1)?;
        seen.insert(delivery.message.id.to_string());
        delivery.ack(long()).await?;
    }
    same("what was only buffered", seen, left)?;
    consumer.close(long()).await?;
    same("left", control.status(&name, long()).await?.messages(), 0)?;
    let there: BTreeSet<_> = drain(&*control, &other).await?.into_iter().collect();
    let missing: Vec<_> = stored.difference(&there).collect();
    expect(missing.is_empty(), "what was Ok is there", short(&missing))?;
    let phantoms: Vec<_> = refused.intersection(&there).collect();
    expect(phantoms.is_empty(), "NotStored is final", short(&phantoms))?;
    Ok(Evidence::of("shutdowns", ROUNDS)
        .and("publishes under way that were stored", stored.len())
        .and("that were not", refused.len()))
}

/// With the broker down or silent, consumer and handle close in bounded time; afterwards what was
/// held and what was buffered comes again, nothing is dead, nothing acked is back.
pub async fn f8_a_close_with_the_broker_down_ends(cx: &Cx) -> CheckResult {
    let faults = killable(cx).await?;
    let control = cx.connect().await?;
    for (round, down) in [Down::Killed, Down::Paused].into_iter().enumerate() {
        let name = limited(&*control, &format!("f8-down-{round}"), 4).await?;
        closes_while(cx, faults, &*control, &name, down).await?;
    }
    Ok(Evidence::of("closes", 8))
}

#[derive(Clone, Copy, Debug)]
enum Down {
    Killed,
    Paused,
}

impl Down {
    async fn begin(self, faults: &dyn Faults) -> Result<(), CheckError> {
        match self {
            Self::Killed => faults.kill().await?,
            Self::Paused => faults.pause()?,
        }
        Ok(())
    }

    async fn end(self, faults: &dyn Faults) -> Result<(), CheckError> {
        match self {
            Self::Killed => faults.start().await?,
            Self::Paused => faults.resume()?,
        }
        Ok(())
    }
}

async fn closes_while(
    cx: &Cx,
    faults: &dyn Faults,
    control: &dyn Broker,
    name: &QueueName,
    down: Down,
) -> Result<(), CheckError> {
    const MESSAGES: usize = 8;
    for n in 0..MESSAGES {
        put(control, name, format!("m{n}")).await?;
    }
    let broker = cx.connect().await?;
    let idle = cx.connect().await?;
    let mut consumer = attach(&*broker, name, MESSAGES as u32).await?;
    let acked = receive(&mut *consumer).await?;
    acked.ack(long()).await?;
    let held = receive(&mut *consumer).await?;
    down.begin(faults).await?;
    let closing = async {
        ends("a consumer's close", |by| consumer.close(by)).await?;
        drop(held);
        ends("a handle's close", |by| broker.close(by)).await?;
        ends("an idle handle's close", |by| idle.close(by)).await?;
        // A second call does nothing, and does not wait for anything either.
        ends("a second close", |by| broker.close(by)).await
    };
    let closed = closing.await;
    let after = broker.publish(name, named("after")?, GRACE.into()).await;
    down.end(faults).await?;
    closed?;
    let closed = must_be("a publish after the close", after, &ErrorKind::Closed)?;
    same("its outcome", closed.outcome(), Some(Outcome::NotStored))?;
    let guest = cx.connect().await?;
    let mut consumer = attach(&*guest, name, 4).await?;
    let mut seen = BTreeSet::new();
    for _ in 1..MESSAGES {
        let delivery = receive_within(&mut *consumer, super::back(cx)).await?;
        expect(
            delivery.attempt <= 2,
            format!("{down:?}: delivered once before at the most"),
            format!(
                "{} comes with attempt {}",
                delivery.message.id, delivery.attempt
            ),
        )?;
        seen.insert(delivery.message.id.to_string());
        delivery.ack(long()).await?;
    }
    let expected: BTreeSet<_> = (1..MESSAGES).map(|n| format!("m{n}")).collect();
    same("what came again", seen, expected)?;
    consumer.close(long()).await?;
    same("left", guest.status(name, long()).await?.messages(), 0)?;
    guest.close(long()).await?;
    Ok(())
}

/// A close that is given three seconds ends in three, whatever it says.
async fn ends<F: Future<Output = wilco::Result<()>>>(
    what: &str,
    close: impl FnOnce(wilco::Deadline) -> F,
) -> Result<(), CheckError> {
    const WITHIN: Duration = Duration::from_secs(3);
    let started = Instant::now();
    let (result, took) = timed(what, close(WITHIN.into())).await?;
    expect(
        took < WITHIN + GRACE,
        format!("{what} ends within {WITHIN:?}"),
        format!("{:?}", started.elapsed()),
    )?;
    match result {
        Err(error) if !is_outage(&error) => Err(CheckError::failed(
            format!("{what} is Ok, or says that the broker cannot be reached"),
            format!("{error} ({:?})", error.kind()),
        )),
        _ => Ok(()),
    }
}
