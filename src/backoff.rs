//! Pauses that grow, with jitter, so that many who wait for one thing do not come back together (W39).

use std::time::Duration;

use uuid::Uuid;

/// A pause that doubles from a first to a longest, each a random part of it: between half and all.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            next: first,
        }
    }

    /// The next pause's length.
    pub(crate) fn next(&mut self) -> Duration {
        let pause = jitter(self.next);
        self.next = (self.next * 2).min(self.longest);
        pause
    }

    /// Waits for the next pause.
    pub(crate) async fn pause(&mut self) {
        tokio::time::sleep(self.next()).await;
    }

    /// Starts anew: what was waited for has come.
    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

/// A random part of a duration: between half and all of it.
fn jitter(duration: Duration) -> Duration {
    let random = u32::try_from(Uuid::new_v4().as_u128() >> 96).unwrap_or(u32::MAX);
    duration.div_f64(2.0)
        + duration
            .div_f64(2.0)
            .mul_f64(f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn w39_pauses_grow_to_their_longest_and_differ() {
        let (first, longest) = (Duration::from_millis(100), Duration::from_millis(300));
        let mut backoff = Backoff::new(first, longest);
        for expected in [100, 200, 300, 300] {
            let (pause, expected) = (backoff.next(), Duration::from_millis(expected));
            assert!(
                pause >= expected / 2 && pause <= expected,
                "{pause:?} of {expected:?}"
            );
        }
        backoff.reset();
        assert!(backoff.next() <= first);
        let pauses: std::collections::HashSet<_> = (0..10).map(|_| jitter(first)).collect();
        assert!(pauses.len() > 1);
    }
}
