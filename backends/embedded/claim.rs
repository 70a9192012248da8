//! Claiming: the transactions in which a consumer attaches and gets its messages.

use std::{collections::HashMap, sync::Arc, time::Duration};

use rusqlite::Connection;
use tokio::time::Instant;

use super::{
    attach::Lock,
    books::{Book, Books},
    connection::{Core, lock},
    consume::{Claimed, Hold, LOOK_AGAIN, Lost, State, conflict},
    no_queue,
    row::{MESSAGE, read_message},
    settle::{bury, give_back, limit_reason, now_ms},
};
use crate::{
    error::{Error, Result},
    message::Message,
    names::QueueName,
    sqlite::{Fate, Fault, Op, alone},
};

/// Where a consumer begins.
pub(super) struct Start {
    pub(super) queue_id: i64,
    pub(super) cursor: i64,
    pub(super) strangers: bool,
}

/// Takes the queue's one place (law C12), from a dead holder too, in one transaction.
pub(super) fn attach(
    transaction: &Connection,
    core: &Core,
    queue: &QueueName,
    token: i64,
) -> Result<Start, Fault> {
    let book = Book::read(transaction, queue)?.ok_or_else(no_queue)?;
    if let Some(other) = book.consumer
        && core.is_alive(queue, other)
    {
        return Err(conflict().into());
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
) -> Result<bool, Fault> {
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

/// A batch of messages being claimed. What comes of it goes to the hold, not to the future that asked:
/// that may be dropped.
pub(super) struct Claim {
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
        let claim = alone(transaction, |transaction| self.claim(transaction));
        self.result = Some(claim.map_err(Error::from));
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
    /// A claim of as many as `hold` has room for, from where it stands.
    pub(super) fn new(hold: &Arc<Hold>, state: &State) -> Self {
        Self {
            hold: Arc::clone(hold),
            most: hold.prefetch - state.unsettled,
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
        }
    }

    fn claim(&mut self, transaction: &Connection) -> Result<std::result::Result<(), Lost>, Fault> {
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
    ) -> Result<(), Fault> {
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
    fn claim_fresh(&mut self, transaction: &Connection, book: &Book) -> Result<(), Fault> {
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

/// What a timer takes: a hundred years.
const CENTURY_MS: u64 = 100 * 365 * 24 * 60 * 60 * 1000;
