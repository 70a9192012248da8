//! What guests with credentials left in their trays goes to the queue of reports, for as long as that has
//! its consumer here.
//!
//! A guest says when there is something; that word may be lost, so all trays are looked into at the start,
//! after each reconnect, and once in a lease.

use std::sync::Arc;

use redis::{Value, cmd};
use tokio::{
    sync::broadcast::error::RecvError,
    time::{Instant, sleep_until},
};

use super::{
    connection::Core,
    consume::Stage,
    failure::{Failure, odd},
    form::text,
    link::Live,
    scripts::{self, TRAY},
};
use crate::names::QueueName;

/// Whose credential reports to which queue of reports, by the names of the queues. Guests cannot read it.
pub(super) const CREDENTIALS: &str = "wilco:credentials";

/// Works until the consumer is gone.
pub(super) async fn collect(
    core: Arc<Core>,
    reports: QueueName,
    mut stage: tokio::sync::watch::Receiver<Stage>,
) {
    let over = async move {
        // An error says that the consumer is gone altogether.
        let _ = stage.wait_for(|stage| *stage >= Stage::Detached).await;
    };
    let mut closing = core.closing();
    tokio::select! {
        () = work(&core, &reports) => {}
        () = over => {}
        _ = closing.wait_for(|closing| *closing) => {}
    }
}

async fn work(core: &Core, reports: &QueueName) {
    let mut words = core.router.trays.subscribe();
    let mut phase = core.main.phase();
    let mut heard = 0;
    loop {
        let Some(live) = core.main.now() else {
            if phase.changed().await.is_err() {
                return;
            }
            continue;
        };
        let at = Instant::now() + core.dialer.lease;
        let mut all = async || {
            if heard != live.turn {
                let mut hear = cmd("PSUBSCRIBE");
                hear.arg(scripts::everywhere(TRAY));
                live.call(&hear).await?;
                heard = live.turn;
            }
            every(&live, reports).await
        };
        let mut done = all().await;
        while done.is_ok() && !live.is_lost() {
            tokio::select! {
                word = words.recv() => match word {
                    Ok(guest) => done = empty(&live, reports, &guest).await,
                    Err(RecvError::Lagged(_)) => break,
                    Err(RecvError::Closed) => return,
                },
                () = live.until_lost() => {}
                () = sleep_until(at) => break,
            }
        }
        if let Err(failure) = done {
            if failure.is_broken() || failure.is_passing() {
                live.give_up(&failure);
                live.until_lost().await;
            } else {
                tracing::warn!(
                    ?failure,
                    "reports stay where guests left them; looking again"
                );
                sleep_until(at).await;
            }
        }
    }
}

/// Looks into all trays.
async fn every(live: &Live, reports: &QueueName) -> Result<(), Failure> {
    let mut cursor = "0".to_owned();
    loop {
        let mut look = scripts::on_keys(&scripts::TRAYS, &[CREDENTIALS.into()]);
        look.arg(&cursor).arg(reports.as_str());
        let answer = live.call(&look).await?;
        let wrong = || Failure::Broken("the trays are not told of in our form".into());
        let Value::Array(parts) = answer else {
            return Err(wrong());
        };
        let mut parts = parts.into_iter();
        cursor = parts.next().and_then(text).ok_or_else(wrong)?;
        if let Some(Value::Array(guests)) = parts.next() {
            let guests = guests.into_iter().filter_map(text);
            for guest in guests.filter_map(|guest| guest.parse().ok()) {
                empty(live, reports, &guest).await?;
            }
        }
        if cursor == "0" {
            return Ok(());
        }
    }
}

/// Moves what is in one tray, for as long as there is room for it.
pub(super) async fn empty(
    live: &Live,
    reports: &QueueName,
    guest: &QueueName,
) -> Result<(), Failure> {
    loop {
        let mut keys = scripts::keys(reports);
        keys.extend([scripts::key(guest, TRAY), CREDENTIALS.into()]);
        let mut call = scripts::on_keys(&scripts::MOVE, &keys);
        call.arg(guest.as_str())
            .arg(reports.as_str())
            .arg("PUBLISH");
        let answer = live.change(&call).await?;
        let Value::Array(counts) = &answer else {
            return Err(Failure::Broken(odd(&answer).to_string()));
        };
        match counts[..] {
            [Value::Int(moved), Value::Int(left)] if moved > 0 && left > 0 => {}
            _ => return Ok(()),
        }
    }
}
