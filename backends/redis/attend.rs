//! A consumer's task: it alone speaks to the server for its token, so what it knows is what is so.
//!
//! It attaches, claims while there is room, settles what is handed in, keeps the lease, and gives back
//! what is left. Everything goes over one connection in order: a settlement makes room the moment it is
//! sent, for the claim behind it cannot pass it. When the connection breaks, settlements without an
//! answer are sent again first: while the token is among the holders nobody else touches what it had
//! pending, so what is no longer pending then was settled by us.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use redis::{Value, cmd};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep_until},
};

use super::{
    claims::{self, Batch, Claim, End, Mode, Op, Settled},
    connection::lock,
    consume::{Held, Hold, Lost, Order, Stage},
    failure::{Failure, odd},
    form::{answer, text},
    link::{Live, Phase, is_auth},
    no_queue,
    router::Ear,
    scripts,
};
use crate::{
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
};

/// Settlements in one batch, and batches under way: one is worked on while the next gathers.
const MOST_OPS: usize = 512;
const MOST_BATCHES: usize = 3;

/// How long to wait before a claim that the server refused is tried again.
const AGAIN: Duration = Duration::from_millis(300);

/// How often what is overdue is looked at.
const NAP: Duration = Duration::from_millis(100);

enum Landed {
    Claim(usize, Result<Value, Failure>),
    Settled(Batch, Result<Value, Failure>),
}

type Flight = BoxFuture<'static, (Landed, Live)>;

pub(super) struct Attendant {
    hold: Arc<Hold>,
    inbox: mpsc::Receiver<Order>,
    stages: watch::Sender<Stage>,
    /// Which making of the queue this is: it may be deleted and made again under us (Q11).
    epoch: String,
    flights: FuturesUnordered<Flight>,
    settling: usize,
    claiming: bool,
    /// Batches whose connection broke, in their order.
    broken: VecDeque<Batch>,
    number: u64,
    orders: Vec<Order>,
    /// The connection that was prepared last, and the last that has broken.
    prepared: u64,
    spent: u64,
    /// There may be something to claim; and something may be pending that we do not know.
    look: bool,
    unsure: bool,
    /// What was handed out or buffered, by entry.
    known: HashSet<String>,
    renew_at: Instant,
    due: Option<Instant>,
    detached: bool,
    down_since: Option<Instant>,
}

impl Attendant {
    pub(super) fn new(
        hold: Arc<Hold>,
        inbox: mpsc::Receiver<Order>,
        stages: watch::Sender<Stage>,
    ) -> Self {
        Self {
            hold,
            inbox,
            stages,
            epoch: String::new(),
            flights: FuturesUnordered::new(),
            settling: 0,
            claiming: false,
            broken: VecDeque::new(),
            number: 0,
            orders: Vec::new(),
            prepared: 0,
            spent: 0,
            look: true,
            unsure: false,
            known: HashSet::new(),
            renew_at: Instant::now(),
            due: None,
            detached: false,
            down_since: None,
        }
    }

    /// Attaches by the deadline and says so; then works until nothing is left to do.
    pub(super) async fn attend(mut self, deadline: Deadline, reply: oneshot::Sender<Result<()>>) {
        let attached = self.attach(deadline).await;
        let is_attached = attached.is_ok();
        // A caller that gave up has dropped its consumer, which detaches.
        let _ = reply.send(attached);
        if is_attached {
            self.work().await;
            self.finish().await;
        }
        self.leave().await;
    }

    fn channel(&self) -> String {
        format!(
            "{}:{}",
            scripts::key(&self.hold.queue, "stream"),
            self.hold.token
        )
    }

    async fn attach(&mut self, deadline: Deadline) -> Result<()> {
        let core = Arc::clone(&self.hold.core);
        let channel = self.channel();
        core.router
            .listen(&channel, Ear::Wake(Arc::clone(&self.hold.wake)));
        let live = core.main.live(deadline).await?;
        self.prepare(&live).await;
        let mut call = core
            .dialer
            .calls()
            .on_queue(&scripts::ATTACH, &self.hold.queue);
        call.arg(&self.hold.token).arg(claims::lease_ms(&self.hold));
        self.renew_later();
        // Its answer may be lost: asking again under the same token is the same place.
        let (value, _) = core.main.change(&call, deadline).await?;
        let odd = odd(&value);
        let (word, mut parts) = answer(value).ok_or(odd)?;
        match word.as_str() {
            "none" => Err(no_queue()),
            "taken" => Err(Error::new(
                ErrorKind::Conflict,
                "another consumer is attached to this queue, and its lease runs",
            )),
            _ => {
                self.epoch = parts.next().and_then(text).unwrap_or_default();
                Ok(())
            }
        }
    }

    /// Once for each connection: wakes come over it from now on.
    async fn prepare(&mut self, live: &Live) {
        if live.turn == self.prepared {
            return;
        }
        let mut subscribe = cmd("SUBSCRIBE");
        subscribe.arg(self.channel());
        match live.call(&subscribe).await {
            Ok(_) => self.prepared = live.turn,
            Err(failure) => self.broke(live, &failure),
        }
    }

    async fn work(&mut self) {
        let mut phase = self.hold.core.main.phase();
        let mut closing = self.hold.core.closing();
        loop {
            if lock(&self.hold.state).gone.is_some() {
                return;
            }
            let live = self.live();
            if let Some(live) = &live {
                self.down_since = None;
                self.act(live).await;
            } else if *closing.borrow() || self.is_over() {
                // The lease ends by itself.
                return;
            }
            let wake_at = self.next_look();
            let room = self.orders.len() < MOST_OPS && self.settling < MOST_BATCHES;
            let hold = Arc::clone(&self.hold);
            tokio::select! {
                biased;
                Some((landed, live)) = self.flights.next() => self.landed(landed, &live),
                n = self.inbox.recv_many(&mut self.orders, MOST_OPS), if room => debug_assert!(n > 0),
                () = hold.wake.work.notified() => {}
                _ = phase.changed() => {
                    if let Phase::Down(failure) = &*phase.borrow_and_update() && is_auth(failure) {
                        self.hold.ends_with(Lost::AuthRefused);
                    }
                }
                _ = closing.changed() => {}
                () = sleep_until(wake_at) => {}
            }
            self.look |= self.hold.wake.take_look();
            if self.due.is_some_and(|due| due <= Instant::now()) {
                self.due = None;
                self.look = true;
            }
        }
    }

    /// What is under way gets its answer, what is not under way has none.
    async fn finish(&mut self) {
        self.inbox.close();
        while let Some((landed, live)) = self.flights.next().await {
            self.landed(landed, &live);
        }
    }

    fn live(&self) -> Option<Live> {
        let live = self.hold.core.main.now();
        live.filter(|live| live.turn > self.spent && !live.is_lost())
    }

    /// With a consumer that is gone, nothing handed out, and a server that is gone for longer than a
    /// lease, there is nothing left to give back.
    fn is_over(&mut self) -> bool {
        let since = *self.down_since.get_or_insert_with(Instant::now);
        let state = lock(&self.hold.state);
        state.detached && state.out == 0 && since.elapsed() > self.hold.core.dialer.lease
    }

    fn next_look(&self) -> Instant {
        let at = self.due.map_or(self.renew_at, |due| due.min(self.renew_at));
        // What is overdue waits for an answer or a connection, and these wake us.
        let soon = Instant::now() + NAP;
        if at < soon - NAP { soon } else { at }
    }

    fn renew_later(&mut self) {
        self.renew_at = Instant::now() + self.hold.core.dialer.lease / 3;
    }

    /// Sends what can be sent now.
    async fn act(&mut self, live: &Live) {
        if !self.broken.is_empty() || self.unsure || live.turn != self.prepared {
            // First what broke, to its end, and in order.
            if !self.flights.is_empty() {
                return;
            }
            self.prepare(live).await;
            if live.turn != self.prepared {
                return;
            }
            self.renew_at = Instant::now();
            self.look = true;
            if let Some(batch) = self.broken.pop_front() {
                return self.settle(live, batch).await;
            }
            if self.unsure {
                return self.take_stock(live).await;
            }
        }
        let closing = *self.hold.core.closing().borrow();
        if closing || lock(&self.hold.state).detached {
            self.detach(live, closing).await;
        } else {
            self.settle_waiting(live).await;
            self.claim(live).await;
        }
    }

    /// Gathers what was handed in and what was dropped into a batch, and sends it.
    async fn settle_waiting(&mut self, live: &Live) {
        if self.settling >= MOST_BATCHES {
            return;
        }
        let returns = std::mem::take(&mut lock(&self.hold.state).returns);
        let mut ops = Vec::with_capacity(self.orders.len() + returns.len());
        for order in self.orders.drain(..) {
            let op = Op::of(order);
            // One that was given up comes back as dropped.
            if op.begin() {
                ops.push(op);
            }
        }
        for held in returns {
            ops.push(Op::alone(held, End::Retry { ms: 0 }));
        }
        // An attached one renews with its claims.
        let renew = self.detached && self.renew_at <= Instant::now();
        if ops.is_empty() && !renew {
            return;
        }
        lock(&self.hold.state).out -= ops.len();
        self.send(live, ops, Mode::Stay, renew).await;
    }

    async fn send(&mut self, live: &Live, ops: Vec<Op>, mode: Mode, renew: bool) {
        if renew {
            self.renew_later();
        }
        for op in &ops {
            self.known.remove(&op.held.entry);
        }
        self.number += 1;
        let batch = Batch {
            number: self.number,
            ops,
            mode,
            renew,
            again: false,
        };
        self.settle(live, batch).await;
    }

    async fn settle(&mut self, live: &Live, batch: Batch) {
        let call = batch.call(&self.hold, &self.epoch);
        self.settling += 1;
        let sender = live.clone();
        self.launch(live, async move {
            Landed::Settled(batch, sender.change(&call).await)
        })
        .await;
    }

    /// Sends a command. It is polled once here, so that commands reach the connection in this order.
    async fn launch(&mut self, live: &Live, sent: impl Future<Output = Landed> + Send + 'static) {
        let live = live.clone();
        let mut flight: Flight = Box::pin(async move { (sent.await, live) });
        match futures_util::future::poll_immediate(&mut flight).await {
            Some((landed, live)) => self.landed(landed, &live),
            None => self.flights.push(flight),
        }
    }

    /// Claims as much as there is room for, or only keeps the lease.
    async fn claim(&mut self, live: &Live) {
        if self.claiming {
            return;
        }
        let renew = self.renew_at <= Instant::now();
        let room = {
            let state = lock(&self.hold.state);
            // While some are buffered still, more of them make one call: each has to be synced.
            if state.buffer.is_empty() || renew {
                self.hold.prefetch.saturating_sub(state.unsettled())
            } else {
                0
            }
        };
        let want = if self.look || renew { room } else { 0 };
        if want == 0 && !renew {
            return;
        }
        if renew {
            self.renew_later();
        }
        self.look &= want == 0;
        self.claiming = true;
        let call = claims::claim(&self.hold, &self.epoch, renew, want);
        let sender = live.clone();
        self.launch(live, async move {
            Landed::Claim(want, sender.call(&call).await)
        })
        .await;
    }

    /// The consumer is gone: what was only buffered goes back, its deliveries stay until they end; with
    /// the handle closed everything goes back (F8).
    async fn detach(&mut self, live: &Live, closing: bool) {
        if self.claiming {
            return;
        }
        let (buffered, out) = {
            let mut state = lock(&self.hold.state);
            let buffered: Vec<_> = state.buffer.drain(..).map(|claimed| claimed.held).collect();
            (buffered, state.out)
        };
        let idle = self.settling == 0
            && self.orders.is_empty()
            && self.inbox.is_empty()
            && lock(&self.hold.state).returns.is_empty();
        if idle && (closing || out == 0) {
            // Also where nothing is buffered: the token is forgotten.
            self.send_back(live, buffered, Mode::Release).await;
            return;
        }
        self.settle_waiting(live).await;
        if self.detached {
            if !buffered.is_empty() {
                self.send_back(live, buffered, Mode::Stay).await;
            }
        } else {
            self.detached = true;
            self.send_back(live, buffered, Mode::Detach).await;
        }
    }

    async fn send_back(&mut self, live: &Live, buffered: Vec<Held>, mode: Mode) {
        let back = |held| Op::alone(held, End::Uncounted);
        let ops = buffered.into_iter().map(back).collect();
        self.send(live, ops, mode, false).await;
    }

    /// A claim's answer may have been lost with its connection: what the server has pending under our
    /// token and we do not know was never handed out, and goes back uncounted.
    async fn take_stock(&mut self, live: &Live) {
        let mut from = "-".to_owned();
        let mut strange = Vec::new();
        loop {
            let mut call = self
                .hold
                .core
                .dialer
                .calls()
                .on_queue(&scripts::HELD, &self.hold.queue);
            call.arg(&self.hold.token).arg(&self.epoch).arg(&from);
            let held = match live.call(&call).await {
                Ok(value) => claims::read_held(value).flatten(),
                Err(failure) => return self.broke(live, &failure),
            };
            // The next claim says why.
            let Some(held) = held else { break };
            let Some(last) = held.last() else { break };
            from = format!("({}", last.entry);
            strange.extend(
                held.into_iter()
                    .filter(|held| !self.known.contains(&held.entry)),
            );
        }
        self.unsure = false;
        if !strange.is_empty() {
            self.send_back(live, strange, Mode::Stay).await;
        }
    }

    fn broke(&mut self, live: &Live, failure: &Failure) {
        live.give_up(failure);
        self.spent = self.spent.max(live.turn);
    }

    fn landed(&mut self, landed: Landed, live: &Live) {
        match landed {
            Landed::Claim(want, answer) => {
                self.claiming = false;
                self.claim_landed(want, answer, live);
            }
            Landed::Settled(batch, answer) => {
                self.settling -= 1;
                self.batch_landed(batch, answer, live);
            }
        }
    }

    fn claim_landed(&mut self, want: usize, answer: Result<Value, Failure>, live: &Live) {
        let value = match answer {
            Ok(value) => value,
            Err(failure) if failure.is_broken() || failure.is_passing() => {
                self.unsure = true;
                return self.broke(live, &failure);
            }
            Err(failure) if is_auth(&failure) => return self.hold.ends_with(Lost::AuthRefused),
            Err(failure) => {
                tracing::warn!(?failure, queue = %self.hold.queue, "a claim was refused; trying again");
                self.due = Some(Instant::now() + AGAIN);
                return;
            }
        };
        match claims::read_claim(value) {
            Some(Claim::Got {
                claimed,
                foreign,
                due,
                more,
            }) => {
                // With fewer than wanted the server knows that we wait, and wakes us.
                self.look |= want > 0 && (more || claimed.len() >= want);
                self.due = due.map(|ms| Instant::now() + Duration::from_millis(ms));
                let mut state = lock(&self.hold.state);
                for claimed in claimed {
                    // A master that was a replica may not know that we have it already.
                    if self.known.insert(claimed.held.entry.clone()) {
                        state.buffer.push_back(claimed);
                    }
                }
                drop(state);
                self.hold.arrived.notify_one();
                for (held, reason) in foreign {
                    tracing::warn!(queue = %self.hold.queue, entry = held.entry, reason, "not of wilco's form");
                    // As if it had been handed out and rejected.
                    let (reply, _) = oneshot::channel();
                    lock(&self.hold.state).out += 1;
                    self.orders.push(Order {
                        held,
                        id: String::new(),
                        settlement: crate::broker::Settlement::DeadLetter(reason),
                        ticket: super::ticket::Ticket::default(),
                        reply,
                    });
                }
            }
            Some(Claim::Gone) => self.hold.ends_with(Lost::QueueDeleted),
            Some(Claim::Taken) => self.hold.ends_with(Lost::TakenOver),
            None => {
                tracing::error!(queue = %self.hold.queue, "a claim's answer is not of wilco's form");
                self.unsure = true;
                self.due = Some(Instant::now() + AGAIN);
            }
        }
    }

    fn batch_landed(&mut self, mut batch: Batch, answer: Result<Value, Failure>, live: &Live) {
        let settled = match answer {
            Ok(value) => claims::read_settled(value).ok_or_else(|| odd(&Value::Nil)),
            Err(failure) if failure.is_broken() || failure.is_passing() => {
                batch.again |= failure.is_broken();
                let place = self
                    .broken
                    .partition_point(|other| other.number < batch.number);
                self.broken.insert(place, batch);
                return self.broke(live, &failure);
            }
            Err(failure) => Err(failure.error()),
        };
        match settled {
            Ok(Settled::Done(codes)) => {
                let done = batch.done(&codes);
                for (op, done) in batch.ops.into_iter().zip(done) {
                    // Not pending any more after a batch that broke: that was our doing.
                    let answer = if done || batch.again {
                        Ok(())
                    } else {
                        Err(Lost::Settled.error())
                    };
                    op.answer(answer);
                }
                self.stage(batch.mode);
            }
            Ok(Settled::Gone) => self.over(batch, Lost::QueueDeleted),
            Ok(Settled::Lost) if batch.mode == Mode::Release && batch.again => {
                // The release was done before its connection broke.
                batch.ops.into_iter().for_each(|op| op.answer(Ok(())));
                self.stage(batch.mode);
            }
            Ok(Settled::Lost) => self.over(batch, Lost::TakenOver),
            Err(error) => {
                tracing::warn!(%error, queue = %self.hold.queue, "settlements were refused");
                for op in batch.ops {
                    // Nothing was settled: it goes back, when the server takes it.
                    self.known.insert(op.held.entry.clone());
                    if !matches!(op.end, End::Uncounted) {
                        let mut state = lock(&self.hold.state);
                        state.out += 1;
                        state.returns.push(op.held.clone());
                    }
                    let kind = error.kind().clone();
                    op.answer(Err(Error::new(kind, error.message().to_owned())));
                }
                if *error.kind() == ErrorKind::AuthRefused {
                    self.hold.ends_with(Lost::AuthRefused);
                }
            }
        }
    }

    fn stage(&mut self, mode: Mode) {
        match mode {
            Mode::Stay => {}
            Mode::Detach => {
                self.stages.send_replace(Stage::Detached);
            }
            Mode::Release => self.hold.ends_with(Lost::Settled),
        }
    }

    fn over(&mut self, batch: Batch, lost: Lost) {
        for op in batch.ops {
            let error = match (lost, batch.again) {
                // It may have been ours when the connection broke.
                (Lost::TakenOver, true) => Error::new(
                    ErrorKind::BrokerUnreachable,
                    "the connection broke before the answer came, and the lease was lost meanwhile: \
                     the message may come again",
                ),
                (Lost::TakenOver, false) => Lost::Settled.error(),
                _ => lost.error(),
            };
            op.answer(Err(error));
        }
        self.hold.ends_with(lost);
    }

    /// The last: nobody listens on our channel any more.
    async fn leave(self) {
        let channel = self.channel();
        let core = &self.hold.core;
        core.router.forget(&channel);
        self.stages.send_replace(Stage::Ended);
        if let Some(live) = core.main.now() {
            let mut unsubscribe = cmd("UNSUBSCRIBE");
            unsubscribe.arg(channel);
            live.tell(unsubscribe).await;
        }
    }
}
