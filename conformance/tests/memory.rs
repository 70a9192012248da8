//! Every check on the embedded broker in memory.

mod common;

use wilco_conformance::{for_each_check, harnesses::Memory};

const HARNESS: Memory = Memory;

/// What needs a second process,
/// or outlives this one, or a view from outside.
const NOT_RUN: &[&str] = &[
    "q7_delete_leaves_nothing_behind",
    "q10_an_idle_queue_outlives_a_restart",
    "p1_ok_outlives_a_restart",
    "c2_an_ack_outlives_a_restart",
    "c1_a_killed_process_gives_all_back",
    "c4_a_paused_process_settles_only_what_it_still_has",
    "c12_across_processes",
    "r3_a_killed_guest_becomes_no_consumer",
    "d1_a_claim_to_outlive_a_kill_is_true",
    "l_processes_killed_at_random_lose_nothing",
];

for_each_check!(common::tests);
