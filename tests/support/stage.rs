//! One private Postgres, one private Redis, and a folder for the rules file.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use keepstep::cache::checkpoint::Checkpoint;
use keepstep::sandbox::{Postgres, RedisServer, free_port};
use redis::aio::MultiplexedConnection;
use redis::{AsyncCommands, AsyncConnectionConfig, FromRedisValue};
use tokio::task::JoinHandle;
use tokio_postgres::NoTls;

use super::LIMIT;

/// What a test plays on. Everything on it ends with it.
pub(crate) struct Stage {
    pub(crate) postgres: Postgres,
    pub(crate) redis: RedisServer,
    /// The port of the daemon's admin endpoint.
    pub(crate) admin: u16,
    folder: tempfile::TempDir,
}

impl Stage {
    /// Stands before every key of the rules that [`Stage::rules`] writes.
    pub(crate) const PREFIX: &str = "test:";

    /// Servers with ordinary settings and without persistence in Redis.
    pub(crate) fn set() -> Self {
        Self::set_with("", &[])
    }

    /// `settings` are lines of `postgresql.conf`, `arguments` stand on the command line of Redis.
    pub(crate) fn set_with(settings: &str, arguments: &[&str]) -> Self {
        let templates = Path::new(env!("CARGO_TARGET_TMPDIR"));
        // Nothing of logical decoding is left there.
        let settings = if reads_outbox() { format!("wal_level = replica\n{settings}") } else { settings.to_owned() };
        Stage {
            postgres: Postgres::start_copy(templates, &settings).unwrap(),
            redis: RedisServer::start(arguments).unwrap(),
            admin: free_port().unwrap(),
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// Where the rules file and the daemon's log are.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a rules file of these rules, between these servers.
    pub(crate) fn rules(&self, rules: &str) -> PathBuf {
        self.rules_between(&self.postgres.url("postgres"), &self.redis.url(), rules)
    }

    /// The same with other URLs, as those of a [`super::Proxy`].
    pub(crate) fn rules_between(&self, postgres: &str, redis: &str, rules: &str) -> PathBuf {
        let path = self.folder().join("keepstep.toml");
        let (prefix, admin) = (Self::PREFIX, self.admin);
        // Behind them the rules stand in the same lines.
        let (source, nothing) = if reads_outbox() { ("source = \"outbox\"\n", "") } else { ("", "\n") };
        let servers = format!(
            "[postgres]\nurl = \"{postgres}\"\n{source}\n[redis]\nurl = \"{redis}\"\nprefix = \"{prefix}\"\n\n\
             [admin]\nlisten = \"127.0.0.1:{admin}\"\n{nothing}"
        );
        fs::write(&path, servers + rules).unwrap();
        path
    }

    /// Adds lines to a table of the rules file, as to `[postgres]`.
    pub(crate) fn set_fields(&self, table: &str, lines: &str) {
        let path = self.folder().join("keepstep.toml");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(table), "no {table} in the rules file");
        fs::write(path, text.replacen(table, &format!("{table}\n{lines}"), 1)).unwrap();
    }

    /// Runs a keepstep command on the rules file to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_keepstep")).args(arguments).current_dir(self.folder()).output().unwrap()
    }

    /// Runs one while the test goes on.
    pub(crate) fn begin(&self, arguments: &[&str]) -> JoinHandle<Output> {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_keepstep"));
        command.args(arguments).current_dir(self.folder()).kill_on_drop(true);
        tokio::spawn(async move {
            let output = tokio::time::timeout(LIMIT, command.output()).await;
            output.expect("the command has ended in time").unwrap()
        })
    }

    /// Runs one to its end and gives its standard output; it must succeed.
    pub(crate) fn keepstep(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let [said, shown] = [&output.stderr, &output.stdout].map(|bytes| String::from_utf8_lossy(bytes));
        assert!(output.status.success(), "keepstep {arguments:?}: {}\n{said}\n{shown}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }

    /// After tables have changed: what triggers store is for setup to say. A publication has its own ways.
    pub(crate) fn follow(&self) {
        if reads_outbox() {
            self.keepstep(&["setup"]);
        }
    }

    /// What happens until the daemon begins anew is not kept for it.
    pub(crate) async fn lose_what_comes(&self) {
        let sql = match reads_outbox() {
            true => "select setval('keepstep.gate', last_value | 4) from keepstep.gate",
            false => "select pg_drop_replication_slot('keepstep')",
        };
        self.execute(sql).await;
    }

    /// What the daemon has acknowledged.
    pub(crate) async fn confirmed(&self) -> String {
        let query = match reads_outbox() {
            true => "select confirmed_lsn::text from keepstep.state",
            false => "select confirmed_flush_lsn::text from pg_replication_slots where slot_name = 'keepstep'",
        };
        self.sql().await.query_one(query, &[]).await.unwrap().get(0)
    }

    /// The server process that keepstep's changes come from.
    pub(crate) async fn sender(&self) -> Option<u32> {
        let query = match reads_outbox() {
            true => "select pid from pg_locks where locktype = 'advisory' and granted",
            false => "select active_pid from pg_replication_slots where slot_name = 'keepstep'",
        };
        let row = self.sql().await.query_opt(query, &[]).await.unwrap()?;
        row.get::<_, Option<i32>>(0).map(|pid| pid.try_into().unwrap())
    }

    /// A new connection to Postgres, so that it works after a restart too.
    pub(crate) async fn sql(&self) -> tokio_postgres::Client {
        let (client, connection) = tokio_postgres::connect(&self.postgres.url("postgres"), NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    /// Runs SQL statements, separated by semicolons.
    pub(crate) async fn execute(&self, statements: &str) {
        self.sql().await.batch_execute(statements).await.unwrap();
    }

    /// A new connection to Redis, so that it works after a restart too.
    pub(crate) async fn cache(&self) -> MultiplexedConnection {
        connect(&self.redis).await
    }

    /// The checkpoint, as Redis holds it.
    pub(crate) async fn checkpoint(&self) -> Option<Checkpoint> {
        let stored: Option<Vec<u8>> = self.cache().await.get(Checkpoint::key(Self::PREFIX)).await.unwrap();
        stored.map(|stored| Checkpoint::decode(&stored).unwrap())
    }

    /// The value of a key, given without the prefix.
    pub(crate) async fn get<T: FromRedisValue>(&self, key: &str) -> T {
        self.cache().await.get(format!("{}{key}", Self::PREFIX)).await.unwrap()
    }

    /// Sets a key, given without the prefix, as an application would.
    pub(crate) async fn put(&self, key: &str, value: &str) {
        self.cache().await.set::<_, _, ()>(format!("{}{key}", Self::PREFIX), value).await.unwrap();
    }
}

/// Whether the suite is run for the outbox: with `KEEPSTEP_TEST_SOURCE=outbox` each rules file of a [`Stage`] has that source.
pub(crate) fn reads_outbox() -> bool {
    std::env::var_os("KEEPSTEP_TEST_SOURCE").is_some_and(|source| source == "outbox")
}

/// A new connection to a Redis server.
pub(crate) async fn connect(server: &RedisServer) -> MultiplexedConnection {
    let client = redis::Client::open(server.url()).unwrap();
    // The usual half second is too little for a machine that runs several tests at once.
    let patient = AsyncConnectionConfig::new().set_connection_timeout(Some(LIMIT)).set_response_timeout(Some(LIMIT));
    client.get_multiplexed_async_connection_with_config(&patient).await.unwrap()
}
