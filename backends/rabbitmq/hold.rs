//! The task behind a consumer: attached, cut off, attached again, until it is let go or ended.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _};
use lapin::{
    Channel,
    message::Delivery as Raw,
    options::{
        BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions,
        QueueDeleteOptions,
    },
    types::FieldTable,
};
use serde::{Deserialize, Serialize};
use tokio::{sync::oneshot, time::Instant};

use super::{
    ask::{Asked, Back, ask},
    closed,
    connection::Core,
    consume::{End, Holder, Item, Order, Phase, lease_lost},
    fault::Fault,
    letter,
    link::Wire,
    lock,
    lockqueue::{self, try_exclusive},
    no_queue, notes, topology,
};
use crate::{
    backoff::Backoff,
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    message::Message,
    names::QueueName,
};

/// How much more than its prefetch a consumer has from the broker: what is settled next is here already.
const HEAD_ROOM: std::ops::RangeInclusive<usize> = 16..=1024;

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
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Has {
    pub(super) attached: bool,
    pub(super) ready: u64,
    pub(super) in_flight: u64,
    pub(super) delayed: u64,
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

/// How long a holder that let go waits for what becomes of the queue, and how often it looks itself.
const LOOK: Duration = Duration::from_millis(500);

const VERDICT: Duration = Duration::from_secs(30);

pub(super) fn conflict() -> Error {
    Error::new(
        ErrorKind::Conflict,
        "another consumer is attached to this queue, and it is alive",
    )
}

/// A message that this consumer has from the broker.
pub(super) struct Out {
    pub(super) key: String,
    pub(super) attempt: u32,
    pub(super) message: Message,
}

/// An attachment: one channel, from when it was opened until it breaks.
pub(super) struct Station {
    pub(super) wire: Arc<Wire>,
    pub(super) channel: Channel,
    /// The register is held on a channel of its own: an ack of many here must not reach it.
    pub(super) side: Channel,
    main: Option<lapin::Consumer>,
    control: lapin::Consumer,
    lane: String,
    pub(super) register: Option<notes::Held>,
    pub(super) limit: u32,
    /// By delivery tag.
    pub(super) out: BTreeMap<u64, Out>,
    /// Those that wait for their time, here.
    pub(super) delayed: BTreeSet<(Instant, u64)>,
    /// When a message of this key may come again: from before its delay began.
    pub(super) not_before: HashMap<String, Instant>,
    room: usize,
    subscriptions: u32,
}

enum Exit {
    /// The channel broke.
    Lost,
    /// Nothing is left to do.
    Done,
    Over(End),
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
    let end = loop {
        if let Some(mut here) = station.take() {
            patience = None;
            backoff.reset();
            match here.serve(&holder).await {
                Exit::Lost => {
                    here.cut_off(&holder, &mut uncounted);
                    not_before = std::mem::take(&mut here.not_before);
                }
                Exit::Done => break None,
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
}

fn is_leaving(holder: &Holder) -> bool {
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
    let _turn = core.turn(&lane).lock_owned().await;
    if topology::counts(wire, queue).await?.is_none() {
        return Err(no_queue().into());
    }
    let channel = loop {
        if let Some(channel) = try_exclusive(wire, &lane).await? {
            break channel;
        }
        let soon = deadline.or_after(Duration::from_secs(2));
        match ask(core, &lane, YIELD, Bytes::new(), soon).await {
            Ok(Asked::Answer(answer)) => {
                let has: Has = serde_json::from_slice(&answer).unwrap_or_default();
                if has.attached {
                    return Err(conflict().into());
                }
            }
            Ok(Asked::Nobody) => {}
            Ok(Asked::Silent) => return Err(conflict().into()),
            Err(error) => return Err(error.into()),
        }
    };
    // Given back with the lock in it if anything fails from here.
    let lock = GiveBack {
        wire: Arc::clone(wire),
        name: Some(lane.clone()),
    };
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
    let head_room = holder.prefetch.clamp(*HEAD_ROOM.start(), *HEAD_ROOM.end());
    let mut station = Station {
        wire: Arc::clone(wire),
        channel,
        side,
        main: None,
        control,
        lane,
        limit: register.spec.delivery_limit.get(),
        register: Some(register),
        out: BTreeMap::new(),
        delayed: BTreeSet::new(),
        not_before: HashMap::new(),
        room: (holder.prefetch.saturating_add(head_room)).min(usize::from(u16::MAX)),
        subscriptions: 0,
    };
    station.subscribe(queue).await?;
    lock.keep();
    Ok(station)
}

/// A lock that is given back unless it is kept.
struct GiveBack {
    wire: Arc<Wire>,
    name: Option<String>,
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
            let wire = Arc::clone(&self.wire);
            runtime.spawn(async move {
                if let Ok(channel) = wire.channel().await {
                    let options = QueueDeleteOptions::default();
                    let _ = channel.queue_delete(name.into(), options).await;
                    let _ = channel.close(200, "done".into()).await;
                }
            });
        }
    }
}

async fn listen(channel: &Channel, lane: &str) -> Result<lapin::Consumer, Fault> {
    let options = BasicConsumeOptions {
        no_ack: true,
        ..BasicConsumeOptions::default()
    };
    let consumer = channel
        .basic_consume(lane.into(), lane.into(), options, FieldTable::default())
        .await?;
    Ok(consumer)
}

impl Station {
    /// Asks for messages. Once more when those that wait for their time have used up the room.
    async fn subscribe(&mut self, queue: &QueueName) -> Result<(), Fault> {
        self.subscriptions += 1;
        let room = u16::try_from(self.room).unwrap_or(u16::MAX);
        self.channel
            .basic_qos(room, BasicQosOptions::default())
            .await?;
        let tag = format!("main.{}", self.subscriptions);
        let consumer = self
            .channel
            .basic_consume(
                queue.as_str().into(),
                tag.into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await?;
        self.main = Some(consumer);
        Ok(())
    }

    async fn unsubscribe(&mut self, holder: &Arc<Holder>) -> Result<(), Fault> {
        let Some(mut main) = self.main.take() else {
            return Ok(());
        };
        self.channel
            .basic_cancel(main.tag(), BasicCancelOptions::default())
            .await?;
        // What was sent before the broker heard of it.
        while let Some(Some(Ok(delivery))) = main.next().now_or_never() {
            self.received(holder, delivery);
        }
        Ok(())
    }

    async fn serve(&mut self, holder: &Arc<Holder>) -> Exit {
        loop {
            let due = self.delayed.first().map(|(due, _)| *due);
            let wake = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            let main = async {
                match &mut self.main {
                    Some(main) => main.next().await,
                    None => std::future::pending().await,
                }
            };
            let step = tokio::select! {
                biased;
                delivery = main => match delivery {
                    Some(Ok(delivery)) => {
                        self.received(holder, delivery);
                        self.drain(holder);
                        self.make_room(holder).await
                    }
                    _ => Ok(Some(Exit::Lost)),
                },
                () = holder.news.notified() => self.obey(holder).await,
                word = self.control.next() => match word {
                    Some(Ok(word)) => self.hear(holder, word).await,
                    _ => Ok(Some(Exit::Lost)),
                },
                () = wake => {
                    self.release_due(holder);
                    Ok(None)
                }
                () = self.wire.until_dead() => Ok(Some(Exit::Lost)),
            };
            match step {
                Ok(None) => {}
                Ok(Some(exit)) => return exit,
                Err(fault) => {
                    tracing::debug!(?fault, queue = %holder.queue, "a consumer lost its channel");
                    return Exit::Lost;
                }
            }
        }
    }

    /// Takes what has come meanwhile, without waiting.
    fn drain(&mut self, holder: &Arc<Holder>) {
        while let Some(Some(Ok(delivery))) = self
            .main
            .as_mut()
            .and_then(|main| main.next().now_or_never())
        {
            self.received(holder, delivery);
        }
    }

    fn received(&mut self, holder: &Arc<Holder>, delivery: Raw) {
        let tag = delivery.delivery_tag;
        let key = letter::key(&delivery.properties);
        let noted = self.register.as_ref().map(|register| &register.notes);
        let uncounted = noted.and_then(|notes| notes.uncounted.get(&key));
        let count = letter::returns(&delivery.properties) + 1 - uncounted.copied().unwrap_or(0);
        let attempt = u32::try_from(count.max(1)).unwrap_or(u32::MAX);
        let due = self.not_before.get(&key).copied().or_else(|| {
            let left = noted?.due.get(&key)?.left();
            (!left.is_zero()).then(|| Instant::now() + left)
        });
        let message = letter::message(&delivery.properties, delivery.data);
        let out = Out {
            key,
            attempt,
            message: message.clone(),
        };
        self.out.insert(tag, out);
        if attempt > self.limit {
            // It has had its deliveries: this one is nobody's (law C7).
            holder.order(Order::Settle(super::settle::over_the_limit(holder, tag)));
        } else if let Some(due) = due.filter(|due| *due > Instant::now()) {
            self.delayed.insert((due, tag));
        } else {
            let item = Item {
                tag,
                attempt,
                message,
            };
            lock(&holder.state).buffer.push_back(item);
            holder.ready.notify_one();
        }
    }

    /// What waits for its time must not keep others from coming.
    async fn make_room(&mut self, holder: &Arc<Holder>) -> Result<Option<Exit>, Fault> {
        let stuck = {
            let state = lock(&holder.state);
            state.buffer.is_empty() && state.handed < holder.prefetch
        };
        if stuck && self.delayed.len() + holder.prefetch >= self.room {
            self.unsubscribe(holder).await?;
            self.subscribe(&holder.queue).await?;
        }
        Ok(None)
    }

    fn release_due(&mut self, holder: &Arc<Holder>) {
        let now = Instant::now();
        while let Some((due, tag)) = self.delayed.first().copied()
            && due <= now
        {
            self.delayed.pop_first();
            if let Some(out) = self.out.get(&tag) {
                let item = Item {
                    tag,
                    attempt: out.attempt,
                    message: out.message.clone(),
                };
                lock(&holder.state).buffer.push_back(item);
                holder.ready.notify_one();
            }
        }
    }

    async fn obey(&mut self, holder: &Arc<Holder>) -> Result<Option<Exit>, Fault> {
        self.drain(holder);
        let orders = std::mem::take(&mut lock(&holder.state).orders);
        let mut settlements = Vec::new();
        let mut others = Vec::new();
        for order in orders {
            match order {
                Order::Settle(settle) => settlements.push(settle),
                other => others.push(other),
            }
        }
        self.settle(holder, settlements).await?;
        for order in others {
            match order {
                Order::Settle(_) => {}
                Order::Detach(told) => {
                    self.give_buffer_back(holder).await?;
                    drop(told);
                }
                Order::Release(told) => {
                    self.give_all_back(holder).await?;
                    self.leave().await?;
                    drop(told);
                    return Ok(Some(Exit::Over(End::Closed)));
                }
                Order::MoveOver(told) => {
                    self.move_over(holder).await?;
                    drop(told);
                }
            }
        }
        // Leaving, and the last delivery is settled.
        if self.main.is_none() && self.out.is_empty() && is_leaving(holder) {
            self.leave().await?;
            return Ok(Some(Exit::Done));
        }
        Ok(None)
    }

    /// The lock goes last.
    async fn leave(&mut self) -> Result<(), Fault> {
        let options = QueueDeleteOptions::default();
        self.channel
            .queue_delete(self.lane.as_str().into(), options)
            .await?;
        self.side.close(200, "done".into()).await?;
        self.channel.close(200, "done".into()).await?;
        Ok(())
    }

    /// Gives back what nobody was handed, uncounted (laws C9, F8), and the register.
    async fn give_buffer_back(&mut self, holder: &Arc<Holder>) -> Result<(), Fault> {
        self.unsubscribe(holder).await?;
        let buffered: BTreeSet<u64> = {
            let mut state = lock(&holder.state);
            let buffered = state.buffer.drain(..).map(|item| item.tag);
            buffered.collect()
        };
        let delayed = std::mem::take(&mut self.delayed);
        let tags: BTreeSet<u64> = delayed
            .into_iter()
            .map(|(_, tag)| tag)
            .chain(buffered)
            .collect();
        if let Some(mut register) = self.register.take() {
            for tag in &tags {
                if let Some(out) = self.out.get(tag) {
                    *register.notes.uncounted.entry(out.key.clone()).or_default() += 1;
                }
            }
            register.notes.due.retain(|_, due| !due.left().is_zero());
            let patience = Deadline::after(Duration::from_secs(20));
            register.write(&holder.core, &self.side, patience).await?;
            self.return_all(holder, &tags).await?;
            register.release(&self.side).await?;
        }
        Ok(())
    }

    /// Gives everything back: every lease is lost from here on.
    async fn give_all_back(&mut self, holder: &Arc<Holder>) -> Result<(), Fault> {
        lock(&holder.state).generation += 1;
        self.give_buffer_back(holder).await?;
        let tags: BTreeSet<u64> = self.out.keys().copied().collect();
        self.return_all(holder, &tags).await?;
        lock(&holder.state).handed = 0;
        Ok(())
    }

    /// Another consumer comes, and deliveries of this one are out: they are asked for elsewhere.
    async fn move_over(&mut self, holder: &Arc<Holder>) -> Result<(), Fault> {
        for lane in lanes(&holder.queue).into_iter().skip(1) {
            if lane == self.lane {
                return Ok(());
            }
            let options = QueueDeclareOptions {
                exclusive: true,
                ..QueueDeclareOptions::default()
            };
            // On a channel that may break: somebody else may have left there.
            let probe = self.wire.channel().await?;
            let made = probe
                .queue_declare(lane.as_str().into(), options, FieldTable::default())
                .await;
            if made.is_err() {
                continue;
            }
            probe.close(200, "done".into()).await?;
            self.control = listen(&self.channel, &lane).await?;
            let old = std::mem::replace(&mut self.lane, lane);
            let options = QueueDeleteOptions::default();
            self.channel.queue_delete(old.into(), options).await?;
            return Ok(());
        }
        tracing::warn!(queue = %holder.queue, "too many consumers left with deliveries in hand");
        Ok(())
    }

    async fn hear(&mut self, holder: &Arc<Holder>, word: Raw) -> Result<Option<Exit>, Fault> {
        // What was sent and handed in before is seen first.
        self.drain(holder);
        let obeyed = self.obey(holder).await?;
        if obeyed.is_some() {
            return Ok(obeyed);
        }
        let Some(back) = Back::of(&self.lane, &word.properties) else {
            return Ok(None);
        };
        let kind = word.properties.kind().as_ref().map(|kind| kind.to_string());
        match kind.as_deref() {
            Some(HAS) => say(&holder.core, back, &self.has(holder)),
            Some(YIELD) => {
                let has = self.has(holder);
                if !has.attached {
                    self.move_over(holder).await?;
                }
                say(&holder.core, back, &has);
            }
            Some(LET_GO) => return self.let_go(holder, back).await.map(Some),
            _ => {}
        }
        Ok(None)
    }

    fn has(&self, holder: &Arc<Holder>) -> Has {
        let state = lock(&holder.state);
        Has {
            attached: state.phase == Phase::Attached,
            ready: state.buffer.len() as u64,
            in_flight: state.handed as u64,
            delayed: self.delayed.len() as u64,
        }
    }

    /// The queue is about to be deleted: everything goes back, no lease settles any more (law Q6), and
    /// whether it was deleted is told by who does it.
    async fn let_go(&mut self, holder: &Arc<Holder>, back: Back) -> Result<Exit, Fault> {
        self.give_all_back(holder).await?;
        let tell = format!("{}.{}", self.lane, holder.core.copy_name());
        let channel = try_exclusive(&self.wire, &tell)
            .await?
            .ok_or_else(|| Fault::Lost("a name of our own is taken".into()))?;
        let mut verdicts = listen(&channel, &tell).await?;
        // Told before the lane goes: whoever asks takes its end for an answer.
        let word = LetGo { tell: tell.clone() };
        let word = back.answer(
            &holder.core,
            serde_json::to_vec(&word).unwrap_or_default().into(),
        );
        let patience = Deadline::after(holder.core.heartbeat);
        holder.core.outbox.publish(word, patience).await;
        let options = QueueDeleteOptions::default();
        self.channel
            .queue_delete(self.lane.as_str().into(), options)
            .await?;
        let mut exit = Exit::Lost;
        let until = Instant::now() + VERDICT;
        let verdict = loop {
            tokio::select! {
                verdict = verdicts.next() => break verdict,
                () = tokio::time::sleep(LOOK) => {
                    if topology::counts(&self.wire, &holder.queue).await?.is_none() {
                        exit = Exit::Over(End::QueueDeleted);
                        break None;
                    }
                    if Instant::now() > until {
                        break None;
                    }
                }
                () = self.wire.until_dead() => return Ok(Exit::Lost),
            }
        };
        if let Some(Ok(word)) = verdict {
            let kind = word.properties.kind().as_ref().map(|kind| kind.to_string());
            if kind.as_deref() == Some(GONE) {
                exit = Exit::Over(End::QueueDeleted);
                lock(&holder.state).phase = Phase::Ended(End::QueueDeleted);
                holder.ready.notify_one();
            }
            if let Some(back) = Back::of(&tell, &word.properties) {
                say(&holder.core, back, &Has::default());
            }
        }
        let options = QueueDeleteOptions::default();
        channel.queue_delete(tell.into(), options).await?;
        channel.close(200, "done".into()).await?;
        self.side.close(200, "done".into()).await?;
        self.channel.close(200, "done".into()).await?;
        Ok(exit)
    }

    /// The channel is gone, and with it every lease. What was only buffered is remembered: the broker
    /// counts its return, and nobody had it.
    fn cut_off(&mut self, holder: &Arc<Holder>, uncounted: &mut HashMap<String, i64>) {
        let mut state = lock(&holder.state);
        state.generation += 1;
        state.handed = 0;
        let buffered: Vec<_> = state.buffer.drain(..).map(|item| item.tag).collect();
        drop(state);
        let delayed = std::mem::take(&mut self.delayed);
        for tag in buffered
            .into_iter()
            .chain(delayed.into_iter().map(|(_, tag)| tag))
        {
            if let Some(out) = self.out.get(&tag) {
                *uncounted.entry(out.key.clone()).or_default() += 1;
            }
        }
    }
}

/// Answers, without waiting for it to arrive.
fn say(core: &Arc<Core>, back: Back, what: &impl Serialize) {
    let body = serde_json::to_vec(what).unwrap_or_default();
    let letter = back.answer(core, body.into());
    let core = Arc::clone(core);
    tokio::spawn(async move {
        let patience = Deadline::after(Duration::from_secs(10));
        core.outbox.publish(letter, patience).await;
    });
}

/// Whoever lost its lease before it was heard.
pub(super) fn refuse(reply: Option<oneshot::Sender<Result<()>>>) {
    if let Some(reply) = reply {
        let _ = reply.send(Err(lease_lost()));
    }
}
