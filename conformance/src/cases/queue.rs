//! W21 to W24, W27: what is lost, purged, deleted or made otherwise behind the workflow's back.

use wilco::{
    GuestAddress, SendPolicy, State,
    broker::{DeleteMode, QueueSpec},
};

use super::stage::{Stage, patient};
use crate::{
    actor::{Act, Order, Stop},
    check::{CheckResult, Cx, Evidence},
    support::*,
};

/// Its report is lost while nobody collects it: asked, the guest tells the truth, and runs nothing
/// again.
pub async fn w21_a_lost_report_is_asked_for(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w21").await?;
    let mut first = stage.control().await?;
    let guest = stage.id("lost")?;
    let mut machine = stage.guest(&guest).act(Act::Wait).start().await?;
    first
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    first.reaches(&guest, State::Running).await?;
    first.0.kill().await?;
    machine.0.order(&Order::Open).await?;
    machine.reported().await?;
    stage
        .broker
        .delete(&stage.reports()?, DeleteMode::Discard, long())
        .await?;
    let _second = stage.resumed(&guest, SendPolicy::PingFirst).await?;
    stage.clear(&[&guest]).await?;
    Ok(Evidence::of("reports lost", 1))
}

/// The queue of reports vanishes under a taskmanager: it is made again, and the result is fetched.
pub async fn w22_a_vanished_reports_queue_is_made_again(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w22").await?;
    let mut control = stage.control().await?;
    let guest = stage.id("reply")?;
    let mut machine = stage.guest(&guest).act(Act::Wait).start().await?;
    control
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    control.reaches(&guest, State::Running).await?;
    stage
        .broker
        .delete(&stage.reports()?, DeleteMode::Discard, long())
        .await?;
    machine.0.order(&Order::Open).await?;
    same("runs", control.succeeds(&guest).await?, 1)?;
    stage.ran(&guest, 1)?;
    let status = stage.broker.status(&stage.reports()?, long()).await;
    expect(
        status.is_ok(),
        "the queue of reports is there again",
        format!("{status:?}"),
    )?;
    stage.clear(&[&guest]).await?;
    Ok(Evidence::of("queues of reports deleted", 1))
}

/// The guest's queue is deleted under it: NoQueue at once, declared again, sent again, run once.
pub async fn w23_a_queue_deleted_under_the_guest_comes_back(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w23").await?;
    let stop = Stop::before("publish prepare").held();
    let mut control = stage.control_stopping(stop).await?;
    control.ready().await?;
    let guest = stage.id("deleted")?;
    let queue = GuestAddress::from(guest.clone()).queue();
    let _machine = stage.guest(&guest).start().await?;
    control
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    control.held().await?;
    stage
        .broker
        .delete(&queue, DeleteMode::Discard, long())
        .await?;
    control.go().await?;
    same("runs", control.succeeds(&guest).await?, 1)?;
    stage.ran(&guest, 1)?;
    stage.clear(&[&guest]).await?;
    Ok(Evidence::of("queues deleted", 1))
}

/// An operator purged the queue: the guest knows nothing of the command, and the same id is sent again.
pub async fn w24_a_purged_prepare_is_sent_again(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w24").await?;
    let mut control = stage.control().await?;
    let guest = stage.id("purged")?;
    let queue = GuestAddress::from(guest.clone()).queue();
    control
        .provision(&guest, SendPolicy::EnqueueFirst, patient())
        .await?;
    control.reaches(&guest, State::Sent).await?;
    let command = control.record(&guest).await?.command;
    let mut operator = attach(&*stage.broker, &queue, 1).await?;
    let prepare = receive(&mut *operator).await?;
    same(
        "the message that was purged",
        prepare.message.id.clone(),
        command.clone(),
    )?;
    prepare.ack(long()).await?;
    operator.close(long()).await?;
    let _machine = stage.guest(&guest).start().await?;
    same("runs", control.succeeds(&guest).await?, 1)?;
    same(
        "the command",
        control.record(&guest).await?.command,
        command,
    )?;
    stage.ran(&guest, 1)?;
    stage.clear(&[&guest]).await?;
    Ok(Evidence::of("prepares purged", 1))
}

/// A queue that somebody declared otherwise: the taskmanager tells, and what is in it stays.
pub async fn w27_a_queue_with_other_arguments_is_told(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w27").await?;
    let guest = stage.id("drift")?;
    let address = GuestAddress::from(guest.clone());
    let other = QueueSpec::new(address.queue()).with_max_messages(7);
    stage.broker.declare(&other, long()).await?;
    put(&*stage.broker, &address.queue(), "stays").await?;
    // The save behind the failed declare, which tells what is in the way.
    let stop = Stop {
        nth: 2,
        ..Stop::after("record planned").held()
    };
    let mut control = stage.control_stopping(stop).await?;
    control.ready().await?;
    control
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    control.held().await?;
    let record = control.record(&guest).await?;
    let trouble = record.trouble.map(|trouble| trouble.kind);
    same(
        "what is in the way",
        trouble,
        Some(wilco::ReasonKind::Conflict),
    )?;
    let status = stage.broker.status(&address.queue(), long()).await?;
    same("messages in it", status.messages(), 1)?;
    // The operator mends it, and provisioning goes on by itself.
    stage
        .broker
        .delete(&address.queue(), DeleteMode::Discard, long())
        .await?;
    control.go().await?;
    let _machine = stage.guest(&guest).start().await?;
    control.succeeds(&guest).await?;
    stage.ran(&guest, 1)?;
    stage.clear(&[&guest]).await?;
    Ok(Evidence::of("queues with other arguments", 1))
}
