//! Credentials of guests (law S1), as users whose claims are signed here, offline.
//!
//! The server keeps no users: whoever holds a key of the account signs what a user may, and until when.
//! So a credential is taken back by telling the account: its own claims, signed by the operator, name the
//! users that are not believed any more. For that the public key of each is remembered, in a stream of its
//! own.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use nkeys::KeyPair;
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};

use super::{
    api::{MESSAGE_NOT_FOUND, Refusal, STREAM_EXISTS, STREAM_NOT_FOUND, json_of},
    connection::{Link, Unanswered, in_full},
    form,
    guest::Guest,
    jwt,
    names::{KEYS, Names},
    requests, trays,
};
use crate::{
    credential::GuestCredential,
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    guest_url::{AUTHORITIES, AsGuest},
    names::{GuestAddress, QueueName},
};

/// The file that goes with a credential.
const FILE: &str = "guest.creds";

/// How often, and for how long, a question may be answered.
const ANSWERS: u32 = 8;
const ANSWER_WITHIN: Duration = Duration::from_secs(120);

/// Older than any credential gets: who was not believed for so long need not be named any more.
const FORGOTTEN: u64 = 400 * 24 * 3600;

pub(super) async fn issue(
    link: &Link,
    address: &GuestAddress,
    reports: &QueueName,
    deadline: Deadline,
) -> Result<GuestCredential> {
    link.alive()?;
    let options = &link.options;
    let (Some(signing), Some(creds)) = (&options.signing_key, &options.creds) else {
        return Err(unsupported(
            "credentials are signed here: this handle's URL needs the options creds, a user of the account, \
             and signing_key, a file with a signing key of that account (nsc edit account --sk generate)",
        ));
    };
    let signing = key(signing.expose_secret(), "signing_key")?;
    let own = jwt::token(creds.expose_secret()).and_then(jwt::claims);
    let own = own.ok_or_else(|| invalid("option creds: no user's claims in it"))?;
    let account = account(&own);
    let queue = address.queue();
    let names = Names::of(&queue);
    make_stream(link, deadline).await?;
    trays::make_stream(link, deadline).await?;
    requests::make_stream(link, deadline).await?;
    let old = remembered(link, &names, deadline).await?;
    let mut now = now();
    let mut left = None;
    if let Some(old) = &old {
        if options.operator_key.is_some() {
            disown(link, old, &account, deadline).await?;
            // What was issued up to that second is not believed.
            now += 1;
        } else {
            left = Some(old);
        }
    }
    let user = KeyPair::new_user();
    remember(link, &names, &user.public_key(), deadline).await?;
    let whose = AsGuest {
        queue: queue.clone(),
        reports: reports.clone(),
    };
    let guest = Guest(whose.clone());
    let expires = now + options.expires.as_secs();
    let mut claims = json!({
        "iat": now,
        "exp": expires,
        "name": queue.as_str(),
        "sub": user.public_key(),
        "nats": {
            "pub": { "allow": guest.publishes() },
            "sub": { "allow": guest.listens() },
            "resp": { "max": ANSWERS, "ttl": ANSWER_WITHIN.as_nanos() },
            "subs": -1,
            "data": -1,
            "payload": -1,
            "type": "user",
            "version": 2,
        }
    });
    if signing.public_key() != account {
        claims["nats"]["issuer_account"] = account.clone().into();
    }
    let token = jwt::sign(claims, &signing)?;
    let seed = user.seed().map_err(|error| {
        Error::new(
            ErrorKind::Internal,
            format!("a new key has no seed: {error}"),
        )
    })?;
    let (url, authorities) = whose.url(&options.url, None, &["takeover"], &[("creds", FILE)])?;
    let mut credential = GuestCredential::new(address.clone(), url)
        .with_file(FILE, jwt::file(&token, &seed))
        .until(UNIX_EPOCH + Duration::from_secs(expires))
        .with_right(format!("receive from its own queue {queue}, and settle what it received"))
        .with_right("answer what is asked on its own lane, each question a few times within two minutes")
        .with_right(format!(
            "leave reports in a tray of its own, from which the control plane takes them to {reports} \
             and says from whom they are"
        ))
        .with_exception(
            "of its own queue's stream it may read and take out any message, and make and delete the \
             consumers",
        )
        .with_exception(
            "the server does not check where it is to send an answer: a guest can have it put its own \
             messages, and empty ones, on any subject of the account, other guests' queues too; what is in \
             them is not what a control plane wrote, which signed commands show",
        );
    if let Some(authorities) = authorities {
        credential = credential.with_file(AUTHORITIES, authorities);
    }
    if options.operator_key.is_none() {
        credential = credential.with_exception(
            "it cannot be taken back from here, and runs out by itself: for that the URL needs the options \
             operator_key and system_creds, and the server a resolver that takes updates (resolver full)",
        );
    }
    if let Some(old) = left {
        credential = credential.with_exception(format!(
            "one issued before is good until it runs out: take it back with nsc revocations add-user, for \
             the user {old}"
        ));
    }
    Ok(credential)
}

pub(super) async fn revoke(link: &Link, address: &GuestAddress, deadline: Deadline) -> Result<()> {
    link.alive()?;
    let names = Names::of(&address.queue());
    let Some(user) = remembered(link, &names, deadline).await? else {
        return Ok(());
    };
    if link.options.operator_key.is_none() {
        tracing::warn!(user, queue = %address.queue(), "a credential stays good until it runs out");
        return Err(unsupported(&format!(
            "a credential of NATS is taken back by telling its account, which needs the options \
             operator_key and system_creds: add them, or take back the user {user} with nsc revocations \
             add-user"
        )));
    }
    let creds = link.options.creds.as_ref();
    let own = creds.and_then(|creds| jwt::token(creds.expose_secret()));
    let own = own.and_then(jwt::claims);
    let own = own.ok_or_else(|| invalid("option creds is needed to know which account it is"))?;
    disown(link, &user, &account(&own), deadline).await?;
    link.purge(KEYS, &names.key(), deadline).await
}

pub(super) async fn list(link: &Link, deadline: Deadline) -> Result<Vec<QueueName>> {
    link.alive()?;
    let body = json!({ "subjects_filter": "wilco.key.>" });
    let verb = format!("STREAM.INFO.{KEYS}");
    let told = match link.api(&verb, &body, deadline).await? {
        Ok(told) => told,
        Err(refusal) if refusal.code == STREAM_NOT_FOUND => return Ok(Vec::new()),
        Err(refusal) => return Err(refusal.into_error()),
    };
    let subjects = told["state"]["subjects"].as_object().into_iter().flatten();
    let queues = subjects.filter_map(|(subject, _)| {
        let queue = subject.strip_prefix("wilco.key.")?;
        format!("wilco.{queue}").parse().ok()
    });
    Ok(queues.collect())
}

/// The account of a user with these claims.
fn account(claims: &Value) -> String {
    let by = claims["nats"]["issuer_account"].as_str();
    let by = by.or(claims["iss"].as_str());
    by.unwrap_or_default().into()
}

async fn make_stream(link: &Link, deadline: Deadline) -> Result<()> {
    let config = json!({
        "name": KEYS,
        "description": "the public keys of wilco's guests with a credential",
        "subjects": ["wilco.key.>"],
        "retention": "limits",
        "storage": "file",
        "discard": "old",
        "max_msgs_per_subject": 1,
        "max_msgs": -1,
        "max_bytes": -1,
        "max_age": 0,
        "num_replicas": link.options.replicas.unwrap_or(1),
    });
    let verb = format!("STREAM.CREATE.{KEYS}");
    match link.api(&verb, &config, deadline).await? {
        Err(refusal) if refusal.code != STREAM_EXISTS => Err(refusal.into_error()),
        _ => Ok(()),
    }
}

/// The public key of the user that this machine is.
async fn remembered(link: &Link, names: &Names, deadline: Deadline) -> Result<Option<String>> {
    let body = json!({ "last_by_subj": names.key() });
    let verb = format!("STREAM.MSG.GET.{KEYS}");
    match link.api(&verb, &body, deadline).await? {
        Ok(value) => {
            let text = value["message"]["data"].as_str().and_then(form::base64);
            Ok(text.and_then(|text| String::from_utf8(text).ok()))
        }
        Err(refusal) if matches!(refusal.code, MESSAGE_NOT_FOUND | STREAM_NOT_FOUND) => Ok(None),
        Err(refusal) => Err(refusal.into_error()),
    }
}

async fn remember(link: &Link, names: &Names, user: &str, deadline: Deadline) -> Result<()> {
    let body = Bytes::from(user.to_owned());
    let answer = link.call(&names.key(), None, &body, true, deadline).await;
    let answer = answer.map_err(Unanswered::into_error)?;
    match Refusal::of(&json_of(&answer)?) {
        Some(refusal) => Err(refusal.into_error()),
        None => Ok(()),
    }
}

/// Has the account not believe a user any more, nor anything issued to it until now.
async fn disown(link: &Link, user: &str, account: &str, deadline: Deadline) -> Result<()> {
    let (Some(operator), Some(system)) = (&link.options.operator_key, &link.options.system_creds)
    else {
        return Err(invalid("options operator_key and system_creds go together"));
    };
    let operator = key(operator.expose_secret(), "operator_key")?;
    let connect = link
        .options
        .apply_as(async_nats::ConnectOptions::new(), system)?;
    let refused = |error: &dyn std::error::Error| {
        Error::new(
            ErrorKind::BrokerRefused,
            format!("the account's claims are not changed: {}", in_full(error)),
        )
    };
    let connecting = connect.connect(link.options.addresses.clone());
    let client = deadline.bound(connecting).await?;
    let client = client.map_err(|error| refused(&error))?;
    let ask = async |subject: String, body: String| -> Result<Bytes> {
        let asked = deadline.bound(client.request(subject, body.into())).await?;
        Ok(asked.map_err(|error| refused(&error))?.payload)
    };
    let subject = format!("$SYS.REQ.ACCOUNT.{account}.CLAIMS.LOOKUP");
    let there = ask(subject, String::new()).await?;
    let mut claims = std::str::from_utf8(&there)
        .ok()
        .and_then(jwt::claims)
        .ok_or_else(|| {
            let error = std::io::Error::other("its resolver does not know the account");
            refused(&error)
        })?;
    let now = now();
    let nats = &mut claims["nats"];
    if !nats["revocations"].is_object() {
        nats["revocations"] = json!({});
    }
    if let Some(revoked) = nats["revocations"].as_object_mut() {
        revoked.retain(|_, at| at.as_u64().is_none_or(|at| at + FORGOTTEN > now));
        revoked.insert(user.into(), now.into());
    }
    let before = claims["iat"].as_u64().unwrap_or(0);
    claims["iat"] = now.max(before + 1).into();
    let answer = ask(
        "$SYS.REQ.CLAIMS.UPDATE".into(),
        jwt::sign(claims, &operator)?,
    )
    .await?;
    let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
    match answer.get("error") {
        None if answer["data"]["code"] == 200 => Ok(()),
        _ => Err(refused(&std::io::Error::other(answer.to_string()))),
    }
}

fn key(seed: &str, option: &str) -> Result<KeyPair> {
    KeyPair::from_seed(seed.trim())
        .map_err(|_| invalid(&format!("option {option}: no NATS seed in the file")))
}

fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

fn invalid(text: &str) -> Error {
    Error::new(ErrorKind::InvalidUrl, text.to_owned())
}

fn unsupported(text: &str) -> Error {
    Error::new(ErrorKind::Unsupported, text.to_owned())
}
