//! The backend behind a URL.

use std::sync::Arc;

use crate::{broker::Broker, broker_url::BrokerUrl, error::Result};

/// Connects to the broker at this URL (see [`BrokerUrl`]).
///
/// Ok means that the broker was reached, and that it is one that wilco can keep its promise on.
///
/// # Errors
/// [`InvalidUrl`](crate::ErrorKind::InvalidUrl) before any I/O;
/// [`BrokerUnreachable`](crate::ErrorKind::BrokerUnreachable),
/// [`AuthRefused`](crate::ErrorKind::AuthRefused),
/// [`ForeignFile`](crate::ErrorKind::ForeignFile) for a database of another program.
///
/// # Cancel safety
/// Safe: dropped early, nothing is left connected.
pub async fn connect(url: &str) -> Result<Arc<dyn Broker>> {
    let url: BrokerUrl = url.parse()?;
    match url.scheme() {
        #[cfg(feature = "embedded")]
        "sqlite" | "memory" => crate::backends::embedded::connect(&url).await,
        scheme => unreachable!("the parser let the scheme {scheme} pass"),
    }
}
