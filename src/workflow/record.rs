//! What the taskmanager knows of one guest's provisioning: on disk before every side effect.

use std::{
    fmt,
    sync::LazyLock,
    time::{Duration, Instant, SystemTime},
};

use serde::{Deserialize, Serialize};

use crate::{
    error::ErrorKind,
    message::CommandId,
    names::GuestAddress,
    wire::{BootId, PREPARE, Payload, RemoteError},
};

/// The provisioning of one machine: who, what, how far it is, and how it ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Record {
    /// The machine.
    pub address: GuestAddress,
    /// The prepare command's id, the same at every re-send.
    pub command: CommandId,
    /// What prepare is to do: any JSON value.
    pub payload: Payload,
    /// When prepare is sent.
    pub policy: SendPolicy,
    /// How long each stage may take.
    pub deadlines: Deadlines,
    /// How far it is.
    pub state: State,
    /// How it ended; set in a terminal state and never changed after that.
    pub outcome: Option<ProvisionOutcome>,
    /// Why it is being revoked, from the decision on.
    pub revoking: Option<Reason>,
    /// What is known of the publish of prepare.
    pub sent: Sent,
    /// How many copies of prepare may have been stored so far: each publish can add one.
    #[serde(default)]
    pub copies: u32,
    /// The broker may hold a credential for this machine or an earlier one of its guest: set before one is
    /// issued, so that none is forgotten (see [`Provision::with_credential`](crate::Provision::with_credential)).
    #[serde(default, skip_serializing_if = "is_false")]
    pub credential: bool,
    /// The guest said that it accepted prepare.
    pub accepted: bool,
    /// The last start of the guest's agent that was seen.
    pub boot: Option<BootId>,
    /// The last failure to reach the guest or the broker, while it lasts.
    pub trouble: Option<Trouble>,
    /// When provisioning was accepted, in milliseconds since 1970.
    pub created_ms: u64,
    /// When the present state began, in milliseconds since 1970.
    pub since_ms: u64,
    /// The last sign of life from the guest, in milliseconds since 1970.
    pub seen_ms: Option<u64>,
    /// Every state that it went through, and when it began.
    pub history: Vec<(u64, State)>,
    /// Counts the saves of this record: a save with another number than the next is a conflict.
    pub revision: u64,
}

impl Record {
    /// A record at its beginning.
    #[must_use]
    pub fn new(
        address: GuestAddress,
        payload: Payload,
        policy: SendPolicy,
        deadlines: Deadlines,
        now_ms: u64,
    ) -> Self {
        Self {
            address,
            command: CommandId::generate(),
            payload,
            policy,
            deadlines,
            state: State::Planned,
            outcome: None,
            revoking: None,
            sent: Sent::Never,
            copies: 0,
            credential: false,
            accepted: false,
            boot: None,
            trouble: None,
            created_ms: now_ms,
            since_ms: now_ms,
            seen_ms: None,
            history: vec![(now_ms, State::Planned)],
            revision: 0,
        }
    }

    /// Whether this record asks for the same as this payload.
    #[must_use]
    pub fn same_payload(&self, payload: &Payload) -> bool {
        let value = |raw: &Payload| serde_json::from_str::<serde_json::Value>(raw.get()).ok();
        value(&self.payload) == value(payload)
    }

    /// The command's kind.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        PREPARE
    }
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "how serde asks for it")]
fn is_false(value: &bool) -> bool {
    !value
}

/// How far a provisioning is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Recorded; its queue is not declared yet.
    Planned,
    /// Its queue is there, and prepare is to be published without waiting for the guest.
    QueueReady,
    /// Its queue is there, and the guest is pinged until it answers.
    AwaitingGuest,
    /// The guest answered: prepare is to be published.
    GuestUp,
    /// Prepare is in the queue, confirmed.
    Sent,
    /// The guest has accepted prepare.
    Running,
    /// The guest accepted prepare and gives no sign of life.
    Suspect,
    /// It was given up, and no guest may run prepare any more: that is being made sure of.
    Revoking,
    /// Prepare succeeded.
    Succeeded,
    /// Prepare was delivered and failed.
    Failed,
    /// Prepare was not run and never will be.
    NotDelivered,
    /// Everything on the broker is gone; this record keeps late guests out.
    Deleted,
}

impl State {
    /// Whether an outcome stands.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(
            self,
            Self::Succeeded | Self::Failed | Self::NotDelivered | Self::Deleted
        )
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Planned => "planned",
            Self::QueueReady => "queue ready",
            Self::AwaitingGuest => "awaiting guest",
            Self::GuestUp => "guest up",
            Self::Sent => "sent",
            Self::Running => "running",
            Self::Suspect => "suspect",
            Self::Revoking => "revoking",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::NotDelivered => "not delivered",
            Self::Deleted => "deleted",
        })
    }
}

/// What is known of the publish of prepare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sent {
    /// Not begun: it is in no queue.
    Never,
    /// Begun: it may be in the queue.
    Maybe,
    /// Confirmed by the broker.
    Confirmed,
}

/// When prepare is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SendPolicy {
    /// When the guest has answered a ping: nothing is queued for a guest that never comes.
    #[default]
    PingFirst,
    /// At once: the queue holds prepare before the guest boots, and no round trip is waited for.
    EnqueueFirst,
}

/// How long each stage may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Deadlines {
    /// From the start until the guest answers its first ping.
    #[serde(with = "millis", rename = "boot_ms")]
    pub boot: Duration,
    /// From the confirmed publish until the guest has accepted prepare.
    #[serde(with = "millis", rename = "accept_ms")]
    pub accept: Duration,
    /// From one sign of life to the next while prepare runs.
    #[serde(with = "millis", rename = "progress_ms")]
    pub progress: Duration,
    /// From the start until the outcome.
    #[serde(with = "millis", rename = "total_ms")]
    pub total: Duration,
}

impl Default for Deadlines {
    /// 10 minutes to boot, 1 to accept, 2 without a sign of life, 1 hour in all: about what a large
    /// image takes to boot and a large datastore to install.
    fn default() -> Self {
        Self {
            boot: Duration::from_secs(600),
            accept: Duration::from_secs(60),
            progress: Duration::from_secs(120),
            total: Duration::from_secs(3_600),
        }
    }
}

mod millis {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_millis)
    }
}

/// The one outcome of an accepted prepare.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
#[non_exhaustive]
pub enum ProvisionOutcome {
    /// The guest ran prepare and it succeeded.
    Succeeded {
        /// What the handler returned.
        result: serde_json::Value,
        /// How often its handler was started.
        runs: u32,
    },
    /// Prepare was delivered and did not succeed.
    Failed {
        /// Why.
        reason: Reason,
        /// How often its handler was started, as far as the guest told.
        runs: u32,
    },
    /// Prepare was not run, and is revoked: no late guest runs it.
    NotDelivered {
        /// Why.
        reason: Reason,
    },
}

impl ProvisionOutcome {
    /// The terminal state that it stands for.
    #[must_use]
    pub fn state(&self) -> State {
        match self {
            Self::Succeeded { .. } => State::Succeeded,
            Self::Failed { .. } => State::Failed,
            Self::NotDelivered { .. } => State::NotDelivered,
        }
    }

    /// Why it did not succeed.
    #[must_use]
    pub fn reason(&self) -> Option<&Reason> {
        match self {
            Self::Succeeded { .. } => None,
            Self::Failed { reason, .. } | Self::NotDelivered { reason } => Some(reason),
        }
    }
}

impl fmt::Display for ProvisionOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.state())?;
        self.reason()
            .map_or(Ok(()), |reason| write!(f, ": {reason}"))
    }
}

/// Why a provisioning did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Reason {
    /// In one word, for programs.
    pub kind: ReasonKind,
    /// The stage whose deadline passed, if one did.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stage: Option<Stage>,
    /// For people.
    pub detail: String,
}

impl Reason {
    /// A reason.
    #[must_use]
    pub fn new(kind: ReasonKind, detail: impl Into<String>) -> Self {
        Self {
            kind,
            stage: None,
            detail: detail.into(),
        }
    }

    /// The same, found at a stage's deadline.
    #[must_use]
    pub fn at(mut self, stage: Stage) -> Self {
        self.stage = Some(stage);
        self
    }
}

impl From<&RemoteError> for Reason {
    /// The reason that a guest gave.
    fn from(error: &RemoteError) -> Self {
        let kind = match error.kind.as_str() {
            "poison" => ReasonKind::Poison,
            "version_unsupported" => ReasonKind::VersionUnsupported,
            "wrong_incarnation" => ReasonKind::WrongIncarnation,
            "conflict" => ReasonKind::Conflict,
            _ => ReasonKind::GuestFailed,
        };
        Self::new(kind, error.message.clone())
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        if let Some(stage) = self.stage {
            write!(f, " ({stage})")?;
        }
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        Ok(())
    }
}

/// Why, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ReasonKind {
    /// The broker could not be reached.
    BrokerUnreachable,
    /// The broker refused the credentials.
    AuthRefused,
    /// The queue was not there.
    NoQueue,
    /// No guest was attached.
    NoConsumer,
    /// A guest was attached and did not answer.
    ConsumerSilent,
    /// Another incarnation answered.
    WrongIncarnation,
    /// The two sides speak different versions of the wire form.
    VersionUnsupported,
    /// The guest's handler failed.
    GuestFailed,
    /// The machine failed, as the host probe told.
    HostFailed,
    /// A stage's deadline passed.
    DeadlineExceeded,
    /// It was cancelled.
    Revoked,
    /// Another prepare for the same machine was there first.
    Conflict,
    /// The guest could not understand the command.
    Poison,
}

impl fmt::Display for ReasonKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BrokerUnreachable => "broker unreachable",
            Self::AuthRefused => "refused by the broker",
            Self::NoQueue => "no queue",
            Self::NoConsumer => "no guest attached",
            Self::ConsumerSilent => "guest silent",
            Self::WrongIncarnation => "wrong incarnation",
            Self::VersionUnsupported => "version unsupported",
            Self::GuestFailed => "guest failed",
            Self::HostFailed => "host failed",
            Self::DeadlineExceeded => "deadline exceeded",
            Self::Revoked => "revoked",
            Self::Conflict => "conflict",
            Self::Poison => "not understood by the guest",
        })
    }
}

/// A stage with a deadline of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Until the guest's first pong.
    Boot,
    /// Until the guest accepted prepare.
    Accept,
    /// Between two signs of life.
    Progress,
    /// The whole.
    Total,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Boot => "boot",
            Self::Accept => "accept",
            Self::Progress => "progress",
            Self::Total => "total",
        })
    }
}

/// What stands in the way at the moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// In one word.
    pub kind: ReasonKind,
    /// For people.
    pub detail: String,
}

impl From<&crate::Error> for Trouble {
    fn from(error: &crate::Error) -> Self {
        let kind = match error.kind() {
            ErrorKind::NoConsumer => ReasonKind::NoConsumer,
            ErrorKind::ConsumerSilent => ReasonKind::ConsumerSilent,
            ErrorKind::NoQueue | ErrorKind::QueueDeleted => ReasonKind::NoQueue,
            ErrorKind::AuthRefused => ReasonKind::AuthRefused,
            ErrorKind::WrongIncarnation => ReasonKind::WrongIncarnation,
            ErrorKind::VersionUnsupported => ReasonKind::VersionUnsupported,
            ErrorKind::Conflict | ErrorKind::Mismatch { .. } => ReasonKind::Conflict,
            _ => ReasonKind::BrokerUnreachable,
        };
        Self {
            kind,
            detail: error.message().into(),
        }
    }
}

/// Now, in milliseconds since 1970. Records use it because they outlive processes; only the
/// taskmanager's own clock is ever compared with itself (case W34).
///
/// The wall clock is read once, and goes on by the monotonic one: whoever sets it fires no deadline of a
/// taskmanager that runs. The next one reads it anew.
pub(crate) fn now_ms() -> u64 {
    static START: LazyLock<(Instant, SystemTime)> =
        LazyLock::new(|| (Instant::now(), SystemTime::now()));
    let (monotonic, wall) = *START;
    (wall + monotonic.elapsed())
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        })
}
