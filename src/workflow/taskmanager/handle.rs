//! One guest, as the control plane speaks to it: a ping comes before any cast or call.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    broker::QueueStatus,
    deadline::Deadline,
    error::{Error, ErrorKind, Outcome, Result},
    message::{CommandId, MessageId},
    names::{GuestAddress, GuestId, Incarnation},
    wire::{self, Command, CommandResult, CommandState, Payload, Pong},
    workflow::{
        ask::Asker,
        record::{State, now_ms},
        taskmanager::{OPERATION, Taskmanager, lock},
    },
};

/// How long a guest may take to answer the ping before a cast or call.
const PING: Duration = Duration::from_secs(1);

/// How long one question for a command's end may wait before it is asked again.
const ONE_WAIT: Duration = Duration::from_secs(10);

/// One guest, to ping, call and cast to.
#[derive(Clone, Debug)]
pub struct GuestHandle {
    taskmanager: Taskmanager,
    guest: std::result::Result<GuestId, String>,
    incarnation: Option<Incarnation>,
    within: Duration,
    pong_max_age: Duration,
    /// Who answered the last ping, and when. Clones share it.
    last_pong: Arc<Mutex<Option<(GuestAddress, Instant)>>>,
}

impl GuestHandle {
    pub(super) fn new(taskmanager: Taskmanager, guest: Result<GuestId>) -> Self {
        Self {
            taskmanager,
            guest: guest.map_err(|error| error.to_string()),
            incarnation: None,
            within: Duration::from_secs(30),
            pong_max_age: Duration::ZERO,
            last_pong: Arc::default(),
        }
    }

    /// Speaks to this incarnation, whatever the records say: for a control plane that has none here.
    #[must_use]
    pub fn incarnation(mut self, incarnation: Incarnation) -> Self {
        self.incarnation = Some(incarnation);
        self
    }

    /// How long a cast or call may take in all: 30 s unless told otherwise.
    #[must_use]
    pub fn within(mut self, within: Duration) -> Self {
        self.within = within;
        self
    }

    /// How old the pong before a cast or call may be: a pong of this handle, or of a clone of it, that
    /// is younger saves the ping. Zero unless told otherwise: each cast and call pings.
    #[must_use]
    pub fn pong_max_age(mut self, age: Duration) -> Self {
        self.pong_max_age = age;
        self
    }

    /// Asks the guest whether it is there. Touches no queue.
    ///
    /// # Errors
    /// [`ErrorKind::NoConsumer`] in a round trip if it is not attached;
    /// [`ErrorKind::ConsumerSilent`] after `within` if it is and does not answer;
    /// [`ErrorKind::InvalidInput`] for a guest without a record; those of the broker.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn ping(&self, within: Duration) -> Result<Pong> {
        self.ping_by(&self.asker().await?, within).await
    }

    async fn ping_by(&self, asker: &Asker, within: Duration) -> Result<Pong> {
        let answer = asker.ping(within).await;
        // A guest that did not answer is not one that did a moment ago.
        *lock(&self.last_pong) = answer
            .is_ok()
            .then(|| (asker.address.clone(), Instant::now()));
        answer
    }

    fn has_fresh_pong(&self, from: &GuestAddress) -> bool {
        lock(&self.last_pong)
            .as_ref()
            .is_some_and(|(address, at)| address == from && at.elapsed() < self.pong_max_age)
    }

    /// Sends a command that nobody waits for. Ok: it is stored in the guest's queue, and the guest was
    /// there a moment ago. Its result can be asked for with [`GuestHandle::command_status`].
    ///
    /// # Errors
    /// Those of [`GuestHandle::ping`], nothing sent; [`ErrorKind::NotPrepared`], nothing sent, unless
    /// the guest's prepare succeeded; those of [`Broker::publish`](crate::Broker::publish), with
    /// their [`Outcome`].
    ///
    /// # Cancel safety
    /// Dropped early, it may or may not be sent.
    pub async fn cast(
        &self,
        kind: &str,
        payload: &(impl Serialize + Sync + ?Sized),
    ) -> Result<CommandId> {
        let deadline = Deadline::after(self.within);
        self.send(kind, wire::raw(payload)?, deadline).await
    }

    /// Sends a command, waits until the guest has run it, and returns what its handler returned.
    ///
    /// # Errors
    /// Those of [`GuestHandle::cast`]; [`ErrorKind::Remote`] if the handler failed (law R8);
    /// [`ErrorKind::DeadlineExceeded`] with the command's id: it may still be run, and its result be
    /// asked for with [`GuestHandle::command_status`].
    ///
    /// # Cancel safety
    /// Dropped early, the command may still be run.
    pub async fn call<R: DeserializeOwned>(
        &self,
        kind: &str,
        payload: &(impl Serialize + Sync + ?Sized),
    ) -> Result<R> {
        let deadline = Deadline::after(self.within);
        let command = self.send(kind, wire::raw(payload)?, deadline).await?;
        let asker = self.asker().await?;
        let mut trouble = None;
        while !deadline.has_passed() {
            let left = deadline.remaining();
            let state = asker
                .status(&command, left.min(ONE_WAIT), left.min(PING))
                .await;
            match state {
                Ok(CommandState::Done(receipt)) => return read(receipt.result),
                Ok(CommandState::Withdrawn) => {
                    return Err(Error::new(
                        ErrorKind::Revoked,
                        "the guest was told never to run it",
                    ));
                }
                Ok(_) => trouble = None,
                Err(error) if error.is_retryable() => {
                    trouble = Some(error);
                    tokio::time::sleep(Duration::from_millis(20).min(deadline.remaining())).await;
                }
                Err(error) => return Err(error),
            }
        }
        let why = trouble.map_or_else(|| "it has not ended".into(), |error| error.to_string());
        Err(Error::new(
            ErrorKind::DeadlineExceeded,
            format!(
                "no result of command {command} within {:?}: {why}; it may still be run",
                self.within
            ),
        )
        .with_outcome(Outcome::Unknown))
    }

    /// How a command stands at the guest, by its journal.
    ///
    /// # Errors
    /// Those of [`GuestHandle::ping`].
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn command_status(
        &self,
        command: &CommandId,
        within: Duration,
    ) -> Result<CommandState> {
        self.asker()
            .await?
            .status(command, Duration::ZERO, within)
            .await
    }

    /// What the guest's queue holds.
    ///
    /// # Errors
    /// Those of [`Broker::status`](crate::Broker::status).
    pub async fn queue(&self) -> Result<QueueStatus> {
        let queue = self.asker().await?.address.queue();
        self.taskmanager
            .broker()
            .status(&queue, Deadline::after(OPERATION))
            .await
    }

    async fn send(&self, kind: &str, payload: Payload, deadline: Deadline) -> Result<CommandId> {
        let asker = self.asker().await?;
        self.must_be_prepared().await?;
        if !self.has_fresh_pong(&asker.address) {
            self.ping_by(&asker, PING.min(deadline.remaining())).await?;
        }
        let command = Command::new(
            &asker.address,
            CommandId::generate(),
            MessageId::new(kind)?,
            None,
            payload,
        );
        let signer = self.taskmanager.inner.signer.as_deref();
        let now_ms = now_ms();
        let message = command.to_signed(signer, |by| (now_ms, by.command_expires(now_ms)))?;
        let queue = asker.address.queue();
        loop {
            match asker
                .broker
                .publish(&queue, message.clone(), deadline)
                .await
            {
                Ok(_) => return Ok(command.command),
                // The same id again: one effect (law P3).
                Err(error)
                    if error.outcome() == Some(Outcome::Unknown) && !deadline.has_passed() => {}
                Err(error) => return Err(error),
            }
        }
    }

    async fn must_be_prepared(&self) -> Result<()> {
        if self.incarnation.is_some() {
            // The guest itself knows, and answers for itself.
            return Ok(());
        }
        let state = self
            .taskmanager
            .record(&self.guest()?)
            .await?
            .map(|record| record.state);
        match state {
            Some(State::Succeeded) => Ok(()),
            Some(State::NotDelivered | State::Deleted) => {
                Err(Error::new(ErrorKind::Revoked, "this guest was given up"))
            }
            _ => Err(Error::new(
                ErrorKind::NotPrepared,
                "this guest's prepare has not succeeded (yet): other commands wait for that",
            )),
        }
    }

    fn guest(&self) -> Result<GuestId> {
        self.guest
            .clone()
            .map_err(|message| Error::new(ErrorKind::InvalidName, message))
    }

    async fn asker(&self) -> Result<Asker> {
        let guest = self.guest()?;
        let address = match self.incarnation {
            Some(incarnation) => GuestAddress::new(guest, incarnation),
            None => match self.taskmanager.record(&guest).await? {
                Some(record) => record.address,
                None => return Err(super::no_record(&guest)),
            },
        };
        Ok(self.taskmanager.inner.asker(&address))
    }
}

fn read<R: DeserializeOwned>(result: CommandResult) -> Result<R> {
    match result {
        CommandResult::Ok(value) => serde_json::from_str(value.get()).map_err(|error| {
            Error::new(
                ErrorKind::Undecodable,
                format!(
                    "the result is not what this call expects: {}",
                    wire::misfit(&error)
                ),
            )
        }),
        CommandResult::Error(error) if error.kind == "not_prepared" => {
            Err(Error::new(ErrorKind::NotPrepared, error.message))
        }
        CommandResult::Error(error) => Err(Error::new(
            ErrorKind::Remote {
                kind: error.kind.clone(),
            },
            error.message,
        )),
    }
}
