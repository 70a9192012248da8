//! The page in a real browser: all cells are there, nothing is cut off on a phone, and nothing that a
//! broker said runs as a script. Where there is no Chromium that is told, and is no pass.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod made;

use std::{
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use wilco_conformance::report::{Report, html};

/// The widths of a small phone, a large one, and a desktop.
const WIDTHS: [u32; 3] = [360, 430, 1_200];

#[test]
fn every_cell_is_there_and_nothing_overflows() {
    let report = made::report();
    let Some(shown) = browse(&html::render(&report)) else {
        return;
    };
    let of_each = WIDTHS
        .iter()
        .flat_map(|width| [(width, false), (width, true)]);
    for (n, (width, open)) in of_each.enumerate() {
        let told = |what: &str| attribute(&shown, &format!("data-{what}-{n}"));
        let wide = told("wide");
        assert_eq!(wide, "", "sticks out at {width} px, details open: {open}");
        assert_eq!(told("width"), width.to_string());
        assert_eq!(told("scripts"), "0", "text became a script");
        cells(&report, &told("cells"));
    }
}

/// Every law that ran on a broker has its cell, with what came of it.
fn cells(report: &Report, told: &str) {
    let told: Vec<_> = told.split(' ').collect();
    let laws = report.laws();
    assert_eq!(told.len(), laws.len() * report.runs.len());
    for cell in ["Q1/0/ok", "Q2/0/part", "P1/0/bad", "C1/0/none", "C1/1/void"] {
        assert!(told.contains(&cell), "no {cell} in {told:?}");
    }
}

/// Shows the page in frames of these widths, closed and open, and measures it there: a browser's window
/// has a least width that is more than a phone's. Returns the document as it stands then; `None`
/// without a browser.
fn browse(page: &str) -> Option<String> {
    let Some(browser) = browser() else {
        not_run(
            "the page in a browser",
            "there is no chromium on this machine",
        );
        return None;
    };
    // Its policy lets no script run in it, ours neither: what it says is tested in `tests/report.rs`.
    let policy = page.find("<meta http-equiv").expect("a policy");
    let end = policy + page[policy..].find('>').expect("its end");
    let page = format!("{}{}", &page[..policy], &page[end + 1..]);
    let mut outer = String::from("<!doctype html><body>");
    for width in WIDTHS {
        for page in [page.clone(), page.replace("<details", "<details open")] {
            let frame = page.replace('&', "&amp;").replace('"', "&quot;");
            outer += &format!(
                "<iframe width={width} height=800 style=\"border:0\" srcdoc=\"{frame}\"></iframe>"
            );
        }
    }
    outer += &format!("<script>{}</script></body>", include_str!("page.js"));
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("frames.html");
    std::fs::write(&file, outer).unwrap();
    let mut child = Command::new(browser)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            "--window-size=1300,900",
            "--dump-dom",
        ])
        .arg(format!(
            "--user-data-dir={}",
            directory.path().join("profile").display()
        ))
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        std::io::copy(&mut out, &mut text).map(|_| String::from_utf8_lossy(&text).into_owned())
    });
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > Duration::from_secs(120) {
            let _ = child.kill();
            panic!("the browser did not end");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let shown = reader.join().unwrap().unwrap();
    assert!(
        shown.contains("data-wide-5="),
        "not measured: {shown:.2000}"
    );
    Some(shown)
}

/// The first of the names that Chromium goes by.
fn browser() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let names = ["chromium", "chromium-browser", "google-chrome"];
    std::env::split_paths(&path)
        .flat_map(|directory| names.map(|name| directory.join(name)))
        .find(|file| file.is_file())
}

fn attribute(document: &str, name: &str) -> String {
    let start = document.find(&format!("{name}=\"")).expect(name) + name.len() + 2;
    let rest = &document[start..];
    rest[..rest.find('"').expect("an end")].into()
}

/// Past the capture of passing tests' output: not a pass.
fn not_run(what: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "NOT RUN: {what}: {why}");
}
