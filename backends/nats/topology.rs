//! Queues: one stream each, made in one step, so that a queue is there whole or not at all, and looked at.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::{
    api::{Description, Refusal, STREAM_EXISTS, SUBJECTS_OVERLAP, Stream},
    connection::{Link, Unanswered},
    delete,
    hold::Told,
    names::{LANES, Names, token},
    notes::Notes,
};
use crate::{
    broker::{Declared, QueueSpec, QueueStatus},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    names::QueueName,
};

/// How long the server knows an id: wider than any deadline of a publish that is sent again.
const DUPLICATES: Duration = Duration::from_secs(10 * 60);

/// How often a queue that is being made or deleted is looked at again.
const PAUSE: Duration = Duration::from_millis(10);

/// How long a status waits for a consumer that is attached and says nothing.
const SILENCE: Duration = Duration::from_millis(250);
const QUESTIONS: u32 = 3;

/// The configuration of a queue's stream.
pub(super) fn config(names: &Names, description: &Description, replicas: u64) -> Value {
    let mut config = json!({
        "name": names.stream,
        "description": serde_json::to_string(description).unwrap_or_default(),
        "subjects": names.subjects(description.fence.is_some()),
        "retention": "workqueue",
        "storage": "file",
        // Refuse the new one at a limit, never drop the oldest (law Q12).
        "discard": "new",
        "max_msgs": -1,
        "max_bytes": -1,
        "max_age": 0,
        "max_consumers": 16,
        "max_msgs_per_subject": -1,
        "num_replicas": replicas,
        "duplicate_window": u64::try_from(DUPLICATES.as_nanos()).unwrap_or(u64::MAX),
    });
    if let Some(most) = description.max_messages {
        // By subject, so that neither dead letters nor notes count.
        config["max_msgs_per_subject"] = most.into();
        config["discard_new_per_subject"] = true.into();
    }
    config
}

pub(super) async fn declare(link: &Link, spec: &QueueSpec, deadline: Deadline) -> Result<Declared> {
    link.alive()?;
    if spec.max_messages == Some(0) {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "NATS has no queue for no messages: max_messages is at least 1",
        ));
    }
    let names = Names::of(&spec.name);
    let description = Description {
        wilco: 1,
        delivery_limit: spec.delivery_limit,
        max_messages: spec.max_messages,
        made: token(),
        fence: None,
        fenced_by: None,
    };
    let wanted = config(
        &names,
        &description,
        link.options.replicas.unwrap_or(1).into(),
    );
    let verb = format!("STREAM.CREATE.{}", names.stream);
    loop {
        let overlap = match link.api(&verb, &wanted, deadline).await? {
            Ok(_) => return Ok(Declared::Created),
            Err(refusal) if refusal.code == STREAM_EXISTS => false,
            Err(refusal) if refusal.code == SUBJECTS_OVERLAP => true,
            Err(refusal) => return Err(refusal.into_error()),
        };
        let Some(there) = link.stream(&names, deadline).await? else {
            // The subjects are of a stream that is being made, which is this very queue's unless the
            // server names another.
            if overlap && let Some(other) = owner(link, &names, &wanted, deadline).await? {
                return Err(mismatch(vec![format!(
                    "subjects of this queue belong to another stream, {other}"
                )]));
            }
            deadline.bound(sleep(PAUSE)).await?;
            continue;
        };
        match there.fence() {
            None => {
                let differences = differences(&there, spec, &wanted, link.options.replicas)?;
                if differences.is_empty() {
                    return Ok(Declared::AlreadyExists);
                }
                return Err(mismatch(differences));
            }
            Some(_) if delete::is_abandoned(link, &there) => {
                delete::finish(link, &names, &there, deadline).await?;
            }
            Some(_) => deadline.bound(sleep(PAUSE)).await?,
        }
    }
}

/// Another stream to which the server gives messages of this queue's subjects.
async fn owner(
    link: &Link,
    names: &Names,
    wanted: &Value,
    deadline: Deadline,
) -> Result<Option<String>> {
    for subject in wanted["subjects"].as_array().into_iter().flatten() {
        let found = link
            .api("STREAM.NAMES", &json!({ "subject": subject }), deadline)
            .await?
            .map_err(Refusal::into_error)?;
        let mut streams = found["streams"].as_array().into_iter().flatten();
        let other = streams.find_map(|name| name.as_str().filter(|name| *name != names.stream));
        if let Some(other) = other {
            return Ok(Some(other.to_owned()));
        }
    }
    Ok(None)
}

fn mismatch(differences: Vec<String>) -> Error {
    Error::new(
        ErrorKind::Mismatch { differences },
        "the queue exists with other arguments",
    )
}

/// What a stream has otherwise than asked, and what in it would lose messages (law Q3).
fn differences(
    there: &Stream,
    spec: &QueueSpec,
    wanted: &Value,
    replicas: Option<u8>,
) -> Result<Vec<String>> {
    let Ok(have) = there.spec(&spec.name) else {
        return Ok(vec!["the stream of this name is not one of wilco's".into()]);
    };
    let mut differences = have.differences(spec);
    let mut compared = vec![
        "retention",
        "storage",
        "discard",
        "max_msgs",
        "max_bytes",
        "max_age",
        "max_consumers",
        "duplicate_window",
        "subjects",
    ];
    if have.max_messages == spec.max_messages {
        compared.push("max_msgs_per_subject");
    }
    if replicas.is_some() {
        compared.push("num_replicas");
    }
    for name in compared {
        let (have, want) = (&there.config()[name], &wanted[name]);
        if have != want {
            differences.push(format!("{name} is {have}, wilco needs {want}"));
        }
    }
    for name in ["no_ack", "sealed"] {
        if there.config()[name] == true {
            differences.push(format!("{name} is true, wilco needs false"));
        }
    }
    if there.config()["persist_mode"] == "async" {
        differences.push("persist_mode is async, which confirms before it stores".into());
    }
    Ok(differences)
}

pub(super) async fn status(
    link: &Link,
    queue: &QueueName,
    deadline: Deadline,
) -> Result<QueueStatus> {
    link.alive()?;
    let names = Names::of(queue);
    let (stream, held) = tokio::join!(link.queue(&names, deadline), ask(link, &names, deadline));
    let stream = stream?;
    let (living, dead) = stream.counts(&names);
    let mut status = QueueStatus::new(queue.clone());
    status.dead = dead;
    let made = stream.description().map(|description| description.made);
    match held? {
        // One whose queue was deleted and made again, and who does not know it yet, speaks of another.
        Some(told) if made.as_ref().is_none_or(|made| told.is_of(made)) => {
            status.consumers = u32::from(told.attached);
            status.in_flight = told.in_flight.min(living);
            status.delayed = told.delayed.min(living - status.in_flight);
        }
        _ if living > 0 => {
            let notes =
                Notes::read(link, &names, made.as_deref().unwrap_or_default(), deadline).await?;
            status.delayed = notes.delayed().min(living);
        }
        _ => {}
    }
    status.ready = living - status.in_flight - status.delayed;
    Ok(status)
}

/// What the attached consumer says that it holds; `None`: there is none.
async fn ask(link: &Link, names: &Names, deadline: Deadline) -> Result<Option<Told>> {
    let mut left = QUESTIONS;
    loop {
        let patience = deadline.or_after(SILENCE);
        let answer = link
            .call(&names.held(), None, &Bytes::new(), true, patience)
            .await;
        left -= 1;
        match answer {
            Ok(answer) if answer.nobody() => return Ok(None),
            Ok(answer) => return Ok(serde_json::from_slice(&answer.message.payload).ok()),
            // The question may have come as it went: asked again.
            Err(Unanswered::Unknown(_)) if !deadline.has_passed() && left > 0 => {}
            // Attached, for all that the server knows, and silent.
            Err(Unanswered::Unknown(_)) if !deadline.has_passed() && link.is_connected() => {
                return Ok(Some(Told::silent()));
            }
            Err(error) => return Err(error.into_error()),
        }
    }
}

/// Every stream of wilco's, looked at one by one: right for what a person looks at, slow for very many.
pub(super) async fn list(link: &Link, deadline: Deadline) -> Result<Vec<QueueStatus>> {
    const AT_ONCE: usize = 32;
    link.alive()?;
    let mut queues = Vec::new();
    loop {
        let body = json!({ "subject": "wilco.>", "offset": queues.len() });
        let page = link
            .api("STREAM.NAMES", &body, deadline)
            .await?
            .map_err(Refusal::into_error)?;
        let page: Vec<_> = page["streams"]
            .as_array()
            .into_iter()
            .flatten()
            .cloned()
            .collect();
        if page.is_empty() {
            break;
        }
        queues.extend(page);
        if queues.len() as u64 >= 1_000_000 {
            break;
        }
    }
    let queues: Vec<_> = queues
        .iter()
        .filter_map(Value::as_str)
        .filter(|name| *name != LANES)
        .filter_map(Names::queue)
        .collect();
    let looks =
        stream::iter(queues).map(|queue| async move { status(link, &queue, deadline).await });
    let looked: Vec<_> = looks.buffer_unordered(AT_ONCE).collect().await;
    let mut all = Vec::new();
    for status in looked {
        match status {
            Ok(status) => all.push(status),
            // It went meanwhile.
            Err(error) if *error.kind() == ErrorKind::NoQueue => {}
            Err(error) => return Err(error),
        }
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}
