//! Section L: workloads under a seeded schedule of faults, judged by the ledger.

use std::{sync::Arc, time::Duration};

use wilco::{Broker, Deadline, MessageId, Outcome, QueueName};

use crate::{
    agent::{Agent, Order, Told},
    check::{CheckError, CheckResult, Cx, Evidence},
    ledger::{Answer, Event, History, How, Minimum, Verdict, judge},
    support::*,
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

/// A publish as an honest sender does it: cut off at times, and sent again under its id after
/// anything but Ok.
async fn publish(
    broker: &dyn Broker,
    name: &QueueName,
    id: &str,
    history: &History,
    rng: &mut fastrand::Rng,
) -> Result<(), CheckError> {
    let (queue, text) = (name.to_string(), id.to_owned());
    for _ in 0..rng.u32(1..4) {
        history.note(Event::Attempt {
            queue: queue.clone(),
            id: text.clone(),
        });
        let message = named(id)?;
        let answer = match rng.u32(0..8) {
            0 => cut_after(rng.usize(0..5), broker.publish(name, message, long())).await,
            1 => {
                let limit = Deadline::after(Duration::from_micros(rng.u64(0..1_000)));
                Some(broker.publish(name, message, limit).await)
            }
            _ => Some(broker.publish(name, message, long()).await),
        };
        let answer = match answer {
            Some(Ok(_)) => Answer::Stored,
            Some(Err(error)) if error.outcome() == Some(Outcome::NotStored) => Answer::NotStored,
            Some(Err(_)) | None => Answer::Unknown,
        };
        history.note(Event::Answer {
            queue: queue.clone(),
            id: text.clone(),
            answer,
        });
        if answer == Answer::Stored {
            break;
        }
    }
    Ok(())
}

async fn settle(
    delivery: wilco::broker::Delivery,
    name: &QueueName,
    history: &History,
    rng: &mut fastrand::Rng,
) {
    history.note(Event::delivery(name, &delivery));
    let id = delivery.message.id.to_string();
    let (how, ok) = match rng.u32(0..10) {
        0 => {
            drop(delivery);
            (How::Dropped, true)
        }
        1 => {
            let delay = Duration::from_millis(rng.u64(0..30));
            (How::Retry, delivery.retry(delay, long()).await.is_ok())
        }
        2 => (
            How::DeadLetter,
            delivery.dead_letter("nemesis", long()).await.is_ok(),
        ),
        3 => {
            let ack = cut_after(rng.usize(0..4), delivery.ack(long())).await;
            (How::Ack, ack.is_some_and(|ack| ack.is_ok()))
        }
        _ => (How::Ack, delivery.ack(long()).await.is_ok()),
    };
    history.note(Event::Settled {
        queue: name.to_string(),
        id,
        how,
        ok,
    });
}

/// Faults over: receives and acks all that is left, and looks through the dead letters.
async fn finish(
    cx: &Cx,
    control: &dyn Broker,
    name: &QueueName,
    history: &History,
) -> Result<(), CheckError> {
    let broker = cx.connect().await?;
    let mut consumer = attach(&*broker, name, 32).await?;
    loop {
        let status = control.status(name, long()).await?;
        if status.messages() == status.dead {
            break;
        }
        let delivery = receive(&mut *consumer).await?;
        history.note(Event::delivery(name, &delivery));
        let id = delivery.message.id.to_string();
        let ok = delivery.ack(long()).await.is_ok();
        let queue = name.to_string();
        history.note(Event::Settled {
            queue,
            id,
            how: How::Ack,
            ok,
        });
    }
    consumer.close(long()).await?;
    let dead = control
        .dead_letters(name, None, count(1_000_000), long())
        .await?;
    for id in dead
        .iter()
        .map(|letter| MessageId::to_string(&letter.message.id))
    {
        history.note(Event::Found {
            queue: name.to_string(),
            id,
        });
    }
    history.note(Event::Drained {
        queue: name.to_string(),
    });
    Ok(())
}

/// Judges the history; one that is not clean is kept, to be checked again off-line.
fn verdict(cx: &Cx, history: &History, minimum: Minimum) -> CheckResult {
    let verdict: Verdict = judge(&history.entries(), minimum);
    if verdict.is_clean() {
        return Ok(Evidence::of("attempts", verdict.attempts)
            .and("confirmed", verdict.confirmed)
            .and("deliveries", verdict.deliveries)
            .and("redelivered", verdict.redelivered)
            .and("resent", verdict.resent)
            .and("recovered", verdict.recovered)
            .and("faults", verdict.faults));
    }
    let file = format!(
        "wilco-history-{}-{}.jsonl",
        cx.options.seed,
        MessageId::generate()
    );
    let path = cx.options.histories.join(file);
    let kept = match history.save(&path) {
        Ok(()) => format!("kept in {}", path.display()),
        Err(error) => format!("not kept: {error}"),
    };
    Err(CheckError::failed(
        "a clean ledger",
        format!("{verdict}\nhistory {kept}"),
    ))
}
