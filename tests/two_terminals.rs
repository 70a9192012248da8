//! A guest in one process and its control plane in another, as a new user would try it.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use std::{io::Write, process::Stdio, time::Instant};

use common::{Ended, Place, until};

const LINE: &str = r#"{"id":"vm-1","prepare":{"datastore":"mysql","version":"8.0"}}"#;

fn place() -> Place {
    let place = Place::new();
    place.script("prepare", "cat >payload; echo '{\"port\":3306}'");
    place.script("list", "echo '[\"root\"]'");
    place.file("fleet.jsonl", LINE);
    place
}

const GUEST: [&str; 6] = [
    "guest",
    "vm-1",
    "--exec",
    "./prepare",
    "--on",
    "list=./list",
];

/// The outcome that a provision run showed.
fn succeeded(place: &Place, run: &Ended) {
    run.expect(0, &[]);
    assert!(run.stdout.contains("succeeded"), "{run:?}");
    assert!(place.read("payload").contains("mysql"));
}

#[test]
fn the_guest_may_be_first() {
    let place = place();
    let guest = place.start(GUEST);
    until("the guest answers", || {
        place.run(["ping", "vm-1"]).code == Some(0)
    });
    let run = place.run(["provision", "fleet.jsonl"]);
    succeeded(&place, &run);
    guest.stop().expect(0, &["vm-1", "attached", "stopped"]);
}

#[test]
fn the_control_plane_may_be_first() {
    let place = place();
    let provision = place.start(["provision", "fleet.jsonl"]);
    until("it waits for the guest", || {
        place
            .run(["status", "vm-1"])
            .stdout
            .contains("awaiting guest")
    });
    let explained = place.run(["explain", "vm-1"]);
    explained.expect(0, &[]);
    for words in [
        "awaiting guest",
        "boot deadline in",
        "wilco guest vm-1 --incarnation 1",
    ] {
        assert!(explained.stdout.contains(words), "{}", explained.stdout);
    }
    let guest = place.start(GUEST);
    succeeded(&place, &provision.ended());
    drop(guest);
}

#[test]
fn a_provisioned_guest_is_pinged_called_and_cast_to() {
    let place = place();
    let guest = place.start(GUEST);
    succeeded(&place, &place.run(["provision", "fleet.jsonl"]));

    let call = place.run(["call", "vm-1", "list"]);
    call.expect(0, &[]);
    assert_eq!(call.stdout, "[\"root\"]\n");
    place
        .run(["call", "vm-1", "no_such_call"])
        .expect(1, &["no_such_call"]);
    let cast = place.run(["cast", "vm-1", "list", "--json"]);
    let command = cast.json()[0]["command"].as_str().unwrap().to_owned();
    until("the cast is done", || {
        let status = place.run(["status", "vm-1", "--command", &command]);
        status.stdout.contains("done")
    });

    let pings = place
        .run(["ping", "vm-1", "--count", "200", "--json"])
        .json();
    let summary = pings.last().unwrap();
    let p50 = summary["p50_us"].as_f64().unwrap();
    assert!(p50 < 20_000.0, "{summary}");

    place.run(["delete", "vm-1"]).expect(0, &[]);
    assert_eq!(
        place
            .run(["queues", "--json"])
            .json()
            .iter()
            .filter(|q| q["name"] == "wilco.q.vm-1.1")
            .count(),
        0
    );
    guest.ended().expect(8, &["given up"]);
}

#[test]
fn a_ping_of_an_absent_guest_fails_at_once() {
    let place = place();
    place.run(["doctor"]).expect(0, &[]);
    let start = Instant::now();
    place
        .run(["ping", "vm-1", "--timeout", "30s"])
        .expect(5, &["vm-1"]);
    // The whole process, on a machine that is busy with other tests.
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
}

#[test]
fn the_same_again_shows_what_is_recorded_and_another_prepare_is_a_conflict() {
    let place = place();
    let guest = place.start(GUEST);
    succeeded(&place, &place.run(["provision", "fleet.jsonl"]));
    drop(guest);
    let again = place.run(["provision", "fleet.jsonl"]);
    succeeded(&place, &again);
    assert!(
        again.stdout.contains("recorded by an earlier run"),
        "{again:?}"
    );
    place.file(
        "fleet.jsonl",
        r#"{"id":"vm-1","prepare":{"datastore":"redis"}}"#,
    );
    let other = place.run(["provision", "fleet.jsonl"]);
    assert_eq!(other.code, Some(1), "{other:?}");
    assert!(other.stdout.contains("another one"), "{other:?}");
}

#[test]
fn a_failed_guest_is_provisioned_again_as_a_new_machine() {
    let place = place();
    place.script("prepare", "cat >payload; echo no space >&2; exit 7");
    let guest = place.start(GUEST);
    let run = place.run(["provision", "fleet.jsonl"]);
    assert_eq!(run.code, Some(1), "{run:?}");
    assert!(run.stdout.contains("exited with status 7"), "{run:?}");
    drop(guest);
    place.script("prepare", "cat >payload");
    let mut args = GUEST.to_vec();
    args.extend(["--incarnation", "2"]);
    let guest = place.start(args);
    succeeded(&place, &place.run(["provision", "fleet.jsonl", "--again"]));
    drop(guest);
}

#[test]
fn two_of_one_kind_are_a_conflict() {
    let place = place();
    let guest = place.start(GUEST);
    until("the guest answers", || {
        place.run(["ping", "vm-1"]).code == Some(0)
    });
    place.run(GUEST).expect(4, &["journal"]);
    drop(guest);

    let provision = place.start(["provision", "fleet.jsonl"]);
    until("it waits for the guest", || {
        place
            .run(["status", "vm-1"])
            .stdout
            .contains("awaiting guest")
    });
    place
        .run(["provision", "fleet.jsonl"])
        .expect(4, &["records"]);
    drop(provision);
}

#[test]
fn ctrl_c_says_that_nothing_is_lost_and_the_same_command_goes_on() {
    let place = place();
    let provision = place.start(["provision", "fleet.jsonl"]);
    until("it waits for the guest", || {
        place
            .run(["status", "vm-1"])
            .stdout
            .contains("awaiting guest")
    });
    provision.signal("INT");
    provision.ended().expect(
        130,
        &["Everything is recorded", "wilco provision fleet.jsonl"],
    );
    let guest = place.start(GUEST);
    succeeded(&place, &place.run(["provision", "fleet.jsonl"]));
    drop(guest);
}

#[test]
fn a_fleet_is_read_from_stdin() {
    let place = place();
    let guest = place.start(GUEST);
    let mut command = place.wilco(["provision", "-"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(LINE.as_bytes())
        .unwrap();
    succeeded(&place, &common::Running::of(child).ended());
    drop(guest);
}

/// W9, as an operator sees it: the guest alone is killed, and its program does not go on beside the next.
#[test]
#[cfg(target_os = "linux")]
fn w9_a_program_does_not_outlive_its_guest() {
    let place = place();
    place.script("prepare", "echo $$ >running; exec sleep 600");
    let guest = place.start(GUEST);
    let _provision = place.start(["provision", "fleet.jsonl"]);
    until("prepare runs", || !place.read("running").trim().is_empty());
    let program = std::path::Path::new("/proc").join(place.read("running").trim());
    assert!(program.join("exe").is_file(), "it runs");
    guest.signal("KILL");
    assert_eq!(guest.ended().code, None, "it is killed");
    // Killed, it may wait to be collected for a moment; then it has no program any more.
    until("the program is gone", || !program.join("exe").is_file());
    let next = place.start(GUEST);
    until("it is told as interrupted", || {
        place.run(["status", "vm-1"]).stdout.contains("failed")
    });
    let explained = place.run(["explain", "vm-1"]);
    assert!(
        explained.stdout.contains("the agent ended while this ran"),
        "{explained:?}"
    );
    next.stop().expect(0, &["stopped"]);
}
