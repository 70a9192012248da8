//! One connection to the server that takes writes: addresses tried in turn, or the one that sentinels
//! name; TLS, who we are.

use std::{sync::Arc, time::Duration};

use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, IntoConnectionInfo, ProtocolVersion,
    RedisConnectionInfo, Value,
    aio::MultiplexedConnection,
    io::tcp::{TcpSettings, socket2::TcpKeepalive},
};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::sync::watch;

use super::{
    copies::{NOBODY, Wanted},
    failure::Failure,
    form::text,
    guest,
    router::{Pushes, Router},
    scripts::{self, Calls},
    sentinel::{Sentinels, Word},
};
use crate::{
    broker_url::BrokerUrl,
    endpoint::{Endpoint, Host, TLS_OPTIONS},
    error::{Error, ErrorKind, Result},
    guest_url::{AsGuest, GUEST_OPTIONS},
};

/// Where the server is and how it is spoken to.
#[derive(Debug)]
pub(super) struct Dialer {
    way: Way,
    with_tls: bool,
    /// How long consumers and lanes outlive their last word, and how long a connection may be silent.
    pub(super) lease: Duration,
    /// How many replicas have what is confirmed; 0: none is waited for.
    pub(super) replicas: u32,
    /// Set where this handle has a guest's credential.
    pub(super) guest: Option<AsGuest>,
    pub(super) url: BrokerUrl,
    /// How many addresses there are, and which database.
    pub(super) hosts: usize,
    pub(super) database: i64,
}

/// How the server that takes writes is found.
#[derive(Debug)]
enum Way {
    Addresses(Vec<(Host, Client)>),
    Sentinels(Box<Sentinels>),
}

/// A connection that was made.
pub(super) struct Dialed {
    pub(super) connection: MultiplexedConnection,
    /// Turns true when it breaks.
    pub(super) broken: watch::Receiver<bool>,
    pub(super) host: Host,
    /// The copies that are waited for.
    pub(super) copies: Option<Wanted>,
}

const DEFAULT_PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

/// More replicas than a server has in earnest.
const MOST_REPLICAS: u32 = 16;

impl Dialer {
    /// Reads a URL.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidUrl`].
    pub(super) fn of(url: &BrokerUrl) -> Result<Self> {
        let with_tls = url.scheme().starts_with("rediss");
        let by_sentinels = url.scheme().ends_with("-sentinel");
        let mut known = vec!["lease", "replicas"];
        known.extend(GUEST_OPTIONS);
        if with_tls {
            known.extend(TLS_OPTIONS);
        }
        url.only_options(&known)?;
        let lease = url.option("lease", "a time from 1s to 60s, such as 3s", |text| {
            let lease = humantime::parse_duration(text).ok()?;
            (Duration::from_secs(1)..=Duration::from_secs(60))
                .contains(&lease)
                .then_some(lease)
        })?;
        let replicas = url.option("replicas", "a number from 0 to 16", |text| {
            text.parse().ok().filter(|number| *number <= MOST_REPLICAS)
        })?;
        let (way, database, hosts) = if by_sentinels {
            let endpoint = Endpoint::of(url, SENTINEL_PORT, with_tls)?;
            let path = endpoint.path.clone().unwrap_or_default();
            let (name, database) = path.split_once('/').unwrap_or((&path, ""));
            if name.is_empty() {
                return Err(Error::new(
                    ErrorKind::InvalidUrl,
                    format!(
                        "{url}: what follows the sentinels is the master's name among them, such as /mymaster"
                    ),
                ));
            }
            let database = database_of(url, Some(database).filter(|text| !text.is_empty()))?;
            let hosts = endpoint.hosts.len();
            let sentinels = Sentinels::of(endpoint.clone(), name, database)?;
            (Way::Sentinels(Box::new(sentinels)), database, hosts)
        } else {
            let endpoint = Endpoint::of(url, DEFAULT_PORT, with_tls)?;
            let database = database_of(url, endpoint.path.as_deref())?;
            let clients = endpoint
                .hosts
                .iter()
                .map(|host| Ok((host.clone(), client(&endpoint, host, database)?)));
            let way = Way::Addresses(clients.collect::<Result<_>>()?);
            (way, database, endpoint.hosts.len())
        };
        Ok(Self {
            way,
            with_tls,
            lease: lease.unwrap_or(Duration::from_secs(3)),
            replicas: replicas.unwrap_or(0),
            guest: AsGuest::of(url)?,
            url: url.clone(),
            hosts,
            database,
        })
    }

    /// How steps are called over its connections.
    pub(super) fn calls(&self) -> Calls {
        match &self.guest {
            None => Calls::Scripts,
            Some(_) => Calls::Functions,
        }
    }

    /// A connection to the first of the addresses that answers as a master, or to the master that the
    /// sentinels name. The scripts that are used over it are on their way before all else.
    pub(super) async fn dial(
        &self,
        router: &Arc<Router>,
        listens: bool,
    ) -> Result<Dialed, Failure> {
        let clients = match &self.way {
            Way::Addresses(clients) => clients,
            Way::Sentinels(sentinels) => {
                let master = sentinels.ask(self.lease).await?.master;
                let client = sentinels
                    .master_client(&master)
                    .map_err(|error| Failure::Broken(error.to_string()))?;
                &vec![(master, client)]
            }
        };
        let mut failure = Failure::Broken("no address".into());
        // A server that speaks no TLS gives no better reason than that it hung up.
        let over = if self.with_tls { " over TLS" } else { "" };
        for (host, client) in clients {
            let (sender, broken) = watch::channel(false);
            let pushes = Pushes {
                router: Arc::clone(router),
                lost: sender,
            };
            let attempt =
                tokio::time::timeout(self.lease, self.greet(client, pushes, listens)).await;
            match attempt {
                Ok(Ok((connection, copies))) => {
                    return Ok(Dialed {
                        connection,
                        broken,
                        host: host.clone(),
                        copies,
                    });
                }
                Ok(Err(Failure::Broken(what))) => {
                    // One that speaks no TLS waits for more of a line that never ends.
                    let hint = match self.with_tls && what.contains("timed out") {
                        true => "; a server that speaks no TLS at this port says nothing either",
                        false => "",
                    };
                    failure = Failure::Broken(format!("{host}{over}: {what}{hint}"));
                }
                Ok(Err(refused)) => {
                    let auth = *refused.error().kind() == ErrorKind::AuthRefused;
                    failure = refused;
                    if auth {
                        break;
                    }
                }
                Err(_) => {
                    failure =
                        Failure::Broken(format!("{host}{over}: no answer in {:?}", self.lease));
                }
            }
        }
        Err(failure)
    }

    /// What the sentinels say of the master now. None: there are none, or none answers.
    pub(super) async fn word(&self) -> Option<Word> {
        match &self.way {
            Way::Addresses(_) => None,
            Way::Sentinels(sentinels) => sentinels.ask(self.lease).await.ok(),
        }
    }

    pub(super) fn has_sentinels(&self) -> bool {
        matches!(self.way, Way::Sentinels(_))
    }

    /// Whether the sentinels have made another server the master.
    pub(super) async fn is_superseded(&self, host: &Host) -> bool {
        self.word().await.is_some_and(|word| word.master != *host)
    }

    async fn greet(
        &self,
        client: &Client,
        pushes: Pushes,
        listens: bool,
    ) -> Result<(MultiplexedConnection, Option<Wanted>), Failure> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.lease))
            // Each call is bound by its own deadline, and the whole by `link`: the default of 500 ms
            // would give up what a slow disk still does.
            .set_response_timeout(None)
            .set_pipeline_buffer_size(1024)
            .set_push_sender(pushes);
        let mut connection = client
            .get_multiplexed_async_connection_with_config(&config)
            .await
            .map_err(|error| Failure::of(&error))?;
        // All in one round trip: a far server is slow enough without more.
        let mut setup = redis::pipe();
        if self.guest.is_none() {
            setup.cmd("ROLE");
        } else {
            // It may not ask.
            setup.cmd("PING");
        }
        if self.replicas > 0 {
            // Whether this user may ask, and whether the server can say more.
            setup.cmd("PUBLISH").arg(self.nobody()).arg("");
            setup.cmd("WAIT").arg(0).arg(1);
            setup.cmd("WAITAOF").arg(1).arg(0).arg(1);
        }
        let answers = all(&mut connection, &setup).await?;
        let mut answers = answers.into_iter();
        // A user may not be allowed to ask; a replica refuses the first write then.
        if let Some(Value::Array(role)) = answers.next()
            && let Some(role) = role.into_iter().next().and_then(text)
            && role != "master"
        {
            return Err(Failure::Broken(format!("it is no master but a {role}")));
        }
        let mut copies = None;
        if self.replicas > 0 {
            for answer in answers.by_ref().take(2) {
                answered(Ok(answer))?;
            }
            // Not before 7.2, and not without an append-only file.
            let can_say = matches!(answers.next(), Some(Value::Array(_)));
            copies = Some(Wanted {
                replicas: self.replicas,
                // Settlements have to outlive the loss of a node, and do not hold up what else goes
                // over their connection until disks have them.
                on_disk: can_say && !listens,
            });
        }
        for answer in answers {
            answered(Ok(answer))?;
        }
        if self.guest.is_none() {
            bring_scripts(&connection, listens).await;
        }
        Ok((connection, copies))
    }

    /// A channel to which nobody listens: replicas are told of what is sent there all the same.
    pub(super) fn nobody(&self) -> String {
        match &self.guest {
            None => NOBODY.into(),
            Some(guest) => guest::nobody(guest),
        }
    }
}

/// Sends the scripts ahead and does not wait for the answers, which take long on a slow line. What
/// follows on this connection finds them: two batches of one queue never come to a server that knows
/// neither, and so keep their order (P8). A refusal is seen by the first that needs a script.
async fn bring_scripts(connection: &MultiplexedConnection, listens: bool) {
    let only = (!listens).then_some(&*scripts::PUBLISH);
    let mut connection = connection.clone();
    let mut sent = Box::pin(async move { all(&mut connection, &scripts::load(only)).await });
    if futures_util::future::poll_immediate(&mut sent)
        .await
        .is_none()
    {
        tokio::spawn(sent);
    }
}

/// The answers to a pipeline, refusals among them.
pub(super) async fn all(
    connection: &mut MultiplexedConnection,
    pipeline: &redis::Pipeline,
) -> Result<Vec<Value>, Failure> {
    let sent = connection.send_packed_commands(pipeline, 0, pipeline.len());
    sent.await.map_err(|error| Failure::of(&error))
}

/// An answer that is no refusal.
pub(super) fn answered(answer: redis::RedisResult<Value>) -> Result<Value, Failure> {
    match answer {
        Ok(Value::ServerError(error)) => Err(Failure::refused(&error)),
        Ok(value) => Ok(value),
        Err(error) => Err(Failure::of(&error)),
    }
}

fn database_of(url: &BrokerUrl, path: Option<&str>) -> Result<i64> {
    let Some(path) = path else {
        return Ok(0);
    };
    let number = path.parse().ok();
    number
        .filter(|number| (0..=i64::from(i32::MAX)).contains(number))
        .ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidUrl,
                format!("{url}: what comes last is a database's number, such as /0"),
            )
        })
}

pub(super) fn client(endpoint: &Endpoint, host: &Host, database: i64) -> Result<Client> {
    let addr = if endpoint.tls.is_some() {
        ConnectionAddr::TcpTls {
            host: host.name.clone(),
            port: host.port,
            insecure: false,
            tls_params: None,
        }
    } else {
        ConnectionAddr::Tcp(host.name.clone(), host.port)
    };
    let mut who = RedisConnectionInfo::default()
        // Pushes beside answers on one connection.
        .set_protocol(ProtocolVersion::RESP3)
        .set_db(database)
        .set_lib_name("wilco", env!("CARGO_PKG_VERSION"));
    if let Some(user) = &endpoint.user {
        who = who.set_username(user);
    }
    let password: Option<&SecretString> = endpoint.password.as_ref().or(endpoint.token.as_ref());
    if let Some(password) = password {
        who = who.set_password(password.expose_secret());
    }
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(5))
        .with_interval(Duration::from_secs(2));
    let tcp = TcpSettings::default()
        .set_nodelay(true)
        .set_keepalive(keepalive);
    let invalid =
        |error: redis::RedisError| Error::new(ErrorKind::InvalidUrl, format!("{host}: {error}"));
    let info = addr
        .into_connection_info()
        .map_err(invalid)?
        .set_redis_settings(who)
        .set_tcp_settings(tcp);
    open(info, endpoint).map_err(invalid)
}

#[cfg(feature = "tls")]
fn open(info: redis::ConnectionInfo, endpoint: &Endpoint) -> redis::RedisResult<Client> {
    let Some(tls) = &endpoint.tls else {
        return Client::open(info);
    };
    // The client takes the process's provider and panics where there is none.
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
    let certificates = redis::TlsCertificates {
        client_tls: tls
            .identity
            .as_ref()
            .map(|identity| redis::ClientTlsConfig {
                client_cert: identity.certificate.clone(),
                client_key: identity.key.clone(),
            }),
        root_cert: tls.authorities.clone(),
    };
    Client::build_with_tls(info, certificates)
}

#[cfg(not(feature = "tls"))]
fn open(info: redis::ConnectionInfo, _: &Endpoint) -> redis::RedisResult<Client> {
    Client::open(info)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str) -> Result<Dialer> {
        Dialer::of(&url.parse()?)
    }

    #[test]
    fn urls_are_read_strictly() {
        let dialer = read("redis://u:p@a:1,b,[::1]:7/3?lease=5s&replicas=2").unwrap();
        let Way::Addresses(clients) = &dialer.way else {
            panic!("no sentinels were named");
        };
        let hosts: Vec<_> = clients.iter().map(|(host, _)| host.to_string()).collect();
        assert_eq!(hosts, ["a:1", "b:6379", "[::1]:7"]);
        assert_eq!(dialer.lease, Duration::from_secs(5));
        assert_eq!(dialer.replicas, 2);
        for bad in [
            "redis://h/x",
            "redis://h/-1",
            "redis://h/?lease=0s",
            "redis://h/?lease=soon",
            "redis://h/?replicas=-1",
            "redis://h/?replicas=17",
            "redis://h/?ca=x",
            "redis://h/?guest=wilco.q.a.1",
            "redis://h/?guest=x&reports=wilco.r.main",
            "redis://h/?guest=wilco.q.a.1&reports=wilco.q.b.1",
            "redis://h/?cluster=true",
            "redis-sentinel://h",
            "redis-sentinel://h//3",
            "redis-sentinel://h/m/x",
            "redis-sentinel://h,b:x/m",
        ] {
            let error = read(bad).expect_err(bad);
            assert_eq!(*error.kind(), ErrorKind::InvalidUrl, "{bad}");
        }
        let dialer = read("redis-sentinel://u:p@a,b:1/mymaster/3").unwrap();
        assert!(dialer.has_sentinels());
    }

    #[test]
    fn s4_a_password_is_never_shown() {
        for url in ["redis://u:hunter2@h", "redis-sentinel://u:hunter2@h/m"] {
            let dialer = read(url).unwrap();
            assert!(!format!("{dialer:?}").contains("hunter2"));
        }
    }
}
