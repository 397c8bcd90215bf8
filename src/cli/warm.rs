//! `keepstep warm`: writes the key of every row.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;

use crate::session::orders::{PassRequest, Purpose};

use super::{block_on, load, pass};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
The running daemon does it; without one, a session of its own does, which takes the daemon's slot meanwhile.

Examples:
  keepstep warm                                   every rule that writes keys, but for `warm = false`
  keepstep warm --rule product --rule order       these
  keepstep warm --rule product --where \"price > 100\"   only the rows of its table that meet a condition")]
pub(super) struct Arguments {
    /// A rule; several times for several rules
    #[arg(long = "rule", value_name = "NAME")]
    rules: Vec<String>,
    /// Only rows that meet this SQL condition
    #[arg(long = "where", value_name = "SQL")]
    filter: Option<String>,
}

pub(super) fn execute(config: &Path, arguments: &Arguments) -> Result<ExitCode> {
    let config = load(config)?;
    let Arguments { rules, filter } = arguments;
    let request = PassRequest { rules: rules.clone(), purpose: Purpose::Warm, filter: filter.clone() };
    let totals = block_on(pass::carry_out(config, &request, |_| Ok(())))??;
    writeln!(std::io::stdout(), "{} rows read, and their keys written", totals.rows)?;
    Ok(ExitCode::SUCCESS)
}
