//! The broker trait: what every backend does, and what its Ok guarantees.
//!
//! The control plane declares, inspects and deletes queues and publishes commands; a guest consumes
//! from a queue that exists already, answers on its lane and publishes reports. Nothing here heals by
//! deleting or making a queue again (law Q11), and nothing waits past its [`Deadline`] (law P9).

use std::{fmt, num::NonZeroU32, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    credential::GuestCredential,
    deadline::Deadline,
    durability::DurabilityReport,
    error::{Error, ErrorKind, Result},
    message::{Message, MessageId},
    names::{GuestAddress, QueueName},
};

/// One connection to a broker, shared by as many tasks as like.
///
/// Every method can be called from many tasks at once. A connection that breaks is made again inside
/// the backend, for as long as the handle lives, with jittered backoff; only the deadlines bound what
/// a caller sees of it.
///
/// # Errors
/// Every method can fail with [`BrokerUnreachable`](crate::ErrorKind::BrokerUnreachable),
/// [`AuthRefused`](crate::ErrorKind::AuthRefused),
/// [`DeadlineExceeded`](crate::ErrorKind::DeadlineExceeded) and, after [`Broker::close`],
/// [`Closed`](crate::ErrorKind::Closed); what else is said at the method.
#[async_trait]
pub trait Broker: Send + Sync + fmt::Debug + 'static {
    /// The backend's name, such as `embedded`.
    fn backend(&self) -> &'static str;

    /// Makes a queue and its dead-letter queue, durable, if they are not there.
    ///
    /// Ok means that both exist with exactly these arguments and survive what
    /// [`Broker::durability`] says. Never consumes, acks, or counts a delivery (laws Q1, Q2).
    ///
    /// # Errors
    /// [`Mismatch`](crate::ErrorKind::Mismatch) with the differences, nothing changed, if it exists
    /// otherwise (law Q3).
    ///
    /// # Cancel safety
    /// Dropped early, the queue may or may not exist; calling again is right.
    async fn declare(&self, spec: &QueueSpec, deadline: Deadline) -> Result<Declared>;

    /// What a queue holds now: right at once after a publish, a receive or a settlement that
    /// returned (law Q9). Touches no message (law Q2).
    ///
    /// # Errors
    /// [`NoQueue`](crate::ErrorKind::NoQueue).
    async fn status(&self, queue: &QueueName, deadline: Deadline) -> Result<QueueStatus>;

    /// What every queue of wilco's on this broker holds, by name. Touches no message.
    async fn list(&self, deadline: Deadline) -> Result<Vec<QueueStatus>>;

    /// Deletes a queue, its dead letters, and everything else that the broker holds of it (law Q7).
    ///
    /// Ok is an arbitration: each message either is among the discarded, and then no settlement of it
    /// returns Ok after this and no consumer receives it again, or had been acked before. A publish
    /// that races with it is stored and discarded, or fails with `NoQueue` (law Q6). Attached
    /// consumers get [`QueueDeleted`](crate::ErrorKind::QueueDeleted).
    ///
    /// # Errors
    /// [`NoQueue`](crate::ErrorKind::NoQueue); [`NotEmpty`](crate::ErrorKind::NotEmpty) with the
    /// count, nothing changed, unless the mode is [`DeleteMode::Discard`].
    ///
    /// # Cancel safety
    /// Dropped early, the queue may or may not be gone; calling again is right, but what a first call
    /// discarded is then unknown.
    async fn delete(
        &self,
        queue: &QueueName,
        mode: DeleteMode,
        deadline: Deadline,
    ) -> Result<Discarded>;

    /// Stores a message at the end of a queue.
    ///
    /// Ok means stored, confirmed by the broker for this very message, at the level that
    /// [`Broker::durability`] reports (law P1). Messages that one task publishes in turn to one queue
    /// keep their order (law P8).
    ///
    /// # Errors
    /// Each carries its [`Outcome`](crate::Outcome): `NotStored` is final (law P4), after `Unknown`
    /// send the same id again. [`NoQueue`](crate::ErrorKind::NoQueue) within a round trip (law Q4),
    /// [`TooLarge`](crate::ErrorKind::TooLarge), [`BrokerRefused`](crate::ErrorKind::BrokerRefused).
    ///
    /// # Cancel safety
    /// Dropped early, the outcome is `Unknown`; the next publish is not harmed (law P5).
    async fn publish(
        &self,
        queue: &QueueName,
        message: Message,
        deadline: Deadline,
    ) -> Result<Receipt>;

    /// Attaches to a queue as its one consumer (law C12). Never makes it (law Q5).
    ///
    /// # Errors
    /// [`NoQueue`](crate::ErrorKind::NoQueue); [`Conflict`](crate::ErrorKind::Conflict) while another
    /// consumer is attached.
    async fn consume(
        &self,
        queue: &QueueName,
        options: ConsumeOptions,
        deadline: Deadline,
    ) -> Result<Box<dyn Consumer>>;

    /// Reads dead letters, oldest first, at most `limit` of them, from after the one with this key.
    /// Touches none.
    ///
    /// # Errors
    /// [`NoQueue`](crate::ErrorKind::NoQueue).
    async fn dead_letters(
        &self,
        queue: &QueueName,
        after: Option<&DeadLetterKey>,
        limit: NonZeroU32,
        deadline: Deadline,
    ) -> Result<Vec<DeadLetter>>;

    /// Moves one dead letter back to the end of its queue, its delivery count at 0 again, in one step:
    /// it is never in both places or in neither (law C7). Returns false if it is not there (any more).
    ///
    /// # Errors
    /// [`NoQueue`](crate::ErrorKind::NoQueue). The letter stays where it is:
    /// [`Conflict`](crate::ErrorKind::Conflict) while a message of the same id is in the queue,
    /// [`BrokerRefused`](crate::ErrorKind::BrokerRefused) while the queue is full.
    async fn redrive(
        &self,
        queue: &QueueName,
        key: &DeadLetterKey,
        deadline: Deadline,
    ) -> Result<bool>;

    /// Asks the guest that is attached to this lane now, and waits for its answer.
    ///
    /// Nothing is stored anywhere, the guest's queue is not touched (law R9), and an unanswered
    /// request leaves nothing behind (law R5). A body has at most [`MAX_REQUEST_BYTES`].
    ///
    /// # Errors
    /// [`NoConsumer`](crate::ErrorKind::NoConsumer) within a round trip if nobody is attached
    /// (law R2); [`ConsumerSilent`](crate::ErrorKind::ConsumerSilent) at the deadline if somebody is
    /// (law R3); [`TooLarge`](crate::ErrorKind::TooLarge).
    ///
    /// # Cancel safety
    /// Dropped early, the guest may still see the request; its answer is dropped.
    async fn request(&self, lane: &GuestAddress, body: Bytes, deadline: Deadline) -> Result<Bytes>;

    /// Attaches to a guest's lane: from here until the responder is dropped, requests reach it. The
    /// queue need not exist.
    ///
    /// # Errors
    /// [`Conflict`](crate::ErrorKind::Conflict) while somebody else is attached to it.
    async fn respond(&self, lane: &GuestAddress, deadline: Deadline) -> Result<Box<dyn Responder>>;

    /// What Ok is worth here, from the broker's own configuration (laws D1, D2, D4).
    async fn durability(&self, deadline: Deadline) -> Result<DurabilityReport>;

    /// Makes the credential with which this machine can do a guest's work, and nothing else on the
    /// broker (law S1): attach to its own queue and settle what comes, answer on its own lane, and
    /// publish to `reports`.
    ///
    /// Both queues are there already. Ok means that the broker takes it. Issued again, the secret is a new one, and what connected with
    /// the old one may be cut off. It needs a connection that may administer the broker.
    ///
    /// # Errors
    /// [`NoQueue`](crate::ErrorKind::NoQueue) where the broker needs one of them and it is not there;
    /// [`Unsupported`](crate::ErrorKind::Unsupported) with what to do instead, where the broker knows no
    /// such thing or is not set up for it; [`AuthRefused`](crate::ErrorKind::AuthRefused) if this
    /// connection may not.
    ///
    /// # Cancel safety
    /// Dropped early, there may be one that nobody knows; issuing again or revoking is right.
    async fn issue_credential(
        &self,
        _address: &GuestAddress,
        _reports: &QueueName,
        _deadline: Deadline,
    ) -> Result<GuestCredential> {
        Err(no_credentials(self.backend()))
    }

    /// Takes this machine's credential back. Ok means that nobody connects with it any more, after a
    /// restart of the broker either, and that what was connected with it is cut off or about to be. Ok
    /// too if there was none.
    ///
    /// # Errors
    /// As [`Broker::issue_credential`].
    ///
    /// # Cancel safety
    /// Dropped early, it may or may not be good; calling again is right.
    async fn revoke_credential(&self, _address: &GuestAddress, _deadline: Deadline) -> Result<()> {
        Err(no_credentials(self.backend()))
    }

    /// The queues whose machines have a credential, by name: what was issued and not revoked. By their
    /// queues, since from a long id's name the id cannot be read back ([`QueueName::address`]).
    ///
    /// # Errors
    /// As [`Broker::issue_credential`].
    async fn credentials(&self, _deadline: Deadline) -> Result<Vec<QueueName>> {
        Err(no_credentials(self.backend()))
    }

    /// Ends the connection: what was accepted is finished, what is unsettled goes back (law F8), and
    /// no ack that returned Ok is lost (law C14). Everything after it fails with `Closed`. A second
    /// call does nothing.
    async fn close(&self, deadline: Deadline) -> Result<()>;
}

fn no_credentials(backend: &'static str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        "this broker has no credentials per guest: whoever can connect can do everything; use a broker \
         that has them for machines that others control",
    )
    .with_backend(backend)
}

/// The largest body of a request or its answer, in bytes: what every broker takes by default.
pub const MAX_REQUEST_BYTES: usize = 512 * 1024;

/// How a queue is made. The same arguments are the same queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct QueueSpec {
    /// Its name.
    pub name: QueueName,
    /// After this many deliveries without a settlement a message becomes a dead letter (law C7).
    pub delivery_limit: NonZeroU32,
    /// The most messages that it holds, ready, delayed and in flight together, dead letters apart;
    /// more are refused with `NotStored`, none is dropped (law Q12).
    pub max_messages: Option<u64>,
}

impl QueueSpec {
    /// How many deliveries a message gets unless told otherwise. Chosen well above what restarts of
    /// one guest cause, and well below what makes a poison message a burden.
    pub const DEFAULT_DELIVERY_LIMIT: NonZeroU32 = NonZeroU32::new(100).expect("not zero");

    /// A queue of this name with the default limits.
    #[must_use]
    pub fn new(name: QueueName) -> Self {
        Self {
            name,
            delivery_limit: Self::DEFAULT_DELIVERY_LIMIT,
            max_messages: None,
        }
    }

    /// The same with this delivery limit.
    #[must_use]
    pub fn with_delivery_limit(mut self, limit: NonZeroU32) -> Self {
        self.delivery_limit = limit;
        self
    }

    /// The same with room for this many messages.
    #[must_use]
    pub fn with_max_messages(mut self, messages: u64) -> Self {
        self.max_messages = Some(messages);
        self
    }

    /// What `self`, the queue as it is, has otherwise than `asked`: the text of a
    /// [`Mismatch`](crate::ErrorKind::Mismatch).
    #[must_use]
    pub fn differences(&self, asked: &Self) -> Vec<String> {
        let limit = |spec: &Self| spec.max_messages.map_or("none".into(), |n| n.to_string());
        [
            (
                "delivery_limit",
                self.delivery_limit.to_string(),
                asked.delivery_limit.to_string(),
            ),
            ("max_messages", limit(self), limit(asked)),
        ]
        .into_iter()
        .filter(|(_, have, want)| have != want)
        .map(|(name, have, want)| format!("{name} is {have}, asked for {want}"))
        .collect()
    }
}

/// Whether a declare made the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Declared {
    /// It was not there before.
    Created,
    /// It was there, with the same arguments.
    AlreadyExists,
}

/// What a queue holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct QueueStatus {
    /// Its name.
    pub name: QueueName,
    /// Messages that a consumer could receive now.
    pub ready: u64,
    /// Messages that wait for their retry's delay.
    pub delayed: u64,
    /// Messages that a live consumer holds unsettled.
    pub in_flight: u64,
    /// Dead letters.
    pub dead: u64,
    /// Attached consumers that are alive.
    pub consumers: u32,
}

impl QueueStatus {
    /// An empty queue without a consumer.
    #[must_use]
    pub fn new(name: QueueName) -> Self {
        Self {
            name,
            ready: 0,
            delayed: 0,
            in_flight: 0,
            dead: 0,
            consumers: 0,
        }
    }

    /// Everything that a delete would discard.
    #[must_use]
    pub fn messages(&self) -> u64 {
        self.ready + self.delayed + self.in_flight + self.dead
    }
}

/// What to do about messages when a queue is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeleteMode {
    /// Refuse while any message or dead letter is there.
    IfEmpty,
    /// Discard them and say which.
    Discard,
}

/// What a delete discarded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Discarded {
    /// How many messages: ready, delayed, in flight and dead.
    pub messages: u64,
    /// The ids of those that were not dead, oldest first, at most [`Discarded::MAX_IDS`].
    pub ids: Vec<MessageId>,
}

impl Discarded {
    /// How many ids are told at most.
    pub const MAX_IDS: usize = 1_000;

    /// This many messages, these ids first among them.
    #[must_use]
    pub fn new(messages: u64, ids: Vec<MessageId>) -> Self {
        Self { messages, ids }
    }
}

/// What is known of a stored message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Receipt {
    /// The broker had it already: nothing was stored a second time. False says nothing where the
    /// broker does not de-duplicate.
    pub duplicate: bool,
}

impl Receipt {
    /// Stored now, or recognised as stored before.
    #[must_use]
    pub fn new(duplicate: bool) -> Self {
        Self { duplicate }
    }
}

/// How to consume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConsumeOptions {
    /// How many deliveries may be unsettled at once (law C9).
    pub prefetch: NonZeroU32,
}

impl ConsumeOptions {
    /// This many unsettled deliveries at once.
    #[must_use]
    pub fn prefetch(prefetch: NonZeroU32) -> Self {
        Self { prefetch }
    }
}

impl Default for ConsumeOptions {
    fn default() -> Self {
        Self::prefetch(const { NonZeroU32::new(32).expect("not zero") })
    }
}

/// The one consumer of a queue, attached from when it is made until it is dropped or closed, or its
/// [`Broker`] is closed. It keeps the connection: dropping the broker's handles does not detach it.
#[async_trait]
pub trait Consumer: Send + fmt::Debug {
    /// Waits for the next delivery, in the queue's order, for as long as it takes; through outages
    /// of the broker too.
    ///
    /// # Errors
    /// Final, each: [`QueueDeleted`](crate::ErrorKind::QueueDeleted) (law Q11),
    /// [`Conflict`](crate::ErrorKind::Conflict) if another consumer took over while this one was cut
    /// off, [`AuthRefused`](crate::ErrorKind::AuthRefused), [`Closed`](crate::ErrorKind::Closed).
    ///
    /// # Cancel safety
    /// Safe: dropped early, no delivery is lost or counted.
    async fn next(&mut self) -> Result<Delivery>;

    /// Detaches. What was received and not settled stays with its [`Delivery`] until that is dropped
    /// or settled; what was only buffered goes back, its delivery uncounted (laws C9, F8).
    async fn close(self: Box<Self>, deadline: Deadline) -> Result<()>;
}

/// A message leased to one consumer until it is settled.
///
/// The lease is kept alive by the backend while this value lives (law C5). Dropped unsettled, the
/// message goes back to its queue and comes again (law C10).
#[derive(Debug)]
pub struct Delivery {
    /// The message.
    pub message: Message,
    /// Which delivery of it this is, from 1. A lower bound where the broker forgets. When a consumer's
    /// process is killed, what it had buffered may be counted with what it had handed out: only that
    /// process knew which was which.
    pub attempt: u32,
    lease: Box<dyn Lease>,
}

/// A backend's hold on one delivery. Dropping it unsettled gives the message back.
#[async_trait]
pub trait Lease: Send + Sync + fmt::Debug {
    /// Ends the lease this way. What Ok guarantees is said at [`Delivery`]'s methods.
    async fn settle(self: Box<Self>, settlement: Settlement, deadline: Deadline) -> Result<()>;
}

/// How a lease ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// Done: never deliver it again.
    Ack,
    /// Deliver it again, not before this time has passed.
    Retry(Duration),
    /// Put it among the dead letters, with this reason.
    DeadLetter(String),
}

impl Delivery {
    /// A delivery, from a backend.
    #[must_use]
    pub fn new(message: Message, attempt: u32, lease: Box<dyn Lease>) -> Self {
        Self {
            message,
            attempt,
            lease,
        }
    }

    /// Takes it apart, for those that wrap a backend.
    #[must_use]
    pub fn into_parts(self) -> (Message, u32, Box<dyn Lease>) {
        (self.message, self.attempt, self.lease)
    }

    /// Ok: it never comes again, after a broker restart either (law C2).
    ///
    /// # Errors
    /// [`LeaseLost`](crate::ErrorKind::LeaseLost): nothing was settled, it comes or came again
    /// (law C4). Any other: it may come again (law C3).
    ///
    /// # Cancel safety
    /// Dropped early, it may or may not come again.
    pub async fn ack(self, deadline: Deadline) -> Result<()> {
        self.lease.settle(Settlement::Ack, deadline).await
    }

    /// Ok: it comes again after this delay, not before, with its count one higher (law C6).
    ///
    /// # Errors
    /// As [`Delivery::ack`].
    pub async fn retry(self, delay: Duration, deadline: Deadline) -> Result<()> {
        self.lease.settle(Settlement::Retry(delay), deadline).await
    }

    /// Ok: it is among the dead letters, once, with its bytes, id and this reason (law C7).
    ///
    /// # Errors
    /// As [`Delivery::ack`].
    pub async fn dead_letter(self, reason: impl Into<String>, deadline: Deadline) -> Result<()> {
        let settlement = Settlement::DeadLetter(reason.into());
        self.lease.settle(settlement, deadline).await
    }
}

/// Where one dead letter is. It stays the same while the letter is there.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeadLetterKey(pub String);

/// A message that will not be delivered again unless it is sent back.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeadLetter {
    /// Where it is.
    pub key: DeadLetterKey,
    /// The message, unchanged.
    pub message: Message,
    /// Why it is here.
    pub reason: String,
    /// How often it had been delivered.
    pub attempts: u32,
}

impl DeadLetter {
    /// A dead letter, from a backend.
    #[must_use]
    pub fn new(key: DeadLetterKey, message: Message, reason: String, attempts: u32) -> Self {
        Self {
            key,
            message,
            reason,
            attempts,
        }
    }
}

/// A guest's end of its lane.
#[async_trait]
pub trait Responder: Send + fmt::Debug {
    /// Waits for the next request, through outages of the broker too.
    ///
    /// # Errors
    /// Final: [`Conflict`](crate::ErrorKind::Conflict), [`AuthRefused`](crate::ErrorKind::AuthRefused),
    /// [`Closed`](crate::ErrorKind::Closed).
    ///
    /// # Cancel safety
    /// Safe: dropped early, no request is lost.
    async fn next(&mut self) -> Result<Request>;
}

/// A question that waits for its answer. Dropping it leaves the asker to its deadline.
#[derive(Debug)]
pub struct Request {
    /// The question.
    pub body: Bytes,
    reply: Box<dyn Reply>,
}

/// A backend's way back to one asker.
#[async_trait]
pub trait Reply: Send + Sync + fmt::Debug {
    /// Sends the answer. Ok says that it was sent, not that it was read: the asker may be gone (law R6).
    async fn send(self: Box<Self>, body: Bytes, deadline: Deadline) -> Result<()>;
}

impl Request {
    /// A request, from a backend.
    #[must_use]
    pub fn new(body: Bytes, reply: Box<dyn Reply>) -> Self {
        Self { body, reply }
    }

    /// Takes it apart, for those that wrap a backend.
    #[must_use]
    pub fn into_parts(self) -> (Bytes, Box<dyn Reply>) {
        (self.body, self.reply)
    }

    /// Answers. Ok says that it was sent, not that it was read: the asker may be gone (law R6).
    ///
    /// # Errors
    /// [`TooLarge`](crate::ErrorKind::TooLarge) over [`MAX_REQUEST_BYTES`].
    pub async fn reply(self, body: Bytes, deadline: Deadline) -> Result<()> {
        self.reply.send(body, deadline).await
    }
}
