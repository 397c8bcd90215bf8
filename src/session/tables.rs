//! Binding while running: a table's shape changes, and its rules follow or pause.
//!
//! A rule that no longer fits its table does not stop the others. As far as its key can still be rendered, changes
//! delete it (I9); the rule owes a repair from then on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::Client;

use crate::admin::Shared;
use crate::cache::checkpoint::Debt;
use crate::catalog::{self, Carrier, Catalog};
use crate::config::{Config, Operations, TableName};
use crate::decode::types::Types;
use crate::error::Result;
use crate::metrics::Metrics;
use crate::model::Relation;
use crate::plan::BoundTable;
use crate::rules::bind::{BindProblem, BoundRule, Unbound, bind};

/// How often the catalog is looked at until it shows the shape that the stream describes, and how long apart.
const LOOKS_MAX: u32 = 10;
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Binds, and tells metrics and `/status` what became of each rule.
pub struct Tables {
    config: Arc<Config>,
    metrics: Arc<Metrics>,
    shared: Arc<Shared>,
    owing: BTreeMap<String, Debt>,
    paused: BTreeMap<String, Paused>,
}

/// Why a rule is paused.
#[derive(Debug, Default)]
struct Paused {
    /// It does not fit the shape that the stream describes.
    misfit: Option<String>,
    /// The publication does not carry what it needs.
    uncarried: Option<String>,
}

impl Tables {
    /// Nothing is owed yet.
    pub fn new(config: Arc<Config>, metrics: Arc<Metrics>, shared: Arc<Shared>) -> Self {
        Tables { config, metrics, shared, owing: BTreeMap::new(), paused: BTreeMap::new() }
    }

    /// What rules have come to owe since the last call, because they did not fit their table.
    pub fn take_owing(&mut self) -> BTreeMap<String, Debt> {
        std::mem::take(&mut self.owing)
    }

    /// What the publication carries now. A rule that needs more is paused: its changes do not arrive.
    pub fn carried(&mut self, carried: &BTreeMap<TableName, Operations>) {
        let config = Arc::clone(&self.config);
        for rule in &config.rules {
            let carrier = Carrier::of(&config.postgres);
            let uncarried = match (carried.get(&rule.table.value), &carrier) {
                (None, Carrier::Publication(_)) => {
                    Some(format!("{carrier} does not carry its table; `keepstep setup` sees to it, or says why not"))
                }
                (None, Carrier::Outbox(_)) => Some(format!(
                    "{carrier} does not follow its table with all triggers; `keepstep setup` sees to that, or says why not"
                )),
                (Some(carried), _) if !rule.on.is_within(*carried) => {
                    Some(format!("{carrier} leaves out operations that it follows"))
                }
                (Some(_), _) => None,
            };
            let name = &rule.name.value;
            let paused = self.paused.entry(name.clone()).or_default();
            if paused.uncarried != uncarried {
                match &uncarried {
                    Some(why) => tracing::error!(rule = name, table = %rule.table.value, why, "paused"),
                    None => tracing::info!(rule = name, table = %rule.table.value, "its changes arrive again"),
                }
                paused.uncarried = uncarried;
                self.show(name);
            }
        }
    }

    /// Binds every table that the rules name and the catalog has, as it is now.
    pub fn bind_all(&mut self, catalog: &Catalog, types: &Types) -> Vec<BoundTable> {
        let relations = catalog.tables.values().map(|facts| facts.relation.clone());
        relations.map(|relation| self.bind_with(relation, catalog, types)).collect()
    }

    /// Binds the rules of a relation as the stream describes it. The catalog adds what the stream does not say, as long
    /// as it describes the same table in the same shape.
    pub async fn bind(&mut self, relation: Relation, client: &Client) -> Result<BoundTable> {
        let name = TableName::from(&relation);
        if !self.config.rules.iter().any(|rule| rule.table.value == name) {
            return Ok(BoundTable { relation, rules: Vec::new() });
        }
        let mut catalog = self.look(client, &name).await?;
        for _ in 0..LOOKS_MAX {
            if catalog.tables.get(&name).is_some_and(|facts| facts.relation == relation) {
                break;
            }
            // Decoded before it is visible (I10), or history that the catalog has left behind.
            tokio::time::sleep(LOOK_AGAIN).await;
            catalog = self.look(client, &name).await?;
        }
        let oids: Vec<u32> = relation.columns.iter().map(|column| column.type_oid).collect();
        // Read anew each time: altering a composite type or an enum sends no message of its own.
        let types = Types::load(client, &oids).await?;
        Ok(self.bind_with(relation, &catalog, &types))
    }

    /// The table of this name as the catalog has it.
    pub async fn relation(&self, name: &TableName, client: &Client) -> Result<Option<Relation>> {
        Ok(self.look(client, name).await?.tables.remove(name).map(|facts| facts.relation))
    }

    async fn look(&self, client: &Client, name: &TableName) -> Result<Catalog> {
        catalog::load(client, &Carrier::of(&self.config.postgres), std::slice::from_ref(name)).await
    }

    fn bind_with(&mut self, relation: Relation, catalog: &Catalog, types: &Types) -> BoundTable {
        let name = TableName::from(&relation);
        let facts = catalog.tables.get(&name).filter(|facts| facts.relation == relation);
        let config = Arc::clone(&self.config);
        let mut rules = Vec::new();
        for (number, rule) in (0..).zip(&config.rules).filter(|(_, rule)| rule.table.value == name) {
            let (bound, problems) = split(bind(rule, number, &relation, facts, types, &config.redis.prefix));
            let paused = problems.first().map(|problem| problem.diagnostic(rule).title);
            if let Some(why) = &paused {
                let rule = rule.name.value.as_str();
                match bound {
                    Some(_) => {
                        tracing::error!(rule, table = %name, why, "paused: it only deletes keys until its table fits again")
                    }
                    None => {
                        tracing::error!(rule, table = %name, why, "paused: its keys are not kept right until its table fits again")
                    }
                }
            }
            // As long as keys are deleted in time, none is wrong.
            let debt = if bound.is_some() { Debt::Warm } else { Debt::Reconcile };
            self.tell(&rule.name.value, paused, debt);
            rules.extend(bound);
        }
        BoundTable { relation, rules }
    }

    /// The rule is paused, and then it owes, or it is not.
    fn tell(&mut self, rule: &str, misfit: Option<String>, debt: Debt) {
        if misfit.is_some() {
            debt.enter(rule, &mut self.owing);
        }
        self.paused.entry(rule.to_owned()).or_default().misfit = misfit;
        self.show(rule);
    }

    fn show(&self, rule: &str) {
        let paused =
            self.paused.get(rule).and_then(|paused| paused.uncarried.clone().or_else(|| paused.misfit.clone()));
        self.metrics.rule_paused.with_label_values(&[rule]).set(i64::from(paused.is_some()));
        self.shared.update(|status| {
            if let Some(shown) = status.rules.iter_mut().find(|shown| shown.name == rule) {
                shown.paused = paused;
            }
        });
    }
}

/// What can be done, and what stands in the way of the rest.
fn split(bound: Result<BoundRule, Unbound>) -> (Option<BoundRule>, Vec<BindProblem>) {
    match bound {
        Ok(bound) => (Some(bound), Vec::new()),
        Err(Unbound { problems, fallback }) => (fallback.map(|bound| *bound), problems),
    }
}
