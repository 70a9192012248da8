//! A model check of the workflow: every state that it can reach within stated bounds.
//!
//! The control plane, its guest's agent and a broker run in one small world in which any process can be
//! killed between any two steps, any answer can be lost or come too late, any deadline can pass at any
//! moment, and two control planes may drive one record. The decisions are the product's own: the state
//! machine ([`machine`](super::machine)), what a driver makes of an answer
//! ([`answers`](super::taskmanager::answers)), and the keeper of the agent's journal
//! ([`book`](super::guest::book)). The model adds the order of their requests, and the faults.
//!
//! [`tests`] says what was checked, within which bounds, and that a broken workflow is found.

mod action;
mod guest;
mod property;
mod record;
mod recovery;
mod taskmanager;
mod tests;
mod world;

use std::{collections::HashSet, sync::Mutex};

use stateright::{Model, Property};

use self::{
    action::Action,
    record::Rec,
    world::{Left, Machine, World},
};
use crate::workflow::{guest::Interrupted, record::SendPolicy};

/// What is checked: a world's size, its rules, and what may go wrong in it.
struct Workflow {
    policies: Vec<SendPolicy>,
    interrupted: Interrupted,
    machines: usize,
    taskmanagers: usize,
    /// Whether the broker knows an id again while a message of it is in the queue.
    dedup: bool,
    left: Left,
    /// How many copies of prepare are counted at most. A guest that takes its time between the confirmed
    /// ack and the start is sent one more each time that it is asked.
    most_copies: u32,
    handler_may_fail: bool,
    sabotage: Option<Sabotage>,
    /// Properties that are not looked at.
    unchecked: Vec<&'static str>,
    /// States from which the end is known to be reached; see [`recovery`].
    ends: [Mutex<HashSet<u64>>; 2],
}

/// One thing made wrong on purpose, to see that the check finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sabotage {
    /// The agent starts a command whose ack was not confirmed.
    StartWithoutAck,
    /// The agent runs a command that its journal knows.
    JournalIsNotAsked,
    /// The agent's journal does not survive its process.
    JournalIsNotDurable,
    /// The agent answers a withdrawal that it did not write down.
    WithdrawalIsNotWritten,
    /// NotDelivered is recorded before the delete was answered.
    DeleteIsNotAwaited,
    /// One copy of prepare that came back counts as all that were sent.
    OneCopyIsAll,
    /// Prepare is sent once more before that is on disk.
    PublishIsNotCounted,
    /// A caller is told the outcome before it is on disk.
    ToldBeforeSaved,
    /// A save that another taskmanager has overtaken is not refused.
    RevisionsAreNotChecked,
    /// What is neither in the queue nor at the guest is not sent again.
    LostIsNotSentAgain,
    /// The broker confirms an ack after its queue was deleted.
    AckAfterDeleteIsOk,
    /// The broker stores one publish twice.
    OnePublishIsStoredTwice,
}

impl Model for Workflow {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let world =
            |policy: &SendPolicy| World::new(*policy, self.machines, self.taskmanagers, self.left);
        self.policies.iter().map(world).collect()
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        action::list(world, actions);
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut next = world.clone();
        self.act(&mut next, action).ok()?;
        (next != *world).then_some(next)
    }

    fn within_boundary(&self, world: &World) -> bool {
        let copies = |record: &Rec| record.get().copies;
        let saved = |machine: &Machine| machine.saved.as_ref().map_or(0, copies);
        world.machines.iter().map(saved).max() <= Some(self.most_copies)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = property::all();
        properties.retain(|property| !self.unchecked.contains(&property.name));
        properties
    }
}
