//! Time lines: faults against publishes, deliveries and recovery, drawn from a history.
//!
//! The drawings hold shapes alone, stretched to the page's width; words stand beside them as text, so
//! that they keep their size on a phone and can be read aloud.

use std::fmt::{Result, Write};

use super::{Text, time};
use crate::report::{
    Line, LineResult, Report,
    timeline::{Fault, Timeline},
};

/// A drawing's width in its own units.
const WIDTH: f64 = 1_200.0;
/// The height of a lane of bars, and of the lane of faults.
const LANE: f64 = 46.0;
const FAULT_LANE: f64 = 26.0;

pub(super) fn write(out: &mut String, report: &Report, names: &[String]) -> Result {
    let drawn = |line: &&Line| line.timeline.is_some();
    if !report
        .runs
        .iter()
        .flat_map(|run| &run.lines)
        .any(|line| drawn(&line))
    {
        return Ok(());
    }
    out.push_str(
        "<section id=\"time\">\n<h2>Time lines</h2>\n<p class=\"lead\">What was broken, against what was \
         published and delivered meanwhile. A shaded stretch is the time from a fault, or through an \
         outage, until a publish was confirmed and a delivery came again.</p>\n",
    );
    for (run, name) in report.runs.iter().zip(names) {
        // The one with most faults stands open; the others wait to be asked.
        let lines: Vec<_> = run.lines.iter().filter(drawn).collect();
        let faults = |line: &Line| line.timeline.as_ref().map_or(0, Timeline::fault_count);
        let most = lines.iter().map(|line| faults(line)).max().unwrap_or(0);
        let mut opened = false;
        for line in lines {
            let Some(timeline) = &line.timeline else {
                continue;
            };
            let open = !opened && faults(line) == most;
            opened |= open;
            figure(out, name, line, timeline, open)?;
        }
    }
    out.push_str("</section>\n");
    Ok(())
}

fn figure(out: &mut String, name: &str, line: &Line, timeline: &Timeline, open: bool) -> Result {
    let (class, mark) = match line.result {
        LineResult::Passed { .. } => ("ok", "✓ clean"),
        LineResult::Failed { .. } => ("bad", "✗ not clean"),
        LineResult::NotRun { .. } => ("none", "– not judged"),
    };
    let faults = timeline.fault_count();
    write!(
        out,
        "<details class=\"figure\"{}><summary><span class=\"id\">{}</span> <b>{}</b> <span \
         class=\"title\">{}</span> <span class=\"cell {class}\">{mark}</span></summary>\n<figure>\n",
        if open { " open" } else { "" },
        Text(&line.law),
        Text(name),
        Text(&line.title),
    )?;
    writeln!(
        out,
        "<p class=\"counts\">{faults} faults in {}{}</p>",
        time(timeline.ms),
        recovery(timeline)
    )?;
    fault_lane(out, timeline)?;
    let lanes = [
        (
            "Published",
            ("confirmed", "ok", &timeline.confirmed),
            ("not confirmed", "warn", &timeline.unconfirmed),
        ),
        (
            "Delivered",
            ("first time", "blue", &timeline.delivered),
            ("again", "violet", &timeline.redelivered),
        ),
        (
            "Settled and recovered",
            ("acked", "grey", &timeline.acked),
            ("came after no answer", "warn", &timeline.recovered),
        ),
    ];
    for (title, below, above) in lanes {
        lane(out, timeline, title, below, above)?;
    }
    writeln!(
        out,
        "<div class=\"axis\" aria-hidden=\"true\"><span>0</span><span>{}</span><span>{}</span></div>",
        time(timeline.ms / 2.0),
        time(timeline.ms)
    )?;
    fault_list(out, timeline)?;
    out.push_str("</figure></details>\n");
    Ok(())
}

/// The longest times until things went on after a fault.
fn recovery(timeline: &Timeline) -> String {
    let longest = |of: fn(&Fault) -> Option<f64>| {
        let known = timeline.faults.iter().filter_map(of);
        known.fold(None, |most: Option<f64>, ms| {
            Some(most.map_or(ms, |most| most.max(ms)))
        })
    };
    let mut told = String::new();
    if let Some(ms) = longest(|fault| fault.next_confirm) {
        let _ = write!(told, "; the longest until the next confirm {}", time(ms));
    }
    if let Some(ms) = longest(|fault| fault.next_delivery) {
        let _ = write!(told, ", until the next delivery {}", time(ms));
    }
    told
}

fn x(timeline: &Timeline, ms: f64) -> f64 {
    (ms / timeline.ms * WIDTH).clamp(0.0, WIDTH)
}

/// Outages and recoveries as shaded stretches, faults as marks with a line through all lanes.
fn fault_lane(out: &mut String, timeline: &Timeline) -> Result {
    write!(
        out,
        "<p class=\"lane\"><b>Faults</b> <span class=\"key\"><i class=\"bad\"></i>fault</span> <span \
         class=\"key\"><i class=\"shade\"></i>until things went on</span></p>\n<svg \
         viewBox=\"0 0 {WIDTH} {FAULT_LANE}\" preserveAspectRatio=\"none\" height=\"{FAULT_LANE}\" \
         role=\"img\" aria-label=\"{} faults over {}; they are told in the list below\">\n",
        timeline.fault_count(),
        time(timeline.ms)
    )?;
    shade(out, timeline, FAULT_LANE)?;
    for fault in &timeline.faults {
        let at = x(timeline, fault.at);
        write!(
            out,
            "<path class=\"fault\" d=\"M{at:.1} 0V{FAULT_LANE}\"/><path class=\"head\" \
             d=\"M{:.1} 0h10l-5 11z\"/>",
            at - 5.0
        )?;
    }
    out.push_str("</svg>\n");
    Ok(())
}

fn shade(out: &mut String, timeline: &Timeline, height: f64) -> Result {
    let mut stretch = |from: f64, to: f64| {
        let (from, to) = (x(timeline, from), x(timeline, to));
        let width = (to - from).max(1.0);
        write!(
            out,
            "<rect class=\"shade\" x=\"{from:.1}\" width=\"{width:.1}\" height=\"{height}\"/>"
        )
    };
    for (from, to) in &timeline.outages {
        stretch(*from, *to)?;
    }
    for fault in &timeline.faults {
        if let (Some(confirm), Some(delivery)) = (fault.next_confirm, fault.next_delivery) {
            stretch(fault.at, fault.at + confirm.max(delivery))?;
        }
    }
    Ok(())
}

type Series<'a> = (&'a str, &'a str, &'a Vec<u64>);

/// Two series as bars, one on top of the other.
fn lane(
    out: &mut String,
    timeline: &Timeline,
    title: &str,
    below: Series<'_>,
    above: Series<'_>,
) -> Result {
    let both = |n: usize| {
        let of = |series: &Series<'_>| series.2.get(n).copied().unwrap_or(0);
        (of(&below), of(&above))
    };
    let slices = below.2.len().max(1);
    let most = (0..slices)
        .map(|n| both(n).0 + both(n).1)
        .max()
        .unwrap_or(0);
    let per_second = most as f64 / (timeline.ms / slices as f64) * 1e3;
    write!(out, "<p class=\"lane\"><b>{title}</b>")?;
    for (what, class, counts) in [&below, &above] {
        let sum: u64 = counts.iter().sum();
        write!(
            out,
            " <span class=\"key\"><i class=\"{class}\"></i>{sum} {what}</span>"
        )?;
    }
    write!(
        out,
        " <span class=\"fine\">peak {per_second:.0}/s</span></p>\n<svg viewBox=\"0 0 {WIDTH} {LANE}\" \
         preserveAspectRatio=\"none\" height=\"{LANE}\" aria-hidden=\"true\">\n"
    )?;
    for fault in &timeline.faults {
        write!(
            out,
            "<path class=\"fault\" d=\"M{:.1} 0V{LANE}\"/>",
            x(timeline, fault.at)
        )?;
    }
    let step = WIDTH / slices as f64;
    let scale = LANE / most.max(1) as f64;
    for n in 0..slices {
        let (low, high) = both(n);
        let mut top = LANE;
        for (count, class) in [(low, below.1), (high, above.1)] {
            if count > 0 {
                // Few among many are to be seen too.
                let height = (count as f64 * scale).max(2.0);
                top = (top - height).max(0.0);
                write!(
                    out,
                    "<rect class=\"{class}\" x=\"{:.1}\" y=\"{top:.1}\" width=\"{:.1}\" \
                     height=\"{height:.1}\"/>",
                    n as f64 * step + 0.5,
                    step - 1.0
                )?;
            }
        }
    }
    out.push_str("</svg>\n");
    Ok(())
}

fn fault_list(out: &mut String, timeline: &Timeline) -> Result {
    if timeline.faults.is_empty() {
        return Ok(());
    }
    out.push_str("<details class=\"list\"><summary>The faults, in turn</summary><ol>\n");
    for fault in &timeline.faults {
        let next =
            |ms: Option<f64>| ms.map_or("none after it".into(), |ms| format!("after {}", time(ms)));
        writeln!(
            out,
            "<li><b>{}</b> {} <span class=\"fine\">next confirm {}, next delivery {}</span></li>",
            time(fault.at),
            Text(&fault.what),
            next(fault.next_confirm),
            next(fault.next_delivery)
        )?;
    }
    if timeline.more_faults > 0 {
        writeln!(out, "<li>and {} more</li>", timeline.more_faults)?;
    }
    out.push_str("</ol></details>\n");
    Ok(())
}
