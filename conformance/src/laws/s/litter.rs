//! S2: what no client would send, in a queue and among the reports.

use std::time::Duration;

use tokio::time::{Instant, timeout};
use wilco::{Broker, QueueName, broker::Consumer};

use crate::{
    check::{CheckError, CheckResult, Cx, Evidence},
    harness::{Litter, Theft},
    support::{LONG, attach, count, expect, long, named, put, queue, receive, same},
};

/// How often it is looked whether all of it is there.
const LOOK: Duration = Duration::from_millis(100);

/// Bytes that are no message of any client's, sent to an attached consumer and to a queue without one: each is
/// parked, nobody falls over, and what stands behind them is delivered.
pub async fn s2_what_no_client_would_send_is_parked(cx: &Cx) -> CheckResult {
    let broker = cx.connect().await?;
    let queue = queue(&*broker, "s2-litter").await?;
    let mut consumer = attach(&*broker, &queue, 4).await?;
    let mut parked = cx.server.litter(Litter::Queue(&queue)).await?;
    put(&*broker, &queue, "behind").await?;
    park(&*broker, &queue, &mut *consumer, "behind", parked).await?;

    consumer.close(long()).await?;
    parked += cx.server.litter(Litter::Queue(&queue)).await?;
    put(&*broker, &queue, "waited").await?;
    let other = cx.connect().await?;
    let mut consumer = attach(&*other, &queue, 4).await?;
    park(&*other, &queue, &mut *consumer, "waited", parked).await?;

    let letters = broker
        .dead_letters(&queue, None, count(1_000), long())
        .await?;
    same("dead letters to look at", letters.len(), parked)?;
    put(&*broker, &queue, "after").await?;
    let delivery = receive(&mut *consumer).await?;
    same("what comes after it", delivery.message.id.as_str(), "after")?;
    delivery.ack(long()).await?;
    Ok(Evidence::of("pieces parked", parked))
}

/// Sends what comes of it to the dead letters, until all of it is there and this message has come.
pub(super) async fn park(
    broker: &dyn Broker,
    queue: &QueueName,
    consumer: &mut dyn Consumer,
    behind: &str,
    pieces: usize,
) -> Result<(), CheckError> {
    let started = Instant::now();
    let mut came = false;
    loop {
        let status = broker.status(queue, long()).await?;
        let parked = status.dead == pieces as u64 && status.messages() == status.dead;
        if came && parked {
            return Ok(());
        }
        expect(
            started.elapsed() < 2 * LONG,
            format!("{pieces} pieces are parked, and {behind:?} comes"),
            format!("{came}, {status:?}"),
        )?;
        while let Ok(delivery) = timeout(LOOK, consumer.next()).await {
            let delivery = delivery?;
            if delivery.message.id.as_str() == behind {
                delivery.ack(long()).await?;
                came = true;
            } else {
                delivery.dead_letter("litter", long()).await?;
            }
        }
    }
}

/// The same by a guest among the reports: those of others still come.
pub(super) async fn among_reports(
    cx: &Cx,
    admin: &dyn Broker,
    neighbour: &dyn Broker,
    theft: &Theft<'_>,
) -> Result<usize, CheckError> {
    let mut collector = attach(admin, theft.reports, 4).await?;
    let pieces = cx.server.litter(Litter::Reports(theft)).await?;
    neighbour
        .publish(theft.reports, named("theirs")?, long())
        .await?;
    park(admin, theft.reports, &mut *collector, "theirs", pieces).await?;
    collector.close(long()).await?;
    Ok(pieces)
}
