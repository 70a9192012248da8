//! F5: the broker down when it is needed, and everybody's way back.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use wilco::{Deadline, ErrorKind};

use super::{GRACE, TRY, back, crew::Crew, fails_in_time, killable, proxy, via};
use crate::{
    check::{CheckError, CheckResult, Cx, Evidence},
    harness::Faults,
    ledger::{Event, Minimum},
    proxy::{Door, Proxy, Toward, lock},
    support::*,
    workload::{finish, verdict},
};

/// Down, refusing, resetting or silent: a connect waits to its deadline and says `BrokerUnreachable`;
/// one whose deadline is long enough succeeds once the broker is there.
pub async fn f5_a_connect_waits_to_its_deadline(cx: &Cx) -> CheckResult {
    let (faults, proxy) = proxy(cx).await?;
    proxy.door(Door::Closed).await;
    waits(faults, &proxy, "a connect that is refused").await?;
    proxy.door(Door::Slammed).await;
    waits(faults, &proxy, "a connect that is reset").await?;
    proxy.door(Door::Open).await;
    proxy.swallow(Toward::Client);
    waits(faults, &proxy, "a connect that is not answered").await?;
    proxy.heal();
    faults.kill().await?;
    waits(faults, &proxy, "a connect to a broker that is down").await?;
    // A minute, unless the run is told to be shorter.
    let outage = cx.options.outage;
    let patient = Deadline::after(outage + Duration::from_secs(120));
    let connecting = faults.connect_via(proxy.address(), patient);
    let starting = async {
        tokio::time::sleep(outage).await;
        faults.start().await?;
        Ok::<_, CheckError>(Instant::now())
    };
    let (connected, up) = tokio::join!(async { (connecting.await, Instant::now()) }, starting);
    let (broker, late) = (connected.0?, connected.1.saturating_duration_since(up?));
    expect(
        late < back(cx),
        format!("connected within {:?} after the broker is up", back(cx)),
        format!("{late:?}"),
    )?;
    let name = queue(&*broker, "f5").await?;
    put(&*broker, &name, "works").await?;
    same(
        "messages",
        drain(&*broker, &name).await?,
        vec!["works".to_owned()],
    )?;
    Ok(Evidence::of("waits to the deadline", 4)
        .and("s of outage", outage.as_secs())
        .and("ms until connected", late.as_millis()))
}

async fn waits(faults: &dyn Faults, proxy: &Proxy, what: &str) -> Result<(), CheckError> {
    const WAIT: Duration = Duration::from_secs(3);
    let connecting = faults.connect_via(proxy.address(), WAIT.into());
    let (result, took) = timed("a connect", connecting).await?;
    must_be(what, result, &ErrorKind::BrokerUnreachable)?;
    let early = Duration::from_millis(100);
    expect(
        took + early >= WAIT && took < WAIT + GRACE,
        format!("{what} waits to its deadline, {WAIT:?}, and not longer"),
        format!("{took:?}"),
    )
}

/// An outage in the middle of the work: calls end by their deadlines, and once the broker is back,
/// publishers, consumers and responders are so too, by themselves, those that had nothing to do
/// meanwhile as well.
pub async fn f5_everybody_comes_back_after_an_outage(cx: &Cx) -> CheckResult {
    let faults = killable(cx).await?;
    let control = cx.connect().await?;
    let mut busy = Crew::hire(cx, cx.connect().await?, cx.connect().await?, "f5-busy").await?;
    let mut idle = Crew::hire(cx, cx.connect().await?, cx.connect().await?, "f5-idle").await?;
    busy.work(LONG).await?;
    idle.work(LONG).await?;
    busy.office.history.note(Event::Fault {
        what: "an outage".into(),
    });
    for crew in [&busy, &idle] {
        crew.office.history.note(Event::Down);
    }
    faults.kill().await?;
    let end = Deadline::after(cx.options.outage);
    let mut failed = 0;
    while !end.has_passed() {
        let id = format!("during-{failed}");
        let publish = fails_in_time("publish", TRY, |_| false, |by| busy.office.publish(&id, by));
        let silent = |error: &wilco::Error| *error.kind() == ErrorKind::ConsumerSilent;
        let ping = fails_in_time("a ping", TRY, silent, |by| {
            busy.office
                .broker
                .request(&busy.office.lane, "x".into(), by)
        });
        let (publish, ping) = tokio::join!(publish, ping);
        publish?;
        ping?;
        failed += 1;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    faults.start().await?;
    let started = Instant::now();
    let bound = back(cx);
    let (busy_back, idle_back) = tokio::join!(busy.work(bound), idle.work(bound));
    busy_back?;
    idle_back?;
    let took = started.elapsed();
    for crew in [&busy, &idle] {
        crew.office.history.note(Event::Up);
    }
    let mut evidence = Evidence::default();
    for (crew, faults) in [(idle, 0), (busy, 1)] {
        let (name, history) = (crew.office.name.clone(), Arc::clone(&crew.office.history));
        crew.dismiss().await?;
        finish(cx, &*control, &name, &history).await?;
        let minimum = Minimum {
            confirmed: 2,
            faults,
        };
        evidence = verdict(cx, &history, minimum)?;
    }
    Ok(evidence
        .and("failed calls", failed * 2)
        .and("s of outage", cx.options.outage.as_secs())
        .and("ms until all were back", took.as_millis()))
}

/// A dozen that lose their broker at one moment do not knock at its door together (law W39).
pub async fn f5_nobody_comes_back_in_lock_step(cx: &Cx) -> CheckResult {
    const HANDLES: usize = 12;
    let (faults, proxy) = proxy(cx).await?;
    let mut crews = Vec::new();
    for n in 0..HANDLES / 2 {
        let (host, guest) = (via(faults, &proxy).await?, via(faults, &proxy).await?);
        crews.push(Crew::hire(cx, host, guest, &format!("f5-step-{n}")).await?);
    }
    proxy.door(Door::Slammed).await;
    let lost = Instant::now();
    proxy.reset();
    // The first knock may be all at once: they were cut off all at once. Those after it may not.
    let from = lost + Duration::from_secs(1);
    let limit = Deadline::after(Duration::from_secs(30));
    let window = Duration::from_millis(20);
    let stalls = Stalls::watch();
    let knocks = loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let mut knocks = proxy.came();
        knocks.retain(|knock| *knock > from && !stalls.cover(*knock, window));
        if knocks.len() >= HANDLES * 3 {
            break knocks;
        }
        if limit.has_passed() {
            return Err(CheckError::failed(
                format!("{HANDLES} handles that lost their broker knock at its door again"),
                format!("{} knocks", knocks.len()),
            ));
        }
    };
    let together = most_within(&knocks, window);
    expect(
        together <= HANDLES / 2,
        format!("at most half of {HANDLES} come within {window:?}"),
        together,
    )?;
    proxy.door(Door::Open).await;
    for crew in &mut crews {
        crew.work(back(cx)).await?;
    }
    Ok(Evidence::of("knocks", knocks.len()).and("at most at once", together))
}

/// When this process got no processor time: what was due then came together, whatever it had meant to do.
struct Stalls {
    seen: Arc<Mutex<Vec<(Instant, Instant)>>>,
    _watch: tokio::task::JoinSet<()>,
}

impl Stalls {
    fn watch() -> Self {
        const TICK: Duration = Duration::from_millis(2);
        const LATE: Duration = Duration::from_millis(8);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let mut watch = tokio::task::JoinSet::new();
        let stalls = Arc::clone(&seen);
        watch.spawn(async move {
            loop {
                let before = Instant::now();
                tokio::time::sleep(TICK).await;
                let now = Instant::now();
                if now - before > LATE {
                    lock(&stalls).push((before, now));
                }
            }
        });
        Self {
            seen,
            _watch: watch,
        }
    }

    /// Whether this moment was in a stall, or this soon after one.
    fn cover(&self, moment: Instant, after: Duration) -> bool {
        let within = |(from, to): &(Instant, Instant)| (*from..=*to + after).contains(&moment);
        lock(&self.seen).iter().any(within)
    }
}

/// The most of these moments that fall into one window of this length. They are in order.
fn most_within(moments: &[Instant], window: Duration) -> usize {
    let count = |(n, first): (usize, &Instant)| {
        let rest = moments.get(n..).unwrap_or_default();
        rest.iter()
            .take_while(|moment| **moment - *first <= window)
            .count()
    };
    moments.iter().enumerate().map(count).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_step_is_told_from_jitter() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let step: Vec<_> = (0..36).map(|n| at(100 * (n / 12) + n % 12)).collect();
        assert_eq!(most_within(&step, Duration::from_millis(20)), 12);
        let spread: Vec<_> = (0..36).map(|n| at(n * 11)).collect();
        assert_eq!(most_within(&spread, Duration::from_millis(20)), 2);
        assert_eq!(most_within(&[], Duration::from_millis(20)), 0);
    }
}
