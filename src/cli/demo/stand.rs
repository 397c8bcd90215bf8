//! The demo's servers, its daemon, and its connections to the servers.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use redis::aio::MultiplexedConnection;
use redis::{AsyncCommands, AsyncConnectionConfig};
use tokio_postgres::{Client, NoTls};

use super::super::status;
use super::observe::{Mirror, rows_in_step};
use crate::admin::{Phase, Status};
use crate::config::AdminConfig;
use crate::sandbox::{Keeper, Postgres, RedisServer, free_port};

/// Stands before every key, as in the rules file.
pub(super) const PREFIX: &str = "demo:";

const SHOP: &str = include_str!("../../../deploy/shop.sql");
const RULES: &str = include_str!("rules.toml");

/// How long anything that must happen may take.
const LIMIT: Duration = Duration::from_secs(60);
/// How often it is looked at, where its time is not measured.
const POLL: Duration = Duration::from_millis(50);

/// All of it. The order of the fields is the order in which it ends.
pub(super) struct Stand {
    pub(super) sql: Client,
    pub(super) cache: MultiplexedConnection,
    daemon: Daemon,
    pub(super) postgres: Postgres,
    redis: RedisServer,
    /// Of the daemon's admin endpoint.
    address: SocketAddr,
    /// Holds the rules file and the daemon's log.
    folder: tempfile::TempDir,
}

impl Stand {
    /// Starts the servers, loads the tables, and starts the daemon, as a user would by hand.
    pub(super) async fn start(outbox: bool) -> Result<Self> {
        // An outbox needs nothing of logical decoding.
        let postgres = Postgres::start(if outbox { "wal_level = replica" } else { "" })?;
        let redis = RedisServer::start(&[])?;
        let (sql, connection) = tokio_postgres::connect(&postgres.url("postgres"), NoTls).await?;
        tokio::spawn(connection);
        sql.batch_execute("set timezone = 'UTC'").await?;
        let patient =
            AsyncConnectionConfig::new().set_connection_timeout(Some(LIMIT)).set_response_timeout(Some(LIMIT));
        let cache = redis::Client::open(redis.url())?.get_multiplexed_async_connection_with_config(&patient).await?;

        sql.batch_execute(SHOP).await?;
        let pgbench = postgres.command("pgbench").args(["--initialize", "--quiet"]).output().context("pgbench")?;
        succeeded("pgbench", &pgbench)?;

        let folder = tempfile::Builder::new().prefix("keepstep-demo-").tempdir()?;
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()?));
        let rules = RULES
            .replace("{postgres}", &postgres.url("postgres"))
            .replace("{redis}", &redis.url())
            .replace("{admin}", &address.to_string());
        let rules = if outbox { rules.replace("[postgres]", "[postgres]\nsource = \"outbox\"") } else { rules };
        fs::write(folder.path().join("keepstep.toml"), rules)?;
        succeeded("keepstep setup", &keepstep("setup", &folder)?.output()?)?;
        let daemon = Daemon::start(&folder)?;
        let mut stand = Stand { sql, cache, daemon, postgres, redis, address, folder };
        stand.ready().await?;
        Ok(stand)
    }

    /// Which servers these are.
    pub(super) fn names(&self) -> String {
        format!(
            "Postgres {} (port {}) in Redis (port {})",
            self.postgres.install.major, self.postgres.port, self.redis.port
        )
    }

    /// How to look at them by hand.
    pub(super) fn invitation(&self) -> String {
        let (postgres, redis, admin) = (self.postgres.url("postgres"), self.redis.port, self.address);
        format!(
            "    psql {postgres} -c 'update products set price = 99 where id = 1'\n    \
             redis-cli -p {redis} get {PREFIX}product:1\n    \
             redis-cli -p {redis} monitor\n    \
             curl http://{admin}/status\n    \
             curl http://{admin}/metrics\n    \
             less {}\n",
            self.folder.path().join("keepstep.toml").display(),
        )
    }

    /// The value of a key, given without the prefix.
    pub(super) async fn get(&mut self, key: &str) -> Result<Option<String>> {
        Ok(self.cache.get(format!("{PREFIX}{key}")).await?)
    }

    /// Sets a key, given without the prefix, as an application would.
    pub(super) async fn put(&mut self, key: &str, value: &str) -> Result<()> {
        Ok(self.cache.set(format!("{PREFIX}{key}"), value).await?)
    }

    /// How many keys there are under the prefix, without keepstep's own.
    pub(super) async fn keys(&mut self) -> Result<usize> {
        let mut keys = self.cache.scan_match::<_, String>(format!("{PREFIX}*")).await?;
        let own = format!("{PREFIX}keepstep:");
        let mut count = 0;
        while let Some(key) = keys.next_item().await {
            count += usize::from(!key?.starts_with(&own));
        }
        Ok(count)
    }

    /// Runs the statement, waits until the key is another, and gives what it is then and how long after the commit.
    pub(super) async fn follow(&mut self, statement: &str, key: &str) -> Result<(Option<String>, Duration)> {
        let before = self.get(key).await?;
        self.sql.batch_execute(statement).await?;
        let committed = Instant::now();
        loop {
            let now = self.get(key).await?;
            if now != before {
                return Ok((now, committed.elapsed()));
            }
            self.patience(committed)?;
        }
    }

    /// Times one small change.
    pub(super) async fn probe(&mut self) -> Result<Duration> {
        let (_, delay) = self.follow("update orders set total = total + 0.01 where id = 1", "order:1").await?;
        Ok(delay)
    }

    /// Waits until every row has its key.
    pub(super) async fn in_step(&mut self, mirrors: &[Mirror]) -> Result<()> {
        let began = Instant::now();
        for mirror in mirrors {
            loop {
                let (rows, equal) = rows_in_step(&self.sql, &mut self.cache, mirror).await?;
                if rows == equal {
                    break;
                }
                self.patience(began).with_context(|| format!("{}: {equal} of {rows} rows", mirror.table))?;
                tokio::time::sleep(POLL).await;
            }
        }
        Ok(())
    }

    /// Waits until the daemon follows the stream.
    async fn ready(&mut self) -> Result<()> {
        let began = Instant::now();
        let admin = AdminConfig { listen: Some(self.address), token: None };
        loop {
            let answer = status::fetch(&admin).await.unwrap_or_default();
            if serde_json::from_str::<Status>(&answer).is_ok_and(|status| status.phase == Phase::Active) {
                return Ok(());
            }
            self.patience(began)?;
            tokio::time::sleep(POLL).await;
        }
    }

    /// Fails where the daemon has ended, or takes longer than any of this should.
    fn patience(&mut self, since: Instant) -> Result<()> {
        let ended = self.daemon.child.try_wait()?;
        if ended.is_none() && since.elapsed() < LIMIT {
            return Ok(());
        }
        let log = fs::read_to_string(&self.daemon.log).unwrap_or_default();
        match ended {
            Some(status) => bail!("keepstep run ended ({status}); it said:\n{log}"),
            None => bail!("nothing came for {LIMIT:?}; keepstep run said:\n{log}"),
        }
    }
}

/// `keepstep run`, which ends with the demo however that ends.
struct Daemon {
    child: Child,
    log: PathBuf,
    _keeper: Keeper,
}

impl Daemon {
    fn start(folder: &tempfile::TempDir) -> Result<Self> {
        let log = folder.path().join("keepstep.log");
        let mut run = keepstep("run", folder)?;
        run.stdout(Stdio::null()).stderr(fs::File::create(&log)?);
        // A group of its own: Ctrl-C ends the demo, which then ends its daemon before the servers.
        let child = std::os::unix::process::CommandExt::process_group(&mut run, 0).spawn()?;
        let keeper = Keeper::new(&child, folder.path())?;
        Ok(Daemon { child, log, _keeper: keeper })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Nothing of its work is needed again, so it need not end in order.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A command of this very program on the demo's rules file.
fn keepstep(command: &str, folder: &tempfile::TempDir) -> Result<Command> {
    let mut keepstep = Command::new(std::env::current_exe()?);
    keepstep.args([command, "-c", "keepstep.toml"]).current_dir(folder.path()).stdin(Stdio::null());
    Ok(keepstep)
}

fn succeeded(command: &str, output: &Output) -> Result<()> {
    ensure!(output.status.success(), "{command} failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
