//! Storing a message, and the gate before a queue with a limit.
//!
//! RabbitMQ's own limit is not exact: it counts what is ready alone, and refuses late. So whoever
//! publishes to a limited queue takes the queue's gate, counts, and lets in as many as there is room
//! for (law Q12). A limited queue is bound under a name that says its limit: a publisher that does not
//! know of the limit, or of another one, is told by the message's return.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex},
};

use tokio::sync::oneshot;

use super::{
    connection::{AGAIN, Core},
    fault::Fault,
    late, letter, lock, lockqueue, no_queue,
    post::{Answer, Letter, Ticket},
    status, topology,
};
use crate::{
    broker::Receipt,
    deadline::Deadline,
    error::{Error, ErrorKind, Outcome, Result},
    message::Message,
    names::QueueName,
};

/// The largest body: what RabbitMQ 4 takes unless told otherwise; older ones take more.
pub(super) const MAX_BODY_BYTES: usize = 16 * 1024 * 1024;

/// The name that a queue is bound under.
pub(super) fn routing_key(queue: &QueueName, max_messages: Option<u64>) -> String {
    match max_messages {
        None => queue.to_string(),
        Some(most) => format!("{queue}.max.{most}"),
    }
}

pub(super) async fn publish(
    core: &Arc<Core>,
    queue: &QueueName,
    message: Message,
    deadline: Deadline,
) -> Result<Receipt> {
    core.open()?;
    if message.body.len() > MAX_BODY_BYTES {
        let limit = MAX_BODY_BYTES as u64;
        return Err(Error::new(
            ErrorKind::TooLarge { limit },
            format!(
                "a body has at most {limit} bytes here, this one has {}",
                message.body.len()
            ),
        ));
    }
    let publishing = store(core, queue, &message, deadline);
    tokio::select! {
        biased;
        stored = publishing => stored.map(|()| Receipt::new(false)),
        // It may be on its way.
        () = core.until_closed() => Err(super::closed().with_outcome(Outcome::Unknown)),
    }
}

/// Stores a copy of a message, over as many connections as it takes until the deadline.
pub(super) async fn store(
    core: &Arc<Core>,
    queue: &QueueName,
    message: &Message,
    deadline: Deadline,
) -> Result<()> {
    // Whether an earlier copy may be there: then no later refusal says that none is.
    let mut outcome = Outcome::NotStored;
    let (mut refusals, mut waits) = (0, 0);
    loop {
        let limit = core.gates.limit(queue);
        let answer = match limit {
            None => {
                let letter = copy(core, queue, None, message);
                core.outbox.publish(letter, deadline).await
            }
            Some(most) => core.gates.enter(core, queue, most, message, deadline).await,
        };
        match answer {
            Answer::Stored => return Ok(()),
            Answer::Returned => {
                // Who has looked once what the queue is like needs only to know that it is there.
                let there = if waits == 0 {
                    find(core, queue, deadline).await
                } else {
                    exists(core, queue, limit, deadline).await
                };
                match there.map_err(|error| error.with_outcome(outcome))? {
                    None => return Err(no_queue().with_outcome(outcome)),
                    Some(found) if found == limit => {
                        // Its binding is not there: it is being deleted, or made, at this moment.
                        waits = (waits + 1).min(25);
                        let again = deadline.bound(tokio::time::sleep(AGAIN * waits)).await;
                        again.map_err(|error| error.with_outcome(outcome))?;
                    }
                    Some(found) => core.gates.learn(queue, found),
                }
            }
            // Without a limit nothing is refused for being too much: the queue has no leader for a moment,
            // or is being deleted.
            Answer::Refused if limit.is_none() => {
                refusals = (refusals + 1).min(8);
                let there = find(core, queue, deadline).await;
                if there
                    .map_err(|error| error.with_outcome(outcome))?
                    .is_none()
                {
                    return Err(no_queue().with_outcome(outcome));
                }
                let again = deadline.bound(tokio::time::sleep(AGAIN * refusals)).await;
                again.map_err(|error| error.with_outcome(outcome))?;
            }
            Answer::Refused => {
                let text = "the queue is full: it was made for no more messages";
                return Err(Error::new(ErrorKind::BrokerRefused, text).with_outcome(outcome));
            }
            Answer::Lost => outcome = Outcome::Unknown,
            Answer::Late => {
                let error = core.post_obstacle().unwrap_or_else(late);
                return Err(error.with_outcome(Outcome::Unknown));
            }
            Answer::NotSent => {
                let error = core.post_obstacle().unwrap_or_else(late);
                return Err(error.with_outcome(outcome));
            }
        }
    }
}

/// One more copy of a message, for this queue.
fn copy(core: &Core, queue: &QueueName, limit: Option<u64>, message: &Message) -> Letter {
    let key = core.copy_name();
    Letter {
        exchange: core.messages(),
        to: routing_key(queue, limit),
        mandatory: true,
        properties: letter::properties(message, &key, None),
        key,
        body: message.body.clone(),
    }
}

/// Whether the queue is there after all, and with which limit.
async fn find(
    core: &Arc<Core>,
    queue: &QueueName,
    deadline: Deadline,
) -> Result<Option<Option<u64>>> {
    let name = queue.clone();
    core.run(deadline, move |core, wire| {
        let name = name.clone();
        async move {
            if core.own.is_some() {
                // It may not ask what the queue is like; reports have no limit.
                return Ok(topology::counts(&wire, &name).await?.map(|_| None));
            }
            let found = topology::probe_there(&wire, &name).await?;
            Ok(found.map(|found| found.max_messages))
        }
    })
    .await
}

/// The same, for one that was found with this limit already.
async fn exists(
    core: &Arc<Core>,
    queue: &QueueName,
    limit: Option<u64>,
    deadline: Deadline,
) -> Result<Option<Option<u64>>> {
    let name = queue.clone();
    core.run(deadline, move |_, wire| {
        let name = name.clone();
        async move { Ok(topology::counts(&wire, &name).await?.map(|_| limit)) }
    })
    .await
}

/// The gates of this handle.
#[derive(Debug, Default)]
pub(super) struct Gates {
    limits: Mutex<HashMap<QueueName, u64>>,
    gates: Mutex<HashMap<QueueName, VecDeque<Entering>>>,
}

/// A message before a gate.
#[derive(Debug)]
struct Entering {
    message: Message,
    ticket: Ticket,
    answer: oneshot::Sender<Answer>,
    deadline: Deadline,
}

impl Gates {
    pub(super) fn limit(&self, queue: &QueueName) -> Option<u64> {
        lock(&self.limits).get(queue).copied()
    }

    pub(super) fn learn(&self, queue: &QueueName, limit: Option<u64>) {
        let mut limits = lock(&self.limits);
        match limit {
            Some(limit) => limits.insert(queue.clone(), limit),
            None => limits.remove(queue),
        };
    }

    async fn enter(
        &self,
        core: &Arc<Core>,
        queue: &QueueName,
        limit: u64,
        message: &Message,
        deadline: Deadline,
    ) -> Answer {
        let (answer, answered) = oneshot::channel();
        let ticket = Ticket::default();
        let entering = Entering {
            message: message.clone(),
            ticket: ticket.clone(),
            answer,
            deadline,
        };
        let is_first = {
            let mut gates = lock(&self.gates);
            let is_first = !gates.contains_key(queue);
            gates.entry(queue.clone()).or_default().push_back(entering);
            is_first
        };
        if is_first {
            tokio::spawn(keep(Arc::clone(core), queue.clone(), limit));
        }
        match deadline.bound(answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) if ticket.withdraw() || ticket.is_withdrawn() => Answer::NotSent,
            Ok(Err(_)) => Answer::Lost,
            Err(_) => Answer::Late,
        }
    }

    /// Those that wait and were not withdrawn. With none left the gate is nobody's.
    fn waiting(&self, queue: &QueueName) -> VecDeque<Entering> {
        let mut gates = lock(&self.gates);
        let Some(queue_gate) = gates.get_mut(queue) else {
            return VecDeque::new();
        };
        let mut waiting = std::mem::take(queue_gate);
        waiting.retain(|entering| !entering.ticket.is_withdrawn());
        if waiting.is_empty() {
            gates.remove(queue);
        }
        waiting
    }

    fn wait_again(&self, queue: &QueueName, mut waiting: VecDeque<Entering>) {
        let mut gates = lock(&self.gates);
        let behind = gates.entry(queue.clone()).or_default();
        waiting.append(behind);
        *behind = waiting;
    }
}

/// Keeps one gate until nobody waits before it.
async fn keep(core: Arc<Core>, queue: QueueName, limit: u64) {
    loop {
        let waiting = core.gates.waiting(&queue);
        if waiting.is_empty() {
            return;
        }
        let longest = waiting.iter().map(|entering| entering.deadline).max();
        let longest = longest.unwrap_or_else(|| Deadline::after(AGAIN));
        let wire = tokio::select! {
            wire = core.talk.wire(longest) => wire,
            () = core.until_closed() => Err(super::closed()),
        };
        let Ok(wire) = wire else {
            // Each of them has withdrawn, or will at its own deadline.
            core.gates.wait_again(&queue, waiting);
            tokio::time::sleep(AGAIN).await;
            continue;
        };
        let counted = async {
            let gate = lockqueue::take(&core, &wire, gate_of(&queue)).await?;
            let room = match status::count(&core, &wire, &queue, longest).await? {
                Some(held) => limit.saturating_sub(held.messages() - held.dead),
                // Let them be returned.
                None => u64::MAX,
            };
            Ok::<_, Fault>((gate, room))
        };
        let counted = tokio::select! {
            counted = longest.bound(counted) => counted.unwrap_or_else(|late| Err(late.into())),
            () = wire.until_dead() => Err(Fault::Lost("it broke".into())),
        };
        let (gate, room) = match counted {
            Ok(counted) => counted,
            Err(fault) => {
                tracing::debug!(?fault, "the gate of a limited queue was not reached");
                core.gates.wait_again(&queue, waiting);
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        let mut entered = tokio::task::JoinSet::new();
        let mut room = room;
        for entering in waiting {
            if room == 0 {
                if entering.ticket.send() {
                    let _ = entering.answer.send(Answer::Refused);
                }
                continue;
            }
            room = room.saturating_sub(1);
            let (core, letter) = (
                Arc::clone(&core),
                copy(&core, &queue, Some(limit), &entering.message),
            );
            entered.spawn(async move {
                // Beyond its sender's deadline too: the count has to be known before the next look.
                let patience = Deadline::after(std::time::Duration::from_secs(60));
                let ticket = entering.ticket.clone();
                let answer = core.outbox.publish_as(letter, ticket, patience).await;
                let _ = entering.answer.send(answer);
            });
        }
        while entered.join_next().await.is_some() {}
        // Where this fails the lock is gone already.
        let _ = gate.release().await;
    }
}

pub(super) fn gate_of(queue: &QueueName) -> String {
    format!("{queue}.gate")
}
