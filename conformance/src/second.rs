//! A second process: this package's own binary in a part of its own, which can be killed and paused. It
//! is told what to do on its standard input, one JSON document a line, and tells what happens the same
//! way on its standard output.

use std::{fmt, io::Write, path::Path, process::Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use tokio::{
    io::AsyncWriteExt,
    process::{Child, ChildStdin, ChildStdout, Command},
};

use crate::{
    check::CheckError,
    harness::Unavailable,
    process::{runs, stands_still},
};

/// Where it finds its broker's URL: not among its arguments, which everybody on the machine can read, for
/// it may hold a password (law S4).
pub(crate) const URL: &str = "WILCO_CONFORMANCE_AGENT_BROKER";

/// A running process. It is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Second {
    child: Child,
    orders: ChildStdin,
}

impl Second {
    /// Starts `program part` on the broker at this URL, behind the words of `before`, and returns what it
    /// tells.
    ///
    /// # Errors
    /// [`Unavailable`] where the program is not known; a failure if it does not start.
    pub(crate) fn start(
        program: Option<&Path>,
        part: &str,
        before: &[&str],
        url: &str,
    ) -> Result<(Self, ChildStdout), CheckError> {
        let program = program.ok_or_else(|| {
            Unavailable::because("the program that plays a second process was not given")
        })?;
        let mut command = match before.split_first() {
            None => Command::new(program),
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
        };
        let started = command
            .arg(part)
            .env(URL, url)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn();
        let lost = |what: &str| CheckError::failed("a second process starts", what);
        let mut child = started.map_err(|error| lost(&error.to_string()))?;
        let orders = child
            .stdin
            .take()
            .ok_or_else(|| lost("no standard input"))?;
        let told = child
            .stdout
            .take()
            .ok_or_else(|| lost("no standard output"))?;
        Ok((Self { child, orders }, told))
    }

    /// Its id; 0 once it is gone.
    pub(crate) fn id(&self) -> u32 {
        self.child.id().unwrap_or(0)
    }

    /// Sends an order without waiting for what comes of it.
    ///
    /// # Errors
    /// The process is gone.
    pub(crate) async fn order(&mut self, order: &impl Serialize) -> Result<(), CheckError> {
        let gone = |error: &dyn fmt::Display| {
            CheckError::failed("the second process takes an order", error)
        };
        let mut line = serde_json::to_vec(order).map_err(|error| gone(&error))?;
        line.push(b'\n');
        self.orders
            .write_all(&line)
            .await
            .map_err(|error| gone(&error))
    }

    /// Waits until it is gone.
    ///
    /// # Errors
    /// That cannot be known.
    pub(crate) async fn gone(&mut self) -> Result<(), CheckError> {
        let gone = self.child.wait().await;
        gone.map(drop)
            .map_err(|error| CheckError::failed("the second process ends", error))
    }

    /// Kills it as `kill -9` does, and waits until it is gone.
    ///
    /// # Errors
    /// It could not be killed.
    pub(crate) async fn kill(&mut self) -> Result<(), CheckError> {
        let killed = self.child.kill().await;
        killed.map_err(|error| CheckError::failed("the second process is killed", error))
    }

    /// Stops it where it stands, as a machine does that is suspended.
    ///
    /// # Errors
    /// It could not be.
    pub(crate) fn pause(&self) -> Result<(), CheckError> {
        self.signal(Signal::STOP)?;
        if stands_still(|| self.pid().is_some_and(runs)) {
            return Ok(());
        }
        Err(CheckError::failed(
            "a second process stands still",
            "it goes on",
        ))
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// It could not.
    pub(crate) fn resume(&self) -> Result<(), CheckError> {
        self.signal(Signal::CONT)
    }

    fn pid(&self) -> Option<Pid> {
        Pid::from_raw(i32::try_from(self.child.id()?).ok()?)
    }

    fn signal(&self, signal: Signal) -> Result<(), CheckError> {
        if self
            .pid()
            .is_some_and(|pid| kill_process(pid, signal).is_ok())
        {
            return Ok(());
        }
        Err(CheckError::failed("a signal is sent", "it was not"))
    }
}

/// What its line says; `None` for the half of one that a kill leaves.
///
/// # Errors
/// It is not in the agreed form.
pub(crate) fn read<T: serde::de::DeserializeOwned>(line: &str) -> Result<Option<T>, CheckError> {
    match serde_json::from_str(line) {
        Ok(told) => Ok(Some(told)),
        Err(error) if error.is_eof() => Ok(None),
        Err(error) => Err(CheckError::failed(
            "the second process tells what it did",
            error,
        )),
    }
}

/// From inside the process: one line, out of it before this returns, so that a kill right after loses
/// nothing.
pub(crate) fn tell(told: &impl Serialize) -> Result<(), String> {
    let mut line = serde_json::to_vec(told).map_err(|error| error.to_string())?;
    line.push(b'\n');
    std::io::stdout()
        .lock()
        .write_all(&line)
        .map_err(|error| error.to_string())
}
