//! The saboteurs, and what did not run.

use std::{
    collections::BTreeMap,
    fmt::{Result, Write},
};

use super::{Text, time};
use crate::report::{LineResult, Report, Sabotaged, contract};

/// Which saboteur, which check had to catch it, which did (law X1).
pub(super) fn saboteurs(out: &mut String, report: &Report) -> Result {
    if report.saboteurs.is_empty() {
        return Ok(());
    }
    let all = &report.saboteurs;
    let caught = all.iter().filter(|one| one.caught()).count();
    write!(
        out,
        "<section id=\"saboteurs\">\n<h2>Saboteurs</h2>\n<p class=\"lead\">Brokers that were broken on \
         purpose, to see that the suite notices (law X1): {caught} of {} were caught by the check that \
         has to catch them.</p>\n",
        all.len()
    )?;
    let mut by_section: BTreeMap<(usize, &str), Vec<&Sabotaged>> = BTreeMap::new();
    for one in all {
        let section = contract::section(&one.law);
        let place = contract::SECTIONS.iter().position(|(id, _)| *id == section);
        let place = place.unwrap_or(usize::MAX);
        by_section.entry((place, section)).or_default().push(one);
    }
    for ((place, section), them) in by_section {
        let caught = them.iter().filter(|one| one.caught()).count();
        let (class, open) = if caught == them.len() {
            ("ok", "")
        } else {
            ("bad", " open")
        };
        let title = contract::SECTIONS
            .get(place)
            .map_or("", |(_, title)| *title);
        write!(
            out,
            "<details class=\"group\"{open}><summary><span class=\"id\">{}</span> {title} <span \
             class=\"cell {class}\">{caught} of {} caught</span></summary>\n<div class=\"wide\"><table>\n\
             <thead><tr><th>Law</th><th>Saboteur</th><th>Has to be caught by</th><th>Caught by</th>\
             </tr></thead>\n<tbody>\n",
            Text(section),
            them.len()
        )?;
        for one in them {
            saboteur(out, one)?;
        }
        out.push_str("</tbody></table></div></details>\n");
    }
    out.push_str("</section>\n");
    Ok(())
}

fn saboteur(out: &mut String, one: &Sabotaged) -> Result {
    let state = if one.caught() { "ok" } else { "bad" };
    write!(
        out,
        "<tr data-saboteur=\"{name}\" data-caught=\"{}\"><td data-h=\"Law\">{}</td><td \
         data-h=\"Saboteur\"><b>{}</b> <span class=\"fine\">on {}</span></td><td data-h=\"Has to be \
         caught by\"><code>{}</code></td><td data-h=\"Caught by\">",
        one.caught(),
        Text(&one.law),
        Text(&one.saboteur.replace('_', " ")),
        Text(&one.backend),
        Text(&one.expected),
        name = Text(&one.saboteur),
    )?;
    let mut anything = false;
    for line in &one.checks {
        if let LineResult::Failed { seen, .. } = &line.result {
            anything = true;
            let mark = if line.check == one.expected {
                "✓ "
            } else {
                "also "
            };
            let first = seen.lines().next().unwrap_or_default();
            write!(
                out,
                "<p><b class=\"{state}\">{mark}</b><code>{}</code></p><p class=\"fine\">{} · {}</p>",
                Text(&line.check),
                Text(first),
                time(line.ms as f64)
            )?;
        }
    }
    if !anything {
        out.push_str("<p><b class=\"bad\">✗ nobody</b></p>");
    }
    for line in &one.checks {
        if let LineResult::NotRun { reason } = &line.result {
            write!(out, "<p class=\"fine\">not run: {}</p>", Text(reason))?;
        }
    }
    out.push_str("</td></tr>\n");
    Ok(())
}

/// What did not run, on which broker, and why (law X2).
pub(super) fn not_run(out: &mut String, report: &Report, names: &[String]) -> Result {
    out.push_str("<section id=\"not-run\">\n<h2>What did not run, and why</h2>\n");
    let mut everything_ran = true;
    for (run, name) in report.runs.iter().zip(names) {
        let mut reasons: BTreeMap<&str, Vec<(&str, &str)>> = BTreeMap::new();
        for line in &run.lines {
            if let LineResult::NotRun { reason } = &line.result {
                let checks = reasons.entry(reason).or_default();
                checks.push((&line.law, &line.check));
            }
        }
        for check in &run.not_asked {
            let reason = "not asked for: the run was told which checks to make";
            reasons.entry(reason).or_default().push(("", check));
        }
        if reasons.is_empty() {
            continue;
        }
        everything_ran = false;
        write!(out, "<h3>{}</h3>\n<ul class=\"reasons\">\n", Text(name))?;
        for (reason, checks) in reasons {
            write!(
                out,
                "<li><p>{}</p><details><summary>{} {}</summary><p class=\"fine\">",
                Text(reason),
                checks.len(),
                if checks.len() == 1 { "check" } else { "checks" },
            )?;
            for (law, check) in checks {
                write!(out, "{} <code>{}</code><br>", Text(law), Text(check))?;
            }
            out.push_str("</p></details></li>\n");
        }
        out.push_str("</ul>\n");
    }
    if everything_ran && !report.runs.is_empty() {
        out.push_str("<p>Every check of this report ran.</p>\n");
    }
    let here = report.laws();
    let bare: Vec<_> = contract::all()
        .filter(|law| !here.iter().any(|there| there == law))
        .collect();
    if !bare.is_empty() && !report.runs.is_empty() {
        out.push_str(
            "<h3>Laws of the contract without a check in this report</h3>\n<ul class=\"bare\">",
        );
        for law in bare {
            write!(
                out,
                "<li><span class=\"id\">{law}</span> {}</li>",
                contract::title(law)
            )?;
        }
        out.push_str("</ul>\n");
    }
    if report.saboteurs.is_empty() {
        out.push_str(
            "<h3>Saboteurs</h3>\n<p>None were set on the suite in this report: \
             <code class=\"cmd\">wilco-conformance run --saboteurs</code></p>\n",
        );
    }
    out.push_str("</section>\n");
    Ok(())
}
