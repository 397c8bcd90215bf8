//! The catalog's answers against what the stream says, and every message about tables, with its remedy tried out.

use std::collections::BTreeMap;
use std::path::PathBuf;

use keepstep::catalog::{Carrier, Catalog, Persistence, Published, TableKind, check_rules, load, with_tables};
use keepstep::config::diagnostic::{Diagnostic, render};
use keepstep::config::{Config, RulesFile, TableName, parse};
use keepstep::decode::pgoutput;
use keepstep::decode::types::Types;
use keepstep::model::{Event, Relation, ReplicaIdentity};

use crate::support::Stage;

/// Tables with every kind of replica identity and of column, on all versions.
const TABLES: &str = "
    create type mood as enum ('sad', 'happy');
    create table by_key (b text, id int, a varchar(10), m mood, primary key (id, b));
    create table whole (id int primary key, v text);
    alter table whole replica identity full;
    create table by_index (id int primary key, sku text not null, v text);
    create unique index by_index_sku on by_index (sku);
    alter table by_index replica identity using index by_index_sku;
    create table nothing (id int primary key);
    alter table nothing replica identity nothing;
    create table no_key (id int);
    create table deferrable_key (id int primary key deferrable, v text);
    create table including (id int, v text, primary key (id) include (v));
    create table changing (id int primary key, gone int, v text, g int generated always as (id * 2) stored);
    alter table changing drop column gone;
    create schema \"Other one\";
    create table \"Other one\".\"Mixed case\" (\"Id\" int primary key, \"the name\" text);
    create table root (id int, at date, v text, primary key (id, at)) partition by range (at);
    create table middle partition of root for values from ('2024-01-01') to ('2025-01-01') partition by range (at);
    create table leaf_1 partition of middle for values from ('2024-01-01') to ('2024-07-01');
    create table leaf_2 partition of root for values from ('2025-01-01') to ('2026-01-01');
    create table unsent (id int primary key);
    create unlogged table unlogged (id int primary key);
    create view seen as select * from by_key;
    create materialized view stored as select * from by_key;
    create publication keepstep for table by_key, whole, by_index, nothing, no_key, deferrable_key, including, changing,
        \"Other one\".\"Mixed case\", root with (publish_via_partition_root = true);";

fn name(schema: &str, name: &str) -> TableName {
    TableName { schema: schema.to_owned(), name: name.to_owned() }
}

fn public(table: &str) -> TableName {
    name("public", table)
}

async fn catalog(stage: &Stage, tables: &[TableName]) -> Catalog {
    load(&stage.sql().await, &Carrier::Publication("keepstep".to_owned()), tables).await.unwrap()
}

/// The relations that the stream describes when a row of each table is inserted.
async fn streamed(stage: &Stage, inserts: &str) -> BTreeMap<TableName, Relation> {
    let client = stage.sql().await;
    let slot = "select 1 from pg_create_logical_replication_slot('stream', 'pgoutput')";
    client.batch_execute(slot).await.unwrap();
    client.batch_execute(inserts).await.unwrap();
    let changes = "select data from pg_logical_slot_get_binary_changes(
                       'stream', null, null, 'proto_version', '1', 'publication_names', 'keepstep')";
    let mut relations = BTreeMap::new();
    for row in client.query(changes, &[]).await.unwrap() {
        if let Event::Relation(relation) = pgoutput::parse(row.get(0)).unwrap() {
            relations.insert(name(&relation.schema, &relation.name), relation);
        }
    }
    client.batch_execute("select pg_drop_replication_slot('stream')").await.unwrap();
    relations
}

#[tokio::test]
async fn relations_are_those_of_the_stream() {
    let stage = Stage::set();
    stage.execute(TABLES).await;
    let inserts = "
        insert into by_key values ('b', 1, 'a', 'sad'); insert into whole values (1, 'v');
        insert into by_index values (1, 'sku', 'v'); insert into nothing values (1); insert into no_key values (1);
        insert into deferrable_key values (1, 'v'); insert into including values (1, 'v');
        insert into changing values (1, 'v'); insert into \"Other one\".\"Mixed case\" values (1, 'n');
        insert into root values (1, '2024-02-01', 'v'), (2, '2025-02-01', 'v');";
    let mut streamed = streamed(&stage, inserts).await;
    // Leaves are described too, but nothing comes under their names.
    streamed.retain(|table, _| !table.name.starts_with("leaf"));
    let tables: Vec<TableName> = streamed.keys().cloned().collect();
    let catalog = catalog(&stage, &tables).await;
    let relations: BTreeMap<TableName, Relation> =
        catalog.tables.into_iter().map(|(name, facts)| (name, facts.relation)).collect();
    assert_eq!(relations.len(), 10);
    assert_eq!(relations, streamed);
}

#[tokio::test]
async fn a_column_list_and_a_row_filter_are_honoured() {
    let stage = Stage::set();
    if stage.postgres.install.major < 15 {
        return;
    }
    let tables = "create table listed (id int primary key, a text, b text);
                  create table filtered (id int primary key, \"where\" text);
                  create publication keepstep for table listed (b, id), filtered where (id > 10);";
    stage.execute(tables).await;
    let streamed = streamed(&stage, "insert into listed values (1, 'a', 'b')").await;
    let catalog = catalog(&stage, &[public("listed"), public("filtered")]).await;
    let listed = &catalog.tables[&public("listed")];
    assert_eq!(listed.relation, streamed[&public("listed")]);
    assert_eq!(listed.hidden.iter().map(|column| column.name.as_str()).collect::<Vec<_>>(), ["a"]);
    assert_eq!(catalog.tables[&public("filtered")].row_filter.as_deref(), Some("(id > 10)"));
    assert_eq!(listed.row_filter, None);
}

#[tokio::test]
async fn tables_are_told_apart() {
    let stage = Stage::set();
    stage.execute(TABLES).await;
    stage.execute("alter table whole enable row level security").await;
    let tables = ["by_key", "root", "leaf_1", "unsent", "unlogged", "seen", "stored", "whole", "missing"].map(public);
    let catalog = catalog(&stage, &tables).await;
    let facts = |table: &str| &catalog.tables[&public(table)];
    let kinds = [
        ("by_key", TableKind::Ordinary, Persistence::Permanent, Published::Directly),
        ("root", TableKind::Partitioned, Persistence::Permanent, Published::Directly),
        ("leaf_1", TableKind::Ordinary, Persistence::Permanent, Published::Through(public("root"))),
        ("unsent", TableKind::Ordinary, Persistence::Permanent, Published::No),
        ("unlogged", TableKind::Ordinary, Persistence::Unlogged, Published::No),
        ("seen", TableKind::View, Persistence::Permanent, Published::No),
        ("stored", TableKind::MaterializedView, Persistence::Permanent, Published::No),
    ];
    for (table, kind, persistence, published) in kinds {
        let found = facts(table);
        assert_eq!((found.kind, found.persistence, &found.published), (kind, persistence, &published), "{table}");
    }
    assert!(facts("whole").row_security && !facts("by_key").row_security);
    assert!(!catalog.tables.contains_key(&public("missing")));
    assert!(catalog.others.contains(&name("Other one", "Mixed case")));
    let publication = catalog.publication.unwrap();
    assert!(publication.insert && publication.update && publication.delete && publication.truncate);
    stage.execute("alter publication keepstep set (publish_via_partition_root = false, publish = 'insert')").await;
    let catalog = load(&stage.sql().await, &Carrier::Publication("keepstep".to_owned()), &tables).await.unwrap();
    assert_eq!(catalog.tables[&public("root")].published, Published::AsLeaves);
    assert_eq!(catalog.tables[&public("leaf_1")].published, Published::Directly);
    let publication = catalog.publication.unwrap();
    assert!(publication.insert && !publication.update && !publication.delete && !publication.truncate);
    assert!(
        load(&stage.sql().await, &Carrier::Publication("other".to_owned()), &tables)
            .await
            .unwrap()
            .publication
            .is_none()
    );
}

/// Tables with partitions and children in two schemas, one of which a publication may name.
const FAMILIES: &str = "
    create schema other;
    create table plain (id int primary key, gone int, a text, b text, g int generated always as (id * 2) stored);
    alter table plain drop column gone;
    create table other.plain (id int primary key, a text);
    create unlogged table other.unlogged (id int primary key);
    create table parent (id int primary key); create table child () inherits (parent);
    create table root (id int, at date, primary key (id, at)) partition by range (at);
    create table middle partition of root for values from ('2024-01-01') to ('2025-01-01') partition by range (at);
    create table leaf_1 partition of middle for values from ('2024-01-01') to ('2024-07-01');
    create table other.leaf_2 partition of root for values from ('2025-01-01') to ('2026-01-01');
    create table other.root (id int primary key) partition by range (id);
    create table leaf_3 partition of other.root for values from (0) to (10);
    create view seen as select 1;";

/// What carries a table is asked without opening every table of the publication. Postgres's own view does, and says the same.
#[tokio::test]
async fn what_a_publication_carries_is_what_postgres_says() {
    let stage = Stage::set();
    stage.execute(FAMILIES).await;
    let (major, client) = (stage.postgres.install.major, stage.sql().await);
    let forms = [
        (14, "table plain, root"),
        (14, "all tables"),
        (14, "table middle, leaf_1, other.leaf_2"),
        (14, "table parent, only child"),
        (14, "table leaf_3"),
        (18, "table plain (g, b, id)"),
        (15, "table plain (b, id) where (id > 10), parent where (id < 3), other.plain"),
        (15, "tables in schema other"),
        (15, "tables in schema public"),
        (15, "tables in schema other, public"),
        (15, "table root where (id > 1), leaf_1 where (id > 2), tables in schema other"),
        (15, "table other.plain, tables in schema other"),
        (14, "table plain"),
    ];
    let names = ["plain", "parent", "child", "root", "middle", "leaf_1", "leaf_3", "seen"].map(public);
    let others = ["plain", "unlogged", "leaf_2", "root"].map(|table| name("other", table));
    let tables = [&names[..], &others[..]].concat();
    for ((least, what), via_root) in forms.iter().flat_map(|form| [(form, true), (form, false)]) {
        let lists = what.contains(['(']);
        if major < *least || lists && what.contains("root") && !via_root {
            continue;
        }
        let made = format!(
            "drop publication if exists keepstep;
             create publication keepstep for {what} with (publish_via_partition_root = {via_root})"
        );
        stage.execute(&made).await;
        let catalog = catalog(&stage, &tables).await;
        // Before Postgres 15 the view lists a partition beside the root that it comes under.
        let listed = client.query(
            "with listed as (
               select (schemaname || '.' || tablename)::regclass::oid as oid, to_jsonb(p) as said
                 from pg_publication_tables p where pubname = 'keepstep')
             select l.oid, said ->> 'schemaname', said ->> 'tablename', said ->> 'rowfilter',
                    array(select jsonb_array_elements_text(case when said ? 'attnames' then said -> 'attnames' else '[]' end)
                          except select attname from pg_attribute
                           where attrelid = l.oid and attgenerated <> '' and current_setting('server_version_num')::int < 180000
                           order by 1)
               from listed l
              where not exists (select from listed a join pg_partition_ancestors(l.oid) p on p.relid = a.oid where a.oid <> l.oid)",
            &[],
        ).await.unwrap();
        let mut said: Vec<(TableName, Option<String>, Vec<String>)> =
            listed.iter().map(|row| (name(row.get(1), row.get(2)), row.get(3), row.get(4))).collect();
        let direct = catalog.tables.values().filter(|table| table.published == Published::Directly);
        let mut found: Vec<(TableName, Option<String>, Vec<String>)> = direct
            .map(|table| {
                let mut columns: Vec<String> =
                    table.relation.columns.iter().map(|column| column.name.clone()).collect();
                columns.sort();
                let columns = if major < 15 { Vec::new() } else { columns };
                (table.name.clone(), table.row_filter.clone(), columns)
            })
            .collect();
        said.sort();
        found.sort();
        // It lists some twice, too.
        said.dedup();
        assert_eq!(found, said, "{what}, via root: {via_root}");
        for (table, facts) in &catalog.tables {
            let oid = facts.relation.oid;
            let row = client.query_one(
                "with listed as (select (schemaname || '.' || tablename)::regclass::oid as oid
                                   from pg_publication_tables where pubname = 'keepstep')
                 select exists (select from pg_partition_ancestors($1::oid) a join listed l on l.oid = a.relid where a.relid <> $1::oid),
                        exists (select from pg_partition_tree($1::oid) a join listed l on l.oid = a.relid where a.relid <> $1::oid)",
                &[&oid],
            ).await.unwrap();
            let (above, below): (bool, bool) = (row.get(0), row.get(1));
            let is_listed = said.iter().any(|(listed, ..)| listed == table);
            let expected = match &facts.published {
                Published::Directly => is_listed,
                Published::Through(_) => !is_listed && above,
                Published::AsLeaves => !is_listed && !above && below,
                Published::No => !is_listed && !above && !below,
            };
            assert!(expected, "{what}, via root: {via_root}: {table}: {:?}", facts.published);
        }
    }
}

/// A table that nobody asks about may be locked, or be dropped just then.
#[tokio::test]
async fn no_other_table_of_the_publication_is_opened() {
    let stage = Stage::set();
    stage.execute(TABLES).await;
    let busy = stage.sql().await;
    busy.batch_execute("begin; lock table whole, leaf_1, by_key in access exclusive mode").await.unwrap();
    let client = stage.sql().await;
    client.batch_execute("set statement_timeout = '1s'").await.unwrap();
    let carrier = Carrier::Publication("keepstep".to_owned());
    let catalog = load(&client, &carrier, &[public("root"), public("by_key"), public("by_index")]).await.unwrap();
    assert!(catalog.tables.values().all(|table| table.published == Published::Directly));
    assert_eq!(catalog.tables[&public("root")].leaves.len(), 2);
}

#[tokio::test]
async fn unique_indexes_are_those_that_always_hold() {
    let stage = Stage::set();
    let tables = "create table t (id int primary key, a int not null, b int not null, c int, d text,
                                  unique (c), unique (a, d) deferrable);
                  create unique index t_b_a on t (b, a) include (c);
                  create unique index t_partial on t (a) where b > 0;
                  create unique index t_expression on t (lower(d));
                  create index t_plain on t (d);
                  create table root (id int, at date, primary key (id, at)) partition by range (at);
                  create table leaf partition of root for values from ('2024-01-01') to ('2025-01-01');
                  create unique index leaf_only on leaf (id);";
    stage.execute(tables).await;
    let catalog = catalog(&stage, &[public("t"), public("root")]).await;
    let unique = |table: &str| -> Vec<(String, String, bool)> {
        let indexes = catalog.tables[&public(table)].unique.iter();
        indexes.map(|index| (index.name.clone(), index.columns.join(","), index.not_null)).collect()
    };
    let expected = |name: &str, columns: &str, not_null| (name.to_owned(), columns.to_owned(), not_null);
    assert_eq!(
        unique("t"),
        [expected("t_pkey", "id", true), expected("t_c_key", "c", false), expected("t_b_a", "b,a", true)]
    );
    assert_eq!(unique("root"), [expected("root_pkey", "id,at", true)]);
}

/// What Postgres logs of a partition's old rows is the partition's affair, although the stream calls it the root's.
#[tokio::test]
async fn leaves_that_log_less_than_their_root_says_are_found() {
    let stage = Stage::set();
    stage.execute(TABLES).await;
    let weak = async || {
        let catalog = catalog(&stage, &[public("root")]).await;
        let root = &catalog.tables[&public("root")];
        assert_eq!(root.leaves.len(), 2);
        root.weak_leaves().map(|leaf| leaf.name.name.clone()).collect::<Vec<_>>()
    };
    assert_eq!(weak().await, Vec::<String>::new());
    stage.execute("alter table root replica identity full").await;
    assert_eq!(weak().await, ["leaf_1", "leaf_2"]);
    stage.execute("alter table leaf_2 replica identity full").await;
    assert_eq!(weak().await, ["leaf_1"]);
    stage.execute("alter table root replica identity default; alter table leaf_1 replica identity nothing").await;
    assert_eq!(weak().await, ["leaf_1"]);
    let root = catalog(&stage, &[public("root")]).await;
    let leaf = &root.tables[&public("root")].leaves[0];
    assert_eq!((leaf.identity, leaf.identity_columns.len()), (ReplicaIdentity::Nothing, 0));
}

fn config(rules: &str) -> Config {
    let servers = "[postgres]\nurl = \"postgresql://db/shop\"\n[redis]\nurl = \"redis://cache\"\n";
    let file = RulesFile { path: PathBuf::from("keepstep.toml"), text: format!("{servers}{rules}") };
    parse(file, &|_| None)
        .unwrap_or_else(|problems| panic!("{}", render(&problems.diagnostics, &problems.file, false)))
        .0
}

async fn checked(stage: &Stage, config: &Config) -> Vec<Diagnostic> {
    let client = stage.sql().await;
    let tables: Vec<TableName> = config.rules.iter().map(|rule| rule.table.value.clone()).collect();
    let catalog = load(&client, &Carrier::of(&config.postgres), &tables).await.unwrap();
    let types = Types::load(&client, &catalog.type_oids()).await.unwrap();
    let checked = check_rules(config, &catalog, &types);
    assert_eq!(checked.rules.len(), config.rules.len());
    checked.diagnostics
}

#[tokio::test]
async fn rules_that_fit_are_bound() {
    let stage = Stage::set();
    stage.execute(TABLES).await;
    let config = config(
        r#"
        [rule.by-key]
        table = "public.by_key"
        key = "k:{id}:{b}"
        value = "json"
        columns = ["*"]
        [rule.moods]
        table = "public.whole"
        delete = ["whole:{v|md5}"]
        [rule.mixed]
        table = "Other one.Mixed case"
        key = "m:{Id}"
        value = "json"
        columns = ["the name"]
        [rule.root]
        table = "public.root"
        key = "r:{at}:{id}"
        value = "json"
        columns = ["v"]
        "#,
    );
    let found = checked(&stage, &config).await;
    assert_eq!(render(&found, &config.file, false), "");
}

#[tokio::test]
async fn every_misfit_is_reported_at_once() {
    let stage = Stage::set();
    stage.execute(TABLES).await;
    let config = config(
        r#"
[rule.misspelt]
table = "public.bykey"
delete = ["a"]
[rule.elsewhere]
table = "public.Mixed case"
delete = ["b"]
[rule.leaf]
table = "public.leaf_1"
delete = ["c"]
[rule.unsent]
table = "public.unsent"
delete = ["d"]
[rule.unlogged]
table = "public.unlogged"
delete = ["e"]
[rule.view]
table = "public.seen"
delete = ["f"]
[rule.materialized]
table = "public.stored"
delete = ["g"]
[rule.nothing]
table = "public.nothing"
delete = ["h:{id}"]
[rule.no-key]
table = "public.no_key"
key = "i:{id}"
value = "json"
columns = ["id"]
[rule.deferrable]
table = "public.deferrable_key"
key = "j:{id}"
value = "json"
columns = ["id"]
[rule.generated]
table = "public.changing"
key = "k:{id}"
value = "json"
columns = ["id", "g", "gone"]
"#,
    );
    let found = checked(&stage, &config).await;
    insta::assert_snapshot!("misfits", render(&found, &config.file, false));

    stage.execute("alter publication keepstep set (publish_via_partition_root = false, publish = 'insert')").await;
    let config = self::config("[rule.root]\ntable = \"public.root\"\ndelete = [\"a\"]\n");
    let root = render(&checked(&stage, &config).await, &config.file, false);
    stage.execute("drop publication keepstep").await;
    let none = render(&checked(&stage, &config).await, &config.file, false);
    insta::assert_snapshot!("publications", [root, none].join("\n"));
}

#[tokio::test]
async fn a_table_of_a_pattern_that_does_not_fit_is_a_warning_unless_none_fits() {
    let stage = Stage::set();
    let tables = ["a", "b", "c", "d"].map(|tenant| {
        format!("create schema t_{tenant}; create table t_{tenant}.items (id int primary key, name text, other text);")
    });
    stage.execute(&tables.concat()).await;
    stage.execute("create publication keepstep for table t_a.items, t_b.items, t_c.items").await;
    stage.execute("alter table t_b.items drop column other; alter table t_c.items drop column other").await;
    let said = async |columns: &str, key: &str| {
        let rule = format!("table = \"t_*.items\"\nkey = \"{key}\"\nvalue = \"json\"\ncolumns = [{columns}]\n");
        let none = "[rule.none]\ntable = \"public.items_*\"\ndelete = [\"items:{_table}\"]\n";
        let config = with_tables(&stage.sql().await, &config(&format!("[rule.item]\n{rule}{none}"))).await.unwrap();
        render(&checked(&stage, &config).await, &config.file, false)
    };
    let key = "{_schema}:{_pk}";
    let some = said("\"id\", \"other\"", key).await;
    let all = said("\"id\", \"nmae\"", key).await;
    let colliding = said("\"id\"", "{_schema|md5}:{name?x}:{_tabel}:{id}").await;
    let shared = said("\"id\"", "{_schema}:{name}").await;
    insta::assert_snapshot!("patterns", [some, all, colliding, shared].join("\n~~~\n\n"));
}

/// The SQL of a remedy, behind `:  `; psql's `\gexec` is done by hand.
async fn follow(stage: &Stage, help: &str) {
    let (_, sql) = help.split_once(":  ").unwrap();
    let Some(query) = sql.strip_suffix(" \\gexec") else { return stage.execute(sql).await };
    for row in stage.sql().await.query(query, &[]).await.unwrap() {
        stage.execute(row.get(0)).await;
    }
}

#[tokio::test]
async fn each_remedy_ends_its_problem() {
    let stage = Stage::set();
    stage.execute(TABLES).await;
    let set_up = "alter table by_key add x int not null default 1; create unique index by_key_x on by_key (x, id);
                  alter table root replica identity full; alter publication keepstep set (publish = 'insert')";
    stage.execute(set_up).await;
    let rules = [
        ("public.unsent", "a:{id}"),
        ("public.by_key", "b:{x}"),
        ("public.by_index", "c:{v}"),
        ("public.nothing", "d:{id}"),
        ("public.no_key", "e:{id}"),
        ("public.root", "f:{at}"),
        ("public.leaf_1", "g"),
        ("public.unlogged", "h"),
    ];
    for (table, key) in rules {
        let config = config(&format!("[rule.r]\ntable = \"{table}\"\ndelete = [\"{key}\"]\n"));
        let mut rounds = 0;
        loop {
            let found = checked(&stage, &config).await;
            let Some(first) = found.first() else { break };
            let shown = render(&found, &config.file, false);
            let Some(help) = first.help.iter().find(|help| help.contains(":  ") && !help.contains('…')) else {
                break;
            };
            if help.contains("table = ") {
                break;
            }
            rounds += 1;
            assert!(rounds < 5, "{shown}");
            follow(&stage, help).await;
            let after = render(&checked(&stage, &config).await, &config.file, false);
            assert_ne!(after, shown, "{help}");
        }
    }
    let all: String = rules[..6]
        .iter()
        .enumerate()
        .map(|(number, (table, key))| format!("[rule.r{number}]\ntable = \"{table}\"\ndelete = [\"{key}\"]\n"))
        .collect();
    let config = config(&all);
    let left = checked(&stage, &config).await;
    assert_eq!(render(&left, &config.file, false), "");
    stage.execute("update by_key set x = 2; delete from nothing; delete from no_key; update root set v = 'w'").await;
}
