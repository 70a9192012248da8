//! What has to be known of a queue beside its messages: how it was made, and what the broker's count of
//! returns does not say.
//!
//! The register is a queue of its own. Its first message is the queue's arguments, for those who may
//! consume but not declare. A second one is there when some message's count needs a correction, or
//! waits for its retry's time. Whoever consumes holds both unacked; whoever else reads them takes the
//! queue's reading lock, and gives both back.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use lapin::{
    BasicProperties, Channel,
    options::{BasicAckOptions, BasicGetOptions, BasicNackOptions},
    types::FieldTable,
};
use serde::{Deserialize, Serialize};

use super::{
    barrier,
    connection::{AGAIN, Core},
    fault::Fault,
    letter::{self, KEY},
    post::{Answer, Letter},
};
use crate::{
    broker::QueueSpec,
    deadline::Deadline,
    error::{ErrorKind, Result},
    names::QueueName,
};

pub(super) fn notes_of(queue: &QueueName) -> String {
    format!("{queue}.notes")
}

/// The lock of those who read the register or the dead letters.
pub(super) fn reader_of(queue: &QueueName) -> String {
    format!("{queue}.reader")
}

/// What is noted of messages, by their keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Notes {
    /// Which of the versions it is: the highest counts.
    version: u64,
    /// How many of a message's returns were no delivery.
    pub(super) uncounted: HashMap<String, i64>,
    /// When a message is due again.
    pub(super) due: HashMap<String, Due>,
}

/// A moment on the wall clock, and the time that it was away when it was noted: no clock that is wrong
/// makes it longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Due {
    at_ms: u64,
    delay_ms: u64,
}

impl Due {
    pub(super) fn after(delay: Duration) -> Self {
        let delay_ms = u64::try_from(delay.as_micros().div_ceil(1000)).unwrap_or(u64::MAX / 4);
        let delay_ms = delay_ms.min(u64::MAX / 4);
        Self {
            at_ms: now_ms().saturating_add(delay_ms).saturating_add(1),
            delay_ms,
        }
    }

    pub(super) fn left(self) -> Duration {
        let left = self.at_ms.saturating_sub(now_ms());
        Duration::from_millis(left.min(self.delay_ms.saturating_add(1)))
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

impl Notes {
    pub(super) fn is_empty(&self) -> bool {
        self.uncounted.is_empty() && self.due.is_empty()
    }

    /// How many wait for their time.
    pub(super) fn waiting(&self) -> u64 {
        self.due
            .values()
            .filter(|due| !due.left().is_zero())
            .count() as u64
    }
}

/// The register, held on a channel.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) spec: QueueSpec,
    pub(super) notes: Notes,
    queue: String,
    tags: Vec<u64>,
}

/// Takes the register. To be called under the reading lock, and under the consumer's or while there is
/// none. `None`: it is not there, or somebody who consumes has it.
pub(super) async fn take(channel: &Channel, queue: &QueueName) -> Result<Option<Held>, Fault> {
    let name = notes_of(queue);
    let mut spec = None;
    let mut notes = Notes::default();
    let mut tags = Vec::new();
    let mut old = Vec::new();
    let mut newest = None;
    while let Some(entry) = channel
        .basic_get(name.as_str().into(), BasicGetOptions::default())
        .await?
    {
        let tag = entry.delivery.delivery_tag;
        if let Ok(read) = serde_json::from_slice::<QueueSpec>(&entry.delivery.data) {
            spec = Some(read);
            tags.push(tag);
        } else if let Ok(read) = serde_json::from_slice::<Notes>(&entry.delivery.data) {
            if read.version >= notes.version {
                notes = read;
                old.extend(newest.replace(tag));
            } else {
                old.push(tag);
            }
        } else {
            old.push(tag);
        }
    }
    for tag in old {
        channel.basic_ack(tag, BasicAckOptions::default()).await?;
    }
    tags.extend(newest);
    Ok(match spec {
        Some(spec) => Some(Held {
            spec,
            notes,
            queue: name,
            tags,
        }),
        None => {
            give_back(channel, &name, tags).await?;
            None
        }
    })
}

impl Held {
    /// Writes the notes as they are now.
    ///
    /// # Errors
    /// They may be written or not; what they were is there still.
    pub(super) async fn write(
        &mut self,
        core: &Core,
        channel: &Channel,
        deadline: Deadline,
    ) -> Result<(), Fault> {
        let nothing = self.notes.is_empty();
        if nothing && self.tags.len() <= 1 {
            return Ok(());
        }
        if !nothing {
            self.notes.version += 1;
            let body = serde_json::to_vec(&self.notes).unwrap_or_default();
            put(core, &self.queue, body, deadline).await?;
            // The new one is taken before the old one goes: a reader finds one or both, never none.
            while let Some(entry) = channel
                .basic_get(self.queue.as_str().into(), BasicGetOptions::default())
                .await?
            {
                self.tags.push(entry.delivery.delivery_tag);
            }
        }
        // The first is the queue's arguments; the newest, if there is one, stays.
        let keep = usize::from(!nothing);
        let end = self.tags.len() - keep;
        for tag in self.tags.drain(1..end) {
            channel.basic_ack(tag, BasicAckOptions::default()).await?;
        }
        Ok(())
    }

    /// Gives it back, and returns when others can read it.
    pub(super) async fn release(self, channel: &Channel) -> Result<(), Fault> {
        give_back(channel, &self.queue, self.tags).await
    }
}

async fn give_back(channel: &Channel, queue: &str, tags: Vec<u64>) -> Result<(), Fault> {
    let wanted = barrier::ready(channel, queue).await? + tags.len() as u64;
    for tag in tags {
        let options = BasicNackOptions {
            requeue: true,
            multiple: false,
        };
        channel.basic_nack(tag, options).await?;
    }
    barrier::until_ready(channel, queue, wanted).await
}

/// Writes the register of a new queue.
pub(super) async fn begin(core: &Core, spec: &QueueSpec, deadline: Deadline) -> Result<(), Fault> {
    let body = serde_json::to_vec(spec).unwrap_or_default();
    put(core, &notes_of(&spec.name), body, deadline).await
}

/// Stores an entry in a queue of our own, by its name.
pub(super) async fn put(
    core: &Core,
    queue: &str,
    body: Vec<u8>,
    deadline: Deadline,
) -> Result<(), Fault> {
    loop {
        let key = core.copy_name();
        let mut table = FieldTable::default();
        table.insert(KEY.into(), letter::text(&key));
        let letter = Letter {
            exchange: core.by_name(),
            to: queue.into(),
            mandatory: true,
            key,
            properties: BasicProperties::default()
                .with_delivery_mode(2)
                .with_headers(table),
            body: body.clone().into(),
        };
        match core.outbox.publish(letter, deadline).await {
            Answer::Stored => return Ok(()),
            Answer::Returned => return Err(super::no_queue().into()),
            Answer::Refused | Answer::Lost if !deadline.has_passed() => {
                tokio::time::sleep(AGAIN).await;
            }
            _ => return Err(core.post_obstacle().unwrap_or_else(super::late).into()),
        }
    }
}

/// What is noted of a queue that nobody consumes from. `None`: somebody does.
pub(super) async fn read(
    core: &Arc<Core>,
    wire: &super::link::Wire,
    queue: &QueueName,
) -> Result<Option<Notes>, Fault> {
    let reading = super::lockqueue::take(core, wire, reader_of(queue)).await?;
    let channel = wire.channel().await?;
    let held = take(&channel, queue).await;
    let notes = match held {
        Ok(Some(held)) => {
            let notes = held.notes.clone();
            held.release(&channel).await?;
            Some(notes)
        }
        Ok(None) => None,
        Err(fault) if fault.code() == Some(404) => {
            reading.release().await?;
            return Err(super::no_queue().into());
        }
        Err(fault) => return Err(fault),
    };
    channel.close(200, "done".into()).await?;
    reading.release().await?;
    Ok(notes)
}

/// Whether a fault says that the queue is gone.
pub(super) fn is_gone(fault: &Fault) -> bool {
    match fault {
        Fault::Amqp(404, _) => true,
        Fault::Final(error) => *error.kind() == ErrorKind::NoQueue,
        _ => false,
    }
}
