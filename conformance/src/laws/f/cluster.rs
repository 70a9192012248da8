//! F6: a broker of several nodes, and each of them killed.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use super::{
    back,
    crew::Crew,
    kill::{at_work, burst, guest_here},
};
use crate::{
    check::{CheckError, CheckResult, Cx},
    harness::Cluster,
    ledger::{Event, History, Minimum},
    support::*,
    workload::{finish, verdict},
};

/// Publishers and a guest at work, questions asked, and a node killed: by turns the leader and another.
/// While the node is down everybody is back at work by himself, within the bounds that broker and backend
/// state; then the node comes back, and the next one goes. Nothing confirmed is lost.
pub async fn f6_any_node_killed_loses_nothing(cx: &Cx) -> CheckResult {
    const PUBLISHERS: usize = 2;
    let cluster = cx.server.cluster()?;
    let kills = cx.options.kills.clamp(2, 4);
    let history = cx.history();
    let mut rng = cx.rng();
    let control = cx.connect().await?;
    let mut crew = Crew::hire(cx, cx.connect().await?, cx.connect().await?, "f6").await?;
    let names = [
        limited(&*control, "f6-a", 10_000).await?,
        limited(&*control, "f6-b", 10_000).await?,
    ];
    let over = Arc::new(AtomicBool::new(false));
    let mut tasks = Vec::new();
    for n in 0..PUBLISHERS {
        tasks.push(burst(cx, n, names.clone(), &history, &over, rng.fork()).await?);
    }
    tasks.push(guest_here(cx, &names[0], &history, &over, rng.fork()).await?);
    let faulty = async {
        for round in 0..kills {
            working(cx, &mut crew, &history).await?;
            let leader = cluster.leader(&names[0]).await?;
            let node = match round % 2 {
                0 => leader,
                _ => (leader + rng.usize(1..cluster.nodes())) % cluster.nodes(),
            };
            lose(cx, cluster, node, leader, &mut crew, &history).await?;
        }
        working(cx, &mut crew, &history).await
    };
    let went = faulty.await;
    over.store(true, Ordering::Relaxed);
    join_all(tasks).await?;
    went?;
    for name in &names {
        finish(cx, &*control, name, &history).await?;
    }
    let (asked, served) = (crew.office.history.clone(), crew.office.name.clone());
    crew.dismiss().await?;
    finish(cx, &*control, &served, &asked).await?;
    verdict(
        cx,
        &asked,
        Minimum {
            confirmed: kills as u64 * 2,
            faults: 0,
        },
    )?;
    let minimum = Minimum {
        confirmed: kills as u64 * 100,
        faults: kills as u64,
    };
    Ok(verdict(cx, &history, minimum)?.and("nodes", cluster.nodes()))
}

/// Kills a node, sees everybody at work without it, and starts it again.
async fn lose(
    cx: &Cx,
    cluster: &dyn Cluster,
    node: usize,
    leader: usize,
    crew: &mut Crew,
    history: &History,
) -> Result<(), CheckError> {
    let role = if node == leader {
        "the leader"
    } else {
        "no leader"
    };
    let what = format!("node {node} is killed, {role}");
    for history in [history, &crew.office.history] {
        history.note(Event::Fault { what: what.clone() });
        history.note(Event::Down);
    }
    cluster.kill(node).await?;
    let without = working(cx, crew, history).await;
    let in_context = |error: CheckError| match error {
        CheckError::Failed(failure) => CheckError::failed(
            failure.expected.clone(),
            format!("{what}: {}", failure.seen),
        ),
        other => other,
    };
    without.map_err(in_context)?;
    cluster.start(node).await?;
    for history in [history, &crew.office.history] {
        history.note(Event::Up);
    }
    Ok(())
}

/// A message from end to end and a ping, and everybody else at work too.
async fn working(cx: &Cx, crew: &mut Crew, history: &History) -> Result<(), CheckError> {
    let within = cx.server.cluster()?.failover() + back(cx);
    let me = std::process::id();
    crew.work(within).await?;
    at_work(history, &[(me, true), (me, false)], within).await
}
