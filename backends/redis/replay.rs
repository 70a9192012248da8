//! As whom a server reads its append-only file again: what its user `default` may not do is thrown away.
//!
//! What a script wrote stands there as a transaction, and a transaction's commands are held to the rights
//! of whoever runs it: on a start that is `default`, whether it lets anybody in or not. Seen on 7.0.15:
//! the writes of every script were gone, and nothing was said.

use redis::cmd;

use super::{
    durability::{READABLE, allowed, finding},
    form::text,
    link::Link,
};
use crate::{
    deadline::Deadline,
    durability::{Finding, Verdict},
    error::Result,
};

/// What the scripts' writes to a queue are in the file. A lane is a lease, and need not last.
const WRITTEN: [(&str, &str, &[&str]); 15] = [
    ("HSET", "meta", &["a", "b"]),
    ("HDEL", "meta", &["a"]),
    ("XADD", "stream", &["*", "a", "b"]),
    ("XGROUP|CREATE", "stream", &["wilco", "0", "MKSTREAM"]),
    ("XGROUP|SETID", "stream", &["wilco", "0"]),
    ("XGROUP|CREATECONSUMER", "stream", &["wilco", "a"]),
    ("XGROUP|DELCONSUMER", "stream", &["wilco", "a"]),
    ("XCLAIM", "stream", &["wilco", "a", "0", "0-1"]),
    ("XACK", "stream", &["wilco", "0-1"]),
    ("XDEL", "stream", &["0-1"]),
    ("ZADD", "holders", &["1", "a"]),
    ("ZREM", "wait", &["a"]),
    ("SADD", "ids", &["a"]),
    ("SREM", "ids", &["a"]),
    ("UNLINK", "sent", &[]),
];

/// What a start of the server makes of its append-only file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) enum Replay {
    /// What was written.
    Whole,
    /// Not what this says.
    Refused(String),
    #[default]
    Unread,
}

pub(super) async fn ask(link: &Link, deadline: Deadline) -> Result<Replay> {
    for (command, part, arguments) in WRITTEN {
        let mut dry = cmd("ACL");
        dry.arg("DRYRUN").arg("default");
        for word in command.split('|') {
            dry.arg(word);
        }
        dry.arg(format!("wilco:{{wilco.q.a.1}}:{part}"))
            .arg(arguments);
        match allowed(link, &dry, deadline).await?.and_then(text) {
            Some(answer) if answer == "OK" => {}
            Some(answer) => return Ok(Replay::Refused(answer)),
            None => return Ok(Replay::Unread),
        }
    }
    Ok(Replay::Whole)
}

impl Replay {
    pub(super) fn verdict(&self) -> (Verdict, Option<Finding>) {
        let (verdict, value, meaning, advice) = match self {
            Self::Whole => return (Verdict::Safe, None),
            Self::Refused(why) => (
                Verdict::Unsafe,
                Some(why.as_str()),
                "when the server starts again it reads its append-only file as its user `default`, and \
                 throws away what that may not do: confirmed messages, and queues",
                "give it all rights and let nobody in as it: ACL SETUSER default off allkeys allchannels \
                 +@all",
            ),
            Self::Unread => (
                Verdict::Unknown,
                None,
                "when the server starts again it reads its append-only file as its user `default`, and \
                 whether that may write all of it cannot be read",
                READABLE,
            ),
        };
        let finding = finding("user default", value, meaning, Some(advice));
        (verdict, Some(finding))
    }
}
