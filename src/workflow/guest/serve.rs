//! The guest's main loop: one command at a time, in order, each step on disk before the next.

use std::{future::Future, pin::pin, time::Duration};

use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tracing::Instrument as _;

use crate::{
    backoff::Backoff,
    broker::{Consumer, Delivery},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    message::{CommandId, Message, TraceContext},
    sign::{Guard, Time, expired},
    wire::{Command, CommandResult, CommandState, Phase, RemoteError, ReportEvent},
    workflow::{
        guest::{
            Guest, Served,
            book::Admission,
            context::{Context, Interrupted},
        },
        is_set,
        journal::Entry,
        meter,
    },
};

const SETTLE_WITHIN: Duration = Duration::from_secs(10);

/// How long a command waits that the journal had no room for.
const JOURNAL_TROUBLE: Duration = Duration::from_secs(1);

/// How long reports get to leave when the guest stops; what does not leave is in the journal.
const LAST_REPORTS: Duration = Duration::from_secs(3);

/// A handler that runs.
struct Running {
    command: CommandId,
    task: JoinHandle<CommandResult>,
    cancel: watch::Sender<bool>,
}

/// Nothing runs without the guest that writes down what came of it: a second one, on the same
/// journal, would run it beside this one.
impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(super) async fn serve(mut guest: Guest, shutdown: impl Future<Output = ()>) -> Result<Served> {
    let mut shutdown = pin!(shutdown);
    let mut dismissed = guest.book.dismissed();
    let mut interrupted = guest.book.interrupted().await?;
    let mut lane_ended = std::mem::replace(&mut guest.lane_ended, oneshot::channel().1);
    let mut running: Option<Running> = None;
    loop {
        if running.is_none()
            && let Some(command) = interrupted.pop()
        {
            running = guest.take_up(command).await?;
            continue;
        }
        let can_receive = running.is_none() && guest.consumer.is_some() && guest.held.is_none();
        let guard = guest.guard.clone().filter(|_| guest.held.is_some());
        let step = tokio::select! {
            biased;
            () = &mut shutdown => Step::Stop(Served::Stopped),
            () = is_set(&mut dismissed) => Step::Stop(Served::Revoked),
            ended = ended(&mut running) => Step::Ended(ended),
            lost = &mut lane_ended => Step::LaneLost(lost.ok()),
            () = time_told(guard.as_deref()) => Step::TimeTold,
            delivery = next(&mut guest.consumer), if can_receive => Step::Received(delivery),
        };
        match step {
            Step::Stop(why) => {
                stop(guest, running).await?;
                return Ok(why);
            }
            Step::Ended(result) => {
                if let Some(ended) = running.take() {
                    guest.finish(ended.command.clone(), result).await?;
                    guest.book.set_phase(Phase::Idle);
                }
            }
            Step::LaneLost(error) => {
                return Err(lane_lost(error));
            }
            Step::TimeTold => {
                if let Some(delivery) = guest.held.take() {
                    running = guest.receive(delivery).await?;
                }
            }
            Step::Received(Ok(delivery)) => running = guest.receive(delivery).await?,
            Step::Received(Err(error)) if *error.kind() == ErrorKind::QueueDeleted => {
                // Case W23: only the control plane makes queues; wait until it has.
                tracing::warn!(guest = %guest.address, "the queue was deleted; waiting for it to come back");
                guest.consumer = None;
                let forever = Deadline::after(Duration::MAX);
                tokio::select! {
                    biased;
                    () = &mut shutdown => {
                        stop(guest, running).await?;
                        return Ok(Served::Stopped);
                    }
                    () = is_set(&mut dismissed) => {}
                    // Without it nobody learns that it waits, and it would wait for ever.
                    lost = &mut lane_ended => return Err(lane_lost(lost.ok())),
                    attached = guest.attach_queue(forever) => attached?,
                }
            }
            Step::Received(Err(error)) => return Err(error),
        }
    }
}

fn lane_lost(error: Option<Error>) -> Error {
    error.unwrap_or_else(|| Error::new(ErrorKind::Internal, "the lane's task ended without a word"))
}

enum Step {
    Stop(Served),
    Ended(CommandResult),
    LaneLost(Option<Error>),
    TimeTold,
    Received(Result<Delivery>),
}

/// Waits until a guard was told the time that a held command waits for.
async fn time_told(guard: Option<&Guard>) {
    match guard {
        Some(guard) => guard.time_told().await,
        None => std::future::pending().await,
    }
}

async fn next(consumer: &mut Option<Box<dyn Consumer>>) -> Result<Delivery> {
    match consumer {
        Some(consumer) => consumer.next().await,
        None => std::future::pending().await,
    }
}

async fn ended(running: &mut Option<Running>) -> CommandResult {
    let Some(running) = running else {
        return std::future::pending().await;
    };
    match (&mut running.task).await {
        Ok(result) => result,
        Err(error) => {
            let message = match error.try_into_panic() {
                Ok(panic) => panic_text(panic.as_ref()),
                Err(_) => "the handler was aborted".into(),
            };
            CommandResult::Error(RemoteError::new("panicked", message))
        }
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .map_or_else(
            || "the handler panicked".into(),
            |text| format!("the handler panicked: {text}"),
        )
}

/// Ends in bounded time (law F8): what runs gets its grace, what was finished is reported if the
/// broker lets it be, what was received goes back.
async fn stop(mut guest: Guest, running: Option<Running>) -> Result<()> {
    guest.book.set_phase(Phase::Stopping);
    guest.held = None;
    if let Some(running) = running {
        running.cancel.send_replace(true);
        let command = running.command.clone();
        let grace = guest.grace;
        let mut handler = Some(running);
        match timeout(grace, ended(&mut handler)).await {
            Ok(result) => {
                // A journal that refuses for good must not hold up the shutdown (law F8).
                match timeout(SETTLE_WITHIN, guest.finish(command.clone(), result)).await {
                    Ok(finished) => finished?,
                    Err(_) => tracing::error!(
                        guest = %guest.address, %command,
                        "the journal has no room for how it ended: interrupted"
                    ),
                }
            }
            Err(_) => {
                tracing::warn!(guest = %guest.address, %command, "still running after its grace: interrupted");
                drop(handler);
            }
        }
    }
    if let Some(consumer) = guest.consumer.take() {
        let closed = consumer.close(Deadline::after(SETTLE_WITHIN)).await;
        if let Err(error) = closed {
            tracing::warn!(guest = %guest.address, %error, "the consumer was dropped, not closed");
        }
    }
    let mut changes = guest.book.changes();
    let all_reported = async {
        while guest.book.next_report().await?.is_some() {
            changes.mark_unchanged();
            if guest.book.next_report().await?.is_none() || changes.changed().await.is_err() {
                break;
            }
        }
        Ok(())
    };
    let reported = timeout(LAST_REPORTS, all_reported).await.unwrap_or(Ok(()));
    guest.leave().await;
    reported
}

impl Guest {
    /// A command that was running when the last process ended (case W9).
    async fn take_up(&mut self, command: CommandId) -> Result<Option<Running>> {
        match self.handlers.interrupted {
            Interrupted::RunAgain => self.start(command).await,
            Interrupted::Fail => {
                let error = RemoteError::new(
                    "interrupted",
                    "the agent ended while this ran; it is not run a second time",
                );
                self.finish(command, CommandResult::Error(error)).await?;
                Ok(None)
            }
        }
    }

    async fn receive(&mut self, delivery: Delivery) -> Result<Option<Running>> {
        let within = Deadline::after(SETTLE_WITHIN);
        meter::delivered(delivery.attempt);
        let (command, time) = match self.read(&delivery.message).await {
            Ok(read) => read,
            Err(reason) => {
                self.refuse(delivery, reason).await?;
                return Ok(None);
            }
        };
        if matches!(time, Time::Unknown) {
            tracing::warn!(
                guest = %self.address, command = %command.command,
                "by this machine's clock it has expired: held until the control plane tells the time"
            );
            self.held = Some(delivery);
            return Ok(None);
        }
        let id = command.command.clone();
        let admission = match self.book.accept(command).await {
            Ok(admission) => admission,
            Err(error) => {
                // Not in the journal, so not accepted: it comes again, when there may be room.
                tracing::error!(guest = %self.address, command = %id, %error, "the journal refuses");
                settled(delivery.retry(JOURNAL_TROUBLE, within).await, &id);
                return Ok(None);
            }
        };
        meter::admitted(&admission);
        if matches!(admission, Admission::Known) {
            self.book.count_repeated();
        }
        if admission.may_start(settled(delivery.ack(within).await, &id)) {
            return self.start(id).await;
        }
        Ok(None)
    }

    /// The command that a message carries, if it is one for this machine, by whom it trusts (law S5), and
    /// whether it comes in time. Nothing of it was written down yet: one that is refused stands in the way
    /// of no other of its id.
    async fn read(&mut self, message: &Message) -> Result<(Command, Time), RemoteError> {
        let command = Command::from_message(message).map_err(|error| {
            let kind = match error.kind() {
                ErrorKind::VersionUnsupported => "version_unsupported",
                _ => "poison",
            };
            RemoteError::new(kind, error.to_string())
        })?;
        let guard = self.guard.as_deref();
        // By whom comes before whom for: a stranger learns nothing of this machine.
        let stamp = guard
            .map(|guard| command.check(message, guard))
            .transpose()?;
        if command.address() != self.address {
            return Err(RemoteError::new(
                "wrong_incarnation",
                "this command is for another machine",
            ));
        }
        let (Some(guard), Some(stamp)) = (guard, stamp) else {
            return Ok((command, Time::Valid));
        };
        // One that was accepted in time is known for good: its sender may ask late how it ended.
        let known = self.book.status(command.command.clone()).await;
        match guard.time(&stamp) {
            _ if !matches!(known, Ok(CommandState::Unknown)) => Ok((command, Time::Valid)),
            Time::Expired => Err(expired()),
            time => Ok((command, time)),
        }
    }

    /// Cases W28, W35: this message is not run. It is kept among the dead letters, counted and told.
    async fn refuse(&mut self, delivery: Delivery, reason: RemoteError) -> Result<()> {
        tracing::warn!(guest = %self.address, message = %delivery.message.id, %reason, "refused");
        meter::refused(&reason);
        self.book.count_refused();
        let message = delivery.message.id.clone();
        let within = Deadline::after(SETTLE_WITHIN);
        if settled(
            delivery.dead_letter(reason.to_string(), within).await,
            &message,
        ) {
            let event = ReportEvent::Refused { message, reason };
            self.book.report(self.reports.clone(), event).await?;
        }
        Ok(())
    }

    async fn start(&mut self, command: CommandId) -> Result<Option<Running>> {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let entry = loop {
            match self.book.start(command.clone()).await {
                Ok(Some(entry)) => break entry,
                Ok(None) => return Ok(None),
                Err(error) if *error.kind() == ErrorKind::Closed => return Err(error),
                Err(error) => {
                    tracing::error!(guest = %self.address, %command, %error, "the journal refuses");
                    backoff.pause().await;
                }
            }
        };
        self.book.set_phase(Phase::Busy);
        let (cancel, cancelled) = watch::channel(false);
        let task = tokio::spawn(self.run(entry, cancelled));
        Ok(Some(Running {
            command,
            task,
            cancel,
        }))
    }

    fn run(
        &self,
        entry: Entry,
        cancelled: watch::Receiver<bool>,
    ) -> impl Future<Output = CommandResult> + Send + use<> {
        let handler = self.handlers.by_kind.get(entry.kind.as_str()).cloned();
        let context = Context {
            address: self.address.clone(),
            command: entry.command,
            run: entry.runs,
            trace: entry.trace.clone(),
            checkpoint: entry.checkpoint,
            book: self.book.clone(),
            cancelled,
        };
        let span = tracing::info_span!(
            "command",
            guest = %context.address,
            command = %context.command,
            kind = %entry.kind,
            run = entry.runs,
            trace = entry.trace.as_ref().map(TraceContext::trace_id),
        );
        let run = async move {
            match handler {
                Some(handler) => handler(entry.payload, context).await,
                None => CommandResult::Error(RemoteError::new(
                    "unknown_command",
                    format!("this guest has no handler for {}", entry.kind),
                )),
            }
        };
        run.instrument(span)
    }

    /// Writes down how a command ended, for as long as it takes: its outcome must not be lost.
    async fn finish(&mut self, command: CommandId, result: CommandResult) -> Result<()> {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        loop {
            match self.book.finish(command.clone(), result.clone()).await {
                Ok(()) => return Ok(()),
                Err(error) if *error.kind() == ErrorKind::Closed => return Err(error),
                Err(error) => {
                    tracing::error!(guest = %self.address, %command, %error, "the journal refuses");
                    sleep(backoff.next()).await;
                }
            }
        }
    }
}

/// Whether a settlement was confirmed. If not, the broker delivers again (laws C3, C4).
fn settled(result: Result<()>, message: &CommandId) -> bool {
    if let Err(error) = &result {
        tracing::warn!(%message, %error, "not settled");
    }
    result.is_ok()
}
