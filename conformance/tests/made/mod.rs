//! A report made by hand, with one of everything, and with what a hostile broker might say.

use wilco_conformance::{
    report::{
        Broker, Finding, Line, LineResult, Report, Run, Sabotaged,
        timeline::{Fault, Timeline},
    },
    saboteurs,
};

/// What wants to be markup, a very long word, and text that turns around what follows.
pub(crate) const HOSTILE: &str = "</script><script>document.title='x'</script><img src=x onerror=alert(1)> \
     \" ' ` & \u{202e}drawkcab\0 \
     wwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwww";

pub(crate) fn report() -> Report {
    let mut report = Report::default();
    report.runs.push(Run {
        backend: "rabbitmq".into(),
        broker: broker("RabbitMQ 3.10.8"),
        started: "2026-04-01T12:00:00Z".into(),
        ms: 61_000,
        seed: 7,
        suite: "0.1.0".into(),
        machine: "linux x86_64, 2 cores".into(),
        lines: vec![
            line("q1_a", "Q1", passed()),
            line("q2_a", "Q2", passed()),
            line("q2_b", "Q2", not_run(HOSTILE)),
            line("p1_a", "P1", failed()),
            line("c1_a", "C1", not_run("no second process")),
            Line {
                timeline: Some(timeline()),
                ..line("f1_a", "F1", passed())
            },
        ],
        not_asked: vec!["q3_a".into()],
    });
    report.runs.push(Run {
        backend: "amqps://user:***@a-broker-with-a-long-name.example.org:5671,b:5671/vhost".into(),
        broker: Broker {
            problem: Some(HOSTILE.into()),
            ..broker(HOSTILE)
        },
        lines: vec![line("q1_a", "Q1", passed())],
        ..Run::default()
    });
    for (n, saboteur) in saboteurs::all().iter().take(3).enumerate() {
        let mut one = Sabotaged::new(saboteur, "reference");
        if n > 0 {
            one.checks
                .push(line(saboteur.caught_by, &one.law, failed()));
        }
        report.saboteurs.push(one);
    }
    report
}

fn broker(version: &str) -> Broker {
    Broker {
        version: version.into(),
        level: "power".into(),
        process_crash: "safe".into(),
        power_loss: "unknown".into(),
        node_loss: "unsafe".into(),
        findings: vec![Finding {
            setting: "queue_type".into(),
            value: None,
            meaning: HOSTILE.into(),
            advice: Some("use a quorum queue".into()),
        }],
        problem: None,
    }
}

fn line(check: &str, law: &str, result: LineResult) -> Line {
    Line {
        check: check.into(),
        law: law.into(),
        title: "what it shows, in a line that is long enough to be broken on a phone".into(),
        seed: 7,
        ms: 1_234,
        result,
        timeline: None,
    }
}

fn passed() -> LineResult {
    LineResult::Passed {
        evidence: [("publishes".into(), 1_000), ("kills".into(), 50)].into(),
    }
}

fn not_run(reason: &str) -> LineResult {
    LineResult::NotRun {
        reason: reason.into(),
    }
}

fn failed() -> LineResult {
    LineResult::Failed {
        expected: "a clean ledger".into(),
        seen: format!("lost 1\n{HOSTILE}"),
        again: "wilco-conformance run --broker rabbitmq --check p1_a --seed 7".into(),
    }
}

fn timeline() -> Timeline {
    let lane = |every: u64| (0..120).map(|n| n % every * 3).collect::<Vec<_>>();
    let fault = |at: f64| Fault {
        at,
        what: HOSTILE.into(),
        next_confirm: Some(300.0),
        next_delivery: (at < 3_000.0).then_some(450.0),
    };
    Timeline {
        ms: 6_000.0,
        confirmed: lane(7),
        unconfirmed: lane(2),
        delivered: lane(5),
        redelivered: lane(3),
        acked: lane(6),
        recovered: lane(2),
        faults: [100.0, 2_000.0, 5_900.0].map(fault).into(),
        outages: vec![(2_000.0, 2_600.0)],
        more_faults: 0,
    }
}
