//! Every check on the RabbitMQ backend, on a private server.

mod common;

use wilco_conformance::{for_each_check, harnesses::RabbitMq};

const HARNESS: RabbitMq = RabbitMq;

/// What its harness cannot do from outside.
const NOT_RUN: &[&str] = &[
    "f6_any_node_killed_loses_nothing",
    "f9_an_alarm_refuses_and_loses_nothing",
];

macro_rules! one {
    (c c11_what_was_buffered_keeps_its_place) => {
        common::check!(c11_what_was_buffered_keeps_its_place, open "fails now and then: see CONTRIBUTING.md");
    };
    (c c12_one_consumer_is_served_the_other_is_told) => {
        common::check!(c12_one_consumer_is_served_the_other_is_told, open "fails now and then: see CONTRIBUTING.md");
    };
    (f $name:ident) => {
        common::check!($name, open "section F on RabbitMQ: see CONTRIBUTING.md");
    };
    (c c13_none_is_lost_around_the_first_attach) => {
        common::check!(c13_none_is_lost_around_the_first_attach, open "takes too long: see CONTRIBUTING.md");
    };
    ($section:ident $name:ident) => {
        common::check!($name);
    };
}

for_each_check!(common::tests);
