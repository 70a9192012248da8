//! Q8: names.

use wilco::{
    ErrorKind, GuestAddress, GuestId, Incarnation,
    broker::{DeleteMode, QueueSpec},
};

use crate::{
    check::{CheckResult, Cx, Evidence},
    support::*,
};

/// Ids that some broker, shell, path or query could read as more than letters.
fn nasty() -> Vec<String> {
    let mut ids: Vec<String> = [
        "a",
        "A",
        "*",
        ">",
        "#",
        ".",
        "..",
        "/",
        "../a",
        "a.b",
        "a=2Eb",
        "a%2Eb",
        "a/b",
        "a b",
        " a",
        "a ",
        " ",
        "\n",
        "a\r\nb",
        "\t",
        "{a}",
        "}",
        "{",
        "?",
        "[",
        "[a]",
        "a?",
        "a*",
        "a.>",
        "*.a",
        "$SYS",
        "_INBOX.a",
        "amq.direct",
        "🚚",
        "é",
        "e\u{301}",
        "\u{202e}a",
        "\0",
        "a\0b",
        "%",
        "_",
        "'",
        "\"",
        "'; DROP TABLE queues; --",
        "\\",
        "a:b",
        "a,b",
        "|",
        "&",
        "=",
        "=h",
        "wilco.q.a.1",
        "wilco.q.*.1",
        "a.1",
        "a.2",
        "-",
        "--",
        "CON",
        "nul",
    ]
    .map(String::from)
    .into();
    ids.push("x".repeat(255));
    ids.push("x".repeat(254));
    ids.push("\u{1F69A}".repeat(63));
    ids.push("*".repeat(255));
    ids.push(format!("{}y", "x".repeat(254)));
    // An id that spells the name that a long one is given.
    let hashed = GuestId::new("x".repeat(255)).map(|id| GuestAddress::from(id).queue());
    if let Ok(hashed) = hashed {
        ids.push(hashed.as_str().into());
        ids.push(
            hashed
                .as_str()
                .trim_start_matches("wilco.q.")
                .trim_end_matches(".1")
                .into(),
        );
    }
    ids
}

/// Every id has its own queue: each gets its own message, and no delete reaches another.
pub async fn q8_two_ids_never_meet(cx: &Cx) -> CheckResult {
    let broker = cx.connect().await?;
    let mut queues = Vec::new();
    for id in nasty() {
        for incarnation in [1, 2] {
            let incarnation = Incarnation::new(incarnation)?;
            queues.push(GuestAddress::new(GuestId::new(id.clone())?, incarnation).queue());
        }
    }
    for (n, name) in queues.iter().enumerate() {
        broker
            .declare(&QueueSpec::new(name.clone()), long())
            .await?;
        put(&*broker, name, format!("m{n}")).await?;
    }
    let listed = broker.list(long()).await?;
    same("queues in the list", listed.len(), queues.len())?;
    for name in &queues {
        let status = listed.iter().find(|status| status.name == *name);
        same(name.as_str(), status.map(|status| status.ready), Some(1))?;
    }
    // Every second one goes; the others keep theirs.
    for name in queues.iter().step_by(2) {
        let gone = broker.delete(name, DeleteMode::Discard, long()).await?;
        same("discarded", gone.messages, 1)?;
    }
    for (n, name) in queues.iter().enumerate().skip(1).step_by(2) {
        same(
            name.as_str(),
            drain(&*broker, name).await?,
            vec![format!("m{n}")],
        )?;
    }
    same(
        "queues left",
        broker.list(long()).await?.len(),
        queues.len() / 2,
    )?;
    Ok(Evidence::of("names", queues.len()))
}

/// The lane of every id is its own.
pub async fn q8_two_lanes_never_meet(cx: &Cx) -> CheckResult {
    let broker = cx.connect().await?;
    let ids = nasty();
    for (n, id) in ids.iter().enumerate() {
        let lane = GuestAddress::from(GuestId::new(id.clone())?);
        let other = GuestAddress::new(lane.guest.clone(), Incarnation::FIRST.next());
        let next = GuestAddress::from(GuestId::new(ids[(n + 1) % ids.len()].clone())?);
        let mut responder = attach_lane(&*broker, &lane).await?;
        for absent in [&other, &next] {
            let answer = broker.request(absent, "who".into(), long()).await;
            must_be(
                &format!("{absent:?} beside {lane:?}"),
                answer,
                &ErrorKind::NoConsumer,
            )?;
        }
        let (answer, served) = tokio::join!(broker.request(&lane, "who".into(), long()), async {
            let asked = asked(&mut *responder).await?;
            asked.reply(n.to_string().into(), long()).await?;
            Ok::<_, crate::check::CheckError>(())
        });
        served?;
        same("answer", answer?, n.to_string().into())?;
    }
    Ok(Evidence::of("lanes", ids.len()))
}

/// Too long or empty is an error before any I/O.
pub async fn q8_bad_names_are_refused_before_any_io(cx: &Cx) -> CheckResult {
    let bad = [
        String::new(),
        "x".repeat(256),
        "é".repeat(128),
        "\u{1F69A}".repeat(64),
    ];
    for id in &bad {
        must_be(
            &format!("the id {}", short(id)),
            GuestId::new(id.clone()),
            &ErrorKind::InvalidName,
        )?;
    }
    let broker = cx.connect().await?;
    same("queues", broker.list(long()).await?.len(), 0)?;
    Ok(Evidence::of("bad ids", bad.len()))
}
