//! What was read goes out, or is compared, when it is its turn.

use std::collections::{BTreeMap, HashSet, VecDeque};

use tokio::sync::mpsc;

use super::super::orders::{Purpose, Report};
use super::super::{Flying, Outcome, Session, report};
use super::{Head, Why};
use crate::batch::{self, Batch, CacheOp, Form};
use crate::cache::{Cache, Content, Differing, Held};
use crate::canary::{self, Canary};
use crate::snapshot::audit::{self, Kind, Verdict};
use crate::snapshot::reader::Of;
use crate::snapshot::search;
use crate::snapshot::touches::Newer;

impl<C: Cache + Send + 'static> Session<C> {
    /// Sends, or compares, what was read, if it is its turn.
    pub(in crate::session) fn dispatch_read(&mut self) -> bool {
        let Some(reading) = &mut self.reads.reading else { return false };
        match reading.head.take() {
            None => false,
            Some(Head::Candidates(batch)) => self.dispatch_candidates(batch),
            Some(Head::Answers(batch))
                if reading.behind_stream || !self.refreshes.may_compare(self.intake.oldest_later()) =>
            {
                reading.head = Some(Head::Answers(batch));
                false
            }
            Some(Head::Answers(batch)) => self.dispatch_answers(batch),
            Some(head) if !reading.may_go() => {
                reading.head = Some(head);
                false
            }
            Some(Head::Piece(batch)) => self.dispatch_piece(batch),
            Some(Head::Repair(batch)) => {
                let mut batch = self.without_newer(batch);
                // A key of a query that was written since is no orphan any more.
                let hasher = self.reads.hasher.clone();
                let (rules, pass) = (&self.config.rules, self.reads.pass_mut());
                let search = pass.and_then(|pass| pass.search.as_ref());
                let is_orphan =
                    |op: &CacheOp<'_>| search.is_some_and(|search| search::lock(search).is_orphan(hasher.of(op)));
                batch.retain(|rule, op| rules[usize::from(rule)].refresh.is_none() || is_orphan(op));
                self.fly_read(batch)
            }
        }
    }

    /// What queries answer, but for keys that somebody has written since.
    fn dispatch_answers(&mut self, mut batch: Batch) -> bool {
        batch.retain(|_, op| self.refreshes.is_collected(op.key()));
        if batch.is_empty() {
            self.refreshes.answer();
        }
        self.fly_comparison(batch, false)
    }

    fn dispatch_piece(&mut self, batch: Batch) -> bool {
        let hasher = self.reads.hasher.clone();
        let Some(reading) = &mut self.reads.reading else { return false };
        let of_table = reading.chunk.as_ref().is_some_and(|chunk| chunk.of == Of::Table);
        let wanted = reading.chunk.as_ref().is_some_and(|chunk| chunk.rows_wanted);
        let mut verify = false;
        if let Some(pass) = reading.pass.as_mut().filter(|_| of_table) {
            verify = matches!(pass.purpose, Why::Asked(Purpose::Verify { .. }));
            if let Some(search) = &pass.search {
                let mut search = search::lock(search);
                batch.ops().for_each(|(_, op)| search.alive(hasher.of(&op)));
            }
        }
        if !wanted {
            self.recycle(batch);
            return false;
        }
        let before = batch.len();
        let batch = self.without_newer(batch);
        if verify {
            if let Some(asked) = self.reads.asked.front_mut() {
                asked.totals.skipped += (before - batch.len()) as u64;
            }
            return self.fly_comparison(batch, false);
        }
        self.fly_read(batch)
    }

    /// Keys that nobody has rendered or touched since the pass began: no row has them.
    fn dispatch_candidates(&mut self, mut batch: Batch) -> bool {
        self.spare_touched();
        let hasher = self.reads.hasher.clone();
        let Some(pass) = self.reads.pass_mut() else { return false };
        if let Some(search) = &pass.search {
            let search = search::lock(search);
            batch.retain(|_, op| search.is_orphan(hasher.of(op)));
        }
        match pass.purpose {
            Why::Asked(Purpose::Verify { .. }) => self.fly_comparison(batch, true),
            _ => self.fly_read(batch),
        }
    }

    /// What the stream has not said something newer of.
    fn without_newer(&mut self, mut batch: Batch) -> Batch {
        let chunk = self.reads.reading.as_ref().and_then(|reading| reading.chunk.as_ref());
        let newer = match (chunk, self.intake.touches()) {
            (Some(chunk), Some(touches)) if !canary::is(Canary::MarkerOnly) => touches.newer_than(&chunk.snapshot),
            _ => Newer::default(),
        };
        if !newer.is_empty() {
            batch.retain(|rule, op| !newer.has(rule, self.reads.hasher.of(op)));
        }
        batch
    }

    pub(in crate::session) fn recycle(&mut self, mut batch: Batch) {
        batch.clear();
        if let Some(reading) = &self.reads.reading {
            // One too many is simply dropped.
            let _ = reading.handle.spare.try_send(batch);
        }
    }

    fn fly_read(&mut self, mut batch: Batch) -> bool {
        if batch.is_empty() {
            self.recycle(batch);
            return false;
        }
        // No key goes out before it is recorded what it looks like.
        batch.take_claims(&mut self.batch);
        let next =
            self.next_checkpoint(self.checkpoint.applied, self.checkpoint.low, self.proven, self.checkpoint.released);
        self.fly(batch, next, Flying::Read)
    }

    fn fly_comparison(&mut self, batch: Batch, orphans: bool) -> bool {
        if batch.is_empty() {
            self.recycle(batch);
            return false;
        }
        let Some(mut cache) = self.cache.take() else { return false };
        self.flying = Flying::Comparison { orphans };
        self.in_flight = Some(Box::pin(async move {
            let outcome = cache.compare(&batch).await.map(Outcome::Compared);
            (cache, batch, outcome)
        }));
        true
    }

    /// Redis has said which cells are not plainly right.
    pub(in crate::session) fn compared(&mut self, mut batch: Batch, differing: &[Differing], orphans: bool) {
        let unsure = self.intake.has_rereads() || self.reads.oldest_pending().is_some();
        let owing = self.debts.next(&self.checkpoint.owing);
        let Some(asked) = self.reads.asked.front_mut() else { return self.recycle(batch) };
        let Purpose::Verify { repair, .. } = asked.order.purpose else { return self.recycle(batch) };
        let mut checked = BTreeMap::new();
        batch.ops().for_each(|(rule, _)| *checked.entry(rule).or_insert(0) += 1);
        let mut wrong = HashSet::new();
        let ops: Vec<(u16, CacheOp<'_>)> = if differing.is_empty() { Vec::new() } else { batch.ops().collect() };
        for Differing { place, prefix, held } in differing {
            let (number, op) = ops[*place];
            let rule = &self.config.rules[usize::from(number)];
            let kind = match audit::judge(op, held, report::now_us() / 1000) {
                Verdict::Right => continue,
                Verdict::Expired => {
                    asked.totals.expired += 1;
                    continue;
                }
                // A row that is read again has no key meanwhile, nor has one that nobody warms.
                Verdict::Wrong(Kind::Missing)
                    if unsure
                        || owing.contains_key(&rule.name.value)
                        || rule.write.as_ref().is_some_and(|write| !write.warm) =>
                {
                    if *prefix == 0 {
                        checked.entry(number).and_modify(|checked| *checked -= 1);
                        asked.totals.skipped += 1;
                    }
                    continue;
                }
                Verdict::Wrong(_) if orphans => Kind::Orphan,
                Verdict::Wrong(kind) => kind,
            };
            let name = rule.name.value.as_str();
            asked.totals.diverged += 1;
            self.metrics.audit_keys_diverged_total.with_label_values(&[name, kind.name()]).inc();
            let prefix = self.config.redis.prefixes().nth(*prefix).unwrap_or_default();
            let bare = &op.key()[self.config.redis.prefix.len()..];
            let key = format!("{prefix}{}", String::from_utf8_lossy(bare));
            tracing::warn!(rule = name, key, kind = kind.name(), applied = %self.checkpoint.applied, "a key has diverged");
            wrong.insert(*place);
            asked.unsaid.push_back(difference(name, key, kind, op, held, repair));
        }
        for (rule, checked) in checked {
            asked.totals.checked += checked;
            let name = self.config.rules[usize::from(rule)].name.value.as_str();
            self.metrics.audit_keys_checked_total.with_label_values(&[name]).inc_by(checked);
        }
        let (mut place, mut read_again) = (0, Vec::new());
        batch.retain(|rule, op| {
            place += 1;
            let repaired = repair && wrong.contains(&(place - 1));
            // Nothing but a read ever writes the key of a query.
            let is_answer = !orphans && self.config.rules[usize::from(rule)].refresh.is_some();
            if repaired && is_answer {
                read_again.push(op.key().into());
            }
            repaired && !is_answer
        });
        self.repair(&read_again);
        match (batch.is_empty(), &mut self.reads.reading) {
            (false, Some(reading)) => reading.head = Some(Head::Repair(batch)),
            _ => self.recycle(batch),
        }
    }

    /// Says one thing to whoever asked; `None` if nobody listens any more.
    pub(super) fn say(&mut self, listener: Option<mpsc::OwnedPermit<Report>>) {
        let Some(asked) = self.reads.asked.front_mut() else { return };
        let Some(report) = asked.unsaid.pop_front() else { return };
        let last = report.is_last();
        match listener {
            Some(permit) => {
                asked.stuck_since = None;
                drop(permit.send(report));
            }
            // Nobody waits for what is left to be said: the table under way is the last one.
            None => {
                asked.unsaid.retain(Report::is_last);
                if !asked.is_audit {
                    asked.tables = Some(VecDeque::new());
                }
            }
        }
        if last {
            self.reads.asked.pop_front();
        }
    }
}

fn difference(rule: &str, key: String, kind: Kind, op: CacheOp<'_>, held: &Held, repaired: bool) -> Report {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let hash = |fields: &mut dyn Iterator<Item = (&[u8], &[u8])>| {
        let fields: Vec<String> = fields.map(|(name, value)| format!("{}={}", text(name), text(value))).collect();
        fields.join(" ")
    };
    let member =
        |score: Option<&[u8]>| score.map_or_else(|| "a member".to_owned(), |score| format!("score {}", text(score)));
    let should = match op {
        CacheOp::Set { value, form: Form::Hash, .. } => Some(hash(&mut batch::fields(value))),
        CacheOp::Set { value, .. } => Some(text(value)),
        CacheOp::Add { score, .. } => Some(member(score)),
        CacheOp::Delete { .. } | CacheOp::Remove { .. } => None,
    };
    let holds = match &held.content {
        Content::Nothing => None,
        Content::String(value) | Content::Json(value) => Some(text(value)),
        Content::Hash(fields) if matches!(op, CacheOp::Set { form: Form::Hash, .. }) => {
            Some(hash(&mut fields.iter().map(|(name, value)| (name.as_slice(), value.as_slice()))))
        }
        Content::Hash(_) => Some("a hash".to_owned()),
        Content::Member { score } => Some(member(score.as_deref())),
        Content::Other(kind) => Some(format!("a {kind}")),
    };
    let key = op.member().map_or(key.clone(), |of| format!("{key} {}", text(of)));
    Report::Difference { rule: rule.to_owned(), key, kind, holds, should, repaired }
}
