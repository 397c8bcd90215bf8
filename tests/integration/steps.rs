//! The main job, change by change: what a committed row change does to its keys, with Postgres as the oracle.

use redis::AsyncCommands;

use crate::support::{Daemon, Mirror, Stage, assert_in_step, reads_outbox, wait_for};

const PRODUCT: &str = r#"
[rule.product]
table   = "public.products"
key     = "product:{id}"
value   = "json"
columns = ["id", "name", "price"]
"#;

const PRODUCTS: Mirror<'_> = Mirror { table: "products", key: "'product:' || id", columns: "id, name, price" };

/// Makes tables, sets up, and starts the daemon.
async fn keep(stage: &Stage, tables: &str, rules: &str) -> Daemon {
    stage.execute(tables).await;
    let rules = stage.rules(rules);
    stage.keepstep(&["setup"]);
    Daemon::start(stage, &rules).await
}

/// Waits until a key holds this value (`None`: does not exist).
async fn holds(stage: &Stage, key: &str, value: Option<&str>) {
    wait_for(&format!("`{key}` to hold {value:?}"), async || {
        let held: Option<String> = stage.get(key).await;
        (held.as_deref() == value).then_some(())
    })
    .await;
}

#[tokio::test]
async fn rows_are_written_changed_renamed_and_deleted() {
    let stage = Stage::set();
    let tables = "create table products (id int primary key, name text, price numeric(10,2), stock int)";
    let _daemon = keep(&stage, tables, PRODUCT).await;
    stage.execute("insert into products select i, 'p' || i, i * 1.5, 1 from generate_series(1, 100) i").await;
    assert_in_step(&stage, &[PRODUCTS]).await;
    stage.execute("update products set price = price + 1 where id % 2 = 0").await;
    stage.execute("update products set id = id + 1000 where id > 90").await;
    stage.execute("delete from products where id between 10 and 20").await;
    stage.execute("insert into products values (10, E'quoted \"\\n\\t\\\\ ü €', null, 0)").await;
    assert_in_step(&stage, &[PRODUCTS]).await;
}

#[tokio::test]
async fn nothing_of_an_aborted_transaction_or_savepoint_arrives() {
    let stage = Stage::set();
    let tables = "create table products (id int primary key, name text, price numeric)";
    let _daemon = keep(&stage, tables, PRODUCT).await;
    stage.execute("begin; insert into products values (1, 'never', 1); rollback").await;
    stage
        .execute(
            "begin; insert into products values (2, 'kept', 1); savepoint s; insert into products values (3, 'not', 1); \
             rollback to s; insert into products values (4, 'kept', 1); commit",
        )
        .await;
    holds(&stage, "product:4", Some(r#"{"id":4,"name":"kept","price":1}"#)).await;
    assert_in_step(&stage, &[PRODUCTS]).await;
}

#[tokio::test]
async fn truncate_deletes_the_keys_of_the_table_and_no_others() {
    let stage = Stage::set();
    let tables = "create table products (id int primary key, name text, price numeric); \
                  create table other (id int primary key, name text)";
    let rules = PRODUCT.to_owned()
        + r#"
[rule.other]
table   = "public.other"
key     = "other:{id}"
value   = "json"
columns = ["*"]
"#;
    let _daemon = keep(&stage, tables, &rules).await;
    stage.put("product:not-a-number", "an application's own").await;
    stage.execute("insert into products select i, 'p', 1 from generate_series(1, 3000) i").await;
    stage.execute("insert into other select i, 'o' from generate_series(1, 10) i").await;
    stage.execute("begin; truncate products; insert into products values (7, 'after', 2); commit").await;
    holds(&stage, "product:7", Some(r#"{"id":7,"name":"after","price":2}"#)).await;
    holds(&stage, "product:not-a-number", Some("an application's own")).await;
    let _: () = stage.cache().await.del("test:product:not-a-number").await.unwrap();
    let other = Mirror { table: "other", key: "'other:' || id", columns: "id, name" };
    assert_in_step(&stage, &[PRODUCTS, other]).await;
}

#[tokio::test]
async fn old_keys_go_under_every_replica_identity() {
    for identity in ["default", "full", "using index products_code"] {
        let stage = Stage::set();
        let key = if identity.starts_with("using") { "code" } else { "id" };
        let tables = format!(
            "create table products (id int primary key, code int not null, name text, price numeric); \
             create unique index products_code on products (code); alter table products replica identity {identity}"
        );
        let _daemon = keep(&stage, &tables, &PRODUCT.replace("{id}", &format!("{{{key}}}"))).await;
        stage.execute("insert into products select i, i, 'p' || i, i from generate_series(1, 20) i").await;
        stage.execute("update products set id = id + 100, code = code + 100 where id > 10").await;
        stage.execute("update products set name = 'same key' where id < 5").await;
        stage.execute("delete from products where id in (1, 2, 115)").await;
        let key = format!("'product:' || {key}");
        assert_in_step(&stage, &[Mirror { key: &key, ..PRODUCTS }]).await;
    }
}

#[tokio::test]
async fn partitions_are_one_table_and_rows_move_between_them() {
    let stage = Stage::set();
    let tables = "create table products (id int, region int, name text, price numeric, primary key (id, region)) \
                  partition by range (region); \
                  create table p1 partition of products for values from (0) to (10); \
                  create table p2 partition of products for values from (10) to (20)";
    let _daemon = keep(&stage, tables, &PRODUCT.replace("{id}", "{region}:{id}")).await;
    stage.execute("insert into products select i, i % 20, 'p', 1 from generate_series(1, 50) i").await;
    stage.execute("update products set region = 19 where region = 1").await;
    stage.execute("update p2 set name = 'in the leaf' where region = 12").await;
    stage.execute("create table p3 partition of products for values from (20) to (30)").await;
    stage.execute("insert into products values (99, 25, 'new partition', 3)").await;
    let mirror = Mirror { key: "'product:' || region || ':' || id", ..PRODUCTS };
    assert_in_step(&stage, &[mirror]).await;
}

#[tokio::test]
async fn an_unchanged_toasted_value_comes_from_the_old_row_or_is_read_again() {
    let stage = Stage::set();
    let tables = "create table products (id int primary key, name text, price numeric); \
                  alter table products alter column name set storage external; \
                  create table full_products (id int primary key, name text, price numeric); \
                  alter table full_products alter column name set storage external; \
                  alter table full_products replica identity full";
    let full = PRODUCT.replace("product", "full").replace("public.fulls", "public.full_products");
    let daemon = keep(&stage, tables, &(PRODUCT.to_owned() + &full)).await;
    for table in ["products", "full_products"] {
        stage.execute(&format!("insert into {table} values (1, repeat('x', 10000), 1), (2, 'short', 1)")).await;
        stage.execute(&format!("update {table} set price = 2")).await;
    }
    let full_mirror = Mirror { table: "full_products", key: "'full:' || id", columns: "id, name, price" };
    holds(&stage, "full:2", Some(r#"{"id":2,"name":"short","price":2}"#)).await;
    assert_in_step(&stage, &[PRODUCTS, full_mirror]).await;
    let unknown = daemon.metric("keepstep_unrendered_total").await.unwrap_or_default();
    // The outbox has all of a row.
    assert_eq!(unknown, if reads_outbox() { 0.0 } else { 1.0 }, "the log did not carry it");
}

#[tokio::test]
async fn delete_rules_invalidate_the_keys_of_the_old_and_the_new_row() {
    let stage = Stage::set();
    let tables = "create table products (id int primary key, category int, name text, price numeric); \
                  alter table products replica identity full";
    let rules = r#"
[rule.lists]
table   = "public.products"
changed = ["name"]
delete  = ["products:cat:{category}", "feed:global"]
# Or keys are deleted once more that the test has filled again.
redelete = "off"
"#;
    let _daemon = keep(&stage, tables, rules).await;
    let keys = ["products:cat:1", "products:cat:2", "products:cat:3", "feed:global", "products:cat:x"];
    let fill = async || {
        for key in keys {
            stage.put(key, "filled").await;
        }
    };
    let gone = async |expected: &[&str]| {
        for key in expected {
            holds(&stage, key, None).await;
        }
        for key in keys.iter().filter(|key| !expected.contains(key)) {
            assert_eq!(stage.get::<Option<String>>(key).await.as_deref(), Some("filled"), "{key}");
        }
    };
    fill().await;
    stage.execute("insert into products values (1, 1, 'a', 1)").await;
    gone(&["products:cat:1", "feed:global"]).await;
    fill().await;
    stage.execute("update products set category = 2").await;
    gone(&["products:cat:1", "products:cat:2", "feed:global"]).await;
    fill().await;
    stage.execute("update products set price = 7; update products set name = 'b'").await;
    gone(&["products:cat:2", "feed:global"]).await;
    fill().await;
    stage.execute("update products set price = 8; delete from products").await;
    gone(&["products:cat:2", "feed:global"]).await;
    fill().await;
    stage.execute("truncate products").await;
    gone(&["products:cat:1", "products:cat:2", "products:cat:3", "feed:global"]).await;
}

#[tokio::test]
async fn an_update_that_changes_none_of_the_columns_named_is_skipped() {
    let stage = Stage::set();
    let tables = "create table products (id int primary key, category int, name text, price numeric); \
                  alter table products replica identity full";
    let rules = r#"
[rule.lists]
table    = "public.products"
changed  = ["name"]
delete   = ["products:cat:{category}"]
redelete = "off"
"#;
    // Deleted again once the INSERT is visible, the keys that are filled here could go without any UPDATE.
    let _daemon = keep(&stage, tables, rules).await;
    for key in ["products:cat:1", "products:cat:2"] {
        stage.put(key, "filled").await;
    }
    stage.execute("insert into products values (1, 1, 'a', 1), (2, 2, 'a', 1)").await;
    holds(&stage, "products:cat:1", None).await;
    holds(&stage, "products:cat:2", None).await;
    stage.put("products:cat:1", "filled").await;
    stage.put("products:cat:2", "filled").await;
    stage.execute("update products set price = 2 where id = 1; update products set name = 'b' where id = 2").await;
    holds(&stage, "products:cat:2", None).await;
    holds(&stage, "products:cat:1", Some("filled")).await;
}

#[tokio::test]
async fn values_follow_ttl_write_on_delete_rename_and_strings() {
    let stage = Stage::set();
    let tables = "create table products (id bigint primary key, name text, price numeric); \
                  alter table products replica identity full";
    let rules = r#"
[rule.product]
table     = "public.products"
key       = "product:{name?none|lower}:{id}"
value     = "json"
columns   = ["id", "price"]
rename    = { price = "cost" }
strings   = ["id"]
ttl       = "1h"
jitter    = "50%"
on_delete = "keep"
[rule.present]
table   = "public.products"
vars    = { url = "https://shop/{id}" }
key     = "present:{url|md5}"
value   = "json"
columns = ["price"]
write   = "present"
"#;
    let _daemon = keep(&stage, tables, rules).await;
    // md5('https://shop/1') and md5('https://shop/2'), by Postgres.
    let hashed = stage.sql().await.query_one("select md5('https://shop/1'), md5('https://shop/2')", &[]).await.unwrap();
    let [one, two] = [0, 1].map(|column| format!("present:{}", hashed.get::<_, &str>(column)));
    stage.put(&one, "asked for").await;
    stage.execute("insert into products values (1, 'PEN', 1.50), (2, null, null)").await;
    holds(&stage, "product:pen:1", Some(r#"{"id":"1","cost":1.50}"#)).await;
    holds(&stage, "product:none:2", Some(r#"{"id":"2","cost":null}"#)).await;
    holds(&stage, &one, Some(r#"{"price":1.50}"#)).await;
    holds(&stage, &two, None).await;
    let ttl_ms: i64 = stage.cache().await.pttl("test:product:pen:1").await.unwrap();
    assert!((1_700_000..=3_600_000).contains(&ttl_ms), "{ttl_ms}");
    stage.execute("delete from products").await;
    holds(&stage, &one, None).await;
    holds(&stage, "product:pen:1", Some(r#"{"id":"1","cost":1.50}"#)).await;
}

#[tokio::test]
async fn ddl_while_running() {
    let stage = Stage::set();
    let tables = "create table products (id int primary key, name text, price int); \
                  create table other (id int primary key, name text)";
    let other = r#"
[rule.other]
table   = "public.other"
key     = "other:{id}"
value   = "json"
columns = ["*"]
"#;
    let daemon = keep(&stage, tables, &(PRODUCT.to_owned() + other)).await;
    let others = || Mirror { table: "other", key: "'other:' || id", columns: "other.*" };
    stage.execute("insert into products values (1, 'a', 1); insert into other values (1, 'a')").await;
    assert_in_step(&stage, &[PRODUCTS, others()]).await;
    // A column more, and a changed type: rows written from now on have them.
    stage.execute("alter table other add column more jsonb; update other set more = '[1]'").await;
    stage.execute("alter table products alter price type numeric(8,2); update products set price = 1.25").await;
    stage.follow();
    assert_in_step(&stage, &[PRODUCTS, others()]).await;
    // Another replica identity.
    stage.execute("alter table products replica identity full; update products set id = 2").await;
    stage.follow();
    assert_in_step(&stage, &[PRODUCTS, others()]).await;
    // A column that the rule needs is renamed: its keys are deleted, not left stale; the other rule goes on.
    stage.execute("alter table products rename name to title; update products set price = 3").await;
    stage.execute("update other set name = 'b'").await;
    holds(&stage, "product:2", None).await;
    stage.follow();
    stage.execute("update products set price = 3").await;
    assert_in_step(&stage, &[others()]).await;
    wait_for("the rule to be paused", async || {
        (daemon.metric("keepstep_rule_paused").await == Some(1.0)).then_some(())
    })
    .await;
    let (_, status) = daemon.get("/status").await.unwrap();
    assert!(status.contains("`name`"), "{status}");
    // Renamed back: the rule writes again.
    stage.execute("alter table products rename title to name").await;
    stage.follow();
    stage.execute("update products set price = 4").await;
    assert_in_step(&stage, &[PRODUCTS, others()]).await;
    assert_eq!(daemon.metric("keepstep_rule_paused").await, Some(0.0));
    // Dropped and made again under the same name.
    stage.execute("delete from products; drop table products").await;
    stage.execute("create table products (id int primary key, name text, price int)").await;
    match reads_outbox() {
        true => stage.follow(),
        false => stage.execute("alter publication keepstep add table products").await,
    }
    stage.execute("insert into products values (9, 'again', 1)").await;
    assert_in_step(&stage, &[PRODUCTS, others()]).await;
}

#[tokio::test]
async fn odd_names_are_quoted_where_they_must_be() {
    let stage = Stage::set();
    let tables =
        r#"create schema "Odd.Schema"; create table "Odd.Schema"."a ""table""" ("Id;" int primary key, "ü name" text)"#;
    let rules = r#"
[rule.odd]
table   = '"Odd.Schema"."a ""table"""'
key     = "odd:{Id;}"
value   = "json"
columns = ["Id;", "ü name"]
"#;
    let _daemon = keep(&stage, tables, rules).await;
    stage.execute(r#"insert into "Odd.Schema"."a ""table""" values (1, 'x')"#).await;
    holds(&stage, "odd:1", Some(r#"{"Id;":1,"ü name":"x"}"#)).await;
}

#[tokio::test]
async fn keys_are_written_again_before_their_ttl_is_over() {
    let stage = Stage::set();
    let tables = "create table products (id int primary key, name text, price numeric(10,2))";
    let rules = PRODUCT.to_owned() + "ttl = \"10s\"\nevery = \"1s\"\n";
    let daemon = keep(&stage, tables, &rules).await;
    stage.execute("insert into products values (1, 'Pen', 1.50)").await;
    let value = Some(r#"{"id":1,"name":"Pen","price":1.50}"#);
    holds(&stage, "product:1", value).await;
    let mut last = i64::MAX;
    for _ in 0..3 {
        wait_for("the key to live longer again", async || {
            let left: i64 = stage.cache().await.pttl("test:product:1").await.unwrap();
            assert!(left > 0, "it was gone: {left}");
            (std::mem::replace(&mut last, left) < left).then_some(())
        })
        .await;
    }
    // Whoever was away takes up what has come round meanwhile, although no row has changed.
    assert!(daemon.terminate().await.success());
    let () = stage.cache().await.del("test:product:1").await.unwrap();
    let daemon = Daemon::start(&stage, &stage.folder().join("keepstep.toml")).await;
    holds(&stage, "product:1", value).await;
    assert_in_step(&stage, &[PRODUCTS]).await;
    assert!(daemon.terminate().await.success());
}
