//! A fleet on its way: bars on a terminal, a line per transition elsewhere, events with `--json`.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Duration,
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::json;
use wilco::{GuestId, Record, State};

use super::{
    output::{self, Output},
    summary::span,
};

/// What is drawn at most, so that the bars fit on one screen whatever the fleet's size.
const MAX_LINES: usize = 16;

/// Shows transitions as they happen.
pub(super) struct Progress {
    states: HashMap<GuestId, State>,
    total: usize,
    view: View,
}

enum View {
    Bars(Bars),
    Lines,
    Json(Output),
}

impl Progress {
    /// For this many guests, whose ids are at most this wide.
    pub(super) fn new(total: usize, width: usize, output: Output) -> Self {
        let view = if output.json {
            View::Json(output)
        } else if output::can_draw() {
            View::Bars(Bars::new(total, width))
        } else {
            View::Lines
        };
        Self {
            states: HashMap::new(),
            total,
            view,
        }
    }

    /// A record has changed, or was found as it is.
    pub(super) fn show(&mut self, record: &Record) {
        let id = &record.address.guest;
        let before = self.states.insert(id.clone(), record.state);
        let changed = before != Some(record.state);
        match &mut self.view {
            View::Bars(bars) => {
                if changed || !record.state.is_terminal() {
                    bars.show(record);
                }
                bars.count(&self.states, self.total);
            }
            View::Lines if changed => output::log(described(record)),
            View::Json(output) if changed => output.json(&json!({
                "event": "state",
                "guest": id,
                "incarnation": record.address.incarnation,
                "state": record.state,
                "at_ms": record.since_ms,
            })),
            _ => {}
        }
    }

    /// A line that stays.
    pub(super) fn note(&self, text: &str) {
        match &self.view {
            View::Bars(bars) => bars.note(text),
            View::Lines => output::log(text),
            View::Json(_) => output::note(text),
        }
    }

    /// Takes the bars away: the summary follows.
    pub(super) fn finish(self) {
        if let View::Bars(bars) = self.view {
            bars.finish();
        }
    }
}

/// One line on where a record stands.
fn described(record: &Record) -> String {
    let mut text = format!("{} {}", record.address.guest, record.state);
    if let Some(outcome) = &record.outcome {
        text.push_str(&format!(" after {}", output::took(span(record))));
        if let Some(reason) = outcome.reason() {
            text.push_str(&format!(": {}", first_line(&reason.to_string())));
        }
    } else if let Some(reason) = &record.revoking {
        text.push_str(&format!(": {}", first_line(&reason.to_string())));
    }
    text
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// One bar for the fleet, and a spinner for each guest on its way, as many as fit.
struct Bars {
    screen: MultiProgress,
    whole: ProgressBar,
    spinners: HashMap<GuestId, ProgressBar>,
    waiting: VecDeque<(GuestId, String)>,
    lines: usize,
    width: usize,
}

impl Bars {
    fn new(total: usize, width: usize) -> Self {
        let screen = MultiProgress::new();
        let whole = screen.add(ProgressBar::new(total as u64));
        whole.set_style(style(
            "{bar:28.green/dim} {pos}/{len} done in {elapsed}  {wide_msg}",
        ));
        whole.enable_steady_tick(Duration::from_millis(250));
        let rows = output::rows().unwrap_or(24);
        Self {
            screen,
            whole,
            spinners: HashMap::new(),
            waiting: VecDeque::new(),
            lines: rows.saturating_sub(8).clamp(3, MAX_LINES),
            width,
        }
    }

    fn show(&mut self, record: &Record) {
        let id = &record.address.guest;
        if record.state.is_terminal() {
            self.waiting.retain(|(other, _)| other != id);
            if let Some(spinner) = self.spinners.remove(id) {
                spinner.finish_and_clear();
                self.screen.remove(&spinner);
            }
            let mark = if record.state == State::Succeeded {
                "✓"
            } else {
                "✗"
            };
            self.note(&format!("{mark} {}", described(record)));
            while self.spinners.len() < self.lines
                && let Some((id, text)) = self.waiting.pop_front()
            {
                self.spin(&id, &text);
            }
            return;
        }
        let trouble = record
            .trouble
            .as_ref()
            .filter(|_| record.state == State::Running);
        let text = match trouble {
            Some(trouble) => format!("{}: {}", record.state, first_line(&trouble.detail)),
            None => record.state.to_string(),
        };
        if let Some(spinner) = self.spinners.get(id) {
            spinner.set_message(text);
        } else if let Some((_, last)) = self.waiting.iter_mut().find(|(other, _)| other == id) {
            *last = text;
        } else if self.spinners.len() < self.lines {
            self.spin(id, &text);
        } else {
            self.waiting.push_back((id.clone(), text));
        }
    }

    fn spin(&mut self, id: &GuestId, text: &str) {
        let spinner = self.screen.add(ProgressBar::new_spinner());
        let style = style(&format!(
            "{{spinner:.cyan}} {{prefix:{}}}  {{wide_msg}}",
            self.width
        ));
        spinner.set_style(style);
        spinner.set_prefix(id.to_string());
        spinner.set_message(text.to_owned());
        spinner.enable_steady_tick(Duration::from_millis(120));
        self.spinners.insert(id.clone(), spinner);
    }

    fn count(&self, states: &HashMap<GuestId, State>, total: usize) {
        let mut counts = BTreeMap::new();
        for state in states.values() {
            *counts.entry(*state).or_insert(0_u32) += 1;
        }
        let done = states.values().filter(|state| state.is_terminal()).count();
        let counts: Vec<_> = counts
            .iter()
            .map(|(state, n)| format!("{n} {state}"))
            .collect();
        self.whole.set_length(total as u64);
        self.whole.set_position(done as u64);
        self.whole.set_message(counts.join(", "));
    }

    fn note(&self, text: &str) {
        // Fails only if the terminal went away.
        let _ = self.screen.println(text);
    }

    fn finish(self) {
        for spinner in self.spinners.values() {
            spinner.finish_and_clear();
        }
        self.whole.finish_and_clear();
        let _ = self.screen.clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
