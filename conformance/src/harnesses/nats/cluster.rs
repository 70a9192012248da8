//! Three nodes that are one JetStream: each stream and consumer on all of them, each with a leader of its
//! own.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use wilco::{Broker, QueueName, durability::Level};

use super::{ANYBODY, TAKEOVER, ask, configuration, remains};
use crate::{
    harness::{Cluster, Facts, Faults, Server, Unavailable},
    process::{Process, free_ports},
};

const NODES: usize = 3;

/// A group (there is one for each stream, for each consumer, and one for all) votes when it has heard
/// nothing of its leader for 4 to 9 s, drawn anew each time (`minElectionTimeout`, `maxElectionTimeout` in
/// the server's raft.go). Two that stand at once win nothing and draw again: so twice the most, and a
/// loaded machine.
const FAILOVER: Duration = Duration::from_secs(20);

/// A node that comes back is sent what it has missed, by each group's leader.
const WHOLE_WITHIN: Duration = Duration::from_secs(120);

/// The pulse of a group is a second (`hbInterval`): one that was not heard of for longer than two is not
/// there, whatever it had when it was.
const HEARD_WITHIN: Duration = Duration::from_secs(2);

/// Where a node says whether it is one of them.
const HEALTH: &str = "/healthz?js-server-only=true";

/// Three nodes and their stores.
#[derive(Debug)]
pub struct Nodes {
    nodes: Vec<Node>,
    version: String,
    syncs: bool,
    /// What the URL asks for.
    replicas: usize,
}

#[derive(Debug)]
struct Node {
    server: Process,
    /// Where it tells its health.
    monitor: SocketAddr,
}

impl Nodes {
    /// Starts three nodes of this server program, and returns when they are whole.
    pub(super) async fn start(
        program: &str,
        version: String,
        syncs: bool,
        replicas: usize,
    ) -> Result<Self, String> {
        let ports = free_ports::<{ 3 * NODES }>().map_err(|error| error.to_string())?;
        let local = |port: &u16| SocketAddr::from((Ipv4Addr::LOCALHOST, *port));
        let addresses: Vec<_> = ports.iter().map(local).collect();
        let routes: Vec<_> = addresses[2 * NODES..]
            .iter()
            .map(|route| format!("nats://{route}"))
            .collect();
        let node = |n: usize| {
            let (server, monitor, route) =
                (addresses[n], addresses[NODES + n], addresses[2 * NODES + n]);
            let more = format!(
                "http: \"{monitor}\"\ncluster {{ name: wilco, listen: \"{route}\", routes: {routes:?} }}\n{ANYBODY}"
            );
            let server = process(program, &name(n), server, syncs, &more)?;
            Ok::<_, std::io::Error>(Node { server, monitor })
        };
        let nodes = (0..NODES).map(node).collect::<Result<_, _>>();
        let this = Self {
            nodes: nodes.map_err(|error| error.to_string())?,
            version,
            syncs,
            replicas,
        };
        // No node is ready before a majority is there.
        let starting = this.nodes.iter().map(Node::start);
        futures_util::future::try_join_all(starting).await?;
        this.until_whole().await?;
        Ok(this)
    }

    fn url(&self) -> String {
        let addresses = self.nodes.iter().map(|node| node.server.address());
        let addresses: Vec<_> = addresses.map(|address| address.to_string()).collect();
        format!("nats://{}?replicas={}", addresses.join(","), self.replicas)
    }

    /// What the first node answers that answers at all.
    async fn ask(&self, subject: &str) -> Result<(SocketAddr, Value), String> {
        let mut why = String::new();
        for node in &self.nodes {
            let address = node.server.address();
            match ask(address, subject, &json!({})).await {
                Ok(answer) => return Ok((address, answer)),
                Err(error) => why = error.to_string(),
            }
        }
        Err(format!("no node answers {subject}: {why}"))
    }

    async fn leader_of(&self, queue: &QueueName) -> Result<usize, String> {
        let stream = queue.as_str().replace('.', "~");
        let (_, told) = self.ask(&format!("$JS.API.STREAM.INFO.{stream}")).await?;
        let leader = told["cluster"]["leader"].as_str();
        (0..NODES)
            .find(|n| leader == Some(&name(*n)))
            .ok_or_else(|| format!("{stream} has no leader: {told}"))
    }

    /// Each node has what it is to have, by the word of each group's leader. A node's own is asked for no
    /// more than the group of all: before 2.10 it never calls a consumer current that was never used.
    async fn is_whole(&self) -> Result<(), String> {
        for (n, node) in self.nodes.iter().enumerate() {
            let healthy = get(node.monitor, HEALTH).await;
            let healthy = healthy.map_err(|error| format!("node {n}: {error}"))?;
            if !healthy.contains("\"ok\"") {
                return Err(format!("node {n}: {healthy}"));
            }
        }
        let mut led = 0;
        for (n, node) in self.nodes.iter().enumerate() {
            let told = get(node.monitor, "/jsz").await;
            let told = told.map_err(|error| format!("node {n}: {error}"))?;
            let told = told.split_once("\r\n\r\n").map_or("", |(_, body)| body);
            let told: Value = serde_json::from_str(told).map_err(|error| error.to_string())?;
            let meta = &told["meta_cluster"];
            if meta["leader"] == name(n) {
                led += 1;
                has_replicas(meta, NODES - 1, false).map_err(|why| format!("all: {why}"))?;
            }
        }
        if led != 1 {
            return Err(format!("{led} nodes lead"));
        }
        let (_, listed) = self.ask("$JS.API.STREAM.LIST").await?;
        let told = listed["total"].as_u64().zip(listed["streams"].as_array());
        let Some((total, streams)) = told else {
            return Err(format!("the streams are not told: {listed}"));
        };
        if streams.len() as u64 != total {
            return Err(format!("{} of {total} streams are told", streams.len()));
        }
        for stream in streams {
            let name = stream["config"]["name"].as_str().unwrap_or_default();
            is_replicated(stream, false).map_err(|why| format!("{name}: {why}"))?;
            let (_, consumers) = self.ask(&format!("$JS.API.CONSUMER.LIST.{name}")).await?;
            if consumers["missing"].is_array() || consumers["error"].is_object() {
                return Err(format!("{name}: not all consumers are told: {consumers}"));
            }
            for consumer in consumers["consumers"].as_array().into_iter().flatten() {
                // Before 2.10 a follower of a group in which nothing happens is not sent what it missed. For
                // a consumer that never delivered that is nothing: who is attached stands in its name.
                let unused = consumer["delivered"]["stream_seq"] == 0;
                is_replicated(consumer, unused)
                    .map_err(|why| format!("{name}, {}: {why}", consumer["name"]))?;
            }
        }
        Ok(())
    }

    async fn until_whole(&self) -> Result<(), String> {
        let began = Instant::now();
        while let Err(why) = self.is_whole().await {
            if began.elapsed() > WHOLE_WITHIN {
                return Err(format!(
                    "the nodes are not whole within {WHOLE_WITHIN:?}: {why}"
                ));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }
}

fn name(n: usize) -> String {
    format!("wilco-{n}")
}

/// What a leader says of a stream or consumer: it leads, all others are there, and have what it has unless it
/// is unused.
fn is_replicated(told: &Value, unused: bool) -> Result<(), String> {
    let wanted = told["config"]["num_replicas"].as_u64().unwrap_or(0);
    // A consumer has as many as its stream, where it does not say otherwise.
    let wanted = match usize::try_from(wanted).unwrap_or(0) {
        0 => told["cluster"]["replicas"].as_array().map_or(0, Vec::len),
        wanted => wanted - 1,
    };
    let cluster = &told["cluster"];
    if cluster["leader"].as_str().is_none_or(str::is_empty) {
        return Err(format!("none leads: {cluster}"));
    }
    has_replicas(cluster, wanted, unused)
}

fn has_replicas(cluster: &Value, wanted: usize, unused: bool) -> Result<(), String> {
    let replicas = cluster["replicas"].as_array().into_iter().flatten();
    let current = replicas.filter(|replica| {
        let heard = replica["active"].as_u64().map(Duration::from_nanos);
        (unused || replica["current"] == true)
            && replica["offline"] != true
            && heard.is_some_and(|heard| heard < HEARD_WITHIN)
    });
    if current.count() == wanted {
        Ok(())
    } else {
        Err(cluster.to_string())
    }
}

fn process(
    program: &str,
    name: &str,
    address: SocketAddr,
    syncs: bool,
    more: &str,
) -> std::io::Result<Process> {
    let directory = TempDir::with_prefix("wilco-nats-")?;
    let text = configuration(directory.path(), name, address, syncs, more);
    fs::write(directory.path().join("nats.conf"), text)?;
    let program = program.to_owned();
    let command = move |directory: &Path| {
        let mut command = Command::new(&program);
        command.arg("-c").arg(directory.join("nats.conf"));
        command
    };
    Ok(Process::new(address, directory, command))
}

impl Node {
    /// Returns when it answers for its health; whether it is healthy, only all of them know.
    async fn start(&self) -> Result<(), String> {
        let monitor = self.monitor;
        let up = move || async move { get(monitor, HEALTH).await.is_ok() };
        self.server.start(up).await
    }
}

/// A page of the monitoring port, with its head.
async fn get(address: SocketAddr, path: &str) -> std::io::Result<String> {
    let getting = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.0\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut page = String::new();
        stream.read_to_string(&mut page).await?;
        Ok(page)
    };
    tokio::time::timeout(Duration::from_secs(5), getting)
        .await
        .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))?
}

#[async_trait]
impl Server for Nodes {
    fn facts(&self) -> Facts {
        let strongest = match (self.syncs, self.replicas) {
            (true, replicas @ 3..) => Level::Replicated(replicas as u8),
            (true, _) => Level::Power,
            (false, _) => Level::Process,
        };
        let version = format!("nats-server {}, {NODES} nodes", self.version);
        Facts::shared(version, self.url(), TAKEOVER, strongest)
    }

    async fn connect(&self) -> wilco::Result<Arc<dyn Broker>> {
        wilco::connect(&self.url()).await
    }

    async fn remains(&self, queue: &QueueName) -> Result<Vec<String>, Unavailable> {
        let answered = self.ask("$JS.API.INFO").await;
        let (address, _) = answered.map_err(Unavailable::because)?;
        remains(address, queue).await
    }

    async fn restart(&self) -> Result<(), Unavailable> {
        Err(Unavailable::because("nodes are started again one by one"))
    }

    fn faults(&self) -> Result<&dyn Faults, Unavailable> {
        Err(Unavailable::because(
            "this broker is several processes: its nodes are broken one by one",
        ))
    }

    fn cluster(&self) -> Result<&dyn Cluster, Unavailable> {
        Ok(self)
    }
}

#[async_trait]
impl Cluster for Nodes {
    fn nodes(&self) -> usize {
        NODES
    }

    async fn leader(&self, queue: &QueueName) -> Result<usize, Unavailable> {
        self.leader_of(queue).await.map_err(Unavailable::because)
    }

    fn failover(&self) -> Duration {
        FAILOVER
    }

    async fn kill(&self, node: usize) -> Result<(), Unavailable> {
        self.nodes[node].server.kill().await
    }

    async fn start(&self, node: usize) -> Result<(), Unavailable> {
        let started = self.nodes[node].start().await;
        started.map_err(Unavailable::because)?;
        self.until_whole().await.map_err(Unavailable::because)
    }

    fn pause(&self, node: usize) -> Result<(), Unavailable> {
        self.nodes[node].server.pause()
    }

    async fn resume(&self, node: usize) -> Result<(), Unavailable> {
        self.nodes[node].server.resume()?;
        self.until_whole().await.map_err(Unavailable::because)
    }
}
