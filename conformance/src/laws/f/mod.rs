//! Section F: faults of the broker's process and of the network in between.

mod alarm;
mod cluster;
mod connect;
mod crew;
mod cut;
mod kill;
mod link;
mod nemesis;
mod pause;
mod shutdown;

use std::{sync::Arc, time::Duration};

use wilco::{Broker, Deadline, Error, ErrorKind, durability::Verdict};

use crate::{
    check::{CheckError, Cx},
    harness::{Faults, Unavailable},
    ledger::{Event, History},
    proxy::{Protocol, Proxy},
    support::*,
};

pub use alarm::*;
pub use cluster::*;
pub use connect::*;
pub use cut::*;
pub use kill::*;
pub use link::*;
pub use nemesis::*;
pub use pause::*;
pub use shutdown::*;

/// How much later than its deadline a call may end on a loaded machine.
const GRACE: Duration = Duration::from_secs(1);

/// How long one try of a caller who tries again takes.
const TRY: Duration = Duration::from_secs(2);

/// How long after a fault everybody is back at work by himself: the bound within which the backend
/// says that a vanished consumer is noticed, and the time to connect and attach again.
fn back(cx: &Cx) -> Duration {
    cx.takeover() + Duration::from_secs(20)
}

/// The broker's process, to be killed. Where a law speaks of a crash it binds for what the durability
/// report calls safe (the contract's first words).
async fn killable(cx: &Cx) -> Result<&dyn Faults, CheckError> {
    let faults = cx.server.faults()?;
    let broker = cx.connect().await?;
    let report = broker.durability(long()).await?;
    broker.close(long()).await?;
    if report.process_crash == Verdict::Safe {
        return Ok(faults);
    }
    let because = format!(
        "the durability report says that a crash of this broker is {}",
        report.process_crash
    );
    Err(Unavailable::because(because).into())
}

/// The history of a check.
fn history(cx: &Cx) -> Arc<History> {
    Arc::new(History::new(cx.options.seed))
}

/// A proxy in front of the broker.
pub(crate) async fn proxy(cx: &Cx) -> Result<(&dyn Faults, Proxy), CheckError> {
    let faults = cx.server.faults()?;
    let protocol = Protocol::of_url(&faults.url_via(faults.address()));
    let proxy = Proxy::start(faults.address(), protocol).await;
    let proxy = proxy.map_err(|error| CheckError::failed("the proxy listens", error))?;
    Ok((faults, proxy))
}

/// A handle by way of the proxy.
async fn via(faults: &dyn Faults, proxy: &Proxy) -> Result<Arc<dyn Broker>, CheckError> {
    Ok(faults.connect_via(proxy.address(), long()).await?)
}

/// Kills the broker's process, waits, starts it again, and notes all that.
async fn kill_and_start(
    faults: &dyn Faults,
    history: &History,
    down: Duration,
) -> Result<(), CheckError> {
    history.note(Event::Fault {
        what: "the broker is killed".into(),
    });
    history.note(Event::Down);
    faults.kill().await?;
    tokio::time::sleep(down).await;
    faults.start().await?;
    history.note(Event::Up);
    Ok(())
}

/// Whether an error is one that a fault of the broker or the network explains.
fn is_outage(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::BrokerUnreachable | ErrorKind::DeadlineExceeded
    )
}

/// Calls again and again until it is Ok; only an outage, or what `also` allows, excuses a failure.
async fn until_ok<T, F: Future<Output = wilco::Result<T>>>(
    what: &str,
    within: Duration,
    also: impl Fn(&Error) -> bool,
    mut call: impl FnMut(Deadline) -> F,
) -> Result<T, CheckError> {
    let end = Deadline::after(within);
    loop {
        let tried = timed(what, call(end.or_after(TRY))).await?.0;
        let error = match tried {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        if !is_outage(&error) && !also(&error) {
            return Err(CheckError::failed(
                format!("{what}: Ok, or that the broker cannot be reached"),
                format!("{error} ({:?})", error.kind()),
            ));
        }
        if end.has_passed() {
            return Err(CheckError::failed(
                format!("{what} is Ok within {within:?}"),
                format!("{error} ({:?})", error.kind()),
            ));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Fails unless the call ends by its deadline, and a little, with an error that an outage explains.
async fn fails_in_time<T, F: Future<Output = wilco::Result<T>>>(
    what: &str,
    within: Duration,
    also: impl Fn(&Error) -> bool,
    call: impl FnOnce(Deadline) -> F,
) -> Result<Error, CheckError> {
    let (result, took) = timed(what, call(Deadline::after(within))).await?;
    expect(
        took < within + GRACE,
        format!("{what} ends by its deadline, {within:?}"),
        format!("{took:?}"),
    )?;
    let error = must_fail(what, result)?;
    expect(
        is_outage(&error) || also(&error),
        format!("{what} says that the broker cannot be reached, or that its time is over"),
        format!("{error} ({:?})", error.kind()),
    )?;
    Ok(error)
}
