//! What came of a run: for a reader on a terminal, and as JSON for programs.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::Serialize;

use crate::{
    check::{CheckError, Evidence, Failure, Outcome},
    registry, saboteurs,
};

/// One check on one backend, as it is reported.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// The check.
    pub check: &'static str,
    /// Its law.
    pub law: &'static str,
    /// The backend.
    pub backend: &'static str,
    /// The seed.
    pub seed: u64,
    /// How long it took, in milliseconds.
    pub ms: u64,
    /// What came of it.
    #[serde(flatten)]
    pub result: LineResult,
}

/// What came of a check.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum LineResult {
    /// The law held, as far as this shows.
    Passed {
        /// What there is to show for it.
        evidence: Evidence,
    },
    /// The law is broken.
    Failed {
        /// How.
        failure: Box<Failure>,
    },
    /// It could not be tried. That is not a pass (law X2).
    NotRun {
        /// Why.
        reason: String,
    },
}

impl From<Outcome> for Line {
    fn from(outcome: Outcome) -> Self {
        let result = match outcome.result {
            Ok(evidence) => LineResult::Passed { evidence },
            Err(CheckError::Failed(failure)) => LineResult::Failed { failure },
            Err(CheckError::Unavailable(reason)) => LineResult::NotRun { reason: reason.0 },
        };
        Self {
            check: outcome.check,
            law: outcome.law,
            backend: outcome.backend,
            seed: outcome.seed,
            ms: u64::try_from(outcome.elapsed.as_millis()).unwrap_or(u64::MAX),
            result,
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = format!("{:.1?}", Duration::from_millis(self.ms));
        match &self.result {
            LineResult::Passed { evidence } => {
                write!(
                    f,
                    "ok      {:<9} {} ({evidence}; {time})",
                    self.backend, self.check
                )
            }
            LineResult::NotRun { reason } => {
                write!(f, "not run {:<9} {}: {reason}", self.backend, self.check)
            }
            LineResult::Failed { failure } => {
                write!(
                    f,
                    "FAILED  {:<9} {} ({time})\n{failure}",
                    self.backend, self.check
                )
            }
        }
    }
}

/// A whole run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Every check that was asked for, in turn.
    pub lines: Vec<Line>,
    /// Which saboteur each law has; none is told as such (law X1).
    pub saboteurs: BTreeMap<String, Vec<&'static str>>,
}

impl Report {
    /// A report with nothing run yet.
    #[must_use]
    pub fn new() -> Self {
        let mut by_law: BTreeMap<String, Vec<&'static str>> = registry::laws()
            .into_iter()
            .map(|law| (law, Vec::new()))
            .collect();
        for saboteur in saboteurs::all() {
            if let Some(check) = registry::find(saboteur.caught_by) {
                by_law
                    .entry(check.law.into())
                    .or_default()
                    .push(saboteur.name);
            }
        }
        Self {
            lines: Vec::new(),
            saboteurs: by_law,
        }
    }

    /// How many passed, failed, and did not run.
    #[must_use]
    pub fn counts(&self) -> [usize; 3] {
        let count =
            |is: fn(&LineResult) -> bool| self.lines.iter().filter(|line| is(&line.result)).count();
        [
            count(|result| matches!(result, LineResult::Passed { .. })),
            count(|result| matches!(result, LineResult::Failed { .. })),
            count(|result| matches!(result, LineResult::NotRun { .. })),
        ]
    }

    /// Whether something ran and nothing failed.
    #[must_use]
    pub fn passed(&self) -> bool {
        let [passed, failed, _] = self.counts();
        passed > 0 && failed == 0
    }
}

/// The matrix of laws and backends, then why what did not run did not, and the sums.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut backends: Vec<&str> = Vec::new();
        let mut laws: Vec<&str> = Vec::new();
        for line in &self.lines {
            if !backends.contains(&line.backend) {
                backends.push(line.backend);
            }
            if !laws.contains(&line.law) {
                laws.push(line.law);
            }
        }
        write!(f, "{:<5}", "law")?;
        for backend in &backends {
            write!(f, "{backend:<14}")?;
        }
        writeln!(f)?;
        for law in &laws {
            write!(f, "{law:<5}")?;
            for backend in &backends {
                write!(f, "{:<14}", self.cell(law, backend))?;
            }
            writeln!(f)?;
        }
        let mut reasons: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
        for line in &self.lines {
            if let LineResult::NotRun { reason } = &line.result {
                reasons
                    .entry((line.backend, reason))
                    .or_default()
                    .push(line.check);
            }
        }
        for ((backend, reason), checks) in reasons {
            writeln!(f, "not run on {backend}: {reason}: {}", checks.join(", "))?;
        }
        let bare: Vec<_> = self
            .saboteurs
            .iter()
            .filter(|(_, names)| names.is_empty())
            .collect();
        if !bare.is_empty() {
            let bare: Vec<_> = bare.into_iter().map(|(law, _)| law.as_str()).collect();
            writeln!(f, "no saboteur yet: {}", bare.join(", "))?;
        }
        let [passed, failed, not_run] = self.counts();
        write!(
            f,
            "{} ran: {passed} passed, {failed} failed; {not_run} did not run",
            passed + failed
        )
    }
}

impl Report {
    fn cell(&self, law: &str, backend: &str) -> String {
        let lines = self
            .lines
            .iter()
            .filter(|line| line.law == law && line.backend == backend);
        let (mut passed, mut failed, mut not_run) = (0, 0, 0);
        for line in lines {
            match line.result {
                LineResult::Passed { .. } => passed += 1,
                LineResult::Failed { .. } => failed += 1,
                LineResult::NotRun { .. } => not_run += 1,
            }
        }
        let all = passed + failed + not_run;
        match (passed, failed, not_run) {
            (0, 0, 0) => "-".into(),
            (_, 1.., _) => format!("FAILED {failed}/{all}"),
            (0, ..) => "not run".into(),
            (_, _, 0) => format!("ok {passed}"),
            _ => format!("ok {passed}/{all}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(result: LineResult) -> Line {
        Line {
            check: "q1_x",
            law: "Q1",
            backend: "b",
            seed: 1,
            ms: 1,
            result,
        }
    }

    #[test]
    fn x2_what_did_not_run_is_no_pass() {
        let mut report = Report::new();
        assert!(!report.passed(), "nothing ran");
        report.lines.push(line(LineResult::NotRun {
            reason: "no disk".into(),
        }));
        assert!(!report.passed(), "nothing ran");
        assert!(
            report.to_string().contains("not run on b: no disk: q1_x"),
            "{report}"
        );
        report.lines.push(line(LineResult::Passed {
            evidence: Evidence::of("tries", 1),
        }));
        assert!(report.passed());
        assert!(report.to_string().contains("ok 1/2"), "{report}");
        report.lines.push(line(LineResult::Failed {
            failure: Box::default(),
        }));
        assert!(!report.passed());
        let text = report.to_string();
        assert!(
            text.contains("FAILED 1/3") && text.contains("2 ran: 1 passed, 1 failed"),
            "{text}"
        );
    }
}
