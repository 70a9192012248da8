//! Section L, the ledger: an append-only history of what was attempted, answered, delivered and
//! settled, and what it says in the end.
//!
//! A history is a file of JSON lines. Its times are nanoseconds on the machine's monotonic clock,
//! which all processes of one machine share, so the lines of several processes can be put in order.

mod judge;

use std::{
    fs::File,
    io::{self, BufRead, BufReader, BufWriter, Write},
    path::Path,
    sync::{Mutex, PoisonError},
};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use wilco::{QueueName, broker::Delivery};

pub use judge::{Minimum, Verdict, judge};

/// One line of a history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// When, in nanoseconds on the monotonic clock.
    pub ns: u64,
    /// The process that did it.
    pub process: u32,
    /// The seed of the one who did it.
    pub seed: u64,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

impl Entry {
    /// This event, now, by this process.
    #[must_use]
    pub fn now(seed: u64, event: Event) -> Self {
        Self {
            ns: now(),
            process: std::process::id(),
            seed,
            event,
        }
    }
}

/// Nanoseconds on the monotonic clock that all processes of this machine share.
#[must_use]
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    let part = |n: i64| u64::try_from(n).unwrap_or(0);
    part(time.tv_sec) * 1_000_000_000 + part(time.tv_nsec)
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A publish begins.
    Attempt {
        /// To this queue.
        queue: String,
        /// Of this message.
        id: String,
    },
    /// A publish ended. One without an answer counts as Unknown.
    Answer {
        /// To this queue.
        queue: String,
        /// Of this message.
        id: String,
        /// How it ended.
        answer: Answer,
    },
    /// A message came.
    Delivery {
        /// From this queue.
        queue: String,
        /// Which.
        id: String,
        /// Its count.
        attempt: u32,
    },
    /// A delivery was settled, or not.
    Settled {
        /// In this queue.
        queue: String,
        /// Which message.
        id: String,
        /// How.
        how: How,
        /// Whether that was Ok.
        ok: bool,
    },
    /// The message was found elsewhere at the end: among the dead letters, or told as discarded.
    Found {
        /// In this queue.
        queue: String,
        /// Which message.
        id: String,
    },
    /// Something was broken on purpose.
    Fault {
        /// What.
        what: String,
    },
    /// From here on the broker, or the way to it, does not do what it should. A publish that is open
    /// meanwhile may be sent more than once under its id, by the backend itself (law P3).
    Down,
    /// It works again.
    Up,
    /// Everything was received and acked: what has not come by now never will.
    Drained {
        /// From this queue.
        queue: String,
    },
}

impl Event {
    /// A delivery came from this queue.
    #[must_use]
    pub fn delivery(queue: &QueueName, delivery: &Delivery) -> Self {
        Self::Delivery {
            queue: queue.to_string(),
            id: delivery.message.id.to_string(),
            attempt: delivery.attempt,
        }
    }
}

/// How a publish ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Ok.
    Stored,
    /// An error that says it is not stored.
    NotStored,
    /// An error or a cut that says nothing.
    Unknown,
}

/// How a delivery was settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// Acked.
    Ack,
    /// To come again.
    Retry,
    /// To the dead letters.
    DeadLetter,
    /// Dropped unsettled.
    Dropped,
}

/// A moment of a history.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    ns: u64,
    /// How many entries there were.
    entries: usize,
}

/// A history that grows.
#[derive(Debug, Default)]
pub struct History {
    entries: Mutex<Vec<Entry>>,
    seed: u64,
}

impl History {
    /// An empty one; what is noted in it is noted with this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            entries: Mutex::default(),
            seed,
        }
    }

    /// Notes an event of this process, now.
    pub fn note(&self, event: Event) {
        self.append(Entry::now(self.seed, event));
    }

    /// Appends what another process noted.
    pub fn append(&self, entry: Entry) {
        self.entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(entry);
    }

    /// All entries, in the order of their times.
    #[must_use]
    pub fn entries(&self) -> Vec<Entry> {
        let mut entries = self
            .entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        entries.sort_by_key(|entry| entry.ns);
        entries
    }

    /// This moment, to count from.
    #[must_use]
    pub fn mark(&self) -> Mark {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        Mark {
            ns: now(),
            entries: entries.len(),
        }
    }

    /// How many entries since this moment are like this.
    #[must_use]
    pub fn count(&self, since: &Mark, is: impl Fn(&Entry) -> bool) -> usize {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        // What was there then is older; of what came since, some was on its way.
        let later = entries.iter().skip(since.entries);
        later
            .filter(|entry| entry.ns >= since.ns && is(entry))
            .count()
    }

    /// Writes it as JSON lines.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        for entry in self.entries() {
            serde_json::to_writer(&mut file, &entry)?;
            file.write_all(b"\n")?;
        }
        file.flush()
    }
}

/// Reads a history from JSON lines.
///
/// # Errors
/// The file cannot be read, or a line of it is no entry; the error says which.
pub fn load(path: &Path) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for (n, line) in BufReader::new(File::open(path)?).lines().enumerate() {
        let entry = serde_json::from_str(&line?).map_err(|error| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("line {}: {error}", n + 1),
            )
        })?;
        entries.push(entry);
    }
    Ok(entries)
}
