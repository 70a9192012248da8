//! What records and journals hold, in the form in which stores hold it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wilco::{Entry, Headers, Record};

fuzz_target!(|row: &[u8]| {
    if let Ok(record) = serde_json::from_slice::<Record>(row) {
        wilco::fuzzing::drive(&record);
        let again = serde_json::to_vec(&record).expect("what was read can be written");
        let _: Record = serde_json::from_slice(&again).expect("and read again");
    }
    if let Ok(entry) = serde_json::from_slice::<Entry>(row) {
        let again = serde_json::to_vec(&entry).expect("what was read can be written");
        let _: Entry = serde_json::from_slice(&again).expect("and read again");
        let _ = entry.command_state();
    }
    if let Ok(headers) = serde_json::from_slice::<Headers>(row) {
        assert!(headers.bytes() <= Headers::MAX_BYTES);
        assert!(headers.iter().count() <= Headers::MAX_COUNT);
    }
});
