//! Requests and their answers: nothing is stored.

use std::{collections::VecDeque, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::oneshot;
use wilco::{
    Deadline, ErrorKind, GuestAddress, Result,
    broker::{MAX_REQUEST_BYTES, Reply, Request, Responder},
};

use super::state::{Lane, Shared, Waiting, error};

pub(super) async fn request(
    shared: &Arc<Shared>,
    lane: &GuestAddress,
    body: Bytes,
    deadline: Deadline,
) -> Result<Bytes> {
    check_size(&body)?;
    let (reply, answer) = oneshot::channel();
    let token = shared.change(|state| {
        let token = state.token();
        let lane = state
            .lanes
            .get_mut(lane)
            .ok_or_else(|| error(ErrorKind::NoConsumer))?;
        lane.waiting.push_back(Waiting { token, body, reply });
        Ok::<_, wilco::Error>(token)
    })?;
    // However this ends, the request does not stand in the lane after it.
    let _forget = Forget {
        shared,
        lane,
        token,
    };
    match deadline.bound(answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(_dropped)) => {
            tokio::time::sleep_until(deadline.instant()).await;
            Err(error(ErrorKind::ConsumerSilent))
        }
        Err(_) => Err(error(ErrorKind::ConsumerSilent)),
    }
}

struct Forget<'a> {
    shared: &'a Shared,
    lane: &'a GuestAddress,
    token: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.shared.change_quietly(|state| {
            if let Some(lane) = state.lanes.get_mut(self.lane) {
                lane.waiting.retain(|waiting| waiting.token != self.token);
            }
        });
    }
}

pub(super) fn attach(
    shared: &Arc<Shared>,
    handle: u64,
    lane: &GuestAddress,
) -> Result<Box<dyn Responder>> {
    shared.change(|state| {
        if state.lanes.contains_key(lane) {
            return Err(error(ErrorKind::Conflict));
        }
        let token = state.token();
        state.lanes.insert(
            lane.clone(),
            Lane {
                token,
                handle,
                waiting: VecDeque::new(),
            },
        );
        let attached = Attached {
            shared: Arc::clone(shared),
            lane: lane.clone(),
            token,
        };
        Ok(Box::new(attached) as Box<dyn Responder>)
    })
}

#[derive(Debug)]
struct Attached {
    shared: Arc<Shared>,
    lane: GuestAddress,
    token: u64,
}

#[async_trait]
impl Responder for Attached {
    async fn next(&mut self) -> Result<Request> {
        let mut version = self.shared.version.subscribe();
        loop {
            let next = self.shared.change_quietly(|state| {
                let lane = state.lanes.get_mut(&self.lane);
                let lane = lane.filter(|lane| lane.token == self.token);
                let lane = lane.ok_or_else(|| error(ErrorKind::Closed))?;
                Ok::<_, wilco::Error>(lane.waiting.pop_front())
            })?;
            if let Some(next) = next {
                return Ok(Request::new(next.body, Box::new(Way(next.reply))));
            }
            // The sender lives as long as this does.
            let _ = version.changed().await;
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.shared.change(|state| {
            if state
                .lanes
                .get(&self.lane)
                .is_some_and(|lane| lane.token == self.token)
            {
                state.lanes.remove(&self.lane);
            }
        });
    }
}

#[derive(Debug)]
struct Way(oneshot::Sender<Bytes>);

#[async_trait]
impl Reply for Way {
    async fn send(self: Box<Self>, body: Bytes, _deadline: Deadline) -> Result<()> {
        check_size(&body)?;
        // The asker may be gone; that is no error of this side (law R6).
        let _ = self.0.send(body);
        Ok(())
    }
}

fn check_size(body: &Bytes) -> Result<()> {
    if body.len() > MAX_REQUEST_BYTES {
        return Err(error(ErrorKind::TooLarge {
            limit: MAX_REQUEST_BYTES as u64,
        }));
    }
    Ok(())
}
