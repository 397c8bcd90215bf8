//! `keepstep clear`: deletes keys that rules own, after showing which.

use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use serde_json::json;

use crate::cache::clear::{self, Found, Order, Selection};
use crate::config::Config;
use crate::config::open::{OpenRule, is_meant};
use crate::error::{Error, ErrorKind};

use super::{Output, block_on, load};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  keepstep clear --removed             keys of rules that are gone, and of earlier forms of those that are not
  keepstep clear --rule product        every key of a rule
  keepstep clear --prefix shop:v1:     a whole cache that nobody reads any more

What goes is shown first, and asked for on a terminal. Only keys that a template of these rules can have made are deleted;
without --rule, --removed and --prefix they are those of every rule.")]
pub(super) struct Arguments {
    /// The keys of this rule; may be given several times
    #[arg(short, long = "rule", value_name = "RULE")]
    rules: Vec<String>,
    /// The keys that nobody keeps right any more
    #[arg(long)]
    removed: bool,
    /// Everything under a prefix that the rules file no longer names
    #[arg(short, long, conflicts_with_all = ["rules", "removed"])]
    prefix: Option<String>,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// How the result looks
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

impl Arguments {
    fn order(&self) -> Order {
        match &self.prefix {
            Some(prefix) => Order::Prefix(prefix.clone()),
            None => Order::Rules(Selection { rules: self.rules.clone(), removed: self.removed }),
        }
    }
}

pub(super) fn execute(config: &Path, arguments: &Arguments) -> Result<ExitCode> {
    let config = load(config)?;
    block_on(run(&config, arguments))?
}

async fn run(config: &Config, arguments: &Arguments) -> Result<ExitCode> {
    let clearing = clear::prepare(&config.redis, &arguments.order()).await?;
    let found = clearing.survey().await?;
    let mut out = std::io::stdout();
    if arguments.output == Output::Table {
        out.write_all(table(&found).as_bytes())?;
    }
    let keys: u64 = found.iter().map(|found| found.keys).sum();
    if !arguments.yes && !confirmed(keys, arguments.prefix.is_some())? {
        eprintln!("nothing was deleted");
        return Ok(ExitCode::FAILURE);
    }
    let deleted = clearing.carry_out().await?;
    match arguments.output {
        Output::Json => writeln!(out, "{}", json!({ "found": found, "deleted": deleted }))?,
        Output::Table => writeln!(out, "{deleted} keys deleted")?,
    }
    missed(config, &found).iter().for_each(|rule| {
        eprintln!("note: rows of `{rule}` get their keys when they change; all at once:  keepstep warm --rule {rule}");
    });
    Ok(ExitCode::SUCCESS)
}

/// Asks whoever sits at the terminal. Where nobody does, that is a refusal.
fn confirmed(keys: u64, whole_cache: bool) -> Result<bool> {
    if keys == 0 && !whole_cache {
        return Ok(true);
    }
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        let refused = Error::new(ErrorKind::Usage, "nothing was deleted: there is no terminal to ask on");
        return Err(refused.hint("add --yes to delete without being asked").into());
    }
    let more = if whole_cache { ", and what keepstep itself keeps there" } else { "" };
    eprint!("Delete {keys} keys{more}? [y/N] ");
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

/// The rules of the file that write keys and have lost some.
fn missed<'c>(config: &'c Config, found: &[Found]) -> Vec<&'c str> {
    let lost = |rule: &str| found.iter().any(|found| is_meant(&found.rule, rule) && !found.removed && found.keys > 0);
    let writing = config.rules.iter().filter(|rule| rule.write.is_some()).map(|rule| rule.name.value.as_str());
    let of_patterns = config.open.iter().filter(|rule| rule.writes()).map(OpenRule::name);
    writing.chain(of_patterns).filter(|rule| lost(rule)).collect()
}

fn table(found: &[Found]) -> String {
    let mut lines = format!("{:<20}{:<24}{:>12}  for example\n", "prefix", "rule", "keys");
    for Found { prefix, rule, removed, templates, keys, samples } in found {
        let rule = if *removed { format!("{rule} (removed)") } else { rule.clone() };
        let samples = match templates {
            0 => "what its keys look like is not known".to_owned(),
            _ => samples.join(", "),
        };
        lines.push_str(&format!("{prefix:<20}{rule:<24}{keys:>12}  {samples}\n"));
    }
    lines
}
