//! The embedded broker: in a file that processes share, and in the memory of this process.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use rusqlite::{Connection, OpenFlags, types::ValueRef};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use wilco::{Broker, QueueName, durability::Level};

use super::handles::Handles;
use crate::harness::{Facts, Faults, Harness, Server, Unavailable, Use};

/// The bound within which the embedded broker says that a vanished consumer is noticed.
const TAKEOVER: Duration = Duration::from_secs(3);

/// `sqlite:` in a new directory each time.
#[derive(Debug)]
pub struct Sqlite;

#[async_trait]
impl Harness for Sqlite {
    fn name(&self) -> &str {
        "sqlite"
    }

    async fn start(&self, _usage: Use) -> Result<Box<dyn Server>, String> {
        let directory = TempDir::with_prefix("wilco-").map_err(|error| error.to_string())?;
        let file = directory.path().join("broker.db");
        Ok(Box::new(SqliteFile {
            file,
            _directory: directory,
            handles: Handles::default(),
        }))
    }
}

#[derive(Debug)]
struct SqliteFile {
    file: PathBuf,
    _directory: TempDir,
    handles: Handles,
}

impl SqliteFile {
    fn url(&self) -> String {
        format!("sqlite://{}", self.file.display())
    }
}

#[async_trait]
impl Server for SqliteFile {
    fn facts(&self) -> Facts {
        let version = format!("SQLite {}", rusqlite::version());
        Facts::shared(version, self.url(), TAKEOVER, Level::Power)
    }

    async fn connect(&self) -> wilco::Result<Arc<dyn Broker>> {
        let broker = wilco::connect(&self.url()).await?;
        self.handles.given(&broker);
        Ok(broker)
    }

    async fn remains(&self, queue: &QueueName) -> Result<Vec<String>, Unavailable> {
        let mut found = rows(&self.file, queue)
            .map_err(|error| Unavailable::because(format!("the file cannot be read: {error}")))?;
        found.extend(files(&self.file, queue));
        Ok(found)
    }

    async fn restart(&self) -> Result<(), Unavailable> {
        // The broker is the processes that have the file open: with the last handle it is stopped.
        let closed = self.handles.close().await;
        closed.map_err(|error| Unavailable::because(format!("it cannot be stopped: {error}")))
    }

    fn faults(&self) -> Result<&dyn Faults, Unavailable> {
        Err(no_process())
    }
}

/// Every row of every table that names the queue, belongs to it, or belongs to no queue at all.
fn rows(file: &Path, queue: &QueueName) -> rusqlite::Result<Vec<String>> {
    let database = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    database.busy_timeout(Duration::from_secs(5))?;
    let tables: Vec<String> = database
        .prepare("SELECT name FROM sqlite_master WHERE type = 'table'")?
        .query_map([], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    let mut found = Vec::new();
    for table in &tables {
        let mut statement = database.prepare(&format!("SELECT * FROM \"{table}\""))?;
        let columns = statement.column_count();
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let named = (0..columns).any(|column| match row.get_ref(column) {
                Ok(ValueRef::Text(bytes) | ValueRef::Blob(bytes)) => bytes
                    .windows(queue.as_str().len())
                    .any(|part| part == queue.as_str().as_bytes()),
                _ => false,
            });
            if named {
                found.push(format!("a row in {table}"));
            }
        }
    }
    // Fails, and so is noticed, when the tables are no longer these.
    let owned = [
        ("messages", "queue NOT IN (SELECT id FROM queues)"),
        ("dead_letters", "queue NOT IN (SELECT id FROM queues)"),
        ("deliveries", "seq NOT IN (SELECT seq FROM messages)"),
    ];
    for (table, orphaned) in owned {
        let sql = format!("SELECT count(*) FROM {table} WHERE {orphaned}");
        let orphans: i64 = database.query_row(&sql, [], |row| row.get(0))?;
        if orphans > 0 {
            found.push(format!("{orphans} rows in {table} that belong to nothing"));
        }
    }
    Ok(found)
}

/// Every lock and socket of the queue's: their names begin with the hash of its name.
fn files(file: &Path, queue: &QueueName) -> Vec<String> {
    let mut directory = file.as_os_str().to_owned();
    directory.push(".lanes");
    let hash = Sha256::digest(queue.as_str().as_bytes());
    let hash: String = hash
        .iter()
        .take(16)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let entries = fs::read_dir(PathBuf::from(directory))
        .into_iter()
        .flatten()
        .flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let ours = names.filter(|name| name.contains(&hash) || name.contains(queue.as_str()));
    ours.map(|name| format!("the file {name}")).collect()
}

fn no_process() -> Unavailable {
    Unavailable::because(
        "the embedded broker is no process and has no network: nothing to kill or cut",
    )
}

/// `memory:` under a new name each time.
#[derive(Debug)]
pub struct Memory;

#[async_trait]
impl Harness for Memory {
    fn name(&self) -> &str {
        "memory"
    }

    async fn start(&self, _usage: Use) -> Result<Box<dyn Server>, String> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let url = format!(
            "memory:conformance-{}",
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        // One handle for as long as the check runs: with the last one the broker is gone.
        let kept = wilco::connect(&url)
            .await
            .map_err(|error| error.to_string())?;
        Ok(Box::new(InMemory { url, _kept: kept }))
    }
}

#[derive(Debug)]
struct InMemory {
    url: String,
    _kept: Arc<dyn Broker>,
}

#[async_trait]
impl Server for InMemory {
    fn facts(&self) -> Facts {
        let version = format!("SQLite {} in memory", rusqlite::version());
        Facts::private(
            version,
            "memory: lives inside one process",
            TAKEOVER,
            Level::Memory,
        )
    }

    async fn connect(&self) -> wilco::Result<Arc<dyn Broker>> {
        wilco::connect(&self.url).await
    }

    async fn remains(&self, _queue: &QueueName) -> Result<Vec<String>, Unavailable> {
        Err(Unavailable::because(
            "memory: has no view of it but through the backend itself",
        ))
    }

    async fn restart(&self) -> Result<(), Unavailable> {
        Err(Unavailable::because(
            "memory: ends with its process, nothing outlives that",
        ))
    }

    fn faults(&self) -> Result<&dyn Faults, Unavailable> {
        Err(no_process())
    }
}
