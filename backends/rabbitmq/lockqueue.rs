//! A lock on the broker: an exclusive queue, which one connection at a time can have, and which is gone
//! with it.

use std::{sync::Arc, time::Duration};

use lapin::{
    Channel,
    options::{QueueDeclareOptions, QueueDeleteOptions},
    types::FieldTable,
};

use super::{
    ask::is_attended,
    connection::{AGAIN, Core},
    credential,
    fault::Fault,
    link::{Spare, Wire},
};
use crate::deadline::Deadline;

/// How long the broker may take to be given a lock back that nobody waits for.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a lock is left alone whose holder cannot be seen.
const UNSEEN: Duration = Duration::from_millis(25);

/// How often it is looked whether there is anything to be given back still.
const LOOK: Duration = Duration::from_millis(50);

/// Makes an exclusive queue. `Ok(None)`: another connection has it.
pub(super) async fn try_exclusive(wire: &Wire, name: &str) -> Result<Option<Channel>, Fault> {
    let channel = wire.channel().await?;
    Ok(declare(&channel, name).await?.then_some(channel))
}

/// False: another connection has it.
async fn declare(channel: &Channel, name: &str) -> Result<bool, Fault> {
    let options = QueueDeclareOptions {
        exclusive: true,
        ..QueueDeclareOptions::default()
    };
    let made = channel
        .queue_declare(name.into(), options, FieldTable::default())
        .await;
    match made.map_err(Fault::from) {
        Ok(_) => Ok(true),
        // Not found: its last owner is about to give it back.
        Err(Fault::Amqp(405 | 404, _)) => Ok(false),
        Err(fault) => Err(fault),
    }
}

/// A lock that is held. Dropped, it is given back soon after; [`Guard::release`] waits for that.
pub(super) struct Guard {
    channel: Option<Channel>,
    name: String,
    spares: Spare,
    /// Given up last: until the lock is gone, this connection would be given it a second time.
    turn: Option<tokio::sync::OwnedMutexGuard<()>>,
}

/// Waits for the lock. Whoever waits is bound by a deadline of its own.
pub(super) async fn take(core: &Arc<Core>, wire: &Wire, name: String) -> Result<Guard, Fault> {
    let mut turn = Some(core.turn(&name).lock_owned().await);
    let look = Deadline::after(Duration::from_secs(60));
    loop {
        // A refusal costs a channel for good; a look costs nothing.
        while is_attended(core, &name, look).await? {
            tokio::time::sleep(AGAIN).await;
        }
        let channel = wire.spare().await?;
        // A guard before it is held: whoever gives up while the broker answers may have it already, and
        // would keep everybody out for as long as the connection lives.
        let mut guard = Guard {
            channel: Some(channel.clone()),
            name: name.clone(),
            spares: wire.spares().clone(),
            turn: turn.take(),
        };
        if declare(&channel, &name).await? {
            credential::open(core, &channel, &name).await?;
            return Ok(guard);
        }
        guard.channel = None;
        turn = guard.turn.take();
        // A guest with a credential does not see the control plane's locks by looking.
        let again = if core.own.is_some() { UNSEEN } else { AGAIN };
        tokio::time::sleep(again).await;
    }
}

impl Guard {
    pub(super) async fn release(mut self) -> Result<(), Fault> {
        match self.channel.take() {
            Some(channel) => give_back(channel, &self.name, &self.spares).await,
            None => Ok(()),
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let (Some(channel), Ok(runtime)) =
            (self.channel.take(), tokio::runtime::Handle::try_current())
        {
            let (name, turn) = (std::mem::take(&mut self.name), self.turn.take());
            let spares = self.spares.clone();
            runtime.spawn(async move {
                let _turn = turn;
                let gone = async {
                    while channel.status().connected() {
                        tokio::time::sleep(LOOK).await;
                    }
                };
                let back = give_back(channel.clone(), &name, &spares);
                tokio::select! {
                    _ = tokio::time::timeout(PATIENCE, back) => {}
                    // The lock went with it.
                    () = gone => {}
                }
            });
        }
    }
}

async fn give_back(channel: Channel, name: &str, spares: &Spare) -> Result<(), Fault> {
    channel
        .queue_delete(name.into(), QueueDeleteOptions::default())
        .await?;
    spares.keep(channel);
    Ok(())
}
