//! The workflow on the embedded broker: full provisions per second, and what waiting costs.
//!
//! `cargo bench --bench workflow [-- GUESTS [WAITING [DIRECTORY]]]`
//!
//! Everything is durable: broker and records are files, every guest has a journal file of its own, all
//! synced to disk at each step. Control plane and guests share this one process and its cores, so the
//! rate is that of both sides together. Memory is the resident set of the process (Linux).
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::task::JoinSet;
use wilco::{
    Broker, Failure, Guest, ProvisionOutcome, SqliteJournal, SqliteRecords, State, Taskmanager,
    connect,
};

const LONG: Duration = Duration::from_secs(600);

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .collect();
    let number = |at: usize, default| {
        arguments
            .get(at)
            .map_or(default, |number: &String| number.parse().unwrap())
    };
    let (guests, waiting) = (number(0, 1_000), number(1, 10_000));
    let place = arguments
        .get(2)
        .map_or_else(std::env::temp_dir, |place| place.into());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let directory = tempfile::tempdir_in(&place).unwrap();
    runtime.block_on(wait(directory.path(), waiting));
    let directory = tempfile::tempdir_in(&place).unwrap();
    runtime.block_on(provision(directory.path(), guests));
}

async fn taskmanager(directory: &Path) -> (Arc<dyn Broker>, Taskmanager) {
    let url = format!("sqlite:{}", directory.join("broker.db").display());
    let broker = connect(&url).await.unwrap();
    let records = SqliteRecords::open(directory.join("records.db"))
        .await
        .unwrap();
    (
        broker.clone(),
        Taskmanager::new(broker, records).await.unwrap(),
    )
}

/// `guests` provisions from the call to the recorded outcome, all at once.
async fn provision(directory: &Path, guests: usize) {
    let (broker, taskmanager) = taskmanager(directory).await;
    let payload = serde_json::json!({ "config": "x".repeat(2_048) });
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for guest in 0..guests {
        let (broker, taskmanager, payload) = (broker.clone(), taskmanager.clone(), payload.clone());
        let journal = directory.join(format!("journal-{guest}.db"));
        tasks.spawn(async move {
            let name = format!("vm-{guest}");
            let guest = async {
                let journal = SqliteJournal::open(journal).await.unwrap();
                Guest::attach(broker, name.as_str(), journal)
                    .wait(LONG)
                    .await
                    .unwrap()
                    .on_prepare(|_: serde_json::Value, _| async { Ok::<_, Failure>(()) })
                    .serve(std::future::pending())
                    .await
            };
            let outcome = taskmanager.provision(name.as_str(), payload).boot_deadline(LONG);
            tokio::select! {
                served = guest => panic!("{served:?}"),
                outcome = outcome => {
                    let outcome = outcome.unwrap();
                    assert!(matches!(outcome, ProvisionOutcome::Succeeded { runs: 1, .. }), "{outcome:?}");
                }
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    let took = start.elapsed();
    let rate = guests as f64 / took.as_secs_f64();
    println!("{guests} guests provisioned, each on files of its own, in {took:.1?}: {rate:.0} /s");
}

/// `waiting` provisions whose guests have not booted.
async fn wait(directory: &Path, waiting: usize) {
    let (_, taskmanager) = taskmanager(directory).await;
    let before = resident();
    let payload = serde_json::json!({ "config": "x".repeat(2_048) });
    let mut tasks = JoinSet::new();
    for guest in 0..waiting {
        let (taskmanager, payload) = (taskmanager.clone(), payload.clone());
        tasks.spawn(async move {
            taskmanager
                .provision(format!("vm-{guest}"), payload)
                .start()
                .await
                .unwrap();
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    let all_wait = async {
        loop {
            let records = taskmanager.records().await.unwrap();
            if records
                .iter()
                .all(|record| record.state == State::AwaitingGuest)
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    all_wait.await;
    let cpu = processor_time();
    let over = Duration::from_secs(10);
    tokio::time::sleep(over).await;
    let busy = (processor_time() - cpu).as_secs_f64() / over.as_secs_f64();
    let grown = resident().saturating_sub(before);
    println!(
        "{waiting} guests waited for: {:.1} kB of memory each beside a payload of 2 kB, {:.0} % of a core \
         for all",
        grown as f64 / 1e3 / waiting as f64,
        100.0 * busy
    );
    taskmanager.close();
}

/// The process's resident memory in bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        * 1024
}

/// The processor time that this process has used: fields 14 and 15 of its `stat`, in ticks of 10 ms.
fn processor_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .collect();
    let ticks = |at: usize| fields[at].parse::<u64>().unwrap();
    Duration::from_millis((ticks(11) + ticks(12)) * 10)
}
