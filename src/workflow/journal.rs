//! Where a guest keeps what it was told and what came of it: a trait, so that an agent can use its own
//! store.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{
    error::{Error, ErrorKind, Result},
    message::{CommandId, MessageId, TraceContext},
    names::{GuestAddress, QueueName},
    wire::{Command, CommandResult, CommandState, PREPARE, Payload, Receipt},
};

/// A durable store of what one machine's agent did, with one owner at a time.
///
/// It is what makes a prepare run once: a command id that is in the journal is never run anew.
#[async_trait]
pub trait Journal: Send + Sync + fmt::Debug + 'static {
    /// Becomes the one owner, for as long as this value lives, and binds an empty journal to this
    /// machine.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] while another process owns it; [`ErrorKind::WrongIncarnation`] if it
    /// belongs to another machine; [`ErrorKind::Revoked`] after [`Journal::dismiss`].
    async fn own(&self, address: &GuestAddress) -> Result<()>;

    /// Stores an entry, or replaces the one of the same command. Ok means that it survives the end of
    /// the process, and a power cut where the store does.
    async fn save(&self, entry: &Entry) -> Result<()>;

    /// Every entry, in the order in which they were first saved.
    async fn load(&self) -> Result<Vec<Entry>>;

    /// Notes that this machine was given up: it runs nothing any more, whenever it starts again.
    async fn dismiss(&self) -> Result<()>;

    /// Forgets all finished entries but the newest this many, and never a prepare.
    async fn prune(&self, keep: usize) -> Result<()>;
}

/// What a journal knows of one command.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Entry {
    /// The command's id.
    pub command: CommandId,
    /// Its kind.
    pub kind: MessageId,
    /// What it is to be done with.
    pub payload: Payload,
    /// Where to report.
    pub reports: Option<QueueName>,
    /// The trace that it is part of.
    #[serde(default)]
    pub trace: Option<TraceContext>,
    /// How far it is.
    pub state: EntryState,
    /// How often its handler was started.
    pub runs: u32,
    /// What its handler last saved for itself.
    pub checkpoint: Option<Payload>,
    /// Its end was reported, and that was confirmed.
    pub reported: bool,
}

/// How far a command is at the guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryState {
    /// Received; not to be started before the broker has confirmed its ack.
    Accepted,
    /// Its handler was started.
    Running,
    /// It has ended.
    Done(CommandResult),
    /// Never to be started.
    Withdrawn,
}

impl Entry {
    /// A command that has just arrived.
    #[must_use]
    pub fn accepted(command: &Command) -> Self {
        Self {
            command: command.command.clone(),
            kind: command.kind.clone(),
            payload: command.payload.clone(),
            reports: command.reports.clone(),
            trace: command.trace.clone(),
            state: EntryState::Accepted,
            runs: 0,
            checkpoint: None,
            reported: false,
        }
    }

    /// A command that will never be started here, whether or not it ever arrives.
    #[must_use]
    pub fn withdrawn(command: CommandId) -> Self {
        Self {
            command,
            kind: MessageId::new("unknown").unwrap_or_else(|_| MessageId::generate()),
            payload: RawValue::NULL.to_owned().into(),
            reports: None,
            trace: None,
            state: EntryState::Withdrawn,
            runs: 0,
            checkpoint: None,
            reported: true,
        }
    }

    /// Whether it is a first command.
    #[must_use]
    pub fn is_prepare(&self) -> bool {
        self.kind.as_str() == PREPARE
    }

    /// Whether nothing more will happen to it.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        matches!(self.state, EntryState::Done(_) | EntryState::Withdrawn)
    }

    /// What the control plane is told of it.
    #[must_use]
    pub fn command_state(&self) -> CommandState {
        match &self.state {
            EntryState::Accepted => CommandState::Accepted,
            EntryState::Running => CommandState::Running { runs: self.runs },
            EntryState::Done(result) => CommandState::Done(Receipt::new(self.runs, result.clone())),
            EntryState::Withdrawn => CommandState::Withdrawn,
        }
    }
}

/// A journal in memory, for tests: it ends with the value. Clones share it, as restarts of one
/// machine's agent share its disk.
#[derive(Clone, Debug, Default)]
pub struct MemoryJournal(Arc<Mutex<MemoryState>>);

#[derive(Debug, Default)]
struct MemoryState {
    address: Option<GuestAddress>,
    dismissed: bool,
    entries: BTreeMap<u64, Entry>,
}

impl MemoryJournal {
    fn with<T>(&self, work: impl FnOnce(&mut MemoryState) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[async_trait]
impl Journal for MemoryJournal {
    async fn own(&self, address: &GuestAddress) -> Result<()> {
        self.with(|state| {
            check_owner(state.address.as_ref(), state.dismissed, address)?;
            state.address = Some(address.clone());
            Ok(())
        })
    }

    async fn save(&self, entry: &Entry) -> Result<()> {
        self.with(|state| {
            let known = state
                .entries
                .iter()
                .find(|(_, old)| old.command == entry.command);
            let position = match known {
                Some((&position, _)) => position,
                None => state
                    .entries
                    .last_key_value()
                    .map_or(0, |(last, _)| last + 1),
            };
            state.entries.insert(position, entry.clone());
        });
        Ok(())
    }

    async fn load(&self) -> Result<Vec<Entry>> {
        Ok(self.with(|state| state.entries.values().cloned().collect()))
    }

    async fn dismiss(&self) -> Result<()> {
        self.with(|state| state.dismissed = true);
        Ok(())
    }

    async fn prune(&self, keep: usize) -> Result<()> {
        self.with(|state| {
            let finished =
                |entry: &Entry| entry.is_finished() && entry.reported && !entry.is_prepare();
            let old: Vec<u64> = state
                .entries
                .iter()
                .rev()
                .filter(|(_, entry)| finished(entry))
                .map(|(&position, _)| position)
                .skip(keep)
                .collect();
            for position in old {
                state.entries.remove(&position);
            }
        });
        Ok(())
    }
}

/// Whether a journal bound like this can be `asked`'s.
pub(crate) fn check_owner(
    bound: Option<&GuestAddress>,
    dismissed: bool,
    asked: &GuestAddress,
) -> Result<()> {
    match bound {
        Some(bound) if bound != asked => Err(Error::new(
            ErrorKind::WrongIncarnation,
            format!(
                "this journal is that of {bound}, not of {asked}: a new machine starts with a new journal"
            ),
        )),
        _ if dismissed => Err(Error::new(
            ErrorKind::Revoked,
            format!("{asked} was given up by its control plane and runs nothing any more"),
        )),
        _ => Ok(()),
    }
}
