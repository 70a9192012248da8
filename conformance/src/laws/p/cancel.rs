//! P3, P5: publishes that are cut off, and what is sent again.

use std::time::Duration;

use wilco::Deadline;

use crate::{
    check::{CheckError, CheckResult, Cx, Evidence},
    support::*,
};

/// A publish cut off anywhere and sent again under its id is delivered, once where the broker says
/// that it had it, with the same bytes.
pub async fn p3_a_resend_with_the_same_id_is_one_message(cx: &Cx) -> CheckResult {
    const TIMES: usize = 120;
    let broker = cx.connect().await?;
    let name = queue(&*broker, "p3").await?;
    let (mut cut, mut recognised) = (0, 0);
    let mut expected = Vec::new();
    for n in 0..TIMES {
        let id = format!("m{n:03}");
        let first = cut_after(n % 8, broker.publish(&name, named(id.clone())?, long())).await;
        match first {
            None => cut += 1,
            Some(answer) => drop(answer?),
        }
        let again = broker.publish(&name, named(id.clone())?, long()).await?;
        recognised += usize::from(again.duplicate);
        expected.push((id, again.duplicate));
    }
    let there = drain(&*broker, &name).await?;
    for (id, recognised) in &expected {
        let copies = there.iter().filter(|other| *other == id).count();
        expect(copies >= 1, "a message that was sent again is there", id)?;
        if *recognised {
            same(
                &format!("copies of {id}, which the broker said it had"),
                copies,
                1,
            )?;
        }
        expect(
            copies <= 2,
            "at most one copy per attempt",
            format!("{copies} of {id}"),
        )?;
    }
    let unknown = there
        .iter()
        .filter(|id| !expected.iter().any(|(known, _)| known == *id));
    same("messages that nobody sent", unknown.count(), 0)?;
    expect(cut > 0, "some publishes were cut off", "none")?;
    Ok(Evidence::of("re-sends", TIMES)
        .and("cut off before", cut)
        .and("recognised", recognised))
}

/// A broker may know a message's id for longer than it has the message. What was taken or purged, and is
/// sent again because its receiver has lost it (case W24), has to be delivered all the same.
pub async fn p3_an_id_is_free_when_its_message_is_gone(cx: &Cx) -> CheckResult {
    const TIMES: usize = 10;
    let broker = cx.connect().await?;
    let name = queue(&*broker, "p3-gone").await?;
    let mut consumer = attach(&*broker, &name, 1).await?;
    for time in 1..=TIMES {
        let sent = broker.publish(&name, named("again")?, long()).await?;
        same("duplicate of one that is gone", sent.duplicate, false)?;
        let delivery = receive(&mut *consumer).await?;
        same("id", delivery.message.id.as_str(), "again")?;
        same("attempt", delivery.attempt, 1)?;
        delivery.ack(long()).await?;
        let left = broker.status(&name, long()).await?.messages();
        same(&format!("left after the ack of number {time}"), left, 0)?;
    }
    Ok(Evidence::of("sent again after its ack", TIMES))
}

/// Cut after every number of polls in turn, then after every so many microseconds: the next publish
/// is fine, and in the end everything adds up.
pub async fn p5_a_cancelled_publish_never_harms_the_next(cx: &Cx) -> CheckResult {
    const POLLS: usize = 12;
    const ROUNDS: usize = 15;
    const TIMED: usize = 150;
    let broker = cx.connect().await?;
    let name = queue(&*broker, "p5").await?;
    let mut rng = cx.rng();
    let mut book = Book::default();
    for round in 0..ROUNDS {
        for polls in 0..POLLS {
            let id = format!("poll-{round}-{polls}");
            let publish = broker.publish(&name, named(id.clone())?, long());
            book.note(&id, cut_after(polls, publish).await)?;
            if polls == 0 {
                book.untouched.push(id);
            }
            book.next(&*broker, &name, format!("after-{round}-{polls}"))
                .await?;
        }
    }
    for n in 0..TIMED {
        let id = format!("time-{n}");
        let publish = broker.publish(&name, named(id.clone())?, long());
        let limit = Duration::from_micros(rng.u64(0..1_500));
        book.note(&id, tokio::time::timeout(limit, publish).await.ok())?;
        book.next(&*broker, &name, format!("after-time-{n}"))
            .await?;
    }
    let there = drain(&*broker, &name).await?;
    for id in &book.stored {
        let copies = there.iter().filter(|other| *other == id).count();
        same(&format!("copies of {id}, which was Ok"), copies, 1)?;
    }
    for id in &book.cut {
        let copies = there.iter().filter(|other| *other == id).count();
        expect(
            copies <= 1,
            "a cancelled publish stores one copy at most",
            id,
        )?;
    }
    for id in &book.untouched {
        expect(
            !there.contains(id),
            "a publish never polled stores nothing",
            id,
        )?;
    }
    let order: Vec<_> = there.iter().filter(|id| id.starts_with("after-")).collect();
    let wanted: Vec<_> = book
        .stored
        .iter()
        .filter(|id| id.starts_with("after-"))
        .collect();
    same("order of those that followed", order, wanted)?;
    same("unknown messages", there.len() - book.known(&there), 0)?;
    Ok(Evidence::of("cancelled", book.cut.len()).and("publishes after one", book.stored.len()))
}

#[derive(Default)]
struct Book {
    stored: Vec<String>,
    cut: Vec<String>,
    untouched: Vec<String>,
}

impl Book {
    fn note<T>(&mut self, id: &str, answer: Option<wilco::Result<T>>) -> Result<(), CheckError> {
        match answer {
            None => self.cut.push(id.into()),
            Some(answer) => {
                answer?;
                self.stored.push(id.into());
            }
        }
        Ok(())
    }

    async fn next(
        &mut self,
        broker: &dyn wilco::Broker,
        name: &wilco::QueueName,
        id: String,
    ) -> Result<(), CheckError> {
        let publish = broker.publish(name, named(id.clone())?, long());
        match timed("the publish after a cancelled one", publish).await?.0 {
            Ok(_) => self.stored.push(id),
            Err(error) => {
                let expected = "the publish after a cancelled one is Ok";
                return Err(CheckError::failed(expected, error));
            }
        }
        Ok(())
    }

    fn known(&self, there: &[String]) -> usize {
        there
            .iter()
            .filter(|id| self.stored.contains(id) || self.cut.contains(id))
            .count()
    }
}

/// Every other operation cut off at every poll: the handle and the message are unharmed.
pub async fn p5_a_cancelled_call_never_harms_the_handle(cx: &Cx) -> CheckResult {
    const POLLS: usize = 10;
    let broker = cx.connect().await?;
    let name = queue(&*broker, "p5-calls").await?;
    put(&*broker, &name, "waits").await?;
    let lane = guest("p5-calls")?;
    let spec = wilco::broker::QueueSpec::new(name.clone());
    let (mut cut, mut handed_out) = (0, 0);
    for polls in 0..POLLS {
        cut += usize::from(
            cut_after(polls, broker.declare(&spec, long()))
                .await
                .is_none(),
        );
        cut += usize::from(
            cut_after(polls, broker.status(&name, long()))
                .await
                .is_none(),
        );
        cut += usize::from(cut_after(polls, broker.list(long())).await.is_none());
        let consumer = cut_after(polls, broker.consume(&name, prefetch(1), long())).await;
        cut += usize::from(consumer.is_none());
        if let Some(Ok(mut consumer)) = consumer {
            match cut_after(polls, consumer.next()).await {
                None => cut += 1,
                // Handed out after all, and dropped: that is a delivery, and counts as one.
                Some(delivery) => handed_out += u32::from(delivery.is_ok()),
            }
        }
        cut += usize::from(
            cut_after(polls, broker.respond(&lane, long()))
                .await
                .is_none(),
        );
        let request = broker.request(&lane, "x".into(), Deadline::after(LONG));
        cut += usize::from(cut_after(polls, request).await.is_none());
        // Whoever was cut off while attaching is not attached.
        attach(&*broker, &name, 1).await?.close(long()).await?;
        drop(attach_lane(&*broker, &lane).await?);
        until_status(&*broker, &name, "one ready, nobody attached", |status| {
            (status.ready, status.in_flight, status.consumers) == (1, 0, 0)
        })
        .await?;
    }
    let mut consumer = attach(&*broker, &name, 1).await?;
    let delivery = receive(&mut *consumer).await?;
    same("the message", delivery.message.id.as_str(), "waits")?;
    same("deliveries counted", delivery.attempt, handed_out + 1)?;
    delivery.ack(long()).await?;
    Ok(Evidence::of("cancelled", cut))
}
