//! NATS JetStream.
//!
//! A queue is a stream of its own, of the work-queue kind, so that the server itself says that there is no
//! such queue, that it is full, and that it has its consumer already (`topology`, `attach`). Messages go in
//! by a publish whose confirm is awaited (`publish`) and come out by pulls that are bounded by the prefetch
//! (`consume`); their leases are kept by progress acks (`keep`) and end with acks that the server confirms
//! (`settle`). What the server does not keep is in a small message beside them (`notes`). Dead letters are
//! messages of the same stream under other subjects (`dead`). Requests go over core NATS (`requests`).
//!
//! For a queue `wilco.q.vm-0042.1` there are, with its name shortened to `Q`, and to `q` without its first word:
//!
//! | subject | what |
//! | --- | --- |
//! | `Q.in` | messages, in the stream `wilco~q~vm-0042~1`; see `form` for their headers |
//! | `Q.dead.<sequence>` | dead letters, in the same stream |
//! | `Q.a`, `Q.b` | the notes, in the same stream: one copy, at times two |
//! | `Q.lock` | nothing; whoever has made the consumer of it is attached |
//! | `wilco.live.q.hold.<token>`, `….held` | where the attached consumer says that it lives, and what it holds |
//! | `wilco.live.q.ping`, `….lane.<token>` | the lane of requests, and where its responder says that it lives |
//! | `wilco.lane.q` | the claim to the lane, in the stream `wilco~lanes`, in memory |
//!
//! Guests with a credential (`credentials`, `guest`) leave their reports on subjects of their own,
//! `wilco.tray.r.main.q`, in the stream `wilco~trays` (`trays`); the stream `wilco~keys` has their
//! public keys.
//!
//! # What a stream for each guest costs
//!
//! Measured for an idle queue, on two cores and a disk; the ranges are of a quiet machine and of one whose disk
//! others kept busy.
//!
//! | | nats-server 2.9.10 | 2.15.1 |
//! | --- | --- | --- |
//! | a declare, with 1,000 queues, with 2,000 | 4.4 ms, 6.1 ms | 2 ms; with 10,000 on the busy disk 21 ms |
//! | memory of the server, on disk | 65 kB, 24 kB in 7 files | 43 kB; with its two consumers 99 kB, 36 kB in 10 files |
//! | open files | 2 | 1 |
//! | back after SIGKILL, 1,000 queues | 1 s | not measured |
//! | 2,000 | 2.4 to 3.2 s | not measured |
//! | 4,000 | 114 s on the busy disk | not measured |
//! | 10,000 | not measured: quadratic, so a minute at the least | 10 s on a disk in memory, 200 s on the busy disk (some 40 s of them processor) |
//!
//! A server compares a new stream's subjects with those of all others, also when it starts: so a queue has
//! one subject. With five it took 2.9.10 8.7 s with 1,000 queues, and 32 s with 2,000. It needs twice as many
//! open files as there are queues (`ulimit -n`).
//!
//! For it speaks that the server itself keeps guests apart: a stolen credential has one stream's name in each of
//! its rights, a queue goes in one step with all that is in it, one that is full is full for itself, and what is
//! slow about one is so for its guest alone. Against it, that the costs above are for each guest, connected
//! or not, and that the start grows faster than their number. A few thousand guests on one server are
//! reasonable. 100,000 are not: by these figures 4 to 10 GB of memory, up to a million files, and a start of
//! half an hour on a busy disk, on 2.9 of hours. They would need streams that guests share (some 128, with consumers made
//! when they come), and rights that stand on consumers; until then, several servers.
//!
//! The client connects again by itself, and what it was handed while it could not send it sends later or
//! throws away, without a word. So nothing is handed to it while there is no connection, every call has an
//! inbox of ours and its own deadline, and what has no answer when the connection was made again is sent
//! again (`connection`).

mod api;
mod attach;
mod connection;
mod consume;
mod credentials;
mod dead;
mod delete;
mod durability;
mod form;
mod guest;
mod hold;
mod jwt;
mod keep;
mod leave;
mod names;
mod notes;
mod options;
mod publish;
mod pull;
mod received;
mod requests;
mod scribe;
mod settle;
mod settled;
mod tls;
mod topology;
mod trays;
mod unfinished;
mod unreadable;

#[cfg(fuzzing)]
pub(crate) use unreadable::fuzz;

use std::{num::NonZeroU32, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;

use self::{connection::Link, options::Options};
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
const BACKEND: &str = "nats";

pub(crate) async fn connect(url: &BrokerUrl, deadline: Deadline) -> Result<Arc<dyn Broker>> {
    let connecting = async {
        let link = Link::open(Options::read(url)?, deadline).await?;
        // A guest may not ask.
        if link.options.guest.is_none() {
            durability::preflight(&link, deadline).await?;
            tokio::spawn(durability::watch(Arc::downgrade(&link)));
        }
        Ok(link)
    };
    let link = connecting
        .await
        .map_err(|error: Error| error.with_operation("connect").with_backend(BACKEND))?;
    Ok(Arc::new(Nats { link }))
}

/// One handle.
#[derive(Debug)]
struct Nats {
    link: Arc<Link>,
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

#[async_trait]
impl Broker for Nats {
    fn backend(&self) -> &'static str {
        BACKEND
    }

    async fn declare(&self, spec: &QueueSpec, deadline: Deadline) -> Result<Declared> {
        topology::declare(&self.link, spec, deadline)
            .await
            .map_err(at("declare", &spec.name))
    }

    async fn status(&self, queue: &QueueName, deadline: Deadline) -> Result<QueueStatus> {
        topology::status(&self.link, queue, deadline)
            .await
            .map_err(at("status", queue))
    }

    async fn list(&self, deadline: Deadline) -> Result<Vec<QueueStatus>> {
        topology::list(&self.link, deadline)
            .await
            .map_err(|error| error.with_operation("list").with_backend(BACKEND))
    }

    async fn delete(
        &self,
        queue: &QueueName,
        mode: DeleteMode,
        deadline: Deadline,
    ) -> Result<Discarded> {
        delete::delete(&self.link, queue, mode, deadline)
            .await
            .map_err(at("delete", queue))
    }

    async fn publish(
        &self,
        queue: &QueueName,
        message: Message,
        deadline: Deadline,
    ) -> Result<Receipt> {
        publish::publish(&self.link, queue, message, deadline)
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
        consume::consume(&self.link, queue, options, deadline)
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
        dead::dead_letters(&self.link, queue, after, limit, deadline)
            .await
            .map_err(at("dead_letters", queue))
    }

    async fn redrive(
        &self,
        queue: &QueueName,
        key: &DeadLetterKey,
        deadline: Deadline,
    ) -> Result<bool> {
        dead::redrive(&self.link, queue, key, deadline)
            .await
            .map_err(at("redrive", queue))
    }

    async fn request(&self, lane: &GuestAddress, body: Bytes, deadline: Deadline) -> Result<Bytes> {
        let queue = lane.queue();
        requests::request(&self.link, &queue, body, deadline)
            .await
            .map_err(at("request", &queue))
    }

    async fn respond(&self, lane: &GuestAddress, deadline: Deadline) -> Result<Box<dyn Responder>> {
        let queue = lane.queue();
        requests::respond(&self.link, &queue, deadline)
            .await
            .map_err(at("respond", &queue))
    }

    async fn durability(&self, deadline: Deadline) -> Result<DurabilityReport> {
        durability::report(&self.link, deadline)
            .await
            .map_err(|error| error.with_operation("durability").with_backend(BACKEND))
    }

    async fn issue_credential(
        &self,
        address: &GuestAddress,
        reports: &QueueName,
        deadline: Deadline,
    ) -> Result<GuestCredential> {
        credentials::issue(&self.link, address, reports, deadline)
            .await
            .map_err(at("issue_credential", &address.queue()))
    }

    async fn revoke_credential(&self, address: &GuestAddress, deadline: Deadline) -> Result<()> {
        credentials::revoke(&self.link, address, deadline)
            .await
            .map_err(at("revoke_credential", &address.queue()))
    }

    async fn credentials(&self, deadline: Deadline) -> Result<Vec<QueueName>> {
        credentials::list(&self.link, deadline)
            .await
            .map_err(|error| error.with_operation("credentials").with_backend(BACKEND))
    }

    async fn close(&self, deadline: Deadline) -> Result<()> {
        self.link
            .close(deadline)
            .await
            .map_err(|error| error.with_operation("close").with_backend(BACKEND))
    }
}
