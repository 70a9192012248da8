//! Who is attached, across processes: files that the operating system locks and sockets that it closes.
//!
//! Beside a database `x.db` is a directory `x.db.lanes`. In it each consumer and each responder holds
//! a lock on a file of its own for as long as it lives. The kernel frees the lock when the process
//! ends, however it ends; a stopped process keeps it (law R3). No heartbeat, no clock.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::{
        fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _},
        net::UnixDatagram,
    },
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

use crate::{
    error::{Error, ErrorKind, Result},
    names::QueueName,
};

/// The longest path that every system takes for a socket, with room for its end.
const LONGEST_SOCKET_PATH: usize = 100;

/// The directory of locks and sockets.
#[derive(Debug)]
pub(super) struct Attachments {
    directory: PathBuf,
    /// Open so that a socket whose path is too long can be reached through this handle.
    handle: File,
    waker: UnixDatagram,
}

impl Attachments {
    /// Opens the directory beside this database, and makes it if it is missing.
    pub(super) fn beside(database: &Path) -> Result<Self> {
        let mut directory = database.as_os_str().to_owned();
        directory.push(".lanes");
        let directory = PathBuf::from(directory);
        let open = || {
            match fs::DirBuilder::new().mode(0o770).create(&directory) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            let waker = UnixDatagram::unbound()?;
            waker.set_nonblocking(true)?;
            Ok((File::open(&directory)?, waker))
        };
        let (handle, waker) = open().map_err(|error: io::Error| {
            Error::new(
                ErrorKind::Io,
                format!(
                    "the directory {} cannot be used: {error}; give this process permission to make \
                     and write it",
                    directory.display()
                ),
            )
            .with_source(error)
        })?;
        Ok(Self {
            directory,
            handle,
            waker,
        })
    }

    pub(super) fn consumer_lock(&self, queue: &QueueName, token: i64) -> PathBuf {
        self.file(queue, &format!("{token:016x}.lock"))
    }

    pub(super) fn consumer_socket(&self, queue: &QueueName, token: i64) -> Result<PathBuf> {
        self.socket(queue, &format!("{token:016x}.wake"))
    }

    pub(super) fn lane_lock(&self, queue: &QueueName) -> PathBuf {
        self.file(queue, "lane.lock")
    }

    pub(super) fn lane_socket(&self, queue: &QueueName) -> Result<PathBuf> {
        self.socket(queue, "lane.sock")
    }

    /// Tells a consumer, wherever it is, to look again. It looks every second anyway.
    pub(super) fn wake(&self, queue: &QueueName, token: i64) {
        if let Ok(socket) = self.consumer_socket(queue, token) {
            let _ = self.waker.send_to(&[1], socket);
        }
    }

    /// Removes what the dead left behind of a queue (law Q7).
    pub(super) fn sweep(&self, queue: &QueueName) {
        let prefix = format!("{}.", short(queue));
        let Ok(entries) = fs::read_dir(&self.directory) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|name| name.starts_with(&prefix)) else {
                continue;
            };
            let Some((stem, "lock")) = name.rsplit_once('.') else {
                continue;
            };
            // The lock is kept while the files go, so nobody attaches to a name that is going.
            if let Ok(Some(_dead)) = Lock::take(&entry.path()) {
                for socket in ["wake", "sock"] {
                    let _ = fs::remove_file(self.directory.join(format!("{stem}.{socket}")));
                }
            }
        }
    }

    fn file(&self, queue: &QueueName, suffix: &str) -> PathBuf {
        self.directory.join(format!("{}.{suffix}", short(queue)))
    }

    fn socket(&self, queue: &QueueName, suffix: &str) -> Result<PathBuf> {
        let path = self.file(queue, suffix);
        if path.as_os_str().len() <= LONGEST_SOCKET_PATH {
            return Ok(path);
        }
        if cfg!(target_os = "linux") {
            use std::os::fd::AsRawFd as _;
            let name = format!("{}.{suffix}", short(queue));
            let through = format!("/proc/self/fd/{}/{name}", self.handle.as_raw_fd());
            return Ok(through.into());
        }
        Err(Error::new(
            ErrorKind::Io,
            format!(
                "{}: the path is too long for a socket; put the database where its path is at most {} \
                 bytes",
                path.display(),
                LONGEST_SOCKET_PATH - suffix.len() - 40
            ),
        ))
    }
}

/// A queue's name, short enough for a file: 128 bits of its SHA-256, so that no two meet (law Q8).
fn short(queue: &QueueName) -> String {
    use std::fmt::Write as _;
    let hash = Sha256::digest(queue.as_str().as_bytes());
    hash.iter().take(16).fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A locked file: the proof that its holder lives. Its first eight bytes are a number that survives
/// the holder.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Takes the lock; None if somebody has it.
    pub(super) fn take(path: &Path) -> io::Result<Option<Self>> {
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o660)
                .open(path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(error),
            }
            // Whoever had it before may have removed the file between our two steps.
            let (ours, there) = (file.metadata()?, fs::metadata(path));
            if there.is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())) {
                return Ok(Some(Self {
                    file,
                    path: path.to_owned(),
                }));
            }
        }
    }

    /// Keeps a number that can be read after this process was killed.
    pub(super) fn write(&self, number: i64) -> io::Result<()> {
        self.file.write_all_at(&number.to_le_bytes(), 0)
    }

    /// Whether somebody holds the lock. In doubt somebody does.
    pub(super) fn is_held(path: &Path) -> bool {
        match File::open(path) {
            // Shared, so that two who look do not take one another for the holder.
            Ok(file) => file.try_lock_shared().is_err(),
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        }
    }

    /// The number that the dead holder left.
    pub(super) fn read(path: &Path) -> Option<i64> {
        let mut bytes = [0; 8];
        File::open(path).ok()?.read_exact_at(&mut bytes, 0).ok()?;
        Some(i64::from_le_bytes(bytes))
    }
}

#[cfg(test)]
impl Lock {
    /// What the kernel does when the holder is killed: the lock goes, the file stays.
    pub(super) fn die(self) {
        self.file.unlock().expect("a lock can be freed");
        std::mem::forget(self);
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Before the lock goes with the file handle: afterwards it may be somebody else's.
        let _ = fs::remove_file(&self.path);
    }
}
