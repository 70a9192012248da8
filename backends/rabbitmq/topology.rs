//! Making queues, and what they were made with.

use std::{num::NonZeroU32, sync::Arc, time::Instant};

use lapin::{
    Channel,
    options::{QueueBindOptions, QueueDeclareOptions, QueuePurgeOptions},
    types::{AMQPValue, FieldTable},
};
use tokio::time::sleep;

use super::{
    barrier::{COUNTED, COUNTS},
    connection::{Core, EXCHANGE},
    dead::dead_of,
    fault::Fault,
    index,
    letter::text,
    link::Wire,
    lock, lockqueue, notes,
    publish::{gate_of, routing_key},
};
use crate::{
    broker::{Declared, QueueSpec},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    names::QueueName,
};

/// RabbitMQ's own delivery limit drops or moves a message by its own count. This one is never reached,
/// and its last digits are ours: the broker keeps and compares them.
const LIMIT_BASE: i64 = 10_000_000_000;

/// How much the broker's own limit of messages lies over ours: it is for publishers that do not know
/// of the gate (see `publish`).
const LENGTH_BASE: i64 = 100_000;

/// What the broker counts in a queue and beside it: what is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) ready: u64,
    pub(super) dead: u64,
    pub(super) notes: u64,
}

/// `None`: there is no such queue.
pub(super) async fn counts(wire: &Wire, queue: &QueueName) -> Result<Option<Counts>, Fault> {
    let channel = wire.scout().await?;
    let look = async |name: String| {
        let mut tries = 0;
        loop {
            let options = QueueDeclareOptions {
                passive: true,
                ..QueueDeclareOptions::default()
            };
            let asked = Instant::now();
            let looked = channel.answer(channel.channel().queue_declare(
                name.as_str().into(),
                options,
                FieldTable::default(),
            ));
            let looked = looked.await?;
            tries += 1;
            if looked.message_count() > 0 || asked.elapsed() < COUNTED || tries == COUNTS {
                return Ok::<_, Fault>(looked);
            }
        }
    };
    let (main, dead, notes) = tokio::join!(
        look(queue.to_string()),
        look(dead_of(queue)),
        look(notes::notes_of(queue))
    );
    let main = match main {
        Ok(main) => main,
        Err(Fault::Amqp(404, _)) => return Ok(None),
        Err(fault) => return Err(fault),
    };
    // One without the others is one whose delete was broken off.
    let count = |looked: &Result<lapin::Queue, Fault>| {
        looked
            .as_ref()
            .map_or(0, |looked| u64::from(looked.message_count()))
    };
    let counts = Counts {
        ready: u64::from(main.message_count()),
        dead: count(&dead),
        notes: count(&notes),
    };
    if dead.is_ok() && notes.is_ok() {
        channel.done();
    }
    Ok(Some(counts))
}

fn arguments(delivery_limit: i64, max_length: Option<i64>, queue: &QueueName) -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    arguments.insert(
        "x-delivery-limit".into(),
        AMQPValue::LongLongInt(delivery_limit),
    );
    arguments.insert("x-overflow".into(), text("reject-publish"));
    arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
    // For those who reject without us: a message that is rejected is a dead letter, never dropped.
    arguments.insert("x-dead-letter-exchange".into(), text(""));
    arguments.insert("x-dead-letter-routing-key".into(), text(&dead_of(queue)));
    arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
    if let Some(length) = max_length {
        arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(length));
    }
    arguments
}

fn limit_argument(limit: NonZeroU32) -> i64 {
    LIMIT_BASE + i64::from(limit.get())
}

fn length_argument(most: Option<u64>) -> Option<i64> {
    most.map(|most| {
        i64::try_from(most)
            .unwrap_or(i64::MAX / 2)
            .saturating_add(LENGTH_BASE)
    })
}

/// How a queue that is there was made.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) delivery_limit: Option<NonZeroU32>,
    pub(super) max_messages: Option<u64>,
    /// What no queue of ours has.
    pub(super) foreign: Vec<String>,
}

/// Asks for a queue that nobody can have, and reads from the refusal what is there instead: it is never
/// made by this (law Q5). `None`: there is none.
pub(super) async fn probe(wire: &Wire, queue: &QueueName) -> Result<Option<Found>, Fault> {
    const IMPOSSIBLE: i64 = -7;
    let mut delivery_limit = None;
    let mut max_length: Option<Option<i64>> = None;
    // Each refusal names one argument.
    for _ in 0..4 {
        let mut asked = arguments(
            delivery_limit.unwrap_or(IMPOSSIBLE),
            Some(IMPOSSIBLE),
            queue,
        );
        if let Some(known) = max_length {
            asked = arguments(delivery_limit.unwrap_or(IMPOSSIBLE), known, queue);
        }
        let channel = wire.scout().await?;
        let refused = channel.answer(channel.channel().queue_declare(
            queue.as_str().into(),
            index::declare_options(),
            asked,
        ));
        let refusal = match refused.await {
            Err(Fault::Amqp(406, text)) => text,
            Err(fault) => return Err(fault),
            Ok(_) => return Err(Fault::Lost("a queue took arguments that none takes".into())),
        };
        match Inequivalent::read(&refusal) {
            Some(Inequivalent { argument, current }) if argument == "x-delivery-limit" => {
                delivery_limit = Some(current.and_then(|text| text.parse().ok()).unwrap_or(0));
            }
            Some(Inequivalent { argument, current }) if argument == "x-max-length" => {
                max_length = Some(current.and_then(|text| text.parse().ok()));
            }
            Some(_) => {
                return Ok(Some(Found {
                    delivery_limit: None,
                    max_messages: None,
                    foreign: vec![refusal],
                }));
            }
            // There was nothing to be compared with: the arguments themselves were looked at.
            None => return Ok(None),
        }
        if let (Some(limit), Some(length)) = (delivery_limit, max_length) {
            let limit = u32::try_from(limit - LIMIT_BASE)
                .ok()
                .and_then(NonZeroU32::new);
            let length = length.map(|length| u64::try_from(length - LENGTH_BASE));
            let mut foreign = Vec::new();
            if limit.is_none() || length.is_some_and(|length| length.is_err()) {
                foreign.push("its limits are not ones that wilco gives".to_owned());
            }
            return Ok(Some(Found {
                delivery_limit: limit,
                max_messages: length.and_then(std::result::Result::ok),
                foreign,
            }));
        }
    }
    Err(Fault::Lost(
        "the broker does not say what a queue is".into(),
    ))
}

/// The same, for a caller who does not know whether it is there.
pub(super) async fn probe_there(wire: &Wire, queue: &QueueName) -> Result<Option<Found>, Fault> {
    if counts(wire, queue).await?.is_none() {
        return Ok(None);
    }
    probe(wire, queue).await
}

/// What a refusal says: the argument, and what the queue has there.
struct Inequivalent {
    argument: String,
    current: Option<String>,
}

impl Inequivalent {
    /// `inequivalent arg 'A' for queue 'Q' in vhost 'V': received ... but current is ...`, where what is
    /// current is `none` or `the value 'V' of type 'T'`, or `'V'` alone.
    fn read(text: &str) -> Option<Self> {
        let (_, rest) = text.split_once("inequivalent arg '")?;
        let (argument, rest) = rest.split_once('\'')?;
        let (_, current) = rest.rsplit_once("but current is ")?;
        let quoted = current.split('\'').nth(1).map(str::to_owned);
        Some(Self {
            argument: argument.into(),
            current: quoted.filter(|_| !current.starts_with("none")),
        })
    }
}

pub(super) async fn declare(
    core: &Arc<Core>,
    spec: &QueueSpec,
    deadline: Deadline,
) -> Result<Declared> {
    let spec = spec.clone();
    core.run(deadline, move |core, wire| {
        let spec = spec.clone();
        async move { declare_once(&core, &wire, &spec, deadline).await }
    })
    .await
}

async fn declare_once(
    core: &Arc<Core>,
    wire: &Wire,
    spec: &QueueSpec,
    deadline: Deadline,
) -> Result<Declared, Fault> {
    let queue = &spec.name;
    let is_bound = lock(&core.bound).contains(queue);
    if is_bound && counts(wire, queue).await?.is_some() {
        if compare(wire, spec).await? {
            return Ok(Declared::AlreadyExists);
        }
        lock(&core.bound).remove(queue);
    }
    // One at a time, so that one is told that it made it.
    let gate = lockqueue::take(core, wire, gate_of(queue)).await?;
    let channel = wire.spare().await?;
    let declared = if counts(wire, queue).await?.is_some() {
        compare(wire, spec).await?;
        Declared::AlreadyExists
    } else {
        make(core, wire, &channel, spec, deadline).await?;
        Declared::Created
    };
    // One that was made and not bound, before a crash, is bound now.
    bind(&channel, queue, spec.max_messages).await?;
    wire.spares().keep(channel);
    lock(&core.bound).insert(queue.clone());
    core.gates.learn(queue, spec.max_messages);
    if declared == Declared::Created && deadline.bound(sleep(core.fresh)).await.is_err() {
        let error = Error::new(
            ErrorKind::DeadlineExceeded,
            "the deadline passed before the queue was old enough to outlive the broker's end",
        );
        return Err(error.into());
    }
    gate.release().await?;
    Ok(declared)
}

pub(super) async fn bind(
    channel: &lapin::Channel,
    queue: &QueueName,
    max_messages: Option<u64>,
) -> Result<(), Fault> {
    let binding = channel.queue_bind(
        queue.as_str().into(),
        EXCHANGE.into(),
        routing_key(queue, max_messages).into(),
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    Ok(binding.await?)
}

/// Holds a queue that is there to what was asked for. False: it has gone meanwhile.
async fn compare(wire: &Wire, spec: &QueueSpec) -> Result<bool, Fault> {
    let Some(found) = probe(wire, &spec.name).await? else {
        return Ok(false);
    };
    let mut differences = found.foreign;
    if let (Some(delivery_limit), true) = (found.delivery_limit, differences.is_empty()) {
        let mut there = QueueSpec::new(spec.name.clone()).with_delivery_limit(delivery_limit);
        there.max_messages = found.max_messages;
        differences = there.differences(spec);
    }
    if differences.is_empty() {
        return Ok(true);
    }
    let error = Error::new(
        ErrorKind::Mismatch { differences },
        "the queue exists with other arguments; nothing was changed",
    );
    Err(error.into())
}

/// What stands beside the queue first, then the queue: where it is, all of it is.
async fn make(
    core: &Arc<Core>,
    wire: &Wire,
    channel: &Channel,
    spec: &QueueSpec,
    deadline: Deadline,
) -> Result<(), Fault> {
    let queue = &spec.name;
    let side = wire.spare().await?;
    let dead = beside(&side, queue, dead_of(queue));
    let notes = async {
        beside(channel, queue, notes::notes_of(queue)).await?;
        notes::begin(core, spec, deadline).await
    };
    tokio::try_join!(index::add(core, wire, queue, deadline), dead, notes)?;
    wire.spares().keep(side);
    let asked = arguments(
        limit_argument(spec.delivery_limit),
        length_argument(spec.max_messages),
        queue,
    );
    channel
        .queue_declare(queue.as_str().into(), index::declare_options(), asked)
        .await?;
    Ok(())
}

/// Makes one of those beside a queue, with nothing in it.
async fn beside(channel: &Channel, queue: &QueueName, name: String) -> Result<(), Fault> {
    let asked = Instant::now();
    let made = channel
        .queue_declare(
            name.as_str().into(),
            index::declare_options(),
            index::durable(),
        )
        .await?;
    // The broker counts nothing where it cannot count in time.
    if made.message_count() == 0 && asked.elapsed() < COUNTED {
        return Ok(());
    }
    // A delete that was broken off may have left something there.
    let left = channel
        .queue_purge(name.into(), QueuePurgeOptions::default())
        .await?;
    if left > 0 {
        tracing::warn!(%queue, left, "what an unfinished delete left was removed");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q3_a_refusal_is_read() {
        let read = |text: &str| {
            Inequivalent::read(text).map(|read| (read.argument, read.current.unwrap_or_default()))
        };
        let text = "PRECONDITION_FAILED - inequivalent arg 'x-max-length' for queue 'q' in vhost '/': \
                    received the value '-7' of type 'signedint' but current is ";
        let value = format!("{text}the value '10' of type 'long'");
        let name = "x-max-length".to_owned();
        assert_eq!(read(&value), Some((name.clone(), "10".into())));
        assert_eq!(
            read(&format!("{text}none")),
            Some((name.clone(), String::new()))
        );
        assert_eq!(read(&format!("{text}'10'")), Some((name, "10".into())));
        assert_eq!(
            read("PRECONDITION_FAILED - invalid arg 'x-max-length'"),
            None
        );
    }
}
