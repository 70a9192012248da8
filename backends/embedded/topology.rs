//! Queues: made, looked at, deleted; and their dead letters.

use std::{num::NonZeroU32, sync::Arc};

use rusqlite::{Connection, OptionalExtension as _, params};

use super::{
    books::Book,
    connection::{Core, Handle},
    no_queue,
    row::{MESSAGE, read_message},
    settle::now_ms,
};
use crate::{
    broker::{DeadLetter, DeadLetterKey, Declared, DeleteMode, Discarded, QueueSpec, QueueStatus},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    message::MessageId,
    names::QueueName,
    sqlite::Fault,
};

pub(super) async fn declare(
    handle: &Handle,
    spec: &QueueSpec,
    deadline: Deadline,
) -> Result<Declared> {
    let core = handle.open()?;
    // Mostly it is there: a look takes no turn at writing.
    let there = {
        let spec = spec.clone();
        core.look(deadline, move |connection| compare(connection, &spec))
            .await?
    };
    if there {
        return Ok(Declared::AlreadyExists);
    }
    let spec = spec.clone();
    core.change(deadline, move |transaction| {
        if compare(transaction, &spec)? {
            return Ok(Declared::AlreadyExists);
        }
        // A limit beyond SQLite's numbers is none that can be reached.
        let most = spec
            .max_messages
            .map(|most| i64::try_from(most).unwrap_or(i64::MAX));
        transaction.execute(
            "INSERT INTO queues(name, delivery_limit, max_messages) VALUES(?1, ?2, ?3)",
            params![spec.name.as_str(), spec.delivery_limit.get(), most],
        )?;
        Ok(Declared::Created)
    })
    .await
}

/// Whether the queue is there, with these arguments; a mismatch is an error (law Q3).
fn compare(connection: &Connection, asked: &QueueSpec) -> Result<bool, Fault> {
    let found = connection
        .prepare_cached("SELECT delivery_limit, max_messages FROM queues WHERE name = ?1")?
        .query_row([asked.name.as_str()], |row| {
            Ok((row.get::<_, u32>(0)?, row.get::<_, Option<i64>>(1)?))
        })
        .optional()?;
    let Some((limit, most)) = found else {
        return Ok(false);
    };
    let mut there = QueueSpec::new(asked.name.clone());
    if let Some(limit) = NonZeroU32::new(limit) {
        there = there.with_delivery_limit(limit);
    }
    if let Some(most) = most {
        there = there.with_max_messages(most.unsigned_abs());
    }
    let mut wanted = asked.clone();
    wanted.max_messages = wanted
        .max_messages
        .map(|most| most.min(i64::MAX.unsigned_abs()));
    let differences = there.differences(&wanted);
    if differences.is_empty() {
        Ok(true)
    } else {
        Err(Error::new(
            ErrorKind::Mismatch { differences },
            "the queue exists with other arguments; nothing was changed",
        )
        .into())
    }
}

pub(super) async fn status(
    handle: &Handle,
    queue: &QueueName,
    deadline: Deadline,
) -> Result<QueueStatus> {
    let core = handle.open()?;
    let (of, queue) = (Arc::clone(core), queue.clone());
    core.look(deadline, move |connection| {
        let book = Book::read(connection, &queue)?.ok_or_else(no_queue)?;
        count(connection, &of, queue, &book)
    })
    .await
}

pub(super) async fn list(handle: &Handle, deadline: Deadline) -> Result<Vec<QueueStatus>> {
    let core = handle.open()?;
    let of = Arc::clone(core);
    core.look(deadline, move |connection| {
        let names: Vec<String> = connection
            .prepare_cached("SELECT name FROM queues ORDER BY name")?
            .query_map([], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        names
            .into_iter()
            .map(|name| {
                let queue: QueueName = name.parse()?;
                let book = Book::read(connection, &queue)?.ok_or_else(no_queue)?;
                count(connection, &of, queue, &book)
            })
            .collect()
    })
    .await
}

fn count(
    connection: &Connection,
    core: &Core,
    queue: QueueName,
    book: &Book,
) -> Result<QueueStatus, Fault> {
    let (mut in_flight, mut delayed) = (0_i64, 0_i64);
    let mut holders = connection.prepare_cached(
        "SELECT holder, count(*), count(*) FILTER (WHERE due > ?3) FROM deliveries
         WHERE seq BETWEEN ?1 AND ?2 GROUP BY holder",
    )?;
    let mut rows = holders.query([book.first(), book.last(), now_ms()])?;
    while let Some(row) = rows.next()? {
        match row.get::<_, Option<i64>>(0)? {
            None => delayed = row.get(2)?,
            Some(holder) if core.is_alive(&queue, holder) => in_flight += row.get::<_, i64>(1)?,
            Some(_) => {}
        }
    }
    let attached = book
        .consumer
        .is_some_and(|token| core.is_alive(&queue, token));
    let mut status = QueueStatus::new(queue);
    status.ready = unsigned(book.held - in_flight - delayed);
    status.delayed = unsigned(delayed);
    status.in_flight = unsigned(in_flight);
    status.dead = unsigned(book.dead);
    status.consumers = u32::from(attached);
    Ok(status)
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

pub(super) async fn delete(
    handle: &Handle,
    queue: &QueueName,
    mode: DeleteMode,
    deadline: Deadline,
) -> Result<Discarded> {
    let core = handle.open()?;
    let (discarded, consumer) = {
        let queue = queue.clone();
        core.change(deadline, move |transaction| {
            remove_queue(transaction, &queue, mode)
        })
        .await?
    };
    if let Some(token) = consumer {
        core.wake(queue, token);
    }
    if let Some(attachments) = &core.attachments {
        attachments.sweep(queue);
    }
    Ok(discarded)
}

/// One transaction against all settlements: what it removes no ack can return Ok for any more.
fn remove_queue(
    transaction: &Connection,
    queue: &QueueName,
    mode: DeleteMode,
) -> Result<(Discarded, Option<i64>), Fault> {
    let book = Book::read(transaction, queue)?.ok_or_else(no_queue)?;
    let messages = unsigned(book.held + book.dead);
    if messages > 0 && mode == DeleteMode::IfEmpty {
        return Err(Error::new(
            ErrorKind::NotEmpty { messages },
            format!("the queue holds {messages} messages, and was not to be discarded with them"),
        )
        .into());
    }
    let range = [book.first(), book.last()];
    let ids: Vec<String> = transaction
        .prepare_cached(
            "SELECT id FROM messages WHERE seq BETWEEN ?1 AND ?2 ORDER BY seq LIMIT ?3",
        )?
        .query_map(
            params![
                range[0],
                range[1],
                i64::try_from(Discarded::MAX_IDS).unwrap_or(i64::MAX)
            ],
            |row| row.get(0),
        )?
        .collect::<rusqlite::Result<_>>()?;
    let ids = ids
        .into_iter()
        .map(MessageId::new)
        .collect::<Result<Vec<_>>>()?;
    for table in ["messages", "deliveries", "dead_letters"] {
        transaction
            .prepare_cached(&format!("DELETE FROM {table} WHERE seq BETWEEN ?1 AND ?2"))?
            .execute(range)?;
    }
    transaction
        .prepare_cached("DELETE FROM queues WHERE id = ?1")?
        .execute([book.id])?;
    Ok((Discarded::new(messages, ids), book.consumer))
}

pub(super) async fn dead_letters(
    handle: &Handle,
    queue: &QueueName,
    after: Option<&DeadLetterKey>,
    limit: NonZeroU32,
    deadline: Deadline,
) -> Result<Vec<DeadLetter>> {
    let core = handle.open()?;
    let after = after
        .map(|key| {
            place_of(key).ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidInput,
                    format!("{:?} is not a dead letter's key", key.0),
                )
            })
        })
        .transpose()?;
    let queue = queue.clone();
    core.look(deadline, move |connection| {
        let book = Book::read(connection, &queue)?.ok_or_else(no_queue)?;
        let after = after.unwrap_or(0).max(book.first());
        let mut letters = connection.prepare_cached(&format!(
            "SELECT {MESSAGE}, seq, reason, attempts FROM dead_letters
             WHERE seq > ?1 AND seq <= ?2 ORDER BY seq LIMIT ?3"
        ))?;
        let mut rows = letters.query([after, book.last(), i64::from(limit.get())])?;
        let mut read = Vec::new();
        while let Some(row) = rows.next()? {
            let key = DeadLetterKey(row.get::<_, i64>(6)?.to_string());
            let message = read_message(row, 0)?;
            read.push(DeadLetter::new(key, message, row.get(7)?, row.get(8)?));
        }
        Ok(read)
    })
    .await
}

fn place_of(key: &DeadLetterKey) -> Option<i64> {
    key.0.parse().ok().filter(|seq: &i64| *seq > 0)
}

pub(super) async fn redrive(
    handle: &Handle,
    queue: &QueueName,
    key: &DeadLetterKey,
    deadline: Deadline,
) -> Result<bool> {
    let core = handle.open()?;
    let seq = place_of(key);
    let (moved, consumer) = {
        let queue = queue.clone();
        core.change(deadline, move |transaction| {
            move_back(transaction, &queue, seq)
        })
        .await?
    };
    if let Some(token) = consumer {
        core.wake(queue, token);
    }
    Ok(moved)
}

fn move_back(
    transaction: &Connection,
    queue: &QueueName,
    seq: Option<i64>,
) -> Result<(bool, Option<i64>), Fault> {
    let book = Book::read(transaction, queue)?.ok_or_else(no_queue)?;
    let seq = seq.filter(|seq| (book.first()..=book.last()).contains(seq));
    let id: Option<String> = transaction
        .prepare_cached("SELECT id FROM dead_letters WHERE seq = ?1")?
        .query_row([seq], |row| row.get(0))
        .optional()?;
    let (Some(seq), Some(id)) = (seq, id) else {
        return Ok((false, None));
    };
    if book.is_full() {
        return Err(Error::new(
            ErrorKind::BrokerRefused,
            "the queue is full; the dead letter stays where it is",
        )
        .into());
    }
    let there = transaction
        .prepare_cached("SELECT 1 FROM messages WHERE queue = ?1 AND id = ?2")?
        .exists(params![book.id, id])?;
    if there {
        return Err(Error::new(
            ErrorKind::Conflict,
            "the queue holds a message of the same id already; the dead letter stays where it is",
        )
        .into());
    }
    transaction
        .prepare_cached(
            "INSERT INTO messages(seq, queue, id, kind, content_type, headers, sender, body)
             SELECT ?2, queue, id, kind, content_type, headers, sender, body
             FROM dead_letters WHERE seq = ?1",
        )?
        .execute([seq, book.place()?])?;
    transaction
        .prepare_cached("DELETE FROM dead_letters WHERE seq = ?1")?
        .execute([seq])?;
    transaction
        .prepare_cached("UPDATE queues SET dead = dead - 1 WHERE id = ?1")?
        .execute([book.id])?;
    Ok((true, book.consumer))
}
