//! The one error type: what went wrong, and what is known about the message.

use std::{borrow::Cow, convert::Infallible, error::Error as StdError, fmt, io};

use crate::names::QueueName;

/// A result whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is known about a message after its publish failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The message is not stored and never will be (law P4): it will not show up later.
    NotStored,
    /// The broker may have stored it. Send it again with the same id: that gives one delivery where
    /// the broker de-duplicates and one effect at the guest everywhere (law P3).
    Unknown,
}

/// What went wrong. Match on this; the text of an [`Error`] is for people.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A guest id, message id, header or other name breaks its documented rules. Nothing was sent.
    InvalidName,
    /// A broker URL could not be understood. Nothing was sent.
    InvalidUrl,
    /// Other input could not be understood. Nothing was sent.
    InvalidInput,
    /// The message is larger than the broker or the wire form takes.
    TooLarge {
        /// The largest size that would be taken, in bytes.
        limit: u64,
    },
    /// The queue does not exist (laws Q4, Q5).
    NoQueue,
    /// The queue exists with other arguments (law Q3). Nothing was changed.
    Mismatch {
        /// One line per argument: its name, what the queue has, what was asked.
        differences: Vec<String>,
    },
    /// The queue still holds messages and was not told to discard them (law Q6).
    NotEmpty {
        /// How many messages it holds.
        messages: u64,
    },
    /// The queue was deleted while this consumer was attached to it (law Q11).
    QueueDeleted,
    /// Somebody else holds what can be held once: the queue's one consumer, the records, the journal,
    /// or this guest's provisioning.
    Conflict,
    /// The delivery is no longer this handle's to settle (law C4). Nothing was settled.
    LeaseLost,
    /// Nobody is attached to the guest's lane (law R2).
    NoConsumer,
    /// Somebody is attached but did not answer in time (law R3).
    ConsumerSilent,
    /// The lane is served by another incarnation of the guest.
    WrongIncarnation,
    /// The other side speaks a version of the wire form that this one does not.
    VersionUnsupported,
    /// Bytes from the other side could not be understood.
    Undecodable,
    /// The other side answered with an error of its own (law R8).
    Remote {
        /// The kind that the other side gave, for programs.
        kind: String,
    },
    /// The guest has not finished its prepare, and the command has to wait for that.
    NotPrepared,
    /// This guest, or this incarnation of it, was given up.
    Revoked,
    /// The broker cannot be reached.
    BrokerUnreachable,
    /// The broker refused these credentials, or this operation with them.
    AuthRefused,
    /// The broker refuses for now: a full queue or disk, an alarm, a quota (laws P2, Q12).
    BrokerRefused,
    /// The deadline passed first.
    DeadlineExceeded,
    /// The handle was closed.
    Closed,
    /// The broker is less durable than was required, or that cannot be known (law D2).
    NotDurable,
    /// This broker, or this configuration of it, cannot do that. Nothing was changed.
    Unsupported,
    /// The file belongs to another program or another version of this one. It was not changed.
    ForeignFile,
    /// The operating system refused a file or a socket.
    Io,
    /// A defect in wilco or a backend.
    Internal,
}

impl ErrorKind {
    /// Whether the same call can succeed later with nothing changed by the caller.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::NoConsumer
                | Self::ConsumerSilent
                | Self::NotPrepared
                | Self::BrokerUnreachable
                | Self::BrokerRefused
                | Self::DeadlineExceeded
        )
    }
}

/// What went wrong, where, and what is known about the message.
///
/// Its text says what happened and what to do. It never holds a secret (law S4).
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    outcome: Option<Outcome>,
    message: Cow<'static, str>,
    operation: Option<&'static str>,
    backend: Option<&'static str>,
    queue: Option<QueueName>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of this kind, with a text that says what happened and what to do.
    pub fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner {
            kind,
            outcome: None,
            message: message.into(),
            operation: None,
            backend: None,
            queue: None,
            source: None,
        }))
    }

    /// Adds what is known about the message.
    #[must_use]
    pub fn with_outcome(mut self, outcome: Outcome) -> Self {
        self.0.outcome = Some(outcome);
        self
    }

    /// Takes away what is known about a message, where the operation was not about one.
    #[cfg(any(feature = "sqlite", feature = "rabbitmq"))]
    #[must_use]
    pub(crate) fn without_outcome(mut self) -> Self {
        self.0.outcome = None;
        self
    }

    /// Adds the operation that failed, such as `publish`.
    #[must_use]
    pub fn with_operation(mut self, operation: &'static str) -> Self {
        self.0.operation = Some(operation);
        self
    }

    /// Adds the backend that it failed on.
    #[must_use]
    pub fn with_backend(mut self, backend: &'static str) -> Self {
        self.0.backend = Some(backend);
        self
    }

    /// Adds the queue that it was about.
    #[must_use]
    pub fn with_queue(mut self, queue: &QueueName) -> Self {
        self.0.queue = Some(queue.clone());
        self
    }

    /// Adds the error that caused this one.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// What went wrong.
    #[must_use]
    pub fn kind(&self) -> &ErrorKind {
        &self.0.kind
    }

    /// What is known about the message: set on every failed publish, `None` elsewhere.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.0.outcome
    }

    /// Whether the same call can succeed later with nothing changed by the caller.
    ///
    /// After [`Outcome::Unknown`] send the same message id again, never a new one.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.0.kind.is_retryable()
    }

    /// What happened and what to do, without where: the error's text has that before it.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The operation that failed.
    #[must_use]
    pub fn operation(&self) -> Option<&'static str> {
        self.0.operation
    }

    /// The backend that it failed on.
    #[must_use]
    pub fn backend(&self) -> Option<&'static str> {
        self.0.backend
    }

    /// The queue that it was about.
    #[must_use]
    pub fn queue(&self) -> Option<&QueueName> {
        self.0.queue.as_ref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0;
        if let Some(operation) = inner.operation {
            write!(f, "{operation}")?;
            if let Some(queue) = &inner.queue {
                write!(f, " {queue}")?;
            }
            f.write_str(": ")?;
        }
        f.write_str(&inner.message)?;
        if let ErrorKind::Mismatch { differences } = &inner.kind {
            for difference in differences {
                write!(f, "; {difference}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0;
        f.debug_struct("Error")
            .field("kind", &inner.kind)
            .field("outcome", &inner.outcome)
            .field("message", &inner.message)
            .field("operation", &inner.operation)
            .field("backend", &inner.backend)
            .field("queue", &inner.queue)
            .field("source", &inner.source)
            .finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

impl From<Infallible> for Error {
    /// For arguments that are valid already, where one that has to be checked would do too.
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::new(ErrorKind::Io, error.to_string()).with_source(error)
    }
}
