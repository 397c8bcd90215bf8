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
  for change in select * from keepstep.outbox where outbox.shape = shape.shape order by id loop
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
    let table = dice.pick(&["plain", "bare", "indexed", "parts", "parts_0", "parts_1", "parts_0_low", "parent", "child", "owned", "noisy"]);
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
        12 => format!("with gone as (delete from {table} where id < {n} * 5 returning id, t) insert into {table} {columns} select id, {n}, t from gone"),
        13 if id < 8 => format!("truncate {}", dice.pick(&["plain", "bare", "indexed", "parts", "only parent", "noisy"])),
        13 if owned || id < 50 => {
            dice.pick(&["insert into owner select generate_series(0, 7) on conflict do nothing", "delete from owner where id % 3 = 1"]).to_owned()
        }
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
        0..3 => format!("insert into \"Odd \"\"t\"\"\" ({names}) values ({values}) on conflict (id, \"new\") do update set signs = 1.0, \"old\" = null"),
        3 => format!("update \"Odd \"\"t\"\"\" set \"new\" = \"new\" + 5, doubt = 'nan', at = now() where id = 'k{id}'"),
        4 => format!("update \"Odd \"\"t\"\"\" set span = span * {n}, \"found\" = null, bytes = bytes || bytes where \"new\" % 3 = {n}"),
        _ => format!("delete from \"Odd \"\"t\"\"\" where id = 'k{id}'"),
    }
}

/// Random transactions, with savepoints that are rolled back, and sessions with settings of their own.
async fn churn(client: &Client, dice: &mut Dice, transactions: usize) {
    let version: i32 =
        client.query_one("select current_setting('server_version_num')::int", &[]).await.unwrap().get(0);
    for _ in 0..transactions {
        let settings = [
            dice.pick(&["datestyle = 'German'", "datestyle = 'ISO'", "timezone = 'Asia/Kolkata'", "timezone = 'UTC'"]),
            dice.pick(&["intervalstyle = iso_8601", "bytea_output = escape", "extra_float_digits = 0", "search_path = pg_temp, public"]),
            dice.pick(&["session_replication_role = replica", "session_replication_role = origin", "quote_all_identifiers = on"]),
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
                assert!(["23", "21", "27"].iter().any(|class| code.starts_with(class)) || code == "0A000", "{sql}: {error:?}");
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
    assert!(all > 1_000 && doubted > 10 && doubted < all / 2 && moved > 10, "{all} rows, {doubted} in doubt, {moved} moved");
}
