//! W17 to W20, W33, W38, W39: the broker is killed, away, cut off, full, or everybody's at once.

use std::time::{Duration, Instant};

use wilco::{GuestAddress, GuestId, SendPolicy, State};

use super::stage::{Stage, boot, patient};
use crate::{
    actor::{Act, Actor, Order, Stop, Told},
    check::{CheckError, CheckResult, Cx, Evidence},
    laws::f::proxy,
    proxy::Toward,
    support::*,
};

/// The broker restarts with prepare queued: it is there, and run once.
pub async fn w17_a_queued_prepare_outlives_a_restart(cx: &Cx) -> CheckResult {
    let mut stage = Stage::new(cx, "w17").await?;
    let mut control = stage.control().await?;
    let guest = stage.id("queued")?;
    control
        .provision(&guest, SendPolicy::EnqueueFirst, patient())
        .await?;
    control.reaches(&guest, State::Sent).await?;
    match cx.server.faults() {
        Ok(faults) => {
            faults.kill().await?;
            faults.start().await?;
        }
        // No process to kill: what is closed and opened again is all that there is.
        Err(_) => {
            cx.server.restart().await?;
            stage.broker = cx.connect().await?;
        }
    }
    let _machine = stage.guest(&guest).start().await?;
    same("runs", control.succeeds(&guest).await?, 1)?;
    stage.ran(&guest, 1)?;
    stage.clear(&[&guest]).await?;
    Ok(Evidence::of("restarts with prepare queued", 1))
}

/// The broker is down when the taskmanager starts: it says so by its deadline, and what was accepted
/// before is resumed once it is back.
pub async fn w18_a_broker_that_is_down_at_the_start_is_told(cx: &Cx) -> CheckResult {
    let faults = cx.server.faults()?;
    let stage = Stage::new(cx, "w18").await?;
    let guest = stage.id("later")?;
    // A server may take its time to start.
    let unhurried = boot(10 * LONG);
    let mut first = stage.control().await?;
    first
        .provision(&guest, SendPolicy::PingFirst, unhurried)
        .await?;
    first.reaches(&guest, State::AwaitingGuest).await?;
    first.0.kill().await?;
    faults.kill().await?;
    let within = Duration::from_secs(3);
    let started = Instant::now();
    let mut second = stage.control_on("records.db", within, None).await?;
    second.failed("BrokerUnreachable").await?;
    let took = started.elapsed();
    expect(
        took < within + LONG,
        "told by the deadline",
        format!("{took:?}"),
    )?;
    faults.start().await?;
    let mut third = stage.control().await?;
    third
        .provision(&guest, SendPolicy::PingFirst, unhurried)
        .await?;
    let _machine = stage.guest(&guest).start().await?;
    same("runs", third.succeeds(&guest).await?, 1)?;
    stage.ran(&guest, 1)?;
    stage.clear(&[&guest]).await?;
    Ok(Evidence::of("starts without a broker", 1))
}

/// The connection is lost between publish and confirm: the same id is sent again, one effect.
pub async fn w19_a_lost_confirm_leads_to_one_effect(cx: &Cx) -> CheckResult {
    let (faults, proxy) = proxy(cx).await?;
    let near = Stage::new(cx, "w19").await?;
    let far = near.by(faults.url_via(proxy.address()))?;
    let (first, guest) = (near.id("first")?, near.id("confirm")?);
    // The second publish: what a client does before its first one may need an answer.
    let stop = Stop {
        nth: 2,
        ..Stop::before("publish prepare").held()
    };
    let mut control = far.control_stopping(stop).await?;
    control.ready().await?;
    let _other = near.guest(&first).start().await?;
    control
        .provision(&first, SendPolicy::PingFirst, patient())
        .await?;
    control.succeeds(&first).await?;
    let _machine = near.guest(&guest).start().await?;
    control
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    control.held().await?;
    proxy.swallow(Toward::Client);
    control.go().await?;
    // The guest has it, and the taskmanager does not know.
    let deadline = long();
    while near.effects(&guest)?.is_empty() {
        expect(!deadline.has_passed(), "prepare arrives", "it does not")?;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    proxy.heal();
    proxy.reset();
    same("runs", control.succeeds(&guest).await?, 1)?;
    near.ran(&guest, 1)?;
    near.clear(&[&first, &guest]).await?;
    Ok(Evidence::of("confirms lost", 1))
}

/// The node that leads is killed between publish and record, and again while the guest runs: one
/// effect, one outcome, nothing confirmed is lost.
pub async fn w20_a_failover_confirms_nothing_false(cx: &Cx) -> CheckResult {
    let cluster = cx.server.cluster()?;
    let stage = Stage::new(cx, "w20").await?;
    let guest = stage.id("failover")?;
    let queue = GuestAddress::from(guest.clone()).queue();
    // A failover may take its time.
    let unhurried = boot(10 * LONG);
    let stop = Stop::after("publish prepare").held();
    let mut control = stage.control_stopping(stop).await?;
    control.ready().await?;
    control
        .provision(&guest, SendPolicy::EnqueueFirst, unhurried)
        .await?;
    control.held().await?;
    let first = cluster.leader(&queue).await?;
    cluster.kill(first).await?;
    control.go().await?;
    let mut machine = stage.guest(&guest).act(Act::Wait).start().await?;
    machine.running().await?;
    cluster.start(first).await?;
    let second = cluster.leader(&queue).await?;
    cluster.kill(second).await?;
    machine.0.order(&Order::Open).await?;
    same("runs", control.succeeds(&guest).await?, 1)?;
    stage.ran(&guest, 1)?;
    cluster.start(second).await?;
    stage.clear(&[&guest]).await?;
    Ok(Evidence::of("leaders killed", 2).and("nodes", cluster.nodes()))
}

/// The broker refuses to store: told within its time, and resumed when it stores again.
pub async fn w33_an_alarm_is_waited_out(cx: &Cx) -> CheckResult {
    let faults = cx.server.faults()?;
    let stage = Stage::new(cx, "w33").await?;
    let guest = stage.id("alarm")?;
    let stop = Stop::before("publish prepare").held();
    let mut control = stage.control_stopping(stop).await?;
    control.ready().await?;
    let _machine = stage.guest(&guest).start().await?;
    control
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    control.held().await?;
    faults.alarm(true).await?;
    control.go().await?;
    let deadline = long();
    let trouble = loop {
        if let Some(trouble) = control.record(&guest).await?.trouble {
            break trouble;
        }
        expect(
            !deadline.has_passed(),
            "what is in the way is told",
            "nothing",
        )?;
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    faults.alarm(false).await?;
    same("runs", control.succeeds(&guest).await?, 1)?;
    stage.ran(&guest, 1)?;
    stage.clear(&[&guest]).await?;
    expect(!trouble.detail.is_empty(), "words for it", "none")?;
    Ok(Evidence::of("alarms", 1))
}

/// Guests in one process, so that a thousand fit on a small machine.
const GUESTS_A_PROCESS: usize = 250;

/// A crowd of guests, with one taskmanager.
struct Crowd {
    guests: Vec<GuestId>,
    machines: Vec<Actor>,
}

impl Crowd {
    fn new(stage: &Stage<'_>, size: usize) -> Result<Self, CheckError> {
        let ids: Result<Vec<_>, _> = (0..size).map(|n| stage.id(&n.to_string())).collect();
        Ok(Self {
            guests: ids?,
            machines: Vec::new(),
        })
    }

    async fn start(&mut self, stage: &Stage<'_>) -> Result<(), CheckError> {
        for some in self.guests.chunks(GUESTS_A_PROCESS) {
            let mut actor = stage.actor(&[])?;
            for guest in some {
                let order = stage.guest(guest).order();
                actor.order(&Order::Guest(order)).await?;
            }
            self.machines.push(actor);
        }
        Ok(())
    }

    async fn clear(&self, stage: &Stage<'_>) -> Result<(), CheckError> {
        stage.clear(&self.guests.iter().collect::<Vec<_>>()).await
    }
}

/// A crowd at once, and the broker killed in the middle: as many outcomes, none lost, none run twice.
/// Where the broker is no process, the taskmanager is killed instead.
pub async fn w38_a_crowd_outlives_the_broker(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w38").await?;
    let mut crowd = Crowd::new(&stage, cx.options.crowd)?;
    let mut control = stage.control().await?;
    for guest in &crowd.guests {
        control
            .provision(guest, SendPolicy::PingFirst, patient())
            .await?;
    }
    crowd.start(&stage).await?;
    let half = crowd.guests.len() / 2;
    for _ in 0..half {
        let outcome = |told: &Told| matches!(told, Told::Outcome { .. }).then_some(());
        control.0.hear("an outcome", outcome).await?;
    }
    let killed = match cx.server.faults() {
        Ok(faults) => {
            faults.kill().await?;
            faults.start().await?;
            "kills of the broker"
        }
        Err(_) => {
            control.0.kill().await?;
            "kills of the taskmanager"
        }
    };
    let ended = Instant::now();
    let mut last = match killed {
        "kills of the broker" => control,
        _ => stage.control().await?,
    };
    // Asked again, each outcome is the recorded one.
    for guest in &crowd.guests {
        last.provision(guest, SendPolicy::PingFirst, patient())
            .await?;
    }
    for guest in &crowd.guests {
        same("runs", last.succeeds(guest).await?, 1)?;
        stage.ran(guest, 1)?;
    }
    let took = ended.elapsed();
    crowd.clear(&stage).await?;
    Ok(Evidence::of("guests", crowd.guests.len())
        .and(killed, 1)
        .and("ms until the last outcome", took.as_millis()))
}

/// A crowd that loses its broker comes back to it: everybody, and with a bounded number of knocks.
pub async fn w39_a_crowd_that_comes_back_is_bounded(cx: &Cx) -> CheckResult {
    let (faults, proxy) = proxy(cx).await?;
    // One handle a process: it is handles that knock.
    let size = cx.options.crowd.min(12);
    let near = Stage::new(cx, "w39").await?;
    let far = near.by(faults.url_via(proxy.address()))?;
    let crowd = Crowd::new(&near, size)?;
    let mut control = near.control().await?;
    let mut machines = Vec::new();
    for guest in &crowd.guests {
        machines.push(far.guest(guest).start().await?);
        control
            .provision(guest, SendPolicy::PingFirst, patient())
            .await?;
    }
    for guest in &crowd.guests {
        control.succeeds(guest).await?;
    }
    let before = proxy.counts().connections;
    let down = Duration::from_secs(3);
    faults.kill().await?;
    tokio::time::sleep(down).await;
    faults.start().await?;
    let up = Instant::now();
    for guest in &crowd.guests {
        let deadline = long();
        let ping = Order::Ping {
            guest: guest.clone(),
            within_ms: 2_000,
        };
        while control.try_answer(&ping, guest).await?.is_err() {
            expect(
                !deadline.has_passed(),
                format!("{guest} is back"),
                "it is not",
            )?;
        }
    }
    let took = up.elapsed();
    let knocks = proxy.counts().connections - before;
    // A handle may have a few connections. Without a backoff each would knock thousands of times.
    let bound = 100 * u64::try_from(size).unwrap_or(u64::MAX);
    expect(knocks <= bound, format!("at most {bound} knocks"), knocks)?;
    crowd.clear(&near).await?;
    Ok(Evidence::of("guests", size)
        .and("knocks", knocks)
        .and("ms until all were back", took.as_millis()))
}
