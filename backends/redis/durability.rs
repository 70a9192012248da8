//! What Ok is worth here, from the server's own configuration (D1, D2).
//!
//! It is asked anew each time, so a failover is never hidden by what an earlier server said (D4); and
//! after each reconnect it is looked whether it got worse.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use redis::{Cmd, Value, cmd};

use super::{
    BACKEND,
    connection::Handle,
    dial::Dialer,
    form::text,
    link::{Link, Phase},
    replay::{self, Replay},
};
use crate::{
    deadline::Deadline,
    durability::{DurabilityReport, Finding, Level, Verdict},
    error::{ErrorKind, Result},
};

pub(super) async fn report(core: &Handle, deadline: Deadline) -> Result<DurabilityReport> {
    core.open()?;
    ask(&core.main, &core.dialer, deadline).await
}

/// Warns when a server that was failed over to promises less.
pub(super) async fn watch(link: Weak<Link>, dialer: Arc<Dialer>) {
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
            if let Ok(report) = ask(&link, &dialer, limit).await {
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

async fn ask(link: &Link, dialer: &Dialer, deadline: Deadline) -> Result<DurabilityReport> {
    let mut get = cmd("CONFIG");
    get.arg("GET").arg(&SETTINGS);
    let config = allowed(link, &get, deadline).await?.map(pairs);
    let info = allowed(link, &cmd("INFO"), deadline).await?;
    let info = info.and_then(text).map(|info| lines(&info));
    let replay = replay::ask(link, deadline).await?;
    let word = deadline.bound(dialer.word()).await?;
    Ok(Facts {
        replay,
        config: config.unwrap_or_default(),
        info: info.unwrap_or_default(),
        copies: dialer.replicas,
        has_sentinels: dialer.has_sentinels(),
        candidates: word.map(|word| word.replicas),
    }
    .report())
}

/// None where this user, or a managed service, does not let it be asked.
pub(super) async fn allowed(link: &Link, call: &Cmd, deadline: Deadline) -> Result<Option<Value>> {
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
    replay: Replay,
    /// How many replicas have what is confirmed, by the URL.
    copies: u32,
    has_sentinels: bool,
    /// How many servers the sentinels may make the next master.
    candidates: Option<u32>,
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
        let (mut node, replication) = self.replication();
        findings.extend(replication);
        if node == Verdict::Safe && worse(process, power) != Verdict::Safe {
            // What one server may forget, one that has it from there may have never had.
            node = Verdict::Unknown;
        }
        let level = match (process, power, node) {
            (Verdict::Safe, Verdict::Safe, Verdict::Safe) => {
                Level::Replicated(u8::try_from(self.copies + 1).unwrap_or(u8::MAX))
            }
            (Verdict::Safe, Verdict::Safe, _) => Level::Power,
            (Verdict::Safe, _, _) => Level::Process,
            _ => Level::Memory,
        };
        let mut report = DurabilityReport::new(BACKEND, self.version(), level);
        report.process_crash = process;
        report.power_loss = power;
        report.node_loss = node;
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
                // Seen: killed while a sync ran, it lost what it had answered since the sync began.
                Verdict::Unsafe,
                Verdict::Unsafe,
                "synced once a second: a power cut takes the last second or two; while a sync runs, what \
                 is confirmed stays in the server's memory, for 2 s at the most, and a kill takes it",
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
        let (replayed, replay) = self.replay.verdict();
        findings.extend(replay);
        let (process, power) = (worse(process, replayed), worse(power, replayed));
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

    /// Replicas: what the loss of this server's machine leaves.
    ///
    /// A replica gets a change after its answer. So a failover is safe only where every server that may
    /// be the next master had each change before it was confirmed: sentinels promote the one that has
    /// the most, but not where priorities say otherwise, and not one that they do not reach.
    fn replication(&self) -> (Verdict, Vec<Finding>) {
        let connected = self.info("connected_slaves");
        let count = connected.and_then(|count| count.parse::<u32>().ok());
        let shown = count.map(|count| {
            let online = self.online();
            format!("{count} connected, {online} of them up to date")
        });
        let meaning = match count {
            Some(0) => "the messages are on this one machine",
            Some(_) => "replicas get each change after its answer",
            None => "whether there are replicas cannot be read",
        };
        let advice = count.is_none().then_some(READABLE);
        let mut findings = vec![finding("replicas", shown.as_deref(), meaning, advice)];
        let (verdict, meaning, advice) = match (self.copies, self.candidates.max(count)) {
            (0, _) => (
                Verdict::Unsafe,
                "nothing is waited for: a failover loses what was confirmed last",
                Some("say replicas=N in the URL, N the number of replicas"),
            ),
            (_, _) if !self.has_sentinels => (
                Verdict::Unknown,
                "so many replicas have each change before it is confirmed; which of them takes over, and \
                 whether it is one of these, is not known from here",
                Some("name sentinels in the URL, redis-sentinel://, if there are any"),
            ),
            (_, _) if self.candidates.is_none() => (
                Verdict::Unknown,
                "so many replicas have each change before it is confirmed; no sentinel says how many could \
                 be the next master",
                None,
            ),
            (copies, Some(candidates)) if copies < candidates => (
                Verdict::Unknown,
                "so many replicas have each change before it is confirmed, and there are more: sentinels \
                 promote the one that has the most, but only of those that they reach, and by their \
                 priorities first; another one would lose what was confirmed last",
                Some("set replicas in the URL to the number of replicas"),
            ),
            (copies, _) if count.is_some_and(|count| count < copies) => (
                Verdict::Safe,
                "every replica has each change before it is confirmed, and too few are connected now: \
                 nothing is confirmed until they are",
                Some("see that the replicas are up and connected"),
            ),
            _ => (
                Verdict::Safe,
                "every replica has each change before it is confirmed, so whichever is promoted has it",
                None,
            ),
        };
        findings.push(finding(
            "replicas in the URL",
            Some(&self.copies.to_string()),
            meaning,
            advice,
        ));
        if self.has_sentinels {
            let candidates = self.candidates.map(|count| count.to_string());
            findings.push(finding(
                "sentinels",
                candidates.as_deref(),
                "so many replicas are known to them, those that are down among them: each may be promoted",
                None,
            ));
        }
        (verdict, findings)
    }

    fn online(&self) -> usize {
        let is_replica = |name: &str| {
            let number = name.strip_prefix("slave");
            number.is_some_and(|number| number.parse::<u32>().is_ok())
        };
        let replicas = self.info.iter().filter(|(name, _)| is_replica(name));
        replicas
            .filter(|(_, state)| state.contains("state=online"))
            .count()
    }
}

pub(super) const READABLE: &str = "let this user run CONFIG GET, INFO and ACL DRYRUN (ACL: +config|get +info +acl|dryrun), or look it \
     up yourself";

fn worse(a: Verdict, b: Verdict) -> Verdict {
    match (a, b) {
        (Verdict::Unsafe, _) | (_, Verdict::Unsafe) => Verdict::Unsafe,
        (Verdict::Unknown, _) | (_, Verdict::Unknown) => Verdict::Unknown,
        _ => Verdict::Safe,
    }
}

pub(super) fn finding(
    setting: &str,
    value: Option<&str>,
    meaning: &str,
    advice: Option<&str>,
) -> Finding {
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

    fn facts(config: &[(&str, &str)], info: &[(&str, &str)]) -> Facts {
        let map = |pairs: &[(&str, &str)]| {
            pairs
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect()
        };
        Facts {
            config: map(config),
            info: map(info),
            replay: Replay::Whole,
            ..Facts::default()
        }
    }

    fn report(config: &[(&str, &str)], info: &[(&str, &str)]) -> DurabilityReport {
        facts(config, info).report()
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
        // A kill at a bad moment loses what was confirmed; without a sync there is no such moment.
        assert_eq!(level("everysec", "no", "noeviction", "0"), Level::Memory);
        assert_eq!(level("always", "no", "allkeys-lru", "100"), Level::Memory);
    }

    #[test]
    fn d1_what_a_restart_throws_away_is_unsafe_whatever_is_synced() {
        let with = |replay| {
            let mut facts = facts(
                &[
                    ("appendonly", "yes"),
                    ("appendfsync", "always"),
                    ("maxmemory-policy", "noeviction"),
                    ("maxmemory", "0"),
                ],
                &[],
            );
            facts.replay = replay;
            facts.report()
        };
        assert_eq!(with(Replay::Whole).level, Level::Power);
        let lossy = with(Replay::Refused("no permissions to run 'xadd'".into()));
        let verdicts = (lossy.process_crash, lossy.power_loss, lossy.level);
        assert_eq!(verdicts, (Verdict::Unsafe, Verdict::Unsafe, Level::Memory));
        let unread = with(Replay::Unread);
        assert_eq!(unread.process_crash, Verdict::Unknown);
        assert!(unread.require(Level::Process).is_err());
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

    #[test]
    fn d1_a_failover_is_safe_only_where_every_candidate_has_it() {
        let node = |fsync, copies, has_sentinels, candidates| {
            let mut facts = facts(
                &[
                    ("appendonly", "yes"),
                    ("appendfsync", fsync),
                    ("maxmemory-policy", "noeviction"),
                    ("maxmemory", "0"),
                ],
                &[
                    ("connected_slaves", "2"),
                    ("slave0", "ip=::1,port=1,state=online,offset=7,lag=0"),
                    ("slave1", "ip=::1,port=2,state=wait_bgsave,offset=0,lag=0"),
                    ("slave_read_repl_offset", "7"),
                ],
            );
            facts.copies = copies;
            facts.has_sentinels = has_sentinels;
            facts.candidates = candidates;
            let report = facts.report();
            let replicas = report.findings.iter().find(|one| one.setting == "replicas");
            let shown = replicas.and_then(|one| one.value.as_deref());
            assert_eq!(shown, Some("2 connected, 1 of them up to date"));
            (report.node_loss, report.level)
        };
        let all = (Verdict::Safe, Level::Replicated(3));
        assert_eq!(node("always", 2, true, Some(2)), all);
        for (copies, has_sentinels, candidates, verdict) in [
            (0, true, Some(2), Verdict::Unsafe),
            (2, false, None, Verdict::Unknown),
            (2, true, None, Verdict::Unknown),
            (1, true, Some(2), Verdict::Unknown),
            (2, true, Some(3), Verdict::Unknown),
            // One is connected that the sentinels do not know yet.
            (1, true, Some(1), Verdict::Unknown),
        ] {
            let seen = node("always", copies, has_sentinels, candidates);
            assert_eq!(seen, (verdict, Level::Power), "{copies} {candidates:?}");
        }
        assert_eq!(
            node("no", 2, true, Some(2)),
            (Verdict::Unknown, Level::Process)
        );
    }
}
