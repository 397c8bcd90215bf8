//! `keepstep reload`: makes the running daemon read its rules file again.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::error::{Error, ErrorKind};
use crate::session::desk::Reloaded;

use super::daemon::{self, Method};
use super::{Unusable, block_on, load};

/// How long the daemon may take: it tries both servers first.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

pub(super) fn execute(config: &Path) -> Result<ExitCode> {
    let config = load(config)?;
    let address = daemon::address(&config.admin)?;
    let body = block_on(async {
        match daemon::ask(&config.admin, Method::Post, "/reload", ANSWER_LIMIT).await? {
            Some(answer) => answer.body(ANSWER_LIMIT).await,
            None => Err(daemon::nobody(address).hint("it still listens where it did when it was started")),
        }
    })?;
    let body = body.map_err(unusable)?;
    let Reloaded { rules, notes } = serde_json::from_str(&body).context("the daemon is of another version")?;
    let mut out = std::io::stdout().lock();
    let plural = if rules == 1 { "" } else { "s" };
    writeln!(out, "the daemon follows the rules file as it is now ({rules} rule{plural})")?;
    notes.iter().try_for_each(|note| writeln!(out, "note: {note}"))?;
    Ok(ExitCode::SUCCESS)
}

/// What is wrong with the rules file is shown as every command shows it.
fn unusable(error: Error) -> anyhow::Error {
    match error.kind() {
        ErrorKind::Config => Unusable(format!("{error}\n")).into(),
        _ => error.into(),
    }
}
