//! Change + bound rules → cache operations; pure.
//!
//! Where the change does not carry enough for a right value, the key is deleted (I9). A key that the old image had and
//! the new one has not is deleted too; where both have the same key, the later operation on the cell wins.

use std::convert::Infallible;
use std::time::Duration;

use crate::batch::{self, Batch, Cell, CellHasher, CellId, Form, Life, Of};
use crate::decode::value::{self, ValueError};
use crate::model::{Change, Datum, Lsn, OldTuple, Relation, Timestamp};
use crate::rules::bind::{
    BoundKey, BoundLife, BoundMember, BoundRule, BoundTag, BoundValue, BoundWrite, FieldSource, HashField, JsonField,
    Rendered, TEXT_BYTES_MAX,
};
use crate::rules::expression::{self, BoundExpression, EvalError, Image, Operation, Truth, Unevaluated};

pub mod later;

/// The largest value that is written. Redis refuses bulk strings over 512 MB, and the byte budget must hold.
pub const VALUE_BYTES_MAX: usize = TEXT_BYTES_MAX;

/// A row whose TTL is this long has none: a million years. Redis counts no further than 2⁶³ ms from 1970.
const LIFE_MS_ENDLESS: u64 = 1_000_000 * 365 * 86_400_000;

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
    /// The log does not carry a TOASTed value that did not change: the key was deleted, until the row is read again.
    Incomplete(RowName),
    /// Which key it is, the log does not say: all that the template can have made were deleted.
    Swept,
}

/// The columns of a key and its member, by their places, and their values: they name one row. `None` is NULL.
pub type RowName = Vec<(usize, Option<Box<[u8]>>)>;

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
    /// An expression has no value.
    #[error(transparent)]
    Failed(#[from] EvalError),
    /// What the row says means that there is no key, or no member.
    #[error("the row has no value")]
    Absent,
}

impl From<Unevaluated> for Unrendered {
    fn from(why: Unevaluated) -> Self {
        match why {
            Unevaluated::Unknown => Unrendered::UnchangedToast,
            Unevaluated::Failed(error) => Unrendered::Failed(error),
        }
    }
}

impl Unrendered {
    /// A word for the metric.
    pub fn label(&self) -> &'static str {
        match self {
            Self::UnchangedToast => "unchanged_toast",
            Self::ColumnGone => "column_gone",
            Self::TooLarge => "too_large",
            Self::Invalid(_) => "invalid",
            Self::Failed(_) => "expression",
            Self::Absent => "absent",
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
    /// The cells that changes decide, noted while tables are read.
    pub touched: Option<Touched>,
}

/// Notes cells.
#[derive(Debug)]
pub struct Touched {
    /// Names them.
    pub hasher: CellHasher,
    /// Those of the last change.
    pub cells: Vec<CellId>,
}

/// The transaction that a change belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transaction {
    /// Where its commit record begins.
    pub commit_lsn: Lsn,
    /// When it committed, by Postgres's clock.
    pub commit_time: Timestamp,
    /// Which of its row changes this one is, as received and counted from 1.
    pub ordinal: u64,
    /// The history of slot and cache that it belongs to.
    pub epoch: u64,
    /// Whoever reads the tables sees it already.
    pub visible: bool,
    /// What waited until it is visible has gone out, in an earlier session: only keys may have to be read again still.
    pub released: bool,
}

/// What is known of a row before and after a change.
struct Images<'r> {
    new: Option<&'r [Datum<'r>]>,
    old: Option<&'r [Datum<'r>]>,
    /// Whether `old` is the whole row, or the columns of the replica identity only.
    old_is_full: bool,
    /// It is an UPDATE: without `old` the replica identity is what it was.
    is_update: bool,
}

impl<'r> Images<'r> {
    /// Which of them count.
    fn counting(&self, when: Option<&BoundExpression>) -> Counting<'_, 'r> {
        let (old, new) = when.map_or((true, Truth::True), |when| (self.old_counts(when), self.new_counts(when)));
        Counting { images: self, old, new }
    }

    /// Whether the old row counts: also where that is not known, and where the log says of it only that it was there.
    fn old_counts(&self, when: &BoundExpression) -> bool {
        let image = match self.old {
            Some(old) if self.old_is_full => Image::Full(old),
            Some(old) => Image::Key(old),
            None => return true,
        };
        truth(when, image) != Truth::False
    }

    /// Whether the new row counts.
    fn new_counts(&self, when: &BoundExpression) -> Truth {
        self.new.map_or(Truth::True, |new| truth(when, Image::Full(new)))
    }
}

/// Which rows of a change count for a rule.
struct Counting<'i, 'r> {
    images: &'i Images<'r>,
    old: bool,
    new: Truth,
}

impl<'r> Counting<'_, 'r> {
    /// The old row, if it holds what is wanted of it: that is `in_identity`, or all of it is there.
    fn old(&self, in_identity: bool) -> Option<&'r [Datum<'r>]> {
        self.images.old.filter(|_| self.old && (self.images.old_is_full || in_identity))
    }

    /// The rows that name what a rule makes stale, the old one first.
    fn rows(&self, in_identity: bool) -> impl DoubleEndedIterator<Item = &'r [Datum<'r>]> {
        let old = self.old(in_identity);
        // Where the old row may have counted and what it named is not known, it may be what the new one names.
        let stands_in = old.is_none() && self.old && self.images.is_update;
        let new = self.images.new.filter(|_| self.new != Truth::False || stands_in);
        [old, new].into_iter().flatten()
    }
}

fn truth(when: &BoundExpression, row: Image<'_>) -> Truth {
    when.truth(&expression::Images { row, old: Image::Absent, new: row, op: Operation::Insert })
}

/// Adds the operations of one row change to the batch, what is done once it is visible to `settled`, if that is still to be
/// done, and what else happened to `notes`.
pub fn change(
    table: &BoundTable,
    change: Change<'_>,
    transaction: Transaction,
    scratch: &mut Scratch,
    batch: &mut Batch,
    mut settled: Option<&mut Batch>,
    notes: &mut Vec<Note>,
) {
    with_images(change, scratch, |images, scratch| {
        for rule in &table.rules {
            let counts = counts(rule, &change, images, &table.relation);
            let moves = scratch.touched.is_some() && may_move(rule, &change);
            if !(counts || moves) {
                continue;
            }
            let counting = images.counting(rule.when.as_ref());
            let noted = scratch.touched.as_mut();
            let mut target = Target { rule: rule.rule, batch: &mut *batch, notes: &mut *notes, noted, touched: false };
            if counts {
                delete_stale(rule, &counting, &mut target);
            }
            if let Some(write) = &rule.write {
                follow(write, &counting, &mut target, &mut scratch.random);
            }
            if let (true, Some(settled)) = (counts, &mut settled) {
                later::change(rule, &change, &counting, table, transaction, settled);
            }
            if target.touched {
                batch.touch(rule.rule, transaction.commit_lsn, transaction.commit_time);
            }
        }
    });
}

/// Adds what one row change makes stale, of the rules that delete that once more so long after it is visible.
pub fn again(table: &BoundTable, change: Change<'_>, delay: Duration, scratch: &mut Scratch, batch: &mut Batch) {
    with_images(change, scratch, |images, _| {
        for rule in table.rules.iter().filter(|rule| rule.again_after() == Some(delay)) {
            if counts(rule, &change, images, &table.relation) {
                later::again(rule, images, batch);
            }
        }
    });
}

/// Reads the change into buffers that are kept.
fn with_images(change: Change<'_>, scratch: &mut Scratch, then: impl FnOnce(&Images<'_>, &mut Scratch)) {
    let mut new = recycled(std::mem::take(&mut scratch.new));
    let mut old = recycled(std::mem::take(&mut scratch.old));
    let (new_tuple, old_tuple) = change.images();
    if let Some(tuple) = new_tuple {
        tuple.read_into(&mut new);
    }
    if let Some(OldTuple::Full(tuple) | OldTuple::Key(tuple)) = old_tuple {
        tuple.read_into(&mut old);
    }
    complete(&mut new, &old);
    let images = Images {
        new: new_tuple.is_some().then_some(&new),
        old: old_tuple.is_some().then_some(&old),
        old_is_full: matches!(old_tuple, Some(OldTuple::Full(_))),
        is_update: matches!(change, Change::Update { .. }),
    };
    then(&images, scratch);
    scratch.new = recycled(new);
    scratch.old = recycled(old);
}

/// Adds the keys and values of a row as a read shows it: those of the rules that write.
pub fn row(table: &BoundTable, row: &[Datum<'_>], random: &mut u64, batch: &mut Batch, notes: &mut Vec<Note>) {
    for rule in &table.rules {
        if let Some(write) = &rule.write {
            let (batch, notes) = (&mut *batch, &mut *notes);
            let mut target = Target { rule: rule.rule, batch, notes, noted: None, touched: false };
            match rule.when.as_ref().map_or(Truth::True, |when| truth(when, Image::Full(row))) {
                Truth::True => put(write, row, &mut target, random),
                Truth::False => {}
                unclear => target.unclear(write, row, &unclear),
            }
        }
    }
}

/// Adds the deletion of every key that the table's rules own, and what is done once that is visible to `settled`.
pub fn truncate(table: &BoundTable, transaction: Transaction, batch: &mut Batch, mut settled: Option<&mut Batch>) {
    for rule in table.rules.iter().filter(|rule| rule.on.delete) {
        let written = rule.write.iter().filter(|write| !write.keep_on_delete).map(|write| &write.key);
        // What is read again is still the newest that anybody can have read.
        let deleted = rule.deletes().filter(|_| rule.refresh.is_none());
        written.chain(deleted).for_each(|key| sweep(rule.rule, key, batch));
        for (tag, write) in rule.write.iter().flat_map(|write| write.tags.iter().map(move |tag| (tag, write))) {
            batch.sweep_registered(rule.rule, tag.key.pattern.clone(), write.key.pattern.clone());
        }
        if let Some(settled) = &mut settled {
            later::everything(rule, "truncate", table, transaction, settled);
        }
        batch.touch(rule.rule, transaction.commit_lsn, transaction.commit_time);
    }
}

/// Adds the deletion of every key that the template can have made.
pub fn sweep(rule: u16, key: &BoundKey, batch: &mut Batch) {
    match key.pattern.only_key() {
        Some(key) => {
            let cell = batch.cell(rule, |out| {
                out.extend_from_slice(key);
                true
            });
            cell.into_iter().for_each(|cell| batch.delete(cell));
        }
        None => batch.sweep(key.pattern.clone()),
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

/// Whether the change can have moved a written row from a chunk still to come into one that was read: while tables are read,
/// what the rule writes follows each of them.
fn may_move(rule: &BoundRule, change: &Change<'_>) -> bool {
    matches!(change, Change::Update { .. }) && rule.on.update && rule.write.is_some()
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
    noted: Option<&'b mut Touched>,
    touched: bool,
}

impl Target<'_> {
    fn note(&mut self, what: Noted) {
        self.notes.push(Note { rule: self.rule, what });
    }

    /// The cell of the row's key, or of its member, if it has one.
    fn cell(&mut self, key: &BoundKey, member: Option<&BoundMember>, row: &[Datum<'_>]) -> Option<Cell> {
        let (cell, rendered) = self.rendered(key, member, row);
        match rendered {
            Rendered::Done => {}
            Rendered::Null => self.note(Noted::Keyless),
            Rendered::TooLarge => self.note(Noted::Unrendered(Unrendered::TooLarge)),
            // Which key it is, the log has left out: all of them (I9).
            Rendered::Unknown => {
                sweep(self.rule, key, self.batch);
                self.note(Noted::Swept);
            }
        }
        cell
    }

    /// The same, and why there is none.
    fn rendered(
        &mut self,
        key: &BoundKey,
        member: Option<&BoundMember>,
        row: &[Datum<'_>],
    ) -> (Option<Cell>, Rendered) {
        let mut rendered = Rendered::Done;
        let of = member.map_or(Of::Key, |member| member.of);
        let cell = self.batch.cell_of(self.rule, of, |out| {
            rendered = key.render(row, out);
            let key_end = out.len();
            if let (Rendered::Done, Some(member)) = (rendered, member) {
                rendered = member.text.render(row, out);
            }
            (rendered == Rendered::Done).then_some(key_end)
        });
        self.touched |= cell.is_some();
        if let (Some(noted), Some(cell)) = (&mut self.noted, cell) {
            let (key, member) = self.batch.key(cell);
            noted.cells.push(noted.hasher.cell(key, member));
        }
        (cell, rendered)
    }

    fn delete(&mut self, key: &BoundKey, member: Option<&BoundMember>, row: &[Datum<'_>]) {
        if let Some(cell) = self.cell(key, member, row) {
            self.batch.delete(cell);
        }
    }

    /// The key of the row is a member of this tag. Whether it is that of what the log left out is found out by reading
    /// the row again.
    fn tag(&mut self, tag: &BoundTag, write: &BoundWrite, row: &[Datum<'_>]) {
        let (cell, rendered) = self.rendered(&tag.key, Some(&tag.member), row);
        if let Some(cell) = cell {
            let Ok(()) = self.batch.set(cell, Form::String, Life::Forever, false, |_| Ok::<_, Infallible>(()));
        }
        if rendered == Rendered::Unknown {
            self.incomplete(write, row);
        }
    }

    /// The row is to be read again.
    fn incomplete(&mut self, write: &BoundWrite, row: &[Datum<'_>]) {
        let note = Note { rule: self.rule, what: Noted::Incomplete(name(write, row)) };
        if self.notes.last() != Some(&note) {
            self.notes.push(note);
        }
    }

    /// It is none, as far as its tag is known: one member more does no harm.
    fn untag(&mut self, tag: &BoundTag, row: &[Datum<'_>]) {
        if let (Some(cell), _) = self.rendered(&tag.key, Some(&tag.member), row) {
            self.batch.delete(cell);
        }
    }

    /// The row's key goes, or its member, and what it is a member of.
    fn leave(&mut self, write: &BoundWrite, row: &[Datum<'_>]) {
        self.delete(&write.key, write.member.as_ref(), row);
        write.tags.iter().for_each(|tag| self.untag(tag, row));
    }

    /// Whether the row has a key is not known: it goes (I9). Where no read will tell, it keeps its tags: an application may fill
    /// it.
    fn unclear(&mut self, write: &BoundWrite, row: &[Datum<'_>], why: &Truth) {
        if let Truth::Failed(error) = why {
            self.delete(&write.key, write.member.as_ref(), row);
            write.tags.iter().for_each(|tag| self.tag(tag, write, row));
            self.note(Noted::Unrendered(Unrendered::Failed(error.clone())));
        } else {
            self.leave(write, row);
            self.incomplete(write, row);
        }
    }
}

/// The keys that the rule deletes because of a row.
fn delete_stale(rule: &BoundRule, counting: &Counting<'_, '_>, target: &mut Target<'_>) {
    for key in rule.delete.iter().filter(|_| rule.refresh.is_none()) {
        counting.rows(key.in_identity).for_each(|row| target.delete(key, None, row));
    }
}

/// The key that the rule writes follows its row.
fn follow(write: &BoundWrite, counting: &Counting<'_, '_>, target: &mut Target<'_>, random: &mut u64) {
    let old_of = |key: &BoundKey, member: Option<&BoundMember>| {
        counting.old(key.in_identity && member.is_none_or(|member| member.text.in_identity))
    };
    let (images, member) = (counting.images, write.member.as_ref());
    let leaves_key = images.new.is_none() && write.keep_on_delete;
    if let Some(old) = old_of(&write.key, member).filter(|_| !leaves_key) {
        target.delete(&write.key, member, old);
    }
    for tag in &write.tags {
        if let Some(old) = old_of(&tag.key, Some(&tag.member)) {
            target.untag(tag, old);
        }
    }
    match (images.new, &counting.new) {
        (None, _) => {}
        (Some(new), Truth::True) => put(write, new, target, random),
        // It leaves the condition, if it was in it.
        (Some(new), Truth::False) if images.is_update && counting.old => target.leave(write, new),
        (Some(_), Truth::False) => {}
        (Some(new), unclear) => target.unclear(write, new, unclear),
    }
}

/// Writes the row's key, or adds its member.
fn put(write: &BoundWrite, row: &[Datum<'_>], target: &mut Target<'_>, random: &mut u64) {
    let Some(cell) = target.cell(&write.key, write.member.as_ref(), row) else { return };
    let life = match life(&write.life, row, random) {
        Ok(life) => life,
        Err(why) => return target.unrendered(cell, write, row, why),
    };
    let form = match &write.value {
        Some(BoundValue::Json(form, _)) => *form,
        Some(BoundValue::Hash(_)) => Form::Hash,
        _ => Form::String,
    };
    let rendered = target.batch.set(cell, form, life, write.present_only, |out| match &write.value {
        Some(value) => render(value, row, out),
        None => Err(Unrendered::ColumnGone),
    });
    match rendered {
        Ok(()) => write.tags.iter().for_each(|tag| target.tag(tag, write, row)),
        Err(why) => target.unrendered(cell, write, row, why),
    }
}

impl Target<'_> {
    /// There is no value: no key either. Where the row says what the key is, and not what it holds, it has its tags all the same:
    /// an application may fill it.
    fn unrendered(&mut self, cell: Cell, write: &BoundWrite, row: &[Datum<'_>], why: Unrendered) {
        self.batch.delete(cell);
        for tag in &write.tags {
            if why == Unrendered::Absent { self.untag(tag, row) } else { self.tag(tag, write, row) }
        }
        match why {
            Unrendered::UnchangedToast => self.incomplete(write, row),
            Unrendered::Absent => self.note(Noted::Keyless),
            why => self.note(Noted::Unrendered(why)),
        }
    }
}

/// The row, by the columns of its key and its member.
fn name(write: &BoundWrite, row: &[Datum<'_>]) -> RowName {
    let value = |place: usize| match row.get(place) {
        Some(Datum::Text(text)) => Some((*text).into()),
        _ => None,
    };
    let of_member = write.member.iter().flat_map(|member| member.text.columns());
    let mut places: Vec<usize> = write.key.columns().into_iter().chain(of_member).collect();
    places.sort_unstable();
    places.dedup();
    places.into_iter().map(|place| (place, value(place))).collect()
}

/// How long the row's key lives. A life that is over is no key.
fn life(life: &BoundLife, row: &[Datum<'_>], random: &mut u64) -> Result<Life, Unrendered> {
    let images = || expression::Images::of_row(row);
    match life {
        BoundLife::Forever => Ok(Life::Forever),
        BoundLife::Keep => Ok(Life::Keep),
        BoundLife::Ttl(ttl, jitter) => Ok(Life::Ms(jittered(ttl.as_millis(), *jitter, random))),
        BoundLife::OfRow(ttl, jitter) => match ttl.number(&images())? {
            None => Ok(Life::Forever),
            Some(seconds) => match (seconds.to_f64() * 1000.0) as u64 {
                0 => Err(Unrendered::Absent),
                LIFE_MS_ENDLESS.. => Ok(Life::Forever),
                ms => Ok(Life::Ms(jittered(u128::from(ms), *jitter, random))),
            },
        },
        BoundLife::Until(at) => match at.timestamp(&images())? {
            None => Ok(Life::Forever),
            Some(at) => match at.unix_us() / 1000 {
                ..=0 => Err(Unrendered::Absent),
                ms => Ok(Life::Until(ms.unsigned_abs())),
            },
        },
    }
}

fn render(value: &BoundValue, row: &[Datum<'_>], out: &mut Vec<u8>) -> Result<(), Unrendered> {
    match value {
        BoundValue::Json(_, fields) => render_json(fields, row, out),
        BoundValue::Hash(fields) => render_hash(fields, row, out),
        BoundValue::Nothing => Ok(()),
        BoundValue::Text(text) => match text.render(row, out) {
            Rendered::Done => Ok(()),
            Rendered::Null => Err(Unrendered::Absent),
            Rendered::TooLarge => Err(Unrendered::TooLarge),
            Rendered::Unknown => Err(Unrendered::UnchangedToast),
        },
        BoundValue::Score(score) => {
            let number = score.number(&expression::Images::of_row(row))?;
            // Redis has no place for NaN in an order.
            let score = number.map(|number| number.to_f64()).filter(|score| !score.is_nan());
            out.extend_from_slice(score_text(score.ok_or(Unrendered::Absent)?).as_bytes());
            Ok(())
        }
    }
}

/// A float as Redis reads and shows it: the shortest text that gives the same one.
fn score_text(score: f64) -> String {
    match score {
        f64::INFINITY => "inf".to_owned(),
        f64::NEG_INFINITY => "-inf".to_owned(),
        score => format!("{score:?}").trim_end_matches(".0").to_owned(),
    }
}

/// The row as `row_to_json` shows it.
fn render_json(fields: &[JsonField], row: &[Datum<'_>], out: &mut Vec<u8>) -> Result<(), Unrendered> {
    let start = out.len();
    for field in fields {
        out.extend_from_slice(&field.lead);
        match &field.source {
            FieldSource::Column { place, json, as_string } => match row.get(*place) {
                Some(Datum::Text(text)) if *as_string => value::write_json_string(out, text)?,
                Some(Datum::Text(text)) => value::write_json(out, json, text)?,
                Some(Datum::Null) => out.extend_from_slice(b"null"),
                Some(Datum::UnchangedToast) => return Err(Unrendered::UnchangedToast),
                None => return Err(Unrendered::ColumnGone),
            },
            FieldSource::Computed(computed) => computed.write_json(&expression::Images::of_row(row), out)?,
        }
        if out.len() - start > VALUE_BYTES_MAX {
            return Err(Unrendered::TooLarge);
        }
    }
    out.extend_from_slice(if fields.is_empty() { b"{}" } else { b"}" });
    Ok(())
}

/// The columns that are not NULL, in text form.
fn render_hash(fields: &[HashField], row: &[Datum<'_>], out: &mut Vec<u8>) -> Result<(), Unrendered> {
    let start = out.len();
    for field in fields {
        let before = out.len();
        let mut is_null = false;
        batch::field(out, &field.name, |out| match &field.source {
            FieldSource::Column { place, .. } => match row.get(*place) {
                Some(Datum::Text(text)) => {
                    out.extend_from_slice(text);
                    Ok(())
                }
                Some(Datum::Null) => {
                    is_null = true;
                    Ok(())
                }
                Some(Datum::UnchangedToast) => Err(Unrendered::UnchangedToast),
                None => Err(Unrendered::ColumnGone),
            },
            FieldSource::Computed(computed) => {
                is_null = !computed.write_text(&expression::Images::of_row(row), out)?;
                Ok(())
            }
        })?;
        if is_null {
            out.truncate(before);
        }
        if out.len() - start > VALUE_BYTES_MAX {
            return Err(Unrendered::TooLarge);
        }
    }
    Ok(())
}

/// The TTL shortened by a random share of at most `jitter`, so that keys written together do not expire together.
pub fn jittered(ttl_ms: u128, jitter: f64, random: &mut u64) -> u64 {
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
pub fn recycled<'a>(mut row: Vec<Datum<'_>>) -> Vec<Datum<'a>> {
    row.clear();
    row.into_iter().map(|_| Datum::Null).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::batch::{CacheOp, Limits};
    use crate::config::{self, RulesFile};
    use crate::decode::types::Types;
    use crate::model::{Column, ReplicaIdentity, Tuple};
    use crate::rules::bind::bind;

    const LIMITS: Limits = Limits { ops: 100, bytes: 10_000 };

    fn transaction() -> Transaction {
        Transaction {
            commit_lsn: Lsn(1),
            commit_time: Timestamp(0),
            ordinal: 1,
            epoch: 7,
            visible: false,
            released: false,
        }
    }

    /// One rule, named `row`, on `public.rows` with these text columns; all in the replica identity.
    pub(crate) fn bound(rule: &str, columns: &[&str]) -> BoundTable {
        bound_with(rule, columns, columns)
    }

    fn bound_with(rule: &str, columns: &[&str], identity: &[&str]) -> BoundTable {
        const TEXT: u32 = 25;
        let text = format!(
            "[postgres]\nurl = \"postgresql://db\"\n[redis]\nurl = \"redis://cache\"\nprefix = \"p:\"\n\
             [rule.row]\ntable = \"public.rows\"\n{rule}\n"
        );
        let file = RulesFile { path: "test.toml".into(), text };
        let (config, _) = config::parse(file, &|_| None).expect("a rules file");
        let column = |name: &&str| Column {
            name: (*name).to_owned(),
            type_oid: TEXT,
            type_modifier: -1,
            identity: identity.contains(name),
        };
        let full = identity.len() == columns.len();
        let relation = Relation {
            oid: 1,
            schema: "public".into(),
            name: "rows".into(),
            identity: if full { ReplicaIdentity::Full } else { ReplicaIdentity::Default },
            columns: columns.iter().map(column).collect(),
        };
        let rule = bind(&config.rules[0], 0, &relation, None, &Types::builtin(), "p:").expect("the rule fits");
        BoundTable { relation, rules: vec![rule] }
    }

    /// TupleData of text columns; `None` is NULL, `"~"` an unchanged TOASTed value.
    pub(crate) fn text_tuple(columns: &[Option<&str>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for column in columns {
            match column {
                None => bytes.push(b'n'),
                Some("~") => bytes.push(b'u'),
                Some(text) => {
                    bytes.push(b't');
                    bytes.extend_from_slice(&(text.len() as u32).to_be_bytes());
                    bytes.extend_from_slice(text.as_bytes());
                }
            }
        }
        bytes
    }

    /// Old and new image, as words: `-` is NULL, `~` unchanged TOAST. `old` may begin with `key:` for a key tuple.
    fn check(table: &BoundTable, old: Option<&str>, new: Option<&str>, expected: &str) {
        let encode = |row: &str| {
            let words: Vec<_> = row.split(' ').map(|word| Some(word).filter(|word| *word != "-")).collect();
            text_tuple(&words)
        };
        let key_only = old.is_some_and(|old| old.starts_with("key:"));
        let (old_bytes, new_bytes) = (old.map(|old| encode(old.trim_start_matches("key:"))), new.map(encode));
        let tuple = |bytes| Tuple { columns: table.relation.columns.len() as u16, bytes };
        let old_tuple = old_bytes.as_deref().map(|bytes| match key_only {
            true => OldTuple::Key(tuple(bytes)),
            false => OldTuple::Full(tuple(bytes)),
        });
        let change = match (old_tuple, new_bytes.as_deref()) {
            (Some(old), None) => Change::Delete { old },
            (None, Some(new)) if expected.starts_with("update ") => Change::Update { old: None, new: tuple(new) },
            (None, Some(new)) => Change::Insert { new: tuple(new) },
            (old, Some(new)) => Change::Update { old, new: tuple(new) },
            (None, None) => unreachable!("a change has an image"),
        };
        let mut batch = Batch::new(LIMITS, 1);
        let mut notes = Vec::new();
        super::change(table, change, transaction(), &mut Scratch::default(), &mut batch, None, &mut notes);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let ops = batch.ops().map(|(_, op)| match op {
            CacheOp::Set { key, value, .. } => format!("{}={}", text(key), text(value)),
            CacheOp::Delete { key } => format!("-{}", text(key)),
            CacheOp::Add { key, member, score } => {
                format!("{}+{}:{}", text(key), text(member), score.map(text).unwrap_or_default())
            }
            CacheOp::Remove { key, member, .. } => format!("{}-{}", text(key), text(member)),
        });
        let notes = notes.iter().map(|note| match &note.what {
            Noted::Keyless => "keyless".to_owned(),
            Noted::Unrendered(why) => why.label().to_owned(),
            Noted::Swept => format!("swept:{}", batch.sweeps().len()),
            Noted::Incomplete(name) => {
                let values = name.iter().map(|(place, value)| (place, value.as_deref().map(text)));
                format!("read-again:{:?}", values.collect::<Vec<_>>())
            }
        });
        let shown = ops.chain(notes).collect::<Vec<_>>().join(" ");
        assert_eq!(shown, expected.trim_start_matches("update "), "{old:?} → {new:?}");
    }

    #[test]
    fn a_row_is_a_key() {
        let table = bound_with("key = \"r:{id}\"\nvalue = \"json\"\ncolumns = [\"id\", \"v\"]", &["id", "v"], &["id"]);
        check(&table, None, Some("1 a"), r#"p:r:1={"id":"1","v":"a"}"#);
        check(&table, None, Some("1 -"), r#"p:r:1={"id":"1","v":null}"#);
        check(&table, None, Some("1 b"), r#"update p:r:1={"id":"1","v":"b"}"#);
        check(&table, Some("key:1 -"), Some("2 b"), r#"-p:r:1 p:r:2={"id":"2","v":"b"}"#);
        check(&table, Some("key:1 -"), None, "-p:r:1");
    }

    #[test]
    fn an_unchanged_toasted_value_comes_from_the_full_old_row_or_deletes_the_key() {
        let rule = "key = \"r:{id}\"\nvalue = \"json\"\ncolumns = [\"id\", \"v\"]";
        let narrow = bound_with(rule, &["id", "v"], &["id"]);
        check(&narrow, None, Some("1 ~"), r#"update -p:r:1 read-again:[(0, Some("1"))]"#);
        check(&narrow, Some("key:1 -"), Some("2 ~"), r#"-p:r:1 -p:r:2 read-again:[(0, Some("2"))]"#);
        let named = bound_with(
            "key = \"r:{id}\"\nvalue = \"json\"\ncolumns = [\"v\"]\non = [\"insert\", \"update\"]",
            &["id", "v"],
            &["v"],
        );
        check(&named, None, Some("~ 1"), "update swept:1");
        let stale = bound_with("delete = [\"r:{id}\"]\non = [\"insert\", \"update\"]", &["id", "v"], &["v"]);
        check(&stale, None, Some("~ 1"), "update swept:1");
        let full = bound(rule, &["id", "v"]);
        check(&full, Some("1 long"), Some("1 ~"), r#"p:r:1={"id":"1","v":"long"}"#);
        check(&full, Some("1 long"), Some("2 ~"), r#"-p:r:1 p:r:2={"id":"2","v":"long"}"#);
        let other = bound_with("key = \"r:{id}\"\nvalue = \"json\"\ncolumns = [\"id\"]", &["id", "v"], &["id"]);
        check(&other, None, Some("1 ~"), r#"update p:r:1={"id":"1"}"#);
    }

    #[test]
    fn a_null_in_the_key_is_no_key() {
        let rule = "key = \"r:{id}\"\nvalue = \"json\"\ncolumns = [\"v\"]";
        let table = bound(rule, &["id", "v"]);
        check(&table, None, Some("- a"), "keyless");
        check(&table, Some("1 a"), Some("- a"), "-p:r:1 keyless");
        check(&table, Some("- a"), Some("1 a"), r#"p:r:1={"v":"a"} keyless"#);
        let default = bound(&rule.replace("{id}", "{id?none}"), &["id", "v"]);
        check(&default, None, Some("- a"), r#"p:r:none={"v":"a"}"#);
    }

    #[test]
    fn delete_rules_name_the_keys_of_both_images() {
        let table = bound("delete = [\"list:{c}\", \"feed\"]", &["id", "c"]);
        check(&table, None, Some("1 a"), "-p:list:a -p:feed");
        check(&table, Some("1 a"), Some("1 b"), "-p:list:a -p:list:b -p:feed");
        check(&table, Some("1 a"), None, "-p:list:a -p:feed");
    }

    #[test]
    fn changed_skips_an_update_only_if_it_certainly_changed_nothing_that_counts() {
        let rule = "delete = [\"list:{c}\"]\nchanged = [\"v\"]";
        let full = bound(rule, &["id", "c", "v"]);
        check(&full, Some("1 a x"), Some("2 a x"), "");
        check(&full, Some("1 a x"), Some("1 a y"), "-p:list:a");
        check(&full, Some("1 a x"), Some("1 b x"), "-p:list:a -p:list:b");
        check(&full, Some("1 a x"), Some("1 a ~"), "");
        let narrow = bound_with(rule, &["id", "c", "v"], &["id", "c"]);
        check(&narrow, None, Some("1 a x"), "update -p:list:a");
        check(&narrow, None, Some("1 a ~"), "update ");
        check(&narrow, None, Some("1 a x"), "-p:list:a");
    }

    #[test]
    fn while_tables_are_read_only_what_is_written_follows_each_change() {
        let rule = "key = \"r:{id}\"\nvalue = \"json\"\ncolumns = [\"v\"]\ndelete = [\"list:{c}\"]\npublish = { channel = \"ch\" }\nchanged = [\"v\"]";
        let table = bound(rule, &["id", "c", "v"]);
        let row = text_tuple(&[Some("1"), Some("a"), Some("x")]);
        let tuple = Tuple { columns: 3, bytes: &row };
        let touched = Touched { hasher: CellHasher::default(), cells: Vec::new() };
        for (touched, written) in [(None, 0), (Some(touched), 1)] {
            let (mut batch, mut settled) = (Batch::new(LIMITS, 1), Batch::new(LIMITS, 1));
            let mut scratch = Scratch { touched, ..Scratch::default() };
            let change = Change::Update { old: Some(OldTuple::Full(tuple)), new: tuple };
            super::change(&table, change, transaction(), &mut scratch, &mut batch, Some(&mut settled), &mut Vec::new());
            assert_eq!((batch.len(), settled.is_empty()), (written, true));
        }
    }

    #[test]
    fn what_cannot_be_rendered_keeps_its_tags_because_an_application_may_fill_it() {
        let rule = "key = \"r:{id}\"\nvalue = \"json\"\ncolumns = [\"v\"]\nwrite = \"present\"\ntags = [\"t:{c}\"]\n";
        let columns = ["id", "c", "v"];
        let computed = bound(&(rule.to_owned() + "compute = { n = \"1 / int(row.v)\" }"), &columns);
        check(&computed, None, Some("1 a 0"), "-p:r:1 p:tag:t:a+r:1: expression");
        check(&computed, Some("1 a 0"), Some("1 b 0"), "-p:r:1 p:tag:t:a-r:1 p:tag:t:b+r:1: expression");
        check(&computed, Some("1 a 0"), None, "-p:r:1 p:tag:t:a-r:1");
        let conditional = bound(&(rule.to_owned() + "when = \"1 / int(row.v) > 0\""), &columns);
        check(&conditional, None, Some("1 a 0"), "-p:r:1 p:tag:t:a+r:1: expression");
        // What a read will tell.
        let toasted = bound_with(rule, &columns, &["id", "c"]);
        check(&toasted, None, Some("1 a ~"), r#"update -p:r:1 p:tag:t:a+r:1: read-again:[(0, Some("1"))]"#);
        // There is no key to be filled.
        let absent = bound(&(rule.to_owned() + "ttl = \"int(row.v)\""), &columns);
        check(&absent, None, Some("1 a 0"), "-p:r:1 p:tag:t:a-r:1 keyless");
    }

    #[test]
    fn what_an_unknown_old_row_may_have_named_goes_whichever_way_it_goes() {
        let rule = "delete = [\"list:{c}\"]\ndelete_match = [\"page:{c}:*\"]\ndelete_tags = [\"c:{c}\"]\nbump = [\"gen:{c}\"]\n\
                    when = \"row.v == 'in'\"\non = [\"insert\", \"update\"]";
        let table = bound_with(rule, &["id", "c", "v"], &["id"]);
        let (old, new) = (text_tuple(&[Some("1"), None, None]), text_tuple(&[Some("2"), Some("a"), Some("out")]));
        let tuple = |bytes| Tuple { columns: 3, bytes };
        for old in [None, Some(OldTuple::Key(tuple(&old)))] {
            let change = Change::Update { old, new: tuple(&new) };
            let (mut batch, mut settled) = (Batch::new(LIMITS, 1), Batch::new(LIMITS, 1));
            let mut scratch = Scratch::default();
            super::change(&table, change, transaction(), &mut scratch, &mut batch, Some(&mut settled), &mut Vec::new());
            let keys = |batch: &Batch| {
                let keys: Vec<String> =
                    batch.ops().map(|(_, op)| String::from_utf8_lossy(op.key()).into_owned()).collect();
                keys.join(" ")
            };
            assert_eq!((keys(&batch).as_str(), keys(&settled).as_str()), ("p:list:a", "p:list:a p:gen:a"));
            let swept: Vec<String> = settled.sweeps().iter().map(ToString::to_string).collect();
            assert_eq!(swept, ["p:page:a:*", "keys in p:tag:c:a"]);
        }
    }

    #[test]
    fn what_a_template_makes_of_a_large_value_is_too_large() {
        let table = bound("key = \"r:{id}\"\nvalue = \"string\"\ntemplate = \"{v}\"", &["id", "v"]);
        let large = "x".repeat(VALUE_BYTES_MAX + 1);
        check(&table, None, Some(&format!("1 {large}")), "-p:r:1 too_large");
        let table = bound("key = \"r:{v}\"\nvalue = \"string\"\ntemplate = \"{id}\"", &["id", "v"]);
        check(&table, None, Some(&format!("1 {large}")), "too_large");
    }

    #[test]
    fn operations_that_do_not_count_do_nothing() {
        let table = bound("key = \"r:{id}\"\nvalue = \"json\"\ncolumns = [\"id\"]\non = [\"insert\"]", &["id"]);
        check(&table, None, Some("1"), r#"p:r:1={"id":"1"}"#);
        check(&table, Some("1"), Some("2"), "");
        check(&table, Some("1"), None, "");
    }

    #[test]
    fn a_kept_key_outlives_its_row_but_not_its_name() {
        let rule = "key = \"r:{id}\"\nvalue = \"json\"\ncolumns = [\"id\"]\nttl = \"1h\"\non_delete = \"keep\"";
        let table = bound(rule, &["id"]);
        check(&table, Some("1"), None, "");
        check(&table, Some("1"), Some("2"), r#"-p:r:1 p:r:2={"id":"2"}"#);
    }

    #[test]
    fn jitter_only_shortens() {
        let mut random = 7;
        for _ in 0..1000 {
            assert!((50_001..=100_000).contains(&jittered(100_000, 0.5, &mut random)));
        }
        assert_eq!(jittered(100_000, 0.0, &mut random), 100_000);
        assert_eq!(jittered(0, 0.5, &mut random), 1, "Redis refuses a TTL of 0");
    }
}
