//! Deleting a queue: an arbitration (law Q6).
//!
//! Its binding goes first, so that no publish reaches it any more. Whoever holds messages of it is asked
//! to let them go; whoever does not answer is waited for, until the broker notices that it is gone. Then
//! all messages are in the queue, they are read, and everything is deleted.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use lapin::{Channel, options::QueueDeleteOptions, types::FieldTable};

use super::{
    ask::{Asked, ask},
    barrier,
    connection::{AGAIN, Core, EXCHANGE},
    dead::dead_of,
    fault::Fault,
    hold::{GONE, LET_GO, LetGo, STAYS, lanes, lock_of},
    index, letter,
    link::Wire,
    lock,
    lockqueue::{self, try_exclusive},
    no_queue, notes,
    publish::{gate_of, routing_key},
    shelf, status, topology,
};
use crate::{
    broker::{DeleteMode, Discarded},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    names::QueueName,
};

pub(super) async fn delete(
    core: &Arc<Core>,
    queue: &QueueName,
    mode: DeleteMode,
    deadline: Deadline,
) -> Result<Discarded> {
    let queue = queue.clone();
    // What a first attempt discarded before its connection broke.
    let known: Arc<Mutex<Option<Discarded>>> = Arc::default();
    core.run(deadline, move |core, wire| {
        let (queue, known) = (queue.clone(), Arc::clone(&known));
        async move { delete_once(&core, &wire, &queue, mode, &known, deadline).await }
    })
    .await
}

async fn delete_once(
    core: &Arc<Core>,
    wire: &Arc<Wire>,
    queue: &QueueName,
    mode: DeleteMode,
    known: &Mutex<Option<Discarded>>,
    deadline: Deadline,
) -> Result<Discarded, Fault> {
    let gate = lockqueue::take(core, wire, gate_of(queue)).await?;
    let Some(found) = topology::probe_there(wire, queue).await? else {
        gate.release().await?;
        let known = lock(known).clone();
        return match known {
            Some(discarded) => {
                index::remove(core, wire, queue).await?;
                Ok(discarded)
            }
            None => Err(no_queue().into()),
        };
    };
    if mode == DeleteMode::IfEmpty {
        // Most are refused without disturbing a publisher; what a consumer holds is seen below.
        let counts = topology::counts(wire, queue).await?;
        if counts.is_some_and(|counts| counts.ready + counts.dead > 0) {
            refuse_if_held(core, wire, queue, deadline).await?;
        }
    }
    let fence = Fence::raise(core, wire, queue, found.max_messages).await?;
    if mode == DeleteMode::IfEmpty {
        // Once more, with nobody publishing. The broker says that there is nothing in a queue whose leader
        // does not run; it has to do something for us first.
        let channel = wire.spare().await?;
        barrier::pass(&channel, queue.as_str()).await?;
        wire.spares().keep(channel);
        refuse_if_held(core, wire, queue, deadline).await?;
    }
    let lane = lock_of(queue);
    let turn = core.turn(&lane).lock_owned().await;
    let mut told = Verdicts {
        core: Arc::clone(core),
        lanes: Vec::new(),
    };
    for other in lanes(queue) {
        let_go(core, &other, &mut told.lanes, deadline).await?;
    }
    let mut tries = 0;
    let locked = loop {
        if let Some(channel) = try_exclusive(wire, &lane).await? {
            break channel;
        }
        // A refusal costs a channel for good.
        tries += 1;
        tokio::time::sleep(AGAIN * tries.min(12)).await;
        if tries % 8 == 0 {
            let_go(core, &lane, &mut told.lanes, deadline).await?;
        }
    };
    let discarded = take_down(core, wire, queue, known).await?;
    fence.keep();
    lock(&core.bound).remove(queue);
    core.gates.learn(queue, None);
    index::remove(core, wire, queue).await?;
    told.say(GONE).await;
    locked
        .queue_delete(lane.into(), QueueDeleteOptions::default())
        .await?;
    locked.close(200, "done".into()).await?;
    drop(turn);
    gate.release().await?;
    Ok(discarded)
}

async fn refuse_if_held(
    core: &Arc<Core>,
    wire: &Wire,
    queue: &QueueName,
    deadline: Deadline,
) -> Result<(), Fault> {
    let status = status::count(core, wire, queue, deadline).await?;
    let messages = status.ok_or_else(|| Fault::from(no_queue()))?.messages();
    if messages > 0 {
        return Err(Error::new(
            ErrorKind::NotEmpty { messages },
            format!("the queue holds {messages} messages, and was not to be emptied"),
        )
        .into());
    }
    Ok(())
}

/// Asks whoever is on this lane to let go, until it did or is gone.
async fn let_go(
    core: &Core,
    lane: &str,
    told: &mut Vec<String>,
    deadline: Deadline,
) -> Result<(), Fault> {
    loop {
        let soon = deadline.or_after(core.heartbeat);
        match ask(core, lane, LET_GO, Bytes::new(), soon).await? {
            Asked::Nobody => return Ok(()),
            Asked::Answer(answer) => {
                if let Ok(LetGo { tell }) = serde_json::from_slice(&answer) {
                    told.push(tell);
                }
                return Ok(());
            }
            Asked::Silent if deadline.has_passed() => return Err(super::late().into()),
            Asked::Silent => {}
        }
    }
}

/// Those who let go, and wait to hear what for. Dropped, they hear that the queue stays.
struct Verdicts {
    core: Arc<Core>,
    lanes: Vec<String>,
}

impl Verdicts {
    async fn say(mut self, what: &'static str) {
        say(&self.core, std::mem::take(&mut self.lanes), what).await;
    }
}

async fn say(core: &Core, lanes: Vec<String>, what: &str) {
    for lane in lanes {
        let soon = Deadline::after(core.heartbeat * 3);
        // Whoever is gone meanwhile learns it from the broker.
        let _ = ask(core, &lane, what, Bytes::new(), soon).await;
    }
}

impl Drop for Verdicts {
    fn drop(&mut self) {
        let lanes = std::mem::take(&mut self.lanes);
        if let (false, Ok(runtime)) = (lanes.is_empty(), tokio::runtime::Handle::try_current()) {
            let core = Arc::clone(&self.core);
            runtime.spawn(async move { say(&core, lanes, STAYS).await });
        }
    }
}

/// A queue without its binding. Dropped, it is bound again.
struct Fence {
    wire: Arc<Wire>,
    queue: QueueName,
    max_messages: Option<u64>,
    keep: bool,
}

impl Fence {
    async fn raise(
        core: &Core,
        wire: &Arc<Wire>,
        queue: &QueueName,
        max_messages: Option<u64>,
    ) -> Result<Self, Fault> {
        lock(&core.bound).remove(queue);
        let fence = Self {
            wire: Arc::clone(wire),
            queue: queue.clone(),
            max_messages,
            keep: false,
        };
        let channel = wire.spare().await?;
        channel
            .queue_unbind(
                queue.as_str().into(),
                EXCHANGE.into(),
                routing_key(queue, max_messages).into(),
                FieldTable::default(),
            )
            .await?;
        wire.spares().keep(channel);
        Ok(fence)
    }

    fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let (wire, queue, max) = (
                Arc::clone(&self.wire),
                self.queue.clone(),
                self.max_messages,
            );
            runtime.spawn(async move {
                if let Ok(channel) = wire.channel().await {
                    // Where the queue has gone, this breaks the channel and nothing else.
                    let _ = topology::bind(&channel, &queue, max).await;
                }
            });
        }
    }
}

/// Reads what goes, and deletes it: what stands beside the queue first, so that a delete which is broken
/// off is found and done again.
async fn take_down(
    core: &Arc<Core>,
    wire: &Wire,
    queue: &QueueName,
    known: &Mutex<Option<Discarded>>,
) -> Result<Discarded, Fault> {
    let reading = lockqueue::take(core, wire, notes::reader_of(queue)).await?;
    let mut ids = Vec::new();
    // Held until the queue is deleted, each with its channel.
    let mut shelves = Vec::new();
    loop {
        let room = Discarded::MAX_IDS - ids.len();
        let shelf = shelf::open(wire, queue.as_str(), room)
            .await?
            .ok_or_else(|| Fault::from(no_queue()))?;
        if shelf.entries.is_empty() {
            break;
        }
        ids.extend(
            shelf
                .entries
                .iter()
                .map(|entry| letter::message(&entry.properties, Vec::new()).id),
        );
        shelves.push(shelf);
    }
    let channel = wire.spare().await?;
    let beside = wire.spare().await?;
    let (dead, _) = tokio::try_join!(
        gone(&beside, dead_of(queue)),
        gone(&channel, notes::notes_of(queue))
    )?;
    wire.spares().keep(beside);
    let held = ids.len() as u64;
    // The broker counts what nobody holds.
    let rest = gone(&channel, queue.to_string()).await?;
    let discarded = Discarded::new(held + rest + dead, ids);
    *lock(known) = Some(discarded.clone());
    wire.spares().keep(channel);
    drop(shelves);
    reading.release().await?;
    Ok(discarded)
}

/// Deletes a queue; how much it had ready. One that is not there had nothing.
async fn gone(channel: &Channel, queue: String) -> Result<u64, Fault> {
    let deleted = channel
        .queue_delete(queue.into(), QueueDeleteOptions::default())
        .await?;
    Ok(u64::from(deleted))
}
