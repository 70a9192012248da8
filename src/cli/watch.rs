//! `wilco status --watch`: the fleet, live, until a key ends it.

use std::{collections::BTreeMap, io::IsTerminal as _, process::ExitCode, time::Duration};

use ratatui::{
    DefaultTerminal, Frame,
    crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout},
    style::{Color, Style, Stylize as _},
    text::Line,
    widgets::{Block, Row, Table, TableState},
};
use wilco::{Record, State, Taskmanager};

use super::{
    explain::{ago, left, until},
    output::{self, Output},
    problem::{Exit, Outcome, Problem},
    status::reason,
};

/// How often the records are read.
const EVERY: Duration = Duration::from_millis(500);

pub(super) async fn run(taskmanager: &Taskmanager, output: Output) -> Outcome {
    if output.json || !std::io::stdout().is_terminal() {
        return Err(Problem::new(
            Exit::Input,
            "--watch draws on a terminal: for a program, call wilco status --json again and again",
        ));
    }
    let mut terminal = ratatui::try_init().map_err(|error| {
        Problem::new(
            Exit::File,
            format!("the terminal cannot be drawn on: {error}"),
        )
    })?;
    let watched = watch(taskmanager, &mut terminal).await;
    ratatui::restore();
    watched
}

async fn watch(taskmanager: &Taskmanager, terminal: &mut DefaultTerminal) -> Outcome {
    let mut place = TableState::default().with_selected(0);
    loop {
        let mut records = taskmanager.records().await?;
        // What is under way comes first, and the newest of the rest.
        records.sort_by_key(|record| {
            (
                record.state.is_terminal(),
                std::cmp::Reverse(record.since_ms),
            )
        });
        terminal
            .draw(|frame| draw(frame, &records, &mut place))
            .map_err(|error| {
                Problem::new(Exit::File, format!("the terminal went away: {error}"))
            })?;
        // In a thread of its own: reading keys blocks.
        let key = tokio::task::spawn_blocking(next_key).await;
        match key.unwrap_or_default().map(Key::of) {
            Some(Key::Quit) => return Ok(ExitCode::SUCCESS),
            Some(Key::Down(rows)) => place.scroll_down_by(rows),
            Some(Key::Up(rows)) => place.scroll_up_by(rows),
            Some(Key::First) => place.select_first(),
            Some(Key::Last) => place.select_last(),
            Some(Key::Other) | None => {}
        }
    }
}

enum Key {
    Quit,
    Up(u16),
    Down(u16),
    First,
    Last,
    Other,
}

impl Key {
    fn of(key: KeyEvent) -> Self {
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Self::Quit,
            KeyCode::Char('q') | KeyCode::Esc => Self::Quit,
            KeyCode::Up | KeyCode::Char('k') => Self::Up(1),
            KeyCode::Down | KeyCode::Char('j') => Self::Down(1),
            KeyCode::PageUp => Self::Up(20),
            KeyCode::PageDown => Self::Down(20),
            KeyCode::Home => Self::First,
            KeyCode::End => Self::Last,
            _ => Self::Other,
        }
    }
}

/// The next key that is pressed before the records are read again.
fn next_key() -> Option<KeyEvent> {
    if !event::poll(EVERY).ok()? {
        return None;
    }
    match event::read().ok()? {
        Event::Key(key) if key.kind != KeyEventKind::Release => Some(key),
        _ => None,
    }
}

fn draw(frame: &mut Frame<'_>, records: &[Record], place: &mut TableState) {
    let [top, middle, bottom] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Fill(1),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(Line::from(counts(records)).bold(), top);
    let header = Row::new(["guest", "inc", "state", "since", "until", "why"]).bold();
    let widths = [
        Constraint::Max(32),
        Constraint::Length(3),
        Constraint::Length(14),
        Constraint::Length(9),
        Constraint::Length(22),
        Constraint::Fill(1),
    ];
    let table = Table::new(records.iter().map(row), widths)
        .header(header)
        .block(Block::bordered())
        .row_highlight_style(Style::new().reversed());
    frame.render_stateful_widget(table, middle, place);
    frame.render_widget(
        "↑ ↓ scroll   q quit   wilco explain ID says more".dim(),
        bottom,
    );
}

fn counts(records: &[Record]) -> String {
    let mut counts = BTreeMap::new();
    for record in records {
        *counts.entry(record.state).or_insert(0_u32) += 1;
    }
    let counts: Vec<_> = counts
        .iter()
        .map(|(state, n)| format!("{n} {state}"))
        .collect();
    let guests = if records.len() == 1 {
        "guest"
    } else {
        "guests"
    };
    format!("{} {guests}  {}", records.len(), counts.join(", "))
}

fn row(record: &Record) -> Row<'static> {
    let until = until(record).map(|(what, at_ms)| match left(at_ms) {
        Some(left) => format!("{what} in {}", output::took(left)),
        None => format!("{what} passed"),
    });
    let trouble = record
        .trouble
        .as_ref()
        .filter(|_| !record.state.is_terminal());
    let why = match trouble {
        Some(trouble) if record.revoking.is_none() => {
            format!("{}: {}", trouble.kind, trouble.detail)
        }
        _ => reason(record),
    };
    Row::new([
        record.address.guest.to_string(),
        record.address.incarnation.to_string(),
        record.state.to_string(),
        output::took(ago(record.since_ms)),
        until.unwrap_or_default(),
        why.lines().next().unwrap_or_default().to_owned(),
    ])
    .style(match record.state {
        State::Succeeded => Color::Green,
        State::Failed | State::NotDelivered => Color::Red,
        State::Suspect | State::Revoking => Color::Yellow,
        _ => Color::Reset,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

    use ratatui::{Terminal, backend::TestBackend};
    use wilco::{Deadlines, GuestAddress, GuestId, SendPolicy};

    use super::*;

    #[test]
    fn a_fleet_is_drawn_with_its_counts_and_its_rows() {
        let mut records = vec![];
        for (id, state) in [("vm-1", State::AwaitingGuest), ("vm-2", State::Succeeded)] {
            let address = GuestAddress::from(GuestId::new(id).unwrap());
            let payload = serde_json::value::RawValue::NULL.to_owned().into();
            let now = u64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap().as_millis()).unwrap();
            let mut record = Record::new(
                address,
                payload,
                SendPolicy::default(),
                Deadlines::default(),
                now,
            );
            record.state = state;
            records.push(record);
        }
        let mut terminal = Terminal::new(TestBackend::new(100, 8)).unwrap();
        terminal
            .draw(|frame| draw(frame, &records, &mut TableState::default()))
            .unwrap();
        let screen = terminal.backend().to_string();
        for words in [
            "2 guests  1 awaiting guest, 1 succeeded",
            "vm-1",
            "awaiting guest",
            "boot in",
            "q quit",
        ] {
            assert!(screen.contains(words), "no {words:?} in\n{screen}");
        }
    }
}
