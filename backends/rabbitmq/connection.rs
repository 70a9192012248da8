//! A handle: its two connections, and what its parts share.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use lapin::{ExchangeKind, options::ExchangeDeclareOptions, types::FieldTable};
use tokio::{sync::watch, time::sleep};
use uuid::Uuid;

use super::{
    ask::Askers,
    closed,
    consume::Holder,
    credential::out_of,
    fault::Fault,
    link::{Link, Wire},
    lock,
    management::Management,
    post::Outbox,
    publish::Gates,
    requests::Lane,
};
use crate::{
    broker_url::BrokerUrl,
    deadline::Deadline,
    endpoint::{Endpoint, TLS_OPTIONS},
    error::{Error, ErrorKind, Result},
    names::QueueName,
};

/// The exchange that messages are published to: a queue without its binding is fenced.
pub(super) const EXCHANGE: &str = "wilco";

/// The exchange that answers are published to: `<the answering lane's queue>.<the asker>`.
pub(super) const REPLIES: &str = "wilco.reply";

/// How often each side shows that it lives. The broker gives up a silent client after three of these,
/// the client a silent broker after two.
const HEARTBEAT: Duration = Duration::from_secs(2);

/// How old a queue has to be until a power cut spares it: see `durability`.
const FRESH: Duration = Duration::from_secs(2);

/// How long a step waits before it is tried again where something is in the way.
pub(super) const AGAIN: Duration = Duration::from_millis(4);

/// One handle's part.
#[derive(Debug)]
pub(super) struct Core {
    /// A name that no other handle has.
    pub(super) id: String,
    /// Whose handle it is, if it is a guest's with a credential: it has a way of its own to what it may
    /// write (see `credential`).
    pub(super) own: Option<QueueName>,
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) management: Management,
    pub(super) talk: Link,
    post: Link,
    scout: Arc<Link>,
    pub(super) outbox: Arc<Outbox>,
    pub(super) askers: Askers,
    pub(super) gates: Gates,
    pub(super) fresh: Duration,
    pub(super) heartbeat: Duration,
    closed: watch::Sender<bool>,
    copies: AtomicU64,
    /// Who takes turns in this process, before it takes a lock on the broker.
    turns: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
    /// Queues whose binding this handle has seen to.
    pub(super) bound: Mutex<HashSet<QueueName>>,
    pub(super) holders: Mutex<Vec<Weak<Holder>>>,
    pub(super) lanes: Mutex<Vec<Weak<Lane>>>,
}

/// How long after a connection broke that was just made.
const BROKE: Duration = Duration::from_millis(50);

pub(super) async fn connect(url: &BrokerUrl, deadline: Deadline) -> Result<Arc<Core>> {
    let with_tls = url.scheme() == "amqps";
    let mut known = vec!["heartbeat", "fresh", "guest", "management"];
    if with_tls {
        known.extend(TLS_OPTIONS);
    }
    url.only_options(&known)?;
    let seconds = |text: &str| {
        humantime::parse_duration(text)
            .ok()
            .filter(|time| time.subsec_nanos() == 0)
    };
    let heartbeat = url
        .option(
            "heartbeat",
            "whole seconds from 1s to 60s, such as 2s",
            |text| seconds(text).filter(|time| (1..=60).contains(&time.as_secs())),
        )?
        .unwrap_or(HEARTBEAT);
    let fresh = url
        .option(
            "fresh",
            "whole seconds up to 60s, such as 2s or 0s",
            |text| seconds(text).filter(|time| time.as_secs() <= 60),
        )?
        .unwrap_or(FRESH);
    let own = url.option("guest", "the name of the guest's queue", |name| {
        name.parse::<QueueName>()
            .ok()
            .filter(QueueName::is_commands)
    })?;
    let management = Management::of(url)?;
    let port = if with_tls { 5671 } else { 5672 };
    let endpoint = Arc::new(Endpoint::of(url, port, with_tls)?);
    let id = Uuid::new_v4().simple().to_string();
    let connected = Arc::clone(&endpoint);
    let link = |what, scout| {
        let name = format!("{what} {id}");
        Link::start(Arc::clone(&endpoint), heartbeat, name, scout)
    };
    let scout = Arc::new(link("scout", None));
    let core = Arc::new(Core {
        own,
        management,
        talk: link("talk", Some(Arc::clone(&scout))),
        post: link("post", None),
        scout,
        outbox: Arc::default(),
        askers: Askers::default(),
        gates: Gates::default(),
        fresh,
        heartbeat,
        endpoint: connected,
        closed: watch::Sender::new(false),
        copies: AtomicU64::new(0),
        turns: Mutex::default(),
        bound: Mutex::default(),
        holders: Mutex::default(),
        lanes: Mutex::default(),
        id,
    });
    core.post.wire(deadline).await?;
    tokio::spawn(post(Arc::downgrade(&core)));
    loop {
        let talk = core.talk.wire(deadline).await?;
        // A guest may make neither, and need not: the control plane did.
        if core.own.is_some() {
            break;
        }
        match deadline.bound(exchanges(&talk)).await? {
            // One connection may break while the others are there: it is made again (law F5).
            Err(Fault::Lost(why)) if !deadline.has_passed() => {
                tracing::debug!(why, "the exchanges are looked at again");
                let _ = deadline.bound(sleep(BROKE)).await;
            }
            made => {
                made.map_err(Fault::error)?;
                break;
            }
        }
    }
    Ok(core)
}

/// Serves the outbox over each connection in turn.
async fn post(core: Weak<Core>) {
    loop {
        let Some(here) = core.upgrade() else { return };
        let outbox = Arc::clone(&here.outbox);
        let mut closed = here.closed.subscribe();
        let look = here
            .post
            .wire(Deadline::after(Duration::from_secs(1)))
            .await;
        drop(here);
        match look {
            Ok(wire) => outbox.serve(wire).await,
            Err(error) if *error.kind() == ErrorKind::Closed => return,
            Err(_) => {
                let pause = Duration::from_millis(50);
                let closed = closed.wait_for(|closed| *closed);
                if tokio::time::timeout(pause, closed).await.is_ok() {
                    return;
                }
            }
        }
    }
}

async fn exchanges(wire: &Wire) -> Result<(), Fault> {
    for (name, kind) in [
        (EXCHANGE, ExchangeKind::Direct),
        (REPLIES, ExchangeKind::Topic),
    ] {
        let channel = wire.scout().await?;
        let options = ExchangeDeclareOptions {
            durable: true,
            ..ExchangeDeclareOptions::default()
        };
        let made = channel.answer(channel.channel().exchange_declare(
            name.into(),
            kind,
            options,
            FieldTable::default(),
        ));
        match made.await {
            Ok(()) => channel.done(),
            Err(Fault::Amqp(403, _)) => {}
            Err(fault) => return Err(fault),
        }
    }
    Ok(())
}

impl Core {
    /// Fails once the handle is closed.
    pub(super) fn open(&self) -> Result<()> {
        if *self.closed.borrow() {
            return Err(closed());
        }
        Ok(())
    }

    /// The exchange that reaches a queue by its name.
    pub(super) fn by_name(&self) -> Cow<'static, str> {
        match &self.own {
            Some(own) => out_of(own).into(),
            None => "".into(),
        }
    }

    /// The exchange that messages are published to.
    pub(super) fn messages(&self) -> Cow<'static, str> {
        match &self.own {
            Some(own) => out_of(own).into(),
            None => EXCHANGE.into(),
        }
    }

    /// Waits for the handle to be closed.
    pub(super) async fn until_closed(&self) {
        // Fails only without a sender, and `self` is one.
        let _ = self.closed.subscribe().wait_for(|closed| *closed).await;
    }

    /// A name for a stored copy that no other copy has.
    pub(super) fn copy_name(&self) -> String {
        format!(
            "{}-{:x}",
            self.id,
            self.copies.fetch_add(1, Ordering::Relaxed)
        )
    }

    /// Whether publishes are held up by an alarm of the broker.
    pub(super) fn is_blocked(&self) -> bool {
        self.post.up().is_some_and(|wire| wire.is_blocked())
    }

    /// What keeps publishes from leaving.
    pub(super) fn post_obstacle(&self) -> Option<Error> {
        if self.is_blocked() {
            return Some(Error::new(
                ErrorKind::BrokerRefused,
                "the broker takes no messages for now: a memory or disk alarm is on",
            ));
        }
        self.post.up().is_none().then(|| self.post.unreachable())
    }

    /// Runs a step that can be done again until it is done on an unbroken connection, in a task of its
    /// own: whoever waits for it may go (law P5).
    pub(super) async fn run<T, F>(
        self: &Arc<Self>,
        deadline: Deadline,
        step: impl Fn(Arc<Self>, Arc<Wire>) -> F + Send + Sync + 'static,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Fault>> + Send,
    {
        self.open()?;
        let core = Arc::clone(self);
        let task = tokio::spawn(async move {
            loop {
                let wire = core.talk.wire(deadline).await?;
                let attempt = tokio::select! {
                    attempt = deadline.bound(step(Arc::clone(&core), Arc::clone(&wire))) => attempt?,
                    // A call on a broken connection may wait for an answer for ever.
                    () = wire.until_dead() => Err(Fault::Lost("it broke".into())),
                };
                match attempt {
                    Err(Fault::Lost(why)) if !deadline.has_passed() => {
                        tracing::debug!(why, "a step is tried again");
                        tokio::time::sleep(AGAIN).await;
                    }
                    done => return done.map_err(Fault::error),
                }
            }
        });
        let finished = tokio::select! {
            finished = deadline.bound(task) => finished,
            () = self.until_closed() => return Err(closed()),
        };
        match finished {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => Err(Error::new(ErrorKind::Internal, panic.to_string())),
            Err(late) if self.talk.up().is_some() => Err(late),
            Err(_) => Err(self.talk.unreachable()),
        }
    }

    /// Whose turn it is in this process, for what this name stands for.
    pub(super) fn turn(&self, name: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = lock(&self.turns);
        if let Some(turn) = turns.get(name).and_then(Weak::upgrade) {
            return turn;
        }
        turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::default();
        turns.insert(name.into(), Arc::downgrade(&turn));
        turn
    }

    pub(super) async fn close(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        let core = Arc::clone(self);
        let holders = std::mem::take(&mut *lock(&self.holders));
        let lanes = std::mem::take(&mut *lock(&self.lanes));
        let first = !self.closed.send_replace(true);
        if !first {
            return Ok(());
        }
        // In a task of its own: a close that is given up goes on.
        let closing = tokio::spawn(async move {
            for lane in lanes.iter().filter_map(Weak::upgrade) {
                lane.detach();
            }
            let holders: Vec<_> = holders.iter().filter_map(Weak::upgrade).collect();
            for holder in &holders {
                let _ = deadline.bound(holder.release()).await;
            }
            core.talk.close().await;
            core.post.close().await;
            core.scout.close().await;
        });
        deadline.bound(closing).await.map(drop)
    }
}
