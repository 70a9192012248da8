//! Dead letters: read, and sent back.

use std::num::NonZeroU32;

use async_nats::HeaderMap;
use serde_json::Value;

use super::{
    api::{Refusal, WRONG_LAST_SEQUENCE, json_of},
    connection::{Link, Unanswered},
    form,
    names::Names,
    no_queue, settle,
};
use crate::{
    broker::{DeadLetter, DeadLetterKey},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    message::Message,
    names::QueueName,
};

/// A letter's key is its sequence in the stream.
fn sequence(key: &DeadLetterKey) -> Option<u64> {
    key.0.parse().ok()
}

pub(super) async fn dead_letters(
    link: &Link,
    queue: &QueueName,
    after: Option<&DeadLetterKey>,
    limit: NonZeroU32,
    deadline: Deadline,
) -> Result<Vec<DeadLetter>> {
    link.alive()?;
    let names = Names::of(queue);
    link.queue(&names, deadline).await?;
    let mut letters = Vec::new();
    let mut from = after.and_then(sequence).map_or(1, |sequence| sequence + 1);
    while letters.len() < usize::try_from(limit.get()).unwrap_or(usize::MAX) {
        let Some(stored) = link
            .stored(&names, &names.all_dead(), from, deadline)
            .await?
        else {
            break;
        };
        from = stored.sequence + 1;
        letters.push(form::read_dead(
            &stored.headers,
            stored.body,
            stored.sequence,
        ));
    }
    Ok(letters)
}

/// Stores the dead letter of the message at this place, if it is not there already.
pub(super) async fn store(
    link: &Link,
    names: &Names,
    sequence: u64,
    message: &Message,
    reason: &str,
    attempts: u32,
    deadline: Deadline,
) -> Result<()> {
    let mut headers = form::dead_headers(message, reason, attempts);
    headers.insert("Nats-Expected-Last-Subject-Sequence", "0");
    let answer = link
        .call(
            &names.dead(sequence),
            Some(&headers),
            &message.body,
            true,
            deadline,
        )
        .await
        .map_err(Unanswered::into_error)?;
    if answer.nobody() {
        return Err(settle::lost());
    }
    match Refusal::of(&json_of(&answer)?) {
        Some(refusal) if !WRONG_LAST_SEQUENCE.contains(&refusal.code) => Err(refusal.into_error()),
        _ => Ok(()),
    }
}

/// Stores the message at the end of the queue, then takes the letter away. Both ids are the letter's: sent
/// back twice it is stored once, and of two who take it away one does. Whoever receives the message takes
/// away a letter that is still there.
///
/// The whole queue is looked through for a message of the same id: the server finds one by its place only.
pub(super) async fn redrive(
    link: &Link,
    queue: &QueueName,
    key: &DeadLetterKey,
    deadline: Deadline,
) -> Result<bool> {
    link.alive()?;
    let names = Names::of(queue);
    link.queue(&names, deadline).await?;
    let Some(sequence) = sequence(key) else {
        return Ok(false);
    };
    let stored = link
        .stored(&names, &names.all_dead(), sequence, deadline)
        .await?;
    let Some(stored) = stored.filter(|stored| stored.sequence == sequence) else {
        return Ok(false);
    };
    let letter = form::read_dead(&stored.headers, stored.body, sequence);
    match twin(link, &names, &letter, sequence, deadline).await? {
        None => {}
        // It was sent back before, by one that did not take the letter away.
        Some(Twin::Itself) => return link.forget(&names, sequence, deadline).await,
        Some(Twin::Other) => {
            return Err(Error::new(
                ErrorKind::Conflict,
                format!(
                    "a message with the id {} is in the queue",
                    letter.message.id
                ),
            ));
        }
    }
    let once = format!("redrive-{sequence}");
    let headers: HeaderMap = form::redriven_headers(&letter.message, sequence, &once);
    let answer = link
        .call(
            &names.input(),
            Some(&headers),
            &letter.message.body,
            true,
            deadline,
        )
        .await
        .map_err(Unanswered::into_error)?;
    if answer.nobody() {
        return Err(no_queue());
    }
    let value: Value = json_of(&answer)?;
    if let Some(refusal) = Refusal::of(&value) {
        return Err(refusal.into_error());
    }
    link.forget(&names, sequence, deadline).await
}

/// A message in the queue of the same id as a dead letter.
enum Twin {
    /// This very letter, sent back.
    Itself,
    Other,
}

async fn twin(
    link: &Link,
    names: &Names,
    letter: &DeadLetter,
    sequence: u64,
    deadline: Deadline,
) -> Result<Option<Twin>> {
    let mut from = 1;
    while let Some(stored) = link.stored(names, &names.input(), from, deadline).await? {
        from = stored.sequence + 1;
        let sent_back = form::was_letter(Some(&stored.headers)) == Some(sequence);
        if form::read(Some(&stored.headers), stored.body, stored.sequence).id == letter.message.id {
            return Ok(Some(if sent_back { Twin::Itself } else { Twin::Other }));
        }
    }
    Ok(None)
}
