//! wilco sends a control plane's first command to a new machine, so that it is never lost, never run
//! twice, and never run by a machine that was given up.
//!
//! The house, from the ground up:
//! - vocabulary: [`names`], [`message`], [`deadline`], [`durability`], and the one [`Error`];
//! - [`broker`]: the trait that every backend keeps, and [`connect`] that picks one by URL;
//! - backends: `embedded` on SQLite.

mod backends;
pub mod broker;
mod broker_url;
mod connect;
pub mod deadline;
pub mod durability;
mod error;
pub mod message;
pub mod names;
#[cfg(feature = "sqlite")]
mod sqlite;

pub use broker::Broker;
pub use broker_url::BrokerUrl;
pub use connect::connect;
pub use deadline::Deadline;
pub use error::{Error, ErrorKind, Outcome, Result};
pub use message::{CommandId, Headers, Message, MessageId};
pub use names::{GuestAddress, GuestId, Incarnation, QueueName};
