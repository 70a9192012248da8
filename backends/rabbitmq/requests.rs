//! Requests to a guest's lane: a queue that exists exactly while the guest is attached, apart from its
//! durable queue (law R9).

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use lapin::{
    Channel,
    options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueDeleteOptions},
    types::FieldTable,
};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::Instant,
};

use super::{
    ask::{Asked, Back, LOOK, ask},
    at, closed,
    connection::Core,
    fault::Fault,
    lock,
    lockqueue::try_exclusive,
    post::Answer,
};
use crate::{
    backoff::Backoff,
    broker::{MAX_REQUEST_BYTES, Reply, Request, Responder},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    names::QueueName,
};

/// Requests that wait for a responder to look. More wait on the broker, each for its asker's time.
const WAITING: u16 = 64;

/// How many requests are acked together. An ack only makes room for more: the lane goes with its guest,
/// and so does what is not acked.
const ACKED_AT_ONCE: u16 = WAITING / 2;

fn lane_of(queue: &QueueName) -> String {
    format!("{queue}.lane")
}

pub(super) async fn request(
    core: &Arc<Core>,
    queue: &QueueName,
    body: Bytes,
    deadline: Deadline,
) -> Result<Bytes> {
    core.open()?;
    check_size(&body)?;
    let lane = lane_of(queue);
    let asked = tokio::select! {
        biased;
        asked = ask(core, &lane, "request", body, deadline) => asked?,
        () = core.until_closed() => return Err(closed()),
    };
    match asked {
        Asked::Answer(answer) => Ok(answer),
        Asked::Nobody => Err(Error::new(
            ErrorKind::NoConsumer,
            "nobody is attached to this lane",
        )),
        Asked::Silent => Err(Error::new(
            ErrorKind::ConsumerSilent,
            "the guest is attached, but did not answer in time",
        )),
    }
}

fn check_size(body: &Bytes) -> Result<()> {
    if body.len() <= MAX_REQUEST_BYTES {
        return Ok(());
    }
    let limit = MAX_REQUEST_BYTES as u64;
    Err(Error::new(
        ErrorKind::TooLarge { limit },
        format!(
            "a request or answer has at most {limit} bytes, this one has {}",
            body.len()
        ),
    ))
}

fn taken() -> Error {
    Error::new(
        ErrorKind::Conflict,
        "another responder is attached to this lane, and it is alive",
    )
}

const ATTACHED: u8 = 0;
const LEAVING: u8 = 1;
const GONE: u8 = 2;

/// What a responder holds for as long as it is attached.
#[derive(Debug)]
pub(super) struct Lane {
    name: String,
    state: AtomicU8,
    leave: Notify,
}

impl Lane {
    pub(super) fn detach(&self) {
        let _ = self
            .state
            .compare_exchange(ATTACHED, LEAVING, Ordering::AcqRel, Ordering::Acquire);
        self.leave.notify_one();
    }

    fn is_leaving(&self) -> bool {
        self.state.load(Ordering::Acquire) != ATTACHED
    }
}

pub(super) async fn respond(
    core: &Arc<Core>,
    queue: &QueueName,
    deadline: Deadline,
) -> Result<Box<dyn Responder>> {
    core.open()?;
    let lane = reserve(core, lane_of(queue))?;
    let (requests, incoming) = mpsc::channel(usize::from(WAITING));
    let (ready, attached) = oneshot::channel();
    tokio::spawn(attend(
        Arc::clone(core),
        Arc::clone(&lane),
        requests,
        ready,
        deadline,
    ));
    // Dropped here or later, it leaves.
    let answering = Answering {
        core: Arc::clone(core),
        queue: queue.clone(),
        lane,
        incoming,
    };
    match deadline.bound(attached).await? {
        Ok(Ok(())) => Ok(Box::new(answering)),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(closed()),
    }
}

/// One of a name in this handle: the broker would give its own connection a lane twice.
fn reserve(core: &Core, name: String) -> Result<Arc<Lane>> {
    let mut lanes = lock(&core.lanes);
    let gone = |lane: &Lane| lane.state.load(Ordering::Acquire) == GONE;
    lanes.retain(|lane| lane.upgrade().is_some_and(|lane| !gone(&lane)));
    if lanes
        .iter()
        .any(|lane| lane.upgrade().is_some_and(|lane| lane.name == name))
    {
        return Err(taken());
    }
    let lane = Arc::new(Lane {
        name,
        state: AtomicU8::new(ATTACHED),
        leave: Notify::new(),
    });
    lanes.push(Arc::downgrade(&lane));
    Ok(lane)
}

/// Serves a lane over one connection after the other, until it is left.
async fn attend(
    core: Arc<Core>,
    lane: Arc<Lane>,
    requests: mpsc::Sender<Result<Incoming>>,
    ready: oneshot::Sender<Result<()>>,
    deadline: Deadline,
) {
    let mut ready = Some(ready);
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
    // How long the broker may keep a broken connection's lane (three heartbeats, and some).
    let mut patience = None;
    while !lane.is_leaving() {
        let limit = if ready.is_some() {
            deadline
        } else {
            Deadline::after(Duration::from_secs(3600))
        };
        let attached = tokio::select! {
            attached = attach(&core, &lane, limit) => attached,
            () = lane.leave.notified() => break,
            () = core.until_closed() => Err(closed().into()),
        };
        let fault = match attached {
            Ok((wire, channel, mut consumer)) => {
                patience = None;
                backoff.reset();
                if let Some(ready) = ready.take()
                    && ready.send(Ok(())).is_err()
                {
                    lane.detach();
                }
                let forwarding = forward(&core, &lane, &mut consumer, &channel, &requests);
                let over = tokio::select! {
                    () = forwarding => false,
                    () = wire.until_dead() => false,
                    () = lane.leave.notified() => true,
                };
                if over || lane.is_leaving() {
                    let options = QueueDeleteOptions::default();
                    let leaving = async {
                        let name = lane.name.as_str().into();
                        let _ = channel.queue_delete(name, options).await;
                        let _ = channel.close(200, "done".into()).await;
                    };
                    tokio::select! {
                        () = leaving => {}
                        // The lane went with it.
                        () = wire.until_dead() => {}
                    }
                    break;
                }
                continue;
            }
            Err(fault) => fault,
        };
        let error = fault.error();
        let first = ready.is_some();
        let until = *patience.get_or_insert_with(|| Instant::now() + core.heartbeat * 5);
        let hopeless = match error.kind() {
            ErrorKind::Conflict => first || Instant::now() > until,
            ErrorKind::AuthRefused | ErrorKind::Closed => true,
            _ => first && deadline.has_passed(),
        };
        if hopeless {
            match ready.take() {
                Some(ready) => drop(ready.send(Err(error))),
                None => drop(requests.send(Err(error)).await),
            }
            break;
        }
        backoff.pause().await;
    }
    lane.state.store(GONE, Ordering::Release);
}

async fn attach(
    core: &Core,
    lane: &Lane,
    deadline: Deadline,
) -> Result<(Arc<super::link::Wire>, Channel, lapin::Consumer), Fault> {
    let wire = core.talk.wire(deadline).await?;
    let attach = async {
        let channel = try_exclusive(&wire, &lane.name).await?.ok_or_else(taken)?;
        channel
            .basic_qos(WAITING, BasicQosOptions::default())
            .await?;
        let consumer = channel
            .basic_consume(
                lane.name.as_str().into(),
                "lane".into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await?;
        Ok::<_, Fault>((channel, consumer))
    };
    let (channel, consumer) = tokio::select! {
        attached = deadline.bound(attach) => attached??,
        () = wire.until_dead() => return Err(Fault::Lost("it broke".into())),
    };
    Ok((wire, channel, consumer))
}

/// Hands on what comes, as far as there is room: the rest stays with the broker.
async fn forward(
    core: &Arc<Core>,
    lane: &Lane,
    consumer: &mut lapin::Consumer,
    channel: &Channel,
    requests: &mpsc::Sender<Result<Incoming>>,
) {
    let mut unacked = 0;
    while let Some(Ok(delivery)) = consumer.next().await {
        let properties = &delivery.properties;
        let is_look = properties
            .kind()
            .as_ref()
            .is_some_and(|kind| kind.as_str() == LOOK);
        let expires = properties.expiration().as_ref();
        let expires = expires.and_then(|text| text.as_str().parse().ok());
        let incoming = Back::of(&lane.name, properties).map(|back| Incoming {
            core: Arc::clone(core),
            back,
            until: Instant::now() + Duration::from_millis(expires.unwrap_or(60_000)),
            body: delivery.data.into(),
        });
        if let Some(incoming) = incoming.filter(|_| !is_look)
            && requests.send(Ok(incoming)).await.is_err()
        {
            return;
        }
        unacked += 1;
        if unacked == ACKED_AT_ONCE {
            unacked = 0;
            let options = BasicAckOptions { multiple: true };
            let acked = channel.basic_ack(delivery.delivery_tag, options);
            if acked.await.is_err() {
                return;
            }
        }
    }
}

/// A request that nobody looked at yet.
#[derive(Debug)]
struct Incoming {
    core: Arc<Core>,
    back: Back,
    body: Bytes,
    /// When its asker gives up.
    until: Instant,
}

#[derive(Debug)]
struct Answering {
    core: Arc<Core>,
    queue: QueueName,
    lane: Arc<Lane>,
    incoming: mpsc::Receiver<Result<Incoming>>,
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.lane.detach();
    }
}

#[async_trait]
impl Responder for Answering {
    async fn next(&mut self) -> Result<Request> {
        let context = at("respond", &self.queue);
        loop {
            let incoming = tokio::select! {
                biased;
                () = self.core.until_closed() => return Err(context(closed())),
                incoming = self.incoming.recv() => incoming,
            };
            match incoming {
                Some(Ok(incoming)) if incoming.until > Instant::now() => {
                    let Incoming {
                        core, back, body, ..
                    } = incoming;
                    return Ok(Request::new(body, Box::new(Way { core, back })));
                }
                // Its asker has gone.
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(context(error)),
                None => return Err(context(closed())),
            }
        }
    }
}

#[derive(Debug)]
struct Way {
    core: Arc<Core>,
    back: Back,
}

#[async_trait]
impl Reply for Way {
    async fn send(self: Box<Self>, body: Bytes, deadline: Deadline) -> Result<()> {
        self.core.open()?;
        check_size(&body)?;
        let Self { core, back } = *self;
        loop {
            let letter = back.clone().answer(&core, body.clone());
            match core.outbox.publish(letter, deadline).await {
                Answer::Stored | Answer::Returned => return Ok(()),
                Answer::Refused | Answer::Lost if !deadline.has_passed() => {}
                _ => return Err(core.post_obstacle().unwrap_or_else(super::late)),
            }
        }
    }
}
