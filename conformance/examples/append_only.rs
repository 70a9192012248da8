//! A backend from outside (law X3): one append-only file, synced before every Ok, in one process.
//!
//! It uses the public API of `wilco` alone, and the suite's to be held to the contract:
//!
//!     cargo run -p wilco-conformance --example append_only
//!
//! `writing-a-backend.md`, beside this file, builds it step by step. What it leaves to a real one: other
//! processes (the file is locked for this one), files that grow while the broker runs (they are rewritten when
//! it is opened), and queues of a million messages.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    fs::File,
    io::{self, Read, Write},
    num::NonZeroU32,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::{
    sync::{oneshot, watch},
    time::{Instant, sleep_until},
};
use wilco::{
    Broker, Deadline, Error, ErrorKind, GuestAddress, Headers, Message, MessageId, Outcome,
    QueueName, Result,
    broker::{
        ConsumeOptions, Consumer, DeadLetter, DeadLetterKey, Declared, DeleteMode, Delivery,
        Discarded, Lease, MAX_REQUEST_BYTES, QueueSpec, QueueStatus, Receipt, Reply, Request,
        Responder, Settlement,
    },
    durability::{DurabilityReport, Finding, Level},
};

// Step 1: what is written down. One record for each change; a state is all records applied in turn.

#[derive(Debug, Serialize, Deserialize)]
enum Record {
    Declared {
        spec: QueueSpec,
    },
    Deleted {
        queue: QueueName,
    },
    /// The body follows the record as it is.
    Stored {
        queue: QueueName,
        seq: u64,
        about: About,
    },
    Counted {
        queue: QueueName,
        seq: u64,
        attempts: u32,
    },
    Delayed {
        queue: QueueName,
        seq: u64,
        until_unix_ms: u64,
    },
    Acked {
        queue: QueueName,
        seq: u64,
    },
    Buried {
        queue: QueueName,
        seq: u64,
        key: u64,
        reason: String,
    },
    Redriven {
        queue: QueueName,
        key: u64,
        seq: u64,
    },
}

/// A message without its body.
#[derive(Debug, Serialize, Deserialize)]
struct About {
    id: MessageId,
    kind: MessageId,
    content_type: MessageId,
    headers: Headers,
    from: Option<QueueName>,
}

impl About {
    fn of(message: &Message) -> Self {
        Self {
            id: message.id.clone(),
            kind: message.kind.clone(),
            content_type: message.content_type.clone(),
            headers: message.headers.clone(),
            from: message.from.clone(),
        }
    }

    fn with(self, body: Bytes) -> Result<Message> {
        let message = Message::new(self.kind, body)?
            .with_id(self.id)
            .with_content_type(self.content_type)
            .with_headers(self.headers);
        Ok(match self.from {
            Some(from) => message.with_from(from),
            None => message,
        })
    }
}

#[derive(Debug, Default)]
struct State {
    queues: BTreeMap<QueueName, Queue>,
    /// The last number that was given out; none is given twice, so none means two things.
    last: u64,
    // From here on what no file holds, for it ends with the process.
    open: HashSet<u64>,
    lanes: HashMap<GuestAddress, Lane>,
}

#[derive(Debug)]
struct Queue {
    spec: QueueSpec,
    messages: BTreeMap<u64, Stored>,
    dead: BTreeMap<u64, DeadLetter>,
    consumer: Option<Holder>,
}

#[derive(Debug)]
struct Stored {
    message: Message,
    attempts: u32,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Due(Instant),
    Held { lease: u64, by: Holder },
}

/// A consumer, and the handle that it was made on.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Holder {
    consumer: u64,
    handle: u64,
}

impl State {
    fn apply(&mut self, record: Record, body: Bytes) -> Result<()> {
        match record {
            Record::Declared { spec } => {
                let (messages, dead) = (BTreeMap::new(), BTreeMap::new());
                let queue = Queue {
                    spec,
                    messages,
                    dead,
                    consumer: None,
                };
                self.queues.insert(queue.spec.name.clone(), queue);
            }
            Record::Deleted { queue } => drop(self.queues.remove(&queue)),
            Record::Stored { queue, seq, about } => {
                let place = Place::Due(Instant::now());
                let stored = Stored {
                    message: about.with(body)?,
                    attempts: 0,
                    place,
                };
                self.queue(&queue)?.messages.insert(seq, stored);
                self.last = self.last.max(seq);
            }
            Record::Counted {
                queue,
                seq,
                attempts,
            } => self.message(&queue, seq)?.attempts = attempts,
            Record::Delayed {
                queue,
                seq,
                until_unix_ms,
            } => {
                let left = until_unix_ms.saturating_sub(unix_ms());
                let due = Instant::now() + Duration::from_millis(left);
                self.message(&queue, seq)?.place = Place::Due(due);
            }
            Record::Acked { queue, seq } => drop(self.queue(&queue)?.messages.remove(&seq)),
            Record::Buried {
                queue,
                seq,
                key,
                reason,
            } => {
                self.last = self.last.max(key);
                let queue = self.queue(&queue)?;
                let stored = queue.messages.remove(&seq).ok_or_else(damaged)?;
                let name = DeadLetterKey(key.to_string());
                let letter = DeadLetter::new(name, stored.message, reason, stored.attempts);
                queue.dead.insert(key, letter);
            }
            Record::Redriven { queue, key, seq } => {
                self.last = self.last.max(seq);
                let queue = self.queue(&queue)?;
                let message = queue.dead.remove(&key).ok_or_else(damaged)?.message;
                let place = Place::Due(Instant::now());
                queue.messages.insert(
                    seq,
                    Stored {
                        message,
                        attempts: 0,
                        place,
                    },
                );
            }
        }
        Ok(())
    }

    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn queue(&mut self, name: &QueueName) -> Result<&mut Queue> {
        self.queues
            .get_mut(name)
            .ok_or_else(|| error(ErrorKind::NoQueue, "there is no such queue"))
    }

    fn message(&mut self, queue: &QueueName, seq: u64) -> Result<&mut Stored> {
        self.queue(queue)?
            .messages
            .get_mut(&seq)
            .ok_or_else(damaged)
    }

    /// The same state in as few records as it takes: what an old file is replaced by.
    fn records(&self) -> Vec<(Record, Bytes)> {
        let mut all = Vec::new();
        for (name, queue) in &self.queues {
            all.push((
                Record::Declared {
                    spec: queue.spec.clone(),
                },
                Bytes::new(),
            ));
            for (&seq, stored) in &queue.messages {
                let (queue, attempts) = (name.clone(), stored.attempts);
                let about = About::of(&stored.message);
                let record = Record::Stored {
                    queue: queue.clone(),
                    seq,
                    about,
                };
                all.push((record, stored.message.body.clone()));
                all.push((
                    Record::Counted {
                        queue: queue.clone(),
                        seq,
                        attempts,
                    },
                    Bytes::new(),
                ));
                if let Place::Due(due) = stored.place {
                    let left = due.saturating_duration_since(Instant::now()).as_millis();
                    let until_unix_ms =
                        unix_ms().saturating_add(left.try_into().unwrap_or(u64::MAX));
                    all.push((
                        Record::Delayed {
                            queue,
                            seq,
                            until_unix_ms,
                        },
                        Bytes::new(),
                    ));
                }
            }
            for (&key, letter) in &queue.dead {
                let (queue, attempts) = (name.clone(), letter.attempts);
                let (about, reason) = (About::of(&letter.message), letter.reason.clone());
                let stored = Record::Stored {
                    queue: queue.clone(),
                    seq: key,
                    about,
                };
                all.push((stored, letter.message.body.clone()));
                all.push((
                    Record::Counted {
                        queue: queue.clone(),
                        seq: key,
                        attempts,
                    },
                    Bytes::new(),
                ));
                all.push((
                    Record::Buried {
                        queue,
                        seq: key,
                        key,
                        reason,
                    },
                    Bytes::new(),
                ));
            }
        }
        all
    }
}

// Step 2: the file. A batch of records is one frame, and is synced before the next one is written: so only the
// last frame of a file can be torn, and what is in it nobody was told Ok for.

const MAGIC: &[u8; 8] = b"wilco-x3";
const HEAD: usize = 8 + 8 + 32;

fn frame(batch: &[u8]) -> Vec<u8> {
    let mut frame = MAGIC.to_vec();
    frame.extend((batch.len() as u64).to_le_bytes());
    frame.extend(Sha256::digest(batch));
    frame.extend(batch);
    frame
}

/// The batch of the frame that these bytes begin with, if it is whole.
fn unframe(bytes: &[u8]) -> Option<&[u8]> {
    let head = bytes.get(..HEAD).filter(|head| head.starts_with(MAGIC))?;
    let length = usize::try_from(u64::from_le_bytes(head[8..16].try_into().ok()?)).ok()?;
    let batch = bytes.get(HEAD..HEAD.checked_add(length)?)?;
    (Sha256::digest(batch)[..] == head[16..]).then_some(batch)
}

fn put(batch: &mut Vec<u8>, record: &Record, body: &[u8]) -> Result<()> {
    let json = serde_json::to_vec(record).map_err(|error| damaged().with_source(error))?;
    for part in [&json[..], body] {
        batch.extend((part.len() as u64).to_le_bytes());
        batch.extend(part);
    }
    Ok(())
}

fn replay(mut bytes: &[u8]) -> Result<State> {
    let mut state = State::default();
    while let Some(mut batch) = unframe(bytes) {
        bytes = &bytes[HEAD + batch.len()..];
        while !batch.is_empty() {
            let json = part(&mut batch).ok_or_else(damaged)?;
            let body = part(&mut batch).ok_or_else(damaged)?;
            let record =
                serde_json::from_slice(json).map_err(|error| damaged().with_source(error))?;
            state.apply(record, Bytes::copy_from_slice(body))?;
        }
    }
    // What follows is a torn frame, or the file is damaged, and then nothing is thrown away.
    if (1..bytes.len()).any(|at| unframe(&bytes[at..]).is_some()) {
        return Err(damaged());
    }
    Ok(state)
}

fn part<'a>(batch: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, rest) = batch.split_first_chunk::<8>()?;
    let (part, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    *batch = rest;
    Some(part)
}

// Step 3: one step at a time. Under the lock a step changes the state and says what to write; a thread writes and
// syncs whatever has come together; whoever promises something waits for the sync.

#[derive(Debug)]
struct Store {
    books: Mutex<Books>,
    work: Condvar,
    /// How far the file is synced, or why it never will be again.
    synced: watch::Sender<std::result::Result<u64, String>>,
    /// Goes up with each step: who waits for a message or a request waits on this.
    version: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Books {
    state: State,
    batch: Vec<u8>,
    /// How many records there were, ever.
    records: u64,
    stopped: bool,
}

impl Books {
    /// Changes the state, and has the change written.
    fn note(&mut self, record: Record, body: Bytes) -> Result<()> {
        put(&mut self.batch, &record, &body)?;
        self.records += 1;
        self.state.apply(record, body)
    }
}

impl Store {
    /// Opens the file, or makes it, and starts the thread that writes.
    fn open(path: &Path) -> Result<(Arc<Self>, JoinHandle<()>)> {
        let mut bytes = Vec::new();
        if path.exists() {
            let file = File::open(path)?;
            file.try_lock()
                .map_err(|_| error(ErrorKind::Conflict, "another process has this file open"))?;
            (&file).read_to_end(&mut bytes)?;
            if !bytes.is_empty() && !bytes.starts_with(MAGIC) {
                return Err(error(
                    ErrorKind::ForeignFile,
                    "this is no file of this broker's",
                ));
            }
        }
        let mut books = Books {
            state: replay(&bytes)?,
            ..Books::default()
        };
        bury_the_poison(&mut books)?;
        // What was deleted and acked goes from the disk here: a new file takes the old one's place whole.
        let mut batch = Vec::new();
        for (record, body) in books.state.records() {
            put(&mut batch, &record, &body)?;
        }
        books.batch.clear();
        let new = path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(&frame(&batch))?;
        file.sync_all()?;
        file.try_lock()
            .map_err(|_| error(ErrorKind::Conflict, "another process has this file open"))?;
        std::fs::rename(&new, path)?;
        let directory = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()?;
        let store = Arc::new(Self {
            books: Mutex::new(books),
            work: Condvar::new(),
            synced: watch::Sender::new(Ok(0)),
            version: watch::Sender::new(0),
        });
        let writer = Arc::clone(&store);
        Ok((store, std::thread::spawn(move || writer.write(file))))
    }

    fn write(&self, mut file: File) {
        loop {
            let mut books = self.lock();
            while books.batch.is_empty() && !books.stopped {
                books = self
                    .work
                    .wait(books)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            if books.batch.is_empty() {
                return;
            }
            let (batch, records) = (std::mem::take(&mut books.batch), books.records);
            drop(books);
            let written = file
                .write_all(&frame(&batch))
                .and_then(|()| file.sync_data());
            let failed = written.is_err();
            let _ = self.synced.send_replace(
                written
                    .map(|()| records)
                    .map_err(|error: io::Error| error.to_string()),
            );
            if failed {
                // What a failed sync left on the disk nobody knows, and a second one would not tell: this broker
                // promises nothing any more.
                return;
            }
        }
    }

    /// One step.
    fn step<T>(&self, step: impl FnOnce(&mut Books) -> T) -> T {
        let mut books = self.lock();
        let result = step(&mut books);
        drop(books);
        self.work.notify_one();
        self.version.send_modify(|version| *version += 1);
        result
    }

    /// One step of a handle's, and the sync of all that it stands on.
    async fn commit<T>(
        &self,
        handle: u64,
        deadline: Deadline,
        step: impl FnOnce(&mut Books) -> Result<T>,
    ) -> Result<T> {
        let nothing_done = |error: Error| error.with_outcome(Outcome::NotStored);
        if deadline.has_passed() {
            return Err(nothing_done(error(
                ErrorKind::DeadlineExceeded,
                "the deadline had passed",
            )));
        }
        let done = self.step(|books| {
            if !books.state.open.contains(&handle) {
                return Err(closed());
            }
            Ok((step(books)?, books.records))
        });
        let (result, records) = done.map_err(nothing_done)?;
        let mut synced = self.synced.subscribe();
        let unknown = |error: Error| error.with_outcome(Outcome::Unknown);
        let reached =
            synced.wait_for(|synced| synced.as_ref().map_or(true, |upto| *upto >= records));
        let reached = deadline
            .bound(reached)
            .await
            .map_err(unknown)?
            .map_err(|_| unknown(closed()))?;
        match &*reached {
            Ok(_) => Ok(result),
            Err(text) => Err(unknown(error(
                ErrorKind::Io,
                format!("the file cannot be written: {text}"),
            ))),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A message that was with its consumer for the last time when the process ended is a dead letter now.
fn bury_the_poison(books: &mut Books) -> Result<()> {
    let mut poison = Vec::new();
    for (name, queue) in &books.state.queues {
        let limit = queue.spec.delivery_limit.get();
        let spent = queue
            .messages
            .iter()
            .filter(|(_, stored)| stored.attempts >= limit);
        poison.extend(spent.map(|(seq, _)| (name.clone(), *seq)));
    }
    poison
        .iter()
        .try_for_each(|(queue, seq)| give_back(books, queue, *seq, Duration::ZERO))
}

// Step 4: the broker. Each method is a step.

#[derive(Debug)]
struct Handle {
    store: Arc<Store>,
    id: u64,
}

impl Handle {
    fn open(store: &Arc<Store>) -> Arc<dyn Broker> {
        let id = store.step(|books| {
            let id = books.state.next();
            books.state.open.insert(id);
            id
        });
        Arc::new(Self {
            store: Arc::clone(store),
            id,
        })
    }

    /// A look that writes nothing; still not before what it shows is safe.
    async fn step<T>(&self, by: Deadline, step: impl FnOnce(&mut Books) -> Result<T>) -> Result<T> {
        self.store
            .commit(self.id, by, step)
            .await
            .map_err(|error| error.with_backend(NAME))
    }
}

const NAME: &str = "append-only";
const MAX_BODY_BYTES: usize = 16 << 20;

#[async_trait]
impl Broker for Handle {
    fn backend(&self) -> &'static str {
        NAME
    }

    async fn declare(&self, spec: &QueueSpec, by: Deadline) -> Result<Declared> {
        let step = |books: &mut Books| match books.state.queues.get(&spec.name) {
            None => {
                books.note(Record::Declared { spec: spec.clone() }, Bytes::new())?;
                Ok(Declared::Created)
            }
            Some(queue) => match queue.spec.differences(spec) {
                differences if differences.is_empty() => Ok(Declared::AlreadyExists),
                differences => Err(error(
                    ErrorKind::Mismatch { differences },
                    "the queue is otherwise",
                )),
            },
        };
        self.step(by, step).await
    }

    async fn status(&self, queue: &QueueName, by: Deadline) -> Result<QueueStatus> {
        self.step(by, |books| Ok(status(books.state.queue(queue)?)))
            .await
    }

    async fn list(&self, by: Deadline) -> Result<Vec<QueueStatus>> {
        self.step(by, |books| {
            Ok(books.state.queues.values().map(status).collect())
        })
        .await
    }

    async fn delete(&self, queue: &QueueName, mode: DeleteMode, by: Deadline) -> Result<Discarded> {
        let step = |books: &mut Books| {
            let held = books.state.queue(queue)?;
            let messages = status(held).messages();
            if mode == DeleteMode::IfEmpty && messages > 0 {
                return Err(error(
                    ErrorKind::NotEmpty { messages },
                    "the queue holds messages",
                ));
            }
            let ids = held
                .messages
                .values()
                .map(|stored| stored.message.id.clone());
            let discarded = Discarded::new(messages, ids.take(Discarded::MAX_IDS).collect());
            books.note(
                Record::Deleted {
                    queue: queue.clone(),
                },
                Bytes::new(),
            )?;
            Ok(discarded)
        };
        self.step(by, step).await
    }

    async fn publish(&self, queue: &QueueName, message: Message, by: Deadline) -> Result<Receipt> {
        let step = |books: &mut Books| {
            let held = books.state.queue(queue)?;
            if message.body.len() > MAX_BODY_BYTES {
                let limit = MAX_BODY_BYTES as u64;
                return Err(error(
                    ErrorKind::TooLarge { limit },
                    "the body is too large",
                ));
            }
            if held
                .messages
                .values()
                .any(|stored| stored.message.id == message.id)
            {
                return Ok(Receipt::new(true));
            }
            if held
                .spec
                .max_messages
                .is_some_and(|most| held.messages.len() as u64 >= most)
            {
                return Err(error(ErrorKind::BrokerRefused, "the queue is full"));
            }
            let (queue, seq, about) = (queue.clone(), books.state.next(), About::of(&message));
            books.note(Record::Stored { queue, seq, about }, message.body)?;
            Ok(Receipt::new(false))
        };
        self.step(by, step).await
    }

    async fn consume(
        &self,
        queue: &QueueName,
        options: ConsumeOptions,
        by: Deadline,
    ) -> Result<Box<dyn Consumer>> {
        let step = |books: &mut Books| {
            let me = Holder {
                consumer: books.state.next(),
                handle: self.id,
            };
            let held = books.state.queue(queue)?;
            if held.consumer.is_some() {
                return Err(error(ErrorKind::Conflict, "another consumer is attached"));
            }
            held.consumer = Some(me);
            let (store, queue) = (Arc::clone(&self.store), queue.clone());
            Ok(Attached {
                store,
                queue,
                me,
                prefetch: options.prefetch.get() as usize,
            })
        };
        Ok(Box::new(self.step(by, step).await?))
    }

    async fn dead_letters(
        &self,
        queue: &QueueName,
        after: Option<&DeadLetterKey>,
        limit: NonZeroU32,
        by: Deadline,
    ) -> Result<Vec<DeadLetter>> {
        let after = after.and_then(|key| key.0.parse().ok()).unwrap_or(0);
        let step = |books: &mut Books| {
            let letters = books.state.queue(queue)?.dead.range(after + 1..);
            Ok(letters
                .take(limit.get() as usize)
                .map(|(_, letter)| letter.clone())
                .collect())
        };
        self.step(by, step).await
    }

    async fn redrive(&self, queue: &QueueName, key: &DeadLetterKey, by: Deadline) -> Result<bool> {
        let step = |books: &mut Books| {
            let held = books.state.queue(queue)?;
            let key = key.0.parse().unwrap_or(0);
            let Some(letter) = held.dead.get(&key) else {
                return Ok(false);
            };
            if held
                .messages
                .values()
                .any(|stored| stored.message.id == letter.message.id)
            {
                return Err(error(
                    ErrorKind::Conflict,
                    "a message of this id is in the queue",
                ));
            }
            if held
                .spec
                .max_messages
                .is_some_and(|most| held.messages.len() as u64 >= most)
            {
                return Err(error(ErrorKind::BrokerRefused, "the queue is full"));
            }
            let (queue, seq) = (queue.clone(), books.state.next());
            books.note(Record::Redriven { queue, key, seq }, Bytes::new())?;
            Ok(true)
        };
        self.step(by, step).await
    }

    async fn request(&self, lane: &GuestAddress, body: Bytes, by: Deadline) -> Result<Bytes> {
        let (reply, answer) = oneshot::channel();
        let asked = self.store.step(|books| {
            let token = books.state.next();
            ask(
                &mut books.state,
                self.id,
                lane,
                Asked { token, body, reply },
            )
            .map(|()| token)
        });
        let _forget = Forget {
            store: &self.store,
            lane,
            token: asked?,
        };
        match by.bound(answer).await {
            Ok(Ok(answer)) => return Ok(answer),
            // Whoever was asked went without a word: the asker's deadline is still its own.
            Ok(Err(_)) => sleep_until(by.instant()).await,
            Err(_) => {}
        }
        Err(error(
            ErrorKind::ConsumerSilent,
            "the guest did not answer in time",
        ))
    }

    async fn respond(&self, lane: &GuestAddress, by: Deadline) -> Result<Box<dyn Responder>> {
        let step = |books: &mut Books| {
            let token = books.state.next();
            if books.state.lanes.contains_key(lane) {
                return Err(error(
                    ErrorKind::Conflict,
                    "somebody else is attached to this lane",
                ));
            }
            let held = Lane {
                token,
                handle: self.id,
                waiting: VecDeque::new(),
            };
            books.state.lanes.insert(lane.clone(), held);
            Ok(OnLane {
                store: Arc::clone(&self.store),
                lane: lane.clone(),
                token,
            })
        };
        Ok(Box::new(self.step(by, step).await?))
    }

    async fn durability(&self, by: Deadline) -> Result<DurabilityReport> {
        self.step(by, |_| Ok(())).await?;
        let mut report = DurabilityReport::new(NAME, env!("CARGO_PKG_VERSION"), Level::Power);
        report.findings.push(Finding {
            setting: "fdatasync".into(),
            value: Some("before every Ok".into()),
            meaning: "what is confirmed is on the disk, if the disk does not lie".into(),
            advice: None,
        });
        Ok(report)
    }

    async fn close(&self, _by: Deadline) -> Result<()> {
        self.store.step(|books| vanish(books, self.id))
    }
}

fn status(queue: &Queue) -> QueueStatus {
    let mut status = QueueStatus::new(queue.spec.name.clone());
    let now = Instant::now();
    for stored in queue.messages.values() {
        match stored.place {
            Place::Due(due) if due <= now => status.ready += 1,
            Place::Due(_) => status.delayed += 1,
            Place::Held { .. } => status.in_flight += 1,
        }
    }
    status.dead = queue.dead.len() as u64;
    status.consumers = u32::from(queue.consumer.is_some());
    status
}

/// A handle is gone: what it held goes back, what it was attached to is free.
fn vanish(books: &mut Books, gone: u64) -> Result<()> {
    books.state.open.remove(&gone);
    books.state.lanes.retain(|_, lane| lane.handle != gone);
    let mut held = Vec::new();
    for (name, queue) in &mut books.state.queues {
        queue.consumer = queue.consumer.filter(|holder| holder.handle != gone);
        let its = queue.messages.iter().filter(
            |(_, stored)| matches!(stored.place, Place::Held { by, .. } if by.handle == gone),
        );
        held.extend(its.map(|(seq, _)| (name.clone(), *seq)));
    }
    held.iter()
        .try_for_each(|(queue, seq)| give_back(books, queue, *seq, Duration::ZERO))
}

// Step 5: deliveries. A lease is a number that only its holder has; whoever settles shows it.

#[derive(Debug)]
struct Attached {
    store: Arc<Store>,
    queue: QueueName,
    me: Holder,
    prefetch: usize,
}

impl Attached {
    /// The first message that is due, if there is room for it; else the moment when one will be.
    fn look(&self, books: &mut Books) -> Result<std::result::Result<Delivery, Option<Instant>>> {
        if !books.state.open.contains(&self.me.handle) {
            return Err(closed());
        }
        let lease = books.state.next();
        let queue = books.state.queues.get_mut(&self.queue);
        // A queue that was made again under the name has another consumer, or none.
        let queue = queue.filter(|queue| queue.consumer == Some(self.me));
        let queue = queue.ok_or_else(|| error(ErrorKind::QueueDeleted, "the queue was deleted"))?;
        let mine =
            |stored: &&Stored| matches!(stored.place, Place::Held { by, .. } if by == self.me);
        if queue.messages.values().filter(mine).count() >= self.prefetch {
            return Ok(Err(None));
        }
        let (now, mut next) = (Instant::now(), None::<Instant>);
        for (&seq, stored) in &mut queue.messages {
            match stored.place {
                Place::Due(due) if due <= now => {
                    stored.place = Place::Held { lease, by: self.me };
                    let (message, attempts) = (stored.message.clone(), stored.attempts + 1);
                    let (store, queue) = (Arc::clone(&self.store), self.queue.clone());
                    books.note(
                        Record::Counted {
                            queue: queue.clone(),
                            seq,
                            attempts,
                        },
                        Bytes::new(),
                    )?;
                    let held = Held {
                        store,
                        queue,
                        seq,
                        lease,
                        handle: self.me.handle,
                    };
                    return Ok(Ok(Delivery::new(message, attempts, Box::new(held))));
                }
                Place::Due(due) => next = Some(next.map_or(due, |next| next.min(due))),
                Place::Held { .. } => {}
            }
        }
        Ok(Err(next))
    }
}

#[async_trait]
impl Consumer for Attached {
    async fn next(&mut self) -> Result<Delivery> {
        let mut version = self.store.version.subscribe();
        loop {
            version.mark_unchanged();
            // No await between taking a message and returning it: dropped early, nothing is lost or counted.
            let looked = { self.look(&mut self.store.lock())? };
            let due = match looked {
                Ok(delivery) => {
                    self.store.work.notify_one();
                    return Ok(delivery);
                }
                Err(due) => due,
            };
            let due = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = version.changed() => {}
                () = due => {}
            }
        }
    }

    async fn close(self: Box<Self>, _by: Deadline) -> Result<()> {
        Ok(())
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.store.step(|books| {
            if let Ok(queue) = books.state.queue(&self.queue) {
                queue.consumer = queue.consumer.filter(|holder| *holder != self.me);
            }
        });
    }
}

#[derive(Debug)]
struct Held {
    store: Arc<Store>,
    queue: QueueName,
    seq: u64,
    lease: u64,
    handle: u64,
}

impl Held {
    fn settle(&self, books: &mut Books, settlement: Settlement) -> Result<()> {
        let queue = books.state.queues.get(&self.queue);
        let stored = queue.and_then(|queue| queue.messages.get(&self.seq));
        let ours = |stored: &Stored| matches!(stored.place, Place::Held { lease, .. } if lease == self.lease);
        if !stored.is_some_and(ours) {
            return Err(error(
                ErrorKind::LeaseLost,
                "the delivery is somebody else's, or settled, or gone",
            ));
        }
        let (queue, seq) = (self.queue.clone(), self.seq);
        match settlement {
            Settlement::Ack => books.note(Record::Acked { queue, seq }, Bytes::new()),
            Settlement::Retry(delay) => give_back(books, &queue, seq, delay),
            Settlement::DeadLetter(reason) => bury(books, &queue, seq, reason),
        }
    }
}

#[async_trait]
impl Lease for Held {
    async fn settle(self: Box<Self>, settlement: Settlement, by: Deadline) -> Result<()> {
        self.store
            .commit(self.handle, by, |books| {
                Held::settle(&self, books, settlement)
            })
            .await
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // After a settlement the lease is not ours any more, and this does nothing.
        let _ = self
            .store
            .step(|books| Held::settle(self, books, Settlement::Retry(Duration::ZERO)));
    }
}

/// A delivery ended without ack: the message comes again after this delay, or is a dead letter.
fn give_back(books: &mut Books, queue: &QueueName, seq: u64, delay: Duration) -> Result<()> {
    let limit = books.state.queue(queue)?.spec.delivery_limit.get();
    let stored = books.state.message(queue, seq)?;
    if stored.attempts >= limit {
        let reason = format!("delivered {} times without an ack", stored.attempts);
        return bury(books, queue, seq, reason);
    }
    let delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
    let (queue, until_unix_ms) = (queue.clone(), unix_ms().saturating_add(delay_ms));
    books.note(
        Record::Delayed {
            queue: queue.clone(),
            seq,
            until_unix_ms,
        },
        Bytes::new(),
    )?;
    // The wall clock is for the file; while this process lives the delay is exact.
    books.state.message(&queue, seq)?.place = Place::Due(Instant::now() + delay);
    Ok(())
}

fn bury(books: &mut Books, queue: &QueueName, seq: u64, reason: String) -> Result<()> {
    let (queue, key) = (queue.clone(), books.state.next());
    books.note(
        Record::Buried {
            queue,
            seq,
            key,
            reason,
        },
        Bytes::new(),
    )
}

// Step 6: lanes. Nothing of them is ever written.

#[derive(Debug)]
struct Lane {
    token: u64,
    handle: u64,
    waiting: VecDeque<Asked>,
}

#[derive(Debug)]
struct Asked {
    token: u64,
    body: Bytes,
    reply: oneshot::Sender<Bytes>,
}

fn ask(state: &mut State, handle: u64, lane: &GuestAddress, asked: Asked) -> Result<()> {
    fits(&asked.body)?;
    if !state.open.contains(&handle) {
        return Err(closed());
    }
    let nobody = || error(ErrorKind::NoConsumer, "nobody is attached to this lane");
    state
        .lanes
        .get_mut(lane)
        .ok_or_else(nobody)?
        .waiting
        .push_back(asked);
    Ok(())
}

/// However a request ends, it does not stand in the lane after it.
struct Forget<'a> {
    store: &'a Store,
    lane: &'a GuestAddress,
    token: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Some(lane) = self.store.lock().state.lanes.get_mut(self.lane) {
            lane.waiting.retain(|asked| asked.token != self.token);
        }
    }
}

#[derive(Debug)]
struct OnLane {
    store: Arc<Store>,
    lane: GuestAddress,
    token: u64,
}

#[async_trait]
impl Responder for OnLane {
    async fn next(&mut self) -> Result<Request> {
        let mut version = self.store.version.subscribe();
        loop {
            version.mark_unchanged();
            let asked = {
                let mut books = self.store.lock();
                let lane = books.state.lanes.get_mut(&self.lane);
                let lane = lane
                    .filter(|lane| lane.token == self.token)
                    .ok_or_else(closed)?;
                lane.waiting.pop_front()
            };
            if let Some(asked) = asked {
                return Ok(Request::new(asked.body, Box::new(WayBack(asked.reply))));
            }
            // The sender lives as long as the store, and that as long as this.
            let _ = version.changed().await;
        }
    }
}

impl Drop for OnLane {
    fn drop(&mut self) {
        self.store.step(|books| {
            let ours = books
                .state
                .lanes
                .get(&self.lane)
                .is_some_and(|lane| lane.token == self.token);
            if ours {
                books.state.lanes.remove(&self.lane);
            }
        });
    }
}

#[derive(Debug)]
struct WayBack(oneshot::Sender<Bytes>);

#[async_trait]
impl Reply for WayBack {
    async fn send(self: Box<Self>, body: Bytes, _by: Deadline) -> Result<()> {
        fits(&body)?;
        // The asker may be gone, which is no error of this side.
        let _ = self.0.send(body);
        Ok(())
    }
}

fn fits(body: &Bytes) -> Result<()> {
    if body.len() > MAX_REQUEST_BYTES {
        let limit = MAX_REQUEST_BYTES as u64;
        return Err(error(
            ErrorKind::TooLarge { limit },
            "a request or answer is too large",
        ));
    }
    Ok(())
}

fn error(kind: ErrorKind, text: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(kind, text).with_backend(NAME)
}

fn closed() -> Error {
    error(ErrorKind::Closed, "this handle was closed")
}

fn damaged() -> Error {
    error(
        ErrorKind::ForeignFile,
        "the file is damaged; nothing of it was changed",
    )
}

fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

// Step 7: held to the contract. The harness starts the broker, restarts it, and looks at it from its own side.

pub(crate) mod held {
    use std::sync::RwLock;

    use tempfile::TempDir;
    use wilco_conformance::harness::{Facts, Faults, Harness, Server, Unavailable, Use};

    use super::*;

    #[derive(Debug)]
    pub(crate) struct AppendOnly;

    #[async_trait]
    impl Harness for AppendOnly {
        fn name(&self) -> &str {
            NAME
        }

        async fn start(&self, _usage: Use) -> std::result::Result<Box<dyn Server>, String> {
            let directory = TempDir::with_prefix("wilco-x3-").map_err(|error| error.to_string())?;
            let file = directory.path().join("broker.log");
            let (store, writer) = Store::open(&file).map_err(|error| error.to_string())?;
            let running = RwLock::new(Some((store, writer)));
            Ok(Box::new(Running {
                running,
                file,
                _directory: directory,
            }))
        }
    }

    #[derive(Debug)]
    struct Running {
        running: RwLock<Option<(Arc<Store>, JoinHandle<()>)>>,
        file: PathBuf,
        _directory: TempDir,
    }

    impl Running {
        /// Ends every handle and the writer, as the end of the process does; all is written by then.
        fn stop(&self) {
            let running = self
                .running
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            let Some((store, writer)) = running else {
                return;
            };
            store.step(|books| {
                for handle in books.state.open.clone() {
                    // Only a full disk's address space could fail here, and then the next open tells.
                    let _ = vanish(books, handle);
                }
                books.stopped = true;
            });
            let _ = writer.join();
        }
    }

    #[async_trait]
    impl Server for Running {
        fn facts(&self) -> Facts {
            let version = env!("CARGO_PKG_VERSION").to_owned();
            let because = "the append-only broker lives inside one process";
            Facts::private(version, because, Duration::from_millis(500), Level::Power)
        }

        async fn connect(&self) -> Result<Arc<dyn Broker>> {
            let running = self.running.read().unwrap_or_else(PoisonError::into_inner);
            running
                .as_ref()
                .map(|(store, _)| Handle::open(store))
                .ok_or_else(closed)
        }

        async fn remains(
            &self,
            queue: &QueueName,
        ) -> std::result::Result<Vec<String>, Unavailable> {
            // The file as the next process will read it: the records of a queue that was deleted are dead
            // bytes in it, and go when it is opened.
            let text = |error: &dyn std::fmt::Display| Unavailable::because(error.to_string());
            let bytes = std::fs::read(&self.file).map_err(|error| text(&error))?;
            let state = replay(&bytes).map_err(|error| text(&error))?;
            let Some(queue) = state.queues.get(queue) else {
                return Ok(vec![]);
            };
            let mut found = vec![format!("the queue {}", queue.spec.name)];
            found.extend(queue.messages.keys().map(|seq| format!("message {seq}")));
            found.extend(queue.dead.keys().map(|key| format!("dead letter {key}")));
            Ok(found)
        }

        async fn restart(&self) -> std::result::Result<(), Unavailable> {
            self.stop();
            let opened =
                Store::open(&self.file).map_err(|error| Unavailable::because(error.to_string()))?;
            *self.running.write().unwrap_or_else(PoisonError::into_inner) = Some(opened);
            Ok(())
        }

        fn faults(&self) -> std::result::Result<&dyn Faults, Unavailable> {
            Err(Unavailable::because(
                "it is no process and has no network: nothing to kill or cut",
            ))
        }
    }

    impl Drop for Running {
        fn drop(&mut self) {
            self.stop();
        }
    }
}

/// Runs every check, prints the report, and ends well if nothing failed.
#[tokio::main]
async fn main() -> ExitCode {
    use wilco_conformance::{
        check::Options,
        registry,
        report::{Line, Report, Run},
    };

    let options = Options::new(1, None);
    let mut run = Run::begin(&held::AppendOnly, options.seed).await;
    let mut out = io::stdout();
    for check in registry::all() {
        let line = Line::from(check.run_on(&held::AppendOnly, &options).await);
        if writeln!(out, "{line}").is_err() {
            return ExitCode::FAILURE;
        }
        run.lines.push(line);
    }
    let mut report = Report::default();
    report.runs.push(run);
    let told = writeln!(out, "\n{report}").is_ok();
    if told && report.passed() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
