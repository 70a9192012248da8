//! A second process that checks can kill and pause: this package's own binary, run as `agent`.
//!
//! It speaks one JSON document a line: orders on its standard input, answers on its standard output.

mod process;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::ChildStdout,
    sync::oneshot,
    task::JoinHandle,
};
use wilco::{GuestAddress, QueueName};

pub use process::run;

use crate::{
    check::{CheckError, Cx},
    harness::Unavailable,
    ledger::Entry,
    second::{self, Second},
};

/// A broker may be killed and started again between two lines.
const PATIENCE: Duration = Duration::from_secs(60);

/// What an agent is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Order {
    /// Attach to a queue.
    Attach {
        /// The queue.
        queue: QueueName,
        /// The most deliveries to hold.
        prefetch: u32,
    },
    /// Receive one delivery and hold it.
    Receive,
    /// Ack the held delivery of this message.
    Ack {
        /// The message's id.
        id: String,
    },
    /// Publish a message whose body is its id.
    Publish {
        /// The queue.
        queue: QueueName,
        /// The message's id.
        id: String,
    },
    /// Attach to a lane, and either echo what comes or stay silent.
    Respond {
        /// The lane.
        lane: GuestAddress,
        /// Whether to answer.
        answer: bool,
    },
    /// Consume at random until killed, and tell the history of it.
    Work {
        /// The queue.
        queue: QueueName,
        /// Where the random choices come from.
        seed: u64,
    },
    /// Publish at random until killed, and tell the history of it.
    Load {
        /// The queue.
        queue: QueueName,
        /// What the ids begin with.
        prefix: String,
        /// How many.
        messages: u64,
        /// So many at once.
        at_once: u32,
        /// Where the random choices come from.
        seed: u64,
    },
}

/// What an agent tells.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Told {
    /// Done as ordered.
    Done,
    /// A delivery came.
    Delivery {
        /// The message's id.
        id: String,
        /// Its attempt.
        attempt: u32,
    },
    /// It failed.
    Failed {
        /// The error.
        error: String,
    },
    /// One line of history.
    History {
        /// The line.
        entry: Entry,
    },
    /// The work or load has come to its end.
    End,
}

/// An agent whose history is read. It is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Followed {
    /// The process as histories name it.
    pub(crate) process: u32,
    kill: oneshot::Sender<()>,
    told: JoinHandle<Result<(), CheckError>>,
}

impl Followed {
    /// Kills it, and returns when all it told was noted.
    ///
    /// # Errors
    /// It had failed, or was gone, before.
    pub(crate) async fn kill(self) -> Result<(), CheckError> {
        // One that has failed hears nothing any more.
        let _ = self.kill.send(());
        let told = self.told.await;
        told.map_err(|error| CheckError::failed("the history of a process is read", error))?
    }
}

/// A running agent. It is killed when this is dropped.
#[derive(Debug)]
pub struct Agent {
    process: Second,
    told: Lines<BufReader<ChildStdout>>,
}

impl Agent {
    /// Starts one on the check's broker.
    ///
    /// # Errors
    /// [`Unavailable`] where no other process can reach the broker or the program is not known.
    pub async fn start(cx: &Cx) -> Result<Self, CheckError> {
        Self::start_at(cx, &Self::url(cx)?)
    }

    /// Where another process reaches the check's broker.
    ///
    /// # Errors
    /// [`Unavailable`] where none can.
    pub(crate) fn url(cx: &Cx) -> Result<String, CheckError> {
        let facts = cx.server.facts();
        let url = facts.url;
        Ok(url.ok_or_else(|| Unavailable::because(facts.private_because))?)
    }

    /// Starts one that reaches the broker by this URL.
    pub(crate) fn start_at(cx: &Cx, url: &str) -> Result<Self, CheckError> {
        let program = cx.options.agent.as_deref();
        let (process, told) = Second::start(program, "agent", &[], url)?;
        let told = BufReader::new(told).lines();
        Ok(Self { process, told })
    }

    /// The process as histories name it; 0 once it is gone.
    #[must_use]
    pub fn process(&self) -> u32 {
        self.process.id()
    }

    /// Sends an order without waiting for what comes of it.
    ///
    /// # Errors
    /// The process is gone.
    pub async fn order(&mut self, order: &Order) -> Result<(), CheckError> {
        self.process.order(order).await
    }

    /// The next thing it tells; `None` when it is gone and all it told was read.
    ///
    /// # Errors
    /// It tells nothing for too long, or not in the agreed form.
    pub async fn told(&mut self) -> Result<Option<Told>, CheckError> {
        let bad = |seen: &dyn std::fmt::Display| {
            CheckError::failed("the second process tells what it did", seen)
        };
        let line = tokio::time::timeout(PATIENCE, self.told.next_line())
            .await
            .map_err(|_| bad(&"nothing for too long"))?
            .map_err(|error| bad(&error))?;
        let Some(line) = line else { return Ok(None) };
        second::read(&line)
    }

    async fn obey(&mut self, order: &Order) -> Result<Told, CheckError> {
        self.order(order).await?;
        match self.told().await? {
            Some(Told::Failed { error }) => Err(CheckError::failed(
                format!("{order:?} succeeds in a second process"),
                error,
            )),
            Some(told) => Ok(told),
            None => Err(CheckError::failed("the second process lives", "it is gone")),
        }
    }

    /// Attaches to a queue.
    ///
    /// # Errors
    /// It could not.
    pub async fn attach(&mut self, queue: &QueueName, prefetch: u32) -> Result<(), CheckError> {
        self.obey(&Order::Attach {
            queue: queue.clone(),
            prefetch,
        })
        .await
        .map(drop)
    }

    /// Receives and holds one delivery, and says which.
    ///
    /// # Errors
    /// None came.
    pub async fn receive(&mut self) -> Result<(String, u32), CheckError> {
        match self.obey(&Order::Receive).await? {
            Told::Delivery { id, attempt } => Ok((id, attempt)),
            other => Err(CheckError::failed("a delivery", format!("{other:?}"))),
        }
    }

    /// Acks a held delivery; true if the ack was Ok.
    ///
    /// # Errors
    /// The process is gone.
    pub async fn settle_ack(&mut self, id: &str) -> Result<bool, CheckError> {
        self.order(&Order::Ack { id: id.into() }).await?;
        match self.told().await? {
            Some(Told::Done) => Ok(true),
            Some(Told::Failed { .. }) => Ok(false),
            other => Err(CheckError::failed(
                "an answer to an ack",
                format!("{other:?}"),
            )),
        }
    }

    /// Publishes; returns once it was Ok.
    ///
    /// # Errors
    /// It was not.
    pub async fn publish(&mut self, queue: &QueueName, id: &str) -> Result<(), CheckError> {
        self.obey(&Order::Publish {
            queue: queue.clone(),
            id: id.into(),
        })
        .await
        .map(drop)
    }

    /// Attaches to a lane, to echo or to stay silent.
    ///
    /// # Errors
    /// It could not.
    pub async fn respond(&mut self, lane: &GuestAddress, answer: bool) -> Result<(), CheckError> {
        self.obey(&Order::Respond {
            lane: lane.clone(),
            answer,
        })
        .await
        .map(drop)
    }

    /// Notes what it tells until it is to be killed, kills it, and notes the rest.
    pub(crate) fn followed(mut self, mut note: impl FnMut(Entry) + Send + 'static) -> Followed {
        let process = self.process();
        let (kill, mut killed) = oneshot::channel();
        let told = tokio::spawn(async move {
            let failed =
                |error: &str| CheckError::failed("a process works until it is killed", error);
            let mut over = false;
            loop {
                let told = tokio::select! {
                    _ = &mut killed, if !over => {
                        over = true;
                        self.kill().await?;
                        continue;
                    }
                    told = self.told() => told?,
                };
                match told {
                    Some(Told::History { entry }) => note(entry),
                    Some(Told::Failed { error }) => return Err(failed(&error)),
                    Some(_) => {}
                    None if over => return Ok(()),
                    None => return Err(failed("it is gone")),
                }
            }
        });
        Followed {
            process,
            kill,
            told,
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
