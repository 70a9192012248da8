//! One handle: its connections, the tasks that work on them, and its end.

use std::{
    fmt,
    future::Future,
    ops::Deref,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, atomic::AtomicU64},
};

use tokio::sync::{mpsc, watch};

use super::{
    closed,
    dial::Dialer,
    durability,
    link::Link,
    publish::{Item, Publisher},
    requests::{self, Attended},
    router::Router,
};
use crate::{broker_url::BrokerUrl, deadline::Deadline, error::Result};

pub(super) async fn connect(url: &BrokerUrl, deadline: Deadline) -> Result<Handle> {
    let dialer = Arc::new(Dialer::of(url)?);
    let (strays, stray) = mpsc::channel(256);
    let router = Arc::new(Router::new(strays));
    let main = Arc::new(Link::start(&dialer, &router, true));
    main.live(deadline).await?;
    let (working, worked) = mpsc::channel(1);
    tokio::spawn(requests::tell_strays(Arc::downgrade(&main), stray));
    // A guest may not ask for it.
    if dialer.guest.is_none() {
        tokio::spawn(durability::watch(
            Arc::downgrade(&main),
            Arc::clone(&dialer),
        ));
    }
    Ok(Handle(Arc::new(Core {
        dialer,
        router,
        main,
        bulk: OnceLock::new(),
        publisher: Mutex::new(None),
        attended: Attended::default(),
        hears: AtomicU64::new(0),
        closing: watch::Sender::new(false),
        work: Mutex::new(Some(working)),
        worked: tokio::sync::Mutex::new(worked),
    })))
}

/// What the user holds. Consumers and responders hold the rest, and outlive it.
#[derive(Debug)]
pub(super) struct Handle(Arc<Core>);

impl Deref for Handle {
    type Target = Arc<Core>;
    fn deref(&self) -> &Arc<Core> {
        &self.0
    }
}

pub(super) struct Core {
    pub(super) dialer: Arc<Dialer>,
    pub(super) router: Arc<Router>,
    /// For all but publishing.
    pub(super) main: Arc<Link>,
    /// For publishing: made by the first one, so that a guest that only consumes has one connection.
    bulk: OnceLock<Arc<Link>>,
    publisher: Mutex<Option<mpsc::Sender<Item>>>,
    pub(super) attended: Attended,
    /// The connection of `main` over which answers come, once something was asked.
    pub(super) hears: AtomicU64,
    closing: watch::Sender<bool>,
    /// Held by every task that has something to finish; None once closed.
    work: Mutex<Option<mpsc::Sender<()>>>,
    worked: tokio::sync::Mutex<mpsc::Receiver<()>>,
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core")
            .field("dialer", &self.dialer)
            .field("closing", &*self.closing.borrow())
            .finish_non_exhaustive()
    }
}

impl Core {
    pub(super) fn open(&self) -> Result<()> {
        if *self.closing.borrow() {
            Err(closed())
        } else {
            Ok(())
        }
    }

    pub(super) fn closing(&self) -> watch::Receiver<bool> {
        self.closing.subscribe()
    }

    /// Runs a task that a close waits for.
    pub(super) fn work(&self, task: impl Future<Output = ()> + Send + 'static) -> Result<()> {
        let Some(working) = lock(&self.work).clone() else {
            return Err(closed());
        };
        tokio::spawn(async move {
            task.await;
            drop(working);
        });
        Ok(())
    }

    /// The way to the task that publishes.
    pub(super) fn publisher(&self) -> Result<mpsc::Sender<Item>> {
        self.open()?;
        let mut publisher = lock(&self.publisher);
        if let Some(publisher) = &*publisher {
            return Ok(publisher.clone());
        }
        let link = self.bulk();
        let (items, inbox) = mpsc::channel(Publisher::ROOM);
        self.work(Publisher::new(link, self.dialer.guest.clone(), inbox, self.closing()).run())?;
        *publisher = Some(items.clone());
        Ok(items)
    }

    pub(super) fn bulk(&self) -> Arc<Link> {
        let start = || Arc::new(Link::start(&self.dialer, &self.router, false));
        Arc::clone(self.bulk.get_or_init(start))
    }

    pub(super) async fn close(&self, deadline: Deadline) -> Result<()> {
        self.closing.send_replace(true);
        lock(&self.publisher).take();
        lock(&self.work).take();
        let finished = async { self.worked.lock().await.recv().await };
        let finished = deadline.bound(finished).await.map(drop);
        self.main.end();
        if let Some(bulk) = self.bulk.get() {
            bulk.end();
        }
        finished
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a panic left behind is still whole: nothing here is changed in two steps.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
