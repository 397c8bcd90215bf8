//! The holes in which tables and stream disagree, each opened on purpose, and a deliberately wrong keepstep for each.
//!
//! A test here runs a scenario that gives what was found wrong. Right is nothing. Beside it stands the canary: the same
//! scenario with a daemon that lacks the one guard (`KEEPSTEP_CANARY`, obeyed by debug builds only), and there it must
//! find something, or the scenario proves nothing.

use std::path::Path;
use std::time::Duration;

use keepstep::model::Lsn;
use tokio_postgres::Client;

use crate::support::{
    Daemon, Mirror, Reader, Stage, Stalled, Standby, assert_in_step, comes_within, differences, signal, wait_for,
};

/// Rules whose table is wide on disk and narrow in the cache.
const RULES: &str = r#"
[rule.row]
table   = "public.rows"
key     = "row:{id}"
value   = "json"
columns = ["id", "version"]
"#;

const MIRROR: Mirror<'_> = Mirror { table: "rows", key: "'row:' || id", columns: "id, version" };

/// How long a wrong variant is given to do what the right one never does.
const CANARY_LIMIT: Duration = Duration::from_secs(5);

/// A table of rows that take up a page for every seven: a pass reads it in several chunks.
async fn fill(stage: &Stage, rows: u32) {
    let statements = format!(
        "create table rows (id int primary key, version bigint not null default 1, filler text);
         alter table rows alter filler set storage plain;
         insert into rows select id, 1, repeat('x', 1000) from generate_series(1, {rows}) id"
    );
    stage.execute(&statements).await;
}

/// A daemon, with or without one of its guards.
fn spawn(stage: &Stage, rules: &Path, canary: Option<&str>) -> Daemon {
    Daemon::spawn_in(stage, rules, canary.map(|canary| ("KEEPSTEP_CANARY", canary)))
}

/// Whether no rule owes anything any more.
async fn is_warm(stage: &Stage) -> bool {
    stage.checkpoint().await.is_some_and(|checkpoint| checkpoint.owing.is_empty())
}

async fn warm(stage: &Stage) {
    wait_for("the warm cache", async || is_warm(stage).await.then_some(())).await;
}

/// The version that a key holds.
async fn version(stage: &Stage, id: u32) -> Option<i64> {
    let held: Option<String> = stage.get(&format!("row:{id}")).await;
    let row: serde_json::Value = serde_json::from_str(&held?).unwrap();
    row["version"].as_i64()
}

/// Waits until the pass has written its first keys.
async fn begun(stage: &Stage) {
    let mut cache = stage.cache().await;
    wait_for("the first keys", async || {
        // keepstep's own are a handful.
        let keys: u64 = redis::cmd("DBSIZE").query_async(&mut cache).await.unwrap();
        (keys > 20).then_some(())
    })
    .await;
}

/// What is wrong at this moment. Nothing changes any more, so nothing gets right later either.
async fn wrong(stage: &Stage) -> Vec<String> {
    differences(stage, &[MIRROR]).await
}

/// A commit is decoded, but not visible when the chunk with its row is read: the chunk has the older row.
async fn decoded_but_invisible(canary: Option<&str>) -> Vec<String> {
    const ROWS: u32 = 20_000;
    let mut stage = Stage::set();
    fill(&stage, ROWS).await;
    let standby = Standby::synchronous(&mut stage).await;
    let rules = stage.rules(RULES);
    stage.set_fields("[postgres]", &format!("warm_rate = \"{}/s\"", ROWS / 3));
    stage.keepstep(&["setup"]);
    let mut daemon = spawn(&stage, &rules, canary);
    daemon.ready().await;
    // What was decoded before a pass is settled before it reads: this must come while it is under way.
    begun(&stage).await;
    assert!(!is_warm(&stage).await, "the pass was over too soon");
    standby.stall();
    let stalled = Stalled::execute(&stage, "update rows set version = 2 where id % 100 = 0").await;
    wait_for("the change, decoded", async || (version(&stage, ROWS).await? == 2).then_some(())).await;
    // Whoever waits for visibility waits here; whoever does not is through with the table.
    comes_within(CANARY_LIMIT, async || is_warm(&stage).await).await;
    standby.resume();
    stalled.done().await;
    warm(&stage).await;
    wrong(&stage).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_does_not_undo_what_it_could_not_see() {
    assert_eq!(decoded_but_invisible(None).await, [""; 0]);
}

#[cfg(debug_assertions)]
#[tokio::test(flavor = "multi_thread")]
async fn canary_a_chunk_that_waits_for_its_marker_only() {
    let wrong = decoded_but_invisible(Some("marker_only")).await;
    assert!(wrong.iter().any(|one| one.contains("\"version\":1}, its row is")), "{wrong:?}");
}

/// A pass begins while the stream is in the middle of a large transaction that no snapshot has yet: what came of it
/// before was noted for no pass.
#[tokio::test(flavor = "multi_thread")]
async fn a_pass_that_begins_within_a_transaction_does_not_undo_its_beginning() {
    let mut stage = Stage::set();
    fill(&stage, 100).await;
    let standby = Standby::synchronous(&mut stage).await;
    let rules = stage.rules(RULES);
    stage.set_fields("[redis]", "batch_ops = 100");
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(&stage, &rules).await;
    warm(&stage).await;
    standby.stall();
    let change =
        "update rows set version = 2 where id = 1; insert into rows select id from generate_series(1001, 81000) id";
    let stalled = Stalled::execute(&stage, change).await;
    wait_for("the beginning of the transaction", async || (version(&stage, 1).await? == 2).then_some(())).await;
    let sender = Stopped::sender(&stage).await;
    assert_eq!(version(&stage, 81_000).await, None, "the transaction was over too soon");
    let asked = stage.begin(&["warm", "--rule", "row"]);
    wait_for("the pass", async || (daemon.log().matches("warm begins").count() == 2).then_some(())).await;
    drop(sender);
    comes_within(CANARY_LIMIT, async || asked.is_finished()).await;
    standby.resume();
    stalled.done().await;
    assert!(asked.await.unwrap().status.success());
    assert_in_step(&stage, &[MIRROR]).await;
}

/// The stream lags behind the tables: what a chunk has seen is still to come, and older states before it.
async fn read_ahead_of_the_stream(canary: Option<&str>) -> Vec<String> {
    let stage = Stage::set();
    fill(&stage, 100).await;
    let rules = stage.rules(RULES);
    stage.set_fields("[redis]", "batch_ops = 100");
    stage.keepstep(&["setup"]);
    let mut daemon = spawn(&stage, &rules, canary);
    daemon.ready().await;
    warm(&stage).await;
    assert_in_step(&stage, &[MIRROR]).await;
    let reader = Reader::follow(&stage, "row:1");
    let sender = Stopped::sender(&stage).await;
    stage.execute("update rows set version = 2 where id = 1").await;
    // Many batches, so that the version before them is seen.
    stage.execute("insert into rows select id from generate_series(1001, 21000) id").await;
    stage.execute("update rows set version = 3 where id = 1").await;
    let asked = stage.begin(&["warm", "--rule", "row"]);
    comes_within(CANARY_LIMIT, async || version(&stage, 1).await == Some(3)).await;
    drop(sender);
    assert!(asked.await.unwrap().status.success());
    assert_in_step(&stage, &[MIRROR]).await;
    reader.verdict().await.err().into_iter().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_does_not_overtake_the_stream() {
    assert_eq!(read_ahead_of_the_stream(None).await, [""; 0]);
}

#[cfg(debug_assertions)]
#[tokio::test(flavor = "multi_thread")]
async fn canary_a_chunk_that_looks_at_visibility_only() {
    let wrong = read_ahead_of_the_stream(Some("visibility_only")).await;
    assert!(wrong.iter().any(|one| one.starts_with("test:row:1 went back from version 3 to 2")), "{wrong:?}");
}

/// A process that was told to stop, until this is dropped.
struct Stopped(u32);

impl Stopped {
    /// Where keepstep's changes come from: nothing is streamed any more, and queries are answered.
    async fn sender(stage: &Stage) -> Self {
        let pid = stage.sender().await.unwrap();
        signal(pid, "STOP");
        Stopped(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        signal(self.0, "CONT");
    }
}

/// A slot is made while a commit stalls: the change is before the beginning of the stream, and in no snapshot yet.
async fn slot_made_meanwhile(canary: Option<&str>) -> Vec<String> {
    let mut stage = Stage::set();
    fill(&stage, 100).await;
    let standby = Standby::synchronous(&mut stage).await;
    let rules = stage.rules(RULES);
    let stalled = slot_behind_a_stalled_update(&stage, &standby).await;
    let mut daemon = spawn(&stage, &rules, canary);
    daemon.ready().await;
    comes_within(CANARY_LIMIT, async || is_warm(&stage).await).await;
    standby.resume();
    stalled.done().await;
    warm(&stage).await;
    wrong(&stage).await
}

/// A new slot is ready once those have ended who ran when it was begun, and then those who run by then. Who begins after
/// that, and commits before the last of them has ended, lies before the slot, and nobody has waited for it.
async fn slot_behind_a_stalled_update(stage: &Stage, standby: &Standby) -> Stalled {
    stage.keepstep(&["setup"]);
    // Made anew by hand, without a note of where: the first start is one all the same.
    stage.execute("select pg_drop_replication_slot('keepstep'); comment on publication keepstep is null").await;
    let first = Open::begin(stage).await;
    let maker = Maker::begin(stage).await;
    maker.waits_for(&first).await;
    let second = Open::begin(stage).await;
    first.end().await;
    maker.waits_for(&second).await;
    standby.stall();
    let stalled = Stalled::execute(stage, "update rows set version = 2 where id = 1").await;
    second.end().await;
    maker.done().await;
    stalled
}

/// It is Postgres that has this hole, not the stage that imagines it.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_slot_can_lie_behind_a_commit_that_nobody_sees() {
    let mut stage = Stage::set();
    fill(&stage, 1).await;
    let standby = Standby::synchronous(&mut stage).await;
    stage.rules(RULES);
    let stalled = slot_behind_a_stalled_update(&stage, &standby).await;
    let sql = stage.sql().await;
    let visible = "select version from rows";
    assert_eq!(sql.query_one(visible, &[]).await.unwrap().get::<_, i64>(0), 1);
    standby.resume();
    stalled.done().await;
    assert_eq!(sql.query_one(visible, &[]).await.unwrap().get::<_, i64>(0), 2);
    let streamed = "select count(*) from pg_logical_slot_peek_binary_changes(
                        'keepstep', null, null, 'proto_version', '1', 'publication_names', 'keepstep')";
    assert_eq!(sql.query_one(streamed, &[]).await.unwrap().get::<_, i64>(0), 0);
}

/// A transaction that runs.
struct Open {
    sql: Client,
    xid: String,
}

impl Open {
    async fn begin(stage: &Stage) -> Self {
        let sql = stage.sql().await;
        sql.batch_execute("begin").await.unwrap();
        let xid = sql.query_one("select pg_current_xact_id()::xid::text", &[]).await.unwrap().get(0);
        Open { sql, xid }
    }

    /// Rolls back, which waits for no standby.
    async fn end(self) {
        self.sql.batch_execute("rollback").await.unwrap();
    }
}

/// A connection that makes the slot.
struct Maker {
    pid: i32,
    observer: Client,
    made: tokio::task::JoinHandle<()>,
}

impl Maker {
    async fn begin(stage: &Stage) -> Self {
        let sql = stage.sql().await;
        let pid = sql.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
        let made = tokio::spawn(async move {
            sql.batch_execute("select pg_create_logical_replication_slot('keepstep', 'pgoutput')").await.unwrap();
        });
        Maker { pid, observer: stage.sql().await, made }
    }

    async fn waits_for(&self, open: &Open) {
        let waits = format!(
            "select count(*) = 1 from pg_locks where pid = {} and transactionid = '{}' and not granted",
            self.pid, open.xid
        );
        wait_for("the slot to wait for a transaction", async || {
            self.observer.query_one(&waits, &[]).await.unwrap().get::<_, bool>(0).then_some(())
        })
        .await;
    }

    async fn done(self) {
        self.made.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_slot_waits_until_what_it_missed_is_visible() {
    assert_eq!(slot_made_meanwhile(None).await, [""; 0]);
}

#[cfg(debug_assertions)]
#[tokio::test(flavor = "multi_thread")]
async fn canary_no_barrier_behind_a_new_slot() {
    let wrong = slot_made_meanwhile(Some("no_barrier")).await;
    assert_eq!(wrong, [r#"test:row:1: holds {"id":1,"version":1}, its row is {"id":1,"version":2}"#]);
}

/// The same where no rule owes anything: it is somebody who asks for the first pass behind the slot.
async fn asked_behind_a_new_slot(canary: Option<&str>) -> Vec<String> {
    let mut stage = Stage::set();
    fill(&stage, 100).await;
    let standby = Standby::synchronous(&mut stage).await;
    let rules = stage.rules(&format!("{RULES}warm = false\n"));
    let stalled = slot_behind_a_stalled_update(&stage, &standby).await;
    let mut daemon = spawn(&stage, &rules, canary);
    daemon.ready().await;
    let asked = stage.begin(&["warm", "--rule", "row"]);
    comes_within(CANARY_LIMIT, async || asked.is_finished()).await;
    standby.resume();
    stalled.done().await;
    assert!(asked.await.unwrap().status.success());
    wrong(&stage).await
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_asks_behind_a_new_slot_waits_until_what_it_missed_is_visible() {
    assert_eq!(asked_behind_a_new_slot(None).await, [""; 0]);
}

#[cfg(debug_assertions)]
#[tokio::test(flavor = "multi_thread")]
async fn canary_no_barrier_for_whoever_asks_behind_a_new_slot() {
    let wrong = asked_behind_a_new_slot(Some("no_barrier")).await;
    assert_eq!(wrong, [r#"test:row:1: holds {"id":1,"version":1}, its row is {"id":1,"version":2}"#]);
}

/// Rows move to other pages between two chunks, into some that were read already.
async fn rewritten_between_chunks(canary: Option<&str>, rewrite: &str) -> Vec<String> {
    const ROWS: u32 = 20_000;
    let stage = Stage::set();
    fill(&stage, ROWS).await;
    // The rows that are left stand far apart, and move together: towards the beginning, that is.
    stage.execute("delete from rows where id % 4 <> 0").await;
    let rules = stage.rules(RULES);
    stage.set_fields("[postgres]", "warm_rate = \"2000/s\"");
    stage.keepstep(&["setup"]);
    let mut daemon = spawn(&stage, &rules, canary);
    daemon.ready().await;
    begun(&stage).await;
    stage.execute(rewrite).await;
    assert!(!is_warm(&stage).await, "the pass was over too soon");
    warm(&stage).await;
    wrong(&stage).await
}

#[tokio::test]
async fn vacuum_full_between_two_chunks_loses_no_row() {
    assert_eq!(rewritten_between_chunks(None, "vacuum full rows").await, [""; 0]);
}

#[tokio::test]
async fn a_rewriting_alter_between_two_chunks_loses_no_row() {
    let alter = "alter table rows alter column filler type text using filler || 'x'";
    assert_eq!(rewritten_between_chunks(None, alter).await, [""; 0]);
}

#[cfg(debug_assertions)]
#[tokio::test]
async fn canary_chunks_of_a_table_that_is_another_file_by_now() {
    let wrong = rewritten_between_chunks(Some("no_filenode"), "vacuum full rows").await;
    assert!(wrong.iter().any(|one| one.contains("is missing, its row is")), "{wrong:?}");
}

/// A rewriting ALTER that commits while a chunk waits for the table: a snapshot from before it would see no row at all.
#[tokio::test]
async fn a_rewriting_alter_while_a_chunk_waits_loses_no_row() {
    let stage = Stage::set();
    fill(&stage, 1000).await;
    let rules = stage.rules(RULES);
    stage.keepstep(&["setup"]);
    let _daemon = Daemon::start(&stage, &rules).await;
    warm(&stage).await;
    let mut cache = stage.cache().await;
    let sql = stage.sql().await;
    let alter = "begin; alter table rows alter column filler type text using filler || 'x'";
    sql.batch_execute(alter).await.unwrap();
    let () = redis::cmd("UNLINK").arg("test:row:1").arg("test:row:1000").query_async(&mut cache).await.unwrap();
    let asked = stage.begin(&["warm", "--rule", "row"]);
    let observer = stage.sql().await;
    wait_for("a chunk that waits for the table", async || {
        let waits = "select count(*) > 0 from pg_locks where relation = 'rows'::regclass::oid and not granted";
        observer.query_one(waits, &[]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
    sql.batch_execute("commit").await.unwrap();
    assert!(asked.await.unwrap().status.success());
    assert_in_step(&stage, &[MIRROR]).await;
}

/// A table is gone, and its rule owes, while the stream still has to say that rows of it came and changed.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_dropped_ahead_of_the_stream_leaves_no_key() {
    let stage = Stage::set();
    fill(&stage, 100).await;
    let rules = stage.rules(RULES);
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(&stage, &rules).await;
    warm(&stage).await;
    let sql = stage.sql().await;
    let sender = Stopped::sender(&stage).await;
    stage.execute("update rows set version = 2 where id = 1; insert into rows values (101)").await;
    stage.execute("drop table rows").await;
    let logged = async |text: &str| daemon.log().contains(text).then_some(());
    wait_for("the pass", async || logged("reconcile begins").await).await;
    // Whoever does not wait for the stream is through with it.
    comes_within(CANARY_LIMIT, async || logged("reconcile done").await.is_some()).await;
    let end: String = sql.query_one("select pg_current_wal_flush_lsn()::text", &[]).await.unwrap().get(0);
    let end: Lsn = end.parse().unwrap();
    drop(sender);
    wait_for("the stream", async || (stage.checkpoint().await?.applied.lsn >= end).then_some(())).await;
    wait_for("the end of the pass", async || logged("reconcile done").await).await;
    warm(&stage).await;
    assert_eq!(differences(&stage, &[]).await, [""; 0]);
}

/// While nobody reads, a row moves to where a pass has been, by an UPDATE that the rule does not follow.
#[tokio::test]
async fn a_warm_begins_again_where_updates_that_do_not_count_can_have_moved_rows() {
    // So many that the last page has no room either.
    const ROWS: u32 = 7 * 2858;
    let stage = Stage::set();
    fill(&stage, ROWS).await;
    stage.execute("alter table rows replica identity full").await;
    let rules = stage.rules(&format!("{RULES}changed = [\"version\"]\n"));
    stage.set_fields("[postgres]", "warm_rate = \"8000/s\"");
    stage.keepstep(&["setup"]);
    let first = Daemon::start(&stage, &rules).await;
    let read = async || stage.checkpoint().await?.progress.map(|progress| progress.from.page);
    wait_for("progress", async || read().await.filter(|page| *page > 100)).await;
    first.kill();
    let (read, last) = (read().await.expect("the pass was over too soon"), ROWS - 10);
    stage.execute("delete from rows where id <= 70").await;
    // Of so few dead rows it would leave the space unnoted.
    stage.execute("vacuum (index_cleanup on) rows").await;
    let page = format!("select (ctid::text::point)[0]::int8 from rows where id = {last}");
    let sql = stage.sql().await;
    let page = async || u64::try_from(sql.query_one(&page, &[]).await.unwrap().get::<_, i64>(0)).unwrap();
    assert!(page().await >= read);
    stage.execute(&format!("update rows set filler = repeat('y', 1000) where id = {last}")).await;
    assert!(page().await < read, "the row has not moved to where others were");
    let _second = Daemon::start(&stage, &rules).await;
    warm(&stage).await;
    assert_eq!(wrong(&stage).await, [""; 0]);
}

/// TRUNCATE takes away rows that were read, that are being read, and that are still to be read.
#[tokio::test]
async fn truncate_in_mid_warm_leaves_only_what_came_after_it() {
    const ROWS: u32 = 20_000;
    let stage = Stage::set();
    fill(&stage, ROWS).await;
    let rules = stage.rules(RULES);
    stage.set_fields("[postgres]", &format!("warm_rate = \"{}/s\"", ROWS / 3));
    stage.keepstep(&["setup"]);
    let _daemon = Daemon::start(&stage, &rules).await;
    begun(&stage).await;
    assert!(!is_warm(&stage).await, "the pass was over too soon");
    stage.execute("truncate rows; insert into rows select id, 2 from generate_series(1, 1000, 10) id").await;
    stage.execute("update rows set version = 3 where id = 1").await;
    warm(&stage).await;
    assert_in_step(&stage, &[MIRROR]).await;
}

/// A key waits to be read again, because its row came without a large value that had not changed. The slot must keep the
/// change until then: the daemon is killed, and the next one has nothing else to know of it.
async fn killed_with_work_deferred(canary: Option<&str>) -> Vec<String> {
    let mut stage = Stage::set();
    // Kept apart from the row and not compressed: an UPDATE that leaves it alone does not send it.
    let table = "create table rows (id int primary key, version bigint not null, filler text);
                 alter table rows alter filler set storage external;
                 insert into rows select id, 1, repeat('x', 10000) from generate_series(1, 10) id";
    stage.execute(table).await;
    let standby = Standby::synchronous(&mut stage).await;
    let rules = stage.rules(&RULES.replace("\"version\"]", "\"version\", \"filler\"]"));
    stage.set_fields("[postgres]", "replay_window = \"0s\"");
    stage.keepstep(&["setup"]);
    let mut daemon = spawn(&stage, &rules, canary);
    daemon.ready().await;
    warm(&stage).await;
    let epoch = stage.checkpoint().await.unwrap().epoch;
    standby.stall();
    // Not settled, so not read again yet.
    let stalled = Stalled::execute(&stage, "update rows set version = 2 where id = 1").await;
    let end = local_commit(&stage).await;
    wait_for("the later change", async || (version(&stage, 100).await? == 1).then_some(())).await;
    let acknowledged = format!("select confirmed_flush_lsn >= '{end}' from pg_replication_slots");
    let sql = stage.sql().await;
    let too_early =
        comes_within(CANARY_LIMIT, async || sql.query_one(&acknowledged, &[]).await.unwrap().get::<_, bool>(0)).await;
    daemon.kill();
    standby.resume();
    stalled.done().await;
    let mut daemon = spawn(&stage, &rules, canary);
    daemon.ready().await;
    let mirror = || [Mirror { columns: "id, version, filler", ..MIRROR }];
    comes_within(CANARY_LIMIT, async || differences(&stage, &mirror()).await.is_empty()).await;
    let mut wrong = differences(&stage, &mirror()).await;
    if too_early {
        wrong.push("a change was acknowledged with work left".to_owned());
    }
    if stage.checkpoint().await.unwrap().epoch != epoch {
        wrong.push("a kill became a gap".to_owned());
    }
    wrong
}

/// Inserts a row in a transaction that waits for no standby, and gives the end of the log behind it.
async fn local_commit(stage: &Stage) -> String {
    let sql = stage.sql().await;
    sql.batch_execute("set synchronous_commit = local; insert into rows values (100, 1, 'small')").await.unwrap();
    sql.query_one("select pg_current_wal_flush_lsn()::text", &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_loses_no_deferred_work() {
    assert_eq!(killed_with_work_deferred(None).await, [""; 0]);
}

#[cfg(debug_assertions)]
#[tokio::test(flavor = "multi_thread")]
async fn canary_acknowledging_past_the_oldest_work_left() {
    let wrong = killed_with_work_deferred(Some("ack_past_low")).await;
    assert!(wrong.iter().any(|one| one.starts_with("test:row:1: is missing, its row is")), "{wrong:?}");
    assert!(wrong.iter().any(|one| one == "a change was acknowledged with work left"), "{wrong:?}");
}

/// A row that is to be read again, of a table that is gone by then: it holds neither the slot nor other rules.
#[tokio::test]
async fn a_row_that_can_never_be_read_again_holds_nothing_up() {
    let stage = Stage::set();
    let tables = "create table rows (id int primary key, version bigint not null, filler text);
                  alter table rows alter filler set storage external;
                  insert into rows values (1, 1, repeat('x', 10000));
                  create table others (id int primary key)";
    stage.execute(tables).await;
    let other = "[rule.other]\ntable = \"public.others\"\nkey = \"other:{id}\"\nvalue = \"json\"\ncolumns = [\"id\"]\n";
    let rules = stage.rules(&(RULES.replace("\"version\"]", "\"version\", \"filler\"]") + other));
    stage.keepstep(&["setup"]);
    let _daemon = Daemon::start(&stage, &rules).await;
    warm(&stage).await;
    stage.execute("begin; update rows set version = 2; drop table rows; commit").await;
    let sql = stage.sql().await;
    sql.batch_execute("insert into others values (1)").await.unwrap();
    let end: String = sql.query_one("select pg_current_wal_flush_lsn()::text", &[]).await.unwrap().get(0);
    let end: Lsn = end.parse().unwrap();
    wait_for("nothing to be pending any more", async || (stage.checkpoint().await?.low >= end).then_some(())).await;
    wait_for("every debt to be paid", async || stage.checkpoint().await?.owing.is_empty().then_some(())).await;
    assert_in_step(&stage, &[Mirror { table: "others", key: "'other:' || id", columns: "id" }]).await;
}
