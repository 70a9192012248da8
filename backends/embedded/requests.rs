//! Requests and answers: over channels inside a process, over a Unix socket between processes. Nothing
//! of it is ever in the database (law R9), and nothing of it stays when an asker gives up (law R5).
//!
//! A frame is a length (u32), a request's number (u64), and the body; little-endian. The answer has
//! the number of its request.

use std::{
    collections::HashMap,
    fmt, io,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Notify, Semaphore, mpsc, oneshot},
    task::AbortHandle,
};

use super::{
    attach::Lock,
    closed,
    connection::{Core, Handle, lock},
    consume::take_patiently,
};
use crate::{
    broker::{MAX_REQUEST_BYTES, Reply, Request, Responder},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    names::QueueName,
};

/// Requests that wait for a responder to look. Whoever asks meanwhile waits outside.
const WAITING: usize = 64;

/// Frames that wait to be written to one connection.
const FRAMES: usize = 64;

/// Processes that ask one responder at once.
const ASKERS: usize = 256;

/// A connection that nobody asked over for this long is closed.
const IDLE: Duration = Duration::from_secs(10);

/// What stands before a body.
const HEAD: usize = 12;

pub(super) async fn request(
    handle: &Handle,
    queue: &QueueName,
    body: Bytes,
    deadline: Deadline,
) -> Result<Bytes> {
    let core = handle.open()?;
    check_size(&body)?;
    tokio::select! {
        biased;
        answer = ask(core, queue, body, deadline) => answer,
        () = handle.until_closed() => Err(closed()),
    }
}

async fn ask(
    core: &Arc<Core>,
    queue: &QueueName,
    body: Bytes,
    deadline: Deadline,
) -> Result<Bytes> {
    let here = lock(&core.lanes.0)
        .get(queue)
        .map(|lane| lane.requests.clone());
    if let Some(requests) = here {
        return ask_here(&requests, body, deadline).await;
    }
    let Some(attachments) = &core.attachments else {
        return Err(nobody());
    };
    let socket = attachments.lane_socket(queue)?;
    // A second time, because the first connection may be one to a responder that is gone by now.
    for attempt in 0..2 {
        let known = core.asking.of(queue).filter(|_| attempt == 0);
        let connection = match known {
            Some(connection) => connection,
            None => {
                let stream = connect(&socket, deadline).await?;
                core.asking.start(core, queue, stream)
            }
        };
        if let Some(answer) = connection.ask(body.clone(), deadline).await? {
            return Ok(answer);
        }
    }
    Err(nobody())
}

async fn ask_here(
    requests: &mpsc::Sender<Incoming>,
    body: Bytes,
    deadline: Deadline,
) -> Result<Bytes> {
    let (reply, answer) = oneshot::channel();
    let incoming = Incoming {
        body,
        reply: Way::Here(reply),
    };
    let exchange = async {
        if requests.send(incoming).await.is_err() {
            return Err(nobody());
        }
        // A request that was dropped without an answer leaves its asker to the deadline.
        let answer = async {
            match answer.await {
                Ok(answer) => answer,
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            answer = answer => Ok(answer),
            () = requests.closed() => Err(nobody()),
        }
    };
    deadline
        .bound(exchange)
        .await
        .unwrap_or_else(|_| Err(silent()))
}

fn check_size(body: &Bytes) -> Result<()> {
    if body.len() <= MAX_REQUEST_BYTES {
        return Ok(());
    }
    let limit = MAX_REQUEST_BYTES as u64;
    Err(Error::new(
        ErrorKind::TooLarge { limit },
        format!(
            "a request or answer has at most {limit} bytes, this one has {}",
            body.len()
        ),
    ))
}

fn nobody() -> Error {
    Error::new(ErrorKind::NoConsumer, "nobody is attached to this lane")
}

fn silent() -> Error {
    Error::new(
        ErrorKind::ConsumerSilent,
        "the guest is attached, but did not answer in time",
    )
}

pub(super) async fn respond(
    handle: &Arc<Handle>,
    queue: &QueueName,
    deadline: Deadline,
) -> Result<Box<dyn Responder>> {
    let core = handle.open()?;
    let taken = || {
        Error::new(
            ErrorKind::Conflict,
            "another responder is attached to this lane, and it is alive",
        )
    };
    if lock(&core.lanes.0).contains_key(queue) {
        return Err(taken());
    }
    let outside = match &core.attachments {
        None => None,
        Some(attachments) => {
            let path = attachments.lane_lock(queue);
            let proof = take_patiently(&path, deadline).await?.ok_or_else(taken)?;
            let socket = attachments.lane_socket(queue)?;
            // Whoever had the lock before us is dead, and so is its socket.
            let _ = std::fs::remove_file(&socket);
            Some((proof, UnixListener::bind(&socket)?))
        }
    };
    let (requests, incoming) = mpsc::channel(WAITING);
    let (proof, accepting) = match outside {
        None => (None, None),
        Some((proof, listener)) => {
            let accepting = tokio::spawn(accept(listener, requests.clone()));
            (Some(proof), Some(accepting.abort_handle()))
        }
    };
    let lane = Arc::new(Lane {
        core: Arc::clone(core),
        queue: queue.clone(),
        accepting,
        proof: Mutex::new(proof),
        detached: AtomicBool::new(false),
    });
    {
        let mut lanes = lock(&core.lanes.0);
        if lanes.contains_key(queue) {
            // Not ours to remove when this one goes.
            lane.detached.store(true, Ordering::Release);
            return Err(taken());
        }
        lanes.insert(queue.clone(), Here { requests });
    }
    handle.remember_lane(&lane);
    Ok(Box::new(Answering {
        handle: Arc::clone(handle),
        lane,
        incoming,
    }))
}

/// This process's responders, by queue.
#[derive(Debug, Default)]
pub(super) struct Lanes(Mutex<HashMap<QueueName, Here>>);

#[derive(Debug)]
struct Here {
    requests: mpsc::Sender<Incoming>,
}

/// What a responder holds for as long as it is attached.
pub(super) struct Lane {
    core: Arc<Core>,
    queue: QueueName,
    accepting: Option<AbortHandle>,
    proof: Mutex<Option<Lock>>,
    detached: AtomicBool,
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane")
            .field("queue", &self.queue)
            .finish_non_exhaustive()
    }
}

impl Lane {
    pub(super) fn detach(&self) {
        if !self.detached.swap(true, Ordering::AcqRel) {
            lock(&self.core.lanes.0).remove(&self.queue);
            if self.accepting.is_some()
                && let Some(attachments) = &self.core.attachments
                && let Ok(socket) = attachments.lane_socket(&self.queue)
            {
                let _ = std::fs::remove_file(socket);
            }
        }
        if let Some(accepting) = &self.accepting {
            accepting.abort();
        }
        // Last: from here on the lane is somebody else's.
        *lock(&self.proof) = None;
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.detach();
    }
}

#[derive(Debug)]
struct Answering {
    handle: Arc<Handle>,
    lane: Arc<Lane>,
    incoming: mpsc::Receiver<Incoming>,
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.lane.detach();
    }
}

#[async_trait]
impl Responder for Answering {
    async fn next(&mut self) -> Result<Request> {
        let queue = self.lane.queue.clone();
        loop {
            tokio::select! {
                biased;
                () = self.handle.until_closed() => {
                    // Whoever waits for an answer learns that nobody is there.
                    self.incoming.close();
                    return Err(super::at("respond", &queue)(closed()));
                }
                incoming = self.incoming.recv() => {
                    let Some(Incoming { body, reply }) = incoming else {
                        return Err(super::at("respond", &queue)(closed()));
                    };
                    // An asker who gave up meanwhile needs no answer.
                    if !reply.is_gone() {
                        return Ok(Request::new(body, Box::new(reply)));
                    }
                }
            }
        }
    }
}

#[derive(Debug)]
struct Incoming {
    body: Bytes,
    reply: Way,
}

/// The way back to an asker.
#[derive(Debug)]
enum Way {
    Here(oneshot::Sender<Bytes>),
    There {
        frames: mpsc::Sender<Frame>,
        number: u64,
    },
}

impl Way {
    fn is_gone(&self) -> bool {
        match self {
            Self::Here(reply) => reply.is_closed(),
            Self::There { frames, .. } => frames.is_closed(),
        }
    }
}

#[async_trait]
impl Reply for Way {
    async fn send(self: Box<Self>, body: Bytes, deadline: Deadline) -> Result<()> {
        check_size(&body)?;
        match *self {
            // An asker that is gone is no failure of ours (law R6).
            Self::Here(reply) => {
                let _ = reply.send(body);
            }
            Self::There { frames, number } => {
                let frame = Frame { number, body };
                let _ = deadline.bound(frames.send(frame)).await?;
            }
        }
        Ok(())
    }
}

/// A request or an answer on a socket.
#[derive(Debug)]
struct Frame {
    number: u64,
    body: Bytes,
}

async fn accept(listener: UnixListener, requests: mpsc::Sender<Incoming>) {
    let room = Arc::new(Semaphore::new(ASKERS));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let requests = requests.clone();
                tokio::spawn(async move {
                    serve(stream, &requests).await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Such as too many open files: it passes, and a busy loop would not help.
                tracing::warn!(%error, "a lane cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Serves one asking process, until it or the responder goes.
async fn serve(stream: UnixStream, requests: &mpsc::Sender<Incoming>) {
    let (mut read, write) = stream.into_split();
    let (frames, to_write) = mpsc::channel(FRAMES);
    let writing = tokio::spawn(write_frames(write, to_write));
    let mut buffer = BytesMut::new();
    let serving = async {
        while let Ok(Some(Frame { number, body })) = read_frame(&mut read, &mut buffer).await {
            let reply = Way::There {
                frames: frames.clone(),
                number,
            };
            if requests.send(Incoming { body, reply }).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = serving => {}
        () = requests.closed() => {}
    }
    // So that answers still held by a handler do not keep the connection.
    writing.abort();
}

async fn write_frames(mut write: OwnedWriteHalf, mut frames: mpsc::Receiver<Frame>) {
    let mut buffer = BytesMut::new();
    while let Some(frame) = frames.recv().await {
        put_frame(&mut buffer, &frame);
        while buffer.len() < 64 * 1024
            && let Ok(frame) = frames.try_recv()
        {
            put_frame(&mut buffer, &frame);
        }
        if write.write_all_buf(&mut buffer).await.is_err() {
            return;
        }
    }
}

fn put_frame(buffer: &mut BytesMut, frame: &Frame) {
    // Bodies are bounded far below what a u32 holds.
    let length = u32::try_from(frame.body.len() + 8).unwrap_or(u32::MAX);
    buffer.put_u32_le(length);
    buffer.put_u64_le(frame.number);
    buffer.put_slice(&frame.body);
}

/// Reads one frame; None at a clean end. Nothing is reserved for a length that is not allowed, nor
/// before the bytes are there (law S2).
async fn read_frame(read: &mut OwnedReadHalf, buffer: &mut BytesMut) -> io::Result<Option<Frame>> {
    loop {
        if buffer.len() >= 4 {
            let length = u32::from_le_bytes([buffer[0], buffer[1], buffer[2], buffer[3]]) as usize;
            if !(8..=8 + MAX_REQUEST_BYTES).contains(&length) {
                return Err(io::ErrorKind::InvalidData.into());
            }
            if buffer.len() >= 4 + length {
                let mut frame = buffer.split_to(4 + length);
                frame.advance(4);
                let number = frame.get_u64_le();
                return Ok(Some(Frame {
                    number,
                    body: frame.freeze(),
                }));
            }
        }
        buffer.reserve(HEAD + 4096);
        if read.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

/// Connects to a lane's socket.
async fn connect(socket: &Path, deadline: Deadline) -> Result<UnixStream> {
    loop {
        match deadline.bound(UnixStream::connect(socket)).await {
            Err(_) => return Err(silent()),
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => match error.kind() {
                io::ErrorKind::NotFound
                | io::ErrorKind::ConnectionRefused
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::BrokenPipe => return Err(nobody()),
                // Its line is full: it is there, and does not look.
                io::ErrorKind::WouldBlock => {
                    let moment = tokio::time::sleep(Duration::from_millis(5));
                    if deadline.bound(moment).await.is_err() {
                        return Err(silent());
                    }
                }
                _ => {
                    return Err(Error::new(
                        ErrorKind::Io,
                        format!("the lane's socket cannot be used: {error}"),
                    )
                    .with_source(error));
                }
            },
        }
    }
}

/// This process's connections to responders of others, by queue.
#[derive(Debug, Default)]
pub(super) struct Asking(Mutex<HashMap<QueueName, Arc<Line>>>);

impl Asking {
    fn of(&self, queue: &QueueName) -> Option<Arc<Line>> {
        lock(&self.0).get(queue).cloned()
    }

    fn start(&self, core: &Arc<Core>, queue: &QueueName, stream: UnixStream) -> Arc<Line> {
        let (frames, to_write) = mpsc::channel(FRAMES);
        let line = Arc::new(Line {
            frames,
            pending: Mutex::default(),
            next: AtomicU64::new(0),
            stop: Notify::new(),
        });
        lock(&self.0).insert(queue.clone(), Arc::clone(&line));
        let (core, queue, running) = (Arc::downgrade(core), queue.clone(), Arc::clone(&line));
        tokio::spawn(async move {
            running.run(stream, to_write).await;
            if let Some(core) = core.upgrade() {
                let mut lines = lock(&core.asking.0);
                if lines
                    .get(&queue)
                    .is_some_and(|line| Arc::ptr_eq(line, &running))
                {
                    lines.remove(&queue);
                }
            }
            running.end();
        });
        line
    }

    pub(super) fn clear(&self) {
        for (_, line) in lock(&self.0).drain() {
            line.end();
        }
    }
}

/// One connection, on which many requests are under way.
#[derive(Debug)]
struct Line {
    frames: mpsc::Sender<Frame>,
    /// None once the connection has ended.
    pending: Mutex<Pending>,
    next: AtomicU64,
    stop: Notify,
}

#[derive(Debug, Default)]
struct Pending {
    answers: HashMap<u64, oneshot::Sender<Bytes>>,
    ended: bool,
}

/// Forgets a request whose asker is gone.
struct Forget<'a>(&'a Line, u64);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(&self.0.pending).answers.remove(&self.1);
    }
}

impl Line {
    /// None if the connection ended first.
    async fn ask(&self, body: Bytes, deadline: Deadline) -> Result<Option<Bytes>> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        {
            let mut pending = lock(&self.pending);
            if pending.ended {
                return Ok(None);
            }
            pending.answers.insert(number, reply);
        }
        let _forget = Forget(self, number);
        let exchange = async {
            self.frames.send(Frame { number, body }).await.ok()?;
            answer.await.ok()
        };
        deadline.bound(exchange).await.map_err(|_| silent())
    }

    async fn run(&self, stream: UnixStream, frames: mpsc::Receiver<Frame>) {
        let (mut read, write) = stream.into_split();
        let mut buffer = BytesMut::new();
        let reading = async {
            loop {
                let frame = tokio::time::timeout(IDLE, read_frame(&mut read, &mut buffer)).await;
                match frame {
                    Ok(Ok(Some(Frame { number, body }))) => {
                        // Late or never asked: dropped (law R5).
                        let asker = lock(&self.pending).answers.remove(&number);
                        if let Some(asker) = asker {
                            let _ = asker.send(body);
                        }
                    }
                    Err(_) => {
                        let mut pending = lock(&self.pending);
                        if pending.answers.is_empty() {
                            pending.ended = true;
                            return;
                        }
                    }
                    Ok(Ok(None) | Err(_)) => return,
                }
            }
        };
        tokio::select! {
            () = reading => {}
            () = write_frames(write, frames) => {}
            () = self.stop.notified() => {}
        }
    }

    fn end(&self) {
        let mut pending = lock(&self.pending);
        pending.ended = true;
        pending.answers.clear();
        drop(pending);
        self.stop.notify_one();
    }
}
