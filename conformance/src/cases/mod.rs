//! The cases of the workflow, W1 to W40, and its crash points (law F7): taskmanager, guests and broker
//! as processes, killed, paused and cut off where the case says so.
//!
//! They hold the workflow to the guarantee on a broker that keeps the laws. Each runs on every harness
//! whose broker other processes can reach.

pub mod boot;
pub mod broker;
pub mod command;
pub mod control;
pub mod crash;
pub mod hostile;
pub mod queue;
pub mod signed;
mod stage;

use crate::check::{Check, CheckResult, Cx};

/// Calls a macro with every case: `module::name, "case", "title";` each.
#[macro_export]
macro_rules! for_each_case {
    ($callback:path) => {
        $callback! {
            boot::w1_a_guest_that_never_starts_is_given_up, "W1", "a guest that never starts: not delivered, nothing left";
            boot::w2_a_guest_that_comes_late_is_prepared_once, "W2", "a guest that comes late, in time: prepared once";
            boot::w3_a_guest_after_the_give_up_runs_nothing, "W3", "a guest after the give-up: turned away, runs nothing";
            boot::w4_a_guest_that_the_broker_refuses_says_so, "W4", "a guest that the broker refuses: it says so, nobody is seen";
            boot::w5_a_hung_guest_is_silent, "W5", "attached but hung: silent within the ping's time";
            boot::w6_a_guest_that_dies_after_its_pong_is_waited_for_or_given_up, "W6", "dead between pong and publish: waits for it, or is taken back";
            crash::w7_a_guest_killed_before_its_journal_gets_prepare_again, "W7", "guest killed before its journal: redelivered, run once";
            crash::w8_a_guest_killed_before_its_ack_knows_prepare_again, "W8", "guest killed before its ack: recognised, one effect";
            crash::w9_a_guest_killed_in_mid_prepare_ends_as_it_chose, "W9", "guest killed in mid-prepare: fails or runs again, as it chose";
            crash::w10_a_guest_killed_before_its_report_reports_again, "W10", "guest killed before its report: reports again";
            crash::w11_a_duplicate_prepare_runs_once, "W11", "a duplicate prepare: run once";
            crash::w12_a_taskmanager_killed_before_declare_is_resumed, "W12", "taskmanager killed before declare: resumed";
            crash::w13_a_taskmanager_killed_after_declare_is_resumed, "W13", "taskmanager killed after declare: resumed";
            crash::w14_a_taskmanager_killed_after_publish_sends_the_same_again, "W14", "taskmanager killed after publish: the same id again, run once";
            crash::w15_a_taskmanager_killed_while_it_waits_is_resumed, "W15", "taskmanager killed while it waits: goes on with the time left";
            control::w16_a_second_taskmanager_gets_conflict, "W16", "two taskmanagers: one is, the other gets Conflict";
            broker::w17_a_queued_prepare_outlives_a_restart, "W17", "broker killed with prepare queued: it is there, run once";
            broker::w18_a_broker_that_is_down_at_the_start_is_told, "W18", "broker down at the start: told in time, resumed later";
            broker::w19_a_lost_confirm_leads_to_one_effect, "W19", "connection lost before the confirm: sent again, one effect";
            broker::w20_a_failover_confirms_nothing_false, "W20", "a failover: no false confirm, nothing lost";
            queue::w21_a_lost_report_is_asked_for, "W21", "a report is lost: the guest is asked, nothing runs again";
            queue::w22_a_vanished_reports_queue_is_made_again, "W22", "the queue of reports vanishes: made again, result fetched";
            queue::w23_a_queue_deleted_under_the_guest_comes_back, "W23", "queue deleted under the guest: declared and sent again";
            queue::w24_a_purged_prepare_is_sent_again, "W24", "prepare purged by an operator: the same id again";
            control::w25_a_zombie_of_an_old_incarnation_is_fenced, "W25", "a zombie of an old incarnation: fenced";
            control::w26_a_clone_gets_conflict, "W26", "two guests with the same credentials: one is told Conflict";
            queue::w27_a_queue_with_other_arguments_is_told, "W27", "a queue declared otherwise: told, its messages intact";
            command::w28_what_cannot_be_understood_is_kept, "W28", "what cannot be understood: a dead letter, prepare goes on";
            command::w29_a_handler_that_fails_has_failed, "W29", "a handler that fails: Failed, after one run";
            command::w30_a_long_prepare_is_not_delivered_again, "W30", "a prepare longer than the broker waits: not redelivered";
            command::w31_stale_pings_harm_nobody, "W31", "thousands of stale pings: prepare and calls unaffected";
            command::w32_other_commands_wait_for_prepare, "W32", "another command before prepare is done: refused, or held";
            broker::w33_an_alarm_is_waited_out, "W33", "the broker is full: told, and resumed";
            command::w34_a_wrong_clock_changes_nothing, "W34", "the guest's clock is wrong by years: no effect";
            signed::w35_what_a_stranger_sends_is_refused, "W35", "forged, unsigned, replayed commands: refused, counted, told; the true one runs";
            control::w36_a_delete_at_every_step_leaves_nothing, "W36", "deleted at every step: nothing left, late guest turned away";
            control::w37_a_cancel_races_with_the_guest, "W37", "a cancel races with accept: one truth, and told which";
            broker::w38_a_crowd_outlives_the_broker, "W38", "a crowd at once, broker killed in the middle: none lost or twice";
            broker::w39_a_crowd_that_comes_back_is_bounded, "W39", "everyone reconnects: bounded";
            boot::w40_a_guest_that_reboots_while_it_waits_is_accepted, "W40", "guest reboots while it waits: accepted";
            hostile::s2_garbage_stops_nobody, "S2", "garbage into queue, lane and reports: kept, and service goes on";
            crash::f7_a_taskmanager_killed_at_every_side_effect, "F7", "taskmanager killed before and after every side effect";
            crash::f7_a_guest_killed_at_every_side_effect, "F7", "guest killed before and after every side effect";
        }
    };
}

macro_rules! list {
    ($($module:ident :: $name:ident, $case:literal, $title:literal;)*) => {
        /// Every case, in the order of their numbers, then the crash points.
        #[must_use]
        pub fn all() -> Vec<Check> {
            vec![$(Check {
                name: stringify!($name),
                law: $case,
                title: $title,
                run: |cx: &Cx| Box::pin(async move {
                    let result: CheckResult = $module::$name(cx).await;
                    result
                }),
            }),*]
        }
    };
}
for_each_case!(list);
