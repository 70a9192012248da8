//! Deleting a queue, which takes several steps, behind a fence.
//!
//! First the stream's configuration no longer lists the subject of new messages: from then on the server
//! itself answers every publish with "no responders". Then the attached consumer settles nothing more, and
//! says so once what it had on its way has its answer. Then the server's consumers go, and what the stream
//! holds after that is what is discarded (law Q6).
//!
//! The server alone is no arbiter between a delete and an acknowledgement. Before 2.10.19 it confirms those
//! that it took in before the consumer was deleted and came to after that, and takes nothing out of the
//! stream for them; later ones may still be at it when the stream is read. So whoever acknowledges believes
//! a confirm only if the consumer is there after it (`Hold::believe`): that holds for one too that did not
//! listen when it was told to be quiet.
//!
//! Two who delete at once both put up a fence, since the server changes a stream without asking what it was
//! before. The one whose fence stands there last deletes; the other sees that in time and lets him. So no
//! change and no deletion is sent twice without a look in between: the name may be another queue's by then.
//!
//! Whoever dies in between leaves the fence, and with it a queue that is gone for everybody else. It is
//! finished by the next who deletes or declares it, once it is certain that nobody is at work behind it.

use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{
    api::{Description, Fence, Refusal, STREAM_NOT_FOUND, Stream},
    attach,
    connection::{Link, Unanswered, lock},
    form,
    keep::FINISH,
    names::{LANES, Names, token},
    no_queue,
    topology::config,
};
use crate::{
    broker::{DeleteMode, Discarded},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    message::MessageId,
    names::QueueName,
};

/// How often a fence is looked at again.
const PAUSE: Duration = Duration::from_millis(10);

/// After this long a fence was left behind by somebody who did not live to finish. Deleting stops well
/// before it.
const ABANDONED: Duration = Duration::from_secs(30);

/// How many fences are remembered; far more than are ever seen at once.
const MOST_FENCES: usize = 10_000;

pub(super) async fn delete(
    link: &Link,
    queue: &QueueName,
    mode: DeleteMode,
    deadline: Deadline,
) -> Result<Discarded> {
    link.alive()?;
    let names = Names::of(queue);
    let mut meant = None;
    loop {
        let there = link.stream(&names, deadline).await?.ok_or_else(no_queue)?;
        let made = there.description().map(|description| description.made);
        if *meant.get_or_insert_with(|| made.clone()) != made {
            // Another deleted it, and what stands there now came after.
            return Err(no_queue());
        }
        match (there.fence(), mode) {
            (None, _) => {}
            // Somebody else deletes it.
            (Some(_), _) if !is_abandoned(link, &there) => {
                deadline.bound(sleep(PAUSE)).await?;
                continue;
            }
            // What is left is discarded by this call, since no other says so.
            (Some(Fence::Deleting), DeleteMode::Discard) => {}
            (Some(_), _) => {
                finish(link, &names, &there, deadline).await?;
                continue;
            }
        }
        // Whoever takes longer stops, since somebody else may take its fence for abandoned then.
        let within = deadline.or_after(ABANDONED / 2);
        let done = match mode {
            DeleteMode::IfEmpty => if_empty(link, &names, &there, within).await?,
            DeleteMode::Discard => discard(link, &names, &there, within).await?,
        };
        if let Some(discarded) = done {
            attach::nudge(link, &names).await;
            return Ok(discarded);
        }
    }
}

/// `None`: another put up his fence instead.
async fn if_empty(
    link: &Link,
    names: &Names,
    there: &Stream,
    deadline: Deadline,
) -> Result<Option<Discarded>> {
    let not_empty = |stream: &Stream| {
        let (living, dead) = stream.counts(names);
        match living + dead {
            0 => Ok(()),
            messages => Err(Error::new(
                ErrorKind::NotEmpty { messages },
                format!("the queue holds {messages} messages; say that they may be discarded"),
            )),
        }
    };
    not_empty(there)?;
    let fence = update(link, names, there, Some(Fence::Closing), deadline).await?;
    barrier(link, names, deadline).await?;
    let Some(fenced) = behind(link, names, &fence, deadline).await? else {
        return Ok(None);
    };
    if let Err(error) = not_empty(&fenced) {
        update(link, names, &fenced, None, deadline).await?;
        return Err(error);
    }
    // Nothing comes in, so it stays empty. What was acked just now is told so before the queue goes.
    let fence = update(link, names, &fenced, Some(Fence::Deleting), deadline).await?;
    quiet(link, names, deadline).await?;
    let gone = drop_stream(link, names, &fence, deadline).await?;
    Ok(gone.then(Discarded::default))
}

/// `None`: another put up his fence instead, and tells what is discarded.
async fn discard(
    link: &Link,
    names: &Names,
    there: &Stream,
    deadline: Deadline,
) -> Result<Option<Discarded>> {
    let fence = update(link, names, there, Some(Fence::Deleting), deadline).await?;
    barrier(link, names, deadline).await?;
    quiet(link, names, deadline).await?;
    if behind(link, names, &fence, deadline).await?.is_none() {
        return Ok(None);
    }
    // No ack returns Ok from here on: what is read below is what was not acked.
    for consumer in consumers(link, names, deadline).await? {
        link.drop_consumer(names, &consumer, deadline).await?;
    }
    let Some(left) = behind(link, names, &fence, deadline).await? else {
        return Ok(None);
    };
    let (living, dead) = left.counts(names);
    let ids = ids(link, names, living, deadline).await?;
    let gone = drop_stream(link, names, &fence, deadline).await?;
    Ok(gone.then(|| Discarded::new(living + dead, ids)))
}

/// The stream, if this very fence stands there.
async fn behind(
    link: &Link,
    names: &Names,
    fence: &Description,
    deadline: Deadline,
) -> Result<Option<Stream>> {
    let there = link.stream(names, deadline).await?;
    Ok(there.filter(|there| there.description().as_ref() == Some(fence)))
}

/// Asks the attached consumer to settle nothing more, and waits until what it had on its way is settled or
/// refused. One that is gone, or hangs, is not waited for longer.
async fn quiet(link: &Link, names: &Names, deadline: Deadline) -> Result<()> {
    let patience = link.options.takeover.min(deadline.remaining() / 2);
    let question = Bytes::from_static(FINISH);
    let patience = deadline.or_after(patience);
    match link
        .call(&names.held(), None, &question, true, patience)
        .await
    {
        Err(error) if deadline.has_passed() => Err(error.into_error()),
        _ => Ok(()),
    }
}

/// The queue's consumers; data ones first, so that a live one is told that its queue went rather than
/// that another took over.
async fn consumers(link: &Link, names: &Names, deadline: Deadline) -> Result<Vec<String>> {
    let mut consumers = link.consumers(names, deadline).await?;
    consumers.sort();
    Ok(consumers)
}

/// Whether a stream's fence was left behind: this handle has seen it for that long.
pub(super) fn is_abandoned(link: &Link, there: &Stream) -> bool {
    let Some(description) = there.description() else {
        return false;
    };
    let fence = description.fenced_by.unwrap_or(description.made);
    let mut seen = lock(&link.fences);
    if seen.len() >= MOST_FENCES {
        seen.clear();
    }
    seen.entry(fence).or_insert_with(Instant::now).elapsed() > ABANDONED
}

/// Ends what somebody began and did not live to end: a deletion is carried out, a look is called off.
pub(super) async fn finish(
    link: &Link,
    names: &Names,
    there: &Stream,
    deadline: Deadline,
) -> Result<()> {
    let Some(description) = there.description() else {
        return Ok(());
    };
    match description.fence {
        Some(Fence::Deleting) => {
            let dropped = drop_stream(link, names, &description, deadline).await;
            dropped.map(drop)
        }
        Some(Fence::Closing) => update(link, names, there, None, deadline).await.map(drop),
        None => Ok(()),
    }
}

/// Changes a stream's fence, and tells what stands in its description then.
async fn update(
    link: &Link,
    names: &Names,
    there: &Stream,
    fence: Option<Fence>,
    deadline: Deadline,
) -> Result<Description> {
    let before = there.description().ok_or_else(no_queue)?;
    let after = Description {
        fence,
        fenced_by: fence.map(|_| token()),
        ..before.clone()
    };
    let replicas = there.config()["num_replicas"].as_u64().unwrap_or(1);
    let wanted = config(names, &after, replicas);
    let verb = format!("STREAM.UPDATE.{}", names.stream);
    loop {
        match link.api_once(&verb, &wanted, deadline).await {
            Ok(Ok(answer)) if answer["created"] == *there.created() => return Ok(after),
            Ok(Ok(_)) => {
                // It was deleted and made again since the look: the new one goes on, under the old one's
                // arguments, which the name implies (law Q3).
                let open = Description {
                    fence: None,
                    fenced_by: None,
                    ..before
                };
                let open = config(names, &open, replicas);
                let opened = link.api(&verb, &open, deadline).await?;
                return Err(opened.err().map_or_else(no_queue, Refusal::into_error));
            }
            Ok(Err(refusal)) => return Err(refusal.into_error()),
            Err(error) => look_again(error, deadline).await?,
        }
        let now = link.stream(names, deadline).await?;
        match now.and_then(|now| now.description()) {
            Some(now) if now == after => return Ok(after),
            Some(now) if now.made == after.made => {}
            _ => return Err(no_queue()),
        }
    }
}

/// What was sent once had no answer: the error, unless there is time to look what became of it.
async fn look_again(error: Unanswered, deadline: Deadline) -> Result<()> {
    let error = error.into_error();
    let passes = matches!(
        error.kind(),
        ErrorKind::BrokerUnreachable | ErrorKind::BrokerRefused | ErrorKind::DeadlineExceeded
    );
    if !passes || deadline.has_passed() {
        return Err(error);
    }
    deadline.bound(sleep(PAUSE)).await
}

/// Waits until every message that the server took in before is stored or refused: it goes through the
/// same door as they did, and is refused itself.
async fn barrier(link: &Link, names: &Names, deadline: Deadline) -> Result<()> {
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Nats-Expected-Last-Sequence", u64::MAX.to_string().as_str());
    link.call(&names.lock(), Some(&headers), &Bytes::new(), true, deadline)
        .await
        .map(drop)
        .map_err(Unanswered::into_error)
}

/// Deletes what is behind this fence. False: there is none, or another's.
async fn drop_stream(
    link: &Link,
    names: &Names,
    fence: &Description,
    deadline: Deadline,
) -> Result<bool> {
    let verb = format!("STREAM.DELETE.{}", names.stream);
    let mut sent = false;
    let gone = loop {
        let there = link.stream(names, deadline).await?;
        match there.and_then(|there| there.description()) {
            Some(there) if there == *fence => {}
            // Somebody else is at it still.
            Some(there) if there.made == fence.made => return Ok(false),
            _ => break sent,
        }
        match link.api_once(&verb, &json!({}), deadline).await {
            Ok(Ok(_)) => break true,
            Ok(Err(Refusal {
                code: STREAM_NOT_FOUND,
                ..
            })) => break sent,
            Ok(Err(refusal)) => return Err(refusal.into_error()),
            Err(error) => {
                sent |= matches!(error, Unanswered::Unknown(_));
                look_again(error, deadline).await?;
            }
        }
    };
    // A responder that was killed leaves its claim to time; with the queue it goes at once (law Q7).
    match link.purge(LANES, &names.claim(), deadline).await {
        Err(error) if !matches!(error.kind(), ErrorKind::BrokerRefused) => Err(error),
        _ => Ok(gone),
    }
}

/// The ids of the first messages that are not dead.
async fn ids(
    link: &Link,
    names: &Names,
    living: u64,
    deadline: Deadline,
) -> Result<Vec<MessageId>> {
    let mut ids = Vec::new();
    let mut from = 1;
    while (ids.len() as u64) < living && ids.len() < Discarded::MAX_IDS {
        let Some(stored) = link.stored(names, &names.input(), from, deadline).await? else {
            break;
        };
        from = stored.sequence + 1;
        ids.push(form::read(Some(&stored.headers), stored.body, stored.sequence).id);
    }
    Ok(ids)
}
