//! Whether it ends from here on if nothing more goes wrong: from every state there is, a fair run is walked
//! to its end.
//!
//! The walk is one schedule, round robin: each party does what it can, over and over. It is stuck when a
//! whole round leads where it has been before, and no deadline that may still pass changes that.

use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{MutexGuard, PoisonError},
};

use crate::workflow::{
    model::{
        Workflow,
        action::Action,
        guest::{Hand, Told},
        record::{Clock, Lapse, Rec},
        taskmanager::Wire,
        world::World,
    },
    taskmanager::may_serve,
};

/// What helps it along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Help {
    /// Every deadline passes in its time; an agent that is dead stays dead.
    Deadlines,
    /// An agent that is dead starts again; no deadline is needed.
    Restarts,
}

impl Workflow {
    /// Whether it ends.
    pub(super) fn ends(&self, world: &World, help: Help) -> bool {
        let mut world = world.clone();
        let mut walked = HashSet::new();
        let mut helped = 0;
        while !is_over(&world) {
            let place = fingerprint(&world);
            // From where one walk ends, all do.
            if helped == 0 && self.known_to_end(help).contains(&place) {
                break;
            }
            assert!(walked.len() < 10_000, "a walk without an end: {world:?}");
            if !walked.insert(place) {
                if !self.wait(&mut world, help, &mut helped) {
                    return false;
                }
                walked.clear();
            }
            self.round(&mut world, help);
        }
        if helped == 0 {
            self.known_to_end(help).extend(walked);
        }
        true
    }

    fn known_to_end(&self, help: Help) -> MutexGuard<'_, HashSet<u64>> {
        let known = match help {
            Help::Deadlines => &self.ends[0],
            Help::Restarts => &self.ends[1],
        };
        known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everybody does what can be done.
    fn round(&self, world: &mut World, help: Help) {
        let mut go = |action: Action| {
            if !action.may_happen(world) {
                return false;
            }
            let mut next = world.clone();
            if self.act(&mut next, action).is_ok() {
                *world = next;
                return true;
            }
            false
        };
        let taskmanagers = 0..self.taskmanagers;
        let machines = 0..self.machines;
        for by in taskmanagers {
            go(Action::StartTaskmanager(by));
            go(Action::Resume(by));
            for from in machines.clone() {
                go(Action::Fence(by, from, Wire::Fine));
                for told in [Told::Accepted, Told::Done] {
                    go(Action::Report {
                        to: by,
                        from,
                        told,
                        ack_lost: false,
                    });
                }
            }
            let _ = go(Action::Hear(by)) || go(Action::Turn(by, Wire::Fine));
        }
        for at in machines {
            if help == Help::Restarts {
                go(Action::Boot(at));
            }
            go(Action::Dismiss(at));
            for action in [
                Action::Attach(at),
                Action::TakeUp(at),
                Action::Receive(at),
                Action::Accept(at),
                Action::Ack(at, Wire::Fine),
                Action::Start(at),
                Action::Finish(at, true),
                Action::SendReport(at, Wire::Fine),
                Action::Exit(at),
            ] {
                go(action);
            }
        }
    }

    /// Nothing new happens: time passes, by the next thing that counts it.
    fn wait(&self, world: &mut World, help: Help, helped: &mut usize) -> bool {
        let newest = world.newest();
        let lapse = |lapse| (0..self.taskmanagers).map(move |by| Action::Lapse(by, lapse));
        let mut waits: Vec<Vec<Action>> = vec![lapse(Lapse::Silence).collect()];
        if help == Help::Deadlines {
            waits.extend([
                lapse(Lapse::Stage).collect(),
                vec![Action::Passes(newest, Clock::BootPassed)],
                vec![Action::Passes(newest, Clock::TotalPassed)],
            ]);
        }
        while let Some(wait) = waits.get(*helped) {
            *helped += 1;
            let passed = wait.iter().filter(|action| {
                let mut next = world.clone();
                let passed = self.act(&mut next, **action).is_ok();
                if passed {
                    *world = next;
                }
                passed
            });
            if passed.count() > 0 {
                return true;
            }
        }
        false
    }
}

/// The outcome stands, and nothing is left at the broker of what was given up (law Q7).
fn is_over(world: &World) -> bool {
    let newest = world.newest();
    let settled = world.machines.iter().enumerate().all(|(at, machine)| {
        let Some(record) = &machine.saved else {
            return true;
        };
        let given_up = at < newest || !may_serve(record.get());
        record.is_terminal() && (!given_up || machine.queue.is_none())
    });
    let driven = world.taskmanagers.iter().flatten().any(|it| {
        it.driver
            .as_ref()
            .is_some_and(|driver| !driver.record.is_terminal())
    });
    let in_hand = world.machines.iter().any(|machine| {
        let agent = machine.guest.agent.as_ref();
        agent.is_some_and(|agent| agent.hand != Hand::Empty)
    });
    world.newest_record().is_some_and(Rec::is_terminal) && settled && !driven && !in_hand
}

fn fingerprint(world: &World) -> u64 {
    let mut hasher = DefaultHasher::new();
    world.hash(&mut hasher);
    hasher.finish()
}
