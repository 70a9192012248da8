//! What the author of a backend brings: a way to a private broker, and a view of it that does not go
//! through the backend under test.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use wilco::{Broker, QueueName, durability::Level};

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
    fn name(&self) -> &'static str;

    /// Starts a broker that nobody else uses, with nothing on it. It is gone when the server is
    /// dropped.
    ///
    /// # Errors
    /// What kept it from starting. For a broker that was asked for that is a failure (law X2).
    async fn start(&self) -> Result<Box<dyn Server>, String>;
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
    /// (law D1).
    pub strongest: Level,
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
            strongest,
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
            strongest,
        }
    }
}
