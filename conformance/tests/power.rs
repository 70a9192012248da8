//! Law D3: the power is cut while messages are published. In a configuration that the durability
//! report calls Power nothing confirmed is lost; in one that it calls less, something is, so that
//! the first result means something.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::{
    collections::BTreeSet,
    io::Write as _,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::net::TcpStream;
use wilco::{
    Broker, Deadline, GuestAddress, GuestId, Message, MessageId, QueueName,
    broker::{ConsumeOptions, QueueSpec},
    durability::{Level, Verdict},
};
use wilco_conformance::{
    harness::Unavailable,
    power::Disk,
    process::{Process, free_port},
};

/// How long messages are published before the cut: long enough for thousands, and well below the
/// 30 s after which Linux writes dirty pages by itself.
const PUBLISH_FOR: Duration = Duration::from_secs(4);

const PUBLISHERS: usize = 16;

fn within() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

/// What came of a cut.
struct Cut {
    level: Level,
    power_loss: Verdict,
    confirmed: usize,
    lost: usize,
}

/// The broker calls itself safe and lost nothing, or does not and lost something.
fn judge(what: &str, safe: bool, cut: &Cut) {
    let told = format!(
        "{what}: {} confirmed, {} lost; the report says {}, power loss {}",
        cut.confirmed, cut.lost, cut.level, cut.power_loss
    );
    assert!(cut.confirmed >= 200, "too few to show anything: {told}");
    if safe {
        assert_eq!(cut.power_loss, Verdict::Safe, "{told}");
        assert!(cut.level >= Level::Power, "{told}");
        assert_eq!(cut.lost, 0, "{told}");
    } else {
        assert_ne!(cut.power_loss, Verdict::Safe, "{told}");
        assert!(cut.lost > 0, "the cut cuts nothing: {told}");
    }
    say(&told);
}

/// Past the capture of passing tests' output: the figures are the point, and "not run" no pass.
fn say(told: &str) {
    let _ = writeln!(std::io::stderr(), "D3 {told}");
}

/// A disk, or a word that there can be none here.
fn disk(what: &str) -> Option<Disk> {
    match Disk::new() {
        Ok(disk) => Some(disk),
        Err(reason) => {
            say(&format!("NOT RUN: {what}: {reason}"));
            None
        }
    }
}

fn queue() -> QueueName {
    GuestAddress::from(GuestId::new("power").unwrap()).queue()
}

/// Publishes from several tasks until the time is over; the ids that were Ok.
async fn publish(broker: &Arc<dyn Broker>, start: Instant) -> BTreeSet<String> {
    let tasks: Vec<_> = (0..PUBLISHERS)
        .map(|task| {
            let (broker, queue) = (Arc::clone(broker), queue());
            tokio::spawn(async move {
                let mut confirmed = Vec::new();
                for n in 0.. {
                    if start.elapsed() > PUBLISH_FOR {
                        break;
                    }
                    let id = format!("{task}-{n}");
                    let message = Message::new("check", vec![b'x'; 200]).unwrap();
                    let message = message.with_id(MessageId::new(id.clone()).unwrap());
                    broker.publish(&queue, message, within()).await.unwrap();
                    confirmed.push(id);
                }
                confirmed
            })
        })
        .collect();
    let mut all = BTreeSet::new();
    for task in tasks {
        all.extend(task.await.unwrap());
    }
    all
}

/// How many of these are not in the queue; all of them if the queue is gone.
async fn missing(url: &str, confirmed: &BTreeSet<String>) -> usize {
    let broker = wilco::connect_by(url, within()).await.unwrap();
    let options = ConsumeOptions::prefetch(const { std::num::NonZeroU32::new(256).unwrap() });
    let Ok(mut consumer) = broker.consume(&queue(), options, within()).await else {
        return confirmed.len();
    };
    let mut left = confirmed.clone();
    // An unconfirmed message more is fine; the status says when all was seen.
    while broker.status(&queue(), within()).await.unwrap().messages() > 0 {
        for _ in 0..256 {
            let next = tokio::time::timeout(Duration::from_millis(500), consumer.next());
            let Ok(delivery) = next.await else { break };
            let delivery = delivery.unwrap();
            left.remove(delivery.message.id.as_str());
            delivery.ack(within()).await.unwrap();
        }
    }
    left.len()
}

/// Cuts the power of a server while it is published to.
async fn cut_server(
    disk: &mut Disk,
    url: impl Fn(SocketAddr) -> String,
    command: impl Fn(&Path, u16) -> Command + Send + Sync + 'static,
) -> Cut {
    let port = free_port().unwrap();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let directory = TempDir::new_in(disk.path()).unwrap();
    // The directory is ours to sync; what is in it is the server's.
    std::fs::File::open(disk.path())
        .unwrap()
        .sync_all()
        .unwrap();
    let server = Process::new(address, directory, move |directory| {
        command(directory, port)
    });
    let listens = async || TcpStream::connect(address).await.is_ok();
    server.start(listens).await.unwrap();
    let url = url(address);
    let broker = wilco::connect_by(&url, within()).await.unwrap();
    broker
        .declare(&QueueSpec::new(queue()), within())
        .await
        .unwrap();
    let report = broker.durability(within()).await.unwrap();
    let confirmed = publish(&broker, Instant::now()).await;
    disk.cut(|| server.pause(), async || server.kill().await)
        .await
        .unwrap();
    drop(broker);
    server.start(listens).await.unwrap();
    Cut {
        level: report.level,
        power_loss: report.power_loss,
        confirmed: confirmed.len(),
        lost: missing(&url, &confirmed).await,
    }
}

fn redis(fsync: &'static str) -> impl Fn(&Path, u16) -> Command + Send + Sync + 'static {
    move |directory, port| {
        let mut command = Command::new("redis-server");
        command.current_dir(directory).args([
            "--bind",
            "127.0.0.1",
            "--port",
            &port.to_string(),
            "--save",
            "",
            "--appendonly",
            "yes",
            "--appendfsync",
            fsync,
        ]);
        command
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d3_redis() {
    for (fsync, safe) in [("always", true), ("no", false)] {
        let what = format!("redis, appendfsync {fsync}");
        let Some(mut disk) = disk(&what) else { return };
        let url = |address| format!("redis://{address}");
        judge(&what, safe, &cut_server(&mut disk, url, redis(fsync)).await);
    }
}

/// The server of this machine; 2.10 and later can sync each message, and say so by a tag.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d3_nats() {
    let program = std::env::var("WILCO_NATS_SERVER").unwrap_or("nats-server".into());
    let version = Command::new(&program).arg("--version").output().unwrap();
    let version = String::from_utf8_lossy(&version.stdout).trim().to_owned();
    let syncs = !version.contains(" v2.9.");
    if !syncs {
        say(&format!(
            "NOT RUN: nats, sync_interval always: {version} has no such setting"
        ));
    }
    let url = |address| format!("nats://{address}");
    for (setting, safe) in [("sync_interval: always", true), ("", false)] {
        if safe && !syncs {
            continue;
        }
        let what = format!("{version}, {}", if safe { setting } else { "as it comes" });
        let Some(mut disk) = disk(&what) else { return };
        let program = program.clone();
        let tags = if safe {
            "server_tags: [\"sync:always\"]"
        } else {
            ""
        };
        let command = move |directory: &Path, port: u16| {
            let config = directory.join("nats.conf");
            let store = directory.join("store");
            let text = format!(
                "listen: \"127.0.0.1:{port}\"\n{tags}\njetstream {{ store_dir: {:?}\n{setting} }}\n",
                store.display()
            );
            std::fs::write(&config, text).unwrap();
            let mut command = Command::new(&program);
            command.arg("-c").arg(config);
            command
        };
        judge(&what, safe, &cut_server(&mut disk, url, command).await);
    }
}

/// A process that publishes into the file as fast as it can and writes down what was Ok, elsewhere.
fn embedded_publisher(url: &str, log: &Path) -> std::process::Child {
    use std::os::unix::process::CommandExt as _;
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "publisher_of_d3_embedded",
            "--ignored",
            "--nocapture",
        ])
        .env("WILCO_POWER_URL", url)
        .env("WILCO_POWER_LOG", log)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// The process of [`embedded_publisher`]: no test of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the second process of d3_embedded"]
async fn publisher_of_d3_embedded() {
    let url = std::env::var("WILCO_POWER_URL").unwrap();
    let mut log = std::fs::File::create(std::env::var("WILCO_POWER_LOG").unwrap()).unwrap();
    let broker = wilco::connect(&url).await.unwrap();
    broker
        .declare(&QueueSpec::new(queue()), within())
        .await
        .unwrap();
    let confirmed = publish(&broker, Instant::now()).await;
    for id in confirmed {
        writeln!(log, "{id}").unwrap();
    }
    writeln!(log, "end").unwrap();
    // Stands still, with the file open, until the power is cut.
    std::future::pending::<()>().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d3_embedded() {
    for (sync, safe) in [("full", true), ("off", false)] {
        let what = format!("embedded, sync={sync}");
        let Some(mut disk) = disk(&what) else { return };
        let url = format!(
            "sqlite://{}?sync={sync}",
            disk.path().join("broker.db").display()
        );
        let elsewhere = TempDir::new().unwrap();
        let log: PathBuf = elsewhere.path().join("confirmed");
        let mut publisher = embedded_publisher(&url, &log);
        let started = Instant::now();
        let confirmed = loop {
            let told = std::fs::read_to_string(&log).unwrap_or_default();
            if let Some(ids) = told.strip_suffix("end\n") {
                break ids.lines().map(str::to_owned).collect::<BTreeSet<_>>();
            }
            assert!(
                started.elapsed() < Duration::from_secs(60),
                "the publisher ends"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let stop = || Ok::<_, Unavailable>(());
        let kill = async || {
            publisher.kill().unwrap();
            publisher.wait().unwrap();
            Ok(())
        };
        disk.cut(stop, kill).await.unwrap();
        let broker = wilco::connect(&url).await.unwrap();
        let report = broker.durability(within()).await.unwrap();
        drop(broker);
        let cut = Cut {
            level: report.level,
            power_loss: report.power_loss,
            confirmed: confirmed.len(),
            lost: missing(&url, &confirmed).await,
        };
        judge(&what, safe, &cut);
    }
}
