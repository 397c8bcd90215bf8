//! The harness must be able to fail: an oracle that sees nothing wrong proves nothing.

use std::time::Duration;

use redis::AsyncCommands;

use crate::support::{
    Load, Mirror, Proxy, Reader, Replica, Sentinels, Stage, Stalled, Standby, assert_in_step, comes_within,
    differences, wait_for,
};

const ITEMS: Mirror<'_> = Mirror { table: "items", key: "'item:' || id", columns: "id, name, seen" };

#[tokio::test]
async fn the_oracle_sees_wrong_missing_and_orphaned_keys() {
    let stage = Stage::set();
    stage.execute("create table items (id int, name text, seen timestamptz)").await;
    stage.execute("insert into items values (1, 'a \"b\"', '2024-02-29 12:00+02'), (2, null, null)").await;
    stage.put("item:1", r#"{"id":1,"name":"a \"b\"","seen":"2024-02-29T10:00:00+00:00"}"#).await;
    stage.put("item:2", r#"{"id":2,"name":null,"seen":null}"#).await;
    stage.put("keepstep:checkpoint", "of no concern").await;
    assert_in_step(&stage, &[ITEMS]).await;

    stage.put("item:2", r#"{"id":2,"name":"","seen":null}"#).await;
    stage.put("item:3", r#"{"id":3}"#).await;
    stage.execute("insert into items values (4)").await;
    let mut found = differences(&stage, &[ITEMS]).await;
    found.sort();
    assert_eq!(
        found,
        [
            r#"test:item:2: holds {"id":2,"name":"","seen":null}, its row is {"id":2,"name":null,"seen":null}"#,
            "test:item:3: has no row",
            r#"test:item:4: is missing, its row is {"id":4,"name":null,"seen":null}"#,
        ]
    );
}

#[tokio::test]
#[should_panic(expected = "test:row went back from version 2 to 1")]
async fn the_reader_sees_a_version_go_back() {
    let stage = Stage::set();
    let reader = Reader::follow(&stage, "row");
    let mut versions = [1, 2, 1].into_iter().cycle();
    wait_for("the reader to notice", async || {
        stage.put("row", &format!(r#"{{"version":{}}}"#, versions.next().unwrap())).await;
        reader.has_ended().then_some(())
    })
    .await;
    reader.finish().await;
}

#[tokio::test]
async fn the_proxy_passes_stalls_refuses_and_cuts() {
    let stage = Stage::set();
    let proxy = Proxy::to(stage.redis.port).await;
    let client = redis::Client::open(format!("redis://127.0.0.1:{}/", proxy.port)).unwrap();
    let connect = async || client.get_multiplexed_async_connection().await.ok();

    let mut cache = connect().await.unwrap();
    let () = cache.set("a", 1).await.unwrap();
    proxy.stall();
    assert!(cache.set::<_, _, ()>("a", 2).await.is_err(), "a reply came through a stalled link");
    proxy.resume();
    wait_for("what was held back", async || (cache.get::<_, i64>("a").await.ok()? == 2).then_some(())).await;

    proxy.refuse();
    assert!(cache.set::<_, _, ()>("a", 3).await.is_err(), "a cut connection answered");
    assert!(connect().await.is_none(), "a refused connection answered");
    proxy.resume();
    let value: i64 = connect().await.unwrap().get("a").await.unwrap();
    assert_eq!(value, 2);
}

#[tokio::test]
async fn the_proxy_leads_to_another_server() {
    let (stage, other) = (Stage::set(), Stage::set());
    stage.put("where", "here").await;
    other.put("where", "there").await;
    let proxy = Proxy::to(stage.redis.port).await;
    let client = redis::Client::open(format!("redis://127.0.0.1:{}/", proxy.port)).unwrap();
    let mut cache = client.get_multiplexed_async_connection().await.unwrap();
    assert_eq!(cache.get::<_, String>("test:where").await.unwrap(), "here");
    proxy.retarget(other.redis.port);
    assert!(cache.get::<_, String>("test:where").await.is_err(), "the old connection still answers");
    let mut cache = client.get_multiplexed_async_connection().await.unwrap();
    assert_eq!(cache.get::<_, String>("test:where").await.unwrap(), "there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_waits_for_a_stalled_standby_and_is_invisible_meanwhile() {
    let mut stage = Stage::set();
    stage.execute("create table t (v int); insert into t values (1)").await;
    let standby = Standby::synchronous(&mut stage).await;
    stage.execute("update t set v = 2").await;
    standby.stall();
    let stalled = Stalled::execute(&stage, "update t set v = 3").await;
    let sql = stage.sql().await;
    let visible = async || sql.query_one("select v from t", &[]).await.unwrap().get::<_, i32>(0);
    assert_eq!(visible().await, 2);
    stage.execute("set synchronous_commit = local; create table passes ()").await;
    standby.resume();
    stalled.done().await;
    assert_eq!(visible().await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_standby_lacks_what_it_was_kept_from() {
    let mut stage = Stage::set();
    let standby = Standby::asynchronous(&mut stage).await;
    stage.execute("create table t as select 1 as v").await;
    let end: String = stage.sql().await.query_one("select pg_current_wal_flush_lsn()::text", &[]).await.unwrap().get(0);
    standby.has_received(&end).await;
    standby.stall();
    stage.execute("update t set v = 2").await;
    let timeline = "select timeline_id from pg_control_checkpoint()";
    let before: i32 = stage.sql().await.query_one(timeline, &[]).await.unwrap().get(0);
    standby.promote(&mut stage).await;
    let sql = stage.sql().await;
    assert_eq!(sql.query_one("select v from t", &[]).await.unwrap().get::<_, i32>(0), 1);
    stage.execute("checkpoint").await;
    assert_eq!(sql.query_one(timeline, &[]).await.unwrap().get::<_, i32>(0), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_replica_lacks_what_it_was_cut_off_from() {
    let mut stage = Stage::set_with("", Replica::PRIMARY);
    stage.put("before", "1").await;
    let replica = Replica::of(&stage).await;
    replica.cut_off();
    stage.put("after", "1").await;
    replica.promote(&mut stage).await;
    assert_eq!(stage.get::<Option<String>>("before").await.as_deref(), Some("1"));
    assert_eq!(stage.get::<Option<String>>("after").await, None);
    stage.put("writable", "1").await;
}

#[tokio::test]
#[should_panic(expected = "\"test:row:1:cart\" belongs to no rule")]
async fn sentinels_notice_whoever_touches_them() {
    let stage = Stage::set();
    let sentinels = Sentinels::place(&stage).await;
    sentinels.assert_untouched(&stage).await;
    let () = stage.cache().await.hset("test:row:1:cart", "id", 2).await.unwrap();
    sentinels.assert_untouched(&stage).await;
}

/// The load itself must never make a version go back, or it could not be told from keepstep doing so.
#[tokio::test]
async fn the_load_only_raises_versions() {
    let stage = Stage::set();
    Load::prepare(&stage, 10).await;
    let watch = "create table history (at bigserial, id int, version bigint);
         create function note() returns trigger language plpgsql as
         $$ begin insert into history (id, version) values (new.id, new.version); return null; end $$;
         create trigger note after insert or update on rows for each row execute function note()";
    stage.execute(watch).await;
    let load = Load::begin(&stage, &stage.postgres, 2000);
    for _ in 0..5 {
        load.goes_on(&stage).await;
    }
    load.finish(&stage);
    let sql = stage.sql().await;
    let fell = "select count(*), count(*) filter (where version <= before) from
         (select version, lag(version) over (partition by id order by at) as before from history) steps";
    let row = sql.query_one(fell, &[]).await.unwrap();
    assert!(row.get::<_, i64>(0) > 500);
    assert_eq!(row.get::<_, i64>(1), 0);
}

#[tokio::test]
async fn a_state_that_does_not_come_is_told_from_one_that_does() {
    assert!(comes_within(Duration::from_secs(60), async || true).await);
    assert!(!comes_within(Duration::from_millis(50), async || false).await);
}
