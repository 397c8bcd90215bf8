//! `[query.NAME]`: a key that is made from rows of several tables, and which of their rows make it stale.
//!
//! How that is declared and what it means stand apart. A [`Dependency`] says of one table how its rows come to the parameters
//! of the key; each becomes a rule that deletes the key, named `NAME.1`, `NAME.2` and so on after its place.

use std::collections::HashSet;

use super::code::Code;
use super::fields::Table;
use super::mistake::Mistake;
use super::open::ANY;
use super::rule::{check_vars, fingerprint, sql, table_name};
use super::section::{Section, template};
use super::{Operations, Redelete, Rule, Settled, Spanned, TableName};
use crate::rules::sql::Sql;
use crate::rules::template::Template;

/// Rows of a table make those keys stale whose parameters follow from them.
#[derive(Clone, Debug)]
struct Dependency {
    table: Spanned<TableName>,
    /// The columns of which one must have changed; `None` is any.
    changed: Option<Vec<Spanned<String>>>,
    /// Parameters that follow from the row.
    params: Vec<(Spanned<String>, Spanned<Template>)>,
    /// Parameters that have to be looked up are columns of this.
    lookup: Option<Spanned<Sql>>,
}

/// Reads a query; nothing if what it needs is missing or wrong.
pub(super) fn query(mut section: Section<'_, '_>, name: &Spanned<String>) -> Vec<Rule> {
    let key = section.parsed("key", |text| template(text, Template::parse));
    section.choice("mode");
    let dependencies = section.subsections("on", Table::On, |on| dependency(on, key.as_ref()));
    section.finish();
    let Some(key) = key else { return Vec::new() };
    (1..).zip(dependencies).map(|(place, dependency)| dependency.rule(&key, name, place)).collect()
}

fn dependency(section: &mut Section<'_, '_>, key: Option<&Spanned<Template>>) -> Option<Dependency> {
    let table = section.parsed("table", one_table);
    let params = section.pairs("params", |text| template(text, Template::parse_free));
    let lookup = section.parsed("lookup", sql);
    let changed = section.columns("changed").map(|columns| columns.value);
    if let Some(key) = key.filter(|_| section.is_sound()) {
        check_vars(section, &params, None, std::slice::from_ref(key), &Settled::default());
        if lookup.is_none() {
            check_parameters(section, key, &params);
        }
    }
    Some(Dependency { table: table?, changed, params, lookup })
}

/// A query's keys depend on tables that it names.
fn one_table(text: &str) -> Result<TableName, Mistake> {
    let table = table_name(text)?;
    match text.contains(ANY) {
        true => Err(Mistake::whole(Code::NotYet, text, "is a pattern, which a query cannot follow yet")
            .help("name each table in an `on` of its own")),
        false => Ok(table),
    }
}

/// Each parameter of the key must come from somewhere.
fn check_parameters(
    section: &mut Section<'_, '_>,
    key: &Spanned<Template>,
    params: &[(Spanned<String>, Spanned<Template>)],
) {
    let given: HashSet<&str> = params.iter().map(|(name, _)| name.value.as_str()).collect();
    let missing = key.value.placeholders().map(|part| part.name.as_str()).find(|name| !given.contains(name));
    if let Some(name) = missing {
        let title = format!("nothing says which `{name}` a row makes stale");
        let problem = section.error(Code::MissingPartner, title, section.header.clone(), "");
        let problem = problem.context(key.span.clone(), format!("needs `{name}`"));
        let problem = problem.help(format!("from the row:  params = {{ {name} = \"{{column}}\" }}"));
        section
            .report(problem.help(format!("from other tables:  lookup = \"select {name} from … where … = :column\"")));
    }
}

impl Dependency {
    fn rule(self, key: &Spanned<Template>, query: &Spanned<String>, place: usize) -> Rule {
        let mut rule = Rule {
            name: Spanned { value: format!("{}.{place}", query.value), span: query.span.clone() },
            table: self.table,
            on: Operations::ALL,
            on_given: false,
            vars: self.params,
            names_are_given: true,
            when: None,
            write: None,
            delete: vec![key.clone()],
            redelete: Redelete::Settled,
            settled: Settled::default(),
            lookup: self.lookup,
            changed: self.changed,
            fingerprint: String::new(),
        };
        rule.fingerprint = fingerprint(&rule);
        rule
    }
}
