//! Where one protocol frame ends and the next begins: enough of each protocol for that, and no more.

/// What is spoken over a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// AMQP 0-9-1: a frame is a frame, the greeting is one too.
    Amqp,
    /// NATS: a line, with its payload where it announces one.
    Nats,
    /// RESP 2 and 3: a whole command or reply.
    Redis,
}

impl Protocol {
    /// The one that this URL's scheme stands for.
    #[must_use]
    pub fn of_url(url: &str) -> Option<Self> {
        match url.split_once(':')?.0 {
            "amqp" => Some(Self::Amqp),
            "nats" => Some(Self::Nats),
            "redis" => Some(Self::Redis),
            _ => None,
        }
    }
}

/// Finds the ends of frames in one direction of one connection.
#[derive(Debug)]
pub(super) struct Splitter {
    protocol: Protocol,
    /// The beginning of what is being read: a frame's head or a line.
    head: Vec<u8>,
    /// Bytes of a body that are still to come.
    body: usize,
    /// RESP: values that the frame still needs.
    values: usize,
}

/// What a complete head says.
enum Head {
    Incomplete,
    /// This many bytes follow, and then this value is whole.
    Body(usize),
    /// This many values follow in place of this one.
    Values(usize),
}

impl Splitter {
    pub(super) fn new(protocol: Protocol) -> Self {
        Self {
            protocol,
            head: Vec::new(),
            body: 0,
            values: 1,
        }
    }

    /// Reads on and returns how many bytes there are up to the first end of a frame; `None` if no
    /// frame ends in these bytes, which were all read then.
    pub(super) fn next_end(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        while at < bytes.len() {
            let whole = if self.body > 0 {
                let taken = self.body.min(bytes.len() - at);
                at += taken;
                self.body -= taken;
                self.body == 0
            } else {
                self.head.push(bytes[at]);
                at += 1;
                match self.read_head() {
                    Head::Incomplete => continue,
                    Head::Body(length) => {
                        self.body = length;
                        self.head.clear();
                        length == 0
                    }
                    Head::Values(n) => {
                        self.values += n;
                        self.head.clear();
                        true
                    }
                }
            };
            if whole {
                self.values -= 1;
                if self.values == 0 {
                    self.values = 1;
                    return Some(at);
                }
            }
        }
        None
    }

    fn read_head(&self) -> Head {
        let head = self.head.as_slice();
        match self.protocol {
            Protocol::Amqp => match head {
                // The greeting: "AMQP" and four bytes.
                [b'A', ..] if head.len() == 8 => Head::Body(0),
                [b'A', ..] => Head::Incomplete,
                // Type, channel, size; then the payload and one byte that ends it.
                [_, _, _, a, b, c, d] => {
                    Head::Body(u32::from_be_bytes([*a, *b, *c, *d]) as usize + 1)
                }
                _ => Head::Incomplete,
            },
            Protocol::Nats => match line(head) {
                None => Head::Incomplete,
                Some(line) => Head::Body(nats_payload(line)),
            },
            Protocol::Redis => match line(head) {
                None => Head::Incomplete,
                Some(line) => resp(line),
            },
        }
    }
}

/// The line without its end, once that is there.
fn line(head: &[u8]) -> Option<&str> {
    let line = head.strip_suffix(b"\n")?;
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    // What is no text announces nothing either.
    Some(std::str::from_utf8(line).unwrap_or_default())
}

/// How many bytes follow this line: those of a message, and its line end.
fn nats_payload(line: &str) -> usize {
    let mut words = line.split_ascii_whitespace();
    let announces = words.next().is_some_and(|word| {
        ["PUB", "HPUB", "MSG", "HMSG"]
            .iter()
            .any(|known| known.eq_ignore_ascii_case(word))
    });
    let length = words.next_back().and_then(|word| word.parse().ok());
    match length {
        Some(length) if announces => 2 + usize::min(length, isize::MAX as usize),
        _ => 0,
    }
}

fn resp(line: &str) -> Head {
    let Some((kind, rest)) = line.split_at_checked(1) else {
        return Head::Body(0);
    };
    // A null, `-1`, has nothing behind it.
    let length = rest.parse::<usize>().ok();
    match (kind, length) {
        ("$" | "=" | "!", Some(length)) => Head::Body(length.saturating_add(2)),
        ("*" | "~" | ">", Some(n)) => Head::Values(n),
        ("%", Some(n)) => Head::Values(n * 2),
        // Attributes stand before the value that they belong to.
        ("|", Some(n)) => Head::Values(n * 2 + 1),
        _ => Head::Body(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The frames must come out whole however the bytes are cut into pieces.
    fn splits(protocol: Protocol, frames: &[&[u8]]) {
        let stream = frames.concat();
        let mut expected = Vec::new();
        let mut end = 0;
        for frame in frames {
            end += frame.len();
            expected.push(end);
        }
        for piece in 1..=stream.len() {
            let mut splitter = Splitter::new(protocol);
            let mut seen = Vec::new();
            let mut before = 0;
            for chunk in stream.chunks(piece) {
                let mut at = 0;
                while let Some(end) = splitter.next_end(&chunk[at..]) {
                    at += end;
                    seen.push(before + at);
                }
                before += chunk.len();
            }
            assert_eq!(seen, expected, "{protocol:?} in pieces of {piece}");
        }
    }

    #[test]
    fn amqp_frames_end_where_they_say() {
        let heartbeat = [8, 0, 0, 0, 0, 0, 0, 0xce];
        let method = [1, 0, 1, 0, 0, 0, 3, b'A', 0xce, 9, 0xce];
        splits(
            Protocol::Amqp,
            &[b"AMQP\0\0\x09\x01", &method, &heartbeat, &method],
        );
    }

    #[test]
    fn nats_payloads_belong_to_their_line() {
        splits(
            Protocol::Nats,
            &[
                b"INFO {\"a\": 1}\r\n",
                b"PUB a.b 5\r\nPING\n\r\n",
                b"ping\r\n",
                b"HMSG a 1 re.ply 12 14\r\nNATS/1.0\r\n\r\nhi\r\n",
                b"PUB a 0\r\n\r\n",
                b"SUB a 5\r\n",
                b"+OK\r\n",
            ],
        );
    }

    #[test]
    fn resp_values_are_whole_with_all_they_hold() {
        splits(
            Protocol::Redis,
            &[
                b"*2\r\n$4\r\nPING\r\n$3\r\n\r\nx\r\n",
                b"+OK\r\n",
                b"*-1\r\n",
                b"$-1\r\n",
                b"*0\r\n",
                b"*2\r\n*1\r\n:5\r\n%1\r\n+k\r\n*2\r\n$0\r\n\r\n_\r\n",
                b"|1\r\n+a\r\n+b\r\n$1\r\nz\r\n",
                b">3\r\n+message\r\n+c\r\n$2\r\nhi\r\n",
                b"-ERR no\r\n",
            ],
        );
    }

    #[test]
    fn schemes_stand_for_protocols() {
        assert_eq!(Protocol::of_url("amqp://h"), Some(Protocol::Amqp));
        assert_eq!(Protocol::of_url("nats://h"), Some(Protocol::Nats));
        assert_eq!(Protocol::of_url("redis://h"), Some(Protocol::Redis));
        // TLS hides the frames.
        assert_eq!(Protocol::of_url("rediss://h"), None);
    }
}
