//! Drives one provisioning: learns, saves, and only then acts.

use std::{pin::Pin, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep, sleep_until, timeout},
};

use crate::{
    backoff::Backoff,
    broker::{Broker, QueueSpec},
    deadline::Deadline,
    error::{Error, ErrorKind, Outcome, Result},
    message::CommandId,
    names::QueueName,
    wire::{Command, CommandState, Phase, RemoteError, Report, ReportEvent},
    workflow::{
        machine::{self, Event, Todo},
        record::{ProvisionOutcome, Reason, ReasonKind, Record, Sent, State, Trouble, now_ms},
        taskmanager::{Cancelled, HostState, Inner, OPERATION, Progress, lock},
    },
};

/// How long a guest may take to answer a ping before the next one.
const PING: Duration = Duration::from_secs(1);

/// How long after the publish, or after its last word, a guest is asked how prepare stands.
const WATCH: Duration = Duration::from_secs(2);

/// How often the host is asked about the machine, and how long it may take to answer.
const PROBE_EVERY: Duration = Duration::from_secs(1);
const PROBE_WITHIN: Duration = Duration::from_secs(10);

/// How long a revocation may fail before those who wait are told that the broker is out of reach.
const STUCK_AFTER: Duration = Duration::from_secs(5);

/// What others tell a driver.
pub(super) enum Signal {
    /// A report of its guest, to be acked once it is on disk.
    /// In a box: a mailbox has room for many, and each waiting guest has one.
    Report(Box<(Report, crate::broker::Delivery)>),
    /// Give it up, and say what became of that.
    Cancel(oneshot::Sender<Cancelled>),
}

/// What the host says of a machine, if it says something in time.
type Probing = Pin<Box<dyn Future<Output = Option<HostState>> + Send>>;

/// Drives one record to its end.
pub(super) struct Driver {
    inner: Arc<Inner>,
    record: Record,
    inbox: mpsc::Receiver<Signal>,
    tell: watch::Sender<Progress>,
    cancels: Vec<oneshot::Sender<Cancelled>>,
    backoff: Backoff,
    next_probe: Instant,
    /// A question to the host that is not answered yet. It outlives the pause in which it was asked:
    /// most are shorter than a slow host takes.
    probing: Option<Probing>,
    revoking_fails_since: Option<Instant>,
    /// The record counts the copy that the next publish stores.
    counted: bool,
}

impl Driver {
    pub(super) fn new(
        inner: Arc<Inner>,
        mut record: Record,
        inbox: mpsc::Receiver<Signal>,
        tell: watch::Sender<Progress>,
    ) -> Self {
        if record.accepted {
            // Not each sign of life is on disk, and while nobody listened there was none to hear: the
            // guest's silence is counted from now (case W15).
            record.seen_ms = Some(now_ms());
        }
        Self {
            inner,
            record,
            inbox,
            tell,
            cancels: Vec::new(),
            backoff: fast_backoff(),
            next_probe: Instant::now(),
            probing: None,
            revoking_fails_since: None,
            counted: false,
        }
    }

    pub(super) async fn run(mut self) {
        if let Err(error) = self.drive().await {
            tracing::error!(guest = %self.record.address, %error, "provisioning stopped; it stays recorded");
            self.tell
                .send_modify(|progress| progress.stopped = Some(Arc::new(error)));
        }
    }

    /// # Errors
    /// Only those after which nothing may be done any more: somebody else drives this record.
    async fn drive(&mut self) -> Result<()> {
        loop {
            self.learn(Event::Tick).await?;
            self.answer_cancels();
            let state = self.record.state;
            match machine::todo(&self.record) {
                Todo::Declare => self.declare().await?,
                Todo::Await => self.await_guest().await?,
                Todo::Publish => self.publish().await?,
                Todo::Watch => self.watch().await?,
                Todo::Revoke => self.revoke().await?,
                Todo::Nothing => return Ok(()),
            }
            if self.record.state != state {
                self.backoff = fast_backoff();
                self.revoking_fails_since = None;
            }
        }
    }

    async fn declare(&mut self) -> Result<()> {
        // A machine of an earlier incarnation may still be there (case W25): it loses its queue first.
        // Any earlier one: the last may have been given up before it came to this.
        let number = self.record.address.incarnation.get();
        for earlier in (1..number).rev() {
            let earlier = crate::Incarnation::new(earlier)?;
            let earlier = crate::GuestAddress::new(self.record.address.guest.clone(), earlier);
            if let Err(error) = self.inner.fence(&earlier).await {
                return self.trouble(error).await;
            }
        }
        let spec = QueueSpec::new(self.record.address.queue());
        match self
            .inner
            .broker
            .declare(&spec, Deadline::after(OPERATION))
            .await
        {
            Ok(_) => self.learn(Event::Declared).await,
            Err(error) => self.trouble(error).await,
        }
    }

    async fn await_guest(&mut self) -> Result<()> {
        let asker = self.inner.asker(&self.record.address);
        let pong = tokio::select! {
            signal = self.inbox.recv() => return self.handle(signal).await,
            pong = asker.ping(PING) => pong,
        };
        match pong {
            Ok(pong) if pong.phase == Phase::WaitingForQueue => {
                // It will be attached in a moment, and say so; unless its queue was deleted meanwhile
                // (case W23).
                let queue = self.record.address.queue();
                let deadline = Deadline::after(OPERATION);
                match self.inner.broker.status(&queue, deadline).await {
                    Err(error) if *error.kind() == ErrorKind::NoQueue => {
                        self.learn(Event::QueueGone).await
                    }
                    Err(error) => self.trouble(error).await,
                    Ok(_) => self.pause(Duration::from_millis(50)).await,
                }
            }
            Ok(pong) => self.learn(Event::Pong(pong.boot)).await,
            Err(error) => self.trouble(error).await,
        }
    }

    async fn publish(&mut self) -> Result<()> {
        if !self.counted {
            // Tried before, by this process or by one that was killed (cases W14, W19).
            self.learn(Event::SendAgain).await?;
        }
        self.counted = false;
        let record = &self.record;
        let command = Command::new(
            &record.address,
            record.command.clone(),
            crate::MessageId::new(record.kind())?,
            Some(self.inner.reports.clone()),
            record.payload.clone(),
        );
        let deadline = Deadline::after(OPERATION);
        let queue = record.address.queue();
        match self
            .inner
            .broker
            .publish(&queue, command.to_message()?, deadline)
            .await
        {
            Ok(receipt) if receipt.duplicate => self.learn(Event::AlreadyThere).await,
            Ok(_) => self.learn(Event::SendConfirmed).await,
            Err(error) if error.outcome() == Some(Outcome::NotStored) => {
                self.learn(Event::NotStored).await?;
                self.not_published(error).await
            }
            Err(error) => self.not_published(error).await,
        }
    }

    async fn not_published(&mut self, error: Error) -> Result<()> {
        match error.kind() {
            ErrorKind::NoQueue => self.learn(Event::QueueGone).await,
            ErrorKind::TooLarge { .. } => {
                let reason = Reason::new(ReasonKind::Poison, error.to_string());
                self.learn(Event::GiveUp(reason)).await
            }
            // Unknown or not stored: the same id again (case W19).
            _ => self.trouble(error).await,
        }
    }

    /// Waits for reports; now and then asks the guest, in case one was lost (cases W15, W21).
    async fn watch(&mut self) -> Result<()> {
        let before = (self.record.state, self.record.seen_ms);
        self.pause(WATCH).await?;
        if (self.record.state, self.record.seen_ms) != before {
            return Ok(());
        }
        let asker = self.inner.asker(&self.record.address);
        let command = self.record.command.clone();
        let state = tokio::select! {
            signal = self.inbox.recv() => return self.handle(signal).await,
            state = asker.status(&command, Duration::ZERO, PING) => state,
        };
        match state {
            Ok(CommandState::Unknown) if self.record.accepted => {
                let lost = "the guest accepted prepare, and does not know of it any more: its journal was lost";
                self.learn(Event::Refused(RemoteError::new("journal_lost", lost)))
                    .await
            }
            Ok(state) => {
                // It starts nothing before an ack is confirmed; one that it had no word of will not be.
                let not_started = matches!(state, CommandState::Unknown | CommandState::Accepted);
                self.learn(Event::Command(state, None)).await?;
                if not_started {
                    self.look_for_prepare(true).await
                } else {
                    Ok(())
                }
            }
            Err(error) => {
                self.learn(Event::Trouble(Trouble::from(&error))).await?;
                self.look_for_prepare(false).await
            }
        }
    }

    /// As far as is known the guest has not started prepare: it is in the queue, or among the dead
    /// letters, or lost (cases W23, W24).
    async fn look_for_prepare(&mut self, not_started: bool) -> Result<()> {
        let queue = self.record.address.queue();
        let deadline = Deadline::after(OPERATION);
        let status = match self.inner.broker.status(&queue, deadline).await {
            Ok(status) => status,
            Err(error) if *error.kind() == ErrorKind::NoQueue => {
                return self.learn(Event::QueueGone).await;
            }
            Err(error) => return self.trouble(error).await,
        };
        let may_have_started = self.record.accepted && !not_started;
        if may_have_started || status.ready + status.delayed + status.in_flight > 0 {
            return Ok(());
        }
        if status.dead > 0 {
            let broker = self.inner.broker.as_ref();
            match why_dead(broker, &queue, &self.record.command, deadline).await {
                Ok(Some(reason)) => {
                    let error = RemoteError::new("poison", reason);
                    return self.learn(Event::Refused(error)).await;
                }
                Ok(None) => {}
                Err(error) => return self.trouble(error).await,
            }
        }
        self.learn(Event::Lost).await
    }

    /// Makes sure that no guest runs prepare from now on, or finds that one does.
    ///
    /// Three things hold it: a guest that is there writes down that it will never start it, or answers
    /// that it is too late; the queue is deleted, and the broker says whether prepare was still in it;
    /// and a guest starts nothing without a confirmed ack from a queue that it is attached to.
    async fn revoke(&mut self) -> Result<()> {
        let command = self.record.command.clone();
        let asker = self.inner.asker(&self.record.address);
        let mut withdrawn = false;
        if self.record.sent != Sent::Never {
            match asker.withdraw(&command, PING).await {
                Ok(CommandState::Withdrawn) => withdrawn = true,
                Ok(state @ CommandState::Done(_)) => {
                    return self.learn(Event::Command(state, None)).await;
                }
                Ok(CommandState::Running { .. }) => {
                    self.learn(Event::TooLate).await?;
                    if self.record.state == State::Failed {
                        // The outcome stands; the machine is not to go on.
                        self.inner.fence_later(self.record.address.clone());
                    }
                    return Ok(());
                }
                Ok(_) | Err(_) => {}
            }
        }
        let event = match self.inner.take_queue(&self.record.address).await {
            Ok(_) if withdrawn => Event::Command(CommandState::Withdrawn, None),
            Ok(taken) => {
                let copies = taken.iter().flatten().filter(|id| **id == command).count();
                Event::Fenced {
                    arbitrated: taken.is_some(),
                    discarded: u32::try_from(copies).unwrap_or(u32::MAX),
                }
            }
            Err(error) => return self.revoking_failed(error).await,
        };
        self.learn(event).await?;
        if self.record.state.is_terminal() {
            // Not before: a guest that goes on to its outcome has to live for it (case W37).
            self.inner.dismiss(self.record.address.clone());
        }
        Ok(())
    }

    async fn revoking_failed(&mut self, error: Error) -> Result<()> {
        let since = *self.revoking_fails_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= STUCK_AFTER {
            if self.record.sent == Sent::Never {
                // It was never published, so nothing can run. What is left of its queue goes when the
                // broker is back.
                let nothing = Event::Fenced {
                    arbitrated: false,
                    discarded: 0,
                };
                self.learn(nothing).await?;
                self.inner.fence_later(self.record.address.clone());
                return Ok(());
            }
            self.tell.send_modify(|progress| progress.stuck = true);
        }
        self.trouble(error).await
    }

    /// Something is in the way: remembers it, and waits a little.
    async fn trouble(&mut self, error: Error) -> Result<()> {
        tracing::debug!(guest = %self.record.address, %error, "waiting");
        self.learn(Event::Trouble(Trouble::from(&error))).await?;
        let pause = self.backoff.next();
        self.pause(pause).await
    }

    /// Waits: for a signal, for the host's word, for a deadline, at most this long.
    async fn pause(&mut self, longest: Duration) -> Result<()> {
        let until_tick = machine::next_tick_ms(&self.record).saturating_sub(now_ms());
        // The wall clock may lag behind the monotonic one by its grain.
        let until_tick = Duration::from_millis(until_tick.saturating_add(1));
        tokio::select! {
            signal = self.inbox.recv() => self.handle(signal).await,
            reason = host_failure(&self.inner, &self.record, &mut self.next_probe, &mut self.probing) => {
                self.learn(Event::GiveUp(reason)).await
            }
            () = sleep(longest.min(until_tick)) => Ok(()),
        }
    }

    async fn handle(&mut self, signal: Option<Signal>) -> Result<()> {
        match signal {
            None => Err(Error::new(ErrorKind::Closed, "the taskmanager is closed")),
            Some(Signal::Cancel(to)) => {
                self.cancels.push(to);
                let reason = Reason::new(ReasonKind::Revoked, "cancelled by the control plane");
                self.learn(Event::GiveUp(reason)).await
            }
            Some(Signal::Report(reported)) => {
                let (report, delivery) = *reported;
                let boot = report.boot.clone();
                let ours = |command: &crate::CommandId| *command == self.record.command;
                let event = match report.event {
                    ReportEvent::Accepted { command } if ours(&command) => {
                        Some(Event::Accepted(boot))
                    }
                    ReportEvent::Progress { command, .. } if ours(&command) => Some(
                        Event::Command(CommandState::Running { runs: 0 }, Some(boot)),
                    ),
                    ReportEvent::Done { command, receipt } if ours(&command) => {
                        Some(Event::Command(CommandState::Done(receipt), Some(boot)))
                    }
                    ReportEvent::Refused { message, reason } if ours(&message) => {
                        Some(Event::Refused(reason))
                    }
                    // It is up: whatever is waited for can be tried at once.
                    ReportEvent::Hello => {
                        self.backoff = fast_backoff();
                        None
                    }
                    _ => None,
                };
                if let Some(event) = event {
                    self.learn(event).await?;
                }
                let settled = delivery.ack(Deadline::after(OPERATION)).await;
                if let Err(error) = settled {
                    tracing::debug!(%error, "a report was not settled; it comes again");
                }
                Ok(())
            }
        }
    }

    /// Takes in an event; returns when what it changed is on disk.
    async fn learn(&mut self, event: Event) -> Result<()> {
        let mut next = self.record.clone();
        let copies = next.copies;
        if machine::apply(&mut next, event, now_ms()) {
            let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
            let mut may_be_stored = false;
            while let Err(error) = self.inner.save(&mut next).await {
                if *error.kind() == ErrorKind::Conflict {
                    if !may_be_stored {
                        return Err(error);
                    }
                    match self.inner.has_stored(&next).await {
                        Ok(true) => {
                            next.revision += 1;
                            break;
                        }
                        Ok(false) => return Err(error),
                        Err(_) => {}
                    }
                }
                // A store that answers too late, or not at all, may have it nevertheless.
                may_be_stored = true;
                tracing::error!(guest = %next.address, %error, "the records refuse; trying again");
                backoff.pause().await;
            }
            tracing::info!(guest = %next.address, state = %next.state, "provisioning");
            let record = Arc::new(next.clone());
            self.tell.send_modify(|progress| {
                // What goes on after a revocation that came too late (W37) is not stuck any more.
                progress.stuck &= record.state == State::Revoking;
                progress.record = record;
            });
            self.inner.announce(&next);
            self.counted |= next.copies > copies;
        }
        self.record = next;
        Ok(())
    }

    fn answer_cancels(&mut self) {
        if self.record.state == State::Revoking {
            return;
        }
        let became = match self.record.outcome {
            Some(ProvisionOutcome::NotDelivered { .. }) => Cancelled::Revoked,
            _ => Cancelled::TooLate,
        };
        for cancel in self.cancels.drain(..) {
            // Nobody has to wait for it.
            let _ = cancel.send(became.clone());
        }
    }
}

fn fast_backoff() -> Backoff {
    // Short at first: a guest that is about to attach. Long in the end: ten thousand that are not.
    Backoff::new(Duration::from_millis(20), Duration::from_secs(4))
}

/// Why this command is among the dead letters, if it is, however many there are before it.
async fn why_dead(
    broker: &dyn Broker,
    queue: &QueueName,
    command: &CommandId,
    deadline: Deadline,
) -> Result<Option<String>> {
    let page = const { std::num::NonZeroU32::new(100).expect("not zero") };
    let mut after = None;
    loop {
        let letters = broker
            .dead_letters(queue, after.as_ref(), page, deadline)
            .await?;
        let Some(last) = letters.last().map(|letter| letter.key.clone()) else {
            return Ok(None);
        };
        let found = letters
            .into_iter()
            .find(|letter| letter.message.id == *command);
        if let Some(letter) = found {
            return Ok(Some(letter.reason));
        }
        after = Some(last);
    }
}

/// Returns when the host says that the machine will not come to anything.
async fn host_failure(
    inner: &Inner,
    record: &Record,
    next_probe: &mut Instant,
    probing: &mut Option<Probing>,
) -> Reason {
    let probe = lock(&inner.probe).clone();
    let (Some(probe), false) = (probe, record.state == State::Revoking) else {
        return std::future::pending().await;
    };
    loop {
        if probing.is_none() {
            sleep_until(*next_probe).await;
        }
        let (probe, machine) = (probe.clone(), record.address.clone());
        let state = probing
            .get_or_insert_with(|| {
                Box::pin(async move { timeout(PROBE_WITHIN, probe.probe(&machine)).await.ok() })
            })
            .await;
        *probing = None;
        *next_probe = Instant::now() + PROBE_EVERY;
        let detail = match state {
            Some(HostState::Failed(detail)) => detail,
            Some(HostState::Gone) => "the machine is gone".into(),
            Some(HostState::Booting | HostState::Up) | None => continue,
        };
        return Reason::new(ReasonKind::HostFailed, detail);
    }
}

#[cfg(all(test, feature = "embedded"))]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

    use super::*;
    use crate::{GuestAddress, GuestId, Message, broker::ConsumeOptions};

    #[tokio::test]
    async fn w28_a_dead_prepare_is_found_behind_many_others() {
        let within = Deadline::after(Duration::from_secs(30));
        let broker = crate::connect("memory:").await.unwrap();
        let queue = GuestAddress::from(GuestId::new("vm").unwrap()).queue();
        let spec = QueueSpec::new(queue.clone());
        broker.declare(&spec, within).await.unwrap();
        let mut consumer = broker
            .consume(&queue, ConsumeOptions::default(), within)
            .await
            .unwrap();
        let mut bury = async |message: Message, reason: &str| {
            broker.publish(&queue, message, within).await.unwrap();
            let delivery = consumer.next().await.unwrap();
            delivery.dead_letter(reason, within).await.unwrap();
        };
        for _ in 0..100 {
            bury(Message::new("other", "").unwrap(), "broken").await;
        }
        let command = CommandId::generate();
        let look = async || why_dead(broker.as_ref(), &queue, &command, within).await;
        assert_eq!(look().await.unwrap(), None);
        let prepare = Message::new("prepare", "").unwrap();
        bury(prepare.with_id(command.clone()), "version 9").await;
        assert_eq!(look().await.unwrap().as_deref(), Some("version 9"));
    }
}
