//! What runs under faults and is judged by the ledger: honest senders, guests of every mood, the drain
//! at the end and the verdict.

use std::time::{Duration, Instant};

use tokio::{task::JoinSet, time::timeout};
use wilco::{Broker, Deadline, MessageId, Outcome, QueueName, broker::Delivery};

use crate::{
    check::{CheckError, CheckResult, Cx, Evidence},
    ledger::{Answer, Event, History, How, Minimum, Verdict, judge},
    support::*,
};

/// A publish as an honest sender does it: cut off at times, and sent again under its id after
/// anything but Ok.
pub(crate) async fn publish(
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

pub(crate) async fn settle(
    delivery: Delivery,
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

/// After so long without a delivery the queue is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Faults over: receives and acks all that is left, and looks through the dead letters.
pub(crate) async fn finish(
    cx: &Cx,
    control: &dyn Broker,
    name: &QueueName,
    history: &History,
) -> Result<(), CheckError> {
    let broker = cx.connect().await?;
    let mut consumer = attach(&*broker, name, 32).await?;
    let mut last = Instant::now();
    loop {
        let status = control.status(name, long()).await?;
        let left = status.messages() - status.dead;
        if left == 0 {
            break;
        }
        expect(
            last.elapsed() < LONG,
            format!("a delivery within {LONG:?}"),
            format_args!("none came, and {left} are left"),
        )?;
        let mut acks = JoinSet::new();
        for _ in 0..left {
            // Or fewer: one whose ack was on its way still is counted, and does not come.
            let Ok(delivery) = timeout(LOOK_AGAIN, consumer.next()).await else {
                break;
            };
            let delivery = delivery?;
            last = Instant::now();
            history.note(Event::delivery(name, &delivery));
            let id = delivery.message.id.to_string();
            acks.spawn(async move { (id, delivery.ack(long()).await.is_ok()) });
        }
        while let Some(acked) = acks.join_next().await {
            let (id, ok) = acked.map_err(|error| CheckError::failed("an ack ends", error))?;
            history.note(Event::Settled {
                queue: name.to_string(),
                id,
                how: How::Ack,
                ok,
            });
        }
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
pub(crate) fn verdict(cx: &Cx, history: &History, minimum: Minimum) -> CheckResult {
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
