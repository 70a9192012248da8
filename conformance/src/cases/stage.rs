//! What a case is played on: a broker, taskmanagers and guests as processes, and what they leave.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use serde_json::Value;
use tempfile::TempDir;
use wilco::{
    Broker, Deadlines, ErrorKind, GuestAddress, GuestId, Incarnation, Outcome, ProvisionOutcome,
    QueueName, ReasonKind, SendPolicy, SigningKey, Stage as Step, State, broker::DeleteMode,
};

use crate::{
    actor::{Act, Actor, GuestOrder, Order, Stop, Told},
    check::{CheckError, Cx},
    harness::Unavailable,
    support::*,
};

/// A duration in milliseconds.
pub(super) fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// How long guests and taskmanagers wait for what another process has to do first.
const WAIT: Duration = Duration::from_secs(60);

/// Deadlines that only something broken meets.
pub(super) fn patient() -> Deadlines {
    Deadlines {
        boot: WAIT,
        accept: WAIT,
        progress: WAIT,
        total: 2 * WAIT,
    }
}

/// A short time to boot.
pub(super) fn boot(boot: Duration) -> Deadlines {
    Deadlines { boot, ..patient() }
}

fn directory() -> Result<TempDir, CheckError> {
    tempfile::tempdir().map_err(|error| CheckError::failed("a temporary directory", error))
}

/// One case on one broker.
pub(super) struct Stage<'a> {
    pub(super) cx: &'a Cx,
    /// The case's own look at the broker.
    pub(super) broker: Arc<dyn Broker>,
    case: String,
    directory: TempDir,
    url: String,
    /// The control plane signs, and every guest trusts its key.
    signed: bool,
}

impl<'a> Stage<'a> {
    /// Sets the stage for a case of this name.
    pub(super) async fn new(cx: &'a Cx, case: &str) -> Result<Self, CheckError> {
        let facts = cx.server.facts();
        let url = facts
            .url
            .ok_or_else(|| Unavailable::because(facts.private_because))?;
        Ok(Self {
            cx,
            broker: cx.connect().await?,
            case: case.into(),
            directory: directory()?,
            url,
            signed: false,
        })
    }

    /// The same, with a control plane that signs and guests that trust nobody else.
    pub(super) async fn signed(cx: &'a Cx, case: &str) -> Result<Self, CheckError> {
        let stage = Self {
            signed: true,
            ..Self::new(cx, case).await?
        };
        let key = SigningKey::generate()?;
        key.save(stage.key_file())?;
        fs::write(stage.trust_file(), key.public().to_string())
            .map_err(|error| CheckError::failed("a file of keys", error))?;
        Ok(stage)
    }

    fn key_file(&self) -> PathBuf {
        self.directory.path().join("signing.key")
    }

    fn trust_file(&self) -> PathBuf {
        self.directory.path().join("trusted.keys")
    }

    /// The same, with the processes reaching the broker by another URL.
    pub(super) fn by(&self, url: String) -> Result<Self, CheckError> {
        Ok(Self {
            cx: self.cx,
            broker: self.broker.clone(),
            case: self.case.clone(),
            directory: directory()?,
            url,
            signed: false,
        })
    }

    /// A stage of its own for a part of the case, with a control plane of its own.
    pub(super) fn part(&self, name: &str) -> Result<Self, CheckError> {
        Ok(Self {
            case: format!("{}-{name}", self.case),
            ..self.by(self.url.clone())?
        })
    }

    /// A guest of this case.
    pub(super) fn id(&self, name: &str) -> Result<GuestId, CheckError> {
        Ok(guest(&format!("{}-{name}", self.case))?.guest)
    }

    /// The control plane's name: nobody else has it, on a broker that others use too.
    fn control_name(&self) -> String {
        format!("{PREFIX}{}", self.case)
    }

    /// The control plane's queue.
    pub(super) fn reports(&self) -> Result<QueueName, CheckError> {
        Ok(QueueName::reports(&self.control_name())?)
    }

    /// A taskmanager, running. One that was killed a moment ago may still count on the broker: this one
    /// waits for that itself.
    pub(super) async fn control(&self) -> Result<Control, CheckError> {
        let mut control = self.control_on("records.db", WAIT, None).await?;
        control.ready().await?;
        Ok(control)
    }

    /// A taskmanager that goes on with this guest, whose prepare runs once in all.
    pub(super) async fn resumed(
        &self,
        guest: &GuestId,
        policy: SendPolicy,
    ) -> Result<Control, CheckError> {
        let mut control = self.control().await?;
        control.provision(guest, policy, patient()).await?;
        same("runs", control.succeeds(guest).await?, 1)?;
        self.ran(guest, 1)?;
        Ok(control)
    }

    /// A taskmanager that nobody was before, told where to stop.
    pub(super) async fn control_stopping(&self, stop: Stop) -> Result<Control, CheckError> {
        self.control_on("records.db", WAIT, Some(stop)).await
    }

    /// A taskmanager that was only told to start: on these records, waiting this long for the broker.
    pub(super) async fn control_on(
        &self,
        records: &str,
        within: Duration,
        stop: Option<Stop>,
    ) -> Result<Control, CheckError> {
        let mut actor = self.actor(&[])?;
        let order = Order::Control {
            name: self.control_name(),
            records: self.directory.path().join(records),
            within_ms: ms(within),
            stop,
            sign: self.signed.then(|| self.key_file()),
        };
        actor.order(&order).await?;
        Ok(Control(actor))
    }

    /// A guest that is to be started.
    pub(super) fn guest(&self, guest: &GuestId) -> Starting<'_> {
        let order = GuestOrder {
            guest: guest.clone(),
            incarnation: Incarnation::FIRST,
            control: self.control_name(),
            journal: self.directory.path().join(format!("{guest}.1.journal.db")),
            effects: self.effects_of(guest),
            wait_ms: ms(WAIT),
            act: Act::Succeed,
            again: false,
            stop: None,
            trust: self.signed.then(|| self.trust_file()),
        };
        Starting { stage: self, order }
    }

    /// A process without an order.
    pub(super) fn actor(&self, before: &[&str]) -> Result<Actor, CheckError> {
        Actor::start(self.cx.options.agent.as_ref(), before, &self.url)
    }

    fn effects_of(&self, guest: &GuestId) -> PathBuf {
        self.directory.path().join(format!("{guest}.effects"))
    }

    /// What this guest's handlers did to the world, a line each.
    pub(super) fn effects(&self, guest: &GuestId) -> Result<Vec<String>, CheckError> {
        match fs::read_to_string(self.effects_of(guest)) {
            Ok(lines) => Ok(lines.lines().map(String::from).collect()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(CheckError::failed("the effects can be read", error)),
        }
    }

    /// Its prepare ran this often.
    pub(super) fn ran(&self, guest: &GuestId, times: usize) -> Result<(), CheckError> {
        let effects = self.effects(guest)?;
        let ran = effects.iter().filter(|line| line.starts_with("prepare"));
        expect(
            ran.count() == times,
            format!("the prepare of {guest} ran {times} times"),
            format!("{effects:?}"),
        )
    }

    /// The broker holds nothing of this guest.
    pub(super) async fn nothing_left(&self, guest: &GuestId) -> Result<(), CheckError> {
        self.nothing_left_of(&GuestAddress::from(guest.clone()))
            .await
    }

    /// The broker holds nothing of this machine, once what it said last was collected and its guest has
    /// given its lane back.
    pub(super) async fn nothing_left_of(&self, machine: &GuestAddress) -> Result<(), CheckError> {
        let deadline = long();
        loop {
            let remains = match self.cx.server.remains(&machine.queue()).await {
                Ok(remains) => remains,
                // A broker that is only known by its URL is seen through the backend alone.
                Err(_) => {
                    let status = self.broker.status(&machine.queue(), long()).await;
                    let gone = must_be("status of what was deleted", status, &ErrorKind::NoQueue);
                    return gone.map(drop);
                }
            };
            if remains.is_empty() || deadline.has_passed() {
                return same("what is left on the broker", remains, Vec::new());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Takes a machine's queue away.
    pub(super) async fn clear_queue(&self, machine: &GuestAddress) -> Result<(), CheckError> {
        self.clear_name(&machine.queue()).await
    }

    async fn clear_name(&self, queue: &QueueName) -> Result<(), CheckError> {
        match self.broker.delete(queue, DeleteMode::Discard, long()).await {
            Err(error) if *error.kind() != ErrorKind::NoQueue => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Takes away what the case made, so that nothing is left where others work too.
    pub(super) async fn clear(&self, guests: &[&GuestId]) -> Result<(), CheckError> {
        self.clear_name(&self.reports()?).await?;
        for guest in guests {
            self.clear_queue(&GuestAddress::from((*guest).clone()))
                .await?;
        }
        Ok(())
    }

    /// Publishes this to a machine's queue, as somebody else would.
    pub(super) async fn put_raw(
        &self,
        machine: &GuestAddress,
        message: wilco::Message,
    ) -> Result<(), CheckError> {
        loop {
            match self
                .broker
                .publish(&machine.queue(), message.clone(), long())
                .await
            {
                Ok(_) => return Ok(()),
                Err(error) if error.outcome() == Some(Outcome::Unknown) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A guest that is to be started.
pub(super) struct Starting<'a> {
    stage: &'a Stage<'a>,
    order: GuestOrder,
}

impl Starting<'_> {
    pub(super) fn act(mut self, act: Act) -> Self {
        self.order.act = act;
        self
    }
    pub(super) fn run_again(mut self) -> Self {
        self.order.again = true;
        self
    }
    pub(super) fn stop(mut self, stop: Stop) -> Self {
        self.order.stop = Some(stop);
        self
    }
    pub(super) fn incarnation(mut self, incarnation: Incarnation) -> Self {
        let journal = format!("{}.{}.journal.db", self.order.guest, incarnation.get());
        self.order.journal = self.stage.directory.path().join(journal);
        self.order.incarnation = incarnation;
        self
    }
    /// Another machine, with a disk of its own and the same credentials.
    pub(super) fn clone_of_it(mut self) -> Self {
        let journal = format!("{}.clone.journal.db", self.order.guest);
        self.order.journal = self.stage.directory.path().join(journal);
        self
    }
    pub(super) fn wait(mut self, wait: Duration) -> Self {
        self.order.wait_ms = ms(wait);
        self
    }
    pub(super) fn order(self) -> GuestOrder {
        self.order
    }

    /// Starts it in a process of its own.
    pub(super) async fn start(self) -> Result<Machine, CheckError> {
        let actor = self.stage.actor(&[])?;
        self.start_in(actor).await
    }

    /// Starts it in this process.
    pub(super) async fn start_in(self, mut actor: Actor) -> Result<Machine, CheckError> {
        actor.order(&Order::Guest(self.order)).await?;
        Ok(Machine(actor))
    }

    /// Starts it and waits until it is attached.
    pub(super) async fn attached(self) -> Result<Machine, CheckError> {
        let mut machine = self.start().await?;
        machine.attached().await?;
        Ok(machine)
    }
}

/// A guest's process.
pub(super) struct Machine(pub(super) Actor);

impl Machine {
    pub(super) async fn attached(&mut self) -> Result<(), CheckError> {
        let attached = self.0.hear("that it is attached", |told| match told {
            Told::Attached { .. } => Some(Ok(())),
            Told::Failed { error, .. } => Some(Err(CheckError::failed("a guest attaches", error))),
            _ => None,
        });
        attached.await?
    }

    /// Waits until its prepare runs.
    pub(super) async fn running(&mut self) -> Result<u32, CheckError> {
        let running = |told: &Told| match told {
            Told::Running { run, .. } => Some(*run),
            _ => None,
        };
        self.0.hear("that prepare runs", running).await
    }

    /// Waits for its last side effect: its report is confirmed, and noted.
    pub(super) async fn reported(&mut self) -> Result<Told, CheckError> {
        let noted = |told: &Told| {
            let is = matches!(told, Told::Effect { effect, .. } if effect == "journal reported");
            is.then(|| told.clone())
        };
        self.0.hear("that its report was noted", noted).await
    }

    /// Waits until it ended for this error.
    pub(super) async fn failed(&mut self, kind: &str) -> Result<(), CheckError> {
        fails(&mut self.0, kind).await
    }

    /// Waits until it was given up, as it finds out for itself.
    pub(super) async fn turned_away(&mut self) -> Result<(), CheckError> {
        let turned_away = |told: &Told| match told {
            Told::Served { how, .. } if how == "revoked" => Some(()),
            Told::Failed { kind, .. } if kind == "Revoked" => Some(()),
            _ => None,
        };
        self.0.hear("that it was given up", turned_away).await
    }

    /// Waits until it stands at its stop.
    pub(super) async fn held(&mut self) -> Result<(), CheckError> {
        held(&mut self.0).await
    }

    /// Waits until it killed itself at its stop.
    pub(super) async fn died(&mut self) -> Result<(), CheckError> {
        self.0.ended().await.map(drop)
    }
}

/// A taskmanager's process.
pub(super) struct Control(pub(super) Actor);

impl Control {
    /// Waits until it is the taskmanager.
    pub(super) async fn ready(&mut self) -> Result<(), CheckError> {
        let ready = self
            .0
            .hear("that it is the taskmanager", |told| match told {
                Told::Ready => Some(Ok(())),
                Told::Failed { error, .. } => {
                    Some(Err(CheckError::failed("a taskmanager starts", error)))
                }
                _ => None,
            });
        ready.await?
    }

    /// Waits until what it was told failed with this kind of error.
    pub(super) async fn failed(&mut self, kind: &str) -> Result<(), CheckError> {
        fails(&mut self.0, kind).await
    }

    pub(super) async fn provision(
        &mut self,
        guest: &GuestId,
        policy: SendPolicy,
        deadlines: Deadlines,
    ) -> Result<(), CheckError> {
        self.provision_as(guest, policy, deadlines, false).await
    }

    pub(super) async fn provision_as(
        &mut self,
        guest: &GuestId,
        policy: SendPolicy,
        deadlines: Deadlines,
        again: bool,
    ) -> Result<(), CheckError> {
        let order = Order::Provision {
            guest: guest.clone(),
            policy,
            deadlines,
            again,
        };
        self.0.order(&order).await
    }

    /// The outcome of a provisioning that was asked for.
    pub(super) async fn outcome(&mut self, of: &GuestId) -> Result<ProvisionOutcome, CheckError> {
        let ended = self.0.hear("an outcome", |told| match told {
            Told::Outcome { guest, outcome } if guest == of => Some(Ok(outcome.clone())),
            Told::Failed { guest, error, .. } if guest.as_ref() == Some(of) => Some(Err(
                CheckError::failed("provision ends with an outcome", error),
            )),
            _ => None,
        });
        ended.await?
    }

    /// The outcome, which is that it succeeded.
    pub(super) async fn succeeds(&mut self, guest: &GuestId) -> Result<u32, CheckError> {
        match self.outcome(guest).await? {
            ProvisionOutcome::Succeeded { runs, .. } => Ok(runs),
            other => Err(CheckError::failed(format!("{guest} succeeds"), other)),
        }
    }

    /// The outcome, which is that it failed for this reason.
    pub(super) async fn fails(
        &mut self,
        guest: &GuestId,
        kind: ReasonKind,
    ) -> Result<(), CheckError> {
        match self.outcome(guest).await? {
            ProvisionOutcome::Failed { reason, .. } if reason.kind == kind => Ok(()),
            other => Err(CheckError::failed(format!("{guest} fails: {kind}"), other)),
        }
    }

    /// The outcome, which is that it was not delivered for this reason.
    pub(super) async fn gives_up(
        &mut self,
        guest: &GuestId,
        kind: ReasonKind,
        stage: Option<Step>,
    ) -> Result<(), CheckError> {
        match self.outcome(guest).await? {
            ProvisionOutcome::NotDelivered { reason }
                if reason.kind == kind && reason.stage == stage =>
            {
                Ok(())
            }
            other => {
                let wanted = format!("{guest} is not delivered: {kind}, {stage:?}");
                Err(CheckError::failed(wanted, other))
            }
        }
    }

    /// Waits until this guest's record was saved in this state.
    pub(super) async fn reaches(&mut self, of: &GuestId, wanted: State) -> Result<(), CheckError> {
        let reached = |told: &Told| match told {
            Told::State { guest, state } if guest == of && *state == wanted => Some(()),
            _ => None,
        };
        self.0
            .hear(&format!("state {wanted} of {of}"), reached)
            .await
    }

    /// What an order about this guest leads to.
    pub(super) async fn answer(
        &mut self,
        order: &Order,
        about: &GuestId,
    ) -> Result<Value, CheckError> {
        self.try_answer(order, about)
            .await?
            .map_err(|(_, error)| CheckError::failed(format!("{order:?} succeeds"), error))
    }

    /// The same, or the kind of its error and the error.
    pub(super) async fn try_answer(
        &mut self,
        order: &Order,
        about: &GuestId,
    ) -> Result<Result<Value, (String, String)>, CheckError> {
        self.0.order(order).await?;
        let answered = |told: &Told| match told {
            Told::Answer { guest, answer } if guest == about => Some(Ok(answer.clone())),
            Told::Failed { guest, kind, error } if guest.as_ref() == Some(about) => {
                Some(Err((kind.clone(), error.clone())))
            }
            _ => None,
        };
        self.0.hear("what came of an order", answered).await
    }

    /// The record of this guest.
    pub(super) async fn record(&mut self, guest: &GuestId) -> Result<wilco::Record, CheckError> {
        let show = Order::Show {
            guest: guest.clone(),
        };
        let shown = self.answer(&show, guest).await?;
        serde_json::from_value(shown).map_err(|error| CheckError::failed("a record", error))
    }

    /// Waits until it stands at its stop.
    pub(super) async fn held(&mut self) -> Result<(), CheckError> {
        held(&mut self.0).await
    }

    /// Lets it go on.
    pub(super) async fn go(&mut self) -> Result<(), CheckError> {
        self.0.order(&Order::Go).await
    }

    /// Waits until it killed itself at its stop.
    pub(super) async fn died(&mut self) -> Result<(), CheckError> {
        self.0.ended().await.map(drop)
    }
}

async fn held(actor: &mut Actor) -> Result<(), CheckError> {
    let held = |told: &Told| matches!(told, Told::Held).then_some(());
    actor.hear("that it stands at its stop", held).await
}

async fn fails(actor: &mut Actor, wanted: &str) -> Result<(), CheckError> {
    let failed = |told: &Told| match told {
        Told::Failed { kind, error, .. } => Some((kind.clone(), error.clone())),
        _ => None,
    };
    let (kind, error) = actor.hear("an error", failed).await?;
    expect(kind == wanted, format!("an error of kind {wanted}"), error)
}
