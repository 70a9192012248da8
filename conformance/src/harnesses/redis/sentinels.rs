//! Three nodes, each a server and a sentinel: one master and two replicas, every write synced.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tempfile::TempDir;
use wilco::{Broker, QueueName, durability::Level};

use super::{TAKEOVER, ask, remains, start_process};
use crate::{
    harness::{Cluster, Facts, Faults, Server, Unavailable},
    process::{Process, free_ports},
};

const NODES: usize = 3;

/// The master's name among the sentinels.
const NAME: &str = "wilco";

/// A sentinel that did not run for two seconds does nothing for thirty: on a loaded machine that would go
/// on and on. And news go round faster than by default, every second for what they say in ten.
const PACE: [&str; 8] = [
    "tilt-trigger",
    "15000",
    "tilt-period",
    "3000",
    "info-period",
    "1000",
    "publish-period",
    "500",
];

/// How long a master says nothing until a sentinel takes it for dead: long enough for a loaded machine.
const DOWN_AFTER: Duration = Duration::from_secs(2);

/// That, and the time for the sentinels to agree, to promote, and to try again when two of them stood for
/// the election at once.
const FAILOVER: Duration = Duration::from_secs(20);

/// A replica that was away for long is given a new copy; a master that comes back is taken for one for
/// some ten seconds.
const WHOLE_WITHIN: Duration = Duration::from_secs(120);

/// A master, its replicas and their sentinels.
#[derive(Debug)]
pub struct Sentinels {
    nodes: Vec<Node>,
    version: String,
    /// What the URL asks for.
    replicas: usize,
}

#[derive(Debug)]
struct Node {
    server: Process,
    sentinel: Process,
}

impl Sentinels {
    /// Starts three nodes of this server program, and returns when they are whole.
    pub(super) async fn start(
        program: String,
        version: String,
        replicas: usize,
    ) -> Result<Self, String> {
        let ports = free_ports::<{ 2 * NODES }>().map_err(|error| error.to_string())?;
        let first = ports[0];
        let nodes = ports
            .chunks(2)
            .map(|ports| Node::new(&program, ports[0], ports[1], first))
            .collect::<Result<_, _>>()?;
        let this = Self {
            nodes,
            version,
            replicas,
        };
        for node in &this.nodes {
            start_process(&node.server).await?;
        }
        // A sentinel looks for replicas when it first sees the master, and then not for ten seconds.
        let patience = Patience::new("the replicas have what the master has");
        while let Err(why) = this.has_replicas(first).await {
            patience.more(why).await?;
        }
        for node in &this.nodes {
            node.start_sentinel().await?;
        }
        this.until_whole().await?;
        Ok(this)
    }

    fn url(&self) -> String {
        let sentinels: Vec<_> = self
            .nodes
            .iter()
            .map(|node| node.sentinel.address().to_string())
            .collect();
        format!(
            "redis-sentinel://{}/{NAME}?replicas={}",
            sentinels.join(","),
            self.replicas
        )
    }

    /// The master, if all sentinels that answer name the same one.
    async fn master(&self) -> Result<usize, String> {
        let mut named = None;
        for node in &self.nodes {
            let call = ["SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME];
            let Ok(answer) = ask(node.sentinel.address(), &call).await else {
                continue;
            };
            let port = answer.get(1).and_then(|port| port.parse::<u16>().ok());
            if named.is_some() && named != port {
                return Err(format!("the sentinels name {named:?} and {port:?}"));
            }
            named = port;
        }
        self.nodes
            .iter()
            .position(|node| Some(node.server.address().port()) == named)
            .ok_or_else(|| format!("the sentinels name {named:?}"))
    }

    async fn has_replicas(&self, port: u16) -> Result<(), String> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let info = asked(address, &["INFO", "replication"]).await?.concat();
        let online = info.matches("state=online").count();
        if info.contains("role:master") && online == NODES - 1 {
            Ok(())
        } else {
            Err(info)
        }
    }

    /// Each server has what the master has, and each sentinel sees all the others.
    async fn is_whole(&self) -> Result<(), String> {
        let master = self.master().await?;
        self.has_replicas(self.nodes[master].server.address().port())
            .await?;
        for node in &self.nodes {
            let address = node.sentinel.address();
            let told = asked(address, &["SENTINEL", "CKQUORUM", NAME])
                .await?
                .concat();
            if !told.starts_with("OK 3 usable") {
                return Err(told);
            }
            let replicas = asked(address, &["SENTINEL", "REPLICAS", NAME]).await?;
            let seen = (
                fields(&replicas, "flags"),
                fields(&replicas, "master-link-status"),
            );
            if seen != (vec!["slave"; NODES - 1], vec!["ok"; NODES - 1]) {
                return Err(format!("a sentinel sees {seen:?}"));
            }
        }
        Ok(())
    }

    async fn until_whole(&self) -> Result<(), String> {
        let patience = Patience::new("the nodes are whole");
        while let Err(why) = self.is_whole().await {
            patience.more(why).await?;
        }
        Ok(())
    }
}

/// How long something is waited for.
struct Patience {
    what: &'static str,
    began: Instant,
}

impl Patience {
    fn new(what: &'static str) -> Self {
        Self {
            what,
            began: Instant::now(),
        }
    }

    /// Waits a little, unless that has been long enough.
    async fn more(&self, why: String) -> Result<(), String> {
        if self.began.elapsed() > WHOLE_WITHIN {
            return Err(format!("{}: not within {WHOLE_WITHIN:?}: {why}", self.what));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        Ok(())
    }
}

impl Node {
    /// Both write into their files what becomes of them, and start from there again.
    fn new(program: &str, port: u16, sentinel_port: u16, master: u16) -> Result<Self, String> {
        let replica = match port == master {
            true => String::new(),
            false => format!("replicaof 127.0.0.1 {master}\n"),
        };
        let server = format!(
            "port {port}\nbind 127.0.0.1\nsave \"\"\nappendonly yes\nappendfsync always\n\
             repl-diskless-sync-delay 0\n{replica}"
        );
        let down_after = DOWN_AFTER.as_millis();
        let sentinel = format!(
            "port {sentinel_port}\nbind 127.0.0.1\n\
             sentinel monitor {NAME} 127.0.0.1 {master} 2\n\
             sentinel down-after-milliseconds {NAME} {down_after}\n\
             sentinel failover-timeout {NAME} 5000\n\
             sentinel parallel-syncs {NAME} 2\n"
        );
        Ok(Self {
            server: process(program, port, &server, &[])?,
            sentinel: process(program, sentinel_port, &sentinel, &["--sentinel"])?,
        })
    }

    async fn start_sentinel(&self) -> Result<(), String> {
        start_process(&self.sentinel).await?;
        let call: Vec<_> = ["SENTINEL", "DEBUG"].into_iter().chain(PACE).collect();
        let set = asked(self.sentinel.address(), &call).await?;
        match set.concat().as_str() {
            "OK" => Ok(()),
            other => Err(format!("the sentinel's pace is not set: {other}")),
        }
    }
}

async fn asked(address: SocketAddr, command: &[&str]) -> Result<Vec<String>, String> {
    ask(address, command)
        .await
        .map_err(|error| error.to_string())
}

/// The values of all fields of this name.
fn fields<'a>(answer: &'a [String], name: &str) -> Vec<&'a str> {
    let pairs = answer.windows(2).filter(|pair| pair[0] == name);
    pairs.map(|pair| pair[1].as_str()).collect()
}

fn process(
    program: &str,
    port: u16,
    settings: &str,
    options: &'static [&str],
) -> Result<Process, String> {
    let text = |error: std::io::Error| error.to_string();
    let directory = TempDir::with_prefix("wilco-redis-").map_err(text)?;
    let file = directory.path().join("server.conf");
    let settings = format!("dir {}\n{settings}", directory.path().display());
    fs::write(&file, settings).map_err(text)?;
    let program = program.to_owned();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let command = move |directory: &Path| {
        let mut command = Command::new(&program);
        command.arg(directory.join("server.conf")).args(options);
        command
    };
    Ok(Process::new(address, directory, command))
}

#[async_trait]
impl Server for Sentinels {
    fn facts(&self) -> Facts {
        let strongest = Level::Replicated(NODES as u8);
        Facts::shared(self.version.clone(), self.url(), TAKEOVER, strongest)
    }

    async fn connect(&self) -> wilco::Result<Arc<dyn Broker>> {
        wilco::connect(&self.url()).await
    }

    async fn remains(&self, queue: &QueueName) -> Result<Vec<String>, Unavailable> {
        let master = self.master().await.map_err(Unavailable::because)?;
        remains(self.nodes[master].server.address(), queue).await
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
impl Cluster for Sentinels {
    fn nodes(&self) -> usize {
        NODES
    }

    async fn leader(&self, _queue: &QueueName) -> Result<usize, Unavailable> {
        self.master().await.map_err(Unavailable::because)
    }

    fn failover(&self) -> Duration {
        FAILOVER
    }

    async fn kill(&self, node: usize) -> Result<(), Unavailable> {
        let Node { server, sentinel } = &self.nodes[node];
        let (server, sentinel) = tokio::join!(server.kill(), sentinel.kill());
        server.and(sentinel)
    }

    async fn start(&self, node: usize) -> Result<(), Unavailable> {
        let node = &self.nodes[node];
        let server = start_process(&node.server).await;
        server.map_err(Unavailable::because)?;
        let sentinel = node.start_sentinel().await;
        sentinel.map_err(Unavailable::because)?;
        self.until_whole().await.map_err(Unavailable::because)
    }

    fn pause(&self, node: usize) -> Result<(), Unavailable> {
        let Node { server, sentinel } = &self.nodes[node];
        sentinel.pause()?;
        server.pause()
    }

    async fn resume(&self, node: usize) -> Result<(), Unavailable> {
        let Node { server, sentinel } = &self.nodes[node];
        server.resume()?;
        sentinel.resume()?;
        self.until_whole().await.map_err(Unavailable::because)
    }
}
