//! Every check on Redis Streams, on a real server; and what replicas and sentinels are worth.

mod common;

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use wilco::{
    Broker, Deadline, GuestAddress, GuestId, Message, MessageId, Outcome, QueueName,
    broker::{ConsumeOptions, QueueSpec},
    durability::{DurabilityReport, Level, Verdict},
};
use wilco_conformance::{
    for_each_check,
    harness::{Cluster, Harness as _, Server, Use},
    harnesses::{Redis, Sentinels},
};

const HARNESS: Redis = Redis;

const NOT_RUN: &[&str] = &[];

macro_rules! one {
    ($section:ident $name:ident) => {
        common::check!($name);
    };
}

for_each_check!(common::tests);

/// With every replica waited for, the report claims so many, and keeps to it: a publish that one of them
/// does not have is never Ok (laws D1, D2, P1).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d1_what_every_replica_has_is_replicated_and_nothing_less_is_ok() {
    let server = HARNESS.sentinels(2).await.expect("three nodes");
    let broker = server.connect().await.expect("a handle");
    let report = told(&*broker).await;
    assert_eq!(report.level, Level::Replicated(3), "{report:?}");
    assert!(report.require(Level::Replicated(3)).is_ok());
    assert_eq!(node_loss(&server, 1).await, Verdict::Unknown);
    assert_eq!(node_loss(&server, 0).await, Verdict::Unsafe);

    let queue = declared(&*broker).await;
    publish(&*broker, &queue, "all", within())
        .await
        .expect("all have it");
    let leader = server.leader(&queue).await.expect("a leader");
    let replica = (leader + 1) % server.nodes();
    server.pause(replica).expect("paused");
    let short = Deadline::after(Duration::from_secs(1));
    let error = publish(&*broker, &queue, "one-has-not", short).await;
    let error = error.expect_err("a replica does not have it");
    assert_eq!(error.outcome(), Some(Outcome::Unknown), "{error}");
    assert!(error.to_string().contains("replicas"), "{error}");
    server.resume(replica).await.expect("whole again");
    let again = publish(&*broker, &queue, "one-has-not", within()).await;
    again.expect("all have it now");
    assert_eq!(drained(&*broker, &queue).await, ["all", "one-has-not"]);
}

/// A master that hangs and comes back still takes itself for one, and may be sent what is then thrown
/// away: none of that is Ok (laws F6, P1).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f6_what_a_master_of_yesterday_takes_is_not_ok() {
    let server = HARNESS.sentinels(1).await.expect("three nodes");
    let broker = server.connect().await.expect("a handle");
    let queue = declared(&*broker).await;
    let mut confirmed = Vec::new();
    for round in 0..2 {
        let leader = server.leader(&queue).await.expect("a leader");
        server.pause(leader).expect("paused");
        // Sent to the one that hangs, and to whoever comes after it, by one that never gives up.
        let first = format!("hung-{round}");
        publish(
            &*broker,
            &queue,
            &first,
            Deadline::after(server.failover() * 2),
        )
        .await
        .expect("another leads, and has it");
        confirmed.push(first);
        server.resume(leader).await.expect("whole again");
        for n in 0..20 {
            let id = format!("after-{round}-{n}");
            publish(&*broker, &queue, &id, within()).await.expect("Ok");
            confirmed.push(id);
        }
    }
    assert_eq!(drained(&*broker, &queue).await, confirmed);
}

/// A server that throws away at its start what its user `default` may not write says so beforehand, and
/// does it (laws D1, D2).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d1_what_the_user_default_may_not_write_is_not_safe() {
    let server = HARNESS.start(Use::Credentials).await.expect("a server");
    let url = server.admin_url().expect("it has one");
    let broker = wilco::connect(&url).await.expect("a handle");
    let whole = told(&*broker).await;
    assert_eq!(whole.level, Level::Power, "{whole:?}");

    let client = redis::Client::open(url.as_str()).expect("a URL");
    let mut admin = client
        .get_multiplexed_async_connection()
        .await
        .expect("a connection");
    let mut acl = async |words: &[&str]| {
        let asked = redis::cmd("ACL").arg(words).query_async(&mut admin).await;
        let _: redis::Value = asked.expect("it may");
    };
    // Those rights that others take away for safety cost nothing.
    acl(&["SETUSER", "default", "-@dangerous", "-@admin"]).await;
    let hardened = told(&*broker).await;
    assert_eq!(hardened.level, Level::Power, "{hardened:?}");
    acl(&["SETUSER", "default", "-xadd"]).await;
    acl(&["SAVE"]).await;
    let lossy = told(&*broker).await;
    assert_eq!(lossy.process_crash, Verdict::Unsafe, "{lossy:?}");
    assert_eq!(lossy.power_loss, Verdict::Unsafe, "{lossy:?}");
    let error = lossy.require(Level::Process).expect_err("it is not");
    assert!(error.to_string().contains("ACL SETUSER default"), "{error}");

    let queue = declared(&*broker).await;
    publish(&*broker, &queue, "confirmed", within())
        .await
        .expect("confirmed");
    server.restart().await.expect("there again");
    let status = broker.status(&queue, within()).await.expect("a status");
    assert_eq!(status.messages(), 0, "what was said to be lost is there");
}

fn within() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

async fn told(broker: &dyn Broker) -> DurabilityReport {
    broker.durability(within()).await.expect("a report")
}

/// What the report says of the loss of a node where so many replicas are waited for.
async fn node_loss(server: &Sentinels, replicas: u32) -> Verdict {
    let url = server.facts().url.expect("it has one");
    let url = url.replace("replicas=2", &format!("replicas={replicas}"));
    let broker: Arc<dyn Broker> = wilco::connect(&url).await.expect("a handle");
    let report = told(&*broker).await;
    assert_eq!(report.level, Level::Power, "{report:?}");
    report.node_loss
}

async fn declared(broker: &dyn Broker) -> QueueName {
    let queue = GuestAddress::from(GuestId::new("replicated").expect("an id")).queue();
    let spec = QueueSpec::new(queue.clone());
    broker.declare(&spec, within()).await.expect("a queue");
    queue
}

async fn publish(
    broker: &dyn Broker,
    queue: &QueueName,
    id: &str,
    by: Deadline,
) -> wilco::Result<()> {
    let message = Message::new("check", id.to_owned())?.with_id(MessageId::new(id)?);
    broker.publish(queue, message, by).await.map(drop)
}

/// The ids of all that the queue holds, acked.
async fn drained(broker: &dyn Broker, queue: &QueueName) -> Vec<String> {
    let options = ConsumeOptions::prefetch(NonZeroU32::MIN);
    let consumer = broker.consume(queue, options, within()).await;
    let mut consumer = consumer.expect("a consumer");
    let mut ids = Vec::new();
    while broker
        .status(queue, within())
        .await
        .expect("a status")
        .messages()
        > 0
    {
        let delivery = tokio::time::timeout(Duration::from_secs(20), consumer.next()).await;
        let delivery = delivery.expect("in time").expect("a delivery");
        ids.push(delivery.message.id.to_string());
        delivery.ack(within()).await.expect("acked");
    }
    ids
}
