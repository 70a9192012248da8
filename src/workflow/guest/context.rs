//! What a handler is given, and what it gives back.

use std::{fmt, future::Future, pin::Pin, sync::Arc};

use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::watch;

use crate::{
    error::Result,
    message::{CommandId, TraceContext},
    names::GuestAddress,
    wire::{CommandResult, Payload, RemoteError, misfit, raw},
    workflow::{guest::book::Book, is_set},
};

/// One run of a handler.
#[derive(Clone, Debug)]
pub struct Context {
    pub(super) address: GuestAddress,
    pub(super) command: CommandId,
    pub(super) run: u32,
    pub(super) trace: Option<TraceContext>,
    pub(super) checkpoint: Option<Payload>,
    pub(super) book: Book,
    pub(super) cancelled: watch::Receiver<bool>,
}

impl Context {
    /// The machine that this runs on.
    #[must_use]
    pub fn address(&self) -> &GuestAddress {
        &self.address
    }

    /// The command's id: the same in every run.
    #[must_use]
    pub fn command(&self) -> &CommandId {
        &self.command
    }

    /// Which run this is, from 1. Over 1 only where [`Interrupted::RunAgain`] was chosen.
    #[must_use]
    pub fn run(&self) -> u32 {
        self.run
    }

    /// The trace that the command is part of, as the control plane gave it.
    #[must_use]
    pub fn trace(&self) -> Option<&TraceContext> {
        self.trace.as_ref()
    }

    /// What an earlier, interrupted run saved with [`Context::progress`].
    #[must_use]
    pub fn checkpoint<T: DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_str(self.checkpoint.as_ref()?.get()).ok()
    }

    /// Saves how far this run is, and tells the control plane. Ok means that it is in the journal: a
    /// later run finds it with [`Context::checkpoint`].
    ///
    /// # Errors
    /// Those of the journal; [`crate::ErrorKind::InvalidInput`] if the value has no JSON form.
    pub async fn progress(&self, detail: &(impl Serialize + Sync + ?Sized)) -> Result<()> {
        self.book.progress(self.command.clone(), raw(detail)?).await
    }

    /// Waits until the control plane gave this machine up or the agent is told to end. A handler that
    /// can stop early does so then.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn cancelled(&self) {
        is_set(&mut self.cancelled.clone()).await;
    }
}

/// Why a handler did not succeed. Any error turns into one with `?`.
#[derive(Clone, Debug)]
pub struct Failure {
    kind: String,
    message: String,
}

impl Failure {
    /// A failure, told to the control plane in these words.
    pub fn new(message: impl Into<String>) -> Self {
        Self::of_kind("failed", message)
    }

    /// A failure of a kind that the control plane can match on.
    pub fn of_kind(kind: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            kind: kind.into(),
            message: message.into(),
        }
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            message.push_str(&format!(": {cause}"));
            source = cause.source();
        }
        Self::new(message)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// What to do about a prepare that was running when the agent ended without finishing it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Interrupted {
    /// It has failed: nothing is ever run twice.
    #[default]
    Fail,
    /// Run it again: its handler can be repeated, or goes on from [`Context::checkpoint`].
    RunAgain,
}

type Run = Pin<Box<dyn Future<Output = CommandResult> + Send>>;

/// A handler, whatever it takes and returns.
pub(super) type Handler = Arc<dyn Fn(Payload, Context) -> Run + Send + Sync>;

/// Wraps a typed handler.
pub(super) fn handler<P, R, H, F>(work: H) -> Handler
where
    P: DeserializeOwned + Send + 'static,
    R: Serialize,
    H: Fn(P, Context) -> F + Send + Sync + 'static,
    F: Future<Output = std::result::Result<R, Failure>> + Send + 'static,
{
    let work = Arc::new(work);
    Arc::new(move |payload, context| {
        let work = work.clone();
        Box::pin(async move {
            let payload = match serde_json::from_str(payload.get()) {
                Ok(payload) => payload,
                Err(error) => {
                    return CommandResult::Error(RemoteError::new(
                        "poison",
                        format!(
                            "the payload is not what this command takes: {}",
                            misfit(&error)
                        ),
                    ));
                }
            };
            match work(payload, context).await {
                Ok(result) => raw(&result).map_or_else(
                    |error| CommandResult::Error(RemoteError::new("failed", error.to_string())),
                    CommandResult::Ok,
                ),
                Err(failure) => {
                    CommandResult::Error(RemoteError::new(failure.kind, failure.message))
                }
            }
        })
    })
}
