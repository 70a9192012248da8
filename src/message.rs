//! What travels: a message, its id and its headers.

use std::{collections::BTreeMap, fmt, str::FromStr, sync::Arc};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    error::{Error, ErrorKind, Result},
    names::QueueName,
};

/// The unit of de-duplication: chosen once by the sender, kept over every re-send.
///
/// 1 to 128 visible ASCII characters.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MessageId(Arc<str>);

/// The id of a command: its message's id.
pub type CommandId = MessageId;

impl MessageId {
    /// The longest id, in bytes.
    pub const MAX_BYTES: usize = 128;

    /// A new id that nobody else has: a UUID of version 7, so ids sort by the time they were made.
    #[must_use]
    pub fn generate() -> Self {
        Self(Uuid::now_v7().to_string().into())
    }

    /// Takes an id.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidName`] if it is empty, longer than [`MessageId::MAX_BYTES`], or has
    /// anything but visible ASCII characters.
    pub fn new(id: impl Into<String>) -> Result<Self> {
        let id = id.into();
        let well_formed = (1..=Self::MAX_BYTES).contains(&id.len())
            && id.bytes().all(|byte| byte.is_ascii_graphic());
        if well_formed {
            Ok(Self(id.into()))
        } else {
            Err(Error::new(
                ErrorKind::InvalidName,
                format!(
                    "a message id is 1 to {} visible ASCII characters",
                    Self::MAX_BYTES
                ),
            ))
        }
    }

    /// The id as it was given.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Named strings that travel beside a body: at most 64, together at most 16 KiB.
///
/// A name is 1 to 128 of `a-z 0-9 - _ .`; those that start with `wilco-` are wilco's own. A value is
/// any UTF-8 without the character NUL, and may be empty. Every backend gives both back byte for byte
/// (law P6).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    try_from = "BTreeMap<String, String>",
    into = "BTreeMap<String, String>"
)]
pub struct Headers(BTreeMap<String, String>);

impl Headers {
    /// The most headers of one message.
    pub const MAX_COUNT: usize = 64;
    /// The most bytes of all names and values of one message.
    pub const MAX_BYTES: usize = 16 * 1024;

    /// No headers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a header; a value that it had before goes.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidName`] if name or value break the rules above, [`ErrorKind::TooLarge`] if
    /// there are too many or they are too long. The headers are unchanged then.
    pub fn insert(&mut self, name: impl Into<String>, value: impl Into<String>) -> Result<()> {
        let (name, value) = (name.into(), value.into());
        let is_name = (1..=128).contains(&name.len())
            && name
                .bytes()
                .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.'));
        if !is_name {
            return Err(Error::new(
                ErrorKind::InvalidName,
                format!("{name:?} is not a header's name: expected 1 to 128 of a-z 0-9 - _ ."),
            ));
        }
        if value.contains('\0') {
            return Err(Error::new(
                ErrorKind::InvalidName,
                format!("the value of header {name} has the character NUL"),
            ));
        }
        let replaced = self.0.get(&name).map_or(0, |old| name.len() + old.len());
        let count = self.0.len() + usize::from(replaced == 0);
        let bytes = self.bytes() - replaced + name.len() + value.len();
        if count > Self::MAX_COUNT || bytes > Self::MAX_BYTES {
            return Err(Error::new(
                ErrorKind::TooLarge {
                    limit: Self::MAX_BYTES as u64,
                },
                format!(
                    "a message has at most {} headers of {} bytes together",
                    Self::MAX_COUNT,
                    Self::MAX_BYTES
                ),
            ));
        }
        self.0.insert(name, value);
        Ok(())
    }

    /// The value of a header.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// All headers, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The bytes of all names and values.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum()
    }
}

/// Where in a distributed trace a message belongs: W3C Trace Context, in the headers `traceparent` and
/// `tracestate` that every tracing library knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "TraceHeaders")]
pub struct TraceContext {
    #[serde(rename = "traceparent")]
    parent: String,
    #[serde(rename = "tracestate", skip_serializing_if = "Option::is_none")]
    state: Option<String>,
}

#[derive(Deserialize)]
struct TraceHeaders {
    traceparent: String,
    #[serde(default)]
    tracestate: Option<String>,
}

impl TryFrom<TraceHeaders> for TraceContext {
    type Error = Error;
    fn try_from(headers: TraceHeaders) -> Result<Self> {
        Self::new(headers.traceparent, headers.tracestate)
    }
}

impl TraceContext {
    /// Takes the values of the two headers.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] unless `parent` is of the W3C's form, version 00:
    /// `00-<32 hexadecimal digits>-<16>-<2>`, in lower case, neither id all zeros.
    pub fn new(parent: impl Into<String>, state: Option<String>) -> Result<Self> {
        let parent = parent.into();
        let is_hex = |part: &str, digits| {
            part.len() == digits && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        let is_id = |part: &str, digits| is_hex(part, digits) && part.bytes().any(|b| b != b'0');
        let parts: Vec<&str> = parent.split('-').collect();
        match parts[..] {
            ["00", trace, span, flags]
                if is_id(trace, 32) && is_id(span, 16) && is_hex(flags, 2) =>
            {
                Ok(Self { parent, state })
            }
            _ => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{parent:?} is not a traceparent: expected 00-<32 hex>-<16 hex>-<2 hex>"),
            )),
        }
    }

    /// The beginning of a trace, sampled: for what comes with none of its own.
    #[must_use]
    pub fn generate() -> Self {
        let trace = uuid::Uuid::new_v4().simple().to_string();
        let span = uuid::Uuid::new_v4().simple().to_string();
        // The first half of a random UUID is never all zeros: its version stands there.
        let parent = format!("00-{trace}-{}-01", &span[..16]);
        Self {
            parent,
            state: None,
        }
    }

    /// The trace's id: 32 hexadecimal digits.
    #[must_use]
    pub fn trace_id(&self) -> &str {
        &self.parent[3..35]
    }

    /// The value of `traceparent`.
    #[must_use]
    pub fn parent(&self) -> &str {
        &self.parent
    }

    /// The value of `tracestate`.
    #[must_use]
    pub fn state(&self) -> Option<&str> {
        self.state.as_deref()
    }
}

impl TryFrom<BTreeMap<String, String>> for Headers {
    type Error = Error;
    fn try_from(map: BTreeMap<String, String>) -> Result<Self> {
        let mut headers = Self::new();
        for (name, value) in map {
            headers.insert(name, value)?;
        }
        Ok(headers)
    }
}

impl From<Headers> for BTreeMap<String, String> {
    fn from(headers: Headers) -> Self {
        headers.0
    }
}

/// What is put into a queue and comes out of it, the same bytes.
///
/// Its Debug form has the body's size, not the body: bodies hold what users call secret (law S4).
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Message {
    /// The unit of de-duplication.
    pub id: MessageId,
    /// What it asks for, such as `prepare`: 1 to 128 visible ASCII characters.
    pub kind: MessageKind,
    /// What the body is: `application/json` unless told otherwise.
    pub content_type: MessageKind,
    /// Named strings beside the body.
    pub headers: Headers,
    /// The body: any bytes.
    pub body: Bytes,
    /// For a guest's report: the guest's own queue, whose report lane this message travels on. A
    /// broker that knows its guests apart vouches for it.
    pub from: Option<QueueName>,
}

/// A message's kind or content type: 1 to 128 visible ASCII characters.
pub type MessageKind = MessageId;

impl Message {
    /// A message with a new id and a JSON body.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidName`] if the kind is not 1 to 128 visible ASCII characters.
    pub fn new(kind: impl Into<String>, body: impl Into<Bytes>) -> Result<Self> {
        Ok(Self {
            id: MessageId::generate(),
            kind: MessageId::new(kind)?,
            content_type: MessageId("application/json".into()),
            headers: Headers::new(),
            body: body.into(),
            from: None,
        })
    }

    /// The same message under this id.
    #[must_use]
    pub fn with_id(mut self, id: MessageId) -> Self {
        self.id = id;
        self
    }

    /// The same message with these headers.
    #[must_use]
    pub fn with_headers(mut self, headers: Headers) -> Self {
        self.headers = headers;
        self
    }

    /// The same message with this content type.
    #[must_use]
    pub fn with_content_type(mut self, content_type: MessageKind) -> Self {
        self.content_type = content_type;
        self
    }

    /// The same message, as part of this trace.
    ///
    /// # Errors
    /// As [`Headers::insert`].
    pub fn with_trace(mut self, trace: &TraceContext) -> Result<Self> {
        self.headers.insert("traceparent", trace.parent())?;
        if let Some(state) = trace.state() {
            self.headers.insert("tracestate", state)?;
        }
        Ok(self)
    }

    /// The trace that it is part of; `None` if it is in none, or its headers are malformed.
    #[must_use]
    pub fn trace(&self) -> Option<TraceContext> {
        let state = self.headers.get("tracestate").map(Into::into);
        TraceContext::new(self.headers.get("traceparent")?, state).ok()
    }

    /// The same message, sent over the report lane of the guest that owns this queue.
    #[must_use]
    pub fn with_from(mut self, from: QueueName) -> Self {
        self.from = Some(from);
        self
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let headers: Vec<_> = self.headers.iter().map(|(name, _)| name).collect();
        f.debug_struct("Message")
            .field("id", &self.id)
            .field("kind", &self.kind)
            .field("content_type", &self.content_type)
            .field("headers", &headers)
            .field("from", &self.from)
            .field("body", &Hidden(self.body.len()))
            .finish()
    }
}

/// What stands in a Debug form for bytes that may be secret.
pub(crate) struct Hidden(pub(crate) usize);

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0)
    }
}

impl TryFrom<String> for MessageId {
    type Error = Error;
    fn try_from(id: String) -> Result<Self> {
        Self::new(id)
    }
}

impl FromStr for MessageId {
    type Err = Error;
    fn from_str(id: &str) -> Result<Self> {
        Self::new(id)
    }
}

impl From<MessageId> for String {
    fn from(id: MessageId) -> Self {
        id.0.as_ref().into()
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_ids_differ_and_are_well_formed() {
        let (a, b) = (MessageId::generate(), MessageId::generate());
        assert_ne!(a, b);
        assert_eq!(MessageId::new(a.as_str()).unwrap(), a);
    }

    #[test]
    fn ids_with_spaces_or_too_long_are_refused() {
        for id in ["", "a b", "a\n", "é", &"x".repeat(129)] {
            assert!(MessageId::new(id).is_err(), "{id:?}");
        }
    }

    #[test]
    fn a_trace_context_travels_in_the_headers_of_w3c() {
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let trace = TraceContext::new(parent, Some("vendor=1".into())).unwrap();
        let message = Message::new("x", "").unwrap().with_trace(&trace).unwrap();
        assert_eq!(message.headers.get("traceparent"), Some(parent));
        assert_eq!(message.trace(), Some(trace));
        assert_eq!(Message::new("x", "").unwrap().trace(), None);
        assert_eq!(message.trace().unwrap().trace_id(), &parent[3..35]);
        let (one, other) = (TraceContext::generate(), TraceContext::generate());
        assert_ne!(one, other);
        assert_eq!(TraceContext::new(one.parent(), None).unwrap(), one);
        let text = serde_json::to_string(&one).unwrap();
        assert_eq!(serde_json::from_str::<TraceContext>(&text).unwrap(), one);
        assert!(serde_json::from_str::<TraceContext>(r#"{"traceparent":"00-"}"#).is_err());
        let zeros = format!("00-{}-b7ad6b7169203331-01", "0".repeat(32));
        for malformed in [
            "",
            "00-1-2-3",
            &zeros,
            &parent.to_uppercase(),
            &format!("{parent}-1"),
        ] {
            assert!(TraceContext::new(malformed, None).is_err(), "{malformed:?}");
        }
    }

    #[test]
    fn headers_keep_their_bounds() {
        let mut headers = Headers::new();
        for name in ["", "Upper", "a b", "a:b", &"x".repeat(129)] {
            assert!(headers.insert(name, "v").is_err(), "{name:?}");
        }
        assert!(headers.insert("a", "nul \0").is_err());
        headers.insert("a", "").unwrap();
        headers.insert("a", "line\r\nbreak, ünïcode").unwrap();
        assert_eq!(headers.get("a"), Some("line\r\nbreak, ünïcode"));
        assert!(headers.insert("b", "x".repeat(Headers::MAX_BYTES)).is_err());
        for n in 1..Headers::MAX_COUNT {
            headers.insert(format!("h{n}"), "v").unwrap();
        }
        assert!(headers.insert("one-more", "v").is_err());
        headers.insert("a", "replaced").unwrap();
    }
}
