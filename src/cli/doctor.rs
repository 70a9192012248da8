//! `wilco doctor`: whether a broker can be reached, and what its Ok is worth.

use std::{process::ExitCode, time::Instant};

use serde::Serialize;
use wilco::{
    BrokerUrl,
    durability::{DurabilityReport, Level},
};

use super::{
    args::{Doctor, Global, Require},
    output::{self, Output},
    place::patience,
    problem::Outcome,
};

/// The answer for programs.
#[derive(Serialize)]
struct Answer<'a> {
    url: String,
    connected_ms: f64,
    queues: usize,
    report: &'a DurabilityReport,
    required: Option<Level>,
    ok: bool,
}

pub(super) async fn run(global: &Global, args: Doctor, output: Output) -> Outcome {
    let url = args.url.as_deref().unwrap_or(&global.broker);
    let shown: BrokerUrl = url.parse()?;
    let start = Instant::now();
    let broker = wilco::connect(url).await?;
    let connected = start.elapsed();
    let report = broker.durability(patience()).await?;
    let queues = broker.list(patience()).await?.len();
    broker.close(patience()).await?;
    let required = args.require.map(|level| match level {
        Require::Memory => Level::Memory,
        Require::Process => Level::Process,
        Require::Power => Level::Power,
        Require::Replicated => Level::Replicated(2),
    });
    let verdict = required.map_or(Ok(()), |level| report.require(level));
    output.json(&Answer {
        url: shown.to_string(),
        connected_ms: connected.as_secs_f64() * 1e3,
        queues,
        report: &report,
        required,
        ok: verdict.is_ok(),
    });
    output.say(format_args!(
        "{shown}: {} {}, reached in {}, {queues} queues\n\nA confirmed message has the level {}:",
        report.backend,
        report.version,
        output::took(connected),
        report.level
    ));
    let mut table = output::table(&["when this happens", "confirmed messages are"]);
    table.add_row(vec![
        "the broker's process is killed".into(),
        report.process_crash.to_string(),
    ]);
    table.add_row(vec![
        "the power is cut".into(),
        report.power_loss.to_string(),
    ]);
    table.add_row(vec![
        "the broker's machine is lost".into(),
        report.node_loss.to_string(),
    ]);
    output.say(table);
    let mut table = output::table(&["setting", "value", "meaning"]);
    for finding in &report.findings {
        let advice = finding.advice.iter().map(|advice| format!("\n→ {advice}"));
        table.add_row(vec![
            finding.setting.clone(),
            finding
                .value
                .clone()
                .unwrap_or_else(|| "not readable".into()),
            std::iter::once(finding.meaning.clone())
                .chain(advice)
                .collect(),
        ]);
    }
    if !report.findings.is_empty() {
        output.say(format_args!("\nBecause:\n{table}"));
    }
    verdict?;
    if let Some(level) = required {
        output.say(format_args!("\nThat is enough for {level}."));
    }
    Ok(ExitCode::SUCCESS)
}
