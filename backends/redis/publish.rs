//! Publishing: one task sends what waits together in one script for each queue.
//!
//! At most two batches of a queue are under way, in the order in which they came; what comes meanwhile
//! gathers. A batch whose connection broke is sent again, whole and under its number, before anything
//! else of its queue: the server remembers the last answers to each sender, so what was done is not
//! done twice, whatever became of the messages in between (P3). A batch that replicas have to have is
//! under way until they have it.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use redis::Value;
use tokio::sync::{mpsc, oneshot, watch};
use uuid::Uuid;

use super::{
    connection::Core,
    failure::{Failure, odd},
    form::{self, text},
    guest,
    link::{Link, Live, Phase},
    no_queue,
    scripts::{self, Calls},
    ticket::{Answer, Ticket},
};
use crate::{
    broker::Receipt,
    deadline::Deadline,
    error::{Error, ErrorKind, Outcome, Result},
    guest_url::AsGuest,
    message::Message,
    names::QueueName,
};

/// The largest body: one script keeps everybody else waiting for as long as it takes.
const MAX_BODY_BYTES: usize = 16 * 1024 * 1024;

/// The most of one batch: enough to share a sync among, not so much that others wait long for it.
const MOST_MESSAGES: usize = 512;
const MOST_BYTES: usize = 1024 * 1024;

/// Batches of one queue under way: one is worked on while the next is on its way.
const SLOTS: usize = 2;
/// Batches of all queues under way.
const MOST_BATCHES: usize = 16;

pub(super) async fn publish(
    core: &Arc<Core>,
    queue: &QueueName,
    message: Message,
    deadline: Deadline,
) -> Result<Receipt> {
    let publisher = core.publisher()?;
    if let Some(guest) = &core.dialer.guest {
        guest.may_publish(queue)?;
    }
    if message.body.len() > MAX_BODY_BYTES {
        let limit = MAX_BODY_BYTES as u64;
        return Err(Error::new(
            ErrorKind::TooLarge { limit },
            format!(
                "the body has {} bytes, and at most {limit} are taken",
                message.body.len()
            ),
        ));
    }
    let (reply, answer) = oneshot::channel();
    let ticket = Ticket::default();
    let item = Item {
        queue: queue.clone(),
        message,
        ticket: ticket.clone(),
        reply,
    };
    let sent = deadline.bound(publisher.send(item)).await;
    let in_the_way = || {
        core.bulk()
            .trouble_or_shortage()
            .unwrap_or_else(|| Error::new(ErrorKind::DeadlineExceeded, "the deadline passed first"))
    };
    match sent {
        Ok(Ok(())) => {}
        Ok(Err(_)) => return Err(super::closed()),
        Err(_) => return Err(in_the_way()),
    }
    match ticket.answer(deadline, answer).await {
        Answer::Came(answer) => answer,
        Answer::Never => Err(in_the_way().with_outcome(Outcome::NotStored)),
        Answer::Late => Err(in_the_way().with_outcome(Outcome::Unknown)),
    }
}

/// One message that waits.
#[derive(Debug)]
pub(super) struct Item {
    queue: QueueName,
    message: Message,
    ticket: Ticket,
    reply: oneshot::Sender<Result<Receipt>>,
}

impl Item {
    fn size(&self) -> usize {
        self.message.body.len() + self.message.headers.bytes() + 256
    }

    fn answer(self, answer: Result<Receipt>) {
        // The caller may have given up.
        let _ = self.reply.send(answer);
    }
}

/// Messages that were sent together, in their order.
struct Batch {
    queue: QueueName,
    slot: usize,
    turn: u64,
    items: Vec<Item>,
    bytes: usize,
    /// Whether it may have been done by a connection that broke.
    again: bool,
}

/// What is there of one queue.
#[derive(Default)]
struct Lineup {
    waiting: VecDeque<Item>,
    /// Slots whose batch has no answer yet, and how many of these are under way now.
    busy: [bool; SLOTS],
    flying: usize,
    /// To be sent again: before all others and one after the other, so that the order is kept (P8).
    broken: VecDeque<Batch>,
    /// Whether it stands among the queues that have something to send.
    is_ready: bool,
}

impl Lineup {
    fn is_over(&self) -> bool {
        self.waiting.is_empty() && self.busy == [false; SLOTS]
    }
}

type Flight = BoxFuture<'static, (Batch, Result<Value, Failure>, Live)>;

/// The task that publishes, for one handle.
pub(super) struct Publisher {
    link: Arc<Link>,
    guest: Option<AsGuest>,
    inbox: mpsc::Receiver<Item>,
    closing: watch::Receiver<bool>,
    /// Who we are to the server, as long as this handle lives.
    sender: String,
    turn: u64,
    /// Connections up to this one have broken.
    spent: u64,
    lineups: HashMap<QueueName, Lineup>,
    /// Queues that have something to send, each once.
    ready: VecDeque<QueueName>,
    flights: FuturesUnordered<Flight>,
}

impl Publisher {
    /// The most messages that wait inside; more wait outside, up to their deadlines.
    pub(super) const ROOM: usize = 4096;

    pub(super) fn new(
        link: Arc<Link>,
        guest: Option<AsGuest>,
        inbox: mpsc::Receiver<Item>,
        closing: watch::Receiver<bool>,
    ) -> Self {
        Self {
            link,
            guest,
            inbox,
            closing,
            sender: Uuid::new_v4().simple().to_string(),
            turn: 0,
            spent: 0,
            lineups: HashMap::new(),
            ready: VecDeque::new(),
            flights: FuturesUnordered::new(),
        }
    }

    /// Works until the handle is closed or gone, and all is answered.
    pub(super) async fn run(mut self) {
        let mut phase = self.link.phase();
        let mut news = Vec::with_capacity(MOST_MESSAGES);
        let mut open = true;
        loop {
            let live = self.link.now().filter(|live| live.turn > self.spent);
            if let Some(live) = &live {
                self.send(live).await;
            } else if *self.closing.borrow() || !open {
                // What is not answered yet waits for a server that is not there: the handle ends now.
                return;
            }
            if !open && self.flights.is_empty() && self.ready.is_empty() {
                return;
            }
            let room = self
                .lineups
                .values()
                .map(|lineup| lineup.waiting.len())
                .sum::<usize>()
                < Self::ROOM;
            tokio::select! {
                Some((batch, answer, live)) = self.flights.next() => self.landed(batch, answer, &live),
                n = self.inbox.recv_many(&mut news, MOST_MESSAGES), if open && room => {
                    open = n > 0;
                    for item in news.drain(..) {
                        self.line_up(item);
                    }
                }
                changed = phase.changed() => if changed.is_err() || matches!(*phase.borrow_and_update(), Phase::Ended) {
                    return;
                },
                _ = self.closing.changed() => {}
            }
        }
    }

    fn line_up(&mut self, item: Item) {
        let queue = item.queue.clone();
        let lineup = self.lineups.entry(queue.clone()).or_default();
        lineup.waiting.push_back(item);
        self.is_ready(queue);
    }

    fn is_ready(&mut self, queue: QueueName) {
        let lineup = self.lineups.entry(queue.clone()).or_default();
        if !std::mem::replace(&mut lineup.is_ready, true) {
            self.ready.push_back(queue);
        }
    }

    /// Sends what can be sent now.
    async fn send(&mut self, live: &Live) {
        for _ in 0..self.ready.len() {
            if self.flights.len() >= MOST_BATCHES {
                return;
            }
            let Some(queue) = self.ready.pop_front() else {
                return;
            };
            if let Some(lineup) = self.lineups.get_mut(&queue) {
                lineup.is_ready = false;
            }
            while let Some(batch) = self.next_batch(&queue) {
                self.launch(live, batch).await;
            }
            let Some(lineup) = self.lineups.get(&queue) else {
                continue;
            };
            if lineup.is_over() {
                self.lineups.remove(&queue);
            } else if !lineup.waiting.is_empty() || !lineup.broken.is_empty() {
                self.is_ready(queue);
            }
        }
    }

    fn next_batch(&mut self, queue: &QueueName) -> Option<Batch> {
        let lineup = self.lineups.get_mut(queue)?;
        if !lineup.broken.is_empty() {
            if lineup.flying > 0 {
                return None;
            }
            lineup.flying += 1;
            return lineup.broken.pop_front();
        }
        let slot = lineup.busy.iter().position(|busy| !busy)?;
        let (mut items, mut bytes) = (Vec::new(), 0);
        while let Some(item) = lineup.waiting.front() {
            let size = item.size();
            if !items.is_empty() && (items.len() >= MOST_MESSAGES || bytes + size > MOST_BYTES) {
                break;
            }
            let Some(item) = lineup.waiting.pop_front() else {
                break;
            };
            // From here on the caller cannot say any more that it was never sent (P4).
            if item.ticket.begin() {
                bytes += size;
                items.push(item);
            }
        }
        if items.is_empty() {
            return None;
        }
        lineup.busy[slot] = true;
        lineup.flying += 1;
        self.turn += 1;
        Some(Batch {
            queue: queue.clone(),
            slot,
            turn: self.turn,
            items,
            bytes,
            again: false,
        })
    }

    /// Sends a batch. It is polled once here, so that batches reach the connection in this order.
    async fn launch(&mut self, live: &Live, batch: Batch) {
        let mut call = match &self.guest {
            None => scripts::on_queue(&scripts::PUBLISH, &batch.queue),
            // Whoever collects the reports takes them on from there.
            Some(guest) => Calls::Functions.on_keys(&scripts::POST, &[guest::tray(guest)]),
        };
        call.arg("PUBLISH")
            .arg(format!("{}:{}", self.sender, batch.slot))
            .arg(batch.turn)
            .arg(u8::from(batch.again));
        for item in &batch.items {
            form::write(&mut call, &item.message);
        }
        let live = live.clone();
        let mut flight: Flight = Box::pin(async move {
            let mut answer = live.call_sized(&call, batch.bytes).await;
            if answer.as_ref().is_ok_and(has_to_last)
                && let Err(why) = live.copied().await
            {
                answer = Err(why);
            }
            (batch, answer, live)
        });
        match futures_util::future::poll_immediate(&mut flight).await {
            Some((batch, answer, live)) => self.landed(batch, answer, &live),
            None => self.flights.push(flight),
        }
    }

    fn landed(&mut self, mut batch: Batch, answer: Result<Value, Failure>, live: &Live) {
        let queue = batch.queue.clone();
        // A node that passes took nothing and did nothing: another will, or the same later.
        let again = matches!(&answer, Err(why) if why.is_broken() || why.is_passing());
        let lineup = self.lineups.entry(queue.clone()).or_default();
        lineup.flying -= 1;
        if let (true, Err(why)) = (again, &answer) {
            live.give_up(why);
            self.spent = self.spent.max(live.turn);
            batch.again |= why.is_broken();
        }
        // Whoever gave up did so with `Unknown`. With nobody left it is not sent any more.
        if again && !batch.items.iter().all(|item| item.reply.is_closed()) {
            let place = lineup
                .broken
                .partition_point(|other| other.turn < batch.turn);
            lineup.broken.insert(place, batch);
        } else {
            lineup.busy[batch.slot] = false;
            batch.answer(answer);
        }
        self.is_ready(queue);
    }
}

impl Batch {
    /// Gives each its own answer, by its place (P7).
    fn answer(self, answer: Result<Value, Failure>) {
        let outcome = if self.again {
            Outcome::Unknown
        } else {
            Outcome::NotStored
        };
        let (codes, why) = match answer {
            Err(failure) => {
                for item in self.items {
                    item.answer(Err(failure.error().with_outcome(outcome)));
                }
                return;
            }
            Ok(value) => match read(value) {
                Ok(read) => read,
                Err(value) => {
                    for item in self.items {
                        item.answer(Err(odd(&value).with_outcome(Outcome::Unknown)));
                    }
                    return;
                }
            },
        };
        if codes == "n" {
            for item in self.items {
                item.answer(Err(no_queue().with_outcome(outcome)));
            }
            return;
        }
        let mut codes = codes.bytes();
        for item in self.items {
            let answer = match codes.next() {
                Some(b's') => Ok(Receipt::new(false)),
                Some(b'd') => Ok(Receipt::new(true)),
                Some(b'f') => Err(Error::new(
                    ErrorKind::BrokerRefused,
                    "the queue is full: it holds as many messages as it was made for",
                )
                .with_outcome(Outcome::NotStored)),
                Some(b'e') => Err(Failure::in_script(why.as_deref().unwrap_or("ERR")).error()),
                _ => Err(odd(&Value::Nil).with_outcome(Outcome::Unknown)),
            };
            item.answer(answer);
        }
    }
}

/// Whether an answer says of any message that it is stored. A refusal waits for no replica.
fn has_to_last(answer: &Value) -> bool {
    let Value::Array(parts) = answer else {
        return false;
    };
    matches!(parts.first(), Some(Value::BulkString(codes)) if codes.iter().any(|code| b"sd".contains(code)))
}

/// The letters of an answer, and the text of its last error.
fn read(value: Value) -> Result<(String, Option<String>), Value> {
    let Value::Array(parts) = value else {
        return Err(value);
    };
    let mut parts = parts.into_iter();
    match parts.next().and_then(text) {
        Some(codes) => Ok((codes, parts.next().and_then(text))),
        None => Err(Value::Array(vec![])),
    }
}
