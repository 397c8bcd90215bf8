//! The outbox: rows that triggers wrote (`sql/outbox.sql`), read as the protocol that is decoded anyway.
//!
//! A **drain** is what one snapshot sees and the one before did not, in the order of the rows' ids; it comes as one
//! transaction, at the log position that was the end of the log just after its snapshot was taken. No cursor over ids or
//! transaction ids: those skip what commits late. What lies between two snapshots is the same whoever reads it and when, so a
//! drain can be read again, page by page, for as long as its rows are there, and no snapshot is held for it. The checkpoint has
//! snapshots since `low`: after a crash the same rows come again, in drains with the same positions where anything of them may not
//! be in the cache yet; of older ones several come as one, so that they stay few however long `low` stands.
//!
//! A drain is handed out only once the log is flushed up to its position: what a crash of the server could take back is not
//! in it.
//!
//! A task of its own (`drainer`) has the connection, and holds the advisory lock that makes it the only one. With the
//! connection goes the lock, and the session.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::conninfo::ConnInfo;
use super::replication::SystemIdentity;
use super::slot::SlotState;
use super::{Frame, query_error};
use crate::catalog::sql_identifier;
use crate::error::{Error, ErrorKind, Result};
use crate::model::{Lsn, ReplicaIdentity, Snapshot};

use drainer::Part;

pub mod encode;

mod drainer;

/// How many drains that are done with are kept apart. With more, every two of them would come again as one.
const DRAINS_MAX: usize = 64;
/// How many parts of what was read wait for the session.
const PARTS_MAX: usize = 2;
/// How long [`Outbox::close`] waits for the last words.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);
/// How many steps it takes to empty both halves of an outbox.
const ROTATIONS_MAX: usize = 3;
/// The first half of the advisory lock's key; the other is the schema's OID.
const LOCK_CLASS: i32 = 0x6b65_6570;

/// The end of a drain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// Its position: behind everything in it, and before everything in the next one.
    pub lsn: Lsn,
    /// What it has seen.
    pub snapshot: Snapshot,
}

/// What a stream of the outbox needs to know.
#[derive(Clone, Debug)]
pub struct Setting {
    /// Where it is.
    pub postgres: ConnInfo,
    /// Its schema.
    pub schema: String,
    /// How long it may be left alone.
    pub poll_interval: Duration,
    /// Whoever writes to it wakes the one who sleeps.
    pub notify: bool,
}

/// The session's end of a stream of the outbox.
#[derive(Debug)]
pub struct Outbox {
    parts: mpsc::Receiver<Result<Part>>,
    /// What is being handed out.
    part: Option<Part>,
    /// How much of it was: of its frames so many bytes.
    handed: usize,
    drains: Vec<Drain>,
    told: watch::Sender<Told>,
    task: JoinHandle<Result<()>>,
}

/// What the drainer is told.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    acknowledged: Lsn,
    /// What was drained up to here is done with, wherever a restart would begin.
    done: Lsn,
    ends: bool,
}

impl Outbox {
    /// Takes the lock, and streams what lies behind `from`: first those of `drains` that do, then what comes. Of what was
    /// drained before nothing is known but the last of `drains` up to `from`; without one everything that is there comes.
    ///
    /// # Errors
    /// [`ErrorKind::Fenced`] while somebody else has the lock; what Postgres says otherwise.
    pub async fn start(setting: Setting, drains: &[Drain], from: Lsn) -> Result<Self> {
        let (before, again): (Vec<&Drain>, Vec<&Drain>) = drains.iter().partition(|drain| drain.lsn <= from);
        let base = match before.last() {
            Some(base) => Drain::clone(base),
            None if again.is_empty() => Drain { lsn: from, snapshot: Snapshot::of_nothing() },
            None => {
                return Err(Error::new(ErrorKind::Protocol, "the checkpoint does not say what came before its drains"));
            }
        };
        Self::begin(setting, Some(base), again.into_iter().cloned().collect()).await
    }

    /// The same from now on, and without the lock: for looking without touching.
    ///
    /// # Errors
    /// What Postgres says.
    pub async fn watch(setting: Setting) -> Result<Self> {
        Self::begin(setting, None, Vec::new()).await
    }

    async fn begin(setting: Setting, base: Option<Drain>, again: Vec<Drain>) -> Result<Self> {
        let (sender, parts) = mpsc::channel(PARTS_MAX);
        let (told, heard) = watch::channel(Told::default());
        let drainer = drainer::Drainer::open(setting, base, sender, heard).await?;
        let drains = vec![drainer.base().clone()];
        let task = tokio::spawn(drainer.run(again));
        Ok(Outbox { parts, part: None, handed: 0, drains, told, task })
    }

    /// See [`super::Source::fill`].
    pub(super) async fn fill(&mut self) -> Result<()> {
        let ended = || Err(Error::new(ErrorKind::PostgresAway, "the outbox is not read any more"));
        self.part = Some(self.parts.recv().await.unwrap_or_else(ended)?);
        self.handed = 0;
        Ok(())
    }

    /// See [`super::Source::next_buffered`].
    pub(super) fn next_buffered(&mut self) -> Option<Frame<'_>> {
        match self.part.as_ref()? {
            Part::Frames(frames, lsn) => {
                let (body, next) = frames.at(self.handed)?;
                self.handed = next;
                Some(Frame::Data { wal_start: *lsn, wal_end: *lsn, body })
            }
            _ if std::mem::replace(&mut self.handed, 1) > 0 => None,
            Part::Begins(drain) => {
                self.drains.push(drain.clone());
                Some(Frame::Visible(&drain.snapshot))
            }
            Part::Idle(lsn) => Some(Frame::Keepalive { wal_end: *lsn, reply_requested: false }),
        }
    }

    /// See [`super::Source::drains`].
    pub(super) fn drains(&mut self, low: Lsn, done: Lsn) -> Vec<Drain> {
        thin(&mut self.drains, low, done);
        self.told.send_if_modified(|told| std::mem::replace(&mut told.done, done) != done);
        self.drains.clone()
    }

    /// Rows of drains up to here may go.
    pub(super) fn acknowledge(&mut self, flushed: Lsn) {
        self.told.send_if_modified(|told| std::mem::replace(&mut told.acknowledged, flushed) != flushed);
    }

    /// See [`super::Source::close`].
    pub(super) async fn close(&mut self, flushed: Lsn) -> Result<()> {
        self.told.send_modify(|told| (told.acknowledged, told.ends) = (flushed, true));
        // It may be waiting for somebody to take what it has read.
        self.parts.close();
        let silent = || Error::new(ErrorKind::PostgresAway, "the connection that reads the outbox did not end");
        let ended = tokio::time::timeout(CLOSE_LIMIT, &mut self.task).await.map_err(|_| silent())?;
        ended.unwrap_or_else(|_| Err(silent()))
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        // With the task goes its connection, and with that the lock.
        self.task.abort();
    }
}

/// What has to be known to begin again at `low`: the last drain up to there, and those behind it. What is `done` is left out when
/// it comes again, whatever its positions are then: so two drains up to there may come as one.
fn thin(drains: &mut Vec<Drain>, low: Lsn, done: Lsn) {
    let before = drains.partition_point(|drain| drain.lsn <= low);
    drains.drain(..before.saturating_sub(1));
    let done = drains.partition_point(|drain| drain.lsn <= done);
    if done > DRAINS_MAX {
        let mut place = 0..done;
        drains.retain(|_| place.next().is_none_or(|place| place % 2 == 0 || place + 1 == done));
    }
}

/// What is known of an outbox before it is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Where the log ended when it was made.
    pub made: Lsn,
    /// Up to here the rows of drains may be gone.
    pub confirmed: Lsn,
    /// Who reads it.
    pub holder: Option<i32>,
    /// How much room it takes up.
    pub bytes: u64,
    /// Changes each time that rows could not be written.
    pub gap: i64,
    /// The end of the server's durable log.
    pub flushed: Lsn,
    /// Its positions are another server's: it came here in a dump, or what it says is newer than the server.
    pub is_foreign: bool,
    database: String,
}

impl State {
    /// As what it stands in for; with another `gap` than was `known`, something is missing from it.
    pub fn as_slot(&self, schema: &str, known: Option<i64>) -> SlotState {
        let lost = match known.is_some_and(|known| known != self.gap) {
            _ if self.is_foreign => Some("comes from another server, or from a later time of this one"),
            true => Some("was full, and changes were left out"),
            false => None,
        };
        SlotState {
            name: schema.to_owned(),
            plugin: Some("pgoutput".to_owned()),
            database: Some(self.database.clone()),
            active_pid: self.holder,
            restart_lsn: None,
            confirmed_flush_lsn: Some(self.confirmed),
            wal_status: None,
            safe_wal_size: None,
            retained_bytes: Some(self.bytes),
            invalidation_reason: lost.map(str::to_owned),
            failover: false,
        }
    }
}

/// Looks at an outbox; `None` if there is none.
///
/// # Errors
/// [`ErrorKind::PostgresAway`] when the connection breaks.
pub async fn state(client: &Client, schema: &str) -> Result<Option<State>> {
    let doing = "cannot read the outbox's state";
    let failed = |error| query_error(doing, error);
    let exists = "select n.oid::int8 from pg_catalog.pg_namespace n
        join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = 'outbox' where n.nspname = $1";
    if client.query_typed_opt(exists, &[(&schema, Type::TEXT)]).await.map_err(failed)?.is_none() {
        return Ok(None);
    }
    let sql = format!(
        "select s.made_lsn::text, s.confirmed_lsn::text, g.last_value + g.is_called::int,
            pg_catalog.pg_table_size('{name}.outbox_0') + pg_catalog.pg_table_size('{name}.outbox_1'),
            (select l.pid from pg_catalog.pg_locks l join pg_catalog.pg_namespace n on n.oid = l.objid
              where l.locktype = 'advisory' and l.classid = {LOCK_CLASS} and l.objsubid = 2 and n.nspname = $1
                and l.database = (select oid from pg_catalog.pg_database where datname = current_database())
              limit 1),
            current_database()::text, pg_catalog.pg_current_wal_flush_lsn()::text,
            s.system is distinct from (select system_identifier from pg_catalog.pg_control_system())
              or s.confirmed_lsn > pg_catalog.pg_current_wal_insert_lsn()
           from {name}.state s, {name}.gap g",
        name = sql_identifier(schema)
    );
    let row = client.query_typed_one(&sql, &[(&schema, Type::TEXT)]).await.map_err(failed)?;
    Ok(Some(State {
        made: lsn(row.try_get(0).map_err(failed)?)?,
        confirmed: lsn(row.try_get(1).map_err(failed)?)?,
        gap: row.try_get(2).map_err(failed)?,
        bytes: row.try_get::<_, i64>(3).map_err(failed)?.unsigned_abs(),
        holder: row.try_get(4).map_err(failed)?,
        database: row.try_get(5).map_err(failed)?,
        flushed: lsn(row.try_get(6).map_err(failed)?)?,
        is_foreign: row.try_get(7).map_err(failed)?,
    }))
}

/// Begins anew in an outbox that misses something: nothing of what is in it counts. Gives where.
///
/// # Errors
/// [`ErrorKind::Fenced`] while somebody reads it; what Postgres says otherwise.
pub async fn renew(client: &Client, schema: &str) -> Result<Drain> {
    let failed = |error| query_error("cannot empty the outbox", error);
    let sql = format!("select lsn::text, snapshot::text from {}.renew()", sql_identifier(schema));
    let Some(row) = client.query_typed_opt(&sql, &[]).await.map_err(failed)? else { return Err(taken(schema)) };
    Ok(Drain { lsn: lsn(row.try_get(0).map_err(failed)?)?, snapshot: snapshot(row.try_get(1).map_err(failed)?)? })
}

fn taken(schema: &str) -> Error {
    Error::new(ErrorKind::Fenced, format!("another daemon, or one that just ended, reads outbox `{schema}`"))
}

/// What IDENTIFY_SYSTEM says, from a connection that is none of replication.
///
/// # Errors
/// [`ErrorKind::PostgresAway`] when the connection breaks.
pub async fn identify_system(client: &Client) -> Result<SystemIdentity> {
    let failed = |error| query_error("cannot identify the Postgres server", error);
    let sql = "select (select system_identifier::text from pg_catalog.pg_control_system()),
        left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8),
        pg_catalog.pg_current_wal_flush_lsn()::text, current_database()::text";
    let row = client.query_typed_one(sql, &[]).await.map_err(failed)?;
    let timeline: &str = row.try_get(1).map_err(failed)?;
    Ok(SystemIdentity {
        system: row.try_get(0).map_err(failed)?,
        timeline: u32::from_str_radix(timeline, 16).map_err(|_| nonsense())?,
        flush_lsn: lsn(row.try_get(2).map_err(failed)?)?,
        database: row.try_get(3).map_err(failed)?,
    })
}

/// What old images hold, in the words of replication.
pub(crate) fn identity(is_full: bool, columns: &[String]) -> ReplicaIdentity {
    match (is_full, columns) {
        (true, _) => ReplicaIdentity::Full,
        (false, []) => ReplicaIdentity::Nothing,
        (false, _) => ReplicaIdentity::Index,
    }
}

fn lsn(text: &str) -> Result<Lsn> {
    text.parse().map_err(|_| nonsense())
}

fn snapshot(text: &str) -> Result<Snapshot> {
    text.parse().map_err(|_| nonsense())
}

fn nonsense() -> Error {
    Error::new(ErrorKind::Protocol, "Postgres answered a question about the outbox with something else")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drains(lsns: impl IntoIterator<Item = u64>) -> Vec<Drain> {
        lsns.into_iter().map(|lsn| Drain { lsn: Lsn(lsn), snapshot: Snapshot::of_nothing() }).collect()
    }

    fn thinned(mut list: Vec<Drain>, low: u64, done: u64) -> Vec<u64> {
        thin(&mut list, Lsn(low), Lsn(done));
        list.iter().map(|drain| drain.lsn.0).collect()
    }

    #[test]
    fn the_last_drain_before_the_beginning_and_all_behind_it_are_kept() {
        assert_eq!(thinned(drains([10, 20, 30]), 5, 5), [10, 20, 30]);
        assert_eq!(thinned(drains([10, 20, 30]), 20, 25), [20, 30]);
        assert_eq!(thinned(drains([10, 20, 30]), 29, 30), [20, 30]);
        assert_eq!(thinned(drains([10, 20, 30]), 99, 99), [30]);
    }

    #[test]
    fn however_long_the_beginning_stands_few_are_kept_and_what_is_not_done_stays_apart() {
        let mut list = drains([1]);
        for lsn in 2..10_000 {
            list.extend(drains([lsn]));
            let done = lsn.saturating_sub(5);
            thin(&mut list, Lsn(1), Lsn(done));
            let kept: Vec<u64> = list.iter().map(|drain| drain.lsn.0).collect();
            assert!(kept.len() <= DRAINS_MAX + 5 && kept[0] == 1, "{kept:?}");
            assert!(kept.ends_with(&(done.max(1)..=lsn).collect::<Vec<_>>()), "{kept:?}");
        }
        let kept = thinned(list, 5_000, 9_990);
        assert!(kept[0] <= 5_000 && kept[1] > 5_000, "{kept:?}");
    }
}
