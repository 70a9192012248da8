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
        common::check!(c11_what_was_buffered_keeps_its_place, open "its consume was late on a starved machine: see CONTRIBUTING.md");
    };
    (c c13_none_is_lost_around_the_first_attach) => {
        common::check!(c13_none_is_lost_around_the_first_attach, open "takes too long: see CONTRIBUTING.md");
    };
    (f f4_cut_behind_every_frame_in_turn) => {
        common::check!(f4_cut_behind_every_frame_in_turn, open "not seen through: see CONTRIBUTING.md");
    };
    ($section:ident $name:ident) => {
        common::check!($name);
    };
}

for_each_check!(common::tests);
