//! Looking after the cache while there is nothing to write: what is lost meanwhile would be noticed only by the next change.

use std::pin::Pin;
use std::time::{Duration, Instant};

use crate::cache::Cache;
use crate::error::Result;

use super::Session;

/// How long Redis may be left alone: every batch that it answers is a look as well.
const PROBE_AFTER: Duration = Duration::from_secs(5);

/// The cache comes back with what was found.
pub(super) type Probing<C> = Pin<Box<dyn Future<Output = (C, Result<()>)> + Send>>;

impl<C: Cache + Send + 'static> Session<C> {
    /// Looks whether Redis still holds what it did, if it has not been heard of for a while.
    pub(super) fn probe_if_idle(&mut self, now: Instant) {
        if now.duration_since(self.answered_at) < PROBE_AFTER {
            return;
        }
        let Some(mut cache) = self.cache.take() else { return };
        self.probing = Some(Box::pin(async move {
            let held = cache.probe().await;
            (cache, held)
        }));
    }

    pub(super) fn probed(&mut self, cache: C, held: Result<()>) -> Result<()> {
        self.probing = None;
        self.cache = Some(cache);
        self.answered_at = Instant::now();
        held
    }
}
