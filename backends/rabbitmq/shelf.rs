//! Reading a queue of our own without taking anything from it: all of it is held unacked, looked at,
//! and given back in its order. To be done under a lock, which readers of the same queue share.

use std::collections::BTreeSet;

use futures_util::StreamExt as _;
use lapin::{
    Channel,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions,
        BasicQosOptions, QueueDeclareOptions,
    },
    types::FieldTable,
};

use super::{barrier, fault::Fault, link::Wire};

/// How many given back in one step keep their order: the broker sorts no more than this.
const IN_ORDER: usize = 32;

/// What is held of a queue.
pub(super) struct Shelf {
    channel: Channel,
    queue: String,
    pub(super) entries: Vec<Delivery>,
}

/// Takes what is ready, oldest first, at most so many. `None`: there is no such queue.
pub(super) async fn open(wire: &Wire, queue: &str, most: usize) -> Result<Option<Shelf>, Fault> {
    let channel = wire.channel().await?;
    let options = QueueDeclareOptions {
        passive: true,
        ..QueueDeclareOptions::default()
    };
    let looked = channel
        .queue_declare(queue.into(), options, FieldTable::default())
        .await;
    let ready = match looked.map_err(Fault::from) {
        Ok(looked) => looked.message_count() as usize,
        Err(Fault::Amqp(404, _)) => return Ok(None),
        Err(fault) => return Err(fault),
    };
    let wanted = ready.min(most).min(usize::from(u16::MAX));
    let mut entries = Vec::with_capacity(wanted);
    if wanted > 0 {
        let room = u16::try_from(wanted).unwrap_or(u16::MAX);
        channel.basic_qos(room, BasicQosOptions::default()).await?;
        let mut consumer = channel
            .basic_consume(
                queue.into(),
                "shelf".into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await?;
        while entries.len() < wanted {
            match consumer.next().await {
                Some(Ok(delivery)) => entries.push(delivery),
                _ => return Err(Fault::Lost("the channel of a reader broke".into())),
            }
        }
        channel
            .basic_cancel("shelf".into(), BasicCancelOptions::default())
            .await?;
    }
    Ok(Some(Shelf {
        channel,
        queue: queue.into(),
        entries,
    }))
}

impl Shelf {
    /// Removes those of these delivery tags, and gives the others back. Returns when others see both.
    pub(super) async fn close(self, remove: &BTreeSet<u64>) -> Result<(), Fault> {
        let kept = self.entries.len()
            - self
                .entries
                .iter()
                .filter(|entry| remove.contains(&entry.delivery_tag))
                .count();
        let before = barrier::ready(&self.channel, &self.queue).await?;
        let mut run = 0;
        let mut frames = 0;
        let mut tags = Vec::with_capacity(self.entries.len());
        for entry in &self.entries {
            tags.push(entry.delivery_tag);
        }
        let mut tags = tags.into_iter().peekable();
        while let Some(tag) = tags.next() {
            if remove.contains(&tag) {
                let options = BasicAckOptions::default();
                self.channel.basic_ack(tag, options).await?;
                frames += 1;
            } else {
                run += 1;
                let ends = tags.peek().is_none_or(|next| remove.contains(next));
                if ends || run == IN_ORDER {
                    let options = BasicNackOptions {
                        multiple: true,
                        requeue: true,
                    };
                    // All those before it are settled already, but for this run.
                    self.channel.basic_nack(tag, options).await?;
                    (run, frames) = (0, frames + 1);
                }
            }
            if frames >= barrier::MOST_FRAMES {
                barrier::pass(&self.channel, &self.queue).await?;
                frames = 0;
            }
        }
        if frames > 0 {
            barrier::pass(&self.channel, &self.queue).await?;
        }
        barrier::until_ready(&self.channel, &self.queue, before + kept as u64).await?;
        Ok(self.channel.close(200, "done".into()).await?)
    }
}
