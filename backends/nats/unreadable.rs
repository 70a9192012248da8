//! Messages that the client cannot read (laws S2, C8). The server stores whatever stands where headers are;
//! the client ends its connection over what it does not take for headers, and the next connection gets the
//! same message. So whoever consumes looks, each time that the connection was made anew, through the first
//! messages as the server's API tells them, in JSON, and takes such ones out before it pulls again.

use std::str::FromStr as _;

use async_nats::{HeaderName, HeaderValue, StatusCode};

use super::{api::Stored, connection::Link, dead, form, hold::Hold};
use crate::{deadline::Deadline, error::Result};

const WHY: &str = "unreadable: its headers are none of NATS's";

/// Whether the client takes this for headers: its own rules, in its own words.
pub(super) fn is_readable(raw: &[u8]) -> bool {
    if raw.is_empty() {
        return true;
    }
    let Ok(text) = std::str::from_utf8(raw) else {
        return false;
    };
    let mut lines = text.lines().peekable();
    let Some(status) = lines.next().and_then(|line| line.strip_prefix("NATS/1.0")) else {
        return false;
    };
    let status = status.trim().split(' ').next().unwrap_or_default();
    if !status.is_empty() && StatusCode::from_str(status).is_err() {
        return false;
    }
    while let Some(line) = lines.next() {
        if line.is_empty() {
            continue;
        }
        let Some((name, value)) = line.split_once(':') else {
            return false;
        };
        let mut value = value.trim_start().to_owned();
        while let Some(more) = lines.next_if(|line| line.starts_with(char::is_whitespace)) {
            value.push_str(more);
        }
        let value = value.trim_end();
        if HeaderName::from_str(name).is_err() || HeaderValue::from_str(value).is_err() {
            return false;
        }
    }
    true
}

/// Makes dead letters of the unreadable among the first messages of a queue: so many as this consumer can
/// have been given, and those that stand before them in the hands of others.
pub(super) async fn bury(hold: &Hold, deadline: Deadline) -> Result<()> {
    let (link, names) = (&hold.link, &hold.names);
    let input = names.input();
    for stored in first(link, &names.stream, &input, 2 * hold.prefetch, deadline).await? {
        let message = form::read(Some(&stored.headers), stored.body, stored.sequence);
        tracing::warn!(queue = %names.stream, sequence = stored.sequence, WHY);
        dead::store(link, names, stored.sequence, &message, WHY, 1, deadline).await?;
        link.forget(names, stored.sequence, deadline).await?;
    }
    Ok(())
}

/// The unreadable among the first so many messages of a subject, and one more.
pub(super) async fn first(
    link: &Link,
    stream: &str,
    subject: &str,
    most: usize,
    deadline: Deadline,
) -> Result<Vec<Stored>> {
    let mut unreadable = Vec::new();
    let mut from = 1;
    for _ in 0..=most {
        let Some(stored) = link.stored_in(stream, subject, from, deadline).await? else {
            break;
        };
        from = stored.sequence + 1;
        if !stored.readable {
            unreadable.push(stored);
        }
    }
    Ok(unreadable)
}

/// Headers as they are stored: whatever they are, a message can be made of them, and written and read again.
#[cfg(fuzzing)]
pub(crate) fn fuzz(raw: &[u8]) {
    let _ = is_readable(raw);
    let headers = form::parse(raw);
    let message = form::read(Some(&headers), bytes::Bytes::new(), 7);
    let _ = form::was_letter(Some(&headers));
    let letter = form::read_dead(&headers, bytes::Bytes::new(), 7);
    let again = form::dead_headers(&message, &letter.reason, letter.attempts);
    let again = form::read_dead(&again, bytes::Bytes::new(), 7);
    assert_eq!(again.message, message);
    assert!(letter.reason.starts_with(&again.reason));
}

#[cfg(test)]
mod tests {
    use super::is_readable;

    #[test]
    fn s2_the_unreadable_is_known() {
        for good in [
            "",
            "NATS/1.0\r\n\r\n",
            "NATS/1.0\r\nA: b\r\n c\r\n\r\n",
            "NATS/1.0 503\r\n\r\n",
            "NATS/1.0 404 No Messages\r\n\r\n",
            "NATS/1.0\r\nWilco-Kind: prepare\r\nWilco-H-a: %C3%A9\r\n\r\n",
        ] {
            assert!(is_readable(good.as_bytes()), "{good}");
        }
        let bad: [&[u8]; 8] = [
            b"\r\n\r\n",
            b"NATS",
            b"NATS/9.9\r\nA: b\r\n\r\n",
            b"NATS/1.0 \xFF\r\n\r\n",
            b"NATS/1.0 abc\r\n\r\n",
            b"NATS/1.0\r\nabc\r\n\r\n",
            b"NATS/1.0\r\nA: \xFF\r\n\r\n",
            b"NATS/1.0\r\na b: c\r\n\r\n",
        ];
        for bad in bad {
            assert!(!is_readable(bad), "{}", String::from_utf8_lossy(bad));
        }
    }
}
