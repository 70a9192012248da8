//! Sends a guest's reports, in order, each until the broker has confirmed it.

use std::{sync::Arc, time::Duration};

use crate::{
    backoff::Backoff,
    broker::Broker,
    deadline::Deadline,
    error::{ErrorKind, Result},
    names::GuestAddress,
    wire::{BootId, Report, ReportEvent},
    workflow::guest::book::Book,
};

const PUBLISH_WITHIN: Duration = Duration::from_secs(10);

/// The guest's way to the control plane.
#[derive(Debug)]
pub(super) struct Reporter {
    pub(super) broker: Arc<dyn Broker>,
    pub(super) address: GuestAddress,
    pub(super) boot: BootId,
    pub(super) book: Book,
}

impl Reporter {
    /// Reports until the guest ends.
    pub(super) async fn run(self) {
        let mut changes = self.book.changes();
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
        loop {
            changes.mark_unchanged();
            match self.send_next().await {
                Ok(Sent::Confirmed) => backoff.reset(),
                Ok(Sent::Nothing) => {
                    if changes.changed().await.is_err() {
                        return;
                    }
                }
                Err(error) if *error.kind() == ErrorKind::Closed => return,
                Err(error) => {
                    tracing::warn!(guest = %self.address, %error, "a report waits to be sent again");
                    backoff.pause().await;
                }
            }
        }
    }

    async fn send_next(&self) -> Result<Sent> {
        let Some((queue, event)) = self.book.next_report().await? else {
            return Ok(Sent::Nothing);
        };
        let lasting = !matches!(event, ReportEvent::Hello);
        let report = Report::new(&self.address, self.boot.clone(), event);
        let deadline = Deadline::after(PUBLISH_WITHIN);
        match self
            .broker
            .publish(&queue, report.to_message()?, deadline)
            .await
        {
            // There is no control plane to say hello to yet: it will ping.
            Err(error) if *error.kind() == ErrorKind::NoQueue && !lasting => {}
            published => _ = published?,
        }
        self.book.reported().await?;
        Ok(Sent::Confirmed)
    }
}

enum Sent {
    Confirmed,
    Nothing,
}
