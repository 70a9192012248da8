//! How deliveries end: acked, back in their queue, or among the dead letters. What is handed in
//! together is settled together, with one proof for all (see `barrier`).

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};

use futures_util::future::join_all;
use lapin::options::{BasicAckOptions, BasicNackOptions};
use tokio::{sync::oneshot, time::Instant};
use uuid::Uuid;

use super::{
    barrier::{self, MOST_FRAMES},
    consume::{Holder, Settle},
    dead,
    fault::Fault,
    letter::Death,
    lock,
    notes::Due,
    post::Answer,
    station::{Station, refuse},
};
use crate::{
    broker::Settlement,
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
};

type Reply = Option<oneshot::Sender<Result<()>>>;

fn limit_reason(limit: u32) -> String {
    format!("delivery limit {limit} exceeded")
}

/// What a message that came too often is settled with.
pub(super) fn over_the_limit(holder: &Holder, tag: u64) -> Settle {
    let mut state = lock(&holder.state);
    state.handed += 1;
    Settle {
        generation: state.generation,
        tag,
        how: Settlement::Retry(Duration::ZERO),
        deadline: Deadline::after(Duration::from_secs(20)),
        reply: None,
    }
}

/// What became of a delivery on the broker.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Removed,
    Returned,
}

impl Station {
    pub(super) async fn settle(
        &mut self,
        holder: &Arc<Holder>,
        orders: Vec<Settle>,
    ) -> Result<(), Fault> {
        let mut fates: BTreeMap<u64, (Fate, Reply)> = BTreeMap::new();
        let (mut burials, mut delays) = (Vec::new(), Vec::new());
        let generation = lock(&holder.state).generation;
        let mut seen = HashSet::new();
        for order in orders {
            let Some(out) = self.out.get(&order.tag) else {
                refuse(order.reply);
                continue;
            };
            if order.generation != generation || !seen.insert(order.tag) {
                refuse(order.reply);
                continue;
            }
            match order.how {
                Settlement::Ack => {
                    fates.insert(order.tag, (Fate::Removed, order.reply));
                }
                Settlement::Retry(_) if out.attempt >= self.limit => {
                    burials.push((
                        order.tag,
                        limit_reason(self.limit),
                        order.deadline,
                        order.reply,
                    ));
                }
                Settlement::Retry(Duration::ZERO) => {
                    fates.insert(order.tag, (Fate::Returned, order.reply));
                }
                Settlement::Retry(delay) => delays.push((order.tag, delay, order.reply)),
                Settlement::DeadLetter(reason) => {
                    burials.push((order.tag, reason, order.deadline, order.reply));
                }
            }
        }
        self.bury(holder, burials, &mut fates).await;
        self.delay(holder, delays, &mut fates).await?;
        self.carry_out(holder, fates).await
    }

    /// Stores the dead letters; their messages may go then (law C7).
    async fn bury(
        &self,
        holder: &Arc<Holder>,
        burials: Vec<(u64, String, Deadline, Reply)>,
        fates: &mut BTreeMap<u64, (Fate, Reply)>,
    ) {
        let (core, queue, limit, all) = (&holder.core, &holder.queue, self.limit, &self.out);
        let stored = burials
            .into_iter()
            .map(|(tag, reason, deadline, reply)| async move {
                let out = all.get(&tag)?;
                let attempts = out.attempt.min(limit);
                let death = Death { reason, attempts };
                // Of its own from here on: by its key it is listed, and sent back.
                let own = out.foreign.then(|| Uuid::new_v4().simple().to_string());
                let key = own.as_ref().unwrap_or(&out.key);
                let letter = dead::letter(&holder.core, queue, &out.message, key, &death);
                Some((tag, core.outbox.publish(letter, deadline).await, reply))
            });
        for (tag, answer, reply) in join_all(stored).await.into_iter().flatten() {
            match (answer, reply) {
                (Answer::Stored, reply) => {
                    fates.insert(tag, (Fate::Removed, reply));
                }
                (answer, Some(reply)) => {
                    let error = Error::new(
                        ErrorKind::BrokerRefused,
                        format!(
                            "the dead letter was not stored ({answer:?}): the message comes again"
                        ),
                    );
                    // It stays leased: who is told drops it, and that gives it back.
                    let _ = reply.send(Err(error));
                }
                (_, None) => {
                    fates.insert(tag, (Fate::Returned, None));
                }
            }
        }
    }

    /// Notes when they are due; they come back to this consumer then, which keeps them until it is time.
    async fn delay(
        &mut self,
        holder: &Arc<Holder>,
        delays: Vec<(u64, Duration, Reply)>,
        fates: &mut BTreeMap<u64, (Fate, Reply)>,
    ) -> Result<(), Fault> {
        if delays.is_empty() {
            return Ok(());
        }
        let Some(register) = &mut self.register else {
            // Its consumer has left: whoever comes next has the register. The delay is kept here, for as
            // long as this process lives.
            for (tag, delay, reply) in delays {
                holder.keep_until(tag, delay);
                if let Some(reply) = reply {
                    let _ = reply.send(Ok(()));
                }
            }
            return Ok(());
        };
        for (tag, delay, _) in &delays {
            if let Some(out) = self.out.get(tag) {
                register
                    .notes
                    .due
                    .insert(out.key.clone(), Due::after(*delay));
                let until = Deadline::after(*delay).instant() + Duration::from_millis(1);
                self.not_before.insert(out.key.clone(), until);
            }
        }
        let patience = Deadline::after(Duration::from_secs(20));
        register.write(&holder.core, &self.side, patience).await?;
        for (tag, _, reply) in delays {
            fates.insert(tag, (Fate::Returned, reply));
        }
        Ok(())
    }

    /// Tells the broker, and then, with its proof, those who wait.
    async fn carry_out(
        &mut self,
        holder: &Arc<Holder>,
        mut fates: BTreeMap<u64, (Fate, Reply)>,
    ) -> Result<(), Fault> {
        while !fates.is_empty() {
            let mut done: Vec<(u64, Fate, Reply)> = Vec::new();
            let mut frames = 0;
            // From the oldest on, as many as are acked without a gap: one frame for all of them.
            let oldest: Vec<u64> = self
                .out
                .keys()
                .copied()
                .take_while(|tag| matches!(fates.get(tag), Some((Fate::Removed, _))))
                .collect();
            if let Some(last) = oldest.last() {
                let options = BasicAckOptions { multiple: true };
                self.channel.basic_ack(*last, options).await?;
                frames += 1;
            }
            for tag in oldest {
                if let Some((fate, reply)) = fates.remove(&tag) {
                    done.push((tag, fate, reply));
                }
            }
            while frames < MOST_FRAMES
                && let Some((tag, (fate, reply))) = fates.pop_first()
            {
                match fate {
                    Fate::Removed => {
                        let options = BasicAckOptions::default();
                        self.channel.basic_ack(tag, options).await?;
                    }
                    Fate::Returned => self.return_one(tag).await?,
                }
                frames += 1;
                done.push((tag, fate, reply));
            }
            barrier::pass(&self.channel, holder.queue.as_str()).await?;
            self.told(holder, done);
        }
        Ok(())
    }

    async fn return_one(&self, tag: u64) -> Result<(), Fault> {
        let options = BasicNackOptions {
            requeue: true,
            multiple: false,
        };
        Ok(self.channel.basic_nack(tag, options).await?)
    }

    /// Gives these back, in their order, with proof.
    pub(super) async fn return_all(
        &mut self,
        holder: &Arc<Holder>,
        tags: &BTreeSet<u64>,
    ) -> Result<(), Fault> {
        let tags: Vec<u64> = tags.iter().copied().collect();
        if tags.is_empty() {
            return Ok(());
        }
        let queue = holder.queue.as_str();
        // Nobody takes any: this consumer has been cancelled, and has the lock still.
        let wanted = barrier::ready(&self.channel, queue).await? + tags.len() as u64;
        for some in tags.chunks(MOST_FRAMES) {
            for tag in some {
                self.return_one(*tag).await?;
            }
            barrier::pass(&self.channel, holder.queue.as_str()).await?;
            for tag in some {
                self.out.remove(tag);
            }
        }
        barrier::until_ready(&self.channel, queue, wanted).await
    }

    fn told(&mut self, holder: &Arc<Holder>, done: Vec<(u64, Fate, Reply)>) {
        let mut replies = Vec::with_capacity(done.len());
        for (tag, fate, reply) in done {
            let Some(out) = self.out.remove(&tag) else {
                replies.push(reply);
                continue;
            };
            if fate == Fate::Returned {
                self.returned.insert(out.key);
            } else {
                self.not_before.remove(&out.key);
                if let Some(register) = &mut self.register {
                    register.notes.uncounted.remove(&out.key);
                    register.notes.due.remove(&out.key);
                }
            }
            replies.push(reply);
        }
        {
            let mut state = lock(&holder.state);
            state.handed = state.handed.saturating_sub(replies.len());
        }
        holder.ready.notify_one();
        let now = Instant::now();
        self.not_before.retain(|_, until| *until > now);
        for reply in replies.into_iter().flatten() {
            let _ = reply.send(Ok(()));
        }
    }
}
