//! Somebody's own broker, by its URL: everything that can be run without control over its process, with
//! nothing of theirs touched and nothing of the suite's left behind.
//!
//! The suite's queues have names of their own (their guests' ids begin with `conformance-`; law Q8
//! needs a few odd ones beside them). What was on the broker before is hidden from the checks, so that
//! they find it as empty as a private one, and every handle refuses to touch it: a check that meets such
//! a queue is reported as not run. After each check, whatever it made is deleted.

use std::{
    collections::BTreeSet,
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::OnceCell;
use wilco::{
    Broker, BrokerUrl, Deadline, Error, ErrorKind, GuestAddress, Message, QueueName, Result,
    broker::{
        ConsumeOptions, Consumer, DeadLetter, DeadLetterKey, Declared, DeleteMode, Discarded,
        QueueSpec, QueueStatus, Receipt, Responder,
    },
};

use crate::{
    check::CheckError,
    harness::{Facts, Faults, Harness, Server, Unavailable, Use},
    saboteurs::{Inner, Sabotage, wrap::wrap},
    support::{PREFIX, long},
};

/// A broker that was there before the suite and stays after it.
#[derive(Debug)]
pub struct Url {
    /// As it may be shown.
    name: String,
    url: Secret,
    scheme: String,
    /// A handle for as long as the suite runs: it looks at what is there, and sweeps.
    control: OnceCell<Arc<dyn Broker>>,
    names: Arc<Names>,
}

impl Url {
    /// The broker at this URL. Nothing is connected yet.
    ///
    /// # Errors
    /// It is no broker's URL.
    pub fn new(url: &str) -> std::result::Result<Self, String> {
        let parsed: BrokerUrl = url.parse().map_err(|error: Error| error.to_string())?;
        Ok(Self {
            name: parsed.to_string(),
            scheme: parsed.scheme().into(),
            url: Secret(url.into()),
            control: OnceCell::new(),
            names: Arc::default(),
        })
    }

    async fn control(&self) -> std::result::Result<&Arc<dyn Broker>, String> {
        let connect = || wilco::connect(&self.url.0);
        let control = self.control.get_or_try_init(connect).await;
        control.map_err(|error| error.to_string())
    }
}

#[async_trait]
impl Harness for Url {
    fn name(&self) -> &str {
        &self.name
    }

    async fn start(&self, _usage: Use) -> std::result::Result<Box<dyn Server>, String> {
        let control = self.control().await?;
        let text = |error: Error| error.to_string();
        let report = control.durability(long()).await.map_err(text)?;
        let there = control.list(long()).await.map_err(text)?;
        let there: BTreeSet<_> = there.into_iter().map(|status| status.name).collect();
        if let Some(name) = there.iter().find(|name| is_ours(name)) {
            return Err(format!(
                "the queue {name} is there, which has a name of the suite's: another run uses this \
                 broker, or one that was killed left it. Nothing was touched. If no run does: wilco \
                 queue delete"
            ));
        }
        self.names.begin(there);
        Ok(Box::new(Theirs {
            version: format!("{} {}", report.backend, report.version),
            url: self.url.clone(),
            scheme: self.scheme.clone(),
            names: Arc::clone(&self.names),
        }))
    }

    async fn sweep(&self) -> std::result::Result<(), CheckError> {
        let (used, met) = self.names.end();
        let left = |error: &dyn std::fmt::Display| {
            CheckError::failed("the suite leaves nothing behind", error)
        };
        if !used.is_empty() {
            let control = self.control().await.map_err(|error| left(&error))?;
            for name in &used {
                match control.delete(name, DeleteMode::Discard, long()).await {
                    Err(error) if *error.kind() != ErrorKind::NoQueue => {
                        return Err(left(&format!("{name}: {error}")));
                    }
                    _ => {}
                }
            }
            let listed = control.list(long()).await.map_err(|error| left(&error))?;
            if let Some(status) = listed.iter().find(|status| used.contains(&status.name)) {
                return Err(left(&format!("{status:?}")));
            }
        }
        match met {
            Some(name) => Err(Unavailable::because(format!(
                "the queue {name} is somebody else's, and this check needs one of that name"
            ))
            .into()),
            None => Ok(()),
        }
    }
}

fn is_ours(name: &QueueName) -> bool {
    let address = name.address();
    address.is_some_and(|address| address.guest.as_str().starts_with(PREFIX))
}

/// A URL that may hold a password (law S4).
#[derive(Clone)]
struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

#[derive(Debug)]
struct Theirs {
    version: String,
    url: Secret,
    scheme: String,
    names: Arc<Names>,
}

const NO_CONTROL: &str =
    "this broker was given by its URL: the suite has no control over its process";

#[async_trait]
impl Server for Theirs {
    fn facts(&self) -> Facts {
        // What backends state for a consumer that vanished, with room for a broker's own settings.
        let takeover = Duration::from_secs(match self.scheme.as_str() {
            "sqlite" | "memory" => 3,
            _ => 60,
        });
        Facts {
            version: self.version.clone(),
            url: (self.scheme != "memory").then(|| self.url.0.clone()),
            private_because: "memory: lives inside one process",
            takeover,
            strongest: None,
        }
    }

    async fn connect(&self) -> Result<Arc<dyn Broker>> {
        let inner = wilco::connect(&self.url.0).await?;
        Ok(wrap(inner, Arc::clone(&self.names) as Arc<dyn Sabotage>))
    }

    async fn remains(&self, _queue: &QueueName) -> std::result::Result<Vec<String>, Unavailable> {
        Err(Unavailable::because(
            "this broker was given by its URL: the suite has no administration's view of it",
        ))
    }

    async fn restart(&self) -> std::result::Result<(), Unavailable> {
        Err(Unavailable::because(NO_CONTROL))
    }

    fn faults(&self) -> std::result::Result<&dyn Faults, Unavailable> {
        Err(Unavailable::because(NO_CONTROL))
    }
}

/// Which queues are somebody else's, and which the check that runs has used.
#[derive(Debug, Default)]
struct Names(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    theirs: BTreeSet<QueueName>,
    used: BTreeSet<QueueName>,
    /// One of theirs that the check wanted to touch.
    met: Option<QueueName>,
}

impl Names {
    fn begin(&self, theirs: BTreeSet<QueueName>) {
        *self.lock() = Known {
            theirs,
            ..Known::default()
        };
    }

    fn end(&self) -> (BTreeSet<QueueName>, Option<QueueName>) {
        let mut known = self.lock();
        (std::mem::take(&mut known.used), known.met.take())
    }

    /// Takes a name into use, unless it is somebody else's.
    fn claim(&self, name: &QueueName) -> Result<()> {
        let mut known = self.lock();
        if known.theirs.contains(name) {
            known.met = Some(name.clone());
            let text = "this queue was there before the suite, which does not touch it";
            return Err(Error::new(ErrorKind::Conflict, text).with_queue(name));
        }
        if !known.used.contains(name) {
            known.used.insert(name.clone());
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The saboteurs' wrapper, for once to keep a broker from harm.
#[async_trait]
impl Sabotage for Names {
    async fn declare(&self, inner: &Inner, spec: &QueueSpec, by: Deadline) -> Result<Declared> {
        self.claim(&spec.name)?;
        inner.declare(spec, by).await
    }

    async fn status(&self, inner: &Inner, queue: &QueueName, by: Deadline) -> Result<QueueStatus> {
        self.claim(queue)?;
        inner.status(queue, by).await
    }

    async fn list(&self, inner: &Inner, by: Deadline) -> Result<Vec<QueueStatus>> {
        let mut listed = inner.list(by).await?;
        let known = self.lock();
        listed.retain(|status| !known.theirs.contains(&status.name));
        Ok(listed)
    }

    async fn delete(
        &self,
        inner: &Inner,
        queue: &QueueName,
        mode: DeleteMode,
        by: Deadline,
    ) -> Result<Discarded> {
        self.claim(queue)?;
        inner.delete(queue, mode, by).await
    }

    async fn publish(
        &self,
        inner: &Inner,
        queue: &QueueName,
        message: Message,
        by: Deadline,
    ) -> Result<Receipt> {
        self.claim(queue)?;
        inner.publish(queue, message, by).await
    }

    async fn consume(
        &self,
        inner: &Inner,
        queue: &QueueName,
        options: ConsumeOptions,
        by: Deadline,
    ) -> Result<Box<dyn Consumer>> {
        self.claim(queue)?;
        inner.consume(queue, options, by).await
    }

    async fn dead_letters(
        &self,
        inner: &Inner,
        queue: &QueueName,
        after: Option<&DeadLetterKey>,
        limit: NonZeroU32,
        by: Deadline,
    ) -> Result<Vec<DeadLetter>> {
        self.claim(queue)?;
        inner.dead_letters(queue, after, limit, by).await
    }

    async fn redrive(
        &self,
        inner: &Inner,
        queue: &QueueName,
        key: &DeadLetterKey,
        by: Deadline,
    ) -> Result<bool> {
        self.claim(queue)?;
        inner.redrive(queue, key, by).await
    }

    async fn request(
        &self,
        inner: &Inner,
        lane: &GuestAddress,
        body: Bytes,
        by: Deadline,
    ) -> Result<Bytes> {
        self.claim(&lane.queue())?;
        inner.request(lane, body, by).await
    }

    async fn respond(
        &self,
        inner: &Inner,
        lane: &GuestAddress,
        by: Deadline,
    ) -> Result<Box<dyn Responder>> {
        self.claim(&lane.queue())?;
        inner.respond(lane, by).await
    }
}
