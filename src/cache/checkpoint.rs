//! How far the cache has come: stored under the prefix in each batch's own MULTI, so that it is right whatever happens.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::config::Rule;
use crate::model::{Lsn, Position};
use crate::rules::template::RESERVED;
use crate::source::outbox::Drain;

/// The one state that the cache and the slot share. Stored as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// The form of this record: 1.
    pub version: u32,
    /// Whose changes these are.
    pub origin: Origin,
    /// One unbroken history of slot and cache: the time it began, in microseconds since 1970.
    pub epoch: u64,
    /// Everything up to here is in the cache.
    pub applied: Position,
    /// The commit LSN of the oldest transaction with work left, or the end LSN of the newest that has none: where
    /// to start again, and what acknowledgements never pass.
    pub low: Lsn,
    /// The end of the last batch whose replies were all seen to be good. What lies between it and `applied` is
    /// applied again at a restart.
    pub good: Position,
    /// [`RuleSet::digest_with`] of the rules that wrote this cache. What it stands for lies in a key of its own, so that
    /// a checkpoint grows only with what rules owe.
    pub rules: String,
    /// When it was written, in microseconds since 1970: how long the cache has held `low` at least.
    pub written_us: u64,
    /// Up to here what waits for its transaction to be visible has gone out.
    #[serde(default)]
    pub released: Position,
    /// The rules whose keys cannot be trusted yet, by name. A pass over the table pays the debt, and only then it goes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub owing: BTreeMap<String, Debt>,
    /// How far the read of a table has come that a debt asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// What makes the same changes of the outbox again behind `low`: the drains since, and the last one before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drains: Vec<Drain>,
    /// The mark of the outbox up to which nothing is missing from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gap: Option<i64>,
}

/// What a read that rules owe has behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// The rules that it is read for, by name: with another one among them it has to begin again.
    pub rules: Vec<String>,
    /// Where to go on.
    pub from: Page,
}

/// A page of a table: everything before it has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Page {
    /// The OID of the table.
    pub table: u32,
    /// That of its leaf, or its own. Leaves are read in the order of their OIDs.
    pub leaf: u32,
    /// The leaf's filenode: another one has its rows elsewhere.
    pub filenode: u32,
    /// The next page to read.
    pub page: u64,
}

/// What a rule's keys need before they can be trusted. The larger debt includes the smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Debt {
    /// Keys may be missing, and none is wrong: every row's key is written.
    Warm,
    /// Anything may be missing, stale or without a row: every row's key is written, and owned keys that no row renders
    /// are deleted.
    Reconcile,
}

impl Debt {
    /// Enters it for a rule, where the larger debt stands.
    pub fn enter(self, rule: &str, owing: &mut BTreeMap<String, Debt>) {
        let debt = owing.get(rule).map_or(self, |before| self.max(*before));
        owing.insert(rule.to_owned(), debt);
    }
}

/// Where changes come from. If one of these differs, cache and slot do not belong together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// Postgres's system identifier.
    pub system: String,
    /// The timeline, which every promotion changes.
    pub timeline: u32,
    /// The database.
    pub database: String,
    /// The replication slot.
    pub slot: String,
}

impl Checkpoint {
    /// The form of the record that this version writes.
    pub const VERSION: u32 = 1;

    /// As stored in Redis.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a checkpoint has only string keys")
    }

    /// From what Redis holds.
    pub fn decode(stored: &[u8]) -> Result<Self, InvalidCheckpoint> {
        let checkpoint: Checkpoint = serde_json::from_slice(stored)?;
        match checkpoint.version {
            Self::VERSION => Ok(checkpoint),
            version => Err(InvalidCheckpoint::Version(version)),
        }
    }

    /// The name of its key.
    pub fn key(prefix: &str) -> String {
        format!("{prefix}{RESERVED}checkpoint")
    }
}

/// The rules as the cache remembers them: what a later start is compared with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleSet {
    /// Their names, in the order of the rules' numbers.
    pub names: Vec<String>,
    /// Whether keys of rows may be missing, in the same order.
    pub may_miss: Vec<bool>,
    /// A hash over each, by name.
    pub fingerprints: BTreeMap<String, String>,
    /// A hash over all of them (hex).
    pub digest: String,
}

impl RuleSet {
    /// Of the rules of a rules file.
    pub fn new(rules: &[Rule]) -> Self {
        let fingerprints: BTreeMap<_, _> =
            rules.iter().map(|rule| (rule.name.value.clone(), rule.fingerprint.clone())).collect();
        let mut hash = Sha256::new();
        for (name, fingerprint) in &fingerprints {
            hash.update(format!("{name}\0{fingerprint}\0"));
        }
        let names = rules.iter().map(|rule| rule.name.value.clone()).collect();
        let may_miss = rules.iter().map(Rule::may_miss).collect();
        RuleSet { names, may_miss, fingerprints, digest: hex(hash) }
    }

    /// The digest, and whether keys are written under the same prefixes too: what a checkpoint remembers.
    pub fn digest_with(&self, also: &[String]) -> String {
        if also.is_empty() {
            return self.digest.clone();
        }
        let mut hash = Sha256::new_with_prefix(&self.digest);
        also.iter().for_each(|prefix| hash.update(format!("\0{prefix}")));
        hex(hash)
    }

    /// What became of the rules since `before`, which is [`super::claims::Claims::fingerprints`] of an earlier run.
    pub fn difference(&self, before: &BTreeMap<String, String>) -> Difference {
        let mut difference = Difference::default();
        for (name, hash) in &self.fingerprints {
            match before.get(name) {
                None => difference.added.push(name.clone()),
                Some(stored) if stored != hash => difference.changed.push(name.clone()),
                Some(_) => {}
            }
        }
        difference.removed = before.keys().filter(|name| !self.fingerprints.contains_key(*name)).cloned().collect();
        difference
    }
}

/// The first 16 digits.
fn hex(hash: Sha256) -> String {
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// The names of rules that are not what they were.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// They were not there before.
    pub added: Vec<String>,
    /// They make other keys or values.
    pub changed: Vec<String>,
    /// They are no longer there.
    pub removed: Vec<String>,
}

/// The key holds something else.
#[derive(Debug, thiserror::Error)]
pub enum InvalidCheckpoint {
    /// Not a record of this form.
    #[error("it is not a checkpoint: {0}")]
    Json(#[from] serde_json::Error),
    /// Another version's.
    #[error("it has version {0}, which this keepstep does not know")]
    Version(u32),
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn checkpoint(lsn: u64) -> Checkpoint {
        Checkpoint {
            version: Checkpoint::VERSION,
            origin: Origin { system: "7".into(), timeline: 1, database: "shop".into(), slot: "keepstep".into() },
            epoch: 1_700_000_000_000_000,
            applied: Position::end(Lsn(lsn)),
            low: Lsn(lsn),
            good: Position::end(Lsn(lsn)),
            rules: "ab12".into(),
            written_us: 0,
            owing: BTreeMap::new(),
            released: Position::default(),
            progress: None,
            drains: Vec::new(),
            gap: None,
        }
    }

    #[test]
    fn it_reads_what_it_writes() {
        let written = checkpoint(0x16_B374_D848);
        assert_eq!(Checkpoint::decode(&written.encode()).expect("valid"), written);
        let drain = Drain { lsn: Lsn(7), snapshot: "10:20:10,14".parse().expect("a snapshot") };
        let written = Checkpoint { drains: vec![drain], ..written };
        assert_eq!(Checkpoint::decode(&written.encode()).expect("valid"), written);
    }

    #[test]
    fn the_larger_debt_stands() {
        let mut owing = BTreeMap::new();
        for debt in [Debt::Warm, Debt::Reconcile, Debt::Warm] {
            debt.enter("product", &mut owing);
        }
        Debt::Warm.enter("order", &mut owing);
        let written = Checkpoint { owing, ..checkpoint(1) }.encode();
        let read: serde_json::Value = serde_json::from_slice(&written).expect("JSON");
        assert_eq!(read["owing"], serde_json::json!({"order": "warm", "product": "reconcile"}));
    }

    #[test]
    fn added_changed_and_removed_rules_are_told_apart() {
        let of = |pairs: &[(&str, &str)]| pairs.iter().map(|(name, hash)| ((*name).into(), (*hash).into())).collect();
        let now = RuleSet { fingerprints: of(&[("a", "1"), ("b", "2"), ("c", "3")]), ..RuleSet::new(&[]) };
        let Difference { added, changed, removed } = now.difference(&of(&[("a", "1"), ("b", "0"), ("d", "4")]));
        assert_eq!((added, changed, removed), (vec!["c".to_owned()], vec!["b".to_owned()], vec!["d".to_owned()]));
    }

    #[test]
    fn other_content_is_an_error() {
        for stored in ["", "1", "{}", r#"{"version":1}"#] {
            assert!(Checkpoint::decode(stored.as_bytes()).is_err(), "{stored}");
        }
        let later = Checkpoint { version: 2, ..checkpoint(1) };
        assert!(matches!(Checkpoint::decode(&later.encode()), Err(InvalidCheckpoint::Version(2))));
    }
}
