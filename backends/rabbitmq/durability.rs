//! What Ok is worth on this broker (laws D1, D2, D4).

use std::{io, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{BACKEND, connection::Core, index};
use crate::{
    deadline::Deadline,
    durability::{DurabilityReport, Finding, Level, Verdict},
    endpoint::Host,
    error::Result,
};

pub(super) async fn report(core: &Arc<Core>, deadline: Deadline) -> Result<DurabilityReport> {
    core.run(deadline, move |core, wire| async move {
        let greeting = match &wire.plain {
            Some(host) => greeting(host).await.unwrap_or_default(),
            None => Vec::new(),
        };
        let version = told(&greeting, "version").unwrap_or_else(|| "unknown".into());
        let names = index::names(&core, &wire).await;
        let queues = names.map(|names| names.len() * index::QUEUES_EACH);
        let cluster = told(&greeting, "cluster_name");
        Ok(build(&core, version, cluster, queues.ok()))
    })
    .await
}

/// What the broker says of itself to whoever begins to connect. The client library keeps it to itself,
/// so it is asked once more; over TLS it is not.
async fn greeting(host: &Host) -> io::Result<Vec<u8>> {
    const MOST: usize = 16 * 1024;
    let asking = async {
        let mut stream = TcpStream::connect((host.name.as_str(), host.port)).await?;
        stream.write_all(b"AMQP\x00\x00\x09\x01").await?;
        // A frame: its type, channel, and the length of what follows.
        let mut head = [0; 7];
        stream.read_exact(&mut head).await?;
        let length = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
        let mut greeting = vec![0; length.min(MOST)];
        stream.read_exact(&mut greeting).await?;
        Ok(greeting)
    };
    tokio::time::timeout(Duration::from_secs(2), asking)
        .await
        .unwrap_or_else(|late| Err(io::Error::other(late)))
}

/// The text that stands behind a name in a table.
fn told(table: &[u8], name: &str) -> Option<String> {
    let mut key = vec![u8::try_from(name.len()).ok()?];
    key.extend_from_slice(name.as_bytes());
    key.push(b'S');
    let at = table.windows(key.len()).position(|part| part == key)? + key.len();
    let length: [u8; 4] = table.get(at..at + 4)?.try_into().ok()?;
    let length = usize::try_from(u32::from_be_bytes(length)).ok()?;
    let text = table.get(at + 4..(at + 4).checked_add(length)?)?;
    String::from_utf8(text.to_vec()).ok()
}

fn build(
    core: &Core,
    version: String,
    cluster: Option<String>,
    queues: Option<usize>,
) -> DurabilityReport {
    let waits = !core.fresh.is_zero();
    let level = if waits { Level::Power } else { Level::Process };
    let mut report = DurabilityReport::new(BACKEND, version.clone(), level);
    // How many nodes a queue has cannot be read over AMQP.
    report.node_loss = Verdict::Unknown;
    let mut say = |setting: &str, value: Option<String>, meaning: &str, advice: Option<&str>| {
        report.findings.push(Finding {
            setting: setting.into(),
            value,
            meaning: meaning.into(),
            advice: advice.map(Into::into),
        });
    };
    say(
        "x-queue-type",
        Some("quorum".into()),
        "every queue is written and synced to disk, by the most of its nodes, before a confirm",
        None,
    );
    say(
        "fresh",
        Some(format!("{:?}", core.fresh)),
        if waits {
            "a queue younger than this is lost when the broker is killed or its power is cut, with what is \
             in it: declare is Ok when it is older"
        } else {
            "a queue that was made a moment ago is lost when the broker is killed or its power is cut, with \
             what is in it, and declare does not wait until it is older"
        },
        (!waits).then_some("connect with fresh=2s, or without this option"),
    );
    say(
        "quorum size",
        None,
        "how many nodes hold a queue cannot be read over AMQP: a queue that was made while one node of a \
         cluster was known has one member until an operator adds others",
        Some(
            "in a cluster of three or more: rabbitmq-queues quorum_status QUEUE, and grow where members \
             are missing",
        ),
    );
    if let Some(cluster) = cluster {
        say(
            "cluster_name",
            Some(cluster),
            "the cluster that was reached",
            None,
        );
    }
    say(
        "consumer_timeout",
        None,
        "the broker takes back what is unacked for this long (30 minutes unless it was changed), and \
         closes the consumer's channel: the delivery comes again, and its first ack fails",
        Some(
            "set consumer_timeout in rabbitmq.conf above the longest handler that is to keep its lease",
        ),
    );
    say(
        "policies",
        None,
        "a policy can give a queue a time to live or a limit that drops messages: it cannot be seen over \
         AMQP",
        Some(
            "keep policies with message-ttl, expires, max-length or overflow off names that begin with wilco.",
        ),
    );
    if let Some(queues) = queues {
        let many = queues > index::MANY;
        say(
            "queues",
            Some(queues.to_string()),
            if many {
                "more quorum queues than one cluster keeps well: each guest has three"
            } else {
                "each guest has three quorum queues: its own, its dead letters, and its register"
            },
            many.then_some("spread the guests over several clusters"),
        );
    }
    report
}
