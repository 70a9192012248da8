//! C11: order.

use std::time::Duration;

use crate::{
    check::{CheckResult, Cx, Evidence},
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
