//! A guest's credential: a user of its own, and an exchange of its own that reaches what it may write to.
//!
//! | what | why |
//! | --- | --- |
//! | exchange `<queue>.out` | bound to the queue's dead letters and notes, to the control plane's queue of reports, and to what the guest attached itself: whatever is published to it, with whatever headers, reaches nothing else. Who else wants to know who sent a report reads the exchange, which no sender can forge |
//! | exchange `wilco.reply` | the guest's answers, by its topic permission: `<queue>.…` |
//! | configure | the names that live while the guest is connected: its lock, its lane, where it is asked and asks |
//! | read | its queue and its notes, and the same names |
//! | write | its exchange, answers, and the same names |
//!
//! The default exchange reaches every queue, and the exchange `wilco` every guest's: a guest writes to
//! neither, so its handle takes another way (`Core::own`, the URL's option `guest`).

use std::{collections::BTreeSet, sync::Arc};

use lapin::{
    Channel, ExchangeKind,
    options::{ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions},
    types::FieldTable,
};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use url::Url;
use uuid::Uuid;

use super::{
    connection::{Core, REPLIES},
    dead::dead_of,
    fault::Fault,
    link::Wire,
    no_queue, notes, topology,
};
use crate::{
    credential::GuestCredential,
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    names::{GuestAddress, QueueName},
};

/// The longest name of a user that a message can carry.
const LONGEST_USER: usize = 255;

const OUT: &str = ".out";

/// The exchange that a guest publishes to.
pub(super) fn out_of(queue: &QueueName) -> String {
    format!("{queue}{OUT}")
}

/// Whose exchange it is: the guest's who sent what came over it.
pub(super) fn sender(exchange: &str) -> Option<QueueName> {
    let queue: QueueName = exchange.strip_suffix(OUT)?.parse().ok()?;
    queue.is_commands().then_some(queue)
}

/// Where this handle is a guest's, its other handles find what it attached.
pub(super) async fn open(core: &Core, channel: &Channel, lane: &str) -> Result<(), Fault> {
    match &core.own {
        Some(own) => bind(channel, lane, own).await,
        None => Ok(()),
    }
}

async fn bind(channel: &Channel, queue: &str, to: &QueueName) -> Result<(), Fault> {
    let binding = channel.queue_bind(
        queue.into(),
        out_of(to).into(),
        queue.into(),
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    Ok(binding.await?)
}

pub(super) async fn issue(
    core: &Arc<Core>,
    address: &GuestAddress,
    reports: &QueueName,
    deadline: Deadline,
) -> Result<GuestCredential> {
    let (queue, inbox) = (address.queue(), reports.clone());
    let own = queue.clone();
    core.run(deadline, move |_, wire| {
        let (own, inbox) = (own.clone(), inbox.clone());
        async move { exchange(&wire, &own, &inbox).await }
    })
    .await?;
    let (vhost, user) = (vhost(core), user(core, &queue));
    let secret = || Uuid::new_v4().simple().to_string();
    let password = SecretString::from(format!("{}{}", secret(), secret()));
    let users = ["users", user.as_str()];
    let management = &core.management;
    // Gone first: with it go the connections that were made with the old secret.
    management.delete(core, &users, deadline).await?;
    let made = json!({ "password": password.expose_secret(), "tags": "" });
    management.put(core, &users, made, deadline).await?;
    let rights = Rights::of(&queue);
    let permissions = json!({
        "configure": rights.configure,
        "write": rights.write,
        "read": rights.read,
    });
    let place = ["permissions", vhost, user.as_str()];
    management.put(core, &place, permissions, deadline).await?;
    let topics = json!({ "exchange": REPLIES, "write": rights.topics, "read": rights.topics });
    let place = ["topic-permissions", vhost, user.as_str()];
    management.put(core, &place, topics, deadline).await?;
    let url = core.management.guest_url(&user, &password, &queue)?;
    let credential = GuestCredential::new(address.clone(), url)
        .with_right(format!("attach to {queue} and settle what comes"))
        .with_right(format!("answer on the lane of {address}"))
        .with_right(format!("publish to {reports}, under its own name"))
        .with_exception(format!(
            "it may purge its own queue, and make and delete queues and exchanges named {queue}.lock, \
             .left, .reader, .lane and .ask, and what follows these after a dot"
        ))
        .with_exception(
            "it may learn how many messages any queue of the virtual host holds whose name it knows: \
             RabbitMQ lets everybody declare passively",
        )
        .with_exception("how much it publishes to its reports is not limited");
    Ok(credential)
}

/// Makes the guest's exchange and binds what it leads to, all of which exists.
async fn exchange(wire: &Wire, queue: &QueueName, reports: &QueueName) -> Result<(), Fault> {
    for needed in [queue, reports] {
        if topology::counts(wire, needed).await?.is_none() {
            return Err(no_queue().with_queue(needed).into());
        }
    }
    let channel = wire.spare().await?;
    let options = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    channel
        .exchange_declare(
            out_of(queue).into(),
            ExchangeKind::Direct,
            options,
            FieldTable::default(),
        )
        .await?;
    for leads_to in [dead_of(queue), notes::notes_of(queue), reports.to_string()] {
        bind(&channel, &leads_to, queue).await?;
    }
    wire.spares().keep(channel);
    Ok(())
}

pub(super) async fn revoke(core: &Arc<Core>, queue: &QueueName, deadline: Deadline) -> Result<()> {
    let user = user(core, queue);
    // The broker closes the connections of a user that it deletes.
    core.management
        .delete(core, &["users", user.as_str()], deadline)
        .await?;
    let own = queue.clone();
    core.run(deadline, move |_, wire| {
        let out = out_of(&own);
        async move {
            let channel = wire.spare().await?;
            channel
                .exchange_delete(out.into(), ExchangeDeleteOptions::default())
                .await?;
            wire.spares().keep(channel);
            Ok(())
        }
    })
    .await
}

pub(super) async fn list(core: &Arc<Core>, deadline: Deadline) -> Result<Vec<QueueName>> {
    let place = ["vhosts", vhost(core), "permissions"];
    let listed = core.management.get(core, &place, deadline).await?;
    let entries = listed.as_array().map(Vec::as_slice).unwrap_or_default();
    let queues: BTreeSet<QueueName> = entries
        .iter()
        .filter_map(|entry| entry["user"].as_str()?.split_once('@')?.0.parse().ok())
        .filter(QueueName::is_commands)
        .collect();
    Ok(queues.into_iter().collect())
}

fn vhost(core: &Core) -> &str {
    core.endpoint.path.as_deref().unwrap_or("/")
}

/// Users are the whole broker's, queues a virtual host's.
fn user(core: &Core, queue: &QueueName) -> String {
    let user = format!("{queue}@{}", vhost(core));
    if user.len() <= LONGEST_USER {
        return user;
    }
    let mut short = format!("{queue}@=h");
    for byte in Sha256::digest(vhost(core).as_bytes()) {
        short.push_str(&format!("{byte:02x}"));
    }
    short
}

/// The patterns of a guest's permissions.
struct Rights {
    configure: String,
    write: String,
    read: String,
    topics: String,
}

impl Rights {
    fn of(queue: &QueueName) -> Self {
        // Of what stands in a queue's name nothing else means anything to a pattern.
        let own = queue.as_str().replace('.', "\\.");
        let replies = REPLIES.replace('.', "\\.");
        let lanes = r"\.(?:lock|left|reader|lane|ask)(?:\.[0-9a-z.-]+)?";
        Self {
            configure: format!(r"^{own}{lanes}\z"),
            write: format!(r"^(?:{own}\.out|{own}{lanes}|{replies})\z"),
            read: format!(r"^(?:{own}(?:\.out|\.notes|{lanes})?|{replies})\z"),
            topics: format!(r"^{own}\."),
        }
    }
}

impl super::management::Management {
    /// What the guest connects with: the same broker, as its own user.
    fn guest_url(&self, user: &str, password: &SecretString, queue: &QueueName) -> Result<String> {
        let mut url: Url = self.broker().clone();
        let kept: Vec<(String, String)> = url
            .query_pairs()
            .filter(|(name, _)| matches!(name.as_ref(), "heartbeat" | "ca"))
            .map(|(name, value)| (name.into_owned(), value.into_owned()))
            .collect();
        let changed = url
            .set_username(user)
            .and_then(|()| url.set_password(Some(password.expose_secret())));
        changed.map_err(|()| Error::new(ErrorKind::Internal, "this URL takes no user"))?;
        url.query_pairs_mut()
            .clear()
            .extend_pairs(kept)
            .append_pair("guest", queue.as_str());
        Ok(self.with_others(&url))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::GuestId;

    #[test]
    fn s1_the_exchange_says_who_sent_it() {
        let queue = GuestAddress::from(GuestId::new("a.b").unwrap()).queue();
        assert_eq!(sender(&out_of(&queue)), Some(queue));
        for other in ["", "wilco", "wilco.r.main.out", "wilco.q.a.out", ".out"] {
            assert_eq!(sender(other), None, "{other}");
        }
    }

    #[test]
    fn s1_a_name_is_a_pattern_for_itself_alone() {
        let rights = Rights::of(&GuestAddress::from(GuestId::new("a.b").unwrap()).queue());
        assert!(rights.configure.starts_with(r"^wilco\.q\.a=2Eb\.1\."));
        assert_eq!(rights.topics, r"^wilco\.q\.a=2Eb\.1\.");
    }
}
