//! What came from the server, and where it is acknowledged.

use async_nats::Message as Raw;

use super::form;

/// One message from the server, to be acknowledged at its reply subject.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) sequence: u64,
    /// How often it was handed out, with this time once it is.
    pub(super) attempt: u32,
    pub(super) raw: Raw,
}

impl Received {
    pub(super) fn reply(&self) -> &str {
        self.raw.reply.as_ref().map_or("", |reply| reply.as_str())
    }

    pub(super) fn message(&self) -> crate::message::Message {
        form::read(
            self.raw.headers.as_ref(),
            self.raw.payload.clone(),
            self.sequence,
        )
    }
}

/// Where this is in the stream, from where it is acknowledged:
/// `$JS.ACK.<stream>.<consumer>.<delivered>.<sequence>.…`, or since 2.14 also
/// `$JS.ACK.<domain>.<account>.<stream>.<consumer>.<delivered>.<sequence>.…`.
pub(super) fn place(reply: &str) -> Option<u64> {
    let place = place_in(reply.split('.').count())?;
    reply.split('.').nth(place)?.parse().ok()
}

fn place_in(words: usize) -> Option<usize> {
    match words {
        9 => Some(5),
        11.. => Some(7),
        _ => None,
    }
}

/// Where another delivery of the same consumer is acknowledged: its place, and a number in the order of
/// deliveries that the server takes for one of them.
pub(super) fn reply_of(other: &str, sequence: u64, delivery: u64) -> String {
    let mut words: Vec<_> = other.split('.').map(str::to_owned).collect();
    if let Some(place) = place_in(words.len()) {
        words[place] = sequence.to_string();
        words[place + 1] = delivery.to_string();
    }
    words.join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_an_ack_subject_are_read() {
        assert_eq!(place("$JS.ACK.s.c.2.7.9.1700000000.0"), Some(7));
        assert_eq!(place("$JS.ACK._.hash.s.c.2.7.9.1700000000.0"), Some(7));
        assert_eq!(place("$JS.ACK._.hash.s.c.2.7.9.1700000000.0.x"), Some(7));
        assert_eq!(place("$JS.ACK.s.c.2"), None);
        assert_eq!(place("_INBOX.x"), None);
    }

    #[test]
    fn c11_a_delivery_that_came_to_nobody_has_an_ack_subject() {
        for reply in [
            "$JS.ACK.s.c.2.7.9.1700000000.0",
            "$JS.ACK._.hash.s.c.2.7.9.1700000000.0",
        ] {
            let other = reply_of(reply, 8, 12);
            assert_eq!(place(&other), Some(8));
            assert_eq!(other, reply.replace(".7.9.", ".8.12."));
        }
    }
}
