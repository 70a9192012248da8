//! Keeping leases while their holders work (law C5), and saying that the consumer lives.

use std::sync::Arc;

use async_nats::{Message as Raw, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{
    connection::lock,
    hold::{Hold, Phase},
};
use crate::deadline::Deadline;

/// What whoever deletes a queue asks its consumer.
pub(super) const FINISH: &[u8] = b"finish";

/// Until nothing is held any more.
pub(super) async fn keep(hold: Arc<Hold>, alive: Subscriber, asked: Subscriber) {
    let mut beat = interval(hold.link.options.takeover / 4);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut listening = Some((alive, asked));
    loop {
        let (alive, asked) = match &mut listening {
            Some((alive, asked)) => (Some(alive), Some(asked)),
            None => (None, None),
        };
        tokio::select! {
            Some(question) = next(alive) => answer(&hold, question).await,
            Some(question) = next(asked) => answer(&hold, question).await,
            _ = beat.tick() => extend(&hold).await,
            () = hold.hush.notified() => {}
        }
        if lock(&hold.inner).phase != Phase::Attached && listening.take().is_some() {
            hold.be_deaf();
        }
        if hold.is_over() {
            hold.wake.notify_one();
            return;
        }
    }
}

async fn next(questions: Option<&mut Subscriber>) -> Option<Raw> {
    match questions {
        Some(questions) => questions.next().await,
        None => None,
    }
}

async fn answer(hold: &Hold, question: Raw) {
    if question.payload == FINISH
        && let Some(reply) = &question.reply
        && finish(hold).await
    {
        // Whoever deletes the queue waits for this, though not for ever.
        let _ = hold.link.client.publish(reply.clone(), Bytes::new()).await;
        return;
    }
    if lock(&hold.inner).phase != Phase::Attached {
        // Another may be attached by now, whose word it is.
        return;
    }
    if question.reply.is_none() {
        // Whoever deletes the queue, or takes over, says so.
        let _ = hold
            .check(Deadline::after(hold.link.options.takeover))
            .await;
        return;
    }
    if let (Some(reply), Ok(told)) = (question.reply, serde_json::to_vec(&hold.told())) {
        // Whoever asked asks again.
        let _ = hold.link.client.publish(reply, told.into()).await;
    }
}

/// The queue is being deleted: settles nothing more, and waits for what is on its way. False: it is not,
/// or nothing is known.
async fn finish(hold: &Hold) -> bool {
    let deadline = Deadline::after(hold.link.options.takeover);
    // Not on anybody's word: the server is asked.
    let checked = hold.check(deadline).await;
    checked.is_ok()
        && lock(&hold.inner).phase != Phase::Attached
        && hold.until_settled(deadline).await.is_ok()
}

async fn extend(hold: &Hold) {
    if !hold.link.is_connected() {
        return;
    }
    if lock(&hold.inner).kept.elapsed() > hold.link.options.takeover {
        // It slept, or was cut off: the leases may be another's (law C4).
        let _ = hold
            .check(Deadline::after(hold.link.options.takeover))
            .await;
    }
    let replies: Vec<String> = {
        let inner = lock(&hold.inner);
        let buffered = inner
            .buffer
            .iter()
            .map(|received| received.reply().to_owned());
        let held = inner.held.values().filter(|held| !held.returning);
        held.map(|held| held.reply.clone())
            .chain(buffered)
            .collect()
    };
    for reply in replies {
        if hold
            .link
            .client
            .publish(reply, "+WPI".into())
            .await
            .is_err()
        {
            return;
        }
    }
    lock(&hold.inner).kept = Instant::now();
}
