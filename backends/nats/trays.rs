//! What guests with credentials left in their trays goes to the queue of reports, for as long as that has
//! its consumer here. All trays are subjects of one stream, from which each control plane takes its own.

use std::{sync::Weak, time::Duration};

use async_nats::{HeaderMap, Message};
use bytes::Bytes;
use futures_util::StreamExt;
use serde_json::json;
use tokio::time::{sleep, timeout};

use super::{
    api::{NOT_UNIQUE, Refusal, STREAM_EXISTS},
    connection::{Link, Unanswered, gone},
    form,
    hold::Hold,
    names::{Names, TRAYS},
    publish, requests, settle, unreadable,
};
use crate::{
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    names::QueueName,
};

/// How long until what failed is tried again, and until it is looked whether there are trays by now.
const AGAIN: Duration = Duration::from_secs(1);

/// How long the server keeps a pull that has nothing to give, and what one brings at the most.
const PULL: Duration = Duration::from_secs(5);
const BATCH: usize = 64;

/// How long a report that was taken and not moved stays away.
const WAIT: Duration = Duration::from_secs(10);

/// Makes the stream of trays.
pub(super) async fn make_stream(link: &Link, deadline: Deadline) -> Result<()> {
    let config = json!({
        "name": TRAYS,
        "description": "what wilco's guests report, until their control planes take it",
        "subjects": ["wilco.tray.>"],
        "retention": "workqueue",
        "storage": "file",
        "discard": "new",
        "max_msgs": -1,
        "max_bytes": -1,
        "max_age": 0,
        "num_replicas": link.options.replicas.unwrap_or(1),
    });
    let made = link
        .api(&format!("STREAM.CREATE.{TRAYS}"), &config, deadline)
        .await?;
    match made {
        Err(refusal) if refusal.code != STREAM_EXISTS => Err(refusal.into_error()),
        _ => Ok(()),
    }
}

/// Works until the consumer is gone.
pub(super) async fn collect(hold: Weak<Hold>, reports: QueueName) {
    let names = Names::of(&reports);
    while let Some(here) = hold.upgrade() {
        if !here.is_attached() {
            return;
        }
        let link = std::sync::Arc::clone(&here.link);
        drop(here);
        if let Err(error) = some(&hold, &link, &names).await
            && *error.kind() != ErrorKind::NoQueue
        {
            tracing::warn!(%error, "reports stay where guests left them; looking again");
        }
        sleep(AGAIN).await;
    }
}

/// Moves what comes until something goes wrong; no queue: there are no trays yet.
async fn some(hold: &Weak<Hold>, link: &Link, names: &Names) -> Result<()> {
    let consumer = format!("collect-{}", names.stream);
    let filter = names.trays();
    let deadline = Deadline::after(link.options.takeover);
    let verb = format!("CONSUMER.CREATE.{TRAYS}.{consumer}.{filter}");
    let body = json!({
        "stream_name": TRAYS,
        "config": {
            "name": consumer,
            "durable_name": consumer,
            "filter_subject": filter,
            "deliver_policy": "all",
            "ack_policy": "explicit",
            "ack_wait": WAIT.as_nanos(),
            "max_deliver": -1,
        }
    });
    match link.api(&verb, &body, deadline).await? {
        Err(refusal) if !NOT_UNIQUE.contains(&refusal.code) => return Err(refusal.into_error()),
        _ => {}
    }
    // It lives in the server's memory, and guests may not make it.
    requests::make_stream(link, deadline).await?;
    let generation = link.state().borrow().generation;
    move_unreadable(link, names, deadline).await?;
    let inbox = link.client.new_inbox();
    let mut arrivals = link.client.subscribe(inbox.clone()).await.map_err(gone)?;
    while hold.upgrade().is_some_and(|hold| hold.is_attached())
        && link.state().borrow().generation == generation
    {
        let body = format!("{{\"batch\":{BATCH},\"expires\":{}}}", PULL.as_nanos());
        let pull = format!("$JS.API.CONSUMER.MSG.NEXT.{TRAYS}.{consumer}");
        link.client
            .publish_with_reply(pull, inbox.clone(), body.into())
            .await
            .map_err(gone)?;
        let mut left = BATCH;
        while left > 0 {
            let Ok(Some(message)) = timeout(PULL + AGAIN, arrivals.next()).await else {
                return Ok(());
            };
            // A report may have a status of its guest's making, and where it is acknowledged.
            let status = message.status.filter(|_| message.reply.is_none());
            match status.map(|status| status.as_u16()) {
                None => {
                    take(link, names, &message).await?;
                    left -= 1;
                }
                // Nothing more came in time.
                Some(404 | 408) => break,
                Some(100) => {}
                Some(status) => {
                    let text = format!("a pull of reports ended with {status}");
                    return Err(Error::new(ErrorKind::BrokerRefused, text));
                }
            }
        }
    }
    Ok(())
}

/// Moves one report.
async fn take(link: &Link, names: &Names, message: &Message) -> Result<()> {
    let Some(reply) = &message.reply else {
        return Ok(());
    };
    let deadline = Deadline::after(link.options.takeover);
    let headers = message.headers.as_ref();
    let moved = store(
        link,
        names,
        &message.subject,
        headers,
        &message.payload,
        deadline,
    );
    let what = if moved.await? { "+ACK" } else { "+TERM" };
    settle::tell(link, reply, what.into(), deadline).await
}

/// Moves those that the client cannot be given, which would end its connection again and again.
async fn move_unreadable(link: &Link, names: &Names, deadline: Deadline) -> Result<()> {
    for report in unreadable::first(link, TRAYS, &names.trays(), BATCH, deadline).await? {
        let (subject, headers) = (&report.subject, Some(&report.headers));
        tracing::warn!(%subject, "a report has headers that are none of NATS's");
        store(link, names, subject, headers, &report.body, deadline).await?;
        link.forget_in(TRAYS, report.sequence, deadline).await?;
    }
    Ok(())
}

/// Stores a report among the others; from whom it is, its subject says. False: it is no report.
async fn store(
    link: &Link,
    names: &Names,
    subject: &str,
    headers: Option<&HeaderMap>,
    body: &Bytes,
    deadline: Deadline,
) -> Result<bool> {
    let Some(from) = names.whose_tray(subject) else {
        return Ok(false);
    };
    let headers = form::sent_by(headers, &from);
    let bytes = |(name, values): (&async_nats::HeaderName, &Vec<async_nats::HeaderValue>)| {
        let name: &str = name.as_ref();
        name.len()
            + values
                .iter()
                .map(|value| value.as_str().len() + 4)
                .sum::<usize>()
    };
    let heads: usize = headers.iter().map(bytes).sum();
    // The server would end the connection over one that is too large.
    if heads > form::MAX_HEADER_BYTES || body.len() as u64 > publish::largest_body(link) {
        tracing::warn!(%subject, "a report is larger than any can be, and is dropped");
        return Ok(false);
    }
    let answer = link
        .call(&names.input(), Some(&headers), body, true, deadline)
        .await
        .map_err(Unanswered::into_error)?;
    if answer.nobody() {
        return Err(super::no_queue());
    }
    match Refusal::of(&super::api::json_of(&answer)?) {
        // It comes again, and has the same id.
        Some(refusal) => Err(refusal.into_error()),
        None => Ok(true),
    }
}
