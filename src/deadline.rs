//! One deadline for a whole operation: connecting, reconnecting and answering together (laws P9, R7).

use std::{future::Future, time::Duration};

use tokio::time::{Instant, timeout_at};

use crate::error::{Error, ErrorKind, Result};

/// The moment by which an operation has to have ended, one way or the other.
///
/// It is measured on the monotonic clock: no change of the wall clock moves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// A deadline this far from now. More than a hundred years count as a hundred years.
    #[must_use]
    pub fn after(duration: Duration) -> Self {
        const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
        Self(Instant::now() + duration.min(CENTURY))
    }

    /// The moment itself.
    #[must_use]
    pub fn instant(self) -> Instant {
        self.0
    }

    /// The time that is left; zero once it has passed.
    #[must_use]
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Whether it has passed.
    #[must_use]
    pub fn has_passed(self) -> bool {
        self.remaining().is_zero()
    }

    /// The earlier of this deadline and one this far from now.
    #[must_use]
    pub fn or_after(self, duration: Duration) -> Self {
        self.min(Self::after(duration))
    }

    /// Runs a future until the deadline.
    ///
    /// # Errors
    /// [`ErrorKind::DeadlineExceeded`] if the deadline passed first; the future is dropped then.
    pub async fn bound<F: Future>(self, future: F) -> Result<F::Output> {
        timeout_at(self.0, future)
            .await
            .map_err(|_| Error::new(ErrorKind::DeadlineExceeded, "the deadline passed first"))
    }
}

impl From<Duration> for Deadline {
    fn from(duration: Duration) -> Self {
        Self::after(duration)
    }
}

#[cfg(test)]
mod tests {
    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn p9_a_future_is_bound_to_the_moment_not_earlier_and_not_later() {
        let deadline = Deadline::after(Duration::from_secs(5));
        let mut bound = task::spawn(deadline.bound(std::future::pending::<()>()));
        assert_pending!(bound.poll());
        tokio::time::advance(Duration::from_millis(4_999)).await;
        assert_pending!(bound.poll());
        assert!(!deadline.has_passed());
        tokio::time::advance(Duration::from_millis(2)).await;
        let error = assert_ready!(bound.poll()).unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::DeadlineExceeded);
        assert!(deadline.has_passed());
        assert_eq!(deadline.remaining(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_ready_in_time_is_returned_and_no_duration_overflows() {
        let deadline = Deadline::after(Duration::MAX);
        assert_eq!(deadline.bound(async { 7 }).await.unwrap(), 7);
        let sooner = deadline.or_after(Duration::from_secs(1));
        assert_eq!(sooner.remaining(), Duration::from_secs(1));
        assert_eq!(sooner.or_after(Duration::MAX), sooner);
    }
}
