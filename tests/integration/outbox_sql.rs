//! The outbox's triggers against Postgres itself: whatever is done to a table, its rows in the outbox, applied in their order,
//! make the table.

use std::time::Duration;

use keepstep::config::TableName;
use keepstep::source::client;
use keepstep::source::provision::outbox::{Followed, Wanted, plan_setup, plan_teardown};
use keepstep::source::provision::{Executor, execute};
use tokio_postgres::Client;

use crate::source::{info, url};
use crate::support::Stage;

/// Everything that a statement can be about, in few columns.
const TABLES: &str = r#"
create type mood as enum ('sad', 'it''s "fine"');
create type pair as (a int, b text);
create table plain (id int primary key, n int, t text);
create table "Odd ""t""" (gone_1 int, "new" int, "old" text, id text, "signs" numeric, gone_2 text, "doubt" float8, "a,b" text[],
    "ROW" pair, at timestamptz, stamp timestamp, span interval, bytes bytea, mood mood, "found" jsonb, "key" bool,
    twice int generated always as ("new" * 2) stored, k1 date, spans tstzrange, primary key (id, "new"));
alter table "Odd ""t""" drop column gone_1, drop column gone_2;
create table bare (id int, n int, t text); alter table bare replica identity full;
create table indexed (id int not null, n int, t text); create unique index indexed_id on indexed (id);
alter table indexed replica identity using index indexed_id;
create table parts (id int, n int, t text, primary key (id, n)) partition by list (n);
create table parts_0 partition of parts for values in (0, 1, null) partition by range (id);
create table parts_0_low (n int, t text, id int not null); alter table parts_0_low alter n set not null;
alter table parts_0 attach partition parts_0_low for values from (minvalue) to (50);
create table parts_0_high partition of parts_0 for values from (50) to (maxvalue);
create table parts_1 partition of parts default;
create table parent (id int primary key, n int, t text);
create table child (extra int, primary key (id)) inherits (parent);
create table owner (id int primary key);
create table owned (id int primary key, n int references owner on delete set null, m int references owner on delete cascade, t text);
create table noisy (id int primary key, n int, t text);
create function touch() returns trigger language plpgsql as $$ begin
    if pg_trigger_depth() > 2 then return coalesce(new, old); end if;
    if tg_when = 'AFTER' then update noisy set t = 'after ' || coalesce(t, '') where id = new.id or id = new.id + 1;
    elsif tg_op = 'INSERT' then delete from noisy where id = new.id;
    else update noisy set t = 'before' where id = new.id + 1 and id <> old.id; end if;
    return new; end $$;
create trigger a_before before insert or update on noisy for each row execute function touch();
create trigger z_after after insert or update on noisy for each row when (new.n > 4) execute function touch();
"#;

const FOLLOWED: [&str; 10] =
    ["plain", "Odd \"t\"", "bare", "indexed", "parts", "parent", "child", "owned", "noisy", "owner"];

/// `replay(table)` applies the rows of the outbox to an empty copy, strictly: a key that is there twice or a row that is missing where
/// one goes fails. It says how copy and table differ; nothing is right.
const REPLAY: &str = r#"
create function replay(followed regclass) returns setof text language plpgsql as $replay$
declare shape keepstep.tables; change record; names text; keys text; touched bigint; lenient boolean;
begin
  select * into strict shape from keepstep.tables where relid = followed and is_present;
  names := (select string_agg(quote_ident(name), ', ') from unnest(shape.columns) name);
  keys := (select string_agg(quote_ident(name), ', ') from unnest(shape.identity) name);
  lenient := exists (select from keepstep.outbox where outbox.shape = shape.shape and doubt);
  execute format('create table copy as select %s from %s with no data', names, followed);
  execute format('create table key as select %s from %s with no data', keys, followed);
  create table doubted as select * from key with no data;
  if not shape.is_full then execute format('alter table copy add primary key (%s)', keys); end if;
  for change in select * from keepstep.outbox where outbox.shape = shape.shape order by id, xid loop
    if change.gone is not null then raise exception 'gone: %', change; end if;
    if change.op = 't' then
      truncate copy; truncate doubted;
    elsif change.doubt then
      if change.new is not null then
        execute format('with image as (select (row.copy).* from (select $1::copy) as row(copy)), key as (select %s from image),
          gone as (delete from copy where row(%1$s)::text in (select row(%1$s)::text from image)) insert into doubted select * from key', keys)
          using change.new;
      end if;
      if change.old is not null then
        execute format('with image as (select (row.key).* from (select $1::key) as row(key)),
          gone as (delete from copy where row(%1$s)::text in (select row(%1$s)::text from image)) insert into doubted select * from image', keys)
          using change.old;
      end if;
    else
      if change.op <> 'i' then
        execute format('delete from copy where ctid = (select ctid from copy where row(%1$s)::text = case when $1 is not null
          then (select row(%1$s)::text from (select ($1::key).*) as k) else (select row(%1$s)::text from (select ($2::copy).*) as k) end limit 1)',
          keys) using change.old, change.new;
        get diagnostics touched = row_count;
        if touched <> 1 and not lenient then raise exception 'there is no row for %', change; end if;
      end if;
      if change.new is not null then
        if lenient then
          execute format('delete from copy where row(%1$s)::text = (select row(%1$s)::text from (select ($1::copy).*) as k)', keys) using change.new;
        end if;
        execute 'insert into copy select ($1::copy).*' using change.new;
      end if;
    end if;
  end loop;
  -- What is in doubt is read from the table.
  execute format('delete from copy where row(%1$s)::text in (select row(%1$s)::text from doubted)', keys);
  execute format('insert into copy select %s from %s as t where row(%s)::text in (select row(%3$s)::text from doubted)',
                 names, followed, keys);
  return query execute format('select ''only in the table: '' || row(%1$s)::text from (select * from %2$s except all select * from copy) x
    union all select ''only in the copy: '' || row(%1$s)::text from (select * from copy except all select * from %2$s) x',
    names, format('(select %s from %s %s) y', names, case when exists (select from pg_inherits join pg_class on oid = inhparent
      where inhparent = followed and relkind = 'r') then 'only' else '' end, followed));
  drop table copy, key, doubted;
end $replay$;
"#;

fn wanted(tables: &[&str]) -> Wanted {
    let followed = |name: &&str| Followed {
        table: TableName { schema: "public".to_owned(), name: (*name).to_owned() },
        columns: None,
        optional: false,
    };
    Wanted { schema: "keepstep".to_owned(), tables: tables.iter().map(followed).collect(), limit: None }
}

async fn set_up(client: &Client, wanted: &Wanted) -> usize {
    let plan = plan_setup(client, wanted, Executor::Role).await.unwrap();
    for statement in &plan.statements {
        execute(client, statement).await.unwrap();
    }
    plan.statements.len()
}

async fn stage() -> (Stage, Client) {
    let stage = Stage::set_with("wal_level = replica", &[]);
    stage.execute(TABLES).await;
    let client = client::connect(&info(&url(&stage.postgres, "postgres", "")), Duration::ZERO).await.unwrap();
    (stage, client)
}

/// Small numbers, the same for the same seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[usize::try_from(self.below(of.len() as u64)).unwrap()]
    }
}

/// One statement about a table with the columns id, n and t; whether it succeeds does not matter.
fn statement(dice: &mut Dice, merge: bool) -> String {
    let table = dice.pick(&[
        "plain",
        "bare",
        "indexed",
        "parts",
        "parts_0",
        "parts_1",
        "parts_0_low",
        "parent",
        "child",
        "owned",
        "noisy",
    ]);
    let (id, other, n) = (dice.below(100), dice.below(100), dice.below(8));
    let text = dice.pick(&["null", "''", "'a \"b\"'", "E'x\\\\y,\\n(z)'", "repeat('long', 800)"]);
    let rows = format!("(select g, {n}, {text} from generate_series({id}, {id} + {n}) g)");
    let owned = table == "owned";
    let columns = "(id, n, t)";
    match dice.below(if merge { 15 } else { 14 }) {
        0 | 1 => format!("insert into {table} {columns} values ({id}, {n}, {text})"),
        2 => format!("insert into {table} {columns} {rows}"),
        3 => format!("insert into {table} {columns} {rows} on conflict do nothing"),
        4 if table != "bare" => {
            let target = if table.starts_with("parts") { "(id, n)" } else { "(id)" };
            let set = dice.pick(&["t = excluded.t || '!'", "n = excluded.n, t = null", "id = excluded.id + 200"]);
            format!("insert into {table} {columns} {rows} on conflict {target} do update set {set}")
        }
        5 | 6 => format!("update {table} set t = {text}, n = {n} where id = {id}"),
        7 => format!("update {table} set t = {text} where id between {id} and {other}"),
        8 => format!("update {table} set id = id + {n} - 4 where id > {id}"),
        9 => format!("update {table} set n = n + 1 where id < {id}"),
        10 => format!("delete from {table} where id = {id}"),
        11 => format!("delete from {table} where id between {id} and {id} + {n}"),
        12 => format!(
            "with gone as (delete from {table} where id < {n} * 5 returning id, t) insert into {table} {columns} select id, {n}, t from gone"
        ),
        13 if id < 8 => {
            format!("truncate {}", dice.pick(&["plain", "bare", "indexed", "parts", "only parent", "noisy"]))
        }
        13 if owned || id < 50 => dice
            .pick(&[
                "insert into owner select generate_series(0, 7) on conflict do nothing",
                "delete from owner where id % 3 = 1",
            ])
            .to_owned(),
        13 => format!("update owned set m = {n}, n = {n} % 3 where id % 5 = {n} % 5"),
        14 => format!(
            "merge into {table} as t using {rows} as s(i, n, t) on t.id = s.i + 1
             when matched and t.id % 3 = 0 then delete when matched then update set t = s.t, n = s.n
             when not matched then insert {columns} values (s.i + 1, s.n, s.t)"
        ),
        _ => format!("select {id}"),
    }
}

/// A row of the table with every type, and what can be done to it.
fn odd_statement(dice: &mut Dice) -> String {
    let (id, n) = (dice.below(20), dice.below(5));
    let at = format!("timestamptz '2024-02-29 12:00:00.{n}5+02' * 1").replace(" * 1", "");
    let values = format!(
        "{n}, E'a\\'\"{{\\\\' , 'k{id}', {n}.50, 0.1::float8 + {n}, array['x,y', null, '\"', ''], row({n}, ' (,)'), {at}, now()::timestamp, \
         interval '1 year -{n} days 3.5 s', '\\x00ff5c'::bytea, 'it''s \"fine\"', '{{\"a\": [{n}, null]}}', {n} = 1, 'infinity', \
         tstzrange({at}, null)"
    );
    let names = "\"new\", \"old\", id, signs, doubt, \"a,b\", \"ROW\", at, stamp, span, bytes, mood, \"found\", \"key\", k1, spans";
    match dice.below(6) {
        0..3 => format!(
            "insert into \"Odd \"\"t\"\"\" ({names}) values ({values}) on conflict (id, \"new\") do update set signs = 1.0, \"old\" = null"
        ),
        3 => {
            format!("update \"Odd \"\"t\"\"\" set \"new\" = \"new\" + 5, doubt = 'nan', at = now() where id = 'k{id}'")
        }
        4 => format!(
            "update \"Odd \"\"t\"\"\" set span = span * {n}, \"found\" = null, bytes = bytes || bytes where \"new\" % 3 = {n}"
        ),
        _ => format!("delete from \"Odd \"\"t\"\"\" where id = 'k{id}'"),
    }
}

/// Random transactions, with savepoints that are rolled back, and sessions with settings of their own.
async fn churn(client: &Client, dice: &mut Dice, transactions: usize) {
    let version: i32 = client.query_one("select current_setting('server_version_num')::int", &[]).await.unwrap().get(0);
    for _ in 0..transactions {
        let settings = [
            dice.pick(&["datestyle = 'German'", "datestyle = 'ISO'", "timezone = 'Asia/Kolkata'", "timezone = 'UTC'"]),
            dice.pick(&[
                "intervalstyle = iso_8601",
                "bytea_output = escape",
                "extra_float_digits = 0",
                "search_path = pg_temp, public",
            ]),
            dice.pick(&[
                "session_replication_role = replica",
                "session_replication_role = origin",
                "quote_all_identifiers = on",
            ]),
        ];
        for setting in settings {
            client.batch_execute(&format!("set {setting}")).await.unwrap();
        }
        client.batch_execute(dice.pick(&["begin", "begin isolation level repeatable read"])).await.unwrap();
        for _ in 0..=dice.below(5) {
            let sql = if dice.below(5) == 0 { odd_statement(dice) } else { statement(dice, version >= 150_000) };
            client.batch_execute("savepoint s").await.unwrap();
            if let Err(error) = client.batch_execute(&sql).await {
                let code = error.code().map(|code| code.code().to_owned()).unwrap_or_default();
                // A key that is there already, no partition for a row, a foreign key, a row changed twice: the application's own mistakes.
                assert!(
                    ["23", "21", "27"].iter().any(|class| code.starts_with(class)) || code == "0A000",
                    "{sql}: {error:?}"
                );
                client.batch_execute("rollback to s").await.unwrap();
            } else if dice.below(6) == 0 {
                client.batch_execute("rollback to s").await.unwrap();
            }
        }
        client.batch_execute(dice.pick(&["commit", "commit", "commit", "rollback"])).await.unwrap();
    }
    client.batch_execute("reset all; set datestyle = 'ISO'; set timezone = 'UTC'").await.unwrap();
}

/// What the rows in the outbox do not make of the tables.
async fn differences(client: &Client) -> Vec<String> {
    let mut found = Vec::new();
    for table in FOLLOWED {
        let name = format!("\"{}\"", table.replace('"', "\"\""));
        let rows = client.query("select replay($1::text::regclass)", &[&name]).await;
        let rows = rows.unwrap_or_else(|error| panic!("{table}: {error:?}"));
        found.extend(rows.iter().map(|row| format!("{table}: {}", row.get::<_, String>(0))));
    }
    found
}

#[tokio::test]
async fn the_rows_in_their_order_make_the_tables() {
    let (_stage, client) = stage().await;
    set_up(&client, &wanted(&FOLLOWED)).await;
    client.batch_execute(REPLAY).await.unwrap();
    for seed in [3, 77, 4_242] {
        churn(&client, &mut Dice(seed), 150).await;
        let found = differences(&client).await;
        assert!(found.is_empty(), "seed {seed}:\n{}", found.join("\n"));
    }
    let counts = client.query_one("select count(*), count(*) filter (where doubt), count(*) filter (where old is not null and op = 'u') from keepstep.outbox", &[]).await.unwrap();
    let (all, doubted, moved): (i64, i64, i64) = (counts.get(0), counts.get(1), counts.get(2));
    assert!(
        all > 1_000 && doubted > 10 && doubted < all / 2 && moved > 10,
        "{all} rows, {doubted} in doubt, {moved} moved"
    );
    // It is seen where they do not.
    for (table, broken) in [
        ("noisy", "update keepstep.outbox_0 set doubt = null"),
        ("plain", "delete from keepstep.outbox_0 where op = 'i'"),
    ] {
        client.batch_execute(broken).await.unwrap();
        let found = client.query(&format!("select replay('{table}')"), &[]).await;
        assert!(found.is_err() || !found.unwrap().is_empty(), "{table}: nothing was wrong after {broken}");
    }
}

/// What setup leaves in the database: triggers, functions, relations, and who may do what with them.
async fn objects(client: &Client) -> String {
    let sql = "select coalesce(string_agg(line, E'\n' order by line), '') from (
        select format('trigger %s on %s %s', tgname, tgrelid::regclass, tgenabled) as line from pg_trigger where not tgisinternal
        union all select format('function %s.%s %s', nspname, proname, proacl) from pg_proc join pg_namespace n on n.oid = pronamespace
          where nspname !~ '^(pg_|information_)'
        union all select format('relation %s.%s %s', nspname, relname, relacl) from pg_class join pg_namespace n on n.oid = relnamespace
          where nspname !~ '^(pg_|information_)' and relkind <> 'i') objects";
    client.query_one(sql, &[]).await.unwrap().get(0)
}

async fn tear_down(client: &Client) -> usize {
    let plan = plan_teardown(client, "keepstep").await.unwrap();
    for statement in &plan.statements {
        execute(client, statement).await.unwrap();
    }
    plan.statements.len()
}

#[tokio::test]
async fn setup_does_what_is_missing_and_teardown_leaves_nothing() {
    let (stage, client) = stage().await;
    let before = objects(&client).await;
    assert_eq!(set_up(&client, &wanted(&["plain", "Odd \"t\"", "parts"])).await, 6);
    let made = objects(&client).await;
    assert_eq!(set_up(&client, &wanted(&["plain", "Odd \"t\"", "parts"])).await, 0);
    // The lock timeout counts as a step: a table more, a table less, and fewer columns of one.
    assert_eq!(set_up(&client, &wanted(&["plain", "parts", "bare"])).await, 3);
    let mut fewer = wanted(&["plain", "Odd \"t\"", "parts"]);
    fewer.tables[0].columns = Some(vec!["t".to_owned()]);
    assert_eq!(set_up(&client, &fewer).await, 4);
    assert_eq!(objects(&client).await, made);
    client.batch_execute("insert into plain values (7, 8, 'a')").await.unwrap();
    let image: String = client.query_one("select new from keepstep.outbox", &[]).await.unwrap().get(0);
    assert_eq!(image, "(7,a)");

    client.batch_execute("select pg_advisory_lock(1801807216, 'keepstep'::regnamespace::oid::int)").await.unwrap();
    let busy = plan_teardown(&client, "keepstep").await.unwrap_err();
    assert!(busy.to_string().contains("pid"), "{busy}");
    client.batch_execute("select pg_advisory_unlock_all()").await.unwrap();
    assert!(tear_down(&client).await > 0);
    assert_eq!(objects(&client).await, before);
    assert_eq!(tear_down(&client).await, 0);

    // What is printed does the same in psql.
    let script = plan_setup(&client, &fewer, Executor::Dba).await.unwrap().script();
    psql(&stage, &script);
    assert_eq!(set_up(&client, &fewer).await, 0);
    psql(&stage, &plan_teardown(&client, "keepstep").await.unwrap().script());
    assert_eq!(objects(&client).await, before);

    client.batch_execute("create schema keepstep").await.unwrap();
    let taken = plan_setup(&client, &fewer, Executor::Role).await.unwrap_err();
    assert!(taken[0].to_string().contains("holds no outbox"), "{taken:?}");
    assert_eq!(tear_down(&client).await, 0);
}

fn psql(stage: &Stage, script: &str) {
    let path = stage.folder().join("script.sql");
    std::fs::write(&path, script).unwrap();
    let output = stage.postgres.command("psql").args(["--no-psqlrc", "--quiet", "-f"]).arg(path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test]
async fn nobody_needs_to_be_a_superuser_and_nobody_gets_more_than_he_needs() {
    let (stage, superuser) = stage().await;
    let roles = "create role holder login; create role app login; create role reader login; grant create on database postgres to holder;
        grant all on schema public to holder; alter table plain owner to holder; grant select, insert, update, delete on plain to app";
    superuser.batch_execute(roles).await.unwrap();
    let as_role =
        async |role: &str| client::connect(&info(&url(&stage.postgres, role, "")), Duration::ZERO).await.unwrap();
    let (holder, app, reader) = (as_role("holder").await, as_role("app").await, as_role("reader").await);
    let refused = plan_setup(&app, &wanted(&["plain", "bare"]), Executor::Role).await.unwrap_err();
    assert_eq!(refused.len(), 3, "{refused:?}");
    set_up(&holder, &wanted(&["plain"])).await;
    holder.batch_execute("select keepstep.admit('reader')").await.unwrap();

    app.batch_execute("insert into plain values (1, 2, 'x'); update plain set id = 2; delete from plain")
        .await
        .unwrap();
    for sql in [
        "select from keepstep.outbox",
        "select keepstep.rotate(pg_current_snapshot())",
        "insert into keepstep.outbox_0 select",
        "select nextval('keepstep.gap')",
        "select keepstep.emit('', '')",
        "select keepstep.renew()",
        "create table keepstep.mine ()",
    ] {
        let denied = app.batch_execute(sql).await.unwrap_err();
        assert_eq!(denied.code().unwrap().code(), "42501", "{sql}");
    }
    let rows: i64 = reader.query_one("select count(*) from keepstep.outbox", &[]).await.unwrap().get(0);
    assert_eq!(rows, 3);
    let works = "select keepstep.emit('a', 'b'), keepstep.sleep(true), keepstep.sleep(false), keepstep.reopen(); select keepstep.renew();
        update keepstep.state set confirmed_lsn = pg_current_wal_insert_lsn(); select * from keepstep.retyped, keepstep.gap, keepstep.gate;
        select t.name, f from keepstep.tables t, keepstep.findings(t.relid, t.columns) f; select keepstep.rotate(pg_current_snapshot())";
    reader.batch_execute(works).await.unwrap();
    for sql in [
        "select from plain",
        "delete from keepstep.outbox_0",
        "update keepstep.state set size_limit = 1",
        "select keepstep.follow('plain')",
    ] {
        let denied = reader.batch_execute(sql).await.unwrap_err();
        assert_eq!(denied.code().unwrap().code(), "42501", "{sql}");
    }
}

#[tokio::test]
async fn ddl_of_the_application_fails_nothing_and_is_marked() {
    let (stage, client) = stage().await;
    set_up(&client, &wanted(&["plain", "parent", "parts"])).await;
    // One session whose plans are kept, and one that is new each time.
    let write = async |table: &str, id: i32| {
        let sql = format!("insert into {table} (id) values ({id}); update {table} set id = {id} + 1 where id = {id}");
        client.batch_execute(&sql).await.unwrap();
        stage.execute(&sql.replace(&id.to_string(), &(id + 10).to_string())).await;
    };
    let marks = async |table: &str| -> (i64, Option<String>) {
        let sql = format!("select count(*), string_agg(distinct gone::text, ' ') from keepstep.outbox join keepstep.tables t using (shape)
            where t.name = '{table}' and outbox.id > (select coalesce(max(id), '0/0') from keepstep.outbox where op = 'm')");
        let row = client.query_one(&sql, &[]).await.unwrap();
        client.batch_execute("select keepstep.emit('', '')").await.unwrap();
        (row.get(0), row.get(1))
    };
    for table in ["plain", "parent"] {
        write(table, 100).await;
        assert_eq!(marks(table).await, (4, None));
        client.batch_execute(&format!("alter table {table} drop column n")).await.unwrap();
        write(table, 200).await;
        assert_eq!(marks(table).await, (4, Some("{2}".to_owned())));
        client
            .batch_execute(&format!("alter table {table} rename t to u; alter table {table} add column n text"))
            .await
            .unwrap();
        write(table, 300).await;
        assert_eq!(marks(table).await, (4, Some("{3}".to_owned())));
        client
            .batch_execute(&format!("alter table {table} alter u type varchar, alter n type bytea using null"))
            .await
            .unwrap();
        write(table, 400).await;
        assert_eq!(marks(table).await, (4, Some("{3}".to_owned())));
        let sql = format!(
            "select array_agg(place) from keepstep.retyped join keepstep.tables using (shape) where name = '{table}'"
        );
        assert_eq!(client.query_one(&sql, &[]).await.unwrap().get::<_, Vec<i16>>(0), [2]);
        client
            .batch_execute(&format!("alter table {table} rename to other; alter table other rename to {table}"))
            .await
            .unwrap();
        write(table, 500).await;
    }
    // A column of the identity may go too; its rows still come.
    client.batch_execute("alter table plain drop column id, add column id int").await.unwrap();
    write("plain", 600).await;
    client.batch_execute("create table parts_2 partition of parts for values in (2)").await.unwrap();
    let findings = "select f from keepstep.tables t, keepstep.findings(t.relid) f where name = $1 order by f";
    let found: Vec<String> = client.query(findings, &[&"parts"]).await.unwrap().iter().map(|row| row.get(0)).collect();
    assert_eq!(found.len(), 3, "{found:?}");
    assert!(found[0].contains("trigger keepstep_delete on public.parts_2 is missing"), "{found:?}");
    assert_eq!(set_up(&client, &wanted(&["plain", "parent", "parts"])).await, 4);
    assert_eq!(set_up(&client, &wanted(&["plain", "parent", "parts"])).await, 0);
    client.batch_execute("alter table parts disable trigger keepstep_update").await.unwrap();
    assert_eq!(set_up(&client, &wanted(&["plain", "parent", "parts"])).await, 2);
    client.batch_execute("drop table plain, parts, parent cascade").await.unwrap();
}

#[tokio::test]
async fn a_full_outbox_takes_no_more_and_says_so() {
    let (_stage, client) = stage().await;
    let limited = Wanted { limit: Some(1 << 20), ..wanted(&["plain"]) };
    set_up(&client, &limited).await;
    let gap = async || {
        client
            .query_one("select last_value, is_called from keepstep.gap", &[])
            .await
            .map(|row| (row.get::<_, i64>(0), row.get::<_, bool>(1)))
            .unwrap()
    };
    let rows = async || client.query_one("select count(*) from keepstep.outbox", &[]).await.unwrap().get::<_, i64>(0);
    let fill = "insert into plain select g, 1, repeat('long', 30) from generate_series(1, 20000) g; delete from plain";
    let none = gap().await;
    client.batch_execute(fill).await.unwrap();
    let (full, first) = (rows().await, gap().await);
    assert!(full >= 20_000, "{full}");
    client.batch_execute("begin; insert into plain values (1); rollback").await.unwrap();
    assert_eq!(rows().await, full);
    // Also what was rolled back is marked: a gap too many does no harm.
    assert!(gap().await != first && gap().await != none);
    client.batch_execute("select keepstep.rotate(pg_current_snapshot()), keepstep.reopen()").await.unwrap();
    let reopened = gap().await;
    client.batch_execute("insert into plain values (1)").await.unwrap();
    assert_eq!((rows().await, gap().await), (full + 1, reopened));
}

#[tokio::test]
async fn rotation_loses_nothing_and_lets_nobody_wait() {
    let (stage, client) = stage().await;
    set_up(&client, &wanted(&["plain"])).await;
    let old = stage.sql().await;
    old.batch_execute("begin isolation level repeatable read; insert into plain values (1)").await.unwrap();
    client.batch_execute("insert into plain values (2)").await.unwrap();
    let rotate = async |snapshot: &str| -> bool {
        client.query_one(&format!("select keepstep.rotate({snapshot})"), &[]).await.unwrap().get(0)
    };
    let rows = async || client.query_one("select count(*) from keepstep.outbox", &[]).await.unwrap().get::<_, i64>(0);
    let before: String = client.query_one("select pg_current_snapshot()::text", &[]).await.unwrap().get(0);
    assert!(rotate("pg_current_snapshot()").await, "writers go to the other half");
    // Somebody is at work in the first half, and does not wait, nor does anybody else.
    assert!(!rotate("pg_current_snapshot()").await);
    old.batch_execute("set local lock_timeout = '1s'; insert into plain values (3)").await.unwrap();
    client.batch_execute("insert into plain values (4)").await.unwrap();
    assert!(!rotate("pg_current_snapshot()").await);
    old.batch_execute("commit").await.unwrap();
    // What was not seen then stays.
    assert!(!rotate(&format!("'{before}'")).await);
    assert_eq!(rows().await, 4);
    for _ in 0..3 {
        rotate("pg_current_snapshot()").await;
    }
    assert_eq!(rows().await, 0);
    let size: i64 = client
        .query_one(
            "select sum(pg_relation_size(c))::int8 from unnest('{keepstep.outbox_0,keepstep.outbox_1}'::regclass[]) c",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(size, 0);
}

#[tokio::test]
async fn subscriptions_are_refused() {
    let (_stage, client) = stage().await;
    let subscribed = "set allow_system_table_mods = on; create subscription s connection 'dbname=none' publication p with (connect = false);
        insert into pg_subscription_rel (srsubid, srrelid, srsubstate) select oid, 'parts_1'::regclass, 'r' from pg_subscription";
    for sql in subscribed.split(';') {
        client.batch_execute(sql).await.unwrap();
    }
    let refused = plan_setup(&client, &wanted(&["parts", "plain"]), Executor::Role).await.unwrap_err();
    assert!(refused.len() == 1 && refused[0].to_string().contains("filled by a subscription"), "{refused:?}");
}

#[tokio::test]
async fn a_partition_is_refused() {
    let (_stage, client) = stage().await;
    let refused = plan_setup(&client, &wanted(&["parts_0", "plain"]), Executor::Role).await.unwrap_err();
    assert!(refused.len() == 1 && refused[0].to_string().contains("parts_0 is a partition"), "{refused:?}");
}

#[tokio::test]
async fn what_was_dumped_works_where_it_is_loaded() {
    let (stage, client) = stage().await;
    set_up(&client, &wanted(&FOLLOWED)).await;
    client.batch_execute("create database loaded").await.unwrap();
    let dump = stage.postgres.command("pg_dump").arg("postgres").output().unwrap();
    assert!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
    let script = stage.folder().join("dump.sql");
    std::fs::write(&script, dump.stdout).unwrap();
    let loaded = stage
        .postgres
        .command("psql")
        .args(["--no-psqlrc", "-q", "-v", "ON_ERROR_STOP=1", "-d", "loaded", "-f"])
        .arg(script)
        .output()
        .unwrap();
    assert!(loaded.status.success(), "{}", String::from_utf8_lossy(&loaded.stderr));
    let (there, connection) =
        tokio_postgres::connect(&stage.postgres.url("loaded"), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let write = async || {
        for table in ["plain", "bare", "indexed", "parts", "child"] {
            let writes =
                format!("insert into {table} (id, n) values (1, 1); update {table} set n = 0; delete from {table}");
            there.batch_execute(&writes).await.unwrap_or_else(|error| panic!("{table}: {error:?}"));
        }
    };
    write().await;
    assert!(set_up(&there, &wanted(&FOLLOWED)).await > 0);
    assert_eq!(set_up(&there, &wanted(&FOLLOWED)).await, 0);
    there.batch_execute("truncate keepstep.outbox_0").await.unwrap();
    write().await;
    let rows: i64 = there.query_one("select count(*) from keepstep.outbox", &[]).await.unwrap().get(0);
    assert_eq!(rows, 15);
}

#[tokio::test]
async fn a_partition_that_was_detached_is_no_longer_followed() {
    let (_stage, client) = stage().await;
    set_up(&client, &wanted(&["parts"])).await;
    client.batch_execute("insert into parts values (1, 1, 'a'), (2, 0, 'b'), (60, 7, 'c')").await.unwrap();
    let rows = async || client.query_one("select count(*) from keepstep.outbox", &[]).await.unwrap().get::<_, i64>(0);
    assert_eq!(rows().await, 3);
    client
        .batch_execute("alter table parts detach partition parts_0; alter table parts detach partition parts_1")
        .await
        .unwrap();
    for alone in ["parts_0", "parts_0_low", "parts_1"] {
        let writes = format!(
            "insert into {alone} (id, n, t) values (3, 1, 'd'); update {alone} set t = 'e'; delete from {alone}"
        );
        client.batch_execute(&writes).await.unwrap();
    }
    assert_eq!(rows().await, 3);
}

#[tokio::test]
async fn no_cast_of_the_applications_is_called() {
    let (stage, client) = stage().await;
    let tables = "
        create table moody (id mood primary key, n int);
        create function no_text(mood) returns text language plpgsql as $$ begin raise 'no cast'; end $$;
        create cast (mood as text) with function no_text(mood) as assignment;
        create role app login; grant all on moody to app";
    client.batch_execute(tables).await.unwrap();
    set_up(&client, &wanted(&["moody"])).await;
    let app = client::connect(&info(&url(&stage.postgres, "app", "")), Duration::ZERO).await.unwrap();
    app.batch_execute(
        "insert into moody values ('sad', 1); update moody set n = 2; update moody set id = 'it''s \"fine\"'",
    )
    .await
    .unwrap();
    let rows = client.query("select op::text, old, new from keepstep.outbox order by id", &[]).await.unwrap();
    let rows: Vec<(String, Option<String>, Option<String>)> =
        rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
    let some = |text: &str| Some(text.to_owned());
    let fine = some(r#"("it's ""fine""",2)"#);
    let expected = [("i", None, some("(sad,1)")), ("u", None, some("(sad,2)")), ("u", some("(sad)"), fine)];
    assert_eq!(rows, expected.map(|(op, old, new)| (op.to_owned(), old, new)));
}

#[tokio::test]
async fn who_is_not_there_is_not_called() {
    let (_stage, client) = stage().await;
    set_up(&client, &wanted(&["plain"])).await;
    let asleep = "select last_value & 2 <> 0 from keepstep.gate";
    let asleep = async || client.query_one(asleep, &[]).await.unwrap().get::<_, bool>(0);
    let lock = "select pg_advisory_lock(1801807216, 'keepstep'::regnamespace::oid::int); select keepstep.sleep(true)";
    client.batch_execute(lock).await.unwrap();
    client.batch_execute("select keepstep.measure()").await.unwrap();
    assert!(asleep().await);
    client.batch_execute("select pg_advisory_unlock_all(); select keepstep.measure()").await.unwrap();
    assert!(!asleep().await);
}

#[tokio::test]
async fn an_old_snapshot_rotates_nothing() {
    let (_stage, client) = stage().await;
    set_up(&client, &wanted(&["plain"])).await;
    client.batch_execute("begin isolation level repeatable read").await.unwrap();
    let refused = client.batch_execute("select keepstep.rotate(pg_current_snapshot())").await.unwrap_err();
    assert!(refused.as_db_error().unwrap().message().contains("read committed"), "{refused:?}");
}
