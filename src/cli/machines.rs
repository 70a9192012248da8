//! The machines that `provision --spawn` starts: one process group per guest.
//!
//! They are meant to outlive us when we are killed, so nothing of them hangs on a pipe of ours.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    process::{ExitStatus, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::{process::Command, sync::watch};
use wilco::{GuestAddress, HostProbe, HostState};

use super::{
    problem::{Exit, Outcome, Problem},
    program::{Program, ended},
};

/// How long a machine may take to power off before it is killed.
const POWER_OFF: Duration = Duration::from_secs(10);

/// What the control plane's own secrets may stand in.
const OURS: [&str; 4] = [
    "WILCO_BROKER_USER",
    "WILCO_BROKER_PASSWORD",
    "WILCO_BROKER_TOKEN",
    "WILCO_SIGN_KEY",
];

/// The machines of this run.
#[derive(Debug)]
pub(super) struct Machines {
    program: Program,
    broker: String,
    wilco: PathBuf,
    machines: Mutex<HashMap<GuestAddress, Machine>>,
    running: watch::Sender<usize>,
    /// From here on an end is our own doing, and says nothing about a machine.
    powering_off: AtomicBool,
}

/// One machine's process: there until its end has been seen.
#[derive(Clone, Copy, Debug)]
enum Machine {
    Running(Option<Pid>),
    Ended(ExitStatus),
}

impl Machines {
    pub(super) fn new(program: Program, broker: &str) -> Outcome<Arc<Self>> {
        let wilco = std::env::current_exe().map_err(|error| {
            Problem::new(
                Exit::Defect,
                format!("cannot find this program's own file: {error}"),
            )
        })?;
        Ok(Arc::new(Self {
            program,
            broker: broker.to_owned(),
            wilco,
            machines: Mutex::default(),
            running: watch::Sender::new(0),
            powering_off: AtomicBool::new(false),
        }))
    }

    /// Starts the machine of a guest.
    pub(super) fn start(
        self: &Arc<Self>,
        address: &GuestAddress,
        env: &BTreeMap<String, String>,
        broker: Option<&SecretString>,
    ) -> Outcome<()> {
        let mut command = Command::new(self.program.path());
        // What the control plane connects and signs with is not for machines that have their own.
        if broker.is_some() {
            for ours in OURS {
                command.env_remove(ours);
            }
        }
        let broker = broker.map_or(self.broker.as_str(), |own| own.expose_secret());
        let mut child = command
            .envs(env)
            .env("WILCO_GUEST", address.guest.as_str())
            .env("WILCO_INCARNATION", address.incarnation.to_string())
            .env("WILCO_BROKER", broker)
            .env("WILCO_EXE", &self.wilco)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(|error| {
                let program = self.program.path().display();
                Problem::new(Exit::File, format!("cannot start {program}: {error}"))
            })?;
        let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        self.lock().insert(address.clone(), Machine::Running(pid));
        self.running.send_modify(|running| *running += 1);
        let (machines, address) = (Arc::clone(self), address.clone());
        tokio::spawn(async move {
            if let Ok(status) = child.wait().await {
                machines.lock().insert(address, Machine::Ended(status));
            }
            machines.running.send_modify(|running| *running -= 1);
        });
        Ok(())
    }

    /// How many run.
    pub(super) fn running(&self) -> usize {
        *self.running.borrow()
    }

    /// Whether this one does.
    pub(super) fn runs(&self, address: &GuestAddress) -> bool {
        matches!(self.lock().get(address), Some(Machine::Running(_)))
    }

    /// Powers off what runs: SIGTERM to each machine, and after a while SIGKILL to all of it.
    pub(super) async fn power_off(&self) {
        self.powering_off.store(true, Ordering::Relaxed);
        for pid in self.pids() {
            // One that has ended meanwhile is what we want.
            let _ = kill_process(pid, Signal::TERM);
        }
        let mut running = self.running.subscribe();
        let all_ended = running.wait_for(|running| *running == 0);
        if tokio::time::timeout(POWER_OFF, all_ended).await.is_ok() {
            return;
        }
        for pid in self.pids() {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }

    fn pids(&self) -> Vec<Pid> {
        let machines = self.lock();
        let running = machines.values().filter_map(|machine| match machine {
            Machine::Running(pid) => *pid,
            Machine::Ended(_) => None,
        });
        running.collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<GuestAddress, Machine>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the workflow asks about the machines.
pub(super) struct Probe(pub(super) Arc<Machines>);

#[async_trait]
impl HostProbe for Probe {
    async fn probe(&self, guest: &GuestAddress) -> HostState {
        match self.0.lock().get(guest) {
            // Started by an earlier run, or by nobody: nothing is known.
            None | Some(Machine::Running(_)) => HostState::Booting,
            // Another machine of this guest runs already, started by a run that was killed.
            Some(Machine::Ended(status)) if status.code() == Some(Exit::Conflict as i32) => {
                HostState::Up
            }
            Some(Machine::Ended(_)) if self.0.powering_off.load(Ordering::Relaxed) => {
                HostState::Booting
            }
            Some(Machine::Ended(status)) => {
                HostState::Failed(format!("the machine {}", ended(*status)))
            }
        }
    }
}
