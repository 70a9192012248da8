//! The broker's administration over HTTP: users and their rights, which AMQP knows nothing of.

use std::{fmt, sync::Arc};

use base64::Engine as _;
use secrecy::ExposeSecret as _;
use serde_json::Value;
use url::Url;

use super::connection::Core;
use crate::{
    broker_url::BrokerUrl,
    deadline::Deadline,
    endpoint::{Endpoint, Tls},
    error::{Error, ErrorKind, Result},
};

/// Where the administration is.
pub(super) struct Management {
    at: Url,
    broker: Url,
    others: Vec<String>,
}

/// The broker's URL has a password (law S4).
impl fmt::Debug for Management {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Management")
            .field("at", &self.at.as_str())
            .finish_non_exhaustive()
    }
}

impl Management {
    /// From the option `management`; else at its own port beside the broker.
    pub(super) fn of(url: &BrokerUrl) -> Result<Self> {
        let expected = "the root of RabbitMQ's management plug-in, such as http://host:15672, without \
                        user and password";
        let given = url.option("management", expected, |text| {
            Url::parse(text).ok().filter(|at| {
                matches!(at.scheme(), "http" | "https")
                    && at.has_host()
                    && at.username().is_empty()
                    && at.password().is_none()
            })
        })?;
        let host = url.parts().host_str().unwrap_or("localhost");
        let at = match given {
            Some(at) => at,
            None => {
                let beside = if url.scheme() == "amqps" {
                    format!("https://{host}:15671")
                } else {
                    format!("http://{host}:15672")
                };
                Url::parse(&beside).map_err(|_| {
                    Error::new(ErrorKind::InvalidUrl, format!("{url}: {host:?} is no host"))
                })?
            }
        };
        if at.scheme() == "https" && cfg!(not(feature = "tls")) {
            return Err(Error::new(
                ErrorKind::InvalidUrl,
                "this build of wilco has no https:; build it with the Cargo feature tls",
            ));
        }
        Ok(Self {
            at,
            broker: url.parts().clone(),
            others: url.others().to_vec(),
        })
    }

    /// The broker's URL, of its first host.
    pub(super) fn broker(&self) -> &Url {
        &self.broker
    }

    /// The URL with the cluster's further hosts.
    pub(super) fn with_others(&self, url: &Url) -> String {
        let text = url.as_str();
        if self.others.is_empty() {
            return text.to_owned();
        }
        let start = text.find("://").map_or(0, |at| at + 3);
        let end = text[start..]
            .find(['/', '?'])
            .map_or(text.len(), |at| start + at);
        format!("{},{}{}", &text[..end], self.others.join(","), &text[end..])
    }

    pub(super) async fn get(
        &self,
        core: &Core,
        place: &[&str],
        deadline: Deadline,
    ) -> Result<Value> {
        self.ask(core, "GET", place, None, deadline).await
    }

    pub(super) async fn put(
        &self,
        core: &Core,
        place: &[&str],
        body: Value,
        deadline: Deadline,
    ) -> Result<()> {
        self.ask(core, "PUT", place, Some(body), deadline)
            .await
            .map(drop)
    }

    /// Ok too if it is not there.
    pub(super) async fn delete(
        &self,
        core: &Core,
        place: &[&str],
        deadline: Deadline,
    ) -> Result<()> {
        self.ask(core, "DELETE", place, None, deadline)
            .await
            .map(drop)
    }

    async fn ask(
        &self,
        core: &Core,
        method: &'static str,
        place: &[&str],
        body: Option<Value>,
        deadline: Deadline,
    ) -> Result<Value> {
        if core.own.is_some() {
            return Err(Error::new(
                ErrorKind::AuthRefused,
                "this is a guest's own credential, which issues no others",
            ));
        }
        core.open()?;
        let mut url = self.at.clone();
        url.path_segments_mut()
            .map_err(|()| Error::new(ErrorKind::InvalidUrl, "the management URL has no path"))?
            .pop_if_empty()
            .push("api")
            .extend(place);
        let (at, endpoint) = (self.at.to_string(), Arc::clone(&core.endpoint));
        // It does not wait past the deadline by itself either.
        let asked = tokio::task::spawn_blocking(move || {
            let agent = agent(&endpoint, deadline)?;
            send(&agent, &endpoint, method, url.as_str(), body, &at)
        });
        let asked = tokio::select! {
            asked = deadline.bound(asked) => asked?,
            () = core.until_closed() => return Err(super::closed()),
        };
        asked.map_err(|error| Error::new(ErrorKind::Internal, error.to_string()))?
    }
}

fn agent(endpoint: &Endpoint, deadline: Deadline) -> Result<ureq::Agent> {
    let config = ureq::Agent::config_builder()
        .timeout_global(Some(deadline.remaining()))
        .http_status_as_error(false)
        .proxy(None)
        .max_redirects(0);
    let config = match &endpoint.tls {
        Some(tls) => with_tls(config, tls)?,
        None => config,
    };
    Ok(config.build().new_agent())
}

type Config = ureq::config::ConfigBuilder<ureq::typestate::AgentScope>;

#[cfg(not(feature = "tls"))]
fn with_tls(config: Config, _tls: &Tls) -> Result<Config> {
    Ok(config)
}

/// The same authorities and the same certificate as for AMQP.
#[cfg(feature = "tls")]
fn with_tls(config: Config, tls: &Tls) -> Result<Config> {
    use ureq::tls::{ClientCert, PemItem, RootCerts, TlsConfig, TlsProvider, parse_pem};
    let bad = |what: &str| {
        Error::new(
            ErrorKind::InvalidUrl,
            format!("option {what} is no PEM file"),
        )
    };
    let items = |pem: &[u8], what| {
        parse_pem(pem)
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(|_| bad(what))
    };
    let certificates = |pem: &[u8], what| -> Result<Vec<_>> {
        Ok(items(pem, what)?
            .into_iter()
            .filter_map(|item| match item {
                PemItem::Certificate(certificate) => Some(certificate),
                _ => None,
            })
            .collect())
    };
    let roots = match &tls.authorities {
        Some(pem) => RootCerts::Specific(Arc::new(certificates(pem, "ca")?)),
        None => RootCerts::PlatformVerifier,
    };
    let identity = match &tls.identity {
        Some(identity) => {
            let key = items(&identity.key, "key")?
                .into_iter()
                .find_map(|item| match item {
                    PemItem::PrivateKey(key) => Some(key),
                    _ => None,
                });
            let key = key.ok_or_else(|| bad("key"))?;
            let chain = certificates(&identity.certificate, "cert")?;
            Some(ClientCert::new_with_certs(&chain, key))
        }
        None => None,
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .unversioned_rustls_crypto_provider(provider)
        .root_certs(roots)
        .client_cert(identity)
        .build();
    Ok(config.tls_config(tls))
}

fn send(
    agent: &ureq::Agent,
    endpoint: &Endpoint,
    method: &'static str,
    url: &str,
    body: Option<Value>,
    at: &str,
) -> Result<Value> {
    let user = endpoint.user.as_deref().unwrap_or("guest");
    let password = endpoint.password.as_ref();
    let password = password.map_or("guest", |password| password.expose_secret());
    let basic = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    let request = ureq::http::Request::builder()
        .method(method)
        .uri(url)
        .header("authorization", format!("Basic {basic}"))
        .header("content-type", "application/json");
    let unreachable = |error: ureq::Error| {
        Error::new(
            ErrorKind::BrokerUnreachable,
            format!(
                "RabbitMQ's administration at {at} cannot be reached: {error}; credentials need the \
                 plug-in rabbitmq_management, and the option management= where it is not at its usual port"
            ),
        )
    };
    let internal = |error: ureq::http::Error| Error::new(ErrorKind::Internal, error.to_string());
    let mut answer = match body {
        Some(body) => agent.run(request.body(body.to_string()).map_err(internal)?),
        None => agent.run(request.body(()).map_err(internal)?),
    }
    .map_err(unreachable)?;
    let status = answer.status().as_u16();
    let text = answer.body_mut().with_config().limit(64 * 1024 * 1024);
    let text = text.read_to_string().map_err(unreachable)?;
    match status {
        200..=299 if text.is_empty() => Ok(Value::Null),
        200..=299 => serde_json::from_str(&text).map_err(|error| {
            Error::new(
                ErrorKind::BrokerRefused,
                format!("RabbitMQ's administration at {at} answers with no JSON: {error}"),
            )
        }),
        404 if method == "DELETE" => Ok(Value::Null),
        401 | 403 => Err(Error::new(
            ErrorKind::AuthRefused,
            format!(
                "RabbitMQ's administration at {at} does not let this user make users: give it the tag \
                 administrator"
            ),
        )),
        status => Err(Error::new(
            ErrorKind::BrokerRefused,
            format!("RabbitMQ's administration at {at} refuses {method}: status {status}"),
        )),
    }
}
