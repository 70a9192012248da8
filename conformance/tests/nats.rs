//! Every check on NATS JetStream.

mod common;

use std::{num::NonZeroU32, time::Duration};

use wilco::{
    Deadline, ErrorKind, GuestAddress, GuestId, Message, MessageId,
    broker::{ConsumeOptions, QueueSpec},
};
use wilco_conformance::{
    for_each_check,
    harness::{Harness, Use},
    harnesses::Nats,
};

const HARNESS: Nats = Nats;

/// What its harness cannot do from outside.
const NOT_RUN: &[&str] = &[
    "f6_any_node_killed_loses_nothing",
    "f9_an_alarm_refuses_and_loses_nothing",
];

macro_rules! one {
    (c c11_what_was_buffered_keeps_its_place) => {
        common::check!(c11_what_was_buffered_keeps_its_place, open "fails now and then on 2.9: see CONTRIBUTING.md");
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
