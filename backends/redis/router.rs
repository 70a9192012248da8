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
    Notify,
    mpsc::{self, error::TrySendError},
    oneshot, watch,
};

use super::{connection::lock, requests::Asked};

/// What a handle listens to, over all its connections one after the other.
#[derive(Debug)]
pub(super) struct Router {
    channels: Mutex<HashMap<String, Ear>>,
    answers: Mutex<HashMap<u64, oneshot::Sender<Option<Bytes>>>>,
    next: AtomicU64,
    /// The channel on which this handle's answers come.
    pub(super) reply_channel: String,
    /// Questions for a lane that was left a moment ago: they are told so.
    strays: mpsc::Sender<Asked>,
}

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
    pub(super) fn new(reply_channel: String, strays: mpsc::Sender<Asked>) -> Self {
        Self {
            channels: Mutex::default(),
            answers: Mutex::default(),
            next: AtomicU64::new(1),
            reply_channel,
            strays,
        }
    }

    pub(super) fn listen(&self, channel: &str, ear: Ear) {
        lock(&self.channels).insert(channel.to_owned(), ear);
    }

    pub(super) fn forget(&self, channel: &str) {
        lock(&self.channels).remove(channel);
    }

    /// Waits for an answer under a new number; none is kept once the waiting is dropped (R5).
    pub(super) fn expect(self: &Arc<Self>) -> Expected {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        lock(&self.answers).insert(number, sender);
        Expected {
            router: Arc::clone(self),
            number,
            answer,
        }
    }

    fn message(&self, channel: &[u8], payload: Vec<u8>) {
        if channel == self.reply_channel.as_bytes() {
            if let Some((number, answer)) = read_answer(payload) {
                // Late or never asked: dropped (R5).
                let asker = lock(&self.answers).remove(&number);
                if let Some(asker) = asker {
                    let _ = asker.send(answer);
                }
            }
            return;
        }
        let Ok(channel) = std::str::from_utf8(channel) else {
            return;
        };
        let ear = lock(&self.channels).get(channel).cloned();
        match ear {
            Some(Ear::Wake(wake)) => wake.look(),
            Some(Ear::Lane(lane)) => {
                if let Some(asked) = Asked::read(payload)
                    && let Err(TrySendError::Closed(asked)) = lane.try_send(asked)
                {
                    let _ = self.strays.try_send(asked);
                }
            }
            None => {
                if let Some(asked) = Asked::read(payload) {
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
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
