//! SQL of the rules file, run on connections of its own.
//!
//! A `lookup` says which keys a change makes stale where the row alone does not. Questions come once their transactions are
//! visible, so whatever is read contains the change (I10). An answer is always given: a query that
//! fails is tried again for a while, and then, as with more rows than anybody wants to delete one by one, everything that
//! the rule's templates can have made goes (I9). So it does for all that is still to be asked where the answers that are
//! given together take too long. So no query, however slow or broken, holds the stream for good, and none is skipped.
//!
//! The SQL runs inside of another query, which limits its rows and gives its columns in the form in which the log gives those
//! of the row (a cast to text would not: `true::text` is `true`, and in the log it is `t`). The session is read-only.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use postgres_protocol::types as wire;
use tokio::time::Instant;
use tokio_postgres::types::{Format, IsNull, ToSql, Type, to_sql_checked};
use tokio_postgres::{Client, Row, Statement};

use crate::backoff::Backoff;
use crate::batch::{Batch, Limits};
use crate::catalog::sql_identifier;
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Metrics;
use crate::plan::later;
use crate::rules::lookup::{BoundLookup, Question};
use crate::source::client;
use crate::source::conninfo::ConnInfo;
use crate::source::query_error;

pub mod check;
pub mod refresh;

/// No query may take longer.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Nor may a server that says nothing at all.
const ANSWER_LIMIT: Duration = Duration::from_secs(8);
/// For so long a query that fails is tried again. One that did not come right in time gets one try at a time from then on.
const PATIENCE: Duration = Duration::from_secs(10);
/// So long after the first of the questions that are answered together, none is asked any more.
const QUESTIONS_LIMIT: Duration = Duration::from_secs(30);

/// Answers questions, one after the other.
pub struct Lookups {
    postgres: ConnInfo,
    /// The names of the rules, by their numbers.
    rules: Vec<String>,
    metrics: Arc<Metrics>,
    limits: Limits,
    client: Option<Client>,
    /// What is prepared on that connection, by rule.
    prepared: HashMap<u16, (Arc<BoundLookup>, Statement)>,
    /// Rules whose last question was given up.
    failing: HashSet<u16>,
}

impl Lookups {
    /// Not connected yet. Answers of more than `limits` are shortened to sweeps.
    pub fn new(postgres: ConnInfo, rules: Vec<String>, metrics: Arc<Metrics>, limits: Limits) -> Self {
        let (prepared, failing) = (HashMap::new(), HashSet::new());
        Lookups { postgres, rules, metrics, limits, client: None, prepared, failing }
    }

    /// What follows from all of these.
    pub async fn answer(&mut self, questions: &[Question]) -> Batch {
        self.answer_until(Instant::now() + QUESTIONS_LIMIT, questions).await
    }

    async fn answer_until(&mut self, limit: Instant, questions: &[Question]) -> Batch {
        let mut batch = Batch::new(self.limits, self.rules.len());
        let mut swept: HashSet<u16> = HashSet::new();
        for ask in questions.iter() {
            if swept.contains(&ask.lookup.rule) {
                continue;
            }
            // What does not fit, or comes too late, is as good as not known.
            let rows = if batch.is_large() || Instant::now() >= limit { None } else { self.rows(ask).await };
            let outcome = match rows {
                Some(rows) => {
                    for row in &rows {
                        let found: Vec<Option<&str>> = (0..row.len()).map(|at| row.get(at)).collect();
                        later::looked_up(ask, &found, &mut batch);
                    }
                    "answered"
                }
                None => {
                    swept.insert(ask.lookup.rule);
                    later::everything_looked_up(&ask.lookup, &mut batch);
                    "swept"
                }
            };
            self.count(ask.lookup.rule, outcome);
        }
        batch
    }

    fn count(&self, rule: u16, outcome: &str) {
        self.metrics.lookups_total.with_label_values(&[self.rules[usize::from(rule)].as_str(), outcome]).inc();
    }

    /// The rows of the answer; `None` if there are too many, or none could be had.
    async fn rows(&mut self, ask: &Question) -> Option<Vec<Row>> {
        let rule = ask.lookup.rule;
        let give_up = Instant::now() + PATIENCE;
        let mut backoff = Backoff::default();
        loop {
            let answered = tokio::time::timeout(ANSWER_LIMIT, self.ask(ask)).await.unwrap_or_else(|_| Err(silent()));
            let error = match answered {
                Ok(rows) => {
                    self.failing.remove(&rule);
                    return Some(rows).filter(|rows| rows.len() <= ask.lookup.rows_max);
                }
                Err(error) => error,
            };
            self.count(rule, "failed");
            // The statement may be for tables that have changed, and the connection lead nowhere.
            self.prepared.remove(&rule);
            self.client.take_if(|_| error.kind() == ErrorKind::PostgresAway);
            let name = self.rules[usize::from(rule)].as_str();
            let wait = backoff.next_wait();
            if self.failing.contains(&rule) || Instant::now() + wait > give_up {
                tracing::error!(rule = name, %error, "the lookup fails: everything that its keys can be is deleted");
                self.failing.insert(rule);
                return None;
            }
            tracing::warn!(rule = name, %error, next_try_in = ?wait, "the lookup fails");
            tokio::time::sleep(wait).await;
        }
    }

    async fn ask(&mut self, ask: &Question) -> Result<Vec<Row>> {
        const DOING: &str = "cannot look up";
        self.client.take_if(|client| client.is_closed());
        let client = match &self.client {
            Some(client) => client,
            None => {
                self.prepared.clear();
                self.client.insert(connect(&self.postgres, STATEMENT_TIMEOUT).await?)
            }
        };
        let lookup = &ask.lookup;
        let prepared = self.prepared.get(&lookup.rule).filter(|(of, _)| Arc::ptr_eq(of, lookup));
        let statement = match prepared {
            Some((_, statement)) => statement.clone(),
            None => {
                let statement = client.prepare_typed(&limited(lookup), &types(lookup)).await;
                let statement = statement.map_err(|error| query_error(DOING, error))?;
                self.prepared.insert(lookup.rule, (Arc::clone(lookup), statement.clone()));
                statement
            }
        };
        let parameters: Vec<TextForm<'_>> = ask.parameters().map(TextForm).collect();
        let parameters: Vec<&(dyn ToSql + Sync)> = parameters.iter().map(|text| text as &(dyn ToSql + Sync)).collect();
        client.query(&statement, &parameters).await.map_err(|error| query_error(DOING, error))
    }
}

/// A session that only reads.
async fn connect(postgres: &ConnInfo, statement_timeout: Duration) -> Result<Client> {
    let client = client::connect(postgres, statement_timeout).await?;
    let read_only = client.batch_execute("SET default_transaction_read_only = on").await;
    read_only.map_err(|error| query_error("cannot set up the session", error))?;
    Ok(client)
}

fn silent() -> Error {
    Error::new(ErrorKind::PostgresAway, format!("Postgres did not answer a lookup within {ANSWER_LIMIT:?}"))
}

/// The types of the parameters: those of the columns that they are.
fn types(lookup: &BoundLookup) -> Vec<Type> {
    let known = |oid| Type::from_oid(oid).unwrap_or_else(|| other_type(oid));
    lookup.parameters.iter().map(|(_, oid)| known(*oid)).collect()
}

/// Only the OID of a type is sent.
fn other_type(oid: u32) -> Type {
    Type::new(String::new(), oid, tokio_postgres::types::Kind::Simple, String::new())
}

/// The columns that the templates use, in text form, of one row more than may be.
fn limited(lookup: &BoundLookup) -> String {
    let column = |name: &str| {
        let column = format!("looked_up.{}", sql_identifier(name));
        format!("case when {column} is null then null else pg_catalog.format('%s', {column}) end")
    };
    let columns: Vec<String> = lookup.names.iter().map(|name| column(&name.value)).collect();
    // The query may end in a comment.
    format!(
        "select {} from (\n{}\n) as looked_up limit {}",
        columns.join(", "),
        lookup.sql.value.statement(),
        lookup.rows_max + 1
    )
}

/// A value as the log gives it, for a parameter of any type.
#[derive(Debug)]
struct TextForm<'v>(Option<&'v [u8]>);

impl ToSql for TextForm<'_> {
    fn to_sql(
        &self,
        _: &Type,
        out: &mut BytesMut,
    ) -> std::result::Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        match self.0 {
            Some(text) => {
                wire::bytea_to_sql(text, out);
                Ok(IsNull::No)
            }
            None => Ok(IsNull::Yes),
        }
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        Format::Text
    }

    to_sql_checked!();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Sweep;
    use crate::model::{Datum, Lsn};
    use crate::plan::tests::bound;

    #[tokio::test]
    async fn what_is_still_to_be_asked_when_the_time_is_over_is_swept() {
        let rule = "lookup = \"select code from public.codes where id = :id\"\ndelete = [\"list:{code}\"]";
        let lookup = bound(rule, &["id"]).rules[0].lookup.clone().expect("a lookup");
        let values = lookup.values(&[Datum::Text(b"7")]).expect("everything is known");
        let question = Question { lookup, values, generation: (1, Lsn(1)) };
        let nobody = ConnInfo::parse("postgresql://user@127.0.0.1:1/db", &|_| None).expect("a URL");
        let limits = Limits { ops: 100, bytes: 1 << 20 };
        let mut lookups = Lookups::new(nobody, vec!["row".into()], Arc::new(Metrics::new()), limits);
        let began = Instant::now();
        let answers = lookups.answer_until(began, &[question]).await;
        assert!(matches!(answers.sweeps(), [Sweep::Owned(pattern)] if pattern.matches(b"p:list:x")));
        assert!(began.elapsed() < Duration::from_secs(1), "nothing was asked");
    }
}
