//! What stands for signatures where the feature `sign` is off: values that nobody can make.

use serde::{Deserialize, Serialize};

use crate::{error::Result, message::Message, names::GuestAddress, wire::RemoteError};

#[derive(Debug)]
pub(crate) enum Signer {}

impl Signer {
    pub(crate) fn command_expires(&self, _: u64) -> u64 {
        match *self {}
    }

    pub(crate) fn sign(
        &self,
        _: &GuestAddress,
        _: Message,
        _: (u64, u64),
        _: u32,
    ) -> Result<Message> {
        match *self {}
    }

    pub(crate) fn sign_ask(
        &self,
        _: &GuestAddress,
        _: &str,
        _: (u64, u64),
        _: u32,
    ) -> AskSignature {
        match *self {}
    }

    pub(crate) fn is_ours(&self, _: &GuestAddress, _: &Message, _: u32) -> bool {
        match *self {}
    }
}

#[derive(Debug)]
pub(crate) enum Guard {}

#[derive(Debug)]
pub(crate) enum Stamp {}

/// Whatever it is: who sends it signs, and nobody here can check that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AskSignature {}

#[allow(dead_code, reason = "without signatures everything comes in time")]
pub(crate) enum Time {
    Valid,
    Expired,
    Unknown,
}

impl Guard {
    pub(crate) fn check(
        &self,
        _: &GuestAddress,
        _: &Message,
        _: u32,
    ) -> Result<Stamp, RemoteError> {
        match *self {}
    }

    pub(crate) fn check_ask(
        &self,
        _: &GuestAddress,
        _: &str,
        _: Option<&AskSignature>,
        _: u32,
    ) -> Result<(), RemoteError> {
        match *self {}
    }

    pub(crate) fn time(&self, _: &Stamp) -> Time {
        match *self {}
    }

    pub(crate) async fn time_told(&self) {
        match *self {}
    }
}

pub(crate) fn expired() -> RemoteError {
    RemoteError::new("expired", "signed for a time that has passed")
}

/// The kinds of refusal that are about signatures: a guest that can check may send them.
pub(crate) const REFUSALS: [&str; 4] = ["unsigned", "unknown_key", "forged", "expired"];
