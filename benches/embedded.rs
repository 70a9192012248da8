//! The embedded broker against bare SQLite, in one run.
//!
//! `cargo bench --bench embedded [-- ROUNDS [DIRECTORY [publish | consume | ping]]]`
//!
//! The bare side is what one would write by hand for the same promise, and no more: one thread, one
//! table, messages that wait together in one transaction, `synchronous=FULL`, an answer after the
//! commit. Both sides take turns, round by round, in new files, and what is compared is the median of
//! the rounds' ratios: absolute figures move with the machine.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::{
    num::NonZeroU32,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::oneshot;
use wilco::{
    Broker, Deadline, GuestId, Message, QueueName,
    broker::{ConsumeOptions, QueueSpec},
    connect,
};

const BODY: usize = 1024;

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .collect();
    let rounds = arguments
        .first()
        .map_or(7, |rounds| rounds.parse().unwrap());
    let place: PathBuf = arguments
        .get(1)
        .map_or_else(std::env::temp_dir, PathBuf::from);
    let part = arguments.get(2).map(String::as_str);
    let wants = |name| part.is_none_or(|part| part == name);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    println!("{rounds} rounds in {}", place.display());
    if wants("publish") {
        publishing(&runtime, &place, rounds);
    }
    if wants("consume") {
        consuming(&runtime, &place, rounds);
    }
    if wants("ping") {
        println!("ping round trip");
        let directory = tempfile::tempdir_in(&place).unwrap();
        runtime.block_on(pings(directory.path()));
    }
}

fn publishing(runtime: &tokio::runtime::Runtime, place: &Path, rounds: usize) {
    println!("durable publish of {BODY} bytes, messages/s, median");
    for (in_flight, messages) in [(1, 3_000), (64, 60_000), (1024, 120_000)] {
        let mut pairs = Vec::new();
        for round in 0..rounds {
            let directory = tempfile::tempdir_in(place).unwrap();
            let raw = || runtime.block_on(bare_publish(directory.path(), in_flight, messages));
            let ours = || runtime.block_on(publish(directory.path(), in_flight, messages));
            // Whoever comes second finds the disk as the first left it: so they swap.
            pairs.push(if round % 2 == 0 {
                let raw = raw();
                (raw, ours())
            } else {
                let ours = ours();
                (raw(), ours)
            });
        }
        report(&format!("{in_flight:>5} in flight"), pairs);
    }
}

fn consuming(runtime: &tokio::runtime::Runtime, place: &Path, rounds: usize) {
    println!("claim and ack of {BODY} bytes, messages/s, median");
    for prefetch in [1, 64, 512] {
        let mut pairs = Vec::new();
        for _ in 0..rounds {
            let directory = tempfile::tempdir_in(place).unwrap();
            let messages = if prefetch == 1 { 3_000 } else { 60_000 };
            let raw = bare_consume(directory.path(), prefetch, messages);
            let ours = runtime.block_on(consume(directory.path(), prefetch, messages));
            pairs.push((raw, ours));
        }
        report(&format!("prefetch {prefetch:>4} "), pairs);
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

fn deadline() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

fn rate(messages: usize, begin: Instant) -> f64 {
    messages as f64 / begin.elapsed().as_secs_f64()
}

// ---- bare SQLite

struct BareMessage {
    id: String,
    body: Bytes,
    done: oneshot::Sender<bool>,
}

fn bare_open(path: &Path) -> rusqlite::Connection {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection
        .execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
             CREATE TABLE m(seq INTEGER PRIMARY KEY, queue INTEGER NOT NULL, id TEXT NOT NULL,
                            body BLOB NOT NULL, claimed INTEGER, UNIQUE(queue, id))",
        )
        .unwrap();
    connection
}

fn bare_store(connection: &rusqlite::Connection, id: &str, body: &[u8]) {
    connection
        .prepare_cached("INSERT INTO m(queue, id, body) VALUES(1, ?1, ?2)")
        .unwrap()
        .execute((id, body))
        .unwrap();
}

async fn bare_publish(directory: &Path, in_flight: usize, messages: usize) -> f64 {
    let connection = bare_open(&directory.join("bare.db"));
    let (sender, receiver) = mpsc::sync_channel::<BareMessage>(4096);
    let writer = std::thread::spawn(move || {
        while let Ok(first) = receiver.recv() {
            let mut batch = vec![first];
            batch.extend(receiver.try_iter().take(1023));
            connection.execute_batch("BEGIN IMMEDIATE").unwrap();
            for message in &batch {
                bare_store(&connection, &message.id, &message.body);
            }
            connection.execute_batch("COMMIT").unwrap();
            for message in batch {
                let _ = message.done.send(true);
            }
        }
    });
    let body = Bytes::from(vec![7; BODY]);
    let begin = Instant::now();
    let tasks: Vec<_> = (0..in_flight)
        .map(|_| {
            let (sender, body) = (sender.clone(), body.clone());
            tokio::spawn(async move {
                for _ in 0..messages / in_flight {
                    let (done, stored) = oneshot::channel();
                    let id = wilco::MessageId::generate().to_string();
                    let body = body.clone();
                    sender.send(BareMessage { id, body, done }).unwrap();
                    assert!(stored.await.unwrap());
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let rate = rate(messages / in_flight * in_flight, begin);
    drop(sender);
    writer.join().unwrap();
    rate
}

/// Claims by marking, as many as the prefetch at once, and deletes as many at once.
fn bare_consume(directory: &Path, prefetch: u32, messages: usize) -> f64 {
    let connection = bare_open(&directory.join("bare.db"));
    connection.execute_batch("BEGIN").unwrap();
    for n in 0..messages {
        bare_store(&connection, &n.to_string(), &[7; BODY]);
    }
    connection.execute_batch("COMMIT").unwrap();
    let begin = Instant::now();
    loop {
        connection.execute_batch("BEGIN IMMEDIATE").unwrap();
        let claimed: Vec<(i64, Vec<u8>)> = connection
            .prepare_cached(
                "UPDATE m SET claimed = 1 WHERE seq IN
                   (SELECT seq FROM m WHERE claimed IS NULL ORDER BY seq LIMIT ?1)
                 RETURNING seq, body",
            )
            .unwrap()
            .query_map([prefetch], |row| Ok((row.get(0)?, row.get(1)?)))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        connection.execute_batch("COMMIT").unwrap();
        if claimed.is_empty() {
            break;
        }
        connection.execute_batch("BEGIN IMMEDIATE").unwrap();
        for (seq, body) in claimed {
            assert_eq!(body.len(), BODY);
            connection
                .prepare_cached("DELETE FROM m WHERE seq = ?1")
                .unwrap()
                .execute([seq])
                .unwrap();
        }
        connection.execute_batch("COMMIT").unwrap();
    }
    rate(messages, begin)
}

// ---- wilco

async fn open(directory: &Path) -> (Arc<dyn Broker>, QueueName) {
    let url = format!("sqlite://{}/wilco.db", directory.display());
    let broker = connect(&url).await.unwrap();
    let queue = wilco::GuestAddress::from(GuestId::new("bench").unwrap()).queue();
    let spec = QueueSpec::new(queue.clone());
    broker.declare(&spec, deadline()).await.unwrap();
    (broker, queue)
}

async fn publish(directory: &Path, in_flight: usize, messages: usize) -> f64 {
    let (broker, queue) = open(directory).await;
    let body = Bytes::from(vec![7; BODY]);
    let begin = Instant::now();
    let tasks: Vec<_> = (0..in_flight)
        .map(|_| {
            let (broker, queue, body) = (Arc::clone(&broker), queue.clone(), body.clone());
            tokio::spawn(async move {
                for _ in 0..messages / in_flight {
                    let message = Message::new("prepare", body.clone()).unwrap();
                    broker.publish(&queue, message, deadline()).await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let rate = rate(messages / in_flight * in_flight, begin);
    broker.close(deadline()).await.unwrap();
    rate
}

async fn consume(directory: &Path, prefetch: u32, messages: usize) -> f64 {
    publish(directory, messages.min(1024), messages / 1024 * 1024 + 1024).await;
    let (broker, queue) = open(directory).await;
    let messages = broker.status(&queue, deadline()).await.unwrap().ready as usize;
    let options = ConsumeOptions::prefetch(NonZeroU32::new(prefetch).unwrap());
    let mut consumer = broker.consume(&queue, options, deadline()).await.unwrap();
    let begin = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..messages {
        let delivery = consumer.next().await.unwrap();
        assert_eq!(delivery.message.body.len(), BODY);
        tasks.spawn(async move { delivery.ack(deadline()).await.unwrap() });
        while tasks.try_join_next().is_some() {}
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    let rate = rate(messages, begin);
    drop(consumer);
    broker.close(deadline()).await.unwrap();
    rate
}

async fn pings(directory: &Path) {
    let (broker, _) = open(directory).await;
    // Another level of syncing is another connection to the file: requests between the two go over the
    // socket, as between processes.
    let url = format!("sqlite://{}/wilco.db?sync=normal", directory.display());
    let apart = connect(&url).await.unwrap();
    let lane = GuestId::new("bench").unwrap().into();
    let mut responder = broker.respond(&lane, deadline()).await.unwrap();
    let answering = tokio::spawn(async move {
        while let Ok(request) = responder.next().await {
            let body = request.body.clone();
            request.reply(body, deadline()).await.unwrap();
        }
    });
    for (what, asker) in [
        ("same process, channel", &broker),
        ("over the socket", &apart),
    ] {
        let asker = Arc::clone(asker);
        let lane = lane.clone();
        let took = tokio::spawn(async move {
            let mut took = Vec::new();
            for _ in 0..5_000 {
                let begin = Instant::now();
                let answer = asker.request(&lane, Bytes::from("ping"), deadline()).await;
                assert_eq!(answer.unwrap(), "ping");
                took.push(begin.elapsed());
            }
            took.sort();
            took
        })
        .await
        .unwrap();
        println!(
            "  {what}: p50 {:?}  p99 {:?}",
            took[took.len() / 2],
            took[took.len() * 99 / 100]
        );
    }
    let nobody = GuestId::new("nobody").unwrap().into();
    let begin = Instant::now();
    for _ in 0..1_000 {
        let answer = apart
            .request(&nobody, Bytes::from("ping"), deadline())
            .await;
        assert!(answer.is_err());
    }
    println!("  nobody there: {:?} each", begin.elapsed() / 1_000);
    broker.close(deadline()).await.unwrap();
    answering.await.unwrap();
}
