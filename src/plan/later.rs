//! What a change does once whoever reads the tables sees it: `redelete`, `delete_tags`, `delete_match`, `bump`, `stream`, `publish`.
//!
//! It is planned with the change, into a batch of its own that waits until the change's transaction is visible.

use std::sync::Arc;

use crate::batch::{self, Batch, Cell, Form, Life};
use crate::config::{Redelete, TableName};
use crate::decode::value;
use crate::model::{Change, Datum, Lsn};
use crate::rules::bind::{BoundKey, BoundRule, BoundSettled, BoundStream, FieldSource, Rendered};
use crate::rules::lookup::{BoundLookup, Question};

use super::{BoundTable, Counting, Images, Transaction, VALUE_BYTES_MAX, sweep};

/// What is told where changes were missed.
pub const GAP: &str = "gap";

/// Adds what one rule does for a row change.
pub(super) fn change(
    rule: &BoundRule,
    change: &Change<'_>,
    counting: &Counting<'_, '_>,
    table: &BoundTable,
    transaction: Transaction,
    settled: &mut Batch,
) {
    if transaction.released && rule.refresh.is_none() {
        return;
    }
    let point = (transaction.epoch, transaction.commit_lsn);
    let (images, rows_of) = (counting.images, |key: &BoundKey| counting.rows(key.in_identity));
    if rule.redelete != Redelete::Off && !transaction.visible {
        for key in &rule.delete {
            rows_of(key).for_each(|row| delete(rule.rule, key, row, settled));
        }
    }
    stale_sets(rule, counting, settled);
    if let Some(lookup) = &rule.lookup {
        for row in counting.rows(lookup.in_identity) {
            match lookup.values(row) {
                Some(values) => settled.ask(Question { lookup: Arc::clone(lookup), values, generation: point }),
                // Which keys it would be is not known: all of them (I9).
                None => everything_looked_up(lookup, settled),
            }
        }
    }
    if let Some(refresh) = rule.refresh.as_ref().filter(|_| rule.lookup.is_none()) {
        for row in rows_of(&refresh.key) {
            match refresh.of(row) {
                Ok(stale) => settled.refresh(stale),
                // No such key.
                Err(Rendered::Null | Rendered::TooLarge) => {}
                // Which one it would be is not known: all of them (I9).
                Err(_) => sweep(rule.rule, &refresh.key, settled),
            }
        }
    }
    for key in &rule.settled.bump {
        rows_of(key).for_each(|row| bump(rule.rule, key, row, &generation(point), settled));
    }
    let (op, counts): (_, fn(&BoundStream) -> bool) = match change {
        Change::Insert { .. } => ("insert", |stream| stream.ops.insert),
        Change::Update { .. } => ("update", |stream| stream.ops.update),
        Change::Delete { .. } => ("delete", |stream| stream.ops.delete),
    };
    let told = Told { op, table, of: &rule.settled, transaction };
    if let Some(stream) = rule.settled.stream.as_ref().filter(|stream| counts(stream)) {
        // In the stream of the new row, or in that of the old one.
        if let Some(row) = rows_of(&stream.key).last() {
            let (before, after) = (images.old.map(|old| (old, images.old_is_full)), images.new);
            settled.append(
                rule.rule,
                stream.maxlen,
                |out| stream.key.render(row, out) == Rendered::Done,
                |out| {
                    told.entry(before, after, out);
                },
            );
        }
    }
    if let Some(channel) = &rule.settled.publish {
        let mut channels: Vec<Vec<u8>> = Vec::new();
        for row in rows_of(channel) {
            let mut name = Vec::new();
            if channel.render(row, &mut name) == Rendered::Done && !channels.contains(&name) {
                channels.push(name);
            }
        }
        let row = images.new.or(images.old);
        for name in channels {
            let target = |out: &mut Vec<u8>| {
                out.extend_from_slice(&name);
                true
            };
            settled.publish(rule.rule, target, |out| told.message(row, out));
        }
    }
}

/// Adds what one rule deletes once more, a while after the change is visible.
pub(super) fn again(rule: &BoundRule, images: &Images<'_>, batch: &mut Batch) {
    let counting = images.counting(rule.when.as_ref());
    for key in &rule.delete {
        counting.rows(key.in_identity).for_each(|row| delete(rule.rule, key, row, batch));
    }
    stale_sets(rule, &counting, batch);
}

/// The same where it may be anything that the rule can name.
pub fn everything_again(rule: &BoundRule, batch: &mut Batch) {
    rule.delete.iter().for_each(|key| sweep(rule.rule, key, batch));
    every_stale_set(rule, batch);
}

/// Keys that match, and tags, of the old row and the new one.
fn stale_sets(rule: &BoundRule, counting: &Counting<'_, '_>, settled: &mut Batch) {
    for matching in &rule.settled.delete_match {
        for glob in counting.rows(matching.in_identity()).map(|row| matching.render(row)) {
            match glob {
                Ok(glob) => settled.sweep_matching(glob),
                // No such keys.
                Err(Rendered::Null | Rendered::TooLarge) => {}
                // Which ones it would be is not known: all of them (I9).
                Err(_) => settled.sweep(matching.pattern.clone()),
            }
        }
    }
    for tag in &rule.settled.delete_tags {
        counting.rows(tag.in_identity).for_each(|row| delete_tag(tag, row, settled));
    }
}

fn every_stale_set(rule: &BoundRule, settled: &mut Batch) {
    for matching in &rule.settled.delete_match {
        settled.sweep(matching.pattern.clone());
    }
    rule.settled.delete_tags.iter().for_each(|tag| settled.sweep_tags(tag.pattern.clone()));
}

/// Adds what one rule does when all rows may have changed: by TRUNCATE, or unseen, in a gap.
pub fn everything(
    rule: &BoundRule,
    op: &'static str,
    table: &BoundTable,
    transaction: Transaction,
    settled: &mut Batch,
) {
    if transaction.released && rule.refresh.is_none() {
        return;
    }
    if rule.redelete != Redelete::Off && !transaction.visible {
        rule.delete.iter().for_each(|key| sweep(rule.rule, key, settled));
    }
    if let Some(refresh) = rule.refresh.as_ref().filter(|_| rule.lookup.is_none()) {
        // The one key that needs no parameter can still be read.
        let only = refresh.of(&[]);
        if op == GAP || only.is_err() {
            sweep(rule.rule, &refresh.key, settled);
        }
        only.into_iter().for_each(|stale| settled.refresh(stale));
    }
    every_stale_set(rule, settled);
    let point = (transaction.epoch, transaction.commit_lsn);
    let generation = match op {
        // Where the stream stands at a gap is where the next transaction may commit, or where it stood at the gap before.
        GAP => format!("{}-{}", generation(point), transaction.commit_time.unix_us()),
        _ => generation(point),
    };
    for key in &rule.settled.bump {
        match key.pattern.only_key() {
            Some(_) => bump(rule.rule, key, &[], &generation, settled),
            // Which generations there are is not known; one that is missing is no earlier one.
            None => sweep(rule.rule, key, settled),
        }
    }
    rule.lookup.iter().for_each(|lookup| everything_looked_up(lookup, settled));
    let told = Told { op, table, of: &rule.settled, transaction };
    // A gap can hold every operation.
    if let Some(stream) = rule.settled.stream.as_ref().filter(|stream| op == GAP || stream.ops.delete) {
        settled.append(
            rule.rule,
            stream.maxlen,
            |out| stream.key.render(&[], out) == Rendered::Done,
            |out| {
                told.entry(None, None, out);
            },
        );
    }
    if let Some(channel) = &rule.settled.publish {
        settled.publish(rule.rule, |out| channel.render(&[], out) == Rendered::Done, |out| told.message(None, out));
    }
}

/// Adds what a question's answer means: one row of it.
pub fn looked_up(ask: &Question, found: &[Option<&str>], settled: &mut Batch) {
    let (lookup, row) = (&ask.lookup, ask.row(found));
    match &lookup.refresh {
        // A column that is NULL names no key.
        Some(refresh) => refresh.of(&row).into_iter().for_each(|stale| settled.refresh(stale)),
        None => lookup.delete.iter().for_each(|key| delete(lookup.rule, key, &row, settled)),
    }
    lookup.delete_tags.iter().for_each(|tag| delete_tag(tag, &row, settled));
    let globs = lookup.delete_match.iter().filter_map(|matching| matching.render(&row).ok());
    globs.for_each(|glob| settled.sweep_matching(glob));
    lookup.bump.iter().for_each(|key| bump(lookup.rule, key, &row, &generation(ask.generation), settled));
}

/// Adds that everything goes that the lookup can have named: what it would say is not known. A generation that is missing
/// is no earlier one.
pub fn everything_looked_up(lookup: &BoundLookup, settled: &mut Batch) {
    lookup.patterns().for_each(|pattern| settled.sweep(pattern.clone()));
    lookup.delete_tags.iter().for_each(|tag| settled.sweep_tags(tag.pattern.clone()));
}

/// Where it is not known which tag it is, all of them go (I9).
fn delete_tag(tag: &BoundKey, row: &[Datum<'_>], settled: &mut Batch) {
    let mut name = Vec::new();
    match tag.render(row, &mut name) {
        Rendered::Done => settled.sweep_tag(name),
        Rendered::Null | Rendered::TooLarge => {}
        Rendered::Unknown => settled.sweep_tags(tag.pattern.clone()),
    }
}

fn delete(rule: u16, key: &BoundKey, row: &[Datum<'_>], settled: &mut Batch) {
    if let Some(cell) = cell(rule, key, row, settled) {
        settled.delete(cell);
    }
}

/// The row's key. Where the log has left out which one it is, all of them go (I9): a generation that is missing is no
/// earlier one.
fn cell(rule: u16, key: &BoundKey, row: &[Datum<'_>], settled: &mut Batch) -> Option<Cell> {
    let mut rendered = Rendered::Done;
    let cell = settled.cell(rule, |out| {
        rendered = key.render(row, out);
        rendered == Rendered::Done
    });
    if rendered == Rendered::Unknown {
        sweep(rule, key, settled);
    }
    cell
}

/// `epoch-LSN`: it never comes twice, whatever is lost.
fn generation((epoch, commit_lsn): (u64, Lsn)) -> String {
    format!("{epoch}-{:X}", commit_lsn.0)
}

fn bump(rule: u16, key: &BoundKey, row: &[Datum<'_>], generation: &str, settled: &mut Batch) {
    let Some(cell) = cell(rule, key, row, settled) else { return };
    let written = settled.set(cell, Form::String, Life::Forever, false, |out| {
        out.extend_from_slice(generation.as_bytes());
        Ok::<_, std::convert::Infallible>(())
    });
    let Ok(()) = written;
}

/// What is told of a change.
struct Told<'a> {
    op: &'static str,
    table: &'a BoundTable,
    of: &'a BoundSettled,
    transaction: Transaction,
}

impl Told<'_> {
    /// A stream's entry: `op table key before after epoch lsn ordinal ts`.
    fn entry(&self, before: Option<(&[Datum<'_>], bool)>, after: Option<&[Datum<'_>]>, out: &mut Vec<u8>) {
        let Transaction { commit_lsn, commit_time, ordinal, epoch, .. } = self.transaction;
        text(out, "op", self.op);
        text(out, "table", &TableName::from(&self.table.relation).to_string());
        if let Some(row) = after.or(before.map(|(row, _)| row)) {
            json(out, "key", |out| self.object(row, |place| self.of.identity.contains(&place), out));
        }
        if let Some((row, is_full)) = before {
            json(out, "before", |out| self.object(row, |place| is_full || self.of.identity.contains(&place), out));
        }
        if let Some(row) = after {
            json(out, "after", |out| self.object(row, |_| true, out));
        }
        text(out, "epoch", &epoch.to_string());
        text(out, "lsn", &commit_lsn.to_string());
        text(out, "ordinal", &ordinal.to_string());
        text(out, "ts", &(commit_time.unix_us() / 1000).to_string());
    }

    /// A message: JSON with `op`, `table`, `key` and `lsn`.
    fn message(&self, row: Option<&[Datum<'_>]>, out: &mut Vec<u8>) {
        let table = TableName::from(&self.table.relation).to_string();
        out.extend_from_slice(
            format!("{{\"op\":\"{}\",\"table\":{}", self.op, serde_json::Value::from(table)).as_bytes(),
        );
        if let Some(row) = row {
            out.extend_from_slice(b",\"key\":");
            self.object(row, |place| self.of.identity.contains(&place), out);
        }
        out.extend_from_slice(format!(",\"lsn\":\"{}\"}}", self.transaction.commit_lsn).as_bytes());
    }

    /// Some columns of a row as a JSON object; those that the log does not carry, or that are too large, are left out.
    fn object(&self, row: &[Datum<'_>], wanted: impl Fn(usize) -> bool, out: &mut Vec<u8>) {
        let start = out.len();
        out.push(b'{');
        let first = out.len();
        for field in &self.of.row {
            let FieldSource::Column { place, json, .. } = &field.source else { continue };
            let before = out.len();
            // The lead of each begins with a comma, which the first one has not.
            out.extend_from_slice(if before == first { &field.lead[1..] } else { &field.lead });
            let written = match row.get(*place).filter(|_| wanted(*place)) {
                Some(Datum::Text(text)) if out.len() - start + text.len() > VALUE_BYTES_MAX => false,
                Some(Datum::Text(text)) => value::write_json(out, json, text).is_ok(),
                Some(Datum::Null) => {
                    out.extend_from_slice(b"null");
                    true
                }
                Some(Datum::UnchangedToast) | None => false,
            };
            if !written {
                out.truncate(before);
            }
        }
        out.push(b'}');
    }
}

fn text(out: &mut Vec<u8>, name: &str, value: &str) {
    json(out, name, |out| out.extend_from_slice(value.as_bytes()));
}

fn json(out: &mut Vec<u8>, name: &str, write: impl FnOnce(&mut Vec<u8>)) {
    let written = batch::field(out, name.as_bytes(), |out| {
        write(out);
        Ok::<_, std::convert::Infallible>(())
    });
    let Ok(()) = written;
}
