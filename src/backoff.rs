//! How long to wait before the next try: exponential, with full jitter, so that many daemons do not come back at once.

use std::time::Duration;

/// The first wait is at most this long.
const FIRST: Duration = Duration::from_millis(50);
/// No wait is longer.
const LONGEST: Duration = Duration::from_secs(5);

/// The waits between tries of one thing.
#[derive(Debug, Default)]
pub struct Backoff {
    tries: u32,
}

impl Backoff {
    /// How many waits there have been.
    pub fn tries(&self) -> u32 {
        self.tries
    }

    /// The next wait: random, between half of its limit and the limit, which doubles each time.
    pub fn next_wait(&mut self) -> Duration {
        let limit = FIRST.saturating_mul(1 << self.tries.min(16)).min(LONGEST);
        self.tries = self.tries.saturating_add(1);
        // Without a source of randomness the wait is merely less random.
        let random = getrandom::u32().unwrap_or(u32::MAX);
        limit / 2 + (limit / 2).mul_f64(f64::from(random) / f64::from(u32::MAX))
    }

    /// It went well: the next trouble starts from the shortest wait again.
    pub fn reset(&mut self) {
        self.tries = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_limit() {
        let mut backoff = Backoff::default();
        let first = backoff.next_wait();
        assert!(first >= FIRST / 2 && first <= FIRST);
        for _ in 0..40 {
            assert!(backoff.next_wait() <= LONGEST);
        }
        assert!(backoff.next_wait() >= LONGEST / 2);
        backoff.reset();
        assert!(backoff.next_wait() <= FIRST);
    }
}
