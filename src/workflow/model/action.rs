//! Everything that can happen next.

use crate::workflow::{
    machine::{self, Todo},
    model::{
        Sabotage, Workflow,
        guest::{Guest, Hand, Step, Told},
        record::{Clock, Lapse, Rec},
        taskmanager::{Answer, At, NotHere, Question, Steps, Taskmanager, Wire},
        world::World,
    },
    record::{ReasonKind, Stage},
    taskmanager::may_serve,
};

/// One step of one party. Numbers are those of taskmanagers, then of machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Action {
    StartTaskmanager(usize),
    KillTaskmanager(usize),
    /// Its driver asks its next question, or does what needs no answer.
    Turn(usize, Wire),
    /// Its driver takes in the answer.
    Hear(usize),
    /// The same, when it could not revoke for long what it never sent.
    HearAfterLong(usize),
    Resume(usize),
    Again(usize),
    GiveUp(usize, ReasonKind),
    Lapse(usize, Lapse),
    Fence(usize, usize, Wire),
    Report {
        to: usize,
        from: usize,
        told: Told,
        ack_lost: bool,
    },
    /// Tells a machine that it was given up.
    Dismiss(usize),

    Boot(usize),
    KillGuest(usize),
    Exit(usize),
    Attach(usize),
    Disconnect(usize),
    Receive(usize),
    Accept(usize),
    Ack(usize, Wire),
    Start(usize),
    TakeUp(usize),
    Finish(usize, bool),
    SendReport(usize, Wire),

    /// A deadline passes.
    Passes(usize, Clock),
    LatePublish(usize),
    LateDelete(usize),
    LateWithdraw(usize),
    Purge(usize),
    DeleteQueue(usize),
}

/// Everything that may be possible; what is not is refused by [`Workflow::act`].
pub(super) fn list(world: &World, actions: &mut Vec<Action>) {
    list_all(world, actions);
    actions.retain(|action| action.may_happen(world));
}

fn list_all(world: &World, actions: &mut Vec<Action>) {
    let machines = 0..world.machines.len();
    for by in 0..world.taskmanagers.len() {
        let Some(taskmanager) = &world.taskmanagers[by] else {
            actions.push(Action::StartTaskmanager(by));
            continue;
        };
        if taskmanager.driver.is_some() {
            actions.extend(Wire::ALL.map(|wire| Action::Turn(by, wire)));
            actions.extend([
                Action::Hear(by),
                Action::HearAfterLong(by),
                Action::Lapse(by, Lapse::Silence),
                Action::Lapse(by, Lapse::Stage),
                Action::GiveUp(by, ReasonKind::Revoked),
                Action::GiveUp(by, ReasonKind::HostFailed),
            ]);
        } else {
            actions.extend([Action::Resume(by), Action::Again(by)]);
        }
        for machine in machines.clone() {
            if taskmanager.fences[machine] {
                actions.extend(Wire::ALL.map(|wire| Action::Fence(by, machine, wire)));
            }
            for told in [Told::Accepted, Told::Done] {
                for ack_lost in [false, true] {
                    actions.push(Action::Report {
                        to: by,
                        from: machine,
                        told,
                        ack_lost,
                    });
                }
            }
        }
        actions.push(Action::KillTaskmanager(by));
    }
    for machine in machines {
        actions.extend([
            Action::Dismiss(machine),
            Action::Passes(machine, Clock::BootPassed),
            Action::Passes(machine, Clock::TotalPassed),
            Action::LatePublish(machine),
            Action::LateDelete(machine),
            Action::LateWithdraw(machine),
            Action::Purge(machine),
            Action::DeleteQueue(machine),
        ]);
        if world.machines[machine].guest.agent.is_none() {
            actions.push(Action::Boot(machine));
            continue;
        }
        actions.extend([
            Action::Attach(machine),
            Action::Disconnect(machine),
            Action::Receive(machine),
            Action::Accept(machine),
            Action::Ack(machine, Wire::Fine),
            Action::Ack(machine, Wire::AnswerLost),
            Action::Ack(machine, Wire::RequestLost),
            Action::Start(machine),
            Action::TakeUp(machine),
            Action::Finish(machine, true),
            Action::Finish(machine, false),
            Action::SendReport(machine, Wire::Fine),
            Action::SendReport(machine, Wire::AnswerLost),
            Action::Exit(machine),
            Action::KillGuest(machine),
        ]);
    }
}

impl Action {
    /// A look that costs nothing; false: it cannot happen here.
    pub(super) fn may_happen(self, world: &World) -> bool {
        let left = world.left;
        let driver = |by: usize| {
            let taskmanager = world.taskmanagers[by].as_ref();
            taskmanager.and_then(|it| it.driver.as_ref())
        };
        let at_top = |by| driver(by).is_some_and(|driver| driver.at == At::Top);
        let answered = |by| driver(by).is_some_and(|it| matches!(it.at, At::Answered(..)));
        let machine = |at: usize| &world.machines[at];
        let agent = |at: usize| world.machines[at].guest.agent.as_ref();
        let hand = |at, hand: fn(&Hand) -> bool| agent(at).is_some_and(|it| hand(&it.hand));
        let ended = || world.newest_record().is_some_and(Rec::is_terminal);
        match self {
            Self::StartTaskmanager(by) => world.taskmanagers[by].is_none(),
            Self::KillTaskmanager(by) => {
                left.taskmanager_kills > 0 && world.taskmanagers[by].is_some()
            }
            Self::Turn(by, wire) => driver(by).is_some_and(|driver| match driver.at {
                At::Answered(..) => false,
                At::Next(_) | At::Top => match wire {
                    Wire::Fine => true,
                    Wire::Silent | Wire::AnswerLost
                        if driver.at == At::Top
                            && matches!(
                                machine::todo(driver.record.get()),
                                Todo::Watch | Todo::Revoke
                            ) =>
                    {
                        true
                    }
                    Wire::Silent => false,
                    _ => left.network > 0,
                },
            }),
            Self::Hear(by) => answered(by),
            Self::HearAfterLong(by) => driver(by).is_some_and(|driver| {
                matches!(
                    driver.at,
                    At::Answered(Question::Delete { .. }, Answer::Lost)
                )
            }),
            Self::Resume(by) | Self::Again(by) => {
                world.taskmanagers[by].is_some() && driver(by).is_none()
            }
            Self::GiveUp(by, _) => left.give_ups > 0 && at_top(by),
            Self::Lapse(by, _) => at_top(by),
            Self::Fence(by, at, wire) => {
                let fences = |it: &Taskmanager| it.fences[at];
                world.taskmanagers[by].as_ref().is_some_and(fences)
                    && (wire == Wire::Fine || left.network > 0)
            }
            Self::Report {
                to,
                from,
                told,
                ack_lost,
            } => {
                machine(from).reports.has(told)
                    && (!ack_lost || left.network > 0)
                    && (at_top(to) || driver(to).is_none())
                    && world.taskmanagers[to].is_some()
            }
            Self::Dismiss(at) => agent(at).is_some() && (ended() || at < world.newest()),
            Self::Passes(at, clock) => !ended() && machine(at).clock < clock,
            Self::LatePublish(at) => machine(at).late.publishes > 0,
            Self::LateDelete(at) => machine(at).late.delete,
            Self::LateWithdraw(at) => machine(at).late.withdraw,
            Self::Purge(_) | Self::DeleteQueue(_) => left.operator > 0,
            Self::Boot(at) => agent(at).is_none() && !machine(at).guest.dismissed,
            Self::KillGuest(_) => left.guest_kills > 0,
            Self::Exit(at) => machine(at).guest.dismissed,
            Self::Attach(at) => {
                machine(at).queue.is_some() && agent(at).is_some_and(|it| !it.attached)
            }
            Self::Disconnect(at) => left.network > 0 && machine(at).guest.holds_lease(),
            Self::Receive(at) => {
                machine(at).queue > Some(0) && hand(at, |hand| *hand == Hand::Empty)
            }
            Self::Accept(at) => hand(at, |hand| matches!(hand, Hand::Received { .. })),
            Self::Ack(at, wire) => {
                (wire == Wire::Fine || left.network > 0)
                    && hand(at, |hand| matches!(hand, Hand::Admitted { .. }))
            }
            Self::Start(at) => hand(at, |hand| *hand == Hand::Acked),
            Self::TakeUp(at) => agent(at).is_some_and(|agent| {
                let step = machine(at).guest.noted.map(|noted| noted.state);
                step == Some(Step::Running) && !agent.running
            }),
            Self::Finish(at, _) => agent(at).is_some_and(|agent| agent.running),
            Self::SendReport(at, wire) => {
                (wire == Wire::Fine || left.network > 0)
                    && machine(at).guest.next_report().is_some()
            }
        }
    }
}

type Acted = Result<(), NotHere>;

impl Workflow {
    fn steps<'a>(&self, world: &'a mut World, by: usize) -> Steps<'a> {
        Steps {
            world,
            by,
            dedup: self.dedup,
            sabotage: self.sabotage,
        }
    }

    pub(super) fn act(&self, world: &mut World, action: Action) -> Acted {
        match action {
            Action::StartTaskmanager(by) => self.steps(world, by).start(),
            Action::Turn(by, wire) => self.steps(world, by).turn(wire),
            Action::Hear(by) => self.steps(world, by).hear(false),
            Action::HearAfterLong(by) => self.steps(world, by).hear(true),
            Action::Resume(by) => self.steps(world, by).resume(),
            Action::Again(by) => self.steps(world, by).again(),
            Action::Lapse(by, lapse) => self.steps(world, by).lapse(lapse),
            Action::Fence(by, machine, wire) => self.steps(world, by).fence(machine, wire),
            Action::GiveUp(by, why) => {
                self.steps(world, by).give_up(why)?;
                spend(&mut world.left.give_ups)
            }
            Action::Report {
                to,
                from,
                told,
                ack_lost,
            } => {
                if ack_lost {
                    spend(&mut world.left.network)?;
                }
                self.steps(world, to).report(from, told, ack_lost)
            }
            Action::KillTaskmanager(by) => {
                spend(&mut world.left.taskmanager_kills)?;
                world.taskmanagers[by].take().map(drop).ok_or(NotHere)
            }
            Action::Dismiss(machine) => dismiss(world, machine),
            Action::Passes(machine, clock) => {
                let newest = world.newest();
                let ended = world.newest_record().is_none_or(|it| it.is_terminal());
                let machine_is_newest = machine == newest;
                let machine = &mut world.machines[machine];
                if ended || !machine_is_newest || machine.clock >= clock {
                    return Err(NotHere);
                }
                // It counts in one stage only.
                let stage = machine.saved.as_ref().and_then(Rec::stage);
                if clock == Clock::BootPassed && stage != Some(Stage::Boot) {
                    return Err(NotHere);
                }
                machine.clock = clock;
                Ok(())
            }
            Action::LatePublish(machine) => {
                let copies = world.machines[machine].copies();
                let machine = &mut world.machines[machine];
                spend(&mut machine.late.publishes)?;
                // Without a queue it is refused, and nobody hears of that.
                if let Some(ready) = &mut machine.queue
                    && !(self.dedup && copies > 0)
                {
                    *ready += 1;
                }
                Ok(())
            }
            Action::LateDelete(machine) => {
                let late = &mut world.machines[machine].late.delete;
                if !std::mem::take(late) {
                    return Err(NotHere);
                }
                world.delete_queue(machine, self.sabotage);
                Ok(())
            }
            Action::LateWithdraw(at) => {
                let machine = &mut world.machines[at];
                if !std::mem::take(&mut machine.late.withdraw) {
                    return Err(NotHere);
                }
                if machine.guest.agent.is_some() {
                    machine.guest.withdraw(at, self.sabotage);
                }
                Ok(())
            }
            Action::Purge(machine) => {
                spend(&mut world.left.operator)?;
                match &mut world.machines[machine].queue {
                    Some(ready) if *ready > 0 => *ready = 0,
                    _ => return Err(NotHere),
                }
                Ok(())
            }
            Action::DeleteQueue(machine) => {
                spend(&mut world.left.operator)?;
                world
                    .delete_queue(machine, self.sabotage)
                    .map(drop)
                    .ok_or(NotHere)
            }
            Action::Boot(machine)
            | Action::KillGuest(machine)
            | Action::Exit(machine)
            | Action::Attach(machine)
            | Action::Disconnect(machine)
            | Action::Receive(machine)
            | Action::Accept(machine)
            | Action::Ack(machine, _)
            | Action::Start(machine)
            | Action::TakeUp(machine)
            | Action::Finish(machine, _)
            | Action::SendReport(machine, _) => self.act_as_guest(world, machine, action),
        }
    }

    fn act_as_guest(&self, world: &mut World, at: usize, action: Action) -> Acted {
        let left = &mut world.left;
        let machine = &mut world.machines[at];
        if action == Action::Boot(at) {
            if machine.guest.agent.is_some() || machine.guest.dismissed {
                return Err(NotHere);
            }
            machine.guest.boot(at);
            return Ok(());
        }
        let guest = &mut machine.guest;
        let dismissed = guest.dismissed;
        let step = guest.noted.map(|noted| noted.state);
        let agent = guest.agent.as_mut().ok_or(NotHere)?;
        // What it does between two steps of its main loop.
        let idle = agent.hand == Hand::Empty && !agent.running && !dismissed;
        let interrupted = step == Some(Step::Running) && !agent.running;
        match action {
            Action::KillGuest(_) => {
                spend(&mut left.guest_kills)?;
                if guest.lose_lease() {
                    give_back(&mut machine.queue);
                }
                machine.guest.agent = None;
                if self.sabotage == Some(Sabotage::JournalIsNotDurable) {
                    machine.guest.noted = None;
                }
            }
            Action::Exit(_) if dismissed && agent.hand == Hand::Empty && !agent.running => {
                machine.guest.agent = None;
            }
            Action::Attach(_) if idle && !agent.attached && machine.queue.is_some() => {
                (agent.attached, agent.serves) = (true, true);
            }
            Action::Disconnect(_) => {
                if !guest.lose_lease() {
                    return Err(NotHere);
                }
                spend(&mut left.network)?;
                give_back(&mut machine.queue);
            }
            Action::Receive(_) if idle && agent.attached && !interrupted => {
                spend(machine.queue.as_mut().ok_or(NotHere)?)?;
                agent.hand = Hand::Received { lease: true };
            }
            Action::Accept(_) => {
                let Hand::Received { lease } = agent.hand else {
                    return Err(NotHere);
                };
                let run = guest.accept(at, self.sabotage);
                if let Some(agent) = &mut guest.agent {
                    agent.hand = Hand::Admitted { lease, run };
                }
            }
            Action::Ack(_, wire) => {
                let Hand::Admitted { lease, run } = agent.hand else {
                    return Err(NotHere);
                };
                let confirmed = match wire {
                    Wire::Fine => lease,
                    _ if !lease => return Err(NotHere),
                    // Acked; the answer is lost.
                    Wire::AnswerLost => {
                        spend(&mut left.network)?;
                        false
                    }
                    _ => {
                        spend(&mut left.network)?;
                        give_back(&mut machine.queue);
                        false
                    }
                };
                let sabotaged = self.sabotage == Some(Sabotage::StartWithoutAck) && run;
                agent.hand = match Guest::may_start(run, confirmed) || sabotaged {
                    true => Hand::Acked,
                    false => Hand::Empty,
                };
            }
            Action::Start(_) if agent.hand == Hand::Acked => {
                agent.hand = Hand::Empty;
                if guest.start(at) {
                    machine.handler_starts();
                }
            }
            Action::TakeUp(_) if idle && agent.serves && interrupted => {
                if guest.take_up(at, self.interrupted) {
                    machine.handler_starts();
                }
            }
            Action::Finish(_, well) if agent.running && (well || self.handler_may_fail) => {
                agent.running = false;
                guest.finish(at, well);
            }
            Action::SendReport(_, wire) => {
                let told = guest.next_report().ok_or(NotHere)?;
                machine.reports.add(told);
                match wire {
                    Wire::Fine => guest.reported(at),
                    _ => spend(&mut left.network)?,
                }
            }
            _ => return Err(NotHere),
        }
        Ok(())
    }
}

impl super::world::Machine {
    fn handler_starts(&mut self) {
        self.runs += 1;
        if let Some(agent) = &mut self.guest.agent {
            agent.running = true;
        }
        // By the guest's word it had ended; by the clock's alone it may be under way.
        self.started_after_end |= self
            .saved
            .as_ref()
            .is_some_and(|record| record.is_terminal() && record.get().revoking.is_none());
    }
}

/// Some taskmanager tells a machine that was given up, whenever it hears of it.
fn dismiss(world: &mut World, at: usize) -> Acted {
    let somebody = world.taskmanagers.iter().any(Option::is_some);
    let earlier = at < world.newest();
    let machine = &mut world.machines[at];
    let given_up = machine
        .saved
        .as_ref()
        .is_some_and(|record| record.is_terminal() && (earlier || !may_serve(record.get())));
    if !somebody || !given_up || machine.guest.agent.is_none() || machine.guest.dismissed {
        return Err(NotHere);
    }
    machine.guest.dismiss(at);
    Ok(())
}

fn spend(left: &mut u8) -> Acted {
    *left = left.checked_sub(1).ok_or(NotHere)?;
    Ok(())
}

fn give_back(queue: &mut Option<u8>) {
    if let Some(ready) = queue {
        *ready += 1;
    }
}
