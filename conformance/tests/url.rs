//! A broker that is given by its URL: nothing of its owner's is touched, nothing is left behind, and
//! what cannot be run is told.

use std::time::Duration;

use wilco::{
    Deadline, ErrorKind, GuestAddress, GuestId, Message,
    broker::{DeleteMode, QueueSpec},
};
use wilco_conformance::{
    check::{CheckError, Options},
    harness::{Harness, Use},
    harnesses::Url,
    registry,
};

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

fn queue(id: &str) -> wilco::QueueName {
    GuestAddress::from(GuestId::new(id).expect("an id")).queue()
}

/// Every check that needs no control runs beside somebody's own queues, which stay as they are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_check_leaves_a_strangers_broker_as_it_was() {
    let place = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}", place.path().join("theirs.db").display());
    let owner = wilco::connect(&url).await.unwrap();
    let theirs = ["a-guest-of-theirs", "another"];
    for id in theirs {
        let spec = QueueSpec::new(queue(id));
        owner.declare(&spec, soon()).await.unwrap();
        let message = Message::new("prepare", id).unwrap();
        owner.publish(&queue(id), message, soon()).await.unwrap();
    }
    let before = owner.list(soon()).await.unwrap();
    let harness = Url::new(&url).unwrap();
    let agent = env!("CARGO_BIN_EXE_wilco-conformance");
    let options = Options::new(7, Some(agent.into()));
    let mut not_run = Vec::new();
    for check in registry::all() {
        // Those of section F say that there is no process, each for itself.
        let outcome = check.run_on(&harness, &options).await;
        match outcome.result {
            Ok(_) => {}
            Err(CheckError::Unavailable(_)) => not_run.push(check.name),
            Err(CheckError::Failed(failure)) => panic!("{failure}"),
        }
        assert_eq!(owner.list(soon()).await.unwrap(), before, "{}", check.name);
    }
    not_run.retain(|name| !name.starts_with('f'));
    let known = [
        "q7_delete_leaves_nothing_behind",
        "q10_an_idle_queue_outlives_a_restart",
        "p1_ok_outlives_a_restart",
        "c2_an_ack_outlives_a_restart",
        "s1_a_guests_credential_is_worth_one_queue",
        "s2_what_no_client_would_send_is_parked",
        "d1_the_report_is_honest",
    ];
    assert_eq!(not_run, known);
}

/// A check that needs a name which is taken is not made; the queue of that name is not touched.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_is_taken_is_left_alone() {
    let place = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}", place.path().join("theirs.db").display());
    let owner = wilco::connect(&url).await.unwrap();
    // One of the names that law Q8 tries.
    let spec = QueueSpec::new(queue("*"));
    owner.declare(&spec, soon()).await.unwrap();
    let message = Message::new("prepare", "theirs").unwrap();
    owner.publish(&spec.name, message, soon()).await.unwrap();
    let harness = Url::new(&url).unwrap();
    let check = registry::find("q8_two_ids_never_meet").unwrap();
    let outcome = check.run_on(&harness, &Options::new(7, None)).await;
    match outcome.result {
        Err(CheckError::Unavailable(reason)) => {
            assert!(reason.to_string().contains("somebody else's"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    let listed = owner.list(soon()).await.unwrap();
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert_eq!(listed[0].ready, 1);
}

/// A queue with a name of the suite's is another run's, or what is left of one: nothing is begun.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_beside_another_one_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}", place.path().join("theirs.db").display());
    let owner = wilco::connect(&url).await.unwrap();
    let spec = QueueSpec::new(queue("conformance-q4"));
    owner.declare(&spec, soon()).await.unwrap();
    let harness = Url::new(&url).unwrap();
    let refused = harness.start(Use::Shared).await.unwrap_err();
    assert!(refused.contains(spec.name.as_str()), "{refused}");
    owner
        .delete(&spec.name, DeleteMode::IfEmpty, soon())
        .await
        .unwrap();
    assert!(harness.start(Use::Shared).await.is_ok());
}

/// What a check made and did not take away goes in the sweep, with its messages, and no handle is let
/// near what is somebody else's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sweep_takes_away_what_was_made_and_nothing_else() {
    let place = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}", place.path().join("theirs.db").display());
    let owner = wilco::connect(&url).await.unwrap();
    owner
        .declare(&QueueSpec::new(queue("theirs")), soon())
        .await
        .unwrap();
    let harness = Url::new(&url).unwrap();
    let server = harness.start(Use::Shared).await.unwrap();
    let broker = server.connect().await.unwrap();
    broker
        .declare(&QueueSpec::new(queue("made")), soon())
        .await
        .unwrap();
    let message = Message::new("x", "y").unwrap();
    broker
        .publish(&queue("made"), message.clone(), soon())
        .await
        .unwrap();
    let listed = broker.list(soon()).await.unwrap();
    assert_eq!(listed.len(), 1, "theirs is hidden: {listed:?}");
    let name = queue("theirs");
    let touched = broker.publish(&name, message, soon()).await.unwrap_err();
    assert_eq!(*touched.kind(), ErrorKind::Conflict);
    let touched = broker
        .delete(&name, DeleteMode::Discard, soon())
        .await
        .unwrap_err();
    assert_eq!(*touched.kind(), ErrorKind::Conflict);
    drop((broker, server));
    let met = harness.sweep().await.unwrap_err();
    assert!(matches!(met, CheckError::Unavailable(_)), "{met:?}");
    let listed = owner.list(soon()).await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].name, name);
}

/// Law S4: a password in the URL is in no name, no Debug form and no failure.
#[test]
fn s4_the_password_of_a_url_is_not_shown() {
    let harness = Url::new("redis://user:hunter2@127.0.0.1:1/").unwrap();
    assert!(!harness.name().contains("hunter2"));
    assert!(!format!("{harness:?}").contains("hunter2"));
    assert!(Url::new("what").is_err());
}
