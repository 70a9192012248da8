//! What SQLite's errors mean to those above.

use std::{cell::RefCell, io};

use rusqlite::ffi;

use crate::error::{Error, ErrorKind, Outcome};

thread_local! {
    /// The file that this thread works on, so that a `?` inside an operation names it.
    static FILE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Says which file errors on this thread are about.
pub(super) fn about(file: Option<String>) {
    FILE.set(file);
}

/// Why a whole transaction failed: an error that can be told to everybody who had a part in it.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    kind: ErrorKind,
    message: String,
    outcome: Outcome,
}

impl Failure {
    /// A failed BEGIN, or a transaction that SQLite has rolled back.
    pub(super) fn rolled_back(error: &rusqlite::Error) -> Self {
        let (kind, message) = explain(error);
        Self {
            kind,
            message,
            outcome: Outcome::NotStored,
        }
    }

    /// A failed COMMIT. The commit record is the last thing written: what fails before it leaves no
    /// trace, but when a sync fails the record may be on disk already.
    pub(super) fn commit(error: &rusqlite::Error) -> Self {
        let certain = matches!(
            primary_code(error),
            Some(
                ffi::SQLITE_FULL | ffi::SQLITE_BUSY | ffi::SQLITE_READONLY | ffi::SQLITE_CONSTRAINT
            )
        );
        Self {
            outcome: if certain {
                Outcome::NotStored
            } else {
                Outcome::Unknown
            },
            ..Self::rolled_back(error)
        }
    }

    /// SQLite answers some errors of one operation, such as a full disk, with a rollback of all.
    pub(super) fn swept() -> Self {
        Self {
            kind: ErrorKind::BrokerRefused,
            message: "a write beside this one failed on the disk, and both were rolled back".into(),
            outcome: Outcome::NotStored,
        }
    }

    pub(super) fn panicked() -> Self {
        Self {
            kind: ErrorKind::Internal,
            message: "an operation beside this one panicked; it was rolled back".into(),
            outcome: Outcome::NotStored,
        }
    }

    pub(super) fn closed() -> Self {
        Self {
            kind: ErrorKind::Closed,
            message: "closed".into(),
            outcome: Outcome::NotStored,
        }
    }

    /// The error for one of those who had a part.
    pub(crate) fn error(&self) -> Error {
        Error::new(self.kind.clone(), self.message.clone()).with_outcome(self.outcome)
    }
}

/// Why an operation on a connection failed. Private, so that SQLite's client can be told apart and
/// taken in with a `?` without being in anybody's interface.
#[derive(Debug)]
pub(crate) enum Fault {
    Sql(rusqlite::Error),
    Ours(Error),
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sql(error)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Ours(error)
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Ours(error.into())
    }
}

/// To be done on the thread that works on the file.
impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Ours(error) => error,
            Fault::Sql(error) => {
                let (kind, message) = explain(&error);
                Self::new(kind, message).with_source(error)
            }
        }
    }
}

pub(super) fn internal(message: String) -> Error {
    Error::new(ErrorKind::Internal, message)
}

pub(super) fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(
        primary_code(error),
        Some(ffi::SQLITE_BUSY | ffi::SQLITE_LOCKED)
    )
}

fn primary_code(error: &rusqlite::Error) -> Option<i32> {
    error.sqlite_error().map(|error| error.extended_code & 0xff)
}

fn explain(error: &rusqlite::Error) -> (ErrorKind, String) {
    let file = FILE.with_borrow(|file| match file {
        Some(file) => format!("the database {file}"),
        None => "the database in memory".into(),
    });
    let Some(code) = primary_code(error) else {
        return (
            ErrorKind::Internal,
            format!("{file} holds what wilco did not write: {error}"),
        );
    };
    // The shared-memory file beside the database could not grow, which only a full disk does.
    let no_room_beside = error
        .sqlite_error()
        .is_some_and(|error| error.extended_code == ffi::SQLITE_IOERR_SHMSIZE);
    match code {
        ffi::SQLITE_IOERR if no_room_beside => (
            ErrorKind::Io,
            format!("disk full: {file} cannot be opened; make room, what is stored is safe"),
        ),
        ffi::SQLITE_FULL => (
            ErrorKind::BrokerRefused,
            format!("disk full: {file} cannot grow; make room, what is stored is safe"),
        ),
        ffi::SQLITE_READONLY | ffi::SQLITE_PERM | ffi::SQLITE_AUTH => (
            ErrorKind::Io,
            format!(
                "{file} is read-only for this process; give it permission to write the file and its \
                 directory ({error})"
            ),
        ),
        ffi::SQLITE_CANTOPEN => (
            ErrorKind::Io,
            format!(
                "{file} cannot be opened; check that its directory exists and that this process may \
                 write in it ({error})"
            ),
        ),
        ffi::SQLITE_NOTADB => (
            ErrorKind::ForeignFile,
            format!("{file} is not an SQLite database; give another path"),
        ),
        ffi::SQLITE_CORRUPT => (
            ErrorKind::Io,
            format!("{file} is damaged; restore it from a backup ({error})"),
        ),
        ffi::SQLITE_BUSY | ffi::SQLITE_LOCKED => (
            ErrorKind::BrokerRefused,
            format!("{file} is locked by another process; see who has it open ({error})"),
        ),
        ffi::SQLITE_IOERR => (
            ErrorKind::Io,
            format!("the operating system failed on {file}: {error}"),
        ),
        ffi::SQLITE_TOOBIG => (
            ErrorKind::TooLarge { limit: 1 << 30 },
            format!("{file} takes no value this large"),
        ),
        _ => (ErrorKind::Internal, format!("{file}: {error}")),
    }
}
