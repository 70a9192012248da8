//! A connection that comes back: made again for as long as its handle lives, and given up when nothing
//! comes over it any more.
//!
//! A half-open socket looks healthy for hours. So the server is asked for a sign of life three times in
//! each lease, and a connection on which none comes for as long as a lease is given up: after four
//! thirds of a lease at the latest, 4 s by default. What is being sent delays that, at a mebibyte a
//! second.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt as _;
use redis::{Cmd, Value, aio::MultiplexedConnection, cmd};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until},
};

use super::{
    closed,
    copies::{Copies, copies},
    dial::{Dialed, Dialer, all, answered},
    failure::Failure,
    router::Router,
    scripts,
};
use crate::{
    backoff::Backoff,
    deadline::Deadline,
    endpoint::tls_advice,
    error::{Error, ErrorKind, Result},
};

/// The slowest line that is believed, in bytes a second.
const SLOWEST: usize = 1024 * 1024;

/// A connection that comes back. Dropped, it ends.
#[derive(Debug)]
pub(super) struct Link {
    phase: watch::Receiver<Phase>,
    /// Why nothing is confirmed though the server is there: too few replicas have it.
    short: watch::Receiver<Option<String>>,
    end: watch::Sender<bool>,
}

#[derive(Clone, Debug)]
pub(super) enum Phase {
    Down(Failure),
    Up(Live),
    Ended,
}

/// One connection of a link, while it lasts.
#[derive(Clone)]
pub(super) struct Live {
    connection: MultiplexedConnection,
    /// Set when it is given up: what waits for an answer then waits no longer.
    lost: watch::Receiver<bool>,
    give_up: mpsc::Sender<()>,
    underway: Arc<AtomicUsize>,
    copies: Option<Copies>,
    /// Which of the link's connections it is.
    pub(super) turn: u64,
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Live").field("turn", &self.turn).finish()
    }
}

impl Link {
    /// Starts to connect. One that listens gets the answers to this handle's questions.
    pub(super) fn start(dialer: &Arc<Dialer>, router: &Arc<Router>, listens: bool) -> Self {
        let (phases, phase) = watch::channel(Phase::Down(Failure::Broken("not tried yet".into())));
        let (end, ends) = watch::channel(false);
        let (shortage, short) = watch::channel(None);
        let keeper = Keeper {
            dialer: Arc::clone(dialer),
            router: Arc::clone(router),
            listens,
            phases,
            shortage,
            ends,
        };
        tokio::spawn(keeper.keep());
        Self { phase, short, end }
    }

    pub(super) fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.clone()
    }

    /// The connection, if there is one now.
    pub(super) fn now(&self) -> Option<Live> {
        match &*self.phase.borrow() {
            Phase::Up(live) => Some(live.clone()),
            _ => None,
        }
    }

    /// What is in the way now.
    pub(super) fn trouble(&self) -> Option<Error> {
        match &*self.phase.borrow() {
            Phase::Down(failure) => Some(unreachable(failure)),
            Phase::Ended => Some(closed()),
            Phase::Up(_) => None,
        }
    }

    /// What is in the way now of what has to last.
    pub(super) fn trouble_or_shortage(&self) -> Option<Error> {
        self.trouble().or_else(|| {
            let shortage = self.short.borrow().clone();
            shortage.map(|text| Error::new(ErrorKind::DeadlineExceeded, text))
        })
    }

    /// Waits for the connection.
    ///
    /// # Errors
    /// `AuthRefused` at once, and so what is wrong about TLS for good; `BrokerUnreachable` with what is in the way at the deadline.
    pub(super) async fn live(&self, deadline: Deadline) -> Result<Live> {
        let mut phase = self.phase.clone();
        let settled = phase.wait_for(|phase| match phase {
            Phase::Up(_) | Phase::Ended => true,
            Phase::Down(failure) => is_auth(failure) || advice(failure).is_some(),
        });
        match deadline.bound(settled).await {
            Ok(Ok(phase)) => match &*phase {
                Phase::Up(live) => Ok(live.clone()),
                Phase::Down(failure) => Err(unreachable(failure)),
                Phase::Ended => Err(closed()),
            },
            Ok(Err(_)) => Err(closed()),
            Err(late) => Err(self.trouble().unwrap_or(late)),
        }
    }

    /// Calls until there is an answer: for what can be done twice and need not last.
    ///
    /// # Errors
    /// As [`Link::live`], and what the server refuses.
    pub(super) async fn call(&self, call: &Cmd, deadline: Deadline) -> Result<Value> {
        loop {
            let live = self.live(deadline).await?;
            let answer = deadline.bound(live.call(call)).await;
            match answer.map_err(|late| self.trouble().unwrap_or(late))? {
                Ok(value) => return Ok(value),
                Err(failure) => self.again(&live, failure, deadline).await?,
            }
        }
    }

    /// The same for a change, which as many replicas have as are wanted; true with an answer that came
    /// after a connection broke, when it may have been done before.
    pub(super) async fn change(&self, call: &Cmd, deadline: Deadline) -> Result<(Value, bool)> {
        let mut again = false;
        loop {
            let live = self.live(deadline).await?;
            let answer = deadline.bound(live.change(call)).await;
            match answer.map_err(|late| self.trouble_or_shortage().unwrap_or(late))? {
                Ok(value) => return Ok((value, again)),
                Err(failure) => {
                    again |= failure.is_broken();
                    self.again(&live, failure, deadline).await?;
                }
            }
        }
    }

    /// Gives up a connection that is of no use; any other failure is the answer.
    async fn again(&self, live: &Live, failure: Failure, deadline: Deadline) -> Result<()> {
        if !failure.is_broken() && !failure.is_passing() {
            return Err(failure.error());
        }
        live.give_up(&failure);
        deadline.bound(live.until_lost()).await
    }

    pub(super) fn end(&self) {
        self.end.send_replace(true);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.end();
    }
}

pub(super) fn is_auth(failure: &Failure) -> bool {
    *failure.error().kind() == ErrorKind::AuthRefused
}

/// What to do about one that no time mends.
fn advice(failure: &Failure) -> Option<&'static str> {
    match failure {
        Failure::Broken(what) => tls_advice(what),
        Failure::Refused { .. } => None,
    }
}

fn unreachable(failure: &Failure) -> Error {
    match failure {
        refused if is_auth(refused) => refused.error(),
        Failure::Refused { code, text } => Error::new(
            ErrorKind::BrokerUnreachable,
            format!("the broker cannot be used yet: {code} {text}"),
        ),
        Failure::Broken(what) => {
            let advice = tls_advice(what).map_or(String::new(), |advice| format!("; {advice}"));
            Error::new(
                ErrorKind::BrokerUnreachable,
                format!("the broker cannot be reached: {what}{advice}"),
            )
        }
    }
}

impl Live {
    /// Sends a command and waits for its answer, or until the connection is given up.
    pub(super) async fn call(&self, call: &Cmd) -> Result<Value, Failure> {
        self.call_sized(call, 0).await
    }

    /// The same for a command of so many bytes. A script that the server forgot is brought again: it
    /// was not run.
    pub(super) async fn call_sized(&self, call: &Cmd, bytes: usize) -> Result<Value, Failure> {
        let _underway = Underway::of(&self.underway, bytes);
        match self.once(call).await {
            Err(failure) if failure.is_code("NOSCRIPT") => {
                let scripts = scripts::load(None);
                let mut connection = self.connection.clone();
                let mut lost = self.lost.clone();
                let loaded = tokio::select! {
                    loaded = all(&mut connection, &scripts) => loaded?,
                    _ = lost.wait_for(|lost| *lost) => return Err(Failure::Broken("it fell silent".into())),
                };
                for answer in loaded {
                    answered(Ok(answer))?;
                }
                self.once(call).await
            }
            answer => answer,
        }
    }

    /// Sends a change, and waits for its answer and its copies.
    pub(super) async fn change(&self, call: &Cmd) -> Result<Value, Failure> {
        let value = self.call(call).await?;
        self.copied().await.map(|()| value)
    }

    /// Waits until as many replicas as are wanted have all that was answered here before.
    pub(super) async fn copied(&self) -> Result<(), Failure> {
        match &self.copies {
            Some(copies) => copies.made().await,
            None => Ok(()),
        }
    }

    async fn once(&self, call: &Cmd) -> Result<Value, Failure> {
        let mut connection = self.connection.clone();
        let mut lost = self.lost.clone();
        tokio::select! {
            biased;
            answer = connection.send_packed_command(call) => answered(answer),
            _ = lost.wait_for(|lost| *lost) => Err(Failure::Broken("it fell silent".into())),
        }
    }

    /// Sends a command whose answer nobody waits for.
    pub(super) async fn tell(&self, mut call: Cmd) {
        call.set_no_response(true);
        let mut connection = self.connection.clone();
        // A connection that broke has forgotten what this was to end.
        let _ = connection.send_packed_command(&call).await;
    }

    /// This connection is of no use: another has to be made.
    pub(super) fn give_up(&self, why: &Failure) {
        tracing::debug!(?why, "a connection is given up");
        let _ = self.give_up.try_send(());
    }

    pub(super) async fn until_lost(&self) {
        // An error says that the task which keeps it is gone: as lost.
        let _ = self.lost.clone().wait_for(|lost| *lost).await;
    }

    pub(super) fn is_lost(&self) -> bool {
        *self.lost.borrow()
    }
}

/// So many bytes on their way.
struct Underway<'a>(&'a AtomicUsize, usize);

impl<'a> Underway<'a> {
    fn of(underway: &'a AtomicUsize, bytes: usize) -> Self {
        underway.fetch_add(bytes, Ordering::Relaxed);
        Self(underway, bytes)
    }
}

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}

struct Keeper {
    dialer: Arc<Dialer>,
    router: Arc<Router>,
    listens: bool,
    phases: watch::Sender<Phase>,
    shortage: watch::Sender<Option<String>>,
    ends: watch::Receiver<bool>,
}

impl Keeper {
    async fn keep(mut self) {
        let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));
        let mut ends = self.ends.clone();
        let mut turn = 0;
        loop {
            let dialed = tokio::select! {
                dialed = self.dialer.dial(&self.router, self.listens) => dialed,
                _ = ends.wait_for(|end| *end) => break,
            };
            match dialed {
                Ok(dialed) => {
                    turn += 1;
                    if turn > 1 {
                        tracing::info!("connected again");
                    }
                    let began = Instant::now();
                    let Some(why) = self.hold(dialed, turn).await else {
                        break;
                    };
                    tracing::warn!(why, "the connection is lost; making another");
                    self.phases.send_replace(Phase::Down(Failure::Broken(why)));
                    if began.elapsed() > Duration::from_secs(1) {
                        backoff.reset();
                    }
                }
                Err(failure) => {
                    self.phases.send_replace(Phase::Down(failure));
                }
            }
            tokio::select! {
                () = backoff.pause() => {}
                _ = ends.wait_for(|end| *end) => break,
            }
        }
        self.phases.send_replace(Phase::Ended);
    }

    /// Watches over a connection until it is lost, and says why; None at the end of all.
    async fn hold(&mut self, dialed: Dialed, turn: u64) -> Option<String> {
        let Dialed {
            connection,
            mut broken,
            host,
            copies: wanted,
        } = dialed;
        let (loss, lost) = watch::channel(false);
        let (give_up, mut given_up) = mpsc::channel(1);
        let underway = Arc::new(AtomicUsize::new(0));
        let (copies, copying) = wanted.map(copies).unzip();
        let live = Live {
            connection: connection.clone(),
            lost,
            give_up,
            underway: Arc::clone(&underway),
            copies,
            turn,
        };
        self.shortage.send_replace(None);
        self.phases.send_replace(Phase::Up(live));
        let mut ends = self.ends.clone();
        let copier = connection.clone();
        let copy = async {
            let nobody = self.dialer.nobody();
            let is_superseded = || self.dialer.is_superseded(&host).boxed();
            match copying {
                Some(copying) => {
                    copying
                        .run(copier, &nobody, &self.shortage, is_superseded)
                        .await
                }
                None => std::future::pending().await,
            }
        };
        let why = tokio::select! {
            _ = broken.wait_for(|broken| *broken) => Some("the server ended it".to_owned()),
            _ = given_up.recv() => Some("it was of no use".to_owned()),
            _ = ends.wait_for(|end| *end) => None,
            why = silence(connection, self.dialer.lease, &underway) => Some(why),
            why = copy => Some(why),
        };
        loss.send_replace(true);
        why
    }
}

/// Returns when the server gave no sign of life for too long.
async fn silence(
    mut connection: MultiplexedConnection,
    lease: Duration,
    underway: &AtomicUsize,
) -> String {
    let ping = cmd("PING");
    loop {
        sleep(lease / 3).await;
        let began = Instant::now();
        let mut answer = pin!(connection.send_packed_command(&ping));
        loop {
            let sending = underway.load(Ordering::Relaxed) / SLOWEST;
            let patience = lease + Duration::from_secs(sending as u64);
            if began.elapsed() >= patience {
                return format!("no sign of life for {patience:?}");
            }
            tokio::select! {
                answer = &mut answer => match answer {
                    Ok(_) => break,
                    Err(error) => return error.to_string(),
                },
                () = sleep_until(began + patience) => {}
            }
        }
    }
}
