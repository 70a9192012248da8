//! The machine's agent in the model. What it decides, the product's own keeper of the journal decides; the
//! order of its steps is that of the agent's main loop, with a kill possible between any two.

use std::{
    future::Future,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use serde_json::value::RawValue;

use crate::{
    error::Result,
    wire::{CommandResult, CommandState, Receipt, RemoteError, ReportEvent},
    workflow::{
        guest::{
            Interrupted,
            book::{Admission, Keeper},
        },
        journal::{Entry, EntryState, Journal as _, MemoryJournal},
        model::{
            Sabotage,
            world::{Fixed, Reports, fixed},
        },
    },
};

/// A machine: its disk, and its agent if it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Guest {
    /// What its journal says of prepare.
    pub(super) noted: Option<Noted>,
    /// What its journal says of the machine.
    pub(super) dismissed: bool,
    pub(super) agent: Option<Agent>,
}

/// A journal's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Noted {
    pub(super) state: Step,
    pub(super) runs: u8,
    reported: bool,
}

/// How far prepare is at the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Step {
    Unknown,
    Accepted,
    Running,
    Done { well: bool },
    Withdrawn,
}

/// A process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Agent {
    pub(super) attached: bool,
    /// It has been attached once: it serves, whatever became of its queue.
    pub(super) serves: bool,
    pub(super) hand: Hand,
    pub(super) running: bool,
    outbox: Vec<Told>,
}

/// What the main loop holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Hand {
    #[default]
    Empty,
    /// A delivery; its lease may be gone by now.
    Received { lease: bool },
    /// The same, in the journal: to be acked.
    Admitted { lease: bool, run: bool },
    /// The ack was confirmed: to be started.
    Acked,
}

/// A report that waits to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Told {
    Accepted,
    Done,
}

impl Reports {
    pub(super) fn add(&mut self, told: Told) {
        match told {
            Told::Accepted => self.accepted = true,
            Told::Done => self.done = true,
        }
    }

    pub(super) fn remove(&mut self, told: Told) {
        match told {
            Told::Accepted => self.accepted = false,
            Told::Done => self.done = false,
        }
    }

    pub(super) fn has(self, told: Told) -> bool {
        match told {
            Told::Accepted => self.accepted,
            Told::Done => self.done,
        }
    }
}

impl Guest {
    pub(super) fn holds_lease(&self) -> bool {
        self.agent.as_ref().is_some_and(|agent| {
            matches!(
                agent.hand,
                Hand::Received { lease: true } | Hand::Admitted { lease: true, .. }
            )
        })
    }

    /// Its connection, or its queue, is gone. True: it held a delivery, which is not its any more.
    pub(super) fn lose_lease(&mut self) -> bool {
        let held = self.holds_lease();
        if let Some(agent) = &mut self.agent {
            agent.hand = match agent.hand {
                Hand::Received { .. } => Hand::Received { lease: false },
                Hand::Admitted { run, .. } => Hand::Admitted { lease: false, run },
                other => other,
            };
        }
        held
    }

    /// A process starts, and reads the journal.
    pub(super) fn boot(&mut self, machine: usize) {
        self.agent = Some(Agent::default());
        // Its keeper queues what was not reported yet.
        let outbox = self.keep(machine, async |keeper| {
            let fresh = Keeper::new(Arc::new(MemoryJournal::default()), entries(keeper));
            keeper.outbox = fresh.outbox;
            Ok(())
        });
        debug_assert!(outbox.is_ok());
    }

    /// Prepare has arrived. Returns whether it is to be started once its ack is confirmed.
    pub(super) fn accept(&mut self, machine: usize, sabotage: Option<Sabotage>) -> bool {
        let known = self.noted.is_some();
        let admission = self.keep(machine, async |keeper| {
            keeper.accept(&fixed(machine).wire).await
        });
        let run = matches!(admission, Ok(Admission::Run));
        if known && sabotage == Some(Sabotage::JournalIsNotAsked) {
            let noted = self.noted.as_mut().expect("it is known");
            noted.state = Step::Accepted;
            return true;
        }
        run
    }

    /// Its ack was confirmed, or was not. Returns whether it is to be started.
    pub(super) fn may_start(run: bool, confirmed: bool) -> bool {
        let admission = match run {
            true => Admission::Run,
            false => Admission::Known,
        };
        admission.may_start(confirmed)
    }

    /// Returns whether its handler starts.
    pub(super) fn start(&mut self, machine: usize) -> bool {
        let command = &fixed(machine).command;
        self.keep(machine, async |keeper| keeper.start(command).await)
            .is_ok_and(|entry| entry.is_some())
    }

    pub(super) fn finish(&mut self, machine: usize, well: bool) {
        let result = result(well);
        let command = &fixed(machine).command;
        let finished = self.keep(machine, async |keeper| keeper.finish(command, result).await);
        debug_assert!(finished.is_ok());
    }

    /// What was running when the last process ended (case W9). Returns whether it starts again.
    pub(super) fn take_up(&mut self, machine: usize, choice: Interrupted) -> bool {
        match choice {
            Interrupted::RunAgain => self.start(machine),
            Interrupted::Fail => {
                self.finish(machine, false);
                false
            }
        }
    }

    pub(super) fn withdraw(&mut self, machine: usize, sabotage: Option<Sabotage>) -> CommandState {
        let before = self.noted;
        let command = fixed(machine).command.clone();
        let state = self.keep(machine, async |keeper| keeper.withdraw(command).await);
        if sabotage == Some(Sabotage::WithdrawalIsNotWritten) {
            self.noted = before;
        }
        state.expect("a journal in memory takes everything")
    }

    pub(super) fn dismiss(&mut self, machine: usize) {
        let dismissed = self.keep(machine, async |keeper| keeper.dismiss().await);
        debug_assert!(dismissed.is_ok());
        self.dismissed = true;
    }

    pub(super) fn next_report(&self) -> Option<Told> {
        self.agent.as_ref()?.outbox.first().copied()
    }

    pub(super) fn reported(&mut self, machine: usize) {
        let reported = self.keep(machine, async |keeper| keeper.reported().await);
        debug_assert!(reported.is_ok());
    }

    /// What it answers when it is asked for prepare.
    pub(super) fn command_state(&self) -> CommandState {
        match &self.noted {
            Some(noted) => noted.entry(fixed(0)).command_state(),
            None => CommandState::Unknown,
        }
    }

    /// A report as it travels.
    pub(super) fn report(&self, machine: usize, told: Told) -> ReportEvent {
        let command = fixed(machine).command.clone();
        match (told, self.command_state()) {
            (Told::Done, CommandState::Done(receipt)) => ReportEvent::Done { command, receipt },
            (Told::Done, _) => {
                // Its journal was sabotaged since.
                let receipt = Receipt::new(1, result(true));
                ReportEvent::Done { command, receipt }
            }
            (Told::Accepted, _) => ReportEvent::Accepted { command },
        }
    }

    /// Runs the product's keeper on this machine's disk and on what its process remembers.
    fn keep<T>(
        &mut self,
        machine: usize,
        work: impl AsyncFnOnce(&mut Keeper) -> Result<T>,
    ) -> Result<T> {
        let fixed = fixed(machine);
        let journal = MemoryJournal::default();
        let loaded: Vec<Entry> = self.noted.iter().map(|noted| noted.entry(fixed)).collect();
        for entry in &loaded {
            at_once(journal.save(entry))?;
        }
        let mut keeper = Keeper::new(Arc::new(journal.clone()), loaded);
        let agent = self.agent.as_mut().expect("only an agent that runs acts");
        keeper.outbox.clear();
        for told in agent.outbox.drain(..) {
            let command = fixed.command.clone();
            let event = match (told, keeper.state_of(&command)) {
                (Told::Done, CommandState::Done(receipt)) => ReportEvent::Done { command, receipt },
                _ => ReportEvent::Accepted { command },
            };
            keeper.outbox.push_back((fixed.reports.clone(), event));
        }
        if self.dismissed {
            at_once(keeper.dismiss())?;
        }
        let done = at_once(work(&mut keeper));
        let on_disk = at_once(journal.load())?;
        self.noted = on_disk.first().map(Noted::of);
        let believed = keeper.entries.get(&fixed.command).map(Noted::of);
        assert_eq!(
            self.noted, believed,
            "the keeper believes what is not on disk"
        );
        for (_, event) in &keeper.outbox {
            let told = match event {
                ReportEvent::Done { .. } => Told::Done,
                _ => Told::Accepted,
            };
            // Once more is no news to anybody.
            if !agent.outbox.contains(&told) {
                agent.outbox.push(told);
            }
        }
        done
    }
}

impl Noted {
    fn of(entry: &Entry) -> Self {
        let state = match &entry.state {
            EntryState::Accepted => Step::Accepted,
            EntryState::Running => Step::Running,
            EntryState::Done(result) => Step::Done {
                well: matches!(result, CommandResult::Ok(_)),
            },
            EntryState::Withdrawn => Step::Withdrawn,
        };
        Self {
            state,
            runs: u8::try_from(entry.runs).expect("few"),
            reported: entry.reported,
        }
    }

    fn entry(self, fixed: &Fixed) -> Entry {
        let mut entry = Entry::accepted(&fixed.wire);
        entry.state = match self.state {
            Step::Accepted | Step::Unknown => EntryState::Accepted,
            Step::Running => EntryState::Running,
            Step::Done { well } => EntryState::Done(result(well)),
            Step::Withdrawn => EntryState::Withdrawn,
        };
        entry.runs = u32::from(self.runs);
        entry.reported = self.reported;
        entry
    }
}

impl Step {
    pub(super) fn of(state: &CommandState) -> Self {
        match state {
            CommandState::Unknown => Self::Unknown,
            CommandState::Accepted => Self::Accepted,
            CommandState::Running { .. } => Self::Running,
            CommandState::Done(receipt) => Self::Done {
                well: matches!(receipt.result, CommandResult::Ok(_)),
            },
            CommandState::Withdrawn => Self::Withdrawn,
        }
    }

    pub(super) fn command_state(self) -> CommandState {
        match self {
            Self::Unknown => CommandState::Unknown,
            Self::Accepted => CommandState::Accepted,
            Self::Running => CommandState::Running { runs: 1 },
            Self::Done { well } => CommandState::Done(Receipt::new(1, result(well))),
            Self::Withdrawn => CommandState::Withdrawn,
        }
    }
}

fn entries(keeper: &Keeper) -> Vec<Entry> {
    keeper.entries.values().cloned().collect()
}

fn result(well: bool) -> CommandResult {
    if well {
        CommandResult::Ok(RawValue::NULL.to_owned().into())
    } else {
        CommandResult::Error(RemoteError::new("failed", ""))
    }
}

/// A future that waits for nothing: a journal in memory never does.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("the keeper waits for something other than its journal"),
    }
}
