//! A handle with a guest's credential is otherwise.
//!
//! It calls functions rather than scripts, asks the server nothing about the server, and leaves its reports
//! in a tray of its own, from where whoever collects the reports takes them (`trays`): with a right to
//! append to a stream comes one to trim it, and that stream is everybody's.

use super::scripts::{self, TRAY};
use crate::guest_url::AsGuest;

/// Where its reports are left.
pub(super) fn tray(guest: &AsGuest) -> String {
    scripts::key(&guest.queue, TRAY)
}

/// A channel of its own to which nobody listens.
pub(super) fn nobody(guest: &AsGuest) -> String {
    scripts::key(&guest.queue, "copies")
}
