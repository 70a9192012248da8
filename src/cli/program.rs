//! Runs a program for a command: payload in, result or reason out, nothing unbounded.

use std::{
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use serde_json::{Value, value::RawValue};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::Command,
    time::timeout,
};

use super::{
    output,
    problem::{Outcome, Problem},
    tied,
};

/// The most of a program's stdout that becomes its result.
const MAX_RESULT_BYTES: usize = 256 * 1024;
/// The most of its stderr that becomes the reason of a failure.
const MAX_REASON_BYTES: usize = 2 * 1024;
/// How long to read on after the program ended: something that it left behind may hold its pipes.
const PIPE_GRACE: Duration = Duration::from_secs(1);

/// A program that was there when it was looked for.
#[derive(Clone, Debug)]
pub(super) struct Program(PathBuf);

impl Program {
    /// Finds a program: at its path, or by its name alone in PATH.
    pub(super) fn find(program: &Path) -> Outcome<Self> {
        let candidates: Vec<_> = if program.components().count() > 1 {
            vec![program.to_path_buf()]
        } else {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let dirs = std::env::split_paths(&path);
            dirs.map(|dir| dir.join(program)).collect()
        };
        let found = candidates.iter().find(|path| path.is_file());
        let Some(path) = found else {
            let hint = if program.is_file() {
                format!("; did you mean ./{}?", program.display())
            } else {
                "; expected a path, or a name that is in PATH".to_owned()
            };
            return Err(Problem::input(format!(
                "there is no program {}{hint}",
                program.display()
            )));
        };
        let mode = path.metadata().map_or(0, |file| file.permissions().mode());
        if mode & 0o111 == 0 {
            return Err(Problem::input(format!(
                "{0} is not executable; chmod +x {0}",
                path.display()
            )));
        }
        Ok(Self(path.clone()))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Runs it to its end. Dropped early, the program is killed; and with this process, whatever kills that.
    ///
    /// The error is the text of a failure: how it ended, and the end of its stderr.
    pub(super) async fn run(
        &self,
        payload: &[u8],
        env: &[(&str, String)],
    ) -> Result<Box<RawValue>, String> {
        self.run_by(tied::command(&self.0), payload, env).await
    }

    async fn run_by(
        &self,
        mut command: Command,
        payload: &[u8],
        env: &[(&str, String)],
    ) -> Result<Box<RawValue>, String> {
        let name = self.0.display();
        let mut child = command
            .envs(env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("cannot start {name}: {error}"))?;
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (mut head, mut tail) = (Head::default(), Tail::default());
        let status = {
            let pipes = async {
                let feed = async {
                    if let Some(mut stdin) = stdin {
                        // A program need not read its payload.
                        let _ = stdin.write_all(payload).await;
                    }
                };
                tokio::join!(feed, head.fill(stdout), tail.fill(stderr));
            };
            tokio::pin!(pipes);
            tokio::select! {
                () = &mut pipes => child.wait().await,
                status = child.wait() => {
                    let _ = timeout(PIPE_GRACE, &mut pipes).await;
                    status
                }
            }
        };
        match status {
            Ok(status) if status.success() => Ok(head.into_result()),
            Ok(status) => Err(format!("{name} {}{}", ended(status), tail.into_reason())),
            Err(error) => Err(format!("cannot wait for {name}: {error}")),
        }
    }
}

/// How a program ended, for people.
pub(super) fn ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// The beginning of what is read; the rest is read and dropped, so that the writer is not blocked.
#[derive(Default)]
struct Head {
    kept: Vec<u8>,
    dropped: bool,
}

impl Head {
    async fn fill(&mut self, from: Option<impl AsyncRead + Unpin>) {
        let Some(mut from) = from else { return };
        let mut chunk = [0; 8 * 1024];
        while let Ok(read @ 1..) = from.read(&mut chunk).await {
            let room = MAX_RESULT_BYTES - self.kept.len();
            self.kept.extend_from_slice(&chunk[..read.min(room)]);
            self.dropped |= read > room;
        }
    }

    /// JSON as it was written, anything else as a string.
    fn into_result(self) -> Box<RawValue> {
        let text = String::from_utf8_lossy(&self.kept);
        let text = text.trim();
        if !self.dropped
            && let Ok(json) = serde_json::from_str::<Box<RawValue>>(text)
        {
            return json;
        }
        let text = match (text, self.dropped) {
            ("", _) => Value::Null,
            (text, false) => text.into(),
            (text, true) => format!("{text}… (cut after {MAX_RESULT_BYTES} bytes)").into(),
        };
        serde_json::value::to_raw_value(&text).unwrap_or_default()
    }
}

/// The end of what is read, which is also passed on to our own stderr.
#[derive(Default)]
struct Tail(Vec<u8>);

impl Tail {
    async fn fill(&mut self, from: Option<impl AsyncRead + Unpin>) {
        let Some(mut from) = from else { return };
        let mut chunk = [0; 8 * 1024];
        while let Ok(read @ 1..) = from.read(&mut chunk).await {
            output::pass_on(&chunk[..read]);
            self.0.extend_from_slice(&chunk[..read]);
            let surplus = self.0.len().saturating_sub(MAX_REASON_BYTES);
            self.0.drain(..surplus);
        }
    }

    fn into_reason(self) -> String {
        let text = String::from_utf8_lossy(&self.0);
        let text = text.trim();
        if text.is_empty() {
            String::new()
        } else {
            format!(": {text}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn sh(script: &str, payload: &str) -> Result<String, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        // Written by another process: a test beside this one may fork while we have it open, and
        // then it could not be started for a moment.
        let write = std::process::Command::new("sh")
            .args([
                "-c",
                "printf '#!/bin/sh\n%s\n' \"$2\" >\"$1\" && chmod +x \"$1\"",
                "sh",
            ])
            .args([path.as_os_str(), script.as_ref()])
            .status();
        assert!(write.unwrap().success());
        let program = Program::find(&path).unwrap();
        // What ties it is the command itself, and this is its test.
        let command = Command::new(program.path());
        let env = [("V", "v".into())];
        let result = program.run_by(command, payload.as_bytes(), &env).await;
        result
            .map(|json| json.get().to_owned())
            .map_err(|error| error.replace(&path.display().to_string(), "program"))
    }

    #[tokio::test]
    async fn output_is_json_or_text_and_failures_say_why() {
        assert_eq!(sh("cat", "{\"a\": 1.0}").await.unwrap(), "{\"a\": 1.0}");
        assert_eq!(sh("echo hello $V", "").await.unwrap(), "\"hello v\"");
        assert_eq!(sh("", "").await.unwrap(), "null");
        let error = sh("echo lost >&2; echo disk full >&2; exit 3", "x").await;
        assert_eq!(
            error.unwrap_err(),
            "program exited with status 3: lost\ndisk full"
        );
        let error = sh("kill -9 $$", "x").await.unwrap_err();
        assert_eq!(error, "program was ended by signal 9");
    }

    #[tokio::test]
    async fn more_output_than_kept_blocks_nobody() {
        let script =
            "head -c 3000000 /dev/zero | tr '\\0' x; head -c 3000000 /dev/zero | tr '\\0' y >&2";
        let large = sh(script, &"z".repeat(1 << 20)).await.unwrap();
        assert!(large.len() > MAX_RESULT_BYTES && large.len() < MAX_RESULT_BYTES + 100);
        assert!(large.contains("(cut after 262144 bytes)"));
    }

    #[tokio::test]
    async fn a_child_that_holds_the_pipes_does_not_hold_the_result() {
        let result = timeout(Duration::from_secs(10), sh("sleep 30 & echo 1", "")).await;
        assert_eq!(result.unwrap().unwrap(), "1");
    }

    #[test]
    fn what_cannot_be_run_is_said_before_anything_starts() {
        let dir = tempfile::tempdir().unwrap();
        let find = |path: &Path| Program::find(path).unwrap_err().message;
        assert!(find(&dir.path().join("nothing")).contains("there is no program"));
        assert!(find(dir.path()).contains("there is no program"));
        let text = dir.path().join("text");
        std::fs::write(&text, "").unwrap();
        assert!(find(&text).contains("chmod +x"));
        assert!(Program::find(Path::new("sh")).is_ok());
    }
}
