//! What a history comes down to when it is drawn: how much of what happened in each slice of its time,
//! and when something was broken.
//!
//! A history can have millions of lines; a drawing has a hundred or so slices. A report keeps the
//! slices.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::ledger::{Answer, Entry, Event, How};

/// How many slices a history is cut into.
const SLICES: usize = 120;

/// The most faults that are told one by one.
const MOST_FAULTS: usize = 400;

/// A history, in slices of equal length.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Timeline {
    /// How long the history is, in milliseconds.
    pub ms: f64,
    /// Publishes that were answered with Ok, in each slice.
    pub confirmed: Vec<u64>,
    /// Publishes that were answered otherwise.
    pub unconfirmed: Vec<u64>,
    /// Deliveries of a message that had not been delivered before.
    pub delivered: Vec<u64>,
    /// Deliveries of one that had been.
    pub redelivered: Vec<u64>,
    /// Acks that were Ok.
    pub acked: Vec<u64>,
    /// Messages that came though no attempt of theirs had an Ok, when they first came.
    pub recovered: Vec<u64>,
    /// What was broken, in the order of time.
    pub faults: Vec<Fault>,
    /// From when to when the broker was not what it should be, in milliseconds.
    pub outages: Vec<(f64, f64)>,
    /// Further faults that are not told one by one.
    #[serde(default)]
    pub more_faults: usize,
}

/// Something that was broken on purpose.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Fault {
    /// When, in milliseconds from the beginning.
    pub at: f64,
    /// What.
    pub what: String,
    /// How long after it the next publish was confirmed; `None` if none was.
    pub next_confirm: Option<f64>,
    /// How long after it the next delivery came; `None` if none did.
    pub next_delivery: Option<f64>,
}

impl Timeline {
    /// Cuts a history; `None` if there is nothing in it.
    #[must_use]
    pub fn of(entries: &[Entry]) -> Option<Self> {
        let mut entries: Vec<&Entry> = entries.iter().collect();
        entries.sort_by_key(|entry| entry.ns);
        let (first, last) = (entries.first()?.ns, entries.last()?.ns);
        // One more, so that the last entry is inside the last slice.
        let length = (last - first + 1) as f64;
        let slice = |ns: u64| ((ns - first) as f64 / length * SLICES as f64) as usize;
        let ms = |ns: u64| (ns - first) as f64 / 1e6;
        let mut line = Self {
            ms: length / 1e6,
            ..Self::default()
        };
        let lanes = [
            &mut line.confirmed,
            &mut line.unconfirmed,
            &mut line.delivered,
            &mut line.redelivered,
            &mut line.acked,
            &mut line.recovered,
        ];
        for lane in lanes {
            *lane = vec![0; SLICES];
        }
        let mut came: BTreeSet<(&str, &str)> = BTreeSet::new();
        let mut down = None;
        let (mut confirms, mut deliveries) = (Vec::new(), Vec::new());
        for entry in &entries {
            let at = slice(entry.ns).min(SLICES - 1);
            match &entry.event {
                Event::Attempt { .. } => {}
                Event::Answer { answer, .. } if *answer == Answer::Stored => {
                    line.confirmed[at] += 1;
                    confirms.push(entry.ns);
                }
                Event::Answer { .. } => line.unconfirmed[at] += 1,
                Event::Delivery { queue, id, .. } => {
                    deliveries.push(entry.ns);
                    if came.insert((queue, id)) {
                        line.delivered[at] += 1;
                    } else {
                        line.redelivered[at] += 1;
                    }
                }
                Event::Settled { how, ok, .. } => {
                    line.acked[at] += u64::from(*ok && *how == How::Ack);
                }
                Event::Fault { what } => {
                    if line.faults.len() < MOST_FAULTS {
                        line.faults.push(Fault {
                            at: ms(entry.ns),
                            what: what.clone(),
                            ..Fault::default()
                        });
                    } else {
                        line.more_faults += 1;
                    }
                }
                other => match outage(other) {
                    Some(true) => down = down.or(Some(ms(entry.ns))),
                    Some(false) => line
                        .outages
                        .extend(down.take().map(|from| (from, ms(entry.ns)))),
                    None => {}
                },
            }
        }
        line.outages.extend(down.map(|from| (from, line.ms)));
        line.recover(&entries, |ns| slice(ns).min(SLICES - 1));
        let after = |at: f64, moments: &[u64]| {
            let next = moments.partition_point(|ns| ms(*ns) <= at);
            moments.get(next).map(|ns| ms(*ns) - at)
        };
        for fault in &mut line.faults {
            fault.next_confirm = after(fault.at, &confirms);
            fault.next_delivery = after(fault.at, &deliveries);
        }
        Some(line)
    }

    /// Finds what came though nobody had been told that it was stored.
    fn recover(&mut self, entries: &[&Entry], slice: impl Fn(u64) -> usize) {
        let mut told: BTreeSet<(&str, &str)> = BTreeSet::new();
        let mut first: BTreeMap<(&str, &str), u64> = BTreeMap::new();
        for entry in entries {
            match &entry.event {
                Event::Answer {
                    queue,
                    id,
                    answer: Answer::Stored,
                } => {
                    told.insert((queue, id));
                }
                Event::Delivery { queue, id, .. } | Event::Found { queue, id } => {
                    first.entry((queue, id)).or_insert(entry.ns);
                }
                _ => {}
            }
        }
        for (message, ns) in first {
            if !told.contains(&message) {
                self.recovered[slice(ns)] += 1;
            }
        }
    }

    /// How many faults there were.
    #[must_use]
    pub fn fault_count(&self) -> usize {
        self.faults.len() + self.more_faults
    }
}

/// Whether an event begins an outage, or ends one. Told by its tag: histories of runs without outages
/// have no such events.
fn outage(event: &Event) -> Option<bool> {
    let event = serde_json::to_value(event).ok()?;
    match event.get("event")?.as_str()? {
        "down" => Some(true),
        "up" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(ms: u64, event: Event) -> Entry {
        Entry {
            ns: 1_000 + ms * 1_000_000,
            process: 1,
            seed: 1,
            event,
        }
    }

    fn answer(id: &str, answer: Answer) -> Event {
        Event::Answer {
            queue: "q".into(),
            id: id.into(),
            answer,
        }
    }

    fn delivery(id: &str) -> Event {
        Event::Delivery {
            queue: "q".into(),
            id: id.into(),
            attempt: 1,
        }
    }

    #[test]
    fn nothing_is_lost_between_the_slices() {
        let history: Vec<_> = (0..1_000)
            .map(|n| entry(n, answer(&format!("m{n}"), Answer::Stored)))
            .chain([
                entry(100, answer("u", Answer::Unknown)),
                entry(
                    250,
                    Event::Fault {
                        what: "kill".into(),
                    },
                ),
                entry(400, delivery("u")),
                entry(999, delivery("m1")),
                entry(999, delivery("m1")),
            ])
            .collect();
        let line = Timeline::of(&history).unwrap();
        let sum = |lane: &[u64]| lane.iter().sum::<u64>();
        assert_eq!(sum(&line.confirmed), 1_000);
        assert_eq!(sum(&line.unconfirmed), 1);
        assert_eq!(sum(&line.delivered), 2);
        assert_eq!(sum(&line.redelivered), 1);
        assert_eq!(
            sum(&line.recovered),
            1,
            "u came, and nobody had been told Ok"
        );
        assert_eq!(line.confirmed.len(), SLICES);
        let fault = &line.faults[0];
        assert_eq!((fault.at, fault.next_confirm), (250.0, Some(1.0)));
        assert_eq!(fault.next_delivery, Some(150.0));
    }

    #[test]
    fn a_moment_is_a_history_too_and_none_is_none() {
        assert_eq!(Timeline::of(&[]), None);
        let line = Timeline::of(&[entry(0, delivery("a"))]).unwrap();
        assert_eq!(line.delivered[0], 1);
    }
}
