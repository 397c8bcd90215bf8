//! `keepstep init` on a database of everything that is odd: what it writes must work as it is.

use std::process::{Command, Output};

use crate::support::Stage;

const TABLES: &str = r#"
    create table customers (id int primary key, name text, password_hash text, photo bytea, words tsvector);
    create table orders (id bigint primary key, customer_id int not null references customers, total numeric,
                         twice numeric generated always as (total * 2) stored);
    create table "Order Lines" ("Order" bigint references orders, "Line.No" int, "a ""b""" text,
                                primary key ("Order", "Line.No"));
    create table "dotted.name" (id uuid primary key);
    create table "broken
[rule.name]" (id int primary key, "a
b" int references customers);
    create table keepstep (id int primary key);
    create table named (schema text, name text, v text, primary key (schema, name));
    create table by_index (id int, sku text not null unique, v text);
    alter table by_index replica identity using index by_index_sku_key;
    create table measured (at date, id int, v text, primary key (id, at)) partition by range (at);
    create table measured_2024 partition of measured for values from ('2024-01-01') to ('2025-01-01');
    create table whole (id int primary key, at date not null, unique (id, at)) partition by list (id);
    create table whole_1 partition of whole for values in (1);
    alter table whole replica identity full;
    create table odd_key ("a|b" int primary key);
    create table no_key (id int);
    create table nothing (id int primary key);
    alter table nothing replica identity nothing;
    create unlogged table unlogged (id int primary key);
    create view seen as select * from customers;
    create table wide (id int primary key, body text);
    insert into wide select i, (select string_agg(md5(i::text || j), '') from generate_series(1, 200) j)
      from generate_series(1, 300) i;
    analyze wide;
    create schema billing;
    create table billing.orders (id int primary key);
"#;

fn keepstep(stage: &Stage, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keepstep"));
    command.args(arguments).current_dir(stage.folder());
    command.env("DATABASE_URL", stage.postgres.url("postgres")).env("REDIS_URL", stage.redis.url());
    command.output().unwrap()
}

/// The command's standard output; it must succeed.
fn succeeds(stage: &Stage, arguments: &[&str]) -> String {
    let output = keepstep(stage, arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "keepstep {arguments:?}: {}\n{said}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn what_init_writes_works_as_it_is() {
    let stage = Stage::set();
    stage.execute(TABLES).await;
    let output = keepstep(&stage, &["init", "--schema", "public", "--schema", "billing"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    let path = stage.folder().join("keepstep.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let url = stage.postgres.url("postgres");
    assert!(!text.contains(&url) && text.contains("url = \"${DATABASE_URL}\""), "{text}");
    insta::assert_snapshot!("rules", text);
    insta::assert_snapshot!("remarks", said);

    succeeds(&stage, &["check"]);
    succeeds(&stage, &["setup"]);
    succeeds(&stage, &["check", "--connect"]);

    // What stands there as a comment is a rule too, once its `#` is gone.
    let uncommented = |line: &str| match line.strip_prefix('#') {
        Some(toml) if !toml.starts_with(' ') => toml.to_owned(),
        _ => line.to_owned(),
    };
    let lines: Vec<String> = text.lines().map(uncommented).collect();
    std::fs::write(&path, lines.join("\n")).unwrap();
    succeeds(&stage, &["check"]);
}

#[tokio::test]
async fn init_overwrites_nothing_by_itself() {
    let stage = Stage::set();
    let output = keepstep(&stage, &["init"]);
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stderr).contains("there is no table in schema public"));

    stage.execute("create table t (id int primary key)").await;
    let path = stage.folder().join("rules.toml");
    std::fs::write(&path, "mine").unwrap();
    let output = keepstep(&stage, &["init", "--output", "rules.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--force"));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");

    succeeds(&stage, &["init", "--output", "rules.toml", "--force"]);
    let printed = succeeds(&stage, &["init", "--output", "-"]);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), printed);
    assert!(printed.contains("[rule.t]"), "{printed}");
}
