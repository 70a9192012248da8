//! How a taskmanager is, for the probe of the service that embeds it.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::{
    deadline::Deadline,
    error::ErrorKind,
    workflow::taskmanager::{Taskmanager, lock},
};

/// How a taskmanager is at a moment.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Health {
    /// It is the taskmanager of its records, and was not closed.
    pub in_charge: bool,
    /// Reports of guests are being received.
    pub collecting: bool,
    /// How long the broker took to answer, in milliseconds; `None` if it did not.
    pub broker_ms: Option<u64>,
    /// Why it did not.
    pub broker_error: Option<String>,
    /// How many records could be read; `None` if they could not.
    pub records: Option<usize>,
    /// Provisionings that are under way.
    pub under_way: usize,
    /// Those of them whose revocation cannot reach the broker.
    pub stuck: usize,
}

impl Health {
    /// Whether new provisionings would go on at once. One that is not ready loses nothing: what it
    /// accepts is recorded, and goes on when it is ready again.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.in_charge && self.collecting && self.broker_ms.is_some() && self.records.is_some()
    }
}

impl Taskmanager {
    /// How it is: asks the broker and the records, each for at most this long.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn health(&self, within: Duration) -> Health {
        let inner = &self.inner;
        let begin = Instant::now();
        let deadline = Deadline::after(within);
        let asked = async {
            let answer = inner.broker.status(&inner.reports, deadline).await;
            (answer, begin.elapsed())
        };
        let (broker, records) =
            tokio::join!(deadline.bound(asked), deadline.bound(inner.records.list()));
        let broker = match broker {
            // A queue that is not there yet was looked for.
            Ok((Err(error), took)) if *error.kind() == ErrorKind::NoQueue => Ok(took),
            Ok((Ok(_), took)) => Ok(took),
            Ok((Err(error), _)) | Err(error) => Err(error.to_string()),
        };
        let (under_way, stuck) = {
            let drivers = lock(&inner.drivers);
            let stuck = drivers
                .values()
                .filter(|driven| driven.progress.borrow().stuck);
            (drivers.len(), stuck.count())
        };
        Health {
            in_charge: inner.owner && !*inner.closed.borrow(),
            collecting: *inner.collecting.borrow(),
            broker_ms: broker
                .as_ref()
                .ok()
                .map(|took| u64::try_from(took.as_millis()).unwrap_or(u64::MAX)),
            broker_error: broker.err(),
            records: records
                .and_then(|records| records)
                .ok()
                .map(|records| records.len()),
            under_way,
            stuck,
        }
    }
}
