//! What a server's refusal or a broken connection means to a caller.

use redis::{RedisError, ServerError, Value};

use crate::error::{Error, ErrorKind, Outcome};

/// Why a command has no answer that can be used.
#[derive(Clone, Debug)]
pub(super) enum Failure {
    /// The server said no, and did nothing of it: scripts put what can be refused first.
    Refused { code: String, text: String },
    /// The connection broke or fell silent: whether it was done is not known.
    Broken(String),
}

impl Failure {
    pub(super) fn refused(error: &ServerError) -> Self {
        let code = error.code().to_owned();
        let text = error.details().unwrap_or_default();
        // An error of a script's own command is wrapped as ERR, its code the first word.
        Self::Refused {
            text: text.to_owned(),
            code,
        }
    }

    /// From the text of an error inside of a script.
    pub(super) fn in_script(text: &str) -> Self {
        let (code, rest) = text.split_once(' ').unwrap_or((text, ""));
        Self::Refused {
            code: code.trim_start_matches('-').into(),
            text: rest.into(),
        }
    }

    pub(super) fn of(error: &RedisError) -> Self {
        match error.kind() {
            redis::ErrorKind::Server(_) | redis::ErrorKind::Extension => Self::Refused {
                code: error.code().unwrap_or("ERR").into(),
                text: error.detail().unwrap_or_default().into(),
            },
            redis::ErrorKind::AuthenticationFailed => Self::Refused {
                code: "WRONGPASS".into(),
                text: error.detail().unwrap_or_default().into(),
            },
            _ => Self::Broken(describe(error)),
        }
    }

    pub(super) fn is_broken(&self) -> bool {
        matches!(self, Self::Broken(_))
    }

    pub(super) fn is_code(&self, wanted: &str) -> bool {
        matches!(self, Self::Refused { code, .. } if code == wanted)
    }

    /// Whether this very node cannot take it now, and another or the same will later.
    pub(super) fn is_passing(&self) -> bool {
        [
            "LOADING",
            "READONLY",
            "MASTERDOWN",
            "CLUSTERDOWN",
            "TRYAGAIN",
        ]
        .iter()
        .any(|code| self.is_code(code))
    }

    /// The error for a caller, with the outcome for a publish.
    pub(super) fn error(&self) -> Error {
        match self {
            Self::Broken(what) => Error::new(
                ErrorKind::BrokerUnreachable,
                format!("the connection broke before the answer came: {what}"),
            )
            .with_outcome(Outcome::Unknown),
            Self::Refused { code, text } => {
                let (kind, advice) = meaning(code, text);
                let text = format!("the server refused it: {code} {text}{advice}");
                Error::new(kind, text).with_outcome(Outcome::NotStored)
            }
        }
    }
}

/// Each refusal's kind, and what to do about it.
fn meaning(code: &str, text: &str) -> (ErrorKind, &'static str) {
    match code {
        "NOAUTH" | "WRONGPASS" | "NOPERM" => (
            ErrorKind::AuthRefused,
            "; check the user, its password and its rights",
        ),
        "ERR" if text.contains("AUTH") || text.contains("without any password") => (
            ErrorKind::AuthRefused,
            "; check the user, its password and its rights",
        ),
        "ERR" if text.contains("Function not found") => (
            ErrorKind::BrokerRefused,
            "; what a guest of this release calls is brought when its credential is issued: issue it again, \
             with this release or a later one",
        ),
        "OOM" => (
            ErrorKind::BrokerRefused,
            "; the server has used up its maxmemory: raise it, or consume what waits",
        ),
        "MISCONF" => (
            ErrorKind::BrokerRefused,
            "; the server cannot write to its disk: see its log",
        ),
        "NOREPLICAS" => (
            ErrorKind::BrokerRefused,
            "; too few replicas are connected for min-replicas-to-write",
        ),
        "READONLY" | "LOADING" | "MASTERDOWN" | "CLUSTERDOWN" | "TRYAGAIN" | "BUSY" => (
            ErrorKind::BrokerRefused,
            "; it passes when the server is up as a master",
        ),
        "MOVED" | "ASK" | "CROSSSLOT" => (
            ErrorKind::BrokerRefused,
            "; the server is part of a Redis Cluster, in which wilco does not find its way yet",
        ),
        "WRONGTYPE" => (
            ErrorKind::BrokerRefused,
            "; a key of the queue was overwritten by another program",
        ),
        _ => (ErrorKind::BrokerRefused, ""),
    }
}

/// An answer that is not of the form that our own script gives: somebody else's server.
pub(super) fn odd(value: &Value) -> Error {
    let what = match value {
        Value::Nil => "nothing",
        Value::Int(_) => "a number",
        Value::Array(_) => "a list of another form",
        _ => "something else",
    };
    Error::new(
        ErrorKind::Internal,
        format!("the server answered a script with {what}"),
    )
}

/// The error's text without what a URL could hold: redis-rs never puts credentials there (S4).
fn describe(error: &RedisError) -> String {
    let text = error.to_string();
    match text.char_indices().nth(300) {
        Some((at, _)) => text[..at].to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p2_refusals_are_typed_and_not_stored() {
        for (text, kind) in [
            (
                "OOM command not allowed when used memory > 'maxmemory'.",
                ErrorKind::BrokerRefused,
            ),
            (
                "NOPERM this user has no permissions",
                ErrorKind::AuthRefused,
            ),
            ("READONLY You can't write", ErrorKind::BrokerRefused),
        ] {
            let error = Failure::in_script(text).error();
            assert_eq!(*error.kind(), kind);
            assert_eq!(error.outcome(), Some(Outcome::NotStored));
        }
        let error = Failure::Broken("reset".into()).error();
        assert_eq!(error.outcome(), Some(Outcome::Unknown));
    }
}
