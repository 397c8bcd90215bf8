//! The operations that go out together: in a batch the last one per cell wins.
//!
//! Keys and values lie one behind the other in one buffer; a hash table over the keys finds the cell that a later
//! change of the same key overwrites. So a change allocates nothing once the buffers have grown to their limit,
//! and the buffers live on from batch to batch.

use std::hash::BuildHasher;
use std::ops::Range;

use hashbrown::{DefaultHashBuilder, HashTable};

use crate::model::{Lsn, Position, Timestamp};
use crate::rules::form::KeyForm;
use crate::rules::pattern::Pattern;

/// Transactions noted for the delay: changes of one and the same key add nothing else.
const COMMITS_MAX: usize = 65_536;

/// When a batch is full. It takes the whole of the change that fills it.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Cells.
    pub ops: usize,
    /// Bytes of keys and values.
    pub bytes: usize,
}

/// What becomes of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheOp<'a> {
    /// It gets this value.
    Set {
        /// The key, prefix included.
        key: &'a [u8],
        /// The value.
        value: &'a [u8],
        /// Its time to live in milliseconds; `None` is for ever.
        ttl_ms: Option<u64>,
        /// Only if the key exists.
        present_only: bool,
    },
    /// It goes.
    Delete {
        /// The key, prefix included.
        key: &'a [u8],
    },
}

/// Which cell it is: 128 bits of hash of its key. No two cells of any cache share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CellId(pub u128);

/// A set of cells.
pub type CellSet = hashbrown::HashSet<CellId, DefaultHashBuilder>;

/// Tells cells apart beyond the batch that they are in. Only ids of the same hasher, or a clone of it, compare.
#[derive(Clone, Debug, Default)]
pub struct CellHasher([DefaultHashBuilder; 2]);

impl CellHasher {
    /// The id of the cell of this key.
    pub fn cell(&self, key: &[u8]) -> CellId {
        let [high, low] = self.0.each_ref().map(|half| u128::from(half.hash_one(key)));
        CellId(high << 64 | low)
    }
}

impl<'a> CacheOp<'a> {
    /// The key, prefix included.
    pub fn key(&self) -> &'a [u8] {
        match self {
            CacheOp::Set { key, .. } | CacheOp::Delete { key } => key,
        }
    }
}

/// A key in a batch, to decide about.
#[derive(Clone, Copy, Debug)]
pub struct Cell(usize);

/// What becomes known of a rule's keys, for the record beside the checkpoint. It waits for a batch, and asks for none.
#[derive(Clone, Debug)]
pub enum Claim {
    /// From this batch on they look like this.
    Makes(Vec<KeyForm>),
    /// No key is left that looks like this, and that no present rule makes.
    Gone(Vec<KeyForm>),
}

#[derive(Clone, Debug)]
enum Decision {
    Set { value: Range<usize>, ttl_ms: Option<u64>, present_only: bool },
    Delete,
}

#[derive(Clone, Debug)]
struct Entry {
    key: Range<usize>,
    rule: u16,
    decision: Decision,
}

/// Operations, and how far the stream has come with them.
#[derive(Debug)]
pub struct Batch {
    limits: Limits,
    bytes: Vec<u8>,
    entries: Vec<Entry>,
    places: HashTable<usize>,
    hasher: DefaultHashBuilder,
    sweeps: Vec<Pattern>,
    claims: Vec<(u16, Claim)>,
    /// Per rule, the transaction that last touched it in this batch: each counts once for the delay.
    touched: Vec<Option<Lsn>>,
    commits: Vec<(u16, Timestamp)>,
    /// The transaction that touched any rule last.
    newest: Option<Lsn>,
    /// The position behind the last change taken in; `None` while nothing was.
    pub applied: Option<Position>,
    /// The commit LSN of the oldest transaction that is not behind this batch, or the end LSN of the newest that is.
    pub low: Lsn,
}

impl Batch {
    /// An empty batch for so many rules.
    pub fn new(limits: Limits, rules: usize) -> Self {
        Batch {
            limits,
            bytes: Vec::new(),
            entries: Vec::new(),
            places: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
            sweeps: Vec::new(),
            claims: Vec::new(),
            touched: vec![None; rules],
            commits: Vec::new(),
            newest: None,
            applied: None,
            low: Lsn::default(),
        }
    }

    /// Takes everything out; the buffers stay.
    pub fn clear(&mut self) {
        self.bytes.clear();
        // One oversized row must not be paid for in memory ever after.
        self.bytes.shrink_to(2 * self.limits.bytes);
        self.entries.clear();
        self.places.clear();
        self.sweeps.clear();
        self.claims.clear();
        self.touched.fill(None);
        self.commits.clear();
        self.newest = None;
        self.applied = None;
    }

    /// Whether there is nothing to do in Redis.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.sweeps.is_empty()
    }

    /// Whether it must go out before anything more is taken in.
    pub fn is_full(&self) -> bool {
        self.entries.len() >= self.limits.ops
            || self.bytes.len() >= self.limits.bytes
            || self.commits.len() >= COMMITS_MAX
            || !self.sweeps.is_empty()
    }

    /// How many cells it decides.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// How many bytes of keys and values it holds.
    pub fn byte_len(&self) -> usize {
        self.bytes.len()
    }

    /// The cell of the key that `render` appends; `None`, and nothing changed, if it says that there is no key.
    /// A new cell is a delete until [`Batch::set`] says otherwise.
    pub fn cell(&mut self, rule: u16, render: impl FnOnce(&mut Vec<u8>) -> bool) -> Option<Cell> {
        let start = self.bytes.len();
        if !render(&mut self.bytes) {
            self.bytes.truncate(start);
            return None;
        }
        let key = &self.bytes[start..];
        let hash = self.hasher.hash_one(key);
        let same = |place: &usize| &self.bytes[self.entries[*place].key.clone()] == key;
        if let Some(place) = self.places.find(hash, same) {
            self.bytes.truncate(start);
            return Some(Cell(*place));
        }
        let place = self.entries.len();
        self.entries.push(Entry { key: start..self.bytes.len(), rule, decision: Decision::Delete });
        let (bytes, entries, hasher) = (&self.bytes, &self.entries, &self.hasher);
        let hash_of = |place: &usize| hasher.hash_one(&bytes[entries[*place].key.clone()]);
        self.places.insert_unique(hash, place, hash_of);
        Some(Cell(place))
    }

    /// The cell's key.
    pub fn key(&self, cell: Cell) -> &[u8] {
        &self.bytes[self.entries[cell.0].key.clone()]
    }

    /// Takes out every cell that is not to be kept. Nothing may be added afterwards.
    pub fn retain(&mut self, mut keep: impl FnMut(u16, &[u8]) -> bool) {
        let bytes = &self.bytes;
        self.entries.retain(|entry| keep(entry.rule, &bytes[entry.key.clone()]));
        self.places.clear();
    }

    /// The cell's key goes.
    pub fn delete(&mut self, cell: Cell) {
        self.entries[cell.0].decision = Decision::Delete;
    }

    /// The cell's key gets the value that `render` appends. If it fails the key goes: when in doubt, invalidate.
    pub fn set<E>(
        &mut self,
        cell: Cell,
        ttl_ms: Option<u64>,
        present_only: bool,
        render: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        let start = self.bytes.len();
        let rendered = render(&mut self.bytes);
        let entry = &mut self.entries[cell.0];
        if rendered.is_ok() {
            entry.decision = Decision::Set { value: start..self.bytes.len(), ttl_ms, present_only };
        } else {
            entry.decision = Decision::Delete;
            self.bytes.truncate(start);
        }
        rendered
    }

    /// Every key of the rule that matches goes, whatever the batch said of it before; closes the batch.
    pub fn sweep(&mut self, rule: u16, pattern: Pattern) {
        let bytes = &self.bytes;
        let swept = |entry: &&mut Entry| entry.rule == rule && pattern.matches(&bytes[entry.key.clone()]);
        for entry in self.entries.iter_mut().filter(swept) {
            entry.decision = Decision::Delete;
        }
        self.sweeps.push(pattern);
    }

    /// The patterns whose keys go before the operations: these concern other rules' keys, or are deletes themselves.
    pub fn sweeps(&self) -> &[Pattern] {
        &self.sweeps
    }

    /// Something becomes known of a rule's keys.
    pub fn claim(&mut self, rule: u16, claim: Claim) {
        self.claims.push((rule, claim));
    }

    /// What the other batch was to say is said with this one.
    pub fn take_claims(&mut self, other: &mut Batch) {
        self.claims.append(&mut other.claims);
    }

    /// What became known, in order.
    pub fn claims(&self) -> &[(u16, Claim)] {
        &self.claims
    }

    /// The transaction that commits at `commit_lsn` and did so at `commit_time` has touched the rule.
    pub fn touch(&mut self, rule: u16, commit_lsn: Lsn, commit_time: Timestamp) {
        let last = &mut self.touched[usize::from(rule)];
        if *last != Some(commit_lsn) {
            *last = Some(commit_lsn);
            self.newest = *last;
            self.commits.push((rule, commit_time));
        }
    }

    /// Whether it holds anything of the transaction that commits at `commit_lsn`, the last one taken in.
    pub fn holds(&self, commit_lsn: Lsn) -> bool {
        self.newest == Some(commit_lsn)
    }

    /// For each transaction and rule that it touched: the rule, and when the transaction committed.
    pub fn commits(&self) -> &[(u16, Timestamp)] {
        &self.commits
    }

    /// The rule and the operation of each cell, in the order of first touch.
    pub fn ops(&self) -> impl Iterator<Item = (u16, CacheOp<'_>)> {
        self.entries.iter().map(|entry| {
            let key = &self.bytes[entry.key.clone()];
            let op = match &entry.decision {
                Decision::Delete => CacheOp::Delete { key },
                Decision::Set { value, ttl_ms, present_only } => CacheOp::Set {
                    key,
                    value: &self.bytes[value.clone()],
                    ttl_ms: *ttl_ms,
                    present_only: *present_only,
                },
            };
            (entry.rule, op)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { ops: 3, bytes: 64 };

    fn cell(batch: &mut Batch, key: &str) -> Cell {
        let rendered = batch.cell(0, |out| {
            out.extend_from_slice(key.as_bytes());
            true
        });
        rendered.expect("the key was rendered")
    }

    fn set(batch: &mut Batch, key: &str, value: &str) {
        let cell = cell(batch, key);
        let rendered = batch.set(cell, None, false, |out| {
            out.extend_from_slice(value.as_bytes());
            Ok::<_, ()>(())
        });
        rendered.expect("the value was rendered");
    }

    fn show(batch: &Batch) -> Vec<String> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let ops = batch.ops().map(|(_, op)| match op {
            CacheOp::Set { key, value, .. } => format!("{}={}", text(key), text(value)),
            CacheOp::Delete { key } => format!("-{}", text(key)),
        });
        ops.collect()
    }

    #[test]
    fn the_last_operation_of_a_cell_wins() {
        let mut batch = Batch::new(LIMITS, 1);
        set(&mut batch, "a", "1");
        set(&mut batch, "b", "1");
        let a = cell(&mut batch, "a");
        batch.delete(a);
        set(&mut batch, "b", "2");
        assert_eq!(show(&batch), ["-a", "b=2"]);
    }

    #[test]
    fn a_value_that_cannot_be_rendered_deletes_its_key() {
        let mut batch = Batch::new(LIMITS, 1);
        set(&mut batch, "a", "1");
        let a = cell(&mut batch, "a");
        let failed = batch.set(a, None, false, |out| {
            out.extend_from_slice(b"half");
            Err("too large")
        });
        assert_eq!(failed, Err("too large"));
        assert_eq!(show(&batch), ["-a"]);
        assert_eq!(batch.byte_len(), 2, "nothing half-written stays");
    }

    #[test]
    fn no_key_leaves_no_trace() {
        let mut batch = Batch::new(LIMITS, 1);
        let none = batch.cell(0, |out| {
            out.extend_from_slice(b"product:");
            false
        });
        assert!(none.is_none() && batch.is_empty() && batch.byte_len() == 0);
    }

    #[test]
    fn a_sweep_concerns_only_keys_that_match() {
        let mut batch = Batch::new(LIMITS, 1);
        set(&mut batch, "list:1", "1");
        set(&mut batch, "row:1", "1");
        batch.sweep(0, Pattern::beginning_with(b"list:"));
        assert_eq!(show(&batch), ["-list:1", "row:1=1"], "the same rule's other keys stay as they were decided");
    }

    #[test]
    fn what_is_not_kept_is_gone() {
        let mut batch = Batch::new(LIMITS, 1);
        for key in ["a", "b", "c"] {
            set(&mut batch, key, "1");
        }
        batch.retain(|_, key| key != b"b");
        assert_eq!(show(&batch), ["a=1", "c=1"]);
    }

    #[test]
    fn cells_are_told_apart_by_their_keys() {
        let hasher = CellHasher::default();
        assert_eq!(hasher.cell(b"a"), hasher.clone().cell(b"a"));
        assert_ne!(hasher.cell(b"a"), hasher.cell(b"b"));
        let CellId(id) = hasher.cell(b"a");
        assert_ne!(id >> 64, id & u128::from(u64::MAX), "two hashes, not one twice");
    }

    #[test]
    fn it_is_full_at_either_limit() {
        let mut batch = Batch::new(LIMITS, 1);
        for key in ["a", "b"] {
            set(&mut batch, key, "1");
        }
        assert!(!batch.is_full());
        set(&mut batch, "c", "1");
        assert!(batch.is_full());
        batch.clear();
        assert!(!batch.is_full() && batch.is_empty());
        set(&mut batch, "a", &"x".repeat(64));
        assert!(batch.is_full());
    }

    #[test]
    fn a_batch_that_only_coalesces_fills_too() {
        let mut batch = Batch::new(Limits { ops: 1000, bytes: 1 << 20 }, 1);
        for commit in 0..COMMITS_MAX {
            assert!(!batch.is_full(), "{commit}");
            let cell = cell(&mut batch, "feed");
            batch.delete(cell);
            batch.touch(0, Lsn(commit as u64), Timestamp(0));
        }
        assert!(batch.is_full());
    }

    #[test]
    fn a_transaction_counts_once_for_each_rule() {
        let mut batch = Batch::new(LIMITS, 2);
        for (rule, commit) in [(0, 10), (1, 10), (0, 10), (0, 20)] {
            batch.touch(rule, Lsn(commit), Timestamp(i64::from(rule)));
        }
        assert_eq!(batch.commits().len(), 3);
    }
}
