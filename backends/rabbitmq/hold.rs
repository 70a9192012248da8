//! The task behind a consumer: attached, cut off, attached again, until it is let go or ended.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use lapin::options::QueueDeleteOptions;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{OwnedMutexGuard, oneshot},
    time::Instant,
};

use super::{
    ask::{Asked, ask},
    closed,
    connection::AGAIN,
    consume::{End, Holder, Phase},
    credential,
    fault::Fault,
    link::Wire,
    lock,
    lockqueue::{self, try_exclusive},
    no_queue, notes,
    station::{Exit, Held, Station, listen},
    topology,
};
use crate::{
    backoff::Backoff,
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    names::QueueName,
};

/// How many who left with deliveries in hand are found by those who ask.
const LEFT: usize = 3;

/// The lanes on which those who hold messages of a queue are asked: the consumer's, whose queue is its
/// lock too, and those of consumers that left with deliveries in hand.
pub(super) fn lanes(queue: &QueueName) -> Vec<String> {
    let left = (0..LEFT).map(|n| format!("{queue}.left.{n}"));
    std::iter::once(lock_of(queue)).chain(left).collect()
}

pub(super) fn lock_of(queue: &QueueName) -> String {
    format!("{queue}.lock")
}

/// What a holder says that it has.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Has {
    pub(super) attached: bool,
    pub(super) ready: u64,
    pub(super) in_flight: u64,
    pub(super) delayed: u64,
    /// Of one that is not attached any more: what it has in hand, by its keys.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) keys: Vec<String>,
}

/// What a holder says after it let go: where it waits for what became of the queue.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct LetGo {
    pub(super) tell: String,
}

pub(super) const HAS: &str = "has";
pub(super) const YIELD: &str = "yield";
pub(super) const LET_GO: &str = "let-go";
pub(super) const GONE: &str = "gone";
pub(super) const STAYS: &str = "stays";

/// How long one who holds the lock is asked at a time whether it is there still.
const PATIENCE: Duration = Duration::from_secs(2);

/// With less time than this left, one who holds the lock and does not answer counts as alive.
const SHORT: Duration = Duration::from_millis(200);

pub(super) fn conflict() -> Error {
    Error::new(
        ErrorKind::Conflict,
        "another consumer is attached to this queue, and it is alive",
    )
}

pub(super) async fn run(
    holder: Arc<Holder>,
    ready: oneshot::Sender<Result<()>>,
    deadline: Deadline,
) {
    let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));
    let first = loop {
        let attempt = tokio::select! {
            attempt = attach(&holder, deadline) => attempt,
            () = holder.core.until_closed() => Err(closed().into()),
        };
        match attempt {
            Ok(station) => break Ok(station),
            Err(Fault::Lost(_)) if !deadline.has_passed() && !is_leaving(&holder) => {
                backoff.pause().await;
            }
            Err(fault) => break Err(fault.error()),
        }
    };
    let mut station = match first {
        Ok(station) => {
            // Whoever asked may be gone: then the consumer was dropped, which is an order to leave.
            let _ = ready.send(Ok(()));
            Some(station)
        }
        Err(error) => {
            finish(&holder, None);
            let _ = ready.send(Err(error));
            return;
        }
    };
    let mut uncounted: HashMap<String, i64> = HashMap::new();
    let mut not_before = HashMap::new();
    let mut patience = None;
    // Those who asked for the end: told when nothing of it is left.
    let mut told = Vec::new();
    let end = loop {
        if let Some(mut here) = station.take() {
            patience = None;
            backoff.reset();
            let wire = Arc::clone(&here.wire);
            // A call on a broken connection may wait for an answer for ever.
            let exit = tokio::select! {
                exit = here.serve(&holder) => exit,
                () = wire.until_over() => Exit::Lost,
            };
            match exit {
                Exit::Lost => {
                    here.cut_off(&holder, &mut uncounted);
                    not_before = std::mem::take(&mut here.not_before);
                }
                Exit::Done(asked) => {
                    told = asked;
                    break None;
                }
                Exit::Over(end) => break Some(end),
            }
        }
        if is_leaving(&holder) {
            break None;
        }
        let attempt = tokio::select! {
            attempt = attach(&holder, Deadline::after(Duration::from_secs(3600))) => attempt,
            () = holder.news.notified() => {
                holder.refuse_settlements();
                continue;
            }
            () = holder.core.until_closed() => break Some(End::Closed),
        };
        let fault = match attempt {
            Ok(mut again) => {
                // What was buffered here came back uncounted by us, whatever the broker counts.
                if let Some(register) = &mut again.register {
                    for (key, times) in uncounted.drain() {
                        *register.notes.uncounted.entry(key).or_default() += times;
                    }
                }
                again.not_before = std::mem::take(&mut not_before);
                station = Some(again);
                continue;
            }
            Err(fault) => fault,
        };
        // A broken connection's lock stays until the broker misses its heartbeats.
        let until = *patience.get_or_insert_with(|| Instant::now() + holder.core.heartbeat * 5);
        match fault.error().kind() {
            ErrorKind::NoQueue => break Some(End::QueueDeleted),
            ErrorKind::AuthRefused => break Some(End::Refused),
            ErrorKind::Conflict if Instant::now() > until => break Some(End::TakenOver),
            _ => backoff.pause().await,
        }
    };
    finish(&holder, end);
    drop(told);
}

pub(super) fn is_leaving(holder: &Holder) -> bool {
    lock(&holder.state).phase == Phase::Leaving
}

/// Nothing of it is on the broker any more.
fn finish(holder: &Arc<Holder>, end: Option<End>) {
    let mut state = lock(&holder.state);
    state.phase = Phase::Gone(end);
    state.generation += 1;
    state.buffer.clear();
    // Their senders are dropped: who waits for a settlement has lost the lease, who waits for the end
    // has it.
    let orders = std::mem::take(&mut state.orders);
    drop(state);
    drop(orders);
    holder.ready.notify_one();
}

/// Takes the queue's lock, its register, and then its messages.
async fn attach(holder: &Arc<Holder>, deadline: Deadline) -> Result<Station, Fault> {
    let core = &holder.core;
    let wire = core.talk.wire(deadline).await?;
    tokio::select! {
        station = deadline.bound(attach_over(holder, &wire, deadline)) => station?,
        () = wire.until_dead() => Err(Fault::Lost("it broke".into())),
    }
}

async fn attach_over(
    holder: &Arc<Holder>,
    wire: &Arc<Wire>,
    deadline: Deadline,
) -> Result<Station, Fault> {
    let (core, queue) = (&holder.core, &holder.queue);
    let lane = lock_of(queue);
    // One at a time in this process, and none while it is being deleted from here: the broker does not
    // keep its own connection out.
    let turn = core.turn(&lane).lock_owned().await;
    if topology::counts(wire, queue).await?.is_none() {
        return Err(no_queue().into());
    }
    let channel = loop {
        if let Some(channel) = try_exclusive(wire, &lane).await? {
            break channel;
        }
        // Some time is left after it, to say what was seen.
        let soon = deadline.or_after(PATIENCE.min(deadline.remaining() / 4 * 3));
        match ask(core, &lane, YIELD, Bytes::new(), soon).await {
            Ok(Asked::Answer(answer)) => {
                let has: Has = serde_json::from_slice(&answer).unwrap_or_default();
                if has.attached {
                    return Err(conflict().into());
                }
            }
            // It is about to give the lock back, which may take a while; a refusal costs a channel for good.
            Ok(Asked::Nobody) => tokio::time::sleep(AGAIN).await,
            // Alive and busy, or gone: the broker notices that.
            Ok(Asked::Silent) if deadline.remaining() > SHORT => {}
            Ok(Asked::Silent) => return Err(conflict().into()),
            Err(error) => return Err(error.into()),
        }
    };
    // Given back with the lock in it if anything fails from here.
    let lock = GiveBack {
        wire: Arc::clone(wire),
        name: Some(lane.clone()),
        turn: Some(turn),
    };
    credential::open(core, &channel, &lane).await?;
    let control = listen(&channel, &lane).await?;
    let side = wire.channel().await?;
    let reading = lockqueue::take(core, wire, notes::reader_of(queue)).await?;
    let register = notes::take(&side, queue).await;
    reading.release().await?;
    let register = match register {
        Ok(Some(register)) => register,
        Ok(None) => return Err(Fault::Lost("the queue's register is elsewhere".into())),
        Err(fault) if notes::is_gone(&fault) => return Err(no_queue().into()),
        Err(fault) => return Err(fault),
    };
    let held = Held {
        channel,
        side,
        control,
        lane,
        register,
    };
    let mut station = Station::new(Arc::clone(wire), held, holder.prefetch);
    station.subscribe(queue).await?;
    lock.keep();
    Ok(station)
}

/// A lock that is given back unless it is kept.
struct GiveBack {
    wire: Arc<Wire>,
    name: Option<String>,
    /// Given up last: the next of this process would be given the lock, and lose it to this one's end.
    turn: Option<OwnedMutexGuard<()>>,
}

impl GiveBack {
    fn keep(mut self) {
        self.name = None;
    }
}

impl Drop for GiveBack {
    fn drop(&mut self) {
        if let (Some(name), Ok(runtime)) = (self.name.take(), tokio::runtime::Handle::try_current())
        {
            let (wire, turn) = (Arc::clone(&self.wire), self.turn.take());
            runtime.spawn(async move {
                let _turn = turn;
                let back = async {
                    if let Ok(channel) = wire.channel().await {
                        let options = QueueDeleteOptions::default();
                        let _ = channel.queue_delete(name.into(), options).await;
                        let _ = channel.close(200, "done".into()).await;
                    }
                };
                tokio::select! {
                    () = back => {}
                    // The lock went with it.
                    () = wire.until_dead() => {}
                }
            });
        }
    }
}
