//! A report as it comes out of the control plane's queue.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wilco::{GuestAddress, GuestId, Message, wire::Report};

fuzz_target!(|body: &[u8]| {
    let Ok(message) = Message::new("report", body.to_vec()) else {
        return;
    };
    if let Ok(report) = Report::from_message(&message) {
        let again = report.to_message().expect("what was read can be written");
        let again = Report::from_message(&again).expect("and read again");
        assert_eq!(again.address(), report.address());
    }
    let other = GuestAddress::from(GuestId::new("other").expect("an id"));
    let _ = Report::from_message(&message.with_from(other.queue()));
});
