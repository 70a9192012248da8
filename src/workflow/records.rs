//! Where the taskmanager keeps its records: a trait, so that a service can use its own database.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;

use crate::{
    error::{Error, ErrorKind, Result},
    names::{GuestAddress, GuestId},
    workflow::record::Record,
};

/// A durable store of [`Record`]s, with one owner at a time.
#[async_trait]
pub trait Records: Send + Sync + fmt::Debug + 'static {
    /// Becomes the one owner, for as long as this value lives.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] while another taskmanager owns them (case W16).
    async fn own(&self) -> Result<()>;

    /// Stores a record. Ok means that it survives whatever the store survives: every promise of the
    /// workflow rests on this.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`], nothing stored, unless the stored record's revision is the one before
    /// this record's (0 for a record that is new).
    async fn save(&self, record: &Record) -> Result<()>;

    /// A guest's record of its newest incarnation.
    async fn newest(&self, guest: &GuestId) -> Result<Option<Record>>;

    /// Every guest's record of its newest incarnation, by guest.
    async fn list(&self) -> Result<Vec<Record>>;
}

/// Records in memory, for tests: they end with the value. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct MemoryRecords(Arc<Mutex<BTreeMap<GuestAddress, Record>>>);

impl MemoryRecords {
    fn with<T>(&self, work: impl FnOnce(&mut BTreeMap<GuestAddress, Record>) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[async_trait]
impl Records for MemoryRecords {
    async fn own(&self) -> Result<()> {
        Ok(())
    }

    async fn save(&self, record: &Record) -> Result<()> {
        self.with(|records| {
            let stored = records
                .get(&record.address)
                .map_or(0, |stored| stored.revision);
            check_revision(record, stored)?;
            records.insert(record.address.clone(), record.clone());
            Ok(())
        })
    }

    async fn newest(&self, guest: &GuestId) -> Result<Option<Record>> {
        Ok(self.with(|records| {
            let of_guest = records
                .values()
                .rev()
                .find(|record| record.address.guest == *guest);
            of_guest.cloned()
        }))
    }

    async fn list(&self) -> Result<Vec<Record>> {
        Ok(self.with(|records| {
            let mut newest = BTreeMap::new();
            for (address, record) in records.iter() {
                newest.insert(address.guest.clone(), record.clone());
            }
            newest.into_values().collect()
        }))
    }
}

/// Refuses a save that another has overtaken.
pub(crate) fn check_revision(record: &Record, stored: u64) -> Result<()> {
    if record.revision == stored + 1 {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Conflict,
        format!(
            "the record of {} was changed by another taskmanager: revision {} is stored, this one is {}",
            record.address, stored, record.revision
        ),
    ))
}
