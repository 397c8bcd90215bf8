//! `keepstep status`: what the running daemon says of itself, through its admin endpoint.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::admin::{PassStatus, Status};
use crate::config::AdminConfig;
use crate::error::Error;

use super::daemon::{self, Method};
use super::{Output, block_on, load};

/// How long the daemon may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// How the result looks
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

pub(super) fn execute(config: &Path, arguments: &Arguments) -> Result<ExitCode> {
    let config = load(config)?;
    let body = block_on(fetch(&config.admin))??;
    let mut out = std::io::stdout().lock();
    use std::io::Write;
    match arguments.output {
        Output::Json => writeln!(out, "{body}")?,
        Output::Table => {
            let status: Status = serde_json::from_str(&body).context("the daemon is of another version")?;
            write!(out, "{}", table(&status))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What `/status` answers.
pub(super) async fn fetch(config: &AdminConfig) -> Result<String, Error> {
    let address = daemon::address(config)?;
    match daemon::ask(config, Method::Get, "/status", ANSWER_LIMIT).await? {
        Some(answer) => answer.body(ANSWER_LIMIT).await,
        None => Err(daemon::nobody(address)),
    }
}

fn table(status: &Status) -> String {
    let phase = match (status.phase, status.redis_away) {
        (crate::admin::Phase::Active, true) => "active, but Redis is away: changes wait",
        (crate::admin::Phase::Active, false) if status.caught_up => "active, caught up",
        (crate::admin::Phase::Active, false) => "active",
        (crate::admin::Phase::Connecting, _) => "connecting",
        (crate::admin::Phase::Ending, _) => "ending",
    };
    let retained = status.slot_retained_bytes.map_or_else(|| "?".to_owned(), |bytes| bytes.to_string());
    let slot_status = status.slot_status.as_deref().unwrap_or("?");
    let mut lines = vec![
        format!("state         {phase}"),
        format!("database      {}", status.database),
        format!("slot          {} ({slot_status}, keeps {retained} bytes of WAL)", status.slot),
        format!("received      {}", status.received),
        format!("applied       {} ({} bytes behind)", status.applied, status.lag_bytes),
        format!("acknowledged  {}", status.acknowledged),
    ];
    if let Some(error) = &status.last_error {
        lines.push(format!("last error    {error}"));
    }
    lines.extend(status.passes.iter().map(|pass| format!("{:<13} {}", pass.purpose, pass_line(pass))));
    for rule in &status.rules {
        let state = match (&rule.paused, rule.owing) {
            (Some(why), _) => format!("paused: {why}"),
            (None, true) => "its keys are yet to be made right from the table".to_owned(),
            (None, false) => "in step".to_owned(),
        };
        lines.push(format!("rule          {} on {}: {state}", rule.name, rule.table));
    }
    lines.join("\n") + "\n"
}

fn pass_line(pass: &PassStatus) -> String {
    let left =
        pass.seconds_left.map(|seconds| format!(", {} left", humantime::format_duration(Duration::from_secs(seconds))));
    format!(
        "{} for {}: {} of about {} rows, {:.0}/s{}",
        pass.table,
        pass.rules.join(", "),
        pass.rows,
        pass.rows_total,
        pass.rows_per_s,
        left.unwrap_or_default()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_is_one_line_of_the_table() {
        let pass = PassStatus {
            table: "public.products".to_owned(),
            rules: vec!["product".to_owned(), "title".to_owned()],
            purpose: "warm".to_owned(),
            rows: 1500,
            rows_total: 6000,
            rows_per_s: 50.0,
            seconds_left: Some(90),
        };
        let shown = table(&Status { passes: vec![pass], ..Status::default() });
        let expected = "warm          public.products for product, title: 1500 of about 6000 rows, 50/s, 1m 30s left\n";
        assert!(shown.contains(expected), "{shown}");
    }
}
