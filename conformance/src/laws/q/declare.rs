//! Q1, Q3: declaring. Q4, Q5: what is not there stays away.

use std::{num::NonZeroU32, sync::Arc};

use wilco::{
    ErrorKind, Outcome,
    broker::{DeadLetterKey, Declared, DeleteMode, QueueSpec},
};

use crate::{
    check::{CheckResult, Cx, Evidence},
    support::*,
};

/// From 64 tasks on four handles at once: one Created, 63 AlreadyExists, one queue.
pub async fn q1_declare_is_idempotent_from_many_tasks(cx: &Cx) -> CheckResult {
    const ROUNDS: usize = 8;
    let handles = handles(cx, 4).await?;
    for round in 0..ROUNDS {
        let spec = QueueSpec::new(guest(&format!("q1-{round}"))?.queue());
        let tasks = (0..64).map(|n| {
            let (broker, spec) = (Arc::clone(&handles[n % 4]), spec.clone());
            tokio::spawn(async move { Ok(broker.declare(&spec, long()).await?) })
        });
        let answers = join_all(tasks.collect::<Vec<_>>()).await?;
        let created = answers.iter().filter(|a| **a == Declared::Created).count();
        same("Created among 64 declares at once", created, 1)?;
        let again = handles[0].declare(&spec, long()).await?;
        same(
            "declare of a queue that exists",
            again,
            Declared::AlreadyExists,
        )?;
        let listed = handles[1].list(long()).await?;
        let listed = listed
            .iter()
            .filter(|status| status.name == spec.name)
            .count();
        same("queues of this name in the list", listed, 1)?;
    }
    Ok(Evidence::of("declares", ROUNDS * 65))
}

/// Two specs race: one queue with one set of arguments, the others are told of the mismatch.
pub async fn q1_of_two_specs_at_once_one_wins(cx: &Cx) -> CheckResult {
    const ROUNDS: usize = 20;
    let handles = handles(cx, 2).await?;
    for round in 0..ROUNDS {
        let name = guest(&format!("q1-two-{round}"))?.queue();
        let tasks = (0..16usize).map(|n| {
            let broker = Arc::clone(&handles[n % 2]);
            let spec = QueueSpec::new(name.clone()).with_delivery_limit(count(7 + n as u32 % 2));
            tokio::spawn(async move {
                Ok(match broker.declare(&spec, long()).await {
                    Ok(declared) => Some((declared, spec.delivery_limit)),
                    Err(error) => {
                        let mismatch = matches!(error.kind(), ErrorKind::Mismatch { .. });
                        expect(mismatch, "Mismatch for the loser", error)?;
                        None
                    }
                })
            })
        });
        let won = join_all(tasks.collect::<Vec<_>>()).await?;
        let won: Vec<_> = won.into_iter().flatten().collect();
        let created: Vec<_> = won
            .iter()
            .filter(|(d, _)| *d == Declared::Created)
            .collect();
        same("Created among two specs", created.len(), 1)?;
        let limit: NonZeroU32 = created[0].1;
        let agree = won.iter().filter(|(_, other)| *other == limit).count();
        same(
            "declares that returned Ok with the winner's arguments",
            agree,
            won.len(),
        )?;
        same("declares with the winner's arguments", agree, 8)?;
    }
    Ok(Evidence::of("declares", ROUNDS * 16))
}

/// Mismatch names what differs; the queue keeps its arguments and messages.
pub async fn q3_other_arguments_are_a_mismatch(cx: &Cx) -> CheckResult {
    let broker = cx.connect().await?;
    let name = guest("q3")?.queue();
    let spec = QueueSpec::new(name.clone())
        .with_delivery_limit(count(5))
        .with_max_messages(10);
    broker.declare(&spec, long()).await?;
    for n in 0..3 {
        put(&*broker, &name, format!("m{n}")).await?;
    }
    let others = [
        (spec.clone().with_delivery_limit(count(6)), "delivery_limit"),
        (spec.clone().with_max_messages(11), "max_messages"),
        (
            QueueSpec::new(name.clone()).with_delivery_limit(count(5)),
            "max_messages",
        ),
    ];
    for (other, argument) in &others {
        let error = must_fail(
            "declare with other arguments",
            broker.declare(other, long()).await,
        )?;
        let ErrorKind::Mismatch { differences } = error.kind() else {
            return Err(error.into());
        };
        let named = differences.iter().any(|line| line.contains(argument));
        expect(
            named && differences.len() == 1,
            format!("{argument} alone"),
            short(differences),
        )?;
    }
    let both = QueueSpec::new(name.clone());
    let error = must_fail(
        "declare with other arguments",
        broker.declare(&both, long()).await,
    )?;
    let told =
        matches!(error.kind(), ErrorKind::Mismatch { differences } if differences.len() == 2);
    expect(told, "both differences", short(error.kind()))?;
    let again = broker.declare(&spec, long()).await?;
    same("the queue as it was", again, Declared::AlreadyExists)?;
    same("ready", broker.status(&name, long()).await?.ready, 3)?;
    same(
        "messages",
        drain(&*broker, &name).await?,
        vec!["m0".into(), "m1".into(), "m2".into()],
    )?;
    Ok(Evidence::of("other specs", others.len() + 1))
}

/// A publish to a queue that is not there: `NoQueue` and `NotStored`, quickly, and it makes nothing.
pub async fn q4_publish_to_a_missing_queue_is_no_queue(cx: &Cx) -> CheckResult {
    const TIMES: usize = 100;
    let broker = cx.connect().await?;
    let name = guest("q4")?.queue();
    for n in 0..TIMES {
        let publish = broker.publish(&name, named(format!("m{n}"))?, long());
        let (answer, took) = timed("publish to a missing queue", publish).await?;
        let error = must_be("publish to a missing queue", answer, &ErrorKind::NoQueue)?;
        same("outcome", error.outcome(), Some(Outcome::NotStored))?;
        expect(
            took < ROUND_TRIP,
            "an answer within a round trip",
            format!("{took:?}"),
        )?;
    }
    let listed = broker.list(long()).await?.len();
    same("queues after publishes to a missing one", listed, 0)?;
    // Nothing was kept for a queue of that name either.
    let name = queue(&*broker, "q4").await?;
    same(
        "messages in the queue made later",
        drain(&*broker, &name).await?,
        vec![],
    )?;
    // A queue that was there and went is as missing as one that never was.
    broker.delete(&name, DeleteMode::Discard, long()).await?;
    let answer = broker.publish(&name, named("late")?, long()).await;
    must_be("publish to a deleted queue", answer, &ErrorKind::NoQueue)?;
    Ok(Evidence::of("publishes", TIMES + 1))
}

/// Every other operation on a missing queue is `NoQueue`; none makes it.
pub async fn q5_nothing_but_declare_makes_a_queue(cx: &Cx) -> CheckResult {
    let broker = cx.connect().await?;
    let name = guest("q5")?.queue();
    let key = DeadLetterKey("1".into());
    let missing = &ErrorKind::NoQueue;
    for _ in 0..10 {
        must_be(
            "consume",
            broker.consume(&name, prefetch(1), long()).await,
            missing,
        )?;
        must_be("status", broker.status(&name, long()).await, missing)?;
        for mode in [DeleteMode::IfEmpty, DeleteMode::Discard] {
            must_be("delete", broker.delete(&name, mode, long()).await, missing)?;
        }
        let letters = broker.dead_letters(&name, None, count(10), long()).await;
        must_be("dead_letters", letters, missing)?;
        must_be(
            "redrive",
            broker.redrive(&name, &key, long()).await,
            missing,
        )?;
        // A lane lives without a queue, and makes none.
        drop(attach_lane(&*broker, &guest("q5")?).await?);
    }
    same("queues", broker.list(long()).await?.len(), 0)?;
    let declared = broker.declare(&QueueSpec::new(name), long()).await?;
    same("declare after all that", declared, Declared::Created)?;
    Ok(Evidence::of("operations", 70))
}
