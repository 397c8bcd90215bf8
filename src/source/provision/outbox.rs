//! The outbox: its schema from `sql/outbox.sql`, and the tables that are followed in it.
//!
//! What makes triggers and what compares them with what should be are functions of that schema, so that a DBA with psql
//! does the same as `keepstep setup`. Here it is only said which tables they are called for.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::{Executor, Plan, Statement, identifier, leave_out, literal, with_lock_timeout};
use crate::config::TableName;
use crate::error::{Error, ErrorKind, Result};
use crate::source::{outbox, query_error};

/// What a DBA would run with psql.
const SCRIPT: &str = include_str!("../../../sql/outbox.sql");
/// The version of that file: the number that it writes into `state`.
pub const VERSION: i32 = 1;

const BY_DBA: &str = "or let the owner do it: `keepstep setup --print` shows the SQL";

/// What is to be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The schema's name.
    pub schema: String,
    /// The tables that the rules follow, each once, and what of them is stored.
    pub tables: Vec<Followed>,
    /// No half of the outbox grows beyond so many bytes; `None` is no limit.
    pub limit: Option<u64>,
}

/// A table that is followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Followed {
    /// Its name.
    pub table: TableName,
    /// The columns that are stored besides those of its replica identity; `None` is all.
    pub columns: Option<Vec<String>>,
    /// Whether it may be left out.
    pub optional: bool,
}

/// What is there.
struct Facts {
    role: String,
    in_recovery: bool,
    may_create: bool,
    /// `None` while there is no such schema.
    schema: Option<Schema>,
    tables: Vec<Table>,
}

struct Schema {
    owned: bool,
    /// `None` where the schema is somebody else's.
    version: Option<i32>,
    limit: Option<i64>,
    /// Tables that are followed and that no rule names: OID and name.
    left: Vec<(u32, String)>,
}

struct Table {
    /// As SQL.
    name: String,
    oid: Option<u32>,
    kind: Option<char>,
    unlogged: bool,
    /// It is one of another's.
    partition: bool,
    owned: bool,
    subscribed: bool,
    /// What is to be stored of it, as in [`Followed`].
    columns: Option<Vec<String>>,
    /// What is not as it should be.
    findings: Vec<String>,
}

/// What setup has to do, if nothing stands in the way.
///
/// # Errors
/// Everything that does, at least one error.
pub async fn plan_setup(client: &Client, wanted: &Wanted, executor: Executor) -> Result<Plan, Vec<Error>> {
    let mut facts = read(client, wanted).await.map_err(|error| vec![error])?;
    let Facts { tables, role, .. } = &mut facts;
    let left_out =
        leave_out(tables, |place| wanted.tables[place].optional, |table| table_obstacle(table, role, executor));
    let mut obstacles = obstacles(wanted, &facts, executor);
    if executor == Executor::Role {
        obstacles.extend(missing_privileges(wanted, &facts));
    }
    if obstacles.is_empty() { Ok(setup_plan(wanted, &facts, executor).with_remarks(left_out)) } else { Err(obstacles) }
}

/// The script without what is psql's, for this schema and this role, which may be none.
fn script(schema: &str, role: &str) -> String {
    let sql = SCRIPT.lines().filter(|line| !line.trim_start().starts_with('\\')).collect::<Vec<_>>().join("\n");
    sql.replace(":\"schema\"", &identifier(schema))
        .replace(":'schema'", &literal(schema))
        .replace(":'role'", &literal(role))
}

fn setup_plan(wanted: &Wanted, facts: &Facts, executor: Executor) -> Plan {
    let mut plan = Plan::default();
    let schema = identifier(&wanted.schema);
    let there = facts.schema.as_ref().filter(|schema| schema.version == Some(VERSION));
    // Whoever executes it owns what it makes.
    let role = if executor == Executor::Dba { facts.role.as_str() } else { "" };
    match there {
        None => plan.statements.push(Statement {
            purpose: format!("make the outbox in schema `{}`", wanted.schema),
            sql: script(&wanted.schema, role),
        }),
        Some(_) => plan.remarks.push(format!("the outbox in schema `{}` is there", wanted.schema)),
    }
    let limit = wanted.limit.map_or(0, |limit| i64::try_from(limit).unwrap_or(i64::MAX));
    if there.and_then(|schema| schema.limit) != Some(limit) {
        plan.statements.push(Statement {
            purpose: "set the limit of the outbox".to_owned(),
            sql: format!("UPDATE {schema}.state SET size_limit = {limit};"),
        });
    }
    for table in &facts.tables {
        if there.is_some() && table.findings.is_empty() {
            continue;
        }
        let columns = match &table.columns {
            None => "NULL".to_owned(),
            Some(columns) => {
                format!("ARRAY[{}]::text[]", columns.iter().map(|name| literal(name)).collect::<Vec<_>>().join(", "))
            }
        };
        plan.statements.push(Statement {
            purpose: format!("follow table {}", table.name),
            sql: format!("SELECT {schema}.follow({}, {columns});", literal(&table.name)),
        });
    }
    let left = there.iter().flat_map(|schema| &schema.left);
    plan.statements.extend(left.map(|left| forget(&wanted.schema, left)));
    with_lock_timeout(plan)
}

fn obstacles(wanted: &Wanted, facts: &Facts, executor: Executor) -> Vec<Error> {
    let mut found = Vec::new();
    if facts.in_recovery {
        found.push(
            denied("this server is a standby, where no triggers can be made")
                .hint("let the URL name the primary, or add `target_session_attrs=primary` and list every host"),
        );
    }
    if facts.schema.as_ref().is_some_and(|schema| schema.version.is_none()) {
        let message = format!("schema `{}` is there and holds no outbox", wanted.schema);
        found.push(denied(message).hint("choose another `slot` in [postgres]: the outbox's schema is called so"));
    }
    found.extend(facts.tables.iter().filter_map(|table| table_obstacle(table, &facts.role, executor)));
    found
}

/// What stands in the way of following a table.
fn table_obstacle(table: &Table, role: &str, executor: Executor) -> Option<Error> {
    let Table { name, .. } = table;
    let error = match table.kind {
        None => config(format!("table {name} does not exist")),
        Some('r' | 'p') if table.partition => {
            config(format!("table {name} is a partition, whose changes come as those of its partitioned table"))
                .hint("let the rule follow that one: `when` can leave out the rows of other partitions")
        }
        Some('r' | 'p') if table.unlogged => {
            config(format!("table {name} is unlogged: a crash empties it, and no trigger tells of that"))
                .hint(format!("ALTER TABLE {name} SET LOGGED;"))
        }
        Some('r' | 'p') if table.subscribed => {
            config(format!("table {name} is filled by a subscription, whose changes fire no statement triggers"))
                .hint("run keepstep at the server that publishes it, or follow this one by logical replication")
        }
        Some('r' | 'p') if executor == Executor::Role && !table.owned && !table.findings.is_empty() => {
            denied(format!("role `{role}` does not own table {name}, and only its owner may add triggers")).hint(BY_DBA)
        }
        Some('r' | 'p') => return None,
        Some(_) => config(format!("{name} is no table: only tables have changes to follow")),
    };
    Some(error)
}

fn missing_privileges(wanted: &Wanted, facts: &Facts) -> Vec<Error> {
    let role = &facts.role;
    let mut found = Vec::new();
    match &facts.schema {
        None if !facts.may_create => found.push(
            denied(format!("role `{role}` may not make a schema in this database"))
                .hint(format!("GRANT CREATE ON DATABASE … TO {};", identifier(role)))
                .hint(BY_DBA),
        ),
        Some(schema) if !schema.owned => {
            found.push(denied(format!("role `{role}` does not own schema `{}`", wanted.schema)).hint(BY_DBA));
        }
        _ => {}
    }
    found
}

fn denied(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::PostgresDenied, message)
}

fn config(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Config, message)
}

fn failed(error: tokio_postgres::Error) -> Error {
    query_error("cannot read the catalog", error)
}

async fn read(client: &Client, wanted: &Wanted) -> Result<Facts> {
    let sql = "select current_user::text, pg_is_in_recovery(), has_database_privilege(current_database(), 'create')";
    let row = client.query_typed_one(sql, &[]).await.map_err(failed)?;
    let (role, in_recovery, may_create) = (row.get(0), row.get(1), row.get(2));
    let mut tables = tables(client, wanted).await?;
    let schema = schema(client, &wanted.schema, &tables).await?;
    for (followed, table) in wanted.tables.iter().zip(&mut tables) {
        table.columns.clone_from(&followed.columns);
        table.findings = match (&schema, table.oid) {
            (Some(Schema { version: Some(VERSION), .. }), Some(oid)) => findings(client, wanted, oid, followed).await?,
            _ => vec!["it is not followed".to_owned()],
        };
    }
    Ok(Facts { role, in_recovery, may_create, schema, tables })
}

async fn schema(client: &Client, name: &str, tables: &[Table]) -> Result<Option<Schema>> {
    let sql = "select pg_has_role(nspowner, 'usage'),
                      exists (select from pg_class where relnamespace = n.oid and relname = 'state')
               from pg_namespace n where nspname = $1::text";
    let row = client.query_typed_opt(sql, &[(&name, Type::TEXT)]).await.map_err(failed)?;
    let Some(row) = row else { return Ok(None) };
    let (owned, is_outbox): (bool, bool) = (row.get(0), row.get(1));
    if !is_outbox {
        return Ok(Some(Schema { owned, version: None, limit: None, left: Vec::new() }));
    }
    let schema = identifier(name);
    let sql = format!("select version, size_limit from {schema}.state");
    let state = client.query_typed_opt(&sql, &[]).await.map_err(failed)?;
    let followed: Vec<u32> = tables.iter().filter_map(|table| table.oid).collect();
    let sql = format!(
        "select relid, format('%I.%I', schema, name) from {schema}.tables where is_present and relid <> all ($1::oid[]) order by 2"
    );
    let left = client.query_typed(&sql, &[(&followed, Type::OID_ARRAY)]).await.map_err(failed)?;
    Ok(Some(Schema {
        owned,
        version: Some(state.as_ref().map_or(0, |state| state.get(0))),
        limit: state.as_ref().map(|state| state.get(1)),
        left: left.iter().map(|row| (row.get(0), row.get(1))).collect(),
    }))
}

async fn findings(client: &Client, wanted: &Wanted, oid: u32, followed: &Followed) -> Result<Vec<String>> {
    let sql = format!("select {}.findings($1::oid, $2::text[])", identifier(&wanted.schema));
    let rows = client.query_typed(&sql, &[(&oid, Type::OID), (&followed.columns, Type::TEXT_ARRAY)]).await;
    Ok(rows.map_err(failed)?.iter().map(|row| row.get(0)).collect())
}

/// The wanted tables in their order.
async fn tables(client: &Client, wanted: &Wanted) -> Result<Vec<Table>> {
    let sql = "
        select format('%I.%I', schema, name), c.oid, c.relkind::text, coalesce(c.relpersistence <> 'p', false),
               coalesce(c.relispartition, false), coalesce(pg_has_role(c.relowner, 'usage'), true),
               exists (select from pg_subscription_rel where srrelid = c.oid
                       or srrelid in (select relid from pg_partition_tree(c.oid)))
        from unnest($1::text[], $2::text[]) with ordinality as given(schema, name, place)
        left join pg_namespace n on n.nspname = given.schema
        left join pg_class c on c.relnamespace = n.oid and c.relname = given.name
        order by place";
    let schemas: Vec<&str> = wanted.tables.iter().map(|followed| followed.table.schema.as_str()).collect();
    let names: Vec<&str> = wanted.tables.iter().map(|followed| followed.table.name.as_str()).collect();
    let rows = client.query_typed(sql, &[(&schemas, Type::TEXT_ARRAY), (&names, Type::TEXT_ARRAY)]).await;
    let read = |row: &tokio_postgres::Row| Table {
        name: row.get(0),
        oid: row.get(1),
        kind: row.get::<_, Option<&str>>(2).and_then(|kind| kind.chars().next()),
        unlogged: row.get(3),
        partition: row.get(4),
        owned: row.get(5),
        subscribed: row.get(6),
        columns: None,
        findings: Vec::new(),
    };
    Ok(rows.map_err(failed)?.iter().map(read).collect())
}

/// What teardown has to do.
///
/// # Errors
/// [`ErrorKind::PostgresDenied`] while a daemon reads the outbox.
pub async fn plan_teardown(client: &Client, schema: &str) -> Result<Plan> {
    let mut plan = Plan::default();
    let quoted = identifier(schema);
    match self::schema(client, schema, &[]).await? {
        None => plan.remarks.push(format!("schema `{schema}` is not there")),
        Some(Schema { version: None, .. }) => plan.remarks.push(format!("schema `{schema}` holds no outbox and stays")),
        Some(Schema { left, .. }) => {
            if let Some(pid) = outbox::state(client, schema).await?.and_then(|state| state.holder) {
                let message = format!("outbox `{schema}` is being read by the session with pid {pid}");
                return Err(denied(message).hint("stop the daemon first"));
            }
            plan.statements.extend(left.into_iter().map(|left| forget(schema, &left)));
            plan.statements.push(Statement {
                purpose: format!("drop the outbox in schema `{schema}`"),
                sql: format!("DROP SCHEMA {quoted} CASCADE;"),
            });
        }
    }
    Ok(with_lock_timeout(plan))
}

fn forget(schema: &str, (oid, name): &(u32, String)) -> Statement {
    let sql = format!("SELECT {}.forget({oid});", identifier(schema));
    Statement { purpose: format!("follow table {name} no longer"), sql }
}
