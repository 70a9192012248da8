//! Every check on NATS JetStream.

mod common;

use std::{num::NonZeroU32, task::Poll, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use futures_util::StreamExt;
use wilco::{
    Deadline, ErrorKind, GuestAddress, GuestId, Message, MessageId,
    broker::{ConsumeOptions, DeleteMode, QueueSpec},
};
use wilco_conformance::{
    for_each_check,
    harness::{Cluster as _, Harness, Server as _, Use},
    harnesses::Nats,
};

const HARNESS: Nats = Nats;

const NOT_RUN: &[&str] = &[];

macro_rules! one {
    ($section:ident f6_any_node_killed_loses_nothing) => {
        common::check!(
            f6_any_node_killed_loses_nothing,
            open "on 2.9.10 no run passed, and the replicas were seen apart; on 2.15.1 two of three did"
        );
    };
    ($section:ident $name:ident) => {
        common::check!($name);
    };
}

for_each_check!(common::tests);

/// A dead letter stays where it is while a message of its id is in the queue (law C7).
///
/// Only here, since it takes a server that forgets ids, as this one does when it starts again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c7_a_letter_waits_while_its_id_is_in_the_queue() {
    let within = || Deadline::after(Duration::from_secs(20));
    let one = NonZeroU32::MIN;
    let message = || {
        Message::new("check", "x")
            .expect("a message")
            .with_id(MessageId::new("twin").expect("an id"))
    };
    let server = HARNESS.start(Use::Alone).await.expect("a server");
    let broker = server.connect().await.expect("a handle");
    let queue = GuestAddress::from(GuestId::new("twins").expect("an id")).queue();
    let spec = QueueSpec::new(queue.clone());
    broker.declare(&spec, within()).await.expect("a queue");
    let receive = async || {
        let options = ConsumeOptions::prefetch(one);
        let consumer = broker.consume(&queue, options, within()).await;
        let mut consumer = consumer.expect("a consumer");
        let delivery = tokio::time::timeout(Duration::from_secs(20), consumer.next()).await;
        (consumer, delivery.expect("in time").expect("a delivery"))
    };
    broker
        .publish(&queue, message(), within())
        .await
        .expect("stored");
    let (consumer, delivery) = receive().await;
    delivery.dead_letter("look", within()).await.expect("dead");
    consumer.close(within()).await.expect("closed");
    server.restart().await.expect("it starts again");
    let stored = broker.publish(&queue, message(), within()).await;
    stored.expect("stored, since its id is forgotten");

    let letters = broker.dead_letters(&queue, None, one, within()).await;
    let key = letters.expect("the letters").remove(0).key;
    let refused = broker.redrive(&queue, &key, within()).await;
    let refused = refused.expect_err("its id is in the queue");
    assert_eq!(*refused.kind(), ErrorKind::Conflict, "{refused}");
    let (consumer, delivery) = receive().await;
    delivery.ack(within()).await.expect("acked");
    consumer.close(within()).await.expect("closed");
    let moved = broker.redrive(&queue, &key, within()).await;
    assert!(moved.expect("the way is free"));
    let status = broker.status(&queue, within()).await.expect("a status");
    assert_eq!([status.ready, status.dead], [1, 0]);
}

/// A delete that stops half-way, at whatever step, is finished by the next one, which tells what it
/// discarded (laws Q6, Q7).
///
/// Only here, since here deleting takes many steps, and what is left half-way is taken for abandoned after
/// half a minute.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn q6_a_delete_that_was_dropped_is_finished_by_the_next() {
    const POLLS: usize = 24;
    let within = || Deadline::after(Duration::from_secs(100));
    let server = HARNESS.start(Use::Alone).await.expect("a server");
    let broker = server.connect().await.expect("a handle");
    let dropped = (0..POLLS).map(async |polls| {
        let id = GuestId::new(format!("half-{polls}")).expect("an id");
        let queue = GuestAddress::from(id).queue();
        let spec = QueueSpec::new(queue.clone());
        broker.declare(&spec, within()).await.expect("a queue");
        let message = Message::new("check", "x").expect("a message");
        let id = message.id.clone();
        broker
            .publish(&queue, message, within())
            .await
            .expect("stored");
        let first = {
            let mut delete = broker.delete(&queue, DeleteMode::Discard, within());
            let mut left = polls;
            std::future::poll_fn(|context| match delete.as_mut().poll(context) {
                Poll::Pending if left > 0 => {
                    left -= 1;
                    Poll::Pending
                }
                Poll::Pending => Poll::Ready(None),
                Poll::Ready(answer) => Poll::Ready(Some(answer)),
            })
            .await
        };
        let told = match first {
            Some(first) => first.expect("deleted").ids,
            None => match broker.delete(&queue, DeleteMode::Discard, within()).await {
                Ok(second) => second.ids,
                Err(error) => {
                    assert_eq!(*error.kind(), ErrorKind::NoQueue, "{polls}: {error}");
                    vec![]
                }
            },
        };
        // Gone without a word is right only for one whose last step was on its way.
        assert!(told.is_empty() || told == [id], "{polls}: {told:?}");
        let left = server.remains(&queue).await.expect("the server's view");
        assert!(left.is_empty(), "{polls}: {left:?}");
        told.len()
    });
    let told: usize = futures_util::future::join_all(dropped).await.iter().sum();
    assert!(told > POLLS / 2, "most say what they discarded: {told}");
}

/// Acks at every moment of a delete, from holders whose consumer is there to be told and from such whose
/// consumer was closed before: none is Ok for a message that the delete tells. Of those that are told each
/// message is one or the other (law Q6).
///
/// Only here, since before 2.10.19 this server confirms what it does not do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn q6_no_ack_is_ok_for_what_a_delete_tells() {
    const ROUNDS: u32 = 60;
    const MESSAGES: u32 = 8;
    let within = || Deadline::after(Duration::from_secs(20));
    let server = HARNESS.start(Use::Alone).await.expect("a server");
    let control = server.connect().await.expect("a handle");
    let agent = server.connect().await.expect("another");
    let queue = GuestAddress::from(GuestId::new("acks").expect("an id")).queue();
    let (mut acked, mut discarded) = (0, 0);
    let mut span = Duration::from_millis(5);
    for round in 0..ROUNDS {
        let spec = QueueSpec::new(queue.clone());
        control.declare(&spec, within()).await.expect("a queue");
        for _ in 0..MESSAGES {
            let message = Message::new("check", "x").expect("a message");
            let stored = control.publish(&queue, message, within()).await;
            stored.expect("stored");
        }
        let prefetch = NonZeroU32::new(MESSAGES).expect("not zero");
        let options = ConsumeOptions::prefetch(prefetch);
        let consumer = agent.consume(&queue, options, within()).await;
        let mut consumer = consumer.expect("a consumer");
        let mut held = Vec::new();
        for _ in 0..MESSAGES {
            let delivery = tokio::time::timeout(Duration::from_secs(20), consumer.next()).await;
            held.push(delivery.expect("in time").expect("a delivery"));
        }
        let mut listening = Some(consumer);
        if round % 2 == 1
            && let Some(consumer) = listening.take()
        {
            consumer.close(within()).await.expect("closed");
        }
        let acks = held.into_iter().zip(0..).map(|(delivery, n)| {
            // Spread over what a delete takes, differently in each round.
            let wait =
                span * ((n * ROUNDS + round * 7) % (MESSAGES * ROUNDS)) / (MESSAGES * ROUNDS);
            tokio::spawn(async move {
                tokio::time::sleep(wait).await;
                let id = delivery.message.id.clone();
                (id, delivery.ack(within()).await)
            })
        });
        let acks: Vec<_> = acks.collect();
        let started = std::time::Instant::now();
        let gone = control.delete(&queue, DeleteMode::Discard, within()).await;
        let gone = gone.expect("deleted").ids;
        span = started.elapsed();
        for ack in acks {
            let (id, ack) = ack.await.expect("no panic");
            let told = gone.contains(&id);
            assert!(!(ack.is_ok() && told), "{round}: acked and discarded");
            let one = ack.is_ok() || told || listening.is_none();
            assert!(one, "{round}: neither acked nor discarded: {ack:?}");
            acked += u32::from(ack.is_ok());
            discarded += u32::from(told);
        }
    }
    assert!(acked > 0 && discarded > 0, "{acked}:{discarded}");
}

/// One call that is made while a cluster has no leader is answered once it has one, on handles of every node
/// (laws F5, F6): whoever was to answer is dead, and nobody says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f6_one_call_outlasts_an_election() {
    let server = HARNESS.cluster(3).await.expect("three nodes");
    let queue = GuestAddress::from(GuestId::new("elected").expect("an id")).queue();
    let within = || Deadline::after(server.failover() * 2);
    let mut brokers = Vec::new();
    // The client takes the nodes in any order.
    for _ in 0..6 {
        brokers.push(server.connect().await.expect("a handle"));
    }
    let spec = QueueSpec::new(queue.clone());
    brokers[0].declare(&spec, within()).await.expect("a queue");
    for round in 0..2 {
        let leader = server.leader(&queue).await.expect("a leader");
        server.kill(leader).await.expect("killed");
        let calls = brokers.iter().map(async |broker| {
            let message = Message::new("check", "x").expect("a message");
            let published = broker.publish(&queue, message, within());
            let looked = broker.status(&queue, within());
            let (published, looked) = tokio::join!(published, looked);
            published.expect("stored");
            looked.expect("a status");
        });
        let url = server.facts().url.expect("it has one");
        let calls = futures_util::future::join_all(calls);
        let connecting = wilco::connect_by(&url, within());
        let (_, connected) = tokio::join!(calls, connecting);
        connected.expect("a handle, while none leads");
        let all = (round + 1) * brokers.len() as u64;
        let status = brokers[0].status(&queue, within()).await;
        assert_eq!(status.expect("a status").messages(), all, "each once");
        server.start(leader).await.expect("whole again");
    }
}

/// Of several who delete one queue at once, one says what it discarded; none takes away what is declared
/// under the name after that (laws Q6, Q7).
///
/// Only here, since here deleting takes many steps, behind a fence that each of them puts up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn q6_deletes_at_once_leave_the_next_queue_alone() {
    const ROUNDS: u32 = 40;
    let within = || Deadline::after(Duration::from_secs(60));
    let server = HARNESS.start(Use::Alone).await.expect("a server");
    let (mut handles, control) = (Vec::new(), server.connect().await.expect("a handle"));
    for _ in 0..3 {
        handles.push(server.connect().await.expect("another"));
    }
    let queue = GuestAddress::from(GuestId::new("twice").expect("an id")).queue();
    let spec = QueueSpec::new(queue.clone());
    let store = async || {
        let message = Message::new("check", "x").expect("a message");
        let id = message.id.clone();
        let stored = control.publish(&queue, message, within()).await;
        stored.map(|_| vec![id])
    };
    let mut stood = 0;
    for round in 0..ROUNDS {
        control.declare(&spec, within()).await.expect("a queue");
        let old = store().await.expect("stored");
        let mut deletes: futures_util::stream::FuturesUnordered<_> = handles
            .iter()
            .map(|handle| handle.delete(&queue, DeleteMode::Discard, within()))
            .collect();
        let mut told = Vec::new();
        let mut take = |gone: wilco::Result<wilco::broker::Discarded>| match gone {
            Ok(gone) => told.push(gone.ids),
            Err(error) => assert_eq!(*error.kind(), ErrorKind::NoQueue, "{round}: {error}"),
        };
        while let Some(gone) = deletes.next().await {
            let done = gone.is_ok();
            take(gone);
            if done {
                break;
            }
        }
        // The others are at it still, or come too late.
        let new = async {
            control.declare(&spec, within()).await.expect("a new queue");
            store().await
        };
        let rest = async {
            let mut rest = Vec::new();
            while let Some(gone) = deletes.next().await {
                rest.push(gone);
            }
            rest
        };
        let (new, rest) = tokio::join!(new, rest);
        rest.into_iter().for_each(&mut take);
        if told == [old.clone()] {
            assert!(new.is_ok(), "{round}: the new queue is open: {new:?}");
            let status = control.status(&queue, within()).await.expect("a status");
            assert_eq!(status.messages(), 1, "{round}: the new queue stands");
            control
                .delete(&queue, DeleteMode::Discard, within())
                .await
                .expect("deleted");
            stood += 1;
        } else {
            // One that began after all that deletes the new one, and says so.
            assert_eq!(told, [old, new.unwrap_or_default()], "{round}");
        }
    }
    assert!(stood > ROUNDS / 2, "most leave the new one alone: {stood}");
}

/// What the consumer of a queue that was deleted writes late comes to the next queue of that name, whose
/// numbers begin anew: it means nothing there (laws C2, Q6).
///
/// Only here, since here what was settled is noted beside the messages, where the server does not sync.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c2_late_notes_of_a_deleted_queue_settle_nothing_in_the_next() {
    const MESSAGES: usize = 3;
    let within = || Deadline::after(Duration::from_secs(20));
    let server = HARNESS.start(Use::Alone).await.expect("a server");
    let url = server.facts().url.expect("a URL");
    let client = async_nats::connect(url).await.expect("a plain client");
    let broker = server.connect().await.expect("a handle");
    let queue = GuestAddress::from(GuestId::new("late").expect("an id")).queue();
    let spec = QueueSpec::new(queue.clone());
    let mut all = Vec::new();
    for round in 0..2 {
        broker.declare(&spec, within()).await.expect("a queue");
        for _ in 0..MESSAGES {
            let message = Message::new("check", "x").expect("a message");
            let stored = broker.publish(&queue, message, within()).await;
            stored.expect("stored");
        }
        for (subject, note) in std::mem::take(&mut all) {
            let stored = client.request(subject, note).await;
            stored.expect("a late note is stored");
        }
        let options = ConsumeOptions::prefetch(NonZeroU32::MIN);
        let consumer = broker.consume(&queue, options, within()).await;
        let mut consumer = consumer.expect("a consumer");
        for n in 0..MESSAGES {
            let next = tokio::time::timeout(Duration::from_secs(10), consumer.next()).await;
            let delivery = next.unwrap_or_else(|_| panic!("{round}: message {n} comes"));
            let delivery = delivery.expect("a delivery");
            assert_eq!(delivery.attempt, 1, "{round}: message {n}");
            delivery.ack(within()).await.expect("acked");
        }
        for slot in ["a", "b"] {
            let subject = format!("{queue}.{slot}");
            let stream = queue.as_str().replace('.', "~");
            let last = format!("{{\"last_by_subj\":\"{subject}\"}}");
            let told = client
                .request(format!("$JS.API.STREAM.MSG.GET.{stream}"), last.into())
                .await;
            let told = told.expect("an answer").payload;
            let told: serde_json::Value = serde_json::from_slice(&told).expect("JSON");
            if let Some(note) = told["message"]["data"].as_str() {
                let note = BASE64_STANDARD.decode(note).expect("base64");
                all.push((subject, note.into()));
            }
        }
        assert!(!all.is_empty(), "{round}: there are notes");
        let deleted = broker.delete(&queue, DeleteMode::Discard, within()).await;
        assert_eq!(deleted.expect("deleted").messages, 0);
        consumer.close(within()).await.expect("closed");
    }
}

/// Queues that are looked for in every moment of their making: by guests that wait for them, and by others
/// that declare them too (laws Q1, Q5).
///
/// Only here, since before 2.9.15 this server falls when it is asked what such a queue holds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn q1_queues_are_looked_for_while_they_are_made() {
    const QUEUES: usize = 300;
    const AT_ONCE: usize = 16;
    let within = || Deadline::after(Duration::from_secs(60));
    let server = HARNESS.start(Use::Alone).await.expect("a server");
    let control = server.connect().await.expect("a handle");
    let mut guests = Vec::new();
    for _ in 0..4 {
        guests.push(server.connect().await.expect("another"));
    }
    let made = futures_util::stream::iter(0..QUEUES).map(async |n| {
        let id = GuestId::new(format!("young-{n}")).expect("an id");
        let queue = GuestAddress::from(id).queue();
        let spec = QueueSpec::new(queue.clone());
        let looks = guests.iter().map(async |guest| {
            let mut times = 0;
            loop {
                times += 1;
                match guest.status(&queue, within()).await {
                    Ok(status) => {
                        assert_eq!(status.messages(), 0);
                        break;
                    }
                    Err(error) => assert_eq!(*error.kind(), ErrorKind::NoQueue, "{error}"),
                }
            }
            times
        });
        let looks = futures_util::future::join_all(looks);
        let (declared, looks) = tokio::join!(control.declare(&spec, within()), looks);
        declared.expect("a queue");
        looks.into_iter().max().unwrap_or(0)
    });
    let looked: Vec<u32> = made.buffer_unordered(AT_ONCE).collect().await;
    let early = looked.iter().filter(|times| **times > 1).count();
    assert!(early > QUEUES / 2, "most are looked for too early: {early}");
}
