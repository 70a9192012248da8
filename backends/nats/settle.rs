//! How a delivery ends, each step confirmed by the server.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep},
};

use super::{
    attach::{delivered, still_there},
    closed,
    connection::{Link, Unanswered, lock},
    dead,
    hold::{Hold, Phase, Settling},
    notes::now_ms,
    received::{Received, place},
};
use crate::{
    broker::{Lease as LeaseTrait, Settlement},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
};

/// After this long without a word it is looked whether the server's consumer is still there: one that is
/// deleted with an acknowledgement on its way never answers it.
const PATIENCE: Duration = Duration::from_secs(1);

const PAUSE: Duration = Duration::from_millis(50);

/// How long giving back is tried before the lease is left to run out.
const GIVING_BACK: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Lease {
    hold: Arc<Hold>,
    received: Option<Received>,
}

impl Lease {
    pub(super) fn new(hold: Arc<Hold>, received: Received) -> Self {
        Self {
            hold,
            received: Some(received),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(received) = self.received.take() {
            let mut inner = lock(&self.hold.inner);
            // Not held any more: it was settled, or given back with its consumer.
            if let Some(held) = inner.held.get_mut(&received.sequence) {
                held.live = false;
                inner.loose.push(received);
            }
            drop(inner);
            self.hold.wake.notify_one();
        }
    }
}

#[async_trait]
impl LeaseTrait for Lease {
    async fn settle(mut self: Box<Self>, settlement: Settlement, deadline: Deadline) -> Result<()> {
        // Counted before it looks, so that whoever stops it either sees it or is seen.
        let settling = Settling::begin(&self.hold);
        self.hold.may_settle()?;
        if deadline.has_passed() {
            return Err(Error::new(
                ErrorKind::DeadlineExceeded,
                "the deadline passed first",
            ));
        }
        let Some(received) = self.received.as_ref() else {
            return Err(lost());
        };
        let how = match settlement {
            Settlement::Ack => {
                // In the caller's own time: dropped early, it may have been done, and is given back.
                confirm(&self.hold, received.reply(), "+ACK", deadline).await?;
                self.hold.confirmed(received.sequence);
                self.hold.believe(deadline).await?;
                let sequence = received.sequence;
                self.received = None;
                return self.hold.settled(sequence, deadline).await;
            }
            other => other,
        };
        // Several steps: they are finished whatever becomes of the caller.
        let (sender, answer) = oneshot::channel();
        let Some(received) = self.received.take() else {
            return Err(lost());
        };
        let hold = Arc::clone(&self.hold);
        tokio::spawn(async move {
            let _settling = settling;
            let done = match how {
                Settlement::Retry(delay) => retry(&hold, &received, delay, deadline).await,
                Settlement::DeadLetter(reason) => bury(&hold, &received, &reason, deadline).await,
                Settlement::Ack => Ok(()),
            };
            if done.is_err() {
                drop(Lease::new(hold, received));
            }
            let _ = sender.send(done);
        });
        deadline.bound(answer).await?.map_err(|_| closed())?
    }
}

pub(super) fn lost() -> Error {
    Error::new(
        ErrorKind::LeaseLost,
        "the delivery is no longer this handle's to settle",
    )
}

impl Hold {
    /// A message goes back to the server, or does not after all.
    fn returning(&self, sequence: u64, whether: bool) {
        if let Some(held) = lock(&self.inner).held.get_mut(&sequence) {
            held.returning = whether;
        }
    }

    /// It is back, unless it came again already.
    fn returned(&self, sequence: u64) {
        let mut inner = lock(&self.inner);
        if inner.held.get(&sequence).is_some_and(|held| held.returning) {
            inner.let_go(sequence);
        }
        drop(inner);
        self.wake.notify_one();
    }

    /// Fails where another may have what this one held (law C4).
    fn may_settle(&self) -> Result<()> {
        if self.void.load(Ordering::Acquire) {
            return Err(lost());
        }
        let inner = lock(&self.inner);
        // Its consumer left, and the next one shares the server's with it: what was not kept in time was
        // delivered there.
        if inner.phase == Phase::Left && inner.kept.elapsed() > self.link.options.takeover * 3 / 4 {
            return Err(lost());
        }
        Ok(())
    }
}

/// Tells the server something of a delivery and waits for its confirm.
pub(super) async fn tell(link: &Link, reply: &str, what: Bytes, deadline: Deadline) -> Result<()> {
    let answer = link.call(reply, None, &what, true, deadline).await;
    answer.map(drop).map_err(Unanswered::into_error)
}

/// The same, until it is confirmed or known to be too late. Sent again, it is confirmed by whichever answer
/// comes first: on a machine that is starved every one of them is late.
async fn confirm(hold: &Hold, reply: &str, what: &str, deadline: Deadline) -> Result<()> {
    let body = Bytes::copy_from_slice(what.as_bytes());
    let send = || hold.link.call(reply, None, &body, true, deadline);
    let mut sent = FuturesUnordered::from_iter([send()]);
    let mut times = 1;
    loop {
        tokio::select! {
            biased;
            Some(answer) = sent.next() => match answer {
                Ok(answer) if !answer.nobody() => return Ok(()),
                Ok(answer) => {
                    let first = answer.first && times == 1;
                    if !still_there(&hold.link, &hold.names, &hold.consumer, deadline).await? {
                        // For good, or only for this one of them: `next` is to know too.
                        hold.wake_up();
                        // One that was sent before may have come in time.
                        return Err(if first { lost() } else { unknown() });
                    }
                    deadline.bound(sleep(PAUSE)).await?;
                }
                Err(error) => return Err(error.into_error()),
            },
            doubted = doubt(hold, reply, deadline) => doubted?,
        }
        sent.push(send());
        times += 1;
    }
}

/// Ends after a while, if there may be an answer still, and with an error if there is none to come.
async fn doubt(hold: &Hold, reply: &str, deadline: Deadline) -> Result<()> {
    loop {
        sleep(PATIENCE).await;
        if hold.link.is_connected() {
            break;
        }
    }
    match delivered(&hold.link, &hold.names, &hold.consumer, deadline).await? {
        None => Err(unknown()),
        // It was killed and knows of no such delivery: it will deliver again, and says nothing to what is
        // acknowledged before that.
        Some(last) if place(reply).is_some_and(|sequence| sequence > last) => Err(lost()),
        Some(_) => Ok(()),
    }
}

pub(super) fn unknown() -> Error {
    Error::new(
        ErrorKind::BrokerUnreachable,
        "the acknowledgement was sent and not confirmed: the message may come again",
    )
}

async fn retry(
    hold: &Arc<Hold>,
    received: &Received,
    delay: Duration,
    deadline: Deadline,
) -> Result<()> {
    if received.attempt >= hold.limit {
        return bury(hold, received, &over(hold.limit), deadline).await;
    }
    let millis = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
    if delay > Duration::ZERO {
        {
            let mut inner = lock(&hold.inner);
            let mark = inner.marks.entry(received.sequence).or_default();
            mark.due = now_ms().saturating_add(millis);
        }
        // Noted before it goes back, so that no crash shortens the delay (law C6).
        hold.note(deadline).await?;
    }
    let nanos = u64::try_from(delay.as_nanos())
        .unwrap_or(u64::MAX / 2)
        .min(u64::MAX / 2);
    let what = match nanos {
        0 => "-NAK".to_owned(),
        nanos => format!("-NAK {{\"delay\":{nanos}}}"),
    };
    let due = Instant::now() + delay.min(Duration::from_secs(100 * 365 * 24 * 3600));
    // Before the answer: a short delay may be over by then.
    if nanos > 0 {
        lock(&hold.inner).delayed.insert(received.sequence, due);
    }
    hold.returning(received.sequence, true);
    let told = confirm(hold, received.reply(), &what, deadline).await;
    if told.is_ok() {
        hold.returned(received.sequence);
    } else {
        hold.returning(received.sequence, false);
        let mut inner = lock(&hold.inner);
        inner.delayed.remove(&received.sequence);
        if let Some(mark) = inner.marks.get_mut(&received.sequence) {
            mark.due = 0;
        }
    }
    told
}

fn over(limit: u32) -> String {
    format!("delivered {limit} times without an end: the delivery limit")
}

/// Stores a dead letter, then takes the message out of the queue (law C7). One that does not live to do
/// the second leaves both, and whoever receives the message again finds the letter.
async fn bury(
    hold: &Arc<Hold>,
    received: &Received,
    reason: &str,
    deadline: Deadline,
) -> Result<()> {
    // Is it still this one's? A letter of a message that another has would be one too many.
    confirm(hold, received.reply(), "+WPI", deadline).await?;
    let (message, attempts) = (received.message(), received.attempt.min(hold.limit));
    let (link, names, sequence) = (&hold.link, &hold.names, received.sequence);
    dead::store(link, names, sequence, &message, reason, attempts, deadline).await?;
    confirm(hold, received.reply(), "+TERM", deadline).await?;
    hold.believe(deadline).await?;
    hold.settled(received.sequence, deadline).await
}

/// Ends one that was settled before, which the server forgot when it was killed.
pub(super) async fn end(hold: &Arc<Hold>, received: &Received) {
    let deadline = Deadline::after(hold.link.options.takeover);
    if let Err(error) = confirm(hold, received.reply(), "+TERM", deadline).await {
        tracing::debug!(%error, "a delivery that was settled before comes once more");
    }
}

/// Gives back what was dropped: it comes again, counted, or has been delivered often enough.
pub(super) async fn give_back(hold: &Arc<Hold>, received: &Received) {
    let deadline = Deadline::after(GIVING_BACK);
    let _settling = Settling::begin(hold);
    let given = if received.attempt >= hold.limit {
        bury(hold, received, &over(hold.limit), deadline).await
    } else {
        hold.returning(received.sequence, true);
        confirm(hold, received.reply(), "-NAK", deadline).await
    };
    if let Err(error) = given {
        // Its lease runs out by itself, since nobody keeps what is on its way back.
        tracing::debug!(%error, "a delivery was not given back");
        hold.returning(received.sequence, true);
    }
    hold.returned(received.sequence);
}

/// Sends one back that came before its time, uncounted.
pub(super) async fn put_off(hold: &Arc<Hold>, received: &Received, rest: Duration) {
    lock(&hold.inner)
        .delayed
        .insert(received.sequence, Instant::now() + rest);
    let what = format!("-NAK {{\"delay\":{}}}", rest.as_nanos());
    let deadline = Deadline::after(hold.link.options.takeover);
    if let Err(error) = confirm(hold, received.reply(), &what, deadline).await {
        tracing::debug!(%error, "a delivery that came early was not sent back");
    }
}

/// Whether this one was buried by a consumer that did not live to take it out of the queue. It is taken
/// out now.
pub(super) async fn is_dead_already(hold: &Arc<Hold>, received: &Received) -> bool {
    let deadline = Deadline::after(hold.link.options.takeover);
    let subject = hold.names.dead(received.sequence);
    match hold.link.last(&hold.names, &subject, deadline).await {
        Ok(Some(_)) => confirm(hold, received.reply(), "+TERM", deadline)
            .await
            .is_ok(),
        _ => false,
    }
}
