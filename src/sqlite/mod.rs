//! One SQLite file with one writer: what the embedded broker, the records and the journal stand on.
//!
//! All writes of a process to a file go through one thread, which puts those that wait together into
//! one transaction: one fsync for all of them. A second thread reads, from the last committed state,
//! without waiting for a write. Other processes may have the same file open; waiting for their turn is
//! done here, and nobody above ever sees SQLite's BUSY.

mod failure;
mod lane;
mod open;

use std::{fmt, path::PathBuf, sync::Arc};

use rusqlite::Connection;

pub(crate) use self::failure::Fault;
use self::{
    lane::Lane,
    open::{Opened, Sync},
};
#[cfg_attr(not(feature = "embedded"), allow(unused_imports))]
pub(crate) use self::{
    lane::{Call, Fate, Op, Ticket, alone},
    open::{FileKey, file_key},
};
use crate::{deadline::Deadline, error::Result};

/// What a file is for, so that no program takes another's for its own.
#[derive(Debug)]
pub(crate) struct Schema {
    /// For people, such as `wilco broker`.
    pub(crate) what: &'static str,
    /// SQLite's `application_id`: never 0.
    pub(crate) application_id: i32,
    /// SQLite's `user_version`.
    pub(crate) version: i32,
    /// Makes the version above in an empty database.
    pub(crate) sql: &'static str,
}

/// Where a database is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Location {
    /// A file that processes of one machine share.
    File(PathBuf),
    /// This process's memory, private to one [`Store`].
    #[cfg_attr(not(feature = "embedded"), allow(dead_code))]
    Memory,
}

/// How hard a commit is pressed onto the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(not(feature = "embedded"), allow(dead_code))]
pub(crate) enum SyncLevel {
    /// Synced before a write returns: survives a power cut.
    Full,
    /// Synced at checkpoints: survives a kill of the process.
    Normal,
    /// Never synced: survives a kill of the process; a power cut can destroy the file.
    Off,
}

/// A handle to one database. Clones share it; the last one dropped lets the file go.
#[derive(Clone)]
pub(crate) struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    writer: Arc<Lane>,
    /// None in memory, where the writer's connection is the only one there can be.
    reader: Option<Arc<Lane>>,
    location: Location,
    file: Option<FileKey>,
}

impl Store {
    /// Opens the database, and makes it if it is missing or empty.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io), [`ForeignFile`](crate::ErrorKind::ForeignFile): the file is
    /// unchanged then.
    #[cfg_attr(feature = "embedded", allow(dead_code))]
    pub(crate) async fn open(location: Location, schema: &'static Schema) -> Result<Self> {
        Self::open_with(location, schema, SyncLevel::Full).await
    }

    /// As [`Store::open`], with less than full durability.
    pub(crate) async fn open_with(
        location: Location,
        schema: &'static Schema,
        sync: SyncLevel,
    ) -> Result<Self> {
        let opened = match location.clone() {
            // Opening reads and locks files, and may wait for another process that makes them.
            Location::File(path) => {
                tokio::task::spawn_blocking(move || open::file(path, schema, sync))
                    .await
                    .map_err(|error| {
                        failure::internal(format!("opening a database failed: {error}"))
                    })??
            }
            Location::Memory => open::memory(schema)?,
        };
        let Opened {
            location,
            writer,
            reader,
            held,
        } = opened;
        let writer = Lane::start(
            "wilco-write",
            "BEGIN IMMEDIATE",
            writer,
            &location,
            held.clone(),
            Sync(sync),
        )?;
        let reader = reader
            .map(|reader| {
                // The SELECT takes the snapshot, so that what follows is never refused as busy.
                let begin = "BEGIN; SELECT 1 FROM sqlite_schema LIMIT 1";
                Lane::start(
                    "wilco-read",
                    begin,
                    reader,
                    &location,
                    held.clone(),
                    Sync(sync),
                )
            })
            .transpose()
            .inspect_err(|_| writer.shut())?;
        let inner = Inner {
            writer,
            reader,
            location,
            file: held.map(|held| held.0),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Changes the database. Ok: committed, and synced to disk for a file. Writes that wait together
    /// share one transaction; one that returns an error is rolled back alone.
    ///
    /// # Errors
    /// What `op` returned, or the store's own; each with the outcome `NotStored` if the change is
    /// certain not to have happened and never to happen, `Unknown` otherwise.
    ///
    /// # Cancel safety
    /// Dropped before the writer began with it, `op` never runs; later, it may be committed.
    #[cfg_attr(feature = "embedded", allow(dead_code))]
    pub(crate) async fn write<T: Send + 'static>(
        &self,
        deadline: Deadline,
        op: impl FnOnce(&Connection) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T> {
        self.inner.writer.call(deadline, op).await
    }

    /// Reads one committed state of the database: everything that a write returned Ok for before.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        deadline: Deadline,
        op: impl FnOnce(&Connection) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T> {
        let lane = self.inner.reader.as_ref().unwrap_or(&self.inner.writer);
        lane.call(deadline, op)
            .await
            .map_err(crate::Error::without_outcome)
    }

    /// Hands an operation to the writer, without a bound and without waiting: for those who bound
    /// what they hand over themselves. It is given back if the store is closed.
    #[cfg_attr(not(feature = "embedded"), allow(dead_code))]
    pub(crate) fn submit(&self, op: Box<dyn Op>) -> std::result::Result<(), Box<dyn Op>> {
        self.inner.writer.push(op)
    }

    /// Finishes what was accepted, and lets the file go. Everything after it fails with
    /// [`Closed`](crate::ErrorKind::Closed), for every clone. A second call waits for the first.
    #[cfg_attr(not(feature = "embedded"), allow(dead_code))]
    pub(crate) async fn close(&self, deadline: Deadline) -> Result<()> {
        let inner = &self.inner;
        if let Some(reader) = &inner.reader {
            reader.shut();
            deadline.bound(reader.ended()).await?;
        }
        inner.writer.shut();
        deadline.bound(inner.writer.ended()).await
    }

    /// Which file it is; None in memory.
    #[cfg_attr(not(feature = "embedded"), allow(dead_code))]
    pub(crate) fn file(&self) -> Option<FileKey> {
        self.inner.file
    }

    /// Where the database is, its path made absolute.
    #[cfg_attr(not(feature = "embedded"), allow(dead_code))]
    pub(crate) fn location(&self) -> &Location {
        &self.inner.location
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.writer.shut();
        if let Some(reader) = &self.reader {
            reader.shut();
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Store").field(&self.inner.location).finish()
    }
}

#[cfg(test)]
mod tests;
