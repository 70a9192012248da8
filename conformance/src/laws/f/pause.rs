//! F3: the broker's process stopped where it stands, its sockets open.

use std::time::{Duration, Instant};

use wilco::{
    ErrorKind,
    broker::{DeadLetterKey, DeleteMode, QueueSpec},
};

use super::{
    GRACE, TRY, back,
    crew::{Crew, Office},
    fails_in_time,
};
use crate::{
    check::{CheckError, CheckResult, Cx},
    harness::Faults,
    ledger::{Event, Minimum},
    support::*,
    workload::{finish, verdict},
};

/// Stopped for longer than the bound within which a vanished consumer is noticed: every call ends by
/// its deadline, at the beginning of it and at the end. Then all goes on by itself, and what was held
/// over it is either settled or comes again.
pub async fn f3_a_paused_broker_ends_no_call_late(cx: &Cx) -> CheckResult {
    const ROUNDS: u64 = 2;
    let faults = cx.server.faults()?;
    let control = cx.connect().await?;
    let mut crew = Crew::hire(cx, cx.connect().await?, cx.connect().await?, "f3").await?;
    let history = crew.office.history.clone();
    for round in 0..ROUNDS {
        crew.work(back(cx)).await?;
        crew.office
            .publish(&format!("held-{round}"), long())
            .await?;
        let held = crew.receive(LONG).await?;
        history.note(Event::Fault {
            what: "the broker is paused".into(),
        });
        history.note(Event::Down);
        let _running = Paused::now(faults)?;
        let started = Instant::now();
        every_call_ends(&crew.office, faults, &format!("early-{round}")).await?;
        let pause = cx.takeover() + Duration::from_secs(2);
        tokio::time::sleep(pause.saturating_sub(started.elapsed())).await;
        every_call_ends(&crew.office, faults, &format!("late-{round}")).await?;
        // Odd rounds settle what they hold while nothing answers, even ones afterwards.
        let held = if round % 2 == 1 {
            let (acked, took) = timed("an ack", crew.office.ack(held, TRY.into())).await?;
            let bound = TRY + GRACE;
            let expected = format!("an ack ends by its deadline, within {bound:?}");
            expect(took < bound, expected, format!("{took:?}"))?;
            // Whatever it says, the ledger holds it to it.
            drop(acked);
            None
        } else {
            Some(held)
        };
        faults.resume()?;
        if let Some(held) = held {
            // Settled, or lost and then it comes again: the ledger holds it to what it says.
            drop(crew.office.ack(held, back(cx).into()).await);
        }
        crew.work(back(cx)).await?;
        history.note(Event::Up);
    }
    let name = crew.office.name.clone();
    crew.dismiss().await?;
    finish(cx, &*control, &name, &history).await?;
    let minimum = Minimum {
        confirmed: ROUNDS * 3,
        faults: ROUNDS,
    };
    verdict(cx, &history, minimum)
}

/// A pause that is over with the check, however that ends.
struct Paused<'a>(&'a dyn Faults);

impl<'a> Paused<'a> {
    fn now(faults: &'a dyn Faults) -> Result<Self, CheckError> {
        faults.pause()?;
        Ok(Self(faults))
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        let _ = self.0.resume();
    }
}

/// Every call there is, all at once, none of them answered.
async fn every_call_ends(
    office: &Office,
    faults: &dyn Faults,
    tag: &str,
) -> Result<(), CheckError> {
    let (broker, name, lane) = (&office.broker, &office.name, &office.lane);
    let nothing_else = |_: &wilco::Error| false;
    let spec = QueueSpec::new(guest("f3-new")?.queue());
    let other = guest("f3-other")?;
    let key = DeadLetterKey("0".into());
    let publish = fails_in_time("publish", TRY, nothing_else, |by| office.publish(tag, by));
    let declare = fails_in_time("declare", TRY, nothing_else, |by| broker.declare(&spec, by));
    let status = fails_in_time("status", TRY, nothing_else, |by| broker.status(name, by));
    let list = fails_in_time("list", TRY, nothing_else, |by| broker.list(by));
    let delete = fails_in_time("delete", TRY, nothing_else, |by| {
        broker.delete(&spec.name, DeleteMode::IfEmpty, by)
    });
    let consume = fails_in_time("consume", TRY, nothing_else, |by| {
        broker.consume(&spec.name, prefetch(1), by)
    });
    let dead = fails_in_time("dead_letters", TRY, nothing_else, |by| {
        broker.dead_letters(name, None, count(1), by)
    });
    let redrive = fails_in_time("redrive", TRY, nothing_else, |by| {
        broker.redrive(name, &key, by)
    });
    let silent = |error: &wilco::Error| *error.kind() == ErrorKind::ConsumerSilent;
    let request = fails_in_time("request", TRY, silent, |by| {
        broker.request(lane, "x".into(), by)
    });
    let respond = fails_in_time("respond", TRY, nothing_else, |by| {
        broker.respond(&other, by)
    });
    let durability = fails_in_time("durability", TRY, nothing_else, |by| broker.durability(by));
    let connect = fails_in_time("connect", TRY, nothing_else, |by| {
        faults.connect_via(faults.address(), by)
    });
    let publish = async { publish.await.map(drop) };
    let ended = tokio::join!(
        publish, declare, status, list, delete, consume, dead, redrive, request, respond,
        durability, connect
    );
    ended.0?;
    let others = [
        ended.1, ended.2, ended.3, ended.4, ended.5, ended.6, ended.7, ended.8, ended.9, ended.10,
        ended.11,
    ];
    for error in others {
        let error = error?;
        same(
            "what a call that is no publish says of a message",
            error.outcome(),
            None,
        )?;
    }
    Ok(())
}
