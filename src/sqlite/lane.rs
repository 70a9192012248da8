//! One thread with one connection, and the queue of operations before it.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::Duration,
};

use rusqlite::Connection;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};

use super::{
    Location, SyncLevel,
    failure::{self, Failure, Fault},
    open::{Held, Sync},
};
use crate::{
    deadline::Deadline,
    error::{Error, ErrorKind, Outcome, Result},
};

/// The most calls that wait in one lane; more wait outside.
const WAITING: usize = 1024;

/// The most operations of one transaction, so that the first of them does not wait for ever.
const TOGETHER: usize = 1024;

/// Something for the lane's thread to do inside a transaction.
pub(crate) trait Op: Send {
    /// Whether its commit has to reach the disk before [`Op::finish`], where the store syncs at all.
    fn needs_sync(&self) -> bool {
        true
    }
    /// Whether anybody still wants it. Asked while another process is in the way.
    fn is_wanted(&self) -> bool;
    /// Waits a moment for company, before the transaction begins: for those that come in crowds.
    fn gather(&self) {}
    /// Does it, in a transaction; `synced` says whether its commit will be synced. What it must take
    /// back it takes back itself.
    fn run(&mut self, transaction: &Connection, synced: bool);
    /// Tells what came of it: the only place where answers are given.
    fn finish(self: Box<Self>, fate: Fate<'_>);
}

/// What came of the transaction in which an operation ran, or would have run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fate<'a> {
    /// Committed.
    Committed,
    /// Not committed, as far as [`Failure::outcome`] says.
    Lost(&'a Failure),
}

/// Who comes first: the thread that begins with an operation, or the caller who gives it up.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ticket(Arc<AtomicU8>);

const PENDING: u8 = 0;
const STARTED: u8 = 1;
const CANCELLED: u8 = 2;

impl Ticket {
    /// The thread begins. False: it was given up, and must never be done.
    pub(crate) fn start(&self) -> bool {
        self.turn(STARTED)
    }

    /// The caller gives up. True: it is certain never to be done.
    pub(crate) fn cancel(&self) -> bool {
        self.turn(CANCELLED)
    }

    /// Whether it waits still, or was begun.
    pub(crate) fn is_wanted(&self) -> bool {
        self.0.load(Ordering::Acquire) != CANCELLED
    }

    /// Waits for the answer to an operation under this ticket until the deadline.
    pub(crate) async fn answer<T>(
        self,
        deadline: Deadline,
        answer: oneshot::Receiver<Result<T>>,
    ) -> Result<T> {
        let guard = CancelOnDrop(&self);
        let error = match tokio::time::timeout_at(deadline.instant(), answer).await {
            Ok(Ok(answer)) => return answer,
            Ok(Err(_)) => Error::new(ErrorKind::Internal, "the operation panicked"),
            Err(_) => Error::new(ErrorKind::DeadlineExceeded, "the deadline passed first"),
        };
        Err(error.with_outcome(if guard.0.cancel() {
            Outcome::NotStored
        } else {
            Outcome::Unknown
        }))
    }

    fn turn(&self, to: u8) -> bool {
        self.0
            .compare_exchange(PENDING, to, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }
}

struct CancelOnDrop<'a>(&'a Ticket);

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

pub(super) struct Lane {
    queue: Mutex<Queue>,
    filled: Condvar,
    room: Arc<Semaphore>,
    ended: watch::Sender<bool>,
}

#[derive(Default)]
struct Queue {
    ops: VecDeque<Box<dyn Op>>,
    shut: bool,
}

impl Lane {
    pub(super) fn start(
        name: &str,
        begin: &'static str,
        connection: Connection,
        location: &Location,
        held: Option<Arc<Held>>,
        sync: Sync,
    ) -> Result<Arc<Self>> {
        let lane = Arc::new(Self {
            queue: Mutex::default(),
            filled: Condvar::new(),
            room: Arc::new(Semaphore::new(WAITING)),
            ended: watch::Sender::new(false),
        });
        let file = match location {
            Location::File(path) => Some(path.display().to_string()),
            Location::Memory => None,
        };
        let mut thread = Thread {
            lane: Arc::clone(&lane),
            connection,
            begin,
            can_relax: file.is_some() && sync.0 == SyncLevel::Full,
            relaxed: false,
        };
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                failure::about(file);
                let lane = Arc::clone(&thread.lane);
                while let Some(batch) = lane.take() {
                    thread.transact(batch);
                }
                // The last connection to leave puts everything into the file itself.
                drop(thread);
                drop(held);
                lane.ended.send_replace(true);
            })?;
        Ok(lane)
    }

    pub(super) async fn call<T: Send + 'static>(
        &self,
        deadline: Deadline,
        op: impl FnOnce(&Connection) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T> {
        let room = Arc::clone(&self.room).acquire_owned();
        let room = deadline
            .bound(room)
            .await
            .map_err(|error| error.with_outcome(Outcome::NotStored))?
            .map_err(|_| Failure::closed().error())?;
        let (call, ticket, answer) = Call::boxed(op, Some(room));
        self.push(call).map_err(|_| Failure::closed().error())?;
        ticket.answer(deadline, answer).await
    }

    pub(super) fn push(&self, op: Box<dyn Op>) -> std::result::Result<(), Box<dyn Op>> {
        let mut queue = self.lock();
        if queue.shut {
            return Err(op);
        }
        queue.ops.push_back(op);
        drop(queue);
        self.filled.notify_one();
        Ok(())
    }

    /// Lets nothing more in. What is in is still done.
    pub(super) fn shut(&self) {
        self.lock().shut = true;
        self.room.close();
        self.filled.notify_all();
    }

    #[cfg_attr(not(feature = "embedded"), allow(dead_code))]
    pub(super) async fn ended(&self) {
        // Fails only without a sender, and `self` is one.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// Waits for operations; None once the lane is shut and empty.
    fn take(&self) -> Option<VecDeque<Box<dyn Op>>> {
        let mut queue = self.lock();
        loop {
            if queue.ops.len() > TOGETHER {
                let rest = queue.ops.split_off(TOGETHER);
                return Some(std::mem::replace(&mut queue.ops, rest));
            }
            if !queue.ops.is_empty() {
                return Some(std::mem::take(&mut queue.ops));
            }
            if queue.shut {
                return None;
            }
            queue = self
                .filled
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the lane's thread owns.
struct Thread {
    lane: Arc<Lane>,
    connection: Connection,
    begin: &'static str,
    /// Whether a commit that needs no sync can be cheaper than one that does.
    can_relax: bool,
    /// Whether SQLite is set not to sync now.
    relaxed: bool,
}

impl Thread {
    fn transact(&mut self, mut waiting: VecDeque<Box<dyn Op>>) {
        while !waiting.is_empty() {
            for op in &waiting {
                op.gather();
            }
            let relaxed = self.can_relax && !waiting.iter().any(|op| op.needs_sync());
            if let Err(error) = self.relax(relaxed).and_then(|()| self.begin(&mut waiting)) {
                let failure = Failure::rolled_back(&error);
                return finish(waiting, Fate::Lost(&failure));
            }
            let mut ran = VecDeque::with_capacity(waiting.len());
            let mut lost = None;
            while let Some(mut op) = waiting.pop_front() {
                let run = catch_unwind(AssertUnwindSafe(|| op.run(&self.connection, !relaxed)));
                ran.push_back(op);
                if run.is_err() {
                    lost = Some(Failure::panicked());
                } else if self.connection.is_autocommit() {
                    lost = Some(Failure::swept());
                }
                if lost.is_some() {
                    break;
                }
            }
            let lost = lost.or_else(|| self.commit().err());
            if !self.connection.is_autocommit()
                && let Err(error) = self.connection.execute_batch("ROLLBACK")
            {
                tracing::error!(%error, "a rollback failed");
            }
            finish(ran, lost.as_ref().map_or(Fate::Committed, Fate::Lost));
        }
    }

    fn relax(&mut self, relaxed: bool) -> rusqlite::Result<()> {
        if relaxed != self.relaxed {
            let level = if relaxed {
                SyncLevel::Normal
            } else {
                SyncLevel::Full
            };
            self.connection.execute_batch(Sync(level).pragma())?;
            self.relaxed = relaxed;
        }
        Ok(())
    }

    /// Begins as soon as no other process is in the way. Nothing was begun with until then, so those
    /// who give up meanwhile know that it is never done.
    fn begin(&self, waiting: &mut VecDeque<Box<dyn Op>>) -> rusqlite::Result<()> {
        loop {
            match self.connection.execute_batch(self.begin) {
                Err(error) if failure::is_busy(&error) => {
                    if !self.connection.is_autocommit() {
                        self.connection.execute_batch("ROLLBACK")?;
                    }
                    waiting.retain(|op| op.is_wanted());
                    if waiting.is_empty() {
                        return Err(error);
                    }
                    pause();
                }
                answer => return answer,
            }
        }
    }

    fn commit(&self) -> std::result::Result<(), Failure> {
        self.connection
            .prepare_cached("COMMIT")
            .and_then(|mut commit| commit.execute([]))
            .map(|_| ())
            .map_err(|error| Failure::commit(&error))
    }
}

fn finish(ops: VecDeque<Box<dyn Op>>, fate: Fate<'_>) {
    for op in ops {
        if catch_unwind(AssertUnwindSafe(|| op.finish(fate))).is_err() {
            tracing::error!("telling what came of an operation panicked");
        }
    }
}

/// Sleeps a moment before another try for a lock: 0.2 to 2 ms, so that two who collided do not again.
pub(super) fn pause() {
    let noise = u64::from(uuid::Uuid::new_v4().as_bytes()[0]);
    thread::sleep(Duration::from_micros(200 + noise * 7));
}

/// A closure as an operation, its failure taken back alone.
pub(crate) struct Call<T, F> {
    op: Option<F>,
    result: Option<Result<T>>,
    ticket: Ticket,
    reply: oneshot::Sender<Result<T>>,
    _room: Option<OwnedSemaphorePermit>,
}

impl<T, F> Call<T, F>
where
    T: Send + 'static,
    F: FnOnce(&Connection) -> Result<T, Fault> + Send + 'static,
{
    /// The operation, and what its caller waits with.
    pub(crate) fn boxed(
        op: F,
        room: Option<OwnedSemaphorePermit>,
    ) -> (Box<dyn Op>, Ticket, oneshot::Receiver<Result<T>>) {
        let (reply, answer) = oneshot::channel();
        let ticket = Ticket::default();
        let call = Self {
            op: Some(op),
            result: None,
            ticket: ticket.clone(),
            reply,
            _room: room,
        };
        (Box::new(call), ticket, answer)
    }
}

impl<T, F> Op for Call<T, F>
where
    T: Send,
    F: FnOnce(&Connection) -> Result<T, Fault> + Send,
{
    fn is_wanted(&self) -> bool {
        self.ticket.is_wanted()
    }

    fn run(&mut self, transaction: &Connection, _: bool) {
        if let Some(op) = self.op.take()
            && self.ticket.start()
        {
            self.result = Some(alone(transaction, op).map_err(Error::from));
        }
    }

    fn finish(self: Box<Self>, fate: Fate<'_>) {
        let answer = match (self.result, fate) {
            (None, Fate::Committed) => return,
            // Its own error stands: it was rolled back alone before the rest was.
            (Some(Err(error)), _) if error.outcome().is_some() => Err(error),
            (Some(Err(error)), _) => Err(error.with_outcome(Outcome::NotStored)),
            (Some(Ok(value)), Fate::Committed) => Ok(value),
            (_, Fate::Lost(failure)) => Err(failure.error()),
        };
        // The caller may have given up.
        let _ = self.reply.send(answer);
    }
}

/// Runs one operation so that its failure takes back its own changes and nobody else's.
pub(crate) fn alone<T>(
    transaction: &Connection,
    op: impl FnOnce(&Connection) -> Result<T, Fault>,
) -> Result<T, Fault> {
    let run = |sql| {
        transaction
            .prepare_cached(sql)
            .and_then(|mut statement| statement.execute([]))
    };
    run("SAVEPOINT op")?;
    let result = catch_unwind(AssertUnwindSafe(|| op(transaction)))
        .unwrap_or_else(|_| Err(failure::internal("an operation panicked".into()).into()));
    if result.is_err() && !transaction.is_autocommit() {
        run("ROLLBACK TO op")?;
    }
    if !transaction.is_autocommit() {
        run("RELEASE op")?;
    }
    result
}
