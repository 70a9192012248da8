//! What is counted, through the `metrics` facade: whoever embeds wilco picks the recorder.
//!
//! | name | kind | labels |
//! | --- | --- | --- |
//! | `wilco_guests` | gauge | `state`: provisionings under way, by their state |
//! | `wilco_stage_seconds` | histogram | `state`: how long each was in the state that it left |
//! | `wilco_outcomes_total` | counter | `outcome`, `reason` (empty for a success) |
//! | `wilco_revocations_total` | counter | `reason`: decisions to give a guest up |
//! | `wilco_prepares_sent_total` | counter | copies of prepare that may have been stored, re-sent ones too |
//! | `wilco_reports_total` | counter | `event`: what guests reported |
//! | `wilco_deliveries_total`, `wilco_redeliveries_total` | counter | at a guest: commands received, and those that had been delivered before |
//! | `wilco_duplicates_suppressed_total` | counter | at a guest: commands that it knew already, and did not run |
//! | `wilco_refused_total` | counter | at a guest: `kind`: what could not be run, and is kept among the dead letters |

#![cfg_attr(not(feature = "metrics"), allow(unused_variables))]

use super::{guest::book::Admission, record::Record};
use crate::wire::{RemoteError, ReportEvent};

/// Counts, if this build counts.
macro_rules! count {
    ($name:literal, $n:expr $(, $label:literal => $value:expr)*) => {
        #[cfg(feature = "metrics")]
        metrics::counter!($name $(, $label => $value)*).increment($n);
    };
}

/// A record is driven from now on.
pub(super) fn driven(record: &Record) {
    #[cfg(feature = "metrics")]
    guests(record).increment(1.0);
}

/// A record is driven no more: it ended, or the taskmanager closes.
pub(super) fn undriven(record: &Record) {
    #[cfg(feature = "metrics")]
    guests(record).decrement(1.0);
}

/// A driver's record changed, and is saved.
pub(super) fn learnt(before: &Record, now: &Record) {
    count!(
        "wilco_prepares_sent_total",
        u64::from(now.copies.saturating_sub(before.copies))
    );
    if before.revoking.is_none()
        && let Some(reason) = &now.revoking
    {
        count!("wilco_revocations_total", 1, "reason" => word(&reason.kind));
    }
    if before.state == now.state {
        return;
    }
    #[cfg(feature = "metrics")]
    {
        guests(before).decrement(1.0);
        guests(now).increment(1.0);
        let took = now.since_ms.saturating_sub(before.since_ms);
        metrics::histogram!("wilco_stage_seconds", "state" => word(&before.state))
            .record(std::time::Duration::from_millis(took));
    }
    if let Some(outcome) = &now.outcome
        && before.outcome.is_none()
    {
        let reason = outcome.reason();
        count!(
            "wilco_outcomes_total", 1,
            "outcome" => word(&outcome.state()),
            "reason" => reason.map(|reason| word(&reason.kind)).unwrap_or_default()
        );
    }
}

/// The taskmanager received a report.
pub(super) fn reported(event: &ReportEvent) {
    let event = match event {
        ReportEvent::Hello => "hello",
        ReportEvent::Accepted { .. } => "accepted",
        ReportEvent::Progress { .. } => "progress",
        ReportEvent::Done { .. } => "done",
        ReportEvent::Refused { .. } => "refused",
    };
    count!("wilco_reports_total", 1, "event" => event);
}

/// A guest received a message.
pub(super) fn delivered(attempt: u32) {
    count!("wilco_deliveries_total", 1);
    if attempt > 1 {
        count!("wilco_redeliveries_total", 1);
    }
}

/// A guest knows what is to be done with a command.
pub(super) fn admitted(admission: &Admission) {
    if matches!(admission, Admission::Known) {
        count!("wilco_duplicates_suppressed_total", 1);
    }
}

/// A guest refuses a message.
pub(super) fn refused(reason: &RemoteError) {
    count!("wilco_refused_total", 1, "kind" => reason.kind.clone());
}

#[cfg(feature = "metrics")]
fn guests(record: &Record) -> metrics::Gauge {
    metrics::gauge!("wilco_guests", "state" => word(&record.state))
}

/// The word that the JSON forms have for this.
#[cfg(feature = "metrics")]
fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}
