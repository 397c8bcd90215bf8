//! The audit finds every kind of fault, mends it when asked, and raises no false alarm while everything changes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Output;
use std::time::Duration;

use redis::AsyncCommands;
use serde_json::Value;

use crate::support::{Daemon, Load, ROWS, RULES, Stage, Stalled, Standby, assert_in_step, comes_within, wait_for};

/// Beside [`RULES`]: keys that end by themselves.
const TTL_RULE: &str = r#"
[rule.short]
table   = "public.rows"
key     = "short:{id}"
value   = "json"
columns = ["id", "version"]
ttl     = "1h"
"#;
/// The exit code of `keepstep verify` where something differs.
const DIVERGED: i32 = 3;

/// A warm cache of a table that nobody writes to.
async fn warm(stage: &Stage, rules: &str) -> (PathBuf, Daemon) {
    warm_rows(stage, rules, 1000).await
}

/// The same, with so many rows that the load would leave alone.
async fn warm_rows(stage: &Stage, rules: &str, cold: u32) -> (PathBuf, Daemon) {
    Load::prepare(stage, cold).await;
    let path = stage.rules(rules);
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(stage, &path).await;
    wait_for("the warm cache", async || stage.checkpoint().await?.owing.is_empty().then_some(())).await;
    (path, daemon)
}

/// What was reported on a key: the kind of fault, what it holds, what it should hold, whether it was mended.
type Fault = (String, Option<String>, Option<String>, bool);

/// The differences by their keys, without the prefix, and the last word.
fn reports(output: &Output) -> (BTreeMap<String, Fault>, Value) {
    let said = String::from_utf8_lossy(&output.stderr);
    let out = String::from_utf8(output.stdout.clone()).unwrap();
    let lines = out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap_or_else(|_| panic!("{out}\n{said}")));
    let (mut faults, mut last) = (BTreeMap::new(), Value::Null);
    for report in lines.filter(|report| report["report"] != "progress") {
        let text = |field: &str| report[field].as_str().map(str::to_owned);
        if report["report"] == "difference" {
            let key = report["key"].as_str().unwrap().strip_prefix(Stage::PREFIX).unwrap().to_owned();
            let fault = (text("kind").unwrap(), text("holds"), text("should"), report["repaired"] == true);
            assert!(faults.insert(key, fault).is_none(), "a key is reported twice:\n{out}");
        }
        last = report;
    }
    assert_eq!(last["report"], "done", "{out}\n{said}");
    (faults, last)
}

async fn verify(stage: &Stage, arguments: &[&str]) -> Output {
    stage.begin(&[&["verify", "-o", "json"], arguments].concat()).await.unwrap()
}

/// Nothing differs, and so many keys were compared.
async fn assert_right(stage: &Stage, checked_at_least: u64) {
    let output = verify(stage, &[]).await;
    let (faults, last) = reports(&output);
    assert!(faults.is_empty(), "{faults:?}");
    assert_eq!(output.status.code(), Some(0));
    assert!(last["checked"].as_u64().unwrap() >= checked_at_least, "{last}");
    assert_eq!(last["diverged"], 0);
}

/// One fault of every kind, done to keys as by hand; what must be reported of each.
async fn inject(stage: &Stage) -> BTreeMap<String, Fault> {
    let mut cache = stage.cache().await;
    let key = |key: &str| format!("{}{key}", Stage::PREFIX);
    let row = |id: u32| format!(r#"{{"id":{id},"version":1,"filler":"{}"}}"#, "x".repeat(100));
    let short = |id: u32| format!(r#"{{"id":{id},"version":1}}"#);
    let changed = r#"{"id":1,"version":0,"filler":null}"#;

    stage.put("row:1", changed).await;
    let () = cache.del(key("row:2")).await.unwrap();
    stage.put("row:-5", changed).await;
    let () = cache.del(key("row:3")).await.unwrap();
    let () = cache.hset(key("row:3"), "id", 3).await.unwrap();
    let () = cache.expire(key("row:4"), 5000).await.unwrap();
    let () = cache.persist(key("short:5")).await.unwrap();
    let () = cache.expire(key("short:6"), 360_000).await.unwrap();
    // No fault: its time is over.
    let () = cache.del(key("short:7")).await.unwrap();

    let fault = |kind: &str, holds: Option<&str>, should: Option<String>| {
        (kind.to_owned(), holds.map(str::to_owned), should, false)
    };
    let faults = [
        ("row:1", fault("differs", Some(changed), Some(row(1)))),
        ("row:2", fault("missing", None, Some(row(2)))),
        ("row:-5", fault("orphan", Some(changed), None)),
        ("row:3", fault("differs", Some("a hash"), Some(row(3)))),
        ("row:4", fault("ttl", Some(&row(4)), Some(row(4)))),
        ("short:5", fault("ttl", Some(&short(5)), Some(short(5)))),
        ("short:6", fault("ttl", Some(&short(6)), Some(short(6)))),
    ];
    faults.into_iter().map(|(key, fault)| (key.to_owned(), fault)).collect()
}

/// What `holds` and `should` say of a TTL is the messages' business; everything else must be exactly so.
fn comparable(faults: BTreeMap<String, Fault>) -> BTreeMap<String, Fault> {
    let blank = |(kind, holds, should, repaired): Fault| match kind.as_str() {
        "ttl" => (kind, None, None, repaired),
        _ => (kind, holds, should, repaired),
    };
    faults.into_iter().map(|(key, fault)| (key, blank(fault))).collect()
}

/// Faults are injected, found, left alone, mended, and then there are none.
async fn finds_and_mends(stage: &Stage) {
    assert_right(stage, 3000).await;
    let injected = comparable(inject(stage).await);

    let output = verify(stage, &[]).await;
    let (found, last) = reports(&output);
    assert_eq!(comparable(found), injected);
    assert_eq!(output.status.code(), Some(DIVERGED));
    assert_eq!((&last["diverged"], &last["expired"]), (&7.into(), &1.into()), "{last}");

    let output = verify(stage, &["--repair"]).await;
    let repaired = injected.into_iter().map(|(key, (kind, holds, should, _))| (key, (kind, holds, should, true)));
    assert_eq!(comparable(reports(&output).0), repaired.collect());
    assert_right(stage, 3000).await;

    let mut cache = stage.cache().await;
    for id in [5, 6] {
        let lives_s: i64 = cache.ttl(format!("{}short:{id}", Stage::PREFIX)).await.unwrap();
        assert!((3500..=3600).contains(&lives_s), "{lives_s} s");
    }
    assert_eq!(cache.ttl::<_, i64>(format!("{}row:4", Stage::PREFIX)).await.unwrap(), -1);
    assert_eq!(cache.get::<_, String>("row:1").await.unwrap(), "not ours");
}

#[tokio::test]
async fn every_kind_of_fault_is_found_and_mended_through_the_daemon() {
    let stage = Stage::set();
    let _daemon = warm(&stage, &[RULES, TTL_RULE].concat()).await;
    let () = stage.cache().await.set("row:1", "not ours").await.unwrap();
    finds_and_mends(&stage).await;
}

#[tokio::test]
async fn every_kind_of_fault_is_found_and_mended_without_a_daemon() {
    let stage = Stage::set();
    let (_, daemon) = warm(&stage, &[RULES, TTL_RULE].concat()).await;
    let () = stage.cache().await.set("row:1", "not ours").await.unwrap();
    assert!(daemon.terminate().await.success());
    finds_and_mends(&stage).await;
}

/// There is no row to be read, and still something to be mended.
async fn mends_orphans_of(table: &str) {
    let stage = Stage::set();
    stage.execute(table).await;
    stage.execute("alter table rows replica identity full").await;
    let rules = stage.rules(RULES);
    stage.keepstep(&["setup"]);
    let _daemon = Daemon::start(&stage, &rules).await;
    wait_for("the warm cache", async || stage.checkpoint().await?.owing.is_empty().then_some(())).await;
    assert_right(&stage, 0).await;
    stage.put("row:1", "no row's value").await;
    let output = verify(&stage, &["--repair"]).await;
    assert_eq!(reports(&output).0.into_keys().collect::<Vec<_>>(), ["row:1"]);
    assert_right(&stage, 0).await;
    assert_in_step(&stage, &[ROWS]).await;
}

#[tokio::test]
async fn orphans_of_an_empty_table_are_found_and_mended() {
    mends_orphans_of("create table rows (id int primary key, version bigint, bucket int, filler text)").await;
}

#[tokio::test]
async fn orphans_of_a_table_without_partitions_are_found_and_mended() {
    let columns = "id int primary key, version bigint, bucket int, filler text";
    mends_orphans_of(&format!("create table rows ({columns}) partition by range (id)")).await;
}

/// As a person sees it.
#[tokio::test]
async fn the_table_names_rule_kind_and_key() {
    let stage = Stage::set();
    let _daemon = warm(&stage, RULES).await;
    stage.put("row:1", "wrong").await;
    let output = stage.begin(&["verify", "--rule", "row", "--sample", "100%"]).await.unwrap();
    assert_eq!(output.status.code(), Some(DIVERGED));
    let table = String::from_utf8(output.stdout).unwrap();
    let line = table.lines().find(|line| line.contains("test:row:1")).unwrap_or_else(|| panic!("{table}"));
    assert!(line.contains("row ") && line.contains("differs") && line.contains("wrong"), "{line}");
}

/// Keys change, come, go and expire all the time, and each of them is right. `KEEPSTEP_SOAK=1` (`make soak`) writes as fast as
/// the servers can; a debug build would only fall behind that for ever.
#[tokio::test]
async fn no_false_alarm_under_full_load() {
    let stage = Stage::set();
    let _daemon = warm(&stage, &[RULES, &TTL_RULE.replace("1h", "1s")].concat()).await;
    let rate = if std::env::var_os("KEEPSTEP_SOAK").is_some() { 100_000 } else { 1000 };
    let load = Load::begin(&stage, &stage.postgres, rate);
    load.goes_on(&stage).await;
    for _ in 0..2 {
        assert_right(&stage, 500).await;
    }
    load.goes_on(&stage).await;
    load.finish(&stage);
    let mut cache = stage.cache().await;
    wait_for("the short keys to end", async || {
        let keys: Vec<String> = cache.keys("test:short:*").await.unwrap();
        keys.is_empty().then_some(())
    })
    .await;
    assert_in_step(&stage, &[ROWS]).await;
}

/// A fault under load is no less a fault, and mending it undoes no change.
#[tokio::test]
async fn a_fault_is_found_and_mended_under_load() {
    let stage = Stage::set();
    let _daemon = warm(&stage, RULES).await;
    let load = Load::begin(&stage, &stage.postgres, 800);
    load.goes_on(&stage).await;
    let cold = Load::COLD;
    let mut cache = stage.cache().await;
    let () = cache.del(format!("{}row:{cold}", Stage::PREFIX)).await.unwrap();
    stage.put(&format!("row:{}", cold + 1), "wrong").await;
    stage.put("row:-5", "wrong").await;
    let output = verify(&stage, &["--repair"]).await;
    let found: Vec<(String, String)> = reports(&output).0.into_iter().map(|(key, fault)| (key, fault.0)).collect();
    let expected = [("row:-5", "orphan"), ("row:1000", "missing"), ("row:1001", "differs")];
    assert_eq!(found, expected.map(|(key, kind)| (key.to_owned(), kind.to_owned())));
    assert_right(&stage, 1000).await;
    load.finish(&stage);
    assert_in_step(&stage, &[ROWS]).await;
}

/// A commit that is decoded and not yet visible: the key is ahead of the table, and right.
#[tokio::test(flavor = "multi_thread")]
async fn no_false_alarm_while_commits_wait_for_a_standby() {
    let mut stage = Stage::set();
    let standby = Standby::synchronous(&mut stage).await;
    let _daemon = warm(&stage, RULES).await;
    assert_in_step(&stage, &[ROWS]).await;
    standby.stall();
    let change = "update rows set version = 2 where id = 1; delete from rows where id = 2;
                  insert into rows values (-1, 1, 0, 'new')";
    let stalled = Stalled::execute(&stage, change).await;
    wait_for("the change, decoded", async || {
        let held: Option<String> = stage.get("row:-1").await;
        held.map(drop)
    })
    .await;
    // It may wait for the standby before it looks, or skip what is unsettled. It may not be wrong.
    let verifying = stage.begin(&["verify", "-o", "json"]);
    let over = comes_within(Duration::from_secs(3), async || verifying.is_finished()).await;
    standby.resume();
    stalled.done().await;
    let output = verifying.await.unwrap();
    assert_eq!(output.status.code(), Some(0), "over before the standby was: {over}; {:?}", reports(&output).0);
    assert_right(&stage, 1000).await;
    assert_in_step(&stage, &[ROWS]).await;
}

/// Redis has no room for a value while its table is verified: the key goes, and its rule owes. That is known.
#[tokio::test]
async fn what_is_missing_while_its_rule_owes_is_no_fault() {
    const ROWS: u32 = 20_000;
    let stage = Stage::set();
    let columns = "id int primary key, version bigint not null, filler text";
    let rows = format!("select id, 1, repeat('x', 1000) from generate_series(1, {ROWS}) id");
    stage.execute(&format!("create table rows ({columns}); alter table rows alter filler set storage plain")).await;
    stage.execute(&format!("insert into rows {rows}")).await;
    let rules = stage.rules(&TTL_RULE.replace("ttl     = \"1h\"", ""));
    stage.keepstep(&["setup"]);
    stage.set_fields("[postgres]", "warm_rate = \"8000/s\"");
    let daemon = Daemon::start(&stage, &rules).await;
    let owing = async || Some(!stage.checkpoint().await?.owing.is_empty());
    wait_for("the warm cache", async || owing().await.filter(|owing| !owing).map(drop)).await;
    let verifying = stage.begin(&["verify", "-o", "json"]);
    wait_for("the pass", async || daemon.log().contains("verify begins").then_some(())).await;
    let mut cache = stage.cache().await;
    let () = redis::cmd("CONFIG").arg(&["SET", "maxmemory", "1"]).query_async(&mut cache).await.unwrap();
    stage.execute(&format!("update rows set version = 2 where id = {ROWS}")).await;
    wait_for("the debt", async || owing().await.filter(|owing| *owing).map(drop)).await;
    let () = redis::cmd("CONFIG").arg(&["SET", "maxmemory", "0"]).query_async(&mut cache).await.unwrap();
    assert!(!daemon.log().contains("verify done"), "the pass was over too soon");
    let output = verifying.await.unwrap();
    let (faults, last) = reports(&output);
    assert!(faults.is_empty() && output.status.success(), "{faults:?}");
    assert_eq!(last["skipped"], 1, "{last}");
}

/// What runs for ever finds a fault by itself, counts it, and says where.
#[tokio::test]
async fn the_background_audit_counts_what_differs() {
    const COLD: u32 = 40_000;
    let stage = Stage::set();
    let audited = RULES.replace("value   = \"json\"", "value   = \"json\"\naudit   = \"100%/min\"");
    // Of so many pages the first sample has some for certain.
    let (_, daemon) = warm_rows(&stage, &audited, COLD).await;
    let mut faults = redis::pipe();
    for id in (Load::COLD..Load::COLD + COLD).step_by(10) {
        faults.set(format!("{}row:{id}", Stage::PREFIX), "no row's value").ignore();
    }
    let () = faults.query_async(&mut stage.cache().await).await.unwrap();
    wait_for("a difference", async || (daemon.metric("keepstep_audit_keys_diverged_total").await? > 0.0).then_some(()))
        .await;
    let (checked, log) = (daemon.metric("keepstep_audit_keys_checked_total").await.unwrap(), daemon.log());
    assert!(checked < f64::from(COLD), "{checked} keys were compared: no sample");
    assert!(log.contains("kind=\"differs\"") && log.contains("key=\"test:row:"), "{log}");
    assert!(!log.contains("no row's value"), "the log holds a value");
}

#[tokio::test]
async fn rows_that_nobody_warms_are_no_fault() {
    let stage = Stage::set();
    let rules = RULES.replace("[\"id\", \"version\", \"filler\"]", "[\"id\", \"version\", \"filler\"]\nwarm = false");
    let _daemon = warm(&stage, &rules).await;
    stage.execute("update rows set version = version + 1 where id % 100 = 0").await;
    let output = verify(&stage, &[]).await;
    let (faults, last) = reports(&output);
    assert!(faults.is_empty() && output.status.success(), "{faults:?}");
    assert!(last["checked"].as_u64() > Some(0) && last["skipped"].as_u64() >= Some(500), "{last}");
}
