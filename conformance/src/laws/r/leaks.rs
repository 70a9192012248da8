//! R5, R9: what requests leave behind, which is nothing.

use std::{sync::Arc, time::Duration};

use wilco::{Broker, Deadline, ErrorKind, GuestAddress};

use crate::{
    check::{CheckError, CheckResult, Cx, Evidence},
    harness::Unavailable,
    support::*,
};

/// 100,000 unanswered requests: this process does not grow, and the broker holds nothing of them.
pub async fn r5_unanswered_requests_leave_nothing_behind(cx: &Cx) -> CheckResult {
    const REQUESTS: usize = 100_000;
    const WARM_UP: usize = 2_000;
    const GROWTH: u64 = 16 << 20;
    let handles = handles(cx, 2).await?;
    let lane = guest("r5-unanswered")?;
    let mut responder = attach_lane(&*handles[1], &lane).await?;
    // Half of them are looked at and dropped, so that both ends have something to forget.
    let ignoring = tokio::spawn(async move { while responder.next().await.is_ok() {} });
    unanswered(&handles[0], &lane, WARM_UP).await?;
    let held = remains(cx, &lane).await?;
    let before = resident("self")?;
    unanswered(&handles[0], &lane, REQUESTS).await?;
    let grown = resident("self")?.saturating_sub(before);
    expect(
        grown < GROWTH,
        format!(
            "less than {} MiB more after {REQUESTS} requests",
            GROWTH >> 20
        ),
        format!("{} KiB", grown >> 10),
    )?;
    same(
        "what the broker holds of the lane",
        remains(cx, &lane).await?,
        held,
    )?;
    ignoring.abort();
    Ok(Evidence::of("requests", REQUESTS + WARM_UP).and("grown KiB", grown >> 10))
}

/// What the broker's own view shows of the lane; nothing where the broker is inside this process,
/// whose memory is looked at anyway.
async fn remains(cx: &Cx, lane: &GuestAddress) -> Result<Vec<String>, CheckError> {
    match cx.server.remains(&lane.queue()).await {
        Err(Unavailable(_)) => Ok(vec![]),
        shown => Ok(shown?),
    }
}

/// So many requests, 1,000 at once, each given up after a moment.
async fn unanswered(
    broker: &Arc<dyn Broker>,
    lane: &GuestAddress,
    requests: usize,
) -> Result<(), CheckError> {
    const TASKS: usize = 1_000;
    let tasks = (0..TASKS).map(|_| {
        let (broker, lane) = (Arc::clone(broker), lane.clone());
        tokio::spawn(async move {
            for _ in 0..requests / TASKS {
                let limit = Deadline::after(Duration::from_millis(500));
                let answer = broker.request(&lane, vec![b'x'; 1024].into(), limit).await;
                let error = must_fail("an unanswered request", answer)?;
                // On a machine that is busy enough the time is over before it has left.
                let unanswered = [ErrorKind::ConsumerSilent, ErrorKind::DeadlineExceeded];
                let kind = format!("{error} ({:?})", error.kind());
                expect(
                    unanswered.contains(error.kind()),
                    "an unanswered request is silence",
                    kind,
                )?;
            }
            Ok(())
        })
    });
    join_all(tasks.collect::<Vec<_>>()).await?;
    Ok(())
}

/// Pings of every outcome leave the durable queue as it was: its status, its messages, its counts.
pub async fn r9_pings_never_touch_the_durable_queue(cx: &Cx) -> CheckResult {
    const PINGS: usize = 50;
    let handles = handles(cx, 2).await?;
    let lane = guest("r9")?;
    let name = queue(&*handles[0], "r9").await?;
    put(&*handles[0], &name, "waits").await?;
    let before = handles[0].status(&name, long()).await?;
    for _ in 0..PINGS {
        let answer = handles[0].request(&lane, "x".into(), long()).await;
        must_be("a ping of nobody", answer, &ErrorKind::NoConsumer)?;
    }
    let mut responder = attach_lane(&*handles[1], &lane).await?;
    for n in 0..PINGS {
        let limit = Deadline::after(Duration::from_millis(if n % 5 == 0 { 100 } else { 20_000 }));
        let answered = tokio::join!(handles[0].request(&lane, "x".into(), limit), async {
            let asked = asked(&mut *responder).await?;
            if n % 5 != 0 {
                asked.reply("y".into(), long()).await?;
            }
            Ok::<_, CheckError>(())
        });
        answered.1?;
        same("answered", answered.0.is_ok(), n % 5 != 0)?;
    }
    same(
        "the status",
        handles[0].status(&name, long()).await?,
        before.clone(),
    )?;
    drop(responder);
    same(
        "the status",
        handles[1].status(&name, long()).await?,
        before,
    )?;
    let mut consumer = attach(&*handles[1], &name, 4).await?;
    let delivery = receive(&mut *consumer).await?;
    same("the message", delivery.message.id.as_str(), "waits")?;
    same("attempt", delivery.attempt, 1)?;
    delivery.ack(long()).await?;
    same(
        "left",
        handles[0].status(&name, long()).await?.messages(),
        0,
    )?;
    Ok(Evidence::of("pings", PINGS * 2))
}
