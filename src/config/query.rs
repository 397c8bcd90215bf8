//! `[query.NAME]`: a key that is made from rows of several tables, and which of their rows make it stale.
//!
//! How that is declared and what it means stand apart. A [`Dependency`] says of one table how its rows come to the parameters
//! of the key; each becomes a rule named `NAME.1`, `NAME.2` and so on after its place, which deletes the key, or has it
//! refreshed by the [`Query`] that all of them share.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use super::code::Code;
use super::fields::Table;
use super::mistake::Mistake;
use super::open::ANY;
use super::quantity;
use super::rule::{ROWS_MAX, check_vars, fingerprint, refuse, sql, table_name};
use super::section::{Section, template};
use super::{Operations, Query, Redelete, Rule, Settled, Shape, Spanned, TableName};
use crate::rules::sql::Sql;
use crate::rules::template::{Template, place};

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
    let mode = section.choice("mode");
    let rows_max = section.count("max_keys").and_then(|count| usize::try_from(count).ok()).unwrap_or(ROWS_MAX);
    let refreshed = refreshed(&mut section, name, key.as_ref());
    match mode.as_ref().map(|mode| mode.value) {
        Some("delete") => refuse(&mut section, OF_REFRESH, "`mode = \"delete\"`"),
        Some(_) if section.given("sql").is_none() => needs_sql(&mut section),
        _ => {}
    }
    let dependencies = section.subsections("on", Table::On, |on| dependency(on, key.as_ref()));
    section.finish();
    let (Some(key), Some(mode)) = (key, mode) else { return Vec::new() };
    let refresh = refreshed.filter(|_| mode.value == "refresh").map(Arc::new);
    let made = Made { key: &key, query: name, rows_max, refresh };
    (1..).zip(dependencies).map(|(place, dependency)| dependency.rule(&made, place)).collect()
}

/// Fields that say how a key is written.
const OF_REFRESH: &[&str] = &["sql", "shape", "keys", "every", "min_interval", "ttl", "jitter"];

/// What is written; `None` if that is not said, or something of it is missing or wrong.
fn refreshed(section: &mut Section<'_, '_>, name: &Spanned<String>, key: Option<&Spanned<Template>>) -> Option<Query> {
    let sql = section.parsed("sql", self::sql);
    let shape = section.choice("shape").map(|shape| match shape.value {
        "rows" => Shape::Rows,
        "row" => Shape::Row,
        _ => Shape::Value,
    });
    let keys = section.parsed("keys", self::sql);
    let every = section.duration("every");
    let min_interval = section.duration("min_interval").unwrap_or(Duration::ZERO);
    let ttl = section.duration("ttl");
    let jitter = section.parsed("jitter", quantity::share).map_or(0.0, |jitter| jitter.value);
    let (key, sql) = (key?.clone(), sql?);
    let (name, ttl) = (name.clone(), ttl.map(|ttl| (ttl, jitter)));
    let query = Query { name, key, sql, shape: shape?, keys, every, ttl, min_interval };
    check_key(section, &query);
    check_listing(section, &query);
    Some(query)
}

/// All keys there should be follow from the tables alone.
fn check_listing(section: &mut Section<'_, '_>, query: &Query) {
    let needs_none = query.key.value.placeholders().next().is_none();
    match &query.keys {
        Some(_) if needs_none => refuse(section, &["keys"], "a key without parameters"),
        Some(keys) => {
            if let Some(used) = keys.value.uses().first() {
                let span = place(&keys.span, keys.value.text(), &used.range);
                let problem =
                    section.error(Code::QueryKey, "`keys` has no parameters", span, "nothing gives it a value");
                section.report(problem.help("select every key there should be"));
            }
        }
        None => {
            let span = section.given("every").filter(|_| !needs_none && section.given("keys").is_none());
            if let Some(span) = span {
                let problem = section.error(Code::MissingPartner, "`every` needs `keys`", span, "which keys?");
                let problem = problem.context(query.key.span.clone(), "has parameters");
                section.report(problem.help("say which keys there are:  keys = \"select id as … from …\""));
            }
        }
    }
    let Some((every, (ttl, jitter))) = query.every.zip(query.ttl) else { return };
    let Some(span) = section.given("every").filter(|_| every >= ttl.mul_f64(1.0 - jitter)) else { return };
    let problem = section.error(Code::OutOfRange, "keys go before `every` writes them again", span, "");
    section.report(problem.help("let them live longer: twice as long as `every`, say"));
}

fn needs_sql(section: &mut Section<'_, '_>) {
    let Some(span) = section.given("mode") else { return };
    let problem = section.error(Code::MissingPartner, "`mode = \"refresh\"` needs `sql`", span, "nothing to run");
    let problem = problem.help("add:  sql = \"select … where category_id = :category_id\", shape = \"rows\"");
    let problem = problem.help("or have the key deleted:  mode = \"delete\"");
    section.reader.report_missing(section.header.start, problem);
}

/// The key must say which result it holds: all that the SQL depends on, each value told apart.
fn check_key(section: &mut Section<'_, '_>, query: &Query) {
    let (key, sql) = (&query.key, &query.sql);
    for name in sql.value.parameters() {
        let of_key = || key.value.placeholders().filter(|placeholder| placeholder.name == name);
        if of_key().next().is_none() {
            let used = sql.value.uses().iter().find(|used| used.name == name);
            let span = used.map_or(sql.span.clone(), |used| place(&sql.span, sql.value.text(), &used.range));
            let title = format!("the result depends on `{name}`, which the key has not");
            let problem = section.error(Code::QueryKey, title, span, "no placeholder of `key`");
            section.report(problem.context(key.span.clone(), "").help(format!("write {{{name}}} in `key`")));
            continue;
        }
        let tells = |filters: &[crate::rules::filter::Filter]| filters.iter().all(|filter| filter.is_injective());
        if of_key().any(|placeholder| placeholder.default.is_none() && tells(&placeholder.filters)) {
            continue;
        }
        let Some(placeholder) = of_key().next() else { continue };
        let span = place(&key.span, key.value.text(), &placeholder.range);
        let title = format!("two results with another `{name}` can have the same key");
        let problem = section.error(Code::QueryKey, title, span, "does not tell every two values apart");
        let problem = problem.help(format!("write {{{name}}} alone, or with `urlencode`"));
        section.report(problem.help("or have `params` give it in the form that the key needs"));
    }
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

/// What the rules of a query have in common.
struct Made<'a> {
    key: &'a Spanned<Template>,
    query: &'a Spanned<String>,
    rows_max: usize,
    refresh: Option<Arc<Query>>,
}

impl Dependency {
    fn rule(self, made: &Made<'_>, place: usize) -> Rule {
        let mut rule = Rule {
            name: Spanned { value: format!("{}.{place}", made.query.value), span: made.query.span.clone() },
            table: self.table,
            on: Operations::ALL,
            on_given: false,
            vars: self.params,
            names_are_given: true,
            when: None,
            write: None,
            delete: vec![made.key.clone()],
            redelete: if made.refresh.is_none() { Redelete::Settled } else { Redelete::Off },
            settled: Settled::default(),
            lookup: self.lookup,
            rows_max: made.rows_max,
            refresh: made.refresh.clone(),
            lists: place == 1 && made.refresh.as_ref().is_some_and(|query| query.listing().is_some()),
            changed: self.changed,
            fingerprint: String::new(),
        };
        rule.fingerprint = fingerprint(&rule);
        rule
    }
}
