//! One connection: made by a deadline, made again for ever, and asked over.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_nats::{Client, ConnectErrorKind, ConnectOptions, Event, HeaderMap, Message, Subscriber};
use bytes::Bytes;
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::{Semaphore, oneshot, watch},
    task::AbortHandle,
    time::{Instant, sleep, timeout_at},
};

use super::{closed, hold::Hold, options::Options, requests::Lane};
use crate::{
    backoff::Backoff,
    deadline::Deadline,
    endpoint::tls_advice,
    error::{Error, ErrorKind, Result},
};

/// How long one attempt to connect may take.
const ATTEMPT: Duration = Duration::from_secs(2);

/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// After so long without an answer it is asked once more what can be asked again: of a cluster's node that
/// died, and while none leads, nobody says that there is no answer to come.
const SILENCE: Duration = Duration::from_secs(2);

/// How many publishes of one handle wait for their confirm at once: a server drops what it cannot take
/// in, so they are kept well below that.
const PUBLISHES: usize = 2_048;

/// What is known of the connection.
#[derive(Clone, Debug, Default)]
pub(super) struct State {
    pub(super) connected: bool,
    /// How often it was made: what was sent on an earlier one may be lost.
    pub(super) generation: u64,
    /// What the server last refused us, and how often it did.
    denied: Option<Arc<str>>,
    denials: u64,
    /// The server does not let us connect again.
    pub(super) refused: bool,
}

/// One handle's connection, and what hangs on it.
pub(super) struct Link {
    pub(super) client: Client,
    pub(super) options: Options,
    pub(super) publishes: Semaphore,
    /// The server syncs before it confirms, for all that is known.
    synced: AtomicBool,
    state: watch::Sender<State>,
    mux: Arc<Mux>,
    closed: watch::Sender<bool>,
    tasks: Vec<AbortHandle>,
    holds: Mutex<Vec<Weak<Hold>>>,
    lanes: Mutex<Vec<Weak<Lane>>>,
    /// Since when this handle has seen a queue's fence, by who put it up.
    pub(super) fences: Mutex<HashMap<String, Instant>>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a call has no answer.
#[derive(Debug)]
pub(super) enum Unanswered {
    /// No byte of it left.
    NotSent(Error),
    /// It was handed to the connection: it may have been done, or be done still.
    Unknown(Error),
}

impl Unanswered {
    pub(super) fn into_error(self) -> Error {
        match self {
            Self::NotSent(error) | Self::Unknown(error) => error,
        }
    }
}

/// An answer.
pub(super) struct Answer {
    pub(super) message: Message,
    /// Whether the call was sent once only: else an earlier one may have been done too.
    pub(super) first: bool,
}

impl Answer {
    /// Whether the server says that nobody takes what was sent.
    pub(super) fn nobody(&self) -> bool {
        self.message
            .status
            .is_some_and(|status| status.as_u16() == 503)
    }
}

impl Link {
    /// Connects, trying until the deadline (law F5).
    pub(super) async fn open(options: Options, deadline: Deadline) -> Result<Arc<Self>> {
        let mut backoff = Backoff::new(Duration::from_millis(50), LONGEST_PAUSE);
        let state = watch::Sender::new(State::default());
        let client = loop {
            let attempt = connect_options(&options, &state)?.connect(options.addresses.clone());
            let error = match deadline.bound(attempt).await {
                Ok(Ok(client)) => break client,
                Ok(Err(error)) => error,
                Err(_) => return Err(unreachable(&options, "no answer by the deadline")),
            };
            let why = in_full(&error);
            let refused = matches!(
                error.kind(),
                ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation
            );
            // "User Authentication Expired", or "Revoked", which the client takes for any error.
            if refused || why.to_lowercase().contains("authentication") {
                return Err(Error::new(
                    ErrorKind::AuthRefused,
                    format!("{} refused these credentials", options.shown()),
                ));
            }
            if options.with_tls()
                && let Some(advice) = tls_advice(&why)
            {
                return Err(unreachable(&options, &format!("{why}; {advice}")));
            }
            if deadline.bound(backoff.pause()).await.is_err() {
                return Err(unreachable(&options, &why));
            }
        };
        // The client tells of its first connection as of every other.
        let _ = state
            .subscribe()
            .wait_for(|state| state.generation > 0)
            .await;
        let mux = Arc::new(Mux::new(&client));
        let answers = client
            .subscribe(format!("{}*", mux.prefix))
            .await
            .map_err(gone)?;
        let tasks = vec![
            tokio::spawn(Arc::clone(&mux).deliver(answers)).abort_handle(),
            tokio::spawn(watch_over(client.clone(), state.clone())).abort_handle(),
        ];
        Ok(Arc::new(Self {
            client,
            options,
            publishes: Semaphore::new(PUBLISHES),
            synced: AtomicBool::new(false),
            state,
            mux,
            closed: watch::Sender::new(false),
            tasks,
            holds: Mutex::default(),
            lanes: Mutex::default(),
            fences: Mutex::default(),
        }))
    }

    /// Fails once the handle is closed.
    pub(super) fn alive(&self) -> Result<()> {
        if *self.closed.borrow() {
            return Err(closed());
        }
        Ok(())
    }

    pub(super) fn state(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    pub(super) fn is_synced(&self) -> bool {
        self.synced.load(Ordering::Acquire)
    }

    pub(super) fn set_synced(&self, synced: bool) {
        self.synced.store(synced, Ordering::Release);
    }

    /// Whether a guest's credential is good no more.
    pub(super) fn is_revoked(&self) -> bool {
        self.options.guest.is_some() && self.state.borrow().refused
    }

    pub(super) fn is_connected(&self) -> bool {
        self.state.borrow().connected
    }

    /// Asks, and waits for the answer until the deadline. `again`: whether it is asked again when the
    /// connection was made again, which needs a question that can be done twice.
    ///
    /// While there is no connection nothing is handed to the client, which would send it later, after
    /// the caller was told otherwise (law P4).
    pub(super) async fn call(
        &self,
        subject: &str,
        headers: Option<&HeaderMap>,
        body: &Bytes,
        again: bool,
        deadline: Deadline,
    ) -> Result<Answer, Unanswered> {
        let mut state = self.state.subscribe();
        let mut times = 0;
        let late = |times: u32, connected: bool| {
            let error = if connected {
                Error::new(
                    ErrorKind::DeadlineExceeded,
                    "the server did not answer by the deadline",
                )
            } else {
                unreachable(&self.options, "the connection was lost")
            };
            match times {
                0 => Unanswered::NotSent(error),
                _ => Unanswered::Unknown(error),
            }
        };
        loop {
            let ready = state.wait_for(|state| {
                state.connected || (state.refused && self.options.guest.is_some())
            });
            let now = match timeout_at(deadline.instant(), ready).await {
                Ok(Ok(state)) if !state.connected => return Err(Unanswered::NotSent(revoked())),
                Ok(Ok(state)) => state.clone(),
                Ok(Err(_)) => return Err(Unanswered::NotSent(closed())),
                Err(_) => return Err(late(times, false)),
            };
            let mut ticket = self.mux.ticket();
            let reply = ticket.subject.clone();
            let sending = async {
                match headers {
                    Some(headers) => {
                        let (headers, body) = (headers.clone(), body.clone());
                        self.client
                            .publish_with_reply_and_headers(
                                subject.to_owned(),
                                reply,
                                headers,
                                body,
                            )
                            .await
                    }
                    None => {
                        self.client
                            .publish_with_reply(subject.to_owned(), reply, body.clone())
                            .await
                    }
                }
            };
            match timeout_at(deadline.instant(), sending).await {
                Ok(Ok(())) => times += 1,
                Ok(Err(error)) => {
                    let error = gone(error);
                    return Err(match times {
                        0 => Unanswered::NotSent(error),
                        _ => Unanswered::Unknown(error),
                    });
                }
                Err(_) => return Err(late(times, true)),
            }
            loop {
                tokio::select! {
                    biased;
                    answer = &mut ticket.answer => match answer {
                        Ok(message) => return Ok(Answer { message, first: times == 1 }),
                        Err(_) => return Err(Unanswered::Unknown(closed())),
                    },
                    () = tokio::time::sleep_until(deadline.instant()) => {
                        return Err(late(times, self.is_connected()));
                    }
                    changed = state.changed() => {
                        if changed.is_err() {
                            return Err(Unanswered::Unknown(closed()));
                        }
                        let state = state.borrow_and_update().clone();
                        if state.denials != now.denials
                            && state.denied.as_deref().is_some_and(|denied| denied == subject)
                        {
                            return Err(Unanswered::NotSent(Error::new(
                                ErrorKind::AuthRefused,
                                format!("the server does not let these credentials publish to {subject}"),
                            )));
                        }
                        if again && state.generation != now.generation {
                            break;
                        }
                    }
                }
            }
        }
    }

    /// Asks what can be done twice, and asks it again after each silence: in a cluster the one who was to
    /// answer may have died, which nobody tells us who are connected to another (law F6). Whichever answer
    /// comes first counts, since on a machine that is starved every one of them is late.
    pub(super) async fn insist(
        &self,
        subject: &str,
        headers: Option<&HeaderMap>,
        body: &Bytes,
        deadline: Deadline,
    ) -> Result<Answer, Unanswered> {
        let ask = || self.call(subject, headers, body, true, deadline);
        let mut asked = FuturesUnordered::from_iter([ask()]);
        let mut once = true;
        loop {
            tokio::select! {
                biased;
                Some(answer) = asked.next() => return match answer {
                    Ok(answer) => Ok(Answer { first: answer.first && once, ..answer }),
                    // Another of them may have been done.
                    Err(error) if !once => Err(Unanswered::Unknown(error.into_error())),
                    Err(error) => Err(error),
                },
                () = sleep(SILENCE) => if self.is_connected() {
                    asked.push(ask());
                    once = false;
                },
            }
        }
    }

    pub(super) fn remember_hold(&self, hold: &Arc<Hold>) {
        let mut holds = lock(&self.holds);
        holds.retain(|hold| hold.strong_count() > 0);
        holds.push(Arc::downgrade(hold));
    }

    pub(super) fn remember_lane(&self, lane: &Arc<Lane>) {
        let mut lanes = lock(&self.lanes);
        lanes.retain(|lane| lane.strong_count() > 0);
        lanes.push(Arc::downgrade(lane));
    }

    /// Gives back what is held and goes (laws F8, C14).
    pub(super) async fn close(&self, deadline: Deadline) -> Result<()> {
        if self.closed.send_replace(true) {
            return Ok(());
        }
        let lanes = std::mem::take(&mut *lock(&self.lanes));
        for lane in lanes {
            if let Some(lane) = lane.upgrade() {
                lane.detach(deadline).await;
            }
        }
        let holds = std::mem::take(&mut *lock(&self.holds));
        let released = holds
            .iter()
            .filter_map(Weak::upgrade)
            .map(|hold| async move {
                hold.release(true);
                hold.until_gone(deadline).await
            });
        for result in futures_util::future::join_all(released).await {
            result?;
        }
        Ok(())
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // They hold the client, and the client's own task ends with the last who holds it.
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// An error with what caused it: the client's own words name the step alone.
pub(super) fn in_full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

pub(super) fn unreachable(options: &Options, why: &str) -> Error {
    Error::new(
        ErrorKind::BrokerUnreachable,
        format!("{} cannot be reached: {why}", options.shown()),
    )
}

/// A guest's credential is good no more.
pub(super) fn revoked() -> Error {
    Error::new(
        ErrorKind::AuthRefused,
        "the server does not let this credential connect again: it was revoked, or has run out",
    )
}

/// The client refuses what it was told: its task is gone.
pub(super) fn gone(error: impl fmt::Display) -> Error {
    Error::new(
        ErrorKind::BrokerUnreachable,
        format!("the client refused: {error}"),
    )
}

fn connect_options(options: &Options, state: &watch::Sender<State>) -> Result<ConnectOptions> {
    let told = state.clone();
    let connect = ConnectOptions::new()
        .name("wilco")
        .connection_timeout(ATTEMPT)
        // Whatever comes counts as an answer; the third ping without any ends the connection. So a black
        // hole is noticed within one and a half times `takeover`, and a machine that is starved for a
        // moment loses nothing.
        .ping_interval(options.takeover / 2)
        .max_reconnects(None)
        .reconnect_delay_callback(|attempts| {
            // The attempts of one outage are counted up by the client, so this is their backoff.
            let doubled = 20u64.saturating_mul(1 << attempts.saturating_sub(1).min(10));
            Backoff::new(
                Duration::from_millis(if attempts <= 1 { 0 } else { doubled }).min(LONGEST_PAUSE),
                LONGEST_PAUSE,
            )
            .next()
        })
        .event_callback(move |event| {
            tell(&told, &event);
            std::future::ready(())
        });
    options.apply(connect)
}

fn tell(state: &watch::Sender<State>, event: &Event) {
    match event {
        Event::Connected => state.send_modify(|state| {
            state.connected = true;
            state.refused = false;
            state.generation += 1;
        }),
        Event::Disconnected | Event::Closed => state.send_modify(|state| state.connected = false),
        Event::ServerError(error) => {
            let text = error.to_string();
            // Permissions Violation for Publish to "subject"
            if text
                .to_lowercase()
                .contains("permissions violation for publish")
            {
                let subject = text.split('"').nth(1).map(Into::into);
                state.send_modify(|state| {
                    state.denied = subject;
                    state.denials += 1;
                });
            }
            tracing::debug!(error = text, "the server says");
        }
        Event::ClientError(error) => {
            let text = error.to_string().to_lowercase();
            if ["authorization violation", "authentication"]
                .iter()
                .any(|word| text.contains(word))
            {
                state.send_modify(|state| state.refused = true);
            }
        }
        _ => {}
    }
}

/// The client tells of its connection over a channel that drops what it has no room for: what was
/// missed is found here.
async fn watch_over(client: Client, state: watch::Sender<State>) {
    let statistics = client.statistics();
    loop {
        sleep(Duration::from_millis(500)).await;
        let made = statistics.connects.load(Ordering::Relaxed);
        let connected = client.connection_state() == async_nats::connection::State::Connected;
        state.send_if_modified(|state| {
            let missed = state.generation < made || state.connected != connected;
            state.generation = state.generation.max(made);
            state.connected = connected;
            missed
        });
    }
}

/// Answers to many questions over one subscription, each to its own asker; a question that is given up
/// leaves nothing behind (law R5).
struct Mux {
    prefix: String,
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Message>>>,
}

impl Mux {
    fn new(client: &Client) -> Self {
        Self {
            prefix: format!("{}.", client.new_inbox()),
            next: AtomicU64::new(0),
            waiting: Mutex::default(),
        }
    }

    fn ticket(self: &Arc<Self>) -> Ticket {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        lock(&self.waiting).insert(number, sender);
        Ticket {
            mux: Arc::clone(self),
            number,
            subject: format!("{}{number}", self.prefix),
            answer,
        }
    }

    async fn deliver(self: Arc<Self>, mut answers: Subscriber) {
        while let Some(message) = answers.next().await {
            let number = message.subject.strip_prefix(self.prefix.as_str());
            let number = number.and_then(|number| number.parse().ok());
            let asker = number.and_then(|number: u64| lock(&self.waiting).remove(&number));
            if let Some(asker) = asker {
                // Whoever gave up meanwhile does not miss it.
                let _ = asker.send(message);
            }
        }
    }
}

struct Ticket {
    mux: Arc<Mux>,
    number: u64,
    subject: String,
    answer: oneshot::Receiver<Message>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        lock(&self.mux.waiting).remove(&self.number);
    }
}
