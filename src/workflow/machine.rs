//! The provisioning's state machine, pure: an event changes a record, and a record says what to do next.
//!
//! Nothing here does I/O or reads a clock. The record is saved before [`todo`] is carried out, and
//! every effect can be carried out again: a crash between the two repeats an effect, never skips one.

use std::time::Duration;

use crate::{
    message::MessageId,
    wire::{BootId, CommandResult, CommandState, RemoteError},
    workflow::record::{
        ProvisionOutcome, Reason, ReasonKind, Record, SendPolicy, Sent, Stage, State, Trouble,
    },
};

/// How long a running guest may be silent before it is suspect: several watch rounds.
pub(crate) const SUSPECT_AFTER: Duration = Duration::from_secs(6);

/// Something that was learnt.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// The queue exists.
    Declared,
    /// The guest is attached to its queue and answers.
    Pong(BootId),
    /// The guest told how the command stands.
    Command(CommandState, Option<BootId>),
    /// The guest accepted prepare: it is acked, and will be run.
    Accepted(BootId),
    /// The guest refused the command, or it became a dead letter.
    Refused(RemoteError),
    /// Something could not be reached.
    Trouble(Trouble),
    /// The broker confirmed the publish.
    SendConfirmed,
    /// The broker confirmed the publish: an earlier one of the same id is there, none was added.
    AlreadyThere,
    /// The publish stored nothing, and never will (law P4).
    NotStored,
    /// Prepare is about to be published once more: there may be one copy more of it from now on.
    SendAgain,
    /// Prepare is in no queue, and its guest does not have it either.
    Lost,
    /// The queue is gone.
    QueueGone,
    /// It is not wanted any more, or cannot come to anything.
    GiveUp(Reason),
    /// The guest was asked not to start prepare, and had started it.
    TooLate,
    /// Time passed.
    Tick,
    /// The queue and what was in it are gone for good.
    Fenced {
        /// How many copies of prepare were in it until then, by the broker's word.
        discarded: u32,
    },
    /// Everything of it is gone from the broker.
    Deleted,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Todo {
    /// Declare the queue.
    Declare,
    /// Ping until the guest answers.
    Await,
    /// Publish prepare, under the same id each time.
    Publish,
    /// Wait for reports, and look after the guest.
    Watch,
    /// Make sure that no guest runs prepare any more.
    Revoke,
    /// Nothing: it has ended.
    Nothing,
}

/// What a record asks for.
pub(crate) fn todo(record: &Record) -> Todo {
    match record.state {
        State::Planned => Todo::Declare,
        State::AwaitingGuest => Todo::Await,
        State::QueueReady | State::GuestUp => Todo::Publish,
        State::Sent | State::Running | State::Suspect => Todo::Watch,
        State::Revoking => Todo::Revoke,
        State::Succeeded | State::Failed | State::NotDelivered | State::Deleted => Todo::Nothing,
    }
}

/// Takes in an event. True: the record has changed in a way that has to be saved.
pub(crate) fn apply(record: &mut Record, event: Event, now_ms: u64) -> bool {
    if record.state.is_terminal() {
        return match event {
            Event::Deleted if record.state != State::Deleted => {
                enter(record, State::Deleted, now_ms)
            }
            _ => false,
        };
    }
    match event {
        Event::Declared => match (record.state, record.policy) {
            (State::Planned, _) if record.accepted => enter(record, State::Running, now_ms),
            (State::Planned, SendPolicy::PingFirst) => enter(record, State::AwaitingGuest, now_ms),
            (State::Planned, SendPolicy::EnqueueFirst) => {
                begin_to_send(record, State::QueueReady, now_ms)
            }
            _ => false,
        },
        Event::Pong(boot) => {
            let changed = saw(record, Some(boot), now_ms);
            match record.state {
                State::AwaitingGuest => begin_to_send(record, State::GuestUp, now_ms),
                State::Suspect => enter(record, State::Running, now_ms),
                _ => changed,
            }
        }
        Event::Accepted(boot) => {
            saw(record, Some(boot), now_ms);
            accepted(record, now_ms)
        }
        Event::Command(state, boot) => {
            let changed = saw(record, boot, now_ms);
            match state {
                CommandState::Done(receipt) => {
                    let runs = receipt.runs;
                    let outcome = match receipt.result {
                        CommandResult::Ok(result) => ProvisionOutcome::Succeeded {
                            result: serde_json::from_str(result.get()).unwrap_or_default(),
                            runs,
                        },
                        CommandResult::Error(error) => ProvisionOutcome::Failed {
                            reason: Reason::from(&error),
                            runs,
                        },
                    };
                    end(record, outcome, now_ms)
                }
                CommandState::Running { .. } => accepted(record, now_ms),
                // Its queue is to go too, before the outcome stands.
                CommandState::Withdrawn if record.state != State::Revoking => {
                    let reason = why(record);
                    revoke(record, reason, now_ms)
                }
                CommandState::Withdrawn => {
                    let reason = why(record);
                    end(record, ProvisionOutcome::NotDelivered { reason }, now_ms)
                }
                CommandState::Unknown | CommandState::Accepted => changed,
            }
        }
        Event::Refused(error) => {
            let reason = Reason::from(&error);
            end(record, ProvisionOutcome::Failed { reason, runs: 0 }, now_ms)
        }
        Event::Trouble(trouble) => {
            let news = record.trouble.as_ref().map(|old| old.kind) != Some(trouble.kind);
            record.trouble = Some(trouble);
            news
        }
        Event::SendConfirmed => match record.state {
            State::QueueReady | State::GuestUp => {
                record.sent = Sent::Confirmed;
                record.trouble = None;
                enter(record, State::Sent, now_ms)
            }
            State::Revoking => {
                record.sent = Sent::Confirmed;
                true
            }
            _ => false,
        },
        Event::AlreadyThere => {
            record.copies = record.copies.saturating_sub(1).max(1);
            apply(record, Event::SendConfirmed, now_ms)
        }
        Event::NotStored => {
            record.copies = record.copies.saturating_sub(1);
            if record.copies == 0 && record.sent == Sent::Maybe {
                record.sent = Sent::Never;
            }
            true
        }
        Event::SendAgain => match record.state {
            State::QueueReady | State::GuestUp => {
                one_more_copy(record);
                true
            }
            _ => false,
        },
        Event::Lost => match record.state {
            State::Sent | State::Running | State::Suspect => {
                begin_to_send(record, State::GuestUp, now_ms)
            }
            _ => false,
        },
        Event::QueueGone => match record.state {
            State::Revoking | State::Planned => false,
            _ => enter(record, State::Planned, now_ms),
        },
        Event::GiveUp(reason) => revoke(record, reason, now_ms),
        Event::TooLate => match record.state {
            State::Revoking => too_late(record, now_ms),
            _ => false,
        },
        Event::Tick => tick(record, now_ms),
        Event::Fenced { discarded } => match record.state {
            State::Revoking => fenced(record, discarded, now_ms),
            _ => false,
        },
        Event::Deleted => false,
    }
}

/// When [`Event::Tick`] has something to do next, in milliseconds since 1970.
pub(crate) fn next_tick_ms(record: &Record) -> u64 {
    if record.state == State::Revoking {
        // It has been given up; how long that takes has no deadline.
        return u64::MAX;
    }
    let total = after(record.created_ms, record.deadlines.total);
    stage_deadline(record)
        .map_or(total, |(_, deadline)| deadline.min(total))
        .min(suspect_from(record).unwrap_or(u64::MAX))
}

fn tick(record: &mut Record, now_ms: u64) -> bool {
    if now_ms >= after(record.created_ms, record.deadlines.total) {
        return give_up(record, Stage::Total, now_ms);
    }
    match stage_deadline(record) {
        Some((stage, deadline)) if now_ms >= deadline => return give_up(record, stage, now_ms),
        _ => {}
    }
    match suspect_from(record) {
        Some(from) if now_ms >= from => enter(record, State::Suspect, now_ms),
        _ => false,
    }
}

/// The stage that a record is in, and when its deadline passes.
pub(crate) fn stage_deadline(record: &Record) -> Option<(Stage, u64)> {
    let deadlines = &record.deadlines;
    let boot = after(record.created_ms, deadlines.boot);
    match record.state {
        _ if record.accepted => Some((
            Stage::Progress,
            after(last_seen(record), deadlines.progress),
        )),
        State::Planned | State::AwaitingGuest => Some((Stage::Boot, boot)),
        // Prepare may wait in the queue for a guest that is still booting.
        State::Sent if record.boot.is_none() => Some((Stage::Boot, boot)),
        State::QueueReady | State::GuestUp | State::Sent => {
            Some((Stage::Accept, after(record.since_ms, deadlines.accept)))
        }
        State::Running | State::Suspect => Some((
            Stage::Progress,
            after(last_seen(record), deadlines.progress),
        )),
        _ => None,
    }
    .filter(|_| record.state != State::Revoking)
}

/// When a running guest becomes suspect.
fn suspect_from(record: &Record) -> Option<u64> {
    (record.state == State::Running).then(|| after(last_seen(record), SUSPECT_AFTER))
}

fn last_seen(record: &Record) -> u64 {
    record.seen_ms.unwrap_or(record.created_ms)
}

fn after(from_ms: u64, duration: Duration) -> u64 {
    from_ms.saturating_add(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}

/// A deadline has passed: what stood in the way is the reason, or that it passed.
fn give_up(record: &mut Record, stage: Stage, now_ms: u64) -> bool {
    let reason = match &record.trouble {
        Some(trouble) if stage != Stage::Total => Reason::new(trouble.kind, trouble.detail.clone()),
        _ => Reason::new(ReasonKind::DeadlineExceeded, String::new()),
    };
    revoke(record, reason.at(stage), now_ms)
}

fn revoke(record: &mut Record, reason: Reason, now_ms: u64) -> bool {
    if record.state == State::Revoking {
        return false;
    }
    record.revoking = Some(reason);
    enter(record, State::Revoking, now_ms)
}

/// The queue is gone: prepare was discarded before anybody could ack it, or somebody may have it.
fn fenced(record: &mut Record, discarded: u32, now_ms: u64) -> bool {
    // A copy that did not come back may have been acked (cases W14, W19, W24): by a guest that nobody has
    // heard of yet, too, and whatever the broker said of the publish or of an earlier delete.
    let all_came_back = record.sent == Sent::Never || discarded >= record.copies.max(1);
    if record.accepted || !all_came_back {
        return too_late(record, now_ms);
    }
    let reason = why(record);
    end(record, ProvisionOutcome::NotDelivered { reason }, now_ms)
}

/// A guest has it (case W37): it goes on to its outcome, unless there is no time left for one.
fn too_late(record: &mut Record, now_ms: u64) -> bool {
    record.accepted = true;
    if is_out_of_time(record, now_ms) {
        let reason = why(record);
        return end(record, ProvisionOutcome::Failed { reason, runs: 0 }, now_ms);
    }
    record.revoking = None;
    record.seen_ms = Some(now_ms);
    // Its queue may be gone by now, and has to be there for the guest to serve.
    enter(record, State::Planned, now_ms)
}

/// Whether a prepare that the guest has accepted would come too late anyway.
fn is_out_of_time(record: &Record, now_ms: u64) -> bool {
    let reason = why(record);
    reason.kind == ReasonKind::HostFailed
        || matches!(reason.stage, Some(Stage::Progress | Stage::Total))
        || now_ms >= after(record.created_ms, record.deadlines.total)
}

fn why(record: &Record) -> Reason {
    record
        .revoking
        .clone()
        .unwrap_or_else(|| Reason::new(ReasonKind::Revoked, "given up"))
}

fn accepted(record: &mut Record, now_ms: u64) -> bool {
    let news = !record.accepted;
    record.accepted = true;
    record.sent = Sent::Confirmed;
    match record.state {
        // Whether it is too late to revoke is for the fence to say.
        State::Revoking | State::Planned | State::Running => news,
        _ => enter(record, State::Running, now_ms),
    }
}

fn begin_to_send(record: &mut Record, state: State, now_ms: u64) -> bool {
    one_more_copy(record);
    enter(record, state, now_ms)
}

fn one_more_copy(record: &mut Record) {
    record.copies = record.copies.saturating_add(1);
    if record.sent == Sent::Never {
        record.sent = Sent::Maybe;
    }
}

/// A sign of life. True if it has to be saved: not each one is.
fn saw(record: &mut Record, boot: Option<MessageId>, now_ms: u64) -> bool {
    record.seen_ms = Some(now_ms);
    let recovered = record.trouble.take().is_some();
    let rebooted = boot.is_some() && record.boot != boot;
    if rebooted {
        record.boot = boot;
    }
    recovered || rebooted
}

fn end(record: &mut Record, outcome: ProvisionOutcome, now_ms: u64) -> bool {
    let state = outcome.state();
    record.outcome = Some(outcome);
    enter(record, state, now_ms)
}

fn enter(record: &mut Record, state: State, now_ms: u64) -> bool {
    /// More would only be a guest that flaps.
    const LONGEST_HISTORY: usize = 64;
    record.state = state;
    record.since_ms = now_ms;
    if record.history.len() < LONGEST_HISTORY {
        record.history.push((now_ms, state));
    }
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::value::RawValue;

    use super::*;
    use crate::{
        names::{GuestAddress, GuestId},
        wire::Receipt,
        workflow::record::Deadlines,
    };

    fn record(policy: SendPolicy) -> Record {
        let address = GuestAddress::from(GuestId::new("vm").unwrap());
        Record::new(
            address,
            RawValue::NULL.to_owned().into(),
            policy,
            Deadlines::default(),
            0,
        )
    }

    fn boot() -> BootId {
        BootId::new("boot-1").unwrap()
    }

    fn done() -> Event {
        let result = CommandResult::Ok(RawValue::TRUE.to_owned().into());
        Event::Command(CommandState::Done(Receipt::new(1, result)), Some(boot()))
    }

    fn after_events(policy: SendPolicy, events: impl IntoIterator<Item = (Event, u64)>) -> Record {
        let mut record = record(policy);
        for (event, now) in events {
            apply(&mut record, event, now);
        }
        record
    }

    fn reason(record: &Record) -> (State, ReasonKind, Option<Stage>) {
        let reason = record.outcome.as_ref().unwrap().reason().unwrap();
        (record.state, reason.kind, reason.stage)
    }

    fn cancel() -> Event {
        Event::GiveUp(Reason::new(ReasonKind::Revoked, ""))
    }

    fn fenced_with(discarded: u32) -> Event {
        Event::Fenced { discarded }
    }

    const BOOT_MS: u64 = 600_000;

    #[test]
    fn w2_ping_first_goes_its_way() {
        let mut record = record(SendPolicy::PingFirst);
        let way = [
            (Event::Declared, State::AwaitingGuest, Todo::Await),
            (Event::Pong(boot()), State::GuestUp, Todo::Publish),
            (Event::SendConfirmed, State::Sent, Todo::Watch),
            (Event::Accepted(boot()), State::Running, Todo::Watch),
            (done(), State::Succeeded, Todo::Nothing),
        ];
        assert_eq!(todo(&record), Todo::Declare);
        for (event, state, next) in way {
            assert!(apply(&mut record, event, 1));
            assert_eq!((record.state, todo(&record)), (state, next));
        }
    }

    #[test]
    fn w1_a_guest_that_never_starts_is_not_delivered_for_what_stood_in_the_way() {
        let trouble = Trouble {
            kind: ReasonKind::NoConsumer,
            detail: String::new(),
        };
        for policy in [SendPolicy::PingFirst, SendPolicy::EnqueueFirst] {
            let events = [
                Event::Declared,
                Event::SendConfirmed,
                Event::Trouble(trouble.clone()),
            ];
            let mut record = after_events(policy, events.map(|event| (event, 0)));
            assert_eq!(next_tick_ms(&record), BOOT_MS);
            assert!(!apply(&mut record, Event::Tick, BOOT_MS - 1));
            assert!(apply(&mut record, Event::Tick, BOOT_MS));
            assert_eq!(todo(&record), Todo::Revoke);
            let discarded = u32::from(policy == SendPolicy::EnqueueFirst);
            apply(&mut record, fenced_with(discarded), BOOT_MS);
            let expected = (
                State::NotDelivered,
                ReasonKind::NoConsumer,
                Some(Stage::Boot),
            );
            assert_eq!(reason(&record), expected);
        }
    }

    #[test]
    fn w37_a_cancel_that_comes_too_late_goes_on_to_the_outcome() {
        let events = [
            Event::Declared,
            Event::Pong(boot()),
            Event::SendConfirmed,
            cancel(),
        ];
        let revoking = after_events(SendPolicy::PingFirst, events.map(|event| (event, 1)));
        assert_eq!(revoking.state, State::Revoking);

        let mut discarded = revoking.clone();
        apply(&mut discarded, fenced_with(1), 2);
        assert_eq!(reason(&discarded).0, State::NotDelivered);

        for too_late in [fenced_with(0), Event::TooLate] {
            let mut accepted = revoking.clone();
            apply(&mut accepted, too_late, 2);
            assert_eq!((accepted.state, accepted.accepted), (State::Planned, true));
            apply(&mut accepted, Event::Declared, 3);
            assert_eq!(accepted.state, State::Running);
            apply(&mut accepted, done(), 4);
            assert_eq!(accepted.state, State::Succeeded);
        }
    }

    #[test]
    fn a_copy_that_came_back_does_not_prove_that_no_other_was_acked() {
        let sent = [Event::Declared, Event::Pong(boot()), Event::SendConfirmed];
        let revoked = |more: &[Event], discarded| {
            let events = sent.iter().chain(more).cloned().chain([cancel()]);
            let events = events.map(|event| (event, 1));
            let mut record = after_events(SendPolicy::PingFirst, events);
            apply(&mut record, fenced_with(discarded), 2);
            (record.state, record.accepted)
        };
        let (too_late, not_delivered) = ((State::Planned, true), (State::NotDelivered, false));
        // W24: it was looked for, not found and sent again, because a guest had acked it.
        let again = [Event::Lost, Event::SendConfirmed];
        assert_eq!(revoked(&again, 1), too_late);
        assert_eq!(revoked(&again, 2), not_delivered);
        // W14, W19: sent again, because nothing was known of the first time.
        let unknown = [Event::Lost, Event::SendAgain, Event::SendConfirmed];
        assert_eq!(revoked(&unknown, 2), too_late);
        assert_eq!(revoked(&unknown, 3), not_delivered);
        // Where the broker knew it again, or refused it, there is no second copy.
        let known = [Event::Lost, Event::AlreadyThere];
        assert_eq!(revoked(&known, 1), not_delivered);
        let refused = [Event::Lost, Event::NotStored];
        assert_eq!(revoked(&refused, 1), not_delivered);
        // The guest said that it has one: a copy more or less changes nothing.
        assert_eq!(revoked(&[Event::Accepted(boot())], 1), too_late);
    }

    #[test]
    fn revoking_has_no_deadline_and_comes_before_not_delivered() {
        let events = [Event::Declared, Event::Pong(boot()), Event::SendConfirmed];
        let mut record = after_events(SendPolicy::PingFirst, events.map(|event| (event, 1)));
        apply(
            &mut record,
            Event::Command(CommandState::Withdrawn, None),
            2,
        );
        assert_eq!(todo(&record), Todo::Revoke);
        // A tick that has passed already would make each pause between two attempts nothing.
        assert_eq!(next_tick_ms(&record), u64::MAX);
        apply(
            &mut record,
            Event::Command(CommandState::Withdrawn, None),
            3,
        );
        assert_eq!(record.state, State::NotDelivered);
    }

    #[test]
    fn prepare_that_is_gone_from_its_queue_was_acked_by_somebody_not_heard_of_yet() {
        let events = [Event::Declared, Event::SendConfirmed, cancel()];
        let revoking = after_events(SendPolicy::EnqueueFirst, events.map(|event| (event, 1)));
        let mut record = revoking.clone();
        apply(&mut record, fenced_with(0), 2);
        assert_eq!((record.state, record.accepted), (State::Planned, true));
        // W33: what the broker refused to store was not delivered.
        let events = [Event::Declared, Event::NotStored, cancel(), fenced_with(0)];
        let record = after_events(SendPolicy::EnqueueFirst, events.map(|event| (event, 1)));
        assert_eq!(record.state, State::NotDelivered);
    }

    /// Found by the model check: each of these was recorded as not delivered, and run.
    #[test]
    fn a_guest_that_nobody_heard_of_may_have_every_copy_that_did_not_come_back() {
        let revoked = |events: &[Event], discarded| {
            let events = events.iter().cloned().chain([cancel()]);
            let events = events.map(|event| (event, 1));
            let mut record = after_events(SendPolicy::EnqueueFirst, events);
            apply(&mut record, fenced_with(discarded), 2);
            record.state
        };
        // W19: stored, its confirm lost; acked by the guest before the queue was deleted.
        assert_eq!(revoked(&[Event::Declared], 0), State::Planned);
        assert_eq!(revoked(&[Event::Declared], 1), State::NotDelivered);
        // Sent again while the guest was about to start it: the second copy came back.
        let again = [
            Event::Declared,
            Event::SendConfirmed,
            Event::Lost,
            Event::SendConfirmed,
        ];
        assert_eq!(revoked(&again, 1), State::Planned);
        assert_eq!(revoked(&again, 2), State::NotDelivered);
        // The queue was deleted before, and the answer that told of its copies was lost.
        let sent = [Event::Declared, Event::SendConfirmed];
        assert_eq!(revoked(&sent, 0), State::Planned);
    }

    #[test]
    fn an_accepted_prepare_whose_time_is_up_has_failed_not_vanished() {
        let events = [
            Event::Declared,
            Event::Pong(boot()),
            Event::SendConfirmed,
            Event::Accepted(boot()),
        ];
        let mut record = after_events(SendPolicy::PingFirst, events.map(|event| (event, 1)));
        apply(&mut record, Event::Tick, 1 + 6_000);
        assert_eq!(record.state, State::Suspect);
        apply(&mut record, Event::Tick, 1 + 120_000);
        apply(&mut record, fenced_with(0), 1 + 120_000);
        assert_eq!(
            reason(&record),
            (
                State::Failed,
                ReasonKind::DeadlineExceeded,
                Some(Stage::Progress)
            )
        );
    }

    #[test]
    fn w24_a_lost_prepare_is_sent_again_under_its_id() {
        let events = [Event::Declared, Event::Pong(boot()), Event::SendConfirmed];
        let mut record = after_events(SendPolicy::PingFirst, events.map(|event| (event, 1)));
        let command = record.command.clone();
        assert!(apply(&mut record, Event::Lost, 2));
        assert_eq!((todo(&record), &record.command), (Todo::Publish, &command));
    }

    #[test]
    fn w23_a_queue_that_is_gone_is_declared_again() {
        let events = [
            Event::Declared,
            Event::Pong(boot()),
            Event::SendConfirmed,
            Event::QueueGone,
        ];
        let record = after_events(SendPolicy::PingFirst, events.map(|event| (event, 1)));
        assert_eq!(todo(&record), Todo::Declare);
    }

    fn any_event() -> impl Strategy<Value = Event> {
        let states = prop_oneof![
            Just(CommandState::Unknown),
            Just(CommandState::Accepted),
            Just(CommandState::Running { runs: 1 }),
            Just(CommandState::Withdrawn),
        ];
        prop_oneof![
            3 => Just(Event::Declared),
            3 => Just(Event::Pong(boot())),
            3 => Just(Event::SendConfirmed),
            1 => Just(Event::Accepted(boot())),
            2 => states.prop_map(|state| Event::Command(state, Some(boot()))),
            1 => Just(done()),
            1 => Just(Event::Refused(RemoteError::new("poison", ""))),
            1 => Just(Event::Trouble(Trouble { kind: ReasonKind::NoConsumer, detail: String::new() })),
            1 => Just(Event::Lost),
            1 => Just(Event::QueueGone),
            1 => Just(cancel()),
            1 => Just(Event::TooLate),
            3 => Just(Event::Tick),
            1 => Just(Event::SendAgain),
            1 => Just(Event::AlreadyThere),
            1 => Just(Event::NotStored),
            1 => (0u32..3).prop_map(|discarded| Event::Fenced { discarded }),
            1 => Just(Event::Deleted),
        ]
    }

    proptest! {
        /// The guarantee's own words: exactly one outcome, and no way back from it.
        #[test]
        fn an_outcome_is_set_once_and_stays(
            events in prop::collection::vec((any_event(), 0u64..700_000), 1..40),
            enqueue in any::<bool>(),
        ) {
            let policy = if enqueue { SendPolicy::EnqueueFirst } else { SendPolicy::PingFirst };
            let mut record = record(policy);
            let mut now = 0;
            let mut ended: Option<String> = None;
            for (event, later) in events {
                now += later / 20;
                let before = serde_json::to_string(&record).unwrap();
                let changed = apply(&mut record, event, now);
                let outcome = record.outcome.as_ref().map(|outcome| format!("{outcome:?}"));
                prop_assert_eq!(record.state.is_terminal(), outcome.is_some());
                prop_assert_eq!(todo(&record) == Todo::Nothing, outcome.is_some());
                if let Some(first) = &ended {
                    prop_assert_eq!(Some(first), outcome.as_ref());
                }
                // Never published: then it was not delivered, whatever else happened.
                if record.sent == Sent::Never && !record.accepted {
                    prop_assert!(record.state != State::Running && record.state != State::Sent);
                }
                if !changed {
                    let state = |text: &str| serde_json::from_str::<Record>(text).unwrap().state;
                    prop_assert_eq!(state(&before), record.state);
                }
                ended = outcome;
            }
        }

        /// Whatever happened before, time alone ends it: nothing waits for ever.
        #[test]
        fn time_and_a_fence_end_everything(
            events in prop::collection::vec(any_event(), 0..30),
            discarded in 0u32..3,
        ) {
            let mut record = record(SendPolicy::PingFirst);
            for event in events {
                apply(&mut record, event, 1);
            }
            let end = 3_600_000;
            apply(&mut record, Event::Tick, end);
            apply(&mut record, fenced_with(discarded), end);
            prop_assert!(record.state.is_terminal(), "{:?}", record.state);
        }
    }
}
