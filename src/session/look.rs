//! What is looked at every few seconds beside the stream: the slot, and what the catalog says of the tables.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use crate::cache::Cache;
use crate::cache::checkpoint::Debt;
use crate::canary::{self, Canary};
use crate::catalog::Carrier;
use crate::catalog::signature::{self, Look, Signatures};
use crate::config::{self, Config, OnGap, Operations, Rule, TableName};
use crate::error::{Error, ErrorKind, Result};
use crate::model::Lsn;
use crate::source::Standing;
use crate::source::slot::{self, SlotState};

use super::debts::Reason;
use super::{LOOK_EVERY, Session, open, report};

/// How many rules are named in a line of the log.
const NAMES_SHOWN: usize = 10;

/// What was found.
pub(super) struct Looked {
    slot: Option<SlotState>,
    /// Where the server's log ends.
    server_end: Option<Lsn>,
    catalog: Look,
    /// What the rules are for the tables that there are now, if that is something else; or why nothing comes of it.
    now: Result<Option<Config>, String>,
}

impl<C: Cache + Send + 'static> Session<C> {
    /// Looks in the background; now and then moves an idle slot forward first.
    pub(super) fn look(&mut self, now: Instant) {
        let due = self.looked_at.is_none_or(|last| now.duration_since(last) >= LOOK_EVERY);
        if self.looking.is_some() || !due {
            return;
        }
        self.looked_at = Some(now);
        // What writes to an outbox moves it.
        let replicates = self.config.postgres.source == config::Source::Replication;
        let beats = |every| replicates && now.duration_since(self.heartbeat_sent) >= every;
        let heartbeat = self.config.postgres.heartbeat.is_some_and(beats);
        if heartbeat {
            self.heartbeat_sent = now;
        }
        let (client, config, gap) = (Arc::clone(&self.client), Arc::clone(&self.config), self.checkpoint.gap);
        self.looking = Some(Box::pin(async move {
            if heartbeat {
                slot::heartbeat(&client).await?;
            }
            let standing = Standing::look(&client, &config.postgres).await?;
            let (slot, server_end) = (standing.slot(&config.postgres.slot, gap), standing.server_end());
            let catalog = signature::look(&client, &Carrier::of(&config.postgres), &tables(&config)).await?;
            let now = match open::for_tables_now(&config, &client).await {
                Err(error) if error.kind() == ErrorKind::Config => Err(error.to_string()),
                now => Ok(now?),
            };
            Ok(Looked { slot, server_end, catalog, now })
        }));
    }

    pub(super) fn looked(&mut self, Looked { slot, server_end, catalog, now }: Looked) -> Result<()> {
        self.looking = None;
        self.server_end = server_end.unwrap_or(self.server_end);
        // A slot that is gone ends the stream by itself, with the server's own words.
        if let Some(slot) = slot {
            let postgres = &self.config.postgres;
            report::slot(&slot, postgres, &self.metrics, &self.shared);
            let is_slot = postgres.source == config::Source::Replication;
            if let Some(why) = slot.invalidation_reason.filter(|_| !is_slot) {
                return Err(Error::new(ErrorKind::Gap, format!("the {} {why}", Carrier::stream(postgres))));
            }
            if is_slot && postgres.on_gap == OnGap::Reconcile && slot.retained_bytes > Some(postgres.max_retained) {
                // The next session drops it: nobody streams it then.
                return Err(Error::new(
                    ErrorKind::Gap,
                    "the slot keeps more WAL than `max_retained`, so it is given up",
                ));
            }
        }
        let next = now.as_ref().ok().and_then(Option::as_ref);
        if next.is_none() {
            self.tables.carried(&catalog.carried);
        }
        // Of a table that is gone nothing is left to read.
        let stays =
            |rule: &&Rule| next.is_none_or(|next| next.rules.iter().any(|stays| stays.name.value == rule.name.value));
        let rules = self.config.rules.iter().filter(stays);
        let differing = differing(&catalog.signatures, &self.signatures, rules);
        if !differing.is_empty() {
            self.metrics.reconciles_total.with_label_values(&[Reason::Catalog.label()]).inc();
        }
        // What one of the canaries breaks would be mended here.
        let differing = if canary::is(Canary::NoFilenode) { Vec::new() } else { differing };
        differing.iter().for_each(|rule| self.debts.owe(&rule.name.value, Debt::Reconcile));
        self.signatures_unsaid |= self.signatures != catalog.signatures;
        self.signatures = catalog.signatures;
        self.follow_tables(now);
        self.look_for_unbound(&catalog.carried);
        Ok(())
    }

    /// A rule owes, and the stream has called its table something else last, or has not named it yet: nothing can be read for
    /// the rule before that is bound.
    fn look_for_unbound(&mut self, carried: &BTreeMap<TableName, Operations>) {
        let owing = self.debts.next(&self.checkpoint.owing);
        let bound: BTreeSet<TableName> = self.intake.tables().map(|table| TableName::from(&table.relation)).collect();
        let unbound = |rule: &&Rule| {
            let table = &rule.table.value;
            owing.contains_key(&rule.name.value) && carried.contains_key(table) && !bound.contains(table)
        };
        self.unbound = self.config.rules.iter().filter(unbound).map(|rule| rule.table.value.clone()).collect();
    }

    /// Tables that patterns match have come or gone. A pass that somebody waits for is not cut short for that, nor one that
    /// would have to begin anew.
    fn follow_tables(&mut self, now: Result<Option<Config>, String>) {
        let refused = now.as_ref().err().cloned();
        self.next_tables = None;
        match now {
            Ok(Some(_)) if self.reads.is_asked() => {}
            Ok(Some(now)) if self.reads.would_begin_anew() => self.next_tables = Some(now),
            Ok(Some(now)) => self.go_on_with(now),
            Err(why) if self.tables_refused.as_ref() != Some(&why) => {
                tracing::error!("other tables match, but everything stays as it was\n\n{why}");
            }
            Ok(None) | Err(_) => {}
        }
        self.tables_refused = refused;
    }

    /// The next session follows these tables.
    pub(super) fn go_on_with(&mut self, now: Config) {
        let name = |rule: &Rule| rule.name.value.clone();
        let before: BTreeSet<String> = self.config.rules.iter().map(name).collect();
        let after: BTreeSet<String> = now.rules.iter().map(name).collect();
        if self.desk.tables_changed(&self.config, now) {
            let come: Vec<&String> = after.difference(&before).take(NAMES_SHOWN).collect();
            let gone: Vec<&String> = before.difference(&after).take(NAMES_SHOWN).collect();
            tracing::info!(rules = after.len(), ?come, ?gone, "other tables match: going on with their rules");
        }
    }
}

/// The rules whose tables are not what they were.
pub(super) fn differing<'r>(
    now: &Signatures,
    before: &Signatures,
    rules: impl Iterator<Item = &'r Rule>,
) -> Vec<&'r Rule> {
    let differing: Vec<&Rule> = rules.filter(|rule| now.differs(before, &rule.table.value)).collect();
    for table in differing.iter().map(|rule| &rule.table.value).collect::<BTreeSet<_>>() {
        tracing::warn!(%table, "the catalog says something else of the table, which the stream does not carry: its rules are reconciled");
    }
    differing
}

/// The tables that the rules follow, each once.
pub(super) fn tables(config: &Config) -> Vec<TableName> {
    let tables: BTreeSet<&TableName> = config.rules.iter().map(|rule| &rule.table.value).collect();
    tables.into_iter().cloned().collect()
}
