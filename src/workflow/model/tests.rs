//! What was checked, and within which bounds.
//!
//! `WILCO_MODEL_BOUND=2` (or more) raises every bound that is at least 1 by so much less one: minutes to
//! hours, and gigabytes.

use std::{collections::HashSet, sync::Mutex, time::Instant};

use stateright::{Checker as _, HasDiscoveries, Model as _};

use super::{Left, Workflow, property};
use crate::workflow::{guest::Interrupted, record::SendPolicy};

/// One guest, one control plane, one of each kind of fault.
fn small() -> Workflow {
    Workflow {
        policies: vec![SendPolicy::PingFirst, SendPolicy::EnqueueFirst],
        interrupted: Interrupted::Fail,
        machines: 1,
        taskmanagers: 1,
        dedup: false,
        left: Left::default(),
        most_copies: 2,
        handler_may_fail: false,
        sabotage: None,
        unchecked: Vec::new(),
        ends: [Mutex::new(HashSet::new()), Mutex::new(HashSet::new())],
    }
}

fn check(name: &str, workflow: Workflow) {
    let began = Instant::now();
    let left = workflow.left;
    let mut builder = workflow
        .checker()
        .threads(1)
        .finish_when(HasDiscoveries::AnyFailures);
    if let Some(limit) = std::env::var("LIMIT")
        .ok()
        .and_then(|limit| limit.parse().ok())
    {
        builder = builder.target_state_count(limit);
    }
    let checked = builder.spawn_bfs().join();
    println!(
        "model {name}: {} states, {} steps, depth {}, {:.1?}; bounds {left:?}",
        checked.unique_state_count(),
        checked.state_count(),
        checked.max_depth(),
        began.elapsed(),
    );
    for (name, path) in checked.discoveries() {
        let property = checked.model().property(name);
        if property.expectation.discovery_is_failure() {
            println!("VIOLATED {name}");
            let world = path.last_state().clone();
            for action in path.into_actions() {
                println!("  {action:?}");
            }
            println!("  {world:#?}");
        }
    }
    let found = checked.discoveries();
    let failures = found.into_keys().filter(|name| {
        let property = checked.model().property(name);
        property.expectation.discovery_is_failure()
    });
    assert_eq!(failures.count(), 0);
}

#[test]
fn probe() {
    let env = |name: &str| {
        std::env::var(name)
            .ok()
            .and_then(|v| v.parse().ok())
            .unwrap_or(0)
    };
    let mut workflow = small();
    workflow.left = Left {
        taskmanager_kills: env("TK"),
        guest_kills: env("GK"),
        network: env("NET"),
        operator: env("OP"),
        give_ups: env("GU"),
    };
    let skip = std::env::var("SKIP").unwrap_or_default();
    for (letter, name) in [
        ('1', property::ONE_OUTCOME),
        ('2', property::ONE_RUN),
        ('3', property::NOT_RUN),
        ('4', property::RUN),
        ('5', property::NO_LATE_START),
        ('6', property::NEVER_STUCK),
        ('7', property::NO_WAIT),
    ] {
        if skip.contains(letter) {
            workflow.unchecked.push(name);
        }
    }
    workflow.handler_may_fail = env("FAIL") > 0;
    if env("AGAIN") > 0 {
        workflow.interrupted = Interrupted::RunAgain;
    }
    workflow.taskmanagers = env("TMS").max(1).into();
    workflow.machines = env("MS").max(1).into();
    workflow.most_copies = (env("COPIES").max(2)).into();
    workflow.dedup = env("DEDUP") > 0;
    check("probe", workflow);
}
