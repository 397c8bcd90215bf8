//! Which table is read next, and for which rules.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::super::Session;
use super::super::orders::{PassOrder, Purpose, Report};
use super::{AUDIT_EVERY, Pass, Why, only};
use crate::batch::Of;
use crate::cache::Cache;
use crate::cache::checkpoint::{Debt, Progress};
use crate::cache::claims::Former;
use crate::plan::BoundTable;
use crate::rules::bind::{BoundRule, BoundTag, BoundWrite};
use crate::rules::refresh::KeyListing;
use crate::snapshot::reader::TableJob;
use crate::snapshot::search::{Owned, SearchJob, Tagged, Wanted};

impl<C: Cache + Send + 'static> Session<C> {
    /// The rules that say `audit`, by the largest share of each table.
    pub(super) fn ask_for_audit(&mut self) {
        let shares = self.config.rules.iter().map(|rule| rule.write.as_ref().and_then(|write| write.audit));
        let audited: Vec<(u16, f64)> = (0..).zip(shares).filter_map(|(rule, share)| Some((rule, share?))).collect();
        let Some(share) = audited.iter().map(|(_, share)| *share).reduce(f64::max) else { return };
        let sample = (share * AUDIT_EVERY.as_secs_f64() / 60.0).min(1.0);
        let (reports, _) = mpsc::channel(1);
        let purpose = Purpose::Verify { sample, repair: false };
        let rules = audited.into_iter().map(|(rule, _)| rule).collect();
        self.reads.take_on(PassOrder { rules, purpose, filter: None, reports }, true);
    }

    /// Whether some rule owes and can pay.
    pub(in crate::session) fn can_pay(&self) -> bool {
        self.next_debt().is_some()
    }

    /// What is to be read next.
    pub(super) fn next_pass(&mut self) -> Option<(Pass, TableJob)> {
        let debt = self.next_debt();
        // What could not be read waits for everything else, or nothing else would ever be read.
        let failed =
            debt.as_ref().is_some_and(|(pass, _)| pass.rules.iter().any(|rule| self.reads.failed.contains_key(rule)));
        match failed {
            true => self.next_asked().or(debt),
            false => debt.or_else(|| self.next_asked()),
        }
    }

    /// The first rule that owes and can pay, with those that are read together with it.
    fn next_debt(&self) -> Option<(Pass, TableJob)> {
        let owing = self.debts.next(&self.checkpoint.owing);
        if owing.is_empty() {
            return None;
        }
        let debt = |rule: &BoundRule| owing.get(&self.config.rules[usize::from(rule.rule)].name.value).copied();
        let can_pay =
            |rule: &&BoundRule| debt(rule).is_some() && rule.write.as_ref().is_none_or(|write| write.value.is_some());
        let tables = self.intake.tables();
        let (first, table) = tables
            .flat_map(|table| table.rules.iter().filter(can_pay).map(move |rule| (rule, table)))
            // Those that could not be read wait for the others.
            .min_by_key(|(rule, _)| (self.reads.failed.get(&rule.rule), rule.rule))?;
        let table = Arc::clone(table);
        // Which keys a query has can be asked in vain for ever: that holds up neither rows nor other queries.
        let failed = |rule: &BoundRule| self.reads.failed.contains_key(&rule.rule);
        let together = |rule: &&BoundRule| match (is_listed(first), failed(first)) {
            (false, _) => !is_listed(rule),
            (true, false) => is_listed(rule) && !failed(rule),
            (true, true) => rule.rule == first.rule,
        };
        let owes = table.rules.iter().filter(can_pay).filter(together);
        let owes: Vec<(&BoundRule, Debt)> = owes.filter_map(|rule| Some((rule, debt(rule)?))).collect();
        let worst = owes.iter().map(|(_, debt)| *debt).max()?;
        let rules: Vec<u16> = owes.iter().map(|(rule, _)| rule.rule).collect();
        let listings: Vec<KeyListing> = owes.iter().filter_map(|(rule, _)| listing(rule)).collect();
        let reconciled = owes.iter().filter(|(_, debt)| *debt == Debt::Reconcile).map(|(rule, _)| *rule);
        let owned = reconciled.clone().flat_map(|rule| self.searched(rule)).collect();
        let tags = reconciled.clone().flat_map(|rule| self.searched_tags(rule)).collect();
        let former: Vec<(u16, Former)> =
            reconciled.filter_map(|rule| Some((rule.rule, self.reads.former_of(rule.rule)?.clone()))).collect();
        let searched = former.iter().map(|(rule, _)| *rule).collect();
        // While nothing was read, a change that `changed` skips can have moved a row to where it was read already.
        let resumes = worst == Debt::Warm && owes.iter().all(|(rule, _)| rule.changed.is_none());
        // What was read for other rules, or of another table, or leaves more to do, is no part of this.
        let same = |progress: &&Progress| {
            resumes && progress.from.table == table.relation.oid && progress.rules == self.names(&rules)
        };
        let from = self.reads.progress.as_ref().filter(same).map(|progress| progress.from);
        let job = TableJob {
            table: only(&table, |rule| rules.contains(&rule.rule) && is_readable(rule)),
            fills: false,
            verifies: false,
            filter: None,
            sample: 1.0,
            from,
            search: SearchJob::new(Wanted { owned, tags, former }),
            listings,
            barrier: !self.reads.barrier_passed,
        };
        Some((Pass { former: searched, resumes, ..pass(&table, rules, Why::Debt(worst), &job) }, job))
    }

    pub(super) fn names(&self, rules: &[u16]) -> Vec<String> {
        rules.iter().map(|rule| self.config.rules[usize::from(*rule)].name.value.clone()).collect()
    }

    /// The rule's keys, if they are searched for orphans.
    fn searched(&self, rule: &BoundRule) -> Option<Owned> {
        if let Some(listing) = listing(rule) {
            return Some(Owned { rule: rule.rule, pattern: listing.pattern, of: Of::Key });
        }
        let searched = |write: &&BoundWrite| rule.on.delete && !write.keep_on_delete && write.is_owner();
        let write = rule.write.as_ref().filter(searched).filter(|_| is_readable(rule))?;
        let of = write.member.as_ref().map_or(Of::Key, |member| member.of);
        Some(Owned { rule: rule.rule, pattern: write.key.pattern.clone(), of })
    }

    /// What the rule's rows put into tags, if that is searched for members without a row.
    fn searched_tags(&self, rule: &BoundRule) -> Vec<Tagged> {
        let write = rule.write.as_ref().filter(|write| rule.on.delete && write.is_owner() && is_readable(rule));
        let tags = write.iter().flat_map(|write| write.tags.iter().map(move |tag| (tag, write)));
        let tagged = |(tag, write): (&BoundTag, &&BoundWrite)| {
            let (tags, members) = (tag.key.pattern.clone(), write.key.pattern.under(b""));
            Tagged { rule: rule.rule, tags, members }
        };
        tags.map(tagged).collect()
    }

    /// The next table of what somebody asked for.
    fn next_asked(&mut self) -> Option<(Pass, TableJob)> {
        loop {
            let asked = self.reads.asked.front_mut()?;
            let wanted =
                |table: &&Arc<BoundTable>| table.rules.iter().any(|rule| asked.order.rules.contains(&rule.rule));
            let all = || self.intake.tables().filter(wanted).map(|table| table.relation.oid).collect();
            let Some(oid) = asked.tables.get_or_insert_with(all).pop_front() else {
                // It goes once this is said.
                if !asked.unsaid.back().is_some_and(Report::is_last) {
                    asked.unsaid.push_back(Report::Done(asked.totals));
                }
                return None;
            };
            let Some(table) = self.intake.table(oid).map(Arc::clone) else { continue };
            let rules: Vec<u16> = asked.order.rules.clone();
            let (purpose, filter) = (asked.order.purpose, asked.order.filter.clone());
            let wanted = |rule: &&BoundRule| rules.contains(&rule.rule) && is_readable(rule);
            let lists = |rule: &&BoundRule| rules.contains(&rule.rule);
            let listings = table.rules.iter().filter(lists).filter_map(listing).collect();
            let complete = matches!(purpose, Purpose::Verify { sample, .. } if sample >= 1.0) && filter.is_none();
            let all = || table.rules.iter().filter(|rule| complete && (wanted(rule) || lists(rule)));
            let owned = all().flat_map(|rule| self.searched(rule)).collect();
            let tags = all().flat_map(|rule| self.searched_tags(rule)).collect();
            let job = TableJob {
                table: only(&table, |rule| wanted(&rule)),
                fills: true,
                // Compared with the longest that a key may live.
                verifies: matches!(purpose, Purpose::Verify { .. }),
                filter,
                sample: if let Purpose::Verify { sample, .. } = purpose { sample } else { 1.0 },
                from: None,
                search: SearchJob::new(Wanted { owned, tags, former: Vec::new() }),
                listings,
                barrier: !self.reads.barrier_passed,
            };
            let listed = job.listings.iter().map(|listing| listing.rule);
            let rules = job.table.rules.iter().map(|rule| rule.rule).chain(listed).collect();
            return Some((pass(&table, rules, Why::Asked(purpose), &job), job));
        }
    }
}

fn pass(table: &Arc<BoundTable>, rules: Vec<u16>, purpose: Why, job: &TableJob) -> Pass {
    Pass {
        table: Arc::clone(table),
        rules,
        purpose,
        former: Vec::new(),
        swept: false,
        search: job.search.as_ref().map(|search| Arc::clone(&search.known)),
        resumes: false,
        began: Instant::now(),
        rows: 0,
        share: 0.0,
    }
}

/// Whether the table says what the rule's keys hold: not where some operations do not count.
pub(super) fn is_readable(rule: &BoundRule) -> bool {
    rule.write.as_ref().is_some_and(|write| write.value.is_some()) && rule.on.insert && rule.on.update
}

/// Whether it is known which keys the rule's query has.
pub(super) fn is_listed(rule: &BoundRule) -> bool {
    rule.refresh.as_ref().is_some_and(|refresh| refresh.query.listing().is_some())
}

/// All keys of the rule's query, if it is known which there are.
fn listing(rule: &BoundRule) -> Option<KeyListing> {
    let refresh = rule.refresh.as_ref().filter(|_| is_listed(rule))?;
    let (query, pattern) = (Arc::clone(&refresh.query), refresh.key.pattern.clone());
    Some(KeyListing { rule: rule.rule, query, pattern })
}
