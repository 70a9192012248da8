//! A broker in a few hundred lines, in the memory of this process, on the public API alone (law X3).
//!
//! It is the suite's yardstick: where a check fails on it, the check or the contract is wrong, not a
//! database or a socket. It is also what to read before writing a backend: one state behind one lock,
//! each operation a single step on it, and a version number that everybody waits on.

mod consume;
mod requests;
mod state;

use std::{num::NonZeroU32, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;
use wilco::{
    Broker, Deadline, Error, ErrorKind, GuestAddress, Message, Outcome, QueueName, Result,
    broker::{
        ConsumeOptions, Consumer, DeadLetter, DeadLetterKey, Declared, DeleteMode, Discarded,
        QueueSpec, QueueStatus, Receipt, Responder,
    },
    durability::{DurabilityReport, Finding, Level},
};

use state::{Shared, error};

/// The largest body.
const MAX_BODY_BYTES: usize = 64 << 20;

/// One broker; it lives as long as this or any handle on it.
#[derive(Clone, Debug)]
pub struct ReferenceBroker(Arc<Shared>);

impl Default for ReferenceBroker {
    fn default() -> Self {
        Self::new()
    }
}

impl ReferenceBroker {
    /// A new broker with nothing on it.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            state: Default::default(),
            version: watch::Sender::new(0),
        }))
    }

    /// Opens a handle.
    #[must_use]
    pub fn connect(&self) -> Arc<dyn Broker> {
        let id = self.0.change(|state| {
            let id = state.token();
            state.open.insert(id);
            id
        });
        Arc::new(Handle {
            shared: Arc::clone(&self.0),
            id,
        })
    }

    /// Everything that it holds of this queue and its lane, one line each.
    #[must_use]
    pub fn remains(&self, queue: &QueueName) -> Vec<String> {
        self.0.change_quietly(|state| {
            let lanes = state.lanes.keys().filter(|lane| lane.queue() == *queue);
            let mut found: Vec<_> = lanes.map(|lane| format!("the lane {lane:?}")).collect();
            if let Some(queue) = state.queues.get(queue) {
                found.push(format!("the queue {}", queue.spec.name));
                found.extend(queue.messages.keys().map(|seq| format!("message {seq}")));
                found.extend(queue.dead.keys().map(|seq| format!("dead letter {seq}")));
            }
            found
        })
    }

    /// Ends every handle, as a restart does. What is stored stays.
    pub fn restart(&self) {
        self.0.change(|state| {
            for id in std::mem::take(&mut state.open) {
                state.vanish(id);
            }
        });
    }
}

#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    id: u64,
}

impl Handle {
    /// What every operation begins with: an await point, as a real backend has one, the deadline, and
    /// whether this handle is open.
    async fn enter(&self, deadline: Deadline) -> Result<()> {
        tokio::task::yield_now().await;
        if !self
            .shared
            .change_quietly(|state| state.open.contains(&self.id))
        {
            return Err(error(ErrorKind::Closed));
        }
        if deadline.has_passed() {
            return Err(error(ErrorKind::DeadlineExceeded));
        }
        Ok(())
    }
}

#[async_trait]
impl Broker for Handle {
    fn backend(&self) -> &'static str {
        "reference"
    }

    async fn declare(&self, spec: &QueueSpec, deadline: Deadline) -> Result<Declared> {
        self.enter(deadline).await?;
        self.shared
            .change(|state| match state.queues.get(&spec.name) {
                None => {
                    let generation = state.token();
                    state.queues.insert(
                        spec.name.clone(),
                        state::Queue::new(spec.clone(), generation),
                    );
                    Ok(Declared::Created)
                }
                Some(queue) => match queue.spec.differences(spec) {
                    differences if differences.is_empty() => Ok(Declared::AlreadyExists),
                    differences => Err(error(ErrorKind::Mismatch { differences })),
                },
            })
    }

    async fn status(&self, queue: &QueueName, deadline: Deadline) -> Result<QueueStatus> {
        self.enter(deadline).await?;
        self.shared
            .change_quietly(|state| Ok(state.queue(queue)?.status()))
    }

    async fn list(&self, deadline: Deadline) -> Result<Vec<QueueStatus>> {
        self.enter(deadline).await?;
        self.shared
            .change_quietly(|state| Ok(state.queues.values().map(state::Queue::status).collect()))
    }

    async fn delete(
        &self,
        queue: &QueueName,
        mode: DeleteMode,
        deadline: Deadline,
    ) -> Result<Discarded> {
        self.enter(deadline).await?;
        self.shared.change(|state| {
            let held = state.queue(queue)?;
            let messages = held.status().messages();
            if mode == DeleteMode::IfEmpty && messages > 0 {
                return Err(error(ErrorKind::NotEmpty { messages }));
            }
            let ids = held
                .messages
                .values()
                .map(|stored| stored.message.id.clone());
            let ids = ids.take(Discarded::MAX_IDS).collect();
            state.queues.remove(queue);
            Ok(Discarded::new(messages, ids))
        })
    }

    async fn publish(
        &self,
        queue: &QueueName,
        message: Message,
        deadline: Deadline,
    ) -> Result<Receipt> {
        let not_stored = |error: Error| error.with_outcome(Outcome::NotStored);
        self.enter(deadline).await.map_err(not_stored)?;
        if message.body.len() > MAX_BODY_BYTES {
            let limit = MAX_BODY_BYTES as u64;
            return Err(not_stored(error(ErrorKind::TooLarge { limit })));
        }
        let stored = self
            .shared
            .change(|state| state.queue(queue)?.store(message));
        let duplicate = stored.map_err(not_stored)?;
        // The answer is on its way: whoever is dropped here was stored.
        tokio::task::yield_now().await;
        Ok(Receipt::new(duplicate))
    }

    async fn consume(
        &self,
        queue: &QueueName,
        options: ConsumeOptions,
        deadline: Deadline,
    ) -> Result<Box<dyn Consumer>> {
        self.enter(deadline).await?;
        consume::attach(&self.shared, self.id, queue, options)
    }

    async fn dead_letters(
        &self,
        queue: &QueueName,
        after: Option<&DeadLetterKey>,
        limit: NonZeroU32,
        deadline: Deadline,
    ) -> Result<Vec<DeadLetter>> {
        self.enter(deadline).await?;
        let after = after.and_then(|key| key.0.parse::<u64>().ok());
        self.shared.change(|state| {
            let letters = state.queue(queue)?.dead.iter();
            let letters = letters.filter(|(seq, _)| after.is_none_or(|after| **seq > after));
            Ok(letters
                .take(limit.get() as usize)
                .map(|(_, letter)| letter.clone())
                .collect())
        })
    }

    async fn redrive(
        &self,
        queue: &QueueName,
        key: &DeadLetterKey,
        deadline: Deadline,
    ) -> Result<bool> {
        self.enter(deadline).await?;
        self.shared.change(|state| {
            let queue = state.queue(queue)?;
            let letter = key
                .0
                .parse()
                .ok()
                .and_then(|seq: u64| queue.dead.remove(&seq));
            let moved = letter.is_some();
            if let Some(letter) = letter {
                queue.append(letter.message);
            }
            Ok(moved)
        })
    }

    async fn request(&self, lane: &GuestAddress, body: Bytes, deadline: Deadline) -> Result<Bytes> {
        self.enter(deadline).await?;
        requests::request(&self.shared, lane, body, deadline).await
    }

    async fn respond(&self, lane: &GuestAddress, deadline: Deadline) -> Result<Box<dyn Responder>> {
        self.enter(deadline).await?;
        requests::attach(&self.shared, self.id, lane)
    }

    async fn durability(&self, deadline: Deadline) -> Result<DurabilityReport> {
        self.enter(deadline).await?;
        let version = env!("CARGO_PKG_VERSION");
        let mut report = DurabilityReport::new("reference", version, Level::Process);
        report.findings.push(Finding {
            setting: "storage".into(),
            value: Some("memory".into()),
            meaning: "what is stored outlives every handle and its restart".into(),
            advice: Some("use it in tests alone".into()),
        });
        Ok(report)
    }

    async fn close(&self, _deadline: Deadline) -> Result<()> {
        self.shared.change(|state| {
            if state.open.remove(&self.id) {
                state.vanish(self.id);
            }
        });
        Ok(())
    }
}
