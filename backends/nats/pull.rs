//! Pulling messages, bounded by the prefetch, and handing them in.

use std::{sync::Arc, time::Duration};

use async_nats::{Message as Raw, Subscriber};
use futures_util::StreamExt;
use tokio::time::{Instant, sleep};

use super::{
    connection::lock,
    form,
    hold::{Held, Hold, Phase, Pull},
    leave::leave,
    notes::{Notes, now_ms},
    received::{Received, place},
    settle, unreadable,
};
use crate::{deadline::Deadline, error::ErrorKind};

/// How long the server keeps a pull that has nothing to give.
const PULL: Duration = Duration::from_secs(10);

/// How much later than that a pull counts as lost.
const SLACK: Duration = Duration::from_secs(2);

/// The pause after a pull that failed while all is well otherwise.
const PAUSE: Duration = Duration::from_millis(100);

/// Pulls, hands in, gives back, until it goes.
pub(super) async fn run(hold: Arc<Hold>, mut arrivals: Subscriber, inbox: String) {
    let mut state = hold.link.state();
    let mut generation = state.borrow_and_update().generation;
    let mut server = hold.link.client.server_info().server_id;
    let mut number = 0;
    loop {
        give_back_loose(&hold);
        if lock(&hold.inner).phase != Phase::Attached {
            break;
        }
        let suspicious = std::mem::take(&mut lock(&hold.inner).suspicious);
        if suspicious {
            let _ = hold
                .check(Deadline::after(hold.link.options.takeover))
                .await;
            continue;
        }
        pull(&hold, &inbox, &mut number).await;
        let until = lock(&hold.inner).pulls.front().map(|pull| pull.until);
        let until = until.unwrap_or_else(|| Instant::now() + hold.link.options.takeover);
        tokio::select! {
            arrived = arrivals.next() => match arrived {
                Some(raw) => receive(&hold, raw, &inbox).await,
                None => sleep(PAUSE).await,
            },
            () = hold.wake.notified() => {}
            () = tokio::time::sleep_until(until) => {
                // A pull was lost, or none is out, since all is in hand: is the queue still there?
                lock(&hold.inner).pulls.retain(|pull| pull.until > Instant::now());
                if hold.link.is_connected() {
                    let _ = hold.check(Deadline::after(hold.link.options.takeover)).await;
                }
            }
            _ = state.changed() => {
                let now = state.borrow_and_update().generation;
                if hold.link.is_revoked() {
                    hold.end(ErrorKind::AuthRefused);
                } else if now != generation {
                    generation = now;
                    // What the server was asked on the old connection it has forgotten.
                    lock(&hold.inner).pulls.clear();
                    let deadline = Deadline::after(hold.link.options.takeover);
                    let _ = hold.look_back(&mut server, deadline).await;
                    if let Err(error) = unreadable::bury(&hold, deadline).await {
                        tracing::debug!(%error, "what the client cannot read is looked for once more");
                    }
                }
            }
        }
    }
    let leaves = matches!(lock(&hold.inner).phase, Phase::Leaving(_));
    if leaves {
        leave(&hold, arrivals).await;
    }
    hold.gone.send_replace(true);
    while !hold.is_over() {
        give_back_loose(&hold);
        hold.wake.notified().await;
    }
    give_back_loose(&hold);
}

/// Asks for as many as there is room for (law C9).
async fn pull(hold: &Arc<Hold>, inbox: &str, number: &mut u64) {
    if !hold.link.is_connected() {
        return;
    }
    let room = {
        let mut inner = lock(&hold.inner);
        let asked: usize = inner.pulls.iter().map(|pull| pull.left).sum();
        let unsettled = inner.held.len() - inner.confirmed;
        let room = hold
            .prefetch
            .saturating_sub(inner.buffer.len() + unsettled + asked);
        // A few large pulls rather than many of one, but never none while there is room.
        if room == 0 || (asked > 0 && room < hold.prefetch.div_ceil(4)) {
            return;
        }
        *number += 1;
        let until = Instant::now() + PULL + SLACK;
        inner.pulls.push_back(Pull {
            number: *number,
            left: room,
            until,
        });
        room
    };
    let subject = format!(
        "$JS.API.CONSUMER.MSG.NEXT.{}.{}",
        hold.names.stream, hold.consumer
    );
    let body = format!("{{\"batch\":{room},\"expires\":{}}}", PULL.as_nanos());
    let reply = format!("{inbox}.{number}");
    if let Err(error) = hold
        .link
        .client
        .publish_with_reply(subject, reply, body.into())
        .await
    {
        tracing::debug!(%error, "a pull was not sent");
        lock(&hold.inner)
            .pulls
            .retain(|pull| pull.number != *number);
    }
}

async fn receive(hold: &Arc<Hold>, raw: Raw, inbox: &str) {
    // A message of a stream has a place there, whatever status somebody gave it.
    let sequence = raw.reply.as_ref().and_then(|reply| place(reply));
    if let Some(status) = raw.status.filter(|_| sequence.is_none()) {
        let number = raw
            .subject
            .strip_prefix(inbox)
            .and_then(|number| number[1..].parse().ok());
        lock(&hold.inner)
            .pulls
            .retain(|pull| Some(pull.number) != number);
        if !matches!(status.as_u16(), 100 | 404 | 408) {
            let checked = hold
                .check(Deadline::after(hold.link.options.takeover))
                .await;
            if checked.is_err() || lock(&hold.inner).phase == Phase::Attached {
                // All is well, so this passes: a leader that changes, a server that ends.
                sleep(PAUSE).await;
            }
        }
        return;
    }
    let Some(sequence) = sequence else {
        return;
    };
    let mut received = Received {
        sequence,
        attempt: 0,
        raw,
    };
    if lock(&hold.inner).settled.contains(sequence) {
        lock(&hold.inner).came();
        settle::end(hold, &received).await;
        return;
    }
    let (rest, suspect) = {
        let mut inner = lock(&hold.inner);
        inner.came();
        let ours = inner
            .held
            .get(&sequence)
            .is_some_and(|held| !held.returning);
        if ours || inner.buffer.iter().any(|other| other.sequence == sequence) {
            // Its lease ran out while nobody could keep it, and nobody else has it: the same delivery.
            return;
        }
        inner.let_go(sequence);
        inner.delayed.remove(&sequence);
        received.attempt = inner.handed_out(sequence);
        let due = inner.marks.get(&sequence).map_or(0, |mark| mark.due);
        (
            due.saturating_sub(now_ms()),
            Notes::floors_over(&inner.floors, sequence) > 0,
        )
    };
    if rest > 0 {
        // The server forgot the delay.
        settle::put_off(hold, &received, Duration::from_millis(rest)).await;
        return;
    }
    if suspect && settle::is_dead_already(hold, &received).await {
        return;
    }
    if let Some(letter) = form::was_letter(received.raw.headers.as_ref()) {
        // Sent back by one that did not live to take the letter away (law C7).
        let deadline = Deadline::after(hold.link.options.takeover);
        let _ = hold.link.forget(&hold.names, letter, deadline).await;
    }
    let mut inner = lock(&hold.inner);
    if received.attempt >= hold.limit {
        // Given back by one that could not say so any more: it goes to the dead letters.
        inner.held.insert(sequence, Held::new(&received, false));
        inner.loose.push(received);
        drop(inner);
        hold.wake.notify_one();
        return;
    }
    inner.buffer.push_back(received);
    drop(inner);
    hold.arrived.notify_one();
}

/// Gives back what was dropped unsettled, each in a task of its own.
fn give_back_loose(hold: &Arc<Hold>) {
    let loose = std::mem::take(&mut lock(&hold.inner).loose);
    for received in loose {
        let hold = Arc::clone(hold);
        tokio::spawn(async move { settle::give_back(&hold, &received).await });
    }
}
