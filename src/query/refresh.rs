//! A query is run, and its result is what a key holds.
//!
//! One statement reads with one snapshot, and says where the log ended behind everything that this can have seen. What it
//! saw may not be flushed yet (`synchronous_commit = off`), and a crash of Postgres would take it back: so the result is
//! given only once the log is flushed up to there.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Statement};

use super::{TextForm, connect};
use crate::cache::checkpoint::Origin;
use crate::catalog::sql_identifier;
use crate::config::{Query, Shape};
use crate::error::{Error, ErrorKind, Result};
use crate::rules::refresh::Stale;
use crate::rules::sql::Sql;
use crate::source::conninfo::ConnInfo;
use crate::source::query_error;
use crate::source::slot::MESSAGE_PREFIX;

/// No query may take longer.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);
/// Nor may a server that says nothing at all.
const ANSWER_LIMIT: Duration = Duration::from_secs(40);
/// A larger result is none: as many are in memory at a time as there are connections.
const RESULT_BYTES_MAX: usize = 8 << 20;
/// How long the log is waited for before a commit of our own flushes it.
const FLUSH_PATIENCE: Duration = Duration::from_millis(20);
const FLUSH_PAUSE: Duration = Duration::from_millis(2);

const DOING: &str = "cannot refresh a key";

/// What a key is to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// This.
    Value(String),
    /// Nothing: it goes.
    Nothing,
    /// More than a key may hold: it goes.
    TooLarge,
}

/// A connection that reads one key after the other.
pub struct Refresher {
    postgres: ConnInfo,
    /// Whose stream it is that says what is stale: nobody else is read.
    origin: Origin,
    client: Option<Client>,
    /// What is prepared there.
    prepared: Vec<(Arc<Query>, Statement)>,
}

impl Refresher {
    /// Not connected yet.
    pub fn new(postgres: ConnInfo, origin: Origin) -> Self {
        Refresher { postgres, origin, client: None, prepared: Vec::new() }
    }

    /// What the key is to hold; everything that was visible when this was called is in it.
    ///
    /// # Errors
    /// Where the query fails, or Postgres is away.
    pub async fn read(&mut self, stale: &Stale) -> Result<Answer> {
        let answered = tokio::time::timeout(ANSWER_LIMIT, self.ask(stale)).await;
        let answered = answered.unwrap_or_else(|_| Err(silent()));
        if let Err(error) = &answered {
            // The statement may be for tables that have changed, and the connection lead nowhere.
            self.prepared.retain(|(query, _)| !Arc::ptr_eq(query, &stale.query));
            self.client.take_if(|_| error.kind() == ErrorKind::PostgresAway);
        }
        answered
    }

    async fn ask(&mut self, stale: &Stale) -> Result<Answer> {
        self.client.take_if(|client| client.is_closed());
        let client = match &self.client {
            Some(client) => client,
            None => {
                self.prepared.clear();
                let client = connect(&self.postgres, STATEMENT_TIMEOUT).await?;
                check_origin(&client, &self.origin).await?;
                self.client.insert(client)
            }
        };
        let prepared = self.prepared.iter().find(|(query, _)| Arc::ptr_eq(query, &stale.query));
        let statement = match prepared {
            Some((_, statement)) => statement.clone(),
            None => {
                let statement = client.prepare(&statement(&stale.query)).await.map_err(failed)?;
                self.prepared.push((Arc::clone(&stale.query), statement.clone()));
                statement
            }
        };
        let mut names = stale.query.sql.value.parameters();
        if stale.query.keys.is_some() {
            names.extend(stale.query.parameters());
        }
        let parameters: Vec<TextForm<'_>> = names.iter().map(|name| TextForm(stale.parameter(name))).collect();
        let parameters: Vec<&(dyn ToSql + Sync)> = parameters.iter().map(|text| text as &(dyn ToSql + Sync)).collect();
        let row = client.query_one(&statement, &parameters).await.map_err(failed)?;
        let text = |column| row.try_get::<_, Option<String>>(column).map_err(failed);
        if let Some(seen) = text(2)? {
            flushed(client, &seen).await?;
        }
        Ok(match (text(0)?, text(1)?) {
            (Some(value), _) => Answer::Value(value),
            (None, None) => Answer::Nothing,
            (None, Some(_)) => Answer::TooLarge,
        })
    }
}

/// The result, or nothing if it is too long; how long it is, if there is one; and the end of the log.
pub(super) fn statement(query: &Query) -> String {
    let (value, some) = match query.shape {
        Shape::Rows => {
            ("coalesce('[' || pg_catalog.string_agg(pg_catalog.row_to_json(result.*)::text, ',') || ']', '[]')", "")
        }
        Shape::Row => ("pg_catalog.row_to_json(result.*)::text", " limit 1"),
        Shape::Value => {
            ("case when result.value is null then null else pg_catalog.format('%s', result.value) end", " limit 1")
        }
    };
    let columns = if query.shape == Shape::Value { "(value)" } else { "" };
    let listed = listed(query);
    // The query may end in a comment. What `offset` stands behind is computed once.
    format!(
        "select case when pg_catalog.octet_length(found.value) <= {RESULT_BYTES_MAX} then found.value end,
            pg_catalog.octet_length(found.value)::text, pg_catalog.pg_current_wal_insert_lsn()::text
        from (select {listed} (select {value} from (\n{}\n) as result{columns}{some}) end as value offset 0) as found",
        query.sql.value.statement(),
    )
}

/// `case … then`: whether the key is among those that there should be. Its parameters stand behind those of the query.
fn listed(query: &Query) -> String {
    let Some(keys) = &query.keys else { return "case when true then".to_owned() };
    let before = query.sql.value.parameters().len();
    let column = |(number, name): (usize, &str)| format!("listed.{} = ${}", sql_identifier(name), before + number);
    let same: Vec<String> = (1..).zip(query.parameters()).map(column).collect();
    format!(
        "case when exists (select from (\n{}\n) as listed where {}) then",
        keys.value.statement(),
        same.join(" and ")
    )
}

/// All keys there should be: each parameter as the log would give it. One that is NULL names no key.
pub(crate) fn listing(query: &Query, keys: &Sql) -> String {
    let names: Vec<String> =
        query.parameters().into_iter().map(|name| format!("listed.{}", sql_identifier(name))).collect();
    let columns: Vec<String> = names.iter().map(|name| format!("pg_catalog.format('%s', {name})")).collect();
    let known: Vec<String> = names.iter().map(|name| format!("{name} is not null")).collect();
    let (columns, known) = (columns.join(", "), known.join(" and "));
    format!("select {columns} from (\n{}\n) as listed where {known}", keys.statement())
}

/// Waits until the log is flushed up to there. Whoever writes sees to that; where nobody does, a commit of our own.
async fn flushed(client: &Client, seen: &str) -> Result<()> {
    let began = Instant::now();
    loop {
        let sql = "select pg_current_wal_flush_lsn() >= $1::text::pg_lsn";
        let row = client.query_typed_one(sql, &[(&seen, Type::TEXT)]).await.map_err(failed)?;
        if row.try_get(0).map_err(failed)? {
            return Ok(());
        }
        if began.elapsed() > FLUSH_PATIENCE {
            let emit = format!("select pg_logical_emit_message(true, '{MESSAGE_PREFIX}', 'flush')");
            let commit = format!("BEGIN READ WRITE; SET LOCAL synchronous_commit = local; {emit}; COMMIT");
            client.batch_execute(&commit).await.map_err(failed)?;
        }
        tokio::time::sleep(FLUSH_PAUSE).await;
    }
}

/// A standby, or another server, does not see what the stream tells of.
async fn check_origin(client: &Client, origin: &Origin) -> Result<()> {
    let sql = "select (select system_identifier::text from pg_control_system()),
        left(pg_walfile_name(pg_current_wal_lsn()), 8)";
    let row = client.query_typed_one(sql, &[]).await.map_err(failed)?;
    let text = |column| row.try_get::<_, Option<&str>>(column).map_err(failed);
    let timeline = text(1)?.and_then(|digits| u32::from_str_radix(digits, 16).ok());
    if text(0)? != Some(&origin.system) || timeline != Some(origin.timeline) {
        let message = "a query connection leads to another server than the replication stream";
        return Err(Error::new(ErrorKind::PostgresAway, message));
    }
    Ok(())
}

fn silent() -> Error {
    Error::new(ErrorKind::PostgresAway, format!("Postgres did not answer a query within {ANSWER_LIMIT:?}"))
}

fn failed(error: tokio_postgres::Error) -> Error {
    query_error(DOING, error)
}
