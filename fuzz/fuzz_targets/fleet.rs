//! A fleet file: whatever is in it, each line is a guest or an error that says where.
#![no_main]
#![allow(dead_code, reason = "the command's own rooms, of which this wants one")]

#[path = "../../src/cli/fleet.rs"]
mod fleet;
#[path = "../../src/cli/problem.rs"]
mod problem;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let lines = input.split(|&byte| byte == b'\n').count();
    let fleet = fleet::parse(input).expect("memory can be read");
    assert!(fleet.guests.len() + fleet.malformed.len() <= lines);
    for malformed in &fleet.malformed {
        assert!((1..=lines).contains(&malformed.line) && malformed.column > 0);
        assert!(!malformed.what.is_empty());
    }
});
