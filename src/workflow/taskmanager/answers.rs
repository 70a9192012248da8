//! What the answers to a driver's questions mean: pure, so that the model check runs what the driver runs.

use crate::{
    broker::{Declared, QueueStatus, Receipt},
    error::{Error, ErrorKind, Outcome, Result},
    message::{CommandId, MessageId},
    names::{GuestAddress, Incarnation},
    sign::REFUSALS,
    wire::{CommandState, Phase, Pong, RemoteError, Report, ReportEvent},
    workflow::{
        machine::Event,
        record::{Reason, ReasonKind, Record, Sent, Trouble},
    },
};

/// The machines that lose their queues before this one gets its own (case W25): all earlier ones, since
/// the last may have been given up before it came to this.
pub(crate) fn earlier(address: &GuestAddress) -> Result<Vec<GuestAddress>> {
    (1..address.incarnation.get())
        .rev()
        .map(|number| {
            let incarnation = Incarnation::new(number)?;
            Ok(GuestAddress::new(address.guest.clone(), incarnation))
        })
        .collect()
}

/// A declare was answered.
pub(crate) fn declared(answer: Result<Declared>) -> Event {
    match answer {
        Ok(_) => Event::Declared,
        Err(error) => trouble(&error),
    }
}

/// What a ping tells.
pub(crate) enum Pinged {
    /// This.
    Learnt(Event),
    /// Its agent is up and not attached: it will be in a moment, unless its queue is gone (case W23).
    NotAttached,
}

/// A ping was answered, or was not.
pub(crate) fn pinged(answer: Result<Pong>) -> Pinged {
    match answer {
        Ok(pong) if pong.phase == Phase::WaitingForQueue => Pinged::NotAttached,
        Ok(pong) => Pinged::Learnt(Event::Pong(pong.boot)),
        Err(error) => Pinged::Learnt(trouble(&error)),
    }
}

/// The queue of a guest that is not attached was looked at. None: it is there.
pub(crate) fn looked_for_queue(answer: Result<QueueStatus>) -> Option<Event> {
    answer.err().map(|error| gone_or_trouble(&error))
}

/// A publish was answered, or was not: these, in turn.
pub(crate) fn published(answer: Result<Receipt>) -> Vec<Event> {
    let error = match answer {
        Ok(receipt) if receipt.duplicate => return vec![Event::AlreadyThere],
        Ok(_) => return vec![Event::SendConfirmed],
        Err(error) => error,
    };
    let not_stored = (error.outcome() == Some(Outcome::NotStored)).then_some(Event::NotStored);
    let next = match error.kind() {
        ErrorKind::TooLarge { .. } => {
            Event::GiveUp(Reason::new(ReasonKind::Poison, error.to_string()))
        }
        // Unknown or not stored: the same id again (case W19).
        _ => gone_or_trouble(&error),
    };
    not_stored.into_iter().chain([next]).collect()
}

/// What a guest's word on prepare tells.
pub(crate) struct Asked {
    pub(crate) event: Event,
    /// Whether prepare has to be looked for.
    pub(crate) look: Option<Look>,
}

/// Prepare is to be looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Look {
    /// The guest said that it has not started it.
    pub(crate) not_started: bool,
}

/// A guest was asked how prepare stands.
pub(crate) fn asked(record: &Record, answer: Result<CommandState>) -> Asked {
    match answer {
        Ok(CommandState::Unknown) if record.accepted => {
            let lost = "the guest accepted prepare, and does not know of it any more: its journal was lost";
            Asked {
                event: Event::Refused(RemoteError::new("journal_lost", lost)),
                look: None,
            }
        }
        Ok(state) => {
            // It starts nothing before an ack is confirmed; one that it had no word of will not be.
            let not_started = matches!(state, CommandState::Unknown | CommandState::Accepted);
            Asked {
                event: Event::Command(state, None),
                look: not_started.then_some(Look { not_started }),
            }
        }
        Err(error) => Asked {
            event: trouble(&error),
            look: Some(Look { not_started: false }),
        },
    }
}

/// Where prepare is.
pub(crate) enum Looked {
    /// Where it should be.
    Fine,
    /// This.
    Learnt(Event),
    /// It may be among the dead letters.
    MayBeDead,
}

/// The queue was looked at. As far as is known the guest has not started prepare: it is in the queue, or
/// among the dead letters, or lost (cases W23, W24).
pub(crate) fn looked(record: &Record, look: Look, answer: Result<QueueStatus>) -> Looked {
    let status = match answer {
        Ok(status) => status,
        Err(error) => return Looked::Learnt(gone_or_trouble(&error)),
    };
    let may_have_started = record.accepted && !look.not_started;
    if may_have_started || status.ready + status.delayed + status.in_flight > 0 {
        return Looked::Fine;
    }
    if status.dead > 0 {
        return Looked::MayBeDead;
    }
    missing(look).map_or(Looked::Fine, Looked::Learnt)
}

/// The dead letters were read: why prepare is among them, if it is.
pub(crate) fn read_dead_letters(look: Look, answer: Result<Option<String>>) -> Option<Event> {
    match answer {
        Ok(Some(reason)) => Some(Event::Refused(refusal(&reason))),
        Ok(None) => missing(look),
        Err(error) => Some(trouble(&error)),
    }
}

/// What a guest wrote to a dead letter: why it refused it, or something else that made it one.
fn refusal(reason: &str) -> RemoteError {
    match reason.split_once(": ") {
        Some((kind, message)) if REFUSALS.contains(&kind) => RemoteError::new(kind, message),
        _ => RemoteError::new("poison", reason),
    }
}

/// Prepare is nowhere on the broker. A guest that cannot be asked may have taken it, and been killed
/// before its first word: it tells when it is back, and until then nothing is queued for the dead.
fn missing(look: Look) -> Option<Event> {
    look.not_started.then_some(Event::Lost)
}

/// Whether a guest may know of prepare, and has to be told never to start it.
pub(crate) fn has_to_be_withdrawn(record: &Record) -> bool {
    record.sent != Sent::Never
}

/// What a guest's answer to a withdrawal tells.
pub(crate) enum Withdrew {
    /// It is too late.
    Learnt(Event),
    /// The queue has to go.
    Fence {
        /// The guest wrote down that it will never start prepare.
        withdrawn: bool,
    },
}

/// A withdrawal was answered, or was not.
pub(crate) fn withdrew(answer: Result<CommandState>) -> Withdrew {
    match answer {
        Ok(CommandState::Withdrawn) => Withdrew::Fence { withdrawn: true },
        Ok(state @ CommandState::Done(_)) => Withdrew::Learnt(Event::Command(state, None)),
        Ok(CommandState::Running { .. }) => Withdrew::Learnt(Event::TooLate),
        Ok(_) | Err(_) => Withdrew::Fence { withdrawn: false },
    }
}

/// The queue was taken away, with these in it; None: it was gone already.
pub(crate) fn fenced(command: &CommandId, withdrawn: bool, taken: Option<Vec<MessageId>>) -> Event {
    if withdrawn {
        return Event::Command(CommandState::Withdrawn, None);
    }
    let copies = taken.iter().flatten().filter(|id| *id == command).count();
    Event::Fenced {
        discarded: u32::try_from(copies).unwrap_or(u32::MAX),
    }
}

/// A report of the record's guest. None: it says nothing of prepare.
pub(crate) fn reported(record: &Record, report: Report) -> Option<Event> {
    let boot = report.boot;
    let ours = |command: &CommandId| *command == record.command;
    match report.event {
        ReportEvent::Accepted { command } if ours(&command) => Some(Event::Accepted(boot)),
        ReportEvent::Progress { command, .. } if ours(&command) => Some(Event::Command(
            CommandState::Running { runs: 0 },
            Some(boot),
        )),
        ReportEvent::Done { command, receipt } if ours(&command) => {
            Some(Event::Command(CommandState::Done(receipt), Some(boot)))
        }
        ReportEvent::Refused { message, reason } if ours(&message) => Some(Event::Refused(reason)),
        _ => None,
    }
}

fn gone_or_trouble(error: &Error) -> Event {
    match error.kind() {
        ErrorKind::NoQueue => Event::QueueGone,
        _ => trouble(error),
    }
}

fn trouble(error: &Error) -> Event {
    Event::Trouble(Trouble::from(error))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

    use serde_json::value::RawValue;

    use super::*;
    use crate::{
        names::GuestId,
        workflow::record::{Deadlines, SendPolicy},
    };

    #[test]
    fn w24_a_guest_that_cannot_be_asked_is_not_sent_prepare_again() {
        let address = GuestAddress::from(GuestId::new("vm").unwrap());
        let empty = QueueStatus::new(address.queue());
        let payload = RawValue::NULL.to_owned().into();
        let (policy, deadlines) = (SendPolicy::default(), Deadlines::default());
        let record = Record::new(address, payload, policy, deadlines, 0);
        let look = |answer| asked(&record, answer).look.unwrap();
        let absent = look(Err(Error::new(ErrorKind::NoConsumer, "killed")));
        let ignorant = look(Ok(CommandState::Unknown));
        let found = |look| looked(&record, look, Ok(empty.clone()));
        assert!(matches!(found(absent), Looked::Fine));
        assert!(matches!(found(ignorant), Looked::Learnt(Event::Lost)));
        assert!(read_dead_letters(absent, Ok(None)).is_none());
        let read = read_dead_letters(ignorant, Ok(None));
        assert!(matches!(read, Some(Event::Lost)));
    }
}
