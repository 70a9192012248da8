//! The workflow: the taskmanager provisions, the guest runs, and both write down what they do before
//! they do it.

mod ask;
mod guest;
mod journal;
mod machine;
mod meter;
#[cfg(test)]
mod model;
mod record;
mod records;
#[cfg(feature = "sqlite")]
mod sqlite;
mod taskmanager;
#[cfg(all(test, feature = "embedded"))]
mod tests;

/// Waits until a flag is set, or those who could set it are gone.
async fn is_set(flag: &mut tokio::sync::watch::Receiver<bool>) {
    let _ = flag.wait_for(|set| *set).await;
}

/// What a taskmanager makes of a record that a store gave back.
#[cfg(fuzzing)]
pub(crate) fn fuzz_drive(record: &Record) {
    let mut record = record.clone();
    let _ = (machine::todo(&record), machine::next_tick_ms(&record));
    for _ in 0..4 {
        machine::apply(&mut record, machine::Event::Tick, u64::MAX / 2);
    }
}

/// The name of a control plane that is given none.
pub(crate) const DEFAULT_NAME: &str = "main";

#[cfg(feature = "sqlite")]
pub use self::sqlite::{SqliteJournal, SqliteRecords};
pub use self::{
    guest::{Attach, Context, Failure, Guest, Interrupted, Served},
    journal::{Entry, EntryState, Journal, MemoryJournal},
    record::{
        Deadlines, ProvisionOutcome, Reason, ReasonKind, Record, SendPolicy, Sent, Stage, State,
        Trouble,
    },
    records::{MemoryRecords, Records},
    taskmanager::{
        Cancelled, GuestHandle, Health, HostProbe, HostState, Opening, Provision, Taskmanager,
    },
};
