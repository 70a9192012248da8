//! A guest's credential: what one machine needs to do its own work on the broker, and nothing else.

use std::{
    fmt, fs,
    io::Write as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use secrecy::{ExposeSecret as _, SecretString};

use crate::{
    error::{Error, ErrorKind, Result},
    names::GuestAddress,
};

/// What a machine's agent connects with (law S1), from [`Broker::issue_credential`].
///
/// Its text forms never show the secret (law S4); [`GuestCredential::url`] and
/// [`CredentialFile::content`] give it to whoever passes it on to the machine.
///
/// [`Broker::issue_credential`]: crate::Broker::issue_credential
#[derive(Clone)]
#[non_exhaustive]
pub struct GuestCredential {
    /// The machine whose credential this is.
    pub address: GuestAddress,
    url: SecretString,
    files: Vec<CredentialFile>,
    /// What it may do, a line each.
    pub rights: Vec<String>,
    /// What it may do beyond a guest's work because the broker has no smaller right, a line each; and
    /// what its owner must know, such as that a restart of the broker forgets it.
    pub exceptions: Vec<String>,
    /// Until when it is good; `None`: until it is revoked.
    pub expires: Option<SystemTime>,
}

/// A file that goes with a credential. The URL has its name as an option's value: `creds=guest.creds`.
#[derive(Clone)]
pub struct CredentialFile {
    name: String,
    content: SecretString,
}

impl GuestCredential {
    /// The credential of this machine, from a backend. `url` is what the guest connects with.
    pub fn new(address: GuestAddress, url: impl Into<String>) -> Self {
        Self {
            address,
            url: SecretString::from(url.into()),
            files: Vec::new(),
            rights: Vec::new(),
            exceptions: Vec::new(),
            expires: None,
        }
    }

    /// With a file of this name and content. The name is made of `a-z 0-9 . -` and has no directory.
    #[must_use]
    pub fn with_file(mut self, name: impl Into<String>, content: impl Into<String>) -> Self {
        self.files.push(CredentialFile {
            name: name.into(),
            content: SecretString::from(content.into()),
        });
        self
    }

    /// With one more line of what it may do.
    #[must_use]
    pub fn with_right(mut self, right: impl Into<String>) -> Self {
        self.rights.push(right.into());
        self
    }

    /// With one more line of what it may do that a guest should not need to.
    #[must_use]
    pub fn with_exception(mut self, exception: impl Into<String>) -> Self {
        self.exceptions.push(exception.into());
        self
    }

    /// Good until then.
    #[must_use]
    pub fn until(mut self, expires: SystemTime) -> Self {
        self.expires = Some(expires);
        self
    }

    /// The URL that the guest connects with, a secret in it. Files are named without a directory; see
    /// [`GuestCredential::url_in`].
    #[must_use]
    pub fn url(&self) -> &SecretString {
        &self.url
    }

    /// The files that go with it.
    #[must_use]
    pub fn files(&self) -> &[CredentialFile] {
        &self.files
    }

    /// The URL for a machine that has the files in this directory.
    #[must_use]
    pub fn url_in(&self, directory: &Path) -> SecretString {
        let mut url = self.url.expose_secret().to_owned();
        for file in &self.files {
            let there = directory.join(&file.name);
            url = url.replace(&format!("={}", file.name), &format!("={}", there.display()));
        }
        SecretString::from(url)
    }

    /// Writes the files into this directory, readable by their owner alone, and returns the URL that
    /// names them there.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn store(&self, directory: &Path) -> Result<SecretString> {
        for file in &self.files {
            let path = directory.join(&file.name);
            write_private(&path, file.content.expose_secret()).map_err(|error| {
                Error::new(
                    ErrorKind::Io,
                    format!("{} cannot be written: {error}", path.display()),
                )
                .with_source(error)
            })?;
        }
        Ok(self.url_in(directory))
    }
}

/// Beside its place first, with its mode from the start: nobody reads half a file, or a secret that
/// others could read for a moment.
fn write_private(path: &Path, content: &str) -> std::io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let _ = fs::remove_file(&beside);
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&beside)?;
    file.write_all(content.as_bytes())?;
    file.sync_all()?;
    fs::rename(&beside, path)
}

impl CredentialFile {
    /// Its name, without a directory.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is in it: a secret.
    #[must_use]
    pub fn content(&self) -> &SecretString {
        &self.content
    }
}

impl fmt::Debug for GuestCredential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestCredential")
            .field("address", &self.address)
            .field("url", &"***")
            .field("files", &self.files)
            .field("rights", &self.rights)
            .field("exceptions", &self.exceptions)
            .field("expires", &self.expires)
            .finish()
    }
}

impl fmt::Debug for CredentialFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CredentialFile")
            .field("name", &self.name)
            .field("content", &"***")
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::GuestId;

    fn credential() -> GuestCredential {
        let address = GuestAddress::from(GuestId::new("vm-1").unwrap());
        GuestCredential::new(address, "nats://host/?creds=guest.creds")
            .with_file("guest.creds", "hunter2")
    }

    #[test]
    fn s4_a_credential_is_not_shown() {
        let address = GuestAddress::from(GuestId::new("vm-1").unwrap());
        let credential = GuestCredential::new(address, "amqp://vm-1:hunter2@host/")
            .with_file("guest.creds", "hunter2");
        assert!(!format!("{credential:?}").contains("hunter2"));
    }

    #[cfg(unix)]
    #[test]
    fn s4_its_files_are_their_owners_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let place = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let url = credential().store(place.path()).unwrap();
            let file = place.path().join("guest.creds");
            assert_eq!(
                url.expose_secret(),
                format!("nats://host/?creds={}", file.display())
            );
            assert_eq!(fs::read_to_string(&file).unwrap(), "hunter2");
            let mode = fs::metadata(&file).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }
}
