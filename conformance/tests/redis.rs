//! Every check on Redis Streams, on a real server.

mod common;

use wilco_conformance::{for_each_check, harnesses::Redis};

const HARNESS: Redis = Redis;

const NOT_RUN: &[&str] = &[];

macro_rules! one {
    ($section:ident $name:ident) => {
        common::check!($name);
    };
}

for_each_check!(common::tests);
