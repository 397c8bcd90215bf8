//! How many keys each rule has, and how much memory they take; reads only.
//!
//! Keys are counted one by one. Their memory is that of a sample, taken by hash: each key has the same chance, and a key
//! that SCAN hands over twice counts once there.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use redis::Value;
use serde::Serialize;

use super::claims;
use super::commands::quoted;
use super::connection::{Connection, Failure};
use super::keyspace::walk;
use super::writer::{into_error, unexpected};
use crate::config::RedisConfig;
use crate::error::Result;
use crate::rules::pattern::Pattern;
use crate::rules::template::RESERVED;

/// Of so many keys of a rule the memory is asked for.
const SAMPLE_KEYS: usize = 200;
/// How many keys of an owner are shown.
const SHOWN: usize = 3;

/// Who made a key, as far as can be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Owner {
    /// A rule.
    Rule,
    /// A rule that is gone from the rules file.
    Removed,
    /// keepstep itself: the checkpoint and the like.
    Keepstep,
    /// No rule.
    Nobody,
}

/// The keys of one owner under one prefix.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Keys {
    /// The prefix of `[redis]`.
    pub prefix: String,
    /// Whose they are.
    pub owner: Owner,
    /// The rule's name, if it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// How many there are.
    pub keys: u64,
    /// The memory they take in bytes, keys and Redis's own cost included, as far as a sample tells.
    pub bytes: u64,
    /// Some of them, as `redis-cli` reads them.
    pub samples: Vec<String>,
}

/// An owner while its keys are counted.
struct Count {
    owner: Owner,
    rule: Option<String>,
    patterns: Vec<Pattern>,
    keys: u64,
    sample: Sample,
}

/// Counts the keys under each prefix.
pub async fn keys(config: &RedisConfig) -> Result<Vec<Keys>> {
    let count = async {
        let mut connection = Connection::open(config).await?;
        let mut all = Vec::new();
        for prefix in config.prefixes() {
            for count in count(&mut connection, prefix).await? {
                all.push(weighed(&mut connection, prefix, count).await?);
            }
        }
        Ok(all)
    };
    count.await.map_err(into_error)
}

async fn count(connection: &mut Connection, prefix: &str) -> Result<Vec<Count>, Failure> {
    let mut counts = owners(connection, prefix).await?;
    let everything = Pattern::beginning_with(prefix.as_bytes());
    let step = async |_: &mut Connection, keys: Vec<Vec<u8>>| {
        for key in keys {
            let made = |count: &&mut Count| count.patterns.iter().any(|pattern| pattern.matches(&key));
            if let Some(count) = counts.iter_mut().find(made) {
                count.keys += 1;
                count.sample.add(key);
            }
        }
        Ok(())
    };
    walk(connection, &[&everything], step).await?;
    Ok(counts)
}

/// Present rules first, then removed ones; what neither they nor keepstep itself made is nobody's.
async fn owners(connection: &mut Connection, prefix: &str) -> Result<Vec<Count>, Failure> {
    let claims = claims::read(connection, prefix).await?.unwrap_or_default();
    let count = |owner, rule, patterns| Count { owner, rule, patterns, keys: 0, sample: Sample::default() };
    let mut counts: Vec<Count> = Vec::new();
    for (rule, claim) in claims.rules() {
        let owner = if claim.fingerprint.is_some() { Owner::Rule } else { Owner::Removed };
        let patterns = claim.keys.iter().chain(&claim.former).map(|form| form.pattern(prefix)).collect();
        counts.push(count(owner, Some(rule.to_owned()), patterns));
    }
    counts.sort_by_key(|count| count.owner == Owner::Removed);
    let own = Pattern::beginning_with(format!("{prefix}{RESERVED}").as_bytes());
    counts.insert(0, count(Owner::Keepstep, None, vec![own]));
    counts.push(count(Owner::Nobody, None, vec![Pattern::beginning_with(prefix.as_bytes())]));
    Ok(counts)
}

/// What the sample says of all.
async fn weighed(connection: &mut Connection, prefix: &str, count: Count) -> Result<Keys, Failure> {
    let sample: Vec<Vec<u8>> = count.sample.0.into_values().collect();
    let usage = |key: &Vec<u8>| {
        let mut usage = redis::cmd("MEMORY");
        usage.arg("USAGE").arg(key);
        usage
    };
    let mut sizes = Vec::new();
    for reply in connection.send(sample.iter().map(usage)).await? {
        match reply {
            Value::Int(bytes) => sizes.push(u64::try_from(bytes).unwrap_or(0)),
            // Gone since it was counted.
            Value::Nil => {}
            other => return Err(unexpected("MEMORY USAGE", &other)),
        }
    }
    let bytes = count.keys * sizes.iter().sum::<u64>() / (sizes.len() as u64).max(1);
    Ok(Keys {
        prefix: prefix.to_owned(),
        owner: count.owner,
        rule: count.rule,
        keys: count.keys,
        bytes,
        samples: sample.iter().take(SHOWN).map(|key| quoted(key)).collect(),
    })
}

/// The keys with the smallest hashes of all that were added.
#[derive(Default)]
struct Sample(BTreeMap<u64, Vec<u8>>);

impl Sample {
    fn add(&mut self, key: Vec<u8>) {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        self.0.insert(hasher.finish(), key);
        if self.0.len() > SAMPLE_KEYS {
            self.0.pop_last();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_the_same_whatever_the_order_and_however_often_a_key_comes() {
        let keys: Vec<Vec<u8>> = (0..1000).map(|number| format!("product:{number}").into_bytes()).collect();
        let sample = |keys: &mut dyn Iterator<Item = &Vec<u8>>| {
            let mut sample = Sample::default();
            keys.for_each(|key| sample.add(key.clone()));
            sample.0
        };
        let one = sample(&mut keys.iter());
        assert_eq!(one.len(), SAMPLE_KEYS);
        assert_eq!(sample(&mut keys.iter().rev().chain(&keys)), one);
        let of_first_half = keys[..500].iter().filter(|key| one.values().any(|sampled| sampled == *key)).count();
        assert!((50..=150).contains(&of_first_half), "{of_first_half} of {SAMPLE_KEYS}");
    }
}
