//! Whose keys are whose, now and after rules have changed: the record, `clear`, `stats`, and keys under several prefixes.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use keepstep::batch::{Batch, Claim, Limits};
use keepstep::cache::Cache;
use keepstep::cache::checkpoint::{Checkpoint, Origin, RuleSet};
use keepstep::cache::writer::Writer;
use keepstep::config;
use keepstep::metrics::Metrics;
use keepstep::model::{Lsn, Position};
use keepstep::rules::form::KeyForm;
use redis::AsyncCommands;
use serde_json::Value;

use crate::support::{Daemon, Mirror, Stage, assert_in_step, wait_for};

const TABLE: &str = "create table rows (id int primary key, name text not null)";

/// A rule that writes the rows of [`TABLE`].
fn rule(name: &str, key: &str) -> String {
    format!("[rule.{name}]\ntable = \"public.rows\"\nkey = \"{key}\"\nvalue = \"json\"\ncolumns = [\"id\", \"name\"]\n")
}

/// The rules file with another prefix, or with more than one.
fn with_prefix(rules: &Path, prefix: &str) {
    let text = fs::read_to_string(rules).unwrap();
    fs::write(rules, text.replace("prefix = \"test:\"", prefix)).unwrap();
}

fn keepstep(stage: &Stage, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_keepstep")).args(arguments).current_dir(stage.folder()).output().unwrap()
}

/// Every key there is, keepstep's own left out.
async fn keys(stage: &Stage) -> Vec<String> {
    let mut keys: Vec<String> = stage.cache().await.keys("*").await.unwrap();
    keys.retain(|key| !key.contains("keepstep:"));
    keys.sort();
    keys
}

async fn keys_under(stage: &Stage, prefix: &str) -> Vec<String> {
    keys(stage).await.into_iter().filter(|key| key.starts_with(prefix)).collect()
}

async fn set(stage: &Stage, keys: &[&str]) {
    for key in keys {
        stage.cache().await.set::<_, _, ()>(key, "an application's").await.unwrap();
    }
}

/// The record under the prefix.
async fn record(stage: &Stage, prefix: &str) -> Value {
    let text: Option<String> = stage.cache().await.get(format!("{prefix}keepstep:rules")).await.unwrap();
    serde_json::from_str(&text.unwrap_or_else(|| "null".to_owned())).unwrap()
}

/// Runs the daemon on these rules until `done`.
async fn run_until(stage: &Stage, rules: &Path, done: impl AsyncFnMut() -> Option<()>) {
    let daemon = Daemon::start(stage, rules).await;
    wait_for("the keys", done).await;
    assert!(daemon.terminate().await.success());
}

async fn exists(stage: &Stage, key: &str) -> Option<()> {
    stage.cache().await.exists::<_, bool>(key).await.unwrap().then_some(())
}

#[tokio::test]
async fn keys_of_a_removed_rule_are_known_and_cleared_and_nothing_else_is() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let both = rule("row", "row:{id}") + &rule("old", "old:{id}:{name|md5}") + "delete = [\"list:{id}\"]\n";
    let rules = stage.rules(&both);
    stage.keepstep(&["setup"]);
    stage.execute("alter table rows replica identity full").await;
    stage.follow();
    stage.execute("insert into rows select i, 'x' from generate_series(1, 3) i").await;
    run_until(&stage, &rules, async || exists(&stage, "test:row:3").await).await;
    let strangers =
        ["old:1:9dd4e461268c8034f5c8564e155c67a6", "test:list:x", "test:old:1", "test:old:1:x:cart", "test:older:1"];
    set(&stage, &strangers).await;
    set(&stage, &["test:list:7"]).await;

    let rules = stage.rules(&rule("row", "row:{id}"));
    stage.execute("insert into rows values (4, 'x')").await;
    run_until(&stage, &rules, async || exists(&stage, "test:row:4").await).await;
    let old = &record(&stage, "test:").await["rules"]["old"];
    assert!(old["fingerprint"].is_null() && old["former"].as_array().unwrap().len() == 2, "{old}");

    let refused = keepstep(&stage, &["clear", "--removed"]);
    let (out, said) = (String::from_utf8_lossy(&refused.stdout), String::from_utf8_lossy(&refused.stderr));
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(out.contains("old (removed)") && out.contains("4  test:") && said.contains("--yes"), "{out}{said}");
    assert_eq!(keys(&stage).await.len(), 3 + 4 + strangers.len() + 1, "asked for, nothing happened");

    let cleared: Value = serde_json::from_str(&stage.keepstep(&["clear", "--removed", "--yes", "-o", "json"])).unwrap();
    assert_eq!(cleared["deleted"], 4, "{cleared}");
    let mut left: Vec<&str> = vec!["test:row:1", "test:row:2", "test:row:3", "test:row:4"];
    left.extend(strangers);
    left.sort_unstable();
    assert_eq!(keys(&stage).await, left);
    assert!(record(&stage, "test:").await["rules"]["old"].is_null(), "forgotten");
    let again: Value = serde_json::from_str(&stage.keepstep(&["clear", "--removed", "--yes", "-o", "json"])).unwrap();
    assert_eq!((&again["deleted"], &again["found"]), (&0.into(), &Value::Array(vec![])));
}

#[tokio::test]
async fn earlier_forms_of_a_rule_are_remembered_and_a_new_name_is_no_removal() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let rules = stage.rules(&(rule("row", "row:{id}") + &rule("named", "named:{id}")));
    stage.keepstep(&["setup"]);
    stage.execute("insert into rows values (1, 'x')").await;
    run_until(&stage, &rules, async || exists(&stage, "test:named:1").await).await;
    // Another template for one rule, another name for the other; and then another type while it runs.
    let rules = stage.rules(&(rule("row", "item:{id}") + &rule("renamed", "named:{id}") + "owns = true\n"));
    let daemon = Daemon::start(&stage, &rules).await;
    stage.execute("insert into rows values (2, 'x')").await;
    wait_for("the new form", async || exists(&stage, "test:item:2").await).await;
    stage.execute("alter table rows alter id type text").await;
    stage.follow();
    stage.execute("insert into rows values ('c', 'x')").await;
    wait_for("the new type", async || exists(&stage, "test:item:c").await).await;
    assert!(daemon.terminate().await.success());
    let row = &record(&stage, "test:").await["rules"]["row"];
    let columns = |forms: &Value| -> Vec<i64> {
        let forms = forms.as_array().unwrap().iter();
        forms.map(|form| form[1]["value"]["source"]["column"].as_i64().unwrap()).collect()
    };
    assert_eq!(columns(&row["keys"]), [25], "{row}");
    // What was made before is known as long as it is there.
    let remembered = columns(&row["former"]).contains(&23);
    assert!(remembered || exists(&stage, "test:row:1").await.is_none(), "{row}");
    stage.keepstep(&["clear", "--removed", "--yes"]);
    assert!(keys_under(&stage, "test:row:").await.is_empty());
    let named = keys_under(&stage, "test:named:").await;
    assert_eq!(named, ["test:named:1", "test:named:2", "test:named:c"], "what a present rule makes stays");
    let items = keys_under(&stage, "test:item:").await;
    assert!(items.contains(&"test:item:2".to_owned()) && items.contains(&"test:item:c".to_owned()), "{items:?}");

    // A present rule, by its name; one that nobody knows is a mistake.
    let unknown = keepstep(&stage, &["clear", "--rule", "rename", "--yes"]);
    let said = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert!(unknown.status.code() == Some(2) && said.contains("did you mean `renamed`?"), "{said}");
    let cleared = keepstep(&stage, &["clear", "--rule", "renamed", "--yes"]);
    assert!(String::from_utf8_lossy(&cleared.stderr).contains("keepstep warm --rule renamed"));
    assert!(keys_under(&stage, "test:named:").await.is_empty());
    assert_eq!(keys_under(&stage, "test:item:").await, items);
}

#[tokio::test]
async fn a_record_of_the_older_form_is_read_and_written_anew() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let rules = stage.rules(&rule("row", "row:{id}"));
    stage.keepstep(&["setup"]);
    stage.execute("insert into rows values (1, 'x')").await;
    run_until(&stage, &rules, async || exists(&stage, "test:row:1").await).await;
    let fingerprint = record(&stage, "test:").await["rules"]["row"]["fingerprint"].clone();
    stage.put("keepstep:rules", &format!(r#"{{"row":{fingerprint},"gone":"ab"}}"#)).await;
    stage.execute("insert into rows values (2, 'x')").await;
    run_until(&stage, &rules, async || exists(&stage, "test:row:2").await).await;
    let record = record(&stage, "test:").await;
    assert_eq!(record["rules"]["row"]["keys"].as_array().unwrap().len(), 1, "{record}");
    let shown = stage.keepstep(&["clear", "--removed", "--yes"]);
    assert!(shown.contains("gone (removed)") && shown.contains("not known"), "{shown}");
}

/// The writer alone: what a batch says of a rule's keys is stored with it, and only where it is news.
#[tokio::test]
async fn what_a_batch_says_of_keys_is_stored_with_it() {
    let stage = Stage::set();
    let rules = stage.rules(&(rule("row", "row:{id}") + &rule("other", "other:{id}")));
    let (config, _) = config::load(&rules, &|_| None).unwrap();
    let rule_set = Arc::new(RuleSet::new(&config.rules));
    let mut writer = Writer::new(config.redis, Arc::clone(&rule_set), Arc::new(Metrics::new())).unwrap();
    writer.claim(None).await.unwrap();
    let form = |literal: &str| -> KeyForm {
        let form = serde_json::json!([{ "literal": literal }, { "value": { "source": { "column": 23 } } }]);
        serde_json::from_value(form).unwrap()
    };
    let mut end = 0;
    let mut apply = async |claims: Vec<Claim>| {
        let mut batch = Batch::new(Limits { ops: 10, bytes: 1000 }, 2);
        claims.into_iter().for_each(|claim| batch.claim(0, claim));
        end += 1;
        writer.apply(&batch, checkpoint(end, &rule_set)).await.unwrap();
        let made_before = |key: &[u8]| writer.former(&config.rules)[0].matches(key);
        (made_before(b"test:row:1"), record(&stage, "test:").await["rules"]["row"].clone())
    };
    let (_, row) = apply(vec![Claim::Makes(vec![form("row:")])]).await;
    assert_eq!((row["keys"].as_array().unwrap().len(), &row["former"]), (1, &Value::Null));
    let (former, row) = apply(vec![Claim::Makes(vec![form("item:")])]).await;
    assert!(former && row["former"][0][0]["literal"] == "row:", "{row}");
    // A record that is gone is not written again without news; then it comes back whole.
    let () = stage.cache().await.del("test:keepstep:rules").await.unwrap();
    assert_eq!(apply(vec![Claim::Makes(vec![form("item:")])]).await, (true, Value::Null));
    let (former, row) = apply(vec![Claim::Gone(vec![form("row:")])]).await;
    assert!(!former && row["former"].is_null() && row["keys"][0][0]["literal"] == "item:", "{row}");
}

/// One that ends there.
fn checkpoint(end: u64, rules: &RuleSet) -> Checkpoint {
    Checkpoint {
        version: Checkpoint::VERSION,
        origin: Origin { system: "7".into(), timeline: 1, database: "d".into(), slot: "s".into() },
        epoch: 1,
        applied: Position::end(Lsn(end)),
        low: Lsn(end),
        good: Position::end(Lsn(end)),
        rules: rules.digest.clone(),
        written_us: 0,
        owing: BTreeMap::new(),
        released: Position::default(),
        progress: None,
        drains: Vec::new(),
        gap: None,
    }
}

/// A changed rule reconciles: what it made before goes, what anybody could have made stays unless the rule `owns` it.
#[tokio::test]
async fn a_changed_rule_takes_its_earlier_keys_away_and_only_them() {
    let stage = Stage::set();
    stage.execute("create table rows (id int primary key, name text not null unique)").await;
    stage.execute("alter table rows replica identity full; insert into rows values (1, 'x')").await;
    let names = |owned: &str| rule("name", "name:{name}") + &rule("owned", "owned:{name}") + owned;
    let rules = stage.rules(&(rule("row", "row:{id}") + &names("owns = true\n")));
    stage.keepstep(&["setup"]);
    run_until(&stage, &rules, async || exists(&stage, "test:owned:x").await).await;
    let strangers = ["test:item:x", "test:name:stray", "test:row:1:cart"];
    set(&stage, &strangers).await;
    set(&stage, &["test:owned:stray", "test:item:2", "test:row:3"]).await;

    let later = (rule("row", "item:{id}") + &names("owns = true\n")).replace("[\"id\", \"name\"]", "[\"id\"]");
    let rules = stage.rules(&later);
    run_until(&stage, &rules, async || {
        let former = record(&stage, "test:").await["rules"]["row"]["former"].is_null();
        let checkpoint: Option<String> = stage.get("keepstep:checkpoint").await;
        (former && !checkpoint?.contains("owing")).then_some(())
    })
    .await;
    let mut left = vec!["test:item:1", "test:name:x", "test:owned:x"];
    left.extend(strangers);
    left.sort_unstable();
    assert_eq!(keys(&stage).await, left);
}

/// What a rule makes now is not searched for where it could be anybody's, or where no read can render it. What it made
/// before goes all the same.
#[tokio::test]
async fn earlier_keys_go_where_present_ones_are_not_searched() {
    let stage = Stage::set();
    for table in ["rows", "others"] {
        let table = format!(
            "create table {table} (id int primary key, name text not null unique);
             alter table {table} replica identity full; insert into {table} values (1, 'x')"
        );
        stage.execute(&table).await;
    }
    let other = |key: &str| rule("other", key).replace("public.rows", "public.others");
    let rules = stage.rules(&(rule("row", "row:{id}") + &other("other:{id}")));
    stage.keepstep(&["setup"]);
    run_until(&stage, &rules, async || exists(&stage, "test:row:1").await.and(exists(&stage, "test:other:1").await))
        .await;
    set(&stage, &["test:name:stray"]).await;

    let rules = stage.rules(&(rule("row", "name:{name}") + &other("newer:{id}") + "on = [\"insert\"]\n"));
    run_until(&stage, &rules, async || {
        let record = &record(&stage, "test:").await["rules"];
        let former = record["row"]["former"].is_null() && record["other"]["former"].is_null();
        let paid = stage.checkpoint().await?.owing.is_empty();
        (former && paid).then_some(())
    })
    .await;
    assert_eq!(keys(&stage).await, ["test:name:stray", "test:name:x"]);
}

/// Nobody knows what a prefix missed that was not written under before.
#[tokio::test]
async fn a_prefix_that_is_added_is_made_right() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    stage.execute("insert into rows values (1, 'x'), (2, 'x')").await;
    let rules = stage.rules(&rule("row", "row:{id}"));
    stage.keepstep(&["setup"]);
    run_until(&stage, &rules, async || exists(&stage, "test:row:2").await).await;
    set(&stage, &["older:row:2", "older:row:3", "older:row:x"]).await;
    with_prefix(&rules, "prefix = \"test:\"\nalso_prefix = [\"older:\"]");
    run_until(&stage, &rules, async || {
        let checkpoint: Option<String> = stage.get("keepstep:checkpoint").await;
        (keys(&stage).await.len() == 5 && !checkpoint?.contains("owing")).then_some(())
    })
    .await;
    let left = ["older:row:1", "older:row:2", "older:row:x", "test:row:1", "test:row:2"];
    assert_eq!(keys(&stage).await, left);
    stage.cache().await.del::<_, ()>("older:row:x").await.unwrap();
    alike(&stage).await;
}

const MIRROR: Mirror<'_> = Mirror { table: "rows", key: "'row:' || id", columns: "id, name" };

/// Both prefixes hold the same, and nothing else.
async fn alike(stage: &Stage) {
    assert_in_step(stage, &[MIRROR]).await;
    let keys = keys(stage).await;
    let (main, also): (Vec<&String>, Vec<&String>) = keys.iter().partition(|key| key.starts_with("test:"));
    let bare = |keys: Vec<&String>| -> Vec<String> {
        keys.iter().map(|key| key.split_once(':').unwrap().1.to_owned()).collect()
    };
    assert_eq!(bare(main.clone()), bare(also.clone()));
    let mut cache = stage.cache().await;
    for (one, other) in main.into_iter().zip(also) {
        let values: Vec<String> = cache.mget(&[one, other]).await.unwrap();
        assert_eq!(values[0], values[1], "{one} {other}");
    }
}

#[tokio::test]
async fn every_prefix_is_kept_in_step() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let lists = "[rule.lists]\ntable = \"public.rows\"\ndelete = [\"list:{id}\"]\n";
    let rules = stage.rules(&(rule("row", "row:{id}") + lists));
    with_prefix(&rules, "prefix = \"test:\"\nalso_prefix = [\"older:\"]");
    stage.keepstep(&["setup"]);
    // The user may do just what check says.
    let mut cache = stage.cache().await;
    let () =
        redis::cmd("ACL").arg(&["SETUSER", "keepstep", "on", ">s3cret", "+get"]).query_async(&mut cache).await.unwrap();
    let url = format!("redis://keepstep:s3cret@127.0.0.1:{}/", stage.redis.port);
    fs::write(&rules, fs::read_to_string(&rules).unwrap().replace(&stage.redis.url(), &url)).unwrap();
    let said = String::from_utf8(keepstep(&stage, &["check", "--connect"]).stdout).unwrap();
    let line = said.lines().find_map(|line| line.trim().strip_prefix("hint: ACL ")).expect("the ACL line");
    let words: Vec<String> = line.replace(">PASSWORD", ">s3cret").split(' ').map(str::to_owned).collect();
    let () = redis::cmd("ACL").arg(&words).query_async(&mut cache).await.unwrap();
    stage.keepstep(&["check", "--connect"]);

    set(&stage, &["older:list:1", "test:list:1"]).await;
    let daemon = Daemon::start(&stage, &rules).await;
    stage.execute("insert into rows select i, 'x' from generate_series(1, 50) i; delete from rows where id > 40").await;
    stage.execute("update rows set id = id + 100, name = 'y' where id <= 10").await;
    alike(&stage).await;
    assert_eq!(keys(&stage).await.len(), 2 * 40);
    let fences: Vec<String> = cache.mget(&["test:keepstep:fence", "older:keepstep:fence"]).await.unwrap();
    assert_eq!(fences[0], fences[1], "whoever writes the other prefix alone is fenced out");

    // Whoever takes one of them over is not written over: first the daemon looks again whether the slot is still its own.
    set(&stage, &["older:keepstep:fence"]).await;
    stage.execute("insert into rows values (60, 'x')").await;
    alike(&stage).await;
    assert!(daemon.log().contains("another daemon has taken over this cache"), "{}", daemon.log());

    // TRUNCATE sweeps both, and touches nothing that only looks similar.
    let strangers = ["older:row:1:cart", "olderrow:1", "test:row:1:cart"];
    set(&stage, &strangers).await;
    set(&stage, &["older:list:9", "test:list:9"]).await;
    stage.execute("truncate rows; insert into rows values (7, 'z')").await;
    wait_for("the row", async || exists(&stage, "older:row:7").await).await;
    assert_eq!(keys(&stage).await, ["older:row:1:cart", "older:row:7", "olderrow:1", "test:row:1:cart", "test:row:7"]);
    for stranger in strangers {
        cache.del::<_, ()>(stranger).await.unwrap();
    }

    // Out of memory both lose the key.
    let () = redis::cmd("CONFIG").arg(&["SET", "maxmemory", "1"]).query_async(&mut cache).await.unwrap();
    stage.execute("update rows set name = 'too much'").await;
    wait_for("the deletes", async || keys(&stage).await.is_empty().then_some(())).await;
    let () = redis::cmd("CONFIG").arg(&["SET", "maxmemory", "0"]).query_async(&mut cache).await.unwrap();
    stage.execute("update rows set name = 'again'").await;
    alike(&stage).await;
    assert!(daemon.terminate().await.success());
}

#[tokio::test]
async fn an_old_cache_is_ended() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let text = rule("row", "row:{id}") + &rule("by-name", "by-name:{id}:{name}");
    let rules = stage.rules(&text);
    with_prefix(&rules, "prefix = \"v1:\"");
    stage.keepstep(&["setup"]);
    stage.execute("alter table rows replica identity full; insert into rows values (1, 'x')").await;
    stage.follow();
    run_until(&stage, &rules, async || exists(&stage, "v1:by-name:1:x").await).await;
    set(&stage, &["v1:row:x", "v1:other", "v2:other"]).await;
    for (prefix, why) in [("v1:", "in use"), ("v2:", "no record")] {
        let refused = keepstep(&stage, &["clear", "--yes", "--prefix", prefix]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(2) && said.contains(why), "{said}");
    }

    // The next version begins beside it, on a slot that is its own.
    let rules = stage.rules(&text);
    let next = "prefix = \"v2:\"\nalso_prefix = [\"v1:\"]";
    with_prefix(&rules, next);
    let slot = fs::read_to_string(&rules).unwrap().replace("[redis]", "slot = \"next\"\n\n[redis]");
    fs::write(&rules, &slot).unwrap();
    stage.keepstep(&["setup"]);
    stage.execute("insert into rows values (2, 'x')").await;
    run_until(&stage, &rules, async || exists(&stage, "v2:by-name:2:x").await).await;
    assert_eq!(keepstep(&stage, &["clear", "--yes", "--prefix", "v1:"]).status.code(), Some(2), "still in use");
    fs::write(&rules, slot.replace(next, "prefix = \"v2:\"")).unwrap();
    stage.keepstep(&["clear", "--yes", "--prefix", "v1:"]);
    assert_eq!(keys_under(&stage, "v1:").await, ["v1:other", "v1:row:x"]);
    let own: Vec<String> = stage.cache().await.keys("v1:keepstep:*").await.unwrap();
    assert!(own.is_empty(), "{own:?}");
    exists(&stage, "v2:row:2").await.expect("the new cache stands");
    exists(&stage, "v2:keepstep:checkpoint").await.expect("and its checkpoint");
}

/// A cache without a prefix has templates that can claim the keys of every other: those that are configured stay.
#[tokio::test]
async fn ending_a_cache_without_a_prefix_spares_the_one_that_is_configured() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let text = rule("row", "v2:{name}:{id}");
    let rules = stage.rules(&text);
    with_prefix(&rules, "prefix = \"\"");
    stage.keepstep(&["setup"]);
    stage.execute("alter table rows replica identity full; insert into rows values (1, 'x')").await;
    stage.follow();
    run_until(&stage, &rules, async || exists(&stage, "v2:x:1").await).await;
    let rules = stage.rules(&rule("row", "row:{id}"));
    with_prefix(&rules, "prefix = \"v2:\"");
    let slot = fs::read_to_string(&rules).unwrap().replace("[redis]", "slot = \"next\"\n\n[redis]");
    fs::write(&rules, slot).unwrap();
    stage.keepstep(&["setup"]);
    stage.execute("insert into rows values (2, 'x')").await;
    run_until(&stage, &rules, async || exists(&stage, "v2:row:2").await).await;
    stage.keepstep(&["clear", "--yes", "--prefix", ""]);
    exists(&stage, "v2:row:2").await.expect("the key of the configured rule stays");
    exists(&stage, "v2:keepstep:checkpoint").await.expect("the checkpoint stays");
    assert_eq!(exists(&stage, "v2:x:1").await, None);
    assert_eq!(exists(&stage, "keepstep:checkpoint").await, None);
}

#[tokio::test]
async fn stats_count_what_each_rule_has() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let rules = stage.rules(&(rule("row", "row:{id}") + &rule("old", "old:{id}")));
    stage.keepstep(&["setup"]);
    stage.execute("insert into rows select i, repeat('x', 500) from generate_series(1, 1000) i").await;
    run_until(&stage, &rules, async || exists(&stage, "test:old:1000").await).await;
    let rules = stage.rules(&rule("row", "row:{id}"));
    let daemon = Daemon::start(&stage, &rules).await;
    stage.execute("insert into rows values (1001, 'x')").await;
    wait_for("the row", async || exists(&stage, "test:row:1001").await).await;
    set(&stage, &["test:somebody's", "other:row:1"]).await;
    let _: Option<String> = stage.get("row:1").await;
    let _: Option<String> = stage.get("row:none").await;
    wait_for("catching up", async || (daemon.get("/ready?caught_up=1").await?.0 == 200).then_some(())).await;

    let stats: Value = serde_json::from_str(&stage.keepstep(&["stats", "-o", "json"])).unwrap();
    let of = |owner: &str| stats["keys"].as_array().unwrap().iter().find(|keys| keys["owner"] == owner).unwrap();
    let count = |owner: &str| of(owner)["keys"].as_u64().unwrap();
    assert_eq!((count("rule"), count("removed"), count("nobody")), (1001, 1000, 1), "{stats}");
    assert_eq!(of("nobody")["samples"][0], "\"test:somebody's\"");
    let bytes = of("rule")["bytes"].as_u64().unwrap();
    assert!((500_000..1_000_000).contains(&bytes), "{bytes}");
    assert!(stats["hits"].as_u64().unwrap() > 0 && stats["misses"].as_u64().unwrap() > 0, "{stats}");
    assert_eq!((&stats["caught_up"], &stats["lag_bytes"]), (&true.into(), &0.into()));
    assert!(daemon.terminate().await.success());
    let table = stage.keepstep(&["stats"]);
    assert!(table.contains("old (removed)") && table.contains("no daemon answers"), "{table}");
}

#[tokio::test]
async fn check_says_whose_keys_are_not_searched() {
    let stage = Stage::set();
    stage.execute("create table rows (id int primary key, name text not null unique)").await;
    let digest = rule("digest", "digest:{name|md5}");
    let text = rule("name", "name:{name}")
        + "on = [\"insert\"]\n"
        + &rule("own", "own:{name}")
        + "on = [\"insert\"]\nowns = true\n";
    stage.rules(&(text + &digest + "on = [\"insert\"]\n"));
    stage.keepstep(&["setup"]);
    set(&stage, &["test:name:bob:cart"]).await;
    let answers: Value = serde_json::from_str(&stage.keepstep(&["check", "--connect", "-o", "json"])).unwrap();
    let verdict = |rule: &str| {
        let mut answers = answers.as_array().unwrap().iter();
        answers.find(|answer| answer["what"].as_str().unwrap().starts_with(&format!("rule `{rule}`"))).unwrap().clone()
    };
    let name = verdict("name");
    assert_eq!(name["verdict"], "warning", "{name}");
    assert!(name["what"].as_str().unwrap().contains("test:name:bob:cart"), "{name}");
    assert!(name["hints"][0].as_str().unwrap().contains("owns = true"), "{name}");
    assert_eq!((&verdict("own")["verdict"], &verdict("digest")["verdict"]), (&"ok".into(), &"ok".into()));
}

/// What differs under one prefix only is found there, and mended.
#[tokio::test]
async fn every_prefix_is_verified() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    stage.execute("insert into rows select i, 'x' from generate_series(1, 10) i").await;
    let rules = stage.rules(&rule("row", "row:{id}"));
    with_prefix(&rules, "prefix = \"test:\"\nalso_prefix = [\"older:\"]");
    stage.keepstep(&["setup"]);
    let _daemon = Daemon::start(&stage, &rules).await;
    alike(&stage).await;
    let mut cache = stage.cache().await;
    cache.set::<_, _, ()>("older:row:3", "by hand").await.unwrap();
    cache.del::<_, ()>("older:row:4").await.unwrap();
    let found = keepstep(&stage, &["verify", "--repair"]);
    let said = String::from_utf8_lossy(&found.stdout).into_owned();
    assert_eq!(found.status.code(), Some(3), "{said}");
    assert!(said.contains("older:row:3") && said.contains("older:row:4") && !said.contains("test:row"), "{said}");
    alike(&stage).await;
    assert!(keepstep(&stage, &["verify"]).status.success());
}
