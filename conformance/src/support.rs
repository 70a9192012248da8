//! What checks are written with: names, messages, bounded waits.

use std::{
    fmt,
    future::poll_fn,
    num::NonZeroU32,
    pin::pin,
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use bytes::Bytes;
use wilco::{
    Broker, Deadline, Error, ErrorKind, GuestAddress, GuestId, Message, MessageId, QueueName,
    broker::{ConsumeOptions, Consumer, Delivery, QueueSpec, QueueStatus, Request, Responder},
};

use crate::{check::CheckError, harness::Unavailable};

/// Far longer than anything takes on a working broker, so that passing it is a failure.
pub(crate) const LONG: Duration = Duration::from_secs(20);

/// What counts as "within a round trip" on a loaded machine: far below any timeout.
pub(crate) const ROUND_TRIP: Duration = Duration::from_secs(1);

/// A deadline that only a broken broker meets.
pub(crate) fn long() -> Deadline {
    Deadline::after(LONG)
}

/// How the ids of the suite's guests begin, so that on a broker that others use too nobody else has
/// one of them.
pub(crate) const PREFIX: &str = "conformance-";

/// The first machine under this id, which is put behind [`PREFIX`].
pub(crate) fn guest(id: &str) -> Result<GuestAddress, CheckError> {
    Ok(GuestAddress::from(GuestId::new(format!("{PREFIX}{id}"))?))
}

/// A queue of this guest's, made.
pub(crate) async fn queue(broker: &dyn Broker, id: &str) -> Result<QueueName, CheckError> {
    let name = guest(id)?.queue();
    broker
        .declare(&QueueSpec::new(name.clone()), long())
        .await?;
    Ok(name)
}

/// A queue of this guest's, made with a delivery limit.
pub(crate) async fn limited(
    broker: &dyn Broker,
    id: &str,
    limit: u32,
) -> Result<QueueName, CheckError> {
    let name = guest(id)?.queue();
    let spec = QueueSpec::new(name.clone()).with_delivery_limit(count(limit));
    broker.declare(&spec, long()).await?;
    Ok(name)
}

/// A number that is not zero; zero becomes one.
pub(crate) fn count(n: u32) -> NonZeroU32 {
    NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN)
}

/// This many at once.
pub(crate) fn prefetch(n: u32) -> ConsumeOptions {
    ConsumeOptions::prefetch(count(n))
}

/// A message with this body and a new id.
pub(crate) fn message(body: impl Into<Bytes>) -> Result<Message, CheckError> {
    Ok(Message::new("check", body)?)
}

/// A message with this id, its body the same text.
pub(crate) fn named(id: impl Into<String>) -> Result<Message, CheckError> {
    let id = id.into();
    Ok(Message::new("check", id.clone())?.with_id(MessageId::new(id)?))
}

/// Publishes a message with this id; Ok is needed.
pub(crate) async fn put(
    broker: &dyn Broker,
    queue: &QueueName,
    id: impl Into<String>,
) -> Result<(), CheckError> {
    broker.publish(queue, named(id)?, long()).await?;
    Ok(())
}

/// Attaches with this prefetch. A consumer that went a moment ago may still count for as long as the
/// backend needs to notice, so a conflict is tried again until `LONG` is over.
pub(crate) async fn attach(
    broker: &dyn Broker,
    queue: &QueueName,
    n: u32,
) -> Result<Box<dyn Consumer>, CheckError> {
    let deadline = long();
    loop {
        match broker.consume(queue, prefetch(n), deadline).await {
            Ok(consumer) => return Ok(consumer),
            Err(error) if *error.kind() == ErrorKind::Conflict && !deadline.has_passed() => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Attaches to a lane, as [`attach`] does to a queue.
pub(crate) async fn attach_lane(
    broker: &dyn Broker,
    lane: &GuestAddress,
) -> Result<Box<dyn Responder>, CheckError> {
    let deadline = long();
    loop {
        match broker.respond(lane, deadline).await {
            Ok(responder) => return Ok(responder),
            Err(error) if *error.kind() == ErrorKind::Conflict && !deadline.has_passed() => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// The next delivery; that none comes within `LONG` is a failure.
pub(crate) async fn receive(consumer: &mut dyn Consumer) -> Result<Delivery, CheckError> {
    receive_within(consumer, LONG).await
}

/// The next delivery, within this time.
pub(crate) async fn receive_within(
    consumer: &mut dyn Consumer,
    within: Duration,
) -> Result<Delivery, CheckError> {
    match tokio::time::timeout(within, consumer.next()).await {
        Ok(delivery) => Ok(delivery?),
        Err(_) => Err(CheckError::failed(
            format!("a delivery within {within:?}"),
            "none came",
        )),
    }
}

/// The next request, within `LONG`.
pub(crate) async fn asked(responder: &mut dyn Responder) -> Result<Request, CheckError> {
    match tokio::time::timeout(LONG, responder.next()).await {
        Ok(request) => Ok(request?),
        Err(_) => Err(CheckError::failed(
            format!("a request within {LONG:?}"),
            "none came",
        )),
    }
}

/// Shows that no delivery comes for this long.
pub(crate) async fn silence(
    consumer: &mut dyn Consumer,
    time: Duration,
    why: &str,
) -> Result<(), CheckError> {
    match tokio::time::timeout(time, consumer.next()).await {
        Err(_) => Ok(()),
        Ok(Ok(delivery)) => Err(CheckError::failed(
            format!("no delivery: {why}"),
            format!("{} came, attempt {}", delivery.message.id, delivery.attempt),
        )),
        Ok(Err(error)) => Err(error.into()),
    }
}

/// Receives and acks all that is there, up to a last message put behind it, and returns their ids in
/// order. Needs a queue with nothing delayed.
pub(crate) async fn drain(
    broker: &dyn Broker,
    queue: &QueueName,
) -> Result<Vec<String>, CheckError> {
    let last = format!("last-{}", MessageId::generate());
    put(broker, queue, last.clone()).await?;
    let mut consumer = attach(broker, queue, 64).await?;
    let mut ids = Vec::new();
    loop {
        let delivery = receive(&mut *consumer).await?;
        let id = delivery.message.id.to_string();
        delivery.ack(long()).await?;
        if id == last {
            consumer.close(long()).await?;
            return Ok(ids);
        }
        ids.push(id);
    }
}

/// Waits until the queue's status is as wanted; that it does not become so within `LONG` is a
/// failure.
pub(crate) async fn until_status(
    broker: &dyn Broker,
    queue: &QueueName,
    wanted: &str,
    is: impl Fn(&QueueStatus) -> bool,
) -> Result<QueueStatus, CheckError> {
    let deadline = long();
    loop {
        let status = broker.status(queue, deadline).await?;
        if is(&status) {
            return Ok(status);
        }
        if deadline.has_passed() {
            return Err(CheckError::failed(
                format!("status: {wanted}"),
                format!("{status:?}"),
            ));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The memory that a process has in use, in bytes: `self`, or its id.
pub(crate) fn resident(process: &str) -> Result<u64, CheckError> {
    let unreadable = || Unavailable::because("this system has no /proc/PID/statm");
    let statm =
        std::fs::read_to_string(format!("/proc/{process}/statm")).map_err(|_| unreadable())?;
    let pages = statm
        .split_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok());
    Ok(pages.ok_or_else(unreadable)? * rustix::param::page_size() as u64)
}

/// Fails unless the condition holds.
pub(crate) fn expect(
    holds: bool,
    expected: impl Into<String>,
    seen: impl fmt::Display,
) -> Result<(), CheckError> {
    if holds {
        Ok(())
    } else {
        Err(CheckError::failed(expected, seen))
    }
}

/// Fails unless both are the same.
pub(crate) fn same<T: PartialEq + fmt::Debug>(
    what: &str,
    seen: T,
    expected: T,
) -> Result<(), CheckError> {
    if seen == expected {
        return Ok(());
    }
    Err(CheckError::failed(
        format!("{what}: {}", short(&expected)),
        short(&seen),
    ))
}

/// A value's text, cut where a reader stops reading.
pub(crate) fn short(value: &impl fmt::Debug) -> String {
    let text = format!("{value:?}");
    match text.char_indices().nth(400) {
        Some((at, _)) => format!("{}… ({} bytes)", &text[..at], text.len()),
        None => text,
    }
}

/// The error of a call that must fail.
pub(crate) fn must_fail<T>(what: &str, result: wilco::Result<T>) -> Result<Error, CheckError> {
    match result {
        Ok(_) => Err(CheckError::failed(format!("{what} fails"), "Ok")),
        Err(error) => Ok(error),
    }
}

/// The call must fail with this kind.
pub(crate) fn must_be<T>(
    what: &str,
    result: wilco::Result<T>,
    kind: &ErrorKind,
) -> Result<Error, CheckError> {
    let error = must_fail(what, result)?;
    if error.kind() == kind {
        return Ok(error);
    }
    Err(CheckError::failed(
        format!("{what} is {kind:?}"),
        format!("{error} ({:?})", error.kind()),
    ))
}

/// A call's result and the time that it took; that it takes longer than `LONG` is a failure.
pub(crate) async fn timed<T>(
    what: &str,
    call: impl Future<Output = T>,
) -> Result<(T, Duration), CheckError> {
    let started = Instant::now();
    match tokio::time::timeout(LONG, call).await {
        Ok(result) => Ok((result, started.elapsed())),
        Err(_) => Err(CheckError::failed(
            format!("{what} ends"),
            format!("nothing after {LONG:?}"),
        )),
    }
}

/// Polls a future at most this often, each time when it asked for it, then drops it. `None`: it was
/// dropped before its end. So a future is cut at each of its await points in turn.
pub(crate) async fn cut_after<T>(polls: usize, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    let mut left = polls;
    poll_fn(|cx| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match future.as_mut().poll(cx) {
            Poll::Ready(result) => Poll::Ready(Some(result)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Joins tasks that each return a check's result.
pub(crate) async fn join_all<T: 'static>(
    tasks: impl IntoIterator<Item = tokio::task::JoinHandle<Result<T, CheckError>>>,
) -> Result<Vec<T>, CheckError> {
    let mut results = Vec::new();
    for task in tasks {
        match task.await {
            Ok(result) => results.push(result?),
            Err(error) => return Err(CheckError::failed("no panic", error)),
        }
    }
    Ok(results)
}

/// Several handles on one broker.
pub(crate) async fn handles(
    cx: &crate::check::Cx,
    n: usize,
) -> Result<Vec<Arc<dyn Broker>>, CheckError> {
    let mut handles = Vec::new();
    for _ in 0..n {
        handles.push(cx.connect().await?);
    }
    Ok(handles)
}
