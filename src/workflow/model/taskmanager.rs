//! The control plane in the model. What an answer means and what follows from it, the product's own code
//! decides; the order of the questions is that of the driver, with a kill possible between any two steps,
//! and between what the broker did and the record of it.

use crate::{
    broker::{Declared, QueueStatus, Receipt},
    error::{Error, ErrorKind, Outcome, Result},
    wire::{CommandState, Phase, Pong, Report},
    workflow::{
        machine::{self, Event, Todo},
        model::{
            Sabotage,
            guest::{Step, Told},
            record::{Lapse, Rec},
            world::{World, fixed, new_record},
        },
        record::{Reason, ReasonKind, Sent},
        taskmanager::{
            answers::{self, Look, Looked, Pinged, Withdrew},
            may_serve,
        },
    },
};

/// A process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Taskmanager {
    pub(super) driver: Option<Driver>,
    /// Whose queues it takes away in the background.
    pub(super) fences: Vec<bool>,
}

/// What drives one record.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Driver {
    pub(super) machine: usize,
    pub(super) record: Rec,
    /// Nobody else has saved since: its next save is not a conflict.
    pub(super) fresh: bool,
    counted: bool,
    pub(super) at: At,
}

/// Where its driver is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum At {
    /// Between two rounds: it hears signals here.
    Top,
    /// About to ask.
    Next(Question),
    /// Answered; what that means is not on disk yet.
    Answered(Question, Answer),
}

/// What a driver asks of the broker, or of the guest over it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Question {
    FenceEarlier,
    Declare,
    Ping,
    LookForQueue,
    Publish,
    Status,
    Look { not_started: bool },
    Withdraw,
    Delete { withdrawn: bool },
}

/// What it hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Answer {
    /// Nothing: whether it was done is not known.
    Lost,
    /// Not done, and it never will be.
    Refused,
    NoQueue,
    NoConsumer,
    Done,
    Stored {
        duplicate: bool,
    },
    Pong {
        attached: bool,
    },
    Command(Step),
    Holds(u8),
    /// So many copies were in the queue that is gone now.
    Discarded(u8),
}

/// How a request fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Wire {
    Fine,
    /// Done, and the answer is lost.
    AnswerLost,
    /// Not done, and nobody knows.
    RequestLost,
    /// Given up by who asked; the broker may still do it.
    Late,
    /// The broker says no.
    Refused,
    /// The guest does not answer.
    Silent,
}

impl Wire {
    pub(super) const ALL: [Self; 6] = [
        Self::Fine,
        Self::AnswerLost,
        Self::RequestLost,
        Self::Late,
        Self::Refused,
        Self::Silent,
    ];
}

impl Taskmanager {
    pub(super) fn driving(machine: usize, record: Rec, machines: usize) -> Self {
        Self {
            driver: Some(Driver::new(machine, record)),
            fences: vec![false; machines],
        }
    }
}

impl Driver {
    fn new(machine: usize, record: Rec) -> Self {
        Self {
            machine,
            record,
            fresh: true,
            counted: false,
            at: At::Top,
        }
    }
}

/// One taskmanager's steps in a world.
pub(super) struct Steps<'a> {
    pub(super) world: &'a mut World,
    /// Which taskmanager.
    pub(super) by: usize,
    pub(super) dedup: bool,
    pub(super) sabotage: Option<Sabotage>,
}

/// A step that is not possible here.
pub(super) struct NotHere;

type Stepped = std::result::Result<(), NotHere>;

impl Steps<'_> {
    /// A process starts on what is recorded.
    pub(super) fn start(&mut self) -> Stepped {
        if self.world.taskmanagers[self.by].is_some() {
            return Err(NotHere);
        }
        let machines = self.world.machines.len();
        let newest = self.world.newest();
        let mut started = Taskmanager {
            driver: None,
            fences: vec![false; machines],
        };
        if let Some(record) = &self.world.machines[newest].saved {
            if record.is_terminal() {
                started.fences[newest] = !may_serve(record.get());
            } else {
                started.driver = Some(Driver::new(newest, record.clone()));
            }
        }
        self.world.taskmanagers[self.by] = Some(started);
        Ok(())
    }

    /// A caller asks again for what nobody drives here any more.
    pub(super) fn resume(&mut self) -> Stepped {
        let newest = self.world.newest();
        let record = self.world.machines[newest].saved.clone().ok_or(NotHere)?;
        let taskmanager = self.taskmanager()?;
        if taskmanager.driver.is_some() || record.is_terminal() {
            return Err(NotHere);
        }
        taskmanager.driver = Some(Driver::new(newest, record));
        Ok(())
    }

    /// A caller asks for a new machine under the same name.
    pub(super) fn again(&mut self) -> Stepped {
        let newest = self.world.newest();
        let ended = self.world.newest_record().is_some_and(Rec::is_terminal);
        let next = newest + 1;
        let taskmanager = self.taskmanager()?;
        if !ended || next >= taskmanager.fences.len() || taskmanager.driver.is_some() {
            return Err(NotHere);
        }
        let policy = self
            .world
            .newest_record()
            .map(|record| record.get().policy)
            .ok_or(NotHere)?;
        let record = new_record(next, policy);
        self.world.machines[next].save(&record);
        self.taskmanager()?.driver = Some(Driver::new(next, record));
        Ok(())
    }

    /// The driver goes on by one step.
    pub(super) fn turn(&mut self, wire: Wire) -> Stepped {
        let driver = self.driver()?.clone();
        let question = match driver.at {
            At::Answered(..) => return Err(NotHere),
            At::Next(question) => question,
            At::Top => {
                let clock = self.world.machines[driver.machine].clock;
                if driver.record.apply(Event::Tick, clock, None).1 {
                    return self.quietly(wire, |steps| steps.learn(Event::Tick, None));
                }
                match machine::todo(driver.record.get()) {
                    Todo::Declare if driver.machine > 0 => Question::FenceEarlier,
                    Todo::Declare => Question::Declare,
                    Todo::Await => Question::Ping,
                    Todo::Publish if driver.counted => Question::Publish,
                    Todo::Publish if self.sabotage == Some(Sabotage::PublishIsNotCounted) => {
                        Question::Publish
                    }
                    Todo::Publish => return self.quietly(wire, Self::count),
                    Todo::Watch => Question::Status,
                    Todo::Revoke if answers::has_to_be_withdrawn(driver.record.get()) => {
                        Question::Withdraw
                    }
                    Todo::Revoke => Question::Delete { withdrawn: false },
                    Todo::Nothing => {
                        return self.quietly(wire, |steps| {
                            let taskmanager = steps.taskmanager()?;
                            taskmanager.driver = None;
                            taskmanager.fences[driver.machine] |= !may_serve(driver.record.get());
                            Ok(())
                        });
                    }
                }
            }
        };
        let answer = self.ask(driver.machine, question, wire)?;
        let driver = self.driver()?;
        if question == Question::Publish {
            driver.counted = false;
        }
        driver.at = At::Answered(question, answer);
        let (events, _) = decide(&driver.record, driver.machine, question, answer);
        if self.sabotage == Some(Sabotage::ToldBeforeSaved) {
            self.tell_before(&events)?;
        }
        // What changes nothing on disk meets nobody else.
        if events.iter().all(|event| !self.would_save(event)) {
            self.hear(false)?;
        }
        Ok(())
    }

    /// What was answered is understood and saved; then the driver goes on.
    pub(super) fn hear(&mut self, long_out_of_reach: bool) -> Stepped {
        let driver = self.driver()?.clone();
        let At::Answered(question, answer) = driver.at else {
            return Err(NotHere);
        };
        let machine = driver.machine;
        let (mut events, next) = decide(&driver.record, machine, question, answer);
        if long_out_of_reach {
            let never_sent = driver.record.get().sent == Sent::Never;
            let deleting = matches!(question, Question::Delete { .. });
            if answer != Answer::Lost || !deleting || !never_sent {
                return Err(NotHere);
            }
            events = vec![Event::Fenced { discarded: 0 }];
        }
        self.driver()?.at = next;
        for event in events {
            if self.driver().is_ok() {
                self.learn(event, None)?;
            }
        }
        Ok(())
    }

    /// Something passes that counts from the last sign of life.
    pub(super) fn lapse(&mut self, lapse: Lapse) -> Stepped {
        let driver = self.at_top()?;
        let (machine, record) = (driver.machine, driver.record.clone());
        let clock = self.world.machines[machine].clock;
        match record.apply(Event::Tick, clock, Some(lapse)) {
            (_, true) => self.learn(Event::Tick, Some(lapse)),
            _ => Err(NotHere),
        }
    }

    /// It is cancelled, or its host has failed.
    pub(super) fn give_up(&mut self, why: ReasonKind) -> Stepped {
        if self.at_top()?.record.is_terminal() {
            return Err(NotHere);
        }
        self.learn(Event::GiveUp(Reason::new(why, "")), None)
    }

    /// A report arrives: it is acked once what it says is on disk.
    pub(super) fn report(&mut self, machine: usize, told: Told, ack_lost: bool) -> Stepped {
        if !self.world.machines[machine].reports.has(told) {
            return Err(NotHere);
        }
        let drives = self
            .taskmanager()?
            .driver
            .as_ref()
            .is_some_and(|driver| driver.machine == machine);
        if drives {
            let record = self.at_top()?.record.clone();
            let event = self.world.machines[machine].guest.report(machine, told);
            let fixed = fixed(machine);
            let report = Report::new(&fixed.address, fixed.boot.clone(), event);
            if let Some(event) = answers::reported(record.get(), report) {
                self.learn(event, None)?;
            }
            if self.driver().is_err() {
                return Ok(());
            }
        } else {
            let saved = self.world.machines[machine].saved.as_ref();
            if machine == self.world.newest() && saved.is_some_and(|record| !record.is_terminal()) {
                return Err(NotHere);
            }
        }
        if !ack_lost {
            self.world.machines[machine].reports.remove(told);
        }
        Ok(())
    }

    /// A queue of a machine that was given up goes, in the background.
    pub(super) fn fence(&mut self, machine: usize, wire: Wire) -> Stepped {
        if !self.taskmanager()?.fences[machine] {
            return Err(NotHere);
        }
        let answer = self.delete(machine, wire)?;
        if answer != Answer::Lost {
            self.taskmanager()?.fences[machine] = false;
        }
        Ok(())
    }

    fn quietly(&mut self, wire: Wire, step: impl FnOnce(&mut Self) -> Stepped) -> Stepped {
        if wire != Wire::Fine {
            return Err(NotHere);
        }
        step(self)
    }

    /// The next publish may store a copy more: that is on disk before it is sent.
    fn count(&mut self) -> Stepped {
        self.learn(Event::SendAgain, None)?;
        if let Ok(driver) = self.driver() {
            driver.at = At::Next(Question::Publish);
        }
        Ok(())
    }

    fn would_save(&mut self, event: &Event) -> bool {
        let Ok(driver) = self.driver() else {
            return false;
        };
        let (record, machine) = (driver.record.clone(), driver.machine);
        let clock = self.world.machines[machine].clock;
        record.apply(event.clone(), clock, None).1
    }

    /// The driver's own `learn`: saved, then believed, then told.
    fn learn(&mut self, event: Event, lapse: Option<Lapse>) -> Stepped {
        let driver = self.driver()?;
        let (machine, before, fresh) = (driver.machine, driver.record.clone(), driver.fresh);
        let event = self.sabotaged(event, &before);
        let clock = self.world.machines[machine].clock;
        let (next, save) = before.apply(event, clock, lapse);
        if save {
            if !fresh && self.sabotage != Some(Sabotage::RevisionsAreNotChecked) {
                // Somebody else drives it.
                self.taskmanager()?.driver = None;
                return Ok(());
            }
            self.world.machines[machine].save(&next);
            for (other, taskmanager) in self.world.taskmanagers.iter_mut().enumerate() {
                if let Some(driver) = taskmanager.as_mut().and_then(|it| it.driver.as_mut())
                    && other != self.by
                    && driver.machine == machine
                {
                    driver.fresh = false;
                }
            }
            if next.is_terminal() {
                self.world.machines[machine].tell(next.state());
            }
        }
        let driver = self.driver()?;
        driver.counted |= save && next.get().copies > before.get().copies;
        driver.record = next;
        Ok(())
    }

    fn tell_before(&mut self, events: &[Event]) -> Stepped {
        let driver = self.driver()?;
        let (machine, mut record) = (driver.machine, driver.record.clone());
        let clock = self.world.machines[machine].clock;
        for event in events {
            record = record.apply(event.clone(), clock, None).0;
        }
        if record.is_terminal() {
            self.world.machines[machine].tell(record.state());
        }
        Ok(())
    }

    fn sabotaged(&self, event: Event, record: &Rec) -> Event {
        match (self.sabotage, event) {
            (Some(Sabotage::OneCopyIsAll), Event::Fenced { discarded: 1.. }) => Event::Fenced {
                discarded: record.get().copies,
            },
            (Some(Sabotage::LostIsNotSentAgain), Event::Lost) => Event::SendConfirmed,
            (_, event) => event,
        }
    }

    /// The broker does it, or does not, and answers, or does not.
    fn ask(
        &mut self,
        machine: usize,
        question: Question,
        wire: Wire,
    ) -> std::result::Result<Answer, NotHere> {
        let place = &mut self.world.machines[machine];
        let agent = place.guest.agent.as_ref();
        let fine = wire == Wire::Fine;
        Ok(match question {
            Question::FenceEarlier => self.delete(0, wire)?,
            Question::Delete { .. }
                if self.sabotage == Some(Sabotage::DeleteIsNotAwaited) && fine =>
            {
                // It says what it expects, and deletes afterwards.
                let copies = self.driver()?.record.get().copies;
                self.taskmanager()?.fences[machine] = true;
                Answer::Discarded(u8::try_from(copies).unwrap_or(u8::MAX))
            }
            Question::Delete { .. } => self.delete(machine, wire)?,
            Question::Declare => match wire {
                Wire::Fine => {
                    place.queue.get_or_insert(0);
                    Answer::Done
                }
                Wire::AnswerLost if place.queue.is_none() => {
                    self.fault()?;
                    self.world.machines[machine].queue = Some(0);
                    Answer::Lost
                }
                Wire::RequestLost => {
                    self.fault()?;
                    Answer::Lost
                }
                _ => return Err(NotHere),
            },
            Question::Publish => self.publish(machine, wire)?,
            Question::Ping if fine => match agent {
                Some(agent) => Answer::Pong {
                    attached: agent.attached,
                },
                None => Answer::NoConsumer,
            },
            Question::LookForQueue | Question::Look { .. } if fine => match place.queue {
                Some(_) => Answer::Holds(place.copies()),
                None => Answer::NoQueue,
            },
            Question::Status if agent.is_none() && fine => Answer::NoConsumer,
            Question::Status if agent.is_some() => match wire {
                Wire::Fine => Answer::Command(Step::of(&place.guest.command_state())),
                Wire::Silent => Answer::Lost,
                _ => return Err(NotHere),
            },
            Question::Withdraw if agent.is_none() && fine => Answer::NoConsumer,
            Question::Withdraw if agent.is_some() => match wire {
                Wire::Fine => {
                    let state = place.guest.withdraw(machine, self.sabotage);
                    Answer::Command(Step::of(&state))
                }
                Wire::AnswerLost => {
                    place.guest.withdraw(machine, self.sabotage);
                    Answer::Lost
                }
                Wire::Silent => Answer::Lost,
                Wire::Late if !place.late.withdraw => {
                    self.fault()?;
                    self.world.machines[machine].late.withdraw = true;
                    Answer::Lost
                }
                _ => return Err(NotHere),
            },
            _ => return Err(NotHere),
        })
    }

    fn publish(&mut self, machine: usize, wire: Wire) -> std::result::Result<Answer, NotHere> {
        let copies = self.world.machines[machine].copies();
        let twice = self.sabotage == Some(Sabotage::OnePublishIsStoredTwice);
        let Some(ready) = self.world.machines[machine].queue else {
            return match wire {
                Wire::Fine => Ok(Answer::NoQueue),
                _ => Err(NotHere),
            };
        };
        let duplicate = self.dedup && copies > 0;
        let stored = match duplicate {
            true => ready,
            false => ready + 1 + u8::from(twice),
        };
        if wire != Wire::Fine {
            self.fault()?;
        }
        let machine = &mut self.world.machines[machine];
        Ok(match wire {
            Wire::Fine => {
                machine.queue = Some(stored);
                Answer::Stored { duplicate }
            }
            Wire::AnswerLost => {
                machine.queue = Some(stored);
                Answer::Lost
            }
            Wire::RequestLost => Answer::Lost,
            Wire::Late => {
                machine.late.publishes += 1;
                Answer::Lost
            }
            Wire::Refused => Answer::Refused,
            Wire::Silent => return Err(NotHere),
        })
    }

    fn delete(&mut self, machine: usize, wire: Wire) -> std::result::Result<Answer, NotHere> {
        if wire == Wire::Silent || wire == Wire::Refused {
            return Err(NotHere);
        }
        if wire != Wire::Fine {
            self.fault()?;
        }
        match wire {
            Wire::RequestLost => return Ok(Answer::Lost),
            Wire::Late if self.world.machines[machine].late.delete => return Err(NotHere),
            Wire::Late => {
                self.world.machines[machine].late.delete = true;
                return Ok(Answer::Lost);
            }
            _ => {}
        }
        let discarded = self.world.delete_queue(machine, self.sabotage);
        Ok(match (wire, discarded) {
            (Wire::Fine, Some(copies)) => Answer::Discarded(copies),
            (Wire::Fine, None) => Answer::NoQueue,
            (_, Some(_)) => Answer::Lost,
            // As if it had not been sent.
            (_, None) => return Err(NotHere),
        })
    }

    fn fault(&mut self) -> Stepped {
        self.world.left.network = self.world.left.network.checked_sub(1).ok_or(NotHere)?;
        Ok(())
    }

    fn taskmanager(&mut self) -> std::result::Result<&mut Taskmanager, NotHere> {
        self.world.taskmanagers[self.by].as_mut().ok_or(NotHere)
    }

    fn driver(&mut self) -> std::result::Result<&mut Driver, NotHere> {
        self.taskmanager()?.driver.as_mut().ok_or(NotHere)
    }

    fn at_top(&mut self) -> std::result::Result<&mut Driver, NotHere> {
        match self.driver()? {
            driver if driver.at == At::Top => Ok(driver),
            _ => Err(NotHere),
        }
    }
}

impl World {
    /// The queue goes, and what was in it. Returns how many copies that were.
    pub(super) fn delete_queue(
        &mut self,
        machine: usize,
        sabotage: Option<Sabotage>,
    ) -> Option<u8> {
        let machine = &mut self.machines[machine];
        machine.queue?;
        let copies = machine.copies();
        machine.queue = None;
        if sabotage != Some(Sabotage::AckAfterDeleteIsOk) {
            machine.guest.lose_lease();
        }
        if let Some(agent) = &mut machine.guest.agent {
            agent.attached = false;
        }
        Some(copies)
    }
}

/// What the product's code makes of an answer, and where the driver goes then.
fn decide(record: &Rec, machine: usize, question: Question, answer: Answer) -> (Vec<Event>, At) {
    let fixed = fixed(machine);
    let one = |event| (vec![event], At::Top);
    match question {
        Question::FenceEarlier => match answer {
            Answer::Lost => one(answers::declared(Err(lost()))),
            _ => (Vec::new(), At::Next(Question::Declare)),
        },
        Question::Declare => one(answers::declared(answer.of(|| Declared::Created))),
        Question::Ping => {
            let pong = answer.of(|| {
                let phase = match answer {
                    Answer::Pong { attached: true } => Phase::Idle,
                    _ => Phase::WaitingForQueue,
                };
                let boot = fixed.boot.clone();
                Pong::new(&fixed.address, boot, phase, None, String::new())
            });
            match answers::pinged(pong) {
                Pinged::Learnt(event) => one(event),
                Pinged::NotAttached => (Vec::new(), At::Next(Question::LookForQueue)),
            }
        }
        Question::LookForQueue => {
            let event = answers::looked_for_queue(answer.of(|| answer.status(machine)));
            (event.into_iter().collect(), At::Top)
        }
        Question::Publish => {
            let duplicate = answer == Answer::Stored { duplicate: true };
            let events = answers::published(answer.of(|| Receipt::new(duplicate)));
            (events, At::Top)
        }
        Question::Status => {
            let asked = answers::asked(record.get(), answer.of(|| answer.command()));
            let next = match asked.look {
                Some(Look { not_started }) => At::Next(Question::Look { not_started }),
                None => At::Top,
            };
            (vec![asked.event], next)
        }
        Question::Look { not_started } => {
            let status = answer.of(|| answer.status(machine));
            match answers::looked(record.get(), Look { not_started }, status) {
                Looked::Learnt(event) => one(event),
                Looked::Fine | Looked::MayBeDead => (Vec::new(), At::Top),
            }
        }
        Question::Withdraw => match answers::withdrew(answer.of(|| answer.command())) {
            Withdrew::Learnt(event) => one(event),
            Withdrew::Fence { withdrawn } => (Vec::new(), At::Next(Question::Delete { withdrawn })),
        },
        Question::Delete { withdrawn } => {
            let taken = match answer {
                Answer::Discarded(copies) => Some(vec![fixed.command.clone(); copies.into()]),
                Answer::NoQueue => None,
                _ => return one(answers::declared(Err(lost()))),
            };
            one(answers::fenced(&fixed.command, withdrawn, taken))
        }
    }
}

impl Answer {
    /// As the broker trait tells it.
    fn of<T>(self, value: impl FnOnce() -> T) -> Result<T> {
        Err(match self {
            Self::Lost => lost(),
            Self::Refused => {
                Error::new(ErrorKind::BrokerRefused, "").with_outcome(Outcome::NotStored)
            }
            Self::NoQueue => Error::new(ErrorKind::NoQueue, "").with_outcome(Outcome::NotStored),
            Self::NoConsumer => Error::new(ErrorKind::NoConsumer, ""),
            _ => return Ok(value()),
        })
    }

    fn status(self, machine: usize) -> QueueStatus {
        let mut status = QueueStatus::new(fixed(machine).address.queue());
        if let Self::Holds(copies) = self {
            status.ready = copies.into();
        }
        status
    }

    fn command(self) -> CommandState {
        match self {
            Self::Command(step) => step.command_state(),
            _ => CommandState::Unknown,
        }
    }
}

fn lost() -> Error {
    Error::new(ErrorKind::BrokerUnreachable, "").with_outcome(Outcome::Unknown)
}
