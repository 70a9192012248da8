//! Saboteurs of section F: they do well until something breaks.

use std::{
    net::SocketAddr,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::{net::TcpStream, time::Instant};
use wilco::{
    Deadline, Error, ErrorKind, GuestAddress, Message, MessageId, Outcome, QueueName, Result,
    broker::Receipt,
};

use super::wrap::{Inner, Sabotage};

/// Says Ok to a publish that an outage cut short. It waits for a moment alone: with all the time that callers
/// give, most outages are over and the message is sent again, and a run may see none that is lost.
#[derive(Debug, Default)]
pub(super) struct CutShortIsOk;
#[async_trait]
impl Sabotage for CutShortIsOk {
    async fn publish(
        &self,
        inner: &Inner,
        queue: &QueueName,
        message: Message,
        by: Deadline,
    ) -> Result<Receipt> {
        let moment = Deadline::after(Duration::from_millis(20)).min(by);
        let stored = inner.publish(queue, message, moment).await;
        stored.or_else(|error| match error.kind() {
            ErrorKind::BrokerUnreachable | ErrorKind::DeadlineExceeded => Ok(Receipt::new(false)),
            _ => Err(error),
        })
    }
}

/// Waits for the broker to come back, however long its caller wants to wait.
#[derive(Debug, Default)]
pub(super) struct WaitsForTheBroker;
#[async_trait]
impl Sabotage for WaitsForTheBroker {
    async fn publish(
        &self,
        inner: &Inner,
        queue: &QueueName,
        message: Message,
        by: Deadline,
    ) -> Result<Receipt> {
        let patient = Deadline::after(Duration::from_secs(60)).max(by);
        inner.publish(queue, message, patient).await
    }
    async fn close(&self, inner: &Inner, by: Deadline) -> Result<()> {
        // What has to be told to the broker first is told, whenever that is.
        let patient = Deadline::after(Duration::from_secs(60)).max(by);
        while let Err(error) = inner.list(patient).await {
            if *error.kind() != ErrorKind::BrokerUnreachable {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        inner.close(by).await
    }
}

/// Stays down once it was down.
#[derive(Debug, Default)]
pub(super) struct NeverComesBack {
    down: AtomicBool,
}
#[async_trait]
impl Sabotage for NeverComesBack {
    async fn publish(
        &self,
        inner: &Inner,
        queue: &QueueName,
        message: Message,
        by: Deadline,
    ) -> Result<Receipt> {
        if self.down.load(Ordering::Relaxed) {
            let error = Error::new(ErrorKind::BrokerUnreachable, "it went away once");
            return Err(error.with_outcome(Outcome::NotStored));
        }
        let stored = inner.publish(queue, message, by).await;
        self.down.fetch_or(stored.is_err(), Ordering::Relaxed);
        stored
    }
    async fn request(
        &self,
        inner: &Inner,
        lane: &GuestAddress,
        body: Bytes,
        by: Deadline,
    ) -> Result<Bytes> {
        if self.down.load(Ordering::Relaxed) {
            return Err(Error::new(
                ErrorKind::BrokerUnreachable,
                "it went away once",
            ));
        }
        inner.request(lane, body, by).await
    }
}

/// Takes a slow link for a dead one.
#[derive(Debug, Default)]
pub(super) struct TakesSlowForDead;
#[async_trait]
impl Sabotage for TakesSlowForDead {
    async fn publish(
        &self,
        inner: &Inner,
        queue: &QueueName,
        message: Message,
        by: Deadline,
    ) -> Result<Receipt> {
        let impatient = by.or_after(Duration::from_millis(200));
        inner.publish(queue, message, impatient).await
    }
}

/// Sends again under a new id what it had no answer to.
#[derive(Debug, Default)]
pub(super) struct ResendsUnderANewId;
#[async_trait]
impl Sabotage for ResendsUnderANewId {
    async fn publish(
        &self,
        inner: &Inner,
        queue: &QueueName,
        message: Message,
        by: Deadline,
    ) -> Result<Receipt> {
        let mut copy = message.clone();
        match inner.publish(queue, message, by).await {
            Err(error) if error.outcome() == Some(Outcome::Unknown) => {
                copy.id = MessageId::generate();
                inner
                    .publish(queue, copy, Deadline::after(Duration::from_secs(10)))
                    .await
            }
            stored => stored,
        }
    }
}

/// Does not wait for a broker that is not there.
#[derive(Debug, Default)]
pub(super) struct GivesUpAtOnce;
#[async_trait]
impl Sabotage for GivesUpAtOnce {
    fn connecting(&self, _address: SocketAddr, by: Deadline) -> Deadline {
        by.or_after(Duration::from_millis(500))
    }
}

/// Knocks at its broker's door when everybody does.
#[derive(Debug, Default)]
pub(super) struct KnocksInStep {
    start: OnceLock<Instant>,
}
#[async_trait]
impl Sabotage for KnocksInStep {
    fn connecting(&self, address: SocketAddr, by: Deadline) -> Deadline {
        let start = *self.start.get_or_init(Instant::now);
        tokio::spawn(async move {
            for step in 1..60 {
                tokio::time::sleep_until(start + Duration::from_secs(1) * step).await;
                drop(TcpStream::connect(address).await);
            }
        });
        by
    }
}
