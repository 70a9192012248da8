//! A fleet of real processes on any broker, and what has to hold of it however it is interrupted.
//!
//! How often a prepare ran is counted by the machines' own log, in which wilco has no hand.
#![allow(dead_code, reason = "each test binary uses some of it")]

use std::{
    collections::BTreeMap,
    env, fs,
    process::Stdio,
    thread::sleep,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};

use super::{Ended, PATIENCE, Place, Running, example, signal};

/// A directory in which a fleet runs, and whose machines end with it.
pub(crate) struct Fleet {
    pub(crate) place: Place,
    pub(crate) file: std::path::PathBuf,
}

impl Fleet {
    /// On the broker at this URL; without one, on an embedded broker in the fleet's directory.
    pub(crate) fn new(
        broker: Option<&str>,
        file: impl FnOnce(&Place) -> std::path::PathBuf,
    ) -> Self {
        let place = Place::on(broker);
        let file = file(&place);
        Self { place, file }
    }

    pub(crate) fn start(&self) -> Running {
        let machine = example("machine.sh");
        let args = ["provision".as_ref(), self.file.as_os_str()];
        let mut command = self.place.wilco(args);
        command
            .arg("--spawn")
            .arg(machine)
            .arg("--json")
            .env("ORPHAN_SECONDS", "30");
        Running::of(
            command
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap(),
        )
    }

    /// The outcome of each guest: its name and its reason's kind.
    pub(crate) fn outcomes(run: &Ended) -> BTreeMap<String, (String, Value)> {
        let events = run.json();
        let ends = events.iter().filter(|event| event["event"] == "outcome");
        let outcome = |end: &Value| {
            let name = |field: &str| end[field].as_str().unwrap().to_owned();
            (
                name("guest"),
                (name("outcome"), end["reason"]["kind"].clone()),
            )
        };
        ends.map(outcome).collect()
    }

    /// How often each guest's prepare ran.
    pub(crate) fn ran(&self) -> BTreeMap<String, u32> {
        let mut ran = BTreeMap::new();
        for line in self.place.read("fleet/runs.log").lines() {
            let guest = line.split(' ').next().unwrap();
            *ran.entry(guest.to_owned()).or_default() += 1;
        }
        ran
    }

    /// What has to hold of every run, however often it was interrupted.
    #[track_caller]
    pub(crate) fn check(&self, run: &Ended, context: &str) {
        let ran = self.ran();
        let queues = self.place.run(["queues", "--json"]).json();
        let outcomes = Self::outcomes(run);
        assert!(!outcomes.is_empty(), "{context}: {run:#?}");
        for (guest, (outcome, reason)) in &outcomes {
            let times = ran.get(guest).copied().unwrap_or(0);
            let context = format!("{context}: {guest} {outcome} {reason}, ran {times} times");
            match outcome.as_str() {
                "succeeded" => assert_eq!(times, 1, "{context}"),
                "failed" => assert!(times <= 1, "{context}"),
                "not_delivered" => {
                    assert_eq!(times, 0, "{context}");
                    let queue = format!("wilco.q.{guest}.1");
                    assert!(
                        queues.iter().all(|left| left["name"] != *queue),
                        "{context}"
                    );
                }
                _ => panic!("{context}"),
            }
        }
        // An agent that was started in the last moment says hello to nobody: that waits for the next
        // control plane, which collects it and changes nothing.
        let holds = |queue: &Value| queue["ready"] != 0 || queue["delayed"] != 0;
        let reports = |queue: &Value| queue["name"] == "wilco.r.main";
        let queues = if queues.iter().any(|queue| reports(queue) && holds(queue)) {
            let again = self.start().ended();
            assert_eq!(Self::outcomes(&again), outcomes, "{context}: {again:#?}");
            assert_eq!(self.ran(), ran, "{context}: {again:#?}");
            self.place.run(["queues", "--json"]).json()
        } else {
            queues
        };
        for queue in &queues {
            for field in ["ready", "delayed", "in_flight", "dead"] {
                assert_eq!(queue[field], 0, "{context}: {queue}");
            }
        }
    }

    /// Deletes every guest; nothing of them is left on the broker, which the next round may use too.
    #[track_caller]
    pub(crate) fn clear(&self, outcomes: &BTreeMap<String, (String, Value)>) {
        for guest in outcomes.keys() {
            self.place.run(["delete", guest]).expect(0, &[]);
        }
        let left = self.place.run(["queues", "--json"]).json();
        assert!(
            left.iter().all(|queue| queue["name"] == "wilco.r.main"),
            "{left:?}"
        );
    }

    /// The process that is a guest's agent now.
    pub(crate) fn agent(&self, guest: &str) -> Option<u32> {
        let pid = self
            .place
            .read(&format!("fleet/machines/{guest}.1/guest.pid"));
        let pid = pid.trim().parse().ok()?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        String::from_utf8_lossy(&command)
            .contains(guest)
            .then_some(pid)
    }
}

impl Drop for Fleet {
    /// Ends what an interrupted run left, by the directory that only these processes know.
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Records, journals and the machines' consoles say what no message can.
            self.place.keep();
        }
        let ours = format!(
            "WILCO_FLEET_DIR={}",
            self.place.path().join("fleet").display()
        );
        let Ok(processes) = fs::read_dir("/proc") else {
            return;
        };
        for process in processes.flatten() {
            let environment = fs::read(process.path().join("environ")).unwrap_or_default();
            let ours = environment
                .split(|byte| *byte == 0)
                .any(|line| line == ours.as_bytes());
            if let (true, Ok(pid)) = (ours, process.file_name().to_string_lossy().parse()) {
                signal(pid, "KILL");
            }
        }
    }
}

/// The README's fleet ends as it should, and is not run again.
pub(crate) fn readme_fleet(broker: Option<&str>) {
    let fleet = Fleet::new(broker, |_| example("fleet.jsonl"));
    let start = Instant::now();
    let run = fleet.start().ended();
    let took = start.elapsed();
    run.expect(1, &[]);
    fleet.check(&run, "first run");
    let outcomes = Fleet::outcomes(&run);
    assert!(outcomes.len() >= 20);
    for (guest, (outcome, reason)) in &outcomes {
        let (expected, why) = match guest.as_str() {
            "legacy-mysql-07" => ("not_delivered", "no_consumer"),
            "search-pg-01" | "metrics-pg-01" => ("failed", "guest_failed"),
            _ => ("succeeded", ""),
        };
        assert_eq!(
            (outcome.as_str(), reason.as_str().unwrap_or("")),
            (expected, why),
            "{guest}"
        );
    }
    assert!(took < PATIENCE, "{took:?}");
    let events = run.json();
    let reason = |guest: &str| {
        let end = events
            .iter()
            .find(|end| end["event"] == "outcome" && end["guest"] == guest);
        end.unwrap()["reason"]["detail"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    assert!(reason("search-pg-01").contains("No such device: /dev/vdb"));
    assert!(
        reason("metrics-pg-01").contains("not run a second time"),
        "{}",
        reason("metrics-pg-01")
    );
    // What the machines wrote is what was sent.
    let line = fs::read_to_string(example("fleet.jsonl")).unwrap();
    let line: Value = serde_json::from_str(line.lines().next().unwrap()).unwrap();
    let written = fleet
        .place
        .read("fleet/machines/orders-mysql-01.1/mysql.conf");
    assert_eq!(
        written,
        line["prepare"]["config_contents"].as_str().unwrap()
    );
    // No machine runs any more.
    assert_eq!(fleet.agent("orders-mysql-01"), None);

    let ran = fleet.ran();
    let again = fleet.start().ended();
    again.expect(1, &[]);
    assert_eq!(Fleet::outcomes(&again), outcomes);
    assert_eq!(fleet.ran(), ran);
    for guest in outcomes.keys() {
        let explained = fleet.place.run(["explain", guest]);
        explained.expect(0, &[]);
        assert!(explained.stdout.contains("outcome"), "{}", explained.stdout);
    }
}

/// A small fleet with every way to end, quick enough to be run over and over.
fn small(place: &Place) -> std::path::PathBuf {
    let line = |id: &str, policy: &str, env: Value| {
        let prepare = json!({ "datastore": { "manager": "mysql", "version": "8" },
            "address": "10.0.0.1", "config_contents": "[mysqld]\nport = 3306\n" });
        let prepare: String = serde_json::to_string(&prepare).unwrap();
        let boot = if id == "never" { "2s" } else { "30s" };
        format!(
            r#"{{"id":"{id}","prepare":{prepare},"policy":"{policy}","deadlines":{{"boot":"{boot}"}},"env":{env}}}"#
        )
    };
    let lines = [
        line("plain", "ping_first", json!({})),
        line("slow", "ping_first", json!({ "PREPARE_SECONDS": "1" })),
        line(
            "late",
            "ping_first",
            json!({ "BOOT_DELAY": "1", "PREPARE_SECONDS": "0.5" }),
        ),
        line("eager", "enqueue_first", json!({ "BOOT_DELAY": "0.5" })),
        line("fails", "ping_first", json!({ "FAIL_PREPARE": "no space" })),
        line("never", "ping_first", json!({ "BOOT": "never" })),
    ];
    place.file("fleet.jsonl", lines.join("\n"))
}

const ENDS: [(&str, &str); 6] = [
    ("eager", "succeeded"),
    ("fails", "failed"),
    ("late", "succeeded"),
    ("never", "not_delivered"),
    ("plain", "succeeded"),
    ("slow", "succeeded"),
];

/// The control plane killed at any moment changes no outcome.
pub(crate) fn crash_of_the_control_plane(broker: Option<&str>, few: u64) {
    let mut random = Random::seeded();
    for round in 1..=rounds(few) {
        let fleet = Fleet::new(broker, small);
        let mut killed_at = Vec::new();
        for _ in 0..1 + random.below(3) {
            let run = fleet.start();
            let moment = Duration::from_millis(random.below(2_500));
            sleep(moment);
            run.signal("KILL");
            drop(run);
            killed_at.push(moment);
        }
        let run = fleet.start().ended();
        let context = format!(
            "round {round}, killed at {killed_at:?}, seed {}",
            random.seed
        );
        assert_eq!(run.code, Some(1), "{context}: {run:#?}");
        fleet.check(&run, &context);
        let outcomes = Fleet::outcomes(&run);
        let ends: Vec<_> = outcomes
            .iter()
            .map(|(id, end)| (id.as_str(), end.0.as_str()))
            .collect();
        assert_eq!(ends, ENDS, "{context}: {run:#?}");
        fleet.clear(&outcomes);
    }
}

/// Guests killed at any moment run no prepare twice.
pub(crate) fn crash_of_guests(broker: Option<&str>, few: u64) {
    let mut random = Random::seeded();
    for round in 1..=rounds(few) {
        let fleet = Fleet::new(broker, small);
        let mut run = fleet.start();
        let mut killed = Vec::new();
        let start = Instant::now();
        while !run.has_ended() && start.elapsed() < Duration::from_secs(3) {
            sleep(Duration::from_millis(random.below(150)));
            let guest = ENDS[usize::try_from(random.below(6)).unwrap()].0;
            if let Some(agent) = fleet.agent(guest) {
                signal(agent, "KILL");
                killed.push((guest, start.elapsed()));
            }
        }
        let run = run.ended();
        let context = format!("round {round}, killed {killed:?}, seed {}", random.seed);
        assert_eq!(run.code, Some(1), "{context}: {run:#?}");
        fleet.check(&run, &context);
        let outcomes = Fleet::outcomes(&run);
        for (guest, (outcome, reason)) in &outcomes {
            let expected = ENDS.iter().find(|(id, _)| id == guest).unwrap().1;
            // One that was killed while its prepare ran has failed for that; nothing else changes.
            let interrupted = outcome == "failed" && reason == "guest_failed";
            assert!(
                outcome == expected || interrupted,
                "{context}: {guest} {outcome} {reason}"
            );
        }
        fleet.clear(&outcomes);
    }
}

/// As many as are asked for, or a few.
fn rounds(few: u64) -> u64 {
    let rounds = env::var("WILCO_CRASH_ROUNDS").ok();
    rounds.map_or(few, |rounds| rounds.parse().unwrap())
}

/// Enough randomness for moments, and the same again from its seed (xorshift64*).
struct Random {
    seed: u64,
    state: u64,
}

impl Random {
    fn seeded() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let seed =
            env::var("WILCO_CRASH_SEED").map_or(now.as_nanos() as u64, |s| s.parse().unwrap());
        Self {
            seed,
            state: seed | 1,
        }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        (self.state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % bound
    }
}
