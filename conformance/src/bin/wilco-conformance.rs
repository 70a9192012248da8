//! The command `wilco-conformance`.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    wilco_conformance::command::main().await
}
