//! P6: body, headers and id come back byte for byte. P8: in the order that they were sent.

use bytes::Bytes;
use wilco::{ErrorKind, Headers, Message, MessageId, Outcome};

use crate::{
    check::{CheckError, CheckResult, Cx, Evidence},
    support::*,
};

/// Bodies that some wire form could bend.
fn bodies(rng: &mut fastrand::Rng) -> Vec<Bytes> {
    let mut bodies: Vec<Bytes> = vec![
        Bytes::new(),
        Bytes::from_static(b"x"),
        Bytes::from_static(b"\0"),
        Bytes::from_static(b"\r\n"),
        Bytes::from_static(b"\xff\xfe\x00\x80\xc3\x28"),
        Bytes::from_static("\u{feff}é🚚".as_bytes()),
        Bytes::from_static(b"null"),
        Bytes::from_static(b"{\"a\": 1e400, \"a\": 2}"),
        Bytes::from((0..=255).collect::<Vec<u8>>()),
    ];
    for size in [255, 256, 4095, 4096, 65_535, 65_536, 1 << 20] {
        bodies.push((0..size).map(|_| rng.u8(..)).collect::<Vec<u8>>().into());
    }
    bodies
}

/// Headers at every edge that [`Headers`] allows.
fn headers() -> Result<Vec<Headers>, CheckError> {
    let mut edge = Headers::new();
    for (name, value) in [
        ("empty", ""),
        ("space", " "),
        ("crlf", "a\r\nx-injected: b\r\n\r\n"),
        ("unicode", "é🚚\u{202e}\u{feff}"),
        ("controls", "\u{1}\t\u{7f}\u{85}"),
        ("colon", "a: b"),
        ("quote", "\"'\\"),
        ("number", "1"),
        ("true", "true"),
        ("a.b_c-d", "name"),
        ("0", "digit"),
        ("-", "dash"),
        ("content-type", "text/plain"),
        ("nats-msg-id", "theirs"),
        ("x-death", "theirs"),
    ] {
        edge.insert(name, value)?;
    }
    edge.insert("n".repeat(128), "long name")?;
    let mut many = Headers::new();
    for n in 0..Headers::MAX_COUNT {
        many.insert(format!("h{n:02}"), format!("v{n}"))?;
    }
    let mut large = Headers::new();
    large.insert("large", "v".repeat(Headers::MAX_BYTES - 5))?;
    Ok(vec![Headers::new(), edge, many, large])
}

/// Every body with every set of headers and edge ids, kinds and content types.
pub async fn p6_every_byte_comes_back(cx: &Cx) -> CheckResult {
    let broker = cx.connect().await?;
    let name = queue(&*broker, "p6").await?;
    let headers = headers()?;
    let mut sent = Vec::new();
    for (n, body) in bodies(&mut cx.rng()).into_iter().enumerate() {
        for (m, headers) in headers.iter().enumerate() {
            let id = format!("{n}-{m}");
            let message = Message::new(format!("kind-{n}"), body.clone())?
                .with_id(MessageId::new(format!(
                    "{id}!\"#$%&'()*+,/:;<=>?@[\\]^`{{|}}~"
                ))?)
                .with_content_type(MessageId::new("application/octet-stream;q=\"1\"")?)
                .with_headers(headers.clone());
            sent.push(if n % 2 == 0 {
                message
            } else {
                message.with_from(name.clone())
            });
        }
    }
    let longest = MessageId::new("i".repeat(MessageId::MAX_BYTES))?;
    sent.push(Message::new(longest.as_str(), "x")?.with_id(longest.clone()));
    for message in &sent {
        broker.publish(&name, message.clone(), long()).await?;
    }
    let mut consumer = attach(&*broker, &name, 4).await?;
    for message in &sent {
        let delivery = receive(&mut *consumer).await?;
        same("the message", &delivery.message, message)?;
        delivery.ack(long()).await?;
    }
    // The same through a retry and the dead letters.
    for message in sent.iter().rev().step_by(7) {
        broker
            .publish(
                &name,
                message.clone().with_id(MessageId::generate()),
                long(),
            )
            .await?;
        let delivery = receive(&mut *consumer).await?;
        let id = delivery.message.id.clone();
        delivery.retry(std::time::Duration::ZERO, long()).await?;
        receive(&mut *consumer)
            .await?
            .dead_letter("look", long())
            .await?;
        let dead = broker.dead_letters(&name, None, count(100), long()).await?;
        let dead = dead.into_iter().find(|dead| dead.message.id == id);
        let dead = dead.map(|dead| dead.message);
        same(
            "the dead letter",
            dead.as_ref(),
            Some(&message.clone().with_id(id)),
        )?;
    }
    Ok(Evidence::of("messages", sent.len()))
}

/// Up to the limit it is stored whole; over it `TooLarge` with the limit, `NotStored`.
pub async fn p6_over_the_limit_is_too_large(cx: &Cx) -> CheckResult {
    let broker = cx.connect().await?;
    let name = queue(&*broker, "p6-large").await?;
    let (mut stored, mut limit) = (Vec::new(), None);
    let mut refused = usize::MAX;
    // A backend that takes the last one, larger than anybody's first command, has shown enough.
    for size in [1 << 20, 8 << 20, 256 << 20] {
        match broker.publish(&name, message(pattern(size))?, long()).await {
            Ok(_) => stored.push(size),
            Err(error) => {
                same("outcome", error.outcome(), Some(Outcome::NotStored))?;
                let &ErrorKind::TooLarge { limit: told } = error.kind() else {
                    return Err(error.into());
                };
                (limit, refused) = (Some(told), size);
                break;
            }
        }
    }
    expect(!stored.is_empty(), "1 MiB is taken", "it is not")?;
    if let Some(limit) = limit {
        let most = usize::try_from(limit).unwrap_or(usize::MAX);
        expect(most < refused, "a limit below what was refused", limit)?;
        broker
            .publish(&name, message(pattern(most))?, long())
            .await?;
        stored.push(most);
        let over = broker
            .publish(&name, message(pattern(most + 1))?, long())
            .await;
        let error = must_be(
            "one byte over the limit",
            over,
            &ErrorKind::TooLarge { limit },
        )?;
        same("outcome", error.outcome(), Some(Outcome::NotStored))?;
    }
    let mut consumer = attach(&*broker, &name, 1).await?;
    for size in &stored {
        let delivery = receive(&mut *consumer).await?;
        let whole = delivery.message.body == pattern(*size);
        let came = delivery.message.body.len();
        expect(
            whole,
            format!("{size} bytes as they were"),
            format!("{came} bytes"),
        )?;
        delivery.ack(long()).await?;
    }
    same("left", broker.status(&name, long()).await?.messages(), 0)?;
    Ok(Evidence::of("sizes", stored.len()).and("limit", limit.unwrap_or(0)))
}

/// So many bytes, of which no part can be missing or moved unseen.
fn pattern(size: usize) -> Bytes {
    let mut body = Vec::with_capacity(size + 8);
    let block: Vec<u8> = (0..251).collect();
    while body.len() < size {
        body.extend_from_slice(&block);
    }
    body.truncate(size);
    body.into()
}

/// Each of several publishers, on its own handle and on a shared one, keeps its order.
pub async fn p8_fifo_per_publisher_and_queue(cx: &Cx) -> CheckResult {
    const PUBLISHERS: usize = 8;
    const EACH: usize = 100;
    let handles = handles(cx, 3).await?;
    let name = queue(&*handles[0], "p8").await?;
    let tasks = (0..PUBLISHERS).map(|task| {
        let (broker, name) = (handles[task % 2].clone(), name.clone());
        tokio::spawn(async move {
            for n in 0..EACH {
                put(&*broker, &name, format!("{task}/{n:04}")).await?;
            }
            Ok(())
        })
    });
    join_all(tasks.collect::<Vec<_>>()).await?;
    let there = drain(&*handles[2], &name).await?;
    for task in 0..PUBLISHERS {
        let prefix = format!("{task}/");
        let order: Vec<_> = there
            .iter()
            .filter(|id| id.starts_with(&prefix))
            .cloned()
            .collect();
        let sent: Vec<_> = (0..EACH).map(|n| format!("{task}/{n:04}")).collect();
        same("the publisher's order", order, sent)?;
    }
    Ok(Evidence::of("messages", PUBLISHERS * EACH).and("publishers", PUBLISHERS))
}
