//! `keepstep status`: what the running daemon says of itself, through its admin endpoint.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::admin::Status;
use crate::config::AdminConfig;
use crate::error::{Error, ErrorKind};

use super::{Output, block_on, load};

/// How long the daemon may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// No status is larger.
const ANSWER_BYTES_MAX: u64 = 16 << 20;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// How the result looks
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

pub(super) fn execute(config: &Path, arguments: &Arguments) -> Result<ExitCode> {
    let config = load(config)?;
    let body = block_on(async {
        tokio::time::timeout(ANSWER_LIMIT, fetch(&config.admin)).await.unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Io, "the daemon did not answer").hint("is another program on that address?"))
        })
    })??;
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

/// GET /status. HTTP/1.0 keeps the answer in one piece, up to the end of the connection.
pub(super) async fn fetch(config: &AdminConfig) -> Result<String, Error> {
    let off = || Error::new(ErrorKind::Config, "the admin endpoint is off").hint("set `[admin] listen` to an address");
    let address = config.listen.ok_or_else(off)?;
    let away = |error| {
        Error::new(ErrorKind::Io, format!("no daemon answers on {address}"))
            .because(error)
            .hint("start it with `keepstep run`, or name its rules file with --config")
    };
    let mut stream = TcpStream::connect(address).await.map_err(away)?;
    let authorization = config.token.as_ref().map(|token| format!("Authorization: Bearer {}\r\n", token.expose()));
    let request = format!("GET /status HTTP/1.0\r\nHost: {address}\r\n{}\r\n", authorization.unwrap_or_default());
    stream.write_all(request.as_bytes()).await.map_err(away)?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer).await.map_err(away)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status_line = head.lines().next().unwrap_or_default();
    match status_line.split(' ').nth(1) {
        Some("200") => Ok(body.to_owned()),
        _ => Err(Error::new(ErrorKind::Io, format!("the daemon answered `{status_line}`: {}", body.trim()))),
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
    for rule in &status.rules {
        let state = match (&rule.paused, rule.owing) {
            (Some(why), _) => format!("paused, only invalidates: {why}"),
            (None, true) => "deleted keys where it should have written them".to_owned(),
            (None, false) => "in step".to_owned(),
        };
        lines.push(format!("rule          {} on {}: {state}", rule.name, rule.table));
    }
    lines.join("\n") + "\n"
}
