//! Everything before streaming: both servers, whether they fit together, the rules against the tables, the claim.
//!
//! The order matters. The checkpoint is read before the stream begins, because it says where; the fence is replaced only once
//! START_REPLICATION has succeeded, because Postgres elects the writer; and if the checkpoint moved in between, the
//! session begins anew.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::admin::Phase;
use crate::batch::Batch;
use crate::cache::Cache;
use crate::cache::checkpoint::{Checkpoint, Debt, Origin, RuleSet};
use crate::cache::claims::Former;
use crate::cache::inspect;
use crate::cache::record::Recorder;
use crate::cache::writer::Writer;
use crate::catalog::signature::{self, Signatures};
use crate::catalog::{self, Carrier, Catalog};
use crate::config::code::Code;
use crate::config::open::pattern_of;
use crate::config::{self, Config, OnGap, PostgresConfig, diagnostic};
use crate::decode::types::Types;
use crate::error::{Error, ErrorKind, Result};
use crate::model::{Lsn, Position};
use crate::query::Lookups;
use crate::query::check::check_queries;
use crate::source::conninfo::ConnInfo;
use crate::source::replication::SystemIdentity;
use crate::source::slot::{self, SlotState};
use crate::source::{Ready, Source, Standing, client, query_error};

use super::acks::Acks;
use super::debts::{Debts, Opening, Reason};
use super::gap::{self, Loss, Place, Situation, SlotFacts, Start, Why};
use super::intake::Intake;
use super::orders::Messages;
use super::reads::Reads;
use super::refreshes::Refreshes;
use super::report::{self, RuleMetrics};
use super::tables::Tables;
use super::{CLAIM_LIMIT, Daemon, Flying, LATER_LIMITS, Options, STATEMENT_TIMEOUT, Session, limits, look, renewal};

/// Opens a session on the real cache.
pub(super) async fn open(daemon: &mut Daemon, options: Options, seen: Option<&Checkpoint>) -> Result<Session<Writer>> {
    let info = ConnInfo::from_config(&daemon.config.postgres)?;
    if daemon.metrics.sessions_total.get() == 0 && !info.dropped.is_empty() {
        tracing::warn!(parameters = ?info.dropped, "parameters of `[postgres] url` that mean nothing here are ignored");
    }
    let client = client::connect(&info, STATEMENT_TIMEOUT).await?;
    on_primary(&client).await?;
    encoded(&client).await?;
    match_tables(daemon, &client).await?;
    let (daemon, config) = (&*daemon, &daemon.config);
    // Slot, cache, server: another daemon may be at work, and each of these is ahead of the one before.
    let standing = affordable_slot(config, &client).await?;
    let mut writer = Writer::new(config.redis.clone(), Arc::clone(&daemon.rules), Arc::clone(&daemon.metrics))?;
    let stored = writer.read_checkpoint().await?;
    let slot = standing.slot(&config.postgres.slot, stored.as_ref().or(seen).and_then(|checkpoint| checkpoint.gap));
    let (ready, identity) = Ready::connect(&config.postgres, &info, &client).await?;
    let origin = origin(&identity, config);
    let situation = Situation {
        origin: &origin,
        flush_lsn: identity.flush_lsn,
        stream: &Carrier::stream(&config.postgres),
        slot: slot.as_ref().map(|slot| slot_facts(slot, &standing)),
        born_at: standing.born_at(),
        stored: stored.as_ref(),
        seen,
        // Looked at only where nothing else can tell: it goes through all keys.
        cache_has_keys: stored.is_none() && seen.is_none() && !inspect::keys(&config.redis, 1).await?.is_empty(),
    };
    let start = gap::examine(&situation, options.adopt, config.postgres.on_gap)?;
    let catalog = signature::look(&client, &Carrier::of(&config.postgres), &look::tables(config)).await?;
    let Opening { owing, reasons } = owed(daemon, &writer, start, &catalog.signatures).await?;
    let (confirmed, drains) = match (start, &slot) {
        (Start::Anew { from: Place::NewSlot, .. }, old) => renewal::renew(daemon, &info, &client, old.as_ref()).await?,
        (_, slot) => (slot.as_ref().and_then(|slot| slot.confirmed_flush_lsn).unwrap_or_default(), Vec::new()),
    };
    let gap = match start {
        // Nothing that was marked before counts.
        Start::Anew { from: Place::NewSlot, .. } => Standing::look(&client, &config.postgres).await?.gap(),
        _ => standing.gap(),
    };
    let before = stored.iter().chain(seen).map(|checkpoint| checkpoint.epoch).max().unwrap_or_default();
    let first = match start {
        Start::Resume { stored, new_epoch: true } => Checkpoint { epoch: epoch_now(before), ..stored.clone() },
        Start::Resume { stored, new_epoch: false } => stored.clone(),
        Start::Anew { .. } => Checkpoint { drains, ..anew(confirmed, epoch_now(before), origin) },
    };
    let first = Checkpoint { gap, ..first };
    let first = Checkpoint { rules: daemon.rules.digest_with(&config.redis.also_prefix), owing, ..first };

    // What was acknowledged was seen to be good; what lies behind it and `applied` is applied again.
    let proven = first.good.max(Position::end(confirmed));
    let (mut tables, mut intake) = bind(daemon, &client, &Checkpoint { good: proven, ..first.clone() }).await?;
    tables.carried(&catalog.carried);
    let from = first.low.min(proven.lsn);
    let source = ready.start(&config.postgres, &first.drains, from).await?;
    not_moved(&client, &config.postgres, &first).await?;
    writer.claim(stored.clone()).await?;
    writer.remember(&catalog.signatures);
    let held = Duration::from_micros(report::now_us().saturating_sub(first.written_us));
    let mut acks = Acks::new(confirmed, config.postgres.replay_window);
    acks.held(first.low, held);
    let checkpoint = match stored {
        Some(stored) if stored == first => stored,
        _ => {
            let mut nothing = Batch::new(limits(config), 0);
            intake.say_claims(&mut nothing);
            claim_with(&mut writer, &nothing, first).await?
        }
    };
    let vanished = writer.vanished(&config.open);
    let former = writer.former(&config.rules);
    begun(daemon, &checkpoint, &reasons);
    let (flushed, signatures) = (identity.flush_lsn, catalog.signatures);
    let streamed =
        Streamed { info, client, source, tables, intake, checkpoint, proven, flushed, acks, signatures, former };
    Ok(Session { vanished, ..session(daemon, streamed, writer) })
}

/// Opens a session on nothing: a temporary slot, from now on, and commands as text.
pub(super) async fn open_dry<W: Write + Send + 'static>(daemon: &mut Daemon, out: W) -> Result<Session<Recorder<W>>> {
    let info = ConnInfo::from_config(&daemon.config.postgres)?;
    let client = client::connect(&info, STATEMENT_TIMEOUT).await?;
    match_tables(daemon, &client).await?;
    let (daemon, config) = (&*daemon, &daemon.config);
    let (ready, identity) = Ready::connect(&config.postgres, &info, &client).await?;
    let origin = origin(&identity, config);
    let checkpoint = anew(Lsn::default(), epoch_now(0), origin);
    let catalog = signature::look(&client, &Carrier::of(&config.postgres), &look::tables(config)).await?;
    let (tables, intake) = bind(daemon, &client, &checkpoint).await?;
    let source = ready.start_temporary(&config.postgres).await?;
    tracing::info!("printing the commands of changes from now on; nothing is written");
    let (flushed, proven, signatures) = (identity.flush_lsn, checkpoint.good, catalog.signatures);
    let acks = Acks::new(Lsn::default(), config.postgres.replay_window);
    let streamed = Streamed {
        info,
        client,
        source,
        tables,
        intake,
        checkpoint,
        proven,
        flushed,
        acks,
        signatures,
        former: Vec::new(),
    };
    Ok(session(daemon, streamed, Recorder::new(out, config.redis.clone())))
}

/// Asks for the tables of rules with patterns, once: from then on they are looked at while it streams, and what has changed
/// comes as an order, so that the rules of an order that waits keep their numbers.
async fn match_tables(daemon: &mut Daemon, client: &tokio_postgres::Client) -> Result<()> {
    if daemon.config.tables.is_none() {
        let config = catalog::with_tables(client, &daemon.config).await?;
        for rule in config.idle() {
            let (rule, pattern) = (rule.name(), rule.table().value.written());
            tracing::warn!(rule, pattern, "no table matches yet; it is looked for from time to time");
        }
        daemon.matched(config);
    }
    Ok(())
}

/// The configuration with the tables that there are, through a connection of its own.
pub async fn with_tables(config: Config) -> Result<Config> {
    if config.tables.is_some() {
        return Ok(config);
    }
    let client = client::connect(&ConnInfo::from_config(&config.postgres)?, STATEMENT_TIMEOUT).await?;
    catalog::with_tables(&client, &config).await
}

/// A standby may be about to be promoted: nothing that is missing there says anything yet.
async fn on_primary(client: &tokio_postgres::Client) -> Result<()> {
    let doing = "cannot tell a primary from a standby";
    let row = client.query_typed_one("select pg_is_in_recovery()", &[]).await;
    match row.and_then(|row| row.try_get(0)).map_err(|error| query_error(doing, error))? {
        false => Ok(()),
        true => Err(Error::new(ErrorKind::PostgresAway, "this server is a standby, and keys follow the primary")
            .hint("list every host in `[postgres] url`, with `target_session_attrs=primary`")),
    }
}

/// Postgres cannot convert what a database without an encoding holds: one byte that is no UTF-8 would end the stream there,
/// and every read of its table, for good.
async fn encoded(client: &tokio_postgres::Client) -> Result<()> {
    let doing = "cannot ask for the database's encoding";
    let row = client.query_typed_one("select current_setting('server_encoding') = 'SQL_ASCII'", &[]).await;
    match row.and_then(|row| row.try_get(0)).map_err(|error| query_error(doing, error))? {
        false => Ok(()),
        true => {
            Err(Error::new(ErrorKind::Config, "the database has no encoding (SQL_ASCII): its texts can be any bytes")
                .hint("load a dump of it into a database that was made with ENCODING 'UTF8'"))
        }
    }
}

/// The slot, which nobody may be streaming.
async fn free_slot(client: &tokio_postgres::Client, config: &PostgresConfig) -> Result<Standing> {
    let standing = Standing::look(client, config).await?;
    match standing.slot(&config.slot, None).and_then(|slot| slot.active_pid) {
        None => Ok(standing),
        Some(pid) => {
            let stream = Carrier::stream(config);
            let taken = format!("another daemon, or one that just ended, streams the {stream} (PID {pid})");
            Err(Error::new(ErrorKind::Fenced, taken))
        }
    }
}

/// The same, given up if it keeps more log than it may: the DBA's disk comes before the cache, which is made right again
/// from the tables. So it goes before Redis is looked for, which may be what all this waits for. An outbox keeps itself
/// within its limit.
async fn affordable_slot(config: &Config, client: &tokio_postgres::Client) -> Result<Standing> {
    let standing = free_slot(client, &config.postgres).await?;
    let Standing::Slot(Some(slot), born_at) = &standing else { return Ok(standing) };
    let retained = slot.retained_bytes.filter(|_| !slot.is_lost()).unwrap_or(0);
    let max_retained = config.postgres.max_retained;
    let gives_up = config.postgres.on_gap == OnGap::Reconcile && retained > max_retained;
    if gives_up && slot::give_up(client, &config.postgres.slot, max_retained).await? {
        tracing::warn!(
            retained,
            max_retained,
            "the slot was dropped because it kept too much WAL; the rules are reconciled"
        );
        return Ok(Standing::Slot(None, *born_at));
    }
    Ok(standing)
}

/// What the rules owe when the session begins.
async fn owed(daemon: &Daemon, writer: &Writer, start: Start<'_>, catalog: &Signatures) -> Result<Opening> {
    let rules = &daemon.config.rules;
    let stored = match start {
        Start::Resume { stored, .. } => stored,
        Start::Anew { why: Why::Lost(reason), .. } => return Ok(Opening::after_loss(rules, reason)),
        Start::Anew { why: Why::FirstStart { cache_has_keys }, .. } => {
            return Ok(Opening::first_start(rules, cache_has_keys));
        }
    };
    let mut opening = Opening::resumed(&stored.owing, rules);
    if stored.rules != daemon.rules.digest_with(&daemon.config.redis.also_prefix) {
        let before = writer.read_rules().await?;
        opening.compare_rules(before.as_ref(), &daemon.rules, rules);
        warn_of_removed_rules(daemon, before.as_ref());
    }
    let differing = match writer.read_catalog().await? {
        Some(before) => look::differing(catalog, &before, rules.iter()),
        None => rules.iter().collect(),
    };
    differing.iter().for_each(|rule| opening.add(&rule.name.value, Debt::Reconcile, Reason::Catalog));
    Ok(opening)
}

/// Says that the session has begun.
fn begun(daemon: &Daemon, checkpoint: &Checkpoint, reasons: &BTreeSet<Reason>) {
    for reason in reasons {
        daemon.metrics.reconciles_total.with_label_values(&[reason.label()]).inc();
    }
    let Checkpoint { epoch, low, origin, owing, .. } = checkpoint;
    tracing::info!(epoch, from = %low, slot = %origin.slot, ?owing, "streaming");
    daemon.metrics.sessions_total.inc();
    daemon.metrics.up.set(1);
    daemon.metrics.rules_owing.set(owing.len() as i64);
    daemon.shared.update(|status| {
        status.phase = Phase::Active;
        status.database.clone_from(&origin.database);
    });
}

/// The slot is this walsender's now. If somebody else read it after it was looked at, the server has silently begun later.
async fn not_moved(client: &tokio_postgres::Client, config: &PostgresConfig, first: &Checkpoint) -> Result<()> {
    let slot = Standing::look(client, config).await?.slot(&config.slot, None);
    match slot.and_then(|slot| slot.confirmed_flush_lsn) {
        Some(confirmed) if confirmed <= first.low => Ok(()),
        _ => Err(Error::new(
            ErrorKind::Fenced,
            format!("the {} was read by somebody else just now", Carrier::stream(config)),
        )),
    }
}

/// Writes the checkpoint that the session begins with. Nothing else goes on meanwhile, so it may not take for ever.
async fn claim_with(writer: &mut Writer, nothing: &Batch, first: Checkpoint) -> Result<Checkpoint> {
    let silent = |_| Err(Error::new(ErrorKind::RedisAway, format!("Redis took no checkpoint within {CLAIM_LIMIT:?}")));
    let applied = tokio::time::timeout(CLAIM_LIMIT, writer.apply(nothing, first)).await.unwrap_or_else(silent);
    Ok(applied?.checkpoint)
}

/// What a session is made of, besides the cache.
struct Streamed {
    info: ConnInfo,
    client: tokio_postgres::Client,
    source: Source,
    tables: Tables,
    intake: Intake,
    checkpoint: Checkpoint,
    proven: Position,
    flushed: Lsn,
    acks: Acks,
    signatures: Signatures,
    former: Vec<Former>,
}

fn session<C>(daemon: &Daemon, streamed: Streamed, cache: C) -> Session<C> {
    let config = &daemon.config;
    let batch = || Batch::new(limits(config), config.rules.len());
    let now = Instant::now();
    let names = daemon.rules.names.clone();
    let connections = config.postgres.query_connections;
    let (info, metrics) = (streamed.info.clone(), Arc::clone(&daemon.metrics));
    let lookups = Lookups::new(info.clone(), names, metrics, LATER_LIMITS);
    // One is left to lookups, which more waits for.
    let reserved = usize::from(config.rules.iter().any(|rule| rule.lookup.is_some()));
    let refreshers = connections.saturating_sub(reserved).max(1);
    let refreshes = Refreshes::new(&info, &streamed.checkpoint.origin, refreshers);
    Session {
        config: Arc::clone(config),
        metrics: Arc::clone(&daemon.metrics),
        shared: Arc::clone(&daemon.shared),
        rule_metrics: RuleMetrics::of(config, &daemon.metrics),
        client: Arc::new(streamed.client),
        source: streamed.source,
        tables: streamed.tables,
        intake: streamed.intake,
        messages: Messages::new(streamed.proven),
        desk: Arc::clone(&daemon.desk),
        tables_refused: None,
        unbound: BTreeSet::new(),
        next_tables: None,
        vanished: Vec::new(),
        successor: None,
        batch: batch(),
        spare: Some(batch()),
        cache: Some(cache),
        in_flight: None,
        flying: Flying::Stream,
        reads: Reads::new(Arc::clone(config), streamed.info, streamed.checkpoint.progress.clone(), streamed.former),
        settling: None,
        lookups: Some(Box::new(lookups)),
        looking_up: None,
        refreshes: Box::new(refreshes),
        looks_in_vain: 0,
        looked_visible_at: now,
        probing: None,
        answered_at: now,
        looking: None,
        received: streamed.checkpoint.low,
        reached: streamed.checkpoint.applied,
        reached_low: streamed.checkpoint.low,
        ends_when_caught_up: false,
        acks: streamed.acks,
        rewritten_us: streamed.checkpoint.written_us,
        checkpoint: streamed.checkpoint,
        debts: Debts::default(),
        signatures: streamed.signatures,
        signatures_unsaid: false,
        proven: streamed.proven,
        more_buffered: false,
        flushed_at_start: streamed.flushed,
        server_end: streamed.flushed,
        looked_at: None,
        forget_due: false,
        heartbeat_sent: now,
        reply_requested: false,
        checkpoint_due: false,
    }
}

fn origin(identity: &SystemIdentity, config: &Config) -> Origin {
    // Positions in an outbox are none in a slot of the same name.
    let slot = match config.postgres.source {
        config::Source::Replication => config.postgres.slot.clone(),
        config::Source::Outbox(_) => Carrier::stream(&config.postgres),
    };
    Origin { system: identity.system.clone(), timeline: identity.timeline, database: identity.database.clone(), slot }
}

fn slot_facts<'s>(slot: &'s SlotState, standing: &Standing) -> SlotFacts<'s> {
    let why = slot.invalidation_reason.as_deref();
    let loss = match standing {
        Standing::Slot(..) => Loss {
            what: format!("was invalidated by the server: {}", why.unwrap_or("its WAL was removed")),
            remedy: "raise `max_slot_wal_keep_size` (Postgres 18: also `idle_replication_slot_timeout`) to let the daemon be \
                     away for longer",
        },
        Standing::Outbox(_) => Loss {
            what: why.unwrap_or_default().to_owned(),
            remedy: "raise `max_retained`, or set `on_full = \"keep\"`, to let the daemon be away for longer",
        },
    };
    SlotFacts {
        plugin: slot.plugin.as_deref(),
        database: slot.database.as_deref(),
        confirmed: slot.confirmed_flush_lsn.unwrap_or_default(),
        lost: slot.is_lost().then_some(loss),
    }
}

/// A new history that begins here, of no rules yet.
fn anew(from: Lsn, epoch: u64, origin: Origin) -> Checkpoint {
    Checkpoint {
        version: Checkpoint::VERSION,
        origin,
        epoch,
        applied: Position::end(from),
        low: from,
        good: Position::end(from),
        rules: String::new(),
        written_us: report::now_us(),
        released: Position::end(from),
        owing: BTreeMap::new(),
        progress: None,
        drains: Vec::new(),
        gap: None,
    }
}

/// A time in microseconds, later than the epoch before whatever the clock says.
fn epoch_now(before: u64) -> u64 {
    report::now_us().max(before + 1)
}

/// Binds the rules to the tables as the catalog has them. At the first session of a process every problem is an error;
/// later ones pause their rules.
async fn bind(daemon: &Daemon, client: &tokio_postgres::Client, first: &Checkpoint) -> Result<(Tables, Intake)> {
    let config = &daemon.config;
    let (catalog, types) = read_catalog(config, client).await?;
    if daemon.metrics.sessions_total.get() == 0 {
        refuse_misfits(config, &catalog, &types, client).await?;
    }
    let mut tables = Tables::new(Arc::clone(config), Arc::clone(&daemon.metrics), Arc::clone(&daemon.shared));
    let mut intake = Intake::new(first, Arc::clone(&daemon.rules), Arc::clone(&daemon.metrics));
    for table in tables.bind_all(&catalog, &types) {
        intake.bind(table);
    }
    Ok((tables, intake))
}

/// What the catalog says of the tables that the rules name.
async fn read_catalog(config: &Config, client: &tokio_postgres::Client) -> Result<(Catalog, Types)> {
    let catalog = catalog::load(client, &Carrier::of(&config.postgres), &look::tables(config)).await?;
    let types = Types::load(client, &catalog.type_oids()).await?;
    Ok((catalog, types))
}

/// Rules that cannot be kept, with everything that is wrong with them.
async fn refuse_misfits(
    config: &Config,
    catalog: &Catalog,
    types: &Types,
    client: &tokio_postgres::Client,
) -> Result<()> {
    let checked = catalog::check_rules(config, catalog, types);
    let queries = check_queries(client, config, &checked).await?;
    let problems = [checked.diagnostics, queries].concat();
    if problems.iter().all(|problem| problem.severity != diagnostic::Severity::Error) {
        return Ok(());
    }
    let shown = diagnostic::render(&problems, &config.file, false);
    Err(Error::new(ErrorKind::Config, format!("the rules do not fit the tables\n\n{shown}")))
}

/// Whether a session of this configuration could begin: both servers answer, and the rules fit the tables. Gives the
/// configuration with the tables that there are.
pub(super) async fn rehearse(config: &Config) -> Result<Config> {
    let client = client::connect(&ConnInfo::from_config(&config.postgres)?, STATEMENT_TIMEOUT).await?;
    let config = catalog::with_tables(&client, config).await?;
    let (catalog, types) = read_catalog(&config, &client).await?;
    refuse_misfits(&config, &catalog, &types, &client).await?;
    inspect::try_commands(&config).await?;
    Ok(config)
}

/// The configuration for the tables that there are now; `None` if that is the one in force.
///
/// # Errors
/// [`ErrorKind::Config`] if it cannot be followed: too many tables, or keys that two rules would fight for. What else does
/// not fit pauses its own rule.
pub(super) async fn for_tables_now(config: &Config, client: &tokio_postgres::Client) -> Result<Option<Config>> {
    let Some(now) = catalog::with_other_tables(client, config).await? else { return Ok(None) };
    if RuleSet::new(&now.rules) == RuleSet::new(&config.rules) {
        return Ok(None);
    }
    let (catalog, types) = read_catalog(&now, client).await?;
    let mut problems = catalog::check_rules(&now, &catalog, &types).diagnostics;
    problems.retain(|problem| matches!(problem.code, Code::KeyOfTwoRules | Code::DeletesWritten));
    match problems.is_empty() {
        true => Ok(Some(now)),
        false => Err(Error::new(ErrorKind::Config, diagnostic::render(&problems, &now.file, false))),
    }
}

/// Keys of rules that were removed stay as they are; whoever runs it must know.
fn warn_of_removed_rules(daemon: &Daemon, before: Option<&BTreeMap<String, String>>) {
    let removed = before.map(|before| daemon.rules.difference(before).removed).unwrap_or_default();
    let of_pattern = |rule: &String| {
        pattern_of(rule).is_some_and(|pattern| daemon.config.open.iter().any(|open| open.name() == pattern))
    };
    let (vanished, removed): (Vec<String>, Vec<String>) = removed.into_iter().partition(of_pattern);
    if !vanished.is_empty() {
        tracing::info!(rules = ?vanished, "their tables are gone: their keys go next");
    }
    if !removed.is_empty() {
        tracing::warn!(rules = ?removed, "removed rules: the keys that they wrote stay, and are no longer kept right");
    }
}
