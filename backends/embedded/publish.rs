//! Publishing and settling: the work that comes often, and is done together.
//!
//! Tasks put what they want into an inbox. The writer empties it into one transaction, where a queue's
//! counters are read once and written once, however many messages there are.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rusqlite::{Connection, params};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::{
    MAX_BODY_BYTES,
    books::Books,
    closed,
    connection::{Core, Handle, lock},
    consume::{Held, Hold, Lost},
    no_queue,
    row::JSON,
    settle,
};
use crate::{
    broker::{Receipt, Settlement},
    deadline::Deadline,
    error::{Error, ErrorKind, Outcome, Result},
    message::Message,
    names::QueueName,
    sqlite::{Fate, Fault, Op, Ticket},
};

/// The most publishes and settlements that wait inside; more wait outside, up to their deadlines.
const WAITING: usize = 4096;

/// From how many on a crowd is waited for; until nobody came for this long; and no longer than this:
/// far less than a sync takes.
const CROWD: usize = 8;
const STRAGGLER: Duration = Duration::from_micros(15);
const GATHERING: Duration = Duration::from_micros(60);

/// How long to wait before something is tried again that failed on the disk.
const AGAIN: Duration = Duration::from_millis(300);

pub(super) async fn publish(
    handle: &Handle,
    queue: &QueueName,
    message: Message,
    deadline: Deadline,
) -> Result<Receipt> {
    let core = handle.open()?;
    if message.body.len() > MAX_BODY_BYTES {
        let limit = MAX_BODY_BYTES as u64;
        return Err(Error::new(
            ErrorKind::TooLarge { limit },
            format!(
                "the body has {} bytes, and at most {limit} are taken",
                message.body.len()
            ),
        ));
    }
    let headers = (!message.headers.is_empty())
        .then(|| serde_json::to_string(&message.headers))
        .transpose()
        .map_err(|error| Error::new(ErrorKind::Internal, format!("headers: {error}")))?;
    let room = core.inbox.room(deadline).await?;
    let (reply, answer) = oneshot::channel();
    let ticket = Ticket::default();
    core.hand_in(Item::Publish(Publish {
        queue: queue.clone(),
        message,
        headers,
        ticket: ticket.clone(),
        result: None,
        reply,
        _room: room,
    }))?;
    ticket.answer(deadline, answer).await
}

/// What waits for the writer.
#[derive(Debug)]
pub(super) struct Inbox {
    waiting: Mutex<Waiting>,
    room: Arc<Semaphore>,
    /// Items that nobody waits for, and that are not committed yet.
    loose: AtomicUsize,
    /// How many came together lately.
    crowd: AtomicUsize,
}

#[derive(Debug, Default)]
struct Waiting {
    items: Vec<Item>,
    /// Whether the writer will come for them.
    called: bool,
}

impl Default for Inbox {
    fn default() -> Self {
        Self {
            waiting: Mutex::default(),
            room: Arc::new(Semaphore::new(WAITING)),
            loose: AtomicUsize::new(0),
            crowd: AtomicUsize::new(0),
        }
    }
}

impl Inbox {
    pub(super) async fn room(&self, deadline: Deadline) -> Result<OwnedSemaphorePermit> {
        let room = Arc::clone(&self.room);
        if let Ok(permit) = Arc::clone(&room).try_acquire_owned() {
            return Ok(permit);
        }
        deadline
            .bound(room.acquire_owned())
            .await
            .map_err(|error| error.with_outcome(Outcome::NotStored))?
            .map_err(|_| closed())
    }

    /// Whether something that nobody waits for, such as a dropped delivery, is under way.
    pub(super) fn has_loose(&self) -> bool {
        self.loose.load(Ordering::Acquire) > 0
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn len(&self) -> usize {
        lock(&self.waiting).items.len()
    }

    /// Those who were answered together come back together, but the first of them does not have to
    /// pay for a sync alone while the others are on their way. Who comes alone never waits.
    fn gather(&self) {
        let crowd = self.crowd.load(Ordering::Relaxed);
        if crowd < CROWD {
            return;
        }
        let begin = Instant::now();
        let (mut there, mut since) = (self.len(), begin);
        while there < crowd {
            std::thread::yield_now();
            let (now, more) = (Instant::now(), self.len());
            if more > there {
                (there, since) = (more, now);
            }
            if now - since > STRAGGLER || now - begin > GATHERING {
                break;
            }
        }
    }
}

#[derive(Debug)]
pub(super) enum Item {
    Publish(Publish),
    Settle(Settle),
    /// A delivery that was dropped: it goes back, and nobody waits.
    Return(Held),
    /// A consumer that was dropped: what it only buffered goes back.
    Detach(Arc<Hold>),
    /// A handle that was closed: all that its consumer holds goes back.
    Release(Arc<Hold>),
}

impl Item {
    fn is_loose(&self) -> bool {
        matches!(self, Self::Return(_) | Self::Detach(_) | Self::Release(_))
    }
}

#[derive(Debug)]
pub(super) struct Publish {
    queue: QueueName,
    message: Message,
    headers: Option<String>,
    ticket: Ticket,
    result: Option<Result<Receipt>>,
    reply: oneshot::Sender<Result<Receipt>>,
    _room: OwnedSemaphorePermit,
}

#[derive(Debug)]
pub(super) struct Settle {
    pub(super) held: Held,
    pub(super) settlement: Settlement,
    pub(super) ticket: Ticket,
    pub(super) result: Option<Result<()>>,
    pub(super) reply: oneshot::Sender<Result<()>>,
    pub(super) _room: OwnedSemaphorePermit,
}

impl Core {
    /// Puts an item into the inbox; calls the writer if nobody has.
    pub(super) fn hand_in(self: &Arc<Self>, item: Item) -> Result<()> {
        if item.is_loose() {
            self.inbox.loose.fetch_add(1, Ordering::AcqRel);
        }
        let mut waiting = lock(&self.inbox.waiting);
        waiting.items.push(item);
        let call = !std::mem::replace(&mut waiting.called, true);
        drop(waiting);
        if call {
            self.call_writer(None, true)
        } else {
            Ok(())
        }
    }

    /// What nobody waits for is nobody's to repeat: tried until the disk takes it.
    fn try_again(self: &Arc<Self>, owed: Vec<Item>) {
        lock(&self.inbox.waiting).items.splice(0..0, owed);
        let core = Arc::clone(self);
        let later = std::thread::Builder::new().spawn(move || {
            std::thread::sleep(AGAIN);
            // Fails when the store is closed, and then nothing is owed any more.
            let _ = core.call_writer(None, true);
        });
        if let Err(error) = later {
            tracing::warn!(%error, "what goes back waits for the next that comes");
        }
    }

    /// Has the writer do this operation, after the inbox.
    pub(super) fn after_inbox(self: &Arc<Self>, op: Box<dyn Op>, synced: bool) -> Result<()> {
        self.call_writer(Some(op), synced)
    }

    fn call_writer(self: &Arc<Self>, then: Option<Box<dyn Op>>, synced: bool) -> Result<()> {
        let round = Round {
            core: Arc::clone(self),
            items: Vec::new(),
            then,
            synced,
            books: Books::default(),
        };
        self.store.submit(Box::new(round)).map_err(|_| {
            // What is in the inbox is told by its senders being dropped: outside of the lock.
            let gone = std::mem::take(&mut lock(&self.inbox.waiting).items);
            drop(gone);
            closed()
        })
    }
}

/// One emptying of the inbox, and perhaps one operation more.
struct Round {
    core: Arc<Core>,
    items: Vec<Item>,
    then: Option<Box<dyn Op>>,
    /// Whether the operation has to be synced. What is in the inbox always has.
    synced: bool,
    books: Books,
}

impl Op for Round {
    fn needs_sync(&self) -> bool {
        self.synced || !self.core.inbox.is_empty()
    }

    fn gather(&self) {
        // What need not be synced goes alone if nothing else is there.
        if self.needs_sync() {
            self.core.inbox.gather();
        }
    }

    fn is_wanted(&self) -> bool {
        self.then.as_ref().is_none_or(|op| op.is_wanted())
            || lock(&self.core.inbox.waiting)
                .items
                .iter()
                .any(|item| match item {
                    Item::Publish(publish) => publish.ticket.is_wanted(),
                    _ => true,
                })
    }

    fn run(&mut self, transaction: &Connection, synced: bool) {
        if synced {
            let mut waiting = lock(&self.core.inbox.waiting);
            self.items = std::mem::take(&mut waiting.items);
            waiting.called = false;
            drop(waiting);
            // One small round does not make it forget.
            let crowd = &self.core.inbox.crowd;
            let lately = crowd.load(Ordering::Relaxed) / 2;
            crowd.store(self.items.len().max(lately), Ordering::Relaxed);
        }
        let done = self
            .do_items(transaction)
            .and_then(|()| self.books.write(transaction));
        if let Err(error) = done.map_err(Error::from) {
            // Half an item may be done. This is for a disk that fails, so nobody's share is saved.
            tracing::error!(%error, "a transaction is rolled back");
            if !transaction.is_autocommit() {
                let _ = transaction.execute_batch("ROLLBACK");
            }
            return;
        }
        if let Some(op) = &mut self.then {
            op.run(transaction, synced);
        }
    }

    fn finish(self: Box<Self>, fate: Fate<'_>) {
        let Self {
            core,
            items,
            then,
            books,
            ..
        } = *self;
        if matches!(fate, Fate::Committed) {
            for (queue, token) in books.to_wake() {
                core.wake(queue, token);
            }
        }
        let mut owed = Vec::new();
        for item in items {
            if item.is_loose() {
                if matches!(fate, Fate::Lost(_)) {
                    owed.push(item);
                    continue;
                }
                core.inbox.loose.fetch_sub(1, Ordering::AcqRel);
            }
            match item {
                Item::Publish(publish) => {
                    // The caller may have given up.
                    let _ = publish.reply.send(answer(publish.result, fate));
                }
                Item::Settle(settle) => {
                    let again = !matches!(settle.settlement, Settlement::Ack);
                    let answer = answer(settle.result, fate);
                    if again && answer.is_ok() {
                        settle.held.hold.expect_returned();
                    }
                    let _ = settle.reply.send(answer);
                }
                Item::Return(held) => held.hold.expect_returned(),
                Item::Detach(_) => {}
                Item::Release(hold) => hold.let_go(),
            }
        }
        if !owed.is_empty() {
            core.try_again(owed);
        }
        if let Some(op) = then {
            op.finish(fate);
        }
    }
}

fn answer<T>(result: Option<Result<T>>, fate: Fate<'_>) -> Result<T> {
    match (result, fate) {
        (Some(Err(error)), _) => Err(error.with_outcome(Outcome::NotStored)),
        (_, Fate::Lost(failure)) => Err(failure.error()),
        (Some(Ok(value)), Fate::Committed) => Ok(value),
        // It had been given up: nobody listens.
        (None, Fate::Committed) => Err(Error::new(ErrorKind::DeadlineExceeded, "given up")),
    }
}

impl Round {
    /// An error here means that an item is half done.
    fn do_items(&mut self, transaction: &Connection) -> Result<(), Fault> {
        if self.items.is_empty() {
            return Ok(());
        }
        let Self { items, books, .. } = self;
        let mut insert = transaction.prepare_cached(
            "INSERT INTO messages(seq, queue, id, kind, content_type, headers, sender, body)
             VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT(queue, id) DO NOTHING",
        )?;
        for item in items.iter_mut() {
            match item {
                Item::Publish(publish) => {
                    if publish.ticket.start() {
                        let stored = store(transaction, books, &mut insert, publish);
                        let swept = stored.is_err() && transaction.is_autocommit();
                        publish.result = Some(stored.map_err(Error::from));
                        if swept {
                            return Err(Error::new(
                                ErrorKind::BrokerRefused,
                                "a publish failed on the disk",
                            )
                            .into());
                        }
                    }
                }
                Item::Settle(settle) => {
                    if settle.ticket.start() {
                        let Settle {
                            held, settlement, ..
                        } = settle;
                        settle.result = Some(
                            match settle::settle(transaction, books, held, settlement)? {
                                Ok(()) => Ok(()),
                                Err(lost) => Err(lost.error()),
                            },
                        );
                    }
                }
                Item::Return(held) => {
                    let back = Settlement::Retry(Duration::ZERO);
                    let _: std::result::Result<(), Lost> =
                        settle::settle(transaction, books, held, &back)?;
                }
                Item::Detach(hold) => settle::detach(transaction, books, hold)?,
                Item::Release(hold) => settle::release(transaction, books, hold)?,
            }
        }
        Ok(())
    }
}

fn store(
    transaction: &Connection,
    books: &mut Books,
    insert: &mut rusqlite::CachedStatement<'_>,
    publish: &Publish,
) -> Result<Receipt, Fault> {
    let Publish {
        queue,
        message,
        headers,
        ..
    } = publish;
    let book = books.of(transaction, queue)?.ok_or_else(no_queue)?;
    if book.is_full() {
        // Full for what is new (law Q12), not for what is here already (law P3).
        let there = transaction
            .prepare_cached("SELECT 1 FROM messages WHERE queue = ?1 AND id = ?2")?
            .exists(params![book.id, message.id.as_str()])?;
        if there {
            return Ok(Receipt::new(true));
        }
        return Err(Error::new(
            ErrorKind::BrokerRefused,
            format!(
                "the queue is full: it holds {} messages, and was made for no more",
                book.held
            ),
        )
        .into());
    }
    let content_type = message.content_type.as_str();
    let stored = insert.execute(params![
        book.place()?,
        book.id,
        message.id.as_str(),
        message.kind.as_str(),
        (content_type != JSON).then_some(content_type),
        headers,
        message.from.as_ref().map(QueueName::as_str),
        message.body.as_ref(),
    ])?;
    if stored == 1 {
        book.take_place();
        book.held += 1;
        book.wake = true;
    }
    Ok(Receipt::new(stored == 0))
}
