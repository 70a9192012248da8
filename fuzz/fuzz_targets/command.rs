//! A command as it comes out of a queue: its headers and its body, read and checked as a guest does that
//! trusts a key. The input is header lines `name: value`, an empty line, the body.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wilco::{Headers, Message, MessageId, wire::Command};

fuzz_target!(|input: &[u8]| {
    let split = input.windows(2).position(|two| two == b"\n\n");
    let (head, body) = match split {
        Some(at) => (&input[..at], &input[at + 2..]),
        None => (&input[..0], input),
    };
    let mut headers = Headers::new();
    for line in String::from_utf8_lossy(head).lines() {
        if let Some((name, value)) = line.split_once(": ") {
            let _ = headers.insert(name, value);
        }
    }
    let Ok(message) = Message::new("prepare", body.to_vec()) else {
        return;
    };
    let message = message.with_headers(headers);
    // Its id stands in the body and beside it: most inputs know one of them.
    let id: Option<MessageId> = serde_json::from_slice::<serde_json::Value>(body)
        .ok()
        .and_then(|value| value.get("command")?.as_str()?.parse().ok());
    let message = match id {
        Some(id) => message.with_id(id),
        None => message,
    };
    let _ = message.trace();
    wilco::fuzzing::check(&message);
    if let Ok(command) = Command::from_message(&message) {
        let again = command.to_message().expect("what was read can be written");
        let again = Command::from_message(&again).expect("and read again");
        assert_eq!(again.command, command.command);
        assert_eq!(again.payload.get(), command.payload.get());
    }
});
