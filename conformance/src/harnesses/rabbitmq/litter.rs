//! What no client of any sort would send, byte by byte over the protocol itself.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const END: u8 = 206;

/// How deep tables stand in each other: many more than any stack has room for, in what fits into a frame.
const DEEP: usize = 12_000;

/// Who publishes, and where to.
pub(super) struct Publisher<'a> {
    pub(super) user: &'a str,
    pub(super) password: &'a str,
    pub(super) vhost: &'a str,
    pub(super) exchange: &'a str,
    pub(super) key: &'a str,
}

/// Publishes each piece, confirmed by the server, and says how many.
pub(super) async fn publish(server: SocketAddr, by: &Publisher<'_>) -> Result<usize, String> {
    let mut wire = Wire(TcpStream::connect(server).await.map_err(text)?);
    wire.open(by).await?;
    let pieces = pieces(by.key);
    for (key, properties) in &pieces {
        wire.publish(by.exchange, key, properties).await?;
    }
    Ok(pieces.len())
}

/// Routing keys and properties: their flags, then their bytes.
fn pieces(key: &str) -> Vec<(Vec<u8>, Vec<u8>)> {
    let key = key.as_bytes();
    let headers = |entries: &[u8]| {
        let mut bytes = 0x2000u16.to_be_bytes().to_vec();
        bytes.extend(long(entries));
        bytes
    };
    let deep = |kind: u8| {
        let mut inner = b"V".to_vec();
        // From the inside out; each layer is put before the ones in it, once, at the end.
        let mut layers = Vec::new();
        let mut length = inner.len();
        for _ in 0..DEEP {
            let name: &[u8] = if kind == b'F' { b"\x01n" } else { b"" };
            length += name.len();
            let mut layer = vec![kind];
            layer.extend(u32::try_from(length).unwrap_or(0).to_be_bytes());
            layer.extend(name);
            length += 5;
            layers.push(layer);
        }
        let mut value: Vec<u8> = layers.into_iter().rev().flatten().collect();
        value.append(&mut inner);
        let mut entry = b"\x01x".to_vec();
        entry.extend(value);
        headers(&entry)
    };
    let copied = {
        let mut entry = b"\x02CCA".to_vec();
        let mut copy = b"S".to_vec();
        copy.extend(long(key));
        entry.extend(long(&copy));
        headers(&entry)
    };
    let plain = [
        deep(b'A'),
        deep(b'F'),
        headers(b"\x02\xFF\xFEV"),
        headers(b"\x00V"),
        headers(&b"\x01wV".repeat(10_000)),
        // No properties; a content type, an id, a kind that are not text; an empty id.
        vec![0, 0],
        b"\x80\x00\x02\xFF\xFE".to_vec(),
        b"\x00\x80\x02\xFF\xFE".to_vec(),
        b"\x00\x20\x02\xFF\xFE".to_vec(),
        b"\x00\x80\x00".to_vec(),
    ];
    let mut pieces: Vec<_> = plain.map(|properties| (key.to_vec(), properties)).into();
    // Routed by a header, under a key that is not text.
    pieces.push((b"\xFF\xFE".to_vec(), copied));
    pieces
}

struct Wire(TcpStream);

impl Wire {
    async fn open(&mut self, by: &Publisher<'_>) -> Result<(), String> {
        self.0.write_all(b"AMQP\0\0\x09\x01").await.map_err(text)?;
        self.expect(0, (10, 10)).await?;
        let login = format!("\0{}\0{}", by.user, by.password);
        let start = [
            &long(b""),
            &short(b"PLAIN")[..],
            &long(login.as_bytes()),
            &short(b"en_US"),
        ];
        self.method(0, (10, 11), &start.concat()).await?;
        let mut tune = self.expect(0, (10, 30)).await?;
        // No heartbeats: it lives for a moment.
        tune[6..8].fill(0);
        self.method(0, (10, 31), &tune).await?;
        let open = [&short(by.vhost.as_bytes()), &short(b"")[..], &[0]];
        self.method(0, (10, 40), &open.concat()).await?;
        self.expect(0, (10, 41)).await?;
        self.method(1, (20, 10), &short(b"")).await?;
        self.expect(1, (20, 11)).await?;
        self.method(1, (85, 10), &[0]).await?;
        self.expect(1, (85, 11)).await.map(drop)
    }

    async fn publish(
        &mut self,
        exchange: &str,
        key: &[u8],
        properties: &[u8],
    ) -> Result<(), String> {
        const PAYLOAD: &[u8] = b"{}";
        // Mandatory: one that reaches no queue comes back, instead of its confirm.
        let place = [&[0, 0], &short(exchange.as_bytes())[..], &short(key), &[1]];
        self.method(1, (60, 40), &place.concat()).await?;
        let size = (PAYLOAD.len() as u64).to_be_bytes();
        let header = [&[0, 60, 0, 0], &size[..], properties];
        self.frame(HEADER, 1, &header.concat()).await?;
        self.frame(BODY, 1, PAYLOAD).await?;
        self.expect(1, (60, 80)).await.map(drop)
    }

    async fn method(&mut self, channel: u16, id: (u16, u16), rest: &[u8]) -> Result<(), String> {
        let payload = [&id.0.to_be_bytes(), &id.1.to_be_bytes()[..], rest];
        self.frame(METHOD, channel, &payload.concat()).await
    }

    async fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) -> Result<(), String> {
        let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let (channel, size) = (channel.to_be_bytes(), size.to_be_bytes());
        let frame = [&[kind], &channel[..], &size, payload, &[END]].concat();
        self.0.write_all(&frame).await.map_err(text)
    }

    /// The rest of the server's next method, which has to be this one.
    async fn expect(&mut self, channel: u16, id: (u16, u16)) -> Result<Vec<u8>, String> {
        let mut head = [0; 7];
        self.0.read_exact(&mut head).await.map_err(text)?;
        let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
        let mut payload = vec![0; size + 1];
        self.0.read_exact(&mut payload).await.map_err(text)?;
        payload.pop();
        let came = [&head[..3], payload.get(..4).unwrap_or_default()].concat();
        let wanted = [
            &[METHOD],
            &channel.to_be_bytes()[..],
            &id.0.to_be_bytes(),
            &id.1.to_be_bytes(),
        ];
        if came != wanted.concat() {
            let said = String::from_utf8_lossy(&payload);
            return Err(format!("wanted {id:?}, the server says {came:?} {said:?}"));
        }
        Ok(payload.split_off(4))
    }
}

fn short(bytes: &[u8]) -> Vec<u8> {
    let length = u8::try_from(bytes.len()).unwrap_or(u8::MAX);
    [&[length], &bytes[..length.into()]].concat()
}

fn long(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    [&length.to_be_bytes(), bytes].concat()
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}
