//! Everybody who works with a broker: a control plane that publishes and asks, a guest that consumes
//! and answers.

use std::{sync::Arc, time::Duration};

use tokio::task::JoinHandle;
use wilco::{
    Broker, Deadline, ErrorKind, GuestAddress, Message, MessageId, Outcome, QueueName,
    broker::{Consumer, Delivery},
};

use super::{TRY, until_ok};
use crate::{
    check::{CheckError, Cx},
    ledger::{Answer, Event, History, How},
    support::*,
};

pub(super) struct Crew {
    pub(super) office: Office,
    guest: Arc<dyn Broker>,
    consumer: Box<dyn Consumer>,
    responder: JoinHandle<wilco::Error>,
    sent: u64,
}

/// The control plane's side.
pub(super) struct Office {
    pub(super) broker: Arc<dyn Broker>,
    pub(super) name: QueueName,
    pub(super) lane: GuestAddress,
    pub(super) history: Arc<History>,
}

impl Office {
    /// One publish, noted, and what came of it.
    pub(super) async fn publish(&self, id: &str, deadline: Deadline) -> wilco::Result<()> {
        note_publish(&*self.broker, &self.name, id, deadline, &self.history).await
    }

    /// Acks, and notes whether that was Ok.
    pub(super) async fn ack(&self, delivery: Delivery, deadline: Deadline) -> wilco::Result<()> {
        note_ack(&self.name, delivery, deadline, &self.history).await
    }
}

impl Crew {
    /// Puts everybody in his place, on two handles.
    pub(super) async fn hire(
        cx: &Cx,
        host: Arc<dyn Broker>,
        guest: Arc<dyn Broker>,
        id: &str,
    ) -> Result<Self, CheckError> {
        let name = limited(&*host, id, 10_000).await?;
        let lane = self::guest(id)?;
        let consumer = attach(&*guest, &name, 4).await?;
        let mut answering = attach_lane(&*guest, &lane).await?;
        let responder = tokio::spawn(async move {
            loop {
                match answering.next().await {
                    // An asker that gave up, or a way that broke, is no fault of the guest.
                    Ok(request) => {
                        let body = request.body.clone();
                        drop(request.reply(body, Deadline::after(TRY)).await);
                    }
                    Err(error) => return error,
                }
            }
        });
        let office = Office {
            broker: host,
            name,
            lane,
            history: super::history(cx),
        };
        Ok(Self {
            office,
            guest,
            consumer,
            responder,
            sent: 0,
        })
    }

    /// The next delivery, noted.
    pub(super) async fn receive(&mut self, within: Duration) -> Result<Delivery, CheckError> {
        let delivery = receive_within(&mut *self.consumer, within).await?;
        let office = &self.office;
        office
            .history
            .note(Event::delivery(&office.name, &delivery));
        Ok(delivery)
    }

    /// A message from end to end and a ping with its answer, within this time, whatever has to be
    /// tried again for it.
    pub(super) async fn work(&mut self, within: Duration) -> Result<(), CheckError> {
        let end = Deadline::after(within);
        self.sent += 1;
        let id = format!("work-{}", self.sent);
        let nothing_else = |_: &wilco::Error| false;
        let publishing = until_ok("a publish", within, nothing_else, |by| {
            self.office.publish(&id, by)
        });
        publishing.await?;
        loop {
            let delivery = self.receive(end.remaining()).await?;
            let came = delivery.message.id.to_string();
            // A lease that went with its connection is lost; then it comes again.
            let acked = self.office.ack(delivery, end.or_after(TRY)).await;
            if came == id && acked.is_ok() {
                break;
            }
            if let Err(error) = acked {
                let lost = *error.kind() == ErrorKind::LeaseLost || super::is_outage(&error);
                expect(lost, "an ack is Ok or its lease is lost", error)?;
            }
        }
        if self.responder.is_finished() {
            let end = (&mut self.responder).await;
            return Err(CheckError::failed(
                "the responder lives",
                format!("{end:?}"),
            ));
        }
        let not_yet = |error: &wilco::Error| {
            matches!(
                error.kind(),
                ErrorKind::NoConsumer | ErrorKind::ConsumerSilent
            )
        };
        let asking = until_ok("a ping", end.remaining(), not_yet, |by| {
            self.office
                .broker
                .request(&self.office.lane, "x".into(), by)
        });
        same("the answer", asking.await?.as_ref(), b"x")
    }

    /// Sends everybody home, so that the queue can be drained.
    pub(super) async fn dismiss(self) -> Result<(), CheckError> {
        self.responder.abort();
        self.consumer.close(long()).await?;
        self.guest.close(long()).await?;
        self.office.broker.close(long()).await?;
        Ok(())
    }
}

/// One publish, noted in the history, and what came of it.
pub(super) async fn note_publish(
    broker: &dyn Broker,
    name: &QueueName,
    id: &str,
    deadline: Deadline,
    history: &History,
) -> wilco::Result<()> {
    let message = Message::new("check", id.to_owned())?.with_id(MessageId::new(id)?);
    let (queue, id) = (name.to_string(), id.to_owned());
    history.note(Event::Attempt {
        queue: queue.clone(),
        id: id.clone(),
    });
    let result = broker.publish(name, message, deadline).await;
    let answer = match &result {
        Ok(_) => Answer::Stored,
        Err(error) => match error.outcome() {
            Some(Outcome::NotStored) => Answer::NotStored,
            Some(Outcome::Unknown) => Answer::Unknown,
            None => {
                let text = format!("a failed publish that says nothing of its message: {error}");
                return Err(wilco::Error::new(ErrorKind::Internal, text));
            }
        },
    };
    history.note(Event::Answer { queue, id, answer });
    result.map(drop)
}

/// An ack, noted in the history.
pub(super) async fn note_ack(
    name: &QueueName,
    delivery: Delivery,
    deadline: Deadline,
    history: &History,
) -> wilco::Result<()> {
    let id = delivery.message.id.to_string();
    let acked = delivery.ack(deadline).await;
    history.note(Event::Settled {
        queue: name.to_string(),
        id,
        how: How::Ack,
        ok: acked.is_ok(),
    });
    acked
}
