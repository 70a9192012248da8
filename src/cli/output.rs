//! The one place that writes to the terminal.
//!
//! Answers go to stdout, everything else to stderr. With `--json` an answer is one JSON object a line,
//! and a problem too.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::{
    fmt,
    io::{self, IsTerminal, Write},
    time::SystemTime,
};

use comfy_table::{ContentArrangement, LineStyle, Table, TableStyle};
use serde::Serialize;
use serde_json::json;

use super::problem::Problem;

/// How answers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Output {
    pub(super) json: bool,
}

impl Output {
    /// A line of an answer for people; nothing with `--json`.
    pub(super) fn say(self, text: impl fmt::Display) {
        if !self.json {
            line(text);
        }
    }

    /// An answer for programs; nothing without `--json`.
    pub(super) fn json(self, value: &impl Serialize) {
        if self.json {
            line(serde_json::to_string(value).unwrap_or_else(|error| error.to_string()));
        }
    }

    /// Why the command stops, to stderr.
    pub(super) fn problem(self, problem: &Problem) {
        if self.json {
            note(json!({ "error": problem.message, "exit": problem.exit as u8 }));
        } else {
            note(format_args!("wilco: {}", problem.message));
        }
    }
}

/// A line to stdout. A reader that went away (`| head`) is not an error.
fn line(text: impl fmt::Display) {
    let _ = writeln!(io::stdout().lock(), "{text}");
}

/// A line to stderr.
pub(super) fn note(text: impl fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// A line to stderr with the time in front, for progress that is read later.
pub(super) fn log(text: impl fmt::Display) {
    let now = humantime::format_rfc3339_millis(SystemTime::now());
    note(format_args!("{now} {text}"));
}

/// Whether progress can be drawn.
pub(super) fn can_draw() -> bool {
    io::stderr().is_terminal()
}

/// A line below the header and nothing else: a fleet has many rows.
const LIGHT: TableStyle =
    TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));

/// An empty table with these columns.
pub(super) fn table(columns: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(LIGHT)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(columns);
    table
}

/// A duration as people say it, in at most two units: `1.4s`, `2m 5s`.
pub(super) fn took(duration: std::time::Duration) -> String {
    match duration.as_secs_f64() {
        s if s < 0.001 => format!("{:.0}us", s * 1e6),
        s if s < 0.01 => format!("{:.1}ms", s * 1e3),
        s if s < 1.0 => format!("{:.0}ms", s * 1e3),
        s if s < 60.0 => format!("{s:.1}s"),
        _ => humantime::format_duration(std::time::Duration::from_secs(duration.as_secs()))
            .to_string(),
    }
}

/// Bytes to stderr as they are.
pub(super) fn pass_on(bytes: &[u8]) {
    let _ = io::stderr().lock().write_all(bytes);
}

/// The terminal's height in rows, where there is one.
pub(super) fn rows() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(io::stderr()).ok()?;
    Some(usize::from(size.ws_row)).filter(|rows| *rows > 0)
}

/// Bytes to stdout as they are.
pub(super) fn raw(bytes: &[u8]) {
    let _ = io::stdout().lock().write_all(bytes);
}
