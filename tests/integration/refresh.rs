//! `[query.NAME]` with `mode = "refresh"`: keys that hold what SQL answers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use redis::AsyncCommands;
use serde_json::Value;

use crate::support::{Daemon, Stage, Stalled, Standby, lasts, wait_for};

const TABLES: &str = "
    create table sellers (id int primary key, name text not null);
    create table products (id int primary key, category_id int, seller_id int, name text not null default 'x', rank int default 0);
    create table marks (id int primary key);
    alter table sellers replica identity full;
    alter table products replica identity full;
    insert into sellers select i, 's' || i from generate_series(1, 6) i;
    insert into products select i, 1 + i % 5, 1 + i % 6, 'p' || i, i % 7 from generate_series(1, 60) i";

/// A page for each category, a row, two numbers, and a table whose keys show how far the stream has come.
const RULES: &str = r#"
[query.page]
key   = "page:{category}"
mode  = "refresh"
shape = "rows"
sql   = """select p.id as result, p.name, s.name as seller from public.products p left join public.sellers s on s.id = p.seller_id
           where p.category_id = :category order by p.rank, p.id limit 9 -- the best"""
[[query.page.on]]
table  = "public.products"
params = { category = "{category_id}" }
[[query.page.on]]
table   = "public.sellers"
changed = ["name"]
lookup  = "select distinct category_id as category from public.products where seller_id = :id"

[query.best]
key   = "best:{seller|md5}:{category}"
mode  = "refresh"
shape = "row"
sql   = """select p.* from public.products p join public.sellers s on s.id = p.seller_id
           where s.name = :seller and p.category_id = :category::int order by p.rank desc, p.id limit 1"""
ttl    = "1h"
jitter = "10%"
[[query.best.on]]
table  = "public.products"
params = { category = "{category_id}" }
lookup = "select name as seller from public.sellers where id = :seller_id"
[[query.best.on]]
table  = "public.sellers"
params = { seller = "{name}" }
lookup = "select distinct category_id as category from public.products where seller_id = :id"

[query.count]
key   = "count:products"
mode  = "refresh"
shape = "value"
sql   = "select count(*) from public.products"
[[query.count.on]]
table   = "public.products"
changed = ["id"]

[rule.mark]
table   = "public.marks"
key     = "mark:{id}"
value   = "json"
columns = ["id"]
"#;

/// What each key must hold; of the keys that need not be there only those that can be.
const EXPECTED: &str = "
    select 'page:' || c, coalesce((select json_agg(t) from (select p.id as result, p.name, s.name as seller from products p
        left join sellers s on s.id = p.seller_id where p.category_id = c order by p.rank, p.id limit 9) t), '[]')::text
      from generate_series(1, 7) c
    union all
    select 'best:' || md5(s.name) || ':' || c, row_to_json(p)::text from sellers s, generate_series(1, 7) c,
        lateral (select * from products p where p.seller_id = s.id and p.category_id = c order by p.rank desc, p.id limit 1) p
    union all
    select 'count:products', count(*)::text from products";

async fn set(rules: &str) -> (Stage, PathBuf) {
    let stage = Stage::set();
    let rules = prepare(&stage, rules).await;
    (stage, rules)
}

async fn prepare(stage: &Stage, rules: &str) -> PathBuf {
    stage.execute(TABLES).await;
    let rules = stage.rules(rules);
    stage.keepstep(&["setup"]);
    rules
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

async fn expected(stage: &Stage) -> BTreeMap<String, Value> {
    let rows = stage.sql().await.query(EXPECTED, &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), json(row.get(1)))).collect()
}

/// The keys of the queries that are there.
async fn held(stage: &Stage) -> BTreeMap<String, Value> {
    let mut cache = stage.cache().await;
    let mut held = BTreeMap::new();
    for pattern in ["page:*", "best:*", "count:*"] {
        let keys: Vec<String> = cache.keys(format!("test:{pattern}")).await.unwrap();
        for key in keys {
            if let Some(value) = cache.get::<_, Option<String>>(&key).await.unwrap() {
                held.insert(key.strip_prefix("test:").unwrap().to_owned(), json(&value));
            }
        }
    }
    held
}

/// Waits until each key is there and holds what SQL says. A page of nothing need not be there.
async fn in_step(stage: &Stage) {
    let mut last = String::new();
    let right = crate::support::comes_within(Duration::from_secs(30), async || {
        let (mut held, mut expected) = (held(stage).await, expected(stage).await);
        for side in [&mut held, &mut expected] {
            side.retain(|_, value| *value != json("[]"));
        }
        last =
            format!("{:?}", expected.iter().filter(|(key, value)| held.get(*key) != Some(value)).collect::<Vec<_>>());
        last +=
            &format!(" {:?}", held.iter().filter(|(key, value)| expected.get(*key) != Some(value)).collect::<Vec<_>>());
        held == expected
    });
    assert!(right.await, "{last}");
}

/// Has every key written.
async fn touch(stage: &Stage) {
    stage
        .execute(
            "update products set name = name; update products set id = id + 5000; update products set id = id - 5000",
        )
        .await;
    in_step(stage).await;
}

async fn is_there(stage: &Stage, key: &str) -> bool {
    stage.get::<Option<String>>(key).await.is_some()
}

async fn gone(stage: &Stage, key: &str) {
    wait_for(key, async || (!is_there(stage, key).await).then_some(())).await;
}

/// Waits until everything that is committed by now has come out of the stream.
async fn seen(stage: &Stage, mark: u32) {
    stage.execute(&format!("insert into marks values ({mark})")).await;
    wait_for("the mark", async || is_there(stage, &format!("mark:{mark}")).await.then_some(())).await;
}

/// How often something has become of keys of the query.
async fn count(daemon: &Daemon, query: &str, outcome: &str) -> u64 {
    let metrics = daemon.get("/metrics").await.unwrap().1;
    let name = format!("keepstep_refreshes_total{{outcome=\"{outcome}\",query=\"{query}\"}} ");
    metrics.lines().find_map(|line| line.strip_prefix(&name)).map_or(0, |count| count.parse().unwrap())
}

#[tokio::test]
async fn a_key_holds_what_the_query_answers() {
    let (stage, rules) = set(RULES).await;
    let daemon = Daemon::start(&stage, &rules).await;
    touch(&stage).await;
    for statement in [
        "update products set category_id = 2 where id = 5",
        "update products set rank = -1, name = E'it''s \\\\ \"1\"' where id = 7",
        "update sellers set name = 'renamed' where id = 3",
        "insert into products values (100, 7, 1, 'new', 1)",
        "delete from products where id = 100",
        "insert into products values (100, null, 1, 'nowhere', 1)",
        "update products set seller_id = null where id < 9",
        "begin; delete from products where category_id = 4; insert into products values (9, 3, 2) on conflict do nothing; commit",
    ] {
        stage.execute(statement).await;
        in_step(&stage).await;
    }
    assert_eq!(stage.get::<Option<String>>("page:7").await.as_deref(), Some("[]"));
    let ttl: i64 = redis::cmd("TTL")
        .arg(stage.cache().await.keys::<_, Vec<String>>("test:best:*").await.unwrap().first().unwrap())
        .query_async(&mut stage.cache().await)
        .await
        .unwrap();
    assert!((3000..=3600).contains(&ttl), "{ttl}");
    assert_eq!(count(&daemon, "page", "failed").await + count(&daemon, "best", "failed").await, 0);
    stage.execute("truncate products").await;
    gone(&stage, "page:1").await;
    in_step(&stage).await;
    assert_eq!(stage.get::<String>("count:products").await, "0");
    let pending = async || daemon.metric("keepstep_refreshes_pending").await.filter(|pending| *pending == 0.0);
    wait_for("nothing to be pending", pending).await;
}

/// A random change; several of them may be in one transaction.
fn change(random: &mut u64, of_sellers: bool) -> String {
    let mut below = |limit: u64| {
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*random >> 33) % limit
    };
    let (id, category, seller, rank) = (1 + below(80), 1 + below(6), 1 + below(6), below(9));
    match below(6) {
        _ if of_sellers => format!("update sellers set name = 's{seller}_' || {id} where id = {seller}"),
        0 => format!("update products set category_id = nullif({category}, 6) where id = {id}"),
        1 => format!("update products set rank = {rank} where category_id = {category}"),
        2 => format!("update products set seller_id = {seller} where id = {id}"),
        3 => format!("delete from products where id = {id}"),
        _ => format!("insert into products values ({id}, {category}, {seller}, 'n', {rank}) on conflict do nothing"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_random_changes_and_kills_every_key_is_what_sql_says() {
    let (stage, rules) = set(RULES).await;
    stage.set_fields("[postgres]", "query_connections = 4");
    let mut daemon = Daemon::start(&stage, &rules).await;
    touch(&stage).await;
    let mut random = 11;
    for round in 0..8 {
        let sql = stage.sql().await;
        // In one table at a time: a lookup sees the other one as it is when it runs.
        let of_sellers = round % 4 == 3;
        for _ in 0..15 {
            let statements = [change(&mut random, of_sellers), change(&mut random, of_sellers)].join("; ");
            sql.batch_execute(&format!("begin; {statements}; commit")).await.unwrap();
        }
        if round % 2 == 1 {
            daemon.kill();
            daemon = Daemon::start(&stage, &rules).await;
        }
        in_step(&stage).await;
    }
    drop(daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_query_holds_nothing_up_and_ends_right() {
    let slow =
        RULES.replace("select count(*) from public.products", "select count(*) from public.products, pg_sleep(0.4)");
    let (stage, rules) = set(&slow).await;
    let daemon = Daemon::start(&stage, &rules).await;
    for id in 1000..1010 {
        stage.execute(&format!("insert into products values ({id}, 1, 1)")).await;
        seen(&stage, id).await;
    }
    let read = count(&daemon, "count", "written").await;
    assert!(read < 9, "ten changes were seen in the time of {read} reads");
    wait_for("the last count", async || {
        (stage.get::<Option<String>>("count:products").await.as_deref() == Some("70")).then_some(())
    })
    .await;
    lasts(Duration::from_secs(1)).await;
    assert_eq!(stage.get::<String>("count:products").await, "70");
    drop(daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_read_before_the_change_is_visible() {
    let mut stage = Stage::set();
    let rules = prepare(&stage, RULES).await;
    let standby = Standby::synchronous(&mut stage).await;
    let daemon = Daemon::start(&stage, &rules).await;
    touch(&stage).await;
    let before = (count(&daemon, "page", "written").await, held(&stage).await);
    standby.stall();
    let both = "begin; update products set category_id = 2 where id = 5; insert into marks values (1); commit";
    let stalled = Stalled::execute(&stage, both).await;
    wait_for("the change, decoded", async || is_there(&stage, "mark:1").await.then_some(())).await;
    lasts(Duration::from_millis(300)).await;
    assert_eq!((count(&daemon, "page", "written").await, held(&stage).await), before);
    standby.resume();
    stalled.done().await;
    in_step(&stage).await;
    assert!(held(&stage).await != before.1);
}

#[tokio::test]
async fn what_was_not_read_yet_is_read_after_a_crash() {
    // Without the query whose lookups need what is locked.
    let (page, rest) = RULES.split_once("[query.best]").unwrap();
    let (_, count) = rest.split_once("[query.count]").unwrap();
    let (stage, rules) = set(&format!("{page}[query.count]{count}")).await;
    stage.set_fields("[postgres]", "query_connections = 3");
    let daemon = Daemon::start(&stage, &rules).await;
    stage.execute("update products set id = id + 5000; update products set id = id - 5000").await;
    let late = async || {
        let (held, right) = (held(&stage).await.remove("page:3"), expected(&stage).await.remove("page:3"));
        assert!(right.is_some());
        (held == right).then_some(())
    };
    wait_for("the page", &late).await;
    seen(&stage, 1).await;
    let blocker = stage.sql().await;
    blocker.batch_execute("begin; lock table sellers in access exclusive mode").await.unwrap();
    let commit: String = stage.sql().await.query_one("select pg_current_wal_lsn()::text", &[]).await.unwrap().get(0);
    stage.execute("insert into products values (300, 3, null, 'late', -5)").await;
    seen(&stage, 2).await;
    // What needs no lock is there already, and was released with what cannot be read yet.
    wait_for("the count", async || (stage.get::<String>("count:products").await == "61").then_some(())).await;
    seen(&stage, 3).await;
    daemon.kill();
    let low = stage.checkpoint().await.unwrap().low;
    let behind = format!("select '{low}'::pg_lsn - '{commit}'::pg_lsn < 1000");
    assert!(stage.sql().await.query_one(&behind, &[]).await.unwrap().get::<_, bool>(0), "{low} {commit}");
    blocker.batch_execute("rollback").await.unwrap();
    assert!(late().await.is_none());
    let _daemon = Daemon::start(&stage, &rules).await;
    wait_for("the page", &late).await;
}

#[tokio::test]
async fn a_query_that_fails_deletes_its_key_and_holds_nothing() {
    let stage = Stage::set();
    // Nobody follows the view, so nothing but the query notices what becomes of it.
    let of_view = RULES.replace("from public.products p left join", "from public.shown p left join");
    let rules = prepare(&stage, &of_view).await;
    stage.execute("create view shown as select * from products").await;
    let daemon = Daemon::start(&stage, &rules).await;
    touch(&stage).await;
    stage.execute("alter view shown rename to hidden").await;
    stage.execute("update products set name = 'secret' where id = 5").await;
    gone(&stage, "page:1").await;
    assert!(is_there(&stage, "page:2").await);
    let commit: String = stage.sql().await.query_one("select pg_current_wal_lsn()::text", &[]).await.unwrap().get(0);
    wait_for("progress", async || {
        seen(&stage, 1 + rand(&stage).await).await;
        let low = stage.checkpoint().await.unwrap().low;
        let past = format!("select '{low}'::pg_lsn > '{commit}'::pg_lsn");
        stage.sql().await.query_one(&past, &[]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
    wait_for("another try", async || (count(&daemon, "page", "failed").await > 2).then_some(())).await;
    stage.execute("alter view hidden rename to shown").await;
    wait_for("the page", async || is_there(&stage, "page:1").await.then_some(())).await;
    assert!(!daemon.log().contains("secret"));
}

async fn rand(stage: &Stage) -> u32 {
    let count: i64 = stage.sql().await.query_one("select count(*) from marks", &[]).await.unwrap().get(0);
    u32::try_from(count).unwrap()
}

/// With `synchronous_commit = off` a commit is visible before it is flushed. A WAL writer that sleeps leaves it so.
#[tokio::test]
async fn what_is_not_flushed_is_not_shown() {
    let sleepy = "wal_writer_delay = 10s\nwal_writer_flush_after = 1GB";
    let stage = Stage::set_with(sleepy, &[]);
    let rules = prepare(&stage, RULES).await;
    let _daemon = Daemon::start(&stage, &rules).await;
    touch(&stage).await;
    let (flushed, unflushed) = (stage.sql().await, stage.sql().await);
    unflushed.batch_execute("set synchronous_commit = off").await.unwrap();
    let mut shown = 60;
    for id in 1000..1030 {
        // The first has the count read, and that may see the second.
        let insert = |id| format!("insert into products values ({id}, 1, 1)");
        let (first, second) = (insert(id), insert(id + 1000));
        let (one, other) = tokio::join!(flushed.batch_execute(&first), unflushed.batch_execute(&second));
        one.and(other).unwrap();
        let end: String = unflushed.query_one("select pg_current_wal_insert_lsn()::text", &[]).await.unwrap().get(0);
        shown += 2;
        wait_for("both", async || {
            let count: i64 = stage.get::<String>("count:products").await.parse().unwrap();
            let flushed = format!("select pg_current_wal_flush_lsn() >= '{end}'::pg_lsn");
            let flushed: bool = unflushed.query_one(&flushed, &[]).await.unwrap().get(0);
            assert!(count < shown || flushed, "{count}");
            (count == shown).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn more_keys_than_one_change_may_refresh_are_deleted() {
    let (stage, rules) = set(&RULES.replace("shape = \"rows\"", "shape = \"rows\"\nmax_keys = 5")).await;
    let _daemon = Daemon::start(&stage, &rules).await;
    touch(&stage).await;
    stage.execute("update sellers set name = 'five' where id = 1").await;
    in_step(&stage).await;
    stage.execute("insert into products values (101, 6, 1)").await;
    in_step(&stage).await;
    stage.execute("update sellers set name = 'six' where id = 1").await;
    for category in 1..=6 {
        gone(&stage, &format!("page:{category}")).await;
    }
}

#[tokio::test]
async fn many_changes_within_min_interval_are_one_read() {
    let rested = RULES.replace("shape = \"value\"", "shape = \"value\"\nmin_interval = \"1s\"");
    let (stage, rules) = set(&rested).await;
    let daemon = Daemon::start(&stage, &rules).await;
    for id in 1000..1040 {
        stage.execute(&format!("insert into products values ({id}, 1, 1)")).await;
    }
    seen(&stage, 1).await;
    wait_for("the last count", async || {
        (stage.get::<Option<String>>("count:products").await.as_deref() == Some("100")).then_some(())
    })
    .await;
    assert!(count(&daemon, "count", "written").await < 10);
}

#[tokio::test]
async fn a_connection_that_ended_while_nothing_was_read_costs_no_key() {
    let (stage, rules) = set(RULES).await;
    let daemon = Daemon::start(&stage, &rules).await;
    touch(&stage).await;
    let of_queries = "from pg_stat_activity where pid <> pg_backend_pid() and (query like '%octet_length(found.value)%'
        or query like '%pg_current_wal_flush_lsn() >=%' or query like '%as looked_up limit%')";
    let sql = stage.sql().await;
    let ended = sql.query(&format!("select pg_terminate_backend(pid) {of_queries}"), &[]).await.unwrap();
    assert!(ended.len() >= 2, "one of each kind");
    wait_for("no query connection", async || {
        let left = sql.query_one(&format!("select count(*) {of_queries}"), &[]).await.unwrap();
        (left.get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    seen(&stage, 1).await;
    stage.execute("insert into products values (100, 1, 1)").await;
    in_step(&stage).await;
    assert!(!daemon.get("/metrics").await.unwrap().1.contains("outcome=\"failed\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_goes_stale_faster_than_it_is_read_holds_up_nothing() {
    let slow =
        RULES.replace("select count(*) from public.products", "select count(*) from public.products, pg_sleep(0.3)");
    let (stage, rules) = set(&slow).await;
    stage.execute("insert into marks select generate_series(1, 500)").await;
    let sql = stage.sql().await;
    let writer = tokio::spawn(async move {
        for id in 1000.. {
            sql.batch_execute(&format!("insert into products values ({id}, 1, 1)")).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let daemon = Daemon::start(&stage, &rules).await;
    let warm = async || daemon.get("/ready?warm=1").await.is_some_and(|(status, _)| status == 200);
    assert!(crate::support::comes_within(Duration::from_secs(15), warm).await);
    assert!(is_there(&stage, "mark:500").await && is_there(&stage, "count:products").await);
    assert!(!writer.is_finished());
    writer.abort();
}

/// A page for each of the categories there are, and what time changes.
const KEYED: &str = r#"
[query.page]
key   = "page:{category}"
mode  = "refresh"
shape = "rows"
sql   = "select id, name from public.products where category_id = :category order by id"
keys  = "select id as category from public.categories -- all"
[[query.page.on]]
table  = "public.products"
params = { category = "{category_id}" }
[[query.page.on]]
table  = "public.categories"
params = { category = "{id}" }

[query.count]
key   = "count:products"
mode  = "refresh"
shape = "value"
sql   = "select count(*) from public.products"
[[query.count.on]]
table  = "public.products"

[query.clock]
key   = "clock:{id}"
mode  = "refresh"
shape = "value"
sql   = "select :id || ' ' || clock_timestamp()"
keys  = "select 'a' as id union select 'b'"
every = "1s"
[[query.clock.on]]
table  = "public.marks"
params = { id = "{id}" }
"#;

const CATEGORIES: &str = "
    create table categories (id int primary key);
    alter table categories replica identity full;
    insert into categories select generate_series(1, 7)";

const KEYED_EXPECTED: &str = "
    select 'page:' || c.id, coalesce((select json_agg(t) from (select id, name from products
        where category_id = c.id order by id) t), '[]')::text from categories c
    union all
    select 'count:products', count(*)::text from products";

/// Waits until there are exactly the keys that there should be, and each is right.
async fn all_there(stage: &Stage) {
    wait_for("all keys", async || {
        let rows = stage.sql().await.query(KEYED_EXPECTED, &[]).await.unwrap();
        let expected: BTreeMap<String, Value> = rows.iter().map(|row| (row.get(0), json(row.get(1)))).collect();
        (held(stage).await == expected).then_some(())
    })
    .await;
}

#[tokio::test]
async fn all_keys_that_there_should_be_are_there_and_no_others() {
    let stage = Stage::set();
    stage.execute(CATEGORIES).await;
    let rules = prepare(&stage, KEYED).await;
    let daemon = Daemon::start(&stage, &rules).await;
    all_there(&stage).await;
    for statement in [
        "insert into categories values (8)",
        "update products set category_id = 8 where id < 20",
        "update categories set id = 9 where id = 8",
        "delete from categories where id = 3",
        "update products set category_id = 3 where id = 30",
        "begin; insert into categories values (3); delete from products where id = 31; commit",
        "truncate products",
        "insert into products select i, 1 + i % 5, 1 + i % 6, 'p' || i, i % 7 from generate_series(1, 60) i",
        "truncate categories",
    ] {
        stage.execute(statement).await;
        all_there(&stage).await;
    }
    stage.execute("insert into categories select generate_series(1, 400)").await;
    all_there(&stage).await;
    for key in ["page:5", "page:399"] {
        let _: () = stage.cache().await.del(format!("test:{key}")).await.unwrap();
    }
    stage.keepstep(&["warm"]);
    all_there(&stage).await;
    // What happened while nobody looked.
    daemon.kill();
    stage.lose_what_comes().await;
    stage.execute("delete from categories where id > 380; update products set name = 'unseen' where id < 40").await;
    stage.put("page:999", "\"an orphan\"").await;
    let _daemon = Daemon::start(&stage, &rules).await;
    all_there(&stage).await;
}

#[tokio::test]
async fn more_keys_than_are_tried_again_are_written_in_the_end() {
    let stage = Stage::set();
    stage.execute(CATEGORIES).await;
    let (keyed, _) = KEYED.split_once("[query.clock]").unwrap();
    let rules = prepare(&stage, &keyed.replace("from public.products where", "from public.shown where")).await;
    stage.execute("create view shown as select * from products").await;
    let daemon = Daemon::start(&stage, &rules).await;
    all_there(&stage).await;
    stage.execute("alter view shown rename to hidden").await;
    stage.execute("insert into categories select generate_series(8, 1300)").await;
    wait_for("each to fail", async || (count(&daemon, "page", "failed").await > 1300).then_some(())).await;
    stage.execute("alter view hidden rename to shown").await;
    all_there(&stage).await;
}

#[tokio::test]
async fn whoever_ends_when_caught_up_does_not_wait_for_keys_that_fail_for_good() {
    let (keyed, _) = KEYED.split_once("[query.clock]").unwrap();
    let failing = keyed.replace("id, name from public.products", "1 / (id * 0) from public.products");
    let stage = Stage::set();
    stage.execute(CATEGORIES).await;
    let rules = prepare(&stage, &failing).await;
    stage.execute("insert into categories select generate_series(8, 1300)").await;
    stage.execute("insert into products select i, i from generate_series(100, 1300) i").await;
    assert_eq!(Daemon::spawn(&stage, &rules, &["--until-caught-up"]).end().await.code(), Some(1));
}

#[tokio::test]
async fn keys_that_cannot_be_listed_keep_no_other_rule_owing() {
    let page = r#"
[query.page]
key   = "page:{category}"
mode  = "refresh"
shape = "value"
sql   = "select count(*) from public.products where category_id = :category"
keys  = "select id as category from public.shown"
every = "2s"
[[query.page.on]]
table  = "public.categories"
params = { category = "{id}" }
"#;
    let best = page.replace("page", "best").replace("public.shown", "public.categories");
    let row = r#"
[rule.category]
table   = "public.categories"
key     = "category:{id}"
value   = "json"
columns = ["id"]
ttl     = "1h"
every   = "2s"
"#;
    let stage = Stage::set();
    stage.execute(CATEGORIES).await;
    stage.execute("create view shown as select * from categories").await;
    let rules = prepare(&stage, &[page, &best, row].concat()).await;
    let _daemon = Daemon::start(&stage, &rules).await;
    wait_for("a page", async || is_there(&stage, "page:7").await.then_some(())).await;
    stage.execute("alter view shown rename to hidden").await;
    let only_pages = async || {
        let owing = stage.checkpoint().await?.owing;
        owing.into_keys().eq(["page.1"]).then_some(())
    };
    wait_for("everything else to be written", only_pages).await;
    stage.execute("alter view hidden rename to shown").await;
    wait_for("the pages", async || (!stage.checkpoint().await?.owing.contains_key("page.1")).then_some(())).await;
}

#[tokio::test]
async fn verify_finds_what_differs_and_repairs_it() {
    let stage = Stage::set();
    stage.execute(CATEGORIES).await;
    let rules = prepare(&stage, KEYED).await;
    let _daemon = Daemon::start(&stage, &rules).await;
    all_there(&stage).await;
    let verify = |arguments: &[&str]| stage.run(&[&["verify", "-o", "json"], arguments].concat());
    let fine = verify(&[]);
    assert!(fine.status.success(), "{fine:?}");
    let said = String::from_utf8_lossy(&fine.stdout).into_owned();
    // Seven pages and a count; what time changes is left out.
    assert!(said.contains("\"checked\":8") && said.contains("\"skipped\":2"), "{said}");
    for arguments in [&[][..], &["--repair"]] {
        stage.put("page:2", "[\"wrong\"]").await;
        stage.put("page:99", "[\"an orphan\"]").await;
        stage.put("count:products", "7").await;
        let _: () = stage.cache().await.del("test:page:3").await.unwrap();
        let found = verify(arguments);
        assert_eq!(found.status.code(), Some(3), "{found:?}");
        let said = String::from_utf8_lossy(&found.stdout).into_owned();
        for key in ["test:page:2", "test:page:99", "test:count:products", "test:page:3"] {
            assert!(said.contains(key), "{said}");
        }
        assert!(said.contains("\"diverged\":4"), "{said}");
    }
    all_there(&stage).await;
    assert!(verify(&["--rule", "page"]).status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_gives_no_false_alarm_while_rows_change() {
    let stage = Stage::set();
    stage.execute(CATEGORIES).await;
    let rules = prepare(&stage, KEYED).await;
    let _daemon = Daemon::start(&stage, &rules).await;
    all_there(&stage).await;
    let sql = stage.sql().await;
    let changing = tokio::spawn(async move {
        for round in 0..600 {
            let statement =
                format!("update products set name = 'n{round}', category_id = 1 + {round} % 7 where id = {round} % 60");
            sql.batch_execute(&statement).await.unwrap();
        }
    });
    while !changing.is_finished() {
        let found = tokio::task::block_in_place(|| stage.run(&["verify"]));
        assert!(found.status.success(), "{found:?}");
    }
    changing.await.unwrap();
    all_there(&stage).await;
}

#[tokio::test]
async fn what_time_changes_is_read_again() {
    let stage = Stage::set();
    stage.execute(CATEGORIES).await;
    let rules = prepare(&stage, KEYED).await;
    let _daemon = Daemon::start(&stage, &rules).await;
    for _ in 0..2 {
        let clocks =
            async || [stage.get::<Option<String>>("clock:a").await, stage.get::<Option<String>>("clock:b").await];
        let before = clocks().await;
        wait_for("other times", async || {
            let now = clocks().await;
            (now.iter().zip(&before).all(|(now, before)| now.is_some() && now != before)).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn plan_says_what_would_be_read() {
    let (stage, _) = set(RULES).await;
    let planned = |change: &str| {
        let output = stage.run(&["plan", change]);
        assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let update = r#"{"table": "public.products", "old": {"id": 1, "category_id": 2, "seller_id": 1},
                     "new": {"id": 1, "category_id": 3, "seller_id": 1}}"#;
    insta::assert_snapshot!(
        planned(update)
            + &planned(r#"{"table": "public.products", "new": {"id": 1, "category_id": 7, "seller_id": null}}"#)
    );
}

#[tokio::test]
async fn queries_that_cannot_be_refreshed_are_refused_at_their_place() {
    let (stage, _) = set(RULES).await;
    let mut shown = String::new();
    let refused = |sql: &str, shape: &str, keys: &str| {
        stage.rules(&format!(
            "[query.page]\nkey = \"page:{{category}}\"\nmode = \"refresh\"\nsql = \"{sql}\"\nshape = \"{shape}\"\n{keys}\n\
             [[query.page.on]]\ntable = \"public.products\"\nparams = {{ category = \"{{category_id}}\" }}\n"
        ));
        let output = stage.run(&["check", "--connect"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(78), "{said}");
        assert_eq!(stage.run(&["run"]).status.code(), Some(78), "{sql}");
        said.lines().filter(|line| !line.contains("-->")).collect::<Vec<_>>().join("\n") + "\n~~~\n\n"
    };
    for (sql, shape) in [
        ("select nam from public.products where category_id = :category", "rows"),
        ("select id, name from public.products where category_id = :category", "value"),
        ("select where :category is null", "value"),
        ("delete from public.products where category_id = :category returning id", "rows"),
        ("select :category is null", "row"),
    ] {
        shown.push_str(&refused(sql, shape, ""));
    }
    for keys in [
        "select id from public.products",
        "select category_id from public.product",
        "delete from public.products returning id as category",
        "select null::json as category",
    ] {
        let sql = "select id from public.products where category_id = :category";
        shown.push_str(&refused(sql, "rows", &format!("keys = \"{keys}\"")));
    }
    insta::assert_snapshot!(shown);
    // What is looked up may be no text.
    stage.rules(
        "[query.page]\nkey = \"page:{category}:{seller}\"\nmode = \"refresh\"\nsql = \"select :category || :seller\"\n\
         shape = \"value\"\n[[query.page.on]]\ntable = \"public.products\"\n\
         lookup = \"select name as category, name as seller from public.sellers where id = :seller_id\"\n",
    );
    let output = stage.run(&["check", "--connect"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("warning[KS057]: query `page` can give two results the same key"), "{said}");
    assert_ne!(output.status.code(), Some(78), "{said}");
}
