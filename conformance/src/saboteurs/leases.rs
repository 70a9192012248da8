//! Saboteurs of section C that settle otherwise than they were told.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use wilco::{
    Deadline, QueueName, Result,
    broker::{ConsumeOptions, Consumer, Delivery, Lease, Settlement},
};

use super::{
    consume::consume,
    wrap::{Boxed, Inner, OnDelivery, Sabotage, Tampered, each, settling},
};

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(5))
}

/// A lease that was settled already, or never will be.
#[derive(Debug)]
struct Settled;
#[async_trait]
impl Lease for Settled {
    async fn settle(self: Box<Self>, _settlement: Settlement, _by: Deadline) -> Result<()> {
        Ok(())
    }
}

consume!(
    /// Acks at receive: whoever dies with it in hand has lost it.
    AcksEarly {},
    |this, inner, queue, options, by| {
        let inner = inner.consume(queue, options, by).await?;
        let on_delivery: OnDelivery = Box::new(|delivery: Delivery| -> Boxed<Result<Delivery>> {
            Box::pin(async move {
                let (message, attempt, lease) = delivery.into_parts();
                lease.settle(Settlement::Ack, soon()).await?;
                Ok(Delivery::new(message, attempt, Box::new(Settled)))
            })
        });
        Ok(Box::new(Tampered { inner, on_delivery }) as Box<dyn Consumer>)
    }
);

consume!(
    /// Says Ok to an ack and gives the message back.
    ForgetsAcks {},
    |this, inner, queue, options, by| {
        let inner = inner.consume(queue, options, by).await?;
        Ok(settling(inner, |lease: Box<dyn Lease>, settlement, by| async move {
            let settlement = match settlement {
                Settlement::Ack => Settlement::Retry(Duration::ZERO),
                other => other,
            };
            lease.settle(settlement, by).await
        }))
    }
);

consume!(
    /// Says Ok to every fiftieth ack and gives the message back.
    ForgetsOneAckInFifty { count: Arc<AtomicU64> },
    |this, inner, queue, options, by| {
        let count = Arc::clone(&this.count);
        let inner = inner.consume(queue, options, by).await?;
        Ok(settling(
            inner,
            move |lease: Box<dyn Lease>, settlement, by| {
                let forgets = count.fetch_add(1, Ordering::Relaxed) % 50 == 49;
                let settlement = match settlement {
                    Settlement::Ack if forgets => Settlement::Retry(Duration::ZERO),
                    other => other,
                };
                async move { lease.settle(settlement, by).await }
            },
        ))
    }
);

consume!(
    /// Says Ok whatever came of the ack.
    AckIsAlwaysOk {},
    |this, inner, queue, options, by| {
        let inner = inner.consume(queue, options, by).await?;
        Ok(settling(inner, |lease: Box<dyn Lease>, settlement, by| async move {
            drop(lease.settle(settlement, by).await);
            Ok(())
        }))
    }
);

consume!(
    /// Where the broker does not answer at once, says Ok to an ack and lets it be.
    AckOverACutIsOk {},
    |this, inner, queue, options, by| {
        let (broker, queue) = (Arc::clone(inner), queue.clone());
        let consumer = broker.consume(&queue, options, by).await?;
        Ok(settling(consumer, move |lease: Box<dyn Lease>, settlement, by| {
            let (broker, queue) = (Arc::clone(&broker), queue.clone());
            async move {
                let at_once = Deadline::after(Duration::from_millis(1));
                if broker.status(&queue, at_once).await.is_err() {
                    drop(lease);
                    return Ok(());
                }
                lease.settle(settlement, by).await
            }
        }))
    }
);

consume!(
    /// Sends acks off and says Ok before they arrive: a close loses the last of them.
    AcksLazily { last: Arc<Mutex<Option<Box<dyn Lease>>>> },
    |this, inner, queue, options, by| {
        let last = Arc::clone(&this.last);
        let inner = inner.consume(queue, options, by).await?;
        Ok(settling(inner, move |lease: Box<dyn Lease>, settlement, by| {
            let last = Arc::clone(&last);
            async move {
                if settlement != Settlement::Ack {
                    return lease.settle(settlement, by).await;
                }
                let before = last.lock().unwrap_or_else(PoisonError::into_inner).replace(lease);
                if let Some(before) = before {
                    drop(before.settle(Settlement::Ack, by).await);
                }
                Ok(())
            }
        }))
    }
);

consume!(
    /// A handle of a lost lease settles whatever is in hand instead.
    ReusesHandles { held: Arc<Mutex<Vec<SharedLease>>> },
    |this, inner, queue, options, by| {
        let held = Arc::clone(&this.held);
        let consumer = inner.consume(queue, options, by).await?;
        Ok(each(consumer, move |delivery| {
            let (message, attempt, lease) = delivery.into_parts();
            let lease = SharedLease::new(lease);
            held.lock().unwrap_or_else(PoisonError::into_inner).push(lease.clone());
            let lease = Reusing { own: lease, held: Arc::clone(&held) };
            Delivery::new(message, attempt, Box::new(lease))
        }))
    }
);

/// A lease in several hands.
#[derive(Clone)]
struct SharedLease(Arc<Mutex<Option<Box<dyn Lease>>>>);

impl SharedLease {
    fn new(lease: Box<dyn Lease>) -> Self {
        Self(Arc::new(Mutex::new(Some(lease))))
    }
    fn take(&self) -> Option<Box<dyn Lease>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl fmt::Debug for SharedLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a lease in several hands")
    }
}

#[derive(Debug)]
struct Reusing {
    own: SharedLease,
    held: Arc<Mutex<Vec<SharedLease>>>,
}

#[async_trait]
impl Lease for Reusing {
    async fn settle(self: Box<Self>, settlement: Settlement, by: Deadline) -> Result<()> {
        if let Some(lease) = self.own.take()
            && lease.settle(settlement.clone(), by).await.is_ok()
        {
            return Ok(());
        }
        loop {
            let next = self
                .held
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop();
            let Some(next) = next else { return Ok(()) };
            if let Some(lease) = next.take()
                && lease.settle(settlement.clone(), by).await.is_ok()
            {
                return Ok(());
            }
        }
    }
}

impl Drop for Reusing {
    fn drop(&mut self) {
        drop(self.own.take());
    }
}

consume!(
    /// Takes a message from its handler after a while.
    LeasesExpire {},
    |this, inner, queue, options, by| {
        let consumer = inner.consume(queue, options, by).await?;
        Ok(each(consumer, |delivery| {
            let (message, attempt, lease) = delivery.into_parts();
            let lease = SharedLease::new(lease);
            let own = lease.clone();
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(300)).await;
                drop(lease.take());
            });
            let held = Arc::default();
            Delivery::new(message, attempt, Box::new(Reusing { own, held }))
        }))
    }
);

consume!(
    /// Delivers again at once, whatever delay was asked for.
    RetriesTooEarly {},
    |this, inner, queue, options, by| {
        let inner = inner.consume(queue, options, by).await?;
        Ok(settling(inner, |lease: Box<dyn Lease>, settlement, by| async move {
            let settlement = match settlement {
                Settlement::Retry(delay) => Settlement::Retry(delay / 2),
                other => other,
            };
            lease.settle(settlement, by).await
        }))
    }
);

consume!(
    /// Takes a retry for an ack.
    SwallowsRetries {},
    |this, inner, queue, options, by| {
        let inner = inner.consume(queue, options, by).await?;
        Ok(settling(inner, |lease: Box<dyn Lease>, settlement, by| async move {
            let settlement = match settlement {
                Settlement::Retry(_) => Settlement::Ack,
                other => other,
            };
            lease.settle(settlement, by).await
        }))
    }
);

consume!(
    /// Drops what is rejected.
    DropsTheRejected {},
    |this, inner, queue, options, by| {
        let inner = inner.consume(queue, options, by).await?;
        Ok(settling(inner, |lease: Box<dyn Lease>, settlement, by| async move {
            let settlement = match settlement {
                Settlement::DeadLetter(_) => Settlement::Ack,
                other => other,
            };
            lease.settle(settlement, by).await
        }))
    }
);

consume!(
    /// Acks what is dropped unsettled.
    DroppingAcks {},
    |this, inner, queue, options, by| {
        let consumer = inner.consume(queue, options, by).await?;
        Ok(each(consumer, |delivery| {
            let (message, attempt, lease) = delivery.into_parts();
            Delivery::new(message, attempt, Box::new(AcksOnDrop(Some(lease))))
        }))
    }
);

#[derive(Debug)]
struct AcksOnDrop(Option<Box<dyn Lease>>);
#[async_trait]
impl Lease for AcksOnDrop {
    async fn settle(mut self: Box<Self>, settlement: Settlement, by: Deadline) -> Result<()> {
        match self.0.take() {
            Some(lease) => lease.settle(settlement, by).await,
            None => Ok(()),
        }
    }
}
impl Drop for AcksOnDrop {
    fn drop(&mut self) {
        if let Some(lease) = self.0.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move { lease.settle(Settlement::Ack, soon()).await });
        }
    }
}

/// Settles on its own account: an ack that was never sent is done all the same.
#[derive(Debug, Default)]
pub(super) struct AcksUnasked;
#[async_trait]
impl Sabotage for AcksUnasked {
    async fn consume(
        &self,
        inner: &Inner,
        queue: &QueueName,
        options: ConsumeOptions,
        by: Deadline,
    ) -> Result<Box<dyn Consumer>> {
        DroppingAcks::default()
            .consume(inner, queue, options, by)
            .await
    }
}
