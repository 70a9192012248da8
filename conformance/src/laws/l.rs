//! Section L: workloads under a seeded schedule of faults, judged by the ledger.

use std::{sync::Arc, time::Duration};

use crate::{
    agent::{Agent, Order, Told},
    check::{CheckError, CheckResult, Cx},
    ledger::{Event, History, Minimum},
    support::*,
    workload::{finish, publish, settle, verdict},
};

/// Publishers and consumers on handles of their own, publishes cut off and sent again, deliveries
/// dropped and retried, handles closed in between: the ledger is clean.
pub async fn l_handles_that_come_and_go_lose_nothing(cx: &Cx) -> CheckResult {
    const PUBLISHERS: usize = 4;
    const EACH: usize = 250;
    const CONSUMERS: usize = 12;
    let history = cx.history();
    let control = cx.connect().await?;
    let name = limited(&*control, "l-handles", 10_000).await?;
    let mut rng = cx.rng();
    let mut publishers = Vec::new();
    for n in 0..PUBLISHERS {
        let (broker, name, history) = (cx.connect().await?, name.clone(), Arc::clone(&history));
        let mut rng = rng.fork();
        publishers.push(tokio::spawn(async move {
            for m in 0..EACH {
                publish(&*broker, &name, &format!("p{n}-{m}"), &history, &mut rng).await?;
            }
            Ok(())
        }));
    }
    for n in 0..CONSUMERS {
        let broker = cx.connect().await?;
        let mut consumer = attach(&*broker, &name, rng.u32(1..32)).await?;
        for _ in 0..rng.usize(20..80) {
            // The publishers may be ahead or behind; what does not come here comes in the drain.
            let wait = Duration::from_millis(200);
            let Ok(delivery) = tokio::time::timeout(wait, consumer.next()).await else {
                break;
            };
            settle(delivery?, &name, &history, &mut rng).await;
        }
        let how = [
            "its handle is closed",
            "its consumer is dropped",
            "all is dropped",
        ][n % 3];
        history.note(Event::Fault {
            what: format!("a consumer goes: {how}"),
        });
        match n % 3 {
            0 => broker.close(long()).await?,
            1 => drop(consumer),
            _ => drop((consumer, broker)),
        }
    }
    join_all(publishers).await?;
    finish(cx, &*control, &name, &history).await?;
    let minimum = Minimum {
        confirmed: (PUBLISHERS * EACH / 2) as u64,
        faults: CONSUMERS as u64,
    };
    verdict(cx, &history, minimum)
}

/// The same with processes, killed at random moments of publishing and consuming.
pub async fn l_processes_killed_at_random_lose_nothing(cx: &Cx) -> CheckResult {
    const KILLS: u64 = 8;
    let history = cx.history();
    let control = cx.connect().await?;
    let name = limited(&*control, "l-processes", 10_000).await?;
    let mut rng = cx.rng();
    for round in 0..KILLS {
        let mut worker = Agent::start(cx).await?;
        let mut loader = Agent::start(cx).await?;
        let (worker_seed, loader_seed) = (rng.u64(..), rng.u64(..));
        worker
            .order(&Order::Work {
                queue: name.clone(),
                seed: worker_seed,
            })
            .await?;
        let prefix = format!("r{round}-");
        let (queue, seed) = (name.clone(), loader_seed);
        loader
            .order(&Order::Load {
                queue,
                prefix,
                messages: 100_000,
                at_once: 1,
                seed,
            })
            .await?;
        // The kill comes that many lines into its history: a moment that a seed can name.
        // Each message that the loader tells of gives the worker two lines at least: it never waits for
        // work that a killed loader does not bring any more.
        let for_loader = rng.u64(40..300);
        let for_worker = rng.u64(20..for_loader - 10);
        let (worker, loader) = tokio::join!(
            kill_after(worker, for_worker, &history),
            kill_after(loader, for_loader, &history)
        );
        worker?;
        loader?;
    }
    finish(cx, &*control, &name, &history).await?;
    verdict(
        cx,
        &history,
        Minimum {
            confirmed: KILLS * 10,
            faults: KILLS * 2,
        },
    )
}

/// Reads so many lines, kills, and reads what the killed one still told.
async fn kill_after(mut agent: Agent, lines: u64, history: &History) -> Result<(), CheckError> {
    let mut read = 0;
    let mut killed = false;
    while let Some(told) = agent.told().await? {
        match told {
            Told::History { entry } => {
                history.append(entry);
                read += 1;
            }
            Told::Failed { error } => {
                return Err(CheckError::failed(
                    "a process works until it is killed",
                    error,
                ));
            }
            _ => {}
        }
        if read >= lines && !killed {
            killed = true;
            history.note(Event::Fault {
                what: "a process is killed".into(),
            });
            agent.kill().await?;
        }
    }
    Ok(())
}
