//! Consuming and settling.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::time::{Instant, sleep_until};
use wilco::{
    Deadline, ErrorKind, QueueName, Result,
    broker::{ConsumeOptions, Consumer, Delivery, Lease, Settlement},
};

use super::state::{Attached, Place, Shared, State, error};

pub(super) fn attach(
    shared: &Arc<Shared>,
    handle: u64,
    name: &QueueName,
    options: ConsumeOptions,
) -> Result<Box<dyn Consumer>> {
    shared.change(|state| {
        let token = state.token();
        let queue = state.queue(name)?;
        if queue.consumer.is_some() {
            return Err(error(ErrorKind::Conflict));
        }
        queue.consumer = Some(Attached { token, handle });
        Ok(Box::new(Attachment {
            shared: Arc::clone(shared),
            queue: name.clone(),
            generation: queue.generation,
            handle,
            token,
            prefetch: options.prefetch.get() as usize,
        }) as Box<dyn Consumer>)
    })
}

#[derive(Debug)]
struct Attachment {
    shared: Arc<Shared>,
    queue: QueueName,
    generation: u64,
    handle: u64,
    token: u64,
    prefetch: usize,
}

/// What a look at the queue gave.
enum Look {
    Delivery(Box<Delivery>),
    Until(Option<Instant>),
}

impl Attachment {
    /// Takes the first message that is due, if there is room for it.
    fn look(&self, state: &mut State) -> Result<Look> {
        if !state.open.contains(&self.handle) {
            return Err(error(ErrorKind::Closed));
        }
        let lease = state.token();
        let deleted = || error(ErrorKind::QueueDeleted);
        let queue = state.queues.get_mut(&self.queue).ok_or_else(deleted)?;
        if queue.generation != self.generation {
            return Err(deleted());
        }
        let held = queue.messages.values().filter(
            |stored| matches!(stored.place, Place::Held { consumer, .. } if consumer == self.token),
        );
        if held.count() >= self.prefetch {
            return Ok(Look::Until(None));
        }
        let now = Instant::now();
        let mut next = None;
        for (seq, stored) in &mut queue.messages {
            let Place::Due(due) = stored.place else {
                continue;
            };
            if due > now {
                next = Some(next.map_or(due, |next: Instant| next.min(due)));
                continue;
            }
            stored.attempts += 1;
            stored.place = Place::Held {
                lease,
                consumer: self.token,
                handle: self.handle,
            };
            let held = Held {
                shared: Arc::clone(&self.shared),
                queue: self.queue.clone(),
                generation: self.generation,
                handle: self.handle,
                seq: *seq,
                lease,
            };
            let delivery = Delivery::new(stored.message.clone(), stored.attempts, Box::new(held));
            return Ok(Look::Delivery(Box::new(delivery)));
        }
        Ok(Look::Until(next))
    }
}

#[async_trait]
impl Consumer for Attachment {
    async fn next(&mut self) -> Result<Delivery> {
        let mut version = self.shared.version.subscribe();
        loop {
            let due = match self.shared.change_quietly(|state| self.look(state))? {
                Look::Delivery(delivery) => return Ok(*delivery),
                Look::Until(due) => due,
            };
            let due = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = version.changed() => {}
                () = due => {}
            }
        }
    }

    async fn close(self: Box<Self>, _deadline: Deadline) -> Result<()> {
        Ok(())
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.shared.change(|state| {
            if let Ok(queue) = state.queue(&self.queue)
                && queue
                    .consumer
                    .is_some_and(|consumer| consumer.token == self.token)
            {
                queue.consumer = None;
            }
        });
    }
}

#[derive(Debug)]
struct Held {
    shared: Arc<Shared>,
    queue: QueueName,
    generation: u64,
    handle: u64,
    seq: u64,
    lease: u64,
}

impl Held {
    /// Ends the lease, if it is this one's still: none is settled by another's.
    fn end(&self, state: &mut State, settlement: Settlement) -> Result<()> {
        if !state.open.contains(&self.handle) {
            return Err(error(ErrorKind::Closed));
        }
        let lost = || error(ErrorKind::LeaseLost);
        let queue = state.queues.get_mut(&self.queue).ok_or_else(lost)?;
        let stored = queue.messages.get(&self.seq).ok_or_else(lost)?;
        let ours = matches!(stored.place, Place::Held { lease, .. } if lease == self.lease);
        if !ours || queue.generation != self.generation {
            return Err(lost());
        }
        match settlement {
            Settlement::Ack => drop(queue.messages.remove(&self.seq)),
            Settlement::Retry(delay) => queue.give_back(self.seq, Instant::now() + delay),
            Settlement::DeadLetter(reason) => queue.bury(self.seq, reason),
        }
        Ok(())
    }
}

#[async_trait]
impl Lease for Held {
    async fn settle(self: Box<Self>, settlement: Settlement, deadline: Deadline) -> Result<()> {
        tokio::task::yield_now().await;
        if deadline.has_passed() {
            return Err(error(ErrorKind::DeadlineExceeded));
        }
        self.shared.change(|state| self.end(state, settlement))?;
        tokio::task::yield_now().await;
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // After a settlement this finds a lease that is not its own any more, and does nothing.
        let _ = self
            .shared
            .change(|state| self.end(state, Settlement::Retry(Default::default())));
    }
}
