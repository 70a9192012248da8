//! A consumer's handle: it gives out what its task has claimed, and hands in how each delivery ends.
//!
//! A claim counts the delivery before it is handed out: a message that kills its consumer is counted.
//! What was only buffered goes back uncounted when the consumer goes in good order (C9, F8); after a
//! kill the buffer counts too, for only the dead process knew what it had handed out.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use uuid::Uuid;

use super::{
    BACKEND, at,
    attend::Attendant,
    connection::{Core, Handle, lock},
    router::Wake,
    ticket::{Answer, Ticket},
    trays,
};
use crate::{
    broker::{ConsumeOptions, Consumer, Delivery, Lease, Settlement},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    message::Message,
    names::QueueName,
};

/// The most settlements that wait for the task; more wait outside, up to their deadlines.
const WAITING: usize = 1024;

pub(super) async fn consume(
    core: &Handle,
    queue: &QueueName,
    options: ConsumeOptions,
    deadline: Deadline,
) -> Result<Box<dyn Consumer>> {
    core.open()?;
    let (orders, inbox) = mpsc::channel(WAITING);
    let (stages, stage) = watch::channel(Stage::Attached);
    let hold = Arc::new(Hold {
        core: Arc::clone(core),
        queue: queue.clone(),
        token: Uuid::new_v4().simple().to_string(),
        prefetch: options.prefetch.get() as usize,
        state: Mutex::default(),
        wake: Arc::default(),
        arrived: Notify::new(),
        orders,
        stage,
    });
    // From here on its drop detaches, also when this future is dropped.
    let consumer = Attached {
        hold: Arc::clone(&hold),
    };
    let (reply, attached) = oneshot::channel();
    let stage = hold.stage.clone();
    let attendant = Attendant::new(hold, inbox, stages);
    core.work(attendant.attend(deadline, reply))?;
    match deadline.bound(attached).await {
        Ok(Ok(answer)) => answer?,
        Ok(Err(_)) => return Err(super::closed()),
        Err(late) => return Err(core.main.trouble().unwrap_or(late)),
    }
    if !queue.is_commands() {
        tokio::spawn(trays::collect(Arc::clone(core), queue.clone(), stage));
    }
    Ok(Box::new(consumer))
}

/// A consumer's hold on its queue: lives until the consumer, its deliveries and its task are gone.
pub(super) struct Hold {
    pub(super) core: Arc<Core>,
    pub(super) queue: QueueName,
    /// Who we are to the server; never used twice (C4).
    pub(super) token: String,
    pub(super) prefetch: usize,
    pub(super) state: Mutex<State>,
    /// To the task: there is something to do.
    pub(super) wake: Arc<Wake>,
    /// From the task: a message arrived, or the end.
    pub(super) arrived: Notify,
    orders: mpsc::Sender<Order>,
    stage: watch::Receiver<Stage>,
}

/// How far a consumer's end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    Attached,
    /// Another can attach; deliveries may be left.
    Detached,
    Ended,
}

#[derive(Default)]
pub(super) struct State {
    /// Claimed, not handed out.
    pub(super) buffer: VecDeque<Claimed>,
    /// Handed out, and not yet on their way back.
    pub(super) out: usize,
    /// Dropped unsettled. At most as many as were handed out, so the prefetch is its bound.
    pub(super) returns: Vec<Held>,
    pub(super) detached: bool,
    pub(super) gone: Option<Lost>,
}

impl State {
    pub(super) fn unsettled(&self) -> usize {
        self.buffer.len() + self.out
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hold")
            .field("queue", &self.queue)
            .field("token", &self.token)
            .finish_non_exhaustive()
    }
}

/// One claimed message.
pub(super) struct Claimed {
    pub(super) held: Held,
    pub(super) message: Message,
}

/// Which delivery: an entry, and its count at this delivery.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) entry: String,
    pub(super) count: u32,
}

/// A settlement on its way to the task.
pub(super) struct Order {
    pub(super) held: Held,
    pub(super) id: String,
    pub(super) settlement: Settlement,
    pub(super) ticket: Ticket,
    pub(super) reply: oneshot::Sender<Result<()>>,
}

impl Hold {
    /// Why nothing more comes of this hold, for a consumer.
    fn over(&self) -> Result<()> {
        match lock(&self.state).gone {
            Some(gone) => Err(gone.error()),
            None => self.core.open(),
        }
    }

    /// The same for one delivery.
    fn lost(&self) -> Error {
        match lock(&self.state).gone {
            Some(Lost::TakenOver) | None => match self.core.open() {
                Err(closed) => closed,
                Ok(()) => Lost::Settled.error(),
            },
            Some(gone) => gone.error(),
        }
    }

    pub(super) fn ends_with(&self, lost: Lost) {
        let mut state = lock(&self.state);
        state.gone.get_or_insert(lost);
        state.buffer.clear();
        drop(state);
        self.arrived.notify_waiters();
        self.arrived.notify_one();
    }
}

/// The consumer.
struct Attached {
    hold: Arc<Hold>,
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.hold, f)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        lock(&self.hold.state).detached = true;
        self.hold.wake.work.notify_one();
    }
}

#[async_trait]
impl Consumer for Attached {
    async fn next(&mut self) -> Result<Delivery> {
        let hold = &self.hold;
        let mut closing = hold.core.closing();
        loop {
            hold.over().map_err(at("next", &hold.queue))?;
            let claimed = {
                let mut state = lock(&hold.state);
                let claimed = state.buffer.pop_front();
                state.out += usize::from(claimed.is_some());
                if claimed.is_some() && state.buffer.is_empty() {
                    hold.wake.work.notify_one();
                }
                claimed
            };
            if let Some(Claimed { held, message }) = claimed {
                let attempt = held.count;
                let lease = Leased {
                    hold: Arc::clone(hold),
                    id: message.id.to_string(),
                    held: Some(held),
                };
                return Ok(Delivery::new(message, attempt, Box::new(lease)));
            }
            tokio::select! {
                () = hold.arrived.notified() => {}
                _ = closing.wait_for(|closing| *closing) => {}
            }
        }
    }

    async fn close(self: Box<Self>, deadline: Deadline) -> Result<()> {
        let hold = Arc::clone(&self.hold);
        hold.core.open().map_err(at("close", &hold.queue))?;
        drop(self);
        let mut stage = hold.stage.clone();
        let done = stage.wait_for(|stage| *stage >= Stage::Detached);
        deadline
            .bound(done)
            .await
            .map(drop)
            .map_err(|late| hold.core.main.trouble().unwrap_or(late))
            .map_err(at("close", &hold.queue))
    }
}

/// The lease: dropped unsettled, the message goes back (C10).
struct Leased {
    hold: Arc<Hold>,
    id: String,
    held: Option<Held>,
}

impl fmt::Debug for Leased {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leased")
            .field("queue", &self.hold.queue)
            .field("held", &self.held)
            .finish()
    }
}

impl Drop for Leased {
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            lock(&self.hold.state).returns.push(held);
            self.hold.wake.work.notify_one();
        }
    }
}

#[async_trait]
impl Lease for Leased {
    async fn settle(mut self: Box<Self>, settlement: Settlement, deadline: Deadline) -> Result<()> {
        let hold = Arc::clone(&self.hold);
        let in_context = at("settle", &hold.queue);
        hold.core.open().map_err(&in_context)?;
        let room = deadline.bound(hold.orders.reserve()).await;
        let room = room
            .map_err(|late| hold.core.main.trouble().unwrap_or(late))
            .and_then(|room| room.map_err(|_| hold.lost()))
            .map_err(&in_context)?;
        let Some(held) = self.held.clone() else {
            return Err(in_context(Lost::Settled.error()));
        };
        let (reply, answer) = oneshot::channel();
        let ticket = Ticket::default();
        // If it is given up before the task took it, the drop of this gives the message back.
        let mut handed_in = HandedIn {
            leased: self,
            ticket: ticket.clone(),
            over: false,
        };
        room.send(Order {
            held,
            id: handed_in.leased.id.clone(),
            settlement,
            ticket: ticket.clone(),
            reply,
        });
        let answer = match ticket.answer(deadline, answer).await {
            Answer::Came(answer) => {
                handed_in.over = true;
                answer
            }
            Answer::Never if hold.over().is_err() => Err(hold.lost()),
            Answer::Never => Err(hold.core.main.trouble().unwrap_or_else(late)),
            Answer::Late => Err(late()),
        };
        answer.map_err(in_context)
    }
}

fn late() -> Error {
    Error::new(
        ErrorKind::DeadlineExceeded,
        "the deadline passed before the broker's answer came: the message may come again",
    )
}

/// A delivery whose settlement was handed in.
struct HandedIn {
    leased: Box<Leased>,
    ticket: Ticket,
    over: bool,
}

impl Drop for HandedIn {
    fn drop(&mut self) {
        // What the task has begun it ends, whoever still listens.
        if self.over || !self.ticket.cancel() {
            self.leased.held = None;
        }
    }
}

/// Why a delivery or a consumer is not what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    QueueDeleted,
    TakenOver,
    AuthRefused,
    Settled,
}

impl Lost {
    pub(super) fn error(self) -> Error {
        let (kind, text) = match self {
            Self::QueueDeleted => (ErrorKind::QueueDeleted, "the queue was deleted"),
            Self::TakenOver => (
                ErrorKind::Conflict,
                "another consumer took this queue over while this one was cut off",
            ),
            Self::AuthRefused => (
                ErrorKind::AuthRefused,
                "the broker refuses this user now, or one of its rights",
            ),
            Self::Settled => (
                ErrorKind::LeaseLost,
                "the delivery is no longer this handle's: nothing was settled",
            ),
        };
        Error::new(kind, text).with_backend(BACKEND)
    }
}
