//! A TCP proxy that breaks connections: reset, refused, black hole, slow, cut at a byte or behind a
//! protocol frame. It stands between a backend under test and its broker (law F4).

mod connection;
mod frames;

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    net::{TcpListener, TcpSocket},
    sync::watch,
    task::{JoinHandle, JoinSet},
};

pub use frames::Protocol;
use frames::Splitter;

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Toward {
    /// From the client to the broker.
    Broker,
    /// From the broker to the client.
    Client,
}

/// What happens to bytes in one direction.
#[derive(Clone, Debug, Default)]
struct Way {
    /// Connections up to this number are a black hole.
    hole: Option<u64>,
    delay: Duration,
    bandwidth: Option<u64>,
}

/// What happens now. Every connection watches it.
#[derive(Clone, Debug, Default)]
struct Rules {
    /// How often all connections were reset.
    resets: u64,
    door: Door,
    to_broker: Way,
    to_client: Way,
}

/// What becomes of those who come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Door {
    /// They are carried to the broker.
    #[default]
    Open,
    /// Nobody listens: connection refused.
    Closed,
    /// They are let in and reset at once; when they came can be read.
    Slammed,
}

impl Rules {
    fn way(&self, toward: Toward) -> &Way {
        match toward {
            Toward::Broker => &self.to_broker,
            Toward::Client => &self.to_client,
        }
    }

    fn way_mut(&mut self, toward: Toward) -> &mut Way {
        match toward {
            Toward::Broker => &mut self.to_broker,
            Toward::Client => &mut self.to_client,
        }
    }
}

/// Where to cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// Behind this many more bytes.
    Bytes(u64),
    /// Behind this many more frames.
    Frames(u64),
}

#[derive(Clone, Copy, Debug)]
struct Cut {
    toward: Toward,
    after: After,
    /// Whether every connection goes with the one that it happens on.
    all: bool,
}

/// What has passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Connections that came.
    pub connections: u64,
    /// Bytes that were passed on to the broker.
    pub bytes_to_broker: u64,
    /// Bytes that were passed on to the client.
    pub bytes_to_client: u64,
    /// Whole frames that were passed on to the broker.
    pub frames_to_broker: u64,
    /// Whole frames that were passed on to the client.
    pub frames_to_client: u64,
}

#[derive(Debug)]
struct Shared {
    upstream: SocketAddr,
    protocol: Option<Protocol>,
    rules: watch::Sender<Rules>,
    /// Whether somebody listens: the door as it is, where the rules say how it shall be.
    listening: watch::Sender<bool>,
    cut: Mutex<Option<Cut>>,
    counts: Mutex<Counts>,
    came: Mutex<Vec<Instant>>,
    last: AtomicU64,
}

impl Shared {
    /// Notes that these bytes pass, and says how many of them do, and, if the cut is behind those,
    /// whether it takes every connection.
    fn pass(
        &self,
        toward: Toward,
        bytes: &[u8],
        mut splitter: Option<&mut Splitter>,
    ) -> (usize, Option<bool>) {
        let mut cut = lock(&self.cut);
        let mut counts = lock(&self.counts);
        let counts = &mut *counts;
        let here = cut.filter(|cut| cut.toward == toward);
        let mut allowed = bytes.len();
        let mut fires = false;
        if let Some(After::Bytes(left)) = here.map(|cut| cut.after) {
            let left = usize::try_from(left).unwrap_or(usize::MAX);
            allowed = allowed.min(left);
            fires = left <= bytes.len();
        }
        let mut frames = 0;
        let mut passing = 0;
        let limit = match here.map(|cut| cut.after) {
            Some(After::Frames(left)) => left,
            _ => u64::MAX,
        };
        if let Some(splitter) = &mut splitter {
            while frames < limit {
                let rest = bytes.get(passing..allowed).unwrap_or_default();
                let Some(end) = splitter.next_end(rest) else {
                    break;
                };
                passing += end;
                frames += 1;
            }
        }
        if frames == limit {
            fires = true;
        } else {
            passing = allowed;
        }
        let (all_bytes, all_frames) = match toward {
            Toward::Broker => (&mut counts.bytes_to_broker, &mut counts.frames_to_broker),
            Toward::Client => (&mut counts.bytes_to_client, &mut counts.frames_to_client),
        };
        *all_bytes += passing as u64;
        *all_frames += frames;
        if fires {
            return (passing, cut.take().map(|cut| cut.all));
        }
        if let Some(armed) = cut.as_mut().filter(|cut| cut.toward == toward) {
            armed.after = match armed.after {
                After::Bytes(left) => After::Bytes(left - passing as u64),
                After::Frames(left) => After::Frames(left - frames),
            };
        }
        (passing, None)
    }
}

/// The proxy. With it go all its connections.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    listening: JoinHandle<()>,
    /// Bound and never listening: the port stays ours while the door is closed.
    _keeper: TcpSocket,
}

impl Proxy {
    /// Listens on a free port of the loopback for those who want to reach `upstream`. Frames are
    /// counted if the protocol is known.
    ///
    /// # Errors
    /// Those of the operating system.
    pub async fn start(upstream: SocketAddr, protocol: Option<Protocol>) -> io::Result<Self> {
        let keeper = socket(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        let address = keeper.local_addr()?;
        let shared = Arc::new(Shared {
            upstream,
            protocol,
            rules: watch::Sender::default(),
            listening: watch::Sender::default(),
            cut: Mutex::default(),
            counts: Mutex::default(),
            came: Mutex::default(),
            last: AtomicU64::new(0),
        });
        let first = socket(address)?.listen(1024)?;
        shared.listening.send_replace(true);
        let listening = tokio::spawn(listen(address, first, Arc::clone(&shared)));
        Ok(Self {
            address,
            shared,
            listening,
            _keeper: keeper,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Resets every connection, toward both sides.
    pub fn reset(&self) {
        self.shared.rules.send_modify(|rules| rules.resets += 1);
    }

    /// Lets new connections in, refuses them, or slams the door on them; returns when that is so.
    /// Connections that are there stay.
    pub async fn door(&self, door: Door) {
        self.shared.rules.send_modify(|rules| rules.door = door);
        let mut listening = self.shared.listening.subscribe();
        // It ends only with the proxy.
        let _ = listening
            .wait_for(|listening| *listening == (door != Door::Closed))
            .await;
    }

    /// Makes a direction a black hole for every connection, those to come too: they are let in, and
    /// nothing is read from them or written to them.
    pub fn swallow(&self, toward: Toward) {
        self.hole(toward, Some(u64::MAX));
    }

    /// The same for the connections that are there now alone: half-open ones, whose peer is gone and
    /// did not say so. New ones work.
    pub fn half_open(&self) {
        let last = self.shared.last.load(Ordering::Relaxed);
        self.hole(Toward::Broker, Some(last));
        self.hole(Toward::Client, Some(last));
    }

    /// Ends every black hole. What was on its way goes on.
    pub fn heal(&self) {
        self.hole(Toward::Broker, None);
        self.hole(Toward::Client, None);
    }

    fn hole(&self, toward: Toward, last: Option<u64>) {
        self.shared
            .rules
            .send_modify(|rules| rules.way_mut(toward).hole = last);
    }

    /// Holds everything back for this long, each way.
    pub fn delay(&self, delay: Duration) {
        self.shared.rules.send_modify(|rules| {
            rules.to_broker.delay = delay;
            rules.to_client.delay = delay;
        });
    }

    /// Lets this many bytes a second through, each way and connection; `None` is no limit.
    pub fn bandwidth(&self, rate: Option<u64>) {
        self.shared.rules.send_modify(|rules| {
            rules.to_broker.bandwidth = rate;
            rules.to_client.bandwidth = rate;
        });
    }

    /// Cuts, once: after so much more has passed in this direction, over all connections together,
    /// the connection it passed on ends, and with `all` every other too. What passed before the cut
    /// arrives.
    pub fn cut(&self, toward: Toward, after: After, all: bool) {
        *lock(&self.shared.cut) = Some(Cut { toward, after, all });
    }

    /// Takes an armed cut back. False: it has happened.
    pub fn disarm(&self) -> bool {
        lock(&self.shared.cut).take().is_some()
    }

    /// What has passed.
    #[must_use]
    pub fn counts(&self) -> Counts {
        *lock(&self.shared.counts)
    }

    /// When each connection came.
    #[must_use]
    pub fn came(&self) -> Vec<Instant> {
        lock(&self.shared.came).clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

fn socket(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// Lets in whoever comes while the door is open. The connections end with it.
async fn listen(address: SocketAddr, first: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    let mut rules = shared.rules.subscribe();
    let mut listener = Some(first);
    loop {
        let door = rules.borrow_and_update().door;
        if door == Door::Closed {
            listener = None;
        } else if listener.is_none() {
            // The port is kept for this.
            listener = socket(address).and_then(|socket| socket.listen(1024)).ok();
        }
        shared.listening.send_replace(listener.is_some());
        let come = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            changed = rules.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            come = come => {
                let Ok((client, _)) = come else { continue };
                lock(&shared.came).push(Instant::now());
                lock(&shared.counts).connections += 1;
                let id = shared.last.fetch_add(1, Ordering::Relaxed) + 1;
                if door == Door::Slammed {
                    let _ = client.set_zero_linger();
                } else {
                    connections.spawn(connection::serve(id, client, Arc::clone(&shared)));
                }
            }
        }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
