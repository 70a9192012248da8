//! Redis Streams through wilco against redis-rs alone, at the same safety, in one run.
//!
//! `cargo bench --no-default-features --features redis --bench redis [-- ROUNDS [PART]]`, where a part is
//! `publish`, `consume`, `ping` or `paced`. `WILCO_REDIS_SERVER` names the server program.
//!
//! The bare side is what one would write by hand on the same server (`appendfsync always`): one `XADD`
//! a message, many under way on one multiplexed connection; `XREADGROUP` in batches with `XACK` and
//! `XDEL` behind; pub/sub there and back. Both sides take turns, and what is compared is the median of
//! the rounds' ratios.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::{
    num::NonZeroU32,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use redis::{
    AsyncConnectionConfig, Client, PushInfo, PushKind, Value, aio::MultiplexedConnection, cmd,
};
use tokio::sync::mpsc;
use wilco::{
    Broker, Deadline, GuestAddress, GuestId, Message, QueueName,
    broker::{ConsumeOptions, QueueSpec},
};

const BODY: usize = 1024;

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .collect();
    let rounds: usize = arguments.first().map_or(5, |n| n.parse().unwrap());
    let part = arguments.get(1).map(String::as_str);
    let wants = |name| part.is_none_or(|part| part == name);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let server = Server::start();
    runtime.block_on(async {
        server.ready().await;
        if wants("publish") {
            println!("durable publish of {BODY} bytes, messages/s, median");
            for (in_flight, messages) in [(1, 2_000), (64, 40_000), (1024, 80_000)] {
                let mut pairs = Vec::new();
                for round in 0..rounds {
                    let raw = bare_publish(&server, in_flight, messages);
                    let ours = publish(&server, in_flight, messages);
                    pairs.push(in_turn(round, raw, ours).await);
                }
                report(&format!("{in_flight:>5} in flight"), pairs);
            }
        }
        if wants("consume") {
            println!("consume and ack of {BODY} bytes, messages/s, median");
            for prefetch in [1, 64, 512] {
                let messages = if prefetch == 1 { 2_000 } else { 40_000 };
                let mut pairs = Vec::new();
                for round in 0..rounds {
                    let raw = bare_consume(&server, prefetch, messages);
                    let ours = consume(&server, prefetch, messages);
                    pairs.push(in_turn(round, raw, ours).await);
                }
                report(&format!("prefetch {prefetch:>4} "), pairs);
            }
        }
        if wants("ping") {
            println!("ping round trip, µs");
            for _ in 0..rounds {
                times("bare ", bare_pings(&server).await);
                times("wilco", pings(&server).await);
            }
        }
        if wants("paced") {
            println!("from publish to delivery at 1,000/s, µs");
            for _ in 0..rounds {
                times("bare ", bare_paced(&server).await);
                times("wilco", paced(&server).await);
            }
        }
    });
}

/// Whoever comes second finds the server as the first left it: so they swap.
async fn in_turn(
    round: usize,
    raw: impl Future<Output = f64>,
    ours: impl Future<Output = f64>,
) -> (f64, f64) {
    if round.is_multiple_of(2) {
        let raw = raw.await;
        (raw, ours.await)
    } else {
        let ours = ours.await;
        (raw.await, ours)
    }
}

fn report(what: &str, mut pairs: Vec<(f64, f64)>) {
    let mut ratios: Vec<f64> = pairs.iter().map(|(raw, ours)| ours / raw).collect();
    ratios.sort_by(f64::total_cmp);
    let middle = pairs.len() / 2;
    pairs.sort_by(|a, b| a.0.total_cmp(&b.0));
    let raw = pairs[middle].0;
    pairs.sort_by(|a, b| a.1.total_cmp(&b.1));
    println!(
        "  {what}: bare {raw:>8.0}  wilco {:>8.0}  ratio {:.2} ({:.2} to {:.2})",
        pairs[middle].1,
        ratios[middle],
        ratios[0],
        ratios[ratios.len() - 1]
    );
}

fn times(who: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |part: usize| times[(times.len() * part / 100).min(times.len() - 1)].as_micros();
    println!("  {who} p50 {:>6}  p99 {:>6}", at(50), at(99));
}

fn deadline() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

fn rate(messages: usize, begin: Instant) -> f64 {
    messages as f64 / begin.elapsed().as_secs_f64()
}

struct Server {
    process: Child,
    port: u16,
    _directory: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .unwrap()
            .port();
        let program = std::env::var("WILCO_REDIS_SERVER").unwrap_or("redis-server".into());
        let process = Command::new(program)
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--dir"])
            .arg(directory.path())
            .args([
                "--save",
                "",
                "--appendonly",
                "yes",
                "--appendfsync",
                "always",
            ])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            process,
            port,
            _directory: directory,
        }
    }

    fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0?protocol=resp3", self.port)
    }

    async fn ready(&self) {
        while Client::open(self.url())
            .unwrap()
            .get_multiplexed_async_connection()
            .await
            .is_err()
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn raw(&self) -> MultiplexedConnection {
        let config = AsyncConnectionConfig::new().set_response_timeout(None);
        let client = Client::open(self.url()).unwrap();
        client
            .get_multiplexed_async_connection_with_config(&config)
            .await
            .unwrap()
    }

    /// A connection and what is published on this channel.
    async fn listen(
        &self,
        channel: &str,
    ) -> (MultiplexedConnection, mpsc::UnboundedReceiver<PushInfo>) {
        let (pushes, pushed) = mpsc::unbounded_channel();
        let config = AsyncConnectionConfig::new()
            .set_response_timeout(None)
            .set_push_sender(pushes);
        let client = Client::open(self.url()).unwrap();
        let mut connection = client
            .get_multiplexed_async_connection_with_config(&config)
            .await
            .unwrap();
        connection.subscribe(channel).await.unwrap();
        (connection, pushed)
    }

    async fn wilco(&self) -> Arc<dyn Broker> {
        wilco::connect(&format!("redis://127.0.0.1:{}/0", self.port))
            .await
            .unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

// ---- redis-rs alone

const KEY: &str = "bare";

async fn fresh(raw: &mut MultiplexedConnection) {
    let _: Value = cmd("DEL").arg(KEY).query_async(raw).await.unwrap();
    let mut make = cmd("XGROUP");
    make.arg("CREATE")
        .arg(KEY)
        .arg("g")
        .arg("0")
        .arg("MKSTREAM");
    let _: Value = make.query_async(raw).await.unwrap();
}

async fn add(raw: &mut MultiplexedConnection, body: &[u8]) {
    let mut add = cmd("XADD");
    add.arg(KEY)
        .arg("*")
        .arg("kind")
        .arg("bench")
        .arg("body")
        .arg(body);
    let _: Value = add.query_async(raw).await.unwrap();
}

async fn bare_publish(server: &Server, in_flight: usize, messages: usize) -> f64 {
    let mut raw = server.raw().await;
    fresh(&mut raw).await;
    let body = Bytes::from(vec![b'x'; BODY]);
    let begin = Instant::now();
    let tasks = (0..in_flight).map(|_| {
        let (mut raw, body) = (raw.clone(), body.clone());
        tokio::spawn(async move {
            for _ in 0..messages / in_flight {
                add(&mut raw, &body).await;
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    rate(messages / in_flight * in_flight, begin)
}

/// Fills without waiting for each one.
async fn fill(raw: &MultiplexedConnection, messages: usize) {
    let body = Bytes::from(vec![b'x'; BODY]);
    let tasks = (0..256).map(|n| {
        let (mut raw, body) = (raw.clone(), body.clone());
        let share = messages / 256 + usize::from(n < messages % 256);
        tokio::spawn(async move {
            for _ in 0..share {
                add(&mut raw, &body).await;
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
}

async fn bare_read(raw: &mut MultiplexedConnection, count: usize, block: bool) -> Vec<Vec<u8>> {
    let mut read = cmd("XREADGROUP");
    read.arg("GROUP").arg("g").arg("c").arg("COUNT").arg(count);
    if block {
        read.arg("BLOCK").arg(0);
    }
    read.arg("STREAMS").arg(KEY).arg(">");
    let answer: Value = read.query_async(raw).await.unwrap();
    let streams = match answer {
        Value::Map(streams) => streams,
        _ => return vec![],
    };
    let Some((_, Value::Array(entries))) = streams.into_iter().next() else {
        return vec![];
    };
    entries
        .into_iter()
        .filter_map(|entry| match entry {
            Value::Array(parts) => match parts.into_iter().next() {
                Some(Value::BulkString(id)) => Some(id),
                _ => None,
            },
            _ => None,
        })
        .collect()
}

async fn bare_ack(raw: &mut MultiplexedConnection, ids: &[Vec<u8>]) {
    let mut pipe = redis::pipe();
    pipe.cmd("XACK").arg(KEY).arg("g").arg(ids);
    pipe.cmd("XDEL").arg(KEY).arg(ids);
    let _: Value = pipe.query_async(raw).await.unwrap();
}

async fn bare_consume(server: &Server, prefetch: usize, messages: usize) -> f64 {
    let mut raw = server.raw().await;
    fresh(&mut raw).await;
    fill(&raw, messages).await;
    let begin = Instant::now();
    let mut left = messages;
    while left > 0 {
        let ids = bare_read(&mut raw, prefetch, false).await;
        bare_ack(&mut raw, &ids).await;
        left -= ids.len();
    }
    rate(messages, begin)
}

fn payload(push: PushInfo) -> Option<Vec<u8>> {
    match (push.kind, push.data.into_iter().nth(1)) {
        (PushKind::Message, Some(Value::BulkString(payload))) => Some(payload),
        _ => None,
    }
}

const PINGS: usize = 3_000;

async fn bare_pings(server: &Server) -> Vec<Duration> {
    let (mut guest, mut questions) = server.listen("bare-lane").await;
    let (mut host, mut answers) = server.listen("bare-reply").await;
    let serving = tokio::spawn(async move {
        while let Some(push) = questions.recv().await {
            if let Some(body) = payload(push) {
                let mut answer = cmd("PUBLISH");
                answer.arg("bare-reply").arg(body);
                let _: Value = answer.query_async(&mut guest).await.unwrap();
            }
        }
    });
    let mut times = Vec::with_capacity(PINGS);
    for _ in 0..PINGS {
        let begin = Instant::now();
        let mut ask = cmd("PUBLISH");
        ask.arg("bare-lane").arg("ping");
        let _: Value = ask.query_async(&mut host).await.unwrap();
        while payload(answers.recv().await.unwrap()).is_none() {}
        times.push(begin.elapsed());
    }
    serving.abort();
    times
}

const PACED: usize = 3_000;

/// Bodies begin with the moment of their publish.
fn stamped(epoch: Instant) -> Vec<u8> {
    let mut body = vec![b'x'; BODY];
    body[..16].copy_from_slice(&epoch.elapsed().as_nanos().to_be_bytes());
    body
}

fn since(epoch: Instant, body: &[u8]) -> Duration {
    let sent = u128::from_be_bytes(body[..16].try_into().unwrap());
    epoch.elapsed() - Duration::from_nanos(u64::try_from(sent).unwrap())
}

async fn bare_paced(server: &Server) -> Vec<Duration> {
    let (mut host, mut guest) = (server.raw().await, server.raw().await);
    fresh(&mut host).await;
    let epoch = Instant::now();
    let publishing = tokio::spawn(async move {
        let mut tick = tokio::time::interval(Duration::from_millis(1));
        for _ in 0..PACED {
            tick.tick().await;
            add(&mut host, &stamped(epoch)).await;
        }
    });
    let mut times = Vec::new();
    while times.len() < PACED {
        let mut read = cmd("XREADGROUP");
        read.arg("GROUP").arg("g").arg("c").arg("COUNT").arg(64);
        read.arg("BLOCK").arg(0).arg("STREAMS").arg(KEY).arg(">");
        let answer: Value = read.query_async(&mut guest).await.unwrap();
        let (mut ids, mut bodies) = (Vec::new(), Vec::new());
        collect(answer, &mut ids, &mut bodies);
        times.extend(bodies.iter().map(|body| since(epoch, body)));
        bare_ack(&mut guest, &ids).await;
    }
    publishing.await.unwrap();
    times
}

fn collect(answer: Value, ids: &mut Vec<Vec<u8>>, bodies: &mut Vec<Vec<u8>>) {
    let Value::Map(streams) = answer else { return };
    for (_, entries) in streams {
        let Value::Array(entries) = entries else {
            continue;
        };
        for entry in entries {
            let Value::Array(parts) = entry else { continue };
            let mut parts = parts.into_iter();
            if let (Some(Value::BulkString(id)), Some(Value::Array(fields))) =
                (parts.next(), parts.next())
                && let Some(Value::BulkString(body)) = fields.into_iter().last()
            {
                ids.push(id);
                bodies.push(body);
            }
        }
    }
}

// ---- wilco

fn address() -> GuestAddress {
    GuestAddress::from(GuestId::new("bench").unwrap())
}

async fn queue(broker: &Arc<dyn Broker>) -> QueueName {
    let name = address().queue();
    let _ = broker
        .delete(&name, wilco::broker::DeleteMode::Discard, deadline())
        .await;
    let spec = QueueSpec::new(name.clone());
    broker.declare(&spec, deadline()).await.unwrap();
    name
}

async fn publish(server: &Server, in_flight: usize, messages: usize) -> f64 {
    let broker = server.wilco().await;
    let name = queue(&broker).await;
    put(&broker, &name, 1, 1).await;
    let begin = Instant::now();
    put(&broker, &name, in_flight, messages).await;
    let rate = rate(messages / in_flight * in_flight, begin);
    broker.close(deadline()).await.unwrap();
    rate
}

async fn put(broker: &Arc<dyn Broker>, name: &QueueName, in_flight: usize, messages: usize) {
    let body = Bytes::from(vec![b'x'; BODY]);
    let tasks = (0..in_flight).map(|_| {
        let (broker, name, body) = (Arc::clone(broker), name.clone(), body.clone());
        tokio::spawn(async move {
            for _ in 0..messages / in_flight {
                let message = Message::new("bench", body.clone()).unwrap();
                broker.publish(&name, message, deadline()).await.unwrap();
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
}

fn prefetch(n: usize) -> ConsumeOptions {
    ConsumeOptions::prefetch(NonZeroU32::new(u32::try_from(n).unwrap()).unwrap())
}

async fn consume(server: &Server, ahead: usize, messages: usize) -> f64 {
    let broker = server.wilco().await;
    let name = queue(&broker).await;
    let messages = messages / 250 * 250;
    put(&broker, &name, 250, messages).await;
    let mut consumer = broker
        .consume(&name, prefetch(ahead), deadline())
        .await
        .unwrap();
    let begin = Instant::now();
    let mut acks = tokio::task::JoinSet::new();
    for _ in 0..messages {
        let delivery = consumer.next().await.unwrap();
        if ahead == 1 {
            delivery.ack(deadline()).await.unwrap();
        } else {
            acks.spawn(delivery.ack(deadline()));
            while let Some(ack) = acks.try_join_next() {
                ack.unwrap().unwrap();
            }
        }
    }
    while let Some(ack) = acks.join_next().await {
        ack.unwrap().unwrap();
    }
    let rate = rate(messages, begin);
    consumer.close(deadline()).await.unwrap();
    broker.close(deadline()).await.unwrap();
    rate
}

async fn pings(server: &Server) -> Vec<Duration> {
    let (host, guest) = (server.wilco().await, server.wilco().await);
    let mut responder = guest.respond(&address(), deadline()).await.unwrap();
    let serving = tokio::spawn(async move {
        while let Ok(request) = responder.next().await {
            let body = request.body.clone();
            request.reply(body, deadline()).await.unwrap();
        }
    });
    let mut times = Vec::with_capacity(PINGS);
    for _ in 0..PINGS {
        let begin = Instant::now();
        host.request(&address(), "ping".into(), deadline())
            .await
            .unwrap();
        times.push(begin.elapsed());
    }
    serving.abort();
    times
}

async fn paced(server: &Server) -> Vec<Duration> {
    let (host, guest) = (server.wilco().await, server.wilco().await);
    let name = queue(&host).await;
    let mut consumer = guest
        .consume(&name, prefetch(64), deadline())
        .await
        .unwrap();
    let epoch = Instant::now();
    let publishing = tokio::spawn(async move {
        let mut tick = tokio::time::interval(Duration::from_millis(1));
        for _ in 0..PACED {
            tick.tick().await;
            let message = Message::new("bench", stamped(epoch)).unwrap();
            host.publish(&name, message, deadline()).await.unwrap();
        }
    });
    let mut times = Vec::new();
    let mut acks = tokio::task::JoinSet::new();
    while times.len() < PACED {
        let delivery = consumer.next().await.unwrap();
        times.push(since(epoch, &delivery.message.body));
        acks.spawn(delivery.ack(deadline()));
        while let Some(ack) = acks.try_join_next() {
            ack.unwrap().unwrap();
        }
    }
    publishing.await.unwrap();
    acks.join_all().await;
    consumer.close(deadline()).await.unwrap();
    times
}
