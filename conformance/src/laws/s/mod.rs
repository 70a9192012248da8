//! Section S: what a guest's credential is worth to the guest, and to one who stole it.

mod credential;

pub use credential::*;
