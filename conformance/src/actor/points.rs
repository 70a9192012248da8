//! The side effects of a taskmanager or a guest, seen from outside: each has a name and a number, and
//! the process can be killed or held right before and right after any of them.
//!
//! The workflow knows nothing of this. Its broker, its records and its journal are wrapped, and
//! everything that it does to the world goes through one of the three.

use std::{
    collections::BTreeMap,
    future::{Future, pending},
    sync::{Arc, Mutex, PoisonError},
};

use rustix::process::{Signal, getpid, kill_process};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::Told;
use crate::second::tell;

/// Where to stop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {
    /// The side effect's name.
    pub effect: String,
    /// Which one of this name, from 1.
    pub nth: u32,
    /// On which side of it.
    pub side: Side,
    /// How.
    pub how: How,
}

impl Stop {
    /// Killed right before the first side effect of this name.
    #[must_use]
    pub fn before(effect: &str) -> Self {
        Self {
            effect: effect.into(),
            nth: 1,
            side: Side::Before,
            how: How::Killed,
        }
    }

    /// Killed right after it.
    #[must_use]
    pub fn after(effect: &str) -> Self {
        Self {
            side: Side::After,
            ..Self::before(effect)
        }
    }

    /// Held there, until told to go on.
    #[must_use]
    pub fn held(self) -> Self {
        Self {
            how: How::Held,
            ..self
        }
    }
}

/// A side of a side effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Nothing of it has happened.
    Before,
    /// It has happened, and whoever asked for it does not know yet.
    After,
}

/// What happens at the stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// The process ends as by `kill -9`.
    Killed,
    /// The side effect waits; everything else in the process goes on.
    Held,
}

/// Counts the side effects of this process, and stops where it was told to.
#[derive(Clone, Debug, Default)]
pub(super) struct Points(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    stop: Mutex<Option<Stop>>,
    seen: Mutex<BTreeMap<String, u32>>,
    go: Notify,
}

impl Points {
    /// Stops there, from now on, instead of where it was told before.
    pub(super) fn stop_at(&self, stop: Option<Stop>) {
        *self.0.stop.lock().unwrap_or_else(PoisonError::into_inner) = stop;
    }

    /// Lets what is held go on.
    pub(super) fn go(&self) {
        self.0.go.notify_one();
    }

    /// Carries a side effect out, between its two stops.
    pub(super) async fn around<T>(&self, effect: &str, act: impl Future<Output = T>) -> T {
        let nth = {
            let mut seen = self.0.seen.lock().unwrap_or_else(PoisonError::into_inner);
            let nth = seen.entry(effect.to_owned()).or_default();
            *nth += 1;
            *nth
        };
        // Nobody may be reading any more.
        let _ = tell(&Told::Effect {
            effect: effect.into(),
            nth,
        });
        self.pass(effect, nth, Side::Before).await;
        let result = act.await;
        self.pass(effect, nth, Side::After).await;
        result
    }

    async fn pass(&self, effect: &str, nth: u32, side: Side) {
        let how = {
            let stop = self.0.stop.lock().unwrap_or_else(PoisonError::into_inner);
            match &*stop {
                Some(stop) if stop.effect == effect && stop.nth == nth && stop.side == side => {
                    stop.how
                }
                _ => return,
            }
        };
        match how {
            How::Killed => {
                let _ = kill_process(getpid(), Signal::KILL);
                pending::<()>().await;
            }
            How::Held => {
                let _ = tell(&Told::Held);
                self.0.go.notified().await;
            }
        }
    }
}
