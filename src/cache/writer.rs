//! The one writer: MULTI … EXEC with the checkpoint inside, the fence around it, and going on after a lost connection.
//!
//! Each connection begins by replacing the fence with a token of its own. Behind each EXEC stand WATCH of fence and
//! checkpoint and a GET of both, so the next EXEC happens only if nobody has touched them since: a second daemon, a
//! FLUSHALL, a failover or a late EXEC of a dead connection are seen before anything is written over them.
//!
//! After a lost connection the checkpoint in Redis says whether the batch in flight was applied. It is sent again
//! either way: nothing can have come after it, so the same values are written once more.
//!
//! **Architecture invariant:** one batch is in flight at a time. A checkpoint that is neither the last one known nor
//! the one in flight ends the session; it is never written over.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::{Cmd, Value};

use crate::backoff::Backoff;
use crate::batch::{Batch, CacheOp, Claim, Members, Sweep, Vanished};
use crate::catalog::signature::Signatures;
use crate::config::open::OpenRule;
use crate::config::{RedisConfig, Rule};
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Metrics;
use crate::rules::bind::Tagging;
use crate::rules::pattern::Pattern;
use crate::rules::template::RESERVED;

use super::checkpoint::{Checkpoint, Debt, RuleSet};
use super::claims::{Claims, Former};
use super::connection::{Connection, Failure};
use super::keyspace::common_prefix;
use super::{Applied, Cache, Differing, claims, commands};

mod compare;

use instance::Instance;
use tags::Leaving;

mod instance;
mod tags;

/// What one SCAN call looks at, and so what one sweep step may delete.
const SWEEP_STEP_KEYS: u32 = 1000;

/// What must work where `maxmemory` is reached too: deletes first (a script that begins with a write may go on), then
/// fences and checkpoint, and only while these are what was seen last.
///
/// KEYS: checkpoint, fences, deletes, and last a set, if it loses members. ARGV: the checkpoint before, fence and checkpoint
/// after, the number of fences, each of them before, and the members that the set loses.
const GUARDED: &str = "\
local fences = tonumber(ARGV[4])
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
for i = 1, fences do
  if (redis.call('GET', KEYS[i + 1]) or '') ~= ARGV[i + 4] then return 0 end
end
local deletes = #ARGV > fences + 4 and #KEYS - 1 or #KEYS
for i = fences + 2, deletes do redis.call('UNLINK', KEYS[i]) end
for i = fences + 5, #ARGV do redis.call('SREM', KEYS[#KEYS], ARGV[i]) end
for i = 1, fences do redis.call('SET', KEYS[i + 1], ARGV[2]) end
if ARGV[3] ~= '' then redis.call('SET', KEYS[1], ARGV[3]) end
return 1";

/// Nothing to delete.
const NONE: &[&[u8]] = &[];

/// The writer of one cache.
pub struct Writer {
    config: RedisConfig,
    metrics: Arc<Metrics>,
    rules: Arc<RuleSet>,
    /// One under each prefix: what is one daemon's main prefix may be another's `also_prefix`.
    fence_keys: Vec<String>,
    checkpoint_key: String,
    /// This process, in every fence it sets.
    daemon: String,
    /// Counts connections: no two of them share a fence.
    connections: u64,
    /// The fence as this daemon last set it.
    fence: String,
    /// Open, fenced, and watching.
    connection: Option<Connection>,
    /// What Redis holds, as far as is known.
    stored: Option<Checkpoint>,
    /// What each prefix can hold, the main one first.
    records: Vec<Record>,
    /// What a delete by tag leaves of each rule's.
    tagging: BTreeMap<u16, Tagging>,
    /// What the catalog says of the tables, for the next batch.
    catalog: Option<Signatures>,
    /// The server process that was found behind the last connection.
    instance: Option<Instance>,
}

/// What stands behind each batch, and must stand there before the next.
struct Watched {
    /// One for each prefix; empty where there is none.
    fences: Vec<String>,
    stored: Option<Checkpoint>,
}

/// The claims under one prefix.
struct Record {
    key: String,
    claims: Claims,
    /// Redis holds them as they are here.
    written: bool,
}

impl Writer {
    /// A writer that is not connected yet.
    pub fn new(config: RedisConfig, rules: Arc<RuleSet>, metrics: Arc<Metrics>) -> Result<Self> {
        let random = getrandom::u64().map_err(|error| {
            Error::new(ErrorKind::Io, "the system gives no random numbers, which the fence needs").because(error)
        })?;
        Ok(Writer {
            fence_keys: config.prefixes().map(|prefix| format!("{prefix}{RESERVED}fence")).collect(),
            checkpoint_key: Checkpoint::key(&config.prefix),
            config,
            metrics,
            rules,
            daemon: format!("{random:016x}"),
            connections: 0,
            fence: String::new(),
            connection: None,
            stored: None,
            records: Vec::new(),
            tagging: BTreeMap::new(),
            catalog: None,
            instance: None,
        })
    }

    /// What Redis holds now, through a connection of its own; claims nothing.
    pub async fn read_checkpoint(&self) -> Result<Option<Checkpoint>> {
        let read = async {
            let mut connection = Connection::open(&self.config).await?;
            let stored = connection.send_one(get(&self.checkpoint_key)).await?;
            self.decode(&stored)
        };
        let checkpoint = read.await.map_err(into_error)?;
        self.metrics.circuit_open.set(0);
        Ok(checkpoint)
    }

    /// The fingerprints of the rules that wrote the cache, by name; `None` if that is not known.
    pub async fn read_rules(&self) -> Result<Option<BTreeMap<String, String>>> {
        let read = async {
            let mut connection = Connection::open(&self.config).await?;
            claims::read(&mut connection, &self.config.prefix).await
        };
        let claims = read.await.map_err(into_error)?;
        Ok(claims.map(|claims| claims.fingerprints(&self.rules, &self.config.also_prefix)))
    }

    /// What the catalog said of the tables when the cache was last right; `None` if that is not known.
    pub async fn read_catalog(&self) -> Result<Option<Signatures>> {
        Ok(self.read(&self.catalog_key()).await?.and_then(|stored| Signatures::decode(&stored)))
    }

    /// The value of a key, through a connection of its own.
    async fn read(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let read = async { Connection::open(&self.config).await?.send_one(get(key)).await };
        match read.await.map_err(into_error)? {
            Value::BulkString(stored) => Ok(Some(stored)),
            _ => Ok(None),
        }
    }

    /// The keys that each rule made before and that may be there still; known once the cache is claimed.
    pub fn former(&self, rules: &[Rule]) -> Vec<Former> {
        let owns = |rule: &Rule| rule.write.as_ref().is_some_and(|write| write.owns);
        let rules = rules.iter().map(|rule| (rule.name.value.as_str(), owns(rule)));
        self.records.first().map(|record| record.claims.former(rules, &self.config.prefix)).unwrap_or_default()
    }

    /// The rules of patterns whose tables are gone; known once the cache is claimed.
    pub fn vanished(&self, open: &[OpenRule]) -> Vec<Vanished> {
        let is_open = |pattern: &str| open.iter().any(|open| open.name() == pattern);
        self.records.first().map(|record| record.claims.vanished(is_open)).unwrap_or_default()
    }

    fn catalog_key(&self) -> String {
        format!("{}{RESERVED}catalog", self.config.prefix)
    }

    /// Makes this daemon the one that writes; only for whoever holds the slot. `expected` is the checkpoint that the
    /// session was prepared for: if Redis holds another one by now, the session has to begin anew.
    pub async fn claim(&mut self, expected: Option<Checkpoint>) -> Result<()> {
        let claim = async {
            let mut connection = Connection::open(&self.config).await?;
            let Watched { fences, stored } = self.watch(&mut connection).await?;
            if stored != expected {
                let moved = "another daemon has written this cache in the meantime";
                return Err(Failure::Away(Error::new(ErrorKind::Fenced, moved)));
            }
            self.stored = stored;
            self.records = self.read_records(&mut connection).await?;
            self.set_fences(&mut connection, &fences).await?;
            Ok(connection)
        };
        self.connection = Some(claim.await.map_err(into_error)?);
        Ok(())
    }

    /// What Redis knows of each prefix, and that these are the rules now.
    async fn read_records(&self, connection: &mut Connection) -> Result<Vec<Record>, Failure> {
        let mut records = Vec::new();
        for prefix in self.config.prefixes() {
            let stored = claims::read(connection, prefix).await?;
            let mut claims = stored.clone().unwrap_or_default();
            // Only the main prefix knows which others go with it.
            let also = if records.is_empty() { self.config.also_prefix.as_slice() } else { &[] };
            claims.adopt(&self.rules, also);
            records.push(Record { key: Claims::key(prefix), written: stored.as_ref() == Some(&claims), claims });
        }
        Ok(records)
    }

    /// Takes over what the batch says of its rules' keys.
    fn note_claims(&mut self, batch: &Batch) {
        for vanished in batch.vanished() {
            for record in &mut self.records {
                record.written &= !record.claims.gone_with_table(vanished);
            }
        }
        for (number, claim) in batch.claims() {
            let rule = &self.rules.names[usize::from(*number)];
            for record in &mut self.records {
                let changed = match claim {
                    Claim::Makes(forms) => record.claims.makes(rule, forms),
                    Claim::Gone(forms) => record.claims.gone(rule, forms),
                    Claim::Tags(_) => false,
                };
                record.written &= !changed;
            }
            if let Claim::Tags(tagging) = claim {
                self.tagging.insert(*number, tagging.clone());
            }
        }
    }

    /// Applies the batch, and says how long that went through all keys; or why not. To `refused` streams nothing was added
    /// when the rest was done.
    async fn try_apply(
        &mut self,
        batch: &Batch,
        checkpoint: &Checkpoint,
        refused: &BTreeSet<Vec<u8>>,
    ) -> Result<Duration, Failure> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.resume(Some(checkpoint)).await?,
        };
        self.note_claims(batch);
        let searched = self.sweep_all(&mut connection, batch, checkpoint).await?;
        // Redis holds this batch's checkpoint already: its answer was lost, or one of its commands failed. What the rules owe
        // may have become more since.
        let same =
            |stored: &Checkpoint| (stored.applied, stored.written_us) == (checkpoint.applied, checkpoint.written_us);
        let done = self.stored.as_ref().is_some_and(same);
        let mut transaction = commands::encode(batch, &self.config, |target| !done || refused.contains(target));
        let unwritten = self.records.iter().filter(|record| !record.written);
        transaction.extend(unwritten.map(|record| set(&record.key, &record.claims.encode())));
        if let Some(catalog) = &self.catalog {
            transaction.push(set(&self.catalog_key(), &catalog.encode()));
        }
        transaction.push(set(&self.checkpoint_key, &checkpoint.encode()));
        self.transact(&mut connection, transaction, Some(checkpoint)).await?;
        self.records.iter_mut().for_each(|record| record.written = true);
        self.catalog = None;
        self.connection = Some(connection);
        Ok(searched)
    }

    /// A new connection in the middle of a session: the checkpoint in Redis must be the last one known, or that of the
    /// batch whose outcome was not seen, or the intent to sweep for it.
    async fn resume(&mut self, in_flight: Option<&Checkpoint>) -> Result<Connection, Failure> {
        let mut connection = Connection::open(&self.config).await?;
        let Watched { fences, stored } = self.watch(&mut connection).await?;
        self.check_fences(&fences)?;
        let of_batch = |stored: &Checkpoint| {
            in_flight.is_some_and(|next| stored == next || self.intent(next).as_ref() == Some(stored))
        };
        if stored != self.stored && !stored.as_ref().is_some_and(of_batch) {
            return Err(Failure::Final(self.went_back(stored.as_ref())));
        }
        self.stored = stored;
        self.set_fences(&mut connection, &fences).await?;
        Ok(connection)
    }

    /// Puts a fresh token of this connection in place of the fences that were found, and watches it.
    async fn set_fences(&mut self, connection: &mut Connection, found: &[String]) -> Result<(), Failure> {
        self.connections += 1;
        self.fence = format!("{}/{}", self.daemon, self.connections);
        self.guarded_from(connection, found, NONE, None, self.stored.as_ref()).await
    }

    /// Deletes these keys, stores the checkpoint, and goes on watching: behind the fences as this daemon set them.
    async fn guarded(
        &self,
        connection: &mut Connection,
        delete: &[impl AsRef<[u8]>],
        checkpoint: Option<&Checkpoint>,
    ) -> Result<(), Failure> {
        self.guarded_from(connection, &self.own_fences(), delete, None, checkpoint).await
    }

    /// The fences as this daemon set them.
    fn own_fences(&self) -> Vec<String> {
        vec![self.fence.clone(); self.fence_keys.len()]
    }

    /// Runs [`GUARDED`], then watches again and compares with what should stand there.
    async fn guarded_from(
        &self,
        connection: &mut Connection,
        fences_before: &[String],
        delete: &[impl AsRef<[u8]>],
        leaving: Option<Leaving<'_>>,
        checkpoint: Option<&Checkpoint>,
    ) -> Result<(), Failure> {
        let encoded = |checkpoint: Option<&Checkpoint>| checkpoint.map(Checkpoint::encode).unwrap_or_default();
        let mut script = redis::cmd("EVAL");
        let fences = self.fence_keys.len();
        let keys = 2 + fences + delete.len() + usize::from(leaving.is_some());
        script.arg(GUARDED).arg(keys).arg(&self.checkpoint_key).arg(&self.fence_keys);
        // A key that nobody has, so that the script begins with a delete even where there is nothing to delete.
        script.arg(format!("{}{RESERVED}none", self.config.prefix));
        delete.iter().for_each(|key| _ = script.arg(key.as_ref()));
        leaving.iter().for_each(|leaving| _ = script.arg(leaving.set));
        script.arg(encoded(self.stored.as_ref())).arg(&self.fence).arg(encoded(checkpoint));
        script.arg(fences).arg(fences_before);
        leaving.iter().for_each(|leaving| _ = script.arg(leaving.members));
        let mut all = vec![redis::cmd("UNWATCH"), script];
        all.extend(self.watch_commands());
        let replies = connection.send(all).await?;
        match &replies[1] {
            Value::Int(1) => {}
            Value::Int(0) => return Err(Failure::Changed),
            other => return Err(unexpected("EVAL", other)),
        }
        self.check_watched(&replies[2..], checkpoint)
    }

    /// Whether fence and checkpoint are what this daemon wrote last.
    fn check_watched(&self, replies: &[Value], expected: Option<&Checkpoint>) -> Result<(), Failure> {
        let (fences, stored) = fences(replies)?;
        self.check_fences(&fences)?;
        // Nearly always it is as it was written, and need not be decoded: what rules owe can be much.
        if matches!((stored, expected), (Value::BulkString(stored), Some(expected)) if *stored == expected.encode()) {
            return Ok(());
        }
        let stored = self.decode(stored)?;
        match stored.as_ref() == expected {
            true => Ok(()),
            false => Err(Failure::Final(self.went_back(stored.as_ref()))),
        }
    }

    /// MULTI, the commands, EXEC, WAIT where asked for; then watches again and compares with what should stand there.
    async fn transact(
        &self,
        connection: &mut Connection,
        commands: Vec<Cmd>,
        expected: Option<&Checkpoint>,
    ) -> Result<(), Failure> {
        let queued = commands.len();
        let mut all = Vec::with_capacity(queued + 6);
        all.push(redis::cmd("MULTI"));
        all.extend(commands);
        all.push(redis::cmd("EXEC"));
        all.extend(self.watch_commands());
        let replies = connection.send(all).await?;
        match &replies[queued + 1] {
            Value::Array(done) if done.len() == queued => {}
            Value::Nil => return Err(Failure::Changed),
            other => return Err(unexpected("EXEC", other)),
        }
        self.check_watched(&replies[queued + 2..], expected)?;
        self.wait_for_replicas(connection).await
    }

    /// What stands in Redis while a batch sweeps: readers may see the batch from now on, and it is not good yet. Whoever
    /// goes on from there holds everything up to its end together, so that no key comes back that the sweep deleted.
    fn intent(&self, checkpoint: &Checkpoint) -> Option<Checkpoint> {
        self.stored.as_ref().map(|stored| Checkpoint { applied: checkpoint.applied, ..stored.clone() })
    }

    /// The batch's sweeps, announced before they begin, and how long they went through all keys.
    async fn sweep_all(
        &mut self,
        connection: &mut Connection,
        batch: &Batch,
        next: &Checkpoint,
    ) -> Result<Duration, Failure> {
        let mut searched = Duration::ZERO;
        if batch.sweeps().is_empty() {
            return Ok(searched);
        }
        let intent = self.intent(next);
        self.guarded(connection, NONE, intent.as_ref()).await?;
        self.stored = intent;
        for (prefix, sweeps) in self.config.prefixes().zip(commands::sweeps(batch, &self.config)) {
            searched += self.sweep(connection, prefix, &sweeps, batch).await?;
        }
        Ok(searched)
    }

    /// Deletes every key that matches one of these, step by step, each step behind the fence. Says how long it went through
    /// all keys.
    async fn sweep(
        &self,
        connection: &mut Connection,
        prefix: &str,
        sweeps: &[Sweep],
        batch: &Batch,
    ) -> Result<Duration, Failure> {
        let tag = |sweep: &Sweep| if let Sweep::Tag(tag) = sweep { Some(tag.to_vec()) } else { None };
        let tags: Vec<Vec<u8>> = sweeps.iter().filter_map(tag).collect();
        self.sweep_tags(connection, prefix, &tags, &Members::All, batch).await?;
        let searched: Vec<&Sweep> = sweeps.iter().filter(|sweep| !matches!(sweep, Sweep::Tag(_))).collect();
        let Some(common) = common_prefix(searched.iter().map(|sweep| sweep.literal_prefix())) else {
            return Ok(Duration::ZERO);
        };
        let began = Instant::now();
        let glob = Pattern::beginning_with(common).scan_glob();
        let (mut cursor, mut deleted) = (0, 0_u64);
        loop {
            let (next, keys) = scan(connection, cursor, &glob).await?;
            let goes = |key: &&Vec<u8>| searched.iter().any(|sweep| sweep.members().is_none() && sweep.matches(key));
            let owned: Vec<&[u8]> = keys.iter().filter(goes).map(Vec::as_slice).collect();
            for sweep in &searched {
                let Some(members) = sweep.members() else { continue };
                let tags: Vec<Vec<u8>> = keys.iter().filter(|key| sweep.matches(key)).cloned().collect();
                self.sweep_tags(connection, prefix, &tags, members, batch).await?;
            }
            if !owned.is_empty() {
                // By the script: inside MULTI a Redis that is out of memory refuses deletes too.
                self.guarded(connection, &owned, self.stored.as_ref()).await?;
                deleted += owned.len() as u64;
            }
            if next == 0 {
                tracing::debug!(sweeps = sweeps.len(), deleted, "keys that match were deleted");
                return Ok(began.elapsed());
            }
            cursor = next;
        }
    }

    /// The rules whose keys are deleted where they should be written, or stay members of tags, and those whose entries and
    /// messages nobody gets, which is a gap to whoever follows them.
    fn owed<'b>(&'b self, batch: &'b Batch) -> impl Iterator<Item = (&'b str, Debt)> + 'b {
        // With a member goes its whole key.
        let must_be = |rule: u16, op: &CacheOp<'_>| op.puts() && !self.rules.may_miss[usize::from(rule)];
        let lost = batch.ops().filter(move |(rule, op)| must_be(*rule, op) || op.member().is_some());
        let lost = lost.map(|(rule, _)| (rule, Debt::Warm));
        // No row says who is no member any more.
        let untagged = batch.untagging();
        let reconciled = batch.telling().chain(untagged).map(|rule| (rule, Debt::Reconcile));
        lost.chain(reconciled).map(|(rule, debt)| (self.rules.names[usize::from(rule)].as_str(), debt))
    }

    /// Redis takes no writes: what should be set is deleted instead. Says the same as [`Writer::try_apply`].
    async fn invalidate(&mut self, batch: &Batch, checkpoint: &Checkpoint) -> Result<Duration, Failure> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.resume(Some(checkpoint)).await?,
        };
        self.note_claims(batch);
        let searched = self.sweep_all(&mut connection, batch, checkpoint).await?;
        let keys = commands::keys(batch, &self.config);
        self.guarded(&mut connection, &keys, Some(checkpoint)).await?;
        self.wait_for_replicas(&mut connection).await?;
        self.metrics.out_of_memory_batches.inc();
        self.connection = Some(connection);
        Ok(searched)
    }

    /// Keys of the batch that somebody else has written as another type go. Gives the rules whose other rows had a part in
    /// them, and the streams among them.
    async fn delete_of_wrong_type(
        &mut self,
        batch: &Batch,
        checkpoint: &Checkpoint,
    ) -> Result<(BTreeSet<String>, Vec<Vec<u8>>), Failure> {
        let mut connection = self.resume(Some(checkpoint)).await?;
        let typed: Vec<(u16, &str, &[u8])> =
            batch.ops().filter_map(|(rule, op)| Some((rule, commands::type_needed(&op)?, op.key()))).collect();
        let (mut wrong, mut rules) = (Vec::new(), BTreeSet::new());
        for prefix in self.config.prefixes() {
            let under = |key: &[u8]| [prefix.as_bytes(), &key[self.config.prefix.len()..]].concat();
            for typed in typed.chunks(SWEEP_STEP_KEYS as usize) {
                let keys: Vec<Vec<u8>> = typed.iter().map(|(.., key)| under(key)).collect();
                let kinds = types(&mut connection, &keys).await?;
                for ((key, (rule, needed, _)), kind) in keys.into_iter().zip(typed).zip(kinds) {
                    if kind != "none" && kind != *needed {
                        rules.insert(self.rules.names[usize::from(*rule)].clone());
                        wrong.push(key);
                    }
                }
            }
        }
        let mut streams: Vec<_> = commands::streams(batch, &self.config).into_iter().collect();
        let mut kinds = types(&mut connection, &streams).await?.into_iter();
        streams.retain(|_| kinds.next().is_some_and(|kind| kind != "none" && kind != "stream"));
        wrong.extend_from_slice(&streams);
        tracing::warn!(keys = wrong.len(), ?rules, "keys of another type than their rules write are replaced");
        self.guarded(&mut connection, &wrong, self.stored.as_ref()).await?;
        self.connection = Some(connection);
        Ok((rules, streams))
    }

    /// WAIT until enough replicas have everything sent so far.
    async fn wait_for_replicas(&self, connection: &mut Connection) -> Result<(), Failure> {
        if self.config.wait_replicas == 0 {
            return Ok(());
        }
        // Answered well before the connection would count as lost.
        let limit_ms = (self.config.timeout / 2).as_millis().min(u128::from(u32::MAX));
        let mut wait = redis::cmd("WAIT");
        wait.arg(self.config.wait_replicas).arg(limit_ms.to_string());
        match connection.send_one(wait).await? {
            Value::Int(reached) if reached >= i64::from(self.config.wait_replicas) => Ok(()),
            Value::Int(reached) => {
                let few = format!("only {reached} of {} Redis replicas have the batch", self.config.wait_replicas);
                Err(Failure::Away(Error::new(ErrorKind::RedisAway, few)))
            }
            other => Err(unexpected("WAIT", &other)),
        }
    }

    fn watch_commands(&self) -> Vec<Cmd> {
        let mut watch = redis::cmd("WATCH");
        watch.arg(&self.fence_keys).arg(&self.checkpoint_key);
        let gets = self.fence_keys.iter().chain([&self.checkpoint_key]).map(|key| get(key));
        std::iter::once(watch).chain(gets).collect()
    }

    /// Fences and checkpoint, from now on watched, and who holds them.
    async fn watch(&mut self, connection: &mut Connection) -> Result<Watched, Failure> {
        let replies = connection.send(Instance::commands().into_iter().chain(self.watch_commands())).await?;
        let instance = Instance::from_replies(&replies[..2])?;
        if let Some(became) = self.instance.as_ref().and_then(|before| before.became(&instance)) {
            tracing::warn!("{became}; whether it holds what was acknowledged is compared");
        }
        self.instance = Some(instance);
        self.watched(&replies[2..])
    }

    /// Whether fence and checkpoint are what this daemon wrote last, through the connection that is open, or a new one
    /// where that turns out to be dead.
    async fn try_probe(&mut self) -> Result<(), Failure> {
        if let Some(mut connection) = self.connection.take() {
            match self.watch(&mut connection).await {
                Ok(Watched { fences, stored }) => {
                    self.check_fences(&fences)?;
                    if stored != self.stored {
                        return Err(Failure::Final(self.went_back(stored.as_ref())));
                    }
                    self.connection = Some(connection);
                    return Ok(());
                }
                Err(Failure::Away(error)) if error.kind() == ErrorKind::RedisAway => {}
                Err(failure) => return Err(failure),
            }
        }
        self.connection = Some(self.resume(None).await?);
        Ok(())
    }

    /// Fences and checkpoint from the replies to [`Writer::watch_commands`].
    fn watched(&self, replies: &[Value]) -> Result<Watched, Failure> {
        let (fences, stored) = fences(replies)?;
        Ok(Watched { fences, stored: self.decode(stored)? })
    }

    fn decode(&self, stored: &Value) -> Result<Option<Checkpoint>, Failure> {
        let bytes = match stored {
            Value::Nil => return Ok(None),
            Value::BulkString(bytes) => bytes,
            other => return Err(unexpected("GET", other)),
        };
        Checkpoint::decode(bytes).map(Some).map_err(|error| {
            let message = format!("the key `{}` is not usable", self.checkpoint_key);
            let hint = "choose another `[redis] prefix`, or delete the key if it is a leftover";
            Failure::Final(Error::new(ErrorKind::Identity, message).because(error).hint(hint))
        })
    }

    /// A fence that is gone says nothing about who writes: the checkpoint decides.
    fn check_fences(&self, fences: &[String]) -> Result<(), Failure> {
        let foreign = |fence: &String| !fence.is_empty() && fence.split('/').next() != Some(&self.daemon);
        match fences.iter().any(foreign) {
            true => Err(Failure::Away(Error::new(ErrorKind::Fenced, "another daemon has taken over this cache"))),
            false => Ok(()),
        }
    }

    /// Redis holds neither the checkpoint it last acknowledged nor the one in flight.
    fn went_back(&self, found: Option<&Checkpoint>) -> Error {
        // The session looks at the slot and decides: replay, or stop.
        let known = self.stored.as_ref().map(|known| known.applied.to_string()).unwrap_or_default();
        let message = match found {
            None => format!("Redis has lost the checkpoint that it acknowledged ({known})"),
            Some(found) => format!("Redis acknowledged {known} and now holds {}", found.applied),
        };
        Error::new(ErrorKind::CacheWentBack, message)
    }
}

impl Cache for Writer {
    async fn compare(&mut self, batch: &Batch) -> Result<Vec<Differing>> {
        self.find_differing(batch).await
    }

    async fn apply(&mut self, batch: &Batch, mut checkpoint: Checkpoint) -> Result<Applied> {
        let mut backoff = Backoff::default();
        let mut owed = false;
        let mut refused = BTreeSet::new();
        loop {
            let mut invalidated = false;
            let mut outcome = self.try_apply(batch, &checkpoint, &refused).await;
            if matches!(outcome, Err(Failure::OutOfMemory)) {
                tracing::warn!("Redis is out of memory: keys are deleted instead of written");
                self.owed(batch).for_each(|(rule, debt)| debt.enter(rule, &mut checkpoint.owing));
                (invalidated, owed) = (true, true);
                // What has been read already may be among what is deleted.
                checkpoint.progress = None;
                outcome = self.invalidate(batch, &checkpoint).await;
            }
            if matches!(outcome, Err(Failure::WrongType)) {
                let replaced = self.delete_of_wrong_type(batch, &checkpoint).await;
                outcome = match replaced {
                    Ok((rules, streams)) => {
                        refused.extend(streams);
                        rules.iter().for_each(|rule| Debt::Warm.enter(rule, &mut checkpoint.owing));
                        if !rules.is_empty() {
                            owed = true;
                            checkpoint.progress = None;
                        }
                        self.try_apply(batch, &checkpoint, &refused).await
                    }
                    Err(failure) => Err(failure),
                };
            }
            let error = match outcome {
                Ok(searched) => {
                    self.metrics.circuit_open.set(0);
                    self.stored = Some(checkpoint.clone());
                    return Ok(Applied { checkpoint, invalidated, owed, searched });
                }
                // Looked at again through a new connection, which names what changed.
                Err(Failure::Changed) => Error::new(ErrorKind::RedisAway, "fence or checkpoint changed"),
                Err(Failure::OutOfMemory) => out_of_memory(),
                Err(Failure::WrongType) => wrong_type(),
                Err(Failure::Away(error)) if error.kind() == ErrorKind::RedisAway => error,
                Err(Failure::Away(error) | Failure::Final(error)) => return Err(error),
            };
            self.connection = None;
            self.metrics.circuit_open.set(1);
            let wait = backoff.next_wait();
            if backoff.tries() == 1 {
                tracing::warn!(%error, "Redis is away; changes wait");
            }
            tokio::time::sleep(wait).await;
        }
    }

    fn remember(&mut self, catalog: &Signatures) {
        self.catalog = Some(catalog.clone());
    }

    async fn probe(&mut self) -> Result<()> {
        let error = match self.try_probe().await {
            Ok(()) => {
                self.metrics.circuit_open.set(0);
                return Ok(());
            }
            Err(Failure::Changed) => return Ok(()),
            Err(Failure::OutOfMemory) => out_of_memory(),
            Err(Failure::WrongType) => wrong_type(),
            Err(Failure::Away(error)) if error.kind() == ErrorKind::RedisAway => error,
            Err(Failure::Away(error) | Failure::Final(error)) => return Err(error),
        };
        if self.metrics.circuit_open.get() == 0 {
            tracing::warn!(%error, "Redis is away; changes will wait");
        }
        self.metrics.circuit_open.set(1);
        Ok(())
    }
}

/// One SCAN step: the next cursor, and keys that match the glob.
pub(super) async fn scan(
    connection: &mut Connection,
    cursor: u64,
    glob: &[u8],
) -> Result<(u64, Vec<Vec<u8>>), Failure> {
    let mut scan = redis::cmd("SCAN");
    scan.arg(cursor).arg("MATCH").arg(glob).arg("COUNT").arg(SWEEP_STEP_KEYS);
    let reply = connection.send_one(scan).await?;
    redis::from_redis_value(reply).map_err(|error| {
        let message = "Redis answered SCAN with something else than a cursor and keys";
        Failure::Final(Error::new(ErrorKind::Protocol, message).because(error))
    })
}

/// What TYPE says of each key.
async fn types(connection: &mut Connection, keys: &[Vec<u8>]) -> Result<Vec<String>, Failure> {
    let said = connection.send(keys.iter().map(|key| about("TYPE", key))).await?;
    let kind = |said| match said {
        Value::SimpleString(kind) => Ok(kind),
        other => Err(unexpected("TYPE", &other)),
    };
    said.into_iter().map(kind).collect()
}

fn about(command: &str, key: &[u8]) -> Cmd {
    let mut about = redis::cmd(command);
    about.arg(key);
    about
}

/// Fences, and what holds the checkpoint, from the replies to [`Writer::watch_commands`].
fn fences(replies: &[Value]) -> Result<(Vec<String>, &Value), Failure> {
    let [_, fences @ .., stored] = replies else { unreachable!("one reply for each of three commands or more") };
    let fence = |reply: &Value| match reply {
        Value::Nil => Ok(String::new()),
        Value::BulkString(bytes) => Ok(String::from_utf8_lossy(bytes).into_owned()),
        other => Err(unexpected("GET", other)),
    };
    Ok((fences.iter().map(fence).collect::<Result<_, _>>()?, stored))
}

pub(super) fn get(key: &str) -> Cmd {
    let mut get = redis::cmd("GET");
    get.arg(key);
    get
}

pub(super) fn set(key: &str, value: &[u8]) -> Cmd {
    let mut set = redis::cmd("SET");
    set.arg(key).arg(value);
    set
}

fn wrong_type() -> Error {
    Error::new(ErrorKind::RedisAway, "somebody else writes keys of the rules as another type, again and again")
}

fn out_of_memory() -> Error {
    Error::new(ErrorKind::RedisAway, "Redis is out of memory (maxmemory)")
}

/// A reply that the command cannot have; its content is not shown.
pub(super) fn unexpected(command: &str, reply: &Value) -> Failure {
    let form = match reply {
        Value::Nil => "nil",
        Value::Int(_) => "an integer",
        Value::BulkString(_) => "a string",
        Value::Array(_) => "an array of another length",
        _ => "something else",
    };
    Failure::Final(Error::new(ErrorKind::Protocol, format!("Redis answered {command} with {form}")))
}

pub(super) fn into_error(failure: Failure) -> Error {
    match failure {
        Failure::Away(error) | Failure::Final(error) => error,
        Failure::OutOfMemory => out_of_memory(),
        Failure::WrongType => wrong_type(),
        Failure::Changed => Error::new(ErrorKind::Fenced, "another daemon has written this cache in the meantime"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Form, Life, Limits, Of};
    use crate::config::tests::redis_config;

    #[test]
    fn without_memory_a_member_that_should_go_is_searched_for_later() {
        let rules = RuleSet { names: vec!["card".to_owned()], may_miss: vec![true], ..RuleSet::new(&[]) };
        let writer = Writer::new(redis_config("", &[]), Arc::new(rules), Arc::new(Metrics::new())).expect("a writer");
        let owed = |stays: bool| {
            let mut batch = Batch::new(Limits { ops: 10, bytes: 1000 }, 1);
            let cell = batch.cell_of(0, Of::Tag, |out| {
                out.extend_from_slice(b"tag:acard:1");
                Some(5)
            });
            if stays {
                let Ok(()) = batch.set(cell.expect("a member"), Form::String, Life::Forever, false, |_| {
                    Ok::<_, std::convert::Infallible>(())
                });
            }
            writer.owed(&batch).map(|(_, debt)| debt).max()
        };
        assert_eq!((owed(true), owed(false)), (Some(Debt::Warm), Some(Debt::Reconcile)));
    }
}
