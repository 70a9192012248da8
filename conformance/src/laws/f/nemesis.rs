//! The nemesis: publishers and guests as processes, and one fault after the other as the seed has them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use wilco::QueueName;

use super::{back, kill::at_work, kill_and_start, killable, proxy};
use crate::{
    agent::{Agent, Followed, Order},
    check::{CheckError, CheckResult, Cx},
    harness::{Faults, Unavailable},
    ledger::{Answer, Entry, Event, History, Minimum},
    proxy::{Proxy, Toward},
    support::*,
    workload::{finish, verdict},
};

/// Queues, each with a process that publishes and one that consumes.
const PAIRS: usize = 3;

/// Publishers and guests at work, each a process, and the broker killed or paused, its connections reset,
/// half-open or swallowed, a guest or a publisher killed and another started: in an order and at moments
/// that the seed says, spread over as many messages as were asked for. After each fault everybody is back
/// by himself; in the end nothing is lost and nothing acked has come again.
pub async fn l_a_nemesis_loses_nothing(cx: &Cx) -> CheckResult {
    let asked = cx.options.nemesis;
    let history = cx.history();
    let mut rng = cx.rng();
    let way = Way::open(cx).await?;
    let control = cx.connect().await?;
    let mut crew = Crew {
        url: way.url(cx)?,
        history: Arc::clone(&history),
        confirmed: Arc::default(),
        hands: Vec::new(),
        hired: 0,
    };
    for n in 0..PAIRS {
        let queue = limited(&*control, &format!("nemesis-{n}"), 10_000).await?;
        for publishes in [true, false] {
            crew.hire(cx, &queue, publishes, &mut rng).await?;
        }
    }
    let mut struck = BTreeMap::<&'static str, u64>::new();
    let striking = async {
        for n in 0..asked.faults {
            crew.confirms(n * asked.messages / asked.faults).await?;
            crew.at_work(back(cx)).await?;
            tokio::time::sleep(Duration::from_millis(rng.u64(0..500))).await;
            let kinds = Strike::all(way.is_there());
            let strike = kinds[rng.usize(..kinds.len())];
            strike.at(cx, &way, &mut crew, &mut rng).await?;
            *struck.entry(strike.name()).or_default() += 1;
        }
        crew.confirms(asked.messages).await?;
        crew.at_work(back(cx)).await
    };
    let went = striking.await;
    let queues: Vec<_> = crew.hands.iter().map(|hand| hand.queue.clone()).collect();
    let dismissed = crew.dismiss().await;
    // Who has failed says more than that he was missed.
    dismissed.and(went).map_err(|error| match error {
        CheckError::Failed(mut failure) => {
            let strikes: Vec<_> = history.entries().into_iter().filter_map(fault).collect();
            failure.seen += &format!("\n  after: {}", strikes.join(", "));
            CheckError::Failed(failure)
        }
        other => other,
    })?;
    for queue in queues.iter().step_by(2) {
        finish(cx, &*control, queue, &history).await?;
    }
    let minimum = Minimum {
        confirmed: asked.messages,
        faults: asked.faults,
    };
    let mut evidence = verdict(cx, &history, minimum)?;
    evidence.counts.append(&mut struck);
    Ok(evidence)
}

fn fault(entry: Entry) -> Option<String> {
    match entry.event {
        Event::Fault { what } => Some(what),
        _ => None,
    }
}

/// The way to the broker, which can be cut; none where it is no process of its own.
struct Way<'a>(Option<(&'a dyn Faults, Proxy)>);

impl<'a> Way<'a> {
    async fn open(cx: &'a Cx) -> Result<Self, CheckError> {
        if cx.server.faults().is_err() {
            // Publishers and guests are processes still, and die.
            return Ok(Self(None));
        }
        killable(cx).await?;
        Ok(Self(Some(proxy(cx).await?)))
    }

    fn is_there(&self) -> bool {
        self.0.is_some()
    }

    fn url(&self, cx: &Cx) -> Result<String, CheckError> {
        match &self.0 {
            Some((faults, proxy)) => Ok(faults.url_via(proxy.address())),
            None => Agent::url(cx),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Strike {
    KillBroker,
    PauseBroker,
    Reset,
    HalfOpen,
    Swallow,
    KillGuest,
    KillPublisher,
}

impl Strike {
    fn all(broker: bool) -> &'static [Self] {
        const PROCESSES: &[Strike] = &[Strike::KillGuest, Strike::KillPublisher];
        const ALL: &[Strike] = &[
            Strike::KillBroker,
            Strike::PauseBroker,
            Strike::Reset,
            Strike::HalfOpen,
            Strike::Swallow,
            Strike::KillGuest,
            Strike::KillPublisher,
        ];
        if broker { ALL } else { PROCESSES }
    }

    fn name(self) -> &'static str {
        match self {
            Self::KillBroker => "kills of the broker",
            Self::PauseBroker => "pauses",
            Self::Reset => "resets",
            Self::HalfOpen => "half-open",
            Self::Swallow => "black holes",
            Self::KillGuest => "guests killed",
            Self::KillPublisher => "publishers killed",
        }
    }

    async fn at(
        self,
        cx: &Cx,
        way: &Way<'_>,
        crew: &mut Crew,
        rng: &mut fastrand::Rng,
    ) -> Result<(), CheckError> {
        let pair = rng.usize(..PAIRS);
        // Up to longer than it takes to notice, and to take over from one who is not heard of.
        let while_ = Duration::from_millis(rng.u64(100..10_000));
        let history = Arc::clone(&crew.history);
        let fault = |what: String| {
            history.note(Event::Fault { what });
            history.note(Event::Down);
        };
        match (self, &way.0) {
            (Self::KillGuest | Self::KillPublisher, _) => {
                let publishes = matches!(self, Self::KillPublisher);
                return crew.replace(cx, pair, publishes, rng).await;
            }
            (_, None) => {
                let none = Unavailable::because("this broker is no process to break");
                return Err(none.into());
            }
            (Self::KillBroker, Some((faults, _))) => {
                let down = Duration::from_millis(rng.u64(0..2_000));
                return kill_and_start(*faults, &history, down).await;
            }
            (Self::PauseBroker, Some((faults, _))) => {
                fault(format!("the broker is paused for {while_:?}"));
                faults.pause()?;
                tokio::time::sleep(while_).await;
                faults.resume()?;
            }
            (Self::Reset, Some((_, proxy))) => {
                fault("all connections are reset".into());
                proxy.reset();
            }
            (Self::HalfOpen, Some((_, proxy))) => {
                fault("all connections are half-open".into());
                proxy.half_open();
                // New ones work, and the old ones never do again.
                crew.at_work(back(cx)).await?;
                proxy.heal();
            }
            (Self::Swallow, Some((_, proxy))) => {
                let toward = [Toward::Broker, Toward::Client][rng.usize(..2)];
                fault(format!("{toward:?}: all is swallowed for {while_:?}"));
                proxy.swallow(toward);
                tokio::time::sleep(while_).await;
                proxy.heal();
            }
        }
        history.note(Event::Up);
        Ok(())
    }
}

/// One process at work.
struct Hand {
    queue: QueueName,
    publishes: bool,
    agent: Followed,
}

/// All of them: for each queue the one who publishes, and behind him the one who consumes.
struct Crew {
    url: String,
    history: Arc<History>,
    confirmed: Arc<AtomicU64>,
    hands: Vec<Hand>,
    hired: u64,
}

impl Crew {
    async fn hire(
        &mut self,
        cx: &Cx,
        queue: &QueueName,
        publishes: bool,
        rng: &mut fastrand::Rng,
    ) -> Result<(), CheckError> {
        let hand = self.start(cx, queue, publishes, rng).await?;
        self.hands.push(hand);
        Ok(())
    }

    async fn start(
        &mut self,
        cx: &Cx,
        queue: &QueueName,
        publishes: bool,
        rng: &mut fastrand::Rng,
    ) -> Result<Hand, CheckError> {
        let mut agent = Agent::start_at(cx, &self.url)?;
        let (queue, seed) = (queue.clone(), rng.u64(..));
        self.hired += 1;
        let order = if publishes {
            Order::Load {
                queue: queue.clone(),
                prefix: format!("{}-", self.hired),
                messages: u64::MAX,
                at_once: rng.u32(1..=8),
                seed,
            }
        } else {
            Order::Work {
                queue: queue.clone(),
                seed,
            }
        };
        agent.order(&order).await?;
        let (history, confirmed) = (Arc::clone(&self.history), Arc::clone(&self.confirmed));
        let agent = agent.followed(move |entry| {
            let stored = Answer::Stored;
            if matches!(entry.event, Event::Answer { answer, .. } if answer == stored) {
                confirmed.fetch_add(1, Ordering::Relaxed);
            }
            history.append(entry);
        });
        Ok(Hand {
            queue,
            publishes,
            agent,
        })
    }

    /// Kills one of a pair, and puts another in his place.
    async fn replace(
        &mut self,
        cx: &Cx,
        pair: usize,
        publisher: bool,
        rng: &mut fastrand::Rng,
    ) -> Result<(), CheckError> {
        let what = if publisher { "a publisher" } else { "a guest" };
        self.history.note(Event::Fault {
            what: format!("{what} is killed"),
        });
        let place = 2 * pair + usize::from(!publisher);
        let gone = self.hands.remove(place);
        let queue = gone.queue.clone();
        gone.agent.kill().await?;
        let next = self.start(cx, &queue, publisher, rng).await?;
        self.hands.insert(place, next);
        Ok(())
    }

    /// Waits until everybody has done something, from now on.
    async fn at_work(&self, within: Duration) -> Result<(), CheckError> {
        let hands = self.hands.iter();
        let workers: Vec<_> = hands
            .map(|hand| (hand.agent.process, hand.publishes))
            .collect();
        at_work(&self.history, &workers, within).await
    }

    /// Waits until so many messages are confirmed in all.
    async fn confirms(&self, messages: u64) -> Result<(), CheckError> {
        const STILL: Duration = Duration::from_secs(30);
        let mut seen = (self.confirmed.load(Ordering::Relaxed), Instant::now());
        while seen.0 < messages {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let now = self.confirmed.load(Ordering::Relaxed);
            if now > seen.0 {
                seen = (now, Instant::now());
            }
            expect(
                seen.1.elapsed() < STILL,
                "publishers go on",
                format_args!("nothing confirmed for {STILL:?}, {now} in all"),
            )?;
        }
        Ok(())
    }

    /// Kills everybody; who had failed before says why.
    async fn dismiss(self) -> Result<(), CheckError> {
        let mut done = Ok(());
        for hand in self.hands {
            done = done.and(hand.agent.kill().await);
        }
        done
    }
}
