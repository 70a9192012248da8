//! The fleet of the README on every broker that has a server, by the command alone: the same outcomes,
//! also when control plane and guests are killed at random moments.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[path = "../../tests/common/mod.rs"]
mod common;

use common::fleet;
use wilco_conformance::{harness::Use, harnesses};

/// Few: a start of the control plane after a kill waits for a lease to run out. `WILCO_CRASH_ROUNDS` asks for
/// more.
const ROUNDS: u64 = 2;

/// One fleet at a time: each is twenty machines, their agents and their programs.
static ONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// On a server of this kind that nobody breaks: what is killed here is wilco.
async fn on(name: &str, test: impl FnOnce(Option<&str>) + Send + 'static) {
    let _one = ONE.lock().await;
    let harness = harnesses::find(name).expect("a harness of this name");
    let server = harness.start(Use::Shared).await.unwrap();
    let url = server.facts().url.expect("a server that processes share");
    let tested = tokio::task::spawn_blocking(move || test(Some(&url)));
    tested.await.unwrap();
}

macro_rules! on {
    ($broker:ident) => {
        mod $broker {
            use super::*;

            const NAME: &str = stringify!($broker);

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn the_readme_fleet_ends_as_it_should_and_is_not_run_again() {
                on(NAME, fleet::readme_fleet).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn crash_of_the_control_plane_at_any_moment_changes_no_outcome() {
                on(NAME, |url| fleet::crash_of_the_control_plane(url, ROUNDS)).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn crash_of_guests_at_any_moment_runs_no_prepare_twice() {
                on(NAME, |url| fleet::crash_of_guests(url, ROUNDS)).await;
            }
        }
    };
}

on!(redis);
on!(nats);
on!(rabbitmq);
