//! Questions to whoever is attached to a lane, and the answers to them.
//!
//! A question goes straight to the lane's queue, which exists exactly while somebody is attached: where
//! nobody is, the broker returns it. The answer comes over the exchange of replies to a queue of the
//! asker's own. It is not the client library's or the broker's "direct reply-to": that needs a right
//! with which a guest could write into every queue.

use std::{
    borrow::Cow,
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::StreamExt as _;
use lapin::{
    BasicProperties,
    options::{BasicConsumeOptions, QueueBindOptions},
    types::FieldTable,
};
use tokio::sync::oneshot;
use uuid::Uuid;

use super::{
    connection::{Core, REPLIES},
    fault::Fault,
    letter::{self, KEY},
    link::Wire,
    lock,
    lockqueue::try_exclusive,
    post::{Answer, Letter},
};
use crate::{deadline::Deadline, error::Result};

/// After this long without an answer it is looked whether anybody is attached still.
const LOOK_AFTER: Duration = Duration::from_millis(50);

/// How long an answer may take from one who is gone since.
const LAST_WORD: Duration = Duration::from_millis(100);

/// What a look is called; whoever is attached drops it.
pub(super) const LOOK: &str = "look";

type Waiting = Arc<Mutex<HashMap<u128, oneshot::Sender<Bytes>>>>;

/// The questions of this handle that wait for their answers.
#[derive(Debug, Default)]
pub(super) struct Askers {
    waiting: Waiting,
    /// The connection over which answers come.
    listening: AtomicU64,
    starting: tokio::sync::Mutex<()>,
}

/// What came of a question.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Answer(Bytes),
    /// Nobody is attached.
    Nobody,
    /// Somebody is, and did not answer by the deadline.
    Silent,
}

/// Asks, over as many connections as it takes until the deadline (law R7).
pub(super) async fn ask(
    core: &Core,
    lane: &str,
    kind: &str,
    body: Bytes,
    deadline: Deadline,
) -> Result<Asked> {
    loop {
        let wire = core.talk.wire(deadline).await?;
        let listening = deadline.bound(listen(core, &wire)).await?;
        if listening.is_err() {
            deadline
                .bound(tokio::time::sleep(super::connection::AGAIN))
                .await?;
            continue;
        }
        let (number, answer) = core.askers.expect();
        let _forget = Forget(core, number);
        let question = question(core, lane, kind, body.clone(), number, deadline);
        tokio::select! {
            biased;
            answer = answer => {
                if let Ok(answer) = answer {
                    return Ok(Asked::Answer(answer));
                }
            }
            asked = delivered(core, lane, question, deadline) => match asked {
                Some(asked) => return Ok(asked),
                None if deadline.has_passed() => {
                    return match core.post_obstacle() {
                        Some(obstacle) => Err(obstacle),
                        None => Ok(Asked::Silent),
                    };
                }
                None => {}
            },
            () = wire.until_dead() => {}
        }
    }
}

/// Whether anybody is attached to a lane, now.
pub(super) async fn is_attended(core: &Core, lane: &str, deadline: Deadline) -> Result<bool> {
    loop {
        let look = look(core, lane);
        match core.outbox.publish(look, deadline).await {
            Answer::Stored => return Ok(true),
            Answer::Returned => return Ok(false),
            Answer::Refused | Answer::Lost if !deadline.has_passed() => {}
            _ => return Err(core.post_obstacle().unwrap_or_else(super::late)),
        }
    }
}

/// Sends the question, and looks at times whether somebody is still there. `None`: it is not known
/// whether it arrived.
async fn delivered(core: &Core, lane: &str, question: Letter, deadline: Deadline) -> Option<Asked> {
    match core.outbox.publish(question, deadline).await {
        Answer::Stored => {}
        Answer::Returned => return Some(Asked::Nobody),
        _ => return None,
    }
    let mut pause = LOOK_AFTER;
    loop {
        if deadline.bound(tokio::time::sleep(pause)).await.is_err() {
            return Some(Asked::Silent);
        }
        pause *= 4;
        if core.outbox.publish(look(core, lane), deadline).await == Answer::Returned {
            // Its answer may have been its last word, and be on its way.
            let _ = deadline.bound(tokio::time::sleep(LAST_WORD)).await;
            return Some(Asked::Nobody);
        }
    }
}

fn question(
    core: &Core,
    lane: &str,
    kind: &str,
    body: Bytes,
    number: u128,
    deadline: Deadline,
) -> Letter {
    // Nobody waits for it after that, so it need not wait for anybody (law R5).
    let expires = deadline.remaining().as_millis().clamp(1, 86_400_000);
    let properties = addressed(core, kind, expires)
        .with_reply_to(core.id.as_str().into())
        .with_correlation_id(number.to_string().into());
    sealed(core, core.by_name(), lane.into(), true, properties, body)
}

fn look(core: &Core, lane: &str) -> Letter {
    let properties = addressed(core, LOOK, 1_000);
    sealed(
        core,
        core.by_name(),
        lane.into(),
        true,
        properties,
        Bytes::new(),
    )
}

/// The way back to an asker.
#[derive(Clone, Debug)]
pub(super) struct Back {
    lane: String,
    asker: String,
    number: String,
}

impl Back {
    pub(super) fn of(lane: &str, properties: &BasicProperties) -> Option<Self> {
        Some(Self {
            lane: lane.into(),
            asker: properties.reply_to().as_ref()?.to_string(),
            number: properties.correlation_id().as_ref()?.to_string(),
        })
    }

    /// The answer; whether anybody still waits for it is not known (law R6).
    pub(super) fn answer(self, core: &Core, body: Bytes) -> Letter {
        let properties = addressed(core, "answer", 60_000).with_correlation_id(self.number.into());
        let to = format!("{}.{}", self.lane, self.asker);
        sealed(core, REPLIES.into(), to, false, properties, body)
    }
}

fn addressed(_core: &Core, kind: &str, expires: u128) -> BasicProperties {
    BasicProperties::default()
        .with_type(kind.into())
        .with_expiration(expires.to_string().into())
}

fn sealed(
    core: &Core,
    exchange: Cow<'static, str>,
    to: String,
    mandatory: bool,
    properties: BasicProperties,
    body: Bytes,
) -> Letter {
    let key = core.copy_name();
    let mut table = FieldTable::default();
    table.insert(KEY.into(), letter::text(&key));
    Letter {
        exchange,
        to,
        mandatory,
        key,
        properties: properties.with_headers(table),
        body,
    }
}

impl Askers {
    /// A number that nobody guesses: a guest can send answers past the rights of its credential in old
    /// versions of the broker, and must not hit a question that another guest was asked (law S1).
    fn expect(&self) -> (u128, oneshot::Receiver<Bytes>) {
        let number = Uuid::new_v4().as_u128();
        let (sender, receiver) = oneshot::channel();
        lock(&self.waiting).insert(number, sender);
        (number, receiver)
    }
}

/// A question that is over leaves nothing behind (law R5).
struct Forget<'a>(&'a Core, u128);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(&self.0.askers.waiting).remove(&self.1);
    }
}

/// Sees to it that answers come over this connection.
async fn listen(core: &Core, wire: &Arc<Wire>) -> Result<(), Fault> {
    let askers = &core.askers;
    if askers.listening.load(Ordering::Acquire) == wire.generation {
        return Ok(());
    }
    let _starting = askers.starting.lock().await;
    if askers.listening.load(Ordering::Acquire) == wire.generation {
        return Ok(());
    }
    // A guest's credential lets it listen to what its own lanes answer, and to nothing else.
    let (name, answers) = match &core.own {
        None => (format!("{REPLIES}.{}", core.id), format!("#.{}", core.id)),
        Some(own) => (
            format!("{own}.ask.{}", core.id),
            format!("{own}.#.{}", core.id),
        ),
    };
    let channel = try_exclusive(wire, &name)
        .await?
        .ok_or_else(|| Fault::Lost("the old connection's answers still have their queue".into()))?;
    channel
        .queue_bind(
            name.as_str().into(),
            REPLIES.into(),
            answers.into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await?;
    let options = BasicConsumeOptions {
        no_ack: true,
        ..BasicConsumeOptions::default()
    };
    let mut answers = channel
        .basic_consume(
            name.into(),
            "answers".into(),
            options,
            FieldTable::default(),
        )
        .await?;
    let waiting = Arc::clone(&askers.waiting);
    tokio::spawn(async move {
        let _channel = channel;
        while let Some(Ok(answer)) = answers.next().await {
            let number = answer.properties.correlation_id().as_ref();
            let number = number.and_then(|number| number.as_str().parse().ok());
            let asker = number.and_then(|number: u128| lock(&waiting).remove(&number));
            // Late and duplicate ones are dropped (law R5).
            if let Some(asker) = asker {
                let _ = asker.send(answer.data.into());
            }
        }
    });
    askers.listening.store(wire.generation, Ordering::Release);
    Ok(())
}
