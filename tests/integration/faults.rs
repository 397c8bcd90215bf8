//! Crashes, outages and cut connections: the cache converges (I1), never goes back (I3), and nothing is skipped (I5).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::support::{Daemon, Mirror, Proxy, Reader, Stage, assert_in_step, reads_outbox, signal, wait_for};

const ROWS: &str = r#"
[rule.row]
table   = "public.rows"
key     = "row:{id}"
value   = "json"
columns = ["id", "version", "filler"]
"#;

const MIRROR: Mirror<'_> = Mirror { table: "rows", key: "'row:' || id", columns: "id, version, filler" };
const TABLE: &str = "create table rows (id int primary key, version bigint not null, filler text)";
/// Redis that survives `kill -9` with everything it has answered for.
const PERSISTENT: &[&str] = &["--appendonly", "yes", "--appendfsync", "no"];

/// Writes while a test breaks things: each transaction counts row 0 up, and inserts, changes and deletes others.
struct Load {
    task: tokio::task::JoinHandle<u64>,
    done: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl Load {
    async fn begin(stage: &Stage) -> Self {
        let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let ended = done.clone();
        let url = stage.postgres.url("postgres");
        stage.execute("insert into rows values (0, 1, null) on conflict do nothing").await;
        let task = tokio::spawn(async move {
            let mut client = None;
            let mut version = 1_u64;
            while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                let Some(connected) = &client else {
                    client = connect(&url).await;
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                };
                match connected.batch_execute(&transaction(version + 1)).await {
                    Ok(()) => version += 1,
                    // A restart of Postgres: what did not commit is tried again.
                    Err(_) => client = None,
                }
            }
            version
        });
        Load { task, done }
    }

    /// Stops and gives the number of transactions.
    async fn finish(self) -> u64 {
        self.done.store(true, std::sync::atomic::Ordering::Relaxed);
        self.task.await.unwrap()
    }
}

async fn connect(url: &str) -> Option<tokio_postgres::Client> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.ok()?;
    tokio::spawn(connection);
    Some(client)
}

fn transaction(version: u64) -> String {
    let (a, b) = (1 + version % 97, 1 + version % 31);
    format!(
        "begin; update rows set version = version + 1 where id = 0; \
         insert into rows values ({a}, {version}, repeat('x', {b})) on conflict (id) do update set version = excluded.version; \
         delete from rows where id = {b} and id <> {a}; \
         update rows set id = id + 1000 where id = {a} and {version} % 5 = 0 \
         and not exists (select from rows where id = {a} + 1000); commit"
    )
}

#[tokio::test]
async fn twenty_kills_at_random_moments() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let rules = stage.rules(ROWS);
    stage.keepstep(&["setup"]);
    let load = Load::begin(&stage).await;
    let reader = Reader::follow(&stage, "row:0");
    let mut daemon = Daemon::start(&stage, &rules).await;
    for kill in 0..20 {
        // Different moments: some before the stream begins again, some in the middle of it.
        let wait = Duration::from_millis(u64::from(getrandom::u32().unwrap() % 300));
        let until = Instant::now() + wait;
        wait_for("the moment", async || (Instant::now() >= until).then_some(())).await;
        daemon.kill();
        daemon = Daemon::spawn(&stage, &rules, &[]);
        if kill % 3 == 0 {
            daemon.ready().await;
        }
    }
    daemon.ready().await;
    let transactions = load.finish().await;
    assert_in_step(&stage, &[MIRROR]).await;
    let seen = reader.finish().await;
    // A drain of the outbox is one step, whatever it holds.
    let least = if reads_outbox() { 1 } else { 10 };
    assert!(transactions > 100 && seen > least, "{transactions} transactions, {seen} versions seen");
}

#[tokio::test]
async fn both_servers_are_killed_and_come_back() {
    let mut stage = Stage::set_with("", PERSISTENT);
    stage.execute(TABLE).await;
    let rules = stage.rules(ROWS);
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(&stage, &rules).await;
    let load = Load::begin(&stage).await;
    let reader = Reader::follow(&stage, "row:0");
    for _ in 0..2 {
        let changes = daemon.metric("keepstep_changes_total").await.unwrap_or_default();
        wait_for("changes", async || (daemon.metric("keepstep_changes_total").await? > changes + 50.0).then_some(()))
            .await;
        stage.redis.stop("KILL").unwrap();
        wait_for("the circuit to open", async || (daemon.metric("keepstep_circuit_open").await? == 1.0).then_some(()))
            .await;
        stage.redis.resume().unwrap();
        wait_for("the circuit to close", async || (daemon.metric("keepstep_circuit_open").await? == 0.0).then_some(()))
            .await;
        stage.postgres.stop("QUIT").unwrap();
        stage.postgres.resume().unwrap();
        wait_for("the stream", async || (daemon.get("/ready").await?.0 == 200).then_some(())).await;
    }
    load.finish().await;
    assert_in_step(&stage, &[MIRROR]).await;
    reader.finish().await;
}

#[tokio::test]
async fn a_fast_shutdown_of_postgres_does_not_wait_for_the_replay_window() {
    let mut stage = Stage::set();
    stage.execute(TABLE).await;
    let rules = stage.rules(ROWS);
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(&stage, &rules).await;
    stage.execute("insert into rows select i, 1, 'x' from generate_series(1, 1000) i").await;
    assert_in_step(&stage, &[MIRROR]).await;
    let began = Instant::now();
    stage.postgres.stop("INT").unwrap();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    stage.postgres.resume().unwrap();
    stage.execute("update rows set version = 2").await;
    assert_in_step(&stage, &[MIRROR]).await;
    drop(daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_and_stalled_links_on_either_side() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let (to_postgres, to_redis) = (Proxy::to(stage.postgres.port).await, Proxy::to(stage.redis.port).await);
    let rules = stage.rules_between(
        &format!("postgresql://postgres@127.0.0.1:{}/postgres", to_postgres.port),
        &format!("redis://127.0.0.1:{}/", to_redis.port),
        ROWS,
    );
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(&stage, &rules).await;
    let load = Load::begin(&stage).await;
    let reader = Reader::follow(&stage, "row:0");
    for round in 0..30 {
        let changes = daemon.metric("keepstep_changes_total").await.unwrap_or_default();
        wait_for("changes", async || (daemon.metric("keepstep_changes_total").await? > changes + 20.0).then_some(()))
            .await;
        match round % 3 {
            0 => to_redis.cut(),
            1 => to_postgres.cut(),
            _ => {
                to_redis.refuse();
                wait_for("trouble", async || (daemon.metric("keepstep_circuit_open").await? == 1.0).then_some(()))
                    .await;
                to_redis.resume();
            }
        }
    }
    load.finish().await;
    assert_in_step(&stage, &[MIRROR]).await;
    reader.finish().await;
}

#[tokio::test]
async fn an_outage_of_redis_holds_postgres_back_and_memory_down() {
    let mut stage = Stage::set_with("wal_sender_timeout = 3s", PERSISTENT);
    stage.execute(TABLE).await;
    let rules = stage.rules(ROWS);
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(&stage, &rules).await;
    stage.redis.stop("KILL").unwrap();
    // Much more than the buffers hold, and longer than `wal_sender_timeout`.
    stage.execute("insert into rows select i, 1, repeat('x', 1000) from generate_series(1, 80000) i").await;
    let until = Instant::now() + Duration::from_secs(6);
    wait_for("the timeout to pass", async || (Instant::now() >= until).then_some(())).await;
    assert_eq!(daemon.metric("keepstep_sessions_total").await, Some(1.0), "the stream was cut:\n{}", daemon.log());
    stage.redis.resume().unwrap();
    wait_for("the circuit to close", async || (daemon.metric("keepstep_circuit_open").await? == 0.0).then_some(()))
        .await;
    assert_in_step(&stage, &[MIRROR]).await;
    assert_eq!(daemon.metric("keepstep_sessions_total").await, Some(1.0), "the stream was cut:\n{}", daemon.log());
    assert!(daemon.resident_peak_kib() < 64 << 10, "{} KiB", daemon.resident_peak_kib());
}

#[tokio::test]
async fn servers_may_come_in_any_order() {
    let mut stage = Stage::set();
    stage.execute(TABLE).await;
    let rules = stage.rules(ROWS);
    stage.keepstep(&["setup"]);
    stage.execute("insert into rows values (1, 1, 'before the daemon')").await;
    stage.postgres.stop("INT").unwrap();
    stage.redis.stop("KILL").unwrap();
    let mut daemon = Daemon::spawn(&stage, &rules, &[]);
    wait_for("the daemon to answer", async || (daemon.get("/ready").await?.0 == 503).then_some(())).await;
    stage.postgres.resume().unwrap();
    stage.redis.resume().unwrap();
    daemon.ready().await;
    assert_in_step(&stage, &[MIRROR]).await;
}

#[tokio::test]
async fn two_daemons_take_turns() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let rules = stage.rules(ROWS);
    stage.keepstep(&["setup"]);
    let first = Daemon::start(&stage, &rules).await;
    let second = Daemon::spawn(&stage, &without_admin(&rules), &[]);
    let load = Load::begin(&stage).await;
    let reader = Reader::follow(&stage, "row:0");
    wait_for("the second to find the slot taken", async || {
        second.log().contains("another daemon, or one that just ended").then_some(())
    })
    .await;
    first.kill();
    let version = load.finish().await;
    wait_for("the second to take over", async || {
        let held: Option<String> = stage.get("row:0").await;
        held?.contains(&format!("\"version\":{version}")).then_some(())
    })
    .await;
    assert_in_step(&stage, &[MIRROR]).await;
    reader.finish().await;
}

/// A daemon that was stopped (SIGSTOP) while another took over must change nothing when it goes on (I8).
#[tokio::test]
async fn a_zombie_writes_nothing() {
    let stage = Stage::set_with("wal_sender_timeout = 1s", &[]);
    stage.execute(TABLE).await;
    let rules = stage.rules(ROWS);
    stage.keepstep(&["setup"]);
    let zombie = Daemon::start(&stage, &rules).await;
    stage.execute("insert into rows values (0, 1, 'zombie')").await;
    assert_in_step(&stage, &[MIRROR]).await;
    signal(zombie.pid(), "STOP");
    // Received by the zombie's socket, or sent to its successor, or both.
    stage.execute("update rows set version = 2").await;
    let successor = Daemon::spawn(&stage, &without_admin(&rules), &[]);
    wait_for("the successor", async || {
        stage.execute("update rows set version = version + 1").await;
        let held: Option<String> = stage.get("row:0").await;
        (!held?.contains("\"version\":1,")).then_some(())
    })
    .await;
    let reader = Reader::follow(&stage, "row:0");
    signal(zombie.pid(), "CONT");
    wait_for("the zombie to notice", async || zombie.log().contains("not streaming").then_some(())).await;
    for _ in 0..50 {
        stage.execute("update rows set version = version + 1").await;
    }
    assert_in_step(&stage, &[MIRROR]).await;
    reader.finish().await;
    drop(successor);
}

/// The same rules for a second daemon, which cannot listen on the same port.
fn without_admin(rules: &Path) -> PathBuf {
    let text = std::fs::read_to_string(rules).unwrap();
    let admin = text.lines().find(|line| line.starts_with("listen")).unwrap();
    let second = rules.with_file_name("second.toml");
    std::fs::write(&second, text.replace(admin, "listen = \"off\"")).unwrap();
    second
}

#[tokio::test]
async fn sigterm_finishes_what_is_under_way() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let rules = stage.rules(ROWS);
    stage.keepstep(&["setup"]);
    let load = Load::begin(&stage).await;
    for _ in 0..3 {
        let daemon = Daemon::start(&stage, &rules).await;
        assert!(daemon.terminate().await.success());
    }
    load.finish().await;
    let last = Daemon::spawn(&stage, &rules, &["--until-caught-up"]);
    assert!(last.end().await.success());
    assert_in_step(&stage, &[MIRROR]).await;
}

#[tokio::test]
async fn out_of_memory_deletes_instead_of_leaving_stale_values() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let rules = stage.rules(ROWS);
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(&stage, &rules).await;
    stage.execute("insert into rows select i, 1, 'x' from generate_series(1, 100) i").await;
    assert_in_step(&stage, &[MIRROR]).await;
    let mut cache = stage.cache().await;
    let () = redis::cmd("CONFIG").arg("SET").arg("maxmemory").arg("1").query_async(&mut cache).await.unwrap();
    stage.execute("update rows set version = 2 where id <= 50").await;
    wait_for("the keys to go", async || {
        let held: Option<String> = stage.get("row:50").await;
        held.is_none().then_some(())
    })
    .await;
    assert_eq!(daemon.metric("keepstep_rules_owing").await, Some(1.0));
    let () = redis::cmd("CONFIG").arg("SET").arg("maxmemory").arg("0").query_async(&mut cache).await.unwrap();
    // With room again, what is owed is paid, though no row changes.
    assert_in_step(&stage, &[MIRROR]).await;
    wait_for("the debt to be paid", async || (daemon.metric("keepstep_rules_owing").await? == 0.0).then_some(())).await;
}
