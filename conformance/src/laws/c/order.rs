//! C11: order.

use std::time::Duration;

use wilco::broker::{Consumer, Delivery};

use crate::{
    check::{CheckError, CheckResult, Cx, Evidence},
    support::*,
};

/// One consumer, no redelivery: the order is kept, at every prefetch, while more is published.
pub async fn c11_order_is_kept(cx: &Cx) -> CheckResult {
    const MESSAGES: usize = 300;
    let handles = handles(cx, 2).await?;
    for bound in [1, 7, 64] {
        let name = queue(&*handles[0], &format!("c11-{bound}")).await?;
        let mut consumer = attach(&*handles[1], &name, bound).await?;
        let (broker, to) = (handles[0].clone(), name.clone());
        let publisher = tokio::spawn(async move {
            for n in 0..MESSAGES {
                put(&*broker, &to, format!("m{n:04}")).await?;
            }
            Ok(())
        });
        for n in 0..MESSAGES {
            let delivery = receive(&mut *consumer).await?;
            same(
                "the next",
                delivery.message.id.to_string(),
                format!("m{n:04}"),
            )?;
            same("its attempt", delivery.attempt, 1)?;
            delivery.ack(long()).await?;
        }
        join_all([publisher]).await?;
        consumer.close(long()).await?;
    }
    Ok(Evidence::of("messages", MESSAGES * 3))
}

/// With redeliveries in between: whatever comes out of its place has a count above 1.
pub async fn c11_a_redelivered_one_says_so(cx: &Cx) -> CheckResult {
    const MESSAGES: usize = 200;
    let broker = cx.connect().await?;
    let name = queue(&*broker, "c11-again").await?;
    for n in 0..MESSAGES {
        put(&*broker, &name, format!("m{n:04}")).await?;
    }
    let mut rng = cx.rng();
    let mut consumer = attach(&*broker, &name, 16).await?;
    let (mut left, mut next, mut again) = (MESSAGES, 0, 0);
    while left > 0 {
        let delivery = receive(&mut *consumer).await?;
        let id = delivery.message.id.to_string();
        if delivery.attempt == 1 {
            same("the next first delivery", id, format!("m{next:04}"))?;
            next += 1;
        } else {
            again += 1;
        }
        match rng.u32(0..5) {
            0 => drop(delivery),
            1 => {
                delivery
                    .retry(Duration::from_millis(rng.u64(0..20)), long())
                    .await?
            }
            _ => {
                delivery.ack(long()).await?;
                left -= 1;
            }
        }
    }
    same("first deliveries", next, MESSAGES)?;
    Ok(Evidence::of("messages", MESSAGES).and("redelivered", again))
}

/// Attached again and again while more is published: what was only buffered, or on its way, goes back to
/// its place, whether the consumer closes, the handle does, or the consumer closes and leaves a delivery
/// in hand.
pub async fn c11_what_was_buffered_keeps_its_place(cx: &Cx) -> CheckResult {
    const MESSAGES: usize = 400;
    let control = cx.connect().await?;
    let name = queue(&*control, "c11-back").await?;
    let (broker, to) = (control.clone(), name.clone());
    let publisher = tokio::spawn(async move {
        for n in 0..MESSAGES {
            put(&*broker, &to, format!("m{n:04}")).await?;
        }
        Ok(())
    });
    let mut rng = cx.rng();
    let (mut first, mut again, mut rounds) = (0, 0, 0);
    let mut kept = None;
    while first < MESSAGES {
        rounds += 1;
        let broker = cx.connect().await?;
        let mut consumer = attach(&*broker, &name, 16).await?;
        for _ in 1..rng.usize(1..=20).min(MESSAGES - first) {
            let delivery = first_time(&mut *consumer, &mut first, &mut again).await?;
            delivery.ack(long()).await?;
        }
        let last = first_time(&mut *consumer, &mut first, &mut again).await?;
        // What the one before left in hand comes again.
        drop(kept.take());
        let way = rng.u32(0..4);
        if way < 2 {
            last.ack(long()).await?;
            if way == 0 {
                consumer.close(long()).await?;
            }
            broker.close(long()).await?;
        } else {
            consumer.close(long()).await?;
            kept = Some((last, broker));
        }
    }
    join_all([publisher]).await?;
    Ok(Evidence::of("messages", MESSAGES)
        .and("attachments", rounds)
        .and("redelivered", again))
}

/// The next that comes for the first time, which is this one; whatever comes again before it is acked.
async fn first_time(
    consumer: &mut dyn Consumer,
    first: &mut usize,
    again: &mut usize,
) -> Result<Delivery, CheckError> {
    loop {
        let delivery = receive(consumer).await?;
        if delivery.attempt > 1 {
            *again += 1;
            delivery.ack(long()).await?;
            continue;
        }
        let id = delivery.message.id.to_string();
        same("the next first delivery", id, format!("m{first:04}"))?;
        *first += 1;
        return Ok(delivery);
    }
}
