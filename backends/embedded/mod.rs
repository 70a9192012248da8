//! The embedded broker, on SQLite: the library is the broker, in every process that opens the file.
//!
//! One writer thread per process and file stores what waits together in one transaction (`publish`).
//! A queue's one consumer claims rows in batches (`claim`), hands them out one by one (`consume`), and
//! they end as `settle` says. Who is
//! alive is the operating system's word, not a heartbeat's (`attach`). Requests go over Unix sockets
//! and touch no file (`requests`).

mod attach;
mod books;
mod claim;
mod connection;
mod consume;
mod publish;
mod requests;
mod row;
mod settle;
mod topology;

use std::{num::NonZeroU32, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;

use self::connection::Handle;
use crate::{
    broker::{
        Broker, ConsumeOptions, Consumer, DeadLetter, DeadLetterKey, Declared, DeleteMode,
        Discarded, QueueSpec, QueueStatus, Receipt, Responder,
    },
    broker_url::BrokerUrl,
    deadline::Deadline,
    durability::DurabilityReport,
    error::{Error, ErrorKind, Outcome, Result},
    message::Message,
    names::{GuestAddress, QueueName},
    sqlite::Schema,
};

/// The backend's name.
const BACKEND: &str = "embedded";

/// The largest body: what one message may take of everybody's memory and of the one writer's time.
const MAX_BODY_BYTES: usize = 64 * 1024 * 1024;

/// `seq` is the queue's id times 2^36 plus its place in the queue, never used twice: the table itself
/// is in the order of delivery, queue by queue, and needs no index for it. A message's row is never
/// changed; what becomes of it is in `deliveries`, whose rows are small.
///
/// Invariants: a queue's messages without a row in `deliveries` are all behind those with one; its
/// messages behind place `next` stand without a gap.
static SCHEMA: Schema = Schema {
    what: "wilco broker",
    application_id: 0x77_6c_63_62, // "wlcb"
    version: 1,
    sql: "
        CREATE TABLE queues(
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            name TEXT NOT NULL UNIQUE,
            delivery_limit INTEGER NOT NULL,
            max_messages INTEGER,
            next INTEGER NOT NULL DEFAULT 0,  -- the last place that `held` counts
            held INTEGER NOT NULL DEFAULT 0,  -- rows in messages up to that place
            dead INTEGER NOT NULL DEFAULT 0,  -- rows in dead_letters
            consumer INTEGER                  -- the token of the attached one, alive or not
        ) STRICT;
        CREATE TABLE messages(
            seq INTEGER PRIMARY KEY,
            queue INTEGER NOT NULL,
            id TEXT NOT NULL,
            kind TEXT NOT NULL,
            content_type TEXT,                -- null: application/json
            headers TEXT,                     -- a JSON object; null: none
            sender TEXT,
            body BLOB NOT NULL,
            UNIQUE(queue, id)
        ) STRICT;
        CREATE TABLE deliveries(
            seq INTEGER PRIMARY KEY,
            attempts INTEGER NOT NULL,
            holder INTEGER,                   -- the token of its consumer; null: it waits
            ordinal INTEGER,                  -- which of this consumer's claims it is
            due INTEGER                       -- not before, in ms since 1970; null: now
        ) STRICT;
        CREATE TABLE dead_letters(
            seq INTEGER PRIMARY KEY,
            queue INTEGER NOT NULL,
            id TEXT NOT NULL,
            kind TEXT NOT NULL,
            content_type TEXT,
            headers TEXT,
            sender TEXT,
            body BLOB NOT NULL,
            reason TEXT NOT NULL,
            attempts INTEGER NOT NULL
        ) STRICT;
    ",
};

pub(crate) async fn connect(url: &BrokerUrl) -> Result<Arc<dyn Broker>> {
    let handle = connection::connect(url).await.map_err(|error| {
        error
            .without_outcome()
            .with_operation("connect")
            .with_backend(BACKEND)
    })?;
    Ok(Arc::new(Embedded { handle }))
}

/// One handle.
#[derive(Debug)]
struct Embedded {
    handle: Arc<Handle>,
}

/// Says where an error happened.
fn at(operation: &'static str, queue: &QueueName) -> impl Fn(Error) -> Error {
    move |error| {
        error
            .without_outcome()
            .with_operation(operation)
            .with_queue(queue)
            .with_backend(BACKEND)
    }
}

fn no_queue() -> Error {
    Error::new(ErrorKind::NoQueue, "the queue does not exist")
}

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the broker handle was closed")
}

#[async_trait]
impl Broker for Embedded {
    fn backend(&self) -> &'static str {
        BACKEND
    }

    async fn declare(&self, spec: &QueueSpec, deadline: Deadline) -> Result<Declared> {
        topology::declare(&self.handle, spec, deadline)
            .await
            .map_err(at("declare", &spec.name))
    }

    async fn status(&self, queue: &QueueName, deadline: Deadline) -> Result<QueueStatus> {
        topology::status(&self.handle, queue, deadline)
            .await
            .map_err(at("status", queue))
    }

    async fn list(&self, deadline: Deadline) -> Result<Vec<QueueStatus>> {
        topology::list(&self.handle, deadline)
            .await
            .map_err(|error| {
                error
                    .without_outcome()
                    .with_operation("list")
                    .with_backend(BACKEND)
            })
    }

    async fn delete(
        &self,
        queue: &QueueName,
        mode: DeleteMode,
        deadline: Deadline,
    ) -> Result<Discarded> {
        topology::delete(&self.handle, queue, mode, deadline)
            .await
            .map_err(at("delete", queue))
    }

    async fn publish(
        &self,
        queue: &QueueName,
        message: Message,
        deadline: Deadline,
    ) -> Result<Receipt> {
        publish::publish(&self.handle, queue, message, deadline)
            .await
            .map_err(|error| {
                // Whatever has no other outcome failed before it came near the database.
                let outcome = error.outcome().unwrap_or(Outcome::NotStored);
                at("publish", queue)(error).with_outcome(outcome)
            })
    }

    async fn consume(
        &self,
        queue: &QueueName,
        options: ConsumeOptions,
        deadline: Deadline,
    ) -> Result<Box<dyn Consumer>> {
        consume::consume(&self.handle, queue, options, deadline)
            .await
            .map_err(at("consume", queue))
    }

    async fn dead_letters(
        &self,
        queue: &QueueName,
        after: Option<&DeadLetterKey>,
        limit: NonZeroU32,
        deadline: Deadline,
    ) -> Result<Vec<DeadLetter>> {
        topology::dead_letters(&self.handle, queue, after, limit, deadline)
            .await
            .map_err(at("dead_letters", queue))
    }

    async fn redrive(
        &self,
        queue: &QueueName,
        key: &DeadLetterKey,
        deadline: Deadline,
    ) -> Result<bool> {
        topology::redrive(&self.handle, queue, key, deadline)
            .await
            .map_err(at("redrive", queue))
    }

    async fn request(&self, lane: &GuestAddress, body: Bytes, deadline: Deadline) -> Result<Bytes> {
        let queue = lane.queue();
        requests::request(&self.handle, &queue, body, deadline)
            .await
            .map_err(at("request", &queue))
    }

    async fn respond(&self, lane: &GuestAddress, deadline: Deadline) -> Result<Box<dyn Responder>> {
        let queue = lane.queue();
        requests::respond(&self.handle, &queue, deadline)
            .await
            .map_err(at("respond", &queue))
    }

    async fn durability(&self, deadline: Deadline) -> Result<DurabilityReport> {
        self.handle.durability(deadline).await.map_err(|error| {
            error
                .without_outcome()
                .with_operation("durability")
                .with_backend(BACKEND)
        })
    }

    async fn close(&self, deadline: Deadline) -> Result<()> {
        self.handle.close(deadline).await.map_err(|error| {
            error
                .without_outcome()
                .with_operation("close")
                .with_backend(BACKEND)
        })
    }
}

#[cfg(test)]
mod tests;
