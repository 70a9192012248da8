//! A message as the fields of a stream's entry.

use std::sync::LazyLock;

use bytes::Bytes;
use redis::{Cmd, Value};

use crate::message::{Headers, Message, MessageId};

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

/// Why an entry is no message of ours, and its body if it has one.
pub(super) struct Foreign {
    pub(super) why: String,
    pub(super) body: Bytes,
}

impl Foreign {
    fn because(what: impl std::fmt::Display) -> Self {
        Self {
            why: format!("the queue holds what wilco did not write: {what}"),
            body: Bytes::new(),
        }
    }

    /// As a message, to be looked at, of the entry with this id.
    pub(super) fn shown(self, entry: &str) -> Option<Message> {
        let id = MessageId::new(format!("redis-{entry}")).ok()?;
        Some(Message::new("unknown", self.body).ok()?.with_id(id))
    }
}

/// An entry: its id in the stream, its fields, and what stands behind them.
pub(super) struct Entry {
    pub(super) id: String,
    /// What is not of our form was written by another program.
    pub(super) message: Result<Message, Foreign>,
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
            message: Err(Foreign::because("it was not read")),
            reason: None,
            attempts: None,
            count,
        };
        entry.message = entry.fields(fields);
        Some(entry)
    }

    fn fields(&mut self, fields: Vec<Value>) -> Result<Message, Foreign> {
        let (mut id, mut kind, mut content_type, mut from, mut body) =
            (None, None, None, None, None);
        let mut headers = Headers::new();
        let mut wrong = None;
        let mut fields = fields.into_iter();
        while let (Some(name), Some(value)) = (fields.next(), fields.next()) {
            let (Value::BulkString(name), Value::BulkString(value)) = (name, value) else {
                wrong = Some(Foreign::because("a field that is no text"));
                continue;
            };
            if name == b"body" {
                body = Some(Bytes::from(value));
                continue;
            }
            let Ok(value) = String::from_utf8(value) else {
                wrong = Some(Foreign::because("a field that is no text"));
                continue;
            };
            let read = match &name[..] {
                b"id" => MessageId::new(value).map(|read| id = Some(read)),
                b"kind" => MessageId::new(value).map(|read| kind = Some(read)),
                b"type" => MessageId::new(value).map(|read| content_type = Some(read)),
                b"from" => value.parse().map(|read| from = Some(read)),
                b"reason" => {
                    self.reason = Some(value);
                    Ok(())
                }
                b"attempts" => {
                    self.attempts = value.parse().ok();
                    Ok(())
                }
                [b'h', b':', name @ ..] => {
                    let name = String::from_utf8_lossy(name).into_owned();
                    headers.insert(name, value).map(drop)
                }
                _ => Ok(()),
            };
            if let Err(error) = read {
                wrong = Some(Foreign::because(error.message()));
            }
        }
        match (wrong, id, kind, body) {
            (None, Some(id), Some(kind), Some(body)) => Ok(Message {
                id,
                kind,
                content_type: content_type.unwrap_or_else(|| JSON.clone()),
                headers,
                body,
                from,
            }),
            (wrong, id, kind, body) => {
                let missing = match (id, kind) {
                    (None, _) => "no id",
                    (_, None) => "no kind",
                    _ => "no body",
                };
                Err(Foreign {
                    body: body.unwrap_or_default(),
                    ..wrong.unwrap_or_else(|| Foreign::because(missing))
                })
            }
        }
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

/// An entry as the server sends it.
#[cfg(fuzzing)]
pub(crate) fn fuzz(bytes: &[u8]) {
    let Ok(value) = redis::parse_redis_value(bytes) else {
        return;
    };
    let _ = answer(value.clone());
    let Some(entry) = Entry::read(value) else {
        return;
    };
    match entry.message {
        Ok(message) => {
            let mut call = Cmd::new();
            write(&mut call, &message);
            // Behind the id and the count.
            let fields = call.args_iter().skip(2).map(|arg| match arg {
                redis::Arg::Simple(bytes) => Value::BulkString(bytes.to_vec()),
                _ => Value::Nil,
            });
            let entry = vec![
                Value::BulkString(b"1-1".to_vec()),
                Value::Array(fields.collect()),
            ];
            let again = Entry::read(Value::Array(entry)).and_then(|entry| entry.message.ok());
            assert_eq!(again, Some(message));
        }
        Err(foreign) => {
            let _ = foreign.shown(&entry.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(fields: &[&[u8]]) -> Entry {
        let text = |text: &[u8]| Value::BulkString(text.to_vec());
        let fields = fields.iter().map(|field| text(field)).collect();
        Entry::read(Value::Array(vec![text(b"7-1"), Value::Array(fields)])).expect("an entry")
    }

    #[test]
    fn s2_what_another_program_wrote_can_be_looked_at() {
        let odd: [(&[&[u8]], &str); 6] = [
            (&[b"\xFF", b"\xFF", b"body", b"b"], "no text"),
            (&[b"id", b"", b"kind", b"k", b"body", b"b"], "visible ASCII"),
            (
                &[b"id", b"i", b"kind", b"k", b"h:\xFF", b"v", b"body", b"b"],
                "header",
            ),
            (&[b"kind", b"k", b"body", b"b"], "no id"),
            (&[b"id", b"i", b"body", b"b"], "no kind"),
            (
                &[b"id", b"i", b"kind", b"k", b"from", b"x", b"body", b"b"],
                "queue",
            ),
        ];
        for (fields, why) in odd {
            let entry = entry(fields);
            let foreign = entry.message.expect_err(why);
            assert!(foreign.why.contains(why), "{}", foreign.why);
            let shown = foreign.shown(&entry.id).expect("a message");
            assert_eq!(
                (shown.id.as_str(), &shown.body[..]),
                ("redis-7-1", &b"b"[..])
            );
        }
        assert!(
            entry(&[b"id", b"i", b"kind", b"k", b"body", b""])
                .message
                .is_ok()
        );
        assert!(entry(&[b"id", b"i", b"kind", b"k"]).message.is_err());
    }
}
