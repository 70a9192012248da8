//! What people read before they do anything.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::Place;

const COMMANDS: [&str; 15] = [
    "provision",
    "guest",
    "ping",
    "call",
    "cast",
    "status",
    "explain",
    "queues",
    "dead",
    "cancel",
    "delete",
    "credentials",
    "doctor",
    "bench",
    "completions",
];

#[test]
fn help_lists_the_commands_and_the_exit_codes() {
    let help = Place::new().run(["--help"]);
    help.expect(0, &[]);
    for word in COMMANDS
        .iter()
        .chain(&["Exit codes:", "130  stopped", "WILCO_BROKER", "--json"])
    {
        assert!(help.stdout.contains(word), "{word}: {}", help.stdout);
    }
}

#[test]
fn every_command_has_help_with_examples() {
    let place = Place::new();
    for command in COMMANDS {
        let help = place.run([command, "--help"]);
        help.expect(0, &[]);
        let example = format!("  wilco {command}");
        assert!(help.stdout.contains("Examples:"), "{}", help.stdout);
        assert!(help.stdout.contains(&example), "{}", help.stdout);
        let widest = help.stdout.lines().map(|line| line.chars().count()).max();
        assert!(widest.unwrap() <= 110, "{}", help.stdout);
    }
}

#[test]
fn the_readme_has_every_command_and_every_exit_code() {
    let readme = include_str!("../README.md");
    for command in COMMANDS {
        assert!(readme.contains(&format!("`{command}")), "{command}");
    }
    let help = Place::new().run(["--help"]).stdout;
    let (_, codes) = help.split_once("Exit codes:\n").unwrap();
    for code in codes
        .lines()
        .filter_map(|line| line.split_whitespace().next())
    {
        assert!(readme.contains(&format!("| {code} |")), "{code}");
    }
}

#[test]
fn completions_are_written_for_each_shell() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = place.run(["completions", shell]);
        script.expect(0, &[]);
        assert!(script.stdout.contains("redrive"), "{shell}");
    }
    place
        .run(["completions", "tcsh"])
        .expect(2, &["bash", "fish"]);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let place = Place::new();
    let wilco = env!("CARGO_BIN_EXE_wilco");
    let script = place.script("head", &format!("{wilco} completions bash | head -n 1"));
    let output = std::process::Command::new(script).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
