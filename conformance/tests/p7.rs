//! Law P7 on RabbitMQ, on a runtime with several threads: 64 tasks publish on one handle, a third of it to
//! a full queue, a third to none at all. The client library that the backend stands on mixes up the answers
//! where it is used plainly, which is shown too: a test that could not tell would show nothing.
//!
//! `WILCO_P7=100000` asks for as many publishes as law and issue say; otherwise there are fewer.

use std::{sync::Arc, time::Instant};

use futures_util::future::join_all;
use lapin::{
    BasicProperties, Confirmation, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use wilco::{
    Broker, Deadline, ErrorKind, GuestAddress, GuestId, Message, MessageId, Outcome, QueueName,
    broker::QueueSpec,
};
use wilco_conformance::{
    harness::{Harness, Server, Use},
    harnesses::RabbitMq,
};

const TASKS: usize = 64;

/// Where a publish goes, and so what its answer has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    Good,
    Full,
    Missing,
}

impl To {
    /// In turn, another one in each task at a time.
    fn of(task: usize, n: usize) -> Self {
        [Self::Good, Self::Full, Self::Missing][(task + n) % 3]
    }
}

/// How many publishes there are for each task.
fn each(otherwise: usize) -> usize {
    let all = std::env::var("WILCO_P7").map_or(otherwise, |all| {
        all.parse().expect("WILCO_P7 is a number of publishes")
    });
    all.div_ceil(TASKS)
}

async fn server() -> Box<dyn Server> {
    RabbitMq.start(Use::Shared).await.expect("a server")
}

fn within() -> Deadline {
    Deadline::after(std::time::Duration::from_secs(120))
}

fn queue(id: &str) -> QueueName {
    GuestAddress::from(GuestId::new(id).expect("an id")).queue()
}

/// Every answer is the right one, and what is stored is what was Ok.
#[expect(
    clippy::print_stdout,
    reason = "a test's output is where its evidence is read"
)]
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn p7_every_answer_is_right() {
    let server = server().await;
    let broker = server.connect().await.expect("a handle");
    let (good, full) = (queue("p7-good"), queue("p7-full"));
    let spec = QueueSpec::new(good.clone());
    broker.declare(&spec, within()).await.expect("a queue");
    let spec = QueueSpec::new(full.clone()).with_max_messages(1);
    broker.declare(&spec, within()).await.expect("a queue");
    let fills = Message::new("check", "fills").expect("a message");
    let filled = broker.publish(&full, fills, within()).await;
    filled.expect("there is room for one");
    let (each, started) = (each(6_000), Instant::now());
    let tasks = (0..TASKS).map(|task| {
        let (broker, queues) = (
            Arc::clone(&broker),
            [good.clone(), full.clone(), queue("p7-missing")],
        );
        tokio::spawn(async move {
            let mut stored = 0;
            for n in 0..each {
                let to = To::of(task, n);
                publish(&*broker, to, &queues[to as usize], format!("{task}/{n}")).await;
                stored += u64::from(to == To::Good);
            }
            stored
        })
    });
    let stored: u64 = join_all(tasks)
        .await
        .into_iter()
        .map(|task| task.expect("right answers"))
        .sum();
    let took = started.elapsed();
    let holds = async |name| {
        let status = broker.status(name, within()).await;
        status.expect("a status").messages()
    };
    assert_eq!(
        holds(&good).await,
        stored,
        "every Ok is stored, and no more"
    );
    assert_eq!(holds(&full).await, 1, "what was refused is not stored");
    // Each that was not right has ended the test.
    println!(
        "{0} publishes: {0} answers right, 0 wrong, {stored} stored; {took:.1?}",
        each * TASKS
    );
}

async fn publish(broker: &dyn Broker, to: To, queue: &QueueName, id: String) {
    let message = Message::new("check", id.clone()).expect("a message");
    let message = message.with_id(MessageId::new(id.as_str()).expect("an id"));
    let answer = broker.publish(queue, message, within()).await;
    let seen = answer.map(drop).map_err(|error| {
        assert_eq!(error.outcome(), Some(Outcome::NotStored), "{id}: {error}");
        error.kind().clone()
    });
    let right = match to {
        To::Good => Ok(()),
        To::Full => Err(ErrorKind::BrokerRefused),
        To::Missing => Err(ErrorKind::NoQueue),
    };
    assert_eq!(seen, right, "the answer to {id} for {queue}");
}

/// The counter-example: the same on one channel of the client, with confirms and mandatory publishes, as
/// its documentation has it. Wrong answers are seen.
#[expect(
    clippy::print_stdout,
    reason = "a test's output is where its evidence is read"
)]
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn p7_the_client_used_plainly_gives_wrong_answers() {
    let server = server().await;
    let url = server.facts().url.expect("a URL");
    let url = url.split('?').next().expect("what is before the options");
    let connection = Connection::connect(url, ConnectionProperties::default()).await;
    let connection = connection.expect("a connection");
    let channel = connection.create_channel().await.expect("a channel");
    let options = ConfirmSelectOptions::default();
    channel.confirm_select(options).await.expect("confirms");
    for name in ["good", "full"] {
        let mut arguments = FieldTable::default();
        if name == "full" {
            arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
            let overflow = AMQPValue::LongString("reject-publish".into());
            arguments.insert("x-overflow".into(), overflow);
        }
        let options = QueueDeclareOptions {
            durable: true,
            ..QueueDeclareOptions::default()
        };
        let made = channel.queue_declare(name.into(), options, arguments).await;
        made.expect("a queue");
    }
    assert_eq!(
        plainly(&channel, To::Full).await,
        Some(To::Good),
        "room for one"
    );
    let each = each(20_000);
    let tasks = (0..TASKS).map(|task| {
        let channel = channel.clone();
        tokio::spawn(async move {
            let (mut wrong, mut said_stored) = (0, 0);
            for n in 0..each {
                let to = To::of(task, n);
                let seen = plainly(&channel, to).await;
                wrong += usize::from(seen != Some(to));
                said_stored += usize::from(seen == Some(To::Good) && to != To::Good);
            }
            (wrong, said_stored)
        })
    });
    let (mut wrong, mut said_stored) = (0, 0);
    for task in join_all(tasks).await {
        let (more, said_more) = task.expect("answers");
        wrong += more;
        said_stored += said_more;
    }
    let all = each * TASKS;
    println!(
        "{all} publishes: {} answers right, {wrong} wrong, of which {said_stored} said that a message \
         was stored which was not",
        all - wrong
    );
    assert!(
        wrong > 0,
        "the client tells answers apart now: is the window in post.rs still needed?"
    );
}

/// Publishes as the client's documentation has it; what the answer says of where the message went.
async fn plainly(channel: &lapin::Channel, to: To) -> Option<To> {
    let name = match to {
        To::Good => "good",
        To::Full => "full",
        To::Missing => "missing",
    };
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let properties = BasicProperties::default().with_delivery_mode(2);
    let published = channel
        .basic_publish("".into(), name.into(), options, b"x", properties)
        .await;
    match published
        .expect("it is sent")
        .await
        .expect("it is answered")
    {
        Confirmation::Ack(None) => Some(To::Good),
        Confirmation::Ack(Some(_)) => Some(To::Missing),
        Confirmation::Nack(None) => Some(To::Full),
        Confirmation::Nack(Some(_)) | Confirmation::NotRequested => None,
    }
}
