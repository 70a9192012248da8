//! The network backends beside their raw clients, in one run against one server of its own.
//!
//! `cargo bench -p wilco-conformance --bench brokers -- [BROKER] [ROUNDS] [PART]`, where a broker is
//! `rabbitmq`, `nats`, `redis` or `all`, and a part is `publish`, `consume`, `ping`, `paced` or `all`.
//! `WILCO_NATS_SERVER` and `WILCO_REDIS_SERVER` name other server programs.
//!
//! Both sides do the same work through one trait, [`Side`]: wilco's is written once over `dyn Broker`
//! (`ours`), each raw one is what one would write by hand with the client alone at the same safety
//! (`raw`). They take turns, round by round, whoever comes first changing each time; what counts is the
//! median of the rounds' ratios, with its quartiles: absolute figures move with the machine. Pings take
//! turns by the hundred, and what counts is the difference.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

mod figures;
mod ours;
mod raw;

use std::time::{Duration, Instant};

use async_trait::async_trait;
use wilco_conformance::{
    harness::{Server, Use},
    harnesses,
};

use self::figures::{Latencies, Rates};

/// What a message carries.
const BODY: usize = 1024;

/// One way to the broker.
#[async_trait]
trait Side: Send + Sync {
    /// Makes its queue anew, with nothing in it.
    async fn fresh(&self);

    /// Publishes messages of [`BODY`] bytes, each confirmed as stored, so many at once: a divisor of
    /// how many there are.
    async fn publish(&self, messages: usize, in_flight: usize);

    /// Attaches, receives and settles so many, at most `prefetch` of them unsettled at once; how long
    /// it took from the attachment on.
    async fn consume(&self, messages: usize, prefetch: u32) -> Duration;

    /// Asks a guest that answers with what it was asked, so often, one after the other.
    async fn ping(&self, times: usize) -> Vec<Duration>;

    /// Publishes so many, one each millisecond, while a consumer receives and settles; from each
    /// publish to its delivery.
    async fn paced(&self, messages: usize) -> Vec<Duration>;

    /// Lets the server put its house in order, so that it does not do so in the middle of a round.
    async fn tidy(&self) {}
}

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .collect();
    let word = |n: usize| match arguments.get(n).map(String::as_str) {
        None | Some("all") => None,
        Some(word) => Some(word),
    };
    let rounds = word(1).map_or(9, |rounds| rounds.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    for broker in ["rabbitmq", "nats", "redis"] {
        if word(0).is_none_or(|wanted| wanted == broker) {
            runtime.block_on(compare(broker, rounds, word(2)));
        }
    }
}

async fn compare(broker: &str, rounds: usize, part: Option<&str>) {
    let harness = harnesses::find(broker).unwrap();
    let server: Box<dyn Server> = harness.start(Use::Shared).await.unwrap();
    let facts = server.facts();
    let raw = raw::connect(broker, facts.url.as_deref().unwrap()).await;
    let ours = ours::connect(&*server).await;
    println!("{} ({rounds} rounds)", facts.version);
    let pair = Pair {
        raw: &*raw,
        ours: &ours,
        rounds,
    };
    let wants = |name| part.is_none_or(|part| part == name);
    if wants("publish") {
        for (in_flight, messages) in [(1, 512), (64, 8_192), (1024, 16_384)] {
            let rates = pair.publish(messages, in_flight).await;
            rates.print(&format!("publish, {in_flight} in flight"));
        }
    }
    if wants("consume") {
        for (prefetch, messages) in [(1, 512), (64, 8_192), (512, 16_384)] {
            let rates = pair.consume(messages, prefetch).await;
            rates.print(&format!("consume and ack, prefetch {prefetch}"));
        }
    }
    if wants("ping") {
        pair.ping(10, 100).await.print("ping round trip");
    }
    if wants("paced") {
        let latencies = pair.paced(2_000).await;
        latencies.print("publish to delivery at 1,000/s");
    }
}

/// Both sides of one server.
struct Pair<'a> {
    raw: &'a dyn Side,
    ours: &'a dyn Side,
    rounds: usize,
}

impl Pair<'_> {
    /// Who comes second finds the server as the first left it: so they swap.
    fn turns(&self, round: usize) -> [(&dyn Side, bool); 2] {
        let mut turns = [(self.raw, false), (self.ours, true)];
        if round % 2 == 1 {
            turns.reverse();
        }
        turns
    }

    async fn publish(&self, messages: usize, in_flight: usize) -> Rates {
        let mut rates = Rates::default();
        for round in 0..self.rounds {
            for (side, ours) in self.turns(round) {
                side.fresh().await;
                self.raw.tidy().await;
                // What is made by the first of all, a channel say, is not counted.
                side.publish(64, 64).await;
                let begin = Instant::now();
                side.publish(messages, in_flight).await;
                rates.add(ours, messages, begin.elapsed());
            }
        }
        self.leave_nothing().await;
        rates
    }

    async fn consume(&self, messages: usize, prefetch: u32) -> Rates {
        let mut rates = Rates::default();
        for round in 0..self.rounds {
            for (side, ours) in self.turns(round) {
                side.fresh().await;
                side.publish(messages, 256).await;
                self.raw.tidy().await;
                let took = side.consume(messages, prefetch).await;
                rates.add(ours, messages, took);
            }
        }
        self.leave_nothing().await;
        rates
    }

    async fn ping(&self, blocks: usize, each: usize) -> Latencies {
        let mut latencies = Latencies::default();
        for (side, _) in self.turns(0) {
            side.ping(each).await;
        }
        for round in 0..self.rounds {
            let (mut raw, mut ours) = (Vec::new(), Vec::new());
            for block in 0..blocks {
                for (side, is_ours) in self.turns(round + block) {
                    let times = side.ping(each).await;
                    if is_ours { &mut ours } else { &mut raw }.extend(times);
                }
            }
            latencies.add(raw, ours);
        }
        latencies
    }

    async fn paced(&self, messages: usize) -> Latencies {
        let mut latencies = Latencies::default();
        for round in 0..self.rounds {
            let (mut raw, mut ours) = (Vec::new(), Vec::new());
            for (side, is_ours) in self.turns(round) {
                side.fresh().await;
                let times = side.paced(messages).await;
                *if is_ours { &mut ours } else { &mut raw } = times;
            }
            latencies.add(raw, ours);
        }
        self.leave_nothing().await;
        latencies
    }

    async fn leave_nothing(&self) {
        self.raw.fresh().await;
        self.ours.fresh().await;
    }
}

/// The moment of its publish, at the front of a body: since this process began.
fn stamped() -> Vec<u8> {
    let mut body = vec![b'x'; BODY];
    let now = u64::try_from(epoch().elapsed().as_nanos()).unwrap();
    body[..8].copy_from_slice(&now.to_be_bytes());
    body
}

fn since(body: &[u8]) -> Duration {
    let sent = u64::from_be_bytes(body[..8].try_into().unwrap());
    epoch().elapsed() - Duration::from_nanos(sent)
}

fn epoch() -> Instant {
    static EPOCH: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    *EPOCH.get_or_init(Instant::now)
}
