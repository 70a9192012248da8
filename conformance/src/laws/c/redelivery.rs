//! C1, C10: what is not settled when its consumer goes comes again.

use std::{collections::BTreeSet, time::Instant};

use wilco::Broker;

use crate::{
    agent::Agent,
    check::{CheckError, CheckResult, Cx, Evidence},
    support::*,
};

/// The consumer and its unsettled deliveries dropped: each message comes again, counted.
pub async fn c1_a_dropped_consumer_gives_all_back(cx: &Cx) -> CheckResult {
    const MESSAGES: usize = 20;
    let handles = handles(cx, 2).await?;
    let name = queue(&*handles[0], "c1").await?;
    for n in 0..MESSAGES {
        put(&*handles[0], &name, format!("m{n:02}")).await?;
    }
    let mut consumer = attach(&*handles[0], &name, MESSAGES as u32).await?;
    let mut held = Vec::new();
    for _ in 0..MESSAGES / 2 {
        held.push(receive(&mut *consumer).await?);
    }
    drop(consumer);
    drop(held);
    let attempts = take_all(cx, &*handles[1], &name, MESSAGES).await?;
    let twice = attempts.iter().filter(|(_, attempt)| *attempt == 2).count();
    same(
        "of those, delivered for the second time",
        twice,
        MESSAGES / 2,
    )?;
    Ok(Evidence::of("messages", MESSAGES))
}

/// The whole handle closed, or dropped without a close: the same.
pub async fn c1_a_vanished_handle_gives_all_back(cx: &Cx) -> CheckResult {
    const MESSAGES: usize = 10;
    let other = cx.connect().await?;
    let name = queue(&*other, "c1-handle").await?;
    for close in [true, false] {
        for n in 0..MESSAGES {
            put(&*other, &name, format!("m{n}-{close}")).await?;
        }
        let broker = cx.connect().await?;
        let mut consumer = attach(&*broker, &name, 4).await?;
        let held = [
            receive(&mut *consumer).await?,
            receive(&mut *consumer).await?,
        ];
        if close {
            broker.close(long()).await?;
        }
        drop((held, consumer, broker));
        take_all(cx, &*other, &name, MESSAGES).await?;
    }
    Ok(Evidence::of("messages", MESSAGES * 2))
}

/// A consumer process killed with deliveries in hand: they come again within the stated bound.
pub async fn c1_a_killed_process_gives_all_back(cx: &Cx) -> CheckResult {
    const ROUNDS: usize = 3;
    const MESSAGES: usize = 8;
    let broker = cx.connect().await?;
    let name = queue(&*broker, "c1-killed").await?;
    for round in 0..ROUNDS {
        for n in 0..MESSAGES {
            put(&*broker, &name, format!("r{round}-{n}")).await?;
        }
        let mut agent = Agent::start(cx).await?;
        agent.attach(&name, MESSAGES as u32).await?;
        let mut handed_out = Vec::new();
        for _ in 0..MESSAGES / 2 {
            handed_out.push(agent.receive().await?.0);
        }
        agent.kill().await?;
        // What it had buffered may count as delivered: only the dead process knew what it had handed
        // out, unless it told the broker of each.
        for (id, attempt) in take_all(cx, &*broker, &name, MESSAGES).await? {
            let counts = if handed_out.contains(&id) {
                2..=2
            } else {
                1..=2
            };
            let expected = format!("attempt of {id} after the kill: {counts:?}");
            expect(counts.contains(&attempt), expected, attempt)?;
        }
    }
    Ok(Evidence::of("kills", ROUNDS).and("messages", ROUNDS * MESSAGES))
}

/// Takes that many messages, all within the stated bound, acks them, and returns each one's id and
/// attempt.
async fn take_all(
    cx: &Cx,
    broker: &dyn Broker,
    name: &wilco::QueueName,
    messages: usize,
) -> Result<Vec<(String, u32)>, CheckError> {
    let started = Instant::now();
    let mut consumer = attach(broker, name, 4).await?;
    let mut taken = Vec::new();
    for _ in 0..messages {
        let delivery = receive(&mut *consumer).await?;
        taken.push((delivery.message.id.to_string(), delivery.attempt));
        delivery.ack(long()).await?;
    }
    let bound = cx.takeover() + ROUND_TRIP;
    let took = started.elapsed();
    expect(
        took < bound,
        format!("all of them within {bound:?}"),
        format!("{took:?}"),
    )?;
    let ids: BTreeSet<_> = taken.iter().map(|(id, _)| id).collect();
    same("different messages", ids.len(), messages)?;
    same("left", broker.status(name, long()).await?.messages(), 0)?;
    consumer.close(long()).await?;
    Ok(taken)
}

/// Dropped unsettled sixty times: it comes again each time, and is never acked by that.
pub async fn c10_dropping_a_delivery_gives_it_back(cx: &Cx) -> CheckResult {
    const DROPS: u32 = 60;
    let broker = cx.connect().await?;
    let name = queue(&*broker, "c10").await?;
    put(&*broker, &name, "again").await?;
    let mut consumer = attach(&*broker, &name, 1).await?;
    for n in 1..=DROPS {
        let delivery = receive(&mut *consumer).await?;
        same("attempt", delivery.attempt, n)?;
        drop(delivery);
    }
    // A panic in a handler drops its delivery too.
    let delivery = receive(&mut *consumer).await?;
    let handler = tokio::spawn(async move {
        let _held = delivery;
        std::panic::resume_unwind(Box::new("a handler's panic"));
    });
    expect(handler.await.is_err(), "the handler panics", "it did not")?;
    let delivery = receive(&mut *consumer).await?;
    same("attempt after the panic", delivery.attempt, DROPS + 2)?;
    delivery.ack(long()).await?;
    same("left", broker.status(&name, long()).await?.messages(), 0)?;
    Ok(Evidence::of("drops", DROPS + 1))
}
