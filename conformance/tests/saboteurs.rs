//! Law X1: the suite fails every saboteur, by the check that has to catch it. That the same checks
//! pass on the broker that was not sabotaged is `tests/reference.rs`.

use std::{collections::BTreeSet, time::Duration};

use futures_util::{StreamExt, stream};
use wilco_conformance::{
    check::{CheckError, Options},
    harnesses, registry,
    saboteurs::{self, Sabotaged, Saboteur},
};

/// A real broker whose process is quickly killed and started: what section F needs.
const WITH_A_PROCESS: &str = "redis";

/// A real broker that has credentials.
const WITH_CREDENTIALS: &str = "rabbitmq";

/// Each one runs into its check; all of them at once, for most of the time is spent waiting for
/// what a saboteur keeps back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn x1_every_saboteur_is_caught_by_its_check() {
    caught(saboteurs(Needs::Nothing), "reference", 12).await;
}

/// The same for those that do well until a process is killed or a network breaks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn x1_every_saboteur_of_faults_is_caught_by_its_check() {
    caught(saboteurs(Needs::Process), WITH_A_PROCESS, 3).await;
}

/// The same for those that give guests what they should not have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn x1_every_saboteur_of_credentials_is_caught_by_its_check() {
    caught(saboteurs(Needs::Credentials), WITH_CREDENTIALS, 3).await;
}

/// What a saboteur's check needs of its broker.
#[derive(PartialEq, Eq)]
enum Needs {
    Nothing,
    Process,
    Credentials,
}

fn saboteurs(needs: Needs) -> Vec<Saboteur> {
    let needed = |saboteur: &Saboteur| match saboteur.caught_by.as_bytes().first() {
        Some(b'f') => Needs::Process,
        Some(b's') => Needs::Credentials,
        _ => Needs::Nothing,
    };
    let only = std::env::var("WILCO_SABOTEUR").ok();
    let asked = |saboteur: &Saboteur| only.as_deref().is_none_or(|only| only == saboteur.name);
    let all = saboteurs::all().into_iter().filter(asked);
    all.filter(|saboteur| needed(saboteur) == needs).collect()
}

#[expect(
    clippy::print_stdout,
    reason = "a test's output is where its evidence is read"
)]
async fn caught(saboteurs: Vec<Saboteur>, base: &str, at_once: usize) {
    let runs = saboteurs.into_iter().map(|saboteur| async move {
        let check = registry::find(saboteur.caught_by).expect("the table names checks");
        let base = harnesses::find(base).expect("a harness of this package");
        let harness = Sabotaged::new(base, saboteur);
        let agent = env!("CARGO_BIN_EXE_wilco-conformance");
        let options = Options {
            kills: 3,
            outage: Duration::from_secs(3),
            ..Options::new(1, Some(agent.into()))
        };
        let outcome = check.run_on(&harness, &options).await;
        match outcome.result {
            Err(CheckError::Failed(failure)) => {
                let time = outcome.elapsed;
                println!(
                    "{saboteur:?}, {time:.1?}: {} / {}",
                    failure.expected, failure.seen
                );
                None
            }
            other => Some(format!("{saboteur:?}: {other:?}")),
        }
    });
    let missed: Vec<_> = stream::iter(runs)
        .buffer_unordered(at_once)
        .filter_map(std::future::ready)
        .collect()
        .await;
    assert!(missed.is_empty(), "not caught: {missed:#?}");
}

/// A law without a saboteur has a reason, told here and in every report.
#[test]
fn x1_every_law_has_a_saboteur() {
    let broken: BTreeSet<_> = saboteurs::all()
        .iter()
        .map(|saboteur| {
            registry::find(saboteur.caught_by)
                .expect("a check")
                .law
                .to_owned()
        })
        .collect();
    let bare: Vec<_> = registry::laws()
        .into_iter()
        .filter(|law| !broken.contains(law))
        .collect();
    assert!(bare.is_empty(), "no saboteur yet: {bare:?}");
}

/// Checks that no saboteur was made for; whoever adds one here says why.
#[test]
fn x1_checks_without_a_saboteur_are_known() {
    let caught: BTreeSet<_> = saboteurs::all()
        .iter()
        .map(|saboteur| saboteur.caught_by)
        .collect();
    let all = registry::all();
    let bare: Vec<_> = all
        .iter()
        .map(|check| check.name)
        .filter(|n| !caught.contains(n))
        .collect();
    let known = [
        // The names are the vocabulary's, not a broker's.
        "q8_bad_names_are_refused_before_any_io",
        // The second process talks to the broker itself, past any wrapper.
        "c1_a_killed_process_gives_all_back",
        "c4_a_paused_process_settles_only_what_it_still_has",
        "c12_across_processes",
        "r3_a_killed_guest_becomes_no_consumer",
        "d1_a_claim_to_outlive_a_kill_is_true",
        "l_processes_killed_at_random_lose_nothing",
        "l_a_nemesis_loses_nothing",
    ];
    assert_eq!(bare, known);
}

#[test]
fn names_are_unique() {
    let names: BTreeSet<_> = saboteurs::all()
        .iter()
        .map(|saboteur| saboteur.name)
        .collect();
    assert_eq!(names.len(), saboteurs::all().len());
}
