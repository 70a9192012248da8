//! Section R: request, reply, ping. What a pong says is the workflow's; here a body is bytes.

mod absent;
mod answers;
mod leaks;

pub use absent::*;
pub use answers::*;
pub use leaks::*;
