//! W1 to W6, W40: a guest that comes late, never, refused, hung, or twice.

use std::time::Duration;

use serde_json::Value;
use wilco::{ReasonKind, SendPolicy, Stage as Step, State};

use super::stage::{Stage, boot, ms, patient};
use crate::{
    actor::{Order, Stop},
    check::{CheckResult, Cx, Evidence},
    support::*,
};

const SHORT: Duration = Duration::from_millis(1_500);

/// Given up at its deadline, or at once when its host failed; nothing is left of it.
pub async fn w1_a_guest_that_never_starts_is_given_up(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w1").await?;
    let mut control = stage.control().await?;
    let (ping, enqueue, host) = (stage.id("ping")?, stage.id("enqueue")?, stage.id("host")?);
    control
        .provision(&ping, SendPolicy::PingFirst, boot(SHORT))
        .await?;
    control
        .provision(&enqueue, SendPolicy::EnqueueFirst, boot(SHORT))
        .await?;
    control
        .provision(&host, SendPolicy::PingFirst, patient())
        .await?;
    control.reaches(&host, State::AwaitingGuest).await?;
    let failed = Order::HostFailed {
        guest: host.clone(),
    };
    control.0.order(&failed).await?;
    control
        .gives_up(&host, ReasonKind::HostFailed, None)
        .await?;
    for guest in [&ping, &enqueue] {
        control
            .gives_up(guest, ReasonKind::NoConsumer, Some(Step::Boot))
            .await?;
    }
    for guest in [&ping, &enqueue, &host] {
        stage.nothing_left(guest).await?;
    }
    stage.clear(&[]).await?;
    Ok(Evidence::of("guests given up", 3))
}

/// Late, inside the deadline: run once.
pub async fn w2_a_guest_that_comes_late_is_prepared_once(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w2").await?;
    let mut control = stage.control().await?;
    let guests = [stage.id("ping")?, stage.id("enqueue")?];
    let policies = [SendPolicy::PingFirst, SendPolicy::EnqueueFirst];
    for (guest, policy) in guests.iter().zip(policies) {
        control.provision(guest, policy, patient()).await?;
        let waits = match policy {
            SendPolicy::PingFirst => State::AwaitingGuest,
            SendPolicy::EnqueueFirst => State::Sent,
        };
        control.reaches(guest, waits).await?;
        let machine = stage.guest(guest).attached().await?;
        same("runs", control.succeeds(guest).await?, 1)?;
        stage.ran(guest, 1)?;
        drop(machine);
    }
    stage.clear(&[&guests[0], &guests[1]]).await?;
    Ok(Evidence::of("guests that came late", 2))
}

/// After the give-up: turned away, and the outcome stands.
pub async fn w3_a_guest_after_the_give_up_runs_nothing(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w3").await?;
    let mut control = stage.control().await?;
    let guests = [stage.id("ping")?, stage.id("enqueue")?];
    let policies = [SendPolicy::PingFirst, SendPolicy::EnqueueFirst];
    for (guest, policy) in guests.iter().zip(policies) {
        control.provision(guest, policy, boot(SHORT)).await?;
        control
            .gives_up(guest, ReasonKind::NoConsumer, Some(Step::Boot))
            .await?;
        let mut late = stage.guest(guest).start().await?;
        late.turned_away().await?;
        stage.ran(guest, 0)?;
        same(
            "state",
            control.record(guest).await?.state,
            State::NotDelivered,
        )?;
        stage.nothing_left(guest).await?;
    }
    stage.clear(&[]).await?;
    Ok(Evidence::of("late guests turned away", 2))
}

/// Refused by the broker: its own log says so, and the taskmanager sees nobody there.
pub async fn w4_a_guest_that_the_broker_refuses_says_so(cx: &Cx) -> CheckResult {
    let refused = cx.server.refused_url()?;
    let stage = Stage::new(cx, "w4").await?;
    let mut control = stage.control().await?;
    let guest = stage.id("refused")?;
    control
        .provision(&guest, SendPolicy::PingFirst, boot(2 * SHORT))
        .await?;
    let elsewhere = stage.by(refused)?;
    let mut machine = elsewhere.guest(&guest).start().await?;
    machine.failed("AuthRefused").await?;
    control
        .gives_up(&guest, ReasonKind::NoConsumer, Some(Step::Boot))
        .await?;
    stage.clear(&[]).await?;
    Ok(Evidence::of("guests refused", 1))
}

/// Attached and hung: known within the ping's time, and given up as silent.
pub async fn w5_a_hung_guest_is_silent(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w5").await?;
    let mut control = stage.control().await?;
    let guest = stage.id("hung")?;
    // Its lane is there, and what stands behind it does not answer.
    let hung = Stop::before("answer ping").held();
    let mut machine = stage.guest(&guest).stop(hung).start().await?;
    control
        .provision(&guest, SendPolicy::PingFirst, boot(2 * SHORT))
        .await?;
    machine.held().await?;
    let ping = Order::Ping {
        guest: guest.clone(),
        within_ms: 500,
    };
    let answer = control.try_answer(&ping, &guest).await?;
    let kind = answer.err().map(|(kind, _)| kind);
    same(
        "a ping of a hung guest",
        kind.as_deref(),
        Some("ConsumerSilent"),
    )?;
    control
        .gives_up(&guest, ReasonKind::ConsumerSilent, Some(Step::Boot))
        .await?;
    machine.0.order(&Order::Go).await?;
    machine.turned_away().await?;
    stage.ran(&guest, 0)?;
    stage.nothing_left(&guest).await?;
    stage.clear(&[]).await?;
    Ok(Evidence::of("hung guests", 1))
}

/// Dead between its pong and the publish: prepare waits for it, or is taken back.
pub async fn w6_a_guest_that_dies_after_its_pong_is_waited_for_or_given_up(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w6").await?;
    let mut control = stage.control().await?;
    let (back, gone) = (stage.id("back")?, stage.id("gone")?);
    for (n, guest) in (1..).zip([&back, &gone]) {
        let stop = Stop {
            nth: n,
            ..Stop::before("publish prepare").held()
        };
        control.0.order(&Order::StopAt { stop }).await?;
        let mut machine = stage.guest(guest).start().await?;
        let deadlines = wilco::Deadlines {
            accept: 2 * SHORT,
            ..patient()
        };
        let deadlines = if n == 1 { patient() } else { deadlines };
        control
            .provision(guest, SendPolicy::PingFirst, deadlines)
            .await?;
        control.held().await?;
        machine.0.kill().await?;
        control.go().await?;
        control.reaches(guest, State::Sent).await?;
    }
    let _again = stage.guest(&back).attached().await?;
    control.succeeds(&back).await?;
    stage.ran(&back, 1)?;
    let outcome = control.outcome(&gone).await?;
    same(
        "the outcome of one that never came back",
        outcome.state(),
        State::NotDelivered,
    )?;
    stage.ran(&gone, 0)?;
    stage.nothing_left(&gone).await?;
    stage.clear(&[&back]).await?;
    Ok(Evidence::of("guests dead after their pong", 2))
}

/// Started again while it waits: a new boot id, the same incarnation, prepared once.
pub async fn w40_a_guest_that_reboots_while_it_waits_is_accepted(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w40").await?;
    let stop = Stop::before("publish prepare").held();
    let mut control = stage.control_stopping(stop).await?;
    control.ready().await?;
    let guest = stage.id("reboots")?;
    let mut first = stage.guest(&guest).start().await?;
    control
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    control.held().await?;
    let boot_of = |record: &wilco::Record| record.boot.as_ref().map(ToString::to_string);
    let before = boot_of(&control.record(&guest).await?);
    expect(before.is_some(), "a boot id after the pong", "none")?;
    first.0.kill().await?;
    let mut second = stage.guest(&guest).attached().await?;
    control.go().await?;
    control.succeeds(&guest).await?;
    second.running().await?;
    let ping = Order::Ping {
        guest: guest.clone(),
        within_ms: ms(LONG),
    };
    let pong = control.answer(&ping, &guest).await?;
    let boot = pong.get("boot").and_then(Value::as_str);
    expect(
        boot.is_some() && boot != before.as_deref(),
        "a new boot id",
        &pong,
    )?;
    let record = control.record(&guest).await?;
    same("incarnation", record.address.incarnation.get(), 1)?;
    stage.ran(&guest, 1)?;
    stage.clear(&[&guest]).await?;
    Ok(Evidence::of("guests rebooted", 1))
}
