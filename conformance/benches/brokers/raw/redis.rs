//! redis-rs alone: one script a message, `SADD` of its id and `XADD`, so that one that is sent twice is
//! stored once, many under way on one multiplexed connection; `XREADGROUP` in batches, with `XACK`, `XDEL`
//! and `SREM` of the whole batch in one transaction behind; questions and answers over pub/sub. The server
//! syncs before each answer, so each is as safe as wilco's; what it does not do is limit deliveries, or
//! keep a lease.

use std::time::{Duration, Instant};

use ::redis::{
    AsyncConnectionConfig, Client, PushInfo, PushKind, Value, aio::MultiplexedConnection, cmd, pipe,
};
use async_trait::async_trait;
use bytes::Bytes;
use tokio::{
    sync::{Mutex, mpsc::UnboundedReceiver},
    task::{JoinHandle, JoinSet},
};
use wilco::MessageId;

use super::NAME;
use crate::{BODY, Side, since, stamped};

const GROUP: &str = "bare-group";
/// The ids of the messages that are not acked.
const IDS: &str = "bare-ids";
const ADD: &str = "if redis.call('SADD', KEYS[2], ARGV[1]) == 0 then return 0 end \
    return redis.call('XADD', KEYS[1], '*', 'id', ARGV[1], 'kind', 'bench', 'body', ARGV[2])";
const LANE: &str = "bare-lane";
const REPLY: &str = "bare-reply";

pub(super) struct Redis {
    host: MultiplexedConnection,
    /// The hash of [`ADD`].
    add: String,
    guest: MultiplexedConnection,
    asker: Mutex<(MultiplexedConnection, UnboundedReceiver<PushInfo>)>,
    answering: JoinHandle<()>,
}

pub(super) async fn connect(url: &str) -> Redis {
    let client = Client::open(format!("{url}?protocol=resp3")).unwrap();
    // The server's own tidying up would come in the middle of a round, to either side.
    let mut host = plain(&client).await;
    let mut quiet = cmd("CONFIG");
    quiet.arg("SET").arg("auto-aof-rewrite-percentage").arg(0);
    let _: Value = quiet.query_async(&mut host).await.unwrap();
    let mut load = cmd("SCRIPT");
    load.arg("LOAD").arg(ADD);
    let add: String = load.query_async(&mut host).await.unwrap();
    let (mut guest, mut questions) = listening(&client, LANE).await;
    let answering = tokio::spawn(async move {
        while let Some(push) = questions.recv().await {
            if let Some(body) = payload(push) {
                let mut answer = cmd("PUBLISH");
                answer.arg(REPLY).arg(body);
                let _: Value = answer.query_async(&mut guest).await.unwrap();
            }
        }
    });
    Redis {
        host,
        add,
        guest: plain(&client).await,
        asker: Mutex::new(listening(&client, REPLY).await),
        answering,
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.answering.abort();
    }
}

async fn plain(client: &Client) -> MultiplexedConnection {
    let config = AsyncConnectionConfig::new().set_response_timeout(None);
    let connecting = client.get_multiplexed_async_connection_with_config(&config);
    connecting.await.unwrap()
}

/// A connection, and what is published on this channel.
async fn listening(
    client: &Client,
    channel: &str,
) -> (MultiplexedConnection, UnboundedReceiver<PushInfo>) {
    let (pushes, pushed) = tokio::sync::mpsc::unbounded_channel();
    let config = AsyncConnectionConfig::new()
        .set_response_timeout(None)
        .set_push_sender(pushes);
    let connecting = client.get_multiplexed_async_connection_with_config(&config);
    let mut connection = connecting.await.unwrap();
    connection.subscribe(channel).await.unwrap();
    (connection, pushed)
}

fn payload(push: PushInfo) -> Option<Vec<u8>> {
    match (push.kind, push.data.into_iter().nth(1)) {
        (PushKind::Message, Some(Value::BulkString(payload))) => Some(payload),
        _ => None,
    }
}

async fn add(connection: &mut MultiplexedConnection, script: &str, body: &[u8]) {
    let mut add = cmd("EVALSHA");
    add.arg(script).arg(2).arg(NAME).arg(IDS);
    add.arg(MessageId::generate().as_str()).arg(body);
    let added: Value = add.query_async(connection).await.unwrap();
    assert!(matches!(added, Value::BulkString(_)), "{added:?}");
}

/// What one read brought.
#[derive(Default)]
struct Read {
    entries: Vec<Vec<u8>>,
    ids: Vec<Vec<u8>>,
    bodies: Vec<Vec<u8>>,
}

fn entries(answer: Value) -> Read {
    let Value::Map(streams) = answer else {
        return Read::default();
    };
    let entries = streams
        .into_iter()
        .filter_map(|(_, entries)| match entries {
            Value::Array(entries) => Some(entries),
            _ => None,
        });
    let mut read = Read::default();
    for entry in entries.flatten() {
        let Value::Array(parts) = entry else {
            continue;
        };
        let mut parts = parts.into_iter();
        let (Some(Value::BulkString(entry)), Some(Value::Array(fields))) =
            (parts.next(), parts.next())
        else {
            continue;
        };
        let mut fields = fields.into_iter();
        if let (Some(Value::BulkString(id)), Some(Value::BulkString(body))) =
            (fields.nth(1), fields.next_back())
        {
            read.entries.push(entry);
            read.ids.push(id);
            read.bodies.push(body);
        }
    }
    read
}

impl Redis {
    async fn read(&self, most: u32) -> Read {
        let mut read = cmd("XREADGROUP");
        read.arg("GROUP").arg(GROUP).arg("c").arg("COUNT").arg(most);
        read.arg("BLOCK").arg(0).arg("STREAMS").arg(NAME).arg(">");
        entries(read.query_async(&mut self.guest.clone()).await.unwrap())
    }

    async fn ack(&self, read: &Read) {
        let mut all = pipe();
        all.atomic();
        all.cmd("XACK").arg(NAME).arg(GROUP).arg(&read.entries);
        all.cmd("XDEL").arg(NAME).arg(&read.entries);
        all.cmd("SREM").arg(IDS).arg(&read.ids);
        let _: Value = all.query_async(&mut self.guest.clone()).await.unwrap();
    }
}

#[async_trait]
impl Side for Redis {
    async fn fresh(&self) {
        let mut host = self.host.clone();
        let _: Value = cmd("DEL")
            .arg(&[NAME, IDS])
            .query_async(&mut host)
            .await
            .unwrap();
        let mut make = cmd("XGROUP");
        make.arg("CREATE")
            .arg(NAME)
            .arg(GROUP)
            .arg("0")
            .arg("MKSTREAM");
        let _: Value = make.query_async(&mut host).await.unwrap();
    }

    async fn publish(&self, messages: usize, in_flight: usize) {
        let body = Bytes::from(vec![b'x'; BODY]);
        let tasks = (0..in_flight).map(|_| {
            let (mut host, script, body) = (self.host.clone(), self.add.clone(), body.clone());
            async move {
                for _ in 0..messages / in_flight {
                    add(&mut host, &script, &body).await;
                }
            }
        });
        tasks.collect::<JoinSet<()>>().join_all().await;
    }

    async fn consume(&self, messages: usize, prefetch: u32) -> Duration {
        let begin = Instant::now();
        let mut left = messages;
        while left > 0 {
            let read = self.read(prefetch).await;
            assert!(read.bodies.iter().all(|body| body.len() == BODY));
            self.ack(&read).await;
            left -= read.bodies.len();
        }
        begin.elapsed()
    }

    async fn ping(&self, times: usize) -> Vec<Duration> {
        let mut asker = self.asker.lock().await;
        let (asker, answers) = &mut *asker;
        let mut took = Vec::with_capacity(times);
        for _ in 0..times {
            let begin = Instant::now();
            let mut ask = cmd("PUBLISH");
            ask.arg(LANE).arg("ping");
            let heard: Value = ask.query_async(asker).await.unwrap();
            assert_eq!(heard, Value::Int(1));
            while payload(answers.recv().await.unwrap()).is_none() {}
            took.push(begin.elapsed());
        }
        took
    }

    async fn paced(&self, messages: usize) -> Vec<Duration> {
        let (host, script) = (self.host.clone(), self.add.clone());
        let publishing = tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_millis(1));
            let mut published = JoinSet::new();
            for _ in 0..messages {
                tick.tick().await;
                let (mut host, script) = (host.clone(), script.clone());
                published.spawn(async move { add(&mut host, &script, &stamped()).await });
            }
            published.join_all().await;
        });
        let mut times = Vec::with_capacity(messages);
        while times.len() < messages {
            let read = self.read(64).await;
            times.extend(read.bodies.iter().map(|body| since(body)));
            self.ack(&read).await;
        }
        publishing.await.unwrap();
        times
    }

    async fn tidy(&self) {
        let mut host = self.host.clone();
        let _: Value = cmd("BGREWRITEAOF").query_async(&mut host).await.unwrap();
        loop {
            let info: String = cmd("INFO")
                .arg("persistence")
                .query_async(&mut host)
                .await
                .unwrap();
            if info.contains("aof_rewrite_in_progress:0")
                && info.contains("aof_rewrite_scheduled:0")
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
