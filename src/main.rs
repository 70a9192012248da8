//! The `wilco` command.

fn main() {}
