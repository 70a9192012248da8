//! The command: `run`, `list`, `report`, `check`, `saboteurs`.

mod run;
mod sabotage;

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand};

use crate::{
    actor, agent,
    harness::Harness,
    harnesses, ledger, registry,
    report::{Report, html, junit},
    second,
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
    /// Run checks, on private brokers or on one of yours.
    #[command(after_help = "Examples:\n  \
        wilco-conformance run --broker sqlite\n  \
        wilco-conformance run --broker sqlite --law Q3 --seed 7\n  \
        wilco-conformance run --broker redis --law W9 --law F7\n  \
        wilco-conformance run --broker memory --broker sqlite --faults --saboteurs --report out\n  \
        wilco-conformance run --broker amqp://broker.example --report out\n\n\
        On a broker that is given by its URL, only queues of the suite's own names are used, nothing is \
        left behind, and what needs control over its process does not run and is told. A password is \
        best given in WILCO_BROKER_PASSWORD.")]
    Run(run::Run),
    /// Show reports of earlier runs again, several together as one.
    #[command(after_help = "Example:\n  \
        wilco-conformance report here/report.json there/report.json --html both.html")]
    Report {
        /// Files that `run --report` wrote.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Write one page to look at.
        #[arg(long)]
        html: Option<PathBuf>,
        /// Write JUnit XML.
        #[arg(long)]
        junit: Option<PathBuf>,
        /// Write them as one JSON file.
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Judge a history that was kept.
    Check {
        /// The file, JSON lines.
        history: PathBuf,
    },
    /// Run every saboteur against the check that has to catch it.
    Saboteurs(Saboteurs),
    /// The second process of a check.
    #[command(hide = true)]
    Agent,
    /// A taskmanager or a guest of a case.
    #[command(hide = true)]
    Actor,
}

#[derive(Debug, Args)]
struct Saboteurs {
    /// The kind of broker that they break.
    #[arg(long, default_value = "reference")]
    broker: String,
    /// Where random choices come from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run the other checks of the same law too, to see who else notices.
    #[arg(long)]
    wide: bool,
    /// Write the report into this directory.
    #[arg(long)]
    report: Option<PathBuf>,
}

/// Reads the command line, does what it says, and gives the exit status.
pub async fn main() -> ExitCode {
    let mut out = io::stdout();
    let done = match Arguments::parse().command {
        Command::Run(run) if run.list => list(&mut out),
        Command::Run(run) => run.run(&mut out).await,
        Command::Report {
            files,
            html,
            junit,
            json,
        } => show(&mut out, &files, html, junit, json),
        Command::Check { history } => check(&mut out, &history),
        Command::Saboteurs(asked) => saboteurs(&mut out, asked).await,
        Command::Agent => match broker_of_agent() {
            Ok(url) => agent::run(&url).await.map(|()| true),
            Err(missing) => Err(missing),
        },
        Command::Actor => match broker_of_agent() {
            Ok(url) => actor::run(&url).await.map(|()| true),
            Err(missing) => Err(missing),
        },
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

fn broker_of_agent() -> Result<String, String> {
    std::env::var(second::URL).map_err(|_| format!("{} has to hold the broker's URL", second::URL))
}

fn list(out: &mut impl Write) -> Result<bool, String> {
    for check in registry::with_cases() {
        let line = format!("{:<4} {:<56} {}", check.law, check.name, check.title);
        say(out, line)?;
    }
    Ok(true)
}

fn show(
    out: &mut impl Write,
    files: &[PathBuf],
    html: Option<PathBuf>,
    junit: Option<PathBuf>,
    json: Option<PathBuf>,
) -> Result<bool, String> {
    let mut report = Report::default();
    for file in files {
        report.join(Report::load(file)?);
    }
    if let Some(file) = html {
        write(&file, html::render(&report))?;
    }
    if let Some(file) = junit {
        write(&file, junit::render(&report)?)?;
    }
    if let Some(file) = json {
        write(&file, to_json(&report)?)?;
    }
    say(out, &report)?;
    Ok(report.passed())
}

async fn saboteurs(out: &mut impl Write, asked: Saboteurs) -> Result<bool, String> {
    let broker = || harness(&asked.broker);
    let mut report = Report::default();
    report.saboteurs = sabotage::all(out, &broker, asked.seed, asked.wide).await?;
    say(out, format!("\n{report}"))?;
    if let Some(directory) = asked.report {
        save(out, &report, &directory)?;
    }
    Ok(report.passed())
}

fn check(out: &mut impl Write, history: &Path) -> Result<bool, String> {
    let entries =
        ledger::load(history).map_err(|error| format!("{}: {error}", history.display()))?;
    let minimum = ledger::Minimum {
        confirmed: 1,
        faults: 0,
    };
    let verdict = ledger::judge(&entries, minimum);
    say(out, &verdict)?;
    let clean = verdict.is_clean();
    say(out, if clean { "clean" } else { "NOT CLEAN" })?;
    Ok(clean)
}

/// The harness of this name, or the broker at this URL.
fn harness(name: &str) -> Result<Box<dyn Harness>, String> {
    if name.contains(':') {
        return Ok(Box::new(harnesses::Url::new(name)?));
    }
    harnesses::find(name).ok_or_else(|| {
        let known = harnesses::all();
        let known: Vec<_> = known.iter().map(|harness| harness.name()).collect();
        format!(
            "no broker {name:?}; there are {}, or a broker's URL",
            known.join(", ")
        )
    })
}

/// Writes a report in all its forms.
fn save(out: &mut impl Write, report: &Report, directory: &Path) -> Result<(), String> {
    write(&directory.join("report.json"), to_json(report)?)?;
    write(&directory.join("junit.xml"), junit::render(report)?)?;
    let page = directory.join("report.html");
    write(&page, html::render(report))?;
    say(out, format!("the report is in {}", page.display()))
}

fn to_json(report: &Report) -> Result<String, String> {
    serde_json::to_string_pretty(report).map_err(|error| error.to_string())
}

fn write(file: &Path, text: String) -> Result<(), String> {
    if let Some(directory) = file.parent() {
        let made = fs::create_dir_all(directory);
        made.map_err(|error| format!("{}: {error}", directory.display()))?;
    }
    fs::write(file, text).map_err(|error| format!("{}: {error}", file.display()))
}

fn say(out: &mut impl Write, line: impl std::fmt::Display) -> Result<(), String> {
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .map_err(|error| error.to_string())
}
