//! `keepstep demo`: throw-away servers, a shop and pgbench, and keys that follow their rows.
//!
//! It is a user of keepstep like any other: it runs `keepstep setup` and `keepstep run` on a rules file, changes rows
//! with SQL, and looks from outside at what becomes of the keys.

use std::fmt;
use std::io::{IsTerminal, Write, stdout};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::block_on;
use crate::shutdown::Shutdown;

mod observe;
mod stand;

use observe::{Delays, Mirror, rows_in_step};
use stand::Stand;

#[derive(Clone, Debug, clap::Args)]
pub(super) struct Arguments {
    /// End after the show, as it does where standard output is no terminal
    #[arg(long)]
    once: bool,
    /// How long pgbench runs, in seconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// How changes are received: by logical replication, or from an outbox that triggers fill
    #[arg(long, value_enum, default_value_t = Source::Replication)]
    source: Source,
}

/// As `source` in the rules file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Source {
    Replication,
    Outbox,
}

/// What is done to the shop, what it shows, and the key that tells.
const SCENES: [(&str, &str, &str); 6] = [
    ("A new row is a new key.", "insert into products values (4, 'Go Board', 80, 2)", "product:4"),
    ("A changed row changes it.", "update products set price = 75.50 where id = 4", "product:4"),
    (
        "What an application computed of many rows goes stale, and is deleted.",
        "update products set name = 'Nocturnes, remastered' where id = 3",
        "products:category:3",
    ),
    (
        "A changed key column moves the value; the old key goes ...",
        "update products set id = 40 where id = 4",
        "product:4",
    ),
    (
        "... and the new one stands. Of a rolled-back transaction nothing is ever seen.",
        "begin; update products set price = 0 where id = 40; rollback; update products set price = 70 where id = 40",
        "product:40",
    ),
    ("A deleted row has no key.", "delete from products where id = 40", "product:40"),
];

/// What must hold at the end: each table's rows, and their keys.
const MIRRORS: [Mirror; 5] = [
    Mirror { table: "products", key: "'product:' || id", columns: "id, name, price, category_id, attributes" },
    Mirror { table: "orders", key: "'order:' || id", columns: "orders.*" },
    Mirror { table: "pgbench_accounts", key: "'account:' || aid", columns: "aid, bid, abalance" },
    Mirror { table: "pgbench_tellers", key: "'teller:' || tid", columns: "tid, bid, tbalance" },
    Mirror { table: "pgbench_branches", key: "'branch:' || bid", columns: "bid, bbalance" },
];

/// How many changes are timed while nothing else goes on.
const ALONE: usize = 300;

/// Runs the demo until its end or Ctrl-C. Everything it started ends with it.
pub(super) fn execute(arguments: &Arguments) -> Result<ExitCode> {
    block_on(run(arguments))??;
    Ok(ExitCode::SUCCESS)
}

async fn run(arguments: &Arguments) -> Result<()> {
    let mut shutdown = Shutdown::listen()?;
    tokio::select! {
        ended = show(arguments) => ended,
        () = shutdown.requested() => {
            say("\nEnded. Servers and files are gone.")
        }
    }
}

/// The whole demo.
async fn show(arguments: &Arguments) -> Result<()> {
    say("Starting Postgres and Redis, loading a small shop and pgbench's tables ...")?;
    let began = Instant::now();
    let mut stand = Stand::start(arguments.source == Source::Outbox).await?;
    say(format!("keepstep follows the changes of {} (after {:.1?}).\n", stand.names(), began.elapsed()))?;

    fill(&mut stand).await?;
    scenes(&mut stand).await?;
    let delays = load(&mut stand, arguments.seconds).await?;
    verdict(&mut stand, &delays).await?;

    if arguments.once || !stdout().is_terminal() {
        return Ok(());
    }
    say(format!("\nLook further while it runs:\n{}\nCtrl-C ends it and removes everything.", stand.invitation()))?;
    std::future::pending().await
}

/// Rows that were there before get their keys when they change next: here, all at once.
async fn fill(stand: &mut Stand) -> Result<()> {
    let statement = "update pgbench_accounts set abalance = abalance; update pgbench_tellers set tbalance = tbalance; \
                     update pgbench_branches set bbalance = bbalance; update orders set id = id; \
                     update products set id = id";
    let began = Instant::now();
    stand.sql.batch_execute(statement).await?;
    let committed = began.elapsed();
    stand.in_step(&MIRRORS).await?;
    say(format!(
        "One transaction that touches every row: Postgres took {committed:.1?}, then {:.1?} until every key was right.\n",
        began.elapsed() - committed
    ))
}

/// Rows change, and their keys follow.
async fn scenes(stand: &mut Stand) -> Result<()> {
    stand.put("products:category:3", r#"["Nocturnes"]"#).await?;
    for (what, statement, key) in SCENES {
        let before = stand.get(key).await?;
        let (after, delay) = stand.follow(statement, key).await?;
        say(format!(
            "{what}\n    {statement}\n    {key}\n        before  {}\n        after   {}\n        {delay:.1?} after the commit\n",
            shown(before.as_deref()),
            shown(after.as_deref()),
        ))?;
    }
    Ok(())
}

fn shown(value: Option<&str>) -> &str {
    value.unwrap_or("(no such key)")
}

/// Times changes, first alone, then beside pgbench.
async fn load(stand: &mut Stand, seconds: u32) -> Result<[Delays; 2]> {
    let mut alone = Delays::new("nothing else going on");
    for _ in 0..ALONE {
        alone.add(stand.probe().await?);
    }
    say(format!("pgbench: 4 clients for {seconds} s ..."))?;
    let mut pgbench = tokio::process::Command::from(stand.postgres.command("pgbench"));
    pgbench.args(["--no-vacuum", "--client=4", "--jobs=2"]).arg(format!("--time={seconds}"));
    // A group of its own: Ctrl-C ends the demo, which then ends pgbench.
    pgbench.process_group(0).kill_on_drop(true);
    let pgbench =
        pgbench.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("pgbench")?;
    let mut output = std::pin::pin!(pgbench.wait_with_output());
    let mut beside = Delays::new("beside pgbench");
    let output = loop {
        tokio::select! {
            biased;
            output = &mut output => break output?,
            delay = stand.probe() => beside.add(delay?),
        }
    };
    ensure!(output.status.success(), "pgbench failed: {}", String::from_utf8_lossy(&output.stderr));
    let report = String::from_utf8_lossy(&output.stdout);
    let told = |line: &&str| line.starts_with("number of transactions actually") || line.starts_with("tps");
    say(report.lines().filter(told).map(|line| format!("    {line}\n")).collect::<String>())?;
    Ok([alone, beside])
}

/// The keys are compared with the rows, one by one.
async fn verdict(stand: &mut Stand, delays: &[Delays]) -> Result<()> {
    stand.in_step(&MIRRORS).await?;
    say(format!("{:<24}{:>10}{:>24}", "table", "rows", "equal to row_to_json"))?;
    let mut owned = 0;
    for mirror in &MIRRORS {
        let (rows, equal) = rows_in_step(&stand.sql, &mut stand.cache, mirror).await?;
        say(format!("{:<24}{rows:>10}{equal:>24}", mirror.table))?;
        owned += equal;
    }
    say(format!("other keys under `demo:`{:>10}\n", stand.keys().await?.saturating_sub(owned)))?;
    say(format!("{:<24}{:>10}{:>12}{:>12}", "commit to visible key", "changes", "p50", "p99"))?;
    for delays in delays {
        say(delays)?;
    }
    Ok(())
}

/// A duration in milliseconds, as the tables show it.
fn milliseconds(duration: Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f64() * 1000.0)
}

fn say(what: impl fmt::Display) -> Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "{what}")?;
    Ok(out.flush()?)
}
