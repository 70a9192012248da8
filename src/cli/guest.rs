//! `wilco guest`: a guest whose commands are run by programs.

use std::{path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use serde_json::{json, value::RawValue};
use wilco::{
    Context, Deadline, Failure, Guest, GuestAddress, Interrupted, Served, SqliteJournal, Trust,
};

use super::{
    args::{Global, GuestArgs, OnInterrupt},
    output::{self, Output},
    place::interrupted,
    problem::{Exit, Outcome, Problem},
    program::Program,
};

/// How long its end may take when the broker does not answer; what is not given back runs out by itself.
const LEAVING: Duration = Duration::from_secs(2);

pub(super) async fn run(global: &Global, args: GuestArgs, output: Output) -> Outcome {
    // What cannot be run is said before anything is attached.
    let prepare = Program::find(&args.exec)?;
    let mut handlers = Vec::new();
    for (kind, program) in &args.handlers {
        handlers.push((kind.clone(), Program::find(program)?));
    }
    let address = GuestAddress::new(args.id.clone(), args.incarnation);
    let path = args.journal.unwrap_or_else(|| journal_path(&address));
    let journal = SqliteJournal::open(&path).await.map_err(|error| {
        Problem::from(error).during(format_args!("cannot open the journal {}", path.display()))
    })?;
    let trust = args.trust.as_ref().map(Trust::open).transpose()?;
    let broker = global.connect_shared_by(Deadline::after(args.wait)).await?;

    let events = Events { output };
    events.tell("waiting", &address, "waiting for the queue");
    let mut attach = Guest::attach(Arc::clone(&broker), args.id.as_str(), journal)
        .incarnation(args.incarnation)
        .wait(args.wait);
    if let Some(trust) = trust {
        attach = attach.trust(trust);
    }
    let mut guest = tokio::select! {
        guest = attach => guest?,
        () = interrupted() => return Err(Problem::new(Exit::Interrupted, "stopped while waiting")),
    };
    events.tell("attached", &address, "attached");

    let runner = Arc::new(Runner {
        address: address.clone(),
    });
    let (run, program) = (Arc::clone(&runner), prepare);
    guest = guest
        .on_prepare(move |payload: Box<RawValue>, cx: Context| {
            let (run, program) = (Arc::clone(&run), program.clone());
            async move { run.program(&program, &payload, &cx).await }
        })
        .on_interrupted(match args.on_interrupt {
            OnInterrupt::Fail => Interrupted::Fail,
            OnInterrupt::RunAgain => Interrupted::RunAgain,
        });
    for (kind, program) in handlers {
        let run = Arc::clone(&runner);
        guest = guest.on(kind.as_str(), move |payload: Box<RawValue>, cx: Context| {
            let (run, program) = (Arc::clone(&run), program.clone());
            async move { run.program(&program, &payload, &cx).await }
        });
    }
    let served = guest.serve(interrupted()).await?;
    // Its lane is free for the next agent, without waiting for a broker's lease to run out.
    let _ = broker.close(Deadline::after(LEAVING)).await;
    match served {
        Served::Stopped => {
            events.tell("stopped", &address, "stopped");
            Ok(ExitCode::SUCCESS)
        }
        _ => Err(Problem::new(
            Exit::Revoked,
            format!("{address} was given up by its control plane: nothing is run"),
        )),
    }
}

fn journal_path(address: &GuestAddress) -> PathBuf {
    // The queue's name has no letter that a file system could take for more than a letter.
    let queue = address.queue();
    let name = queue.as_str().trim_start_matches("wilco.q.");
    PathBuf::from(format!("wilco-guest-{name}.db"))
}

/// Runs programs for the commands of one guest.
struct Runner {
    address: GuestAddress,
}

impl Runner {
    async fn program(
        &self,
        program: &Program,
        payload: &RawValue,
        cx: &Context,
    ) -> Result<Box<RawValue>, Failure> {
        let mut env = vec![
            ("WILCO_GUEST", self.address.guest.to_string()),
            ("WILCO_INCARNATION", self.address.incarnation.to_string()),
            ("WILCO_COMMAND", cx.command().to_string()),
            ("WILCO_ATTEMPT", cx.run().to_string()),
        ];
        if let Some(trace) = cx.trace() {
            env.push(("TRACEPARENT", trace.parent().to_owned()));
            if let Some(state) = trace.state() {
                env.push(("TRACESTATE", state.to_owned()));
            }
        }
        let result = program.run(payload.get().as_bytes(), &env).await;
        result.map_err(Failure::new)
    }
}

/// What happens to the guest, for whoever watches its output.
#[derive(Clone, Copy)]
struct Events {
    output: Output,
}

impl Events {
    fn tell(self, event: &str, address: &GuestAddress, text: &str) {
        if self.output.json {
            self.output.json(&json!({
                "event": event,
                "guest": address.guest,
                "incarnation": address.incarnation,
            }));
        } else {
            output::log(format_args!("{address}: {text}"));
        }
    }
}
