//! What waits until whoever reads the tables sees the changes that it follows from; pure.
//!
//! Deletes that are done again, sweeps, generations, entries of streams and messages are planned with their change, and
//! collected. What has been collected waits as one until a snapshot of the primary sees every transaction of it; meanwhile
//! the next is collected. So each goes out once and in order, however many a second there are, and a key that a thousand
//! transactions make stale is deleted once more and not a thousand times.

use std::collections::BTreeMap;
use std::mem;
use std::time::{Duration, Instant};

use crate::batch::{Batch, Limits, Sweep};
use crate::model::{Change, Lsn, Position, Xid};
use crate::plan::{self, BoundTable, Scratch};
use crate::rules::bind::BoundRule;
use crate::rules::lookup::Question;
use crate::rules::refresh::Stale;
use crate::snapshot::visibility::Snapshot;

/// What waits for the same snapshot.
struct Generation {
    /// When the last of its transactions that were not visible became so, or nothing more was collected; not before.
    visible_at: Instant,
    batch: Batch,
    /// Transactions that are not known to be visible.
    unsettled: Vec<Xid>,
    /// The commit LSN of the oldest transaction.
    from: Lsn,
    /// The newest change; none is at the beginning of everything.
    until: Position,
    /// Its questions are being answered.
    asked: bool,
}

impl Generation {
    fn new(limits: Limits, rules: usize) -> Self {
        let batch = Batch::new(limits, rules);
        let visible_at = Instant::now();
        let (unsettled, from, until) = (Vec::new(), Lsn::default(), Position::default());
        Generation { visible_at, batch, unsettled, from, until, asked: false }
    }

    fn is_empty(&self) -> bool {
        self.until == Position::default()
    }
}

/// What follows from what was released, and does not go out with it.
pub(super) struct Released {
    /// The commit LSN of the oldest transaction.
    pub(super) from: Lsn,
    /// Keys to be read again.
    pub(super) stale: Vec<Stale>,
    /// All of these went: who is reading one of them has read it too early.
    pub(super) swept: Vec<Sweep>,
}

/// See the module.
pub(super) struct Later {
    collecting: Generation,
    waiting: Generation,
    /// So long after it is visible it goes out.
    delay: Duration,
}

impl Later {
    /// Nothing waits.
    pub(super) fn new(limits: Limits, rules: usize) -> Self {
        Self::after(Duration::ZERO, limits, rules)
    }

    /// The same; what is collected waits so much longer.
    fn after(delay: Duration, limits: Limits, rules: usize) -> Self {
        let generation = || Generation::new(limits, rules);
        Later { collecting: generation(), waiting: generation(), delay }
    }

    /// Where a change's own goes.
    pub(super) fn collect(&mut self) -> &mut Batch {
        &mut self.collecting.batch
    }

    /// What was collected, if anything, follows from this change of a transaction; `visible` if everybody sees that already.
    pub(super) fn collected(&mut self, xid: Xid, visible: bool, commit_lsn: Lsn, position: Position) {
        let Generation { batch, unsettled, from, until, visible_at, .. } = &mut self.collecting;
        if batch.is_empty() {
            return;
        }
        if *until == Position::default() {
            *from = commit_lsn;
        }
        *until = position;
        if !self.delay.is_zero() {
            *visible_at = Instant::now();
        }
        if !visible && unsettled.last() != Some(&xid) {
            unsettled.push(xid);
        }
    }

    /// Whether nothing more may be collected for now.
    pub(super) fn is_full(&self) -> bool {
        self.collecting.batch.is_large()
    }

    /// Whether a look at what is visible would help.
    pub(super) fn wants_look(&self) -> bool {
        !self.waiting.unsettled.is_empty() || self.waiting.is_empty() && !self.collecting.unsettled.is_empty()
    }

    /// The oldest transaction that something waits for.
    pub(super) fn oldest(&self) -> Option<Lsn> {
        let waiting = [&self.waiting, &self.collecting].into_iter().find(|generation| !generation.is_empty());
        waiting.map(|generation| generation.from)
    }

    /// A snapshot of the primary sees these.
    pub(super) fn settle(&mut self, snapshot: &Snapshot) {
        for generation in [&mut self.waiting, &mut self.collecting] {
            let before = generation.unsettled.len();
            generation.unsettled.retain(|xid| !snapshot.sees(*xid));
            if generation.unsettled.len() < before {
                generation.visible_at = Instant::now();
            }
        }
    }

    /// Questions about what everybody sees now; nothing of the same generation goes out before they are answered.
    pub(super) fn take_questions(&mut self) -> Vec<Question> {
        self.advance();
        let Generation { batch, unsettled, asked, until, .. } = &mut self.waiting;
        if !unsettled.is_empty() || batch.questions().is_empty() {
            return Vec::new();
        }
        *asked = true;
        let mut questions = batch.take_questions();
        // Their answers go behind everything else that waits, so they are as new as the newest of it.
        questions.iter_mut().for_each(|question| question.generation.1 = until.lsn);
        questions
    }

    /// This is what they mean.
    pub(super) fn answered(&mut self, answers: &Batch) {
        self.waiting.batch.absorb(answers);
        self.waiting.asked = false;
    }

    /// What was collected waits, once nothing else does.
    fn advance(&mut self) {
        if self.waiting.is_empty() {
            mem::swap(&mut self.waiting, &mut self.collecting);
        }
    }

    /// Everything that these rules can name.
    fn everything<'t>(&mut self, rules: impl Iterator<Item = &'t BoundRule>) {
        let own = rules.filter(|rule| rule.again_after() == Some(self.delay));
        own.for_each(|rule| plan::later::everything_again(rule, &mut self.collecting.batch));
    }

    /// What waits for nothing any more goes into the batch; gives up to where that was all, and what has to be read again.
    /// What all keys have to be gone through for waits until that may be done.
    pub(super) fn release(
        &mut self,
        batch: &mut Batch,
        now: Instant,
        may_search: bool,
    ) -> Option<(Position, Released)> {
        self.advance();
        let waiting = &mut self.waiting;
        let unanswered = waiting.asked || !waiting.batch.questions().is_empty();
        let rests = waiting.batch.searches() && !may_search;
        let early = !self.delay.is_zero() && now < waiting.visible_at + self.delay;
        if waiting.is_empty() || !waiting.unsettled.is_empty() || unanswered || rests || early {
            return None;
        }
        let Generation { batch: due, until, from, .. } = waiting;
        let released = Released { from: *from, stale: due.take_stale(), swept: due.sweeps().to_vec() };
        batch.absorb(due);
        due.clear();
        Some((mem::take(until), released))
    }
}

/// How much may be collected that is deleted once more at the same time.
const AGAIN_LIMITS: Limits = Limits { ops: 16_384, bytes: 1 << 20 };

/// What is deleted once more so long after it is visible. Nothing says how far that has come but `low`: it stays at the
/// oldest, so that after a crash all of it comes again.
pub(super) struct Again {
    stages: BTreeMap<Duration, Later>,
    rules: usize,
    /// Whether it was said that more waited than may.
    warned: bool,
}

impl Again {
    /// Nothing waits.
    pub(super) fn new(rules: usize) -> Self {
        Again { stages: BTreeMap::new(), rules, warned: false }
    }

    /// Where a row change's own goes. The stream does not wait for minutes: what is too much becomes everything that the
    /// rules can name.
    pub(super) fn change<'t>(
        &mut self,
        table: &BoundTable,
        delays: &[Duration],
        change: Change<'_>,
        scratch: &mut Scratch,
        all: impl Iterator<Item = &'t BoundRule> + Clone,
    ) {
        for delay in delays.iter().copied() {
            let stage = self.stage(delay);
            plan::again(table, change, delay, scratch, &mut stage.collecting.batch);
            if stage.collecting.batch.is_large() {
                stage.collecting.batch.clear();
                stage.everything(all.clone());
                if !mem::replace(&mut self.warned, true) {
                    tracing::warn!(redelete = ?delay, "more keys are stale than may wait for their second delete; \
                                                       everything that such rules can name goes instead");
                }
            }
        }
    }

    /// Everything that these rules can name.
    pub(super) fn everything<'t>(&mut self, delays: &[Duration], rules: impl Iterator<Item = &'t BoundRule> + Clone) {
        delays.iter().for_each(|delay| self.stage(*delay).everything(rules.clone()));
    }

    fn stage(&mut self, delay: Duration) -> &mut Later {
        let rules = self.rules;
        self.stages.entry(delay).or_insert_with(|| Later::after(delay, AGAIN_LIMITS, rules))
    }

    /// As [`Later::collected`].
    pub(super) fn collected(&mut self, xid: Xid, visible: bool, commit_lsn: Lsn, position: Position) {
        self.stages.values_mut().for_each(|stage| stage.collected(xid, visible, commit_lsn, position));
    }

    /// As [`Later::oldest`].
    pub(super) fn oldest(&self) -> Option<Lsn> {
        self.stages.values().filter_map(Later::oldest).min()
    }

    /// As [`Later::settle`].
    pub(super) fn settle(&mut self, snapshot: &Snapshot) {
        self.stages.values_mut().for_each(|stage| stage.settle(snapshot));
    }

    /// As [`Later::release`]; whether anything was.
    pub(super) fn release(&mut self, batch: &mut Batch, now: Instant, may_search: bool) -> bool {
        self.stages.values_mut().filter_map(|stage| stage.release(batch, now, may_search)).count() > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::CacheOp;
    use crate::model::Tuple;
    use crate::plan::tests::{bound, text_tuple};
    use crate::rules::lookup::tests::question;

    const LIMITS: Limits = Limits { ops: 3, bytes: 1000 };

    struct Stand {
        later: Later,
        batch: Batch,
    }

    impl Stand {
        fn new() -> Self {
            Stand { later: Later::new(LIMITS, 1), batch: Batch::new(LIMITS, 1) }
        }

        fn delete(&mut self, key: &str, xid: u32, visible: bool) {
            let batch = self.later.collect();
            let cell = batch.cell(0, |out| {
                out.extend_from_slice(key.as_bytes());
                true
            });
            batch.delete(cell.expect("a key"));
            let lsn = Lsn(u64::from(xid));
            self.later.collected(Xid(xid), visible, lsn, Position { lsn, ordinal: 1 });
        }

        fn released(&mut self) -> Vec<String> {
            self.batch.clear();
            self.batch.released = self.later.release(&mut self.batch, Instant::now(), true).map(|(until, _)| until);
            let key = |op: CacheOp<'_>| String::from_utf8_lossy(op.key()).into_owned();
            self.batch.ops().map(|(_, op)| key(op)).collect()
        }
    }

    #[test]
    fn nothing_goes_out_before_it_is_visible() {
        let mut stand = Stand::new();
        stand.delete("a", 5, false);
        assert!(stand.released().is_empty() && stand.later.wants_look());
        stand.delete("b", 6, false);
        stand.delete("a", 7, false);
        stand.later.settle(&"6:6:".parse().expect("a snapshot"));
        assert_eq!(stand.released(), ["a"], "5 is visible");
        assert_eq!(stand.batch.released, Some(Position { lsn: Lsn(5), ordinal: 1 }));
        assert_eq!(stand.later.oldest(), Some(Lsn(6)));
        stand.later.settle(&"6:8:6".parse().expect("a snapshot"));
        assert!(stand.released().is_empty(), "6 is not");
        stand.later.settle(&"8:8:".parse().expect("a snapshot"));
        assert_eq!(stand.released(), ["b", "a"]);
        assert_eq!((stand.later.oldest(), stand.later.wants_look()), (None, false));
    }

    #[test]
    fn nothing_goes_out_before_its_questions_are_answered() {
        let mut stand = Stand::new();
        stand.later.collect().ask(question(5));
        stand.delete("a", 5, false);
        assert!(stand.later.take_questions().is_empty(), "5 is not visible");
        stand.later.settle(&"6:6:".parse().expect("a snapshot"));
        assert!(stand.released().is_empty(), "not asked");
        assert_eq!(stand.later.take_questions().len(), 1);
        assert!(stand.later.take_questions().is_empty() && stand.released().is_empty(), "not answered");
        stand.delete("b", 6, true);
        assert_eq!(stand.later.oldest(), Some(Lsn(5)));
        stand.later.answered(&Batch::new(LIMITS, 1));
        assert_eq!(stand.released(), ["a"]);
        assert_eq!(stand.released(), ["b"]);
    }

    #[test]
    fn an_answer_is_as_new_as_all_that_goes_with_it() {
        let mut stand = Stand::new();
        stand.later.collect().ask(question(5));
        stand.delete("a", 5, true);
        stand.delete("b", 8, true);
        let questions = stand.later.take_questions();
        assert_eq!(questions.iter().map(|question| question.generation.1).collect::<Vec<_>>(), [Lsn(8)]);
    }

    #[test]
    fn an_answer_without_keys_is_one() {
        let mut stand = Stand::new();
        stand.later.collect().ask(question(5));
        stand.later.collected(Xid(5), true, Lsn(5), Position { lsn: Lsn(5), ordinal: 1 });
        assert_eq!(stand.later.take_questions().len(), 1);
        assert_eq!(stand.later.oldest(), Some(Lsn(5)));
        stand.later.answered(&Batch::new(LIMITS, 1));
        assert!(stand.released().is_empty());
        assert_eq!((stand.batch.released, stand.later.oldest()), (Some(Position { lsn: Lsn(5), ordinal: 1 }), None));
    }

    #[test]
    fn a_change_that_nothing_follows_from_is_not_waited_for() {
        let mut stand = Stand::new();
        stand.later.collected(Xid(5), false, Lsn(5), Position { lsn: Lsn(5), ordinal: 1 });
        stand.delete("a", 9, true);
        assert_eq!((stand.later.oldest(), stand.later.wants_look()), (Some(Lsn(9)), false));
    }

    #[test]
    fn what_is_deleted_once_more_waits_for_longer() {
        let (second, mut stand) = (Duration::from_secs(1), Stand::new());
        stand.later = Later::after(second, LIMITS, 1);
        stand.delete("a", 5, false);
        let mut released = |later: &mut Later, after: Duration| {
            stand.batch.clear();
            later.release(&mut stand.batch, Instant::now() + after, true).map(|(until, _)| until.lsn.0)
        };
        let later = &mut stand.later;
        assert_eq!(released(later, 10 * second), None, "5 is not visible");
        later.settle(&"6:6:".parse().expect("a snapshot"));
        assert_eq!((released(later, Duration::ZERO), later.oldest()), (None, Some(Lsn(5))));
        assert_eq!((released(later, second), later.oldest()), (Some(5), None));
    }

    #[test]
    fn only_what_all_keys_are_gone_through_for_rests() {
        let glob = |rule: &str| {
            let table = bound(rule, &["id"]);
            let tuple = text_tuple(&[Some("1")]);
            let new = Tuple { columns: 1, bytes: &tuple };
            let mut again = Again::new(1);
            let (delays, rules) = ([Duration::from_secs(1)], table.rules.iter());
            again.change(&table, &delays, Change::Insert { new }, &mut Scratch::default(), rules);
            again.collected(Xid(5), true, Lsn(5), Position { lsn: Lsn(5), ordinal: 1 });
            again
        };
        let mut batch = Batch::new(LIMITS, 1);
        let mut released = |again: &mut Again, may_search: bool| {
            again.release(&mut batch, Instant::now() + Duration::from_secs(1), may_search)
        };
        let mut matching = glob("delete_match = [\"page:{id}:*\"]\nredelete = \"1s\"");
        assert!(!released(&mut matching, false) && matching.oldest().is_some());
        assert!(released(&mut matching, true) && matching.oldest().is_none());
        let mut tagged = glob("delete = [\"list:{id}\"]\ndelete_tags = [\"row:{id}\"]\nredelete = \"1s\"");
        assert!(released(&mut tagged, false));
    }

    #[test]
    fn a_thousand_tags_are_no_others() {
        let table = bound("delete_tags = [\"row:{id}\"]\nredelete = \"1s\"", &["id"]);
        let mut again = Again::new(1);
        let delays = [Duration::from_secs(1)];
        let insert = |again: &mut Again, rows: std::ops::Range<u32>| {
            for id in rows {
                let tuple = text_tuple(&[Some(&id.to_string())]);
                let change = Change::Insert { new: Tuple { columns: 1, bytes: &tuple } };
                again.change(&table, &delays, change, &mut Scratch::default(), table.rules.iter());
            }
            again.collected(Xid(5), true, Lsn(5), Position { lsn: Lsn(5), ordinal: 1 });
            let mut batch = Batch::new(LIMITS, 1);
            again.release(&mut batch, Instant::now() + Duration::from_secs(1), true);
            batch
        };
        let swept = insert(&mut again, 0..1000);
        assert!(swept.sweeps().len() == 1000 && swept.sweeps().iter().all(|sweep| matches!(sweep, Sweep::Tag(_))));
        // There is an end to it.
        let swept = insert(&mut again, 0..AGAIN_LIMITS.ops as u32);
        assert!(matches!(swept.sweeps(), [Sweep::Tags(..)]) && again.warned);
    }

    #[test]
    fn what_is_visible_already_waits_for_nothing() {
        let mut stand = Stand::new();
        stand.delete("a", 5, true);
        assert!(!stand.later.wants_look());
        assert_eq!(stand.released(), ["a"]);
    }

    #[test]
    fn a_change_that_leaves_nothing_holds_nothing_back() {
        let mut stand = Stand::new();
        stand.later.collected(Xid(5), false, Lsn(5), Position { lsn: Lsn(5), ordinal: 1 });
        assert!(!stand.later.wants_look());
        stand.delete("a", 9, false);
        assert_eq!(stand.later.oldest(), Some(Lsn(9)));
    }

    #[test]
    fn it_is_full_at_the_limits_of_a_batch() {
        let mut stand = Stand::new();
        stand.delete("first", 4, false);
        assert!(stand.released().is_empty());
        for (xid, key) in ["a", "b", "c"].into_iter().enumerate() {
            assert!(!stand.later.is_full(), "{key}");
            stand.delete(key, xid as u32 + 5, false);
        }
        assert!(stand.later.is_full());
    }
}
