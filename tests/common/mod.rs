//! A directory with a broker of its own, and the command run in it.
#![allow(dead_code, reason = "each test binary uses some of it")]

pub(crate) mod fleet;

use std::{
    env,
    ffi::OsStr,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

/// More than anything here takes unless it is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A directory to run the command in.
pub(crate) struct Place {
    dir: TempDir,
    broker: Option<String>,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self::on(None)
    }

    /// Where the broker is at this URL, rather than a file here.
    pub(crate) fn on(broker: Option<&str>) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            broker: broker.map(str::to_owned),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Leaves everything here for whoever looks into what went wrong.
    pub(crate) fn keep(&mut self) {
        self.dir.disable_cleanup(true);
        let _ = writeln!(std::io::stderr(), "KEPT: {}", self.path().display());
    }

    /// The command, with nothing of the caller's environment that it would heed.
    pub(crate) fn wilco(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        let mut command = Command::new(program());
        command
            .args(args)
            .current_dir(self.path())
            .stdin(Stdio::null());
        for name in [
            "WILCO_BROKER",
            "WILCO_RECORDS",
            "WILCO_LOG",
            "WILCO_SIGN_KEY",
            "WILCO_TRUST",
        ] {
            command.env_remove(name);
        }
        if let Some(broker) = &self.broker {
            command
                .env("WILCO_BROKER", broker)
                .env("WILCO_RECORDS", self.path().join("records.db"));
        }
        command.env("WILCO_FLEET_DIR", self.path().join("fleet"));
        command
    }

    /// Runs it to its end.
    pub(crate) fn run(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Ended {
        Ended::of(self.wilco(args).output().unwrap())
    }

    /// Starts it.
    pub(crate) fn start(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Running {
        let mut command = self.wilco(args);
        Running::of(
            command
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap(),
        )
    }

    /// Writes a file here.
    pub(crate) fn file(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// Writes a shell script here.
    ///
    /// Another process writes it: a test beside this one may fork while we have it open, and then it
    /// could not be started for a moment ("text file busy").
    pub(crate) fn script(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path().join(name);
        let mut writer = Command::new("sh")
            .args(["-c", "cat >\"$1\" && chmod +x \"$1\"", "sh"])
            .arg(&path)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = writer.stdin.take().unwrap();
        writeln!(stdin, "#!/bin/sh\n{text}").unwrap();
        drop(stdin);
        assert!(writer.wait().unwrap().success());
        path
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path().join(name)).unwrap_or_default()
    }
}

/// What a command left behind.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    fn of(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// It ended with this code and, if it did not go well, one clear message that holds these words.
    #[track_caller]
    pub(crate) fn expect(&self, code: i32, words: &[&str]) -> &Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        for word in words {
            assert!(self.stderr.contains(word), "no {word:?} in {self:#?}");
        }
        for bad in ["panicked", "Error {", "kind:", "RUST_BACKTRACE", "Os {"] {
            assert!(!self.stderr.contains(bad), "{bad:?} in {self:#?}");
        }
        self
    }

    /// Its answer, one JSON object a line.
    #[track_caller]
    pub(crate) fn json(&self) -> Vec<Value> {
        let line = |line: &str| {
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
        };
        self.stdout.lines().map(line).collect()
    }
}

/// A command that runs, and is killed when the test ends.
pub(crate) struct Running(Option<Child>);

impl Running {
    pub(crate) fn of(child: Child) -> Self {
        Self(Some(child))
    }

    pub(crate) fn id(&self) -> u32 {
        self.0.as_ref().unwrap().id()
    }

    /// Waits for its end.
    pub(crate) fn ended(mut self) -> Ended {
        Ended::of(self.0.take().unwrap().wait_with_output().unwrap())
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.0.as_mut().unwrap().try_wait().unwrap().is_some()
    }

    pub(crate) fn signal(&self, name: &str) {
        signal(self.id(), name);
    }

    /// SIGTERM, and its end.
    pub(crate) fn stop(self) -> Ended {
        self.signal("TERM");
        self.ended()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Sends a signal to one process.
pub(crate) fn signal(pid: u32, name: &str) {
    let kill = Command::new("kill")
        .args([&format!("-{name}"), &pid.to_string()])
        .output();
    // One that is gone already is fine.
    drop(kill);
}

/// Waits until something holds.
#[track_caller]
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "waited {PATIENCE:?} until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Says that something was not tried, past the capture of passing tests' output: not a pass.
pub(crate) fn not_run(what: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "NOT RUN: {what}: {why}");
}

/// A file of the examples.
pub(crate) fn example(name: &str) -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let examples = package.ancestors().map(|root| root.join("examples"));
    let mut files = examples.map(|examples| examples.join(name));
    files.find(|file| file.exists()).unwrap()
}

/// The command: what Cargo built for this package's tests, or beside the tests of another one.
fn program() -> PathBuf {
    if let Some(program) = option_env!("CARGO_BIN_EXE_wilco") {
        return program.into();
    }
    let tests = env::current_exe().unwrap();
    let program = tests.ancestors().nth(2).unwrap().join("wilco");
    assert!(
        program.exists(),
        "{} is missing: cargo build --workspace makes it",
        program.display()
    );
    program
}
