//! Dead letters: listed, read, sent back.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use std::time::Duration;

use common::{Place, until};
use wilco::{Deadline, GuestAddress, GuestId, Message, broker::QueueSpec};

/// Puts a command that nobody can understand into the queue of vm-1.
async fn poison(place: &Place) {
    let url = format!("sqlite://{}/wilco.db", place.path().display());
    let broker = wilco::connect(&url).await.unwrap();
    let deadline = || Deadline::after(Duration::from_secs(20));
    let queue = GuestAddress::from(GuestId::new("vm-1").unwrap()).queue();
    broker
        .declare(&QueueSpec::new(queue.clone()), deadline())
        .await
        .unwrap();
    let message = Message::new("prepare", "this is not a command").unwrap();
    broker.publish(&queue, message, deadline()).await.unwrap();
    broker.close(deadline()).await.unwrap();
}

#[tokio::test]
async fn a_dead_letter_is_listed_read_and_sent_back() {
    let place = Place::new();
    poison(&place).await;
    let guest = place.start(["guest", "vm-1", "--exec", "cat"]);
    let dead = || place.run(["dead", "list", "--json"]).json();
    until("it is among the dead letters", || !dead().is_empty());
    guest.stop().expect(0, &[]);

    let letters = dead();
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert_eq!(letters[0]["queue"], "wilco.q.vm-1.1");
    let key = letters[0]["key"].as_str().unwrap();
    let listed = place.run(["dead", "list", "vm-1"]);
    assert!(listed.stdout.contains(key), "{listed:?}");
    let shown = place.run(["dead", "show", "vm-1", key]);
    shown.expect(0, &[]);
    assert!(shown.stdout.contains("this is not a command"), "{shown:?}");

    place.run(["dead", "redrive", "vm-1", key]).expect(0, &[]);
    let queues = place.run(["queues", "--json"]).json();
    let queue = queues
        .iter()
        .find(|queue| queue["name"] == "wilco.q.vm-1.1")
        .unwrap();
    assert_eq!(
        (&queue["ready"], &queue["dead"]),
        (&1.into(), &0.into()),
        "{queue}"
    );

    place
        .run(["dead", "redrive", "vm-1", key])
        .expect(7, &["no dead letter", "(any more)"]);
    place
        .run(["dead", "show", "vm-1", key])
        .expect(7, &["no dead letter"]);
    place.run(["dead", "redrive", "vm-1"]).expect(2, &["--all"]);
    let none = place.run(["dead", "list"]);
    assert_eq!(none.stdout, "no dead letters\n");
}
