//! Every check on NATS JetStream.

mod common;

use wilco_conformance::{for_each_check, harnesses::Nats};

const HARNESS: Nats = Nats;

const NOT_RUN: &[&str] = &[];

for_each_check!(common::tests);
