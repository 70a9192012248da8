//! A consumer goes: it gives back what it has, and makes way for the next (laws F8, C10, C11).

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use async_nats::Subscriber;
use bytes::Bytes;
use futures_util::StreamExt;

use super::{
    attach::lock_name,
    connection::{gone, lock},
    hold::{Hold, Phase},
    received::{Received, place, reply_of},
    settle,
};
use crate::{deadline::Deadline, error::Result};

/// How long going takes at the most, with the server down too (law F8).
const GOING: Duration = Duration::from_secs(5);

/// How far back it is looked for what was on its way when a consumer went.
const MOST_ON_ITS_WAY: u64 = 4_096;

/// Gives back what it has and makes way for the next.
pub(super) async fn leave(hold: &Arc<Hold>, arrivals: Subscriber) {
    let deadline = Deadline::after(GOING);
    let mut deaf = hold.deaf.subscribe();
    hold.hush.notify_one();
    let _ = deadline.bound(deaf.wait_for(|deaf| *deaf)).await;
    let (shared, mut buffer) = {
        let mut inner = lock(&hold.inner);
        let all = inner.phase == Phase::Leaving(true);
        inner.shared = !all && inner.held.values().any(|held| held.live);
        (inner.shared, std::mem::take(&mut inner.buffer))
    };
    if shared {
        buffer.extend(rest(hold, arrivals, deadline).await);
    } else {
        drop(arrivals);
        // With the server's consumer goes what its confirms are worth: what is on its way gets its answer
        // first. Nothing new begins, since nobody holds anything, or nobody may settle it.
        let _ = hold.until_settled(deadline.or_after(GOING / 2)).await;
    }
    if let Err(error) = go(hold, buffer, deadline).await {
        // The next one finds it dead.
        tracing::debug!(%error, "a consumer went without a word to the server");
    }
    let mut inner = lock(&hold.inner);
    if !inner.shared {
        inner.held.clear();
        inner.confirmed = 0;
        inner.loose.clear();
    }
    if matches!(inner.phase, Phase::Leaving(_)) {
        inner.phase = Phase::Left;
    }
}

/// What comes before the server hears that nobody listens: left lying, it would come to the next one
/// when its lease runs out, after what stands behind it.
async fn rest(hold: &Hold, mut arrivals: Subscriber, deadline: Deadline) -> Vec<Received> {
    let mut rest = Vec::new();
    if !hold.link.is_connected() || arrivals.drain().await.is_err() {
        return rest;
    }
    while let Ok(Some(raw)) = deadline.bound(arrivals.next()).await {
        if let Some(sequence) = raw.reply.as_ref().and_then(|reply| place(reply)) {
            rest.push(Received {
                sequence,
                attempt: 0,
                raw,
            });
        }
    }
    rest
}

/// Tells the server, step by step: what was handed out how often, then what goes back.
async fn go(hold: &Arc<Hold>, buffer: VecDeque<Received>, deadline: Deadline) -> Result<()> {
    hold.note(deadline).await?;
    if lock(&hold.inner).shared {
        let back = going_back(hold, buffer, deadline).await;
        // The server puts what is given back behind what waits to be delivered again already. Put off for
        // now, all of it leaves that line, and then enters it in the order of the queue (law C11).
        let lease = hold.link.options.takeover.as_nanos();
        for what in [format!("-NAK {{\"delay\":{lease}}}"), "-NAK".into()] {
            if let Err(error) = give_back(hold, &back, what, deadline).await {
                tracing::debug!(%error, "what was buffered comes when its lease runs out");
            }
        }
    } else {
        // All that it had in its hands or on its way goes back with it, at once.
        hold.link
            .drop_consumer(&hold.names, &hold.consumer, deadline)
            .await?;
    }
    hold.link
        .drop_consumer(&hold.names, &lock_name(&hold.token), deadline)
        .await
}

/// Tells the server the same of each, one after the other: it keeps their order, and with its word on the
/// last it has come to all.
async fn give_back(
    hold: &Hold,
    back: &BTreeMap<u64, String>,
    what: String,
    deadline: Deadline,
) -> Result<()> {
    let mut replies = back.values();
    let Some(last) = replies.next_back() else {
        return Ok(());
    };
    let body = Bytes::from(what);
    for reply in replies {
        let sent = hold.link.client.publish(reply.clone(), body.clone());
        deadline.bound(sent).await?.map_err(gone)?;
    }
    settle::tell(&hold.link, last, body, deadline).await
}

/// Where all that goes back is given back, in the order of the queue: what was buffered, and what the server
/// had on its way while it heard that nobody listens, or was about to deliver again. That came to nobody,
/// and is known by its number alone; what was handed out is noted, and stays with its holders.
async fn going_back(
    hold: &Hold,
    buffer: VecDeque<Received>,
    deadline: Deadline,
) -> BTreeMap<u64, String> {
    let told = hold.link.consumer(&hold.names, &hold.consumer, deadline);
    let told = told.await.ok().flatten().unwrap_or_default();
    let number = |of: &str, which: &str| told[of][which].as_u64().unwrap_or(0);
    let last = number("delivered", "stream_seq");
    let first = number("ack_floor", "stream_seq").max(last.saturating_sub(MOST_ON_ITS_WAY)) + 1;
    let inner = lock(&hold.inner);
    let in_hand = |sequence| {
        inner
            .held
            .get(&sequence)
            .is_some_and(|held| !held.returning)
    };
    let buffered = buffer.iter();
    let mut back: BTreeMap<_, _> = buffered
        .filter(|received| !in_hand(received.sequence))
        .map(|received| (received.sequence, received.reply().to_owned()))
        .collect();
    let known = inner.held.values().map(|held| held.reply.as_str());
    let known = known.chain(buffer.iter().map(Received::reply)).next();
    let Some(known) = known.map(str::to_owned) else {
        return back;
    };
    for sequence in first..=last {
        if !inner.marks.contains_key(&sequence) {
            let reply = || reply_of(&known, sequence, number("delivered", "consumer_seq"));
            back.entry(sequence).or_insert_with(reply);
        }
    }
    back
}
