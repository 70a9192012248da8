//! RabbitMQ, 3.10 and later, over AMQP 0-9-1.
//!
//! A queue is a quorum queue, and beside it are one for its dead letters (`dead`) and one for what has to
//! be known of it and its messages (`notes`); an index has every queue's name (`index`). Messages go
//! through one exchange, over a connection that does nothing else (`post`, `publish`), and each is
//! answered by its own name, whatever the client library mixes up. A queue's one consumer holds an
//! exclusive queue for as long as it is attached (`hold`): it is its lock, its sign of life, and the lane
//! on which others ask what it holds (`ask`, `status`) or to let go (`delete`). The same is true of a
//! guest's lane for requests (`requests`). The broker does not answer acks; `barrier` makes it.
//!
//! What every message looks like on the broker is in `letter`.
//!
//! The client library logs a message that comes back, with its body, as a warning of the target
//! `lapin::returned_messages`, and each frame as a trace. It cannot be told not to: a program that must
//! not have bodies in its log (law S4) filters `lapin` to errors, as the command does.

mod ask;
mod barrier;
mod connection;
mod consume;
mod credential;
mod dead;
mod delete;
mod durability;
mod fault;
mod hold;
mod index;
mod leave;
mod letter;
mod link;
mod lockqueue;
mod management;
mod notes;
mod post;
mod publish;
mod requests;
mod settle;
mod shelf;
mod station;
mod status;
mod stream;
mod tame;
mod topology;

#[cfg(fuzzing)]
pub(crate) use tame::fuzz;

use std::{
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use bytes::Bytes;

use self::connection::Core;
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
const BACKEND: &str = "rabbitmq";

pub(crate) async fn connect(url: &BrokerUrl, deadline: Deadline) -> Result<Arc<dyn Broker>> {
    let core = connection::connect(url, deadline)
        .await
        .map_err(|error| error.with_operation("connect").with_backend(BACKEND))?;
    Ok(Arc::new(RabbitMq { core }))
}

/// One handle.
#[derive(Debug)]
struct RabbitMq {
    core: Arc<Core>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says where an error happened.
fn at(operation: &'static str, queue: &QueueName) -> impl Fn(Error) -> Error {
    move |error| {
        error
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

fn late() -> Error {
    Error::new(ErrorKind::DeadlineExceeded, "the deadline passed first")
}

#[async_trait]
impl Broker for RabbitMq {
    fn backend(&self) -> &'static str {
        BACKEND
    }

    async fn declare(&self, spec: &QueueSpec, deadline: Deadline) -> Result<Declared> {
        topology::declare(&self.core, spec, deadline)
            .await
            .map_err(at("declare", &spec.name))
    }

    async fn status(&self, queue: &QueueName, deadline: Deadline) -> Result<QueueStatus> {
        status::status(&self.core, queue, deadline)
            .await
            .map_err(at("status", queue))
    }

    async fn list(&self, deadline: Deadline) -> Result<Vec<QueueStatus>> {
        status::list(&self.core, deadline)
            .await
            .map_err(|error| error.with_operation("list").with_backend(BACKEND))
    }

    async fn delete(
        &self,
        queue: &QueueName,
        mode: DeleteMode,
        deadline: Deadline,
    ) -> Result<Discarded> {
        delete::delete(&self.core, queue, mode, deadline)
            .await
            .map_err(at("delete", queue))
    }

    async fn publish(
        &self,
        queue: &QueueName,
        message: Message,
        deadline: Deadline,
    ) -> Result<Receipt> {
        publish::publish(&self.core, queue, message, deadline)
            .await
            .map_err(|error| {
                // Whatever has no other outcome failed before anything was sent.
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
        consume::consume(&self.core, queue, options, deadline)
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
        dead::dead_letters(&self.core, queue, after, limit, deadline)
            .await
            .map_err(at("dead_letters", queue))
    }

    async fn redrive(
        &self,
        queue: &QueueName,
        key: &DeadLetterKey,
        deadline: Deadline,
    ) -> Result<bool> {
        dead::redrive(&self.core, queue, key, deadline)
            .await
            .map_err(at("redrive", queue))
    }

    async fn request(&self, lane: &GuestAddress, body: Bytes, deadline: Deadline) -> Result<Bytes> {
        let queue = lane.queue();
        requests::request(&self.core, &queue, body, deadline)
            .await
            .map_err(at("request", &queue))
    }

    async fn respond(&self, lane: &GuestAddress, deadline: Deadline) -> Result<Box<dyn Responder>> {
        let queue = lane.queue();
        requests::respond(&self.core, &queue, deadline)
            .await
            .map_err(at("respond", &queue))
    }

    async fn durability(&self, deadline: Deadline) -> Result<DurabilityReport> {
        durability::report(&self.core, deadline)
            .await
            .map_err(|error| error.with_operation("durability").with_backend(BACKEND))
    }

    async fn issue_credential(
        &self,
        address: &GuestAddress,
        reports: &QueueName,
        deadline: Deadline,
    ) -> Result<GuestCredential> {
        credential::issue(&self.core, address, reports, deadline)
            .await
            .map_err(at("issue_credential", &address.queue()))
    }

    async fn revoke_credential(&self, address: &GuestAddress, deadline: Deadline) -> Result<()> {
        let queue = address.queue();
        credential::revoke(&self.core, &queue, deadline)
            .await
            .map_err(at("revoke_credential", &queue))
    }

    async fn credentials(&self, deadline: Deadline) -> Result<Vec<QueueName>> {
        credential::list(&self.core, deadline)
            .await
            .map_err(|error| error.with_operation("credentials").with_backend(BACKEND))
    }

    async fn close(&self, deadline: Deadline) -> Result<()> {
        self.core
            .close(deadline)
            .await
            .map_err(|error| error.with_operation("close").with_backend(BACKEND))
    }
}
