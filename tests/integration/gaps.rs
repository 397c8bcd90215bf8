//! Every loss is recognised, named, and stops the daemon (I5); nothing is recognised that is none.

use crate::support::{Daemon, Mirror, Stage, assert_in_step, wait_for};

const ROWS: &str = r#"
[rule.row]
table   = "public.rows"
key     = "row:{id}"
value   = "json"
columns = ["id", "version"]
"#;

const MIRROR: Mirror<'_> = Mirror { table: "rows", key: "'row:' || id", columns: "id, version" };
const TABLE: &str = "create table rows (id int primary key, version bigint not null)";

/// A daemon that has written something.
async fn running(stage: &Stage, postgres: &str) -> (std::path::PathBuf, Daemon) {
    stage.execute(TABLE).await;
    let rules = stage.rules(ROWS);
    let text = std::fs::read_to_string(&rules).unwrap().replace("\n\n[redis]", &format!("\n{postgres}\n\n[redis]"));
    std::fs::write(&rules, text).unwrap();
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(stage, &rules).await;
    stage.execute("insert into rows values (1, 1)").await;
    assert_in_step(stage, &[MIRROR]).await;
    (rules, daemon)
}

/// The daemon must end by itself with exit code 1, and say this.
async fn ends(daemon: Daemon, said: &str) {
    let log = daemon.log_path();
    let status = daemon.end().await;
    let log = std::fs::read_to_string(log).unwrap();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains(said) && log.contains("hint:"), "should say `{said}`:\n{log}");
}

async fn redis_command(stage: &Stage, words: &[&str]) {
    let mut command = redis::cmd(words[0]);
    words[1..].iter().for_each(|word| _ = command.arg(*word));
    let () = command.query_async(&mut stage.cache().await).await.unwrap();
}

#[tokio::test]
async fn flushall_while_running() {
    let stage = Stage::set();
    let (_, daemon) = running(&stage, "replay_window = \"0s\"").await;
    redis_command(&stage, &["FLUSHALL"]).await;
    // Cuts no connection, and is seen before anything is written over it.
    stage.execute("insert into rows values (2, 1)").await;
    ends(daemon, "Redis has lost the checkpoint").await;
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query_async(&mut stage.cache().await).await.unwrap();
    assert!(keys.is_empty(), "{keys:?}");
}

#[tokio::test]
async fn redis_comes_back_empty() {
    let mut stage = Stage::set();
    let (_, daemon) = running(&stage, "").await;
    stage.redis.stop("KILL").unwrap();
    stage.redis.resume().unwrap();
    stage.execute("insert into rows values (2, 1)").await;
    ends(daemon, "Redis has lost the checkpoint").await;
}

#[tokio::test]
async fn redis_was_emptied_while_the_daemon_was_away() {
    let stage = Stage::set();
    let (rules, daemon) = running(&stage, "replay_window = \"0s\"").await;
    let sql = stage.sql().await;
    wait_for("an acknowledgement", async || {
        let query = "select confirmed_flush_lsn > substring(obj_description(p.oid) from 'made at ([0-9A-F/]+)')::pg_lsn \
                     from pg_replication_slots, pg_publication p where slot_name = 'keepstep' and pubname = 'keepstep'";
        sql.query_one(query, &[]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
    daemon.kill();
    redis_command(&stage, &["FLUSHALL"]).await;
    ends(Daemon::spawn(&stage, &rules, &[]), "Redis holds no checkpoint, but the slot was read up to").await;
    // What the message offers.
    let mut adopted = Daemon::spawn(&stage, &rules, &["--adopt"]);
    adopted.ready().await;
    stage.execute("update rows set version = version + 1").await;
    assert_in_step(&stage, &[MIRROR]).await;
}

#[tokio::test]
async fn the_checkpoint_was_evicted() {
    let stage = Stage::set();
    let (rules, daemon) = running(&stage, "").await;
    daemon.kill();
    redis_command(&stage, &["DEL", "test:keepstep:checkpoint"]).await;
    stage.execute("comment on publication keepstep is null").await;
    ends(Daemon::spawn(&stage, &rules, &[]), "Redis holds keys under the prefix but no checkpoint").await;
}

#[tokio::test]
async fn an_older_cache_is_replayed_while_the_slot_still_holds_what_it_lacks() {
    let mut stage = Stage::set_with("", &["--dbfilename", "old.rdb"]);
    let (_, daemon) = running(&stage, "").await;
    let epoch = daemon.metric("keepstep_epoch").await;
    redis_command(&stage, &["SAVE"]).await;
    stage.execute("update rows set version = 2; insert into rows values (2, 1)").await;
    assert_in_step(&stage, &[MIRROR]).await;
    // Back with the older dump, as a replica promoted too early would be.
    stage.redis.stop("KILL").unwrap();
    stage.redis.resume().unwrap();
    stage.execute("insert into rows values (3, 1)").await;
    assert_in_step(&stage, &[MIRROR]).await;
    wait_for("a new epoch", async || (daemon.metric("keepstep_epoch").await > epoch).then_some(())).await;
}

#[tokio::test]
async fn an_older_cache_than_the_slot_can_bridge() {
    let mut stage = Stage::set_with("", &["--dbfilename", "old.rdb"]);
    let (_, daemon) = running(&stage, "replay_window = \"0s\"").await;
    redis_command(&stage, &["SAVE"]).await;
    let sql = stage.sql().await;
    stage.execute("insert into rows values (2, 1)").await;
    let lsn: String = sql.query_one("select pg_current_wal_flush_lsn()::text", &[]).await.unwrap().get(0);
    let acknowledged = format!("select confirmed_flush_lsn >= '{lsn}' from pg_replication_slots");
    wait_for("the acknowledgement", async || {
        sql.query_one(&acknowledged, &[]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
    stage.redis.stop("KILL").unwrap();
    stage.redis.resume().unwrap();
    stage.execute("insert into rows values (3, 1)").await;
    ends(daemon, "the slot sends nothing before").await;
}

#[tokio::test]
async fn the_slot_was_dropped() {
    let stage = Stage::set();
    let (rules, daemon) = running(&stage, "").await;
    assert!(daemon.terminate().await.success());
    stage.execute("select pg_drop_replication_slot('keepstep')").await;
    ends(Daemon::spawn(&stage, &rules, &[]), "the replication slot `keepstep` is gone").await;
}

#[tokio::test]
async fn the_slot_was_made_anew() {
    let stage = Stage::set();
    let (rules, daemon) = running(&stage, "").await;
    assert!(daemon.terminate().await.success());
    stage.execute("select pg_drop_replication_slot('keepstep')").await;
    stage.execute("insert into rows values (50, 1)").await;
    stage.execute("select pg_create_logical_replication_slot('keepstep', 'pgoutput')").await;
    ends(Daemon::spawn(&stage, &rules, &[]), "the slot sends nothing before").await;
}

#[tokio::test]
async fn the_server_gave_the_slot_up() {
    let stage = Stage::set_with("max_slot_wal_keep_size = 1MB\nmax_wal_size = 32MB\nmin_wal_size = 32MB", &[]);
    let (rules, daemon) = running(&stage, "").await;
    daemon.kill();
    for _ in 0..4 {
        stage.execute("select pg_logical_emit_message(false, 'x', repeat('x', 20000000))").await;
        stage.execute("select pg_switch_wal()").await;
        stage.execute("checkpoint").await;
    }
    ends(Daemon::spawn(&stage, &rules, &[]), "invalidated by the server").await;
}

#[tokio::test]
async fn another_database_answers_under_the_same_name() {
    let stage = Stage::set();
    let (rules, daemon) = running(&stage, "").await;
    assert!(daemon.terminate().await.success());
    stage.execute("create database other").await;
    let url = stage.postgres.url("other");
    let text = std::fs::read_to_string(&rules).unwrap().replace(&stage.postgres.url("postgres"), &url);
    std::fs::write(&rules, text).unwrap();
    ends(Daemon::spawn(&stage, &rules, &[]), "slot `keepstep` belongs to postgres, and keepstep is connected to other")
        .await;
}
