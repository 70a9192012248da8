//! Where a broker with a connection is: its addresses, who we are there, and how TLS is done.

use std::{env, fmt, fs, path::PathBuf};

use secrecy::SecretString;

use crate::{
    broker_url::{BrokerUrl, percent_decode},
    error::{Error, ErrorKind, Result},
};

/// The options of every URL with TLS.
pub(crate) const TLS_OPTIONS: &[&str] = &["ca", "cert", "key"];

/// What a URL with a host, and the environment, say of a broker.
#[cfg_attr(
    not(all(feature = "nats", feature = "tls")),
    allow(
        dead_code,
        reason = "only NATS has tokens, and not every build has TLS"
    )
)]
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    /// The addresses of one broker or of its cluster; at least one.
    pub(crate) hosts: Vec<Host>,
    pub(crate) user: Option<String>,
    pub(crate) password: Option<SecretString>,
    pub(crate) token: Option<SecretString>,
    /// What follows the hosts, decoded, without its first slash; `None` if nothing follows.
    pub(crate) path: Option<String>,
    /// Set where the scheme asks for TLS.
    pub(crate) tls: Option<Tls>,
}

/// One address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Host {
    /// A name or an IP address, the latter without brackets.
    pub(crate) name: String,
    pub(crate) port: u16,
}

/// How TLS is done, as PEM texts; the host's name is always checked (law S3).
#[cfg_attr(
    not(feature = "tls"),
    allow(dead_code, reason = "not every build has TLS")
)]
#[derive(Clone)]
pub(crate) struct Tls {
    /// The authorities to trust, and no others; `None`: those of the system.
    pub(crate) authorities: Option<Vec<u8>>,
    /// Our certificate and its key.
    pub(crate) identity: Option<Identity>,
}

#[cfg_attr(
    not(feature = "tls"),
    allow(dead_code, reason = "not every build has TLS")
)]
#[derive(Clone)]
pub(crate) struct Identity {
    pub(crate) certificate: Vec<u8>,
    pub(crate) key: Vec<u8>,
}

impl Endpoint {
    /// Reads a URL. Its options are the backend's to read, but for those of TLS.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidUrl`] that says what is wrong with which part.
    pub(crate) fn of(url: &BrokerUrl, default_port: u16, with_tls: bool) -> Result<Self> {
        let parts = url.parts();
        let name = parts.host_str().filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| invalid(format!("{url}: a host is missing after ://")))?;
        let mut hosts = vec![Host {
            name: name.trim_matches(['[', ']']).into(),
            port: parts.port().unwrap_or(default_port),
        }];
        for other in url.others() {
            hosts
                .push(Host::read(other, default_port).ok_or_else(|| {
                    invalid(format!("{url}: {other:?} is not host or host:port"))
                })?);
        }
        let decoded = |text: &str, what: &str| {
            percent_decode(text).ok_or_else(|| {
                invalid(format!(
                    "{url}: a % in the {what} is followed by two hexadecimal digits"
                ))
            })
        };
        let from_env = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let user = match parts.username() {
            "" => from_env("WILCO_BROKER_USER"),
            user => Some(decoded(user, "user")?),
        };
        let password = match parts.password() {
            None => from_env("WILCO_BROKER_PASSWORD"),
            Some(password) => Some(decoded(password, "password")?),
        };
        let path = match parts.path().strip_prefix('/') {
            None | Some("") => None,
            Some(path) => Some(decoded(path, "path")?),
        };
        Ok(Self {
            hosts,
            user,
            password: password.map(SecretString::from),
            token: from_env("WILCO_BROKER_TOKEN").map(SecretString::from),
            path,
            tls: with_tls.then(|| Tls::of(url)).transpose()?,
        })
    }
}

impl Host {
    fn read(text: &str, default_port: u16) -> Option<Self> {
        // An IPv6 address has colons of its own and stands in brackets.
        let (name, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (name, port) = rest.split_once(']')?;
                (
                    name,
                    port.strip_prefix(':').or(port.is_empty().then_some(""))?,
                )
            }
            None => text.split_once(':').unwrap_or((text, "")),
        };
        let port = match port {
            "" => default_port,
            port => port.parse().ok()?,
        };
        (!name.is_empty()).then(|| Self {
            name: name.into(),
            port,
        })
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.name.contains(':') {
            write!(f, "[{}]:{}", self.name, self.port)
        } else {
            write!(f, "{}:{}", self.name, self.port)
        }
    }
}

impl Tls {
    fn of(url: &BrokerUrl) -> Result<Self> {
        let read = |option: &str| -> Result<Option<Vec<u8>>> {
            let path = url.option(option, "the path of a PEM file", |path| {
                (!path.is_empty()).then(|| PathBuf::from(path))
            })?;
            path.map(|path| {
                fs::read(&path).map_err(|error| {
                    invalid(format!(
                        "option {option}: {} cannot be read: {error}",
                        path.display()
                    ))
                })
            })
            .transpose()
        };
        let identity = match (read("cert")?, read("key")?) {
            (Some(certificate), Some(key)) => Some(Identity { certificate, key }),
            (None, None) => None,
            _ => {
                return Err(invalid(format!(
                    "{url}: the options cert and key are given together or not at all"
                )));
            }
        };
        Ok(Self {
            authorities: read("ca")?,
            identity,
        })
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls")
            .field("own authorities", &self.authorities.is_some())
            .field("identity", &self.identity.is_some())
            .finish()
    }
}

/// What to do about a TLS handshake that failed as every later one will; `None`: it may pass, or is about
/// something else. The clients tell what it was by their errors' text alone.
pub(crate) fn tls_advice(error: &str) -> Option<&'static str> {
    const KNOWN: [(&[&str], &str); 5] = [
        (
            &[
                "unknownissuer",
                "unknown issuer",
                "self-signed",
                "self signed",
            ],
            "the server's certificate is signed by an authority that is not trusted here: name that \
             authority's certificate with the option ca",
        ),
        (
            &["not valid for name", "notvalidforname"],
            "the server's certificate is for another host name: connect by one that it names",
        ),
        (
            &[
                "certificate expired",
                "certificate has expired",
                "invalid peer certificate: expired",
            ],
            "the server's certificate has expired: the server needs a new one",
        ),
        (
            // Servers written in Go say the second where there is none.
            &["certificaterequired", "badcertificate"],
            "the server wants a certificate of the client too, one that it trusts: name it and its key \
             with the options cert and key",
        ),
        (
            &["invalidcontenttype", "unexpected message in tls"],
            "the server speaks no TLS at this port: use its port with TLS, or the scheme without",
        ),
    ];
    let error = error.to_lowercase();
    let known = KNOWN
        .iter()
        .find(|(words, _)| words.iter().any(|word| error.contains(word)));
    known.map(|(_, advice)| *advice)
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidUrl, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s3_what_no_time_mends_is_told_from_what_passes() {
        for (error, word) in [
            ("invalid peer certificate: UnknownIssuer", "option ca"),
            (
                "invalid peer certificate: certificate not valid for name \"127.0.0.1\"",
                "host name",
            ),
            ("invalid peer certificate: Expired", "expired"),
            ("received fatal alert: CertificateRequired", "cert and key"),
            ("received fatal alert: BadCertificate", "cert and key"),
            (
                "received corrupt message of type InvalidContentType",
                "no TLS",
            ),
        ] {
            assert!(tls_advice(error).is_some_and(|advice| advice.contains(word)));
        }
        for passes in ["Connection refused (os error 111)", "tls handshake eof", ""] {
            assert_eq!(tls_advice(passes), None);
        }
    }

    #[test]
    fn further_hosts_are_read_strictly() {
        let host = |name: &str, port| {
            Some(Host {
                name: name.into(),
                port,
            })
        };
        assert_eq!(Host::read("b", 7), host("b", 7));
        assert_eq!(Host::read("b:1", 7), host("b", 1));
        assert_eq!(Host::read("[::1]", 7), host("::1", 7));
        assert_eq!(Host::read("[::1]:2", 7), host("::1", 2));
        for bad in ["", ":1", "b:x", "b:70000", "[::1", "[::1]x"] {
            assert_eq!(Host::read(bad, 7), None, "{bad:?}");
        }
    }
}
