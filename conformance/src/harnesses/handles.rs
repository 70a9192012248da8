//! The handles that a harness gave out, so that a restart can close those that are left.

use std::{
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use wilco::{Broker, Deadline};

#[derive(Debug, Default)]
pub(super) struct Handles(Mutex<Vec<Weak<dyn Broker>>>);

impl Handles {
    pub(super) fn given(&self, broker: &Arc<dyn Broker>) {
        let mut handles = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        handles.push(Arc::downgrade(broker));
    }

    pub(super) async fn close(&self) -> wilco::Result<()> {
        let handles = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        for broker in handles.iter().filter_map(Weak::upgrade) {
            broker
                .close(Deadline::after(Duration::from_secs(20)))
                .await?;
        }
        Ok(())
    }
}
