//! Events in, batch out; pure: it knows where the stream stands, what is already in the cache, and when a batch may go.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus::IntCounter;

use crate::batch::{Batch, CellHasher, Claim, Limits};
use crate::cache::checkpoint::{Checkpoint, RuleSet};
use crate::config::Redelete;
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Metrics;
use crate::model::{Change, Datum, Event, Lsn, OldTuple, Position, Relation, Xid};
use crate::plan::{self, BoundTable, Note, Noted, RowName, Scratch, Touched, Transaction};
use crate::rules::bind::BoundRule;
use crate::rules::lookup::Question;
use crate::snapshot::touches::Touches;
use crate::snapshot::visibility::Snapshot;
use crate::source::slot::MESSAGE_PREFIX;

use super::later::{Again, Later, Released};

/// How many rows may wait to be read again. Beyond it their rules owe a warm instead.
const REREADS_MAX: usize = 10_000;
/// How many transactions may be decoded and not known to be visible. Beyond it the stream waits.
pub const UNSETTLED_MAX: usize = 1 << 17;
/// What a change is planned into that is in the cache already, to find what it leaves to be read again.
const REDO_LIMITS: Limits = Limits { ops: 1, bytes: 64 << 10 };

/// A table and the counters of its changes.
struct Table {
    bound: Arc<BoundTable>,
    /// Some rule does something once a change is visible.
    settles: bool,
    /// Some rule deletes again once a change is visible that was not so at first.
    redeletes: bool,
    /// So long after that rules delete once more.
    repeats: Box<[Duration]>,
    /// Some rule has keys read again once a change is visible.
    refreshes: bool,
    inserts: IntCounter,
    updates: IntCounter,
    deletes: IntCounter,
    truncates: IntCounter,
}

/// The transaction under way.
struct Open {
    transaction: Transaction,
    xid: Xid,
}

/// A row whose key was deleted because the log did not carry all of its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reread {
    /// The OID of its table.
    pub relation: u32,
    /// The rule.
    pub rule: u16,
    /// Which row.
    pub name: RowName,
    /// Of the transaction: where to start again while this is not done.
    pub commit_lsn: Lsn,
}

/// What somebody else has to do for the stream to go on.
#[derive(Debug, PartialEq, Eq)]
pub enum Ask {
    /// A relation's shape is not the one bound: it must be bound before the next event.
    Bind(Relation),
    /// A logical message of keepstep's own.
    Hear(Box<[u8]>),
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
    /// Rule and reason of what was warned of already: once a session is enough for a log, the metric counts.
    warned: HashSet<(u16, &'static str)>,
    /// Transactions that are not known to be visible yet, in the order of their commits.
    unsettled: VecDeque<(Xid, Lsn)>,
    /// What waits for transactions to be visible.
    later: Later,
    /// What waits for longer.
    again: Again,
    /// Going through all keys for any of that is left until then; `None` while a batch in flight does so.
    rest_until: Option<Instant>,
    /// Up to here that has gone out.
    released: Position,
    /// The last look at what is visible.
    seen: Option<Snapshot>,
    epoch: u64,
    /// What the stream touches, while tables are read.
    touches: Option<Touches>,
    /// Rows to be read again, in the order of their commits.
    rereads: VecDeque<Reread>,
    /// Rules with more rows to be read again than may wait.
    overcharged: HashSet<u16>,
    redo: Batch,
    /// The stream has come to what the cache does not hold.
    past_good: bool,
    /// What the rules make since they were bound last; for the next batch.
    claims: Vec<(u16, Claim)>,
    rules: Arc<RuleSet>,
    metrics: Arc<Metrics>,
}

impl Intake {
    /// At the beginning of a stream that goes on from the checkpoint.
    pub fn new(checkpoint: &Checkpoint, rules: Arc<RuleSet>, metrics: Arc<Metrics>) -> Self {
        let settled_limits = super::LATER_LIMITS;
        Intake {
            epoch: checkpoint.epoch,
            released: checkpoint.released,
            later: Later::new(settled_limits, rules.names.len()),
            again: Again::new(rules.names.len()),
            rest_until: Some(Instant::now()),
            seen: None,
            tables: HashMap::new(),
            open: None,
            good: checkpoint.good,
            hold_until: checkpoint.applied,
            at: checkpoint.good,
            scratch: Scratch::default(),
            notes: Vec::new(),
            warned: HashSet::new(),
            unsettled: VecDeque::new(),
            touches: None,
            rereads: VecDeque::new(),
            overcharged: HashSet::new(),
            redo: Batch::new(REDO_LIMITS, rules.names.len()),
            past_good: Position::end(checkpoint.low) >= checkpoint.good,
            claims: Vec::new(),
            rules,
            metrics,
        }
    }

    /// From now on the table has this shape and these rules.
    pub fn bind(&mut self, bound: BoundTable) {
        for rule in &bound.rules {
            self.claims
                .extend([Claim::Makes(rule.forms()), Claim::Tags(rule.tagging())].map(|claim| (rule.rule, claim)));
        }
        let name = format!("{}.{}", bound.relation.schema, bound.relation.name);
        let counter = |op| self.metrics.changes_total.with_label_values(&[name.as_str(), op]);
        let [inserts, updates, deletes, truncates] = ["insert", "update", "delete", "truncate"].map(counter);
        let settles = bound.rules.iter().any(BoundRule::settles);
        let redeletes = |rule: &BoundRule| rule.redelete != Redelete::Off && !rule.delete.is_empty();
        let redeletes = bound.rules.iter().any(redeletes);
        let repeats: BTreeSet<Duration> = bound.rules.iter().filter_map(BoundRule::again_after).collect();
        let repeats = repeats.into_iter().collect();
        let refreshes = bound.rules.iter().any(|rule| rule.refresh.is_some());
        let bound = Arc::new(bound);
        let table = Table { bound, settles, redeletes, repeats, refreshes, inserts, updates, deletes, truncates };
        self.tables.insert(table.bound.relation.oid, table);
    }

    /// The tables as they are bound now.
    pub fn tables(&self) -> impl Iterator<Item = &Arc<BoundTable>> {
        self.tables.values().map(|table| &table.bound)
    }

    /// The table of this OID, as it is bound now.
    pub fn table(&self, oid: u32) -> Option<&Arc<BoundTable>> {
        self.tables.get(&oid).map(|table| &table.bound)
    }

    /// The shape that the table has for now.
    pub fn relation(&self, oid: u32) -> Option<&Relation> {
        self.tables.get(&oid).map(|table| &table.bound.relation)
    }

    /// What the rules make is said with the batch.
    pub fn say_claims(&mut self, batch: &mut Batch) {
        self.claims.drain(..).for_each(|(rule, claim)| batch.claim(rule, claim));
    }

    /// Takes one event into the batch.
    pub fn take(&mut self, event: Event<'_>, batch: &mut Batch) -> Result<Option<Ask>> {
        self.say_claims(batch);
        match event {
            Event::Relation(relation) => {
                let unknown = self.relation(relation.oid) != Some(&relation);
                return Ok(unknown.then_some(Ask::Bind(relation)));
            }
            Event::Begin { commit_lsn, commit_time, xid } => {
                // A drain of the outbox holds what several transactions did, at one place.
                if let Some(open) = self.open.as_mut().filter(|open| open.transaction.commit_lsn == commit_lsn) {
                    open.xid = xid;
                    return Ok(None);
                }
                let visible = self.seen.as_ref().is_some_and(|snapshot| snapshot.sees(xid));
                let (epoch, released) = (self.epoch, false);
                let transaction = Transaction { commit_lsn, commit_time, ordinal: 0, epoch, visible, released };
                if self.open.replace(Open { transaction, xid }).is_some() {
                    return Err(protocol("a transaction begins inside another"));
                }
            }
            Event::Change { relation, change } => self.change(relation, change, batch)?,
            Event::Truncate { relations } => {
                relations.iter().try_for_each(|relation| self.truncate(*relation, batch))?;
            }
            Event::Commit { end_lsn, .. } => {
                let open = self.open.take().ok_or_else(|| protocol("a commit without a transaction"))?;
                if !open.transaction.visible {
                    self.unsettled.push_back((open.xid, open.transaction.commit_lsn));
                }
                self.reached(Position::end(end_lsn), end_lsn, batch);
            }
            Event::Message { prefix, content, .. } if prefix == MESSAGE_PREFIX.as_bytes() => {
                return Ok(Some(Ask::Hear(content.into())));
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
        self.past_good |= self.open.is_none() && Position::end(wal_end) >= self.good;
    }

    /// Whether everything that comes now is new to the cache, so that what tables say can be merged with it.
    pub fn is_past_start(&self) -> bool {
        self.past_good && !self.replaying()
    }

    /// The oldest transaction that is not settled, or that left rows to be read again: where to start after a crash.
    pub fn oldest_pending(&self) -> Option<Lsn> {
        let unsettled = self.unsettled.front().map(|(_, commit_lsn)| *commit_lsn);
        let reread = self.rereads.front().map(|reread| reread.commit_lsn);
        unsettled.into_iter().chain(reread).chain(self.later.oldest()).chain(self.again.oldest()).min()
    }

    /// The transactions that are not known to be visible.
    pub fn unsettled(&self) -> impl ExactSizeIterator<Item = Xid> {
        self.unsettled.iter().map(|(xid, _)| *xid)
    }

    /// The same and the one under way: of each of them something may have come that was not noted as touched.
    pub fn decoded(&self) -> impl Iterator<Item = Xid> {
        self.unsettled().chain(self.open.as_ref().map(|open| open.xid))
    }

    /// A snapshot of the primary sees these.
    pub fn settle(&mut self, snapshot: Snapshot) {
        self.unsettled.retain(|(xid, _)| !snapshot.sees(*xid));
        self.later.settle(&snapshot);
        self.again.settle(&snapshot);
        self.seen = Some(snapshot);
    }

    /// Whether something waits until it is visible.
    pub fn has_later(&self) -> bool {
        self.oldest_later().is_some() || self.again.oldest().is_some()
    }

    /// The oldest change of which something waits until it is visible.
    pub fn oldest_later(&self) -> Option<Lsn> {
        self.later.oldest()
    }

    /// Whether nothing of what came up to here still waits until it is visible.
    pub fn released_up_to(&self, applied: Position) -> Option<Position> {
        Some(applied).filter(|_| self.is_past_start() && self.later.oldest().is_none())
    }

    /// Whether something waits for a look at what is visible.
    pub fn wants_look(&self) -> bool {
        self.later.wants_look()
    }

    /// Whether a change's own could still be collected.
    pub fn has_room(&self) -> bool {
        !self.later.is_full() && self.unsettled.len() < UNSETTLED_MAX
    }

    /// Questions about what is visible by now.
    pub fn take_questions(&mut self) -> Vec<Question> {
        self.later.take_questions()
    }

    /// This is what they mean.
    pub fn looked_up(&mut self, answers: &Batch) {
        self.later.answered(answers);
    }

    /// What waits for nothing any more goes into the batch; gives what has to be read again.
    pub(super) fn release(&mut self, batch: &mut Batch) -> Option<Released> {
        let now = Instant::now();
        let (until, released) = self.later.release(batch, now, self.may_search(now))?;
        batch.released = Some(until);
        Some(released)
    }

    /// What is to be deleted once more by now goes into the batch; whether that was anything.
    pub fn release_again(&mut self, batch: &mut Batch) -> bool {
        let now = Instant::now();
        self.again.release(batch, now, self.may_search(now))
    }

    /// All keys are gone through: nothing is released that asks for that too.
    pub fn rest(&mut self) {
        self.rest_until = None;
    }

    /// That is over; nor is anything like it released before then.
    pub fn rest_until(&mut self, instant: Instant) {
        self.rest_until = self.rest_until.max(Some(instant));
    }

    fn may_search(&self, now: Instant) -> bool {
        self.rest_until.is_some_and(|until| now >= until)
    }

    /// From now on what the stream touches is noted, as it may be already.
    pub fn note_touches(&mut self, hasher: &CellHasher) {
        self.touches.get_or_insert_default();
        let noting = || Touched { hasher: hasher.clone(), cells: Vec::new() };
        self.scratch.touched.get_or_insert_with(noting);
    }

    /// No table is read any more.
    pub fn forget_touches(&mut self) {
        self.touches = None;
        self.scratch.touched = None;
    }

    /// Whether more was noted than may be kept.
    pub fn overflows(&self) -> bool {
        self.touches.as_ref().is_some_and(Touches::overflows)
    }

    /// What was noted.
    pub fn touches(&mut self) -> Option<&mut Touches> {
        self.touches.as_mut()
    }

    /// Rows of the oldest table that waits, up to so many.
    pub fn take_rereads(&mut self, most: usize) -> Vec<Reread> {
        let Some(relation) = self.rereads.front().map(|reread| reread.relation) else { return Vec::new() };
        let count = self.rereads.iter().take(most).take_while(|reread| reread.relation == relation).count();
        self.rereads.drain(..count).collect()
    }

    /// These were not read after all.
    pub fn put_back(&mut self, rereads: Vec<Reread>) {
        rereads.into_iter().rev().for_each(|reread| self.rereads.push_front(reread));
    }

    /// Whether rows wait to be read again.
    pub fn has_rereads(&self) -> bool {
        !self.rereads.is_empty()
    }

    /// The rows of these rules cannot be read again one by one.
    pub fn overcharge(&mut self, rules: impl Iterator<Item = u16>) {
        self.overcharged.extend(rules);
    }

    /// The rules with more rows to be read again than may wait: reading their tables does that too.
    pub fn take_overcharged(&mut self) -> HashSet<u16> {
        std::mem::take(&mut self.overcharged)
    }

    /// Whether the batch holds whole transactions only, and everything that must go out together. What is under way may
    /// be large and concern no key: what came before does not wait for it.
    pub fn is_whole(&self, batch: &Batch) -> bool {
        let half = self.open.as_ref().is_some_and(|open| batch.holds(open.transaction.commit_lsn));
        !half && !self.replaying()
    }

    /// Whether what the stream sends may be in the cache already.
    pub fn replaying(&self) -> bool {
        self.at < self.hold_until
    }

    fn change(&mut self, relation: u32, change: Change<'_>, batch: &mut Batch) -> Result<()> {
        let (position, transaction, xid) = self.next_position()?;
        let table =
            self.tables.get(&relation).ok_or_else(|| protocol("a change of a relation that was not described"))?;
        if !fits(&change, table.bound.relation.columns.len()) {
            return Err(protocol("a row with more or fewer columns than its relation"));
        }
        if !table.repeats.is_empty() {
            let all = self.tables.values().flat_map(|table| &table.bound.rules);
            self.again.change(&table.bound, &table.repeats, change, &mut self.scratch, all);
            self.again.collected(xid, transaction.visible, transaction.commit_lsn, position);
        }
        let settles = match transaction.released {
            // What was asked of Postgres is forgotten with the session, and asking once more changes nothing.
            true => table.refreshes,
            false => table.settles || table.redeletes && !transaction.visible,
        };
        if position <= self.good {
            if settles || is_incomplete(&change) {
                let settled = Some(self.later.collect()).filter(|_| settles);
                plan::change(
                    &table.bound,
                    change,
                    transaction,
                    &mut self.scratch,
                    &mut self.redo,
                    settled,
                    &mut self.notes,
                );
                self.redo.clear();
                if settles {
                    self.later.collected(xid, transaction.visible, transaction.commit_lsn, position);
                }
                self.report(relation, position, transaction);
            }
            return Ok(());
        }
        match change {
            Change::Insert { .. } => table.inserts.inc(),
            Change::Update { .. } => table.updates.inc(),
            Change::Delete { .. } => table.deletes.inc(),
        }
        let settled = Some(self.later.collect()).filter(|_| settles);
        plan::change(&table.bound, change, transaction, &mut self.scratch, batch, settled, &mut self.notes);
        if settles {
            self.later.collected(xid, transaction.visible, transaction.commit_lsn, position);
        }
        if !self.notes.is_empty() {
            self.report(relation, position, transaction);
        }
        if let (Some(noted), Some(touches)) = (&mut self.scratch.touched, &mut self.touches) {
            noted.cells.drain(..).for_each(|cell| touches.cell(xid, cell));
        }
        self.reached(position, transaction.commit_lsn, batch);
        Ok(())
    }

    /// Each of the tables has a place of its own: what is told of them can be told apart.
    fn truncate(&mut self, relation: u32, batch: &mut Batch) -> Result<()> {
        let (position, transaction, xid) = self.next_position()?;
        let table =
            self.tables.get(&relation).ok_or_else(|| protocol("a TRUNCATE of a relation that was not described"))?;
        if !table.repeats.is_empty() {
            self.again.everything(&table.repeats, table.bound.rules.iter().filter(|rule| rule.on.delete));
            self.again.collected(xid, transaction.visible, transaction.commit_lsn, position);
        }
        let settles = !transaction.released || table.refreshes;
        let settled = Some(self.later.collect()).filter(|_| settles);
        let is_new = position > self.good;
        if is_new {
            table.truncates.inc();
            plan::truncate(&table.bound, transaction, batch, settled);
            if let Some(touches) = &mut self.touches {
                table.bound.rules.iter().for_each(|rule| touches.rule(xid, rule.rule));
            }
        } else if settles {
            plan::truncate(&table.bound, transaction, &mut self.redo, settled);
            self.redo.clear();
        }
        if settles {
            self.later.collected(xid, transaction.visible, transaction.commit_lsn, position);
        }
        if is_new {
            self.reached(position, transaction.commit_lsn, batch);
        }
        Ok(())
    }

    /// Counts a row change, or a table that is truncated.
    fn next_position(&mut self) -> Result<(Position, Transaction, Xid)> {
        let open = self.open.as_mut().ok_or_else(|| protocol("a change outside of a transaction"))?;
        open.transaction.ordinal += 1;
        let position = Position { lsn: open.transaction.commit_lsn, ordinal: open.transaction.ordinal };
        open.transaction.released = position <= self.released;
        Ok((position, open.transaction, open.xid))
    }

    fn reached(&mut self, position: Position, low: Lsn, batch: &mut Batch) {
        // What was skipped does not move the checkpoint back.
        self.past_good |= position >= self.good;
        if position > self.good {
            self.at = position;
            batch.applied = Some(position);
            batch.low = low;
        }
    }

    /// Counts and logs what the plan noted: rule, table and position, never row data.
    fn report(&mut self, relation: u32, position: Position, transaction: Transaction) {
        let Some(table) = self.tables.get(&relation) else { return };
        let Relation { schema, name, .. } = &table.bound.relation;
        let table = format_args!("{schema}.{name}");
        for note in self.notes.drain(..) {
            let rule = self.rules.names[usize::from(note.rule)].as_str();
            match note.what {
                Noted::Keyless => {
                    self.metrics.keyless_total.with_label_values(&[rule]).inc();
                    tracing::debug!(rule, %table, %position, "a row without a key");
                }
                Noted::Incomplete(row) => {
                    let why = plan::Unrendered::UnchangedToast.label();
                    self.metrics.unrendered_total.with_label_values(&[rule, why]).inc();
                    if self.rereads.len() < REREADS_MAX {
                        let commit_lsn = transaction.commit_lsn;
                        self.rereads.push_back(Reread { relation, rule: note.rule, name: row, commit_lsn });
                    } else {
                        self.overcharged.insert(note.rule);
                    }
                }
                Noted::Swept => {
                    let why = plan::Unrendered::UnchangedToast.label();
                    self.metrics.unrendered_total.with_label_values(&[rule, why]).inc();
                    self.overcharged.insert(note.rule);
                }
                Noted::Unrendered(why) => {
                    self.metrics.unrendered_total.with_label_values(&[rule, why.label()]).inc();
                    if self.warned.insert((note.rule, why.label())) {
                        tracing::warn!(rule, %table, %position, %why, "key deleted, not written; further ones are only counted");
                    }
                }
            }
        }
    }
}

/// Whether the log did not carry all of the new row.
fn is_incomplete(change: &Change<'_>) -> bool {
    let (new, _) = change.images();
    new.is_some_and(|new| new.datums().any(|datum| datum == Datum::UnchangedToast))
}

/// Whether each image has a value for each column.
fn fits(change: &Change<'_>, columns: usize) -> bool {
    let (new, old) = change.images();
    let old = old.map(|(OldTuple::Full(old) | OldTuple::Key(old))| old);
    new.into_iter().chain(old).all(|tuple| usize::from(tuple.columns) == columns)
}

fn protocol(what: &str) -> Error {
    Error::new(ErrorKind::Protocol, format!("Postgres's replication stream does not make sense: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{self, CacheOp, Effect, Limits};
    use crate::cache::checkpoint::tests::checkpoint;
    use crate::model::{Timestamp, Tuple, Xid};
    use crate::plan::tests::{bound, text_tuple};

    const RULE: &str = "key = \"row:{id}\"\nvalue = \"json\"\ncolumns = [\"id\", \"version\"]";

    struct Stream {
        intake: Intake,
        batch: Batch,
    }

    impl Stream {
        /// Goes on from a checkpoint; batches are full at two cells.
        fn from(good: Position, applied: Position) -> Self {
            Self::of(checkpoint(100), good, applied)
        }

        fn of(checkpoint: Checkpoint, good: Position, applied: Position) -> Self {
            let checkpoint = Checkpoint { good, applied, ..checkpoint };
            let rules = RuleSet { names: vec!["row".into()], ..RuleSet::new(&[]) };
            let mut intake = Intake::new(&checkpoint, Arc::new(rules), Arc::new(Metrics::new()));
            intake.bind(bound(RULE, &["id", "version"]));
            Stream { intake, batch: Batch::new(Limits { ops: 2, bytes: 1000 }, 1) }
        }

        fn take(&mut self, event: Event<'_>) -> Result<Option<Ask>> {
            self.intake.take(event, &mut self.batch)
        }

        fn begin(&mut self, commit_lsn: u64) {
            let event = Event::Begin { commit_lsn: Lsn(commit_lsn), commit_time: Timestamp(0), xid: Xid(1) };
            self.take(event).expect("a begin");
        }

        fn insert(&mut self, id: &str, version: &str) {
            let bytes = text_tuple(&[Some(id), Some(version)]);
            let new = Tuple { columns: 2, bytes: &bytes };
            self.take(Event::Change { relation: 1, change: Change::Insert { new } }).expect("a change");
        }

        fn commit(&mut self, commit_lsn: u64) {
            let event = Event::Commit { commit_lsn: Lsn(commit_lsn), end_lsn: Lsn(commit_lsn + 10) };
            self.take(event).expect("a commit");
        }

        /// What the batch would write, and whether it may go out now.
        fn state(&self) -> (Vec<String>, bool) {
            let ops = self.batch.ops().map(|(_, op)| match op {
                CacheOp::Set { value, .. } => String::from_utf8_lossy(value).into_owned(),
                op => format!("-{}", String::from_utf8_lossy(op.key())),
            });
            let ready = self.intake.is_whole(&self.batch) || self.batch.is_full() && !self.intake.replaying();
            (ops.collect(), ready)
        }
    }

    fn at(lsn: u64, ordinal: u64) -> Position {
        Position { lsn: Lsn(lsn), ordinal }
    }

    #[test]
    fn positions_follow_the_stream() {
        let mut stream = Stream::from(at(100, 0), at(100, 0));
        stream.begin(200);
        assert_eq!(stream.batch.applied, None);
        stream.insert("1", "1");
        assert_eq!(
            (stream.batch.applied, stream.batch.low),
            (Some(at(200, 1)), Lsn(200)),
            "the transaction is not done"
        );
        assert!(!stream.intake.is_whole(&stream.batch));
        stream.commit(200);
        assert_eq!((stream.batch.applied, stream.batch.low), (Some(at(210, 0)), Lsn(210)));
        assert!(stream.intake.is_whole(&stream.batch));
    }

    #[test]
    fn what_is_good_is_skipped_and_what_may_be_there_goes_out_together() {
        // The first run applied (200, 1..=4) in one batch after (200, 1) was good; readers may have seen version 4.
        let mut stream = Stream::from(at(200, 1), at(200, 4));
        stream.begin(150);
        stream.insert("9", "9");
        stream.commit(150);
        stream.begin(200);
        for version in ["1", "2", "3"] {
            stream.insert("1", version);
        }
        stream.insert("2", "1");
        assert_eq!(stream.state().0.len(), 2, "more than the limit, held together");
        let (ops, ready) = stream.state();
        assert!(ready, "the stream is past what was applied");
        assert_eq!(ops, [r#"{"id":"1","version":"3"}"#, r#"{"id":"2","version":"1"}"#]);
    }

    #[test]
    fn what_is_skipped_of_a_transaction_is_no_start_for_reading() {
        let mut stream = Stream::of(Checkpoint { low: Lsn(200), ..checkpoint(100) }, at(200, 3), at(200, 3));
        assert!(!stream.intake.is_past_start());
        stream.intake.idle(Lsn(200), &mut stream.batch);
        assert!(!stream.intake.is_past_start());
        stream.begin(200);
        (1..4).for_each(|version| stream.insert("1", &version.to_string()));
        assert!(!stream.intake.is_past_start());
        stream.commit(200);
        assert!(stream.intake.is_past_start());
        let stream = Stream::of(
            Checkpoint { low: Lsn(200), ..checkpoint(100) },
            Position::end(Lsn(200)),
            Position::end(Lsn(200)),
        );
        assert!(stream.intake.is_past_start());
    }

    #[test]
    fn a_replay_is_held_although_it_is_full_or_at_a_commit() {
        let mut stream = Stream::from(at(100, 0), at(300, 1));
        stream.begin(200);
        stream.insert("1", "1");
        stream.insert("2", "1");
        assert!(!stream.state().1, "full");
        stream.commit(200);
        assert!(!stream.state().1, "at a commit");
        stream.begin(300);
        stream.insert("1", "2");
        let (ops, ready) = stream.state();
        assert!(ready);
        assert_eq!(ops, [r#"{"id":"1","version":"2"}"#, r#"{"id":"2","version":"1"}"#]);
    }

    #[test]
    fn what_is_whole_does_not_wait_for_a_transaction_that_concerns_no_key() {
        let mut stream = Stream::from(at(100, 0), at(100, 0));
        let elsewhere = bound(RULE, &["id", "version"]).relation;
        let relation = Relation { oid: 2, name: "elsewhere".into(), ..elsewhere };
        stream.intake.bind(BoundTable { relation, rules: Vec::new() });
        stream.begin(200);
        stream.insert("1", "1");
        stream.commit(200);
        stream.begin(300);
        let bytes = text_tuple(&[Some("1"), Some("1")]);
        let new = Tuple { columns: 2, bytes: &bytes };
        stream.take(Event::Change { relation: 2, change: Change::Insert { new } }).expect("a change");
        assert!(stream.state().1, "the first transaction is whole");
        assert_eq!((stream.batch.applied, stream.batch.low), (Some(at(300, 1)), Lsn(300)));
        stream.insert("2", "1");
        assert!(!stream.intake.is_whole(&stream.batch), "the second one is not");
    }

    #[test]
    fn what_is_told_of_tables_that_are_truncated_together_has_places_of_its_own() {
        let mut stream = Stream::from(at(100, 0), at(100, 0));
        let told = bound("stream = { key = \"events\" }", &["id"]);
        let other = Relation { oid: 2, name: "other".into(), ..told.relation.clone() };
        stream.intake.bind(BoundTable { relation: other, ..told.clone() });
        stream.intake.bind(told);
        stream.begin(200);
        stream.take(Event::Truncate { relations: vec![1, 2] }).expect("a TRUNCATE");
        let ordinals = stream.intake.later.collect().effects().map(|effect| {
            let Effect::Append { entry, .. } = effect else { panic!("not told: {effect:?}") };
            batch::fields(entry).find(|(name, _)| *name == b"ordinal").expect("an ordinal").1.to_vec()
        });
        assert_eq!(ordinals.collect::<Vec<_>>(), [b"1", b"2"]);
        assert_eq!(stream.batch.applied, Some(at(200, 2)));
    }

    #[test]
    fn all_keys_are_not_gone_through_again_before_the_rest_is_over() {
        let (mut stream, now) = (Stream::from(at(100, 0), at(100, 0)), Instant::now());
        let hour = Duration::from_secs(3600);
        assert!(stream.intake.may_search(now + hour));
        stream.intake.rest();
        assert!(!stream.intake.may_search(now + hour), "a batch in flight does it");
        stream.intake.rest_until(now + hour);
        // The next batch does not, and is answered at once.
        stream.intake.rest_until(now);
        assert!(!stream.intake.may_search(now) && stream.intake.may_search(now + hour));
    }

    #[test]
    fn idle_progress_counts_only_between_transactions_and_forwards() {
        let mut stream = Stream::from(at(100, 0), at(100, 0));
        stream.intake.idle(Lsn(90), &mut stream.batch);
        assert_eq!(stream.batch.applied, None);
        stream.begin(200);
        stream.intake.idle(Lsn(250), &mut stream.batch);
        assert_eq!(stream.batch.applied, None);
        stream.commit(200);
        stream.intake.idle(Lsn(250), &mut stream.batch);
        assert_eq!(stream.batch.applied, Some(at(250, 0)));
    }

    #[test]
    fn what_is_decoded_is_pending_until_it_is_visible() {
        let mut stream = Stream::from(at(100, 0), at(100, 0));
        let decoded = |stream: &Stream| stream.intake.decoded().collect::<Vec<_>>();
        stream.begin(200);
        stream.insert("1", "1");
        assert_eq!(decoded(&stream), [Xid(1)], "a part of it may be in the cache already");
        stream.commit(200);
        assert_eq!(decoded(&stream), [Xid(1)]);
        stream.intake.settle("2:2:".parse().expect("a snapshot"));
        assert_eq!(decoded(&stream), []);
    }

    #[test]
    fn nothing_counts_as_released_while_it_waits_or_is_still_to_come_again() {
        let mut stream = Stream::of(checkpoint(100), at(300, 0), at(300, 0));
        stream.intake.bind(bound("delete = [\"list:{id}\"]", &["id", "version"]));
        let released = |stream: &Stream| stream.intake.released_up_to(at(300, 0));
        assert_eq!(released(&stream), None, "the stream may bring what waits");
        stream.begin(290);
        stream.insert("1", "1");
        stream.commit(290);
        assert_eq!(released(&stream), None, "its second delete waits");
        stream.intake.settle("2:2:".parse().expect("a snapshot"));
        assert_eq!(released(&stream), None);
        assert!(stream.intake.release(&mut stream.batch).is_some());
        assert_eq!(released(&stream), Some(at(300, 0)));
    }

    #[test]
    fn a_stream_that_makes_no_sense_is_an_error() {
        let mut stream = Stream::from(at(100, 0), at(100, 0));
        let bytes = text_tuple(&[Some("1"), Some("1")]);
        let new = Tuple { columns: 2, bytes: &bytes };
        assert!(stream.take(Event::Change { relation: 1, change: Change::Insert { new } }).is_err(), "no transaction");
        assert!(stream.take(Event::Commit { commit_lsn: Lsn(1), end_lsn: Lsn(2) }).is_err(), "no transaction");
        stream.begin(200);
        assert!(
            stream.take(Event::Change { relation: 2, change: Change::Insert { new } }).is_err(),
            "no such relation"
        );
        let begin = Event::Begin { commit_lsn: Lsn(300), commit_time: Timestamp(0), xid: Xid(2) };
        assert!(stream.take(begin).is_err(), "inside another");
    }

    #[test]
    fn a_relation_is_bound_again_only_if_its_shape_changed() {
        let mut stream = Stream::from(at(100, 0), at(100, 0));
        let known = bound(RULE, &["id", "version"]).relation;
        assert_eq!(stream.take(Event::Relation(known.clone())).expect("a relation"), None);
        let altered = bound(RULE, &["id", "version", "more"]).relation;
        assert_eq!(stream.take(Event::Relation(altered.clone())).expect("a relation"), Some(Ask::Bind(altered)));
    }
}
