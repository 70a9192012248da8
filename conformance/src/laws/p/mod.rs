//! Section P: publish.

mod cancel;
mod confirm;
mod crowd;
mod fidelity;

pub use cancel::*;
pub use confirm::*;
pub use crowd::*;
pub use fidelity::*;
