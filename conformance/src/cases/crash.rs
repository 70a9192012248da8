//! W7 to W15, and F7: guest or taskmanager killed at a side effect, and started again.

use std::{collections::BTreeSet, time::Duration};

use futures_util::{FutureExt, StreamExt, TryFutureExt, TryStreamExt, future::BoxFuture, stream};
use wilco::{Deadlines, ReasonKind, SendPolicy, State};

use super::stage::{Control, Stage, patient};
use crate::{
    actor::{Act, Order, Side, Stop, Told},
    check::{CheckError, CheckResult, Cx, Evidence},
    support::*,
};

/// Kills a guest at a side effect of its first run, starts it again, and wants one effect.
async fn guest_dies(cx: &Cx, case: &'static str, at: Stop) -> CheckResult {
    let stage = Stage::new(cx, case).await?;
    let mut control = stage.control().await?;
    let guest = stage.id("dies")?;
    control
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    let mut first = stage.guest(&guest).stop(at).start().await?;
    first.died().await?;
    let _second = stage.guest(&guest).attached().await?;
    control.succeeds(&guest).await?;
    stage.ran(&guest, 1)?;
    stage.clear(&[&guest]).await?;
    Ok(Evidence::of("guests killed", 1))
}

/// After receive, before its journal: redelivered, run once.
pub async fn w7_a_guest_killed_before_its_journal_gets_prepare_again(cx: &Cx) -> CheckResult {
    guest_dies(cx, "w7", Stop::before("journal accepted")).await
}

/// After its journal, before the ack: recognised by its id, one effect.
pub async fn w8_a_guest_killed_before_its_ack_knows_prepare_again(cx: &Cx) -> CheckResult {
    guest_dies(cx, "w8", Stop::before("ack prepare")).await
}

/// In mid-prepare: by the guest's choice it has failed, or is run again; the taskmanager suspects it
/// meanwhile.
pub async fn w9_a_guest_killed_in_mid_prepare_ends_as_it_chose(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w9").await?;
    let mut control = stage.control().await?;
    let (fails, again) = (stage.id("fails")?, stage.id("again")?);
    let deadlines = Deadlines {
        progress: Duration::from_secs(10),
        ..patient()
    };
    for guest in [&fails, &again] {
        control
            .provision(guest, SendPolicy::PingFirst, deadlines)
            .await?;
        let mut first = stage.guest(guest).act(Act::Wait).start().await?;
        first.running().await?;
        control.reaches(guest, State::Running).await?;
        first.0.kill().await?;
        control.reaches(guest, State::Suspect).await?;
        let second = stage.guest(guest);
        let second = if guest == &again {
            second.run_again()
        } else {
            second
        };
        let _second = second.attached().await?;
        if guest == &fails {
            control.fails(guest, ReasonKind::GuestFailed).await?;
            stage.ran(guest, 1)?;
        } else {
            same("runs", control.succeeds(guest).await?, 2)?;
            stage.ran(guest, 2)?;
        }
    }
    stage.clear(&[&fails, &again]).await?;
    Ok(Evidence::of("guests killed in mid-prepare", 2))
}

/// After Done, before its report: reports again from its journal.
pub async fn w10_a_guest_killed_before_its_report_reports_again(cx: &Cx) -> CheckResult {
    guest_dies(cx, "w10", Stop::before("report done")).await
}

/// A duplicate prepare is run once and answered twice.
pub async fn w11_a_duplicate_prepare_runs_once(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w11").await?;
    let mut control = stage.control().await?;
    let guest = stage.id("twice")?;
    let mut machine = stage.guest(&guest).act(Act::Wait).start().await?;
    control
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    machine.running().await?;
    let record = control.record(&guest).await?;
    let command = wilco::wire::Command::new(
        &record.address,
        record.command.clone(),
        wilco::MessageId::new(record.kind())?,
        Some(stage.reports()?),
        record.payload.clone(),
    );
    // Its id is forgotten by no broker so soon; where one knows it, this stores nothing.
    let sent = command.to_message()?;
    let receipt = stage
        .broker
        .publish(&record.address.queue(), sent, long())
        .await?;
    machine.0.order(&Order::Open).await?;
    same("runs", control.succeeds(&guest).await?, 1)?;
    // Whatever came of the second copy: it is settled, and nothing ran.
    until_status(&*stage.broker, &record.address.queue(), "empty", |status| {
        status.messages() == 0
    })
    .await?;
    stage.ran(&guest, 1)?;
    stage.clear(&[&guest]).await?;
    Ok(Evidence::of("copies sent", 2).and("known by the broker", u64::from(receipt.duplicate)))
}

/// Kills a taskmanager at a side effect, starts it again, and wants one effect.
async fn control_dies(cx: &Cx, case: &'static str, at: Stop) -> CheckResult {
    let stage = Stage::new(cx, case).await?;
    let guest = stage.id("lives")?;
    let _machine = stage.guest(&guest).start().await?;
    let mut first = stage.control_stopping(at).await?;
    first.ready().await?;
    first
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    first.died().await?;
    let _second = stage.resumed(&guest, SendPolicy::PingFirst).await?;
    stage.clear(&[&guest]).await?;
    Ok(Evidence::of("taskmanagers killed", 1))
}

/// Before declare: the next one goes on.
pub async fn w12_a_taskmanager_killed_before_declare_is_resumed(cx: &Cx) -> CheckResult {
    control_dies(cx, "w12", Stop::before("declare queue")).await
}

/// After declare, before publish: declared again, which consumes nothing, and published.
pub async fn w13_a_taskmanager_killed_after_declare_is_resumed(cx: &Cx) -> CheckResult {
    control_dies(cx, "w13", Stop::after("declare queue")).await
}

/// After publish, before its record: the same id again, run once.
pub async fn w14_a_taskmanager_killed_after_publish_sends_the_same_again(cx: &Cx) -> CheckResult {
    control_dies(cx, "w14", Stop::after("publish prepare")).await
}

/// While it waits: the next one asks how it stands, and goes on with the time that is left.
pub async fn w15_a_taskmanager_killed_while_it_waits_is_resumed(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w15").await?;
    let guest = stage.id("waits")?;
    let mut first = stage.control().await?;
    let mut machine = stage.guest(&guest).act(Act::Wait).start().await?;
    first
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    machine.running().await?;
    first.reaches(&guest, State::Running).await?;
    let began = first.record(&guest).await?.created_ms;
    first.0.kill().await?;
    // It ends while nobody listens.
    machine.0.order(&Order::Open).await?;
    let mut second = stage.resumed(&guest, SendPolicy::PingFirst).await?;
    same(
        "when it began",
        second.record(&guest).await?.created_ms,
        began,
    )?;
    // One whose time is over when it is resumed is not given more.
    let late = stage.id("late")?;
    let deadlines = super::stage::boot(Duration::from_secs(2));
    second
        .provision(&late, SendPolicy::PingFirst, deadlines)
        .await?;
    second.reaches(&late, State::AwaitingGuest).await?;
    second.0.kill().await?;
    let mut third = stage.control().await?;
    third
        .provision(&late, SendPolicy::PingFirst, deadlines)
        .await?;
    let outcome = third.outcome(&late).await?;
    same(
        "the outcome of one that never came",
        outcome.state(),
        State::NotDelivered,
    )?;
    let record = third.record(&late).await?;
    let waited = record.since_ms.saturating_sub(record.created_ms);
    expect(
        waited < 20_000,
        "given up at its own deadline",
        format!("{waited} ms"),
    )?;
    stage.clear(&[&guest]).await?;
    Ok(Evidence::of("taskmanagers killed", 2))
}

/// A side effect that was seen.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Point {
    effect: String,
    nth: u32,
}

impl Point {
    fn stop(&self, side: Side) -> Stop {
        Stop {
            nth: self.nth,
            side,
            ..Stop::before(&self.effect)
        }
    }
}

/// The side effects of a whole run, in their order. Of what is done as often as it takes (pings,
/// answers, attaching again) the first one counts.
fn points(told: &[Told]) -> Vec<Point> {
    let mut known = BTreeSet::new();
    told.iter()
        .filter_map(|told| match told {
            Told::Effect { effect, nth } => Some(Point {
                effect: effect.clone(),
                nth: *nth,
            }),
            _ => None,
        })
        .filter(|point| {
            let repeated = [
                "ask ",
                "answer ",
                "attach",
                "declare reports",
                "receive report",
            ];
            let repeated = repeated
                .iter()
                .any(|prefix| point.effect.starts_with(prefix));
            (!repeated || point.nth == 1) && known.insert(point.clone())
        })
        .collect()
}

/// A run without a crash, to see which side effects there are.
async fn list_points(
    stage: &Stage<'_>,
    policy: SendPolicy,
) -> Result<(Vec<Point>, Vec<Point>), CheckError> {
    let guest = stage.id("list")?;
    let mut control = stage.control().await?;
    control.provision(&guest, policy, patient()).await?;
    let mut machine = stage.guest(&guest).start().await?;
    control.succeeds(&guest).await?;
    let last = machine.reported().await?;
    control.0.kill().await?;
    machine.0.kill().await?;
    let of_control = points(&control.0.ended().await?);
    let mut of_guest = machine.0.ended().await?;
    of_guest.push(last);
    stage.clear(&[&guest]).await?;
    Ok((of_control, points(&of_guest)))
}

/// So many points at once: most of the time is spent waiting.
const AT_ONCE: usize = 4;

/// A run for each of the points, with each of its sides, some at once; what came of them.
async fn at_each<'a, T: 'a>(
    points: &[Point],
    mut run: impl FnMut(usize, Point, Side) -> BoxFuture<'a, Result<T, CheckError>>,
) -> Result<Vec<T>, CheckError> {
    let mut runs = Vec::new();
    for (n, point) in points.iter().enumerate() {
        for side in [Side::Before, Side::After] {
            let run = run(n, point.clone(), side);
            let place = format!("{side:?} {} {}", point.effect, point.nth);
            runs.push(run.map_err(move |error| at(error, &place)));
        }
    }
    stream::iter(runs)
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
}

/// The taskmanager is killed right before and right after each of its side effects.
pub async fn f7_a_taskmanager_killed_at_every_side_effect(cx: &Cx) -> CheckResult {
    let (mut listed, mut killed) = (0, 0);
    for (policy, case) in [
        (SendPolicy::PingFirst, "f7-control-ping"),
        (SendPolicy::EnqueueFirst, "f7-control-enqueue"),
    ] {
        let stage = Stage::new(cx, case).await?;
        let (points, _) = list_points(&stage, policy).await?;
        show(case, &points);
        listed += points.len();
        let stage = &stage;
        let died = at_each(&points, |n, point, side| {
            async move {
                let stage = stage.part(&format!("{n}-{side:?}"))?;
                let guest = stage.id("vm")?;
                let mut first = stage.control_stopping(point.stop(side)).await?;
                let _machine = stage.guest(&guest).start().await?;
                let died = dies(&mut first, &guest, policy).await?;
                let mut second = stage.control().await?;
                second.provision(&guest, policy, patient()).await?;
                same("runs", second.succeeds(&guest).await?, 1)?;
                stage.ran(&guest, 1)?;
                second.0.kill().await?;
                stage.clear(&[&guest]).await?;
                Ok(died)
            }
            .boxed()
        });
        killed += died.await?.into_iter().filter(|died| *died).count();
    }
    Ok(Evidence::of("side effects", listed).and("kills", killed))
}

/// Orders a provisioning and waits for the taskmanager's death; false if it ended without meeting the
/// stop.
async fn dies(
    control: &mut Control,
    guest: &wilco::GuestId,
    policy: SendPolicy,
) -> Result<bool, CheckError> {
    // It may be dead before it can take the order.
    let _ = control.provision(guest, policy, patient()).await;
    let ended = |told: &Told| matches!(told, Told::Outcome { .. }).then_some(());
    let lives = control.0.hear("an outcome", ended).await.is_ok();
    if lives {
        control.0.kill().await?;
    }
    control.0.ended().await?;
    Ok(!lives)
}

/// The guest is killed right before and right after each of its side effects.
pub async fn f7_a_guest_killed_at_every_side_effect(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "f7-guest").await?;
    let (_, points) = list_points(&stage, SendPolicy::PingFirst).await?;
    show("f7-guest", &points);
    let stage = &stage;
    let ended = at_each(&points, |n, point, side| {
        async move {
            let stage = stage.part(&format!("{n}-{side:?}"))?;
            let guest = stage.id("vm")?;
            let mut control = stage.control().await?;
            let mut first = stage.guest(&guest).stop(point.stop(side)).start().await?;
            control
                .provision(&guest, SendPolicy::PingFirst, patient())
                .await?;
            let reported = first.reported().await;
            if reported.is_ok() {
                // What it does only now and then it may not have done: it has not met its stop.
                first.0.kill().await?;
            }
            let told = first.0.ended().await?;
            let _second = stage.guest(&guest).attached().await?;
            let outcome = control.outcome(&guest).await?;
            let ran = stage.effects(&guest)?.len();
            // From the moment at which its handler may have been started until its end is in the
            // journal, a guest cannot know how far it came, and this one was told to fail then.
            let began = |wanted: &str| {
                let is =
                    |told: &Told| matches!(told, Told::Effect { effect, .. } if effect == wanted);
                told.iter().any(is)
            };
            let doubtful = began("journal running") && !began("report done");
            let fine = match outcome.state() {
                State::Succeeded => ran == 1,
                State::Failed => ran <= 1 && doubtful,
                _ => false,
            };
            expect(
                fine,
                "one outcome that is true",
                format!("{outcome}, {ran} effects"),
            )?;
            control.0.kill().await?;
            stage.clear(&[&guest]).await?;
            let died = reported.is_err() || point.effect == "journal reported";
            Ok((died, outcome.state() == State::Failed))
        }
        .boxed()
    });
    let ended = ended.await?;
    let kills = ended.iter().filter(|(died, _)| *died).count();
    let interrupted = ended.iter().filter(|(_, failed)| *failed).count();
    Ok(Evidence::of("side effects", points.len())
        .and("kills", kills)
        .and("interrupted in mid-prepare", interrupted))
}

/// The failure, with the point that it was at.
fn at(error: CheckError, place: &str) -> CheckError {
    match error {
        CheckError::Failed(mut failure) => {
            failure.expected = format!("killed {place}: {}", failure.expected);
            CheckError::Failed(failure)
        }
        other => other,
    }
}

/// The list, as the tests' output shows it.
#[expect(
    clippy::print_stdout,
    reason = "the list of points is part of the evidence"
)]
fn show(case: &str, points: &[Point]) {
    println!("{case}: {} side effects", points.len());
    for (n, point) in (1..).zip(points) {
        println!("{n:4} {} {}", point.effect, point.nth);
    }
}
