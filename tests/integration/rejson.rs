//! `value = "rejson"`, from end to end, against a Redis that has the type as far as [`JsonRedis`] goes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use redis::AsyncCommands;
use redis::aio::MultiplexedConnection;
use serde_json::Value;

use crate::support::{Daemon, JsonRedis, Stage, wait_for};

const TABLE: &str = "
    create table docs (id int primary key, body jsonb, price numeric, ends timestamptz);
    insert into docs select i, jsonb_build_object('n', i, 'text', 'a \"b\" ö'), i + 0.10, '2100-01-01' from generate_series(1, 20) i";

const RULES: &str = r#"
[rule.doc]
table   = "public.docs"
key     = "doc:{id}"
value   = "rejson"
columns = ["id", "body", "price"]

[rule.short]
table   = "public.docs"
key     = "short:{id}"
value   = "rejson"
columns = ["id"]
ttl     = "1h"

[rule.until]
table     = "public.docs"
key       = "until:{id}"
value     = "rejson"
columns   = ["id", "price"]
expire_at = "row.ends"

[rule.kept]
table    = "public.docs"
key      = "kept:{id}"
value    = "rejson"
columns  = ["price"]
keep_ttl = true
write    = "present"
"#;

struct Stand {
    stage: Stage,
    redis: JsonRedis,
    rules: PathBuf,
}

async fn set() -> (Stand, Daemon) {
    let stage = Stage::set();
    let redis = JsonRedis::before(stage.redis.port).await;
    stage.execute(TABLE).await;
    let rules = stage.rules_between(&stage.postgres.url("postgres"), &redis.url(), RULES);
    stage.begin(&["setup"]).await.unwrap();
    let checked = stage.begin(&["check", "--connect"]).await.unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    let daemon = Daemon::start(&stage, &rules).await;
    let stand = Stand { stage, redis, rules };
    stand.assert_in_step("warm").await;
    (stand, daemon)
}

impl Stand {
    async fn cache(&self) -> MultiplexedConnection {
        redis::Client::open(self.redis.url()).unwrap().get_multiplexed_async_connection().await.unwrap()
    }

    /// The documents of `doc:` are what SQL says, and no other key is there.
    async fn assert_in_step(&self, when: &str) {
        let sql = "select 'test:doc:' || docs.id, row_to_json(shown)::text from docs
            join lateral (select docs.id, docs.body, docs.price) shown on true";
        let (mut cache, sql) = (self.cache().await, (self.stage.sql().await, sql));
        wait_for(when, async || {
            let rows = sql.0.query(sql.1, &[]).await.unwrap();
            let parsed = |text: &str| serde_json::from_str::<Value>(text).unwrap();
            let expected: BTreeMap<String, Value> =
                rows.iter().map(|row| (row.get(0), parsed(row.get::<_, &str>(1)))).collect();
            let keys: Vec<String> = cache.keys("test:doc:*").await.unwrap();
            let mut held = BTreeMap::new();
            for key in keys {
                // A key can go meanwhile, or be somebody else's still.
                let document: Option<String> = redis::cmd("JSON.GET").arg(&key).query_async(&mut cache).await.ok()?;
                held.insert(key, parsed(&document?));
            }
            (held == expected).then_some(())
        })
        .await;
    }

    async fn ttl_ms(&self, key: &str) -> i64 {
        self.cache().await.pttl(format!("test:{key}")).await.unwrap()
    }

    async fn verify(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let output = self.stage.begin(&[&["verify", "-o", "json"], arguments].concat()).await.unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    }
}

async fn set_json(cache: &mut MultiplexedConnection, key: &str, document: &str) {
    let mut set = redis::cmd("JSON.SET");
    set.arg(format!("test:{key}")).arg("$").arg(document);
    let () = set.query_async(cache).await.unwrap();
}

#[tokio::test]
async fn documents_follow_their_rows() {
    let (stand, _daemon) = set().await;
    let stage = &stand.stage;
    stage.execute("update docs set price = price * 2 where id < 5; delete from docs where id > 15").await;
    stage.execute("update docs set id = id + 100, body = null where id = 7").await;
    stand.assert_in_step("changed").await;
    assert_eq!(stand.verify(&[]).await.0, Some(0));
    stage.execute("truncate docs; insert into docs values (1, '[1, {\"a\": null}]', 0.30, null)").await;
    stand.assert_in_step("filled anew").await;
    assert_eq!(stand.verify(&[]).await.0, Some(0));
}

#[tokio::test]
async fn documents_live_as_long_as_they_should() {
    let (stand, _daemon) = set().await;
    let (stage, mut cache) = (&stand.stage, stand.cache().await);
    let () = cache.pexpire("test:doc:1", 5_000_000).await.unwrap();
    let () = cache.pexpire("test:short:1", 9_000_000).await.unwrap();
    set_json(&mut cache, "kept:1", "{}").await;
    let () = cache.pexpire("test:kept:1", 7_000_000).await.unwrap();
    stage.execute("update docs set price = 77 where id = 1").await;
    stand.assert_in_step("changed").await;
    wait_for("the last one of its batch", async || (stand.ttl_ms("short:1").await <= 3_600_000).then_some(())).await;
    assert_eq!(stand.ttl_ms("doc:1").await, -1);
    assert!(stand.ttl_ms("short:1").await > 3_000_000);
    assert!(stand.ttl_ms("until:1").await > 60 * 365 * 86_400_000);
    let kept: String = redis::cmd("JSON.GET").arg("test:kept:1").query_async(&mut cache).await.unwrap();
    assert_eq!(serde_json::from_str::<Value>(&kept).unwrap(), serde_json::json!({ "price": 77 }));
    assert!((6_000_000..=7_000_000).contains(&stand.ttl_ms("kept:1").await));
    let absent: bool = cache.exists("test:kept:2").await.unwrap();
    assert!(!absent, "only what is there is refreshed");
    assert_eq!(stand.verify(&[]).await.0, Some(0));
}

#[tokio::test]
async fn what_is_no_document_is_replaced() {
    let (stand, _daemon) = set().await;
    let (stage, mut cache) = (&stand.stage, stand.cache().await);
    for (key, other) in [("doc:1", "string"), ("doc:2", "hash"), ("short:3", "string")] {
        let key = format!("test:{key}");
        let () = cache.del(&key).await.unwrap();
        match other {
            "hash" => cache.hset::<_, _, _, ()>(key, "a", "b").await.unwrap(),
            _ => cache.set::<_, _, ()>(key, "an application's").await.unwrap(),
        }
    }
    let (code, said) = stand.verify(&[]).await;
    assert_eq!((code, said.matches("\"difference\"").count()), (Some(3), 3), "{said}");
    stage.execute("update docs set price = 5 where id in (1, 3)").await;
    wait_for("what the stream writes", async || {
        let kinds: [String; 2] = [
            redis::cmd("TYPE").arg("test:doc:1").query_async(&mut cache).await.unwrap(),
            redis::cmd("TYPE").arg("test:short:3").query_async(&mut cache).await.unwrap(),
        ];
        (kinds == ["ReJSON-RL", "ReJSON-RL"]).then_some(())
    })
    .await;
    stand.verify(&["--repair"]).await;
    stand.assert_in_step("mended").await;
    assert_eq!(stand.verify(&[]).await.0, Some(0));
}

#[tokio::test]
async fn verify_compares_documents() {
    let (stand, daemon) = set().await;
    let mut cache = stand.cache().await;
    // Written in another way, and the same.
    set_json(&mut cache, "doc:1", r#"{"price":1.10,  "body":{"text":"a \"b\" \u00f6","n":1},"id":1}"#).await;
    assert_eq!(stand.verify(&[]).await.0, Some(0));
    set_json(&mut cache, "doc:1", r#"{"id":1,"body":null,"price":1.10}"#).await;
    set_json(&mut cache, "doc:777", "{}").await;
    let () = cache.del("test:doc:2").await.unwrap();
    let () = cache.persist("test:short:3").await.unwrap();
    for arguments in [&[][..], &["--repair"]] {
        let (code, said) = stand.verify(arguments).await;
        let found = ["test:doc:1\"", "test:doc:777\"", "test:doc:2\"", "test:short:3\""];
        assert!(found.iter().all(|key| said.contains(key)), "{said}");
        assert_eq!((code, said.matches("\"difference\"").count()), (Some(3), found.len()), "{said}");
    }
    stand.assert_in_step("mended").await;
    assert_eq!(stand.verify(&[]).await.0, Some(0));
    // And it comes back after everything was lost.
    daemon.kill();
    let () = redis::cmd("FLUSHALL").query_async(&mut cache).await.unwrap();
    stand.stage.execute("delete from docs where id = 3").await;
    let _daemon = Daemon::start(&stand.stage, &stand.rules).await;
    stand.assert_in_step("reconciled").await;
}
