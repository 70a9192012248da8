//! Section Q: queue management, the control plane's alone.

mod declare;
mod delete;
mod lifetime;
mod names;
mod status;

pub use declare::*;
pub use delete::*;
pub use lifetime::*;
pub use names::*;
pub use status::*;
