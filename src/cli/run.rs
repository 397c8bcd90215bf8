//! `keepstep run`: the daemon.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;

use crate::admin;
use crate::config::Config;
use crate::session::{self, Daemon, Options};
use crate::shutdown::Shutdown;

use super::{block_on, load};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  keepstep run                      stream until SIGTERM
  keepstep run --dry-run            print the Redis commands instead; touches neither slot nor cache
  keepstep run --until-caught-up    drain what is there now and exit, for cron next to a database that should sleep")]
pub(super) struct Arguments {
    /// Print the commands of changes from now on, through a temporary slot, and write nothing
    #[arg(long, conflicts_with_all = ["until_caught_up", "adopt"])]
    dry_run: bool,
    /// End once everything that Postgres has flushed by now is in the cache
    #[arg(long)]
    until_caught_up: bool,
    /// Accept a slot and a cache that do not fit together, and begin a new epoch where the slot stands
    #[arg(long)]
    adopt: bool,
}

pub(super) fn execute(config: &Path, arguments: &Arguments) -> Result<ExitCode> {
    let config = load(config)?;
    block_on(run(config, arguments))?
}

async fn run(config: Config, arguments: &Arguments) -> Result<ExitCode> {
    let (mut daemon, orders) = Daemon::new(config);
    let shutdown = Shutdown::listen()?;
    if arguments.dry_run {
        Box::pin(session::dry_run(&mut daemon, std::io::stdout(), shutdown)).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let (desk, shared) = (Arc::clone(&daemon.desk), Arc::clone(&daemon.shared));
    let bound = admin::serve(desk, shared, Arc::clone(&daemon.metrics)).await?;
    if let Some(address) = bound {
        tracing::info!("http://{address}/status and /metrics answer");
    }
    Arc::clone(&daemon.desk).reload_on_hangup()?;
    let options = Options { until_caught_up: arguments.until_caught_up, adopt: arguments.adopt, until_done: false };
    Box::pin(session::run(&mut daemon, options, orders, shutdown)).await?;
    Ok(ExitCode::SUCCESS)
}
