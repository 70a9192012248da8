//! Section D: durability, told honestly.

use wilco::{
    ErrorKind,
    durability::{DurabilityReport, Level, Verdict},
};

use crate::{
    agent::Agent,
    check::{CheckError, CheckResult, Cx, Evidence},
    harness::Unavailable,
    support::*,
};

/// There is a report with reasons; it does not exceed what the broker can be as it was started.
pub async fn d1_the_report_is_honest(cx: &Cx) -> CheckResult {
    let broker = cx.connect().await?;
    let report = broker.durability(long()).await?;
    same(
        "the backend in the report",
        report.backend,
        broker.backend(),
    )?;
    expect(!report.version.is_empty(), "the broker's version", "none")?;
    expect(
        !report.findings.is_empty(),
        "the reasons for the verdict",
        "none",
    )?;
    for finding in &report.findings {
        let told = !finding.setting.is_empty() && !finding.meaning.is_empty();
        expect(told, "a setting and what it means", short(finding))?;
    }
    let strongest = cx.server.facts().strongest.ok_or_else(|| {
        Unavailable::because("how this broker was set up is not known but from its own report")
    })?;
    expect(
        report.level <= strongest,
        format!("{strongest} at the most, as this broker was started"),
        report.level,
    )?;
    Ok(Evidence::of("findings", report.findings.len()))
}

/// The three verdicts and the level agree, and `require` keeps to them: unknown never passes.
pub async fn d2_require_refuses_what_the_report_does_not_show(cx: &Cx) -> CheckResult {
    let broker = cx.connect().await?;
    let report = broker.durability(long()).await?;
    let axes = axes(&report);
    for (level, verdict) in axes {
        let claimed = report.level >= level;
        let agree = claimed == (verdict == Verdict::Safe);
        let expected = format!("the level and the verdict for {level} agree");
        expect(
            agree,
            expected,
            format!("level {}, verdict {verdict}", report.level),
        )?;
    }
    let levels = [
        Level::Memory,
        Level::Process,
        Level::Power,
        Level::Replicated(2),
    ];
    for level in levels {
        let shown = report.level >= level
            && axes
                .iter()
                .all(|(axis, verdict)| *axis > level || *verdict == Verdict::Safe);
        let required = report.require(level);
        if shown {
            required?;
        } else {
            must_be(
                &format!("{level} required"),
                required,
                &ErrorKind::NotDurable,
            )?;
        }
    }
    // Nothing reports more than the most that can be asked for.
    must_be(
        "Replicated(255) required",
        report.require(Level::Replicated(255)),
        &ErrorKind::NotDurable,
    )?;
    Ok(Evidence::of("levels", levels.len() + 1))
}

fn axes(report: &DurabilityReport) -> [(Level, Verdict); 3] {
    [
        (Level::Process, report.process_crash),
        (Level::Power, report.power_loss),
        (Level::Replicated(2), report.node_loss),
    ]
}

/// Publishers killed right after Ok: at `Process` and above every confirmed message is there.
pub async fn d1_a_claim_to_outlive_a_kill_is_true(cx: &Cx) -> CheckResult {
    const KILLS: usize = 5;
    let broker = cx.connect().await?;
    let name = queue(&*broker, "d1").await?;
    let level = broker.durability(long()).await?.level;
    let mut expected = Vec::new();
    for n in 0..KILLS {
        let mut agent = Agent::start(cx).await?;
        let id = format!("m{n}");
        agent.publish(&name, &id).await?;
        agent.kill().await?;
        expected.push(id);
    }
    if level < Level::Process {
        return Err(CheckError::failed(
            "a broker that processes share claims Process",
            level,
        ));
    }
    same("messages", drain(&*broker, &name).await?, expected)?;
    Ok(Evidence::of("kills", KILLS))
}
