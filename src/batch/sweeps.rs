//! What goes by a pattern or by a tag, each once: a table that is truncated once a second makes the same keys stale.

use std::hash::BuildHasher;

use hashbrown::{DefaultHashBuilder, HashTable};

use super::{Limits, Members, Sweep};

/// How many patterns that rows have filled a batch holds at most: each key that SCAN shows is compared with every one of
/// them.
const MATCHING_MAX: usize = 256;

/// See the module; in the order of their first coming.
#[derive(Debug, Default)]
pub(super) struct Sweeps {
    all: Vec<Sweep>,
    places: HashTable<usize>,
    hasher: DefaultHashBuilder,
    matching: usize,
    tags: usize,
    /// Bytes of what rows have filled.
    bytes: usize,
    of_rules: usize,
}

impl Sweeps {
    /// Adds one, unless it is there.
    pub(super) fn add(&mut self, sweep: Sweep) {
        let Sweeps { all, places, hasher, .. } = self;
        let hash = hasher.hash_one(&sweep);
        if places.find(hash, |place| all[*place] == sweep).is_some() {
            return;
        }
        places.insert_unique(hash, all.len(), |place| hasher.hash_one(&all[*place]));
        match &sweep {
            Sweep::Matching(glob) => (self.matching, self.bytes) = (self.matching + 1, self.bytes + glob.byte_len()),
            Sweep::Tag(tag) => (self.tags, self.bytes) = (self.tags + 1, self.bytes + tag.len()),
            Sweep::Owned(_) | Sweep::Tags(_, Members::Registered(_)) => self.of_rules += 1,
            Sweep::Tags(_, Members::All | Members::Stale) => {}
        }
        all.push(sweep);
    }

    /// They.
    pub(super) fn all(&self) -> &[Sweep] {
        &self.all
    }

    /// Takes all of them out.
    pub(super) fn clear(&mut self) {
        (self.matching, self.tags, self.bytes, self.of_rules) = (0, 0, 0, 0);
        self.all.clear();
        self.places.clear();
    }

    /// Whether rows have named as much as they may.
    pub(super) fn is_large(&self, limits: Limits) -> bool {
        self.matching >= MATCHING_MAX || self.tags >= limits.ops || self.bytes >= limits.bytes
    }

    /// Whether one is about all keys of a rule, or all their tags: nothing follows it in the same batch.
    pub(super) fn closes(&self) -> bool {
        self.of_rules > 0
    }

    /// Whether all keys of Redis are gone through for one. A tag is found by its name.
    pub(super) fn searches(&self) -> bool {
        self.all.len() > self.tags
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::pattern::Pattern;

    const LIMITS: Limits = Limits { ops: 1000, bytes: 10_000 };

    fn sweeps(added: impl IntoIterator<Item = Sweep>) -> Sweeps {
        let mut sweeps = Sweeps::default();
        added.into_iter().for_each(|sweep| sweeps.add(sweep));
        sweeps
    }

    fn tag(number: usize) -> Sweep {
        Sweep::Tag(format!("tag:{number:04}").into_bytes().into())
    }

    #[test]
    fn each_is_there_once() {
        let pattern = || Pattern::beginning_with(b"list:");
        let once = || {
            [
                Sweep::Owned(pattern()),
                Sweep::Owned(Pattern::beginning_with(b"lists:")),
                Sweep::Tags(pattern(), Members::All),
                Sweep::Tags(pattern(), Members::Stale),
                Sweep::Tags(pattern(), Members::Registered(pattern())),
                Sweep::Tags(pattern(), Members::Registered(Pattern::beginning_with(b"card:"))),
                tag(1),
                tag(2),
            ]
        };
        let mut sweeps = sweeps((0..100).flat_map(|_| once()));
        assert_eq!(sweeps.all(), once());
        sweeps.clear();
        assert!(sweeps.all().is_empty() && !sweeps.closes() && !sweeps.searches());
        once().into_iter().for_each(|sweep| sweeps.add(sweep));
        assert_eq!(sweeps.all(), once());
    }

    #[test]
    fn tags_are_many_as_long_as_their_names_find_room() {
        assert!(!sweeps((0..999).map(tag)).is_large(LIMITS));
        assert!(sweeps((0..1000).map(tag)).is_large(LIMITS));
        assert!(sweeps((0..999).map(tag)).is_large(Limits { bytes: 7992, ..LIMITS }));
    }

    #[test]
    fn only_a_tag_is_found_without_going_through_all_keys() {
        assert!(!sweeps([tag(1)]).searches());
        assert!(sweeps([tag(1), Sweep::Tags(Pattern::beginning_with(b"tag:"), Members::All)]).searches());
    }
}
