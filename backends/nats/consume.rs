//! A queue's one consumer, as its user has it.
//!
//! Three tasks of its own serve it, so that no dropped future leaves anything half done (law P5): one
//! pulls and gives back (`pull`, `leave`), one keeps the leases and says that it lives (`keep`), one writes
//! the notes (`scribe`). What they share is its `hold`.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, atomic::AtomicBool},
    time::Duration,
};

use async_nats::Subscriber;
use async_trait::async_trait;
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    time::Instant,
};

use super::{
    attach::attach,
    closed,
    connection::{Link, gone, lock, revoked},
    hold::{Hold, Inner, Phase},
    keep,
    names::{Names, token},
    notes::now_ms,
    pull, scribe,
    settle::Lease,
    settled::Settled,
    trays,
};
use crate::{
    broker::{ConsumeOptions, Consumer, Delivery},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    names::QueueName,
};

pub(super) async fn consume(
    link: &Arc<Link>,
    queue: &QueueName,
    options: ConsumeOptions,
    deadline: Deadline,
) -> Result<Box<dyn Consumer>> {
    link.alive()?;
    let (sender, answer) = oneshot::channel();
    let (link, queue) = (Arc::clone(link), queue.clone());
    tokio::spawn(async move {
        let consumer = begin(link, &queue, options, deadline).await;
        // Whoever was dropped meanwhile does not take it, and with it what was attached goes again.
        let _ = sender.send(consumer);
    });
    let consumer = deadline.bound(answer).await?.map_err(|_| closed())??;
    Ok(Box::new(consumer))
}

async fn begin(
    link: Arc<Link>,
    queue: &QueueName,
    options: ConsumeOptions,
    deadline: Deadline,
) -> Result<Attending> {
    let names = Names::of(queue);
    let stream = link.queue(&names, deadline).await?;
    let limit = stream.spec(queue)?.delivery_limit;
    let made = stream
        .description()
        .map(|description| description.made)
        .unwrap_or_default();
    let token = token();
    let inbox = link.client.new_inbox();
    let subscribe = async |subject: String| -> Result<Subscriber> {
        deadline
            .bound(link.client.subscribe(subject))
            .await?
            .map_err(gone)
    };
    let alive = subscribe(names.hold(&token)).await?;
    let arrivals = subscribe(format!("{inbox}.*")).await?;
    let first = stream.first();
    let attached = attach(&link, &names, &token, &made, first, deadline).await?;
    let (scribe, orders) = mpsc::channel(64);
    let prefetch = usize::try_from(options.prefetch.get()).unwrap_or(usize::MAX);
    let mut notes = attached.notes;
    let now = (Instant::now(), now_ms());
    let delayed = notes.marks.iter().filter(|(_, mark)| mark.due > now.1);
    let inner = Inner {
        phase: Phase::Attached,
        buffer: VecDeque::new(),
        held: HashMap::new(),
        confirmed: 0,
        loose: Vec::new(),
        delayed: delayed
            .map(|(sequence, mark)| (*sequence, now.0 + Duration::from_millis(mark.due - now.1)))
            .collect(),
        marks: std::mem::take(&mut notes.marks),
        floors: notes.floors.clone(),
        settled: Settled::new(notes.settled.clone(), notes.place()),
        kept: now.0,
        shared: false,
        suspicious: false,
        pulls: VecDeque::new(),
    };
    let hold = Arc::new(Hold {
        names,
        token,
        consumer: attached.consumer,
        made,
        limit: limit.get(),
        prefetch,
        inner: Mutex::new(inner),
        wake: Notify::new(),
        arrived: Notify::new(),
        void: AtomicBool::new(false),
        hush: Notify::new(),
        deaf: watch::Sender::new(false),
        gone: watch::Sender::new(false),
        settling: watch::Sender::new(0),
        scribe,
        link,
    });
    hold.link.remember_hold(&hold);
    tokio::spawn(keep::keep(Arc::clone(&hold), alive, attached.asked));
    tokio::spawn(scribe::write_notes(Arc::downgrade(&hold), notes, orders));
    tokio::spawn(pull::run(Arc::clone(&hold), arrivals, inbox));
    if !queue.is_commands() {
        tokio::spawn(trays::collect(Arc::downgrade(&hold), queue.clone()));
    }
    if hold.link.alive().is_err() {
        hold.release(true);
        return Err(closed());
    }
    Ok(Attending { hold })
}

/// The consumer that a user has.
#[derive(Debug)]
struct Attending {
    hold: Arc<Hold>,
}

#[async_trait]
impl Consumer for Attending {
    async fn next(&mut self) -> Result<Delivery> {
        loop {
            let arrived = self.hold.arrived.notified();
            {
                let mut inner = lock(&self.hold.inner);
                match &inner.phase {
                    Phase::Attached => {}
                    Phase::Leaving(_) | Phase::Left => return Err(closed()),
                    Phase::Ended(kind) => return Err(ended(kind)),
                }
                if let Some(mut received) = inner.buffer.pop_front() {
                    let attempt = inner.hand_out(&received);
                    drop(inner);
                    received.attempt = attempt;
                    let message = received.message();
                    let lease = Lease::new(Arc::clone(&self.hold), received);
                    return Ok(Delivery::new(message, attempt, Box::new(lease)));
                }
            }
            arrived.await;
        }
    }

    async fn close(self: Box<Self>, deadline: Deadline) -> Result<()> {
        self.hold.release(false);
        self.hold.until_gone(deadline).await
    }
}

impl Drop for Attending {
    fn drop(&mut self) {
        self.hold.release(false);
    }
}

fn ended(kind: &ErrorKind) -> Error {
    let text = match kind {
        ErrorKind::AuthRefused => return revoked(),
        ErrorKind::QueueDeleted => "the queue was deleted",
        ErrorKind::Conflict => "another consumer took over while this one was cut off",
        _ => "the consumer ended",
    };
    Error::new(kind.clone(), text)
}
