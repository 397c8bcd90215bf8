//! Every loss is recognised, named, and mended: in a new epoch every rule is reconciled. With `on_gap = "stop"` it stops
//! the daemon instead (I5). Nothing is recognised that is none.

use std::fs;
use std::path::PathBuf;

use keepstep::model::Lsn;
use serde_json::Value;

use crate::support::{Daemon, Mirror, Stage, assert_in_step, wait_for};

const ROWS: &str = r#"
[rule.row]
table   = "public.rows"
key     = "row:{id}"
value   = "json"
columns = ["id", "version"]

[rule.list]
table  = "public.rows"
delete = ["list:{id}"]
"#;

const MIRROR: Mirror<'_> = Mirror { table: "rows", key: "'row:' || id", columns: "id, version" };
const NEW_RULE: &str = r#"
[rule.new]
table   = "public.rows"
key     = "new:{id}"
value   = "json"
columns = ["id"]
"#;

const NEW_MIRROR: Mirror<'_> = Mirror { table: "rows", key: "'new:' || id", columns: "id" };
const TABLE: &str = "create table rows (id int primary key, version bigint not null)";

/// What a gap does.
#[derive(Clone, Copy, PartialEq)]
enum OnGap {
    Reconcile,
    Stop,
}

const BOTH: [OnGap; 2] = [OnGap::Reconcile, OnGap::Stop];

/// A daemon that has written something, beside keys that only a reconcile takes away: one whose row is gone, and one that
/// is stale.
async fn running(stage: &Stage, on_gap: OnGap, more: &str) -> (PathBuf, Daemon) {
    let started = following(stage, on_gap, more).await;
    stage.put("row:77", "no row has this key").await;
    stage.put("list:1", "from before the gap").await;
    started
}

/// A daemon that has written something.
async fn following(stage: &Stage, on_gap: OnGap, more: &str) -> (PathBuf, Daemon) {
    stage.execute(TABLE).await;
    let rules = stage.rules(ROWS);
    let on_gap = if on_gap == OnGap::Stop { "on_gap = \"stop\"" } else { "" };
    let text = fs::read_to_string(&rules).unwrap();
    fs::write(&rules, text.replace("\n\n[redis]", &format!("\n{on_gap}\n{more}\n\n[redis]"))).unwrap();
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(stage, &rules).await;
    stage.execute("insert into rows values (1, 1)").await;
    assert_in_step(stage, &[MIRROR]).await;
    (rules, daemon)
}

/// The gap was recognised, for this reason, and everything is right again. With `on_gap = "stop"` the daemon ends instead,
/// and says this.
async fn answers(stage: &Stage, daemon: Daemon, on_gap: OnGap, reason: &str, said: &str) {
    match on_gap {
        OnGap::Stop => ends(daemon, said).await,
        OnGap::Reconcile => mends(stage, &daemon, reason).await,
    }
}

async fn mends(stage: &Stage, daemon: &Daemon, reason: &str) {
    let counted = format!("keepstep_reconciles_total{{reason=\"{reason}\"}} 1");
    wait_for(&counted, async || {
        let (_, metrics) = daemon.get("/metrics").await?;
        metrics.contains(&counted).then_some(())
    })
    .await;
    stage.execute("insert into rows values (1000, 1)").await;
    assert_in_step(stage, &[MIRROR]).await;
    nothing_is_owed(daemon).await;
}

async fn nothing_is_owed(daemon: &Daemon) {
    wait_for("all debts to be paid", async || (daemon.metric("keepstep_rules_owing").await == Some(0.0)).then_some(()))
        .await;
}

/// The daemon must end by itself with exit code 1, and say this, and how to mend it.
async fn ends(daemon: Daemon, said: &str) {
    let log = daemon.log_path();
    let status = daemon.end().await;
    let log = fs::read_to_string(log).unwrap();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains(said) && log.contains("hint: `keepstep run --adopt`"), "should say `{said}`:\n{log}");
}

async fn redis_command(stage: &Stage, words: &[&str]) {
    let mut command = redis::cmd(words[0]);
    words[1..].iter().for_each(|word| _ = command.arg(*word));
    let () = command.query_async(&mut stage.cache().await).await.unwrap();
}

/// Until Postgres has heard of everything that the cache holds by now.
async fn acknowledged(stage: &Stage) {
    let sql = stage.sql().await;
    let lsn: String = sql.query_one("select pg_current_wal_flush_lsn()::text", &[]).await.unwrap().get(0);
    let query = format!("select confirmed_flush_lsn >= '{lsn}' from pg_replication_slots where slot_name = 'keepstep'");
    wait_for("the acknowledgement", async || sql.query_one(&query, &[]).await.unwrap().get::<_, bool>(0).then_some(()))
        .await;
}

#[tokio::test]
async fn a_first_start_is_no_gap_and_neither_is_the_next() {
    let stage = Stage::set();
    let (rules, daemon) = following(&stage, OnGap::Stop, "").await;
    nothing_is_owed(&daemon).await;
    assert!(daemon.terminate().await.success());
    let again = Daemon::start(&stage, &rules).await;
    assert_eq!(again.metric("keepstep_reconciles_total").await, Some(0.0));
}

#[tokio::test]
async fn a_first_start_beside_keys_of_somebody_else_reconciles() {
    let stage = Stage::set();
    stage.put("row:7", "written by the application, of a row that is gone").await;
    stage.put("list:7", "filled by the application before anybody invalidated it").await;
    let (_, daemon) = following(&stage, OnGap::Stop, "").await;
    nothing_is_owed(&daemon).await;
    assert_eq!(daemon.metric("keepstep_reconciles_total").await, Some(0.0), "nothing was lost");
}

#[tokio::test]
async fn changed_rules_reconcile_and_new_ones_warm() {
    let stage = Stage::set();
    let (rules, daemon) = following(&stage, OnGap::Stop, "").await;
    assert!(daemon.terminate().await.success());
    let text = fs::read_to_string(&rules).unwrap().replace("list:{id}", "lists:{id}");
    fs::write(&rules, text + NEW_RULE).unwrap();
    stage.put("lists:1", "from before the rule deleted it").await;
    let daemon = Daemon::start(&stage, &rules).await;
    assert_in_step(&stage, &[MIRROR, NEW_MIRROR]).await;
    let (_, metrics) = daemon.get("/metrics").await.unwrap();
    assert!(metrics.contains("keepstep_reconciles_total{reason=\"rules_changed\"} 1"), "{metrics}");
}

/// Until the read of a table that a rule owes has come somewhere, and its end is far.
async fn half_read(stage: &Stage) {
    wait_for("a read half done", async || {
        (checkpoint(stage).await["progress"]["from"]["page"].as_u64()? > 0).then_some(())
    })
    .await;
}

async fn checkpoint(stage: &Stage) -> Value {
    let stored: String = stage.get("keepstep:checkpoint").await;
    serde_json::from_str(&stored).unwrap()
}

const SLOWLY: &str = "warm_rate = \"2000/s\"";

/// A stage with rows that take a while to be read, and its rules file.
async fn with_many_rows() -> (Stage, PathBuf) {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    // An updated row stays on its page.
    stage.execute("alter table rows set (fillfactor = 50)").await;
    stage.execute("insert into rows select i, 1 from generate_series(1, 40000) i").await;
    let rules = stage.rules(ROWS);
    let text = fs::read_to_string(&rules).unwrap();
    fs::write(&rules, text.replace("\n\n[redis]", &format!("\n{SLOWLY}\n\n[redis]"))).unwrap();
    stage.keepstep(&["setup"]);
    (stage, rules)
}

#[tokio::test]
async fn a_rule_added_while_its_table_is_read_misses_no_row() {
    let (stage, rules) = with_many_rows().await;
    let daemon = Daemon::start(&stage, &rules).await;
    half_read(&stage).await;
    daemon.kill();
    let text = fs::read_to_string(&rules).unwrap().replace(SLOWLY, "");
    fs::write(&rules, text + NEW_RULE).unwrap();
    let _daemon = Daemon::start(&stage, &rules).await;
    assert_in_step(&stage, &[MIRROR, NEW_MIRROR]).await;
}

/// Keys that were written already are deleted, because there is no room for a change of their rows.
#[tokio::test]
async fn running_out_of_memory_while_a_table_is_read_misses_no_row() {
    let (stage, rules) = with_many_rows().await;
    let daemon = Daemon::start(&stage, &rules).await;
    half_read(&stage).await;
    redis_command(&stage, &["CONFIG", "SET", "maxmemory", "1"]).await;
    stage.execute("update rows set version = 2 where id <= 10").await;
    let sql = stage.sql().await;
    let changed: String = sql.query_one("select pg_current_wal_flush_lsn()::text", &[]).await.unwrap().get(0);
    wait_for("the change to be done with", async || {
        let good: Lsn = checkpoint(&stage).await["good"]["lsn"].as_str()?.parse().ok()?;
        (good >= changed.parse().unwrap()).then_some(())
    })
    .await;
    let held: Option<String> = stage.get("row:1").await;
    assert_eq!(held, None);
    daemon.kill();
    redis_command(&stage, &["CONFIG", "SET", "maxmemory", "0"]).await;
    let text = fs::read_to_string(&rules).unwrap().replace(SLOWLY, "");
    fs::write(&rules, text).unwrap();
    let _daemon = Daemon::start(&stage, &rules).await;
    assert_in_step(&stage, &[MIRROR]).await;
}

#[tokio::test]
async fn flushall_while_running() {
    for on_gap in BOTH {
        let stage = Stage::set();
        let (_, daemon) = running(&stage, on_gap, "replay_window = \"0s\"").await;
        redis_command(&stage, &["FLUSHALL"]).await;
        // Cuts no connection, and is seen before anything is written over it.
        stage.execute("insert into rows values (2, 1)").await;
        answers(&stage, daemon, on_gap, "cache_lost", "Redis has lost the checkpoint").await;
        if on_gap == OnGap::Stop {
            let keys: Vec<String> = redis::cmd("KEYS").arg("*").query_async(&mut stage.cache().await).await.unwrap();
            assert!(keys.is_empty(), "{keys:?}");
        }
    }
}

#[tokio::test]
async fn flushall_while_nothing_changes() {
    let stage = Stage::set();
    let (_, daemon) = running(&stage, OnGap::Reconcile, "heartbeat = \"off\"").await;
    redis_command(&stage, &["FLUSHALL"]).await;
    mends(&stage, &daemon, "cache_lost").await;
}

#[tokio::test]
async fn redis_comes_back_empty() {
    for on_gap in BOTH {
        let mut stage = Stage::set();
        let (_, daemon) = running(&stage, on_gap, "").await;
        stage.redis.stop("KILL").unwrap();
        stage.redis.resume().unwrap();
        answers(&stage, daemon, on_gap, "cache_lost", "Redis has lost the checkpoint").await;
    }
}

/// As a replica that has everything, or an append-only file: who answers is another, and nothing was lost.
#[tokio::test]
async fn redis_comes_back_whole() {
    let mut stage = Stage::set_with("", &["--appendonly", "yes", "--appendfsync", "always"]);
    let (_, daemon) = following(&stage, OnGap::Stop, "heartbeat = \"off\"").await;
    let epoch = daemon.metric("keepstep_epoch").await;
    stage.redis.stop("KILL").unwrap();
    stage.redis.resume().unwrap();
    wait_for("the restart to be seen", async || daemon.log().contains("Redis was restarted").then_some(())).await;
    stage.execute("insert into rows values (2, 1)").await;
    assert_in_step(&stage, &[MIRROR]).await;
    assert_eq!(daemon.metric("keepstep_epoch").await, epoch);
}

#[tokio::test]
async fn redis_was_emptied_while_the_daemon_was_away() {
    for on_gap in BOTH {
        let stage = Stage::set();
        let (rules, daemon) = running(&stage, on_gap, "replay_window = \"0s\"").await;
        acknowledged(&stage).await;
        daemon.kill();
        redis_command(&stage, &["FLUSHALL"]).await;
        let said = "Redis holds no checkpoint, but the slot was read up to";
        answers(&stage, Daemon::spawn(&stage, &rules, &[]), on_gap, "cache_lost", said).await;
        if on_gap == OnGap::Stop {
            // What the message offers.
            let mut adopted = Daemon::spawn(&stage, &rules, &["--adopt"]);
            adopted.ready().await;
            mends(&stage, &adopted, "cache_lost").await;
        }
    }
}

#[tokio::test]
async fn the_checkpoint_was_evicted() {
    for on_gap in BOTH {
        let stage = Stage::set();
        let (rules, daemon) = running(&stage, on_gap, "").await;
        daemon.kill();
        redis_command(&stage, &["DEL", "test:keepstep:checkpoint"]).await;
        stage.execute("comment on publication keepstep is null").await;
        let said = "Redis holds keys under the prefix but no checkpoint";
        answers(&stage, Daemon::spawn(&stage, &rules, &[]), on_gap, "cache_lost", said).await;
    }
}

#[tokio::test]
async fn what_the_catalog_was_when_the_cache_was_right_was_evicted() {
    let stage = Stage::set();
    let (rules, daemon) = running(&stage, OnGap::Reconcile, "").await;
    assert!(daemon.terminate().await.success());
    redis_command(&stage, &["DEL", "test:keepstep:catalog"]).await;
    mends(&stage, &Daemon::start(&stage, &rules).await, "catalog").await;
}

#[tokio::test]
async fn an_older_cache_is_replayed_while_the_slot_still_holds_what_it_lacks() {
    let mut stage = Stage::set_with("", &["--dbfilename", "old.rdb"]);
    let (_, daemon) = following(&stage, OnGap::Stop, "").await;
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
    for on_gap in BOTH {
        let mut stage = Stage::set_with("", &["--dbfilename", "old.rdb"]);
        let (_, daemon) = running(&stage, on_gap, "replay_window = \"0s\"").await;
        redis_command(&stage, &["SAVE"]).await;
        stage.execute("insert into rows values (2, 1)").await;
        acknowledged(&stage).await;
        stage.redis.stop("KILL").unwrap();
        stage.redis.resume().unwrap();
        stage.execute("insert into rows values (3, 1)").await;
        answers(&stage, daemon, on_gap, "went_back", "the slot sends nothing before").await;
    }
}

#[tokio::test]
async fn the_slot_was_dropped() {
    for on_gap in BOTH {
        let stage = Stage::set();
        let (rules, daemon) = running(&stage, on_gap, "").await;
        assert!(daemon.terminate().await.success());
        stage.execute("select pg_drop_replication_slot('keepstep')").await;
        let said = "the replication slot `keepstep` is gone";
        answers(&stage, Daemon::spawn(&stage, &rules, &[]), on_gap, "slot_lost", said).await;
        if on_gap == OnGap::Stop {
            let mut adopted = Daemon::spawn(&stage, &rules, &["--adopt"]);
            adopted.ready().await;
            mends(&stage, &adopted, "slot_lost").await;
        }
    }
}

/// Much is written elsewhere while Redis is away: Postgres's disk comes first.
#[tokio::test]
async fn a_slot_that_keeps_too_much_is_given_up() {
    for on_gap in BOTH {
        let mut stage = Stage::set();
        let (_, daemon) = match on_gap {
            OnGap::Reconcile => running(&stage, on_gap, "max_retained = \"1MiB\"").await,
            OnGap::Stop => following(&stage, on_gap, "max_retained = \"1MiB\"").await,
        };
        redis_command(&stage, &["SAVE"]).await;
        stage.redis.stop("TERM").unwrap();
        stage.execute("update rows set version = 2").await;
        stage.execute("create table other as select g, repeat('x', 100) from generate_series(1, 20000) g").await;
        let slots = "select count(*) from pg_replication_slots";
        let sql = stage.sql().await;
        let count = async || sql.query_one(slots, &[]).await.unwrap().get::<_, i64>(0);
        if on_gap == OnGap::Reconcile {
            wait_for("the slot to be given up", async || (count().await == 0).then_some(())).await;
        }
        stage.redis.resume().unwrap();
        match on_gap {
            OnGap::Reconcile => mends(&stage, &daemon, "slot_lost").await,
            OnGap::Stop => {
                assert_in_step(&stage, &[MIRROR]).await;
                assert_eq!(count().await, 1);
            }
        }
    }
}

/// Drops the slot from under the daemon that streams it.
async fn drop_streaming_slot(stage: &Stage) {
    let sql = stage.sql().await;
    wait_for("the slot to be dropped", async || {
        let _ = sql.execute("select pg_terminate_backend(active_pid) from pg_replication_slots", &[]).await;
        sql.execute("select pg_drop_replication_slot('keepstep')", &[]).await.ok()
    })
    .await;
}

#[tokio::test]
async fn the_slot_was_dropped_while_streaming() {
    for on_gap in BOTH {
        let stage = Stage::set();
        let (_, daemon) = running(&stage, on_gap, "").await;
        drop_streaming_slot(&stage).await;
        answers(&stage, daemon, on_gap, "slot_lost", "the replication slot `keepstep` is gone").await;
    }
}

/// The new one is keepstep's own: noted where it was made, so that a loss of the cache is known, and taken down again.
#[tokio::test]
async fn the_slot_made_anew_is_noted_and_can_be_torn_down() {
    let stage = Stage::set();
    let (_, daemon) = running(&stage, OnGap::Reconcile, "").await;
    let sql = stage.sql().await;
    let notes = async || {
        let comment = sql.query_one("select obj_description(oid) from pg_publication", &[]).await.unwrap();
        let lines = comment.get::<_, String>(0).lines().map(str::to_owned).collect::<Vec<_>>();
        lines.into_iter().filter(|line| line.starts_with("keepstep: slot keepstep made at ")).collect::<Vec<_>>()
    };
    let before = notes().await;
    drop_streaming_slot(&stage).await;
    mends(&stage, &daemon, "slot_lost").await;
    let after = notes().await;
    assert!(after.len() == 1 && after != before, "{before:?} became {after:?}");
    assert!(daemon.terminate().await.success());
    let torn_down = stage.keepstep(&["teardown"]);
    assert!(torn_down.contains("drop slot `keepstep`: done"), "{torn_down}");
}

/// The role may replicate, but the publication is the DBA's.
#[tokio::test]
async fn a_slot_is_made_anew_without_owning_the_publication() {
    let stage = Stage::set();
    let (rules, daemon) = running(&stage, OnGap::Reconcile, "").await;
    assert!(daemon.terminate().await.success());
    stage.execute("create role follower login replication; grant select on rows to follower").await;
    let text = fs::read_to_string(&rules).unwrap().replace("//postgres@", "//follower@");
    fs::write(&rules, text).unwrap();
    stage.execute("select pg_drop_replication_slot('keepstep')").await;
    let daemon = Daemon::start(&stage, &rules).await;
    mends(&stage, &daemon, "slot_lost").await;
    assert!(daemon.log().contains("does not own publication"), "{}", daemon.log());
}

#[tokio::test]
async fn making_the_slot_waits_for_transactions_and_the_daemon_stays_alive() {
    let stage = Stage::set();
    let (rules, daemon) = running(&stage, OnGap::Reconcile, "").await;
    assert!(daemon.terminate().await.success());
    stage.execute("select pg_drop_replication_slot('keepstep')").await;
    let busy = stage.sql().await;
    busy.batch_execute("begin; insert into rows values (500, 1)").await.unwrap();
    let daemon = Daemon::spawn(&stage, &rules, &[]);
    wait_for("the log to name whoever is waited for", async || {
        daemon.log().contains("waits for the transactions under way").then_some(())
    })
    .await;
    assert_eq!(daemon.get("/live").await.map(|(status, _)| status), Some(200));
    busy.batch_execute("commit").await.unwrap();
    mends(&stage, &daemon, "slot_lost").await;
}

#[tokio::test]
async fn the_slot_was_made_anew_by_somebody() {
    for on_gap in BOTH {
        let stage = Stage::set();
        let (rules, daemon) = running(&stage, on_gap, "").await;
        assert!(daemon.terminate().await.success());
        stage.execute("select pg_drop_replication_slot('keepstep')").await;
        stage.execute("insert into rows values (50, 1)").await;
        stage.execute("select pg_create_logical_replication_slot('keepstep', 'pgoutput')").await;
        let said = "the slot sends nothing before";
        answers(&stage, Daemon::spawn(&stage, &rules, &[]), on_gap, "slot_moved", said).await;
    }
}

#[tokio::test]
async fn the_server_gave_the_slot_up() {
    for on_gap in BOTH {
        let stage = Stage::set_with("max_slot_wal_keep_size = 1MB\nmax_wal_size = 32MB\nmin_wal_size = 32MB", &[]);
        let (rules, daemon) = running(&stage, on_gap, "").await;
        daemon.kill();
        for _ in 0..4 {
            stage.execute("select pg_logical_emit_message(false, 'x', repeat('x', 20000000))").await;
            stage.execute("select pg_switch_wal()").await;
            stage.execute("checkpoint").await;
        }
        let daemon = Daemon::spawn(&stage, &rules, &[]);
        answers(&stage, daemon, on_gap, "slot_lost", "invalidated by the server").await;
    }
}

#[tokio::test]
async fn a_promotion_ends_the_history_though_the_slot_is_there() {
    for on_gap in BOTH {
        let mut stage = Stage::set_with("restore_command = '/bin/false'", &[]);
        let (_, daemon) = running(&stage, on_gap, "").await;
        stage.postgres.stop("INT").unwrap();
        // Recovery from an archive that holds nothing: it ends at once, on the next timeline.
        fs::write(stage.postgres.data().join("recovery.signal"), "").unwrap();
        stage.postgres.resume().unwrap();
        answers(&stage, daemon, on_gap, "promoted", "the server was promoted (timeline 1 became 2)").await;
    }
}

#[tokio::test]
async fn another_database_answers_under_the_same_name() {
    let stage = Stage::set();
    let (rules, daemon) = following(&stage, OnGap::Reconcile, "").await;
    assert!(daemon.terminate().await.success());
    stage.execute("create database other").await;
    let url = stage.postgres.url("other");
    let text = fs::read_to_string(&rules).unwrap().replace(&stage.postgres.url("postgres"), &url);
    fs::write(&rules, text).unwrap();
    let daemon = Daemon::spawn(&stage, &rules, &[]);
    let log = daemon.log_path();
    assert_eq!(daemon.end().await.code(), Some(1));
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("slot `keepstep` belongs to postgres, and keepstep is connected to other"), "{log}");
}

/// Whatever is missing there: a slot is never made on a server that the cache was not made from.
#[tokio::test]
async fn another_server_answers_under_the_same_name() {
    let stage = Stage::set();
    let (rules, daemon) = following(&stage, OnGap::Reconcile, "").await;
    assert!(daemon.terminate().await.success());
    let other = keepstep::sandbox::Postgres::start("").unwrap();
    let text = fs::read_to_string(&rules).unwrap();
    fs::write(&rules, text.replace(&stage.postgres.url("postgres"), &other.url("postgres"))).unwrap();
    let daemon = Daemon::spawn(&stage, &rules, &[]);
    let log = daemon.log_path();
    assert_eq!(daemon.end().await.code(), Some(1));
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("this cache was made from another source: its system identifier is"), "{log}");
    let (client, connection) = tokio_postgres::connect(&other.url("postgres"), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let slots: i64 = client.query_one("select count(*) from pg_replication_slots", &[]).await.unwrap().get(0);
    assert_eq!(slots, 0);
}

/// `warm = false`: keys are there because somebody changed their row, or asked for them. What a gap makes right are those.
#[tokio::test]
async fn a_gap_fills_no_key_that_may_be_missing() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    stage.execute("insert into rows values (1, 1), (2, 1), (3, 1)").await;
    let rules =
        stage.rules(&ROWS.replace("columns = [\"id\", \"version\"]", "columns = [\"id\", \"version\"]\nwarm = false"));
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(&stage, &rules).await;
    stage.execute("update rows set version = 2 where id = 1").await;
    wait_for("the key of the row that changed", async || stage.get::<Option<String>>("row:1").await).await;
    stage.put("row:1", "stale").await;
    stage.put("row:77", "no row has this key").await;
    drop_streaming_slot(&stage).await;
    let counted = "keepstep_reconciles_total{reason=\"slot_lost\"} 1";
    wait_for("the gap", async || daemon.get("/metrics").await?.1.contains(counted).then_some(())).await;
    nothing_is_owed(&daemon).await;
    assert_eq!(stage.get::<Option<String>>("row:1").await.as_deref(), Some(r#"{"id":1,"version":2}"#));
    for missing in ["row:2", "row:3", "row:77"] {
        assert_eq!(stage.get::<Option<String>>(missing).await, None, "{missing}");
    }
}
