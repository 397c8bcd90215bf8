//! The task that reads tables: chunk after chunk, rendered into batches that the session takes when it is their turn.
//!
//! It has connections of its own, so nothing here holds up the stream. What it finds goes to the session through a
//! bounded channel, in order; while the session cannot take more, COPY waits, and with it Postgres. Between two chunks
//! of a table it reads single rows that changes have asked for ([`RowsJob`]).

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use futures_util::future::try_join;
use tokio::sync::{mpsc, oneshot};
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::copy_text::Row;
use super::search::{self, Cells, Part, SearchJob, Wanted};
use super::visibility::{self, Snapshot};
use crate::batch::{Batch, CellHasher, Limits};
use crate::cache::checkpoint::{Origin, Page};
use crate::cache::scan::Scan;
use crate::canary::{self, Canary};
use crate::catalog::{self, Carrier, TableFacts, sql_identifier, sql_table};
use crate::config::{Config, Listing, RedisConfig, TableName};
use crate::decode::types::Types;
use crate::error::{Error, ErrorKind, Result};
use crate::model::{Datum, Xid};
use crate::plan::{self, BoundTable, Noted};
use crate::query::refresh;
use crate::rules::bind::bind;
use crate::rules::refresh::{KeyListing, Stale};
use crate::rules::sql::Sql;
use crate::source::client;
use crate::source::conninfo::ConnInfo;
use crate::source::query_error;
use crate::source::slot::MESSAGE_PREFIX;

/// No statement of a chunk takes longer.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a piece may wait for the session before its chunk gives its snapshot back.
const PIECE_LIMIT: Duration = Duration::from_secs(30);
/// How long a chunk should take: no snapshot is held for much longer.
const CHUNK_TARGET: Duration = Duration::from_millis(200);
/// Pages of the first chunk; later ones adapt to the target.
const CHUNK_PAGES_FIRST: u64 = 64;
/// Pages of a chunk at most: 256 MiB of heap.
const CHUNK_PAGES_MAX: u64 = 32_768;
/// Pages of a chunk where only a sample is read: what is left out lies between chunks.
const SAMPLE_PAGES: u64 = 8;
/// How often the pass over a leaf may begin again because the leaf was rewritten.
const REWRITES_MAX: u32 = 10;
/// How many pieces wait for the session.
const FOUND_MAX: usize = 2;
/// How many jobs wait for the reader.
const JOBS_MAX: usize = 4;
/// How many cells of Redis are searched for orphans at a time. Where it holds more, the table is read once for each part of them.
const PART_CELLS_MAX: u64 = 1 << 20;
/// How many candidates go to the session in one piece, or a little more.
const CANDIDATES_AT_A_TIME: usize = 1000;
/// How many keys of a query are named at a time.
const KEYS_AT_A_TIME: usize = 256;
/// How many a query may name: they are all in memory while they are read.
const KEYS_LISTED_MAX: usize = 100_000;
/// How long apart looks at whether a transaction is visible are: it nearly always is at the first.
const SETTLE_PAUSE: Duration = Duration::from_millis(2);
const SETTLE_PAUSE_MAX: Duration = Duration::from_millis(250);
/// When to say what is waited for.
const SETTLE_WARN: Duration = Duration::from_secs(10);

/// Everything the reader needs to know of its surroundings.
pub struct Setting {
    /// Where the tables are.
    pub postgres: ConnInfo,
    /// The publication, whose row filters hold for reads too, or the outbox.
    pub carrier: Carrier,
    /// Whose stream the reads are merged into: a read from anybody else must not be.
    pub origin: Origin,
    /// Where keys are looked for.
    pub redis: RedisConfig,
    /// The size of a piece.
    pub limits: Limits,
    /// The number of rules.
    pub rules: usize,
    /// The rules file.
    pub config: Arc<Config>,
    /// Tells cells apart, here as in the session.
    pub hasher: CellHasher,
    /// In each marker, so that those of an earlier reader are not taken for its own.
    pub token: String,
    /// Rows a second at most; `None` is no limit.
    pub rows_per_s: Option<u64>,
}

/// A table to be read.
pub struct TableJob {
    /// The rules whose values are rendered, none if nothing is to be read, and the table as the stream has it. It is read
    /// as the catalog has it.
    pub table: BoundTable,
    /// Keys are written too that may be missing.
    pub fills: bool,
    /// What is read is compared: values are rendered for the longest TTL that they may have.
    pub verifies: bool,
    /// Only rows that meet this condition.
    pub filter: Option<String>,
    /// The share of its pages that are read.
    pub sample: f64,
    /// Where an earlier read of it ended.
    pub from: Option<Page>,
    /// Keys that no row renders are searched for.
    pub search: Option<SearchJob>,
    /// Queries of which all keys are read, by whoever reads keys of queries.
    pub listings: Vec<KeyListing>,
    /// Transactions that committed before the slot began may be invisible still: wait for them.
    pub barrier: bool,
}

/// Single rows to be read again.
pub struct RowsJob {
    /// The table's shape as the stream has it, and the rules whose values are rendered.
    pub table: BoundTable,
    /// Which rows, as an SQL condition.
    pub condition: String,
}

/// What the reader has to say, in order.
pub enum Found {
    /// Note what the stream touches from now on, and say what it brought before that may not be settled.
    Begin(oneshot::Sender<Vec<Xid>>),
    /// All that was decoded before is visible now.
    Settled(Of),
    /// Another part of the keys is looked for next. Answered once all that was found before is dealt with.
    Part(oneshot::Sender<()>),
    /// A chunk begins; its pieces follow.
    Opened(Chunk),
    /// Rendered rows, or keys to be deleted where a row has none.
    Piece(Batch),
    /// Keys that there should be, of a query. Answered once they were read.
    Listed(Vec<Stale>, oneshot::Sender<()>),
    /// What was read of them is compared: all that it saw has come out of the stream. Answered once it was.
    Answers(oneshot::Sender<()>),
    /// The chunk ends.
    Closed(Closed),
    /// Everything was read: is there any key that nobody has rendered or touched?
    Orphans(oneshot::Sender<bool>),
    /// Keys that Redis holds: those among them that nobody has rendered or touched are orphans.
    Candidates(Batch),
    /// The job is done.
    Done(Of),
    /// The job, and the reader, ended.
    Failed(Error),
}

/// Which of the two jobs: rows are read between the chunks of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// A [`TableJob`].
    Table,
    /// A [`RowsJob`].
    Rows,
}

/// The end of a chunk of a table.
pub struct Closed {
    /// Rows that it had.
    pub rows: u64,
    /// The share of the table's pages that are behind it, as far as is known.
    pub share: f64,
    /// Where to go on after a restart.
    pub next: Option<Page>,
}

/// What a chunk was read with.
pub struct Chunk {
    /// Whose it is.
    pub of: Of,
    /// The number that its marker bears.
    pub number: u64,
    /// What it sees.
    pub snapshot: Snapshot,
    /// Whether its rows are wanted, or only which keys have a row.
    pub rows_wanted: bool,
}

/// The session's end of a reader.
pub struct Handle {
    /// Tables to read.
    pub tables: mpsc::Sender<TableJob>,
    /// Rows to read, as soon as the chunk under way has ended.
    pub rows: mpsc::Sender<RowsJob>,
    /// What it finds.
    pub found: mpsc::Receiver<Found>,
    /// Batches that may be used again.
    pub spare: mpsc::Sender<Batch>,
}

/// Starts a reader; it ends when the handle is dropped.
pub fn start(setting: Setting) -> Handle {
    let (tables, table_jobs) = mpsc::channel(JOBS_MAX);
    let (rows, row_jobs) = mpsc::channel(JOBS_MAX);
    let (sender, found) = mpsc::channel(FOUND_MAX);
    let (spare, spares) = mpsc::channel(FOUND_MAX + 2);
    tokio::spawn(async move {
        let failed = sender.clone();
        if let Err(Stop::Failed(error)) = read(setting, sender, spares, table_jobs, row_jobs).await {
            // Nobody listens any more if this fails.
            let _ = failed.send(Found::Failed(error)).await;
        }
    });
    Handle { tables, rows, found, spare }
}

/// Why a job ended early.
enum Stop {
    /// The session is gone.
    Abandoned,
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Failed(error)
    }
}

type Outcome<T> = std::result::Result<T, Stop>;

async fn read(
    setting: Setting,
    found: mpsc::Sender<Found>,
    spares: mpsc::Receiver<Batch>,
    mut tables: mpsc::Receiver<TableJob>,
    rows: mpsc::Receiver<RowsJob>,
) -> Outcome<()> {
    let client = client::connect(&setting.postgres, STATEMENT_TIMEOUT).await?;
    let marker = client::connect(&setting.postgres, STATEMENT_TIMEOUT).await?;
    // With more, a marker would wait for a standby and hold back what VACUUM may remove.
    run(&marker, "SET synchronous_commit = local").await?;
    let setting = Arc::new(setting);
    let mut reader =
        Reader { setting, client, marker, found, spares, rows, chunk: 0, waited: Duration::ZERO, row: Row::default() };
    loop {
        tokio::select! {
            biased;
            job = reader.rows.recv() => match job {
                Some(job) => reader.rows(&job).await?,
                None => return Ok(()),
            },
            job = tables.recv() => match job {
                Some(job) => reader.table(&job).await?,
                None => return Ok(()),
            },
        }
    }
}

struct Reader {
    setting: Arc<Setting>,
    /// Reads.
    client: Client,
    /// Writes markers, and looks at what is visible.
    marker: Client,
    found: mpsc::Sender<Found>,
    spares: mpsc::Receiver<Batch>,
    rows: mpsc::Receiver<RowsJob>,
    /// The number of the last chunk.
    chunk: u64,
    /// How long the last chunk waited for the session: while the stream lags, so does its marker.
    waited: Duration,
    row: Row,
}

/// What one chunk reads, in SQL.
struct Selection<'a> {
    table: &'a BoundTable,
    of: Of,
    /// `LOCK TABLE …`
    lock: String,
    /// `FROM … WHERE …`
    from: String,
    /// The relation of which filenode and size are told.
    oid: u32,
    rows_wanted: bool,
}

/// A leaf, and which of how many it is.
struct Place<'a> {
    /// Its table and rules.
    bound: &'a BoundTable,
    oid: u32,
    /// Its name in SQL.
    table: String,
    before: usize,
    leaves: usize,
}

/// What a look at a leaf says.
#[derive(Clone, Copy)]
struct Leaf {
    /// `None` if it has none: a partitioned table.
    filenode: Option<u32>,
    pages: u64,
}

impl Reader {
    async fn say(&self, found: Found) -> Outcome<()> {
        self.found.send(found).await.map_err(|_| Stop::Abandoned)
    }

    /// Steps 1 and 2 of the mechanism.
    async fn settle(&self, of: Of) -> Outcome<()> {
        let (answer, decoded) = oneshot::channel();
        self.say(Found::Begin(answer)).await?;
        let decoded = decoded.await.map_err(|_| Stop::Abandoned)?;
        let all_seen = |snapshot: &Snapshot| decoded.iter().all(|xid| snapshot.sees(*xid));
        self.wait_until("a commit that waits for a standby", all_seen).await?;
        self.say(Found::Settled(of)).await
    }

    /// Transactions that committed before a slot's first position, and so are not in the stream, can still be invisible.
    /// All of them began before this one.
    async fn barrier(&self) -> Result<()> {
        if canary::is(Canary::NoBarrier) {
            return Ok(());
        }
        let row = query_one(&self.marker, "select pg_current_xact_id()::text", &[]).await?;
        let xid: u64 = parse(&row, 0)?;
        self.wait_until("transactions that began before the slot", |snapshot| snapshot.is_past(xid)).await
    }

    async fn wait_until(&self, what: &str, holds: impl Fn(&Snapshot) -> bool) -> Result<()> {
        let (began, mut pause, mut warned) = (Instant::now(), SETTLE_PAUSE, false);
        loop {
            if holds(&visibility::look(&self.marker).await?) {
                return Ok(());
            }
            if !warned && began.elapsed() > SETTLE_WARN {
                warned = true;
                let blocked_by = self.blockers().await?;
                tracing::warn!(blocked_by, "reading tables waits for {what}");
            }
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(SETTLE_PAUSE_MAX);
        }
    }

    /// The oldest transactions that are under way, so that somebody can end them.
    async fn blockers(&self) -> Result<String> {
        let sql = "select coalesce(string_agg(who, ', '), 'nobody whom this role may see')
            from (select 'PID ' || pid || ' (' || coalesce(state, '?') || ', since ' || xact_start || ')' as who
                    from pg_catalog.pg_stat_activity
                   where backend_xid is not null and pid <> pg_backend_pid()
                   union all
                  select 'prepared transaction ' || gid || ' (since ' || prepared || ')'
                    from pg_catalog.pg_prepared_xacts
                   limit 5) blockers";
        parse(&query_one(&self.marker, sql, &[]).await?, 0)
    }

    /// Reads a table for all its keys, part by part.
    async fn table(&mut self, job: &TableJob) -> Outcome<()> {
        if job.barrier {
            self.barrier().await?;
        }
        match &job.search {
            Some(search) => self.table_and_cache(job, search).await?,
            None => self.rows_of(job, true).await?,
        }
        self.say(Found::Done(Of::Table)).await
    }

    /// Postgres goes through its rows while Redis goes through its keys.
    async fn table_and_cache(&mut self, job: &TableJob, search: &SearchJob) -> Outcome<()> {
        // Rows can have gone in ways that the stream does not carry, while it still has to say that they came: their
        // keys must be there before keys are looked for.
        self.nothing().await?;
        let cells = self.cells_in_redis(job, &search.wanted).await?;
        for part in Part::all(cells.div_ceil(PART_CELLS_MAX)) {
            self.dealt_with().await?;
            search::lock(&search.known).begin(part, cells.min(PART_CELLS_MAX));
            let held = held(Arc::clone(&self.setting), search);
            try_join(held, self.rows_of(job, part.is_first())).await?;
            if self.some_orphans().await? {
                self.orphans(search).await?;
            }
        }
        Ok(())
    }

    /// Names all keys of a query, some at a time.
    async fn list(&mut self, job: &TableJob, listing: &KeyListing) -> Outcome<()> {
        let mut keys = match listing.query.listing() {
            None => return Ok(()),
            Some(Listing::One) => vec![Arc::from([])],
            Some(Listing::Sql(keys)) => self.listed(listing, &keys.value).await?,
        };
        keys.retain(|_| job.sample >= 1.0 || random_share() < job.sample);
        for some in keys.chunks(KEYS_AT_A_TIME) {
            self.rows_asked_for().await?;
            let prefix = self.setting.redis.prefix.as_str();
            let stale = some.iter().map(|parameters| listing.stale(prefix, Arc::clone(parameters))).collect();
            let (answer, read) = oneshot::channel();
            self.say(Found::Listed(stale, answer)).await?;
            read.await.map_err(|_| Stop::Abandoned)?;
            // What the stream has touched and this sees need not be kept.
            self.nothing().await?;
            if job.verifies {
                let (answer, compared) = oneshot::channel();
                self.say(Found::Answers(answer)).await?;
                compared.await.map_err(|_| Stop::Abandoned)?;
            }
        }
        Ok(())
    }

    /// The parameters of all keys. No snapshot is held while these are read.
    async fn listed(&self, listing: &KeyListing, keys: &Sql) -> Result<Vec<Arc<[Box<[u8]>]>>> {
        let sql = refresh::listing(&listing.query, keys);
        let rows = self.client.query_raw(&sql, std::iter::empty::<&str>()).await.map_err(failed)?;
        let mut rows = pin!(rows);
        let mut listed: Vec<Arc<[Box<[u8]>]>> = Vec::new();
        while let Some(row) = rows.try_next().await.map_err(failed)? {
            if listed.len() == KEYS_LISTED_MAX {
                let name = &listing.query.name.value;
                let many = format!("`keys` of query `{name}` names more than {KEYS_LISTED_MAX} keys");
                return Err(Error::new(ErrorKind::PostgresAway, many));
            }
            let text = |column| Ok(row.try_get::<_, &str>(column).map_err(failed)?.as_bytes().into());
            listed.push((0..row.len()).map(text).collect::<Result<_>>()?);
        }
        Ok(listed)
    }

    async fn rows_of(&mut self, job: &TableJob, rows_wanted: bool) -> Outcome<()> {
        self.settle(Of::Table).await?;
        if let Some((table, facts)) = self.bound(job).await? {
            self.leaves(job, &table, &facts, rows_wanted).await?;
        }
        for listing in &job.listings {
            self.list(job, listing).await?;
        }
        Ok(())
    }

    /// Waits until the session has dealt with all that was found before.
    async fn dealt_with(&self) -> Outcome<()> {
        let (answer, dealt_with) = oneshot::channel();
        self.say(Found::Part(answer)).await?;
        dealt_with.await.map_err(|_| Stop::Abandoned)
    }

    async fn some_orphans(&self) -> Outcome<bool> {
        let (answer, orphans) = oneshot::channel();
        self.say(Found::Orphans(answer)).await?;
        orphans.await.map_err(|_| Stop::Abandoned)
    }

    /// The table and its rules as the catalog has them: the stream says nothing of DDL before a row changes. `None` if
    /// there is no such table, or nothing is to be read of it.
    async fn bound(&self, job: &TableJob) -> Result<Option<(BoundTable, TableFacts)>> {
        if job.table.rules.is_empty() {
            return Ok(None);
        }
        let Setting { config, carrier, redis, .. } = &*self.setting;
        let name = TableName::from(&job.table.relation);
        let mut catalog = catalog::load(&self.client, carrier, std::slice::from_ref(&name)).await?;
        let types = Types::load(&self.client, &catalog.type_oids()).await?;
        let Some(facts) = catalog.tables.remove(&name) else { return Ok(None) };
        let mut rules = Vec::new();
        for number in job.table.rules.iter().map(|rule| rule.rule) {
            let rule = &config.rules[usize::from(number)];
            let bound = bind(rule, number, &facts.relation, Some(&facts), &types, &redis.prefix);
            let mut bound = bound.map_err(|_| {
                let misfit = format!("rule `{}` does not fit table {name} as it is now", rule.name.value);
                Error::new(ErrorKind::PostgresAway, misfit)
            })?;
            if let Some(write) = &mut bound.write {
                write.present_only |= !job.fills && rule.may_miss();
                if job.verifies {
                    write.life.without_jitter();
                }
            }
            rules.push(bound);
        }
        Ok(Some((BoundTable { relation: facts.relation.clone(), rules }, facts)))
    }

    /// A chunk without rows: behind its marker everything that was committed before is in Redis.
    async fn nothing(&mut self) -> Outcome<()> {
        let (snapshot, _) = self.look(0).await?;
        self.open(Of::Table, snapshot, true).await?;
        let empty = self.empty();
        self.say(Found::Piece(empty)).await
    }

    /// How many cells there are to be known of, about: each key is one, and, where rows are members, each row.
    async fn cells_in_redis(&self, job: &TableJob, wanted: &Wanted) -> Result<u64> {
        let keys = Scan::key_count(&self.setting.redis).await?;
        let mut cells = keys;
        if keys > PART_CELLS_MAX {
            // Most can be those of others, and the table is read once for each part. Its rows are known of too.
            let of_rows = self.row_count(job).await?.saturating_mul(job.table.rules.len() as u64);
            cells = wanted.count(&self.setting.redis).await?.max(keys.min(of_rows));
        }
        let of_a_row = wanted.members_of_a_row();
        if of_a_row > 0 {
            cells += of_a_row * self.row_count(job).await?;
        }
        Ok(cells)
    }

    /// About how many rows the table has.
    async fn row_count(&self, job: &TableJob) -> Result<u64> {
        let sql = "select coalesce(sum(greatest(c.reltuples, 0)), 0)::int8::text from pg_catalog.pg_class c
                where c.oid in (select $1 union select relid from pg_catalog.pg_partition_tree($1))";
        let row = query_one(&self.client, sql, &[(&job.table.relation.oid, Type::OID)]).await?;
        parse(&row, 0)
    }

    /// What the orphans are called.
    async fn orphans(&mut self, search: &SearchJob) -> Outcome<()> {
        let mut cells = Cells::open(&self.setting.redis, &search.wanted).await?;
        let mut found = self.empty();
        while let Some(page) = cells.next().await? {
            page.orphans(&self.setting.hasher, &search::lock(&search.known), &mut found);
            if found.len() >= CANDIDATES_AT_A_TIME {
                let full = std::mem::replace(&mut found, self.empty());
                self.say(Found::Candidates(full)).await?;
            }
        }
        self.say(Found::Candidates(found)).await
    }

    async fn leaves(
        &mut self,
        job: &TableJob,
        table: &BoundTable,
        facts: &TableFacts,
        rows_wanted: bool,
    ) -> Outcome<()> {
        let condition = condition([facts.row_filter.as_deref(), job.filter.as_deref()]);
        let mut leaves: Vec<(u32, &TableName)> = facts.leaves.iter().map(|leaf| (leaf.oid, &leaf.name)).collect();
        if leaves.is_empty() {
            // The table itself; so it is where it is a root that has no partitions yet.
            leaves.push((facts.relation.oid, &facts.name));
        }
        // Those before it were read to their end, by the same order.
        let done = |page: Page| leaves.iter().position(|(oid, _)| *oid == page.leaf);
        let skipped = job.from.and_then(done).unwrap_or(0);
        for (index, (oid, name)) in leaves.iter().enumerate().skip(skipped) {
            let from = job.from.filter(|page| page.leaf == *oid);
            let place = Place { bound: table, oid: *oid, table: sql_table(name), before: index, leaves: leaves.len() };
            self.leaf(job, &place, &condition, from, rows_wanted).await?;
        }
        Ok(())
    }

    /// Reads a leaf from page to page. If it is rewritten meanwhile, every row may be elsewhere: it begins again.
    async fn leaf(
        &mut self,
        job: &TableJob,
        place: &Place<'_>,
        condition: &str,
        from: Option<Page>,
        rows_wanted: bool,
    ) -> Outcome<()> {
        let (table, oid) = (&place.table, place.oid);
        let mut known = self.look(oid).await?.1;
        let (mut next, mut rewrites) = (0, 0);
        if let Some(page) = from.filter(|page| Some(page.filenode) == known.filenode) {
            next = page.page;
        }
        let mut pages = if job.sample < 1.0 { SAMPLE_PAGES } else { CHUNK_PAGES_FIRST };
        // A leaf without pages has a chunk too: what comes behind it must stand behind a marker.
        while next == 0 || next < known.pages {
            self.rows_asked_for().await?;
            let end = next + pages;
            if job.sample < 1.0 && random_share() >= job.sample {
                next = end;
                continue;
            }
            // Whoever takes what is found is done with the chunk before, but for its last piece: no snapshot is held
            // while it waits.
            drop(self.found.reserve_many(FOUND_MAX).await.map_err(|_| Stop::Abandoned)?);
            let began = Instant::now();
            let selection = Selection {
                table: place.bound,
                of: Of::Table,
                lock: format!("LOCK TABLE ONLY {table} IN ACCESS SHARE MODE"),
                from: format!("FROM ONLY {table} WHERE ctid >= '({next},0)' AND ctid < '({end},0)'{condition}"),
                oid,
                rows_wanted,
            };
            let filenode = if canary::is(Canary::NoFilenode) { None } else { known.filenode };
            match self.chunk(&selection, filenode).await? {
                Read::Rewritten(_) if rewrites == REWRITES_MAX => {
                    return Err(
                        Error::new(ErrorKind::PostgresAway, format!("{table} is rewritten all the time")).into()
                    );
                }
                Read::Rewritten(leaf) => {
                    tracing::info!(%table, "the table was rewritten while it was read: it is read again");
                    (known, next, rewrites) = (leaf, 0, rewrites + 1);
                    continue;
                }
                Read::Rows(rows) => {
                    next = end;
                    let at = |filenode| Page { table: place.bound.relation.oid, leaf: oid, filenode, page: next };
                    let of_leaf = (next as f64 / known.pages as f64).min(1.0);
                    let share = (place.before as f64 + of_leaf) / place.leaves as f64;
                    self.say(Found::Closed(Closed { rows, share, next: known.filenode.map(at) })).await?;
                    self.pace(rows, began.elapsed()).await;
                }
            }
            if job.sample >= 1.0 {
                pages = adapted(pages, began.elapsed(), self.waited);
            }
        }
        Ok(())
    }

    /// `warm_rate`
    async fn pace(&self, rows: u64, took: Duration) {
        if let Some(rows_per_s) = self.setting.rows_per_s {
            let least = Duration::from_secs_f64(rows as f64 / rows_per_s as f64);
            tokio::time::sleep(least.saturating_sub(took)).await;
        }
    }

    /// Rows that changes have asked for meanwhile.
    async fn rows_asked_for(&mut self) -> Outcome<()> {
        while let Ok(job) = self.rows.try_recv() {
            self.rows(&job).await?;
        }
        Ok(())
    }

    async fn rows(&mut self, job: &RowsJob) -> Outcome<()> {
        self.settle(Of::Rows).await?;
        let relation = &job.table.relation;
        let name = TableName::from(relation);
        let published = catalog::row_filter(&self.client, &self.setting.carrier, &name).await?;
        let (table, condition) = (sql_table(&name), condition([published.as_deref(), Some(&job.condition)]));
        let selection = Selection {
            table: &job.table,
            of: Of::Rows,
            lock: format!("LOCK TABLE {table} IN ACCESS SHARE MODE"),
            from: format!("FROM {table} WHERE true{condition}"),
            oid: relation.oid,
            rows_wanted: true,
        };
        self.chunk(&selection, None).await?;
        self.say(Found::Done(Of::Rows)).await
    }

    /// Steps 3 and 4. `filenode` is what the leaf must still have.
    async fn chunk(&mut self, selection: &Selection<'_>, filenode: Option<u32>) -> Outcome<Read> {
        // Taking the lock takes no snapshot, so whoever held it before is visible in the one that follows.
        run(&self.client, &format!("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {}", selection.lock)).await?;
        let (snapshot, leaf) = self.look(selection.oid).await?;
        if filenode.is_some() && leaf.filenode != filenode {
            run(&self.client, "ROLLBACK").await?;
            return Ok(Read::Rewritten(leaf));
        }
        self.open(selection.of, snapshot, selection.rows_wanted).await?;
        let (rows, last) = self.copy(selection).await?;
        run(&self.client, "COMMIT").await?;
        // For as long as Redis is away, and without a snapshot.
        self.say(Found::Piece(last)).await?;
        Ok(Read::Rows(rows))
    }

    /// A chunk begins, and its marker is written.
    async fn open(&mut self, of: Of, snapshot: Snapshot, rows_wanted: bool) -> Outcome<()> {
        self.chunk += 1;
        let content = marker(&self.setting.token, self.chunk);
        let sql = match &self.setting.carrier {
            Carrier::Publication(_) => "select pg_logical_emit_message(true, $1, $2)::text".to_owned(),
            Carrier::Outbox(schema) => format!("select {}.emit($1, $2)::text", sql_identifier(schema)),
        };
        query_one(&self.marker, &sql, &[(&MESSAGE_PREFIX, Type::TEXT), (&content, Type::TEXT)]).await?;
        self.say(Found::Opened(Chunk { of, number: self.chunk, snapshot, rows_wanted })).await
    }

    /// The snapshot of the transaction, and the relation as it is now, empty if there is none; from the server that the stream comes from.
    async fn look(&self, oid: u32) -> Result<(Snapshot, Leaf)> {
        let sql = "select pg_current_snapshot()::text, (select system_identifier::text from pg_control_system()),
            left(pg_walfile_name(pg_current_wal_lsn()), 8), pg_relation_filenode($1)::text,
            coalesce(pg_relation_size($1) / current_setting('block_size')::int8, 0)::text";
        let row = query_one(&self.client, sql, &[(&oid, Type::OID)]).await?;
        let text = |column| row.try_get::<_, Option<&str>>(column).map_err(failed);
        let timeline = text(2)?.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        let origin = &self.setting.origin;
        if text(1)? != Some(&origin.system) || timeline != Some(origin.timeline) {
            let message = "a query connection leads to another server than the replication stream";
            return Err(Error::new(ErrorKind::PostgresAway, message));
        }
        let leaf = Leaf { filenode: text(3)?.and_then(|node| node.parse().ok()), pages: parse(&row, 4)? };
        Ok((parse(&row, 0)?, leaf))
    }

    /// COPY, rendered row by row. Gives the number of rows, and the last piece.
    async fn copy(&mut self, selection: &Selection<'_>) -> Outcome<(u64, Batch)> {
        self.waited = Duration::ZERO;
        let relation = &selection.table.relation;
        let columns: Vec<String> = relation.columns.iter().map(|column| sql_identifier(&column.name)).collect();
        let sql = format!("COPY (SELECT {} {}) TO STDOUT", columns.join(", "), selection.from);
        let mut lines = pin!(self.client.copy_out(&sql).await.map_err(failed)?);
        let (mut rows, mut notes, mut random) = (0, Vec::new(), rows_seed(self.chunk));
        let mut row = std::mem::take(&mut self.row);
        let mut datums: Vec<Datum<'static>> = Vec::new();
        let mut batch = self.empty();
        while let Some(line) = lines.try_next().await.map_err(failed)? {
            let read = row.read(&line, columns.len());
            read.map_err(|error| Error::new(ErrorKind::Protocol, "cannot read what COPY sent").because(error))?;
            let mut image = plan::recycled(datums);
            image.extend(row.datums());
            plan::row(selection.table, &image, &mut random, &mut batch, &mut notes);
            datums = plan::recycled(image);
            rows += 1;
            for note in notes.drain(..) {
                if let Noted::Unrendered(why) = note.what {
                    tracing::debug!(rule = note.rule, %why, "a row has no value");
                }
            }
            if batch.is_full() {
                let full = std::mem::replace(&mut batch, self.empty());
                let began = Instant::now();
                // No snapshot, and no lock, is held for as long as Redis is away.
                let said = tokio::time::timeout(PIECE_LIMIT, self.say(Found::Piece(full))).await;
                said.unwrap_or_else(|_| Err(Stop::Failed(too_slow())))?;
                self.waited += began.elapsed();
            }
        }
        self.row = row;
        Ok((rows, batch))
    }

    fn empty(&mut self) -> Batch {
        self.spares.try_recv().unwrap_or_else(|_| Batch::new(self.setting.limits, self.setting.rules))
    }
}

/// Goes through the keys that Redis holds.
async fn held(setting: Arc<Setting>, search: &SearchJob) -> Outcome<()> {
    let mut cells = Cells::open(&setting.redis, &search.wanted).await?;
    while let Some(page) = cells.next().await? {
        let mut known = search::lock(&search.known);
        page.ids(&setting.hasher, |cell| known.held(cell));
    }
    Ok(())
}

/// How a chunk went.
enum Read {
    /// So many rows.
    Rows(u64),
    /// The leaf is not the one that the pass began with.
    Rewritten(Leaf),
}

/// The content of a marker.
fn marker(token: &str, chunk: u64) -> String {
    format!("marker {token} {chunk}")
}

/// The number of the chunk that the marker is of, if it is of this reader.
pub fn marked_chunk(content: &[u8], token: &str) -> Option<u64> {
    let rest = str::from_utf8(content).ok()?.strip_prefix("marker ")?;
    rest.strip_prefix(token)?.strip_prefix(' ')?.parse().ok()
}

/// As many pages as should take as long as a chunk may. What of that it waited for its marker and for Redis counts only once
/// it comes near the limit: smaller chunks wait as often, and only those that fit the channel hold no snapshot meanwhile.
fn adapted(pages: u64, took: Duration, waited: Duration) -> u64 {
    let read = took.saturating_sub(waited);
    let next = if waited > PIECE_LIMIT / 4 || read > CHUNK_TARGET * 2 {
        pages / 2
    } else if read < CHUNK_TARGET / 2 {
        pages * 2
    } else {
        pages
    };
    next.clamp(1, CHUNK_PAGES_MAX)
}

/// What rows must meet, besides where they are.
fn condition(conditions: [Option<&str>; 2]) -> String {
    conditions.into_iter().flatten().map(|sql| format!(" AND ({sql})")).collect()
}

fn random_share() -> f64 {
    getrandom::u32().map_or(0.0, |random| f64::from(random) / (f64::from(u32::MAX) + 1.0))
}

/// Where TTL jitter begins, another one for each chunk.
fn rows_seed(chunk: u64) -> u64 {
    getrandom::u64().unwrap_or(chunk)
}

async fn run(client: &Client, sql: &str) -> Result<()> {
    client.batch_execute(sql).await.map_err(failed)
}

async fn query_one(
    client: &Client,
    sql: &str,
    parameters: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)],
) -> Result<tokio_postgres::Row> {
    client.query_typed_one(sql, parameters).await.map_err(failed)
}

/// A column that Postgres sent as text.
fn parse<T: std::str::FromStr>(row: &tokio_postgres::Row, column: usize) -> Result<T> {
    let text: &str = row.try_get(column).map_err(failed)?;
    text.parse()
        .map_err(|_| Error::new(ErrorKind::Protocol, "Postgres answered a question about a table with something else"))
}

fn too_slow() -> Error {
    let message = format!("what was read of a table could not be written within {PIECE_LIMIT:?}");
    Error::new(ErrorKind::RedisAway, message)
}

fn failed(error: tokio_postgres::Error) -> Error {
    query_error("cannot read a table", error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_of_one_reader() {
        let content = marker("ab12", 7);
        assert_eq!(marked_chunk(content.as_bytes(), "ab12"), Some(7));
        for (content, token) in
            [("marker ab12 7", "ab1"), ("marker ab12", "ab12"), ("heartbeat", "ab12"), ("marker ab12 x", "ab12")]
        {
            assert_eq!(marked_chunk(content.as_bytes(), token), None, "{content}");
        }
    }

    #[test]
    fn chunks_come_near_their_target() {
        let adapted = |pages, took_ms, waited_ms| {
            super::adapted(pages, Duration::from_millis(took_ms), Duration::from_millis(waited_ms))
        };
        assert_eq!(adapted(64, 10, 0), 128);
        assert_eq!(adapted(64, 200, 0), 64);
        assert_eq!(adapted(64, 1000, 0), 32);
        assert_eq!(adapted(64, 1000, 990), 128, "a stream that lags a little");
        assert_eq!(adapted(64, 10_000, 9990), 32, "a stream that lags much");
        assert_eq!(adapted(1, 1000, 0), 1);
        assert_eq!(adapted(CHUNK_PAGES_MAX, 0, 0), CHUNK_PAGES_MAX);
    }
}
