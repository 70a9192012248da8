//! A machine's agent in one screen: runs prepare once, then serves calls until Ctrl-C.

use serde::{Deserialize, Serialize};
use wilco::{Context, Failure, Guest, SqliteJournal};

/// What the control plane sends: any type that serde can read.
#[derive(Deserialize)]
struct Prepare {
    datastore: String,
    version: String,
    databases: Vec<String>,
}

#[derive(Serialize)]
struct User {
    name: String,
    host: String,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let broker = wilco::connect("sqlite:example.db").await?;
    let journal = SqliteJournal::open("example-journal.db").await?;
    let shutdown = async { _ = tokio::signal::ctrl_c().await };

    Guest::attach(broker, "vm-0042", journal)
        .wait(std::time::Duration::from_secs(300)) // without it: NoQueue if it is not there yet
        .await?
        .on_prepare(install)
        .on("list_users", list_users)
        .serve(shutdown)
        .await?;
    Ok(())
}

/// Runs once, whatever is sent again, restarted or killed.
async fn install(prepare: Prepare, cx: Context) -> Result<String, Failure> {
    cx.progress("installing packages").await?;
    let Prepare {
        datastore,
        version,
        databases,
    } = prepare;
    if databases.is_empty() {
        return Err(Failure::new("there is no database to create"));
    }
    Ok(format!(
        "{datastore} {version} with {}",
        databases.join(", ")
    ))
}

async fn list_users(_: (), _: Context) -> Result<Vec<User>, Failure> {
    let root = User {
        name: "root".into(),
        host: "localhost".into(),
    };
    Ok(vec![root])
}
