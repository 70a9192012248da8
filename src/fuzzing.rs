//! Entries for the fuzzer, to what the other side reaches and users of this library do not.
#![allow(missing_docs, reason = "only there with --cfg fuzzing")]

use crate::{
    message::Message,
    sign::{Guard, SigningKey, Trust},
    wire::{Answer, AskForm, Command},
    workflow::{Record, fuzz_drive},
};

fn guard() -> Guard {
    let text = format!("wilco-secret-ed25519:{}", "a".repeat(64));
    let key = SigningKey::from_text(&text.into()).expect("a key");
    Guard::new(Trust::new([key.public()]))
}

pub fn check(message: &Message) {
    if let Ok(command) = Command::from_message(message) {
        let guard = guard();
        if let Ok(stamp) = command.check(message, &guard) {
            let _ = guard.time(&stamp);
        }
    }
}

pub fn question(body: &[u8]) {
    if let Ok(form) = AskForm::decode(body) {
        let _ = form.check(&guard());
        let _ = form.ask();
    }
}

pub fn answer(body: &[u8]) {
    if let Ok(answer) = Answer::decode(body) {
        let body = answer.encode().expect("what was read can be written");
        Answer::decode(&body).expect("and read again");
    }
}

pub fn drive(record: &Record) {
    fuzz_drive(record);
}

#[cfg(feature = "rabbitmq")]
pub fn rabbitmq(frame: &[u8]) {
    crate::backends::rabbitmq::fuzz(frame);
}

#[cfg(feature = "nats")]
pub fn nats(headers: &[u8]) {
    crate::backends::nats::fuzz(headers);
}

#[cfg(feature = "redis")]
pub fn redis(value: &[u8]) {
    crate::backends::redis::fuzz(value);
}
