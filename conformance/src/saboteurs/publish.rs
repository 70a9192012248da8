//! Saboteurs of section P.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use wilco::{
    Deadline, Error, ErrorKind, Headers, Message, MessageId, Outcome, QueueName, Result,
    broker::Receipt,
};

use super::wrap::{Inner, Sabotage};

/// Writes a saboteur that overrides nothing but the publish.
macro_rules! publish {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* },
     |$this:ident, $inner:ident, $queue:ident, $message:ident, $by:ident| $body:block) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub(super) struct $name { $($field: $type),* }
        #[async_trait]
        impl Sabotage for $name {
            #[allow(unused_mut)]
            async fn publish(
                &self,
                $inner: &Inner,
                $queue: &QueueName,
                mut $message: Message,
                $by: Deadline,
            ) -> Result<Receipt> {
                let $this = self;
                $body
            }
        }
    };
}

publish!(
    /// Every hundredth is confirmed and never stored.
    LosesOneInAHundred { count: AtomicU64 },
    |this, inner, queue, message, by| {
        if this.count.fetch_add(1, Ordering::Relaxed) % 100 == 99 {
            // A missing queue is still told: only what could be stored is lost.
            inner.status(queue, by).await?;
            return Ok(Receipt::new(false));
        }
        inner.publish(queue, message, by).await
    }
);

publish!(
    /// Says Ok at once and stores a moment later.
    ConfirmsBeforeItStores {},
    |_this, inner, queue, message, by| {
        inner.status(queue, by).await?;
        let (inner, queue) = (Arc::clone(inner), queue.clone());
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            drop(inner.publish(&queue, message, by).await);
        });
        Ok(Receipt::new(false))
    }
);

publish!(
    /// Reports a refusal as a success.
    RefusedIsOk {},
    |_this, inner, queue, message, by| {
        match inner.publish(queue, message, by).await {
            Err(error) if *error.kind() == ErrorKind::BrokerRefused => Ok(Receipt::new(false)),
            stored => stored,
        }
    }
);

publish!(
    /// Knows that a message was refused and does not say so.
    RefusedIsUnknown {},
    |_this, inner, queue, message, by| {
        let stored = inner.publish(queue, message, by).await;
        stored.map_err(|error| error.with_outcome(Outcome::Unknown))
    }
);

publish!(
    /// Notes an id before it stores the message: what was cut off in between is taken for stored.
    TakesTheIdForTheMessage { ids: Mutex<HashSet<MessageId>> },
    |this, inner, queue, message, by| {
        let new = this.ids.lock().unwrap_or_else(PoisonError::into_inner).insert(message.id.clone());
        if !new {
            return Ok(Receipt::new(true));
        }
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        inner.publish(queue, message, by).await
    }
);

publish!(
    /// Every tenth is stored and reported as not stored.
    NotStoredIsStored { count: AtomicU64 },
    |this, inner, queue, message, by| {
        let stored = inner.publish(queue, message, by).await?;
        if this.count.fetch_add(1, Ordering::Relaxed) % 10 == 9 {
            let error = Error::new(ErrorKind::BrokerRefused, "so it says");
            return Err(error.with_outcome(Outcome::NotStored));
        }
        Ok(stored)
    }
);

publish!(
    /// A publish that is cut off leaves the channel broken for the next one.
    ACutBreaksTheNext { broken: Arc<AtomicBool> },
    |this, inner, queue, message, by| {
        struct Cut(Arc<AtomicBool>, bool);
        impl Drop for Cut {
            fn drop(&mut self) {
                self.0.store(self.1, Ordering::Relaxed);
            }
        }
        if this.broken.swap(false, Ordering::Relaxed) {
            let error = Error::new(ErrorKind::BrokerUnreachable, "the channel is broken");
            return Err(error.with_outcome(Outcome::NotStored));
        }
        let mut cut = Cut(Arc::clone(&this.broken), true);
        let stored = inner.publish(queue, message, by).await;
        cut.1 = false;
        stored
    }
);

publish!(
    /// A cut publish is stored twice when it is sent again, though it says that it had it.
    RecognisesAndStoresAgain { ids: Mutex<HashSet<MessageId>> },
    |this, inner, queue, message, by| {
        let new = this.ids.lock().unwrap_or_else(PoisonError::into_inner).insert(message.id.clone());
        if new {
            return inner.publish(queue, message, by).await;
        }
        let mut copy = message.clone();
        copy.id = MessageId::generate();
        inner.publish(queue, copy, by).await?;
        inner.publish(queue, message, by).await
    }
);

publish!(
    /// Loses the headers on the way.
    DropsHeaders {},
    |_this, inner, queue, message, by| {
        message.headers = Headers::new();
        inner.publish(queue, message, by).await
    }
);

publish!(
    /// Takes bodies for text.
    BodiesAreText {},
    |_this, inner, queue, message, by| {
        message.body = String::from_utf8_lossy(&message.body).into_owned().into();
        inner.publish(queue, message, by).await
    }
);

publish!(
    /// Cuts what is too large for it.
    CutsLargeBodies {},
    |_this, inner, queue, message, by| {
        message.body.truncate(1 << 20);
        inner.publish(queue, message, by).await
    }
);

publish!(
    /// Every fiftieth answer goes to the wrong message.
    MixesUpAnswers { count: AtomicU64 },
    |this, inner, queue, message, by| {
        let stored = inner.publish(queue, message, by).await;
        if this.count.fetch_add(1, Ordering::Relaxed) % 50 == 49 && stored.is_err() {
            return Ok(Receipt::new(false));
        }
        stored
    }
);

publish!(
    /// Every tenth is overtaken by the one after it.
    Overtakes { slot: Mutex<Option<(QueueName, Message)>>, count: AtomicU64 },
    |this, inner, queue, message, by| {
        let held = this.slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        if held.is_none() && this.count.fetch_add(1, Ordering::Relaxed).is_multiple_of(10) {
            let mut slot = this.slot.lock().unwrap_or_else(PoisonError::into_inner);
            *slot = Some((queue.clone(), message));
            return Ok(Receipt::new(false));
        }
        let stored = inner.publish(queue, message, by).await;
        if let Some((queue, message)) = held {
            inner.publish(&queue, message, by).await?;
        }
        stored
    }
);

publish!(
    /// Waits as long as it likes.
    IgnoresTheDeadline {},
    |_this, inner, queue, message, by| {
        if by.remaining() < Duration::from_millis(100) {
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        inner.publish(queue, message, by).await
    }
);

publish!(
    /// Every twentieth message lands in another queue.
    DeliversToTheNeighbour { last: Mutex<Option<QueueName>>, count: AtomicU64 },
    |this, inner, queue, message, by| {
        let last = this
            .last
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .replace(queue.clone());
        let wrong = this.count.fetch_add(1, Ordering::Relaxed) % 20 == 19;
        match last {
            Some(last) if wrong && last != *queue => inner.publish(&last, message, by).await,
            _ => inner.publish(queue, message, by).await,
        }
    }
);
