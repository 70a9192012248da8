//! Section S: what a guest's credential is worth to the guest and to one who stole it, and what hostile bytes
//! do.

mod credential;
mod litter;

pub use credential::*;
pub use litter::s2_what_no_client_would_send_is_parked;
