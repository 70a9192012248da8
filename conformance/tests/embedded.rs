//! Every check on the embedded broker in a file.

mod common;

use wilco_conformance::{for_each_check, harnesses::Sqlite};

const HARNESS: Sqlite = Sqlite;

const NOT_RUN: &[&str] = &[];

for_each_check!(common::tests);
