//! The queries. Every name in them is qualified, so no `search_path` can redirect them.

use std::collections::{BTreeMap, HashMap};

use tokio_postgres::types::Oid;
use tokio_postgres::{Client, Row};

use super::{
    Carrier, Catalog, HiddenColumn, Leaf, Persistence, Publication, Published, TableFacts, TableKind, UniqueIndex,
    sql_identifier,
};
use crate::config::TableName;
use crate::error::{Error, Result};
use crate::model::{Column, Relation, ReplicaIdentity};
use crate::source::{outbox, query_error};

/// How many names are read for suggestions at most.
const NAMES_MAX: i64 = 10_000;

const PUBLICATION: &str = "
select pubinsert, pubupdate, pubdelete, pubtruncate, pubviaroot
  from pg_catalog.pg_publication
 where pubname = $1";

const OUTBOX: &str = "
select from pg_catalog.pg_namespace n
  join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = 'outbox'
 where n.nspname = $1";

/// `whole` are the tables, everything below them, and everything that these are partitions of. `carried` says under whose name
/// each comes: `through` is the ancestor under whose name a partition does, `as_leaves` says whether a partitioned table's
/// leaves come under their own.
///
/// `pg_publication_tables` would say the same, but it opens every table of the publication: DDL under way on any of them
/// holds it up, and one that is dropped just then makes it fail. Here no table is locked, but to show its row filter.
const TABLES: &str = "
with recursive {given}, wanted as materialized (
  select c.oid, g.nspname, c.relname, c.relkind, c.relpersistence, c.relreplident, c.relrowsecurity
    from given g
    join pg_catalog.pg_class c on c.relnamespace = g.nspoid and c.relname = g.name
   where c.relkind in ('r', 'p', 'v', 'm', 'f')
), {part}, whole(part, oid, level) as (
  select distinct oid, oid, 0 from part
  union all
  select w.part, i.inhparent, w.level + 1
    from whole w
    join pg_catalog.pg_class c on c.oid = w.oid and c.relispartition
    join pg_catalog.pg_inherits i on i.inhrelid = w.oid
), {carried}
select w.oid, w.nspname::text as schema, w.relname::text as name, w.relkind, w.relpersistence, w.relreplident,
       w.relrowsecurity, coalesce(c.name_of = w.oid, false) as is_published,
       case when c.name_of = w.oid then c.attnames end as attnames,
       case when c.name_of = w.oid then pg_catalog.pg_get_expr(c.qual, w.oid) end as rowfilter,
       case when c.name_of <> w.oid then array[n.nspname::text, a.relname::text] end as through,
       w.oid in (select p.root from part p join carried l on l.oid = p.oid where p.oid <> p.root) as as_leaves
  from wanted w
  left join carried c on c.oid = w.oid
  left join pg_catalog.pg_class a on a.oid = c.name_of
  left join pg_catalog.pg_namespace n on n.oid = a.relnamespace";

/// The names that are asked for, their schemas looked up before anything else: thousands of tables can have one name, a schema
/// each.
pub(super) const GIVEN: &str = "given(nspoid, nspname, name) as materialized (
  select n.oid, n.nspname, g.name
    from rows from (pg_catalog.unnest($1::text[]), pg_catalog.unnest($2::text[])) as g(schema, name)
    join pg_catalog.pg_namespace n on n.nspname = g.schema
)";

/// Each of the wanted tables and everything below it.
pub(super) const PART: &str = "part(root, oid) as (
  select oid, oid from wanted
  union
  select p.root, i.inhrelid
    from part p
    join pg_catalog.pg_inherits i on i.inhparent = p.oid
    join pg_catalog.pg_class c on c.oid = i.inhrelid and c.relispartition
)";

/// As `pg_get_publication_tables` (`src/backend/catalog/pg_publication.c`) has it. A publication of all tables, or of a table's
/// schema, knows no row filter and no column list of that table. Without a list generated columns go only where the publication
/// says so, from Postgres 18 on.
const PUBLISHED: &str = "publication as materialized (
  select p.oid, p.puballtables, p.pubviaroot, pg_catalog.to_jsonb(p) ->> 'pubgencols' = 's' as generated
    from pg_catalog.pg_publication p
   where p.pubname = $3
), entry(oid, attributes, qual) as materialized (
  select c.oid, r.prattrs::int2[], r.prqual
    from (select distinct oid from whole) w
    join pg_catalog.pg_class c on c.oid = w.oid
   cross join publication p
    left join {schemas} s on s.pnpubid = p.oid and s.pnnspid = c.relnamespace
    left join {tables} r on r.prpubid = p.oid and r.prrelid = c.oid and s.pnpubid is null and not p.puballtables
   where r.prrelid is not null
      or (p.puballtables or s.pnpubid is not null)
         and c.relkind in ('r', 'p') and c.relpersistence = 'p' and c.oid >= 16384
), named(oid, name_of) as (
  select w.part, case when p.pubviaroot then (pg_catalog.array_agg(w.oid order by w.level desc))[1] else w.part end
    from whole w
    join entry e on e.oid = w.oid
    join pg_catalog.pg_class c on c.oid = w.part
   cross join publication p
   where p.pubviaroot or c.relkind <> 'p'
   group by w.part, p.pubviaroot
), carried(oid, name_of, attnames, qual) as (
  select n.oid, n.name_of,
         array(select a.attname::text
                 from pg_catalog.pg_attribute a
                where a.attrelid = n.oid and a.attnum > 0 and not a.attisdropped
                  and case when e.attributes is null then a.attgenerated = '' or p.generated and a.attgenerated = 's'
                           else a.attnum = any (e.attributes) end),
         e.qual
    from named n
   cross join publication p
    left join entry e on e.oid = n.oid
)";

/// Where [`PUBLISHED`] finds what publications name, from Postgres 15 on, and before: there were no schemas in them, no row
/// filters and no column lists.
const NAMED: [&str; 2] = ["pg_catalog.pg_publication_namespace", "pg_catalog.pg_publication_rel"];
const NAMED_14: [&str; 2] = [
    "(select null::oid as pnpubid, null::oid as pnnspid)",
    "(select *, null::int2vector as prattrs, null::pg_catalog.pg_node_tree as prqual from pg_catalog.pg_publication_rel)",
];

/// The same of an outbox: what it follows, and which columns of that it stores.
const FOLLOWED: &str = "carried(oid, name_of, attnames, qual) as (
  select distinct on (w.part) w.part, w.oid, t.columns, null::pg_catalog.pg_node_tree
    from whole w
    join {schema}.tables t on t.relid = w.oid and t.is_present and $3::text is not null
   order by w.part, w.level
)";

/// Every column of the tables and of their leaves, and whether it belongs to its table's replica identity: under FULL
/// all do, else the key columns of the index that `RelationGetIndexList` (`src/backend/utils/cache/relcache.c`) takes.
/// A deferrable primary key, for one, is not taken. Before Postgres 18 generated columns are never sent, although
/// `pg_publication_tables` of Postgres 15 to 17 lists them.
const COLUMNS: &str = "
with wanted as (
  select c.oid, c.relreplident
    from pg_catalog.pg_class c
   where c.oid = any ($1::oid[])
), identity as (
  select w.oid, unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) as attnum
    from wanted w
    join pg_catalog.pg_index i on i.indrelid = w.oid
   where i.indisunique and i.indisvalid and i.indimmediate and i.indpred is null
     and (w.relreplident = 'd' and i.indisprimary or w.relreplident = 'i' and i.indisreplident)
)
select a.attrelid as oid, a.attname::text as name, a.atttypid as type_oid, a.atttypmod as type_modifier,
       a.attgenerated <> '' as generated, sendable,
       w.relreplident = 'f' and sendable
         or exists (select from identity i where i.oid = w.oid and i.attnum = a.attnum) as identity
  from wanted w
  join pg_catalog.pg_attribute a on a.attrelid = w.oid
 cross join lateral (
    select a.attgenerated = '' or pg_catalog.current_setting('server_version_num')::int >= 180000
 ) g(sendable)
 where a.attnum > 0 and not a.attisdropped
 order by a.attrelid, a.attnum";

/// The primary key first, then the narrowest.
const UNIQUE_INDEXES: &str = "
select i.indrelid as oid, c.relname::text as name, k.columns, k.not_null
  from pg_catalog.pg_index i
  join pg_catalog.pg_class c on c.oid = i.indexrelid
 cross join lateral (
    select pg_catalog.array_agg(a.attname::text order by k.position) as columns,
           pg_catalog.bool_and(a.attnotnull) as not_null
      from unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) with ordinality k(attnum, position)
      join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
 ) k
 where i.indrelid = any ($1::oid[])
   and i.indisunique and i.indisvalid and i.indisready and i.indislive and i.indimmediate
   and i.indpred is null and i.indexprs is null
 order by i.indrelid, not i.indisprimary, i.indnkeyatts, c.relname";

/// What holds rows that are logged: no foreign table does.
const LEAVES: &str = "
with recursive wanted(oid) as (select pg_catalog.unnest($1::oid[])), {part}
select p.root, c.oid, n.nspname::text as schema, c.relname::text as name, c.relreplident
  from part p
  join pg_catalog.pg_class c on c.oid = p.oid
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
 where c.relkind = 'r' and c.oid <> p.root
 order by p.root, c.oid";

const NAMES: &str = "
select n.nspname::text as schema, c.relname::text as name
  from pg_catalog.pg_class c
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
 where c.relkind in ('r', 'p') and c.relpersistence <> 't'
   and n.nspname not in ('pg_catalog', 'information_schema')
 order by c.relispartition, n.nspname, c.relname
 limit $1";

/// Asks the catalog about what carries changes, and about these tables.
///
/// # Errors
/// [`crate::error::ErrorKind::PostgresAway`] when the connection breaks, and what Postgres refuses.
pub async fn load(client: &Client, carrier: &Carrier, tables: &[TableName]) -> Result<Catalog> {
    read(client, carrier, tables).await.map_err(cannot_read)
}

/// The row filter that a table is published with, as SQL in parentheses.
///
/// # Errors
/// As [`load`].
pub async fn row_filter(client: &Client, carrier: &Carrier, table: &TableName) -> Result<Option<String>> {
    let found = find(client, carrier, std::slice::from_ref(table)).await;
    let filter = found.and_then(|(_, rows)| rows.first().map_or(Ok(None), |row| row.try_get("rowfilter")));
    filter.map_err(cannot_read)
}

fn cannot_read(error: tokio_postgres::Error) -> Error {
    query_error("cannot read the catalog", error)
}

type Answer<T> = std::result::Result<T, tokio_postgres::Error>;

async fn read(client: &Client, carrier: &Carrier, tables: &[TableName]) -> Answer<Catalog> {
    let (publication, found) = find(client, carrier, tables).await?;
    let oids: Vec<Oid> = found.iter().map(|row| row.try_get("oid")).collect::<Answer<_>>()?;
    let below = client.query(&LEAVES.replace("{part}", PART), &[&oids]).await?;
    let below_oids = below.iter().map(|row| row.try_get("oid"));
    let all: Vec<Oid> = oids.iter().copied().map(Ok).chain(below_oids).collect::<Answer<_>>()?;
    let mut columns = columns(client, &all).await?;
    let mut leaves = leaves(&below, &columns)?;
    let mut unique = unique_indexes(client, &oids).await?;
    let mut facts = BTreeMap::new();
    for (row, oid) in found.iter().zip(oids) {
        let table = table(row, carrier, columns.remove(&oid).unwrap_or_default())?;
        let unique = unique.remove(&oid).unwrap_or_default();
        let leaves = leaves.remove(&oid).unwrap_or_default();
        facts.insert(table.name.clone(), TableFacts { unique, leaves, ..table });
    }
    let others = if tables.iter().all(|table| facts.contains_key(table)) {
        Vec::new()
    } else {
        client.query(NAMES, &[&NAMES_MAX]).await?.iter().map(table_name).collect::<Answer<_>>()?
    };
    Ok(Catalog { publication, carrier: carrier.clone(), tables: facts, others })
}

/// What is carried, and these tables as [`TABLES`] has them.
async fn find(client: &Client, carrier: &Carrier, tables: &[TableName]) -> Answer<(Option<Publication>, Vec<Row>)> {
    let schemas: Vec<&str> = tables.iter().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
    let publication = publication(client, carrier).await?;
    let (carried, carrier) = match (carrier, publication) {
        (Carrier::Outbox(schema), Some(_)) => (FOLLOWED.replace("{schema}", &sql_identifier(schema)), schema.as_str()),
        // No publication has the empty name.
        (Carrier::Outbox(_), None) => (listed(client).await?, ""),
        (Carrier::Publication(name), _) => (listed(client).await?, name.as_str()),
    };
    let query = TABLES.replace("{given}", GIVEN).replace("{part}", PART).replace("{carried}", &carried);
    Ok((publication, client.query(&query, &[&schemas, &names, &carrier]).await?))
}

/// [`PUBLISHED`] for this server.
async fn listed(client: &Client) -> Answer<String> {
    let version = client.query_one("select pg_catalog.current_setting('server_version_num')::int4", &[]).await?;
    let [schemas, tables] = if version.try_get::<_, i32>(0)? >= 150_000 { NAMED } else { NAMED_14 };
    Ok(PUBLISHED.replace("{schemas}", schemas).replace("{tables}", tables))
}

/// What is carried; `None` if nothing is. An outbox leaves no operation out.
async fn publication(client: &Client, carrier: &Carrier) -> Answer<Option<Publication>> {
    match carrier {
        Carrier::Publication(name) => {
            client.query_opt(PUBLICATION, &[name]).await?.map(|row| publication_of(&row)).transpose()
        }
        Carrier::Outbox(schema) => {
            let all =
                Publication { insert: true, update: true, delete: true, truncate: true, via_partition_root: true };
            Ok(client.query_opt(OUTBOX, &[schema]).await?.map(|_| all))
        }
    }
}

fn publication_of(row: &Row) -> Answer<Publication> {
    Ok(Publication {
        insert: row.try_get("pubinsert")?,
        update: row.try_get("pubupdate")?,
        delete: row.try_get("pubdelete")?,
        truncate: row.try_get("pubtruncate")?,
        via_partition_root: row.try_get("pubviaroot")?,
    })
}

/// A column of a table, published or not.
struct TableColumn {
    column: Column,
    generated: bool,
    sendable: bool,
}

async fn columns(client: &Client, oids: &[Oid]) -> Answer<HashMap<Oid, Vec<TableColumn>>> {
    let mut found: HashMap<Oid, Vec<TableColumn>> = HashMap::new();
    for row in client.query(COLUMNS, &[&oids]).await? {
        let column = Column {
            name: row.try_get("name")?,
            type_oid: row.try_get("type_oid")?,
            type_modifier: row.try_get("type_modifier")?,
            identity: row.try_get("identity")?,
        };
        let (generated, sendable) = (row.try_get("generated")?, row.try_get("sendable")?);
        found.entry(row.try_get("oid")?).or_default().push(TableColumn { column, generated, sendable });
    }
    Ok(found)
}

async fn unique_indexes(client: &Client, oids: &[Oid]) -> Answer<HashMap<Oid, Vec<UniqueIndex>>> {
    let mut found: HashMap<Oid, Vec<UniqueIndex>> = HashMap::new();
    for row in client.query(UNIQUE_INDEXES, &[&oids]).await? {
        let index = UniqueIndex {
            name: row.try_get("name")?,
            columns: row.try_get("columns")?,
            not_null: row.try_get("not_null")?,
        };
        found.entry(row.try_get("oid")?).or_default().push(index);
    }
    Ok(found)
}

fn leaves(rows: &[Row], columns: &HashMap<Oid, Vec<TableColumn>>) -> Answer<HashMap<Oid, Vec<Leaf>>> {
    let mut found: HashMap<Oid, Vec<Leaf>> = HashMap::new();
    for row in rows {
        let oid = row.try_get("oid")?;
        let identity_columns = columns.get(&oid).map(|own| identity_columns(own)).unwrap_or_default();
        let leaf = Leaf { oid, name: table_name(row)?, identity: identity(row)?, identity_columns };
        found.entry(row.try_get("root")?).or_default().push(leaf);
    }
    Ok(found)
}

/// The table of a row of [`TABLES`]; indexes and leaves are added by the caller.
fn table(row: &Row, carrier: &Carrier, columns: Vec<TableColumn>) -> Answer<TableFacts> {
    let name = table_name(row)?;
    let listed: Option<Vec<String>> = row.try_get("attnames")?;
    let identity_columns = identity_columns(&columns);
    let is_listed = |name: &String| listed.as_ref().is_none_or(|names| names.contains(name));
    let is_published = |column: &TableColumn| column.sendable && is_listed(&column.column.name);
    let (shown, hidden): (Vec<_>, Vec<_>) = columns.into_iter().partition(is_published);
    let identity_columns = match carrier {
        Carrier::Publication(_) => identity_columns,
        // What it does not store keeps nobody from changing rows.
        Carrier::Outbox(_) => self::identity_columns(&shown),
    };
    let hide = |column: TableColumn| HiddenColumn { name: column.column.name, generated: column.generated };
    let relation = Relation {
        oid: row.try_get("oid")?,
        schema: name.schema.clone(),
        name: name.name.clone(),
        identity: match carrier {
            Carrier::Publication(_) => identity(row)?,
            Carrier::Outbox(_) => outbox::identity(identity(row)? == ReplicaIdentity::Full, &identity_columns),
        },
        columns: shown.into_iter().map(|column| column.column).collect(),
    };
    Ok(TableFacts {
        name,
        kind: kind(byte(row, "relkind")?),
        persistence: persistence(byte(row, "relpersistence")?),
        relation,
        hidden: hidden.into_iter().map(hide).collect(),
        unique: Vec::new(),
        identity_columns,
        leaves: Vec::new(),
        published: published(row)?,
        carrier: carrier.clone(),
        row_filter: row.try_get("rowfilter")?,
        row_security: row.try_get("relrowsecurity")?,
    })
}

fn published(row: &Row) -> Answer<Published> {
    let through: Option<Vec<String>> = row.try_get("through")?;
    Ok(match through.as_deref() {
        _ if row.try_get("is_published")? => Published::Directly,
        Some([schema, name]) => Published::Through(TableName { schema: schema.clone(), name: name.clone() }),
        _ if row.try_get("as_leaves")? => Published::AsLeaves,
        _ => Published::No,
    })
}

fn identity_columns(columns: &[TableColumn]) -> Vec<String> {
    columns.iter().filter(|column| column.column.identity).map(|column| column.column.name.clone()).collect()
}

fn table_name(row: &Row) -> Answer<TableName> {
    Ok(TableName { schema: row.try_get("schema")?, name: row.try_get("name")? })
}

/// A value of a later Postgres counts as nothing: so it is refused where it matters.
fn identity(row: &Row) -> Answer<ReplicaIdentity> {
    Ok(ReplicaIdentity::from_catalog(byte(row, "relreplident")?).unwrap_or(ReplicaIdentity::Nothing))
}

/// A value of the type `"char"`.
fn byte(row: &Row, column: &str) -> Answer<u8> {
    Ok(row.try_get::<_, i8>(column)?.cast_unsigned())
}

/// The query asks for no others.
fn kind(byte: u8) -> TableKind {
    match byte {
        b'p' => TableKind::Partitioned,
        b'v' => TableKind::View,
        b'm' => TableKind::MaterializedView,
        b'f' => TableKind::Foreign,
        _ => TableKind::Ordinary,
    }
}

fn persistence(byte: u8) -> Persistence {
    match byte {
        b'u' => Persistence::Unlogged,
        b't' => Persistence::Temporary,
        _ => Persistence::Permanent,
    }
}
