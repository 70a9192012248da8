//! The scripts: each is one step on the server, and the only way in which anything there changes.

use std::sync::LazyLock;

use redis::{Cmd, Pipeline, Script, cmd};

use crate::names::QueueName;

macro_rules! scripts {
    ($($name:ident = $($file:literal)+;)*) => {
        $(pub(super) static $name: LazyLock<Script> =
            LazyLock::new(|| Script::new(concat!($(include_str!(concat!("lua/", $file, ".lua"))),+)));)*

        /// What brings a script to a server, or every script.
        pub(super) fn load(only: Option<&Script>) -> Pipeline {
            let mut pipeline = redis::pipe();
            $(if only.is_none_or(|only| only.get_hash() == $name.get_hash()) {
                pipeline
                    .cmd("SCRIPT")
                    .arg("LOAD")
                    .arg(concat!($(include_str!(concat!("lua/", $file, ".lua"))),+));
            })*
            pipeline
        }
    };
}

scripts! {
    DECLARE = "declare";
    PUBLISH = "publish";
    ATTACH = "attend" "attach";
    CLAIM = "attend" "claim";
    SETTLE = "attend" "settle";
    HELD = "attend" "held";
    STATUS = "attend" "status";
    DELETE = "delete";
    DEAD = "dead";
    REDRIVE = "redrive";
    LANE = "lane";
    LEAVE = "leave";
    ASK = "ask";
}

/// What all keys of wilco's begin with.
pub(super) const PREFIX: &str = "wilco:{";

/// The keys of a queue, in the order in which the scripts know them.
const PARTS: [&str; 7] = ["meta", "stream", "holders", "wait", "ids", "dead", "sent"];

/// One key of a queue's. The braces are the hash tag: a cluster keeps all of them in one slot.
pub(super) fn key(queue: &QueueName, part: &str) -> String {
    format!("{PREFIX}{queue}}}:{part}")
}

/// A call of a script on all keys of a queue; its arguments follow.
pub(super) fn on_queue(script: &Script, queue: &QueueName) -> Cmd {
    let mut call = Cmd::with_capacity(16, 1024);
    call.arg("EVALSHA").arg(script.get_hash()).arg(PARTS.len());
    for part in PARTS {
        call.arg(key(queue, part));
    }
    call
}

/// A call of a script on these keys; its arguments follow.
pub(super) fn on_keys(script: &Script, keys: &[String]) -> Cmd {
    let mut call = cmd("EVALSHA");
    call.arg(script.get_hash()).arg(keys.len()).arg(keys);
    call
}
