//! Which tables there are for rules that do not name theirs.

use tokio_postgres::{Client, Row};

use crate::config::open::{ANY, OpenRule, Table, pattern_of};
use crate::config::{Config, TableName};
use crate::error::{Error, ErrorKind, Result};
use crate::source::query_error;

/// How many rules may be made of patterns: each has series in metrics, and is bound and compared with every other.
pub const RULES_MAX: usize = 2048;

/// What a rule with a pattern can be about: no partitions, whose changes are those of the whole table, and nothing that is
/// not logged. `$1` and `$2` are for LIKE. A name that holds a `*` would be a pattern in `delete_match`.
const TABLES: &str = "
select n.nspname::text as schema, c.relname::text as name,
       array(select a.attname::text
               from pg_catalog.pg_index i
              cross join lateral unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) with ordinality k(attnum, position)
               join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
              where i.indrelid = c.oid and i.indisprimary
              order by k.position) as primary_key
  from pg_catalog.pg_class c
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
 where c.relkind in ('r', 'p') and not c.relispartition and c.relpersistence = 'p'
   and n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
   and pg_catalog.strpos(n.nspname::text || c.relname::text, '*') = 0
   and exists (select from rows from (pg_catalog.unnest($1::text[]), pg_catalog.unnest($2::text[])) as wanted(schema, name)
                where n.nspname::text like wanted.schema and c.relname::text like wanted.name)
 order by n.nspname, c.relname
 limit $3";

/// The configuration with a rule for each table that its open rules are about now.
///
/// # Errors
/// [`ErrorKind::PostgresAway`] when the connection breaks, [`ErrorKind::Config`] where there are too many tables.
pub async fn with_tables(client: &Client, config: &Config) -> Result<Config> {
    Ok(with_other_tables(client, config).await?.unwrap_or_else(|| config.clone()))
}

/// The same; `None` where the tables are those that it has rules for already.
///
/// # Errors
/// As [`with_tables`].
pub async fn with_other_tables(client: &Client, config: &Config) -> Result<Option<Config>> {
    if config.open.is_empty() {
        return Ok(None);
    }
    let tables = read(client, &config.open).await.map_err(|error| query_error("cannot look for tables", error))?;
    if config.tables.as_ref() == Some(&tables) {
        return Ok(None);
    }
    let matched = config.with_tables(&tables);
    let made = matched.rules.iter().filter(|rule| pattern_of(&rule.name.value).is_some()).count();
    if tables.len() > RULES_MAX || made > RULES_MAX {
        let too_many = format!("the patterns for tables come to more than {RULES_MAX} rules");
        return Err(Error::new(ErrorKind::Config, too_many)
            .hint("let several daemons share the tables, each with patterns, a slot and a prefix of its own"));
    }
    Ok(Some(matched))
}

async fn read(client: &Client, open: &[OpenRule]) -> std::result::Result<Vec<Table>, tokio_postgres::Error> {
    let schemas: Vec<String> = open.iter().map(|rule| like(&rule.table().value.schema)).collect();
    let names: Vec<String> = open.iter().map(|rule| like(&rule.table().value.name)).collect();
    let limit = RULES_MAX as i64 + 1;
    client.query(TABLES, &[&schemas, &names, &limit]).await?.iter().map(table).collect()
}

fn table(row: &Row) -> std::result::Result<Table, tokio_postgres::Error> {
    let name = TableName { schema: row.try_get("schema")?, name: row.try_get("name")? };
    Ok(Table { name, primary_key: row.try_get("primary_key")? })
}

/// The pattern as LIKE reads it.
fn like(pattern: &str) -> String {
    let mut like = String::with_capacity(pattern.len());
    for c in pattern.chars() {
        match c {
            ANY => like.push('%'),
            '%' | '_' | '\\' => like.extend(['\\', c]),
            _ => like.push(c),
        }
    }
    like
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_star_is_a_pattern() {
        assert_eq!(like(r"tenant_*.50%\"), r"tenant\_%.50\%\\");
    }
}
