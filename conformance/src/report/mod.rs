//! What came of a run: for a reader on a terminal, as JSON and JUnit XML for programs, and as one page
//! to look at.
//!
//! - here: the report itself, a versioned JSON document;
//! - [`contract`]: the laws in a few words each;
//! - [`timeline`]: what a history comes down to when it is drawn;
//! - `terminal`, [`junit`], [`html`]: its forms.
//!
//! A document holds runs, one broker each. Documents of several runs are put together by
//! [`Report::join`], so that one page can show all brokers that were tried, wherever that was.

pub mod contract;
pub mod html;
pub mod junit;
mod terminal;
pub mod timeline;

use std::{collections::BTreeMap, path::Path, time::SystemTime};

use serde::{Deserialize, Serialize};
use wilco::Deadline;

use crate::{
    check::{CheckError, Evidence, Outcome},
    harness::{Harness, Use},
    registry,
    saboteurs::Saboteur,
    support::LONG,
};
use timeline::Timeline;

/// What says that a JSON file is a report of ours.
const FORMAT: &str = "wilco-conformance-report";

/// The version that is written and read. It goes up with every change that an older reader would
/// misunderstand; a field more is none.
const VERSION: u32 = 1;

/// Everything that was tried, on every broker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    format: String,
    version: u32,
    /// One broker each.
    pub runs: Vec<Run>,
    /// The saboteurs that were set on the suite (law X1).
    #[serde(default)]
    pub saboteurs: Vec<Sabotaged>,
}

/// One broker under test, and how and where it was tested.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Run {
    /// The harness's name, or a broker's URL without its secrets.
    pub backend: String,
    /// What the broker says of itself; without it, why it could not be asked.
    pub broker: Broker,
    /// When the run began, in UTC.
    pub started: String,
    /// How long it took, in milliseconds.
    pub ms: u64,
    /// Where random choices came from.
    pub seed: u64,
    /// The suite's version.
    pub suite: String,
    /// The operating system, the processor and how many of it.
    pub machine: String,
    /// Every check that was asked for, in turn.
    pub lines: Vec<Line>,
    /// Checks that were not asked for, if only some were.
    pub not_asked: Vec<String>,
}

/// What a broker says of itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Broker {
    /// Its name and version.
    pub version: String,
    /// How durable it reports to be (law D1).
    pub level: String,
    /// What a crash of its process does to what was confirmed, and a power cut, and the loss of a node.
    pub process_crash: String,
    /// See above.
    pub power_loss: String,
    /// See above.
    pub node_loss: String,
    /// The settings behind that: name, value, meaning, advice.
    pub findings: Vec<Finding>,
    /// Why it could not be asked.
    pub problem: Option<String>,
}

/// One setting of the broker and what follows from it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// Its name.
    pub setting: String,
    /// Its value; `None` if it could not be read.
    pub value: Option<String>,
    /// What follows.
    pub meaning: String,
    /// What to change.
    pub advice: Option<String>,
}

/// One check on one broker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// The check.
    pub check: String,
    /// Its law.
    pub law: String,
    /// What it shows, in one line.
    #[serde(default)]
    pub title: String,
    /// The seed.
    pub seed: u64,
    /// How long it took, in milliseconds.
    pub ms: u64,
    /// What came of it.
    #[serde(flatten)]
    pub result: LineResult,
    /// What happened in it, in time, where it kept a ledger.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeline: Option<Timeline>,
}

/// What came of a check.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum LineResult {
    /// The law held, as far as this shows.
    Passed {
        /// How often what was tried.
        evidence: BTreeMap<String, u64>,
    },
    /// The law is broken.
    Failed {
        /// What the law says.
        expected: String,
        /// What was there instead.
        seen: String,
        /// The command that makes the same choices again.
        again: String,
    },
    /// It could not be tried. That is not a pass (law X2).
    NotRun {
        /// Why.
        reason: String,
    },
}

/// One saboteur, set on the check that has to catch it (law X1).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sabotaged {
    /// What it does, as a name.
    pub saboteur: String,
    /// The broker that it broke.
    pub backend: String,
    /// The law that it breaks.
    pub law: String,
    /// The check that has to catch it.
    pub expected: String,
    /// Every check that was run against it, and what each said.
    pub checks: Vec<Line>,
}

impl Sabotaged {
    /// A saboteur that no check was run against yet.
    #[must_use]
    pub fn new(saboteur: &Saboteur, backend: &str) -> Self {
        let law = registry::find(saboteur.caught_by).map_or("", |check| check.law);
        Self {
            saboteur: saboteur.name.into(),
            backend: backend.into(),
            law: law.into(),
            expected: saboteur.caught_by.into(),
            checks: Vec::new(),
        }
    }

    /// Whether the check that had to catch it did.
    #[must_use]
    pub fn caught(&self) -> bool {
        self.caught_by().any(|check| check == self.expected)
    }

    /// The checks that caught it.
    pub fn caught_by(&self) -> impl Iterator<Item = &str> {
        let failed = |line: &&Line| matches!(line.result, LineResult::Failed { .. });
        self.checks.iter().filter(failed).map(|line| &*line.check)
    }
}

impl Default for Report {
    fn default() -> Self {
        Self {
            format: FORMAT.into(),
            version: VERSION,
            runs: Vec::new(),
            saboteurs: Vec::new(),
        }
    }
}

impl Report {
    /// Reads a report.
    ///
    /// # Errors
    /// The file cannot be read, is no report, or is of a version that this program does not know.
    pub fn load(file: &Path) -> Result<Self, String> {
        let told = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
        let json = std::fs::read(file).map_err(|error| told(&error))?;
        Self::read(&json).map_err(|error| told(&error))
    }

    fn read(json: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let head: Head = serde_json::from_slice(json)
            .map_err(|error| format!("this is no report of wilco-conformance: {error}"))?;
        if head.format != FORMAT {
            return Err(format!("this is a {:?}, not a {FORMAT:?}", head.format));
        }
        if head.version != VERSION {
            return Err(format!(
                "this is version {} of the report; this program knows version {VERSION}",
                head.version
            ));
        }
        serde_json::from_slice(json).map_err(|error| error.to_string())
    }

    /// Adds what another report holds.
    pub fn join(&mut self, other: Self) {
        self.runs.extend(other.runs);
        self.saboteurs.extend(other.saboteurs);
    }

    /// How many checks passed, failed, and did not run.
    #[must_use]
    pub fn counts(&self) -> [usize; 3] {
        let mut all = [0; 3];
        for run in &self.runs {
            for (sum, n) in all.iter_mut().zip(run.counts()) {
                *sum += n;
            }
        }
        all
    }

    /// Whether everything holds: something ran, nothing failed, no saboteur got away.
    #[must_use]
    pub fn passed(&self) -> bool {
        let [passed, failed, _] = self.counts();
        let tried = passed > 0 || !self.saboteurs.is_empty();
        tried && failed == 0 && self.saboteurs.iter().all(Sabotaged::caught)
    }

    /// What each run is called where they stand side by side: two of one backend are told apart by
    /// their broker's version, or by a number.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let same = |run: &Run, by: fn(&Run) -> (&str, &str)| {
            self.runs
                .iter()
                .filter(|other| by(other) == by(run))
                .count()
                > 1
        };
        let name = |(n, run): (usize, &Run)| {
            if !same(run, |run| (&run.backend, "")) {
                run.backend.clone()
            } else if !same(run, |run| (&run.backend, &run.broker.version)) {
                format!("{} ({})", run.backend, run.broker.version)
            } else {
                let before = self.runs[..n].iter();
                let earlier = before.filter(|other| other.backend == run.backend).count();
                format!("{} #{}", run.backend, earlier + 1)
            }
        };
        self.runs.iter().enumerate().map(name).collect()
    }

    /// Every law that has a line or is in the contract, in its order.
    #[must_use]
    pub fn laws(&self) -> Vec<String> {
        let mut laws: Vec<String> = Vec::new();
        for line in self.runs.iter().flat_map(|run| &run.lines) {
            if !laws.contains(&line.law) {
                laws.push(line.law.clone());
            }
        }
        laws.sort_by_key(|law| contract::place(law));
        laws
    }
}

impl Run {
    /// Begins a run: asks the broker what it is. That it does not answer is told in the report, and by
    /// every check.
    pub async fn begin(harness: &dyn Harness, seed: u64) -> Self {
        let broker = ask(harness).await.unwrap_or_else(|problem| Broker {
            problem: Some(problem),
            ..Broker::default()
        });
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let cores = match cores {
            1 => "1 core".into(),
            n => format!("{n} cores"),
        };
        Self {
            backend: harness.name().into(),
            broker,
            started: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            seed,
            suite: env!("CARGO_PKG_VERSION").into(),
            machine: format!(
                "{} {}, {cores}",
                std::env::consts::OS,
                std::env::consts::ARCH
            ),
            ..Self::default()
        }
    }

    /// How many checks passed, failed, and did not run.
    #[must_use]
    pub fn counts(&self) -> [usize; 3] {
        count(&self.lines)
    }
}

/// How many of these passed, failed, and did not run.
pub(crate) fn count<'a>(lines: impl IntoIterator<Item = &'a Line>) -> [usize; 3] {
    let mut counts = [0; 3];
    for line in lines {
        counts[match line.result {
            LineResult::Passed { .. } => 0,
            LineResult::Failed { .. } => 1,
            LineResult::NotRun { .. } => 2,
        }] += 1;
    }
    counts
}

async fn ask(harness: &dyn Harness) -> Result<Broker, String> {
    let server = harness.start(Use::Shared).await?;
    let facts = server.facts();
    let text = |error: wilco::Error| error.to_string();
    let handle = server.connect().await.map_err(text)?;
    let report = handle
        .durability(Deadline::after(LONG))
        .await
        .map_err(text)?;
    handle.close(Deadline::after(LONG)).await.map_err(text)?;
    let finding = |finding: wilco::durability::Finding| Finding {
        setting: finding.setting,
        value: finding.value,
        meaning: finding.meaning,
        advice: finding.advice,
    };
    Ok(Broker {
        version: facts.version,
        level: report.level.to_string(),
        process_crash: report.process_crash.to_string(),
        power_loss: report.power_loss.to_string(),
        node_loss: report.node_loss.to_string(),
        findings: report.findings.into_iter().map(finding).collect(),
        problem: None,
    })
}

impl From<Outcome> for Line {
    fn from(outcome: Outcome) -> Self {
        let result = match outcome.result {
            Ok(Evidence { counts }) => LineResult::Passed {
                evidence: counts
                    .into_iter()
                    .map(|(what, count)| (what.to_owned(), count))
                    .collect(),
            },
            Err(CheckError::Failed(failure)) => LineResult::Failed {
                again: failure.again(),
                expected: failure.expected,
                seen: failure.seen,
            },
            Err(CheckError::Unavailable(reason)) => LineResult::NotRun { reason: reason.0 },
        };
        Self {
            check: outcome.check.into(),
            law: outcome.law.into(),
            title: registry::find(outcome.check)
                .map_or("", |check| check.title)
                .into(),
            seed: outcome.seed,
            ms: u64::try_from(outcome.elapsed.as_millis()).unwrap_or(u64::MAX),
            result,
            timeline: outcome
                .history
                .and_then(|history| Timeline::of(&history.entries())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(result: LineResult) -> Report {
        let line = Line {
            check: "q1_x".into(),
            law: "Q1".into(),
            title: "x".into(),
            seed: 1,
            ms: 1,
            result,
            timeline: None,
        };
        let run = Run {
            backend: "b".into(),
            lines: vec![line],
            ..Run::default()
        };
        Report {
            runs: vec![run],
            ..Report::default()
        }
    }

    fn passed() -> LineResult {
        LineResult::Passed {
            evidence: [("tries".into(), 1)].into(),
        }
    }

    #[test]
    fn x2_what_did_not_run_is_no_pass() {
        let reason = "no disk".into();
        let mut all = report(LineResult::NotRun { reason });
        assert!(!all.passed(), "nothing ran");
        assert!(!Report::default().passed(), "nothing ran");
        all.join(report(passed()));
        assert!(all.passed());
        assert_eq!(all.counts(), [1, 0, 1]);
        all.join(report(LineResult::Failed {
            expected: "a".into(),
            seen: "b".into(),
            again: "c".into(),
        }));
        assert!(!all.passed());
        assert_eq!(all.names(), ["b #1", "b #2", "b #3"]);
    }

    #[test]
    fn x1_a_saboteur_that_got_away_is_no_pass() {
        let saboteur = crate::saboteurs::all()[0];
        let mut all = report(passed());
        all.saboteurs = vec![Sabotaged::new(&saboteur, "b")];
        assert!(!all.passed(), "no check was run against it");
        let line = |check: &str| Line {
            check: check.into(),
            result: LineResult::Failed {
                expected: "a".into(),
                seen: "b".into(),
                again: "c".into(),
            },
            ..all.runs[0].lines[0].clone()
        };
        let (other, expected) = (line("q1_other"), line(saboteur.caught_by));
        all.saboteurs[0].checks.push(other);
        assert!(
            !all.passed(),
            "another check caught it, not the expected one"
        );
        all.saboteurs[0].checks.push(expected);
        assert!(all.passed());
    }

    #[test]
    fn a_report_is_read_back_and_what_is_none_is_refused() {
        let report = report(passed());
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(Report::read(json.as_bytes()).unwrap(), report);
        let newer = json.replace("\"version\":1", "\"version\":2");
        for (text, words) in [
            (newer.as_str(), "version 2"),
            ("{\"format\":\"x\",\"version\":1}", "not a"),
            ("{}", "no report"),
            ("", "no report"),
        ] {
            let error = Report::read(text.as_bytes()).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
