//! W35: somebody who can write to a guest's queue and lane, and has no key that the guest trusts.

use serde_json::{Value, json};
use wilco::{
    GuestAddress, GuestId, Message, MessageId, ReasonKind, Record, SendPolicy, State, wire::Command,
};

use super::stage::{Control, Stage, patient};
use crate::{
    actor::{Order, Stop},
    check::{CheckError, CheckResult, Cx, Evidence},
    support::*,
};

/// What strangers put into the queue before the true prepare, one of it under its id: each is refused,
/// kept, counted and told, and the true one runs once. Without trust a forged one runs.
pub async fn w35_what_a_stranger_sends_is_refused(cx: &Cx) -> CheckResult {
    let stage = Stage::signed(cx, "w35").await?;
    let stop = Stop::before("publish prepare").held();
    let mut control = stage.control_stopping(stop).await?;
    control.ready().await?;
    let guest = stage.id("target")?;
    let address = GuestAddress::from(guest.clone());
    control
        .provision(&guest, SendPolicy::EnqueueFirst, patient())
        .await?;
    control.held().await?;
    let record = control.record(&guest).await?;
    let other = stage.id("other")?;
    let of_another = recorded_on_its_way(&stage, &mut control, &other).await?;
    let strange = strange(&record, &of_another)?;
    for (_, message) in &strange {
        stage.put_raw(&address, message.clone()).await?;
    }
    control.go().await?;
    // By the broker's word the true one is there: where ids are known again, it took the forged for it.
    control.reaches(&guest, State::Sent).await?;
    let mut machine = stage.guest(&guest).attached().await?;
    same("runs", control.succeeds(&guest).await?, 1)?;
    stage.ran(&guest, 1)?;
    machine.running().await?;

    is_kept(&stage, &address, &strange).await?;
    let refused = strange.len() as u64 + dismissed_by_a_stranger(&stage, &address).await?;
    is_told(&mut control, &guest, refused, strange.len() as u64).await?;
    has_no_second_effect(&stage, &mut control, &other, of_another).await?;
    stage.clear(&[&guest, &other]).await?;
    without_trust_a_stranger_is_obeyed(cx).await?;
    Ok(Evidence::of("refused", refused))
}

/// Another machine's prepare, truly signed, as somebody reads it who has its credential.
async fn recorded_on_its_way(
    stage: &Stage<'_>,
    control: &mut Control,
    guest: &GuestId,
) -> Result<Message, CheckError> {
    control
        .provision(guest, SendPolicy::EnqueueFirst, patient())
        .await?;
    control.reaches(guest, State::Sent).await?;
    let queue = GuestAddress::from(guest.clone()).queue();
    let mut thief = attach(&*stage.broker, &queue, 1).await?;
    let recorded = receive(&mut *thief).await?.message.clone();
    thief.close(long()).await?;
    Ok(recorded)
}

/// What was recorded comes again to the machine that it was for, and runs once.
async fn has_no_second_effect(
    stage: &Stage<'_>,
    control: &mut Control,
    guest: &GuestId,
    recorded: Message,
) -> Result<(), CheckError> {
    let _machine = stage.guest(guest).start().await?;
    control.succeeds(guest).await?;
    let address = GuestAddress::from(guest.clone());
    stage.put_raw(&address, recorded).await?;
    let call = Order::Call {
        guest: guest.clone(),
        kind: "list_users".into(),
    };
    let users = control.answer(&call, guest).await?;
    same("what the call returns", users, json!(["root"]))?;
    stage.ran(guest, 1)
}

/// What a stranger can send, and why it is refused.
fn strange(
    record: &Record,
    of_another: &Message,
) -> Result<Vec<(&'static str, Message)>, CheckError> {
    let forged = |id: MessageId| -> Result<Message, CheckError> {
        let kind = MessageId::new(record.kind())?;
        let payload = record.payload.clone();
        let command = Command::new(&record.address, id, kind, None, payload);
        Ok(command.to_message()?)
    };
    let with_headers = |message: Message| message.with_headers(of_another.headers.clone());
    let mut of_nobody = with_headers(forged(MessageId::generate())?);
    of_nobody.headers.insert("wilco-key", "0123456789abcdef")?;
    let older = forged(MessageId::generate())?;
    let mut body: Value = serde_json::from_slice(&older.body)
        .map_err(|error| CheckError::failed("a command is JSON", error))?;
    body["wilco"] = 0.into();
    let older = Message::new(record.kind(), body.to_string())?.with_id(older.id);
    Ok(vec![
        ("unsigned", forged(MessageId::generate())?),
        ("unknown_key", of_nobody),
        // Under the true one's id, which a broker that knows ids again takes for it.
        ("forged", with_headers(forged(record.command.clone())?)),
        ("wrong_incarnation", of_another.clone()),
        ("version_unsupported", older),
    ])
}

/// Every one is a dead letter with its bytes and why.
async fn is_kept(
    stage: &Stage<'_>,
    machine: &GuestAddress,
    strange: &[(&str, Message)],
) -> Result<(), CheckError> {
    let queue = machine.queue();
    until_status(&*stage.broker, &queue, "all dealt with", |status| {
        status.dead == strange.len() as u64 && status.messages() == status.dead
    })
    .await?;
    let letters = stage
        .broker
        .dead_letters(&queue, None, count(10), long())
        .await?;
    for (kind, message) in strange {
        let letter = letters.iter().find(|letter| {
            (&letter.message.id, &letter.message.body) == (&message.id, &message.body)
        });
        let reason = letter.map(|letter| letter.reason.as_str());
        expect(
            reason.is_some_and(|reason| reason.starts_with(kind)),
            format!("a dead letter that is {kind}"),
            format!("{reason:?}"),
        )?;
    }
    Ok(())
}

/// Who can write to the lane cannot end the guest. Returns how many questions were asked.
async fn dismissed_by_a_stranger(
    stage: &Stage<'_>,
    machine: &GuestAddress,
) -> Result<u64, CheckError> {
    let dismiss = json!({ "wilco": 1, "guest": machine.guest, "incarnation": 1, "ask": "dismiss" });
    let dismiss = dismiss.to_string().into();
    let answer = stage.broker.request(machine, dismiss, long()).await?;
    let answer = String::from_utf8_lossy(&answer);
    expect(
        answer.contains("unsigned"),
        "a dismissal is refused",
        &answer,
    )?;
    Ok(1)
}

/// The guest counts what it refused, and the control plane was told.
async fn is_told(
    control: &mut Control,
    guest: &GuestId,
    refused: u64,
    reported: u64,
) -> Result<(), CheckError> {
    let ping = Order::Ping {
        guest: guest.clone(),
        within_ms: 20_000,
    };
    let deadline = long();
    loop {
        let pong = control.answer(&ping, guest).await?;
        let count = |name: &str| pong[name].as_u64().unwrap_or(0);
        if count("refused") >= refused && count("told") >= reported {
            return Ok(());
        }
        expect(
            !deadline.has_passed(),
            "refusals are counted and told",
            &pong,
        )?;
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// What the signatures are there for: a guest that trusts everybody runs the stranger's prepare.
async fn without_trust_a_stranger_is_obeyed(cx: &Cx) -> Result<(), CheckError> {
    let stage = Stage::new(cx, "w35-open").await?;
    let stop = Stop::before("publish prepare").held();
    let mut control = stage.control_stopping(stop).await?;
    control.ready().await?;
    let guest = stage.id("target")?;
    let address = GuestAddress::from(guest.clone());
    control
        .provision(&guest, SendPolicy::EnqueueFirst, patient())
        .await?;
    control.held().await?;
    let record = control.record(&guest).await?;
    let kind = MessageId::new(record.kind())?;
    let (id, payload) = (MessageId::generate(), record.payload.clone());
    let forged = Command::new(&address, id, kind, None, payload);
    stage.put_raw(&address, forged.to_message()?).await?;
    control.go().await?;
    let _machine = stage.guest(&guest).start().await?;
    control.fails(&guest, ReasonKind::Conflict).await?;
    stage.ran(&guest, 1)?;
    stage.clear(&[&guest]).await
}
