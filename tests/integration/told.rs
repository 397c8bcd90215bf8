//! What is done once a change is visible: entries of streams, messages, generations, patterns that are swept, second deletes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::StreamExt;
use redis::AsyncCommands;
use tokio::sync::mpsc;

use crate::support::{Daemon, Stage, Stalled, Standby, comes_within, reads_outbox, wait_for};

/// Each change is noted by a trigger too: in the order of commits, since one connection makes them.
const TABLE: &str = "
    create table rows (id int primary key, cat text, version int not null default 1);
    create table history (at bigserial primary key, op text, id int);
    create function note() returns trigger language plpgsql as $$ begin
        insert into history (op, id) values (lower(tg_op), case tg_op when 'DELETE' then old.id when 'TRUNCATE' then null else new.id end);
        return null; end $$;
    create trigger note after insert or update or delete on rows for each row execute function note();
    create trigger note_all after truncate on rows execute function note()";

const RULES: &str = r#"
[rule.row]
table   = "public.rows"
key     = "row:{id}"
value   = "json"
columns = ["version"]

[rule.told]
table        = "public.rows"
stream       = { key = "events" }
publish      = { channel = "changes" }
bump         = ["gen"]
delete       = ["list"]
delete_match = ["page:{cat}:*", "any:*"]
on           = ["insert", "update"]

[rule.gone]
table   = "public.rows"
stream  = { key = "events" }
publish = { channel = "changes" }
bump    = ["gen"]
on      = ["delete"]
"#;

/// How long something is given to come that must not.
const NEVER: Duration = Duration::from_secs(2);

type Entry = BTreeMap<String, String>;

/// The entries of the stream, in order.
async fn entries(stage: &Stage) -> Vec<Entry> {
    let mut range = redis::cmd("XRANGE");
    range.arg(format!("{}events", Stage::PREFIX)).arg("-").arg("+");
    let all: Vec<(String, Entry)> = range.query_async(&mut stage.cache().await).await.unwrap();
    all.into_iter().map(|(_, entry)| entry).collect()
}

/// Operation and id of each, as the table's history has them.
fn shown(entry: &Entry) -> String {
    let key: Option<serde_json::Value> = entry.get("key").map(|key| serde_json::from_str(key).unwrap());
    format!("{} {}", entry["op"], key.map_or("null".into(), |key| key["id"].to_string()))
}

async fn history(stage: &Stage) -> Vec<String> {
    let shown = "select op || ' ' || coalesce(id::text, 'null') from history order by at";
    stage.sql().await.query(shown, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

fn place(entry: &Entry) -> (u64, u64) {
    let (high, low) = entry["lsn"].split_once('/').unwrap();
    let half = |text| u64::from_str_radix(text, 16).unwrap();
    (half(high) << 32 | half(low), entry["ordinal"].parse().unwrap())
}

/// Everything published from now on.
async fn listen(stage: &Stage) -> mpsc::UnboundedReceiver<String> {
    let client = redis::Client::open(stage.redis.url()).unwrap();
    let mut subscription = client.get_async_pubsub().await.unwrap();
    subscription.subscribe(format!("{}changes", Stage::PREFIX)).await.unwrap();
    let (heard, listener) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut messages = subscription.into_on_message();
        while let Some(message) = messages.next().await {
            let Ok(()) = heard.send(message.get_payload().unwrap()) else { return };
        }
    });
    listener
}

async fn set(stage: &Stage) -> PathBuf {
    stage.execute(TABLE).await;
    let rules = stage.rules(RULES);
    stage.keepstep(&["setup"]);
    rules
}

async fn started(stage: &Stage, rules: &Path) -> Daemon {
    let daemon = Daemon::start(stage, rules).await;
    wait_for("the warm cache", async || stage.checkpoint().await?.owing.is_empty().then_some(())).await;
    daemon
}

async fn length(stage: &Stage) -> u64 {
    let key = format!("{}events", Stage::PREFIX);
    redis::cmd("XLEN").arg(key).query_async(&mut stage.cache().await).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_is_told_once_and_in_order_across_kills() {
    let stage = Stage::set();
    let rules = set(&stage).await;
    let mut daemon = started(&stage, &rules).await;
    let mut messages = listen(&stage).await;
    let sql = stage.sql().await;
    let load = tokio::spawn(async move {
        for id in 1..=1500 {
            let statement = match id % 10 {
                0 => format!("delete from rows where id < {} and id % 3 = 0", id - 20),
                1 => format!(
                    "begin; insert into rows values ({id}); update rows set version = 2 where id = {id}; commit"
                ),
                2 => format!("begin; insert into rows values ({id}); rollback"),
                4 => format!("update rows set version = version + 1 where id > {}", id - 5),
                5 => format!("update rows set id = -id where id = {}", id - 4),
                _ => format!("insert into rows values ({id}, 'c{id}')"),
            };
            sql.batch_execute(&statement).await.unwrap();
        }
    });
    for goal in [50, 300, 600, 800, 1100, 1300] {
        wait_for("more entries", async || (length(&stage).await >= goal).then_some(())).await;
        daemon.kill();
        daemon = Daemon::start(&stage, &rules).await;
    }
    load.await.unwrap();
    let expected = history(&stage).await;
    wait_for("the last entry", async || (length(&stage).await >= expected.len() as u64).then_some(())).await;
    let told = entries(&stage).await;
    assert_eq!(told.iter().map(shown).collect::<Vec<_>>(), expected);
    let places: Vec<(u64, u64)> = told.iter().map(place).collect();
    assert!(places.is_sorted_by(|one, next| one < next), "an entry is not behind the one before");
    assert!(told.iter().all(|entry| entry["epoch"] == told[0]["epoch"]));
    let generation = format!("{}-{:X}", told[0]["epoch"], places.last().unwrap().0);
    assert_eq!(stage.get::<Option<String>>("gen").await, Some(generation));
    let mut heard = Vec::new();
    while heard.len() < expected.len() {
        let message = tokio::time::timeout(Duration::from_secs(10), messages.recv()).await.expect("a message").unwrap();
        let message: serde_json::Value = serde_json::from_str(&message).unwrap();
        heard.push(format!("{} {}", message["op"].as_str().unwrap(), message["key"]["id"]));
    }
    assert_eq!(heard, expected);
    assert!(messages.is_empty(), "a message came twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_say_what_happened() {
    let stage = Stage::set();
    let rules = set(&stage).await;
    stage.execute("alter table rows replica identity full").await;
    stage.follow();
    let _daemon = started(&stage, &rules).await;
    stage.execute("begin; insert into rows values (1, 'a \"b\"'); update rows set cat = null; commit").await;
    stage.execute("delete from rows; truncate rows").await;
    wait_for("four entries", async || (length(&stage).await >= 4).then_some(())).await;
    let told = entries(&stage).await;
    // TRUNCATE is a gap too, for whoever only sees that the file of the table is another one.
    let [inserted, updated, deleted, truncated, ..] = &told[..] else { panic!("{told:?}") };
    let row = |version| format!(r#"{{"id":1,"cat":{version},"version":1}}"#);
    let (before, after) = (row(r#""a \"b\"""#), row("null"));
    for (entry, op, old, new) in [
        (inserted, "insert", None, Some(&before)),
        (updated, "update", Some(&before), Some(&after)),
        (deleted, "delete", Some(&after), None),
        (truncated, "truncate", None, None),
    ] {
        assert_eq!((entry["op"].as_str(), entry["table"].as_str()), (op, "public.rows"));
        assert_eq!((entry.get("before"), entry.get("after")), (old, new));
        assert_eq!(entry.get("key"), new.or(old));
        let ts: u128 = entry["ts"].parse().unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
        assert!(ts <= now && now - ts < 60_000, "{ts} and {now}");
        let known = ["op", "table", "key", "before", "after", "epoch", "lsn", "ordinal", "ts"];
        assert!(entry.keys().all(|name| known.contains(&name.as_str())), "{entry:?}");
    }
    assert_eq!((inserted["ordinal"].as_str(), updated["ordinal"].as_str()), ("1", "2"));
    assert_eq!(inserted["lsn"], updated["lsn"]);
    // A drain of the outbox has one position for all that it holds.
    assert_eq!(updated["lsn"] == deleted["lsn"], reads_outbox() && deleted["ordinal"] == "3");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_told_before_it_is_visible() {
    let mut stage = Stage::set();
    let rules = set(&stage).await;
    stage.execute("insert into rows values (1, 'a')").await;
    let standby = Standby::synchronous(&mut stage).await;
    let _daemon = started(&stage, &rules).await;
    let told_before = length(&stage).await;
    for key in ["list", "page:a:1", "any:1", "page:b:1"] {
        stage.put(key, "old").await;
    }
    let mut messages = listen(&stage).await;
    let generation: Option<String> = stage.get("gen").await;
    standby.stall();
    let stalled = Stalled::execute(&stage, "update rows set version = 2").await;
    let row = async || stage.get::<Option<String>>("row:1").await;
    wait_for("the row", async || (row().await? == r#"{"version":2}"#).then_some(())).await;
    assert_eq!(stage.get::<Option<String>>("list").await, None, "the first delete waits for nothing");
    // Whoever reads the table now sees the old row.
    stage.put("list", "old").await;
    let early = comes_within(NEVER, async || {
        let gone = stage.get::<Option<String>>("page:a:1").await.is_none()
            || stage.get::<Option<String>>("list").await.is_none();
        gone || length(&stage).await > told_before
            || stage.get::<Option<String>>("gen").await != generation
            || !messages.is_empty()
    });
    assert!(!early.await, "something went out before the change was visible");
    standby.resume();
    stalled.done().await;
    let message = tokio::time::timeout(Duration::from_secs(60), messages.recv()).await.expect("a message").unwrap();
    assert!(message.starts_with(r#"{"op":"update","table":"public.rows","key":{"id":1},"lsn":""#), "{message}");
    // Everything else was done with it.
    for key in ["list", "page:a:1", "any:1"] {
        assert_eq!(stage.get::<Option<String>>(key).await, None, "{key}");
    }
    assert_eq!(stage.get::<Option<String>>("page:b:1").await.as_deref(), Some("old"));
    assert_eq!(length(&stage).await, told_before + 1);
    assert_ne!(stage.get::<Option<String>>("gen").await, generation);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_to_be_visible_outlives_a_kill() {
    let mut stage = Stage::set();
    let rules = set(&stage).await;
    stage.execute("insert into rows values (1, 'a')").await;
    let standby = Standby::synchronous(&mut stage).await;
    let daemon = started(&stage, &rules).await;
    let told_before = entries(&stage).await;
    for key in ["page:a:1", "any:1"] {
        stage.put(key, "old").await;
    }
    standby.stall();
    let stalled = Stalled::execute(&stage, "update rows set version = 2").await;
    let row = async || stage.get::<Option<String>>("row:1").await;
    wait_for("the row", async || (row().await? == r#"{"version":2}"#).then_some(())).await;
    // Once before it is visible, and once after.
    daemon.kill();
    let daemon = Daemon::start(&stage, &rules).await;
    let early = comes_within(NEVER, async || length(&stage).await > told_before.len() as u64);
    assert!(!early.await, "it was told before it was visible");
    standby.resume();
    stalled.done().await;
    let told = async || (length(&stage).await > told_before.len() as u64).then_some(());
    wait_for("the entry", told).await;
    daemon.kill();
    let _daemon = Daemon::start(&stage, &rules).await;
    stage.execute("insert into rows values (2, 'b')").await;
    wait_for("the next entry", async || (entries(&stage).await.last()?["op"] == "insert").then_some(())).await;
    let told: Vec<String> = entries(&stage).await[told_before.len()..].iter().map(shown).collect();
    assert_eq!(told, ["update 1", "insert 2"]);
    for key in ["page:a:1", "any:1"] {
        assert_eq!(stage.get::<Option<String>>(key).await, None, "{key}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn characters_of_globs_in_a_row_stand_for_themselves() {
    let stage = Stage::set();
    let rules = set(&stage).await;
    let _daemon = started(&stage, &rules).await;
    let cats = ["*", "?", "[a]", "\\", "\\*", "a*", "a", "x"];
    let pages: Vec<String> = cats.iter().map(|cat| format!("page:{cat}:1")).collect();
    for (id, cat) in cats[..6].iter().enumerate() {
        for page in &pages {
            stage.put(page, "filled").await;
        }
        let generation: Option<String> = stage.get("gen").await;
        stage.sql().await.execute("insert into rows values ($1, $2)", &[&(id as i32), cat]).await.unwrap();
        // It is in the same MULTI, and sweeps go first.
        wait_for("the change", async || (stage.get::<Option<String>>("gen").await != generation).then_some(())).await;
        for (page, of) in pages.iter().zip(cats) {
            let there = stage.get::<Option<String>>(page).await.is_some();
            assert_eq!(there, of != *cat, "`{page}` after a change of `{cat}`");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_change_has_a_generation_of_its_own_and_each_gap() {
    let stage = Stage::set();
    let rules = set(&stage).await;
    let mut daemon = started(&stage, &rules).await;
    let mut generations: Vec<String> = Vec::new();
    let mut next = async || {
        let known = generations.clone();
        let fresh = async || stage.get::<Option<String>>("gen").await.filter(|held| !known.contains(held));
        generations.push(wait_for("another generation", fresh).await);
    };
    for id in 0..3 {
        stage.execute(&format!("insert into rows values ({id}, 'a')")).await;
        next().await;
    }
    for _ in 0..2 {
        stage.put("page:a:1", "stale").await;
        stage.put("list", "stale").await;
        let told = length(&stage).await;
        daemon.kill();
        let () = stage.cache().await.del(format!("{}keepstep:checkpoint", Stage::PREFIX)).await.unwrap();
        daemon = started(&stage, &rules).await;
        next().await;
        let entries = entries(&stage).await;
        // What the slot still holds is told again, in the new epoch.
        let gaps = entries[told as usize..].iter().filter(|entry| entry["op"] == "gap");
        assert!(gaps.count() >= 2, "one for each rule that tells: {entries:?}");
        assert_eq!(stage.get::<Option<String>>("page:a:1").await, None);
        assert_eq!(stage.get::<Option<String>>("list").await, None);
        stage.execute("update rows set version = 2 where id = 1").await;
        next().await;
    }
    stage.execute("truncate rows").await;
    next().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_another_type_in_the_place_of_a_stream_is_replaced() {
    let stage = Stage::set();
    let rules = set(&stage).await;
    let _daemon = started(&stage, &rules).await;
    let mut messages = listen(&stage).await;
    stage.put("events", "an application's").await;
    stage.execute("insert into rows values (1, 'a')").await;
    let message = tokio::time::timeout(Duration::from_secs(60), messages.recv()).await.expect("a message").unwrap();
    assert!(message.contains("insert"), "{message}");
    stage.execute("delete from rows").await;
    let message = tokio::time::timeout(Duration::from_secs(60), messages.recv()).await.expect("a message").unwrap();
    assert!(message.contains("delete"), "a message came twice: {message}");
    let told: Vec<String> = entries(&stage).await.iter().map(shown).collect();
    assert_eq!(told, ["insert 1", "delete 1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_finds_no_memory_is_told_as_a_gap() {
    let stage = Stage::set();
    let rules = set(&stage).await;
    let _daemon = started(&stage, &rules).await;
    stage.execute("insert into rows values (1, 'a')").await;
    wait_for("the entry", async || (length(&stage).await == 1).then_some(())).await;
    let limit = async |bytes: u64| {
        let mut config = redis::cmd("CONFIG");
        config.arg("SET").arg("maxmemory").arg(bytes);
        let () = config.query_async(&mut stage.cache().await).await.unwrap();
    };
    limit(1).await;
    stage.execute("insert into rows values (2, 'b')").await;
    // The row may be in a batch before that of its entry.
    let checkpoint = format!("{}keepstep:checkpoint", Stage::PREFIX);
    let owed = async || {
        let checkpoint: String = stage.cache().await.get(&checkpoint).await.unwrap();
        checkpoint.to_lowercase().contains("reconcile").then_some(())
    };
    wait_for("an entry without memory", owed).await;
    limit(0).await;
    let gap = async || entries(&stage).await.iter().any(|entry| entry["op"] == "gap").then_some(());
    wait_for("the gap", gap).await;
    let row = async || stage.get::<Option<String>>("row:2").await.map(|_| ());
    wait_for("the row", row).await;
    stage.execute("insert into rows values (3, 'c')").await;
    wait_for("the next entry", async || (shown(entries(&stage).await.last()?) == "insert 3").then_some(())).await;
}
