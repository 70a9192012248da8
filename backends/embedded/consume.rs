//! Consuming: one consumer claims a queue's messages in batches and hands them out one by one.
//!
//! A claim counts the delivery, and is committed before the first message is handed out: a message
//! that kills its consumer is counted. What was only buffered is not: as each delivery is handed out,
//! its number goes into the consumer's lock file, which survives the process, and whoever takes over
//! takes back the counts beyond it (laws C6, C9, F8).

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use rusqlite::Connection;
use tokio::{
    net::UnixDatagram,
    sync::{Notify, oneshot},
    time::Instant,
};

use super::{
    BACKEND, at,
    attach::Lock,
    claim::{self, Claim},
    closed,
    connection::{Core, Handle, lock},
    publish::{Item, Settle},
};
use crate::{
    broker::{ConsumeOptions, Consumer, Delivery, Lease, Settlement},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    message::Message,
    names::QueueName,
    sqlite::Ticket,
};

/// How often a consumer looks without having been told to.
pub(super) const LOOK_AGAIN: Duration = Duration::from_secs(1);

pub(super) async fn consume(
    handle: &Arc<Handle>,
    queue: &QueueName,
    options: ConsumeOptions,
    deadline: Deadline,
) -> Result<Box<dyn Consumer>> {
    let core = handle.open()?;
    let token = i64::from_le_bytes(first_eight(uuid::Uuid::new_v4().as_bytes())) & i64::MAX;
    let (proof, wakes) = match &core.attachments {
        None => (None, None),
        Some(attachments) => {
            let path = attachments.consumer_lock(queue, token);
            let proof = take_patiently(&path, deadline)
                .await?
                .ok_or_else(conflict)?;
            let socket = attachments.consumer_socket(queue, token)?;
            (Some(proof), Some(UnixDatagram::bind(socket)?))
        }
    };
    let hold = Arc::new(Hold {
        core: Arc::clone(core),
        handle: Arc::clone(handle),
        queue: queue.clone(),
        token,
        prefetch: options.prefetch.get() as usize,
        state: Mutex::new(State {
            proof,
            ..State::default()
        }),
        changed: Notify::new(),
    });
    lock(&core.holds).insert(token, Arc::downgrade(&hold));
    // From here on its drop detaches, also when this future is dropped.
    let consumer = Attached {
        hold: Arc::clone(&hold),
        wakes,
    };
    let attach = {
        let (core, queue) = (Arc::clone(core), queue.clone());
        move |transaction: &Connection| claim::attach(transaction, &core, &queue, token)
    };
    let start = core.change(deadline, attach).await?;
    {
        let mut state = lock(&hold.state);
        state.queue_id = start.queue_id;
        state.cursor = start.cursor;
        state.strangers = start.strangers;
        state.returned = true;
        state.look = true;
    }
    handle.remember_hold(&hold);
    if handle.open().is_err() {
        hold.release();
        return Err(closed());
    }
    Ok(Box::new(consumer))
}

fn first_eight(bytes: &[u8; 16]) -> [u8; 8] {
    let mut first = [0; 8];
    first.copy_from_slice(&bytes[..8]);
    first
}

/// Takes a lock that nobody holds for longer than a look.
pub(super) async fn take_patiently(
    path: &std::path::Path,
    deadline: Deadline,
) -> Result<Option<Lock>> {
    let patience = deadline.or_after(Duration::from_millis(50));
    loop {
        if let Some(proof) = Lock::take(path)? {
            return Ok(Some(proof));
        }
        if patience.has_passed() {
            return Ok(None);
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

pub(super) fn conflict() -> Error {
    Error::new(
        ErrorKind::Conflict,
        "another consumer is attached to this queue, and it is alive",
    )
}

/// A consumer's hold on its queue: lives until the consumer and its deliveries are gone.
pub(super) struct Hold {
    pub(super) core: Arc<Core>,
    pub(super) handle: Arc<Handle>,
    pub(super) queue: QueueName,
    pub(super) token: i64,
    pub(super) prefetch: usize,
    pub(super) state: Mutex<State>,
    pub(super) changed: Notify,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) queue_id: i64,
    /// The lock that says that we live; gone when released.
    pub(super) proof: Option<Lock>,
    /// Claimed, not handed out.
    pub(super) buffer: VecDeque<Claimed>,
    /// Claimed or handed out.
    pub(super) unsettled: usize,
    /// The number of the last claim, and of the last hand-out.
    pub(super) ordinal: i64,
    pub(super) handed: i64,
    /// Everything up to here was claimed once.
    pub(super) cursor: i64,
    /// There may be more to claim.
    pub(super) look: bool,
    pub(super) claiming: bool,
    /// Messages may be back before the cursor; and how often one was given back.
    pub(super) returned: bool,
    pub(super) returns: u64,
    /// Another living consumer, detached since, holds some.
    pub(super) strangers: bool,
    /// When the next delayed message is due.
    pub(super) due: Option<Instant>,
    /// Not before, on the clock that nobody sets (law C6).
    pub(super) not_before: HashMap<i64, Instant>,
    pub(super) detached: bool,
    pub(super) released: bool,
    pub(super) gone: Option<Lost>,
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
    pub(super) seq: i64,
    pub(super) ordinal: i64,
    pub(super) attempt: u32,
    pub(super) message: Message,
}

impl Hold {
    pub(super) fn is_released(&self) -> bool {
        lock(&self.state).released
    }

    pub(super) fn look_again(&self) {
        lock(&self.state).look = true;
        self.changed.notify_one();
    }

    /// A message goes back, or went back, before the cursor.
    pub(super) fn expect_returned(&self) {
        let mut state = lock(&self.state);
        state.returned = true;
        state.returns += 1;
        state.look = true;
        drop(state);
        self.changed.notify_one();
    }

    /// The handle is closed: everything goes back, in flight or not (law F8).
    pub(super) fn release(self: &Arc<Self>) {
        let mut state = lock(&self.state);
        state.detached = true;
        state.buffer.clear();
        drop(state);
        // A store that is closed already has nothing of ours: the lock goes with the hold.
        let _ = self.core.hand_in(Item::Release(Arc::clone(self)));
        self.changed.notify_one();
    }

    /// After the release is committed.
    pub(super) fn let_go(&self) {
        let mut state = lock(&self.state);
        state.released = true;
        state.proof = None;
    }

    #[cfg(test)]
    pub(super) fn die(&self) {
        lock(&self.state).proof.take().expect("alive").die();
    }

    fn one_less(&self) {
        let mut state = lock(&self.state);
        if state.unsettled == self.prefetch {
            state.look = true;
            self.changed.notify_one();
        }
        state.unsettled = state.unsettled.saturating_sub(1);
    }

    fn step(self: &Arc<Self>) -> Result<Step> {
        self.handle.open()?;
        let mut state = lock(&self.state);
        if let Some(claimed) = state.buffer.pop_front() {
            state.handed = claimed.ordinal;
            if let Some(Err(error)) = state.proof.as_ref().map(|p| p.write(claimed.ordinal)) {
                tracing::warn!(%error, "a hand-out could not be noted; a kill now counts it as none");
            }
            return Ok(Step::Deliver(claimed));
        }
        if let Some(gone) = state.gone {
            return Err(gone.error());
        }
        if state.due.is_some_and(|due| due <= Instant::now()) {
            state.due = None;
            state.look = true;
        }
        if state.look && !state.claiming && state.unsettled < self.prefetch {
            state.look = false;
            state.claiming = true;
            return Ok(Step::Claim(Claim::new(self, &state)));
        }
        Ok(Step::Wait(state.due))
    }
}

enum Step {
    Deliver(Claimed),
    Claim(Claim),
    Wait(Option<Instant>),
}

impl Drop for Hold {
    fn drop(&mut self) {
        lock(&self.core.holds).remove(&self.token);
    }
}

/// The consumer.
struct Attached {
    hold: Arc<Hold>,
    wakes: Option<UnixDatagram>,
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.hold, f)
    }
}

impl Attached {
    fn detach(&mut self) {
        let mut state = lock(&self.hold.state);
        if std::mem::replace(&mut state.detached, true) {
            return;
        }
        state.unsettled -= state.buffer.len();
        state.buffer.clear();
        drop(state);
        let _ = self.hold.core.hand_in(Item::Detach(Arc::clone(&self.hold)));
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if self.wakes.is_some()
            && let Some(attachments) = &self.hold.core.attachments
            && let Ok(socket) = attachments.consumer_socket(&self.hold.queue, self.hold.token)
        {
            let _ = std::fs::remove_file(socket);
        }
        self.detach();
    }
}

#[async_trait]
impl Consumer for Attached {
    async fn next(&mut self) -> Result<Delivery> {
        let hold = &self.hold;
        loop {
            let due = match hold.step().map_err(at("next", &hold.queue))? {
                Step::Deliver(claimed) => return Ok(claimed.deliver(hold)),
                Step::Claim(claim) => {
                    hold.core
                        .after_inbox(Box::new(claim), false)
                        .map_err(at("next", &hold.queue))?;
                    None
                }
                Step::Wait(due) => due,
            };
            let tick = Instant::now() + LOOK_AGAIN;
            let wake_at = due.map_or(tick, |due| due.min(tick));
            let poked = async {
                match &self.wakes {
                    // What it says does not matter, nor how often.
                    Some(socket) => {
                        let _ = socket.recv(&mut [0; 8]).await;
                        while socket.try_recv(&mut [0; 8]).is_ok() {}
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = hold.changed.notified() => {}
                () = poked => lock(&hold.state).look = true,
                () = hold.handle.until_closed() => {}
                () = tokio::time::sleep_until(wake_at) => {
                    if wake_at == tick {
                        lock(&hold.state).look = true;
                    }
                }
            }
        }
    }

    async fn close(mut self: Box<Self>, deadline: Deadline) -> Result<()> {
        self.hold
            .handle
            .open()
            .map_err(at("close", &self.hold.queue))?;
        self.detach();
        self.hold
            .core
            .change(deadline, |_| Ok(()))
            .await
            .map_err(at("close", &self.hold.queue))
    }
}

impl Claimed {
    fn deliver(self, hold: &Arc<Hold>) -> Delivery {
        let lease = Leased {
            held: Some(Held {
                hold: Arc::clone(hold),
                seq: self.seq,
                ordinal: self.ordinal,
            }),
        };
        Delivery::new(self.message, self.attempt, Box::new(lease))
    }
}

/// Which delivery: no other ever has the same consumer and number (law C4).
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) hold: Arc<Hold>,
    pub(super) seq: i64,
    pub(super) ordinal: i64,
}

/// The lease: dropped unsettled, the message goes back (law C10).
#[derive(Debug)]
struct Leased {
    held: Option<Held>,
}

impl Drop for Leased {
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            held.hold.one_less();
            held.hold.expect_returned();
            let core = Arc::clone(&held.hold.core);
            // A closed store has nothing of ours any more.
            let _ = core.hand_in(Item::Return(held));
        }
    }
}

#[async_trait]
impl Lease for Leased {
    async fn settle(mut self: Box<Self>, settlement: Settlement, deadline: Deadline) -> Result<()> {
        let Some(held) = self.held.clone() else {
            return Err(Lost::Settled.error());
        };
        let hold = Arc::clone(&held.hold);
        let in_context = at("settle", &hold.queue);
        let core = hold.handle.open().map_err(&in_context)?;
        let room = core.inbox.room(deadline).await.map_err(&in_context)?;
        if matches!(settlement, Settlement::Retry(_)) {
            hold.expect_returned();
        }
        let (reply, answer) = oneshot::channel();
        let ticket = Ticket::default();
        core.hand_in(Item::Settle(Settle {
            held,
            settlement,
            ticket: ticket.clone(),
            result: None,
            reply,
            _room: room,
        }))
        .map_err(&in_context)?;
        let answer = ticket.answer(deadline, answer).await;
        let over = match &answer {
            Ok(()) => true,
            Err(error) => matches!(error.kind(), ErrorKind::LeaseLost | ErrorKind::QueueDeleted),
        };
        // Otherwise the drop gives the message back, if it was not settled after all.
        if over {
            self.held = None;
            hold.one_less();
        }
        answer.map_err(in_context)
    }
}

/// Why a delivery or a consumer is not what it was.
#[derive(Clone, Copy, Debug)]
pub(super) enum Lost {
    QueueDeleted,
    TakenOver,
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
            Self::Settled => (
                ErrorKind::LeaseLost,
                "the delivery is no longer this handle's: nothing was settled",
            ),
        };
        Error::new(kind, text).with_backend(BACKEND)
    }
}
