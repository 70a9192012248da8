//! What a history says.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
};

use serde::Serialize;

use super::{Answer, Entry, Event, How};

/// A run with less than this shows nothing and is not a pass.
#[derive(Clone, Copy, Debug, Default)]
pub struct Minimum {
    /// Confirmed publishes.
    pub confirmed: u64,
    /// Faults.
    pub faults: u64,
}

/// What a history says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Publishes tried.
    pub attempts: u64,
    /// Messages that had an Ok.
    pub confirmed: u64,
    /// Deliveries.
    pub deliveries: u64,
    /// Acks that were Ok.
    pub acked: u64,
    /// Deliveries of a message that had been delivered, before its ack was Ok.
    pub redelivered: u64,
    /// Deliveries after an Ok ack that a further attempt of the same id explains, or an outage during
    /// one: a broker may not know ids, or forget them once they are acked.
    pub resent: u64,
    /// Messages delivered though no attempt of them had been answered with Ok.
    pub recovered: u64,
    /// Faults.
    pub faults: u64,
    /// Confirmed, never delivered.
    pub lost: Vec<String>,
    /// Delivered, never attempted or surely not stored.
    pub phantom: Vec<String>,
    /// Delivered again after an ack, or a dead-lettering, that was Ok.
    pub duplicate_after_ack: Vec<String>,
    /// What makes the history worth nothing: too little in it, or no drain at its end.
    pub too_little: Vec<String>,
}

impl Verdict {
    /// Whether nothing is wrong and enough was tried.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.lost.is_empty()
            && self.phantom.is_empty()
            && self.duplicate_after_ack.is_empty()
            && self.too_little.is_empty()
    }
}

/// One message in one queue, as the history goes on.
#[derive(Default)]
struct Life {
    attempts: u64,
    stored: u64,
    not_stored: u64,
    deliveries: u64,
    ended: u64,
    found: bool,
    /// The outages that had begun and ended before each attempt that has no answer yet.
    open: VecDeque<u64>,
    /// Outages that fell into answered attempts: each may have made the backend send once more.
    spanned: u64,
}

impl Life {
    /// How many copies there may have been: one for every attempt that may have been stored, and one
    /// for every outage that an attempt went through.
    fn copies(&self, outages: u64) -> u64 {
        let open: u64 = self.open.iter().map(|before| outages - before).sum();
        match self.attempts.saturating_sub(self.not_stored) {
            0 => 0,
            sent => sent + self.spanned + open,
        }
    }
}

/// Reads a history in the order of its times and says what it shows.
#[must_use]
pub fn judge(entries: &[Entry], minimum: Minimum) -> Verdict {
    let mut entries: Vec<&Entry> = entries.iter().collect();
    entries.sort_by_key(|entry| entry.ns);
    let mut lives: BTreeMap<(&str, &str), Life> = BTreeMap::new();
    let mut drained: BTreeSet<&str> = BTreeSet::new();
    let mut verdict = Verdict::default();
    let (mut outages, mut down) = (0, false);
    let named = |queue: &str, id: &str| format!("{id} in {queue}");
    for entry in entries {
        match &entry.event {
            Event::Attempt { queue, id } => {
                verdict.attempts += 1;
                let life = lives.entry((queue, id)).or_default();
                life.attempts += 1;
                life.open.push_back(outages - u64::from(down));
                // What is sent after a drain has to be drained again.
                drained.remove(queue.as_str());
            }
            Event::Answer { queue, id, answer } => {
                let life = lives.entry((queue, id)).or_default();
                if let Some(before) = life.open.pop_front() {
                    life.spanned += outages - before;
                }
                match answer {
                    Answer::Stored => life.stored += 1,
                    Answer::NotStored => life.not_stored += 1,
                    Answer::Unknown => {}
                }
            }
            Event::Delivery { queue, id, .. } => {
                verdict.deliveries += 1;
                let life = lives.entry((queue, id)).or_default();
                life.deliveries += 1;
                // A copy that was acked or is a dead letter is used up.
                let copies = life.copies(outages);
                if copies == 0 {
                    verdict.phantom.push(named(queue, id));
                } else if life.ended >= copies {
                    verdict.duplicate_after_ack.push(named(queue, id));
                } else if life.ended > 0 {
                    verdict.resent += 1;
                } else if life.deliveries > 1 {
                    verdict.redelivered += 1;
                }
            }
            Event::Settled { queue, id, how, ok } => {
                verdict.acked += u64::from(*ok && *how == How::Ack);
                if *ok && matches!(how, How::Ack | How::DeadLetter) {
                    lives.entry((queue, id)).or_default().ended += 1;
                }
            }
            Event::Found { queue, id } => lives.entry((queue, id)).or_default().found = true,
            Event::Fault { .. } => verdict.faults += 1,
            Event::Down => {
                outages += u64::from(!down);
                down = true;
            }
            Event::Up => down = false,
            Event::Drained { queue } => {
                drained.insert(queue);
            }
        }
    }
    for ((queue, id), life) in &lives {
        let came = life.deliveries > 0 || life.found;
        if life.stored > 0 {
            verdict.confirmed += 1;
            if !came {
                verdict.lost.push(named(queue, id));
            }
        } else if came && life.attempts > life.not_stored {
            verdict.recovered += 1;
        }
        // An answer that came after the delivery can say that the message was never stored.
        if life.found && life.deliveries == 0 && life.attempts <= life.not_stored {
            verdict.phantom.push(named(queue, id));
        }
        if life.deliveries > 0 && life.attempts > 0 && life.attempts == life.not_stored {
            let name = named(queue, id);
            if !verdict.phantom.contains(&name) {
                verdict.phantom.push(name);
            }
        }
    }
    let queues: BTreeSet<_> = lives.keys().map(|(queue, _)| *queue).collect();
    for queue in queues.difference(&drained) {
        verdict
            .too_little
            .push(format!("{queue} was not drained at the end"));
    }
    if verdict.confirmed < minimum.confirmed {
        let text = format!(
            "{} confirmed, {} needed",
            verdict.confirmed, minimum.confirmed
        );
        verdict.too_little.push(text);
    }
    if verdict.faults < minimum.faults {
        let text = format!("{} faults, {} needed", verdict.faults, minimum.faults);
        verdict.too_little.push(text);
    }
    verdict
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} attempts, {} confirmed, {} deliveries, {} acked, {} faults",
            self.attempts, self.confirmed, self.deliveries, self.acked, self.faults
        )?;
        write!(
            f,
            "lost {}, phantom {}, duplicate after ack {}; redelivered {}, resent {}, recovered {}",
            self.lost.len(),
            self.phantom.len(),
            self.duplicate_after_ack.len(),
            self.redelivered,
            self.resent,
            self.recovered
        )?;
        let faults = [
            ("lost", &self.lost),
            ("phantom", &self.phantom),
            ("duplicate after ack", &self.duplicate_after_ack),
            ("too little", &self.too_little),
        ];
        for (what, which) in faults {
            for one in which.iter().take(10) {
                write!(f, "\n{what}: {one}")?;
            }
            if which.len() > 10 {
                write!(f, "\n{what}: and {} more", which.len() - 10)?;
            }
        }
        Ok(())
    }
}
