//! Signed commands and questions (law S5, case W35): what a guest that trusts keys runs, and what not.

use super::*;
use crate::{
    PublicKey, SigningKey, Trust,
    broker::DeadLetter,
    sign::Signer,
    wire::{Answer, Ask, CommandState, PREPARE, VERSION},
};

/// A control plane with this key, if any, and a broker that nobody has used yet.
async fn signed_world(key: Option<&SigningKey>) -> World {
    let broker = crate::connect("memory:").await.unwrap();
    let records = MemoryRecords::default();
    let mut opening = Taskmanager::with(broker.clone(), records.clone());
    if let Some(key) = key {
        opening = opening.sign(key.clone());
    }
    World {
        taskmanager: opening.await.unwrap(),
        broker,
        records,
        journal: MemoryJournal::default(),
        runs: Arc::default(),
    }
}

/// A guest that trusts these keys.
async fn trusting(world: &World, keys: &[PublicKey]) -> Running {
    let attach = Guest::attach(world.broker.clone(), "vm", world.journal.clone());
    let trust = Trust::new(keys.iter().copied());
    let guest = attach.wait(PATIENCE).trust(trust).await.unwrap();
    let runs = world.runs.clone();
    Running::start(
        guest
            .on_prepare(move |_: Value, _| {
                let runs = runs.clone();
                async move {
                    runs.fetch_add(1, Ordering::SeqCst);
                    Ok::<_, Failure>(())
                }
            })
            .on("list", |_: Value, _| async { Ok::<_, Failure>("listed") }),
    )
}

fn key() -> SigningKey {
    SigningKey::generate().unwrap()
}

fn machine() -> GuestAddress {
    GuestAddress::from(id("vm"))
}

fn prepare_of(record: &Record) -> Command {
    let kind = crate::MessageId::new(record.kind()).unwrap();
    let (command, payload) = (record.command.clone(), record.payload.clone());
    Command::new(&record.address, command, kind, None, payload)
}

async fn letters(world: &World) -> Vec<DeadLetter> {
    let limit = std::num::NonZeroU32::new(100).unwrap();
    let queue = machine().queue();
    world
        .broker
        .dead_letters(&queue, None, limit, within())
        .await
        .unwrap()
}

async fn put(world: &World, message: crate::Message) {
    let queue = machine().queue();
    world
        .broker
        .publish(&queue, message, within())
        .await
        .unwrap();
}

async fn ask(world: &World, ask: Ask, signer: Option<&Signer>, times: (u64, u64)) -> Answer {
    let body = ask.encode(&machine(), signer, times).unwrap();
    let answer = world.broker.request(&machine(), body, within()).await;
    Answer::decode(&answer.unwrap()).unwrap()
}

fn refused(answer: &Answer) -> &str {
    match answer {
        Answer::Error(error) => &error.kind,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn s5_what_a_trusted_key_signed_is_run_and_answered() {
    for policy in [SendPolicy::PingFirst, SendPolicy::EnqueueFirst] {
        let key = key();
        let world = signed_world(Some(&key)).await;
        let provision = world.taskmanager.provision("vm", ()).policy(policy);
        provision.start().await.unwrap();
        let guest = trusting(&world, &[key.public()]).await;
        world.until(State::Succeeded).await;
        let handle = world.taskmanager.guest("vm");
        assert_eq!(handle.call::<String>("list", &()).await.unwrap(), "listed");
        assert_eq!(handle.ping(PATIENCE).await.unwrap().refused, 0);
        // A dismissal is signed too.
        world.taskmanager.delete(&id("vm")).await.unwrap();
        assert_eq!(guest.served.await.unwrap().unwrap(), Served::Revoked);
        assert_eq!((world.runs(), world.taskmanager.refused()), (1, 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn s5_a_control_plane_without_a_trusted_key_is_told() {
    for key in [None, Some(key())] {
        for policy in [SendPolicy::PingFirst, SendPolicy::EnqueueFirst] {
            let world = signed_world(key.as_ref()).await;
            let deadlines = Deadlines {
                boot: Duration::from_secs(2),
                ..Deadlines::default()
            };
            let provision = world.taskmanager.provision("vm", ()).policy(policy);
            let waiting = world.provision(provision.deadlines(deadlines));
            let guest = trusting(&world, &[self::key().public()]).await;
            let outcome = waiting.await.unwrap().unwrap();
            let expected = match policy {
                SendPolicy::PingFirst => (State::NotDelivered, Some(Stage::Boot)),
                SendPolicy::EnqueueFirst => (State::Failed, None),
            };
            let (state, kind, stage) = kind_of(&outcome);
            assert_eq!((state, stage), expected, "{outcome:?}");
            assert_eq!(kind, ReasonKind::NotTrusted, "{outcome:?}");
            assert_eq!(world.runs(), 0);
            guest.kill_or_ended().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn w35_a_forged_prepare_under_the_same_id_does_not_swallow_the_true_one() {
    let key = key();
    let stranger = Signer::new(self::key());
    let world = signed_world(Some(&key)).await;
    let record = world.taskmanager.provision("vm", ()).start().await.unwrap();
    world.until(State::AwaitingGuest).await;
    let forged = prepare_of(&record);
    let forged = forged.to_signed(Some(&stranger), |_| (0, u64::MAX));
    put(&world, forged.unwrap()).await;
    let guest = trusting(&world, &[key.public()]).await;
    world.until(State::Succeeded).await;
    assert_eq!(world.runs(), 1);
    let letters = letters(&world).await;
    assert_eq!(letters.len(), 1);
    assert!(letters[0].reason.starts_with("unknown_key"), "{letters:?}");
    let pong = world.taskmanager.guest("vm").ping(PATIENCE).await.unwrap();
    assert_eq!((pong.refused, world.taskmanager.refused()), (1, 1));
    guest.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn w35_without_trust_the_forged_one_runs() {
    // The negative: nothing but the signature keeps it out.
    let key = key();
    let world = signed_world(Some(&key)).await;
    let record = world.taskmanager.provision("vm", ()).start().await.unwrap();
    world.until(State::AwaitingGuest).await;
    let forged = Command::new(
        &record.address,
        crate::CommandId::generate(),
        crate::MessageId::new(PREPARE).unwrap(),
        None,
        serde_json::value::RawValue::NULL.to_owned(),
    );
    put(&world, forged.to_message().unwrap()).await;
    let guest = world.guest().await;
    // The true one comes second, and there is one prepare.
    world.until(State::Failed).await;
    assert_eq!(world.runs(), 1);
    guest.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn s5_every_other_command_is_refused_counted_and_told() {
    let (key, other) = (key(), self::key());
    let world = signed_world(Some(&key)).await;
    world.taskmanager.provision("vm", ()).start().await.unwrap();
    let guest = trusting(&world, &[key.public()]).await;
    world.until(State::Succeeded).await;
    let signer = Signer::new(key);
    let command = |to: &GuestAddress| {
        let kind = crate::MessageId::new("list").unwrap();
        let payload = serde_json::value::RawValue::NULL.to_owned();
        Command::new(to, crate::CommandId::generate(), kind, None, payload)
    };
    let valid = |_: &Signer| (crate::workflow::record::now_ms(), u64::MAX);
    let here = machine();
    let neighbour = GuestAddress::from(id("vm-2"));
    let next = GuestAddress::new(id("vm"), Incarnation::new(2).unwrap());
    let mut changed = command(&here).to_signed(Some(&signer), valid).unwrap();
    changed.body = [changed.body.as_ref(), b" "].concat().into();
    let bad = [
        ("unsigned", command(&here).to_message().unwrap()),
        (
            "unknown_key",
            command(&here)
                .to_signed(Some(&Signer::new(other)), valid)
                .unwrap(),
        ),
        ("forged", changed),
        (
            "expired",
            command(&here).to_signed(Some(&signer), |_| (0, 1)).unwrap(),
        ),
        (
            "wrong_incarnation",
            command(&neighbour).to_signed(Some(&signer), valid).unwrap(),
        ),
        (
            "wrong_incarnation",
            command(&next).to_signed(Some(&signer), valid).unwrap(),
        ),
    ];
    let ids: Vec<_> = bad.iter().map(|(_, message)| message.id.clone()).collect();
    for (_, message) in &bad {
        put(&world, message.clone()).await;
    }
    let handle = world.taskmanager.guest("vm");
    assert_eq!(handle.call::<String>("list", &()).await.unwrap(), "listed");
    let letters = letters(&world).await;
    let seen: Vec<_> = letters
        .iter()
        .map(|letter| letter.message.id.clone())
        .collect();
    assert_eq!(seen, ids);
    for (letter, (kind, message)) in letters.iter().zip(&bad) {
        assert!(letter.reason.starts_with(kind), "{}", letter.reason);
        assert_eq!(letter.message.body, message.body);
    }
    let pong = handle.ping(PATIENCE).await.unwrap();
    assert_eq!(pong.refused, bad.len() as u64);
    let told = async {
        while world.taskmanager.refused() < bad.len() as u64 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, told).await.unwrap();
    guest.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn s5_a_question_that_is_not_signed_changes_nothing() {
    let key = key();
    let world = signed_world(Some(&key)).await;
    world.taskmanager.provision("vm", ()).start().await.unwrap();
    let guest = trusting(&world, &[key.public()]).await;
    world.until(State::Succeeded).await;
    let now = crate::workflow::record::now_ms();
    let (signer, stranger) = (Signer::new(key), Signer::new(self::key()));
    let dismiss = ask(&world, Ask::Dismiss, None, (now, u64::MAX)).await;
    assert_eq!(refused(&dismiss), "unsigned");
    let dismiss = ask(&world, Ask::Dismiss, Some(&stranger), (now, u64::MAX)).await;
    assert_eq!(refused(&dismiss), "unknown_key");
    let dismiss = ask(&world, Ask::Dismiss, Some(&signer), (0, 1)).await;
    assert_eq!(refused(&dismiss), "expired");
    let pong = world.taskmanager.guest("vm").ping(PATIENCE).await.unwrap();
    assert_eq!(pong.refused, 3);
    assert_eq!(guest.stop().await, Served::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn w34_a_clock_that_is_wrong_by_years_refuses_nothing() {
    let key = key();
    let signer = Signer::new(key.clone());
    let world = signed_world(None).await;
    let spec = QueueSpec::new(machine().queue());
    world.broker.declare(&spec, within()).await.unwrap();
    let prepare = |command: &str| {
        let command = crate::CommandId::new(command).unwrap();
        let kind = crate::MessageId::new(PREPARE).unwrap();
        let payload = serde_json::value::RawValue::NULL.to_owned();
        Command::new(&machine(), command, kind, None, payload)
    };
    // By this machine's clock it expired decades ago: by its control plane's it has 1,000 s left.
    let hour = |n: u64| n * 3_600_000;
    let sent = prepare("c-1").to_signed(Some(&signer), |_| (hour(1), hour(2)));
    put(&world, sent.unwrap()).await;
    let guest = trusting(&world, &[key.public()]).await;
    let queue = machine().queue();
    let held = async {
        while world
            .broker
            .status(&queue, within())
            .await
            .unwrap()
            .in_flight
            == 0
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, held).await.unwrap();
    assert_eq!(world.runs(), 0);
    let ping = || Ask::Ping { nonce: "n".into() };
    let pong = ask(
        &world,
        ping(),
        Some(&signer),
        (hour(2) - 1_000_000, hour(2)),
    )
    .await;
    assert!(matches!(pong, Answer::Pong(_)), "{pong:?}");
    let command = crate::CommandId::new("c-1").unwrap();
    let wait_ms = 20_000;
    let status = Ask::Status { command, wait_ms };
    let state = ask(
        &world,
        status,
        Some(&signer),
        (hour(2) - 1_000_000, hour(2)),
    )
    .await;
    assert!(
        matches!(state, Answer::Command(CommandState::Done(_))),
        "{state:?}"
    );
    assert_eq!(world.runs(), 1);
    // Asked again after its time it is known, and not refused; another one is.
    let pong = ask(&world, ping(), Some(&signer), (hour(4), hour(5))).await;
    assert!(matches!(pong, Answer::Pong(_)), "{pong:?}");
    for id in ["c-1", "c-2"] {
        let sent = prepare(id).to_signed(Some(&signer), |_| (hour(1), hour(2)));
        put(&world, sent.unwrap()).await;
    }
    let dealt_with = async {
        loop {
            let status = world.broker.status(&queue, within()).await.unwrap();
            if status.ready + status.in_flight == 0 {
                return status.dead;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let dead = tokio::time::timeout(PATIENCE, dealt_with).await.unwrap();
    assert_eq!((dead, world.runs()), (1, 1));
    assert!(letters(&world).await[0].reason.starts_with("expired"));
    guest.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn s5_keys_are_changed_without_a_gap() {
    let (old, new) = (key(), key());
    let mut world = signed_world(Some(&old)).await;
    world.taskmanager.provision("vm", ()).start().await.unwrap();
    let mut guest = trusting(&world, &[old.public()]).await;
    world.until(State::Succeeded).await;
    let steps = [
        (vec![old.public(), new.public()], &old),
        (vec![old.public(), new.public()], &new),
        (vec![new.public()], &new),
    ];
    for (trusted, signing) in steps {
        guest.stop().await;
        guest = trusting(&world, &trusted).await;
        world.taskmanager = Taskmanager::with(world.broker.clone(), world.records.clone())
            .observing()
            .sign(signing.clone())
            .await
            .unwrap();
        let handle = world.taskmanager.guest("vm");
        assert_eq!(handle.call::<String>("list", &()).await.unwrap(), "listed");
        assert_eq!(handle.ping(PATIENCE).await.unwrap().refused, 0);
    }
    let left = Taskmanager::with(world.broker.clone(), world.records.clone());
    let left = left.observing().sign(old).await.unwrap();
    let error = left.guest("vm").ping(PATIENCE).await.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::NotTrusted);
    guest.stop().await;
}

#[test]
fn the_version_that_is_signed_is_the_one_that_travels() {
    let signer = Signer::new(key());
    let command = Command::new(
        &machine(),
        crate::CommandId::generate(),
        crate::MessageId::new(PREPARE).unwrap(),
        None,
        serde_json::value::RawValue::NULL.to_owned(),
    );
    let message = command.to_signed(Some(&signer), |_| (1, 2)).unwrap();
    assert!(signer.is_ours(&machine(), &message, VERSION));
    assert!(!signer.is_ours(&machine(), &message, VERSION + 1));
}
