//! Credentials of machines: made for those whose record says that there may be one, and taken back with
//! their queue.

use std::time::Duration;

use crate::{
    credential::GuestCredential,
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    names::{GuestAddress, GuestId},
    workflow::{
        record::{Record, State},
        taskmanager::{Inner, OPERATION, Taskmanager, may_serve, no_record},
    },
};

/// How soon it is looked again whether a queue was made.
const AGAIN: Duration = Duration::from_millis(50);

impl Taskmanager {
    /// Makes the credential of a guest's newest machine, or replaces it: what goes into the machine's
    /// metadata. The guest was provisioned with
    /// [`Provision::with_credential`](crate::Provision::with_credential), so that the credential is
    /// revoked when the machine is given up, whatever crashes meanwhile. Waits a moment for a queue that is
    /// about to be made.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a guest without a record, or provisioned without a credential;
    /// [`ErrorKind::Revoked`] if the machine was given up, also meanwhile: then nothing is left of it; those of
    /// [`Broker::issue_credential`](crate::Broker::issue_credential).
    ///
    /// # Cancel safety
    /// Dropped early, there may be one that nobody knows: issue it again, or leave it to be revoked with
    /// the machine.
    pub async fn issue_credential(&self, guest: &GuestId) -> Result<GuestCredential> {
        let inner = &self.inner;
        let patience = Deadline::after(OPERATION);
        loop {
            let record = self.servable(guest).await?;
            if !record.credential {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!(
                        "{guest} was provisioned without a credential, and one made now would outlive it: \
                         provision it with one"
                    ),
                ));
            }
            let address = &record.address;
            let issued = inner
                .broker
                .issue_credential(address, &inner.reports, Deadline::after(OPERATION))
                .await;
            match issued {
                Err(error)
                    if *error.kind() == ErrorKind::NoQueue
                        && record.state == State::Planned
                        && !patience.has_passed() =>
                {
                    tokio::time::sleep(AGAIN).await;
                }
                issued => {
                    // It may have been given up meanwhile, and its credential have been looked for before.
                    let still = self.servable(guest).await;
                    return match still {
                        Ok(now) if now.address == *address => issued,
                        still => {
                            inner.revoke_its_credential(address).await?;
                            still.and_then(|_| Err(given_up(address)))
                        }
                    };
                }
            }
        }
    }

    /// Takes the credential of a guest's newest machine back. Ok: nobody connects with it any more. The
    /// machine's provisioning is left as it is.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a guest without a record; those of
    /// [`Broker::revoke_credential`](crate::Broker::revoke_credential).
    ///
    /// # Cancel safety
    /// Dropped early, it may or may not be good; calling again is right.
    pub async fn revoke_credential(&self, guest: &GuestId) -> Result<()> {
        let record = self.record(guest).await?.ok_or_else(|| no_record(guest))?;
        let deadline = Deadline::after(OPERATION);
        self.inner
            .broker
            .revoke_credential(&record.address, deadline)
            .await
    }

    /// The record of a machine that is not given up.
    async fn servable(&self, guest: &GuestId) -> Result<Record> {
        let record = self.record(guest).await?.ok_or_else(|| no_record(guest))?;
        if may_serve(&record) && record.state != State::Revoking {
            return Ok(record);
        }
        Err(given_up(&record.address))
    }
}

fn given_up(address: &GuestAddress) -> Error {
    Error::new(
        ErrorKind::Revoked,
        format!("{address} was given up: it gets no credential"),
    )
}

impl Inner {
    /// Takes a machine's credential back, if its guest's record says that there may be one.
    pub(super) async fn revoke_its_credential(&self, address: &GuestAddress) -> Result<()> {
        let newest = self.records.newest(&address.guest).await?;
        if newest.is_none_or(|record| !record.credential) {
            return Ok(());
        }
        let deadline = Deadline::after(OPERATION);
        match self.broker.revoke_credential(address, deadline).await {
            // Then none was issued.
            Err(error) if *error.kind() == ErrorKind::Unsupported => Ok(()),
            revoked => revoked,
        }
    }

    /// Takes those back that are left of machines that were given up before a crash.
    pub(super) async fn sweep_credentials(&self) -> Result<()> {
        let records = self.records.list().await?;
        let given_up: Vec<_> = records
            .into_iter()
            .filter(|record| record.credential && record.state.is_terminal() && !may_serve(record))
            .collect();
        if given_up.is_empty() {
            return Ok(());
        }
        let issued = match self.broker.credentials(Deadline::after(OPERATION)).await {
            Err(error) if *error.kind() == ErrorKind::Unsupported => return Ok(()),
            issued => issued?,
        };
        for record in given_up {
            if issued.contains(&record.address.queue()) {
                self.revoke_its_credential(&record.address).await?;
            }
        }
        Ok(())
    }
}
