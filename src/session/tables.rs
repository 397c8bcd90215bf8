//! Binding while running: a table's shape changes, and its rules follow or pause.
//!
//! A rule that no longer fits its table does not stop the others. As far as its key can still be rendered, changes
//! delete it (I9); the rule owes a repair from then on.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use crate::admin::Shared;
use crate::catalog::{self, Catalog};
use crate::config::{Config, TableName};
use crate::decode::types::Types;
use crate::error::Result;
use crate::metrics::Metrics;
use crate::model::Relation;
use crate::plan::BoundTable;
use crate::rules::bind::{BindProblem, BoundRule, Unbound, bind};

/// What is remembered of one bind to the next.
#[derive(Debug, Default)]
pub struct Tables {
    owing: BTreeSet<String>,
}

impl Tables {
    /// The rules that deleted keys where they should have written them.
    pub fn owing(&self) -> &BTreeSet<String> {
        &self.owing
    }

    /// Binds the rules of a relation as the stream describes it. The catalog, which is ahead of the stream, adds what
    /// the stream does not say, as long as it is about the same table.
    pub async fn bind(
        &mut self,
        relation: Relation,
        client: &Client,
        config: &Config,
        metrics: &Metrics,
        shared: &Shared,
    ) -> Result<BoundTable> {
        let name = TableName { schema: relation.schema.clone(), name: relation.name.clone() };
        if !config.rules.iter().any(|rule| rule.table.value == name) {
            return Ok(BoundTable { relation, rules: Vec::new() });
        }
        let oids: Vec<u32> = relation.columns.iter().map(|column| column.type_oid).collect();
        // Read anew each time: altering a composite type or an enum sends no message of its own.
        let types = Types::load(client, &oids).await?;
        let catalog = catalog::load(client, &config.postgres.publication, std::slice::from_ref(&name)).await?;
        Ok(self.bind_with(relation, &name, &catalog, &types, config, metrics, shared))
    }

    /// Binds every table that the rules name and the catalog has, as it is now.
    pub fn bind_all(
        &mut self,
        catalog: &Catalog,
        types: &Types,
        config: &Config,
        metrics: &Metrics,
        shared: &Shared,
    ) -> Vec<BoundTable> {
        let bound = catalog
            .tables
            .iter()
            .map(|(name, facts)| self.bind_with(facts.relation.clone(), name, catalog, types, config, metrics, shared));
        bound.collect()
    }

    fn bind_with(
        &mut self,
        relation: Relation,
        name: &TableName,
        catalog: &Catalog,
        types: &Types,
        config: &Config,
        metrics: &Metrics,
        shared: &Shared,
    ) -> BoundTable {
        let facts = catalog.tables.get(name).filter(|facts| facts.relation.oid == relation.oid);
        let mut rules = Vec::new();
        for (number, rule) in (0..).zip(&config.rules).filter(|(_, rule)| rule.table.value == *name) {
            let (bound, problems) = split(bind(rule, number, &relation, facts, types, &config.redis.prefix));
            let rule_name = rule.name.value.as_str();
            let paused = problems.first().map(|problem| problem.diagnostic(rule).title);
            if let Some(why) = &paused {
                tracing::error!(rule = rule_name, table = %name, why, "paused: this rule only deletes keys until its table fits again");
                self.owing.insert(rule_name.to_owned());
            }
            metrics.rule_paused.with_label_values(&[rule_name]).set(i64::from(paused.is_some()));
            shared.update(|status| {
                if let Some(shown) = status.rules.iter_mut().find(|shown| shown.name == rule_name) {
                    shown.paused = paused;
                }
            });
            rules.extend(bound);
        }
        BoundTable { relation, rules }
    }
}

/// What can be done, and what stands in the way of the rest.
fn split(bound: Result<BoundRule, Unbound>) -> (Option<BoundRule>, Vec<BindProblem>) {
    match bound {
        Ok(bound) => (Some(bound), Vec::new()),
        Err(Unbound { problems, fallback }) => (fallback.map(|bound| *bound), problems),
    }
}
