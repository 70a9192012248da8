//! Guests' credentials over a restart of the broker (law S1), where the broker keeps them or whom it does
//! not believe any more.

use std::time::Duration;

use secrecy::ExposeSecret as _;
use wilco::{
    Broker, Deadline, ErrorKind, GuestAddress, GuestId, Message, QueueName,
    broker::{ConsumeOptions, QueueSpec},
};
use wilco_conformance::{
    harness::{Harness, Use},
    harnesses::{Nats, Redis},
};

fn within() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

fn guest(id: &str) -> GuestAddress {
    GuestAddress::from(GuestId::new(id).expect("an id"))
}

/// What is known of a credential before and after: it attaches and receives, or is refused.
async fn attaches(broker: &dyn Broker, admin: &dyn Broker, queue: &QueueName) {
    let message = Message::new("check", "x").expect("a message");
    admin.publish(queue, message, within()).await.expect("sent");
    let options = ConsumeOptions::default();
    let consumer = broker.consume(queue, options, within()).await;
    let mut consumer = consumer.expect("attached");
    let delivery = tokio::time::timeout(Duration::from_secs(30), consumer.next()).await;
    let delivery = delivery.expect("in time").expect("a delivery");
    delivery.ack(within()).await.expect("settled");
    consumer.close(within()).await.expect("left");
}

async fn outlives_a_restart(harness: &dyn Harness) {
    let server = harness.start(Use::Credentials).await.expect("a server");
    let admin = server.connect().await.expect("an admin");
    let reports = QueueName::reports("credentials").expect("a name");
    let place = tempfile::tempdir().expect("a directory");
    let mut urls = Vec::new();
    let (kept, given_up) = (guest("kept"), guest("given-up"));
    for address in [&kept, &given_up] {
        let spec = QueueSpec::new(address.queue());
        admin.declare(&spec, within()).await.expect("a queue");
        let issued = admin.issue_credential(address, &reports, within()).await;
        let issued = issued.expect("a credential");
        let forgets = issued
            .exceptions
            .iter()
            .find(|line| line.contains("restart"));
        assert_eq!(forgets, None, "this server keeps them");
        let directory = place.path().join(address.guest.as_str());
        std::fs::create_dir(&directory).expect("a directory");
        urls.push(issued.store(&directory).expect("its files"));
    }
    let revoked = admin.revoke_credential(&given_up, within()).await;
    revoked.expect("revoked");
    let connect = async |n: usize| {
        let url: &str = urls[n].expose_secret();
        wilco::connect_by(url, within()).await
    };
    for round in ["before", "after"] {
        let broker = connect(0).await.expect(round);
        attaches(&*broker, &*admin, &kept.queue()).await;
        broker.close(within()).await.expect("closed");
        let refused = connect(1).await.expect_err(round);
        assert_eq!(*refused.kind(), ErrorKind::AuthRefused, "{refused}");
        if round == "before" {
            server.restart().await.expect("started again");
        }
    }
    let left = admin.credentials(within()).await.expect("a list");
    assert_eq!(left, [kept.queue()]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s1_redis_forgets_neither_a_credential_nor_its_end() {
    outlives_a_restart(&Redis).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s1_nats_forgets_neither_a_credential_nor_its_end() {
    outlives_a_restart(&Nats).await;
}
