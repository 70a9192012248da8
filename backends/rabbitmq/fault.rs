//! What the client says went wrong, sorted by what can be done about it.

use crate::error::{Error, ErrorKind};

/// Why a step on the broker failed.
#[derive(Debug)]
pub(super) enum Fault {
    /// The channel or the connection is gone: whether the step was done is not known, and it can be
    /// tried again on the next.
    Lost(String),
    /// The broker refused the step, with this code.
    Amqp(u16, String),
    /// It is over.
    Final(Error),
}

impl Fault {
    pub(super) fn code(&self) -> Option<u16> {
        match self {
            Self::Amqp(code, _) => Some(*code),
            _ => None,
        }
    }

    /// As an error for the caller, who waits no longer.
    pub(super) fn error(self) -> Error {
        match self {
            Self::Lost(why) => Error::new(
                ErrorKind::BrokerUnreachable,
                format!("the connection broke: {why}"),
            ),
            Self::Amqp(403, text) => Error::new(ErrorKind::AuthRefused, text),
            Self::Amqp(404, text) => Error::new(ErrorKind::NoQueue, text),
            Self::Amqp(code, text) => Error::new(
                ErrorKind::BrokerRefused,
                format!("the broker refused: {code} {text}"),
            ),
            Self::Final(error) => error,
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

impl From<lapin::Error> for Fault {
    fn from(error: lapin::Error) -> Self {
        match code(&error) {
            Some(code) if error.is_amqp_soft_error() => Self::Amqp(code, text(&error)),
            _ => Self::Lost(text(&error)),
        }
    }
}

/// The broker's code, if the broker said this.
pub(super) fn code(error: &lapin::Error) -> Option<u16> {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(error) => Some(error.get_id()),
        _ => None,
    }
}

/// What it says, without a secret: the client's errors hold none.
pub(super) fn text(error: &lapin::Error) -> String {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(error) => error.get_message().to_string(),
        _ => error.to_string(),
    }
}
