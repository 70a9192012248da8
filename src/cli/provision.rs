//! `wilco provision`: a fleet file's guests, all at once, to their outcomes.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
    time::Instant,
};

use secrecy::SecretString;
use serde_json::json;
use tokio::{sync::Semaphore, sync::broadcast::error::RecvError, task::JoinSet};
use wilco::{
    Broker, ErrorKind, GuestAddress, GuestId, Incarnation, SendPolicy, State, Taskmanager,
    broker::QueueStatus,
};

use super::{
    args::{Global, Provision},
    fleet::{self, Line, Malformed, Policy},
    machines::{Machines, Probe},
    output::{self, Output},
    place::{interrupted, patience},
    problem::{Exit, Outcome, Problem},
    program::Program,
    progress::Progress,
    summary::{self, End, Row, span},
};

/// How long a guest may take to answer whether it is there already.
const GLANCE: Duration = Duration::from_millis(500);

/// How long guests that have ended may take to collect what is left in their queues.
const COLLECTING: Duration = Duration::from_secs(10);

/// How long the last reports may take to be settled before they are shown as left.
const SETTLING: Duration = Duration::from_secs(2);

pub(super) async fn run(global: &Global, args: Provision, output: Output) -> Outcome {
    let fleet = fleet::read(&args.fleet)?;
    for malformed in &fleet.malformed {
        report(malformed, &args, output);
    }
    if fleet.guests.is_empty() {
        return Err(Problem::input(format!(
            "{} has no guest to provision",
            args.fleet.display()
        )));
    }
    let program = args.spawn.as_deref().map(Program::find).transpose()?;
    let broker = global.connect_shared().await?;
    let records = global.open_records().await?;
    let taskmanager = Taskmanager::new(Arc::clone(&broker), records).await?;
    let machines = program
        .map(|program| Machines::new(program, &global.broker))
        .transpose()?;
    if let Some(machines) = &machines {
        taskmanager.probe_hosts(Probe(Arc::clone(machines)));
    }
    let run = Arc::new(Run {
        taskmanager,
        machines,
        again: args.again,
        credentials: args.credentials,
        files: global.records_path().with_extension("credentials"),
        places: Semaphore::new(args.concurrency.get() as usize),
    });

    let start = Instant::now();
    let malformed = fleet.malformed.len();
    let rows = tokio::select! {
        rows = run.all(fleet.guests, output) => rows,
        () = interrupted() => {
            let stopped = run.stop().await;
            // Its place is free for whoever goes on, without waiting for a broker's lease to run out.
            let _ = broker.close(patience()).await;
            return Err(stopped);
        }
    };
    let took = start.elapsed();
    collected(&*broker, &rows, run.machines.as_deref()).await;
    if let Some(machines) = &run.machines {
        if machines.running() > 0 && !output.json {
            output::note(format_args!("powering off {} machines", machines.running()));
        }
        machines.power_off().await;
    }
    let left = settled(&*broker).await?;
    summary::show(&rows, &left, took, output);
    run.taskmanager.close();
    broker.close(patience()).await?;
    Ok(exit_code(&rows, malformed))
}

/// Waits for guests that are there to empty their queues.
///
/// Prepare can have been sent once more than it was taken (cases W14, W19, W24). Its guest knows it
/// and acks it, unless its machine is powered off first: then it would wait there for the next boot.
async fn collected(broker: &dyn Broker, rows: &[Row], machines: Option<&Machines>) {
    let decided = rows
        .iter()
        .filter(|row| matches!(row.end, End::Outcome { .. }))
        .map(|row| (row.address.queue(), &row.address));
    let decided: HashMap<_, _> = decided.collect();
    let collects = |queue: &QueueStatus| {
        let guest = decided.get(&queue.name);
        let is_up = |guest: &&GuestAddress| {
            queue.consumers > 0 || machines.is_some_and(|machines| machines.runs(guest))
        };
        queue.messages() > queue.dead && guest.is_some_and(is_up)
    };
    let end = Instant::now() + COLLECTING;
    // A broker that is out of reach is told of when what is left is looked at.
    while let Ok(queues) = broker.list(patience()).await
        && queues.iter().any(collects)
        && Instant::now() < end
    {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// What is on the broker once the last reports are settled: that takes a moment after the outcome.
async fn settled(broker: &dyn Broker) -> wilco::Result<Vec<QueueStatus>> {
    let end = Instant::now() + SETTLING;
    loop {
        let queues = broker.list(patience()).await?;
        let reports =
            |queue: &QueueStatus| !queue.name.is_commands() && queue.messages() > queue.dead;
        if !queues.iter().any(reports) || Instant::now() > end {
            return Ok(queues);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn report(malformed: &Malformed, args: &Provision, output: Output) {
    output::note(format_args!("wilco: {}: {malformed}", args.fleet.display()));
    let Malformed { line, column, what } = malformed;
    output.json(&json!({ "event": "malformed", "line": line, "column": column, "what": what }));
}

/// Bad input outweighs a bad outcome: it is the caller's to repair.
fn exit_code(rows: &[Row], malformed: usize) -> ExitCode {
    let succeeded = |row: &Row| matches!(&row.end, End::Outcome { outcome, .. } if outcome.state() == State::Succeeded);
    if malformed > 0 {
        Exit::Input.code()
    } else if rows.iter().all(succeeded) {
        ExitCode::SUCCESS
    } else {
        Exit::Guest.code()
    }
}

/// One run of the command.
struct Run {
    taskmanager: Taskmanager,
    machines: Option<Arc<Machines>>,
    again: bool,
    credentials: bool,
    /// Where credentials' files are put for machines that are started here.
    files: PathBuf,
    places: Semaphore,
}

impl Run {
    /// Provisions every guest, showing how far they are, and returns their ends in the file's order.
    async fn all(self: &Arc<Self>, guests: Vec<Line>, output: Output) -> Vec<Row> {
        let ids: HashSet<_> = guests.iter().map(|line| line.id.clone()).collect();
        let width = ids.iter().map(|id| id.as_str().chars().count()).max();
        let mut progress = Progress::new(ids.len(), width.unwrap_or(0).min(40), output);
        let mut changes = self.taskmanager.watch();
        let mut ends = JoinSet::new();
        for (place, guest) in guests.into_iter().enumerate() {
            let run = Arc::clone(self);
            ends.spawn(async move { (place, run.one(guest).await) });
        }
        let mut rows = Vec::new();
        loop {
            tokio::select! {
                biased;
                change = changes.recv() => match change {
                    Ok(record) if ids.contains(&record.address.guest) => progress.show(&record),
                    Ok(_) => {}
                    Err(RecvError::Lagged(_)) => self.catch_up(&mut progress, &ids).await,
                    Err(RecvError::Closed) => break,
                },
                end = ends.join_next() => match end {
                    Some(Ok((place, row))) => {
                        if let End::Problem(problem) = &row.end {
                            progress.note(&format!("{}: {problem}", row.address.guest));
                        }
                        rows.push((place, row));
                    }
                    Some(Err(error)) => progress.note(&format!("a task ended early: {error}")),
                    None => break,
                },
            }
        }
        while let Some(Ok(row)) = ends.join_next().await {
            rows.push(row);
        }
        // What ended before this run was never a change.
        self.catch_up(&mut progress, &ids).await;
        progress.finish();
        rows.sort_by_key(|(place, _)| *place);
        rows.into_iter().map(|(_, row)| row).collect()
    }

    async fn catch_up(&self, progress: &mut Progress, ids: &HashSet<GuestId>) {
        for id in ids {
            if let Ok(Some(record)) = self.taskmanager.record(id).await {
                progress.show(&record);
            }
        }
    }

    /// Provisions one guest.
    async fn one(&self, line: Line) -> Row {
        let id = line.id.clone();
        let mut row = Row {
            address: GuestAddress::new(id, Incarnation::FIRST),
            recorded: false,
            end: End::Problem("not begun".into()),
        };
        // Never closed.
        let _place = self.places.acquire().await;
        row.end = match self.provision(line, &mut row).await {
            Ok(end) => end,
            Err(problem) => End::Problem(problem.message),
        };
        row
    }

    async fn provision(&self, line: Line, row: &mut Row) -> Outcome<End> {
        let id = &line.id;
        let record = self.taskmanager.record(id).await?;
        let state = record.as_ref().map(|record| record.state);
        let mut again = self.again && matches!(state, Some(State::Failed | State::NotDelivered));
        if let Some(record) = &record {
            row.address.incarnation = record.address.incarnation;
            row.recorded = record.state.is_terminal() && !again;
            if again {
                row.address.incarnation = record.address.incarnation.next();
            }
        }
        if let Some(machines) = &self.machines
            && !row.recorded
            && !self.answers(&row.address).await
        {
            let own = if self.credentials {
                // Recorded first: whatever happens from here, its credential is not forgotten.
                self.provisioning(&line, again).start().await?;
                // It is joined below.
                again = false;
                Some(self.credential(&row.address).await?)
            } else {
                None
            };
            machines.start(&row.address, &line.env, own.as_ref())?;
        }
        let outcome = self.provisioning(&line, again).await.map_err(|error| {
            let conflict = *error.kind() == ErrorKind::Conflict && row.recorded;
            let problem = Problem::from(error);
            if conflict {
                problem.during("its recorded prepare is another one than this line's")
            } else {
                problem
            }
        })?;
        let record = self.taskmanager.record(id).await?;
        if let Some(record) = &record {
            row.address = record.address.clone();
        }
        let took = record.as_ref().map_or(Duration::ZERO, span);
        Ok(End::Outcome { outcome, took })
    }

    /// What a machine that is started here connects with.
    async fn credential(&self, address: &GuestAddress) -> Outcome<SecretString> {
        let credential = self.taskmanager.issue_credential(&address.guest).await?;
        if credential.files().is_empty() {
            return Ok(credential.url().clone());
        }
        let place = self.files.join(address.queue().as_str());
        std::fs::create_dir_all(&place).map_err(|error| {
            Problem::new(
                Exit::File,
                format!("cannot make {}: {error}", place.display()),
            )
        })?;
        Ok(credential.store(&place)?)
    }

    fn provisioning(&self, line: &Line, again: bool) -> wilco::Provision {
        let mut provisioning = self
            .taskmanager
            .provision(line.id.as_str(), &line.prepare)
            .again(again)
            .with_credential(self.credentials)
            .policy(match line.policy {
                Policy::PingFirst => SendPolicy::PingFirst,
                Policy::EnqueueFirst => SendPolicy::EnqueueFirst,
            });
        if let Some(span) = line.deadlines.boot {
            provisioning = provisioning.boot_deadline(span);
        }
        if let Some(span) = line.deadlines.accept {
            provisioning = provisioning.accept_deadline(span);
        }
        if let Some(span) = line.deadlines.progress {
            provisioning = provisioning.progress_deadline(span);
        }
        if let Some(span) = line.deadlines.total {
            provisioning = provisioning.total_deadline(span);
        }
        provisioning
    }

    /// Whether this machine is up already, started by an earlier run.
    async fn answers(&self, address: &GuestAddress) -> bool {
        let guest = self.taskmanager.guest(address.guest.as_str());
        let guest = guest.incarnation(address.incarnation);
        guest.ping(GLANCE).await.is_ok()
    }

    /// Ctrl-C: nothing is lost, and this says so.
    async fn stop(&self) -> Problem {
        // First, so that no machine that is powered off here is taken for one that failed.
        self.taskmanager.close();
        if let Some(machines) = &self.machines {
            output::note("stopping; powering off the machines that were started here");
            machines.power_off().await;
        }
        // Those that failed in this run are not to be tried again by going on.
        let typed = std::env::args()
            .skip(1)
            .filter(|argument| argument != "--again");
        Problem::new(
            Exit::Interrupted,
            format!(
                "stopped. Everything is recorded; this goes on where it was:\n  wilco {}",
                typed.collect::<Vec<_>>().join(" ")
            ),
        )
    }
}
