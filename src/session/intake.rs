//! Events in, batch out; pure: it knows where the stream stands, what is already in the cache, and when a batch may go.

use std::collections::HashMap;
use std::sync::Arc;

use prometheus::IntCounter;

use crate::batch::Batch;
use crate::cache::checkpoint::{Checkpoint, RuleSet};
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Metrics;
use crate::model::{Change, Event, Lsn, Position, Relation};
use crate::plan::{self, BoundTable, Note, Noted, Scratch, Transaction};

/// A table and the counters of its changes.
struct Table {
    bound: BoundTable,
    inserts: IntCounter,
    updates: IntCounter,
    deletes: IntCounter,
    truncates: IntCounter,
}

/// The transaction under way.
struct Open {
    transaction: Transaction,
    /// Row changes received so far.
    ordinal: u64,
}

/// The state between the events of one stream.
pub struct Intake {
    tables: HashMap<u32, Table>,
    open: Option<Open>,
    /// Changes up to here are in the cache for certain and are skipped.
    good: Position,
    /// Up to here changes may be in the cache: they go out together, so that no reader sees one of them undone.
    hold_until: Position,
    /// Where the stream stands.
    at: Position,
    scratch: Scratch,
    notes: Vec<Note>,
    rules: Arc<RuleSet>,
    metrics: Arc<Metrics>,
}

impl Intake {
    /// At the beginning of a stream that goes on from the checkpoint.
    pub fn new(checkpoint: &Checkpoint, rules: Arc<RuleSet>, metrics: Arc<Metrics>) -> Self {
        Intake {
            tables: HashMap::new(),
            open: None,
            good: checkpoint.good,
            hold_until: checkpoint.applied,
            at: checkpoint.good,
            scratch: Scratch::default(),
            notes: Vec::new(),
            rules,
            metrics,
        }
    }

    /// From now on the table has this shape and these rules.
    pub fn bind(&mut self, bound: BoundTable) {
        let name = format!("{}.{}", bound.relation.schema, bound.relation.name);
        let counter = |op| self.metrics.changes_total.with_label_values(&[name.as_str(), op]);
        let [inserts, updates, deletes, truncates] = ["insert", "update", "delete", "truncate"].map(counter);
        self.tables.insert(bound.relation.oid, Table { bound, inserts, updates, deletes, truncates });
    }

    /// The shape that the table has for now.
    pub fn relation(&self, oid: u32) -> Option<&Relation> {
        self.tables.get(&oid).map(|table| &table.bound.relation)
    }

    /// Takes one event into the batch. A relation whose shape is not the one bound is returned: it must be bound before
    /// the next event.
    pub fn take(&mut self, event: Event<'_>, batch: &mut Batch) -> Result<Option<Relation>> {
        match event {
            Event::Relation(relation) => {
                return Ok(Some(relation).filter(|relation| self.relation(relation.oid) != Some(relation)));
            }
            Event::Begin { commit_lsn, commit_time, .. } => {
                let transaction = Transaction { commit_lsn, commit_time };
                if self.open.replace(Open { transaction, ordinal: 0 }).is_some() {
                    return Err(protocol("a transaction begins inside another"));
                }
            }
            Event::Change { relation, change } => self.change(relation, change, batch)?,
            Event::Truncate { relations } => self.truncate(&relations, batch)?,
            Event::Commit { end_lsn, .. } => {
                self.open.take().ok_or_else(|| protocol("a commit without a transaction"))?;
                self.reached(Position::end(end_lsn), end_lsn, batch);
            }
            Event::Message { .. } | Event::Other => {}
        }
        Ok(None)
    }

    /// The server has sent everything before `wal_end`.
    pub fn idle(&mut self, wal_end: Lsn, batch: &mut Batch) {
        if self.open.is_none() && Position::end(wal_end) > self.at {
            self.reached(Position::end(wal_end), wal_end, batch);
        }
    }

    /// Whether the batch stands behind a whole transaction and holds everything that must go out together.
    pub fn at_boundary(&self) -> bool {
        self.open.is_none() && !self.replaying()
    }

    /// Whether what the stream sends may be in the cache already.
    pub fn replaying(&self) -> bool {
        self.at < self.hold_until
    }

    fn change(&mut self, relation: u32, change: Change<'_>, batch: &mut Batch) -> Result<()> {
        let Some((position, transaction)) = self.next_position()? else { return Ok(()) };
        let table =
            self.tables.get(&relation).ok_or_else(|| protocol("a change of a relation that was not described"))?;
        match change {
            Change::Insert { .. } => table.inserts.inc(),
            Change::Update { .. } => table.updates.inc(),
            Change::Delete { .. } => table.deletes.inc(),
        }
        plan::change(&table.bound, change, transaction, &mut self.scratch, batch, &mut self.notes);
        if !self.notes.is_empty() {
            self.report(relation, position);
        }
        self.reached(position, transaction.commit_lsn, batch);
        Ok(())
    }

    fn truncate(&mut self, relations: &[u32], batch: &mut Batch) -> Result<()> {
        let Some((position, transaction)) = self.next_position()? else { return Ok(()) };
        for relation in relations {
            let table =
                self.tables.get(relation).ok_or_else(|| protocol("a TRUNCATE of a relation that was not described"))?;
            table.truncates.inc();
            plan::truncate(&table.bound, transaction, batch);
        }
        self.reached(position, transaction.commit_lsn, batch);
        Ok(())
    }

    /// Counts a row change; `None` if it is in the cache already.
    fn next_position(&mut self) -> Result<Option<(Position, Transaction)>> {
        let open = self.open.as_mut().ok_or_else(|| protocol("a change outside of a transaction"))?;
        open.ordinal += 1;
        let position = Position { lsn: open.transaction.commit_lsn, ordinal: open.ordinal };
        Ok((position > self.good).then_some((position, open.transaction)))
    }

    fn reached(&mut self, position: Position, low: Lsn, batch: &mut Batch) {
        // What was skipped does not move the checkpoint back.
        if position > self.good {
            self.at = position;
            batch.applied = Some(position);
            batch.low = low;
        }
    }

    /// Counts and logs what the plan noted: rule, table and position, never row data.
    fn report(&mut self, relation: u32, position: Position) {
        let Some(table) = self.tables.get(&relation) else { return };
        let Relation { schema, name, .. } = &table.bound.relation;
        for note in self.notes.drain(..) {
            let rule = self.rules.names[usize::from(note.rule)].as_str();
            match note.what {
                Noted::Keyless => {
                    self.metrics.keyless_total.with_label_values(&[rule]).inc();
                    tracing::debug!(rule, table = %format_args!("{schema}.{name}"), %position, "a row without a key");
                }
                Noted::Unrendered(why) => {
                    self.metrics.unrendered_total.with_label_values(&[rule, why.label()]).inc();
                    tracing::debug!(rule, table = %format_args!("{schema}.{name}"), %position, %why, "key deleted, not written");
                }
            }
        }
    }
}

fn protocol(what: &str) -> Error {
    Error::new(ErrorKind::Protocol, format!("Postgres's replication stream does not make sense: {what}"))
}
