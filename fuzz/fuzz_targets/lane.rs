//! A question and an answer as they come over a lane.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| {
    wilco::fuzzing::question(body);
    wilco::fuzzing::answer(body);
});
