//! The world that is checked: what is durable, what a process only remembers, what is under way.

use std::sync::OnceLock;

use serde_json::value::RawValue;

use crate::{
    message::{CommandId, MessageId},
    names::{GuestAddress, GuestId, Incarnation, QueueName},
    wire::{BootId, Command, PREPARE},
    workflow::{
        model::{
            guest::Guest,
            record::{Clock, Rec},
            taskmanager::Taskmanager,
        },
        record::{Deadlines, Record, SendPolicy, State},
    },
};

/// One state of everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    /// By incarnation, the first at 0.
    pub(super) machines: Vec<Machine>,
    pub(super) taskmanagers: Vec<Option<Taskmanager>>,
    pub(super) left: Left,
}

/// One incarnation of the guest: its record, its queue, its agent, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Machine {
    /// On the control plane's disk; none before it is asked for.
    pub(super) saved: Option<Rec>,
    pub(super) clock: Clock,
    /// Copies of prepare that wait in the queue; none: there is no queue. What the agent holds unsettled
    /// is with the agent.
    pub(super) queue: Option<u8>,
    pub(super) late: Late,
    pub(super) guest: Guest,
    /// Reports in the control plane's queue.
    pub(super) reports: Reports,
    /// How often prepare's handler was started.
    pub(super) runs: u8,
    /// The outcome that was recorded first, and the one that a caller was told.
    pub(super) first: Option<State>,
    pub(super) told: Option<State>,
    /// Another outcome was recorded or told later.
    pub(super) contradicted: bool,
    /// The handler was started after the guest's own word had ended it.
    pub(super) started_after_end: bool,
}

/// Requests whose sender gave up on them, and that the broker may still carry out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Late {
    pub(super) publishes: u8,
    pub(super) delete: bool,
    pub(super) withdraw: bool,
}

/// At least once and in any order: which kinds are there is all that matters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Reports {
    pub(super) accepted: bool,
    pub(super) done: bool,
}

/// What may still go wrong, each so many times: the bounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Left {
    /// Kills of a taskmanager.
    pub(super) taskmanager_kills: u8,
    /// Kills of a guest's agent.
    pub(super) guest_kills: u8,
    /// Answers or requests lost, delayed or refused; connections cut.
    pub(super) network: u8,
    /// Queues purged or deleted by somebody else.
    pub(super) operator: u8,
    /// Cancels, and hosts that fail.
    pub(super) give_ups: u8,
}

impl Machine {
    fn new(saved: Option<Rec>) -> Self {
        Self {
            saved,
            clock: Clock::Early,
            queue: None,
            late: Late::default(),
            guest: Guest::default(),
            reports: Reports::default(),
            runs: 0,
            first: None,
            told: None,
            contradicted: false,
            started_after_end: false,
        }
    }

    /// Copies in the queue, the one in flight included.
    pub(super) fn copies(&self) -> u8 {
        self.queue
            .map_or(0, |ready| ready + u8::from(self.guest.holds_lease()))
    }

    /// A caller hears of this outcome.
    pub(super) fn tell(&mut self, outcome: State) {
        let known = self.told.or(self.first).unwrap_or(outcome);
        self.contradicted |= known != outcome;
        self.told = Some(outcome);
    }

    /// This record is on disk now.
    pub(super) fn save(&mut self, record: &Rec) {
        if record.is_terminal() {
            let known = self.first.or(self.told).unwrap_or(record.state());
            self.contradicted |= known != record.state();
            self.first.get_or_insert(record.state());
        }
        self.saved = Some(record.clone());
    }
}

impl World {
    /// A prepare was just accepted and recorded.
    pub(super) fn new(
        policy: SendPolicy,
        machines: usize,
        taskmanagers: usize,
        left: Left,
    ) -> Self {
        let record = new_record(0, policy);
        let mut world = Self {
            machines: vec![Machine::new(None); machines],
            taskmanagers: vec![None; taskmanagers],
            left,
        };
        world.machines[0].saved = Some(record.clone());
        world.taskmanagers[0] = Some(Taskmanager::driving(0, record, machines));
        world
    }

    /// The newest incarnation that was asked for.
    pub(super) fn newest(&self) -> usize {
        let recorded = |machine: &Machine| machine.saved.is_some();
        self.machines.iter().rposition(recorded).unwrap_or(0)
    }

    pub(super) fn newest_record(&self) -> Option<&Rec> {
        self.machines[self.newest()].saved.as_ref()
    }
}

/// A machine's record at its beginning.
pub(super) fn new_record(machine: usize, policy: SendPolicy) -> Rec {
    let fixed = fixed(machine);
    let mut record = Record::new(
        fixed.address.clone(),
        fixed.wire.payload.clone(),
        policy,
        Deadlines::default(),
        0,
    );
    record.command = fixed.command.clone();
    Rec::new(record)
}

/// What never changes of a machine.
pub(super) struct Fixed {
    pub(super) address: GuestAddress,
    pub(super) command: CommandId,
    pub(super) wire: Command,
    pub(super) boot: BootId,
    pub(super) reports: QueueName,
}

pub(super) fn fixed(machine: usize) -> &'static Fixed {
    static FIXED: OnceLock<Vec<Fixed>> = OnceLock::new();
    &FIXED.get_or_init(|| (1..=2).map(make_fixed).collect())[machine]
}

fn make_fixed(number: u64) -> Fixed {
    let guest = GuestId::new("vm").unwrap();
    let address = GuestAddress::new(guest, Incarnation::new(number).unwrap());
    let command = CommandId::new(format!("prepare-{number}")).unwrap();
    let reports = QueueName::reports("main").unwrap();
    let wire = Command::new(
        &address,
        command.clone(),
        MessageId::new(PREPARE).unwrap(),
        Some(reports.clone()),
        RawValue::NULL.to_owned(),
    );
    Fixed {
        address,
        command,
        wire,
        boot: BootId::new("boot").unwrap(),
        reports,
    }
}
