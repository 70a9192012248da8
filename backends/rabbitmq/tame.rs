//! Frames from the server, made harmless before lapin reads them (law S2). Whoever can publish writes
//! properties as they like, and two things that RabbitMQ passes on lapin does not bear: tables and arrays
//! in each other, for each of which its parser calls itself once more (500 of them, 2.5 KB, overflow the
//! stack of its thread, which ends the process), and short strings that are not UTF-8 (which end the
//! connection, and the next one too, for as long as the message is there). Both are changed where they
//! stand, to bytes of the same length: what is too deep becomes opaque bytes, what is not ASCII a `?`.

/// How deep tables and arrays may stand in each other. RabbitMQ's own `x-death` is an array of tables with
/// arrays in them.
const DEPTH: usize = 8;

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;

const BASIC: u16 = 60;
const DELIVER: u16 = 60;
const GET_OK: u16 = 71;

/// The length of the frame that begins here, if all of it is here. What does not begin as a frame is no
/// AMQP 0-9-1, and lapin says what it is: it is passed on as it comes.
pub(super) fn frame(bytes: &[u8]) -> Option<usize> {
    match bytes.first()? {
        &METHOD | &HEADER | &BODY | &HEARTBEAT => {
            let size = bytes.get(3..7)?.try_into().ok()?;
            let whole = usize::try_from(u32::from_be_bytes(size)).ok()? + 8;
            (whole <= bytes.len()).then_some(whole)
        }
        _ => Some(bytes.len()),
    }
}

/// Makes a whole frame harmless. Where its parts do not fit together the rest stays as it is: RabbitMQ has
/// read each message before it stored it, and lapin ends a connection that it cannot read.
pub(super) fn tame(frame: &mut [u8]) {
    let kind = frame[0];
    let payload = frame.len().saturating_sub(1);
    let mut walk = Walk(frame.get_mut(7..payload).unwrap_or_default());
    let _ = match kind {
        METHOD => walk.method(),
        HEADER => walk.header(),
        _ => Some(()),
    };
}

/// What is left of a frame. `None`: it is too short.
struct Walk<'a>(&'a mut [u8]);

impl<'a> Walk<'a> {
    fn take(&mut self, length: usize) -> Option<&'a mut [u8]> {
        let (taken, rest) = std::mem::take(&mut self.0).split_at_mut_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn number<const N: usize>(&mut self) -> Option<[u8; N]> {
        (&*self.take(N)?).try_into().ok()
    }

    fn length(&mut self) -> Option<usize> {
        usize::try_from(u32::from_be_bytes(self.number()?)).ok()
    }

    fn short_string(&mut self) -> Option<()> {
        let [length] = self.number()?;
        for byte in self.take(length.into())? {
            if !byte.is_ascii() {
                *byte = b'?';
            }
        }
        Some(())
    }

    /// The methods in which a publisher's own words come: the routing key is one.
    fn method(&mut self) -> Option<()> {
        match (
            u16::from_be_bytes(self.number()?),
            u16::from_be_bytes(self.number()?),
        ) {
            (BASIC, DELIVER) => self.short_string()?,
            (BASIC, GET_OK) => {}
            _ => return Some(()),
        }
        // The delivery tag, and whether it is a redelivery.
        self.take(9)?;
        self.short_string()?;
        self.short_string()
    }

    fn header(&mut self) -> Option<()> {
        // The class, a weight, the size of the body.
        self.take(12)?;
        let flags = u16::from_be_bytes(self.number()?);
        let has = |property: u16| flags >> property & 1 == 1;
        for property in (2..16).rev().filter(|&property| has(property)) {
            match property {
                13 => self.table(0)?,
                // The delivery mode, the priority.
                12 | 11 => drop(self.take(1)?),
                // The timestamp.
                6 => drop(self.take(8)?),
                _ => self.short_string()?,
            }
        }
        Some(())
    }

    fn table(&mut self, depth: usize) -> Option<()> {
        let length = self.length()?;
        let mut table = Walk(self.take(length)?);
        while !table.0.is_empty() {
            table.short_string()?;
            table.value(depth)?;
        }
        Some(())
    }

    fn array(&mut self, depth: usize) -> Option<()> {
        let length = self.length()?;
        let mut array = Walk(self.take(length)?);
        while !array.0.is_empty() {
            array.value(depth)?;
        }
        Some(())
    }

    fn value(&mut self, depth: usize) -> Option<()> {
        let [kind] = self.take(1)? else { return None };
        if depth == DEPTH && matches!(kind, b'A' | b'F') {
            *kind = b'x';
        }
        match kind {
            b'A' => self.array(depth + 1),
            b'F' => self.table(depth + 1),
            b'S' | b'x' => {
                let length = self.length()?;
                self.take(length).map(drop)
            }
            b'V' => Some(()),
            b't' | b'b' | b'B' => self.take(1).map(drop),
            b's' | b'u' | b'U' => self.take(2).map(drop),
            b'I' | b'i' | b'f' => self.take(4).map(drop),
            b'D' => self.take(5).map(drop),
            b'L' | b'l' | b'd' | b'T' => self.take(8).map(drop),
            _ => None,
        }
    }
}

/// A frame as it comes from the network: what lapin makes of it, and we of that.
#[cfg(fuzzing)]
pub(crate) fn fuzz(bytes: &[u8]) {
    use super::letter;

    let mut bytes = bytes.to_vec();
    let Some(size) = frame(&bytes) else { return };
    tame(&mut bytes[..size]);
    let again = bytes.clone();
    tame(&mut bytes[..size]);
    assert_eq!(bytes, again, "once is enough");
    let properties = bytes.get(19..size.saturating_sub(1)).unwrap_or_default();
    if bytes[0] != HEADER {
        return;
    }
    if let Ok((_, properties)) = lapin::protocol::basic::parse_properties(properties) {
        let message = letter::message(&properties, Vec::new());
        let (death, key) = (letter::death(&properties), letter::key(&properties));
        let _ = (letter::died(&properties), letter::returns(&properties));
        let copy = letter::properties(&message, &key, Some(&death));
        assert_eq!(letter::message(&copy, Vec::new()), message);
    }
}

#[cfg(test)]
mod tests {
    use lapin::{protocol::basic, types::AMQPValue};

    use super::{HEADER, frame, tame};

    /// A header frame with these properties.
    fn header(flags: u16, properties: &[u8]) -> Vec<u8> {
        let mut payload = vec![0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        payload.extend(flags.to_be_bytes());
        payload.extend(properties);
        let mut frame = vec![HEADER, 0, 1];
        frame.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
        frame.extend(payload);
        frame.push(206);
        frame
    }

    fn sized(bytes: &[u8]) -> Vec<u8> {
        let mut sized = u32::try_from(bytes.len()).unwrap().to_be_bytes().to_vec();
        sized.extend(bytes);
        sized
    }

    fn table(value: &[u8]) -> Vec<u8> {
        let mut entry = vec![1, b'a'];
        entry.extend(value);
        sized(&entry)
    }

    fn read(frame: &[u8]) -> lapin::BasicProperties {
        let properties = &frame[19..frame.len() - 1];
        let (rest, properties) = basic::parse_properties(properties).expect("lapin reads it");
        assert!(rest.is_empty());
        properties
    }

    #[test]
    fn s2_what_stands_too_deep_becomes_bytes() {
        let mut value = b"V".to_vec();
        for depth in 0..20_000 {
            let kind = if depth % 2 == 0 { b'A' } else { b'F' };
            let inner = if kind == b'F' {
                table(&value)
            } else {
                sized(&value)
            };
            value = vec![kind];
            value.extend(inner);
        }
        let mut bytes = header(0x2000, &table(&value));
        let before = bytes.len();
        tame(&mut bytes);
        assert_eq!(bytes.len(), before);
        let headers = read(&bytes).headers().clone().unwrap();
        let mut value = headers.inner().get("a").unwrap().clone();
        let mut depth = 0;
        loop {
            value = match value {
                AMQPValue::FieldArray(array) => array.as_slice()[0].clone(),
                AMQPValue::FieldTable(table) => table.inner().get("a").unwrap().clone(),
                AMQPValue::ByteArray(_) => break,
                other => panic!("{other:?}"),
            };
            depth += 1;
        }
        assert_eq!(depth, 8);
    }

    #[test]
    fn s2_short_strings_are_text() {
        let odd = [2, 0xFF, 0xFE];
        let mut properties = odd.to_vec();
        properties.extend(sized(&[2, 0xC3, b'x', b'V']));
        properties.extend(odd);
        let mut bytes = header(0xA080, &properties);
        tame(&mut bytes);
        let properties = read(&bytes);
        assert_eq!(properties.content_type().as_ref().unwrap().as_str(), "??");
        assert_eq!(properties.message_id().as_ref().unwrap().as_str(), "??");
        assert!(properties.headers().as_ref().unwrap().contains_key("?x"));

        // A delivery: consumer, tag, whether again, exchange, routing key.
        let mut payload = vec![0, 60, 0, 60, 1, b'c', 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0xFF];
        let mut bytes = vec![1, 0, 1, 0, 0, 0, 18];
        bytes.append(&mut payload);
        bytes.push(206);
        tame(&mut bytes);
        assert_eq!(bytes[bytes.len() - 2], b'?');
    }

    #[test]
    fn p6_what_is_harmless_stays_as_it_is() {
        let values: [&[u8]; 16] = [
            b"V",
            b"t\x01",
            b"b\xFF",
            b"B\xFF",
            b"s\xFF\xFE",
            b"u\xFF\xFE",
            b"U\xFF\xFE",
            b"I\xFF\xFF\xFF\xFF",
            b"i\xFF\xFF\xFF\xFF",
            b"f\x7F\xC0\0\0",
            b"D\x02\0\0\0\x01",
            b"l\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF",
            b"d\0\0\0\0\0\0\0\0",
            b"T\0\0\0\0\0\0\0\0",
            b"S\0\0\0\x02\xC3\xA9",
            b"x\0\0\0\x02\xFF\xFE",
        ];
        let mut all = vec![];
        for (n, value) in values.iter().enumerate() {
            all.extend([1, b'a' + u8::try_from(n).unwrap()]);
            all.extend(*value);
        }
        let mut properties = vec![1, b't'];
        properties.extend(sized(&all));
        properties.extend([2, 0, 1, b'i', 0, 0, 0, 0, 0, 0, 0, 9, 1, b'k']);
        let mut bytes = header(0b1011_1000_1110_0000, &properties);
        let before = bytes.clone();
        tame(&mut bytes);
        assert_eq!(bytes, before);
        assert_eq!(read(&bytes).headers().as_ref().unwrap().inner().len(), 16);
    }

    #[test]
    fn frames_are_found_whole() {
        let whole = header(0, &[]);
        assert_eq!(frame(&whole), Some(whole.len()));
        assert_eq!(frame(&whole[..whole.len() - 1]), None);
        assert_eq!(frame(&whole[..5]), None);
        assert_eq!(frame(&[]), None);
        assert_eq!(frame(b"AMQP\0\0\x09\x01"), Some(8));
        assert_eq!(frame(b"HTTP/1.1 400"), Some(12));
    }
}
