//! The backends, each behind its feature. None knows of another.

#[cfg(feature = "embedded")]
#[path = "../backends/embedded/mod.rs"]
pub(crate) mod embedded;
