//! pgbench's own tables and workload, with everything going wrong: the main job as people would run it.
//!
//! `KEEPSTEP_SOAK=1` (`make soak`) runs it in full: scale 10, 30 seconds, twenty kills. Otherwise it is small.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Daemon, Mirror, Reader, Stage, assert_in_step, wait_for};

const RULES: &str = r#"
[rule.account]
table   = "public.pgbench_accounts"
key     = "account:{aid}"
value   = "json"
columns = ["*"]

[rule.teller]
table   = "public.pgbench_tellers"
key     = "teller:{tid}"
value   = "json"
columns = ["tid", "bid", "tbalance", "filler"]

[rule.branch]
table   = "public.pgbench_branches"
key     = "branch:{bid}"
value   = "json"
columns = ["bid", "bbalance"]

[rule.clock]
table   = "public.clock"
key     = "clock"
value   = "json"
columns = ["version"]
"#;

const MIRRORS: [Mirror<'_>; 4] = [
    Mirror { table: "pgbench_accounts", key: "'account:' || aid", columns: "aid, bid, abalance, filler" },
    Mirror { table: "pgbench_tellers", key: "'teller:' || tid", columns: "tid, bid, tbalance, filler" },
    Mirror { table: "pgbench_branches", key: "'branch:' || bid", columns: "bid, bbalance" },
    Mirror { table: "clock", key: "'clock:' || 't'", columns: "version" },
];

/// How much of it.
struct Size {
    scale: &'static str,
    seconds: u64,
    kills: u64,
}

fn size() -> Size {
    match std::env::var_os("KEEPSTEP_SOAK") {
        Some(_) => Size { scale: "10", seconds: 30, kills: 20 },
        None => Size { scale: "1", seconds: 6, kills: 5 },
    }
}

fn pgbench(stage: &Stage, arguments: &[&str]) -> Child {
    let mut command = stage.postgres.command("pgbench");
    command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Empty tables, publication and slot; the rows come through the stream.
async fn prepare(stage: &Stage) -> std::path::PathBuf {
    assert!(pgbench(stage, &["-i", "-I", "dtp"]).wait().unwrap().success());
    stage.execute("create table clock (one bool primary key default true, version bigint)").await;
    // A row is a key, and this key has no column in it: one row, by its primary key.
    stage.execute("insert into clock values (true, 1)").await;
    let rules = stage.rules(&RULES.replace("key     = \"clock\"", "key     = \"clock:{one}\""));
    stage.keepstep(&["setup"]);
    rules
}

/// A transaction in pgbench's mix that counts a version up.
const TICKS: &str = "update clock set version = version + 1;\n";

#[tokio::test]
async fn every_key_equals_its_row_after_pgbench() {
    let stage = Stage::set();
    let rules = prepare(&stage).await;
    let size = size();
    let daemon = Daemon::start(&stage, &rules).await;
    assert!(pgbench(&stage, &["-i", "-I", "g", "-s", size.scale]).wait().unwrap().success());
    let seconds = size.seconds.to_string();
    assert!(pgbench(&stage, &["-n", "-c", "4", "-j", "2", "-T", &seconds]).wait().unwrap().success());
    assert_in_step(&stage, &MIRRORS).await;
    assert!(daemon.resident_peak_kib() < 64 << 10, "{} KiB", daemon.resident_peak_kib());
}

#[tokio::test]
async fn every_key_equals_its_row_after_kills_and_restarts_under_pgbench() {
    let mut stage = Stage::set_with("", &["--appendonly", "yes", "--appendfsync", "no"]);
    let rules = prepare(&stage).await;
    let size = size();
    let mut daemon = Daemon::start(&stage, &rules).await;
    assert!(pgbench(&stage, &["-i", "-I", "g", "-s", size.scale]).wait().unwrap().success());
    let script = stage.folder().join("ticks.sql");
    std::fs::write(&script, TICKS).unwrap();
    let script = format!("{}@1", script.display());
    let reader = Reader::follow(&stage, "clock:t");
    let began = Instant::now();
    let (run, pause) =
        (Duration::from_secs(size.seconds), Duration::from_millis(1000 * size.seconds / (size.kills + 1)));
    let seconds = size.seconds.to_string();
    let load = ["-n", "-c", "4", "-j", "2", "-T", &seconds, "-b", "tpcb-like@9", "-f", &script];
    let mut clients = pgbench(&stage, &load);
    for kill in 1..=size.kills {
        let jitter = pause.mul_f64(f64::from(getrandom::u32().unwrap()) / f64::from(u32::MAX)) / 2;
        let until = began + pause * u32::try_from(kill).unwrap() + jitter;
        wait_for("the moment", async || (Instant::now() >= until).then_some(())).await;
        daemon.kill();
        if kill == size.kills / 2 {
            stage.redis.stop("KILL").unwrap();
            stage.redis.resume().unwrap();
        }
        if kill == size.kills / 2 + 1 {
            stage.postgres.stop("INT").unwrap();
            stage.postgres.resume().unwrap();
            let _ = clients.wait();
            clients = pgbench(&stage, &load);
        }
        daemon = Daemon::spawn(&stage, &rules, &[]);
    }
    wait_for("the end of the run", async || (began.elapsed() >= run).then_some(())).await;
    let _ = clients.kill();
    let _ = clients.wait();
    assert_in_step(&stage, &MIRRORS).await;
    // One more: on a slow machine the reader may have seen none but the last.
    stage.execute(TICKS).await;
    reader.sees_several().await;
    reader.finish().await;
    drop(daemon);
}
