//! `run`: checks on brokers, one after the other.

use std::{
    io::Write,
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::Args;

use super::{harness, sabotage, save, say};
use crate::{
    check::{Check, Options},
    harness::Harness,
    registry,
    report::{self, Line, LineResult, Report},
};

#[derive(Debug, Args)]
pub(super) struct Run {
    /// The kind of broker, which is started for the purpose, or the URL of one that is there. Can be
    /// given more than once.
    #[arg(
        long = "broker",
        value_name = "NAME_OR_URL",
        required_unless_present = "list"
    )]
    brokers: Vec<String>,
    /// Only the checks of this law, such as Q3. Can be given more than once.
    #[arg(long = "law")]
    laws: Vec<String>,
    /// Only this check. Can be given more than once.
    #[arg(long = "check")]
    checks: Vec<String>,
    /// Break the broker and its network too (section F).
    #[arg(long)]
    faults: bool,
    /// Play the cases of the workflow too (W1 to W40, F7 and garbage from strangers).
    #[arg(long)]
    cases: bool,
    /// Set the saboteurs on the suite too (law X1).
    #[arg(long)]
    saboteurs: bool,
    /// Where random choices come from; the same seed makes the same choices.
    #[arg(long)]
    seed: Option<u64>,
    /// Write the report into this directory: report.html, report.json and junit.xml.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Keep the histories of failed runs in this directory; by default beside the report.
    #[arg(long, value_name = "DIR")]
    histories: Option<PathBuf>,
    /// How often a broker is killed where the law says fifty times (F1).
    #[arg(long, default_value_t = 50)]
    kills: usize,
    /// For how many seconds a broker is down where the law says a minute (F5).
    #[arg(long, default_value_t = 60)]
    outage: u64,
    /// How many guests or races there are where a case says a thousand (W37, W38).
    #[arg(long, default_value_t = 1_000)]
    crowd: usize,
    /// How many messages a nemesis run has confirmed at least
    #[arg(long, default_value_t = 10_000)]
    messages: u64,
    /// How many faults strike in a nemesis run
    #[arg(long, default_value_t = 20)]
    strikes: u64,
    /// List the checks and end.
    #[arg(long)]
    pub(super) list: bool,
}

impl Run {
    pub(super) async fn run(self, out: &mut impl Write) -> Result<bool, String> {
        let brokers = self.brokers.iter().map(|name| harness(name));
        let brokers = brokers.collect::<Result<Vec<_>, _>>()?;
        let checks = self.chosen()?;
        let options = self.options()?;
        let all = checks.len() * brokers.len();
        say(out, format!("{all} checks, seed {}", options.seed))?;
        let mut report = Report::default();
        let mut interrupted = false;
        for broker in &brokers {
            let run = self.on(out, broker.as_ref(), &checks, &options).await?;
            interrupted |= run.1;
            report.runs.push(run.0);
            if interrupted {
                break;
            }
        }
        if self.saboteurs && !interrupted {
            let reference = || harness("reference");
            report.saboteurs = sabotage::all(out, &reference, options.seed, false).await?;
        }
        say(out, format!("\n{report}"))?;
        if let Some(directory) = &self.report {
            save(out, &report, directory)?;
        }
        if interrupted {
            return Err("interrupted; what had run is in the report".into());
        }
        let [passed, failed, _] = report.counts();
        if passed + failed == 0 {
            return Err("nothing could be run".into());
        }
        Ok(report.passed())
    }

    /// The checks that were asked for; if none was, all of the laws, and with `--cases` the cases.
    fn chosen(&self) -> Result<Vec<Check>, String> {
        let known = registry::with_cases();
        let is = |check: &Check, law: &String| check.law.eq_ignore_ascii_case(law);
        for law in &self.laws {
            if !known.iter().any(|check| is(check, law)) {
                return Err(format!("no check of law {law:?}; `run --list` lists them"));
            }
        }
        for name in &self.checks {
            if registry::find(name).is_none() {
                return Err(format!("no check {name:?}; `run --list` lists them"));
            }
        }
        if self.laws.is_empty() && self.checks.is_empty() {
            return Ok(if self.cases { known } else { registry::all() });
        }
        let asked = |check: &Check| {
            self.laws.iter().any(|law| is(check, law))
                || self.checks.iter().any(|name| check.name == name)
        };
        Ok(known.into_iter().filter(asked).collect())
    }

    fn options(&self) -> Result<Options, String> {
        let seed = self.seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
        let mut options = Options::new(seed, std::env::current_exe().ok());
        options.kills = self.kills;
        options.outage = Duration::from_secs(self.outage);
        options.crowd = self.crowd;
        options.nemesis.messages = self.messages;
        options.nemesis.faults = self.strikes;
        let beside = self.report.as_ref().map(|report| report.join("histories"));
        if let Some(histories) = self.histories.clone().or(beside) {
            let made = std::fs::create_dir_all(&histories);
            made.map_err(|error| format!("{}: {error}", histories.display()))?;
            options.histories = histories;
        }
        Ok(options)
    }

    /// Runs the checks on one broker; true if it was interrupted.
    async fn on(
        &self,
        out: &mut impl Write,
        broker: &dyn Harness,
        checks: &[Check],
        options: &Options,
    ) -> Result<(report::Run, bool), String> {
        let started = Instant::now();
        let mut run = report::Run::begin(broker, options.seed).await;
        let about = [&*run.broker.version, &*run.broker.level];
        let about: Vec<_> = about.into_iter().filter(|text| !text.is_empty()).collect();
        say(
            out,
            format!("\n{} ({})", run.backend, about.join(", level ")),
        )?;
        let asked = |check: &Check| checks.iter().any(|asked| asked.name == check.name);
        let others = registry::with_cases();
        let others = others.into_iter().filter(|check| !asked(check));
        run.not_asked = others.map(|check| check.name.into()).collect();
        let mut reason = None;
        if let Some(problem) = &run.broker.problem {
            let line = missing(broker, options, problem);
            say(out, &line)?;
            run.lines.push(line);
            reason = Some("the broker that was asked for is not there");
        }
        let mut interrupted = false;
        for (n, check) in checks.iter().enumerate() {
            // What breaks the broker is asked for, by this or by name.
            let breaks = check.breaks_its_broker() && !self.faults;
            let named = !self.laws.is_empty() || !self.checks.is_empty();
            let line = match reason {
                Some(reason) => not_run(check, options, reason),
                None if breaks && !named => not_run(
                    check,
                    options,
                    "it breaks the broker: asked for with --faults",
                ),
                None => tokio::select! {
                    outcome = check.run_on(broker, options) => outcome.into(),
                    _ = tokio::signal::ctrl_c() => {
                        interrupted = true;
                        reason = Some("interrupted");
                        // What the check was about to use is taken away; that it could not be is
                        // told, for it stays on somebody's broker.
                        if let Err(error) = broker.sweep().await {
                            say(out, format!("{error:?}"))?;
                        }
                        not_run(check, options, "interrupted")
                    }
                },
            };
            if reason.is_none() {
                say(out, format!("[{:>3}/{}] {line}", n + 1, checks.len()))?;
            }
            run.lines.push(line);
        }
        run.ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok((run, interrupted))
    }
}

fn line(check: &Check, options: &Options, result: LineResult) -> Line {
    Line {
        check: check.name.into(),
        law: check.law.into(),
        title: check.title.into(),
        seed: options.seed,
        ms: 0,
        result,
        timeline: None,
    }
}

fn not_run(check: &Check, options: &Options, reason: &str) -> Line {
    let reason = reason.into();
    line(check, options, LineResult::NotRun { reason })
}

/// A broker that was asked for and is not there is a failure, once; that none of its checks ran says
/// nothing more (law X2).
fn missing(broker: &dyn Harness, options: &Options, problem: &str) -> Line {
    Line {
        check: "x2_the_broker_is_there".into(),
        law: "X2".into(),
        title: "a broker that was asked for is there".into(),
        seed: options.seed,
        ms: 0,
        result: LineResult::Failed {
            expected: "the broker that was asked for is there".into(),
            seen: problem.into(),
            again: format!("wilco-conformance run --broker {}", broker.name()),
        },
        timeline: None,
    }
}
