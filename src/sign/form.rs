//! The bytes that are signed, and the places where a signature travels.

use serde::{Deserialize, Serialize};

use crate::{error::Result, message::Message, names::GuestAddress, sign::KeyId};

const KEY: &str = "wilco-key";
const ISSUED: &str = "wilco-issued";
const EXPIRES: &str = "wilco-expires";
const SIGNATURE: &str = "wilco-signature";

/// What may change on the way: the signature itself, and what tracing libraries rewrite.
const NOT_SIGNED: [&str; 3] = [SIGNATURE, "traceparent", "tracestate"];

/// By which key, and for when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) key: KeyId,
    pub(crate) issued_ms: u64,
    pub(crate) expires_ms: u64,
}

/// A question's signature, as it travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AskSignature {
    key: KeyId,
    issued_ms: u64,
    expires_ms: u64,
    signature: String,
}

impl AskSignature {
    pub(super) fn new(stamp: Stamp, signature: String) -> Self {
        Self {
            key: stamp.key,
            issued_ms: stamp.issued_ms,
            expires_ms: stamp.expires_ms,
            signature,
        }
    }

    pub(super) fn stamp(&self) -> Stamp {
        Stamp {
            key: self.key.clone(),
            issued_ms: self.issued_ms,
            expires_ms: self.expires_ms,
        }
    }

    pub(super) fn signature(&self) -> &str {
        &self.signature
    }
}

/// Puts the stamp into a command's headers: it is signed too.
pub(super) fn stamp(message: &mut Message, stamp: &Stamp) -> Result<()> {
    let headers = &mut message.headers;
    headers.insert(KEY, stamp.key.as_str())?;
    headers.insert(ISSUED, stamp.issued_ms.to_string())?;
    headers.insert(EXPIRES, stamp.expires_ms.to_string())
}

pub(super) fn put_signature(message: &mut Message, signature: String) -> Result<()> {
    message.headers.insert(SIGNATURE, signature)
}

/// What a command's headers say of its signature. None: it has none that could be one.
pub(super) fn signature_of(message: &Message) -> Option<(Stamp, &str)> {
    let header = |name| message.headers.get(name);
    let stamp = Stamp {
        key: KeyId::new(header(KEY)?).ok()?,
        issued_ms: header(ISSUED)?.parse().ok()?,
        expires_ms: header(EXPIRES)?.parse().ok()?,
    };
    Some((stamp, header(SIGNATURE)?))
}

/// The bytes that are signed for a command to this machine.
pub(super) fn command(to: &GuestAddress, message: &Message, stamp: &Stamp, wire: u32) -> Vec<u8> {
    let headers: Vec<_> = message
        .headers
        .iter()
        .filter(|(name, _)| !NOT_SIGNED.contains(name))
        .collect();
    let mut bytes = Fields::begin("wilco signed command 1", to, stamp, wire);
    bytes
        .text(message.id.as_str())
        .text(message.kind.as_str())
        .text(message.content_type.as_str())
        .text(&headers.len().to_string());
    for (name, value) in headers {
        bytes.text(name).text(value);
    }
    bytes.add(&message.body);
    bytes.0
}

/// The bytes that are signed for a question to this machine.
pub(super) fn ask(to: &GuestAddress, ask: &str, stamp: &Stamp, wire: u32) -> Vec<u8> {
    let mut bytes = Fields::begin("wilco signed ask 1", to, stamp, wire);
    bytes.text(ask);
    bytes.0
}

/// Fields that cannot be taken for one another: each has its length before it.
struct Fields(Vec<u8>);

impl Fields {
    fn begin(domain: &str, to: &GuestAddress, stamp: &Stamp, wire: u32) -> Self {
        let mut fields = Self(Vec::new());
        fields
            .text(domain)
            .text(&wire.to_string())
            .text(to.guest.as_str())
            .text(&to.incarnation.to_string())
            .text(stamp.key.as_str())
            .text(&stamp.issued_ms.to_string())
            .text(&stamp.expires_ms.to_string());
        fields
    }

    fn text(&mut self, field: &str) -> &mut Self {
        self.add(field.as_bytes())
    }

    fn add(&mut self, field: &[u8]) -> &mut Self {
        // Everything here was bounded before: 16 MiB at most.
        let length = u32::try_from(field.len()).unwrap_or(u32::MAX);
        self.0.extend_from_slice(&length.to_be_bytes());
        self.0.extend_from_slice(field);
        self
    }
}
