//! `wilco ping`, `call` and `cast`: a word with one guest.

use std::{process::ExitCode, time::Duration, time::Instant};

use serde_json::{json, value::RawValue};
use wilco::{Error, ErrorKind, GuestAddress, GuestHandle, Incarnation};

use super::{
    args::{Address, Call, Cast, Global, Ping},
    output::{self, Output},
    problem::{Outcome, Problem},
};

pub(super) async fn ping(global: &Global, args: Ping, output: Output) -> Outcome {
    let (guest, address) = reach(global, &args.guest).await?;
    let mut times = Vec::new();
    for _ in 0..args.count.get() {
        let start = Instant::now();
        let pong = guest
            .ping(args.timeout)
            .await
            .map_err(|error| hint(error, &address))?;
        let took = start.elapsed();
        times.push(took);
        output.json(&json!({
            "guest": address.guest,
            "incarnation": address.incarnation,
            "rtt_us": micros(took),
            "pong": pong,
        }));
        if args.count.get() == 1 {
            output.say(format_args!(
                "{address}: {} in {}",
                pong.phase,
                output::took(took)
            ));
        }
    }
    if args.count.get() > 1 {
        times.sort_unstable();
        let (p50, p99) = (percentile(&times, 50), percentile(&times, 99));
        output.json(&json!({
            "guest": address.guest,
            "pings": times.len(),
            "p50_us": micros(p50),
            "p99_us": micros(p99),
        }));
        output.say(format_args!(
            "{address}: {} pings, p50 {}, p99 {}",
            times.len(),
            output::took(p50),
            output::took(p99)
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// The smallest time that this percentage of them does not exceed.
pub(super) fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

pub(super) async fn call(global: &Global, args: Call, output: Output) -> Outcome {
    let payload = payload(&args.payload)?;
    let (guest, address) = reach(global, &args.guest).await?;
    let guest = guest.within(args.timeout);
    let answer = guest
        .call::<Box<RawValue>>(args.kind.as_str(), &payload)
        .await;
    let answer = answer.map_err(|error| hint(error, &address))?;
    output.json(&json!({ "guest": address.guest, "kind": args.kind, "answer": answer }));
    output.say(answer);
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn cast(global: &Global, args: Cast, output: Output) -> Outcome {
    let payload = payload(&args.payload)?;
    let (guest, address) = reach(global, &args.guest).await?;
    let command = guest.cast(args.kind.as_str(), &payload).await;
    let command = command.map_err(|error| hint(error, &address))?;
    output.json(&json!({ "guest": address.guest, "kind": args.kind, "command": command }));
    output.say(command);
    Ok(ExitCode::SUCCESS)
}

/// The error, and what can be done where that is not plain.
fn hint(error: Error, address: &GuestAddress) -> Problem {
    let what = match error.kind() {
        ErrorKind::NoConsumer => "is its agent running, on this broker, as this incarnation?",
        ErrorKind::ConsumerSilent => "its agent is there but does not answer: look at its machine.",
        ErrorKind::NotPrepared => "wait for it.",
        _ => return Problem::from(error).during(address),
    };
    let mut problem = Problem::from(error).during(address);
    problem.message.push_str(&format!(
        "; {what} wilco explain {} says more",
        address.guest
    ));
    problem
}

fn payload(text: &str) -> Outcome<Box<RawValue>> {
    serde_json::from_str(text).map_err(|error| {
        Problem::input(format!(
            "the payload is not JSON: {error}; expected such as '{{\"name\":\"report\"}}', or '\"text\"' in quotes"
        ))
    })
}

/// The guest, and which machine of it is meant: the one asked for, the one in the records, or the first.
pub(super) async fn reach(
    global: &Global,
    guest: &Address,
) -> Outcome<(GuestHandle, GuestAddress)> {
    let taskmanager = global.observe().await?;
    let handle = taskmanager.guest(guest.id.as_str());
    let recorded = match guest.incarnation {
        Some(_) => None,
        None => taskmanager.record(&guest.id).await?,
    };
    if let Some(record) = recorded {
        return Ok((handle, record.address));
    }
    let incarnation = guest.incarnation.unwrap_or(Incarnation::FIRST);
    let address = GuestAddress::new(guest.id.clone(), incarnation);
    Ok((handle.incarnation(incarnation), address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_what_was_seen() {
        let times: Vec<_> = (1..=100).map(Duration::from_millis).collect();
        assert_eq!(percentile(&times, 50), Duration::from_millis(50));
        assert_eq!(percentile(&times, 99), Duration::from_millis(99));
        assert_eq!(percentile(&times[..1], 99), Duration::from_millis(1));
        assert_eq!(percentile(&[], 50), Duration::ZERO);
    }
}
