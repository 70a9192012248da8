//! The embedded broker, on SQLite.

use std::sync::Arc;

use crate::{broker::Broker, broker_url::BrokerUrl, error::Result};

pub(crate) async fn connect(_url: &BrokerUrl) -> Result<Arc<dyn Broker>> {
    Err(crate::Error::new(
        crate::ErrorKind::Internal,
        "not built yet",
    ))
}
