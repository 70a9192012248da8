//! F9: a broker whose memory or disk has run out.

use std::time::Duration;

use wilco::{ErrorKind, Outcome};

use super::{back, crew::note_publish, is_outage, until_ok};
use crate::{
    check::{CheckResult, Cx},
    ledger::{Event, Minimum},
    support::*,
    workload::{finish, verdict},
};

/// The broker refuses to store: publishes fail by their deadlines, typed, one of them at least as
/// `BrokerRefused` and surely not stored; what was there stays; afterwards the service resumes.
pub async fn f9_an_alarm_refuses_and_loses_nothing(cx: &Cx) -> CheckResult {
    const MESSAGES: usize = 20;
    const REFUSED: usize = 6;
    let faults = cx.server.faults()?;
    let control = cx.connect().await?;
    let broker = cx.connect().await?;
    let name = queue(&*broker, "f9").await?;
    let history = super::history(cx);
    for n in 0..MESSAGES {
        note_publish(&*broker, &name, &format!("before-{n}"), long(), &history).await?;
    }
    history.note(Event::Fault {
        what: "a memory or disk alarm".into(),
    });
    history.note(Event::Down);
    faults.alarm(true).await?;
    let mut refusals = 0;
    for n in 0..REFUSED {
        let limit = Duration::from_secs(3);
        let id = format!("during-{n}");
        let publish = note_publish(&*broker, &name, &id, limit.into(), &history);
        let (result, took) = timed("a publish", publish).await?;
        let error = must_fail("a publish while the broker refuses to store", result)?;
        expect(
            took < limit + super::GRACE,
            format!("it ends by its deadline, {limit:?}"),
            format!("{took:?}"),
        )?;
        let refused = *error.kind() == ErrorKind::BrokerRefused;
        expect(
            refused || is_outage(&error),
            "BrokerRefused, or that its time is over",
            format!("{error} ({:?})", error.kind()),
        )?;
        let surely = error.outcome() == Some(Outcome::NotStored);
        refusals += usize::from(refused && surely);
    }
    faults.alarm(false).await?;
    expect(
        refusals > 0,
        "at least one publish is refused and surely not stored",
        format!("{refusals} of {REFUSED}"),
    )?;
    let full = |error: &wilco::Error| *error.kind() == ErrorKind::BrokerRefused;
    until_ok("a publish after the alarm", back(cx), full, |by| {
        note_publish(&*broker, &name, "after", by, &history)
    })
    .await?;
    history.note(Event::Up);
    finish(cx, &*control, &name, &history).await?;
    let minimum = Minimum {
        confirmed: MESSAGES as u64 + 1,
        faults: 1,
    };
    Ok(verdict(cx, &history, minimum)?.and("refused", refusals))
}
