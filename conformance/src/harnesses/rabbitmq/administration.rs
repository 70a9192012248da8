//! The server's own administration, over HTTP: what a check looks at without the backend under test.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
    time::Duration,
};

use base64::Engine as _;
use serde_json::Value;

/// One request over HTTP/1.0, as the user that a new server has.
pub(super) fn ask(port: u16, method: &str, path: &str) -> Result<Value, String> {
    ask_as(port, "guest:guest", method, path)
}

/// The same as another user, `name:password`.
pub(super) fn ask_as(port: u16, user: &str, method: &str, path: &str) -> Result<Value, String> {
    let basic = base64::engine::general_purpose::STANDARD.encode(user);
    let text = |error: std::io::Error| format!("{method} {path}: {error}");
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).map_err(text)?;
    let patience = Some(Duration::from_secs(20));
    stream.set_read_timeout(patience).map_err(text)?;
    let request = format!(
        "{method} {path} HTTP/1.0\r\nHost: localhost\r\nAuthorization: Basic {basic}\r\n\
         Content-Type: application/json\r\nContent-Length: 0\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).map_err(text)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(text)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).unwrap_or("none");
    if !status.starts_with('2') {
        return Err(format!("{method} {path}: status {status}: {body}"));
    }
    if body.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_str(body).map_err(|error| format!("{method} {path}: {error}"))
}

/// Whether a string anywhere in it names the queue.
pub(super) fn names(value: &Value, queue: &str) -> bool {
    match value {
        Value::String(text) => text.contains(queue),
        Value::Array(values) => values.iter().any(|value| names(value, queue)),
        Value::Object(members) => members.values().any(|value| names(value, queue)),
        _ => false,
    }
}

/// The messages of the index that name the queue.
pub(super) fn indexed(port: u16, vhost: &str, queue: &str) -> Result<Vec<String>, String> {
    let text = |error: std::io::Error| error.to_string();
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).map_err(text)?;
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .map_err(text)?;
    let body = r#"{"count":10000,"ackmode":"ack_requeue_true","encoding":"auto"}"#;
    let request = format!(
        "POST /api/queues/{vhost}/wilco.index/get HTTP/1.0\r\nHost: localhost\r\n\
         Authorization: Basic Z3Vlc3Q6Z3Vlc3Q=\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).map_err(text)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(text)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    if head.split(' ').nth(1) == Some("404") {
        return Ok(Vec::new());
    }
    let messages: Value = serde_json::from_str(body).map_err(|error| error.to_string())?;
    let messages = messages.as_array().cloned().unwrap_or_default();
    Ok(messages
        .iter()
        .filter(|message| names(message, queue))
        .map(|_| "an entry in the index".to_owned())
        .collect())
}
