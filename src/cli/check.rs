//! `keepstep check`: is the rules file right, for itself and, with `--connect`, for these servers?

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;

use crate::config::{Config, diagnostic};

use super::{Output, block_on, load};

mod connect;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  keepstep check                    the file alone; needs no server
  keepstep check --connect          the file against tables, publication, slot and Redis")]
pub(super) struct Arguments {
    /// Look at both servers too; changes nothing
    #[arg(long)]
    connect: bool,
    /// How the answers of the servers look
    #[arg(short, long, value_enum, default_value_t, requires = "connect")]
    output: Output,
}

pub(super) fn execute(path: &Path, arguments: &Arguments) -> Result<ExitCode> {
    let config = load(path)?;
    if arguments.connect {
        return block_on(connect::check(&config, arguments.output))?;
    }
    let mut out = std::io::stdout();
    writeln!(out, "{}: {} fine; `--connect` checks them against the servers", path.display(), count(&config))?;
    Ok(ExitCode::SUCCESS)
}

fn count(config: &Config) -> String {
    match config.rules.len() + config.open.len() {
        1 => "1 rule is".to_owned(),
        rules => format!("{rules} rules are"),
    }
}

/// Problems as people read them.
fn show(problems: &[diagnostic::Diagnostic], config: &Config) -> String {
    diagnostic::render(problems, &config.file, std::io::stderr().is_terminal())
}
