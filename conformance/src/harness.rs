//! What the author of a backend brings: a way to a private broker, and a view of it that does not go
//! through the backend under test.

use std::{fmt, net::SocketAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use wilco::{Broker, Deadline, GuestAddress, GuestCredential, QueueName, durability::Level};

use crate::check::CheckError;

/// A thing that this harness cannot do here, and why. It is reported as "not run", never as a pass
/// (law X2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unavailable(pub String);

impl Unavailable {
    /// Not available for this reason.
    pub fn because(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Makes private brokers of one kind: every check gets a fresh one.
#[async_trait]
pub trait Harness: Send + Sync + fmt::Debug {
    /// The name in reports and on the command line, such as `sqlite`.
    fn name(&self) -> &str;

    /// Starts a broker that nobody else uses, with nothing on it. It is gone when the server is
    /// dropped.
    ///
    /// With [`Use::Shared`] it may be a part of a process that other checks use too, if that part is
    /// as empty and as private as a process of its own (a virtual host, say): such a check never
    /// restarts, kills or pauses it.
    ///
    /// # Errors
    /// What kept it from starting. For a broker that was asked for that is a failure (law X2).
    async fn start(&self, usage: Use) -> Result<Box<dyn Server>, String>;

    /// Called after each check, when its server is dropped: takes away what the check left on a broker
    /// that goes on living. Nothing to do where the broker went with its server.
    ///
    /// # Errors
    /// A failure if something could not be taken away; unavailable, with the reason, if the check met
    /// what was not the suite's to touch, so that what came of it says nothing.
    async fn sweep(&self) -> Result<(), CheckError> {
        Ok(())
    }
}

/// How a check uses its broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// It leaves the broker's process alone.
    Shared,
    /// It restarts, kills or pauses the broker's process.
    Alone,
    /// It wants a broker of several nodes, to break one after the other ([`Server::cluster`]). A harness
    /// that can start one node alone starts that.
    Cluster,
    /// It issues credentials to guests (law S1): the broker is set up for that, and handles are those of
    /// a control plane that may. It leaves the broker's process alone.
    Credentials,
}

/// One private broker, from its own side.
#[async_trait]
pub trait Server: Send + Sync + fmt::Debug {
    /// What is known of this broker without asking the backend under test.
    fn facts(&self) -> Facts;

    /// Opens one more handle through the backend under test. Several handles stand for several
    /// processes.
    ///
    /// # Errors
    /// Those of the backend.
    async fn connect(&self) -> wilco::Result<Arc<dyn Broker>>;

    /// Everything that the broker still holds of this name, one line each, as the broker's own
    /// administration shows it (law Q7). Never read through the backend under test.
    ///
    /// # Errors
    /// [`Unavailable`] if there is no such view.
    async fn remains(&self, queue: &QueueName) -> Result<Vec<String>, Unavailable>;

    /// Stops the broker and starts it again on the same data. Handles that were open may be closed
    /// by it; what they had unsettled is given back.
    ///
    /// # Errors
    /// [`Unavailable`] if nothing could outlive that.
    async fn restart(&self) -> Result<(), Unavailable>;

    /// A URL that reaches the broker with credentials which it refuses (case W4).
    ///
    /// # Errors
    /// [`Unavailable`] if it asks nobody for any.
    fn refused_url(&self) -> Result<String, Unavailable> {
        Err(Unavailable::because(
            "this broker asks nobody for credentials",
        ))
    }

    /// The URL of a control plane that may issue credentials to guests (law S1), on a server that was
    /// started with [`Use::Credentials`].
    ///
    /// # Errors
    /// [`Unavailable`] where there is no such thing.
    fn admin_url(&self) -> Result<String, Unavailable> {
        Err(Unavailable::because(
            "whoever can reach this broker can do everything on it",
        ))
    }

    /// Tries what a guest's credential must not allow, each on a connection of the plain client, as one
    /// who stole it would, and says what the server answered. At least each of [`FORBIDDEN`] is tried, or
    /// said to be no such thing on this broker. What was allowed is left as it is: it is a failure.
    ///
    /// # Errors
    /// [`Unavailable`] as [`Server::admin_url`].
    async fn forbidden(&self, _theft: &Theft<'_>) -> Result<Vec<Attempt>, Unavailable> {
        Err(Unavailable::because(
            "whoever can reach this broker can do everything on it",
        ))
    }

    /// Puts there what no client would send, byte by byte over the broker's own protocol: headers that are
    /// none, text that is no text, tables too deep for any stack. Says how many pieces the broker took.
    ///
    /// # Errors
    /// [`Unavailable`] where there is no protocol to abuse.
    async fn litter(&self, _place: Litter<'_>) -> Result<usize, Unavailable> {
        Err(Unavailable::because(
            "nothing is sent to this broker but by its library",
        ))
    }

    /// The broker's process and its network, to break them (section F).
    ///
    /// # Errors
    /// [`Unavailable`] if there is no such process.
    fn faults(&self) -> Result<&dyn Faults, Unavailable>;

    /// The nodes of a broker that was started with [`Use::Cluster`], to break them (law F6).
    ///
    /// # Errors
    /// [`Unavailable`] if this harness starts a single node.
    fn cluster(&self) -> Result<&dyn Cluster, Unavailable> {
        Err(Unavailable::because(
            "this harness starts a broker of one node, and the law needs several",
        ))
    }
}

/// A guest's credential in the hands of one who stole it, and whom it must not reach.
#[derive(Debug)]
pub struct Theft<'a> {
    /// Whose credential it is.
    pub own: &'a GuestAddress,
    /// It.
    pub credential: &'a GuestCredential,
    /// What connects with it: [`GuestCredential::url`], its files stored. A secret.
    pub url: &'a str,
    /// Another guest of the same control plane, with a queue, a message in it, a dead letter and an
    /// attached lane.
    pub other: &'a GuestAddress,
    /// Where both publish their reports.
    pub reports: &'a QueueName,
}

/// Where litter is put, and by whom.
#[derive(Clone, Copy, Debug)]
pub enum Litter<'a> {
    /// Into this queue, by one who may do everything.
    Queue(&'a QueueName),
    /// To where this guest's reports go, with its credential.
    Reports(&'a Theft<'a>),
}

/// What a guest's credential must not allow: what is done, and on what.
pub const FORBIDDEN: &[(&str, On)] = &[
    ("read", On::OtherQueue),
    ("write", On::OtherQueue),
    ("declare", On::OtherQueue),
    ("delete", On::OtherQueue),
    ("purge", On::OtherQueue),
    ("bind", On::OtherQueue),
    ("read", On::OtherDeadLetters),
    ("write", On::OtherDeadLetters),
    ("purge", On::OtherDeadLetters),
    ("delete", On::OtherDeadLetters),
    ("read", On::OtherLane),
    ("write", On::OtherLane),
    ("answer", On::OtherLane),
    ("declare", On::OtherLane),
    ("delete", On::OtherLane),
    ("write", On::OwnQueue),
    ("declare", On::OwnQueue),
    ("delete", On::OwnQueue),
    ("bind", On::OwnQueue),
    ("read", On::Reports),
    ("delete", On::Reports),
    ("purge", On::Reports),
    ("declare", On::Broker),
    ("list", On::Broker),
    ("administer", On::Broker),
];

/// On what something is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum On {
    /// The guest's own queue.
    OwnQueue,
    /// Another guest's queue.
    OtherQueue,
    /// Another guest's dead letters.
    OtherDeadLetters,
    /// Another guest's lane: its requests, and the answers to them.
    OtherLane,
    /// The queue of reports.
    Reports,
    /// The broker: queues that are nobody's, all names, users and rights.
    Broker,
}

/// Something that was tried with a stolen credential.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// What, as [`FORBIDDEN`] names it, or of the harness's own choice.
    pub what: &'static str,
    /// On what.
    pub on: On,
    /// How: the command as it was sent.
    pub how: String,
    /// What the server answered.
    pub answer: Answer,
}

/// What a server answered to one who may not.
#[derive(Clone, Debug)]
pub enum Answer {
    /// It refused, in these words.
    Refused(String),
    /// It did it, or something other than a refusal happened.
    Allowed(String),
    /// There is no such thing to try on this broker, for this reason.
    NoSuchThing(&'static str),
}

impl Attempt {
    /// Something that was tried this way.
    pub fn new(what: &'static str, on: On, how: impl Into<String>, answer: Answer) -> Self {
        Self {
            what,
            on,
            how: how.into(),
            answer,
        }
    }
}

/// A broker of several nodes, from the side of one who breaks them. A node is all that one machine runs.
/// Handles reach whichever of them are there. Data, addresses and settings stay the same over all of it.
#[async_trait]
pub trait Cluster: Send + Sync + fmt::Debug {
    /// How many nodes there are; they are numbered from 0.
    fn nodes(&self) -> usize;

    /// The node that leads for this queue now, as the broker itself says.
    ///
    /// # Errors
    /// None leads, or the broker does not say.
    async fn leader(&self, queue: &QueueName) -> Result<usize, Unavailable>;

    /// How long the broker may take to serve again by itself after it lost one node, the leader too.
    fn failover(&self) -> Duration;

    /// Kills a node as `kill -9` does, and returns when it is gone.
    ///
    /// # Errors
    /// It could not be killed.
    async fn kill(&self, node: usize) -> Result<(), Unavailable>;

    /// Starts a killed node again on its data, and returns when the cluster is whole: each node has what
    /// the others have, so that the next loss of one is the loss of one only.
    ///
    /// # Errors
    /// It did not come to that.
    async fn start(&self, node: usize) -> Result<(), Unavailable>;

    /// Stops a node where it stands (SIGSTOP): its sockets stay open and nothing answers.
    ///
    /// # Errors
    /// It could not be stopped.
    fn pause(&self, node: usize) -> Result<(), Unavailable>;

    /// Lets a paused node go on, and returns when the cluster is whole.
    ///
    /// # Errors
    /// It did not come to that.
    async fn resume(&self, node: usize) -> Result<(), Unavailable>;
}

/// A broker that is a process of its own, reached over TCP, from the side of one who breaks it. Data,
/// address and settings stay the same over all of it.
#[async_trait]
pub trait Faults: Send + Sync + fmt::Debug {
    /// Kills the process as `kill -9` does, and returns when it is gone.
    ///
    /// # Errors
    /// It could not be killed.
    async fn kill(&self) -> Result<(), Unavailable>;

    /// Starts the process again on the same data and returns when it takes connections.
    ///
    /// # Errors
    /// It did not come up.
    async fn start(&self) -> Result<(), Unavailable>;

    /// Stops the process where it stands (SIGSTOP): its sockets stay open and nothing answers.
    ///
    /// # Errors
    /// It could not be stopped.
    fn pause(&self) -> Result<(), Unavailable>;

    /// Lets a paused process go on.
    ///
    /// # Errors
    /// It could not be.
    fn resume(&self) -> Result<(), Unavailable>;

    /// Where the process listens.
    fn address(&self) -> SocketAddr;

    /// The URL that reaches the broker by way of another address: a proxy's.
    fn url_via(&self, proxy: SocketAddr) -> String;

    /// Opens a handle through the backend under test by way of another address, waiting until the
    /// deadline for what is not there.
    ///
    /// # Errors
    /// Those of the backend.
    async fn connect_via(
        &self,
        proxy: SocketAddr,
        deadline: Deadline,
    ) -> wilco::Result<Arc<dyn Broker>> {
        wilco::connect_by(&self.url_via(proxy), deadline).await
    }

    /// Makes the broker refuse to store, as it does when its memory or disk runs out, or lets it
    /// store again (law F9).
    ///
    /// # Errors
    /// [`Unavailable`] where that cannot be done from here.
    async fn alarm(&self, _on: bool) -> Result<(), Unavailable> {
        Err(Unavailable::because(
            "this harness has no way to raise a memory or disk alarm",
        ))
    }
}

/// What is known of a broker without asking the backend under test.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Facts {
    /// The broker's name and version.
    pub version: String,
    /// Where another process reaches it; `None` if no other process can, with the reason in
    /// [`Facts::private_because`].
    pub url: Option<String>,
    /// Why no other process can reach it.
    pub private_because: &'static str,
    /// The time within which the backend says that a consumer which vanished is noticed: its
    /// messages come again (law C1), and its lane is `NoConsumer` (law R3).
    pub takeover: Duration,
    /// The most durable that this broker can be as it was started: what a report may not exceed
    /// (law D1). `None` if it was not started by the suite and nobody told.
    pub strongest: Option<Level>,
}

impl Facts {
    /// The facts of a broker that other processes reach at `url`.
    #[must_use]
    pub fn shared(version: String, url: String, takeover: Duration, strongest: Level) -> Self {
        Self {
            version,
            url: Some(url),
            private_because: "",
            takeover,
            strongest: Some(strongest),
        }
    }

    /// The facts of a broker that lives inside this process.
    #[must_use]
    pub fn private(
        version: String,
        because: &'static str,
        takeover: Duration,
        strongest: Level,
    ) -> Self {
        Self {
            version,
            url: None,
            private_because: because,
            takeover,
            strongest: Some(strongest),
        }
    }
}
