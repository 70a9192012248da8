//! The names of all queues: AMQP has no way to ask for them. A queue of our own has one entry for each;
//! an entry is there before its queue is, and goes after it, so that none is missing.

use std::{collections::BTreeSet, sync::Arc};

use lapin::{
    options::QueueDeclareOptions,
    types::{AMQPValue, FieldTable},
};

use super::{
    connection::Core, fault::Fault, letter::text, link::Wire, lockqueue, notes::put, shelf,
};
use crate::{deadline::Deadline, names::QueueName};

const INDEX: &str = "wilco.index";
const LOCK: &str = "wilco.index.lock";

/// So many entries are one too many: RabbitMQ's documentation sees about 5,000 quorum queues as the
/// most that one cluster should have.
pub(super) const MANY: usize = 5_000;

/// An entry's queue, and those for its dead letters and its notes.
pub(super) const QUEUES_EACH: usize = 3;

/// The arguments of a queue of our own that outlives a power cut.
pub(super) fn durable() -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    arguments.insert(
        "x-delivery-limit".into(),
        AMQPValue::LongLongInt(1_000_000_000),
    );
    arguments
}

pub(super) fn declare_options() -> QueueDeclareOptions {
    QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    }
}

pub(super) async fn add(
    core: &Core,
    wire: &Wire,
    queue: &QueueName,
    deadline: Deadline,
) -> Result<(), Fault> {
    let channel = wire.spare().await?;
    channel
        .queue_declare(INDEX.into(), declare_options(), durable())
        .await?;
    wire.spares().keep(channel);
    put(core, INDEX, queue.as_str().into(), deadline).await
}

/// Every name that has an entry.
pub(super) async fn names(core: &Arc<Core>, wire: &Wire) -> Result<BTreeSet<QueueName>, Fault> {
    let reading = lockqueue::take(core, wire, LOCK.into()).await?;
    let mut names = BTreeSet::new();
    if let Some(shelf) = shelf::open(wire, INDEX, usize::MAX).await? {
        names.extend(shelf.entries.iter().filter_map(|entry| name(&entry.data)));
        shelf.close(&BTreeSet::new()).await?;
    }
    reading.release().await?;
    let queues = names.len() * QUEUES_EACH;
    if queues > MANY {
        tracing::warn!(
            queues,
            "more than {MANY} quorum queues: spread them over several clusters"
        );
    }
    Ok(names)
}

/// Removes every entry of this name.
pub(super) async fn remove(core: &Arc<Core>, wire: &Wire, queue: &QueueName) -> Result<(), Fault> {
    let reading = lockqueue::take(core, wire, LOCK.into()).await?;
    if let Some(shelf) = shelf::open(wire, INDEX, usize::MAX).await? {
        let ours = shelf
            .entries
            .iter()
            .filter(|entry| entry.data == queue.as_str().as_bytes())
            .map(|entry| entry.delivery_tag)
            .collect();
        shelf.close(&ours).await?;
    }
    reading.release().await
}

fn name(entry: &[u8]) -> Option<QueueName> {
    std::str::from_utf8(entry).ok()?.parse().ok()
}
