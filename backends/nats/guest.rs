//! A handle with a guest's credential: whose it is, what it may touch, and where its reports go.
//!
//! On the server rights stand on subjects, and all that a consumer does to its own queue has the queue's
//! stream in its subject. What is everybody's it may not reach: it reads its lane's claim by the one
//! subject, and leaves reports under a subject of its own, from where whoever collects them takes them
//! (`trays`), so that nobody reports in another's name.

use super::names::{LANES, Names};
use crate::guest_url::AsGuest;

/// A guest, as the server sees it.
#[derive(Clone, Debug)]
pub(super) struct Guest(pub(super) AsGuest);

impl Guest {
    /// What the subjects begin with on which it is answered.
    pub(super) fn inbox(&self) -> String {
        Names::of(&self.0.queue).inbox()
    }

    /// Where its reports are left.
    pub(super) fn tray(&self) -> String {
        Names::of(&self.0.reports).tray_of(&self.0.queue)
    }

    /// The subjects that it may publish to. What it is asked it may answer besides, each question a few
    /// times.
    pub(super) fn publishes(&self) -> Vec<String> {
        let names = Names::of(&self.0.queue);
        let stream = &names.stream;
        let mut subjects = vec![
            format!("$JS.API.STREAM.INFO.{stream}"),
            format!("$JS.API.STREAM.MSG.GET.{stream}"),
            format!("$JS.API.STREAM.MSG.DELETE.{stream}"),
            format!("$JS.API.CONSUMER.CREATE.{stream}.*.{}", names.lock()),
            format!("$JS.API.CONSUMER.CREATE.{stream}.*.{}", names.input()),
            format!("$JS.API.CONSUMER.NAMES.{stream}"),
            format!("$JS.API.CONSUMER.INFO.{stream}.*"),
            format!("$JS.API.CONSUMER.DELETE.{stream}.*"),
            format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.*"),
            format!("$JS.ACK.{stream}.>"),
            // As newer servers write it.
            format!("$JS.ACK.*.*.{stream}.>"),
            format!("$JS.API.DIRECT.GET.{LANES}.{}", names.claim()),
        ];
        subjects.extend([
            names.slot(0),
            names.slot(1),
            names.all_dead(),
            names.hold("*"),
            names.held(),
            names.attending("*"),
            names.claim(),
            self.tray(),
        ]);
        subjects
    }

    /// The subjects that it may listen to.
    pub(super) fn listens(&self) -> Vec<String> {
        let names = Names::of(&self.0.queue);
        vec![
            format!("{}.>", names.inbox()),
            names.hold("*"),
            names.held(),
            names.attending("*"),
            names.ping(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s1_no_right_reaches_outside_of_its_queue() {
        let guest = Guest(AsGuest {
            queue: "wilco.q.vm-1.1".parse().unwrap(),
            reports: "wilco.r.main".parse().unwrap(),
        });
        let (publishes, listens) = (guest.publishes(), guest.listens());
        for subject in publishes.iter().chain(&listens) {
            let own = ["q.vm-1.1", "wilco~q~vm-1~1"];
            assert!(own.iter().any(|own| subject.contains(own)), "{subject}");
        }
        for no in [
            "wilco.q.vm-1.1.in",
            "wilco.r.main.in",
            "$JS.API.STREAM.DELETE.wilco~q~vm-1~1",
        ] {
            assert!(!publishes.iter().any(|subject| subject == no));
        }
        assert_eq!(guest.tray(), "wilco.tray.r.main.q.vm-1.1");
    }
}
