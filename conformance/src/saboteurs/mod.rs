//! Saboteurs (law X1): brokers that break one thing each, and the check that has to catch them.
//!
//! A saboteur wraps a real handle and overrides what it breaks; everything else goes through. Its
//! state is one for the whole broker, shared by all handles, as a broken server's would be.

mod consume;
mod leases;
mod publish;
mod queues;
mod requests;
mod table;
pub(crate) mod wrap;

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use wilco::{Broker, QueueName};

pub use table::{all, find};
pub use wrap::{Inner, Sabotage};

use crate::{
    check::CheckError,
    harness::{Facts, Faults, Harness, Server, Unavailable, Use},
};

/// One saboteur and the check that has to catch it.
#[derive(Clone, Copy)]
pub struct Saboteur {
    /// What it does, as a name.
    pub name: &'static str,
    /// The check that has to fail.
    pub caught_by: &'static str,
    /// A new one, with no state yet.
    pub make: fn() -> Arc<dyn Sabotage>,
}

impl fmt::Debug for Saboteur {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (caught by {})", self.name, self.caught_by)
    }
}

/// A harness whose brokers are all sabotaged.
#[derive(Debug)]
pub struct Sabotaged {
    harness: Box<dyn Harness>,
    saboteur: Saboteur,
}

impl Sabotaged {
    /// Sabotages every broker of this harness.
    #[must_use]
    pub fn new(harness: Box<dyn Harness>, saboteur: Saboteur) -> Self {
        Self { harness, saboteur }
    }
}

#[async_trait]
impl Harness for Sabotaged {
    fn name(&self) -> &str {
        self.saboteur.name
    }

    async fn sweep(&self) -> Result<(), CheckError> {
        self.harness.sweep().await
    }

    async fn start(&self, usage: Use) -> Result<Box<dyn Server>, String> {
        let server = self.harness.start(usage).await?;
        Ok(Box::new(SabotagedServer {
            server,
            sabotage: (self.saboteur.make)(),
        }))
    }
}

#[derive(Debug)]
struct SabotagedServer {
    server: Box<dyn Server>,
    sabotage: Arc<dyn Sabotage>,
}

#[async_trait]
impl Server for SabotagedServer {
    fn facts(&self) -> Facts {
        self.server.facts()
    }

    async fn connect(&self) -> wilco::Result<Arc<dyn Broker>> {
        let inner = self.server.connect().await?;
        Ok(wrap::wrap(inner, Arc::clone(&self.sabotage)))
    }

    async fn remains(&self, queue: &QueueName) -> Result<Vec<String>, Unavailable> {
        self.server.remains(queue).await
    }

    async fn restart(&self) -> Result<(), Unavailable> {
        self.server.restart().await?;
        let inner = self.server.connect().await;
        let inner = inner.map_err(|error| Unavailable::because(error.to_string()))?;
        self.sabotage.restarted(&inner).await;
        Ok(())
    }

    fn faults(&self) -> Result<&dyn Faults, Unavailable> {
        self.server.faults()
    }
}
