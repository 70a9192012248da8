//! What stolen credentials are tried on, over the plain client.

use std::{net::SocketAddr, time::Duration};

use async_nats::{ConnectOptions, Event};
use secrecy::ExposeSecret as _;
use tokio::{sync::mpsc, time::timeout};

use crate::harness::{Answer, Attempt, On, Theft};

/// How long the server may take for its no.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is done, on what, by which subject: published to, or with `<` listened to. `OTHER`, `OWN` and
/// `REPORTS` begin the subjects of these queues; in angle brackets they are their streams, and in others
/// what follows their first word.
const TRIED: &[(&str, On, &str)] = &[
    (
        "read",
        On::OtherQueue,
        "$JS.API.CONSUMER.MSG.NEXT.<OTHER>.data-x",
    ),
    ("read", On::OtherQueue, "$JS.API.STREAM.MSG.GET.<OTHER>"),
    (
        "read",
        On::OtherQueue,
        "$JS.API.DIRECT.GET.<OTHER>.OTHER.in",
    ),
    (
        "read",
        On::OtherQueue,
        "$JS.API.CONSUMER.CREATE.<OTHER>.x.OTHER.in",
    ),
    (
        "read",
        On::OtherQueue,
        "$JS.API.CONSUMER.DURABLE.CREATE.<OTHER>.x",
    ),
    ("read", On::OtherQueue, "$JS.API.STREAM.INFO.<OTHER>"),
    ("read", On::OtherQueue, "< OTHER.in"),
    ("read", On::OtherQueue, "< >"),
    ("write", On::OtherQueue, "OTHER.in"),
    ("write", On::OtherQueue, "OTHER.a"),
    ("write", On::OtherQueue, "$JS.ACK.<OTHER>.data-x.1.1.1.1.0"),
    ("declare", On::OtherQueue, "$JS.API.STREAM.CREATE.<OTHER>"),
    ("delete", On::OtherQueue, "$JS.API.STREAM.DELETE.<OTHER>"),
    (
        "delete",
        On::OtherQueue,
        "$JS.API.CONSUMER.DELETE.<OTHER>.x",
    ),
    ("purge", On::OtherQueue, "$JS.API.STREAM.PURGE.<OTHER>"),
    ("bind", On::OtherQueue, "$JS.API.STREAM.UPDATE.<OTHER>"),
    ("read", On::OtherDeadLetters, "< OTHER.dead.*"),
    (
        "read",
        On::OtherDeadLetters,
        "$JS.API.DIRECT.GET.<OTHER>.OTHER.dead.1",
    ),
    ("write", On::OtherDeadLetters, "OTHER.dead.1"),
    (
        "purge",
        On::OtherDeadLetters,
        "$JS.API.STREAM.PURGE.<OTHER>",
    ),
    (
        "delete",
        On::OtherDeadLetters,
        "$JS.API.STREAM.MSG.DELETE.<OTHER>",
    ),
    ("read", On::OtherLane, "< wilco.live.[OTHER].ping"),
    ("read", On::OtherLane, "< wilco.live.[OTHER].inbox.>"),
    ("read", On::OtherLane, "< _INBOX.>"),
    ("read", On::OtherLane, "$JS.API.STREAM.MSG.GET.wilco~lanes"),
    ("write", On::OtherLane, "wilco.live.[OTHER].ping"),
    ("answer", On::OtherLane, "_INBOX.x.1"),
    ("declare", On::OtherLane, "wilco.lane.[OTHER]"),
    (
        "delete",
        On::OtherLane,
        "$JS.API.STREAM.MSG.DELETE.wilco~lanes",
    ),
    ("write", On::OwnQueue, "OWN.in"),
    ("declare", On::OwnQueue, "$JS.API.STREAM.CREATE.<OWN>"),
    ("delete", On::OwnQueue, "$JS.API.STREAM.DELETE.<OWN>"),
    ("purge", On::OwnQueue, "$JS.API.STREAM.PURGE.<OWN>"),
    ("bind", On::OwnQueue, "$JS.API.STREAM.UPDATE.<OWN>"),
    ("read", On::Reports, "$JS.API.STREAM.MSG.GET.<REPORTS>"),
    ("read", On::Reports, "$JS.API.STREAM.MSG.GET.wilco~trays"),
    ("read", On::Reports, "< wilco.tray.>"),
    ("write", On::Reports, "REPORTS.in"),
    ("write", On::Reports, "wilco.tray.[REPORTS].[OTHER]"),
    ("delete", On::Reports, "$JS.API.STREAM.DELETE.<REPORTS>"),
    ("delete", On::Reports, "$JS.API.STREAM.DELETE.wilco~trays"),
    ("purge", On::Reports, "$JS.API.STREAM.PURGE.<REPORTS>"),
    ("purge", On::Reports, "$JS.API.STREAM.PURGE.wilco~trays"),
    ("declare", On::Broker, "$JS.API.STREAM.CREATE.anything"),
    ("list", On::Broker, "$JS.API.STREAM.NAMES"),
    ("list", On::Broker, "$JS.API.STREAM.LIST"),
    ("list", On::Broker, "$JS.API.CONSUMER.NAMES.<OTHER>"),
    ("administer", On::Broker, "$JS.API.INFO"),
    ("administer", On::Broker, "$SYS.REQ.SERVER.PING"),
    ("administer", On::Broker, "$SYS.REQ.CLAIMS.UPDATE"),
    ("administer", On::Broker, "< $SYS.>"),
    ("administer", On::Broker, "wilco.key.[OWN]"),
];

pub(super) async fn forbidden(
    address: SocketAddr,
    theft: &Theft<'_>,
) -> Result<Vec<Attempt>, String> {
    let file = theft.credential.files().first().ok_or("no file")?;
    let creds = file.content().expose_secret();
    let names = [
        ("OTHER", theft.other.queue()),
        ("OWN", theft.own.queue()),
        ("REPORTS", theft.reports.clone()),
    ];
    let mut attempts = Vec::new();
    for (what, on, how) in TRIED {
        let mut subject = (*how).to_owned();
        for (name, queue) in &names {
            let (all, stream) = (queue.as_str(), queue.as_str().replace('.', "~"));
            subject = subject
                .replace(&format!("<{name}>"), &stream)
                .replace(&format!("[{name}]"), all.trim_start_matches("wilco."))
                .replace(name, all);
        }
        let answer = tried(address, creds, &subject).await?;
        attempts.push(Attempt::new(what, *on, subject, answer));
    }
    Ok(attempts)
}

async fn tried(address: SocketAddr, creds: &str, subject: &str) -> Result<Answer, String> {
    let (sender, mut told) = mpsc::channel(8);
    let client = ConnectOptions::new()
        .credentials(creds)
        .map_err(|error| error.to_string())?
        .event_callback(move |event| {
            if let Event::ServerError(error) = event {
                let _ = sender.try_send(error.to_string());
            }
            std::future::ready(())
        })
        .connect(format!("nats://{address}"))
        .await
        .map_err(|error| error.to_string())?;
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    let mut listening = None;
    match subject.strip_prefix("< ") {
        Some(subject) => {
            let subscribed = client.subscribe(subject.to_owned()).await;
            listening = Some(subscribed.map_err(|error| failed(&error))?);
        }
        None => {
            let sent = client.publish(subject.to_owned(), "{}".into()).await;
            sent.map_err(|error| failed(&error))?;
        }
    }
    client.flush().await.map_err(|error| failed(&error))?;
    let said = timeout(PATIENCE, told.recv()).await;
    drop(listening);
    Ok(match said {
        Ok(Some(no)) if no.to_lowercase().contains("permissions violation") => Answer::Refused(no),
        Ok(other) => Answer::Allowed(other.unwrap_or_default()),
        Err(_) => Answer::Allowed("not a word against it".into()),
    })
}
