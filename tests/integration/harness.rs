//! The harness must be able to fail: an oracle that sees nothing wrong proves nothing.

use redis::AsyncCommands;

use crate::support::{Mirror, Proxy, Reader, Stage, assert_in_step, differences, wait_for};

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
