//! Deleting keys on request: those of a rule, of rules that are gone, or of a whole cache that has served its time.
//!
//! What belongs to whom is read from the record beside the checkpoint ([`super::claims`]), so neither the rules file nor
//! Postgres is asked, and a key that no template can have made is never touched. Nor is one that a rule which is not to be
//! cleared makes as well: a rule that only got another name keeps its keys.
//!
//! This is apart from the writer on purpose. It sets no key of a rule, so the fence is no concern of it: a daemon may go
//! on writing meanwhile, and what it writes is right.

use std::collections::BTreeSet;

use redis::{Cmd, Value};
use serde::Serialize;

use super::claims::{self, Claim, Claims};
use super::commands::quoted;
use super::connection::{Connection, Failure};
use super::keyspace::walk;
use super::writer::{into_error, set, unexpected};
use crate::config::RedisConfig;
use crate::config::open::is_meant;
use crate::error::{Error, ErrorKind, Result};
use crate::rules::form::KeyForm;
use crate::rules::pattern::Pattern;
use crate::rules::template::RESERVED;
use crate::suggest::nearest;

/// How many keys of a rule are shown.
const SAMPLES: usize = 3;
/// How often the record is written again if somebody else has written it in between.
const TRIES_MAX: u32 = 10;

/// What shall go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Keys of rules.
    Rules(Selection),
    /// The whole cache under a prefix that is no longer configured, its checkpoint too.
    Prefix(String),
}

/// Keys of rules; with nothing said, of all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// The keys of these rules, present or removed ones; a rule with a pattern is all that were made of it.
    pub rules: Vec<String>,
    /// Those that nobody keeps right any more: of rules that are gone, and of earlier forms of those that are not.
    pub removed: bool,
}

impl Selection {
    fn names(&self, rule: &str) -> bool {
        let all = self.rules.is_empty() && !self.removed;
        all || self.rules.iter().any(|named| is_meant(rule, named))
    }

    /// Whether anything of the rule shall go.
    fn means(&self, rule: &str, claim: &Claim) -> bool {
        let left_behind = claim.fingerprint.is_none() || !claim.former.is_empty();
        self.names(rule) || (self.removed && left_behind)
    }

    /// The forms whose keys shall go, and those whose keys must stay.
    fn split<'c>(&self, rule: &str, claim: &'c Claim) -> (Vec<&'c KeyForm>, Vec<&'c KeyForm>) {
        let (present, former) = (claim.keys.iter(), claim.former.iter());
        match (self.names(rule), self.removed) {
            (true, _) => (present.chain(former).collect(), Vec::new()),
            (false, true) => (former.collect(), present.collect()),
            (false, false) => (Vec::new(), present.collect()),
        }
    }
}

/// Keys of one rule under one prefix, to be cleared.
#[derive(Debug)]
struct Target {
    prefix: String,
    rule: String,
    removed: bool,
    patterns: Vec<Pattern>,
}

impl Target {
    fn new(prefix: &str, rule: &str, claim: &Claim, forms: &[&KeyForm]) -> Self {
        let patterns = forms.iter().map(|form| form.pattern(prefix)).collect();
        let removed = claim.fingerprint.is_none();
        Target { prefix: prefix.to_owned(), rule: rule.to_owned(), removed, patterns }
    }
}

/// What is there of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Found {
    /// The prefix of `[redis]`.
    pub prefix: String,
    /// The rule.
    pub rule: String,
    /// Whether it is gone from the rules file.
    pub removed: bool,
    /// By how many templates its keys are known. By none, if only an older keepstep wrote them.
    pub templates: usize,
    /// How many keys there are.
    pub keys: u64,
    /// Some of them, as `redis-cli` reads them.
    pub samples: Vec<String>,
}

/// An order, ready to be carried out.
#[derive(Debug)]
pub struct Clearing {
    config: RedisConfig,
    targets: Vec<Target>,
    spared: Vec<Pattern>,
    /// The prefix whose checkpoint, record and the like go too.
    ended: Option<String>,
}

/// Looks up what the order is about; changes nothing.
///
/// # Errors
/// What the order names is not known, or may not be cleared.
pub async fn prepare(config: &RedisConfig, order: &Order) -> Result<Clearing> {
    let mut connection = Connection::open(config).await.map_err(into_error)?;
    let mut records = Vec::new();
    for prefix in config.prefixes() {
        let claims = claims::read(&mut connection, prefix).await.map_err(into_error)?;
        records.extend(claims.map(|claims| (prefix, claims)));
    }
    match order {
        Order::Rules(selection) => of_rules(config, selection, &records),
        Order::Prefix(prefix) if config.prefixes().any(|configured| configured == prefix) => Err(in_use(prefix)),
        Order::Prefix(prefix) => {
            let claims = claims::read(&mut connection, prefix).await.map_err(into_error)?;
            Ok(of_prefix(config, prefix, &claims.ok_or_else(|| nothing_known(prefix))?, &records))
        }
    }
}

fn of_rules(config: &RedisConfig, selection: &Selection, records: &[(&str, Claims)]) -> Result<Clearing> {
    if records.is_empty() {
        return Err(nothing_known(&config.prefix));
    }
    let known: BTreeSet<&str> = records.iter().flat_map(|(_, claims)| claims.rules().map(|(name, _)| name)).collect();
    let is_known = |named: &String| known.iter().any(|rule| is_meant(rule, named));
    if let Some(rule) = selection.rules.iter().find(|rule| !is_known(rule)) {
        return Err(unknown_rule(rule, &known));
    }
    let (mut targets, mut spared) = (Vec::new(), own_keys(config));
    for (prefix, claims) in records {
        for (rule, claim) in claims.rules() {
            let (go, stay) = selection.split(rule, claim);
            spared.extend(stay.iter().map(|form| form.pattern(prefix)));
            if selection.means(rule, claim) {
                targets.push(Target::new(prefix, rule, claim, &go));
            }
        }
    }
    Ok(Clearing { config: config.clone(), targets, spared, ended: None })
}

/// Everything under the prefix; what is configured stays as it is.
fn of_prefix(config: &RedisConfig, prefix: &str, old: &Claims, records: &[(&str, Claims)]) -> Clearing {
    let all = Selection::default();
    let targets =
        old.rules().map(|(rule, claim)| Target::new(prefix, rule, claim, &all.split(rule, claim).0)).collect();
    let mut spared = own_keys(config);
    for (prefix, claims) in records {
        let present = claims.rules().flat_map(|(_, claim)| &claim.keys);
        spared.extend(present.map(|form| form.pattern(prefix)));
    }
    Clearing { config: config.clone(), targets, spared, ended: Some(prefix.to_owned()) }
}

/// keepstep's own keys under every configured prefix.
fn own_keys(config: &RedisConfig) -> Vec<Pattern> {
    config.prefixes().map(reserved).collect()
}

fn reserved(prefix: &str) -> Pattern {
    Pattern::beginning_with(format!("{prefix}{RESERVED}").as_bytes())
}

impl Clearing {
    /// Counts what would go.
    pub async fn survey(&self) -> Result<Vec<Found>> {
        let found = |target: &Target| Found {
            prefix: target.prefix.clone(),
            rule: target.rule.clone(),
            removed: target.removed,
            templates: target.patterns.len(),
            keys: 0,
            samples: Vec::new(),
        };
        let mut all: Vec<Found> = self.targets.iter().map(found).collect();
        let survey = async {
            let mut connection = Connection::open(&self.config).await?;
            let step = async |_: &mut Connection, keys: Vec<Vec<u8>>| {
                for (key, target) in keys.iter().filter_map(|key| Some((key, self.target(key)?))) {
                    let found = &mut all[target];
                    found.keys += 1;
                    if found.samples.len() < SAMPLES {
                        found.samples.push(quoted(key));
                    }
                }
                Ok(())
            };
            walk(&mut connection, &self.patterns(), step).await
        };
        survey.await.map_err(into_error)?;
        Ok(all)
    }

    /// Deletes it, step by step; gives how many keys went. What was interrupted can be done again.
    pub async fn carry_out(&self) -> Result<u64> {
        let clear = async {
            let mut connection = Connection::open(&self.config).await?;
            let mut deleted = 0;
            let step = async |connection: &mut Connection, mut keys: Vec<Vec<u8>>| {
                keys.retain(|key| self.target(key).is_some());
                deleted += unlink(connection, &keys).await?;
                Ok(())
            };
            walk(&mut connection, &self.patterns(), step).await?;
            match &self.ended {
                Some(prefix) => end(&mut connection, prefix).await?,
                None => self.forget(&mut connection).await?,
            }
            Ok(deleted)
        };
        clear.await.map_err(into_error)
    }

    fn patterns(&self) -> Vec<&Pattern> {
        self.targets.iter().flat_map(|target| &target.patterns).collect()
    }

    /// Whose key it is, if it shall go.
    fn target(&self, key: &[u8]) -> Option<usize> {
        let made = |patterns: &[Pattern]| patterns.iter().any(|pattern| pattern.matches(key));
        let target = self.targets.iter().position(|target| made(&target.patterns))?;
        (!made(&self.spared)).then_some(target)
    }

    /// Takes from the records what is no longer there.
    async fn forget(&self, connection: &mut Connection) -> Result<(), Failure> {
        for prefix in self.config.prefixes() {
            let gone: Vec<&str> =
                self.targets.iter().filter(|target| target.prefix == prefix).map(|target| &*target.rule).collect();
            if !gone.is_empty() {
                forget_under(connection, prefix, &gone).await?;
            }
        }
        Ok(())
    }
}

async fn forget_under(connection: &mut Connection, prefix: &str, rules: &[&str]) -> Result<(), Failure> {
    let key = Claims::key(prefix);
    for _ in 0..TRIES_MAX {
        // A daemon may have written it since it was read, so it is read again, and watched.
        connection.send_one(redis::cmd("WATCH").arg(&key).take()).await?;
        let Some(mut claims) = claims::read(connection, prefix).await? else { return Ok(()) };
        rules.iter().for_each(|rule| claims.forget(rule));
        let replies = connection.send([redis::cmd("MULTI"), set(&key, &claims.encode()), redis::cmd("EXEC")]).await?;
        match &replies[2] {
            Value::Array(_) => return Ok(()),
            Value::Nil => {}
            other => return Err(unexpected("EXEC", other)),
        }
    }
    Err(Failure::Changed)
}

/// Deletes keepstep's own keys under the prefix, the record last: as long as it is there, all can be done again.
async fn end(connection: &mut Connection, prefix: &str) -> Result<(), Failure> {
    let record = Claims::key(prefix).into_bytes();
    let step = async |connection: &mut Connection, mut keys: Vec<Vec<u8>>| {
        let own = reserved(prefix);
        keys.retain(|key| own.matches(key) && *key != record);
        unlink(connection, &keys).await.map(drop)
    };
    walk(connection, &[&reserved(prefix)], step).await?;
    unlink(connection, std::slice::from_ref(&record)).await.map(drop)
}

/// How many of the keys were there.
async fn unlink(connection: &mut Connection, keys: &[Vec<u8>]) -> Result<u64, Failure> {
    if keys.is_empty() {
        return Ok(0);
    }
    let mut unlink = Cmd::new();
    unlink.arg("UNLINK").arg(keys);
    match connection.send_one(unlink).await? {
        Value::Int(deleted) => Ok(u64::try_from(deleted).unwrap_or(0)),
        other => Err(unexpected("UNLINK", &other)),
    }
}

fn in_use(prefix: &str) -> Error {
    let message = format!("the prefix \"{prefix}\" is in use: `[redis]` names it");
    Error::new(ErrorKind::Usage, message)
        .hint("leave --prefix out to clear keys of rules under it")
        .hint("to end it, take it out of `prefix` or `also_prefix` and restart keepstep first")
}

fn nothing_known(prefix: &str) -> Error {
    let message = format!("under the prefix \"{prefix}\" is no record of a keepstep's keys");
    Error::new(ErrorKind::Usage, message).hint("prefixes are exact, their last character too: \"shop:v1:\"")
}

fn unknown_rule(rule: &str, known: &BTreeSet<&str>) -> Error {
    let error = Error::new(ErrorKind::Usage, format!("no rule `{rule}` has ever made keys here"));
    match nearest(rule, known.iter().copied()) {
        Some(near) => error.hint(format!("did you mean `{near}`?")),
        None => error.hint("`keepstep stats` lists the rules"),
    }
}
