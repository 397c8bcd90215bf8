//! The metrics: their names, each in one place, and the handles that the session holds on to.
//!
//! **Architecture invariant:** no label holds a key or a value of a row.

use std::collections::{BTreeSet, HashMap};

use prometheus::core::{Collector, MetricVec, MetricVecBuilder};
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use crate::config::Rule;

/// From a tenth of a millisecond to a minute.
const DELAY_BUCKETS_S: [f64; 17] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0];
/// From one cell to more than a batch can hold.
const BATCH_BUCKETS_CELLS: [f64; 9] = [1.0, 2.0, 5.0, 10.0, 50.0, 100.0, 500.0, 1000.0, 5000.0];

/// Every metric of the daemon.
#[expect(missing_docs, reason = "each has its help text below")]
pub struct Metrics {
    registry: Registry,
    pub replication_lag_bytes: IntGauge,
    pub commit_to_cache_seconds: HistogramVec,
    pub changes_total: IntCounterVec,
    pub cache_ops_total: IntCounterVec,
    pub batch_cells: Histogram,
    pub slot_retained_bytes: IntGauge,
    pub slot_status: IntGaugeVec,
    pub circuit_open: IntGauge,
    pub epoch: IntGauge,
    pub rule_paused: IntGaugeVec,
    pub unrendered_total: IntCounterVec,
    pub keyless_total: IntCounterVec,
    pub lookups_total: IntCounterVec,
    pub refreshes_total: IntCounterVec,
    pub refreshes_pending: IntGauge,
    pub rules_owing: IntGauge,
    pub reconciles_total: IntCounterVec,
    pub out_of_memory_batches: IntCounter,
    pub warm_rows_total: IntCounterVec,
    pub pass_rows_left: IntGauge,
    pub audit_keys_checked_total: IntCounterVec,
    pub audit_keys_diverged_total: IntCounterVec,
    pub sessions_total: IntCounter,
    pub up: IntGauge,
}

impl Metrics {
    /// All of them, at zero.
    pub fn new() -> Self {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str| register(&registry, IntGauge::new(name, help));
        let counter = |name: &str, help: &str| register(&registry, IntCounter::new(name, help));
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            register(&registry, IntGaugeVec::new(Opts::new(name, help), labels))
        };
        let counters = |name: &str, help: &str, labels: &[&str]| {
            register(&registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let help = "From the commit, by Postgres's clock, until Redis had answered the batch, per rule";
        let delay = HistogramOpts::new("keepstep_commit_to_cache_seconds", help);
        let cells = HistogramOpts::new("keepstep_batch_cells", "Keys that one batch decided");
        Metrics {
            replication_lag_bytes: gauge(
                "keepstep_replication_lag_bytes",
                "Bytes of WAL between what Postgres has sent or flushed and what the cache holds",
            ),
            commit_to_cache_seconds: register(
                &registry,
                HistogramVec::new(delay.buckets(DELAY_BUCKETS_S.to_vec()), &["rule"]),
            ),
            changes_total: counters("keepstep_changes_total", "Row changes received", &["table", "op"]),
            cache_ops_total: counters("keepstep_cache_ops_total", "Keys set or deleted in Redis", &["rule", "op"]),
            batch_cells: register(&registry, Histogram::with_opts(cells.buckets(BATCH_BUCKETS_CELLS.to_vec()))),
            slot_retained_bytes: gauge(
                "keepstep_slot_retained_bytes",
                "Bytes of WAL that the slot makes Postgres keep",
            ),
            slot_status: gauges(
                "keepstep_slot_status",
                "1 for the slot's wal_status: reserved, extended, unreserved or lost",
                &["status"],
            ),
            circuit_open: gauge("keepstep_circuit_open", "1 while Redis is away and changes wait"),
            epoch: gauge(
                "keepstep_epoch",
                "When the unbroken history of slot and cache began, in microseconds since 1970",
            ),
            rule_paused: gauges(
                "keepstep_rule_paused",
                "1 while a rule does not fit its table, or its changes do not arrive",
                &["rule"],
            ),
            unrendered_total: counters(
                "keepstep_unrendered_total",
                "Rows whose key was deleted because their value could not be rendered, by reason",
                &["rule", "reason"],
            ),
            keyless_total: counters(
                "keepstep_keyless_total",
                "Row images without a key, because a column in it was NULL",
                &["rule"],
            ),
            lookups_total: counters(
                "keepstep_lookups_total",
                "Questions of rules with `lookup`: answered, failed (and asked again), or swept (everything that the keys \
                 can be was deleted instead)",
                &["rule", "outcome"],
            ),
            refreshes_total: counters(
                "keepstep_refreshes_total",
                "Stale keys of queries: written, deleted (an empty result), too_large, failed (and tried again), or crowded_out",
                &["query", "outcome"],
            ),
            refreshes_pending: gauge("keepstep_refreshes_pending", "Stale keys of queries that are yet to be read"),
            rules_owing: gauge("keepstep_rules_owing", "Rules whose keys are yet to be made right from their table"),
            reconciles_total: counters(
                "keepstep_reconciles_total",
                "Times that keys had to be made right from the tables: cache_lost, slot_lost, slot_moved, promoted, \
                 went_back, rules_changed, catalog, owing (left by an earlier session) or asked",
                &["reason"],
            ),
            out_of_memory_batches: counter(
                "keepstep_out_of_memory_batches_total",
                "Batches that deleted instead of writing because Redis was out of memory",
            ),
            warm_rows_total: counters(
                "keepstep_warm_rows_total",
                "Rows read from tables to write or check their keys",
                &["rule"],
            ),
            pass_rows_left: gauge(
                "keepstep_pass_rows_left",
                "Rows that the pass under way has still to read, estimated",
            ),
            audit_keys_checked_total: counters(
                "keepstep_audit_keys_checked_total",
                "Keys compared with their rows",
                &["rule"],
            ),
            audit_keys_diverged_total: counters(
                "keepstep_audit_keys_diverged_total",
                "Of these, keys that were not right: missing, differs, orphan or ttl",
                &["rule", "kind"],
            ),
            sessions_total: counter("keepstep_sessions_total", "Times that streaming began"),
            up: gauge("keepstep_up", "1 while changes are streamed and written"),
            registry,
        }
    }

    /// Other rules are in force: the series of those that are gone, and of their tables, go too.
    pub fn forget(&self, before: &[Rule], now: &[Rule]) {
        let names = |rules: &[Rule]| rules.iter().map(|rule| rule.name.value.clone()).collect::<BTreeSet<_>>();
        let tables = |rules: &[Rule]| rules.iter().map(|rule| rule.table.value.to_string()).collect::<BTreeSet<_>>();
        let rules: BTreeSet<String> = names(before).difference(&names(now)).cloned().collect();
        let tables: BTreeSet<String> = tables(before).difference(&tables(now)).cloned().collect();
        forget(&self.commit_to_cache_seconds, "rule", &rules);
        forget(&self.rule_paused, "rule", &rules);
        let counters = [&self.cache_ops_total, &self.unrendered_total, &self.keyless_total, &self.lookups_total];
        let of_reads = [&self.warm_rows_total, &self.audit_keys_checked_total, &self.audit_keys_diverged_total];
        counters.into_iter().chain(of_reads).for_each(|counter| forget(counter, "rule", &rules));
        forget(&self.changes_total, "table", &tables);
    }

    /// In Prometheus's text format.
    pub fn render(&self) -> String {
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Removes the series whose label has one of these values.
fn forget<B: MetricVecBuilder>(metrics: &MetricVec<B>, label: &str, values: &BTreeSet<String>) {
    for family in metrics.collect() {
        for metric in family.get_metric() {
            let labels: HashMap<&str, &str> =
                metric.get_label().iter().map(|pair| (pair.name(), pair.value())).collect();
            if labels.get(label).is_some_and(|value| values.contains(*value)) {
                // It is there: it was collected just now, and this is the one thread.
                let _ = metrics.remove(&labels);
            }
        }
    }
}

/// Names and labels are constants of this file, so a failure shows in the first test that makes the metrics.
fn register<C: Collector + Clone + 'static>(registry: &Registry, collector: prometheus::Result<C>) -> C {
    let collector = collector.expect("the name and labels of a metric are valid");
    registry.register(Box::new(collector.clone())).expect("each metric has its own name");
    collector
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{RulesFile, parse};

    #[test]
    fn every_metric_is_valid_and_shows() {
        let metrics = Metrics::new();
        metrics.cache_ops_total.with_label_values(&["product", "set"]).inc_by(3);
        let text = metrics.render();
        assert!(text.contains("keepstep_cache_ops_total{op=\"set\",rule=\"product\"} 3"), "{text}");
        assert!(text.contains("keepstep_replication_lag_bytes 0"), "{text}");
    }
    #[test]
    fn what_is_gone_is_counted_no_more() {
        let text = |tables: &[&str]| -> Vec<Rule> {
            let rule = |table: &&str| format!("[rule.{table}]\ntable = \"public.{table}\"\ndelete = [\"{table}\"]\n");
            let rules: String = tables.iter().map(rule).collect();
            let text = format!("[postgres]\nurl = \"postgres://h/d\"\n[redis]\nurl = \"redis://h\"\n{rules}");
            parse(RulesFile { path: "keepstep.toml".into(), text }, &|_| None).expect("a rules file").0.rules
        };
        let metrics = Metrics::new();
        for rule in ["gone", "stays"] {
            metrics.cache_ops_total.with_label_values(&[rule, "set"]).inc();
            metrics.rule_paused.with_label_values(&[rule]).set(1);
            metrics.commit_to_cache_seconds.with_label_values(&[rule]).observe(1.0);
            metrics.changes_total.with_label_values(&[&format!("public.{rule}"), "insert"]).inc();
        }
        metrics.forget(&text(&["gone", "stays"]), &text(&["stays"]));
        let shown = metrics.render();
        assert!(!shown.contains("gone\"") && shown.matches("stays\"").count() > 3, "{shown}");
    }
}
