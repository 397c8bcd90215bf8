//! What only an outbox can get wrong: rows that become visible late, rows that are removed, and whoever writes them.
//!
//! Everything else is tried by the tests of the other source: with `KEEPSTEP_TEST_SOURCE=outbox` they run on this one.

use std::path::PathBuf;
use std::time::Duration;

use keepstep::error::ErrorKind;
use keepstep::source::{client, outbox};

use crate::source::{info, url};
use crate::support::{
    Daemon, Mirror, Reader, Replica, Stage, assert_in_step, comes_within, lasts, reads_outbox, signal, wait_for,
};

const ROWS: &str = r#"
[rule.row]
table   = "public.rows"
key     = "row:{id}"
value   = "json"
columns = ["id", "version", "filler"]
"#;

const MIRROR: Mirror<'_> = Mirror { table: "rows", key: "'row:' || id", columns: "id, version, filler" };
const TABLE: &str = "create table rows (id int primary key, version bigint not null, filler text)";
const SETTINGS: &str = "wal_level = replica";

/// A rules file for an outbox, with more lines for `[postgres]`, and what setup makes of it.
async fn set(stage: &Stage, lines: &str) -> PathBuf {
    set_rules(stage, lines, ROWS).await
}

/// The same of other rules.
async fn set_rules(stage: &Stage, lines: &str, rules: &str) -> PathBuf {
    stage.execute(TABLE).await;
    let rules = stage.rules(rules);
    let source = if reads_outbox() { "" } else { "source = \"outbox\"\n" };
    stage.set_fields("[postgres]", &format!("{source}{lines}"));
    stage.keepstep(&["setup"]);
    rules
}

/// How many bytes of rows the outbox holds.
async fn bytes(stage: &Stage) -> i64 {
    let sql = "select pg_relation_size('keepstep.outbox_0') + pg_relation_size('keepstep.outbox_1')";
    stage.sql().await.query_one(sql, &[]).await.unwrap().get(0)
}

/// Up to where its rows may be gone.
async fn confirmed(stage: &Stage) -> String {
    stage.sql().await.query_one("select confirmed_lsn::text from keepstep.state", &[]).await.unwrap().get(0)
}

async fn emptied(stage: &Stage) {
    wait_for("an empty outbox", async || (bytes(stage).await == 0).then_some(())).await;
}

#[tokio::test]
async fn what_commits_late_is_neither_lost_nor_undone() {
    let mut stage = Stage::set_with("wal_level = replica\nmax_prepared_transactions = 10", &[]);
    let rules = set(&stage, "replay_window = \"0s\"").await;
    let mut daemon = Daemon::start(&stage, &rules).await;
    let reader = Reader::follow(&stage, "row:1");
    stage.execute("insert into rows values (1, 1, 'x')").await;
    let late = stage.sql().await;
    late.batch_execute(
        "begin; insert into rows values (2, 1, 'late'); savepoint s; insert into rows values (3, 1, 'never')",
    )
    .await
    .unwrap();
    late.batch_execute("rollback to s; insert into rows values (4, 1, 'later')").await.unwrap();
    let prepared = "begin; insert into rows values (5, 1, 'prepared'); update rows set version = 2 where id = 1;
                    prepare transaction 'p'";
    stage.execute(prepared).await;
    for version in 1..=20 {
        stage
            .execute(&format!(
                "insert into rows values (100, {version}, 'y') on conflict (id) do update set version = {version}"
            ))
            .await;
        match version {
            7 => late.batch_execute("update rows set filler = 'still open' where id = 2").await.unwrap(),
            10 => {
                daemon.kill();
                daemon = Daemon::start(&stage, &rules).await;
            }
            _ => {}
        }
    }
    wait_for("what commits meanwhile", async || {
        let held: Option<String> = stage.get("row:100").await;
        held?.contains("\"version\":20").then_some(())
    })
    .await;
    assert_eq!(stage.get::<Option<String>>("row:2").await, None, "nobody has committed it");
    late.batch_execute("commit").await.unwrap();
    wait_for("what was late", async || stage.get::<Option<String>>("row:4").await).await;
    // A prepared transaction outlives the server.
    stage.postgres.stop("QUIT").unwrap();
    stage.postgres.resume().unwrap();
    stage.execute("commit prepared 'p'").await;
    stage.execute("update rows set version = version + 1 where id = 1").await;
    assert_in_step(&stage, &[MIRROR]).await;
    emptied(&stage).await;
    reader.finish().await;
    drop(daemon);
}

#[tokio::test]
async fn a_kill_between_applying_and_removing_loses_nothing() {
    let stage = Stage::set_with(SETTINGS, &[]);
    let rules = set(&stage, "replay_window = \"0s\"").await;
    let mut daemon = Daemon::start(&stage, &rules).await;
    for kill in 0..8_u64 {
        stage
            .execute(&format!(
                "insert into rows select i, {kill}, 'x' from generate_series(1, 3000) i
            on conflict (id) do update set version = excluded.version"
            ))
            .await;
        // Rows are removed once a second.
        lasts(Duration::from_millis(300 * (kill % 5))).await;
        daemon.kill();
        stage.execute("delete from rows where id % 7 = 0").await;
        daemon = Daemon::start(&stage, &rules).await;
    }
    assert_in_step(&stage, &[MIRROR]).await;
    emptied(&stage).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_lost_what_was_removed_is_reconciled() {
    let mut stage = Stage::set_with(SETTINGS, Replica::PRIMARY);
    let rules = set(&stage, "replay_window = \"0s\"").await;
    let daemon = Daemon::start(&stage, &rules).await;
    stage.execute("insert into rows select i, 1, 'x' from generate_series(1, 100) i").await;
    assert_in_step(&stage, &[MIRROR]).await;
    let replica = Replica::of(&stage).await;
    replica.cut_off();
    stage.execute("update rows set version = 2 where id <= 50; delete from rows where id > 90").await;
    assert_in_step(&stage, &[MIRROR]).await;
    emptied(&stage).await;
    daemon.kill();
    replica.promote(&mut stage).await;
    let rules = {
        let text = std::fs::read_to_string(&rules).unwrap();
        let url = text.lines().find(|line| line.starts_with("url = \"redis")).unwrap();
        std::fs::write(&rules, text.replace(url, &format!("url = \"{}\"", stage.redis.url()))).unwrap();
        rules
    };
    let daemon = Daemon::start(&stage, &rules).await;
    assert_in_step(&stage, &[MIRROR]).await;
    assert_eq!(daemon.metric("keepstep_reconciles_total").await, Some(1.0));
}

#[tokio::test]
async fn without_notify_it_is_looked_into_now_and_then() {
    let stage = Stage::set_with(SETTINGS, &[]);
    let rules = set(&stage, "notify = false\npoll_interval = \"100ms\"").await;
    let _daemon = Daemon::start(&stage, &rules).await;
    for version in 1..=5 {
        stage.execute(&format!("insert into rows values ({version}, 1, 'x')")).await;
        assert_in_step(&stage, &[MIRROR]).await;
    }
}

#[tokio::test]
async fn a_sleeper_is_woken() {
    let stage = Stage::set_with(SETTINGS, &[]);
    let rules = set(&stage, "poll_interval = \"1h\"").await;
    let _daemon = Daemon::start(&stage, &rules).await;
    for version in 1..=5 {
        lasts(Duration::from_millis(200)).await;
        stage.execute(&format!("insert into rows values ({version}, 1, 'x')")).await;
        assert_in_step(&stage, &[MIRROR]).await;
    }
}

#[tokio::test]
async fn what_a_full_outbox_left_out_is_reconciled() {
    let stage = Stage::set_with(SETTINGS, &[]);
    let rules = set(&stage, "max_retained = \"1MiB\"\non_full = \"gap\"\nreplay_window = \"0s\"").await;
    let daemon = Daemon::start(&stage, &rules).await;
    stage.execute("insert into rows values (1, 1, 'x')").await;
    assert_in_step(&stage, &[MIRROR]).await;
    daemon.kill();
    for version in 1..=20 {
        stage
            .execute(&format!(
                "insert into rows select {version} * 2000 + i, 1, repeat('x', 200) from generate_series(1, 1500) i"
            ))
            .await;
    }
    stage.execute("delete from rows where id % 3 = 0").await;
    assert!(bytes(&stage).await < 4 << 20, "{}", bytes(&stage).await);
    let daemon = Daemon::start(&stage, &rules).await;
    assert_in_step(&stage, &[MIRROR]).await;
    assert!(daemon.log().contains("was full, and changes were left out"), "{}", daemon.log());
    emptied(&stage).await;
    // From now on it is written to again.
    let gaps = daemon.metric("keepstep_reconciles_total").await;
    stage.execute("update rows set version = 3 where id < 3000").await;
    assert_in_step(&stage, &[MIRROR]).await;
    assert_eq!(daemon.metric("keepstep_reconciles_total").await, gaps);
}

#[tokio::test]
async fn a_trigger_that_was_disabled_is_said_and_made_up_for() {
    let stage = Stage::set_with(SETTINGS, &[]);
    let rules = set(&stage, "").await;
    let daemon = Daemon::start(&stage, &rules).await;
    stage.execute("insert into rows values (1, 1, 'x')").await;
    assert_in_step(&stage, &[MIRROR]).await;
    stage.execute("alter table rows disable trigger all; update rows set version = 2").await;
    let paused = async |count| (daemon.metric("keepstep_rule_paused").await == Some(count)).then_some(());
    wait_for("the rule to be paused", async || paused(1.0).await).await;
    stage.keepstep(&["setup"]);
    wait_for("the rule to go on", async || paused(0.0).await).await;
    assert_in_step(&stage, &[MIRROR]).await;
}

#[tokio::test]
async fn another_source_is_another_history() {
    let stage = Stage::set();
    let rules = set(&stage, "").await;
    let daemon = Daemon::start(&stage, &rules).await;
    assert!(daemon.terminate().await.success());
    let text = std::fs::read_to_string(&rules).unwrap().replace("source = \"outbox\"", "");
    std::fs::write(&rules, text).unwrap();
    if !reads_outbox() {
        stage.keepstep(&["setup"]);
        let daemon = Daemon::spawn(&stage, &rules, &[]);
        assert!(
            comes_within(Duration::from_secs(30), async || daemon.log().contains("its slot is outbox `keepstep`"))
                .await
        );
    }
}

/// Rows one by one, each in a transaction of its own, as quickly as that would make many drains.
async fn one_by_one(stage: &Stage, ids: std::ops::Range<i32>) {
    let client = stage.sql().await;
    for id in ids {
        client.execute("insert into rows values ($1, 1, 'x')", &[&id]).await.unwrap();
        lasts(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn where_a_restart_would_begin_may_stand_still_for_long() {
    let stage = Stage::set_with(SETTINGS, &[]);
    let more = "
        [rule.page]
        table    = \"public.rows\"
        delete   = [\"page:{id}\"]
        redelete = \"20s\"
        [rule.told]
        table  = \"public.rows\"
        stream = { key = \"events\" }";
    let rules = set_rules(&stage, "", &format!("{ROWS}{more}")).await;
    let mut daemon = Daemon::start(&stage, &rules).await;
    for hundred in 0..3 {
        one_by_one(&stage, 100 * hundred..100 * (hundred + 1)).await;
        let last = format!("row:{}", 100 * hundred + 99);
        let came = comes_within(Duration::from_secs(1), async || stage.get::<Option<String>>(&last).await.is_some());
        assert!(came.await, "{last} waits for what is deleted once more");
        daemon.kill();
        daemon = Daemon::start(&stage, &rules).await;
    }
    let checkpoint = stage.checkpoint().await.unwrap();
    assert!(checkpoint.low < checkpoint.good.lsn && checkpoint.drains.len() < 100, "{checkpoint:?}");
    // What was told is not told again, however few drains the same rows come in.
    one_by_one(&stage, 300..301).await;
    let mut cache = stage.cache().await;
    wait_for("the last row", async || stage.get::<Option<String>>("row:300").await).await;
    let events: u64 = redis::cmd("XLEN").arg("test:events").query_async(&mut cache).await.unwrap();
    let keys: Vec<String> = redis::cmd("KEYS").arg("test:row:*").query_async(&mut cache).await.unwrap();
    assert_eq!((events, keys.len()), (301, 301));
}

#[tokio::test]
async fn a_row_that_cannot_be_read_again_yet_stops_nothing() {
    let stage = Stage::set_with(SETTINGS, &[]);
    stage.execute("create table doubtful (id int primary key, version int not null)").await;
    let more = "
        [rule.doubtful]
        table   = \"public.doubtful\"
        key     = \"doubtful:{id}\"
        value   = \"json\"
        columns = [\"id\", \"version\"]";
    let rules = set_rules(&stage, "", &format!("{ROWS}{more}")).await;
    let twice = "create function twice() returns trigger language plpgsql as $$ begin
            if pg_trigger_depth() = 1 then update doubtful set version = version + 1 where id = new.id; end if;
            return new; end $$;
        create trigger a_twice after insert on doubtful for each row execute function twice()";
    stage.execute(twice).await;
    let daemon = Daemon::start(&stage, &rules).await;
    let (writer, locker) = (stage.sql().await, stage.sql().await);
    writer.batch_execute("begin; insert into doubtful values (1, 1)").await.unwrap();
    // Whoever would read the row comes behind the lock, which waits for its writer.
    let locked = locker.batch_execute("begin; lock table doubtful");
    let written = async {
        wait_for("a lock", async || {
            let waits = "select from pg_locks where relation = 'doubtful'::regclass and not granted";
            stage.sql().await.query_opt(waits, &[]).await.unwrap()
        })
        .await;
        writer.batch_execute("commit").await.unwrap();
    };
    let (locked, ()) = tokio::join!(locked, written);
    locked.unwrap();
    one_by_one(&stage, 0..200).await;
    assert_eq!(stage.get::<Option<String>>("doubtful:1").await, None);
    locker.batch_execute("commit").await.unwrap();
    let doubtful = Mirror { table: "doubtful", key: "'doubtful:' || id", columns: "id, version" };
    assert_in_step(&stage, &[MIRROR, doubtful]).await;
    assert!(daemon.metric("keepstep_unrendered_total").await >= Some(1.0), "nothing was in doubt");
}

#[tokio::test]
async fn an_outbox_that_was_another_servers_is_emptied() {
    let stage = Stage::set_with(SETTINGS, &[]);
    let rules = set(&stage, "replay_window = \"0s\"").await;
    // As a dump leaves it: positions of a longer log, and rows of transactions that this server has yet to see.
    stage
        .execute(
            "insert into rows values (1, 1, 'x');
            update keepstep.state set confirmed_lsn = 'FF/0', made_lsn = 'F0/0', system = 7;
            update keepstep.outbox_0 set xid = '4000000000', new = '(1,9,lie)'",
        )
        .await;
    let daemon = Daemon::start(&stage, &rules).await;
    assert!(daemon.log().contains("comes from another server"), "{}", daemon.log());
    assert_in_step(&stage, &[MIRROR]).await;
    stage.execute("update rows set version = 2; insert into rows values (2, 1, 'y')").await;
    assert_in_step(&stage, &[MIRROR]).await;
    emptied(&stage).await;
    assert_eq!(daemon.metric("keepstep_reconciles_total").await, Some(1.0));
}

#[tokio::test]
async fn nobody_empties_what_somebody_reads() {
    let stage = Stage::set_with(SETTINGS, &[]);
    let rules = set(&stage, "").await;
    stage.execute("insert into rows values (1, 1, 'x')").await;
    let client = client::connect(&info(&url(&stage.postgres, "postgres", "")), Duration::ZERO).await.unwrap();
    let before = confirmed(&stage).await;
    let lock = stage.sql().await;
    lock.batch_execute("select pg_advisory_lock(1801807216, 'keepstep'::regnamespace::oid::int)").await.unwrap();
    let refused = outbox::renew(&client, "keepstep").await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Fenced, "{refused}");
    assert!(bytes(&stage).await > 0);
    assert_eq!(confirmed(&stage).await, before);
    drop(lock);
    wait_for("the lock to be free", async || outbox::renew(&client, "keepstep").await.ok()).await;
    assert_eq!(bytes(&stage).await, 0);
    assert_ne!(confirmed(&stage).await, before);
    // Nothing was kept, and somebody may come.
    drop(client);
    let _daemon = Daemon::start(&stage, &rules).await;
    assert_in_step(&stage, &[MIRROR]).await;
}

#[tokio::test]
async fn a_sleeper_that_was_forgotten_says_so_again() {
    let stage = Stage::set_with(SETTINGS, &[]);
    let rules = set(&stage, "poll_interval = \"500ms\"").await;
    let _daemon = Daemon::start(&stage, &rules).await;
    let asleep = async || {
        let sql = "select last_value & 2 <> 0 from keepstep.gate";
        stage.sql().await.query_one(sql, &[]).await.unwrap().get::<_, bool>(0).then_some(())
    };
    wait_for("sleep", asleep).await;
    stage.execute("select keepstep.sleep(false)").await;
    wait_for("sleep again", asleep).await;
}

#[tokio::test]
async fn a_rule_that_uses_no_column_hears_of_rows_that_nothing_identifies() {
    let stage = Stage::set_with(SETTINGS, &[]);
    stage.execute("create table notes (note text); alter table notes replica identity full").await;
    let rules = set_rules(&stage, "", "[rule.feed]\ntable = \"public.notes\"\ndelete = [\"feed:all\"]").await;
    let _daemon = Daemon::start(&stage, &rules).await;
    for write in ["insert into notes values ('a')", "update notes set note = 'b'", "delete from notes"] {
        stage.put("feed:all", "stale").await;
        stage.execute(write).await;
        wait_for(write, async || stage.get::<Option<String>>("feed:all").await.is_none().then_some(())).await;
    }
}

#[tokio::test]
async fn what_is_not_read_yet_is_not_caught_up() {
    let stage = Stage::set_with(SETTINGS, &[]);
    let rules = set(&stage, "").await;
    let daemon = Daemon::start(&stage, &rules).await;
    stage.execute("insert into rows values (1, 1, 'x')").await;
    let caught_up = async |is: bool| {
        let (_, status) = daemon.get("/status").await?;
        status.contains(&format!("\"caught_up\":{is}")).then_some(())
    };
    wait_for("catching up", async || caught_up(true).await).await;
    let reader = "select pid from pg_locks where locktype = 'advisory' and granted";
    let reader: i32 = stage.sql().await.query_one(reader, &[]).await.unwrap().get(0);
    signal(reader.unsigned_abs(), "STOP");
    stage.execute("insert into rows values (2, 1, 'x')").await;
    wait_for("the lag to show", async || caught_up(false).await).await;
    signal(reader.unsigned_abs(), "CONT");
    wait_for("catching up again", async || caught_up(true).await).await;
    assert_in_step(&stage, &[MIRROR]).await;
}
