//! Tags: keys that go because something that they were made from has changed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use keepstep::batch::{Batch, Claim, Limits};
use keepstep::cache::Cache;
use keepstep::cache::checkpoint::{Checkpoint, Origin, RuleSet};
use keepstep::cache::writer::Writer;
use keepstep::config;
use keepstep::metrics::Metrics;
use keepstep::model::{Lsn, Position};
use keepstep::rules::bind::Tagging;
use keepstep::rules::form::KeyForm;
use keepstep::rules::pattern::Pattern;
use redis::AsyncCommands;

use crate::support::{Daemon, Stage, wait_for};

const TABLES: &str = "
    create table categories (id int primary key, name text);
    create table products (id int primary key, category_id int, name text);
    create table marks (id int primary key);
    alter table products replica identity full;
    insert into categories select i, 'c' || i from generate_series(1, 3) i;
    insert into products select i, 1 + i % 3, 'p' || i from generate_series(1, 30) i";

/// Cards are filled by the application and refreshed; marks must always be there, and show how far the stream has come.
const RULES: &str = r#"
[rule.card]
table   = "public.products"
key     = "card:{id}"
value   = "json"
columns = ["id", "name"]
write   = "present"
tags    = ["category:{category_id}"]

[rule.category]
table       = "public.categories"
delete_tags = ["category:{id}"]

[rule.mark]
table   = "public.marks"
key     = "mark:{id}"
value   = "json"
columns = ["id"]
"#;

async fn set() -> (Stage, PathBuf, Daemon) {
    let stage = Stage::set();
    stage.execute(TABLES).await;
    let rules = stage.rules(RULES);
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(&stage, &rules).await;
    wait_for("the warm cache", async || stage.checkpoint().await?.owing.is_empty().then_some(())).await;
    (stage, rules, daemon)
}

/// An application fills a key and gives it a tag, both at once.
async fn fill(stage: &Stage, key: &str, tag: &str) {
    let under = |key: &str| format!("{}{key}", Stage::PREFIX);
    let mut both = redis::pipe();
    both.atomic().set(under(key), "filled").ignore().sadd(under(&format!("tag:{tag}")), key).ignore();
    let () = both.query_async(&mut stage.cache().await).await.unwrap();
}

async fn members(stage: &Stage, tag: &str) -> BTreeSet<String> {
    stage.cache().await.smembers(format!("{}tag:{tag}", Stage::PREFIX)).await.unwrap()
}

/// Everything before is in Redis, and what follows once it is visible too.
async fn settled(stage: &Stage, mark: u32) {
    stage.execute(&format!("insert into marks values ({mark})")).await;
    let lsn: String = stage.sql().await.query_one("select pg_current_wal_lsn()::text", &[]).await.unwrap().get(0);
    let lsn: Lsn = lsn.parse().unwrap();
    stage.execute(&format!("delete from marks where id = {mark}; insert into marks values ({mark})")).await;
    wait_for("what is visible", async || (stage.checkpoint().await?.low >= lsn).then_some(())).await;
}

fn cards(category: u32) -> BTreeSet<String> {
    (1..=30).filter(|id| 1 + id % 3 == category).map(|id| format!("card:{id}")).collect()
}

#[tokio::test]
async fn every_key_with_the_tag_goes_and_no_other() {
    let (stage, _rules, _daemon) = set().await;
    assert_eq!(members(&stage, "category:1").await, cards(1), "cached or not");
    for (key, tag) in [("card:3", "category:1"), ("page:/1", "category:1"), ("page:/2", "category:2")] {
        fill(&stage, key, tag).await;
    }
    // It is the application's own doing that these have the tag.
    stage.execute("insert into marks values (1)").await;
    wait_for("the mark", async || stage.get::<Option<String>>("mark:1").await).await;
    let mut cache = stage.cache().await;
    let () = cache.set("elsewhere", "1").await.unwrap();
    for member in ["mark:1", "keepstep:checkpoint", "elsewhere", "../elsewhere", ""] {
        let () = cache.sadd("test:tag:category:1", member).await.unwrap();
    }
    stage.execute("update categories set name = 'new' where id = 1").await;
    wait_for("the page to go", async || stage.get::<Option<String>>("page:/1").await.is_none().then_some(())).await;
    assert_eq!(members(&stage, "category:1").await, cards(1), "what rows say stays");
    assert_eq!(stage.get::<Option<String>>("card:3").await, None);
    for key in ["page:/2", "mark:1", "keepstep:checkpoint"] {
        assert!(stage.get::<Option<String>>(key).await.is_some(), "{key}");
    }
    let elsewhere: Option<String> = cache.get("elsewhere").await.unwrap();
    assert!(elsewhere.is_some());
    // Filled again without a word of tags, and gone again.
    stage.put("card:3", "filled").await;
    stage.execute("delete from categories where id = 1").await;
    wait_for("the card to go", async || stage.get::<Option<String>>("card:3").await.is_none().then_some(())).await;
    stage.keepstep(&["verify"]);
}

#[tokio::test]
async fn an_application_keeps_its_members_when_the_rows_of_a_rule_go() {
    let (stage, _rules, _daemon) = set().await;
    fill(&stage, "page:/1", "category:1").await;
    let page = BTreeSet::from(["page:/1".to_owned()]);
    stage.execute("truncate products").await;
    wait_for("only the page's tag", async || (members(&stage, "category:1").await == page).then_some(())).await;
    assert_eq!(stage.get::<String>("page:/1").await, "filled");
    // It is nobody's mistake that a key has a tag without a rule; that a rule's key has one without a row is.
    let () = stage.cache().await.sadd("test:tag:category:1", "card:77").await.unwrap();
    let output = stage.begin(&["verify", "--repair", "-o", "json"]).await.unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("test:tag:category:1 card:77") && !said.contains("page:/1"), "{said}");
    wait_for("the repair", async || (members(&stage, "category:1").await == page).then_some(())).await;
    // A tag of another type has no members.
    stage.put("tag:category:2", "an application's").await;
    stage.execute("update categories set name = 'new'").await;
    wait_for("both tags to go", async || {
        let gone: bool = stage.cache().await.exists(&["test:tag:category:2", "test:page:/1"]).await.unwrap();
        (!gone).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_gap_makes_every_tag_stale() {
    let (stage, rules, daemon) = set().await;
    fill(&stage, "page:/1", "category:1").await;
    daemon.kill();
    stage.execute("delete from products where id = 3").await;
    let () = stage.cache().await.del("test:keepstep:checkpoint").await.unwrap();
    let _daemon = Daemon::start(&stage, &rules).await;
    wait_for("the end of reconciling", async || stage.checkpoint().await?.owing.is_empty().then_some(())).await;
    settled(&stage, 1).await;
    assert_eq!(stage.get::<Option<String>>("page:/1").await, None);
    let mut left = cards(1);
    left.retain(|card| !["card:3"].contains(&card.as_str()));
    assert_eq!(members(&stage, "category:1").await, left);
}

#[tokio::test]
async fn a_tag_that_nobody_deletes_by_any_more_takes_its_keys_with_it() {
    let (stage, _rules, daemon) = set().await;
    fill(&stage, "page:/1", "category:1").await;
    assert!(daemon.terminate().await.success());
    let rules = stage.rules(&RULES.replace("category:{", "cat:{"));
    let _daemon = Daemon::start(&stage, &rules).await;
    wait_for("the end of reconciling", async || stage.checkpoint().await?.owing.is_empty().then_some(())).await;
    assert_eq!(stage.get::<Option<String>>("page:/1").await, None);
    assert_eq!((members(&stage, "category:1").await, members(&stage, "cat:1").await), (BTreeSet::new(), cards(1)));
}

/// Pages with a tag, so many that they do not go in one step.
async fn many(stage: &Stage, count: u32) {
    let mut cache = stage.cache().await;
    for first in (0..count).step_by(1000) {
        let keys: Vec<String> = (first..first + 1000).map(|page| format!("page:{page}")).collect();
        let sets: Vec<(String, u8)> = keys.iter().map(|key| (format!("test:{key}"), 1)).collect();
        let () = cache.mset(&sets).await.unwrap();
        let () = cache.sadd("test:tag:category:1", keys).await.unwrap();
    }
}

/// Asked often, it costs Redis nothing.
async fn member_count(stage: &Stage) -> usize {
    stage.cache().await.scard("test:tag:category:1").await.unwrap()
}

async fn pages_left(stage: &Stage) -> usize {
    let keys: Vec<String> = stage.cache().await.keys("test:page:*").await.unwrap();
    keys.len()
}

#[tokio::test]
async fn a_tag_with_many_members_goes_in_time() {
    let (stage, _rules, _daemon) = set().await;
    many(&stage, 100_000).await;
    stage.execute("update categories set name = 'new' where id = 1").await;
    wait_for("the members to go", async || (member_count(&stage).await == cards(1).len()).then_some(())).await;
    assert_eq!(pages_left(&stage).await, 0);
    assert_eq!(members(&stage, "category:1").await, cards(1));
}

#[tokio::test]
async fn a_kill_in_the_middle_leaves_no_key_with_the_tag() {
    let (stage, rules, mut daemon) = set().await;
    for round in 0..3 {
        many(&stage, 30_000).await;
        stage.execute("update categories set name = name || 'x' where id = 1").await;
        wait_for("the first to go", async || (member_count(&stage).await < 30_000).then_some(())).await;
        daemon.kill();
        daemon = Daemon::start(&stage, &rules).await;
        settled(&stage, round).await;
        assert_eq!(pages_left(&stage).await, 0);
        assert_eq!(members(&stage, "category:1").await, cards(1));
    }
}

#[tokio::test]
async fn short_runs_forget_members_without_a_key_too() {
    let (stage, rules, daemon) = set().await;
    fill(&stage, "page:/1", "category:1").await;
    let () = stage.cache().await.del("test:page:/1").await.unwrap();
    assert!(daemon.terminate().await.success());
    let mut checkpoint = stage.checkpoint().await.unwrap();
    checkpoint.written_us -= 2 * 3_600_000_000;
    let () = stage.cache().await.set("test:keepstep:checkpoint", checkpoint.encode()).await.unwrap();
    assert!(Daemon::spawn(&stage, &rules, &["--until-caught-up"]).end().await.success());
    assert_eq!(members(&stage, "category:1").await, cards(1));
}

/// The writer alone.
#[tokio::test]
async fn only_going_through_all_keys_takes_time_that_is_rested() {
    let stage = Stage::set();
    let (config, _) = config::load(&stage.rules(RULES), &|_| None).unwrap();
    let rules = Arc::new(RuleSet::new(&config.rules));
    let mut writer = Writer::new(config.redis, Arc::clone(&rules), Arc::new(Metrics::new())).unwrap();
    writer.claim(None).await.unwrap();
    fill(&stage, "page:/1", "category:1").await;
    let mut batch = Batch::new(Limits { ops: 10, bytes: 1000 }, 3);
    batch.sweep_tag(b"test:tag:category:1".to_vec());
    assert_eq!(writer.apply(&batch, checkpoint(&rules)).await.unwrap().searched, Duration::ZERO);
    assert_eq!(stage.get::<Option<String>>("page:/1").await, None);
    // Redis does not answer for a while.
    batch.sweep(numbered("page:/"));
    stage.put("page:/2", "filled").await;
    let pause = Duration::from_secs(2);
    let mut stall = redis::cmd("CLIENT");
    stall.arg("PAUSE").arg(pause.as_millis() as u64);
    let () = stall.query_async(&mut stage.cache().await).await.unwrap();
    let began = Instant::now();
    let searched = writer.apply(&batch, Checkpoint { written_us: 1, ..checkpoint(&rules) }).await.unwrap().searched;
    assert!(!searched.is_zero() && searched + pause / 2 < began.elapsed(), "{searched:?} of {:?}", began.elapsed());
    assert_eq!(stage.get::<Option<String>>("page:/2").await, None);
}

/// The writer alone: of members whose keys are gone, only those that no row keeps there go.
#[tokio::test]
async fn members_without_a_key_are_forgotten() {
    let stage = Stage::set();
    let (config, _) = config::load(&stage.rules(RULES), &|_| None).unwrap();
    let rules = Arc::new(RuleSet::new(&config.rules));
    let mut writer = Writer::new(config.redis, Arc::clone(&rules), Arc::new(Metrics::new())).unwrap();
    writer.claim(None).await.unwrap();
    for key in ["page:/1", "page:/2", "card:1", "card:2"] {
        fill(&stage, key, "category:1").await;
    }
    let () = stage.cache().await.del(&["test:page:/1", "test:card:1"]).await.unwrap();
    let tags = numbered("tag:category:");
    let mut batch = Batch::new(Limits { ops: 10, bytes: 1000 }, 3);
    let registered = vec![(tags.clone(), Pattern::beginning_with(b"test:card:"))];
    batch.claim(0, Claim::Tags(Tagging { kept: Vec::new(), registered }));
    batch.sweep_stale(tags);
    writer.apply(&batch, checkpoint(&rules)).await.unwrap();
    let left = ["card:1", "card:2", "page:/2"].map(str::to_owned);
    assert_eq!(members(&stage, "category:1").await, BTreeSet::from(left));
}

/// The keys that are this and a number.
fn numbered(literal: &str) -> Pattern {
    let form = format!(r#"[{{"literal":"{literal}"}},{{"value":{{"source":{{"column":23}}}}}}]"#);
    serde_json::from_str::<KeyForm>(&form).unwrap().pattern("test:")
}

fn checkpoint(rules: &RuleSet) -> Checkpoint {
    Checkpoint {
        version: Checkpoint::VERSION,
        origin: Origin { system: "7".into(), timeline: 1, database: "d".into(), slot: "s".into() },
        epoch: 1,
        applied: Position::end(Lsn(1)),
        low: Lsn(1),
        good: Position::end(Lsn(1)),
        rules: rules.digest.clone(),
        written_us: 0,
        owing: BTreeMap::default(),
        released: Position::default(),
        progress: None,
        drains: Vec::new(),
        gap: None,
    }
}
