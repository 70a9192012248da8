//! Laws and brokers: a cell for each pair, and behind each law the evidence, check by check.

use std::fmt::{Result, Write};

use super::{Text, time};
use crate::report::{Line, LineResult, Report, Run, contract, count, terminal::told};

pub(super) fn write(out: &mut String, report: &Report, names: &[String]) -> Result {
    if report.runs.is_empty() {
        return Ok(());
    }
    let many = if names.len() > 6 { " many" } else { "" };
    write!(
        out,
        "<section id=\"laws\">\n<h2>Laws</h2>\n<p class=\"lead\">Open a law for the evidence behind \
         its cells. ✓ held, with the number of checks; ✗ broken; – did not run, which is not a \
         pass.</p>\n<div class=\"matrix{many}\" style=\"--n:{}\">\n<div class=\"row head\" \
         aria-hidden=\"true\"><span></span><span></span>",
        names.len()
    )?;
    for name in names {
        write!(out, "<span>{}</span>", Text(name))?;
    }
    out.push_str("</div>\n");
    let laws = report.laws();
    for (section, title) in contract::SECTIONS.iter().copied().chain([("", "Other")]) {
        let known = |law: &&String| {
            let its = contract::section(law);
            if section.is_empty() {
                !contract::SECTIONS.iter().any(|(id, _)| *id == its)
            } else {
                its == section
            }
        };
        let its: Vec<_> = laws.iter().filter(known).collect();
        if its.is_empty() {
            continue;
        }
        writeln!(out, "<h3>{section} <span>{title}</span></h3>")?;
        for law in its {
            row(out, report, names, law)?;
        }
    }
    out.push_str("</div>\n</section>\n");
    Ok(())
}

fn row(out: &mut String, report: &Report, names: &[String], law: &str) -> Result {
    write!(
        out,
        "<details class=\"law\" id=\"law-{id}\"><summary class=\"row\"><span class=\"id\">{id}</span>\
         <span class=\"title\">{}</span>",
        Text(contract::title(law)),
        id = Text(law)
    )?;
    for (run, name) in report.runs.iter().zip(names) {
        cell(out, law, name, count(of_law(run, law)))?;
    }
    out.push_str("</summary>\n<div class=\"evidence\">\n");
    for (run, name) in report.runs.iter().zip(names) {
        let lines: Vec<_> = of_law(run, law).collect();
        if lines.is_empty() {
            continue;
        }
        write!(
            out,
            "<h4>{} <span>{}{}{} · seed {}</span></h4>\n<ul>\n",
            Text(name),
            Text(&run.broker.version),
            if run.broker.level.is_empty() {
                ""
            } else {
                " · level "
            },
            Text(&run.broker.level),
            run.seed
        )?;
        for line in lines {
            item(out, line)?;
        }
        out.push_str("</ul>\n");
    }
    out.push_str("</div></details>\n");
    Ok(())
}

fn of_law<'a>(run: &'a Run, law: &str) -> impl Iterator<Item = &'a Line> {
    run.lines.iter().filter(move |line| line.law == law)
}

fn cell(out: &mut String, law: &str, name: &str, counts: [usize; 3]) -> Result {
    let [passed, failed, _] = counts;
    let all: usize = counts.iter().sum();
    let (class, mark, text, said) = match counts {
        [0, 0, 0] => ("void", "", "·".into(), "no check".to_owned()),
        [_, 1..=usize::MAX, _] => (
            "bad",
            "✗",
            format!("{failed} of {all}"),
            format!("{failed} of {all} checks failed"),
        ),
        [0, ..] => ("none", "–", "not run".into(), "did not run".into()),
        [_, _, 0] => (
            "ok",
            "✓",
            passed.to_string(),
            format!("held, {passed} checks"),
        ),
        _ => (
            "part",
            "✓",
            format!("{passed} of {all}"),
            format!("held, {passed} of {all} checks ran"),
        ),
    };
    write!(
        out,
        "<span class=\"cell {class}\" data-law=\"{law}\" data-broker=\"{name}\" \
         data-result=\"{class}\" aria-label=\"{name}: {said}\"><i>{name}</i><b>{mark}</b> {text}</span>",
        law = Text(law),
        name = Text(name),
    )
}

fn item(out: &mut String, line: &Line) -> Result {
    let (class, mark) = match line.result {
        LineResult::Passed { .. } => ("ok", "✓"),
        LineResult::Failed { .. } => ("bad", "✗"),
        LineResult::NotRun { .. } => ("none", "–"),
    };
    write!(
        out,
        "<li class=\"{class}\"><b class=\"mark\">{mark}</b> <div><p>{}</p><p class=\"fine\"><code>{}\
         </code></p>",
        Text(&line.title),
        Text(&line.check)
    )?;
    match &line.result {
        LineResult::Passed { evidence } => write!(
            out,
            "<p class=\"counts\">{} · {}</p>",
            Text(&told(evidence)),
            time(line.ms as f64)
        )?,
        LineResult::Failed { expected, seen, .. } => write!(
            out,
            "<p class=\"counts\">expected {}; seen {} · {}</p>",
            Text(expected),
            Text(seen),
            time(line.ms as f64)
        )?,
        LineResult::NotRun { reason } => {
            write!(out, "<p class=\"counts\">{}</p>", Text(reason))?;
        }
    }
    out.push_str("</div></li>\n");
    Ok(())
}
