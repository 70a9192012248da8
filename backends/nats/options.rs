//! What a URL says of the server and of how it is used.

use std::{fmt, time::Duration};

use async_nats::{ConnectOptions, ServerAddr};
use secrecy::{ExposeSecret, SecretString};

use crate::{
    broker_url::BrokerUrl,
    endpoint::{Endpoint, TLS_OPTIONS, Tls},
    error::{Error, ErrorKind, Result},
};

const DEFAULT_PORT: u16 = 4222;

/// The default of the option `takeover`.
const TAKEOVER: Duration = Duration::from_secs(4);

#[derive(Clone)]
pub(super) struct Options {
    pub(super) addresses: Vec<ServerAddr>,
    shown: String,
    user: Option<String>,
    password: Option<SecretString>,
    token: Option<SecretString>,
    tls: Option<Tls>,
    /// The time within which a consumer that vanished is noticed.
    pub(super) takeover: Duration,
    /// How many servers hold each queue; `None`: one, and any number is taken as it is.
    pub(super) replicas: Option<u8>,
    /// The operator vouches for `sync_interval: always`.
    pub(super) assume_sync_always: bool,
}

impl Options {
    pub(super) fn read(url: &BrokerUrl) -> Result<Self> {
        let with_tls = url.scheme() == "tls";
        let mut known = vec!["takeover", "replicas", "assume_sync_always"];
        if with_tls {
            known.extend(TLS_OPTIONS);
        }
        url.only_options(&known)?;
        let endpoint = Endpoint::of(url, DEFAULT_PORT, with_tls)?;
        if endpoint.path.is_some() {
            return Err(Error::new(
                ErrorKind::InvalidUrl,
                format!("{url}: nothing follows the host but options"),
            ));
        }
        let addresses = endpoint.hosts.iter().map(|host| {
            let scheme = if with_tls { "tls" } else { "nats" };
            format!("{scheme}://{host}").parse().map_err(|_| {
                Error::new(
                    ErrorKind::InvalidUrl,
                    format!("{url}: {host} is no address"),
                )
            })
        });
        let addresses = addresses.collect::<Result<_>>()?;
        let takeover = url.option("takeover", "whole seconds from 2 to 300", |value| {
            let seconds = value.parse().ok()?;
            (2..=300)
                .contains(&seconds)
                .then(|| Duration::from_secs(seconds))
        })?;
        let replicas = url.option("replicas", "1, 3 or 5", |value| {
            value
                .parse()
                .ok()
                .filter(|number| matches!(number, 1 | 3 | 5))
        })?;
        let assume_sync_always = url.option("assume_sync_always", "true or false", |value| {
            value.parse().ok()
        })?;
        // A user alone is a token, as everywhere in NATS.
        let (user, password, token) = match (endpoint.user, endpoint.password) {
            (Some(token), None) => (None, None, Some(SecretString::from(token))),
            (user, password) => (user, password, endpoint.token),
        };
        Ok(Self {
            addresses,
            shown: url.to_string(),
            user,
            password,
            token,
            tls: endpoint.tls,
            takeover: takeover.unwrap_or(TAKEOVER),
            replicas,
            assume_sync_always: assume_sync_always.unwrap_or(false),
        })
    }

    /// The URL, without its secrets.
    pub(super) fn shown(&self) -> &str {
        &self.shown
    }

    pub(super) fn apply(&self, mut connect: ConnectOptions) -> Result<ConnectOptions> {
        if let (Some(user), Some(password)) = (&self.user, &self.password) {
            connect = connect.user_and_password(user.clone(), password.expose_secret().into());
        } else if let Some(token) = &self.token {
            connect = connect.token(token.expose_secret().into());
        }
        match &self.tls {
            Some(tls) => super::tls::apply(connect, tls),
            None => Ok(connect),
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("url", &self.shown)
            .field("takeover", &self.takeover)
            .field("replicas", &self.replicas)
            .field("assume_sync_always", &self.assume_sync_always)
            .field("tls", &self.tls)
            .finish_non_exhaustive()
    }
}
