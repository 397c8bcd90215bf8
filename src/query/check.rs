//! Whether Postgres takes the SQL of the rules file: each query is prepared, and its columns are compared with what the
//! templates use.

use std::sync::Arc;

use tokio_postgres::error::{DbError, ErrorPosition, SqlState};
use tokio_postgres::{Client, Statement};

use super::{limited, refresh, types};
use crate::catalog::{Checked, sql_identifier};
use crate::config::code::Code;
use crate::config::diagnostic::Diagnostic;
use crate::config::{Config, Query, Rule, Shape, Spanned};
use crate::error::Result;
use crate::rules::bind::names_in_keys;
use crate::rules::lookup::BoundLookup;
use crate::rules::sql::Sql;
use crate::rules::template::place;
use crate::source::query_error;
use crate::suggest::nearest;

/// Everything that is wrong with the queries of rules that fit their tables.
///
/// # Errors
/// Where the connection breaks.
pub async fn check_queries(client: &Client, config: &Config, checked: &Checked) -> Result<Vec<Diagnostic>> {
    let mut found = Vec::new();
    for (rule, bound) in config.rules.iter().zip(&checked.rules) {
        if let Some(lookup) = bound.as_ref().and_then(|bound| bound.lookup.as_deref()) {
            found.extend(check(client, rule, lookup).await?);
        }
    }
    for query in queries(config) {
        found.extend(check_refresh(client, query).await?);
    }
    Ok(found)
}

/// The queries that are refreshed, each once.
fn queries(config: &Config) -> impl Iterator<Item = &Query> {
    let mut last: Option<&Arc<Query>> = None;
    config.rules.iter().filter_map(|rule| rule.refresh.as_ref()).filter_map(move |query| {
        let known = last.is_some_and(|last| Arc::ptr_eq(last, query));
        last = Some(query);
        (!known).then_some(&**query)
    })
}

/// Its types are Postgres's to say: whatever fits where a parameter stands.
async fn check_refresh(client: &Client, query: &Query) -> Result<Vec<Diagnostic>> {
    let doing = "cannot prepare a query";
    let (name, sql) = (&query.name.value, &query.sql);
    let prepared = match client.prepare(&sql.value.statement()).await {
        Ok(prepared) => prepared,
        Err(error) => {
            let title = format!("query `{name}`: Postgres refuses `sql`");
            let refusal = error.as_db_error().map(|refusal| vec![refused(title, sql, refusal)]);
            return refusal.ok_or_else(|| query_error(doing, error));
        }
    };
    let columns = prepared.columns().len();
    if query.shape == Shape::Value && columns != 1 {
        let title = format!("query `{name}` has `shape = \"value\"`, and its result has {columns} columns");
        let found = Diagnostic::error(Code::QueryShape, title, sql.span.clone(), "must have one column");
        return Ok(vec![found.help("select one column, or write:  shape = \"row\"")]);
    }
    let alone = Query { keys: None, ..query.clone() };
    match client.prepare(&refresh::statement(&alone)).await {
        Ok(_) => {}
        Err(error) if error.as_db_error().is_some() => {
            return Ok(vec![only_reads(format!("query `{name}`: `sql` is no query that only reads"), sql)]);
        }
        Err(error) => return Err(query_error(doing, error)),
    }
    match &query.keys {
        Some(keys) => check_keys(client, query, keys).await,
        None => Ok(Vec::new()),
    }
}

async fn check(client: &Client, rule: &Rule, lookup: &BoundLookup) -> Result<Vec<Diagnostic>> {
    let doing = "cannot prepare a lookup";
    let refused_or_failed = |error: tokio_postgres::Error| match error.as_db_error() {
        Some(refusal) => {
            let title = format!("rule `{}`: Postgres refuses the lookup", rule.name.value);
            Ok(vec![refused(title, &lookup.sql, refusal)])
        }
        None => Err(query_error(doing, error)),
    };
    let types = types(lookup);
    let statement = match client.prepare_typed(&lookup.sql.value.statement(), &types).await {
        Ok(statement) => statement,
        Err(error) => return refused_or_failed(error),
    };
    let problems = columns(rule, lookup, &statement);
    if !problems.is_empty() {
        return Ok(problems);
    }
    // What does more than read cannot stand inside of another query.
    match client.prepare_typed(&limited(lookup), &types).await {
        Ok(_) => Ok(Vec::new()),
        Err(error) if error.as_db_error().is_some() => {
            let title = format!("rule `{}`: the lookup is no query that only reads", rule.name.value);
            Ok(vec![only_reads(title, &lookup.sql)])
        }
        Err(error) => Err(query_error(doing, error)),
    }
}

/// Its columns must be named after the parameters, and be comparable.
async fn check_keys(client: &Client, query: &Query, keys: &Spanned<Sql>) -> Result<Vec<Diagnostic>> {
    let doing = "cannot prepare a query";
    let name = &query.name.value;
    let refused_or_failed = |title: String, error: tokio_postgres::Error| {
        let refusal = error.as_db_error().map(|refusal| vec![refused(title, keys, refusal)]);
        refusal.ok_or_else(|| query_error(doing, error))
    };
    let prepared = match client.prepare(&keys.value.statement()).await {
        Ok(prepared) => prepared,
        Err(error) => return refused_or_failed(format!("query `{name}`: Postgres refuses `keys`"), error),
    };
    let given = || prepared.columns().iter().map(tokio_postgres::Column::name);
    let missing = query.parameters().into_iter().filter(|wanted| given().filter(|given| given == wanted).count() != 1);
    let missing: Vec<Diagnostic> = missing
        .map(|wanted| {
            let title = format!("query `{name}`: `keys` must give `{wanted}` in one column");
            let found = Diagnostic::error(Code::QueryKey, title, keys.span.clone(), "does not");
            let found = found.context(query.key.span.clone(), format!("needs `{wanted}`"));
            found.help(format!("name a column of the result so:  select … as {}", sql_identifier(wanted)))
        })
        .collect();
    if !missing.is_empty() {
        return Ok(missing);
    }
    match client.prepare(&refresh::listing(query, &keys.value)).await {
        Ok(_) => {}
        Err(error) if error.as_db_error().is_some() => {
            return Ok(vec![only_reads(format!("query `{name}`: `keys` is no query that only reads"), keys)]);
        }
        Err(error) => return Err(query_error(doing, error)),
    }
    match client.prepare(&refresh::statement(query)).await {
        Ok(_) => Ok(Vec::new()),
        Err(error) => {
            let message = error.as_db_error().map(|refusal| refusal.message().to_owned());
            let message = message.ok_or_else(|| query_error(doing, error))?;
            let title = format!("query `{name}`: a key cannot be looked for among `keys`: {message}");
            let found = Diagnostic::error(Code::QueryRefused, title, keys.span.clone(), "");
            Ok(vec![found.help("select each parameter in a type that has `=`")])
        }
    }
}

/// Postgres's own message, at its place.
fn refused(title: String, sql: &Spanned<Sql>, refusal: &DbError) -> Diagnostic {
    let at = match refusal.position() {
        Some(ErrorPosition::Original(position)) => sql.value.at_position(*position),
        _ => 0..sql.value.text().len(),
    };
    let title = format!("{title}: {}", refusal.message());
    let found = Diagnostic::error(Code::QueryRefused, title, place(&sql.span, sql.value.text(), &at), "");
    let untyped = refusal.code() == &SqlState::INDETERMINATE_DATATYPE;
    let found = if untyped { found.help("say its type where the parameter stands:  :name::int") } else { found };
    refusal.hint().into_iter().fold(found, |found, hint| found.help(format!("Postgres says: {hint}")))
}

/// What the templates use and the result does not have, or has although the row has it too.
fn columns(rule: &Rule, lookup: &BoundLookup, statement: &Statement) -> Vec<Diagnostic> {
    let name = &rule.name.value;
    let given = || statement.columns().iter().map(tokio_postgres::Column::name);
    let missing = lookup.names.iter().filter(|wanted| !given().any(|given| given == wanted.value));
    let missing = missing.map(|wanted| {
        let title = format!(
            "rule `{name}` uses `{}`, which neither {} nor the result of `lookup` has",
            wanted.value, rule.table.value
        );
        let found = Diagnostic::error(Code::Lookup, title, wanted.span.clone(), "no such column");
        match nearest(&wanted.value, given()) {
            Some(near) => found.help(format!("did you mean `{near}`?")),
            None => found.help(format!("name a column of the result so:  select … as {}", wanted.value)),
        }
    });
    let twice = lookup.names.iter().filter(|wanted| given().filter(|given| *given == wanted.value).count() > 1);
    let twice = twice.map(|wanted| {
        let title = format!("rule `{name}` looks up two columns with the name `{}`", wanted.value);
        Diagnostic::error(Code::Lookup, title, lookup.sql.span.clone(), "").help("give one of them another name")
    });
    let of_both = names_in_keys(rule).filter(|_| !rule.names_are_given);
    let of_both = of_both.filter(|name| !lookup.names.iter().any(|wanted| wanted.value == name.value));
    let of_both = of_both.filter(|name| given().any(|given| given == name.value)).map(|name| {
        let title = format!(
            "rule `{}` uses `{}`, which both the row and the result of `lookup` have",
            rule.name.value, name.value
        );
        let found = Diagnostic::error(Code::Lookup, title, name.span, "which of the two?");
        found.help("give the column of the result another name:  select … as …")
    });
    missing.chain(twice).chain(of_both).collect()
}

fn only_reads(title: String, sql: &Spanned<Sql>) -> Diagnostic {
    Diagnostic::error(Code::QueryRefused, title, sql.span.clone(), "does more than that")
        .help("write a SELECT; what it may do is what may stand in parentheses behind FROM")
}
