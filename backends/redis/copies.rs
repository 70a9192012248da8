//! What has to last is confirmed only once replicas have it, where the URL asks for that (`replicas=2`).
//!
//! `WAIT` says how many replicas have all that the server did before it, for this very connection; so it
//! goes over the connection that the change went over, after the change's answer. It holds up what is
//! sent behind it, and so there is one at a time on a connection, short, for all who wait. Publishes ask
//! for more where the server can say it: `WAITAOF` says that it is on the disks.
//!
//! A server may count from this connection's own last write (Valkey does), and an answer may have come
//! without one: a batch that was sent again over a new connection is only recognised. So a write that
//! stores nothing goes ahead of each question.

use std::time::Duration;

use futures_util::future::BoxFuture;
use redis::{Pipeline, Value, aio::MultiplexedConnection};
use tokio::{sync::watch, time::sleep};

use super::{
    dial::{all, answered},
    failure::Failure,
};

/// How long one question is held at the server, and how long after an answer that was no good the
/// connection is left to others.
const HELD: Duration = Duration::from_millis(200);
const PAUSE: Duration = Duration::from_millis(50);

/// Where an admin says what nobody is to hear.
pub(super) const NOBODY: &str = "wilco:reply:copies";

/// How many copies are wanted, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) replicas: u32,
    /// On the disks of the server and of the replicas, not in their memory alone.
    pub(super) on_disk: bool,
}

impl Wanted {
    fn question(self, nobody: &str) -> Pipeline {
        let mut question = redis::pipe();
        question.cmd("PUBLISH").arg(nobody).arg("");
        if self.on_disk {
            question.cmd("WAITAOF").arg(1);
        } else {
            question.cmd("WAIT");
        }
        question.arg(self.replicas).arg(HELD.as_millis());
        question
    }

    /// How many replicas have it, of a server that has it.
    fn count(self, answer: Value) -> Result<u32, Failure> {
        let (here, replicas) = match answer {
            Value::Int(replicas) if !self.on_disk => (1, replicas),
            Value::Array(counts) if self.on_disk => match counts[..] {
                [Value::Int(here), Value::Int(replicas)] => (here, replicas),
                _ => return Err(odd()),
            },
            _ => return Err(odd()),
        };
        Ok(if here > 0 {
            u32::try_from(replicas).unwrap_or(0)
        } else {
            0
        })
    }

    /// What keeps a confirm back.
    fn shortage(self, count: u32) -> String {
        let (where_, advice) = if self.on_disk {
            (" on disk", ", and that they have appendonly yes")
        } else {
            ("", "")
        };
        format!(
            "the server took it, but {count} replicas had it{where_} in time and the URL asks for \
             replicas={}: see that so many are connected{advice}",
            self.replicas
        )
    }
}

fn odd() -> Failure {
    Failure::Broken("the server does not say how many replicas have it".into())
}

/// One connection's copies, for those who wait for them.
#[derive(Clone, Debug)]
pub(super) struct Copies {
    asked: watch::Sender<u64>,
    made: watch::Receiver<u64>,
}

/// The other end, which asks the server.
pub(super) struct Copying {
    wanted: Wanted,
    asked: watch::Receiver<u64>,
    made: watch::Sender<u64>,
}

pub(super) fn copies(wanted: Wanted) -> (Copies, Copying) {
    let (asked, questions) = watch::channel(0);
    let (made, answers) = watch::channel(0);
    let copies = Copies {
        asked,
        made: answers,
    };
    let copying = Copying {
        wanted,
        asked: questions,
        made,
    };
    (copies, copying)
}

impl Copies {
    /// Waits until as many replicas as wanted have all that was answered over this connection before.
    ///
    /// # Errors
    /// The connection broke first: whether they have it is not known.
    pub(super) async fn made(&self) -> Result<(), Failure> {
        let mut ticket = 0;
        self.asked.send_modify(|asked| {
            *asked += 1;
            ticket = *asked;
        });
        let mut made = self.made.clone();
        match made.wait_for(|made| *made >= ticket).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Failure::Broken(
                "it ended before replicas had what was sent".into(),
            )),
        }
    }
}

impl Copying {
    /// Asks for those who wait, for as long as the connection lasts; returns why it is of no use any
    /// more. After each question that found too few, `is_superseded` may say that another server is the
    /// master now.
    pub(super) async fn run<'a>(
        mut self,
        mut connection: MultiplexedConnection,
        nobody: &str,
        short: &watch::Sender<Option<String>>,
        is_superseded: impl Fn() -> BoxFuture<'a, bool>,
    ) -> String {
        let question = self.wanted.question(nobody);
        let mut shortages = 0_u32;
        loop {
            let made = *self.made.borrow();
            let Ok(upto) = self.asked.wait_for(|asked| *asked > made).await.map(|n| *n) else {
                return "nobody uses it".into();
            };
            let count = match self.count(&mut connection, &question).await {
                Ok(count) => count,
                // A server that became a replica cannot say it.
                Err(Failure::Refused { code, text }) => return format!("{code} {text}"),
                Err(Failure::Broken(what)) => return what,
            };
            if count >= self.wanted.replicas {
                short.send_replace(None);
                shortages = 0;
                self.made.send_replace(upto);
                continue;
            }
            let shortage = self.wanted.shortage(count);
            if short.send_replace(Some(shortage.clone())).is_none() {
                tracing::warn!(shortage, "nothing is confirmed");
            }
            shortages += 1;
            // Once a second: who asks sentinels makes a connection to each.
            if shortages.is_multiple_of(4) && is_superseded().await {
                return "the sentinels name another master".into();
            }
            sleep(PAUSE).await;
        }
    }

    async fn count(
        &self,
        connection: &mut MultiplexedConnection,
        question: &Pipeline,
    ) -> Result<u32, Failure> {
        let mut answers = all(connection, question).await?;
        let count = answers.pop().unwrap_or(Value::Nil);
        for answer in answers {
            answered(Ok(answer))?;
        }
        self.wanted.count(answered(Ok(count))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p1_copies_are_counted_only_beside_the_servers_own() {
        let memory = Wanted {
            replicas: 1,
            on_disk: false,
        };
        let disk = Wanted {
            on_disk: true,
            ..memory
        };
        let both = |here, replicas| Value::Array(vec![Value::Int(here), Value::Int(replicas)]);
        assert_eq!(memory.count(Value::Int(2)).unwrap(), 2);
        assert_eq!(disk.count(both(1, 2)).unwrap(), 2);
        assert_eq!(disk.count(both(0, 2)).unwrap(), 0);
        for (wanted, bad) in [
            (memory, Value::Nil),
            (memory, both(1, 1)),
            (disk, Value::Int(1)),
            (disk, Value::Array(vec![])),
        ] {
            assert!(wanted.count(bad).is_err());
        }
    }

    #[tokio::test]
    async fn p3_a_connection_that_ends_leaves_it_unknown() {
        let (copies, copying) = copies(Wanted {
            replicas: 1,
            on_disk: false,
        });
        drop(copying);
        assert!(copies.made().await.unwrap_err().is_broken());
    }
}
