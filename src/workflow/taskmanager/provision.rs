//! One call of `provision`: what it asks for, and the wait for its outcome.

use std::{
    future::{Future, IntoFuture},
    pin::Pin,
    time::Duration,
};

use crate::{
    error::{Error, ErrorKind, Result},
    names::{GuestAddress, GuestId, Incarnation},
    wire::{self, Payload},
    workflow::{
        record::{Deadlines, ProvisionOutcome, Record, SendPolicy, State, now_ms},
        taskmanager::{Driven, Taskmanager},
    },
};

/// A provisioning about to be asked for: await it for its outcome.
#[must_use = "nothing happens before it is awaited"]
#[derive(Debug)]
pub struct Provision {
    taskmanager: Taskmanager,
    guest: Result<GuestId>,
    payload: Result<Payload>,
    policy: SendPolicy,
    deadlines: Deadlines,
    again: bool,
    credential: bool,
}

impl Provision {
    pub(super) fn new(
        taskmanager: Taskmanager,
        guest: Result<GuestId>,
        payload: Result<Payload>,
    ) -> Self {
        Self {
            taskmanager,
            guest,
            payload,
            policy: SendPolicy::default(),
            deadlines: Deadlines::default(),
            again: false,
            credential: false,
        }
    }

    /// How long the guest may take to answer its first ping.
    pub fn boot_deadline(mut self, boot: Duration) -> Self {
        self.deadlines.boot = boot;
        self
    }

    /// How long the guest may take to accept prepare once it was sent.
    pub fn accept_deadline(mut self, accept: Duration) -> Self {
        self.deadlines.accept = accept;
        self
    }

    /// How long the guest may give no sign of life while prepare runs.
    pub fn progress_deadline(mut self, progress: Duration) -> Self {
        self.deadlines.progress = progress;
        self
    }

    /// How long it may take in all.
    pub fn total_deadline(mut self, total: Duration) -> Self {
        self.deadlines.total = total;
        self
    }

    /// All deadlines at once.
    pub fn deadlines(mut self, deadlines: Deadlines) -> Self {
        self.deadlines = deadlines;
        self
    }

    /// When prepare is sent: after the guest's first pong unless told otherwise.
    pub fn policy(mut self, policy: SendPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Whether a guest whose outcome stands is provisioned anew, as its next incarnation: a new
    /// machine. Its earlier one is fenced first.
    pub fn again(mut self, again: bool) -> Self {
        self.again = again;
        self
    }

    /// Whether the machine gets a credential of its own (law S1), which
    /// [`Taskmanager::issue_credential`] makes once this was asked for. It is revoked when the machine is
    /// given up, deleted, or followed by another one of its guest.
    pub fn with_credential(mut self, credential: bool) -> Self {
        self.credential = credential;
        self
    }

    /// Asks for it without waiting for the outcome. Ok: it is recorded, and carried out from now on
    /// by this taskmanager and those after it.
    ///
    /// # Errors
    /// As [`Taskmanager::provision`].
    ///
    /// # Cancel safety
    /// Dropped early, it may or may not be recorded; ask again.
    pub async fn start(self) -> Result<Record> {
        self.begin().await.map(|(record, _)| record)
    }

    async fn begin(self) -> Result<(Record, Option<Driven>)> {
        let inner = &self.taskmanager.inner;
        inner.own_or_refuse()?;
        let (guest, payload) = (self.guest?, self.payload?);
        check_size(&payload)?;
        loop {
            if let Some(driven) = inner.driven(&guest) {
                let record = driven.progress.borrow().record.as_ref().clone();
                if !record.state.is_terminal() {
                    joinable(&record, &payload)?;
                    return Ok((record, Some(driven)));
                }
            }
            let mut credential = self.credential;
            let incarnation = match inner.records.newest(&guest).await? {
                None => Incarnation::FIRST,
                Some(record) if !record.state.is_terminal() => {
                    joinable(&record, &payload)?;
                    let driven = inner.drive(record.clone());
                    return Ok((record, Some(driven)));
                }
                Some(record) if self.again => {
                    // The earlier machine's is revoked before this one's queue is made.
                    credential |= record.credential;
                    record.address.incarnation.next()
                }
                Some(record) => {
                    joinable(&record, &payload)?;
                    return Ok((record, None));
                }
            };
            let address = GuestAddress::new(guest.clone(), incarnation);
            let mut record = Record::new(
                address,
                payload.clone(),
                self.policy,
                self.deadlines,
                now_ms(),
            );
            record.credential = credential;
            // In a task of its own: what is recorded is driven, whether or not the caller is still here.
            let recording = {
                let inner = inner.clone();
                tokio::spawn(async move {
                    inner.save(&mut record).await?;
                    inner.announce(&record);
                    let driven = inner.drive(record.clone());
                    Ok((record, Some(driven)))
                })
            };
            let recorded = recording.await.unwrap_or_else(|error| {
                Err(Error::new(ErrorKind::Internal, error.to_string()).with_source(error))
            });
            match recorded {
                Ok(recorded) => return Ok(recorded),
                // Another call for this guest was faster: look again.
                Err(error) if *error.kind() == ErrorKind::Conflict => {
                    tokio::task::yield_now().await
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn run(self) -> Result<ProvisionOutcome> {
        let (record, driven) = self.begin().await?;
        let Some(mut driven) = driven else {
            return outcome(&record);
        };
        // Its sender lives as long as its driver.
        let ended = driven
            .progress
            .wait_for(|progress| {
                progress.record.state.is_terminal() || progress.stopped.is_some() || progress.stuck
            })
            .await
            .map_err(|_| {
                Error::new(
                    ErrorKind::Closed,
                    "the taskmanager is closed; it stays recorded",
                )
            })?
            .clone();
        if ended.record.state.is_terminal() {
            return outcome(&ended.record);
        }
        if let Some(error) = ended.stopped {
            return Err(Error::new(error.kind().clone(), error.to_string()).with_source(error));
        }
        let why = ended
            .record
            .trouble
            .as_ref()
            .map_or("", |trouble| trouble.detail.as_str());
        Err(Error::new(
            ErrorKind::BrokerUnreachable,
            format!(
                "{} was given up, and is not revoked yet: {why}. It is recorded, and finished when \
                 the broker is back: ask again then",
                ended.record.address
            ),
        ))
    }
}

/// Whether a call that asks for `payload` is the same call as the one that made this record.
fn joinable(record: &Record, payload: &Payload) -> Result<()> {
    if record.same_payload(payload) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Conflict,
        format!(
            "{} was given another prepare ({}): for a new machine, provision it again as a new incarnation",
            record.address, record.state
        ),
    ))
}

fn outcome(record: &Record) -> Result<ProvisionOutcome> {
    match (&record.outcome, record.state) {
        (Some(outcome), state) if state != State::Deleted => Ok(outcome.clone()),
        _ => Err(Error::new(
            ErrorKind::Revoked,
            format!(
                "{} was deleted: for a new machine, provision it again as a new incarnation",
                record.address
            ),
        )),
    }
}

/// Refused here, a payload is never recorded: it could not be sent.
fn check_size(payload: &Payload) -> Result<()> {
    const ROOM_FOR_THE_REST: usize = 4 * 1024;
    let limit = wire::MAX_BODY_BYTES - ROOM_FOR_THE_REST;
    if payload.get().len() <= limit {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::TooLarge {
            limit: limit as u64,
        },
        format!(
            "the payload has {} bytes, at most {limit} can be sent",
            payload.get().len()
        ),
    ))
}

impl IntoFuture for Provision {
    type Output = Result<ProvisionOutcome>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.run())
    }
}
