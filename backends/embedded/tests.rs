use std::{num::NonZeroU32, sync::Arc, time::Duration};

use bytes::Bytes;
use tempfile::TempDir;
use tokio::time::Instant;

use crate::{
    Broker, Deadline, ErrorKind, GuestAddress, GuestId, Headers, Message, MessageId, Outcome,
    QueueName,
    broker::{ConsumeOptions, Consumer, Declared, DeleteMode, Delivery, QueueSpec},
    connect,
};

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(10))
}

fn lane(guest: &str) -> GuestAddress {
    GuestId::new(guest).unwrap().into()
}

fn queue(guest: &str) -> QueueName {
    lane(guest).queue()
}

fn message(id: &str, body: &[u8]) -> Message {
    Message::new("prepare", body.to_vec())
        .unwrap()
        .with_id(MessageId::new(id).unwrap())
}

struct File {
    directory: TempDir,
}

impl File {
    fn new() -> Self {
        Self {
            directory: TempDir::new().unwrap(),
        }
    }

    fn url(&self, options: &str) -> String {
        format!("sqlite://{}/b.db{options}", self.directory.path().display())
    }

    async fn open(&self) -> Arc<dyn Broker> {
        connect(&self.url("")).await.unwrap()
    }

    /// A handle that shares nothing with the others but the file, as in another process.
    async fn open_apart(&self) -> Arc<dyn Broker> {
        connect(&self.url("?sync=normal")).await.unwrap()
    }

    fn lanes(&self) -> Vec<String> {
        std::fs::read_dir(self.directory.path().join("b.db.lanes"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

async fn declared(broker: &Arc<dyn Broker>, guest: &str) -> QueueName {
    let queue = queue(guest);
    broker
        .declare(&QueueSpec::new(queue.clone()), soon())
        .await
        .unwrap();
    queue
}

async fn publish(broker: &Arc<dyn Broker>, queue: &QueueName, id: &str) {
    broker
        .publish(queue, message(id, b"x"), soon())
        .await
        .unwrap();
}

async fn attach(broker: &Arc<dyn Broker>, queue: &QueueName, prefetch: u32) -> Box<dyn Consumer> {
    let options = ConsumeOptions::prefetch(NonZeroU32::new(prefetch).unwrap());
    broker.consume(queue, options, soon()).await.unwrap()
}

async fn next(consumer: &mut Box<dyn Consumer>) -> Delivery {
    soon().bound(consumer.next()).await.unwrap().unwrap()
}

async fn nothing(consumer: &mut Box<dyn Consumer>) {
    let bound = Deadline::after(Duration::from_millis(100));
    assert!(bound.bound(consumer.next()).await.is_err());
}

/// ready, delayed, in flight, dead, consumers
async fn counts(broker: &Arc<dyn Broker>, queue: &QueueName) -> (u64, u64, u64, u64, u32) {
    let status = broker.status(queue, soon()).await.unwrap();
    (
        status.ready,
        status.delayed,
        status.in_flight,
        status.dead,
        status.consumers,
    )
}

#[tokio::test]
async fn q1_q3_declare_is_idempotent_and_names_what_differs() {
    let file = File::new();
    let broker = file.open().await;
    let spec = QueueSpec::new(queue("g"));
    let declare = |spec: QueueSpec| {
        let broker = Arc::clone(&broker);
        async move { broker.declare(&spec, soon()).await }
    };
    assert_eq!(declare(spec.clone()).await.unwrap(), Declared::Created);
    assert_eq!(
        declare(spec.clone()).await.unwrap(),
        Declared::AlreadyExists
    );
    let error = declare(spec.with_max_messages(3)).await.unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::Mismatch { .. }),
        "{error:?}"
    );
    assert_eq!(error.outcome(), None);
}

#[tokio::test]
async fn q4_q5_a_missing_queue_is_no_queue() {
    let broker = connect("memory:").await.unwrap();
    let queue = queue("g");
    let error = broker
        .publish(&queue, message("1", b""), soon())
        .await
        .unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::NoQueue);
    assert_eq!(error.outcome(), Some(Outcome::NotStored));
    assert_eq!(error.operation(), Some("publish"));
    let kinds = [
        broker.status(&queue, soon()).await.unwrap_err(),
        broker
            .delete(&queue, DeleteMode::Discard, soon())
            .await
            .unwrap_err(),
        broker
            .consume(&queue, ConsumeOptions::default(), soon())
            .await
            .unwrap_err(),
    ];
    for error in kinds {
        assert_eq!(*error.kind(), ErrorKind::NoQueue, "{error:?}");
        assert_eq!(error.backend(), Some("embedded"));
    }
}

#[tokio::test]
async fn p6_everything_comes_back_byte_for_byte() {
    for broker in [File::new().open().await, connect("memory:").await.unwrap()] {
        let queue = declared(&broker, "g").await;
        let mut headers = Headers::new();
        headers.insert("a", "\"quoted\"\r\n\u{1F600}").unwrap();
        headers.insert("empty", "").unwrap();
        let bodies: [Vec<u8>; 4] = [vec![], vec![0], vec![0xff, 0, 0xfe], vec![7; 1 << 20]];
        for (n, body) in bodies.iter().enumerate() {
            let sent = message(&n.to_string(), body)
                .with_headers(headers.clone())
                .with_content_type(MessageId::new("x/y").unwrap())
                .with_from(queue.clone());
            broker.publish(&queue, sent.clone(), soon()).await.unwrap();
            let mut consumer = attach(&broker, &queue, 1).await;
            let delivery = next(&mut consumer).await;
            assert_eq!(delivery.message, sent);
            delivery.ack(soon()).await.unwrap();
        }
    }
}

#[tokio::test]
async fn p3_the_same_id_is_one_delivery_and_a_dead_one_is_not_in_the_way() {
    let file = File::new();
    let broker = file.open().await;
    let queue = declared(&broker, "g").await;
    publish(&broker, &queue, "1").await;
    let again = broker.publish(&queue, message("1", b"x"), soon()).await;
    assert!(again.unwrap().duplicate);
    let mut consumer = attach(&broker, &queue, 8).await;
    let delivery = next(&mut consumer).await;
    let again = broker.publish(&queue, message("1", b"x"), soon()).await;
    assert!(again.unwrap().duplicate, "in flight");
    nothing(&mut consumer).await;
    delivery.dead_letter("bad", soon()).await.unwrap();
    let anew = broker.publish(&queue, message("1", b"y"), soon()).await;
    assert!(!anew.unwrap().duplicate, "only dead");
    assert_eq!(next(&mut consumer).await.message.body, Bytes::from("y"));
    let letters = broker
        .dead_letters(&queue, None, NonZeroU32::MAX, soon())
        .await
        .unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(
        (letters[0].reason.as_str(), letters[0].attempts),
        ("bad", 1)
    );
    // While one of the same id is there, the dead one stays dead.
    let error = broker
        .redrive(&queue, &letters[0].key, soon())
        .await
        .unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Conflict);
}

#[tokio::test]
async fn c7_over_the_limit_is_dead_once_and_can_be_sent_back() {
    let file = File::new();
    let broker = file.open().await;
    let queue = queue("g");
    let limit = NonZeroU32::new(2).unwrap();
    let spec = QueueSpec::new(queue.clone()).with_delivery_limit(limit);
    broker.declare(&spec, soon()).await.unwrap();
    publish(&broker, &queue, "poison").await;
    publish(&broker, &queue, "good").await;
    let mut consumer = attach(&broker, &queue, 1).await;
    for attempt in 1..=2 {
        let delivery = next(&mut consumer).await;
        assert_eq!(
            (delivery.message.id.as_str(), delivery.attempt),
            ("poison", attempt)
        );
    }
    let good = next(&mut consumer).await;
    assert_eq!((good.message.id.as_str(), good.attempt), ("good", 1));
    good.ack(soon()).await.unwrap();
    assert_eq!(counts(&broker, &queue).await, (0, 0, 0, 1, 1));
    let letters = broker
        .dead_letters(&queue, None, NonZeroU32::MIN, soon())
        .await
        .unwrap();
    assert_eq!(letters[0].reason, "delivery limit 2 exceeded");
    assert_eq!(letters[0].attempts, 2);
    let key = &letters[0].key;
    let after = broker.dead_letters(&queue, Some(key), limit, soon()).await;
    assert!(after.unwrap().is_empty());
    assert!(broker.redrive(&queue, key, soon()).await.unwrap());
    assert!(!broker.redrive(&queue, key, soon()).await.unwrap());
    let delivery = next(&mut consumer).await;
    assert_eq!(
        (delivery.message.id.as_str(), delivery.attempt),
        ("poison", 1)
    );
}

#[tokio::test]
async fn c6_a_retry_comes_after_its_delay_and_counts() {
    let file = File::new();
    let broker = file.open().await;
    let queue = declared(&broker, "g").await;
    publish(&broker, &queue, "1").await;
    let mut consumer = attach(&broker, &queue, 4).await;
    let delay = Duration::from_millis(150);
    for attempt in 1..=3 {
        let delivery = next(&mut consumer).await;
        assert_eq!(delivery.attempt, attempt);
        let begin = Instant::now();
        delivery.retry(delay, soon()).await.unwrap();
        assert_eq!(counts(&broker, &queue).await, (0, 1, 0, 0, 1));
        let delivery = next(&mut consumer).await;
        assert!(begin.elapsed() >= delay, "{:?}", begin.elapsed());
        assert!(begin.elapsed() < delay * 3, "{:?}", begin.elapsed());
        assert_eq!(delivery.attempt, attempt + 1);
        drop(delivery);
        if attempt < 3 {
            // The drop counted as well: start over with a fresh message.
            let delivery = next(&mut consumer).await;
            assert_eq!(delivery.attempt, attempt + 2);
            delivery.ack(soon()).await.unwrap();
            publish(&broker, &queue, "1").await;
            for again in 1..=attempt {
                let delivery = next(&mut consumer).await;
                assert_eq!(delivery.attempt, again);
                delivery.retry(Duration::ZERO, soon()).await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn c12_one_consumer_and_the_other_is_told() {
    let file = File::new();
    let (broker, apart) = (file.open().await, file.open_apart().await);
    let queue = declared(&broker, "g").await;
    let consumer = attach(&broker, &queue, 1).await;
    for other in [&broker, &apart] {
        let error = other
            .consume(&queue, ConsumeOptions::default(), soon())
            .await
            .unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Conflict);
    }
    assert_eq!(counts(&apart, &queue).await.4, 1);
    drop(consumer);
    let consumer = attach(&broker, &queue, 1).await;
    consumer.close(soon()).await.unwrap();
    assert_eq!(counts(&broker, &queue).await.4, 0);
    drop(attach(&apart, &queue, 1).await);
}

#[tokio::test]
async fn c4_c9_c10_buffered_goes_back_uncounted_and_deliveries_stay_with_their_handles() {
    let file = File::new();
    let (broker, apart) = (file.open().await, file.open_apart().await);
    let queue = declared(&broker, "g").await;
    for id in ["1", "2", "3"] {
        publish(&broker, &queue, id).await;
    }
    let mut consumer = attach(&broker, &queue, 8).await;
    let first = next(&mut consumer).await;
    assert_eq!(counts(&apart, &queue).await, (0, 0, 3, 0, 1));
    consumer.close(soon()).await.unwrap();
    assert_eq!(counts(&apart, &queue).await, (2, 0, 1, 0, 0));
    let mut other = attach(&apart, &queue, 8).await;
    let second = next(&mut other).await;
    assert_eq!((second.message.id.as_str(), second.attempt), ("2", 1));
    drop(first);
    // "1" is back, given up by a stranger: found at the latest by the look every second.
    let third = next(&mut other).await;
    assert_eq!((third.message.id.as_str(), third.attempt), ("3", 1));
    let first = next(&mut other).await;
    assert_eq!((first.message.id.as_str(), first.attempt), ("1", 2));
    first.ack(soon()).await.unwrap();
    second.ack(soon()).await.unwrap();
    third.ack(soon()).await.unwrap();
    assert_eq!(counts(&broker, &queue).await, (0, 0, 0, 0, 1));
}

#[tokio::test]
async fn q6_q11_delete_arbitrates_and_leaves_nothing() {
    let file = File::new();
    let (broker, apart) = (file.open().await, file.open_apart().await);
    let queue = declared(&broker, "g").await;
    for id in ["1", "2", "3"] {
        publish(&broker, &queue, id).await;
    }
    let mut consumer = attach(&broker, &queue, 2).await;
    let (first, second) = (next(&mut consumer).await, next(&mut consumer).await);
    first.ack(soon()).await.unwrap();
    let error = apart
        .delete(&queue, DeleteMode::IfEmpty, soon())
        .await
        .unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::NotEmpty { messages: 2 });
    let discarded = apart
        .delete(&queue, DeleteMode::Discard, soon())
        .await
        .unwrap();
    assert_eq!(discarded.messages, 2);
    let ids: Vec<_> = discarded.ids.iter().map(MessageId::as_str).collect();
    assert_eq!(ids, ["2", "3"]);
    let begin = Instant::now();
    let error = soon().bound(consumer.next()).await.unwrap().unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::QueueDeleted);
    assert!(begin.elapsed() < Duration::from_millis(500), "not poked");
    // Made anew under the same name, it is another queue: the old lease settles nothing there.
    declared(&broker, "g").await;
    publish(&broker, &queue, "2").await;
    let error = second.ack(soon()).await.unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::QueueDeleted | ErrorKind::LeaseLost),
        "{error:?}"
    );
    assert_eq!(counts(&broker, &queue).await.0, 1);
    drop(consumer);
    broker
        .delete(&queue, DeleteMode::Discard, soon())
        .await
        .unwrap();
    assert_eq!(file.lanes(), [""; 0]);
}

#[tokio::test]
async fn q12_a_full_queue_refuses_and_keeps_what_it_has() {
    let broker = connect("memory:").await.unwrap();
    let queue = queue("g");
    let spec = QueueSpec::new(queue.clone()).with_max_messages(2);
    broker.declare(&spec, soon()).await.unwrap();
    publish(&broker, &queue, "1").await;
    publish(&broker, &queue, "2").await;
    let error = broker
        .publish(&queue, message("3", b""), soon())
        .await
        .unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::BrokerRefused);
    assert_eq!(error.outcome(), Some(Outcome::NotStored));
    let again = broker.publish(&queue, message("2", b""), soon()).await;
    assert!(again.unwrap().duplicate);
    assert_eq!(counts(&broker, &queue).await.0, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p7_p8_many_publishers_keep_their_order_and_are_woken_across_handles() {
    let file = File::new();
    let (broker, apart) = (file.open().await, file.open_apart().await);
    let queue = declared(&broker, "g").await;
    let mut consumer = attach(&apart, &queue, 100).await;
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..64 {
        let (broker, queue) = (Arc::clone(&broker), queue.clone());
        tasks.spawn(async move {
            for n in 0..20 {
                publish(&broker, &queue, &format!("{task}/{n}")).await;
            }
        });
    }
    let mut seen = vec![0; 64];
    for _ in 0..64 * 20 {
        let delivery = next(&mut consumer).await;
        let (task, n) = delivery.message.id.as_str().split_once('/').unwrap();
        let (task, n): (usize, i32) = (task.parse().unwrap(), n.parse().unwrap());
        assert_eq!((seen[task], delivery.attempt), (n, 1));
        seen[task] += 1;
        delivery.ack(soon()).await.unwrap();
    }
    nothing(&mut consumer).await;
    assert_eq!(counts(&broker, &queue).await, (0, 0, 0, 0, 1));
}

#[tokio::test]
async fn p5_a_dropped_publish_harms_no_other() {
    let file = File::new();
    let broker = file.open().await;
    let queue = declared(&broker, "g").await;
    for n in 0..50 {
        let mut dropped = broker.publish(&queue, message(&format!("d{n}"), b""), soon());
        for _ in 0..n % 3 {
            // Polled so often, then dropped.
            tokio::select! { biased; _ = &mut dropped => {}, () = tokio::task::yield_now() => {} }
            if n % 2 == 0 {
                break;
            }
        }
        publish(&broker, &queue, &format!("k{n}")).await;
    }
    let mut consumer = attach(&broker, &queue, 200).await;
    let mut kept = 0;
    while let Ok(delivery) = Deadline::after(Duration::from_millis(200))
        .bound(consumer.next())
        .await
    {
        let delivery = delivery.unwrap();
        if delivery.message.id.as_str() == format!("k{kept}") {
            kept += 1;
        }
        delivery.ack(soon()).await.unwrap();
    }
    assert_eq!(kept, 50);
}

#[tokio::test]
async fn p4_p9_a_deadline_that_passed_stores_nothing() {
    let file = File::new();
    let broker = file.open().await;
    let queue = declared(&broker, "g").await;
    // Another process holds the write lock.
    let other = rusqlite::Connection::open(file.directory.path().join("b.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let begin = Instant::now();
    let error = broker
        .publish(
            &queue,
            message("1", b""),
            Deadline::after(Duration::from_millis(100)),
        )
        .await
        .unwrap_err();
    assert!(begin.elapsed() < Duration::from_millis(300));
    assert_eq!(*error.kind(), ErrorKind::DeadlineExceeded);
    assert_eq!(error.outcome(), Some(Outcome::NotStored));
    // What is committed can be read meanwhile.
    assert_eq!(counts(&broker, &queue).await.0, 0);
    other.execute_batch("ROLLBACK").unwrap();
    publish(&broker, &queue, "2").await;
    assert_eq!(counts(&broker, &queue).await.0, 1);
}

#[tokio::test]
async fn f8_c14_close_gives_back_what_is_unsettled_and_ends_the_handle() {
    let file = File::new();
    let broker = file.open().await;
    let queue = declared(&broker, "g").await;
    for id in ["1", "2", "3"] {
        publish(&broker, &queue, id).await;
    }
    let mut consumer = attach(&broker, &queue, 8).await;
    let (first, second) = (next(&mut consumer).await, next(&mut consumer).await);
    first.ack(soon()).await.unwrap();
    broker.close(soon()).await.unwrap();
    broker.close(soon()).await.unwrap();
    let error = second.ack(soon()).await.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Closed);
    let error = consumer.next().await.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Closed);
    let error = broker
        .publish(&queue, message("9", b""), soon())
        .await
        .unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Closed);
    assert_eq!(error.outcome(), Some(Outcome::NotStored));

    let broker = file.open().await;
    assert_eq!(counts(&broker, &queue).await, (2, 0, 0, 0, 0));
    let mut consumer = attach(&broker, &queue, 8).await;
    let (second, third) = (next(&mut consumer).await, next(&mut consumer).await);
    assert_eq!((second.message.id.as_str(), second.attempt), ("2", 2));
    assert_eq!((third.message.id.as_str(), third.attempt), ("3", 1));
}

#[tokio::test]
async fn c1_dropping_everything_without_close_frees_the_queue() {
    let file = File::new();
    let queue = {
        let broker = file.open().await;
        let queue = declared(&broker, "g").await;
        publish(&broker, &queue, "1").await;
        let mut consumer = attach(&broker, &queue, 8).await;
        drop(next(&mut consumer).await);
        queue
    };
    let broker = file.open().await;
    let mut consumer = attach(&broker, &queue, 8).await;
    assert_eq!(next(&mut consumer).await.attempt, 2);
}

#[tokio::test]
async fn memory_is_private_unless_named() {
    let (a, b) = (
        connect("memory:").await.unwrap(),
        connect("memory:").await.unwrap(),
    );
    declared(&a, "g").await;
    assert!(b.status(&queue("g"), soon()).await.is_err());
    let (a, b) = (
        connect("memory:shared-name").await.unwrap(),
        connect("memory:shared-name").await.unwrap(),
    );
    let queue = declared(&a, "g").await;
    let mut consumer = attach(&b, &queue, 1).await;
    publish(&a, &queue, "1").await;
    next(&mut consumer).await.ack(soon()).await.unwrap();
    b.close(soon()).await.unwrap();
    assert_eq!(counts(&a, &queue).await, (0, 0, 0, 0, 0));
}

#[tokio::test]
async fn r_requests_reach_the_responder_here_and_apart() {
    let file = File::new();
    let (here, apart) = (file.open().await, file.open_apart().await);
    let lane = lane("g");
    for asker in [&here, &apart] {
        let begin = Instant::now();
        let error = asker
            .request(&lane, Bytes::from("?"), soon())
            .await
            .unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::NoConsumer);
        assert!(begin.elapsed() < Duration::from_millis(100));
    }
    let mut responder = here.respond(&lane, soon()).await.unwrap();
    for other in [&here, &apart] {
        let error = other.respond(&lane, soon()).await.unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Conflict);
    }
    // Attached, and does not look.
    for asker in [&here, &apart] {
        let short = Deadline::after(Duration::from_millis(50));
        let error = asker
            .request(&lane, Bytes::from("?"), short)
            .await
            .unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::ConsumerSilent);
    }
    let answering = tokio::spawn(async move {
        loop {
            let request = match responder.next().await {
                Ok(request) => request,
                Err(error) => return error,
            };
            let body = request.body.clone();
            request.reply(body, soon()).await.unwrap();
        }
    });
    for asker in [&here, &apart] {
        let asked = (0..1000_u32).map(|n| {
            let (asker, lane) = (Arc::clone(asker), lane.clone());
            tokio::spawn(async move {
                let body = Bytes::from(n.to_string().repeat(1 + n as usize % 50));
                let answer = asker.request(&lane, body.clone(), soon()).await.unwrap();
                assert_eq!(answer, body);
            })
        });
        for asked in asked.collect::<Vec<_>>() {
            asked.await.unwrap();
        }
    }
    let large = Bytes::from(vec![0; crate::broker::MAX_REQUEST_BYTES + 1]);
    let error = apart.request(&lane, large, soon()).await.unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::TooLarge { .. }));
    here.close(soon()).await.unwrap();
    assert_eq!(*answering.await.unwrap().kind(), ErrorKind::Closed);
    let error = apart
        .request(&lane, Bytes::from("?"), soon())
        .await
        .unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::NoConsumer);
    assert_eq!(file.lanes(), [""; 0]);
    // The next responder is reached, whatever connections were there before.
    let mut responder = apart.respond(&lane, soon()).await.unwrap();
    let here = file.open().await;
    let (answer, ()) = tokio::join!(here.request(&lane, Bytes::from("?"), soon()), async {
        let request = responder.next().await.unwrap();
        request.reply(Bytes::from("!"), soon()).await.unwrap();
    });
    assert_eq!(answer.unwrap(), Bytes::from("!"));
}

#[tokio::test]
async fn s2_garbage_on_the_socket_ends_that_connection_only() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let file = File::new();
    let (here, apart) = (file.open().await, file.open_apart().await);
    let lane = lane("g");
    let mut responder = here.respond(&lane, soon()).await.unwrap();
    let socket = file
        .lanes()
        .into_iter()
        .find(|name| name.ends_with(".sock"))
        .unwrap();
    let socket = file.directory.path().join("b.db.lanes").join(socket);
    for garbage in [
        &[0xff; 64][..],
        &[0; 64],
        &[7, 0, 0, 0, 1],
        b"GET / HTTP/1.1\r\n\r\n",
    ] {
        let mut stream = tokio::net::UnixStream::connect(&socket).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        let ended = stream.read(&mut [0; 8]).await;
        assert!(matches!(ended, Ok(0) | Err(_)));
    }
    let (answer, ()) = tokio::join!(apart.request(&lane, Bytes::from("?"), soon()), async {
        let request = responder.next().await.unwrap();
        request.reply(Bytes::from("!"), soon()).await.unwrap();
    });
    assert_eq!(answer.unwrap(), Bytes::from("!"));
}

#[tokio::test]
async fn a_path_too_long_for_a_socket_is_reached_all_the_same() {
    let directory = TempDir::new().unwrap();
    let deep = directory.path().join("d".repeat(120));
    std::fs::create_dir(&deep).unwrap();
    let url = format!("sqlite://{}/b.db", deep.display());
    let (a, b) = (
        connect(&url).await.unwrap(),
        connect(&format!("{url}?sync=off")).await.unwrap(),
    );
    let queue = declared(&a, "g").await;
    let mut consumer = attach(&a, &queue, 1).await;
    publish(&b, &queue, "1").await;
    next(&mut consumer).await.ack(soon()).await.unwrap();
    let lane = lane("g");
    let mut responder = a.respond(&lane, soon()).await.unwrap();
    let (answer, ()) = tokio::join!(b.request(&lane, Bytes::from("?"), soon()), async {
        let request = responder.next().await.unwrap();
        request.reply(Bytes::from("!"), soon()).await.unwrap();
    });
    assert_eq!(answer.unwrap(), Bytes::from("!"));
}

#[tokio::test]
async fn d1_the_report_says_what_the_options_give() {
    use crate::durability::Level;
    let file = File::new();
    for (options, level) in [
        ("?sync=normal", Level::Process),
        ("?sync=off", Level::Process),
        ("", Level::Power),
    ] {
        let broker = connect(&file.url(options)).await.unwrap();
        let report = broker.durability(soon()).await.unwrap();
        // In a temporary directory that is in memory the honest level is lower.
        let on_disk = !report.findings.iter().any(|f| f.setting == "file system");
        assert!(report.level == level || !on_disk, "{report:?}");
    }
    let broker = connect("memory:").await.unwrap();
    let report = broker.durability(soon()).await.unwrap();
    assert_eq!(report.level, Level::Memory);
    for url in [
        file.url("?snyc=full"),
        file.url("?sync=sometimes"),
        "memory:?sync=full".into(),
    ] {
        let error = connect(&url).await.unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::InvalidUrl, "{url}");
    }
}

#[tokio::test]
async fn p2_f9_a_full_disk_refuses_and_loses_nothing() {
    let file = File::new();
    let broker = file.open().await;
    let queue = declared(&broker, "g").await;
    let handle = broker_handle(&file).await;
    handle
        .core
        .store
        .write(soon(), |connection| {
            let pages: i64 = connection.query_row("PRAGMA page_count", [], |row| row.get(0))?;
            connection.execute_batch(&format!("PRAGMA max_page_count = {}", pages + 20))?;
            Ok(())
        })
        .await
        .unwrap_or_else(|error| panic!("{error}"));
    let mut stored = Vec::new();
    let refused = loop {
        let id = format!("m{}", stored.len());
        match broker
            .publish(&queue, message(&id, &[7; 2000]), soon())
            .await
        {
            Ok(_) => stored.push(id),
            Err(error) => break error,
        }
        assert!(stored.len() < 1000);
    };
    assert_eq!(*refused.kind(), ErrorKind::BrokerRefused, "{refused}");
    assert_eq!(refused.outcome(), Some(Outcome::NotStored));
    assert!(refused.to_string().contains("disk full"), "{refused}");
    handle
        .core
        .store
        .write(soon(), |connection| {
            Ok(connection.execute_batch("PRAGMA max_page_count = 1000000")?)
        })
        .await
        .unwrap();
    publish(&broker, &queue, "after").await;
    stored.push("after".into());
    let mut consumer = attach(&broker, &queue, 500).await;
    for id in stored {
        let delivery = next(&mut consumer).await;
        assert_eq!(delivery.message.id.as_str(), id);
        delivery.ack(soon()).await.unwrap();
    }
    nothing(&mut consumer).await;
}

async fn broker_handle(file: &File) -> Arc<super::Handle> {
    super::connection::connect(&file.url("").parse().unwrap())
        .await
        .unwrap()
}

#[tokio::test]
async fn c1_c4_c9_a_killed_consumer_is_taken_over_with_exact_counts() {
    let file = File::new();
    let (broker, apart) = (file.open().await, file.open_apart().await);
    let queue = declared(&apart, "g").await;
    for id in ["1", "2", "3"] {
        publish(&apart, &queue, id).await;
    }
    let mut killed = attach(&broker, &queue, 8).await;
    let first = next(&mut killed).await;
    assert_eq!(counts(&apart, &queue).await, (0, 0, 3, 0, 1));
    let handle = broker_handle(&file).await;
    let holds: Vec<_> = super::connection::lock(&handle.core.holds)
        .values()
        .filter_map(std::sync::Weak::upgrade)
        .collect();
    holds[0].die();
    drop(holds);
    assert_eq!(counts(&apart, &queue).await, (3, 0, 0, 0, 0));
    let mut heir = attach(&apart, &queue, 8).await;
    for (id, attempt) in [("1", 2), ("2", 1), ("3", 1)] {
        let delivery = next(&mut heir).await;
        assert_eq!(
            (delivery.message.id.as_str(), delivery.attempt),
            (id, attempt)
        );
        delivery.ack(soon()).await.unwrap();
    }
    let error = first.ack(soon()).await.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::LeaseLost);
    // What it had buffered before it was cut off it may still hand out, but settles nothing of.
    let error = loop {
        match soon().bound(killed.next()).await.unwrap() {
            Ok(delivery) => {
                let error = delivery.ack(soon()).await.unwrap_err();
                assert_eq!(*error.kind(), ErrorKind::LeaseLost);
            }
            Err(error) => break error,
        }
    };
    assert_eq!(*error.kind(), ErrorKind::Conflict);
    assert_eq!(counts(&broker, &queue).await, (0, 0, 0, 0, 1));
}

/// What is dropped while the disk is full goes back as soon as it is not.
#[tokio::test]
async fn f9_c10_a_drop_on_a_full_disk_is_not_forgotten() {
    let file = File::new();
    let broker = file.open().await;
    let queue = declared(&broker, "g").await;
    publish(&broker, &queue, "1").await;
    let mut consumer = attach(&broker, &queue, 1).await;
    let delivery = next(&mut consumer).await;
    let handle = broker_handle(&file).await;
    let limit = |sql: &'static str| {
        let store = handle.core.store.clone();
        async move {
            store
                .write(soon(), move |connection| Ok(connection.execute_batch(sql)?))
                .await
                .unwrap();
        }
    };
    // Any change of a delivery fails and takes the whole transaction with it, as a bad disk does.
    limit(
        "CREATE TEMP TRIGGER full BEFORE UPDATE ON main.deliveries
         BEGIN SELECT RAISE(ROLLBACK, 'no'); END",
    )
    .await;
    drop(delivery);
    tokio::time::sleep(Duration::from_millis(50)).await;
    limit("DROP TRIGGER full").await;
    let delivery = next(&mut consumer).await;
    assert_eq!(delivery.attempt, 2);
    delivery.ack(soon()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p9_one_process_in_a_hurry_does_not_starve_another() {
    let file = File::new();
    let (hurried, other) = (file.open().await, file.open_apart().await);
    let queue = declared(&hurried, "g").await;
    let stop = Instant::now() + Duration::from_secs(2);
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..64 {
        let (broker, queue) = (Arc::clone(&hurried), queue.clone());
        tasks.spawn(async move {
            let mut n = 0;
            while Instant::now() < stop {
                publish(&broker, &queue, &format!("{task}/{n}")).await;
                n += 1;
            }
        });
    }
    let (mut count, mut worst) = (0, Duration::ZERO);
    while Instant::now() < stop {
        let begin = Instant::now();
        publish(&other, &queue, &format!("other/{count}")).await;
        worst = worst.max(begin.elapsed());
        count += 1;
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    assert!(
        worst < Duration::from_secs(1),
        "{count} published, at worst in {worst:?}"
    );
}
