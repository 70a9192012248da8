//! C12, C13: attaching: one at a time, and none too early or too late.

use std::{sync::Arc, time::Duration};

use wilco::{
    ErrorKind,
    broker::{DeleteMode, QueueSpec},
};

use crate::{
    agent::Agent,
    check::{CheckResult, Cx, Evidence},
    support::*,
};

/// Of many that attach at once one is served and the others are told; after it went the next can.
pub async fn c12_one_consumer_is_served_the_other_is_told(cx: &Cx) -> CheckResult {
    const ROUNDS: usize = 10;
    const TASKS: usize = 16;
    let handles = handles(cx, 4).await?;
    let name = queue(&*handles[0], "c12").await?;
    for round in 0..ROUNDS {
        let tasks = (0..TASKS).map(|n| {
            let (broker, name) = (Arc::clone(&handles[n % 4]), name.clone());
            tokio::spawn(async move {
                match broker.consume(&name, prefetch(1), long()).await {
                    Ok(consumer) => Ok(Some(consumer)),
                    Err(error) => {
                        same(
                            "the other is told",
                            error.kind().clone(),
                            ErrorKind::Conflict,
                        )?;
                        Ok(None)
                    }
                }
            })
        });
        let attached = join_all(tasks.collect::<Vec<_>>()).await?;
        let mut attached: Vec<_> = attached.into_iter().flatten().collect();
        same("attached at once", attached.len(), 1)?;
        let Some(mut consumer) = attached.pop() else {
            continue;
        };
        same(
            "consumers",
            handles[1].status(&name, long()).await?.consumers,
            1,
        )?;
        put(&*handles[2], &name, format!("m{round}")).await?;
        let delivery = receive(&mut *consumer).await?;
        same(
            "served",
            delivery.message.id.to_string(),
            format!("m{round}"),
        )?;
        delivery.ack(long()).await?;
        let conflict = handles[3].consume(&name, prefetch(1), long()).await;
        must_be("another one", conflict, &ErrorKind::Conflict)?;
        consumer.close(long()).await?;
        let next = handles[3].consume(&name, prefetch(1), long()).await?;
        next.close(long()).await?;
    }
    // The same for a lane.
    let lane = guest("c12")?;
    let responder = attach_lane(&*handles[0], &lane).await?;
    let conflict = handles[1].respond(&lane, long()).await;
    must_be("another one on the lane", conflict, &ErrorKind::Conflict)?;
    drop(responder);
    drop(attach_lane(&*handles[1], &lane).await?);
    Ok(Evidence::of("races", ROUNDS).and("contenders", TASKS))
}

/// The same across processes: told while the other lives, served within the bound after its kill.
pub async fn c12_across_processes(cx: &Cx) -> CheckResult {
    let broker = cx.connect().await?;
    let name = queue(&*broker, "c12-process").await?;
    let mut agent = Agent::start(cx).await?;
    agent.attach(&name, 1).await?;
    let conflict = broker.consume(&name, prefetch(1), long()).await;
    must_be("a second consumer", conflict, &ErrorKind::Conflict)?;
    same(
        "consumers",
        broker.status(&name, long()).await?.consumers,
        1,
    )?;
    agent.kill().await?;
    let bound = cx.takeover() + ROUND_TRIP;
    let (consumer, took) = timed("attach after the kill", attach(&*broker, &name, 1)).await?;
    expect(
        took < bound,
        format!("served within {bound:?}"),
        format!("{took:?}"),
    )?;
    consumer?.close(long()).await?;
    Ok(Evidence::of("kills", 1).and("takeover ms", took.as_millis()))
}

/// Published at every instant around the first attach: 1,000 races, or as many as asked for; none lost.
pub async fn c13_none_is_lost_around_the_first_attach(cx: &Cx) -> CheckResult {
    const LANES: usize = 4;
    let races = cx.options.races.div_ceil(LANES);
    let handles = handles(cx, 2).await?;
    let seed = cx.options.seed;
    let lanes = (0..LANES).map(|lane| {
        let (control, guest_side) = (Arc::clone(&handles[0]), Arc::clone(&handles[1]));
        tokio::spawn(async move {
            let mut rng = fastrand::Rng::with_seed(seed.wrapping_add(lane as u64));
            for race in 0..races {
                let name = guest(&format!("c13-{lane}-{race}"))?.queue();
                control
                    .declare(&QueueSpec::new(name.clone()), long())
                    .await?;
                let head_start = rng.i32(-800..800);
                let publish = async {
                    pause(head_start).await;
                    put(&*control, &name, "first").await?;
                    put(&*control, &name, "second").await
                };
                let consume = async {
                    pause(-head_start).await;
                    let mut consumer = attach(&*guest_side, &name, 4).await?;
                    for expected in ["first", "second"] {
                        let delivery = receive(&mut *consumer).await?;
                        same("the next", delivery.message.id.as_str(), expected)?;
                        delivery.ack(long()).await?;
                    }
                    consumer
                        .close(long())
                        .await
                        .map_err(crate::check::CheckError::from)
                };
                tokio::try_join!(publish, consume)?;
                control.delete(&name, DeleteMode::IfEmpty, long()).await?;
            }
            Ok(())
        })
    });
    join_all(lanes.collect::<Vec<_>>()).await?;
    Ok(Evidence::of("races", LANES * races).and("messages", LANES * races * 2))
}

/// Waits so many microseconds, or not at all: what places one side of a race before the other.
async fn pause(micros: i32) {
    if let Ok(micros @ 1..) = u64::try_from(micros) {
        tokio::time::sleep(Duration::from_micros(micros)).await;
    }
}

/// Many messages that waited before any consumer ever came are all delivered, in order.
pub async fn c13_what_waited_before_the_first_consumer_is_delivered(cx: &Cx) -> CheckResult {
    const MESSAGES: usize = 500;
    let handles = handles(cx, 2).await?;
    let name = queue(&*handles[0], "c13-waited").await?;
    let expected: Vec<_> = (0..MESSAGES).map(|n| format!("m{n:03}")).collect();
    for id in &expected {
        put(&*handles[0], &name, id.clone()).await?;
    }
    same("messages", drain(&*handles[1], &name).await?, expected)?;
    Ok(Evidence::of("messages", MESSAGES))
}
