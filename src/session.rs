//! The one loop that drives everything: it selects over the next frame, the one batch in flight, a tick and the end.
//!
//! While a batch is in flight the next one fills. A batch goes out once it holds whole transactions only, or full; when
//! nothing is in flight, as soon as everything that has arrived is in it. So batches are small and quick when load is low and large under load,
//! with no timer to tune. A full batch that cannot go out yet stops the reading of the socket, and Postgres waits; status
//! updates go on.
//!
//! A session is one connection to Postgres and one claim on the cache. Any trouble with either ends it, and the next
//! one begins from what Redis holds ([`open`]). Only a lost connection to Redis is mended inside
//! ([`crate::cache::writer`]), so that a backlog in the socket is not read twice.
//!
//! **Architecture invariant:** what is acknowledged to Postgres comes from a checkpoint that Redis has answered for,
//! never from what was received.

use std::collections::BTreeSet;
use std::io::Write;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use crate::admin::{Phase, RuleStatus, Shared, Status};
use crate::backoff::Backoff;
use crate::batch::{Batch, Limits, Vanished};
use crate::cache::checkpoint::{Checkpoint, Debt, RuleSet};
use crate::cache::{Applied, Cache, Differing};
use crate::canary::{self, Canary};
use crate::catalog::signature::Signatures;
use crate::config::{Config, OnGap, Rule, TableName};
use crate::decode::pgoutput;
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Metrics;
use crate::model::{Lsn, Position, Relation};
use crate::query::Lookups;
use crate::rules::bind::BoundRule;
use crate::rules::pattern::Pattern;
use crate::shutdown::Shutdown;
use crate::snapshot::visibility::{self, Snapshot};
use crate::source::{Frame, Source};

use acks::Acks;
use debts::{Debts, Reason};
use desk::Desk;
use intake::{Ask, Intake};
use look::Looked;
use orders::{Messages, Order};
use probe::Probing;
use reads::Reads;
use refreshes::Refreshes;
use report::RuleMetrics;
use tables::Tables;

pub mod acks;
pub mod debts;
pub mod desk;
pub mod gap;
pub mod intake;
mod lane;
mod later;
mod look;
pub mod open;
pub mod orders;
mod probe;
mod reads;
mod refreshes;
mod renewal;
mod report;
pub mod tables;

/// How often the session looks after what no event questions for. Postgres hears of us as often, which keeps the connection
/// even where nothing can be read for now (`wal_sender_timeout` is 60 s by default).
const TICK: Duration = Duration::from_secs(1);
/// What waits for transactions to be visible is looked after no sooner than this after the last look, and each time that was
/// in vain so much later.
const LOOK_PAUSE: Duration = Duration::from_millis(5);
const LOOK_PAUSE_MAX: Duration = Duration::from_millis(250);
/// How much may be collected that waits for the same look.
const LATER_LIMITS: Limits = Limits { ops: 16_384, bytes: 8 << 20 };
/// How many rules whose tables are gone are swept together.
const VANISHED_AT_A_TIME: usize = 64;
/// How often slot and catalog are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// How often (in microseconds) members of tags whose keys are gone are looked for: applications add some, and keys expire.
const FORGET_EVERY_US: u64 = 3_600_000_000;
/// How long an orderly end may take.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// No query of ours may take longer: the loop waits for those that bind a table.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(15);
/// Nor all of those together.
const BIND_LIMIT: Duration = Duration::from_secs(30);
/// How long the first checkpoint of a session may take.
const CLAIM_LIMIT: Duration = Duration::from_secs(30);
/// A session that streamed for so long was a good one: the next wait is the shortest again.
const GOOD_SESSION: Duration = Duration::from_secs(10);

/// What `keepstep run` was asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// End once everything that Postgres had flushed at the start is in the cache.
    pub until_caught_up: bool,
    /// Begin a new epoch where slot and cache do not fit together.
    pub adopt: bool,
    /// End once every order that waits at the start is carried out; any trouble ends it too.
    pub until_done: bool,
}

/// What lasts from session to session.
pub struct Daemon {
    /// The rules file.
    pub config: Arc<Config>,
    /// Its rules, as the cache remembers them.
    pub rules: Arc<RuleSet>,
    /// See [`Metrics`].
    pub metrics: Arc<Metrics>,
    /// What `/status` shows.
    pub shared: Arc<Shared>,
    /// Where orders are placed.
    pub desk: Arc<Desk>,
}

impl Daemon {
    /// With these rules, and what is ordered at its desk.
    pub fn new(config: Config) -> (Self, mpsc::Receiver<Order>) {
        let config = Arc::new(config);
        let shared = Arc::new(Shared::new(Status::default()));
        let (desk, orders) = Desk::open(Arc::clone(&config), Arc::clone(&shared));
        let metrics = Arc::new(Metrics::new());
        let mut daemon = Daemon { rules: Arc::new(RuleSet::new(&config.rules)), config, metrics, shared, desk };
        daemon.show_rules();
        (daemon, orders)
    }

    /// What the rules with patterns come to is known now.
    fn matched(&mut self, config: Config) {
        let config = Arc::new(config);
        self.desk.matched(&self.config, &config);
        self.rules = Arc::new(RuleSet::new(&config.rules));
        self.config = config;
        self.show_rules();
    }

    /// The next session follows this configuration. What was `seen` last of a cache says nothing of another one.
    fn replace(&mut self, config: Arc<Config>, seen: &mut Option<Checkpoint>) {
        let (redis, postgres) = (&self.config.redis, &self.config.postgres);
        let same_cache = redis.url == config.redis.url && redis.prefix == config.redis.prefix;
        if !same_cache || postgres.url != config.postgres.url || postgres.slot != config.postgres.slot {
            *seen = None;
        }
        self.metrics.rule_paused.reset();
        self.metrics.forget(&self.config.rules, &config.rules);
        self.rules = Arc::new(RuleSet::new(&config.rules));
        self.config = config;
        self.show_rules();
    }

    fn show_rules(&mut self) {
        let rules = self.config.rules.iter().map(|rule| RuleStatus {
            name: rule.name.value.clone(),
            table: rule.table.value.to_string(),
            ..RuleStatus::default()
        });
        self.shared.update(|status| {
            env!("CARGO_PKG_VERSION").clone_into(&mut status.version);
            status.slot.clone_from(&self.config.postgres.slot);
            status.rules = rules.collect();
            status.phase = Phase::Connecting;
            status.warm_done = false;
        });
    }
}

/// Runs sessions until the end is asked for, or until trying again would not help.
pub async fn run(
    daemon: &mut Daemon,
    mut options: Options,
    mut orders: mpsc::Receiver<Order>,
    mut shutdown: Shutdown,
) -> Result<()> {
    let mut backoff = Backoff::default();
    let mut seen = None;
    loop {
        let began = Instant::now();
        let opened = tokio::select! {
            // Larger than what the loop itself holds, and long gone while it runs.
            opened = Box::pin(open::open(daemon, options, seen.as_ref())) => opened,
            () = shutdown.requested() => return Ok(()),
        };
        let error = match opened {
            Ok(mut session) => {
                // Adopting is for what was found at the start, not for what may happen later.
                options.adopt = false;
                let ended = session.stream(options, &mut orders, &mut shutdown).await;
                seen = Some(session.checkpoint);
                let goes_on = session.successor.is_some();
                if let Some(config) = session.successor {
                    daemon.replace(config, &mut seen);
                }
                match ended {
                    Ok(()) if goes_on => continue,
                    Ok(()) => return Ok(()),
                    Err(error) => error,
                }
            }
            Err(error) => error,
        };
        daemon.metrics.up.set(0);
        if error.kind() == ErrorKind::RedisAway {
            daemon.metrics.circuit_open.set(1);
        }
        daemon.shared.update(|status| {
            status.phase = Phase::Connecting;
            status.caught_up = false;
            status.warm_done = false;
            status.last_error = Some(error.to_string());
        });
        if !is_tried_again(&error, daemon.config.postgres.on_gap) || options.until_done {
            return Err(error);
        }
        if began.elapsed() > GOOD_SESSION {
            backoff.reset();
        }
        let wait = backoff.next_wait();
        tracing::warn!(%error, next_try_in = ?wait, "not streaming");
        daemon.shared.alive();
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shutdown.requested() => return Ok(()),
            config = reloaded(&mut orders) => daemon.replace(config, &mut seen),
        }
    }
}

/// The next configuration, while nothing streams. A pass that was ordered just before the stream ended is given up, and
/// whoever asked for it hears so.
async fn reloaded(orders: &mut mpsc::Receiver<Order>) -> Arc<Config> {
    loop {
        match orders.recv().await {
            Some(Order::Reload(config)) => return config,
            Some(Order::Pass(pass)) => drop(pass),
            None => std::future::pending().await,
        }
    }
}

/// A gap that shows while streaming is looked at by the next session, and mended there.
fn is_tried_again(error: &Error, on_gap: OnGap) -> bool {
    error.kind().is_transient() || (error.kind() == ErrorKind::Gap && on_gap == OnGap::Reconcile)
}

/// Prints the commands of changes from now on, until the end is asked for; touches neither slot nor cache.
pub async fn dry_run<W: Write + Send + 'static>(daemon: &mut Daemon, out: W, mut shutdown: Shutdown) -> Result<()> {
    let (_, mut orders) = mpsc::channel(1);
    open::open_dry(daemon, out).await?.stream(Options::default(), &mut orders, &mut shutdown).await
}

/// The cache and the batch come back with the outcome.
type InFlight<C> = Pin<Box<dyn Future<Output = (C, Batch, Result<Outcome>)> + Send>>;

#[expect(clippy::large_enum_variant, reason = "there is one of it")]
enum Outcome {
    Applied(Applied),
    Compared(Vec<Differing>),
}

/// What is in flight, or was last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flying {
    /// A batch of the stream.
    Stream,
    /// What was read from tables.
    Read,
    /// A question what the cache holds.
    Comparison {
        /// No row has these keys.
        orphans: bool,
    },
}

type Settling = Pin<Box<dyn Future<Output = Result<Snapshot>> + Send>>;
type LookingUp = Pin<Box<dyn Future<Output = (Box<Lookups>, Batch)> + Send>>;
type Looking = Pin<Box<dyn Future<Output = Result<Looked>> + Send>>;

/// One stream of changes into one cache.
pub struct Session<C> {
    config: Arc<Config>,
    metrics: Arc<Metrics>,
    shared: Arc<Shared>,
    rule_metrics: Vec<RuleMetrics>,
    client: Arc<tokio_postgres::Client>,
    source: Source,
    tables: Tables,
    intake: Intake,
    messages: Messages,
    desk: Arc<Desk>,
    /// Why the tables that there are now are not followed.
    tables_refused: Option<String>,
    /// Tables of rules that owe, by names that the stream knows nothing of.
    unbound: BTreeSet<TableName>,
    /// The rules for the tables that there are now, once a pass has ended that would have to begin anew.
    next_tables: Option<Config>,
    /// Rules whose tables are gone, and whose keys still stand.
    vanished: Vec<Vanished>,
    /// What the next session follows, once it was ordered.
    successor: Option<Arc<Config>>,
    /// Fills.
    batch: Batch,
    /// Empty, while none is in flight.
    spare: Option<Batch>,
    /// At home, while no batch is in flight and nobody looks after it.
    cache: Option<C>,
    in_flight: Option<InFlight<C>>,
    flying: Flying,
    reads: Reads,
    settling: Option<Settling>,
    /// At home, while it answers nothing.
    lookups: Option<Box<Lookups>>,
    looking_up: Option<LookingUp>,
    refreshes: Box<Refreshes>,
    /// How many looks in a row have not shown what something waits for.
    looks_in_vain: u32,
    /// When the last one ended.
    looked_visible_at: Instant,
    probing: Option<Probing<C>>,
    /// When Redis last answered.
    answered_at: Instant,
    looking: Option<Looking>,
    /// As Redis holds it.
    checkpoint: Checkpoint,
    /// Up to here (microseconds since 1970) what `every` asks for is among the debts.
    rewritten_us: u64,
    debts: Debts,
    /// What the catalog said of the tables at the last look.
    signatures: Signatures,
    /// The cache has not been told of them.
    signatures_unsaid: bool,
    /// Up to here every reply of Redis was seen to be good.
    proven: Position,
    /// Where the stream has come to with the last batch that was sent.
    reached: Position,
    /// The same as what may be acknowledged once nothing is pending.
    reached_low: Lsn,
    /// The session ends by itself.
    ends_when_caught_up: bool,
    acks: Acks,
    /// The last look at the received bytes ended before they did.
    more_buffered: bool,
    /// The end of what Postgres has sent.
    received: Lsn,
    /// The end of the server's log when the session began.
    flushed_at_start: Lsn,
    /// The same as it was when the slot was looked at last.
    server_end: Lsn,
    looked_at: Option<Instant>,
    /// Members of tags whose keys are gone are to be looked for.
    forget_due: bool,
    heartbeat_sent: Instant,
    /// The server has asked to hear from us.
    reply_requested: bool,
    /// Progress without operations is worth a checkpoint of its own.
    checkpoint_due: bool,
}

impl<C: Cache + Send + 'static> Session<C> {
    /// Streams until the end is asked for or reached; every error ends the session.
    async fn stream(
        &mut self,
        options: Options,
        orders: &mut mpsc::Receiver<Order>,
        shutdown: &mut Shutdown,
    ) -> Result<()> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut drain_until = None;
        self.ends_when_caught_up = options.until_caught_up || options.until_done;
        self.owe_rewrites(report::now_us());
        loop {
            self.shared.alive();
            if drain_until.is_none() {
                self.start_reads()?;
            }
            self.release();
            if drain_until.is_none() {
                self.start_refreshes();
            }
            let dispatched = self.dispatch();
            if self.is_done(options, drain_until) || options.until_done && orders.is_empty() && self.reads.is_idle() {
                self.finish().await;
                return Ok(());
            }
            let reading = drain_until.is_none() && self.has_room();
            let finding = drain_until.is_none() && (self.in_flight.is_none() || self.flying == Flying::Stream);
            tokio::select! {
                biased;
                (cache, batch, outcome) = optional(&mut self.in_flight) => self.answered(cache, batch, outcome)?,
                _ = tick.tick() => self.tick(options).await?,
                looked = optional(&mut self.looking) => self.looked(looked?)?,
                (cache, held) = optional(&mut self.probing) => self.probed(cache, held)?,
                snapshot = optional(&mut self.settling) => self.settled(snapshot?),
                (lookups, answers) = optional(&mut self.looking_up) => self.looked_up(lookups, &answers),
                read = refreshes::read(&mut self.refreshes, self.batch.is_full()), if drain_until.is_none() => {
                    self.refreshed(read)?;
                }
                heard = reads::heard(&mut self.reads, finding) => self.heard(heard)?,
                () = shutdown.requested(), if drain_until.is_none() => {
                    self.shared.update(|status| status.phase = Phase::Ending);
                    drain_until = Some(Instant::now() + DRAIN_LIMIT);
                }
                Some(order) = orders.recv(), if drain_until.is_none() => match order {
                    Order::Reload(config) => {
                        // With a last checkpoint the next session does not hear again what commanded this.
                        self.checkpoint_due = true;
                        self.successor = Some(config);
                        drain_until = Some(Instant::now() + DRAIN_LIMIT);
                    }
                    Order::Pass(pass) => self.reads.ask(pass),
                },
                filled = readable(&mut self.source, self.more_buffered, dispatched), if reading => {
                    filled?;
                    self.take_frames().await?;
                }
            }
        }
    }

    /// Whether anything more may be read: a replay that must stay together goes beyond the limits of a batch.
    fn has_room(&self) -> bool {
        let room = !self.batch.is_full() || self.intake.replaying();
        room && self.intake.has_room()
    }

    /// Takes what has been received, until the batch is full: a batch that left out what is here already would only be
    /// smaller, and what a batch costs by itself is more than what a change costs.
    async fn take_frames(&mut self) -> Result<()> {
        self.more_buffered = true;
        while self.has_room() {
            let ask = match self.source.next_buffered()? {
                None => {
                    self.more_buffered = false;
                    break;
                }
                Some(Frame::Keepalive { wal_end, reply_requested }) => {
                    self.received = self.received.max(wal_end);
                    self.reply_requested |= reply_requested;
                    self.intake.idle(wal_end, &mut self.batch);
                    None
                }
                Some(Frame::Visible(snapshot)) => {
                    self.intake.settle(snapshot.clone());
                    None
                }
                Some(Frame::Data { wal_end, body, .. }) => {
                    self.received = self.received.max(wal_end);
                    let event = pgoutput::parse(body).map_err(undecodable)?;
                    let commands = self.messages.hear(&event);
                    let ask = self.intake.take(event, &mut self.batch)?;
                    commands.into_iter().for_each(|command| self.desk.obey(command));
                    ask
                }
            };
            match ask {
                None => {}
                Some(Ask::Hear(content)) => self.reads.hear(&content, !self.batch.is_empty()),
                Some(Ask::Bind(relation)) => {
                    self.owe_renamed(&relation);
                    self.bind(relation).await?;
                }
            }
        }
        match self.reply_requested {
            true => self.send_status(false).await,
            false => Ok(()),
        }
    }

    async fn bind(&mut self, relation: Relation) -> Result<()> {
        let bound = tokio::time::timeout(BIND_LIMIT, self.tables.bind(relation, &self.client)).await;
        self.intake.bind(bound.unwrap_or_else(|_| Err(catalog_silent()))?);
        Ok(())
    }

    /// Tables are bound by the names that the catalog has for them now. What the stream has described already keeps its
    /// columns: so its rows are sent until it says something else.
    async fn bind_unbound(&mut self) -> Result<()> {
        for name in std::mem::take(&mut self.unbound) {
            let Some(now) = self.tables.relation(&name, &self.client).await? else { continue };
            let TableName { schema, name } = name;
            let sent = self.intake.relation(now.oid).map(|sent| Relation { schema, name, ..sent.clone() });
            self.bind(sent.unwrap_or(now)).await?;
        }
        Ok(())
    }

    /// The stream calls a table something else than before. What it brings of it is nothing to the rules of its old name, and it
    /// may get that back without leaving a trace in the catalog.
    fn owe_renamed(&mut self, relation: &Relation) {
        let Some(known) = self.intake.relation(relation.oid).map(TableName::from) else { return };
        if known == TableName::from(relation) {
            return;
        }
        let rules: Vec<&Rule> = self.config.rules.iter().filter(|rule| rule.table.value == known).collect();
        if !rules.is_empty() {
            tracing::warn!(table = %known, now = %TableName::from(relation), "the table was renamed: its rules are reconciled");
            self.metrics.reconciles_total.with_label_values(&[Reason::Catalog.label()]).inc();
        }
        rules.iter().for_each(|rule| self.debts.owe(&rule.name.value, Debt::Reconcile));
    }

    /// Sends something if nothing is in flight; whether it did. The stream and what is read take turns.
    fn dispatch(&mut self) -> bool {
        if self.in_flight.is_some() || self.cache.is_none() {
            return false;
        }
        match self.flying {
            Flying::Stream => self.dispatch_read() || self.dispatch_stream(),
            Flying::Read | Flying::Comparison { .. } => self.dispatch_stream() || self.dispatch_read(),
        }
    }

    /// Sends the batch if it is complete.
    fn dispatch_stream(&mut self) -> bool {
        let ready = if self.intake.is_whole(&self.batch) {
            !self.batch.is_empty() || self.checkpoint_due
        } else {
            self.batch.is_full() && !self.intake.replaying()
        };
        let (Some(applied), true) = (self.batch.applied, ready) else { return false };
        debug_assert!(applied >= self.reached, "the checkpoint never moves back");
        let Some(spare) = self.spare.take() else { return false };
        let batch = std::mem::replace(&mut self.batch, spare);
        (self.reached, self.reached_low) = (applied, batch.low);
        // Without operations there is no reply that could be bad.
        let good = if batch.is_empty() { applied } else { self.proven };
        // What is asked of Postgres once more, after a crash, was released before.
        let released = batch.released.max(self.intake.released_up_to(applied)).unwrap_or_default();
        let next = self.next_checkpoint(applied, self.low(), good, released);
        self.checkpoint_due = false;
        self.reads.stream_dispatched();
        self.fly(batch, next, Flying::Stream)
    }

    /// Where to start again after a crash: nothing from here on is settled and done with.
    fn low(&self) -> Lsn {
        let pending = [self.intake.oldest_pending(), self.reads.oldest_pending(), self.refreshes.oldest()];
        match canary::is(Canary::AckPastLow) {
            true => self.reached_low,
            false => pending.into_iter().flatten().fold(self.reached_low, Lsn::min),
        }
    }

    fn next_checkpoint(&mut self, applied: Position, low: Lsn, good: Position, released: Position) -> Checkpoint {
        let released = released.max(self.checkpoint.released);
        self.tables.take_owing().iter().for_each(|(rule, debt)| self.debts.owe(rule, *debt));
        for rule in self.intake.take_overcharged() {
            self.debts.owe(&self.config.rules[usize::from(rule)].name.value, Debt::Warm);
        }
        let written_us = report::now_us();
        self.owe_rewrites(written_us);
        if let (true, Some(cache)) = (std::mem::take(&mut self.signatures_unsaid), &mut self.cache) {
            cache.remember(&self.signatures);
        }
        let owing = self.debts.next(&self.checkpoint.owing);
        // Whoever comes to owe anew is read from the beginning.
        self.reads.progress.take_if(|progress| progress.rules.iter().any(|rule| self.debts.is_new(rule)));
        let progress = self.reads.progress.clone();
        // A restart begins at the lower of the two.
        let drains = self.source.drains(low.min(good.lsn), good.min(released).lsn);
        // Without a copy of what rules owed before.
        let Checkpoint { version, epoch, gap, ref origin, ref rules, .. } = self.checkpoint;
        let (origin, rules) = (origin.clone(), rules.clone());
        Checkpoint {
            version,
            origin,
            epoch,
            applied,
            low,
            good,
            rules,
            written_us,
            released,
            owing,
            progress,
            drains,
            gap,
        }
    }

    /// Rules whose `every` has come round owe their keys. A checkpoint holds all that came to owe before it was written, so
    /// that its time is where the next session goes on from, however long it was away. Tags come round in the same way.
    fn owe_rewrites(&mut self, now_us: u64) {
        self.forget_due |= self.rewritten_us / FORGET_EVERY_US < now_us / FORGET_EVERY_US;
        let due: Vec<(&str, Debt)> = debts::to_rewrite(&self.config.rules, self.rewritten_us, now_us).collect();
        self.rewritten_us = now_us;
        if due.is_empty() {
            return;
        }
        let owing = self.debts.next(&self.checkpoint.owing);
        // What is owed already writes these keys, all of them.
        self.reads.rewrite(&due, &self.debts);
        due.iter().filter(|(rule, _)| !owing.contains_key(*rule)).for_each(|(rule, debt)| self.debts.owe(rule, *debt));
    }

    fn fly(&mut self, batch: Batch, next: Checkpoint, flying: Flying) -> bool {
        let Some(mut cache) = self.cache.take() else { return false };
        self.flying = flying;
        if batch.searches() {
            self.intake.rest();
        }
        self.in_flight = Some(Box::pin(async move {
            let outcome = cache.apply(&batch, next).await.map(Outcome::Applied);
            (cache, batch, outcome)
        }));
        true
    }

    /// Redis has answered.
    fn answered(&mut self, cache: C, mut batch: Batch, outcome: Result<Outcome>) -> Result<()> {
        self.in_flight = None;
        self.cache = Some(cache);
        let Applied { checkpoint, invalidated, owed, searched } = match (outcome?, self.flying) {
            (Outcome::Applied(applied), _) => applied,
            (Outcome::Compared(differing), flying) => {
                self.compared(batch, &differing, flying == Flying::Comparison { orphans: true });
                self.refreshes.answer();
                return Ok(());
            }
        };
        self.answered_at = Instant::now();
        // Redis is left to others for as long as going through all keys took.
        self.intake.rest_until(self.answered_at + searched);
        if self.flying == Flying::Stream {
            self.proven = checkpoint.applied;
        }
        self.checkpoint = checkpoint;
        if owed {
            // What a pass under way has written may be among what was deleted.
            self.checkpoint.owing.iter().for_each(|(rule, debt)| self.debts.owe(rule, *debt));
            self.reads.progress = None;
        }
        self.debts.stored(&self.checkpoint.owing);
        report::batch(&batch, invalidated, &self.rule_metrics, &self.metrics);
        self.metrics.rules_owing.set(self.checkpoint.owing.len() as i64);
        match self.flying {
            Flying::Stream => {
                batch.clear();
                self.spare = Some(batch);
            }
            Flying::Read | Flying::Comparison { .. } => self.recycle(batch),
        }
        Ok(())
    }

    /// What has become of debts, or of `low`, goes into a checkpoint soon, even if no change comes.
    fn note_progress(&mut self) {
        self.checkpoint_due = true;
        self.stand_here();
    }

    /// The batch that fills says how far the stream has come, even if it is no further than the one before.
    fn stand_here(&mut self) {
        if self.batch.applied.is_none() {
            (self.batch.applied, self.batch.low) = (Some(self.reached), self.reached_low);
        }
    }

    /// A snapshot of the primary has come.
    fn settled(&mut self, snapshot: Snapshot) {
        self.settling = None;
        self.looked_visible_at = Instant::now();
        self.intake.settle(snapshot);
        match self.intake.wants_look() {
            true => self.looks_in_vain += 1,
            false => self.looks_in_vain = 0,
        }
    }

    /// Postgres has said what else goes.
    fn looked_up(&mut self, lookups: Box<Lookups>, answers: &Batch) {
        self.looking_up = None;
        self.lookups = Some(lookups);
        self.intake.looked_up(answers);
    }

    /// Has answered what can be answered by now.
    fn look_up(&mut self) {
        if self.lookups.is_none() {
            return;
        }
        let questions = self.intake.take_questions();
        if let Some(mut lookups) = self.lookups.take_if(|_| !questions.is_empty()) {
            self.looking_up = Some(Box::pin(async move {
                let answers = lookups.answer(&questions).await;
                (lookups, answers)
            }));
        }
    }

    /// What waited until it is visible goes into the batch that fills. What still waits is looked after soon, and less often
    /// the longer that takes.
    fn release(&mut self) {
        self.look_up();
        let again = self.intake.release_again(&mut self.batch);
        let released = self.intake.release(&mut self.batch);
        let some = again || released.is_some();
        if let Some(released) = released {
            self.make_stale(released);
        }
        if some {
            self.stand_here();
        }
        if self.settling.is_none() && self.intake.wants_look() {
            let since = self.looked_visible_at.elapsed();
            let pause = (LOOK_PAUSE * (1 + self.looks_in_vain)).min(LOOK_PAUSE_MAX).saturating_sub(since);
            let client = Arc::clone(&self.client);
            self.settling = Some(Box::pin(async move {
                tokio::time::sleep(pause).await;
                visibility::look(&client).await
            }));
        }
    }

    /// Acknowledges, keeps the connection alive, notes idle progress, looks after slot, catalog and cache, shows the
    /// status.
    async fn tick(&mut self, options: Options) -> Result<()> {
        let now = Instant::now();
        self.acks.advance(now, self.checkpoint.low);
        // Asked for a reply, the server tells where its log ends even if there is nothing to send.
        // So does a stream that has not shown yet that it is past what the cache holds.
        self.send_status(options.until_caught_up || !self.intake.is_past_start()).await?;
        self.owe_rewrites(report::now_us());
        let behind = self.batch.applied.is_some_and(|applied| applied > self.checkpoint.applied);
        // While a batch is in flight the stored checkpoint is about to be an old one.
        let unsaid = self.checkpoint.good < self.proven || self.checkpoint.low < self.low() || self.debts.is_due();
        self.checkpoint_due |= behind;
        if unsaid && self.in_flight.is_none() {
            self.note_progress();
        }
        self.look_at_visibility();
        self.sweep_vanished();
        self.bind_unbound().await?;
        self.look(now);
        self.forget_stale();
        self.probe_if_idle(now);
        self.show();
        Ok(())
    }

    /// Members of tags that rules delete by go, now and then, where their keys have gone by themselves.
    fn forget_stale(&mut self) {
        if !self.intake.is_past_start() || !std::mem::take(&mut self.forget_due) {
            return;
        }
        let rules = self.intake.tables().flat_map(|table| &table.rules);
        let tags: Vec<Pattern> = rules.flat_map(BoundRule::delete_tags).map(|tag| tag.pattern.clone()).collect();
        if !tags.is_empty() {
            self.intake.say_claims(&mut self.batch);
            tags.into_iter().for_each(|tags| self.batch.sweep_stale(tags));
            self.stand_here();
        }
    }

    /// Keys of tables that are gone go with the batch that fills; some at a time, since each key that Redis holds is compared
    /// with all of them.
    fn sweep_vanished(&mut self) {
        if self.vanished.is_empty() || self.in_flight.is_some() || !self.intake.is_past_start() {
            return;
        }
        self.intake.say_claims(&mut self.batch);
        let some = self.vanished.len().min(VANISHED_AT_A_TIME);
        for vanished in self.vanished.drain(..some) {
            self.batch.sweep_vanished(vanished, &self.config.redis.prefix);
        }
        self.stand_here();
    }

    /// Asks which of the transactions that were decoded are visible by now.
    fn look_at_visibility(&mut self) {
        if self.settling.is_none() && self.intake.unsettled().len() > 0 {
            let client = Arc::clone(&self.client);
            self.settling = Some(Box::pin(async move { visibility::look(&client).await }));
        }
    }

    async fn send_status(&mut self, request_reply: bool) -> Result<()> {
        self.reply_requested = false;
        self.source.send_status(self.acks.acknowledged(), request_reply).await
    }

    /// What `/status` and the gauges say now.
    fn show(&self) {
        let applied = self.checkpoint.applied;
        // While nothing is read the server's log goes on growing, and so does the lag.
        let end = self.received.max(self.server_end).max(self.flushed_at_start);
        let lag_bytes = end.0.saturating_sub(applied.lsn.0);
        let caught_up = lag_bytes == 0 && self.in_flight.is_none() && self.batch.is_empty();
        self.metrics.refreshes_pending.set(i64::try_from(self.refreshes.stale()).unwrap_or(i64::MAX));
        self.metrics.replication_lag_bytes.set(i64::try_from(lag_bytes).unwrap_or(i64::MAX));
        self.metrics.epoch.set(i64::try_from(self.checkpoint.epoch).unwrap_or(i64::MAX));
        self.shared.update(|status| {
            status.epoch = self.checkpoint.epoch;
            status.received = self.received;
            status.applied = applied;
            status.acknowledged = self.acks.acknowledged();
            status.lag_bytes = lag_bytes;
            status.caught_up = caught_up;
            status.warm_done = self.checkpoint.owing.is_empty();
            status.passes = self.reads.status();
            status.redis_away = self.metrics.circuit_open.get() == 1;
            for rule in &mut status.rules {
                rule.owing = self.checkpoint.owing.contains_key(&rule.name);
            }
        });
    }

    /// Whether there is nothing left to do, or no time left to do it.
    fn is_done(&self, options: Options, drain_until: Option<Instant>) -> bool {
        if drain_until.is_some_and(|limit| Instant::now() >= limit) {
            tracing::warn!("the batch under way was not answered in time; it is applied again at the next start");
            return true;
        }
        let idle = self.in_flight.is_none() && (self.batch.is_empty() || !self.intake.is_whole(&self.batch));
        let caught_up = options.until_caught_up
            && self.checkpoint.applied.lsn >= self.flushed_at_start
            && self.reads.is_idle()
            && !self.intake.has_rereads()
            && !self.intake.has_later()
            && self.vanished.is_empty()
            && !self.forget_due
            && self.refreshes.oldest().is_none()
            && !self.can_pay();
        idle && (drain_until.is_some() || caught_up)
    }

    /// The last word to Postgres.
    async fn finish(&mut self) {
        self.acks.advance(Instant::now(), self.checkpoint.low);
        self.show();
        tracing::info!(applied = %self.checkpoint.applied, "ended; the next start goes on from here");
        if let Err(error) = self.source.close(self.acks.acknowledged()).await {
            tracing::warn!(%error, "Postgres has not heard the last acknowledgement; it sends a little again");
        }
    }
}

/// Returns when there is something to take. A batch just dispatched goes first: on this one thread its commands reach
/// the socket only once nothing else is ready, and while Redis works on them the next batch fills.
async fn readable(source: &mut Source, more_buffered: bool, dispatched: bool) -> Result<()> {
    if dispatched {
        tokio::task::yield_now().await;
    }
    if more_buffered { Ok(()) } else { source.fill().await }
}

/// The future's output, or never while there is none.
async fn optional<F: Future + Unpin>(future: &mut Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

fn catalog_silent() -> Error {
    Error::new(ErrorKind::PostgresAway, format!("Postgres did not describe a table within {BIND_LIMIT:?}"))
}

fn undecodable(error: pgoutput::DecodeError) -> Error {
    Error::new(ErrorKind::Protocol, "cannot read a message of the replication stream").because(error)
}

/// The limits that `[redis]` sets.
fn limits(config: &Config) -> Limits {
    Limits { ops: config.redis.batch_ops, bytes: config.redis.batch_bytes }
}
