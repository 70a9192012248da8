//! Q6, Q7, Q11: deleting.

use std::{sync::Arc, time::Duration};

use tokio::sync::Semaphore;
use wilco::{
    ErrorKind, Headers, MessageId, Outcome,
    broker::{DeleteMode, QueueSpec},
};

use crate::{
    check::{CheckError, CheckResult, Cx, Evidence},
    support::*,
};

/// `NotEmpty` with the count and nothing changed; told to discard, it says what went.
pub async fn q6_delete_refuses_what_is_not_empty(cx: &Cx) -> CheckResult {
    let broker = cx.connect().await?;
    let name = queue(&*broker, "q6").await?;
    for n in 0..6 {
        put(&*broker, &name, format!("m{n}")).await?;
    }
    let refused = async |messages| {
        let answer = broker.delete(&name, DeleteMode::IfEmpty, long()).await;
        must_be(
            "delete of a queue with messages",
            answer,
            &ErrorKind::NotEmpty { messages },
        )
    };
    refused(6).await?;
    // Ready, delayed, in flight and dead: each counts.
    let mut consumer = attach(&*broker, &name, 1).await?;
    receive(&mut *consumer)
        .await?
        .dead_letter("for the count", long())
        .await?;
    receive(&mut *consumer)
        .await?
        .retry(Duration::from_secs(3600), long())
        .await?;
    let held = receive(&mut *consumer).await?;
    refused(6).await?;
    held.ack(long()).await?;
    consumer.close(long()).await?;
    refused(5).await?;
    let gone = broker.delete(&name, DeleteMode::Discard, long()).await?;
    same("discarded", gone.messages, 5)?;
    let mut ids: Vec<_> = gone.ids.iter().map(MessageId::to_string).collect();
    ids.sort();
    same(
        "ids of those that were not dead",
        ids,
        ["m1", "m3", "m4", "m5"].map(String::from).into(),
    )?;
    must_be(
        "status",
        broker.status(&name, long()).await,
        &ErrorKind::NoQueue,
    )?;
    // Dead letters alone keep it too.
    queue(&*broker, "q6").await?;
    put(&*broker, &name, "dead").await?;
    let mut consumer = attach(&*broker, &name, 1).await?;
    receive(&mut *consumer)
        .await?
        .dead_letter("alone", long())
        .await?;
    consumer.close(long()).await?;
    refused(1).await?;
    let gone = broker.delete(&name, DeleteMode::Discard, long()).await?;
    same("discarded, ids", (gone.messages, gone.ids.len()), (1, 0))?;
    queue(&*broker, "q6").await?;
    let gone = broker.delete(&name, DeleteMode::IfEmpty, long()).await?;
    same("discarded of an empty queue", gone.messages, 0)?;
    Ok(Evidence::of("deletes", 7))
}

/// Publishes race with a delete: every Ok is among the discarded, every `NotStored` is not.
pub async fn q6_a_publish_racing_with_delete_is_stored_or_an_error(cx: &Cx) -> CheckResult {
    const ROUNDS: usize = 100;
    let handles = handles(cx, 2).await?;
    let mut rng = cx.rng();
    let (mut stored, mut refused) = (0, 0);
    for round in 0..ROUNDS {
        let name = queue(&*handles[0], "q6-race").await?;
        let answered = Arc::new(Semaphore::new(0));
        let publishers = (0..8usize).map(|task| {
            let (broker, name) = (Arc::clone(&handles[task % 2]), name.clone());
            let answered = Arc::clone(&answered);
            tokio::spawn(async move {
                let mut answers = Vec::new();
                for n in 0..6 {
                    let id = format!("r{round}-t{task}-{n}");
                    let answer = broker.publish(&name, named(id.clone())?, long()).await;
                    answers.push((id, answer.map_err(|e| (e.kind().clone(), e.outcome()))));
                    answered.add_permits(1);
                }
                Ok(answers)
            })
        });
        let publishers: Vec<_> = publishers.collect();
        // Behind as many answers as this, so that neither side wins by who the scheduler likes.
        drop(answered.acquire_many(rng.u32(0..40)).await);
        let gone = handles[0]
            .delete(&name, DeleteMode::Discard, long())
            .await?;
        let gone: Vec<_> = gone.ids.iter().map(MessageId::to_string).collect();
        for (id, answer) in join_all(publishers).await?.into_iter().flatten() {
            let discarded = gone.contains(&id);
            match answer {
                Ok(_) => {
                    stored += 1;
                    expect(discarded, "a stored message is among the discarded", id)?;
                }
                Err((kind, outcome)) => {
                    refused += 1;
                    same("the error", kind, ErrorKind::NoQueue)?;
                    same("its outcome", outcome, Some(Outcome::NotStored))?;
                    expect(!discarded, "a refused message is not stored", id)?;
                }
            }
        }
    }
    expect(
        stored > 0 && refused > 0,
        "both sides win some races",
        format!("{stored}:{refused}"),
    )?;
    Ok(Evidence::of("races", ROUNDS)
        .and("stored", stored)
        .and("refused", refused))
}

/// Acks race with a delete: each message was acked, or is among the discarded; never both.
pub async fn q6_delete_arbitrates_with_acks(cx: &Cx) -> CheckResult {
    const ROUNDS: usize = 100;
    let handles = handles(cx, 2).await?;
    let mut rng = cx.rng();
    let (mut acked, mut discarded) = (0, 0);
    for round in 0..ROUNDS {
        let name = queue(&*handles[0], "q6-ack").await?;
        for n in 0..4 {
            put(&*handles[0], &name, format!("r{round}-{n}")).await?;
        }
        let mut consumer = attach(&*handles[1], &name, 4).await?;
        let mut acks = Vec::new();
        for _ in 0..4 {
            let delivery = receive(&mut *consumer).await?;
            let yields = rng.usize(0..30);
            acks.push(tokio::spawn(async move {
                for _ in 0..yields {
                    tokio::task::yield_now().await;
                }
                let id = delivery.message.id.clone();
                Ok((id, delivery.ack(long()).await.is_ok()))
            }));
        }
        for _ in 0..rng.usize(0..30) {
            tokio::task::yield_now().await;
        }
        let gone = handles[0]
            .delete(&name, DeleteMode::Discard, long())
            .await?;
        for (id, ok) in join_all(acks).await? {
            let told = gone.ids.contains(&id);
            expect(
                ok != told,
                "acked or discarded, one of both",
                format!("{id}: {ok}, {told}"),
            )?;
            if ok { acked += 1 } else { discarded += 1 }
        }
    }
    Ok(Evidence::of("races", ROUNDS)
        .and("acked", acked)
        .and("discarded", discarded))
}

/// After a delete the broker's own view has nothing of the guest: no row, key, lane or file.
pub async fn q7_delete_leaves_nothing_behind(cx: &Cx) -> CheckResult {
    let broker = cx.connect().await?;
    let lane = guest("q7-left-behind")?;
    let name = lane.queue();
    // Something of every sort, each carrying the name, so that the view finds it wherever it is.
    broker
        .declare(&QueueSpec::new(name.clone()), long())
        .await?;
    let mut headers = Headers::new();
    headers.insert("of", name.as_str())?;
    for n in 0..5 {
        let id = format!("{name}-{n}");
        let message = named(id)?.with_headers(headers.clone());
        broker.publish(&name, message, long()).await?;
    }
    let mut consumer = attach(&*broker, &name, 2).await?;
    receive(&mut *consumer)
        .await?
        .dead_letter(name.as_str(), long())
        .await?;
    receive(&mut *consumer)
        .await?
        .retry(Duration::from_secs(3600), long())
        .await?;
    let held = receive(&mut *consumer).await?;
    let mut responder = attach_lane(&*broker, &lane).await?;
    let request = broker.request(&lane, name.as_str().to_owned().into(), long());
    let (answer, served) = tokio::join!(request, async {
        let asked = asked(&mut *responder).await?;
        let body = asked.body.clone();
        asked.reply(body, long()).await?;
        Ok::<_, CheckError>(())
    });
    answer?;
    served?;
    let before = cx.server.remains(&name).await?;
    expect(
        !before.is_empty(),
        "the broker's own view shows the queue",
        "nothing",
    )?;

    broker.delete(&name, DeleteMode::Discard, long()).await?;
    drop((held, consumer, responder));
    let deadline = long();
    loop {
        let left = cx.server.remains(&name).await?;
        if left.is_empty() {
            break;
        }
        expect(
            !deadline.has_passed(),
            "nothing of the guest is left",
            short(&left),
        )?;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    must_be(
        "status",
        broker.status(&name, long()).await,
        &ErrorKind::NoQueue,
    )?;
    Ok(Evidence::of("things before", before.len()).and("things after", 0))
}

/// A live consumer is told, on whichever handle; it stays told when the name is used again.
pub async fn q11_a_live_consumer_is_told_of_the_delete(cx: &Cx) -> CheckResult {
    const ROUNDS: usize = 20;
    let handles = handles(cx, 2).await?;
    for round in 0..ROUNDS {
        let name = queue(&*handles[0], "q11").await?;
        let mut consumer = attach(&*handles[round % 2], &name, 4).await?;
        if round % 3 == 0 {
            put(&*handles[0], &name, "held").await?;
            drop(receive(&mut *consumer).await?);
        }
        let waiting = tokio::spawn(async move {
            loop {
                // What was on its way before the delete may still come.
                match timed("next on a deleted queue", consumer.next()).await?.0 {
                    Ok(delivery) => drop(delivery),
                    Err(error) => return Ok((error, consumer)),
                }
            }
        });
        tokio::task::yield_now().await;
        handles[0]
            .delete(&name, DeleteMode::Discard, long())
            .await?;
        let told = join_all([waiting]).await?.pop();
        let Some((error, mut consumer)) = told else {
            continue;
        };
        same("next", error.kind().clone(), ErrorKind::QueueDeleted)?;
        must_be(
            "status",
            handles[0].status(&name, long()).await,
            &ErrorKind::NoQueue,
        )?;
        // The name again, with a message: not for the one that was told.
        queue(&*handles[0], "q11").await?;
        put(&*handles[0], &name, format!("new-{round}")).await?;
        let (again, _) = timed("next once more", consumer.next()).await?;
        must_be("next on the old consumer", again, &ErrorKind::QueueDeleted)?;
        drop(consumer);
        same(
            "the new queue",
            drain(&*handles[1], &name).await?,
            vec![format!("new-{round}")],
        )?;
        handles[0]
            .delete(&name, DeleteMode::IfEmpty, long())
            .await?;
    }
    Ok(Evidence::of("deletes under a consumer", ROUNDS))
}
