//! One RabbitMQ server as a private process.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    process::Command,
    sync::Arc,
};

use serde_json::Value;
use tempfile::TempDir;

use super::administration::ask;
use crate::process::{Process, free_port};

/// One server process, which its administration can be asked about.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) process: Process,
    pub(super) management: u16,
    pub(super) version: String,
    /// Where its name service is, by which it is told what its other administration cannot.
    epmd: u16,
}

impl Node {
    pub(super) async fn start() -> Result<Arc<Self>, String> {
        let port = || free_port().map_err(|error| error.to_string());
        let (amqp, management, epmd) = (port()?, port()?, port()?);
        let command = command_by(
            amqp,
            epmd,
            &format!(
                "listeners.tcp.1 = 127.0.0.1:{amqp}\n\
                 management.tcp.ip = 127.0.0.1\n\
                 management.tcp.port = {management}\n\
                 management_agent.disable_metrics_collector = true\n"
            ),
            "rabbitmq_management",
        )?;
        let directory =
            TempDir::with_prefix("wilco-rabbitmq-").map_err(|error| error.to_string())?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, amqp));
        let mut node = Self {
            process: Process::new(address, directory, command),
            management,
            version: String::new(),
            epmd,
        };
        node.up().await?;
        let overview = node.ask("GET", "/api/overview").await?;
        let version = overview["rabbitmq_version"].as_str().unwrap_or("unknown");
        node.version = format!("RabbitMQ {version}");
        Ok(Arc::new(node))
    }

    pub(super) async fn up(&self) -> Result<(), String> {
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

    /// Says that memory has run out, as the server finds it: above so small a part of it publishers are
    /// stopped. Or lets it have what it has by default.
    pub(super) async fn alarm(&self, on: bool) -> Result<(), String> {
        let program = program()?.replace("rabbitmq-server", "rabbitmqctl");
        let directory = self.process.directory();
        let mark = if on { "0.00001" } else { "0.4" };
        let told = tokio::process::Command::new(program)
            .args(["set_vm_memory_high_watermark", mark])
            .env("HOME", directory)
            .env("ERL_EPMD_PORT", self.epmd.to_string())
            .env("RABBITMQ_NODENAME", name(self.process.address().port()))
            .env("RABBITMQ_CONF_ENV_FILE", directory.join("none"))
            .output()
            .await
            .map_err(|error| error.to_string())?;
        if !told.status.success() {
            return Err(String::from_utf8_lossy(&told.stderr).into_owned());
        }
        // It looks at its memory once a second. What asks after alarms fails while there is one.
        while self
            .ask("GET", "/api/health/checks/local-alarms")
            .await
            .is_ok()
            == on
        {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// One request to the server's own administration.
    pub(super) async fn ask(&self, method: &str, path: &str) -> Result<Value, String> {
        let (port, method, path) = (self.management, method.to_owned(), path.to_owned());
        let asked = tokio::task::spawn_blocking(move || ask(port, &method, &path)).await;
        asked.map_err(|error| error.to_string())?
    }
}

/// What starts a server that keeps all that it has in the directory given to it, with this configuration
/// and these plug-ins.
///
/// # Errors
/// There is no such server here.
pub fn command(
    amqp: u16,
    configuration: &str,
    plugins: &str,
) -> Result<impl Fn(&Path) -> Command + Send + Sync + use<>, String> {
    let epmd = free_port().map_err(|error| error.to_string())?;
    command_by(amqp, epmd, configuration, plugins)
}

fn command_by(
    amqp: u16,
    epmd: u16,
    configuration: &str,
    plugins: &str,
) -> Result<impl Fn(&Path) -> Command + Send + Sync + use<>, String> {
    let program = program()?;
    let distribution = free_port().map_err(|error| error.to_string())?;
    let files = [
        (
            "rabbitmq.conf",
            format!("{configuration}disk_free_limit.absolute = 20MB\nlog.console.level = error\n"),
        ),
        ("plugins", format!("[{plugins}].\n")),
        ("start", script()),
    ];
    let parent = std::process::id();
    Ok(move |directory: &Path| {
        let path = |name: &str| directory.join(name);
        for (name, text) in &files {
            // What cannot be written here the server says it cannot read.
            let _ = std::fs::write(path(name), text);
        }
        let mut command = Command::new("/bin/sh");
        command
            .arg(path("start"))
            .env("PROGRAM", &program)
            .env("PARENT", parent.to_string())
            .env("DIRECTORY", directory)
            .env("HOME", directory)
            .env("ERL_EPMD_PORT", epmd.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_NODENAME", name(amqp))
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
    })
}

fn name(amqp: u16) -> String {
    format!("wilco{amqp}@localhost")
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
