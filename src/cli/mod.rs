//! The command, room by room: what can be typed, what each subcommand does, how it is shown.

mod args;
mod ask;
mod bench;
mod credentials;
mod doctor;
mod explain;
mod fleet;
mod guest;
mod keys;
mod machines;
mod output;
mod place;
mod problem;
mod program;
mod progress;
mod provision;
mod queues;
mod status;
mod summary;
mod tied;
mod watch;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use tracing_subscriber::EnvFilter;

use args::{Cli, Command};
use output::Output;
use problem::{Exit, Outcome, Problem};

/// Parses, runs, and turns a problem into one message and its exit code.
pub(crate) fn main() -> ExitCode {
    if let Some(code) = tied::become_it(std::env::args_os()) {
        return code;
    }
    let cli = Cli::parse();
    let output = Output {
        json: cli.global.json,
    };
    let result = set_up_logging().and_then(|()| run(cli, output));
    result.unwrap_or_else(|problem| {
        output.problem(&problem);
        problem.exit.code()
    })
}

fn run(cli: Cli, output: Output) -> Outcome {
    let Cli { global, command } = cli;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Problem::new(Exit::File, format!("cannot start threads: {error}")))?;
    let result = runtime.block_on(async {
        match command {
            Command::Provision(args) => provision::run(&global, args, output).await,
            Command::Guest(args) => guest::run(&global, args, output).await,
            Command::Ping(args) => ask::ping(&global, args, output).await,
            Command::Call(args) => ask::call(&global, args, output).await,
            Command::Cast(args) => ask::cast(&global, args, output).await,
            Command::Status(args) => status::run(&global, args, output).await,
            Command::Explain(args) => explain::run(&global, args, output).await,
            Command::Queues(_) => queues::list(&global, output).await,
            Command::Dead(args) => queues::dead(&global, args.action, output).await,
            Command::Cancel(args) => status::cancel(&global, args, output).await,
            Command::Delete(args) => status::delete(&global, args, output).await,
            Command::Credentials(args) => credentials::run(&global, args.action, output).await,
            Command::Doctor(args) => doctor::run(&global, args, output).await,
            Command::Bench(args) => bench::run(&global, args, output).await,
            Command::Keys(args) => keys::run(args.action, output),
            Command::Completions(args) => {
                let mut command = Cli::command();
                // Not into stdout itself: clap_complete panics when a reader goes away.
                let mut script = Vec::new();
                clap_complete::generate(args.shell, &mut command, "wilco", &mut script);
                output::raw(&script);
                Ok(ExitCode::SUCCESS)
            }
        }
    });
    // A blocked read of stdin or a stuck file must not keep a finished command alive.
    runtime.shutdown_background();
    result
}

/// `WILCO_LOG=debug` and the like, to stderr; nothing without it.
fn set_up_logging() -> Outcome<()> {
    let Ok(filter) = std::env::var("WILCO_LOG") else {
        return Ok(());
    };
    // S4: RabbitMQ's client shows a returned message with its body as a warning, and frames below that;
    // the one of NATS each message, as a trace.
    let bounded = format!("{filter},lapin=error,async_nats=info");
    let filter = EnvFilter::try_new(bounded).map_err(|error| {
        Problem::input(format!(
            "WILCO_LOG is {filter:?}: {error}; expected such as info or wilco=debug"
        ))
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    Ok(())
}
