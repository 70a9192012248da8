//! Saboteurs, several at once: most of their time is spent waiting for what they keep back.

use std::io::Write;

use futures_util::{StreamExt, stream};

use super::say;
use crate::{
    check::Options,
    harness::Harness,
    registry,
    report::{Line, Sabotaged},
    saboteurs::{self, Saboteur},
};

const AT_ONCE: usize = 8;

/// Runs each saboteur against the check that has to catch it and, if `wide`, the others of its law.
pub(super) async fn all(
    out: &mut impl Write,
    broker: &dyn Fn() -> Result<Box<dyn Harness>, String>,
    seed: u64,
    wide: bool,
) -> Result<Vec<Sabotaged>, String> {
    let known = saboteurs::all();
    say(out, format!("\n{} saboteurs, seed {seed}", known.len()))?;
    let runs = known.into_iter().map(|saboteur| async move {
        let harness = broker()?;
        one(saboteur, harness, &Options::new(seed, None), wide).await
    });
    let mut runs = stream::iter(runs).buffered(AT_ONCE);
    let mut all = Vec::new();
    while let Some(one) = runs.next().await {
        let one = one?;
        let by: Vec<_> = one.caught_by().collect();
        let told = match (one.caught(), by.as_slice()) {
            (true, by) => format!("caught      {}", by.join(", ")),
            (false, []) => format!("NOT CAUGHT  {}", one.expected),
            (false, by) => format!("NOT CAUGHT  {} (but by {})", one.expected, by.join(", ")),
        };
        say(out, format!("{:<34} {told}", one.saboteur))?;
        all.push(one);
    }
    Ok(all)
}

async fn one(
    saboteur: Saboteur,
    harness: Box<dyn Harness>,
    options: &Options,
    wide: bool,
) -> Result<Sabotaged, String> {
    let mut one = Sabotaged::new(&saboteur, harness.name());
    let sabotaged = saboteurs::Sabotaged::new(harness, saboteur);
    let expected = registry::find(saboteur.caught_by)
        .ok_or_else(|| format!("no check {}", saboteur.caught_by))?;
    let mut checks = vec![expected];
    if wide {
        let others = registry::all().into_iter();
        let others = others.filter(|check| check.law == expected.law);
        checks.extend(others.filter(|check| check.name != expected.name));
    }
    for check in checks {
        let mut line = Line::from(check.run_on(&sabotaged, options).await);
        // What a broken broker did in time is nobody's evidence.
        line.timeline = None;
        one.checks.push(line);
    }
    Ok(one)
}
