//! The command: `run`, `list`, `check`.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{Parser, Subcommand};

use crate::{
    agent,
    check::{Check, Options},
    harness::Harness,
    harnesses, ledger, registry,
    report::{Line, LineResult, Report},
    saboteurs,
};

/// Runs the laws of wilco's contract against a broker.
///
/// The exit status is 0 if everything that ran passed, 1 if a law is broken, 2 if it could not be run.
#[derive(Debug, Parser)]
#[command(name = "wilco-conformance", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run checks on private brokers.
    #[command(after_help = "Examples:\n  \
        wilco-conformance run --broker sqlite\n  \
        wilco-conformance run --broker sqlite --law Q3 --seed 7\n  \
        wilco-conformance run --broker memory --broker sqlite --report out.json")]
    Run {
        /// The kind of broker: sqlite, memory or reference. Can be given more than once.
        #[arg(long = "broker", required_unless_present = "list")]
        brokers: Vec<String>,
        /// Only the checks of this law, such as Q3. Can be given more than once.
        #[arg(long = "law")]
        laws: Vec<String>,
        /// Only this check. Can be given more than once.
        #[arg(long = "check")]
        checks: Vec<String>,
        /// Where random choices come from; the same seed makes the same choices.
        #[arg(long)]
        seed: Option<u64>,
        /// Write the report to this file too, as JSON.
        #[arg(long)]
        report: Option<PathBuf>,
        /// Keep the histories of failed runs in this directory.
        #[arg(long, default_value_os_t = std::env::temp_dir())]
        histories: PathBuf,
        /// How often a broker is killed where the law says fifty times (F1).
        #[arg(long, default_value_t = 50)]
        kills: usize,
        /// For how many seconds a broker is down where the law says a minute (F5).
        #[arg(long, default_value_t = 60)]
        outage: u64,
        /// List the checks and end.
        #[arg(long)]
        list: bool,
    },
    /// Judge a history that was kept.
    Check {
        /// The file, JSON lines.
        history: PathBuf,
    },
    /// Run every saboteur against the check that has to catch it.
    Saboteurs {
        /// The kind of broker that they break.
        #[arg(long, default_value = "reference")]
        broker: String,
        /// Where random choices come from.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// The second process of a check.
    #[command(hide = true)]
    Agent {
        /// The broker's URL.
        url: String,
    },
}

/// Reads the command line, does what it says, and gives the exit status.
pub async fn main() -> ExitCode {
    let mut out = io::stdout();
    let done = match Arguments::parse().command {
        Command::Run { list: true, .. } => list(&mut out),
        Command::Run {
            brokers,
            laws,
            checks,
            seed,
            report,
            histories,
            kills,
            outage,
            ..
        } => {
            let seed = seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
            let agent = std::env::current_exe().ok();
            let options = Options {
                histories,
                kills,
                outage: Duration::from_secs(outage),
                ..Options::new(seed, agent)
            };
            run(&mut out, &brokers, &laws, &checks, &options, report).await
        }
        Command::Check { history } => check(&mut out, &history),
        Command::Saboteurs { broker, seed } => sabotage(&mut out, &broker, seed).await,
        Command::Agent { url } => agent::run(&url).await.map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(message) => {
            let _ = writeln!(io::stderr(), "wilco-conformance: {message}");
            ExitCode::from(2)
        }
    }
}

fn list(out: &mut impl Write) -> Result<bool, String> {
    for check in registry::all() {
        say(
            out,
            format!("{:<4} {:<56} {}", check.law, check.name, check.title),
        )?;
    }
    Ok(true)
}

async fn run(
    out: &mut impl Write,
    brokers: &[String],
    laws: &[String],
    names: &[String],
    options: &Options,
    file: Option<PathBuf>,
) -> Result<bool, String> {
    let harnesses = brokers
        .iter()
        .map(|name| harness(name))
        .collect::<Result<Vec<_>, _>>()?;
    let checks = chosen(laws, names)?;
    say(
        out,
        format!(
            "{} checks, seed {}",
            checks.len() * harnesses.len(),
            options.seed
        ),
    )?;
    let mut report = Report::new();
    for harness in &harnesses {
        for check in &checks {
            let line = Line::from(check.run_on(harness.as_ref(), options).await);
            say(out, &line)?;
            report.lines.push(line);
        }
    }
    say(out, format!("\n{report}"))?;
    if let Some(file) = file {
        let json = serde_json::to_vec_pretty(&report).map_err(|error| error.to_string())?;
        std::fs::write(&file, json).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    if report.counts() == [0, 0, report.lines.len()] {
        return Err("nothing could be run".into());
    }
    Ok(report.passed())
}

/// The checks that were asked for; all of them if none was.
fn chosen(laws: &[String], names: &[String]) -> Result<Vec<Check>, String> {
    let known = registry::all();
    for law in laws {
        if !known
            .iter()
            .any(|check| check.law.eq_ignore_ascii_case(law))
        {
            return Err(format!("no check of law {law:?}; `run --list` lists them"));
        }
    }
    for name in names {
        if registry::find(name).is_none() {
            return Err(format!("no check {name:?}; `run --list` lists them"));
        }
    }
    let all = laws.is_empty() && names.is_empty();
    let asked = |check: &Check| {
        all || laws.iter().any(|law| check.law.eq_ignore_ascii_case(law))
            || names.iter().any(|name| check.name == name)
    };
    Ok(known.into_iter().filter(asked).collect())
}

fn harness(name: &str) -> Result<Box<dyn Harness>, String> {
    harnesses::find(name).ok_or_else(|| {
        let known: Vec<_> = harnesses::all()
            .iter()
            .map(|harness| harness.name())
            .collect();
        format!("no broker {name:?}; there are {}", known.join(", "))
    })
}

fn check(out: &mut impl Write, history: &std::path::Path) -> Result<bool, String> {
    let entries =
        ledger::load(history).map_err(|error| format!("{}: {error}", history.display()))?;
    let verdict = ledger::judge(
        &entries,
        ledger::Minimum {
            confirmed: 1,
            faults: 0,
        },
    );
    say(out, &verdict)?;
    say(
        out,
        if verdict.is_clean() {
            "clean"
        } else {
            "NOT CLEAN"
        },
    )?;
    Ok(verdict.is_clean())
}

async fn sabotage(out: &mut impl Write, broker: &str, seed: u64) -> Result<bool, String> {
    let options = Options::new(seed, std::env::current_exe().ok());
    let mut all_caught = true;
    for saboteur in saboteurs::all() {
        let check = registry::find(saboteur.caught_by)
            .ok_or_else(|| format!("no check {}", saboteur.caught_by))?;
        let harness = saboteurs::Sabotaged::new(harness(broker)?, saboteur);
        let line = Line::from(check.run_on(&harness, &options).await);
        let told = match &line.result {
            LineResult::Failed { failure } => format!("caught      {}", failure.seen),
            LineResult::NotRun { reason } => format!("not run     {reason}"),
            LineResult::Passed { .. } => {
                all_caught = false;
                "NOT CAUGHT".into()
            }
        };
        let told = told.lines().next().unwrap_or_default().to_owned();
        say(
            out,
            format!("{:<34} {:<56} {told}", saboteur.name, check.name),
        )?;
    }
    Ok(all_caught)
}

fn say(out: &mut impl Write, line: impl std::fmt::Display) -> Result<(), String> {
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .map_err(|error| error.to_string())
}
