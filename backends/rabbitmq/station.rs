//! An attachment: what comes, what is handed in, and what is asked, until its channel breaks or it leaves.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt as _, StreamExt as _};
use lapin::{
    Channel,
    message::Delivery as Raw,
    options::{BasicConsumeOptions, BasicQosOptions},
    types::FieldTable,
};
use serde::Serialize;
use tokio::{sync::oneshot, time::Instant};

use super::{
    ask::Back,
    connection::Core,
    consume::{End, Holder, Item, Order, Phase, lease_lost},
    credential,
    fault::Fault,
    hold::{HAS, Has, LET_GO, YIELD, is_leaving},
    letter,
    link::Wire,
    lock, notes,
};
use crate::{deadline::Deadline, error::Result, message::Message, names::QueueName};

/// How much more than its prefetch a consumer has from the broker: what is settled next is here already.
const HEAD_ROOM: std::ops::RangeInclusive<usize> = 16..=1024;

/// A message that this consumer has from the broker.
pub(super) struct Out {
    pub(super) key: String,
    /// Another program wrote it, and its key may be others' too.
    pub(super) foreign: bool,
    pub(super) attempt: u32,
    pub(super) message: Message,
}

/// An attachment: one channel, from when it was opened until it breaks.
pub(super) struct Station {
    pub(super) wire: Arc<Wire>,
    pub(super) channel: Channel,
    /// The register is held on a channel of its own: an ack of many here must not reach it.
    pub(super) side: Channel,
    pub(super) main: Option<lapin::Consumer>,
    pub(super) control: lapin::Consumer,
    pub(super) lane: String,
    pub(super) register: Option<notes::Held>,
    pub(super) limit: u32,
    /// By delivery tag.
    pub(super) out: BTreeMap<u64, Out>,
    /// Those that wait for their time, here.
    pub(super) delayed: BTreeSet<(Instant, u64)>,
    /// When a message of this key may come again: from before its delay began.
    pub(super) not_before: HashMap<String, Instant>,
    /// How many messages the broker lets this consumer have.
    room: usize,
    subscriptions: u32,
    /// The last delivery before the latest subscription: what came up to it fills no room of that.
    since: u64,
    /// Keys of what this consumer sent back, and has not seen again.
    pub(super) returned: HashSet<String>,
    /// Once it stops: whose returns the broker counts rightly (see `leave`).
    pub(super) stopping: Option<HashSet<String>>,
    /// Those who wait for it to be gone.
    pub(super) told: Vec<oneshot::Sender<()>>,
}

/// What an attachment begins with.
pub(super) struct Held {
    /// With the lock in it.
    pub(super) channel: Channel,
    pub(super) side: Channel,
    pub(super) control: lapin::Consumer,
    pub(super) lane: String,
    pub(super) register: notes::Held,
}

/// How a station ends.
pub(super) enum Exit {
    /// The channel broke.
    Lost,
    /// Nothing is left to do; who asked for that is to be told when nothing is left at all.
    Done(Vec<oneshot::Sender<()>>),
    Over(End),
}

pub(super) async fn listen(channel: &Channel, lane: &str) -> Result<lapin::Consumer, Fault> {
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
    /// With nothing asked for yet.
    pub(super) fn new(wire: Arc<Wire>, held: Held, prefetch: usize) -> Self {
        let head_room = prefetch.clamp(*HEAD_ROOM.start(), *HEAD_ROOM.end());
        Self {
            wire,
            channel: held.channel,
            side: held.side,
            main: None,
            control: held.control,
            lane: held.lane,
            limit: held.register.spec.delivery_limit.get(),
            register: Some(held.register),
            out: BTreeMap::new(),
            delayed: BTreeSet::new(),
            not_before: HashMap::new(),
            room: prefetch
                .saturating_add(head_room)
                .min(usize::from(u16::MAX)),
            subscriptions: 0,
            since: 0,
            returned: HashSet::new(),
            stopping: None,
            told: Vec::new(),
        }
    }

    /// Whether the broker sends nothing more until something is settled.
    pub(super) fn is_full(&self) -> bool {
        self.out.range(self.since + 1..).count() >= self.room
    }

    /// Asks for messages. Once more when those that wait for their time have used up the room.
    pub(super) async fn subscribe(&mut self, queue: &QueueName) -> Result<(), Fault> {
        self.subscriptions += 1;
        self.since = self
            .out
            .last_key_value()
            .map_or(self.since, |(tag, _)| *tag);
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

    pub(super) async fn serve(&mut self, holder: &Arc<Holder>) -> Exit {
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
    pub(super) fn drain(&mut self, holder: &Arc<Holder>) {
        while let Some(Some(Ok(delivery))) = self
            .main
            .as_mut()
            .and_then(|main| main.next().now_or_never())
        {
            self.received(holder, delivery);
        }
    }

    pub(super) fn received(&mut self, holder: &Arc<Holder>, delivery: Raw) {
        let tag = delivery.delivery_tag;
        let key = letter::key(&delivery.properties);
        let foreign = letter::is_foreign(&delivery.properties);
        self.note_if_uncounted(&key, &delivery.properties);
        let noted = self.register.as_ref().map(|register| &register.notes);
        let uncounted = noted.and_then(|notes| notes.uncounted.get(&key));
        let count = letter::returns(&delivery.properties) + 1 - uncounted.copied().unwrap_or(0);
        let attempt = u32::try_from(count.max(1)).unwrap_or(u32::MAX);
        let due = self.not_before.get(&key).copied().or_else(|| {
            let left = noted?.due.get(&key)?.left();
            (!left.is_zero()).then(|| Instant::now() + left)
        });
        let mut message = letter::message(&delivery.properties, delivery.data);
        // What a guest says of itself counts for nothing where the broker knows better.
        if let Some(sender) = credential::sender(delivery.exchange.as_str()) {
            message.from = Some(sender);
        }
        let out = Out {
            key,
            foreign,
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
        // With all that it may have, nothing is on its way to it.
        if stuck && self.is_full() {
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
                    self.told.extend(told);
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
            return Ok(Some(Exit::Done(std::mem::take(&mut self.told))));
        }
        // Deliveries are out still: nobody waits for those.
        self.told.clear();
        Ok(None)
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
        let attached = state.phase == Phase::Attached;
        let keys = if attached {
            Vec::new()
        } else {
            self.out.values().map(|out| out.key.clone()).collect()
        };
        Has {
            attached,
            ready: state.buffer.len() as u64,
            in_flight: state.handed as u64,
            delayed: self.delayed.len() as u64,
            keys,
        }
    }

    /// The channel is gone, and with it every lease. What was only buffered is remembered: the broker
    /// counts its return, and nobody had it.
    pub(super) fn cut_off(&mut self, holder: &Arc<Holder>, uncounted: &mut HashMap<String, i64>) {
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
pub(super) fn say(core: &Arc<Core>, back: Back, what: &impl Serialize) {
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
