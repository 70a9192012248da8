//! Publishing: windows of messages, each answered by its own name.
//!
//! The client mixes up which confirm a returned message belongs to, and which confirm a delivery tag
//! does when several tasks publish on one channel. So each channel has one owner, which sends a window,
//! waits for all its confirms, and matches the returned ones by the key that each message carries (law
//! P7). A broker returns a message before it confirms it: when all confirms are here, so are all returns.

use std::{
    borrow::Cow,
    collections::{HashSet, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use lapin::{
    BasicProperties, Channel, Confirmation,
    options::{BasicPublishOptions, ConfirmSelectOptions},
};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};

use super::{fault::Fault, letter, link::Wire, lock};
use crate::deadline::Deadline;

/// The most messages of one window.
const WINDOW: usize = 128;

/// How many windows are on their way at once. With few, a message that comes just after a window has left
/// waits for that whole window first: at 1,000 a second that took longer than all the rest of its way.
const CHANNELS: usize = 16;

/// How many messages wait at most; more wait outside, each until its deadline.
const WAITING: usize = 8 * 1024;

/// What is to be published.
#[derive(Debug)]
pub(super) struct Letter {
    pub(super) exchange: Cow<'static, str>,
    pub(super) to: String,
    pub(super) mandatory: bool,
    pub(super) key: String,
    pub(super) properties: BasicProperties,
    pub(super) body: Bytes,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Confirmed, and not returned.
    Stored,
    /// It went to no queue.
    Returned,
    /// The broker refused it and stored it nowhere.
    Refused,
    /// The connection broke after it had been handed over.
    Lost,
    /// The deadline passed before any of it left.
    NotSent,
    /// The deadline passed after it had been handed over.
    Late,
}

const WAITS: u8 = 0;
const SENT: u8 = 1;
const WITHDRAWN: u8 = 2;

/// Whether a message may still be withdrawn: its sender and its publisher agree on this alone.
#[derive(Clone, Debug, Default)]
pub(super) struct Ticket(Arc<AtomicU8>);

impl Ticket {
    /// From here on it may have been sent. False: it was withdrawn.
    pub(super) fn send(&self) -> bool {
        self.0
            .compare_exchange(WAITS, SENT, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// True: it never was sent, and never will be.
    pub(super) fn withdraw(&self) -> bool {
        self.0
            .compare_exchange(WAITS, WITHDRAWN, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    pub(super) fn is_withdrawn(&self) -> bool {
        self.0.load(Ordering::Acquire) == WITHDRAWN
    }

    /// It was not sent after all, and waits again.
    fn wait_again(&self) {
        self.0.store(WAITS, Ordering::Release);
    }
}

/// A message on its way to a publisher.
#[derive(Debug)]
pub(super) struct Job {
    letter: Letter,
    ticket: Ticket,
    answer: oneshot::Sender<Answer>,
    _room: OwnedSemaphorePermit,
}

/// What waits to be published. It outlives connections.
#[derive(Debug)]
pub(super) struct Outbox {
    jobs: Mutex<VecDeque<Job>>,
    news: Notify,
    room: Arc<Semaphore>,
}

impl Default for Outbox {
    fn default() -> Self {
        Self {
            jobs: Mutex::default(),
            news: Notify::new(),
            room: Arc::new(Semaphore::new(WAITING)),
        }
    }
}

impl Outbox {
    /// Publishes, and waits for what comes of it until the deadline.
    pub(super) async fn publish(&self, letter: Letter, deadline: Deadline) -> Answer {
        self.publish_as(letter, Ticket::default(), deadline).await
    }

    pub(super) async fn publish_as(
        &self,
        letter: Letter,
        ticket: Ticket,
        deadline: Deadline,
    ) -> Answer {
        let Ok(Ok(room)) = deadline.bound(Arc::clone(&self.room).acquire_owned()).await else {
            return Answer::NotSent;
        };
        let (answer, answered) = oneshot::channel();
        lock(&self.jobs).push_back(Job {
            letter,
            ticket: ticket.clone(),
            answer,
            _room: room,
        });
        // Whoever was done last: so there are as many channels as windows were ever on their way at once.
        self.news.notify_last();
        match deadline.bound(answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) if ticket.withdraw() || ticket.is_withdrawn() => Answer::NotSent,
            Ok(Err(_)) => Answer::Lost,
            Err(_) => Answer::Late,
        }
    }

    fn is_empty(&self) -> bool {
        lock(&self.jobs).is_empty()
    }

    /// The next window: what was withdrawn meanwhile is dropped.
    fn window(&self) -> Vec<Job> {
        let mut jobs = lock(&self.jobs);
        let mut window = Vec::new();
        while window.len() < WINDOW {
            match jobs.pop_front() {
                Some(job) if job.ticket.send() => window.push(job),
                Some(_) => {}
                None => break,
            }
        }
        if !jobs.is_empty() {
            self.news.notify_last();
        }
        window
    }

    fn put_back(&self, rest: impl DoubleEndedIterator<Item = Job>) {
        let mut jobs = lock(&self.jobs);
        for job in rest.rev() {
            job.ticket.wait_again();
            jobs.push_front(job);
        }
        self.news.notify_last();
    }

    /// Publishes what waits over this connection, until it breaks.
    pub(super) async fn serve(self: Arc<Self>, wire: Arc<Wire>) {
        let mut owners = tokio::task::JoinSet::new();
        for _ in 0..CHANNELS {
            owners.spawn(own(Arc::clone(&self), Arc::clone(&wire)));
        }
        let ended = async { while owners.join_next().await.is_some() {} };
        tokio::select! {
            () = ended => {}
            // Each ends by itself, but for those that wait on a broken connection for ever: what they had
            // sent is lost, as far as anybody knows.
            () = wire.until_over() => {}
        }
        owners.shutdown().await;
    }
}

/// One channel's owner. The channel is opened for the first window: most handles never need most of them.
async fn own(outbox: Arc<Outbox>, wire: Arc<Wire>) {
    let mut channel: Option<Channel> = None;
    loop {
        if outbox.is_empty() {
            tokio::select! {
                () = outbox.news.notified() => {}
                () = wire.until_dead() => return,
            }
            continue;
        }
        let open = match channel.take() {
            Some(open) => open,
            None => match open(&wire).await {
                Ok(open) => open,
                Err(_) => {
                    // Meanwhile another may have a channel.
                    outbox.news.notify_last();
                    tokio::select! {
                        () = wire.until_dead() => return,
                        () = tokio::time::sleep(Duration::from_millis(50)) => continue,
                    }
                }
            },
        };
        let window = outbox.window();
        // A channel that refused once refuses for ever where the queue's leader has moved.
        if window.is_empty() || send(&outbox, &open, window).await == Sent::Well {
            channel = Some(open);
        } else {
            let _ = open.close(200, "done".into()).await;
        }
    }
}

async fn open(wire: &Wire) -> Result<Channel, Fault> {
    let channel = wire.channel().await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    Ok(channel)
}

#[derive(PartialEq, Eq)]
enum Sent {
    Well,
    Badly,
}

async fn send(outbox: &Outbox, channel: &Channel, window: Vec<Job>) -> Sent {
    let mut confirms = Vec::with_capacity(window.len());
    let mut window = window.into_iter();
    let mut sent = Sent::Well;
    while let Some(job) = window.next() {
        let letter = &job.letter;
        let options = BasicPublishOptions {
            mandatory: letter.mandatory,
            ..BasicPublishOptions::default()
        };
        let published = channel
            .basic_publish(
                letter.exchange.as_ref().into(),
                letter.to.as_str().into(),
                options,
                &letter.body,
                letter.properties.clone(),
            )
            .await;
        match published {
            Ok(confirm) => confirms.push((job, Some(confirm))),
            Err(_) => {
                // Some of this one's frames may have left; none of those behind it.
                sent = Sent::Badly;
                confirms.push((job, None));
                outbox.put_back(window.by_ref());
            }
        }
    }
    let mut answers = Vec::with_capacity(confirms.len());
    let mut returned = HashSet::new();
    for (job, confirm) in confirms {
        let confirmation = match confirm {
            Some(confirm) => confirm.await.ok(),
            None => None,
        };
        let (answer, came_back) = match confirmation {
            Some(Confirmation::Ack(came_back)) => (Answer::Stored, came_back),
            Some(Confirmation::Nack(came_back)) => (Answer::Refused, came_back),
            Some(Confirmation::NotRequested) | None => (Answer::Lost, None),
        };
        // Whichever message it came back with, this is the one that came back.
        returned.extend(came_back.map(|message| letter::key(&message.delivery.properties)));
        answers.push((job, answer));
    }
    for (job, answer) in answers {
        if answer != Answer::Stored {
            sent = Sent::Badly;
        }
        let answer = match answer {
            Answer::Stored if returned.contains(&job.letter.key) => Answer::Returned,
            answer => answer,
        };
        // Whoever asked may have gone at its deadline.
        let _ = job.answer.send(answer);
    }
    sent
}
