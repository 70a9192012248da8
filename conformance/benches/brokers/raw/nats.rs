//! async-nats alone: a stream that is a work queue, publishes with a message id whose second future is
//! awaited; a durable pull consumer, each message acknowledged with the server's answer awaited; core
//! requests. What it does not do is remember what was acked where the server would forget it, count
//! deliveries, or have one consumer only.

use std::time::{Duration, Instant};

use async_nats::{
    Client, HeaderMap,
    jetstream::{
        self, Context,
        consumer::{AckPolicy, PullConsumer, pull},
        stream::{DiscardPolicy, RetentionPolicy, StorageType},
    },
};
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::task::{JoinHandle, JoinSet};
use wilco::MessageId;

use super::NAME;
use crate::{BODY, Side, since, stamped};

const LANE: &str = "bare-lane";

pub(super) struct Nats {
    host: Client,
    publishing: Context,
    consuming: Context,
    answering: JoinHandle<()>,
}

pub(super) async fn connect(url: &str) -> Nats {
    let (host, guest) = (
        async_nats::connect(url).await.unwrap(),
        async_nats::connect(url).await.unwrap(),
    );
    let mut questions = guest.subscribe(LANE).await.unwrap();
    guest.flush().await.unwrap();
    let answers = guest.clone();
    let answering = tokio::spawn(async move {
        while let Some(question) = questions.next().await {
            let reply = question.reply.unwrap();
            answers.publish(reply, question.payload).await.unwrap();
        }
    });
    Nats {
        publishing: jetstream::new(host.clone()),
        consuming: jetstream::new(guest),
        host,
        answering,
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        self.answering.abort();
    }
}

async fn publish(context: &Context, body: Bytes) {
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Msg-Id", MessageId::generate().as_str());
    headers.insert("Kind", "bench");
    let published = context.publish_with_headers(NAME, headers, body).await;
    published.unwrap().await.unwrap();
}

impl Nats {
    async fn attach(&self, prefetch: u32) -> pull::Stream {
        let stream = self.consuming.get_stream(NAME).await.unwrap();
        let consumer: PullConsumer = stream
            .create_consumer(pull::Config {
                durable_name: Some(NAME.into()),
                ack_policy: AckPolicy::Explicit,
                ack_wait: Duration::from_secs(3),
                max_ack_pending: prefetch.into(),
                ..pull::Config::default()
            })
            .await
            .unwrap();
        let messages = consumer
            .stream()
            .max_messages_per_batch(usize::try_from(prefetch).unwrap());
        messages.messages().await.unwrap()
    }
}

#[async_trait]
impl Side for Nats {
    async fn fresh(&self) {
        // There is none before the first round.
        let _ = self.publishing.delete_stream(NAME).await;
        let config = jetstream::stream::Config {
            name: NAME.into(),
            subjects: vec![NAME.into()],
            retention: RetentionPolicy::WorkQueue,
            storage: StorageType::File,
            discard: DiscardPolicy::New,
            duplicate_window: Duration::from_secs(600),
            ..jetstream::stream::Config::default()
        };
        self.publishing.create_stream(config).await.unwrap();
    }

    async fn publish(&self, messages: usize, in_flight: usize) {
        let body = Bytes::from(vec![b'x'; BODY]);
        let tasks = (0..in_flight).map(|_| {
            let (context, body) = (self.publishing.clone(), body.clone());
            async move {
                for _ in 0..messages / in_flight {
                    publish(&context, body.clone()).await;
                }
            }
        });
        tasks.collect::<JoinSet<()>>().join_all().await;
    }

    async fn consume(&self, messages: usize, prefetch: u32) -> Duration {
        let mut arriving = self.attach(prefetch).await;
        let begin = Instant::now();
        let mut acks = JoinSet::new();
        for _ in 0..messages {
            let message = arriving.next().await.unwrap().unwrap();
            assert_eq!(message.payload.len(), BODY);
            acks.spawn(async move { message.double_ack().await.unwrap() });
            while let Some(ack) = acks.try_join_next() {
                ack.unwrap();
            }
        }
        acks.join_all().await;
        begin.elapsed()
    }

    async fn ping(&self, times: usize) -> Vec<Duration> {
        let mut took = Vec::with_capacity(times);
        for _ in 0..times {
            let begin = Instant::now();
            self.host.request(LANE, "ping".into()).await.unwrap();
            took.push(begin.elapsed());
        }
        took
    }

    async fn paced(&self, messages: usize) -> Vec<Duration> {
        let mut arriving = self.attach(64).await;
        let context = self.publishing.clone();
        let publishing = tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_millis(1));
            let mut published = JoinSet::new();
            for _ in 0..messages {
                tick.tick().await;
                let context = context.clone();
                published.spawn(async move { publish(&context, stamped().into()).await });
            }
            published.join_all().await;
        });
        let mut times = Vec::with_capacity(messages);
        let mut acks = JoinSet::new();
        while times.len() < messages {
            let message = arriving.next().await.unwrap().unwrap();
            times.push(since(&message.payload));
            acks.spawn(async move { message.double_ack().await.unwrap() });
            while let Some(ack) = acks.try_join_next() {
                ack.unwrap();
            }
        }
        publishing.await.unwrap();
        acks.join_all().await;
        times
    }
}
