//! What a queue holds (law Q9). The broker counts what is ready; what a consumer has of it, only that
//! consumer knows, and it is asked. A count in which nothing moved meanwhile is right.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt as _, future::join_all, stream};

use super::{
    ask::{Asked, ask, is_attended},
    connection::{AGAIN, Core},
    fault::Fault,
    hold::{HAS, Has, lanes},
    index,
    link::Wire,
    no_queue, notes, topology,
};
use crate::{broker::QueueStatus, deadline::Deadline, error::Result, names::QueueName};

/// How many queues of a list are counted at once.
const AT_ONCE: usize = 16;

pub(super) async fn status(
    core: &Arc<Core>,
    queue: &QueueName,
    deadline: Deadline,
) -> Result<QueueStatus> {
    let queue = queue.clone();
    core.run(deadline, move |core, wire| {
        let queue = queue.clone();
        async move {
            let counted = count(&core, &wire, &queue, deadline).await?;
            counted.ok_or_else(|| no_queue().into())
        }
    })
    .await
}

pub(super) async fn list(core: &Arc<Core>, deadline: Deadline) -> Result<Vec<QueueStatus>> {
    core.run(deadline, move |core, wire| async move {
        let names = index::names(&core, &wire).await?;
        let counts = stream::iter(names).map(|name| {
            let (core, wire) = (Arc::clone(&core), Arc::clone(&wire));
            async move { count(&core, &wire, &name, deadline).await }
        });
        let counted: Vec<_> = counts.buffered(AT_ONCE).collect().await;
        // An entry without its queue is one that is being made or deleted at this moment.
        counted.into_iter().filter_map(Result::transpose).collect()
    })
    .await
}

/// `None`: there is no such queue.
pub(super) async fn count(
    core: &Arc<Core>,
    wire: &Wire,
    queue: &QueueName,
    deadline: Deadline,
) -> Result<Option<QueueStatus>, Fault> {
    let lanes = lanes(queue);
    let reader = notes::reader_of(queue);
    loop {
        let Some(before) = topology::counts(wire, queue).await? else {
            return Ok(None);
        };
        let soon = deadline.or_after(core.heartbeat);
        let asked = join_all(lanes.iter().map(|lane| has(core, lane, soon)));
        let (holders, read) = tokio::join!(asked, is_attended(core, &reader, deadline));
        let holders = holders.into_iter().collect::<Result<Vec<_>>>()?;
        let Some(after) = topology::counts(wire, queue).await? else {
            return Ok(None);
        };
        let still = (before.ready, before.dead) == (after.ready, after.dead);
        let silent = holders.iter().any(|has| matches!(has, Word::Silent));
        if !still || read? || silent {
            // A silent holder answers soon, or the broker notices that it is gone.
            deadline.bound(tokio::time::sleep(AGAIN)).await?;
            continue;
        }
        let mut status = QueueStatus::new(queue.clone());
        status.ready = after.ready;
        status.dead = after.dead;
        for has in &holders {
            if let Word::Has(has) = has {
                status.ready += has.ready;
                status.in_flight += has.in_flight;
                status.delayed += has.delayed;
                status.consumers += u32::from(has.attached);
            }
        }
        let held = matches!(holders.first(), Some(Word::Has(has)) if has.attached);
        if !held && after.notes > 1 {
            let Some(notes) = notes::read(core, wire, queue).await? else {
                continue;
            };
            let waiting = notes.waiting().min(status.ready);
            status.ready -= waiting;
            status.delayed += waiting;
        }
        return Ok(Some(status));
    }
}

enum Word {
    Has(Has),
    Nobody,
    Silent,
}

async fn has(core: &Core, lane: &str, deadline: Deadline) -> Result<Word> {
    Ok(match ask(core, lane, HAS, Bytes::new(), deadline).await? {
        Asked::Answer(answer) => Word::Has(serde_json::from_slice(&answer).unwrap_or_default()),
        Asked::Nobody => Word::Nobody,
        Asked::Silent => Word::Silent,
    })
}
