//! Every check on the RabbitMQ backend, on a private server.

mod common;

use wilco_conformance::{for_each_check, harnesses::RabbitMq};

const HARNESS: RabbitMq = RabbitMq;

/// What its harness cannot do from outside.
const NOT_RUN: &[&str] = &["f6_any_node_killed_loses_nothing"];

macro_rules! one {
    (c c13_none_is_lost_around_the_first_attach) => {
        common::check!(c13_none_is_lost_around_the_first_attach, open "takes too long: see CONTRIBUTING.md");
    };
    ($section:ident $name:ident) => {
        common::check!($name);
    };
}

for_each_check!(common::tests);
