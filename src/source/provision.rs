//! What keepstep needs in the database, a publication and a slot: what is there, what is in the way, and the SQL for
//! the rest.
//!
//! Facts are read once; the plan made of them is pure, so that `--print` shows exactly what would be executed. What
//! setup makes it notes, a line each, in the comment of the publication; teardown drops what is noted and nothing
//! else:
//!
//! ```text
//! keepstep: publication made by setup
//! keepstep: table public.products added by setup
//! keepstep: slot keepstep made at 0/15D4F28
//! ```
//!
//! The publication comes before the slot: pgoutput looks it up as it was at each change, and a slot that is older
//! than its publication can never be decoded.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::query_error;
use super::slot::{BIRTH_NOTE, birth_note_of};
use crate::config::TableName;
use crate::error::{Error, ErrorKind, Result};

use facts::{Facts, Publication, Table};

mod facts;
mod obstacles;
pub mod outbox;
mod renewal;

pub use renewal::renew_slot;

/// How long a statement may wait for a lock while applications wait behind it.
const LOCK_TIMEOUT: &str = "5s";

/// What is to be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The slot's name.
    pub slot: String,
    /// The publication's name.
    pub publication: String,
    /// The tables that the rules follow, each once.
    pub tables: Vec<TableName>,
    /// Those of them that may be left out.
    pub optional: BTreeSet<TableName>,
    /// Whether the slot is made for failover to a standby (Postgres 17 and later).
    pub failover: bool,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// What it does, as in `make slot keepstep`.
    pub purpose: String,
    /// One or more SQL commands.
    pub sql: String,
}

/// What is to be done, and what is left alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In this order.
    pub statements: Vec<Statement>,
    /// What a person should know.
    pub remarks: Vec<String>,
}

/// Whoever executes a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Executor {
    /// The role of this connection.
    Role,
    /// Somebody with every privilege.
    Dba,
}

/// What setup has to do, if nothing stands in the way.
///
/// # Errors
/// Everything that does, at least one error.
pub async fn plan_setup(client: &Client, wanted: &Wanted, executor: Executor) -> Result<Plan, Vec<Error>> {
    let mut facts = facts::read(client, wanted).await.map_err(|error| vec![error])?;
    let Facts { tables, role, .. } = &mut facts;
    let is_optional = |place: usize| wanted.optional.contains(&wanted.tables[place]);
    let left_out =
        leave_out(tables, is_optional, |table| obstacles::of_table(table, role, executor).into_iter().next());
    let mut obstacles = obstacles::of_setup(wanted, &facts, executor);
    if executor == Executor::Role {
        obstacles.extend(obstacles::missing_privileges(wanted, &facts));
    }
    if obstacles.is_empty() { Ok(setup_plan(wanted, &facts).with_remarks(left_out)) } else { Err(obstacles) }
}

/// Takes out what may be left out and something stands in the way of. What is to be said of each.
fn leave_out<T>(
    tables: &mut Vec<T>,
    is_optional: impl Fn(usize) -> bool,
    obstacle: impl Fn(&T) -> Option<Error>,
) -> Vec<String> {
    let mut remarks = Vec::new();
    let mut place = 0..;
    tables.retain(|table| {
        let obstacle = place.next().filter(|place| is_optional(*place)).and_then(|_| obstacle(table));
        remarks.extend(obstacle.iter().map(|error| format!("left out: {error}; {}", error.hints().join(" or "))));
        obstacle.is_none()
    });
    remarks
}

/// What teardown has to do: drop what the notes name, and nothing else.
///
/// # Errors
/// [`ErrorKind::PostgresDenied`] while a daemon streams the slot.
pub async fn plan_teardown(client: &Client, wanted: &Wanted) -> Result<Plan> {
    teardown_plan(wanted, &facts::read(client, wanted).await?)
}

impl Plan {
    fn with_remarks(mut self, remarks: Vec<String>) -> Self {
        self.remarks.extend(remarks);
        self
    }

    /// The whole plan as a script for psql. No name in a remark ends its line.
    pub fn script(&self) -> String {
        let remarks = self.remarks.iter().map(|remark| format!("-- {}\n", remark.replace(['\n', '\r'], " ")));
        let steps = self.statements.iter().map(|Statement { purpose, sql }| format!("\n-- {purpose}\n{sql}\n"));
        let stop = if self.statements.is_empty() { "" } else { "\\set ON_ERROR_STOP on\n" };
        remarks.chain([stop.to_owned()]).chain(steps).collect()
    }
}

fn unpublished(facts: &Facts) -> Vec<&Table> {
    facts.tables.iter().filter(|table| !table.published).collect()
}

/// Empty where everything is there.
fn setup_plan(wanted: &Wanted, facts: &Facts) -> Plan {
    let Wanted { slot, publication, .. } = wanted;
    let mut plan = Plan::default();
    let missing = unpublished(facts);
    match &facts.publication {
        None => plan.statements.push(make_publication(publication, &missing)),
        Some(_) if !missing.is_empty() => plan.statements.push(add_tables(publication, &missing)),
        Some(_) => plan.remarks.push(format!("publication `{publication}` is there and has every table")),
    }
    match &facts.slot {
        None => plan.statements.push(make_slot(wanted)),
        Some(_) => plan.remarks.push(format!("slot `{slot}` is there")),
    }
    with_lock_timeout(plan)
}

fn with_lock_timeout(mut plan: Plan) -> Plan {
    if !plan.statements.is_empty() {
        let purpose = "limit the wait for locks, because applications would wait behind it".to_owned();
        plan.statements.insert(0, Statement { purpose, sql: format!("SET lock_timeout = '{LOCK_TIMEOUT}';") });
    }
    plan
}

const PUBLICATION_NOTE: &str = "keepstep: publication made by setup";

fn table_note(table: &str) -> String {
    format!("keepstep: table {table} added by setup")
}

fn make_publication(publication: &str, tables: &[&Table]) -> Statement {
    let name = identifier(publication);
    let list = if tables.is_empty() { String::new() } else { format!(" FOR TABLE {}", table_list(tables)) };
    Statement {
        purpose: format!("make publication `{publication}`"),
        sql: format!(
            "BEGIN;\nCREATE PUBLICATION {name}{list}\n  WITH (publish_via_partition_root = true);\n\
             COMMENT ON PUBLICATION {name} IS {};\nCOMMIT;",
            literal(PUBLICATION_NOTE)
        ),
    }
}

/// ONLY where there are children by inheritance: their rows would arrive under their own names, which no rule follows.
fn table_list(tables: &[&Table]) -> String {
    let one = |table: &&Table| format!("{}{}", if table.has_children { "ONLY " } else { "" }, table.name);
    tables.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn add_tables(publication: &str, tables: &[&Table]) -> Statement {
    let notes: Vec<String> = tables.iter().map(|table| table_note(&table.name)).collect();
    let added = notes.iter().map(|note| literal(note)).collect::<Vec<_>>().join(", ");
    let count = tables.len();
    Statement {
        purpose: format!("add {count} table{} to publication `{publication}`", if count == 1 { "" } else { "s" }),
        sql: format!(
            "BEGIN;\nALTER PUBLICATION {} ADD TABLE {};\n{}\nCOMMIT;",
            identifier(publication),
            table_list(tables),
            do_block("", &annotate(publication, &notes, &added))
        ),
    }
}

/// One transaction makes the slot and notes where: the position is the one that the function returns, so a daemon
/// that begins to stream at once cannot have moved it.
fn make_slot(wanted: &Wanted) -> Statement {
    let Wanted { slot, publication, .. } = wanted;
    let note = birth_note_of(slot);
    let make = format!("  SELECT lsn INTO born FROM {};", create_slot(wanted));
    let annotate = annotate(publication, std::slice::from_ref(&note), &format!("{} || born", literal(&note)));
    Statement {
        purpose: format!("make slot `{slot}`"),
        sql: do_block("  born pg_lsn;\n", &format!("{make}\n{annotate}")),
    }
}

fn create_slot(Wanted { slot, failover, .. }: &Wanted) -> String {
    let failover = if *failover { ", false, false, true" } else { "" };
    format!("pg_create_logical_replication_slot({}, 'pgoutput'{failover})", literal(slot))
}

/// Commands of a DO block that rewrite the publication's comment: lines that begin with one of `removed` go, `added`
/// (SQL expressions) come. Foreign lines stay.
fn annotate(publication: &str, removed: &[String], added: &str) -> String {
    let name = literal(publication);
    let stays = |prefix: &String| format!("\n      AND NOT starts_with(line, {})", literal(prefix));
    let stays: String = removed.iter().map(stays).collect();
    format!(
        "  SELECT array_agg(line ORDER BY place) INTO lines\n    \
           FROM pg_publication, unnest(string_to_array(obj_description(oid, 'pg_publication'), E'\\n'))\n      \
             WITH ORDINALITY AS old(line, place)\n    \
           WHERE pubname = {name}{stays};\n  \
         EXECUTE format('COMMENT ON PUBLICATION %I IS %L', {name},\n    \
           nullif(array_to_string(lines || ARRAY[{added}]::text[], E'\\n'), ''));"
    )
}

/// Runs plpgsql commands. No name in them can end the block: the quote is one that they do not contain.
fn do_block(variables: &str, commands: &str) -> String {
    let mut quote = "$keepstep$".to_owned();
    while commands.contains(&quote) {
        quote.insert(1, '_');
    }
    format!("DO {quote}\nDECLARE\n{variables}  lines text[];\nBEGIN\n{commands}\nEND\n{quote};")
}

fn teardown_plan(wanted: &Wanted, facts: &Facts) -> Result<Plan> {
    let Wanted { slot, publication, .. } = wanted;
    let mut plan = Plan::default();
    let comment = facts.publication.as_ref().map_or("", |publication| &publication.comment);
    let born = |line: &str| line.starts_with(&birth_note_of(slot));
    match &facts.slot {
        Some(state) if comment.lines().any(born) => {
            if let Some(pid) = state.active_pid {
                let message = format!("slot `{slot}` is being streamed by the session with pid {pid}");
                return Err(Error::new(ErrorKind::PostgresDenied, message).hint("stop the daemon first"));
            }
            let sql = format!("SELECT pg_drop_replication_slot({});", literal(slot));
            plan.statements.push(Statement { purpose: format!("drop slot `{slot}`"), sql });
        }
        Some(_) => plan.remarks.push(format!(
            "slot `{slot}` was not made by setup and stays; SELECT pg_drop_replication_slot({}); drops it",
            literal(slot)
        )),
        None => plan.remarks.push(format!("slot `{slot}` is not there")),
    }
    match &facts.publication {
        Some(state) => retire_publication(wanted, state, &mut plan),
        None => plan.remarks.push(format!("publication `{publication}` is not there")),
    }
    Ok(with_lock_timeout(plan))
}

fn retire_publication(wanted: &Wanted, state: &Publication, plan: &mut Plan) {
    let Wanted { slot, publication, .. } = wanted;
    let name = identifier(publication);
    let own = birth_note_of(slot);
    let others = state.comment.lines().any(|line| line.starts_with(BIRTH_NOTE) && !line.starts_with(&own));
    let made = state.comment.lines().any(|line| line == PUBLICATION_NOTE);
    // A note is only compared with names that the catalog gives, and never executed: whoever may write comments could
    // otherwise have the person at teardown execute anything.
    let noted = |table: &&String| state.comment.lines().any(|line| line == table_note(table));
    let added: Vec<&String> = state.names.iter().filter(noted).collect();
    let forget_slot = |plan: &mut Plan| {
        if state.comment.lines().any(|line| line.starts_with(&own)) {
            let sql = do_block("", &annotate(publication, std::slice::from_ref(&own), ""));
            plan.statements.push(Statement { purpose: format!("forget where slot `{slot}` was made"), sql });
        }
    };
    if others {
        forget_slot(plan);
        plan.remarks.push(format!("publication `{publication}` stays: other slots use it"));
    } else if made {
        let sql = format!("DROP PUBLICATION {name};");
        plan.statements.push(Statement { purpose: format!("drop publication `{publication}`"), sql });
    } else if added.is_empty() {
        forget_slot(plan);
        plan.remarks.push(format!("publication `{publication}` was not made by setup and stays"));
    } else {
        let notes: Vec<String> = added.iter().map(|table| table_note(table)).chain([own]).collect();
        let list = added.iter().map(|table| table.as_str()).collect::<Vec<_>>().join(", ");
        plan.statements.push(Statement {
            purpose: format!("take out of publication `{publication}` what setup added"),
            sql: format!(
                "BEGIN;\nALTER PUBLICATION {name} DROP TABLE {list};\n{}\nCOMMIT;",
                do_block("", &annotate(publication, &notes, ""))
            ),
        });
        plan.remarks.push(format!("publication `{publication}` was not made by setup and stays"));
    }
}

/// Executes one step.
///
/// # Errors
/// What Postgres says, by its kind; where a lock could not be had, with whoever has been at work for longest.
pub async fn execute(client: &Client, statement: &Statement) -> Result<()> {
    let Err(error) = client.batch_execute(&statement.sql).await else { return Ok(()) };
    let waited = error.code() == Some(&tokio_postgres::error::SqlState::LOCK_NOT_AVAILABLE);
    let error = query_error(&format!("cannot {}", statement.purpose), error);
    if !waited {
        return Err(error);
    }
    // Away from the transaction that failed, if the step has one of its own.
    let _ = client.batch_execute("ROLLBACK").await;
    Err(match oldest_transaction(client).await {
        Some((pid, seconds)) => {
            error.hint(format!("the session with pid {pid} has had a transaction open for {seconds} s"))
        }
        None => error.hint("try again"),
    })
}

/// Whose transaction has been open for longest: process id and seconds; `None` where that cannot be said.
pub async fn oldest_transaction(client: &Client) -> Option<(i32, i64)> {
    let sql = "select pid, (extract(epoch from now() - xact_start))::int8 from pg_stat_activity
        where backend_xid is not null and pid <> pg_backend_pid() order by xact_start limit 1";
    let row = client.query_typed_opt(sql, &[]).await.ok().flatten()?;
    Some((row.try_get(0).ok()?, row.try_get(1).ok()?))
}

/// As SQL reads it. Always in quotes: whether a word is a keyword depends on the server's version.
fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// As SQL reads it under `standard_conforming_strings`, its default.
fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
