//! `redelete` with a duration: what slow fillers put back goes once more.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use keepstep::model::Lsn;
use redis::AsyncCommands;

use crate::support::{Daemon, Stage, wait_for};

const RULES: &str = r#"
[rule.slow]
table        = "public.rows"
delete       = ["list:{cat}"]
delete_match = ["page:{cat}:*"]
delete_tags  = ["cat:{cat}"]
redelete     = "4s"

[rule.row]
table   = "public.rows"
key     = "row:{id}"
value   = "json"
columns = ["id"]
"#;
const DELAY: Duration = Duration::from_secs(4);

async fn set(rules: &str) -> (Stage, PathBuf, Daemon) {
    let stage = Stage::set();
    stage.execute("create table rows (id int primary key, cat text); alter table rows replica identity full").await;
    let rules = stage.rules(rules);
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(&stage, &rules).await;
    wait_for("the first start", async || stage.checkpoint().await?.owing.is_empty().then_some(())).await;
    (stage, rules, daemon)
}

/// Every key that the category `a` makes, and one of `b`.
const STALE: [&str; 3] = ["list:a", "page:a:1", "elsewhere"];

async fn fill(stage: &Stage) {
    for key in STALE.iter().chain(&["list:b"]) {
        stage.put(key, "old").await;
    }
    let () = stage.cache().await.sadd("test:tag:cat:a", "elsewhere").await.unwrap();
}

async fn left(stage: &Stage, keys: &[&str]) -> usize {
    let keys: Vec<String> = keys.iter().map(|key| format!("test:{key}")).collect();
    stage.cache().await.exists(keys).await.unwrap()
}

async fn gone(stage: &Stage) {
    wait_for("the stale keys to go", async || (left(stage, &STALE).await == 0).then_some(())).await;
}

async fn end_of_log(stage: &Stage) -> Lsn {
    let end: String = stage.sql().await.query_one("select pg_current_wal_lsn()::text", &[]).await.unwrap().get(0);
    end.parse().unwrap()
}

#[tokio::test]
async fn what_is_filled_late_goes_once_more() {
    let (stage, _rules, _daemon) = set(RULES).await;
    fill(&stage).await;
    stage.execute("insert into rows values (1, 'a')").await;
    let (committed, end) = (Instant::now(), end_of_log(&stage).await);
    gone(&stage).await;
    fill(&stage).await;
    gone(&stage).await;
    assert!(committed.elapsed() >= DELAY, "{:?}", committed.elapsed());
    assert_eq!(left(&stage, &["list:b", "row:1"]).await, 2, "and nothing else");
    // Filled after that it stays.
    fill(&stage).await;
    wait_for("the log to be let go", async || (stage.checkpoint().await?.low >= end).then_some(())).await;
    assert_eq!(left(&stage, &STALE).await, STALE.len());
}

#[tokio::test]
async fn a_kill_forgets_nothing_that_is_to_go_once_more() {
    let (stage, rules, daemon) = set(RULES).await;
    let before = end_of_log(&stage).await;
    stage.execute("insert into rows values (1, 'a')").await;
    wait_for("the row", async || stage.get::<Option<String>>("row:1").await).await;
    let end = end_of_log(&stage).await;
    // A later change has nothing to wait for, and the log is kept all the same.
    stage.execute("insert into rows values (2, null)").await;
    wait_for("the next row", async || stage.get::<Option<String>>("row:2").await).await;
    let low = stage.checkpoint().await.unwrap().low;
    assert!((before..end).contains(&low), "{before} {low} {end}");
    daemon.kill();
    fill(&stage).await;
    let _daemon = Daemon::start(&stage, &rules).await;
    gone(&stage).await;
    assert_eq!(left(&stage, &["list:b"]).await, 1);
}

#[tokio::test]
async fn the_stream_does_not_wait_for_what_is_to_go_once_more() {
    // Going through all keys for so many patterns would take long.
    let only_keys = |line: &&str| !line.starts_with("delete_");
    let rules = RULES.lines().filter(only_keys).collect::<Vec<_>>().join("\n");
    let (stage, _rules, _daemon) = set(&rules).await;
    fill(&stage).await;
    stage.execute("insert into rows select i, 'c' || i from generate_series(1, 50000) i").await;
    wait_for("the last row", async || stage.get::<Option<String>>("row:50000").await).await;
    // So many keys that the rule's templates stand for them: those go too that no row names.
    gone_among_others(&stage).await;
    // A TRUNCATE names no key either.
    stage.execute("truncate rows").await;
    wait_for("no row", async || (left(&stage, &["row:50000"]).await == 0).then_some(())).await;
    fill(&stage).await;
    gone_among_others(&stage).await;
}

async fn gone_among_others(stage: &Stage) {
    wait_for("every list to go", async || (left(stage, &["list:a", "list:b"]).await == 0).then_some(())).await;
}
