//! Opening a database: made whole or not at all, and never somebody else's.

use std::{
    fs, io,
    io::Read as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rusqlite::{Connection, OpenFlags};

use super::{
    Location, Schema, SyncLevel,
    failure::{self, Fault},
    lane::pause,
};
use crate::error::{Error, ErrorKind, Result};

/// Another process that makes or recovers the same file gets this long.
const PATIENCE: Duration = Duration::from_secs(30);

/// Statements that each connection keeps ready.
const STATEMENTS: usize = 64;

pub(super) struct Opened {
    pub(super) location: Location,
    pub(super) writer: Connection,
    pub(super) reader: Option<Connection>,
    /// None in memory.
    pub(super) held: Option<Arc<Held>>,
}

/// Which file, whatever path leads to it: device and inode.
pub(crate) type FileKey = (u64, u64);

/// The files that this process has open. SQLite's locks are the process's, and closing *any* handle
/// to the file drops them all: so nothing but SQLite may open a file that is listed here, and one who
/// looks into a file that is not keeps this locked meanwhile.
static OPEN: Mutex<Vec<FileKey>> = Mutex::new(Vec::new());

fn open_files() -> MutexGuard<'static, Vec<FileKey>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An entry in the list of open files; to be dropped after the connections.
#[derive(Debug)]
pub(super) struct Held(pub(super) FileKey);

impl Drop for Held {
    fn drop(&mut self) {
        let mut open = open_files();
        if let Some(at) = open.iter().position(|key| *key == self.0) {
            open.swap_remove(at);
        }
    }
}

/// The key of the file at this path, without opening it.
pub(crate) fn file_key(path: &Path) -> io::Result<FileKey> {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// The level as SQLite's pragma takes it.
#[derive(Clone, Copy)]
pub(super) struct Sync(pub(super) SyncLevel);

impl Sync {
    pub(super) fn pragma(self) -> &'static str {
        match self.0 {
            SyncLevel::Full => "PRAGMA synchronous = FULL",
            SyncLevel::Normal => "PRAGMA synchronous = NORMAL",
            SyncLevel::Off => "PRAGMA synchronous = OFF",
        }
    }
}

pub(super) fn memory(schema: &Schema) -> Result<Opened, Fault> {
    failure::about(None);
    let writer = Connection::open_in_memory()?;
    writer.set_prepared_statement_cache_capacity(STATEMENTS);
    create_or_check(&writer, schema, "memory")?;
    Ok(Opened {
        location: Location::Memory,
        writer,
        reader: None,
        held: None,
    })
}

pub(super) fn file(path: PathBuf, schema: &Schema, sync: SyncLevel) -> Result<Opened> {
    let path = absolute(&path)?;
    let shown = path.display().to_string();
    failure::about(Some(shown.clone()));
    let opened = open_file(&path, &shown, schema, sync).map_err(Error::from);
    // This thread is the runtime's and goes on to other work.
    failure::about(None);
    opened
}

fn open_file(path: &Path, shown: &str, schema: &Schema, sync: SyncLevel) -> Result<Opened, Fault> {
    let mut open = open_files();
    if !file_key(path).is_ok_and(|key| open.contains(&key)) {
        make_or_look(path, shown, schema)?;
    }
    let key = file_key(path)?;
    open.push(key);
    drop(open);
    let held = Arc::new(Held(key));
    let writer = connect(path)?;
    if writer.is_readonly("main")? {
        return Err(io_error(format!(
            "{shown} is read-only for this process; give it permission to write the file"
        ))
        .into());
    }
    patiently(|| create_or_check(&writer, schema, shown))?;
    let mode: String =
        patiently(|| Ok(writer.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))?))?;
    if mode != "wal" {
        return Err(io_error(format!(
            "{shown} is on a file system without the shared memory that SQLite's WAL needs, such as a \
             network share; put it on a local disk"
        )).into());
    }
    writer.execute_batch(&format!(
        "{}; PRAGMA journal_size_limit = 67108864;
         PRAGMA temp_store = MEMORY; PRAGMA cache_size = -32768",
        Sync(sync).pragma()
    ))?;
    let reader = connect(path)?;
    reader.execute_batch("PRAGMA query_only = ON; PRAGMA temp_store = MEMORY")?;
    Ok(Opened {
        location: Location::File(path.to_owned()),
        writer,
        reader: Some(reader),
        held: Some(held),
    })
}

fn connect(path: &Path) -> Result<Connection, Fault> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    // Waiting for other processes is done where deadlines are known.
    connection.busy_timeout(Duration::ZERO)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    Ok(connection)
}

/// The path with its directory resolved, so that a later change of the working directory, or another
/// way to the same directory, does not matter.
fn absolute(path: &Path) -> Result<PathBuf> {
    let shown = path.display();
    let (Some(name), parent) = (path.file_name(), path.parent()) else {
        return Err(io_error(format!(
            "{shown:?} does not name a file; give the path of one, such as wilco.db"
        )));
    };
    let parent = match parent {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = fs::canonicalize(parent).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => io_error(format!(
            "{shown}: the directory {} does not exist; make it, or give another path",
            parent.display()
        )),
        _ => io_error(format!(
            "{shown}: the directory {} cannot be used: {error}",
            parent.display()
        ))
        .with_source(error),
    })?;
    Ok(directory.join(name))
}

/// Makes an empty file if there is none; looks at what is there before SQLite touches it, because
/// merely opening another program's database can change it.
fn make_or_look(path: &Path, shown: &str, schema: &Schema) -> Result<()> {
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).create_new(true);
    // Commands can carry secrets: others never read them. The group does as far as umask lets it.
    options.mode(0o660);
    match options.open(path) {
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(io_error(format!(
                "{shown} cannot be made: {error}; give this process permission to write in its \
                 directory, or give another path"
            ))
            .with_source(error));
        }
    }
    let metadata = fs::metadata(path)
        .map_err(|error| io_error(format!("{shown} cannot be read: {error}")).with_source(error))?;
    if metadata.is_dir() {
        return Err(io_error(format!(
            "{shown} is a directory; give the path of a file, such as {shown}/wilco.db"
        )));
    }
    if !metadata.is_file() {
        return Err(io_error(format!(
            "{shown} is not a regular file; give another path"
        )));
    }
    let mut header = Vec::with_capacity(100);
    fs::File::open(path)
        .and_then(|file| file.take(100).read_to_end(&mut header))
        .map_err(|error| {
            io_error(format!(
                "{shown} cannot be read: {error}; give this process permission to read and write it"
            ))
            .with_source(error)
        })?;
    check_header(&header, path, shown, schema)
}

fn check_header(header: &[u8], path: &Path, shown: &str, schema: &Schema) -> Result<()> {
    if header.is_empty() {
        return Ok(());
    }
    let mut journal = path.as_os_str().to_owned();
    journal.push("-journal");
    let in_the_making = Path::new(&journal).exists();
    if header.len() < 100 || !header.starts_with(b"SQLite format 3\0") {
        // A power cut while it was made can leave a file of zeros, which the journal empties.
        if in_the_making && header.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        return Err(foreign(format!(
            "{shown} is not an SQLite database; give another path"
        )));
    }
    let number = |at: usize| {
        header[at..at + 4]
            .iter()
            .fold(0_u32, |number, byte| number << 8 | u32::from(*byte))
            .cast_signed()
    };
    let (application_id, version) = (number(68), number(60));
    if (application_id, version) == (0, 0) && in_the_making {
        return Ok(());
    }
    check_ids(application_id, version, shown, schema)
}

fn check_ids(application_id: i32, version: i32, shown: &str, schema: &Schema) -> Result<()> {
    if application_id != schema.application_id {
        return Err(foreign(format!(
            "{shown} is another program's SQLite database (application id {application_id:#x}), not a \
             {}; give another path",
            schema.what
        )));
    }
    if version != schema.version {
        return Err(foreign(format!(
            "{shown} is a {} of version {version}, and this program knows version {}; use the program \
             that made it, or give another path",
            schema.what, schema.version
        )));
    }
    Ok(())
}

/// Makes the schema in an empty database, in one transaction, so that processes that make the same
/// file at once all find it whole. Before the file is in WAL mode: so its header says whose it is from
/// its first byte on.
fn create_or_check(connection: &Connection, schema: &Schema, shown: &str) -> Result<(), Fault> {
    let ids = |connection: &Connection| -> rusqlite::Result<(i32, i32, bool)> {
        let id = connection.query_row("PRAGMA application_id", [], |row| row.get(0))?;
        let version = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        let empty = connection.query_row("SELECT count(*) = 0 FROM sqlite_schema", [], |row| {
            row.get(0)
        })?;
        Ok((id, version, empty))
    };
    let (id, version, empty) = ids(connection)?;
    if (id, version, empty) != (0, 0, true) {
        return Ok(check_ids(id, version, shown, schema)?);
    }
    connection.execute_batch("BEGIN IMMEDIATE")?;
    let made = ids(connection).and_then(|found| {
        if found != (0, 0, true) {
            return Ok(());
        }
        connection.execute_batch(schema.sql)?;
        connection.execute_batch(&format!(
            "PRAGMA application_id = {}; PRAGMA user_version = {}",
            schema.application_id, schema.version
        ))?;
        Ok(())
    });
    if let Err(error) = made.and_then(|()| connection.execute_batch("COMMIT")) {
        if !connection.is_autocommit() {
            connection.execute_batch("ROLLBACK")?;
        }
        return Err(error.into());
    }
    let (id, version, _) = ids(connection)?;
    Ok(check_ids(id, version, shown, schema)?)
}

/// Tries until no other process is in the way.
fn patiently<T>(mut attempt: impl FnMut() -> Result<T, Fault>) -> Result<T, Fault> {
    let begin = Instant::now();
    loop {
        match attempt() {
            Err(Fault::Sql(error)) if failure::is_busy(&error) && begin.elapsed() < PATIENCE => {
                pause();
            }
            answer => return answer,
        }
    }
}

fn io_error(message: String) -> Error {
    Error::new(ErrorKind::Io, message)
}

fn foreign(message: String) -> Error {
    Error::new(ErrorKind::ForeignFile, message)
}
