//! The laws of the contract in a few words each, for the reader of a report.

/// Its sections: the letter, and what it is about.
pub const SECTIONS: &[(&str, &str)] = &[
    ("Q", "Queue management"),
    ("P", "Publish"),
    ("C", "Consume and settle"),
    ("R", "Request, reply, ping"),
    ("F", "Faults"),
    ("D", "Durability, told honestly"),
    ("L", "The ledger"),
    ("S", "Security"),
    ("X", "The suite itself"),
];

const LAWS: &[(&str, &str)] = &[
    ("Q1", "Declare is idempotent"),
    ("Q2", "Looking never touches a message"),
    ("Q3", "Other arguments are a mismatch"),
    ("Q4", "No publish into nowhere"),
    ("Q5", "Only declare makes a queue"),
    ("Q6", "Delete refuses what is not empty"),
    ("Q7", "Delete leaves nothing behind"),
    ("Q8", "Two names never meet"),
    ("Q9", "Status is right at once"),
    ("Q10", "Idle queues live on"),
    ("Q11", "A consumer hears of the delete"),
    ("Q12", "No limit drops the oldest"),
    ("P1", "Ok means stored"),
    ("P2", "A refusal is an error, in time"),
    ("P3", "After Unknown, the same id is one message"),
    ("P4", "NotStored is final"),
    ("P5", "A dropped publish harms nothing"),
    ("P6", "Every byte comes back"),
    ("P7", "No answer lands on the wrong message"),
    ("P8", "First in, first out"),
    ("P9", "Nothing waits past its deadline"),
    ("C1", "At least once"),
    ("C2", "Acked never comes back"),
    ("C3", "A lost ack is no ack"),
    ("C4", "A stale handle settles nothing"),
    ("C5", "A long handler keeps its lease"),
    ("C6", "Retry keeps its delay and its count"),
    ("C7", "Dead letters: once, whole, with the reason"),
    ("C8", "Poison does not stop prepare"),
    ("C9", "Prefetch is a bound"),
    ("C10", "Dropping gives back, never acks"),
    ("C11", "Order is kept, or the count says so"),
    ("C12", "One consumer at a time"),
    ("C13", "What waited for the first consumer comes"),
    ("C14", "A clean close loses no ack"),
    ("R1", "A question and its answer arrive whole"),
    ("R2", "Nobody there is said at once"),
    ("R3", "A silent guest is told from an absent one"),
    ("R4", "A busy guest answers"),
    ("R5", "Each caller its own answer, nothing left over"),
    ("R6", "A vanished asker harms nobody"),
    ("R7", "One deadline over all of it"),
    ("R8", "Errors pass typed and whole"),
    ("R9", "Pings never touch the queue"),
    ("F1", "Broker killed after the confirm: nothing lost"),
    ("F2", "Broker killed in a burst: clean ledger"),
    ("F3", "Broker paused: errors in time, then recovery"),
    ("F4", "Connection cut at every frame"),
    ("F5", "Broker away for a minute"),
    ("F6", "A node of three killed, the leader too"),
    ("F7", "Our processes killed at every side effect"),
    ("F8", "Shutdown burns no delivery"),
    ("F9", "Disk full, memory alarm"),
    ("D1", "The reported level is the real one"),
    ("D2", "Less than required is refused"),
    ("D3", "The sync claim survives a power cut"),
    ("D4", "Three axes, taken again after a reconnect"),
    ("L", "Lost 0, phantom 0, duplicate after ack 0"),
    ("S1", "A guest can do its own part alone"),
    ("S2", "Hostile bytes harm nothing"),
    ("S3", "TLS checks the name"),
    ("S4", "Secrets never appear"),
    ("S5", "A forged command is refused"),
    ("X2", "A broker that was asked for is there"),
];

/// A law in a few words; nothing for one that is not known here.
#[must_use]
pub fn title(law: &str) -> &'static str {
    let known = LAWS.iter().find(|(id, _)| *id == law);
    known.map_or("", |(_, title)| title)
}

/// The letter that a law's id begins with.
#[must_use]
pub fn section(law: &str) -> &str {
    law.trim_end_matches(|c: char| c.is_ascii_digit())
}

/// Every law's id, in the contract's order.
pub fn all() -> impl Iterator<Item = &'static str> {
    LAWS.iter().map(|(id, _)| *id)
}

/// Where a law stands in the contract; those that are not known here come last.
pub(super) fn place(law: &str) -> usize {
    all().position(|id| id == law).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry;

    #[test]
    fn every_law_that_is_checked_has_words_and_a_section() {
        for check in registry::all() {
            assert_ne!(title(check.law), "", "{}", check.law);
            let section = section(check.law);
            assert!(SECTIONS.iter().any(|(id, _)| *id == section), "{section}");
        }
    }
}
