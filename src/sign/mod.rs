//! Signed commands and questions (law S5): the taskmanager signs with Ed25519, and a guest that trusts
//! keys runs and answers nothing else.
//!
//! Whoever can write to a guest's queue or lane can otherwise command it: an operator's tool, another
//! tenant with a stolen credential, a broker that was broken into. A signature binds what is asked to one
//! machine, one command id, one time, and every byte of it.
//!
//! # What is signed
//!
//! The fields below, in this order, each as its length in bytes (32 bits, big endian) and its bytes. Numbers
//! are decimal text, times are milliseconds since 1970. The files `command-signed.json` and
//! `ask-signed.json` in `src/golden` hold one of each with the key and the bytes.
//!
//! | | a command | a question on the lane |
//! | --- | --- | --- |
//! | domain | `wilco signed command 1` | `wilco signed ask 1` |
//! | version of the wire form | as the body's `wilco` | as the body's `wilco` |
//! | whom for | guest id, incarnation | guest id, incarnation |
//! | by whom, when | key id, issued, expires | key id, issued, expires |
//! | what | message id, kind, content type | |
//! | headers | how many; name and value of each, by name, without `wilco-signature`, `traceparent`, `tracestate` | |
//! | content | the body | the text of the member `ask`, as it travels |
//!
//! A command's signature travels in its headers `wilco-key`, `wilco-issued`, `wilco-expires` and
//! `wilco-signature` (128 hexadecimal digits); a question's in its member `signature`, with `key`,
//! `issued_ms`, `expires_ms` and `signature`. Readers that know nothing of signatures skip both. A key's id
//! is the first 16 hexadecimal digits of the SHA-256 of its public key.
//!
//! # What a guest does with it
//!
//! With [`Attach::trust`](crate::Attach::trust) it fails closed. A command that is unsigned, signed by an
//! unknown key, forged or changed, another machine's, or expired becomes a dead letter with its bytes, is
//! counted in the [`Pong`](crate::Pong) and reported as refused. It is refused before it is written down, so
//! it does not stand in the way of the true one of the same id. The true one, sent twice by whomever, is one
//! command (case W11). A question is answered with an error, counted, and changes nothing.
//!
//! # Time
//!
//! A command expires when nobody waits for it any more: prepare with its total deadline, however long it
//! waits for a late machine; others after [`SigningKey::command_lifetime`]. That is judged once, when a
//! command is new to the journal, and by the time that signed messages told this agent, counted on by its
//! monotonic clock: a machine whose clock is wrong by years runs what it should (case W34). Until a signed
//! question has told the time, its own clock cannot refuse: what looks expired by it is held until one has.
//! A tolerance ([`Trust::tolerance`]) is added.
//!
//! Expiry bounds how long a command can be replayed to a journal that has forgotten it, which is after
//! 10,000 later ones; a prepare is never forgotten.
//!
//! # Changing keys, without a gap
//!
//! 1. Trust the new key beside the old one on every guest, and start their agents anew.
//! 2. Sign with the new key: start the control plane with it.
//! 3. Once what was signed with the old key is done or expired, trust it no more.
//!
//! # What is not defended
//!
//! Reports and answers are not signed: who holds a machine's credential can lie for that machine, and what
//! keeps others from lying for it is the broker's permissions. A pong answers the nonce of its ping, and who
//! reads the lane can answer it. Who can write to a queue can fill or empty it. A control plane whose clock
//! is set back by more than the tolerance has its commands refused until its guests' agents start anew.

mod form;
mod guard;
mod keys;

pub use self::keys::{KeyId, PublicKey, SigningKey, Trust};
pub(crate) use self::{
    form::{AskSignature, Stamp},
    guard::{Guard, Time, expired},
    keys::Signer,
};

/// The kinds of refusal that are about signatures.
pub(crate) const REFUSALS: [&str; 4] = ["unsigned", "unknown_key", "forged", "expired"];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        GuestAddress, GuestId, Incarnation, Message, MessageId, QueueName,
        wire::{self, Ask, AskForm, Command, PREPARE, VERSION},
    };

    fn key(digit: char) -> SigningKey {
        let text = format!("wilco-secret-ed25519:{}", digit.to_string().repeat(64));
        SigningKey::from_text(&text.into()).unwrap()
    }

    fn address() -> GuestAddress {
        let guest = GuestId::new("vm-0042").unwrap();
        GuestAddress::new(guest, Incarnation::new(3).unwrap())
    }

    fn guard() -> Guard {
        Guard::new(Trust::new([key('a').public()]))
    }

    fn signed() -> Message {
        let payload = wire::raw(&json!({ "datastore": "mysql" })).unwrap();
        let reports = Some(QueueName::reports("main").unwrap());
        let id = |text| MessageId::new(text).unwrap();
        let command = Command::new(&address(), id("c-1"), id(PREPARE), reports, payload);
        let signer = Signer::new(key('a'));
        command
            .to_signed(Some(&signer), |_| (1_000, 2_000))
            .unwrap()
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// For other languages: a message, the key and the bytes that are signed.
    fn golden(name: &str, written: &Value) {
        let path = format!("{}/src/golden/{name}.json", env!("CARGO_MANIFEST_DIR"));
        let golden = std::fs::read_to_string(&path).unwrap_or_default();
        let golden: Value = serde_json::from_str(&golden).unwrap_or_default();
        assert_eq!(golden, *written, "{path} should hold\n{written:#}");
    }

    #[test]
    fn a_signed_command_matches_its_golden_file() {
        let message = signed();
        let stamp = guard().check(&address(), &message, VERSION).unwrap();
        golden(
            "command-signed",
            &json!({
                "public_key": key('a').public().to_string(),
                "signed_bytes": hex(&form::command(&address(), &message, &stamp, VERSION)),
                "id": message.id,
                "kind": message.kind,
                "content_type": message.content_type,
                "headers": message.headers,
                "body": String::from_utf8(message.body.to_vec()).unwrap(),
            }),
        );
    }

    #[test]
    fn a_signed_question_matches_its_golden_file() {
        let signer = Signer::new(key('a'));
        let body = Ask::Dismiss.encode(&address(), Some(&signer), (1_000, 2_000));
        let body = body.unwrap();
        let form = AskForm::decode(&body).unwrap();
        assert_eq!(form.ask().unwrap(), Ask::Dismiss);
        form.check(&guard()).unwrap();
        let signature: AskSignature = serde_json::from_value(
            serde_json::from_slice::<Value>(&body).unwrap()["signature"].take(),
        )
        .unwrap();
        let bytes = form::ask(&address(), "\"dismiss\"", &signature.stamp(), VERSION);
        golden(
            "ask-signed",
            &json!({
                "public_key": key('a').public().to_string(),
                "signed_bytes": hex(&bytes),
                "body": String::from_utf8(body.to_vec()).unwrap(),
            }),
        );
    }

    #[test]
    fn what_was_signed_for_one_thing_is_not_taken_for_another() {
        let message = signed();
        let kind = |checked: Result<Stamp, wire::RemoteError>| checked.unwrap_err().kind;
        let guard = guard();
        let next = GuestAddress::new(address().guest, address().incarnation.next());
        assert_eq!(kind(guard.check(&next, &message, VERSION)), "forged");
        let neighbour = GuestAddress::new(GuestId::new("vm-0043").unwrap(), address().incarnation);
        assert_eq!(kind(guard.check(&neighbour, &message, VERSION)), "forged");
        assert_eq!(
            kind(guard.check(&address(), &message, VERSION + 1)),
            "forged"
        );
        let other = Guard::new(Trust::new([key('b').public()]));
        assert_eq!(
            kind(other.check(&address(), &message, VERSION)),
            "unknown_key"
        );
        let mut bare = message.clone();
        bare.headers = crate::Headers::new();
        assert_eq!(kind(guard.check(&address(), &bare, VERSION)), "unsigned");
        // A trace may be added on the way.
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let trace = crate::TraceContext::new(parent, None).unwrap();
        let traced = message.with_trace(&trace).unwrap();
        assert!(guard.check(&address(), &traced, VERSION).is_ok());
    }

    #[test]
    fn a_signature_is_the_same_at_every_resend() {
        assert_eq!(signed(), signed());
    }

    proptest! {
        #[test]
        fn any_change_is_noticed(
            what in 0..7_u8,
            at in any::<prop::sample::Index>(),
            bit in 0..8_u8,
            text in "[a-z0-9]{1,20}",
        ) {
            let mut message = signed();
            let name = |text: &str| MessageId::new(text).unwrap();
            match what {
                0 => {
                    let mut body = message.body.to_vec();
                    let at = at.index(body.len());
                    body[at] ^= 1 << bit;
                    message.body = body.into();
                }
                1 => message.id = name(&text),
                2 => message.kind = name(&text),
                3 => message.content_type = name(&text),
                4 => message.headers.insert(format!("x-{text}"), text.clone()).unwrap(),
                _ => {
                    let headers = ["wilco-key", "wilco-issued", "wilco-expires", "wilco-signature"];
                    let header = headers[at.index(headers.len())];
                    prop_assume!(message.headers.get(header) != Some(&text));
                    message.headers.insert(header, text).unwrap();
                }
            }
            prop_assert!(guard().check(&address(), &message, VERSION).is_err());
        }

        #[test]
        fn fields_are_not_taken_for_one_another(
            one in prop::array::uniform3("[ab]{0,3}"),
            other in prop::array::uniform3("[ab]{0,3}"),
        ) {
            prop_assume!(one != other);
            let bytes = |[name, value, body]: &[String; 3]| {
                let mut message = signed();
                let mut headers = crate::Headers::new();
                headers.insert(format!("x{name}"), value.clone()).unwrap();
                message.headers = headers;
                message.body = body.clone().into();
                let stamp = Stamp { key: message.id.clone(), issued_ms: 1, expires_ms: 2 };
                form::command(&address(), &message, &stamp, VERSION)
            };
            prop_assert_ne!(bytes(&one), bytes(&other));
        }
    }
}
