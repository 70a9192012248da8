//! Where what the server pushes goes: wakes to consumers, questions to lanes, answers to their askers.
//!
//! The client hands pushes over from within its own task, so nothing here waits: what has no room is
//! dropped, as pub/sub may drop it anyway.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use redis::{
    PushInfo, PushKind, Value,
    aio::{AsyncPushSender, SendError},
};
use tokio::sync::{
    Notify, broadcast,
    mpsc::{self, error::TrySendError},
    oneshot, watch,
};

use uuid::Uuid;

use super::{connection::lock, requests::Asked, scripts};
use crate::names::QueueName;

/// What a handle listens to, over all its connections one after the other.
#[derive(Debug)]
pub(super) struct Router {
    channels: Mutex<HashMap<String, Ear>>,
    answers: Mutex<HashMap<u64, Asker>>,
    next: AtomicU64,
    /// What the channels end with on which this handle's answers come, one for each lane.
    answers_to: String,
    /// Whose tray has something in it.
    pub(super) trays: broadcast::Sender<QueueName>,
    /// Questions for a lane that was left a moment ago: they are told so.
    strays: mpsc::Sender<Asked>,
}

/// Who waits for an answer, and the channel on which it may come: a guest answers for itself alone (S1).
#[derive(Debug)]
struct Asker {
    channel: String,
    answer: oneshot::Sender<Option<Bytes>>,
}

/// How many trays are remembered until they are looked into; with more, all are.
const TRAYS: usize = 1024;

#[derive(Clone, Debug)]
pub(super) enum Ear {
    Wake(Arc<Wake>),
    Lane(mpsc::Sender<Asked>),
}

/// Tells a consumer's task that there may be something to do.
#[derive(Debug, Default)]
pub(super) struct Wake {
    look: AtomicBool,
    pub(super) work: Notify,
}

impl Wake {
    /// There may be messages.
    pub(super) fn look(&self) {
        self.look.store(true, Ordering::Release);
        self.work.notify_one();
    }

    /// Whether there may be messages; asked once.
    pub(super) fn take_look(&self) -> bool {
        self.look.swap(false, Ordering::AcqRel)
    }
}

impl Router {
    pub(super) fn new(strays: mpsc::Sender<Asked>) -> Self {
        Self {
            channels: Mutex::default(),
            answers: Mutex::default(),
            next: AtomicU64::new(1),
            answers_to: format!("reply:{}", Uuid::new_v4().simple()),
            trays: broadcast::Sender::new(TRAYS),
            strays,
        }
    }

    pub(super) fn listen(&self, channel: &str, ear: Ear) {
        lock(&self.channels).insert(channel.to_owned(), ear);
    }

    pub(super) fn forget(&self, channel: &str) {
        lock(&self.channels).remove(channel);
    }

    /// The channels on which this handle's answers come, as one pattern.
    pub(super) fn answers(&self) -> String {
        scripts::everywhere(&self.answers_to)
    }

    /// Waits for an answer under a new number; none is kept once the waiting is dropped (R5).
    pub(super) fn expect(self: &Arc<Self>, lane: &QueueName) -> Expected {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        let channel = scripts::key(lane, &self.answers_to);
        let asker = Asker {
            channel: channel.clone(),
            answer: sender,
        };
        lock(&self.answers).insert(number, asker);
        Expected {
            router: Arc::clone(self),
            number,
            channel,
            answer,
        }
    }

    /// What came by a pattern: an answer, or word of a tray.
    fn matched(&self, channel: &str, payload: Vec<u8>) {
        if channel.ends_with(&self.answers_to) {
            if let Some((number, answer)) = read_answer(payload) {
                let mut answers = lock(&self.answers);
                // Late, never asked, or not by whom was asked: dropped (R5).
                let is_asked = |asker: &Asker| asker.channel == channel;
                if answers.get(&number).is_some_and(is_asked)
                    && let Some(asker) = answers.remove(&number)
                {
                    let _ = asker.answer.send(answer);
                }
            }
        } else if let Some(queue) = scripts::queue_of(channel, scripts::TRAY) {
            // Nobody may listen: then nobody needs to know.
            let _ = self.trays.send(queue);
        }
    }

    fn message(&self, channel: &[u8], payload: Vec<u8>) {
        let Ok(channel) = std::str::from_utf8(channel) else {
            return;
        };
        let ear = lock(&self.channels).get(channel).cloned();
        // What all channels of a queue begin with.
        let of = channel.split_inclusive("}:").next().unwrap_or_default();
        match ear {
            Some(Ear::Wake(wake)) => wake.look(),
            Some(Ear::Lane(lane)) => {
                if let Some(asked) = Asked::read(of, payload)
                    && let Err(TrySendError::Closed(asked)) = lane.try_send(asked)
                {
                    let _ = self.strays.try_send(asked);
                }
            }
            None => {
                if let Some(asked) = Asked::read(of, payload) {
                    let _ = self.strays.try_send(asked);
                }
            }
        }
    }
}

/// An answer as it travels: its number, `a` for an answer or `n` for nobody, a line's end, the body.
fn read_answer(payload: Vec<u8>) -> Option<(u64, Option<Bytes>)> {
    let end = payload.iter().take(32).position(|byte| *byte == b'\n')?;
    let (number, what) = std::str::from_utf8(&payload[..end]).ok()?.split_once(' ')?;
    let number = number.parse().ok()?;
    let is_answer = what == "a";
    let body = Bytes::from(payload).split_off(end + 1);
    Some((number, is_answer.then_some(body)))
}

/// One question that waits for its answer.
pub(super) struct Expected {
    router: Arc<Router>,
    pub(super) number: u64,
    /// Where it comes.
    pub(super) channel: String,
    /// None: whoever heard it serves the lane no more.
    pub(super) answer: oneshot::Receiver<Option<Bytes>>,
}

impl Drop for Expected {
    fn drop(&mut self) {
        lock(&self.router.answers).remove(&self.number);
    }
}

/// One connection's way into the router.
pub(super) struct Pushes {
    pub(super) router: Arc<Router>,
    pub(super) lost: watch::Sender<bool>,
}

impl AsyncPushSender for Pushes {
    fn send(&self, info: PushInfo) -> Result<(), SendError> {
        match info.kind {
            PushKind::Disconnection => {
                self.lost.send_replace(true);
            }
            PushKind::Message | PushKind::SMessage => {
                let mut data = info.data.into_iter();
                if let (Some(Value::BulkString(channel)), Some(Value::BulkString(payload))) =
                    (data.next(), data.next())
                {
                    self.router.message(&channel, payload);
                }
            }
            PushKind::PMessage => {
                let mut data = info.data.into_iter().skip(1);
                if let (Some(Value::BulkString(channel)), Some(Value::BulkString(payload))) =
                    (data.next(), data.next())
                    && let Ok(channel) = std::str::from_utf8(&channel)
                {
                    self.router.matched(channel, payload);
                }
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s1_a_guest_answers_for_itself_alone() {
        let (strays, _) = mpsc::channel(1);
        let router = Arc::new(Router::new(strays));
        let (a, b) = ("wilco.q.a.1", "wilco.q.b.1");
        let mut expected = router.expect(&b.parse().unwrap());
        let answer = format!("{} a\nx", expected.number).into_bytes();
        let own = expected.channel.clone();
        router.matched(&own.replace(b, a), answer.clone());
        assert!(expected.answer.try_recv().is_err());
        router.matched(&own, answer);
        let answer = expected.answer.try_recv().unwrap();
        assert_eq!(answer.as_deref(), Some(&b"x"[..]));
    }

    #[test]
    fn s2_hostile_answers_are_dropped() {
        for bytes in [
            "",
            "\n",
            "1\nx",
            "x a\n",
            "-1 a\n",
            "99999999999999999999 a\n",
        ] {
            assert!(read_answer(bytes.into()).is_none(), "{bytes:?}");
        }
        let (number, body) = read_answer(b"7 a\nx\ny".to_vec()).unwrap();
        assert_eq!((number, body.as_deref()), (7, Some(&b"x\ny"[..])));
        assert_eq!(read_answer(b"7 n\n".to_vec()), Some((7, None)));
    }
}
