//! Every check on the RabbitMQ backend, on a private server.

mod common;

use wilco_conformance::{for_each_check, harnesses::RabbitMq};

const HARNESS: RabbitMq = RabbitMq;

/// What its harness cannot do from outside.
const NOT_RUN: &[&str] = &["f6_any_node_killed_loses_nothing"];

macro_rules! one {
    ($section:ident $name:ident) => {
        common::check!($name);
    };
}

for_each_check!(common::tests);
