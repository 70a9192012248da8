//! Drives one provisioning: learns, saves, and only then acts.

use std::{pin::Pin, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::Instrument as _;

use crate::{
    backoff::Backoff,
    broker::{Broker, QueueSpec},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    message::{Message, TraceContext},
    names::QueueName,
    wire::{Command, RemoteError, Report, ReportEvent},
    workflow::{
        machine::{self, Event, Todo},
        meter,
        record::{ProvisionOutcome, Reason, ReasonKind, Record, Sent, State, Trouble, now_ms},
        taskmanager::{
            Cancelled, HostState, Inner, OPERATION, Progress,
            answers::{self, Look, Looked, Pinged, Withdrew},
            lock, may_serve,
        },
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
        let record = &self.record;
        let span = tracing::info_span!(
            "provision",
            guest = %record.address,
            command = %record.command,
            trace = record.trace.as_ref().map(TraceContext::trace_id),
        );
        if let Err(error) = self.drive().instrument(span).await {
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
            let stage = tracing::info_span!("stage", %state);
            match machine::todo(&self.record) {
                Todo::Declare => self.declare().instrument(stage).await?,
                Todo::Await => self.await_guest().instrument(stage).await?,
                Todo::Publish => self.publish().instrument(stage).await?,
                Todo::Watch => self.watch().instrument(stage).await?,
                Todo::Revoke => self.revoke().instrument(stage).await?,
                Todo::Nothing => {
                    // However it came to its end: nothing is left of a machine that is not to go on (law
                    // Q7). Not before: one that goes on to its outcome has to live for it (case W37).
                    if !may_serve(&self.record) {
                        self.inner.fence_later(self.record.address.clone());
                    }
                    return Ok(());
                }
            }
            if self.record.state != state {
                self.backoff = fast_backoff();
                self.revoking_fails_since = None;
            }
        }
    }

    async fn declare(&mut self) -> Result<()> {
        for earlier in answers::earlier(&self.record.address)? {
            if let Err(error) = self.inner.fence(&earlier).await {
                return self.trouble(Trouble::from(&error)).await;
            }
        }
        let spec = QueueSpec::new(self.record.address.queue());
        let deadline = Deadline::after(OPERATION);
        let answer = self.inner.broker.declare(&spec, deadline).await;
        self.take_in(answers::declared(answer)).await
    }

    async fn await_guest(&mut self) -> Result<()> {
        let asker = self.inner.asker(&self.record.address);
        let pong = tokio::select! {
            signal = self.inbox.recv() => return self.handle(signal).await,
            pong = asker.ping(PING) => pong,
        };
        match answers::pinged(pong) {
            Pinged::Learnt(event) => self.take_in(event).await,
            Pinged::NotAttached => {
                let queue = self.record.address.queue();
                let deadline = Deadline::after(OPERATION);
                let status = self.inner.broker.status(&queue, deadline).await;
                match answers::looked_for_queue(status) {
                    Some(event) => self.take_in(event).await,
                    None => self.pause(Duration::from_millis(50)).await,
                }
            }
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
        )
        .with_trace(record.trace.clone());
        let deadline = Deadline::after(OPERATION);
        let queue = record.address.queue();
        // Valid until this is given up, however late its machine comes; and the same at every re-send.
        let times = (record.created_ms, record.expires_ms());
        let message = command.to_signed(self.inner.signer.as_deref(), |_| times)?;
        let first = record.copies <= 1;
        let answer = self.inner.broker.publish(&queue, message, deadline).await;
        if first && answer.as_ref().is_ok_and(|receipt| receipt.duplicate) {
            // Not ours, or a copy that a killed predecessor sent. A guest that trusts keys refuses what is
            // not ours, and prepare is sent again when it is not found (case W35).
            tracing::warn!(guest = %self.record.address, "the broker has a message of prepare's id already");
        }
        for event in answers::published(answer) {
            self.take_in(event).await?;
        }
        Ok(())
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
        let asked = answers::asked(&self.record, state);
        self.learn(asked.event).await?;
        match asked.look {
            Some(look) => self.look_for_prepare(look).await,
            None => Ok(()),
        }
    }

    async fn look_for_prepare(&mut self, look: Look) -> Result<()> {
        let queue = self.record.address.queue();
        let deadline = Deadline::after(OPERATION);
        let status = self.inner.broker.status(&queue, deadline).await;
        match answers::looked(&self.record, look, status) {
            Looked::Fine => Ok(()),
            Looked::Learnt(event) => self.take_in(event).await,
            Looked::MayBeDead => {
                let broker = self.inner.broker.as_ref();
                let ours = |letter: &Message| self.inner.is_prepare(&self.record, letter);
                let reason = why_dead(broker, &queue, ours, deadline).await;
                match answers::read_dead_letters(look, reason) {
                    Some(event) => self.take_in(event).await,
                    None => Ok(()),
                }
            }
        }
    }

    /// Makes sure that no guest runs prepare from now on, or finds that one does.
    ///
    /// Three things hold it: a guest that is there writes down that it will never start it, or answers
    /// that it is too late; the queue is deleted, and the broker says whether prepare was still in it;
    /// and a guest starts nothing without a confirmed ack from a queue that it is attached to.
    async fn revoke(&mut self) -> Result<()> {
        let command = self.record.command.clone();
        let mut withdrawn = false;
        if answers::has_to_be_withdrawn(&self.record) {
            let asker = self.inner.asker(&self.record.address);
            match answers::withdrew(asker.withdraw(&command, PING).await) {
                Withdrew::Learnt(event) => return self.learn(event).await,
                Withdrew::Fence {
                    withdrawn: by_guest,
                } => withdrawn = by_guest,
            }
        }
        let taken = match self.inner.take_queue(&self.record.address).await {
            Ok(taken) => taken,
            Err(error) => return self.revoking_failed(error).await,
        };
        self.learn(answers::fenced(&command, withdrawn, taken))
            .await
    }

    async fn revoking_failed(&mut self, error: Error) -> Result<()> {
        let since = *self.revoking_fails_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= STUCK_AFTER {
            if self.record.sent == Sent::Never {
                // It was never published, so nothing can run. What is left of its queue goes when the
                // broker is back.
                return self.learn(Event::Fenced { discarded: 0 }).await;
            }
            self.tell.send_modify(|progress| progress.stuck = true);
        }
        self.trouble(Trouble::from(&error)).await
    }

    /// Learns this, and waits a little if it is that something is in the way.
    async fn take_in(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Trouble(trouble) => self.trouble(trouble).await,
            event => self.learn(event).await,
        }
    }

    /// Something is in the way: remembers it, and waits a little.
    async fn trouble(&mut self, trouble: Trouble) -> Result<()> {
        tracing::debug!(guest = %self.record.address, kind = %trouble.kind, detail = trouble.detail, "waiting");
        self.learn(Event::Trouble(trouble)).await?;
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
                if matches!(report.event, ReportEvent::Hello) {
                    // It is up: whatever is waited for can be tried at once.
                    self.backoff = fast_backoff();
                }
                match answers::reported(&self.record, report) {
                    Some(Event::Refused(reason)) if self.inner.signer.is_some() => {
                        self.refused(reason).await?;
                    }
                    Some(event) => self.learn(event).await?,
                    None => {}
                }
                let settled = delivery.ack(Deadline::after(OPERATION)).await;
                if let Err(error) = settled {
                    tracing::debug!(%error, "a report was not settled; it comes again");
                }
                Ok(())
            }
        }
    }

    /// The guest has refused a message of prepare's id: it has failed if that was ours, and it is told
    /// if it was not (case W35). The true one is looked for, and sent again where it is not found.
    async fn refused(&mut self, reason: RemoteError) -> Result<()> {
        let (broker, queue) = (self.inner.broker.as_ref(), self.record.address.queue());
        let ours = |letter: &Message| self.inner.is_prepare(&self.record, letter);
        let deadline = Deadline::after(OPERATION);
        let event = match why_dead(broker, &queue, ours, deadline).await {
            Ok(Some(_)) => Event::Refused(reason),
            _ => {
                let detail =
                    format!("it refused a message of prepare's id that is not ours: {reason}");
                let kind = ReasonKind::NotTrusted;
                Event::Trouble(Trouble { kind, detail })
            }
        };
        self.learn(event).await
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
            meter::learnt(&self.record, &next);
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
    is_wanted: impl Fn(&Message) -> bool,
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
            .find(|letter| is_wanted(&letter.message));
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
    use crate::{CommandId, GuestAddress, GuestId, broker::ConsumeOptions};

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
        let ours = |letter: &Message| letter.id == command;
        let look = async || why_dead(broker.as_ref(), &queue, ours, within).await;
        assert_eq!(look().await.unwrap(), None);
        let prepare = Message::new("prepare", "").unwrap();
        bury(prepare.with_id(command.clone()), "version 9").await;
        assert_eq!(look().await.unwrap().as_deref(), Some("version 9"));
    }
}
