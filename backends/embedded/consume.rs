//! Consuming: one consumer claims a queue's messages in batches and hands them out one by one.
//!
//! A claim counts the delivery, and is committed before the first message is handed out: a message
//! that kills its consumer is counted. What was only buffered is not: as each delivery is handed out,
//! its number goes into the consumer's lock file, which survives the process, and whoever takes over
//! takes back the counts beyond it (laws C6, C9, F8).

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{Arc, LazyLock, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use rusqlite::{Connection, OptionalExtension as _, Row, params, types::ValueRef};
use tokio::{
    net::UnixDatagram,
    sync::{Notify, oneshot},
    time::Instant,
};

use super::{
    BACKEND, at,
    attach::Lock,
    closed,
    connection::{Core, Session, lock},
    no_queue,
    publish::{Book, Books, Item, Settle},
};
use crate::{
    broker::{ConsumeOptions, Consumer, Delivery, Lease, Settlement},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    message::{Headers, Message, MessageId},
    names::QueueName,
    sqlite::{Fate, Op, Ticket},
};

/// The content type that is not written out.
pub(super) const JSON: &str = "application/json";

static JSON_TYPE: LazyLock<MessageId> =
    LazyLock::new(|| MessageId::new(JSON).expect("a content type is well formed"));

/// The columns that [`read_message`] reads.
pub(super) const MESSAGE: &str = "id, kind, content_type, headers, sender, body";

/// How often a consumer looks without having been told to.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

pub(super) async fn consume(
    session: &Arc<Session>,
    queue: &QueueName,
    options: ConsumeOptions,
    deadline: Deadline,
) -> Result<Box<dyn Consumer>> {
    let core = session.open()?;
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
        session: Arc::clone(session),
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
        move |transaction: &Connection| attach(transaction, &core, &queue, token)
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
    session.remember_hold(&hold);
    if session.open().is_err() {
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

fn conflict() -> Error {
    Error::new(
        ErrorKind::Conflict,
        "another consumer is attached to this queue, and it is alive",
    )
}

struct Start {
    queue_id: i64,
    cursor: i64,
    strangers: bool,
}

/// Takes the queue's one place (law C12), from a dead holder too, in one transaction.
fn attach(transaction: &Connection, core: &Core, queue: &QueueName, token: i64) -> Result<Start> {
    let book = Book::read(transaction, queue)?.ok_or_else(no_queue)?;
    if let Some(other) = book.consumer
        && core.is_alive(queue, other)
    {
        return Err(conflict());
    }
    let strangers = free_the_dead(transaction, core, queue, &book, token)?;
    transaction.execute(
        "UPDATE queues SET consumer = ?2 WHERE id = ?1",
        [book.id, token],
    )?;
    if let Some(attachments) = &core.attachments {
        attachments.sweep(queue);
    }
    let cursor: Option<i64> = transaction.query_row(
        "SELECT max(seq) FROM deliveries WHERE seq BETWEEN ?1 AND ?2",
        [book.first(), book.last()],
        |row| row.get(0),
    )?;
    Ok(Start {
        queue_id: book.id,
        cursor: cursor.unwrap_or(book.first()),
        strangers,
    })
}

/// Gives back what dead consumers hold. True if living ones other than `token` hold something.
fn free_the_dead(
    transaction: &Connection,
    core: &Core,
    queue: &QueueName,
    book: &Book,
    token: i64,
) -> Result<bool> {
    let holders: Vec<i64> = transaction
        .prepare_cached(
            "SELECT DISTINCT holder FROM deliveries
             WHERE seq BETWEEN ?1 AND ?2 AND holder IS NOT NULL AND holder <> ?3",
        )?
        .query_map([book.first(), book.last(), token], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    let mut strangers = false;
    for holder in holders {
        if core.is_alive(queue, holder) {
            strangers = true;
            continue;
        }
        let handed = core
            .attachments
            .as_ref()
            .and_then(|attachments| Lock::read(&attachments.consumer_lock(queue, holder)));
        // Without its word everything counts as handed out.
        give_back(transaction, book, holder, handed.unwrap_or(i64::MAX), true)?;
    }
    Ok(strangers)
}

/// Gives back what `holder` holds beyond its delivery number `handed`, uncounted; and `all` the rest.
fn give_back(
    transaction: &Connection,
    book: &Book,
    holder: i64,
    handed: i64,
    all: bool,
) -> Result<()> {
    transaction
        .prepare_cached(
            "UPDATE deliveries SET attempts = attempts - 1, holder = NULL, ordinal = NULL
             WHERE seq BETWEEN ?1 AND ?2 AND holder = ?3 AND ordinal > ?4",
        )?
        .execute([book.first(), book.last(), holder, handed])?;
    if all {
        transaction
            .prepare_cached(
                "UPDATE deliveries SET holder = NULL, ordinal = NULL
                 WHERE seq BETWEEN ?1 AND ?2 AND holder = ?3",
            )?
            .execute([book.first(), book.last(), holder])?;
    }
    Ok(())
}

/// A consumer's hold on its queue: lives until the consumer and its deliveries are gone.
pub(super) struct Hold {
    core: Arc<Core>,
    session: Arc<Session>,
    queue: QueueName,
    token: i64,
    prefetch: usize,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    queue_id: i64,
    /// The lock that says that we live; gone when released.
    proof: Option<Lock>,
    /// Claimed, not handed out.
    buffer: VecDeque<Claimed>,
    /// Claimed or handed out.
    unsettled: usize,
    /// The number of the last claim, and of the last hand-out.
    ordinal: i64,
    handed: i64,
    /// Everything up to here was claimed once.
    cursor: i64,
    /// There may be more to claim.
    look: bool,
    claiming: bool,
    /// Messages may be back before the cursor; and how often one was given back.
    returned: bool,
    returns: u64,
    /// Another living consumer, detached since, holds some.
    strangers: bool,
    /// When the next delayed message is due.
    due: Option<Instant>,
    /// Not before, on the clock that nobody sets (law C6).
    not_before: HashMap<i64, Instant>,
    detached: bool,
    released: bool,
    gone: Option<Lost>,
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
struct Claimed {
    seq: i64,
    ordinal: i64,
    attempt: u32,
    message: Message,
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
        self.session.open()?;
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
            return Ok(Step::Claim(Claim {
                hold: Arc::clone(self),
                most: self.prefetch - state.unsettled,
                queue_id: state.queue_id,
                ordinal: state.ordinal,
                cursor: state.cursor,
                returned: false,
                returns: 0,
                strangers: state.strangers,
                due: None,
                not_before: HashMap::new(),
                claimed: Vec::new(),
                result: None,
            }));
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
                () = hold.session.until_closed() => {}
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
            .session
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

/// A batch of messages being claimed. What comes of it goes to the hold, not to the future that asked:
/// that may be dropped.
struct Claim {
    hold: Arc<Hold>,
    most: usize,
    queue_id: i64,
    ordinal: i64,
    cursor: i64,
    returned: bool,
    returns: u64,
    strangers: bool,
    due: Option<Instant>,
    not_before: HashMap<i64, Instant>,
    claimed: Vec<Claimed>,
    result: Option<Result<std::result::Result<(), Lost>>>,
}

impl Op for Claim {
    fn needs_sync(&self) -> bool {
        // Counts and claims have to survive a kill of the process, and do: the kernel has them.
        false
    }

    fn is_wanted(&self) -> bool {
        true
    }

    fn run(&mut self, transaction: &Connection, _: bool) {
        self.result = Some(crate::sqlite::alone(transaction, |transaction| {
            self.claim(transaction)
        }));
    }

    fn finish(self: Box<Self>, fate: Fate<'_>) {
        let hold = self.hold;
        let mut state = lock(&hold.state);
        state.claiming = false;
        match (self.result, fate) {
            (Some(Ok(Ok(()))), Fate::Committed) => {
                state.ordinal = self.ordinal;
                state.cursor = self.cursor;
                // What has come back since is looked for again.
                state.returned = self.returned || state.returns != self.returns;
                state.strangers = self.strangers;
                state.due = self.due;
                let now = Instant::now();
                state.not_before.retain(|_, at| *at > now);
                state.look |= self.claimed.len() == self.most;
                if !state.detached {
                    state.unsettled += self.claimed.len();
                    state.buffer.extend(self.claimed);
                }
            }
            (Some(Ok(Err(gone))), _) => state.gone = Some(gone),
            (Some(Err(error)), _) => {
                tracing::warn!(%error, queue = %hold.queue, "a claim failed; trying again");
                state.due = Some(Instant::now() + LOOK_AGAIN / 10);
            }
            (_, Fate::Lost(failure)) => {
                let error = failure.error();
                tracing::warn!(%error, queue = %hold.queue, "a claim failed; trying again");
                state.due = Some(Instant::now() + LOOK_AGAIN / 10);
            }
            (None, Fate::Committed) => state.look = true,
        }
        drop(state);
        hold.changed.notify_one();
    }
}

impl Claim {
    fn claim(&mut self, transaction: &Connection) -> Result<std::result::Result<(), Lost>> {
        let hold = Arc::clone(&self.hold);
        {
            // As it is now, after all that went back in this transaction.
            let state = lock(&hold.state);
            if state.detached {
                return Ok(Ok(()));
            }
            self.returned = state.returned;
            self.returns = state.returns;
            if self.returned {
                self.not_before.clone_from(&state.not_before);
            }
        }
        let book = match Book::read(transaction, &hold.queue)? {
            Some(book) if book.id == self.queue_id => book,
            _ => return Ok(Err(Lost::QueueDeleted)),
        };
        if book.consumer != Some(hold.token) {
            return Ok(Err(Lost::TakenOver));
        }
        if self.strangers {
            self.strangers =
                free_the_dead(transaction, &hold.core, &hold.queue, &book, hold.token)?;
            self.returned = true;
        }
        let mut books = Books::default();
        if self.returned {
            self.claim_returned(transaction, &mut books, &book)?;
        }
        if self.claimed.len() < self.most {
            self.claim_fresh(transaction, &book)?;
        }
        books.write(transaction)?;
        Ok(Ok(()))
    }

    /// Those that were delivered before, oldest first; those not due yet only set the clock.
    fn claim_returned(
        &mut self,
        transaction: &Connection,
        books: &mut Books,
        book: &Book,
    ) -> Result<()> {
        let (now, clock) = (Instant::now(), now_ms());
        let mut waiting = transaction.prepare_cached(
            "SELECT seq, attempts, due FROM deliveries
             WHERE seq BETWEEN ?1 AND ?2 AND ordinal IS NULL ORDER BY seq",
        )?;
        let mut rows = waiting.query([book.first(), book.last()])?;
        let mut ready: Vec<(i64, i64)> = Vec::new();
        self.returned = false;
        while let Some(row) = rows.next()? {
            let (seq, attempts): (i64, i64) = (row.get(0)?, row.get(1)?);
            let by_clock = row
                .get::<_, Option<i64>>(2)?
                .map(|due| due.saturating_sub(clock))
                .filter(|left| *left > 0)
                .map(|left| now + Duration::from_millis(left.unsigned_abs().min(CENTURY_MS)));
            let by_timer = self.not_before.get(&seq).copied().filter(|at| *at > now);
            match by_clock.max(by_timer) {
                Some(due) => {
                    self.returned = true;
                    self.due = Some(self.due.map_or(due, |earlier| earlier.min(due)));
                }
                None if ready.len() < self.most => ready.push((seq, attempts)),
                None => {
                    self.returned = true;
                    break;
                }
            }
        }
        drop(rows);
        for (seq, attempts) in ready {
            if attempts >= book.delivery_limit {
                let reason = limit_reason(book.delivery_limit);
                transaction.execute("DELETE FROM deliveries WHERE seq = ?1", [seq])?;
                bury(transaction, books, &self.hold.queue, seq, attempts, &reason)?;
                continue;
            }
            let message = transaction
                .prepare_cached(&format!("SELECT {MESSAGE} FROM messages WHERE seq = ?1"))?
                .query_row([seq], |row| Ok(read_message(row, 0)))??;
            let claimed = self.next_claimed(seq, attempts, message);
            transaction
                .prepare_cached(
                    "UPDATE deliveries
                     SET attempts = ?2, holder = ?3, ordinal = ?4, due = NULL WHERE seq = ?1",
                )?
                .execute([
                    seq,
                    i64::from(claimed.attempt),
                    self.hold.token,
                    claimed.ordinal,
                ])?;
            self.claimed.push(claimed);
        }
        Ok(())
    }

    /// Those that were never delivered, in their order (law C11).
    fn claim_fresh(&mut self, transaction: &Connection, book: &Book) -> Result<()> {
        let most = i64::try_from(self.most - self.claimed.len()).unwrap_or(i64::MAX);
        let mut fresh = transaction.prepare_cached(&format!(
            "SELECT {MESSAGE}, seq FROM messages WHERE seq > ?1 AND seq <= ?2 ORDER BY seq LIMIT ?3"
        ))?;
        let mut claim = transaction.prepare_cached(
            "INSERT INTO deliveries(seq, attempts, holder, ordinal) VALUES(?1, 1, ?2, ?3)",
        )?;
        let mut rows = fresh.query([self.cursor.max(book.first()), book.last(), most])?;
        while let Some(row) = rows.next()? {
            let seq = row.get(6)?;
            let claimed = self.next_claimed(seq, 0, read_message(row, 0)?);
            claim.execute([seq, self.hold.token, claimed.ordinal])?;
            self.cursor = seq;
            self.claimed.push(claimed);
        }
        Ok(())
    }

    fn next_claimed(&mut self, seq: i64, attempts: i64, message: Message) -> Claimed {
        self.ordinal += 1;
        Claimed {
            seq,
            ordinal: self.ordinal,
            attempt: u32::try_from(attempts + 1).unwrap_or(u32::MAX),
            message,
        }
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
    seq: i64,
    ordinal: i64,
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
        let core = hold.session.open().map_err(&in_context)?;
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

/// Settles one delivery. An error means that it is half done, and the transaction has to go.
pub(super) fn settle(
    transaction: &Connection,
    books: &mut Books,
    held: &Held,
    settlement: &Settlement,
) -> Result<std::result::Result<(), Lost>> {
    let (hold, seq) = (&held.hold, held.seq);
    let lease = params![seq, hold.token, held.ordinal];
    let (id, limit) = match books.of(transaction, &hold.queue)? {
        Some(book) => (book.id, book.delivery_limit),
        None => return Ok(Err(Lost::QueueDeleted)),
    };
    if seq >> super::publish::PLACE_BITS != id {
        return Ok(Err(Lost::QueueDeleted));
    }
    match settlement {
        Settlement::Ack => {
            let gone = transaction
                .prepare_cached(
                    "DELETE FROM deliveries WHERE seq = ?1 AND holder = ?2 AND ordinal = ?3",
                )?
                .execute(lease)?;
            if gone == 0 {
                return Ok(Err(Lost::Settled));
            }
            remove(transaction, books, &hold.queue, seq)?;
        }
        Settlement::Retry(delay) => {
            let due = due(*delay);
            let attempts: Option<i64> = transaction
                .prepare_cached(
                    "UPDATE deliveries SET holder = NULL, ordinal = NULL, due = ?4
                     WHERE seq = ?1 AND holder = ?2 AND ordinal = ?3 RETURNING attempts",
                )?
                .query_row(params![seq, hold.token, held.ordinal, due], |row| {
                    row.get(0)
                })
                .optional()?;
            let Some(attempts) = attempts else {
                return Ok(Err(Lost::Settled));
            };
            if attempts >= limit {
                transaction.execute("DELETE FROM deliveries WHERE seq = ?1", [seq])?;
                bury(
                    transaction,
                    books,
                    &hold.queue,
                    seq,
                    attempts,
                    &limit_reason(limit),
                )?;
            } else if !delay.is_zero() {
                let until = Deadline::after(*delay).instant();
                lock(&hold.state).not_before.insert(seq, until);
            }
            if let Some(book) = books.of(transaction, &hold.queue)? {
                book.wake = true;
            }
        }
        Settlement::DeadLetter(reason) => {
            let attempts: Option<i64> = transaction
                .prepare_cached(
                    "DELETE FROM deliveries WHERE seq = ?1 AND holder = ?2 AND ordinal = ?3
                     RETURNING attempts",
                )?
                .query_row(lease, |row| row.get(0))
                .optional()?;
            let Some(attempts) = attempts else {
                return Ok(Err(Lost::Settled));
            };
            bury(transaction, books, &hold.queue, seq, attempts, reason)?;
        }
    }
    Ok(Ok(()))
}

fn limit_reason(limit: i64) -> String {
    format!("delivery limit {limit} exceeded")
}

/// Moves a message to the dead letters, in the transaction that ends its last delivery (law C7).
fn bury(
    transaction: &Connection,
    books: &mut Books,
    queue: &QueueName,
    seq: i64,
    attempts: i64,
    reason: &str,
) -> Result<()> {
    let Some(book) = books.of(transaction, queue)? else {
        return Err(no_queue());
    };
    transaction
        .prepare_cached(
            "INSERT INTO dead_letters(seq, queue, id, kind, content_type, headers, sender, body,
                 reason, attempts)
             SELECT ?2, queue, id, kind, content_type, headers, sender, body, ?3, ?4
             FROM messages WHERE seq = ?1",
        )?
        .execute(params![seq, book.place()?, reason, attempts])?;
    book.take_place();
    book.dead += 1;
    remove(transaction, books, queue, seq)
}

fn remove(transaction: &Connection, books: &mut Books, queue: &QueueName, seq: i64) -> Result<()> {
    let removed = transaction
        .prepare_cached("DELETE FROM messages WHERE seq = ?1")?
        .execute([seq])?;
    if let Some(book) = books.of(transaction, queue)? {
        book.held -= i64::try_from(removed).unwrap_or(0);
    }
    Ok(())
}

/// A dropped consumer: what it only buffered goes back uncounted (laws C9, F8); its deliveries stay.
pub(super) fn detach(transaction: &Connection, books: &mut Books, hold: &Hold) -> Result<()> {
    leave(transaction, books, hold, false)
}

/// A closed handle: all goes back.
pub(super) fn release(transaction: &Connection, books: &mut Books, hold: &Hold) -> Result<()> {
    leave(transaction, books, hold, true)
}

fn leave(transaction: &Connection, books: &mut Books, hold: &Hold, all: bool) -> Result<()> {
    let (handed, queue_id) = {
        let state = lock(&hold.state);
        (state.handed, state.queue_id)
    };
    // A hold whose attach failed has no queue, and holds nothing.
    if let Some(book) = books.of(transaction, &hold.queue)?
        && (book.id == queue_id || book.consumer == Some(hold.token))
    {
        give_back(transaction, book, hold.token, handed, all)?;
        if book.consumer == Some(hold.token) {
            book.consumer = None;
        } else {
            book.wake = true;
        }
    }
    Ok(())
}

/// The moment on the wall clock, rounded up: not before (law C6). None: now.
fn due(delay: Duration) -> Option<i64> {
    if delay.is_zero() {
        return None;
    }
    let delay = i64::try_from(delay.as_micros().div_ceil(1000)).unwrap_or(i64::MAX);
    Some(now_ms().saturating_add(delay).saturating_add(1))
}

/// What a timer takes: a hundred years.
const CENTURY_MS: u64 = 100 * 365 * 24 * 60 * 60 * 1000;

/// Milliseconds since 1970.
pub(super) fn now_ms() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// Reads the columns of [`MESSAGE`], from this one on.
pub(super) fn read_message(row: &Row<'_>, at: usize) -> Result<Message> {
    let foreign = |error: Error| {
        Error::new(
            ErrorKind::Internal,
            format!("the database holds what wilco did not write: {error}"),
        )
    };
    let id = |at: usize| MessageId::new(row.get_ref(at)?.as_str().map_err(rusqlite::Error::from)?);
    let id = |at: usize| id(at).map_err(foreign);
    Ok(Message {
        id: id(at)?,
        kind: id(at + 1)?,
        content_type: match row.get_ref(at + 2)? {
            ValueRef::Null => JSON_TYPE.clone(),
            _ => id(at + 2)?,
        },
        headers: match row.get::<_, Option<String>>(at + 3)? {
            None => Headers::new(),
            Some(headers) => serde_json::from_str(&headers)
                .map_err(|error| foreign(Error::new(ErrorKind::Internal, error.to_string())))?,
        },
        from: match row.get::<_, Option<String>>(at + 4)? {
            None => None,
            Some(sender) => Some(sender.parse().map_err(foreign)?),
        },
        body: row.get::<_, Vec<u8>>(at + 5)?.into(),
    })
}
