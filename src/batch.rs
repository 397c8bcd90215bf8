//! The operations that go out together: in a batch the last one per cell wins.
//!
//! A cell is a key, or a key and a member of the set or sorted set that it holds. Keys, members and values lie one behind
//! the other in one buffer; a hash table over the cells finds the one that a later change overwrites. So a change
//! allocates nothing once the buffers have grown to their limit, and the buffers live on from batch to batch.

use std::hash::BuildHasher;
use std::ops::Range;

use hashbrown::{DefaultHashBuilder, HashMap, HashTable};

use crate::model::{Lsn, Position, Timestamp};
use crate::rules::bind::Tagging;
use crate::rules::form::KeyForm;
use crate::rules::glob::Glob;
use crate::rules::lookup::{Question, Questions};
use crate::rules::pattern::Pattern;
use crate::rules::refresh::{Stale, StaleKeys};

use sweeps::Sweeps;

mod sweeps;

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

/// What becomes of one cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheOp<'a> {
    /// The key gets this value, whatever it held.
    Set {
        /// The key, prefix included.
        key: &'a [u8],
        /// The value, as `form` says.
        value: &'a [u8],
        /// What the key holds.
        form: Form,
        /// How long it lives.
        life: Life,
        /// Only if the key exists.
        present_only: bool,
    },
    /// The key goes.
    Delete {
        /// The key, prefix included.
        key: &'a [u8],
    },
    /// The set or sorted set gets this member.
    Add {
        /// The key, prefix included.
        key: &'a [u8],
        /// The member.
        member: &'a [u8],
        /// Its score, if it is a sorted set, as Redis reads a float.
        score: Option<&'a [u8]>,
    },
    /// The member goes.
    Remove {
        /// The key, prefix included.
        key: &'a [u8],
        /// The member.
        member: &'a [u8],
        /// Whether it is a sorted set.
        sorted: bool,
    },
}

/// What kind of value it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A string.
    String,
    /// A hash: see [`fields`].
    Hash,
    /// JSON, as the JSON data type of Redis keeps it.
    Json,
}

/// How long a key lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// Until it is deleted.
    Forever,
    /// So many milliseconds.
    Ms(u64),
    /// Until then: milliseconds since 1970.
    Until(u64),
    /// As long as before.
    Keep,
}

/// Appends a field of a [`Form::Hash`]; `write` appends its value.
pub fn field<E>(out: &mut Vec<u8>, name: &[u8], write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Result<(), E> {
    out.extend_from_slice(&(name.len() as u32).to_ne_bytes());
    out.extend_from_slice(name);
    let at = out.len();
    out.extend_from_slice(&[0; LEN_BYTES]);
    write(out)?;
    let len = (out.len() - at - LEN_BYTES) as u32;
    out[at..at + LEN_BYTES].copy_from_slice(&len.to_ne_bytes());
    Ok(())
}

/// How long the length before each name and value of a hash's field is.
const LEN_BYTES: usize = size_of::<u32>();

/// The fields of a [`Form::Hash`] and their values.
pub fn fields(mut value: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    std::iter::from_fn(move || {
        let mut part = || {
            let (len, rest) = value.split_first_chunk::<LEN_BYTES>()?;
            let (part, rest) = rest.split_at_checked(u32::from_ne_bytes(*len) as usize)?;
            value = rest;
            Some(part)
        };
        part().zip(part())
    })
}

/// Which cell it is: 128 bits of hash of its key and member. No two cells of any cache share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CellId(pub u128);

/// A set of cells.
pub type CellSet = hashbrown::HashSet<CellId, DefaultHashBuilder>;

/// Tells cells apart beyond the batch that they are in. Only ids of the same hasher, or a clone of it, compare.
#[derive(Clone, Debug, Default)]
pub struct CellHasher([DefaultHashBuilder; 2]);

impl CellHasher {
    /// The id of the cell of this key, or of this member in it.
    pub fn cell(&self, key: &[u8], member: Option<&[u8]>) -> CellId {
        let [high, low] = self.0.each_ref().map(|half| u128::from(half.hash_one((key, member))));
        CellId(high << 64 | low)
    }

    /// The id of the cell that the operation decides.
    pub fn of(&self, op: &CacheOp<'_>) -> CellId {
        self.cell(op.key(), op.member())
    }
}

impl<'a> CacheOp<'a> {
    /// The key, prefix included.
    pub fn key(&self) -> &'a [u8] {
        match self {
            CacheOp::Set { key, .. }
            | CacheOp::Delete { key }
            | CacheOp::Add { key, .. }
            | CacheOp::Remove { key, .. } => key,
        }
    }

    /// The same for another key.
    pub fn at(self, key: &'a [u8]) -> Self {
        match self {
            CacheOp::Set { value, form, life, present_only, .. } => {
                CacheOp::Set { key, value, form, life, present_only }
            }
            CacheOp::Delete { .. } => CacheOp::Delete { key },
            CacheOp::Add { member, score, .. } => CacheOp::Add { key, member, score },
            CacheOp::Remove { member, sorted, .. } => CacheOp::Remove { key, member, sorted },
        }
    }

    /// The member, if that is what it decides.
    pub fn member(&self) -> Option<&'a [u8]> {
        match self {
            CacheOp::Set { .. } | CacheOp::Delete { .. } => None,
            CacheOp::Add { member, .. } | CacheOp::Remove { member, .. } => Some(member),
        }
    }

    /// Whether it is there afterwards.
    pub fn puts(&self) -> bool {
        matches!(self, CacheOp::Set { .. } | CacheOp::Add { .. })
    }
}

/// Keys that go, whatever they are called exactly.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Sweep {
    /// All that a template can have made.
    Owned(Pattern),
    /// All that match what a rule's `delete_match` says of a row.
    Matching(Glob),
    /// The members of the set with this key, and the set.
    Tag(Box<[u8]>),
    /// Of each set that a tag's template can have made, these members.
    Tags(Pattern, Members),
}

/// Which members of a tag go.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Members {
    /// All, and their keys with them.
    All,
    /// Those that a rule put there: keys like these, as under the main prefix.
    Registered(Pattern),
    /// Those whose keys are gone.
    Stale,
}

impl Sweep {
    /// Whether the key is one of them, or one of the tags.
    pub fn matches(&self, key: &[u8]) -> bool {
        match self {
            Sweep::Owned(pattern) | Sweep::Tags(pattern, _) => pattern.matches(key),
            Sweep::Matching(glob) => glob.matches(key),
            Sweep::Tag(tag) => **tag == *key,
        }
    }

    /// Which members go, if it is about tags.
    pub fn members(&self) -> Option<&Members> {
        match self {
            Sweep::Owned(_) | Sweep::Matching(_) => None,
            Sweep::Tag(_) => Some(&Members::All),
            Sweep::Tags(_, members) => Some(members),
        }
    }

    /// What all of them begin with, `[redis] prefix` included.
    pub fn literal_prefix(&self) -> &[u8] {
        match self {
            Sweep::Owned(pattern) | Sweep::Tags(pattern, _) => pattern.literal_prefix(),
            Sweep::Matching(glob) => glob.literal_prefix(),
            Sweep::Tag(tag) => tag,
        }
    }

    /// The same keys under another prefix of `[redis]`; they are under one of `len` bytes.
    pub fn under(&self, prefix: &[u8], len: usize) -> Self {
        match self {
            Sweep::Owned(pattern) => Sweep::Owned(pattern.under(prefix)),
            Sweep::Matching(glob) => Sweep::Matching(glob.under(prefix, len)),
            Sweep::Tag(tag) => Sweep::Tag([prefix, &tag[len..]].concat().into()),
            Sweep::Tags(pattern, members) => Sweep::Tags(pattern.under(prefix), members.clone()),
        }
    }
}

impl std::fmt::Display for Sweep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Sweep::Owned(pattern) => pattern.fmt(f),
            Sweep::Matching(glob) => glob.fmt(f),
            Sweep::Tag(tag) => write!(f, "keys in {}", String::from_utf8_lossy(tag)),
            Sweep::Tags(pattern, Members::All) => write!(f, "keys in {pattern}"),
            Sweep::Tags(pattern, Members::Registered(keys)) => write!(f, "members {keys} of {pattern}"),
            Sweep::Tags(pattern, Members::Stale) => write!(f, "members of {pattern} that are gone"),
        }
    }
}

/// Something that is no state of a key: it happens each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect<'a> {
    /// PUBLISH
    Publish {
        /// The channel, prefix included.
        channel: &'a [u8],
        /// The message.
        message: &'a [u8],
    },
    /// XADD
    Append {
        /// The stream's key, prefix included.
        key: &'a [u8],
        /// About how many entries it keeps; `None` is all.
        maxlen: Option<u64>,
        /// Its fields: see [`fields`].
        entry: &'a [u8],
    },
}

impl<'a> Effect<'a> {
    /// The channel, or the key.
    pub fn target(&self) -> &'a [u8] {
        match self {
            Effect::Publish { channel: target, .. } | Effect::Append { key: target, .. } => target,
        }
    }
}

/// What a [`Cell`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// A key.
    Key,
    /// A member of a set.
    Set,
    /// A member of a sorted set.
    SortedSet,
    /// A member of a tag, which is a set that others put members in too.
    Tag,
}

/// Something in a batch to decide about.
#[derive(Clone, Copy, Debug)]
pub struct Cell(usize);

/// What becomes known of a rule's keys, for the record beside the checkpoint. It waits for a batch, and questions for none.
#[derive(Clone, Debug)]
pub enum Claim {
    /// From this batch on they look like this.
    Makes(Vec<KeyForm>),
    /// No key is left that looks like this, and that no present rule makes.
    Gone(Vec<KeyForm>),
    /// What a delete by tag leaves of them.
    Tags(Tagging),
}

/// A rule whose table is gone, and what its keys look like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vanished {
    /// The rule.
    pub rule: String,
    /// What its keys look like.
    pub forms: Vec<KeyForm>,
}

#[derive(Clone, Debug)]
enum Decision {
    /// It is there, with this value or score.
    Put { value: Range<usize>, form: Form, life: Life, present_only: bool },
    /// It is not there.
    Gone,
}

#[derive(Clone, Debug)]
struct Entry {
    /// Where key and member stand, and where the key ends.
    cell: Range<usize>,
    key_end: usize,
    of: Of,
    rule: u16,
    /// What was decided later says more of a key and its members.
    decided: u32,
    decision: Decision,
}

impl Entry {
    fn key<'b>(&self, bytes: &'b [u8]) -> &'b [u8] {
        &bytes[self.cell.start..self.key_end]
    }

    fn member<'b>(&self, bytes: &'b [u8]) -> Option<&'b [u8]> {
        (self.of != Of::Key).then(|| &bytes[self.key_end..self.cell.end])
    }

    fn op<'b>(&self, bytes: &'b [u8]) -> CacheOp<'b> {
        let key = self.key(bytes);
        match (self.member(bytes), &self.decision) {
            (None, Decision::Gone) => CacheOp::Delete { key },
            (None, Decision::Put { value, form, life, present_only }) => CacheOp::Set {
                key,
                value: &bytes[value.clone()],
                form: *form,
                life: *life,
                present_only: *present_only,
            },
            (Some(member), Decision::Gone) => CacheOp::Remove { key, member, sorted: self.of == Of::SortedSet },
            (Some(member), Decision::Put { value, .. }) => {
                let score = (self.of == Of::SortedSet).then(|| &bytes[value.clone()]);
                CacheOp::Add { key, member, score }
            }
        }
    }
}

#[derive(Clone, Debug)]
struct EffectEntry {
    rule: u16,
    target: Range<usize>,
    body: Range<usize>,
    /// `None` for PUBLISH.
    append: Option<Option<u64>>,
}

/// Operations, and how far the stream has come with them.
#[derive(Debug)]
pub struct Batch {
    limits: Limits,
    bytes: Vec<u8>,
    entries: Vec<Entry>,
    /// How many of them are members.
    members: usize,
    /// How many decisions were made.
    decided: u32,
    places: HashTable<usize>,
    hasher: DefaultHashBuilder,
    sweeps: Sweeps,
    effects: Vec<EffectEntry>,
    questions: Questions,
    stale: StaleKeys,
    claims: Vec<(u16, Claim)>,
    vanished: Vec<Vanished>,
    /// Per rule, the transaction that last touched it in this batch: each counts once for the delay.
    touched: Vec<Option<Lsn>>,
    commits: Vec<(u16, Timestamp)>,
    /// The transaction that touched any rule last.
    newest: Option<Lsn>,
    /// The position behind the last change taken in; `None` while nothing was.
    pub applied: Option<Position>,
    /// The commit LSN of the oldest transaction that is not behind this batch, or the end LSN of the newest that is.
    pub low: Lsn,
    /// Up to here what waited for its transactions to be visible has gone out with this batch or before; `None` is no further
    /// than before.
    pub released: Option<Position>,
}

impl Batch {
    /// An empty batch for so many rules.
    pub fn new(limits: Limits, rules: usize) -> Self {
        Batch {
            limits,
            bytes: Vec::new(),
            entries: Vec::new(),
            members: 0,
            decided: 0,
            places: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
            sweeps: Sweeps::default(),
            effects: Vec::new(),
            questions: Questions::default(),
            stale: StaleKeys::default(),
            claims: Vec::new(),
            vanished: Vec::new(),
            touched: vec![None; rules],
            commits: Vec::new(),
            newest: None,
            applied: None,
            low: Lsn::default(),
            released: None,
        }
    }

    /// Takes everything out; the buffers stay.
    pub fn clear(&mut self) {
        self.bytes.clear();
        // One oversized row must not be paid for in memory ever after.
        self.bytes.shrink_to(2 * self.limits.bytes);
        self.entries.clear();
        (self.members, self.decided) = (0, 0);
        self.places.clear();
        self.sweeps.clear();
        self.effects.clear();
        self.questions.take();
        self.stale.take();
        self.claims.clear();
        self.vanished.clear();
        self.touched.fill(None);
        self.commits.clear();
        self.newest = None;
        self.applied = None;
        self.released = None;
    }

    /// Whether there is nothing to do, in Redis or before.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.sweeps().is_empty() && self.effects.is_empty() && !self.asks()
    }

    /// Whether it must go out before anything more is taken in.
    pub fn is_full(&self) -> bool {
        self.is_large() || self.sweeps.closes()
    }

    /// Whether it holds as much as it may.
    pub fn is_large(&self) -> bool {
        self.entries.len() >= self.limits.ops
            || self.bytes.len() >= self.limits.bytes
            || self.commits.len() >= COMMITS_MAX
            || self.effects.len() >= self.limits.ops
            || self.questions.len() >= self.limits.ops
            || self.questions.byte_len() >= self.limits.bytes
            || self.stale.len() >= self.limits.ops
            || self.stale.byte_len() >= self.limits.bytes
            || self.sweeps.is_large(self.limits)
    }

    /// Whether it wants something of Postgres.
    fn asks(&self) -> bool {
        !(self.questions.is_empty() && self.stale.is_empty())
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
    /// A new cell is gone until [`Batch::set`] says otherwise.
    pub fn cell(&mut self, rule: u16, render: impl FnOnce(&mut Vec<u8>) -> bool) -> Option<Cell> {
        self.cell_of(rule, Of::Key, |out| render(out).then_some(out.len()))
    }

    /// The same for a key and a member behind it; `render` says where the key ends.
    pub fn cell_of(&mut self, rule: u16, of: Of, render: impl FnOnce(&mut Vec<u8>) -> Option<usize>) -> Option<Cell> {
        let start = self.bytes.len();
        let Some(key_end) = render(&mut self.bytes) else {
            self.bytes.truncate(start);
            return None;
        };
        let key_end = if of == Of::Key { self.bytes.len() } else { key_end };
        let (bytes, entries, hasher) = (&self.bytes, &self.entries, &self.hasher);
        let cell = &bytes[start..];
        let hash = hasher.hash_one(cell);
        let same = |place: &usize| {
            let entry = &entries[*place];
            &bytes[entry.cell.clone()] == cell
                && entry.key_end - entry.cell.start == key_end - start
                && (entry.of == Of::Key) == (of == Of::Key)
        };
        if let Some(place) = self.places.find(hash, same) {
            let place = *place;
            self.bytes.truncate(start);
            self.entries[place].of = of;
            return Some(Cell(place));
        }
        let place = self.entries.len();
        let cell = start..self.bytes.len();
        self.members += usize::from(of != Of::Key);
        self.entries.push(Entry { cell, key_end, of, rule, decided: self.decided, decision: Decision::Gone });
        let (bytes, entries, hasher) = (&self.bytes, &self.entries, &self.hasher);
        let hash_of = |place: &usize| hasher.hash_one(&bytes[entries[*place].cell.clone()]);
        self.places.insert_unique(hash, place, hash_of);
        Some(Cell(place))
    }

    /// The cell's key, and its member.
    pub fn key(&self, cell: Cell) -> (&[u8], Option<&[u8]>) {
        let entry = &self.entries[cell.0];
        (entry.key(&self.bytes), entry.member(&self.bytes))
    }

    /// Takes out every cell that is not to be kept. Nothing may be added afterwards.
    pub fn retain(&mut self, mut keep: impl FnMut(u16, &CacheOp<'_>) -> bool) {
        let bytes = &self.bytes;
        self.entries.retain(|entry| keep(entry.rule, &entry.op(bytes)));
        self.places.clear();
    }

    /// The cell's key, or member, goes.
    pub fn delete(&mut self, cell: Cell) {
        self.decide(cell, Decision::Gone);
    }

    fn decide(&mut self, cell: Cell, decision: Decision) {
        self.decided += 1;
        let entry = &mut self.entries[cell.0];
        (entry.decision, entry.decided) = (decision, self.decided);
    }

    /// The cell's key gets the value, or its member the score, that `render` appends. If it fails the key or member goes:
    /// when in doubt, invalidate.
    pub fn set<E>(
        &mut self,
        cell: Cell,
        form: Form,
        life: Life,
        present_only: bool,
        render: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        let start = self.bytes.len();
        let rendered = render(&mut self.bytes);
        if rendered.is_ok() {
            let value = start..self.bytes.len();
            self.decide(cell, Decision::Put { value, form, life, present_only });
        } else {
            self.decide(cell, Decision::Gone);
            self.bytes.truncate(start);
        }
        rendered
    }

    /// Every key that matches goes, whatever the batch said of it before; closes the batch.
    pub fn sweep(&mut self, pattern: Pattern) {
        let bytes = &self.bytes;
        let swept = |entry: &&mut Entry| pattern.matches(entry.key(bytes));
        for entry in self.entries.iter_mut().filter(swept) {
            entry.decision = Decision::Gone;
        }
        self.sweeps.add(Sweep::Owned(pattern));
    }

    /// Every key of a rule that is no more goes, and every key with a tag of it.
    pub fn sweep_vanished(&mut self, vanished: Vanished, prefix: &str) {
        for form in &vanished.forms {
            let pattern = form.pattern(prefix);
            self.sweeps.add(if form.is_tag() { Sweep::Tags(pattern, Members::All) } else { Sweep::Owned(pattern) });
        }
        self.vanished.push(vanished);
    }

    /// The rules of which no key is left after the sweeps.
    pub fn vanished(&self) -> &[Vanished] {
        &self.vanished
    }

    /// Every key that matches goes; no rule writes any.
    pub fn sweep_matching(&mut self, glob: Glob) {
        self.sweeps.add(Sweep::Matching(glob));
    }

    /// The keys of all members of a tag go, and the tag.
    pub fn sweep_tag(&mut self, tag: Vec<u8>) {
        self.sweeps.add(Sweep::Tag(tag.into()));
    }

    /// The same for every tag like these.
    pub fn sweep_tags(&mut self, tags: Pattern) {
        self.sweeps.add(Sweep::Tags(tags, Members::All));
    }

    /// No key of the rule is a member of such tags, whatever the batch said of it before; closes the batch.
    pub fn sweep_registered(&mut self, rule: u16, tags: Pattern, keys: Pattern) {
        for entry in self.entries.iter_mut().filter(|entry| entry.rule == rule && entry.of == Of::Tag) {
            entry.decision = Decision::Gone;
        }
        self.sweeps.add(Sweep::Tags(tags, Members::Registered(keys)));
    }

    /// Members of such tags whose keys are gone, go.
    pub fn sweep_stale(&mut self, tags: Pattern) {
        self.sweeps.add(Sweep::Tags(tags, Members::Stale));
    }

    /// The keys that go before the operations: these concern other rules' keys, or are deletes themselves.
    pub fn sweeps(&self) -> &[Sweep] {
        self.sweeps.all()
    }

    /// Whether all keys of Redis are gone through for them.
    pub fn searches(&self) -> bool {
        self.sweeps.searches()
    }

    /// What else goes is not known before this is answered: a batch that holds questions waits for the answers.
    pub fn ask(&mut self, ask: Question) {
        self.questions.add(ask);
    }

    /// The questions.
    pub fn questions(&self) -> &Questions {
        &self.questions
    }

    /// Takes the questions out, for whoever answers them.
    pub fn take_questions(&mut self) -> Vec<Question> {
        self.questions.take()
    }

    /// The key is to be read again. It waits with the batch, and goes out with none.
    pub fn refresh(&mut self, stale: Stale) {
        self.stale.add(stale);
    }

    /// The keys to be read again.
    pub fn stale(&self) -> &StaleKeys {
        &self.stale
    }

    /// Takes them out, for whoever reads them.
    pub fn take_stale(&mut self) -> Vec<Stale> {
        self.stale.take()
    }

    /// Publishes what `render` appends on the channel that `target` appends, unless that says that there is none.
    pub fn publish(&mut self, rule: u16, target: impl FnOnce(&mut Vec<u8>) -> bool, render: impl FnOnce(&mut Vec<u8>)) {
        self.effect(rule, None, target, render);
    }

    /// The same for an entry of a stream: `render` appends its [`field`]s.
    pub fn append(
        &mut self,
        rule: u16,
        maxlen: Option<u64>,
        target: impl FnOnce(&mut Vec<u8>) -> bool,
        render: impl FnOnce(&mut Vec<u8>),
    ) {
        self.effect(rule, Some(maxlen), target, render);
    }

    fn effect(
        &mut self,
        rule: u16,
        append: Option<Option<u64>>,
        target: impl FnOnce(&mut Vec<u8>) -> bool,
        render: impl FnOnce(&mut Vec<u8>),
    ) {
        let start = self.bytes.len();
        if !target(&mut self.bytes) {
            self.bytes.truncate(start);
            return;
        }
        let target = start..self.bytes.len();
        render(&mut self.bytes);
        self.effects.push(EffectEntry { rule, body: target.end..self.bytes.len(), target, append });
    }

    /// The rules that something happens for.
    pub fn telling(&self) -> impl Iterator<Item = u16> {
        self.effects.iter().map(|effect| effect.rule)
    }

    /// What happens behind the operations, in order.
    pub fn effects(&self) -> impl ExactSizeIterator<Item = Effect<'_>> {
        self.effects.iter().map(|effect| {
            let (target, body) = (&self.bytes[effect.target.clone()], &self.bytes[effect.body.clone()]);
            match effect.append {
                None => Effect::Publish { channel: target, message: body },
                Some(maxlen) => Effect::Append { key: target, maxlen, entry: body },
            }
        })
    }

    /// Takes over what the other one does: its operations are the later ones.
    pub fn absorb(&mut self, other: &Batch) {
        let (bytes, swept) = (&self.bytes, other.sweeps().iter().filter(|sweep| matches!(sweep, Sweep::Owned(_))));
        for sweep in swept {
            let matching = |entry: &&mut Entry| sweep.matches(entry.key(bytes));
            self.entries.iter_mut().filter(matching).for_each(|entry| entry.decision = Decision::Gone);
        }
        for entry in &other.entries {
            let bytes = &other.bytes;
            let cell = self.cell_of(entry.rule, entry.of, |out| {
                out.extend_from_slice(&bytes[entry.cell.clone()]);
                Some(out.len() - (entry.cell.end - entry.key_end))
            });
            let Some(cell) = cell else { continue };
            match &entry.decision {
                Decision::Gone => self.delete(cell),
                Decision::Put { value, form, life, present_only } => {
                    let copied = self.set(cell, *form, *life, *present_only, |out| {
                        out.extend_from_slice(&bytes[value.clone()]);
                        Ok::<_, std::convert::Infallible>(())
                    });
                    let Ok(()) = copied;
                }
            }
        }
        other.sweeps().iter().for_each(|sweep| self.sweeps.add(sweep.clone()));
        other.stale.iter().for_each(|stale| self.refresh(stale.clone()));
        for effect in &other.effects {
            let (target, body) = (&other.bytes[effect.target.clone()], &other.bytes[effect.body.clone()]);
            let copy = |out: &mut Vec<u8>| out.extend_from_slice(body);
            self.effect(
                effect.rule,
                effect.append,
                |out| {
                    out.extend_from_slice(target);
                    true
                },
                copy,
            );
        }
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

    /// The rule and the operation of each cell, in the order of first touch. What was decided of a member before its whole
    /// key was deleted is left out: the key goes first.
    pub fn ops(&self) -> impl Iterator<Item = (u16, CacheOp<'_>)> {
        let deleted = self.deleted_keys();
        let superseded = move |entry: &Entry| {
            let of_key = deleted.get(entry.key(&self.bytes)).filter(|_| entry.of != Of::Key);
            of_key.is_some_and(|decided| *decided > entry.decided)
        };
        let entries = self.entries.iter().filter(move |entry| !superseded(entry));
        entries.map(|entry| (entry.rule, entry.op(&self.bytes)))
    }

    /// The keys that may hold something wrong where nothing can be written. Tags are not among them: others have a part in
    /// them.
    pub fn keys_in_doubt(&self) -> impl Iterator<Item = &[u8]> {
        self.entries.iter().filter(|entry| entry.of != Of::Tag).map(|entry| entry.key(&self.bytes))
    }

    /// The rules of which a key is a member of a tag no more.
    pub fn untagging(&self) -> impl Iterator<Item = u16> {
        let gone = |entry: &&Entry| entry.of == Of::Tag && matches!(entry.decision, Decision::Gone);
        self.entries.iter().filter(gone).map(|entry| entry.rule)
    }

    /// The keys that go as a whole, and when that was decided; empty where there are no members.
    fn deleted_keys(&self) -> HashMap<&[u8], u32, DefaultHashBuilder> {
        if self.members == 0 {
            return HashMap::default();
        }
        let wholly = |entry: &&Entry| entry.of == Of::Key && matches!(entry.decision, Decision::Gone);
        let entries = self.entries.iter().filter(wholly);
        entries.map(|entry| (entry.key(&self.bytes), entry.decided)).collect()
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
        let rendered = batch.set(cell, Form::String, Life::Forever, false, |out| {
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
            CacheOp::Add { key, member, score: None } => format!("{}+{}", text(key), text(member)),
            CacheOp::Add { key, member, score: Some(score) } => {
                format!("{}+{}:{}", text(key), text(member), text(score))
            }
            CacheOp::Remove { key, member, .. } => format!("{}-{}", text(key), text(member)),
        });
        ops.collect()
    }

    fn member(batch: &mut Batch, key: &str, member: &str, of: Of) -> Cell {
        let cell = batch.cell_of(0, of, |out| {
            out.extend_from_slice(key.as_bytes());
            let key_end = out.len();
            out.extend_from_slice(member.as_bytes());
            Some(key_end)
        });
        cell.expect("it was rendered")
    }

    fn add(batch: &mut Batch, key: &str, name: &str, score: &str) {
        let cell = member(batch, key, name, if score.is_empty() { Of::Set } else { Of::SortedSet });
        let added = batch.set(cell, Form::String, Life::Forever, false, |out| {
            out.extend_from_slice(score.as_bytes());
            Ok::<_, ()>(())
        });
        added.expect("it was rendered");
    }

    #[test]
    fn members_are_cells_of_their_own() {
        let mut batch = Batch::new(Limits { ops: 10, bytes: 1000 }, 1);
        add(&mut batch, "a", "bc", "");
        add(&mut batch, "ab", "c", "");
        set(&mut batch, "abc", "1");
        add(&mut batch, "z", "m", "1.5");
        let gone = member(&mut batch, "a", "bc", Of::Set);
        batch.delete(gone);
        assert_eq!(show(&batch), ["a-bc", "ab+c", "abc=1", "z+m:1.5"], "told apart by where the key ends");
    }

    #[test]
    fn a_key_that_goes_takes_what_its_members_were_before() {
        let mut batch = Batch::new(Limits { ops: 10, bytes: 1000 }, 1);
        add(&mut batch, "a", "1", "");
        add(&mut batch, "b", "1", "");
        let key = cell(&mut batch, "a");
        batch.delete(key);
        add(&mut batch, "a", "2", "");
        assert_eq!(show(&batch), ["b+1", "-a", "a+2"]);
        batch.delete(key);
        assert_eq!(show(&batch), ["b+1", "-a"]);
    }

    #[test]
    fn fields_come_out_as_they_went_in() {
        let mut value = Vec::new();
        for (name, text) in [("a", "1"), ("", ""), ("b", "x=y")] {
            let written = field(&mut value, name.as_bytes(), |out| {
                out.extend_from_slice(text.as_bytes());
                Ok::<_, ()>(())
            });
            written.expect("it was rendered");
        }
        let read: Vec<(&[u8], &[u8])> = fields(&value).collect();
        assert_eq!(read, [(&b"a"[..], &b"1"[..]), (b"", b""), (b"b", b"x=y")]);
        assert_eq!(fields(&value[..value.len() - 1]).count(), 2, "never a part of one");
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
        let failed = batch.set(a, Form::String, Life::Forever, false, |out| {
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
        let of_another = batch.cell(1, |out| {
            out.extend_from_slice(b"list:2");
            true
        });
        let written = batch
            .set(of_another.expect("the key was rendered"), Form::String, Life::Forever, false, |_| Ok::<_, ()>(()));
        written.expect("the value was rendered");
        batch.sweep(Pattern::beginning_with(b"list:"));
        assert_eq!(
            show(&batch),
            ["-list:1", "row:1=1", "-list:2"],
            "whoever wrote them; others stay as they were decided"
        );
    }

    #[test]
    fn what_is_absorbed_comes_later_its_sweeps_too() {
        let (mut first, mut later) = (Batch::new(LIMITS, 1), Batch::new(LIMITS, 1));
        set(&mut first, "gen:1", "1");
        set(&mut first, "gen:2", "1");
        later.sweep(Pattern::beginning_with(b"gen:"));
        set(&mut later, "gen:2", "2");
        first.absorb(&later);
        assert_eq!(show(&first), ["-gen:1", "gen:2=2"]);
    }

    #[test]
    fn a_sweep_that_comes_again_is_one_and_concerns_what_came_meanwhile() {
        let (mut first, mut later) = (Batch::new(LIMITS, 1), Batch::new(LIMITS, 1));
        let truncate = |batch: &mut Batch| {
            set(batch, "list:1", "1");
            batch.sweep(Pattern::beginning_with(b"list:"));
            batch.sweep_tags(Pattern::beginning_with(b"tag:"));
        };
        truncate(&mut first);
        (0..2).for_each(|_| truncate(&mut later));
        first.absorb(&later);
        assert_eq!((show(&first), first.sweeps().len()), (vec!["-list:1".to_owned()], 2));
    }

    #[test]
    fn what_is_not_kept_is_gone() {
        let mut batch = Batch::new(LIMITS, 1);
        for key in ["a", "b", "c"] {
            set(&mut batch, key, "1");
        }
        batch.retain(|_, op| op.key() != b"b");
        assert_eq!(show(&batch), ["a=1", "c=1"]);
    }

    #[test]
    fn cells_are_told_apart_by_their_keys() {
        let hasher = CellHasher::default();
        assert_eq!(hasher.cell(b"a", None), hasher.clone().cell(b"a", None));
        assert_ne!(hasher.cell(b"a", None), hasher.cell(b"b", None));
        assert_ne!(hasher.cell(b"ab", None), hasher.cell(b"a", Some(b"b")));
        let CellId(id) = hasher.cell(b"a", None);
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
