//! S2: garbage from whoever can write to a guest's queue and lane, and to the queue of reports.

use bytes::Bytes;
use serde_json::json;
use wilco::{GuestAddress, Message, MessageId, QueueName, SendPolicy};

use super::stage::{Stage, patient};
use crate::{
    actor::Order,
    check::{CheckError, CheckResult, Cx, Evidence},
    support::*,
};

/// How much of it goes to each place in a round.
const EACH: usize = 50;

/// What a process may grow by after the first round: much less than what it is sent.
const GROWTH: u64 = 24 << 20;

/// Garbage into the queue, the lane and the queue of reports: nobody falls over or swells, every byte is
/// kept among the dead letters, and service goes on.
pub async fn s2_garbage_stops_nobody(cx: &Cx) -> CheckResult {
    let mut rng = fastrand::Rng::with_seed(cx.options.seed);
    let stage = Stage::new(cx, "s2").await?;
    let mut control = stage.control().await?;
    let guest = stage.id("target")?;
    let address = GuestAddress::from(guest.clone());
    let mut machine = stage.guest(&guest).start().await?;
    control
        .provision(&guest, SendPolicy::PingFirst, patient())
        .await?;
    control.succeeds(&guest).await?;
    machine.running().await?;

    let (queue, reports) = (address.queue(), stage.reports()?);
    let (mut commands, mut told) = (vec![], vec![]);
    let mut sizes = vec![];
    for _ in 0..3 {
        for _ in 0..EACH {
            for (place, kept) in [(&queue, &mut commands), (&reports, &mut told)] {
                let body = garbage(&mut rng);
                let kind = MessageId::new(*rng.choice(KINDS).unwrap_or(&"prepare"))?;
                let message = Message::new(kind.as_str(), body.clone())?;
                stage.broker.publish(place, message, long()).await?;
                kept.push(body);
            }
            // Nobody has to answer nonsense; it must not be what ends the lane.
            let asked = garbage(&mut rng);
            stage.broker.request(&address, asked, long()).await?;
        }
        are_kept(&stage, &queue, &commands).await?;
        are_kept(&stage, &reports, &told).await?;
        sizes.push((machine.0.memory()?, control.0.memory()?));
    }
    let ((guest_first, control_first), (guest_last, control_last)) = (sizes[0], sizes[2]);
    for (who, first, last) in [
        ("the guest", guest_first, guest_last),
        ("the taskmanager", control_first, control_last),
    ] {
        expect(
            last <= first + GROWTH,
            format!("{who} stays as large as it is"),
            format!("{first} bytes, then {last}"),
        )?;
    }

    let call = Order::Call {
        guest: guest.clone(),
        kind: "list_users".into(),
    };
    let users = control.answer(&call, &guest).await?;
    same("what a call returns", users, json!(["root"]))?;
    let next = stage.id("next")?;
    let _next = stage.guest(&next).start().await?;
    control
        .provision(&next, SendPolicy::PingFirst, patient())
        .await?;
    control.succeeds(&next).await?;
    stage.ran(&guest, 1)?;
    stage.ran(&next, 1)?;
    stage.clear(&[&guest, &next]).await?;
    Ok(Evidence::of("pieces of garbage", EACH * 9).and("kept", commands.len() + told.len()))
}

const KINDS: &[&str] = &["prepare", "report", "list_users", "x", "00000000"];

/// Bytes such as a stranger, a bug or an old version sends.
fn garbage(rng: &mut fastrand::Rng) -> Bytes {
    let text = match rng.u8(0..7) {
        0 => {
            let length = rng.usize(0..2_048);
            return std::iter::repeat_with(|| rng.u8(..)).take(length).collect();
        }
        // Deeper than any stack.
        1 => "[".repeat(rng.usize(1..8_192)),
        2 => format!("{{\"wilco\":1,\"payload\":{}", "{\"a\":".repeat(2_000)),
        3 => json!({ "wilco": 1, "guest": [], "command": {}, "kind": 7, "payload": null })
            .to_string(),
        4 => format!("{{\"wilco\":{}}}", "9".repeat(rng.usize(1..400))),
        5 => json!({ "wilco": 1, "event": "x".repeat(4_096), "ask": { "ping": 1 } }).to_string(),
        _ => {
            let whole = json!({ "wilco": 1, "guest": "g", "incarnation": 1, "ask": "dismiss" });
            let mut whole = whole.to_string();
            whole.truncate(rng.usize(0..whole.len()));
            whole
        }
    };
    text.into()
}

/// All of it is among the dead letters, byte for byte, and nothing else is left to deal with.
async fn are_kept(
    stage: &Stage<'_>,
    queue: &QueueName,
    bodies: &[Bytes],
) -> Result<(), CheckError> {
    until_status(&*stage.broker, queue, "all dealt with", |status| {
        status.dead == bodies.len() as u64 && status.messages() == status.dead
    })
    .await?;
    let page = count(u32::try_from(bodies.len()).unwrap_or(u32::MAX));
    let letters = stage.broker.dead_letters(queue, None, page, long()).await?;
    let mut kept: Vec<_> = letters
        .into_iter()
        .map(|letter| letter.message.body)
        .collect();
    let mut sent = bodies.to_vec();
    kept.sort();
    sent.sort();
    expect(kept == sent, "every byte of it is kept", kept.len())
}
