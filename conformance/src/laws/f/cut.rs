//! F4: the connection cut behind every protocol frame in turn, and the set looked at after each.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all as all_of;
use wilco::{
    Broker, Deadline, ErrorKind, QueueName,
    broker::{DeleteMode, QueueSpec},
};

use super::{
    GRACE, TRY, back,
    crew::{note_ack, note_publish},
    proxy, until_ok, via,
};
use crate::{
    check::{CheckError, CheckResult, Cx, Evidence},
    ledger::{Event, History, Minimum},
    proxy::{After, Toward},
    support::*,
    workload::{finish, verdict},
};

/// Declare, publish, attach, receive, ack, ping, close, with the connection cut behind the first
/// frame, then behind the second, and so on until there is no frame left, in both directions: each
/// time everybody goes on by himself, nothing confirmed is lost, nothing that was surely not stored
/// shows up, nothing acked comes back.
pub async fn f4_cut_behind_every_frame_in_turn(cx: &Cx) -> CheckResult {
    /// So many at once: most of the time is spent waiting.
    const AT_ONCE: u64 = 8;
    /// Nobody needs so many: a backend that did would be talking in circles.
    const MOST: u64 = 600;
    let direct = cx.connect().await?;
    let mut evidence = Evidence::default();
    for (toward, what) in [
        (Toward::Broker, "cuts on the way to the broker"),
        (Toward::Client, "cuts on the way back"),
    ] {
        let mut cuts = 0;
        let mut next = 1;
        loop {
            let rounds = (next..next + AT_ONCE).map(|n| round(cx, &direct, toward, n));
            let mut over = false;
            for cut in all_of(rounds).await {
                if cut? {
                    cuts += 1;
                } else {
                    over = true;
                }
            }
            if over {
                break;
            }
            next += AT_ONCE;
            expect(next < MOST, format!("at most {MOST} frames"), next)?;
        }
        expect(cuts > 10, format!("{what}: more than 10"), cuts)?;
        evidence = evidence.and(what, cuts);
    }
    Ok(evidence)
}

/// One pass with one cut; false if there was no such frame any more.
async fn round(
    cx: &Cx,
    direct: &Arc<dyn Broker>,
    toward: Toward,
    frame: u64,
) -> Result<bool, CheckError> {
    let tag = format!("f4-{toward:?}-{frame}").to_lowercase();
    // Every other cut takes all connections with it.
    let passed = pass(
        cx,
        direct,
        toward,
        After::Frames(frame),
        frame.is_multiple_of(2),
        &tag,
    )
    .await;
    passed.map_err(|error| match error {
        CheckError::Failed(mut failure) => {
            failure.expected = format!(
                "cut behind frame {frame} toward the {toward:?}: {}",
                failure.expected
            );
            CheckError::Failed(failure)
        }
        other => other,
    })
}

async fn pass(
    cx: &Cx,
    direct: &Arc<dyn Broker>,
    toward: Toward,
    after: After,
    all: bool,
    tag: &str,
) -> Result<bool, CheckError> {
    const MESSAGES: usize = 3;
    let (faults, proxy) = proxy(cx).await?;
    let (host, guest) = (via(faults, &proxy).await?, via(faults, &proxy).await?);
    let history = super::history(cx);
    let (lane, name) = (self::guest(tag)?, self::guest(tag)?.queue());
    let (bound, nothing) = (back(cx), |_: &wilco::Error| false);
    proxy.cut(toward, after, all);
    history.note(Event::Fault {
        what: format!("a cut toward the {toward:?}: {after:?}"),
    });
    history.note(Event::Down);

    let spec = QueueSpec::new(name.clone());
    until_ok("declare", bound, nothing, |by| host.declare(&spec, by)).await?;
    for n in 0..MESSAGES {
        let id = format!("m{n}");
        until_ok("publish", bound, nothing, |by| {
            note_publish(&*host, &name, &id, by, &history)
        })
        .await?;
    }
    // An attach whose answer was cut off may count until it is noticed that nobody is there.
    let not_yet = |error: &wilco::Error| *error.kind() == ErrorKind::Conflict;
    let mut consumer = until_ok("consume", bound, not_yet, |by| {
        guest.consume(&name, prefetch(2), by)
    })
    .await?;
    let mut acked = 0;
    let end = Deadline::after(bound);
    while acked < MESSAGES - 1 {
        let delivery = receive_within(&mut *consumer, end.remaining()).await?;
        history.note(Event::delivery(&name, &delivery));
        let (result, took) =
            timed("an ack", note_ack(&name, delivery, TRY.into(), &history)).await?;
        expect(
            took < TRY + GRACE,
            format!("an ack ends by its deadline, {TRY:?}"),
            format!("{took:?}"),
        )?;
        match result {
            Ok(()) => acked += 1,
            Err(error) => {
                let lost = *error.kind() == ErrorKind::LeaseLost || super::is_outage(&error);
                expect(lost, "an ack is Ok or its lease is lost", error)?;
            }
        }
    }
    let mut responder = until_ok("respond", bound, not_yet, |by| guest.respond(&lane, by)).await?;
    let answering = tokio::spawn(async move {
        loop {
            let request = responder.next().await?;
            let body = request.body.clone();
            drop(request.reply(body, TRY.into()).await);
        }
        #[allow(unreachable_code)]
        Ok::<(), wilco::Error>(())
    });
    let unheard = |error: &wilco::Error| {
        matches!(
            error.kind(),
            ErrorKind::NoConsumer | ErrorKind::ConsumerSilent
        )
    };
    let answer = until_ok("request", bound, unheard, |by| {
        host.request(&lane, "ping".into(), by)
    });
    same("the answer", answer.await?.as_ref(), b"ping")?;
    answering.abort();
    leave(consumer.close(long()), "the consumer closes").await?;
    leave(guest.close(long()), "the guest's handle closes").await?;
    leave(host.close(long()), "the host's handle closes").await?;
    let fired = !proxy.disarm();
    history.note(Event::Up);
    look(cx, direct, &name, &history, MESSAGES).await?;
    Ok(fired)
}

/// A close may be what was cut; it ends all the same.
async fn leave(
    close: impl Future<Output = wilco::Result<()>>,
    what: &str,
) -> Result<(), CheckError> {
    let started = Instant::now();
    match timed(what, close).await?.0 {
        Err(error) if !super::is_outage(&error) => Err(error.into()),
        _ => expect(
            started.elapsed() < LONG,
            format!("{what} before its deadline"),
            format!("{:?}", started.elapsed()),
        ),
    }
}

/// The set-check: what is left is drained past the proxy, and the ledger judges.
async fn look(
    cx: &Cx,
    direct: &Arc<dyn Broker>,
    name: &QueueName,
    history: &History,
    messages: usize,
) -> Result<(), CheckError> {
    let vanished = until_ok(
        "a guest past the proxy is let in",
        cx.takeover() + Duration::from_secs(5),
        |error| *error.kind() == ErrorKind::Conflict,
        |by| direct.consume(name, prefetch(1), by),
    );
    vanished.await?.close(long()).await?;
    finish(cx, &**direct, name, history).await?;
    let minimum = Minimum {
        confirmed: messages as u64,
        faults: 1,
    };
    verdict(cx, history, minimum)?;
    direct.delete(name, DeleteMode::Discard, long()).await?;
    Ok(())
}
