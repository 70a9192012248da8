//! What holds in every state, and what is seen in some.

use stateright::Property;

use crate::workflow::{
    guest::Interrupted,
    model::{
        Workflow,
        guest::Step,
        recovery::Help,
        world::{Machine, World},
    },
    record::{Record, State},
};

pub(super) const ONE_OUTCOME: &str = "an outcome is recorded once, and nobody is told another";
pub(super) const ONE_RUN: &str = "prepare is run once, or again only as its handler chose";
pub(super) const NOT_RUN: &str = "what was not delivered is never run";
pub(super) const RUN: &str = "what succeeded was run";
pub(super) const NO_LATE_START: &str = "nothing starts after the guest's own word ended it";
pub(super) const NEVER_STUCK: &str = "it ends, if no more goes wrong";
pub(super) const NO_WAIT: &str = "a guest that is up needs no deadline to end";

pub(super) fn all() -> Vec<Property<Workflow>> {
    vec![
        Property::always(ONE_OUTCOME, |_, world: &World| {
            each(world, |machine| !machine.contradicted)
        }),
        Property::always(ONE_RUN, |workflow: &Workflow, world: &World| {
            let kills = workflow.left.guest_kills - world.left.guest_kills;
            let most = match workflow.interrupted {
                Interrupted::Fail => 1,
                Interrupted::RunAgain => 1 + kills,
            };
            each(world, |machine| machine.runs <= most)
        }),
        Property::always(NOT_RUN, |_, world: &World| {
            each(world, |machine| {
                machine.first != Some(State::NotDelivered) || machine.runs == 0
            })
        }),
        Property::always(RUN, |_, world: &World| {
            each(world, |machine| {
                let done = machine.guest.noted.map(|noted| noted.state);
                machine.first != Some(State::Succeeded)
                    || (machine.runs > 0 && done == Some(Step::Done { well: true }))
            })
        }),
        Property::always(NO_LATE_START, |_, world: &World| {
            each(world, |machine| !machine.started_after_end)
        }),
        Property::always(NEVER_STUCK, |workflow: &Workflow, world: &World| {
            workflow.ends(world, Help::Deadlines)
        }),
        Property::always(NO_WAIT, |workflow: &Workflow, world: &World| {
            workflow.ends(world, Help::Restarts)
        }),
        // The model is not empty: each of these comes about.
        Property::sometimes("succeeded", |_, world: &World| {
            ended(world, State::Succeeded)
        }),
        Property::sometimes("sent again", |_, world: &World| {
            recorded(world, |record| record.copies > 1)
        }),
    ]
}

fn recorded(world: &World, holds: impl Fn(&Record) -> bool) -> bool {
    let saved = |machine: &Machine| machine.saved.as_ref().is_some_and(|it| holds(it.get()));
    world.machines.iter().any(saved)
}

fn each(world: &World, holds: impl Fn(&Machine) -> bool) -> bool {
    world.machines.iter().all(holds)
}

fn ended(world: &World, state: State) -> bool {
    let first = |machine: &Machine| machine.first == Some(state);
    world.machines.iter().any(first)
}
