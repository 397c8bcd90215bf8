//! Change + bound rules → cache operations; pure.
//!
//! Where the change does not carry enough for a right value, the key is deleted (I9). A key that the old image had and
//! the new one has not is deleted too; where both have the same key, the later operation on the cell wins.

use crate::batch::{Batch, Cell};
use crate::decode::value::{self, ValueError};
use crate::model::{Change, Datum, Lsn, OldTuple, Relation, Timestamp};
use crate::rules::bind::{BoundKey, BoundRule, BoundWrite, JsonField, Rendered};

/// The largest value that is written. Redis refuses bulk strings over 512 MB, and the byte budget must hold.
pub const VALUE_BYTES_MAX: usize = 64 << 20;

/// A table and the rules that obey its changes.
#[derive(Clone, Debug)]
pub struct BoundTable {
    /// Its shape at this moment of the stream.
    pub relation: Relation,
    /// Its rules, in the order of the rules file.
    pub rules: Vec<BoundRule>,
}

/// What happened to a row besides operations. Holds no row data.
#[derive(Debug, PartialEq, Eq)]
pub struct Note {
    /// The rule's number.
    pub rule: u16,
    /// What happened.
    pub what: Noted,
}

/// See [`Note`].
#[derive(Debug, PartialEq, Eq)]
pub enum Noted {
    /// A column of the key is NULL: the row has no key.
    Keyless,
    /// The value could not be rendered, or not the key: the key, as far as it is known, was deleted.
    Unrendered(Unrendered),
}

/// Why a value could not be rendered.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unrendered {
    /// The log does not carry a TOASTed value that did not change.
    #[error("an unchanged TOASTed value is not in the log")]
    UnchangedToast,
    /// The rule needs a column that the table no longer has.
    #[error("a column that the rule needs is gone")]
    ColumnGone,
    /// Over [`VALUE_BYTES_MAX`].
    #[error("the value is larger than 64 MiB")]
    TooLarge,
    /// Postgres's text form was not as expected.
    #[error(transparent)]
    Invalid(#[from] ValueError),
}

impl Unrendered {
    /// A word for the metric.
    pub fn label(&self) -> &'static str {
        match self {
            Self::UnchangedToast => "unchanged_toast",
            Self::ColumnGone => "column_gone",
            Self::TooLarge => "too_large",
            Self::Invalid(_) => "invalid",
        }
    }
}

/// What planning needs besides its input, kept from change to change so that none allocates.
#[derive(Debug, Default)]
pub struct Scratch {
    new: Vec<Datum<'static>>,
    old: Vec<Datum<'static>>,
    /// The state of the generator behind TTL jitter.
    random: u64,
}

/// The transaction that a change belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transaction {
    /// Where its commit record begins.
    pub commit_lsn: Lsn,
    /// When it committed, by Postgres's clock.
    pub commit_time: Timestamp,
}

/// What is known of a row before and after a change.
struct Images<'r> {
    new: Option<&'r [Datum<'r>]>,
    old: Option<&'r [Datum<'r>]>,
    /// Whether `old` is the whole row, or the columns of the replica identity only.
    old_is_full: bool,
}

impl<'r> Images<'r> {
    /// The old row, if it holds every column of the key.
    fn old_for(&self, key: &BoundKey) -> Option<&'r [Datum<'r>]> {
        self.old.filter(|_| self.old_is_full || key.in_identity)
    }
}

/// Adds the operations of one row change to the batch, and what else happened to `notes`.
pub fn change(
    table: &BoundTable,
    change: Change<'_>,
    transaction: Transaction,
    scratch: &mut Scratch,
    batch: &mut Batch,
    notes: &mut Vec<Note>,
) {
    let mut new = recycled(std::mem::take(&mut scratch.new));
    let mut old = recycled(std::mem::take(&mut scratch.old));
    let (has_new, old_tuple) = match change {
        Change::Insert { new: tuple } => (tuple.read_into(&mut new), None),
        Change::Update { old, new: tuple } => (tuple.read_into(&mut new), old),
        Change::Delete { old } => ((), Some(old)),
    };
    let () = has_new;
    let old_is_full = match old_tuple {
        Some(OldTuple::Full(tuple)) => {
            tuple.read_into(&mut old);
            true
        }
        Some(OldTuple::Key(tuple)) => {
            tuple.read_into(&mut old);
            false
        }
        None => false,
    };
    complete(&mut new, &old);
    let images = Images {
        new: (!matches!(change, Change::Delete { .. })).then_some(&new),
        old: old_tuple.is_some().then_some(&old),
        old_is_full,
    };
    for rule in &table.rules {
        if counts(rule, &change, &images, &table.relation) {
            let mut target = Target { rule: rule.rule, batch: &mut *batch, notes: &mut *notes, touched: false };
            apply_rule(rule, &images, &mut target, &mut scratch.random);
            if target.touched {
                batch.touch(rule.rule, transaction.commit_lsn, transaction.commit_time);
            }
        }
    }
    scratch.new = recycled(new);
    scratch.old = recycled(old);
}

/// Adds the deletion of every key that the table's rules own.
pub fn truncate(table: &BoundTable, transaction: Transaction, batch: &mut Batch) {
    for rule in table.rules.iter().filter(|rule| rule.on.delete) {
        let written = rule.write.iter().filter(|write| !write.keep_on_delete).map(|write| &write.key);
        for key in written.chain(&rule.delete) {
            batch.sweep(rule.rule, key.pattern().clone());
        }
        batch.touch(rule.rule, transaction.commit_lsn, transaction.commit_time);
    }
}

/// An old image holds what the log left out of the new one because it did not change.
fn complete<'r>(new: &mut [Datum<'r>], old: &[Datum<'r>]) {
    for (new, old) in new.iter_mut().zip(old) {
        if let (Datum::UnchangedToast, Datum::Text(_)) = (&new, old) {
            *new = *old;
        }
    }
}

/// Whether the rule obeys this change.
fn counts(rule: &BoundRule, change: &Change<'_>, images: &Images<'_>, relation: &Relation) -> bool {
    match change {
        Change::Insert { .. } => rule.on.insert,
        Change::Delete { .. } => rule.on.delete,
        Change::Update { .. } => {
            let changed = |columns: &Vec<usize>| columns.iter().any(|column| has_changed(*column, images, relation));
            rule.on.update && rule.changed.as_ref().is_none_or(changed)
        }
    }
}

/// Whether an UPDATE changed the column; where that is unknown it did.
fn has_changed(column: usize, images: &Images<'_>, relation: &Relation) -> bool {
    let new = images.new.and_then(|row| row.get(column));
    if new == Some(&Datum::UnchangedToast) {
        return false;
    }
    let in_identity = relation.columns.get(column).is_some_and(|column| column.identity);
    match images.old {
        Some(old) if images.old_is_full || in_identity => old.get(column) != new,
        Some(_) => true,
        // Without an old tuple the columns of the replica identity are as they were.
        None => !in_identity,
    }
}

/// Where one rule's operations on one row go.
struct Target<'b> {
    rule: u16,
    batch: &'b mut Batch,
    notes: &'b mut Vec<Note>,
    touched: bool,
}

impl Target<'_> {
    fn note(&mut self, what: Noted) {
        self.notes.push(Note { rule: self.rule, what });
    }

    /// The cell of the row's key, if it has one.
    fn cell(&mut self, key: &BoundKey, row: &[Datum<'_>]) -> Option<Cell> {
        let mut rendered = Rendered::Done;
        let cell = self.batch.cell(self.rule, |out| {
            rendered = key.render(row, out);
            rendered == Rendered::Done
        });
        match rendered {
            Rendered::Done => self.touched = true,
            Rendered::Null => self.note(Noted::Keyless),
            Rendered::Unknown => self.note(Noted::Unrendered(Unrendered::UnchangedToast)),
        }
        cell
    }

    fn delete(&mut self, key: &BoundKey, row: &[Datum<'_>]) {
        if let Some(cell) = self.cell(key, row) {
            self.batch.delete(cell);
        }
    }
}

fn apply_rule(rule: &BoundRule, images: &Images<'_>, target: &mut Target<'_>, random: &mut u64) {
    for key in &rule.delete {
        for row in [images.old_for(key), images.new].into_iter().flatten() {
            target.delete(key, row);
        }
    }
    let Some(write) = &rule.write else { return };
    let leaves_key = images.new.is_none() && write.keep_on_delete;
    if let Some(old) = images.old_for(&write.key).filter(|_| !leaves_key) {
        target.delete(&write.key, old);
    }
    if let Some(new) = images.new {
        put(write, new, target, random);
    }
}

fn put(write: &BoundWrite, row: &[Datum<'_>], target: &mut Target<'_>, random: &mut u64) {
    let Some(cell) = target.cell(&write.key, row) else { return };
    let ttl_ms = write.ttl.map(|(ttl, jitter)| jittered(ttl.as_millis(), jitter, random));
    let rendered = target.batch.set(cell, ttl_ms, write.present_only, |out| match &write.json {
        Some(fields) => render_json(fields, row, out),
        None => Err(Unrendered::ColumnGone),
    });
    if let Err(why) = rendered {
        target.note(Noted::Unrendered(why));
    }
}

/// The row as `row_to_json` shows it.
fn render_json(fields: &[JsonField], row: &[Datum<'_>], out: &mut Vec<u8>) -> Result<(), Unrendered> {
    let start = out.len();
    for field in fields {
        out.extend_from_slice(&field.lead);
        match row.get(field.column) {
            Some(Datum::Text(text)) if field.as_string => value::write_json_string(out, text)?,
            Some(Datum::Text(text)) => value::write_json(out, &field.json, text)?,
            Some(Datum::Null) => out.extend_from_slice(b"null"),
            Some(Datum::UnchangedToast) => return Err(Unrendered::UnchangedToast),
            None => return Err(Unrendered::ColumnGone),
        }
        if out.len() - start > VALUE_BYTES_MAX {
            return Err(Unrendered::TooLarge);
        }
    }
    out.push(b'}');
    Ok(())
}

/// The TTL shortened by a random share of at most `jitter`, so that keys written together do not expire together.
fn jittered(ttl_ms: u128, jitter: f64, random: &mut u64) -> u64 {
    let ttl_ms = u64::try_from(ttl_ms).unwrap_or(u64::MAX);
    // SplitMix64 (Steele, Lea, Flood 2014): enough for spreading, and a plan stays a function of its input.
    *random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *random;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let share = (mixed >> 11) as f64 / (1_u64 << 53) as f64;
    ttl_ms.saturating_sub((ttl_ms as f64 * jitter * share) as u64).max(1)
}

/// The same allocation for the data of another frame.
fn recycled<'a>(mut row: Vec<Datum<'_>>) -> Vec<Datum<'a>> {
    row.clear();
    row.into_iter().map(|_| Datum::Null).collect()
}
