//! The counters of queues, and where in a queue a message stands.

use std::collections::HashMap;

use rusqlite::{Connection, OptionalExtension as _, params};

use crate::{
    error::{Error, ErrorKind, Result},
    names::QueueName,
    sqlite::Fault,
};

/// How many places one queue has: the rest of a row's number is the queue's id.
pub(super) const PLACE_BITS: u32 = 36;

/// The counters of the queues that a transaction touches: read once, written once.
#[derive(Debug, Default)]
pub(super) struct Books(HashMap<QueueName, Option<Book>>);

#[derive(Debug)]
pub(super) struct Book {
    pub(super) id: i64,
    pub(super) delivery_limit: i64,
    max_messages: Option<i64>,
    next: i64,
    pub(super) held: i64,
    pub(super) dead: i64,
    pub(super) consumer: Option<i64>,
    changed: bool,
    pub(super) wake: bool,
}

impl Books {
    /// None if there is no such queue.
    pub(super) fn of(
        &mut self,
        transaction: &Connection,
        queue: &QueueName,
    ) -> Result<Option<&mut Book>, Fault> {
        if !self.0.contains_key(queue) {
            let book = Book::read(transaction, queue)?;
            self.0.insert(queue.clone(), book);
        }
        let book = self.0.get_mut(queue).and_then(Option::as_mut);
        Ok(book.map(Book::touch))
    }

    pub(super) fn write(&self, transaction: &Connection) -> Result<(), Fault> {
        for book in self.0.values().flatten().filter(|book| book.changed) {
            transaction
                .prepare_cached(
                    "UPDATE queues SET next = ?2, held = ?3, dead = ?4, consumer = ?5 WHERE id = ?1",
                )?
                .execute(params![
                    book.id,
                    book.next,
                    book.held,
                    book.dead,
                    book.consumer
                ])?;
        }
        Ok(())
    }

    pub(super) fn to_wake(&self) -> impl Iterator<Item = (&QueueName, i64)> {
        self.0.iter().filter_map(|(queue, book)| {
            let book = book.as_ref().filter(|book| book.wake)?;
            Some((queue, book.consumer?))
        })
    }
}

impl Book {
    pub(super) fn read(transaction: &Connection, queue: &QueueName) -> Result<Option<Self>, Fault> {
        let book = transaction
            .prepare_cached(
                "SELECT id, delivery_limit, max_messages, next, held, dead, consumer
                 FROM queues WHERE name = ?1",
            )?
            .query_row([queue.as_str()], |row| {
                Ok(Self {
                    id: row.get(0)?,
                    delivery_limit: row.get(1)?,
                    max_messages: row.get(2)?,
                    next: row.get(3)?,
                    held: row.get(4)?,
                    dead: row.get(5)?,
                    consumer: row.get(6)?,
                    changed: false,
                    wake: false,
                })
            })
            .optional()?;
        Ok(book)
    }

    pub(super) fn touch(&mut self) -> &mut Self {
        self.changed = true;
        self
    }

    pub(super) fn is_full(&self) -> bool {
        self.max_messages.is_some_and(|most| self.held >= most)
    }

    /// The row number of the next place.
    pub(super) fn place(&self) -> Result<i64> {
        let next = self.next + 1;
        if next >> PLACE_BITS != 0 {
            return Err(Error::new(
                ErrorKind::BrokerRefused,
                "the queue has had as many messages as one can have; make a new one",
            ));
        }
        Ok(self.first() | next)
    }

    pub(super) fn take_place(&mut self) {
        self.next += 1;
    }

    /// The row number before the first place.
    pub(super) fn first(&self) -> i64 {
        self.id << PLACE_BITS
    }

    /// The row number of the last place.
    pub(super) fn last(&self) -> i64 {
        self.first() | ((1 << PLACE_BITS) - 1)
    }
}
