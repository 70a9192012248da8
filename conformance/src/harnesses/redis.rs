//! Redis or Valkey: a private server for each check, with every write synced before its answer; and, for
//! the law on clusters, three with their sentinels (`sentinels`); for credentials, one that lets in nobody
//! without (`theft`).

mod litter;
mod sentinels;
mod theft;

use std::{
    env, fs,
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
};
use wilco::{Broker, QueueName, durability::Level};

use crate::{
    harness::{Attempt, Facts, Faults, Harness, Litter, Server, Theft, Unavailable, Use},
    process::{Process, free_port},
};

pub use sentinels::Sentinels;

/// The file of the server's users, and those that it begins with. Nobody is let in as `default`, which has
/// all rights all the same: the server reads its append-only file as that user, and drops what it may not.
const USERS: &str = "users.acl";
const ADMIN: (&str, &str) = ("admin", "the-administrators-own");
const ADMIN_ALONE: &str =
    "user default off ~* &* +@all\nuser admin on >the-administrators-own ~* &* +@all\n";

/// A lease of 3 s, and a second until the next one looks.
const TAKEOVER: Duration = Duration::from_secs(4);

/// Another server program than Debian's, such as `valkey-server`.
const PROGRAM: &str = "WILCO_REDIS_SERVER";

/// `redis:` with a server of its own each time.
#[derive(Debug)]
pub struct Redis;

#[async_trait]
impl Harness for Redis {
    fn name(&self) -> &'static str {
        "redis"
    }

    async fn start(&self, usage: Use) -> Result<Box<dyn Server>, String> {
        if usage == Use::Cluster {
            return Ok(Box::new(self.sentinels(1).await?));
        }
        let (program, version) = program()?;
        let directory = TempDir::with_prefix("wilco-redis-").map_err(|error| error.to_string())?;
        let port = free_port().map_err(|error| error.to_string())?;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let closed = usage == Use::Credentials;
        if closed {
            let users = fs::write(directory.path().join(USERS), ADMIN_ALONE);
            users.map_err(|error| error.to_string())?;
        }
        let process = Process::new(address, directory, move |directory| {
            let mut command = command(&program, directory, port);
            if closed {
                command.arg("--aclfile").arg(directory.join(USERS));
            }
            command
        });
        let server = RedisServer {
            process,
            version,
            closed,
        };
        server.start_process().await?;
        Ok(Box::new(server))
    }
}

impl Redis {
    /// Three servers and their sentinels; handles wait for so many replicas before anything is confirmed.
    ///
    /// # Errors
    /// What kept them from starting.
    pub async fn sentinels(&self, replicas: usize) -> Result<Sentinels, String> {
        let (program, version) = program()?;
        Sentinels::start(program, version, replicas).await
    }
}

/// The server program and its version.
fn program() -> Result<(String, String), String> {
    let program = env::var(PROGRAM).unwrap_or_else(|_| "redis-server".into());
    let version = version(&program)?;
    Ok((program, version))
}

fn version(program: &str) -> Result<String, String> {
    let missing = |error: &dyn std::fmt::Display| {
        format!(
            "{program}: {error}; install Debian's package redis-server, or name a server program of \
             Redis or Valkey in {PROGRAM}"
        )
    };
    let asked = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| missing(&error))?;
    let text = String::from_utf8_lossy(&asked.stdout);
    let text = text.split(" sha=").next().unwrap_or_default().trim();
    if text.is_empty() {
        return Err(missing(&"it does not say its version"));
    }
    Ok(text.to_owned())
}

fn command(program: &str, directory: &Path, port: u16) -> Command {
    let mut command = Command::new(program);
    command
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
        .arg("--dir")
        .arg(directory)
        .args([
            "--save",
            "",
            "--appendonly",
            "yes",
            "--appendfsync",
            "always",
        ]);
    command
}

#[derive(Debug)]
struct RedisServer {
    process: Process,
    version: String,
    /// Whether it lets in nobody without a password.
    closed: bool,
}

impl RedisServer {
    fn url(&self) -> String {
        self.url_via(self.process.address())
    }

    fn url_at(&self, address: SocketAddr, login: &str) -> String {
        format!("redis://{login}{address}/0")
    }

    async fn start_process(&self) -> Result<(), String> {
        start_process(&self.process).await
    }
}

/// Returns when it answers.
async fn start_process(process: &Process) -> Result<(), String> {
    let address = process.address();
    process
        .start(move || async move {
            match ask(address, &["PING"]).await {
                Ok(answer) => answer == ["PONG"],
                Err(error) => error.to_string().contains("NOAUTH"),
            }
        })
        .await
}

/// One question over a connection of its own.
async fn ask(address: SocketAddr, command: &[&str]) -> std::io::Result<Vec<String>> {
    Raw::connect(address).await?.ask(command).await
}

/// Every key that has the name in it or in what it holds, and every channel that is listened to.
async fn look(address: SocketAddr, queue: &QueueName) -> std::io::Result<Vec<String>> {
    let mut raw = Raw::connect(address).await?;
    let named = |text: &String| text.contains(queue.as_str());
    let mut found = Vec::new();
    for key in raw.ask(&["KEYS", "*"]).await? {
        let kind = raw.ask(&["TYPE", &key]).await?.concat();
        let look: &[&str] = match kind.as_str() {
            "string" => &["GET", &key],
            "hash" => &["HGETALL", &key],
            "set" => &["SMEMBERS", &key],
            "zset" => &["ZRANGE", &key, "0", "-1"],
            "stream" => &["XRANGE", &key, "-", "+"],
            "list" => &["LRANGE", &key, "0", "-1"],
            // Gone since, as a lane's lease is.
            "none" => continue,
            other => return Err(std::io::Error::other(format!("a key of type {other}"))),
        };
        if named(&key) || raw.ask(look).await?.iter().any(named) {
            found.push(format!("the {kind} {key}"));
        }
    }
    for listing in ["CHANNELS", "SHARDCHANNELS"] {
        let channels = raw.ask(&["PUBSUB", listing]).await?;
        let ours = channels.into_iter().filter(named);
        found.extend(ours.map(|channel| format!("a listener on {channel}")));
    }
    found.sort();
    Ok(found)
}

async fn remains(address: SocketAddr, queue: &QueueName) -> Result<Vec<String>, Unavailable> {
    look(address, queue)
        .await
        .map_err(|error| Unavailable::because(format!("the server cannot be read: {error}")))
}

#[async_trait]
impl Server for RedisServer {
    fn facts(&self) -> Facts {
        Facts::shared(self.version.clone(), self.url(), TAKEOVER, Level::Power)
    }

    async fn connect(&self) -> wilco::Result<Arc<dyn Broker>> {
        wilco::connect(&self.url()).await
    }

    async fn remains(&self, queue: &QueueName) -> Result<Vec<String>, Unavailable> {
        remains(self.process.address(), queue).await
    }

    async fn restart(&self) -> Result<(), Unavailable> {
        self.process.stop().await?;
        self.start().await
    }

    fn refused_url(&self) -> Result<String, Unavailable> {
        let open = self.url_at(self.process.address(), "");
        Ok(open.replacen("://", "://nobody:wrong@", 1))
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
        let appended = async {
            match place {
                Litter::Queue(queue) => {
                    let mut raw = Raw::connect(address).await?;
                    litter::append(&mut raw, &format!("wilco:{{{queue}}}:stream")).await
                }
                Litter::Reports(theft) => {
                    let mut raw = theft::login(address, theft).await?;
                    let tray = format!("wilco:{{{}}}:tray", theft.own.queue());
                    litter::append(&mut raw, &tray).await
                }
            }
        };
        appended
            .await
            .map_err(|error| Unavailable::because(error.to_string()))
    }

    fn faults(&self) -> Result<&dyn Faults, Unavailable> {
        Ok(self)
    }
}

#[async_trait]
impl Faults for RedisServer {
    async fn kill(&self) -> Result<(), Unavailable> {
        self.process.kill().await
    }

    async fn start(&self) -> Result<(), Unavailable> {
        let started = self.start_process().await;
        started.map_err(Unavailable::because)
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
        let (user, password) = ADMIN;
        let login = match self.closed {
            true => format!("{user}:{password}@"),
            false => String::new(),
        };
        self.url_at(proxy, &login)
    }

    async fn alarm(&self, on: bool) -> Result<(), Unavailable> {
        let most = if on { "1" } else { "0" };
        let set = ["CONFIG", "SET", "maxmemory", most];
        match ask(self.process.address(), &set).await {
            Ok(answer) if answer == ["OK"] => Ok(()),
            other => Err(Unavailable::because(format!(
                "maxmemory is not set: {other:?}"
            ))),
        }
    }
}

/// The server's protocol, as little of it as looking needs: no part of the backend under test.
struct Raw(BufReader<TcpStream>);

impl Raw {
    async fn connect(address: SocketAddr) -> std::io::Result<Self> {
        Ok(Self(BufReader::new(TcpStream::connect(address).await?)))
    }

    /// A connection of this user's.
    async fn login(address: SocketAddr, user: &str, password: &str) -> std::io::Result<Self> {
        let mut raw = Self::connect(address).await?;
        raw.ask(&["AUTH", user, password]).await?;
        Ok(raw)
    }

    /// Every text and number of the answer, in its order.
    async fn ask(&mut self, command: &[&str]) -> std::io::Result<Vec<String>> {
        let parts: Vec<_> = command.iter().map(|part| part.as_bytes()).collect();
        self.ask_bytes(&parts).await
    }

    async fn ask_bytes(&mut self, command: &[&[u8]]) -> std::io::Result<Vec<String>> {
        let mut sent = format!("*{}\r\n", command.len()).into_bytes();
        for part in command {
            sent.extend(format!("${}\r\n", part.len()).into_bytes());
            sent.extend([part, &b"\r\n"[..]].concat());
        }
        self.0.get_mut().write_all(&sent).await?;
        let mut texts = Vec::new();
        let mut left = 1;
        while left > 0 {
            left -= 1;
            let mut line = String::new();
            self.0.read_line(&mut line).await?;
            let line = line.trim_end();
            let (sort, rest) = line.split_at_checked(1).unwrap_or_default();
            let number = || rest.parse::<i64>().map_err(std::io::Error::other);
            match sort {
                "+" | ":" => texts.push(rest.to_owned()),
                "*" => left += number()?.max(0),
                "$" => {
                    if let Ok(length) = usize::try_from(number()?) {
                        let mut bytes = vec![0; length + 2];
                        self.0.read_exact(&mut bytes).await?;
                        bytes.truncate(length);
                        texts.push(String::from_utf8_lossy(&bytes).into_owned());
                    }
                }
                _ => return Err(std::io::Error::other(format!("the server says {line:?}"))),
            }
        }
        Ok(texts)
    }
}
