//! The wire form, version 1: what another language has to read and write to take part.
//!
//! A message's id, kind, content type and headers stand in the broker's own places; its body is one
//! JSON object, UTF-8, of the shapes below. Unknown members are ignored, so that a later release of
//! version 1 can add some; another `wilco` number is refused as
//! [`VersionUnsupported`](crate::ErrorKind::VersionUnsupported). The files in `src/golden`
//! hold one of each.
//!
//! | | commands | reports |
//! | --- | --- | --- |
//! | travels | in the guest's queue `wilco.q.<guest>.<incarnation>` | in the control plane's queue `wilco.r.<name>` |
//! | message id | the command's id, the same at every re-send | the command's id and what is reported |
//! | message kind | the command's kind, such as `prepare` | `report` |
//! | content type | `application/json` | `application/json` |
//! | body | [`Command`] | [`Report`] |
//!
//! On a guest's lane an [`Ask`] goes there and an [`Answer`] comes back.
//!
//! What is longer or deeper is refused, before it is parsed where that can be known before (law S2):
//!
//! | | at most |
//! | --- | --- |
//! | a body | [`MAX_BODY_BYTES`] |
//! | the nesting of JSON, but for payloads, results and details | 128 |
//! | the same of a payload, when its handler reads it | 128 |
//! | headers | [`Headers::MAX_COUNT`](crate::Headers::MAX_COUNT), [`Headers::MAX_BYTES`](crate::Headers::MAX_BYTES) together |
//! | ids, kinds, content types | [`MessageId::MAX_BYTES`] |
//!
//! Commands and questions can be signed, which changes nothing for readers that do not check it: a
//! command's signature travels in the headers `wilco-key`, `wilco-issued`, `wilco-expires` and
//! `wilco-signature`, a question's in a member `signature`. What is signed, byte for byte, is told in the module
//! `sign`; `command-signed.json` and `ask-signed.json` hold one of each, with the key and the
//! bytes. On RabbitMQ, headers that begin with `wilco-` travel with `wilco-h-` before their name.

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use crate::{
    error::{Error, ErrorKind, Result},
    message::{CommandId, Hidden, Message, MessageId, TraceContext},
    names::{GuestAddress, GuestId, Incarnation, QueueName},
    sign::{AskSignature, Guard, Signer, Stamp},
};

/// The version that this release writes, and the only one that it reads.
pub const VERSION: u32 = 1;

/// The longest body that is read, in bytes: longer ones are refused before they are parsed.
pub const MAX_BODY_BYTES: usize = 16 * 1024 * 1024;

/// The kind of a guest's first command.
pub const PREPARE: &str = "prepare";

/// The kind of a report's message.
pub const REPORT: &str = "report";

/// What the control plane wants of one guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Command {
    wilco: u32,
    /// Whom it is for: another guest refuses it.
    pub guest: GuestId,
    /// Which machine of that guest it is for.
    pub incarnation: Incarnation,
    /// The unit of de-duplication: a guest runs a command once, however often it arrives.
    pub command: CommandId,
    /// What to do.
    pub kind: MessageId,
    /// Where to report; without it nothing is reported and the result is there to be asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reports: Option<QueueName>,
    /// What to do it with: any JSON value.
    pub payload: Payload,
    /// The trace that it is part of: in the message's headers, not in its body.
    #[serde(skip)]
    pub trace: Option<TraceContext>,
}

impl Command {
    /// A command.
    #[must_use]
    pub fn new(
        to: &GuestAddress,
        command: CommandId,
        kind: MessageId,
        reports: Option<QueueName>,
        payload: impl Into<Payload>,
    ) -> Self {
        Self {
            wilco: VERSION,
            guest: to.guest.clone(),
            incarnation: to.incarnation,
            command,
            kind,
            reports,
            payload: payload.into(),
            trace: None,
        }
    }

    /// The same command, as part of this trace.
    #[must_use]
    pub fn with_trace(mut self, trace: Option<TraceContext>) -> Self {
        self.trace = trace;
        self
    }

    /// Whom it is for.
    #[must_use]
    pub fn address(&self) -> GuestAddress {
        GuestAddress::new(self.guest.clone(), self.incarnation)
    }

    /// The message that carries it.
    ///
    /// # Errors
    /// [`ErrorKind::TooLarge`] over [`MAX_BODY_BYTES`].
    pub fn to_message(&self) -> Result<Message> {
        let message = Message::new(self.kind.as_str(), encode(self)?)?;
        let message = message.with_id(self.command.clone());
        match &self.trace {
            Some(trace) => message.with_trace(trace),
            None => Ok(message),
        }
    }

    /// The same, signed, if there is who signs: issued and expiring at these times, in milliseconds
    /// since 1970.
    pub(crate) fn to_signed(
        &self,
        signer: Option<&Signer>,
        times: impl FnOnce(&Signer) -> (u64, u64),
    ) -> Result<Message> {
        let message = self.to_message()?;
        match signer {
            None => Ok(message),
            Some(signer) => signer.sign(&self.address(), message, times(signer), VERSION),
        }
    }

    /// Whether the message that carries it is as a trusted key signed it for the machine that it names.
    pub(crate) fn check(&self, message: &Message, guard: &Guard) -> Result<Stamp, RemoteError> {
        guard.check(&self.address(), message, VERSION)
    }

    /// Reads a message's body.
    ///
    /// # Errors
    /// [`ErrorKind::Undecodable`], [`ErrorKind::VersionUnsupported`].
    pub fn from_message(message: &Message) -> Result<Self> {
        let mut command: Self = decode(&message.body)?;
        command.trace = message.trace();
        if command.command != message.id {
            return Err(Error::new(
                ErrorKind::Undecodable,
                format!("message {} carries command {}", message.id, command.command),
            ));
        }
        Ok(command)
    }
}

/// Any JSON value, as the text that travels.
///
/// Its Debug form has its size, not its text: payloads hold passwords (law S4).
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Payload(Box<RawValue>);

impl Payload {
    /// The JSON text.
    #[must_use]
    pub fn get(&self) -> &str {
        self.0.get()
    }
}

impl From<Box<RawValue>> for Payload {
    fn from(value: Box<RawValue>) -> Self {
        Self(value)
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Hidden(self.get().len()).fmt(f)
    }
}

/// What a guest tells of itself or of a command.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Report {
    wilco: u32,
    /// Who reports.
    pub guest: GuestId,
    /// Which machine of that guest.
    pub incarnation: Incarnation,
    /// Which start of that machine's agent.
    pub boot: BootId,
    /// What it reports.
    pub event: ReportEvent,
}

/// What a guest can report.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ReportEvent {
    /// The agent is up, or asks again for its queue.
    Hello,
    /// The command is in the guest's journal and acked: it will be run, or was.
    Accepted {
        /// The command.
        command: CommandId,
    },
    /// The command's handler has something to tell.
    Progress {
        /// The command.
        command: CommandId,
        /// What it tells: any JSON value.
        detail: Payload,
    },
    /// The command has ended.
    Done {
        /// The command.
        command: CommandId,
        /// How.
        receipt: Receipt,
    },
    /// A message was put among the dead letters: nothing in it could be run.
    Refused {
        /// The message's id.
        message: MessageId,
        /// Why.
        reason: RemoteError,
    },
}

impl Report {
    /// A report.
    #[must_use]
    pub fn new(from: &GuestAddress, boot: BootId, event: ReportEvent) -> Self {
        Self {
            wilco: VERSION,
            guest: from.guest.clone(),
            incarnation: from.incarnation,
            boot,
            event,
        }
    }

    /// Who reports.
    #[must_use]
    pub fn address(&self) -> GuestAddress {
        GuestAddress::new(self.guest.clone(), self.incarnation)
    }

    /// The message that carries it. Its id is new: reports repeat harmlessly.
    ///
    /// # Errors
    /// [`ErrorKind::TooLarge`] over [`MAX_BODY_BYTES`].
    pub fn to_message(&self) -> Result<Message> {
        Ok(Message::new(REPORT, encode(self)?)?.with_from(self.address().queue()))
    }

    /// Reads a message's body.
    ///
    /// # Errors
    /// [`ErrorKind::Undecodable`], also where the broker says that another guest sent it;
    /// [`ErrorKind::VersionUnsupported`].
    pub fn from_message(message: &Message) -> Result<Self> {
        let report: Self = decode(&message.body)?;
        match &message.from {
            Some(from) if *from != report.address().queue() => Err(Error::new(
                ErrorKind::Undecodable,
                format!(
                    "a report of {} came over the lane of {from}",
                    report.address()
                ),
            )),
            _ => Ok(report),
        }
    }
}

/// How a command ended at the guest. It never changes: the same receipt is sent again on request.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Receipt {
    /// How often the handler was started.
    pub runs: u32,
    /// The handler's result, or why there is none.
    pub result: CommandResult,
}

/// What came of a command.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CommandResult {
    /// What its handler returned: any JSON value.
    Ok(Payload),
    /// Why there is none.
    Error(RemoteError),
}

impl Receipt {
    /// A receipt.
    #[must_use]
    pub fn new(runs: u32, result: CommandResult) -> Self {
        Self { runs, result }
    }
}

/// An error of the other side (law R8).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RemoteError {
    /// For programs, such as `failed`, `interrupted`, `unknown_command`.
    pub kind: String,
    /// For people.
    pub message: String,
}

impl RemoteError {
    /// An error for the other side.
    #[must_use]
    pub fn new(kind: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            kind: kind.into(),
            message: message.into(),
        }
    }
}

impl fmt::Display for RemoteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.message)
    }
}

/// One start of a guest's agent: new at every start.
pub type BootId = MessageId;

/// What can be asked on a guest's lane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Ask {
    /// Are you there, and how are you (law R1)?
    Ping {
        /// Comes back in the pong.
        nonce: String,
    },
    /// What do you know of this command? Answered when it has ended or this time has passed.
    Status {
        /// The command.
        command: CommandId,
        /// How long the answer may wait for the command's end, in milliseconds.
        wait_ms: u64,
    },
    /// Never start this command. Answered with its state: withdrawn, or that it is too late.
    Withdraw {
        /// The command.
        command: CommandId,
    },
    /// This machine was given up: run nothing any more.
    Dismiss,
}

/// A question as it travels, with whom it is for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct AskForm {
    wilco: u32,
    pub(crate) guest: GuestId,
    pub(crate) incarnation: Incarnation,
    /// An [`Ask`], as the text that travels: that is what is signed.
    ask: Payload,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    signature: Option<AskSignature>,
}

/// What comes back on a guest's lane.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Answer {
    /// To a ping.
    Pong(Pong),
    /// To a question about a command.
    Command(CommandState),
    /// To a dismissal.
    Dismissed,
    /// The question could not be answered.
    Error(RemoteError),
}

#[derive(Serialize, Deserialize)]
struct AnswerForm {
    wilco: u32,
    answer: Answer,
}

impl Ask {
    /// As it travels: signed, if there is who signs, as issued and expiring at these times.
    pub(crate) fn encode(
        &self,
        to: &GuestAddress,
        signer: Option<&Signer>,
        times: (u64, u64),
    ) -> Result<Bytes> {
        let ask = raw(self)?;
        encode(&AskForm {
            wilco: VERSION,
            guest: to.guest.clone(),
            incarnation: to.incarnation,
            signature: signer.map(|signer| signer.sign_ask(to, ask.get(), times, VERSION)),
            ask,
        })
    }
}

impl AskForm {
    pub(crate) fn decode(body: &[u8]) -> Result<Self> {
        decode(body)
    }

    /// Whom it is for.
    pub(crate) fn address(&self) -> GuestAddress {
        GuestAddress::new(self.guest.clone(), self.incarnation)
    }

    /// Whether it is as a trusted key signed it for the machine that it names, and in time.
    pub(crate) fn check(&self, guard: &Guard) -> Result<(), RemoteError> {
        let signature = self.signature.as_ref();
        guard.check_ask(&self.address(), self.ask.get(), signature, VERSION)
    }

    /// What is asked.
    pub(crate) fn ask(&self) -> Result<Ask> {
        serde_json::from_str(self.ask.get()).map_err(undecodable)
    }
}

impl Answer {
    pub(crate) fn encode(self) -> Result<Bytes> {
        encode(&AnswerForm {
            wilco: VERSION,
            answer: self,
        })
    }

    pub(crate) fn decode(body: &[u8]) -> Result<Self> {
        decode::<AnswerForm>(body).map(|form| form.answer)
    }
}

/// A live guest's answer to a ping (law R1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Pong {
    /// Who answers.
    pub guest: GuestId,
    /// Which machine of that guest.
    pub incarnation: Incarnation,
    /// Which start of its agent.
    pub boot: BootId,
    /// What it is doing.
    pub phase: Phase,
    /// The last command that it accepted.
    pub last_command: Option<LastCommand>,
    /// The release of wilco, or of whatever else speaks for the guest.
    pub agent: String,
    /// The nonce of the ping.
    pub nonce: String,
    /// How many messages and questions this start of the agent has refused: not understood, for another
    /// machine, or not signed by whom it trusts (law S5).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub refused: u64,
    /// How many commands have come again that it knew, and has not run again (case W11).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub repeated: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// What a guest is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Phase {
    /// It waits for its queue to exist: nothing that is published can reach it yet.
    WaitingForQueue,
    /// It waits for a command.
    Idle,
    /// It runs a command.
    Busy,
    /// It is ending.
    Stopping,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::WaitingForQueue => "waiting for its queue",
            Self::Idle => "idle",
            Self::Busy => "busy",
            Self::Stopping => "stopping",
        })
    }
}

/// The last command that a guest accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LastCommand {
    /// Its id.
    pub command: CommandId,
    /// Its kind.
    pub kind: MessageId,
    /// `accepted`, `running`, `done` or `withdrawn`.
    pub state: String,
}

impl LastCommand {
    pub(crate) fn new(command: CommandId, kind: MessageId, state: &str) -> Self {
        Self {
            command,
            kind,
            state: state.into(),
        }
    }
}

impl Pong {
    /// An answer to the ping with this nonce.
    #[must_use]
    pub fn new(
        from: &GuestAddress,
        boot: BootId,
        phase: Phase,
        last_command: Option<LastCommand>,
        nonce: String,
    ) -> Self {
        Self {
            guest: from.guest.clone(),
            incarnation: from.incarnation,
            boot,
            phase,
            last_command,
            agent: concat!("wilco/", env!("CARGO_PKG_VERSION")).into(),
            nonce,
            refused: 0,
            repeated: 0,
        }
    }
}

/// What a guest's journal knows of one command.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CommandState {
    /// It never arrived here, or was forgotten long after its end.
    Unknown,
    /// It is in the journal but was not started: it will be, once the broker has confirmed its ack.
    Accepted,
    /// Its handler was started.
    Running {
        /// How often.
        runs: u32,
    },
    /// It has ended.
    Done(Receipt),
    /// It will never be started here.
    Withdrawn,
}

impl CommandState {
    /// The state in one word.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Accepted => "accepted",
            Self::Running { .. } => "running",
            Self::Done(_) => "done",
            Self::Withdrawn => "withdrawn",
        }
    }
}

/// A value as the JSON that travels.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] if it has no JSON form, such as a map whose keys are not strings.
pub(crate) fn raw(value: &(impl Serialize + ?Sized)) -> Result<Payload> {
    serde_json::value::to_raw_value(value)
        .map(Payload)
        .map_err(|error| {
            Error::new(
                ErrorKind::InvalidInput,
                format!("this value has no JSON form: {error}"),
            )
            .with_source(error)
        })
}

/// What is wrong with a payload, and where, without a word of it (law S4): serde_json quotes it.
pub(crate) fn misfit(error: &serde_json::Error) -> String {
    let what = match error.classify() {
        serde_json::error::Category::Data => "a value of another type or a missing member",
        _ => "not JSON",
    };
    format!("{what} at line {}, column {}", error.line(), error.column())
}

fn encode(value: &impl Serialize) -> Result<Bytes> {
    let body = serde_json::to_vec(value).map_err(|error| {
        Error::new(ErrorKind::Internal, format!("no JSON form: {error}")).with_source(error)
    })?;
    if body.len() > MAX_BODY_BYTES {
        return Err(Error::new(
            ErrorKind::TooLarge {
                limit: MAX_BODY_BYTES as u64,
            },
            format!(
                "{} bytes are too many, a body has at most {MAX_BODY_BYTES}",
                body.len()
            ),
        ));
    }
    Ok(body.into())
}

fn undecodable(error: serde_json::Error) -> Error {
    Error::new(
        ErrorKind::Undecodable,
        format!("not in the wire form: {error}"),
    )
    .with_source(error)
}

/// Reads hostile bytes (law S2): bounded in size here and in depth by the parser.
fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    #[derive(Deserialize)]
    struct Version {
        wilco: u32,
    }
    if body.len() > MAX_BODY_BYTES {
        return Err(Error::new(
            ErrorKind::Undecodable,
            format!("{} bytes, at most {MAX_BODY_BYTES} are read", body.len()),
        ));
    }
    let Version { wilco } = serde_json::from_slice(body).map_err(undecodable)?;
    if wilco != VERSION {
        return Err(Error::new(
            ErrorKind::VersionUnsupported,
            format!("wire form {wilco}, this release speaks {VERSION}"),
        ));
    }
    serde_json::from_slice(body).map_err(undecodable)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address() -> GuestAddress {
        GuestAddress::new(
            GuestId::new("vm-0042").unwrap(),
            Incarnation::new(3).unwrap(),
        )
    }

    fn id(text: &str) -> MessageId {
        MessageId::new(text).unwrap()
    }

    /// What is written today has to be what is written in the golden file, and it has to be read back.
    fn golden<T: Serialize>(name: &str, written: &[u8], read_back: T) {
        let path = format!("{}/src/golden/{name}.json", env!("CARGO_MANIFEST_DIR"));
        let golden =
            std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let golden: serde_json::Value = serde_json::from_str(&golden).unwrap();
        let written: serde_json::Value = serde_json::from_slice(written).unwrap();
        assert_eq!(written, golden, "{name}");
        assert_eq!(serde_json::to_value(read_back).unwrap(), golden, "{name}");
    }

    #[test]
    fn commands_match_their_golden_file() {
        let payload =
            Payload(RawValue::from_string(r#"{"datastore":"mysql","users":[]}"#.into()).unwrap());
        let reports = Some(QueueName::reports("main").unwrap());
        let command = Command::new(&address(), id("c-1"), id(PREPARE), reports, payload);
        let message = command.to_message().unwrap();
        assert_eq!(message.id, command.command);
        golden(
            "command",
            &message.body,
            Command::from_message(&message).unwrap(),
        );
    }

    #[test]
    fn reports_match_their_golden_files() {
        let raw = |text: &str| Payload(RawValue::from_string(text.into()).unwrap());
        let command = id("c-1");
        let failed = RemoteError::new("failed", "mysqld did not start");
        let events = [
            ("hello", ReportEvent::Hello),
            (
                "accepted",
                ReportEvent::Accepted {
                    command: command.clone(),
                },
            ),
            (
                "progress",
                ReportEvent::Progress {
                    command: command.clone(),
                    detail: raw(r#"{"percent":40}"#),
                },
            ),
            (
                "succeeded",
                ReportEvent::Done {
                    command: command.clone(),
                    receipt: Receipt::new(1, CommandResult::Ok(raw(r#"{"port":3306}"#))),
                },
            ),
            (
                "failed",
                ReportEvent::Done {
                    command: command.clone(),
                    receipt: Receipt::new(2, CommandResult::Error(failed.clone())),
                },
            ),
            (
                "refused",
                ReportEvent::Refused {
                    message: command,
                    reason: failed,
                },
            ),
        ];
        for (name, event) in events {
            let message = Report::new(&address(), id("b-1"), event)
                .to_message()
                .unwrap();
            let read = Report::from_message(&message).unwrap();
            golden(&format!("report-{name}"), &message.body, read);
        }
    }

    #[test]
    fn a_report_over_another_guests_lane_is_refused() {
        let report = Report::new(&address(), id("b-1"), ReportEvent::Hello);
        let neighbour = GuestAddress::from(GuestId::new("vm-0043").unwrap());
        let message = report.to_message().unwrap().with_from(neighbour.queue());
        assert_eq!(
            *Report::from_message(&message).unwrap_err().kind(),
            ErrorKind::Undecodable
        );
    }

    #[test]
    fn w28_other_versions_and_garbage_are_told_apart() {
        let read = |body: &str| Answer::decode(body.as_bytes()).unwrap_err().kind().clone();
        assert_eq!(
            read(r#"{"wilco":2,"answer":"dismissed"}"#),
            ErrorKind::VersionUnsupported
        );
        assert_eq!(read(r#"{"answer":"dismissed"}"#), ErrorKind::Undecodable);
        assert_eq!(read(r#"{"wilco":1}"#), ErrorKind::Undecodable);
        assert_eq!(read(&"[".repeat(100_000)), ErrorKind::Undecodable);
        assert_eq!(read(""), ErrorKind::Undecodable);
    }
}
