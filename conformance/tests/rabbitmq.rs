//! Every check on the RabbitMQ backend, on a private server.

mod common;

use wilco_conformance::{for_each_check, harnesses::RabbitMq};

const HARNESS: RabbitMq = RabbitMq;

const NOT_RUN: &[&str] = &[];

for_each_check!(common::tests);
