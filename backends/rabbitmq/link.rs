//! One connection that is made again for as long as it is wanted (law F5).
//!
//! A handle has three. Everything is published over one, because a broker with an alarm stops reading
//! from whoever publishes, and only there. What may be refused is asked over the second: a refusal ends
//! its channel, and the client library never uses that channel's number again, though it gives it out;
//! so this connection wears out, and is made anew. Everything else goes over the third.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt as _;
use lapin::{
    Channel, Connection, ConnectionProperties,
    tcp::{OwnedIdentity, OwnedTLSConfig},
    uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo, SASLMechanism},
};
use secrecy::ExposeSecret as _;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::{
    fault::{Fault, code},
    lock, stream,
};
use crate::{
    backoff::Backoff,
    deadline::Deadline,
    endpoint::{Endpoint, Host, tls_advice},
    error::{Error, ErrorKind, Result},
};

/// How long one attempt to connect may take.
const ATTEMPT: Duration = Duration::from_secs(5);

/// How many channels a connection for questions gives out before it is made anew: the client has 2,047
/// numbers, and is out of them for ever once each was refused something.
const QUESTIONS: u32 = 1_000;

/// How long the last questions over such a connection may take.
const LAST_QUESTIONS: Duration = Duration::from_secs(5);

/// How long after its connection broke a call may take to fail.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

/// How many channels of a sort wait for the next who needs one at most.
const IDLE: usize = 16;

/// How many numbers in turn may be of no use until a connection is worn out.
const WORN: usize = 64;

/// How often a connection is looked at that told nothing.
const LOOK: Duration = Duration::from_millis(250);

/// One connection, from when it was made until it breaks.
pub(super) struct Wire {
    connection: Connection,
    /// Which of its link's connections it is.
    pub(super) generation: u64,
    /// Where it goes, where that is no TLS.
    pub(super) plain: Option<Host>,
    scout: Option<Arc<Link>>,
    /// How many channels for questions were opened on it.
    asked: AtomicU32,
    /// Those that were refused nothing, and ask nothing now.
    idle: Mutex<Vec<Channel>>,
    /// Those that were refused nothing, and have nothing on them, for the next who needs one.
    spare: Spare,
    /// It has to be made anew.
    worn: Notify,
    dead: watch::Sender<bool>,
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Wire({})", self.generation)
    }
}

impl Wire {
    pub(super) async fn channel(&self) -> Result<Channel, Fault> {
        // A number whose last channel was refused something fails with that old refusal.
        for _ in 0..WORN {
            let channel = match self.connection.create_channel().await {
                // Each is in use, or was refused something.
                Err(error) if matches!(error.kind(), lapin::ErrorKind::ChannelsLimitReached) => {
                    break;
                }
                done => done.map_err(Fault::from),
            };
            match channel {
                Err(Fault::Amqp(..)) => {}
                done => return done,
            }
        }
        self.worn.notify_one();
        Err(Fault::Lost("it has too few channels left".into()))
    }

    /// A channel for a few calls, to be [kept](Spare::keep) when they are done: to open one costs the
    /// broker more than most calls do.
    pub(super) async fn spare(&self) -> Result<Channel, Fault> {
        let spare = lock(&self.spare.0).pop();
        match spare.filter(|channel| channel.status().connected()) {
            Some(channel) => Ok(channel),
            None => self.channel().await,
        }
    }

    /// Where such channels are kept.
    pub(super) fn spares(&self) -> &Spare {
        &self.spare
    }

    /// A channel for what may be refused.
    pub(super) async fn scout(&self) -> Result<Scout, Fault> {
        let Some(link) = &self.scout else {
            return Err(Fault::Lost("questions go over another connection".into()));
        };
        let wire = link.wire(Deadline::after(ATTEMPT)).await;
        let wire = wire.map_err(|error| Fault::Lost(error.to_string()))?;
        let idle = lock(&wire.idle).pop();
        if let Some(channel) = idle.filter(|channel| channel.status().connected()) {
            return Ok(Scout { wire, channel });
        }
        if wire.asked.fetch_add(1, Ordering::Relaxed) == QUESTIONS {
            wire.worn.notify_one();
        }
        let channel = tokio::select! {
            channel = wire.channel() => channel?,
            () = wire.until_dead() => return Err(Scout::broken()),
        };
        Ok(Scout { wire, channel })
    }

    /// Waits for the connection to break.
    pub(super) async fn until_dead(&self) {
        // Fails only without a sender, and `self` has it.
        let _ = self.dead.subscribe().wait_for(|dead| *dead).await;
    }

    /// Waits for the connection to break, and for those who wait for answers to have learned it. Whoever
    /// waits then, waits for ever.
    pub(super) async fn until_over(&self) {
        self.until_dead().await;
        tokio::time::sleep(LAST_ANSWERS).await;
    }

    /// Whether the broker does not take publishes for now.
    pub(super) fn is_blocked(&self) -> bool {
        self.connection.status().blocked()
    }
}

/// Open channels that nobody uses now.
#[derive(Clone, Default)]
pub(super) struct Spare(Arc<Mutex<Vec<Channel>>>);

impl Spare {
    /// Keeps a channel that has no consumer, no message and no limit on it. One too many is closed.
    pub(super) fn keep(&self, channel: Channel) {
        let mut spare = lock(&self.0);
        if spare.len() < IDLE {
            spare.push(channel);
        }
    }
}

/// A channel for one question, and its connection: a call on one that broke may wait for ever.
pub(super) struct Scout {
    wire: Arc<Wire>,
    channel: Channel,
}

impl Scout {
    pub(super) fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Waits for the answer to a call on this channel.
    pub(super) async fn answer<T>(
        &self,
        call: impl Future<Output = lapin::Result<T>>,
    ) -> Result<T, Fault> {
        tokio::select! {
            biased;
            answer = call => answer.map_err(Fault::from),
            () = self.wire.until_dead() => Err(Self::broken()),
        }
    }

    /// All its questions were answered, and none refused: the next can go over it too.
    pub(super) fn done(self) {
        let mut idle = lock(&self.wire.idle);
        if idle.len() < IDLE {
            idle.push(self.channel);
        }
    }

    fn broken() -> Fault {
        Fault::Lost("the connection for questions broke".into())
    }
}

/// What a link is now.
#[derive(Clone, Debug)]
pub(super) enum Now {
    /// Not there; why, as far as it is known.
    Down(Option<String>),
    /// The broker does not want us. It is asked again, but callers need not wait for that.
    Refused(String),
    /// Every address has something wrong about its TLS that no time mends; as with a refusal.
    Wrong(String),
    Up(Arc<Wire>),
}

/// A connection that is made again and again.
#[derive(Debug)]
pub(super) struct Link {
    now: watch::Receiver<Now>,
    closed: watch::Sender<bool>,
}

impl Link {
    /// Starts connecting. It ends when this is dropped or closed.
    pub(super) fn start(
        endpoint: Arc<Endpoint>,
        heartbeat: Duration,
        name: String,
        scout: Option<Arc<Self>>,
    ) -> Self {
        let (sender, now) = watch::channel(Now::Down(None));
        let closed = watch::Sender::new(false);
        tokio::spawn(supervise(
            endpoint,
            heartbeat,
            name,
            scout,
            sender,
            closed.subscribe(),
        ));
        Self { now, closed }
    }

    /// The connection, once it is there.
    pub(super) async fn wire(&self, deadline: Deadline) -> Result<Arc<Wire>> {
        let mut now = self.now.clone();
        let there = deadline
            .bound(now.wait_for(|now| !matches!(now, Now::Down(_))))
            .await
            .map(|found| found.map(|now| now.clone()));
        match there {
            Ok(Ok(Now::Up(wire))) => Ok(wire),
            Ok(Ok(Now::Refused(why))) => Err(Error::new(ErrorKind::AuthRefused, why)),
            Ok(Ok(Now::Wrong(why))) => Err(unreachable(&why)),
            Ok(Ok(Now::Down(_)) | Err(_)) => Err(super::closed()),
            Err(_) => Err(self.unreachable()),
        }
    }

    /// The connection, if it is there now.
    pub(super) fn up(&self) -> Option<Arc<Wire>> {
        match &*self.now.borrow() {
            Now::Up(wire) => Some(Arc::clone(wire)),
            _ => None,
        }
    }

    /// What is in the way.
    pub(super) fn unreachable(&self) -> Error {
        let why = match &*self.now.borrow() {
            Now::Down(Some(why)) | Now::Wrong(why) => why.clone(),
            _ => "no answer yet".to_owned(),
        };
        unreachable(&why)
    }

    /// Ends the connection, after what is on its way.
    pub(super) async fn close(&self) {
        let up = self.up();
        self.closed.send_replace(true);
        if let Some(wire) = up {
            wire.until_dead().await;
        }
    }
}

fn unreachable(why: &str) -> Error {
    Error::new(
        ErrorKind::BrokerUnreachable,
        format!("the broker cannot be reached: {why}"),
    )
}

async fn supervise(
    endpoint: Arc<Endpoint>,
    heartbeat: Duration,
    name: String,
    scout: Option<Arc<Link>>,
    now: watch::Sender<Now>,
    mut closed: watch::Receiver<bool>,
) {
    static GENERATIONS: AtomicU64 = AtomicU64::new(1);
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(3));
    let mut attempts = 0;
    let mut unwanted = async |now: &watch::Sender<Now>| {
        tokio::select! {
            _ = closed.wait_for(|closed| *closed) => {}
            () = now.closed() => {}
        }
    };
    // Of the addresses tried since all of them were.
    let mut wrong = 0_u32;
    loop {
        let host = &endpoint.hosts[attempts % endpoint.hosts.len()];
        attempts += 1;
        let attempt = tokio::time::timeout(ATTEMPT, connect(&endpoint, host, heartbeat, &name));
        let attempt = tokio::select! {
            attempt = attempt => attempt,
            () = unwanted(&now) => return,
        };
        match attempt {
            Ok(Ok(connection)) => {
                let wire = Arc::new(Wire {
                    connection,
                    generation: GENERATIONS.fetch_add(1, Ordering::Relaxed),
                    plain: endpoint.tls.is_none().then(|| host.clone()),
                    scout: scout.clone(),
                    asked: AtomicU32::new(0),
                    idle: Mutex::default(),
                    spare: Spare::default(),
                    worn: Notify::new(),
                    dead: watch::Sender::new(false),
                });
                now.send_replace(Now::Up(Arc::clone(&wire)));
                let ended = tokio::select! {
                    why = death(&wire.connection) => Some(why),
                    () = wire.worn.notified() => {
                        if wire.asked.load(Ordering::Relaxed) > 0 {
                            now.send_replace(Now::Down(None));
                            tokio::spawn(retire(wire));
                            continue;
                        }
                        let goodbye = wire.connection.close(200, "worn".into());
                        let _ = tokio::time::timeout(Duration::from_secs(2), goodbye).await;
                        Some("it was worn out".to_owned())
                    }
                    () = unwanted(&now) => None,
                };
                let Some(why) = ended else {
                    let goodbye = wire.connection.close(200, "done".into());
                    let _ = tokio::time::timeout(Duration::from_secs(2), goodbye).await;
                    now.send_replace(Now::Down(None));
                    wire.dead.send_replace(true);
                    return;
                };
                tracing::warn!(%host, why, "the connection to RabbitMQ broke");
                now.send_replace(Now::Down(Some(format!("{host}: {why}"))));
                wire.dead.send_replace(true);
                backoff.reset();
            }
            Ok(Err(error)) if matches!(code(&error), Some(403 | 530)) => {
                let why = format!(
                    "{host} refuses this user or virtual host: {}",
                    super::fault::text(&error)
                );
                now.send_replace(Now::Refused(why));
            }
            Ok(Err(error)) => {
                let why = format!("{host}: {}", failed(&endpoint, &error));
                let advice = tls_advice(&why).filter(|_| endpoint.tls.is_some());
                wrong += u32::from(advice.is_some());
                let why = advice.map_or(why.clone(), |advice| format!("{why}; {advice}"));
                now.send_replace(if wrong as usize >= endpoint.hosts.len() {
                    Now::Wrong(why)
                } else {
                    Now::Down(Some(why))
                });
            }
            Err(_) => {
                let why = format!("{host}: no answer within {ATTEMPT:?}");
                now.send_replace(Now::Down(Some(why)));
            }
        }
        // A cluster's next address is tried at once.
        if attempts % endpoint.hosts.len() == 0 {
            wrong = 0;
            tokio::select! {
                () = backoff.pause() => {}
                () = unwanted(&now) => return,
            }
        }
    }
}

/// Why no connection was made. A server that misses a client's certificate often just hangs up.
fn failed(endpoint: &Endpoint, error: &lapin::Error) -> String {
    let text = super::fault::text(error);
    match (&endpoint.tls, error.kind()) {
        (Some(tls), lapin::ErrorKind::IOError(_)) if tls.identity.is_none() => format!(
            "over TLS: {text}; if the server wants a client certificate, the options cert and key \
             name one"
        ),
        (Some(_), lapin::ErrorKind::IOError(_)) => format!("over TLS: {text}"),
        _ => text,
    }
}

/// Closes a connection for questions that is replaced, once the last of them is answered.
async fn retire(wire: Arc<Wire>) {
    let until = Instant::now() + LAST_QUESTIONS;
    while Arc::strong_count(&wire) > 1 && Instant::now() < until {
        tokio::time::sleep(LOOK).await;
    }
    let goodbye = wire.connection.close(200, "worn".into());
    let _ = tokio::time::timeout(Duration::from_secs(2), goodbye).await;
    wire.dead.send_replace(true);
}

/// Waits for the connection to break, and says why. A channel's errors are told here too, and end
/// nothing but their channel.
async fn death(connection: &Connection) -> String {
    let mut events = std::pin::pin!(connection.events_listener());
    let mut why = "it was closed".to_owned();
    while connection.status().connected() {
        match tokio::time::timeout(LOOK, events.next()).await {
            Ok(Some(lapin::Event::Error(error))) => why = super::fault::text(&error),
            Ok(Some(_)) | Err(_) => {}
            Ok(None) => break,
        }
    }
    why
}

async fn connect(
    endpoint: &Endpoint,
    host: &Host,
    heartbeat: Duration,
    name: &str,
) -> lapin::Result<Connection> {
    let external = endpoint.user.is_none()
        && endpoint
            .tls
            .as_ref()
            .is_some_and(|tls| tls.identity.is_some());
    let uri = AMQPUri {
        scheme: if endpoint.tls.is_some() {
            AMQPScheme::AMQPS
        } else {
            AMQPScheme::AMQP
        },
        authority: AMQPAuthority {
            userinfo: AMQPUserInfo {
                username: endpoint.user.clone().unwrap_or_else(|| "guest".into()),
                password: endpoint
                    .password
                    .as_ref()
                    .map_or("guest", |password| password.expose_secret())
                    .into(),
            },
            host: host.name.clone(),
            port: host.port,
        },
        vhost: endpoint.path.clone().unwrap_or_else(|| "/".into()),
        query: AMQPQueryString {
            heartbeat: Some(
                u16::try_from(heartbeat.as_secs())
                    .unwrap_or(u16::MAX)
                    .max(1),
            ),
            auth_mechanism: external.then_some(SASLMechanism::External),
            ..AMQPQueryString::default()
        },
    };
    let properties =
        ConnectionProperties::default().with_connection_name(format!("wilco {name}").into());
    let tls = endpoint
        .tls
        .as_ref()
        .map_or_else(OwnedTLSConfig::default, |tls| OwnedTLSConfig {
            identity: tls.identity.as_ref().map(|identity| OwnedIdentity::PKCS8 {
                pem: identity.certificate.clone(),
                key: identity.key.clone(),
            }),
            cert_chain: tls
                .authorities
                .as_ref()
                .map(|pem| String::from_utf8_lossy(pem).into_owned()),
        });
    stream::connect(uri, tls, properties).await
}
