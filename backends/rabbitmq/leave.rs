//! How an attachment ends: nothing comes any more, what nobody was handed goes back to its place, and the
//! lock is given up.

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _, future::join_all};
use lapin::{
    BasicProperties,
    options::{BasicCancelOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::FieldTable,
};
use tokio::time::Instant;

use super::{
    ask::{Asked, Back, ask},
    barrier,
    consume::{End, Holder, Phase},
    credential,
    fault::Fault,
    hold::{GONE, HAS, Has, LetGo, lanes},
    letter, lock,
    lockqueue::try_exclusive,
    station::{Exit, Station, listen, say},
    topology,
};
use crate::deadline::Deadline;

/// How long a holder that let go waits for what becomes of the queue, and how often it looks itself.
const LOOK: Duration = Duration::from_millis(500);

const VERDICT: Duration = Duration::from_secs(30);

/// How long the messages that are on their way may take to come.
const ON_ITS_WAY: Duration = Duration::from_secs(20);

impl Station {
    /// Takes no more messages, with none on its way.
    ///
    /// What is on its way to a consumer that is cancelled the broker sends back by itself: before
    /// everything that is given back here, and counted as a delivery, though nobody had it. So a consumer
    /// is cancelled when it has all that it may have, or all that there is. What came just then is taken
    /// once more, and known by its count (laws C9, C11).
    pub(super) async fn stop(&mut self, holder: &Arc<Holder>) -> Result<(), Fault> {
        if self.main.is_none() {
            return Ok(());
        }
        self.drain(holder);
        if self.is_full() {
            return self.unsubscribe(holder).await;
        }
        let mut counted = self.in_other_hands(holder).await;
        loop {
            let full = self.until_still(holder).await?;
            counted.extend(self.returned.iter().cloned());
            self.unsubscribe(holder).await?;
            if full {
                return Ok(());
            }
            let queue = holder.queue.as_str();
            barrier::pass(&self.channel, queue).await?;
            if barrier::ready(&self.channel, queue).await? == 0 {
                return Ok(());
            }
            self.stopping = Some(counted.clone());
            self.subscribe(&holder.queue).await?;
        }
    }

    /// Waits until nothing is on its way to this consumer. True: it has all that it may have.
    async fn until_still(&mut self, holder: &Arc<Holder>) -> Result<bool, Fault> {
        let until = Instant::now() + ON_ITS_WAY;
        loop {
            self.drain(holder);
            if self.is_full() {
                return Ok(true);
            }
            let queue = holder.queue.as_str();
            let ready = barrier::ready(&self.channel, queue).await?;
            // What had been sent before that was counted is here before a second answer.
            let again = barrier::ready(&self.channel, queue).await?;
            self.drain(holder);
            if ready == 0 && again == 0 {
                return Ok(self.is_full());
            }
            if Instant::now() > until {
                let why = "what is ready in the queue does not come to its consumer";
                return Err(Fault::Lost(why.into()));
            }
        }
    }

    /// The keys of what consumers before this one have in hand still: their returns are counted.
    async fn in_other_hands(&self, holder: &Arc<Holder>) -> HashSet<String> {
        let soon = Deadline::after(holder.core.heartbeat);
        let lanes = lanes(&holder.queue);
        let others = lanes.iter().filter(|lane| **lane != self.lane);
        let asked = others.map(|lane| ask(&holder.core, lane, HAS, Bytes::new(), soon));
        let mut keys = HashSet::new();
        for asked in join_all(asked).await {
            // Who does not answer has no way to send anything back either.
            if let Ok(Asked::Answer(answer)) = asked {
                let has: Has = serde_json::from_slice(&answer).unwrap_or_default();
                keys.extend(has.keys);
            }
        }
        keys
    }

    /// Notes a return of which nobody had the message: it had been on its way when this consumer was
    /// cancelled.
    pub(super) fn note_if_uncounted(&mut self, key: &str, properties: &BasicProperties) {
        self.returned.remove(key);
        let Some(counted) = self.stopping.as_ref() else {
            return;
        };
        let Some(register) = self.register.as_mut().filter(|_| !counted.contains(key)) else {
            return;
        };
        let noted = register.notes.uncounted.get(key).copied().unwrap_or(0);
        if letter::returns(properties) > noted {
            register.notes.uncounted.insert(key.to_owned(), noted + 1);
        }
    }

    pub(super) async fn unsubscribe(&mut self, holder: &Arc<Holder>) -> Result<(), Fault> {
        let Some(mut main) = self.main.take() else {
            return Ok(());
        };
        self.channel
            .basic_cancel(main.tag(), BasicCancelOptions::default())
            .await?;
        // What was sent before the broker heard of it.
        while let Some(Some(Ok(delivery))) = main.next().now_or_never() {
            self.received(holder, delivery);
        }
        Ok(())
    }

    /// Gives back what nobody was handed, uncounted (laws C9, F8), and the register.
    pub(super) async fn give_buffer_back(&mut self, holder: &Arc<Holder>) -> Result<(), Fault> {
        self.stop(holder).await?;
        let buffered: BTreeSet<u64> = {
            let mut state = lock(&holder.state);
            let buffered = state.buffer.drain(..).map(|item| item.tag);
            buffered.collect()
        };
        let delayed = std::mem::take(&mut self.delayed);
        let tags: BTreeSet<u64> = delayed
            .into_iter()
            .map(|(_, tag)| tag)
            .chain(buffered)
            .collect();
        if let Some(mut register) = self.register.take() {
            for tag in &tags {
                if let Some(out) = self.out.get(tag) {
                    *register.notes.uncounted.entry(out.key.clone()).or_default() += 1;
                }
            }
            register.notes.due.retain(|_, due| !due.left().is_zero());
            let patience = Deadline::after(Duration::from_secs(20));
            register.write(&holder.core, &self.side, patience).await?;
            self.return_all(holder, &tags).await?;
            register.release(&self.side).await?;
        }
        Ok(())
    }

    /// Gives everything back: every lease is lost from here on.
    pub(super) async fn give_all_back(&mut self, holder: &Arc<Holder>) -> Result<(), Fault> {
        lock(&holder.state).generation += 1;
        self.give_buffer_back(holder).await?;
        let tags: BTreeSet<u64> = self.out.keys().copied().collect();
        self.return_all(holder, &tags).await?;
        lock(&holder.state).handed = 0;
        Ok(())
    }

    /// The lock goes last.
    pub(super) async fn leave(&mut self) -> Result<(), Fault> {
        let options = QueueDeleteOptions::default();
        self.channel
            .queue_delete(self.lane.as_str().into(), options)
            .await?;
        self.side.close(200, "done".into()).await?;
        self.channel.close(200, "done".into()).await?;
        Ok(())
    }

    /// Another consumer comes, and deliveries of this one are out: they are asked for elsewhere.
    pub(super) async fn move_over(&mut self, holder: &Arc<Holder>) -> Result<(), Fault> {
        for lane in lanes(&holder.queue).into_iter().skip(1) {
            if lane == self.lane {
                return Ok(());
            }
            let options = QueueDeclareOptions {
                exclusive: true,
                ..QueueDeclareOptions::default()
            };
            // On a channel that may break: somebody else may have left there.
            let probe = self.wire.channel().await?;
            let made = probe
                .queue_declare(lane.as_str().into(), options, FieldTable::default())
                .await;
            if made.is_err() {
                continue;
            }
            probe.close(200, "done".into()).await?;
            credential::open(&holder.core, &self.channel, &lane).await?;
            self.control = listen(&self.channel, &lane).await?;
            let old = std::mem::replace(&mut self.lane, lane);
            let options = QueueDeleteOptions::default();
            self.channel.queue_delete(old.into(), options).await?;
            return Ok(());
        }
        tracing::warn!(queue = %holder.queue, "too many consumers left with deliveries in hand");
        Ok(())
    }

    /// The queue is about to be deleted: everything goes back, no lease settles any more (law Q6), and
    /// whether it was deleted is told by who does it.
    pub(super) async fn let_go(&mut self, holder: &Arc<Holder>, back: Back) -> Result<Exit, Fault> {
        self.give_all_back(holder).await?;
        let tell = format!("{}.{}", self.lane, holder.core.copy_name());
        let channel = try_exclusive(&self.wire, &tell)
            .await?
            .ok_or_else(|| Fault::Lost("a name of our own is taken".into()))?;
        let mut verdicts = listen(&channel, &tell).await?;
        // Told before the lane goes: whoever asks takes its end for an answer.
        let word = LetGo { tell: tell.clone() };
        let word = back.answer(
            &holder.core,
            serde_json::to_vec(&word).unwrap_or_default().into(),
        );
        let patience = Deadline::after(holder.core.heartbeat);
        holder.core.outbox.publish(word, patience).await;
        let options = QueueDeleteOptions::default();
        self.channel
            .queue_delete(self.lane.as_str().into(), options)
            .await?;
        let mut exit = Exit::Lost;
        let until = Instant::now() + VERDICT;
        let verdict = loop {
            tokio::select! {
                verdict = verdicts.next() => break verdict,
                () = tokio::time::sleep(LOOK) => {
                    if topology::counts(&self.wire, &holder.queue).await?.is_none() {
                        exit = Exit::Over(End::QueueDeleted);
                        break None;
                    }
                    if Instant::now() > until {
                        break None;
                    }
                }
                () = self.wire.until_dead() => return Ok(Exit::Lost),
            }
        };
        if let Some(Ok(word)) = verdict {
            let kind = word.properties.kind().as_ref().map(|kind| kind.to_string());
            if kind.as_deref() == Some(GONE) {
                exit = Exit::Over(End::QueueDeleted);
                lock(&holder.state).phase = Phase::Ended(End::QueueDeleted);
                holder.ready.notify_one();
            }
            if let Some(back) = Back::of(&tell, &word.properties) {
                say(&holder.core, back, &Has::default());
            }
        }
        let options = QueueDeleteOptions::default();
        channel.queue_delete(tell.into(), options).await?;
        channel.close(200, "done".into()).await?;
        self.side.close(200, "done".into()).await?;
        self.channel.close(200, "done".into()).await?;
        Ok(exit)
    }
}
