//! S1: with a guest's credential everything in its work succeeds, and the server refuses all else.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use wilco::{
    Broker, Context, Deadline, ErrorKind, Failure, Guest, GuestAddress, GuestCredential,
    ProvisionOutcome, QueueName, SqliteJournal, SqliteRecords, Taskmanager,
    broker::{Consumer, QueueSpec, Responder},
};

use super::litter::among_reports;
use crate::{
    check::{CheckError, CheckResult, Cx, Evidence},
    harness::{Answer, FORBIDDEN, Theft},
    support::{
        LONG, asked, attach, attach_lane, count, expect, guest, long, must_be, named, prefetch,
        put, receive, same,
    },
};

/// The control plane's name: its reports are not a stranger's.
const CONTROL_PLANE: &str = "conformance-s1";

/// A credential does a whole guest's work, provisioned by a taskmanager too; the server refuses each
/// verb outside it; nothing that is sent in place of reports stops those of others (S2); and once it is
/// revoked nobody connects with it, and who was connected is cut off.
pub async fn s1_a_guests_credential_is_worth_one_queue(cx: &Cx) -> CheckResult {
    cx.server.admin_url()?;
    let place = tempfile::tempdir().map_err(|error| CheckError::failed("a directory", error))?;
    let admin = cx.connect().await?;
    let reports = QueueName::reports(CONTROL_PLANE)?;
    admin
        .declare(&QueueSpec::new(reports.clone()), long())
        .await?;

    let (own, other) = (guest("s1-own")?, guest("s1-other")?);
    let mut stolen = Issued::new(&*admin, &own, &reports, place.path()).await?;
    let theirs = Issued::new(&*admin, &other, &reports, place.path()).await?;
    let neighbour = theirs.connect().await?;
    let mut lane = prepare_neighbour(&*admin, &*neighbour, &other).await?;
    let (handle, consumer, responder) = work(&*admin, &stolen, &reports).await?;

    let theft = stolen.theft(&other, &reports);
    let refused = is_refused(cx, &theft).await?;
    let status = admin.status(&other.queue(), long()).await?;
    same(
        "the neighbour's messages",
        (status.ready, status.dead),
        (1, 1),
    )?;
    ping(&*admin, &other, &mut *lane, "the neighbour's lane").await?;
    same(
        "the reports",
        admin.status(&reports, long()).await?.ready,
        0,
    )?;

    let litter = among_reports(cx, &*admin, &*neighbour, &theft).await?;

    revoked(&*admin, &stolen, consumer, responder).await?;
    drop(handle);
    let still = admin.credentials(long()).await?;
    expect(
        still.contains(&other.queue()) && !still.contains(&own.queue()),
        "the credentials that are left",
        format!("{still:?}"),
    )?;
    ping(
        &*admin,
        &other,
        &mut *lane,
        "the neighbour after the revocation",
    )
    .await?;

    // Issued again it is another secret.
    let old = std::mem::replace(
        &mut stolen,
        Issued::new(&*admin, &own, &reports, place.path()).await?,
    );
    let back = stolen.connect().await?;
    attach(&*back, &own.queue(), 1).await?.close(long()).await?;
    must_be(
        "the old secret",
        old.connect().await,
        &ErrorKind::AuthRefused,
    )?;

    let events = provisioned(cx, admin, place.path()).await?;
    Ok(Evidence::of("verbs refused by the server", refused)
        .and("pieces of litter among the reports", litter)
        .and("steps of a provisioning seen", events))
}

/// A credential and what connects with it.
#[derive(Debug)]
struct Issued {
    credential: GuestCredential,
    url: Url,
}

/// A URL that holds a secret (law S4).
struct Url(String);

impl std::fmt::Debug for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

impl Issued {
    async fn new(
        admin: &dyn Broker,
        address: &GuestAddress,
        reports: &QueueName,
        place: &Path,
    ) -> Result<Self, CheckError> {
        let spec = QueueSpec::new(address.queue());
        admin.declare(&spec, long()).await?;
        let credential = admin.issue_credential(address, reports, long()).await?;
        same("whose credential it is", &credential.address, address)?;
        expect(
            !credential.rights.is_empty(),
            "it says what it may do",
            "it does not",
        )?;
        Self::stored(credential, place)
    }

    fn stored(credential: GuestCredential, place: &Path) -> Result<Self, CheckError> {
        // A directory of its own: the names of files are the same for all.
        let place = place.join(uuid());
        std::fs::create_dir(&place).map_err(|error| CheckError::failed("a directory", error))?;
        let url = credential.store(&place)?;
        let url = Url(secret(&url).to_owned());
        Ok(Self { credential, url })
    }

    fn theft<'a>(&'a self, other: &'a GuestAddress, reports: &'a QueueName) -> Theft<'a> {
        Theft {
            own: &self.credential.address,
            credential: &self.credential,
            url: &self.url.0,
            other,
            reports,
        }
    }

    async fn connect(&self) -> wilco::Result<Arc<dyn Broker>> {
        wilco::connect_by(&self.url.0, long()).await
    }
}

fn uuid() -> String {
    wilco::MessageId::generate().to_string()
}

fn secret(url: &secrecy::SecretString) -> &str {
    secrecy::ExposeSecret::expose_secret(url)
}

/// Another guest at work: a message and a dead letter in its queue, its lane attached.
async fn prepare_neighbour(
    admin: &dyn Broker,
    neighbour: &dyn Broker,
    other: &GuestAddress,
) -> Result<Box<dyn Responder>, CheckError> {
    let queue = other.queue();
    put(admin, &queue, "dead").await?;
    let mut consumer = attach(neighbour, &queue, 1).await?;
    let delivery = receive(&mut *consumer).await?;
    delivery.dead_letter("poison", long()).await?;
    consumer.close(long()).await?;
    put(admin, &queue, "theirs").await?;
    attach_lane(neighbour, other).await
}

/// Everything that a guest does, by its credential: attach, each way to settle, answer, report.
async fn work(
    admin: &dyn Broker,
    issued: &Issued,
    reports: &QueueName,
) -> Result<(Arc<dyn Broker>, Box<dyn Consumer>, Box<dyn Responder>), CheckError> {
    let own = &issued.credential.address;
    let queue = own.queue();
    let handle = issued.connect().await?;
    for id in ["done", "again", "poison"] {
        put(admin, &queue, id).await?;
    }
    let mut consumer = handle.consume(&queue, prefetch(8), long()).await?;
    let mut retried = 0;
    while retried < 2 {
        let delivery = receive(&mut *consumer).await?;
        match delivery.message.id.to_string().as_str() {
            "done" => delivery.ack(long()).await?,
            "again" if delivery.attempt == 1 => {
                delivery.retry(Duration::from_millis(50), long()).await?;
                retried += 1;
            }
            "again" => {
                delivery.ack(long()).await?;
                retried += 1;
            }
            _ => delivery.dead_letter("poison", long()).await?,
        }
    }
    let dead = admin.dead_letters(&queue, None, count(10), long()).await?;
    same("dead letters of its own", dead.len(), 1)?;
    same(
        "what nobody has settled",
        admin.status(&queue, long()).await?.messages(),
        1,
    )?;

    let mut responder = attach_lane(&*handle, own).await?;
    ping(admin, own, &mut *responder, "its own lane").await?;

    handle.publish(reports, named("report")?, long()).await?;
    let mut collector = attach(admin, reports, 1).await?;
    let report = receive(&mut *collector).await?;
    same("the report", report.message.id.as_str(), "report")?;
    report.ack(long()).await?;
    collector.close(long()).await?;
    Ok((handle, consumer, responder))
}

async fn ping(
    admin: &dyn Broker,
    lane: &GuestAddress,
    responder: &mut dyn Responder,
    whose: &str,
) -> Result<(), CheckError> {
    let answer = async {
        let request = asked(responder).await?;
        let body = request.body.clone();
        request.reply(body, long()).await?;
        Ok::<_, CheckError>(())
    };
    let question = Bytes::from_static(b"ping");
    let (answered, sent) = tokio::join!(
        admin.request(lane, question.clone(), Deadline::after(LONG)),
        answer
    );
    sent?;
    same(whose, answered?, question)
}

/// The list, tried on the server itself by the plain client.
async fn is_refused(cx: &Cx, theft: &Theft<'_>) -> Result<usize, CheckError> {
    let attempts = cx.server.forbidden(theft).await?;
    let mut refused = 0;
    for attempt in &attempts {
        match &attempt.answer {
            Answer::Refused(_) => refused += 1,
            Answer::NoSuchThing(_) => {}
            Answer::Allowed(said) => {
                return Err(CheckError::failed(
                    format!(
                        "{} on {:?} is refused ({})",
                        attempt.what, attempt.on, attempt.how
                    ),
                    said,
                ));
            }
        }
    }
    for (what, on) in FORBIDDEN {
        let tried = attempts
            .iter()
            .any(|attempt| attempt.what == *what && attempt.on == *on);
        expect(tried, format!("{what} on {on:?} is tried"), "it was not")?;
    }
    Ok(refused)
}

/// Revoked: those who are attached are cut off, and nobody connects any more.
async fn revoked(
    admin: &dyn Broker,
    issued: &Issued,
    mut consumer: Box<dyn Consumer>,
    mut responder: Box<dyn Responder>,
) -> Result<(), CheckError> {
    let own = &issued.credential.address;
    admin.revoke_credential(own, long()).await?;
    admin.revoke_credential(own, long()).await?;
    must_be(
        "a connect with what was revoked",
        issued.connect().await,
        &ErrorKind::AuthRefused,
    )?;
    let ends = async |what: &str, ended: Result<wilco::Result<()>, tokio::time::error::Elapsed>| {
        match ended {
            Ok(ended) => must_be(what, ended, &ErrorKind::AuthRefused).map(drop),
            Err(_) => Err(CheckError::failed(format!("{what} ends"), "it still waits")),
        }
    };
    let (consumer, responder) = tokio::join!(
        tokio::time::timeout(LONG, async { consumer.next().await.map(drop) }),
        tokio::time::timeout(LONG, async { responder.next().await.map(drop) }),
    );
    ends("the consumer", consumer).await?;
    ends("the lane", responder).await
}

/// A whole provisioning with a credential as a step of it: the taskmanager on the connection that may do
/// everything, the agent on its credential, which goes with the machine.
async fn provisioned(cx: &Cx, admin: Arc<dyn Broker>, place: &Path) -> Result<usize, CheckError> {
    let machine = guest("s1-machine")?;
    let records = SqliteRecords::open(place.join("records.db")).await?;
    let taskmanager = Taskmanager::named(CONTROL_PLANE, admin, records).await?;
    let mut seen = taskmanager.watch();
    let provision = || {
        taskmanager
            .provision(machine.guest.clone(), "s1")
            .with_credential(true)
            .boot_deadline(LONG)
    };
    provision().start().await?;
    let credential = taskmanager.issue_credential(&machine.guest).await?;
    let issued = Issued::stored(credential, place)?;
    let handle = issued.connect().await?;
    let journal = SqliteJournal::open(place.join("journal.db")).await?;
    let agent = async {
        Guest::attach(handle, machine.guest.clone(), journal)
            .control_plane(CONTROL_PLANE)
            .wait(LONG)
            .await?
            .on_prepare(install)
            .serve(std::future::pending())
            .await
    };
    let prepared = async {
        let outcome = provision().await?;
        expect(
            matches!(outcome, ProvisionOutcome::Succeeded { .. }),
            "the guest is provisioned",
            &outcome,
        )?;
        taskmanager.guest(machine.guest.clone()).ping(LONG).await?;
        Ok::<_, CheckError>(())
    };
    tokio::select! {
        served = agent => Err(CheckError::failed("the agent serves on", format!("{served:?}"))),
        prepared = tokio::time::timeout(3 * LONG, prepared) => {
            prepared.map_err(|_| CheckError::failed("the provisioning ends", "it still waits"))?
        }
    }?;
    let mut events = 0;
    while seen.try_recv().is_ok() {
        events += 1;
    }
    taskmanager.delete(&machine.guest).await?;
    let left = cx.connect().await?.credentials(long()).await?;
    expect(
        !left.contains(&machine.queue()),
        "a deleted machine has no credential",
        format!("{left:?}"),
    )?;
    must_be(
        "a connect with a deleted machine's credential",
        issued.connect().await,
        &ErrorKind::AuthRefused,
    )?;
    Ok(events)
}

async fn install(_: String, cx: Context) -> Result<String, Failure> {
    cx.progress("installing").await?;
    Ok("installed".into())
}
