//! Every check, once. Tests and the command are made from this one list.

use crate::{
    cases,
    check::{Check, CheckResult, Cx},
    laws,
};

/// Calls a macro with every check: `name, "law", "title";` each. Tests are made with it, one a check.
#[macro_export]
macro_rules! for_each_check {
    ($callback:path) => {
        $callback! {
            q::q1_declare_is_idempotent_from_many_tasks, "Q1", "declare from 64 tasks at once: one Created, one queue";
            q::q1_of_two_specs_at_once_one_wins, "Q1", "two specs race: one wins, the other is told of the mismatch";
            q::q2_looking_never_touches_a_message, "Q2", "declare, status, list hammered: no delivery counted or taken";
            q::q3_other_arguments_are_a_mismatch, "Q3", "other arguments: Mismatch with the differences, messages intact";
            q::q4_publish_to_a_missing_queue_is_no_queue, "Q4", "publish to a missing queue: NoQueue in a round trip";
            q::q5_nothing_but_declare_makes_a_queue, "Q5", "consume, status, delete of a missing queue: NoQueue, none made";
            q::q6_delete_refuses_what_is_not_empty, "Q6", "delete: NotEmpty with the count; told to discard, says what went";
            q::q6_a_publish_racing_with_delete_is_stored_or_an_error, "Q6", "publishes racing with a delete: stored and discarded, or NoQueue";
            q::q6_delete_arbitrates_with_acks, "Q6", "acks racing with a delete: acked or discarded, never both";
            q::q7_delete_leaves_nothing_behind, "Q7", "after a delete the broker's own view has nothing left";
            q::q8_two_ids_never_meet, "Q8", "ids that could be wildcards or paths: each its own queue";
            q::q8_two_lanes_never_meet, "Q8", "the same ids: each its own lane";
            q::q8_bad_names_are_refused_before_any_io, "Q8", "empty or too long ids are refused before any I/O";
            q::q9_status_is_right_at_once, "Q9", "status is right at once after every step";
            q::q10_an_idle_queue_outlives_a_restart, "Q10", "idle queues outlive restarts of the broker";
            q::q10_an_idle_queue_outlives_the_idle_timers, "Q10", "idle queues outlive every idle timer";
            q::q11_a_live_consumer_is_told_of_the_delete, "Q11", "a live consumer gets QueueDeleted and nothing heals";
            q::q12_at_the_limit_the_new_one_is_refused, "Q12", "at the limit the new publish fails, what is stored stays";
            p::p1_ok_means_stored_for_everybody, "P1", "at the moment of Ok it is there for everybody";
            p::p1_ok_outlives_a_restart, "P1", "what was Ok outlives a restart of the broker";
            p::p2_a_refusal_is_not_stored, "P2", "full or too large: an error that says NotStored, in time";
            p::p3_a_resend_with_the_same_id_is_one_message, "P3", "cut off and sent again: delivered, once where recognised";
            p::p3_an_id_is_free_when_its_message_is_gone, "P3", "sent again after its ack: delivered again";
            p::p4_not_stored_never_shows_up, "P4", "NotStored is final";
            p::p5_a_cancelled_publish_never_harms_the_next, "P5", "publishes cut off at every poll: the next is fine";
            p::p5_a_cancelled_call_never_harms_the_handle, "P5", "every other call cut off at every poll: no harm";
            p::p6_every_byte_comes_back, "P6", "body, headers, ids come back byte for byte";
            p::p6_over_the_limit_is_too_large, "P6", "up to the limit whole, over it TooLarge";
            p::p7_no_answer_lands_on_the_wrong_message, "P7", "64 tasks, good, full and missing queues: each its own answer";
            p::p8_fifo_per_publisher_and_queue, "P8", "FIFO per publisher and queue";
            p::p9_nothing_waits_past_its_deadline, "P9", "every operation ends at its deadline";
            c::c1_a_dropped_consumer_gives_all_back, "C1", "consumer dropped: its unsettled ones come again";
            c::c1_a_vanished_handle_gives_all_back, "C1", "handle closed or dropped: the same";
            c::c1_a_killed_process_gives_all_back, "C1", "consumer process killed: the same, within the bound";
            c::c2_an_acked_delivery_never_comes_back, "C2", "acked is gone";
            c::c2_an_ack_outlives_a_restart, "C2", "acked is gone after a restart too";
            c::c3_an_ack_without_ok_leaves_the_message_or_not, "C3", "an ack without Ok: it comes again or not, nothing between";
            c::c4_a_stale_handle_settles_nothing, "C4", "a stale handle settles nothing and says so";
            c::c4_a_paused_process_settles_only_what_it_still_has, "C4", "a process that slept: acked or redelivered, never both";
            c::c5_a_long_handler_keeps_its_lease, "C5", "a handler longer than the lease keeps it";
            c::c6_retry_keeps_its_delay, "C6", "retry: not before its delay, counts exact";
            c::c6_a_delay_outlives_its_consumer, "C6", "a delay outlives its consumer and blocks nobody";
            c::c7_over_the_limit_is_a_dead_letter_once, "C7", "over the limit: a dead letter, whole, once";
            c::c7_a_rejected_message_is_kept_with_its_reason, "C7", "rejected: a dead letter with its reason";
            c::c7_redrive_moves_it_back_once, "C7", "redrive moves it back once, by two at once too";
            c::c8_poison_does_not_stop_prepare, "C8", "poison ahead of prepare does not stop it";
            c::c9_prefetch_is_a_bound, "C9", "at most prefetch unsettled at once";
            c::c9_the_buffer_goes_back_and_does_not_age, "C9", "what was buffered goes back uncounted and does not age";
            c::c10_dropping_a_delivery_gives_it_back, "C10", "dropping a delivery gives it back, a panic too";
            c::c11_order_is_kept, "C11", "one consumer, no redelivery: order is kept";
            c::c11_a_redelivered_one_says_so, "C11", "what comes out of its place has a count above 1";
            c::c11_what_was_buffered_keeps_its_place, "C11", "what was only buffered goes back to its place";
            c::c12_one_consumer_is_served_the_other_is_told, "C12", "of many consumers one is served, the others told";
            c::c12_across_processes, "C12", "the same across processes";
            c::c13_none_is_lost_around_the_first_attach, "C13", "1,000 races of publish and first attach";
            c::c13_what_waited_before_the_first_consumer_is_delivered, "C13", "what waited before the first consumer is delivered";
            c::c14_a_close_after_the_last_ack_loses_none, "C14", "a clean close after the last ack loses none";
            r::r1_a_question_and_its_answer_arrive_whole, "R1", "question and answer arrive byte for byte";
            r::r2_nobody_there_is_no_consumer_at_once, "R2", "nobody there: NoConsumer in a round trip";
            r::r3_attached_but_hung_is_consumer_silent, "R3", "hung: ConsumerSilent at the deadline";
            r::r3_a_killed_guest_becomes_no_consumer, "R3", "killed: NoConsumer within the bound";
            r::r4_a_busy_guest_still_answers, "R4", "a busy guest answers";
            r::r5_each_caller_gets_its_own_answer, "R5", "1,000 in flight: each caller its own answer";
            r::r5_a_late_reply_reaches_nobody, "R5", "a late reply reaches nobody";
            r::r5_unanswered_requests_leave_nothing_behind, "R5", "100,000 unanswered requests: flat memory, nothing left";
            r::r6_a_vanished_requester_harms_nobody, "R6", "a vanished requester harms nobody";
            r::r7_the_deadline_is_total, "R7", "the deadline is total";
            r::r8_errors_pass_typed_and_whole, "R8", "errors pass typed and whole";
            r::r9_pings_never_touch_the_durable_queue, "R9", "pings never touch the durable queue";
            s::s1_a_guests_credential_is_worth_one_queue, "S1", "a guest's credential does a guest's work, and the server refuses all else";
            s::s2_what_no_client_would_send_is_parked, "S2", "bytes that no client would send: each parked, nobody falls over, service goes on";
            d::d1_the_report_is_honest, "D1", "the durability report does not exceed what the broker can be";
            d::d1_a_claim_to_outlive_a_kill_is_true, "D1", "what was confirmed outlives the kill of its publisher";
            d::d2_require_refuses_what_the_report_does_not_show, "D2", "require keeps to the verdicts";
            f::f1_a_kill_after_the_confirm_loses_nothing, "F1", "killed after the confirm, 50 times: the message is there";
            f::f2_kills_amid_bursts_lose_nothing, "F2", "killed amid bursts, consumers at work: clean ledger";
            f::f3_a_paused_broker_ends_no_call_late, "F3", "paused beyond the bound: every call ends in time, all goes on after";
            f::f4_resets_and_cuts_lose_nothing, "F4", "connections reset and cut at random bytes: clean ledger";
            f::f4_a_black_hole_is_noticed, "F4", "half-open and swallowed: noticed, everybody back within the bound";
            f::f4_a_slow_link_is_only_slow, "F4", "a slow link: slow, and nothing else";
            f::f4_cut_behind_every_frame_in_turn, "F4", "cut behind every frame in turn: set-check after each";
            f::f5_a_connect_waits_to_its_deadline, "F5", "down: a connect waits to its deadline, and no longer";
            f::f5_everybody_comes_back_after_an_outage, "F5", "after an outage everybody is back by himself";
            f::f5_nobody_comes_back_in_lock_step, "F5", "those who come back do not come together";
            f::f6_any_node_killed_loses_nothing, "F6", "several nodes, each killed, the leader too: clean ledger, all back by themselves";
            f::f8_a_shutdown_burns_no_count, "F8", "shut down with a full buffer: no count burnt, nothing dead";
            f::f8_a_close_with_the_broker_down_ends, "F8", "broker down: a close ends in bounded time";
            f::f9_an_alarm_refuses_and_loses_nothing, "F9", "an alarm: publishes refused in time, nothing lost, service resumes";
            l::l_handles_that_come_and_go_lose_nothing, "L", "handles come and go, publishes are cut: clean ledger";
            l::l_processes_killed_at_random_lose_nothing, "L", "processes killed at random: clean ledger";
            f::l_a_nemesis_loses_nothing, "L", "kills, pauses and cuts in a seeded order, on processes at work: clean ledger";
        }
    };
}

macro_rules! registry {
    ($($section:ident :: $name:ident, $law:literal, $title:literal;)*) => {
        /// Every check, in the order of the contract.
        #[must_use]
        pub fn all() -> Vec<Check> {
            vec![$(Check {
                name: stringify!($name),
                law: $law,
                title: $title,
                run: |cx: &Cx| Box::pin(async move {
                    let result: CheckResult = laws::$section::$name(cx).await;
                    result
                }),
            }),*]
        }
    };
}
for_each_check!(registry);

/// The same, and behind them the cases of the workflow.
#[must_use]
pub fn with_cases() -> Vec<Check> {
    all().into_iter().chain(cases::all()).collect()
}

/// The check or case of this name.
#[must_use]
pub fn find(name: &str) -> Option<Check> {
    with_cases().into_iter().find(|check| check.name == name)
}

/// Every law that has to have a check in this package: those that a trait and its harness can show.
#[must_use]
pub fn laws() -> Vec<String> {
    let sections = [("Q", 12), ("P", 9), ("C", 14), ("R", 9), ("S", 2), ("D", 2)];
    let numbered = sections
        .into_iter()
        .flat_map(|(section, last)| (1..=last).map(move |number| format!("{section}{number}")));
    // F7 is a case of the workflow.
    let faults = ["F1", "F2", "F3", "F4", "F5", "F6", "F8", "F9"].map(String::from);
    numbered.chain(faults).chain(["L".into()]).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_law_has_a_check_and_every_check_a_law() {
        let checked: HashSet<_> = all().iter().map(|check| check.law.to_owned()).collect();
        assert_eq!(checked, laws().into_iter().collect());
    }

    #[test]
    fn names_are_unique_and_begin_with_their_law() {
        let mut names = HashSet::new();
        for check in with_cases() {
            assert!(names.insert(check.name), "{} is there twice", check.name);
            let prefix = format!("{}_", check.law.to_lowercase());
            assert!(
                check.name.starts_with(&prefix),
                "{} is of {}",
                check.name,
                check.law
            );
        }
    }

    #[test]
    fn every_public_function_of_the_laws_is_listed() {
        let package = std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let mut sources = vec![package.join("src/laws"), package.join("src/cases")];
        let mut functions = HashSet::new();
        while let Some(path) = sources.pop() {
            if path.is_dir() {
                sources.extend(
                    std::fs::read_dir(&path)
                        .unwrap()
                        .map(|entry| entry.unwrap().path()),
                );
                continue;
            }
            for line in std::fs::read_to_string(&path).unwrap().lines() {
                if let Some(rest) = line.strip_prefix("pub async fn ") {
                    functions.insert(rest.split('(').next().unwrap().to_owned());
                }
            }
        }
        let listed: HashSet<_> = with_cases()
            .iter()
            .map(|check| check.name.to_owned())
            .collect();
        assert_eq!(functions, listed);
    }
}
