//! Keys that are read again, and what becomes of what was read.
//!
//! A result goes into the batch that fills. Nothing but these results is ever written to such a key, and they come one after
//! the other, so there is nothing to be merged with: not with the stream, and not with what is in flight.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::Session;
use super::debts::Debts;
use super::lane::{Asked, Done, Lane};
use super::later::Released;
use crate::batch::{Batch, Form, Life, Sweep};
use crate::cache::Cache;
use crate::cache::checkpoint::{Debt, Origin};
use crate::config::{Config, Query, Rule};
use crate::error::Result;
use crate::model::Lsn;
use crate::plan;
use crate::query::refresh::{Answer, Refresher};
use crate::rules::refresh::Stale;
use crate::source::conninfo::ConnInfo;

/// How many bytes of what is read to be compared are kept at a time. More is not compared.
const COLLECTED_BYTES_MAX: usize = 16 << 20;

/// Reads under way, and what waits for one.
pub(super) struct Refreshes {
    lane: Lane,
    /// Those that read nothing.
    idle: Vec<Refresher>,
    under_way: JoinSet<Read>,
    /// What somebody waits for, and who.
    awaited: Option<Awaited>,
    /// What the tables say of keys that are compared, until somebody writes them.
    collected: HashMap<Box<[u8]>, (Stale, Option<String>)>,
    collected_bytes: usize,
    /// The state of the generator behind TTL jitter.
    random: u64,
}

/// Somebody who goes on once it is done.
struct Awaited {
    what: Until,
    answer: oneshot::Sender<()>,
}

enum Until {
    /// Each of these keys is read, by a read that has begun since (or is yet to), however soon it goes stale again.
    Read(HashMap<Box<[u8]>, bool>),
    /// What was collected is compared: behind changes that the stream has brought before this, and nobody is known to see.
    Compared(Lsn),
}

/// A read that has ended.
pub(super) struct Read {
    refresher: Refresher,
    stale: Stale,
    answer: Result<Answer>,
}

impl Refreshes {
    /// So many keys are read at a time.
    pub(super) fn new(postgres: &ConnInfo, origin: &Origin, connections: usize) -> Self {
        let refresher = || Refresher::new(postgres.clone(), origin.clone());
        let idle = std::iter::repeat_with(refresher).take(connections).collect();
        // Without a source of randomness TTLs are merely shortened alike.
        let random = getrandom::u64().unwrap_or_default();
        Refreshes {
            lane: Lane::default(),
            idle,
            under_way: JoinSet::new(),
            awaited: None,
            collected: HashMap::new(),
            collected_bytes: 0,
            random,
        }
    }

    /// The oldest change that some key is to be read for.
    pub(super) fn oldest(&self) -> Option<Lsn> {
        self.lane.oldest()
    }

    /// The next key to read, if it is the turn of one.
    fn next(&mut self, now: Instant) -> Option<Stale> {
        let stale = self.lane.next(now)?;
        if let Some(Awaited { what: Until::Read(keys), .. }) = &mut self.awaited {
            keys.get_mut(&stale.key).into_iter().for_each(|begun| *begun = true);
        }
        Some(stale)
    }

    /// A read of this key has ended. Whoever waits for it, and for no other any more, hears so.
    fn settle(&mut self, key: &[u8]) {
        let Some(Awaited { what: Until::Read(keys), .. }) = &mut self.awaited else { return };
        // What is not stale any more has failed, and is tried again by itself.
        if keys.get(key) == Some(&true) || !self.lane.is_stale(key) {
            keys.remove(key);
            self.answer();
        }
    }

    /// Whoever waits hears so, unless some key is yet to be read.
    pub(super) fn answer(&mut self) {
        let unread = |what: &Until| matches!(what, Until::Read(keys) if !keys.is_empty());
        if let Some(Awaited { answer, .. }) = self.awaited.take_if(|awaited| !unread(&awaited.what)) {
            // A reader that does not listen any more has failed, and says so.
            let _ = answer.send(());
        }
    }

    /// Whether what was collected may be compared; `oldest` is the oldest change that nobody is known to see.
    pub(super) fn may_compare(&self, oldest: Option<Lsn>) -> bool {
        match self.awaited {
            Some(Awaited { what: Until::Compared(at), .. }) => oldest.is_none_or(|oldest| oldest >= at),
            _ => true,
        }
    }

    /// Whether nobody has written the key since it was read to be compared.
    pub(super) fn is_collected(&self, key: &[u8]) -> bool {
        self.collected.contains_key(key)
    }

    /// What was collected is compared no more.
    fn forget_collected(&mut self) {
        self.collected.clear();
        self.collected_bytes = 0;
    }

    /// How many keys are stale.
    pub(super) fn stale(&self) -> usize {
        self.lane.stale()
    }
}

/// Waits until something was read, or it is the turn of a key; `full` says that there is no room for what was read.
pub(super) async fn read(refreshes: &mut Refreshes, full: bool) -> Option<Read> {
    let Refreshes { lane, idle, under_way, .. } = refreshes;
    let turn = lane.wake_at().filter(|_| !idle.is_empty());
    tokio::select! {
        biased;
        Some(read) = under_way.join_next(), if !full => match read {
            Ok(read) => Some(read),
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        },
        () = tokio::time::sleep_until(turn.unwrap_or_else(Instant::now).into()), if turn.is_some() => None,
        else => std::future::pending().await,
    }
}

impl<C: Cache + Send + 'static> Session<C> {
    /// What was released says of these keys that they are stale.
    pub(super) fn make_stale(&mut self, released: Released) {
        let Released { from, stale, swept } = released;
        swept.iter().for_each(|sweep| self.refreshes.lane.swept(sweep, from));
        if !swept.is_empty() {
            self.refreshes.forget_collected();
        }
        self.owe_swept(&swept);
        self.ask_lane(stale, from);
    }

    /// All these keys are read; whoever lists them waits for it.
    pub(super) fn read_all(&mut self, stale: Vec<Stale>, answer: oneshot::Sender<()>) {
        // No key goes out before it is recorded what it looks like.
        self.intake.say_claims(&mut self.batch);
        let keys: Vec<Box<[u8]>> = stale.iter().map(|stale| stale.key.clone()).collect();
        self.ask_lane(stale, self.reached_low);
        let keys = keys.into_iter().filter(|key| self.refreshes.lane.is_stale(key)).map(|key| (key, false)).collect();
        self.refreshes.awaited = Some(Awaited { what: Until::Read(keys), answer });
        self.refreshes.forget_collected();
        self.refreshes.answer();
    }

    /// All these keys are read and compared with what the cache holds; whoever lists them waits for it.
    pub(super) fn compare_all(&mut self, stale: Vec<Stale>, answer: oneshot::Sender<()>) {
        let now = Instant::now();
        let mut keys = HashMap::new();
        let mut skipped = 0;
        for stale in stale {
            let key = stale.key.clone();
            // What time changes differs whenever it is looked at.
            let compared = stale.query.every.is_none() && self.refreshes.lane.compare(stale, now);
            if compared { _ = keys.insert(key, false) } else { skipped += 1 }
        }
        self.reads.skipped(skipped);
        self.refreshes.forget_collected();
        self.refreshes.awaited = Some(Awaited { what: Until::Read(keys), answer });
        self.refreshes.answer();
    }

    /// What was collected is compared, once what it saw and the stream has just brought has come to the lane.
    pub(super) fn compare_collected(&mut self, answer: oneshot::Sender<()>) {
        self.refreshes.awaited = Some(Awaited { what: Until::Compared(self.received), answer });
        let collected = std::mem::take(&mut self.refreshes.collected);
        if collected.is_empty() {
            return self.refreshes.answer();
        }
        let mut batch = Batch::new(super::limits(&self.config), self.config.rules.len());
        for (stale, value) in collected.values() {
            let cell = batch.cell(stale.rule, |out| {
                out.extend_from_slice(&stale.key);
                true
            });
            let Some((cell, value)) = cell.zip(value.as_ref()) else { continue };
            let life = stale
                .query
                .ttl
                .map_or(Life::Forever, |(ttl, _)| Life::Ms(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX)));
            let set = batch.set(cell, Form::String, life, false, |out| {
                out.extend_from_slice(value.as_bytes());
                Ok::<_, std::convert::Infallible>(())
            });
            let Ok(()) = set;
        }
        self.refreshes.collected = collected;
        // What was written before it was read may still stand in the batch that fills.
        let filling = !self.batch.is_empty();
        self.reads.compare(batch, filling);
    }

    /// What was compared is not what the cache holds: it is read again, and written.
    pub(super) fn repair(&mut self, keys: &[Box<[u8]>]) {
        let stale = keys.iter().filter_map(|key| Some(self.refreshes.collected.remove(key)?.0)).collect();
        self.ask_lane(stale, self.reached_low);
    }

    /// Where it is known which keys a query has, those that were swept are written anew.
    fn owe_swept(&mut self, swept: &[Sweep]) {
        for sweep in swept {
            let Sweep::Owned(pattern) = sweep else { continue };
            let refreshed = self.intake.tables().flat_map(|table| &table.rules);
            let refreshed = refreshed.filter_map(|rule| rule.refresh.as_ref());
            let hit = refreshed.filter(|refresh| refresh.key.pattern.common_key(pattern).is_some());
            hit.for_each(|refresh| owe(&self.config, &mut self.debts, &refresh.query));
        }
    }

    fn ask_lane(&mut self, stale: Vec<Stale>, from: Lsn) {
        let now = Instant::now();
        for stale in stale {
            let key = stale.key.clone();
            self.refreshes.collected.remove(&key);
            let (rule, query) = (stale.rule, Arc::clone(&stale.query));
            if self.refreshes.lane.ask(stale, from, now) == Asked::NoRoom {
                self.count_refresh(&query.name.value, "crowded_out");
                self.delete_stale(rule, &key);
                owe(&self.config, &mut self.debts, &query);
                self.stand_here();
            }
        }
    }

    /// Reads what may be read by now.
    pub(super) fn start_refreshes(&mut self) {
        let now = Instant::now();
        while let Some(mut refresher) = self.refreshes.idle.pop() {
            let Some(stale) = self.refreshes.next(now) else {
                self.refreshes.idle.push(refresher);
                return;
            };
            self.refreshes.under_way.spawn(async move {
                let answer = refresher.read(&stale).await;
                Read { refresher, stale, answer }
            });
        }
    }

    /// Writes what was read; nothing if it is merely the turn of the next key.
    pub(super) fn refreshed(&mut self, read: Option<Read>) -> Result<()> {
        let Some(Read { refresher, stale, answer }) = read else { return Ok(()) };
        self.refreshes.idle.push(refresher);
        let query = Arc::clone(&stale.query);
        let name = query.name.value.as_str();
        if self.refreshes.lane.compares(&stale.key) {
            let answer = answer.inspect_err(|error| tracing::warn!(query = name, %error, "a key cannot be compared"));
            let value = match answer {
                Ok(Answer::Value(value)) => Some(Some(value)),
                Ok(Answer::Nothing | Answer::TooLarge) => Some(None),
                Err(_) => None,
            };
            let key = stale.key.clone();
            // What is merely compared is never given up.
            let _ = self.refreshes.lane.done(&key, value.is_some(), Instant::now());
            let len = value.as_ref().and_then(Option::as_ref).map_or(0, String::len);
            match value.filter(|_| self.refreshes.collected_bytes + len <= COLLECTED_BYTES_MAX) {
                Some(value) => {
                    self.refreshes.collected_bytes += len;
                    self.refreshes.collected.insert(key.clone(), (stale, value));
                }
                None => self.reads.skipped(1),
            }
            self.refreshes.settle(&key);
            return Ok(());
        }
        let failed = match answer {
            Ok(Answer::Value(value)) => {
                self.count_refresh(name, "written");
                self.write_stale(&stale, value.as_bytes());
                None
            }
            Ok(Answer::Nothing) => {
                self.count_refresh(name, "deleted");
                self.delete_stale(stale.rule, &stale.key);
                None
            }
            Ok(Answer::TooLarge) => {
                self.count_refresh(name, "too_large");
                tracing::warn!(query = name, "a result is larger than 8 MiB: its key is deleted");
                self.delete_stale(stale.rule, &stale.key);
                None
            }
            Err(error) => {
                self.count_refresh(name, "failed");
                tracing::warn!(query = name, %error, "the query fails: the key is deleted, and it is tried again");
                self.delete_stale(stale.rule, &stale.key);
                Some(error)
            }
        };
        let done = self.refreshes.lane.done(&stale.key, failed.is_none(), Instant::now());
        self.refreshes.settle(&stale.key);
        self.stand_here();
        if done == Done::GivenUp {
            owe(&self.config, &mut self.debts, &query);
            // It would be read again and again, and never be caught up.
            return failed.filter(|_| self.ends_when_caught_up).map_or(Ok(()), Err);
        }
        Ok(())
    }

    fn write_stale(&mut self, stale: &Stale, value: &[u8]) {
        let life = match stale.query.ttl {
            Some((ttl, jitter)) => Life::Ms(plan::jittered(ttl.as_millis(), jitter, &mut self.refreshes.random)),
            None => Life::Forever,
        };
        let cell = self.batch.cell(stale.rule, |out| {
            out.extend_from_slice(&stale.key);
            true
        });
        let Some(cell) = cell else { return };
        self.reads.spare(&stale.key);
        let written = self.batch.set(cell, Form::String, life, false, |out| {
            out.extend_from_slice(value);
            Ok::<_, std::convert::Infallible>(())
        });
        let Ok(()) = written;
    }

    fn delete_stale(&mut self, rule: u16, key: &[u8]) {
        let cell = self.batch.cell(rule, |out| {
            out.extend_from_slice(key);
            true
        });
        cell.into_iter().for_each(|cell| self.batch.delete(cell));
    }

    fn count_refresh(&self, query: &str, outcome: &str) {
        self.metrics.refreshes_total.with_label_values(&[query, outcome]).inc();
    }
}

/// The rule that answers for all keys of the query owes them, if it is known which they are.
fn owe(config: &Config, debts: &mut Debts, query: &Arc<Query>) {
    let of_query = |rule: &&Rule| rule.refresh.as_ref().is_some_and(|of_rule| Arc::ptr_eq(of_rule, query));
    let lists = config.rules.iter().filter(of_query).find(|rule| rule.lists);
    lists.into_iter().for_each(|rule| debts.owe(&rule.name.value, Debt::Warm));
}
