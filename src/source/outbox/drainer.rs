//! The task that reads the outbox: drain after drain, and between two of them it removes what is not needed any more.
//!
//! After a drain with rows the next one follows at once. With nothing to read it looks again at short intervals for a moment,
//! then declares itself asleep, looks once more (somebody may have committed in between), and waits to be woken. A writer
//! that began before that wakes nobody: for it there is `poll_interval`.

use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use tokio::sync::{mpsc, watch};
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row, RowStream, Statement};

use super::encode::{self, Frames, Shape};
use super::{Drain, LOCK_CLASS, ROTATIONS_MAX, Setting, Told, lsn, nonsense, snapshot, taken};
use crate::catalog::sql_identifier;
use crate::error::{Error, ErrorKind, Result};
use crate::model::{Column, Lsn, Relation, Snapshot, Timestamp, Xid};
use crate::source::client::{self, Woken};
use crate::source::query_error;
use crate::source::slot::MESSAGE_PREFIX;

/// No statement takes longer; one that reads waits for whoever takes what it has read.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(300);
/// How many rows are read at once; a drain with more is read through a cursor, so many at a time.
const PAGE_ROWS: usize = 1000;
/// How large a part may grow, but for its last row.
const PART_BYTES: usize = 256 << 10;
/// How long it says nothing to the server, and a cursor's snapshot is held while nobody takes what was read; at most.
const HOLD_LIMIT: Duration = Duration::from_secs(20);
/// How long it stays awake behind the last row, and how often it looks meanwhile.
const AWAKE: Duration = Duration::from_millis(50);
const AWAKE_PAUSE: Duration = Duration::from_millis(2);
/// Drains lie so much further apart the longer the oldest has not been done with: by this part of that time. So their number
/// grows with its logarithm, however long Redis is away, and nothing waits for long once it is not.
const APART: u32 = 64;
/// So many drains with rows in a row, and being woken is not worth a writer's while.
const BUSY_DRAINS: u32 = 20;
/// How often what was read is removed, and how long types may have been others before that is noticed.
const REMOVE_EVERY: Duration = Duration::from_secs(1);
/// How many drains are remembered until they are acknowledged, and how far apart they are then.
const UNACKNOWLEDGED_MAX: usize = 4096;
const UNACKNOWLEDGED_APART: Duration = Duration::from_millis(500);

/// What the session takes at once.
#[derive(Debug)]
pub(super) enum Part {
    /// A drain begins.
    Begins(Drain),
    /// What is in it, and where it is.
    Frames(Frames, Lsn),
    /// Nothing has changed up to here.
    Idle(Lsn),
}

pub(super) struct Drainer {
    setting: Setting,
    /// The schema, in SQL.
    schema: String,
    client: Client,
    woken: Woken,
    parts: mpsc::Sender<Result<Part>>,
    told: watch::Receiver<Told>,
    boundary: Statement,
    page: Statement,
    shapes: HashMap<i32, Shape>,
    /// Places in them that may hold values of a type that the table did not have then.
    retyped: HashMap<i32, Vec<i16>>,
    /// Those that were described in the stream, and those that tables have now.
    described: HashMap<u32, i32>,
    present: HashMap<u32, i32>,
    /// Whether anything is written: it has the lock.
    owns: bool,
    /// How long the server would do without a word from here; it hears one three times as often.
    beat: Duration,
    /// The last drain.
    at: Drain,
    /// Nothing up to here will be said again.
    said: Lsn,
    asleep: bool,
    busy: u32,
    rows_at: Instant,
    /// Drains that are not done with, and when the last one began.
    undone: VecDeque<(Instant, Lsn)>,
    drained_at: Instant,
    unacknowledged: VecDeque<(Instant, Drain)>,
    removed_at: Instant,
    /// What was read up to here may still be there, and need not be.
    unremoved: Option<Snapshot>,
}

/// How far the reading of a drain has come.
struct Progress {
    /// The last row's `id` and `xid`, which no other row has.
    last: [String; 2],
    /// The transaction that the stream is in.
    xid: Option<Xid>,
    /// When it began.
    time: Timestamp,
    frames: Frames,
}

/// How the rows of one query went.
enum Taken {
    /// There are no more.
    End,
    /// As many as were asked for.
    More,
    /// Nobody took what was read in time; the rest was not read.
    Held,
    /// Nor was it behind a row of a shape that is not known yet.
    Unknown(i32),
}

/// Why it ends.
pub(super) enum Stop {
    /// Nobody listens any more, or the end was asked for.
    Asked,
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Failed(error)
    }
}

type Outcome<T> = std::result::Result<T, Stop>;

/// Rows that a snapshot did not see: `{from}` is where its own future begins, `{running}` are those that ran.
const UNSEEN: &str = "(o.xid >= {from}::pg_catalog.xid8 or o.xid = any({running}::pg_catalog.xid8[]))";
const ROWS: &str = "select o.id::text, o.xid::text, o.shape, o.op, o.doubt, o.gone, o.old, o.new from {schema}.outbox o
    where {unseen} and pg_catalog.pg_visible_in_snapshot(o.xid, {seen}::pg_catalog.pg_snapshot)
        and (o.id, o.xid) > ({id}::pg_catalog.pg_lsn, {xid}::pg_catalog.xid8) order by o.id, o.xid";

impl Drainer {
    /// Connects, and takes the lock to go on behind `base`; without one it only looks at what comes from now on.
    pub(super) async fn open(
        setting: Setting,
        base: Option<Drain>,
        parts: mpsc::Sender<Result<Part>>,
        told: watch::Receiver<Told>,
    ) -> Result<Self> {
        let owns = base.is_some();
        let (client, woken) = client::connect_listening(&setting.postgres, STATEMENT_TIMEOUT).await?;
        let schema = sql_identifier(&setting.schema);
        if owns {
            lock(&client, &setting.schema).await?;
        }
        let setting = Setting { notify: setting.notify && may_notify(&client).await?, ..setting };
        if setting.notify {
            run(&client, &format!("listen {schema}")).await?;
        }
        // A daemon that stands still must not keep the lock from another one, any more than a slot.
        let sql = "select greatest(setting::int8, 0), set_config('idle_session_timeout', setting, false),
            set_config('idle_in_transaction_session_timeout', setting, false)
            from pg_catalog.pg_settings where name = 'wal_sender_timeout'";
        let row = client.query_typed_one(sql, &[]).await.map_err(failed)?;
        let timeout_ms: i64 = row.try_get(0).map_err(failed)?;
        let beat = if timeout_ms > 0 { Duration::from_millis(timeout_ms.unsigned_abs() / 3) } else { HOLD_LIMIT };
        if owns {
            // Whoever read it before may have left it so.
            run(&client, &format!("select {schema}.sleep(false)")).await?;
        }
        // Only the index says where the new rows are, and nobody keeps statistics of them. Where there is no index that makes
        // a query look as dear as one that is worth compiling. What is written waits for no standby.
        run(&client, "set enable_seqscan = off; set synchronous_commit = local").await?;
        let unseen = UNSEEN.replace("{from}", "$1::text").replace("{running}", "$2::text");
        // The statement's snapshot comes before everything that it asks.
        let boundary = format!(
            "select pg_catalog.pg_current_snapshot()::text, pg_catalog.pg_current_wal_insert_lsn()::text,
                pg_catalog.pg_current_wal_flush_lsn()::text,
                (extract(epoch from clock_timestamp()) * 1000000)::int8,
                exists(select from {schema}.outbox o where {unseen}), (select last_value & 2 <> 0 from {schema}.gate)"
        );
        let boundary = client.prepare(&boundary).await.map_err(failed)?;
        let page = ROWS.replace("{seen}", "$3::text").replace("{id}", "$4::text").replace("{xid}", "$5::text");
        let page = page.replace("{unseen}", &unseen).replace("{schema}", &schema);
        let page = client.prepare(&format!("{page} limit {PAGE_ROWS}")).await.map_err(failed)?;
        let base = match base {
            Some(base) => base,
            None => self::now(&client).await?,
        };
        let now = Instant::now();
        Ok(Drainer {
            schema,
            boundary,
            page,
            owns,
            beat: beat.min(HOLD_LIMIT),
            said: base.lsn,
            asleep: false,
            busy: 0,
            rows_at: now,
            undone: VecDeque::new(),
            drained_at: now,
            unacknowledged: VecDeque::from([(now, base.clone())]),
            at: base,
            removed_at: now,
            unremoved: None,
            shapes: HashMap::new(),
            retyped: HashMap::new(),
            described: HashMap::new(),
            present: HashMap::new(),
            setting,
            client,
            woken,
            parts,
            told,
        })
    }

    /// What it goes on behind.
    pub(super) fn base(&self) -> &Drain {
        &self.at
    }

    /// Reads these drains again, and then what comes, until nobody wants it any more.
    pub(super) async fn run(mut self, again: Vec<Drain>) -> Result<()> {
        match self.drain_all(again).await {
            Ok(()) | Err(Stop::Asked) => self.end().await,
            Err(Stop::Failed(error)) => {
                // Nobody listens any more if this fails.
                let _ = self.parts.send(Err(error)).await;
                Ok(())
            }
        }
    }

    async fn drain_all(&mut self, again: Vec<Drain>) -> Outcome<()> {
        self.look_at_types().await?;
        for drain in again {
            let time = self.clock().await?;
            self.read(drain, time).await?;
        }
        loop {
            self.pace().await?;
            match self.drain().await? {
                true => {
                    (self.busy, self.rows_at) = (self.busy + 1, Instant::now());
                    if self.asleep && self.busy >= BUSY_DRAINS {
                        self.declare(false).await?;
                    }
                }
                false => self.rest().await?,
            }
            self.remove().await?;
            self.describe().await?;
        }
    }

    /// Reads what is new; whether there was anything.
    async fn drain(&mut self) -> Outcome<bool> {
        let (from, running) = (self.at.snapshot.xmax().to_string(), self.at.snapshot.running_as_array());
        let row = self.client.query_one(&self.boundary, &[&from, &running]).await.map_err(failed)?;
        let text = |column| row.try_get::<_, &str>(column).map_err(failed);
        let (seen, end, flushed) = (snapshot(text(0)?)?, lsn(text(1)?)?, lsn(text(2)?)?);
        let time = Timestamp::from_unix_us(row.try_get::<_, i64>(3).map_err(failed)?.unsigned_abs());
        // Whoever changes something else of the gate at the same time can undo it.
        self.asleep &= row.try_get::<_, bool>(5).map_err(failed)?;
        if !row.try_get::<_, bool>(4).map_err(failed)? {
            self.idle(end.min(flushed)).await?;
            return Ok(false);
        }
        // What becomes visible without anything being written, as when a standby answers, would have the same position as
        // what came before.
        let end = if flushed < end || end <= self.said { self.flush().await? } else { end };
        if end <= self.said {
            let what = format!("the server's log ends at {end}, and what was read of it at {}", self.said);
            return Err(Error::new(ErrorKind::Gap, what).into());
        }
        self.drained_at = Instant::now();
        self.undone.push_back((self.drained_at, end));
        self.read(Drain { lsn: end, snapshot: seen }, time).await?;
        Ok(true)
    }

    /// Nothing was to be read up to here.
    async fn idle(&mut self, lsn: Lsn) -> Outcome<()> {
        if lsn > self.said {
            self.say(Part::Idle(lsn)).await?;
            self.said = lsn;
        }
        Ok(())
    }

    /// The log up to here is durable; gives where that is, which is new.
    async fn flush(&mut self) -> Result<Lsn> {
        let write = "select pg_catalog.pg_logical_emit_message(true, $1, 'flush')";
        let prefix: (&(dyn ToSql + Sync), Type) = (&MESSAGE_PREFIX, Type::TEXT);
        self.client.query_typed(write, &[prefix]).await.map_err(failed)?;
        let row = self.client.query_typed_one("select pg_catalog.pg_current_wal_flush_lsn()::text", &[]).await;
        lsn(row.map_err(failed)?.try_get(0).map_err(failed)?)
    }

    async fn clock(&self) -> Result<Timestamp> {
        let row =
            self.client.query_typed_one("select (extract(epoch from clock_timestamp()) * 1000000)::int8", &[]).await;
        let now_us: i64 = row.map_err(failed)?.try_get(0).map_err(failed)?;
        Ok(Timestamp::from_unix_us(now_us.unsigned_abs()))
    }

    /// Hands out the rows of a drain: those that it sees, and the one before did not. It is one transaction, whose position
    /// lies just before its end: log records begin at multiples of eight.
    async fn read(&mut self, drain: Drain, time: Timestamp) -> Outcome<()> {
        self.say(Part::Begins(drain.clone())).await?;
        let last = ["0/0", "0"].map(str::to_owned);
        let mut progress = Progress { last, xid: None, time, frames: Frames::default() };
        let mut taken = self.read_page(&drain, &mut progress).await?;
        loop {
            taken = match taken {
                Taken::End => break,
                Taken::More => self.read_by_cursor(&drain, &mut progress).await?,
                Taken::Held => {
                    self.say(progress.next_part(&drain)).await?;
                    self.read_page(&drain, &mut progress).await?
                }
                Taken::Unknown(shape) => {
                    self.load_shapes(shape).await?;
                    self.read_page(&drain, &mut progress).await?
                }
            }
        }
        if progress.xid.is_some() {
            progress.frames.commit(commit_lsn(&drain), drain.lsn, time);
            self.say(progress.next_part(&drain)).await?;
        } else {
            // What was to be read again is gone already.
            self.say(Part::Idle(drain.lsn)).await?;
        }
        self.drained(drain);
        Ok(())
    }

    fn drained(&mut self, drain: Drain) {
        let apart = |since: &Instant| since.elapsed() >= UNACKNOWLEDGED_APART;
        let room = self.unacknowledged.len() < UNACKNOWLEDGED_MAX;
        // The oldest stays: it may be acknowledged already.
        let crowded = self.unacknowledged.back().is_some_and(|(since, _)| !(room && apart(since)));
        if crowded && self.unacknowledged.len() > 1 {
            self.unacknowledged.pop_back();
        }
        self.unacknowledged.push_back((Instant::now(), drain.clone()));
        (self.said, self.at) = (drain.lsn, drain);
    }

    async fn read_page(&mut self, drain: &Drain, progress: &mut Progress) -> Outcome<Taken> {
        let (from, running) = (self.at.snapshot.xmax().to_string(), self.at.snapshot.running_as_array());
        let seen = drain.snapshot.to_string();
        let [id, xid] = &progress.last;
        let parameters: [&(dyn ToSql + Sync); 5] = [&from, &running, &seen, id, xid];
        let rows = self.client.query_raw(&self.page, parameters).await.map_err(failed)?;
        self.take(rows, drain, progress).await
    }

    /// Many rows are sorted once.
    async fn read_by_cursor(&mut self, drain: &Drain, progress: &mut Progress) -> Outcome<Taken> {
        let from = format!("'{}'", self.at.snapshot.xmax());
        let running = format!("'{}'", self.at.snapshot.running_as_array());
        let unseen = UNSEEN.replace("{from}", &from).replace("{running}", &running);
        let rows = ROWS.replace("{unseen}", &unseen).replace("{seen}", &format!("'{}'", drain.snapshot));
        let [id, xid] = progress.last.each_ref().map(|value| format!("'{value}'"));
        let rows = rows.replace("{id}", &id).replace("{xid}", &xid).replace("{schema}", &self.schema);
        run(&self.client, &format!("begin read only; declare drain no scroll cursor for {rows}")).await?;
        let fetch = format!("fetch {PAGE_ROWS} from drain");
        loop {
            let nothing: [(&str, Type); 0] = [];
            let rows = self.client.query_typed_raw(&fetch, nothing).await.map_err(failed)?;
            let taken = self.take(rows, drain, progress).await?;
            if !matches!(taken, Taken::More) {
                run(&self.client, "commit").await?;
                return Ok(taken);
            }
        }
    }

    /// Encodes what comes, and hands it out part by part.
    async fn take(&mut self, rows: RowStream, drain: &Drain, progress: &mut Progress) -> Outcome<Taken> {
        let mut rows = pin!(rows);
        let (mut until, mut count) = (None, 0);
        while let Some(row) = rows.try_next().await.map_err(failed)? {
            let shape: Option<i32> = row.try_get(2).map_err(failed)?;
            if let Some(unknown) = shape.filter(|shape| !self.shapes.contains_key(shape)) {
                return Ok(Taken::Unknown(unknown));
            }
            self.encode(&row, drain, progress)?;
            count += 1;
            if progress.frames.len() < PART_BYTES {
                continue;
            }
            // No snapshot is held, and no word withheld from the server, for as long as Redis is away.
            let until = *until.get_or_insert_with(|| tokio::time::Instant::now() + self.beat);
            match tokio::time::timeout_at(until, self.parts.reserve()).await {
                Ok(Ok(permit)) => permit.send(Ok(progress.next_part(drain))),
                Ok(Err(_)) => return Err(Stop::Asked),
                Err(_) => return Ok(Taken::Held),
            }
        }
        Ok(if count < PAGE_ROWS { Taken::End } else { Taken::More })
    }

    fn encode(&mut self, row: &Row, drain: &Drain, progress: &mut Progress) -> Result<()> {
        let Progress { last, xid, time, frames } = progress;
        let image = |column| row.try_get::<_, Option<&str>>(column).map(|text| text.map(str::as_bytes)).map_err(failed);
        for (column, value) in last.iter_mut().enumerate() {
            value.clear();
            value.push_str(row.try_get(column).map_err(failed)?);
        }
        let whole: u64 = last[1].parse().map_err(|_| nonsense())?;
        let whole = Xid(whole as u32);
        if xid.replace(whole) != Some(whole) {
            frames.begin(commit_lsn(drain), *time, whole);
        }
        let op = row.try_get::<_, i8>(3).map_err(failed)?.cast_unsigned();
        let (old, new) = (image(6)?, image(7)?);
        let shape = row.try_get::<_, Option<i32>>(2).map_err(failed)?;
        let invalid = |error: encode::InvalidImage| {
            Error::new(ErrorKind::Protocol, format!("row {} of the outbox makes no sense", last[0])).because(error)
        };
        let Some(shape) = shape else {
            // A message: what it is called, and what it says.
            let prefix = old.and_then(|prefix| str::from_utf8(prefix).ok()).unwrap_or_default();
            return frames.message(drain.lsn, prefix, new.unwrap_or_default()).map_err(invalid);
        };
        let known = self.shapes.get(&shape).ok_or_else(nonsense)?;
        if self.described.insert(known.relation.oid, shape) != Some(shape) {
            frames.relation(&known.relation);
        }
        if op == b't' {
            frames.truncate(known.relation.oid);
            return Ok(());
        }
        let mut gone = row.try_get::<_, Option<Vec<i16>>>(5).map_err(failed)?.unwrap_or_default();
        gone.extend(self.retyped.get(&shape).into_iter().flatten());
        let doubt = row.try_get::<_, Option<bool>>(4).map_err(failed)?.unwrap_or(false);
        let change = encode::Row { op, doubt, gone: &gone, old, new };
        frames.row(known, &change).map_err(invalid)
    }

    /// What tables look, or looked like; `wanted` must be among them.
    async fn load_shapes(&mut self, wanted: i32) -> Result<()> {
        let sql = format!(
            "select shape, relid, schema, name, columns, types, typmods, identity, is_full from {}.tables",
            self.schema
        );
        for row in self.client.query_typed(&sql, &[]).await.map_err(failed)? {
            self.shapes.insert(row.try_get(0).map_err(failed)?, shape(&row).map_err(failed)?);
        }
        let unknown = || Error::new(ErrorKind::Protocol, format!("the outbox has rows of an unknown shape ({wanted})"));
        self.shapes.contains_key(&wanted).then_some(()).ok_or_else(unknown)
    }

    /// What tables have become meanwhile. Whatever changes them reconciles their rules too, so this may come a little late.
    async fn look_at_types(&mut self) -> Result<()> {
        self.retyped.clear();
        let sql = format!("select shape, place from {}.retyped", self.schema);
        for row in self.client.query_typed(&sql, &[]).await.map_err(failed)? {
            let (shape, place) = (row.try_get(0).map_err(failed)?, row.try_get(1).map_err(failed)?);
            self.retyped.entry(shape).or_default().push(place);
        }
        let sql = format!("select relid, shape from {}.tables where is_present", self.schema);
        for row in self.client.query_typed(&sql, &[]).await.map_err(failed)? {
            self.present.insert(row.try_get(0).map_err(failed)?, row.try_get(1).map_err(failed)?);
        }
        Ok(())
    }

    /// Says what tables look like now of which the last row was older: what did not fit may fit again, and no row may come.
    async fn describe(&mut self) -> Outcome<()> {
        let differs = |(oid, shape): (&u32, &i32)| self.present.get(oid).filter(|present| *present != shape).copied();
        let changed: Vec<i32> = self.described.iter().filter_map(differs).collect();
        if changed.is_empty() {
            return Ok(());
        }
        let mut frames = Frames::default();
        for shape in changed {
            if !self.shapes.contains_key(&shape) {
                self.load_shapes(shape).await?;
            }
            let relation = &self.shapes.get(&shape).ok_or_else(nonsense)?.relation;
            frames.relation(relation);
            self.described.insert(relation.oid, shape);
        }
        self.say(Part::Frames(frames, self.said)).await
    }

    /// Hands it out, as soon as somebody takes it.
    async fn say(&mut self, part: Part) -> Outcome<()> {
        let parts = self.parts.clone();
        loop {
            match tokio::time::timeout(self.beat, parts.reserve()).await {
                Ok(Ok(permit)) => {
                    permit.send(Ok(part));
                    return Ok(());
                }
                Ok(Err(_)) => return Err(Stop::Asked),
                Err(_) => self.say_alive().await?,
            }
        }
    }

    /// Waits until the next drain may begin.
    async fn pace(&mut self) -> Outcome<()> {
        loop {
            let Told { done, ends, .. } = *self.told.borrow_and_update();
            if ends {
                return Err(Stop::Asked);
            }
            let behind = self.undone.iter().take_while(|(_, lsn)| *lsn <= done).count();
            self.undone.drain(..behind);
            let age = self.undone.front().map_or(Duration::ZERO, |(since, _)| since.elapsed());
            let pause = (age / APART).saturating_sub(self.drained_at.elapsed());
            if pause.is_zero() {
                return Ok(());
            }
            tokio::select! {
                told = self.told.changed() => told.map_err(|_| Stop::Asked)?,
                () = tokio::time::sleep(pause.min(self.beat)) => self.say_alive().await?,
            }
        }
    }

    /// The server gives up on whoever says nothing for long.
    async fn say_alive(&mut self) -> Outcome<()> {
        run(&self.client, "select").await?;
        self.remove().await
    }

    /// There was nothing to read.
    async fn rest(&mut self) -> Outcome<()> {
        if self.rows_at.elapsed() < AWAKE {
            tokio::time::sleep(AWAKE_PAUSE).await;
            return Ok(());
        }
        self.busy = 0;
        if self.setting.notify && self.owns && !self.asleep {
            return self.declare(true).await.map_err(Stop::from);
        }
        let pause = self.setting.poll_interval.min(self.beat);
        tokio::select! {
            woken = self.woken.recv() => match woken {
                Some(()) => Ok(()),
                None => Err(Stop::Failed(Error::new(ErrorKind::PostgresAway, "the connection that reads the outbox broke"))),
            },
            told = self.told.changed() => told.map_err(|_| Stop::Asked),
            () = tokio::time::sleep(pause) => Ok(()),
        }
    }

    /// Whether writers are to wake it.
    async fn declare(&mut self, asleep: bool) -> Result<()> {
        run(&self.client, &format!("select {}.sleep({asleep})", self.schema)).await?;
        self.asleep = asleep;
        Ok(())
    }

    /// Has removed what was acknowledged, now and then.
    async fn remove(&mut self) -> Outcome<()> {
        if self.removed_at.elapsed() >= REMOVE_EVERY {
            self.removed_at = Instant::now();
            self.look_at_types().await?;
            if self.owns {
                self.confirm().await?;
            }
        }
        Ok(())
    }

    async fn confirm(&mut self) -> Result<()> {
        let acknowledged = self.told.borrow().acknowledged;
        let behind = self.unacknowledged.iter().take_while(|(_, drain)| drain.lsn <= acknowledged).count();
        if let Some((_, last)) = self.unacknowledged.drain(..behind).next_back() {
            // Before anything goes: what was confirmed cannot be asked for again.
            let sql = format!("update {}.state set confirmed_lsn = '{}'", self.schema, last.lsn);
            run(&self.client, &sql).await?;
            self.unremoved = Some(last.snapshot);
        }
        if let Some(confirmed) = &self.unremoved {
            let schema = &self.schema;
            for _ in 0..ROTATIONS_MAX {
                let rotated = self.client.query_typed_one(&format!("select {schema}.rotate('{confirmed}')"), &[]).await;
                if !rotated.map_err(failed)?.try_get::<_, bool>(0).map_err(failed)? {
                    break;
                }
            }
            let left = format!("select exists(select from {schema}.outbox), last_value >= 4 from {schema}.gate");
            let row = self.client.query_typed_one(&left, &[]).await.map_err(failed)?;
            let (is_left, is_full): (bool, bool) = (row.try_get(0).map_err(failed)?, row.try_get(1).map_err(failed)?);
            if !is_left {
                self.unremoved = None;
            }
            if !is_left && is_full {
                // If anything was lost meanwhile, that is marked, and found elsewhere.
                run(&self.client, &format!("select {schema}.reopen()")).await?;
            }
        }
        Ok(())
    }

    /// The last words.
    async fn end(&mut self) -> Result<()> {
        if !self.owns {
            return Ok(());
        }
        self.confirm().await?;
        if self.asleep {
            self.declare(false).await?;
        }
        run(&self.client, "select pg_catalog.pg_advisory_unlock_all()").await
    }
}

impl Progress {
    fn next_part(&mut self, drain: &Drain) -> Part {
        Part::Frames(std::mem::take(&mut self.frames), drain.lsn)
    }
}

/// Where a look without a past begins.
async fn now(client: &Client) -> Result<Drain> {
    let sql = "select pg_catalog.pg_current_wal_flush_lsn()::text, pg_catalog.pg_current_snapshot()::text";
    let row = client.query_typed_one(sql, &[]).await.map_err(failed)?;
    Ok(Drain { lsn: lsn(row.try_get(0).map_err(failed)?)?, snapshot: snapshot(row.try_get(1).map_err(failed)?)? })
}

/// Where the transaction lies that a drain comes as.
fn commit_lsn(drain: &Drain) -> Lsn {
    Lsn(drain.lsn.0 - 1)
}

/// Takes the lock, or says who has it.
async fn lock(client: &Client, schema: &str) -> Result<()> {
    let sql = "select pg_catalog.pg_try_advisory_lock($1, oid::int8::bit(32)::int4) from pg_catalog.pg_namespace where nspname = $2";
    let parameters: [(&(dyn ToSql + Sync), Type); 2] = [(&LOCK_CLASS, Type::INT4), (&schema, Type::TEXT)];
    let row = client.query_typed_one(sql, &parameters).await.map_err(failed)?;
    match row.try_get(0).map_err(failed)? {
        true => Ok(()),
        false => Err(taken(schema)),
    }
}

/// A transaction that has sent NOTIFY cannot be prepared: where that is done at all, writers send none.
async fn may_notify(client: &Client) -> Result<bool> {
    let sql = "select current_setting('max_prepared_transactions')::int4 = 0";
    let may_notify: bool = client.query_typed_one(sql, &[]).await.map_err(failed)?.try_get(0).map_err(failed)?;
    if !may_notify {
        tracing::info!(
            "writers do not wake keepstep, because NOTIFY and prepared transactions (`max_prepared_transactions`) exclude \
             each other: the outbox is looked into every `poll_interval`"
        );
    }
    Ok(may_notify)
}

fn shape(row: &Row) -> std::result::Result<Shape, tokio_postgres::Error> {
    let names: Vec<String> = row.try_get(4)?;
    let types: Vec<u32> = row.try_get(5)?;
    let modifiers: Vec<i32> = row.try_get(6)?;
    let identity: Vec<String> = row.try_get(7)?;
    let is_full = row.try_get(8)?;
    let place = |name: &String| names.iter().position(|column| column == name);
    let places = identity.iter().filter_map(place).collect();
    let columns = names.iter().zip(types).zip(modifiers).map(|((name, type_oid), type_modifier)| Column {
        name: name.clone(),
        type_oid,
        type_modifier,
        identity: is_full || identity.contains(name),
    });
    let relation = Relation {
        oid: row.try_get(1)?,
        schema: row.try_get(2)?,
        name: row.try_get(3)?,
        identity: super::identity(is_full, &identity),
        columns: columns.collect(),
    };
    Ok(Shape { relation, identity: places, is_full })
}

async fn run(client: &Client, sql: &str) -> Result<()> {
    client.batch_execute(sql).await.map_err(failed)
}

fn failed(error: tokio_postgres::Error) -> Error {
    query_error("cannot read the outbox", error)
}
