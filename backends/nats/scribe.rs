//! Writing a consumer's notes, and looking whether the server still has it, for all who ask at once.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use serde_json::json;
use tokio::{
    sync::{mpsc, oneshot},
    time::sleep,
};

use super::{
    attach::still_there,
    closed,
    connection::lock,
    hold::{Hold, Inner, Phase, Settling},
    notes::{Mark, Notes, now_ms},
    settle,
};
use crate::{
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
};

/// The pause after a pull that failed while all is well otherwise.
const PAUSE: Duration = Duration::from_millis(100);

/// How long going takes at the most, with the server down too (law F8).
const GOING: Duration = Duration::from_secs(5);

/// What the scribe is to do before it answers.
pub(super) struct Order {
    write: bool,
    /// Look whether the server's consumer is there still: that is the answer then.
    look: bool,
    done: oneshot::Sender<Result<bool>>,
}

impl Hold {
    /// Whether the server's word that a message is settled counts: only if its consumer is there after it,
    /// since of one that was deleted meanwhile it confirms what it did not do (laws C4, Q6).
    pub(super) async fn believe(&self, deadline: Deadline) -> Result<()> {
        if self.insist(false, true, deadline).await? {
            return Ok(());
        }
        self.wake_up();
        Err(settle::unknown())
    }

    /// A message is settled for certain: it is held no more.
    ///
    /// Where the server would forget that when it is killed, it is noted first (law C2).
    pub(super) async fn settled(&self, sequence: u64, deadline: Deadline) -> Result<()> {
        let forgetful = !self.link.is_synced();
        {
            let mut inner = lock(&self.inner);
            inner.let_go(sequence);
            inner.marks.remove(&sequence);
            if forgetful {
                inner.settled.add(sequence);
            }
        }
        self.wake.notify_one();
        match forgetful {
            true => self.insist(true, false, deadline).await.map(drop),
            false => Ok(()),
        }
    }

    /// Orders again for as long as the caller has: the scribe gives up sooner, and an outage is no answer.
    async fn insist(&self, write: bool, look: bool, deadline: Deadline) -> Result<bool> {
        loop {
            match self.order(write, look, deadline).await {
                Err(error)
                    if is_outage(&error)
                        && !deadline.has_passed()
                        && !self.void.load(Ordering::Acquire) =>
                {
                    deadline.bound(sleep(PAUSE)).await?;
                }
                answer => return answer,
            }
        }
    }

    /// Writes the notes as they are now, or later.
    pub(super) async fn note(&self, deadline: Deadline) -> Result<()> {
        self.order(true, false, deadline).await.map(drop)
    }

    async fn order(&self, write: bool, look: bool, deadline: Deadline) -> Result<bool> {
        let (done, answer) = oneshot::channel();
        let order = Order { write, look, done };
        deadline
            .bound(self.scribe.send(order))
            .await?
            .map_err(|_| closed())?;
        deadline.bound(answer).await?.map_err(|_| closed())?
    }
}

impl Inner {
    /// The marks as they are noted. What is in hand of one that is attached is not counted yet: when that
    /// dies, its floor counts it. So there is nothing to note of what was handed out for the first time.
    fn marks_to_note(&self) -> BTreeMap<u64, Mark> {
        if self.phase != Phase::Attached {
            return self.marks.clone();
        }
        let now = now_ms();
        let noted = self.marks.iter().map(|(sequence, mark)| {
            let in_hand = self.held.get(sequence).is_some_and(|held| !held.returning);
            match in_hand && mark.due <= now {
                true => {
                    let (seen, due) = (mark.seen - 1, 0);
                    (*sequence, Mark { seen, due })
                }
                false => (*sequence, *mark),
            }
        });
        noted.filter(|(_, mark)| *mark != Mark::default()).collect()
    }
}

/// Writes the notes, and looks after the consumer, for all who asked meanwhile at once.
pub(super) async fn write_notes(
    hold: std::sync::Weak<Hold>,
    mut notes: Notes,
    mut orders: mpsc::Receiver<Order>,
) {
    let mut tidying: Option<tokio::task::JoinHandle<()>> = None;
    while let Some(order) = orders.recv().await {
        let mut all = vec![order];
        while let Ok(order) = orders.try_recv() {
            all.push(order);
        }
        let Some(hold) = hold.upgrade() else { return };
        let (is_write, is_look) = (
            all.iter().any(|order| order.write),
            all.iter().any(|order| order.look),
        );
        // At once: they are of different acknowledgements.
        let (written, seen) = tokio::join!(
            async {
                match is_write {
                    true => write(&hold, &mut notes).await,
                    false => Ok(()),
                }
            },
            async {
                match is_look {
                    true => look(&hold).await,
                    false => Ok(true),
                }
            }
        );
        for order in all {
            let answer = match (&written, &seen) {
                (Err(error), _) if order.write => Err(error),
                (_, Err(error)) if order.look => Err(error),
                (_, Ok(there)) if order.look => Ok(*there),
                _ => Ok(true),
            };
            let answer = answer
                .map_err(|error| Error::new(error.kind().clone(), error.message().to_owned()));
            let _ = order.done.send(answer);
        }
        // Not waited for: an old copy is in nobody's way, unless the queue takes one message only, and then
        // the writer takes it away.
        if let Some(old) = notes.take_old() {
            if let Some(tidying) = tidying.take() {
                let _ = tidying.await;
            }
            tidying = Some(tokio::spawn(tidy(Settling::begin(&hold), hold, old)));
        }
    }
}

async fn write(hold: &Hold, notes: &mut Notes) -> Result<()> {
    {
        let inner = lock(&hold.inner);
        notes.marks = inner.marks_to_note();
        notes.settled.clone_from(inner.settled.runs());
        if inner.phase != Phase::Attached {
            notes.holder = None;
            notes.consumer = inner.shared.then(|| hold.consumer.clone());
        }
    }
    let deadline = Deadline::after(GOING);
    notes.write(&hold.link, &hold.names, deadline).await?;
    if !hold.link.is_synced() {
        lock(&hold.inner).settled.wrote(notes.place());
    }
    Ok(())
}

/// Once only, and counted as a settlement, for which whoever deletes the queue waits: later it might be
/// another queue's message that has this place.
async fn tidy(_settling: Settling, hold: Arc<Hold>, old: u64) {
    let verb = format!("STREAM.MSG.DELETE.{}", hold.names.stream);
    let body = json!({ "seq": old, "no_erase": true });
    let deleted = hold.link.api_once(&verb, &body, Deadline::after(GOING));
    if let Err(error) = deleted.await {
        tracing::debug!(?error, "an old copy of the notes is left");
    }
}

async fn look(hold: &Hold) -> Result<bool> {
    let deadline = Deadline::after(GOING);
    still_there(&hold.link, &hold.names, &hold.consumer, deadline).await
}

fn is_outage(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::BrokerUnreachable | ErrorKind::DeadlineExceeded
    )
}
