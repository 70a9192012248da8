//! P7: many publishers at once on one handle, and no answer lands on the wrong message.

use std::{collections::HashSet, sync::Arc};

use wilco::{
    ErrorKind, Outcome,
    broker::{DeleteMode, QueueSpec},
};

use crate::{
    check::{CheckResult, Cx, Evidence},
    support::*,
};

/// 64 tasks on one handle publish to good, full and missing queues at random, 6,000 in all.
pub async fn p7_no_answer_lands_on_the_wrong_message(cx: &Cx) -> CheckResult {
    const TASKS: usize = 64;
    const EACH: usize = 94;
    let broker = cx.connect().await?;
    let good = [
        queue(&*broker, "p7-a").await?,
        queue(&*broker, "p7-b").await?,
    ];
    let full = guest("p7-full")?.queue();
    broker
        .declare(&QueueSpec::new(full.clone()).with_max_messages(1), long())
        .await?;
    put(&*broker, &full, "fills").await?;
    let missing = guest("p7-missing")?.queue();

    let seed = cx.options.seed;
    let tasks = (0..TASKS).map(|task| {
        let (broker, good, full, missing) = (
            Arc::clone(&broker),
            good.clone(),
            full.clone(),
            missing.clone(),
        );
        tokio::spawn(async move {
            let mut rng = fastrand::Rng::with_seed(seed.wrapping_add(task as u64));
            let mut stored = [vec![], vec![]];
            for n in 0..EACH {
                let id = format!("{task}/{n}");
                let which = rng.usize(0..4);
                let to = [&good[0], &good[1], &full, &missing][which];
                let answer = broker.publish(to, named(id.clone())?, long()).await;
                let kind = answer
                    .as_ref()
                    .map(|_| ())
                    .map_err(|error| error.kind().clone());
                let expected = [
                    Ok(()),
                    Ok(()),
                    Err(ErrorKind::BrokerRefused),
                    Err(ErrorKind::NoQueue),
                ];
                same(
                    &format!("the answer to {id} for {to}"),
                    kind,
                    expected[which].clone(),
                )?;
                match answer {
                    Ok(_) => stored[which].push(id),
                    Err(error) => same("outcome", error.outcome(), Some(Outcome::NotStored))?,
                }
            }
            Ok(stored)
        })
    });
    let mut stored = [HashSet::new(), HashSet::new()];
    for [a, b] in join_all(tasks.collect::<Vec<_>>()).await? {
        stored[0].extend(a);
        stored[1].extend(b);
    }
    let mut confirmed = 0;
    for (queue, stored) in good.iter().zip(&stored) {
        let there = drain(&*broker, queue).await?;
        same("messages there", there.len(), stored.len())?;
        let there: HashSet<_> = there.into_iter().collect();
        let lost: Vec<_> = stored.difference(&there).collect();
        expect(
            lost.is_empty(),
            "every Ok is stored",
            format!("lost {}", short(&lost)),
        )?;
        let phantom: Vec<_> = there.difference(stored).collect();
        expect(
            phantom.is_empty(),
            "every one stored was Ok",
            short(&phantom),
        )?;
        confirmed += stored.len();
    }
    let gone = broker.delete(&full, DeleteMode::Discard, long()).await?;
    same("messages in the full queue", gone.messages, 1)?;
    Ok(Evidence::of("publishes", TASKS * EACH).and("confirmed", confirmed))
}
