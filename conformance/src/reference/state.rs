//! What the broker holds, and the steps on it.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    sync::{Mutex, PoisonError},
};

use tokio::{
    sync::{oneshot, watch},
    time::Instant,
};
use wilco::{
    Error, ErrorKind, GuestAddress, Message, QueueName, Result,
    broker::{DeadLetter, DeadLetterKey, QueueSpec, QueueStatus},
};

/// The state, and a number that goes up with each change of it: whoever waits, waits on that.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) state: Mutex<State>,
    pub(super) version: watch::Sender<u64>,
}

impl Shared {
    /// One step on the state, told to all who wait.
    pub(super) fn change<T>(&self, step: impl FnOnce(&mut State) -> T) -> T {
        let result = self.change_quietly(step);
        self.version.send_modify(|version| *version += 1);
        result
    }

    /// One step that nobody waits for.
    pub(super) fn change_quietly<T>(&self, step: impl FnOnce(&mut State) -> T) -> T {
        step(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[derive(Debug, Default)]
pub(super) struct State {
    next_token: u64,
    pub(super) open: HashSet<u64>,
    pub(super) queues: BTreeMap<QueueName, Queue>,
    pub(super) lanes: BTreeMap<GuestAddress, Lane>,
}

#[derive(Debug)]
pub(super) struct Lane {
    pub(super) token: u64,
    pub(super) handle: u64,
    pub(super) waiting: VecDeque<Waiting>,
}

/// A request that its responder has not taken yet.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) token: u64,
    pub(super) body: bytes::Bytes,
    pub(super) reply: oneshot::Sender<bytes::Bytes>,
}

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) spec: QueueSpec,
    /// Which of the queues that had this name.
    pub(super) generation: u64,
    pub(super) consumer: Option<Attached>,
    pub(super) messages: BTreeMap<u64, Stored>,
    pub(super) dead: BTreeMap<u64, DeadLetter>,
    next: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Attached {
    pub(super) token: u64,
    pub(super) handle: u64,
}

#[derive(Debug)]
pub(super) struct Stored {
    pub(super) message: Message,
    pub(super) attempts: u32,
    pub(super) place: Place,
}

/// Where a stored message is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// Can be delivered from this moment.
    Due(Instant),
    /// With this consumer of this handle, under this lease.
    Held {
        lease: u64,
        consumer: u64,
        handle: u64,
    },
}

impl State {
    pub(super) fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    pub(super) fn queue(&mut self, name: &QueueName) -> Result<&mut Queue> {
        self.queues
            .get_mut(name)
            .ok_or_else(|| error(ErrorKind::NoQueue))
    }

    /// A handle is gone: what it held goes back, what it was attached to is free.
    pub(super) fn vanish(&mut self, gone: u64) {
        self.lanes.retain(|_, lane| lane.handle != gone);
        for queue in self.queues.values_mut() {
            if queue
                .consumer
                .is_some_and(|consumer| consumer.handle == gone)
            {
                queue.consumer = None;
            }
            let held: Vec<_> = queue
                .messages
                .iter()
                .filter(|(_, stored)| {
                    matches!(stored.place, Place::Held { handle, .. } if handle == gone)
                })
                .map(|(seq, _)| *seq)
                .collect();
            for seq in held {
                queue.give_back(seq, Instant::now());
            }
        }
    }
}

impl Queue {
    pub(super) fn new(spec: QueueSpec, generation: u64) -> Self {
        Self {
            spec,
            generation,
            consumer: None,
            messages: BTreeMap::new(),
            dead: BTreeMap::new(),
            next: 0,
        }
    }

    pub(super) fn status(&self) -> QueueStatus {
        let now = Instant::now();
        let mut status = QueueStatus::new(self.spec.name.clone());
        for stored in self.messages.values() {
            match stored.place {
                Place::Due(due) if due <= now => status.ready += 1,
                Place::Due(_) => status.delayed += 1,
                Place::Held { .. } => status.in_flight += 1,
            }
        }
        status.dead = self.dead.len() as u64;
        status.consumers = u32::from(self.consumer.is_some());
        status
    }

    /// Stores at the end; true if a message of this id is there already.
    pub(super) fn store(&mut self, message: Message) -> Result<bool> {
        if self
            .messages
            .values()
            .any(|stored| stored.message.id == message.id)
        {
            return Ok(true);
        }
        if self
            .spec
            .max_messages
            .is_some_and(|most| self.messages.len() as u64 >= most)
        {
            return Err(error(ErrorKind::BrokerRefused));
        }
        self.append(message);
        Ok(false)
    }

    pub(super) fn append(&mut self, message: Message) {
        self.next += 1;
        let stored = Stored {
            message,
            attempts: 0,
            place: Place::Due(Instant::now()),
        };
        self.messages.insert(self.next, stored);
    }

    /// A delivery ended without ack: it comes again from this moment, or is a dead letter.
    pub(super) fn give_back(&mut self, seq: u64, due: Instant) {
        let Some(stored) = self.messages.get_mut(&seq) else {
            return;
        };
        if stored.attempts < self.spec.delivery_limit.get() {
            stored.place = Place::Due(due);
        } else {
            let reason = format!("delivered {} times without an ack", stored.attempts);
            self.bury(seq, reason);
        }
    }

    pub(super) fn bury(&mut self, seq: u64, reason: String) {
        if let Some(stored) = self.messages.remove(&seq) {
            self.next += 1;
            let key = DeadLetterKey(self.next.to_string());
            let letter = DeadLetter::new(key, stored.message, reason, stored.attempts);
            self.dead.insert(self.next, letter);
        }
    }
}

/// An error of this kind; its text is its kind.
pub(super) fn error(kind: ErrorKind) -> Error {
    let text = format!("{kind:?}");
    Error::new(kind, text).with_backend("reference")
}
