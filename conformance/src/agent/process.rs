//! The agent's own side: what the second process does.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::stream::{self, StreamExt, TryStreamExt};
use tokio::{
    io::{AsyncBufReadExt, BufReader, stdin},
    task::JoinSet,
};
use wilco::{
    Broker, Deadline, Message, MessageId, Outcome, QueueName,
    broker::{Consumer, Delivery},
};

use super::{Order, Told};
use crate::{
    ledger::{Answer, Entry, Event, How},
    second::tell,
    support::{attach, attach_lane},
};

/// Obeys orders from standard input until it ends.
///
/// # Errors
/// The broker cannot be reached, or an order cannot be read.
pub async fn run(url: &str) -> Result<(), String> {
    let broker = wilco::connect(url)
        .await
        .map_err(|error| error.to_string())?;
    let mut agent = Process {
        broker,
        consumer: None,
        held: HashMap::new(),
    };
    let mut orders = BufReader::new(stdin()).lines();
    while let Some(line) = orders
        .next_line()
        .await
        .map_err(|error| error.to_string())?
    {
        let order = serde_json::from_str(&line).map_err(|error| error.to_string())?;
        let told = agent
            .obey(order)
            .await
            .unwrap_or_else(|error| Told::Failed { error });
        tell(&told)?;
    }
    Ok(())
}

struct Process {
    broker: Arc<dyn Broker>,
    consumer: Option<Box<dyn Consumer>>,
    held: HashMap<String, Delivery>,
}

impl Process {
    async fn obey(&mut self, order: Order) -> Result<Told, String> {
        let text = |error: wilco::Error| format!("{error} ({:?})", error.kind());
        match order {
            Order::Attach { queue, prefetch } => {
                let consumer = attach(&*self.broker, &queue, prefetch).await;
                self.consumer = Some(consumer.map_err(|error| format!("{error:?}"))?);
            }
            Order::Receive => {
                let consumer = self.consumer.as_mut().ok_or("not attached")?;
                let delivery = consumer.next().await.map_err(text)?;
                let (id, attempt) = (delivery.message.id.to_string(), delivery.attempt);
                self.held.insert(id.clone(), delivery);
                return Ok(Told::Delivery { id, attempt });
            }
            Order::Ack { id } => {
                let delivery = self.held.remove(&id).ok_or("not held")?;
                delivery.ack(limit()).await.map_err(text)?;
            }
            Order::Publish { queue, id } => {
                let message = message(&id).map_err(text)?;
                self.broker
                    .publish(&queue, message, limit())
                    .await
                    .map_err(text)?;
            }
            Order::Respond { lane, answer } => {
                let responder = attach_lane(&*self.broker, &lane).await;
                let mut responder = responder.map_err(|error| format!("{error:?}"))?;
                tokio::spawn(async move {
                    let mut unanswered = Vec::new();
                    while let Ok(request) = responder.next().await {
                        if answer {
                            let body = request.body.clone();
                            // An asker that went is no fault of ours.
                            let _ = request.reply(body, limit()).await;
                        } else {
                            unanswered.push(request);
                        }
                    }
                });
            }
            Order::Work { queue, seed } => {
                self.work(&queue, seed).await?;
                return Ok(Told::End);
            }
            Order::Load {
                queue,
                prefix,
                messages,
                at_once,
                seed,
            } => {
                let at_once = usize::try_from(at_once).unwrap_or(1);
                tell(&Told::Done)?;
                stream::iter(0..messages)
                    .map(|n| self.load(&queue, format!("{prefix}{n}"), seed))
                    .buffer_unordered(at_once)
                    .try_collect::<()>()
                    .await?;
                return Ok(Told::End);
            }
        }
        Ok(Told::Done)
    }

    async fn work(&mut self, queue: &QueueName, seed: u64) -> Result<(), String> {
        let mut rng = fastrand::Rng::with_seed(seed);
        let prefetch = rng.u32(1..16);
        let consumer = attach(&*self.broker, queue, prefetch).await;
        let mut consumer = consumer.map_err(|error| format!("{error:?}"))?;
        tell(&Told::Done)?;
        // As many at once as there may be unsettled.
        let mut settling = JoinSet::new();
        loop {
            let delivery = consumer.next().await.map_err(|error| error.to_string())?;
            // Told before anything else is done with it: whoever is killed here has received it.
            history(seed, Event::delivery(queue, &delivery))?;
            let (queue, rng) = (queue.to_string(), rng.fork());
            settling.spawn(settle(delivery, queue, seed, rng));
            while let Some(settled) = settling.try_join_next() {
                settled.map_err(|error| error.to_string())??;
            }
        }
    }

    async fn load(&self, queue: &QueueName, id: String, seed: u64) -> Result<(), String> {
        let message = message(&id).map_err(|error| error.to_string())?;
        history(
            seed,
            Event::Attempt {
                queue: queue.to_string(),
                id: id.clone(),
            },
        )?;
        let answer = match self.broker.publish(queue, message, limit()).await {
            Ok(_) => Answer::Stored,
            Err(error) if error.outcome() == Some(Outcome::NotStored) => Answer::NotStored,
            Err(_) => Answer::Unknown,
        };
        let queue = queue.to_string();
        history(seed, Event::Answer { queue, id, answer })
    }
}

async fn settle(
    delivery: Delivery,
    queue: String,
    seed: u64,
    mut rng: fastrand::Rng,
) -> Result<(), String> {
    let id = delivery.message.id.to_string();
    let (how, settled) = match rng.u32(0..10) {
        0 => (How::Dropped, {
            drop(delivery);
            Ok(())
        }),
        1 => {
            let delay = Duration::from_millis(rng.u64(0..30));
            (How::Retry, delivery.retry(delay, limit()).await)
        }
        _ => (How::Ack, delivery.ack(limit()).await),
    };
    let ok = settled.is_ok();
    history(seed, Event::Settled { queue, id, how, ok })
}

fn message(id: &str) -> wilco::Result<Message> {
    Ok(Message::new("check", id.to_owned())?.with_id(MessageId::new(id)?))
}

fn limit() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

fn history(seed: u64, event: Event) -> Result<(), String> {
    tell(&Told::History {
        entry: Entry::now(seed, event),
    })
}
