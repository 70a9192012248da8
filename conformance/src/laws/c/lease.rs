//! C5, C9: leases that live as long as their handler, and a prefetch that is a bound.

use std::{collections::BTreeMap, time::Duration};

use wilco::broker::Delivery;

use crate::{
    check::{CheckResult, Cx, Evidence},
    support::*,
};

/// A handler that takes longer than any lease keeps its message, with the consumer there and gone.
pub async fn c5_a_long_handler_keeps_its_lease(cx: &Cx) -> CheckResult {
    let hold = cx.takeover() + Duration::from_secs(1);
    let handles = handles(cx, 2).await?;
    let mut held = Vec::new();
    for n in 0..4 {
        let name = queue(&*handles[0], &format!("c5-{n}")).await?;
        put(&*handles[0], &name, format!("m{n}")).await?;
        let mut consumer = attach(&*handles[0], &name, 4).await?;
        let delivery = receive(&mut *consumer).await?;
        held.push((name, Some(consumer), delivery));
    }
    // Two of the four handlers outlive their consumer; another one attaches there.
    let mut others = Vec::new();
    for (name, consumer, _) in &mut held[2..] {
        if let Some(consumer) = consumer.take() {
            consumer.close(long()).await?;
        }
        others.push(attach(&*handles[1], name, 4).await?);
    }
    let again = async {
        let [(_, first, _), (_, second, _), ..] = &mut held[..] else {
            return None;
        };
        let [third, fourth] = &mut others[..] else {
            return None;
        };
        let (first, second) = (first.as_mut()?, second.as_mut()?);
        Some(tokio::select! {
            delivery = first.next() => delivery,
            delivery = second.next() => delivery,
            delivery = third.next() => delivery,
            delivery = fourth.next() => delivery,
        })
    };
    if let Ok(Some(delivery)) = tokio::time::timeout(hold, again).await {
        let delivery = delivery?;
        let seen = format!("{} came, attempt {}", delivery.message.id, delivery.attempt);
        expect(false, "no second delivery while the handler lives", seen)?;
    }
    for (name, _, delivery) in held {
        delivery.ack(long()).await?;
        same(
            "left",
            handles[1].status(&name, long()).await?.messages(),
            0,
        )?;
    }
    Ok(Evidence::of("handlers", 4).and("held ms", hold.as_millis()))
}

/// At most N unsettled at once; each settlement makes room for one.
pub async fn c9_prefetch_is_a_bound(cx: &Cx) -> CheckResult {
    let broker = cx.connect().await?;
    let name = queue(&*broker, "c9").await?;
    for n in 0..20 {
        put(&*broker, &name, format!("m{n:02}")).await?;
    }
    let mut settled = 0;
    for bound in [1, 3, 7] {
        let mut consumer = attach(&*broker, &name, bound).await?;
        let mut held = Vec::new();
        for _ in 0..bound {
            held.push(receive(&mut *consumer).await?);
        }
        silence(
            &mut *consumer,
            Duration::from_millis(250),
            "the prefetch is used up",
        )
        .await?;
        let status = broker.status(&name, long()).await?;
        same("in flight", status.in_flight, u64::from(bound))?;
        for ack in [true, false] {
            let Some(delivery) = held.pop() else { break };
            if ack {
                delivery.ack(long()).await?;
                settled += 1;
            } else {
                delivery.dead_letter("out of the way", long()).await?;
            }
            held.push(receive(&mut *consumer).await?);
            silence(
                &mut *consumer,
                Duration::from_millis(50),
                "the room is used up",
            )
            .await?;
        }
        drop(held);
        consumer.close(long()).await?;
    }
    until_status(&*broker, &name, "nothing in flight", |status| {
        status.in_flight == 0
    })
    .await?;
    Ok(Evidence::of("bounds", 3).and("acks", settled))
}

/// What was buffered and never handed out goes back uncounted when its consumer goes, and does not
/// age into a duplicate while it waits.
pub async fn c9_the_buffer_goes_back_and_does_not_age(cx: &Cx) -> CheckResult {
    const MESSAGES: usize = 10;
    let handles = handles(cx, 2).await?;
    let name = queue(&*handles[0], "c9-buffer").await?;
    for n in 0..MESSAGES {
        put(&*handles[0], &name, format!("m{n}")).await?;
    }
    // How often each was handed out so far: what its next delivery has to say.
    let mut handed_out: BTreeMap<String, u32> = BTreeMap::new();
    let mut note = |delivery: &Delivery| {
        let id = delivery.message.id.to_string();
        let count = handed_out.entry(id.clone()).or_default();
        *count += 1;
        same(&format!("attempt of {id}"), delivery.attempt, *count)
    };
    for close in [true, false, true, false] {
        let mut consumer = attach(&*handles[0], &name, MESSAGES as u32).await?;
        let first = receive(&mut *consumer).await?;
        note(&first)?;
        first.retry(Duration::ZERO, long()).await?;
        if close {
            consumer.close(long()).await?;
        } else {
            drop(consumer);
        }
    }
    let mut consumer = attach(&*handles[1], &name, MESSAGES as u32).await?;
    let first = receive(&mut *consumer).await?;
    note(&first)?;
    // Longer than a lease, with the buffer full: leases age in the buffer or they do not.
    tokio::time::sleep(cx.takeover() + Duration::from_millis(500)).await;
    first.ack(long()).await?;
    for _ in 1..MESSAGES {
        let delivery = receive(&mut *consumer).await?;
        note(&delivery)?;
        delivery.ack(long()).await?;
    }
    same(
        "left",
        handles[0].status(&name, long()).await?.messages(),
        0,
    )?;
    same("different messages", handed_out.len(), MESSAGES)?;
    Ok(Evidence::of("buffered", MESSAGES * 5))
}
