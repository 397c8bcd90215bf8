//! Logs: to stderr, for people or as JSON, filtered by `KEEPSTEP_LOG` (as `info` or `keepstep::session=debug`).

use std::io::IsTerminal;

use clap::ValueEnum;
use tracing::Level;
use tracing_subscriber::EnvFilter;

/// The environment variable that says what is logged.
const FILTER_VARIABLE: &str = "KEEPSTEP_LOG";

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging, at this level where the environment does not say otherwise; once in a process.
pub fn start(format: LogFormat, level: Level) {
    let filter = EnvFilter::try_from_env(FILTER_VARIABLE).unwrap_or_else(|_| EnvFilter::new(level.as_str()));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => logs.with_ansi(std::io::stderr().is_terminal()).with_target(false).init(),
        LogFormat::Json => logs.json().flatten_event(true).init(),
    }
}
