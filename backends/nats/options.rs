//! What a URL says of the server and of how it is used.

use std::{fmt, fs, path::PathBuf, time::Duration};

use async_nats::{ConnectOptions, ServerAddr};
use secrecy::{ExposeSecret, SecretString};

use super::guest::Guest;
use crate::{
    broker_url::BrokerUrl,
    endpoint::{Endpoint, TLS_OPTIONS, Tls},
    error::{Error, ErrorKind, Result},
    guest_url::{AsGuest, GUEST_OPTIONS},
};

const DEFAULT_PORT: u16 = 4222;

/// The default of the option `expires`, and the most that it can be.
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// The default of the option `takeover`.
const TAKEOVER: Duration = Duration::from_secs(4);

#[derive(Clone)]
pub(super) struct Options {
    pub(super) addresses: Vec<ServerAddr>,
    pub(super) url: BrokerUrl,
    /// A file with who we are, and with the keys by which guests' credentials are made and taken back.
    pub(super) creds: Option<SecretString>,
    pub(super) signing_key: Option<SecretString>,
    pub(super) operator_key: Option<SecretString>,
    pub(super) system_creds: Option<SecretString>,
    /// How long a credential is good.
    pub(super) expires: Duration,
    /// Set where this handle has a guest's credential.
    pub(super) guest: Option<Guest>,
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
        let mut known = vec![
            "takeover",
            "replicas",
            "assume_sync_always",
            "creds",
            "signing_key",
            "operator_key",
            "system_creds",
            "expires",
        ];
        known.extend(GUEST_OPTIONS);
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
        let secret = |option: &str| -> Result<Option<SecretString>> {
            let path = url.option(option, "the path of a file", |path| {
                (!path.is_empty()).then(|| PathBuf::from(path))
            })?;
            let read = |path: PathBuf| {
                let text = fs::read_to_string(&path).map_err(|error| {
                    let path = path.display();
                    Error::new(
                        ErrorKind::InvalidUrl,
                        format!("option {option}: {path} cannot be read: {error}"),
                    )
                });
                text.map(SecretString::from)
            };
            path.map(read).transpose()
        };
        let expires = url.option("expires", "a time up to 365d, such as 30d", |text| {
            let expires = humantime::parse_duration(text).ok()?;
            (Duration::from_secs(1)..=YEAR)
                .contains(&expires)
                .then_some(expires)
        })?;
        // A user alone is a token, as everywhere in NATS.
        let (user, password, token) = match (endpoint.user, endpoint.password) {
            (Some(token), None) => (None, None, Some(SecretString::from(token))),
            (user, password) => (user, password, endpoint.token),
        };
        Ok(Self {
            addresses,
            url: url.clone(),
            creds: secret("creds")?,
            signing_key: secret("signing_key")?,
            operator_key: secret("operator_key")?,
            system_creds: secret("system_creds")?,
            expires: expires.unwrap_or(YEAR),
            guest: AsGuest::of(url)?.map(Guest),
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

    pub(super) fn with_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// The URL, without its secrets.
    pub(super) fn shown(&self) -> &str {
        &self.shown
    }

    pub(super) fn apply(&self, mut connect: ConnectOptions) -> Result<ConnectOptions> {
        if let Some(guest) = &self.guest {
            connect = connect.custom_inbox_prefix(guest.inbox());
        }
        if let Some(creds) = &self.creds {
            return self.apply_as(connect, creds);
        }
        if let (Some(user), Some(password)) = (&self.user, &self.password) {
            connect = connect.user_and_password(user.clone(), password.expose_secret().into());
        } else if let Some(token) = &self.token {
            connect = connect.token(token.expose_secret().into());
        }
        self.apply_tls(connect)
    }

    /// The same for the user of a credentials file.
    pub(super) fn apply_as(
        &self,
        connect: ConnectOptions,
        creds: &SecretString,
    ) -> Result<ConnectOptions> {
        let connect = connect.credentials(creds.expose_secret()).map_err(|_| {
            Error::new(
                ErrorKind::InvalidUrl,
                "option creds: the file has no user's claims and key in NATS's form",
            )
        })?;
        self.apply_tls(connect)
    }

    fn apply_tls(&self, connect: ConnectOptions) -> Result<ConnectOptions> {
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
