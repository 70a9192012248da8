//! Saboteurs of section C that change who gets what, and when.

use std::{
    collections::HashMap,
    fmt,
    num::NonZeroU32,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use wilco::{
    Deadline, ErrorKind, QueueName, Result,
    broker::{ConsumeOptions, Consumer, DeadLetter, DeadLetterKey, Declared, Delivery, QueueSpec},
};

use super::wrap::{Inner, Sabotage, each};

/// Writes a saboteur that overrides nothing but consume.
macro_rules! consume {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* },
     |$this:ident, $inner:ident, $queue:ident, $options:ident, $by:ident| $body:block) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub(super) struct $name { $($field: $type),* }
        #[async_trait]
        impl Sabotage for $name {
            async fn consume(
                &self,
                $inner: &Inner,
                $queue: &QueueName,
                $options: ConsumeOptions,
                $by: Deadline,
            ) -> Result<Box<dyn Consumer>> {
                let $this = self;
                let _ = $this;
                $body
            }
        }
    };
}
pub(super) use consume;

consume!(
    /// Every delivery says that it is the first.
    AlwaysTheFirst {},
    |this, inner, queue, options, by| {
        Ok(each(inner.consume(queue, options, by).await?, |mut delivery| {
            delivery.attempt = 1;
            delivery
        }))
    }
);

consume!(
    /// Hands out ten times as many as asked for.
    IgnoresPrefetch {},
    |this, inner, queue, options, by| {
        let more = ConsumeOptions::prefetch(options.prefetch.saturating_mul(TEN));
        inner.consume(queue, more, by).await
    }
);
const TEN: NonZeroU32 = NonZeroU32::new(10).expect("not zero");

consume!(
    /// What a consumer has buffered counts as delivered.
    CountsTheBuffer { seen: Arc<Mutex<HashMap<String, u32>>> },
    |this, inner, queue, options, by| {
        // Each attach counts for all that waits, whether it is handed out or not.
        let seen = Arc::clone(&this.seen);
        let extra = {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            let attached = seen.entry(queue.to_string()).or_default();
            *attached += 1;
            *attached - 1
        };
        Ok(each(inner.consume(queue, options, by).await?, move |mut delivery| {
            delivery.attempt += extra;
            delivery
        }))
    }
);

consume!(
    /// Hands out in pairs, the second first.
    SwapsNeighbours {},
    |this, inner, queue, options, by| {
        let inner = inner.consume(queue, options, by).await?;
        Ok(Box::new(Swapping { inner, first: None }) as Box<dyn Consumer>)
    }
);

#[derive(Debug)]
struct Swapping {
    inner: Box<dyn Consumer>,
    first: Option<Delivery>,
}
#[async_trait]
impl Consumer for Swapping {
    async fn next(&mut self) -> Result<Delivery> {
        if let Some(first) = self.first.take() {
            return Ok(first);
        }
        let first = self.inner.next().await?;
        match tokio::time::timeout(Duration::from_millis(20), self.inner.next()).await {
            Ok(Ok(second)) => {
                self.first = Some(first);
                Ok(second)
            }
            _ => Ok(first),
        }
    }
    async fn close(self: Box<Self>, by: Deadline) -> Result<()> {
        self.inner.close(by).await
    }
}

consume!(
    /// Lets everybody attach, and serves one.
    TellsNobody {},
    |this, inner, queue, options, by| {
        match inner.consume(queue, options, by).await {
            Err(error) if *error.kind() == ErrorKind::Conflict => Ok(Box::new(Never)),
            consumer => consumer,
        }
    }
);

#[derive(Debug)]
struct Never;
#[async_trait]
impl Consumer for Never {
    async fn next(&mut self) -> Result<Delivery> {
        std::future::pending().await
    }
    async fn close(self: Box<Self>, _by: Deadline) -> Result<()> {
        Ok(())
    }
}

consume!(
    /// Begins with what comes after the attach: what waited is gone.
    BeginsWithTheNext {},
    |this, inner, queue, options, by| {
        let waiting = inner.status(queue, by).await?.ready;
        let mut consumer = inner.consume(queue, options, by).await?;
        for _ in 0..waiting {
            consumer.next().await?.ack(by).await?;
        }
        Ok(consumer)
    }
);

/// Forgets the delivery limit: poison comes for ever.
#[derive(Debug, Default)]
pub(super) struct ForgetsTheLimit;
#[async_trait]
impl Sabotage for ForgetsTheLimit {
    async fn declare(&self, inner: &Inner, spec: &QueueSpec, by: Deadline) -> Result<Declared> {
        let spec = spec.clone().with_delivery_limit(NonZeroU32::MAX);
        inner.declare(&spec, by).await
    }
}

/// Sends a dead letter back and keeps it too.
#[derive(Debug, Default)]
pub(super) struct RedriveCopies;
#[async_trait]
impl Sabotage for RedriveCopies {
    async fn redrive(
        &self,
        inner: &Inner,
        queue: &QueueName,
        key: &DeadLetterKey,
        by: Deadline,
    ) -> Result<bool> {
        let letters = inner.dead_letters(queue, None, NonZeroU32::MAX, by).await?;
        let Some(letter) = letters.into_iter().find(|letter| letter.key == *key) else {
            return Ok(false);
        };
        inner.publish(queue, letter.message, by).await?;
        Ok(true)
    }
}

/// Keeps dead letters and forgets why they are there.
#[derive(Debug, Default)]
pub(super) struct ForgetsTheReason;
#[async_trait]
impl Sabotage for ForgetsTheReason {
    async fn dead_letters(
        &self,
        inner: &Inner,
        queue: &QueueName,
        after: Option<&DeadLetterKey>,
        limit: NonZeroU32,
        by: Deadline,
    ) -> Result<Vec<DeadLetter>> {
        let mut letters = inner.dead_letters(queue, after, limit, by).await?;
        for letter in &mut letters {
            letter.reason = String::new();
        }
        Ok(letters)
    }
}

consume!(
    /// Acks one in fifty of what is delivered before anybody could: what the ledger calls lost.
    SkipsOneInFifty { count: Arc<AtomicU64> },
    |this, inner, queue, options, by| {
        let count = Arc::clone(&this.count);
        Ok(dropping(inner.consume(queue, options, by).await?, move |delivery| {
            let drain = delivery.message.id.as_str().starts_with("last-");
            !drain && count.fetch_add(1, Ordering::Relaxed) % 50 == 49
        }))
    }
);

/// A consumer that acks some of its deliveries and hands them to nobody.
pub(super) fn dropping(
    inner: Box<dyn Consumer>,
    drops: impl Fn(&Delivery) -> bool + Send + 'static,
) -> Box<dyn Consumer> {
    let drops = Box::new(drops);
    Box::new(Dropping { inner, drops })
}

struct Dropping {
    inner: Box<dyn Consumer>,
    drops: Box<dyn Fn(&Delivery) -> bool + Send>,
}

impl fmt::Debug for Dropping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

#[async_trait]
impl Consumer for Dropping {
    async fn next(&mut self) -> Result<Delivery> {
        loop {
            let delivery = self.inner.next().await?;
            if !(self.drops)(&delivery) {
                return Ok(delivery);
            }
            delivery
                .ack(Deadline::after(Duration::from_secs(5)))
                .await?;
        }
    }
    async fn close(self: Box<Self>, by: Deadline) -> Result<()> {
        self.inner.close(by).await
    }
}
