//! The guest: the agent on a machine that was made. It creates nothing on the broker.
//!
//! A command is run like this, and at no step can a crash lose it or run it twice: received → in the
//! journal as accepted → acked, confirmed by the broker → in the journal as running → run → in the
//! journal as done → reported until that is confirmed. The confirmed ack is the broker's word that the
//! control plane had not taken the command back: without it nothing is started.

pub(crate) mod book;
mod context;
mod lane;
mod reporter;
mod serve;

use std::{
    collections::HashMap,
    future::{Future, IntoFuture},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use serde::{Serialize, de::DeserializeOwned};
use tokio::{sync::oneshot, task::JoinHandle};

pub use self::context::{Context, Failure, Interrupted};
use self::{
    book::Book,
    context::{Handler, handler},
    lane::Lane,
    reporter::Reporter,
};
use crate::{
    backoff::Backoff,
    broker::{Broker, ConsumeOptions, Consumer, Delivery},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    names::{GuestAddress, GuestId, Incarnation, QueueName},
    sign::Guard,
    wire::{BootId, PREPARE, Phase, ReportEvent},
    workflow::{is_set, journal::Journal},
};

/// How long one attempt to attach may take.
const ATTACH_WITHIN: Duration = Duration::from_secs(10);

/// How often a guest without a queue says hello: at first, and at last.
const HELLO_EVERY: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// A guest that is attached to its queue and to its lane. Answers pings from here on; commands wait in
/// the queue until [`Guest::serve`].
#[derive(Debug)]
pub struct Guest {
    address: GuestAddress,
    broker: Arc<dyn Broker>,
    book: Book,
    reports: QueueName,
    consumer: Option<Box<dyn Consumer>>,
    lane_ended: oneshot::Receiver<Error>,
    /// Ended when the guest is dropped.
    tasks: Vec<Task>,
    handlers: Handlers,
    grace: Duration,
    guard: Option<Arc<Guard>>,
    /// A signed command of which it cannot be said yet whether it comes in time.
    held: Option<Delivery>,
}

impl Guest {
    /// Attaches to the queue of a machine, which exists already.
    ///
    /// ```no_run
    /// # async fn example() -> wilco::Result<()> {
    /// # let broker = wilco::connect("memory:").await?;
    /// let journal = wilco::SqliteJournal::open("/var/lib/wilco/journal.db").await?;
    /// let guest = wilco::Guest::attach(broker, "vm-0042", journal).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::NoQueue`] if the queue is not there (see [`Attach::wait`]);
    /// [`ErrorKind::Conflict`] while another process is attached or owns the journal;
    /// [`ErrorKind::Revoked`] if this machine was given up; those of the broker and the journal.
    ///
    /// # Cancel safety
    /// Safe: dropped early, nothing stays attached.
    pub fn attach(
        broker: Arc<dyn Broker>,
        guest: impl TryInto<GuestId, Error: Into<Error>>,
        journal: impl Journal,
    ) -> Attach {
        Attach {
            broker,
            guest: guest.try_into().map_err(Into::into),
            incarnation: Incarnation::FIRST,
            journal: Arc::new(journal),
            reports: QueueName::reports(crate::workflow::DEFAULT_NAME),
            wait: Duration::ZERO,
            guard: None,
        }
    }

    /// The machine.
    #[must_use]
    pub fn address(&self) -> &GuestAddress {
        &self.address
    }

    /// What to run on prepare: an async function of the payload and a [`Context`].
    ///
    /// It runs once. What it returns, or the [`Failure`] it returns or panics with, is recorded and
    /// reported.
    #[must_use]
    pub fn on_prepare<P, R, H, F>(self, work: H) -> Self
    where
        P: DeserializeOwned + Send + 'static,
        R: Serialize,
        H: Fn(P, Context) -> F + Send + Sync + 'static,
        F: Future<Output = Result<R, Failure>> + Send + 'static,
    {
        self.on(PREPARE, work)
    }

    /// What to run on a command of this kind. Commands are run one at a time, in the queue's order.
    #[must_use]
    pub fn on<P, R, H, F>(mut self, kind: &str, work: H) -> Self
    where
        P: DeserializeOwned + Send + 'static,
        R: Serialize,
        H: Fn(P, Context) -> F + Send + Sync + 'static,
        F: Future<Output = Result<R, Failure>> + Send + 'static,
    {
        self.handlers.by_kind.insert(kind.into(), handler(work));
        self
    }

    /// What to do about a command that was running when the agent ended:
    /// [`Interrupted::Fail`] unless told otherwise.
    #[must_use]
    pub fn on_interrupted(mut self, choice: Interrupted) -> Self {
        self.handlers.interrupted = choice;
        self
    }

    /// How long a running handler gets to end once [`Guest::serve`] is told to stop: 30 s unless told
    /// otherwise. What has not ended then is interrupted.
    #[must_use]
    pub fn shutdown_grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Serves until `shutdown` completes or this machine is given up, through outages of the broker.
    ///
    /// When it returns, everything finished is in the journal and acked, and the rest is back in the
    /// queue, its deliveries uncounted (law F8).
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if another process took this guest's place,
    /// [`ErrorKind::AuthRefused`], those of the journal.
    ///
    /// # Cancel safety
    /// Dropped early, a running handler is interrupted, as if the process had been killed: nothing is
    /// lost and nothing runs twice.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) -> Result<Served> {
        serve::serve(self, shutdown).await
    }
}

/// Why [`Guest::serve`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Served {
    /// It was told to stop.
    Stopped,
    /// This machine was given up: it runs nothing any more.
    Revoked,
}

#[derive(Default)]
struct Handlers {
    by_kind: HashMap<String, Handler>,
    interrupted: Interrupted,
}

impl std::fmt::Debug for Handlers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.by_kind.keys()).finish()
    }
}

/// A task that ends with this value.
#[derive(Debug)]
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A guest about to attach: await it.
#[derive(Debug)]
#[must_use = "nothing happens before it is awaited"]
pub struct Attach {
    broker: Arc<dyn Broker>,
    guest: Result<GuestId>,
    incarnation: Incarnation,
    journal: Arc<dyn Journal>,
    reports: Result<QueueName>,
    wait: Duration,
    guard: Option<Arc<Guard>>,
}

impl Attach {
    /// Which machine of the guest id this is: the first unless told otherwise. It comes with the
    /// machine's metadata, never from the machine itself.
    pub fn incarnation(mut self, incarnation: Incarnation) -> Self {
        self.incarnation = incarnation;
        self
    }

    /// How long to wait for the queue to exist, or for another process of this guest to end: not at
    /// all unless told otherwise. Pings are answered meanwhile, as waiting for the queue.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// Which control plane to say hello to: `main` unless told otherwise.
    pub fn control_plane(mut self, name: &str) -> Self {
        self.reports = QueueName::reports(name);
        self
    }

    /// Runs and answers only what a trusted key has signed (law S5): everything else is refused, counted
    /// in the [`Pong`](crate::Pong) and told. Module [`sign`](crate::sign) says what that holds off, and
    /// how keys are changed.
    #[cfg(feature = "sign")]
    pub fn trust(mut self, trust: crate::Trust) -> Self {
        self.guard = Some(Arc::new(Guard::new(trust)));
        self
    }

    async fn run(self) -> Result<Guest> {
        let address = GuestAddress::new(self.guest?, self.incarnation);
        let reports = self.reports?;
        let deadline = Deadline::after(self.wait);
        self.journal.own(&address).await?;
        let book = Book::open(self.journal).await?;
        let boot = BootId::generate();

        let responder = attempts(&book, deadline, ErrorKind::Conflict, || {
            self.broker
                .respond(&address, Deadline::after(ATTACH_WITHIN))
        })
        .await?;
        let lane = Lane {
            address: address.clone(),
            boot: boot.clone(),
            book: book.clone(),
            guard: self.guard.clone(),
        };
        let (tell_end, lane_ended) = oneshot::channel();
        let lane = async move { _ = tell_end.send(lane.serve(responder).await) };
        let reporter = Reporter {
            broker: self.broker.clone(),
            address: address.clone(),
            boot,
            book: book.clone(),
        };
        let mut guest = Guest {
            address,
            broker: self.broker,
            reports,
            consumer: None,
            lane_ended,
            tasks: vec![Task(tokio::spawn(lane)), Task(tokio::spawn(reporter.run()))],
            handlers: Handlers::default(),
            grace: Duration::from_secs(30),
            guard: self.guard,
            held: None,
            book,
        };
        let mut dismissed = guest.book.dismissed();
        let attached = tokio::select! {
            attached = guest.attach_queue(deadline) => attached,
            () = is_set(&mut dismissed) => Err(guest.revoked()),
        };
        match attached {
            Ok(()) => Ok(guest),
            Err(error) => {
                guest.leave().await;
                Err(error)
            }
        }
    }
}

impl Guest {
    /// Gives the lane back, and returns when it is: a process that ends right after that leaves nothing of
    /// it on the broker (law Q7).
    async fn leave(&mut self) {
        for mut task in self.tasks.drain(..) {
            task.0.abort();
            // Its end is what is waited for; it was told to.
            let _ = (&mut task.0).await;
        }
    }

    /// Attaches to the queue, waiting for it until the deadline.
    async fn attach_queue(&mut self, deadline: Deadline) -> Result<()> {
        self.book.set_phase(Phase::WaitingForQueue);
        self.book
            .report(self.reports.clone(), ReportEvent::Hello)
            .await?;
        let queue = self.address.queue();
        // Few deliveries at once: they are run one at a time, and what is held here waits for nobody.
        let options =
            ConsumeOptions::prefetch(const { std::num::NonZeroU32::new(8).expect("not zero") });
        let attached = attempts(&self.book, deadline, ErrorKind::NoQueue, || {
            self.broker
                .consume(&queue, options, Deadline::after(ATTACH_WITHIN))
        });
        self.consumer = Some(tokio::select! {
            attached = attached => attached?,
            error = say_hello_again(&self.book, &self.reports) => return Err(error),
        });
        self.book.set_phase(Phase::Idle);
        self.book
            .report(self.reports.clone(), ReportEvent::Hello)
            .await
    }

    fn revoked(&self) -> Error {
        Error::new(
            ErrorKind::Revoked,
            format!(
                "{} was given up by its control plane and runs nothing any more",
                self.address
            ),
        )
    }
}

/// Says hello for as long as there is no queue. The answer to a hello is one question on the lane: a guest
/// whose connection broke at that moment would never learn that it was given up (case W25).
async fn say_hello_again(book: &Book, reports: &QueueName) -> Error {
    let mut backoff = Backoff::new(HELLO_EVERY.0, HELLO_EVERY.1);
    loop {
        backoff.pause().await;
        if let Err(error) = book.report(reports.clone(), ReportEvent::Hello).await {
            return error;
        }
    }
}

/// Tries until the deadline, as long as the failure is one that time can mend: what was waited for, a
/// process that is about to end, or the broker. A ping makes it try at once.
async fn attempts<T, F: Future<Output = Result<T>>>(
    book: &Book,
    deadline: Deadline,
    waited_for: ErrorKind,
    mut attempt: impl FnMut() -> F,
) -> Result<T> {
    let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));
    loop {
        let error = match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let kind = error.kind();
        let can_mend = *kind == waited_for || *kind == ErrorKind::Conflict || error.is_retryable();
        let pause = backoff.next();
        if !can_mend || deadline.remaining() < pause {
            return Err(error);
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = book.nudged() => {}
        }
    }
}

impl IntoFuture for Attach {
    type Output = Result<Guest>;
    type IntoFuture = Pin<Box<dyn Future<Output = Result<Guest>> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.run())
    }
}
