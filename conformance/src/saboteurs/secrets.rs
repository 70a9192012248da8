//! Saboteurs of section S.

use async_trait::async_trait;
use wilco::{Deadline, GuestAddress, Result};

use super::wrap::{Inner, Sabotage};

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
