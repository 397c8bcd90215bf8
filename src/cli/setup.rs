//! `keepstep setup` and `keepstep teardown`: what the rules need in the database, a publication and a slot or an outbox.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use tokio_postgres::Client;

use crate::catalog::{self, Carrier};
use crate::config::open::pattern_of;
use crate::config::{Config, OnFull, Outbox, Source, TableName};
use crate::decode::types::Types;
use crate::error::Error;
use crate::source::client;
use crate::source::conninfo::ConnInfo;
use crate::source::provision::{Executor, Plan, Wanted, execute, outbox, plan_setup, plan_teardown};

use super::{block_on, load, report};

/// Making a slot waits for transactions under way; only the waiting for locks is limited, by the plan itself.
const STATEMENT_TIMEOUT: Duration = Duration::ZERO;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  keepstep setup                      make what is missing, as the role of the rules file's URL
  keepstep setup --print | psql shop  have somebody with more privileges make it")]
pub(super) struct SetupArguments {
    /// Print the SQL for psql, and change nothing
    #[arg(long)]
    print: bool,
    /// Make a slot that can be failed over to a standby (Postgres 17 and later)
    #[arg(long)]
    failover: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct TeardownArguments {
    /// Print the SQL for psql, and change nothing
    #[arg(long)]
    print: bool,
}

pub(super) fn setup(config: &Path, arguments: &SetupArguments) -> Result<ExitCode> {
    let config = load(config)?;
    block_on(async {
        let client = connect(&config).await?;
        let config = catalog::with_tables(&client, &config).await?;
        let executor = if arguments.print { Executor::Dba } else { Executor::Role };
        let plan = match &config.postgres.source {
            Source::Replication => plan_setup(&client, &wanted(&config, arguments.failover), executor).await,
            Source::Outbox(settings) => {
                outbox::plan_setup(&client, &wanted_outbox(&client, &config, settings).await?, executor).await
            }
        };
        match plan {
            Ok(plan) => carry_out(&client, &plan, arguments.print).await,
            Err(errors) => Ok(report_all(errors)),
        }
    })?
}

pub(super) fn teardown(config: &Path, arguments: &TeardownArguments) -> Result<ExitCode> {
    let config = load(config)?;
    block_on(async {
        let client = connect(&config).await?;
        let plan = match &config.postgres.source {
            Source::Replication => plan_teardown(&client, &wanted(&config, false)).await?,
            Source::Outbox(_) => outbox::plan_teardown(&client, &config.postgres.slot).await?,
        };
        carry_out(&client, &plan, arguments.print).await
    })?
}

async fn connect(config: &Config) -> Result<Client> {
    let info = ConnInfo::from_config(&config.postgres)?;
    Ok(client::connect(&info, STATEMENT_TIMEOUT).await?)
}

/// What the rules follow, each table once.
fn tables(config: &Config) -> Vec<TableName> {
    let mut tables: Vec<TableName> = config.rules.iter().map(|rule| rule.table.value.clone()).collect();
    tables.sort();
    tables.dedup();
    tables
}

/// Those of them that nothing but patterns names: one that does not fit is no reason to leave the others out.
fn optional(config: &Config) -> BTreeSet<TableName> {
    let named = |table: &TableName| {
        config.rules.iter().any(|rule| rule.table.value == *table && pattern_of(&rule.name.value).is_none())
    };
    tables(config).into_iter().filter(|table| !named(table)).collect()
}

/// What the rules need of an outbox: of each table the columns that they use; all of them where a rule does not fit its table, and
/// so cannot say.
pub(super) async fn wanted_outbox(
    client: &Client,
    config: &Config,
    settings: &Outbox,
) -> Result<outbox::Wanted, Error> {
    let names = tables(config);
    // No publication has this name: so none leaves a column out.
    let catalog = catalog::load(client, &Carrier::Publication(String::new()), &names).await?;
    let types = Types::load(client, &catalog.type_oids()).await?;
    let bound = catalog::check_rules(config, &catalog, &types).rules;
    let used = |table: &TableName| {
        let columns = &catalog.tables.get(table)?.relation.columns;
        let of_table = config.rules.iter().zip(&bound).filter(|(rule, _)| rule.table.value == *table);
        let places: Option<Vec<_>> = of_table.map(|(_, bound)| Some(bound.as_ref()?.columns())).collect();
        let mut places: BTreeSet<usize> = places?.into_iter().flatten().collect();
        if places.is_empty() {
            // There may be nothing that identifies a row, and no row is of no columns.
            places.insert(0);
        }
        Some(places.into_iter().filter_map(|place| Some(columns.get(place)?.name.clone())).collect())
    };
    let optional = optional(config);
    let followed = |table: &TableName| {
        let (columns, optional) = (used(table), optional.contains(table));
        outbox::Followed { table: table.clone(), columns, optional }
    };
    let followed = names.iter().map(followed).collect();
    let limit = (settings.on_full == OnFull::Gap).then_some(config.postgres.max_retained);
    Ok(outbox::Wanted { schema: config.postgres.slot.clone(), tables: followed, limit })
}

/// What the rules need.
pub(super) fn wanted(config: &Config, failover: bool) -> Wanted {
    let (tables, optional) = (tables(config), optional(config));
    let (slot, publication) = (config.postgres.slot.clone(), config.postgres.publication.clone());
    Wanted { slot, publication, tables, optional, failover }
}

/// Prints the plan, or executes it and says so step by step.
async fn carry_out(client: &Client, plan: &Plan, print: bool) -> Result<ExitCode> {
    let mut out = std::io::stdout();
    if print {
        out.write_all(plan.script().as_bytes())?;
        return Ok(ExitCode::SUCCESS);
    }
    for remark in &plan.remarks {
        writeln!(out, "{remark}")?;
    }
    for statement in &plan.statements {
        execute(client, statement).await?;
        writeln!(out, "{}: done", statement.purpose)?;
    }
    if plan.statements.is_empty() {
        writeln!(out, "nothing to do")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Every error; the exit code is the last one's.
fn report_all(errors: Vec<Error>) -> ExitCode {
    let mut code = ExitCode::FAILURE;
    for (index, error) in errors.into_iter().enumerate() {
        if index > 0 {
            eprintln!();
        }
        code = report(&error.into());
    }
    code
}
