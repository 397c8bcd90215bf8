//! What `warm` and `verify` share: a pass by the running daemon, or in a session of its own, and its progress.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::mpsc;

use crate::config::Config;
use crate::error::{Error, ErrorKind};
use crate::session::orders::{Order, PassRequest, Report, Reports, Totals};
use crate::session::{self, Daemon, Options};
use crate::shutdown::Shutdown;

use super::daemon::{self, Answer, Method};

/// How long the daemon may take to accept a pass.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Carries the request out and shows progress; each key that differs goes to `difference`.
pub(super) async fn carry_out(
    config: Config,
    request: &PassRequest,
    difference: impl FnMut(&Report) -> Result<()>,
) -> Result<Totals> {
    let mut shown = Shown { progress: Progress::new(), difference };
    let answer = match config.admin.listen {
        Some(_) => daemon::ask(&config.admin, Method::Post, &request.target(), ANSWER_LIMIT).await?,
        None => None,
    };
    match answer {
        Some(answer) => by_daemon(answer, &mut shown).await,
        None => alone(config, request, &mut shown).await,
    }
}

/// The daemon does it and reports.
async fn by_daemon(mut answer: Answer, shown: &mut Shown<impl FnMut(&Report) -> Result<()>>) -> Result<Totals> {
    while let Some(line) = answer.line().await? {
        let report = serde_json::from_str(&line).context("the daemon is of another version")?;
        if let Some(totals) = shown.take(report)? {
            return Ok(totals);
        }
    }
    Err(Error::new(ErrorKind::Io, "the daemon ended before the pass was complete").into())
}

/// No daemon runs: a session of its own, which ends with the pass.
async fn alone(
    config: Config,
    request: &PassRequest,
    shown: &mut Shown<impl FnMut(&Report) -> Result<()>>,
) -> Result<Totals> {
    // Nothing is ordered at its desk: it has no endpoint.
    let (mut daemon, _) = Daemon::new(config);
    let (sender, reports) = Reports::channel();
    let (orders, placed) = mpsc::channel(1);
    orders.send(Order::Pass(request.order(&daemon.config, sender)?)).await?;
    let options = Options { until_done: true, ..Options::default() };
    let session = Box::pin(session::run(&mut daemon, options, placed, Shutdown::listen()?));
    let (ended, totals) = tokio::join!(session, follow(reports, shown));
    ended?;
    totals
}

async fn follow(mut reports: Reports, shown: &mut Shown<impl FnMut(&Report) -> Result<()>>) -> Result<Totals> {
    while let Some(report) = reports.next().await {
        if let Some(totals) = shown.take(report)? {
            return Ok(totals);
        }
    }
    unreachable!("reports end with a last word")
}

/// What a person sees of the reports.
struct Shown<F> {
    progress: Progress,
    difference: F,
}

impl<F: FnMut(&Report) -> Result<()>> Shown<F> {
    /// Shows a report; what it came to, if it is the last word.
    fn take(&mut self, report: Report) -> Result<Option<Totals>> {
        match report {
            Report::Progress { rule, rows, rows_total } => self.progress.advance(rule, rows, rows_total),
            Report::Difference { .. } => self.progress.bar.suspend(|| (self.difference)(&report))?,
            Report::Done(totals) => {
                self.progress.bar.finish_and_clear();
                return Ok(Some(totals));
            }
            Report::Failed { error } => {
                self.progress.bar.finish_and_clear();
                return Err(Error::new(ErrorKind::Io, error).into());
            }
        }
        Ok(None)
    }
}

/// Rows, rate and time left, on a terminal only.
struct Progress {
    bar: ProgressBar,
    /// Rows read and rows there are, by rule.
    rules: BTreeMap<String, (u64, u64)>,
}

impl Progress {
    fn new() -> Self {
        let template = "{wide_bar} {human_pos} of about {human_len} rows, {per_sec:.0}, {eta} left";
        let style = ProgressStyle::with_template(template).expect("the template is valid");
        Progress { bar: ProgressBar::new(0).with_style(style), rules: BTreeMap::new() }
    }

    fn advance(&mut self, rule: String, rows: u64, rows_total: u64) {
        self.rules.insert(rule, (rows, rows_total.max(rows)));
        self.bar.set_length(self.rules.values().map(|(_, total)| total).sum());
        self.bar.set_position(self.rules.values().map(|(rows, _)| rows).sum());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_the_sum_of_the_rules() {
        let mut progress = Progress::new();
        progress.advance("a".to_owned(), 10, 100);
        progress.advance("b".to_owned(), 70, 50);
        progress.advance("a".to_owned(), 20, 100);
        assert_eq!((progress.bar.position(), progress.bar.length()), (90, Some(170)));
    }

    #[test]
    fn the_last_word_decides() {
        let mut differences = Vec::new();
        let difference = |report: &Report| {
            differences.push(report.clone());
            Ok(())
        };
        let mut shown = Shown { progress: Progress::new(), difference };
        let totals = Totals { rows: 3, ..Totals::default() };
        let progress = Report::Progress { rule: "a".to_owned(), rows: 1, rows_total: 3 };
        assert_eq!(shown.take(progress).ok(), Some(None));
        assert_eq!(shown.take(Report::Done(totals)).ok(), Some(Some(totals)));
        assert!(shown.take(Report::Failed { error: "the session ended".to_owned() }).is_err());
        assert!(differences.is_empty());
    }
}
