//! A broker's own server as a private process: on a free port of the loopback, in a temporary
//! directory, ended when it is dropped.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process_group};
use tempfile::TempDir;
use tokio::process::Child;

use crate::harness::Unavailable;

/// How long a server may take to come up on a loaded machine.
const START_WITHIN: Duration = Duration::from_secs(180);

/// A port that was free a moment ago.
///
/// # Errors
/// Those of the operating system.
pub fn free_port() -> io::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?.port())
}

/// So many ports that were free a moment ago, each another.
///
/// # Errors
/// Those of the operating system.
pub fn free_ports<const N: usize>() -> io::Result<[u16; N]> {
    let mut ports = [0; N];
    // All are held until the last is found.
    let mut held = Vec::with_capacity(N);
    for port in &mut ports {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        *port = listener.local_addr()?.port();
        held.push(listener);
    }
    Ok(ports)
}

/// A server that can be started, killed, paused and started again on the same data.
///
/// It is the leader of a process group of its own, and the group is what signals go to: a server that
/// is started through a shell or forks helpers is killed and paused whole.
pub struct Process {
    directory: TempDir,
    address: SocketAddr,
    command: Box<dyn Fn(&Path) -> Command + Send + Sync>,
    child: Mutex<Option<Child>>,
}

impl Process {
    /// A server that will listen on this address of the loopback; `command` makes its command line,
    /// given its directory, and is asked again at each start.
    ///
    /// # Errors
    /// No directory can be made.
    pub fn new(
        address: SocketAddr,
        directory: TempDir,
        command: impl Fn(&Path) -> Command + Send + Sync + 'static,
    ) -> Self {
        Self {
            directory,
            address,
            command: Box::new(command),
            child: Mutex::new(None),
        }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What it printed, over all its starts.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.directory().join("server.log")
    }

    /// Starts it and returns when `ready` says so; `ready` is asked again and again, with pauses.
    ///
    /// # Errors
    /// It ended, or was not ready in time: the reason and the end of its log.
    pub async fn start(&self, ready: impl AsyncFn() -> bool) -> Result<(), String> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log())
            .map_err(|error| error.to_string())?;
        let copy = log.try_clone().map_err(|error| error.to_string())?;
        let mut command = (self.command)(self.directory());
        {
            use std::os::unix::process::CommandExt as _;
            command.process_group(0);
        }
        command.stdin(Stdio::null()).stdout(log).stderr(copy);
        // What it leaves behind when it is killed, a core file say, goes with the directory.
        command.current_dir(self.directory());
        let program = command.get_program().to_string_lossy().into_owned();
        let child = tokio::process::Command::from(command)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("{program} cannot be started: {error}"))?;
        *self.child() = Some(child);
        let started = Instant::now();
        while !ready().await {
            let ended = self.child().as_mut().map(Child::try_wait);
            if let Some(Ok(Some(status))) = ended {
                return Err(format!("{program} ended, {status}: {}", self.end_of_log()));
            }
            if started.elapsed() > START_WITHIN {
                return Err(format!(
                    "{program} was not up after {START_WITHIN:?}: {}",
                    self.end_of_log()
                ));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Kills it as `kill -9` does and returns when it is gone.
    ///
    /// # Errors
    /// It is not running.
    pub async fn kill(&self) -> Result<(), Unavailable> {
        self.end(Signal::KILL).await
    }

    /// Asks it to end and returns when it is gone.
    ///
    /// # Errors
    /// It is not running.
    pub async fn stop(&self) -> Result<(), Unavailable> {
        self.end(Signal::TERM).await
    }

    /// Stops it where it stands, and returns when each of its threads stands still: one that still ran
    /// could answer what is sent after this.
    ///
    /// # Errors
    /// It is not running, or goes on running.
    pub fn pause(&self) -> Result<(), Unavailable> {
        self.signal(Signal::STOP)?;
        let group = self.child().as_ref().and_then(group_of);
        if stands_still(|| group.is_some_and(group_runs)) {
            return Ok(());
        }
        Err(Unavailable::because("the server does not stand still"))
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// It is not running.
    pub fn resume(&self) -> Result<(), Unavailable> {
        self.signal(Signal::CONT)
    }

    async fn end(&self, signal: Signal) -> Result<(), Unavailable> {
        self.signal(signal)?;
        let child = self.child().take();
        if let Some(mut child) = child {
            let ended = tokio::time::timeout(START_WITHIN, child.wait()).await;
            ended
                .map_err(|_| Unavailable::because("the server does not end"))?
                .map_err(|error| Unavailable::because(error.to_string()))?;
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) -> Result<(), Unavailable> {
        let group = self.child().as_ref().and_then(group_of);
        let sent = group.is_some_and(|group| kill_process_group(group, signal).is_ok());
        if sent {
            Ok(())
        } else {
            Err(Unavailable::because("the server is not running"))
        }
    }

    fn end_of_log(&self) -> String {
        let log = std::fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The group, not the leader alone: nothing that was started here stays.
        if let Some(group) = self.child().as_ref().and_then(group_of) {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

fn group_of(child: &Child) -> Option<Pid> {
    Pid::from_raw(i32::try_from(child.id()?).ok()?)
}

/// Waits until nothing of it runs any more: a signal to stop is sent sooner than it has stopped.
pub(crate) fn stands_still(runs: impl Fn() -> bool) -> bool {
    let started = Instant::now();
    while runs() {
        if started.elapsed() > Duration::from_secs(5) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// Whether a thread of any process of this group is neither stopped nor gone.
fn group_runs(group: Pid) -> bool {
    entries(Path::new("/proc")).any(|process| {
        let of_group = stat(&process.path()).is_some_and(|(_, of)| of == group.as_raw_pid());
        of_group && threads_run(&process.path())
    })
}

/// Whether a thread of this process is neither stopped nor gone.
pub(crate) fn runs(process: Pid) -> bool {
    threads_run(&Path::new("/proc").join(process.as_raw_pid().to_string()))
}

fn threads_run(process: &Path) -> bool {
    entries(&process.join("task"))
        .filter_map(|thread| stat(&thread.path()))
        .any(|(state, _)| !matches!(state, 'T' | 't' | 'Z' | 'X'))
}

/// None where the system has no `/proc`: it shows nothing.
fn entries(path: &Path) -> impl Iterator<Item = std::fs::DirEntry> {
    std::fs::read_dir(path).into_iter().flatten().flatten()
}

/// The state and the process group of a process or thread.
fn stat(directory: &Path) -> Option<(char, i32)> {
    let stat = std::fs::read_to_string(directory.join("stat")).ok()?;
    // The program's name is in brackets, and may have some of its own.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(1)?.parse().ok()?))
}

impl std::fmt::Debug for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Process")
            .field("address", &self.address)
            .field("directory", &self.directory.path())
            .finish_non_exhaustive()
    }
}
