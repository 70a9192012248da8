//! The table: each saboteur and the check that has to catch it.

use std::sync::Arc;

use super::{Saboteur, consume, faults, leases, publish, queues, requests, secrets};

/// Calls a macro with every saboteur: `name: module::Type => check;` each. Tests are made with it,
/// one a saboteur.
#[macro_export]
macro_rules! for_each_saboteur {
    ($callback:path) => {
        $callback! {
            always_created: queues::AlwaysCreated => q1_declare_is_idempotent_from_many_tasks;
            status_consumes: queues::StatusConsumes => q2_looking_never_touches_a_message;
            any_arguments_will_do: queues::AnyArgumentsWillDo => q3_other_arguments_are_a_mismatch;
            any_arguments_will_do_in_a_race: queues::AnyArgumentsWillDo => q1_of_two_specs_at_once_one_wins;
            ok_for_a_missing_queue: queues::OkForAMissingQueue => q4_publish_to_a_missing_queue_is_no_queue;
            consume_makes_the_queue: queues::ConsumeMakesTheQueue => q5_nothing_but_declare_makes_a_queue;
            delete_never_refuses: queues::DeleteNeverRefuses => q6_delete_refuses_what_is_not_empty;
            discards_in_silence: queues::DiscardsInSilence => q6_a_publish_racing_with_delete_is_stored_or_an_error;
            ack_beats_the_delete: leases::AckIsAlwaysOk => q6_delete_arbitrates_with_acks;
            leaks_on_delete: queues::LeaksOnDelete => q7_delete_leaves_nothing_behind;
            ignores_case: queues::IgnoresCase => q8_two_ids_never_meet;
            answers_for_the_neighbour: requests::AnswersForTheDead => q8_two_lanes_never_meet;
            stale_status: queues::StaleStatus => q9_status_is_right_at_once;
            forgets_on_restart: queues::ForgetsOnRestart => q10_an_idle_queue_outlives_a_restart;
            idle_timer: queues::IdleTimer => q10_an_idle_queue_outlives_the_idle_timers;
            silent_end: queues::SilentEnd => q11_a_live_consumer_is_told_of_the_delete;
            drops_the_oldest: queues::DropsTheOldest => q12_at_the_limit_the_new_one_is_refused;
            confirms_before_it_stores: publish::ConfirmsBeforeItStores => p1_ok_means_stored_for_everybody;
            loses_one_in_a_hundred: publish::LosesOneInAHundred => p1_ok_means_stored_for_everybody;
            empties_on_restart: queues::EmptiesOnRestart => p1_ok_outlives_a_restart;
            refused_is_ok: publish::RefusedIsOk => p2_a_refusal_is_not_stored;
            refused_is_unknown: publish::RefusedIsUnknown => p2_a_refusal_is_not_stored;
            takes_the_id_for_the_message: publish::TakesTheIdForTheMessage => p3_a_resend_with_the_same_id_is_one_message;
            never_forgets_an_id: publish::TakesTheIdForTheMessage => p3_an_id_is_free_when_its_message_is_gone;
            recognises_and_stores_again: publish::RecognisesAndStoresAgain => p3_a_resend_with_the_same_id_is_one_message;
            not_stored_is_stored: publish::NotStoredIsStored => p4_not_stored_never_shows_up;
            a_cut_breaks_the_next: publish::ACutBreaksTheNext => p5_a_cancelled_publish_never_harms_the_next;
            status_leaves_a_delivery_behind: queues::StatusConsumes => p5_a_cancelled_call_never_harms_the_handle;
            drops_headers: publish::DropsHeaders => p6_every_byte_comes_back;
            bodies_are_text: publish::BodiesAreText => p6_every_byte_comes_back;
            cuts_large_bodies: publish::CutsLargeBodies => p6_over_the_limit_is_too_large;
            mixes_up_answers: publish::MixesUpAnswers => p7_no_answer_lands_on_the_wrong_message;
            delivers_to_the_neighbour: publish::DeliversToTheNeighbour => p7_no_answer_lands_on_the_wrong_message;
            overtakes: publish::Overtakes => p8_fifo_per_publisher_and_queue;
            ignores_the_deadline: publish::IgnoresTheDeadline => p9_nothing_waits_past_its_deadline;
            acks_early: leases::AcksEarly => c1_a_dropped_consumer_gives_all_back;
            acks_early_on_a_handle: leases::AcksEarly => c1_a_vanished_handle_gives_all_back;
            forgets_acks: leases::ForgetsAcks => c2_an_acked_delivery_never_comes_back;
            forgets_what_was_held: queues::EmptiesOnRestart => c2_an_ack_outlives_a_restart;
            acks_unasked: leases::AcksUnasked => c3_an_ack_without_ok_leaves_the_message_or_not;
            ack_is_always_ok: leases::AckIsAlwaysOk => c4_a_stale_handle_settles_nothing;
            reuses_handles: leases::ReusesHandles => c4_a_stale_handle_settles_nothing;
            leases_expire: leases::LeasesExpire => c5_a_long_handler_keeps_its_lease;
            retries_too_early: leases::RetriesTooEarly => c6_retry_keeps_its_delay;
            swallows_retries: leases::SwallowsRetries => c6_a_delay_outlives_its_consumer;
            always_the_first: consume::AlwaysTheFirst => c6_retry_keeps_its_delay;
            forgets_the_limit: consume::ForgetsTheLimit => c7_over_the_limit_is_a_dead_letter_once;
            drops_the_rejected: leases::DropsTheRejected => c7_a_rejected_message_is_kept_with_its_reason;
            forgets_the_reason: consume::ForgetsTheReason => c7_a_rejected_message_is_kept_with_its_reason;
            redrive_copies: consume::RedriveCopies => c7_redrive_moves_it_back_once;
            poison_blocks: consume::ForgetsTheLimit => c8_poison_does_not_stop_prepare;
            ignores_prefetch: consume::IgnoresPrefetch => c9_prefetch_is_a_bound;
            counts_the_buffer: consume::CountsTheBuffer => c9_the_buffer_goes_back_and_does_not_age;
            dropping_acks: leases::DroppingAcks => c10_dropping_a_delivery_gives_it_back;
            swaps_neighbours: consume::SwapsNeighbours => c11_order_is_kept;
            swaps_what_comes_back: consume::SwapsNeighbours => c11_what_was_buffered_keeps_its_place;
            redelivers_unsaid: consume::AlwaysTheFirst => c11_a_redelivered_one_says_so;
            tells_nobody: consume::TellsNobody => c12_one_consumer_is_served_the_other_is_told;
            begins_with_the_next: consume::BeginsWithTheNext => c13_what_waited_before_the_first_consumer_is_delivered;
            begins_with_the_next_in_a_race: consume::BeginsWithTheNext => c13_none_is_lost_around_the_first_attach;
            acks_lazily: leases::AcksLazily => c14_a_close_after_the_last_ack_loses_none;
            answers_are_text: requests::AnswersAreText => r1_a_question_and_its_answer_arrive_whole;
            answers_for_the_dead: requests::AnswersForTheDead => r2_nobody_there_is_no_consumer_at_once;
            waits_for_nobody: requests::WaitsForNobody => r2_nobody_there_is_no_consumer_at_once;
            silent_is_absent: requests::SilentIsAbsent => r3_attached_but_hung_is_consumer_silent;
            too_busy_to_answer: requests::TooBusyToAnswer => r4_a_busy_guest_still_answers;
            crosses_answers: requests::CrossesAnswers => r5_each_caller_gets_its_own_answer;
            late_replies_arrive: requests::LateRepliesArrive => r5_a_late_reply_reaches_nobody;
            keeps_the_unanswered: requests::KeepsTheUnanswered => r5_unanswered_requests_leave_nothing_behind;
            vanished_askers_kill: requests::VanishedAskersKill => r6_a_vanished_requester_harms_nobody;
            two_deadlines: requests::TwoDeadlines => r7_the_deadline_is_total;
            rewords_errors: requests::RewordsErrors => r8_errors_pass_typed_and_whole;
            pings_through_the_queue: requests::PingsThroughTheQueue => r9_pings_never_touch_the_durable_queue;
            revokes_nothing: secrets::RevokesNothing => s1_a_guests_credential_is_worth_one_queue;
            gives_away_all_rights: secrets::GivesAwayAllRights => s1_a_guests_credential_is_worth_one_queue;
            drops_what_it_cannot_read: secrets::DropsWhatItCannotRead => s2_what_no_client_would_send_is_parked;
            lies_about_durability: queues::LiesAboutDurability => d1_the_report_is_honest;
            claims_what_it_does_not_know: queues::ClaimsWhatItDoesNotKnow => d2_require_refuses_what_the_report_does_not_show;
            forgets_on_a_kill: queues::EmptiesOnRestart => f1_a_kill_after_the_confirm_loses_nothing;
            cut_short_by_a_kill_is_ok: faults::CutShortIsOk => f2_kills_amid_bursts_lose_nothing;
            waits_for_the_paused: faults::WaitsForTheBroker => f3_a_paused_broker_ends_no_call_late;
            cut_short_by_a_reset_is_ok: faults::CutShortIsOk => f4_resets_and_cuts_lose_nothing;
            resends_under_a_new_id: faults::ResendsUnderANewId => f4_resets_and_cuts_lose_nothing;
            never_comes_back_from_a_hole: faults::NeverComesBack => f4_a_black_hole_is_noticed;
            takes_slow_for_dead: faults::TakesSlowForDead => f4_a_slow_link_is_only_slow;
            ack_over_a_cut_is_ok: leases::AckOverACutIsOk => f4_cut_behind_every_frame_in_turn;
            gives_up_at_once: faults::GivesUpAtOnce => f5_a_connect_waits_to_its_deadline;
            never_comes_back_from_an_outage: faults::NeverComesBack => f5_everybody_comes_back_after_an_outage;
            knocks_in_step: faults::KnocksInStep => f5_nobody_comes_back_in_lock_step;
            cut_short_by_a_lost_node_is_ok: faults::CutShortIsOk => f6_any_node_killed_loses_nothing;
            counts_the_buffer_on_shutdown: consume::CountsTheBuffer => f8_a_shutdown_burns_no_count;
            waits_for_the_broker_to_close: faults::WaitsForTheBroker => f8_a_close_with_the_broker_down_ends;
            refused_in_an_alarm_is_ok: publish::RefusedIsOk => f9_an_alarm_refuses_and_loses_nothing;
            skips_one_in_fifty: consume::SkipsOneInFifty => l_handles_that_come_and_go_lose_nothing;
            forgets_acks_now_and_then: leases::ForgetsOneAckInFifty => l_handles_that_come_and_go_lose_nothing;
        }
    };
}

macro_rules! table {
    ($($name:ident: $module:ident::$type:ident => $check:ident;)*) => {
        /// Every saboteur, in the order of the laws that they break.
        #[must_use]
        pub fn all() -> Vec<Saboteur> {
            vec![$(Saboteur {
                name: stringify!($name),
                caught_by: stringify!($check),
                make: || Arc::new($module::$type::default()),
            }),*]
        }
    };
}
for_each_saboteur!(table);

/// The saboteur of this name.
#[must_use]
pub fn find(name: &str) -> Option<Saboteur> {
    all().into_iter().find(|saboteur| saboteur.name == name)
}
