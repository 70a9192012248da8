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
    POST = "post";
    MOVE = "move";
    TRAYS = "trays";
}

macro_rules! text {
    ($($file:literal)+) => { concat!($(include_str!(concat!("lua/", $file, ".lua"))),+) };
}

/// What guests call, as text.
const GUESTS: [&str; 7] = [
    text!("attend" "attach"),
    text!("attend" "claim"),
    text!("attend" "settle"),
    text!("attend" "held"),
    text!("lane"),
    text!("leave"),
    text!("post"),
];

/// Where a guest with a credential leaves its reports, and the channel on which it says so.
pub(super) const TRAY: &str = "tray";

/// What all keys of wilco's begin with.
pub(super) const PREFIX: &str = "wilco:{";

/// The keys of a queue, in the order in which the scripts know them.
const PARTS: [&str; 7] = ["meta", "stream", "holders", "wait", "ids", "dead", "sent"];

/// One key of a queue's. The braces are the hash tag: a cluster keeps all of them in one slot.
pub(super) fn key(queue: &QueueName, part: &str) -> String {
    format!("{PREFIX}{queue}}}:{part}")
}

/// All keys of a queue, in their order.
pub(super) fn keys(queue: &QueueName) -> Vec<String> {
    PARTS.iter().map(|part| key(queue, part)).collect()
}

/// The channels or keys of this part, of every queue, as a pattern.
pub(super) fn everywhere(part: &str) -> String {
    format!("{PREFIX}*}}:{part}")
}

/// The queue of which this is that part.
pub(super) fn queue_of(key: &str, part: &str) -> Option<QueueName> {
    let queue = key.strip_prefix(PREFIX)?.strip_suffix(part)?;
    queue.strip_suffix("}:")?.parse().ok()
}

/// How the server is told which step to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Calls {
    /// As scripts, which this handle brings itself.
    Scripts,
    /// As functions, which whoever issued our credential has brought: who may bring a script may bring one
    /// that never ends (S1).
    Functions,
}

impl Calls {
    /// A call on all keys of a queue; its arguments follow.
    pub(super) fn on_queue(self, script: &Script, queue: &QueueName) -> Cmd {
        let mut call = Cmd::with_capacity(16, 1024);
        self.begin(script, &mut call);
        call.arg(PARTS.len());
        for part in PARTS {
            call.arg(key(queue, part));
        }
        call
    }

    /// A call on these keys; its arguments follow.
    pub(super) fn on_keys(self, script: &Script, keys: &[String]) -> Cmd {
        let mut call = Cmd::new();
        self.begin(script, &mut call);
        call.arg(keys.len()).arg(keys);
        call
    }

    fn begin(self, script: &Script, call: &mut Cmd) {
        match self {
            Self::Scripts => call.arg("EVALSHA").arg(script.get_hash()),
            Self::Functions => call.arg("FCALL").arg(function(script)),
        };
    }
}

/// The name of the function that does what this script does: by its text, so that guests of several
/// releases find each their own.
fn function(script: &Script) -> String {
    format!("wilco_{}", script.get_hash())
}

/// The functions that a guest calls, each in a library of its own.
pub(super) fn functions() -> Vec<Cmd> {
    let steps = [&*ATTACH, &CLAIM, &SETTLE, &HELD, &LANE, &LEAVE, &POST];
    let load = steps.iter().zip(GUESTS).map(|(script, text)| {
        let name = function(script);
        let mut load = cmd("FUNCTION");
        load.arg("LOAD").arg(format!(
            "#!lua name={name}\nredis.register_function('{name}', function(KEYS, ARGV)\n{text}\nend)\n"
        ));
        load
    });
    load.collect()
}

/// A call of a script on all keys of a queue; its arguments follow.
pub(super) fn on_queue(script: &Script, queue: &QueueName) -> Cmd {
    Calls::Scripts.on_queue(script, queue)
}

/// A call of a script on these keys; its arguments follow.
pub(super) fn on_keys(script: &Script, keys: &[String]) -> Cmd {
    Calls::Scripts.on_keys(script, keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_names_its_queue() {
        let queue: QueueName = "wilco.q.a=2E.1".parse().unwrap();
        assert_eq!(queue_of(&key(&queue, TRAY), TRAY), Some(queue));
        for bad in [
            "wilco:{}:tray",
            "wilco:{x}:tray",
            "tray",
            "wilco:{wilco.q.a.1}:dead",
        ] {
            assert_eq!(queue_of(bad, TRAY), None, "{bad}");
        }
    }

    #[test]
    fn each_function_is_its_script() {
        let steps = [&*ATTACH, &CLAIM, &SETTLE, &HELD, &LANE, &LEAVE, &POST];
        for (step, text) in steps.iter().zip(GUESTS) {
            assert_eq!(Script::new(text).get_hash(), step.get_hash());
        }
    }
}
