//! How a fleet's provisioning ended: a table, the totals, and what is left on the broker.

use std::{collections::BTreeMap, time::Duration};

use comfy_table::{Cell, CellAlignment, Color};
use serde_json::{Value, json};
use wilco::{GuestAddress, ProvisionOutcome, Record, State, broker::QueueStatus};

use super::output::{self, Output};

/// One guest's end.
pub(super) struct Row {
    pub(super) address: GuestAddress,
    /// The outcome stood in the records before this run.
    pub(super) recorded: bool,
    pub(super) end: End,
}

/// What is known of it.
pub(super) enum End {
    Outcome {
        outcome: ProvisionOutcome,
        took: Duration,
    },
    /// There is no outcome: this stood in the way.
    Problem(String),
}

/// From acceptance to the outcome, or to now.
pub(super) fn span(record: &Record) -> Duration {
    Duration::from_millis(record.since_ms.saturating_sub(record.created_ms))
}

/// Shows it all.
pub(super) fn show(rows: &[Row], left: &[QueueStatus], took: Duration, output: Output) {
    let mut table = output::table(&["guest", "inc", "outcome", "reason", "ran", "took"]);
    for row in rows {
        table.add_row(cells(row));
        output.json(&event(row));
    }
    for (column, alignment) in [
        (1, CellAlignment::Right),
        (4, CellAlignment::Right),
        (5, CellAlignment::Right),
    ] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(alignment);
        }
    }
    output.say(table);
    let totals = totals(rows);
    let counted: Vec<_> = totals
        .iter()
        .map(|(what, n)| format!("{n} {what}"))
        .collect();
    let guests = if rows.len() == 1 { "guest" } else { "guests" };
    output.say(format_args!(
        "\n{} {guests}: {}, in {}",
        rows.len(),
        counted.join(", "),
        output::took(took)
    ));
    if rows.iter().any(|row| row.recorded) {
        output.say("  * recorded by an earlier run: not run again");
    }
    let undelivered = undelivered(rows, left);
    output.say(on_the_broker(rows, left, undelivered.len()));
    output.json(&json!({
        "event": "summary",
        "guests": rows.len(),
        "totals": totals.iter().map(|(what, n)| (what.replace(' ', "_"), *n)).collect::<BTreeMap<_, _>>(),
        "took_ms": u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        "left": left,
        "left_of_undelivered": undelivered,
    }));
}

fn cells(row: &Row) -> Vec<Cell> {
    let (outcome, color, reason, runs, took) = match &row.end {
        End::Outcome { outcome, took } => {
            let reason = outcome
                .reason()
                .map(ToString::to_string)
                .unwrap_or_default();
            let color = match outcome.state() {
                State::Succeeded => Color::Green,
                State::NotDelivered => Color::Yellow,
                _ => Color::Red,
            };
            let took = output::took(*took);
            (
                outcome.state().to_string(),
                color,
                reason,
                runs(outcome).to_string(),
                took,
            )
        }
        End::Problem(problem) => {
            let what = "no outcome".to_owned();
            (what, Color::Red, problem.clone(), "?".into(), String::new())
        }
    };
    let star = if row.recorded { " *" } else { "" };
    vec![
        Cell::new(&row.address.guest),
        Cell::new(row.address.incarnation),
        Cell::new(format!("{outcome}{star}")).fg(color),
        Cell::new(reason),
        Cell::new(runs),
        Cell::new(took),
    ]
}

/// How often prepare was started.
pub(super) fn runs(outcome: &ProvisionOutcome) -> u32 {
    match outcome {
        ProvisionOutcome::Succeeded { runs, .. } | ProvisionOutcome::Failed { runs, .. } => *runs,
        _ => 0,
    }
}

fn event(row: &Row) -> Value {
    let mut event = match &row.end {
        End::Outcome { outcome, took } => {
            let mut event = serde_json::to_value(outcome).unwrap_or_default();
            event["runs"] = runs(outcome).into();
            event["took_ms"] = u64::try_from(took.as_millis()).unwrap_or(u64::MAX).into();
            event["event"] = "outcome".into();
            event
        }
        End::Problem(problem) => json!({ "event": "problem", "problem": problem }),
    };
    event["guest"] = row.address.guest.as_str().into();
    event["incarnation"] = row.address.incarnation.get().into();
    event["recorded"] = row.recorded.into();
    event
}

fn totals(rows: &[Row]) -> Vec<(String, usize)> {
    let mut totals = BTreeMap::new();
    for row in rows {
        let state = match &row.end {
            End::Outcome { outcome, .. } => Some(outcome.state()),
            End::Problem(_) => None,
        };
        *totals.entry(state).or_insert(0) += 1;
    }
    // BTreeMap puts None first; what went well comes first here.
    let (open, ended): (Vec<_>, Vec<_>) =
        totals.into_iter().partition(|(state, _)| state.is_none());
    let name = |state: Option<State>| state.map_or("without outcome".into(), |s| s.to_string());
    ended
        .into_iter()
        .chain(open)
        .map(|(state, n)| (name(state), n))
        .collect()
}

/// What the broker still holds of guests that were not delivered: it has to be nothing.
fn undelivered<'a>(rows: &[Row], left: &'a [QueueStatus]) -> Vec<&'a QueueStatus> {
    let queues: Vec<_> = not_delivered(rows).map(|row| row.address.queue()).collect();
    left.iter()
        .filter(|queue| queues.contains(&queue.name))
        .collect()
}

fn not_delivered(rows: &[Row]) -> impl Iterator<Item = &Row> {
    rows.iter().filter(|row| {
        matches!(&row.end, End::Outcome { outcome, .. } if outcome.state() == State::NotDelivered)
    })
}

fn on_the_broker(rows: &[Row], left: &[QueueStatus], undelivered: usize) -> String {
    let (mut messages, mut dead) = (0, 0);
    for queue in left {
        messages += queue.messages() - queue.dead;
        dead += queue.dead;
    }
    let mut text = format!(
        "left on the broker: {} queues, {messages} messages, {dead} dead letters",
        left.len()
    );
    match (not_delivered(rows).count(), undelivered) {
        (0, _) => {}
        (n, 0) => text.push_str(&format!("; nothing of the {n} not delivered")),
        (n, queues) => text.push_str(&format!("; {queues} queues of the {n} NOT delivered")),
    }
    text
}
