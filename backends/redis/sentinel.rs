//! Sentinels: they watch over a master and its replicas, and know who is the master now.
//!
//! They are asked anew for each connection. One that was cut off from the others, or restarted, may still
//! name the master before; so more than half of them are heard where so many answer, and the one whose
//! configuration is the newest is believed. Whether that server takes itself for a master too is asked at
//! the server (`dial`).

use std::{collections::HashMap, time::Duration};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use redis::{AsyncConnectionConfig, Client, Value, cmd};

use super::{
    dial::{answered, client},
    failure::Failure,
    form::text,
};
use crate::{
    endpoint::{Endpoint, Host},
    error::Result,
};

/// Who can be asked, and for which master.
#[derive(Debug)]
pub(super) struct Sentinels {
    asked: Vec<(Host, Client)>,
    /// The master's name among those that they watch over.
    name: String,
    database: i64,
    /// Who we are to the master; to the sentinels we are nobody.
    endpoint: Endpoint,
}

/// What a sentinel says of the master.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Word {
    pub(super) master: Host,
    /// How many replicas it knows, those that are down among them: each may be the next master.
    pub(super) replicas: u32,
    /// Which failover this is the outcome of: the higher, the newer.
    epoch: u64,
}

impl Sentinels {
    pub(super) fn of(endpoint: Endpoint, name: &str, database: i64) -> Result<Self> {
        let mut nobody = endpoint.clone();
        nobody.user = None;
        nobody.password = None;
        nobody.token = None;
        let asked = endpoint
            .hosts
            .iter()
            .map(|host| Ok((host.clone(), client(&nobody, host, 0)?)))
            .collect::<Result<_>>()?;
        Ok(Self {
            asked,
            name: name.into(),
            database,
            endpoint,
        })
    }

    /// Who the master is.
    pub(super) async fn ask(&self, patience: Duration) -> Result<Word, Failure> {
        let mut answers = FuturesUnordered::<BoxFuture<'_, _>>::new();
        for (host, client) in &self.asked {
            answers.push(Box::pin(async move {
                let asked = tokio::time::timeout(patience, self.ask_one(client, patience)).await;
                let answer = asked.unwrap_or_else(|_| Err(format!("no answer in {patience:?}")));
                answer.map_err(|why| Failure::Broken(format!("the sentinel {host}: {why}")))
            }));
        }
        let mut words = Vec::new();
        let mut failure = Failure::Broken("no sentinel".into());
        while let Some(answer) = answers.next().await {
            match answer {
                Ok(word) => words.push(word),
                Err(why) => failure = why,
            }
            if words.len() * 2 > self.asked.len() {
                break;
            }
        }
        newest(words).ok_or(failure)
    }

    async fn ask_one(&self, client: &Client, patience: Duration) -> Result<Word, String> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(patience))
            .set_response_timeout(Some(patience));
        let connection = client
            .get_multiplexed_async_connection_with_config(&config)
            .await;
        let mut connection = connection.map_err(|error| error.to_string())?;
        let mut call = cmd("SENTINEL");
        call.arg("MASTER").arg(&self.name);
        let answer = connection.send_packed_command(&call).await;
        let answer = answered(answer).map_err(|why| match why {
            Failure::Refused { code, text } => format!("{code} {text}"),
            Failure::Broken(what) => what,
        })?;
        read(answer).ok_or_else(|| "it is no sentinel, for it answers as none does".into())
    }

    pub(super) fn master_client(&self, master: &Host) -> Result<Client> {
        client(&self.endpoint, master, self.database)
    }
}

fn newest(words: Vec<Word>) -> Option<Word> {
    words.into_iter().max_by_key(|word| word.epoch)
}

fn read(answer: Value) -> Option<Word> {
    let fields: HashMap<String, String> = match answer {
        Value::Map(pairs) => pairs
            .into_iter()
            .filter_map(|(name, value)| Some((text(name)?, text(value)?)))
            .collect(),
        Value::Array(flat) => {
            let mut flat = flat.into_iter().map(text);
            std::iter::from_fn(|| Some((flat.next()??, flat.next()??))).collect()
        }
        _ => return None,
    };
    let number = |name: &str| fields.get(name)?.parse().ok();
    Some(Word {
        master: Host {
            name: fields.get("ip").filter(|ip| !ip.is_empty())?.clone(),
            port: u16::try_from(number("port")?).ok()?,
        },
        replicas: u32::try_from(number("num-slaves")?).ok()?,
        epoch: number("config-epoch")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(port: &str, epoch: &str) -> Vec<Value> {
        let fields = [
            ("name", "m"),
            ("ip", "10.0.0.1"),
            ("port", port),
            ("num-slaves", "2"),
            ("config-epoch", epoch),
        ];
        let bulk = |text: &str| Value::BulkString(text.into());
        fields
            .iter()
            .flat_map(|(name, value)| [bulk(name), bulk(value)])
            .collect()
    }

    #[test]
    fn the_newest_word_is_believed_and_what_is_no_word_is_none() {
        let word = |port, epoch| read(Value::Array(fields(port, epoch)));
        let words = vec![word("1", "3").unwrap(), word("2", "10").unwrap()];
        let newest = newest(words).unwrap();
        assert_eq!((newest.master.port, newest.replicas), (2, 2));
        for bad in [
            word("x", "1"),
            word("70000", "1"),
            word("1", ""),
            read(Value::Nil),
        ] {
            assert_eq!(bad, None);
        }
    }
}
