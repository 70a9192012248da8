//! Who gave up first: the caller at its deadline, or the task that does the work.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

use tokio::sync::oneshot;

use crate::deadline::Deadline;

/// Shared by a caller and the task that works for it. What was cancelled is never begun, so the caller
/// can say that it was not done; what was begun may have been.
#[derive(Clone, Debug, Default)]
pub(super) struct Ticket(Arc<AtomicU8>);

const WAITING: u8 = 0;
const BEGUN: u8 = 1;
const CANCELLED: u8 = 2;

/// How waiting for an answer ended.
pub(super) enum Answer<T> {
    Came(T),
    /// Given up before it was begun: it never will be.
    Never,
    /// Given up after it was begun: it may have been done.
    Late,
}

impl Ticket {
    /// The task begins, or goes on. False: it was given up, and must never be begun.
    pub(super) fn begin(&self) -> bool {
        self.turn(BEGUN) != CANCELLED
    }

    /// The caller gives up. True: it is certain never to be done.
    pub(super) fn cancel(&self) -> bool {
        self.turn(CANCELLED) != BEGUN
    }

    /// Waits for the answer until the deadline. Dropped early, it is given up.
    pub(super) async fn answer<T>(
        &self,
        deadline: Deadline,
        answer: oneshot::Receiver<T>,
    ) -> Answer<T> {
        let _guard = CancelOnDrop(self);
        match tokio::time::timeout_at(deadline.instant(), answer).await {
            Ok(Ok(answer)) => Answer::Came(answer),
            _ if self.cancel() => Answer::Never,
            _ => Answer::Late,
        }
    }

    /// What it was; it changes only from waiting.
    fn turn(&self, to: u8) -> u8 {
        match self
            .0
            .compare_exchange(WAITING, to, Ordering::AcqRel, Ordering::Acquire)
        {
            Ok(was) | Err(was) => was,
        }
    }
}

struct CancelOnDrop<'a>(&'a Ticket);

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn p4_what_was_cancelled_is_never_begun_and_what_was_begun_not_cancelled() {
        let ticket = Ticket::default();
        assert!(ticket.cancel() && ticket.cancel() && !ticket.begin());
        let ticket = Ticket::default();
        assert!(ticket.begin() && ticket.begin() && !ticket.cancel());
    }

    #[tokio::test(start_paused = true)]
    async fn p5_a_dropped_wait_gives_up() {
        let ticket = Ticket::default();
        let (_reply, answer) = oneshot::channel::<()>();
        let limit = Deadline::after(Duration::from_secs(1));
        assert!(matches!(ticket.answer(limit, answer).await, Answer::Never));
        assert!(!ticket.begin());
    }
}
