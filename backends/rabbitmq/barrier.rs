//! Proof that what was settled is settled.
//!
//! RabbitMQ does not answer an ack. But a channel does one thing after the other, and to attach to a
//! quorum queue is a command that goes through the queue's log and is waited for: behind every ack that
//! the channel sent before. So an attachment that wants no messages, taken back at once, is the answer
//! (laws C2, C14).
//!
//! A channel holds back settlements once 32 commands wait for the queue's log: not more than
//! [`MOST_FRAMES`] may stand before one barrier.

use lapin::{
    Channel,
    options::{BasicCancelOptions, BasicConsumeOptions},
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
    channel
        .basic_cancel(TAG.into(), BasicCancelOptions::default())
        .await?;
    Ok(())
}
