//! The one place where a guest decides what may run: a task that owns the journal.
//!
//! Everything that changes a command's state passes through it in turn, so that a withdrawal and a
//! start of the same command cannot both win (case W37). Nothing is answered before it is on disk.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::{
    error::{Error, ErrorKind, Result},
    message::CommandId,
    names::QueueName,
    wire::{
        Command, CommandResult, CommandState, LastCommand, Payload, Phase, Receipt, RemoteError,
        ReportEvent,
    },
    workflow::journal::{Entry, EntryState, Journal},
};

/// How many finished commands a journal remembers, to know them again if they are re-sent.
const REMEMBERED: usize = 10_000;

/// How many reports wait at most, beside those that the journal holds anyway.
const WAITING_REPORTS: usize = 1_024;

/// A handle to the task. It ends with its last handle.
#[derive(Clone, Debug)]
pub(crate) struct Book {
    ops: mpsc::Sender<Op>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    snapshot: Mutex<Snapshot>,
    changes: watch::Sender<u64>,
    dismissed: watch::Sender<bool>,
    nudged: Notify,
}

/// What a ping is answered from, without waiting for any disk (law R4).
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub(crate) phase: Phase,
    pub(crate) last_command: Option<LastCommand>,
    pub(crate) refused: u64,
    pub(crate) repeated: u64,
}

/// What to do with a command that has arrived.
#[derive(Debug)]
pub(crate) enum Admission {
    /// Ack it, and start it once the ack is confirmed.
    Run,
    /// Ack it: it was dealt with before, or never will be.
    Known,
}

impl Admission {
    /// Whether to start it, now that its ack was confirmed, or was not. An ack that was not confirmed may
    /// have been no ack at all: the command comes again, or was taken back.
    pub(crate) fn may_start(&self, ack_confirmed: bool) -> bool {
        ack_confirmed && matches!(self, Self::Run)
    }
}

#[derive(Debug)]
enum Op {
    Accept(Box<Command>, oneshot::Sender<Result<Admission>>),
    Start(CommandId, oneshot::Sender<Result<Option<Entry>>>),
    Progress(CommandId, Payload, oneshot::Sender<Result<()>>),
    Finish(CommandId, CommandResult, oneshot::Sender<Result<()>>),
    Withdraw(CommandId, oneshot::Sender<Result<CommandState>>),
    Status(CommandId, oneshot::Sender<Result<CommandState>>),
    Dismiss(oneshot::Sender<Result<()>>),
    Report(QueueName, ReportEvent, oneshot::Sender<Result<()>>),
    NextReport(oneshot::Sender<Result<Option<(QueueName, ReportEvent)>>>),
    Reported(oneshot::Sender<Result<()>>),
    Interrupted(oneshot::Sender<Result<Vec<CommandId>>>),
}

impl Book {
    /// Reads the journal and starts the task.
    pub(crate) async fn open(journal: Arc<dyn Journal>) -> Result<Self> {
        let loaded = journal.load().await?;
        let keeper = Keeper::new(journal, loaded);
        let shared = keeper.shared.clone();
        let (ops, inbox) = mpsc::channel(64);
        tokio::spawn(keeper.run(inbox));
        Ok(Self { ops, shared })
    }

    /// A command has arrived. Ok: it is in the journal.
    pub(crate) async fn accept(&self, command: Command) -> Result<Admission> {
        self.ask(|to| Op::Accept(Box::new(command), to)).await
    }

    /// Its ack is confirmed: notes that its handler starts. None if it may not.
    pub(crate) async fn start(&self, command: CommandId) -> Result<Option<Entry>> {
        self.ask(|to| Op::Start(command, to)).await
    }

    pub(crate) async fn progress(&self, command: CommandId, detail: Payload) -> Result<()> {
        self.ask(|to| Op::Progress(command, detail, to)).await
    }

    pub(crate) async fn finish(&self, command: CommandId, result: CommandResult) -> Result<()> {
        self.ask(|to| Op::Finish(command, result, to)).await
    }

    pub(crate) async fn withdraw(&self, command: CommandId) -> Result<CommandState> {
        self.ask(|to| Op::Withdraw(command, to)).await
    }

    pub(crate) async fn status(&self, command: CommandId) -> Result<CommandState> {
        self.ask(|to| Op::Status(command, to)).await
    }

    pub(crate) async fn dismiss(&self) -> Result<()> {
        self.ask(Op::Dismiss).await
    }

    /// Puts a report into the outbox.
    pub(crate) async fn report(&self, to: QueueName, event: ReportEvent) -> Result<()> {
        self.ask(|reply| Op::Report(to, event, reply)).await
    }

    /// The report to send next; it stays the next until [`Book::reported`].
    pub(crate) async fn next_report(&self) -> Result<Option<(QueueName, ReportEvent)>> {
        self.ask(Op::NextReport).await
    }

    /// The next report is stored at the broker.
    pub(crate) async fn reported(&self) -> Result<()> {
        self.ask(Op::Reported).await
    }

    /// The commands that were running when the journal's last owner ended.
    pub(crate) async fn interrupted(&self) -> Result<Vec<CommandId>> {
        self.ask(Op::Interrupted).await
    }

    /// Counts up whenever anything changes.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    /// Becomes true when this machine is given up.
    pub(crate) fn dismissed(&self) -> watch::Receiver<bool> {
        self.shared.dismissed.subscribe()
    }

    /// Somebody asks for this guest: what it waits for may be there.
    pub(crate) fn nudge(&self) {
        self.shared.nudged.notify_one();
    }

    /// Waits for a nudge, one that came since the last wait included.
    pub(crate) async fn nudged(&self) {
        self.shared.nudged.notified().await;
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        self.shared.lock().clone()
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.shared.lock().phase = phase;
    }

    /// Something was refused, before it came to the journal.
    pub(crate) fn count_refused(&self) {
        self.shared.lock().refused += 1;
    }

    /// A command came again.
    pub(crate) fn count_repeated(&self) {
        self.shared.lock().repeated += 1;
    }

    async fn ask<T>(&self, op: impl FnOnce(oneshot::Sender<Result<T>>) -> Op) -> Result<T> {
        let closed = || Error::new(ErrorKind::Closed, "the guest has ended");
        let (to, answer) = oneshot::channel();
        self.ops.send(op(to)).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Snapshot> {
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The task's own state. The model check runs it too, in a world of its own.
pub(crate) struct Keeper {
    journal: Arc<dyn Journal>,
    pub(crate) entries: HashMap<CommandId, Entry>,
    pub(crate) outbox: VecDeque<(QueueName, ReportEvent)>,
    shared: Arc<Shared>,
    finished: usize,
}

impl Keeper {
    /// Goes on from what a journal holds.
    pub(crate) fn new(journal: Arc<dyn Journal>, loaded: Vec<Entry>) -> Self {
        let mut keeper = Self {
            journal,
            entries: HashMap::new(),
            outbox: VecDeque::new(),
            shared: Arc::new(Shared {
                snapshot: Mutex::new(Snapshot {
                    phase: Phase::WaitingForQueue,
                    last_command: loaded.last().map(last_command),
                    refused: 0,
                    repeated: 0,
                }),
                changes: watch::Sender::new(0),
                dismissed: watch::Sender::new(false),
                nudged: Notify::new(),
            }),
            // What earlier processes left counts too: an agent that is started often must forget as well.
            finished: loaded.iter().filter(|entry| entry.is_finished()).count(),
        };
        for entry in loaded {
            // Case W10: it ended, and nobody was told.
            keeper.queue_receipt(&entry);
            keeper.entries.insert(entry.command.clone(), entry);
        }
        keeper
    }

    async fn run(mut self, mut inbox: mpsc::Receiver<Op>) {
        while let Some(op) = inbox.recv().await {
            // A question changes nothing: telling of it would wake the one who asked, to ask again.
            let question = matches!(op, Op::NextReport(_) | Op::Status(..) | Op::Interrupted(_));
            // An asker that is gone does not mind: what was decided is in the journal.
            match op {
                Op::Accept(command, to) => _ = to.send(self.accept(&command).await),
                Op::Start(command, to) => _ = to.send(self.start(&command).await),
                Op::Progress(command, detail, to) => {
                    _ = to.send(self.progress(&command, detail).await);
                }
                Op::Finish(command, result, to) => _ = to.send(self.finish(&command, result).await),
                Op::Withdraw(command, to) => _ = to.send(self.withdraw(command).await),
                Op::Status(command, to) => _ = to.send(Ok(self.state_of(&command))),
                Op::Dismiss(to) => _ = to.send(self.dismiss().await),
                Op::Report(queue, event, to) => {
                    self.queue_report(queue, event);
                    _ = to.send(Ok(()));
                }
                Op::NextReport(to) => _ = to.send(Ok(self.outbox.front().cloned())),
                Op::Reported(to) => _ = to.send(self.reported().await),
                Op::Interrupted(to) => _ = to.send(Ok(self.interrupted())),
            }
            if !question {
                self.shared.changes.send_modify(|count| *count += 1);
            }
        }
    }

    pub(crate) async fn accept(&mut self, command: &Command) -> Result<Admission> {
        if let Some(entry) = self.entries.get(&command.command).cloned() {
            // Seen before (cases W8, W11): never run anew, but its sender is told again.
            return Ok(match entry.state {
                EntryState::Accepted => Admission::Run,
                EntryState::Running => {
                    self.queue_accepted(&entry);
                    Admission::Known
                }
                EntryState::Done(_) | EntryState::Withdrawn => {
                    self.queue_receipt_again(&entry);
                    Admission::Known
                }
            });
        }
        let mut entry = Entry::accepted(command);
        let refusal = self.refusal(&entry);
        if let Some(refusal) = &refusal {
            entry.state = EntryState::Done(CommandResult::Error(refusal.clone()));
            entry.reported = entry.reports.is_none();
        }
        self.save(entry.clone()).await?;
        if refusal.is_some() {
            self.queue_receipt(&entry);
            self.forget_the_oldest().await;
            return Ok(Admission::Known);
        }
        Ok(Admission::Run)
    }

    /// Why a new command cannot be run here: prepare comes first, and there is one (cases W16, W32).
    fn refusal(&self, entry: &Entry) -> Option<RemoteError> {
        let mut prepares = self.entries.values().filter(|old| old.is_prepare());
        if entry.is_prepare() {
            let first = prepares.find(|old| !matches!(old.state, EntryState::Withdrawn))?;
            return Some(RemoteError::new(
                "conflict",
                format!(
                    "this machine was prepared by command {} before",
                    first.command
                ),
            ));
        }
        let prepared =
            prepares.any(|old| matches!(old.state, EntryState::Done(CommandResult::Ok(_))));
        (!prepared).then(|| {
            RemoteError::new(
                "not_prepared",
                "this machine's prepare has not succeeded (yet)",
            )
        })
    }

    pub(crate) async fn start(&mut self, command: &CommandId) -> Result<Option<Entry>> {
        let Some(entry) = self.entries.get(command) else {
            return Ok(None);
        };
        if entry.is_finished() || *self.shared.dismissed.borrow() {
            return Ok(None);
        }
        let mut entry = entry.clone();
        entry.state = EntryState::Running;
        entry.runs += 1;
        self.save(entry.clone()).await?;
        self.queue_accepted(&entry);
        Ok(Some(entry))
    }

    async fn progress(&mut self, command: &CommandId, detail: Payload) -> Result<()> {
        let Some(entry) = self.entries.get(command) else {
            return Ok(());
        };
        let mut entry = entry.clone();
        entry.checkpoint = Some(detail.clone());
        let reports = entry.reports.clone();
        self.save(entry).await?;
        if let Some(reports) = reports {
            let command = command.clone();
            self.queue_report(reports, ReportEvent::Progress { command, detail });
        }
        Ok(())
    }

    pub(crate) async fn finish(
        &mut self,
        command: &CommandId,
        result: CommandResult,
    ) -> Result<()> {
        let Some(entry) = self.entries.get(command) else {
            return Ok(());
        };
        if entry.is_finished() {
            return Ok(());
        }
        let mut entry = entry.clone();
        entry.state = EntryState::Done(result);
        entry.checkpoint = None;
        entry.reported = entry.reports.is_none();
        self.save(entry.clone()).await?;
        self.queue_receipt(&entry);
        self.forget_the_oldest().await;
        Ok(())
    }

    /// One more has ended. A journal that cannot forget now does later: what ended is written down.
    async fn forget_the_oldest(&mut self) {
        self.finished += 1;
        if self.finished < 2 * REMEMBERED {
            return;
        }
        self.finished = REMEMBERED;
        if let Err(error) = self.prune().await {
            tracing::warn!(%error, "the journal keeps what it could forget");
        }
    }

    pub(crate) async fn withdraw(&mut self, command: CommandId) -> Result<CommandState> {
        let entry = match self.entries.get(&command) {
            None => Entry::withdrawn(command.clone()),
            Some(entry) if matches!(entry.state, EntryState::Accepted) => {
                let mut entry = entry.clone();
                entry.state = EntryState::Withdrawn;
                entry.reported = true;
                entry
            }
            // Too late (case W37): its handler was started.
            Some(entry) => return Ok(entry.command_state()),
        };
        self.save(entry).await?;
        Ok(self.state_of(&command))
    }

    pub(crate) async fn dismiss(&mut self) -> Result<()> {
        self.journal.dismiss().await?;
        self.shared.dismissed.send_replace(true);
        Ok(())
    }

    pub(crate) async fn reported(&mut self) -> Result<()> {
        let Some((queue, event)) = self.outbox.pop_front() else {
            return Ok(());
        };
        let ReportEvent::Done { command, .. } = &event else {
            return Ok(());
        };
        let Some(entry) = self.entries.get(command) else {
            return Ok(());
        };
        let mut entry = entry.clone();
        entry.reported = true;
        let saved = self.save(entry).await;
        if saved.is_err() {
            self.outbox.push_front((queue, event));
        }
        saved
    }

    pub(crate) fn interrupted(&self) -> Vec<CommandId> {
        let running = |entry: &&Entry| matches!(entry.state, EntryState::Running);
        self.entries
            .values()
            .filter(running)
            .map(|entry| entry.command.clone())
            .collect()
    }

    pub(crate) fn state_of(&self, command: &CommandId) -> CommandState {
        self.entries
            .get(command)
            .map_or(CommandState::Unknown, Entry::command_state)
    }

    async fn save(&mut self, entry: Entry) -> Result<()> {
        self.journal.save(&entry).await?;
        let known = self
            .shared
            .lock()
            .last_command
            .as_ref()
            .map(|last| last.command.clone());
        if known.as_ref() == Some(&entry.command) || !entry.is_finished() {
            self.shared.lock().last_command = Some(last_command(&entry));
        }
        self.entries.insert(entry.command.clone(), entry);
        Ok(())
    }

    async fn prune(&mut self) -> Result<()> {
        self.journal.prune(REMEMBERED).await?;
        let kept = self.journal.load().await?;
        self.entries = kept
            .into_iter()
            .map(|entry| (entry.command.clone(), entry))
            .collect();
        Ok(())
    }

    fn queue_accepted(&mut self, entry: &Entry) {
        if let Some(reports) = entry.reports.clone() {
            let command = entry.command.clone();
            self.queue_report(reports, ReportEvent::Accepted { command });
        }
    }

    /// Queues the report of an end that nobody was told of yet.
    fn queue_receipt(&mut self, entry: &Entry) {
        if !entry.reported {
            self.queue_receipt_again(entry);
        }
    }

    fn queue_receipt_again(&mut self, entry: &Entry) {
        let (Some(reports), EntryState::Done(result)) = (&entry.reports, &entry.state) else {
            return;
        };
        let receipt = Receipt::new(entry.runs, result.clone());
        let command = entry.command.clone();
        self.outbox
            .push_back((reports.clone(), ReportEvent::Done { command, receipt }));
    }

    /// Reports of ends are never dropped; of the others the newest count.
    fn queue_report(&mut self, queue: QueueName, event: ReportEvent) {
        // One hello is as good as many, unless it is the first: that may be at the broker by now.
        let is_hello = |event: &ReportEvent| matches!(event, ReportEvent::Hello);
        if is_hello(&event) && self.outbox.iter().skip(1).any(|(_, event)| is_hello(event)) {
            return;
        }
        if self.outbox.len() >= WAITING_REPORTS {
            let ends = |event: &ReportEvent| matches!(event, ReportEvent::Done { .. });
            // The first may be on its way to the broker at this moment.
            if let Some(oldest) = (1..self.outbox.len()).find(|&at| !ends(&self.outbox[at].1)) {
                self.outbox.remove(oldest);
            }
        }
        self.outbox.push_back((queue, event));
    }
}

fn last_command(entry: &Entry) -> LastCommand {
    LastCommand::new(
        entry.command.clone(),
        entry.kind.clone(),
        entry.command_state().name(),
    )
}
