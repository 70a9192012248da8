//! What was settled a while ago: a server that does not sync forgets settlements that it confirmed when it is
//! killed, and delivers these again (law C2).

use std::collections::{BTreeMap, BTreeSet};

/// How many runs of settled messages are kept: where messages are settled in order they are few, and a
/// server that does not sync by itself does so within minutes.
const MAX_RUNS: usize = 1_024;

/// How many places of our own notes are kept. There is one for each batch of settlements.
const MAX_PLACES: usize = 64 * 1_024;

/// By sequence, both ends of each run.
pub(super) type Runs = BTreeMap<u64, u64>;

/// The runs, and the places of our own notes that belong to none yet. In a queue that is behind, the notes
/// are stored far behind what is settled now; as runs of their own they would drive that out.
#[derive(Debug, Default)]
pub(super) struct Settled {
    runs: Runs,
    places: BTreeSet<u64>,
}

impl Settled {
    /// What the last consumer noted, and where this one's first note stands.
    pub(super) fn new(runs: Runs, place: u64) -> Self {
        let mut settled = Self {
            runs,
            places: BTreeSet::new(),
        };
        settled.wrote(place);
        settled
    }

    pub(super) fn runs(&self) -> &Runs {
        &self.runs
    }

    pub(super) fn contains(&self, sequence: u64) -> bool {
        let run = self.runs.range(..=sequence).next_back();
        run.is_some_and(|(_, last)| *last >= sequence)
    }

    /// A message is settled, and the notes that stand behind its run join it.
    pub(super) fn add(&mut self, sequence: u64) {
        let mut next = sequence;
        loop {
            let last = join(&mut self.runs, next);
            next = last + 1;
            if !self.places.remove(&next) {
                break;
            }
        }
        if self.runs.len() > MAX_RUNS {
            self.runs.pop_first();
        }
    }

    /// Our own notes were stored at this place: no message is there.
    pub(super) fn wrote(&mut self, place: u64) {
        if self.contains(place.saturating_sub(1)) {
            return self.add(place);
        }
        self.places.insert(place);
        if self.places.len() > MAX_PLACES {
            self.places.pop_first();
        }
    }
}

/// Joins a sequence to the runs, and says where its run ends.
fn join(runs: &mut Runs, sequence: u64) -> u64 {
    let before = runs.range(..=sequence).next_back();
    let (first, mut last) = match before.map(|(first, last)| (*first, *last)) {
        Some((_, last)) if last >= sequence => return last,
        Some((first, last)) if last + 1 == sequence => (first, sequence),
        _ => (sequence, sequence),
    };
    if let Some(end) = runs.remove(&(sequence + 1)) {
        last = end;
    }
    runs.insert(first, last);
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settled_messages_are_kept_in_runs() {
        let mut settled = Settled::default();
        for sequence in [5, 1, 2, 7, 6, 2, 9] {
            settled.add(sequence);
        }
        assert_eq!(settled.runs, Runs::from([(1, 2), (5, 7), (9, 9)]));
        let known: Vec<_> = (0..11).filter(|n| settled.contains(*n)).collect();
        assert_eq!(known, [1, 2, 5, 6, 7, 9]);
        for sequence in 100..100 + 2 * MAX_RUNS as u64 {
            settled.add(sequence * 2);
        }
        assert_eq!(settled.runs.len(), MAX_RUNS);
    }

    #[test]
    fn notes_between_messages_part_no_run() {
        let mut settled = Settled::new(Runs::new(), 1);
        for (message, place) in [(2, 3), (4, 5), (7, 6), (8, 9)] {
            settled.add(message);
            settled.wrote(place);
        }
        assert_eq!(settled.runs, Runs::from([(2, 9)]));
        assert_eq!(settled.places, BTreeSet::from([1]));
    }

    /// A queue that is far behind: a note for each message, and all of them behind the last one.
    #[test]
    fn c2_notes_of_a_queue_that_is_behind_drive_nothing_out() {
        const BEHIND: u64 = 20_000;
        let mut settled = Settled::default();
        for message in 1..=BEHIND {
            settled.add(message);
            settled.wrote(BEHIND + 2 * message);
            assert!(settled.contains(message));
        }
        assert!((1..=BEHIND).all(|message| settled.contains(message)));
        for message in 0..BEHIND {
            settled.add(BEHIND + 1 + 2 * message);
        }
        assert_eq!(settled.runs, Runs::from([(1, 3 * BEHIND)]));
    }
}
