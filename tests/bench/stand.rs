//! The servers that a measure starts for itself, and the programs that are measured on them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use keepstep::config::{self, Config, RulesFile};
use keepstep::model::Lsn;
use keepstep::sandbox::{Keeper, Postgres, RedisServer};
use keepstep::source::conninfo::ConnInfo;
use keepstep::source::replication::{Frame, Walsender};
use redis::Commands;

/// `USER_HZ`: the clock of `/proc/PID/stat` on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;
/// How often a condition is looked at: seldom enough to take no time from what is measured.
const POLL: Duration = Duration::from_millis(2);
/// Nothing that is waited for takes longer, or the run has failed.
const LIMIT: Duration = Duration::from_secs(600);

/// One Postgres and one Redis.
pub(crate) struct Stand {
    pub(crate) postgres: Postgres,
    pub(crate) redis: RedisServer,
}

impl Stand {
    pub(crate) fn start(redis: &[&str]) -> Self {
        // Room for a backlog, and no checkpoint in the middle of a round.
        let settings = "shared_buffers = '512MB'\nmax_wal_size = '16GB'\ncheckpoint_timeout = '1h'\nautovacuum = off";
        let postgres = Postgres::start(settings).expect("Postgres");
        let stand = Stand { postgres, redis: RedisServer::start(redis).expect("Redis") };
        stand.sql("create table mark (id text primary key)");
        stand
    }

    /// Runs SQL and gives back what it prints.
    pub(crate) fn sql(&self, sql: &str) -> String {
        let output = self.postgres.command("psql").args(["-XqAtv", "ON_ERROR_STOP=1", "-c", sql]).output();
        let output = output.expect("psql");
        assert!(output.status.success(), "{sql}\n{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    pub(crate) fn redis(&self) -> redis::Connection {
        let client = redis::Client::open(self.redis.url()).expect("a URL");
        client.get_connection().expect("Redis")
    }

    /// A publication of the table and of the marks, and a slot of the same name.
    pub(crate) fn publish(&self, name: &str, table: &str) {
        self.sql(&format!("create publication {name} for table {table}, mark"));
        self.sql(&format!("select pg_create_logical_replication_slot('{name}', 'pgoutput')"));
    }

    /// A change that stands behind all those before.
    pub(crate) fn mark(&self, id: &str) {
        self.sql(&format!("insert into mark values ('{id}')"));
    }

    /// Waits until keepstep has written the key of the mark, and so everything before.
    pub(crate) fn wait_for_mark(&self, keepstep: &Program, id: &str) {
        let (mut redis, key) = (self.redis(), format!("bench:mark:{id}"));
        keepstep.wait_until(|| redis.exists(&key).unwrap_or(false));
    }

    /// Empties Redis.
    pub(crate) fn flush(&self) {
        redis::cmd("FLUSHALL").arg("SYNC").exec(&mut self.redis()).expect("FLUSHALL");
    }

    /// A slot where `slot` stands now, so that every round reads the same backlog.
    pub(crate) fn copy_slot(&self, slot: &str, copy: &str) {
        self.sql(&format!("select pg_copy_logical_replication_slot('{slot}', '{copy}')"));
    }

    pub(crate) fn drop_slot(&self, slot: &str) {
        self.sql(&format!("select pg_drop_replication_slot('{slot}')"));
    }

    /// What such a file means.
    pub(crate) fn config(&self, slot: &str, rules: &str) -> Config {
        let path = self.rules(slot, rules);
        let text = fs::read_to_string(&path).expect("the rules file");
        config::parse(RulesFile { path, text }, &|_| None).expect("a rules file").0
    }

    /// A rules file for `slot`, of rules that only follow the stream.
    fn rules(&self, slot: &str, rules: &str) -> PathBuf {
        self.rules_that(false, slot, rules)
    }

    /// A rules file for `slot`, of rules that are warmed or not.
    pub(crate) fn rules_that(&self, warm: bool, slot: &str, rules: &str) -> PathBuf {
        let publication = publication(slot);
        let (postgres, redis) = (self.postgres.url("postgres"), self.redis.url());
        let path = self.postgres.folder().join(format!("{slot}.toml"));
        let text = format!(
            "[postgres]\nurl = \"{postgres}\"\nslot = \"{slot}\"\npublication = \"{publication}\"\n\
             [redis]\nurl = \"{redis}\"\nprefix = \"bench:\"\n[admin]\nlisten = \"off\"\n\
             [defaults]\nwarm = {warm}\n{rules}{}",
            json_rules("mark", "id", 1)
        );
        fs::write(&path, text).expect("the rules file");
        path
    }

    /// `keepstep run` on such a file.
    pub(crate) fn keepstep(&self, slot: &str, rules: &str) -> Program {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keepstep"));
        command.arg("run").arg("-c").arg(self.rules(slot, rules)).env("KEEPSTEP_LOG", "warn");
        Program::start(command.stdout(Stdio::null()))
    }

    /// What `redis-benchmark` says of one connection that sets values of so many bytes: requests a second.
    pub(crate) fn redis_benchmark(&self, keys: usize, value_bytes: usize) -> f64 {
        self.flush();
        let (port, keys, bytes) = (self.redis.port.to_string(), keys.to_string(), value_bytes.to_string());
        let mut command = Command::new("redis-benchmark");
        command.args(["-p", &port, "-c", "1", "-P", "100", "-t", "set", "-n", &keys, "-r", &keys, "-d", &bytes]);
        let output = command.arg("--csv").output().expect("redis-benchmark");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let figure = text.lines().find(|line| line.starts_with("\"SET\"")).and_then(|line| line.split('"').nth(3));
        figure.and_then(|figure| figure.parse().ok()).unwrap_or_else(|| panic!("redis-benchmark said {text}"))
    }

    /// Takes a slot's stream in this process, by keepstep's own connection: every message up to the commit of so many
    /// row changes.
    pub(crate) fn receive(&self, slot: &str, rules: &str, rows: usize, mut take: impl FnMut(&[u8])) {
        let config = self.config(slot, rules);
        runtime().block_on(async {
            let info = ConnInfo::from_config(&config.postgres).expect("a URL");
            let walsender = Walsender::connect(&info).await.expect("Postgres");
            let mut stream =
                walsender.start(slot, &config.postgres.publication, Lsn::default()).await.expect("a stream");
            let (mut changes, mut committed) = (0, 0);
            while committed < rows {
                stream.fill().await.expect("more bytes");
                while let Some(frame) = stream.next_buffered().expect("a frame") {
                    let Frame::Data { body, .. } = frame else { continue };
                    match body.first() {
                        Some(b'I' | b'U' | b'D') => changes += 1,
                        Some(b'C') => committed = changes,
                        _ => {}
                    }
                    take(body);
                }
            }
            stream.close(Lsn::default()).await.expect("the end of the stream");
        });
    }

    /// `pg_recvlogical` with the same plugin and options as keepstep's.
    pub(crate) fn recvlogical(&self, slot: &str, file: &str) -> Command {
        let publication = publication(slot);
        let mut command = self.postgres.command("pg_recvlogical");
        command.args(["--start", "--no-loop", "--status-interval=1", "--fsync-interval=0"]);
        command.args(["--slot", slot, "--dbname=postgres", "--file", file]);
        command.args([
            "-o",
            "proto_version=1",
            "-o",
            "messages=true",
            "-o",
            &format!("publication_names={publication}"),
        ]);
        command
    }
}

/// A slot is named after its publication; a copy has something behind a `_`.
fn publication(slot: &str) -> &str {
    slot.split('_').next().unwrap_or(slot)
}

/// So many rules on a table, each of which writes its rows as JSON.
pub(crate) fn json_rules(table: &str, key: &str, count: usize) -> String {
    let rule = |number| {
        let name = if number == 0 { table.to_owned() } else { format!("{table}{number}") };
        format!(
            "[rule.{name}]\ntable = \"public.{table}\"\nkey = \"{name}:{{{key}}}\"\nvalue = \"json\"\ncolumns = [\"*\"]\n"
        )
    };
    (0..count).map(rule).collect()
}

/// For what is asynchronous; one thread, as the daemon's own.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// A process that is measured, and ends with its round.
pub(crate) struct Program {
    pub(crate) child: Child,
    began: Instant,
    /// Ends it if the benchmark is killed.
    _keeper: Keeper,
}

impl Program {
    pub(crate) fn start(command: &mut Command) -> Self {
        let began = Instant::now();
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        // There is no folder to remove.
        let keeper = Keeper::new(&child, Path::new("")).expect("sh");
        Program { child, began, _keeper: keeper }
    }

    /// Since it was started.
    pub(crate) fn elapsed_s(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// User and system time so far; of one that has ended too, as long as nobody has waited for it.
    pub(crate) fn cpu_s(&self) -> f64 {
        let fields = self.stat();
        let ticks = |field: usize| fields[field].parse::<f64>().expect("a number of ticks");
        (ticks(11) + ticks(12)) / TICKS_PER_SECOND
    }

    /// The most memory that was ever resident.
    pub(crate) fn peak_mib(&self) -> f64 {
        self.status_mib("VmHWM:")
    }

    /// The same, looked at until it has ended.
    pub(crate) fn peak_of_all_mib(self) -> f64 {
        let mut peak_mib: f64 = 0.0;
        while !self.has_ended() {
            assert!(self.elapsed_s() < LIMIT.as_secs_f64(), "the program has not ended within {LIMIT:?}");
            // Nothing is resident any more in the moment between the two.
            peak_mib = peak_mib.max(self.resident_of("VmHWM:").unwrap_or_default());
            std::thread::sleep(POLL);
        }
        self.finish();
        peak_mib
    }

    /// The memory that is resident now.
    pub(crate) fn resident_mib(&self) -> f64 {
        self.status_mib("VmRSS:")
    }

    fn status_mib(&self, field: &str) -> f64 {
        self.resident_of(field).expect("a running process")
    }

    fn resident_of(&self, field: &str) -> Option<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find(|line| line.starts_with(field))?;
        let kib = line.split_whitespace().nth(1)?.parse::<f64>().ok()?;
        Some(kib / 1024.0)
    }

    /// `/proc/PID/stat` behind the program's name (proc(5)): the state is the first field.
    fn stat(&self) -> Vec<String> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("a process");
        let behind_name = stat.rsplit_once(')').expect("a name").1;
        behind_name.split_whitespace().map(str::to_owned).collect()
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.stat()[0] == "Z"
    }

    /// Waits for the condition, and fails the run if the program ends before.
    pub(crate) fn wait_until(&self, mut condition: impl FnMut() -> bool) {
        let began = Instant::now();
        while !condition() {
            assert!(!self.has_ended(), "the program has ended by itself");
            assert!(began.elapsed() < LIMIT, "what was waited for has not come within {LIMIT:?}");
            std::thread::sleep(POLL);
        }
    }

    /// Waits for its end, which must be a good one; gives its seconds, and its seconds of CPU.
    pub(crate) fn finish(mut self) -> (f64, f64) {
        while !self.has_ended() {
            assert!(self.elapsed_s() < LIMIT.as_secs_f64(), "the program has not ended within {LIMIT:?}");
            std::thread::sleep(POLL);
        }
        let cost = (self.elapsed_s(), self.cpu_s());
        let status = self.child.wait().expect("a process");
        assert!(status.success(), "the program has failed: {status}");
        cost
    }

    /// Ends it in order, so that the slot is free again.
    pub(crate) fn end(mut self) {
        let killed = Command::new("kill").arg(self.child.id().to_string()).status();
        assert!(killed.is_ok_and(|status| status.success()), "the program has ended by itself");
        self.child.wait().expect("a process");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
