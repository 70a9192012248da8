//! What the tests of every backend share: one named test for each check.

use std::time::Duration;

use wilco_conformance::{
    check::{CheckError, Nemesis, Options},
    harness::Harness,
    harnesses, registry,
};

/// The seed of these runs: the same each time, so that a failure in CI is the one at home.
const SEED: u64 = 20_260_401;

/// The check that measures its process's memory: in a process of its own, for others beside it would be
/// measured too.
const ALONE: &str = "r5_unanswered_requests_leave_nothing_behind";

const PROGRAM: &str = env!("CARGO_BIN_EXE_wilco-conformance");

/// Runs a check; what cannot be run here has to be in `not_run`, with nothing else.
#[expect(
    clippy::print_stdout,
    reason = "a test's output is where its evidence is read"
)]
pub(crate) async fn run(name: &str, harness: &dyn Harness, not_run: &[&str]) {
    if name == ALONE && harnesses::find(harness.name()).is_some() {
        return run_alone(name, harness.name()).await;
    }
    let check = registry::find(name).expect("the list and the registry are one");
    let outcome = check.run_on(harness, &options(harness.name())).await;
    match outcome.result {
        Ok(evidence) => {
            assert!(
                !not_run.contains(&name),
                "{name} runs now: take it off the list"
            );
            println!("{name}: {evidence}; {:.1?}", outcome.elapsed);
        }
        Err(CheckError::Unavailable(reason)) => {
            assert!(not_run.contains(&name), "{name} did not run: {reason}");
            println!("{name}: not run: {reason}");
        }
        Err(CheckError::Failed(failure)) => panic!("{failure}"),
    }
}

/// Through the command, which knows every harness of this package by its name.
#[expect(
    clippy::print_stdout,
    reason = "a test's output is where its evidence is read"
)]
async fn run_alone(name: &str, broker: &str) {
    let seed = SEED.to_string();
    let ran = tokio::process::Command::new(PROGRAM)
        .args(["run", "--broker", broker, "--check", name, "--seed", &seed])
        .kill_on_drop(true)
        .output()
        .await
        .expect("this package's own program");
    let told = String::from_utf8_lossy(&ran.stdout);
    assert!(
        ran.status.success(),
        "{told}{}",
        String::from_utf8_lossy(&ran.stderr)
    );
    // What did not run has an exit status of its own, and is no success.
    println!(
        "{}",
        told.lines()
            .find(|line| line.contains(name))
            .unwrap_or_default()
    );
}

/// As a run by hand, with fewer and shorter faults unless `WILCO_FAULTS=all` asks for what the laws
/// say; what was done is printed.
fn options(broker: &str) -> Options {
    let options = Options::new(SEED, Some(PROGRAM.into()));
    if std::env::var("WILCO_FAULTS").is_ok_and(|faults| faults == "all") {
        return options;
    }
    Options {
        // A start of RabbitMQ takes five seconds of a processor's time, one of the others a moment.
        kills: if broker == "rabbitmq" { 2 } else { 50 },
        outage: Duration::from_secs(8),
        crowd: 40,
        nemesis: Nemesis {
            messages: 4_000,
            faults: 5,
        },
        // A guest's life on RabbitMQ takes a quarter of a second of a processor's time: a debug build's
        // and the server's.
        races: if broker == "rabbitmq" { 200 } else { 1_000 },
        ..options
    }
}

/// One check as a test. With `open` and a reason it is shown as ignored: it is known not to hold yet,
/// and no pass; `cargo test -- --ignored` runs it.
macro_rules! check {
    ($name:ident) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            common::run(stringify!($name), &HARNESS, NOT_RUN).await;
        }
    };
    ($name:ident, open $why:literal) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        #[ignore = $why]
        async fn $name() {
            common::run(stringify!($name), &HARNESS, NOT_RUN).await;
        }
    };
}
#[allow(unused_imports, reason = "each test binary uses some of it")]
pub(crate) use check;

/// Makes one test for each check, and one that no check is missing. What makes a test of a check is
/// the file's own macro `one`, which knows what is open on its backend.
#[allow(unused_macros, reason = "each test binary uses some of it")]
macro_rules! tests {
    ($($section:ident :: $name:ident, $law:literal, $title:literal;)*) => {
        $(one!($section $name);)*

        #[test]
        fn every_check_of_the_registry_is_a_test() {
            let tests = [$(stringify!($name)),*];
            let checks: Vec<_> =
                wilco_conformance::registry::all().iter().map(|check| check.name).collect();
            assert_eq!(checks, tests);
            assert!(NOT_RUN.iter().all(|name| checks.contains(name)), "a name that is no check");
        }
    };
}
#[allow(unused_imports, reason = "each test binary uses some of it")]
pub(crate) use tests;
