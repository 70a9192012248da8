//! Becoming a queue's one consumer (law C12).
//!
//! The server is the arbiter. On a stream of the work-queue kind it lets one subject have one consumer:
//! whoever makes the consumer of the subject `lock`, under a name of its own, is attached, and the next
//! is refused. Whether the attached one lives is asked on a subject that it alone listens to: the server
//! says at once when nobody listens there any more.
//!
//! One that died is fenced before the next begins: the server's consumer through which it received is
//! deleted by its name, and with it every acknowledgement of the dead one goes nowhere (law C4). What it
//! had received is kept in the notes. One that leaves in order deletes it itself, and with it all goes back
//! at once; unless deliveries are still in hand, which keep their leases, and the next one shares it (C5).

use std::{ops::RangeInclusive, time::Duration};

use async_nats::Subscriber;
use bytes::Bytes;
use futures_util::{TryStreamExt as _, stream};
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{
    api::{NOT_UNIQUE, Refusal},
    connection::{Link, Unanswered, gone},
    names::Names,
    notes::{Notes, now_ms},
    settled::Runs,
};
use crate::{
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
};

/// What the names of lock consumers and of those that deliver begin with.
const LOCK: &str = "lock-";
const DATA: &str = "data-";

/// How long one that listens no more may need to connect again before it counts as gone.
const GRACE: Duration = Duration::from_secs(1);

/// How often somebody who may be gone is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// The longest that one question to somebody who may be hung takes.
const PATIENCE: Duration = Duration::from_secs(1);

pub(super) fn lock_name(token: &str) -> String {
    format!("{LOCK}{token}")
}

/// What was attached.
pub(super) struct Attached {
    pub(super) notes: Notes,
    /// Where it is asked what it holds.
    pub(super) asked: Subscriber,
    /// The server's consumer.
    pub(super) consumer: String,
}

/// Attaches under this token, whose holder listens already, to this making of the queue; `first` is the first
/// message that is stored.
pub(super) async fn attach(
    link: &Link,
    names: &Names,
    token: &str,
    made: &str,
    first: u64,
    deadline: Deadline,
) -> Result<Attached> {
    lock(link, names, token, deadline).await?;
    let attached = settle_in(link, names, token, made, first, deadline).await;
    if attached.is_err() {
        // Not past the deadline of the caller, whose answer this is; whoever comes next finds it dead.
        let _ = link.drop_consumer(names, &lock_name(token), deadline).await;
    }
    attached
}

async fn lock(link: &Link, names: &Names, token: &str, deadline: Deadline) -> Result<()> {
    loop {
        let made = make(link, names, &lock_name(token), &names.lock(), deadline).await?;
        match made {
            Ok(()) => return Ok(()),
            Err(refusal) if NOT_UNIQUE.contains(&refusal.code) => {}
            Err(refusal) => return Err(refusal.into_error()),
        }
        let consumers = link.consumers(names, deadline).await?;
        let Some(other) = consumers.iter().find_map(|name| name.strip_prefix(LOCK)) else {
            continue;
        };
        let gone =
            is_gone(link, &names.hold(other), deadline)
                .await
                .or_else(|error| match error.kind() {
                    ErrorKind::DeadlineExceeded => Ok(false),
                    _ => Err(error),
                })?;
        if !gone {
            return Err(Error::new(
                ErrorKind::Conflict,
                "another consumer is attached to the queue",
            ));
        }
        link.drop_consumer(names, &lock_name(other), deadline)
            .await?;
    }
}

/// Asks who holds something whether it lives. True once nobody has listened for the grace, or whoever
/// listens has said nothing for as long as a lease.
pub(super) async fn is_gone(link: &Link, subject: &str, deadline: Deadline) -> Result<bool> {
    let started = Instant::now();
    let mut absent_since = None;
    loop {
        let patience = deadline.or_after(PATIENCE);
        match link
            .call(subject, None, &Bytes::new(), true, patience)
            .await
        {
            Ok(answer) if answer.nobody() => {
                let since = *absent_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= GRACE {
                    return Ok(true);
                }
            }
            Ok(_) => return Ok(false),
            Err(Unanswered::Unknown(_)) if !deadline.has_passed() => absent_since = None,
            Err(error) => return Err(error.into_error()),
        }
        if started.elapsed() >= link.options.takeover && absent_since.is_none() {
            return Ok(true);
        }
        deadline.bound(sleep(ASK_AGAIN)).await?;
    }
}

/// Makes a consumer of the server's.
async fn make(
    link: &Link,
    names: &Names,
    name: &str,
    filter: &str,
    deadline: Deadline,
) -> Result<Result<(), Refusal>> {
    let wait = u64::try_from(link.options.takeover.as_nanos()).unwrap_or(u64::MAX);
    let verb = format!("CONSUMER.CREATE.{}.{name}.{filter}", names.stream);
    let body = json!({
        "stream_name": names.stream,
        "config": {
            "name": name,
            "durable_name": name,
            "filter_subject": filter,
            "deliver_policy": "all",
            "ack_policy": "explicit",
            "ack_wait": wait,
            // The delivery limit is kept here: the server's own drops what is over it.
            "max_deliver": -1,
            // What is delayed counts too; the prefetch is kept by what is pulled.
            "max_ack_pending": -1,
        }
    });
    Ok(link.api(&verb, &body, deadline).await?.map(drop))
}

async fn settle_in(
    link: &Link,
    names: &Names,
    token: &str,
    made: &str,
    first: u64,
    deadline: Deadline,
) -> Result<Attached> {
    // Before any question of ours that the server answers, so that it knows of it when this is Ok.
    let asked = deadline
        .bound(link.client.subscribe(names.held()))
        .await?
        .map_err(gone)?;
    let mut notes = Notes::read(link, names, made, deadline).await?;
    notes.floors.retain(|floor| *floor >= first);
    notes.marks.retain(|sequence, _| *sequence >= first);
    notes.settled.retain(|_, last| *last >= first);
    sweep(link, names, &notes.settled, deadline).await?;
    let left_in_order = notes.holder.is_none();
    let consumer = match notes.consumer.take().filter(|_| left_in_order) {
        Some(consumer) => consumer,
        None => format!("{DATA}{token}"),
    };
    let dead = if left_in_order {
        vec![]
    } else {
        dead(link, names, deadline).await?
    };
    for (name, delivered) in &dead {
        if *delivered > 0 {
            tracing::info!(
                consumer = name,
                delivered,
                "taking over from a consumer that died"
            );
            take_over(&mut notes, *delivered);
        }
    }
    notes.term += 1;
    notes.version = 0;
    notes.holder = Some(token.to_owned());
    notes.consumer = Some(consumer.clone());
    notes.write(link, names, deadline).await?;
    if let Some(old) = notes.take_old() {
        link.forget(names, old, deadline).await?;
    }
    for (name, _) in &dead {
        link.drop_consumer(names, name, deadline).await?;
    }
    if !dead.is_empty() {
        nudge(link, names).await;
    }
    loop {
        match make(link, names, &consumer, &names.input(), deadline).await? {
            Ok(()) => {
                return Ok(Attached {
                    notes,
                    asked,
                    consumer,
                });
            }
            Err(refusal) if NOT_UNIQUE.contains(&refusal.code) => {
                // One that left in order did not live to take its own away.
                for (name, _) in self::dead(link, names, deadline).await? {
                    link.drop_consumer(names, &name, deadline).await?;
                }
            }
            Err(refusal) => return Err(refusal.into_error()),
        }
    }
}

/// Takes out again what was settled and came back when the server was killed (law C2). Nobody gets it, so
/// nobody is to wait for it because the queue counts it. Each run costs a round trip, and where messages were
/// not settled in their order there are hundreds: many are asked for at once.
pub(super) async fn sweep(
    link: &Link,
    names: &Names,
    settled: &Runs,
    deadline: Deadline,
) -> Result<()> {
    const AT_ONCE: usize = 64;
    let Some((oldest, _)) = settled.first_key_value() else {
        return Ok(());
    };
    let stored = link
        .stored(names, &names.input(), *oldest, deadline)
        .await?;
    let Some(stored) = stored else {
        return Ok(());
    };
    let runs = settled.iter().filter(|(_, last)| **last >= stored.sequence);
    stream::iter(runs.map(Ok))
        .try_for_each_concurrent(AT_ONCE, |(first, last)| {
            sweep_run(link, names, *first..=*last, deadline)
        })
        .await
}

async fn sweep_run(
    link: &Link,
    names: &Names,
    run: RangeInclusive<u64>,
    deadline: Deadline,
) -> Result<()> {
    let mut from = *run.start();
    while run.contains(&from)
        && let Some(stored) = link.stored(names, &names.input(), from, deadline).await?
        && run.contains(&stored.sequence)
    {
        link.forget(names, stored.sequence, deadline).await?;
        from = stored.sequence + 1;
    }
    Ok(())
}

/// Those through which the dead one received, and how far each had delivered.
async fn dead(link: &Link, names: &Names, deadline: Deadline) -> Result<Vec<(String, u64)>> {
    let mut dead = Vec::new();
    for name in link.consumers(names, deadline).await? {
        if name.starts_with(DATA)
            && let Some(info) = link.consumer(names, &name, deadline).await?
        {
            let delivered = info["delivered"]["stream_seq"].as_u64().unwrap_or(0);
            dead.push((name, delivered));
        }
    }
    Ok(dead)
}

/// Counts what a dead consumer had delivered: its successor's counts start anew.
fn take_over(notes: &mut Notes, delivered: u64) {
    notes.floors.push(delivered);
    let now = now_ms();
    for (sequence, mark) in &mut notes.marks {
        // What still waits for its delay was not handed out since it was noted, and the floor counts it.
        if mark.due > now && *sequence <= delivered {
            mark.seen -= 1;
        }
    }
}

/// Tells whoever believes to be attached to look again.
pub(super) async fn nudge(link: &Link, names: &Names) {
    // One that does not hear it finds out at its next pull.
    let _ = link.client.publish(names.held(), Bytes::new()).await;
}

/// How far the server's consumer has delivered, as the server knows after a restart too; `None`: the
/// consumer is not there.
pub(super) async fn delivered(
    link: &Link,
    names: &Names,
    consumer: &str,
    deadline: Deadline,
) -> Result<Option<u64>> {
    match link.consumer(names, consumer, deadline).await {
        Ok(info) => Ok(info.map(|info| info["delivered"]["stream_seq"].as_u64().unwrap_or(0))),
        Err(error) if *error.kind() == ErrorKind::NoQueue => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the server still has this consumer.
pub(super) async fn still_there(
    link: &Link,
    names: &Names,
    consumer: &str,
    deadline: Deadline,
) -> Result<bool> {
    match link.consumer(names, consumer, deadline).await {
        Ok(info) => Ok(info.is_some()),
        Err(error) if *error.kind() == ErrorKind::NoQueue => Ok(false),
        Err(error) => Err(error),
    }
}
