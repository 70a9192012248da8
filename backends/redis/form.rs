//! A message as the fields of a stream's entry.

use std::sync::LazyLock;

use redis::{Cmd, Value};

use crate::{
    error::{Error, ErrorKind, Result},
    message::{Headers, Message, MessageId},
};

static JSON: LazyLock<MessageId> =
    LazyLock::new(|| MessageId::new("application/json").expect("a content type is well formed"));

/// Adds a message to a call: its id, how many arguments follow, and these, the fields and values.
pub(super) fn write(call: &mut Cmd, message: &Message) {
    let typed = message.content_type != *JSON;
    let headers = message.headers.iter().count();
    let fields = 3 + usize::from(typed) + usize::from(message.from.is_some()) + headers;
    call.arg(message.id.as_str()).arg(fields * 2);
    call.arg("id").arg(message.id.as_str());
    call.arg("kind").arg(message.kind.as_str());
    if typed {
        call.arg("type").arg(message.content_type.as_str());
    }
    if let Some(from) = &message.from {
        call.arg("from").arg(from.as_str());
    }
    for (name, value) in message.headers.iter() {
        call.arg(format!("h:{name}")).arg(value);
    }
    call.arg("body").arg(&message.body[..]);
}

/// An entry: its id in the stream, its fields, and what stands behind them.
pub(super) struct Entry {
    pub(super) id: String,
    pub(super) message: Result<Message>,
    pub(super) reason: Option<String>,
    pub(super) attempts: Option<u32>,
    /// What a script put behind the fields: which delivery it is.
    pub(super) count: Option<u32>,
}

impl Entry {
    /// Reads an entry as scripts and commands give it. None: that is no entry.
    pub(super) fn read(value: Value) -> Option<Self> {
        let Value::Array(parts) = value else {
            return None;
        };
        let mut parts = parts.into_iter();
        let id = text(parts.next()?)?;
        let Value::Array(fields) = parts.next()? else {
            return None;
        };
        let count = match parts.next() {
            Some(Value::Int(count)) => u32::try_from(count).ok(),
            _ => None,
        };
        let mut entry = Self {
            id,
            message: Err(Error::new(ErrorKind::Undecodable, "unread")),
            reason: None,
            attempts: None,
            count,
        };
        entry.message = entry.fields(fields);
        Some(entry)
    }

    /// What is not of our form was written by another program.
    fn fields(&mut self, fields: Vec<Value>) -> Result<Message> {
        let foreign = |what: &str| {
            Error::new(
                ErrorKind::Undecodable,
                format!("the queue holds what wilco did not write: {what}"),
            )
        };
        let (mut id, mut kind, mut content_type, mut from, mut body) =
            (None, None, None, None, None);
        let mut headers = Headers::new();
        let mut fields = fields.into_iter();
        while let (Some(name), Some(value)) = (fields.next(), fields.next()) {
            let (Value::BulkString(name), Value::BulkString(value)) = (name, value) else {
                return Err(foreign("a field that is no text"));
            };
            if name == b"body" {
                body = Some(value.into());
                continue;
            }
            let value = String::from_utf8(value).map_err(|_| foreign("a field that is no text"))?;
            match &name[..] {
                b"id" => id = Some(MessageId::new(value)?),
                b"kind" => kind = Some(MessageId::new(value)?),
                b"type" => content_type = Some(MessageId::new(value)?),
                b"from" => from = Some(value.parse()?),
                b"reason" => self.reason = Some(value),
                b"attempts" => self.attempts = value.parse().ok(),
                [b'h', b':', name @ ..] => {
                    let name = String::from_utf8_lossy(name).into_owned();
                    headers.insert(name, value)?;
                }
                _ => {}
            }
        }
        Ok(Message {
            id: id.ok_or_else(|| foreign("no id"))?,
            kind: kind.ok_or_else(|| foreign("no kind"))?,
            content_type: content_type.unwrap_or_else(|| JSON.clone()),
            headers,
            body: body.ok_or_else(|| foreign("no body"))?,
            from,
        })
    }
}

/// A value that is text.
pub(super) fn text(value: Value) -> Option<String> {
    match value {
        Value::BulkString(bytes) => String::from_utf8(bytes).ok(),
        Value::SimpleString(text) => Some(text),
        Value::VerbatimString { text, .. } => Some(text),
        Value::Okay => Some("OK".into()),
        Value::Int(number) => Some(number.to_string()),
        _ => None,
    }
}

/// The parts of a script's answer, the first of them a word.
pub(super) fn answer(value: Value) -> Option<(String, std::vec::IntoIter<Value>)> {
    let Value::Array(parts) = value else {
        return None;
    };
    let mut parts = parts.into_iter();
    let word = text(parts.next()?)?;
    Some((word, parts))
}
