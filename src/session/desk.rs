//! Where orders are placed while sessions come and go: by the admin endpoint, by SIGHUP, by a message in the stream.
//!
//! There is one pass at a time, under the rules in force. A changed rules file is read, compared with the tables and
//! tried on both servers before it replaces the one in force. If anything is wrong with it, that is logged and answered,
//! and nothing changes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::admin::{Phase, Shared};
use crate::config::{self, Config, diagnostic};
use crate::error::{Error, ErrorKind, Result};

use super::open;
use super::orders::{Command, ORDERS_MAX, Order, PassRequest, Report, Reports, Unreadable};

/// Takes orders for the session.
#[derive(Debug)]
pub struct Desk {
    /// What the session follows, or will once it comes to the orders that wait.
    in_force: Mutex<Arc<Config>>,
    orders: mpsc::Sender<Order>,
    shared: Arc<Shared>,
    passes: Arc<Semaphore>,
    reloads: tokio::sync::Mutex<()>,
}

/// A pass that was accepted. Dropped, it is given up, and the next one may be asked for.
#[derive(Debug)]
pub struct Pass {
    /// What becomes of it.
    pub reports: Reports,
    _only: OwnedSemaphorePermit,
}

/// A rules file that is in force now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// How many rules it has.
    pub rules: usize,
    /// What of it is not in force yet.
    pub notes: Vec<String>,
}

/// Why an order was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The request makes no sense under the rules in force.
    #[error("{0}")]
    Senseless(Error),
    /// One at a time.
    #[error("another pass is under way")]
    Busy,
    /// There is no stream that a pass could be merged into.
    #[error("changes are not streamed just now{0}")]
    NotStreaming(String),
    /// The rules file is wrong; everything that is, as it is shown.
    #[error("{0}")]
    Unusable(String),
    /// A server did not answer, or refused, as the rules file names it.
    #[error("{0}")]
    Unavailable(Error),
}

impl Desk {
    /// One for a daemon that follows `config`, and the orders that are placed at it.
    pub fn open(config: Arc<Config>, shared: Arc<Shared>) -> (Arc<Self>, mpsc::Receiver<Order>) {
        let (orders, placed) = mpsc::channel(ORDERS_MAX);
        let desk = Desk {
            in_force: Mutex::new(config),
            orders,
            shared,
            passes: Arc::new(Semaphore::new(1)),
            reloads: tokio::sync::Mutex::new(()),
        };
        (Arc::new(desk), placed)
    }

    /// The configuration in force.
    pub fn config(&self) -> Arc<Config> {
        Arc::clone(&self.in_force())
    }

    fn in_force(&self) -> MutexGuard<'_, Arc<Config>> {
        self.in_force.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Orders a pass.
    pub fn pass(&self, request: &PassRequest) -> Result<Pass, Refused> {
        let only = Arc::clone(&self.passes).try_acquire_owned().map_err(|_| Refused::Busy)?;
        let (sender, reports) = Reports::channel();
        // Held until the order is placed: its rules have the numbers of the configuration that the session follows then.
        let config = self.in_force();
        let order = request.order(&config, sender).map_err(Refused::Senseless)?;
        let status = self.shared.status();
        if status.phase != Phase::Active {
            let why = status.last_error.map_or_else(String::new, |error| format!(": {error}"));
            return Err(Refused::NotStreaming(why));
        }
        self.place(Order::Pass(order))?;
        Ok(Pass { reports, _only: only })
    }

    /// Reads the rules file again; the session goes on with it. Says in the log what became of it.
    pub async fn reload(&self) -> Result<Reloaded, Refused> {
        let _only = self.reloads.lock().await;
        let reloaded = match examine(&self.config()).await {
            Ok(config) => self.replace(config),
            Err(refused) => Err(refused),
        };
        match &reloaded {
            Ok(Reloaded { rules, notes }) => {
                tracing::info!(rules, "the rules file was read again");
                notes.iter().for_each(|note| tracing::warn!("{note}"));
            }
            Err(refused) => tracing::error!("the rules file was not taken, everything stays as it was: {refused}"),
        }
        reloaded
    }

    fn replace(&self, config: Config) -> Result<Reloaded, Refused> {
        let config = Arc::new(config);
        let mut in_force = self.in_force();
        self.place(Order::Reload(Arc::clone(&config)))?;
        let moved = in_force.admin.listen != config.admin.listen;
        let notes = moved.then(|| "`[admin] listen` takes effect after a restart".to_owned());
        let reloaded = Reloaded { rules: config.rules.len(), notes: notes.into_iter().collect() };
        *in_force = config;
        Ok(reloaded)
    }

    /// The session that follows `before` has learnt what its patterns come to: `now`.
    pub(super) fn matched(&self, before: &Arc<Config>, now: &Arc<Config>) {
        let mut in_force = self.in_force();
        // Whatever was ordered since has been matched by itself.
        if Arc::ptr_eq(&in_force, before) {
            *in_force = Arc::clone(now);
        }
    }

    /// The session that follows `before` has seen that other tables match now: it goes on with `now`, unless something
    /// newer was ordered or nothing more can be; then the next look sees it again. Whether it does.
    pub(super) fn tables_changed(&self, before: &Arc<Config>, now: Config) -> bool {
        let mut in_force = self.in_force();
        let now = Arc::new(now);
        let ordered = Arc::ptr_eq(&in_force, before) && self.place(Order::Reload(Arc::clone(&now))).is_ok();
        if ordered {
            *in_force = now;
        }
        ordered
    }

    fn place(&self, order: Order) -> Result<(), Refused> {
        self.orders.try_send(order).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Refused::Busy,
            mpsc::error::TrySendError::Closed(_) => Refused::NotStreaming(String::new()),
        })
    }

    /// Obeys a command from the stream, if `message_commands` lists it.
    pub fn obey(self: &Arc<Self>, heard: Result<Command, Unreadable>) {
        let command = match heard {
            Ok(command) => command,
            Err(why) => return tracing::warn!("a message in the stream is no command: {why}"),
        };
        let name = command.name();
        if !command.is_obeyed(self.config().postgres.message_commands) {
            return tracing::warn!(command = name, "not obeyed: `message_commands` does not list it");
        }
        tracing::info!(command = name, "commanded by a message in the stream");
        match command {
            Command::Reload => {
                let desk = Arc::clone(self);
                // What becomes of it is in the log.
                tokio::spawn(async move { desk.reload().await.map(drop) });
            }
            Command::Pass(request) => match self.pass(&request) {
                Ok(pass) => drop(tokio::spawn(log(pass, name))),
                Err(refused) => tracing::warn!(command = name, "not obeyed: {refused}"),
            },
        }
    }

    /// Reloads at each SIGHUP from now on.
    pub fn reload_on_hangup(self: Arc<Self>) -> Result<()> {
        let cannot = |error| Error::new(ErrorKind::Io, "cannot listen to signals").because(error);
        let mut hangups = signal(SignalKind::hangup()).map_err(cannot)?;
        tokio::spawn(async move {
            while hangups.recv().await.is_some() {
                // What becomes of it is in the log.
                let _ = self.reload().await;
            }
        });
        Ok(())
    }
}

/// The rules file as it is now, if it can be followed.
async fn examine(before: &Config) -> Result<Config, Refused> {
    let environment = |name: &str| std::env::var(name).ok();
    let (config, warnings) = config::load(&before.file.main.path, &environment)
        .map_err(|problems| Refused::Unusable(diagnostic::render(&problems.diagnostics, &problems.file, false)))?;
    if !warnings.is_empty() {
        tracing::warn!("the rules file has warnings\n\n{}", diagnostic::render(&warnings, &config.file, false));
    }
    match open::rehearse(&config).await {
        Ok(config) => Ok(config),
        Err(error) if error.kind() == ErrorKind::Config => Err(Refused::Unusable(error.to_string())),
        Err(error) => Err(Refused::Unavailable(error)),
    }
}

/// Follows a pass that nobody waits for. What differs is counted here and shown by `keepstep verify`: keys and values
/// do not go into the log.
async fn log(mut pass: Pass, command: &'static str) {
    while let Some(report) = pass.reports.next().await {
        match report {
            Report::Progress { .. } | Report::Difference { .. } => {}
            Report::Done(totals) => tracing::info!(command, ?totals, "done"),
            Report::Failed { error } => tracing::error!(command, error, "not completed"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::admin::Status;
    use crate::config::{RulesFile, parse};
    use crate::session::orders::Purpose;

    fn desk() -> (Arc<Desk>, mpsc::Receiver<Order>) {
        let text = "[postgres]\nurl = \"postgresql://postgres@127.0.0.1:1/x\"\nmessage_commands = [\"warm\"]\n\
                    [redis]\nurl = \"redis://127.0.0.1:1\"\n\
                    [rule.a]\ntable = \"public.a\"\nkey = \"a:{id}\"\nvalue = \"json\"\ncolumns = [\"*\"]\n";
        let file = RulesFile { path: "/nowhere/keepstep.toml".into(), text: text.to_owned() };
        let status = Status { phase: Phase::Active, ..Status::default() };
        Desk::open(Arc::new(parse(file, &|_| None).unwrap().0), Arc::new(Shared::new(status)))
    }

    fn request(purpose: Purpose) -> PassRequest {
        PassRequest { rules: Vec::new(), purpose, filter: None }
    }

    #[tokio::test]
    async fn one_pass_at_a_time_and_the_next_when_it_is_given_up() {
        let (desk, mut orders) = desk();
        let pass = desk.pass(&request(Purpose::Warm)).unwrap();
        assert!(matches!(desk.pass(&request(Purpose::Warm)), Err(Refused::Busy)));
        let Some(Order::Pass(order)) = orders.recv().await else { panic!("no order") };
        assert!(!order.reports.is_closed());
        drop(pass);
        assert!(order.reports.is_closed(), "the session sees that nobody waits any more");
        assert!(desk.pass(&request(Purpose::Warm)).is_ok());
    }

    #[tokio::test]
    async fn without_a_stream_no_pass_is_ordered() {
        let (desk, orders) = desk();
        desk.shared.update(|status| {
            status.phase = Phase::Connecting;
            status.last_error = Some("Redis is away".to_owned());
        });
        let refused = desk.pass(&request(Purpose::Warm)).unwrap_err();
        assert!(refused.to_string().contains("Redis is away"), "{refused}");
        desk.shared.update(|status| status.phase = Phase::Active);
        drop(orders);
        assert!(matches!(desk.pass(&request(Purpose::Warm)), Err(Refused::NotStreaming(_))));
    }

    #[tokio::test]
    async fn other_tables_are_followed_unless_something_newer_was_ordered() {
        let (desk, mut orders) = desk();
        let before = desk.config();
        let with = |listen| {
            let admin = crate::config::AdminConfig { listen, token: None };
            Config { admin, ..Config::clone(&before) }
        };
        assert!(desk.tables_changed(&before, with(None)));
        let Some(Order::Reload(now)) = orders.recv().await else { panic!("no order") };
        assert!(Arc::ptr_eq(&now, &desk.config()), "what is ordered next has its numbers");
        assert!(!desk.tables_changed(&before, with(None)), "that session is about to end");
        desk.matched(&before, &before);
        assert!(Arc::ptr_eq(&now, &desk.config()));
        assert!(orders.is_empty());
    }

    #[tokio::test]
    async fn messages_are_obeyed_only_where_they_are_listed() {
        let (desk, mut orders) = desk();
        desk.obey(Ok(Command::Pass(request(Purpose::Verify { sample: 1.0, repair: true }))));
        desk.obey(Ok(Command::Reload));
        desk.obey(Err(Unreadable::Sample));
        desk.obey(Ok(Command::Pass(request(Purpose::Warm))));
        let Some(Order::Pass(order)) = orders.recv().await else { panic!("no order") };
        assert_eq!((order.purpose, order.rules), (Purpose::Warm, vec![0]));
        assert!(orders.is_empty(), "nothing else was ordered");
    }

    #[tokio::test]
    async fn a_rules_file_that_cannot_be_used_changes_nothing() {
        let (desk, orders) = desk();
        let before = desk.config();
        assert!(matches!(desk.reload().await, Err(Refused::Unusable(text)) if text.contains("cannot be read")));
        assert!(Arc::ptr_eq(&before, &desk.config()));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keepstep.toml");
        std::fs::write(&path, &before.file.main.text).unwrap();
        let file = RulesFile { path, text: before.file.main.text.clone() };
        *desk.in_force() = Arc::new(Config { file: file.into(), ..Config::clone(&before) });
        assert!(
            matches!(desk.reload().await, Err(Refused::Unavailable(_))),
            "the file is good, the servers are not there"
        );
        assert!(orders.is_empty(), "the session goes on as before");
    }
}
