//! Where things are: the broker, the records beside it, and which machine of a guest is meant.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::signal::unix::{SignalKind, signal};
use wilco::{
    Broker, Deadline, GuestAddress, GuestId, Incarnation, MemoryRecords, Opening, Records,
    SigningKey, SqliteRecords, Taskmanager,
};

use super::{
    args::Global,
    problem::{Exit, Outcome, Problem},
};

/// How long a command waits for the broker where it is not asked to wait longer.
pub(super) fn patience() -> Deadline {
    Deadline::after(Duration::from_secs(10))
}

/// Ends at the first SIGINT or SIGTERM.
pub(super) async fn interrupted() {
    let (interrupt, terminate) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    );
    let (Ok(mut interrupt), Ok(mut terminate)) = (interrupt, terminate) else {
        // Without handlers the signals end the process as they always do.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

impl Global {
    /// The broker, connected.
    pub(super) async fn connect(&self) -> Outcome<Arc<dyn Broker>> {
        Ok(wilco::connect(&self.broker).await?)
    }

    /// The same, for what only makes sense between processes.
    pub(super) async fn connect_shared(&self) -> Outcome<Arc<dyn Broker>> {
        self.connect_shared_by(patience()).await
    }

    /// The same, waiting for a broker that is not there until the deadline.
    pub(super) async fn connect_shared_by(&self, deadline: Deadline) -> Outcome<Arc<dyn Broker>> {
        if self.broker.starts_with("memory:") {
            return Err(Problem::input(
                "a memory: broker lives inside one process, and this command needs others to reach \
                 it; give --broker sqlite:PATH",
            ));
        }
        Ok(wilco::connect_by(&self.broker, deadline).await?)
    }

    /// Where the records are.
    pub(super) fn records_path(&self) -> PathBuf {
        if let Some(path) = &self.records {
            return path.clone();
        }
        let beside = self
            .broker
            .strip_prefix("sqlite:")
            .map(|rest| rest.split(['?', '#']).next().unwrap_or(rest))
            // An escaped path is not worth a decoder: the default is then a plain file.
            .filter(|path| !path.is_empty() && !path.contains('%'))
            .map(|path| PathBuf::from(path.strip_prefix("//").unwrap_or(path)));
        let Some(broker) = beside else {
            return PathBuf::from("wilco-records.db");
        };
        let stem = broker.file_stem().unwrap_or(broker.as_os_str());
        let mut name = stem.to_os_string();
        name.push("-records.db");
        broker.with_file_name(name)
    }

    /// The records.
    pub(super) async fn open_records(&self) -> Outcome<SqliteRecords> {
        let path = self.records_path();
        SqliteRecords::open(&path).await.map_err(|error| {
            Problem::from(error).during(format_args!("cannot open the records {}", path.display()))
        })
    }

    /// The records, unless there are none yet: looking must not make a file.
    pub(super) async fn existing_records(&self) -> Outcome<Option<SqliteRecords>> {
        if self.records_path().exists() {
            self.open_records().await.map(Some)
        } else {
            Ok(None)
        }
    }

    /// The records, which have to be there.
    pub(super) async fn needed_records(&self) -> Outcome<SqliteRecords> {
        self.existing_records().await?.ok_or_else(|| {
            Problem::new(
                Exit::Missing,
                format!(
                    "there are no records at {}; say where they are with --records, or provision first",
                    self.records_path().display()
                ),
            )
        })
    }

    /// A taskmanager that only looks and asks, whoever owns the records.
    pub(super) async fn observe(&self) -> Outcome<Taskmanager> {
        let broker = self.connect_shared().await?;
        let opening = match self.existing_records().await? {
            Some(records) => self.taskmanager(broker, records)?,
            None => self.taskmanager(broker, MemoryRecords::default())?,
        };
        Ok(opening.observing().await?)
    }

    /// A taskmanager about to begin: one that signs, if it was given a key.
    pub(super) fn taskmanager(
        &self,
        broker: Arc<dyn Broker>,
        records: impl Records,
    ) -> Outcome<Opening> {
        let opening = Taskmanager::with(broker, records);
        Ok(match &self.sign_key {
            Some(path) => opening.sign(SigningKey::open(path)?),
            None => opening,
        })
    }

    /// The machine that is meant: the one asked for, the one in the records, or the first.
    pub(super) async fn address(
        &self,
        guest: &GuestId,
        incarnation: Option<Incarnation>,
    ) -> Outcome<GuestAddress> {
        if let Some(incarnation) = incarnation {
            return Ok(GuestAddress::new(guest.clone(), incarnation));
        }
        let record = self.observe().await?.record(guest).await?;
        Ok(record.map_or_else(|| guest.clone().into(), |record| record.address))
    }
}
