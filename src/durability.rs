//! What a broker's Ok is worth, told honestly (laws D1, D2, D4).

use std::fmt;

use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};

/// What survives, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Nothing outlives the broker's process.
    Memory,
    /// Survives the broker's process being killed.
    Process,
    /// Survives a power cut: synced to disk before the confirm.
    Power,
    /// Survives the loss of a node, held by this many of them.
    Replicated(u8),
}

/// What a confirmed message's fate is when one thing goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// No confirmed message is lost.
    Safe,
    /// Confirmed messages can be lost.
    Unsafe,
    /// It cannot be known from here; see the report's findings.
    Unknown,
}

/// One fact behind a verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The setting, as the broker names it.
    pub setting: String,
    /// Its value here; `None` if it cannot be read.
    pub value: Option<String>,
    /// What follows from it.
    pub meaning: String,
    /// What to change, if anything should be.
    pub advice: Option<String>,
}

/// What a broker's Ok is worth as the broker is configured now. Taken again after every reconnect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DurabilityReport {
    /// The backend.
    pub backend: &'static str,
    /// The broker's own version.
    pub version: String,
    /// The level that it really has.
    pub level: Level,
    /// When the broker's process is killed.
    pub process_crash: Verdict,
    /// When the power is cut.
    pub power_loss: Verdict,
    /// When the broker's machine is lost.
    pub node_loss: Verdict,
    /// The reasons.
    pub findings: Vec<Finding>,
}

impl DurabilityReport {
    /// A report without findings yet, its verdicts those that the level implies.
    #[must_use]
    pub fn new(backend: &'static str, version: impl Into<String>, level: Level) -> Self {
        let safe_from = |needed| {
            if level >= needed {
                Verdict::Safe
            } else {
                Verdict::Unsafe
            }
        };
        Self {
            backend,
            version: version.into(),
            level,
            process_crash: safe_from(Level::Process),
            power_loss: safe_from(Level::Power),
            node_loss: safe_from(Level::Replicated(2)),
            findings: Vec::new(),
        }
    }

    /// Holds the broker to a level (law D2).
    ///
    /// # Errors
    /// [`ErrorKind::NotDurable`] with the findings that say why, if a verdict that the level needs
    /// is not Safe: Unknown does not pass either.
    pub fn require(&self, needed: Level) -> Result<()> {
        let verdicts = [
            (Level::Process, self.process_crash, "a crash of the broker"),
            (Level::Power, self.power_loss, "a power cut"),
            (Level::Replicated(2), self.node_loss, "the loss of a node"),
        ];
        let open: Vec<_> = verdicts
            .iter()
            .filter(|(level, verdict, _)| *level <= needed && *verdict != Verdict::Safe)
            .map(|(_, verdict, event)| format!("{event} is {verdict}"))
            .collect();
        if open.is_empty() && self.level >= needed {
            return Ok(());
        }
        let advice: String = self
            .findings
            .iter()
            .filter_map(|finding| finding.advice.as_deref())
            .map(|advice| format!("; {advice}"))
            .collect();
        Err(Error::new(
            ErrorKind::NotDurable,
            format!(
                "this {} broker is {}, {needed} was required: {}{advice}",
                self.backend,
                self.level,
                open.join(", "),
            ),
        )
        .with_backend(self.backend))
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("memory"),
            Self::Process => f.write_str("process"),
            Self::Power => f.write_str("power"),
            Self::Replicated(nodes) => write!(f, "replicated({nodes})"),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Safe => "safe",
            Self::Unsafe => "unsafe",
            Self::Unknown => "unknown",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn d2_less_than_required_is_refused_and_unknown_is_less() {
        let mut report = DurabilityReport::new("test", "1", Level::Power);
        assert!(report.require(Level::Power).is_ok());
        assert!(report.require(Level::Replicated(2)).is_err());
        report.power_loss = Verdict::Unknown;
        assert!(report.require(Level::Process).is_ok());
        let error = report.require(Level::Power).unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::NotDurable);
        assert!(
            error.to_string().contains("a power cut is unknown"),
            "{error}"
        );
    }
}
