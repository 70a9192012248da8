//! One connection to the server that takes writes: addresses tried in turn, TLS, who we are.

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
    failure::Failure,
    form::text,
    router::{Pushes, Router},
    scripts,
};
use crate::{
    broker_url::BrokerUrl,
    endpoint::{Endpoint, Host, TLS_OPTIONS},
    error::{Error, ErrorKind, Result},
};

/// Where the server is and how it is spoken to.
#[derive(Debug)]
pub(super) struct Dialer {
    clients: Vec<(Host, Client)>,
    with_tls: bool,
    /// How long consumers and lanes outlive their last word, and how long a connection may be silent.
    pub(super) lease: Duration,
}

const DEFAULT_PORT: u16 = 6379;

impl Dialer {
    /// Reads a URL.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidUrl`].
    pub(super) fn of(url: &BrokerUrl) -> Result<Self> {
        let with_tls = url.scheme() == "rediss";
        let mut known = vec!["lease"];
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
        let endpoint = Endpoint::of(url, DEFAULT_PORT, with_tls)?;
        let database = match &endpoint.path {
            None => 0,
            Some(path) => path
                .parse()
                .ok()
                .filter(|number| (0..=i64::from(i32::MAX)).contains(number))
                .ok_or_else(|| {
                    Error::new(
                        ErrorKind::InvalidUrl,
                        format!("{url}: what follows the host is a database's number, such as /0"),
                    )
                })?,
        };
        let clients = endpoint
            .hosts
            .iter()
            .map(|host| Ok((host.clone(), client(&endpoint, host, database)?)))
            .collect::<Result<_>>()?;
        Ok(Self {
            clients,
            with_tls,
            lease: lease.unwrap_or(Duration::from_secs(3)),
        })
    }

    /// A connection to the first of the addresses that answers as a master. The scripts that are used
    /// over it are on their way before all else.
    pub(super) async fn dial(
        &self,
        router: &Arc<Router>,
        listens: bool,
    ) -> Result<(MultiplexedConnection, watch::Receiver<bool>), Failure> {
        let mut failure = Failure::Broken("no address".into());
        // A server that speaks no TLS gives no better reason than that it hung up.
        let over = if self.with_tls { " over TLS" } else { "" };
        for (host, client) in &self.clients {
            let (sender, lost) = watch::channel(false);
            let pushes = Pushes {
                router: Arc::clone(router),
                lost: sender,
            };
            let attempt =
                tokio::time::timeout(self.lease, self.greet(client, pushes, listens)).await;
            match attempt {
                Ok(Ok(connection)) => return Ok((connection, lost)),
                Ok(Err(Failure::Broken(what))) => {
                    failure = Failure::Broken(format!("{host}{over}: {what}"));
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

    async fn greet(
        &self,
        client: &Client,
        pushes: Pushes,
        listens: bool,
    ) -> Result<MultiplexedConnection, Failure> {
        let reply_channel = pushes.router.reply_channel.clone();
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
        setup.cmd("ROLE");
        if listens {
            setup.cmd("SUBSCRIBE").arg(reply_channel);
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
        for answer in answers {
            answered(Ok(answer))?;
        }
        bring_scripts(&connection, listens).await;
        Ok(connection)
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

fn client(endpoint: &Endpoint, host: &Host, database: i64) -> Result<Client> {
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
        let dialer = read("redis://u:p@a:1,b,[::1]:7/3?lease=5s").unwrap();
        let hosts: Vec<_> = dialer.clients.iter().map(|(h, _)| h.to_string()).collect();
        assert_eq!(hosts, ["a:1", "b:6379", "[::1]:7"]);
        assert_eq!(dialer.lease, Duration::from_secs(5));
        for bad in [
            "redis://h/x",
            "redis://h/-1",
            "redis://h/?lease=0s",
            "redis://h/?lease=soon",
            "redis://h/?ca=x",
            "redis://h/?cluster=true",
        ] {
            let error = read(bad).expect_err(bad);
            assert_eq!(*error.kind(), ErrorKind::InvalidUrl, "{bad}");
        }
    }

    #[test]
    fn s4_a_password_is_never_shown() {
        let dialer = read("redis://u:hunter2@h").unwrap();
        assert!(!format!("{dialer:?}").contains("hunter2"));
    }
}
