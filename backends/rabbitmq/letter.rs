//! A message in the broker's own places, for other languages to follow:
//!
//! | of a message | where |
//! | --- | --- |
//! | id | property `message-id` |
//! | kind | property `type` |
//! | content type | property `content-type` |
//! | headers | header of the same name, a long string; one whose name begins with `x-` or `wilco-` has `wilco-h-` before it |
//! | from | header `wilco-from` |
//! | body | the body |
//! | | property `delivery-mode` 2 |
//! | | header `wilco-key`: a name for this stored copy that no other copy has |
//! | of a dead letter | headers `wilco-reason` (long string), `wilco-attempts` (long), `wilco-died` (long): microseconds since 1970 |

use std::{
    sync::atomic::{AtomicI64, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable, LongString},
};

use crate::{
    message::{Headers, Message, MessageId},
    names::QueueName,
};

pub(super) const KEY: &str = "wilco-key";
const FROM: &str = "wilco-from";
const REASON: &str = "wilco-reason";
const DIED: &str = "wilco-died";
const ATTEMPTS: &str = "wilco-attempts";
const ESCAPE: &str = "wilco-h-";

/// Why a message is dead, and after how many deliveries.
pub(super) struct Death {
    pub(super) reason: String,
    pub(super) attempts: u32,
}

/// The properties of a stored copy.
pub(super) fn properties(message: &Message, key: &str, death: Option<&Death>) -> BasicProperties {
    let mut table = FieldTable::default();
    for (name, value) in message.headers.iter() {
        let name = if name.starts_with("x-") || name.starts_with("wilco-") {
            format!("{ESCAPE}{name}")
        } else {
            name.to_owned()
        };
        table.insert(name.into(), text(value));
    }
    if let Some(from) = &message.from {
        table.insert(FROM.into(), text(from.as_str()));
    }
    table.insert(KEY.into(), text(key));
    if let Some(death) = death {
        table.insert(DIED.into(), AMQPValue::LongLongInt(moment()));
        table.insert(REASON.into(), text(&death.reason));
        table.insert(
            ATTEMPTS.into(),
            AMQPValue::LongLongInt(death.attempts.into()),
        );
    }
    BasicProperties::default()
        .with_message_id(message.id.as_str().into())
        .with_type(message.kind.as_str().into())
        .with_content_type(message.content_type.as_str().into())
        .with_delivery_mode(2)
        .with_headers(table)
}

pub(super) fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(LongString::from(value))
}

/// A message out of a stored copy. What another program stored without our rules still comes out: a
/// message that nobody can read has to become a dead letter, not an obstacle (laws C8, S2).
pub(super) fn message(properties: &BasicProperties, body: Vec<u8>) -> Message {
    let id = |text: Option<&str>, otherwise: &str| {
        text.and_then(|text| MessageId::new(text).ok())
            .or_else(|| MessageId::new(otherwise).ok())
            .unwrap_or_else(MessageId::generate)
    };
    let mut headers = Headers::new();
    let mut from = None;
    for (name, value) in properties.headers().iter().flat_map(|table| table.inner()) {
        let Some(value) = as_text(value) else {
            continue;
        };
        let name = match name.as_str() {
            FROM => {
                from = value.parse::<QueueName>().ok();
                continue;
            }
            name => match name.strip_prefix(ESCAPE) {
                Some(name) => name,
                None if name.starts_with("x-") || name.starts_with("wilco-") => continue,
                None => name,
            },
        };
        // Another program's headers that break our rules are not passed on.
        let _ = headers.insert(name, value);
    }
    let short = |text: &Option<lapin::types::ShortString>| {
        text.as_ref().map(|text| text.as_str().to_owned())
    };
    let kind = id(short(properties.kind()).as_deref(), "unknown");
    let content_type = id(
        short(properties.content_type()).as_deref(),
        "application/octet-stream",
    );
    let name = id(short(properties.message_id()).as_deref(), &key(properties));
    let mut message = Message::new(kind.as_str(), Bytes::from(body))
        .unwrap_or_else(|_| unreachable!("a kind is a kind"))
        .with_id(name)
        .with_content_type(content_type)
        .with_headers(headers);
    message.from = from;
    message
}

/// The copy's own name.
pub(super) fn key(properties: &BasicProperties) -> String {
    header(properties, KEY)
        .or_else(|| properties.message_id().as_ref().map(|id| id.to_string()))
        .unwrap_or_else(|| "unnamed".into())
}

/// Whether another program stored it, which gave it no name of its own.
pub(super) fn is_foreign(properties: &BasicProperties) -> bool {
    header(properties, KEY).is_none()
}

pub(super) fn death(properties: &BasicProperties) -> Death {
    let attempts = number(properties, ATTEMPTS)
        .or_else(|| number(properties, "x-delivery-count"))
        .unwrap_or(0);
    Death {
        reason: header(properties, REASON)
            .or_else(|| header(properties, "x-first-death-reason"))
            .unwrap_or_else(|| "unknown".into()),
        attempts: u32::try_from(attempts).unwrap_or(u32::MAX),
    }
}

/// When a dead letter died: their order, which the broker does not keep for those that were read.
pub(super) fn died(properties: &BasicProperties) -> i64 {
    number(properties, DIED).unwrap_or(0)
}

/// Microseconds since 1970, later each time in this process.
fn moment() -> i64 {
    static LAST: AtomicI64 = AtomicI64::new(0);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let now = i64::try_from(now.as_micros()).unwrap_or(i64::MAX / 2);
    let last = LAST.fetch_max(now, Ordering::AcqRel);
    if now > last {
        return now;
    }
    LAST.fetch_add(1, Ordering::AcqRel) + 1
}

/// How often the broker took the message back.
pub(super) fn returns(properties: &BasicProperties) -> i64 {
    number(properties, "x-delivery-count").unwrap_or(0)
}

fn header(properties: &BasicProperties, name: &str) -> Option<String> {
    as_text(properties.headers().as_ref()?.inner().get(name)?).map(str::to_owned)
}

fn as_text(value: &AMQPValue) -> Option<&str> {
    match value {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok(),
        _ => None,
    }
}

fn number(properties: &BasicProperties, name: &str) -> Option<i64> {
    match properties.headers().as_ref()?.inner().get(name)? {
        AMQPValue::LongLongInt(n) => Some(*n),
        AMQPValue::LongInt(n) => Some((*n).into()),
        AMQPValue::LongUInt(n) => Some((*n).into()),
        AMQPValue::ShortInt(n) => Some((*n).into()),
        AMQPValue::ShortUInt(n) => Some((*n).into()),
        AMQPValue::ShortShortInt(n) => Some((*n).into()),
        AMQPValue::ShortShortUInt(n) => Some((*n).into()),
        _ => None,
    }
}
