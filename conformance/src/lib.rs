//! The conformance suite: it proves on a real broker that a wilco backend loses nothing, and proves
//! itself on brokers that were broken on purpose.
//!
//! The house, from the ground up:
//! - [`harness`]: what the author of a backend brings, and [`harnesses`]: those that are here;
//! - [`process`]: a broker's server as a private process that can be killed and paused;
//! - [`proxy`]: a network in front of it that can be cut, slowed and made to swallow;
//! - [`check`]: what a check is, what it runs in, what it gives back;
//! - [`ledger`]: the append-only history, and what it says in the end (section L);
//! - [`agent`]: a second process that can be killed and paused;
//! - [`laws`]: the checks, a plain function each, and [`registry`] that lists them;
//! - [`actor`]: a taskmanager or guest as a process that stops at any of its side effects, and [`cases`]:
//!   what the workflow has to come to, whatever dies when (W1 to W40, F7);
//! - [`saboteurs`]: brokers that break one law each, and the check that has to catch them (X1);
//! - [`report`] and [`command`]: running it all and telling what came of it.
//!
//! To hold a backend to the contract, implement [`harness::Harness`] and run [`registry::all`] on it.
//! `examples/writing-a-backend.md` builds one in seven steps.

pub mod actor;
pub mod agent;
pub mod cases;
pub mod check;
pub mod command;
pub mod harness;
pub mod harnesses;
pub mod laws;
pub mod ledger;
pub mod power;
pub mod process;
pub mod proxy;
pub mod reference;
pub mod registry;
pub mod report;
pub mod saboteurs;
mod second;
mod support;
mod workload;
