//! W28 to W32, W34: commands that cannot be read, fail, take long, come early, or meet a wrong clock.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use wilco::{
    Deadline, ErrorKind, GuestAddress, MessageId, ReasonKind, SendPolicy, State, wire::Command,
};

use super::stage::{Stage, patient};
use crate::{
    actor::{Act, Order, Stop},
    check::{CheckError, CheckResult, Cx, Evidence},
    harness::Unavailable,
    support::*,
};

/// What cannot be understood is kept with its bytes, and prepare goes on; a prepare of another version
/// has failed.
pub async fn w28_what_cannot_be_understood_is_kept(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w28").await?;
    let stop = Stop::before("publish prepare").held();
    let mut control = stage.control_stopping(stop).await?;
    control.ready().await?;
    let guest = stage.id("poison")?;
    let address = GuestAddress::from(guest.clone());
    let _machine = stage.guest(&guest).start().await?;
    control
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    control.held().await?;
    let garbage = Bytes::from_static(b"\x00\xff no JSON");
    stage.put_raw(&address, message(garbage.clone())?).await?;
    control.go().await?;
    control.succeeds(&guest).await?;
    stage.ran(&guest, 1)?;
    let letters = stage
        .broker
        .dead_letters(&address.queue(), None, count(10), long())
        .await?;
    same("dead letters", letters.len(), 1)?;
    same("its bytes", letters[0].message.body.clone(), garbage)?;
    stage.clear(&[&guest]).await?;

    // The prepare itself, of a version that this guest does not speak.
    let newer = stage.id("version")?;
    let address = GuestAddress::from(newer.clone());
    control
        .provision(&newer, SendPolicy::EnqueueFirst, patient())
        .await?;
    control.reaches(&newer, State::Sent).await?;
    let record = control.record(&newer).await?;
    let mut operator = attach(&*stage.broker, &address.queue(), 1).await?;
    let prepare = receive(&mut *operator).await?;
    let mut body: serde_json::Value = serde_json::from_slice(&prepare.message.body)
        .map_err(|error| CheckError::failed("prepare is JSON", error))?;
    body["wilco"] = 99.into();
    // Sent under its own id, which a broker that remembers ids would not store again.
    let other = wilco::Message::new(record.kind(), body.to_string())?;
    stage.put_raw(&address, other).await?;
    prepare.ack(long()).await?;
    operator.close(long()).await?;
    let _machine = stage.guest(&newer).start().await?;
    // The taskmanager sends the true one again (case W24), and the strange one is a dead letter.
    control.succeeds(&newer).await?;
    stage.ran(&newer, 1)?;
    let letters = stage
        .broker
        .dead_letters(&address.queue(), None, count(10), long())
        .await?;
    same("dead letters", letters.len(), 1)?;
    stage.clear(&[&newer]).await?;
    Ok(Evidence::of("messages not understood", 2))
}

/// A handler that fails: Failed, with its words, after one run.
pub async fn w29_a_handler_that_fails_has_failed(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w29").await?;
    let mut control = stage.control().await?;
    let guest = stage.id("fails")?;
    let _machine = stage.guest(&guest).act(Act::Fail).start().await?;
    control
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    control.fails(&guest, ReasonKind::GuestFailed).await?;
    stage.ran(&guest, 1)?;
    let status = stage
        .broker
        .status(&GuestAddress::from(guest.clone()).queue(), long())
        .await?;
    same("messages left", status.messages(), 0)?;
    stage.clear(&[&guest]).await?;
    Ok(Evidence::of("handlers that fail", 1))
}

/// A prepare that takes longer than the broker waits for an ack: no redelivery, run once.
pub async fn w30_a_long_prepare_is_not_delivered_again(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w30").await?;
    let mut control = stage.control().await?;
    let guest = stage.id("long")?;
    let queue = GuestAddress::from(guest.clone()).queue();
    let mut machine = stage.guest(&guest).act(Act::Wait).start().await?;
    control
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    machine.running().await?;
    // Nothing waits for an ack while it runs: that is what no timeout of the broker can bite.
    until_status(&*stage.broker, &queue, "nothing unsettled", |status| {
        status.messages() == 0
    })
    .await?;
    let longer = cx.takeover() * 2;
    tokio::time::sleep(longer).await;
    machine.0.order(&Order::Open).await?;
    same("runs", control.succeeds(&guest).await?, 1)?;
    stage.ran(&guest, 1)?;
    stage.clear(&[&guest]).await?;
    let longer = u64::try_from(longer.as_millis()).unwrap_or(u64::MAX);
    Ok(Evidence::of("milliseconds that it ran", longer))
}

/// Thousands of pings that nobody answered: they end on their own lane, and prepare is not touched.
pub async fn w31_stale_pings_harm_nobody(cx: &Cx) -> CheckResult {
    const PINGS: u64 = 2_000;
    let stage = Stage::new(cx, "w31").await?;
    let mut control = stage.control().await?;
    let guest = stage.id("pinged")?;
    let address = GuestAddress::from(guest.clone());
    let mut machine = stage.guest(&guest).start().await?;
    control
        .provision(&guest, SendPolicy::EnqueueFirst, patient())
        .await?;
    control.succeeds(&guest).await?;
    machine.running().await?;
    machine.0.pause()?;
    let before = stage.broker.status(&address.queue(), long()).await?;
    let pings: Vec<_> = (0..PINGS)
        .map(|_| {
            let (broker, address) = (Arc::clone(&stage.broker), address.clone());
            tokio::spawn(async move {
                let deadline = Deadline::after(Duration::from_millis(500));
                let asked = broker
                    .request(&address, Bytes::from_static(b"stale"), deadline)
                    .await;
                let error = must_fail("a ping of a machine that sleeps", asked)?;
                let silent = [ErrorKind::ConsumerSilent, ErrorKind::NoConsumer];
                expect(
                    silent.contains(error.kind()),
                    "silent, or not there",
                    &error,
                )
            })
        })
        .collect();
    join_all(pings).await?;
    let after = stage.broker.status(&address.queue(), long()).await?;
    same("messages", after.messages(), before.messages())?;
    machine.0.resume()?;
    // It answers again, and takes commands; where its absence was noticed, once it is attached again.
    let call = Order::Call {
        guest: guest.clone(),
        kind: "list_users".into(),
    };
    let ping = Order::Ping {
        guest: guest.clone(),
        within_ms: 20_000,
    };
    let deadline = long();
    while let Err((_, error)) = control.try_answer(&ping, &guest).await? {
        expect(!deadline.has_passed(), "the guest answers again", error)?;
    }
    let users = control.answer(&call, &guest).await?;
    same("what the call returns", users, serde_json::json!(["root"]))?;
    stage.ran(&guest, 1)?;
    stage.clear(&[&guest]).await?;
    Ok(Evidence::of("stale pings", PINGS))
}

/// Another command before prepare is done: NotPrepared, or held until it is.
pub async fn w32_other_commands_wait_for_prepare(cx: &Cx) -> CheckResult {
    let stage = Stage::new(cx, "w32").await?;
    let mut control = stage.control().await?;
    let guest = stage.id("early")?;
    let address = GuestAddress::from(guest.clone());
    let mut machine = stage.guest(&guest).act(Act::Wait).start().await?;
    control
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    machine.running().await?;
    let call = Order::Call {
        guest: guest.clone(),
        kind: "list_users".into(),
    };
    let refused = control.try_answer(&call, &guest).await?;
    let kind = refused.err().map(|(kind, _)| kind);
    same(
        "a call before prepare is done",
        kind.as_deref(),
        Some("NotPrepared"),
    )?;
    // One that is in the queue all the same.
    let payload = serde_json::value::RawValue::NULL.to_owned();
    let kind = MessageId::new("list_users")?;
    let command = Command::new(&address, MessageId::generate(), kind, None, payload);
    stage.put_raw(&address, command.to_message()?).await?;
    let ping = Order::Ping {
        guest: guest.clone(),
        within_ms: 20_000,
    };
    control.answer(&ping, &guest).await?;
    same(
        "effects before prepare is done",
        stage.effects(&guest)?.len(),
        1,
    )?;
    machine.0.order(&Order::Open).await?;
    control.succeeds(&guest).await?;
    until_status(&*stage.broker, &address.queue(), "settled", |status| {
        status.messages() == 0
    })
    .await?;
    let users = control.answer(&call, &guest).await?;
    same("what the call returns", users, serde_json::json!(["root"]))?;
    let effects = stage.effects(&guest)?;
    same("effects, the held one's included", effects.len(), 3)?;
    expect(
        effects[0].starts_with("prepare"),
        "prepare runs first",
        format!("{effects:?}"),
    )?;
    stage.clear(&[&guest]).await?;
    Ok(Evidence::of("commands that came early", 2))
}

/// A guest whose clock is ten years ahead, and one whose clock is ten years behind.
pub async fn w34_a_wrong_clock_changes_nothing(cx: &Cx) -> CheckResult {
    const FAKETIME: &str = "faketime";
    let found = std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|directory| directory.join(FAKETIME).is_file())
    });
    if !found {
        return Err(
            Unavailable::because("there is no `faketime` program (Debian: faketime)").into(),
        );
    }
    let stage = Stage::new(cx, "w34").await?;
    let mut control = stage.control().await?;
    let mut guests = Vec::new();
    for (name, clock) in [("ahead", "+3650d"), ("behind", "-3650d")] {
        let guest = stage.id(name)?;
        // Only what the clock on the wall says: no machine's monotonic clock jumps.
        let before = [
            "env",
            "FAKETIME_DONT_FAKE_MONOTONIC=1",
            FAKETIME,
            "-f",
            clock,
        ];
        let actor = stage.actor(&before)?;
        let machine = stage.guest(&guest).start_in(actor).await?;
        control
            .provision(&guest, SendPolicy::PingFirst, patient())
            .await?;
        same("runs", control.succeeds(&guest).await?, 1)?;
        stage.ran(&guest, 1)?;
        drop(machine);
        guests.push(guest);
    }
    stage.clear(&[&guests[0], &guests[1]]).await?;
    Ok(Evidence::of("guests with wrong clocks", 2))
}
