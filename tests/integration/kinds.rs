//! Every kind of value equals what SQL says: hashes, sets, sorted sets, strings, keys that expire, rows under a condition.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use keepstep::batch::{self, Batch, Form, Life, Limits};
use keepstep::cache::commands;
use keepstep::config;
use redis::AsyncCommands;
use redis::aio::MultiplexedConnection;
use serde_json::{Value, json};

use crate::support::{Daemon, Stage, lasts, wait_for};

const TABLE: &str =
    "create table players (id int primary key, team int, name text, rank numeric, active bool, ends timestamptz);
                     alter table players replica identity full";

const RULES: &str = r#"
[rule.hash]
table   = "public.players"
when    = "row.active"
key     = "h:{id}"
value   = "hash"
columns = ["id", "name"]
compute = { double = "row.rank * 2" }

[rule.team]
table  = "public.players"
key    = "team:{team}"
value  = "set"
member = "{id}"
owns   = true

[rule.top]
table  = "public.players"
when   = "row.active"
key    = "top:{team?none}"
value  = "zset"
member = "p{id}"
score  = "row.rank"
owns   = true

[rule.all]
table  = "public.players"
when   = "row.rank > 50"
key    = "best"
value  = "set"
member = "{id}"

[rule.string]
table    = "public.players"
key      = "s:{id}"
value    = "string"
template = "{name} of {team?nobody}"

[rule.until]
table     = "public.players"
key       = "until:{id}"
value     = "json"
columns   = ["id", "name"]
expire_at = "row.ends"

[rule.card]
table   = "public.players"
when    = "row.active"
key     = "card:{id}"
value   = "json"
columns = ["id", "name"]
write   = "present"
tags    = ["team:{team}", "active"]

[rule.stale]
table       = "public.players"
changed     = ["name"]
delete_tags = ["team:{team}"]

[rule.until-hash]
table     = "public.players"
key       = "uh:{id}"
value     = "hash"
columns   = ["id"]
expire_at = "row.ends"
"#;

/// Keys without the prefix, and what they hold: `{"value": …}`, with `"until"` where they expire.
type Cache = BTreeMap<String, Value>;

/// What the rules say, in SQL.
const ORACLE: &str = "
    select key, value::text, until from (
        select 'h:' || id as key, json_strip_nulls(json_build_object('id', id::text, 'name', name, 'double', (rank * 2)::text))
               as value, null::float8 as until from players where active
        union all select 'team:' || team, json_agg(id::text order by id::text collate \"C\"), null from players
               where team is not null group by team
        union all select 'top:' || coalesce(team::text, 'none'), json_object_agg('p' || id, rank::float8), null from players
               where active and rank is not null group by team
        union all select 'best', json_agg(id::text order by id::text collate \"C\"), null from players where rank > 50
               having count(*) > 0
        union all select 'tag:team:' || team, json_agg('card:' || id order by ('card:' || id) collate \"C\"), null from players
               where active and team is not null group by team
        union all select 'tag:active', json_agg('card:' || id order by ('card:' || id) collate \"C\"), null from players
               where active having count(*) > 0
        union all select 's:' || id, to_json(name || ' of ' || coalesce(team::text, 'nobody')), null from players
               where name is not null
        union all select 'until:' || players.id, to_json(row_to_json(shown)::text), extract(epoch from ends) * 1000
               from players join lateral (select players.id, players.name) shown on true
        union all select 'uh:' || id, json_build_object('id', id::text), extract(epoch from ends) * 1000 from players
    ) keys";

async fn expected(stage: &Stage) -> Cache {
    let rows = stage.sql().await.query(ORACLE, &[]).await.unwrap();
    let entry = |row: &tokio_postgres::Row| {
        let value: Value = serde_json::from_str(row.get(1)).unwrap();
        (row.get(0), held(value, row.get::<_, Option<f64>>(2).map(|until| until as i64)))
    };
    rows.iter().map(entry).collect()
}

fn held(value: Value, until: Option<i64>) -> Value {
    until.map_or(json!({ "value": value }), |until| json!({ "value": value, "until": until }))
}

async fn actual(stage: &Stage) -> Cache {
    let mut cache = stage.cache().await;
    let keys: Vec<String> = cache.keys(format!("{}*", Stage::PREFIX)).await.unwrap();
    let own = format!("{}keepstep:", Stage::PREFIX);
    let mut found = Cache::new();
    for key in keys.iter().filter(|key| !key.starts_with(&own)) {
        // A key can go meanwhile.
        if let Some(value) = value(&mut cache, key).await {
            let until: i64 = redis::cmd("PEXPIRETIME").arg(key).query_async(&mut cache).await.unwrap();
            found.insert(key[Stage::PREFIX.len()..].to_owned(), held(value, Some(until).filter(|until| *until >= 0)));
        }
    }
    found
}

async fn value(cache: &mut MultiplexedConnection, key: &str) -> Option<Value> {
    let kind: String = redis::cmd("TYPE").arg(key).query_async(cache).await.unwrap();
    Some(match kind.as_str() {
        "string" => json!(cache.get::<_, Option<String>>(key).await.unwrap()?),
        "hash" => json!(cache.hgetall::<_, BTreeMap<String, String>>(key).await.unwrap()),
        "set" => json!(cache.smembers::<_, BTreeSet<String>>(key).await.unwrap()),
        "zset" => {
            let members: Vec<(String, f64)> = cache.zrange_withscores(key, 0, -1).await.unwrap();
            members.into_iter().map(|(member, score)| (member, json!(score))).collect::<serde_json::Map<_, _>>().into()
        }
        _ => return None,
    })
}

/// Numbers of JSON that are the same number.
fn normal(cache: Cache) -> Cache {
    fn floats(value: Value) -> Value {
        match value {
            Value::Number(number) => json!(number.as_f64()),
            Value::Object(fields) => fields.into_iter().map(|(name, value)| (name, floats(value))).collect(),
            Value::Array(values) => values.into_iter().map(floats).collect(),
            other => other,
        }
    }
    cache.into_iter().map(|(key, value)| (key, floats(value))).collect()
}

/// The keys that are not as SQL says, with what they hold and should hold.
async fn differences(stage: &Stage) -> Vec<String> {
    let (expected, actual) = (normal(expected(stage).await), normal(actual(stage).await));
    let keys: BTreeSet<&String> = expected.keys().chain(actual.keys()).collect();
    let differing = keys.into_iter().filter(|key| expected.get(*key) != actual.get(*key));
    differing.map(|key| format!("{key}: holds {:?}, should hold {:?}", actual.get(key), expected.get(key))).collect()
}

async fn assert_as_sql_says(stage: &Stage, when: &str) {
    let mut last = Vec::new();
    let same = crate::support::comes_within(std::time::Duration::from_secs(60), async || {
        last = differences(stage).await;
        last.is_empty()
    });
    assert!(same.await, "{when}: {} keys differ, among them {:#?}", last.len(), &last[..last.len().min(8)]);
}

/// Random statements on the table, the same ones for the same seed.
struct Statements(u64);

impl Statements {
    fn below(&mut self, limit: u64) -> u64 {
        // Knuth's MMIX generator: its upper bits are good enough for a choice.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    fn one_of<'a>(&mut self, texts: &[&'a str]) -> &'a str {
        texts[self.below(texts.len() as u64) as usize]
    }

    fn statement(&mut self) -> String {
        const RANKS: [&str; 6] = ["null", "0", "-1.5", "99.25", "7", "51"];
        const TEAMS: [&str; 4] = ["null", "1", "2", "3"];
        const NAMES: [&str; 4] = ["null", "'ann'", "'b ö b'", "''"];
        const ENDS: [&str; 3] = ["null", "'2100-01-01'", "'2090-05-05 05:05:05.125+02'"];
        let (id, class) = (self.below(60), self.below(7));
        let (rank, team, name) = (self.one_of(&RANKS), self.one_of(&TEAMS), self.one_of(&NAMES));

        let ends = self.one_of(&ENDS);
        match self.below(12) {
            0..=3 => format!(
                "insert into players select id, {team}, {name}, {rank}, id % 3 > 0, {ends} from generate_series({id}, {id} + 5) id
                 on conflict (id) do update set team = excluded.team, rank = excluded.rank"
            ),
            4 => format!("update players set team = {team} where id % 7 = {class}"),
            5 => format!("update players set rank = {rank} where id % 7 = {class}"),
            6 => format!("update players set active = not active where id % 7 = {class}"),
            7 => format!("update players set name = {name}, ends = {ends} where id % 7 = {class}"),
            8 => format!("update players set id = (select max(id) from players) + 1 where id = {id}"),
            9 => format!("update players set active = null, team = team + 1 where id = {id}"),
            10 => format!("delete from players where id % 7 = {class}"),
            _ => match self.below(6) {
                0 => "truncate players".to_owned(),
                _ => format!("delete from players where id = {id}; insert into players values ({id}, {team}, {name}, {rank}, true)"),
            },
        }
    }

    /// Alone, or several in a transaction that commits, rolls back, or rolls back a part.
    fn transaction(&mut self) -> String {
        let (one, two, three) = (self.statement(), self.statement(), self.statement());
        match self.below(6) {
            0 => format!("begin; {one}; {two}; {three}; commit"),
            1 => format!("begin; {one}; {two}; rollback"),
            2 => format!("begin; {one}; savepoint s; {two}; rollback to s; {three}; commit"),
            _ => one,
        }
    }
}

async fn set(stage: &Stage) -> PathBuf {
    stage.execute(TABLE).await;
    let path = stage.rules(RULES);
    stage.keepstep(&["setup"]);
    path
}

async fn random_changes(seed: u64) {
    let stage = Stage::set();
    let rules = set(&stage).await;
    let mut statements = Statements(seed);
    let mut daemon = Some(Daemon::start(&stage, &rules).await);
    for step in 0..120 {
        stage.execute(&statements.transaction()).await;
        match step % 30 {
            // Nothing runs for five transactions.
            20 => daemon.take().into_iter().for_each(Daemon::kill),
            25 => daemon = Some(Daemon::spawn(&stage, &rules, &[])),
            // There is something to see.
            29 => assert_as_sql_says(&stage, &format!("seed {seed}, step {step}")).await,
            _ => {}
        }
    }
    let () = redis::cmd("FLUSHALL").query_async(&mut stage.cache().await).await.unwrap();
    stage.execute(&statements.transaction()).await;
    assert_as_sql_says(&stage, &format!("seed {seed}, after FLUSHALL")).await;
    assert_verified(&stage).await;
}

async fn assert_verified(stage: &Stage) {
    wait_for("the end of reconciling", async || stage.checkpoint().await?.owing.is_empty().then_some(())).await;
    let output = stage.begin(&["verify"]).await.unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
}

#[tokio::test(flavor = "multi_thread")]
async fn random_changes_and_kills_one() {
    random_changes(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn random_changes_and_kills_two() {
    random_changes(20_261_121).await;
}

/// A warm cache of players: teams 0 to 3, all active, ranked by their ids.
async fn warm() -> (Stage, Daemon, PathBuf) {
    let stage = Stage::set();
    let rules = set(&stage).await;
    stage.execute("insert into players select id, id % 4, 'p' || id, id, true from generate_series(1, 200) id").await;
    let daemon = Daemon::start(&stage, &rules).await;
    assert_as_sql_says(&stage, "warm").await;
    wait_for("the warm cache", async || stage.checkpoint().await?.owing.is_empty().then_some(())).await;
    (stage, daemon, rules)
}

/// Faults that somebody else does to each kind of value, and the keys that they are in, members behind them.
async fn spoil(stage: &Stage) -> BTreeSet<&'static str> {
    let mut cache = stage.cache().await;
    let key = |key: &str| format!("{}{key}", Stage::PREFIX);
    let () = cache.sadd(key("team:1"), "999").await.unwrap();
    let () = cache.srem(key("team:2"), "2").await.unwrap();
    let () = cache.sadd(key("team:777"), "7").await.unwrap();
    let () = cache.sadd(key("tag:team:1"), "card:999").await.unwrap();
    let () = cache.srem(key("tag:team:2"), "card:2").await.unwrap();
    let () = cache.zadd(key("top:1"), "p1", 5000).await.unwrap();
    let () = cache.zadd(key("top:2"), "p999", 1).await.unwrap();
    let () = cache.zrem(key("top:3"), "p3").await.unwrap();
    let () = cache.hset(key("h:1"), "more", "1").await.unwrap();
    let () = cache.hset(key("h:2"), "name", "other").await.unwrap();
    let () = cache.hdel(key("h:3"), "name").await.unwrap();
    let () = cache.del(key("h:4")).await.unwrap();
    let () = cache.hset(key("h:9999"), "id", "9999").await.unwrap();
    let () = cache.set(key("s:1"), "other").await.unwrap();
    let () = cache.expire(key("until:1"), 5000).await.unwrap();
    let () = cache.expire(key("uh:1"), 5000).await.unwrap();
    let tags = ["tag:team:1 card:999", "tag:team:2 card:2"];
    let members = ["team:1 999", "team:2 2", "team:777 7", "top:1 p1", "top:2 p999", "top:3 p3"];
    let keys = ["h:1", "h:2", "h:3", "h:4", "h:9999", "s:1", "until:1", "uh:1"];
    members.into_iter().chain(tags).chain(keys).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_finds_and_mends_faults_in_every_kind() {
    let (stage, _daemon, _) = warm().await;
    assert_verified(&stage).await;
    let spoilt = spoil(&stage).await;
    for (arguments, code) in [(&["verify", "-o", "json"][..], 3), (&["verify", "-o", "json", "--repair"], 3)] {
        let output = stage.begin(arguments).await.unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let lines = said.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let faults: Vec<Value> = lines.filter(|report| report["report"] == "difference").collect();
        let keys: BTreeSet<&str> = faults.iter().map(|fault| fault["key"].as_str().unwrap()).collect();
        let keys: BTreeSet<&str> = keys.iter().map(|key| key.strip_prefix(Stage::PREFIX).unwrap()).collect();
        assert_eq!(keys, spoilt, "{said}");
        assert_eq!(output.status.code(), Some(code), "{said}");
    }
    assert_as_sql_says(&stage, "mended").await;
    assert_verified(&stage).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reconcile_mends_faults_in_every_kind() {
    let (stage, daemon, rules) = warm().await;
    daemon.kill();
    spoil(&stage).await;
    stage.execute("update players set team = 9 where id = 8; delete from players where id = 12").await;
    // The checkpoint is gone, and not what the rules made.
    let () = stage.cache().await.del(format!("{}keepstep:checkpoint", Stage::PREFIX)).await.unwrap();
    let _daemon = Daemon::start(&stage, &rules).await;
    assert_as_sql_says(&stage, "reconciled").await;
    assert_verified(&stage).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_another_type_are_replaced_and_complete() {
    let (stage, _daemon, _) = warm().await;
    let mut cache = stage.cache().await;
    for key in ["team:1", "top:1", "h:1", "best", "tag:team:1"] {
        let () = cache.del(format!("{}{key}", Stage::PREFIX)).await.unwrap();
        stage.put(key, "an application's").await;
    }
    let () = cache.del(format!("{}s:1", Stage::PREFIX)).await.unwrap();
    let () = cache.sadd(format!("{}s:1", Stage::PREFIX), "an application's").await.unwrap();
    stage.execute("update players set name = 'new' where id in (1, 5, 101)").await;
    assert_as_sql_says(&stage, "replaced").await;
    // A member that goes.
    for key in ["team:2", "top:2"] {
        let () = cache.del(format!("{}{key}", Stage::PREFIX)).await.unwrap();
        stage.put(key, "an application's").await;
    }
    stage.execute("delete from players where id = 2").await;
    assert_as_sql_says(&stage, "replaced again").await;
    assert_verified(&stage).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_members_go_and_come_in_one_transaction() {
    let (stage, _daemon, _) = warm().await;
    stage.execute("begin; truncate players; insert into players select id, 1, 'n', id, true from generate_series(500, 900) id; commit").await;
    assert_as_sql_says(&stage, "filled anew").await;
    stage
        .execute("begin; update players set id = id + 10000, team = 2; delete from players where id % 2 = 0; commit")
        .await;
    assert_as_sql_says(&stage, "moved").await;
    stage.execute("truncate players").await;
    assert_as_sql_says(&stage, "empty").await;
    assert_verified(&stage).await;
}

/// Written again and again until its TTL is over, also in the last millisecond of it.
#[tokio::test]
async fn a_hash_that_keeps_its_ttl_ends_with_it() {
    let stage = Stage::set();
    let (config, _) = config::load(&stage.rules(RULES), &|_| None).unwrap();
    let mut batch = Batch::new(Limits { ops: 1, bytes: 1000 }, 1);
    let cell = batch.cell(0, |out| {
        out.extend_from_slice(b"test:h:1");
        true
    });
    let one = |out: &mut Vec<u8>| {
        batch::field(out, b"id", |out| {
            out.push(b'1');
            Ok::<_, ()>(())
        })
    };
    batch.set(cell.unwrap(), Form::Hash, Life::Keep, true, one).unwrap();
    let commands = commands::encode(&batch, &config.redis, |_| true);
    let mut cache = stage.cache().await;
    for _ in 0..20 {
        let mut written = redis::pipe();
        written.hset("test:h:1", "id", "0").ignore().pexpire("test:h:1", 5).ignore();
        for _ in 0..500 {
            commands.iter().for_each(|command| _ = written.add_command(command.clone()).ignore());
        }
        let () = written.query_async(&mut cache).await.unwrap();
        lasts(Duration::from_millis(20)).await;
        let left: bool = cache.exists("test:h:1").await.unwrap();
        assert!(!left, "it lives on");
    }
}
