//! The wrapper: every method of a broker, each open to sabotage.

use std::{fmt, future::Future, net::SocketAddr, num::NonZeroU32, pin::Pin, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use wilco::{
    Broker, Deadline, GuestAddress, GuestCredential, Message, QueueName, Result,
    broker::{
        ConsumeOptions, Consumer, DeadLetter, DeadLetterKey, Declared, DeleteMode, Delivery,
        Discarded, Lease, QueueSpec, QueueStatus, Receipt, Responder, Settlement,
    },
    durability::DurabilityReport,
};

/// The handle that a saboteur wraps.
pub type Inner = Arc<dyn Broker>;

/// What can be sabotaged: each method does what the real one does unless it is overridden.
#[async_trait]
pub trait Sabotage: Send + Sync + fmt::Debug {
    /// In place of [`Broker::declare`].
    async fn declare(&self, inner: &Inner, spec: &QueueSpec, by: Deadline) -> Result<Declared> {
        inner.declare(spec, by).await
    }
    /// In place of [`Broker::status`].
    async fn status(&self, inner: &Inner, queue: &QueueName, by: Deadline) -> Result<QueueStatus> {
        inner.status(queue, by).await
    }
    /// In place of [`Broker::list`].
    async fn list(&self, inner: &Inner, by: Deadline) -> Result<Vec<QueueStatus>> {
        inner.list(by).await
    }
    /// In place of [`Broker::delete`].
    async fn delete(
        &self,
        inner: &Inner,
        queue: &QueueName,
        mode: DeleteMode,
        by: Deadline,
    ) -> Result<Discarded> {
        inner.delete(queue, mode, by).await
    }
    /// In place of [`Broker::publish`].
    async fn publish(
        &self,
        inner: &Inner,
        queue: &QueueName,
        message: Message,
        by: Deadline,
    ) -> Result<Receipt> {
        inner.publish(queue, message, by).await
    }
    /// In place of [`Broker::consume`].
    async fn consume(
        &self,
        inner: &Inner,
        queue: &QueueName,
        options: ConsumeOptions,
        by: Deadline,
    ) -> Result<Box<dyn Consumer>> {
        inner.consume(queue, options, by).await
    }
    /// In place of [`Broker::dead_letters`].
    async fn dead_letters(
        &self,
        inner: &Inner,
        queue: &QueueName,
        after: Option<&DeadLetterKey>,
        limit: NonZeroU32,
        by: Deadline,
    ) -> Result<Vec<DeadLetter>> {
        inner.dead_letters(queue, after, limit, by).await
    }
    /// In place of [`Broker::redrive`].
    async fn redrive(
        &self,
        inner: &Inner,
        queue: &QueueName,
        key: &DeadLetterKey,
        by: Deadline,
    ) -> Result<bool> {
        inner.redrive(queue, key, by).await
    }
    /// In place of [`Broker::request`].
    async fn request(
        &self,
        inner: &Inner,
        lane: &GuestAddress,
        body: Bytes,
        by: Deadline,
    ) -> Result<Bytes> {
        inner.request(lane, body, by).await
    }
    /// In place of [`Broker::respond`].
    async fn respond(
        &self,
        inner: &Inner,
        lane: &GuestAddress,
        by: Deadline,
    ) -> Result<Box<dyn Responder>> {
        inner.respond(lane, by).await
    }
    /// In place of [`Broker::durability`].
    async fn durability(&self, inner: &Inner, by: Deadline) -> Result<DurabilityReport> {
        inner.durability(by).await
    }
    /// In place of [`Broker::issue_credential`].
    async fn issue_credential(
        &self,
        inner: &Inner,
        address: &GuestAddress,
        reports: &QueueName,
        by: Deadline,
    ) -> Result<GuestCredential> {
        inner.issue_credential(address, reports, by).await
    }
    /// In place of [`Broker::revoke_credential`].
    async fn revoke_credential(
        &self,
        inner: &Inner,
        address: &GuestAddress,
        by: Deadline,
    ) -> Result<()> {
        inner.revoke_credential(address, by).await
    }
    /// In place of [`Broker::credentials`].
    async fn credentials(&self, inner: &Inner, by: Deadline) -> Result<Vec<QueueName>> {
        inner.credentials(by).await
    }
    /// In place of [`Broker::close`].
    async fn close(&self, inner: &Inner, by: Deadline) -> Result<()> {
        inner.close(by).await
    }
    /// After a restart, or a start after a kill, with a handle on what is there.
    async fn restarted(&self, _inner: &Inner) {}
    /// Before a handle is opened by way of another address: the deadline that it is given.
    fn connecting(&self, _address: SocketAddr, by: Deadline) -> Deadline {
        by
    }
}

pub(crate) fn wrap(inner: Inner, sabotage: Arc<dyn Sabotage>) -> Arc<dyn Broker> {
    Arc::new(Wrapped { inner, sabotage })
}

#[derive(Debug)]
struct Wrapped {
    inner: Inner,
    sabotage: Arc<dyn Sabotage>,
}

// A method that the trait grows must not go past the saboteurs unseen.
#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl Broker for Wrapped {
    fn backend(&self) -> &'static str {
        self.inner.backend()
    }
    async fn declare(&self, spec: &QueueSpec, by: Deadline) -> Result<Declared> {
        self.sabotage.declare(&self.inner, spec, by).await
    }
    async fn status(&self, queue: &QueueName, by: Deadline) -> Result<QueueStatus> {
        self.sabotage.status(&self.inner, queue, by).await
    }
    async fn list(&self, by: Deadline) -> Result<Vec<QueueStatus>> {
        self.sabotage.list(&self.inner, by).await
    }
    async fn delete(&self, queue: &QueueName, mode: DeleteMode, by: Deadline) -> Result<Discarded> {
        self.sabotage.delete(&self.inner, queue, mode, by).await
    }
    async fn publish(&self, queue: &QueueName, message: Message, by: Deadline) -> Result<Receipt> {
        self.sabotage.publish(&self.inner, queue, message, by).await
    }
    async fn consume(
        &self,
        queue: &QueueName,
        options: ConsumeOptions,
        by: Deadline,
    ) -> Result<Box<dyn Consumer>> {
        self.sabotage.consume(&self.inner, queue, options, by).await
    }
    async fn dead_letters(
        &self,
        queue: &QueueName,
        after: Option<&DeadLetterKey>,
        limit: NonZeroU32,
        by: Deadline,
    ) -> Result<Vec<DeadLetter>> {
        self.sabotage
            .dead_letters(&self.inner, queue, after, limit, by)
            .await
    }
    async fn redrive(&self, queue: &QueueName, key: &DeadLetterKey, by: Deadline) -> Result<bool> {
        self.sabotage.redrive(&self.inner, queue, key, by).await
    }
    async fn request(&self, lane: &GuestAddress, body: Bytes, by: Deadline) -> Result<Bytes> {
        self.sabotage.request(&self.inner, lane, body, by).await
    }
    async fn respond(&self, lane: &GuestAddress, by: Deadline) -> Result<Box<dyn Responder>> {
        self.sabotage.respond(&self.inner, lane, by).await
    }
    async fn durability(&self, by: Deadline) -> Result<DurabilityReport> {
        self.sabotage.durability(&self.inner, by).await
    }
    async fn issue_credential(
        &self,
        address: &GuestAddress,
        reports: &QueueName,
        by: Deadline,
    ) -> Result<GuestCredential> {
        self.sabotage
            .issue_credential(&self.inner, address, reports, by)
            .await
    }
    async fn revoke_credential(&self, address: &GuestAddress, by: Deadline) -> Result<()> {
        self.sabotage
            .revoke_credential(&self.inner, address, by)
            .await
    }
    async fn credentials(&self, by: Deadline) -> Result<Vec<QueueName>> {
        self.sabotage.credentials(&self.inner, by).await
    }
    async fn close(&self, by: Deadline) -> Result<()> {
        self.sabotage.close(&self.inner, by).await
    }
}

/// A boxed future, as a saboteur's closure returns it.
pub(super) type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// What becomes of each delivery.
pub(super) type OnDelivery = Box<dyn FnMut(Delivery) -> Boxed<Result<Delivery>> + Send>;

/// A consumer whose deliveries go through a saboteur's hands.
pub(super) struct Tampered {
    pub(super) inner: Box<dyn Consumer>,
    pub(super) on_delivery: OnDelivery,
}

impl fmt::Debug for Tampered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

#[async_trait]
impl Consumer for Tampered {
    async fn next(&mut self) -> Result<Delivery> {
        let delivery = self.inner.next().await?;
        (self.on_delivery)(delivery).await
    }
    async fn close(self: Box<Self>, by: Deadline) -> Result<()> {
        self.inner.close(by).await
    }
}

/// A consumer whose deliveries are changed by a plain function.
pub(super) fn each(
    inner: Box<dyn Consumer>,
    change: impl Fn(Delivery) -> Delivery + Send + 'static,
) -> Box<dyn Consumer> {
    let on_delivery: OnDelivery = Box::new(move |delivery| {
        let changed = change(delivery);
        Box::pin(async move { Ok(changed) })
    });
    Box::new(Tampered { inner, on_delivery })
}

/// How a lease is settled in a saboteur's hands.
pub(super) type OnSettle =
    Box<dyn FnOnce(Box<dyn Lease>, Settlement, Deadline) -> Boxed<Result<()>> + Send + Sync>;

/// A lease whose settlement goes through a saboteur's hands.
pub(super) struct TamperedLease {
    pub(super) inner: Box<dyn Lease>,
    pub(super) on_settle: OnSettle,
}

impl fmt::Debug for TamperedLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

#[async_trait]
impl Lease for TamperedLease {
    async fn settle(self: Box<Self>, settlement: Settlement, by: Deadline) -> Result<()> {
        let Self { inner, on_settle } = *self;
        on_settle(inner, settlement, by).await
    }
}

/// A consumer whose settlements are done by this function instead.
pub(super) fn settling<F>(
    inner: Box<dyn Consumer>,
    settle: impl Fn(Box<dyn Lease>, Settlement, Deadline) -> F + Clone + Send + Sync + 'static,
) -> Box<dyn Consumer>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    each(inner, move |delivery| {
        let settle = settle.clone();
        let (message, attempt, inner) = delivery.into_parts();
        let on_settle: OnSettle =
            Box::new(move |lease, settlement, by| Box::pin(settle(lease, settlement, by)));
        Delivery::new(
            message,
            attempt,
            Box::new(TamperedLease { inner, on_settle }),
        )
    })
}
