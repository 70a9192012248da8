//! What a command ends with when it does not end well: one message, one exit code.

use std::{error::Error as StdError, fmt, process::ExitCode};

use wilco::{Error, ErrorKind};

/// The exit codes, as `--help` lists them. Scripts rely on them: a number never changes its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// A guest failed or was not delivered, or answered with an error.
    Guest = 1,
    /// Usage, a broker URL, a fleet file or other input is wrong.
    Input = 2,
    /// The broker cannot be reached, or refuses.
    Broker = 3,
    /// Somebody else holds what can be held once.
    Conflict = 4,
    /// Nobody is attached to the guest's lane.
    Absent = 5,
    /// Somebody is attached but silent, or a deadline passed.
    Late = 6,
    /// No such queue, guest, command or dead letter.
    Missing = 7,
    /// The guest or this incarnation of it was given up.
    Revoked = 8,
    /// The broker is less durable than required.
    NotDurable = 9,
    /// A file cannot be used.
    File = 10,
    /// A defect in wilco.
    Defect = 70,
    /// Stopped by Ctrl-C or SIGTERM.
    Interrupted = 130,
}

/// The part of `--help` that lists them.
pub(super) const EXIT_CODES: &str = "\
Exit codes:
   0  done
   1  a guest failed or was not delivered, or answered with an error
   2  wrong usage, broker URL, fleet file or other input
   3  the broker cannot be reached, or refuses
   4  conflict: somebody else owns the records, the journal or the guest's queue
   5  nobody is attached to the guest's lane
   6  somebody is attached but silent, or a deadline passed
   7  no such queue, guest, command or dead letter
   8  the guest, or this incarnation of it, was given up
   9  the broker is less durable than required
  10  a file cannot be used: unreadable, of another program, disk full
  70  a defect in wilco; please report it
 130  stopped by Ctrl-C or SIGTERM; what is recorded goes on at the next start";

/// Why a command stops: what people read and what scripts read.
#[derive(Debug)]
pub(super) struct Problem {
    pub(super) exit: Exit,
    pub(super) message: String,
}

/// What a command returns: its exit code when it could do its work, whatever the work found.
pub(super) type Outcome<T = ExitCode> = Result<T, Problem>;

impl Problem {
    pub(super) fn new(exit: Exit, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { exit, message }
    }

    pub(super) fn input(message: impl Into<String>) -> Self {
        Self::new(Exit::Input, message)
    }

    /// The same with what was being done in front.
    pub(super) fn during(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }
}

impl Exit {
    pub(super) fn code(self) -> ExitCode {
        ExitCode::from(self as u8)
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let exit = match error.kind() {
            ErrorKind::InvalidName
            | ErrorKind::InvalidUrl
            | ErrorKind::InvalidInput
            | ErrorKind::Unsupported
            | ErrorKind::TooLarge { .. } => Exit::Input,
            ErrorKind::BrokerUnreachable | ErrorKind::AuthRefused | ErrorKind::BrokerRefused => {
                Exit::Broker
            }
            ErrorKind::Conflict | ErrorKind::Mismatch { .. } | ErrorKind::NotEmpty { .. } => {
                Exit::Conflict
            }
            ErrorKind::NoConsumer => Exit::Absent,
            ErrorKind::ConsumerSilent | ErrorKind::DeadlineExceeded => Exit::Late,
            ErrorKind::NoQueue | ErrorKind::QueueDeleted => Exit::Missing,
            ErrorKind::Revoked | ErrorKind::WrongIncarnation => Exit::Revoked,
            ErrorKind::NotDurable => Exit::NotDurable,
            ErrorKind::ForeignFile | ErrorKind::Io => Exit::File,
            ErrorKind::Internal => Exit::Defect,
            // Answers of the other side: Remote, NotPrepared, VersionUnsupported, Undecodable.
            _ => Exit::Guest,
        };
        Self::new(exit, with_sources(&error))
    }
}

/// An error's text with those of its sources that say something new.
fn with_sources(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_folded_in_once() {
        let io = std::io::Error::other("disk on fire");
        let error = Error::new(ErrorKind::Io, "cannot write the journal").with_source(io);
        assert_eq!(
            with_sources(&error),
            "cannot write the journal: disk on fire"
        );
        let said = Error::from(std::io::Error::other("disk on fire"));
        assert_eq!(with_sources(&said), "disk on fire");
    }

    #[test]
    fn every_exit_code_is_documented() {
        for code in [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 70, 130] {
            assert!(EXIT_CODES.contains(&format!("{code:>4}  ")), "{code}");
        }
    }
}
