//! Bad input: one clear message that says what to do, its exit code, nothing harmed.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use std::{fs, path::Path, process::Command};

use common::{Place, not_run};

/// A machine that runs the guest with a program that succeeds.
const MACHINE: &str = r#"exec "$WILCO_EXE" guest "$WILCO_GUEST" --incarnation "$WILCO_INCARNATION" \
    --exec cat --journal "$WILCO_GUEST.db""#;

#[test]
fn malformed_lines_are_placed_and_harm_no_other() {
    let place = Place::new();
    place.script("machine", MACHINE);
    place.file(
        "fleet.jsonl",
        concat!(
            "{\"id\":\"good-1\",\"prepare\":{\"n\":1}}\n",
            "{\"id\":\"bad-1\",\"prepare\":{\"n\":1},\"deadlines\":{\"boot\":\"soon\"}}\n",
            "{\"id\":\"bad-2\",\"prepare\":{\"n\":1},\"polcy\":\"ping_first\"}\n",
            "{\"id\":\"bad-3\",\"prepare\":{\"n\":\n",
            "{\"id\":\"good-1\",\"prepare\":{\"n\":2}}\n",
            "{\"id\":\"good-2\",\"prepare\":{\"n\":3}}\n",
        ),
    );
    let run = place.run(["provision", "fleet.jsonl", "--spawn", "./machine", "--json"]);
    run.expect(
        2,
        &[
            "line 2, column 53: expected a duration such as \"500ms\", \"90s\" or \"10m\", found \"soon\"",
            "line 3, column 39: unknown field `polcy`, expected one of `id`, `prepare`, `deadlines`",
            "line 4, column 29: EOF while parsing",
            "line 5, column 7: line 1 has the guest \"good-1\" already",
        ],
    );
    let events = run.json();
    let outcomes: Vec<_> = events
        .iter()
        .filter(|event| event["event"] == "outcome")
        .collect();
    assert_eq!(outcomes.len(), 2, "{events:?}");
    assert!(
        outcomes.iter().all(|event| event["outcome"] == "succeeded"),
        "{outcomes:?}"
    );
    let malformed = events.iter().filter(|event| event["event"] == "malformed");
    assert_eq!(malformed.count(), 4);
}

#[test]
fn a_fleet_file_that_cannot_be_read_is_said() {
    let place = Place::new();
    place
        .run(["provision", "nothing.jsonl"])
        .expect(10, &["nothing.jsonl", "No such file"]);
    // Root reads what it likes, but a directory is no file for root either.
    fs::create_dir(place.path().join("dir.jsonl")).unwrap();
    place
        .run(["provision", "dir.jsonl"])
        .expect(10, &["dir.jsonl", "directory"]);
    place.file("empty.jsonl", "\n\n");
    place
        .run(["provision", "empty.jsonl"])
        .expect(2, &["no guest"]);
    assert!(!place.path().join("wilco.db").exists());
}

#[test]
fn urls_are_read_strictly() {
    let place = Place::new();
    let queues = |url: &str| place.run(["queues", "--broker", url]);
    queues("kafka://host/").expect(2, &["\"kafka\"", "sqlite:, memory:"]);
    queues("sqlite:wilco.db?snyc=full").expect(2, &["\"snyc\""]);
    queues("sqlite://wilco.db").expect(2, &["sqlite:relative/path"]);
    queues("wilco.db").expect(2, &["not a broker URL"]);
    queues("memory:").expect(2, &["inside one process", "sqlite:PATH"]);
    let secret = queues("amqp://user:hunter2@127.0.0.1:1/");
    if cfg!(feature = "rabbitmq") {
        secret.expect(3, &["127.0.0.1:1"]);
    } else {
        secret.expect(2, &["amqp: URLs", "feature rabbitmq"]);
    }
    assert!(!secret.stderr.contains("hunter2"), "{secret:?}");
}

#[test]
fn programs_that_cannot_run_are_said_before_anything_is_attached() {
    let place = Place::new();
    place.file("text", "not a program");
    place.file("fleet.jsonl", "{\"id\":\"a\",\"prepare\":1}");
    place
        .run(["guest", "a", "--exec", "./nothing"])
        .expect(2, &["no program ./nothing"]);
    place
        .run(["guest", "a", "--exec", "./text"])
        .expect(2, &["chmod +x"]);
    place
        .run(["guest", "a", "--exec", "text"])
        .expect(2, &["did you mean ./text?"]);
    place
        .run(["guest", "a", "--exec", "cat", "--on", "list"])
        .expect(2, &["KIND=PROGRAM"]);
    let spawn = place.run(["provision", "fleet.jsonl", "--spawn", "./nothing"]);
    spawn.expect(2, &["no program ./nothing"]);
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 2);
}

#[test]
fn a_database_of_another_program_is_left_as_it_is() {
    let place = Place::new();
    let foreign = place.path().join("foreign.db");
    let database = rusqlite::Connection::open(&foreign).unwrap();
    database
        .execute_batch(
            "PRAGMA application_id = 7; CREATE TABLE theirs (x); INSERT INTO theirs VALUES (1);",
        )
        .unwrap();
    database.close().unwrap();
    let before = fs::read(&foreign).unwrap();
    place
        .run(["queues", "--broker", "sqlite:foreign.db"])
        .expect(10, &["foreign.db"]);
    place.file("fleet.jsonl", "{\"id\":\"a\",\"prepare\":1}");
    let records = place.run(["provision", "fleet.jsonl", "--records", "foreign.db"]);
    records.expect(10, &["foreign.db"]);
    let journal = place.run(["guest", "a", "--exec", "cat", "--journal", "foreign.db"]);
    journal.expect(10, &["foreign.db"]);
    assert_eq!(fs::read(&foreign).unwrap(), before);

    place.file(
        "text.db",
        "this is not a database, it is a text of some length",
    );
    place
        .run(["queues", "--broker", "sqlite:text.db"])
        .expect(10, &["text.db"]);
}

#[test]
fn a_directory_in_place_of_a_file_is_said() {
    let place = Place::new();
    fs::create_dir(place.path().join("wilco.db")).unwrap();
    place.run(["queues"]).expect(10, &["wilco.db"]);
    let missing = place.run(["queues", "--broker", "sqlite:no/such/dir/wilco.db"]);
    missing.expect(10, &["no/such/dir"]);
}

#[test]
fn what_is_not_there_has_its_own_code() {
    let place = Place::new();
    place.run(["doctor"]).expect(0, &[]);
    place.run(["ping", "nobody"]).expect(5, &["nobody"]);
    place.run(["explain", "nobody"]).expect(7, &["no records"]);
    place
        .run(["dead", "list", "nobody"])
        .expect(7, &["wilco.q.nobody.1"]);
    place
        .run(["call", "nobody", "list", "{"])
        .expect(2, &["not JSON"]);
    place
        .run(["doctor", "memory:", "--require", "process"])
        .expect(9, &["memory"]);
    place.run(["doctor", "--require", "power"]).expect(0, &[]);
    place
        .run(["ping", "nobody", "--timeout", "soon"])
        .expect(2, &["500ms, 90s or 10m"]);
    let mut logged = place.wilco(["queues"]);
    let logged = logged.env("WILCO_LOG", "wilco=loud").output().unwrap();
    assert_eq!(logged.status.code(), Some(2), "{logged:?}");
    let json = place.run(["ping", "nobody", "--json"]);
    let error: serde_json::Value = serde_json::from_str(&json.stderr).unwrap();
    assert_eq!(error["exit"], 5);
}

#[test]
fn a_disk_that_is_full_at_the_start_is_said_and_is_no_harm_once_there_is_room() {
    let script = r#"
        mount -t tmpfs -o size=4m none disk
        export WILCO_BROKER=sqlite:disk/wilco.db
        "$WILCO" doctor >/dev/null
        dd if=/dev/zero of=disk/filler bs=4k 2>/dev/null
        "$WILCO" provision fleet.jsonl --spawn ./machine; echo "full: $?"
        rm disk/filler
        "$WILCO" provision fleet.jsonl --spawn ./machine; echo "free: $?"
    "#;
    let Some(place) = in_a_namespace("a disk full at the start", script) else {
        return;
    };
    let (output, error) = (place.read("out"), place.read("err"));
    assert!(output.contains("full: 10"), "{output}\n{error}");
    assert!(output.contains("free: 0"), "{output}\n{error}");
    assert!(!error.contains("panicked"), "{error}");
    let said = error.lines().filter(|line| line.starts_with("wilco: "));
    assert_eq!(said.clone().count(), 1, "{error}");
    assert!(
        said.clone().all(|line| line.contains("disk full")),
        "{error}"
    );
}

#[test]
fn a_disk_that_fills_up_under_way_loses_nothing() {
    let script = r#"
        mount -t tmpfs -o size=4m none disk
        export WILCO_BROKER=sqlite:disk/wilco.db HOLD="$PWD/hold"
        touch hold
        "$WILCO" provision queued.jsonl --spawn ./held --json >events &
        provision=$!
        until [ "$(grep -c '"sent"' events)" = 3 ]; do sleep 0.1; done
        dd if=/dev/zero of=disk/filler bs=4k 2>/dev/null
        rm hold
        sleep 2
        "$WILCO" status >/dev/null; echo "status: $?"
        rm disk/filler
        wait "$provision"; echo "provision: $?"
    "#;
    let Some(place) = in_a_namespace("a disk that fills up", script) else {
        return;
    };
    let (output, error) = (place.read("out"), place.read("err"));
    assert!(output.contains("status: 0"), "{output}\n{error}");
    assert!(output.contains("provision: 0"), "{output}\n{error}");
    let succeeded = "\"outcome\":\"succeeded\"";
    assert_eq!(
        place.read("events").matches(succeeded).count(),
        3,
        "{output}\n{error}"
    );
}

#[test]
fn a_read_only_directory_is_said() {
    let script = r#"
        set -e
        mount -t tmpfs none disk
        "$WILCO" doctor sqlite:disk/old.db >/dev/null
        mount -o remount,ro disk
        set +e
        "$WILCO" queues --broker sqlite:disk/new.db; echo "new: $?"
        "$WILCO" queues --broker sqlite:disk/old.db; echo "old: $?"
    "#;
    let Some(place) = in_a_namespace("a read-only directory", script) else {
        return;
    };
    let (output, error) = (place.read("out"), place.read("err"));
    assert!(
        output.contains("new: 10") && output.contains("old: 10"),
        "{output}\n{error}"
    );
    assert!(
        error.contains("new.db") && error.contains("old.db"),
        "{error}"
    );
}

/// Runs a script as root of a mount namespace of its own, so that its mounts end with it.
fn in_a_namespace(what: &str, script: &str) -> Option<Place> {
    let place = Place::new();
    place.script("machine", MACHINE);
    place.file("fleet.jsonl", "{\"id\":\"a\",\"prepare\":1}");
    place.script(
        "held",
        &format!("while [ -e \"$HOLD\" ]; do sleep 0.1; done\n{MACHINE}"),
    );
    let payload = "x".repeat(20_000);
    let line = |id| {
        format!("{{\"id\":\"{id}\",\"prepare\":\"{payload}\",\"policy\":\"enqueue_first\"}}\n")
    };
    place.file("queued.jsonl", ["a", "b", "c"].map(line).concat());
    fs::create_dir(place.path().join("disk")).unwrap();
    let script = place.script("script", script);
    let unshare = |program: &Path| {
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--map-root-user"])
            .arg(program)
            .current_dir(place.path());
        command.env("WILCO", env!("CARGO_BIN_EXE_wilco"));
        command
    };
    let possible = place.script("possible", "mount -t tmpfs none disk");
    match unshare(&possible).output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            not_run(what, String::from_utf8_lossy(&output.stderr).trim());
            return None;
        }
        Err(error) => {
            not_run(what, &format!("unshare: {error}"));
            return None;
        }
    }
    let output = unshare(&script).output().unwrap();
    place.file("out", output.stdout);
    place.file("err", output.stderr);
    Some(place)
}
