//! What the catalog says of a database whose tables nobody has written rules for yet.

use std::collections::HashMap;
use std::time::Duration;

use tokio_postgres::types::Oid;
use tokio_postgres::{Client, Row};

use crate::catalog::{self, Carrier, Catalog, Publication, Published};
use crate::config::TableName;
use crate::decode::types::Types;
use crate::error::{Error, ErrorKind, Result};
use crate::source::client;
use crate::source::conninfo::ConnInfo;
use crate::source::query_error;
use crate::suggest::nearest;

/// No query may take longer.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);
/// No file of more rules is of use to anybody.
const TABLES_MAX: usize = 2_000;

/// Tables, views and what else can be read from, without partitions and without what belongs to an extension. Estimate
/// and TOAST of a partitioned table are those of its leaves.
const TABLES: &str = "
select c.oid, n.nspname::text as schema, c.relname::text as name, c.relkind, rows, toast_bytes
  from pg_catalog.pg_class c
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
 cross join lateral (
    select (sum(l.reltuples) filter (where l.reltuples >= 0))::float8,
           coalesce(sum(pg_catalog.pg_relation_size(nullif(l.reltoastrelid, 0))), 0)::int8
      from pg_catalog.pg_class l
     where l.oid = c.oid and c.relkind = 'r'
        or l.oid in (select relid from pg_catalog.pg_partition_tree(c.oid) where isleaf)
 ) l(rows, toast_bytes)
 where n.nspname = any ($1::text[])
   and c.relkind in ('r', 'p', 'v', 'm', 'f') and c.relpersistence <> 't' and not c.relispartition
   and not exists (select from pg_catalog.pg_depend d
                    where d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass and d.objid = c.oid and d.deptype = 'e')
 order by pg_catalog.array_position($1::text[], n.nspname::text), c.relname";

const COLUMNS: &str = "
select a.attrelid as oid, a.attname::text as name, pg_catalog.format_type(a.atttypid, a.atttypmod) as type,
       a.attgenerated <> '' as generated
  from pg_catalog.pg_attribute a
 where a.attrelid = any ($1) and a.attnum > 0 and not a.attisdropped
 order by a.attrelid, a.attnum";

/// Those that a foreign key to a partitioned table has for each partition are left out.
const REFERENCES: &str = "
select k.conrelid as oid, n.nspname::text as schema, c.relname::text as name,
       array(select a.attname::text
               from unnest(k.conkey) with ordinality u(attnum, position)
               join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and a.attnum = u.attnum
              order by u.position) as columns
  from pg_catalog.pg_constraint k
  join pg_catalog.pg_class c on c.oid = k.confrelid
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
 where k.conrelid = any ($1) and k.contype = 'f' and k.conparentid = 0
 order by k.conrelid, k.conkey";

const SCHEMAS: &str = "
select nspname::text from pg_catalog.pg_namespace
 where nspname <> 'information_schema' and nspname not like 'pg\\_%' order by nspname";

/// The database, as far as rules are about it.
#[derive(Debug)]
pub(super) struct Survey {
    pub(super) database: String,
    /// In the order of the schemas asked for.
    pub(super) tables: Vec<Table>,
    /// What has no changes of its own, and what it is.
    pub(super) unfollowed: Vec<(TableName, &'static str)>,
    /// The tables as they will be once `keepstep setup` has published them.
    pub(super) catalog: Catalog,
    pub(super) types: Types,
}

/// A table that has rows of its own, or the root of one that is partitioned.
#[derive(Clone, Debug)]
pub(super) struct Table {
    pub(super) name: TableName,
    /// An estimate; `None` for one that was never analyzed.
    pub(super) rows: Option<f64>,
    /// How many bytes of its values lie out of line.
    pub(super) toast_bytes: u64,
    pub(super) columns: Vec<Column>,
    pub(super) references: Vec<Reference>,
}

#[derive(Clone, Debug)]
pub(super) struct Column {
    pub(super) name: String,
    /// As Postgres writes it: `character varying(10)`.
    pub(super) type_name: String,
    pub(super) generated: bool,
}

/// A foreign key.
#[derive(Clone, Debug)]
pub(super) struct Reference {
    pub(super) columns: Vec<String>,
    pub(super) to: TableName,
}

/// Looks at the schemas of a database; changes nothing.
pub(super) async fn survey(info: &ConnInfo, schemas: &[String]) -> Result<Survey> {
    let client = client::connect(info, STATEMENT_TIMEOUT).await?;
    let found = rows(&client, TABLES, schemas).await?;
    if found.is_empty() {
        return Err(nothing_there(&client, schemas).await?);
    }
    if found.len() > TABLES_MAX {
        let message = format!("there are {} tables, more than {TABLES_MAX}", found.len());
        return Err(Error::new(ErrorKind::Usage, message).hint("name fewer schemas"));
    }
    let (followed, others): (Vec<&Row>, Vec<&Row>) =
        found.iter().partition(|row| matches!(row.get::<_, i8>("relkind").cast_unsigned(), b'r' | b'p'));
    let tables = tables(&client, &followed).await?;
    let names: Vec<TableName> = tables.iter().map(|table| table.name.clone()).collect();
    let catalog =
        as_published(catalog::load(&client, &Carrier::Publication(NOBODYS_PUBLICATION.to_owned()), &names).await?);
    let types = Types::load(&client, &catalog.type_oids()).await?;
    let database = client.query_one("select pg_catalog.current_database()::text", &[]).await;
    let database = database.map_err(|error| query_error("cannot ask for the database's name", error))?.get(0);
    let unfollowed = others.into_iter().map(|row| (table_name(row), kind(row))).collect();
    Ok(Survey { database, tables, unfollowed, catalog, types })
}

/// No publication can have this name, so no column is hidden by one.
const NOBODYS_PUBLICATION: &str = "";

/// The catalog as `keepstep setup` leaves it.
fn as_published(mut catalog: Catalog) -> Catalog {
    catalog.publication =
        Some(Publication { insert: true, update: true, delete: true, truncate: true, via_partition_root: true });
    catalog.tables.values_mut().for_each(|table| table.published = Published::Directly);
    catalog
}

async fn rows<T: tokio_postgres::types::ToSql + Sync>(client: &Client, query: &str, of: &[T]) -> Result<Vec<Row>> {
    client.query(query, &[&of]).await.map_err(|error| query_error("cannot read the catalog", error))
}

async fn nothing_there(client: &Client, schemas: &[String]) -> Result<Error> {
    let others = client.query(SCHEMAS, &[]).await.map_err(|error| query_error("cannot read the catalog", error))?;
    let others: Vec<String> = others.iter().map(|row| row.get(0)).collect();
    let near = schemas.iter().find_map(|schema| nearest(schema, others.iter().map(String::as_str)));
    let error = Error::new(ErrorKind::Usage, format!("there is no table in schema {}", schemas.join(", ")));
    Ok(match near.filter(|near| !schemas.iter().any(|schema| schema == near)) {
        Some(near) => error.hint(format!("did you mean --schema {near}?")),
        None => error.hint(format!("name another one with --schema: {}", others.join(", "))),
    })
}

async fn tables(client: &Client, found: &[&Row]) -> Result<Vec<Table>> {
    let oids: Vec<Oid> = found.iter().map(|row| row.get("oid")).collect();
    let mut columns: HashMap<Oid, Vec<Column>> = HashMap::new();
    for row in rows(client, COLUMNS, &oids).await? {
        columns.entry(row.get("oid")).or_default().push(Column {
            name: row.get("name"),
            type_name: row.get("type"),
            generated: row.get("generated"),
        });
    }
    let mut references: HashMap<Oid, Vec<Reference>> = HashMap::new();
    for row in rows(client, REFERENCES, &oids).await? {
        let reference = Reference { columns: row.get("columns"), to: table_name(&row) };
        references.entry(row.get("oid")).or_default().push(reference);
    }
    let table = |(row, oid): (&&Row, Oid)| Table {
        name: table_name(row),
        rows: row.get("rows"),
        toast_bytes: row.get::<_, i64>("toast_bytes").cast_unsigned(),
        columns: columns.remove(&oid).unwrap_or_default(),
        references: references.remove(&oid).unwrap_or_default(),
    };
    Ok(found.iter().zip(oids).map(table).collect())
}

fn table_name(row: &Row) -> TableName {
    TableName { schema: row.get("schema"), name: row.get("name") }
}

/// What it is that has no changes of its own.
fn kind(row: &Row) -> &'static str {
    match row.get::<_, i8>("relkind").cast_unsigned() {
        b'v' => "view",
        b'm' => "materialized view",
        _ => "foreign table",
    }
}
