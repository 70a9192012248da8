//! Queues: made, looked at, deleted; and their dead letters.

use std::num::{NonZeroU32, NonZeroU64};

use redis::{Value, cmd};
use uuid::Uuid;

use super::{
    connection::Handle,
    failure::odd,
    form::{Entry, answer, text},
    no_queue,
    scripts::{self, PREFIX, key},
};
use crate::{
    broker::{DeadLetter, DeadLetterKey, Declared, DeleteMode, Discarded, QueueSpec, QueueStatus},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    message::MessageId,
    names::QueueName,
};

/// How many dead letters one script reads: others wait while it does.
const PAGE: u32 = 128;

pub(super) async fn declare(
    core: &Handle,
    spec: &QueueSpec,
    deadline: Deadline,
) -> Result<Declared> {
    core.open()?;
    let most = spec.max_messages.map_or(String::new(), |n| n.to_string());
    // Told by its epoch, a declare whose answer was lost finds its own queue.
    let epoch = Uuid::new_v4().simple().to_string();
    let mut call = scripts::on_queue(&scripts::DECLARE, &spec.name);
    call.arg(spec.delivery_limit.get()).arg(most).arg(&epoch);
    let (value, _) = core.main.change(&call, deadline).await?;
    let wrong = odd(&value);
    let (word, parts) = answer(value).ok_or(wrong)?;
    if word == "made" {
        return Ok(Declared::Created);
    }
    let mut texts = parts.map(|part| match part {
        Value::Array(list) => list.into_iter().filter_map(text).collect(),
        other => text(other).into_iter().collect::<Vec<_>>(),
    });
    let limit = texts.next().unwrap_or_default().concat();
    let most = texts.next().unwrap_or_default().concat();
    let mut differences = texts.next().unwrap_or_default();
    let mut there = QueueSpec::new(spec.name.clone());
    if let Ok(limit) = limit.parse::<NonZeroU32>() {
        there = there.with_delivery_limit(limit);
        there.max_messages = most.parse().ok();
        differences.extend(there.differences(spec));
    }
    if texts
        .next()
        .is_some_and(|made_by| made_by.concat() == epoch)
    {
        return Ok(Declared::Created);
    }
    if differences.is_empty() {
        Ok(Declared::AlreadyExists)
    } else {
        Err(Error::new(
            ErrorKind::Mismatch { differences },
            "the queue exists with other arguments; nothing was changed",
        ))
    }
}

pub(super) async fn status(
    core: &Handle,
    queue: &QueueName,
    deadline: Deadline,
) -> Result<QueueStatus> {
    core.open()?;
    let call = scripts::on_queue(&scripts::STATUS, queue);
    let value = core.main.call(&call, deadline).await?;
    read_status(queue, value)?.ok_or_else(no_queue)
}

/// None: there is no such queue.
fn read_status(queue: &QueueName, value: Value) -> Result<Option<QueueStatus>> {
    let wrong = odd(&value);
    let Value::Array(numbers) = value else {
        return Err(wrong);
    };
    let numbers: Vec<u64> = numbers
        .into_iter()
        .filter_map(|number| match number {
            Value::Int(number) => u64::try_from(number).ok(),
            _ => None,
        })
        .collect();
    match numbers[..] {
        [] => Ok(None),
        [waiting, delayed, in_flight, dead, consumers] => {
            let mut status = QueueStatus::new(queue.clone());
            status.ready = waiting.saturating_sub(delayed + in_flight);
            status.delayed = delayed;
            status.in_flight = in_flight;
            status.dead = dead;
            status.consumers = u32::try_from(consumers).unwrap_or(u32::MAX);
            Ok(Some(status))
        }
        _ => Err(wrong),
    }
}

/// Every key of the database is looked at: what a list of our own could say wrongly after a crash, a
/// scan cannot, and nothing of a deleted queue stays anywhere (Q7).
pub(super) async fn list(core: &Handle, deadline: Deadline) -> Result<Vec<QueueStatus>> {
    core.open()?;
    let mut queues = std::collections::BTreeSet::new();
    let mut cursor = "0".to_owned();
    loop {
        let mut scan = cmd("SCAN");
        scan.arg(&cursor)
            .arg("MATCH")
            .arg(format!("{PREFIX}*}}:meta"))
            .arg("COUNT")
            .arg(1000);
        let value = core.main.call(&scan, deadline).await?;
        let wrong = odd(&value);
        let (next, mut parts) = answer(value).ok_or(wrong)?;
        if let Some(Value::Array(keys)) = parts.next() {
            let names = keys.into_iter().filter_map(text).filter_map(|key| {
                let name = key.strip_prefix(PREFIX)?.strip_suffix("}:meta")?;
                name.parse::<QueueName>().ok()
            });
            queues.extend(names);
        }
        if next == "0" {
            break;
        }
        cursor = next;
    }
    let mut listed = Vec::with_capacity(queues.len());
    for chunk in queues.into_iter().collect::<Vec<_>>().chunks(64) {
        let looks = chunk.iter().map(|queue| async move {
            let call = scripts::on_queue(&scripts::STATUS, queue);
            let value = core.main.call(&call, deadline).await?;
            read_status(queue, value)
        });
        for status in futures_util::future::join_all(looks).await {
            // One that was deleted since is not there.
            listed.extend(status?);
        }
    }
    Ok(listed)
}

pub(super) async fn delete(
    core: &Handle,
    queue: &QueueName,
    mode: DeleteMode,
    deadline: Deadline,
) -> Result<Discarded> {
    core.open()?;
    let mut call = scripts::on_queue(&scripts::DELETE, queue);
    call.arg(u8::from(mode == DeleteMode::Discard))
        .arg(Discarded::MAX_IDS)
        .arg("PUBLISH");
    let (value, again) = core.main.change(&call, deadline).await?;
    let wrong = odd(&value);
    let (word, mut parts) = answer(value).ok_or(wrong)?;
    let messages = match parts.next() {
        Some(Value::Int(messages)) => u64::try_from(messages).unwrap_or(0),
        _ => 0,
    };
    match word.as_str() {
        "none" if again => Err(unsure(
            "the queue is not there; it may have been deleted just now",
        )),
        "none" => Err(no_queue()),
        "full" => Err(Error::new(
            ErrorKind::NotEmpty { messages },
            format!("the queue holds {messages} messages, and was not to be discarded with them"),
        )),
        _ => {
            let ids = match parts.next() {
                Some(Value::Array(ids)) => ids,
                _ => Vec::new(),
            };
            let ids = ids
                .into_iter()
                .filter_map(text)
                .map(MessageId::new)
                .collect::<Result<_>>()?;
            Ok(Discarded::new(messages, ids))
        }
    }
}

pub(super) async fn dead_letters(
    core: &Handle,
    queue: &QueueName,
    after: Option<&DeadLetterKey>,
    limit: NonZeroU32,
    deadline: Deadline,
) -> Result<Vec<DeadLetter>> {
    core.open()?;
    let mut from = match after {
        None => "-".to_owned(),
        Some(key) if is_entry(&key.0) => format!("({}", key.0),
        Some(key) => {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{:?} is not a dead letter's key", key.0),
            ));
        }
    };
    let keys = [key(queue, "meta"), key(queue, "dead")];
    let (mut letters, mut left) = (Vec::new(), limit.get());
    while left > 0 {
        let page = left.min(PAGE);
        let mut call = scripts::on_keys(&scripts::DEAD, &keys);
        call.arg(&from).arg(page);
        let value = core.main.call(&call, deadline).await?;
        let wrong = odd(&value);
        let (word, mut parts) = answer(value).ok_or(wrong)?;
        if word == "none" {
            return Err(no_queue());
        }
        let Some(Value::Array(entries)) = parts.next() else {
            break;
        };
        let came = entries.len();
        for entry in entries.into_iter().filter_map(Entry::read) {
            from = format!("({}", entry.id);
            let shown = entry
                .message
                .or_else(|other| other.shown(&entry.id).ok_or(()));
            let Ok(message) = shown else { continue };
            let key = DeadLetterKey(entry.id);
            let reason = entry.reason.unwrap_or_default();
            letters.push(DeadLetter::new(
                key,
                message,
                reason,
                entry.attempts.unwrap_or(0),
            ));
            left = left.saturating_sub(1);
        }
        if came < page as usize {
            break;
        }
    }
    Ok(letters)
}

/// Whether this is an entry's id: two numbers and a dash between.
fn is_entry(key: &str) -> bool {
    key.split_once('-')
        .is_some_and(|(ms, seq)| ms.parse::<NonZeroU64>().is_ok() && seq.parse::<u64>().is_ok())
}

pub(super) async fn redrive(
    core: &Handle,
    queue: &QueueName,
    key: &DeadLetterKey,
    deadline: Deadline,
) -> Result<bool> {
    core.open()?;
    let entry = if is_entry(&key.0) { &key.0[..] } else { "" };
    let mut call = scripts::on_queue(&scripts::REDRIVE, queue);
    call.arg(entry).arg("PUBLISH");
    let (value, again) = core.main.change(&call, deadline).await?;
    let wrong = odd(&value);
    let (word, _) = answer(value).ok_or(wrong)?;
    match word.as_str() {
        "none" => Err(no_queue()),
        "yes" => Ok(true),
        "full" => Err(Error::new(
            ErrorKind::BrokerRefused,
            "the queue is full; the dead letter stays where it is",
        )),
        "twice" => Err(Error::new(
            ErrorKind::Conflict,
            "the queue holds a message of the same id already; the dead letter stays where it is",
        )),
        "foreign" => Err(Error::new(
            ErrorKind::Undecodable,
            "what has no id was not written by wilco, and cannot go back; the dead letter stays where it is",
        )),
        _ if again => Err(unsure(
            "the dead letter is not there; it may have been moved just now",
        )),
        _ => Ok(false),
    }
}

/// The answer of a first try was lost with its connection, and a second one cannot tell.
fn unsure(what: &str) -> Error {
    Error::new(
        ErrorKind::BrokerUnreachable,
        format!("the connection broke before the answer came: {what}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_letters_key_is_an_entrys_id() {
        for good in ["1-0", "1795546382689-12"] {
            assert!(is_entry(good), "{good:?}");
        }
        for bad in ["", "1", "-", "0-0", "1-", "no such key", "1-0-0", "(1-0"] {
            assert!(!is_entry(bad), "{bad:?}");
        }
    }
}
