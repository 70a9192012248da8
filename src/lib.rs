//! wilco sends a control plane's first command to a new machine, so that it is never lost, never run
//! twice, and never run by a machine that was given up.
//!
//! The house, from the ground up:
//! - vocabulary: [`names`], [`message`], [`deadline`], [`durability`], [`GuestCredential`], and the one
//!   [`Error`];
//! - [`broker`]: the trait that every backend keeps, and [`connect`] that picks one by URL;
//! - backends: `embedded` on SQLite, `rabbitmq`, `nats` (JetStream) and `redis` (Streams);
//! - workflow: [`Taskmanager`] with its [`Records`], [`Guest`] with its [`Journal`], and the [`wire`] form
//!   that they speak.
//!
//! With the feature `sign` a guest can run only what its control plane has signed: module `sign` says how.

mod backends;
mod backoff;
pub mod broker;
mod broker_url;
mod connect;
mod credential;
pub mod deadline;
pub mod durability;
#[cfg(feature = "network")]
mod endpoint;
mod error;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(any(feature = "nats", feature = "redis"))]
mod guest_url;
pub mod message;
pub mod names;
#[cfg(feature = "sign")]
pub mod sign;
#[cfg(not(feature = "sign"))]
#[path = "unsigned.rs"]
mod sign;
#[cfg(feature = "sqlite")]
mod sqlite;
pub mod wire;
mod workflow;

pub use broker::Broker;
pub use broker_url::BrokerUrl;
pub use connect::{connect, connect_by};
pub use credential::{CredentialFile, GuestCredential};
pub use deadline::Deadline;
pub use error::{Error, ErrorKind, Outcome, Result};
pub use message::{CommandId, Headers, Message, MessageId, TraceContext};
pub use names::{GuestAddress, GuestId, Incarnation, QueueName};
#[cfg(feature = "sign")]
pub use sign::{KeyId, PublicKey, SigningKey, Trust};
pub use wire::{CommandState, Phase, Pong};
pub use workflow::*;
