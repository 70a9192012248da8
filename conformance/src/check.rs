//! A check, what it runs in, and what it gives back.

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use serde::Serialize;
use wilco::Broker;

use crate::{
    harness::{Harness, Server, Unavailable, Use},
    ledger::History,
};

/// One check of one law.
#[derive(Clone, Copy)]
pub struct Check {
    /// Its name, which starts with its law: `q3_other_arguments_are_a_mismatch`.
    pub name: &'static str,
    /// The law's id: `Q3`.
    pub law: &'static str,
    /// What it shows, in one line.
    pub title: &'static str,
    /// The check itself.
    pub run: for<'a> fn(&'a Cx) -> Pin<Box<dyn Future<Output = CheckResult> + Send + 'a>>,
}

/// What every check returns.
pub type CheckResult = Result<Evidence, CheckError>;

impl Check {
    /// No check may take longer than this: nothing waits for ever (law P9), the suite neither.
    pub const LIMIT: Duration = Duration::from_secs(180);

    /// The same for those that break their broker (section F): starting it again takes its time. And for
    /// C13, the one check that makes a thousand queues: what hangs in a race is told by the race's own
    /// deadlines, long before.
    pub const LIMIT_WITH_FAULTS: Duration = Duration::from_secs(900);

    /// How long this one may take, run like this.
    #[must_use]
    pub fn limit(&self, options: &Options) -> Duration {
        if self.is_nemesis() {
            // A fault takes as long as its outage and the way back; and a slow machine's hundred a second.
            let Nemesis { messages, faults } = options.nemesis;
            Self::LIMIT + Duration::from_secs(messages / 100 + faults * 60)
        } else if self.law.starts_with(['F', 'W']) || self.law == "C13" {
            Self::LIMIT_WITH_FAULTS
        } else {
            Self::LIMIT
        }
    }

    /// Whether it restarts or breaks its broker, or nodes of it: its law (section F), its case or its
    /// name says so.
    #[must_use]
    pub fn usage(&self) -> Use {
        match self.law {
            // Their processes are killed, and the broker is left alone.
            "F7" => Use::Shared,
            "F6" | "W20" => Use::Cluster,
            "S1" => Use::Credentials,
            "W17" | "W18" | "W19" | "W33" | "W38" | "W39" => Use::Alone,
            _ if self.breaks_its_broker() || self.name.contains("restart") => Use::Alone,
            _ => Use::Shared,
        }
    }

    /// Whether it is one of those that break the broker and its network to see what comes of it.
    #[must_use]
    pub fn breaks_its_broker(&self) -> bool {
        self.law.starts_with('F') && self.law != "F7" || self.is_nemesis()
    }

    fn is_nemesis(&self) -> bool {
        self.name.contains("nemesis")
    }

    /// Runs the check on a fresh broker of this harness.
    pub async fn run_on(&self, harness: &dyn Harness, options: &Options) -> Outcome {
        let started = Instant::now();
        let mut history = None;
        let mut result = match harness.start(self.usage()).await {
            Ok(server) => {
                let cx = Cx {
                    server,
                    options: options.clone(),
                    law: self.law,
                    history: OnceLock::new(),
                };
                let result = match tokio::time::timeout(self.limit(options), (self.run)(&cx)).await
                {
                    Ok(result) => result,
                    Err(_) => Err(CheckError::failed(
                        format!("the check ends within {:?}", self.limit(options)),
                        "something in it still waited",
                    )),
                };
                history = cx.history.into_inner();
                result
            }
            // A broker that was asked for and does not come is a failure, not a skip (law X2).
            Err(reason) => Err(CheckError::failed("the broker starts", reason)),
        };
        match harness.sweep().await {
            Err(CheckError::Failed(left)) if result.is_ok() => {
                result = Err(CheckError::Failed(left))
            }
            Err(CheckError::Unavailable(reason)) => result = Err(reason.into()),
            _ => {}
        }
        if let Err(CheckError::Failed(failure)) = &mut result {
            failure.check = self.name;
            failure.law = self.law;
            failure.backend = harness.name().into();
            failure.seed = options.seed;
        }
        Outcome {
            check: self.name,
            law: self.law,
            backend: harness.name().into(),
            seed: options.seed,
            elapsed: started.elapsed(),
            result,
            history,
        }
    }
}

impl fmt::Debug for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.law)
    }
}

/// How checks are run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where every random choice comes from: the same seed makes the same choices.
    pub seed: u64,
    /// The program that plays a second process: this package's own binary.
    pub agent: Option<PathBuf>,
    /// Where histories of failed runs are kept.
    pub histories: PathBuf,
    /// How often a broker is killed where the law says fifty times (law F1).
    pub kills: usize,
    /// How long a broker is down where the law says a minute (law F5).
    pub outage: Duration,
    /// How many guests, or races, where a case says a thousand (cases W37, W38).
    pub crowd: usize,
    /// How many races where law C13 says a thousand.
    pub races: usize,
    /// How much a nemesis run is.
    pub nemesis: Nemesis,
}

/// How much a nemesis run is.
#[derive(Clone, Copy, Debug)]
pub struct Nemesis {
    /// So many messages are confirmed at least.
    pub messages: u64,
    /// So many faults strike, spread over them.
    pub faults: u64,
}

impl Options {
    /// These options, with histories kept in the system's temporary directory, and with as many and as
    /// long faults as the laws say.
    #[must_use]
    pub fn new(seed: u64, agent: Option<PathBuf>) -> Self {
        Self {
            seed,
            agent,
            histories: std::env::temp_dir(),
            kills: 50,
            outage: Duration::from_secs(60),
            crowd: 1_000,
            races: 1_000,
            nemesis: Nemesis {
                messages: 100_000,
                faults: 20,
            },
        }
    }
}

/// What a check runs in.
#[derive(Debug)]
pub struct Cx {
    /// The private broker.
    pub server: Box<dyn Server>,
    /// How to run.
    pub options: Options,
    law: &'static str,
    history: OnceLock<Arc<History>>,
}

impl Cx {
    /// The history of this check, made when it is first asked for. Whatever comes of the check, the
    /// history goes with it into the report, which draws faults against publishes and deliveries.
    #[must_use]
    pub fn history(&self) -> Arc<History> {
        let made = self
            .history
            .get_or_init(|| Arc::new(History::new(self.options.seed)));
        Arc::clone(made)
    }

    /// One more handle on the broker.
    ///
    /// # Errors
    /// A failure: the broker is there.
    pub async fn connect(&self) -> Result<Arc<dyn Broker>, CheckError> {
        let connected = tokio::time::timeout(Duration::from_secs(20), self.server.connect()).await;
        match connected {
            Ok(Ok(broker)) => Ok(broker),
            Ok(Err(error)) => Err(CheckError::failed(
                "connect to a broker that is there",
                error,
            )),
            Err(_) => Err(CheckError::failed(
                "connect ends",
                "still waiting after 20 s",
            )),
        }
    }

    /// The random numbers of this check.
    #[must_use]
    pub fn rng(&self) -> fastrand::Rng {
        fastrand::Rng::with_seed(self.options.seed)
    }

    /// The law that is checked.
    #[must_use]
    pub fn law(&self) -> &'static str {
        self.law
    }

    /// The time within which the backend says that it notices a vanished consumer.
    #[must_use]
    pub fn takeover(&self) -> Duration {
        self.server.facts().takeover
    }
}

/// What a passed check has to show for it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Evidence {
    /// How often what was tried.
    pub counts: BTreeMap<&'static str, u64>,
}

impl Evidence {
    /// One count.
    #[must_use]
    pub fn of(what: &'static str, count: impl TryInto<u64>) -> Self {
        Self::default().and(what, count)
    }

    /// One count more.
    #[must_use]
    pub fn and(mut self, what: &'static str, count: impl TryInto<u64>) -> Self {
        self.counts
            .insert(what, count.try_into().unwrap_or(u64::MAX));
        self
    }
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (what, count)) in self.counts.iter().enumerate() {
            write!(f, "{}{count} {what}", if n == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

/// Why a check did not pass.
#[derive(Clone, Debug)]
pub enum CheckError {
    /// The law is broken.
    Failed(Box<Failure>),
    /// It could not be tried here.
    Unavailable(Unavailable),
}

/// A broken law.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Failure {
    /// The check.
    pub check: &'static str,
    /// The law.
    pub law: &'static str,
    /// The backend.
    pub backend: String,
    /// The seed that it was seen with.
    pub seed: u64,
    /// What the law says.
    pub expected: String,
    /// What was there instead.
    pub seen: String,
}

impl CheckError {
    /// The law is broken; who, where and with what seed is filled in by [`Check::run_on`].
    pub fn failed(expected: impl Into<String>, seen: impl fmt::Display) -> Self {
        Self::Failed(Box::new(Failure {
            expected: expected.into(),
            seen: seen.to_string(),
            ..Failure::default()
        }))
    }
}

impl From<Unavailable> for CheckError {
    fn from(reason: Unavailable) -> Self {
        Self::Unavailable(reason)
    }
}

/// An error of the broker where the check needs Ok.
impl From<wilco::Error> for CheckError {
    fn from(error: wilco::Error) -> Self {
        Self::failed("the call succeeds", format!("{error} ({:?})", error.kind()))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "law {} broken on {} by {} with seed {}\n  expected: {}\n  seen:     {}\n  again:    {}",
            self.law,
            self.backend,
            self.check,
            self.seed,
            self.expected,
            self.seen,
            self.again()
        )
    }
}

impl Failure {
    /// The command that makes the same choices again.
    #[must_use]
    pub fn again(&self) -> String {
        format!(
            "wilco-conformance run --broker {} --check {} --seed {}",
            self.backend, self.check, self.seed
        )
    }
}

/// One check on one backend, done.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The check.
    pub check: &'static str,
    /// Its law.
    pub law: &'static str,
    /// The backend.
    pub backend: String,
    /// The seed.
    pub seed: u64,
    /// How long it took.
    pub elapsed: Duration,
    /// What came of it.
    pub result: CheckResult,
    /// What happened in it, where the check keeps a ledger.
    pub history: Option<Arc<History>>,
}
