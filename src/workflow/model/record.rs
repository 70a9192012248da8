//! A record as the model holds it: the product's own, with time taken out.
//!
//! The state machine only ever compares times, so that which deadlines have passed is all that there is to
//! know of them. The model lets any of them pass at any moment.

use std::{
    fmt,
    hash::{Hash, Hasher},
    sync::Arc,
};

use crate::workflow::{
    machine::{self, Event, SUSPECT_AFTER},
    record::{Deadlines, Reason, ReasonKind, Record, SendPolicy, Sent, Stage, State},
};

/// Any moment; everything else is told from it.
const NOW_MS: u64 = 100_000_000;

/// Which of the deadlines that count from the beginning have passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Clock {
    Early,
    BootPassed,
    TotalPassed,
}

/// What counts from the last sign of life, or from when the state began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Lapse {
    /// Long enough to be suspect.
    Silence,
    /// The deadline of the stage.
    Stage,
}

/// A record without its times and texts.
#[derive(Clone)]
pub(super) struct Rec(Arc<Record>);

type ReasonKey = (ReasonKind, Option<Stage>);

impl Rec {
    pub(super) fn new(mut record: Record) -> Self {
        record.history.clear();
        Self(Arc::new(record))
    }

    pub(super) fn get(&self) -> &Record {
        &self.0
    }

    pub(super) fn state(&self) -> State {
        self.0.state
    }

    pub(super) fn is_terminal(&self) -> bool {
        self.0.state.is_terminal()
    }

    /// The stage whose deadline counts.
    pub(super) fn stage(&self) -> Option<Stage> {
        machine::stage_deadline(self.get()).map(|(stage, _)| stage)
    }

    /// What the product's state machine makes of an event, and whether that has to be saved.
    pub(super) fn apply(&self, event: Event, clock: Clock, lapse: Option<Lapse>) -> (Self, bool) {
        let deadlines = Deadlines::default();
        let ms = |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap();
        let mut record = Record::clone(&self.0);
        record.created_ms = NOW_MS
            - match clock {
                Clock::Early => 1_000,
                Clock::BootPassed => ms(deadlines.boot),
                Clock::TotalPassed => ms(deadlines.total),
            };
        let last = NOW_MS
            - match lapse {
                None => 0,
                Some(Lapse::Silence) => ms(SUSPECT_AFTER),
                Some(Lapse::Stage) => ms(deadlines.progress.max(deadlines.accept)),
            };
        record.since_ms = last;
        record.seen_ms = record.seen_ms.map(|_| last);
        let changed = machine::apply(&mut record, event, NOW_MS);
        record.history.clear();
        (Self(Arc::new(record)), changed)
    }

    #[allow(clippy::type_complexity, reason = "a key is what it is")]
    fn key(
        &self,
    ) -> (
        (State, SendPolicy, Sent, u32),
        (bool, bool, bool, bool),
        Option<ReasonKey>,
        Option<Option<ReasonKey>>,
    ) {
        let Record {
            state,
            policy,
            sent,
            copies,
            accepted,
            boot,
            trouble,
            seen_ms,
            revoking,
            outcome,
            ..
        } = self.get();
        let key = |reason: &Reason| (reason.kind, reason.stage);
        (
            (*state, *policy, *sent, *copies),
            (
                *accepted,
                boot.is_some(),
                trouble.is_some(),
                seen_ms.is_some(),
            ),
            revoking.as_ref().map(key),
            outcome.as_ref().map(|outcome| outcome.reason().map(key)),
        )
    }
}

impl PartialEq for Rec {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Rec {}

impl Hash for Rec {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let ((state, policy, sent, copies), flags, revoking, outcome) = self.key();
        (state, policy as u8, sent as u8, copies).hash(hasher);
        (flags, revoking, outcome).hash(hasher);
    }
}

impl fmt::Debug for Rec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let record = self.get();
        write!(f, "{}[{:?}", record.state, record.sent)?;
        write!(f, " copies={}", record.copies)?;
        if record.accepted {
            f.write_str(" accepted")?;
        }
        if record.boot.is_some() {
            f.write_str(" booted")?;
        }
        if let Some(reason) = &record.revoking {
            write!(f, " revoking={}{:?}", reason.kind, reason.stage)?;
        }
        if let Some(outcome) = &record.outcome {
            write!(f, " outcome={outcome}")?;
        }
        f.write_str("]")
    }
}
