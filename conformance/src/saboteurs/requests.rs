//! Saboteurs of section R.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use wilco::{
    Deadline, Error, ErrorKind, GuestAddress, Message, QueueName, Result,
    broker::{ConsumeOptions, Consumer, Delivery, Request, Responder},
};

use super::wrap::{Inner, Sabotage, each};

/// Writes a saboteur that overrides nothing but the request.
macro_rules! request {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* },
     |$this:ident, $inner:ident, $lane:ident, $body:ident, $by:ident| $does:block) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub(super) struct $name { $($field: $type),* }
        #[async_trait]
        impl Sabotage for $name {
            async fn request(
                &self,
                $inner: &Inner,
                $lane: &GuestAddress,
                $body: Bytes,
                $by: Deadline,
            ) -> Result<Bytes> {
                let $this = self;
                let _ = $this;
                $does
            }
        }
    };
}

request!(
    /// Takes answers for text.
    AnswersAreText {},
    |this, inner, lane, body, by| {
        let answer = inner.request(lane, body, by).await?;
        Ok(String::from_utf8_lossy(&answer).into_owned().into())
    }
);

request!(
    /// Answers for a guest that is not there.
    AnswersForTheDead {},
    |this, inner, lane, body, by| {
        match inner.request(lane, body.clone(), by).await {
            Err(error) if *error.kind() == ErrorKind::NoConsumer => Ok(body),
            answer => answer,
        }
    }
);

request!(
    /// Lets a request to nobody wait for its whole deadline.
    WaitsForNobody {},
    |this, inner, lane, body, by| {
        let answer = inner.request(lane, body, by).await;
        if let Err(error) = &answer
            && *error.kind() == ErrorKind::NoConsumer
        {
            tokio::time::sleep_until(by.instant()).await;
        }
        answer
    }
);

request!(
    /// Takes a silent guest for an absent one.
    SilentIsAbsent {},
    |this, inner, lane, body, by| {
        inner.request(lane, body, by).await.map_err(|error| match error.kind() {
            ErrorKind::ConsumerSilent => Error::new(ErrorKind::NoConsumer, "so it says"),
            _ => error,
        })
    }
);

request!(
    /// Now and then gives a caller the answer of another.
    CrossesAnswers { count: AtomicU64, last: Mutex<Bytes> },
    |this, inner, lane, body, by| {
        let answer = inner.request(lane, body, by).await?;
        let last = {
            let mut last = this.last.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *last, answer.clone())
        };
        let crossed = this.count.fetch_add(1, Ordering::Relaxed) % 50 == 49;
        Ok(if crossed { last } else { answer })
    }
);

request!(
    /// Hands a late answer to whoever asks next.
    LateRepliesArrive { late: AtomicBool },
    |this, inner, lane, body, by| {
        if this.late.swap(false, Ordering::Relaxed) {
            drop(inner.request(lane, body, by).await);
            return Ok("too late".into());
        }
        let answer = inner.request(lane, body, by).await;
        this.late.store(answer.is_err(), Ordering::Relaxed);
        answer
    }
);

request!(
    /// Keeps what was never answered.
    KeepsTheUnanswered { kept: Mutex<Vec<Vec<u8>>> },
    |this, inner, lane, body, by| {
        let kept = [&body[..], &[b'x'; 8192]].concat();
        let answer = inner.request(lane, body, by).await;
        if answer.is_err() {
            this.kept.lock().unwrap_or_else(PoisonError::into_inner).push(kept);
        }
        answer
    }
);

request!(
    /// Has one deadline for the attempt and one more for the next.
    TwoDeadlines {},
    |this, inner, lane, body, by| {
        let limit = by.remaining();
        let answer = inner.request(lane, body.clone(), by).await;
        if answer.is_ok() {
            return answer;
        }
        tokio::time::sleep(limit).await;
        inner.request(lane, body, Deadline::after(limit)).await
    }
);

request!(
    /// Tells every remote error in its own words.
    RewordsErrors {},
    |this, inner, lane, body, by| {
        let answer = inner.request(lane, body, by).await?;
        Ok(if answer.starts_with(b"{\"error\"") { "internal error".into() } else { answer })
    }
);

/// Puts every ping into the durable queue.
#[derive(Debug, Default)]
pub(super) struct PingsThroughTheQueue;
#[async_trait]
impl Sabotage for PingsThroughTheQueue {
    async fn request(
        &self,
        inner: &Inner,
        lane: &GuestAddress,
        body: Bytes,
        by: Deadline,
    ) -> Result<Bytes> {
        drop(
            inner
                .publish(&lane.queue(), Message::new("ping", body.clone())?, by)
                .await,
        );
        inner.request(lane, body, by).await
    }
}

/// A guest that answers pings only between its deliveries.
#[derive(Debug, Default)]
pub(super) struct TooBusyToAnswer {
    busy: Arc<AtomicBool>,
}
#[async_trait]
impl Sabotage for TooBusyToAnswer {
    async fn consume(
        &self,
        inner: &Inner,
        queue: &QueueName,
        options: ConsumeOptions,
        by: Deadline,
    ) -> Result<Box<dyn Consumer>> {
        let busy = Arc::clone(&self.busy);
        let consumer = inner.consume(queue, options, by).await?;
        Ok(each(consumer, move |delivery: Delivery| {
            busy.store(true, Ordering::Relaxed);
            delivery
        }))
    }
    async fn respond(
        &self,
        inner: &Inner,
        lane: &GuestAddress,
        by: Deadline,
    ) -> Result<Box<dyn Responder>> {
        let inner = inner.respond(lane, by).await?;
        Ok(Box::new(Patient {
            inner,
            busy: Arc::clone(&self.busy),
        }))
    }
}

#[derive(Debug)]
struct Patient {
    inner: Box<dyn Responder>,
    busy: Arc<AtomicBool>,
}
#[async_trait]
impl Responder for Patient {
    async fn next(&mut self) -> Result<Request> {
        if self.busy.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        self.inner.next().await
    }
}

/// An asker that goes takes the responder with it.
#[derive(Debug, Default)]
pub(super) struct VanishedAskersKill {
    killed: Arc<AtomicBool>,
}
#[async_trait]
impl Sabotage for VanishedAskersKill {
    async fn request(
        &self,
        inner: &Inner,
        lane: &GuestAddress,
        body: Bytes,
        by: Deadline,
    ) -> Result<Bytes> {
        struct Asking(Arc<AtomicBool>, bool);
        impl Drop for Asking {
            fn drop(&mut self) {
                self.0.fetch_or(self.1, Ordering::Relaxed);
            }
        }
        let mut asking = Asking(Arc::clone(&self.killed), true);
        let answer = inner.request(lane, body, by).await;
        asking.1 = false;
        answer
    }
    async fn respond(
        &self,
        inner: &Inner,
        lane: &GuestAddress,
        by: Deadline,
    ) -> Result<Box<dyn Responder>> {
        let inner = inner.respond(lane, by).await?;
        Ok(Box::new(Mortal {
            inner,
            killed: Arc::clone(&self.killed),
        }))
    }
}

#[derive(Debug)]
struct Mortal {
    inner: Box<dyn Responder>,
    killed: Arc<AtomicBool>,
}
#[async_trait]
impl Responder for Mortal {
    async fn next(&mut self) -> Result<Request> {
        if self.killed.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Closed, "the asker went"));
        }
        self.inner.next().await
    }
}
