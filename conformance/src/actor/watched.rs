//! A broker, records and a journal whose every side effect goes through [`Points`].

use std::{num::NonZeroU32, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use serde_json::Value;
use wilco::{
    Broker, Deadline, Entry, EntryState, GuestAddress, GuestCredential, GuestId, Journal, Message,
    QueueName, Record, Records, Result,
    broker::{
        ConsumeOptions, Consumer, DeadLetter, DeadLetterKey, Declared, DeleteMode, Delivery,
        Discarded, Lease, QueueSpec, QueueStatus, Receipt, Reply, Request, Responder, Settlement,
    },
    durability::DurabilityReport,
};

use super::points::Points;

/// Something real, with its side effects watched.
#[derive(Debug)]
pub(super) struct Watched<T> {
    pub(super) inner: T,
    pub(super) points: Points,
}

/// What a report or a question is, in one word.
fn tag(body: &[u8], place: &str) -> String {
    let value: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    match value.get(place) {
        Some(Value::String(tag)) => tag.clone(),
        Some(Value::Object(tagged)) => tagged.keys().next().cloned().unwrap_or_default(),
        _ => "unknown".into(),
    }
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl Broker for Watched<Arc<dyn Broker>> {
    fn backend(&self) -> &'static str {
        self.inner.backend()
    }
    async fn declare(&self, spec: &QueueSpec, by: Deadline) -> Result<Declared> {
        let effect = match spec.name.address() {
            Some(_) => "declare queue",
            None => "declare reports",
        };
        self.points
            .around(effect, self.inner.declare(spec, by))
            .await
    }
    async fn status(&self, queue: &QueueName, by: Deadline) -> Result<QueueStatus> {
        self.inner.status(queue, by).await
    }
    async fn list(&self, by: Deadline) -> Result<Vec<QueueStatus>> {
        self.inner.list(by).await
    }
    async fn delete(&self, queue: &QueueName, mode: DeleteMode, by: Deadline) -> Result<Discarded> {
        let deleted = self.inner.delete(queue, mode, by);
        self.points.around("delete queue", deleted).await
    }
    async fn publish(&self, queue: &QueueName, message: Message, by: Deadline) -> Result<Receipt> {
        let effect = match queue.address() {
            Some(_) => format!("publish {}", message.kind),
            None => format!("report {}", tag(&message.body, "event")),
        };
        let published = self.inner.publish(queue, message, by);
        self.points.around(&effect, published).await
    }
    async fn consume(
        &self,
        queue: &QueueName,
        options: ConsumeOptions,
        by: Deadline,
    ) -> Result<Box<dyn Consumer>> {
        let attached = self.inner.consume(queue, options, by);
        let inner = self.points.around("attach", attached).await?;
        let points = self.points.clone();
        Ok(Box::new(Watched { inner, points }))
    }
    async fn dead_letters(
        &self,
        queue: &QueueName,
        after: Option<&DeadLetterKey>,
        limit: NonZeroU32,
        by: Deadline,
    ) -> Result<Vec<DeadLetter>> {
        self.inner.dead_letters(queue, after, limit, by).await
    }
    async fn redrive(&self, queue: &QueueName, key: &DeadLetterKey, by: Deadline) -> Result<bool> {
        self.inner.redrive(queue, key, by).await
    }
    async fn request(&self, lane: &GuestAddress, body: Bytes, by: Deadline) -> Result<Bytes> {
        let effect = format!("ask {}", tag(&body, "ask"));
        let asked = self.inner.request(lane, body, by);
        self.points.around(&effect, asked).await
    }
    async fn respond(&self, lane: &GuestAddress, by: Deadline) -> Result<Box<dyn Responder>> {
        let inner = self.inner.respond(lane, by).await?;
        let points = self.points.clone();
        Ok(Box::new(Watched { inner, points }))
    }
    async fn durability(&self, by: Deadline) -> Result<DurabilityReport> {
        self.inner.durability(by).await
    }
    async fn issue_credential(
        &self,
        address: &GuestAddress,
        reports: &QueueName,
        by: Deadline,
    ) -> Result<GuestCredential> {
        let issued = self.inner.issue_credential(address, reports, by);
        self.points.around("issue credential", issued).await
    }
    async fn revoke_credential(&self, address: &GuestAddress, by: Deadline) -> Result<()> {
        let revoked = self.inner.revoke_credential(address, by);
        self.points.around("revoke credential", revoked).await
    }
    async fn credentials(&self, by: Deadline) -> Result<Vec<QueueName>> {
        self.inner.credentials(by).await
    }
    async fn close(&self, by: Deadline) -> Result<()> {
        self.inner.close(by).await
    }
}

#[async_trait]
impl Consumer for Watched<Box<dyn Consumer>> {
    async fn next(&mut self) -> Result<Delivery> {
        let delivery = self.inner.next().await?;
        let (message, attempt, inner) = delivery.into_parts();
        let kind = message.kind.to_string();
        self.points
            .around(&format!("receive {kind}"), async {})
            .await;
        let lease = WatchedLease {
            inner,
            kind,
            points: self.points.clone(),
        };
        Ok(Delivery::new(message, attempt, Box::new(lease)))
    }
    async fn close(self: Box<Self>, by: Deadline) -> Result<()> {
        self.inner.close(by).await
    }
}

#[derive(Debug)]
struct WatchedLease {
    inner: Box<dyn Lease>,
    kind: String,
    points: Points,
}

#[async_trait]
impl Lease for WatchedLease {
    async fn settle(self: Box<Self>, settlement: Settlement, by: Deadline) -> Result<()> {
        let how = match settlement {
            Settlement::Ack => "ack",
            Settlement::Retry(_) => "retry",
            Settlement::DeadLetter(_) => "dead-letter",
        };
        let settled = self.inner.settle(settlement, by);
        self.points
            .around(&format!("{how} {}", self.kind), settled)
            .await
    }
}

#[async_trait]
impl Responder for Watched<Box<dyn Responder>> {
    async fn next(&mut self) -> Result<Request> {
        let (body, inner) = self.inner.next().await?.into_parts();
        let reply = WatchedReply {
            inner,
            effect: format!("answer {}", tag(&body, "ask")),
            points: self.points.clone(),
        };
        Ok(Request::new(body, Box::new(reply)))
    }
}

#[derive(Debug)]
struct WatchedReply {
    inner: Box<dyn Reply>,
    effect: String,
    points: Points,
}

#[async_trait]
impl Reply for WatchedReply {
    async fn send(self: Box<Self>, body: Bytes, by: Deadline) -> Result<()> {
        let sent = self.inner.send(body, by);
        self.points.around(&self.effect, sent).await
    }
}

#[async_trait]
impl<T: Records> Records for Watched<T> {
    async fn own(&self) -> Result<()> {
        self.inner.own().await
    }
    async fn save(&self, record: &Record) -> Result<()> {
        let effect = format!("record {}", record.state);
        self.points.around(&effect, self.inner.save(record)).await
    }
    async fn newest(&self, guest: &GuestId) -> Result<Option<Record>> {
        self.inner.newest(guest).await
    }
    async fn list(&self) -> Result<Vec<Record>> {
        self.inner.list().await
    }
}

#[async_trait]
impl<T: Journal> Journal for Watched<T> {
    async fn own(&self, address: &GuestAddress) -> Result<()> {
        self.inner.own(address).await
    }
    async fn save(&self, entry: &Entry) -> Result<()> {
        let state = match entry.state {
            EntryState::Accepted => "accepted",
            EntryState::Running => "running",
            EntryState::Done(_) if entry.reported => "reported",
            EntryState::Done(_) => "done",
            EntryState::Withdrawn => "withdrawn",
        };
        let saved = self.inner.save(entry);
        self.points.around(&format!("journal {state}"), saved).await
    }
    async fn load(&self) -> Result<Vec<Entry>> {
        self.inner.load().await
    }
    async fn dismiss(&self) -> Result<()> {
        self.points
            .around("journal dismissed", self.inner.dismiss())
            .await
    }
    async fn prune(&self, keep: usize) -> Result<()> {
        self.inner.prune(keep).await
    }
}
