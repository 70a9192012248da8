//! Names: guest ids, incarnations, and the queues that follow from them.

use std::{fmt, num::NonZeroU64, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, ErrorKind, Result};

/// The name of a guest, as the control plane knows it: 1 to 255 bytes of UTF-8, any characters.
///
/// No id is a wildcard on any broker or reaches outside its own names (law Q8): what a broker could
/// read as more than a letter is escaped in [`QueueName`].
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GuestId(Arc<str>);

impl GuestId {
    /// The longest id, in bytes.
    pub const MAX_BYTES: usize = 255;

    /// Takes an id.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidName`] if it is empty or longer than [`GuestId::MAX_BYTES`].
    pub fn new(id: impl Into<String>) -> Result<Self> {
        let id = id.into();
        match id.len() {
            0 => Err(invalid("a guest id needs at least one character")),
            n if n > Self::MAX_BYTES => Err(invalid(format!(
                "a guest id has at most {} bytes, this one has {n}",
                Self::MAX_BYTES
            ))),
            _ => Ok(Self(id.into())),
        }
    }

    /// The id as it was given.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Which machine of a guest id: a new machine under the same id is a new incarnation. Starts at 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Incarnation(NonZeroU64);

impl Incarnation {
    /// The first machine under an id.
    pub const FIRST: Self = Self(NonZeroU64::MIN);

    /// The incarnation with this number.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidName`] for 0.
    pub fn new(number: u64) -> Result<Self> {
        NonZeroU64::new(number)
            .map(Self)
            .ok_or_else(|| invalid("incarnations are counted from 1, not from 0"))
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u64 {
        self.0.get()
    }

    /// The incarnation after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// One machine: a guest id and its incarnation. It names the guest's queue and its lane.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct GuestAddress {
    /// The guest's id.
    pub guest: GuestId,
    /// Which machine under that id.
    pub incarnation: Incarnation,
}

impl GuestAddress {
    /// The address of one machine of `guest`.
    #[must_use]
    pub fn new(guest: GuestId, incarnation: Incarnation) -> Self {
        Self { guest, incarnation }
    }

    /// The queue of this machine's commands.
    #[must_use]
    pub fn queue(&self) -> QueueName {
        let token = token(self.guest.as_str());
        QueueName(format!("{COMMANDS}{token}.{}", self.incarnation).into())
    }
}

/// A queue's name, as it stands on every broker.
///
/// There are two sorts: a guest's commands, `wilco.q.<guest>.<incarnation>`, and a control plane's
/// reports, `wilco.r.<name>`. In both the middle is the id with every byte but `A-Z a-z 0-9 - _`
/// written `=` and two upper-case hexadecimal digits; an id whose escaped form would be longer than
/// 128 bytes is `=h` and its SHA-256 in hexadecimal instead. So a name is at most 157 bytes, its
/// letters mean nothing to any broker, and two ids never meet (law Q8).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct QueueName(Arc<str>);

const COMMANDS: &str = "wilco.q.";
const REPORTS: &str = "wilco.r.";
const LONGEST_TOKEN: usize = 128;

impl QueueName {
    /// The queue in which the control plane called `name` collects its guests' reports.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidName`] if the name is empty or longer than [`GuestId::MAX_BYTES`].
    pub fn reports(name: &str) -> Result<Self> {
        let id = GuestId::new(name)?;
        Ok(Self(format!("{REPORTS}{}", token(id.as_str())).into()))
    }

    /// The name as it stands on the broker.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is a guest's queue of commands, rather than a queue of reports.
    #[must_use]
    pub fn is_commands(&self) -> bool {
        self.0.starts_with(COMMANDS)
    }

    /// The machine whose queue this is; `None` for a queue of reports and for an id that was too
    /// long to be read back from the name.
    #[must_use]
    pub fn address(&self) -> Option<GuestAddress> {
        let (token, incarnation) = self.0.strip_prefix(COMMANDS)?.rsplit_once('.')?;
        Some(GuestAddress {
            guest: GuestId::new(untoken(token)?).ok()?,
            incarnation: incarnation.parse().ok()?,
        })
    }
}

impl FromStr for QueueName {
    type Err = Error;

    /// Reads a name as it stands on the broker.
    fn from_str(name: &str) -> Result<Self> {
        let is_token = |token: &str| {
            let hash = token.strip_prefix("=h");
            hash.is_some_and(|hash| {
                hash.len() == 64 && hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            }) || untoken(token).is_some_and(|id| self::token(&id) == token)
        };
        let well_formed = if let Some(rest) = name.strip_prefix(COMMANDS) {
            rest.rsplit_once('.').is_some_and(|(token, incarnation)| {
                is_token(token)
                    && incarnation
                        .parse::<Incarnation>()
                        .is_ok_and(|parsed| parsed.to_string() == incarnation)
            })
        } else {
            name.strip_prefix(REPORTS).is_some_and(is_token)
        };
        if well_formed {
            Ok(Self(name.into()))
        } else {
            Err(invalid(format!(
                "{name:?} is not the name of a queue of wilco's: expected wilco.q.<guest>.<incarnation> \
                 or wilco.r.<name>"
            )))
        }
    }
}

/// The id as one token that every broker takes literally.
fn token(id: &str) -> String {
    let mut token = String::with_capacity(id.len());
    for byte in id.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => token.push(char::from(byte)),
            _ => token.push_str(&format!("={byte:02X}")),
        }
    }
    if token.len() > LONGEST_TOKEN {
        token = String::from("=h");
        for byte in Sha256::digest(id.as_bytes()) {
            token.push_str(&format!("{byte:02x}"));
        }
    }
    token
}

/// The id that a token stands for; `None` for a hashed or malformed one.
fn untoken(token: &str) -> Option<String> {
    let mut id = Vec::with_capacity(token.len());
    let mut rest = token.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte == b'=' {
            let (digits, tail) = rest.split_at_checked(2)?;
            if !digits
                .iter()
                .all(|d| matches!(d, b'0'..=b'9' | b'A'..=b'F'))
            {
                return None;
            }
            id.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
            rest = tail;
        } else {
            id.push(byte);
        }
    }
    String::from_utf8(id).ok()
}

fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidName, message)
}

impl From<GuestId> for GuestAddress {
    /// The first machine under the id.
    fn from(guest: GuestId) -> Self {
        Self::new(guest, Incarnation::FIRST)
    }
}

impl TryFrom<String> for GuestId {
    type Error = Error;
    fn try_from(id: String) -> Result<Self> {
        Self::new(id)
    }
}

impl TryFrom<&str> for GuestId {
    type Error = Error;
    fn try_from(id: &str) -> Result<Self> {
        Self::new(id)
    }
}

impl FromStr for GuestId {
    type Err = Error;
    fn from_str(id: &str) -> Result<Self> {
        Self::new(id)
    }
}

impl TryFrom<String> for QueueName {
    type Error = Error;
    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl From<QueueName> for String {
    fn from(name: QueueName) -> Self {
        name.0.as_ref().into()
    }
}

impl From<GuestId> for String {
    fn from(id: GuestId) -> Self {
        id.0.as_ref().into()
    }
}

impl FromStr for Incarnation {
    type Err = Error;
    fn from_str(number: &str) -> Result<Self> {
        let number = number.parse().map_err(|_| {
            invalid(format!(
                "{number:?} is not an incarnation: expected a number from 1"
            ))
        })?;
        Self::new(number)
    }
}

macro_rules! display_and_debug {
    ($($name:ty),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    )*};
}
display_and_debug!(GuestId, Incarnation, QueueName);

impl fmt::Debug for GuestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Debug for QueueName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for GuestAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (incarnation {})", self.guest, self.incarnation)
    }
}

impl fmt::Debug for GuestAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn queue(id: &str) -> QueueName {
        GuestAddress::from(GuestId::new(id).unwrap()).queue()
    }

    #[test]
    fn q8_lengths_are_checked() {
        assert!(GuestId::new("").is_err());
        assert!(GuestId::new("x".repeat(255)).is_ok());
        assert!(GuestId::new("x".repeat(256)).is_err());
        assert!(GuestId::new("é".repeat(128)).is_err());
        assert!(Incarnation::new(0).is_err());
    }

    #[test]
    fn q8_names_are_literal_on_every_broker() {
        assert_eq!(queue("vm-0042").as_str(), "wilco.q.vm-0042.1");
        assert_eq!(
            queue("a.b*c>d#e{f}").as_str(),
            "wilco.q.a=2Eb=2Ac=3Ed=23e=7Bf=7D.1"
        );
        let long = queue(&"y".repeat(255));
        assert!(long.as_str().starts_with("wilco.q.=h"));
        assert_eq!(long.address(), None);
        assert_eq!(long.as_str().parse::<QueueName>().unwrap(), long);
        // An id that spells another id's escaped or hashed form stays apart from it.
        assert_ne!(queue("a=2Eb"), queue("a.b"));
        assert_ne!(queue(long.as_str()), long);
    }

    #[test]
    fn names_that_are_not_ours_are_refused() {
        for name in [
            "",
            "wilco.q.",
            "wilco.q.a",
            "wilco.q.a.0",
            "wilco.q.a.01",
            "wilco.q.a.b.1",
            "x",
        ] {
            assert!(name.parse::<QueueName>().is_err(), "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn q8_two_ids_never_meet(a in "\\PC{1,60}", b in "\\PC{1,60}", n in 1u64.., m in 1u64..) {
            let address = |id: &str, n| {
                Some(GuestAddress::new(GuestId::new(id).ok()?, Incarnation::new(n).unwrap()))
            };
            if let (Some(a), Some(b)) = (address(&a, n), address(&b, m)) {
                prop_assert_eq!(a == b, a.queue() == b.queue());
                prop_assert!(a.queue().as_str().len() <= 157);
                prop_assert!(a.queue().as_str().bytes().all(|c| c.is_ascii_alphanumeric() || b"-_=.".contains(&c)));
                prop_assert_eq!(a.queue().as_str().parse::<QueueName>().unwrap(), a.queue());
                if let Some(read) = a.queue().address() {
                    prop_assert_eq!(read, a);
                }
            }
        }
    }
}
