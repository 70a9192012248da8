//! The backends, each behind its feature. None knows of another.

#[cfg(all(feature = "embedded", not(unix)))]
compile_error!(
    "the embedded broker needs Unix: processes find one another by its file locks and sockets; \
     build with default-features = false"
);

#[cfg(feature = "embedded")]
#[path = "../backends/embedded/mod.rs"]
pub(crate) mod embedded;

#[cfg(feature = "nats")]
#[path = "../backends/nats/mod.rs"]
pub(crate) mod nats;

#[cfg(feature = "rabbitmq")]
#[path = "../backends/rabbitmq/mod.rs"]
pub(crate) mod rabbitmq;

#[cfg(feature = "redis")]
#[path = "../backends/redis/mod.rs"]
pub(crate) mod redis;
