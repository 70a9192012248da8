//! Records and journal in SQLite files of their own.

use std::{
    fs::{File, TryLockError},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use rusqlite::{OptionalExtension, params};

use crate::{
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    names::{GuestAddress, GuestId},
    sqlite::{Fault, Location, Schema, Store},
    workflow::{
        journal::{Entry, Journal, check_owner},
        record::Record,
        records::{Records, check_revision},
    },
};

/// How long one read or write may take: far longer than a healthy disk needs.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long to wait for a lock that may have no owner any more. One that is killed as it starts a program
/// leaves its locks to that process until it has become the program: a moment, on a busy machine a long
/// one. A supervisor that starts the agent again at once must not be told that there are two.
const LEFT_BEHIND: Duration = Duration::from_secs(2);

static RECORDS: Schema = Schema {
    what: "wilco records",
    application_id: 0x7769_6C72,
    version: 1,
    sql: "CREATE TABLE records (
              guest TEXT NOT NULL,
              incarnation INTEGER NOT NULL,
              revision INTEGER NOT NULL,
              record TEXT NOT NULL,
              PRIMARY KEY (guest, incarnation)
          ) WITHOUT ROWID;",
};

/// Records in a SQLite file, synced to disk before a save returns. The file holds payloads: protect it
/// like a database of secrets.
#[derive(Debug)]
pub struct SqliteRecords {
    store: Store,
    owner: OwnerLock,
}

impl SqliteRecords {
    /// Opens the file, or makes it.
    ///
    /// # Errors
    /// [`ErrorKind::ForeignFile`] for a database of another program, which is left as it is;
    /// [`ErrorKind::Io`].
    pub async fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        Ok(Self {
            owner: OwnerLock::beside(&path),
            store: Store::open(Location::File(path), &RECORDS).await?,
        })
    }
}

#[async_trait]
impl Records for SqliteRecords {
    async fn own(&self) -> Result<()> {
        self.owner
            .take("another taskmanager is running on these records")
            .await
    }

    async fn save(&self, record: &Record) -> Result<()> {
        let record = record.clone();
        let text = to_json(&record)?;
        let write = move |db: &rusqlite::Connection| {
            let guest = record.address.guest.as_str();
            let incarnation = as_integer(record.address.incarnation.get())?;
            let stored: Option<i64> = db
                .prepare_cached(
                    "SELECT revision FROM records WHERE guest = ?1 AND incarnation = ?2",
                )?
                .query_row(params![guest, incarnation], |row| row.get(0))
                .optional()?;
            check_revision(&record, stored.unwrap_or(0).unsigned_abs())?;
            db.prepare_cached("INSERT OR REPLACE INTO records VALUES (?1, ?2, ?3, ?4)")?
                .execute(params![
                    guest,
                    incarnation,
                    as_integer(record.revision)?,
                    text
                ])?;
            Ok(())
        };
        self.store.write(PATIENCE.into(), write).await
    }

    async fn newest(&self, guest: &GuestId) -> Result<Option<Record>> {
        let guest = guest.clone();
        let sql = "SELECT record FROM records WHERE guest = ?1 ORDER BY incarnation DESC LIMIT 1";
        let text: Option<String> = self
            .store
            .read(PATIENCE.into(), move |db| {
                Ok(db
                    .prepare_cached(sql)?
                    .query_row([guest.as_str()], |row| row.get(0))
                    .optional()?)
            })
            .await?;
        text.as_deref().map(from_json).transpose()
    }

    async fn list(&self) -> Result<Vec<Record>> {
        let sql = "SELECT record, max(incarnation) FROM records GROUP BY guest ORDER BY guest";
        let texts = self
            .store
            .read(PATIENCE.into(), move |db| strings(db, sql))
            .await?;
        texts.iter().map(|text| from_json(text)).collect()
    }
}

static JOURNAL: Schema = Schema {
    what: "wilco journal",
    application_id: 0x7769_6C6A,
    version: 1,
    sql: "CREATE TABLE machine (
              one INTEGER PRIMARY KEY CHECK (one = 1),
              address TEXT NOT NULL,
              dismissed INTEGER NOT NULL DEFAULT 0
          );
          CREATE TABLE entries (
              position INTEGER PRIMARY KEY,
              command TEXT NOT NULL UNIQUE,
              disposable INTEGER NOT NULL,
              entry TEXT NOT NULL
          );",
};

/// A journal in a SQLite file, synced to disk before a save returns.
#[derive(Debug)]
pub struct SqliteJournal {
    store: Store,
    owner: OwnerLock,
}

impl SqliteJournal {
    /// Opens the file, or makes it.
    ///
    /// # Errors
    /// [`ErrorKind::ForeignFile`] for a database of another program, which is left as it is;
    /// [`ErrorKind::Io`].
    pub async fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        Ok(Self {
            owner: OwnerLock::beside(&path),
            store: Store::open(Location::File(path), &JOURNAL).await?,
        })
    }

    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&rusqlite::Connection) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T> {
        self.store.write(Deadline::after(PATIENCE), work).await
    }
}

#[async_trait]
impl Journal for SqliteJournal {
    async fn own(&self, address: &GuestAddress) -> Result<()> {
        self.owner
            .take("another process runs this machine's agent on this journal")
            .await?;
        let address = address.clone();
        let text = to_json(&address)?;
        self.write(move |db| {
            let bound: Option<(String, bool)> = db
                .query_row("SELECT address, dismissed FROM machine", [], |row| {
                    Ok((row.get(0)?, row.get(1)?))
                })
                .optional()?;
            let Some((bound, dismissed)) = bound else {
                db.execute("INSERT INTO machine VALUES (1, ?1, 0)", [text])?;
                return Ok(());
            };
            Ok(check_owner(Some(&from_json(&bound)?), dismissed, &address)?)
        })
        .await
    }

    async fn save(&self, entry: &Entry) -> Result<()> {
        let disposable = entry.is_finished() && entry.reported && !entry.is_prepare();
        let (command, text) = (entry.command.clone(), to_json(entry)?);
        self.write(move |db| {
            db.prepare_cached(
                "INSERT INTO entries (command, disposable, entry) VALUES (?1, ?2, ?3)
                 ON CONFLICT (command) DO UPDATE SET disposable = ?2, entry = ?3",
            )?
            .execute(params![command.as_str(), disposable, text])?;
            Ok(())
        })
        .await
    }

    async fn load(&self) -> Result<Vec<Entry>> {
        let sql = "SELECT entry FROM entries ORDER BY position";
        let texts = self
            .store
            .read(PATIENCE.into(), move |db| strings(db, sql))
            .await?;
        texts.iter().map(|text| from_json(text)).collect()
    }

    async fn dismiss(&self) -> Result<()> {
        self.write(|db| {
            db.execute("UPDATE machine SET dismissed = 1", [])?;
            Ok(())
        })
        .await
    }

    async fn prune(&self, keep: usize) -> Result<()> {
        let keep = as_integer(keep as u64)?;
        self.write(move |db| {
            db.execute(
                "DELETE FROM entries WHERE position IN (
                     SELECT position FROM entries WHERE disposable ORDER BY position DESC
                     LIMIT -1 OFFSET ?1)",
                [keep],
            )?;
            Ok(())
        })
        .await
    }
}

/// A lock that the operating system holds for this process, and gives back when it is killed.
#[derive(Debug)]
struct OwnerLock {
    path: PathBuf,
    held: Mutex<Option<File>>,
}

impl OwnerLock {
    /// The lock is a file of its own: to close a database's file a second time would drop SQLite's locks.
    fn beside(database: &Path) -> Self {
        let mut path = database.as_os_str().to_owned();
        path.push(".owner");
        Self {
            path: path.into(),
            held: Mutex::new(None),
        }
    }

    async fn take(&self, taken: &str) -> Result<()> {
        let patience = Deadline::after(LEFT_BEHIND);
        loop {
            match self.try_take(taken) {
                Err(error) if *error.kind() == ErrorKind::Conflict && !patience.has_passed() => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                taken => return taken,
            }
        }
    }

    fn try_take(&self, taken: &str) -> Result<()> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.is_some() {
            return Ok(());
        }
        let io = |error: std::io::Error| {
            Error::new(ErrorKind::Io, format!("{}: {error}", self.path.display()))
                .with_source(error)
        };
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&self.path)
            .map_err(io)?;
        match file.try_lock() {
            Ok(()) => {
                *held = Some(file);
                Ok(())
            }
            Err(TryLockError::WouldBlock) => Err(Error::new(
                ErrorKind::Conflict,
                format!(
                    "{taken} ({} is locked): wait until it ends, or end it",
                    self.path.display()
                ),
            )),
            Err(TryLockError::Error(error)) => Err(io(error)),
        }
    }
}

fn strings(db: &rusqlite::Connection, sql: &str) -> Result<Vec<String>, Fault> {
    let mut query = db.prepare_cached(sql)?;
    let texts = query.query_map([], |row| row.get(0))?;
    Ok(texts.collect::<rusqlite::Result<_>>()?)
}

fn to_json(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| {
        Error::new(ErrorKind::Internal, format!("no JSON form: {error}")).with_source(error)
    })
}

fn from_json<T: serde::de::DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| {
        Error::new(
            ErrorKind::ForeignFile,
            format!("a row is not of the form that this release writes: {error}"),
        )
        .with_source(error)
    })
}

fn as_integer(number: u64) -> Result<i64> {
    i64::try_from(number).map_err(|_| {
        Error::new(
            ErrorKind::InvalidInput,
            format!("{number} is too large to store"),
        )
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

    use super::*;

    #[tokio::test]
    async fn a_lock_that_a_killed_owner_left_behind_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let lock = || OwnerLock::beside(&directory.path().join("journal.db"));
        let killed = lock();
        killed.take("taken").await.unwrap();
        let error = lock().try_take("taken").unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Conflict);
        // A child between fork and exec has the same file open.
        let child = killed.held.lock().unwrap().as_ref().unwrap().try_clone();
        drop(killed);
        let next = lock();
        assert!(next.try_take("taken").is_err());
        let (taken, ()) = tokio::join!(next.take("taken"), async { drop(child) });
        taken.unwrap();
    }
}
