//! What a batch and the slot say to the metrics and to `/status`.

use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::{Histogram, IntCounter};

use crate::admin::Shared;
use crate::batch::{Batch, CacheOp};
use crate::catalog::Carrier;
use crate::config::{Config, PostgresConfig};
use crate::metrics::Metrics;
use crate::source::slot::SlotState;

/// The handles of one rule: looked up once.
pub(super) struct RuleMetrics {
    sets: IntCounter,
    deletes: IntCounter,
    adds: IntCounter,
    removes: IntCounter,
    delay: Histogram,
}

impl RuleMetrics {
    /// One for each rule, in the order of their numbers.
    pub(super) fn of(config: &Config, metrics: &Metrics) -> Vec<Self> {
        let handles = config.rules.iter().map(|rule| {
            let name = rule.name.value.as_str();
            let ops = |op| metrics.cache_ops_total.with_label_values(&[name, op]);
            RuleMetrics {
                sets: ops("set"),
                deletes: ops("delete"),
                adds: ops("add"),
                removes: ops("remove"),
                delay: metrics.commit_to_cache_seconds.with_label_values(&[name]),
            }
        });
        handles.collect()
    }
}

/// The batch is in the cache.
pub(super) fn batch(batch: &Batch, invalidated: bool, rules: &[RuleMetrics], metrics: &Metrics) {
    if batch.is_empty() {
        return;
    }
    metrics.batch_cells.observe(batch.len() as f64);
    for (rule, op) in batch.ops() {
        let rule = &rules[usize::from(rule)];
        match op {
            CacheOp::Set { .. } if !invalidated => rule.sets.inc(),
            CacheOp::Add { .. } if !invalidated => rule.adds.inc(),
            CacheOp::Set { .. } | CacheOp::Delete { .. } => rule.deletes.inc(),
            CacheOp::Add { .. } | CacheOp::Remove { .. } => rule.removes.inc(),
        }
    }
    // Clocks may differ: a negative delay is none.
    let now_us = now_us() as i64;
    for (rule, committed) in batch.commits() {
        let delay_us = now_us.saturating_sub(committed.unix_us()).max(0);
        rules[usize::from(*rule)].delay.observe(delay_us as f64 / 1e6);
    }
}

/// Microseconds since 1970.
pub(super) fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_micros() as u64)
}

/// The slot was looked at.
pub(super) fn slot(slot: &SlotState, postgres: &PostgresConfig, metrics: &Metrics, shared: &Shared) {
    let max_retained = postgres.max_retained;
    let retained = slot.retained_bytes.unwrap_or_default();
    metrics.slot_retained_bytes.set(i64::try_from(retained).unwrap_or(i64::MAX));
    metrics.slot_status.reset();
    if let Some(status) = slot.wal_status {
        metrics.slot_status.with_label_values(&[status.name()]).set(1);
    }
    if retained > max_retained {
        let stream = Carrier::stream(postgres);
        tracing::warn!(retained, max_retained, "the {stream} makes Postgres keep more than `max_retained`");
    }
    shared.update(|status| {
        status.slot_status = slot.wal_status.map(|status| status.name().to_owned());
        status.slot_retained_bytes = slot.retained_bytes;
    });
}
