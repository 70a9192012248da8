//! What no client of any sort would send, byte by byte over the protocol itself.

use std::net::SocketAddr;

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
};

/// What stands where headers are.
const PIECES: &[&[u8]] = &[
    b"\r\n\r\n",
    b"NATS",
    b"NATS/9.9\r\nA: b\r\n\r\n",
    b"NATS/1.0\r\nno colon\r\n\r\n",
    b"NATS/1.0\r\n: no name\r\n\r\n",
    b"NATS/1.0\r\nX\xFF\xFE: \xFF\xFE\r\n\r\n",
    b"NATS/1.0\r\nWilco-Kind: \xFF\xFE\r\n\r\n",
    b"NATS/1.0\r\nA\x00B: c\x01d\r\n\r\n",
    b"NATS/1.0\r\nA: b\r\n c\r\n\r\n",
    // What a server says of its own.
    b"NATS/1.0 \xFF\xFF\r\n\r\n",
    b"NATS/1.0 100 FlowControl Request\r\n\r\n",
    b"NATS/1.0 404 No Messages\r\n\r\n",
    b"NATS/1.0 408 Request Timeout\r\n\r\n",
    b"NATS/1.0 409 Consumer Deleted\r\n\r\n",
    b"NATS/1.0 503\r\n\r\n",
];

/// Publishes each piece, by this credentials file if there is one, and says how many.
pub(super) async fn publish(
    server: SocketAddr,
    creds: Option<&str>,
    subject: &str,
) -> Result<usize, String> {
    let stream = TcpStream::connect(server).await;
    let mut wire = BufReader::new(stream.map_err(|error| error.to_string())?);
    let info = line(&mut wire).await?;
    let info: Value = serde_json::from_str(info.strip_prefix("INFO ").unwrap_or_default())
        .map_err(|error| error.to_string())?;
    let mut connect = json!({ "verbose": false, "headers": true, "no_responders": true });
    if let Some(creds) = creds {
        let seed = section(creds, "USER NKEY SEED")?;
        let pair = nkeys::KeyPair::from_seed(seed).map_err(|error| error.to_string())?;
        let nonce = info["nonce"].as_str().unwrap_or_default();
        let signature = pair
            .sign(nonce.as_bytes())
            .map_err(|error| error.to_string())?;
        connect["jwt"] = section(creds, "NATS USER JWT")?.into();
        connect["sig"] = BASE64_URL_SAFE_NO_PAD.encode(signature).into();
    }
    let mut sent = format!("CONNECT {connect}\r\n").into_bytes();
    for headers in PIECES {
        let (heads, all) = (headers.len(), headers.len() + 2);
        sent.extend(format!("HPUB {subject} {heads} {all}\r\n").into_bytes());
        sent.extend([headers, &b"{}\r\n"[..]].concat());
    }
    sent.extend(b"PING\r\n");
    let written = wire.get_mut().write_all(&sent).await;
    written.map_err(|error| error.to_string())?;
    match line(&mut wire).await?.as_str() {
        "PONG" => Ok(PIECES.len()),
        other => Err(format!("the server says {other}")),
    }
}

async fn line(wire: &mut BufReader<TcpStream>) -> Result<String, String> {
    let mut line = String::new();
    let read = wire.read_line(&mut line).await;
    read.map_err(|error| error.to_string())?;
    Ok(line.trim_end().to_owned())
}

/// What stands under this heading of a credentials file.
fn section<'a>(creds: &'a str, heading: &str) -> Result<&'a str, String> {
    let mut lines = creds.lines().skip_while(|line| !line.contains(heading));
    lines
        .nth(1)
        .map(str::trim)
        .ok_or_else(|| format!("no {heading} in the credentials"))
}
