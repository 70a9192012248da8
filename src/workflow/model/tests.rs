//! What was checked, and within which bounds.
//!
//! Breadth first, shortest histories first. A scenario that is not through after so many steps says so, and
//! how deep it came: `WILCO_MODEL_STEPS` gives each more (0: until it is through), `WILCO_MODEL_BOUND` (1
//! unless told otherwise) allows more faults of each kind at once.

#![allow(clippy::print_stdout, reason = "the bounds and counts are the result")]

use std::{collections::HashSet, sync::Mutex, time::Instant};

use stateright::{Checker as _, HasDiscoveries, Model as _};

use super::{Left, Sabotage, Workflow, property};
use crate::workflow::{guest::Interrupted, record::SendPolicy};

/// How many steps a scenario may take unless told otherwise.
const STEPS: u64 = 30_000;

/// One guest and one control plane, and nothing goes wrong but the time.
fn calm() -> Workflow {
    Workflow {
        policies: vec![SendPolicy::PingFirst, SendPolicy::EnqueueFirst],
        interrupted: Interrupted::Fail,
        machines: 1,
        taskmanagers: 1,
        dedup: false,
        left: Left::default(),
        most_copies: 2,
        handler_may_fail: false,
        sabotage: None,
        unchecked: Vec::new(),
        ends: [Mutex::new(HashSet::new()), Mutex::new(HashSet::new())],
    }
}

fn from_env(name: &str, otherwise: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.map_or(otherwise, |text| text.parse().expect("a number"))
}

fn bound() -> u8 {
    u8::try_from(from_env("WILCO_MODEL_BOUND", 1)).expect("a small number")
}

/// Every state within the bounds, or as many as the time allows.
fn check(name: &str, workflow: Workflow) {
    let began = Instant::now();
    let steps = usize::try_from(from_env("WILCO_MODEL_STEPS", STEPS)).expect("a number");
    let left = workflow.left;
    let mut checker = workflow
        .checker()
        .threads(1)
        .finish_when(HasDiscoveries::AnyFailures);
    if steps > 0 {
        checker = checker.target_state_count(steps);
    }
    let checked = checker.spawn_bfs().join();
    let through = steps == 0 || checked.state_count() < steps;
    println!(
        "model, {name}: {}; {} states, {} steps, depth {}, {:.1?}; {left:?}",
        if through { "through" } else { "NOT THROUGH" },
        checked.unique_state_count(),
        checked.state_count(),
        checked.max_depth(),
        began.elapsed(),
    );
    let mut violated = Vec::new();
    for (name, path) in checked.discoveries() {
        if checked
            .model()
            .property(name)
            .expectation
            .discovery_is_failure()
        {
            let end = format!("{:?}", path.last_state());
            violated.push(format!("{name}: {:#?}\n{end}", path.into_actions()));
        }
    }
    assert!(violated.is_empty(), "{}", violated.join("\n"));
}

#[test]
fn nothing_but_time() {
    let mut workflow = calm();
    workflow.handler_may_fail = true;
    check("nothing but time", workflow);
}

#[test]
fn w19_w37_a_cancel_and_a_bad_network() {
    let mut workflow = calm();
    (workflow.left.network, workflow.left.give_ups) = (bound(), bound());
    check("a cancel and a bad network", workflow);
}

#[test]
fn w7_to_w15_kills_at_every_step() {
    let mut workflow = calm();
    (workflow.left.taskmanager_kills, workflow.left.guest_kills) = (bound(), bound());
    workflow.left.give_ups = bound();
    check("kills at every step, and a cancel", workflow);
}

#[test]
fn w16_two_taskmanagers_on_one_record() {
    let mut workflow = calm();
    workflow.taskmanagers = 2;
    workflow.left.give_ups = bound();
    // The walk asks again at each loser's at once, for ever: that is its schedule's doing, or a livelock;
    // not decided yet.
    workflow.unchecked = vec![property::NEVER_STUCK, property::NO_WAIT];
    check("two taskmanagers, and a cancel", workflow);
}

#[test]
fn w25_an_old_incarnation() {
    let mut workflow = calm();
    workflow.machines = 2;
    workflow.left.give_ups = bound();
    check("an old incarnation, and a cancel", workflow);
}

/// A broken workflow, or a broken broker, is found: by this property.
fn finds(sabotage: Sabotage, left: Left, expected: &'static str) {
    let mut workflow = calm();
    workflow.sabotage = Some(sabotage);
    workflow.left = left;
    if sabotage == Sabotage::RevisionsAreNotChecked {
        workflow.taskmanagers = 2;
    }
    for name in [
        property::ONE_OUTCOME,
        property::ONE_RUN,
        property::NOT_RUN,
        property::RUN,
        property::NO_LATE_START,
        property::NEVER_STUCK,
        property::NO_WAIT,
    ] {
        if name != expected {
            workflow.unchecked.push(name);
        }
    }
    let checked = workflow
        .checker()
        .threads(1)
        .finish_when(HasDiscoveries::AnyFailures)
        .target_state_count(300_000)
        .spawn_bfs()
        .join();
    let found = checked.discovery(expected).is_some();
    println!(
        "model, {sabotage:?}: found {found}, {} states",
        checked.unique_state_count()
    );
    assert!(found, "{sabotage:?} is not found");
}

fn left(network: u8, guest_kills: u8, taskmanager_kills: u8, give_ups: u8) -> Left {
    Left {
        taskmanager_kills,
        guest_kills,
        network,
        operator: 0,
        give_ups,
    }
}

#[test]
fn a_start_without_a_confirmed_ack_is_found() {
    finds(
        Sabotage::StartWithoutAck,
        left(0, 0, 0, 1),
        property::NOT_RUN,
    );
}

#[test]
fn a_journal_that_is_not_asked_is_found() {
    finds(
        Sabotage::JournalIsNotAsked,
        left(0, 0, 0, 0),
        property::ONE_RUN,
    );
}

#[test]
fn a_journal_that_is_not_durable_is_found() {
    finds(
        Sabotage::JournalIsNotDurable,
        left(0, 1, 0, 0),
        property::ONE_RUN,
    );
}

#[test]
fn a_withdrawal_that_is_not_written_is_found() {
    finds(
        Sabotage::WithdrawalIsNotWritten,
        left(0, 0, 0, 1),
        property::NOT_RUN,
    );
}

#[test]
fn not_delivered_before_the_delete_was_answered_is_found() {
    finds(
        Sabotage::DeleteIsNotAwaited,
        left(0, 0, 0, 1),
        property::NOT_RUN,
    );
}

#[test]
fn one_copy_that_counts_as_all_is_found() {
    finds(Sabotage::OneCopyIsAll, left(0, 0, 0, 1), property::NOT_RUN);
}

#[test]
#[ignore = "not found within a minute: not shown yet"]
fn a_publish_that_is_not_counted_is_found() {
    finds(
        Sabotage::PublishIsNotCounted,
        left(1, 0, 0, 1),
        property::NOT_RUN,
    );
}

#[test]
fn an_outcome_told_before_it_is_saved_is_found() {
    finds(
        Sabotage::ToldBeforeSaved,
        left(0, 0, 1, 1),
        property::ONE_OUTCOME,
    );
}

#[test]
fn a_lost_prepare_that_is_not_sent_again_is_found() {
    finds(
        Sabotage::LostIsNotSentAgain,
        left(1, 0, 0, 0),
        property::NO_WAIT,
    );
}

#[test]
fn a_broker_that_confirms_an_ack_after_its_delete_is_found() {
    finds(
        Sabotage::AckAfterDeleteIsOk,
        left(0, 0, 0, 1),
        property::NOT_RUN,
    );
}

#[test]
fn a_broker_that_stores_one_publish_twice_is_found() {
    finds(
        Sabotage::OnePublishIsStoredTwice,
        left(0, 0, 0, 1),
        property::NOT_RUN,
    );
}

#[test]
#[ignore = "not found within a minute: not shown yet"]
fn saves_without_a_revision_are_found() {
    finds(
        Sabotage::RevisionsAreNotChecked,
        left(0, 0, 0, 1),
        property::ONE_OUTCOME,
    );
}
