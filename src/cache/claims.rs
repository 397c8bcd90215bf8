//! Which keys the cache can hold of which rules, those of earlier times included: a record beside the checkpoint.
//!
//! What a rule's keys look like follows from its templates and from the types of its table's columns. Both change, and
//! rules are removed; the keys stay. So each prefix has a record of the forms that were ever written under it, from which
//! the same typed matcher is made again that the rules themselves have: whoever removes keys needs neither the old rules
//! file nor the old table.
//!
//! **Invariant:** a form stands in the record before, or in the same MULTI as, the first key that it makes.

use std::cell::LazyCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use redis::Value;
use serde::{Deserialize, Serialize};

use super::checkpoint::RuleSet;
use super::connection::{Connection, Failure};
use super::writer::{get, unexpected};
use crate::batch::Vanished;
use crate::config::open::pattern_of;
use crate::rules::form::KeyForm;
use crate::rules::pattern::Pattern;
use crate::rules::template::RESERVED;

/// The record of one prefix. Stored as JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    /// The prefixes that were kept in step with this one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    also: Vec<String>,
    rules: BTreeMap<String, Claim>,
}

/// What one rule makes, and what it made before.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// The rule as it was last; `None` once it is removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// What its keys look like.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<KeyForm>,
    /// What they looked like before; nobody keeps such keys right any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former: Vec<KeyForm>,
}

impl Claims {
    /// The name of its key.
    pub fn key(prefix: &str) -> String {
        format!("{prefix}{RESERVED}rules")
    }

    /// As stored in Redis.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a record has only string keys")
    }

    /// From what Redis holds: this form, or the older one, which was an object of names and fingerprints.
    pub fn decode(stored: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(stored).or_else(|error| {
            let fingerprints: BTreeMap<String, String> = serde_json::from_slice(stored).map_err(|_| error)?;
            let claim = |(name, fingerprint)| (name, Claim { fingerprint: Some(fingerprint), ..Claim::default() });
            Ok(Claims { also: Vec::new(), rules: fingerprints.into_iter().map(claim).collect() })
        })
    }

    /// Every rule that is known, by name.
    pub fn rules(&self) -> impl Iterator<Item = (&str, &Claim)> {
        self.rules.iter().map(|(name, claim)| (name.as_str(), claim))
    }

    /// These are the rules from now on, and `also` the other prefixes that are kept in step. What a rule makes is left
    /// as it was until it is known ([`Claims::makes`]).
    pub fn adopt(&mut self, rules: &RuleSet, also: &[String]) {
        also.clone_into(&mut self.also);
        for (name, fingerprint) in &rules.fingerprints {
            self.rules.entry(name.clone()).or_default().fingerprint = Some(fingerprint.clone());
        }
        for (_, claim) in self.rules.iter_mut().filter(|(name, _)| !rules.fingerprints.contains_key(*name)) {
            claim.fingerprint = None;
            claim.turn_to(&[]);
        }
    }

    /// The rule's keys look like this from now on; whether that is news.
    pub fn makes(&mut self, rule: &str, keys: &[KeyForm]) -> bool {
        let claim = self.rules.entry(rule.to_owned()).or_default();
        let changed = claim.keys != keys;
        if changed {
            claim.turn_to(keys);
        }
        changed
    }

    /// Keys that looked like this are gone; whether that is news.
    pub fn gone(&mut self, rule: &str, former: &[KeyForm]) -> bool {
        let Some(claim) = self.rules.get_mut(rule) else { return false };
        let known = claim.former.len();
        claim.former.retain(|form| !former.contains(form));
        claim.former.len() != known
    }

    /// The keys under this prefix that each rule made before, as far as they may be searched for: those of a form that is
    /// not exact only if the rule `owns` whatever looks like its keys.
    pub fn former<'r>(&self, rules: impl Iterator<Item = (&'r str, bool)>, prefix: &str) -> Vec<Former> {
        let making = LazyCell::new(|| self.making(prefix));
        let former = rules.map(|(rule, owns)| {
            let former = self.rules.get(rule).map_or(&[][..], |claim| &claim.former);
            let forms: Vec<KeyForm> = former.iter().filter(|form| owns || form.is_exact()).cloned().collect();
            if forms.is_empty() {
                return Former::default();
            }
            // A tag is more than a key.
            let made = forms.iter().filter(|form| !form.is_tag()).map(|form| form.pattern(prefix)).collect();
            Former { forms, made, making: Arc::clone(&making) }
        });
        former.collect()
    }

    /// What the present rules make: of each some kilobytes.
    fn making(&self, prefix: &str) -> Arc<[Pattern]> {
        self.rules.values().flat_map(|claim| &claim.keys).map(|form| form.pattern(prefix)).collect()
    }

    /// The rules that were made of a pattern for tables that are gone, and what their keys look like, as far as no present
    /// rule can make such a key. That a table is gone is as good as TRUNCATE. `is_open` says of which patterns there still are
    /// rules.
    pub fn vanished(&self, is_open: impl Fn(&str) -> bool) -> Vec<Vanished> {
        let making = LazyCell::new(|| self.making(""));
        let is_made = |form: &KeyForm| making.iter().any(|made| made.common_key(&form.pattern("")).is_some());
        let removed = self.rules.iter().filter(|(_, claim)| claim.fingerprint.is_none());
        let removed = removed.filter(|(rule, _)| pattern_of(rule).is_some_and(&is_open));
        let vanished = removed.map(|(rule, claim)| {
            let forms = claim.former.iter().filter(|form| !is_made(form)).cloned().collect();
            Vanished { rule: rule.clone(), forms }
        });
        vanished.filter(|vanished| !vanished.forms.is_empty()).collect()
    }

    /// The keys of such a rule are gone; whether that is news.
    pub fn gone_with_table(&mut self, vanished: &Vanished) -> bool {
        let changed = self.gone(&vanished.rule, &vanished.forms);
        let left = self
            .rules
            .get(&vanished.rule)
            .is_some_and(|claim| claim.fingerprint.is_some() || claim.former.iter().any(|form| !self.is_present(form)));
        if !left {
            self.rules.remove(&vanished.rule);
        }
        changed
    }

    fn is_present(&self, form: &KeyForm) -> bool {
        self.rules.values().any(|claim| claim.keys.contains(form))
    }

    /// Nothing of what the rule made before is left, nor of the rule if it was removed.
    pub fn forget(&mut self, rule: &str) {
        if let Some(claim) = self.rules.get_mut(rule) {
            claim.former.clear();
        }
        self.rules.retain(|name, claim| name != rule || claim.fingerprint.is_some());
    }

    /// The fingerprints that `rules` are compared with. If a prefix was added to `also`, none that could be the same: nobody
    /// kept its keys in step.
    pub fn fingerprints(&self, rules: &RuleSet, also: &[String]) -> BTreeMap<String, String> {
        let in_step = also.iter().all(|prefix| self.also.contains(prefix));
        let known = self.rules.iter().filter(|(name, claim)| {
            // One that was removed is no news, unless it has come back.
            claim.fingerprint.is_some() || rules.fingerprints.contains_key(*name)
        });
        let compared = |claim: &Claim| claim.fingerprint.clone().filter(|_| in_step).unwrap_or_default();
        known.map(|(name, claim)| (name.clone(), compared(claim))).collect()
    }
}

/// Keys that a rule made before and that nobody keeps right any more.
#[derive(Clone, Debug, Default)]
pub struct Former {
    /// What they look like.
    pub forms: Vec<KeyForm>,
    made: Vec<Pattern>,
    /// What the present rules make, this one and others: the same for all of them.
    making: Arc<[Pattern]>,
}

impl Former {
    /// The same as patterns.
    pub fn patterns(&self) -> &[Pattern] {
        &self.made
    }

    /// Whether the key is one of them. One that a present rule can make is that rule's.
    pub fn matches(&self, key: &[u8]) -> bool {
        let made = |patterns: &[Pattern]| patterns.iter().any(|pattern| pattern.matches(key));
        made(&self.made) && !made(&self.making)
    }
}

/// The record of a prefix as Redis holds it. One that cannot be read counts as none: it is said, and written anew.
pub(super) async fn read(connection: &mut Connection, prefix: &str) -> Result<Option<Claims>, Failure> {
    let key = Claims::key(prefix);
    match connection.send_one(get(&key)).await? {
        Value::Nil => Ok(None),
        Value::BulkString(stored) => Ok(Claims::decode(&stored)
            .inspect_err(
                |error| tracing::warn!(key, %error, "not a record of rules; keys of former ones are not known"),
            )
            .ok()),
        other => Err(unexpected("GET", &other)),
    }
}

impl Claim {
    /// These forms are the present ones, all others former ones.
    fn turn_to(&mut self, keys: &[KeyForm]) {
        self.former.append(&mut self.keys);
        self.keys = keys.to_vec();
        let mut former = Vec::new();
        for form in self.former.drain(..) {
            if !self.keys.contains(&form) && !former.contains(&form) {
                former.push(form);
            }
        }
        self.former = former;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::checkpoint::Difference;

    /// A template of one literal and a column of this type.
    fn form(literal: &str, oid: u32) -> KeyForm {
        let stored = format!(r#"[{{"literal":"{literal}"}},{{"value":{{"source":{{"column":{oid}}}}}}}]"#);
        serde_json::from_str(&stored).expect("a form")
    }

    const INT: u32 = 23;
    const TEXT: u32 = 25;

    fn rules(pairs: &[(&str, &str)]) -> RuleSet {
        let fingerprints = pairs.iter().map(|(name, hash)| ((*name).to_owned(), (*hash).to_owned())).collect();
        RuleSet { fingerprints, ..RuleSet::new(&[]) }
    }

    fn former(claims: &Claims, rule: &str, owns: bool, prefix: &str) -> Former {
        claims.former([(rule, owns)].into_iter(), prefix).remove(0)
    }

    fn claims(rules: &RuleSet, also: &[String]) -> Claims {
        let mut claims = Claims::default();
        claims.adopt(rules, also);
        claims
    }

    #[test]
    fn it_reads_what_it_writes_and_what_was_written_before() {
        let mut written = claims(&rules(&[("a", "1"), ("b", "2")]), &["old:".to_owned()]);
        written.makes("a", &[form("a:", INT)]);
        written.adopt(&rules(&[("b", "3")]), &[]);
        assert_eq!(Claims::decode(&written.encode()).expect("valid"), written);
        let older = Claims::decode(br#"{"a":"1","rules":"2"}"#).expect("valid");
        assert_eq!(older, claims(&rules(&[("a", "1"), ("rules", "2")]), &[]));
        for other in ["", "1", "[]", r#"{"rules":{"a":{"keys":"*"}}}"#] {
            assert!(Claims::decode(other.as_bytes()).is_err(), "{other}");
        }
    }

    #[test]
    fn what_a_rule_made_before_is_remembered_until_it_is_gone() {
        let mut claims = claims(&rules(&[("a", "1")]), &[]);
        let matched = |claims: &Claims, key: &str| former(claims, "a", true, "shop:").matches(key.as_bytes());
        assert!(claims.makes("a", &[form("a:", INT)]));
        assert!(!claims.makes("a", &[form("a:", INT)]), "no news");
        // Bound again under another fingerprint, to another template and to another type, and back again.
        claims.adopt(&rules(&[("a", "2")]), &[]);
        assert!(!matched(&claims, "shop:a:1"), "nothing is former before it is known what is new");
        assert!(claims.makes("a", &[form("b:", TEXT)]));
        assert!(claims.makes("a", &[form("c:", INT)]));
        assert!(matched(&claims, "shop:a:1") && matched(&claims, "shop:b:x") && !matched(&claims, "shop:c:1"));
        assert!(claims.makes("a", &[form("a:", INT)]));
        assert!(!matched(&claims, "shop:a:1") && matched(&claims, "shop:c:1"));
        // What could be anybody's was not searched for.
        let searched = former(&claims, "a", false, "shop:").forms;
        assert_eq!(searched, [form("c:", INT)]);
        assert!(claims.gone("a", &searched) && !claims.gone("a", &searched));
        assert!(!matched(&claims, "shop:c:1") && matched(&claims, "shop:b:x"));
    }

    #[test]
    fn what_another_rule_makes_now_is_nobodys_former_key() {
        let mut claims = claims(&rules(&[("a", "1"), ("b", "1")]), &[]);
        claims.makes("a", &[form("a:", TEXT)]);
        claims.makes("a", &[form("new:", INT)]);
        claims.makes("b", &[form("a:b:", INT)]);
        let former = former(&claims, "a", true, "");
        assert!(former.matches(b"a:1") && former.matches(b"a:b:x") && !former.matches(b"a:b:1"));
    }

    #[test]
    fn a_removed_rule_leaves_its_forms() {
        let mut claims = claims(&rules(&[("a", "1"), ("b", "1")]), &[]);
        claims.makes("a", &[form("a:", INT)]);
        let without = rules(&[("b", "1")]);
        claims.adopt(&without, &[]);
        let removed: Vec<&str> =
            claims.rules().filter(|(_, claim)| claim.fingerprint.is_none()).map(|(name, _)| name).collect();
        assert_eq!(removed, ["a"]);
        assert!(former(&claims, "a", false, "").matches(b"a:1"));
        // It is reported as removed once, and as changed when it comes back, because its old keys must be looked at.
        assert_eq!(without.difference(&claims.fingerprints(&without, &[])), Difference::default());
        let with = rules(&[("a", "1"), ("b", "1")]);
        let back = Difference { changed: vec!["a".to_owned()], ..Difference::default() };
        assert_eq!(with.difference(&claims.fingerprints(&with, &[])), back);
    }

    #[test]
    fn a_removed_rule_is_forgotten_and_a_present_one_stays() {
        let mut claims = claims(&rules(&[("a", "1"), ("b", "1")]), &[]);
        for rule in ["a", "b"] {
            claims.makes(rule, &[form("old:", INT)]);
            claims.makes(rule, &[form("new:", INT)]);
        }
        claims.adopt(&rules(&[("b", "1")]), &[]);
        claims.forget("a");
        claims.forget("b");
        let known: Vec<(&str, usize, usize)> =
            claims.rules().map(|(name, claim)| (name, claim.keys.len(), claim.former.len())).collect();
        assert_eq!(known, [("b", 1, 0)]);
    }

    #[test]
    fn what_is_gone_with_its_table_is_known_until_its_keys_are_gone() {
        let tenants = [("t[a.x]", "1"), ("t[b.x]", "1"), ("other[a.x]", "1"), ("plain", "1")];
        let mut claims = claims(&rules(&tenants), &[]);
        for (rule, literal) in [("t[a.x]", "a:"), ("t[b.x]", "b:"), ("other[a.x]", "o:"), ("plain", "p:")] {
            claims.makes(rule, &[form(literal, INT), form("shared:", INT), form(&format!("{literal}text:"), TEXT)]);
        }
        claims.adopt(&rules(&[("t[b.x]", "1")]), &[]);
        // Of rules that are in the file no more it is the user's to say, and what another tenant makes too stays.
        let is_open = |pattern: &str| pattern == "t";
        let vanished = claims.vanished(is_open);
        let forms = vec![form("a:", INT), form("a:text:", TEXT)];
        assert_eq!(vanished, [Vanished { rule: "t[a.x]".to_owned(), forms }]);
        assert!(claims.gone_with_table(&vanished[0]) && !claims.gone_with_table(&vanished[0]));
        assert!(claims.vanished(is_open).is_empty());
        let names = |claims: &Claims| claims.rules().map(|(name, _)| name.to_owned()).collect::<Vec<_>>();
        assert_eq!(names(&claims), ["other[a.x]", "plain", "t[b.x]"]);
    }

    #[test]
    fn what_a_present_rule_can_make_does_not_go_with_a_table() {
        let mut claims = claims(&rules(&[("t[a.x]", "1"), ("plain", "1")]), &[]);
        claims.makes("t[a.x]", &[form("a:", INT), form("a:text:", TEXT)]);
        claims.makes("plain", &[form("a:text:b:", INT)]);
        claims.adopt(&rules(&[("plain", "1")]), &[]);
        let vanished = claims.vanished(|_| true);
        assert_eq!(vanished[0].forms, [form("a:", INT)]);
        claims.gone_with_table(&vanished[0]);
        // It is left to `clear --removed`.
        assert!(claims.vanished(|_| true).is_empty() && claims.rules().any(|(name, _)| name == "t[a.x]"));
    }

    #[test]
    fn what_the_present_rules_make_is_kept_once() {
        let mut claims = claims(&rules(&[("a", "1"), ("b", "1"), ("c", "1")]), &[]);
        for rule in ["a", "b", "c"] {
            claims.makes(rule, &[form("old:", INT)]);
            claims.makes(rule, &[form(rule, INT)]);
        }
        let all = claims.former(["a", "b", "c"].map(|rule| (rule, false)).into_iter(), "");
        assert_eq!(all[0].making.len(), 3);
        assert!(all.iter().all(|former| Arc::ptr_eq(&former.making, &all[0].making)));
    }

    #[test]
    fn under_an_added_prefix_nothing_is_known_to_be_in_step() {
        let also = |prefixes: &[&str]| prefixes.iter().map(|prefix| (*prefix).to_owned()).collect::<Vec<_>>();
        let now = rules(&[("a", "1")]);
        let before = claims(&now, &also(&["old:"]));
        let differs = |prefixes: &[&str]| now.difference(&before.fingerprints(&now, &also(prefixes))).changed.len();
        assert_eq!((differs(&["old:"]), differs(&[]), differs(&["old:", "older:"])), (0, 0, 1));
        let digests = [&[][..], &["old:"], &["old:", "older:"]].map(|prefixes| now.digest_with(&also(prefixes)));
        assert!(digests[0] != digests[1] && digests[1] != digests[2] && digests[0] == now.digest);
    }
}
