//! Every rule against the catalog: what `check --connect` reports and what `run` refuses to start with.

use super::{Carrier, Catalog, Persistence, Publication, Published, TableFacts, TableKind, sql_identifier, sql_table};
use std::collections::BTreeSet;

use crate::config::code::Code;
use crate::config::diagnostic::{Diagnostic, Severity};
use crate::config::open::{OpenRule, pattern_of};
use crate::config::{Config, Rule, TableName, Value};
use crate::decode::types::Types;
use crate::rules::bind::{BoundRule, bind, shared_result};
use crate::rules::ownership::check_overlaps;
use crate::suggest::nearest;

/// The rules of a file, checked against the tables.
#[derive(Clone, Debug)]
pub struct Checked {
    /// Each rule of [`Config::rules`], bound to its table as it is now; `None` where that cannot be.
    pub rules: Vec<Option<BoundRule>>,
    /// Every problem, in the order of the file.
    pub diagnostics: Vec<Diagnostic>,
}

/// Binds every rule to its table and lists every problem: of tables, publication, rules, and between rules.
///
/// `types` must know the types of [`Catalog::type_oids`].
pub fn check_rules(config: &Config, catalog: &Catalog, types: &Types) -> Checked {
    let mut checked = Checked { rules: Vec::with_capacity(config.rules.len()), diagnostics: Vec::new() };
    if catalog.publication.is_none() {
        checked.diagnostics.extend(config.rules.first().map(|rule| no_publication(rule, config, catalog)));
    }
    let mut found = Vec::with_capacity(config.rules.len());
    for (rule, index) in config.rules.iter().zip(0..) {
        let (bound, diagnostics) = check_rule(rule, index, config, catalog, types);
        checked.rules.push(bound);
        found.push(diagnostics);
    }
    forgive(config, &mut found);
    checked.diagnostics.extend(found.into_iter().flatten());
    let bound: Vec<(&Rule, &BoundRule)> =
        config.rules.iter().zip(&checked.rules).filter_map(|(rule, bound)| Some((rule, bound.as_ref()?))).collect();
    checked.diagnostics.extend(check_overlaps(&bound));
    checked.diagnostics.extend(config.idle().map(no_match));
    checked.diagnostics.sort_by_key(|diagnostic| diagnostic.primary.span.start);
    checked.diagnostics = merged(checked.diagnostics);
    checked
}

/// Of a pattern's tables each has its own rule, and one that does not fit is no reason to leave the others without theirs:
/// as while running, it pauses. Unless none fits, then it is the rule.
fn forgive(config: &Config, found: &mut [Vec<Diagnostic>]) {
    let pattern = |number: usize| pattern_of(&config.rules[number].name.value);
    let is_error = |problem: &Diagnostic| problem.severity == Severity::Error;
    let stands = |problem: &Diagnostic| is_error(problem) && problem.code != Code::Unpublished;
    let fits: BTreeSet<&str> =
        (0..found.len()).filter(|number| !found[*number].iter().any(stands)).filter_map(pattern).collect();
    for (number, problems) in found.iter_mut().enumerate() {
        let Some(pattern) = pattern(number) else { continue };
        for problem in problems.iter_mut().filter(|problem| fits.contains(pattern) || !stands(problem)) {
            problem.severity = Severity::Warning;
        }
    }
}

/// What is said of one place of the file is said once, however many tables it is true of.
fn merged(diagnostics: Vec<Diagnostic>) -> Vec<Diagnostic> {
    let mut merged: Vec<(Diagnostic, usize)> = Vec::new();
    for found in diagnostics {
        let same = |(known, _): &&mut (Diagnostic, usize)| {
            let spans =
                |diagnostic: &Diagnostic| diagnostic.context.iter().map(|label| label.span.clone()).collect::<Vec<_>>();
            (known.code, known.severity, &known.primary.span) == (found.code, found.severity, &found.primary.span)
                && spans(known) == spans(&found)
        };
        match merged.iter_mut().rev().find(same) {
            Some((_, more)) => *more += 1,
            None => merged.push((found, 0)),
        }
    }
    let say = |(diagnostic, more): (Diagnostic, usize)| match more {
        0 => diagnostic,
        1 => diagnostic.help("the same is true of one more table"),
        more => diagnostic.help(format!("the same is true of {more} more tables")),
    };
    merged.into_iter().map(say).collect()
}

/// The pattern of a rule matches nothing.
fn no_match(open: &OpenRule) -> Diagnostic {
    let title =
        format!("rule `{}` follows {}, and there is no such table yet", open.name(), open.table().value.written());
    let found = Diagnostic::warning(Code::NoTable, title, open.table().span.clone(), "matches nothing");
    found.help("it matches ordinary and partitioned tables, exactly as in the catalog, but for each `*`")
}

/// One rule for itself.
fn check_rule(
    rule: &Rule,
    index: u16,
    config: &Config,
    catalog: &Catalog,
    types: &Types,
) -> (Option<BoundRule>, Vec<Diagnostic>) {
    let Some(facts) = catalog.tables.get(&rule.table.value) else {
        return (None, vec![no_table(rule, catalog)]);
    };
    if let Some(problem) = unpublishable(rule, facts) {
        return (None, vec![problem]);
    }
    let mut found: Vec<Diagnostic> = Vec::new();
    if let Some(publication) = catalog.publication {
        found.extend(unpublished(rule, facts));
        found.extend(operations(rule, publication, facts));
    }
    match bind(rule, index, &facts.relation, Some(facts), types, &config.redis.prefix) {
        Ok(bound) => {
            found.extend(old_keys_unknown(rule, &bound));
            found.extend(results_in_doubt(rule, &bound));
            (Some(bound), found)
        }
        Err(unbound) => {
            found.extend(unbound.problems.iter().map(|problem| problem.diagnostic(rule)));
            (None, found)
        }
    }
}

/// `on` without `"delete"` lets a key have columns that Postgres does not send of the old row. An UPDATE that changes one
/// of them then leaves the old key behind.
fn old_keys_unknown(rule: &Rule, bound: &BoundRule) -> Option<Diagnostic> {
    let written = rule.write.iter().map(|write| &write.key).zip(bound.write.iter().map(|write| &write.key));
    let members = rule.write.iter().filter_map(|write| match &write.value {
        Value::Member { member, .. } => Some(member),
        _ => None,
    });
    let bound_members = bound.write.iter().filter_map(|write| write.member.as_ref()).map(|member| &member.text);
    let stale =
        bound.delete_templates(rule).into_iter().chain(bound.tag_templates(rule)).chain(bound.bump_templates(rule));
    let mut keys = written.chain(members.zip(bound_members)).chain(stale);
    let found = keys.find(|(_, key)| !key.in_identity).map(|(template, _)| template.span.clone());
    let mut matching = bound.match_templates(rule).into_iter().filter(|(_, matching)| !matching.in_identity());
    let found = found.or_else(|| matching.next().map(|(template, _)| template.span.clone()));
    let lookup = bound.lookup.as_ref().filter(|lookup| !lookup.in_identity).map(|lookup| lookup.sql.span.clone());
    let span = found.or(lookup).filter(|_| rule.on.update)?;
    let title = format!("an UPDATE that changes the key of rule `{}` leaves the old key behind", rule.name.value);
    let label = "not all of it is sent for the old row";
    Some(Diagnostic::warning(Code::OldKeyStays, title, span, label).help(format!(
        "make Postgres log the old row:  ALTER TABLE {} REPLICA IDENTITY FULL;",
        sql_table(&rule.table.value)
    )))
}

/// What a lookup gives counts as text: whether two results can share a key is for whoever knows better to say.
fn results_in_doubt(rule: &Rule, bound: &BoundRule) -> Option<Diagnostic> {
    let refresh = bound.refresh.as_ref().filter(|_| rule.lookup.is_some())?;
    let found = shared_result(&refresh.query, &refresh.key)?.diagnostic(rule);
    Some(Diagnostic { severity: Severity::Warning, ..found })
}

fn no_publication(rule: &Rule, config: &Config, catalog: &Catalog) -> Diagnostic {
    let mut tables: Vec<&TableName> = config.rules.iter().map(|rule| &rule.table.value).collect();
    tables.sort();
    tables.dedup();
    let tables: Vec<String> = tables.into_iter().map(sql_table).collect();
    if let Carrier::Outbox(schema) = &catalog.carrier {
        let title = format!("there is no outbox in schema `{schema}`");
        let label = "without it no change of this table is stored";
        return Diagnostic::error(Code::NoPublication, title, rule.table.span.clone(), label)
            .help("let keepstep make it:  keepstep setup");
    }
    let name = catalog.carrier.name();
    Diagnostic::error(
        Code::NoPublication,
        format!("publication `{name}` does not exist"),
        rule.table.span.clone(),
        "without it no change of this table is sent",
    )
    .help("let keepstep make it:  keepstep setup")
    .help(format!(
        "or make it by hand:  CREATE PUBLICATION {} FOR TABLE {} WITH (publish_via_partition_root = true);",
        sql_identifier(name),
        tables.join(", ")
    ))
}

fn no_table(rule: &Rule, catalog: &Catalog) -> Diagnostic {
    let wanted = &rule.table.value;
    let title = format!("rule `{}` names the table {wanted}, which does not exist", rule.name.value);
    let found = Diagnostic::error(Code::NoTable, title, rule.table.span.clone(), "no such table");
    // The right name in another schema is likelier than a misspelt one.
    let elsewhere = catalog.others.iter().find(|other| other.name == wanted.name).map(ToString::to_string);
    let names: Vec<String> = catalog.others.iter().map(ToString::to_string).collect();
    let near = || nearest(&wanted.to_string(), names.iter().map(String::as_str)).map(str::to_owned);
    match elsewhere.or_else(near) {
        Some(near) => found.help(format!("did you mean `{near}`?")),
        None => found.help("names are exact as in the catalog, with their schema; psql's `\\dt *.*` lists them"),
    }
}

/// What can never be published.
fn unpublishable(rule: &Rule, facts: &TableFacts) -> Option<Diagnostic> {
    let (name, table) = (&rule.name.value, &facts.name);
    let what = match (facts.kind, facts.persistence) {
        (TableKind::View, _) => "a view",
        (TableKind::MaterializedView, _) => "a materialized view",
        (TableKind::Foreign, _) => "a foreign table",
        (_, Persistence::Unlogged) => "an unlogged table",
        (_, Persistence::Temporary) => "a temporary table",
        (TableKind::Ordinary | TableKind::Partitioned, Persistence::Permanent) => return None,
    };
    let title = format!("rule `{name}` follows {table}, {what}, whose changes are not in the log");
    let help = match (facts.kind, facts.persistence) {
        (TableKind::View | TableKind::MaterializedView, _) => "name the tables that it reads from".to_owned(),
        (TableKind::Foreign, _) => "run keepstep at the server that holds the table".to_owned(),
        (_, Persistence::Unlogged) => format!("make Postgres log it:  ALTER TABLE {} SET LOGGED;", sql_table(table)),
        _ => "name a permanent table".to_owned(),
    };
    Some(Diagnostic::error(Code::Unpublishable, title, rule.table.span.clone(), what).help(help))
}

/// What is not published under the name that the rule uses.
fn unpublished(rule: &Rule, facts: &TableFacts) -> Option<Diagnostic> {
    let (name, table, publication) = (&rule.name.value, &facts.name, facts.carrier.name());
    let error =
        |title: String, label: &str| Diagnostic::error(Code::Unpublished, title, rule.table.span.clone(), label);
    let quoted = sql_identifier(publication);
    match &facts.published {
        Published::Directly => None,
        Published::Through(root) => {
            let title = format!("rule `{name}` follows the partition {table}, whose changes come as those of {root}");
            let label = format!("published through {root}");
            Some(error(title, &label).help(format!("follow the whole table:  table = \"{root}\"")))
        }
        Published::AsLeaves => {
            let title = format!("rule `{name}` follows {table}, whose changes come under the names of its partitions");
            let set = format!("ALTER PUBLICATION {quoted} SET (publish_via_partition_root = true);");
            let label = format!("publication `{publication}` does not publish through the root");
            Some(error(title, &label).help(format!("publish them under the table's own name:  {set}")))
        }
        Published::No if matches!(facts.carrier, Carrier::Outbox(_)) => {
            let title = format!("rule `{name}` follows {table}, which {} does not", facts.carrier);
            Some(error(title, "no change of it is stored").help("let keepstep add its triggers:  keepstep setup"))
        }
        Published::No => {
            let title = format!("rule `{name}` follows {table}, which publication `{publication}` does not publish");
            let add = format!("ALTER PUBLICATION {quoted} ADD TABLE {};", sql_table(table));
            let found = error(title, "no change of it is sent");
            Some(found.help(format!("publish it:  {add}")).help("or let keepstep do it:  keepstep setup"))
        }
    }
}

/// Operations that the rule obeys and the publication leaves out. TRUNCATE counts where DELETE does.
fn operations(rule: &Rule, publication: Publication, facts: &TableFacts) -> Option<Diagnostic> {
    let operations = [
        (rule.on.insert, publication.insert, "insert"),
        (rule.on.update, publication.update, "update"),
        (rule.on.delete, publication.delete, "delete"),
        (rule.on.delete, publication.truncate, "truncate"),
    ];
    let obeyed_only = |(obeyed, published, name): &(bool, bool, &'static str)| (*obeyed && !published).then_some(*name);
    let missing: Vec<&str> = operations.iter().filter_map(obeyed_only).collect();
    if missing.is_empty() {
        return None;
    }
    let publish: Vec<&str> =
        operations.iter().filter(|(obeyed, published, _)| *obeyed || *published).map(|(.., name)| *name).collect();
    let shown = missing.join(", ").to_uppercase();
    let title = format!(
        "rule `{}` follows {shown}, which publication `{}` does not publish",
        rule.name.value,
        facts.carrier.name()
    );
    let help = format!(
        "publish it:  ALTER PUBLICATION {} SET (publish = '{}');",
        sql_identifier(facts.carrier.name()),
        publish.join(", ")
    );
    Some(
        Diagnostic::error(Code::UnpublishedOperation, title, rule.table.span.clone(), format!("not sent: {shown}"))
            .help(help),
    )
}
