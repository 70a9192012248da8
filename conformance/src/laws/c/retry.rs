//! C6: retry, with exact counts and delays that are kept. C8: poison does not block.

use std::time::{Duration, Instant};

use crate::{
    check::{CheckResult, Cx, Evidence},
    support::*,
};

/// Twenty messages with delays of their own: none before its time, none much after, counts exact.
pub async fn c6_retry_keeps_its_delay(cx: &Cx) -> CheckResult {
    const MESSAGES: usize = 20;
    const ATTEMPTS: u32 = 4;
    const LATE: Duration = Duration::from_secs(2);
    let broker = cx.connect().await?;
    let name = queue(&*broker, "c6").await?;
    for n in 0..MESSAGES {
        put(&*broker, &name, format!("m{n}")).await?;
    }
    let mut rng = cx.rng();
    let mut due = vec![(Instant::now(), 0); MESSAGES];
    let mut consumer = attach(&*broker, &name, 8).await?;
    let (mut left, mut retries, mut latest) = (MESSAGES, 0, Duration::ZERO);
    while left > 0 {
        let delivery = receive(&mut *consumer).await?;
        let now = Instant::now();
        let id = delivery.message.id.to_string();
        let Some((due, attempt)) = id[1..].parse().ok().and_then(|n: usize| due.get_mut(n)) else {
            continue;
        };
        *attempt += 1;
        same(&format!("attempt of {id}"), delivery.attempt, *attempt)?;
        if *attempt > 1 {
            let early = due.saturating_duration_since(now);
            expect(
                early.is_zero(),
                format!("{id} not before its delay"),
                format!("{early:?} early"),
            )?;
            let late = now.saturating_duration_since(*due);
            expect(
                late < LATE,
                format!("{id} soon after its delay"),
                format!("{late:?} late"),
            )?;
            latest = latest.max(late);
        }
        if *attempt == ATTEMPTS {
            delivery.ack(long()).await?;
            left -= 1;
        } else {
            let delay = Duration::from_millis([0, 1, rng.u64(0..400), 400][rng.usize(0..4)]);
            // Measured from before the call: the broker's clock starts somewhere inside it.
            *due = Instant::now() + delay;
            delivery.retry(delay, long()).await?;
            retries += 1;
        }
    }
    same("left", broker.status(&name, long()).await?.messages(), 0)?;
    Ok(Evidence::of("retries", retries).and("latest ms", latest.as_millis()))
}

/// A delay is kept when the consumer goes and another comes, and shown as delayed meanwhile.
pub async fn c6_a_delay_outlives_its_consumer(cx: &Cx) -> CheckResult {
    const DELAY: Duration = Duration::from_millis(1_200);
    let handles = handles(cx, 2).await?;
    let name = queue(&*handles[0], "c6-outlives").await?;
    put(&*handles[0], &name, "later").await?;
    let mut consumer = attach(&*handles[0], &name, 4).await?;
    let asked = Instant::now();
    receive(&mut *consumer).await?.retry(DELAY, long()).await?;
    consumer.close(long()).await?;
    let status = handles[1].status(&name, long()).await?;
    same(
        "[ready, delayed, in flight]",
        [status.ready, status.delayed, status.in_flight],
        [0, 1, 0],
    )?;
    // One that is ready does not wait for one that is not.
    put(&*handles[1], &name, "now").await?;
    let mut consumer = attach(&*handles[1], &name, 4).await?;
    let delivery = receive(&mut *consumer).await?;
    same("the first", delivery.message.id.as_str(), "now")?;
    delivery.ack(long()).await?;
    let delivery = receive(&mut *consumer).await?;
    let waited = asked.elapsed();
    expect(
        waited >= DELAY,
        format!("not before {DELAY:?}"),
        format!("{waited:?}"),
    )?;
    same("attempt", delivery.attempt, 2)?;
    delivery.ack(long()).await?;
    Ok(Evidence::of("retries", 1).and("waited ms", waited.as_millis()))
}

/// A message that nobody can handle stands before prepare: prepare is delivered, within the poison's
/// delivery limit.
pub async fn c8_poison_does_not_stop_prepare(cx: &Cx) -> CheckResult {
    const LIMIT: u32 = 4;
    let broker = cx.connect().await?;
    let mut deliveries = 0;
    for how in 0..3 {
        let name = limited(&*broker, &format!("c8-{how}"), LIMIT).await?;
        put(&*broker, &name, "poison-1").await?;
        put(&*broker, &name, "poison-2").await?;
        put(&*broker, &name, "prepare").await?;
        let mut consumer = attach(&*broker, &name, 1).await?;
        let mut poisoned = 0;
        loop {
            let delivery = receive(&mut *consumer).await?;
            deliveries += 1;
            if delivery.message.id.as_str() == "prepare" {
                delivery.ack(long()).await?;
                break;
            }
            poisoned += 1;
            expect(
                poisoned <= 2 * LIMIT,
                "prepare comes within the limit",
                "poison only",
            )?;
            match how {
                0 => drop(delivery),
                1 => delivery.retry(Duration::ZERO, long()).await?,
                _ => delivery.dead_letter("poison", long()).await?,
            }
        }
        consumer.close(long()).await?;
    }
    Ok(Evidence::of("deliveries", deliveries))
}
