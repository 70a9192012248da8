//! The database that handles of this process share, and the handles.

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use rusqlite::Connection;
use tokio::sync::watch;

use super::{
    BACKEND, SCHEMA,
    attach::Attachments,
    closed,
    consume::Hold,
    publish::Inbox,
    requests::{Asking, Lane, Lanes},
};
use crate::{
    broker_url::BrokerUrl,
    deadline::Deadline,
    durability::{DurabilityReport, Finding, Level, Verdict},
    error::{ErrorKind, Result},
    names::QueueName,
    sqlite::{Call, Fault, FileKey, Location, Store, SyncLevel, file_key},
};

/// How long a look waits for what was dropped to be given back.
const PATIENCE: Duration = Duration::from_secs(1);

/// What all handles of this process to one database share.
pub(super) struct Core {
    pub(super) store: Store,
    sync: SyncLevel,
    /// None in memory, which no other process shares.
    pub(super) attachments: Option<Attachments>,
    pub(super) inbox: Inbox,
    /// This process's consumers, by token.
    pub(super) holds: Mutex<HashMap<i64, Weak<Hold>>>,
    /// This process's responders.
    pub(super) lanes: Lanes,
    /// Connections to other processes' responders.
    pub(super) asking: Asking,
    /// Handles that are not closed, and that somebody or a consumer still has.
    handles: AtomicUsize,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core")
            .field("store", &self.store)
            .field("sync", &self.sync)
            .finish_non_exhaustive()
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        self.asking.clear();
    }
}

/// Which databases are one and the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    File(FileKey, SyncLevel),
    Memory(String),
}

/// The databases that can be joined.
static CORES: LazyLock<Mutex<HashMap<Key, Weak<Core>>>> = LazyLock::new(Mutex::default);

/// One handle's part.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) core: Arc<Core>,
    closed: watch::Sender<bool>,
    left: AtomicBool,
    /// Its consumers and responders, to be ended with it.
    holds: Mutex<Vec<Weak<Hold>>>,
    lanes: Mutex<Vec<Weak<Lane>>>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) async fn connect(url: &BrokerUrl) -> Result<Arc<Handle>> {
    let (location, sync, name) = if url.scheme() == "memory" {
        url.only_options(&[])?;
        let name = url.path()?.to_string_lossy().into_owned();
        (Location::Memory, SyncLevel::Off, Some(name))
    } else {
        url.only_options(&["sync"])?;
        let sync = url.option("sync", "full, normal or off", |value| match value {
            "full" => Some(SyncLevel::Full),
            "normal" => Some(SyncLevel::Normal),
            "off" => Some(SyncLevel::Off),
            _ => None,
        })?;
        let location = Location::File(url.path()?);
        (location, sync.unwrap_or(SyncLevel::Full), None)
    };
    let known = match (&location, &name) {
        (Location::File(path), _) => file_key(path).ok().map(|key| Key::File(key, sync)),
        (Location::Memory, name) => name
            .clone()
            .filter(|name| !name.is_empty())
            .map(Key::Memory),
    };
    if let Some(handle) = known.as_ref().and_then(|key| join(key, None)) {
        return Ok(handle);
    }
    let store = Store::open_with(location, &SCHEMA, sync).await?;
    let attachments = match store.location() {
        Location::File(path) => Some(Attachments::beside(path)?),
        Location::Memory => None,
    };
    let key = store.file().map(|key| Key::File(key, sync)).or(known);
    let core = Arc::new(Core {
        store,
        sync,
        attachments,
        inbox: Inbox::default(),
        holds: Mutex::default(),
        lanes: Lanes::default(),
        asking: Asking::default(),
        handles: AtomicUsize::new(0),
    });
    Ok(match key {
        // Somebody may have opened it meanwhile: then theirs is used, and this one goes.
        Some(key) => join(&key, Some(&core)).unwrap_or_else(|| Handle::new(core)),
        None => Handle::new(core),
    })
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.leave();
    }
}

/// A handle to what is open already, or else to `new`.
fn join(key: &Key, new: Option<&Arc<Core>>) -> Option<Arc<Handle>> {
    let mut cores = lock(&CORES);
    let there = cores
        .get(key)
        .and_then(Weak::upgrade)
        .filter(|core| core.handles.load(Ordering::Acquire) > 0);
    if let Some(core) = there {
        return Some(Handle::new(core));
    }
    let new = new?;
    cores.retain(|_, core| core.strong_count() > 0);
    cores.insert(key.clone(), Arc::downgrade(new));
    Some(Handle::new(Arc::clone(new)))
}

impl Handle {
    /// To be called with the list of databases locked, where the core is in it.
    fn new(core: Arc<Core>) -> Arc<Self> {
        core.handles.fetch_add(1, Ordering::AcqRel);
        Arc::new(Self {
            core,
            closed: watch::Sender::new(false),
            left: AtomicBool::new(false),
            holds: Mutex::default(),
            lanes: Mutex::default(),
        })
    }

    /// Fails once the handle is closed.
    pub(super) fn open(&self) -> Result<&Arc<Core>> {
        if *self.closed.borrow() {
            return Err(closed());
        }
        Ok(&self.core)
    }

    /// Waits for the handle to be closed.
    pub(super) async fn until_closed(&self) {
        // Fails only without a sender, and `self` is one.
        let _ = self.closed.subscribe().wait_for(|closed| *closed).await;
    }

    pub(super) fn remember_hold(&self, hold: &Arc<Hold>) {
        let mut holds = lock(&self.holds);
        holds.retain(|hold| hold.strong_count() > 0);
        holds.push(Arc::downgrade(hold));
    }

    pub(super) fn remember_lane(&self, lane: &Arc<Lane>) {
        let mut lanes = lock(&self.lanes);
        lanes.retain(|lane| lane.strong_count() > 0);
        lanes.push(Arc::downgrade(lane));
    }

    /// Counts this handle out. True for the last one, once.
    fn leave(&self) -> bool {
        // Under this lock nobody joins a core whose last handle goes.
        let _cores = lock(&CORES);
        !self.left.swap(true, Ordering::AcqRel)
            && self.core.handles.fetch_sub(1, Ordering::AcqRel) == 1
    }

    pub(super) async fn close(&self, deadline: Deadline) -> Result<()> {
        self.closed.send_replace(true);
        for lane in std::mem::take(&mut *lock(&self.lanes)) {
            if let Some(lane) = lane.upgrade() {
                lane.detach();
            }
        }
        for hold in std::mem::take(&mut *lock(&self.holds)) {
            if let Some(hold) = hold.upgrade() {
                hold.release();
            }
        }
        let last = self.leave();
        // Everything that was handed in before this is committed after it.
        let barrier = self.core.change(deadline, |_| Ok(())).await;
        if last {
            self.core.asking.clear();
            return self.core.store.close(deadline).await;
        }
        match barrier {
            Err(error) if *error.kind() != ErrorKind::Closed => Err(error),
            _ => Ok(()),
        }
    }

    pub(super) async fn durability(&self, deadline: Deadline) -> Result<DurabilityReport> {
        let core = self.open()?;
        let path = match core.store.location() {
            Location::File(path) => path.clone(),
            Location::Memory => return Ok(memory_report()),
        };
        let (journal, synchronous) = core
            .change(deadline, |connection| {
                let text: String =
                    connection.query_row("PRAGMA journal_mode", [], |row| row.get(0))?;
                let level: i64 =
                    connection.query_row("PRAGMA synchronous", [], |row| row.get(0))?;
                Ok((text, level))
            })
            .await?;
        Ok(file_report(&path, &journal, synchronous))
    }
}

impl Core {
    /// Changes the database after everything that was handed in before.
    pub(super) async fn change<T: Send + 'static>(
        self: &Arc<Self>,
        deadline: Deadline,
        op: impl FnOnce(&Connection) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T> {
        let room = self.inbox.room(deadline).await?;
        let (call, ticket, answer) = Call::boxed(op, Some(room));
        self.after_inbox(call, true)?;
        ticket.answer(deadline, answer).await
    }

    /// Reads the database after everything that was handed in before.
    pub(super) async fn look<T: Send + 'static>(
        self: &Arc<Self>,
        deadline: Deadline,
        op: impl FnOnce(&Connection) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T> {
        // A dropped delivery is given back before the next look (law Q9), unless another process is in
        // the way for long: then what is committed is the truth.
        if self.inbox.has_loose() {
            match self.change(deadline.or_after(PATIENCE), |_| Ok(())).await {
                Err(error) if *error.kind() != ErrorKind::DeadlineExceeded => return Err(error),
                _ => {}
            }
        }
        self.store.read(deadline, op).await
    }

    /// Whether this consumer lives, in whatever process.
    pub(super) fn is_alive(&self, queue: &QueueName, token: i64) -> bool {
        let here = lock(&self.holds).get(&token).and_then(Weak::upgrade);
        if let Some(hold) = here {
            return !hold.is_released();
        }
        self.attachments.as_ref().is_some_and(|attachments| {
            super::attach::Lock::is_held(&attachments.consumer_lock(queue, token))
        })
    }

    /// Tells a consumer, in whatever process, to look again.
    pub(super) fn wake(&self, queue: &QueueName, token: i64) {
        let here = lock(&self.holds).get(&token).and_then(Weak::upgrade);
        if let Some(hold) = here {
            hold.look_again();
        } else if let Some(attachments) = &self.attachments {
            attachments.wake(queue, token);
        }
    }
}

fn finding(setting: &str, value: &str, meaning: &str, advice: Option<&str>) -> Finding {
    Finding {
        setting: setting.into(),
        value: Some(value.into()),
        meaning: meaning.into(),
        advice: advice.map(Into::into),
    }
}

fn memory_report() -> DurabilityReport {
    let mut report = DurabilityReport::new(BACKEND, rusqlite::version(), Level::Memory);
    report.findings.push(finding(
        "location",
        "memory",
        "everything is gone with this process",
        Some("use sqlite:/path/to/a.db to keep messages"),
    ));
    report
}

fn file_report(path: &Path, journal: &str, synchronous: i64) -> DurabilityReport {
    let (level, value, meaning) = match synchronous {
        2.. => (Level::Power, "full", "synced to disk before Ok"),
        1 => (
            Level::Process,
            "normal",
            "what the last seconds confirmed is lost when the operating system crashes or the power \
             is cut; the file stays whole",
        ),
        _ => (
            Level::Process,
            "off",
            "never synced: a crash of the operating system or a power cut loses messages and can \
             destroy the file",
        ),
    };
    let mut report = DurabilityReport::new(BACKEND, rusqlite::version(), level);
    let advice = (level < Level::Power).then_some("open the broker with sync=full");
    report
        .findings
        .push(finding("synchronous", value, meaning, advice));
    report.findings.push(finding(
        "journal_mode",
        journal,
        "a write-ahead log: a kill of any process leaves the file whole",
        None,
    ));
    report.findings.push(finding(
        "location",
        &path.display().to_string(),
        "one file on one machine: it is lost with the machine's disk",
        None,
    ));
    match file_system(path).as_deref() {
        Some(kind @ ("tmpfs" | "ramfs" | "devtmpfs")) => {
            report.level = report.level.min(Level::Process);
            report.power_loss = Verdict::Unsafe;
            report.findings.push(finding(
                "file system",
                kind,
                "memory, not a disk: it is gone when the machine stops",
                Some("put the file on a disk"),
            ));
        }
        Some(kind) => {
            let remote = [
                "nfs", "cifs", "smb", "9p", "fuse", "virtiofs", "ceph", "gluster",
            ];
            if remote.iter().any(|prefix| kind.starts_with(prefix)) {
                if report.power_loss == Verdict::Safe {
                    report.power_loss = Verdict::Unknown;
                }
                report.findings.push(finding(
                    "file system",
                    kind,
                    "whether a sync reaches a disk is for another machine or program to say",
                    Some("put the file on a local disk"),
                ));
            }
        }
        None => report.findings.push(Finding {
            setting: "file system".into(),
            value: None,
            meaning: "could not be read: a file in memory would not survive a power cut".into(),
            advice: None,
        }),
    }
    report
}

/// The type of the file system that holds this absolute path, where the system tells (Linux).
fn file_system(path: &Path) -> Option<String> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mut best: Option<(usize, &str)> = None;
    for line in mounts.lines() {
        let (before, after) = line.split_once(" - ")?;
        let point = before.split(' ').nth(4)?.replace("\\040", " ");
        if path.starts_with(&point) && best.is_none_or(|(length, _)| point.len() >= length) {
            best = Some((point.len(), after.split(' ').next()?));
        }
    }
    best.map(|(_, kind)| kind.to_owned())
}
