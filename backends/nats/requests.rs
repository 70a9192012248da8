//! Questions and answers over core NATS: nothing of them is stored (laws R1 to R9).
//!
//! A lane is a subject that its responder listens to, so that the server itself says when nobody does.
//! That there is one responder is kept by a claim: the last message on the lane's subject in a stream
//! that lives in the servers' memory, replaced only by one who has seen it (`expected last sequence`).
//! A claim goes with its responder, and by itself a minute after a responder that died.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_nats::{HeaderMap, Message as Raw, Subject, Subscriber};
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::{
    sync::{Notify, oneshot, watch},
    time::{Instant, interval, sleep},
};

use super::{
    api::{Refusal, WRONG_LAST_SEQUENCE, json_of},
    attach::is_gone,
    closed,
    connection::{Answer, Link, Unanswered, gone, lock, revoked, unreachable},
    names::{LANES, Names, token},
};
use crate::{
    broker::{MAX_REQUEST_BYTES, Reply, Request, Responder},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    names::QueueName,
};

/// Set on the answer of a lane that its responder has left.
const NOBODY: &str = "Wilco-Nobody";

/// How long a claim stays without being renewed, and how often it is.
const CLAIM: Duration = Duration::from_secs(60);
const RENEW: Duration = Duration::from_secs(15);

/// How long a lane that was left says so to those whose question was on its way. The claim stands until
/// then, so that it is said of nobody else.
const LINGER: Duration = Duration::from_millis(150);

/// How long letting a claim go may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// After so long without an answer the server is asked whether anybody listens still.
const DOUBT: Duration = Duration::from_millis(500);

/// Set on a question that the lane answers by itself, without its responder.
const PROBE: &str = "Wilco-Probe";

/// What a responder that does not look has waiting at the most: the oldest go, whose askers gave up first.
const MAX_WAITING: usize = 4_096;
const MAX_WAITING_BYTES: usize = 64 * 1024 * 1024;

fn too_large(bytes: usize) -> Error {
    let limit = MAX_REQUEST_BYTES as u64;
    Error::new(
        ErrorKind::TooLarge { limit },
        format!("{bytes} bytes are too many: a request and an answer have at most {limit}"),
    )
}

pub(super) async fn request(
    link: &Link,
    queue: &QueueName,
    body: Bytes,
    deadline: Deadline,
) -> Result<Bytes> {
    link.alive()?;
    if body.len() > MAX_REQUEST_BYTES {
        return Err(too_large(body.len()));
    }
    let subject = Names::of(queue).ping();
    let answer = tokio::select! {
        biased;
        answer = link.call(&subject, None, &body, true, deadline) => answer,
        () = abandoned(link, &subject, deadline) => return Err(no_consumer()),
    };
    match answer {
        Ok(answer) if is_nobody(&answer) => Err(no_consumer()),
        Ok(answer) => Ok(answer.message.payload),
        Err(Unanswered::Unknown(error))
            if *error.kind() == ErrorKind::DeadlineExceeded && link.is_connected() =>
        {
            Err(Error::new(
                ErrorKind::ConsumerSilent,
                "somebody is attached to the lane and did not answer in time",
            ))
        }
        Err(error) => Err(error.into_error()),
    }
}

/// Ends when nobody listens to the lane any more: whoever was asked is gone, and will not answer (R3).
async fn abandoned(link: &Link, subject: &str, deadline: Deadline) {
    let mut headers = HeaderMap::new();
    headers.insert(PROBE, "1");
    loop {
        sleep(DOUBT).await;
        let answer = link
            .call(subject, Some(&headers), &Bytes::new(), true, deadline)
            .await;
        if answer.is_ok_and(|answer| is_nobody(&answer)) {
            return;
        }
    }
}

fn is_nobody(answer: &Answer) -> bool {
    let said = answer
        .message
        .headers
        .as_ref()
        .and_then(|map| map.get(NOBODY));
    answer.nobody() || said.is_some()
}

fn no_consumer() -> Error {
    Error::new(ErrorKind::NoConsumer, "nobody is attached to the lane")
}

/// A responder's end.
#[derive(Debug)]
pub(super) struct Lane {
    link: Arc<Link>,
    names: Names,
    token: String,
    claim: Mutex<u64>,
    waiting: Mutex<Waiting>,
    arrived: Notify,
    leave: Notify,
    left: AtomicBool,
    over: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Waiting {
    questions: VecDeque<Raw>,
    bytes: usize,
    ended: Option<ErrorKind>,
}

pub(super) async fn respond(
    link: &Arc<Link>,
    queue: &QueueName,
    deadline: Deadline,
) -> Result<Box<dyn Responder>> {
    link.alive()?;
    let (sender, answer) = oneshot::channel();
    let (link, names) = (Arc::clone(link), Names::of(queue));
    tokio::spawn(async move {
        let attending = attend(link, names, deadline).await;
        // Whoever was dropped meanwhile does not take it, and the lane is left again.
        let _ = sender.send(attending);
    });
    let attending = deadline.bound(answer).await?.map_err(|_| closed())??;
    Ok(Box::new(attending))
}

async fn attend(link: Arc<Link>, names: Names, deadline: Deadline) -> Result<Attending> {
    let token = token();
    let alive = deadline
        .bound(link.client.subscribe(names.attending(&token)))
        .await?
        .map_err(gone)?;
    let claim = claim(&link, &names, &token, deadline).await?;
    let subscribed = deadline.bound(link.client.subscribe(names.ping())).await;
    let questions = match subscribed.and_then(|subscribed| subscribed.map_err(gone)) {
        Ok(questions) => questions,
        Err(error) => {
            unclaim(&link, claim).await;
            return Err(error);
        }
    };
    let lane = Arc::new(Lane {
        names,
        token,
        claim: Mutex::new(claim),
        waiting: Mutex::default(),
        arrived: Notify::new(),
        leave: Notify::new(),
        left: AtomicBool::new(false),
        over: watch::Sender::new(false),
        link,
    });
    lane.link.remember_lane(&lane);
    tokio::spawn(listen(Arc::clone(&lane), alive, questions));
    let attending = Attending { lane };
    // Ok says that a request reaches it: the server has the subscription when it answers this.
    barrier(&attending.lane, deadline).await?;
    attending.lane.link.alive()?;
    Ok(attending)
}

/// A question of ours to ourselves, which comes back once the server knows what was said before it.
async fn barrier(lane: &Lane, deadline: Deadline) -> Result<()> {
    let subject = lane.names.attending(&lane.token);
    let answer = lane
        .link
        .call(&subject, None, &Bytes::new(), true, deadline)
        .await;
    answer.map(drop).map_err(Unanswered::into_error)
}

/// Claims the lane; what comes back is the claim's sequence.
async fn claim(link: &Link, names: &Names, token: &str, deadline: Deadline) -> Result<u64> {
    loop {
        let there = current(link, names, deadline).await?;
        let expected = match there {
            None => 0,
            // One that was left by a guest, which may not take it away.
            Some((sequence, other)) if other.is_empty() => sequence,
            Some((sequence, other)) => {
                if !is_gone(link, &names.attending(&other), deadline).await? {
                    return Err(Error::new(
                        ErrorKind::Conflict,
                        "another responder is attached to the lane",
                    ));
                }
                sequence
            }
        };
        if let Some(sequence) = put(link, names, token, expected, deadline).await? {
            return Ok(sequence);
        }
    }
}

/// The claim that stands, and whose it is.
async fn current(link: &Link, names: &Names, deadline: Deadline) -> Result<Option<(u64, String)>> {
    if link.options.guest.is_some() {
        return current_of_own(link, names, deadline).await;
    }
    if !link.is_finished(LANES, deadline).await? {
        return Ok(None);
    }
    let body = json!({ "last_by_subj": names.claim() });
    let verb = format!("STREAM.MSG.GET.{LANES}");
    match link.api(&verb, &body, deadline).await? {
        Ok(value) => {
            let message = &value["message"];
            let token = message["data"]
                .as_str()
                .and_then(super::form::base64)
                .unwrap_or_default();
            let token = String::from_utf8_lossy(&token).into_owned();
            Ok(message["seq"].as_u64().map(|sequence| (sequence, token)))
        }
        Err(_) => Ok(None),
    }
}

/// The same for a guest, which may read this one subject and nobody else's.
async fn current_of_own(
    link: &Link,
    names: &Names,
    deadline: Deadline,
) -> Result<Option<(u64, String)>> {
    let subject = format!("$JS.API.DIRECT.GET.{LANES}.{}", names.claim());
    let nothing = Bytes::new();
    let answer = link.call(&subject, None, &nothing, true, deadline).await;
    let message = answer.map_err(Unanswered::into_error)?.message;
    let sequence = message.headers.as_ref().and_then(|map| {
        let sequence = map.get("Nats-Sequence")?;
        sequence.as_str().parse().ok()
    });
    let token = String::from_utf8_lossy(&message.payload).into_owned();
    Ok(sequence.map(|sequence| (sequence, token)))
}

/// Stores a claim if the one that stands is the expected one; `None`: it is not.
async fn put(
    link: &Link,
    names: &Names,
    token: &str,
    expected: u64,
    deadline: Deadline,
) -> Result<Option<u64>> {
    let mut headers = HeaderMap::new();
    headers.insert(
        "Nats-Expected-Last-Subject-Sequence",
        expected.to_string().as_str(),
    );
    let body = Bytes::from(token.to_owned());
    loop {
        let answer = link
            .call(&names.claim(), Some(&headers), &body, true, deadline)
            .await
            .map_err(Unanswered::into_error)?;
        if answer.nobody() {
            if link.options.guest.is_some() {
                return Err(Error::new(
                    ErrorKind::BrokerRefused,
                    "lanes cannot be claimed yet: the control plane makes the stream for that",
                ));
            }
            make_stream(link, deadline).await?;
            continue;
        }
        let value: Value = json_of(&answer)?;
        return match Refusal::of(&value) {
            None => Ok(value["seq"].as_u64()),
            Some(refusal) if WRONG_LAST_SEQUENCE.contains(&refusal.code) => {
                // One that was sent twice stands in its own way.
                let own = current(link, names, deadline).await?;
                Ok(own
                    .filter(|(_, other)| other == token)
                    .map(|(sequence, _)| sequence))
            }
            Some(refusal) => Err(refusal.into_error()),
        };
    }
}

/// Makes the stream of claims, from which each can be read by its subject alone.
pub(super) async fn make_stream(link: &Link, deadline: Deadline) -> Result<()> {
    let config = json!({
        "name": LANES,
        "description": "who attends which lane of wilco's",
        "subjects": ["wilco.lane.>"],
        "retention": "limits",
        "storage": "memory",
        "discard": "old",
        "max_msgs_per_subject": 1,
        "max_msgs": -1,
        "max_bytes": -1,
        "max_age": u64::try_from(CLAIM.as_nanos()).unwrap_or(u64::MAX),
        "num_replicas": link.options.replicas.unwrap_or(1),
        "allow_direct": true,
    });
    let verb = format!("STREAM.CREATE.{LANES}");
    match link.api(&verb, &config, deadline).await? {
        Ok(_) => Ok(()),
        // Made otherwise, by an earlier release perhaps.
        Err(refusal) if refusal.code == super::api::STREAM_EXISTS => {
            let verb = format!("STREAM.UPDATE.{LANES}");
            let updated = link.api(&verb, &config, deadline).await?;
            updated.map(drop).map_err(Refusal::into_error)
        }
        Err(refusal) => Err(refusal.into_error()),
    }
}

async fn unclaim(link: &Link, claim: u64) {
    let body = json!({ "seq": claim, "no_erase": true });
    let verb = format!("STREAM.MSG.DELETE.{LANES}");
    if let Err(error) = link.api(&verb, &body, Deadline::after(PATIENCE)).await {
        tracing::debug!(%error, "a lane's claim is left to time");
    }
}

/// Takes in what is asked, says that the responder lives, renews its claim.
async fn listen(lane: Arc<Lane>, mut alive: Subscriber, mut questions: Subscriber) {
    let mut state = lane.link.state();
    let mut generation = state.borrow_and_update().generation;
    let mut renew = interval(RENEW);
    renew.reset();
    while !lane.left.load(Ordering::Acquire) {
        tokio::select! {
            Some(question) = questions.next() => {
                let is_probe =
                    question.headers.as_ref().is_some_and(|map| map.get(PROBE).is_some());
                if !is_probe {
                    lane.take_in(question);
                } else if let Some(reply) = question.reply {
                    let _ = lane.link.client.publish(reply, Bytes::new()).await;
                }
            }
            Some(question) = alive.next() => {
                if let Some(reply) = question.reply {
                    let _ = lane.link.client.publish(reply, Bytes::new()).await;
                }
            }
            _ = renew.tick() => lane.renew().await,
            _ = state.changed() => {
                let now = state.borrow_and_update().generation;
                if lane.link.is_revoked() {
                    lock(&lane.waiting).ended = Some(ErrorKind::AuthRefused);
                    lane.leave();
                } else if now != generation {
                    generation = now;
                    // The server may have started anew, and its memory with it.
                    lane.renew().await;
                }
            }
            () = lane.leave.notified() => {}
        }
    }
    // Whoever asked while the server did not know yet is told so (law R2).
    // Why it ended stays there, for who looks after this.
    let waiting = std::mem::take(&mut lock(&lane.waiting).questions);
    for question in waiting {
        tell_nobody(&lane.link, question).await;
    }
    let until = Instant::now() + LINGER;
    while let Ok(Some(question)) = tokio::time::timeout_at(until, questions.next()).await {
        tell_nobody(&lane.link, question).await;
    }
    drop((questions, alive));
    let claim = *lock(&lane.claim);
    lane.unclaim(claim).await;
    lane.over.send_replace(true);
}

async fn tell_nobody(link: &Link, question: Raw) {
    if let Some(reply) = question.reply {
        let mut headers = HeaderMap::new();
        headers.insert(NOBODY, "1");
        let _ = link
            .client
            .publish_with_headers(reply, headers, Bytes::new())
            .await;
    }
}

impl Lane {
    fn take_in(&self, question: Raw) {
        let mut waiting = lock(&self.waiting);
        waiting.bytes += question.payload.len();
        waiting.questions.push_back(question);
        while waiting.questions.len() > MAX_WAITING || waiting.bytes > MAX_WAITING_BYTES {
            let Some(oldest) = waiting.questions.pop_front() else {
                break;
            };
            waiting.bytes -= oldest.payload.len();
        }
        drop(waiting);
        self.arrived.notify_one();
    }

    async fn renew(&self) {
        let deadline = Deadline::after(self.link.options.takeover);
        let claim = *lock(&self.claim);
        let mut renewed = put(&self.link, &self.names, &self.token, claim, deadline).await;
        if matches!(renewed, Ok(None))
            && matches!(current(&self.link, &self.names, deadline).await, Ok(None))
        {
            // It was forgotten, not taken.
            renewed = put(&self.link, &self.names, &self.token, 0, deadline).await;
        }
        match renewed {
            Ok(Some(sequence)) => *lock(&self.claim) = sequence,
            Ok(None) => {
                lock(&self.waiting).ended = Some(ErrorKind::Conflict);
                self.leave();
            }
            // Tried again at the next beat.
            Err(error) => tracing::debug!(%error, "a lane's claim was not renewed"),
        }
    }

    async fn unclaim(&self, claim: u64) {
        if self.link.options.guest.is_none() {
            return unclaim(&self.link, claim).await;
        }
        let deadline = Deadline::after(PATIENCE);
        if let Err(error) = put(&self.link, &self.names, "", claim, deadline).await {
            tracing::debug!(%error, "a lane's claim is left to time");
        }
    }

    fn leave(&self) {
        self.left.store(true, Ordering::Release);
        self.leave.notify_one();
        self.arrived.notify_one();
    }

    pub(super) async fn detach(&self, deadline: Deadline) {
        self.leave();
        let mut over = self.over.subscribe();
        let _ = deadline
            .or_after(PATIENCE)
            .bound(over.wait_for(|over| *over))
            .await;
    }
}

/// The responder that a user has.
#[derive(Debug)]
struct Attending {
    lane: Arc<Lane>,
}

impl Drop for Attending {
    fn drop(&mut self) {
        self.lane.leave();
    }
}

#[async_trait]
impl Responder for Attending {
    async fn next(&mut self) -> Result<Request> {
        loop {
            let arrived = self.lane.arrived.notified();
            {
                let mut waiting = lock(&self.lane.waiting);
                if let Some(kind) = &waiting.ended {
                    return Err(match kind {
                        ErrorKind::AuthRefused => revoked(),
                        kind => Error::new(kind.clone(), "another responder took the lane over"),
                    });
                }
                if self.lane.left.load(Ordering::Acquire) {
                    return Err(closed());
                }
                if let Some(question) = waiting.questions.pop_front() {
                    waiting.bytes -= question.payload.len();
                    let Some(reply) = question.reply else {
                        continue;
                    };
                    let way = Way {
                        link: Arc::clone(&self.lane.link),
                        reply,
                    };
                    return Ok(Request::new(question.payload, Box::new(way)));
                }
            }
            arrived.await;
        }
    }
}

struct Way {
    link: Arc<Link>,
    reply: Subject,
}

impl std::fmt::Debug for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Way").finish_non_exhaustive()
    }
}

#[async_trait]
impl Reply for Way {
    async fn send(self: Box<Self>, body: Bytes, deadline: Deadline) -> Result<()> {
        if body.len() > MAX_REQUEST_BYTES {
            return Err(too_large(body.len()));
        }
        self.link.alive()?;
        let mut state = self.link.state();
        let connected = deadline
            .bound(state.wait_for(|state| state.connected))
            .await
            .is_ok();
        if !connected {
            return Err(unreachable(&self.link.options, "the connection was lost"));
        }
        deadline
            .bound(self.link.client.publish(self.reply.clone(), body))
            .await?
            .map_err(gone)
    }
}
