//! What the stream does not carry is seen in the catalog, each case of it; ordinary work is not.

use std::fs;
use std::path::PathBuf;

use keepstep::catalog::Carrier;
use keepstep::catalog::signature::{self, Look};
use keepstep::config::{Operations, TableName};

use crate::support::{Daemon, Mirror, Stage, assert_in_step, wait_for};

fn table(name: &str) -> TableName {
    TableName { schema: "public".into(), name: name.into() }
}

/// The tables that the looks are at.
fn tables() -> Vec<TableName> {
    ["parted", "plain", "other"].map(table).to_vec()
}

const TABLES: &str = "
    create table plain (id int primary key, name text not null default 'a', ref int not null unique);
    create table other (like plain including all);
    create table parted (id int primary key, n int) partition by range (id);
    create table low partition of parted for values from (0) to (100);
    create table high partition of parted for values from (100) to (200) partition by range (id);
    create table highest partition of high for values from (150) to (200);
    create table apart (id int primary key, n int);
    insert into parted values (1, 1), (151, 1);
    insert into plain values (1, 'a', 1);
    insert into apart values (201, 1);
    create publication p for table plain, other, parted with (publish_via_partition_root = true)";

async fn look(stage: &Stage) -> Look {
    signature::look(&stage.sql().await, &Carrier::Publication("p".to_owned()), &tables()).await.unwrap()
}

/// The tables that are not what they were after these statements.
async fn differing(stage: &Stage, statements: &str) -> Vec<String> {
    let before = look(stage).await.signatures;
    for statement in statements.split(';') {
        stage.execute(statement).await;
    }
    let after = look(stage).await.signatures;
    tables().iter().filter(|table| after.differs(&before, table)).map(|table| table.name.clone()).collect()
}

#[tokio::test]
async fn each_case_is_seen() {
    let stage = Stage::set();
    stage.execute(TABLES).await;
    let cases: [(&[&str], &str); 20] = [
        (&["parted"], "truncate highest"),
        (&["parted"], "alter table parted detach partition low"),
        (&["parted"], "alter table parted attach partition low for values from (0) to (100)"),
        (&["parted"], "alter table parted attach partition apart for values from (200) to (300)"),
        (&["parted"], "drop table apart"),
        (&["parted"], "alter table parted alter n type bigint using n + 1"),
        (&["parted"], "alter table highest replica identity full"),
        (&["plain"], "alter table plain add column extra int default 7"),
        (&["plain"], "alter table plain drop column extra"),
        (&["plain"], "alter table plain rename column name to label"),
        (&["plain"], "alter table plain alter label type varchar(40)"),
        (&["plain"], "alter table plain replica identity using index plain_ref_key"),
        (&["plain"], "vacuum full plain"),
        (
            &["plain", "other"],
            "alter table plain rename to t;alter table other rename to plain;alter table t rename to other",
        ),
        (&["plain"], "alter publication p drop table plain;alter publication p add table plain"),
        (&["parted", "plain", "other"], "alter publication p set (publish = 'insert')"),
        (&["parted", "plain", "other"], "drop publication p;create publication p for all tables"),
        (&["plain"], "alter table plain set unlogged"),
        (&["plain"], "drop table plain"),
        (&["plain"], "create table plain (id int primary key)"),
    ];
    for (expected, statements) in cases {
        let mut expected: Vec<&str> = expected.to_vec();
        expected.sort_by_key(|name| tables().iter().position(|table| table.name == *name));
        assert_eq!(differing(&stage, statements).await, expected, "{statements}");
    }
}

/// Row filters and column lists came with Postgres 15.
#[tokio::test]
async fn filters_and_column_lists_are_seen() {
    let stage = Stage::set();
    if stage.postgres.install.major < 15 {
        return;
    }
    stage.execute(TABLES).await;
    for (expected, statement) in [
        ("plain", "alter publication p set table plain where (id > 0), other, parted"),
        ("plain", "alter publication p set table plain where (id > 1), other, parted"),
        ("other", "alter publication p set table plain where (id > 1), other (id, ref), parted"),
    ] {
        assert_eq!(differing(&stage, statement).await, [expected], "{statement}");
    }
    stage.execute("drop publication p; create publication p for tables in schema public").await;
    let all = differing(&stage, "alter publication p drop tables in schema public").await;
    assert_eq!(all, ["parted", "plain", "other"]);
    assert!(look(&stage).await.carried.is_empty());
}

#[tokio::test]
async fn ordinary_work_is_not_seen() {
    let stage = Stage::set();
    stage.execute(TABLES).await;
    for statements in [
        "insert into plain values (2, 'b', 2);update plain set name = 'c';delete from parted;vacuum analyze plain",
        "create index on plain (name);reindex table plain;drop index plain_name_idx",
        "create table unrelated (id int primary key);alter publication p add table unrelated",
        "alter table plain alter name set default 'b';grant select on plain to public;comment on table plain is 'x'",
        "alter table plain set (fillfactor = 70);alter table plain add check (id > 0);checkpoint",
    ] {
        assert_eq!(differing(&stage, statements).await, [""; 0], "{statements}");
    }
}

#[tokio::test]
async fn what_the_publication_carries() {
    let stage = Stage::set();
    stage.execute(TABLES).await;
    let carried = |look: &Look, name: &str| look.carried.get(&table(name)).copied();
    let found = look(&stage).await;
    assert_eq!(carried(&found, "plain"), Some(Operations::ALL));
    assert_eq!(carried(&found, "parted"), Some(Operations::ALL));
    stage.execute("alter publication p drop table plain; alter publication p set (publish = 'insert, delete')").await;
    let found = look(&stage).await;
    assert_eq!(carried(&found, "plain"), None);
    // TRUNCATE counts where DELETE does.
    let insert_only = Operations { insert: true, update: false, delete: false };
    assert_eq!(carried(&found, "parted"), Some(insert_only));
    let publication_gone =
        signature::look(&stage.sql().await, &Carrier::Publication("q".to_owned()), &tables()).await.unwrap();
    assert!(publication_gone.carried.is_empty());
}

/// A look must not wait behind whoever alters a table, nor make anybody wait.
#[tokio::test]
async fn a_look_takes_no_lock() {
    let stage = Stage::set();
    stage.execute(TABLES).await;
    let altering = stage.sql().await;
    altering.batch_execute("begin; lock table plain, low, parted in access exclusive mode").await.unwrap();
    let looking = stage.sql().await;
    looking.batch_execute("set lock_timeout = '1ms'").await.unwrap();
    signature::look(&looking, &Carrier::Publication("p".to_owned()), &tables()).await.unwrap();
}

const RULES: &str = r#"
[rule.row]
table   = "public.plain"
key     = "row:{id}"
value   = "json"
columns = ["id", "name"]

[rule.other]
table   = "public.other"
key     = "other:{id}"
value   = "json"
columns = ["id", "name"]

[rule.part]
table   = "public.parted"
key     = "part:{id}"
value   = "json"
columns = ["id", "n"]
"#;

const MIRRORS: [Mirror<'_>; 3] = [
    Mirror { table: "plain", key: "'row:' || id", columns: "id, name" },
    Mirror { table: "other", key: "'other:' || id", columns: "id, name" },
    Mirror { table: "parted", key: "'part:' || id", columns: "id, n" },
];

/// A daemon whose rules are on these tables, and whose cache is right.
async fn running(stage: &Stage) -> (PathBuf, Daemon) {
    stage.execute(TABLES).await;
    stage.execute("insert into other values (1, 'b', 1)").await;
    let rules = stage.rules(RULES);
    let text = fs::read_to_string(&rules).unwrap().replace("\n\n[redis]", "\npublication = \"p\"\n\n[redis]");
    fs::write(&rules, text).unwrap();
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(stage, &rules).await;
    assert_in_step(stage, &MIRRORS).await;
    (rules, daemon)
}

/// Until this many differences of the catalog were counted.
async fn noticed(daemon: &Daemon, times: u32) {
    let counted = format!("keepstep_reconciles_total{{reason=\"catalog\"}} {times}");
    wait_for(&counted, async || daemon.get("/metrics").await?.1.contains(&counted).then_some(())).await;
}

#[tokio::test]
async fn while_running_only_the_rules_of_the_table_are_reconciled() {
    let stage = Stage::set();
    let (_, daemon) = running(&stage).await;
    let tampered = r#"{"id":1,"name":"nobody has looked"}"#;
    stage.put("other:1", tampered).await;
    stage.execute("alter table plain alter name type text using 'new ' || name").await;
    noticed(&daemon, 1).await;
    wait_for("what no change of a row said", async || {
        let held: Option<String> = stage.get("row:1").await;
        (held? == r#"{"id":1,"name":"new a"}"#).then_some(())
    })
    .await;
    wait_for("the debt to be paid", async || (daemon.metric("keepstep_rules_owing").await? == 0.0).then_some(())).await;
    assert_eq!(stage.get::<String>("other:1").await, tampered);
    assert!(daemon.log().contains("public.plain"), "{}", daemon.log());
}

#[tokio::test]
async fn partitions_that_come_and_go() {
    let stage = Stage::set();
    let (_, daemon) = running(&stage).await;
    for (times, statement) in (1..).zip([
        "truncate highest",
        "alter table parted attach partition apart for values from (200) to (300)",
        "alter table parted detach partition apart",
    ]) {
        stage.execute(statement).await;
        noticed(&daemon, times).await;
        assert_in_step(&stage, &MIRRORS).await;
    }
}

#[tokio::test]
async fn between_two_runs() {
    let stage = Stage::set();
    let (rules, daemon) = running(&stage).await;
    assert!(daemon.terminate().await.success());
    stage
        .execute("alter table plain rename to t; alter table other rename to plain; alter table t rename to other")
        .await;
    let again = Daemon::start(&stage, &rules).await;
    noticed(&again, 1).await;
    assert_in_step(&stage, &MIRRORS).await;
    wait_for("the debt to be paid", async || (again.metric("keepstep_rules_owing").await? == 0.0).then_some(())).await;
    assert!(again.log().contains("public.other"), "{}", again.log());
    // Once is enough.
    assert!(again.terminate().await.success());
    let third = Daemon::start(&stage, &rules).await;
    assert_eq!(third.metric("keepstep_reconciles_total").await, Some(0.0));
}

/// While a table has another name nobody follows it, and with its old name the catalog says what it said before.
#[tokio::test]
async fn a_table_renamed_away_and_back() {
    let stage = Stage::set();
    let (rules, daemon) = running(&stage).await;
    let meanwhile = async |name: &str| {
        let statements = format!(
            "begin; alter table plain rename to plain_x; update plain_x set name = '{name}';
             insert into plain_x values (length('{name}'), 'new', length('{name}'));
             alter table plain_x rename to plain; commit"
        );
        stage.execute(&statements).await;
    };
    meanwhile("while it runs").await;
    assert_in_step(&stage, &MIRRORS).await;
    wait_for("the debt to be paid", async || (daemon.metric("keepstep_rules_owing").await? == 0.0).then_some(())).await;
    assert!(daemon.log().contains("renamed"), "{}", daemon.log());
    stage.execute("update plain set name = 'and on'").await;
    assert_in_step(&stage, &MIRRORS).await;
    assert!(daemon.terminate().await.success());
    meanwhile("while it does not").await;
    let daemon = Daemon::start(&stage, &rules).await;
    assert_in_step(&stage, &MIRRORS).await;
    wait_for("the debt to be paid", async || (daemon.metric("keepstep_rules_owing").await? == 0.0).then_some(())).await;
    assert!(daemon.terminate().await.success());
}

#[tokio::test]
async fn a_table_taken_out_of_the_publication_pauses_its_rule_until_it_is_back() {
    let stage = Stage::set();
    let (_, daemon) = running(&stage).await;
    let paused = async || daemon.metric("keepstep_rule_paused").await;
    stage.execute("alter publication p drop table plain").await;
    wait_for("the pause", async || (paused().await == Some(1.0)).then_some(())).await;
    let (_, status) = daemon.get("/status").await.unwrap();
    assert!(status.contains("publication `p` does not carry its table"), "{status}");
    stage.execute("update plain set name = 'not sent'").await;
    stage.execute("alter publication p add table plain").await;
    wait_for("its end", async || (paused().await == Some(0.0)).then_some(())).await;
    noticed(&daemon, 2).await;
    assert_in_step(&stage, &MIRRORS).await;
}

/// The stream describes a table only when one of its rows changes. A read that is owed before that follows the catalog.
#[tokio::test]
async fn tables_are_read_as_the_catalog_has_them_before_the_stream_says_so() {
    let stage = Stage::set();
    let table = "(id int primary key, name text not null)";
    stage.execute(&format!("create table t {table}; insert into t values (1, 'a'); create table new {table}")).await;
    stage.execute("insert into new values (2, 'b')").await;
    let rule = "[rule.t]\ntable = \"public.t\"\nkey = \"t:{id}\"\nvalue = \"json\"\ncolumns = [\"*\"]\n";
    let rules = stage.rules(rule);
    stage.keepstep(&["setup"]);
    stage.execute("alter publication keepstep add table new").await;
    let _daemon = Daemon::start(&stage, &rules).await;
    let mirror = |columns| Mirror { table: "t", key: "'t:' || id", columns };
    assert_in_step(&stage, &[mirror("id, name")]).await;
    stage.execute("alter table t add column extra int default 7").await;
    assert_in_step(&stage, &[mirror("id, name, extra")]).await;
    stage.execute("begin; alter table t rename to old; alter table new rename to t; commit").await;
    assert_in_step(&stage, &[mirror("id, name")]).await;
}
