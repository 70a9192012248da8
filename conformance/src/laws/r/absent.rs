//! R2, R3, R7: nobody there, or somebody who does not answer.

use std::time::{Duration, Instant};

use wilco::{Deadline, ErrorKind};

use crate::{
    agent::Agent,
    check::{CheckError, CheckResult, Cx, Evidence},
    support::*,
};

/// Nobody there: `NoConsumer` in a round trip, before and after somebody was, with a queue and
/// without; nobody who comes later is asked.
pub async fn r2_nobody_there_is_no_consumer_at_once(cx: &Cx) -> CheckResult {
    const PINGS: usize = 40;
    let handles = handles(cx, 2).await?;
    let lane = guest("r2")?;
    let mut slowest = Duration::ZERO;
    for round in 0..3 {
        if round == 1 {
            queue(&*handles[0], "r2").await?;
        }
        for _ in 0..PINGS {
            let ping = handles[0].request(&lane, "anybody".into(), long());
            let (answer, took) = timed("a ping", ping).await?;
            must_be("a ping of nobody", answer, &ErrorKind::NoConsumer)?;
            expect(
                took < ROUND_TRIP,
                "within a round trip",
                format!("{took:?}"),
            )?;
            slowest = slowest.max(took);
        }
        // Whoever attaches now hears only what is asked from now on.
        let mut responder = attach_lane(&*handles[1], &lane).await?;
        let (answer, served) =
            tokio::join!(handles[0].request(&lane, "you".into(), long()), async {
                let asked = asked(&mut *responder).await?;
                same("the first question", asked.body.clone(), "you".into())?;
                Ok::<_, CheckError>(asked.reply("yes".into(), long()).await?)
            });
        served?;
        same("the answer", answer?, "yes".into())?;
        drop(responder);
    }
    // Consuming is not attending the lane.
    let consumer = attach(&*handles[1], &lane.queue(), 1).await?;
    let answer = handles[0].request(&lane, "anybody".into(), long()).await;
    must_be(
        "a ping of a consumer without a lane",
        answer,
        &ErrorKind::NoConsumer,
    )?;
    drop(consumer);
    Ok(Evidence::of("pings", PINGS * 3 + 1).and("slowest us", slowest.as_micros()))
}

/// Attached but silent: `ConsumerSilent` at the deadline, not before and not long after; whether the
/// responder never looks, or looks and drops the request.
pub async fn r3_attached_but_hung_is_consumer_silent(cx: &Cx) -> CheckResult {
    let handles = handles(cx, 2).await?;
    let lane = guest("r3")?;
    let mut responder = attach_lane(&*handles[1], &lane).await?;
    for limit in [50, 200, 600].map(Duration::from_millis) {
        let started = Instant::now();
        let answer = handles[0]
            .request(&lane, "hello".into(), Deadline::after(limit))
            .await;
        let took = started.elapsed();
        must_be(
            "a ping of one that never looks",
            answer,
            &ErrorKind::ConsumerSilent,
        )?;
        let in_time = took >= limit && took < limit + ROUND_TRIP;
        expect(
            in_time,
            format!("at the deadline, {limit:?}"),
            format!("{took:?}"),
        )?;
        // Those that were given up may still stand in the lane; they go the same way.
        let deadline = Deadline::after(limit);
        let (answer, _) =
            tokio::join!(handles[0].request(&lane, "hello".into(), deadline), async {
                while let Ok(Ok(request)) =
                    tokio::time::timeout_at(deadline.instant(), responder.next()).await
                {
                    drop(request);
                }
            });
        must_be(
            "a ping of one that drops it",
            answer,
            &ErrorKind::ConsumerSilent,
        )?;
    }
    Ok(Evidence::of("pings", 6))
}

/// A guest process killed: from `Pong` to `NoConsumer` within the stated bound.
pub async fn r3_a_killed_guest_becomes_no_consumer(cx: &Cx) -> CheckResult {
    const KILLS: usize = 3;
    let broker = cx.connect().await?;
    let lane = guest("r3-killed")?;
    let mut slowest = Duration::ZERO;
    for round in 0..KILLS {
        let mut agent = Agent::start(cx).await?;
        let answers = round % 2 == 0;
        agent.respond(&lane, answers).await?;
        let limit = Deadline::after(if answers {
            LONG
        } else {
            Duration::from_millis(300)
        });
        let answer = broker.request(&lane, "there?".into(), limit).await;
        if answers {
            same("the answer", answer?, "there?".into())?;
        } else {
            must_be("a silent process", answer, &ErrorKind::ConsumerSilent)?;
        }
        agent.kill().await?;
        let killed = Instant::now();
        let bound = cx.takeover();
        loop {
            let limit = Deadline::after(Duration::from_millis(200));
            let answer = broker.request(&lane, "there?".into(), limit).await;
            let error = must_fail("a ping of a killed process", answer)?;
            if *error.kind() == ErrorKind::NoConsumer {
                break;
            }
            same(
                "until then",
                error.kind().clone(),
                ErrorKind::ConsumerSilent,
            )?;
            let since = killed.elapsed();
            expect(
                since < bound,
                format!("NoConsumer within {bound:?}"),
                format!("{since:?}"),
            )?;
        }
        slowest = slowest.max(killed.elapsed());
    }
    Ok(Evidence::of("kills", KILLS).and("slowest ms", slowest.as_millis()))
}

/// The deadline is total: with nobody there, with a silent one, on a closed handle, and already over.
pub async fn r7_the_deadline_is_total(cx: &Cx) -> CheckResult {
    let handles = handles(cx, 2).await?;
    let (absent, silent) = (guest("r7-absent")?, guest("r7-silent")?);
    let _responder = attach_lane(&*handles[1], &silent).await?;
    let mut calls = 0;
    for limit in [0, 1, 20, 300].map(Duration::from_millis) {
        for lane in [&absent, &silent] {
            let call = handles[0].request(lane, "x".into(), Deadline::after(limit));
            let (answer, took) = timed("a request", call).await?;
            must_fail("a request that nobody answers", answer)?;
            let total = limit + Duration::from_millis(250);
            expect(
                took < total,
                format!("over after {limit:?}"),
                format!("{took:?}"),
            )?;
            calls += 1;
        }
    }
    let closed = cx.connect().await?;
    closed.close(long()).await?;
    let (answer, took) = timed("a request", closed.request(&silent, "x".into(), long())).await?;
    must_be("a request on a closed handle", answer, &ErrorKind::Closed)?;
    expect(took < ROUND_TRIP, "at once", format!("{took:?}"))?;
    Ok(Evidence::of("calls", calls + 1))
}
