//! R1, R4, R5, R6, R8: answers, each to its own asker.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use wilco::{
    Broker, Deadline, ErrorKind, GuestAddress,
    broker::{MAX_REQUEST_BYTES, Request, Responder},
};

use crate::{
    check::{CheckError, CheckResult, Cx, Evidence},
    support::*,
};

/// What was asked arrives byte for byte, and so does the answer, from another handle too.
pub async fn r1_a_question_and_its_answer_arrive_whole(cx: &Cx) -> CheckResult {
    let handles = handles(cx, 2).await?;
    let lane = guest("r1")?;
    let mut responder = attach_lane(&*handles[1], &lane).await?;
    let mut rng = cx.rng();
    let mut bodies: Vec<Bytes> = vec![
        Bytes::new(),
        Bytes::from_static(b"\0"),
        Bytes::from_static(b"\xff\xc3\x28\r\n"),
        Bytes::from_static(b"{\"nonce\": 1}"),
        Bytes::from((0..=255).collect::<Vec<u8>>()),
    ];
    for size in [4096, 65_536, MAX_REQUEST_BYTES] {
        bodies.push((0..size).map(|_| rng.u8(..)).collect::<Vec<u8>>().into());
    }
    for (n, body) in bodies.iter().enumerate() {
        let reply = bodies[bodies.len() - 1 - n].clone();
        let (answer, asked) = ask(&*handles[n % 2], &lane, body.clone(), async {
            let asked = asked(&mut *responder).await?;
            let seen = asked.body.clone();
            asked.reply(reply.clone(), long()).await?;
            Ok(seen)
        })
        .await?;
        same("the question", asked, body.clone())?;
        same("the answer", answer, reply)?;
    }
    Ok(Evidence::of("questions", bodies.len()))
}

/// Asks and serves at the same time; both have to succeed.
async fn ask<T>(
    broker: &dyn Broker,
    lane: &GuestAddress,
    body: Bytes,
    serve: impl Future<Output = Result<T, CheckError>>,
) -> Result<(Bytes, T), CheckError> {
    let asking = async {
        broker
            .request(lane, body, long())
            .await
            .map_err(CheckError::from)
    };
    tokio::try_join!(asking, serve)
}

/// A guest with its prefetch full of unsettled deliveries answers at once.
pub async fn r4_a_busy_guest_still_answers(cx: &Cx) -> CheckResult {
    const PINGS: usize = 100;
    let handles = handles(cx, 2).await?;
    let lane = guest("r4")?;
    let name = queue(&*handles[0], "r4").await?;
    for n in 0..8 {
        put(&*handles[0], &name, format!("m{n}")).await?;
    }
    let mut consumer = attach(&*handles[1], &name, 4).await?;
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(receive(&mut *consumer).await?);
    }
    let mut responder = attach_lane(&*handles[1], &lane).await?;
    let mut slowest = Duration::ZERO;
    for n in 0..PINGS {
        let body = Bytes::from(n.to_string());
        let call = ask(&*handles[0], &lane, body.clone(), echo(&mut *responder));
        let (answered, took) = timed("a ping", call).await?;
        same("the answer", answered?.0, body)?;
        expect(
            took < ROUND_TRIP,
            "each within a round trip",
            format!("{took:?}"),
        )?;
        slowest = slowest.max(took);
    }
    for delivery in held {
        same("attempt", delivery.attempt, 1)?;
        delivery.ack(long()).await?;
    }
    Ok(Evidence::of("pings", PINGS).and("slowest us", slowest.as_micros()))
}

async fn echo(responder: &mut dyn Responder) -> Result<(), CheckError> {
    let asked = asked(responder).await?;
    let body = asked.body.clone();
    Ok(asked.reply(body, long()).await?)
}

/// 1,000 in flight from two handles, answered in a random order: each asker gets its own.
pub async fn r5_each_caller_gets_its_own_answer(cx: &Cx) -> CheckResult {
    const CALLS: usize = 1_000;
    let handles = handles(cx, 3).await?;
    let lane = guest("r5")?;
    let mut responder = attach_lane(&*handles[2], &lane).await?;
    let calls = (0..CALLS).map(|n| {
        let (broker, lane) = (Arc::clone(&handles[n % 2]), lane.clone());
        tokio::spawn(async move {
            let question = Bytes::from(format!("question {n}"));
            let answer = broker.request(&lane, question.clone(), long()).await?;
            let own = format!("answer to {}", String::from_utf8_lossy(&question));
            same("the answer", answer, Bytes::from(own))
        })
    });
    let calls: Vec<_> = calls.collect();
    let mut waiting: Vec<Request> = Vec::new();
    for _ in 0..CALLS {
        waiting.push(asked(&mut *responder).await?);
    }
    cx.rng().shuffle(&mut waiting);
    for request in waiting {
        let answer = format!("answer to {}", String::from_utf8_lossy(&request.body));
        request.reply(answer.into(), long()).await?;
    }
    join_all(calls).await?;
    Ok(Evidence::of("in flight at once", CALLS))
}

/// A reply that comes after its asker gave up is dropped; the next asker gets its own.
pub async fn r5_a_late_reply_reaches_nobody(cx: &Cx) -> CheckResult {
    const TIMES: usize = 20;
    let handles = handles(cx, 2).await?;
    let lane = guest("r5-late")?;
    let mut responder = attach_lane(&*handles[1], &lane).await?;
    for n in 0..TIMES {
        let short = Deadline::after(Duration::from_millis(100));
        let (silent, late) = tokio::join!(
            handles[0].request(&lane, format!("late {n}").into(), short),
            asked(&mut *responder)
        );
        must_be("an unanswered request", silent, &ErrorKind::ConsumerSilent)?;
        let late = late?;
        let asking = handles[0].request(&lane, format!("now {n}").into(), long());
        let serving = async {
            let now = asked(&mut *responder).await?;
            same("the question", now.body.clone(), format!("now {n}").into())?;
            // Whether it is told that nobody waits is the backend's to say.
            let _ = late.reply("too late".into(), long()).await;
            now.reply(format!("answer {n}").into(), long()).await?;
            Ok::<_, CheckError>(())
        };
        let (answer, served) = tokio::join!(asking, serving);
        served?;
        same("the answer", answer?, format!("answer {n}").into())?;
    }
    Ok(Evidence::of("late replies", TIMES))
}

/// Askers that give up, are cut off, or close their handle: the responder goes on.
pub async fn r6_a_vanished_requester_harms_nobody(cx: &Cx) -> CheckResult {
    const TIMES: usize = 40;
    let broker = cx.connect().await?;
    let lane = guest("r6")?;
    let mut responder = attach_lane(&*broker, &lane).await?;
    let mut vanished = 0;
    for n in 0..TIMES {
        let asker = cx.connect().await?;
        let asking = tokio::spawn({
            let (asker, lane) = (Arc::clone(&asker), lane.clone());
            async move { asker.request(&lane, "vanishes".into(), long()).await }
        });
        let request = asked(&mut *responder).await?;
        asking.abort();
        let _ = asking.await;
        if n % 2 == 0 {
            asker.close(long()).await?;
        }
        drop(asker);
        vanished += 1;
        let (replied, _) =
            timed("a reply to nobody", request.reply("hello?".into(), long())).await?;
        drop(replied);
        let (answer, ()) = ask(&*broker, &lane, "here".into(), echo(&mut *responder)).await?;
        same("the next one's answer", answer, "here".into())?;
    }
    Ok(Evidence::of("vanished", vanished))
}

/// An answer that is an error passes as it is; one that cannot be sent is a typed error on the side
/// that tried, and the asker is not left with half of it.
pub async fn r8_errors_pass_typed_and_whole(cx: &Cx) -> CheckResult {
    let broker = cx.connect().await?;
    let lane = guest("r8")?;
    let mut responder = attach_lane(&*broker, &lane).await?;
    let envelope =
        Bytes::from_static(br#"{"error":{"kind":"no_such_database","message":"\u00e9"}}"#);
    let (answer, ()) = ask(&*broker, &lane, "fail".into(), async {
        let asked = asked(&mut *responder).await?;
        Ok(asked.reply(envelope.clone(), long()).await?)
    })
    .await?;
    same("the error", answer, envelope)?;
    let limit = MAX_REQUEST_BYTES as u64;
    let large = Bytes::from(vec![b'x'; MAX_REQUEST_BYTES + 1]);
    let refused = broker.request(&lane, large.clone(), long()).await;
    must_be(
        "a question over the limit",
        refused,
        &ErrorKind::TooLarge { limit },
    )?;
    let deadline = Deadline::after(Duration::from_millis(500));
    let (answer, refused) = tokio::join!(broker.request(&lane, "large".into(), deadline), async {
        let asked = asked(&mut *responder).await?;
        Ok::<_, CheckError>(asked.reply(large, long()).await)
    });
    must_be(
        "an answer over the limit",
        refused?,
        &ErrorKind::TooLarge { limit },
    )?;
    must_be("the asker", answer, &ErrorKind::ConsumerSilent)?;
    Ok(Evidence::of("errors", 3))
}
