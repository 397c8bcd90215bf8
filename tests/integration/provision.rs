//! Setup and teardown, executed and printed, and the files in `sql/` as their headers say.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use keepstep::config::TableName;
use keepstep::error::{Error, ErrorKind, Result};
use keepstep::model::Lsn;
use keepstep::sandbox::Postgres;
use keepstep::source::client;
use keepstep::source::conninfo::ConnInfo;
use keepstep::source::provision::{Executor, Plan, Wanted, execute, plan_setup, plan_teardown};
use keepstep::source::replication::Walsender;
use keepstep::source::slot::{birth_note, slot_state};
use tokio_postgres::Client;

use crate::source::{info, server, stream_until, url};
use crate::support::Stage;

fn wanted(tables: &[&str]) -> Wanted {
    let table = |name: &&str| TableName { schema: "public".to_owned(), name: (*name).to_owned() };
    Wanted {
        slot: "keepstep".to_owned(),
        publication: "keep step".to_owned(),
        tables: tables.iter().map(table).collect(),
        optional: BTreeSet::new(),
        failover: false,
    }
}

async fn run(client: &Client, plan: &Plan) -> Result<()> {
    for statement in &plan.statements {
        execute(client, statement).await?;
    }
    Ok(())
}

async fn set_up(client: &Client, wanted: &Wanted) -> Plan {
    let plan = plan_setup(client, wanted, Executor::Role).await.unwrap();
    run(client, &plan).await.unwrap();
    plan
}

async fn as_superuser(postgres: &Postgres) -> (ConnInfo, Client) {
    let info = info(&url(postgres, "postgres", ""));
    let client = client::connect(&info, Duration::ZERO).await.unwrap();
    (info, client)
}

/// Runs psql with a script, or with arguments alone; gives what it wrote.
fn psql(postgres: &Postgres, arguments: &[&str], script: &str) -> String {
    let mut command = postgres.command("psql");
    command.args(["--no-psqlrc", "--quiet", "--tuples-only", "--no-align"]).args(arguments);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("psql is installed");
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{script}");
    String::from_utf8(output.stdout).unwrap()
}

/// Publications with their tables and comments, then slots.
fn objects(postgres: &Postgres) -> String {
    let sql = "select pubname, obj_description(oid, 'pg_publication'), pubviaroot,
                      array(select prrelid::regclass from pg_publication_rel where prpubid = p.oid order by 1)
               from pg_publication p order by 1;
               select slot_name, plugin from pg_replication_slots order by 1;";
    psql(postgres, &[], sql)
}

const TABLES: &str = "create table items (id int primary key, name text);
    create table \"Odd $keepstep$ 'name'\" (id int primary key);
    create table parts (id int, day date, primary key (id, day)) partition by range (day);
    create table parts_1 partition of parts for values from ('2024-01-01') to ('2025-01-01')";

#[tokio::test]
async fn setup_makes_what_is_missing_once_and_teardown_drops_exactly_that() {
    let postgres = server("", TABLES, "").await;
    let (info, client) = as_superuser(&postgres).await;
    let before = objects(&postgres);
    let wanted = wanted(&["items", "Odd $keepstep$ 'name'", "parts"]);
    assert_eq!(set_up(&client, &wanted).await.statements.len(), 3);
    let again = set_up(&client, &wanted).await;
    assert!(again.statements.is_empty() && again.remarks.len() == 2, "{again:?}");

    let born = birth_note(&client, "keep step", "keepstep").await.unwrap();
    let confirmed = slot_state(&client, "keepstep").await.unwrap().unwrap().confirmed_flush_lsn;
    assert!(born.is_some() && born == confirmed, "{born:?} {confirmed:?}");
    assert_eq!(birth_note(&client, "keep step", "keep").await.unwrap(), None);

    let mut replication =
        Walsender::connect(&info).await.unwrap().start("keepstep", "keep step", Lsn(0)).await.unwrap();
    client.batch_execute("insert into parts values (1, '2024-02-29')").await.unwrap();
    let bodies = stream_until(&mut replication, b"2024-02-29").await;
    assert!(bodies.iter().any(|body| body[0] == b'R' && body[5..].starts_with(b"public\0parts\0")), "not as its root");
    let busy = plan_teardown(&client, &wanted).await.unwrap_err();
    assert!(busy.to_string().contains("pid"), "{busy}");
    replication.close(Lsn(0)).await.unwrap();

    run(&client, &plan_teardown(&client, &wanted).await.unwrap()).await.unwrap();
    assert_eq!(objects(&postgres), before);
    let again = plan_teardown(&client, &wanted).await.unwrap();
    assert!(again.statements.is_empty(), "{again:?}");
}

#[tokio::test]
async fn what_a_dba_made_stays() {
    let made = "create publication \"keep step\" for table items with (publish_via_partition_root = true);
        comment on publication \"keep step\" is 'ours\nsecond line'";
    let postgres = server("", &format!("{TABLES}; {made}"), "").await;
    let (_, client) = as_superuser(&postgres).await;
    let before = objects(&postgres);
    let both = wanted(&["items", "parts"]);
    set_up(&client, &both).await;
    let text = objects(&postgres);
    for line in
        ["ours", "second line", "keepstep: table public.parts added by setup", "keepstep: slot keepstep made at"]
    {
        assert!(text.lines().any(|found| found.split('|').any(|field| field.starts_with(line))), "{line} in {text}");
    }
    // A second slot on the same publication; the first one goes, and takes nothing along that the second needs.
    let second = Wanted { slot: "second".to_owned(), ..both.clone() };
    set_up(&client, &second).await;
    run(&client, &plan_teardown(&client, &both).await.unwrap()).await.unwrap();
    let text = objects(&postgres);
    assert!(
        text.contains("{items,parts}") && text.contains("slot second") && !text.contains("slot keepstep"),
        "{text}"
    );
    run(&client, &plan_teardown(&client, &second).await.unwrap()).await.unwrap();
    assert_eq!(objects(&postgres), before);

    // A slot without a note is not setup's.
    psql(&postgres, &[], "select pg_create_logical_replication_slot('keepstep', 'pgoutput')");
    let plan = plan_teardown(&client, &both).await.unwrap();
    assert!(plan.statements.is_empty() && plan.remarks[0].contains("stays"), "{plan:?}");
}

#[tokio::test]
async fn a_comment_cannot_make_teardown_execute_anything() {
    let made = "create publication \"keep step\" for table items;
        comment on publication \"keep step\" is 'keepstep: table public.items, public.parts added by setup'";
    let postgres = server("", &format!("{TABLES}; {made}"), "").await;
    let (_, client) = as_superuser(&postgres).await;
    let plan = plan_teardown(&client, &wanted(&["items"])).await.unwrap();
    assert!(plan.statements.is_empty(), "{plan:?}");
}

#[tokio::test]
async fn the_printed_script_does_the_same_in_psql() {
    let postgres = server("", TABLES, "").await;
    let (_, client) = as_superuser(&postgres).await;
    let before = objects(&postgres);
    let wanted = wanted(&["items", "parts"]);
    let plan = plan_setup(&client, &wanted, Executor::Dba).await.unwrap();
    psql(&postgres, &[], &plan.script());
    assert!(set_up(&client, &wanted).await.statements.is_empty());
    assert!(birth_note(&client, "keep step", "keepstep").await.unwrap().is_some());
    psql(&postgres, &[], &plan_teardown(&client, &wanted).await.unwrap().script());
    assert_eq!(objects(&postgres), before);
    insta::assert_snapshot!(plan.script());
}

#[tokio::test]
async fn the_commands_make_it_say_so_and_take_it_away() {
    let stage = Stage::set();
    stage.execute("create table items (id int primary key, name text)").await;
    stage.rules("[rule.item]\ntable = \"public.items\"\nkey = \"item:{id}\"\nvalue = \"json\"\ncolumns = [\"*\"]\n");
    let before = objects(&stage.postgres);
    let script = stage.keepstep(&["setup", "--print"]);
    assert!(script.contains("CREATE PUBLICATION \"keepstep\" FOR TABLE public.items"), "{script}");
    assert_eq!(objects(&stage.postgres), before, "printing made something");
    let made = stage.keepstep(&["setup"]);
    for line in ["make publication `keepstep`: done", "make slot `keepstep`: done"] {
        assert!(made.contains(line), "{made}");
    }
    assert!(stage.keepstep(&["setup"]).contains("nothing to do"));
    stage.keepstep(&["teardown"]);
    assert_eq!(objects(&stage.postgres), before);
    assert!(stage.keepstep(&["teardown"]).contains("nothing to do"));
}

async fn obstacles(client: &Client, wanted: &Wanted) -> String {
    let show =
        |error: &Error| format!("{error}\n{}", error.hints().iter().map(|h| format!("  {h}\n")).collect::<String>());
    plan_setup(client, wanted, Executor::Role).await.unwrap_err().iter().map(show).collect()
}

#[tokio::test]
async fn tables_that_cannot_be_followed_are_refused_all_at_once() {
    let tables = "create table bare (id int);
        create table nothing (id int primary key); alter table nothing replica identity nothing;
        create table indexed (a int not null, b int); create unique index indexed_a on indexed (a);
        create unique index indexed_b on indexed (b);
        create table late (id int primary key deferrable initially deferred);
        create table leaves (id int) partition by list (id); create table leaf_1 partition of leaves for values in (1);
        create unlogged table fleeting (id int primary key); create view seen as select 1 as id;
        create table full_ (id int); alter table full_ replica identity full";
    let postgres = server("", tables, "").await;
    let (_, client) = as_superuser(&postgres).await;
    let all = ["bare", "nothing", "indexed", "late", "leaves", "fleeting", "seen", "full_", "missing"];
    insta::assert_snapshot!(obstacles(&client, &wanted(&all)).await);
    assert!(set_up(&client, &wanted(&["full_"])).await.statements.len() == 3);
}

#[tokio::test]
async fn servers_that_cannot_be_followed_say_what_to_change() {
    let postgres = server("wal_level = replica", TABLES, "").await;
    let (_, client) = as_superuser(&postgres).await;
    insta::assert_snapshot!(obstacles(&client, &wanted(&["items"])).await);

    let postgres = server("max_replication_slots = 1", TABLES, "").await;
    psql(&postgres, &[], "select pg_create_physical_replication_slot('other')");
    let (_, client) = as_superuser(&postgres).await;
    assert!(obstacles(&client, &wanted(&["items"])).await.contains("all 1 replication slots are taken"));

    psql(&postgres, &[], "create publication \"keep step\" with (publish = 'insert')");
    let other = Wanted { slot: "other".to_owned(), ..wanted(&["parts"]) };
    let text = obstacles(&client, &other).await;
    for part in ["somebody else's", "publish_via_partition_root = true", "publish = 'insert, update, delete, truncate'"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[tokio::test]
async fn a_slot_older_than_its_publication_is_refused() {
    let slot = "select pg_create_logical_replication_slot('keepstep', 'pgoutput')";
    let postgres = server("", &format!("{TABLES}; {slot}"), "").await;
    let (_, client) = as_superuser(&postgres).await;
    assert!(obstacles(&client, &wanted(&["items"])).await.contains("older than publication"));
}

#[tokio::test]
async fn a_role_without_privileges_is_told_which_it_lacks() {
    let postgres = server("", &format!("{TABLES}; create role app login"), "").await;
    let client = client::connect(&info(&url(&postgres, "app", "")), Duration::ZERO).await.unwrap();
    insta::assert_snapshot!(obstacles(&client, &wanted(&["items"])).await);
    // The DBA has them.
    assert_eq!(plan_setup(&client, &wanted(&["items"]), Executor::Dba).await.unwrap().statements.len(), 3);
}

#[tokio::test]
async fn setup_waits_for_nobody_for_long_and_names_who_is_in_the_way() {
    let postgres = server("", TABLES, "").await;
    let (_, client) = as_superuser(&postgres).await;
    let (_, writer) = as_superuser(&postgres).await;
    writer.batch_execute("begin; insert into items values (1)").await.unwrap();
    let pid: i32 = writer.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
    let plan = plan_setup(&client, &wanted(&["items"]), Executor::Role).await.unwrap();
    let error = run(&client, &plan).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PostgresAway, "{error}");
    assert!(error.hints().iter().any(|hint| hint.contains(&format!("pid {pid}"))), "{error:?}");
    writer.batch_execute("commit").await.unwrap();
    assert_eq!(set_up(&client, &wanted(&["items"])).await.statements.len(), 2);
}

/// A file of `sql/`, run with psql as its header says.
fn sql_file(postgres: &Postgres, file: &str, variables: &[&str]) -> String {
    let path = format!("{}/sql/{file}", env!("CARGO_MANIFEST_DIR"));
    let variables = variables.iter().flat_map(|variable| ["-v", variable]);
    let arguments: Vec<&str> = ["-d", "postgres"].into_iter().chain(variables).chain(["-f", &path]).collect();
    psql(postgres, &arguments, "")
}

#[tokio::test]
async fn the_sql_files_make_what_a_daemon_needs_and_take_it_away_again() {
    let postgres = server("", TABLES, "").await;
    let before = objects(&postgres);
    let tables = "tables=public.items, public.parts";
    for _ in 0..2 {
        sql_file(&postgres, "role.sql", &[tables]);
        sql_file(&postgres, "publication.sql", &[tables]);
    }
    sql_file(&postgres, "publication.sql", &["tables=public.\"Odd $keepstep$ 'name'\""]);
    psql(&postgres, &[], "alter role keepstep password 'x'");

    // What the files made is what setup would have made.
    let (_, superuser) = as_superuser(&postgres).await;
    let all = Wanted { publication: "keepstep".to_owned(), ..wanted(&["items", "parts", "Odd $keepstep$ 'name'"]) };
    assert!(set_up(&superuser, &all).await.statements.is_empty());
    let born = birth_note(&superuser, "keepstep", "keepstep").await.unwrap();
    assert_eq!(born, slot_state(&superuser, "keepstep").await.unwrap().unwrap().confirmed_flush_lsn);

    // And the role can do with it what the daemon does.
    let role = info(&url(&postgres, "keepstep", ""));
    let client = client::connect(&role, Duration::from_secs(10)).await.unwrap();
    let mut replication = Walsender::connect(&role).await.unwrap().start("keepstep", "keepstep", Lsn(0)).await.unwrap();
    superuser.batch_execute("insert into items values (1, 'seen by the role')").await.unwrap();
    stream_until(&mut replication, b"seen by the role").await;
    keepstep::source::slot::heartbeat(&client).await.unwrap();
    client.query_one("select count(*) from items", &[]).await.unwrap();
    let denied = client.batch_execute("insert into items values (2)").await.unwrap_err();
    assert_eq!(denied.code(), Some(&tokio_postgres::error::SqlState::INSUFFICIENT_PRIVILEGE));
    replication.close(Lsn(0)).await.unwrap();
    drop(client);

    sql_file(&postgres, "teardown.sql", &["role=keepstep"]);
    sql_file(&postgres, "teardown.sql", &["role=keepstep"]);
    assert_eq!(objects(&postgres), before);
    assert_eq!(psql(&postgres, &[], "select count(*) from pg_roles where rolname = 'keepstep'").trim(), "0");
}

#[tokio::test]
async fn the_sql_files_leave_alone_what_they_did_not_make() {
    let made = "create publication mine for table items; select pg_create_logical_replication_slot('mine', 'pgoutput')";
    let postgres = server("", &format!("{TABLES}; {made}"), "").await;
    let before = objects(&postgres);
    sql_file(&postgres, "teardown.sql", &["publication=mine", "slot=mine"]);
    assert_eq!(objects(&postgres), before);
}

#[tokio::test]
#[should_panic(expected = "no replica identity: bare")]
async fn the_publication_file_refuses_a_table_without_replica_identity() {
    let postgres = server("", "create table bare (id int)", "").await;
    sql_file(&postgres, "publication.sql", &["tables=public.bare"]);
}
