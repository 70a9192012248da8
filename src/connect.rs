//! The backend behind a URL.

use std::{sync::Arc, time::Duration};

use crate::{broker::Broker, broker_url::BrokerUrl, deadline::Deadline, error::Result};

/// How long [`connect`] waits for a broker that is not there.
const PATIENCE: Duration = Duration::from_secs(10);

/// Connects to the broker at this URL (see [`BrokerUrl`]), waiting for it for ten seconds at the most.
///
/// Ok means that the broker was reached, and that it is one that wilco can keep its promise on.
///
/// # Errors
/// As [`connect_by`].
///
/// # Cancel safety
/// Safe: dropped early, nothing is left connected.
pub async fn connect(url: &str) -> Result<Arc<dyn Broker>> {
    connect_by(url, Deadline::after(PATIENCE)).await
}

/// Connects as [`connect`] does, waiting for a broker that is not there until the deadline (law F5).
///
/// # Errors
/// [`InvalidUrl`](crate::ErrorKind::InvalidUrl) before any I/O;
/// [`BrokerUnreachable`](crate::ErrorKind::BrokerUnreachable) at the deadline, with what was in the way;
/// [`AuthRefused`](crate::ErrorKind::AuthRefused) at once;
/// [`ForeignFile`](crate::ErrorKind::ForeignFile) for a database of another program.
///
/// # Cancel safety
/// Safe: dropped early, nothing is left connected.
pub async fn connect_by(url: &str, deadline: Deadline) -> Result<Arc<dyn Broker>> {
    let url: BrokerUrl = url.parse()?;
    match url.scheme() {
        #[cfg(feature = "embedded")]
        "sqlite" | "memory" => crate::backends::embedded::connect(&url).await,
        #[cfg(feature = "rabbitmq")]
        "amqp" | "amqps" => crate::backends::rabbitmq::connect(&url, deadline).await,
        #[cfg(feature = "nats")]
        "nats" | "tls" => crate::backends::nats::connect(&url, deadline).await,
        #[cfg(feature = "redis")]
        "redis" | "rediss" | "redis-sentinel" | "rediss-sentinel" => {
            crate::backends::redis::connect(&url, deadline).await
        }
        scheme => unreachable!("the parser let the scheme {scheme} pass by {deadline:?}"),
    }
}
