//! Where a queue is on the server: one stream, and the subjects in it and beside it.

use crate::names::QueueName;

/// The stream in which responders claim their lanes; it lives in the servers' memory.
pub(super) const LANES: &str = "wilco~lanes";

/// The stream of what guests with credentials report, and the one of their public keys.
pub(super) const TRAYS: &str = "wilco~trays";
pub(super) const KEYS: &str = "wilco~keys";

/// A queue's names on the server. `wilco.q.vm-0042.1` is the stream `wilco~q~vm-0042~1`: a stream's name
/// has no dots, and no queue's name has a tilde.
#[derive(Clone, Debug)]
pub(super) struct Names {
    base: String,
    pub(super) stream: String,
}

impl Names {
    pub(super) fn of(queue: &QueueName) -> Self {
        Self {
            base: queue.as_str().to_owned(),
            stream: queue.as_str().replace('.', "~"),
        }
    }

    /// The queue whose stream this is.
    pub(super) fn queue(stream: &str) -> Option<QueueName> {
        stream.replace('~', ".").parse().ok()
    }

    /// Where messages are published.
    pub(super) fn input(&self) -> String {
        format!("{}.in", self.base)
    }

    /// The two places of the notes, written in turn.
    pub(super) fn slot(&self, which: usize) -> String {
        format!("{}.{}", self.base, ["a", "b"][which % 2])
    }

    /// What the lock consumers filter; nothing is ever stored there.
    pub(super) fn lock(&self) -> String {
        format!("{}.lock", self.base)
    }

    /// Everything that stands beside the dead letters: the messages and the notes.
    pub(super) fn living(&self) -> String {
        format!("{}.*", self.base)
    }

    /// Where the message with this sequence number goes when it is dead.
    pub(super) fn dead(&self, sequence: u64) -> String {
        format!("{}.dead.{sequence}", self.base)
    }

    pub(super) fn all_dead(&self) -> String {
        format!("{}.dead.*", self.base)
    }

    /// What all that is stored nowhere begins with: it stands outside of the stream's one subject.
    fn live(&self) -> String {
        self.base.replacen("wilco.", "wilco.live.", 1)
    }

    /// Where the consumer with this token says that it lives. Stored nowhere.
    pub(super) fn hold(&self, token: &str) -> String {
        format!("{}.hold.{token}", self.live())
    }

    /// Where whichever consumer is attached is asked what it holds. Stored nowhere.
    pub(super) fn held(&self) -> String {
        format!("{}.held", self.live())
    }

    /// The lane of requests. Stored nowhere.
    pub(super) fn ping(&self) -> String {
        format!("{}.ping", self.live())
    }

    /// Where the responder with this token says that it lives. Stored nowhere.
    pub(super) fn attending(&self, token: &str) -> String {
        format!("{}.lane.{token}", self.live())
    }

    /// Where the lane is claimed, in the stream of lanes.
    pub(super) fn claim(&self) -> String {
        self.base.replacen("wilco.", "wilco.lane.", 1)
    }

    /// What the subjects begin with on which its guest is answered. Stored nowhere.
    pub(super) fn inbox(&self) -> String {
        format!("{}.inbox", self.live())
    }

    /// Where the public key of its guest is.
    pub(super) fn key(&self) -> String {
        self.base.replacen("wilco.", "wilco.key.", 1)
    }

    /// All trays of which this queue of reports gets what is in them.
    pub(super) fn trays(&self) -> String {
        format!("{}.>", self.base.replacen("wilco.", "wilco.tray.", 1))
    }

    /// The tray of one guest among them.
    pub(super) fn tray_of(&self, guest: &QueueName) -> String {
        let guest = guest.as_str().trim_start_matches("wilco.");
        self.trays().replace('>', guest)
    }

    /// Whose tray this is.
    pub(super) fn whose_tray(&self, subject: &str) -> Option<QueueName> {
        let guest = subject.strip_prefix(self.trays().trim_end_matches('>'))?;
        format!("wilco.{guest}").parse().ok()
    }

    /// What the stream keeps: one subject, since a server compares those of a new stream with those of all
    /// others, when it starts too. A fenced stream takes no messages, and everything else.
    pub(super) fn subjects(&self, fenced: bool) -> Vec<String> {
        match fenced {
            true => vec![self.slot(0), self.slot(1), self.lock(), self.all_dead()],
            false => vec![format!("{}.>", self.base)],
        }
    }
}

/// A new name that nobody else has.
pub(super) fn token() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q8_a_streams_name_is_its_queues_and_no_wildcard() {
        for name in ["wilco.q.a=2Eb=2A.1", "wilco.r.main", "wilco.q._-.12"] {
            let queue: QueueName = name.parse().unwrap();
            let names = Names::of(&queue);
            assert!(!names.stream.contains(['.', '*', '>', ' ', '/', '\\']));
            assert_eq!(Names::queue(&names.stream), Some(queue));
        }
        for own in [LANES, TRAYS, KEYS] {
            assert_eq!(Names::queue(own), None);
        }
        let reports = Names::of(&"wilco.r.main".parse().unwrap());
        let guest: QueueName = "wilco.q.a=2E.1".parse().unwrap();
        assert_eq!(reports.whose_tray(&reports.tray_of(&guest)), Some(guest));
        assert_eq!(reports.whose_tray("wilco.tray.r.other.q.a.1"), None);
        assert_eq!(Names::queue("orders"), None);
    }
}
