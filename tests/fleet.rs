//! The README's fleet, end to end with one process per guest; then control plane and guests killed with
//! SIGKILL at random moments: the same terminal outcomes, and no prepare twice.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use std::fs;

use common::{
    fleet::{self, Fleet},
    until,
};
use serde_json::Value;

const ROUNDS: u64 = 5;

#[test]
fn the_readme_fleet_ends_as_it_should_and_is_not_run_again() {
    fleet::readme_fleet(None);
}

#[test]
fn crash_of_the_control_plane_at_any_moment_changes_no_outcome() {
    fleet::crash_of_the_control_plane(None, ROUNDS);
}

#[test]
fn crash_of_guests_at_any_moment_runs_no_prepare_twice() {
    fleet::crash_of_guests(None, ROUNDS);
}

#[test]
fn a_machine_that_ends_early_is_a_failed_host_at_once() {
    let fleet = Fleet::new(None, |place| {
        place.file(
            "fleet.jsonl",
            r#"{"id":"a","prepare":1,"deadlines":{"boot":"5m"}}"#,
        )
    });
    let machine = fleet.place.script("machine", "exit 3");
    let args = [
        "provision".as_ref(),
        fleet.file.as_os_str(),
        "--spawn".as_ref(),
        machine.as_os_str(),
    ];
    let run = fleet.place.run(args);
    run.expect(1, &[]);
    assert!(run.stdout.contains("host failed"), "{run:?}");
    assert!(run.stdout.contains("exited with status 3"), "{run:?}");
    assert!(
        run.stdout.contains("nothing of the 1 not delivered"),
        "{run:?}"
    );
}

#[test]
fn ctrl_c_powers_the_machines_off_and_decides_nothing() {
    let fleet = Fleet::new(None, |place| {
        place.file(
            "fleet.jsonl",
            r#"{"id":"never","prepare":1,"env":{"BOOT":"never"}}"#,
        )
    });
    let run = fleet.start();
    let machine = || {
        fleet
            .place
            .read("fleet/machines/never.1/machine.pid")
            .trim()
            .parse::<u32>()
            .ok()
    };
    until("the machine is there", || machine().is_some());
    run.signal("INT");
    run.ended().expect(130, &["Everything is recorded"]);
    let machine = machine().unwrap();
    assert!(!fs::exists(format!("/proc/{machine}")).unwrap());
    // Powering it off was our doing: nothing is decided about its guest.
    let status = fleet.place.run(["status", "never", "--json"]).json();
    assert_eq!(status[0]["outcome"], Value::Null, "{status:?}");
}
