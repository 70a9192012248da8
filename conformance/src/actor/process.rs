//! The actor's own side: what the process does that plays a taskmanager or guests.

use std::{
    collections::HashSet,
    fs::File,
    io::Write as _,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, BufReader, stdin},
    sync::watch,
};
use wilco::{
    Broker, Cancelled, Deadline, Failure, Guest, GuestAddress, GuestId, HostProbe, HostState,
    Interrupted, Served, SigningKey, SqliteJournal, SqliteRecords, Taskmanager, Trust,
};

use super::{Act, GuestOrder, Order, Told, points::Points, watched::Watched};
use crate::second::tell;

/// Obeys orders from standard input until it ends. Orders that take their time are carried out beside
/// one another.
///
/// # Errors
/// An order cannot be read.
pub async fn run(url: &str) -> Result<(), String> {
    let actor = Actor {
        url: url.into(),
        points: Points::default(),
        open: watch::Sender::new(false),
        failed_hosts: FailedHosts::default(),
    };
    let mut control = None;
    let mut broker = None;
    let mut orders = BufReader::new(stdin()).lines();
    while let Some(line) = orders
        .next_line()
        .await
        .map_err(|error| error.to_string())?
    {
        let order: Order = serde_json::from_str(&line).map_err(|error| error.to_string())?;
        match order {
            Order::Control {
                name,
                records,
                within_ms,
                stop,
                sign,
            } => {
                actor.points.stop_at(stop);
                let sign = sign.as_deref();
                match actor.control(&name, &records, within_ms, sign).await {
                    Ok(taskmanager) => {
                        control = Some(taskmanager);
                        tell(&Told::Ready)?;
                    }
                    Err(error) => failed(None, &error)?,
                }
            }
            Order::Guest(order) => {
                actor.points.stop_at(order.stop.clone());
                let handle = match &broker {
                    Some(handle) => Arc::clone(handle),
                    None => match actor.connect(order.wait_ms).await {
                        Ok(made) => Arc::clone(broker.insert(made)),
                        Err(error) => {
                            failed(Some(order.guest), &error)?;
                            continue;
                        }
                    },
                };
                actor.guest(handle, order);
            }
            Order::HostFailed { guest } => actor.failed_hosts.add(guest),
            Order::StopAt { stop } => actor.points.stop_at(Some(stop)),
            Order::Go => actor.points.go(),
            Order::Open => drop(actor.open.send_replace(true)),
            order => {
                let taskmanager = control.clone().ok_or("not a taskmanager")?;
                tokio::spawn(command(taskmanager, order));
            }
        }
    }
    Ok(())
}

/// One process: a taskmanager, or any number of guests on one handle.
struct Actor {
    url: String,
    points: Points,
    open: watch::Sender<bool>,
    failed_hosts: FailedHosts,
}

impl Actor {
    async fn connect(&self, within_ms: u64) -> wilco::Result<Arc<dyn Broker>> {
        let within = Deadline::after(Duration::from_millis(within_ms));
        let inner = wilco::connect_by(&self.url, within).await?;
        let points = self.points.clone();
        Ok(Arc::new(Watched { inner, points }))
    }

    async fn control(
        &self,
        name: &str,
        records: &Path,
        within_ms: u64,
        sign: Option<&Path>,
    ) -> wilco::Result<Taskmanager> {
        let broker = self.connect(within_ms).await?;
        let inner = SqliteRecords::open(records).await?;
        let points = self.points.clone();
        let mut opening = Taskmanager::with(broker, Watched { inner, points }).named(name);
        if let Some(path) = sign {
            opening = opening.sign(SigningKey::open(path)?);
        }
        let taskmanager = opening.await?;
        taskmanager.probe_hosts(self.failed_hosts.clone());
        let mut saved = taskmanager.watch();
        tokio::spawn(async move {
            while let Ok(record) = saved.recv().await {
                let guest = record.address.guest.clone();
                let state = record.state;
                let _ = tell(&Told::State { guest, state });
            }
        });
        Ok(taskmanager)
    }

    fn guest(&self, broker: Arc<dyn Broker>, order: GuestOrder) {
        let (points, open) = (self.points.clone(), self.open.subscribe());
        tokio::spawn(async move {
            let id = order.guest.clone();
            let told = match guest(broker, order, points, open).await {
                Ok(served) => tell(&Told::Served {
                    guest: id,
                    how: match served {
                        Served::Revoked => "revoked",
                        _ => "stopped",
                    }
                    .into(),
                }),
                Err(error) => failed(Some(id), &error),
            };
            let _ = told;
        });
    }
}

async fn guest(
    broker: Arc<dyn Broker>,
    order: GuestOrder,
    points: Points,
    open: watch::Receiver<bool>,
) -> wilco::Result<Served> {
    let inner = SqliteJournal::open(&order.journal).await?;
    let journal = Watched {
        inner,
        points: points.clone(),
    };
    let id = order.guest.clone();
    let mut attach = Guest::attach(broker, id.clone(), journal)
        .incarnation(order.incarnation)
        .control_plane(&order.control)
        .wait(Duration::from_millis(order.wait_ms));
    if let Some(path) = &order.trust {
        attach = attach.trust(Trust::open(path)?);
    }
    let guest = attach.await?;
    let _ = tell(&Told::Attached { guest: id.clone() });
    let interrupted = match order.again {
        true => Interrupted::RunAgain,
        false => Interrupted::Fail,
    };
    let effects = Arc::new(order.effects);
    let others = effects.clone();
    let guest = guest
        .on_interrupted(interrupted)
        .on_prepare(move |_: Value, context: wilco::Context| {
            let (id, effects, points, mut open) =
                (id.clone(), effects.clone(), points.clone(), open.clone());
            async move {
                let run = context.run();
                let line = format!("prepare {} {run}\n", context.address());
                points.around("run prepare", leave(&effects, &line)).await?;
                let _ = tell(&Told::Running { guest: id, run });
                match order.act {
                    Act::Succeed => {}
                    Act::Fail => return Err(Failure::new("it was told to fail")),
                    Act::Wait => drop(open.wait_for(|open| *open).await),
                }
                Ok(json!({ "ran": run }))
            }
        })
        .on("list_users", move |_: Value, context: wilco::Context| {
            let effects = others.clone();
            async move {
                let line = format!("list_users {} {}\n", context.address(), context.run());
                leave(&effects, &line).await?;
                Ok(json!(["root"]))
            }
        });
    guest.serve(std::future::pending()).await
}

/// The effect: on disk before anything else happens.
async fn leave(effects: &Path, line: &str) -> std::io::Result<()> {
    let mut file = File::options().create(true).append(true).open(effects)?;
    file.write_all(line.as_bytes())?;
    file.sync_all()
}

/// Carries an order to a taskmanager out and tells what came of it.
async fn command(taskmanager: Taskmanager, order: Order) {
    let (guest, done) = match order {
        Order::Provision {
            guest,
            policy,
            deadlines,
            again,
        } => {
            let provision = taskmanager
                .provision(
                    guest.clone(),
                    json!({ "databases": ["orders"], "guest": guest }),
                )
                .policy(policy)
                .deadlines(deadlines)
                .again(again);
            match provision.await {
                Ok(outcome) => {
                    let _ = tell(&Told::Outcome { guest, outcome });
                    return;
                }
                Err(error) => (guest, Err(error)),
            }
        }
        Order::Cancel { guest } => {
            let how = |cancelled| match cancelled {
                Cancelled::Revoked => "revoked",
                Cancelled::TooLate => "too late",
                Cancelled::HadEnded => "had ended",
            };
            let done = taskmanager.cancel(&guest).await;
            (guest, done.map(|cancelled| json!(how(cancelled))))
        }
        Order::Delete { guest } => {
            let done = taskmanager.delete(&guest).await;
            (guest, done.map(|()| json!("deleted")))
        }
        Order::Ping { guest, within_ms } => {
            let within = Duration::from_millis(within_ms);
            let done = taskmanager.guest(guest.clone()).ping(within).await;
            let told = taskmanager.refused();
            let answer = |pong: wilco::Pong| json!({ "boot": pong.boot, "refused": pong.refused, "told": told });
            (guest, done.map(answer))
        }
        Order::Call { guest, kind } => {
            let done = taskmanager.guest(guest.clone()).call(&kind, &()).await;
            (guest, done)
        }
        Order::Show { guest } => {
            let done = taskmanager.record(&guest).await;
            (guest, done.map(|record| json!(record)))
        }
        _ => return,
    };
    let _ = match done {
        Ok(answer) => tell(&Told::Answer { guest, answer }),
        Err(error) => failed(Some(guest), &error),
    };
}

/// The machines of which the hypervisor says that they failed.
#[derive(Clone, Debug, Default)]
struct FailedHosts(Arc<Mutex<HashSet<GuestId>>>);

impl FailedHosts {
    fn add(&self, guest: GuestId) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(guest);
    }
}

#[async_trait]
impl HostProbe for FailedHosts {
    async fn probe(&self, machine: &GuestAddress) -> HostState {
        let failed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match failed.contains(&machine.guest) {
            true => HostState::Failed("no valid host was found".into()),
            false => HostState::Booting,
        }
    }
}

fn failed(guest: Option<GuestId>, error: &wilco::Error) -> Result<(), String> {
    let kind = format!("{:?}", error.kind());
    let name = kind.split(|c: char| !c.is_alphanumeric()).next();
    tell(&Told::Failed {
        guest,
        kind: name.unwrap_or_default().into(),
        error: error.to_string(),
    })
}
