//! lapin alone: a quorum queue; persistent, mandatory, confirmed publishes on one channel, which one
//! task owns, since several would mix up each other's confirms; a consumer that acks together what came
//! together, and waits for the broker's word on it as wilco does (law C2: an ack alone is not answered);
//! questions to a queue of the guest's, answers to one of the asker's. What it does not do is tell which
//! of the pipelined messages was returned.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures_util::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer,
    PublisherConfirm,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions,
        BasicQosOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
};
use tokio::{
    sync::{Mutex, watch},
    task::{JoinHandle, JoinSet},
};
use wilco::MessageId;

use super::NAME;
use crate::{BODY, Side, since, stamped};

const LANE: &str = "bare-lane";
const REPLY: &str = "bare-reply";

pub(super) struct RabbitMq {
    host: Channel,
    guest: Connection,
    asker: Mutex<(Channel, Consumer)>,
    answering: JoinHandle<()>,
    _connections: [Connection; 2],
}

pub(super) async fn connect(url: &str) -> RabbitMq {
    let url = url.split('?').next().unwrap();
    let connect = || Connection::connect(url, ConnectionProperties::default());
    let (host, guest, asking) = (
        connect().await.unwrap(),
        connect().await.unwrap(),
        connect().await.unwrap(),
    );
    let publishing = host.create_channel().await.unwrap();
    let confirmed = ConfirmSelectOptions::default();
    publishing.confirm_select(confirmed).await.unwrap();
    let (answers, mut questions) = listening(&guest, LANE).await;
    let answering = tokio::spawn(async move {
        while let Some(question) = questions.next().await {
            let question = question.unwrap();
            send(&answers, REPLY, &question.data).await;
        }
    });
    RabbitMq {
        host: publishing,
        guest,
        asker: Mutex::new(listening(&asking, REPLY).await),
        answering,
        _connections: [host, asking],
    }
}

impl Drop for RabbitMq {
    fn drop(&mut self) {
        self.answering.abort();
    }
}

/// A queue that is there as long as its connection is, and what comes to it.
async fn listening(connection: &Connection, name: &str) -> (Channel, Consumer) {
    let channel = connection.create_channel().await.unwrap();
    let options = QueueDeclareOptions {
        exclusive: true,
        auto_delete: true,
        ..QueueDeclareOptions::default()
    };
    let declared = channel.queue_declare(name.into(), options, FieldTable::default());
    declared.await.unwrap();
    let options = BasicConsumeOptions {
        no_ack: true,
        ..BasicConsumeOptions::default()
    };
    let table = FieldTable::default();
    let consumer = channel.basic_consume(name.into(), "".into(), options, table);
    let consumer = consumer.await.unwrap();
    (channel, consumer)
}

/// One that nobody has to store.
async fn send(channel: &Channel, to: &str, body: &[u8]) {
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let properties = BasicProperties::default();
    let sent = channel.basic_publish("".into(), to.into(), options, body, properties);
    sent.await.unwrap();
}

async fn publish(channel: &Channel, body: &[u8]) -> PublisherConfirm {
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let properties = BasicProperties::default()
        .with_delivery_mode(2)
        .with_message_id(MessageId::generate().as_str().into())
        .with_type("bench".into());
    let published = channel.basic_publish("".into(), NAME.into(), options, body, properties);
    published.await.unwrap()
}

async fn confirmed(confirm: PublisherConfirm) {
    let confirmation = confirm.await.unwrap();
    assert_eq!(confirmation, Confirmation::Ack(None));
}

/// Acks what has arrived, so many in all on this channel, beside the one who receives.
fn settling(channel: Channel, messages: usize) -> (watch::Sender<u64>, JoinHandle<()>) {
    let (arrived, mut latest) = watch::channel(0);
    let last = u64::try_from(messages).unwrap();
    let settling = tokio::spawn(async move {
        let mut settled = 0;
        while settled < last {
            settled = *latest.wait_for(|tag| *tag > settled).await.unwrap();
            let options = BasicAckOptions { multiple: true };
            channel.basic_ack(settled, options).await.unwrap();
            acked(&channel).await;
        }
    });
    (arrived, settling)
}

/// Waits for the broker's word on what was acked, which RabbitMQ gives to no ack: an attachment that wants
/// no messages goes through the queue's log behind the acks, and is answered.
async fn acked(channel: &Channel) {
    let mut nothing = FieldTable::default();
    nothing.insert("credit".into(), AMQPValue::LongLongInt(0));
    nothing.insert("drain".into(), AMQPValue::Boolean(false));
    let mut table = FieldTable::default();
    table.insert("x-credit".into(), AMQPValue::FieldTable(nothing));
    let options = BasicConsumeOptions::default();
    let attached = channel.basic_consume(NAME.into(), "acked".into(), options, table);
    attached.await.unwrap();
    let options = BasicCancelOptions { nowait: true };
    channel.basic_cancel("acked".into(), options).await.unwrap();
}

impl RabbitMq {
    async fn attach(&self, prefetch: u32) -> (Channel, Consumer) {
        let channel = self.guest.create_channel().await.unwrap();
        let prefetch = u16::try_from(prefetch).unwrap();
        let options = BasicQosOptions::default();
        channel.basic_qos(prefetch, options).await.unwrap();
        let options = BasicConsumeOptions::default();
        let table = FieldTable::default();
        let consumer = channel.basic_consume(NAME.into(), "".into(), options, table);
        let consumer = consumer.await.unwrap();
        (channel, consumer)
    }
}

#[async_trait]
impl Side for RabbitMq {
    async fn fresh(&self) {
        let options = QueueDeleteOptions::default();
        self.host.queue_delete(NAME.into(), options).await.unwrap();
        let mut table = FieldTable::default();
        let text = |text: &str| AMQPValue::LongString(text.into());
        table.insert("x-queue-type".into(), text("quorum"));
        table.insert("x-delivery-limit".into(), AMQPValue::LongInt(1_000_000));
        table.insert("x-overflow".into(), text("reject-publish"));
        let options = QueueDeclareOptions {
            durable: true,
            ..QueueDeclareOptions::default()
        };
        let declared = self.host.queue_declare(NAME.into(), options, table);
        declared.await.unwrap();
    }

    async fn publish(&self, messages: usize, in_flight: usize) {
        let body = vec![b'x'; BODY];
        let mut confirms = VecDeque::with_capacity(in_flight);
        for _ in 0..messages {
            if confirms.len() == in_flight
                && let Some(oldest) = confirms.pop_front()
            {
                confirmed(oldest).await;
            }
            confirms.push_back(publish(&self.host, &body).await);
        }
        for confirm in confirms {
            confirmed(confirm).await;
        }
    }

    async fn consume(&self, messages: usize, prefetch: u32) -> Duration {
        let (channel, mut arriving) = self.attach(prefetch).await;
        let begin = Instant::now();
        let (arrived, settling) = settling(channel.clone(), messages);
        for _ in 0..messages {
            let delivery = arriving.next().await.unwrap().unwrap();
            assert_eq!(delivery.data.len(), BODY);
            arrived.send_replace(delivery.delivery_tag);
        }
        settling.await.unwrap();
        let took = begin.elapsed();
        channel.close(200, "done".into()).await.unwrap();
        took
    }

    async fn ping(&self, times: usize) -> Vec<Duration> {
        let mut asker = self.asker.lock().await;
        let (channel, answers) = &mut *asker;
        let mut took = Vec::with_capacity(times);
        for _ in 0..times {
            let begin = Instant::now();
            send(channel, LANE, b"ping").await;
            answers.next().await.unwrap().unwrap();
            took.push(begin.elapsed());
        }
        took
    }

    async fn paced(&self, messages: usize) -> Vec<Duration> {
        let (channel, mut arriving) = self.attach(64).await;
        let host = self.host.clone();
        let publishing = tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_millis(1));
            let mut published = JoinSet::new();
            for _ in 0..messages {
                tick.tick().await;
                published.spawn(confirmed(publish(&host, &stamped()).await));
            }
            published.join_all().await;
        });
        let (arrived, settling) = settling(channel.clone(), messages);
        let mut times = Vec::with_capacity(messages);
        while times.len() < messages {
            let delivery = arriving.next().await.unwrap().unwrap();
            times.push(since(&delivery.data));
            arrived.send_replace(delivery.delivery_tag);
        }
        publishing.await.unwrap();
        settling.await.unwrap();
        channel.close(200, "done".into()).await.unwrap();
        times
    }
}
