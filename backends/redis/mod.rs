//! Redis Streams.

use std::sync::Arc;

use crate::{
    broker::Broker,
    broker_url::BrokerUrl,
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
};

pub(crate) async fn connect(url: &BrokerUrl, deadline: Deadline) -> Result<Arc<dyn Broker>> {
    let endpoint = crate::endpoint::Endpoint::of(url, 1, false)?;
    Err(Error::new(
        ErrorKind::BrokerUnreachable,
        format!(
            "{endpoint:?} by {deadline:?} {:?}",
            crate::endpoint::TLS_OPTIONS
        ),
    ))
}
