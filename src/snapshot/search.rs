//! The search for keys that no row renders: which Redis holds, and which of them a row or the stream speaks for.
//!
//! Redis goes through its keys while Postgres goes through its rows, so either may come to a cell first. What is left in the
//! end, held by Redis and spoken for by nobody, are orphans.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hashbrown::HashTable;

use crate::batch::{self, Batch, CellHasher, CellId};
use crate::cache::claims::Former;
use crate::cache::scan::{Members, Scan};
use crate::config::RedisConfig;
use crate::error::Result;
use crate::rules::pattern::Pattern;

/// A part of all cells: where there are too many to be kept at a time, they are searched part by part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    number: u64,
    of: u64,
}

impl Part {
    /// All of so many parts, at least one.
    pub fn all(of: u64) -> impl Iterator<Item = Part> {
        let of = of.max(1);
        (0..of).map(move |number| Part { number, of })
    }

    /// Whether no part comes before it.
    pub fn is_first(self) -> bool {
        self.number == 0
    }

    /// By the half of the id that [`Search`] does not keep.
    fn has(self, cell: CellId) -> bool {
        (cell.0 >> 64) as u64 % self.of == self.number
    }
}

/// What is known of the cells of one part: 9 bytes each, and as much again while the table grows.
///
/// Of an id 62 bits are kept. Should two cells share them, an orphan can look alive, but nothing alive can look like an
/// orphan.
#[derive(Debug)]
pub struct Search {
    part: Part,
    /// Ids whose lowest bits say [`HELD`] and [`ALIVE`].
    cells: HashTable<u64>,
    /// How many are held and not alive.
    orphans: usize,
}

/// Redis holds it.
const HELD: u64 = 1;
/// A row renders it, or the stream has decided it.
const ALIVE: u64 = 2;
const STATE: u64 = HELD | ALIVE;

/// The reader adds what Redis holds, the session what is alive.
pub type SharedSearch = Arc<Mutex<Search>>;

/// Nobody ends in the middle of a change of it.
pub fn lock(search: &SharedSearch) -> MutexGuard<'_, Search> {
    search.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Search {
    /// Not begun: whatever it is told, nothing is kept.
    fn new() -> Self {
        Search { part: Part { number: 1, of: 1 }, cells: HashTable::new(), orphans: 0 }
    }

    /// Forgets what it knew. There are about so many `cells`.
    pub fn begin(&mut self, part: Part, cells: u64) {
        // With room for all from the beginning, there are never two tables.
        let cells = HashTable::with_capacity(usize::try_from(cells).unwrap_or(0));
        *self = Search { part, cells, orphans: 0 };
    }

    /// Redis holds it.
    pub fn held(&mut self, cell: CellId) {
        self.note(cell, HELD);
    }

    /// A row renders it, or the stream has decided it.
    pub fn alive(&mut self, cell: CellId) {
        self.note(cell, ALIVE);
    }

    /// Whether Redis holds it and nobody speaks for it.
    pub fn is_orphan(&self, cell: CellId) -> bool {
        let id = kept(cell);
        let known = self.cells.find(hash(&id), |known| known & !STATE == id);
        self.part.has(cell) && known.is_some_and(|known| known & STATE == HELD)
    }

    /// Whether there is any such cell.
    pub fn has_orphans(&self) -> bool {
        self.orphans > 0
    }

    fn note(&mut self, cell: CellId, state: u64) {
        if !self.part.has(cell) {
            return;
        }
        let id = kept(cell);
        let known = self.cells.entry(hash(&id), |known| known & !STATE == id, hash).or_insert(id).into_mut();
        let was_orphan = *known & STATE == HELD;
        *known |= state;
        let is_orphan = *known & STATE == HELD;
        self.orphans = self.orphans + usize::from(is_orphan) - usize::from(was_orphan);
    }
}

fn kept(cell: CellId) -> u64 {
    cell.0 as u64 & !STATE
}

/// The id is a hash.
fn hash(known: &u64) -> u64 {
    (known & !STATE).rotate_right(STATE.count_ones())
}

/// A search: whose keys are looked for in Redis, and what is known of them.
pub struct SearchJob {
    /// The ones.
    pub wanted: Wanted,
    /// The other.
    pub known: SharedSearch,
}

impl SearchJob {
    /// `None` if nothing is looked for.
    pub fn new(wanted: Wanted) -> Option<Self> {
        let nothing = wanted.owned.is_empty() && wanted.tags.is_empty() && wanted.former.is_empty();
        (!nothing).then(|| SearchJob { wanted, known: Arc::new(Mutex::new(Search::new())) })
    }
}

/// Whose cells are looked for.
pub struct Wanted {
    /// Those of keys that a rule makes.
    pub owned: Vec<Owned>,
    /// Those that a rule puts into tags.
    pub tags: Vec<Tagged>,
    /// Keys that a rule made before: no row renders them any more.
    pub former: Vec<(u16, Former)>,
}

/// The keys of one rule.
pub struct Owned {
    /// Its number.
    pub rule: u16,
    /// What they are called.
    pub pattern: Pattern,
    /// What a cell of theirs is.
    pub of: batch::Of,
}

/// What one rule puts into tags.
pub struct Tagged {
    /// Its number.
    pub rule: u16,
    /// What the tags are called.
    pub tags: Pattern,
    /// What the members are called.
    pub members: Pattern,
}

/// A key with members, and the rule that has put all of them there; `None` is a tag, which several fill.
struct Set {
    key: Vec<u8>,
    of: batch::Of,
    rule: Option<u16>,
}

impl Wanted {
    /// What all of their keys begin with.
    fn beginning(&self) -> &[u8] {
        let owned = self.owned.iter().map(|owned| &owned.pattern);
        let tags = self.tags.iter().map(|tagged| &tagged.tags);
        let former = self.former.iter().flat_map(|(_, former)| former.patterns());
        let beginnings = owned.chain(tags).chain(former).map(Pattern::literal_prefix);
        let common =
            |one: &'_ [u8], other: &[u8]| one.iter().zip(other).take_while(|(one, other)| one == other).count();
        beginnings.reduce(|one, other| &one[..common(one, other)]).unwrap_or_default()
    }

    /// How many of their keys Redis holds, sets counted as one.
    pub async fn count(&self, config: &RedisConfig) -> Result<u64> {
        let mut scan = Scan::open(config, self.beginning()).await?;
        let mut count = 0;
        while let Some(keys) = scan.next().await? {
            count += keys.iter().filter(|key| self.set(key).is_some() || self.owner(key).is_some()).count() as u64;
        }
        Ok(count)
    }

    /// How many cells a row is besides its key, about.
    pub fn members_of_a_row(&self) -> u64 {
        let sets = self.owned.iter().filter(|owned| owned.of != batch::Of::Key).count();
        (sets + self.tags.len()) as u64
    }

    /// The set that this key is, if it is one.
    fn set(&self, key: &[u8]) -> Option<Set> {
        let set = |of, rule| Some(Set { key: key.to_vec(), of, rule });
        if self.tags.iter().any(|tagged| tagged.tags.matches(key)) {
            return set(batch::Of::Tag, None);
        }
        let owned = self.owned.iter().find(|owned| owned.pattern.matches(key))?;
        if owned.of == batch::Of::Key { None } else { set(owned.of, Some(owned.rule)) }
    }

    /// The rule whose key it is, or was.
    fn owner(&self, key: &[u8]) -> Option<u16> {
        let owned = self.owned.iter().find(|owned| owned.pattern.matches(key)).map(|owned| owned.rule);
        let former = || self.former.iter().find(|(_, former)| former.matches(key)).map(|(rule, _)| *rule);
        owned.or_else(former)
    }

    /// The rule that has put the member into the set.
    fn owner_of_member(&self, set: &Set, member: &[u8]) -> Option<u16> {
        let tagger = || self.tags.iter().find(|tagged| tagged.tags.matches(&set.key) && tagged.members.matches(member));
        set.rule.or_else(|| Some(tagger()?.rule))
    }
}

/// A walk through the cells of Redis that are wanted.
pub struct Cells<'w> {
    wanted: &'w Wanted,
    scan: Scan,
    keys: VecDeque<Vec<u8>>,
    members: Option<(Set, Members)>,
}

/// Some cells, each with its rule.
pub enum Page {
    /// Each key is one.
    Keys(Vec<(u16, Vec<u8>)>),
    /// Each member of the key is one.
    Members {
        /// The key.
        key: Vec<u8>,
        /// What kind of member.
        of: batch::Of,
        /// The members.
        members: Vec<(u16, Vec<u8>)>,
    },
}

impl<'w> Cells<'w> {
    /// Begins, on a connection of its own.
    pub async fn open(config: &RedisConfig, wanted: &'w Wanted) -> Result<Self> {
        Ok(Cells { wanted, scan: Scan::open(config, wanted.beginning()).await?, keys: VecDeque::new(), members: None })
    }

    /// Some cells, some of them twice; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Page>> {
        loop {
            if let Some((set, members)) = &mut self.members {
                if let Some(page) = members.next().await? {
                    let wanted = |member: Vec<u8>| Some((self.wanted.owner_of_member(set, &member)?, member));
                    let members = page.into_iter().filter_map(wanted).collect();
                    return Ok(Some(Page::Members { key: set.key.clone(), of: set.of, members }));
                }
                self.members = None;
            }
            let mut keys = Vec::new();
            while let Some(key) = self.keys.pop_front() {
                if let Some(set) = self.wanted.set(&key) {
                    let members = self.scan.members(&key, set.of == batch::Of::SortedSet);
                    self.members = Some((set, members));
                    break;
                }
                keys.extend(self.wanted.owner(&key).map(|rule| (rule, key)));
            }
            if !keys.is_empty() {
                return Ok(Some(Page::Keys(keys)));
            }
            if self.members.is_none() {
                match self.scan.next().await? {
                    Some(found) => self.keys = found.into(),
                    None => return Ok(None),
                }
            }
        }
    }
}

impl Page {
    /// The id of each.
    pub fn ids(&self, hasher: &CellHasher, mut visit: impl FnMut(CellId)) {
        self.each(|_, _, key, member| visit(hasher.cell(key, member)));
    }

    /// Those that are orphans go into the batch, to be deleted.
    pub fn orphans(&self, hasher: &CellHasher, search: &Search, batch: &mut Batch) {
        self.each(|rule, of, key, member| {
            if search.is_orphan(hasher.cell(key, member)) {
                batch.cell_of(rule, of, |out| {
                    out.extend_from_slice(key);
                    let key_end = out.len();
                    out.extend_from_slice(member.unwrap_or_default());
                    Some(key_end)
                });
            }
        });
    }

    fn each(&self, mut visit: impl FnMut(u16, batch::Of, &[u8], Option<&[u8]>)) {
        match self {
            Page::Keys(keys) => keys.iter().for_each(|(rule, key)| visit(*rule, batch::Of::Key, key, None)),
            Page::Members { key, of, members } => {
                members.iter().for_each(|(rule, member)| visit(*rule, *of, key, Some(member)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cells(count: u64) -> Vec<CellId> {
        let hasher = CellHasher::default();
        (0..count).map(|number| hasher.cell(&number.to_ne_bytes(), None)).collect()
    }

    #[test]
    fn what_is_held_and_not_alive_is_an_orphan_whichever_is_known_first() {
        let mut search = Search::new();
        search.begin(Part::all(0).next().expect("one at least"), 2);
        let cells = cells(1000);
        for (number, cell) in cells.iter().enumerate() {
            match number % 4 {
                0 => search.held(*cell),
                1 => search.alive(*cell),
                2 => {
                    search.held(*cell);
                    assert!(search.is_orphan(*cell));
                    search.alive(*cell);
                    search.held(*cell);
                }
                _ => {
                    search.alive(*cell);
                    search.held(*cell);
                }
            }
        }
        assert!(cells.iter().enumerate().all(|(number, cell)| search.is_orphan(*cell) == (number % 4 == 0)));
        assert!(search.has_orphans());
        cells.iter().step_by(4).for_each(|cell| search.alive(*cell));
        assert!(!search.has_orphans() && !cells.iter().any(|cell| search.is_orphan(*cell)));
    }

    #[test]
    fn keys_are_looked_for_by_what_all_of_them_begin_with() {
        let owned = |literal: &str| {
            let (pattern, of) = (Pattern::beginning_with(literal.as_bytes()), batch::Of::Key);
            Owned { rule: 0, pattern, of }
        };
        let beginning = |literals: &[&str]| {
            let owned = literals.iter().map(|literal| owned(literal)).collect();
            let wanted = Wanted { owned, tags: Vec::new(), former: Vec::new() };
            String::from_utf8(wanted.beginning().to_vec()).expect("text")
        };
        assert_eq!(beginning(&["shop:tenant_a:item:"]), "shop:tenant_a:item:");
        assert_eq!(beginning(&["shop:tenant_a:item:", "shop:tenant_a:list:"]), "shop:tenant_a:");
        assert_eq!(beginning(&["shop:a", "shop:b", "shop:"]), "shop:");
    }

    #[test]
    fn each_cell_is_in_one_part_and_nothing_is_kept_of_the_others() {
        let cells = cells(1000);
        let mut found = 0;
        let mut search = Search::new();
        cells.iter().for_each(|cell| search.held(*cell));
        assert!(!search.has_orphans(), "it has not begun");
        for part in Part::all(3) {
            search.begin(part, 10);
            assert!(!search.has_orphans(), "what was before is forgotten");
            cells.iter().for_each(|cell| search.held(*cell));
            assert!((200..500).contains(&search.cells.len()));
            found += cells.iter().filter(|cell| search.is_orphan(**cell)).count();
        }
        assert_eq!(found, cells.len());
    }
}
