//! Credentials of guests (law S1), as users of the server's own.
//!
//! The right to a command stands on the one key that a step uses it on, by a selector for each; the right
//! to call the steps, on all keys of the guest's queue. So a stolen password calls what a guest calls, and
//! what its steps do it may do by hand, to its own queue.

use std::collections::HashMap;

use redis::{Cmd, Value, cmd};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::{
    connection::Core,
    failure::Failure,
    form::text,
    scripts,
    trays::{self, CREDENTIALS},
};
use crate::{
    credential::GuestCredential,
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    guest_url::{AUTHORITIES, AsGuest},
    names::{GuestAddress, QueueName},
};

/// What each step does to the keys of the guest's queue; `dead` and `tray` are appended to.
const RIGHTS: [(&str, &[&str], &str); 6] = [
    ("%RW", &["meta"], "+hmget +hget +hset +hdel"),
    (
        "%RW",
        &["stream"],
        "+xpending +xclaim +xreadgroup +xack +xdel +xrange +xgroup|delconsumer",
    ),
    (
        "%RW",
        &["holders", "wait"],
        "+zadd +zrem +zscore +zrange +zrangebyscore",
    ),
    ("%RW", &["ids"], "+srem"),
    ("%W", &["dead", scripts::TRAY], "+xadd"),
    ("%RW", &["lane"], "+get +set +pexpire +del"),
];

pub(super) async fn issue(
    core: &Core,
    address: &GuestAddress,
    reports: &QueueName,
    deadline: Deadline,
) -> Result<GuestCredential> {
    supported(core)?;
    let default = DefaultUser::ask(core, deadline).await?;
    if !default.whole {
        // Seen on 7.0.15: the writes of every script were gone after a restart.
        return Err(Error::new(
            ErrorKind::Unsupported,
            "this server's user `default` has not all rights, and when it starts again it reads its \
             append-only file as that user: what that may not do is thrown away, queues among it. Give it \
             all rights and let nobody in as it: ACL SETUSER default off allkeys allchannels +@all",
        ));
    }
    let queue = address.queue();
    for load in scripts::functions() {
        match core.main.change(&load, deadline).await {
            Err(error) if error.message().contains("already exists") => {}
            loaded => _ = loaded?,
        }
    }
    let mut enter = cmd("HSET");
    enter
        .arg(CREDENTIALS)
        .arg(queue.as_str())
        .arg(reports.as_str());
    core.main.change(&enter, deadline).await?;
    let password = secret();
    let counts = core.dialer.replicas > 0;
    let rules = |newest| rules(&queue, &password, core.dialer.database, counts, newest);
    let mut set = core.main.call(&user(&queue, rules(true)), deadline).await;
    if matches!(&set, Err(error) if error.message().contains("waitaof")) {
        // Not before 7.2.
        set = core.main.call(&user(&queue, rules(false)), deadline).await;
    }
    set?;
    // Whoever is connected with an old secret has its rights still.
    let mut kill = cmd("CLIENT");
    kill.arg("KILL").arg("USER").arg(queue.as_str());
    core.main.call(&kill, deadline).await?;
    let is_kept = keep(core, deadline).await?;
    let whose = AsGuest {
        queue: queue.clone(),
        reports: reports.clone(),
    };
    let login = Some((queue.as_str(), password.as_str()));
    let kept = ["lease", "replicas"];
    let (url, authorities) = whose.url(&core.dialer.url, login, &kept, &[])?;
    let mut credential = GuestCredential::new(address.clone(), url)
        .with_right(format!("receive from its own queue {queue}, and settle what it received"))
        .with_right("answer what is asked on its own lane")
        .with_right(format!(
            "leave reports in a tray of its own, from which the control plane takes them to {reports} \
             and says from whom they are"
        ))
        .with_exception(
            "what settling does it may do by hand, to its own queue alone: take messages out, change the \
             queue's limits and marks, add dead letters and trim them",
        )
        .with_exception(
            "what it stores takes the server's memory: watch for trays and dead letters that grow",
        );
    if let Some(authorities) = authorities {
        credential = credential.with_file(AUTHORITIES, authorities);
    }
    if !is_kept {
        credential = credential.with_exception(
            "this server keeps its users in memory alone: a restart forgets this one, and it has to be \
             issued again; give the server an aclfile, or a configuration file that it can write",
        );
    }
    if core.dialer.hosts > 1 || counts {
        credential = credential.with_exception(
            "users are not replicated: after a failover the new master does not know this one, and it \
             has to be issued again",
        );
    }
    if default.open {
        credential = credential.with_exception(
            "this server lets in whoever says no password, as its user `default` and with all rights: \
             until that user has a password or is off, no credential keeps anybody from anything",
        );
    }
    Ok(credential)
}

pub(super) async fn revoke(core: &Core, address: &GuestAddress, deadline: Deadline) -> Result<()> {
    supported(core)?;
    let queue = address.queue();
    // Ends its connections too.
    let mut remove = cmd("ACL");
    remove.arg("DELUSER").arg(queue.as_str());
    core.main.call(&remove, deadline).await?;
    keep(core, deadline).await?;
    // What it reported while it might goes where it belongs, if there is a place.
    let mut find = cmd("HGET");
    find.arg(CREDENTIALS).arg(queue.as_str());
    let reports = text(core.main.call(&find, deadline).await?);
    let reports = reports.and_then(|name| name.parse().ok());
    if let Some(reports) = reports {
        let live = core.main.live(deadline).await?;
        deadline
            .bound(trays::empty(&live, &reports, &queue))
            .await?
            .map_err(|failure: Failure| failure.error())?;
    }
    let mut forget = cmd("HDEL");
    forget.arg(CREDENTIALS).arg(queue.as_str());
    core.main.change(&forget, deadline).await?;
    let mut rest = cmd("UNLINK");
    rest.arg(scripts::key(&queue, scripts::TRAY));
    core.main.change(&rest, deadline).await?;
    Ok(())
}

pub(super) async fn list(core: &Core, deadline: Deadline) -> Result<Vec<QueueName>> {
    supported(core)?;
    let mut users = cmd("ACL");
    users.arg("USERS");
    let Value::Array(users) = core.main.call(&users, deadline).await? else {
        return Ok(Vec::new());
    };
    let queues = users.into_iter().filter_map(text);
    let queues = queues.filter_map(|user| user.parse().ok());
    Ok(queues.filter(QueueName::is_commands).collect())
}

fn supported(core: &Core) -> Result<()> {
    core.open()?;
    if !core.dialer.has_sentinels() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        "a server's users are not replicated, so behind sentinels no credential outlives a failover: let \
         guests' users be made on every server, by a common aclfile",
    ))
}

/// 64 hexadecimal digits that nobody can guess.
fn secret() -> String {
    format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple())
}

fn user(queue: &QueueName, rules: Vec<String>) -> Cmd {
    let mut set = cmd("ACL");
    set.arg("SETUSER").arg(queue.as_str()).arg(rules);
    set
}

/// All that the user may; the server is told the password's hash alone.
fn rules(
    queue: &QueueName,
    password: &str,
    database: i64,
    counts: bool,
    newest: bool,
) -> Vec<String> {
    let all = scripts::key(queue, "*");
    let digest = Sha256::digest(password.as_bytes());
    let hash: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut rules = vec!["reset".into(), "on".into(), format!("#{hash}")];
    rules.extend([
        "resetchannels".into(),
        format!("&{all}"),
        format!("%RW~{all}"),
    ]);
    rules.extend(
        [
            "+ping",
            "+subscribe",
            "+unsubscribe",
            "+publish",
            "+fcall",
            "+time",
        ]
        .map(Into::into),
    );
    if database != 0 {
        rules.push("+select".into());
    }
    if counts {
        rules.push("+wait".into());
        rules.extend(newest.then(|| "+waitaof".into()));
    }
    for (access, parts, commands) in RIGHTS {
        let keys = parts.iter().map(|part| scripts::key(queue, part));
        let keys: Vec<_> = keys.map(|key| format!("{access}~{key}")).collect();
        rules.push(format!("({} {commands})", keys.join(" ")));
    }
    rules
}

/// Writes the users down, so that a restart neither forgets one nor brings one back. False: the server has
/// no place for them, and so none has ever been written down.
async fn keep(core: &Core, deadline: Deadline) -> Result<bool> {
    let mut save = cmd("ACL");
    save.arg("SAVE");
    match core.main.call(&save, deadline).await {
        Ok(_) => return Ok(true),
        Err(error)
            if error
                .message()
                .contains("not configured to use an ACL file") => {}
        Err(error) => return Err(error),
    }
    let mut rewrite = cmd("CONFIG");
    rewrite.arg("REWRITE");
    match core.main.call(&rewrite, deadline).await {
        Ok(_) => Ok(true),
        Err(error) if *error.kind() == ErrorKind::BrokerRefused => {
            tracing::debug!(%error, "users are in the server's memory alone");
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// The user that whoever says no name is.
struct DefaultUser {
    /// Anybody is let in as it.
    open: bool,
    /// It may do everything, were it let in.
    whole: bool,
}

impl DefaultUser {
    async fn ask(core: &Core, deadline: Deadline) -> Result<Self> {
        let mut get = cmd("ACL");
        get.arg("GETUSER").arg("default");
        let told = match core.main.call(&get, deadline).await? {
            Value::Map(told) => told,
            _ => Vec::new(),
        };
        let told: HashMap<_, _> = told
            .into_iter()
            .filter_map(|(name, value)| Some((text(name)?, value)))
            .collect();
        let flags: Vec<_> = match told.get("flags") {
            Some(Value::Array(flags) | Value::Set(flags)) => {
                flags.iter().cloned().filter_map(text).collect()
            }
            _ => Vec::new(),
        };
        let flag = |flag| flags.iter().any(|other| other == flag);
        let is = |name, all| {
            let value = told.get(name).cloned().and_then(text);
            value.is_some_and(|value| value.split(' ').any(|part| part == all))
        };
        Ok(Self {
            open: flag("on") && flag("nopass"),
            whole: is("commands", "+@all") && is("keys", "~*") && is("channels", "&*"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s1_no_right_reaches_outside_of_its_queue() {
        let queue: QueueName = "wilco.q.vm-1.1".parse().unwrap();
        let rules = rules(&queue, "hunter2", 3, true, true);
        assert!(rules.contains(&"+select".into()) && rules.contains(&"+waitaof".into()));
        for rule in &rules {
            assert!(!rule.contains("hunter2"));
            for word in rule.trim_matches(['(', ')']).split(' ') {
                if let Some(pattern) = word.split_once(['~', '&']).map(|(_, pattern)| pattern) {
                    assert!(pattern.starts_with("wilco:{wilco.q.vm-1.1}:"), "{word}");
                }
                assert!(!word.contains('@') && word != "allkeys", "{word}");
            }
        }
    }
}
