//! A consumer's life: what it holds, what is known of it, and how it ends.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};

use super::{
    api::Fence,
    attach::{delivered, lock_name, still_there, sweep},
    connection::{Link, lock},
    names::Names,
    notes::{Mark, Notes},
    received::Received,
    scribe::Order,
    settled::Settled,
};
use crate::{
    deadline::Deadline,
    error::{ErrorKind, Result},
};

/// A consumer's life.
pub(super) struct Hold {
    pub(super) link: Arc<Link>,
    pub(super) names: Names,
    pub(super) token: String,
    /// The server's consumer.
    pub(super) consumer: String,
    /// Which making of the queue this is.
    pub(super) made: String,
    pub(super) limit: u32,
    pub(super) prefetch: usize,
    pub(super) inner: Mutex<Inner>,
    /// Tells the puller that there is room, or something to give back, or that it goes.
    pub(super) wake: Notify,
    /// Tells `next` that something came.
    pub(super) arrived: Notify,
    /// Leases are void: what they held was given back or belongs to another.
    pub(super) void: AtomicBool,
    /// Tells the keeper to answer no question any more, and that it does not.
    pub(super) hush: Notify,
    pub(super) deaf: watch::Sender<bool>,
    pub(super) gone: watch::Sender<bool>,
    /// How many settlements are on their way.
    pub(super) settling: watch::Sender<usize>,
    pub(super) scribe: mpsc::Sender<Order>,
}

/// A settlement on its way.
pub(super) struct Settling(Arc<Hold>);

impl Settling {
    pub(super) fn begin(hold: &Arc<Hold>) -> Self {
        hold.settling.send_modify(|settling| *settling += 1);
        Self(Arc::clone(hold))
    }
}

impl Drop for Settling {
    fn drop(&mut self) {
        self.0.settling.send_modify(|settling| *settling -= 1);
    }
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) phase: Phase,
    pub(super) buffer: VecDeque<Received>,
    /// Handed out and not settled yet, by sequence.
    pub(super) held: HashMap<u64, Held>,
    /// How many of the held the server has confirmed: they take no room (law C9).
    pub(super) confirmed: usize,
    /// Dropped unsettled, still among the held.
    pub(super) loose: Vec<Received>,
    /// When each that waits for its delay is due.
    pub(super) delayed: HashMap<u64, Instant>,
    pub(super) marks: BTreeMap<u64, Mark>,
    pub(super) floors: Vec<u64>,
    /// What was settled, by runs: noted where the server does not sync.
    pub(super) settled: Settled,
    /// When the leases were last kept.
    pub(super) kept: Instant,
    /// It leaves the server's consumer to those who have deliveries in hand and to the next one.
    pub(super) shared: bool,
    /// Something says that the server's consumer is gone.
    pub(super) suspicious: bool,
    pub(super) pulls: VecDeque<Pull>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Attached,
    /// Gives back what it has. With true what was handed out goes too.
    Leaving(bool),
    Left,
    Ended(ErrorKind),
}

/// One that was handed out.
#[derive(Debug)]
pub(super) struct Held {
    /// Where it is acknowledged.
    pub(super) reply: String,
    /// Somebody has its delivery in hand.
    pub(super) live: bool,
    /// It is on its way back to the server, and may come again before the server's word that it arrived.
    pub(super) returning: bool,
    /// The server has confirmed that it is settled, which is not believed yet.
    pub(super) confirmed: bool,
}

impl Held {
    pub(super) fn new(received: &Received, live: bool) -> Self {
        Self {
            reply: received.reply().to_owned(),
            live,
            returning: false,
            confirmed: false,
        }
    }
}

#[derive(Debug)]
pub(super) struct Pull {
    pub(super) number: u64,
    pub(super) left: usize,
    pub(super) until: Instant,
}

/// What a consumer says of itself when it is asked.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Told {
    /// Which making of the queue it is attached to; empty: it said nothing.
    pub(super) made: String,
    pub(super) attached: bool,
    pub(super) in_flight: u64,
    pub(super) delayed: u64,
}

impl Told {
    /// What is assumed of one that is attached, for all that the server knows, and says nothing.
    pub(super) fn silent() -> Self {
        Self {
            attached: true,
            ..Self::default()
        }
    }

    pub(super) fn is_of(&self, made: &str) -> bool {
        self.made.is_empty() || self.made == made
    }
}

impl Inner {
    /// How often a message was handed out.
    pub(super) fn handed_out(&self, sequence: u64) -> u32 {
        let noted = self.marks.get(&sequence).map_or(0, |mark| mark.seen);
        let times = noted + Notes::floors_over(&self.floors, sequence);
        u32::try_from(times.max(0)).unwrap_or(u32::MAX)
    }

    /// One of those that were asked for came; the oldest pull is served first.
    pub(super) fn came(&mut self) {
        if let Some(first) = self.pulls.front_mut() {
            first.left -= 1;
            if first.left == 0 {
                self.pulls.pop_front();
            }
        }
    }

    pub(super) fn hand_out(&mut self, received: &Received) -> u32 {
        self.marks.entry(received.sequence).or_default().seen += 1;
        self.held
            .insert(received.sequence, Held::new(received, true));
        self.handed_out(received.sequence)
    }

    /// One is held no more.
    pub(super) fn let_go(&mut self, sequence: u64) {
        if let Some(held) = self.held.remove(&sequence) {
            self.confirmed -= usize::from(held.confirmed);
        }
    }
}

impl Hold {
    pub(super) fn is_attached(&self) -> bool {
        lock(&self.inner).phase == Phase::Attached
    }

    /// Lets it go; what was handed out stays with its holders unless `all` goes.
    pub(super) fn release(&self, all: bool) {
        let mut inner = lock(&self.inner);
        match inner.phase {
            Phase::Attached => inner.phase = Phase::Leaving(all),
            Phase::Leaving(false) if all => inner.phase = Phase::Leaving(true),
            _ => {}
        }
        drop(inner);
        if all {
            self.void.store(true, Ordering::Release);
        }
        self.wake.notify_one();
        self.arrived.notify_one();
    }

    pub(super) async fn until_gone(&self, deadline: Deadline) -> Result<()> {
        let mut gone = self.gone.subscribe();
        // Fails only without a sender, and `self` is one.
        deadline.bound(gone.wait_for(|gone| *gone)).await.map(drop)
    }

    /// Waits until no settlement is on its way; for one that lets no new one begin.
    pub(super) async fn until_settled(&self, deadline: Deadline) -> Result<()> {
        let mut settling = self.settling.subscribe();
        deadline
            .bound(settling.wait_for(|settling| *settling == 0))
            .await
            .map(drop)
    }

    pub(super) fn end(&self, kind: ErrorKind) {
        let mut inner = lock(&self.inner);
        if inner.phase == Phase::Attached {
            inner.phase = Phase::Ended(kind);
        }
        inner.buffer.clear();
        drop(inner);
        self.void.store(true, Ordering::Release);
        self.gone.send_replace(true);
        self.hush.notify_one();
        self.wake.notify_one();
        self.arrived.notify_one();
    }

    /// Looks at once whether all is well, rather than at the next pull.
    pub(super) fn wake_up(&self) {
        lock(&self.inner).suspicious = true;
        self.wake.notify_one();
    }

    /// Says that no question is answered any more.
    pub(super) fn be_deaf(&self) {
        self.deaf.send_replace(true);
    }

    pub(super) fn told(&self) -> Told {
        let inner = lock(&self.inner);
        let now = Instant::now();
        Told {
            made: self.made.clone(),
            attached: inner.phase == Phase::Attached,
            in_flight: (inner.held.len() - inner.confirmed) as u64,
            delayed: inner.delayed.values().filter(|due| **due > now).count() as u64,
        }
    }

    /// Whether nothing is left to be kept.
    pub(super) fn is_over(&self) -> bool {
        let inner = lock(&self.inner);
        match inner.phase {
            Phase::Attached | Phase::Leaving(_) => false,
            Phase::Left => inner.held.is_empty() || self.void.load(Ordering::Acquire),
            Phase::Ended(_) => true,
        }
    }

    /// The server has confirmed that a message is settled: there is room for another, whatever is found out
    /// of that still.
    pub(super) fn confirmed(&self, sequence: u64) {
        {
            let mut inner = lock(&self.inner);
            let inner = &mut *inner;
            if let Some(held) = inner.held.get_mut(&sequence)
                && !std::mem::replace(&mut held.confirmed, true)
            {
                inner.confirmed += 1;
            }
        }
        self.wake.notify_one();
    }

    /// Looks what is left after the connection was made again: a server that was killed has forgotten
    /// what it delivered last, and delivers that again. What was settled last may be there
    /// again too, if it is not the `server` of before: that has a new id each time that it starts.
    pub(super) async fn look_back(&self, server: &mut String, deadline: Deadline) -> Result<()> {
        self.check(deadline).await?;
        let last = delivered(&self.link, &self.names, &self.consumer, deadline).await?;
        let Some(last) = last else {
            return Ok(());
        };
        let settled = {
            let mut inner = lock(&self.inner);
            inner.buffer.retain(|received| received.sequence <= last);
            inner.settled.runs().clone()
        };
        let now = self.link.client.server_info().server_id;
        if *server != now {
            sweep(&self.link, &self.names, &settled, deadline).await?;
            *server = now;
        }
        Ok(())
    }

    /// Looks why the server does not answer for the consumer; ends it if that is for good.
    pub(super) async fn check(&self, deadline: Deadline) -> Result<()> {
        let stream = self.link.stream(&self.names, deadline).await?;
        let description = stream.and_then(|stream| stream.description());
        let same = description.is_some_and(|description| {
            description.made == self.made && description.fence != Some(Fence::Deleting)
        });
        if !same {
            self.end(ErrorKind::QueueDeleted);
            return Ok(());
        }
        for name in [&self.consumer, &lock_name(&self.token)] {
            if !still_there(&self.link, &self.names, name, deadline).await? {
                // Between two looks the whole queue may have gone.
                let stream = self.link.stream(&self.names, deadline).await?;
                let description = stream.and_then(|stream| stream.description());
                let deleted = description.is_none_or(|description| {
                    description.made != self.made || description.fence == Some(Fence::Deleting)
                });
                self.end(if deleted {
                    ErrorKind::QueueDeleted
                } else {
                    ErrorKind::Conflict
                });
                return Ok(());
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hold")
            .field("names", &self.names)
            .field("token", &self.token)
            .finish_non_exhaustive()
    }
}
