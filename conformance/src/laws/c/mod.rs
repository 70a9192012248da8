//! Section C: consume and settle.

mod attach;
mod dead;
mod lease;
mod order;
mod redelivery;
mod retry;
mod settle;

pub use attach::*;
pub use dead::*;
pub use lease::*;
pub use order::*;
pub use redelivery::*;
pub use retry::*;
pub use settle::*;
