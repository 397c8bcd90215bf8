//! What Postgres may forget: never beyond `low`, and a while behind it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::model::Lsn;

/// How many positions may wait to be acknowledged. With one a second this is over an hour; beyond it the oldest waits
/// a little longer.
const WAITING_MAX: usize = 4096;

/// Positions that the cache holds, until they are old enough to be acknowledged.
#[derive(Debug)]
pub struct Acks {
    window: Duration,
    waiting: VecDeque<(Instant, Lsn)>,
    acknowledged: Lsn,
}

impl Acks {
    /// `acknowledged` is what Postgres knows already; `window` is `replay_window`.
    pub fn new(acknowledged: Lsn, window: Duration) -> Self {
        Acks { window, waiting: VecDeque::new(), acknowledged }
    }

    /// An earlier run left a cache that has held everything before `low` for this long already.
    pub fn held(&mut self, low: Lsn, held: Duration) {
        if let Some(since) = Instant::now().checked_sub(held).filter(|_| low > self.acknowledged) {
            self.waiting.push_back((since, low));
        }
    }

    /// What is acknowledged.
    pub fn acknowledged(&self) -> Lsn {
        self.acknowledged
    }

    /// The cache holds everything before `low` now.
    pub fn advance(&mut self, now: Instant, low: Lsn) {
        let newest = self.waiting.back().map_or(self.acknowledged, |(_, lsn)| *lsn);
        if low > newest && self.waiting.len() < WAITING_MAX {
            self.waiting.push_back((now, low));
        }
        while let Some((since, lsn)) = self.waiting.front().copied() {
            if now.duration_since(since) < self.window {
                break;
            }
            self.acknowledged = lsn;
            self.waiting.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acknowledgements_trail_the_cache_and_never_go_back() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut acks = Acks::new(Lsn(100), Duration::from_secs(10));
        let mut after = |seconds, low| {
            acks.advance(at(seconds), Lsn(low));
            acks.acknowledged()
        };
        assert_eq!(after(0, 200), Lsn(100));
        assert_eq!(after(5, 300), Lsn(100));
        assert_eq!(after(10, 300), Lsn(200));
        assert_eq!(after(15, 250), Lsn(300), "a lower position changes nothing");
        assert_eq!(after(60, 300), Lsn(300));
    }

    #[test]
    fn what_an_earlier_run_left_has_waited_already() {
        let window = Duration::from_secs(30);
        let mut acks = Acks::new(Lsn(100), window);
        acks.held(Lsn(200), window);
        acks.advance(Instant::now(), Lsn(300));
        assert_eq!(acks.acknowledged(), Lsn(200));
    }

    #[test]
    fn without_a_window_they_follow_at_once() {
        let mut acks = Acks::new(Lsn(0), Duration::ZERO);
        acks.advance(Instant::now(), Lsn(7));
        assert_eq!(acks.acknowledged(), Lsn(7));
    }
}
