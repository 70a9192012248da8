//! The example that embeds a taskmanager behind HTTP, tested as a service: started, provisioned through,
//! killed, started again.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use common::{Place, Running, until};
use serde_json::{Value, json};

const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

struct Service {
    process: Running,
    url: String,
    http: ureq::Agent,
}

impl Service {
    fn start(place: &Place) -> Self {
        let tests = std::env::current_exe().unwrap();
        let program = tests.ancestors().nth(2).unwrap().join("examples/service");
        assert!(
            program.exists(),
            "{} is missing: cargo build --example service --features metrics makes it",
            program.display()
        );
        let mut child = Command::new(program)
            .args(["sqlite:broker.db", "127.0.0.1:0"])
            .current_dir(place.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let told = BufReader::new(child.stderr.take().unwrap()).lines().next();
        let process = Running::of(child);
        let told = told.expect("it listens, or says why not").unwrap();
        let url = told.strip_prefix("listening on ").expect(&told).to_owned();
        let http = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(common::PATIENCE))
            .build()
            .into();
        Self { process, url, http }
    }

    fn get(&self, path: &str) -> (u16, String) {
        let answer = self.http.get(format!("{}{path}", self.url)).call();
        read(answer)
    }

    fn put(&self, path: &str, body: &Value) -> (u16, String) {
        let request = self.http.put(format!("{}{path}", self.url));
        read(request.header("traceparent", TRACE).send_json(body))
    }

    fn delete(&self, path: &str) -> (u16, String) {
        read(self.http.delete(format!("{}{path}", self.url)).call())
    }

    fn guest(&self, id: &str) -> Value {
        serde_json::from_str(&self.get(&format!("/guests/{id}")).1).unwrap()
    }

    fn kill(self) {
        self.process.signal("KILL");
        self.process.ended();
    }
}

fn read(answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> (u16, String) {
    let mut answer = answer.unwrap();
    (
        answer.status().as_u16(),
        answer.body_mut().read_to_string().unwrap(),
    )
}

#[test]
fn a_service_is_killed_and_goes_on() {
    let place = Place::on(Some("sqlite:broker.db"));
    place.script(
        "prepare",
        "cat >payload; echo \"$TRACEPARENT\" >trace; echo '{\"port\":3306}'",
    );
    let prepare = json!({"datastore": "mysql", "version": "8.0"});

    let service = Service::start(&place);
    assert_eq!(service.get("/health/live").0, 200);
    let (status, health) = service.get("/health/ready");
    assert_eq!(status, 200, "{health}");
    assert_eq!(service.get("/guests/vm-1").0, 404);
    let too_long = format!("/guests/{}", "x".repeat(300));
    assert_eq!(service.put(&too_long, &prepare).0, 400);
    assert_eq!(service.delete("/guests/vm-1").0, 400);
    let (status, answer) = service.put("/guests/vm-1", &prepare);
    assert_eq!(status, 202, "{answer}");
    // Given up before any machine came.
    assert_eq!(service.put("/guests/vm-2", &prepare).0, 202);
    let (status, answer) = service.delete("/guests/vm-2");
    assert!(status == 200 && answer.contains("Revoked"), "{answer}");
    assert_eq!(service.guest("vm-2")["state"], "not_delivered");
    until("it waits for the guest", || {
        service.guest("vm-1")["state"] == "awaiting_guest"
    });
    let (_, metrics) = service.get("/metrics");
    for line in [
        "wilco_guests{state=\"awaiting_guest\"} 1",
        "wilco_revocations_total{reason=\"revoked\"} 1",
        "wilco_outcomes_total{outcome=\"not_delivered\",reason=\"revoked\"} 1",
    ] {
        assert!(metrics.contains(line), "no {line} in\n{metrics}");
    }
    service.kill();

    let guest = place.start(["guest", "vm-1", "--exec", "./prepare"]);
    let service = Service::start(&place);
    until("the guest is prepared", || {
        service.guest("vm-1")["state"] == "succeeded"
    });
    let told = service.guest("vm-1");
    assert_eq!(told["outcome"]["result"]["port"], 3306, "{told}");
    assert_eq!(told["trace"]["traceparent"], TRACE);
    assert!(place.read("payload").contains("mysql"));
    // One trace for both ends.
    assert_eq!(place.read("trace").trim(), TRACE);
    // The same again is no second prepare; another one is refused.
    assert_eq!(service.put("/guests/vm-1", &prepare).0, 202);
    assert_eq!(
        service
            .put("/guests/vm-1", &json!({"datastore": "redis"}))
            .0,
        409
    );
    until("it is ready again", || {
        service.get("/health/ready").0 == 200
    });
    let (_, metrics) = service.get("/metrics");
    for line in [
        "wilco_outcomes_total{outcome=\"succeeded\",reason=\"\"} 1",
        "wilco_prepares_sent_total 1",
        "wilco_reports_total{event=\"done\"}",
        "wilco_stage_seconds_count{state=\"awaiting_guest\"} 1",
        "wilco_guests{state=\"awaiting_guest\"} 0",
    ] {
        assert!(metrics.contains(line), "no {line} in\n{metrics}");
    }
    drop(guest);
    service.process.signal("INT");
    service.process.ended().expect(0, &[]);
}
