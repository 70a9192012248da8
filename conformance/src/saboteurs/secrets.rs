//! Saboteurs of section S.

use async_trait::async_trait;
use secrecy::ExposeSecret as _;
use url::Url;
use wilco::{
    Deadline, ErrorKind, GuestAddress, GuestCredential, QueueName, Result,
    broker::{ConsumeOptions, Consumer},
};

use super::{
    consume::{consume, dropping},
    wrap::{Inner, Sabotage},
};

/// Says that a credential was taken back, and leaves it good.
#[derive(Debug, Default)]
pub(super) struct RevokesNothing;

#[async_trait]
impl Sabotage for RevokesNothing {
    async fn revoke_credential(
        &self,
        _inner: &Inner,
        _address: &GuestAddress,
        _by: Deadline,
    ) -> Result<()> {
        Ok(())
    }
}

/// Gives to each guest the user that every RabbitMQ begins with, who may do everything.
#[derive(Debug, Default)]
pub(super) struct GivesAwayAllRights;

#[async_trait]
impl Sabotage for GivesAwayAllRights {
    async fn issue_credential(
        &self,
        inner: &Inner,
        address: &GuestAddress,
        reports: &QueueName,
        by: Deadline,
    ) -> Result<GuestCredential> {
        let issued = inner.issue_credential(address, reports, by).await?;
        let odd = || wilco::Error::new(ErrorKind::InvalidUrl, "the credential's URL is none");
        let mut url = Url::parse(issued.url().expose_secret()).map_err(|_| odd())?;
        url.set_username("guest").map_err(|()| odd())?;
        url.set_password(Some("guest")).map_err(|()| odd())?;
        Ok(GuestCredential::new(address.clone(), url).with_right("everything"))
    }
}

consume!(
    /// Takes out of the queue what has no kind that could be read, and shows it to nobody.
    DropsWhatItCannotRead {},
    |this, inner, queue, options, by| {
        Ok(dropping(inner.consume(queue, options, by).await?, |delivery| {
            delivery.message.kind.as_str() == "unknown"
        }))
    }
);
