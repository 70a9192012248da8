//! What Ok is worth here, from the server's own configuration (D1, D2).
//!
//! It is asked anew each time, so a failover is never hidden by what an earlier server said (D4); and
//! after each reconnect it is looked whether it got worse.

use std::{collections::HashMap, sync::Weak, time::Duration};

use redis::{Cmd, Value, cmd};

use super::{
    BACKEND,
    connection::Handle,
    form::text,
    link::{Link, Phase},
};
use crate::{
    deadline::Deadline,
    durability::{DurabilityReport, Finding, Level, Verdict},
    error::{ErrorKind, Result},
};

pub(super) async fn report(core: &Handle, deadline: Deadline) -> Result<DurabilityReport> {
    core.open()?;
    ask(&core.main, deadline).await
}

/// Warns when a server that was failed over to promises less.
pub(super) async fn watch(link: Weak<Link>) {
    let Some(mut phase) = link.upgrade().map(|link| link.phase()) else {
        return;
    };
    let mut before: Option<(u64, Level)> = None;
    loop {
        let turn = match &*phase.borrow_and_update() {
            Phase::Up(live) => Some(live.turn),
            Phase::Down(_) => None,
            Phase::Ended => return,
        };
        if let Some(turn) = turn
            && before.is_none_or(|(known, _)| known != turn)
            && let Some(link) = link.upgrade()
        {
            let limit = Deadline::after(Duration::from_secs(5));
            if let Ok(report) = ask(&link, limit).await {
                if before.is_some_and(|(_, level)| report.level < level) {
                    tracing::warn!(level = %report.level, "the server connected to now keeps less than the one before");
                }
                before = Some((turn, report.level));
            }
        }
        if phase.changed().await.is_err() {
            return;
        }
    }
}

const SETTINGS: [&str; 8] = [
    "appendonly",
    "appendfsync",
    "no-appendfsync-on-rewrite",
    "maxmemory",
    "maxmemory-policy",
    "save",
    "min-replicas-to-write",
    "aof-load-truncated",
];

async fn ask(link: &Link, deadline: Deadline) -> Result<DurabilityReport> {
    let mut get = cmd("CONFIG");
    get.arg("GET").arg(&SETTINGS);
    let config = allowed(link, &get, deadline).await?.map(pairs);
    let info = allowed(link, &cmd("INFO"), deadline).await?;
    let info = info.and_then(text).map(|info| lines(&info));
    Ok(Facts {
        config: config.unwrap_or_default(),
        info: info.unwrap_or_default(),
    }
    .report())
}

/// None where this user, or a managed service, does not let it be asked.
async fn allowed(link: &Link, call: &Cmd, deadline: Deadline) -> Result<Option<Value>> {
    match link.call(call, deadline).await {
        Ok(value) => Ok(Some(value)),
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::AuthRefused | ErrorKind::BrokerRefused
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn pairs(value: Value) -> HashMap<String, String> {
    let pair = |(name, value)| Some((text(name)?, text(value)?));
    match value {
        Value::Map(map) => map.into_iter().filter_map(pair).collect(),
        _ => HashMap::new(),
    }
}

fn lines(info: &str) -> HashMap<String, String> {
    info.lines()
        .filter_map(|line| line.trim_end().split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// What could be read.
#[derive(Default)]
struct Facts {
    config: HashMap<String, String>,
    info: HashMap<String, String>,
}

impl Facts {
    fn config(&self, name: &str) -> Option<&str> {
        self.config.get(name).map(String::as_str)
    }

    fn info(&self, name: &str) -> Option<&str> {
        self.info.get(name).map(String::as_str)
    }

    fn report(&self) -> DurabilityReport {
        let (mut process, mut power, mut findings) = self.log();
        let (lossy, eviction) = self.eviction();
        if let Some(verdict) = lossy {
            process = worse(process, verdict);
            power = worse(power, verdict);
        }
        findings.extend(eviction);
        findings.push(self.replication());
        let level = match (process, power) {
            (Verdict::Safe, Verdict::Safe) => Level::Power,
            (Verdict::Safe, _) => Level::Process,
            _ => Level::Memory,
        };
        let mut report = DurabilityReport::new(BACKEND, self.version(), level);
        report.process_crash = process;
        report.power_loss = power;
        report.node_loss = Verdict::Unsafe;
        report.findings = findings;
        report
    }

    fn version(&self) -> String {
        // Valkey gives the version of Redis that it is like as `redis_version`.
        let valkey = self.info("valkey_version").map(|v| format!("Valkey {v}"));
        let redis = self.info("redis_version").map(|v| format!("Redis {v}"));
        valkey.or(redis).unwrap_or_else(|| "unknown".into())
    }

    /// The append-only file: what a crash and a power cut leave.
    fn log(&self) -> (Verdict, Verdict, Vec<Finding>) {
        let on = self
            .config("appendonly")
            .or(match self.info("aof_enabled") {
                Some("1") => Some("yes"),
                Some(_) => Some("no"),
                None => None,
            });
        let mut findings = Vec::new();
        match on {
            Some("yes") => findings.push(finding(
                "appendonly",
                on,
                "every change goes into the append-only file",
                None,
            )),
            Some(_) => {
                findings.push(finding(
                    "appendonly",
                    on,
                    "a confirmed message is in memory alone until the next snapshot",
                    Some("set appendonly yes and appendfsync always"),
                ));
                return (Verdict::Unsafe, Verdict::Unsafe, findings);
            }
            None => {
                findings.push(finding(
                    "appendonly",
                    None,
                    "whether there is an append-only file cannot be read",
                    Some(READABLE),
                ));
                return (Verdict::Unknown, Verdict::Unknown, findings);
            }
        }
        if self
            .info("aof_last_write_status")
            .is_some_and(|s| s != "ok")
        {
            findings.push(finding(
                "aof_last_write_status",
                self.info("aof_last_write_status"),
                "the server cannot write its append-only file now",
                Some("see the server's log, and its disk"),
            ));
            return (Verdict::Unsafe, Verdict::Unsafe, findings);
        }
        let sync = self.config("appendfsync");
        let (process, power, meaning, advice) = match sync {
            Some("always") => (
                Verdict::Safe,
                Verdict::Safe,
                "each confirmed message was synced to disk before its confirm",
                None,
            ),
            Some("everysec") => (
                // The write itself waits for up to 2 s in the server's memory while a sync is slow.
                Verdict::Unknown,
                Verdict::Unsafe,
                "synced once a second: a power cut takes the last second or two; while a sync is slow, \
                 up to 2 s of confirmed messages are in the server's memory alone, and a kill takes them",
                Some("set appendfsync always"),
            ),
            Some(_) => (
                Verdict::Safe,
                Verdict::Unsafe,
                "handed to the operating system before the confirm, synced when that likes",
                Some("set appendfsync always"),
            ),
            None => (
                Verdict::Unknown,
                Verdict::Unknown,
                "when the append-only file is synced cannot be read",
                Some(READABLE),
            ),
        };
        findings.push(finding("appendfsync", sync, meaning, advice));
        let on_rewrite = self.config("no-appendfsync-on-rewrite");
        let mut power = power;
        if on_rewrite == Some("yes") && sync == Some("always") {
            power = Verdict::Unsafe;
            findings.push(finding(
                "no-appendfsync-on-rewrite",
                on_rewrite,
                "while the file is rewritten nothing is synced",
                Some("set no-appendfsync-on-rewrite no"),
            ));
        }
        (process, power, findings)
    }

    /// Whether the server throws messages away when its memory is full.
    fn eviction(&self) -> (Option<Verdict>, Option<Finding>) {
        let policy = self
            .config("maxmemory-policy")
            .or_else(|| self.info("maxmemory_policy"));
        let most = self.config("maxmemory").or_else(|| self.info("maxmemory"));
        let found = |meaning, advice| Some(finding("maxmemory-policy", policy, meaning, advice));
        match (policy, most) {
            (None, _) => (
                Some(Verdict::Unknown),
                found(
                    "whether messages are thrown away when memory is full cannot be read",
                    Some(READABLE),
                ),
            ),
            (Some(policy), Some("0")) if policy.starts_with("allkeys") => (
                None,
                found(
                    "without a maxmemory nothing is thrown away; with one, confirmed messages would be",
                    Some("set maxmemory-policy noeviction"),
                ),
            ),
            (Some(policy), _) if policy.starts_with("allkeys") => (
                Some(Verdict::Unsafe),
                found(
                    "when memory is full, whole queues are thrown away, confirmed messages and all",
                    Some("set maxmemory-policy noeviction"),
                ),
            ),
            _ => (
                None,
                found(
                    "when memory is full, publishes are refused and nothing is lost",
                    None,
                ),
            ),
        }
    }

    fn replication(&self) -> Finding {
        let replicas = self.info("connected_slaves");
        let meaning = match replicas {
            Some("0") => "the messages are on this one machine",
            Some(_) => {
                "replicas get a confirmed message later than its confirm: a failover can lose the last ones"
            }
            None => "whether there are replicas cannot be read",
        };
        finding("replicas", replicas, meaning, None)
    }
}

const READABLE: &str =
    "let this user run CONFIG GET and INFO (ACL: +config|get +info), or look it up yourself";

fn worse(a: Verdict, b: Verdict) -> Verdict {
    match (a, b) {
        (Verdict::Unsafe, _) | (_, Verdict::Unsafe) => Verdict::Unsafe,
        (Verdict::Unknown, _) | (_, Verdict::Unknown) => Verdict::Unknown,
        _ => Verdict::Safe,
    }
}

fn finding(setting: &str, value: Option<&str>, meaning: &str, advice: Option<&str>) -> Finding {
    Finding {
        setting: setting.into(),
        value: value.map(Into::into),
        meaning: meaning.into(),
        advice: advice.map(Into::into),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(config: &[(&str, &str)], info: &[(&str, &str)]) -> DurabilityReport {
        let map = |pairs: &[(&str, &str)]| {
            pairs
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect()
        };
        Facts {
            config: map(config),
            info: map(info),
        }
        .report()
    }

    #[test]
    fn d1_the_level_follows_from_the_settings() {
        let level = |fsync, rewrite, policy, maxmemory| {
            report(
                &[
                    ("appendonly", "yes"),
                    ("appendfsync", fsync),
                    ("no-appendfsync-on-rewrite", rewrite),
                    ("maxmemory-policy", policy),
                    ("maxmemory", maxmemory),
                ],
                &[("redis_version", "7.0.15"), ("connected_slaves", "0")],
            )
            .level
        };
        assert_eq!(level("always", "no", "noeviction", "0"), Level::Power);
        assert_eq!(level("always", "no", "volatile-lru", "1"), Level::Power);
        assert_eq!(level("always", "no", "allkeys-lru", "0"), Level::Power);
        assert_eq!(level("always", "yes", "noeviction", "0"), Level::Process);
        assert_eq!(level("no", "no", "noeviction", "0"), Level::Process);
        assert_eq!(level("everysec", "no", "noeviction", "0"), Level::Memory);
        assert_eq!(level("always", "no", "allkeys-lru", "100"), Level::Memory);
    }

    #[test]
    fn d2_what_cannot_be_read_is_unknown() {
        let unread = report(
            &[],
            &[("aof_enabled", "1"), ("maxmemory_policy", "noeviction")],
        );
        assert_eq!(unread.power_loss, Verdict::Unknown);
        assert!(unread.require(Level::Process).is_err());
        let nothing = report(&[], &[]);
        assert_eq!(nothing.process_crash, Verdict::Unknown);
        assert_eq!(nothing.version, "unknown");
        let off = report(&[("appendonly", "no")], &[]);
        assert_eq!(off.process_crash, Verdict::Unsafe);
    }
}
