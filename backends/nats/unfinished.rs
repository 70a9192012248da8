//! Servers before 2.9.15 know a stream before they have made it, and end with a segmentation fault when what
//! it stores is asked for in that moment. It takes microseconds, and comes up where many queues are declared
//! while their guests look for them already: once in some hundred on a loaded machine. Such a stream has
//! no date yet, which can be asked for without harm.

use serde_json::{Value, json};

use super::{api::STREAM_NOT_FOUND, connection::Link};
use crate::{deadline::Deadline, error::Result};

/// The first version that makes a stream before it knows it.
const SINCE: [u64; 3] = [2, 9, 15];

impl Link {
    /// Whether this stream can be asked for what it stores: false if it is being made, or not there, since it
    /// may be made a moment later.
    pub(super) async fn is_finished(&self, stream: &str, deadline: Deadline) -> Result<bool> {
        if is_careful(&self.client.server_info().version) {
            return Ok(true);
        }
        let verb = format!("STREAM.INFO.{stream}");
        Ok(match self.api(&verb, &json!({}), deadline).await? {
            Ok(told) => !has_no_date(&told),
            Err(refusal) => refusal.code != STREAM_NOT_FOUND,
        })
    }
}

/// Whether a server of this version keeps what it has not made yet to itself.
fn is_careful(version: &str) -> bool {
    let mut parts = version
        .split(['.', '-'])
        .map_while(|part| part.parse::<u64>().ok());
    let numbers = [(); 3].map(|()| parts.next().unwrap_or(0));
    numbers >= SINCE
}

fn has_no_date(stream: &Value) -> bool {
    stream["created"]
        .as_str()
        .is_some_and(|date| date.starts_with("0001-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_servers_are_asked_first() {
        for old in ["2.9.10", "2.9.14-RC.1", "2.8.4", "", "new"] {
            assert!(!is_careful(old), "{old}");
        }
        for new in ["2.9.15", "2.9.25", "2.10.0-beta.1", "2.15.1", "3.0.0"] {
            assert!(is_careful(new), "{new}");
        }
        assert!(has_no_date(&json!({ "created": "0001-01-01T00:00:00Z" })));
        assert!(!has_no_date(&json!({ "created": "2026-01-01T00:00:00Z" })));
    }
}
