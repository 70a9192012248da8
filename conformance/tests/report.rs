//! The command's reports: written, read again, joined, and with an exit status that says it all.

mod made;

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use wilco_conformance::report::{Report, html, junit};

fn command(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_wilco-conformance"))
        .args(args)
        .output()
        .expect("this package's own program")
}

#[track_caller]
fn ends(output: &Output, code: i32, words: &[&str]) {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text);
    assert_eq!(output.status.code(), Some(code), "{text}");
    for word in words {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
}

#[test]
fn runs_are_written_and_joined_to_one_page() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).display().to_string();
    for (broker, directory) in [("reference", "a"), ("sqlite", "b")] {
        let directory = path(directory);
        let asked = [
            "run", "--broker", broker, "--law", "Q1", "--report", &directory,
        ];
        ends(&command(&asked), 0, &["2 passed, 0 failed", "PASSED"]);
        for file in ["report.json", "report.html", "junit.xml"] {
            assert!(Path::new(&directory).join(file).is_file(), "{file}");
        }
    }
    let (page, xml) = (path("both.html"), path("both.xml"));
    let (a, b) = (path("a/report.json"), path("b/report.json"));
    let asked = ["report", &a, &b, "--html", &page, "--junit", &xml];
    ends(&command(&asked), 0, &["reference", "sqlite", "4 passed"]);
    let page = fs::read_to_string(page).unwrap();
    for broker in ["reference", "sqlite"] {
        let cell = format!("data-law=\"Q1\" data-broker=\"{broker}\" data-result=\"ok\"");
        assert!(page.contains(&cell), "{broker}");
    }
    let xml = fs::read_to_string(xml).unwrap();
    let document = roxmltree::Document::parse(&xml).unwrap();
    let cases = document
        .descendants()
        .filter(|node| node.has_tag_name("testcase"));
    assert_eq!(cases.count(), 4);
}

#[test]
fn a_failure_and_a_wrong_word_have_their_exit_status() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("report.json");
    fs::write(&file, serde_json::to_vec(&made::report()).unwrap()).unwrap();
    let file = file.display().to_string();
    ends(&command(&["report", &file]), 1, &["NOT PASSED"]);
    ends(&command(&["report", "/nowhere"]), 2, &["/nowhere"]);
    let unknown = ["run", "--broker", "kafka"];
    ends(&command(&unknown), 2, &["no broker \"kafka\"", "sqlite"]);
    let law = ["run", "--broker", "sqlite", "--law", "Q99"];
    ends(&command(&law), 2, &["Q99"]);
}

/// Law X2: a broker that was asked for and is not there is a failure, once and at once.
#[test]
fn x2_a_broker_that_is_not_there_is_a_failure() {
    let asked = [
        "run",
        "--broker",
        "sqlite:/nowhere/at/all.db",
        "--law",
        "Q1",
    ];
    ends(
        &command(&asked),
        1,
        &["x2_the_broker_is_there", "2 did not run"],
    );
}

/// Law S2: in the page and in the XML, whatever a broker says stays text.
#[test]
fn s2_what_a_broker_says_stays_text() {
    let report = made::report();
    let page = html::render(&report);
    assert!(page.contains("default-src 'none'"), "no policy");
    for bad in ["<script", "<img", "\u{202e}", "\0"] {
        assert!(!page.contains(bad), "{bad:?}");
    }
    for outside in ["src=", "http:", "https:", "@import", "url("] {
        let markup = page.replace("&lt;img src=x", "");
        assert!(
            !markup.contains(outside),
            "{outside} in a page without a network"
        );
    }
    roxmltree::Document::parse(&junit::render(&report).unwrap()).unwrap();
}

#[test]
fn a_report_is_the_same_when_it_is_read_again() {
    let report = made::report();
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("report.json");
    fs::write(&file, serde_json::to_vec(&report).unwrap()).unwrap();
    assert_eq!(Report::load(&file).unwrap(), report);
}
