//! Tables that are read while the stream goes on: which, what for, and when what was read may go out.
//!
//! What is read goes out between two batches of the stream, one piece at a time, by the same writer. The rules of
//! [`crate::snapshot`] hold: a piece waits until the marker of its chunk has come out of the stream and everything
//! before the marker is in Redis; cells that the stream has touched with transactions that the chunk does not see are
//! left alone.
//!
//! Debts come first (what a rule owes stands in the checkpoint until a pass has paid it), then what somebody asked for,
//! then the audit (`choose`); `outgoing` sends or compares what was read. One table is read at a time; single rows (values
//! that the log did not carry) are read in between.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::debts::Debts;
use super::intake::Reread;
use super::later::Released;
use super::orders::{PassOrder, Purpose, REPORTS_MAX, Report, Totals};
use super::{Session, report};
use crate::admin::PassStatus;
use crate::backoff::Backoff;
use crate::batch::{Batch, CellHasher, Claim, Sweep};
use crate::cache::Cache;
use crate::cache::checkpoint::{Debt, Progress};
use crate::cache::claims::Former;
use crate::canary::{self, Canary};
use crate::catalog::{Carrier, sql_identifier};
use crate::config::{Config, TableName};
use crate::error::{Error, ErrorKind, Result};
use crate::model::{Lsn, Timestamp};
use crate::plan::{self, BoundTable, Transaction, later};
use crate::rules::bind::BoundRule;
use crate::snapshot::reader::{self, Chunk, Closed, Found, Handle, Of, RowsJob, Setting, TableJob};
use crate::snapshot::search::{self, SharedSearch};
use crate::source::conninfo::ConnInfo;

use choose::{is_listed, is_readable};

mod choose;
mod outgoing;

/// How many rows are read again at a time.
const REREADS_AT_A_TIME: usize = 500;
/// A reader that has had nothing to do for so long ends its connections.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// How long whoever asked for a pass may leave its reports alone.
const HEED_LIMIT: Duration = Duration::from_secs(30);
/// How often a part of the tables is audited; `audit` says how much of them in a minute.
const AUDIT_EVERY: Duration = Duration::from_secs(10);

/// Everything about reading that lasts for a session.
pub(super) struct Reads {
    config: Arc<Config>,
    postgres: ConnInfo,
    hasher: CellHasher,
    reading: Option<Reading>,
    /// What somebody asked for, one after the other.
    asked: VecDeque<Asked>,
    /// Everything that committed before the slot began is known to be visible.
    barrier_passed: bool,
    /// As far as every reply was seen to be good.
    pub(super) progress: Option<Progress>,
    /// What each rule made before.
    former: Vec<Former>,
    /// When reading for a rule last went wrong, wholly or for some of its keys.
    failed: BTreeMap<u16, Instant>,
    backoff: Backoff,
    not_before: Instant,
    audited: Instant,
}

/// A pass over the tables of some rules that somebody asked for.
struct Asked {
    order: PassOrder,
    /// Those that are still to be read; `None` before it begins.
    tables: Option<VecDeque<u32>>,
    totals: Totals,
    /// What is still to be said.
    unsaid: VecDeque<Report>,
    /// Nothing was taken since, although there is more to be said than should wait.
    stuck_since: Option<Instant>,
    /// It is the audit's, and nobody listens.
    is_audit: bool,
}

/// A reader and what it is at.
struct Reading {
    handle: Handle,
    token: String,
    /// The newest chunk whose marker has come out of the stream.
    marked: u64,
    /// The batch that fills holds what came before that marker.
    behind_stream: bool,
    chunk: Option<Chunk>,
    /// What must be dealt with before anything else is taken from the reader.
    head: Option<Head>,
    pass: Option<Pass>,
    /// Rows that are being read again.
    rereads: Vec<Reread>,
    used: Instant,
}

enum Head {
    /// Rendered rows.
    Piece(Batch),
    /// Cells that were found to be wrong.
    Repair(Batch),
    /// Keys of which some may be orphans.
    Candidates(Batch),
    /// What queries answer, to be compared.
    Answers(Batch),
}

/// The read of one table.
struct Pass {
    table: Arc<BoundTable>,
    /// The rules that are read for, or swept.
    rules: Vec<u16>,
    purpose: Why,
    /// Those of them whose earlier keys are searched for too.
    former: Vec<u16>,
    /// What no read can render was deleted.
    swept: bool,
    /// Which of the keys that Redis holds nobody has rendered or touched since the pass began.
    search: Option<SharedSearch>,
    /// Where it has come to is stored.
    resumes: bool,
    began: Instant,
    rows: u64,
    share: f64,
}

/// What a table is read for.
#[derive(Clone, Copy, PartialEq)]
enum Why {
    /// What its rules owe.
    Debt(Debt),
    /// The first of [`Reads::asked`].
    Asked(Purpose),
}

impl Why {
    fn name(self) -> &'static str {
        match self {
            Why::Debt(Debt::Warm) | Why::Asked(Purpose::Warm) => "warm",
            Why::Debt(Debt::Reconcile) => "reconcile",
            Why::Asked(Purpose::Verify { .. }) => "verify",
        }
    }
}

impl Reads {
    /// Nothing is read yet.
    pub(super) fn new(
        config: Arc<Config>,
        postgres: ConnInfo,
        progress: Option<Progress>,
        former: Vec<Former>,
    ) -> Self {
        let now = Instant::now();
        Reads {
            config,
            postgres,
            hasher: CellHasher::default(),
            reading: None,
            asked: VecDeque::new(),
            barrier_passed: false,
            progress,
            former,
            failed: BTreeMap::new(),
            backoff: Backoff::default(),
            not_before: now,
            audited: now,
        }
    }

    /// What the rule made before, if anything of that may be left.
    fn former_of(&self, rule: u16) -> Option<&Former> {
        self.former.get(usize::from(rule)).filter(|former| !former.forms.is_empty())
    }

    /// Nothing of it is left.
    fn take_former(&mut self, rule: u16) -> Claim {
        Claim::Gone(std::mem::take(&mut self.former[usize::from(rule)]).forms)
    }

    /// The oldest transaction that left rows which are being read again.
    pub(super) fn oldest_pending(&self) -> Option<Lsn> {
        self.reading.as_ref()?.rereads.iter().map(|reread| reread.commit_lsn).min()
    }

    /// These rules' keys are to be written again: what an earlier session has written of them was too early.
    pub(super) fn rewrite(&mut self, due: &[(&str, Debt)], debts: &Debts) {
        let of_before = |rule: &String| due.iter().any(|(due, _)| due == rule) && !debts.is_paying(rule);
        self.progress.take_if(|progress| progress.rules.iter().any(of_before));
    }

    /// Somebody wants tables read.
    pub(super) fn ask(&mut self, order: PassOrder) {
        self.take_on(order, false);
    }

    fn take_on(&mut self, order: PassOrder, is_audit: bool) {
        let (totals, unsaid) = (Totals::default(), VecDeque::new());
        self.asked.push_back(Asked { order, tables: None, totals, unsaid, stuck_since: None, is_audit });
    }

    /// Somebody who does not listen any more holds nothing up: neither the slot nor a snapshot.
    fn hang_up_on_the_deaf(&mut self, now: Instant) {
        let Some(asked) = self.asked.front_mut().filter(|asked| asked.unsaid.len() >= REPORTS_MAX) else { return };
        if now.duration_since(*asked.stuck_since.get_or_insert(now)) > HEED_LIMIT {
            tracing::warn!("nobody takes what a pass reports: it ends with the table under way");
            asked.order.reports = mpsc::channel(1).0;
        }
    }

    /// Whether somebody waits for a pass.
    pub(super) fn is_asked(&self) -> bool {
        self.asked.iter().any(|asked| !asked.is_audit)
    }

    /// Whether what is being read for a debt would have to begin anew in another session.
    pub(super) fn would_begin_anew(&self) -> bool {
        let pass = self.reading.as_ref().and_then(|reading| reading.pass.as_ref());
        pass.is_some_and(|pass| matches!(pass.purpose, Why::Debt(_)) && !pass.resumes)
    }

    /// Whether nothing is being read, and nobody has asked for it.
    pub(super) fn is_idle(&self) -> bool {
        let busy = |reading: &Reading| reading.pass.is_some() || !reading.rereads.is_empty();
        self.asked.is_empty() && !self.reading.as_ref().is_some_and(busy)
    }

    /// What queries answer is compared with what the cache holds; `filling` says whether some of that is yet to be written.
    pub(super) fn compare(&mut self, answers: Batch, filling: bool) {
        if let Some(reading) = &mut self.reading {
            reading.head = Some(Head::Answers(answers));
            reading.behind_stream |= filling;
        }
    }

    /// So many keys are not compared.
    pub(super) fn skipped(&mut self, keys: u64) {
        self.asked.front_mut().into_iter().for_each(|asked| asked.totals.skipped += keys);
    }

    /// What a query has just written, or should, is no orphan.
    pub(super) fn spare(&mut self, key: &[u8]) {
        let cell = self.hasher.cell(key, None);
        if let Some(search) = self.pass_mut().and_then(|pass| pass.search.as_ref()) {
            search::lock(search).alive(cell);
        }
    }

    fn pass_mut(&mut self) -> Option<&mut Pass> {
        self.reading.as_mut()?.pass.as_mut()
    }

    /// The stream's own operations up to the marker are on their way to Redis.
    pub(super) fn stream_dispatched(&mut self) {
        if let Some(reading) = &mut self.reading {
            reading.behind_stream = false;
        }
    }

    /// A logical message of keepstep's own; `filling` says whether operations stand before it that are not in Redis.
    pub(super) fn hear(&mut self, content: &[u8], filling: bool) {
        let Some(reading) = &mut self.reading else { return };
        if let Some(chunk) = reader::marked_chunk(content, &reading.token) {
            reading.marked = reading.marked.max(chunk);
            reading.behind_stream |= filling;
        }
    }

    /// The table that is read, for `/status`.
    pub(super) fn status(&self) -> Vec<PassStatus> {
        let pass = self.reading.as_ref().and_then(|reading| reading.pass.as_ref());
        let shown = pass.map(|pass| {
            let names = pass.rules.iter().map(|rule| self.config.rules[usize::from(*rule)].name.value.clone());
            let mut status = PassStatus {
                table: TableName::from(&pass.table.relation).to_string(),
                rules: names.collect(),
                purpose: pass.purpose.name().to_owned(),
                rows_total: pass.rows_total(),
                ..PassStatus::default()
            };
            status.advance(pass.rows, pass.began.elapsed());
            status
        });
        shown.into_iter().collect()
    }

    /// The reader, started if there is none.
    fn reading(&mut self, origin: &crate::cache::checkpoint::Origin) -> Result<&mut Reading> {
        if self.reading.is_none() {
            let random = getrandom::u64().map_err(|error| {
                Error::new(ErrorKind::Io, "the system gives no random numbers, which markers need").because(error)
            })?;
            let token = format!("{random:016x}");
            let limits = super::limits(&self.config);
            let handle = reader::start(Setting {
                postgres: self.postgres.clone(),
                config: Arc::clone(&self.config),
                carrier: Carrier::of(&self.config.postgres),
                origin: origin.clone(),
                redis: self.config.redis.clone(),
                limits,
                rules: self.config.rules.len(),
                hasher: self.hasher.clone(),
                token: token.clone(),
                rows_per_s: self.config.postgres.warm_rate,
            });
            self.reading = Some(Reading {
                handle,
                token,
                marked: 0,
                behind_stream: false,
                chunk: None,
                head: None,
                pass: None,
                rereads: Vec::new(),
                used: Instant::now(),
            });
        }
        Ok(self.reading.as_mut().expect("it was started just now"))
    }
}

impl Pass {
    /// How many rows there are, by what was read so far.
    fn rows_total(&self) -> u64 {
        if self.share > 0.0 { (self.rows as f64 / self.share) as u64 } else { 0 }
    }
}

/// What the session has to see to.
#[expect(clippy::large_enum_variant, reason = "there is one of it")]
pub(super) enum Heard {
    /// From the reader; `None` if it is gone without a word.
    Found(Option<Found>),
    /// Whoever asked can be told something; `None` if nobody listens any more.
    Listener(Option<mpsc::OwnedPermit<Report>>),
}

/// Waits for the next; `finding` says whether the reader may say anything.
pub(super) async fn heard(reads: &mut Reads, finding: bool) -> Heard {
    let Reads { reading, asked, .. } = reads;
    // Whoever asked is told before more is found.
    let heeded = asked.front().is_none_or(|asked| asked.unsaid.len() < REPORTS_MAX);
    tokio::select! {
        biased;
        listener = listener(asked.front()) => Heard::Listener(listener),
        found = found(reading.as_mut()), if finding && heeded => Heard::Found(found),
    }
}

async fn found(reading: Option<&mut Reading>) -> Option<Found> {
    match reading {
        Some(reading) if reading.head.is_none() => reading.handle.found.recv().await,
        _ => std::future::pending().await,
    }
}

/// A place in the channel of whoever asked, while something is to be said.
async fn listener(asked: Option<&Asked>) -> Option<mpsc::OwnedPermit<Report>> {
    match asked.filter(|asked| !asked.unsaid.is_empty()) {
        Some(asked) => asked.order.reports.clone().reserve_owned().await.ok(),
        None => std::future::pending().await,
    }
}

impl<C: Cache + Send + 'static> Session<C> {
    /// Starts what is due, if the stream has come far enough.
    pub(super) fn start_reads(&mut self) -> Result<()> {
        let now = Instant::now();
        if !self.intake.is_past_start() || now < self.reads.not_before {
            return Ok(());
        }
        self.reads.hang_up_on_the_deaf(now);
        self.give_up_overflowed();
        self.give_up_changed();
        self.start_rereads()?;
        if self.reads.pass_mut().is_none() {
            match self.next_pass() {
                Some((pass, job)) => self.start_pass(pass, job)?,
                None => self.rest(now),
            }
        }
        Ok(())
    }

    /// Nothing to do: the audit's turn, or none.
    fn rest(&mut self, now: Instant) {
        let idle = self.reads.is_idle();
        if idle && now.duration_since(self.reads.audited) >= AUDIT_EVERY {
            self.reads.audited = now;
            self.ask_for_audit();
        }
        let unused = |reading: &Reading| now.duration_since(reading.used) > IDLE_LIMIT;
        if idle && self.reads.reading.as_ref().is_some_and(unused) {
            self.reads.reading = None;
            self.intake.forget_touches();
        }
    }

    fn start_rereads(&mut self) -> Result<()> {
        let under_way = self.reads.reading.as_ref().is_some_and(|reading| !reading.rereads.is_empty());
        if under_way || !self.intake.has_rereads() {
            return Ok(());
        }
        let rereads = self.intake.take_rereads(REREADS_AT_A_TIME);
        let table = rereads.first().and_then(|first| self.intake.table(first.relation));
        let Some((table, condition)) = table.and_then(|table| Some((table, condition(table, &rereads)?))) else {
            // The table has another shape by now: all of it is read instead.
            self.intake.overcharge(rereads.iter().map(|reread| reread.rule));
            return Ok(());
        };
        let wanted: BTreeSet<u16> = rereads.iter().map(|reread| reread.rule).collect();
        let table = only(table, |rule| wanted.contains(&rule.rule));
        let reading = self.reads.reading(&self.checkpoint.origin)?;
        reading.rereads = rereads;
        // The channel has room: one job at a time is under way. A reader that has ended says so by itself.
        let _ = reading.handle.rows.try_send(RowsJob { table, condition });
        Ok(())
    }

    /// The stream has touched more meanwhile than can be noted: what was read is given up, so that the stream goes on.
    fn give_up_overflowed(&mut self) {
        if self.intake.overflows() && self.in_flight.is_none() {
            tracing::warn!("too much changed while a table was read: it is read again later");
            self.end_reading();
            self.wait_before_reading();
        }
    }

    /// A table that was bound anew is read anew.
    fn give_up_changed(&mut self) {
        let bound =
            |pass: &Pass| self.intake.table(pass.table.relation.oid).is_some_and(|now| Arc::ptr_eq(now, &pass.table));
        let changed =
            self.reads.reading.as_ref().and_then(|reading| reading.pass.as_ref()).is_some_and(|pass| !bound(pass));
        if changed && self.in_flight.is_none() {
            tracing::info!("a table that is being read has changed its shape: it is read again");
            self.end_reading();
        }
    }

    /// Ends the reader; what it was at is begun again later.
    fn end_reading(&mut self) {
        let Some(reading) = self.reads.reading.take() else { return };
        self.intake.put_back(reading.rereads);
        self.intake.forget_touches();
        let asked_for = reading.pass.filter(|pass| matches!(pass.purpose, Why::Asked(_)));
        if let (Some(pass), Some(asked)) = (asked_for, self.reads.asked.front_mut()) {
            asked.tables.get_or_insert_default().push_front(pass.table.relation.oid);
        }
    }

    fn start_pass(&mut self, pass: Pass, job: TableJob) -> Result<()> {
        let names: Vec<&str> =
            pass.rules.iter().map(|rule| self.config.rules[usize::from(*rule)].name.value.as_str()).collect();
        let table = TableName::from(&pass.table.relation);
        tracing::info!(%table, rules = ?names, "{} begins", pass.purpose.name());
        if matches!(pass.purpose, Why::Debt(_)) {
            names.iter().for_each(|rule| self.debts.begin(rule));
        }
        let reading = self.reads.reading(&self.checkpoint.origin)?;
        reading.pass = Some(pass);
        // The channel has room: one job at a time is under way. A reader that has ended says so by itself.
        let _ = reading.handle.tables.try_send(job);
        Ok(())
    }

    /// Sees to it.
    pub(super) fn heard(&mut self, heard: Heard) -> Result<()> {
        match heard {
            Heard::Found(found) => self.found(found),
            Heard::Listener(listener) => {
                self.say(listener);
                Ok(())
            }
        }
    }

    /// The reader has something to say.
    fn found(&mut self, found: Option<Found>) -> Result<()> {
        let hasher = self.reads.hasher.clone();
        let Some(reading) = &mut self.reads.reading else { return Ok(()) };
        reading.used = Instant::now();
        match found {
            None => {
                self.end_reading();
                self.wait_before_reading();
            }
            Some(Found::Failed(error)) => return self.reading_failed(error),
            Some(Found::Begin(answer)) => {
                self.intake.note_touches(&hasher);
                // A reader that does not listen any more has failed, and says so.
                let _ = answer.send(self.intake.decoded().collect());
            }
            Some(Found::Settled(Of::Table)) => self.sweep_debts(),
            Some(Found::Settled(Of::Rows)) => {}
            Some(Found::Part(answer)) => {
                // A reader that does not listen any more has failed, and says so.
                let _ = answer.send(());
            }
            Some(Found::Orphans(answer)) => {
                self.spare_touched();
                let search = self.reads.pass_mut().and_then(|pass| pass.search.as_ref());
                let orphans = search.is_some_and(|search| search::lock(search).has_orphans());
                // A reader that does not listen any more has failed, and says so.
                let _ = answer.send(orphans);
            }
            Some(Found::Opened(chunk)) => {
                self.spare_touched();
                if let Some(touches) = self.intake.touches() {
                    touches.forget_seen(&chunk.snapshot);
                }
                if let Some(reading) = &mut self.reads.reading {
                    reading.chunk = Some(chunk);
                }
            }
            Some(Found::Piece(batch)) => reading.head = Some(Head::Piece(batch)),
            Some(Found::Candidates(batch)) => reading.head = Some(Head::Candidates(batch)),
            Some(Found::Listed(stale, answer)) => {
                let mut verifies = false;
                for pass in reading.pass.iter_mut() {
                    pass.rows += stale.len() as u64;
                    verifies = matches!(pass.purpose, Why::Asked(Purpose::Verify { .. }));
                }
                stale.iter().for_each(|stale| self.reads.spare(&stale.key));
                match verifies {
                    true => self.compare_all(stale, answer),
                    false => self.read_all(stale, answer),
                }
            }
            Some(Found::Answers(answer)) => self.compare_collected(answer),
            Some(Found::Closed(closed)) => self.closed(&closed),
            Some(Found::Done(Of::Rows)) => {
                reading.rereads.clear();
                if reading.pass.is_none() {
                    self.intake.forget_touches();
                }
            }
            Some(Found::Done(Of::Table)) => self.pass_done(),
        }
        Ok(())
    }

    /// Cells that the stream has decided are no orphans.
    fn spare_touched(&mut self) {
        let search = self.reads.pass_mut().and_then(|pass| pass.search.as_ref());
        if let (Some(touches), Some(search)) = (self.intake.touches(), search) {
            let mut search = search::lock(search);
            touches.cells().for_each(|cell| search.alive(cell));
        }
    }

    /// Keys that rules only delete exist, and are stale, after a gap, and whoever follows a rule's changes has missed some.
    /// What is written by rules that no read can render goes too: when in doubt, invalidate.
    fn sweep_debts(&mut self) {
        self.reads.barrier_passed = true;
        let Some(pass) = self.reads.reading.as_mut().and_then(|reading| reading.pass.as_mut()) else { return };
        if pass.purpose != Why::Debt(Debt::Reconcile) || std::mem::replace(&mut pass.swept, true) {
            return;
        }
        let pass = &*pass;
        // Nothing may have come of the stream yet, and what a rule must hold is in no danger of a tag.
        self.intake.say_claims(&mut self.batch);
        let gap = Transaction {
            commit_lsn: self.reached.lsn,
            commit_time: Timestamp::from_unix_us(report::now_us()),
            ordinal: 0,
            epoch: self.checkpoint.epoch,
            visible: true,
            released: false,
        };
        let owing = self.debts.next(&self.checkpoint.owing);
        let owes = |rule: &&BoundRule| {
            owing.get(&self.config.rules[usize::from(rule.rule)].name.value) == Some(&Debt::Reconcile)
        };
        let mut swept = Vec::new();
        // Where it is known which keys a query has, they are read, and the others searched for.
        let rules = pass.table.rules.iter().filter(|rule| pass.rules.contains(&rule.rule));
        for rule in rules.filter(owes) {
            // Nobody says any more when these are stale.
            let former = self.reads.former.get(usize::from(rule.rule)).into_iter().flat_map(|former| &former.forms);
            let tags = former.filter(|form| form.is_tag()).map(|form| form.pattern(&self.config.redis.prefix));
            tags.for_each(|tags| self.batch.sweep_tags(tags));
            if is_listed(rule) {
                continue;
            }
            let unreadable = rule.write.iter().filter(|_| !is_readable(rule)).map(|write| &write.key);
            let deleted = rule.delete.iter().filter(|_| rule.refresh.is_none());
            unreadable.chain(deleted).for_each(|key| plan::sweep(rule.rule, key, &mut self.batch));
            later::everything(rule, later::GAP, &pass.table, gap, &mut self.batch);
            swept.extend(rule.refresh.iter().map(|refresh| Sweep::Owned(refresh.key.pattern.clone())));
        }
        // They are deleted already: a crash may forget to read them again.
        let stale = self.batch.take_stale();
        self.make_stale(Released { from: self.reached_low, stale, swept });
        self.stand_here();
    }

    /// A chunk of a table is in Redis, or compared.
    fn closed(&mut self, closed: &Closed) {
        let Some(pass) = self.reads.pass_mut() else { return };
        pass.rows += closed.rows;
        pass.share = closed.share;
        let (rows, rows_total, purpose, rules) = (pass.rows, pass.rows_total(), pass.purpose, pass.rules.clone());
        self.metrics.pass_rows_left.set(i64::try_from(rows_total.saturating_sub(rows)).unwrap_or(i64::MAX));
        for rule in &rules {
            let name = &self.config.rules[usize::from(*rule)].name.value;
            self.metrics.warm_rows_total.with_label_values(&[name.as_str()]).inc_by(closed.rows);
        }
        match purpose {
            Why::Debt(Debt::Warm) => {
                let rules = self.names(&rules);
                // Whoever came to owe anew meanwhile is read from the beginning.
                let paying = rules.iter().all(|rule| self.debts.is_paying(rule));
                self.reads.progress = closed.next.filter(|_| paying).map(|from| Progress { rules, from });
            }
            Why::Debt(Debt::Reconcile) => {}
            Why::Asked(_) => {
                if let Some(asked) = self.reads.asked.front_mut() {
                    asked.totals.rows += closed.rows;
                    let rule = |rule: &u16| self.config.rules[usize::from(*rule)].name.value.clone();
                    let said = rules.iter().map(|number| Report::Progress { rule: rule(number), rows, rows_total });
                    asked.unsaid.extend(said);
                }
            }
        }
    }

    /// Everything that was read is in Redis, or compared.
    fn pass_done(&mut self) {
        let Some(pass) = self.reads.reading.as_mut().and_then(|reading| reading.pass.take()) else { return };
        self.intake.forget_touches();
        self.metrics.pass_rows_left.set(0);
        let table = TableName::from(&pass.table.relation);
        tracing::info!(
            %table,
            rows = pass.rows,
            seconds = pass.began.elapsed().as_secs_f64(),
            "{} done",
            pass.purpose.name()
        );
        if let Some(now) = self.next_tables.take() {
            self.go_on_with(now);
        }
        if !matches!(pass.purpose, Why::Debt(_)) {
            return;
        }
        self.reads.progress = None;
        let mut paid = true;
        for rule in &pass.rules {
            let settled = self.debts.settle(&self.config.rules[usize::from(*rule)].name.value);
            paid &= settled;
            if settled && pass.former.contains(rule) {
                self.batch.claim(*rule, self.reads.take_former(*rule));
            }
        }
        match paid {
            true => {
                self.reads.failed.retain(|rule, _| !pass.rules.contains(rule));
                self.reads.backoff.reset();
            }
            // Something went wrong for these rules meanwhile, or they owe anew.
            false => {
                self.reads.failed.extend(pass.rules.iter().map(|rule| (*rule, Instant::now())));
                self.wait_before_reading();
            }
        }
        self.note_progress();
    }

    fn wait_before_reading(&mut self) {
        self.reads.not_before = Instant::now() + self.reads.backoff.next_wait();
    }

    /// The reader could not go on.
    fn reading_failed(&mut self, error: Error) -> Result<()> {
        let asked = self.reads.pass_mut().is_some_and(|pass| matches!(pass.purpose, Why::Asked(_)));
        let rules = self.reads.pass_mut().map(|pass| pass.rules.clone()).unwrap_or_default();
        self.reads.failed.extend(rules.into_iter().map(|rule| (rule, Instant::now())));
        let rereads =
            self.reads.reading.as_mut().map(|reading| std::mem::take(&mut reading.rereads)).unwrap_or_default();
        match error.kind().is_transient() {
            true => self.intake.put_back(rereads),
            // They would never be done, and hold the slot: the rule owes instead.
            false => self.intake.overcharge(rereads.iter().map(|reread| reread.rule)),
        }
        self.end_reading();
        self.wait_before_reading();
        if error.kind().is_transient() {
            tracing::warn!(%error, "reading tables is tried again");
            return Ok(());
        }
        if asked {
            if let Some(asked) = self.reads.asked.front_mut() {
                asked.tables = Some(VecDeque::new());
                asked.unsaid.push_back(Report::Failed { error: error.to_string() });
            }
            return Ok(());
        }
        if self.ends_when_caught_up {
            return Err(error);
        }
        tracing::error!(%error, "tables cannot be read; it is tried again");
        self.shared.update(|status| status.last_error = Some(error.to_string()));
        Ok(())
    }
}

impl Reading {
    /// Whether everything that the chunk sees is in Redis.
    fn may_go(&self) -> bool {
        let marked = self.chunk.as_ref().is_some_and(|chunk| chunk.number <= self.marked);
        (marked || canary::is(Canary::VisibilityOnly)) && !self.behind_stream
    }
}

/// The table with some of its rules.
fn only(table: &BoundTable, wanted: impl Fn(&BoundRule) -> bool) -> BoundTable {
    let rules = table.rules.iter().filter(|rule| wanted(rule)).cloned().collect();
    BoundTable { relation: table.relation.clone(), rules }
}

/// The rows, as an SQL condition; `None` if the table has not these columns any more.
fn condition(table: &BoundTable, rereads: &[Reread]) -> Option<String> {
    let row = |reread: &Reread| {
        let columns = reread.name.iter().map(|(place, value)| {
            let name = sql_identifier(&table.relation.columns.get(*place)?.name);
            Some(match value {
                Some(text) => format!("{name} = {}", literal(text)?),
                None => format!("{name} IS NULL"),
            })
        });
        Some(format!("({})", columns.collect::<Option<Vec<_>>>()?.join(" AND ")))
    };
    Some(rereads.iter().map(row).collect::<Option<Vec<_>>>()?.join(" OR "))
}

/// As SQL wants it, whatever `standard_conforming_strings` says.
fn literal(text: &[u8]) -> Option<String> {
    let text = str::from_utf8(text).ok()?.replace('\'', "''");
    Some(if text.contains('\\') { format!(" E'{}'", text.replace('\\', "\\\\")) } else { format!("'{text}'") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::checkpoint::Page;
    use crate::config::{self, RulesFile};
    use crate::plan::tests::bound;

    fn reads(progress: Option<Progress>) -> Reads {
        let text = "[postgres]\nurl = \"postgresql://db\"\n[redis]\nurl = \"redis://cache\"\n\
                    [rule.row]\ntable = \"public.rows\"\nkey = \"row:{id}\"\nvalue = \"json\"\ncolumns = [\"id\"]\n";
        let file = RulesFile { path: "test.toml".into(), text: text.into() };
        let (config, _) = config::parse(file, &|_| None).expect("a rules file");
        let postgres = ConnInfo::parse("postgresql://user@db", &|_| None).expect("a URL");
        Reads::new(Arc::new(config), postgres, progress, Vec::new())
    }

    #[test]
    fn what_comes_round_again_is_read_from_the_beginning_unless_it_is_being_read() {
        let from = Page { table: 1, leaf: 1, filenode: 1, page: 7 };
        let mut reads = reads(Some(Progress { rules: vec!["row".into(), "other".into()], from }));
        let mut debts = Debts::default();
        reads.rewrite(&[("third", Debt::Warm)], &debts);
        assert!(reads.progress.is_some());
        debts.begin("row");
        reads.rewrite(&[("row", Debt::Warm)], &debts);
        assert!(reads.progress.is_some());
        debts.owe("row", Debt::Warm);
        reads.rewrite(&[("row", Debt::Warm)], &debts);
        assert!(reads.progress.is_none());
    }

    #[tokio::test]
    async fn whoever_takes_no_report_for_long_has_hung_up() {
        let mut reads = reads(None);
        let (reports, listener) = mpsc::channel(1);
        reads.ask(PassOrder { rules: Vec::new(), purpose: Purpose::Warm, filter: None, reports });
        let report = || Report::Progress { rule: "row".into(), rows: 1, rows_total: 2 };
        reads.asked[0].order.reports.try_send(report()).expect("room for one");
        let mut now = Instant::now();
        let mut listens_after = |reads: &mut Reads, passed| {
            now += passed;
            reads.hang_up_on_the_deaf(now);
            !listener.is_closed()
        };
        assert!(listens_after(&mut reads, Duration::ZERO));
        reads.asked[0].unsaid.extend((1..REPORTS_MAX).map(|_| report()));
        assert!(listens_after(&mut reads, 2 * HEED_LIMIT), "there is little to be said");
        reads.asked[0].unsaid.push_back(report());
        assert!(listens_after(&mut reads, 2 * HEED_LIMIT), "there is much only now");
        assert!(listens_after(&mut reads, HEED_LIMIT));
        assert!(!listens_after(&mut reads, Duration::from_millis(1)));
        assert!(matches!(heard(&mut reads, true).await, Heard::Listener(None)));
    }

    #[test]
    fn rows_are_named_in_sql() {
        let table = bound("key = \"r:{id}:{c?none}\"\nvalue = \"json\"\ncolumns = [\"id\"]", &["id", "c"]);
        let reread = |id: &str, c: Option<&str>| Reread {
            relation: 1,
            rule: 0,
            name: vec![(0, Some(id.as_bytes().into())), (1, c.map(|c| c.as_bytes().into()))],
            commit_lsn: Lsn(1),
        };
        let rows = [reread("1", Some("it's")), reread("a\\b", None)];
        assert_eq!(
            condition(&table, &rows).as_deref(),
            Some(r"(id = '1' AND c = 'it''s') OR (id =  E'a\\b' AND c IS NULL)")
        );
        let gone = Reread { name: vec![(7, None)], ..reread("1", None) };
        assert_eq!(condition(&table, &[gone]), None);
    }
}
