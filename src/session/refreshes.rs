//! Keys that are read again, and what becomes of what was read.
//!
//! A result goes into the batch that fills. Nothing but these results is ever written to such a key, and they come one after
//! the other, so there is nothing to be merged with: not with the stream, and not with what is in flight.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::Session;
use super::lane::{Asked, Lane};
use super::later::Released;
use crate::batch::{Form, Life};
use crate::cache::Cache;
use crate::cache::checkpoint::Origin;
use crate::error::Result;
use crate::model::Lsn;
use crate::plan;
use crate::query::refresh::{Answer, Refresher};
use crate::rules::refresh::Stale;
use crate::source::conninfo::ConnInfo;

/// Reads under way, and what waits for one.
pub(super) struct Refreshes {
    lane: Lane,
    /// Those that read nothing.
    idle: Vec<Refresher>,
    under_way: JoinSet<Read>,
    permits: Arc<Semaphore>,
    /// The state of the generator behind TTL jitter.
    random: u64,
}

/// A read that has ended.
pub(super) struct Read {
    refresher: Refresher,
    stale: Stale,
    answer: Result<Answer>,
}

impl Refreshes {
    /// So many keys are read at a time.
    pub(super) fn new(postgres: &ConnInfo, origin: &Origin, connections: usize, permits: Arc<Semaphore>) -> Self {
        let refresher = || Refresher::new(postgres.clone(), origin.clone());
        let idle = std::iter::repeat_with(refresher).take(connections).collect();
        // Without a source of randomness TTLs are merely shortened alike.
        let random = getrandom::u64().unwrap_or_default();
        Refreshes { lane: Lane::default(), idle, under_way: JoinSet::new(), permits, random }
    }

    /// The oldest change that some key is to be read for.
    pub(super) fn oldest(&self) -> Option<Lsn> {
        self.lane.oldest()
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
        let now = Instant::now();
        for stale in stale {
            let key = stale.key.clone();
            let (rule, query) = (stale.rule, Arc::clone(&stale.query));
            if self.refreshes.lane.ask(stale, from, now) == Asked::NoRoom {
                self.count_refresh(&query.name.value, "crowded_out");
                self.delete_stale(rule, &key);
            }
        }
    }

    /// Reads what may be read by now.
    pub(super) fn start_refreshes(&mut self) {
        let Refreshes { lane, idle, under_way, permits, .. } = &mut self.refreshes;
        let now = Instant::now();
        while let Some(mut refresher) = idle.pop() {
            let Some(stale) = lane.next(now) else {
                idle.push(refresher);
                return;
            };
            let permits = Arc::clone(permits);
            under_way.spawn(async move {
                // Nobody closes it.
                let _permit = permits.acquire().await;
                let answer = refresher.read(&stale).await;
                Read { refresher, stale, answer }
            });
        }
    }

    /// Writes what was read; nothing if it is merely the turn of the next key.
    pub(super) fn refreshed(&mut self, read: Option<Read>) {
        let Some(Read { refresher, stale, answer }) = read else { return };
        self.refreshes.idle.push(refresher);
        let query = Arc::clone(&stale.query);
        let name = query.name.value.as_str();
        let went_well = match answer {
            Ok(Answer::Value(value)) => {
                self.count_refresh(name, "written");
                self.write_stale(&stale, value.as_bytes());
                true
            }
            Ok(Answer::Nothing) => {
                self.count_refresh(name, "deleted");
                self.delete_stale(stale.rule, &stale.key);
                true
            }
            Ok(Answer::TooLarge) => {
                self.count_refresh(name, "too_large");
                tracing::warn!(query = name, "a result is larger than 8 MiB: its key is deleted");
                self.delete_stale(stale.rule, &stale.key);
                true
            }
            Err(error) => {
                self.count_refresh(name, "failed");
                tracing::warn!(query = name, %error, "the query fails: the key is deleted, and it is tried again");
                self.delete_stale(stale.rule, &stale.key);
                false
            }
        };
        self.refreshes.lane.done(&stale.key, went_well, Instant::now());
        self.stand_here();
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
