//! The workflow on the embedded broker in memory: the cases of one process. Those of several
//! processes that are killed are the command's tests and the suite's.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::{
    collections::BTreeSet,
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::{
    sync::{Notify, oneshot},
    task::JoinHandle,
};

use super::*;
use crate::{
    Broker, Deadline, Error, ErrorKind, GuestAddress, GuestCredential, GuestId, Incarnation,
    Message, Phase, QueueName, Result,
    broker::{self, DeleteMode, QueueSpec},
    wire::Command,
};

/// Far longer than anything here takes: only a defect reaches it.
const PATIENCE: Duration = Duration::from_secs(30);

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn within() -> Deadline {
    Deadline::after(PATIENCE)
}

fn id(name: &str) -> GuestId {
    GuestId::new(name).unwrap()
}

/// A broker, records, and journals that outlive the guests on them.
struct World {
    broker: Arc<dyn Broker>,
    records: MemoryRecords,
    taskmanager: Taskmanager,
    journal: MemoryJournal,
    runs: Arc<AtomicU32>,
}

impl World {
    async fn new() -> Self {
        let broker = crate::connect("memory:").await.unwrap();
        let records = MemoryRecords::default();
        let taskmanager = Taskmanager::new(broker.clone(), records.clone())
            .await
            .unwrap();
        Self {
            broker,
            records,
            taskmanager,
            journal: MemoryJournal::default(),
            runs: Arc::default(),
        }
    }

    async fn attach(&self, wait: Duration) -> Result<Guest> {
        Guest::attach(self.broker.clone(), "vm", self.journal.clone())
            .wait(wait)
            .await
    }

    /// A guest that prepares at once.
    async fn guest(&self) -> Running {
        let runs = self.runs.clone();
        let guest = self.attach(PATIENCE).await.unwrap();
        Running::start(guest.on_prepare(move |payload: Value, _| {
            let runs = runs.clone();
            async move {
                runs.fetch_add(1, Ordering::SeqCst);
                Ok::<_, Failure>(json!({ "prepared": payload }))
            }
        }))
    }

    fn runs(&self) -> u32 {
        self.runs.load(Ordering::SeqCst)
    }

    async fn state(&self) -> Option<State> {
        let record = self.taskmanager.record(&id("vm")).await.unwrap();
        record.map(|record| record.state)
    }

    /// Waits until a record is saved in this state.
    async fn until(&self, state: State) {
        let mut saved = self.taskmanager.watch();
        if self.state().await == Some(state) {
            return;
        }
        let seen = async { while saved.recv().await.unwrap().state != state {} };
        tokio::time::timeout(PATIENCE, seen).await.unwrap();
    }

    /// Provisions in a task of its own.
    fn provision(&self, provision: Provision) -> JoinHandle<Result<ProvisionOutcome>> {
        tokio::spawn(async move { provision.await })
    }
}

/// A guest that serves until it is stopped or killed.
struct Running {
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<Result<Served>>,
}

impl Running {
    fn start(guest: Guest) -> Self {
        let (stop, stopped) = oneshot::channel();
        let served = tokio::spawn(guest.serve(async { _ = stopped.await }));
        Self {
            stop: Some(stop),
            served,
        }
    }

    /// Ends it if it has not ended by itself.
    async fn kill_or_ended(self) {
        self.served.abort();
        _ = self.served.await;
    }

    async fn stop(mut self) -> Served {
        _ = self.stop.take().unwrap().send(());
        self.served.await.unwrap().unwrap()
    }

    /// Ends it where it stands, as a kill would.
    async fn kill(self) {
        self.served.abort();
        assert!(self.served.await.unwrap_err().is_cancelled());
    }
}

fn kind_of(outcome: &ProvisionOutcome) -> (State, ReasonKind, Option<Stage>) {
    let reason = outcome.reason().unwrap();
    (outcome.state(), reason.kind, reason.stage)
}

#[tokio::test(flavor = "multi_thread")]
async fn w2_a_guest_that_comes_late_is_prepared_once() {
    for policy in [SendPolicy::PingFirst, SendPolicy::EnqueueFirst] {
        let world = World::new().await;
        let waiting = world.provision(
            world
                .taskmanager
                .provision("vm", json!({"n": 1}))
                .policy(policy),
        );
        world
            .until(if policy == SendPolicy::PingFirst {
                State::AwaitingGuest
            } else {
                State::Sent
            })
            .await;
        let guest = world.guest().await;
        let outcome = waiting.await.unwrap().unwrap();
        let ProvisionOutcome::Succeeded { result, runs } = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(
            (result, runs, world.runs()),
            (json!({"prepared": {"n": 1}}), 1, 1)
        );
        // The same call again returns the same outcome, and runs nothing.
        assert!(
            world
                .taskmanager
                .provision("vm", json!({"n": 1}))
                .await
                .is_ok()
        );
        let error = world
            .taskmanager
            .provision("vm", json!({"n": 2}))
            .await
            .unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Conflict);
        assert_eq!((world.runs(), guest.stop().await), (1, Served::Stopped));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_may_be_there_before_its_queue() {
    let world = World::new().await;
    let attaching = world.attach(PATIENCE);
    let provision = async { world.taskmanager.provision("vm", ()).start().await.unwrap() };
    let (guest, _) = tokio::join!(attaching, provision);
    let guest = Running::start(
        guest
            .unwrap()
            .on_prepare(|(): (), _| async { Ok::<_, Failure>(()) }),
    );
    world.until(State::Succeeded).await;
    guest.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn w1_w3_a_guest_that_never_came_leaves_nothing_and_is_turned_away_later() {
    for policy in [SendPolicy::PingFirst, SendPolicy::EnqueueFirst] {
        let world = World::new().await;
        let provision = world.taskmanager.provision("vm", ()).policy(policy);
        let outcome = provision.boot_deadline(millis(200)).await.unwrap();
        let expected = (
            State::NotDelivered,
            ReasonKind::NoConsumer,
            Some(Stage::Boot),
        );
        match policy {
            SendPolicy::PingFirst => assert_eq!(kind_of(&outcome), expected),
            SendPolicy::EnqueueFirst => assert_eq!(outcome.state(), State::NotDelivered),
        }
        let left = world.broker.list(within()).await.unwrap();
        assert!(
            left.iter().all(|queue| !queue.name.is_commands()),
            "{left:?}"
        );

        let error = world.attach(Duration::ZERO).await.unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::NoQueue | ErrorKind::Revoked),
            "{error}"
        );
        // Its hello is answered: it was given up. From then on its own journal says so.
        let error = world.attach(PATIENCE).await.unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Revoked);
        let error = world.attach(Duration::ZERO).await.unwrap_err();
        assert_eq!((error.kind(), world.runs()), (&ErrorKind::Revoked, 0));
        assert_eq!(world.state().await, Some(State::NotDelivered));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn w1_a_failed_host_ends_the_wait_at_once() {
    struct Dead;
    #[async_trait::async_trait]
    impl HostProbe for Dead {
        async fn probe(&self, _: &GuestAddress) -> HostState {
            HostState::Failed("no valid host was found".into())
        }
    }
    let world = World::new().await;
    world.taskmanager.probe_hosts(Dead);
    let outcome = world.taskmanager.provision("vm", ()).await.unwrap();
    assert_eq!(
        kind_of(&outcome),
        (State::NotDelivered, ReasonKind::HostFailed, None)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn w1_a_slow_host_is_heard_through_signals_and_pauses() {
    /// Answers once its question has been there for longer than the waits of the first moments.
    struct Slow;
    #[async_trait::async_trait]
    impl HostProbe for Slow {
        async fn probe(&self, _: &GuestAddress) -> HostState {
            tokio::time::sleep(secs(5)).await;
            HostState::Failed("it took its time".into())
        }
    }
    let world = World::new().await;
    world.taskmanager.probe_hosts(Slow);
    let provision = world.taskmanager.provision("vm", ());
    let outcome = provision.boot_deadline(secs(20)).await.unwrap();
    assert_eq!(
        kind_of(&outcome),
        (State::NotDelivered, ReasonKind::HostFailed, None)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_accepted_and_never_started_is_sent_again() {
    let mut world = World::new().await;
    let provision = world.taskmanager.provision("vm", ());
    let provision = provision.policy(SendPolicy::EnqueueFirst);
    provision.start().await.unwrap();
    world.until(State::Sent).await;
    world.taskmanager.close();
    // The guest acked it and ended there; the fence of a cancel that came then found it taken.
    let queue = GuestAddress::from(id("vm")).queue();
    let discard = DeleteMode::Discard;
    world
        .broker
        .delete(&queue, discard, within())
        .await
        .unwrap();
    let spec = QueueSpec::new(queue);
    world.broker.declare(&spec, within()).await.unwrap();
    let mut record = world.taskmanager.record(&id("vm")).await.unwrap().unwrap();
    let kind = crate::MessageId::new(record.kind()).unwrap();
    let (command, payload) = (record.command.clone(), record.payload.clone());
    let reports = Some(QueueName::reports("main").unwrap());
    let command = Command::new(&record.address, command, kind, reports, payload);
    let entry = Entry::accepted(&command);
    world.journal.save(&entry).await.unwrap();
    (record.state, record.accepted) = (State::Running, true);
    record.revision += 1;
    world.records.save(&record).await.unwrap();

    world.taskmanager = resumed(&world).await;
    let guest = world.guest().await;
    world.until(State::Succeeded).await;
    assert_eq!(world.runs(), 1);
    guest.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prepare_that_fails_or_panics_says_why() {
    for (panics, expected) in [
        (false, "disk is full: no space"),
        (true, "the handler panicked: oh no"),
    ] {
        let world = World::new().await;
        world.taskmanager.provision("vm", ()).start().await.unwrap();
        let guest = world
            .attach(PATIENCE)
            .await
            .unwrap()
            .on_prepare(move |(): (), _| async move {
                assert!(!panics, "oh no");
                Err::<(), _>(Failure::new("disk is full: no space"))
            });
        let guest = Running::start(guest);
        let outcome = world.taskmanager.provision("vm", ()).await.unwrap();
        let ProvisionOutcome::Failed { reason, runs } = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(
            (reason.kind, reason.detail.as_str(), runs),
            (ReasonKind::GuestFailed, expected, 1)
        );
        guest.stop().await;
    }
}

/// A handler that tells when it runs, and then waits for ever on its first run.
fn hangs_once(world: &World, guest: Guest) -> (Guest, Arc<Notify>) {
    let (runs, started) = (world.runs.clone(), Arc::new(Notify::new()));
    let tell = started.clone();
    let guest = guest.on_prepare(move |(): (), cx: Context| {
        let (runs, tell) = (runs.clone(), tell.clone());
        async move {
            runs.fetch_add(1, Ordering::SeqCst);
            if cx.run() == 1 {
                cx.progress(&json!("halfway")).await?;
                tell.notify_one();
                std::future::pending::<()>().await;
            }
            Ok::<_, Failure>(cx.checkpoint::<String>())
        }
    });
    (guest, started)
}

#[tokio::test(flavor = "multi_thread")]
async fn w9_a_guest_that_dies_in_mid_prepare_ends_as_it_chose() {
    for choice in [Interrupted::Fail, Interrupted::RunAgain] {
        let world = World::new().await;
        world.taskmanager.provision("vm", ()).start().await.unwrap();
        let (guest, started) = hangs_once(&world, world.attach(PATIENCE).await.unwrap());
        let guest = Running::start(guest);
        started.notified().await;
        guest.kill().await;

        let (guest, _) = hangs_once(&world, world.attach(PATIENCE).await.unwrap());
        let guest = Running::start(guest.on_interrupted(choice));
        let outcome = world.taskmanager.provision("vm", ()).await.unwrap();
        match outcome {
            ProvisionOutcome::Failed { runs, .. } => {
                assert_eq!((choice, runs), (Interrupted::Fail, 1))
            }
            ProvisionOutcome::Succeeded { result, runs } => {
                assert_eq!(
                    (choice, runs, result),
                    (Interrupted::RunAgain, 2, json!("halfway"))
                );
            }
            other => panic!("{other:?}"),
        }
        guest.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn w11_a_duplicate_is_acked_and_not_run() {
    let world = World::new().await;
    world.taskmanager.provision("vm", ()).start().await.unwrap();
    let guest = world.guest().await;
    world.until(State::Succeeded).await;
    let record = world.taskmanager.record(&id("vm")).await.unwrap().unwrap();
    let kind = crate::MessageId::new(record.kind()).unwrap();
    let command = Command::new(&record.address, record.command, kind, None, record.payload);
    let queue = record.address.queue();
    world
        .broker
        .publish(&queue, command.to_message().unwrap(), within())
        .await
        .unwrap();
    // A call behind it in the queue is answered only once it was dealt with.
    let error = world
        .taskmanager
        .guest("vm")
        .call::<()>("nothing", &())
        .await
        .unwrap_err();
    assert_eq!(
        *error.kind(),
        ErrorKind::Remote {
            kind: "unknown_command".into()
        }
    );
    assert_eq!(world.runs(), 1);
    guest.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn w14_w15_a_taskmanager_that_ends_anywhere_is_resumed() {
    for state in [State::AwaitingGuest, State::Sent, State::Running] {
        let mut world = World::new().await;
        let policy = if state == State::Sent {
            SendPolicy::EnqueueFirst
        } else {
            SendPolicy::PingFirst
        };
        world
            .taskmanager
            .provision("vm", ())
            .policy(policy)
            .start()
            .await
            .unwrap();
        let started = Arc::new(Notify::new());
        let proceed = Arc::new(Notify::new());
        let mut guest = None;
        if state == State::Running {
            let (tell, wait) = (started.clone(), proceed.clone());
            let attached = world.attach(PATIENCE).await.unwrap();
            guest = Some(Running::start(attached.on_prepare(move |(): (), _| {
                let (tell, wait) = (tell.clone(), wait.clone());
                async move {
                    tell.notify_one();
                    wait.notified().await;
                    Ok::<_, Failure>(())
                }
            })));
            started.notified().await;
        }
        world.until(state).await;
        world.taskmanager.close();
        proceed.notify_one();
        world.taskmanager = resumed(&world).await;
        let guest = match guest {
            Some(guest) => guest,
            None => world.guest().await,
        };
        world.until(State::Succeeded).await;
        guest.stop().await;
    }
}

/// The next taskmanager on the same records, once the last one has let go of its queue.
async fn resumed(world: &World) -> Taskmanager {
    resumed_over(world, world.broker.clone()).await
}

/// The same over this broker.
async fn resumed_over(world: &World, broker: Arc<dyn Broker>) -> Taskmanager {
    let started = Instant::now();
    loop {
        match Taskmanager::new(broker.clone(), world.records.clone()).await {
            Ok(taskmanager) => return taskmanager,
            Err(error) => {
                assert_eq!(*error.kind(), ErrorKind::Conflict);
                assert!(started.elapsed() < PATIENCE, "{error}");
                tokio::task::yield_now().await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn w16_a_second_taskmanager_is_refused() {
    let world = World::new().await;
    let second = Taskmanager::new(world.broker.clone(), MemoryRecords::default()).await;
    assert_eq!(*second.unwrap_err().kind(), ErrorKind::Conflict);
    // Under another name it may be there, but the guest runs only the first prepare.
    let named = Taskmanager::named("other", world.broker.clone(), MemoryRecords::default()).await;
    let other = named.unwrap();
    world
        .taskmanager
        .provision("vm", json!(1))
        .start()
        .await
        .unwrap();
    let guest = world.guest().await;
    world.until(State::Succeeded).await;
    let outcome = other.provision("vm", json!(2)).await.unwrap();
    assert_eq!(
        kind_of(&outcome),
        (State::Failed, ReasonKind::Conflict, None)
    );
    assert_eq!(world.runs(), 1);
    guest.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn w23_a_queue_deleted_under_a_waiting_guest_comes_back_with_its_command() {
    let world = World::new().await;
    world
        .taskmanager
        .provision("vm", ())
        .policy(SendPolicy::EnqueueFirst)
        .start()
        .await
        .unwrap();
    world.until(State::Sent).await;
    let queue = GuestAddress::from(id("vm")).queue();
    world
        .broker
        .delete(&queue, DeleteMode::Discard, within())
        .await
        .unwrap();
    let guest = world.guest().await;
    world.until(State::Succeeded).await;
    assert_eq!(world.runs(), 1);
    guest.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn w25_a_new_incarnation_fences_the_old_machine() {
    let world = World::new().await;
    world.taskmanager.provision("vm", ()).start().await.unwrap();
    let zombie = world.guest().await;
    world.until(State::Succeeded).await;
    let again = world
        .taskmanager
        .provision("vm", ())
        .again(true)
        .start()
        .await
        .unwrap();
    assert_eq!(again.address.incarnation.get(), 2);
    assert_eq!(zombie.served.await.unwrap().unwrap(), Served::Revoked);
    // The old machine's journal is not the new one's.
    let old = Guest::attach(world.broker.clone(), "vm", world.journal.clone())
        .incarnation(Incarnation::new(2).unwrap());
    assert_eq!(*old.await.unwrap_err().kind(), ErrorKind::WrongIncarnation);
    let new = Guest::attach(world.broker.clone(), "vm", MemoryJournal::default())
        .incarnation(Incarnation::new(2).unwrap())
        .wait(PATIENCE);
    let guest = Running::start(
        new.await
            .unwrap()
            .on_prepare(|(): (), _| async { Ok::<_, Failure>(()) }),
    );
    world.until(State::Succeeded).await;
    guest.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn w26_a_second_guest_of_one_identity_is_told() {
    let world = World::new().await;
    world.taskmanager.provision("vm", ()).start().await.unwrap();
    let guest = world.guest().await;
    let clone = Guest::attach(world.broker.clone(), "vm", MemoryJournal::default());
    assert_eq!(*clone.await.unwrap_err().kind(), ErrorKind::Conflict);
    guest.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn w28_what_cannot_be_understood_is_kept_and_does_not_stop_prepare() {
    let world = World::new().await;
    world
        .taskmanager
        .provision("vm", ())
        .policy(SendPolicy::EnqueueFirst)
        .start()
        .await
        .unwrap();
    world.until(State::Sent).await;
    let queue = GuestAddress::from(id("vm")).queue();
    for body in ["\u{0}garbage", r#"{"wilco":99}"#] {
        let poison = Message::new("prepare", body).unwrap();
        world
            .broker
            .publish(&queue, poison, within())
            .await
            .unwrap();
    }
    let guest = world.guest().await;
    world.until(State::Succeeded).await;
    // Commands are dealt with in order: an answer to a later one says that these were.
    let error = world
        .taskmanager
        .guest("vm")
        .call::<()>("nothing", &())
        .await
        .unwrap_err();
    assert_eq!(
        *error.kind(),
        ErrorKind::Remote {
            kind: "unknown_command".into()
        }
    );
    let ten = const { std::num::NonZeroU32::new(10).unwrap() };
    let letters = world
        .broker
        .dead_letters(&queue, None, ten, within())
        .await
        .unwrap();
    let bodies: Vec<_> = letters
        .iter()
        .map(|letter| letter.message.body.as_ref())
        .collect();
    assert_eq!(bodies, [b"\0garbage".as_slice(), br#"{"wilco":99}"#]);
    guest.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn w32_commands_wait_for_prepare() {
    let world = World::new().await;
    let handle = world.taskmanager.guest("vm");
    assert_eq!(
        *handle.cast("x", &()).await.unwrap_err().kind(),
        ErrorKind::InvalidInput
    );
    world.taskmanager.provision("vm", ()).start().await.unwrap();
    assert_eq!(
        *handle.cast("x", &()).await.unwrap_err().kind(),
        ErrorKind::NotPrepared
    );
    // One that goes past the records is refused by the guest itself.
    let (guest, started) = hangs_once(&world, world.attach(PATIENCE).await.unwrap());
    let guest = Running::start(guest);
    started.notified().await;
    guest.kill().await;
    let guest = world
        .attach(PATIENCE)
        .await
        .unwrap()
        .on_prepare(|(): (), _| async { Ok::<_, Failure>(()) });
    let guest = Running::start(guest);
    let error = handle
        .incarnation(Incarnation::FIRST)
        .call::<()>("x", &())
        .await
        .unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::NotPrepared);
    guest.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn w36_w37_a_cancel_meets_one_truth() {
    // Before the guest: revoked. After it was accepted: too late. Racing: one of the two, and it holds.
    let world = World::new().await;
    world
        .taskmanager
        .provision("vm", ())
        .policy(SendPolicy::EnqueueFirst)
        .start()
        .await
        .unwrap();
    world.until(State::Sent).await;
    assert_eq!(
        world.taskmanager.cancel(&id("vm")).await.unwrap(),
        Cancelled::Revoked
    );
    assert_eq!(
        world.taskmanager.cancel(&id("vm")).await.unwrap(),
        Cancelled::HadEnded
    );

    for round in 0..40 {
        let world = World::new().await;
        world
            .taskmanager
            .provision("vm", ())
            .policy(SendPolicy::EnqueueFirst)
            .start()
            .await
            .unwrap();
        world.until(State::Sent).await;
        let attach = async {
            match world.attach(millis(500)).await {
                Ok(guest) => {
                    let runs = world.runs.clone();
                    Some(Running::start(guest.on_prepare(move |(): (), _| {
                        let runs = runs.clone();
                        async move {
                            runs.fetch_add(1, Ordering::SeqCst);
                            Ok::<_, Failure>(())
                        }
                    })))
                }
                Err(error) => {
                    assert!(
                        matches!(error.kind(), ErrorKind::NoQueue | ErrorKind::Revoked),
                        "{error}"
                    );
                    None
                }
            }
        };
        let cancel = async {
            tokio::time::sleep(Duration::from_micros(round * 150)).await;
            world.taskmanager.cancel(&id("vm")).await.unwrap()
        };
        let (guest, cancelled) = tokio::join!(attach, cancel);
        let outcome = world.taskmanager.provision("vm", ()).await.unwrap();
        match cancelled {
            Cancelled::Revoked => {
                assert_eq!(
                    (outcome.state(), world.runs()),
                    (State::NotDelivered, 0),
                    "round {round}"
                );
            }
            Cancelled::TooLate | Cancelled::HadEnded => {
                assert_eq!(
                    (outcome.state(), world.runs()),
                    (State::Succeeded, 1),
                    "round {round}"
                );
            }
        }
        if let Some(guest) = guest {
            guest.kill_or_ended().await;
        }
        assert_eq!(
            world.runs(),
            u32::from(outcome.state() == State::Succeeded),
            "round {round}"
        );
    }
}

/// A broker whose lanes lose the questions that have this word in them. It has credentials, too: of those
/// it keeps only whose there are.
#[derive(Debug)]
struct Deaf {
    broker: Arc<dyn Broker>,
    to: &'static [u8],
    /// Deletes fail until this moment.
    deletes_from: Instant,
    issued: Arc<std::sync::Mutex<BTreeSet<QueueName>>>,
}

#[async_trait::async_trait]
impl Broker for Deaf {
    fn backend(&self) -> &'static str {
        self.broker.backend()
    }
    async fn declare(&self, spec: &QueueSpec, deadline: Deadline) -> Result<broker::Declared> {
        self.broker.declare(spec, deadline).await
    }
    async fn status(&self, queue: &QueueName, deadline: Deadline) -> Result<broker::QueueStatus> {
        self.broker.status(queue, deadline).await
    }
    async fn list(&self, deadline: Deadline) -> Result<Vec<broker::QueueStatus>> {
        self.broker.list(deadline).await
    }
    async fn delete(
        &self,
        queue: &QueueName,
        mode: DeleteMode,
        deadline: Deadline,
    ) -> Result<broker::Discarded> {
        if Instant::now() < self.deletes_from {
            return Err(Error::new(ErrorKind::BrokerUnreachable, "not now"));
        }
        self.broker.delete(queue, mode, deadline).await
    }
    async fn publish(
        &self,
        queue: &QueueName,
        message: Message,
        deadline: Deadline,
    ) -> Result<broker::Receipt> {
        self.broker.publish(queue, message, deadline).await
    }
    async fn consume(
        &self,
        queue: &QueueName,
        options: broker::ConsumeOptions,
        deadline: Deadline,
    ) -> Result<Box<dyn broker::Consumer>> {
        self.broker.consume(queue, options, deadline).await
    }
    async fn dead_letters(
        &self,
        queue: &QueueName,
        after: Option<&broker::DeadLetterKey>,
        limit: NonZeroU32,
        deadline: Deadline,
    ) -> Result<Vec<broker::DeadLetter>> {
        self.broker
            .dead_letters(queue, after, limit, deadline)
            .await
    }
    async fn redrive(
        &self,
        queue: &QueueName,
        key: &broker::DeadLetterKey,
        deadline: Deadline,
    ) -> Result<bool> {
        self.broker.redrive(queue, key, deadline).await
    }
    async fn request(&self, lane: &GuestAddress, body: Bytes, deadline: Deadline) -> Result<Bytes> {
        if body.windows(self.to.len()).any(|part| part == self.to) {
            return Err(Error::new(ErrorKind::ConsumerSilent, "nobody answers"));
        }
        self.broker.request(lane, body, deadline).await
    }
    async fn respond(
        &self,
        lane: &GuestAddress,
        deadline: Deadline,
    ) -> Result<Box<dyn broker::Responder>> {
        self.broker.respond(lane, deadline).await
    }
    async fn durability(&self, deadline: Deadline) -> Result<crate::durability::DurabilityReport> {
        self.broker.durability(deadline).await
    }
    async fn issue_credential(
        &self,
        address: &GuestAddress,
        _reports: &QueueName,
        deadline: Deadline,
    ) -> Result<GuestCredential> {
        self.broker.status(&address.queue(), deadline).await?;
        self.issued.lock().unwrap().insert(address.queue());
        Ok(GuestCredential::new(address.clone(), "memory:"))
    }
    async fn revoke_credential(&self, address: &GuestAddress, _deadline: Deadline) -> Result<()> {
        self.issued.lock().unwrap().remove(&address.queue());
        Ok(())
    }
    async fn credentials(&self, _deadline: Deadline) -> Result<Vec<QueueName>> {
        Ok(self.issued.lock().unwrap().iter().cloned().collect())
    }
    async fn close(&self, deadline: Deadline) -> Result<()> {
        self.broker.close(deadline).await
    }
}

/// A broker that has credentials, and whose there are on it.
fn issuing(world: &World) -> Arc<Deaf> {
    Arc::new(Deaf {
        broker: world.broker.clone(),
        to: b"nothing",
        deletes_from: Instant::now(),
        issued: Arc::default(),
    })
}

async fn until_issued(broker: &Deaf, wanted: &[QueueName]) {
    let started = Instant::now();
    while broker.credentials(within()).await.unwrap() != wanted {
        assert!(started.elapsed() < PATIENCE, "{broker:?}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn s1_a_credential_goes_with_its_machine() {
    let mut world = World::new().await;
    world.taskmanager.close();
    let broker = issuing(&world);
    world.taskmanager = resumed_over(&world, broker.clone()).await;
    let provision = world.taskmanager.provision("vm", ()).with_credential(true);
    let first = provision.start().await.unwrap().address;
    // At once: it waits for the queue.
    let issued = world.taskmanager.issue_credential(&id("vm")).await.unwrap();
    assert_eq!(issued.address, first);
    until_issued(&broker, &[first.queue()]).await;
    world.taskmanager.cancel(&id("vm")).await.unwrap();
    until_issued(&broker, &[]).await;
    let error = world.taskmanager.issue_credential(&id("vm")).await;
    assert_eq!(*error.unwrap_err().kind(), ErrorKind::Revoked);

    // A successor without one takes its predecessor's away all the same.
    broker.issued.lock().unwrap().insert(first.queue());
    let second = world.taskmanager.provision("vm", ()).again(true);
    second.start().await.unwrap();
    until_issued(&broker, &[]).await;
    world.taskmanager.cancel(&id("vm")).await.unwrap();

    let other = world.taskmanager.provision("other", ());
    other.start().await.unwrap();
    let error = world.taskmanager.issue_credential(&id("other")).await;
    assert_eq!(*error.unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[tokio::test(flavor = "multi_thread")]
async fn s1_a_credential_that_a_crash_left_is_revoked_by_the_next_taskmanager() {
    let mut world = World::new().await;
    world.taskmanager.close();
    let broker = issuing(&world);
    let mut record = Record::new(
        GuestAddress::from(id("vm")),
        serde_json::value::RawValue::NULL.to_owned().into(),
        SendPolicy::default(),
        Deadlines::default(),
        0,
    );
    record.credential = true;
    (record.state, record.revision) = (State::NotDelivered, 1);
    world.records.save(&record).await.unwrap();
    broker.issued.lock().unwrap().insert(record.address.queue());
    world.taskmanager = resumed_over(&world, broker.clone()).await;
    until_issued(&broker, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn w1_a_queue_that_could_not_be_deleted_goes_when_the_broker_is_back() {
    let mut world = World::new().await;
    world.taskmanager.close();
    let broker = Arc::new(Deaf {
        broker: world.broker.clone(),
        to: b"nothing",
        deletes_from: Instant::now() + secs(7),
        issued: Arc::default(),
    });
    world.taskmanager = resumed_over(&world, broker).await;
    let provision = world.taskmanager.provision("vm", ());
    provision.start().await.unwrap();
    world.until(State::AwaitingGuest).await;
    // It was never published: there is an outcome, though the broker cannot be reached.
    let cancelled = world.taskmanager.cancel(&id("vm")).await.unwrap();
    assert_eq!(cancelled, Cancelled::Revoked);
    let started = Instant::now();
    let left = async || {
        let left = world.broker.list(within()).await.unwrap();
        left.iter().any(|queue| queue.name.is_commands())
    };
    while left().await {
        assert!(started.elapsed() < PATIENCE);
        tokio::task::yield_now().await;
    }
}

/// A guest whose prepare tells that it runs, and goes on when it is told to.
async fn two_steps(world: &World) -> (Running, Arc<Notify>, Arc<Notify>) {
    let (started, proceed) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (tell, wait, runs) = (started.clone(), proceed.clone(), world.runs.clone());
    let guest = world.attach(PATIENCE).await.unwrap();
    let guest = guest.on_prepare(move |(): (), _| {
        let (tell, wait, runs) = (tell.clone(), wait.clone(), runs.clone());
        async move {
            runs.fetch_add(1, Ordering::SeqCst);
            tell.notify_one();
            wait.notified().await;
            Ok::<_, Failure>(())
        }
    });
    (Running::start(guest), started, proceed)
}

#[tokio::test(flavor = "multi_thread")]
async fn w37_a_guest_that_accepted_before_the_fence_lives_on() {
    let mut world = World::new().await;
    world.taskmanager.close();
    let broker = Arc::new(Deaf {
        broker: world.broker.clone(),
        to: b"withdraw",
        deletes_from: Instant::now(),
        issued: Arc::default(),
    });
    world.taskmanager = resumed_over(&world, broker).await;
    let provision = world.taskmanager.provision("vm", ());
    provision.start().await.unwrap();
    let (guest, started, proceed) = two_steps(&world).await;
    started.notified().await;
    world.until(State::Running).await;
    let cancelled = world.taskmanager.cancel(&id("vm")).await.unwrap();
    assert_eq!(cancelled, Cancelled::TooLate);
    // Were it dismissed after the fence, that would be here by the time that this is answered.
    world.until(State::Running).await;
    world.taskmanager.guest("vm").ping(secs(5)).await.unwrap();
    assert!(!guest.served.is_finished());
    proceed.notify_one();
    world.until(State::Succeeded).await;
    assert_eq!((guest.stop().await, world.runs()), (Served::Stopped, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn w15_silence_is_counted_from_when_somebody_listens() {
    let mut world = World::new().await;
    world.taskmanager.provision("vm", ()).start().await.unwrap();
    let (guest, started, proceed) = two_steps(&world).await;
    started.notified().await;
    world.until(State::Running).await;
    world.taskmanager.close();
    // Nobody was there to hear the guest for ten minutes.
    let mut record = world.taskmanager.record(&id("vm")).await.unwrap().unwrap();
    record.seen_ms = record.seen_ms.map(|seen| seen - 600_000);
    record.revision += 1;
    world.records.save(&record).await.unwrap();
    world.taskmanager = resumed(&world).await;
    let waiting = world.provision(world.taskmanager.provision("vm", ()));
    let handle = world.taskmanager.guest("vm");
    handle.ping(secs(5)).await.unwrap();
    proceed.notify_one();
    let outcome = waiting.await.unwrap().unwrap();
    assert_eq!(outcome.state(), State::Succeeded, "{outcome}");
    guest.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_ends_with_the_guest_that_runs_it() {
    struct Tell(Option<oneshot::Sender<()>>);
    impl Drop for Tell {
        fn drop(&mut self) {
            _ = self.0.take().unwrap().send(());
        }
    }
    let world = World::new().await;
    world.taskmanager.provision("vm", ()).start().await.unwrap();
    let (dropped, is_dropped) = oneshot::channel();
    let tell = Arc::new(std::sync::Mutex::new(Some(Tell(Some(dropped)))));
    let started = Arc::new(Notify::new());
    let running = started.clone();
    let guest = world.attach(PATIENCE).await.unwrap();
    let guest = Running::start(guest.on_prepare(move |(): (), _| {
        let (tell, running) = (tell.lock().unwrap().take(), running.clone());
        async move {
            running.notify_one();
            std::future::pending::<()>().await;
            drop(tell);
            Ok::<_, Failure>(())
        }
    }));
    started.notified().await;
    guest.kill().await;
    tokio::time::timeout(PATIENCE, is_dropped)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn w23_a_queue_deleted_before_its_guest_came_is_declared_again() {
    let world = World::new().await;
    world.taskmanager.provision("vm", ()).start().await.unwrap();
    world.until(State::AwaitingGuest).await;
    let queue = GuestAddress::from(id("vm")).queue();
    world
        .broker
        .delete(&queue, DeleteMode::Discard, within())
        .await
        .unwrap();
    let guest = world.guest().await;
    world.until(State::Succeeded).await;
    guest.stop().await;
}

/// Records that store everything, and say once that they did not.
#[derive(Clone, Debug)]
struct Doubtful(MemoryRecords, Arc<AtomicU32>);

#[async_trait::async_trait]
impl Records for Doubtful {
    async fn own(&self) -> Result<()> {
        self.0.own().await
    }
    async fn save(&self, record: &Record) -> Result<()> {
        self.0.save(record).await?;
        if self.1.fetch_add(1, Ordering::SeqCst) == 1 {
            return Err(Error::new(ErrorKind::DeadlineExceeded, "no answer in time"));
        }
        Ok(())
    }
    async fn newest(&self, guest: &GuestId) -> Result<Option<Record>> {
        self.0.newest(guest).await
    }
    async fn list(&self) -> Result<Vec<Record>> {
        self.0.list().await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_that_was_stored_without_an_answer_stops_nothing() {
    let mut world = World::new().await;
    let records = Doubtful(MemoryRecords::default(), Arc::default());
    let named = Taskmanager::named("other", world.broker.clone(), records);
    world.taskmanager = named.await.unwrap();
    let waiting = world.provision(world.taskmanager.provision("vm", ()));
    let guest = world.guest().await;
    let outcome = waiting.await.unwrap().unwrap();
    assert_eq!(outcome.state(), State::Succeeded);
    guest.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_recorded_and_not_driven_is_cancelled_and_deleted_all_the_same() {
    let world = World::new().await;
    let mut record = Record::new(
        GuestAddress::from(id("vm")),
        serde_json::value::RawValue::NULL.to_owned().into(),
        SendPolicy::default(),
        Deadlines::default(),
        1,
    );
    record.deadlines.total = secs(u64::MAX / 1_000_000);
    record.deadlines.boot = record.deadlines.total;
    record.revision = 1;
    world.records.save(&record).await.unwrap();
    let cancelled = world.taskmanager.cancel(&id("vm")).await.unwrap();
    assert_eq!(cancelled, Cancelled::Revoked);
    assert_eq!(world.state().await, Some(State::NotDelivered));
    world.taskmanager.delete(&id("vm")).await.unwrap();
    assert_eq!(world.state().await, Some(State::Deleted));
    // Nothing is decided any more by one that is closed, and it does not say so.
    world.taskmanager.close();
    let error = world.taskmanager.cancel(&id("vm")).await.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Closed);
}

#[tokio::test(flavor = "multi_thread")]
async fn w25_a_machine_is_fenced_though_its_successor_never_came() {
    let world = World::new().await;
    world.taskmanager.provision("vm", ()).start().await.unwrap();
    let zombie = world.guest().await;
    world.until(State::Succeeded).await;
    // The second was given up before it was declared: the broker was out of reach.
    let mut second = world.taskmanager.record(&id("vm")).await.unwrap().unwrap();
    second.address.incarnation = second.address.incarnation.next();
    (second.state, second.revision) = (State::NotDelivered, 1);
    world.records.save(&second).await.unwrap();
    let third = world.taskmanager.provision("vm", ()).again(true);
    assert_eq!(third.start().await.unwrap().address.incarnation.get(), 3);
    let served = tokio::time::timeout(PATIENCE, zombie.served).await;
    assert_eq!(served.unwrap().unwrap().unwrap(), Served::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn w36_delete_leaves_nothing_and_turns_the_machine_away() {
    let world = World::new().await;
    world.taskmanager.provision("vm", ()).start().await.unwrap();
    let guest = world.guest().await;
    world.until(State::Succeeded).await;
    world.taskmanager.delete(&id("vm")).await.unwrap();
    assert_eq!(guest.served.await.unwrap().unwrap(), Served::Revoked);
    let left = world.broker.list(within()).await.unwrap();
    assert!(
        left.iter().all(|queue| !queue.name.is_commands()),
        "{left:?}"
    );
    let error = world.taskmanager.provision("vm", ()).await.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn w40_a_guest_that_reboots_while_it_waits_is_the_same_incarnation() {
    let world = World::new().await;
    world
        .taskmanager
        .provision("vm", ())
        .policy(SendPolicy::EnqueueFirst)
        .start()
        .await
        .unwrap();
    world.until(State::Sent).await;
    let first = world.attach(PATIENCE).await.unwrap();
    let handle = world.taskmanager.guest("vm");
    let before = handle.ping(secs(5)).await.unwrap();
    drop(first);
    let guest = world.guest().await;
    let after = handle.ping(secs(5)).await.unwrap();
    assert_ne!(before.boot, after.boot);
    assert_eq!(before.incarnation, after.incarnation);
    world.until(State::Succeeded).await;
    assert_eq!(world.runs(), 1);
    guest.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r1_r4_a_busy_guest_answers_and_says_what_it_does() {
    let world = World::new().await;
    world.taskmanager.provision("vm", ()).start().await.unwrap();
    let (guest, started) = hangs_once(&world, world.attach(PATIENCE).await.unwrap());
    let guest = Running::start(guest);
    started.notified().await;
    let pong = world.taskmanager.guest("vm").ping(secs(5)).await.unwrap();
    let last = pong.last_command.unwrap();
    assert_eq!(
        (pong.phase, last.kind.as_str(), last.state.as_str()),
        (Phase::Busy, "prepare", "running")
    );
    guest.kill().await;
    // The tasks of a guest that is dropped end with it, but not before the drop returns.
    let started = Instant::now();
    while let Ok(pong) = world.taskmanager.guest("vm").ping(secs(5)).await {
        assert!(started.elapsed() < PATIENCE, "{pong:?}");
    }
    let error = world
        .taskmanager
        .guest("vm")
        .ping(secs(5))
        .await
        .unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::NoConsumer);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_return_results_and_typed_errors() {
    let world = World::new().await;
    world.taskmanager.provision("vm", ()).start().await.unwrap();
    let guest = world
        .attach(PATIENCE)
        .await
        .unwrap()
        .on_prepare(|(): (), _| async { Ok::<_, Failure>(()) })
        .on("add", |(a, b): (i64, i64), _| async move {
            Ok::<_, Failure>(a + b)
        })
        .on("fail", |(): (), _| async {
            Err::<(), _>(Failure::of_kind("no_such_user", "who is bob?"))
        });
    let guest = Running::start(guest);
    world.until(State::Succeeded).await;
    let handle = world.taskmanager.guest("vm");
    assert_eq!(handle.call::<i64>("add", &(2, 3)).await.unwrap(), 5);
    let error = handle.call::<()>("fail", &()).await.unwrap_err();
    assert_eq!(
        *error.kind(),
        ErrorKind::Remote {
            kind: "no_such_user".into()
        }
    );
    let error = handle.call::<()>("add", &"hunter2").await.unwrap_err();
    assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
    assert_eq!(
        *error.kind(),
        ErrorKind::Remote {
            kind: "poison".into()
        }
    );
    guest.stop().await;
    assert_eq!(
        *handle.call::<i64>("add", &(2, 3)).await.unwrap_err().kind(),
        ErrorKind::NoConsumer
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cast_is_guarded_by_a_ping_unless_a_pong_is_young_enough() {
    let world = World::new().await;
    world.taskmanager.provision("vm", ()).start().await.unwrap();
    let guest = world.guest().await;
    world.until(State::Succeeded).await;
    let careful = world.taskmanager.guest("vm");
    let trusting = world.taskmanager.guest("vm").pong_max_age(PATIENCE);
    trusting.call::<()>("nothing", &()).await.unwrap_err();
    guest.stop().await;
    let gone = careful.cast("nothing", &()).await.unwrap_err();
    assert_eq!(*gone.kind(), ErrorKind::NoConsumer);
    // Its pong is young enough: the cast waits in the queue. A ping that fails ends that.
    trusting.cast("nothing", &()).await.unwrap();
    assert_eq!(trusting.queue().await.unwrap().ready, 1);
    assert!(trusting.ping(secs(5)).await.is_err());
    let gone = trusting.cast("nothing", &()).await.unwrap_err();
    assert_eq!(*gone.kind(), ErrorKind::NoConsumer);
}

#[tokio::test(flavor = "multi_thread")]
async fn s4_payloads_never_show_in_debug_forms() {
    const SECRET: &str = "hunter2";
    let world = World::new().await;
    let provision = world
        .taskmanager
        .provision("vm", json!({ "password": SECRET }));
    assert!(!format!("{provision:?}").contains(SECRET));
    let record = provision.start().await.unwrap();
    let kind = crate::MessageId::new(record.kind()).unwrap();
    let payload = record.payload.clone();
    let command = Command::new(&record.address, record.command.clone(), kind, None, payload);
    let message = command.to_message().unwrap();
    let entry = Entry::accepted(&command);
    let shown = format!(
        "{record:?} {command:?} {message:?} {entry:?} {:?}",
        world.taskmanager
    );
    assert!(!shown.contains(SECRET), "{shown}");
    assert!(
        message
            .body
            .windows(SECRET.len())
            .any(|part| part == SECRET.as_bytes())
    );
}

#[cfg(feature = "sqlite")]
#[tokio::test]
async fn sqlite_records_and_journal_keep_what_memory_keeps() {
    let dir = tempfile::tempdir().unwrap();
    let address = GuestAddress::from(id("vm"));
    let new = || {
        Record::new(
            address.clone(),
            serde_json::value::RawValue::NULL.to_owned().into(),
            SendPolicy::default(),
            Deadlines::default(),
            7,
        )
    };
    let stores: [Box<dyn Records>; 2] = [
        Box::new(MemoryRecords::default()),
        Box::new(
            SqliteRecords::open(dir.path().join("records.db"))
                .await
                .unwrap(),
        ),
    ];
    for records in stores {
        records.own().await.unwrap();
        let mut record = new();
        let conflict = records.save(&record).await.unwrap_err();
        assert_eq!(*conflict.kind(), ErrorKind::Conflict);
        record.revision = 1;
        records.save(&record).await.unwrap();
        assert_eq!(
            *records.save(&record).await.unwrap_err().kind(),
            ErrorKind::Conflict
        );
        record.revision = 2;
        record.state = State::Sent;
        records.save(&record).await.unwrap();
        let mut next = new();
        next.address.incarnation = next.address.incarnation.next();
        next.revision = 1;
        records.save(&next).await.unwrap();
        assert_eq!(
            records.newest(&id("vm")).await.unwrap().unwrap().address,
            next.address
        );
        assert_eq!(records.list().await.unwrap().len(), 1);
        assert!(records.newest(&id("other")).await.unwrap().is_none());
    }
    let second = SqliteRecords::open(dir.path().join("records.db"))
        .await
        .unwrap();
    second.own().await.unwrap();
    let third = SqliteRecords::open(dir.path().join("records.db"))
        .await
        .unwrap();
    assert_eq!(*third.own().await.unwrap_err().kind(), ErrorKind::Conflict);
}

#[cfg(feature = "sqlite")]
#[tokio::test]
async fn journals_are_bound_to_one_machine_and_remember() {
    let dir = tempfile::tempdir().unwrap();
    let address = GuestAddress::from(id("vm"));
    let journals: [Arc<dyn Journal>; 2] = [
        Arc::new(MemoryJournal::default()),
        Arc::new(
            SqliteJournal::open(dir.path().join("journal.db"))
                .await
                .unwrap(),
        ),
    ];
    for journal in journals {
        journal.own(&address).await.unwrap();
        let other = GuestAddress::new(id("vm"), Incarnation::new(2).unwrap());
        assert_eq!(
            *journal.own(&other).await.unwrap_err().kind(),
            ErrorKind::WrongIncarnation
        );
        let name = |n: u32| crate::CommandId::new(format!("c-{n}")).unwrap();
        for n in 0..5 {
            let kind = crate::MessageId::new(if n == 0 { "prepare" } else { "x" }).unwrap();
            let payload = serde_json::value::RawValue::TRUE.to_owned();
            let mut entry = Entry::accepted(&Command::new(&address, name(n), kind, None, payload));
            journal.save(&entry).await.unwrap();
            entry.state = EntryState::Withdrawn;
            entry.reported = true;
            journal.save(&entry).await.unwrap();
        }
        journal.prune(2).await.unwrap();
        let kept: Vec<_> = journal
            .load()
            .await
            .unwrap()
            .into_iter()
            .map(|entry| entry.command)
            .collect();
        assert_eq!(kept, [name(0), name(3), name(4)]);
        journal.dismiss().await.unwrap();
        assert_eq!(
            *journal.own(&address).await.unwrap_err().kind(),
            ErrorKind::Revoked
        );
    }
}
