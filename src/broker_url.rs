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
/// | `amqp://user:password@host:5672/vhost`, `amqps://…` | RabbitMQ |
/// | `nats://user:password@host:4222`, `nats://token@host`, `tls://…` | NATS JetStream |
/// | `redis://user:password@host:6379/database`, `rediss://…` | Redis or Valkey |
/// | `redis-sentinel://user:password@host:26379,host2/name/database`, `rediss-sentinel://…` | the same, its master asked for at sentinels, who know it by this name. User and password are the server's; the sentinels are asked without |
///
/// Where there is a host there can be several, `host1:port,host2,…`: the addresses of one cluster, tried
/// in turn. What the URL does not say of user, password and token is taken from the environment:
/// `WILCO_BROKER_USER`, `WILCO_BROKER_PASSWORD`, `WILCO_BROKER_TOKEN`.
///
/// Options follow as `?name=value&…`; each backend names those that it knows:
///
/// | scheme | option | value |
/// | --- | --- | --- |
/// | `sqlite` | `sync` | `full` (the default): synced to disk before Ok, survives a power cut. `normal`, `off`: survives a kill of the process alone |
/// | `amqp`, `amqps` | `heartbeat` | `2s` (the default), whole seconds up to `60s`: a peer that is gone is noticed after three of them at the most |
/// | | `fresh` | `2s` (the default), whole seconds up to `60s`: declare is Ok when the new queue is this old, because a kill of the broker or a power cut would take a younger one; `0s`: it does not wait, and no power cut is claimed to be survived |
/// | | `management` | `http://host:15672`: the management plug-in, where it is not at its usual port beside the broker; guests' credentials are made there |
/// | | `guest` | the name of a guest's queue: this is its own credential, which [`Broker::issue_credential`](crate::Broker::issue_credential) writes |
/// | `nats`, `tls` | `takeover` | seconds, 2 to 300 (4 is the default): how soon a consumer or a server that says nothing is given up. All that use one queue give the same |
/// | | `replicas` | `1`, `3` or `5`: how many servers of a cluster hold each queue |
/// | | `creds` | a NATS credentials file: who we are |
/// | | `signing_key`, `expires` | a file with a signing key of the account, by which guests' credentials are signed, and how long each is good: `365d` (the default) at the most |
/// | | `operator_key`, `system_creds` | files with the operator's key and a user of the system account: by them credentials are taken back |
/// | | `assume_sync_always` | `true`: you vouch for `sync_interval: always` on every server; better is the tag `sync:always`, which is read |
/// | `amqps`, `tls`, `rediss`, `rediss-sentinel` | `ca` | a PEM file: trust these authorities and no others |
/// | | `cert`, `key` | PEM files: a client's certificate and its key |
/// | `nats`, `tls`, all of `redis` | `guest`, `reports` | in a credential's URL: whose it is, and where its reports go |
/// | all of `redis` | `lease` | `3s` (the default), 1 s to 60 s: how long a consumer or a lane is kept for one that gives no sign of life, and how long a connection may give none |
/// | | `replicas` | `0` (the default) to `16`: nothing is Ok before so many replicas have it, on disk where the server can say that (7.2). With too few a publish is `Unknown` at its deadline |
#[derive(Clone)]
pub struct BrokerUrl {
    url: Url,
    /// The further addresses of a cluster, as they were written.
    others: Vec<String>,
}

/// The longest URL (law S2): room for a hundred addresses and the paths of every file.
const MAX_BYTES: usize = 64 * 1024;

/// Every scheme of wilco's, and the feature that a build needs for it.
const SCHEMES: &[(&str, &str, bool)] = &[
    ("sqlite", "embedded", cfg!(feature = "embedded")),
    ("memory", "embedded", cfg!(feature = "embedded")),
    ("amqp", "rabbitmq", cfg!(feature = "rabbitmq")),
    (
        "amqps",
        "rabbitmq and tls",
        cfg!(all(feature = "rabbitmq", feature = "tls")),
    ),
    ("nats", "nats", cfg!(feature = "nats")),
    (
        "tls",
        "nats and tls",
        cfg!(all(feature = "nats", feature = "tls")),
    ),
    ("redis", "redis", cfg!(feature = "redis")),
    (
        "rediss",
        "redis and tls",
        cfg!(all(feature = "redis", feature = "tls")),
    ),
    ("redis-sentinel", "redis", cfg!(feature = "redis")),
    (
        "rediss-sentinel",
        "redis and tls",
        cfg!(all(feature = "redis", feature = "tls")),
    ),
];

#[cfg_attr(
    not(all(feature = "embedded", feature = "network")),
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

    /// The parts of a URL that has a host.
    pub(crate) fn parts(&self) -> &Url {
        &self.url
    }

    /// The further addresses of a cluster, `host` or `host:port` each.
    pub(crate) fn others(&self) -> &[String] {
        &self.others
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
        if text.len() > MAX_BYTES {
            return Err(invalid(format!(
                "a broker URL of {} bytes; expected one of at most {MAX_BYTES}",
                text.len()
            )));
        }
        let (first, others) = split_hosts(text);
        let url = Url::parse(&first).map_err(|error| {
            // The text is not repeated: it may hold a password.
            invalid(format!(
                "this is not a broker URL ({error}); expected one such as sqlite:///var/lib/wilco/broker.db"
            ))
        })?;
        let url = Self { url, others };
        match SCHEMES.iter().find(|(scheme, ..)| *scheme == url.scheme()) {
            Some((.., true)) => Ok(url),
            Some((scheme, feature, false)) => Err(invalid(format!(
                "{url}: this build of wilco has no {scheme}: URLs; build it with the Cargo feature {feature}"
            ))),
            None if matches!(url.scheme(), "redis-cluster" | "rediss-cluster") => {
                Err(invalid(format!(
                    "{url}: wilco does not find its way in a Redis Cluster yet; name one master, or the \
                     sentinels of one with redis-sentinel:"
                )))
            }
            None => {
                let known: Vec<_> = SCHEMES
                    .iter()
                    .filter(|(.., built)| *built)
                    .map(|(scheme, ..)| format!("{scheme}:"))
                    .collect();
                Err(invalid(format!(
                    "unknown scheme {:?} in {url}; the known ones are {}",
                    url.scheme(),
                    known.join(", ")
                )))
            }
        }
    }
}

/// The URL with its first host alone, and the others: `a:1,b:2` is no host that a URL can have.
fn split_hosts(text: &str) -> (String, Vec<String>) {
    let Some((scheme, rest)) = text.split_once("://") else {
        return (text.into(), Vec::new());
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, tail) = rest.split_at(end);
    let (user, hosts) = match authority.rsplit_once('@') {
        Some((user, hosts)) => (format!("{user}@"), hosts),
        None => (String::new(), authority),
    };
    let mut hosts = hosts.split(',');
    let first = hosts.next().unwrap_or_default();
    let others = hosts.map(str::to_owned).collect();
    (format!("{scheme}://{user}{first}{tail}"), others)
}

impl fmt::Display for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = self.url.clone();
        // These fail only for a URL that cannot have them.
        if shown.password().is_some() {
            let _ = shown.set_password(Some("***"));
        } else if !shown.username().is_empty() && matches!(shown.scheme(), "nats" | "tls") {
            // A user alone is a token on NATS.
            let _ = shown.set_username("***");
        }
        shown.set_query(None);
        let shown = shown.to_string();
        if self.others.is_empty() {
            return f.write_str(&shown);
        }
        let start = shown.find("://").map_or(0, |at| at + 3);
        let end = shown[start..]
            .find('/')
            .map_or(shown.len(), |at| start + at);
        let (head, tail) = shown.split_at(end);
        write!(f, "{head},{}{tail}", self.others.join(","))
    }
}

impl fmt::Debug for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg_attr(
    not(any(feature = "embedded", feature = "network")),
    allow(dead_code, reason = "backends read them")
)]
pub(crate) fn percent_decode(text: &str) -> Option<String> {
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
    fn s2_an_endless_url_is_refused_and_not_repeated() {
        let error = parse(&format!("redis://h/{}", "x".repeat(70_000))).unwrap_err();
        assert!(error.to_string().contains("at most 65536"), "{error}");
        assert!(error.to_string().len() < 200);
    }

    #[test]
    fn unknown_schemes_and_options_name_the_known_ones() {
        let error = parse("kafka://h/").unwrap_err().to_string();
        assert!(
            error.contains("\"kafka\"") && error.contains("sqlite:, memory:"),
            "{error}"
        );
        let error = parse("redis-cluster://h/").unwrap_err().to_string();
        assert!(error.contains("redis-sentinel:"), "{error}");
        for (scheme, feature, built) in SCHEMES.iter().filter(|(.., built)| !built) {
            let error = parse(&format!("{scheme}://h/")).unwrap_err().to_string();
            assert!(!built && error.contains(feature), "{error}");
        }
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
    fn several_hosts_are_one_cluster() {
        let (first, others) = split_hosts("amqp://u:p@a:1,b,c:3/v?x=1");
        assert_eq!(first, "amqp://u:p@a:1/v?x=1");
        assert_eq!(others, ["b", "c:3"]);
        let url = BrokerUrl {
            url: Url::parse(&first).unwrap(),
            others,
        };
        assert_eq!(url.to_string(), "amqp://u:***@a:1,b,c:3/v");
        let (first, others) = split_hosts("sqlite:a,b.db");
        assert_eq!((first.as_str(), others.len()), ("sqlite:a,b.db", 0));
    }

    #[test]
    fn s4_a_password_is_never_shown() {
        for text in [
            "amqp://user:hunter2@host/?token=hunter2",
            "amqp://user:hunter2@host:1,b:2/?token=hunter2",
            "nats://hunter2@host",
        ] {
            let (first, others) = split_hosts(text);
            let url = Url::parse(&first).unwrap();
            let url = BrokerUrl { url, others };
            assert!(!format!("{url} {url:?}").contains("hunter2"));
        }
        let error = parse("amqp://user:hunter2@host:port").unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"));
        let error = parse("kafka://user:hunter2@host").unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"));
    }
}
