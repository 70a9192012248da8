//! Every check on the RabbitMQ backend, on a private server.

mod common;

use wilco_conformance::{for_each_check, harnesses::RabbitMq};

const HARNESS: RabbitMq = RabbitMq;

/// What its harness cannot do from outside.
const NOT_RUN: &[&str] = &["f9_an_alarm_refuses_and_loses_nothing"];

for_each_check!(common::tests);
