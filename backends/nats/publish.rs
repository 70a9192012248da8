//! Storing messages: each confirmed by the server, each answer matched by the inbox it came to.

use std::time::Duration;

use serde_json::Value;
use tokio::time::sleep;

use super::{
    api::{Fence, Refusal, json_of},
    connection::{Link, Unanswered},
    form::{self, Deduplicated, MAX_HEADER_BYTES},
    names::Names,
    no_queue,
};
use crate::{
    broker::Receipt,
    deadline::Deadline,
    error::{Error, ErrorKind, Outcome, Result},
    message::Message,
    names::QueueName,
};

/// How long until a queue that takes nothing just now is tried again.
const PAUSE: Duration = Duration::from_millis(10);

pub(super) async fn publish(
    link: &Link,
    queue: &QueueName,
    message: Message,
    deadline: Deadline,
) -> Result<Receipt> {
    link.alive()?;
    let names = Names::of(queue);
    // Whoever collects the reports takes them on from there.
    let subject = match &link.options.guest {
        None => names.input(),
        Some(guest) => {
            guest.0.may_publish(queue)?;
            guest.tray()
        }
    };
    let limit = largest_body(link);
    if message.body.len() as u64 > limit {
        return Err(Error::new(
            ErrorKind::TooLarge { limit },
            format!(
                "{} bytes are too many: this server takes {limit}",
                message.body.len()
            ),
        )
        .with_outcome(Outcome::NotStored));
    }
    let mut headers = form::headers(&message, Deduplicated::ByItsId);
    let not_stored = |error: Error| error.with_outcome(Outcome::NotStored);
    // Bounds what a server has to take in at once; it drops what is too much.
    let room = deadline
        .bound(link.publishes.acquire())
        .await
        .map_err(not_stored)?;
    let _room = room.map_err(|_| not_stored(super::closed()))?;
    if deadline.has_passed() {
        return Err(not_stored(Error::new(
            ErrorKind::DeadlineExceeded,
            "the deadline passed first",
        )));
    }
    // Once a copy was sent that had no answer, no later answer says what became of it (law P4).
    let mut outcome = Outcome::NotStored;
    loop {
        let answer = match link
            .insist(&subject, Some(&headers), &message.body, deadline)
            .await
        {
            Ok(answer) => answer,
            Err(Unanswered::NotSent(error)) => return Err(error.with_outcome(outcome)),
            Err(Unanswered::Unknown(error)) => return Err(error.with_outcome(Outcome::Unknown)),
        };
        if !answer.first {
            outcome = Outcome::Unknown;
        }
        if answer.nobody() && link.options.guest.is_some() {
            return Err(no_queue().with_outcome(outcome));
        }
        if !answer.nobody() {
            let value = json_of(&answer).map_err(|error| error.with_outcome(Outcome::Unknown))?;
            if is_under_way(&value) {
                // What becomes of the one before is not known yet, and is what the next answer says.
                outcome = Outcome::Unknown;
                let paused = deadline.bound(sleep(PAUSE)).await;
                paused.map_err(|error| error.with_outcome(outcome))?;
                continue;
            }
            let confirm = confirmed(&value).map_err(|error| error.with_outcome(outcome))?;
            // One that was sent twice from here is its own duplicate, and may have been taken since.
            // A guest may not look what became of the first.
            if !confirm.duplicate || outcome == Outcome::Unknown || link.options.guest.is_some() {
                return Ok(Receipt::new(confirm.duplicate));
            }
            let there = link.holds(&names, confirm.sequence, deadline).await;
            if there.map_err(|error| error.with_outcome(outcome))? {
                return Ok(Receipt::new(true));
            }
            // The server knows ids for longer than it has the messages: this one was taken or purged, and
            // is sent anew (case W24), the same for all who find that. No message's id has a space.
            let anew = format!("{} {}", message.id, confirm.sequence);
            headers = form::headers(&message, Deduplicated::By(&anew));
            continue;
        }
        // Nobody takes it: there is no such queue, or it takes nothing for the moment.
        let there = link.stream(&names, deadline).await;
        let there = there.map_err(|error| error.with_outcome(outcome))?;
        match there.map(|there| there.fence()) {
            None | Some(Some(Fence::Deleting)) => return Err(no_queue().with_outcome(outcome)),
            Some(Some(Fence::Closing) | None) => {
                let paused = deadline.bound(sleep(PAUSE)).await;
                paused.map_err(|error| error.with_outcome(outcome))?;
            }
        }
    }
}

/// What a server's confirm says.
struct Confirm {
    /// Where the message is, or was: of a duplicate, where the first one was put.
    sequence: u64,
    duplicate: bool,
}

/// Whether a cluster has a message of this id in hand that not enough of it have stored: before 2.11 it says
/// that it stored it already, at no place.
fn is_under_way(value: &Value) -> bool {
    const IN_PROCESS: u64 = 10_158;
    match Refusal::of(value) {
        Some(refusal) => refusal.code == IN_PROCESS || refusal.passes(),
        None => value["duplicate"] == true && value["seq"] == 0,
    }
}

fn confirmed(value: &Value) -> Result<Confirm> {
    if let Some(refusal) = Refusal::of(value) {
        return Err(refusal.into_error());
    }
    match value["seq"].as_u64() {
        Some(sequence @ 1..) => Ok(Confirm {
            sequence,
            duplicate: value["duplicate"] == true,
        }),
        _ => Err(Error::new(
            ErrorKind::Undecodable,
            "the server's answer is neither a confirm nor a refusal",
        )),
    }
}

/// The largest body that this server takes, whatever headers come with it, now and as a dead letter.
pub(super) fn largest_body(link: &Link) -> u64 {
    link.client.max_payload().saturating_sub(MAX_HEADER_BYTES) as u64
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_cluster_has_in_hand_is_no_confirm() {
        for unsure in [
            json!({ "stream": "s", "seq": 0, "duplicate": true }),
            json!({ "error": { "code": 409, "err_code": 10_158 } }),
            json!({ "error": { "code": 503, "err_code": 10_008 } }),
        ] {
            assert!(is_under_way(&unsure), "{unsure}");
            assert!(confirmed(&unsure).is_err(), "{unsure}");
        }
        let sure = json!({ "stream": "s", "seq": 7, "duplicate": true });
        assert!(!is_under_way(&sure));
        assert!(confirmed(&sure).is_ok_and(|confirm| confirm.duplicate));
        let refused = json!({ "error": { "code": 503, "err_code": 10_077 } });
        assert!(!is_under_way(&refused));
    }
}
