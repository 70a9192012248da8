//! The report as one page that needs nothing else: no network, no script, no font of its own.
//!
//! Its order is a reader's: the verdict, what broke and how to see it again, the brokers, the laws with
//! the evidence behind each cell, what happened in time, the saboteurs, and what did not run and why.

mod chart;
mod escape;
mod matrix;
mod rest;

use std::fmt::{Result, Write};

use super::{LineResult, Report, Run, contract};
use escape::Text;

const STYLE: &str = include_str!("style.css");

/// The report as an HTML document.
#[must_use]
pub fn render(report: &Report) -> String {
    let mut page = String::new();
    // Writing into a string cannot fail.
    let _ = write_page(&mut page, report);
    page
}

fn write_page(out: &mut String, report: &Report) -> Result {
    let names = report.names();
    let verdict = verdict(report);
    // No script runs and nothing is loaded, whatever a broker managed to say.
    write!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src \
         'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{} · wilco conformance</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n",
        Text(&verdict)
    )?;
    head(out, report, &verdict)?;
    out.push_str("<main>\n");
    failures(out, report, &names)?;
    brokers(out, report, &names)?;
    matrix::write(out, report, &names)?;
    chart::write(out, report, &names)?;
    rest::saboteurs(out, report)?;
    rest::not_run(out, report, &names)?;
    out.push_str("</main>\n");
    foot(out, report)?;
    out.push_str("</body>\n</html>\n");
    Ok(())
}

/// The one sentence that a reader came for.
fn verdict(report: &Report) -> String {
    let [passed, failed, _] = report.counts();
    let away = report.saboteurs.iter().filter(|one| !one.caught()).count();
    match (passed, failed, away) {
        (_, 1, _) => "One check failed".into(),
        (_, 2.., _) => format!("{failed} checks failed"),
        (_, 0, 1) => "One saboteur got away".into(),
        (_, 0, 2..) => format!("{away} saboteurs got away"),
        (0, 0, 0) if report.saboteurs.is_empty() => "Nothing ran".into(),
        (0, 0, 0) => "Every saboteur was caught".into(),
        _ => "Every check that ran passed".into(),
    }
}

fn head(out: &mut String, report: &Report, verdict: &str) -> Result {
    let [passed, failed, not_run] = report.counts();
    let state = if report.passed() { "ok" } else { "bad" };
    let mark = if report.passed() { "✓" } else { "✗" };
    write!(
        out,
        "<header class=\"top {state}\">\n<p class=\"brand\">wilco conformance</p>\n\
         <h1><span class=\"mark\" aria-hidden=\"true\">{mark}</span> {}</h1>\n",
        Text(verdict)
    )?;
    out.push_str("<ul class=\"sums\">");
    let brokers = report.runs.len();
    for (n, what, class) in [
        (passed, "passed", "ok"),
        (failed, "failed", "bad"),
        (not_run, "did not run", "none"),
        (report.laws().len(), "laws", ""),
        (brokers, if brokers == 1 { "broker" } else { "brokers" }, ""),
    ] {
        let class = if n == 0 { "" } else { class };
        write!(out, "<li class=\"{class}\"><b>{n}</b> {what}</li>")?;
    }
    if !report.saboteurs.is_empty() {
        let caught = report.saboteurs.iter().filter(|one| one.caught()).count();
        let all = report.saboteurs.len();
        let class = if caught == all { "ok" } else { "bad" };
        write!(
            out,
            "<li class=\"{class}\"><b>{caught}/{all}</b> saboteurs caught</li>"
        )?;
    }
    out.push_str("</ul>\n");
    // One bar that says the same at a glance.
    let all = (passed + failed + not_run).max(1) as f64;
    out.push_str("<div class=\"bar\" aria-hidden=\"true\">");
    for (n, class) in [(passed, "ok"), (failed, "bad"), (not_run, "none")] {
        if n > 0 {
            let share = n as f64 / all * 100.0;
            write!(out, "<i class=\"{class}\" style=\"width:{share:.2}%\"></i>")?;
        }
    }
    out.push_str("</div>\n<nav aria-label=\"On this page\">");
    let timelines = report.runs.iter().flat_map(|run| &run.lines);
    let timelines = timelines.filter(|line| line.timeline.is_some()).count();
    for (there, id, text) in [
        (failed > 0, "failures", "Failures"),
        (brokers > 0, "brokers", "Brokers"),
        (brokers > 0, "laws", "Laws"),
        (timelines > 0, "time", "Time lines"),
        (!report.saboteurs.is_empty(), "saboteurs", "Saboteurs"),
        (true, "not-run", "Not run"),
    ] {
        if there {
            write!(out, "<a href=\"#{id}\">{text}</a>")?;
        }
    }
    out.push_str("</nav>\n</header>\n");
    Ok(())
}

fn failures(out: &mut String, report: &Report, names: &[String]) -> Result {
    if report.counts()[1] == 0 {
        return Ok(());
    }
    out.push_str("<section id=\"failures\">\n<h2>Failures</h2>\n");
    for (run, name) in report.runs.iter().zip(names) {
        for line in &run.lines {
            let LineResult::Failed {
                expected,
                seen,
                again,
            } = &line.result
            else {
                continue;
            };
            write!(
                out,
                "<article class=\"failure\">\n<h3><a class=\"id\" href=\"#law-{law}\">{law}</a> \
                 broken on <b>{}</b></h3>\n<p class=\"sub\">{}</p>\n<p class=\"sub\"><code>{}</code> · \
                 {} · seed {}</p>\n<dl><dt>Expected</dt><dd>{}</dd><dt>Seen</dt><dd>{}</dd>\
                 <dt>Again</dt><dd><code class=\"cmd\">{}</code></dd></dl>\n</article>\n",
                Text(name),
                Text(&line.title),
                Text(&line.check),
                time(line.ms as f64),
                line.seed,
                Text(expected),
                Text(seen),
                Text(again),
                law = Text(&line.law),
            )?;
        }
    }
    out.push_str("</section>\n");
    Ok(())
}

fn brokers(out: &mut String, report: &Report, names: &[String]) -> Result {
    if report.runs.is_empty() {
        return Ok(());
    }
    out.push_str("<section id=\"brokers\">\n<h2>Brokers</h2>\n<div class=\"cards\">\n");
    for (run, name) in report.runs.iter().zip(names) {
        card(out, run, name)?;
    }
    out.push_str("</div>\n</section>\n");
    Ok(())
}

fn card(out: &mut String, run: &Run, name: &str) -> Result {
    let [passed, failed, not_run] = run.counts();
    let broker = &run.broker;
    let state = if failed > 0 { "bad" } else { "ok" };
    write!(
        out,
        "<article class=\"card {state}\">\n<h3>{}</h3>\n",
        Text(name)
    )?;
    if !broker.version.is_empty() {
        writeln!(out, "<p class=\"sub\">{}</p>", Text(&broker.version))?;
    }
    if let Some(problem) = &broker.problem {
        writeln!(out, "<p class=\"problem\">{}</p>", Text(problem))?;
    }
    writeln!(
        out,
        "<p class=\"tally\"><b class=\"ok\">{passed}</b> passed{}{}</p>",
        match failed {
            0 => String::new(),
            n => format!(", <b class=\"bad\">{n}</b> failed"),
        },
        match not_run {
            0 => String::new(),
            n => format!(", <b class=\"none\">{n}</b> not run"),
        }
    )?;
    if !broker.level.is_empty() {
        write!(
            out,
            "<p class=\"level\">Durability level <b>{}</b></p>\n<ul class=\"axes\">",
            Text(&broker.level)
        )?;
        for (what, verdict) in [
            ("process crash", &broker.process_crash),
            ("power loss", &broker.power_loss),
            ("node loss", &broker.node_loss),
        ] {
            let class = match verdict.as_str() {
                "safe" => "ok",
                "unsafe" => "none",
                _ => "unknown",
            };
            write!(
                out,
                "<li class=\"{class}\">{what} <b>{}</b></li>",
                Text(verdict)
            )?;
        }
        out.push_str("</ul>\n");
    }
    if !broker.findings.is_empty() {
        out.push_str("<details><summary>Why</summary><dl class=\"findings\">");
        for finding in &broker.findings {
            let value = finding.value.as_deref().unwrap_or("cannot be read");
            write!(
                out,
                "<dt><code>{}</code> {}</dt><dd>{}{}{}</dd>",
                Text(&finding.setting),
                Text(value),
                Text(&finding.meaning),
                if finding.advice.is_some() { "; " } else { "" },
                Text(finding.advice.as_deref().unwrap_or_default()),
            )?;
        }
        out.push_str("</dl></details>\n");
    }
    write!(
        out,
        "<p class=\"fine\">seed {} · {} · {} · {} · suite {}</p>\n</article>\n",
        run.seed,
        time(run.ms as f64),
        Text(&run.started.replace('T', " ").replace('Z', " UTC")),
        Text(&run.machine),
        Text(&run.suite),
    )
}

fn foot(out: &mut String, report: &Report) -> Result {
    out.push_str("<footer>\n<p>Again, with the same choices:</p>\n");
    for run in &report.runs {
        writeln!(
            out,
            "<p><code class=\"cmd\">wilco-conformance run --broker {} --seed {}</code></p>",
            Text(&run.backend),
            run.seed
        )?;
    }
    let known = contract::all().count();
    write!(
        out,
        "<p class=\"fine\">The laws in full are in the contract; this page names {known} of them.</p>\n</footer>\n"
    )
}

/// A duration as a reader says it.
fn time(ms: f64) -> String {
    match ms {
        ms if ms < 10.0 => format!("{ms:.1} ms"),
        ms if ms < 1_000.0 => format!("{ms:.0} ms"),
        ms if ms < 60_000.0 => format!("{:.1} s", ms / 1e3),
        ms => {
            let seconds = (ms / 1e3).round() as u64;
            format!("{} min {} s", seconds / 60, seconds % 60)
        }
    }
}
