//! A message as NATS carries it: the body as it is, all else in headers.
//!
//! | header | what |
//! | --- | --- |
//! | `Nats-Msg-Id` | the message's id: what the server de-duplicates by |
//! | `Wilco-Id` | the id, where another one stands in `Nats-Msg-Id`: among dead letters and sent back |
//! | `Wilco-Kind` | the kind |
//! | `Wilco-Content-Type` | the content type; absent: `application/json` |
//! | `Wilco-From` | the queue of the guest that a report is from |
//! | `Wilco-H-<name>` | a header of the user's, escaped |
//! | `Wilco-Reason`, `Wilco-Attempts` | of a dead letter: why, escaped, and after how many deliveries |
//! | `Wilco-Redriven` | of a message sent back: the stream sequence of the dead letter that it was |
//!
//! Escaped: every byte but visible ASCII, and `%`, is written `%` and two upper-case hexadecimal digits,
//! since a header's value on NATS is one line whose outer spaces are lost.

use std::str::FromStr;

use async_nats::{HeaderMap, HeaderValue};
use bytes::Bytes;

use crate::{
    broker::{DeadLetter, DeadLetterKey},
    broker_url::percent_decode,
    message::{Headers, Message, MessageId},
    names::QueueName,
};

const ID: &str = "Nats-Msg-Id";
const OWN_ID: &str = "Wilco-Id";
const KIND: &str = "Wilco-Kind";
const CONTENT_TYPE: &str = "Wilco-Content-Type";
const FROM: &str = "Wilco-From";
const USER: &str = "Wilco-H-";
const REASON: &str = "Wilco-Reason";
const ATTEMPTS: &str = "Wilco-Attempts";
const REDRIVEN: &str = "Wilco-Redriven";

/// The longest reason of a dead letter, in bytes: it shares the server's `max_payload` with its message.
const MAX_REASON: usize = 4 * 1024;

/// What all of a message's headers, and what a dead letter adds to them, take at the most: the largest
/// body is this much below the server's `max_payload`.
pub(super) const MAX_HEADER_BYTES: usize = 80 * 1024;

/// The id under which the server de-duplicates.
#[derive(Clone, Copy, Debug)]
pub(super) enum Deduplicated<'a> {
    ByItsId,
    /// By another one, for a message that goes through the queue once more.
    By(&'a str),
    Never,
}

/// A message's headers on NATS.
pub(super) fn headers(message: &Message, by: Deduplicated<'_>) -> HeaderMap {
    let mut map = HeaderMap::new();
    let mut put = |name: &str, value: &str| {
        // Ids, kinds and names are visible ASCII, all else is escaped: none can fail.
        if let Ok(value) = HeaderValue::from_str(value) {
            map.insert(name, value);
        }
    };
    match by {
        Deduplicated::ByItsId => put(ID, message.id.as_str()),
        Deduplicated::By(other) => {
            put(ID, other);
            put(OWN_ID, message.id.as_str());
        }
        Deduplicated::Never => put(OWN_ID, message.id.as_str()),
    }
    put(KIND, message.kind.as_str());
    if message.content_type.as_str() != "application/json" {
        put(CONTENT_TYPE, message.content_type.as_str());
    }
    if let Some(from) = &message.from {
        put(FROM, from.as_str());
    }
    for (name, value) in message.headers.iter() {
        put(&format!("{USER}{name}"), &escape(value));
    }
    map
}

pub(super) fn dead_headers(message: &Message, reason: &str, attempts: u32) -> HeaderMap {
    let mut map = headers(message, Deduplicated::Never);
    let mut end = reason.len().min(MAX_REASON);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    map.insert(REASON, escape(&reason[..end]).as_str());
    map.insert(ATTEMPTS, attempts.to_string().as_str());
    map
}

pub(super) fn redriven_headers(message: &Message, letter: u64, key: &str) -> HeaderMap {
    let mut map = headers(message, Deduplicated::By(key));
    map.insert(REDRIVEN, letter.to_string().as_str());
    map
}

/// Reads what came (law S2): whatever is missing or malformed, because somebody else put the message
/// there, is replaced, so that the message can be handed out, refused and looked at.
pub(super) fn read(map: Option<&HeaderMap>, body: Bytes, sequence: u64) -> Message {
    let get = |name: &str| map.and_then(|map| map.get(name)).map(HeaderValue::as_str);
    let id = |name: &str| get(name).and_then(|id| MessageId::from_str(id).ok());
    let mut headers = Headers::new();
    for (name, values) in map.into_iter().flat_map(HeaderMap::iter) {
        let name: &str = name.as_ref();
        let value = values
            .first()
            .and_then(|value| percent_decode(value.as_str()));
        if let (Some(name), Some(value)) = (name.strip_prefix(USER), value) {
            // A foreign header that breaks the rules is left out.
            let _ = headers.insert(name, value);
        }
    }
    let unknown = || MessageId::from_str("unknown").ok();
    let message = Message::new(
        id(KIND).map_or_else(|| "unknown".into(), String::from),
        body,
    );
    let mut message = message.unwrap_or_else(|_| unreachable!("the kind is well formed"));
    if let Some(id) = id(OWN_ID)
        .or_else(|| id(ID))
        .or_else(|| MessageId::from_str(&format!("nats-{sequence}")).ok())
        .or_else(unknown)
    {
        message.id = id;
    }
    if let Some(content_type) = id(CONTENT_TYPE) {
        message.content_type = content_type;
    }
    message.from = get(FROM).and_then(|from| from.parse().ok());
    message.headers = headers;
    message
}

pub(super) fn read_dead(map: &HeaderMap, body: Bytes, sequence: u64) -> DeadLetter {
    let get = |name: &str| map.get(name).map(HeaderValue::as_str);
    DeadLetter::new(
        DeadLetterKey(sequence.to_string()),
        read(Some(map), body, sequence),
        get(REASON).and_then(percent_decode).unwrap_or_default(),
        get(ATTEMPTS).and_then(|n| n.parse().ok()).unwrap_or(0),
    )
}

/// The dead letter that this message was, by its sequence.
pub(super) fn was_letter(map: Option<&HeaderMap>) -> Option<u64> {
    map?.get(REDRIVEN)?.as_str().parse().ok()
}

fn escape(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b'%' => text.push_str("%25"),
            0x21..=0x7E => text.push(char::from(byte)),
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

/// Headers as the server stores them: a version line, then `Name: value` lines.
pub(super) fn parse(raw: &[u8]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for line in String::from_utf8_lossy(raw).split("\r\n").skip(1) {
        if let Some((name, value)) = line.split_once(':')
            && let (Ok(name), Ok(value)) = (
                async_nats::HeaderName::from_str(name),
                HeaderValue::from_str(value.trim()),
            )
        {
            map.insert(name, value);
        }
    }
    map
}

/// Base64 as the server's JSON has it.
pub(super) fn base64(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=');
    let mut bytes = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut count) = (0u32, 0);
    for character in text.bytes() {
        let six = match character {
            b'A'..=b'Z' => character - b'A',
            b'a'..=b'z' => character - b'a' + 26,
            b'0'..=b'9' => character - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(six);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Some(bytes)
}

/// The headers of a report as its guest wrote them, but for whom it is from; what could mean something to
/// the server, besides the id, is not taken over.
pub(super) fn sent_by(map: Option<&HeaderMap>, from: &QueueName) -> HeaderMap {
    let mut own = HeaderMap::new();
    for (name, values) in map.into_iter().flat_map(HeaderMap::iter) {
        let text: &str = name.as_ref();
        let known = [ID, OWN_ID, KIND, CONTENT_TYPE].contains(&text);
        if let Some(value) = values.first().filter(|_| known || text.starts_with(USER)) {
            own.insert(name.clone(), value.clone());
        }
    }
    own.insert(FROM, from.as_str());
    own
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p6_a_message_comes_back_from_its_headers() {
        let mut headers = Headers::new();
        for (name, value) in [("a", ""), ("b", " é\r\n%41 "), ("nats-msg-id", "theirs")] {
            headers.insert(name, value).unwrap();
        }
        let message = Message::new("prepare", vec![0xFF, 0])
            .unwrap()
            .with_headers(headers)
            .with_content_type(MessageId::new("text/plain").unwrap())
            .with_from("wilco.q.a.1".parse().unwrap());
        for by in [
            Deduplicated::ByItsId,
            Deduplicated::By("x"),
            Deduplicated::Never,
        ] {
            let map = super::headers(&message, by);
            assert_eq!(read(Some(&map), message.body.clone(), 7), message);
        }
        let reason = "é\r\nwhy";
        let letter = read_dead(&dead_headers(&message, reason, 3), message.body.clone(), 7);
        assert_eq!((letter.reason.as_str(), letter.attempts), (reason, 3));
        assert_eq!(letter.message, message);
    }

    #[test]
    fn s2_what_somebody_else_put_there_can_be_read() {
        let message = read(None, Bytes::from_static(b"x"), 7);
        assert_eq!(
            (message.id.as_str(), message.kind.as_str()),
            ("nats-7", "unknown")
        );
        let map = parse(b"NATS/1.0\r\nWilco-Kind: a b\r\nWilco-H-Bad: x\r\nnonsense\r\n\r\n");
        assert!(read(Some(&map), Bytes::new(), 1).headers.is_empty());
    }

    #[test]
    fn base64_is_read_as_it_is_written() {
        for (text, bytes) in [("", ""), ("eA==", "x"), ("eHk=", "xy"), ("eHl6", "xyz")] {
            assert_eq!(base64(text).as_deref(), Some(bytes.as_bytes()));
        }
        assert_eq!(base64("e*"), None);
    }
}
