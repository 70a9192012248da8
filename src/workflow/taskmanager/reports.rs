//! Collects the guests' reports, and hands each to whoever drives its guest.

use std::{
    collections::HashSet,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::sync::mpsc::error::TrySendError;

use crate::{
    backoff::Backoff,
    broker::{ConsumeOptions, Consumer, Delivery, QueueSpec},
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    names::GuestAddress,
    wire::{Report, ReportEvent},
    workflow::{
        is_set, meter,
        record::Record,
        taskmanager::{Inner, OPERATION, driver::Signal, may_serve},
    },
};

/// How long a report waits whose driver has its mailbox full. A driver is busy for [`OPERATION`] at the
/// longest, which costs the report a few deliveries of those that its limit allows.
const FULL: Duration = Duration::from_secs(2);

/// How long a predecessor that was killed can count as attached: longer than any backend takes to notice.
const PREDECESSOR: Duration = Duration::from_secs(10);

/// The consumer of the queue of reports.
pub(super) struct Collector {
    inner: Arc<Inner>,
    consumer: Option<Box<dyn Consumer>>,
}

impl Collector {
    /// Attaches, if the broker can be reached. A broker that leases its queues may take a predecessor
    /// for alive that was killed a moment ago: it gets its time to notice.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] while another taskmanager of this name is attached.
    pub(super) async fn attach(inner: Arc<Inner>) -> Result<Self> {
        let mut collector = Self {
            inner,
            consumer: None,
        };
        let patience = Deadline::after(PREDECESSOR);
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_millis(500));
        let mut opened = collector.open().await;
        while let Err(error) = &opened
            && *error.kind() == ErrorKind::Conflict
            && !patience.has_passed()
        {
            tracing::info!(%error, "another taskmanager of this name seems to run; waiting for its end");
            backoff.pause().await;
            opened = collector.open().await;
        }
        match opened {
            Err(error) if *error.kind() == ErrorKind::Conflict => Err(Error::new(
                ErrorKind::Conflict,
                "another taskmanager of this name is running on this broker: wait until it ends, or \
                 give this one another name",
            )
            .with_source(error)),
            Err(error) => {
                tracing::warn!(%error, "reports cannot be collected yet");
                Ok(collector)
            }
            Ok(()) => Ok(collector),
        }
    }

    /// Makes the queue of reports if it is not there (case W22), and consumes from it.
    async fn open(&mut self) -> Result<()> {
        let (broker, queue) = (&self.inner.broker, &self.inner.reports);
        let deadline = Deadline::after(OPERATION);
        broker
            .declare(&QueueSpec::new(queue.clone()), deadline)
            .await?;
        let prefetch = const { std::num::NonZeroU32::new(256).expect("not zero") };
        let options = ConsumeOptions::prefetch(prefetch);
        self.consumer = Some(broker.consume(queue, options, deadline).await?);
        self.inner.collecting.send_replace(true);
        Ok(())
    }

    /// Collects until the taskmanager is closed.
    pub(super) async fn run(mut self) {
        let mut closed = self.inner.closed.subscribe();
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
        loop {
            let received = tokio::select! {
                biased;
                () = is_set(&mut closed) => break,
                received = self.receive() => received,
            };
            match received {
                Ok(delivery) => {
                    backoff.reset();
                    self.inner.hand_over(delivery).await;
                }
                Err(error) if *error.kind() == ErrorKind::Closed => break,
                Err(error) => {
                    tracing::warn!(%error, "reports cannot be collected for now");
                    self.consumer = None;
                    self.inner.collecting.send_replace(false);
                    backoff.pause().await;
                }
            }
        }
        self.inner.collecting.send_replace(false);
        if let Some(consumer) = self.consumer.take() {
            // What is unsettled goes back either way.
            let _ = consumer.close(Deadline::after(OPERATION)).await;
        }
    }

    async fn receive(&mut self) -> Result<Delivery> {
        if self.consumer.is_none() {
            self.open().await?;
        }
        match &mut self.consumer {
            Some(consumer) => consumer.next().await,
            None => Err(Error::new(ErrorKind::Internal, "the consumer vanished")),
        }
    }
}

impl Inner {
    async fn hand_over(&self, delivery: Delivery) {
        let report = match Report::from_message(&delivery.message) {
            Ok(report) => report,
            Err(error) => {
                tracing::warn!(message = %delivery.message.id, %error, "a report that cannot be read");
                let settled = delivery
                    .dead_letter(error.to_string(), Deadline::after(OPERATION))
                    .await;
                log_unsettled(settled);
                return;
            }
        };
        meter::reported(&report.event);
        if let ReportEvent::Refused { message, reason } = &report.event {
            let guest = report.address();
            tracing::warn!(%guest, %message, %reason, "a guest has refused a message");
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(driven) = self.driven(&report.guest)
            && driven.progress.borrow().record.address == report.address()
        {
            // The driver acks it, once what it says is on disk.
            let signal = Signal::Report(Box::new((report, delivery)));
            return match driven.signals.try_send(signal) {
                Err(TrySendError::Full(Signal::Report(unsent))) => {
                    // It waits in the queue: in the way of nobody else's.
                    log_unsettled(unsent.1.retry(FULL, Deadline::after(OPERATION)).await);
                }
                Err(TrySendError::Closed(Signal::Report(unsent))) => {
                    let (report, delivery) = *unsent;
                    self.without_driver(report, delivery).await;
                }
                Ok(()) | Err(_) => {}
            };
        }
        self.without_driver(report, delivery).await;
    }

    /// A report of a guest whose provisioning is not under way: it ended, or never was.
    async fn without_driver(&self, report: Report, delivery: Delivery) {
        let address = report.address();
        match self.records.newest(&address.guest).await {
            // Its driver ended without it, as the taskmanager closes: the next one has to hear it.
            Ok(Some(record)) if record.address == address && !record.state.is_terminal() => {
                let settled = delivery
                    .retry(Duration::from_secs(1), Deadline::after(OPERATION))
                    .await;
                return log_unsettled(settled);
            }
            Ok(Some(record)) => self.late(&record, &address, &report.event),
            Ok(None) => tracing::debug!(guest = %address, "a report of a guest without a record"),
            Err(error) => {
                tracing::warn!(%error, "the records cannot be read; the report comes again");
                let settled = delivery
                    .retry(Duration::from_secs(1), Deadline::after(OPERATION))
                    .await;
                return log_unsettled(settled);
            }
        }
        log_unsettled(delivery.ack(Deadline::after(OPERATION)).await);
    }

    /// Cases W3, W25: whoever was given up is told so, and its report changes nothing.
    fn late(&self, record: &Record, address: &GuestAddress, event: &ReportEvent) {
        let is_current = record.address == *address;
        if address.incarnation < record.address.incarnation || (is_current && !may_serve(record)) {
            tracing::warn!(guest = %address, "a machine that was given up is up; it is told");
            self.dismiss(address);
        } else if is_current && !matches!(event, ReportEvent::Hello) {
            tracing::debug!(guest = %address, state = %record.state, "a report after the outcome");
        }
    }
}

fn log_unsettled(settled: Result<()>) {
    if let Err(error) = settled {
        tracing::debug!(%error, "a report was not settled; it comes again");
    }
}

/// Sweeps, once the broker can be reached.
pub(super) async fn sweep_until_swept(inner: Arc<Inner>) {
    let mut closed = inner.closed.subscribe();
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
    let swept = async {
        while let Err(error) = sweep(inner.clone()).await {
            tracing::warn!(%error, "queues of guests that were given up may be left; trying again");
            backoff.pause().await;
        }
    };
    tokio::select! {
        () = swept => {}
        () = is_set(&mut closed) => {}
    }
}

/// Deletes queues that are left of guests that were given up while the broker was out of reach.
async fn sweep(inner: Arc<Inner>) -> Result<()> {
    let given_up: HashSet<_> = inner
        .records
        .list()
        .await?
        .into_iter()
        .filter(|record| record.state.is_terminal() && !may_serve(record))
        .map(|record| record.address.queue())
        .collect();
    inner.sweep_credentials().await?;
    let deadline = Deadline::after(OPERATION);
    for status in inner.broker.list(deadline).await? {
        if given_up.contains(&status.name)
            && let Some(address) = status.name.address()
        {
            inner.fence(&address).await?;
        }
    }
    Ok(())
}

#[cfg(all(test, feature = "embedded"))]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

    use serde_json::value::RawValue;
    use tokio::sync::{mpsc, watch};

    use super::*;
    use crate::{
        GuestId, MessageId, QueueName,
        wire::{CommandResult, Receipt},
        workflow::{
            record::{Deadlines, SendPolicy, State},
            records::{MemoryRecords, Records as _},
            taskmanager::{Driven, Opening, Progress, Taskmanager, lock},
        },
    };

    #[tokio::test]
    async fn w10_a_report_that_nobody_wrote_down_is_not_acked() {
        let within = Deadline::after(Duration::from_secs(30));
        let broker = crate::connect("memory:").await.unwrap();
        let address = GuestAddress::from(GuestId::new("vm").unwrap());
        let mut record = Record::new(
            address.clone(),
            RawValue::NULL.to_owned().into(),
            SendPolicy::default(),
            Deadlines::default(),
            0,
        );
        (record.state, record.revision) = (State::Running, 1);
        let done = ReportEvent::Done {
            command: record.command.clone(),
            receipt: Receipt::new(1, CommandResult::Ok(RawValue::NULL.to_owned().into())),
        };
        let records = MemoryRecords::default();
        records.save(&record).await.unwrap();
        let queue = QueueName::reports("main").unwrap();
        let spec = QueueSpec::new(queue.clone());
        broker.declare(&spec, within).await.unwrap();
        // It drives nothing: as one that is closing.
        let taskmanager =
            Taskmanager::make(Opening::new(broker.clone(), Arc::new(records))).unwrap();
        let mut consumer = broker
            .consume(&queue, ConsumeOptions::default(), within)
            .await
            .unwrap();
        let report = Report::new(&address, MessageId::new("boot").unwrap(), done);
        let report = report.to_message().unwrap();
        broker.publish(&queue, report, within).await.unwrap();
        let delivery = consumer.next().await.unwrap();
        taskmanager.inner.hand_over(delivery).await;
        let status = broker.status(&queue, within).await.unwrap();
        assert_eq!(status.messages(), 1, "{status:?}");
    }

    #[tokio::test]
    async fn a_driver_that_is_behind_keeps_nobody_else_waiting() {
        let within = Deadline::after(Duration::from_secs(30));
        let broker = crate::connect("memory:").await.unwrap();
        let address = GuestAddress::from(GuestId::new("vm").unwrap());
        let record = Record::new(
            address.clone(),
            RawValue::NULL.to_owned().into(),
            SendPolicy::default(),
            Deadlines::default(),
            0,
        );
        let queue = QueueName::reports("main").unwrap();
        let spec = QueueSpec::new(queue.clone());
        broker.declare(&spec, within).await.unwrap();
        let records = Arc::new(MemoryRecords::default());
        let taskmanager = Taskmanager::make(Opening::new(broker.clone(), records)).unwrap();
        // Its driver takes nothing in, and its mailbox has room for one.
        let (signals, mut inbox) = mpsc::channel(1);
        let (_tell, progress) = watch::channel(Progress {
            record: Arc::new(record),
            stopped: None,
            stuck: false,
        });
        let driven = Driven { signals, progress };
        lock(&taskmanager.inner.drivers).insert(address.guest.clone(), driven);
        let mut consumer = broker
            .consume(&queue, ConsumeOptions::default(), within)
            .await
            .unwrap();
        let boot = MessageId::new("boot").unwrap();
        for _ in 0..2 {
            let hello = Report::new(&address, boot.clone(), ReportEvent::Hello);
            let hello = hello.to_message().unwrap();
            broker.publish(&queue, hello, within).await.unwrap();
            let delivery = consumer.next().await.unwrap();
            let handed = taskmanager.inner.hand_over(delivery);
            within.bound(handed).await.unwrap();
        }
        let status = broker.status(&queue, within).await.unwrap();
        assert_eq!((status.in_flight, status.delayed), (1, 1), "{status:?}");
        assert!(matches!(inbox.try_recv(), Ok(Signal::Report(_))));
    }
}
