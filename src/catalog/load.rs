//! The queries. Every name in them is qualified, so no `search_path` can redirect them.

use std::collections::{BTreeMap, HashMap};

use tokio_postgres::types::Oid;
use tokio_postgres::{Client, Row};

use super::{
    Carrier, Catalog, HiddenColumn, Leaf, Persistence, Publication, Published, TableFacts, TableKind, UniqueIndex,
    sql_identifier,
};
use crate::config::TableName;
use crate::error::Result;
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

/// `pg_publication_tables` lists what is published under its own name: roots where `publish_via_partition_root` is
/// set, leaves where it is not. Its columns `attnames` and `rowfilter` exist from Postgres 15 on, so they are read
/// through JSON. `through` is the ancestor under whose name a partition is published, `as_leaves` says whether a
/// partitioned table's leaves are published under their own. `listed` is read first: thousands of tables of one name, a schema
/// each, are otherwise joined with each other.
const TABLES: &str = "
with published as ({published})
select c.oid, n.nspname::text as schema, c.relname::text as name, c.relkind, c.relpersistence, c.relreplident,
       c.relrowsecurity, p.oid is not null as is_published,
       case when pg_catalog.jsonb_typeof(p.attnames) = 'array'
            then array(select pg_catalog.jsonb_array_elements_text(p.attnames)) end as attnames,
       p.rowfilter,
       (select array[a.schemaname::text, a.tablename::text]
          from published a
         where c.relispartition and a.oid <> c.oid
           and a.oid in (select relid from pg_catalog.pg_partition_ancestors(c.oid))
         limit 1) as through,
       exists (select from published l
                where c.relkind = 'p' and l.oid <> c.oid
                  and l.oid in (select relid from pg_catalog.pg_partition_tree(c.oid))) as as_leaves
  from rows from (pg_catalog.unnest($1::text[]), pg_catalog.unnest($2::text[])) as wanted(schema, name)
  join pg_catalog.pg_namespace n on n.nspname = wanted.schema
  join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = wanted.name
  left join published p on p.oid = c.oid
 where c.relkind in ('r', 'p', 'v', 'm', 'f')";

const PUBLISHED: &str = "
  with listed as materialized (
    select p.schemaname, p.tablename,
           pg_catalog.to_jsonb(p) -> 'attnames' as attnames,
           pg_catalog.to_jsonb(p) ->> 'rowfilter' as rowfilter
      from pg_catalog.pg_publication_tables p
     where p.pubname = $3
  )
  select c.oid, p.*
    from listed p
    join pg_catalog.pg_namespace n on n.nspname = p.schemaname
    join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = p.tablename";

/// The same of an outbox: what it follows, and which columns of that it stores.
const FOLLOWED: &str = "
  select t.relid as oid, t.schema as schemaname, t.name as tablename, pg_catalog.to_jsonb(t.columns) as attnames,
         null::text as rowfilter
    from {schema}.tables t
   where t.is_present and $3::text is not null";

/// Every column of the tables and of their leaves, and whether it belongs to its table's replica identity: under FULL
/// all do, else the key columns of the index that `RelationGetIndexList` (`src/backend/utils/cache/relcache.c`) takes.
/// A deferrable primary key, for one, is not taken. Before Postgres 18 generated columns are never sent, although
/// `pg_publication_tables` of Postgres 15 to 17 lists them.
const COLUMNS: &str = "
with wanted as (
  select c.oid, c.relreplident
    from pg_catalog.pg_class c
   where c.oid = any ($1::oid[])
      or c.oid in (select t.relid
                     from unnest($1::oid[]) root(oid)
                    cross join lateral pg_catalog.pg_partition_tree(root.oid) t
                    where t.isleaf)
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

const LEAVES: &str = "
select root.oid as root, c.oid, n.nspname::text as schema, c.relname::text as name, c.relreplident
  from unnest($1::oid[]) root(oid)
 cross join lateral pg_catalog.pg_partition_tree(root.oid) t
  join pg_catalog.pg_class c on c.oid = t.relid
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
 where t.isleaf and c.oid <> root.oid
 order by root.oid, n.nspname, c.relname";

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
    read(client, carrier, tables).await.map_err(|error| query_error("cannot read the catalog", error))
}

type Answer<T> = std::result::Result<T, tokio_postgres::Error>;

async fn read(client: &Client, carrier: &Carrier, tables: &[TableName]) -> Answer<Catalog> {
    let schemas: Vec<&str> = tables.iter().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
    let publication = publication(client, carrier).await?;
    let published = match (carrier, publication) {
        (Carrier::Outbox(schema), Some(_)) => FOLLOWED.replace("{schema}", &sql_identifier(schema)),
        // It lists nothing where there is none.
        _ => PUBLISHED.to_owned(),
    };
    // No publication has the empty name.
    let listed_by = if published == PUBLISHED && matches!(carrier, Carrier::Outbox(_)) { "" } else { carrier.name() };
    let found = client.query(&TABLES.replace("{published}", &published), &[&schemas, &names, &listed_by]).await?;
    let oids: Vec<Oid> = found.iter().map(|row| row.try_get("oid")).collect::<Answer<_>>()?;
    let mut columns = columns(client, &oids).await?;
    let mut leaves = leaves(client, &oids, &columns).await?;
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

async fn leaves(
    client: &Client,
    oids: &[Oid],
    columns: &HashMap<Oid, Vec<TableColumn>>,
) -> Answer<HashMap<Oid, Vec<Leaf>>> {
    let mut found: HashMap<Oid, Vec<Leaf>> = HashMap::new();
    for row in client.query(LEAVES, &[&oids]).await? {
        let own = columns.get(&row.try_get("oid")?).map(Vec::as_slice).unwrap_or_default();
        let leaf = Leaf { name: table_name(&row)?, identity: identity(&row)?, identity_columns: identity_columns(own) };
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
