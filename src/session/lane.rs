//! Keys that are to be read again, until they are: which of them may be read now; pure.
//!
//! A key comes here once whoever reads the tables sees the change that made it stale ([`super::later`]). So whatever is read
//! from then on contains it, and nothing has to be compared: one key is read once at a time, and each read sees more than
//! the one before. A key that goes stale while it is read is read once more.
//!
//! Nothing waits for what waits here: neither the stream, nor what is deleted or told of the same changes. Only `low` does,
//! so that a crash forgets none.

use std::collections::BTreeMap;
use std::time::Instant;

use hashbrown::HashMap;

use crate::backoff::Backoff;
use crate::batch::Sweep;
use crate::model::Lsn;
use crate::rules::refresh::Stale;

/// How many keys may wait, and how many bytes they may take. What comes then is deleted instead (I9).
const KEYS_MAX: usize = 16_384;
const BYTES_MAX: usize = 8 << 20;
/// How many keys may wait for another try. What fails then is given up.
const RETRIES_MAX: usize = 1000;

/// A key that waits, is read, or rests after that.
struct Entry {
    stale: Stale,
    /// The oldest change that no read has begun for.
    asked: Option<Lsn>,
    /// The read under way.
    reading: Option<Reading>,
    /// It is to be read to be compared with what the cache holds.
    compared: bool,
    /// Its last reads failed: its key is deleted, and it is tried again.
    failed: Option<Backoff>,
}

struct Reading {
    /// The oldest change that it is for.
    asked: Option<Lsn>,
    began: Instant,
    /// It is for nothing but a comparison.
    compares: bool,
}

/// When it is a key's turn, and which comes first where that is the same.
type Turn = (Instant, u64);

/// What becomes of a key that was asked for.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Asked {
    /// It is read.
    Waits,
    /// There is no room: it must be deleted.
    NoRoom,
}

/// What becomes of a key whose read has ended.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Done {
    /// It is seen to: it was read, or is tried again.
    SeenTo,
    /// It could not be read, and there is no room to try it again.
    GivenUp,
}

/// See the module.
#[derive(Default)]
pub(super) struct Lane {
    entries: HashMap<Box<[u8]>, Entry>,
    /// Each key that is not being read.
    queue: BTreeMap<Turn, Box<[u8]>>,
    turns: u64,
    /// The changes that keys are to be read for, and how many keys.
    holds: BTreeMap<Lsn, usize>,
    bytes: usize,
    retries: usize,
    /// Some key may be known that nothing has happened to since it was read.
    may_rest: bool,
}

impl Lane {
    /// A key is stale since a change, which whoever reads the tables sees.
    pub(super) fn ask(&mut self, stale: Stale, from: Lsn, now: Instant) -> Asked {
        if let Some(entry) = self.entries.get_mut(&stale.key) {
            // What failed is deleted already, and is tried again anyway.
            let is_deleted = entry.failed.is_some() && entry.reading.is_none();
            if entry.asked.is_none() && !is_deleted {
                entry.asked = Some(from);
                hold(&mut self.holds, from);
            }
            return Asked::Waits;
        }
        if self.is_full() && std::mem::take(&mut self.may_rest) {
            self.forget_resting();
        }
        if self.is_full() {
            return Asked::NoRoom;
        }
        hold(&mut self.holds, from);
        self.bytes += stale.byte_len();
        self.queue_up(now, stale.key.clone());
        let entry = Entry { asked: Some(from), reading: None, compared: false, failed: None, stale };
        self.entries.insert(entry.stale.key.clone(), entry);
        Asked::Waits
    }

    /// A key is to be read and compared. Whether it will be: not if it is read anyway, or just was.
    pub(super) fn compare(&mut self, stale: Stale, now: Instant) -> bool {
        if self.entries.contains_key(&stale.key) || self.is_full() {
            return false;
        }
        self.bytes += stale.byte_len();
        self.queue_up(now, stale.key.clone());
        let entry = Entry { asked: None, reading: None, compared: true, failed: None, stale };
        self.entries.insert(entry.stale.key.clone(), entry);
        true
    }

    /// Whether what is read of the key is for nothing but a comparison, and still as new as that needs.
    pub(super) fn compares(&self, key: &[u8]) -> bool {
        let of = |entry: &Entry| entry.asked.is_none() && entry.reading.as_ref().is_some_and(|read| read.compares);
        self.entries.get(key).is_some_and(of)
    }

    /// These keys were deleted because of a change: whoever is reading one may have begun before it.
    pub(super) fn swept(&mut self, sweep: &Sweep, from: Lsn) {
        let read = self.entries.values_mut().filter(|entry| entry.reading.is_some() && entry.asked.is_none());
        for entry in read.filter(|entry| sweep.matches(&entry.stale.key)) {
            entry.asked = Some(from);
            hold(&mut self.holds, from);
        }
    }

    /// The next key to read, if it is the turn of one.
    pub(super) fn next(&mut self, now: Instant) -> Option<Stale> {
        while let Some(first) = self.queue.first_entry().filter(|first| first.key().0 <= now) {
            let key = first.remove();
            let entry = self.entries.get_mut(&key)?;
            let compares = std::mem::take(&mut entry.compared);
            if entry.asked.is_some() || entry.failed.is_some() || compares {
                let compares = entry.asked.is_none() && entry.failed.is_none();
                entry.reading = Some(Reading { asked: entry.asked.take(), began: now, compares });
                return Some(entry.stale.clone());
            }
            self.forget(&key);
        }
        None
    }

    /// When it is the turn of the next one.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        self.queue.first_key_value().map(|((at, _), _)| *at)
    }

    /// What was read goes into the batch that fills, or the key is deleted there because it could not be read.
    pub(super) fn done(&mut self, key: &[u8], went_well: bool, now: Instant) -> Done {
        let Some(entry) = self.entries.get_mut(key) else { return Done::SeenTo };
        let Some(Reading { asked, began, compares }) = entry.reading.take() else { return Done::SeenTo };
        asked.into_iter().for_each(|lsn| release(&mut self.holds, lsn));
        if compares && entry.asked.is_none() {
            self.forget(key);
            return Done::SeenTo;
        }
        if went_well {
            self.retries -= usize::from(entry.failed.take().is_some());
            let rested = began + entry.stale.query.min_interval;
            match entry.asked.is_some() || rested > now {
                true => {
                    self.may_rest |= entry.asked.is_none();
                    self.queue_up(rested.max(now), key.into());
                }
                false => self.forget(key),
            }
            return Done::SeenTo;
        }
        // The key is gone, whatever changed meanwhile.
        entry.asked.take().into_iter().for_each(|lsn| release(&mut self.holds, lsn));
        if entry.failed.is_none() {
            if self.retries == RETRIES_MAX {
                self.forget(key);
                return Done::GivenUp;
            }
            self.retries += 1;
        }
        let wait = entry.failed.get_or_insert_default().next_wait();
        self.queue_up(now + wait, key.into());
        Done::SeenTo
    }

    /// The oldest change that some key is to be read for.
    pub(super) fn oldest(&self) -> Option<Lsn> {
        self.holds.first_key_value().map(|(lsn, _)| *lsn)
    }

    /// How many keys are stale.
    pub(super) fn stale(&self) -> usize {
        self.holds.values().sum()
    }

    /// Whether the key is to be read, or to be read again.
    pub(super) fn is_stale(&self, key: &[u8]) -> bool {
        self.entries.get(key).is_some_and(|entry| entry.asked.is_some() || entry.reading.is_some() || entry.compared)
    }

    fn is_full(&self) -> bool {
        self.entries.len() >= KEYS_MAX || self.bytes >= BYTES_MAX
    }

    fn queue_up(&mut self, at: Instant, key: Box<[u8]>) {
        self.turns += 1;
        self.queue.insert((at, self.turns), key);
    }

    fn forget(&mut self, key: &[u8]) {
        if let Some(entry) = self.entries.remove(key) {
            self.bytes -= entry.stale.byte_len();
        }
    }

    /// Keys that were read, and that nothing has happened to since, need not be known.
    fn forget_resting(&mut self) {
        let Lane { entries, queue, bytes, .. } = self;
        queue.retain(|_, key| {
            let rests = |entry: &Entry| entry.asked.is_none() && entry.failed.is_none() && !entry.compared;
            let rests = entries.get(key).is_some_and(rests);
            if let Some(entry) = rests.then(|| entries.remove(key)).flatten() {
                *bytes -= entry.stale.byte_len();
            }
            !rests
        });
    }
}

fn hold(holds: &mut BTreeMap<Lsn, usize>, lsn: Lsn) {
    *holds.entry(lsn).or_default() += 1;
}

fn release(holds: &mut BTreeMap<Lsn, usize>, lsn: Lsn) {
    if let Some(count) = holds.get_mut(&lsn) {
        *count -= 1;
        if *count == 0 {
            holds.remove(&lsn);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::config::{Query, Shape, Spanned};
    use crate::rules::pattern::Pattern;
    use crate::rules::sql::Sql;
    use crate::rules::template::Template;

    const INTERVAL: Duration = Duration::from_millis(100);

    fn query(min_interval: Duration) -> Arc<Query> {
        fn at<T>(value: T) -> Spanned<T> {
            Spanned { value, span: 0..0 }
        }
        Arc::new(Query {
            name: at("page".into()),
            key: at(Template::parse("page:{id}").expect("a template")),
            sql: at(Sql::parse("select :id").expect("a query")),
            shape: Shape::Value,
            keys: None,
            every: None,
            ttl: None,
            min_interval,
        })
    }

    struct Stand {
        lane: Lane,
        query: Arc<Query>,
        now: Instant,
    }

    impl Stand {
        fn new(min_interval: Duration) -> Self {
            Stand { lane: Lane::default(), query: query(min_interval), now: Instant::now() }
        }

        fn ask(&mut self, key: &str, from: u64) -> Asked {
            let key: Box<[u8]> = key.as_bytes().into();
            let parameters = Arc::from([key.clone()]);
            let stale = Stale { rule: 0, query: Arc::clone(&self.query), key, parameters };
            self.lane.ask(stale, Lsn(from), self.now)
        }

        fn next(&mut self) -> Option<String> {
            self.lane.next(self.now).map(|stale| String::from_utf8_lossy(&stale.key).into_owned())
        }

        fn done(&mut self, key: &str, went_well: bool) {
            assert_eq!(self.end(key, went_well), Done::SeenTo);
        }

        fn end(&mut self, key: &str, went_well: bool) -> Done {
            self.lane.done(key.as_bytes(), went_well, self.now)
        }

        fn oldest(&self) -> Option<u64> {
            self.lane.oldest().map(|lsn| lsn.0)
        }
    }

    #[test]
    fn a_key_is_read_once_at_a_time_and_once_more_if_it_goes_stale_meanwhile() {
        let mut stand = Stand::new(Duration::ZERO);
        for (key, from) in [("a", 1), ("b", 2), ("a", 3)] {
            assert_eq!(stand.ask(key, from), Asked::Waits);
        }
        assert_eq!((stand.next().as_deref(), stand.next().as_deref(), stand.next()), (Some("a"), Some("b"), None));
        assert_eq!(stand.ask("a", 4), Asked::Waits);
        assert_eq!((stand.next(), stand.oldest()), (None, Some(1)), "it is being read");
        stand.done("a", true);
        assert_eq!((stand.oldest(), stand.next().as_deref()), (Some(2), Some("a")));
        stand.done("b", true);
        assert_eq!(stand.oldest(), Some(4));
        stand.done("a", true);
        assert_eq!((stand.oldest(), stand.next(), stand.lane.entries.len()), (None, None, 0));
        assert_eq!((stand.lane.bytes, stand.lane.wake_at()), (0, None));
    }

    #[test]
    fn a_key_rests_after_it_was_read() {
        let mut stand = Stand::new(INTERVAL);
        let _ = stand.ask("a", 1);
        assert_eq!(stand.next().as_deref(), Some("a"));
        stand.done("a", true);
        for from in 2..9 {
            let _ = stand.ask("a", from);
        }
        assert_eq!((stand.next(), stand.oldest(), stand.lane.wake_at()), (None, Some(2), Some(stand.now + INTERVAL)));
        stand.now += INTERVAL;
        assert_eq!(stand.next().as_deref(), Some("a"));
        stand.done("a", true);
        assert_eq!(stand.oldest(), None);
        stand.now += INTERVAL;
        assert_eq!((stand.next(), stand.lane.entries.len()), (None, 0), "it is forgotten");
    }

    #[test]
    fn what_fails_is_tried_again_and_holds_nothing() {
        let mut stand = Stand::new(Duration::ZERO);
        let _ = stand.ask("a", 1);
        for _ in 0..5 {
            assert_eq!(stand.next().as_deref(), Some("a"));
            let _ = stand.ask("a", 2);
            stand.done("a", false);
            let _ = stand.ask("a", 3);
            assert_eq!((stand.oldest(), stand.next()), (None, None));
            stand.now += Duration::from_secs(5);
        }
        assert_eq!(stand.next().as_deref(), Some("a"));
        stand.done("a", true);
        assert_eq!((stand.lane.entries.len(), stand.lane.retries), (0, 0));
    }

    #[test]
    fn what_fails_does_not_wait_for_the_interval() {
        let mut stand = Stand::new(Duration::from_secs(600));
        let _ = stand.ask("a", 1);
        assert_eq!(stand.next().as_deref(), Some("a"));
        stand.done("a", false);
        stand.now += Duration::from_secs(1);
        assert_eq!(stand.next().as_deref(), Some("a"));
    }

    #[test]
    fn what_fails_beyond_what_is_tried_again_is_given_up() {
        let mut stand = Stand::new(Duration::ZERO);
        for key in 0..RETRIES_MAX + 2 {
            let key = format!("k{key}");
            let _ = stand.ask(&key, 1);
            assert_eq!(stand.next().as_deref(), Some(key.as_str()));
        }
        let ended: Vec<Done> = (0..RETRIES_MAX + 2).map(|key| stand.end(&format!("k{key}"), false)).collect();
        assert_eq!(ended.iter().position(|done| *done == Done::GivenUp), Some(RETRIES_MAX));
        assert_eq!((stand.lane.entries.len(), stand.oldest()), (RETRIES_MAX, None));
        stand.now += Duration::from_secs(5);
        let again = stand.next().expect("another try");
        stand.done(&again, true);
        let _ = stand.ask("last", 2);
        let read: Vec<_> = std::iter::from_fn(|| stand.next()).collect();
        assert!(read.contains(&"last".to_owned()));
        assert_eq!(stand.end("last", false), Done::SeenTo, "there is room again");
    }

    #[test]
    fn what_is_compared_is_read_once_and_written_only_if_it_goes_stale() {
        let mut stand = Stand::new(Duration::ZERO);
        let compare = |stand: &mut Stand, key: &str| {
            let (query, key): (_, Box<[u8]>) = (Arc::clone(&stand.query), key.as_bytes().into());
            stand.lane.compare(Stale { rule: 0, query, key, parameters: Arc::from([]) }, stand.now)
        };
        assert!(compare(&mut stand, "a") && compare(&mut stand, "b") && !compare(&mut stand, "a"));
        let _ = stand.ask("c", 1);
        assert!(!compare(&mut stand, "c"), "it is read anyway");
        let read: Vec<_> = std::iter::from_fn(|| stand.next()).collect();
        assert_eq!(read, ["a", "b", "c"]);
        let _ = stand.ask("b", 2);
        assert_eq!(["a", "b", "c"].map(|key| stand.lane.compares(key.as_bytes())), [true, false, false]);
        stand.done("a", false);
        stand.done("b", true);
        stand.done("c", true);
        assert_eq!((stand.next().as_deref(), stand.oldest(), stand.lane.entries.len()), (Some("b"), Some(2), 1));
    }

    #[test]
    fn what_was_swept_while_it_was_read_is_read_again() {
        let mut stand = Stand::new(Duration::ZERO);
        for key in ["page:1", "page:2", "other:1"] {
            let _ = stand.ask(key, 1);
        }
        let read = [stand.next(), stand.next()];
        assert_eq!(read.map(|key| key.expect("a key")), ["page:1", "page:2"]);
        stand.lane.swept(&Sweep::Owned(Pattern::beginning_with(b"page:2")), Lsn(7));
        stand.done("page:1", true);
        stand.done("page:2", true);
        assert_eq!([stand.next(), stand.next()].map(|key| key.expect("a key")), ["other:1", "page:2"]);
        stand.done("other:1", true);
        assert_eq!(stand.oldest(), Some(7));
    }

    #[test]
    fn there_is_room_for_so_many_and_what_rests_makes_room() {
        let mut stand = Stand::new(INTERVAL);
        for key in 0..KEYS_MAX {
            assert_eq!(stand.ask(&format!("k{key}"), 1), Asked::Waits);
        }
        assert_eq!((stand.ask("more", 1), stand.ask("k7", 2)), (Asked::NoRoom, Asked::Waits));
        for key in ["k0", "k1"] {
            assert_eq!(stand.next().as_deref(), Some(key));
            stand.done(key, true);
        }
        assert_eq!(
            (stand.ask("more", 1), stand.ask("most", 1), stand.ask("over", 1)),
            (Asked::Waits, Asked::Waits, Asked::NoRoom)
        );
        assert_eq!(stand.lane.stale(), KEYS_MAX);
        // Whoever asks in vain does not look for room each time.
        let began = Instant::now();
        let refused = (0..KEYS_MAX).filter(|key| stand.ask(&format!("over{key}"), 1) == Asked::NoRoom).count();
        assert_eq!((refused, began.elapsed() < Duration::from_secs(1)), (KEYS_MAX, true));
    }
}
