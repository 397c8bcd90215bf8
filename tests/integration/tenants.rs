//! One rule for the tables of many tenants, which come and go: each has its own keys, and nobody else's are touched.

use redis::AsyncCommands;
use serde_json::Value;

use crate::support::{Daemon, Mirror, Stage, assert_in_step, reads_outbox, wait_for};

const RULES: &str = r#"
[rule.product]
table   = "tenant_*.products"
key     = "{_schema}:product:{_pk}"
value   = "json"
columns = ["*"]

[rule.lists]
table  = "tenant_*.products"
delete = ["{_schema}:list"]
"#;

/// The statements that make a tenant, with some rows.
fn tenant(schema: &str) -> String {
    format!(
        "create schema {schema}; create table {schema}.products (org int, id int, name text, primary key (org, id));
         insert into {schema}.products select n % 3, n, '{schema} ' || n from generate_series(1, 50) n;"
    )
}

/// What the cache must hold of these tenants, and of no others.
async fn in_step(stage: &Stage, schemas: &[&str]) {
    let names: Vec<(String, String)> = schemas
        .iter()
        .map(|name| (format!("{name}.products"), format!("'{name}:product:' || org || ':' || id")))
        .collect();
    let mirrors: Vec<Mirror<'_>> =
        names.iter().map(|(table, key)| Mirror { table, key, columns: "org, id, name" }).collect();
    assert_in_step(stage, &mirrors).await;
}

/// Three tenants with a publication, and a daemon that has warmed them.
async fn three(stage: &Stage) -> Daemon {
    for schema in ["tenant_a", "tenant_b", "tenant_c"] {
        stage.execute(&tenant(schema)).await;
    }
    let rules = stage.rules(RULES);
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(stage, &rules).await;
    in_step(stage, &["tenant_a", "tenant_b", "tenant_c"]).await;
    daemon
}

async fn gone(stage: &Stage, key: &str) {
    wait_for("the key to go", async || stage.get::<Option<String>>(key).await.is_none().then_some(())).await;
}

/// Why each rule is paused, of those that are.
async fn paused(daemon: &Daemon) -> Vec<(String, String)> {
    let (_, status) = daemon.get("/status").await.unwrap();
    let status: Value = serde_json::from_str(&status).unwrap();
    let rules = status["rules"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    rules.filter(|rule| rule["paused"].is_string()).map(|rule| (text(&rule["name"]), text(&rule["paused"]))).collect()
}

#[tokio::test]
async fn each_tenant_has_its_own_keys() {
    let stage = Stage::set();
    let daemon = three(&stage).await;
    stage
        .execute(
            "update tenant_a.products set name = 'x' where id < 10; delete from tenant_b.products where id > 40;
             update tenant_c.products set org = 7 where id = 1",
        )
        .await;
    in_step(&stage, &["tenant_a", "tenant_b", "tenant_c"]).await;
    // What nobody should touch is told by its value.
    stage.put("tenant_b:product:1:1", "tampered").await;
    stage.put("tenant_b:list", "b").await;
    stage.put("tenant_a:list", "a").await;
    stage.execute("truncate tenant_a.products").await;
    gone(&stage, "tenant_a:list").await;
    gone(&stage, "tenant_a:product:2:2").await;
    stage.execute("insert into tenant_c.products values (9, 999, 'last')").await;
    wait_for("what comes later", async || stage.get::<Option<String>>("tenant_c:product:9:999").await).await;
    assert_eq!(stage.get::<String>("tenant_b:product:1:1").await, "tampered");
    assert_eq!(stage.get::<String>("tenant_b:list").await, "b");
    let said = stage.keepstep(&["verify", "--repair", "--rule", "product[tenant_a.products]"]);
    assert!(said.contains("0 not right"), "{said}");
    let found = stage.run(&["verify", "--repair", "--rule", "product"]);
    assert_eq!(found.status.code(), Some(3), "the tampered one, among the keys of all tenants");
    assert!(daemon.terminate().await.success());
}

#[tokio::test]
async fn tenants_come_and_go_while_it_runs_and_while_it_does_not() {
    let stage = Stage::set();
    let daemon = three(&stage).await;
    stage.put("tenant_a:product:1:1", "tampered").await;
    stage.put("tenant_d:list", "filled before anybody followed the table").await;
    stage.execute(&tenant("tenant_d")).await;
    stage.keepstep(&["setup"]);
    stage.execute("update tenant_d.products set name = 'early' where id < 5").await;
    gone(&stage, "tenant_d:list").await;
    wait_for("the new tenant's rows", async || stage.get::<Option<String>>("tenant_d:product:1:1").await).await;
    assert_eq!(stage.get::<String>("tenant_a:product:1:1").await, "tampered", "nothing else was read");
    stage.execute("update tenant_a.products set name = 'new' where id = 1").await;
    in_step(&stage, &["tenant_a", "tenant_b", "tenant_c", "tenant_d"]).await;
    stage.execute("update tenant_d.products set name = 'late' where id > 40").await;
    in_step(&stage, &["tenant_a", "tenant_b", "tenant_c", "tenant_d"]).await;

    stage.put("tenant_b:list", "of nobody").await;
    stage.execute("drop schema tenant_b cascade").await;
    in_step(&stage, &["tenant_a", "tenant_c", "tenant_d"]).await;
    assert_eq!(stage.get::<Option<String>>("tenant_b:list").await, None);
    let log = daemon.log();
    assert!(log.contains("their keys go next") && !log.contains("are no longer kept right"), "{log}");

    // Seen, perhaps, and not done with.
    stage.execute(&tenant("tenant_e")).await;
    stage.execute("drop schema tenant_c cascade").await;
    stage.keepstep(&["setup"]);
    daemon.kill();
    stage.execute("drop table tenant_d.products; update tenant_e.products set name = 'y' where id = 2").await;
    let daemon = Daemon::start(&stage, &stage.folder().join("keepstep.toml")).await;
    in_step(&stage, &["tenant_a", "tenant_e"]).await;
    // Nothing is remembered of those that are gone.
    let record: String = stage.cache().await.get(format!("{}keepstep:rules", Stage::PREFIX)).await.unwrap();
    assert!(record.contains("product[tenant_e.products]") && !record.contains("tenant_b"), "{record}");
    let all = stage.keepstep(&["verify"]);
    assert!(all.contains(" 100 keys compared: 0 not right"), "{all}");
    assert!(daemon.terminate().await.success());
}

/// A dropped table is as good as TRUNCATE: keys go that hold a text, too, and the next tenant of that name finds none.
#[tokio::test]
async fn keys_that_hold_a_text_go_with_their_table() {
    let stage = Stage::set();
    let pages = |schema: &str| {
        format!(
            "create schema {schema}; create table {schema}.pages (slug text primary key, body text);
             insert into {schema}.pages values ('home', 'h'), ('a:b', 'c')"
        )
    };
    for schema in ["tenant_acme", "tenant_b"] {
        stage.execute(&pages(schema)).await;
    }
    let rules = stage.rules(
        "[rule.page]\ntable = \"tenant_*.pages\"\nkey = \"{_schema}:page:{_pk}\"\nvalue = \"json\"\ncolumns = [\"*\"]\n",
    );
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(&stage, &rules).await;
    wait_for("the pages", async || stage.get::<Option<String>>("tenant_b:page:a:b").await).await;
    stage.execute("drop schema tenant_acme cascade").await;
    gone(&stage, "tenant_acme:page:home").await;
    gone(&stage, "tenant_acme:page:a:b").await;
    let record: String = stage.cache().await.get(format!("{}keepstep:rules", Stage::PREFIX)).await.unwrap();
    assert!(record.contains("tenant_b") && !record.contains("tenant_acme"), "{record}");
    assert_eq!(
        stage.get::<Option<String>>("tenant_b:page:home").await.as_deref(),
        Some(r#"{"slug":"home","body":"h"}"#)
    );
    assert!(daemon.terminate().await.success());
}

/// A long ALTER on a table of the publication is no matter of those that the rules follow, nor of other tenants.
#[tokio::test]
async fn a_locked_table_holds_up_no_other() {
    let stage = Stage::set();
    stage.execute("create schema other; create table other.t (id int primary key)").await;
    let daemon = three(&stage).await;
    stage.execute("alter publication keepstep add table other.t").await;
    let busy = stage.sql().await;
    busy.batch_execute("begin; lock table other.t, tenant_b.products in access exclusive mode").await.unwrap();
    daemon.kill();
    let daemon = Daemon::start(&stage, &stage.folder().join("keepstep.toml")).await;
    stage.execute("update tenant_a.products set name = 'meanwhile' where id = 3").await;
    wait_for("the change", async || {
        stage.get::<Option<String>>("tenant_a:product:0:3").await?.contains("meanwhile").then_some(())
    })
    .await;
    busy.batch_execute("rollback").await.unwrap();
    in_step(&stage, &["tenant_a", "tenant_b", "tenant_c"]).await;
    assert_eq!(daemon.metric("keepstep_sessions_total").await, Some(1.0));
    assert!(daemon.terminate().await.success());
}

/// A tag of a table that is gone takes its keys with it: what was made from the table is as stale as if its rows had been deleted.
#[tokio::test]
async fn a_tenant_that_is_gone_takes_what_has_its_tags() {
    let stage = Stage::set();
    stage.execute(&(tenant("tenant_a") + &tenant("tenant_b"))).await;
    let stale = "[rule.stale]\ntable = \"tenant_*.products\"\ndelete_tags = [\"{_schema}:product:{_pk}\"]\n";
    let rules = stage.rules(&(RULES.to_owned() + stale));
    stage.keepstep(&["setup"]);
    let _daemon = Daemon::start(&stage, &rules).await;
    in_step(&stage, &["tenant_a", "tenant_b"]).await;
    for schema in ["tenant_a", "tenant_b"] {
        stage.put(&format!("page:{schema}"), "filled").await;
        let tag = format!("test:tag:{schema}:product:1:1");
        let () = stage.cache().await.sadd(tag, format!("page:{schema}")).await.unwrap();
    }
    stage.execute("drop table tenant_a.products").await;
    wait_for("the tag to go", async || {
        let there: bool = stage.cache().await.exists("test:tag:tenant_a:product:1:1").await.unwrap();
        (!there).then_some(())
    })
    .await;
    assert_eq!(stage.get::<Option<String>>("page:tenant_a").await, None);
    assert_eq!(stage.get::<String>("page:tenant_b").await, "filled");
}

/// Killed again and again while tenants come and go, it is right in the end.
#[tokio::test]
async fn kills_lose_no_tenant() {
    let stage = Stage::set();
    let mut daemon = three(&stage).await;
    let rules = stage.folder().join("keepstep.toml");
    for (round, schema) in ["tenant_x", "tenant_y", "tenant_z"].into_iter().enumerate() {
        let sessions = daemon.metric("keepstep_sessions_total").await.unwrap();
        stage.execute(&tenant(schema)).await;
        stage.keepstep(&["setup"]);
        if round > 0 {
            stage.execute("drop schema tenant_x cascade; create schema tenant_x").await;
        }
        wait_for("the next session", async || {
            (daemon.metric("keepstep_sessions_total").await? > sessions).then_some(())
        })
        .await;
        daemon.kill();
        daemon = Daemon::start(&stage, &rules).await;
    }
    in_step(&stage, &["tenant_a", "tenant_b", "tenant_c", "tenant_y", "tenant_z"]).await;
    assert!(daemon.terminate().await.success());
}

#[tokio::test]
async fn nothing_matches_at_first() {
    let stage = Stage::set();
    let rules = stage.rules(RULES);
    stage.execute("create publication keepstep for all tables with (publish_via_partition_root = true)").await;
    stage.keepstep(&["setup"]);
    let checked = stage.run(&["check", "--connect"]);
    let said = String::from_utf8_lossy(&checked.stderr);
    assert!(checked.status.success() && said.contains("warning[KS081]"), "{said}");
    let daemon = Daemon::start(&stage, &rules).await;
    assert!(daemon.log().contains("no table matches yet"));
    let none = stage.run(&["warm", "--rule", "product"]);
    assert!(String::from_utf8_lossy(&none.stderr).contains("no table matches the pattern of rule `product`"));
    // Partitions, what is not logged and what is of another name are no tenants.
    stage
        .execute(
            "create schema tenant_p;
             create table tenant_p.products (org int, id int, name text, primary key (org, id)) partition by range (id);
             create schema tenant_part;
             create table tenant_part.products partition of tenant_p.products for values from (0) to (100);
             create schema tenant_u; create unlogged table tenant_u.products (id int primary key);
             create schema other; create table other.products (id int primary key);
             create table tenant_p.products_2 (id int primary key);
             insert into tenant_p.products values (1, 1, 'a'), (1, 2, 'b')",
        )
        .await;
    in_step(&stage, &["tenant_p"]).await;
    stage.execute("truncate tenant_p.products").await;
    in_step(&stage, &["tenant_p"]).await;
}

#[tokio::test]
async fn a_table_that_does_not_fit_pauses_its_own_rule() {
    let stage = Stage::set();
    let daemon = three(&stage).await;
    stage.execute(&tenant("tenant_d")).await;
    stage.execute("create schema tenant_e; create table tenant_e.products (id int)").await;
    let all = wait_for("both to be paused", async || {
        let paused = paused(&daemon).await;
        (paused.len() == 4).then_some(paused)
    })
    .await;
    assert!(all.iter().all(|(_, why)| why.contains("`keepstep setup` sees to")), "{all:?}");
    daemon.kill();
    // It starts beside them, too.
    let daemon = Daemon::start(&stage, &stage.folder().join("keepstep.toml")).await;
    let checked = stage.run(&["check", "--connect"]);
    let said = String::from_utf8_lossy(&checked.stderr);
    assert!(said.contains("warning[KS083]") && said.contains("warning[KS068]") && !said.contains("error["), "{said}");
    let said = stage.keepstep(&["setup"]);
    // An outbox asks for none.
    let fits = reads_outbox();
    assert_eq!(said.contains("left out: table tenant_e.products has no replica identity"), !fits, "{said}");
    wait_for("the other one to go on", async || (paused(&daemon).await.len() == 2 || fits).then_some(())).await;
    stage.execute("drop table tenant_e.products").await;
    wait_for("none to be paused", async || paused(&daemon).await.is_empty().then_some(())).await;
    stage.execute("update tenant_d.products set name = 'z'").await;
    in_step(&stage, &["tenant_a", "tenant_b", "tenant_c", "tenant_d"]).await;
    let log = daemon.log();
    // Triggers see what they are called for, whatever identifies a row.
    assert!(reads_outbox() || log.contains("has no replica identity"), "{log}");
}

/// A pass that would have to begin anew is not cut short by each table that comes.
#[tokio::test]
async fn tables_that_come_do_not_starve_a_reconcile() {
    let stage = Stage::set();
    for schema in ["tenant_a", "tenant_b"] {
        stage.execute(&tenant(schema)).await;
    }
    let rules = stage.rules(RULES);
    // A pass takes longer than it takes until tables are looked at again.
    stage.set_fields("[postgres]", "warm_rate = \"100/s\"");
    stage.execute("insert into tenant_a.products select n % 3, n, 'more' from generate_series(51, 1300) n").await;
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(&stage, &rules).await;
    let owes = async || daemon.metric("keepstep_rules_owing").await.is_some_and(|owing| owing > 0.0);
    wait_for("the first warm", async || (!owes().await).then_some(())).await;
    stage.put("tenant_a:product:9:9", "an orphan").await;
    stage.execute("vacuum full tenant_a.products").await;
    let mut number = 0;
    wait_for("the orphan to go", async || {
        if stage.get::<Option<String>>("tenant_a:product:9:9").await.is_none() {
            return Some(());
        }
        number += 1;
        stage.execute(&tenant(&format!("tenant_{number}"))).await;
        tokio::time::sleep(std::time::Duration::from_secs(3)).await;
        None
    })
    .await;
    assert!(number > 2, "it was not disturbed");
    wait_for("the last debt", async || (!owes().await).then_some(())).await;
    assert!(daemon.terminate().await.success());
}

#[tokio::test]
async fn keys_that_would_be_anothers_are_not_followed() {
    let stage = Stage::set();
    stage.execute(&tenant("tenant_1")).await;
    let rules = stage.rules(&RULES.replace("{_schema}:product:{_pk}", "{_schema}{org}:{id}"));
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(&stage, &rules).await;
    stage.execute(&tenant("tenant_12")).await;
    wait_for("the refusal", async || daemon.log().contains("everything stays as it was").then_some(())).await;
    stage.execute("insert into tenant_1.products values (3, 3, 'x')").await;
    let key = "'tenant_1' || org || ':' || id";
    assert_in_step(&stage, &[Mirror { table: "tenant_1.products", key, columns: "org, id, name" }]).await;
    assert_eq!(daemon.metric("keepstep_sessions_total").await, Some(1.0));
    let log = daemon.log();
    assert!(log.contains("KS063") && log.contains("product[tenant_12.products]"), "{log}");
}

#[tokio::test]
async fn commands_mean_all_tables_of_a_pattern() {
    let stage = Stage::set();
    let daemon = three(&stage).await;
    assert!(stage.keepstep(&["verify", "--rule", "product"]).contains("150 keys compared: 0 not right"));
    stage.keepstep(&["clear", "--yes", "--rule", "product[tenant_b.products]"]);
    assert!(stage.keepstep(&["stats"]).contains("product[tenant_a.products]"));
    let found = stage.run(&["verify", "-o", "json", "--rule", "product"]);
    let said = String::from_utf8_lossy(&found.stdout);
    assert!(said.lines().last().unwrap().contains(r#""diverged":50"#), "{said}");
    stage.keepstep(&["clear", "--yes", "--rule", "product"]);
    assert_eq!(stage.get::<Option<String>>("tenant_a:product:1:1").await, None);
    let wrong = stage.run(&["warm", "--rule", "prodcut"]);
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("did you mean `product`?"));
    stage.keepstep(&["warm", "--rule", "product"]);
    in_step(&stage, &["tenant_a", "tenant_b", "tenant_c"]).await;
    assert!(daemon.terminate().await.success());
    // Without a daemon the tables are looked for by the command itself.
    stage.execute("update tenant_c.products set name = 'unseen' where id = 3").await;
    stage.keepstep(&["warm", "--rule", "product"]);
    in_step(&stage, &["tenant_a", "tenant_b", "tenant_c"]).await;

    let planned = |change: &str| stage.run(&["plan", change]);
    let insert = r#"{"table": "tenant_q.products", "pk": ["org", "id"], "new": {"org": 1, "id": 2, "name": "n"}}"#;
    let said = String::from_utf8(planned(insert).stdout).unwrap();
    assert!(said.contains("test:tenant_q:product:1:2") && said.contains("UNLINK test:tenant_q:list"), "{said}");
    let without = planned(r#"{"table": "tenant_q.products", "new": {"org": 1, "id": 2, "name": "n"}}"#);
    assert!(String::from_utf8_lossy(&without.stderr).contains("has no primary key"));
    let other = planned(r#"{"table": "other.products", "new": {"id": 2}}"#);
    assert!(String::from_utf8_lossy(&other.stderr).contains("no rule is about `other.products`"));
}
