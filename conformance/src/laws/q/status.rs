//! Q2, Q9: looking at a queue, which touches nothing and is right at once.

use std::{sync::Arc, time::Duration};

use wilco::{
    Broker, QueueName,
    broker::{Declared, QueueSpec},
};

use crate::{
    check::{CheckError, CheckResult, Cx, Evidence},
    support::*,
};

/// Hammered while a message waits and while one is held: no delivery is counted, none is taken.
pub async fn q2_looking_never_touches_a_message(cx: &Cx) -> CheckResult {
    let handles = handles(cx, 2).await?;
    let name = queue(&*handles[0], "q2").await?;
    put(&*handles[0], &name, "first").await?;
    put(&*handles[0], &name, "second").await?;
    // One delivery behind it, so that a further count cannot hide as the first.
    let mut consumer = attach(&*handles[0], &name, 1).await?;
    receive(&mut *consumer)
        .await?
        .retry(Duration::ZERO, long())
        .await?;
    consumer.close(long()).await?;

    let mut looks = hammer(&handles, &name).await?;
    let status = handles[0].status(&name, long()).await?;
    same("ready after the hammering", status.ready, 2)?;

    let mut consumer = attach(&*handles[0], &name, 2).await?;
    let mut held = [
        receive(&mut *consumer).await?,
        receive(&mut *consumer).await?,
    ];
    held.sort_by_key(|delivery| delivery.message.id.clone());
    looks += hammer(&handles, &name).await?;
    let attempts = held.each_ref().map(|delivery| delivery.attempt);
    same("attempts of first and second", attempts, [2, 1])?;
    for delivery in held {
        delivery.ack(long()).await?;
    }
    same(
        "left",
        handles[0].status(&name, long()).await?.messages(),
        0,
    )?;
    Ok(Evidence::of("looks", looks))
}

async fn hammer(handles: &[Arc<dyn Broker>], name: &QueueName) -> Result<usize, CheckError> {
    const TASKS: usize = 8;
    const TIMES: usize = 25;
    let tasks = (0..TASKS).map(|n| {
        let (broker, name) = (Arc::clone(&handles[n % handles.len()]), name.clone());
        tokio::spawn(async move {
            for _ in 0..TIMES {
                let declared = broker
                    .declare(&QueueSpec::new(name.clone()), long())
                    .await?;
                same("declare", declared, Declared::AlreadyExists)?;
                broker.status(&name, long()).await?;
                broker.list(long()).await?;
                broker.dead_letters(&name, None, count(10), long()).await?;
            }
            Ok(())
        })
    });
    join_all(tasks.collect::<Vec<_>>()).await?;
    Ok(TASKS * TIMES * 4)
}

/// Right at once after publish, receive, ack, retry and dead-letter, from another handle too.
pub async fn q9_status_is_right_at_once(cx: &Cx) -> CheckResult {
    const ROUNDS: u64 = 20;
    let handles = handles(cx, 2).await?;
    let (broker, other) = (&*handles[0], &*handles[1]);
    let name = queue(broker, "q9").await?;
    let mut dead = 0;
    for round in 0..ROUNDS {
        for n in 1..=5 {
            put(broker, &name, format!("r{round}-{n}")).await?;
            status_is(other, &name, [n, 0, 0, dead]).await?;
        }
        let mut consumer = attach(broker, &name, 1).await?;
        same("consumers", other.status(&name, long()).await?.consumers, 1)?;
        let delivery = receive(&mut *consumer).await?;
        status_is(other, &name, [4, 0, 1, dead]).await?;
        delivery.ack(long()).await?;
        total_is(other, &name, 4, 0, dead).await?;
        receive(&mut *consumer)
            .await?
            .dead_letter("seen", long())
            .await?;
        dead += 1;
        total_is(other, &name, 3, 0, dead).await?;
        receive(&mut *consumer)
            .await?
            .retry(Duration::from_secs(3600), long())
            .await?;
        total_is(other, &name, 2, 1, dead).await?;
        for _ in 0..2 {
            receive(&mut *consumer).await?.ack(long()).await?;
        }
        status_is(other, &name, [0, 1, 0, dead]).await?;
        consumer.close(long()).await?;
        same("consumers", other.status(&name, long()).await?.consumers, 0)?;
        // The delayed one is in the way of the next round's counts.
        let gone = broker
            .delete(&name, wilco::broker::DeleteMode::Discard, long())
            .await?;
        same("discarded", gone.messages, 1 + dead)?;
        dead = 0;
        queue(broker, "q9").await?;
    }
    Ok(Evidence::of("statuses", ROUNDS * 13))
}

async fn status_is(
    broker: &dyn Broker,
    name: &QueueName,
    [ready, delayed, in_flight, dead]: [u64; 4],
) -> Result<(), CheckError> {
    let seen = broker.status(name, long()).await?;
    same(
        "[ready, delayed, in flight, dead]",
        [seen.ready, seen.delayed, seen.in_flight, seen.dead],
        [ready, delayed, in_flight, dead],
    )?;
    let listed = broker
        .list(long())
        .await?
        .into_iter()
        .find(|status| status.name == *name);
    same("the same in the list", listed, Some(seen))
}

/// As [`status_is`], where the next message may be on its way to the consumer already.
async fn total_is(
    broker: &dyn Broker,
    name: &QueueName,
    waiting: u64,
    delayed: u64,
    dead: u64,
) -> Result<(), CheckError> {
    let seen = broker.status(name, long()).await?;
    same(
        "[ready + in flight, delayed, dead]",
        [seen.ready + seen.in_flight, seen.delayed, seen.dead],
        [waiting, delayed, dead],
    )
}
