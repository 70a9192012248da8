//! The counters of queues, and where in a queue a message stands.
//!
//! A publish writes no counter: a page less for each commit to put on the disk. The row counts up to
//! place `next`; what was published since stands behind it without a gap, and is counted by its last
//! place. So whoever takes a message away writes the row (`touch`).

use std::collections::HashMap;

use rusqlite::{Connection, OptionalExtension as _, params};

use crate::{
    error::{Error, ErrorKind, Result},
    names::QueueName,
    sqlite::Fault,
};

/// How many places one queue has: the rest of a row's number is the queue's id.
pub(super) const PLACE_BITS: u32 = 36;

/// The counters of the queues that a transaction touches: read once, written at most once.
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
        Ok(self.0.get_mut(queue).and_then(Option::as_mut))
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
                "SELECT id, delivery_limit, max_messages, next, held, dead, consumer,
                     (SELECT max(seq) FROM messages
                      WHERE seq > (queues.id << ?2 | next) AND seq < (queues.id + 1) << ?2)
                 FROM queues WHERE name = ?1",
            )?
            .query_row(params![queue.as_str(), PLACE_BITS], |row| {
                let counted: i64 = row.get(3)?;
                let next = match row.get::<_, Option<i64>>(7)? {
                    Some(last) => last & ((1 << PLACE_BITS) - 1),
                    None => counted,
                };
                Ok(Self {
                    id: row.get(0)?,
                    delivery_limit: row.get(1)?,
                    max_messages: row.get(2)?,
                    next,
                    held: row.get::<_, i64>(4)? + (next - counted),
                    dead: row.get(5)?,
                    consumer: row.get(6)?,
                    changed: false,
                    wake: false,
                })
            })
            .optional()?;
        Ok(book)
    }

    /// To be called where more changes than a message behind the others.
    pub(super) fn touch(&mut self) {
        self.changed = true;
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

#[cfg(test)]
mod tests {
    use std::{num::NonZeroU32, time::Duration};

    use crate::{
        Deadline, ErrorKind, GuestAddress, GuestId, Message,
        broker::{ConsumeOptions, QueueSpec},
        connect,
    };

    /// What one commit puts into the log for each page that it changed.
    const FRAME: u64 = 24 + 4096;

    #[tokio::test]
    async fn a_publish_writes_the_message_and_its_id_and_no_other_page() {
        let within = Deadline::after(Duration::from_secs(30));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("b.db");
        let broker = connect(&format!("sqlite://{}", path.display()))
            .await
            .unwrap();
        let queue = GuestAddress::from(GuestId::new("g").unwrap()).queue();
        broker
            .declare(&QueueSpec::new(queue.clone()), within)
            .await
            .unwrap();
        let mut log = vec![];
        for _ in 0..4 {
            let message = Message::new("prepare", "x").unwrap();
            broker.publish(&queue, message, within).await.unwrap();
            let length = path.with_extension("db-wal").metadata().unwrap().len();
            log.push(length);
        }
        let grown: Vec<_> = log.windows(2).map(|two| two[1] - two[0]).collect();
        assert_eq!(grown, [2 * FRAME; 3]);
    }

    #[tokio::test]
    async fn q9_q12_what_was_published_is_counted_and_no_place_is_used_twice() {
        let within = Deadline::after(Duration::from_secs(30));
        let directory = tempfile::tempdir().unwrap();
        let url = |options: &str| format!("sqlite://{}/b.db{options}", directory.path().display());
        let broker = connect(&url("")).await.unwrap();
        // Shares nothing with it but the file, as another process.
        let apart = connect(&url("?sync=normal")).await.unwrap();
        let queue = GuestAddress::from(GuestId::new("g").unwrap()).queue();
        let spec = QueueSpec::new(queue.clone()).with_max_messages(3);
        broker.declare(&spec, within).await.unwrap();
        let publish = async || {
            let message = Message::new("prepare", "x").unwrap();
            broker.publish(&queue, message, within).await
        };
        let options = ConsumeOptions::prefetch(NonZeroU32::MIN);
        let mut consumer = apart.consume(&queue, options, within).await.unwrap();
        for n in 0..20 {
            // The queue is emptied from its end too: its last place is gone, and not to be had again,
            // or the consumer would not see what comes after.
            publish().await.unwrap();
            let delivery = within.bound(consumer.next()).await.unwrap().unwrap();
            if n % 3 == 0 {
                delivery.dead_letter("", within).await.unwrap();
            } else {
                delivery.ack(within).await.unwrap();
            }
        }
        for _ in 0..3 {
            publish().await.unwrap();
        }
        let error = publish().await.unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::BrokerRefused);
        let letter = broker
            .dead_letters(&queue, None, NonZeroU32::MIN, within)
            .await
            .unwrap();
        let error = broker.redrive(&queue, &letter[0].key, within).await;
        assert_eq!(*error.unwrap_err().kind(), ErrorKind::BrokerRefused);
        let delivery = within.bound(consumer.next()).await.unwrap().unwrap();
        delivery.ack(within).await.unwrap();
        assert!(
            broker
                .redrive(&queue, &letter[0].key, within)
                .await
                .unwrap()
        );
        let status = apart.status(&queue, within).await.unwrap();
        assert_eq!((status.messages(), status.dead), (9, 6), "{status:?}");
        for _ in 0..3 {
            let delivery = within.bound(consumer.next()).await.unwrap().unwrap();
            delivery.ack(within).await.unwrap();
        }
        let status = broker.status(&queue, within).await.unwrap();
        assert_eq!((status.messages(), status.dead), (6, 6), "{status:?}");
    }
}
