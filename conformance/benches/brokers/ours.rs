//! wilco's side: one and the same for every broker.

use std::{
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::task::{JoinHandle, JoinSet};
use wilco::{
    Broker, Deadline, GuestAddress, GuestId, Message, QueueName,
    broker::{ConsumeOptions, DeleteMode, QueueSpec},
};
use wilco_conformance::harness::Server;

use crate::{BODY, Side, since, stamped};

/// A control plane and a guest, each with a connection of its own.
pub(crate) struct Ours {
    host: Arc<dyn Broker>,
    guest: Arc<dyn Broker>,
    lane: GuestAddress,
    queue: QueueName,
    answering: JoinHandle<()>,
}

pub(crate) async fn connect(server: &dyn Server) -> Ours {
    let (host, guest) = (
        server.connect().await.unwrap(),
        server.connect().await.unwrap(),
    );
    let lane = GuestAddress::from(GuestId::new("bench").unwrap());
    let mut responder = guest.respond(&lane, deadline()).await.unwrap();
    let answering = tokio::spawn(async move {
        while let Ok(request) = responder.next().await {
            let body = request.body.clone();
            request.reply(body, deadline()).await.unwrap();
        }
    });
    let queue = lane.queue();
    Ours {
        host,
        guest,
        lane,
        queue,
        answering,
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        self.answering.abort();
    }
}

fn deadline() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

#[async_trait]
impl Side for Ours {
    async fn fresh(&self) {
        let deleted = self
            .host
            .delete(&self.queue, DeleteMode::Discard, deadline());
        // There is none before the first round.
        let _ = deleted.await;
        let spec = QueueSpec::new(self.queue.clone());
        self.host.declare(&spec, deadline()).await.unwrap();
    }

    async fn publish(&self, messages: usize, in_flight: usize) {
        let body = Bytes::from(vec![b'x'; BODY]);
        let tasks = (0..in_flight).map(|_| {
            let (host, queue, body) = (Arc::clone(&self.host), self.queue.clone(), body.clone());
            async move {
                for _ in 0..messages / in_flight {
                    let message = Message::new("bench", body.clone()).unwrap();
                    host.publish(&queue, message, deadline()).await.unwrap();
                }
            }
        });
        tasks.collect::<JoinSet<()>>().join_all().await;
    }

    async fn consume(&self, messages: usize, prefetch: u32) -> Duration {
        let options = ConsumeOptions::prefetch(NonZeroU32::new(prefetch).unwrap());
        let consuming = self.guest.consume(&self.queue, options, deadline());
        let mut consumer = consuming.await.unwrap();
        let begin = Instant::now();
        let mut acks = JoinSet::new();
        for _ in 0..messages {
            let delivery = consumer.next().await.unwrap();
            assert_eq!(delivery.message.body.len(), BODY);
            acks.spawn(delivery.ack(deadline()));
            while let Some(ack) = acks.try_join_next() {
                ack.unwrap().unwrap();
            }
        }
        while let Some(ack) = acks.join_next().await {
            ack.unwrap().unwrap();
        }
        let took = begin.elapsed();
        consumer.close(deadline()).await.unwrap();
        took
    }

    async fn ping(&self, times: usize) -> Vec<Duration> {
        let mut took = Vec::with_capacity(times);
        for _ in 0..times {
            let begin = Instant::now();
            let asked = self.host.request(&self.lane, "ping".into(), deadline());
            asked.await.unwrap();
            took.push(begin.elapsed());
        }
        took
    }

    async fn paced(&self, messages: usize) -> Vec<Duration> {
        let options = ConsumeOptions::prefetch(const { NonZeroU32::new(64).unwrap() });
        let consuming = self.guest.consume(&self.queue, options, deadline());
        let mut consumer = consuming.await.unwrap();
        let (host, queue) = (Arc::clone(&self.host), self.queue.clone());
        let publishing = tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_millis(1));
            let mut published = JoinSet::new();
            for _ in 0..messages {
                tick.tick().await;
                let (host, queue) = (Arc::clone(&host), queue.clone());
                published.spawn(async move {
                    let message = Message::new("bench", stamped()).unwrap();
                    host.publish(&queue, message, deadline()).await.unwrap();
                });
            }
            published.join_all().await;
        });
        let mut times = Vec::with_capacity(messages);
        let mut acks = JoinSet::new();
        while times.len() < messages {
            let delivery = consumer.next().await.unwrap();
            times.push(since(&delivery.message.body));
            acks.spawn(delivery.ack(deadline()));
            while let Some(ack) = acks.try_join_next() {
                ack.unwrap().unwrap();
            }
        }
        publishing.await.unwrap();
        for ack in acks.join_all().await {
            ack.unwrap();
        }
        consumer.close(deadline()).await.unwrap();
        times
    }
}
