//! `nats-server` as a private process; for credentials, one whose users are signed (`operator`); for the law
//! on clusters, three (`cluster`).

mod cluster;
mod litter;
mod operator;
mod theft;

use std::{
    env, fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::Command,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};
use wilco::{Broker, QueueName, durability::Level};

use crate::{
    harness::{Attempt, Facts, Faults, Harness, Litter, Server, Theft, Unavailable, Use},
    process::{Process, free_port},
};

pub use cluster::Nodes;

/// The bound that the backend states: a lease, and the time until the next look.
const TAKEOVER: Duration = Duration::from_secs(5);

/// The first version that syncs before it confirms, when it is told to.
const SYNCS_SINCE: (u32, u32, u32) = (2, 10, 23);

/// Who says nothing of himself is let in; who says something is asked for a password (case W4).
const ANYBODY: &str = "authorization { users: [{ user: anybody, password: anything }], timeout: 30 }\n\
                       no_auth_user: anybody\n";

/// How many bytes it stores at the most.
const MOST_STORED: usize = 128 << 20;

/// JetStream on `nats-server`, a process for each check. `WILCO_NATS_SERVER` names another program.
#[derive(Debug)]
pub struct Nats;

fn program() -> String {
    env::var("WILCO_NATS_SERVER").unwrap_or_else(|_| "nats-server".into())
}

/// The version that the program says it has: `nats-server: v2.9.10`.
fn version(program: &str) -> Result<(String, (u32, u32, u32)), String> {
    let output = Command::new(program).arg("--version").output().map_err(|error| {
        format!(
            "{program} cannot be started: {error}; install the package nats-server, or name the program in \
             WILCO_NATS_SERVER"
        )
    })?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let text = text
        .trim()
        .rsplit('v')
        .next()
        .unwrap_or_default()
        .to_owned();
    let mut parts = text.split(['.', '-']).map(|part| part.parse().ok());
    let mut part = || parts.next().flatten();
    match (part(), part(), part()) {
        (Some(major), Some(minor), Some(patch)) => Ok((text, (major, minor, patch))),
        _ => Err(format!(
            "{program} --version says {text:?}, which is no version"
        )),
    }
}

#[async_trait]
impl Harness for Nats {
    fn name(&self) -> &'static str {
        "nats"
    }

    async fn start(&self, usage: Use) -> Result<Box<dyn Server>, String> {
        if usage == Use::Cluster {
            return Ok(Box::new(self.cluster(3).await?));
        }
        let program = program();
        let (version, syncs) = known(&program)?;
        let directory = TempDir::with_prefix("wilco-nats-").map_err(|error| error.to_string())?;
        let port = free_port().map_err(|error| error.to_string())?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let (signed, options) = match usage {
            Use::Credentials => operator::set_up(directory.path())?,
            _ => (ANYBODY.to_owned(), String::new()),
        };
        let text = configuration(directory.path(), "wilco", address, syncs, &signed);
        let written = fs::write(directory.path().join("nats.conf"), text);
        written.map_err(|error| error.to_string())?;
        let process = Process::new(address, directory, move |directory| {
            let mut command = Command::new(&program);
            command.arg("-c").arg(directory.join("nats.conf"));
            command
        });
        let server = NatsServer {
            process,
            version,
            syncs,
            options,
        };
        server.up().await?;
        Ok(Box::new(server))
    }
}

impl Nats {
    /// Three nodes; handles ask for so many replicas of what they make.
    ///
    /// # Errors
    /// What kept them from starting.
    pub async fn cluster(&self, replicas: usize) -> Result<Nodes, String> {
        let program = program();
        let (version, syncs) = known(&program)?;
        Nodes::start(&program, version, syncs, replicas).await
    }
}

/// The program's version, and whether it syncs before it confirms.
fn known(program: &str) -> Result<(String, bool), String> {
    let (version, numbers) = version(program)?;
    Ok((version, numbers >= SYNCS_SINCE))
}

fn configuration(
    directory: &Path,
    name: &str,
    address: SocketAddr,
    syncs: bool,
    more: &str,
) -> String {
    let (sync, tags) = if syncs {
        (
            ", sync_interval: always",
            "server_tags: [\"sync:always\"]\n",
        )
    } else {
        ("", "")
    };
    format!(
        "server_name: {name}\nlisten: \"{address}\"\njetstream {{ store_dir: \"{}\", max_file: {MOST_STORED}{sync} }}\n{tags}\
         max_payload: 8MB\nping_interval: \"1s\"\nping_max: 2\n{more}",
        directory.join("data").display()
    )
}

#[derive(Debug)]
struct NatsServer {
    process: Process,
    version: String,
    syncs: bool,
    /// What a control plane's URL ends with, where users are signed.
    options: String,
}

impl NatsServer {
    fn url(&self) -> String {
        self.url_via(self.process.address())
    }

    /// Starts it and waits until JetStream answers.
    async fn up(&self) -> Result<(), String> {
        let address = self.process.address();
        if !self.options.is_empty() {
            return self.process.start(move || operator::is_up(address)).await;
        }
        // A closure that returns a future, not an async one, whose future is not known to be Send.
        self.process.start(move || is_up(address)).await
    }

    async fn look(&self, subject: &str, body: &Value) -> Result<Value, Unavailable> {
        look(self.process.address(), subject, body).await
    }
}

#[async_trait]
impl Server for NatsServer {
    fn facts(&self) -> Facts {
        let strongest = if self.syncs {
            Level::Power
        } else {
            Level::Process
        };
        let version = format!("nats-server {}", self.version);
        Facts::shared(version, self.url(), TAKEOVER, strongest)
    }

    async fn connect(&self) -> wilco::Result<Arc<dyn Broker>> {
        wilco::connect(&self.url()).await
    }

    async fn remains(&self, queue: &QueueName) -> Result<Vec<String>, Unavailable> {
        remains(self.process.address(), queue).await
    }

    async fn restart(&self) -> Result<(), Unavailable> {
        self.process.stop().await?;
        self.up().await.map_err(Unavailable::because)
    }

    fn refused_url(&self) -> Result<String, Unavailable> {
        Ok(self.url().replacen("://", "://nobody:wrong@", 1))
    }

    fn admin_url(&self) -> Result<String, Unavailable> {
        Ok(self.url())
    }

    async fn forbidden(&self, theft: &Theft<'_>) -> Result<Vec<Attempt>, Unavailable> {
        theft::forbidden(self.process.address(), theft)
            .await
            .map_err(|error| Unavailable::because(format!("the server cannot be asked: {error}")))
    }

    async fn litter(&self, place: Litter<'_>) -> Result<usize, Unavailable> {
        let address = self.process.address();
        let published = match place {
            Litter::Queue(queue) => litter::publish(address, None, &format!("{queue}.in")).await,
            Litter::Reports(theft) => {
                let file = theft.credential.files().first();
                let creds = file.map(|file| file.content().expose_secret());
                let reports = theft.reports.as_str().trim_start_matches("wilco.");
                let own = theft.own.queue();
                let own = own.as_str().trim_start_matches("wilco.");
                litter::publish(address, creds, &format!("wilco.tray.{reports}.{own}")).await
            }
        };
        published.map_err(Unavailable::because)
    }

    fn faults(&self) -> Result<&dyn Faults, Unavailable> {
        Ok(self)
    }
}

#[async_trait]
impl Faults for NatsServer {
    async fn kill(&self) -> Result<(), Unavailable> {
        self.process.kill().await
    }

    async fn start(&self) -> Result<(), Unavailable> {
        self.up().await.map_err(Unavailable::because)
    }

    fn pause(&self) -> Result<(), Unavailable> {
        self.process.pause()
    }

    fn resume(&self) -> Result<(), Unavailable> {
        self.process.resume()
    }

    fn address(&self) -> SocketAddr {
        self.process.address()
    }

    fn url_via(&self, proxy: SocketAddr) -> String {
        format!("nats://{proxy}{}", self.options)
    }

    /// Fills its storage up to the limit that it was started with.
    async fn alarm(&self, on: bool) -> Result<(), Unavailable> {
        const BALLAST: &str = "ballast";
        if !on {
            let verb = format!("$JS.API.STREAM.DELETE.{BALLAST}");
            return self.look(&verb, &json!({})).await.map(drop);
        }
        let verb = format!("$JS.API.STREAM.CREATE.{BALLAST}");
        let stream = json!({ "name": BALLAST, "subjects": [BALLAST], "storage": "file" });
        self.look(&verb, &stream).await?;
        let heavy = json!("x".repeat(4 << 20));
        // One more than there is room for.
        for _ in 0..=MOST_STORED / (4 << 20) {
            let stored = self.look(BALLAST, &heavy).await?;
            if stored["error"]["code"] == 503 {
                return Ok(());
            }
        }
        Err(Unavailable::because(
            "the server stores more than it was told to",
        ))
    }
}

async fn look(address: SocketAddr, subject: &str, body: &Value) -> Result<Value, Unavailable> {
    ask(address, subject, body)
        .await
        .map_err(|error| Unavailable::because(format!("JetStream does not answer: {error}")))
}

async fn remains(address: SocketAddr, queue: &QueueName) -> Result<Vec<String>, Unavailable> {
    let mut found = Vec::new();
    let listed = look(address, "$JS.API.STREAM.LIST", &json!({})).await?;
    for stream in listed["streams"].as_array().into_iter().flatten() {
        let name = stream["config"]["name"].as_str().unwrap_or_default();
        // One that another check is making: what it stores is not asked for (see `unfinished` in the
        // backend).
        let created = stream["created"].as_str().unwrap_or_default();
        if created.starts_with("0001-") {
            continue;
        }
        let with_subjects = json!({ "subjects_filter": ">" });
        let info = look(
            address,
            &format!("$JS.API.STREAM.INFO.{name}"),
            &with_subjects,
        )
        .await?;
        let own = name.contains(queue.as_str()) || name.replace('~', ".").contains(queue.as_str());
        if own {
            found.push(format!("the stream {name}"));
        }
        let body = &json!({});
        let consumers = look(address, &format!("$JS.API.CONSUMER.NAMES.{name}"), body).await?;
        for consumer in consumers["consumers"].as_array().into_iter().flatten() {
            if own || consumer.to_string().contains(queue.as_str()) {
                found.push(format!("the consumer {consumer} of {name}"));
            }
        }
        // A subject has the queue's name, or what follows its first word.
        let short = queue.as_str().trim_start_matches("wilco.");
        for (subject, messages) in info["state"]["subjects"].as_object().into_iter().flatten() {
            let subject_has = format!("{subject}.").contains(&format!("{short}."));
            if subject_has {
                found.push(format!("{messages} messages on {subject}"));
            }
        }
    }
    found.sort();
    Ok(found)
}

async fn is_up(address: SocketAddr) -> bool {
    ask(address, "$JS.API.INFO", &json!({})).await.is_ok()
}

/// One request over a connection of its own, in the protocol's own words: no client library between.
async fn ask(address: SocketAddr, subject: &str, body: &Value) -> std::io::Result<Value> {
    let asking = async {
        let stream = TcpStream::connect(address).await?;
        let mut stream = BufReader::new(stream);
        let body = body.to_string();
        let hello = "CONNECT {\"verbose\":false,\"headers\":true,\"no_responders\":true}\r\nSUB inbox.w 1\r\n";
        let request = format!("{hello}PUB {subject} inbox.w {}\r\n{body}\r\n", body.len());
        stream.write_all(request.as_bytes()).await?;
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.first().copied() {
                Some("PING") => stream.write_all(b"PONG\r\n").await?,
                Some("MSG") => {
                    let length = words.last().and_then(|length| length.parse().ok());
                    let mut answer = vec![0; length.unwrap_or(0)];
                    stream.read_exact(&mut answer).await?;
                    return Ok(serde_json::from_slice(&answer)?);
                }
                // No responders: JetStream is not up yet.
                Some("HMSG" | "-ERR") => return Err(std::io::Error::other(line)),
                _ => {}
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), asking)
        .await
        .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))?
}
