//! A handle with a guest's credential: whose it is, and what is otherwise for it.
//!
//! It calls functions rather than scripts, asks the server nothing about the server, and leaves its reports
//! in a tray of its own, from where whoever collects the reports takes them (`trays`): with a right to
//! append to a stream comes one to trim it, and that stream is everybody's.

use super::scripts::{self, TRAY};
use crate::{
    broker_url::BrokerUrl,
    error::{Error, ErrorKind, Result},
    names::QueueName,
};

#[derive(Clone, Debug)]
pub(super) struct Guest {
    queue: QueueName,
    reports: QueueName,
}

impl Guest {
    /// Reads a URL; `None`: it is of no credential.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidUrl`].
    pub(super) fn of(url: &BrokerUrl) -> Result<Option<Self>> {
        let name = |text: &str| text.parse::<QueueName>().ok();
        let queue = url.option(
            "guest",
            "a guest's queue, as a credential names it",
            |text| name(text).filter(QueueName::is_commands),
        )?;
        let reports = url.option(
            "reports",
            "a queue of reports, as a credential names it",
            |text| name(text).filter(|queue| !queue.is_commands()),
        )?;
        match (queue, reports) {
            (None, None) => Ok(None),
            (Some(queue), Some(reports)) => Ok(Some(Self { queue, reports })),
            _ => Err(Error::new(
                ErrorKind::InvalidUrl,
                format!(
                    "{url}: options guest and reports go together: use the URL of a credential whole"
                ),
            )),
        }
    }

    /// Where its reports are left.
    pub(super) fn tray(&self) -> String {
        scripts::key(&self.queue, TRAY)
    }

    /// A channel of its own to which nobody listens.
    pub(super) fn nobody(&self) -> String {
        scripts::key(&self.queue, "copies")
    }

    /// Fails for what would not come there.
    pub(super) fn may_publish(&self, queue: &QueueName) -> Result<()> {
        if *queue == self.reports {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::AuthRefused,
            format!(
                "this credential of a guest may publish to {} alone: its reports",
                self.reports
            ),
        ))
    }
}
