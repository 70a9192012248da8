//! A taskmanager or a guest as a process of its own, for the cases of the workflow: this package's own
//! binary, run as `actor`.
//!
//! It speaks one JSON document a line: orders on its standard input, what happens on its standard
//! output. It can be killed and paused from outside, and stopped at any of its side effects from inside.

mod points;
mod process;
mod watched;

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::ChildStdout,
    sync::mpsc,
};
use wilco::{Deadlines, GuestId, Incarnation, ProvisionOutcome, SendPolicy, State};

pub use points::{How, Side, Stop};
pub use process::run;

use crate::{
    check::CheckError,
    second::{self, Second},
    support::resident,
};

/// Longer than anything takes here, a broker that is killed and started again included.
const PATIENCE: Duration = Duration::from_secs(90);

/// What an actor is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Order {
    /// Be a taskmanager.
    Control {
        /// Its name.
        name: String,
        /// Where its records are.
        records: PathBuf,
        /// How long to wait for the broker, in milliseconds.
        within_ms: u64,
        /// Where to stop.
        stop: Option<Stop>,
        /// The file of the key to sign with.
        #[serde(default)]
        sign: Option<PathBuf>,
    },
    /// Be a guest too.
    Guest(GuestOrder),
    /// Provision a guest.
    Provision {
        /// The guest.
        guest: GuestId,
        /// When to send prepare.
        policy: SendPolicy,
        /// How long what may take.
        deadlines: Deadlines,
        /// As its next incarnation.
        again: bool,
    },
    /// Take it from the host probe that this machine failed.
    HostFailed {
        /// The guest.
        guest: GuestId,
    },
    /// Cancel a provisioning.
    Cancel {
        /// The guest.
        guest: GuestId,
    },
    /// Delete a guest.
    Delete {
        /// The guest.
        guest: GuestId,
    },
    /// Ping a guest.
    Ping {
        /// The guest.
        guest: GuestId,
        /// How long it may take to answer, in milliseconds.
        within_ms: u64,
    },
    /// Call a guest.
    Call {
        /// The guest.
        guest: GuestId,
        /// The command's kind.
        kind: String,
    },
    /// Show a record.
    Show {
        /// The guest.
        guest: GuestId,
    },
    /// Stop there from now on.
    StopAt {
        /// Where.
        stop: Stop,
    },
    /// Let go on what is held at a stop.
    Go,
    /// Let every handler end that waits for it.
    Open,
}

/// What a guest is to be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestOrder {
    /// The guest.
    pub guest: GuestId,
    /// Which machine of it.
    pub incarnation: Incarnation,
    /// The control plane's name.
    pub control: String,
    /// Where its journal is.
    pub journal: PathBuf,
    /// The file that gets a line whenever a handler runs: its effect on the world.
    pub effects: PathBuf,
    /// How long to wait for the queue, in milliseconds.
    pub wait_ms: u64,
    /// What its prepare does.
    pub act: Act,
    /// Whether an interrupted prepare is run again.
    pub again: bool,
    /// Where to stop.
    pub stop: Option<Stop>,
    /// The file of the keys to trust.
    #[serde(default)]
    pub trust: Option<PathBuf>,
}

/// What a prepare does after its effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Act {
    /// It succeeds.
    Succeed,
    /// It fails.
    Fail,
    /// It waits until it is told to end, and succeeds.
    Wait,
}

/// What an actor tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Told {
    /// The taskmanager is one.
    Ready,
    /// A guest is attached.
    Attached {
        /// The guest.
        guest: GuestId,
    },
    /// What was ordered failed.
    Failed {
        /// The guest that it was about, if one.
        guest: Option<GuestId>,
        /// The error's kind.
        kind: String,
        /// The error.
        error: String,
    },
    /// A record was saved in this state.
    State {
        /// The guest.
        guest: GuestId,
        /// The state.
        state: State,
    },
    /// A provisioning has ended.
    Outcome {
        /// The guest.
        guest: GuestId,
        /// How.
        outcome: ProvisionOutcome,
    },
    /// A handler runs.
    Running {
        /// The guest.
        guest: GuestId,
        /// Which run.
        run: u32,
    },
    /// A guest has ended by itself.
    Served {
        /// The guest.
        guest: GuestId,
        /// How.
        how: String,
    },
    /// What an order has led to.
    Answer {
        /// The guest.
        guest: GuestId,
        /// It.
        answer: Value,
    },
    /// A side effect is about to be carried out.
    Effect {
        /// Its name.
        effect: String,
        /// Which one of this name.
        nth: u32,
    },
    /// A side effect is held.
    Held,
}

/// A running actor. It is killed when this is dropped.
#[derive(Debug)]
pub struct Actor {
    process: Second,
    told: mpsc::UnboundedReceiver<std::io::Result<String>>,
    /// What was told before anybody asked for it.
    heard: Vec<Told>,
}

impl Actor {
    /// Starts one whose broker is at this URL.
    ///
    /// # Errors
    /// [`Unavailable`](crate::harness::Unavailable) where the program is not known; a failure if it does not start.
    pub fn start(
        program: Option<&PathBuf>,
        before: &[&str],
        url: &str,
    ) -> Result<Self, CheckError> {
        let program = program.map(PathBuf::as_path);
        let (process, told) = Second::start(program, "actor", before, url)?;
        Ok(Self {
            process,
            told: listen(told),
            heard: Vec::new(),
        })
    }

    /// How much memory it has in use, in bytes.
    ///
    /// # Errors
    /// It is gone, or this system does not tell.
    pub fn memory(&self) -> Result<u64, CheckError> {
        resident(&self.process.id().to_string())
    }

    /// Sends an order without waiting for what comes of it.
    ///
    /// # Errors
    /// The process is gone.
    pub async fn order(&mut self, order: &Order) -> Result<(), CheckError> {
        self.process.order(order).await
    }

    /// The first thing told, from now or before, that is this; later ones stay to be asked for.
    ///
    /// # Errors
    /// The process ends first, or tells no such thing for too long.
    pub async fn hear<T>(
        &mut self,
        what: &str,
        mut is: impl FnMut(&Told) -> Option<T>,
    ) -> Result<T, CheckError> {
        for n in 0..self.heard.len() {
            if let Some(found) = is(&self.heard[n]) {
                self.heard.remove(n);
                return Ok(found);
            }
        }
        let waited = async {
            while let Some(told) = self.next().await? {
                if let Some(found) = is(&told) {
                    return Ok(Some(found));
                }
                self.heard.push(told);
            }
            Ok(None)
        };
        let found = tokio::time::timeout(PATIENCE, waited).await;
        let instead = match found {
            Ok(Ok(Some(found))) => return Ok(found),
            Ok(Err(error)) => return Err(error),
            Ok(Ok(None)) => "it ended",
            Err(_) => "it told nothing of the kind for too long",
        };
        let last: Vec<_> = self.heard.iter().rev().take(6).collect();
        Err(CheckError::failed(
            format!("an actor tells {what}"),
            format!("{instead}; the last that it told, newest first: {last:?}"),
        ))
    }

    /// Waits until it is gone, and returns everything that nobody had asked for.
    ///
    /// # Errors
    /// It lives on for too long.
    pub async fn ended(&mut self) -> Result<Vec<Told>, CheckError> {
        let rest = async {
            while let Some(told) = self.next().await? {
                self.heard.push(told);
            }
            Ok::<_, CheckError>(())
        };
        tokio::time::timeout(PATIENCE, rest)
            .await
            .map_err(|_| CheckError::failed("an actor ends", "it lives on"))??;
        self.process.gone().await?;
        Ok(std::mem::take(&mut self.heard))
    }

    async fn next(&mut self) -> Result<Option<Told>, CheckError> {
        match self.told.recv().await {
            None => Ok(None),
            Some(Ok(line)) => second::read(&line),
            Some(Err(error)) => Err(CheckError::failed("an actor tells what happens", error)),
        }
    }

    /// Kills it as `kill -9` does, and waits until it is gone.
    ///
    /// # Errors
    /// It could not be killed.
    pub async fn kill(&mut self) -> Result<(), CheckError> {
        self.process.kill().await
    }

    /// Stops it where it stands, as a machine does that is suspended.
    ///
    /// # Errors
    /// It could not be.
    pub fn pause(&self) -> Result<(), CheckError> {
        self.process.pause()
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// It could not.
    pub fn resume(&self) -> Result<(), CheckError> {
        self.process.resume()
    }
}

/// Reads everything that is told, whether or not anybody asks for it: an actor never waits for that.
fn listen(told: ChildStdout) -> mpsc::UnboundedReceiver<std::io::Result<String>> {
    let (tell, lines) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut told = BufReader::new(told).lines();
        while let Some(line) = told.next_line().await.transpose() {
            if tell.send(line).is_err() {
                break;
            }
        }
    });
    lines
}
