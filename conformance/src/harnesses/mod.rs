//! The harnesses that are here, by name.

mod embedded;
mod handles;
mod nats;
pub mod rabbitmq;
mod redis;
mod reference;
mod url;

pub use embedded::{Memory, Sqlite};
pub use nats::{Nats, Nodes};
pub use rabbitmq::RabbitMq;
pub use redis::{Redis, Sentinels};
pub use reference::Reference;
pub use url::Url;

use crate::harness::Harness;

/// Every harness.
#[must_use]
pub fn all() -> Vec<Box<dyn Harness>> {
    vec![
        Box::new(Sqlite),
        Box::new(Memory),
        Box::new(Nats),
        Box::new(RabbitMq),
        Box::new(Redis),
        Box::new(Reference),
    ]
}

/// The harness of this name.
#[must_use]
pub fn find(name: &str) -> Option<Box<dyn Harness>> {
    all().into_iter().find(|harness| harness.name() == name)
}
