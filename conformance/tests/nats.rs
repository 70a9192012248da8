//! Every check on NATS JetStream.

mod common;

use wilco_conformance::{for_each_check, harnesses::Nats};

const HARNESS: Nats = Nats;

/// What its harness cannot do from outside.
const NOT_RUN: &[&str] = &["f9_an_alarm_refuses_and_loses_nothing"];

macro_rules! one {
    ($section:ident $name:ident) => {
        common::check!($name);
    };
}

for_each_check!(common::tests);
