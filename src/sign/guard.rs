//! The guest's side: whose word it takes, and what time it is by that word.

use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;

use super::{
    form::{self, AskSignature, Stamp},
    keys::Trust,
};
use crate::{message::Message, names::GuestAddress, wire::RemoteError};

/// Lets through what is signed by a trusted key.
#[derive(Debug)]
pub(crate) struct Guard {
    trust: Trust,
    /// The latest time that was told, and when. From a question: those are new, as commands need not be.
    told: watch::Sender<Option<(u64, Instant)>>,
}

/// Whether a signed command comes in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Time {
    /// It may be run.
    Valid,
    /// It may not be run any more.
    Expired,
    /// By this machine's clock it has expired, and nobody has told the time yet (case W34).
    Unknown,
}

impl Guard {
    pub(crate) fn new(trust: Trust) -> Self {
        let told = watch::Sender::new(None);
        Self { trust, told }
    }

    /// Whether a command is as a trusted key signed it for this machine.
    pub(crate) fn check(
        &self,
        to: &GuestAddress,
        message: &Message,
        wire: u32,
    ) -> Result<Stamp, RemoteError> {
        let Some((stamp, signature)) = form::signature_of(message) else {
            return Err(unsigned());
        };
        let bytes = form::command(to, message, &stamp, wire);
        self.verify(&stamp, &bytes, signature)?;
        Ok(stamp)
    }

    /// Whether a question is as a trusted key signed it for this machine, and in time.
    pub(crate) fn check_ask(
        &self,
        to: &GuestAddress,
        ask: &str,
        signature: Option<&AskSignature>,
        wire: u32,
    ) -> Result<(), RemoteError> {
        let signature = signature.ok_or_else(unsigned)?;
        let stamp = signature.stamp();
        let bytes = form::ask(to, ask, &stamp, wire);
        self.verify(&stamp, &bytes, signature.signature())?;
        self.learn(stamp.issued_ms);
        match self.time(&stamp) {
            Time::Expired => Err(expired()),
            Time::Valid | Time::Unknown => Ok(()),
        }
    }

    fn verify(&self, stamp: &Stamp, bytes: &[u8], signature: &str) -> Result<(), RemoteError> {
        let key = self.trust.key(&stamp.key).ok_or_else(|| {
            RemoteError::new(
                "unknown_key",
                format!("signed by key {}, which is not trusted here", stamp.key),
            )
        })?;
        if key.verifies(bytes, signature) {
            return Ok(());
        }
        Err(RemoteError::new(
            "forged",
            format!("not what key {} has signed for this machine", stamp.key),
        ))
    }

    /// Whether a command that is new here comes in time.
    pub(crate) fn time(&self, stamp: &Stamp) -> Time {
        self.time_by(stamp, own_clock_ms())
    }

    fn time_by(&self, stamp: &Stamp, own_ms: u64) -> Time {
        let last = stamp.expires_ms.saturating_add(self.trust.tolerance_ms());
        match self.told_ms() {
            Some(now) if now > last => Time::Expired,
            None if own_ms > last => Time::Unknown,
            _ => Time::Valid,
        }
    }

    /// It was this late at least when that was signed: an old message cannot turn the time back.
    fn learn(&self, issued_ms: u64) {
        let now = Instant::now();
        self.told.send_if_modified(|told| {
            let is_news = told.is_none_or(|(ms, at)| issued_ms > later(ms, now - at));
            if is_news {
                *told = Some((issued_ms, now));
            }
            is_news
        });
    }

    fn told_ms(&self) -> Option<u64> {
        self.told.borrow().map(|(ms, at)| later(ms, at.elapsed()))
    }

    /// Waits until somebody trusted has told the time.
    pub(crate) async fn time_told(&self) {
        // It lives as long as this does.
        let _ = self.told.subscribe().wait_for(Option::is_some).await;
    }
}

fn later(ms: u64, by: Duration) -> u64 {
    ms.saturating_add(u64::try_from(by.as_millis()).unwrap_or(u64::MAX))
}

fn own_clock_ms() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| later(0, since))
}

fn unsigned() -> RemoteError {
    RemoteError::new(
        "unsigned",
        "not signed, and this guest runs only what a trusted key has signed",
    )
}

pub(crate) fn expired() -> RemoteError {
    RemoteError::new("expired", "signed for a time that has passed")
}
