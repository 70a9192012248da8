//! `wilco status`, `cancel` and `delete`: what is recorded, and putting an end to it.

use std::process::ExitCode;

use serde_json::{Value, json};
use wilco::{Cancelled, GuestId, MessageId, Record, Taskmanager};

use super::{
    args::{Address, Cancel, Delete, Global, Status},
    ask::reach,
    explain::{GLANCE, ago},
    output::{self, Output},
    place::patience,
    problem::{Exit, Outcome, Problem},
    summary::{runs, span},
    watch,
};

pub(super) async fn run(global: &Global, args: Status, output: Output) -> Outcome {
    if let (Some(id), Some(command)) = (args.id.clone(), &args.command) {
        let incarnation = args.incarnation;
        return of_command(global, &Address { id, incarnation }, command, output).await;
    }
    let taskmanager = global.observe().await?;
    if args.watch {
        return watch::run(&taskmanager, output).await;
    }
    let records = match &args.id {
        Some(id) => vec![needed(&taskmanager, id, global).await?],
        None => taskmanager.records().await?,
    };
    let mut table = output::table(&["guest", "inc", "state", "since", "ran", "reason"]);
    for record in &records {
        output.json(&view(record));
        table.add_row(vec![
            record.address.guest.to_string(),
            record.address.incarnation.to_string(),
            record.state.to_string(),
            format!("{} ago", output::took(ago(record.since_ms))),
            record
                .outcome
                .as_ref()
                .map(|outcome| runs(outcome).to_string())
                .unwrap_or_default(),
            reason(record),
        ]);
    }
    if records.is_empty() {
        output.say(format_args!(
            "no records at {}",
            global.records_path().display()
        ));
    } else {
        output.say(table);
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn reason(record: &Record) -> String {
    let of_outcome = record.outcome.as_ref().and_then(|outcome| outcome.reason());
    of_outcome
        .or(record.revoking.as_ref())
        .map(ToString::to_string)
        .unwrap_or_default()
}

/// A record without its payload: that may hold passwords, and a status is pasted into tickets (S4).
pub(super) fn view(record: &Record) -> Value {
    let mut view = serde_json::to_value(record).unwrap_or_default();
    if let Some(fields) = view.as_object_mut() {
        fields.remove("payload");
        fields.insert("payload_bytes".into(), record.payload.get().len().into());
        let took = u64::try_from(span(record).as_millis()).unwrap_or(u64::MAX);
        fields.insert("took_ms".into(), took.into());
    }
    view
}

async fn of_command(
    global: &Global,
    guest: &Address,
    command: &MessageId,
    output: Output,
) -> Outcome {
    let (guest, address) = reach(global, guest).await?;
    let state = guest.command_status(command, GLANCE).await?;
    output.json(&json!({ "guest": address.guest, "command": command, "state": state }));
    output.say(format_args!("{address}: {command} is {}", state.name()));
    Ok(ExitCode::SUCCESS)
}

/// The record of a guest that has to have one.
pub(super) async fn needed(
    taskmanager: &Taskmanager,
    id: &GuestId,
    global: &Global,
) -> Outcome<Record> {
    taskmanager.record(id).await?.ok_or_else(|| {
        Problem::new(
            Exit::Missing,
            format!(
                "there is no record of {id} in {}; wilco status lists those there are",
                global.records_path().display()
            ),
        )
    })
}

pub(super) async fn cancel(global: &Global, args: Cancel, output: Output) -> Outcome {
    let cancelled = as_owner(global, async |taskmanager| {
        needed(taskmanager, &args.id, global).await?;
        Ok(taskmanager.cancel(&args.id).await?)
    });
    let cancelled = cancelled.await?;
    let (word, text) = match cancelled {
        Cancelled::Revoked => ("revoked", "given up; no machine runs its prepare"),
        Cancelled::TooLate => ("too_late", "too late: it had accepted prepare, and goes on"),
        Cancelled::HadEnded => ("had_ended", "it had ended before"),
    };
    output.json(&json!({ "guest": args.id, "cancelled": word }));
    output.say(format_args!("{}: {text}", args.id));
    if cancelled == Cancelled::TooLate {
        return Ok(Exit::Conflict.code());
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn delete(global: &Global, args: Delete, output: Output) -> Outcome {
    let deleted = as_owner(global, async |taskmanager| {
        needed(taskmanager, &args.id, global).await?;
        Ok(taskmanager.delete(&args.id).await?)
    });
    deleted.await?;
    output.json(&json!({ "guest": args.id, "deleted": true }));
    output.say(format_args!(
        "{}: deleted; nothing of it is left on the broker",
        args.id
    ));
    Ok(ExitCode::SUCCESS)
}

/// Does this with a taskmanager that may change things: one at a time owns the records. Its place is free
/// again when it returns: the next command need not wait until a broker's lease on it has run out.
async fn as_owner<T>(
    global: &Global,
    work: impl AsyncFnOnce(&Taskmanager) -> Outcome<T>,
) -> Outcome<T> {
    let records = global.needed_records().await?;
    let broker = global.connect_shared().await?;
    let taskmanager = global.taskmanager(broker.clone(), records)?.await?;
    let done = work(&taskmanager).await;
    taskmanager.close();
    // What was done stands, however this ends.
    let _ = broker.close(patience()).await;
    done
}
