//! Dead letters: a queue of their own beside each queue. Their copies say why they are there, and after
//! how many deliveries.

use std::{
    collections::{BTreeSet, HashSet},
    num::NonZeroU32,
    sync::Arc,
};

use super::{
    connection::Core, fault::Fault, letter, letter::Death, lockqueue, no_queue, notes,
    post::Letter, publish, shelf, topology,
};
use crate::{
    broker::{DeadLetter, DeadLetterKey},
    deadline::Deadline,
    error::Result,
    message::Message,
    names::QueueName,
};

pub(super) fn dead_of(queue: &QueueName) -> String {
    format!("{queue}.dead")
}

/// The copy that is stored among the dead letters. It keeps the key of the copy that died, so that one
/// that is stored twice, before and after a crash, is known to be one.
pub(super) fn letter(
    core: &Core,
    queue: &QueueName,
    message: &Message,
    key: &str,
    death: &Death,
) -> Letter {
    Letter {
        exchange: core.by_name(),
        to: dead_of(queue),
        mandatory: true,
        key: key.into(),
        properties: letter::properties(message, key, Some(death)),
        body: message.body.clone(),
    }
}

pub(super) async fn dead_letters(
    core: &Arc<Core>,
    queue: &QueueName,
    after: Option<&DeadLetterKey>,
    limit: NonZeroU32,
    deadline: Deadline,
) -> Result<Vec<DeadLetter>> {
    let (queue, after) = (queue.clone(), after.cloned());
    let limit = usize::try_from(limit.get()).unwrap_or(usize::MAX);
    core.run(deadline, move |core, wire| {
        let (queue, after) = (queue.clone(), after.clone());
        async move {
            let there = topology::counts(&wire, &queue).await?;
            let dead = there.ok_or_else(|| Fault::from(no_queue()))?.dead;
            if dead == 0 && !is_read(&core, &queue, deadline).await? {
                return Ok(Vec::new());
            }
            let reading = lockqueue::take(&core, &wire, notes::reader_of(&queue)).await?;
            let shelf = shelf::open(&wire, &dead_of(&queue), usize::MAX)
                .await?
                .ok_or_else(|| Fault::from(no_queue()))?;
            let mut seen = HashSet::new();
            let mut letters = Vec::new();
            let mut begun = after.is_none();
            let mut entries = Vec::with_capacity(shelf.entries.len());
            for (place, entry) in shelf.entries.iter().enumerate() {
                entries.push((letter::died(&entry.properties), place, entry));
            }
            entries.sort_by_key(|(died, place, _)| (*died, *place));
            for (_, _, entry) in entries {
                let key = letter::key(&entry.properties);
                if !seen.insert(key.clone()) {
                    continue;
                }
                if !begun {
                    begun = after.as_ref().is_some_and(|after| after.0 == key);
                } else if letters.len() < limit {
                    let death = letter::death(&entry.properties);
                    let message = letter::message(&entry.properties, entry.data.clone());
                    letters.push(DeadLetter::new(
                        DeadLetterKey(key),
                        message,
                        death.reason,
                        death.attempts,
                    ));
                }
            }
            shelf.close(&BTreeSet::new()).await?;
            reading.release().await?;
            Ok(letters)
        }
    })
    .await
}

/// Whether somebody holds what a count does not show.
async fn is_read(core: &Core, queue: &QueueName, deadline: Deadline) -> Result<bool, Fault> {
    Ok(super::ask::is_attended(core, &notes::reader_of(queue), deadline).await?)
}

pub(super) async fn redrive(
    core: &Arc<Core>,
    queue: &QueueName,
    key: &DeadLetterKey,
    deadline: Deadline,
) -> Result<bool> {
    let (queue, key) = (queue.clone(), key.clone());
    core.run(deadline, move |core, wire| {
        let (queue, key) = (queue.clone(), key.clone());
        async move {
            if topology::counts(&wire, &queue).await?.is_none() {
                return Err(no_queue().into());
            }
            let reading = lockqueue::take(&core, &wire, notes::reader_of(&queue)).await?;
            let shelf = shelf::open(&wire, &dead_of(&queue), usize::MAX)
                .await?
                .ok_or_else(|| Fault::from(no_queue()))?;
            let mut remove = BTreeSet::new();
            let mut message = None;
            for entry in &shelf.entries {
                if letter::key(&entry.properties) == key.0 {
                    remove.insert(entry.delivery_tag);
                    message.get_or_insert_with(|| {
                        letter::message(&entry.properties, entry.data.clone())
                    });
                }
            }
            let moved = match message {
                None => Ok(false),
                // Stored there before it goes here: it is never in neither.
                Some(message) => publish::store(&core, &queue, &message, deadline)
                    .await
                    .map(|()| true),
            };
            if moved.is_err() {
                remove.clear();
            }
            shelf.close(&remove).await?;
            reading.release().await?;
            Ok(moved.map_err(crate::error::Error::without_outcome)?)
        }
    })
    .await
}
