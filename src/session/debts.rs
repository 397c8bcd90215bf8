//! What rules owe: which of them, since when, and what is being paid; pure.
//!
//! A debt stands in the checkpoint, written with the batch that made it, so it outlives whatever ends the session. It
//! goes only once a pass over the table has paid it, in a checkpoint behind everything that the pass wrote. What happens
//! to a rule while it is being paid counts anew: the pass may have read what it is about before.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::cache::checkpoint::{Debt, RuleSet};
use crate::config::open::pattern_of;
use crate::config::{Rule, Settled};

/// What rules owe, by name.
pub type Owing = BTreeMap<String, Debt>;

/// Why keys have to be made right from the tables: the label of `keepstep_reconciles_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// Redis lost the checkpoint, and with it the cache.
    CacheLost,
    /// The slot is gone, or the server gave it up.
    SlotLost,
    /// The slot no longer sends what the cache lacks.
    SlotMoved,
    /// The server was promoted: its history is another one.
    Promoted,
    /// The server's log, or the cache, is older than it was.
    WentBack,
    /// The rules file changed.
    RulesChanged,
    /// A table changed in a way that the stream does not carry.
    Catalog,
    /// An earlier session left it unpaid.
    Owing,
    /// Somebody asked for it.
    Asked,
}

impl Reason {
    /// As the metric and the log say it.
    pub fn label(self) -> &'static str {
        match self {
            Self::CacheLost => "cache_lost",
            Self::SlotLost => "slot_lost",
            Self::SlotMoved => "slot_moved",
            Self::Promoted => "promoted",
            Self::WentBack => "went_back",
            Self::RulesChanged => "rules_changed",
            Self::Catalog => "catalog",
            Self::Owing => "owing",
            Self::Asked => "asked",
        }
    }
}

/// What the rules owe when a session begins, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Opening {
    /// For the first checkpoint.
    pub owing: Owing,
    /// Each once; none where nothing is owed, nor at a first start.
    pub reasons: BTreeSet<Reason>,
}

impl Opening {
    /// A cache that keepstep has not filled yet: what is written from rows is missing. Keys that are there already are
    /// somebody else's work, and may be as wrong as after a loss.
    pub fn first_start(rules: &[Rule], cache_has_keys: bool) -> Self {
        let written = rules.iter().filter(|rule| is_warmed(rule));
        let owing = if cache_has_keys { all(rules.iter(), Debt::Reconcile) } else { all(written, Debt::Warm) };
        Opening { owing, reasons: BTreeSet::new() }
    }

    /// History is missing: nothing in the cache can be trusted.
    pub fn after_loss(rules: &[Rule], reason: Reason) -> Self {
        Opening { owing: all(rules.iter(), Debt::Reconcile), reasons: BTreeSet::from([reason]) }
    }

    /// Nothing is missing: what was owed is still owed, by the rules that are still there.
    pub fn resumed(stored: &Owing, rules: &[Rule]) -> Self {
        let stands = |name: &String| rules.iter().any(|rule| rule.name.value == *name);
        let owing: Owing = stored.iter().filter(|(name, _)| stands(name)).map(|(n, d)| (n.clone(), *d)).collect();
        let reasons = if owing.is_empty() { BTreeSet::new() } else { BTreeSet::from([Reason::Owing]) };
        Opening { owing, reasons }
    }

    /// Adds what became of the rules since `before`, as the cache remembers them; `None` if that is not known.
    pub fn compare_rules(&mut self, before: Option<&BTreeMap<String, String>>, now: &RuleSet, rules: &[Rule]) {
        let difference = before.map(|before| now.difference(before));
        let is_new = |name: &str| difference.as_ref().is_some_and(|found| found.added.iter().any(|rule| rule == name));
        let changed =
            |name: &str| difference.as_ref().is_none_or(|found| found.changed.iter().any(|rule| rule == name));
        for rule in rules {
            let name = rule.name.value.as_str();
            match (is_new(name), changed(name)) {
                // Its table is there for some seconds, and nobody has heard what changed in it: keys that somebody has filled
                // can be outdated.
                (true, _) if pattern_of(name).is_some() && (does_more_than_write(rule) || rule.may_miss()) => {
                    self.add(name, Debt::Reconcile, Reason::RulesChanged);
                }
                (true, _) if is_warmed(rule) => self.add(name, Debt::Warm, Reason::RulesChanged),
                (false, true) => self.add(name, Debt::Reconcile, Reason::RulesChanged),
                _ => {}
            }
        }
    }

    /// Adds a debt.
    pub fn add(&mut self, rule: &str, debt: Debt, reason: Reason) {
        debt.enter(rule, &mut self.owing);
        self.reasons.insert(reason);
    }
}

/// The rules whose `every` has come round after `since_us` (both in microseconds since 1970). Nothing has to be
/// remembered of when it last did, because the times are the same for all sessions. What comes of a query may have lost keys
/// by the time alone; rows that are there have theirs.
pub fn to_rewrite(rules: &[Rule], since_us: u64, now_us: u64) -> impl Iterator<Item = (&str, Debt)> {
    let due = move |every: Duration| {
        let every_us = u64::try_from(every.as_micros()).unwrap_or(u64::MAX).max(1);
        since_us / every_us < now_us / every_us
    };
    let every = |rule: &Rule| match (&rule.write, rule.refresh.as_ref().filter(|_| rule.lists)) {
        (Some(write), _) => Some((write.every?, Debt::Warm)),
        // Without `keys` there is one, and it stays.
        (None, Some(query)) => Some((query.every?, if query.keys.is_some() { Debt::Reconcile } else { Debt::Warm })),
        (None, None) => None,
    };
    let due = move |rule| every(rule).filter(|(every, _)| due(*every)).map(|(_, debt)| debt);
    rules.iter().filter_map(move |rule| Some((rule.name.value.as_str(), due(rule)?)))
}

/// Whether rows that do not change get their keys too.
fn is_warmed(rule: &Rule) -> bool {
    rule.lists || rule.write.as_ref().is_some_and(|write| write.warm)
}

/// Whether it makes keys stale, or tells of changes.
fn does_more_than_write(rule: &Rule) -> bool {
    let Settled { delete_match, delete_tags, bump, stream, publish } = &rule.settled;
    let settles = !(delete_match.is_empty() && delete_tags.is_empty() && bump.is_empty())
        || stream.is_some()
        || publish.is_some();
    settles || !rule.delete.is_empty()
}

fn all<'a>(rules: impl Iterator<Item = &'a Rule>, debt: Debt) -> Owing {
    rules.map(|rule| (rule.name.value.clone(), debt)).collect()
}

/// What changes in the debts of a running session.
#[derive(Debug, Default)]
pub struct Debts {
    /// In no checkpoint yet.
    new: Owing,
    /// A pass makes these right.
    paying: BTreeSet<String>,
    /// A pass has made these right, and the stored checkpoint does not say so yet.
    paid: BTreeSet<String>,
}

impl Debts {
    /// The rule owes from now on, whatever a pass under way has done for it.
    pub fn owe(&mut self, rule: &str, debt: Debt) {
        self.paying.remove(rule);
        self.paid.remove(rule);
        debt.enter(rule, &mut self.new);
    }

    /// A pass over the rule's table begins.
    pub fn begin(&mut self, rule: &str) {
        self.paying.insert(rule.to_owned());
    }

    /// The pass has written everything. Whether that paid the debt: not if the rule came to owe again meanwhile.
    pub fn settle(&mut self, rule: &str) -> bool {
        let paid = self.paying.remove(rule);
        if paid {
            self.new.remove(rule);
            self.paid.insert(rule.to_owned());
        }
        paid
    }

    /// Whether the rule is being paid, and nothing has happened to it since that began.
    pub fn is_paying(&self, rule: &str) -> bool {
        self.paying.contains(rule)
    }

    /// Whether the rule came to owe, and no stored checkpoint says so yet.
    pub fn is_new(&self, rule: &str) -> bool {
        self.new.contains_key(rule)
    }

    /// Whether the stored checkpoint says something else.
    pub fn is_due(&self) -> bool {
        !(self.new.is_empty() && self.paid.is_empty())
    }

    /// What the next checkpoint says.
    pub fn next(&self, stored: &Owing) -> Owing {
        let mut owing = stored.clone();
        owing.retain(|rule, _| !self.paid.contains(rule));
        self.new.iter().for_each(|(rule, debt)| debt.enter(rule, &mut owing));
        owing
    }

    /// Redis holds a checkpoint that says this.
    pub fn stored(&mut self, owing: &Owing) {
        self.new.retain(|rule, debt| owing.get(rule).is_none_or(|stored| *stored < *debt));
        self.paid.retain(|rule| owing.contains_key(rule));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{RulesFile, parse};

    /// `written` and `stale` on one table: one writes a key, the other only deletes.
    fn rules() -> Vec<Rule> {
        let text = "[postgres]\nurl = \"postgres://h/d\"\n[redis]\nurl = \"redis://h\"\n\
                    [rule.written]\ntable = \"public.t\"\nkey = \"t:{id}\"\nvalue = \"json\"\ncolumns = [\"id\"]\n\
                    [rule.stale]\ntable = \"public.t\"\ndelete = [\"list:{id}\"]\n";
        let file = RulesFile { path: "keepstep.toml".into(), text: text.into() };
        parse(file, &|_| None).expect("a rules file").0.rules
    }

    fn owing(pairs: &[(&str, Debt)]) -> Owing {
        pairs.iter().map(|(rule, debt)| ((*rule).to_owned(), *debt)).collect()
    }

    use Debt::{Reconcile, Warm};

    #[test]
    fn a_first_start_warms_what_is_written_and_a_loss_reconciles_everything() {
        assert_eq!(Opening::first_start(&rules(), false).owing, owing(&[("written", Warm)]));
        let mut cold = rules();
        cold[0].write.iter_mut().for_each(|write| write.warm = false);
        assert_eq!(Opening::first_start(&cold, false), Opening::default());
        let beside_others = Opening::first_start(&rules(), true).owing;
        assert_eq!(beside_others, owing(&[("written", Reconcile), ("stale", Reconcile)]));
        let lost = Opening::after_loss(&rules(), Reason::SlotLost);
        assert_eq!(lost.owing, owing(&[("written", Reconcile), ("stale", Reconcile)]));
        assert_eq!(lost.reasons, BTreeSet::from([Reason::SlotLost]));
    }

    #[test]
    fn what_was_owed_is_owed_by_the_rules_that_are_still_there() {
        let resumed = Opening::resumed(&owing(&[("written", Warm), ("removed", Reconcile)]), &rules());
        assert_eq!(resumed.owing, owing(&[("written", Warm)]));
        assert_eq!(resumed.reasons, BTreeSet::from([Reason::Owing]));
        assert_eq!(Opening::resumed(&Owing::new(), &rules()), Opening::default());
    }

    /// What the rules owe after `before`, of which each is given by name and whether it was the same.
    fn compared(before: Option<&[(&str, bool)]>) -> Owing {
        let (rules, now) = (rules(), RuleSet::new(&rules()));
        let hash = |name: &str, same| if same { now.fingerprints[name].clone() } else { "other".to_owned() };
        let before = before.map(|rules| rules.iter().map(|(name, same)| ((*name).into(), hash(name, *same))).collect());
        let mut opening = Opening::default();
        opening.compare_rules(before.as_ref(), &now, &rules);
        assert_eq!(opening.reasons.is_empty(), opening.owing.is_empty());
        opening.owing
    }

    #[test]
    fn new_rules_warm_and_changed_rules_reconcile() {
        assert_eq!(compared(Some(&[("written", true), ("stale", true)])), Owing::new());
        assert_eq!(compared(Some(&[("written", false), ("stale", true)])), owing(&[("written", Reconcile)]));
        assert_eq!(compared(Some(&[("written", true), ("stale", false)])), owing(&[("stale", Reconcile)]));
        assert_eq!(compared(Some(&[("removed", false)])), owing(&[("written", Warm)]));
        assert_eq!(compared(None), owing(&[("written", Reconcile), ("stale", Reconcile)]), "nothing is known of them");
    }

    #[test]
    fn a_table_that_has_come_is_warmed_and_what_it_made_stale_meanwhile_goes() {
        let mut rules = rules();
        for rule in &mut rules {
            rule.name.value = format!("{}[public.t]", rule.name.value);
        }
        let mut opening = Opening::default();
        opening.compare_rules(Some(&BTreeMap::new()), &RuleSet::new(&rules), &rules);
        assert_eq!(opening.owing, owing(&[("written[public.t]", Warm), ("stale[public.t]", Reconcile)]));
        // So goes what the application has filled before.
        for (present_only, warm) in [(true, true), (false, false)] {
            let mut rules = rules.clone();
            rules[0].write.iter_mut().for_each(|write| (write.present_only, write.warm) = (present_only, warm));
            let mut opening = Opening::default();
            opening.compare_rules(Some(&BTreeMap::new()), &RuleSet::new(&rules), &rules);
            assert_eq!(opening.owing["written[public.t]"], Reconcile);
        }
    }

    #[test]
    fn rules_are_written_again_at_the_times_that_all_sessions_share() {
        const MINUTE: u64 = 60_000_000;
        let mut rules = rules();
        let due = |rules: &[Rule], since, now| {
            to_rewrite(rules, since, now).map(|(rule, _)| rule.to_owned()).collect::<Vec<_>>()
        };
        assert!(due(&rules, 0, 1000 * MINUTE).is_empty(), "neither says `every`");
        rules[0].write.iter_mut().for_each(|write| write.every = Some(Duration::from_secs(600)));
        assert_eq!(due(&rules, 19 * MINUTE, 20 * MINUTE), ["written"]);
        assert!(due(&rules, 20 * MINUTE, 30 * MINUTE - 1).is_empty());
        assert_eq!(due(&rules, 20 * MINUTE, 500 * MINUTE), ["written"], "away for hours");
        assert!(due(&rules, 20 * MINUTE, 9 * MINUTE).is_empty(), "the clock was set back");
    }

    #[test]
    fn what_time_makes_of_a_query_is_its_keys_and_what_they_hold() {
        let query = |name, key, keys| {
            format!(
                "[query.{name}]\nkey = \"{key}\"\nmode = \"refresh\"\nsql = \"select now()\"\nshape = \"value\"\n{keys}every = \"1m\"\n\
                 [[query.{name}.on]]\ntable = \"public.t\"\nparams = {{ id = \"{{id}}\" }}\n\
                 [[query.{name}.on]]\ntable = \"public.u\"\nparams = {{ id = \"{{id}}\" }}\n"
            )
        };
        let servers = "[postgres]\nurl = \"postgres://h/d\"\n[redis]\nurl = \"redis://h\"\n";
        let text =
            [servers, &query("one", "one", ""), &query("some", "some:{id}", "keys = \"select 1 as id\"\n")].concat();
        let file = RulesFile { path: "keepstep.toml".into(), text };
        let rules = parse(file, &|_| None).expect("a rules file").0.rules;
        let due: Vec<_> = to_rewrite(&rules, 0, 60_000_000).collect();
        assert_eq!(due, [("one.1", Warm), ("some.1", Reconcile)]);
        assert_eq!(Opening::first_start(&rules, false).owing, owing(&[("one.1", Warm), ("some.1", Warm)]));
    }

    #[test]
    fn a_debt_goes_only_once_it_is_paid_and_the_checkpoint_says_so() {
        let mut debts = Debts::default();
        let stored = owing(&[("a", Warm)]);
        debts.owe("b", Reconcile);
        assert_eq!(debts.next(&stored), owing(&[("a", Warm), ("b", Reconcile)]));
        debts.stored(&owing(&[("a", Warm), ("b", Reconcile)]));
        assert!(!debts.is_due());
        debts.begin("a");
        assert!(!debts.is_due(), "a pass under way has paid nothing");
        assert!(debts.settle("a"));
        assert_eq!(debts.next(&owing(&[("a", Warm), ("b", Reconcile)])), owing(&[("b", Reconcile)]));
        // The answer for a batch that went out before.
        debts.stored(&owing(&[("a", Warm), ("b", Reconcile)]));
        assert!(debts.is_due());
        debts.stored(&owing(&[("b", Reconcile)]));
        assert!(!debts.is_due());
    }

    #[test]
    fn what_happens_while_a_rule_is_paid_is_not_paid() {
        let mut debts = Debts::default();
        let stored = owing(&[("a", Reconcile)]);
        debts.begin("a");
        assert!(debts.is_paying("a") && !debts.is_new("a"));
        debts.owe("a", Warm);
        assert!(!debts.is_paying("a") && debts.is_new("a"));
        debts.stored(&stored);
        assert!(!debts.settle("a"));
        assert_eq!(debts.next(&stored), stored);
        // After the end of a pass, before the checkpoint says so.
        debts.begin("a");
        assert!(debts.settle("a"));
        debts.owe("a", Warm);
        assert_eq!(debts.next(&stored), stored);
        assert!(!debts.settle("b"), "nobody was paying for it");
    }
}
