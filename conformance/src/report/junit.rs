//! The report as JUnit XML, as build servers read it: a suite for each broker, one for the saboteurs.

use std::time::Duration;

use quick_junit::{NonSuccessKind, Property, TestCase, TestCaseStatus, TestSuite};

use super::{Line, LineResult, Report, terminal::told};

/// The report as an XML document.
///
/// # Errors
/// The XML could not be written.
pub fn render(report: &Report) -> Result<String, String> {
    let mut document = quick_junit::Report::new("wilco-conformance");
    for (run, name) in report.runs.iter().zip(report.names()) {
        let mut suite = TestSuite::new(name.as_str());
        suite.set_time(Duration::from_millis(run.ms));
        let properties = [
            ("broker", run.broker.version.clone()),
            ("durability", run.broker.level.clone()),
            ("seed", run.seed.to_string()),
            ("started", run.started.clone()),
            ("machine", run.machine.clone()),
            ("suite", run.suite.clone()),
        ];
        for (property, value) in properties {
            suite.add_property(Property::new(property, value));
        }
        for line in &run.lines {
            suite.add_test_case(case(line, &name));
        }
        document.add_test_suite(suite);
    }
    if !report.saboteurs.is_empty() {
        let mut suite = TestSuite::new("saboteurs");
        for one in &report.saboteurs {
            let status = if one.caught() {
                TestCaseStatus::success()
            } else {
                let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
                status.set_message(format!("{} did not catch it", one.expected));
                status
            };
            let mut case = TestCase::new(one.saboteur.as_str(), status);
            case.set_classname(format!("saboteurs.{}", one.law));
            let ms = one.checks.iter().map(|line| line.ms).sum();
            case.set_time(Duration::from_millis(ms));
            suite.add_test_case(case);
        }
        document.add_test_suite(suite);
    }
    document.to_string().map_err(|error| error.to_string())
}

fn case(line: &Line, backend: &str) -> TestCase {
    let status = match &line.result {
        LineResult::Passed { .. } => TestCaseStatus::success(),
        LineResult::NotRun { reason } => {
            let mut status = TestCaseStatus::skipped();
            status.set_message(reason.as_str());
            status
        }
        LineResult::Failed {
            expected,
            seen,
            again,
        } => {
            let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
            status.set_message(format!("law {} is broken", line.law));
            status.set_type(line.law.as_str());
            status.set_description(format!(
                "expected: {expected}\nseen: {seen}\nagain: {again}"
            ));
            status
        }
    };
    let mut case = TestCase::new(line.check.as_str(), status);
    // Readers take a dot for a level of their tree; a URL has dots of its own.
    case.set_classname(format!("{}.{}", backend.replace('.', "_"), line.law));
    case.set_time(Duration::from_millis(line.ms));
    if let LineResult::Passed { evidence } = &line.result {
        case.set_system_out(told(evidence));
    }
    case
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::report::Run;

    fn report(backend: &str, seen: &str) -> Report {
        let line = |check: &str, result| Line {
            check: check.into(),
            law: "Q1".into(),
            title: String::new(),
            seed: 1,
            ms: 1_500,
            result,
            timeline: None,
        };
        let failed = LineResult::Failed {
            expected: "nothing <else>".into(),
            seen: seen.into(),
            again: "again".into(),
        };
        let passed = LineResult::Passed {
            evidence: [("tries".into(), 3)].into(),
        };
        let reason = seen.into();
        let run = Run {
            backend: backend.into(),
            ms: 4_500,
            lines: vec![
                line("q1_a", passed),
                line("q1_b", failed),
                line("q1_c", LineResult::NotRun { reason }),
            ],
            ..Run::default()
        };
        Report {
            runs: vec![run],
            ..Report::default()
        }
    }

    #[test]
    fn each_check_is_a_case_and_the_sums_are_right() {
        let xml = render(&report("sqlite", "5")).unwrap();
        let document = roxmltree::Document::parse(&xml).unwrap();
        let suite = document
            .descendants()
            .find(|node| node.has_tag_name("testsuite"))
            .unwrap();
        let sums = ["tests", "failures", "skipped", "disabled"].map(|sum| suite.attribute(sum));
        assert!(
            sums.contains(&Some("3")) && sums.contains(&Some("1")),
            "{xml}"
        );
        let cases = document
            .descendants()
            .filter(|node| node.has_tag_name("testcase"));
        assert_eq!(cases.count(), 3);
        let failure = document
            .descendants()
            .find(|node| node.has_tag_name("failure"))
            .unwrap();
        assert!(failure.text().unwrap().contains("expected: nothing <else>"));
    }

    proptest! {
        /// What a broker says can be anything, and the document is well-formed.
        #[test]
        fn s2_hostile_text_stays_text(backend in any::<String>(), seen in any::<String>()) {
            let xml = render(&report(&backend, &seen)).unwrap();
            let document = roxmltree::Document::parse(&xml).unwrap();
            let elements = document.descendants().filter(|node| node.is_element()).count();
            prop_assert_eq!(elements, 2 + 7 + 3 + 3);
        }
    }
}
