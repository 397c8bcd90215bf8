//! From sending COMMIT until the change can be seen: in Redis, or in what `pg_recvlogical` prints.
//!
//! Redis tells of the key itself (keyspace notifications), so nobody polls and takes time from what is measured.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use keepstep::sandbox::{Postgres, RedisServer};
use tokio_postgres::NoTls;

use crate::Figure;

/// Changes in one round, after some that do not count.
const CHANGES: usize = 300;
const WARM_UP: usize = 50;
const ROUNDS: usize = 3;
/// Between two changes: light load.
const PAUSE: Duration = Duration::from_millis(5);
/// A change that is not seen by then is lost.
const LIMIT: Duration = Duration::from_secs(10);

const TABLE: &str = "create table bench (id int primary key, version bigint, filler text); \
     insert into bench values (1, 0, repeat('x', 100)); \
     create publication recvlogical for table bench; \
     select pg_create_logical_replication_slot('recvlogical', 'pgoutput')";

const RULES: &str = r#"
[redis]
prefix = "bench:"
url = "REDIS"
[postgres]
url = "POSTGRES"
[admin]
listen = "off"
[rule.bench]
table = "public.bench"
key = "row:{id}"
value = "json"
columns = ["id", "version", "filler"]
"#;

/// A process that ends with the round.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Delays {
    p50_ms: f64,
    p99_ms: f64,
}

pub(crate) fn measure(_quick: bool) -> Vec<Figure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let postgres = Postgres::start("").expect("Postgres");
    let redis = RedisServer::start(&["--notify-keyspace-events", "K$"]).expect("Redis");
    runtime.block_on(async {
        let (sql, connection) = tokio_postgres::connect(&postgres.url("postgres"), NoTls).await.expect("a connection");
        tokio::spawn(connection);
        for statement in TABLE.split(';') {
            sql.batch_execute(statement).await.expect("the table");
        }
        let rules = postgres.folder().join("keepstep.toml");
        let text = RULES.replace("REDIS", &redis.url()).replace("POSTGRES", &postgres.url("postgres"));
        std::fs::write(&rules, text).expect("the rules file");
        let keepstep = |command: &str| {
            let mut keepstep = Command::new(env!("CARGO_BIN_EXE_keepstep"));
            keepstep.arg(command).arg("-c").arg(&rules).env("KEEPSTEP_LOG", "warn").stdout(Stdio::null());
            keepstep
        };
        assert!(keepstep("setup").status().expect("keepstep").success(), "keepstep setup");
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let daemon = Running(keepstep("run").spawn().expect("keepstep"));
            ours.push(round(&sql, &in_redis(&redis)).await);
            drop(daemon);
            theirs.push({
                let (printer, printed) = printed(&postgres);
                let delays = round(&sql, &printed).await;
                drop(printer);
                delays
            });
        }
        figures(&ours, &theirs)
    })
}

/// When each version was seen.
type Seen = Receiver<(u64, Instant)>;

/// Subscribes to the key and says when it changed; the version is in the value, which is read then.
fn in_redis(redis: &RedisServer) -> Seen {
    let client = redis::Client::open(redis.url()).expect("a URL");
    let (mut reader, mut listener) = (client.get_connection().expect("Redis"), client.get_connection().expect("Redis"));
    let (sender, seen) = channel();
    std::thread::spawn(move || {
        let mut subscribed = listener.as_pubsub();
        subscribed.subscribe("__keyspace@0__:bench:row:1").expect("a subscription");
        while subscribed.get_message().is_ok() {
            let at = Instant::now();
            let Ok(value) = redis::cmd("GET").arg("bench:row:1").query::<String>(&mut reader) else { return };
            let version = value.split("\"version\":").nth(1).and_then(|rest| rest.split(',').next()?.parse().ok());
            if sender.send((version.expect("a version"), at)).is_err() {
                return;
            }
        }
    });
    seen
}

/// `pg_recvlogical` with the same plugin, into a pipe.
fn printed(postgres: &Postgres) -> (Running, Seen) {
    let mut command = postgres.command("pg_recvlogical");
    command.args(["--start", "--slot=recvlogical", "--dbname=postgres", "--file=-", "--no-loop"]);
    command.args(["-o", "proto_version=1", "-o", "publication_names=recvlogical", "--status-interval=1"]);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("pg_recvlogical");
    let mut out = child.stdout.take().expect("a pipe");
    let (sender, seen) = channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 64 << 10];
        while let Ok(length @ 1..) = out.read(&mut buffer) {
            let at = Instant::now();
            if let Some(version) = version_in(&buffer[..length])
                && sender.send((version, at)).is_err()
            {
                return;
            }
        }
    });
    (Running(child), seen)
}

/// The second column of the last row in pgoutput's bytes: `t`, four bytes of length, digits, then the filler.
fn version_in(bytes: &[u8]) -> Option<u64> {
    let filler = bytes.windows(10).rposition(|window| window == b"xxxxxxxxxx")?;
    let row = &bytes[..filler];
    let start = row.windows(6).rposition(|window| window == b"\x00\x00\x00\x011t")? + 10;
    let digits: Vec<u8> = row.get(start..)?.iter().copied().take_while(u8::is_ascii_digit).collect();
    std::str::from_utf8(&digits).ok()?.parse().ok()
}

/// Changes the row again and again, and waits for each change to be seen.
async fn round(sql: &tokio_postgres::Client, seen: &Seen) -> Delays {
    let mut delays_ms = Vec::new();
    for change in 0..WARM_UP + CHANGES {
        let row = sql.query_one("select version from bench", &[]).await.expect("the row");
        let version = row.get::<_, i64>(0) as u64 + 1;
        sql.batch_execute("begin; update bench set version = version + 1").await.expect("an update");
        let began = Instant::now();
        sql.batch_execute("commit").await.expect("a commit");
        let at = loop {
            let (found, at) = seen.recv_timeout(LIMIT).expect("the change was not seen");
            if found >= version {
                break at;
            }
        };
        if change >= WARM_UP {
            delays_ms.push(at.saturating_duration_since(began).as_secs_f64() * 1e3);
        }
        tokio::time::sleep(PAUSE).await;
    }
    delays_ms.sort_by(f64::total_cmp);
    let percentile = |percent: usize| delays_ms[(delays_ms.len() * percent).div_ceil(100) - 1];
    Delays { p50_ms: percentile(50), p99_ms: percentile(99) }
}

fn figures(ours: &[Delays], theirs: &[Delays]) -> Vec<Figure> {
    let median = |delays: &[Delays], pick: fn(&Delays) -> f64| {
        let mut values: Vec<f64> = delays.iter().map(pick).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let [p50, p99]: [fn(&Delays) -> f64; 2] = [|delays| delays.p50_ms, |delays| delays.p99_ms];
    let figure = |measure: &str, pick, target: &str, met: fn(f64, f64) -> bool| {
        let (value, baseline) = (median(ours, pick), median(theirs, pick));
        let ratio = value / baseline;
        Figure { measure: measure.into(), value, baseline, ratio, target: target.into(), ok: met(value, ratio) }
    };
    vec![
        figure("commit to visible, light load, p50 (ms)", p50, "<= 1.5 x", |_, ratio| ratio <= 1.5),
        figure("commit to visible, light load, p99 (ms)", p99, "<= 5 ms", |value, _| value <= 5.0),
    ]
}
