//! `wilco explain`: on one screen, where a guest's provisioning is and why it is not further.

use std::{
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::json;
use wilco::{Broker, ErrorKind, ProvisionOutcome, Reason, ReasonKind, Record, State, Taskmanager};

use super::{
    args::{Explain, Global},
    output::{self, Output},
    place::patience,
    problem::Outcome,
    status::{needed, view},
};

/// How long the guest may take to answer while somebody looks at the screen.
pub(super) const GLANCE: Duration = Duration::from_secs(1);

pub(super) async fn run(global: &Global, args: Explain, output: Output) -> Outcome {
    let broker = global.connect_shared().await?;
    let records = global.needed_records().await?;
    let taskmanager = global
        .taskmanager(broker.clone(), records)?
        .observing()
        .await?;
    let record = needed(&taskmanager, &args.id, global).await?;
    let queue = queue(&*broker, &record).await;
    let (attached, ping) = ping(&taskmanager, &record).await;
    let waits = waits_for(&record);
    let until = until(&record);
    let advice = advice(&record, attached);
    output.json(&json!({
        "record": view(&record),
        "queue": queue,
        "ping": ping,
        "waits_for": waits,
        "until": until.as_ref().map(|(what, at_ms)| json!({ "deadline": what, "at_ms": at_ms })),
        "advice": advice,
    }));
    let since = output::took(ago(record.since_ms));
    output.say(format_args!(
        "{}: {}, for {since}\n",
        record.address, record.state
    ));
    say(output, "so far", &history(&record));
    say(output, "command", record.command.as_str());
    say(output, "queue", &queue);
    say(output, "ping", &ping);
    if let Some(seen) = record.seen_ms {
        say(
            output,
            "last sign",
            &format!("{} ago", output::took(ago(seen))),
        );
    }
    if let Some(trouble) = record
        .trouble
        .as_ref()
        .filter(|_| !record.state.is_terminal())
    {
        say(
            output,
            "trouble",
            &format!("{}: {}", trouble.kind, trouble.detail),
        );
    }
    if let Some(outcome) = &record.outcome {
        say(output, "outcome", &ended(outcome));
    }
    say(output, "waits for", waits);
    if let Some((what, at_ms)) = until {
        say(output, "until", &deadline(what, at_ms));
    }
    say(output, "what to do", &advice);
    Ok(ExitCode::SUCCESS)
}

/// A label and its text, the text's further lines below its first.
fn say(output: Output, label: &str, text: &str) {
    let text = text.replace('\n', &format!("\n  {:12}", ""));
    output.say(format_args!("  {label:12}{text}"));
}

/// How long ago that was.
pub(super) fn ago(ms: u64) -> Duration {
    Duration::from_millis(now_ms().saturating_sub(ms))
}

/// How long it is until then; `None` if it is past.
pub(super) fn left(at_ms: u64) -> Option<Duration> {
    at_ms.checked_sub(now_ms()).map(Duration::from_millis)
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

fn history(record: &Record) -> String {
    let steps = record.history.iter().map(|(at, state)| {
        let after = Duration::from_millis(at.saturating_sub(record.created_ms));
        format!("{:>8}  {state}", format!("+{}", output::took(after)))
    });
    steps.collect::<Vec<_>>().join("\n")
}

async fn queue(broker: &dyn Broker, record: &Record) -> String {
    match broker.status(&record.address.queue(), patience()).await {
        Ok(queue) => format!(
            "{}: {} ready, {} delayed, {} in flight, {} dead, {} attached",
            queue.name, queue.ready, queue.delayed, queue.in_flight, queue.dead, queue.consumers
        ),
        Err(error) if *error.kind() == ErrorKind::NoQueue => {
            format!("{} is not on the broker", record.address.queue())
        }
        Err(error) => error.to_string(),
    }
}

async fn ping(taskmanager: &Taskmanager, record: &Record) -> (bool, String) {
    let guest = taskmanager.guest(record.address.guest.as_str());
    let guest = guest.incarnation(record.address.incarnation);
    match guest.ping(GLANCE).await {
        Ok(pong) => (true, format!("answers: {}", pong.phase)),
        Err(error) => (
            *error.kind() == ErrorKind::ConsumerSilent,
            error.to_string(),
        ),
    }
}

fn waits_for(record: &Record) -> &'static str {
    match record.state {
        State::Planned => "the broker, to declare the guest's queue",
        State::AwaitingGuest => {
            "the guest's agent to attach and answer a ping; prepare is sent then"
        }
        State::QueueReady | State::GuestUp => "the broker, to confirm the publish of prepare",
        State::Sent => "the guest to accept prepare from its queue",
        State::Running => "the guest to finish prepare",
        State::Suspect => "a sign of life from the guest, which accepted prepare",
        State::Revoking => "the broker, to make sure that no guest runs prepare any more",
        State::Succeeded | State::Failed | State::NotDelivered => "nothing: this is the outcome",
        _ => "nothing",
    }
}

/// The deadline that ends the present state, and when: in milliseconds since 1970.
pub(super) fn until(record: &Record) -> Option<(&'static str, u64)> {
    let after = |from: u64, span: Duration| {
        from.saturating_add(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
    };
    let deadlines = &record.deadlines;
    let boot = ("boot", after(record.created_ms, deadlines.boot));
    let stage = match record.state {
        State::Planned | State::AwaitingGuest => boot,
        State::Sent if record.boot.is_none() => boot,
        State::QueueReady | State::GuestUp | State::Sent => {
            ("accept", after(record.since_ms, deadlines.accept))
        }
        State::Running | State::Suspect => {
            let seen = record.seen_ms.unwrap_or(record.created_ms);
            ("progress", after(seen, deadlines.progress))
        }
        _ => return None,
    };
    let total = ("total", after(record.created_ms, deadlines.total));
    Some(if total.1 < stage.1 { total } else { stage })
}

fn deadline(what: &str, at_ms: u64) -> String {
    let at = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(at_ms));
    match left(at_ms) {
        Some(left) => format!("the {what} deadline in {}, at {at}", output::took(left)),
        None => format!(
            "the {what} deadline, which passed at {at}: no taskmanager is running on these records"
        ),
    }
}

fn ended(outcome: &ProvisionOutcome) -> String {
    match outcome {
        ProvisionOutcome::Succeeded { result, runs } => {
            format!(
                "succeeded, ran {runs} ×\n{}",
                shortened(&result.to_string())
            )
        }
        ProvisionOutcome::Failed { reason, runs } => format!("failed, ran {runs} ×: {reason}"),
        other => other.to_string(),
    }
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(400) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// What a person can do about it.
fn advice(record: &Record, attached: bool) -> String {
    let address = &record.address;
    let start = format!(
        "wilco guest {} --incarnation {} --exec PROGRAM",
        address.guest, address.incarnation
    );
    if let Some(outcome) = &record.outcome {
        return match outcome.reason() {
            None => "nothing".into(),
            Some(reason) => after_failure(reason),
        };
    }
    let passed = until(record).is_some_and(|(_, at)| at < now_ms());
    match record.state {
        _ if passed => {
            "start the control plane again (wilco provision …): it goes on from here".into()
        }
        State::AwaitingGuest | State::Sent if !attached => format!(
            "look at the machine: is it up, does its agent run with this id and incarnation, and \
             can it reach the broker? By hand:\n{start}"
        ),
        State::Suspect => format!(
            "look at the machine: its agent is gone or cut off. Started again with its journal it \
             reports how prepare ended:\n{start}"
        ),
        State::Planned | State::QueueReady | State::GuestUp | State::Revoking => {
            "look at the broker: wilco doctor; and is the control plane running?".into()
        }
        State::Deleted => "nothing; a new provision makes a new incarnation".into(),
        _ => format!("wait, or give it up: wilco cancel {}", address.guest),
    }
}

fn after_failure(reason: &Reason) -> String {
    let what = match reason.kind {
        ReasonKind::GuestFailed | ReasonKind::Poison => "repair what the guest complains of",
        ReasonKind::NoConsumer | ReasonKind::HostFailed => {
            "find out why the machine did not come up"
        }
        ReasonKind::ConsumerSilent => "find out why the guest's agent hung",
        ReasonKind::BrokerUnreachable | ReasonKind::AuthRefused => {
            "repair the broker (wilco doctor)"
        }
        ReasonKind::NotTrusted => {
            "give the control plane a key that the guest trusts (--sign-key), or the guest the public \
             half of this one (--trust)"
        }
        _ => "if it is still wanted",
    };
    format!("{what}, then provision it again as a new incarnation: wilco provision … --again")
}
