//! What the server does not keep of a queue's deliveries: who consumes, what waits for its delay, and how
//! often each was handed out. The server's own count is of what it sent, and much of that waits in a
//! consumer's buffer and goes back uncounted (laws C9, F8).
//!
//! The notes are one small message in the queue's own stream, written by the attached consumer alone,
//! alternately to two subjects so that one whole copy is always there, whatever the queue's limit. The
//! copy of the highest term and version counts: a consumer that was taken over writes under an older
//! term, and is not believed. Nor is one of a queue of the same name that was deleted: written late, it comes
//! to the next one, whose sequence numbers begin anew.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    api::{Refusal, Stored, json_of},
    connection::{Link, Unanswered},
    names::Names,
    no_queue,
    settled::Runs,
};
use crate::{
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Notes {
    /// Which making of the queue they are of.
    #[serde(default)]
    made: String,
    /// Counts the attachments; the version counts the copies in one.
    pub(super) term: u64,
    pub(super) version: u64,
    /// The token of the attached consumer; `None` if the last one left in order.
    pub(super) holder: Option<String>,
    /// The server's consumer through which messages are delivered.
    pub(super) consumer: Option<String>,
    /// For each consumer that died: the last message that the server had sent it. Every one up to there
    /// counts as handed out once more than was noted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) floors: Vec<u64>,
    /// By stream sequence.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) marks: BTreeMap<u64, Mark>,
    /// What was settled a while ago, by sequence, both ends of each run: a server that does not sync
    /// forgets settlements that it confirmed when it is killed, and delivers these again (law C2).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) settled: Runs,
    /// Where this copy is, and its sequence there; 0: nowhere yet.
    #[serde(skip)]
    slot: usize,
    #[serde(skip)]
    sequence: u64,
    /// The copy before, that is to go.
    #[serde(skip)]
    old: u64,
}

/// What is to be known of one message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mark {
    /// How often it was handed out, the floors apart: less than none where a floor counts too much.
    #[serde(default)]
    pub(super) seen: i64,
    /// Not before this moment, in milliseconds since 1970.
    #[serde(default)]
    pub(super) due: u64,
}

impl Notes {
    /// The newest copy of this making of the queue, or empty notes.
    pub(super) async fn read(
        link: &Link,
        names: &Names,
        made: &str,
        deadline: Deadline,
    ) -> Result<Self> {
        let slots = [names.slot(0), names.slot(1)];
        let (a, b) = tokio::join!(
            link.last(names, &slots[0], deadline),
            link.last(names, &slots[1], deadline)
        );
        let mut newest = Self {
            made: made.to_owned(),
            ..Self::default()
        };
        for (slot, stored) in [a?, b?].into_iter().enumerate() {
            let copy = stored.and_then(|stored| Some((Self::of(&stored)?, stored.sequence)));
            if let Some((copy, sequence)) = copy
                && copy.made == made
                && copy.age() > newest.age()
            {
                newest = Self {
                    slot,
                    sequence,
                    ..copy
                };
            }
        }
        Ok(newest)
    }

    fn of(stored: &Stored) -> Option<Self> {
        serde_json::from_slice(&stored.body).ok()
    }

    fn age(&self) -> (u64, u64) {
        (self.term, self.version)
    }

    /// How many floors count a message.
    pub(super) fn floors_over(floors: &[u64], sequence: u64) -> i64 {
        let over = floors.iter().filter(|floor| **floor >= sequence).count();
        i64::try_from(over).unwrap_or(i64::MAX)
    }

    /// How many messages wait for their delay.
    pub(super) fn delayed(&self) -> u64 {
        let now = now_ms();
        self.marks.values().filter(|mark| mark.due > now).count() as u64
    }

    /// Stores these as the next copy.
    pub(super) async fn write(
        &mut self,
        link: &Link,
        names: &Names,
        deadline: Deadline,
    ) -> Result<()> {
        self.version += 1;
        let body = serde_json::to_vec(self).map_err(|error| {
            Error::new(
                ErrorKind::Internal,
                format!("notes have no JSON form: {error}"),
            )
        })?;
        let body = Bytes::from(body);
        let to = (self.slot + 1) % 2;
        let sequence = loop {
            let answer = link
                .call(&names.slot(to), None, &body, true, deadline)
                .await
                .map_err(Unanswered::into_error)?;
            if answer.nobody() {
                return Err(no_queue());
            }
            let value: Value = json_of(&answer)?;
            match Refusal::of(&value) {
                None => break value["seq"].as_u64().unwrap_or(0),
                // An older copy is in the way, which a limit of one message makes a full place.
                Some(refusal) if refusal.code == 10_077 => {
                    let there = link.last(names, &names.slot(to), deadline).await?;
                    match there.map(|there| (Self::of(&there), there.sequence)) {
                        Some((Some(copy), _))
                            if copy.made == self.made && copy.age() > self.age() =>
                        {
                            return Err(taken_over());
                        }
                        Some((_, sequence)) => {
                            link.forget(names, sequence, deadline).await?;
                        }
                        None => {}
                    }
                }
                Some(refusal) => return Err(refusal.into_error()),
            }
        };
        let before = std::mem::replace(&mut self.sequence, sequence);
        // Where numbers began anew it is the next queue of this name, or the server forgot some: there the
        // place of the copy before is another's.
        self.old = if before < sequence { before } else { 0 };
        self.slot = to;
        Ok(())
    }

    /// Where the last copy was written.
    pub(super) fn place(&self) -> u64 {
        self.sequence
    }

    /// Where the copy before that one is, which is to be taken away.
    pub(super) fn take_old(&mut self) -> Option<u64> {
        Some(std::mem::take(&mut self.old)).filter(|old| *old > 0)
    }
}

pub(super) fn taken_over() -> Error {
    Error::new(ErrorKind::LeaseLost, "another consumer took over")
}

pub(super) fn now_ms() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
