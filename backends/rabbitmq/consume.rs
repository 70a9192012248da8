//! A queue's one consumer, as the user holds it.
//!
//! Behind it a task (`hold`) has the channel: it buffers what comes, settles what is handed in, and
//! answers those who ask what is held. Here is what both share, and the leases.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::{Notify, oneshot};

use super::{at, closed, connection::Core, hold, lock};
use crate::{
    broker::{ConsumeOptions, Consumer, Delivery, Lease, Settlement},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    message::Message,
    names::QueueName,
};

/// How long a delivery that was only dropped may take to be given back.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the consumer, its leases and its task share.
pub(super) struct Holder {
    pub(super) core: Arc<Core>,
    pub(super) queue: QueueName,
    pub(super) prefetch: usize,
    pub(super) state: Mutex<State>,
    /// There are orders for the task.
    pub(super) news: Notify,
    /// There is something for the consumer.
    pub(super) ready: Notify,
}

impl fmt::Debug for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holder")
            .field("queue", &self.queue)
            .field("prefetch", &self.prefetch)
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
pub(super) struct State {
    pub(super) buffer: VecDeque<Item>,
    /// How many of this generation the user has.
    pub(super) handed: usize,
    /// Which attachment it is: leases of an earlier one are lost.
    pub(super) generation: u64,
    pub(super) orders: Vec<Order>,
    pub(super) phase: Phase,
}

/// Where a consumer is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Phase {
    #[default]
    Attached,
    /// The user let it go; deliveries may be out still.
    Leaving,
    /// It was ended for this reason.
    Ended(End),
    /// Nothing of it is left on the broker.
    Gone(Option<End>),
}

/// Why a consumer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    QueueDeleted,
    TakenOver,
    Refused,
    Closed,
}

impl End {
    fn error(self) -> Error {
        let (kind, text) = match self {
            Self::QueueDeleted => (ErrorKind::QueueDeleted, "the queue was deleted"),
            Self::TakenOver => (
                ErrorKind::Conflict,
                "another consumer took this queue over while this one was cut off",
            ),
            Self::Refused => (
                ErrorKind::AuthRefused,
                "the broker no longer lets this user in",
            ),
            Self::Closed => return closed(),
        };
        Error::new(kind, text)
    }
}

/// One message that can be handed out.
pub(super) struct Item {
    pub(super) tag: u64,
    pub(super) attempt: u32,
    pub(super) message: Message,
}

/// What the task is told to do.
pub(super) enum Order {
    Settle(Settle),
    /// Let the consumer go; told when what was buffered is back.
    Detach(Option<oneshot::Sender<()>>),
    /// Give everything back, deliveries too.
    Release(oneshot::Sender<()>),
    /// Make room for the next consumer of this handle.
    MoveOver(oneshot::Sender<()>),
}

pub(super) struct Settle {
    pub(super) generation: u64,
    pub(super) tag: u64,
    pub(super) how: Settlement,
    pub(super) deadline: Deadline,
    /// None: it was dropped.
    pub(super) reply: Option<oneshot::Sender<Result<()>>>,
}

pub(super) fn lease_lost() -> Error {
    Error::new(
        ErrorKind::LeaseLost,
        "the delivery is no longer this handle's: nothing was settled",
    )
}

/// Its channel broke, or its consumer ended, before the broker's word was here.
fn not_proven() -> Error {
    Error::new(
        ErrorKind::BrokerUnreachable,
        "the broker's word on this settlement did not arrive: the message may come again",
    )
}

impl Holder {
    /// Gives a delivery back after a delay, whose register is another consumer's now.
    pub(super) fn keep_until(self: &Arc<Self>, tag: u64, delay: Duration) {
        let holder = Arc::clone(self);
        let generation = lock(&self.state).generation;
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            holder.hand_in(Order::Settle(Settle {
                generation,
                tag,
                how: Settlement::Retry(Duration::ZERO),
                deadline: Deadline::after(PATIENCE),
                reply: None,
            }));
        });
    }

    /// Those who settle what is lost already are told so.
    pub(super) fn refuse_settlements(&self) {
        let mut state = lock(&self.state);
        let orders = std::mem::take(&mut state.orders);
        let (settlements, others) = orders
            .into_iter()
            .partition(|order| matches!(order, Order::Settle(_)));
        state.orders = others;
        drop(state);
        let settlements: Vec<Order> = settlements;
        for order in settlements {
            if let Order::Settle(Settle {
                reply: Some(reply), ..
            }) = order
            {
                let _ = reply.send(Err(lease_lost()));
            }
        }
    }

    pub(super) fn order(&self, order: Order) {
        lock(&self.state).orders.push(order);
        self.news.notify_one();
    }

    /// Gives everything back, and returns when it is.
    pub(super) async fn release(&self) {
        let (done, released) = oneshot::channel();
        if self.hand_in(Order::Release(done)) {
            let _ = released.await;
        }
    }

    /// Makes room for the next consumer of this handle.
    async fn move_over(&self) {
        let (done, moved) = oneshot::channel();
        if self.hand_in(Order::MoveOver(done)) {
            let _ = moved.await;
        }
    }

    /// False: nobody is there to obey.
    fn hand_in(&self, order: Order) -> bool {
        let mut state = lock(&self.state);
        if matches!(state.phase, Phase::Gone(_)) {
            return false;
        }
        state.orders.push(order);
        drop(state);
        self.news.notify_one();
        true
    }
}

pub(super) async fn consume(
    core: &Arc<Core>,
    queue: &QueueName,
    options: ConsumeOptions,
    deadline: Deadline,
) -> Result<Box<dyn Consumer>> {
    core.open()?;
    let holder = Arc::new(Holder {
        core: Arc::clone(core),
        queue: queue.clone(),
        prefetch: usize::try_from(options.prefetch.get()).unwrap_or(usize::MAX),
        state: Mutex::default(),
        news: Notify::new(),
        ready: Notify::new(),
    });
    let in_the_way = reserve(core, &holder)?;
    // Dropped here or later, it is let go.
    let attached = Attached {
        holder: Arc::clone(&holder),
    };
    let (ready, is_ready) = oneshot::channel();
    tokio::spawn(async move {
        for other in in_the_way {
            other.move_over().await;
        }
        hold::run(holder, ready, deadline).await;
    });
    let begun = tokio::select! {
        begun = deadline.bound(is_ready) => begun?,
        () = core.until_closed() => return Err(closed()),
    };
    match begun {
        Ok(Ok(())) => Ok(Box::new(attached)),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(closed()),
    }
}

/// One of a queue in this handle: the broker would let its own connection in twice. Returns those that
/// are leaving, or only wait for their last deliveries to be settled.
fn reserve(core: &Core, holder: &Arc<Holder>) -> Result<Vec<Arc<Holder>>> {
    let mut holders = lock(&core.holders);
    holders.retain(|other| {
        let other = other.upgrade();
        other.is_some_and(|other| !matches!(lock(&other.state).phase, Phase::Gone(_)))
    });
    let mut in_the_way = Vec::new();
    for other in holders.iter().filter_map(std::sync::Weak::upgrade) {
        if other.queue != holder.queue {
            continue;
        }
        if lock(&other.state).phase != Phase::Leaving {
            return Err(hold::conflict());
        }
        in_the_way.push(other);
    }
    holders.push(Arc::downgrade(holder));
    Ok(in_the_way)
}

/// The consumer.
#[derive(Debug)]
struct Attached {
    holder: Arc<Holder>,
}

impl Attached {
    fn detach(&self, told: Option<oneshot::Sender<()>>) {
        let mut state = lock(&self.holder.state);
        if state.phase == Phase::Attached {
            state.phase = Phase::Leaving;
            state.orders.push(Order::Detach(told));
            self.holder.news.notify_one();
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.detach(None);
    }
}

#[async_trait]
impl Consumer for Attached {
    async fn next(&mut self) -> Result<Delivery> {
        let holder = &self.holder;
        let context = at("next", &holder.queue);
        loop {
            holder.core.open().map_err(&context)?;
            {
                let mut state = lock(&holder.state);
                match state.phase {
                    Phase::Attached => {}
                    Phase::Ended(end) | Phase::Gone(Some(end)) => {
                        return Err(context(end.error()));
                    }
                    Phase::Leaving | Phase::Gone(None) => return Err(context(closed())),
                }
                if state.handed < holder.prefetch
                    && let Some(item) = state.buffer.pop_front()
                {
                    state.handed += 1;
                    let lease = Leased {
                        holder: Arc::clone(holder),
                        generation: state.generation,
                        tag: item.tag,
                        open: true,
                    };
                    return Ok(Delivery::new(item.message, item.attempt, Box::new(lease)));
                }
            }
            tokio::select! {
                () = holder.ready.notified() => {}
                () = holder.core.until_closed() => {}
            }
        }
    }

    async fn close(self: Box<Self>, deadline: Deadline) -> Result<()> {
        let context = at("close", &self.holder.queue);
        self.holder.core.open().map_err(&context)?;
        let (told, detached) = oneshot::channel();
        self.detach(Some(told));
        // An ended consumer has nothing to give back, and its end of the channel is gone.
        deadline.bound(detached).await.map(drop).map_err(context)
    }
}

/// The lease: dropped unsettled, the message goes back (law C10).
#[derive(Debug)]
struct Leased {
    holder: Arc<Holder>,
    generation: u64,
    tag: u64,
    open: bool,
}

impl Leased {
    fn hand_in(
        &self,
        how: Settlement,
        deadline: Deadline,
        reply: Option<oneshot::Sender<Result<()>>>,
    ) -> bool {
        self.holder.hand_in(Order::Settle(Settle {
            generation: self.generation,
            tag: self.tag,
            how,
            deadline,
            reply,
        }))
    }
}

impl Drop for Leased {
    fn drop(&mut self) {
        if self.open {
            self.hand_in(
                Settlement::Retry(Duration::ZERO),
                Deadline::after(PATIENCE),
                None,
            );
        }
    }
}

#[async_trait]
impl Lease for Leased {
    async fn settle(mut self: Box<Self>, settlement: Settlement, deadline: Deadline) -> Result<()> {
        let context = at("settle", &self.holder.queue);
        self.holder.core.open().map_err(&context)?;
        let (reply, answer) = oneshot::channel();
        if !self.hand_in(settlement, deadline, Some(reply)) {
            return Err(context(lease_lost()));
        }
        let answer = deadline.bound(answer).await.map_err(&context)?;
        let answer = answer.unwrap_or_else(|_| Err(not_proven()));
        // Otherwise the drop gives the message back, if it was not settled after all.
        self.open = !(answer.is_ok()
            || answer
                .as_ref()
                .is_err_and(|error| *error.kind() == ErrorKind::LeaseLost));
        answer.map_err(context)
    }
}
