//! Where things are: the broker, the records beside it, and which machine of a guest is meant.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::signal::unix::{SignalKind, signal};
use wilco::{
    Broker, Deadline, GuestAddress, GuestId, Incarnation, 
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
    let (interrupt, terminate) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
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
        if self.broker.starts_with("memory:") {
            return Err(Problem::input(
                "a memory: broker lives inside one process, and this command needs others to reach \
                 it; give --broker sqlite:PATH",
            ));
        }
        self.connect().await
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

    /// The machine that is meant: the one asked for, the one in the records, or the first.
    pub(super) async fn address(
        &self,
        guest: &GuestId,
        incarnation: Option<Incarnation>,
    ) -> Outcome<GuestAddress> {
        if let Some(incarnation) = incarnation {
            return Ok(GuestAddress::new(guest.clone(), incarnation));
        }
        Ok(guest.clone().into())
    }
}
