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
    let (mut daemon, _) = Daemon::new(session::open::with_tables(config).await?);
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
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::net::SocketAddr;
    use std::sync::Mutex;

    use super::*;
    use crate::admin::{self, Phase};
    use crate::config::{RulesFile, parse};
    use crate::session::orders::{Kind, PassOrder, Purpose};

    /// A rules file whose admin endpoint listens there.
    fn config(listen: SocketAddr) -> Config {
        let text = format!(
            "[postgres]\nurl = \"postgresql://postgres@127.0.0.1:1/x\"\n[redis]\nurl = \"redis://127.0.0.1:1\"\n\
             [admin]\nlisten = \"{listen}\"\n\
             [rule.a]\ntable = \"public.a\"\nkey = \"a:{{id}}\"\nvalue = \"json\"\ncolumns = [\"*\"]\n"
        );
        parse(RulesFile { path: "keepstep.toml".into(), text }, &|_| None).unwrap().0
    }

    /// The endpoint of a daemon whose session is played by the test, and what is ordered of it.
    async fn endpoint() -> (Config, mpsc::Receiver<Order>) {
        let (daemon, orders) = Daemon::new(config(SocketAddr::from(([127, 0, 0, 1], 0))));
        daemon.shared.update(|status| status.phase = Phase::Active);
        let bound = admin::serve(daemon.desk, daemon.shared, daemon.metrics).await.unwrap().unwrap();
        (config(bound), orders)
    }

    async fn ordered(orders: &mut mpsc::Receiver<Order>) -> PassOrder {
        match orders.recv().await {
            Some(Order::Pass(order)) => order,
            other => panic!("{other:?}"),
        }
    }

    fn request(purpose: Purpose, filter: Option<&str>) -> PassRequest {
        PassRequest { rules: vec!["a".to_owned()], purpose, filter: filter.map(str::to_owned) }
    }

    #[tokio::test]
    async fn the_daemon_reports_to_whoever_asked_up_to_the_last_word() {
        let (config, mut orders) = endpoint().await;
        let difference = Report::Difference {
            rule: "a".to_owned(),
            key: "a:1".to_owned(),
            kind: Kind::Differs,
            holds: Some("é\n".to_owned()),
            should: None,
            repaired: true,
        };
        let totals = Totals { rows: 7, diverged: 1, ..Totals::default() };
        let reports = [
            Report::Progress { rule: "a".to_owned(), rows: 1, rows_total: 7 },
            difference.clone(),
            Report::Done(totals),
        ];
        let verify = Purpose::Verify { sample: 0.5, repair: true };
        let session = async {
            let order = ordered(&mut orders).await;
            assert_eq!((order.rules, order.purpose, order.filter), (vec![0], verify, None));
            for report in reports {
                order.reports.send(report).await.unwrap();
            }
        };
        let seen = Mutex::new(Vec::new());
        let request = request(verify, None);
        let asked = carry_out(config, &request, |report| {
            seen.lock().unwrap().push(report.clone());
            Ok(())
        });
        let (answer, ()) = tokio::join!(asked, session);
        assert_eq!(answer.unwrap(), totals);
        assert_eq!(seen.into_inner().unwrap(), [difference]);
    }

    #[tokio::test]
    async fn whoever_hangs_up_ends_the_pass_and_another_may_be_asked_for() {
        let (config, mut orders) = endpoint().await;
        let warm = request(Purpose::Warm, Some("name = 'x & y'"));
        let first = tokio::spawn({
            let (config, warm) = (config.clone(), warm.clone());
            async move { carry_out(config, &warm, |_| Ok(())).await }
        });
        let order = ordered(&mut orders).await;
        assert_eq!(order.filter, warm.filter);
        let busy = carry_out(config.clone(), &warm, |_| Ok(())).await.unwrap_err();
        assert!(busy.to_string().contains("another pass is under way"), "{busy}");
        first.abort();
        order.reports.closed().await;
        drop(order);
        let again = tokio::spawn(async move { carry_out(config, &warm, |_| Ok(())).await });
        // Its session ends in the middle.
        drop(ordered(&mut orders).await);
        let failed = again.await.unwrap().unwrap_err();
        assert!(failed.to_string().contains("before the pass was complete"), "{failed}");
    }

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
