//! RabbitMQ as a private process: one that the checks of a program share, each in a virtual host of its
//! own, and one for each check that breaks it.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::OnceCell;
use wilco::{Broker, QueueName, durability::Level};

use crate::{
    harness::{Facts, Faults, Harness, Server, Unavailable, Use},
    process::{Process, free_port},
};

/// Three heartbeats of the default of two seconds, and what a loaded machine takes.
const TAKEOVER: Duration = Duration::from_secs(7);

/// RabbitMQ, as Debian's package `rabbitmq-server` has it.
#[derive(Debug)]
pub struct RabbitMq;

#[async_trait]
impl Harness for RabbitMq {
    fn name(&self) -> &'static str {
        "rabbitmq"
    }

    async fn start(&self, usage: Use) -> Result<Box<dyn Server>, String> {
        static SHARED: OnceCell<Arc<Node>> = OnceCell::const_new();
        let node = match usage {
            Use::Shared => Arc::clone(SHARED.get_or_try_init(Node::start).await?),
            Use::Alone => Node::start().await?,
        };
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let vhost = format!("check-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        node.ask("PUT", &format!("/api/vhosts/{vhost}")).await?;
        // Who kills the server has waited for a queue to be on its disk, as the default has it. Elsewhere
        // new queues are not waited for: nothing breaks there.
        let options = match usage {
            Use::Shared => "?fresh=0s",
            Use::Alone => "",
        };
        Ok(Box::new(Vhost {
            node,
            vhost,
            options,
        }))
    }
}

/// One server process.
#[derive(Debug)]
struct Node {
    process: Process,
    management: u16,
    version: String,
}

impl Node {
    async fn start() -> Result<Arc<Self>, String> {
        let program = program()?;
        let port = || free_port().map_err(|error| error.to_string());
        let (amqp, management, distribution, epmd) = (port()?, port()?, port()?, port()?);
        let directory =
            TempDir::with_prefix("wilco-rabbitmq-").map_err(|error| error.to_string())?;
        let write = |name: &str, text: String| {
            std::fs::write(directory.path().join(name), text).map_err(|error| error.to_string())
        };
        write(
            "rabbitmq.conf",
            format!(
                "listeners.tcp.1 = 127.0.0.1:{amqp}\n\
                 management.tcp.ip = 127.0.0.1\n\
                 management.tcp.port = {management}\n\
                 management_agent.disable_metrics_collector = true\n\
                 disk_free_limit.absolute = 20MB\n\
                 log.console.level = error\n"
            ),
        )?;
        write("plugins", "[rabbitmq_management].\n".into())?;
        write("start", script())?;
        let parent = std::process::id();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, amqp));
        let process = Process::new(address, directory, move |directory: &Path| {
            let mut command = Command::new("/bin/sh");
            let path = |name: &str| directory.join(name);
            command
                .arg(path("start"))
                .env("PROGRAM", &program)
                .env("PARENT", parent.to_string())
                .env("DIRECTORY", directory)
                .env("HOME", directory)
                .env("ERL_EPMD_PORT", epmd.to_string())
                .env("ERL_EPMD_ADDRESS", "127.0.0.1")
                .env("RABBITMQ_NODENAME", format!("wilco{amqp}@localhost"))
                .env("RABBITMQ_DIST_PORT", distribution.to_string())
                .env("RABBITMQ_MNESIA_BASE", path("data"))
                .env("RABBITMQ_LOG_BASE", path("log"))
                .env("RABBITMQ_LOGS", "-")
                .env("RABBITMQ_CONFIG_FILE", path("rabbitmq.conf"))
                .env("RABBITMQ_CONF_ENV_FILE", path("none"))
                .env("RABBITMQ_ENABLED_PLUGINS_FILE", path("plugins"))
                .env(
                    "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                    "+sbwt none +sbwtdcpu none +sbwtdio none",
                );
            command
        });
        let mut node = Self {
            process,
            management,
            version: String::new(),
        };
        node.up().await?;
        let overview = node.ask("GET", "/api/overview").await?;
        let version = overview["rabbitmq_version"].as_str().unwrap_or("unknown");
        node.version = format!("RabbitMQ {version}");
        Ok(Arc::new(node))
    }

    async fn up(&self) -> Result<(), String> {
        let (port, address) = (self.management, self.process.address());
        // It owns what it asks with: a borrow could not be sent between threads here.
        let ready = move || async move {
            let up = move || {
                ask(port, "GET", "/api/overview").is_ok() && TcpStream::connect(address).is_ok()
            };
            tokio::task::spawn_blocking(up).await.unwrap_or(false)
        };
        self.process.start(ready).await
    }

    /// One request to the server's own administration.
    async fn ask(&self, method: &str, path: &str) -> Result<Value, String> {
        let (port, method, path) = (self.management, method.to_owned(), path.to_owned());
        let asked = tokio::task::spawn_blocking(move || ask(port, &method, &path)).await;
        asked.map_err(|error| error.to_string())?
    }
}

fn program() -> Result<String, String> {
    let found = std::fs::read_dir("/usr/lib/rabbitmq/lib")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("sbin/rabbitmq-server"))
        .find(|path| path.exists());
    found.map(|path| path.display().to_string()).ok_or_else(|| {
        "there is no RabbitMQ in /usr/lib/rabbitmq: install Debian's package rabbitmq-server".into()
    })
}

/// The server and the name service that it needs are one process group. A watcher ends both when this
/// program is gone, however it went; it lives in a session of its own, and ends with the server.
fn script() -> String {
    "ulimit -n 65536 2>/dev/null || ulimit -n 4096\n\
     setsid sh -c 'while kill -0 $0 2>/dev/null && kill -0 $1 2>/dev/null; do sleep 1; done; \
     if kill -0 $1 2>/dev/null; then kill -9 -$1; rm -rf \"$2\"; fi' \
     $PARENT $$ \"$DIRECTORY\" </dev/null >/dev/null 2>&1 &\n\
     epmd -port $ERL_EPMD_PORT -address 127.0.0.1 </dev/null >/dev/null 2>&1 &\n\
     exec \"$PROGRAM\"\n"
        .into()
}

/// One request over HTTP/1.0, as the user that a new server has.
fn ask(port: u16, method: &str, path: &str) -> Result<Value, String> {
    let text = |error: std::io::Error| format!("{method} {path}: {error}");
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).map_err(text)?;
    let patience = Some(Duration::from_secs(20));
    stream.set_read_timeout(patience).map_err(text)?;
    let request = format!(
        "{method} {path} HTTP/1.0\r\nHost: localhost\r\nAuthorization: Basic Z3Vlc3Q6Z3Vlc3Q=\r\n\
         Content-Type: application/json\r\nContent-Length: 0\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).map_err(text)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(text)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).unwrap_or("none");
    if !status.starts_with('2') {
        return Err(format!("{method} {path}: status {status}: {body}"));
    }
    if body.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_str(body).map_err(|error| format!("{method} {path}: {error}"))
}

/// A server's part that belongs to one check.
#[derive(Debug)]
struct Vhost {
    node: Arc<Node>,
    vhost: String,
    options: &'static str,
}

impl Drop for Vhost {
    fn drop(&mut self) {
        // A server that was broken takes its virtual hosts with it.
        let _ = ask(
            self.node.management,
            "DELETE",
            &format!("/api/vhosts/{}", self.vhost),
        );
    }
}

impl Vhost {
    fn url_at(&self, address: SocketAddr) -> String {
        format!(
            "amqp://guest:guest@{address}/{}{}",
            self.vhost, self.options
        )
    }

    /// Everything of this sort that names the queue.
    async fn named(&self, sort: &str, queue: &QueueName) -> Result<Vec<String>, Unavailable> {
        let path = format!("/api/{sort}/{}", self.vhost);
        let listed = self.node.ask("GET", &path).await;
        let listed = listed.map_err(Unavailable::because)?;
        let entries = listed.as_array().cloned().unwrap_or_default();
        let ours = entries
            .iter()
            .filter(|entry| names(entry, queue.as_str()))
            .map(|entry| {
                let name = |member: &str| entry[member].as_str().unwrap_or_default().to_owned();
                format!(
                    "{sort}: {}{} {}",
                    name("name"),
                    name("destination"),
                    name("routing_key")
                )
            });
        Ok(ours.collect())
    }

    /// The messages of the index that name the queue, as the server's administration reads them.
    async fn indexed(&self, queue: &QueueName) -> Result<Vec<String>, Unavailable> {
        let (port, vhost, queue) = (self.node.management, self.vhost.clone(), queue.to_string());
        let found = tokio::task::spawn_blocking(move || indexed(port, &vhost, &queue)).await;
        found
            .map_err(|error| Unavailable::because(error.to_string()))?
            .map_err(Unavailable::because)
    }
}

/// Whether a string anywhere in it names the queue.
fn names(value: &Value, queue: &str) -> bool {
    match value {
        Value::String(text) => text.contains(queue),
        Value::Array(values) => values.iter().any(|value| names(value, queue)),
        Value::Object(members) => members.values().any(|value| names(value, queue)),
        _ => false,
    }
}

fn indexed(port: u16, vhost: &str, queue: &str) -> Result<Vec<String>, String> {
    let text = |error: std::io::Error| error.to_string();
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).map_err(text)?;
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .map_err(text)?;
    let body = r#"{"count":10000,"ackmode":"ack_requeue_true","encoding":"auto"}"#;
    let request = format!(
        "POST /api/queues/{vhost}/wilco.index/get HTTP/1.0\r\nHost: localhost\r\n\
         Authorization: Basic Z3Vlc3Q6Z3Vlc3Q=\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).map_err(text)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(text)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    if head.split(' ').nth(1) == Some("404") {
        return Ok(Vec::new());
    }
    let messages: Value = serde_json::from_str(body).map_err(|error| error.to_string())?;
    let messages = messages.as_array().cloned().unwrap_or_default();
    Ok(messages
        .iter()
        .filter(|message| names(message, queue))
        .map(|_| "an entry in the index".to_owned())
        .collect())
}

#[async_trait]
impl Server for Vhost {
    fn facts(&self) -> Facts {
        Facts::shared(
            self.node.version.clone(),
            self.url_at(self.node.process.address()),
            TAKEOVER,
            Level::Power,
        )
    }

    async fn connect(&self) -> wilco::Result<Arc<dyn Broker>> {
        wilco::connect(&self.url_at(self.node.process.address())).await
    }

    async fn remains(&self, queue: &QueueName) -> Result<Vec<String>, Unavailable> {
        let mut found = Vec::new();
        for sort in ["queues", "exchanges", "bindings"] {
            found.extend(self.named(sort, queue).await?);
        }
        found.extend(self.indexed(queue).await?);
        Ok(found)
    }

    async fn restart(&self) -> Result<(), Unavailable> {
        self.node.process.stop().await?;
        self.node.up().await.map_err(Unavailable::because)
    }

    fn refused_url(&self) -> Result<String, Unavailable> {
        let url = self.url_at(self.node.process.address());
        Ok(url.replacen("guest:guest", "guest:wrong", 1))
    }

    fn faults(&self) -> Result<&dyn Faults, Unavailable> {
        Ok(self)
    }
}

#[async_trait]
impl Faults for Vhost {
    async fn kill(&self) -> Result<(), Unavailable> {
        self.node.process.kill().await
    }

    async fn start(&self) -> Result<(), Unavailable> {
        self.node.up().await.map_err(Unavailable::because)
    }

    fn pause(&self) -> Result<(), Unavailable> {
        self.node.process.pause()
    }

    fn resume(&self) -> Result<(), Unavailable> {
        self.node.process.resume()
    }

    fn address(&self) -> SocketAddr {
        self.node.process.address()
    }

    fn url_via(&self, proxy: SocketAddr) -> String {
        self.url_at(proxy)
    }
}
