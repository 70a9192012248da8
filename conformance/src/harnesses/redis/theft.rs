//! What a stolen password is tried on, in the server's own words.

use std::{io, net::SocketAddr};

use wilco::QueueName;

use super::{ADMIN, Raw};
use crate::harness::{Answer, Attempt, On, Theft};

/// What is done, on what, by which command. `OTHER`, `OWN` and `REPORTS` begin the keys of these queues.
const TRIED: &[(&str, On, &str)] = &[
    ("read", On::OtherQueue, "XRANGE OTHER:stream - +"),
    ("read", On::OtherQueue, "XREAD STREAMS OTHER:stream 0"),
    (
        "read",
        On::OtherQueue,
        "XREADGROUP GROUP wilco thief STREAMS OWN:stream OTHER:stream > >",
    ),
    ("read", On::OtherQueue, "XPENDING OTHER:stream wilco"),
    ("read", On::OtherQueue, "HGETALL OTHER:meta"),
    ("read", On::OtherQueue, "SUBSCRIBE OTHER:stream:x"),
    ("write", On::OtherQueue, "XADD OTHER:stream * id x body x"),
    ("write", On::OtherQueue, "HSET OTHER:meta max 1"),
    ("write", On::OtherQueue, "SADD OTHER:ids x"),
    ("write", On::OtherQueue, "XADD OTHER:tray * id x body x"),
    ("write", On::OtherQueue, "XACK OTHER:stream wilco 1-1"),
    ("write", On::OtherQueue, "PUBLISH OTHER:stream:x y"),
    (
        "declare",
        On::OtherQueue,
        "XGROUP CREATE OTHER:stream thief 0 MKSTREAM",
    ),
    ("delete", On::OtherQueue, "DEL OTHER:stream"),
    ("delete", On::OtherQueue, "UNLINK OTHER:meta OTHER:stream"),
    (
        "delete",
        On::OtherQueue,
        "XGROUP DESTROY OTHER:stream wilco",
    ),
    ("delete", On::OtherQueue, "RENAME OTHER:stream OWN:lane"),
    ("delete", On::OtherQueue, "PEXPIRE OTHER:stream 1"),
    ("purge", On::OtherQueue, "XTRIM OTHER:stream MAXLEN 0"),
    ("purge", On::OtherQueue, "XDEL OTHER:stream 1-1"),
    ("read", On::OtherDeadLetters, "XRANGE OTHER:dead - +"),
    (
        "write",
        On::OtherDeadLetters,
        "XADD OTHER:dead * id x body x",
    ),
    ("purge", On::OtherDeadLetters, "XTRIM OTHER:dead MAXLEN 0"),
    ("delete", On::OtherDeadLetters, "DEL OTHER:dead"),
    ("read", On::OtherLane, "GET OTHER:lane"),
    ("read", On::OtherLane, "SUBSCRIBE OTHER:lane:x"),
    ("read", On::OtherLane, "PSUBSCRIBE wilco:*"),
    ("write", On::OtherLane, "PUBLISH OTHER:lane:x y"),
    ("answer", On::OtherLane, "PUBLISH OTHER:reply:x y"),
    ("answer", On::OtherLane, "PUBLISH wilco:reply:x y"),
    ("declare", On::OtherLane, "SET OTHER:lane x"),
    ("delete", On::OtherLane, "DEL OTHER:lane"),
    ("write", On::OwnQueue, "XADD OWN:stream * id x body x"),
    (
        "declare",
        On::OwnQueue,
        "XGROUP CREATE OWN:stream x 0 MKSTREAM",
    ),
    ("delete", On::OwnQueue, "DEL OWN:stream"),
    ("delete", On::OwnQueue, "UNLINK OWN:meta"),
    ("purge", On::OwnQueue, "XTRIM OWN:stream MAXLEN 0"),
    ("read", On::Reports, "XRANGE REPORTS:stream - +"),
    ("read", On::Reports, "SUBSCRIBE REPORTS:stream:x"),
    ("write", On::Reports, "XADD REPORTS:stream * id x body x"),
    ("delete", On::Reports, "DEL REPORTS:stream"),
    ("purge", On::Reports, "XTRIM REPORTS:stream MAXLEN 0"),
    (
        "purge",
        On::Reports,
        "XADD REPORTS:stream MAXLEN 0 * id x body x",
    ),
    (
        "declare",
        On::Broker,
        "XGROUP CREATE wilco:{wilco.q.nobody.1}:stream wilco 0 MKSTREAM",
    ),
    ("declare", On::Broker, "SET anything x"),
    ("list", On::Broker, "KEYS *"),
    ("list", On::Broker, "SCAN 0"),
    ("list", On::Broker, "RANDOMKEY"),
    ("list", On::Broker, "PUBSUB CHANNELS"),
    ("list", On::Broker, "CLIENT LIST"),
    ("list", On::Broker, "HGETALL wilco:credentials"),
    ("administer", On::Broker, "ACL LIST"),
    (
        "administer",
        On::Broker,
        "ACL SETUSER thief on nopass +@all ~* &*",
    ),
    ("administer", On::Broker, "CONFIG GET *"),
    ("administer", On::Broker, "INFO"),
    ("administer", On::Broker, "MONITOR"),
    ("administer", On::Broker, "FLUSHALL"),
    ("administer", On::Broker, "SELECT 1"),
    ("administer", On::Broker, "EVAL return(1) 0"),
    ("administer", On::Broker, "SCRIPT LOAD return(1)"),
    ("administer", On::Broker, "FUNCTION LIST"),
    ("administer", On::Broker, "SHUTDOWN NOSAVE"),
];

/// A connection of the guest's.
pub(super) async fn login(address: SocketAddr, theft: &Theft<'_>) -> io::Result<Raw> {
    Raw::login(address, theft.own.queue().as_str(), password(theft)?).await
}

fn password<'a>(theft: &Theft<'a>) -> io::Result<&'a str> {
    // The name needs no escaping, so it stands in the URL as it is.
    let (_, rest) = theft
        .url
        .split_once(&format!("{}:", theft.own.queue()))
        .ok_or_else(|| io::Error::other("the URL has no user of the queue's name"))?;
    Ok(rest.split('@').next().unwrap_or_default())
}

pub(super) async fn forbidden(address: SocketAddr, theft: &Theft<'_>) -> io::Result<Vec<Attempt>> {
    let no_bindings = Answer::NoSuchThing("no queue gets messages by way of another");
    let mut attempts = vec![
        Attempt::new("bind", On::OtherQueue, "", no_bindings.clone()),
        Attempt::new("bind", On::OwnQueue, "", no_bindings),
    ];
    let queue = theft.own.queue();
    let password = password(theft)?;
    for (what, on, how) in TRIED {
        let command = how
            .replace("OTHER:", &keys(&theft.other.queue()))
            .replace("OWN:", &keys(&queue))
            .replace("REPORTS:", &keys(theft.reports));
        let command: Vec<_> = command.split(' ').collect();
        let answer = tried(address, queue.as_str(), password, &command).await?;
        attempts.push(Attempt::new(what, *on, *how, answer));
    }
    // What a guest may call, on what it may not.
    let (admin, its) = ADMIN;
    let mut raw = Raw::login(address, admin, its).await?;
    let functions = raw.ask(&["FUNCTION", "LIST"]).await?;
    let functions = functions.iter().filter(|name| name.starts_with("wilco_"));
    for function in functions.collect::<std::collections::BTreeSet<_>>() {
        for (on, queue) in [
            (On::OtherQueue, &theft.other.queue()),
            (On::Reports, theft.reports),
        ] {
            let parts = ["meta", "stream", "holders", "wait", "ids", "dead", "sent"];
            let keys: Vec<_> = parts.map(|part| keys(queue) + part).into();
            let mut command = vec!["FCALL", function, "7"];
            command.extend(keys.iter().map(String::as_str));
            command.extend(["x", "3000", "3000", "1", "1", "1000"]);
            let answer = tried(address, theft.own.queue().as_str(), password, &command).await?;
            attempts.push(Attempt::new("call", on, function.as_str(), answer));
        }
    }
    Ok(attempts)
}

fn keys(queue: &QueueName) -> String {
    format!("wilco:{{{queue}}}:")
}

async fn tried(
    address: SocketAddr,
    user: &str,
    password: &str,
    command: &[&str],
) -> io::Result<Answer> {
    let mut raw = Raw::login(address, user, password).await?;
    Ok(match raw.ask(command).await {
        Err(refused) if refused.to_string().contains("NOPERM") => {
            Answer::Refused(refused.to_string())
        }
        Err(other) => Answer::Allowed(other.to_string()),
        Ok(answer) => Answer::Allowed(answer.join(" ")),
    })
}
