//! Keys: the one that signs, and those that are trusted.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{Read as _, Write as _},
    path::Path,
    str::FromStr,
    time::Duration,
};

use ed25519_dalek::{Signature, Signer as _, VerifyingKey};
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};

use super::form::{self, AskSignature, Stamp};
use crate::{
    error::{Error, ErrorKind, Result},
    message::{Message, MessageId},
    names::GuestAddress,
};

const SECRET: &str = "wilco-secret-ed25519:";
const PUBLIC: &str = "wilco-public-ed25519:";

/// The longest key file that is read.
const LONGEST_FILE: u64 = 64 * 1024;

/// Which key: the first 16 hexadecimal digits of its SHA-256.
pub type KeyId = MessageId;

/// The control plane's key. Its Debug form has its id alone.
#[derive(Clone)]
pub struct SigningKey {
    key: ed25519_dalek::SigningKey,
    lifetime: Duration,
}

impl SigningKey {
    /// How long commands other than prepare are valid, unless told otherwise.
    const LIFETIME: Duration = Duration::from_secs(3_600);

    /// A new key that nobody else has.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the operating system has no randomness.
    pub fn generate() -> Result<Self> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|error| {
            Error::new(ErrorKind::Io, "no randomness for a new key").with_source(error)
        })?;
        Ok(Self::from_seed(&seed))
    }

    fn from_seed(seed: &[u8; 32]) -> Self {
        Self {
            key: ed25519_dalek::SigningKey::from_bytes(seed),
            lifetime: Self::LIFETIME,
        }
    }

    /// Takes a key in the form of [`SigningKey::to_text`].
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if it is not in that form.
    pub fn from_text(text: &SecretString) -> Result<Self> {
        let text = text.expose_secret().trim();
        if text.starts_with(PUBLIC) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "this is a public key: signing needs the secret one",
            ));
        }
        let seed = text.strip_prefix(SECRET).and_then(unhex::<32>);
        // Not a word of it in the error (law S4).
        let seed = seed.ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidInput,
                format!("not a signing key: expected {SECRET}<64 hexadecimal digits>"),
            )
        })?;
        Ok(Self::from_seed(&seed))
    }

    /// The key as text: whoever has it can command every guest that trusts it.
    #[must_use]
    pub fn to_text(&self) -> SecretString {
        format!("{SECRET}{}", hex(self.key.as_bytes())).into()
    }

    /// Reads a key file.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if others than its owner can read it, or it holds no key;
    /// [`ErrorKind::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|error| unreadable(path, error))?;
        only_the_owner_reads(path, &file)?;
        Self::from_text(&read(path, file)?.into()).map_err(|error| in_file(path, &error))
    }

    /// Writes a new key file that only its owner can read.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if there is a file; [`ErrorKind::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => Error::new(
                ErrorKind::Conflict,
                format!(
                    "{} is there already: a key is not overwritten",
                    path.display()
                ),
            ),
            _ => unreadable(path, error),
        })?;
        let written = writeln!(file, "{}", self.to_text().expose_secret());
        written
            .and_then(|()| file.sync_all())
            .map_err(|error| unreadable(path, error))
    }

    /// The key that guests have to trust.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(self.key.verifying_key())
    }

    /// How long a call's or cast's command is valid after it was sent: 1 hour unless told otherwise. It
    /// may wait that long behind others in its guest's queue. A prepare is valid until its total deadline.
    #[must_use]
    pub fn command_lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = lifetime;
        self
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SigningKey")
            .field(&self.public().id())
            .finish()
    }
}

/// What a guest knows a control plane by. As text: `wilco-public-ed25519:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(VerifyingKey);

impl PublicKey {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> KeyId {
        let id = hex(&Sha256::digest(self.0.as_bytes())[..8]);
        KeyId::new(id).unwrap_or_else(|_| KeyId::generate())
    }

    /// Whether these bytes were signed with it.
    pub(super) fn verifies(&self, bytes: &[u8], signature: &str) -> bool {
        unhex::<64>(signature).is_some_and(|signature| {
            let signature = Signature::from_bytes(&signature);
            self.0.verify_strict(bytes, &signature).is_ok()
        })
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PUBLIC}{}", hex(self.0.as_bytes()))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let bad = |what: String| Error::new(ErrorKind::InvalidInput, what);
        if text.starts_with(SECRET) {
            return Err(bad(
                "this is a secret key, which has no place here: guests get the public one, as \
                 `wilco keys public` prints it"
                    .into(),
            ));
        }
        let key = text.strip_prefix(PUBLIC).and_then(unhex::<32>);
        let key = key.and_then(|key| VerifyingKey::from_bytes(&key).ok());
        // A weak key verifies what nobody signed.
        key.filter(|key| !key.is_weak()).map(Self).ok_or_else(|| {
            bad(format!(
                "not a public key: expected {PUBLIC}<64 hexadecimal digits>"
            ))
        })
    }
}

/// The keys whose commands a guest runs, and no other's.
#[derive(Clone, Debug)]
pub struct Trust {
    keys: Vec<PublicKey>,
    tolerance: Duration,
}

impl Trust {
    /// Trusts these keys: with none at all, nothing is run.
    #[must_use]
    pub fn new(keys: impl IntoIterator<Item = PublicKey>) -> Self {
        Self {
            keys: keys.into_iter().collect(),
            tolerance: Duration::from_secs(30),
        }
    }

    /// Takes public keys, one a line; empty lines and those that begin with `#` are skipped.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] with the line that holds no key, and if there is none at all.
    pub fn from_text(text: &str) -> Result<Self> {
        let mut keys = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            keys.push(line.parse().map_err(|error: Error| {
                Error::new(
                    ErrorKind::InvalidInput,
                    format!("line {}: {}", number + 1, error.message()),
                )
            })?);
        }
        if keys.is_empty() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "no key is in it: a guest that trusts nobody runs nothing",
            ));
        }
        Ok(Self::new(keys))
    }

    /// Reads a file of public keys.
    ///
    /// # Errors
    /// As [`Trust::from_text`]; [`ErrorKind::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|error| unreadable(path, error))?;
        Self::from_text(&read(path, file)?).map_err(|error| in_file(path, &error))
    }

    /// How long after its expiry a command is still taken: 30 seconds unless told otherwise.
    #[must_use]
    pub fn tolerance(mut self, tolerance: Duration) -> Self {
        self.tolerance = tolerance;
        self
    }

    pub(super) fn key(&self, id: &KeyId) -> Option<&PublicKey> {
        self.keys.iter().find(|key| key.id() == *id)
    }

    pub(super) fn tolerance_ms(&self) -> u64 {
        ms(self.tolerance)
    }
}

/// The control plane's signing hand.
#[derive(Debug)]
pub(crate) struct Signer {
    key: SigningKey,
    id: KeyId,
}

impl Signer {
    pub(crate) fn new(key: SigningKey) -> Self {
        let id = key.public().id();
        Self { key, id }
    }

    /// When a command expires that is sent now, in milliseconds since 1970.
    pub(crate) fn command_expires(&self, now_ms: u64) -> u64 {
        now_ms.saturating_add(ms(self.key.lifetime))
    }

    /// Signs a command. The same command, issued and expiring at the same times, has the same signature.
    pub(crate) fn sign(
        &self,
        to: &GuestAddress,
        mut message: Message,
        (issued_ms, expires_ms): (u64, u64),
        wire: u32,
    ) -> Result<Message> {
        let stamp = self.stamp(issued_ms, expires_ms);
        form::stamp(&mut message, &stamp)?;
        let signature = self.signature(&form::command(to, &message, &stamp, wire));
        form::put_signature(&mut message, signature)?;
        Ok(message)
    }

    pub(crate) fn sign_ask(
        &self,
        to: &GuestAddress,
        ask: &str,
        (issued_ms, expires_ms): (u64, u64),
        wire: u32,
    ) -> AskSignature {
        let stamp = self.stamp(issued_ms, expires_ms);
        let signature = self.signature(&form::ask(to, ask, &stamp, wire));
        AskSignature::new(stamp, signature)
    }

    /// Whether this is a command of this control plane to this machine, as it was signed.
    pub(crate) fn is_ours(&self, to: &GuestAddress, message: &Message, wire: u32) -> bool {
        form::signature_of(message).is_some_and(|(stamp, signature)| {
            let bytes = form::command(to, message, &stamp, wire);
            stamp.key == self.id && self.key.public().verifies(&bytes, signature)
        })
    }

    fn stamp(&self, issued_ms: u64, expires_ms: u64) -> Stamp {
        Stamp {
            key: self.id.clone(),
            issued_ms,
            expires_ms,
        }
    }

    fn signature(&self, bytes: &[u8]) -> String {
        hex(&self.key.key.sign(bytes).to_bytes())
    }
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn only_the_owner_reads(path: &Path, file: &File) -> Result<()> {
    #[cfg(unix)]
    {
        let metadata = file.metadata().map_err(|error| unreadable(path, error))?;
        let mode = std::os::unix::fs::PermissionsExt::mode(&metadata.permissions());
        if mode & 0o077 != 0 {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "others can read the signing key {}: chmod 600 it, and make a new key if they may \
                     have",
                    path.display()
                ),
            ));
        }
    }
    #[cfg(not(unix))]
    let _ = (path, file);
    Ok(())
}

fn read(path: &Path, file: File) -> Result<String> {
    let mut text = String::new();
    file.take(LONGEST_FILE)
        .read_to_string(&mut text)
        .map_err(|error| unreadable(path, error))?;
    Ok(text)
}

fn unreadable(path: &Path, error: std::io::Error) -> Error {
    Error::new(
        ErrorKind::Io,
        format!("the key file {} cannot be used", path.display()),
    )
    .with_source(error)
}

fn in_file(path: &Path, error: &Error) -> Error {
    Error::new(
        error.kind().clone(),
        format!("{}: {}", path.display(), error.message()),
    )
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        // Lower case alone: one form for one signature.
        let digit = |c: u8| match c {
            b'0'..=b'9' => Some(c - b'0'),
            b'a'..=b'f' => Some(c - b'a' + 10),
            _ => None,
        };
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_as_they_are_written() {
        let key = SigningKey::generate().unwrap();
        let again = SigningKey::from_text(&key.to_text()).unwrap();
        assert_eq!(again.public(), key.public());
        let public = key.public().to_string();
        assert_eq!(public.parse::<PublicKey>().unwrap(), key.public());
        let text = format!("# ours\n\n{public}\n");
        assert!(
            Trust::from_text(&text)
                .unwrap()
                .key(&key.public().id())
                .is_some()
        );
        assert_ne!(SigningKey::generate().unwrap().public(), key.public());
    }

    #[test]
    fn s4_a_key_never_shows_in_debug_forms_or_errors() {
        let key = SigningKey::generate().unwrap();
        let text = key.to_text();
        let digits = &text.expose_secret()[SECRET.len()..];
        let as_public = text.expose_secret().parse::<PublicKey>().unwrap_err();
        let cut = SigningKey::from_text(&text.expose_secret()[..60].to_owned().into());
        let in_trust = Trust::from_text(text.expose_secret()).unwrap_err();
        let cut = cut.unwrap_err();
        let signer = Signer::new(key.clone());
        let shown = format!("{key:?} {signer:?} {as_public} {in_trust} {cut} {cut:?} {text:?}");
        assert!(!shown.contains(&digits[..16]), "{shown}");
        assert!(in_trust.to_string().contains("line 1"), "{in_trust}");
    }

    #[cfg(unix)]
    #[test]
    fn a_key_file_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        let key = SigningKey::generate().unwrap();
        key.save(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(SigningKey::open(&path).unwrap().public(), key.public());
        let error = key.save(&path).unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Conflict);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        let error = SigningKey::open(&path).unwrap_err();
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }

    #[test]
    fn weak_and_malformed_public_keys_are_refused() {
        let zeros = format!("{PUBLIC}{}", "0".repeat(64));
        let one = format!("{PUBLIC}01{}", "0".repeat(62));
        for text in [
            "",
            PUBLIC,
            &zeros,
            &one,
            &format!("{PUBLIC}{}", "g".repeat(64)),
        ] {
            assert!(text.parse::<PublicKey>().is_err(), "{text}");
        }
        assert!(Trust::from_text("# nobody").is_err());
    }
}
