//! W16, W25, W26, W36, W37: who is in charge, and what a cancel and a delete come to.

use std::time::Duration;

use wilco::{GuestAddress, Incarnation, ReasonKind, SendPolicy, State};

use super::stage::{Stage, patient};
use crate::{
    actor::{Act, Order, Stop, Told},
    check::{CheckError, CheckResult, Cx, Evidence},
    support::*,
};

/// Two taskmanagers: one is, the other gets Conflict; on the same records, and on others under the same
/// name.
pub async fn w16_a_second_taskmanager_gets_conflict(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w16").await?;
    let mut first = stage.control().await?;
    for records in ["records.db", "others.db"] {
        let mut second = stage.control_on(records, LONG, None).await?;
        second.failed("Conflict").await?;
    }
    let guest = stage.id("one")?;
    let _machine = stage.guest(&guest).start().await?;
    first
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    first.succeeds(&guest).await?;
    stage.ran(&guest, 1)?;
    stage.clear(&[&guest]).await?;
    Ok(Evidence::of("second taskmanagers refused", 2))
}

/// A zombie of an old incarnation: fenced; only the new machine runs its prepare.
pub async fn w25_a_zombie_of_an_old_incarnation_is_fenced(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w25").await?;
    let mut control = stage.control().await?;
    let guest = stage.id("zombie")?;
    let mut old = stage.guest(&guest).start().await?;
    control
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    control.succeeds(&guest).await?;
    old.running().await?;
    // A machine that sleeps while its successor is made.
    old.0.pause()?;
    control
        .provision_as(&guest, SendPolicy::PingFirst, patient(), true)
        .await?;
    let next = Incarnation::FIRST.next();
    let mut new = stage.guest(&guest).incarnation(next).start().await?;
    new.running().await?;
    control.succeeds(&guest).await?;
    old.0.resume()?;
    old.turned_away().await?;
    stage.ran(&guest, 2)?;
    let effects = stage.effects(&guest)?;
    let of_new = GuestAddress::new(guest.clone(), next).to_string();
    expect(
        effects.last().is_some_and(|line| line.contains(&of_new)),
        "the second run is the new machine's",
        format!("{effects:?}"),
    )?;
    stage.nothing_left(&guest).await?;
    stage.clear_queue(&GuestAddress::new(guest, next)).await?;
    stage.clear(&[]).await?;
    Ok(Evidence::of("zombies fenced", 1))
}

/// Two guests with the same credentials: one is served, the other gets Conflict.
pub async fn w26_a_clone_gets_conflict(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w26").await?;
    let mut control = stage.control().await?;
    let guest = stage.id("cloned")?;
    let _machine = stage.guest(&guest).act(Act::Wait).start().await?;
    control
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    control.reaches(&guest, State::Running).await?;
    let second = stage
        .guest(&guest)
        .clone_of_it()
        .wait(Duration::from_secs(1));
    second.start().await?.failed("Conflict").await?;
    stage.ran(&guest, 1)?;
    stage.clear(&[&guest]).await?;
    Ok(Evidence::of("clones refused", 1))
}

/// Deleted at every step: nothing is left, and a late guest is turned away.
pub async fn w36_a_delete_at_every_step_leaves_nothing(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w36").await?;
    let mut deleted = 0_u64;
    for (n, (policy, state)) in [
        (SendPolicy::PingFirst, "declare queue"),
        (SendPolicy::PingFirst, "ask ping"),
        (SendPolicy::PingFirst, "publish prepare"),
        (SendPolicy::EnqueueFirst, "publish prepare"),
    ]
    .into_iter()
    .enumerate()
    {
        let guest = stage.id(&format!("{n}"))?;
        // Held there, so that the delete comes at this very step.
        let stop = Stop::after(state).held();
        let mut control = stage
            .control_on(&format!("{n}.db"), LONG, Some(stop))
            .await?;
        control.ready().await?;
        let machine = match (policy, state) {
            (SendPolicy::PingFirst, "publish prepare") => {
                // Attached, and deaf to what is published.
                let deaf = Stop::before("receive prepare").held();
                Some(stage.guest(&guest).stop(deaf).start().await?)
            }
            _ => None,
        };
        control.provision(&guest, policy, patient()).await?;
        control.held().await?;
        let delete = Order::Delete {
            guest: guest.clone(),
        };
        control.0.order(&delete).await?;
        control.go().await?;
        let done = |told: &Told| match told {
            Told::Answer { answer, .. } => Some(Ok(answer.clone())),
            Told::Failed { error, .. } if !error.contains("deleted") => {
                Some(Err(CheckError::failed("a delete succeeds", error)))
            }
            _ => None,
        };
        control.0.hear("what came of the delete", done).await??;
        same("state", control.record(&guest).await?.state, State::Deleted)?;
        if let Some(mut machine) = machine {
            machine.0.order(&Order::Go).await?;
            machine.turned_away().await?;
        }
        stage.nothing_left(&guest).await?;
        let mut late = stage.guest(&guest).start().await?;
        late.turned_away().await?;
        stage.ran(&guest, 0)?;
        control.0.kill().await?;
        stage.clear(&[]).await?;
        deleted += 1;
    }
    // Too late for that: it runs.
    let guest = stage.id("runs")?;
    let mut control = stage.control().await?;
    let mut machine = stage.guest(&guest).act(Act::Wait).start().await?;
    control
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    control.reaches(&guest, State::Running).await?;
    let delete = Order::Delete {
        guest: guest.clone(),
    };
    let refused = control.try_answer(&delete, &guest).await?;
    let kind = refused.err().map(|(kind, _)| kind);
    same("a delete of what runs", kind.as_deref(), Some("Conflict"))?;
    machine.0.order(&Order::Open).await?;
    control.succeeds(&guest).await?;
    control.answer(&delete, &guest).await?;
    machine.turned_away().await?;
    stage.nothing_left(&guest).await?;
    stage.ran(&guest, 1)?;
    stage.clear(&[]).await?;
    Ok(Evidence::of("deleted", deleted + 1).and("too late", 1))
}

/// A cancel races with the guest: one truth, and the caller is told which.
pub async fn w37_a_cancel_races_with_the_guest(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w37").await?;
    let mut control = stage.control().await?;
    let mut machines = stage.actor(&[])?;
    let mut rng = cx.rng();
    let (mut revoked, mut too_late) = (0_u64, 0_u64);
    for n in 0..cx.options.crowd {
        let guest = stage.id(&format!("{n}"))?;
        control
            .provision(&guest, SendPolicy::EnqueueFirst, patient())
            .await?;
        control.reaches(&guest, State::Sent).await?;
        let order = stage.guest(&guest).order();
        machines.order(&Order::Guest(order)).await?;
        let attached = |told: &Told| match told {
            Told::Attached { guest: id } if *id == guest => Some(()),
            _ => None,
        };
        machines.hear("that it is attached", attached).await?;
        // Around the moment at which the guest has it.
        tokio::time::sleep(Duration::from_micros(rng.u64(0..6_000))).await;
        let cancel = Order::Cancel {
            guest: guest.clone(),
        };
        let told = control.answer(&cancel, &guest).await?;
        let outcome = control.outcome(&guest).await?;
        let ran = stage.effects(&guest)?.len();
        let seen = format!("told {told}, {outcome}, {ran} effects");
        match told.as_str() {
            Some("revoked") => {
                revoked += 1;
                let kind = outcome.reason().map(|reason| reason.kind);
                expect(
                    outcome.state() == State::NotDelivered
                        && kind == Some(ReasonKind::Revoked)
                        && ran == 0,
                    "revoked: it never runs",
                    seen,
                )?;
            }
            _ => {
                too_late += 1;
                expect(
                    outcome.state() == State::Succeeded && ran == 1,
                    "too late: it has run, once",
                    seen,
                )?;
                stage
                    .clear_queue(&GuestAddress::from(guest.clone()))
                    .await?;
            }
        }
    }
    // What was revoked has not run meanwhile either, and of it nothing is left.
    for n in 0..cx.options.crowd {
        let guest = stage.id(&format!("{n}"))?;
        let state = control.record(&guest).await?.state;
        stage.ran(&guest, usize::from(state == State::Succeeded))?;
        if state == State::NotDelivered {
            stage.nothing_left(&guest).await?;
        }
    }
    stage.clear(&[]).await?;
    Ok(Evidence::of("races", cx.options.crowd)
        .and("revoked", revoked)
        .and("too late", too_late))
}
