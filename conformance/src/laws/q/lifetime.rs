//! Q10, Q12: queues outlive idleness and restarts, and drop nothing of their own accord.

use std::{sync::Arc, time::Duration};

use wilco::{
    ErrorKind, Outcome,
    broker::{Declared, QueueSpec},
};

use crate::{
    check::{CheckResult, Cx, Evidence},
    support::*,
};

/// Queues without a consumer ever, empty or not, are there after a restart with what they held.
pub async fn q10_an_idle_queue_outlives_a_restart(cx: &Cx) -> CheckResult {
    const RESTARTS: u64 = 3;
    let broker = cx.connect().await?;
    let spec = QueueSpec::new(guest("q10")?.queue()).with_max_messages(9);
    let empty = QueueSpec::new(guest("q10-empty")?.queue());
    broker.declare(&spec, long()).await?;
    broker.declare(&empty, long()).await?;
    put(&*broker, &spec.name, "waits").await?;
    drop(broker);
    for _ in 0..RESTARTS {
        cx.server.restart().await?;
        let broker = cx.connect().await?;
        for spec in [&spec, &empty] {
            same(
                "declare",
                broker.declare(spec, long()).await?,
                Declared::AlreadyExists,
            )?;
        }
        same("ready", broker.status(&spec.name, long()).await?.ready, 1)?;
    }
    let broker = cx.connect().await?;
    same(
        "messages",
        drain(&*broker, &spec.name).await?,
        vec!["waits".into()],
    )?;
    Ok(Evidence::of("restarts", RESTARTS))
}

/// Longer than the backend takes to give up a vanished consumer, with no handle's help.
pub async fn q10_an_idle_queue_outlives_the_idle_timers(cx: &Cx) -> CheckResult {
    let idle = cx.takeover() + Duration::from_secs(1);
    let broker = cx.connect().await?;
    let name = queue(&*broker, "q10").await?;
    let empty = queue(&*broker, "q10-empty").await?;
    put(&*broker, &name, "waits").await?;
    // The law is about time passing, so time has to pass.
    tokio::time::sleep(idle).await;
    let other = cx.connect().await?;
    same("ready", other.status(&name, long()).await?.ready, 1)?;
    same("ready", other.status(&empty, long()).await?.ready, 0)?;
    same(
        "messages",
        drain(&*other, &name).await?,
        vec!["waits".into()],
    )?;
    Ok(Evidence::of("idle ms", idle.as_millis()))
}

/// At the limit the new publish fails, from 64 tasks at once too; what is stored stays.
pub async fn q12_at_the_limit_the_new_one_is_refused(cx: &Cx) -> CheckResult {
    const ROOM: usize = 5;
    const TASKS: usize = 64;
    let broker = cx.connect().await?;
    let name = guest("q12")?.queue();
    let spec = QueueSpec::new(name.clone()).with_max_messages(ROOM as u64);
    broker.declare(&spec, long()).await?;
    let tasks = (0..TASKS).map(|n| {
        let (broker, name) = (Arc::clone(&broker), name.clone());
        tokio::spawn(async move {
            match broker.publish(&name, named(format!("m{n}"))?, long()).await {
                Ok(_) => Ok(Some(format!("m{n}"))),
                Err(error) => {
                    same(
                        "over the limit",
                        error.kind().clone(),
                        ErrorKind::BrokerRefused,
                    )?;
                    same("outcome", error.outcome(), Some(Outcome::NotStored))?;
                    Ok(None)
                }
            }
        })
    });
    let mut stored: Vec<_> = join_all(tasks.collect::<Vec<_>>())
        .await?
        .into_iter()
        .flatten()
        .collect();
    same("stored", stored.len(), ROOM)?;
    same(
        "ready",
        broker.status(&name, long()).await?.ready,
        ROOM as u64,
    )?;
    // One goes, one fits, the next does not.
    let mut consumer = attach(&*broker, &name, 1).await?;
    let first = receive(&mut *consumer).await?;
    stored.retain(|id| *id != *first.message.id.as_str());
    first.ack(long()).await?;
    put(&*broker, &name, "fits").await?;
    let answer = broker.publish(&name, named("does-not")?, long()).await;
    must_be("one too many", answer, &ErrorKind::BrokerRefused)?;
    stored.push("fits".into());
    let mut drained = Vec::new();
    for _ in 0..ROOM {
        let delivery = receive(&mut *consumer).await?;
        drained.push(delivery.message.id.to_string());
        delivery.ack(long()).await?;
    }
    same("left", broker.status(&name, long()).await?.messages(), 0)?;
    stored.sort();
    drained.sort();
    same("what came out", drained, stored)?;
    Ok(Evidence::of("publishes", TASKS + 2).and("refused", TASKS - ROOM + 1))
}
