//! pgbench's own tables and workload, and larger changes than any other test makes.

use std::path::PathBuf;
use std::process::Stdio;

use redis::AsyncCommands;

use crate::support::{Daemon, Mirror, Reader, Stage, assert_in_step, differences, wait_for};

/// pgbench's tables.
const BENCH: &str = r#"
    [rule.account]
    table = "public.pgbench_accounts"
    key = "account:{aid}"
    value = "json"
    columns = ["aid", "bid", "abalance"]

    [rule.teller]
    table = "public.pgbench_tellers"
    key = "teller:{tid}"
    value = "json"
    columns = ["tid", "bid", "tbalance"]

    [rule.branch]
    table = "public.pgbench_branches"
    key = "branch:{bid}"
    value = "json"
    columns = ["bid", "bbalance"]
"#;

/// A row whose version only grows.
const VERSIONED: &str = r#"
    [rule.versioned]
    table = "public.versioned"
    key = "versioned:{id}"
    value = "json"
    columns = ["*"]
"#;

const MIRRORS: [Mirror<'_>; 4] = [
    Mirror { table: "pgbench_accounts", key: "'account:' || aid", columns: "aid, bid, abalance" },
    Mirror { table: "pgbench_tellers", key: "'teller:' || tid", columns: "tid, bid, tbalance" },
    Mirror { table: "pgbench_branches", key: "'branch:' || bid", columns: "bid, bbalance" },
    Mirror { table: "versioned", key: "'versioned:' || id", columns: "versioned.*" },
];

/// Makes and publishes the tables; every row changes once, so that every row has a key.
async fn prepare(stage: &Stage) -> PathBuf {
    let output = stage.postgres.command("pgbench").args(["-i", "-q"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    stage.execute("create table versioned (id int primary key, version int)").await;
    let rules = stage.rules(&format!("{BENCH}{VERSIONED}"));
    stage.keepstep(&["setup"]);
    stage.execute("insert into versioned values (1, 0); update pgbench_accounts set abalance = 0").await;
    stage.execute("update pgbench_tellers set tbalance = 0; update pgbench_branches set bbalance = 0").await;
    rules
}

/// pgbench and a row that counts, until dropped.
struct Load {
    pgbench: tokio::process::Child,
    counter: tokio::task::JoinHandle<()>,
}

impl Load {
    fn start(stage: &Stage) -> Self {
        let mut pgbench = tokio::process::Command::from(stage.postgres.command("pgbench"));
        pgbench.args(["-n", "-c", "4", "-T", "600"]).kill_on_drop(true);
        let pgbench = pgbench.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let url = stage.postgres.url("postgres");
        let counter = tokio::spawn(async move {
            let (sql, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
            tokio::spawn(connection);
            // Ends with its connection, when Postgres does.
            while sql.batch_execute("update versioned set version = version + 1").await.is_ok() {}
        });
        Load { pgbench, counter }
    }

    async fn stop(mut self) {
        self.counter.abort();
        self.pgbench.kill().await.unwrap();
    }
}

/// Waits until the reader's row has moved on: the daemon works.
async fn progress(stage: &Stage) {
    let version = async || {
        let mut cache = stage.cache().await;
        let value: Option<String> = cache.get(format!("{}versioned:1", Stage::PREFIX)).await.unwrap();
        value
    };
    let before = version().await;
    wait_for("the next version", async || (version().await != before).then_some(())).await;
}

#[tokio::test]
async fn killed_while_pgbench_runs() {
    let stage = Stage::set();
    let rules = prepare(&stage).await;
    let reader = Reader::follow(&stage, "versioned:1");
    let load = Load::start(&stage);
    let mut daemon = Daemon::start(&stage, &rules).await;
    for _ in 0..10 {
        progress(&stage).await;
        daemon.kill();
        daemon = Daemon::start(&stage, &rules).await;
    }
    load.stop().await;
    assert_in_step(&stage, &MIRRORS).await;
    assert!(reader.finish().await > 10);
}

#[tokio::test]
async fn a_large_transaction_needs_no_more_memory() {
    let stage = Stage::set();
    let rules = prepare(&stage).await;
    let daemon = Daemon::start(&stage, &rules).await;
    stage.execute("insert into versioned select i, i from generate_series(2, 300000) i").await;
    assert_in_step(&stage, &MIRRORS).await;
    let peak = daemon.resident_peak_kib();
    assert!(peak < 64 * 1024, "{peak} KiB");
}

#[tokio::test]
async fn until_caught_up_leaves_nothing_behind() {
    let stage = Stage::set();
    let rules = prepare(&stage).await;
    for round in 1..3 {
        stage.execute(&format!("update pgbench_accounts set abalance = {round}")).await;
        assert_eq!(Daemon::spawn(&stage, &rules, &["--until-caught-up"]).end().await.code(), Some(0));
        let differences = differences(&stage, &MIRRORS).await;
        assert!(differences.is_empty(), "{} differences", differences.len());
    }
}
