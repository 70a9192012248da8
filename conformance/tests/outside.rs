//! Law X3: a backend from outside, on the public API alone, is held to every check; and the guide that
//! builds it shows its code as it is.

#[allow(dead_code, reason = "its own program is not run here")]
#[path = "../examples/append_only.rs"]
mod append_only;
mod common;

use append_only::held::AppendOnly;
use wilco_conformance::for_each_check;

const HARNESS: AppendOnly = AppendOnly;

/// What needs a second process, or a server that can be broken.
const NOT_RUN: &[&str] = &[
    "c1_a_killed_process_gives_all_back",
    "c4_a_paused_process_settles_only_what_it_still_has",
    "c12_across_processes",
    "r3_a_killed_guest_becomes_no_consumer",
    "d1_a_claim_to_outlive_a_kill_is_true",
    "l_processes_killed_at_random_lose_nothing",
    "l_a_nemesis_loses_nothing",
    "f1_a_kill_after_the_confirm_loses_nothing",
    "f2_kills_amid_bursts_lose_nothing",
    "f3_a_paused_broker_ends_no_call_late",
    "f4_resets_and_cuts_lose_nothing",
    "f4_a_black_hole_is_noticed",
    "f4_a_slow_link_is_only_slow",
    "f4_cut_behind_every_frame_in_turn",
    "f5_a_connect_waits_to_its_deadline",
    "f5_everybody_comes_back_after_an_outage",
    "f5_nobody_comes_back_in_lock_step",
    "f6_any_node_killed_loses_nothing",
    "f8_a_close_with_the_broker_down_ends",
    "f9_an_alarm_refuses_and_loses_nothing",
    "s1_a_guests_credential_is_worth_one_queue",
    "s2_what_no_client_would_send_is_parked",
];

macro_rules! one {
    (r r5_unanswered_requests_leave_nothing_behind) => {
        common::check!(r5_unanswered_requests_leave_nothing_behind, open "measures its process: run it alone");
    };
    ($section:ident $name:ident) => {
        common::check!($name);
    };
}

for_each_check!(common::tests);

/// Each piece of code in the guide is a piece of the example, line by line; so it compiles, and passes.
#[test]
fn the_guide_shows_the_code_as_it_is() {
    let example = include_str!("../examples/append_only.rs");
    let lines: Vec<_> = example.lines().map(str::trim).collect();
    let guide = include_str!("../examples/writing-a-backend.md");
    let mut pieces = 0;
    for piece in guide.split("```rust\n").skip(1) {
        let piece = piece.split("```").next().unwrap_or_default();
        let piece: Vec<_> = piece.lines().map(str::trim).collect();
        let there = lines.windows(piece.len()).any(|lines| lines == piece);
        assert!(there, "not in the example: {}", piece.join("\n"));
        pieces += 1;
    }
    assert!(pieces >= 12, "{pieces}");
}
