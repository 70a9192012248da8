//! JetStream's API: JSON over requests, of which only the forms that 2.9 knows are used.

use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::{
    connection::{Answer, Link, Unanswered, unreachable},
    form,
    names::Names,
    no_queue, unreadable,
};
use crate::{
    broker::QueueSpec,
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    names::QueueName,
};

pub(super) const STREAM_NOT_FOUND: u64 = 10_059;
pub(super) const STREAM_EXISTS: u64 = 10_058;
pub(super) const SUBJECTS_OVERLAP: u64 = 10_065;
pub(super) const CONSUMER_NOT_FOUND: u64 = 10_014;
pub(super) const MESSAGE_NOT_FOUND: u64 = 10_037;
pub(super) const WRONG_LAST_SEQUENCE: [u64; 2] = [10_071, 10_164];
/// What a second consumer of one subject is told: the subject has its one already.
pub(super) const NOT_UNIQUE: [u64; 3] = [10_099, 10_100, 10_026];

/// How long what is not ready yet is asked again: a server that starts, a cluster without a leader.
const PAUSE: Duration = Duration::from_millis(50);

/// A refusal of the server's.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) code: u64,
    pub(super) text: String,
}

impl Refusal {
    /// The refusal in an answer, if it is one.
    pub(super) fn of(answer: &Value) -> Option<Self> {
        let error = answer.get("error")?;
        Some(Self {
            code: error["err_code"].as_u64().unwrap_or(0),
            text: error["description"]
                .as_str()
                .unwrap_or("no reason given")
                .into(),
        })
    }

    /// Whether nothing was done, for now: temporarily unavailable, or no leader yet.
    pub(super) fn passes(&self) -> bool {
        matches!(self.code, 10_008 | 10_009)
    }

    pub(super) fn into_error(self) -> Error {
        match self.code {
            STREAM_NOT_FOUND => no_queue(),
            code => Error::new(
                ErrorKind::BrokerRefused,
                format!("the server refused: {} ({code})", self.text),
            ),
        }
    }
}

impl Link {
    /// Calls the API. The inner error is what the server says, the outer that it could not be asked.
    pub(super) async fn api(
        &self,
        verb: &str,
        body: &Value,
        deadline: Deadline,
    ) -> Result<Result<Value, Refusal>> {
        let subject = format!("$JS.API.{verb}");
        let body = Bytes::from(body.to_string());
        loop {
            let answer = match is_harmless(verb) {
                true => self.insist(&subject, None, &body, deadline).await,
                false => self.call(&subject, None, &body, true, deadline).await,
            };
            let answer = answer.map_err(Unanswered::into_error)?;
            if !answer.nobody() {
                let value: Value = json_of(&answer)?;
                match Refusal::of(&value) {
                    Some(refusal) if refusal.passes() && !deadline.has_passed() => {}
                    Some(refusal) => return Ok(Err(refusal)),
                    None => return Ok(Ok(value)),
                }
            }
            if deadline.remaining() < PAUSE {
                return Err(silent());
            }
            sleep(PAUSE).await;
        }
    }

    /// Calls the API and sends that once only, for what must not be done a second time unseen. Ends too when
    /// the connection was made again: no answer is to be expected then.
    pub(super) async fn api_once(
        &self,
        verb: &str,
        body: &Value,
        deadline: Deadline,
    ) -> Result<Result<Value, Refusal>, Unanswered> {
        let subject = format!("$JS.API.{verb}");
        let body = Bytes::from(body.to_string());
        let mut state = self.state();
        let generation = state.borrow().generation;
        let answer = tokio::select! {
            biased;
            answer = self.call(&subject, None, &body, false, deadline) => answer?,
            _ = state.wait_for(|state| state.generation != generation) => {
                let error = unreachable(&self.options, "the connection was lost");
                return Err(Unanswered::Unknown(error));
            }
        };
        if answer.nobody() {
            return Err(Unanswered::NotSent(silent()));
        }
        let value: Value = json_of(&answer).map_err(Unanswered::Unknown)?;
        match Refusal::of(&value) {
            Some(refusal) if refusal.passes() => Err(Unanswered::NotSent(silent())),
            Some(refusal) => Ok(Err(refusal)),
            None => Ok(Ok(value)),
        }
    }

    /// What the server says of a queue's stream; `None` if there is none, or one that is being deleted.
    ///
    /// The server reads the number of all messages and those by subject one after the other, so that a
    /// note which is tidied away in between counts as dead: what is dead is believed when two answers
    /// agree on it (Q9).
    pub(super) async fn stream(&self, names: &Names, deadline: Deadline) -> Result<Option<Stream>> {
        let mut before = None;
        loop {
            let Some(stream) = self.one_look(names, deadline).await? else {
                return Ok(None);
            };
            let (_, dead) = stream.counts(names);
            if dead == 0 || before == Some(dead) {
                return Ok(Some(stream));
            }
            before = Some(dead);
        }
    }

    async fn one_look(&self, names: &Names, deadline: Deadline) -> Result<Option<Stream>> {
        if !self.is_finished(&names.stream, deadline).await? {
            return Ok(None);
        }
        let verb = format!("STREAM.INFO.{}", names.stream);
        let body = json!({ "subjects_filter": names.living() });
        match self.api(&verb, &body, deadline).await? {
            Ok(value) => Ok(Some(Stream(value))),
            Err(Refusal {
                code: STREAM_NOT_FOUND,
                ..
            }) => Ok(None),
            Err(refusal) => Err(refusal.into_error()),
        }
    }

    /// The stream of a queue that exists.
    pub(super) async fn queue(&self, names: &Names, deadline: Deadline) -> Result<Stream> {
        let stream = self.stream(names, deadline).await?;
        stream
            .filter(|stream| stream.fence() != Some(Fence::Deleting))
            .ok_or_else(no_queue)
    }

    /// One stored message: the next from a sequence on, of the subjects that match.
    pub(super) async fn stored(
        &self,
        names: &Names,
        subject: &str,
        from: u64,
        deadline: Deadline,
    ) -> Result<Option<Stored>> {
        self.stored_in(&names.stream, subject, from, deadline).await
    }

    /// The same of any stream.
    pub(super) async fn stored_in(
        &self,
        stream: &str,
        subject: &str,
        from: u64,
        deadline: Deadline,
    ) -> Result<Option<Stored>> {
        let next = json!({ "seq": from, "next_by_subj": subject });
        self.get(stream, &next, deadline).await
    }

    /// The last message stored on a subject.
    pub(super) async fn last(
        &self,
        names: &Names,
        subject: &str,
        deadline: Deadline,
    ) -> Result<Option<Stored>> {
        self.get(&names.stream, &json!({ "last_by_subj": subject }), deadline)
            .await
    }

    /// Whether the message that was stored at this place is still there.
    pub(super) async fn holds(
        &self,
        names: &Names,
        sequence: u64,
        deadline: Deadline,
    ) -> Result<bool> {
        let place = json!({ "seq": sequence });
        Ok(self.get(&names.stream, &place, deadline).await?.is_some())
    }

    async fn get(&self, stream: &str, what: &Value, deadline: Deadline) -> Result<Option<Stored>> {
        let verb = format!("STREAM.MSG.GET.{stream}");
        match self.api(&verb, what, deadline).await? {
            Ok(value) => Ok(Some(Stored::of(&value["message"]))),
            Err(Refusal {
                code: MESSAGE_NOT_FOUND,
                ..
            }) => Ok(None),
            Err(refusal) => Err(refusal.into_error()),
        }
    }

    /// Deletes one stored message. False: it is not there.
    pub(super) async fn forget(
        &self,
        names: &Names,
        sequence: u64,
        deadline: Deadline,
    ) -> Result<bool> {
        self.forget_in(&names.stream, sequence, deadline).await
    }

    /// The same of any stream.
    pub(super) async fn forget_in(
        &self,
        stream: &str,
        sequence: u64,
        deadline: Deadline,
    ) -> Result<bool> {
        let verb = format!("STREAM.MSG.DELETE.{stream}");
        let body = json!({ "seq": sequence, "no_erase": true });
        match self.api(&verb, &body, deadline).await? {
            Ok(_) => Ok(true),
            Err(Refusal {
                code: STREAM_NOT_FOUND,
                ..
            }) => Err(no_queue()),
            Err(refusal)
                if refusal.code == MESSAGE_NOT_FOUND
                    || refusal.text.contains("not found")
                    || refusal.text.contains("no message") =>
            {
                Ok(false)
            }
            Err(refusal) => Err(refusal.into_error()),
        }
    }

    /// The names of a queue's consumers on the server.
    pub(super) async fn consumers(&self, names: &Names, deadline: Deadline) -> Result<Vec<String>> {
        let verb = format!("CONSUMER.NAMES.{}", names.stream);
        let value = self
            .api(&verb, &json!({}), deadline)
            .await?
            .map_err(Refusal::into_error)?;
        let names = value["consumers"].as_array().into_iter().flatten();
        Ok(names
            .filter_map(|name| name.as_str().map(Into::into))
            .collect())
    }

    /// What the server says of one consumer; `None` if it is not there.
    pub(super) async fn consumer(
        &self,
        names: &Names,
        consumer: &str,
        deadline: Deadline,
    ) -> Result<Option<Value>> {
        let verb = format!("CONSUMER.INFO.{}.{consumer}", names.stream);
        match self.api(&verb, &json!({}), deadline).await? {
            // Of one that is just being deleted it says neither what it is nor that it is not there.
            Ok(value) => Ok(Some(value).filter(|value| value["name"].is_string())),
            Err(Refusal {
                code: CONSUMER_NOT_FOUND,
                ..
            }) => Ok(None),
            Err(refusal) => Err(refusal.into_error()),
        }
    }

    pub(super) async fn drop_consumer(
        &self,
        names: &Names,
        consumer: &str,
        deadline: Deadline,
    ) -> Result<()> {
        let verb = format!("CONSUMER.DELETE.{}.{consumer}", names.stream);
        match self.api(&verb, &json!({}), deadline).await? {
            Ok(_)
            | Err(Refusal {
                code: CONSUMER_NOT_FOUND | STREAM_NOT_FOUND,
                ..
            }) => Ok(()),
            Err(refusal) => Err(refusal.into_error()),
        }
    }

    /// Empties the subjects that match.
    pub(super) async fn purge(
        &self,
        stream: &str,
        subject: &str,
        deadline: Deadline,
    ) -> Result<()> {
        let verb = format!("STREAM.PURGE.{stream}");
        match self
            .api(&verb, &json!({ "filter": subject }), deadline)
            .await?
        {
            Ok(_)
            | Err(Refusal {
                code: STREAM_NOT_FOUND,
                ..
            }) => Ok(()),
            Err(refusal) => Err(refusal.into_error()),
        }
    }
}

/// Whether this can be asked again while the first one is on its way still. What takes away or changes
/// cannot: done late, after the answer, it would be done to what came after that.
fn is_harmless(verb: &str) -> bool {
    const HARMLESS: [&str; 9] = [
        "INFO",
        "STREAM.CREATE",
        "STREAM.INFO",
        "STREAM.LIST",
        "STREAM.MSG.GET",
        "STREAM.NAMES",
        "CONSUMER.CREATE",
        "CONSUMER.INFO",
        "CONSUMER.NAMES",
    ];
    let mut starts = HARMLESS.iter().filter_map(|name| verb.strip_prefix(name));
    starts.any(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn silent() -> Error {
    Error::new(
        ErrorKind::BrokerRefused,
        "JetStream does not answer: it is not enabled (jetstream {} in the server's \
         configuration), or its cluster has no leader",
    )
}

pub(super) fn json_of(answer: &Answer) -> Result<Value> {
    serde_json::from_slice(&answer.message.payload).map_err(|error| {
        Error::new(
            ErrorKind::Undecodable,
            format!("the server's answer is not JSON: {error}"),
        )
    })
}

/// What stands in a stream's description: the queue's arguments and its state.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct Description {
    pub(super) wilco: u32,
    pub(super) delivery_limit: std::num::NonZeroU32,
    pub(super) max_messages: Option<u64>,
    /// Tells the one who made it from those who come after.
    pub(super) made: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) fence: Option<Fence>,
    /// Tells this fence from those before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) fenced_by: Option<String>,
}

/// Why a stream takes no messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Fence {
    /// It is looked at whether it is empty, and then deleted or opened again.
    Closing,
    /// It will be deleted, whatever it holds: for everybody it is gone.
    Deleting,
}

/// The server's answer about a stream.
#[derive(Debug)]
pub(super) struct Stream(pub(super) Value);

impl Stream {
    pub(super) fn config(&self) -> &Value {
        &self.0["config"]
    }

    pub(super) fn description(&self) -> Option<Description> {
        serde_json::from_str(self.config()["description"].as_str()?).ok()
    }

    pub(super) fn fence(&self) -> Option<Fence> {
        self.description()?.fence
    }

    /// When it was made, which tells it from one of the same name that was made later.
    pub(super) fn created(&self) -> &Value {
        &self.0["created"]
    }

    pub(super) fn spec(&self, queue: &QueueName) -> Result<QueueSpec> {
        let description = self.description().ok_or_else(|| {
            Error::new(
                ErrorKind::Mismatch {
                    differences: vec!["description is not one of wilco's".into()],
                },
                "a stream of this name exists that somebody else made",
            )
        })?;
        let mut spec =
            QueueSpec::new(queue.clone()).with_delivery_limit(description.delivery_limit);
        spec.max_messages = description.max_messages;
        Ok(spec)
    }

    /// The first message that is stored, of whatever kind.
    pub(super) fn first(&self) -> u64 {
        self.0["state"]["first_seq"].as_u64().unwrap_or(0)
    }

    /// Messages that are not dead, and dead ones.
    pub(super) fn counts(&self, names: &Names) -> (u64, u64) {
        let state = &self.0["state"];
        let beside = state["subjects"].as_object();
        let beside: u64 = beside
            .into_iter()
            .flat_map(|subjects| subjects.values().filter_map(Value::as_u64))
            .sum();
        let living = state["subjects"][names.input()].as_u64().unwrap_or(0);
        let all = state["messages"].as_u64().unwrap_or(0);
        (living, all.saturating_sub(beside))
    }
}

/// A message as it is stored.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) sequence: u64,
    pub(super) subject: String,
    pub(super) headers: async_nats::HeaderMap,
    pub(super) body: Bytes,
    /// The client could have received it.
    pub(super) readable: bool,
}

impl Stored {
    fn of(message: &Value) -> Self {
        let bytes = |name: &str| {
            message[name]
                .as_str()
                .and_then(form::base64)
                .unwrap_or_default()
        };
        let headers = bytes("hdrs");
        Self {
            sequence: message["seq"].as_u64().unwrap_or(0),
            subject: message["subject"].as_str().unwrap_or_default().to_owned(),
            headers: form::parse(&headers),
            body: bytes("data").into(),
            readable: unreadable::is_readable(&headers),
        }
    }
}
