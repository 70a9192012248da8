//! What a taskmanager is told before it begins: what was under way is resumed at once.

use std::{future::IntoFuture, pin::Pin, sync::Arc};

use crate::{
    broker::Broker,
    error::Result,
    names::QueueName,
    sign::Signer,
    workflow::{Records, Taskmanager},
};

/// A taskmanager about to begin: await it.
#[derive(Debug)]
#[must_use = "nothing happens before it is awaited"]
pub struct Opening {
    pub(super) broker: Arc<dyn Broker>,
    pub(super) records: Arc<dyn Records>,
    pub(super) reports: Result<QueueName>,
    pub(super) signer: Option<Arc<Signer>>,
    pub(super) owner: bool,
}

impl Opening {
    pub(super) fn new(broker: Arc<dyn Broker>, records: Arc<dyn Records>) -> Self {
        Self {
            broker,
            records,
            reports: QueueName::reports(crate::workflow::DEFAULT_NAME),
            signer: None,
            owner: true,
        }
    }

    /// As [`Taskmanager::named`].
    pub fn named(mut self, name: &str) -> Self {
        self.reports = QueueName::reports(name);
        self
    }

    /// As [`Taskmanager::observe`].
    pub fn observing(mut self) -> Self {
        self.owner = false;
        self
    }

    /// Signs every command and question with this key, for guests that trust it (law S5). Guests that
    /// trust nobody in particular run them as before.
    #[cfg(feature = "sign")]
    pub fn sign(mut self, key: crate::SigningKey) -> Self {
        self.signer = Some(Arc::new(Signer::new(key)));
        self
    }
}

/// As [`Taskmanager::new`] and [`Taskmanager::observe`].
impl IntoFuture for Opening {
    type Output = Result<Taskmanager>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            match self.owner {
                true => Taskmanager::own(self).await,
                false => Taskmanager::make(self),
            }
        })
    }
}
