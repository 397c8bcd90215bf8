//! `keepstep plan`: a row change in, the Redis commands out; needs no server.
//!
//! Without a server the types are those that JSON has: a number keeps its digits, an object or array is taken as jsonb,
//! everything else as text. So give values as `row_to_json` shows them.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::batch::{Batch, Limits, Members, Sweep};
use crate::cache::commands;
use crate::config::open::Table;
use crate::config::{Config, Rule, TableName};
use crate::decode::types::Types;
use crate::model::{Change, Column, Lsn, OldTuple, Relation, ReplicaIdentity, Timestamp, Tuple};
use crate::plan::{self, BoundTable, Noted, Scratch, Transaction};
use crate::rules::bind::bind;
use crate::rules::lookup::Question;

use super::{Output, load};

/// OIDs from Postgres's `pg_type.dat`.
const BOOL: u32 = 16;
const TEXT: u32 = 25;
const NUMERIC: u32 = 1700;
const JSONB: u32 = 3802;

#[derive(Debug, clap::Args)]
#[command(after_help = r#"Examples:
  keepstep plan '{"table": "public.products", "new": {"id": 1, "name": "Pen", "price": 1.50}}'
  keepstep plan '{"table": "public.products", "old": {"id": 1}, "new": {"id": 2, "name": "Pen"}}'
  keepstep plan '{"table": "public.products", "old": {"id": 1}}'
  keepstep plan '{"table": "public.products", "op": "update", "new": {"id": 1, "name": "Pen"}}'
  keepstep plan '{"table": "public.products", "op": "truncate"}'

`new` alone is an INSERT, `old` alone a DELETE, both an UPDATE. An `old` that lacks columns of `new` is what a replica
identity of just these columns sends; an UPDATE without `old` did not change them. Where a rule says {_pk}, `"pk": ["id"]`
beside them says what the primary key is."#)]
pub(super) struct Arguments {
    /// The change, as JSON; `-` reads it from stdin
    change: String,
    /// How the result looks
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// The change as given. Values stay in the form they have in the text, so that 1.50 does not become 1.5.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Input<'a> {
    table: String,
    op: Option<Operation>,
    #[serde(borrow)]
    old: Option<Row<'a>>,
    #[serde(borrow)]
    new: Option<Row<'a>>,
    /// The primary key, for `{_pk}`.
    #[serde(default)]
    pk: Vec<String>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Operation {
    Insert,
    Update,
    Delete,
    Truncate,
}

/// Columns in the order given.
#[derive(Debug)]
struct Row<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Row<'a> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Columns;
        impl<'de> serde::de::Visitor<'de> for Columns {
            type Value = Row<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of columns and values")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Row<'de>, A::Error> {
                let mut columns = Vec::new();
                while let Some(column) = map.next_entry()? {
                    columns.push(column);
                }
                Ok(Row(columns))
            }
        }
        deserializer.deserialize_map(Columns)
    }
}

pub(super) fn execute(config: &Path, arguments: &Arguments) -> Result<ExitCode> {
    let config = load(config)?;
    let mut text = arguments.change.clone();
    if text == "-" {
        text.clear();
        std::io::stdin().read_to_string(&mut text).context("cannot read stdin")?;
    }
    let input: Input<'_> = serde_json::from_str(&text).context("the change is not as expected (see --help)")?;
    let planned = plan(&config, &input)?;
    let mut out = std::io::stdout().lock();
    match arguments.output {
        Output::Json => writeln!(out, "{}", serde_json::to_string(&planned.commands)?)?,
        Output::Table => planned.commands.iter().try_for_each(|command| writeln!(out, "{command}"))?,
    }
    planned.notes.iter().for_each(|note| eprintln!("note: {note}"));
    Ok(ExitCode::SUCCESS)
}

struct Planned {
    commands: Vec<String>,
    notes: Vec<String>,
}

fn plan(config: &Config, input: &Input<'_>) -> Result<Planned> {
    let op = operation(input)?;
    let table = Table { name: table_name(input)?, primary_key: input.pk.clone() };
    let config = &config.with_tables(&[table]);
    let relation = relation(config, input)?;
    let table = bind_rules(config, relation)?;
    let unlimited = || Batch::new(Limits { ops: usize::MAX, bytes: usize::MAX }, config.rules.len());
    let (mut batch, mut settled) = (unlimited(), unlimited());
    let transaction = Transaction {
        commit_lsn: Lsn(1),
        commit_time: Timestamp(0),
        ordinal: 1,
        epoch: 1,
        // What was deleted is not shown a second time.
        visible: true,
        released: false,
    };
    let (new, old) = (encode(&table.relation, input.new.as_ref()), encode(&table.relation, input.old.as_ref()));
    let columns = u16::try_from(table.relation.columns.len())?;
    let tuple = |bytes| Tuple { columns, bytes };
    let full = input.old.as_ref().is_some_and(|old| old.0.len() == table.relation.columns.len());
    let old = input.old.is_some().then(|| match full {
        true => OldTuple::Full(tuple(&old)),
        false => OldTuple::Key(tuple(&old)),
    });
    let change = match (op, old) {
        (Operation::Insert, _) => Change::Insert { new: tuple(&new) },
        (Operation::Update, old) => Change::Update { old, new: tuple(&new) },
        (Operation::Delete, Some(old)) => Change::Delete { old },
        (Operation::Delete | Operation::Truncate, _) => {
            plan::truncate(&table, transaction, &mut batch, Some(&mut settled));
            let read = read(&mut settled);
            batch.absorb(&settled);
            return Ok(Planned { commands: shown(&batch, config), notes: read });
        }
    };
    let mut notes = Vec::new();
    plan::change(&table, change, transaction, &mut Scratch::default(), &mut batch, Some(&mut settled), &mut notes);
    let read = read(&mut settled);
    batch.absorb(&settled);
    let asked =
        settled.take_questions().into_iter().map(|ask| asked(&config.rules[usize::from(ask.lookup.rule)], &ask));
    let asked: Vec<String> = asked.collect();
    let notes = notes.into_iter().map(|note| {
        let rule = &config.rules[usize::from(note.rule)].name.value;
        match note.what {
            Noted::Keyless => format!("rule `{rule}`: a column of the key is NULL, so the row has no key"),
            Noted::Unrendered(why) => format!("rule `{rule}`: {why}, so the key is deleted"),
            Noted::Incomplete(_) => format!(
                "rule `{rule}`: an unchanged TOASTed value is not in the log, so the key is deleted until the row is read again"
            ),
            Noted::Swept => format!(
                "rule `{rule}`: an unchanged TOASTed value of the key is not in the log, so every key that can be it is deleted"
            ),
        }
    });
    Ok(Planned { commands: shown(&batch, config), notes: notes.chain(asked).chain(read).collect() })
}

/// What would be looked up, which only a server can do.
fn asked(rule: &Rule, ask: &Question) -> String {
    let (name, sql) = (&rule.name.value, &ask.lookup.sql.value);
    let values = ask.parameters().map(|value| value.map_or("NULL".into(), String::from_utf8_lossy));
    let given = sql.parameters().into_iter().zip(values).map(|(parameter, value)| format!("{parameter} = {value}"));
    let given = given.collect::<Vec<_>>().join(", ");
    let go = if rule.refresh.is_some() { "are written anew" } else { "go" };
    format!("rule `{name}`: more keys {go} by what Postgres answers to  {}  with {given}", sql.text())
}

/// What would be read again, which only a server can do.
fn read(settled: &mut Batch) -> Vec<String> {
    let mut stale = settled.take_stale();
    stale.sort_by(|one, other| one.key.cmp(&other.key));
    stale
        .iter()
        .map(|stale| {
            let (query, sql) = (&stale.query, &stale.query.sql.value);
            let value = |name: &str| stale.parameter(name).map(String::from_utf8_lossy).unwrap_or_default();
            let given: Vec<String> =
                sql.parameters().into_iter().map(|name| format!("{name} = {}", value(name))).collect();
            let with = if given.is_empty() { String::new() } else { format!("  with {}", given.join(", ")) };
            let key = String::from_utf8_lossy(&stale.key);
            format!(
                "query `{}`: `{key}` is written with what Postgres answers to  {}{with}",
                query.name.value,
                sql.text()
            )
        })
        .collect()
}

/// Everything that the batch becomes, in order.
fn shown(batch: &Batch, config: &Config) -> Vec<String> {
    let sweeps = commands::sweeps(batch, &config.redis).concat();
    let sweep = |sweep: &Sweep| match sweep.members() {
        None => format!("SCAN and UNLINK {sweep}"),
        Some(Members::All) => format!("SSCAN and UNLINK {sweep}"),
        Some(_) => format!("SSCAN and SREM {sweep}"),
    };
    let mut shown: Vec<String> = sweeps.iter().map(sweep).collect();
    shown.extend(commands::encode(batch, &config.redis, |_| true).iter().map(commands::show));
    shown
}

fn operation(input: &Input<'_>) -> Result<Operation> {
    Ok(match (input.op, &input.old, &input.new) {
        (Some(Operation::Truncate), None, None) => Operation::Truncate,
        (Some(Operation::Update), _, Some(_)) | (None, Some(_), Some(_)) => Operation::Update,
        (Some(Operation::Insert) | None, None, Some(_)) => Operation::Insert,
        (Some(Operation::Delete) | None, Some(_), None) => Operation::Delete,
        _ => bail!(
            "`op`, `old` and `new` do not go together: an INSERT has `new`, a DELETE `old`, an UPDATE `new` and perhaps `old`"
        ),
    })
}

fn table_name(input: &Input<'_>) -> Result<TableName> {
    let (schema, name) = input.table.split_once('.').context("`table` must be given as schema.table")?;
    Ok(TableName { schema: schema.to_owned(), name: name.to_owned() })
}

/// A table that has just the columns of the change.
fn relation(config: &Config, input: &Input<'_>) -> Result<Relation> {
    let wanted = table_name(input)?;
    if !config.rules.iter().any(|rule| rule.table.value == wanted) {
        bail!("no rule is about `{wanted}`");
    }
    let rows = [&input.new, &input.old];
    let mut columns: Vec<Column> = Vec::new();
    for (name, value) in rows.into_iter().flatten().flat_map(|row| &row.0) {
        if !columns.iter().any(|column| column.name == *name) {
            columns.push(Column { name: name.clone(), type_oid: type_of(value), type_modifier: -1, identity: true });
        }
    }
    let old: BTreeSet<&str> = input.old.iter().flat_map(|old| &old.0).map(|(name, _)| name.as_str()).collect();
    let full = old.is_empty() || old.len() == columns.len();
    for column in &mut columns {
        column.identity = full || old.contains(column.name.as_str());
    }
    let identity = if full { ReplicaIdentity::Full } else { ReplicaIdentity::Default };
    Ok(Relation { oid: 1, schema: wanted.schema, name: wanted.name, identity, columns })
}

fn type_of(value: &RawValue) -> u32 {
    match value.get().as_bytes().first() {
        Some(b't' | b'f') => BOOL,
        Some(b'-' | b'0'..=b'9') => NUMERIC,
        Some(b'{' | b'[') => JSONB,
        _ => TEXT,
    }
}

/// The row as pgoutput sends it: columns that are not given as `n`.
fn encode(relation: &Relation, row: Option<&Row<'_>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for column in &relation.columns {
        let given = row.and_then(|row| row.0.iter().find(|(name, _)| *name == column.name));
        let text = given.and_then(|(_, value)| text_form(value));
        match text {
            None => bytes.push(b'n'),
            Some(text) => {
                bytes.push(b't');
                bytes.extend_from_slice(&(text.len() as u32).to_be_bytes());
                bytes.extend_from_slice(text.as_bytes());
            }
        }
    }
    bytes
}

/// The text form that the type's output function would give; `None` for null.
fn text_form(value: &RawValue) -> Option<String> {
    match value.get() {
        "null" => None,
        "true" => Some("t".to_owned()),
        "false" => Some("f".to_owned()),
        text => Some(serde_json::from_str(text).unwrap_or_else(|_| text.to_owned())),
    }
}

/// The rules of the table; what the change lacks for one of them is an error.
fn bind_rules(config: &Config, relation: Relation) -> Result<BoundTable> {
    let types = Types::builtin();
    let mut rules = Vec::new();
    for (number, rule) in (0..).zip(&config.rules) {
        if rule.table.value.schema != relation.schema || rule.table.value.name != relation.name {
            continue;
        }
        match bind(rule, number, &relation, None, &types, &config.redis.prefix) {
            Ok(bound) => rules.push(bound),
            Err(unbound) => {
                let problems = unbound.problems.iter().map(|problem| problem.diagnostic(rule).title);
                let problems = problems.collect::<Vec<_>>().join("; ");
                bail!("the change does not carry what rule `{}` needs: {problems}", rule.name.value);
            }
        }
    }
    Ok(BoundTable { relation, rules })
}
