//! One connection through the proxy: two directions, each held to the rules of the moment.

use std::{future::pending, sync::Arc, time::Duration};

use futures_util::future::try_join;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::{mpsc, watch},
    time::Instant,
};

use super::{Rules, Shared, Toward, frames::Splitter};

/// How a connection ends before both sides have closed it.
enum End {
    /// Somebody broke it: both sides get a reset.
    Reset,
    /// It was cut behind what had passed in this direction: the one it went to reads it and then
    /// sees the end, the other gets a reset.
    Cut { toward: Toward, all: bool },
}

const CHUNK: usize = 16 * 1024;
/// Chunks under way at once: what a slow link holds.
const UNDER_WAY: usize = 64;

pub(super) async fn serve(id: u64, mut client: TcpStream, shared: Arc<Shared>) {
    let mut rules = shared.rules.subscribe();
    let born = rules.borrow_and_update().resets;
    let reset = async {
        let over = rules.wait_for(|rules| rules.resets > born).await.is_ok();
        if !over {
            pending::<()>().await;
        }
    };
    let Ok(mut broker) = TcpStream::connect(shared.upstream).await else {
        // As a broker that is down: whoever came is sent away.
        let _ = client.set_zero_linger();
        return;
    };
    let _ = (client.set_nodelay(true), broker.set_nodelay(true));
    let end = {
        let (from_client, to_client) = client.split();
        let (from_broker, to_broker) = broker.split();
        let there = pump(id, Toward::Broker, from_client, to_broker, &shared);
        let back = pump(id, Toward::Client, from_broker, to_client, &shared);
        tokio::select! {
            end = try_join(there, back) => end.err(),
            () = reset => Some(End::Reset),
        }
    };
    let (reset_client, reset_broker) = match end {
        None => (false, false),
        Some(End::Reset) => (true, true),
        Some(End::Cut { toward, all }) => {
            if all {
                shared.rules.send_modify(|rules| rules.resets += 1);
            }
            (toward == Toward::Broker, toward == Toward::Client)
        }
    };
    if reset_client {
        let _ = client.set_zero_linger();
    }
    if reset_broker {
        let _ = broker.set_zero_linger();
    }
}

/// Carries bytes in one direction until its source has no more.
async fn pump(
    id: u64,
    toward: Toward,
    mut source: ReadHalf<'_>,
    mut sink: WriteHalf<'_>,
    shared: &Shared,
) -> Result<(), End> {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Vec<u8>)>(UNDER_WAY);
    let mut rules = shared.rules.subscribe();
    let reading = async {
        let mut buffer = vec![0; CHUNK];
        loop {
            open(id, toward, &mut rules).await;
            let read = source.read(&mut buffer).await.map_err(|_| End::Reset)?;
            if read == 0 {
                break;
            }
            let delay = rules.borrow().way(toward).delay;
            let chunk = buffer.get(..read).unwrap_or_default().to_vec();
            if sender.send((Instant::now() + delay, chunk)).await.is_err() {
                break;
            }
        }
        drop(sender);
        Ok(())
    };
    let mut rules = shared.rules.subscribe();
    let writing = async {
        let mut splitter = shared.protocol.map(Splitter::new);
        while let Some((due, chunk)) = receiver.recv().await {
            tokio::time::sleep_until(due).await;
            let mut rest = chunk.as_slice();
            while !rest.is_empty() {
                open(id, toward, &mut rules).await;
                let bandwidth = rules.borrow_and_update().way(toward).bandwidth;
                let slice = bandwidth.map_or(rest.len(), |rate| slice(rate, rest.len()));
                let (now, later) = rest.split_at(slice);
                let (passing, cut) = shared.pass(toward, now, splitter.as_mut());
                let passed = now.get(..passing).unwrap_or(now);
                sink.write_all(passed).await.map_err(|_| End::Reset)?;
                if let Some(all) = cut {
                    return Err(End::Cut { toward, all });
                }
                if let Some(rate) = bandwidth {
                    let part = passed.len() as f64 / rate.max(1) as f64;
                    tokio::time::sleep(Duration::from_secs_f64(part)).await;
                }
                rest = later;
            }
        }
        sink.shutdown().await.map_err(|_| End::Reset)
    };
    try_join(reading, writing).await?;
    Ok(())
}

/// A twentieth of a second's worth, so that a slow link is slow all along and not in bursts.
fn slice(rate: u64, length: usize) -> usize {
    usize::try_from(rate / 20)
        .unwrap_or(length)
        .clamp(1, length)
}

/// Waits while this direction of this connection is a black hole.
async fn open(id: u64, toward: Toward, rules: &mut watch::Receiver<Rules>) {
    let open = rules
        .wait_for(|rules| rules.way(toward).hole.is_none_or(|last| id > last))
        .await
        .is_ok();
    if !open {
        pending::<()>().await;
    }
}
