//! The fleet of the README on every broker that has a server, by the command alone: the same outcomes,
//! also when control plane and guests are killed at random moments.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[path = "../../tests/common/mod.rs"]
mod common;

use common::fleet;
use wilco_conformance::{
    harness::{Server, Use},
    harnesses,
};

/// A private server of this kind, and the URL that every process can use.
async fn server(name: &str) -> (Box<dyn Server>, String) {
    let harness = harnesses::find(name).expect("a harness of this name");
    let server = harness.start(Use::Alone).await.unwrap();
    let url = server.facts().url.expect("a server that processes share");
    (server, url)
}

macro_rules! on {
    ($($broker:ident)*) => {$(
        mod $broker {
            use super::*;

            async fn run(test: fn(Option<&str>)) {
                let (_server, url) = server(stringify!($broker)).await;
                tokio::task::spawn_blocking(move || test(Some(&url))).await.unwrap();
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            #[ignore = "open: see CONTRIBUTING.md"]
            async fn the_readme_fleet_ends_as_it_should_and_is_not_run_again() {
                run(fleet::readme_fleet).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            #[ignore = "open: see CONTRIBUTING.md"]
            async fn crash_of_the_control_plane_at_any_moment_changes_no_outcome() {
                run(fleet::crash_of_the_control_plane).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            #[ignore = "open: see CONTRIBUTING.md"]
            async fn crash_of_guests_at_any_moment_runs_no_prepare_twice() {
                run(fleet::crash_of_guests).await;
            }
        }
    )*};
}

on!(redis nats rabbitmq);
