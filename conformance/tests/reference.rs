//! Every check on the suite's own broker.

mod common;

use wilco_conformance::{for_each_check, harnesses::Reference};

const HARNESS: Reference = Reference;

/// What needs a second process.
const NOT_RUN: &[&str] = &[
    "c1_a_killed_process_gives_all_back",
    "c4_a_paused_process_settles_only_what_it_still_has",
    "c12_across_processes",
    "r3_a_killed_guest_becomes_no_consumer",
    "d1_a_claim_to_outlive_a_kill_is_true",
    "l_processes_killed_at_random_lose_nothing",
];

for_each_check!(common::tests);
