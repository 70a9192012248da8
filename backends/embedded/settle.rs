//! How a delivery ends: acked, back in its queue, or among the dead letters.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, OptionalExtension as _, params};

use super::{
    books::{Book, Books, PLACE_BITS},
    connection::lock,
    consume::{Held, Hold, Lost},
    no_queue,
};
use crate::{
    broker::Settlement, deadline::Deadline, error::Result, names::QueueName, sqlite::Fault,
};

/// Settles one delivery. An error means that it is half done, and the transaction has to go.
pub(super) fn settle(
    transaction: &Connection,
    books: &mut Books,
    held: &Held,
    settlement: &Settlement,
) -> Result<std::result::Result<(), Lost>, Fault> {
    let (hold, seq) = (&held.hold, held.seq);
    let lease = params![seq, hold.token, held.ordinal];
    let (id, limit) = match books.of(transaction, &hold.queue)? {
        Some(book) => (book.id, book.delivery_limit),
        None => return Ok(Err(Lost::QueueDeleted)),
    };
    if seq >> PLACE_BITS != id {
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

pub(super) fn limit_reason(limit: i64) -> String {
    format!("delivery limit {limit} exceeded")
}

/// Moves a message to the dead letters, in the transaction that ends its last delivery (law C7).
pub(super) fn bury(
    transaction: &Connection,
    books: &mut Books,
    queue: &QueueName,
    seq: i64,
    attempts: i64,
    reason: &str,
) -> Result<(), Fault> {
    let Some(book) = books.of(transaction, queue)? else {
        return Err(no_queue().into());
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
    book.touch();
    remove(transaction, books, queue, seq)
}

fn remove(
    transaction: &Connection,
    books: &mut Books,
    queue: &QueueName,
    seq: i64,
) -> Result<(), Fault> {
    let removed = transaction
        .prepare_cached("DELETE FROM messages WHERE seq = ?1")?
        .execute([seq])?;
    if let Some(book) = books.of(transaction, queue)? {
        book.held -= i64::try_from(removed).unwrap_or(0);
        book.touch();
    }
    Ok(())
}

/// A dropped consumer: what it only buffered goes back uncounted (laws C9, F8); its deliveries stay.
pub(super) fn detach(
    transaction: &Connection,
    books: &mut Books,
    hold: &Hold,
) -> Result<(), Fault> {
    leave(transaction, books, hold, false)
}

/// A closed handle: all goes back.
pub(super) fn release(
    transaction: &Connection,
    books: &mut Books,
    hold: &Hold,
) -> Result<(), Fault> {
    leave(transaction, books, hold, true)
}

fn leave(transaction: &Connection, books: &mut Books, hold: &Hold, all: bool) -> Result<(), Fault> {
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
            book.touch();
        } else {
            book.wake = true;
        }
    }
    Ok(())
}

/// Gives back what `holder` holds beyond its delivery number `handed`, uncounted; and `all` the rest.
pub(super) fn give_back(
    transaction: &Connection,
    book: &Book,
    holder: i64,
    handed: i64,
    all: bool,
) -> Result<(), Fault> {
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

/// The moment on the wall clock, rounded up: not before (law C6). None: now.
fn due(delay: Duration) -> Option<i64> {
    if delay.is_zero() {
        return None;
    }
    let delay = i64::try_from(delay.as_micros().div_ceil(1000)).unwrap_or(i64::MAX);
    Some(now_ms().saturating_add(delay).saturating_add(1))
}

/// Milliseconds since 1970.
pub(super) fn now_ms() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
