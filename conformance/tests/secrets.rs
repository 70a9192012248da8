//! Passwords, tokens and keys of a whole run are looked for in everything that it told (S4): every log line
//! at the finest level, every error, answer and report.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[path = "../../tests/common/mod.rs"]
mod common;

use std::{
    fs,
    process::{Command, Stdio},
};

use common::{Place, Running, until};
use wilco_conformance::{harness::Use, harnesses};

/// In the payload: a prepare carries passwords as a rule.
const PAYLOAD: &str = "root-password-of-vm-1";

/// What was told so far.
#[derive(Default)]
struct Told(String);

impl Told {
    /// Runs the command to its end with every log line on, and keeps what it told.
    fn run(&mut self, place: &Place, args: &[&str]) -> Option<i32> {
        self.keep(start(place, args))
    }

    /// Waits for its end, and returns its exit code.
    fn keep(&mut self, running: Running) -> Option<i32> {
        let ended = running.ended();
        self.0.push_str(&ended.stdout);
        self.0.push_str(&ended.stderr);
        ended.code
    }
}

fn start(place: &Place, args: &[&str]) -> Running {
    let mut command: Command = place.wilco(args);
    command
        .env("WILCO_LOG", "trace")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    Running::of(command.spawn().unwrap())
}

/// The password of a URL, and the secrets in the files that it names.
fn secrets_of(url: &str) -> Vec<String> {
    let mut secrets = vec![];
    if let Some((user, _)) = url
        .split_once("://")
        .and_then(|(_, rest)| rest.split_once('@'))
        && let Some((_, password)) = user.split_once(':')
    {
        secrets.push(password.to_owned());
    }
    let options = url.split_once('?').map_or("", |(_, options)| options);
    for (_, value) in options.split('&').filter_map(|it| it.split_once('=')) {
        let text = fs::read_to_string(value).unwrap_or_default();
        let is_secret =
            |line: &&str| line.len() > 40 && !line.contains(' ') && !line.starts_with('-');
        secrets.extend(text.lines().filter(is_secret).map(str::to_owned));
    }
    secrets
}

fn a_whole_run_tells_no_secret(admin: &str) {
    let control = Place::on(Some(admin));
    let line = format!(r#"{{"id":"vm-1","prepare":{{"root":"{PAYLOAD}"}}}}"#);
    control.file("fleet.jsonl", line);
    let mut told = Told::default();
    let provision = start(&control, &["provision", "fleet.jsonl", "--credentials"]);
    until("the guest is waited for", || {
        control
            .run(["status", "vm-1"])
            .stdout
            .contains("awaiting guest")
    });

    let machine = tempfile::tempdir().unwrap();
    let at = machine.path().to_str().unwrap();
    let issue = ["credentials", "issue", "vm-1", "--json", "--directory", at];
    let issued = start(&control, &issue).ended();
    assert_eq!(issued.code, Some(0), "{}", issued.stderr);
    told.0.push_str(&issued.stderr);
    let credential = &issued.json()[0];
    for file in credential["files"].as_array().unwrap() {
        let content = file["content"].as_str().unwrap();
        fs::write(file["path"].as_str().unwrap(), content).unwrap();
    }
    let url = credential["broker"].as_str().unwrap();
    let mut secrets = secrets_of(url);
    assert!(!secrets.is_empty(), "no secret was issued");
    // The administrator of RabbitMQ's private server is `guest`, like half of all words here.
    secrets.extend(
        secrets_of(admin)
            .into_iter()
            .filter(|secret| secret != "guest"),
    );
    secrets.push(PAYLOAD.into());

    let guest = Place::on(Some(url));
    guest.script("prepare", "cat >/dev/null; echo '{\"port\":3306}'");
    let agent = start(&guest, &["guest", "vm-1", "--exec", "./prepare"]);
    assert_eq!(told.keep(provision), Some(0), "{}", told.0);
    for args in [
        &["ping", "vm-1"][..],
        &["call", "vm-1", "no_such_call"],
        &["status", "--json"],
        &["explain", "vm-1"],
        &["queues"],
        &["dead", "list", "vm-1"],
        &["doctor"],
        &["credentials", "show", "vm-1"],
        &["credentials", "revoke", "vm-1"],
    ] {
        told.run(&control, args);
    }
    // Refused, out of reach, and misspelt.
    assert_eq!(told.run(&guest, &["doctor"]), Some(3));
    let colon = url.rfind(':').unwrap();
    let port = url[colon + 1..].find(|c: char| !c.is_ascii_digit());
    let end = port.map_or(url.len(), |at| colon + 1 + at);
    let nobody = format!("{}:1{}", &url[..colon], &url[end..]);
    assert_eq!(told.run(&Place::on(Some(&nobody)), &["doctor"]), Some(3));
    let separator = if url.contains('?') { '&' } else { '?' };
    let misspelt = Place::on(Some(&format!("{url}{separator}replicsa=3")));
    assert_eq!(told.run(&misspelt, &["doctor"]), Some(2));
    agent.signal("TERM");
    told.keep(agent);

    assert!(
        told.0.contains("TRACE"),
        "the logs are not there:\n{}",
        told.0
    );
    for secret in secrets {
        let found = told.0.lines().find(|line| line.contains(&secret));
        assert_eq!(found, None, "{secret} is told");
    }
}

/// The administrator's password comes from the environment, and a machine that this run starts has a
/// credential of its own there and nothing of the administrator's (S1).
fn a_machine_gets_its_own_credential_alone(admin: &str) {
    let secret = secrets_of(admin).remove(0);
    let (place, url) = (
        Place::on(None),
        admin.replacen(&format!(":{secret}@"), "@", 1),
    );
    place.script(
        "machine",
        "env >machine.env\nexec \"$WILCO_EXE\" guest \"$WILCO_GUEST\" --exec ./prepare",
    );
    place.script("prepare", "cat >/dev/null; echo '{}'");
    place.file("fleet.jsonl", r#"{"id":"vm-1","prepare":{}}"#);
    let run = [
        "provision",
        "fleet.jsonl",
        "--credentials",
        "--spawn",
        "./machine",
    ];
    let ended = place
        .wilco(run)
        .env("WILCO_BROKER", url)
        .env("WILCO_RECORDS", "records.db")
        .env("WILCO_BROKER_PASSWORD", &secret)
        .output()
        .unwrap();
    assert!(ended.status.success(), "{ended:?}");
    let environment = place.read("machine.env");
    assert!(environment.contains("WILCO_BROKER="), "{environment}");
    assert!(!environment.contains(&secret), "{environment}");
}

async fn on(name: &str, test: fn(&str)) {
    let harness = harnesses::find(name).unwrap();
    let server = harness.start(Use::Credentials).await.unwrap();
    let admin = server.admin_url().unwrap();
    tokio::task::spawn_blocking(move || test(&admin))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s4_redis_tells_no_secret() {
    on("redis", a_whole_run_tells_no_secret).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s1_a_spawned_machine_gets_its_own_credential_alone() {
    on("redis", a_machine_gets_its_own_credential_alone).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s4_nats_tells_no_secret() {
    on("nats", a_whole_run_tells_no_secret).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s4_rabbitmq_tells_no_secret() {
    on("rabbitmq", a_whole_run_tells_no_secret).await;
}
