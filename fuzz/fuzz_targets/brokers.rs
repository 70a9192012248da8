//! A message as each broker's server hands it out, by the first byte: a frame of AMQP, a block of NATS's
//! headers, a value of Redis.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    match input.split_first() {
        Some((b'r', frame)) => wilco::fuzzing::rabbitmq(frame),
        Some((b'n', headers)) => wilco::fuzzing::nats(headers),
        Some((b's', value)) => wilco::fuzzing::redis(value),
        _ => {}
    }
});
