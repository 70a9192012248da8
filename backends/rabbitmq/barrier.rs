//! Proof that what was settled is settled.
//!
//! RabbitMQ does not answer an ack. But a channel does one thing after the other, and to attach to a
//! quorum queue is a command that goes through the queue's log and is waited for: behind every ack that
//! the channel sent before. So an attachment that wants no messages, taken back at once, is the answer
//! (laws C2, C14).
//!
//! That is so for acks. What is given back takes another way to the log, and may come behind: where it
//! has to be there again, it is counted ([`until_ready`]).
//!
//! A channel holds back settlements once 32 commands wait for the queue's log: not more than
//! [`MOST_FRAMES`] may stand before one barrier.

use std::time::{Duration, Instant};

use lapin::{
    Channel,
    options::{BasicCancelOptions, BasicConsumeOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};

use super::fault::Fault;

/// The most settlements before one barrier.
pub(super) const MOST_FRAMES: usize = 28;

/// Returns when everything that this channel settled in this queue before is in the queue's log and
/// done.
pub(super) async fn pass(channel: &Channel, queue: &str) -> Result<(), Fault> {
    const TAG: &str = "barrier";
    let mut nothing = FieldTable::default();
    nothing.insert("credit".into(), AMQPValue::LongLongInt(0));
    nothing.insert("drain".into(), AMQPValue::Boolean(false));
    let mut arguments = FieldTable::default();
    arguments.insert("x-credit".into(), AMQPValue::FieldTable(nothing));
    channel
        .basic_consume(
            queue.into(),
            TAG.into(),
            BasicConsumeOptions::default(),
            arguments,
        )
        .await?;
    // That it is taken back proves nothing more, and the channel's next command comes behind it: so
    // nobody waits for that.
    let options = BasicCancelOptions { nowait: true };
    channel.basic_cancel(TAG.into(), options).await?;
    Ok(())
}

/// A count of nothing that took longer may be none: the broker gives up after 250 ms, and says that there
/// is nothing. Or the way is long.
pub(super) const COUNTED: Duration = Duration::from_millis(200);

/// So often in turn the broker is not believed then.
pub(super) const COUNTS: usize = 3;

/// How long what was given back is waited for: somebody who does not know of the locks may take it.
const BACK: Duration = Duration::from_secs(20);

/// How many messages are ready in a queue that is there.
pub(super) async fn ready(channel: &Channel, queue: &str) -> Result<u64, Fault> {
    for _ in 0..COUNTS {
        let options = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let asked = Instant::now();
        let looked = channel
            .queue_declare(queue.into(), options, FieldTable::default())
            .await?;
        if looked.message_count() > 0 || asked.elapsed() < COUNTED {
            return Ok(u64::from(looked.message_count()));
        }
    }
    Ok(0)
}

/// Returns when so many are ready: what this channel gave back, and nobody else takes.
pub(super) async fn until_ready(channel: &Channel, queue: &str, most: u64) -> Result<(), Fault> {
    let until = Instant::now() + BACK;
    while ready(channel, queue).await? < most {
        if Instant::now() > until {
            tracing::warn!(
                queue,
                "somebody takes messages that were given back under a lock"
            );
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}
