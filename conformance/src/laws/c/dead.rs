//! C7: dead letters.

use std::{sync::Arc, time::Duration};

use wilco::{
    Headers, QueueName,
    broker::{DeadLetter, DeadLetterKey},
};

use crate::{
    check::{CheckError, CheckResult, Cx, Evidence},
    support::*,
};

/// Over the limit, by drops and by retries: dead once, whole, with a reason; never dropped.
pub async fn c7_over_the_limit_is_a_dead_letter_once(cx: &Cx) -> CheckResult {
    const LIMIT: u32 = 3;
    let broker = cx.connect().await?;
    let name = limited(&*broker, "c7-limit", LIMIT).await?;
    let mut headers = Headers::new();
    headers.insert("kept", "é\r\n")?;
    let mut sent = Vec::new();
    for n in 0..6 {
        let body = vec![0xFF, n, 0];
        let message = message(body)?.with_headers(headers.clone());
        broker.publish(&name, message.clone(), long()).await?;
        sent.push(message);
    }
    let mut consumer = attach(&*broker, &name, 2).await?;
    for n in 0..sent.len() as u32 * LIMIT {
        let delivery = receive(&mut *consumer).await?;
        let attempt = delivery.attempt;
        expect(
            (1..=LIMIT).contains(&attempt),
            format!("at most {LIMIT} deliveries"),
            attempt,
        )?;
        if n % 2 == 0 {
            drop(delivery);
        } else {
            delivery.retry(Duration::ZERO, long()).await?;
        }
    }
    let all = sent.len() as u64;
    until_status(&*broker, &name, "all dead", |status| status.dead == all).await?;
    same(
        "messages",
        broker.status(&name, long()).await?.messages(),
        all,
    )?;
    same(
        "deliveries after that",
        drain(&*broker_free(cx, consumer).await?, &name).await?,
        vec![],
    )?;
    let dead = all_dead(cx, &name).await?;
    same("dead letters", dead.len(), sent.len())?;
    for message in &sent {
        let Some(letter) = dead.iter().find(|letter| letter.message.id == message.id) else {
            return Err(CheckError::failed("each is a dead letter", &message.id));
        };
        same("the message", &letter.message, message)?;
        same("attempts", letter.attempts, LIMIT)?;
        expect(!letter.reason.is_empty(), "a reason", "an empty one")?;
    }
    Ok(Evidence::of("dead letters", sent.len()))
}

/// Lets the consumer go and opens a fresh handle.
async fn broker_free(
    cx: &Cx,
    consumer: Box<dyn wilco::broker::Consumer>,
) -> Result<Arc<dyn wilco::Broker>, CheckError> {
    consumer.close(long()).await?;
    cx.connect().await
}

/// Every dead letter, read in pages of two.
async fn all_dead(cx: &Cx, name: &QueueName) -> Result<Vec<DeadLetter>, CheckError> {
    let broker = cx.connect().await?;
    let mut all: Vec<DeadLetter> = Vec::new();
    loop {
        let after = all.last().map(|letter| letter.key.clone());
        let page = broker
            .dead_letters(name, after.as_ref(), count(2), long())
            .await?;
        expect(page.len() <= 2, "at most as many as asked for", page.len())?;
        if page.is_empty() {
            break;
        }
        all.extend(page);
        expect(all.len() < 10_000, "pages come to an end", all.len())?;
    }
    let mut keys: Vec<_> = all.iter().map(|letter| letter.key.clone()).collect();
    keys.sort();
    keys.dedup();
    same("different keys", keys.len(), all.len())?;
    let whole = broker
        .dead_letters(name, None, count(10_000), long())
        .await?;
    same("one page of all", &whole, &all)?;
    Ok(all)
}

/// Rejected with a reason: there with that reason, oldest first, and looking takes nothing.
pub async fn c7_a_rejected_message_is_kept_with_its_reason(cx: &Cx) -> CheckResult {
    const MESSAGES: usize = 9;
    let broker = cx.connect().await?;
    let name = queue(&*broker, "c7").await?;
    let mut consumer = attach(&*broker, &name, 1).await?;
    let reason = |n: usize| ["", "no such datastore", "é\r\n🚚 \"quoted\""][n % 3].to_owned();
    for n in 0..MESSAGES {
        put(&*broker, &name, format!("m{n}")).await?;
        receive(&mut *consumer)
            .await?
            .dead_letter(reason(n), long())
            .await?;
    }
    consumer.close(long()).await?;
    for _ in 0..2 {
        let dead = all_dead(cx, &name).await?;
        let seen: Vec<_> = dead
            .iter()
            .map(|letter| {
                (
                    letter.message.id.to_string(),
                    letter.reason.clone(),
                    letter.attempts,
                )
            })
            .collect();
        let expected: Vec<_> = (0..MESSAGES)
            .map(|n| (format!("m{n}"), reason(n), 1))
            .collect();
        same("dead letters, oldest first", seen, expected)?;
    }
    same(
        "dead",
        broker.status(&name, long()).await?.dead,
        MESSAGES as u64,
    )?;
    Ok(Evidence::of("rejected", MESSAGES))
}

/// Sent back, by two at once too: once in the queue with its count at 0, and no longer dead.
pub async fn c7_redrive_moves_it_back_once(cx: &Cx) -> CheckResult {
    const MESSAGES: usize = 30;
    let handles = handles(cx, 2).await?;
    let name = queue(&*handles[0], "c7-redrive").await?;
    let mut consumer = attach(&*handles[0], &name, 1).await?;
    for n in 0..MESSAGES {
        put(&*handles[0], &name, format!("m{n:02}")).await?;
        receive(&mut *consumer)
            .await?
            .dead_letter("look", long())
            .await?;
    }
    consumer.close(long()).await?;
    let nobody = DeadLetterKey("no such key".into());
    same(
        "redrive of nothing",
        handles[0].redrive(&name, &nobody, long()).await?,
        false,
    )?;
    let dead = all_dead(cx, &name).await?;
    same("dead letters", dead.len(), MESSAGES)?;
    for (n, letter) in dead.iter().enumerate() {
        let [a, b] = [&handles[0], &handles[1]];
        let (a, b) = tokio::join!(
            a.redrive(&name, &letter.key, long()),
            b.redrive(&name, &letter.key, long())
        );
        same("redrives that moved it", u32::from(a?) + u32::from(b?), 1)?;
        let status = handles[1].status(&name, long()).await?;
        let expected = [n as u64 + 1, (MESSAGES - n - 1) as u64];
        same("[ready, dead]", [status.ready, status.dead], expected)?;
    }
    let mut consumer = attach(&*handles[1], &name, 4).await?;
    for n in 0..MESSAGES {
        let delivery = receive(&mut *consumer).await?;
        same(
            "in the order of the redrives",
            delivery.message.id.to_string(),
            format!("m{n:02}"),
        )?;
        same("attempt", delivery.attempt, 1)?;
        delivery.ack(long()).await?;
    }
    let again = handles[0].redrive(&name, &dead[0].key, long()).await?;
    same("redrive of what went", again, false)?;
    same(
        "left",
        handles[0].status(&name, long()).await?.messages(),
        0,
    )?;
    Ok(Evidence::of("redriven", MESSAGES))
}
