//! Requests: a question goes over pub/sub to whoever holds the guest's lane, its answer comes back to
//! a channel that belongs to that lane and this asker. Nothing is stored.
//!
//! The lane is a lease under a token, and each token has a channel of its own, so a guest that lost its
//! lane hears nothing more. A killed guest's subscription goes with its connection, at once; one that
//! is cut off is `NoConsumer` when its lease ends (R3).
//!
//! A question travels as `<reply channel> <number>`, a line's end, and the body; an answer as
//! `<number> a`, a line's end, and the body; `<number> n` says that nobody serves the lane any more.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use redis::{Cmd, Value, cmd};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep_until},
};
use uuid::Uuid;

use super::{
    BACKEND, at,
    connection::{Core, Handle, lock},
    consume::Lost,
    failure::Failure,
    link::{Link, Live, Phase, is_auth},
    router::Ear,
    scripts,
};
use crate::{
    broker::{MAX_REQUEST_BYTES, Reply, Request, Responder},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    names::QueueName,
};

/// Longer than any reply channel, the longest name of a queue in it, with its number.
const MOST_HEAD: usize = 320;

/// The most questions that wait for one responder; more are dropped, and their askers told nothing.
const WAITING: usize = 2048;

pub(super) async fn request(
    core: &Handle,
    queue: &QueueName,
    body: Bytes,
    deadline: Deadline,
) -> Result<Bytes> {
    core.open()?;
    fits(&body)?;
    let mut closing = core.closing();
    // Somebody was there to be asked.
    let asked = AtomicBool::new(false);
    let exchanges = async {
        loop {
            // None: the connection broke, and the answer may have passed us by.
            if let Some(answer) = exchange(core, queue, &body, deadline, &asked).await? {
                return Ok(answer);
            }
        }
    };
    let late = |_| match core.main.trouble() {
        Some(trouble) => trouble,
        None if asked.load(Ordering::Relaxed) => silent(),
        None if core.attended.lately(queue, core.dialer.lease) => silent(),
        None => Error::new(
            ErrorKind::DeadlineExceeded,
            "the deadline passed before the broker said whether anybody is attached",
        ),
    };
    tokio::select! {
        answer = deadline.bound(exchanges) => answer.map_err(late)?,
        _ = closing.wait_for(|closing| *closing) => Err(super::closed()),
    }
}

/// One question and its answer, over one connection.
async fn exchange(
    core: &Core,
    queue: &QueueName,
    body: &Bytes,
    deadline: Deadline,
    asked: &AtomicBool,
) -> Result<Option<Bytes>> {
    let live = match core.main.now() {
        Some(live) => live,
        None => core.main.live(deadline).await?,
    };
    if core.hears.load(Ordering::Acquire) < live.turn {
        // By a pattern, once for a connection: a guest's rights are on the channels of its own lane (S1).
        let mut hear = cmd("PSUBSCRIBE");
        hear.arg(core.router.answers());
        match live.call(&hear).await {
            Ok(_) => _ = core.hears.fetch_max(live.turn, Ordering::AcqRel),
            Err(failure) => return broke(&live, failure).await,
        }
    }
    let mut expected = core.router.expect(queue);
    let head = format!("{} {}\n", expected.channel, expected.number);
    let calls = core.dialer.calls();
    let mut call = calls.on_keys(&scripts::ASK, &[scripts::key(queue, "lane")]);
    call.arg("PUBLISH").arg([head.as_bytes(), body].concat());
    match live.call(&call).await {
        Ok(Value::Int(0)) => {
            core.attended.not(queue);
            return Err(nobody());
        }
        Ok(_) => {
            core.attended.now(queue);
            asked.store(true, Ordering::Relaxed);
        }
        Err(failure) => return broke(&live, failure).await,
    }
    tokio::select! {
        answer = &mut expected.answer => match answer {
            Ok(Some(answer)) => Ok(Some(answer)),
            Ok(None) => Err(nobody()),
            Err(_) => Ok(None),
        },
        () = live.until_lost() => Ok(None),
    }
}

/// A question that was not put: again over another connection, if that is all that is wrong.
async fn broke(live: &Live, failure: Failure) -> Result<Option<Bytes>> {
    if !failure.is_broken() && !failure.is_passing() {
        return Err(failure.error());
    }
    live.give_up(&failure);
    live.until_lost().await;
    Ok(None)
}

/// The lanes that somebody was found at. A question that a slow server has not passed on by its deadline
/// is one that somebody did not answer, if somebody was there a moment ago.
#[derive(Debug, Default)]
pub(super) struct Attended(Mutex<HashMap<QueueName, Instant>>);

impl Attended {
    /// The most lanes that are remembered: more are there only for a moment (R5).
    const MOST: usize = 1024;

    fn now(&self, lane: &QueueName) {
        let mut lanes = lock(&self.0);
        if let Some(at) = lanes.get_mut(lane) {
            *at = Instant::now();
            return;
        }
        if lanes.len() >= Self::MOST {
            lanes.clear();
        }
        lanes.insert(lane.clone(), Instant::now());
    }

    fn not(&self, lane: &QueueName) {
        lock(&self.0).remove(lane);
    }

    fn lately(&self, lane: &QueueName, lease: Duration) -> bool {
        lock(&self.0)
            .get(lane)
            .is_some_and(|at| at.elapsed() < lease)
    }
}

fn fits(body: &Bytes) -> Result<()> {
    if body.len() <= MAX_REQUEST_BYTES {
        return Ok(());
    }
    let limit = MAX_REQUEST_BYTES as u64;
    Err(Error::new(
        ErrorKind::TooLarge { limit },
        format!("{} bytes, and at most {limit} are taken", body.len()),
    ))
}

fn nobody() -> Error {
    Error::new(
        ErrorKind::NoConsumer,
        "nobody is attached to the guest's lane",
    )
}

fn silent() -> Error {
    Error::new(
        ErrorKind::ConsumerSilent,
        "somebody is attached to the guest's lane, but did not answer in time",
    )
}

/// A question as it arrived.
#[derive(Debug)]
pub(super) struct Asked {
    reply_channel: String,
    number: u64,
    body: Bytes,
}

impl Asked {
    /// None: not of our form (S2).
    pub(super) fn read(lane: &str, payload: Vec<u8>) -> Option<Self> {
        let end = payload
            .iter()
            .take(MOST_HEAD)
            .position(|byte| *byte == b'\n')?;
        if payload.len() - end - 1 > MAX_REQUEST_BYTES {
            return None;
        }
        let (channel, number) = std::str::from_utf8(&payload[..end]).ok()?.split_once(' ')?;
        let (reply_channel, number) = (channel.to_owned(), number.parse().ok()?);
        // Answers go to an asker of this lane and nowhere else.
        reply_channel.strip_prefix(lane)?.strip_prefix("reply:")?;
        Some(Self {
            reply_channel,
            number,
            body: Bytes::from(payload).split_off(end + 1),
        })
    }
}

fn answer_call(reply_channel: &str, number: u64, body: Option<&[u8]>) -> Cmd {
    let what = if body.is_some() { 'a' } else { 'n' };
    let head = format!("{number} {what}\n");
    let mut call = cmd("PUBLISH");
    call.arg(reply_channel)
        .arg([head.as_bytes(), body.unwrap_or_default()].concat());
    call
}

/// Tells those who asked on a lane that was just left, so that they need not wait (R2).
pub(super) async fn tell_strays(link: Weak<Link>, mut strays: mpsc::Receiver<Asked>) {
    while let Some(stray) = strays.recv().await {
        let live = link.upgrade().and_then(|link| link.now());
        if let Some(live) = live {
            live.tell(answer_call(&stray.reply_channel, stray.number, None))
                .await;
        }
    }
}

pub(super) async fn respond(
    core: &Handle,
    queue: &QueueName,
    deadline: Deadline,
) -> Result<Box<dyn Responder>> {
    core.open()?;
    let token = Uuid::new_v4().simple().to_string();
    let (lane, questions) = mpsc::channel(WAITING);
    let (ending, gone) = watch::channel(None);
    let served = Served {
        core: Arc::clone(core),
        queue: queue.clone(),
        questions,
        gone,
    };
    let attendant = Lane {
        core: Arc::clone(core),
        key: scripts::key(queue, "lane"),
        token,
        lane,
        ending,
        prepared: 0,
        spent: 0,
    };
    let (reply, attached) = oneshot::channel();
    core.work(attendant.attend(deadline, reply))?;
    match deadline.bound(attached).await {
        Ok(Ok(answer)) => answer?,
        Ok(Err(_)) => return Err(super::closed()),
        Err(late) => return Err(core.main.trouble().unwrap_or(late)),
    }
    Ok(Box::new(served))
}

/// A responder's task: takes the lane, keeps it, leaves it.
struct Lane {
    core: Arc<Core>,
    key: String,
    token: String,
    lane: mpsc::Sender<Asked>,
    ending: watch::Sender<Option<Lost>>,
    prepared: u64,
    spent: u64,
}

impl Lane {
    async fn attend(mut self, deadline: Deadline, reply: oneshot::Sender<Result<()>>) {
        let attached = self.attach(deadline).await;
        let is_attached = attached.is_ok();
        let _ = reply.send(attached);
        if is_attached {
            self.keep().await;
        }
        self.leave().await;
    }

    fn channel(&self) -> String {
        format!("{}:{}", self.key, self.token)
    }

    fn take(&self) -> Cmd {
        let mut call = self
            .core
            .dialer
            .calls()
            .on_keys(&scripts::LANE, std::slice::from_ref(&self.key));
        call.arg(&self.token)
            .arg(self.core.dialer.lease.as_millis());
        call
    }

    async fn attach(&mut self, deadline: Deadline) -> Result<()> {
        self.core
            .router
            .listen(&self.channel(), Ear::Lane(self.lane.clone()));
        // First the ears, then the lane: whoever finds us there is heard.
        while self.prepared == 0 {
            let live = self.core.main.live(deadline).await?;
            deadline.bound(self.prepare(&live)).await?;
            if self.prepared == 0 {
                deadline.bound(live.until_lost()).await?;
            }
        }
        match self.core.main.call(&self.take(), deadline).await? {
            Value::Int(1) => Ok(()),
            _ => Err(Lost::TakenOver.error_of_lane()),
        }
    }

    async fn prepare(&mut self, live: &Live) {
        if live.turn == self.prepared {
            return;
        }
        let mut subscribe = cmd("SUBSCRIBE");
        subscribe.arg(self.channel());
        match live.call(&subscribe).await {
            Ok(_) => self.prepared = live.turn,
            Err(failure) => {
                live.give_up(&failure);
                self.spent = self.spent.max(live.turn);
            }
        }
    }

    /// Keeps the lease while the responder lives.
    async fn keep(&mut self) {
        let mut phase = self.core.main.phase();
        let mut closing = self.core.closing();
        let mut renew_at = Instant::now() + self.core.dialer.lease / 3;
        loop {
            let live = self.core.main.now().filter(|live| live.turn > self.spent);
            let connected = live.is_some();
            if let Some(live) = live
                && (live.turn != self.prepared || renew_at <= Instant::now())
            {
                self.prepare(&live).await;
                renew_at = Instant::now() + self.core.dialer.lease / 3;
                match live.call(&self.take()).await {
                    Ok(Value::Int(1)) => {}
                    Ok(_) => {
                        self.ending.send_replace(Some(Lost::TakenOver));
                        return;
                    }
                    Err(failure) if is_auth(&failure) => {
                        self.ending.send_replace(Some(Lost::AuthRefused));
                        return;
                    }
                    Err(failure) if failure.is_broken() || failure.is_passing() => {
                        live.give_up(&failure);
                        self.spent = self.spent.max(live.turn);
                    }
                    Err(failure) => tracing::warn!(?failure, "a lane's lease was not renewed"),
                }
            }
            tokio::select! {
                () = self.lane.closed() => return,
                _ = closing.wait_for(|closing| *closing) => return,
                _ = phase.changed() => match &*phase.borrow_and_update() {
                    Phase::Down(failure) if is_auth(failure) => {
                        self.ending.send_replace(Some(Lost::AuthRefused));
                        return;
                    }
                    Phase::Ended => return,
                    _ => {}
                },
                // Without a connection the next one wakes us.
                () = sleep_until(renew_at), if connected => {}
            }
        }
    }

    async fn leave(self) {
        let channel = self.channel();
        if let Some(live) = self.core.main.now() {
            let mut leave = self
                .core
                .dialer
                .calls()
                .on_keys(&scripts::LEAVE, std::slice::from_ref(&self.key));
            leave.arg(&self.token);
            // If it does not arrive, the lease ends by itself.
            let _ = live.call(&leave).await;
            let mut unsubscribe = cmd("UNSUBSCRIBE");
            unsubscribe.arg(&channel);
            live.tell(unsubscribe).await;
        }
        self.core.router.forget(&channel);
    }
}

impl Lost {
    fn error_of_lane(self) -> Error {
        match self {
            Self::TakenOver => Error::new(
                ErrorKind::Conflict,
                "another responder is attached to this lane, and its lease runs",
            )
            .with_backend(BACKEND),
            other => other.error(),
        }
    }
}

/// The responder.
#[derive(Debug)]
struct Served {
    core: Arc<Core>,
    queue: QueueName,
    questions: mpsc::Receiver<Asked>,
    gone: watch::Receiver<Option<Lost>>,
}

#[async_trait]
impl Responder for Served {
    async fn next(&mut self) -> Result<Request> {
        let mut closing = self.core.closing();
        let answer = tokio::select! {
            biased;
            _ = closing.wait_for(|closing| *closing) => Err(super::closed()),
            gone = self.gone.wait_for(Option::is_some) => Err(match gone.map(|gone| *gone) {
                Ok(Some(lost)) => lost.error_of_lane(),
                _ => super::closed(),
            }),
            asked = self.questions.recv() => asked.ok_or_else(super::closed),
        };
        let Asked {
            reply_channel,
            number,
            body,
        } = answer.map_err(at("next", &self.queue))?;
        let reply = Answering {
            core: Arc::clone(&self.core),
            queue: self.queue.clone(),
            reply_channel,
            number,
        };
        Ok(Request::new(body, Box::new(reply)))
    }
}

/// The way back to one asker.
#[derive(Debug)]
struct Answering {
    core: Arc<Core>,
    queue: QueueName,
    reply_channel: String,
    number: u64,
}

#[async_trait]
impl Reply for Answering {
    async fn send(self: Box<Self>, body: Bytes, deadline: Deadline) -> Result<()> {
        let in_context = at("reply", &self.queue);
        self.core.open().map_err(&in_context)?;
        fits(&body).map_err(&in_context)?;
        let call = answer_call(&self.reply_channel, self.number, Some(&body));
        // Twice is once for the asker: it knows the number.
        let sent = self.core.main.call(&call, deadline).await;
        sent.map(drop).map_err(in_context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LANE: &str = "wilco:{q}:";

    #[test]
    fn s2_hostile_questions_are_dropped() {
        for bytes in [
            "",
            "\n",
            "x",
            "wilco:{q}:reply:a\nx",
            "other 1\nx",
            "wilco:{p}:reply:a 1\nx",
            "wilco:{q}:reply:a x\n",
        ] {
            assert!(Asked::read(LANE, bytes.into()).is_none(), "{bytes:?}");
        }
        let mut long = b"wilco:{q}:reply:a 1\n".to_vec();
        long.resize(long.len() + MAX_REQUEST_BYTES + 1, 0);
        assert!(Asked::read(LANE, long).is_none());
        let queue = format!("wilco.q.{}.{}", "a".repeat(128), u64::MAX);
        let lane = format!("wilco:{{{queue}}}:");
        let longest = format!("{lane}reply:{} {}\nx", "0".repeat(32), u64::MAX);
        assert!(Asked::read(&lane, longest.into()).is_some());
        let asked = Asked::read(LANE, b"wilco:{q}:reply:a 7\nx\ny".to_vec()).unwrap();
        assert_eq!((asked.number, &asked.body[..]), (7, &b"x\ny"[..]));
    }
}
