//! A queue's one consumer: what it pulls, what it holds, and how it goes.
//!
//! Three tasks of its own serve it, so that no dropped future leaves anything half done (law P5): one
//! pulls and gives back, one keeps the leases and says that it lives (`keep`), one writes the notes.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_nats::{Message as Raw, Subscriber};
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    time::{Instant, sleep},
};

use super::{
    api::Fence,
    attach::{attach, delivered, lock_name, still_there, sweep},
    closed,
    connection::{Link, gone, lock, revoked},
    form, keep,
    names::{Names, token},
    notes::{Mark, Notes, is_settled, now_ms, settle},
    settle::{self, Lease},
    trays,
};
use crate::{
    broker::{ConsumeOptions, Consumer, Delivery},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    names::QueueName,
};

/// How long the server keeps a pull that has nothing to give.
const PULL: Duration = Duration::from_secs(10);

/// How much later than that a pull counts as lost.
const SLACK: Duration = Duration::from_secs(2);

/// The pause after a pull that failed while all is well otherwise.
const PAUSE: Duration = Duration::from_millis(100);

/// How long going takes at the most, with the server down too (law F8).
const GOING: Duration = Duration::from_secs(5);

/// How far back it is looked for what was on its way when a consumer went.
const MOST_ON_ITS_WAY: u64 = 4_096;

/// A consumer's life.
pub(super) struct Hold {
    pub(super) link: Arc<Link>,
    pub(super) names: Names,
    pub(super) token: String,
    /// The server's consumer.
    pub(super) consumer: String,
    /// Which making of the queue this is.
    made: String,
    pub(super) limit: u32,
    prefetch: usize,
    pub(super) inner: Mutex<Inner>,
    /// Tells the puller that there is room, or something to give back, or that it goes.
    pub(super) wake: Notify,
    /// Tells `next` that something came.
    arrived: Notify,
    /// Leases are void: what they held was given back or belongs to another.
    pub(super) void: AtomicBool,
    /// Tells the keeper to answer no question any more, and that it does not.
    pub(super) hush: Notify,
    deaf: watch::Sender<bool>,
    gone: watch::Sender<bool>,
    /// How many settlements are on their way.
    settling: watch::Sender<usize>,
    scribe: mpsc::Sender<Order>,
}

/// What the scribe is to do before it answers.
struct Order {
    write: bool,
    /// Look whether the server's consumer is there still: that is the answer then.
    look: bool,
    done: oneshot::Sender<Result<bool>>,
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
    confirmed: usize,
    /// Dropped unsettled, still among the held.
    pub(super) loose: Vec<Received>,
    /// When each that waits for its delay is due.
    pub(super) delayed: HashMap<u64, Instant>,
    pub(super) marks: BTreeMap<u64, Mark>,
    floors: Vec<u64>,
    /// What was settled, by runs: noted where the server does not sync.
    settled: BTreeMap<u64, u64>,
    /// When the leases were last kept.
    pub(super) kept: Instant,
    /// It leaves the server's consumer to those who have deliveries in hand and to the next one.
    shared: bool,
    /// Something says that the server's consumer is gone.
    suspicious: bool,
    pulls: VecDeque<Pull>,
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
    fn new(received: &Received, live: bool) -> Self {
        Self {
            reply: received.reply().to_owned(),
            live,
            returning: false,
            confirmed: false,
        }
    }
}

#[derive(Debug)]
struct Pull {
    number: u64,
    left: usize,
    until: Instant,
}

/// One message from the server, to be acknowledged at its reply subject.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) sequence: u64,
    /// How often it was handed out, with this time once it is.
    pub(super) attempt: u32,
    pub(super) raw: Raw,
}

impl Received {
    pub(super) fn reply(&self) -> &str {
        self.raw.reply.as_ref().map_or("", |reply| reply.as_str())
    }

    pub(super) fn message(&self) -> crate::message::Message {
        form::read(
            self.raw.headers.as_ref(),
            self.raw.payload.clone(),
            self.sequence,
        )
    }
}

/// What a consumer says of itself when it is asked.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Told {
    /// Which making of the queue it is attached to; empty: it said nothing.
    made: String,
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

pub(super) async fn consume(
    link: &Arc<Link>,
    queue: &QueueName,
    options: ConsumeOptions,
    deadline: Deadline,
) -> Result<Box<dyn Consumer>> {
    link.alive()?;
    let (sender, answer) = oneshot::channel();
    let (link, queue) = (Arc::clone(link), queue.clone());
    tokio::spawn(async move {
        let consumer = begin(link, &queue, options, deadline).await;
        // Whoever was dropped meanwhile does not take it, and with it what was attached goes again.
        let _ = sender.send(consumer);
    });
    let consumer = deadline.bound(answer).await?.map_err(|_| closed())??;
    Ok(Box::new(consumer))
}

async fn begin(
    link: Arc<Link>,
    queue: &QueueName,
    options: ConsumeOptions,
    deadline: Deadline,
) -> Result<Attending> {
    let names = Names::of(queue);
    let stream = link.queue(&names, deadline).await?;
    let limit = stream.spec(queue)?.delivery_limit;
    let made = stream
        .description()
        .map(|description| description.made)
        .unwrap_or_default();
    let token = token();
    let inbox = link.client.new_inbox();
    let subscribe = async |subject: String| -> Result<Subscriber> {
        deadline
            .bound(link.client.subscribe(subject))
            .await?
            .map_err(gone)
    };
    let alive = subscribe(names.hold(&token)).await?;
    let arrivals = subscribe(format!("{inbox}.*")).await?;
    let first = stream.first();
    let attached = attach(&link, &names, &token, first, deadline).await?;
    let (scribe, orders) = mpsc::channel(64);
    let prefetch = usize::try_from(options.prefetch.get()).unwrap_or(usize::MAX);
    let mut notes = attached.notes;
    let now = (Instant::now(), now_ms());
    let delayed = notes.marks.iter().filter(|(_, mark)| mark.due > now.1);
    let inner = Inner {
        phase: Phase::Attached,
        buffer: VecDeque::new(),
        held: HashMap::new(),
        confirmed: 0,
        loose: Vec::new(),
        delayed: delayed
            .map(|(sequence, mark)| (*sequence, now.0 + Duration::from_millis(mark.due - now.1)))
            .collect(),
        marks: std::mem::take(&mut notes.marks),
        floors: notes.floors.clone(),
        settled: notes.settled.clone(),
        kept: now.0,
        shared: false,
        suspicious: false,
        pulls: VecDeque::new(),
    };
    let hold = Arc::new(Hold {
        names,
        token,
        consumer: attached.consumer,
        made,
        limit: limit.get(),
        prefetch,
        inner: Mutex::new(inner),
        wake: Notify::new(),
        arrived: Notify::new(),
        void: AtomicBool::new(false),
        hush: Notify::new(),
        deaf: watch::Sender::new(false),
        gone: watch::Sender::new(false),
        settling: watch::Sender::new(0),
        scribe,
        link,
    });
    hold.link.remember_hold(&hold);
    tokio::spawn(keep::keep(Arc::clone(&hold), alive, attached.asked));
    tokio::spawn(write_notes(Arc::downgrade(&hold), notes, orders));
    tokio::spawn(run(Arc::clone(&hold), arrivals, inbox));
    if !queue.is_commands() {
        tokio::spawn(trays::collect(Arc::downgrade(&hold), queue.clone()));
    }
    if hold.link.alive().is_err() {
        hold.release(true);
        return Err(closed());
    }
    Ok(Attending { hold })
}

/// The consumer that a user has.
#[derive(Debug)]
struct Attending {
    hold: Arc<Hold>,
}

#[async_trait]
impl Consumer for Attending {
    async fn next(&mut self) -> Result<Delivery> {
        loop {
            let arrived = self.hold.arrived.notified();
            {
                let mut inner = lock(&self.hold.inner);
                match &inner.phase {
                    Phase::Attached => {}
                    Phase::Leaving(_) | Phase::Left => return Err(closed()),
                    Phase::Ended(kind) => return Err(ended(kind)),
                }
                if let Some(mut received) = inner.buffer.pop_front() {
                    let attempt = inner.hand_out(&received);
                    drop(inner);
                    received.attempt = attempt;
                    let message = received.message();
                    let lease = Lease::new(Arc::clone(&self.hold), received);
                    return Ok(Delivery::new(message, attempt, Box::new(lease)));
                }
            }
            arrived.await;
        }
    }

    async fn close(self: Box<Self>, deadline: Deadline) -> Result<()> {
        self.hold.release(false);
        self.hold.until_gone(deadline).await
    }
}

impl Drop for Attending {
    fn drop(&mut self) {
        self.hold.release(false);
    }
}

impl Inner {
    /// How often a message was handed out.
    fn handed_out(&self, sequence: u64) -> u32 {
        let noted = self.marks.get(&sequence).map_or(0, |mark| mark.seen);
        let times = noted + Notes::floors_over(&self.floors, sequence);
        u32::try_from(times.max(0)).unwrap_or(u32::MAX)
    }

    /// One of those that were asked for came; the oldest pull is served first.
    fn came(&mut self) {
        if let Some(first) = self.pulls.front_mut() {
            first.left -= 1;
            if first.left == 0 {
                self.pulls.pop_front();
            }
        }
    }

    fn hand_out(&mut self, received: &Received) -> u32 {
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

    /// The marks as they are noted. What is in hand of one that is attached is not counted yet: when that
    /// dies, its floor counts it. So there is nothing to note of what was handed out for the first time.
    fn marks_to_note(&self) -> BTreeMap<u64, Mark> {
        if self.phase != Phase::Attached {
            return self.marks.clone();
        }
        let now = now_ms();
        let noted = self.marks.iter().map(|(sequence, mark)| {
            let in_hand = self.held.get(sequence).is_some_and(|held| !held.returning);
            match in_hand && mark.due <= now {
                true => {
                    let (seen, due) = (mark.seen - 1, 0);
                    (*sequence, Mark { seen, due })
                }
                false => (*sequence, *mark),
            }
        });
        noted.filter(|(_, mark)| *mark != Mark::default()).collect()
    }
}

fn ended(kind: &ErrorKind) -> Error {
    let text = match kind {
        ErrorKind::AuthRefused => return revoked(),
        ErrorKind::QueueDeleted => "the queue was deleted",
        ErrorKind::Conflict => "another consumer took over while this one was cut off",
        _ => "the consumer ended",
    };
    Error::new(kind.clone(), text)
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

    /// Whether the server's word that a message is settled counts: only if its consumer is there after it,
    /// since of one that was deleted meanwhile it confirms what it did not do (laws C4, Q6).
    pub(super) async fn believe(&self, deadline: Deadline) -> Result<()> {
        if self.insist(false, true, deadline).await? {
            return Ok(());
        }
        self.wake_up();
        Err(settle::unknown())
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

    /// A message is settled for certain: it is held no more.
    ///
    /// Where the server would forget that when it is killed, it is noted first (law C2).
    pub(super) async fn settled(&self, sequence: u64, deadline: Deadline) -> Result<()> {
        let forgetful = !self.link.is_synced();
        {
            let mut inner = lock(&self.inner);
            inner.let_go(sequence);
            inner.marks.remove(&sequence);
            if forgetful {
                settle(&mut inner.settled, sequence);
            }
        }
        self.wake.notify_one();
        match forgetful {
            true => self.insist(true, false, deadline).await.map(drop),
            false => Ok(()),
        }
    }

    /// Orders again for as long as the caller has: the scribe gives up sooner, and an outage is no answer.
    async fn insist(&self, write: bool, look: bool, deadline: Deadline) -> Result<bool> {
        loop {
            match self.order(write, look, deadline).await {
                Err(error)
                    if is_outage(&error)
                        && !deadline.has_passed()
                        && !self.void.load(Ordering::Acquire) =>
                {
                    deadline.bound(sleep(PAUSE)).await?;
                }
                answer => return answer,
            }
        }
    }

    /// Writes the notes as they are now, or later.
    pub(super) async fn note(&self, deadline: Deadline) -> Result<()> {
        self.order(true, false, deadline).await.map(drop)
    }

    async fn order(&self, write: bool, look: bool, deadline: Deadline) -> Result<bool> {
        let (done, answer) = oneshot::channel();
        let order = Order { write, look, done };
        deadline
            .bound(self.scribe.send(order))
            .await?
            .map_err(|_| closed())?;
        deadline.bound(answer).await?.map_err(|_| closed())?
    }

    /// Looks what is left after the connection was made again: a server that was killed has forgotten
    /// what it delivered last, and delivers that again. What was settled last may be there
    /// again too, if it is not the `server` of before: that has a new id each time that it starts.
    async fn look_back(&self, server: &mut String, deadline: Deadline) -> Result<()> {
        self.check(deadline).await?;
        let last = delivered(&self.link, &self.names, &self.consumer, deadline).await?;
        let Some(last) = last else {
            return Ok(());
        };
        let settled = {
            let mut inner = lock(&self.inner);
            inner.buffer.retain(|received| received.sequence <= last);
            inner.settled.clone()
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

/// Writes the notes, and looks after the consumer, for all who asked meanwhile at once.
async fn write_notes(
    hold: std::sync::Weak<Hold>,
    mut notes: Notes,
    mut orders: mpsc::Receiver<Order>,
) {
    let mut tidying: Option<tokio::task::JoinHandle<()>> = None;
    while let Some(order) = orders.recv().await {
        let mut all = vec![order];
        while let Ok(order) = orders.try_recv() {
            all.push(order);
        }
        let Some(hold) = hold.upgrade() else { return };
        let (is_write, is_look) = (
            all.iter().any(|order| order.write),
            all.iter().any(|order| order.look),
        );
        // At once: they are of different acknowledgements.
        let (written, seen) = tokio::join!(
            async {
                match is_write {
                    true => write(&hold, &mut notes).await,
                    false => Ok(()),
                }
            },
            async {
                match is_look {
                    true => look(&hold).await,
                    false => Ok(true),
                }
            }
        );
        for order in all {
            let answer = match (&written, &seen) {
                (Err(error), _) if order.write => Err(error),
                (_, Err(error)) if order.look => Err(error),
                (_, Ok(there)) if order.look => Ok(*there),
                _ => Ok(true),
            };
            let answer = answer
                .map_err(|error| Error::new(error.kind().clone(), error.message().to_owned()));
            let _ = order.done.send(answer);
        }
        // Not waited for: an old copy is in nobody's way, unless the queue takes one message only, and then
        // the writer takes it away.
        if let Some(old) = notes.take_old() {
            if let Some(tidying) = tidying.take() {
                let _ = tidying.await;
            }
            tidying = Some(tokio::spawn(tidy(Settling::begin(&hold), hold, old)));
        }
    }
}

async fn write(hold: &Hold, notes: &mut Notes) -> Result<()> {
    {
        let inner = lock(&hold.inner);
        notes.marks = inner.marks_to_note();
        notes.settled.clone_from(&inner.settled);
        if inner.phase != Phase::Attached {
            notes.holder = None;
            notes.consumer = inner.shared.then(|| hold.consumer.clone());
        }
    }
    let deadline = Deadline::after(GOING);
    notes.write(&hold.link, &hold.names, deadline).await?;
    if !hold.link.is_synced() {
        // As the writer does: its own places lie between the messages.
        settle(&mut lock(&hold.inner).settled, notes.place());
    }
    Ok(())
}

/// Once only, and counted as a settlement, for which whoever deletes the queue waits: later it might be
/// another queue's message that has this place.
async fn tidy(_settling: Settling, hold: Arc<Hold>, old: u64) {
    let verb = format!("STREAM.MSG.DELETE.{}", hold.names.stream);
    let body = json!({ "seq": old, "no_erase": true });
    let deleted = hold.link.api_once(&verb, &body, Deadline::after(GOING));
    if let Err(error) = deleted.await {
        tracing::debug!(?error, "an old copy of the notes is left");
    }
}

async fn look(hold: &Hold) -> Result<bool> {
    let deadline = Deadline::after(GOING);
    still_there(&hold.link, &hold.names, &hold.consumer, deadline).await
}

fn is_outage(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::BrokerUnreachable | ErrorKind::DeadlineExceeded
    )
}

/// Pulls, hands in, gives back, until it goes.
async fn run(hold: Arc<Hold>, mut arrivals: Subscriber, inbox: String) {
    let mut state = hold.link.state();
    let mut generation = state.borrow_and_update().generation;
    let mut server = hold.link.client.server_info().server_id;
    let mut number = 0;
    loop {
        give_back_loose(&hold);
        if lock(&hold.inner).phase != Phase::Attached {
            break;
        }
        let suspicious = std::mem::take(&mut lock(&hold.inner).suspicious);
        if suspicious {
            let _ = hold
                .check(Deadline::after(hold.link.options.takeover))
                .await;
            continue;
        }
        pull(&hold, &inbox, &mut number).await;
        let until = lock(&hold.inner).pulls.front().map(|pull| pull.until);
        let until = until.unwrap_or_else(|| Instant::now() + hold.link.options.takeover);
        tokio::select! {
            arrived = arrivals.next() => match arrived {
                Some(raw) => receive(&hold, raw, &inbox).await,
                None => sleep(PAUSE).await,
            },
            () = hold.wake.notified() => {}
            () = tokio::time::sleep_until(until) => {
                // A pull was lost, or none is out, since all is in hand: is the queue still there?
                lock(&hold.inner).pulls.retain(|pull| pull.until > Instant::now());
                if hold.link.is_connected() {
                    let _ = hold.check(Deadline::after(hold.link.options.takeover)).await;
                }
            }
            _ = state.changed() => {
                let now = state.borrow_and_update().generation;
                if hold.link.is_revoked() {
                    hold.end(ErrorKind::AuthRefused);
                } else if now != generation {
                    generation = now;
                    // What the server was asked on the old connection it has forgotten.
                    lock(&hold.inner).pulls.clear();
                    let deadline = Deadline::after(hold.link.options.takeover);
                    let _ = hold.look_back(&mut server, deadline).await;
                }
            }
        }
    }
    let leaves = matches!(lock(&hold.inner).phase, Phase::Leaving(_));
    if leaves {
        leave(&hold, arrivals).await;
    }
    hold.gone.send_replace(true);
    while !hold.is_over() {
        give_back_loose(&hold);
        hold.wake.notified().await;
    }
    give_back_loose(&hold);
}

/// Asks for as many as there is room for (law C9).
async fn pull(hold: &Arc<Hold>, inbox: &str, number: &mut u64) {
    if !hold.link.is_connected() {
        return;
    }
    let room = {
        let mut inner = lock(&hold.inner);
        let asked: usize = inner.pulls.iter().map(|pull| pull.left).sum();
        let unsettled = inner.held.len() - inner.confirmed;
        let room = hold
            .prefetch
            .saturating_sub(inner.buffer.len() + unsettled + asked);
        // A few large pulls rather than many of one, but never none while there is room.
        if room == 0 || (asked > 0 && room < hold.prefetch.div_ceil(4)) {
            return;
        }
        *number += 1;
        let until = Instant::now() + PULL + SLACK;
        inner.pulls.push_back(Pull {
            number: *number,
            left: room,
            until,
        });
        room
    };
    let subject = format!(
        "$JS.API.CONSUMER.MSG.NEXT.{}.{}",
        hold.names.stream, hold.consumer
    );
    let body = format!("{{\"batch\":{room},\"expires\":{}}}", PULL.as_nanos());
    let reply = format!("{inbox}.{number}");
    if let Err(error) = hold
        .link
        .client
        .publish_with_reply(subject, reply, body.into())
        .await
    {
        tracing::debug!(%error, "a pull was not sent");
        lock(&hold.inner)
            .pulls
            .retain(|pull| pull.number != *number);
    }
}

async fn receive(hold: &Arc<Hold>, raw: Raw, inbox: &str) {
    if let Some(status) = raw.status {
        let number = raw
            .subject
            .strip_prefix(inbox)
            .and_then(|number| number[1..].parse().ok());
        lock(&hold.inner)
            .pulls
            .retain(|pull| Some(pull.number) != number);
        if !matches!(status.as_u16(), 100 | 404 | 408) {
            let checked = hold
                .check(Deadline::after(hold.link.options.takeover))
                .await;
            if checked.is_err() || lock(&hold.inner).phase == Phase::Attached {
                // All is well, so this passes: a leader that changes, a server that ends.
                sleep(PAUSE).await;
            }
        }
        return;
    }
    let Some(sequence) = raw.reply.as_ref().and_then(|reply| place(reply)) else {
        return;
    };
    let mut received = Received {
        sequence,
        attempt: 0,
        raw,
    };
    if is_settled(&lock(&hold.inner).settled, sequence) {
        lock(&hold.inner).came();
        settle::end(hold, &received).await;
        return;
    }
    let (rest, suspect) = {
        let mut inner = lock(&hold.inner);
        inner.came();
        let ours = inner
            .held
            .get(&sequence)
            .is_some_and(|held| !held.returning);
        if ours || inner.buffer.iter().any(|other| other.sequence == sequence) {
            // Its lease ran out while nobody could keep it, and nobody else has it: the same delivery.
            return;
        }
        inner.let_go(sequence);
        inner.delayed.remove(&sequence);
        received.attempt = inner.handed_out(sequence);
        let due = inner.marks.get(&sequence).map_or(0, |mark| mark.due);
        (
            due.saturating_sub(now_ms()),
            Notes::floors_over(&inner.floors, sequence) > 0,
        )
    };
    if rest > 0 {
        // The server forgot the delay.
        settle::put_off(hold, &received, Duration::from_millis(rest)).await;
        return;
    }
    if suspect && settle::is_dead_already(hold, &received).await {
        return;
    }
    if let Some(letter) = form::was_letter(received.raw.headers.as_ref()) {
        // Sent back by one that did not live to take the letter away (law C7).
        let deadline = Deadline::after(hold.link.options.takeover);
        let _ = hold.link.forget(&hold.names, letter, deadline).await;
    }
    let mut inner = lock(&hold.inner);
    if received.attempt >= hold.limit {
        // Given back by one that could not say so any more: it goes to the dead letters.
        inner.held.insert(sequence, Held::new(&received, false));
        inner.loose.push(received);
        drop(inner);
        hold.wake.notify_one();
        return;
    }
    inner.buffer.push_back(received);
    drop(inner);
    hold.arrived.notify_one();
}

/// Where this is in the stream, from where it is acknowledged:
/// `$JS.ACK.<stream>.<consumer>.<delivered>.<sequence>.…`, or since 2.14 also
/// `$JS.ACK.<domain>.<account>.<stream>.<consumer>.<delivered>.<sequence>.…`.
pub(super) fn place(reply: &str) -> Option<u64> {
    let place = place_in(reply.split('.').count())?;
    reply.split('.').nth(place)?.parse().ok()
}

fn place_in(words: usize) -> Option<usize> {
    match words {
        9 => Some(5),
        11.. => Some(7),
        _ => None,
    }
}

/// Gives back what was dropped unsettled, each in a task of its own.
fn give_back_loose(hold: &Arc<Hold>) {
    let loose = std::mem::take(&mut lock(&hold.inner).loose);
    for received in loose {
        let hold = Arc::clone(hold);
        tokio::spawn(async move { settle::give_back(&hold, &received).await });
    }
}

/// Gives back what it has and makes way for the next.
async fn leave(hold: &Arc<Hold>, arrivals: Subscriber) {
    let deadline = Deadline::after(GOING);
    let mut deaf = hold.deaf.subscribe();
    hold.hush.notify_one();
    let _ = deadline.bound(deaf.wait_for(|deaf| *deaf)).await;
    let (shared, mut buffer) = {
        let mut inner = lock(&hold.inner);
        let all = inner.phase == Phase::Leaving(true);
        inner.shared = !all && inner.held.values().any(|held| held.live);
        (inner.shared, std::mem::take(&mut inner.buffer))
    };
    if shared {
        buffer.extend(rest(hold, arrivals, deadline).await);
    } else {
        drop(arrivals);
        // With the server's consumer goes what its confirms are worth: what is on its way gets its answer
        // first. Nothing new begins, since nobody holds anything, or nobody may settle it.
        let _ = hold.until_settled(deadline.or_after(GOING / 2)).await;
    }
    if let Err(error) = go(hold, buffer, deadline).await {
        // The next one finds it dead.
        tracing::debug!(%error, "a consumer went without a word to the server");
    }
    let mut inner = lock(&hold.inner);
    if !inner.shared {
        inner.held.clear();
        inner.confirmed = 0;
        inner.loose.clear();
    }
    if matches!(inner.phase, Phase::Leaving(_)) {
        inner.phase = Phase::Left;
    }
}

/// What comes before the server hears that nobody listens: left lying, it would come to the next one
/// when its lease runs out, after what stands behind it.
async fn rest(hold: &Hold, mut arrivals: Subscriber, deadline: Deadline) -> Vec<Received> {
    let mut rest = Vec::new();
    if !hold.link.is_connected() || arrivals.drain().await.is_err() {
        return rest;
    }
    while let Ok(Some(raw)) = deadline.bound(arrivals.next()).await {
        let sequence = raw.reply.as_ref().and_then(|reply| place(reply));
        if let Some(sequence) = sequence.filter(|_| raw.status.is_none()) {
            rest.push(Received {
                sequence,
                attempt: 0,
                raw,
            });
        }
    }
    rest
}

/// Tells the server, step by step: what was handed out how often, then what goes back.
async fn go(hold: &Arc<Hold>, buffer: VecDeque<Received>, deadline: Deadline) -> Result<()> {
    hold.note(deadline).await?;
    if lock(&hold.inner).shared {
        let back = going_back(hold, buffer, deadline).await;
        // The server puts what is given back behind what waits to be delivered again already. Put off for
        // now, all of it leaves that line, and then enters it in the order of the queue (law C11).
        let lease = hold.link.options.takeover.as_nanos();
        for what in [format!("-NAK {{\"delay\":{lease}}}"), "-NAK".into()] {
            if let Err(error) = give_back(hold, &back, what, deadline).await {
                tracing::debug!(%error, "what was buffered comes when its lease runs out");
            }
        }
    } else {
        // All that it had in its hands or on its way goes back with it, at once.
        hold.link
            .drop_consumer(&hold.names, &hold.consumer, deadline)
            .await?;
    }
    hold.link
        .drop_consumer(&hold.names, &lock_name(&hold.token), deadline)
        .await
}

/// Tells the server the same of each, one after the other: it keeps their order, and with its word on the
/// last it has come to all.
async fn give_back(
    hold: &Hold,
    back: &BTreeMap<u64, String>,
    what: String,
    deadline: Deadline,
) -> Result<()> {
    let mut replies = back.values();
    let Some(last) = replies.next_back() else {
        return Ok(());
    };
    let body = Bytes::from(what);
    for reply in replies {
        let sent = hold.link.client.publish(reply.clone(), body.clone());
        deadline.bound(sent).await?.map_err(gone)?;
    }
    settle::tell(&hold.link, last, body, deadline).await
}

/// Where all that goes back is given back, in the order of the queue: what was buffered, and what the server
/// had on its way while it heard that nobody listens, or was about to deliver again. That came to nobody,
/// and is known by its number alone; what was handed out is noted, and stays with its holders.
async fn going_back(
    hold: &Hold,
    buffer: VecDeque<Received>,
    deadline: Deadline,
) -> BTreeMap<u64, String> {
    let told = hold.link.consumer(&hold.names, &hold.consumer, deadline);
    let told = told.await.ok().flatten().unwrap_or_default();
    let number = |of: &str, which: &str| told[of][which].as_u64().unwrap_or(0);
    let last = number("delivered", "stream_seq");
    let first = number("ack_floor", "stream_seq").max(last.saturating_sub(MOST_ON_ITS_WAY)) + 1;
    let inner = lock(&hold.inner);
    let in_hand = |sequence| {
        inner
            .held
            .get(&sequence)
            .is_some_and(|held| !held.returning)
    };
    let buffered = buffer.iter();
    let mut back: BTreeMap<_, _> = buffered
        .filter(|received| !in_hand(received.sequence))
        .map(|received| (received.sequence, received.reply().to_owned()))
        .collect();
    let known = inner.held.values().map(|held| held.reply.as_str());
    let known = known.chain(buffer.iter().map(Received::reply)).next();
    let Some(known) = known.map(str::to_owned) else {
        return back;
    };
    for sequence in first..=last {
        if !inner.marks.contains_key(&sequence) {
            let reply = || reply_of(&known, sequence, number("delivered", "consumer_seq"));
            back.entry(sequence).or_insert_with(reply);
        }
    }
    back
}

/// Where another delivery of the same consumer is acknowledged: its place, and a number in the order of
/// deliveries that the server takes for one of them.
fn reply_of(other: &str, sequence: u64, delivery: u64) -> String {
    let mut words: Vec<_> = other.split('.').map(str::to_owned).collect();
    if let Some(place) = place_in(words.len()) {
        words[place] = sequence.to_string();
        words[place + 1] = delivery.to_string();
    }
    words.join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_an_ack_subject_are_read() {
        assert_eq!(place("$JS.ACK.s.c.2.7.9.1700000000.0"), Some(7));
        assert_eq!(place("$JS.ACK._.hash.s.c.2.7.9.1700000000.0"), Some(7));
        assert_eq!(place("$JS.ACK._.hash.s.c.2.7.9.1700000000.0.x"), Some(7));
        assert_eq!(place("$JS.ACK.s.c.2"), None);
        assert_eq!(place("_INBOX.x"), None);
    }

    #[test]
    fn c11_a_delivery_that_came_to_nobody_has_an_ack_subject() {
        for reply in [
            "$JS.ACK.s.c.2.7.9.1700000000.0",
            "$JS.ACK._.hash.s.c.2.7.9.1700000000.0",
        ] {
            let other = reply_of(reply, 8, 12);
            assert_eq!(place(&other), Some(8));
            assert_eq!(other, reply.replace(".7.9.", ".8.12."));
        }
    }
}
