//! Broker URLs, read strictly: an option that nobody knows is an error, never ignored.

use std::{fmt, path::PathBuf, str::FromStr};

use url::Url;

use crate::error::{Error, ErrorKind, Result};

/// Where a broker is. Its text forms never show a password (law S4).
///
/// | URL | broker |
/// | --- | --- |
/// | `sqlite:relative/path.db`, `sqlite:///absolute/path.db` | embedded, in a file that processes of one machine share |
/// | `memory:` | embedded, in this process alone, new at each connect |
/// | `memory:name` | embedded, one for all in this process who use the name |
///
/// Options follow as `?name=value&…`; each backend names those that it knows:
///
/// | scheme | option | value |
/// | --- | --- | --- |
/// | `sqlite` | `sync` | `full` (the default): synced to disk before Ok, survives a power cut. `normal`, `off`: survives a kill of the process alone |
#[derive(Clone)]
pub struct BrokerUrl {
    url: Url,
}

/// Every scheme of this build.
const SCHEMES: &[&str] = if cfg!(feature = "embedded") {
    &["sqlite", "memory"]
} else {
    &[]
};

#[cfg_attr(
    not(feature = "embedded"),
    allow(dead_code, reason = "backends read them")
)]
impl BrokerUrl {
    /// The scheme, in lower case.
    #[must_use]
    pub fn scheme(&self) -> &str {
        self.url.scheme()
    }

    /// What stands between the scheme and the options, as a path.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidUrl`] if there is a host, user or port, which a file does not have.
    pub(crate) fn path(&self) -> Result<PathBuf> {
        if self.url.has_host() || !self.url.username().is_empty() {
            return Err(invalid(format!(
                "{self}: two slashes begin a host's name, and a file has none: write \
                 {scheme}:relative/path or {scheme}:///absolute/path",
                scheme = self.scheme()
            )));
        }
        percent_decode(self.url.path())
            .map(PathBuf::from)
            .ok_or_else(|| {
                invalid(format!(
                    "{self}: a % in a path is followed by two hexadecimal digits"
                ))
            })
    }

    /// Refuses every option but these.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidUrl`] that names the known ones; also for an option given twice.
    pub(crate) fn only_options(&self, known: &[&str]) -> Result<()> {
        let mut seen: Vec<String> = Vec::new();
        for (name, _) in self.url.query_pairs() {
            if !known.contains(&name.as_ref()) {
                let known = match known {
                    [] => "it takes no options".to_owned(),
                    known => format!("the known ones are {}", known.join(", ")),
                };
                return Err(invalid(format!("{self}: unknown option {name:?}; {known}")));
            }
            if seen.contains(&name.to_string()) {
                return Err(invalid(format!("{self}: option {name} is given twice")));
            }
            seen.push(name.into_owned());
        }
        Ok(())
    }

    /// An option's value, read as `T`; `expected` says what it should look like.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidUrl`] if it cannot be read.
    pub(crate) fn option<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some((_, value)) = self.url.query_pairs().find(|(key, _)| key == name) else {
            return Ok(None);
        };
        read(&value).map(Some).ok_or_else(|| {
            invalid(format!(
                "{self}: option {name} is {value:?}, expected {expected}"
            ))
        })
    }
}

impl FromStr for BrokerUrl {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let url = Url::parse(text).map_err(|error| {
            // The text is not repeated: it may hold a password.
            invalid(format!(
                "this is not a broker URL ({error}); expected one such as sqlite:///var/lib/wilco/broker.db"
            ))
        })?;
        let url = Self { url };
        if SCHEMES.contains(&url.scheme()) {
            return Ok(url);
        }
        let known: Vec<_> = SCHEMES.iter().map(|scheme| format!("{scheme}:")).collect();
        Err(invalid(format!(
            "unknown scheme {:?} in {url}; the known ones are {}",
            url.scheme(),
            known.join(", ")
        )))
    }
}

impl fmt::Display for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = self.url.clone();
        if shown.password().is_some() {
            // Fails only for a URL that cannot have a password.
            let _ = shown.set_password(Some("***"));
        }
        shown.set_query(None);
        fmt::Display::fmt(&shown, f)
    }
}

impl fmt::Debug for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg_attr(
    not(feature = "embedded"),
    allow(dead_code, reason = "backends read them")
)]
fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte == b'%' {
            let (digits, tail) = rest.split_at_checked(2)?;
            bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
            rest = tail;
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidUrl, message)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn parse(text: &str) -> Result<BrokerUrl> {
        text.parse()
    }

    #[test]
    fn paths_are_relative_or_absolute_and_never_a_host() {
        let path = |text| parse(text).unwrap().path();
        assert_eq!(path("sqlite:a/b.db").unwrap(), Path::new("a/b.db"));
        assert_eq!(path("sqlite:/a/b.db").unwrap(), Path::new("/a/b.db"));
        assert_eq!(
            path("sqlite:///a/b%20c.db?x=1").unwrap(),
            Path::new("/a/b c.db")
        );
        let error = path("sqlite://a/b.db").unwrap_err().to_string();
        assert!(error.contains("sqlite:relative/path"), "{error}");
    }

    #[test]
    fn unknown_schemes_and_options_name_the_known_ones() {
        let error = parse("kafka://h/").unwrap_err().to_string();
        assert!(
            error.contains("\"kafka\"") && error.contains("sqlite:, memory:"),
            "{error}"
        );
        let url = parse("sqlite:x.db?sync=full&snyc=full").unwrap();
        let error = url
            .only_options(&["sync", "timeout"])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("\"snyc\"") && error.contains("sync, timeout"),
            "{error}"
        );
    }

    #[test]
    fn s4_a_password_is_never_shown() {
        let url = BrokerUrl {
            url: Url::parse("amqp://user:hunter2@host/?token=hunter2").unwrap(),
        };
        assert!(!format!("{url} {url:?}").contains("hunter2"));
        let error = parse("amqp://user:hunter2@host:port").unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"));
        let error = parse("amqp://user:hunter2@host").unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"));
    }
}
