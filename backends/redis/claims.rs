//! What a consumer's task sends to the server and what comes back: claims, and settlements in batches.

use redis::{Cmd, Value};
use tokio::sync::oneshot;

use super::{
    consume::{Claimed, Held, Hold},
    form::{Entry, answer, text},
    scripts,
    ticket::Ticket,
};
use crate::{broker::Settlement, error::Result};

/// What one claim brings at the most, a single larger message apart: what is on its way holds up the
/// signs of life behind it.
const MOST_BYTES: usize = 1024 * 1024;

/// What became of a claim.
pub(super) enum Claim {
    Got {
        claimed: Vec<Claimed>,
        /// What no consumer can read; it is not ours, and goes to the dead letters.
        foreign: Vec<(Held, String)>,
        /// Milliseconds until the next delayed one is due.
        due: Option<u64>,
        more: bool,
    },
    Gone,
    Taken,
}

pub(super) fn claim(hold: &Hold, epoch: &str, renew: bool, want: usize) -> Cmd {
    let mut call = hold
        .core
        .dialer
        .calls()
        .on_queue(&scripts::CLAIM, &hold.queue);
    call.arg(&hold.token)
        .arg(epoch)
        .arg(lease_ms(hold))
        .arg(u8::from(renew))
        .arg(want)
        .arg(MOST_BYTES);
    call
}

pub(super) fn lease_ms(hold: &Hold) -> u128 {
    hold.core.dialer.lease.as_millis()
}

pub(super) fn read_claim(value: Value) -> Option<Claim> {
    let (word, mut parts) = answer(value)?;
    match word.as_str() {
        "gone" => return Some(Claim::Gone),
        "taken" => return Some(Claim::Taken),
        _ => {}
    }
    let Value::Array(entries) = parts.next()? else {
        return None;
    };
    let (mut claimed, mut foreign) = (Vec::with_capacity(entries.len()), Vec::new());
    for entry in entries {
        let entry = Entry::read(entry)?;
        let held = Held {
            entry: entry.id,
            count: entry.count.unwrap_or(1),
        };
        match entry.message {
            Ok(message) => claimed.push(Claimed { held, message }),
            Err(wrong) => foreign.push((held, wrong.why)),
        }
    }
    let due = match parts.next() {
        Some(Value::Int(due)) => u64::try_from(due).ok(),
        _ => None,
    };
    let more = matches!(parts.next(), Some(Value::Int(1)));
    Some(Claim::Got {
        claimed,
        foreign,
        due,
        more,
    })
}

/// How a delivery ends.
pub(super) enum End {
    Ack {
        id: String,
    },
    Retry {
        ms: u128,
    },
    /// Never handed out: its count goes back too.
    Uncounted,
    Dead {
        reason: String,
    },
}

/// One delivery that ends, and who waits for it.
pub(super) struct Op {
    pub(super) held: Held,
    pub(super) end: End,
    pub(super) waiter: Option<(Ticket, oneshot::Sender<Result<()>>)>,
}

impl Op {
    pub(super) fn alone(held: Held, end: End) -> Self {
        Self {
            held,
            end,
            waiter: None,
        }
    }

    pub(super) fn of(order: super::consume::Order) -> Self {
        let end = match order.settlement {
            Settlement::Ack => End::Ack { id: order.id },
            // A hundred years are for ever; rounded up: not before (C6).
            Settlement::Retry(delay) => End::Retry {
                ms: delay.as_micros().div_ceil(1000).min(100 * 365 * 86_400_000),
            },
            Settlement::DeadLetter(reason) => End::Dead { reason },
        };
        Self {
            held: order.held,
            end,
            waiter: Some((order.ticket, order.reply)),
        }
    }

    /// Begins, unless its caller gave up: then it goes back.
    pub(super) fn begin(&self) -> bool {
        self.waiter
            .as_ref()
            .is_none_or(|(ticket, _)| ticket.begin())
    }

    pub(super) fn answer(self, answer: Result<()>) {
        if let Some((_, reply)) = self.waiter {
            // The caller may have given up.
            let _ = reply.send(answer);
        }
    }

    fn is_ack(&self) -> bool {
        matches!(self.end, End::Ack { .. })
    }
}

/// What else a batch of settlements does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Stay,
    Detach,
    Release,
}

/// Deliveries that end together.
pub(super) struct Batch {
    pub(super) number: u64,
    pub(super) ops: Vec<Op>,
    pub(super) mode: Mode,
    pub(super) renew: bool,
    /// Whether it may have been done by a connection that broke.
    pub(super) again: bool,
}

impl Batch {
    pub(super) fn call(&self, hold: &Hold, epoch: &str) -> Cmd {
        let mut call = hold
            .core
            .dialer
            .calls()
            .on_queue(&scripts::SETTLE, &hold.queue);
        let acks = self.ops.iter().filter(|op| op.is_ack());
        call.arg(&hold.token)
            .arg(epoch)
            .arg(if self.renew { lease_ms(hold) } else { 0 })
            .arg(match self.mode {
                Mode::Stay => "",
                Mode::Detach => "detach",
                Mode::Release => "release",
            })
            .arg("PUBLISH")
            .arg(acks.clone().count());
        for op in acks.clone() {
            call.arg(&op.held.entry);
        }
        for op in acks {
            if let End::Ack { id } = &op.end {
                call.arg(id);
            }
        }
        for op in &self.ops {
            let (kind, argument) = match &op.end {
                End::Ack { .. } => continue,
                End::Retry { ms } => ("retry", ms.to_string()),
                End::Uncounted => ("uncounted", String::new()),
                End::Dead { reason } => ("dead", reason.clone()),
            };
            call.arg(kind)
                .arg(&op.held.entry)
                .arg(op.held.count)
                .arg(argument);
        }
        call
    }

    /// Which of the operations were done: all acks, and the others by the server's letters.
    pub(super) fn done(&self, codes: &str) -> Vec<bool> {
        let mut codes = codes.bytes();
        self.ops
            .iter()
            .map(|op| op.is_ack() || codes.next() == Some(b'1'))
            .collect()
    }
}

/// What became of a batch.
pub(super) enum Settled {
    Done(String),
    Gone,
    Lost,
}

pub(super) fn read_settled(value: Value) -> Option<Settled> {
    let (word, mut parts) = answer(value)?;
    Some(match word.as_str() {
        "gone" => Settled::Gone,
        "lost" => Settled::Lost,
        _ => Settled::Done(parts.next().and_then(text)?),
    })
}

/// What the server has pending under a token, from an entry on. None: the hold is over.
pub(super) fn read_held(value: Value) -> Option<Option<Vec<Held>>> {
    let (word, mut parts) = answer(value)?;
    if word != "ok" {
        return Some(None);
    }
    let Value::Array(list) = parts.next()? else {
        return None;
    };
    let read = |one| {
        let Value::Array(pair) = one else {
            return None;
        };
        let mut pair = pair.into_iter();
        let entry = text(pair.next()?)?;
        match pair.next()? {
            Value::Int(count) => Some(Held {
                entry,
                count: u32::try_from(count).ok()?,
            }),
            _ => None,
        }
    };
    Some(list.into_iter().map(read).collect())
}
