use std::{path::Path, time::Duration};

use tempfile::TempDir;

use super::*;
use crate::{Error, ErrorKind, Outcome};

static SCHEMA: Schema = Schema {
    what: "test file",
    application_id: 0x7465_7374,
    version: 3,
    sql: "CREATE TABLE t(n INTEGER PRIMARY KEY) STRICT",
};

/// SQLite's client has a release that breaks things more often than wilco may have one: a conversion
/// from its error would be public, as every trait's is. With one, `_` here has two answers, and this
/// does not compile.
const _: fn() = || {
    trait Either<A> {
        fn it() {}
    }
    struct Converts;
    impl<T> Either<()> for T {}
    impl<T: From<rusqlite::Error>> Either<Converts> for T {}
    <Error as Either<_>>::it();
};

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(10))
}

async fn open(path: &Path) -> Result<Store> {
    Store::open(Location::File(path.to_owned()), &SCHEMA).await
}

fn insert(n: i64) -> impl FnOnce(&Connection) -> Result<(), Fault> + Send + 'static {
    move |connection| {
        connection.execute("INSERT INTO t VALUES(?1)", [n])?;
        Ok(())
    }
}

async fn numbers(store: &Store) -> Vec<i64> {
    store
        .read(soon(), |connection| {
            let mut all = connection.prepare_cached("SELECT n FROM t ORDER BY n")?;
            let rows = all.query_map([], |row| row.get(0))?;
            Ok(rows.collect::<rusqlite::Result<_>>()?)
        })
        .await
        .unwrap()
}

#[tokio::test]
async fn a_failed_write_takes_back_its_own_and_harms_no_other() {
    let directory = TempDir::new().unwrap();
    for location in [
        Location::File(directory.path().join("t.db")),
        Location::Memory,
    ] {
        let store = Store::open(location, &SCHEMA).await.unwrap();
        let failing = store.write(soon(), |connection| {
            insert(2)(connection)?;
            Err::<(), _>(Error::new(ErrorKind::Conflict, "no").into())
        });
        let panicking = store.write(soon(), |connection| -> Result<(), Fault> {
            insert(3)(connection)?;
            panic!("on purpose")
        });
        let (one, two, three, four) = tokio::join!(
            store.write(soon(), insert(1)),
            failing,
            panicking,
            store.write(soon(), insert(4))
        );
        one.unwrap();
        four.unwrap();
        let two = two.unwrap_err();
        assert_eq!(*two.kind(), ErrorKind::Conflict);
        assert_eq!(two.outcome(), Some(Outcome::NotStored));
        assert_eq!(*three.unwrap_err().kind(), ErrorKind::Internal);
        assert_eq!(numbers(&store).await, [1, 4]);
        store.close(soon()).await.unwrap();
        store.close(soon()).await.unwrap();
        let error = store.write(soon(), insert(5)).await.unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Closed);
    }
}

#[tokio::test]
async fn p4_given_up_before_it_began_is_never_done() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("t.db");
    let store = open(&path).await.unwrap();
    let other = Connection::open(&path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let short = Deadline::after(Duration::from_millis(30));
    let error = store.write(short, insert(1)).await.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::DeadlineExceeded);
    assert_eq!(error.outcome(), Some(Outcome::NotStored));
    drop(tokio::time::timeout(Duration::from_millis(30), store.write(soon(), insert(2))).await);
    other.execute_batch("ROLLBACK").unwrap();
    store.write(soon(), insert(3)).await.unwrap();
    assert_eq!(numbers(&store).await, [3]);

    let slow = store.write(Deadline::after(Duration::from_millis(30)), |connection| {
        std::thread::sleep(Duration::from_millis(100));
        insert(4)(connection)
    });
    let error = slow.await.unwrap_err();
    assert_eq!(error.outcome(), Some(Outcome::Unknown));
}

#[tokio::test]
async fn a_foreign_file_is_refused_and_not_changed() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("t.db");
    let cases: [&dyn Fn(&Path); 5] = [
        &|path| std::fs::write(path, b"a letter to my aunt").unwrap(),
        &|path| std::fs::write(path, vec![0; 4096]).unwrap(),
        &|path| {
            let connection = Connection::open(path).unwrap();
            connection.execute_batch("CREATE TABLE x(y)").unwrap();
        },
        &|path| {
            let connection = Connection::open(path).unwrap();
            connection
                .execute_batch(
                    "PRAGMA journal_mode = WAL; CREATE TABLE x(y); PRAGMA application_id = 9",
                )
                .unwrap();
        },
        &|path| {
            let connection = Connection::open(path).unwrap();
            connection
                .execute_batch(
                    "CREATE TABLE x(y); PRAGMA application_id = 0x74657374; PRAGMA user_version = 4",
                )
                .unwrap();
        },
    ];
    for make in cases {
        make(&path);
        let before = std::fs::read(&path).unwrap();
        let error = open(&path).await.unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::ForeignFile, "{error}");
        assert!(error.to_string().contains("t.db"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), before);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        std::fs::remove_file(&path).unwrap();
    }
}

#[tokio::test]
async fn what_cannot_be_a_database_is_said_in_one_message() {
    let directory = TempDir::new().unwrap();
    let cases = [
        (directory.path().join("no/t.db"), "does not exist; make it"),
        (directory.path().to_owned(), "is a directory"),
        ("/proc/t.db".into(), "cannot be made"),
    ];
    for (path, text) in cases {
        let error = open(&path).await.unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Io, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
    let empty = directory.path().join("empty.db");
    std::fs::write(&empty, b"").unwrap();
    open(&empty).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn made_by_many_at_once_all_succeed() {
    let directory = TempDir::new().unwrap();
    for round in 0..10 {
        let path = directory.path().join(format!("{round}.db"));
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..8 {
            let path = path.clone();
            tasks.spawn(async move {
                let store = open(&path).await.unwrap();
                store.write(soon(), insert(n)).await.unwrap();
            });
        }
        while let Some(task) = tasks.join_next().await {
            task.unwrap();
        }
        assert_eq!(numbers(&open(&path).await.unwrap()).await.len(), 8);
    }
}

#[tokio::test]
async fn the_file_is_whole_and_nobody_elses_after_close() {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("t.db");
    let store = open(&path).await.unwrap();
    store.write(soon(), insert(1)).await.unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o007, 0, "{mode:o}");
    store.close(soon()).await.unwrap();
    // The log is gone: the file alone is the database.
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}
