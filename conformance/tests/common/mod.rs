//! What the tests of every backend share: one named test for each check.

use tokio::sync::RwLock;
use wilco_conformance::{
    check::{CheckError, Options},
    harness::Harness,
    registry,
};

/// The seed of these runs: the same each time, so that a failure in CI is the one at home.
const SEED: u64 = 20_260_401;

/// The check that measures this process's memory: others beside it would be measured too.
const ALONE: &str = "r5_unanswered_requests_leave_nothing_behind";
static TURNS: RwLock<()> = RwLock::const_new(());

/// Runs a check; what cannot be run here has to be in `not_run`, with nothing else.
#[expect(
    clippy::print_stdout,
    reason = "a test's output is where its evidence is read"
)]
pub(crate) async fn run(name: &str, harness: &dyn Harness, not_run: &[&str]) {
    let check = registry::find(name).expect("the list and the registry are one");
    let agent = env!("CARGO_BIN_EXE_wilco-conformance");
    let _turn = if name == ALONE {
        (Some(TURNS.write().await), None)
    } else {
        (None, Some(TURNS.read().await))
    };
    let outcome = check
        .run_on(harness, &Options::new(SEED, Some(agent.into())))
        .await;
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

/// Makes one test for each check, and one that no check is missing.
macro_rules! tests {
    ($($section:ident :: $name:ident, $law:literal, $title:literal;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                common::run(stringify!($name), &HARNESS, NOT_RUN).await;
            }
        )*

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
pub(crate) use tests;
