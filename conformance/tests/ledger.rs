//! Law X4: the ledger's judge on histories made by hand, good and bad, and on made-up ones.

use std::path::PathBuf;

use proptest::prelude::*;
use wilco_conformance::ledger::{Answer, Entry, Event, How, Minimum, Verdict, judge, load};

const Q: &str = "wilco.q.a.1";

/// A history of these events, one nanosecond apart.
fn history(events: impl IntoIterator<Item = Event>) -> Vec<Entry> {
    let entry = |(ns, event)| Entry {
        ns,
        process: 1,
        seed: 0,
        event,
    };
    (1..).zip(events).map(entry).collect()
}

fn verdict(events: impl IntoIterator<Item = Event>) -> Verdict {
    judge(&history(events), Minimum::default())
}

fn attempt(id: &str) -> Event {
    Event::Attempt {
        queue: Q.into(),
        id: id.into(),
    }
}
fn answer(id: &str, answer: Answer) -> Event {
    Event::Answer {
        queue: Q.into(),
        id: id.into(),
        answer,
    }
}
fn delivery(id: &str, attempt: u32) -> Event {
    Event::Delivery {
        queue: Q.into(),
        id: id.into(),
        attempt,
    }
}
fn settled(id: &str, how: How, ok: bool) -> Event {
    Event::Settled {
        queue: Q.into(),
        id: id.into(),
        how,
        ok,
    }
}
fn acked(id: &str) -> Event {
    settled(id, How::Ack, true)
}
fn drained() -> Event {
    Event::Drained { queue: Q.into() }
}
fn stored(id: &str) -> [Event; 2] {
    [attempt(id), answer(id, Answer::Stored)]
}

#[test]
fn a_plain_history_is_clean() {
    let [a, b] = stored("m");
    let verdict = verdict([a, b, delivery("m", 1), acked("m"), drained()]);
    assert!(verdict.is_clean(), "{verdict}");
    assert_eq!(
        (verdict.confirmed, verdict.deliveries, verdict.acked),
        (1, 1, 1)
    );
}

#[test]
fn confirmed_and_not_delivered_is_lost() {
    let [a, b] = stored("m");
    let verdict = verdict([a, b, drained()]);
    assert_eq!(verdict.lost, [format!("m in {Q}")]);
    assert!(!verdict.is_clean());
}

#[test]
fn confirmed_and_found_elsewhere_is_not_lost() {
    let [a, b] = stored("m");
    let found = Event::Found {
        queue: Q.into(),
        id: "m".into(),
    };
    assert!(verdict([a, b, found, drained()]).is_clean());
}

#[test]
fn delivered_and_never_attempted_is_a_phantom() {
    let verdict = verdict([delivery("m", 1), acked("m"), drained()]);
    assert_eq!(verdict.phantom.len(), 1);
}

#[test]
fn delivered_after_not_stored_is_a_phantom() {
    let [a, b] = [attempt("m"), answer("m", Answer::NotStored)];
    let verdict = verdict([a, b, delivery("m", 1), acked("m"), drained()]);
    assert_eq!(verdict.phantom.len(), 1);
}

#[test]
fn delivered_before_its_not_stored_is_a_phantom_too() {
    let late = answer("m", Answer::NotStored);
    let verdict = verdict([attempt("m"), delivery("m", 1), acked("m"), late, drained()]);
    assert_eq!(verdict.phantom.len(), 1);
}

#[test]
fn delivered_in_another_queue_is_a_phantom_and_lost() {
    let [a, b] = stored("m");
    let other = "wilco.q.b.1".to_owned();
    let astray = Event::Delivery {
        queue: other.clone(),
        id: "m".into(),
        attempt: 1,
    };
    let verdict = verdict([a, b, astray, drained(), Event::Drained { queue: other }]);
    assert_eq!((verdict.lost.len(), verdict.phantom.len()), (1, 1));
}

#[test]
fn delivered_before_the_answer_is_no_phantom() {
    let late = answer("m", Answer::Stored);
    let events = [attempt("m"), delivery("m", 1), acked("m"), late, drained()];
    assert!(verdict(events).is_clean());
}

#[test]
fn delivered_after_an_ok_ack_is_a_duplicate() {
    let [a, b] = stored("m");
    let verdict = verdict([
        a,
        b,
        delivery("m", 1),
        acked("m"),
        delivery("m", 2),
        drained(),
    ]);
    assert_eq!(verdict.duplicate_after_ack.len(), 1);
}

#[test]
fn delivered_after_it_was_dead_is_a_duplicate() {
    let [a, b] = stored("m");
    let dead = settled("m", How::DeadLetter, true);
    let verdict = verdict([a, b, delivery("m", 1), dead, delivery("m", 2), drained()]);
    assert_eq!(verdict.duplicate_after_ack.len(), 1);
}

#[test]
fn delivered_after_an_ack_without_ok_is_a_redelivery() {
    let [a, b] = stored("m");
    let failed = settled("m", How::Ack, false);
    let events = [
        a,
        b,
        delivery("m", 1),
        failed,
        delivery("m", 2),
        acked("m"),
        drained(),
    ];
    let verdict = verdict(events);
    assert!(verdict.is_clean(), "{verdict}");
    assert_eq!((verdict.redelivered, verdict.resent), (1, 0));
}

#[test]
fn a_further_attempt_explains_one_delivery_after_an_ack_and_no_more() {
    let [a, b] = stored("m");
    let [c, d] = stored("m");
    let mut events = vec![
        a,
        b,
        delivery("m", 1),
        acked("m"),
        c,
        d,
        delivery("m", 1),
        acked("m"),
    ];
    events.push(drained());
    let once = verdict(events.clone());
    assert!(once.is_clean(), "{once}");
    assert_eq!(once.resent, 1);
    events.insert(8, delivery("m", 2));
    assert_eq!(verdict(events).duplicate_after_ack.len(), 1);
}

#[test]
fn a_refused_attempt_explains_nothing() {
    let [a, b] = stored("m");
    let refused = [attempt("m"), answer("m", Answer::NotStored)];
    let [c, d] = refused;
    let events = [
        a,
        b,
        delivery("m", 1),
        acked("m"),
        c,
        d,
        delivery("m", 2),
        drained(),
    ];
    assert_eq!(verdict(events).duplicate_after_ack.len(), 1);
}

#[test]
fn an_outage_within_an_attempt_explains_one_copy_more() {
    let [a, b] = stored("m");
    let first = [delivery("m", 1), acked("m")];
    let again = [delivery("m", 1), acked("m")];
    let within = [a.clone(), Event::Down, Event::Up, b.clone()];
    let explained = [&within[..], &first, &again, &[drained()]].concat();
    let said = verdict(explained);
    assert!(said.is_clean(), "{said}");
    assert_eq!(said.resent, 1);
    // A third is one too many.
    let third = [&within[..], &first, &again, &again, &[drained()]].concat();
    assert_eq!(verdict(third).duplicate_after_ack.len(), 1);
    // It began in the middle of one, and has no answer yet.
    let begun = [Event::Down, a.clone(), Event::Up];
    let explained = [&begun[..], &first, &again, &[b.clone(), drained()]].concat();
    assert!(verdict(explained).is_clean());
    // Outages before and after it explain nothing.
    let beside = [Event::Down, Event::Up, a, b, Event::Down];
    let unexplained = [&beside[..], &first, &again, &[Event::Up, drained()]].concat();
    assert_eq!(verdict(unexplained).duplicate_after_ack.len(), 1);
}

#[test]
fn an_outage_does_not_explain_what_was_refused() {
    let [refused, no] = [attempt("m"), answer("m", Answer::NotStored)];
    let events = [
        refused,
        Event::Down,
        Event::Up,
        no,
        delivery("m", 1),
        drained(),
    ];
    assert_eq!(verdict(events).phantom.len(), 1);
}

#[test]
fn delivered_after_unknown_is_recovered_and_after_nothing_too() {
    let unknown = answer("m", Answer::Unknown);
    let events = [
        attempt("m"),
        unknown,
        delivery("m", 1),
        acked("m"),
        attempt("n"),
    ];
    let verdict = verdict(
        events
            .into_iter()
            .chain([delivery("n", 1), acked("n"), drained()]),
    );
    assert!(verdict.is_clean(), "{verdict}");
    assert_eq!((verdict.recovered, verdict.confirmed), (2, 0));
}

#[test]
fn unknown_and_never_delivered_is_not_lost() {
    assert!(verdict([attempt("m"), answer("m", Answer::Unknown), drained()]).is_clean());
}

#[test]
fn a_history_without_a_drain_at_its_end_shows_nothing() {
    let [a, b] = stored("m");
    let no_drain = verdict([a.clone(), b.clone(), delivery("m", 1), acked("m")]);
    assert!(!no_drain.is_clean());
    let early = verdict([drained(), a, b, delivery("m", 1), acked("m")]);
    assert!(!early.is_clean(), "drained before the last attempt");
}

#[test]
fn below_its_minimum_a_run_is_no_pass() {
    let [a, b] = stored("m");
    let fault = Event::Fault {
        what: "kill".into(),
    };
    let entries = history([a, b, fault, delivery("m", 1), acked("m"), drained()]);
    let needs = |confirmed, faults| judge(&entries, Minimum { confirmed, faults }).is_clean();
    assert!(needs(1, 1));
    assert!(!needs(2, 1));
    assert!(!needs(1, 2));
}

#[test]
fn lines_of_several_processes_are_put_in_order() {
    let [a, b] = stored("m");
    let mut entries = history([a, b, delivery("m", 1), acked("m"), drained()]);
    entries.reverse();
    assert!(judge(&entries, Minimum::default()).is_clean());
}

#[test]
fn a_history_can_be_kept_and_checked_again() {
    let directory = tempfile::tempdir().unwrap();
    let path: PathBuf = directory.path().join("history.jsonl");
    let history = wilco_conformance::ledger::History::new(7);
    for event in [attempt("m"), answer("m", Answer::Stored), drained()] {
        history.note(event);
    }
    history.save(&path).unwrap();
    let read = load(&path).unwrap();
    assert_eq!(read, history.entries());
    assert_eq!(judge(&read, Minimum::default()).lost.len(), 1);
    std::fs::write(&path, "{\"ns\":1}\n").unwrap();
    assert!(load(&path).unwrap_err().to_string().contains("line 1"));
}

/// What a flawless broker could do with one message: each attempt is answered, and each that was
/// stored is one copy, unless the broker recognised it; a copy comes until it is acked.
#[derive(Clone, Debug)]
struct Copy {
    refused_before: u8,
    answer: Answer,
    redeliveries: u8,
}

fn copies() -> impl Strategy<Value = Vec<Vec<Copy>>> {
    let answer = prop_oneof![Just(Answer::Stored), Just(Answer::Unknown)];
    let copy = (0..3u8, answer, 0..4u8).prop_map(|(refused_before, answer, redeliveries)| Copy {
        refused_before,
        answer,
        redeliveries,
    });
    prop::collection::vec(prop::collection::vec(copy, 1..4), 1..20)
}

/// The history of these messages on a flawless broker, message after message.
fn flawless(messages: &[Vec<Copy>]) -> Vec<Event> {
    let mut events = Vec::new();
    for (n, copies) in messages.iter().enumerate() {
        let id = format!("m{n}");
        for copy in copies {
            for _ in 0..copy.refused_before {
                events.extend([attempt(&id), answer(&id, Answer::NotStored)]);
            }
            events.extend([attempt(&id), answer(&id, copy.answer)]);
            for redelivery in 0..copy.redeliveries {
                events.push(delivery(&id, u32::from(redelivery) + 1));
                events.push(settled(&id, How::Retry, true));
            }
            events.extend([delivery(&id, u32::from(copy.redeliveries) + 1), acked(&id)]);
        }
    }
    events.push(drained());
    events
}

proptest! {
    #[test]
    fn whatever_a_flawless_broker_does_is_clean(messages in copies()) {
        let verdict = verdict(flawless(&messages));
        prop_assert!(verdict.is_clean(), "{}", verdict);
    }

    #[test]
    fn one_message_taken_out_of_it_is_lost(messages in copies(), which in any::<prop::sample::Index>()) {
        let lost = format!("m{}", which.index(messages.len()));
        let confirmed = messages[which.index(messages.len())]
            .iter()
            .any(|copy| copy.answer == Answer::Stored);
        let events = flawless(&messages).into_iter().filter(|event| match event {
            Event::Delivery { id, .. } | Event::Settled { id, .. } => *id != lost,
            _ => true,
        });
        let verdict = verdict(events);
        prop_assert_eq!(verdict.lost.len(), usize::from(confirmed), "{}", verdict);
    }

    #[test]
    fn one_delivery_more_at_its_end_is_a_duplicate(
        messages in copies(),
        which in any::<prop::sample::Index>(),
    ) {
        let id = format!("m{}", which.index(messages.len()));
        let mut events = flawless(&messages);
        events.insert(events.len() - 1, delivery(&id, 9));
        prop_assert_eq!(verdict(events).duplicate_after_ack.len(), 1);
    }

    #[test]
    fn one_stranger_in_it_is_a_phantom(messages in copies(), at in any::<prop::sample::Index>()) {
        let mut events = flawless(&messages);
        events.insert(at.index(events.len()), delivery("stranger", 1));
        prop_assert_eq!(verdict(events).phantom.len(), 1);
    }
}
