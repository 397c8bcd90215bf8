//! `lookup` and `[query.NAME]`: keys that go because of a row, and whose names stand in other tables.

use std::collections::BTreeMap;
use std::path::PathBuf;

use redis::AsyncCommands;

use crate::support::{Daemon, Stage, Stalled, Standby, wait_for};

const TABLES: &str = "
    create table departments (id int primary key, code text, open bool not null default true);
    create table faculty (id int primary key, org_id int not null, department_id int, name text not null default 'x');
    create table marks (id int primary key);
    create view codes as select * from departments;
    alter table departments replica identity full;
    alter table faculty replica identity full;
    insert into departments select i, 'd' || i from generate_series(1, 6) i;
    insert into faculty select i, i % 3, 1 + i % 6 from generate_series(1, 60) i";

/// Lists of people by organisation and department, and a table whose keys show how far the stream has come.
const RULES: &str = r#"
[rule.faculty]
table   = "public.faculty"
lookup  = "select code as dept, open from public.departments where id = :department_id -- by its id"
delete  = ["list:{org_id}:{dept}", "all:faculty"]
bump    = ["gen:{dept}:{open}"]

[rule.departments]
table   = "public.departments"
changed = ["code"]
lookup  = "select distinct org_id from public.faculty where department_id = :id"
delete  = ["list:{org_id}:{code}"]

[rule.mark]
table   = "public.marks"
key     = "mark:{id}"
value   = "json"
columns = ["id"]
"#;

/// The same lists, as a query. Each parameter is called like a column of one of the tables.
const QUERY: &str = r#"
[query.lists]
key  = "list:{org_id}:{code}"
mode = "delete"
[[query.lists.on]]
table  = "public.faculty"
params = { org_id = "{org_id}" }
lookup = "select code from public.departments where id = :department_id"
[[query.lists.on]]
table   = "public.departments"
changed = ["code"]
params  = { code = "{code}" }
lookup  = "select distinct org_id from public.faculty where department_id = :id"

[query.people]
key  = "people:{id|md5}"
mode = "delete"
[[query.people.on]]
table  = "public.faculty"
params = { id = "{org_id}/{id}" }
[[query.people.on]]
table  = "public.departments"
lookup = "select f.org_id || '/' || f.id as id from public.faculty f where department_id = :id"

[rule.mark]
table   = "public.marks"
key     = "mark:{id}"
value   = "json"
columns = ["id"]
"#;

/// What an application puts into its lists.
const LISTS: &str = "select 'list:' || org_id || ':' || code, string_agg(f.id::text, ',' order by f.id)
    from faculty f join departments d on d.id = f.department_id group by org_id, code";

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

/// Every list that there should be, by SQL.
async fn lists(stage: &Stage) -> BTreeMap<String, String> {
    let rows = stage.sql().await.query(LISTS, &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// The application fills what it misses.
async fn fill(stage: &Stage) {
    for (key, list) in lists(stage).await {
        stage.put(&key, &list).await;
    }
}

/// The lists that are there.
async fn held(stage: &Stage) -> BTreeMap<String, String> {
    let mut cache = stage.cache().await;
    let keys: Vec<String> = cache.keys("test:list:*").await.unwrap();
    let mut held = BTreeMap::new();
    for key in keys {
        if let Some(list) = cache.get(&key).await.unwrap() {
            held.insert(key.strip_prefix("test:").unwrap().to_owned(), list);
        }
    }
    held
}

/// Waits until each list that is there is what SQL says.
async fn in_step(stage: &Stage) {
    wait_for("lists that are right", async || {
        let right = lists(stage).await;
        held(stage).await.iter().all(|(key, list)| right.get(key) == Some(list)).then_some(())
    })
    .await;
}

async fn gone(stage: &Stage, key: &str) {
    wait_for(key, async || stage.get::<Option<String>>(key).await.is_none().then_some(())).await;
}

async fn is_there(stage: &Stage, key: &str) -> bool {
    stage.get::<Option<String>>(key).await.is_some()
}

/// Waits until everything that is committed by now has been seen and settled.
async fn seen(stage: &Stage, mark: u32) {
    stage.execute(&format!("insert into marks values ({mark})")).await;
    wait_for("the mark", async || is_there(stage, &format!("mark:{mark}")).await.then_some(())).await;
}

#[tokio::test]
async fn keys_of_the_old_and_of_the_new_row_go_and_no_others() {
    let (stage, rules) = set(RULES).await;
    let daemon = Daemon::start(&stage, &rules).await;
    fill(&stage).await;
    stage.put("all:faculty", "x").await;
    let before = held(&stage).await;
    stage.execute("update faculty set department_id = 2 where id = 6").await;
    for key in ["list:0:d1", "list:0:d2", "all:faculty"] {
        gone(&stage, key).await;
    }
    let lost: Vec<String> =
        before.into_keys().filter(|key| !["list:0:d1", "list:0:d2"].contains(&key.as_str())).collect();
    assert_eq!(held(&stage).await.into_keys().collect::<Vec<_>>(), lost);
    // A value of the result stands in a key as one of the row would: a bool is `t`.
    let generation: String = stage.get("gen:d2:t").await;
    stage.execute("update faculty set name = 'y' where id = 6").await;
    let newer = async || Some(stage.get::<String>("gen:d2:t").await).filter(|newer| *newer != generation);
    assert!(wait_for("a new generation", newer).await > generation);
    // NULL finds nothing, and what needs no lookup goes all the same.
    stage.put("all:faculty", "x").await;
    stage.execute("insert into faculty values (100, 0, null)").await;
    gone(&stage, "all:faculty").await;
    // What was looked up changes its name: a matter of the rule about it.
    fill(&stage).await;
    stage.execute("update departments set code = 'renamed' where id = 3").await;
    in_step(&stage).await;
    assert!(daemon.metric("keepstep_lookups_total").await.unwrap() >= 5.0);
}

#[tokio::test]
async fn truncate_and_too_many_rows_delete_whatever_there_can_be() {
    let many = RULES.replace("where id = :department_id", "where id = :department_id or :org_id = 999");
    let (stage, rules) = set(&many).await;
    let daemon = Daemon::start(&stage, &rules).await;
    stage.execute("insert into departments select i, 'many' || i from generate_series(1001, 2100) i").await;
    for (key, statement) in [("list:7:x", "insert into faculty values (200, 999, 1)"), ("list:8:y", "truncate faculty")]
    {
        stage.put(key, "stale").await;
        stage.put("gen:z:t", "old").await;
        stage.put("listing:1", "an application's").await;
        stage.execute(statement).await;
        gone(&stage, key).await;
        gone(&stage, "gen:z:t").await;
        assert!(is_there(&stage, "listing:1").await);
    }
    drop(daemon);
}

#[tokio::test]
async fn too_many_rows_for_one_rule_are_no_matter_of_another() {
    let many = RULES.replace("where id = :department_id", "where id = :department_id or :org_id = 999");
    let other = "[rule.other]\ntable = \"public.faculty\"\ndelete = [\"other:{org_id}:{dept}\"]\n\
                 lookup = \"select code as dept from public.departments where id = :department_id\"\n";
    let (stage, rules) = set(&(many + other)).await;
    let _daemon = Daemon::start(&stage, &rules).await;
    stage.execute("insert into departments select i, 'many' || i from generate_series(1001, 2100) i").await;
    for key in ["list:7:x", "other:7:x", "other:999:d1"] {
        stage.put(key, "x").await;
    }
    stage.execute("insert into faculty values (200, 999, 1)").await;
    gone(&stage, "list:7:x").await;
    gone(&stage, "other:999:d1").await;
    assert!(is_there(&stage, "other:7:x").await);
}

#[tokio::test]
async fn a_lookup_that_fails_is_tried_again_and_then_deletes_whatever_there_can_be() {
    // A view, because a table that is renamed is a gap for the rules about it.
    let of_view = RULES.replace("open from public.departments", "open from public.codes");
    let (stage, rules) = set(&of_view).await;
    let daemon = Daemon::start(&stage, &rules).await;
    stage.put("list:0:elsewhere", "x").await;
    stage.execute("alter view codes rename to hidden").await;
    stage.execute("update faculty set name = 'secret' where id = 6").await;
    wait_for("a failure", async || daemon.metric("keepstep_lookups_total").await.filter(|count| *count > 0.0)).await;
    stage.execute("alter view hidden rename to codes").await;
    wait_for("the generation", async || is_there(&stage, "gen:d1:t").await.then_some(())).await;
    assert!(is_there(&stage, "list:0:elsewhere").await, "it came right in time");
    stage.execute("alter view codes rename to hidden").await;
    stage.execute("update faculty set name = 'secret' where id = 7").await;
    gone(&stage, "list:0:elsewhere").await;
    stage.execute("alter view hidden rename to codes").await;
    stage.execute("update faculty set name = 'secret' where id = 8").await;
    wait_for("the generation", async || is_there(&stage, "gen:d3:t").await.then_some(())).await;
    assert!(!daemon.log().contains("secret"));
}

#[tokio::test]
async fn a_question_without_an_answer_is_asked_again_after_a_crash() {
    let (stage, rules) = set(RULES).await;
    let daemon = Daemon::start(&stage, &rules).await;
    fill(&stage).await;
    seen(&stage, 1).await;
    let blocker = stage.sql().await;
    blocker.batch_execute("begin; lock table departments in access exclusive mode").await.unwrap();
    let commit: String = stage.sql().await.query_one("select pg_current_wal_lsn()::text", &[]).await.unwrap().get(0);
    stage.execute("update faculty set department_id = 2 where id = 6").await;
    // The stream goes on, and everything but the answer is in the cache.
    seen(&stage, 2).await;
    daemon.kill();
    assert!(is_there(&stage, "list:0:d1").await);
    let low = stage.checkpoint().await.unwrap().low;
    let behind = format!("select '{low}'::pg_lsn - '{commit}'::pg_lsn < 1000");
    assert!(stage.sql().await.query_one(&behind, &[]).await.unwrap().get::<_, bool>(0), "{low} {commit}");
    blocker.batch_execute("rollback").await.unwrap();
    let _daemon = Daemon::start(&stage, &rules).await;
    gone(&stage, "list:0:d1").await;
    gone(&stage, "list:0:d2").await;
    in_step(&stage).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_looked_up_before_the_change_is_visible() {
    let mut stage = Stage::set();
    let rules = prepare(&stage, RULES).await;
    let standby = Standby::synchronous(&mut stage).await;
    let _daemon = Daemon::start(&stage, &rules).await;
    stage.put("list:0:fresh", "stale").await;
    standby.stall();
    let both = "begin; insert into departments values (50, 'fresh'); update faculty set department_id = 50 where id = 6; \
                insert into marks values (1); commit";
    let stalled = Stalled::execute(&stage, both).await;
    wait_for("the change, decoded", async || is_there(&stage, "mark:1").await.then_some(())).await;
    assert!(is_there(&stage, "list:0:fresh").await);
    standby.resume();
    stalled.done().await;
    gone(&stage, "list:0:fresh").await;
}

/// A random change; several of them may be in one transaction.
/// In one table at a time: a lookup sees the other one as it is when it runs.
fn change(random: &mut u64, of_departments: bool) -> String {
    let mut below = |limit: u64| {
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*random >> 33) % limit
    };
    let (id, department, org) = (1 + below(80), 1 + below(7), below(3));
    match below(7) {
        _ if of_departments => {
            format!("update departments set code = 'd' || {department} || '_{id}' where id = {department}")
        }
        0 | 1 => format!("update faculty set department_id = {department} where id = {id}"),
        2 => format!("update faculty set org_id = {org}, department_id = nullif({department}, 7) where id = {id}"),
        3 => format!("delete from faculty where id = {id}"),
        4 | 5 => format!("insert into faculty values ({id}, {org}, {department}) on conflict do nothing"),
        _ => format!(
            "update faculty set id = {id} + 1000 where id = {id} and not exists (select from faculty where id = {id} + 1000)"
        ),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_random_changes_and_kills_no_list_is_wrong() {
    for (rules, mut random) in [(RULES, 7), (QUERY, 8)] {
        converge(rules, &mut random).await;
    }
}

async fn converge(rules: &str, random: &mut u64) {
    let (stage, rules) = set(rules).await;
    let mut daemon = Daemon::start(&stage, &rules).await;
    for round in 0..6 {
        fill(&stage).await;
        let sql = stage.sql().await;
        for _ in 0..15 {
            let statements = [change(random, round % 3 == 0), change(random, round % 3 == 0)].join("; ");
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

#[tokio::test]
async fn a_query_goes_with_the_rows_of_each_of_its_tables() {
    let (stage, rules) = set(QUERY).await;
    let daemon = Daemon::start(&stage, &rules).await;
    // md5 of `1/7`, whose department is 2, and of `0/6`, whose is 1.
    let [seventh, sixth] =
        ["3a13fd3d1492d15e357ac8c4c4a35bf9", "417ca36ee8f865c45f307db972c7212f"].map(|md5| format!("people:{md5}"));
    for (statement, goes) in [
        ("update faculty set name = 'y' where id = 7", [&seventh, "list:1:d2"]),
        ("update departments set code = 'd2b' where id = 2", [&seventh, "list:1:d2"]),
        ("delete from faculty where id = 7", [&seventh, "list:1:d2b"]),
        ("truncate faculty", [&sixth, "list:0:d1"]),
    ] {
        fill(&stage).await;
        stage.put("list:1:d2", "x").await;
        stage.put(&seventh, "x").await;
        stage.put(&sixth, "x").await;
        stage.execute(statement).await;
        for key in goes {
            gone(&stage, key).await;
        }
        assert_eq!(is_there(&stage, &sixth).await, goes[0] != sixth);
    }
    let metrics = daemon.get("/metrics").await.unwrap().1;
    assert!(metrics.contains("keepstep_cache_ops_total{op=\"delete\",rule=\"lists.1\"}"), "{metrics}");
}

#[tokio::test]
async fn queries_that_do_not_fit_are_refused_at_their_place() {
    let (stage, _) = set(RULES).await;
    let mut shown = String::new();
    for (lookup, delete) in [
        ("select kode as dept from departments where id = :department_id", "list:{dept}"),
        ("select code as dept from departments where id = :name", "list:{dept}"),
        ("select code as dept from departments where id = :dept_id", "list:{dept}"),
        ("select code as dept from departmens where id = :department_id", "list:{dept}"),
        ("select code, code as dept from departments where id = :department_id", "list:{deptt}"),
        ("select id, code as dept from departments where id = :department_id", "list:{id}:{dept}"),
        ("select code as dept, open as dept from departments", "list:{dept}"),
        ("select code as dept from departments", "list:{id}"),
        ("delete from departments where id = :department_id returning code as dept", "list:{dept}"),
    ] {
        let rule =
            format!("[rule.faculty]\ntable = \"public.faculty\"\nlookup = \"{lookup}\"\ndelete = [\"{delete}\"]\n");
        stage.rules(&rule);
        // A column that no trigger stores is none of the row's.
        stage.follow();
        let output = stage.run(&["check", "--connect"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let said = said.lines().filter(|line| !line.contains("-->")).collect::<Vec<_>>().join("\n");
        shown.push_str(&said);
        shown.push_str("\n~~~\n\n");
        assert_eq!(output.status.code(), Some(78), "{said}");
        let ended = stage.run(&["run"]);
        assert_eq!(ended.status.code(), Some(78), "{lookup}: {}", String::from_utf8_lossy(&ended.stderr));
    }
    insta::assert_snapshot!(shown);
}
