//! Saboteurs (law X1): brokers that break one thing each, and the check that has to catch them.
//!
//! A saboteur wraps a real handle and overrides what it breaks; everything else goes through. Its
//! state is one for the whole broker, shared by all handles, as a broken server's would be.

mod consume;
mod faults;
mod leases;
mod publish;
mod queues;
mod requests;
mod secrets;
mod table;
pub(crate) mod wrap;

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use async_trait::async_trait;
use wilco::{Broker, Deadline, Error, ErrorKind, QueueName};

pub use table::{all, find};
pub use wrap::{Inner, Sabotage};

use crate::{
    check::CheckError,
    harness::{Attempt, Cluster, Facts, Faults, Harness, Litter, Server, Theft, Unavailable, Use},
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
        self.after_restart().await
    }

    fn faults(&self) -> Result<&dyn Faults, Unavailable> {
        self.server.faults().map(|_| self as &dyn Faults)
    }

    fn cluster(&self) -> Result<&dyn Cluster, Unavailable> {
        self.server.cluster()
    }

    fn admin_url(&self) -> Result<String, Unavailable> {
        self.server.admin_url()
    }

    async fn forbidden(&self, theft: &Theft<'_>) -> Result<Vec<Attempt>, Unavailable> {
        self.server.forbidden(theft).await
    }

    async fn litter(&self, place: Litter<'_>) -> Result<usize, Unavailable> {
        self.server.litter(place).await
    }
}

impl SabotagedServer {
    async fn after_restart(&self) -> Result<(), Unavailable> {
        let inner = self.server.connect().await;
        let inner = inner.map_err(|error| Unavailable::because(error.to_string()))?;
        self.sabotage.restarted(&inner).await;
        Ok(())
    }
}

/// Faults are not sabotaged, but who connects around the harness gets a sabotaged handle all the same.
#[async_trait]
impl Faults for SabotagedServer {
    async fn kill(&self) -> Result<(), Unavailable> {
        self.server.faults()?.kill().await
    }

    async fn start(&self) -> Result<(), Unavailable> {
        self.server.faults()?.start().await?;
        self.after_restart().await
    }

    fn pause(&self) -> Result<(), Unavailable> {
        self.server.faults()?.pause()
    }

    fn resume(&self) -> Result<(), Unavailable> {
        self.server.faults()?.resume()
    }

    fn address(&self) -> SocketAddr {
        let nowhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        self.server.faults().map_or(nowhere, Faults::address)
    }

    fn url_via(&self, proxy: SocketAddr) -> String {
        let faults = self.server.faults();
        faults
            .map(|faults| faults.url_via(proxy))
            .unwrap_or_default()
    }

    async fn connect_via(
        &self,
        proxy: SocketAddr,
        deadline: Deadline,
    ) -> wilco::Result<Arc<dyn Broker>> {
        let unreachable = |reason: Unavailable| Error::new(ErrorKind::Internal, reason.0);
        let faults = self.server.faults().map_err(unreachable)?;
        let deadline = self.sabotage.connecting(proxy, deadline);
        let inner = faults.connect_via(proxy, deadline).await?;
        Ok(wrap::wrap(inner, Arc::clone(&self.sabotage)))
    }

    async fn alarm(&self, on: bool) -> Result<(), Unavailable> {
        self.server.faults()?.alarm(on).await
    }
}
