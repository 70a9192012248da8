//! What people and programs type: URLs, ids, names, keys.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wilco::{BrokerUrl, GuestId, MessageId, PublicKey, QueueName, SigningKey, TraceContext, Trust};

fuzz_target!(|input: &[u8]| {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    if let Ok(url) = text.parse::<BrokerUrl>() {
        // Its text forms never show a password, and are formed without a panic.
        let _ = format!("{url} {url:?}");
    }
    if let Ok(id) = GuestId::new(text) {
        let queue = wilco::GuestAddress::from(id.clone()).queue();
        // Long ids are shortened by their hash, and their queues name nobody.
        if let Some(address) = queue.address() {
            assert_eq!(address.guest, id);
        }
    }
    let _ = MessageId::new(text);
    let _ = QueueName::reports(text);
    let _ = text.parse::<QueueName>();
    let _ = TraceContext::new(text, None);
    let _ = Trust::from_text(text);
    let _ = SigningKey::from_text(&text.to_owned().into());
    if let Ok(key) = text.parse::<PublicKey>() {
        assert_eq!(key.to_string(), text);
    }
});
