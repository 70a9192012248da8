//! Saboteurs of section Q, and of D.

use std::{
    collections::{HashMap, HashSet},
    num::NonZeroU32,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use wilco::{
    Deadline, Error, ErrorKind, Message, QueueName, Result,
    broker::{
        ConsumeOptions, Consumer, Declared, DeleteMode, Delivery, Discarded, QueueSpec,
        QueueStatus, Receipt,
    },
    durability::{DurabilityReport, Level, Verdict},
};

use super::wrap::{Inner, Sabotage};

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Default)]
pub(super) struct AlwaysCreated;
#[async_trait]
impl Sabotage for AlwaysCreated {
    async fn declare(&self, inner: &Inner, spec: &QueueSpec, by: Deadline) -> Result<Declared> {
        inner.declare(spec, by).await.map(|_| Declared::Created)
    }
}

#[derive(Debug, Default)]
pub(super) struct StatusConsumes;
#[async_trait]
impl Sabotage for StatusConsumes {
    async fn status(&self, inner: &Inner, queue: &QueueName, by: Deadline) -> Result<QueueStatus> {
        if let Ok(mut consumer) = inner.consume(queue, ConsumeOptions::default(), by).await {
            drop(tokio::time::timeout(Duration::from_millis(1), consumer.next()).await);
        }
        inner.status(queue, by).await
    }
}

#[derive(Debug, Default)]
pub(super) struct AnyArgumentsWillDo;
#[async_trait]
impl Sabotage for AnyArgumentsWillDo {
    async fn declare(&self, inner: &Inner, spec: &QueueSpec, by: Deadline) -> Result<Declared> {
        match inner.declare(spec, by).await {
            Err(error) if matches!(error.kind(), ErrorKind::Mismatch { .. }) => {
                Ok(Declared::AlreadyExists)
            }
            declared => declared,
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct OkForAMissingQueue;
#[async_trait]
impl Sabotage for OkForAMissingQueue {
    async fn publish(
        &self,
        inner: &Inner,
        queue: &QueueName,
        message: Message,
        by: Deadline,
    ) -> Result<Receipt> {
        match inner.publish(queue, message, by).await {
            Err(error) if *error.kind() == ErrorKind::NoQueue => Ok(Receipt::new(false)),
            stored => stored,
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct ConsumeMakesTheQueue;
#[async_trait]
impl Sabotage for ConsumeMakesTheQueue {
    async fn consume(
        &self,
        inner: &Inner,
        queue: &QueueName,
        options: ConsumeOptions,
        by: Deadline,
    ) -> Result<Box<dyn Consumer>> {
        match inner.consume(queue, options, by).await {
            Err(error) if *error.kind() == ErrorKind::NoQueue => {
                inner.declare(&QueueSpec::new(queue.clone()), by).await?;
                inner.consume(queue, options, by).await
            }
            consumer => consumer,
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct DeleteNeverRefuses;
#[async_trait]
impl Sabotage for DeleteNeverRefuses {
    async fn delete(
        &self,
        inner: &Inner,
        queue: &QueueName,
        _mode: DeleteMode,
        by: Deadline,
    ) -> Result<Discarded> {
        inner.delete(queue, DeleteMode::Discard, by).await
    }
}

/// What it discards it does not tell.
#[derive(Debug, Default)]
pub(super) struct DiscardsInSilence;
#[async_trait]
impl Sabotage for DiscardsInSilence {
    async fn delete(
        &self,
        inner: &Inner,
        queue: &QueueName,
        mode: DeleteMode,
        by: Deadline,
    ) -> Result<Discarded> {
        let gone = inner.delete(queue, mode, by).await?;
        Ok(Discarded::new(
            gone.messages,
            gone.ids.into_iter().skip(1).collect(),
        ))
    }
}

/// Hides the queue and keeps all that is in it.
#[derive(Debug, Default)]
pub(super) struct LeaksOnDelete {
    hidden: Mutex<HashSet<QueueName>>,
}
#[async_trait]
impl Sabotage for LeaksOnDelete {
    async fn status(&self, inner: &Inner, queue: &QueueName, by: Deadline) -> Result<QueueStatus> {
        if lock(&self.hidden).contains(queue) {
            return Err(Error::new(ErrorKind::NoQueue, "hidden"));
        }
        inner.status(queue, by).await
    }
    async fn delete(
        &self,
        _inner: &Inner,
        queue: &QueueName,
        _mode: DeleteMode,
        _by: Deadline,
    ) -> Result<Discarded> {
        lock(&self.hidden).insert(queue.clone());
        Ok(Discarded::default())
    }
}

/// Takes ids that differ in case for the same.
#[derive(Debug, Default)]
pub(super) struct IgnoresCase;

fn folded(queue: &QueueName) -> QueueName {
    queue
        .as_str()
        .to_lowercase()
        .parse()
        .unwrap_or_else(|_| queue.clone())
}

#[async_trait]
impl Sabotage for IgnoresCase {
    async fn declare(&self, inner: &Inner, spec: &QueueSpec, by: Deadline) -> Result<Declared> {
        let mut spec = spec.clone();
        spec.name = folded(&spec.name);
        inner.declare(&spec, by).await
    }
    async fn publish(
        &self,
        inner: &Inner,
        queue: &QueueName,
        message: Message,
        by: Deadline,
    ) -> Result<Receipt> {
        inner.publish(&folded(queue), message, by).await
    }
}

/// Tells what it told last.
#[derive(Debug, Default)]
pub(super) struct StaleStatus {
    last: Mutex<HashMap<QueueName, QueueStatus>>,
}
#[async_trait]
impl Sabotage for StaleStatus {
    async fn status(&self, inner: &Inner, queue: &QueueName, by: Deadline) -> Result<QueueStatus> {
        let now = inner.status(queue, by).await?;
        let last = lock(&self.last).insert(queue.clone(), now.clone());
        Ok(last.unwrap_or(now))
    }
}

#[derive(Debug, Default)]
pub(super) struct ForgetsOnRestart;
#[async_trait]
impl Sabotage for ForgetsOnRestart {
    async fn restarted(&self, inner: &Inner) {
        let by = Deadline::after(Duration::from_secs(5));
        for status in inner.list(by).await.unwrap_or_default() {
            drop(inner.delete(&status.name, DeleteMode::Discard, by).await);
        }
    }
}

/// Keeps queues over a restart, and loses what was in them.
#[derive(Debug, Default)]
pub(super) struct EmptiesOnRestart;
#[async_trait]
impl Sabotage for EmptiesOnRestart {
    async fn restarted(&self, inner: &Inner) {
        let by = Deadline::after(Duration::from_secs(5));
        for status in inner.list(by).await.unwrap_or_default() {
            let deleted = inner.delete(&status.name, DeleteMode::Discard, by).await;
            let spec = QueueSpec::new(status.name);
            drop((deleted, inner.declare(&spec, by).await));
        }
    }
}

/// Deletes what nobody looked at for a second.
#[derive(Debug, Default)]
pub(super) struct IdleTimer {
    seen: Mutex<HashMap<QueueName, Instant>>,
}
#[async_trait]
impl Sabotage for IdleTimer {
    async fn publish(
        &self,
        inner: &Inner,
        queue: &QueueName,
        message: Message,
        by: Deadline,
    ) -> Result<Receipt> {
        lock(&self.seen).insert(queue.clone(), Instant::now());
        inner.publish(queue, message, by).await
    }
    async fn status(&self, inner: &Inner, queue: &QueueName, by: Deadline) -> Result<QueueStatus> {
        let seen = lock(&self.seen).get(queue).copied();
        if seen.is_some_and(|seen| seen.elapsed() > Duration::from_secs(1)) {
            inner.delete(queue, DeleteMode::Discard, by).await?;
        }
        inner.status(queue, by).await
    }
}

/// Ends a deleted queue's consumer without a word.
#[derive(Debug, Default)]
pub(super) struct SilentEnd;
#[async_trait]
impl Sabotage for SilentEnd {
    async fn consume(
        &self,
        inner: &Inner,
        queue: &QueueName,
        options: ConsumeOptions,
        by: Deadline,
    ) -> Result<Box<dyn Consumer>> {
        Ok(Box::new(Silent(inner.consume(queue, options, by).await?)))
    }
}

#[derive(Debug)]
struct Silent(Box<dyn Consumer>);
#[async_trait]
impl Consumer for Silent {
    async fn next(&mut self) -> Result<Delivery> {
        match self.0.next().await {
            Err(error) if *error.kind() == ErrorKind::QueueDeleted => std::future::pending().await,
            delivery => delivery,
        }
    }
    async fn close(self: Box<Self>, by: Deadline) -> Result<()> {
        self.0.close(by).await
    }
}

/// Makes room in a full queue by dropping the oldest.
#[derive(Debug, Default)]
pub(super) struct DropsTheOldest;
#[async_trait]
impl Sabotage for DropsTheOldest {
    async fn publish(
        &self,
        inner: &Inner,
        queue: &QueueName,
        message: Message,
        by: Deadline,
    ) -> Result<Receipt> {
        loop {
            match inner.publish(queue, message.clone(), by).await {
                Err(error) if *error.kind() == ErrorKind::BrokerRefused => {}
                stored => return stored,
            }
            if let Ok(mut oldest) = inner
                .consume(queue, ConsumeOptions::prefetch(NonZeroU32::MIN), by)
                .await
                && let Ok(Ok(oldest)) =
                    tokio::time::timeout(Duration::from_millis(100), oldest.next()).await
            {
                oldest.ack(by).await?;
            }
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct LiesAboutDurability;
#[async_trait]
impl Sabotage for LiesAboutDurability {
    async fn durability(&self, inner: &Inner, by: Deadline) -> Result<DurabilityReport> {
        let mut report = inner.durability(by).await?;
        report.level = Level::Replicated(3);
        (report.process_crash, report.power_loss) = (Verdict::Safe, Verdict::Safe);
        report.node_loss = Verdict::Safe;
        Ok(report)
    }
}

/// Takes what it does not know for its level.
#[derive(Debug, Default)]
pub(super) struct ClaimsWhatItDoesNotKnow;
#[async_trait]
impl Sabotage for ClaimsWhatItDoesNotKnow {
    async fn durability(&self, inner: &Inner, by: Deadline) -> Result<DurabilityReport> {
        let mut report = inner.durability(by).await?;
        report.level = Level::Power;
        (report.process_crash, report.power_loss) = (Verdict::Safe, Verdict::Unknown);
        Ok(report)
    }
}
