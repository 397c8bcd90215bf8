//! `keepstep stats`: the keys of each rule, how well the cache is used, and how far it is behind.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;

use crate::admin::Status;
use crate::cache::inspect;
use crate::cache::stats::{self, Keys, Owner};
use crate::config::Config;

use super::status::fetch;
use super::{Output, block_on, load};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Every key under the prefix is looked at once, step by step; the memory is that of a sample. Hits and misses are those of
the whole server, whoever reads.")]
pub(super) struct Arguments {
    /// How the result looks
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Debug, Serialize)]
struct Stats {
    keys: Vec<Keys>,
    hits: u64,
    misses: u64,
    /// `None` before the first read.
    hit_rate_percent: Option<f64>,
    /// `None` where no daemon answers.
    lag_bytes: Option<u64>,
    caught_up: Option<bool>,
}

pub(super) fn execute(config: &Path, arguments: &Arguments) -> Result<ExitCode> {
    let config = load(config)?;
    let stats = block_on(collect(&config))??;
    let mut out = std::io::stdout();
    match arguments.output {
        Output::Json => writeln!(out, "{}", serde_json::to_string(&stats)?)?,
        Output::Table => out.write_all(table(&stats).as_bytes())?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn collect(config: &Config) -> Result<Stats> {
    let facts = inspect::facts(&config.redis).await?;
    let keys = stats::keys(&config.redis).await?;
    // A daemon that does not answer is no failure of this command.
    let status: Option<Status> = fetch(&config.admin).await.ok().and_then(|body| serde_json::from_str(&body).ok());
    let reads = facts.hits + facts.misses;
    Ok(Stats {
        keys,
        hits: facts.hits,
        misses: facts.misses,
        hit_rate_percent: (reads > 0).then(|| 100.0 * facts.hits as f64 / reads as f64),
        lag_bytes: status.as_ref().map(|status| status.lag_bytes),
        caught_up: status.as_ref().map(|status| status.caught_up),
    })
}

fn table(stats: &Stats) -> String {
    let mut lines = format!("{:<20}{:<24}{:>12}{:>16}  for example\n", "prefix", "rule", "keys", "bytes");
    for Keys { prefix, owner, rule, keys, bytes, samples } in &stats.keys {
        let name = rule.as_deref().unwrap_or_default();
        let rule = match owner {
            Owner::Rule => name.to_owned(),
            Owner::Removed => format!("{name} (removed)"),
            Owner::Keepstep => "(keepstep itself)".to_owned(),
            Owner::Nobody => "(no rule)".to_owned(),
        };
        lines.push_str(&format!("{prefix:<20}{rule:<24}{keys:>12}{bytes:>16}  {}\n", samples.join(", ")));
    }
    let hits = stats.hit_rate_percent.map_or_else(|| "no reads yet".to_owned(), |percent| format!("{percent:.1} %"));
    let lag = match (stats.lag_bytes, stats.caught_up) {
        (Some(_), Some(true)) => "none, caught up".to_owned(),
        (Some(lag), _) => format!("{lag} bytes"),
        (None, _) => "no daemon answers".to_owned(),
    };
    lines + &format!("\nhit rate      {hits} ({} hits, {} misses)\nlag           {lag}\n", stats.hits, stats.misses)
}
