//! What the checkpoint promises, and other promises that are easily broken.
use std::future::ready;
use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::StreamExt;

use crate::support::{Daemon, Mirror, Stage, assert_in_step, wait_for};

const ROWS: &str = r#"
[rule.row]
table   = "public.rows"
key     = "row:{id}"
value   = "json"
columns = ["id", "version", "filler"]
"#;
const MIRROR: Mirror<'_> = Mirror { table: "rows", key: "'row:' || id", columns: "id, version, filler" };
const TABLE: &str = "create table rows (id int primary key, version bigint not null, filler text)";

async fn command(stage: &Stage, words: &[&str]) {
    let mut command = redis::cmd(words[0]);
    words[1..].iter().for_each(|word| _ = command.arg(*word));
    let _: redis::Value = command.query_async(&mut stage.cache().await).await.unwrap();
}

async fn checkpoint(stage: &Stage) -> serde_json::Value {
    let text: Option<String> = stage.get("keepstep:checkpoint").await;
    serde_json::from_str(&text.unwrap_or("null".into())).unwrap()
}

fn lsn(value: &serde_json::Value) -> keepstep::model::Lsn {
    value["applied"]["lsn"].as_str().unwrap().parse().unwrap()
}

async fn pass(ms: u64) {
    let until = Instant::now() + Duration::from_millis(ms);
    wait_for("a moment", async || (Instant::now() >= until).then_some(())).await;
}

/// A tick while a batch is in flight must not move the checkpoint back behind it.
#[tokio::test]
async fn the_checkpoint_never_moves_back_while_a_batch_is_in_flight() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let rules = stage.rules(ROWS);
    stage.keepstep(&["setup"]);
    let _daemon = Daemon::start(&stage, &rules).await;
    let mut highest = keepstep::model::Lsn(0);
    for version in 1..=4 {
        pass(300).await;
        let mut cache = stage.cache().await;
        stage
            .execute(&format!(
                "insert into rows values (1, {version}, 'a') on conflict (id) do update set version = excluded.version"
            ))
            .await;
        wait_for("a", async || {
            let v: Option<String> = stage.get("row:1").await;
            v?.contains(&format!("\"version\":{version},")).then_some(())
        })
        .await;
        let _: redis::Value =
            redis::cmd("CLIENT").arg("PAUSE").arg(1500).arg("WRITE").query_async(&mut cache).await.unwrap();
        stage
            .execute(&format!(
                "insert into rows values (2, {version}, 'b') on conflict (id) do update set version = excluded.version"
            ))
            .await;
        let until = Instant::now() + Duration::from_millis(2600);
        while Instant::now() < until {
            let now = lsn(&checkpoint(&stage).await);
            assert!(now >= highest, "round {version}: the checkpoint went from {highest} back to {now}");
            highest = now;
        }
    }
}

/// Redis refuses UNLINK inside MULTI too; the keys of an emptied table must go all the same.
#[tokio::test]
async fn truncate_deletes_its_keys_out_of_memory_too() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let rules = stage.rules(ROWS);
    stage.keepstep(&["setup"]);
    let _daemon = Daemon::start(&stage, &rules).await;
    stage.execute("insert into rows select i, 1, 'x' from generate_series(1, 100) i").await;
    assert_in_step(&stage, &[MIRROR]).await;
    command(&stage, &["CONFIG", "SET", "maxmemory", "1"]).await;
    stage.execute("truncate rows").await;
    pass(3000).await;
    command(&stage, &["CONFIG", "SET", "maxmemory", "0"]).await;
    stage.execute("insert into rows values (1000, 1, 'after')").await;
    wait_for("after", async || {
        let v: Option<String> = stage.get("row:1000").await;
        v.map(drop)
    })
    .await;
    let left: Vec<String> = redis::cmd("KEYS").arg("test:row:*").query_async(&mut stage.cache().await).await.unwrap();
    assert_eq!(left.len(), 1, "{} keys are left of the emptied table", left.len());
}

/// As cron runs it: no run is as long as `replay_window`.
#[tokio::test]
async fn short_runs_acknowledge_what_earlier_ones_left() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let rules = stage.rules(ROWS);
    let text = std::fs::read_to_string(&rules).unwrap().replace("\n\n[redis]", "\nreplay_window = \"2s\"\n\n[redis]");
    std::fs::write(&rules, text).unwrap();
    stage.keepstep(&["setup"]);
    let before = stage.confirmed().await;
    for version in 1..=3 {
        stage.execute(&format!("insert into rows values ({version}, 1, 'x')")).await;
        assert!(Daemon::spawn(&stage, &rules, &["--until-caught-up"]).end().await.success());
        pass(2100).await;
    }
    assert_ne!(before, stage.confirmed().await, "three runs later");
}

/// What lies between good and applied is applied again at a restart.
#[tokio::test]
async fn what_is_not_known_to_be_good_is_applied_again() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let rules = stage.rules(ROWS);
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(&stage, &rules).await;
    stage.execute("insert into rows values (1, 1, 'x')").await;
    assert_in_step(&stage, &[MIRROR]).await;
    pass(1500).await;
    let before = checkpoint(&stage).await;
    stage.execute("insert into rows values (2, 1, 'x')").await;
    assert_in_step(&stage, &[MIRROR]).await;
    daemon.kill();
    // As a failing reply in that EXEC leaves it: the checkpoint is there, the key is not.
    let stored: String = stage.get("keepstep:checkpoint").await;
    let now: serde_json::Value = serde_json::from_str(&stored).unwrap();
    let good = |v: &serde_json::Value| {
        format!("\"good\":{{\"lsn\":{},\"ordinal\":{}}}", v["good"]["lsn"], v["good"]["ordinal"])
    };
    stage.put("keepstep:checkpoint", &stored.replace(&good(&now), &good(&before))).await;
    command(&stage, &["DEL", "test:row:2"]).await;
    let client = redis::Client::open(stage.redis.url()).unwrap();
    let monitor = client.get_async_monitor().await.unwrap().into_on_message::<String>();
    let mut again = Daemon::spawn(&stage, &rules, &[]);
    again.ready().await;
    // The claim is a script's. Behind it comes what is applied again, and nobody has seen those replies yet.
    let checkpoints = monitor.filter(|said| ready(said.contains(r#""SET" "test:keepstep:checkpoint""#)));
    let mut written = pin!(checkpoints.filter(|said| ready(!said.contains("lua]"))));
    let first = written.next().await.unwrap().replace('\\', "");
    assert!(first.contains(&good(&before)), "claimed at once: {first}");
    stage.execute("insert into rows values (3, 1, 'x')").await;
    wait_for("3", async || {
        let v: Option<String> = stage.get("row:3").await;
        v.map(drop)
    })
    .await;
    let two: Option<String> = stage.get("row:2").await;
    assert!(two.is_some(), "row 2 was not applied again: {}", checkpoint(&stage).await);
}

/// A demotion during WAIT is an outage.
#[tokio::test]
async fn a_demotion_while_waiting_for_replicas_does_not_end_the_daemon() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let rules = stage.rules(ROWS);
    let text = std::fs::read_to_string(&rules).unwrap().replace("prefix =", "wait_replicas = 1\nprefix =");
    std::fs::write(&rules, text).unwrap();
    stage.keepstep(&["setup"]);
    let daemon = Daemon::spawn(&stage, &rules, &[]);
    wait_for("WAIT", async || daemon.log().contains("Redis replicas have the batch").then_some(())).await;
    command(&stage, &["REPLICAOF", "127.0.0.1", "1"]).await;
    pass(3000).await;
    assert!(daemon.get("/live").await.is_some(), "the daemon ended");
}

/// A Redis that knows no AUTH quotes its arguments.
#[tokio::test]
async fn the_password_is_not_in_the_log() {
    let stage = Stage::set_with("", &["--rename-command", "AUTH", "NOAUTH1", "--rename-command", "HELLO", "NOHELLO1"]);
    stage.execute(TABLE).await;
    for extra in ["", "/?protocol=resp3"] {
        let url = format!("redis://:s3cretpw@127.0.0.1:{}{extra}", stage.redis.port);
        let rules = stage.rules_between(&stage.postgres.url("postgres"), &url, ROWS);
        stage.keepstep(&["setup"]);
        let daemon = Daemon::spawn(&stage, &rules, &[]);
        let log = daemon.log_path();
        pass(1500).await;
        let text = std::fs::read_to_string(&log).unwrap();
        assert!(!text.contains("s3cretpw"), "{text}");
        drop(daemon);
    }
}

/// With a backlog to go through, a start-up probe must wait.
#[tokio::test]
async fn caught_up_is_not_said_before_the_backlog_is_through() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let rules = stage.rules(ROWS);
    stage.keepstep(&["setup"]);
    stage.execute("insert into rows select i, 1, repeat('x', 200) from generate_series(1, 100000) i").await;
    stage.execute("insert into rows values (999999, 1, 'last')").await;
    let daemon = Daemon::spawn(&stage, &rules, &[]);
    wait_for("caught up", async || daemon.get("/ready?caught_up=1").await.is_some_and(|(s, _)| s == 200).then_some(()))
        .await;
    let last: Option<String> = stage.get("row:999999").await;
    assert!(last.is_some(), "caught up without the last row");
}
