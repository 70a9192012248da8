//! What can be typed.

use std::{num::NonZeroU32, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use wilco::{GuestId, Incarnation, MessageId};

use super::problem::EXIT_CODES;

/// A control plane's first command to a new machine: never lost, never run twice, never run by a
/// machine that was given up.
#[derive(Debug, Parser)]
#[command(name = "wilco", version, after_help = EXIT_CODES, propagate_version = true)]
pub(super) struct Cli {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(subcommand)]
    pub(super) command: Command,
}

/// What every subcommand takes.
#[derive(Clone, Debug, Args)]
pub(super) struct Global {
    /// The broker: sqlite:relative/path.db or sqlite:///absolute/path.db
    #[arg(
        long,
        global = true,
        env = "WILCO_BROKER",
        hide_env_values = true,
        help_heading = "Everywhere",
        value_name = "URL",
        default_value = "sqlite:wilco.db"
    )]
    pub(super) broker: String,
    /// The control plane's records [default: beside the broker's file, ending in -records.db]
    #[arg(
        long,
        global = true,
        env = "WILCO_RECORDS",
        hide_env_values = true,
        help_heading = "Everywhere",
        value_name = "PATH"
    )]
    pub(super) records: Option<PathBuf>,
    /// Sign what is sent to guests with the key in this file (see wilco keys --help)
    #[arg(
        long,
        global = true,
        env = "WILCO_SIGN_KEY",
        help_heading = "Everywhere",
        value_name = "PATH"
    )]
    pub(super) sign_key: Option<PathBuf>,
    /// Answer in JSON, one object a line
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub(super) json: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    Provision(Provision),
    Guest(GuestArgs),
    Ping(Ping),
    Call(Call),
    Cast(Cast),
    Status(Status),
    Explain(Explain),
    Queues(Queues),
    Dead(Dead),
    Cancel(Cancel),
    Delete(Delete),
    Credentials(Credentials),
    Doctor(Doctor),
    Bench(Bench),
    Keys(Keys),
    Completions(Completions),
}

/// Give every guest of a fleet file its first command, and wait for the outcomes
///
/// A fleet file has one guest a line, in JSON:
///
///   {"id":"vm-1","prepare":{…},"deadlines":{"boot":"2m","accept":"30s","progress":"5m","total":"30m"},
///    "policy":"ping_first","env":{"BOOT_DELAY":"4"}}
///
/// Only id and prepare are needed. A malformed line is reported with its line and column and harms no
/// other. Everything is recorded before it is done: after Ctrl-C or a crash the same command goes on
/// where it was, and guests with a recorded outcome are only shown.
///
/// With --json each line has an event: malformed, state (a transition), and at the end for each guest
/// outcome or problem, and one summary.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  wilco provision fleet.jsonl
  wilco provision examples/fleet.jsonl --spawn examples/machine.sh
  generate-fleet | wilco provision - --json | jq 'select(.event == \"outcome\")'
  wilco provision fleet.jsonl --again      # another machine for those that did not succeed")]
pub(super) struct Provision {
    /// The fleet file; - is stdin
    pub(super) fleet: PathBuf,
    /// Start this program once per guest, as its machine
    ///
    /// It gets WILCO_GUEST, WILCO_INCARNATION, WILCO_BROKER, WILCO_EXE (this wilco) and the line's env,
    /// and runs until SIGTERM. If it ends before the outcome is known, the machine counts as failed,
    /// except with exit code 4: another machine of this guest runs already. It is not started for
    /// guests that answer a ping or whose outcome is recorded.
    #[arg(long, value_name = "PROGRAM")]
    pub(super) spawn: Option<PathBuf>,
    /// Provision those that failed or were not delivered again, as a new incarnation
    #[arg(long)]
    pub(super) again: bool,
    /// Give each machine a credential of its own on the broker, revoked when it is given up
    ///
    /// With --spawn the machine's WILCO_BROKER has it; without, wilco credentials issue makes it.
    #[arg(long)]
    pub(super) credentials: bool,
    /// How many guests are provisioned at once
    #[arg(long, value_name = "N", default_value = "1000")]
    pub(super) concurrency: NonZeroU32,
}

/// Be a guest: wait for the queue, run programs for commands, report
///
/// The program runs once per command with the payload on stdin and WILCO_GUEST, WILCO_INCARNATION,
/// WILCO_COMMAND and WILCO_ATTEMPT in its environment. Exit status 0 is success and its stdout, as
/// JSON or as text, the result (at most 256 KiB). Anything else is a failure, and the end of its stderr
/// the reason.
///
/// SIGTERM and SIGINT end the guest gracefully: a program that runs gets 30 s to end, and is killed then.
/// A command whose program did not end, because it was killed or the guest or its machine was, is not
/// run again but reported as failed, unless --on-interrupt run-again says that the program can bear it.
/// On Linux a program is killed with its guest, whatever kills that; what the program itself started is
/// not. Elsewhere it goes on without it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  wilco guest vm-1 --exec ./prepare.sh
  wilco guest vm-1 --exec ./prepare.sh --on list_users=./list-users.sh --wait 10m")]
pub(super) struct GuestArgs {
    /// The guest's id
    pub(super) id: GuestId,
    /// The program that runs the prepare command
    #[arg(long, value_name = "PROGRAM")]
    pub(super) exec: PathBuf,
    /// A program for another kind of command or call; can be given many times
    #[arg(long = "on", value_name = "KIND=PROGRAM", value_parser = handler)]
    pub(super) handlers: Vec<(MessageId, PathBuf)>,
    /// Which machine under this id this is
    #[arg(long, value_name = "N", default_value = "1")]
    pub(super) incarnation: Incarnation,
    /// The guest's journal [default: wilco-guest-<id>.<incarnation>.db]
    #[arg(long, value_name = "PATH")]
    pub(super) journal: Option<PathBuf>,
    /// How long to wait for the queue, and for the broker
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = duration)]
    pub(super) wait: Duration,
    /// What to do at the start about a prepare that was running when the guest was killed
    #[arg(long, value_enum, value_name = "CHOICE", default_value = "fail")]
    pub(super) on_interrupt: OnInterrupt,
    /// Run only what was signed by a key whose public half is in this file, one a line
    #[arg(long, env = "WILCO_TRUST", value_name = "PATH")]
    pub(super) trust: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum OnInterrupt {
    /// Report it as failed
    Fail,
    /// Run it again
    RunAgain,
}

/// Ask a guest whether it is there
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  wilco ping vm-1
  wilco ping vm-1 --count 1000 --json")]
pub(super) struct Ping {
    #[command(flatten)]
    pub(super) guest: Address,
    /// How many times
    #[arg(long, short, value_name = "N", default_value = "1")]
    pub(super) count: NonZeroU32,
    /// How long to wait for each answer
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = duration)]
    pub(super) timeout: Duration,
}

/// Which guest, and which machine of it.
#[derive(Clone, Debug, Args)]
pub(super) struct Address {
    /// The guest's id
    pub(super) id: GuestId,
    /// Which machine under this id [default: the one in the records, or 1]
    #[arg(long, value_name = "N")]
    pub(super) incarnation: Option<Incarnation>,
}

/// Call a guest and print its answer
///
/// The guest is pinged first: without one the call fails at once, and nothing is left queued.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  wilco call vm-1 list_users
  wilco call vm-1 create_user '{\"name\":\"report\"}' --timeout 30s")]
pub(super) struct Call {
    #[command(flatten)]
    pub(super) guest: Address,
    /// The kind of call
    pub(super) kind: MessageId,
    /// Its arguments, in JSON
    #[arg(default_value = "null")]
    pub(super) payload: String,
    /// How long to wait for the answer
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration)]
    pub(super) timeout: Duration,
}

/// Send a guest a command and print the command's id; `wilco status --command` tells what became of it
///
/// The guest is pinged first: without one the cast fails at once, and nothing is queued.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  wilco cast vm-1 restart
  wilco cast vm-1 apply_overrides '{\"max_connections\":500}'")]
pub(super) struct Cast {
    #[command(flatten)]
    pub(super) guest: Address,
    /// The kind of command
    pub(super) kind: MessageId,
    /// Its arguments, in JSON
    #[arg(default_value = "null")]
    pub(super) payload: String,
}

/// Show what is recorded of every guest, of one guest, or what a guest knows of one command
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  wilco status
  wilco status --watch
  wilco status vm-1 --json
  wilco status vm-1 --command 0199…")]
pub(super) struct Status {
    /// The guest's id
    pub(super) id: Option<GuestId>,
    /// Show the whole fleet live, on a terminal, until q is pressed
    #[arg(long, conflicts_with = "id")]
    pub(super) watch: bool,
    /// Ask the guest what became of this command
    #[arg(long, value_name = "COMMAND", requires = "id")]
    pub(super) command: Option<MessageId>,
    /// Which machine under this id [default: the one in the records, or 1]
    #[arg(long, value_name = "N", requires = "id")]
    pub(super) incarnation: Option<Incarnation>,
}

/// Say on one screen where a guest's provisioning is, what it waits for, and what to do
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  wilco explain vm-1")]
pub(super) struct Explain {
    /// The guest's id
    pub(super) id: GuestId,
}

/// Show what every queue on the broker holds
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  wilco queues\n  wilco queues --json")]
pub(super) struct Queues {}

/// List, read and send back dead letters
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  wilco dead list
  wilco dead list vm-1
  wilco dead show vm-1 <KEY>
  wilco dead redrive vm-1 <KEY>
  wilco dead redrive vm-1 --all")]
pub(super) struct Dead {
    #[command(subcommand)]
    pub(super) action: DeadAction,
}

#[derive(Debug, Subcommand)]
pub(super) enum DeadAction {
    /// List dead letters, of one guest or of all queues
    List {
        /// The guest's id, or a queue's full name
        queue: Option<String>,
        /// Which machine under this id [default: the one in the records, or 1]
        #[arg(long, value_name = "N", requires = "queue")]
        incarnation: Option<Incarnation>,
    },
    /// Show one dead letter with its headers and body
    Show(DeadLetterArgs),
    /// Send dead letters back to the end of their queue
    #[command(override_usage = "\
wilco dead redrive <QUEUE> <KEYS>...
       wilco dead redrive <QUEUE> --all")]
    Redrive {
        /// The guest's id, or a queue's full name
        queue: String,
        /// Which dead letters, as `dead list` names them
        #[arg(required_unless_present = "all")]
        keys: Vec<String>,
        /// All of this queue
        #[arg(long, conflicts_with = "keys")]
        all: bool,
        /// Which machine under this id [default: the one in the records, or 1]
        #[arg(long, value_name = "N")]
        incarnation: Option<Incarnation>,
    },
}

#[derive(Debug, Args)]
pub(super) struct DeadLetterArgs {
    /// The guest's id, or a queue's full name
    pub(super) queue: String,
    /// Which dead letter, as `dead list` names it
    pub(super) key: String,
    /// Which machine under this id [default: the one in the records, or 1]
    #[arg(long, value_name = "N")]
    pub(super) incarnation: Option<Incarnation>,
}

/// Give a guest up: take its prepare back unless it was accepted already
///
/// One process at a time owns the records: stop a provision that runs on them first.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  wilco cancel vm-1")]
pub(super) struct Cancel {
    /// The guest's id
    pub(super) id: GuestId,
}

/// Delete what the broker holds of a guest; a late machine of it is kept out
///
/// One process at a time owns the records: stop a provision that runs on them first.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  wilco delete vm-1")]
pub(super) struct Delete {
    /// The guest's id
    pub(super) id: GuestId,
}

/// Make, look for, or take back what one machine connects to the broker with
///
/// It is worth one machine's work: attach to its own queue, settle, answer, report. The broker refuses
/// everything else. It needs a --broker URL that may administer the broker, and a guest that was
/// provisioned with --credentials, so that it is revoked when the machine is given up. What it may do
/// beyond a guest's work, where the broker has no smaller right, is told when it is issued.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  wilco credentials issue vm-1                       # the URL for the machine's wilco guest --broker
  wilco credentials issue vm-1 --format cloud-init   # user data that puts it on the machine
  wilco credentials show vm-1
  wilco credentials revoke vm-1")]
pub(super) struct Credentials {
    #[command(subcommand)]
    pub(super) action: CredentialsAction,
}

#[derive(Debug, Subcommand)]
pub(super) enum CredentialsAction {
    /// Make a machine's credential, or replace it, and print it: it is not shown again
    Issue {
        /// The guest's id
        id: GuestId,
        /// How it is printed
        #[arg(long, value_enum, default_value = "url")]
        format: CredentialFormat,
        /// Where its files, if it has any, will be on the machine
        #[arg(long, value_name = "PATH", default_value = "/etc/wilco")]
        directory: PathBuf,
    },
    /// Whether a machine has a credential; its secret is not shown
    Show {
        /// The guest's id
        id: GuestId,
    },
    /// Take a machine's credential back: nobody connects with it any more
    Revoke {
        /// The guest's id
        id: GuestId,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum CredentialFormat {
    /// The broker's URL alone
    Url,
    /// Lines for an environment file
    Env,
    /// User data for cloud-init, which writes the files that the agent's unit reads
    CloudInit,
    /// One object, with what it may do
    Json,
}

/// Check a broker: can it be reached, and what is its Ok worth
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  wilco doctor
  wilco doctor sqlite:///var/lib/wilco/broker.db --require power")]
pub(super) struct Doctor {
    /// The broker's URL [default: --broker]
    pub(super) url: Option<String>,
    /// Exit with 9 if the broker is less durable than this
    #[arg(long, value_enum, value_name = "LEVEL")]
    pub(super) require: Option<Require>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Require {
    /// Nothing outlives the broker's process
    Memory,
    /// Survives the broker's process being killed
    Process,
    /// Survives a power cut
    Power,
    /// Survives the loss of a node
    Replicated,
}

/// Measure a broker: durable publishes per second, claim and ack, ping
///
/// It uses queues of its own and deletes them. On a broker in use, expect it to take its share.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  wilco bench --broker sqlite:bench.db
  wilco bench --broker memory: --messages 20000")]
pub(super) struct Bench {
    /// How many messages with 64 and more in flight
    #[arg(long, value_name = "N", default_value = "20000")]
    pub(super) messages: NonZeroU32,
    /// How large each is, in bytes
    #[arg(long, value_name = "BYTES", default_value = "1024")]
    pub(super) bytes: usize,
}

/// Make the key that a control plane signs with, and print what its guests have to trust
///
/// Guests that are given --trust run only what was signed by a key whose public half is in that file.
/// To change keys without a gap: add the new public key to the file on every guest and start its agent
/// anew, then give the control plane the new key, and remove the old public key when what was signed
/// with the old one is done.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  wilco keys generate signing.key > trusted.keys
  wilco keys public signing.key
  wilco provision fleet.jsonl --sign-key signing.key
  wilco guest vm-1 --exec ./prepare.sh --trust trusted.keys")]
pub(super) struct Keys {
    #[command(subcommand)]
    pub(super) action: KeysAction,
}

#[derive(Debug, Subcommand)]
pub(super) enum KeysAction {
    /// Make a new key in a file that only its owner can read, and print its public half
    Generate {
        /// The new file
        file: PathBuf,
    },
    /// Print the public half of a key
    Public {
        /// The key's file
        file: PathBuf,
    },
}

/// Write a shell's completions to stdout
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  wilco completions bash > /etc/bash_completion.d/wilco")]
pub(super) struct Completions {
    /// The shell
    pub(super) shell: Shell,
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|_| "expected a duration such as 500ms, 90s or 10m".into())
}

fn handler(text: &str) -> Result<(MessageId, PathBuf), String> {
    let (kind, program) = text
        .split_once('=')
        .filter(|(_, program)| !program.is_empty())
        .ok_or("expected KIND=PROGRAM, such as list_users=./list-users.sh")?;
    let kind = MessageId::new(kind).map_err(|error| error.to_string())?;
    if kind.as_str() == "prepare" {
        return Err("the program for prepare is given with --exec".into());
    }
    Ok((kind, program.into()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_subcommand_shows_examples() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string);
            assert!(
                help.is_some_and(|help| help.contains("wilco ")),
                "{}",
                command.get_name()
            );
        }
    }
}
