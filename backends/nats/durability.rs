//! What Ok is worth on this server, from its own view (laws D1, D2, D4).

use std::sync::Weak;

use serde_json::{Value, json};

use super::{
    BACKEND,
    connection::{Link, Unanswered},
    names::LANES,
};
use crate::{
    deadline::Deadline,
    durability::{DurabilityReport, Finding, Level, Verdict},
    error::{Error, ErrorKind, Result},
};
use bytes::Bytes;

/// What an operator tags a server with that runs with `sync_interval: always`.
const TAG: &str = "sync:always";

/// The first version whose every log obeys `sync_interval: always`.
const SYNCS_SINCE: (i64, i64, i64) = (2, 10, 23);

/// Fails unless the server has JetStream for us; notes whether it syncs.
pub(super) async fn preflight(link: &Link, deadline: Deadline) -> Result<()> {
    match link.api("INFO", &json!({}), deadline).await? {
        Ok(_) => syncing(link, deadline).await.map(drop),
        Err(refusal) => Err(Error::new(
            ErrorKind::BrokerRefused,
            format!(
                "this account has no JetStream: {}; enable it with jetstream {{}} in the server's \
                 configuration",
                refusal.text
            ),
        )),
    }
}

pub(super) async fn report(link: &Link, deadline: Deadline) -> Result<DurabilityReport> {
    link.alive()?;
    preflight(link, deadline).await?;
    let Syncing {
        version,
        can_sync,
        tagged,
        readable,
        synced,
    } = syncing(link, deadline).await?;
    let queues = streams(link, deadline).await?;
    let wanted = u64::from(link.options.replicas.unwrap_or(1));
    let replicas = queues
        .iter()
        .map(|queue| queue.replicas)
        .min()
        .unwrap_or(wanted)
        .min(wanted);
    let replicas = u8::try_from(replicas).unwrap_or(u8::MAX);
    let level = match (synced, replicas) {
        (true, 3..) => Level::Replicated(replicas),
        (true, _) => Level::Power,
        (false, _) => Level::Process,
    };
    let mut report = DurabilityReport::new(BACKEND, version.clone(), level);
    if !synced && can_sync {
        report.power_loss = Verdict::Unknown;
        if replicas >= 3 {
            report.node_loss = Verdict::Unknown;
        }
    }
    report
        .findings
        .push(sync_finding(&version, can_sync, tagged, readable, link));
    report.findings.push(replica_finding(replicas, can_sync));
    let lossy: Vec<_> = queues.iter().filter(|queue| queue.asynchronous).collect();
    if let Some(queue) = lossy.first() {
        report.level = Level::Memory;
        report.process_crash = Verdict::Unsafe;
        report.power_loss = Verdict::Unsafe;
        report.node_loss = Verdict::Unsafe;
        report.findings.push(Finding {
            setting: "persist_mode".into(),
            value: Some("async".into()),
            meaning: format!(
                "{} queues, {} first, confirm before they store",
                lossy.len(),
                queue.name
            ),
            advice: Some("delete and declare these queues again".into()),
        });
    }
    report.findings.push(Finding {
        setting: "max_payload".into(),
        value: Some(link.client.max_payload().to_string()),
        meaning: format!(
            "the largest body is {} bytes",
            link.client
                .max_payload()
                .saturating_sub(super::form::MAX_HEADER_BYTES)
        ),
        advice: (link.client.max_payload() < 2 << 20)
            .then(|| "set max_payload: 2MB for bodies of a mebibyte".into()),
    });
    Ok(report)
}

/// What is known of the server's syncing.
struct Syncing {
    version: String,
    can_sync: bool,
    tagged: bool,
    readable: bool,
    synced: bool,
}

async fn syncing(link: &Link, deadline: Deadline) -> Result<Syncing> {
    let tags = tags(link, deadline).await?;
    let (major, minor, patch) = SYNCS_SINCE;
    let can_sync = link.client.is_server_compatible(major, minor, patch);
    let tagged = tags
        .as_ref()
        .is_some_and(|tags| tags.iter().any(|tag| tag == TAG));
    let synced = can_sync && (tagged || link.options.assume_sync_always);
    link.set_synced(synced);
    let version = link.client.server_info().version;
    Ok(Syncing {
        version,
        can_sync,
        tagged,
        readable: tags.is_some(),
        synced,
    })
}

/// Looks again after every connection: a failover may end at a server that is set otherwise (law D4).
pub(super) async fn watch(link: Weak<Link>) {
    let Some(mut state) = link.upgrade().map(|link| link.state()) else {
        return;
    };
    while state.changed().await.is_ok() {
        let now = state.borrow_and_update().clone();
        let Some(link) = link.upgrade() else { return };
        if !now.connected {
            // Until it is known better.
            link.set_synced(false);
        } else if let Err(error) = syncing(&link, Deadline::after(link.options.takeover)).await {
            tracing::warn!(%error, "whether the server syncs is not known");
        }
    }
}

fn sync_finding(
    version: &str,
    can_sync: bool,
    tagged: bool,
    readable: bool,
    link: &Link,
) -> Finding {
    let finding = |value: Option<&str>, meaning: &str, advice: Option<&str>| Finding {
        setting: "sync_interval".into(),
        value: value.map(Into::into),
        meaning: meaning.into(),
        advice: advice.map(Into::into),
    };
    if !can_sync {
        return finding(
            Some("up to two minutes"),
            &format!(
                "nats-server {version} confirms before it syncs, whatever it is told: a power cut loses \
                 messages, and queues that are new"
            ),
            Some("use nats-server 2.10.23 or later with sync_interval: always"),
        );
    }
    if tagged {
        return finding(
            Some("always"),
            "the server carries the tag sync:always: synced to disk before Ok",
            None,
        );
    }
    if link.options.assume_sync_always {
        return finding(
            Some("always"),
            "vouched for by assume_sync_always in the URL: synced to disk before Ok",
            None,
        );
    }
    finding(
        None,
        if readable {
            "the server does not show it, and carries no tag sync:always: by default a power cut loses the \
             last two minutes"
        } else {
            "it cannot be read with these credentials: by default a power cut loses the last two minutes"
        },
        Some(
            "set jetstream { sync_interval: always } and server_tags: [\"sync:always\"] on every server, or \
             vouch for it with assume_sync_always=true",
        ),
    )
}

fn replica_finding(replicas: u8, can_sync: bool) -> Finding {
    let (meaning, advice) = if replicas >= 3 && !can_sync {
        // Law F6 on 2.9.10.
        (
            "queues are held by that many servers, but those of this version were seen to hold different \
             messages once one of them had been killed and was back",
            Some("use servers of 2.10.23 or newer"),
        )
    } else if replicas >= 3 {
        (
            "queues are held by that many servers: a majority has each message before Ok",
            None,
        )
    } else {
        (
            "queues are held by one server: they are lost with its disk",
            Some("use a cluster of three and replicas=3 in the URL"),
        )
    };
    Finding {
        setting: "num_replicas".into(),
        value: Some(replicas.to_string()),
        meaning: meaning.into(),
        advice: advice.map(Into::into),
    }
}

/// The tags of the server that we are connected to; `None` if it does not tell.
async fn tags(link: &Link, deadline: Deadline) -> Result<Option<Vec<String>>> {
    let answer = link
        .call("$SYS.REQ.USER.INFO", None, &Bytes::new(), true, deadline)
        .await;
    let answer = match answer {
        Ok(answer) => answer,
        Err(Unanswered::NotSent(error)) if *error.kind() == ErrorKind::AuthRefused => {
            return Ok(None);
        }
        Err(error) => return Err(error.into_error()),
    };
    if answer.nobody() {
        return Ok(None);
    }
    let value: Value = serde_json::from_slice(&answer.message.payload).unwrap_or_default();
    let tags = value["server"]["tags"].as_array().into_iter().flatten();
    Ok(Some(
        tags.filter_map(|tag| tag.as_str().map(Into::into))
            .collect(),
    ))
}

struct Queue {
    name: String,
    replicas: u64,
    asynchronous: bool,
}

/// The first page of the queues that are there: what they were made with counts, not what is asked now.
async fn streams(link: &Link, deadline: Deadline) -> Result<Vec<Queue>> {
    let listed = link
        .api("STREAM.LIST", &json!({ "subject": "wilco.>" }), deadline)
        .await?;
    let Ok(value) = listed else { return Ok(vec![]) };
    let streams = value["streams"].as_array().into_iter().flatten();
    Ok(streams
        .map(|stream| &stream["config"])
        .filter(|config| config["name"] != LANES)
        .map(|config| Queue {
            name: config["name"].as_str().unwrap_or_default().into(),
            replicas: config["num_replicas"].as_u64().unwrap_or(1),
            asynchronous: config["persist_mode"] == "async",
        })
        .collect())
}
