//! A control plane in one screen: provisions one machine, then speaks to it.
//!
//! Start `cargo run --example agent` in another terminal, before or after this one.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use wilco::{ProvisionOutcome, SqliteRecords, Taskmanager};

/// What this service sends to a new machine: any type that serde can write.
#[derive(Serialize)]
struct Prepare<'a> {
    datastore: &'a str,
    version: &'a str,
    databases: &'a [&'a str],
}

#[derive(Debug, Deserialize)]
struct User {
    name: String,
    host: String,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let broker = wilco::connect("sqlite:example.db").await?;
    let records = SqliteRecords::open("example-records.db").await?;
    let taskmanager = Taskmanager::new(broker, records).await?; // resumes what a crash left

    let prepare = Prepare {
        datastore: "mysql",
        version: "8.0.36",
        databases: &["orders"],
    };
    let outcome = taskmanager
        .provision("vm-0042", &prepare)
        .boot_deadline(Duration::from_secs(120))
        .await?;
    tell(format_args!("vm-0042 {outcome}"));
    if !matches!(outcome, ProvisionOutcome::Succeeded { .. }) {
        return Ok(());
    }

    let guest = taskmanager.guest("vm-0042");
    let pong = guest.ping(Duration::from_millis(500)).await?; // NoConsumer in a round trip
    tell(format_args!("vm-0042 is {}", pong.phase));
    let users: Vec<User> = guest.call("list_users", &()).await?;
    for user in users {
        tell(format_args!("{}@{}", user.name, user.host));
    }
    Ok(())
}

#[allow(clippy::print_stdout, reason = "an example speaks to its reader")]
fn tell(text: std::fmt::Arguments<'_>) {
    println!("{text}");
}
