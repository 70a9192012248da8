//! F1, F2: the broker's process killed and started again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all as all_of;
use tokio::task::JoinHandle;
use wilco::{ErrorKind, QueueName};

use super::{back, kill_and_start, killable, until_ok};
use crate::{
    agent::{Agent, Followed, Order},
    check::{CheckError, CheckResult, Cx, Evidence},
    ledger::{Answer, Event, History, Minimum},
    support::*,
    workload::{finish, publish, settle, verdict},
};

/// Confirmed, and then the broker is killed, at once or a random moment later: the guest that attaches
/// for the first time after that gets it.
pub async fn f1_a_kill_after_the_confirm_loses_nothing(cx: &Cx) -> CheckResult {
    let faults = killable(cx).await?;
    let mut rng = cx.rng();
    let mut messages = 0;
    for round in 0..cx.options.kills {
        let host = cx.connect().await?;
        let name = queue(&*host, &format!("f1-{round}")).await?;
        let count = rng.usize(1..=8);
        let ids: Vec<_> = (0..count).map(|n| format!("r{round}-{n}")).collect();
        for id in &ids {
            put(&*host, &name, id.as_str()).await?;
        }
        if rng.bool() {
            tokio::time::sleep(Duration::from_micros(rng.u64(0..200_000))).await;
        }
        faults.kill().await?;
        drop(host);
        faults.start().await?;
        let guest = cx.connect().await?;
        // A cluster's queues may need a while to find their leader; the message waits as long.
        let conflict = |error: &wilco::Error| *error.kind() == ErrorKind::Conflict;
        let attaching = until_ok("consume", back(cx), conflict, |by| {
            guest.consume(&name, prefetch(4), by)
        });
        let mut consumer = attaching.await?;
        for id in &ids {
            let delivery = receive_within(&mut *consumer, back(cx)).await?;
            same("the message", delivery.message.id.as_str(), id)?;
            same("attempt", delivery.attempt, 1)?;
            delivery.ack(long()).await?;
        }
        consumer.close(long()).await?;
        let mode = wilco::broker::DeleteMode::IfEmpty;
        guest.delete(&name, mode, long()).await?;
        guest.close(long()).await?;
        messages += count;
    }
    Ok(Evidence::of("kills", cx.options.kills).and("messages", messages))
}

/// Bursts of publishes under way from several tasks and a second process, consumers at work in both,
/// and the broker killed in the middle, again and again: everybody goes on by himself, and the ledger
/// is clean.
pub async fn f2_kills_amid_bursts_lose_nothing(cx: &Cx) -> CheckResult {
    const PUBLISHERS: usize = 4;
    let faults = killable(cx).await?;
    let kills = cx.options.kills.clamp(1, 5);
    let history = super::history(cx);
    let mut rng = cx.rng();
    let control = cx.connect().await?;
    let here = limited(&*control, "f2-here", 10_000).await?;
    let there = limited(&*control, "f2-there", 10_000).await?;
    let over = Arc::new(AtomicBool::new(false));
    let mut tasks = Vec::new();
    for n in 0..PUBLISHERS {
        let names = [here.clone(), there.clone()];
        tasks.push(burst(cx, n, names, &history, &over, rng.fork()).await?);
    }
    tasks.push(guest_here(cx, &here, &history, &over, rng.fork()).await?);
    let mut worker = Agent::start(cx).await?;
    let mut loader = Agent::start(cx).await?;
    let (me, works, loads) = (std::process::id(), worker.process(), loader.process());
    worker
        .order(&Order::Work {
            queue: there.clone(),
            seed: rng.u64(..),
        })
        .await?;
    loader
        .order(&Order::Load {
            queue: here.clone(),
            prefix: "agent-".into(),
            messages: u64::MAX,
            at_once: 1,
            seed: rng.u64(..),
        })
        .await?;
    let agents = [followed(worker, &history), followed(loader, &history)];
    let workers = [(me, true), (me, false), (works, false), (loads, true)];
    let faulty = async {
        for _ in 0..kills {
            at_work(&history, &workers, back(cx)).await?;
            tokio::time::sleep(Duration::from_millis(rng.u64(0..300))).await;
            let down = Duration::from_millis(rng.u64(0..500));
            kill_and_start(faults, &history, down).await?;
        }
        at_work(&history, &workers, back(cx)).await
    };
    let went = faulty.await;
    over.store(true, Ordering::Relaxed);
    join_all(tasks).await?;
    for agent in agents {
        agent.kill().await?;
    }
    went?;
    finish(cx, &*control, &here, &history).await?;
    finish(cx, &*control, &there, &history).await?;
    let minimum = Minimum {
        confirmed: kills as u64 * 100,
        faults: kills as u64,
    };
    verdict(cx, &history, minimum)
}

type Task = JoinHandle<Result<(), CheckError>>;

/// Publishes sixteen at once, in turn to either queue, until it is over.
pub(super) async fn burst(
    cx: &Cx,
    n: usize,
    names: [QueueName; 2],
    history: &Arc<History>,
    over: &Arc<AtomicBool>,
    mut rng: fastrand::Rng,
) -> Result<Task, CheckError> {
    const AT_ONCE: usize = 16;
    let broker = cx.connect().await?;
    let (history, over) = (Arc::clone(history), Arc::clone(over));
    Ok(tokio::spawn(async move {
        let mut sent = 0;
        while !over.load(Ordering::Relaxed) {
            let publishes = (0..AT_ONCE).map(|_| {
                sent += 1;
                let (id, mut rng) = (format!("p{n}-{sent}"), rng.fork());
                let (broker, name, history) = (&broker, &names[sent % 2], &history);
                async move { publish(&**broker, name, &id, history, &mut rng).await }
            });
            for published in all_of(publishes.collect::<Vec<_>>()).await {
                published?;
            }
            tokio::time::sleep(Duration::from_millis(rng.u64(20..60))).await;
        }
        Ok(())
    }))
}

/// Consumes in this process until it is over.
pub(super) async fn guest_here(
    cx: &Cx,
    name: &QueueName,
    history: &Arc<History>,
    over: &Arc<AtomicBool>,
    mut rng: fastrand::Rng,
) -> Result<Task, CheckError> {
    let broker = cx.connect().await?;
    let mut consumer = attach(&*broker, name, 16).await?;
    let (history, over, name) = (Arc::clone(history), Arc::clone(over), name.clone());
    Ok(tokio::spawn(async move {
        while !over.load(Ordering::Relaxed) {
            let wait = Duration::from_millis(200);
            if let Ok(delivery) = tokio::time::timeout(wait, consumer.next()).await {
                settle(delivery?, &name, &history, &mut rng).await;
            }
        }
        consumer.close(long()).await?;
        broker.close(long()).await?;
        Ok(())
    }))
}

fn followed(agent: Agent, history: &Arc<History>) -> Followed {
    let history = Arc::clone(history);
    agent.followed(move |entry| history.append(entry))
}

/// Waits until each of these has had something confirmed (true) or received (false), from now on.
pub(super) async fn at_work(
    history: &History,
    workers: &[(u32, bool)],
    within: Duration,
) -> Result<(), CheckError> {
    const ENOUGH: usize = 20;
    let (since, started) = (history.mark(), Instant::now());
    loop {
        let done: Vec<_> = workers
            .iter()
            .map(|(process, publishes)| {
                history.count(&since, |entry| {
                    entry.process == *process
                        && match entry.event {
                            Event::Answer { answer, .. } => *publishes && answer == Answer::Stored,
                            Event::Delivery { .. } => !publishes,
                            _ => false,
                        }
                })
            })
            .collect();
        if done.iter().all(|done| *done >= ENOUGH) {
            return Ok(());
        }
        if started.elapsed() > within {
            return Err(CheckError::failed(
                format!(
                    "publisher and consumer here, consumer and publisher in other processes are \
                     at work within {within:?}: {ENOUGH} each"
                ),
                format!("{done:?}"),
            ));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
