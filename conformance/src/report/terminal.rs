//! The report as it stands on a terminal.

use std::{collections::BTreeMap, fmt, time::Duration};

use super::{Line, LineResult, Report, count};

/// One check, as it is told while the run goes on.
impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = format!("{:.1?}", Duration::from_millis(self.ms));
        match &self.result {
            LineResult::Passed { evidence } => {
                write!(f, "ok      {} ({}; {time})", self.check, told(evidence))
            }
            LineResult::NotRun { reason } => write!(f, "not run {}: {reason}", self.check),
            LineResult::Failed {
                expected,
                seen,
                again,
            } => write!(
                f,
                "FAILED  {} ({time})\n  law {} is broken\n  expected: {expected}\n  seen:     {seen}\n  \
                 again:    {again}",
                self.check, self.law
            ),
        }
    }
}

/// Counts as text: `3 tries, 2 kills`.
pub(super) fn told(evidence: &BTreeMap<String, u64>) -> String {
    let told: Vec<_> = evidence
        .iter()
        .map(|(what, count)| format!("{count} {what}"))
        .collect();
    told.join(", ")
}

/// The matrix of laws and brokers, then why what did not run did not, the saboteurs, and the sums.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.names();
        if !names.is_empty() {
            let width = |name: &String| name.chars().count().max(12) + 2;
            write!(f, "{:<5}", "law")?;
            for name in &names {
                write!(f, "{name:<0$}", width(name))?;
            }
            writeln!(f)?;
            for law in self.laws() {
                write!(f, "{law:<5}")?;
                for (run, name) in self.runs.iter().zip(&names) {
                    let lines = run.lines.iter().filter(|line| line.law == law);
                    write!(f, "{:<1$}", cell(count(lines)), width(name))?;
                }
                writeln!(f)?;
            }
        }
        for (run, name) in self.runs.iter().zip(&names) {
            let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
            for line in &run.lines {
                if let LineResult::NotRun { reason } = &line.result {
                    reasons.entry(reason).or_default().push(&line.check);
                }
            }
            for (reason, checks) in reasons {
                writeln!(f, "not run on {name}: {reason}: {}", checks.join(", "))?;
            }
            if !run.not_asked.is_empty() {
                writeln!(f, "not asked for on {name}: {} checks", run.not_asked.len())?;
            }
        }
        if !self.saboteurs.is_empty() {
            let caught = self.saboteurs.iter().filter(|one| one.caught()).count();
            let all = self.saboteurs.len();
            writeln!(
                f,
                "{caught} of {all} saboteurs caught by the expected check"
            )?;
        }
        let [passed, failed, not_run] = self.counts();
        let ran = passed + failed;
        writeln!(
            f,
            "{ran} ran: {passed} passed, {failed} failed; {not_run} did not run"
        )?;
        f.write_str(if self.passed() {
            "PASSED"
        } else {
            "NOT PASSED"
        })
    }
}

fn cell(counts: [usize; 3]) -> String {
    let all: usize = counts.iter().sum();
    match counts {
        [0, 0, 0] => "-".into(),
        [_, failed @ 1..=usize::MAX, _] => format!("FAILED {failed}/{all}"),
        [0, ..] => "not run".into(),
        [passed, _, 0] => format!("ok {passed}"),
        [passed, ..] => format!("ok {passed}/{all}"),
    }
}

#[cfg(test)]
mod tests {
    use super::cell;

    #[test]
    fn x2_a_cell_never_says_ok_for_more_than_ran() {
        assert_eq!(cell([0, 0, 0]), "-");
        assert_eq!(cell([2, 0, 0]), "ok 2");
        assert_eq!(cell([1, 0, 1]), "ok 1/2");
        assert_eq!(cell([0, 0, 2]), "not run");
        assert_eq!(cell([3, 1, 1]), "FAILED 1/5");
    }
}
