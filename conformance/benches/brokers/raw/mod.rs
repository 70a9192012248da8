//! The clients alone, used as one would by hand at the same safety.

mod nats;
mod rabbitmq;
mod redis;

use crate::Side;

/// What all of them are about, on the broker.
const NAME: &str = "bare";

pub(crate) async fn connect(broker: &str, url: &str) -> Box<dyn Side> {
    match broker {
        "rabbitmq" => Box::new(rabbitmq::connect(url).await),
        "nats" => Box::new(nats::connect(url).await),
        _ => Box::new(redis::connect(url).await),
    }
}
