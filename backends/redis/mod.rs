//! Redis Streams, on Redis or Valkey from 7.0 on.
//!
//! Every change is one script, so exactness is the server's (`scripts`, `lua/`). A handle has one
//! connection for publishing and one for all else, so that a large body does not hold up a lease
//! (`link`). Publishes that wait together go together (`publish`); a consumer's owner task claims in
//! batches and settles in batches (`attend`), and its handle gives them out (`consume`). Requests go
//! over pub/sub and store nothing (`requests`). Who is alive is said by leases that the server's own
//! clock measures.
//!
//! # What stands on the server
//! All keys of a queue begin `wilco:{<queue>}:`, so a cluster keeps them in one slot:
//!
//! | key | type | holds |
//! | --- | --- | --- |
//! | `meta` | hash | `format` (1), `limit`, `max` (empty: none), `epoch` (new at each declare), `consumer` (the attached one's token), `hungry` (it waits for a wake) |
//! | `stream` | stream | every message that is not settled, and the group `wilco` |
//! | `holders` | sorted set | the tokens of those who hold messages, by the end of their lease |
//! | `wait` | sorted set | delivered messages that wait to come again, by the moment when they may |
//! | `ids` | set | the ids of the messages in `stream`: what lives is de-duplicated |
//! | `dead` | stream | dead letters |
//! | `sent` | hash | the last answers to each sender, so that a send that broke off is not done twice |
//! | `lane` | string | the token of the guest that serves the lane; expires with its lease |
//! | `tray` | stream | what a guest with a credential reported and nobody has collected yet |
//!
//! Beside them is the hash `wilco:credentials`: to which queue of reports each guest with a credential
//! reports, by the names of the queues (`credentials`, `guest`, `trays`).
//!
//! An id is forgotten once its message was acked or is a dead letter, as on the embedded broker: from
//! then on the guest's journal recognises it.
//!
//! # A message
//! One entry, whose fields are, in any order but the last:
//!
//! | field | holds |
//! | --- | --- |
//! | `id`, `kind` | as they are |
//! | `type` | the content type; left out: `application/json` |
//! | `from` | the sender's queue; left out: none |
//! | `h:<name>` | the header of that name |
//! | `body` | the body; the last field |
//!
//! A dead letter has `reason` and `attempts` behind it.
//!
//! # More servers than one
//! Sentinels are asked for the master at every connect (`sentinel`). Replicas get a change after its
//! answer, so a failover may lose what was confirmed, unless the URL asks for replicas to have it first
//! (`copies`): then publishes, settlements, attachments, and the making and deleting of queues are Ok only
//! once they have. What broke off meanwhile is sent again to whoever is the master then.
//!
//! # Redis Cluster
//! Refused as a URL; a node's `MOVED` or `ASK` is an error that says so. Each step but two runs in a cluster
//! as it is, for a queue's keys are in one slot. What is missing, most of it seen on three masters of
//! 7.0.15 by a plain client, the rest read:
//!
//! - A handle has one connection for a consumer's work and one for publishing (`connection`, `link`); it
//!   needs these for each master, and each queue's task its own, by a map of slots. The client's own cluster
//!   connection is no substitute: what makes it follow `MOVED` makes it send again after a broken
//!   connection, and then nobody can say whether a message was stored (P3), nor in which order (P8).
//! - `MOVED` and `ASK` say that nothing was done: as `failure::Failure::is_passing`, but with a new map. While
//!   a slot moves, a step is `TRYAGAIN` until all keys of its queue are on one side.
//! - `PUBLISH` counts the listeners of its own node alone: 0 for a guest that listens elsewhere and hears it
//!   (R2). `SPUBLISH` in a script counts right, with `SSUBSCRIBE` at the master of the slot, by
//!   connections that follow the slot. It knows no patterns: answers stay `PUBLISH`.
//! - `move` has keys of three slots, `wilco:credentials` among them, and is refused (`CROSSSLOT`); `trays`
//!   looks at keys of every slot: reports of guests with credentials have to be looked for by each master,
//!   and taken from the tray and stored in two steps.
//! - `list`, `credentials` and the durability report ask one server; they have to ask every master. Functions
//!   and users are made on one; they have to be made on every node.
//!
//! # What idle guests cost
//! With 7.0.15, its scripts called by a plain client: a queue takes 640 bytes of the server's memory, attached and with its lane 1.1 kB, and its
//! guest's connection 38 kB. So 10,000 guests take 400 MB, nearly all of it for their connections, and more
//! than the 10,000 connections that a server allows if `maxclients` is not raised. A declare is one synced
//! write: 10,000 took 13 s one after the other.

mod attend;
mod claims;
mod connection;
mod consume;
mod copies;
mod credentials;
mod dial;
mod durability;
mod failure;
mod form;
mod guest;
mod link;
mod publish;
mod replay;
mod requests;
mod router;
mod scripts;
mod sentinel;
mod ticket;
mod topology;
mod trays;

#[cfg(fuzzing)]
pub(crate) use form::fuzz;

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
    credential::GuestCredential,
    deadline::Deadline,
    durability::DurabilityReport,
    error::{Error, ErrorKind, Outcome, Result},
    message::Message,
    names::{GuestAddress, QueueName},
};

/// The backend's name.
const BACKEND: &str = "redis";

pub(crate) async fn connect(url: &BrokerUrl, deadline: Deadline) -> Result<Arc<dyn Broker>> {
    let handle = connection::connect(url, deadline)
        .await
        .map_err(during("connect"))?;
    Ok(Arc::new(Redis { handle }))
}

/// One handle.
#[derive(Debug)]
struct Redis {
    handle: Handle,
}

/// Says where an error happened.
fn at(operation: &'static str, queue: &QueueName) -> impl Fn(Error) -> Error {
    move |error| during(operation)(error).with_queue(queue)
}

fn during(operation: &'static str) -> impl Fn(Error) -> Error {
    move |error| error.with_operation(operation).with_backend(BACKEND)
}

fn no_queue() -> Error {
    Error::new(ErrorKind::NoQueue, "the queue does not exist")
}

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the broker handle was closed")
}

#[async_trait]
impl Broker for Redis {
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
            .map_err(during("list"))
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
                // Whatever has no other outcome failed before a byte of it left.
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
        durability::report(&self.handle, deadline)
            .await
            .map_err(during("durability"))
    }

    async fn issue_credential(
        &self,
        address: &GuestAddress,
        reports: &QueueName,
        deadline: Deadline,
    ) -> Result<GuestCredential> {
        credentials::issue(&self.handle, address, reports, deadline)
            .await
            .map_err(at("issue_credential", &address.queue()))
    }

    async fn revoke_credential(&self, address: &GuestAddress, deadline: Deadline) -> Result<()> {
        credentials::revoke(&self.handle, address, deadline)
            .await
            .map_err(at("revoke_credential", &address.queue()))
    }

    async fn credentials(&self, deadline: Deadline) -> Result<Vec<QueueName>> {
        credentials::list(&self.handle, deadline)
            .await
            .map_err(during("credentials"))
    }

    async fn close(&self, deadline: Deadline) -> Result<()> {
        self.handle.close(deadline).await.map_err(during("close"))
    }
}
