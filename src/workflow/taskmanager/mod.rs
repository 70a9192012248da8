//! The taskmanager: provisions guests, and holds each to exactly one recorded outcome.

pub(crate) mod answers;
mod credential;
mod driver;
mod handle;
mod health;
mod opening;
mod provision;
mod reports;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use serde::Serialize;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use self::{
    driver::{Driver, Signal},
    reports::Collector,
};
pub use self::{handle::GuestHandle, health::Health, opening::Opening, provision::Provision};
use crate::{
    backoff::Backoff,
    broker::{Broker, DeleteMode},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    names::{GuestAddress, GuestId, QueueName},
    sign::Signer,
    wire,
    workflow::{
        ask::Asker,
        is_set,
        machine::{self, Event},
        meter,
        record::{Record, State, now_ms},
        records::Records,
    },
};

/// How long one operation on the broker may take before it counts as failed and is tried again.
const OPERATION: Duration = Duration::from_secs(10);

/// What the hypervisor knows of a machine: a service's own lookup, asked while its guest is waited for.
#[async_trait]
pub trait HostProbe: Send + Sync + 'static {
    /// How the machine is now. It should answer within seconds; what it cannot tell is
    /// [`HostState::Booting`].
    async fn probe(&self, machine: &GuestAddress) -> HostState;
}

/// How a machine is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostState {
    /// It is being made or started, or nothing is known.
    Booting,
    /// It runs.
    Up,
    /// It failed, for this reason: its guest will not come, and is given up at once.
    Failed(String),
    /// It is no more: its guest is given up at once.
    Gone,
}

/// The control plane's end: one per set of [`Records`]. Clones are the same taskmanager.
///
/// It provisions guests in tasks of its own: dropping a future that waits for one stops the waiting,
/// not the provisioning. What was accepted is on disk, and is resumed by the next taskmanager on the
/// same records, whatever became of this one.
#[derive(Clone)]
pub struct Taskmanager {
    inner: Arc<Inner>,
    _handles: Arc<CloseOnDrop>,
}

struct Inner {
    broker: Arc<dyn Broker>,
    records: Arc<dyn Records>,
    reports: QueueName,
    signer: Option<Arc<Signer>>,
    /// What guests told that they refused.
    refused: AtomicU64,
    probe: Mutex<Option<Arc<dyn HostProbe>>>,
    drivers: Mutex<HashMap<GuestId, Driven>>,
    transitions: broadcast::Sender<Arc<Record>>,
    owner: bool,
    /// Whether reports are being collected.
    collecting: watch::Sender<bool>,
    /// Everything that runs for this taskmanager ends when this is true.
    closed: watch::Sender<bool>,
}

/// A provisioning that is under way.
#[derive(Clone)]
struct Driven {
    signals: mpsc::Sender<Signal>,
    progress: watch::Receiver<Progress>,
}

/// How far a driver is: its record as saved, and the error that ended it, if one did.
#[derive(Clone)]
struct Progress {
    record: Arc<Record>,
    stopped: Option<Arc<Error>>,
    /// It is being revoked, and the broker has been out of reach for that for a while.
    stuck: bool,
}

/// What became of a cancel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// No guest runs it: it was not delivered, and is revoked.
    Revoked,
    /// The guest had accepted it before: it goes on to its outcome (case W37).
    TooLate,
    /// It had ended before.
    HadEnded,
}

impl Taskmanager {
    /// Becomes the one taskmanager on these records, and goes on with everything that was not finished.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] while another one is running on these records, or, for longer than a broker
    /// can take to notice the end of one, under this name on this broker (case W16); those of the
    /// records. A broker that is out of reach is no error here:
    /// what needs it waits, within its deadlines.
    ///
    /// # Cancel safety
    /// Dropped early, nothing is owned; what was accepted stays recorded.
    pub async fn new(broker: Arc<dyn Broker>, records: impl Records) -> Result<Self> {
        Self::with(broker, records).await
    }

    /// The same, for a control plane of another name: guests are told it with
    /// [`Attach::control_plane`](crate::Attach::control_plane). Several on one broker need several names.
    ///
    /// # Errors
    /// As [`Taskmanager::new`].
    pub async fn named(name: &str, broker: Arc<dyn Broker>, records: impl Records) -> Result<Self> {
        Self::with(broker, records).named(name).await
    }

    /// A taskmanager that is told more before it begins: await it.
    ///
    /// ```no_run
    /// # #[cfg(feature = "sign")]
    /// # async fn example() -> wilco::Result<()> {
    /// # use wilco::{MemoryRecords, SigningKey, Taskmanager};
    /// # let (broker, records) = (wilco::connect("memory:").await?, MemoryRecords::default());
    /// let key = SigningKey::open("/etc/wilco/signing.key")?;
    /// let taskmanager = Taskmanager::with(broker, records).sign(key).await?;
    /// # Ok(()) }
    /// ```
    pub fn with(broker: Arc<dyn Broker>, records: impl Records) -> Opening {
        Opening::new(broker, Arc::new(records))
    }

    async fn own(opening: Opening) -> Result<Self> {
        opening.records.own().await?;
        let taskmanager = Self::make(opening)?;
        let inner = &taskmanager.inner;
        let collector = Collector::attach(inner.clone()).await?;
        let resumed = inner.records.list().await?;
        for record in resumed
            .into_iter()
            .filter(|record| !record.state.is_terminal())
        {
            inner.drive(record);
        }
        tokio::spawn(collector.run());
        tokio::spawn(reports::sweep_until_swept(inner.clone()));
        Ok(taskmanager)
    }

    /// A taskmanager that owns nothing and provisions nothing: it reads the records, pings, calls and
    /// casts, beside one that does.
    ///
    /// # Errors
    /// None yet; it may have some.
    pub async fn observe(broker: Arc<dyn Broker>, records: impl Records) -> Result<Self> {
        Self::with(broker, records).observing().await
    }

    fn make(opening: Opening) -> Result<Self> {
        let inner = Inner {
            broker: opening.broker,
            records: opening.records,
            reports: opening.reports?,
            signer: opening.signer,
            refused: AtomicU64::new(0),
            probe: Mutex::new(None),
            drivers: Mutex::new(HashMap::new()),
            transitions: broadcast::Sender::new(16 * 1024),
            owner: opening.owner,
            collecting: watch::Sender::new(false),
            closed: watch::Sender::new(false),
        };
        let inner = Arc::new(inner);
        Ok(Self {
            _handles: Arc::new(CloseOnDrop(inner.clone())),
            inner,
        })
    }

    /// Asks this probe about every machine whose guest is waited for, from now on.
    pub fn probe_hosts(&self, probe: impl HostProbe) {
        *lock(&self.inner.probe) = Some(Arc::new(probe));
    }

    /// Provisions a guest: awaited, it is recorded, carried out, and its one outcome returned.
    ///
    /// Idempotent: while it is under way the same call joins it, and once it has ended the same call
    /// returns the recorded outcome. So a program that was killed just does the same again.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if the guest was given another prepare (see [`Provision::again`]);
    /// [`ErrorKind::BrokerUnreachable`] if it was given up and the broker cannot be reached to revoke
    /// it: that goes on, and asking again later returns the outcome; those of the records.
    ///
    /// # Cancel safety
    /// Dropped early, what was recorded goes on: cancel with [`Taskmanager::cancel`].
    pub fn provision(
        &self,
        guest: impl TryInto<GuestId, Error: Into<Error>>,
        prepare: impl Serialize,
    ) -> Provision {
        let payload = wire::raw(&prepare);
        Provision::new(self.clone(), guest.try_into().map_err(Into::into), payload)
    }

    /// A guest, to ping, call and cast to.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidName`] from the handle's methods if the id is none.
    pub fn guest(&self, guest: impl TryInto<GuestId, Error: Into<Error>>) -> GuestHandle {
        GuestHandle::new(self.clone(), guest.try_into().map_err(Into::into))
    }

    /// A guest's record of its newest incarnation.
    ///
    /// # Errors
    /// Those of the records.
    pub async fn record(&self, guest: &GuestId) -> Result<Option<Record>> {
        self.inner.records.newest(guest).await
    }

    /// Every guest's record of its newest incarnation, by guest.
    ///
    /// # Errors
    /// Those of the records.
    pub async fn records(&self) -> Result<Vec<Record>> {
        self.inner.records.list().await
    }

    /// Every record as it is saved, from now on. A receiver that falls far behind misses some.
    #[must_use]
    pub fn watch(&self) -> broadcast::Receiver<Arc<Record>> {
        self.inner.transitions.subscribe()
    }

    /// How many messages guests have reported as refused since this taskmanager began: not understood, for
    /// another machine, or not signed by whom they trust (law S5). Each is logged as a warning too, and
    /// is among the dead letters of its guest.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.inner.refused.load(Ordering::Relaxed)
    }

    /// The broker.
    #[must_use]
    pub fn broker(&self) -> &Arc<dyn Broker> {
        &self.inner.broker
    }

    /// Gives a guest up, and waits until it is sure that no guest runs its prepare any more, or that
    /// it is too late for that.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a guest without a record; otherwise as [`Taskmanager::provision`].
    ///
    /// # Cancel safety
    /// Dropped early, the cancel may or may not happen; call again.
    pub async fn cancel(&self, guest: &GuestId) -> Result<Cancelled> {
        self.inner.own_or_refuse()?;
        let driven = match self.inner.driven(guest) {
            Some(driven) => driven,
            None => match self.record(guest).await? {
                Some(record) if record.state.is_terminal() => return Ok(Cancelled::HadEnded),
                // Its driver stopped; what is recorded is still to be decided.
                Some(record) => self.inner.drive(record),
                None => return Err(no_record(guest)),
            },
        };
        let (to, decided) = oneshot::channel();
        if driven.signals.send(Signal::Cancel(to)).await.is_ok()
            && let Ok(cancelled) = decided.await
        {
            return Ok(cancelled);
        }
        // Its driver ended first: with the outcome, or without one.
        self.inner.own_or_refuse()?;
        match self.record(guest).await? {
            Some(record) if record.state.is_terminal() => Ok(Cancelled::HadEnded),
            _ => Err(Error::new(
                ErrorKind::Conflict,
                format!(
                    "the provisioning of {guest} stopped before it was cancelled: cancel it again"
                ),
            )),
        }
    }

    /// Ends a guest for good: cancels what is under way, deletes everything of it on the broker, and
    /// keeps its record, so that a late machine is turned away.
    ///
    /// # Errors
    /// As [`Taskmanager::cancel`]. [`ErrorKind::Conflict`] if its prepare was accepted and still runs.
    ///
    /// # Cancel safety
    /// Dropped early, it may be half done; call again.
    pub async fn delete(&self, guest: &GuestId) -> Result<()> {
        if self.cancel(guest).await? == Cancelled::TooLate {
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("{guest} runs its prepare: wait for its outcome, then delete it"),
            ));
        }
        let Some(mut record) = self.record(guest).await? else {
            return Err(no_record(guest));
        };
        if !record.state.is_terminal() {
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("{guest} is being provisioned again: cancel that, then delete it"),
            ));
        }
        self.inner.withdraw_place(&record.address).await?;
        // Waited for: a command that ends right after this has told it all the same.
        dismiss(self.inner.asker(&record.address)).await;
        if machine::apply(&mut record, Event::Deleted, now_ms()) {
            self.inner.save(&mut record).await?;
            self.inner.announce(&record);
        }
        Ok(())
    }

    /// Stops everything of this taskmanager. What is under way stays recorded, and is resumed by the
    /// next one.
    pub fn close(&self) {
        self.inner.closed.send_replace(true);
    }
}

/// Ends the tasks when the last handle goes; the tasks themselves hold none.
struct CloseOnDrop(Arc<Inner>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.closed.send_replace(true);
    }
}

impl fmt::Debug for Taskmanager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Taskmanager")
            .field("broker", &self.inner.broker)
            .field("records", &self.inner.records)
            .field("reports", &self.inner.reports)
            .finish_non_exhaustive()
    }
}

impl Inner {
    fn driven(&self, guest: &GuestId) -> Option<Driven> {
        lock(&self.drivers).get(guest).cloned()
    }

    /// Starts to drive a record that is saved, unless it is driven already.
    fn drive(self: &Arc<Self>, record: Record) -> Driven {
        let mut drivers = lock(&self.drivers);
        if let Some(driven) = drivers.get(&record.address.guest)
            && driven.progress.borrow().record.address == record.address
        {
            return driven.clone();
        }
        let guest = record.address.guest.clone();
        let (signals, inbox) = mpsc::channel(64);
        let (tell, progress) = watch::channel(Progress {
            record: Arc::new(record.clone()),
            stopped: None,
            stuck: false,
        });
        let driven = Driven { signals, progress };
        drivers.insert(guest.clone(), driven.clone());
        drop(drivers);
        let (inner, mut closed) = (self.clone(), self.closed.subscribe());
        let signals = driven.signals.clone();
        tokio::spawn(async move {
            meter::driven(&record);
            let seen = tell.subscribe();
            let driver = Driver::new(inner.clone(), record, inbox, tell);
            tokio::select! {
                () = driver.run() => {}
                () = is_set(&mut closed) => {}
            }
            meter::undriven(&seen.borrow().record);
            let mut drivers = lock(&inner.drivers);
            // Its next incarnation may be driven by now.
            if drivers
                .get(&guest)
                .is_some_and(|driven| driven.signals.same_channel(&signals))
            {
                drivers.remove(&guest);
            }
        });
        driven
    }

    /// Saves a record. Its revision counts up only if it is saved.
    async fn save(&self, record: &mut Record) -> Result<()> {
        record.revision += 1;
        let saved = self.records.save(record).await;
        if saved.is_err() {
            record.revision -= 1;
        }
        saved
    }

    /// Whether a save of this record that failed has stored it all the same.
    async fn has_stored(&self, record: &Record) -> Result<bool> {
        let Some(stored) = self.records.newest(&record.address.guest).await? else {
            return Ok(false);
        };
        let saved = Record {
            revision: record.revision + 1,
            ..record.clone()
        };
        let form = |record: &Record| {
            serde_json::to_value(record).map_err(|error| {
                Error::new(ErrorKind::Internal, format!("no JSON form: {error}")).with_source(error)
            })
        };
        Ok(form(&stored)? == form(&saved)?)
    }

    /// Tells those who watch what was saved.
    fn announce(&self, record: &Record) {
        // Nobody has to watch.
        let _ = self.transitions.send(Arc::new(record.clone()));
    }

    /// Takes a machine's credential and its queue away, with all that is in it, and tells a guest that is still there.
    async fn fence(&self, address: &GuestAddress) -> Result<()> {
        self.withdraw_place(address).await?;
        self.dismiss(address);
        Ok(())
    }

    async fn withdraw_place(&self, address: &GuestAddress) -> Result<()> {
        self.revoke_its_credential(address).await?;
        self.take_queue(address).await?;
        Ok(())
    }

    /// Fences a machine whose outcome stands, once the broker can be reached.
    fn fence_later(self: &Arc<Self>, address: GuestAddress) {
        let (inner, mut closed) = (self.clone(), self.closed.subscribe());
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        let fenced = async move {
            while let Err(error) = inner.fence(&address).await {
                tracing::warn!(guest = %address, %error, "its queue is still there");
                backoff.pause().await;
            }
        };
        tokio::spawn(async move {
            tokio::select! {
                () = fenced => {}
                () = is_set(&mut closed) => {}
            }
        });
    }

    /// Takes a machine's queue away. Returns the ids of what nobody had acked; None if it was gone
    /// already, so that what was in it is not known.
    async fn take_queue(&self, address: &GuestAddress) -> Result<Option<Vec<crate::MessageId>>> {
        let queue = address.queue();
        let deadline = Deadline::after(OPERATION);
        match self
            .broker
            .delete(&queue, DeleteMode::Discard, deadline)
            .await
        {
            Ok(discarded) => Ok(Some(discarded.ids)),
            Err(error) if *error.kind() == ErrorKind::NoQueue => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Tells a machine that it was given up, without waiting.
    fn dismiss(&self, address: &GuestAddress) {
        tokio::spawn(dismiss(self.asker(address)));
    }

    fn asker(&self, address: &GuestAddress) -> Asker {
        Asker {
            broker: self.broker.clone(),
            address: address.clone(),
            signer: self.signer.clone(),
        }
    }

    /// Whether a message is this record's prepare, as far as its signature tells.
    fn is_prepare(&self, record: &Record, message: &crate::Message) -> bool {
        message.id == record.command
            && self
                .signer
                .as_ref()
                .is_none_or(|signer| signer.is_ours(&record.address, message, wire::VERSION))
    }

    fn own_or_refuse(&self) -> Result<()> {
        if *self.closed.borrow() {
            return Err(Error::new(
                ErrorKind::Closed,
                "the taskmanager is closed; what is under way stays recorded",
            ));
        }
        if self.owner {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Conflict,
            "this taskmanager only observes: it does not own the records",
        ))
    }
}

/// Tells a machine that it was given up, if its agent is there. That is a courtesy: without its queue it
/// runs nothing anyway.
async fn dismiss(asker: Asker) {
    let address = asker.address.clone();
    match asker.dismiss(Duration::from_secs(2)).await {
        Ok(()) => tracing::info!(guest = %address, "fenced"),
        Err(error) if *error.kind() == ErrorKind::NoConsumer => {}
        Err(error) => tracing::debug!(guest = %address, %error, "not told that it was given up"),
    }
}

fn no_record(guest: &GuestId) -> Error {
    Error::new(
        ErrorKind::InvalidInput,
        format!("there is no record of a guest {guest}"),
    )
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a record's machine may still serve: it was prepared, and not given up or deleted. One that
/// was given up after it had accepted prepare has failed, and has no queue either.
pub(crate) fn may_serve(record: &Record) -> bool {
    match record.state {
        State::NotDelivered | State::Deleted => false,
        State::Failed => record.revoking.is_none(),
        _ => true,
    }
}
