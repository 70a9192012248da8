//! Programs that do not outlive their guest. A guest that is killed cannot end its program, and the next
//! one would run it again beside it. So on Linux the program is started by way of this command, which asks
//! the system to kill it with its parent and then becomes the program. What the program itself started is
//! not killed with it.

use std::{ffi::OsString, path::Path, process::ExitCode};

use tokio::process::Command;

/// Stands in front of the parent's process id and the program.
const WORD: &str = "--tied-to";

/// What starts this program so that it goes when this process does.
#[cfg(target_os = "linux")]
pub(super) fn command(program: &Path) -> Command {
    // This command as it is running, whatever has become of its file since.
    let mut command = Command::new("/proc/self/exe");
    command.arg(WORD).arg(std::process::id().to_string());
    command.arg(program);
    command
}

/// Elsewhere the system has no such thing.
#[cfg(not(target_os = "linux"))]
pub(super) fn command(program: &Path) -> Command {
    Command::new(program)
}

/// Becomes the program, if that is what this process was started for. Returns only if it is not, or if it
/// cannot be.
pub(super) fn become_it(mut arguments: impl Iterator<Item = OsString>) -> Option<ExitCode> {
    if arguments.nth(1).is_none_or(|first| first != WORD) {
        return None;
    }
    let (parent, program) = (arguments.next()?, arguments.next()?);
    let why = replaced(&parent.to_string_lossy(), Path::new(&program));
    super::output::log(format_args!("cannot start {}: {why}", program.display()));
    // What shells answer for a program that cannot be run.
    Some(ExitCode::from(126))
}

#[cfg(target_os = "linux")]
fn replaced(parent: &str, program: &Path) -> std::io::Error {
    use std::os::unix::process::CommandExt as _;

    use rustix::process::{Signal, getppid, set_parent_process_death_signal};

    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return error.into();
    }
    // Killed before that was asked for, it has left us to somebody else.
    if getppid().is_none_or(|now| now.as_raw_nonzero().to_string() != parent) {
        return std::io::Error::other("its guest is gone");
    }
    std::process::Command::new(program).exec()
}

#[cfg(not(target_os = "linux"))]
fn replaced(_parent: &str, _program: &Path) -> std::io::Error {
    std::io::ErrorKind::Unsupported.into()
}
