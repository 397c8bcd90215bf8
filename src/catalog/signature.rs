//! What the stream does not carry: a digest over each table's place in the catalog, to be compared from time to time.
//!
//! Rows come and go, and take other values, without any row change being sent: TRUNCATE, DETACH, DROP and ATTACH of a
//! partition, a rewriting ALTER TABLE, a column added with a default, tables that swap names, SET UNLOGGED, an edit of
//! the publication. Each leaves a trace in what is digested here: the table behind the name, its partitions and their
//! files, columns, persistence, replica identity, and how the publication carries them. So does VACUUM FULL, which
//! changes no row: the files alone do not tell it from a rewrite.
//!
//! One query that takes no lock on any table, so that no DDL under way holds it up.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use super::load::{GIVEN, PART};
use super::{Carrier, sql_identifier, sql_table};
use crate::config::{Operations, TableName};
use crate::error::Result;
use crate::source::query_error;

/// A digest for each table, as stored beside the checkpoint: an object of names and hashes, null for a table that does
/// not exist.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Signatures(BTreeMap<String, Option<String>>);

impl Signatures {
    /// As stored in Redis.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a map of strings")
    }

    /// From what Redis holds; `None` if it is something else.
    pub fn decode(stored: &[u8]) -> Option<Self> {
        serde_json::from_slice(stored).ok()
    }

    /// Whether the table is not what it was. Of a table that was not asked for before, nothing is known.
    pub fn differs(&self, before: &Signatures, table: &TableName) -> bool {
        let name = sql_table(table);
        before.0.get(&name).is_some_and(|then| self.0.get(&name) != Some(then))
    }
}

/// What one look at the catalog has found.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// To compare with the next one.
    pub signatures: Signatures,
    /// The operations on each table that the publication carries; a table that it does not name, or that does not
    /// exist, is not among them.
    pub carried: BTreeMap<TableName, Operations>,
}

const PUBLICATION: &str = "
  select oid, pubinsert, pubupdate, pubdelete, pubtruncate, pubviaroot from pg_catalog.pg_publication where pubname = $3";

const PUBLISHED: &str = "
  select w.root, p.oid, r.oid, pg_catalog.to_jsonb(r)::text
    from whole w
    join pg_catalog.pg_publication_rel r on r.prrelid = w.oid
    join pg_catalog.pg_publication p on p.oid = r.prpubid and p.pubname = $3
  union all
  select w.oid, p.oid, null, null from wanted w, pg_catalog.pg_publication p where p.pubname = $3 and p.puballtables";

/// An outbox leaves no operation out.
const OUTBOX: &str = "
  select 0::oid, true, true, true, true, true where $3::text is not null";

/// What an outbox stores of a table, by triggers of which none may be missing or disabled. One that was so for a moment has
/// another `xmin`.
const FOLLOWED: &str = "
  select w.oid, null::oid, null::oid, pg_catalog.concat_ws(' ', pg_catalog.to_jsonb(t), triggers.facts)
    from wanted w
    join {schema}.tables t on t.relid = w.oid and t.is_present
   cross join lateral (
      select pg_catalog.string_agg(pg_catalog.concat_ws(' ', g.tgrelid, g.oid, g.xmin), ',' order by g.oid) as facts,
             pg_catalog.bool_and(k.is_there) as are_there
        from {schema}.triggers_of(w.oid, t.by_row) k
        left join pg_catalog.pg_trigger g on g.tgrelid = k.relation and g.tgname = k.name
   ) triggers
   where triggers.are_there";

/// `pg_publication_namespace` exists from Postgres 15 on. Its rows are counted by OID: a schema that was taken out and
/// put back has another.
const SCHEMAS_PUBLISHED: &str = "
  union all
  select w.root, p.oid, s.oid, null
    from whole w
    join pg_catalog.pg_class c on c.oid = w.oid
    join pg_catalog.pg_publication_namespace s on s.pnnspid = c.relnamespace
    join pg_catalog.pg_publication p on p.oid = s.pnpubid and p.pubname = $3";

/// `part` are the table and everything below it, `whole` the table and everything that it is a partition of.
const QUERY: &str = "
with recursive {given}, wanted as (
  select g.nspname as schema, c.relname as name, c.oid, c.relpersistence = 'p' as logged
    from given g
    join pg_catalog.pg_class c on c.relnamespace = g.nspoid and c.relname = g.name
), {part}, whole(root, oid) as (
  select oid, oid from wanted
  union
  select w.root, i.inhparent
    from whole w
    join pg_catalog.pg_class c on c.oid = w.oid and c.relispartition
    join pg_catalog.pg_inherits i on i.inhrelid = w.oid
), publication(oid, pubinsert, pubupdate, pubdelete, pubtruncate, pubviaroot) as ({publication}
), published(root, publication, entry, contents) as ({published}
), fact(root, line) as (
  select p.root, pg_catalog.concat_ws(' ', 'part', c.oid, c.relfilenode, c.relkind, c.relpersistence, c.relreplident)
    from part p
    join pg_catalog.pg_class c on c.oid = p.oid
  union all
  select w.oid, pg_catalog.concat_ws(' ', 'column', a.attnum, a.attname, a.atttypid, a.atttypmod, a.attisdropped)
    from wanted w
    join pg_catalog.pg_attribute a on a.attrelid = w.oid
   where a.attnum > 0
  union all
  select p.root, pg_catalog.concat_ws(' ', 'identity', p.oid, i.indkey)
    from part p
    join pg_catalog.pg_class c on c.oid = p.oid
    join pg_catalog.pg_index i on i.indrelid = p.oid
   where c.relreplident = 'd' and i.indisprimary or c.relreplident = 'i' and i.indisreplident
  union all
  select w.oid, pg_catalog.concat_ws(' ', 'publication', p.oid, p.pubinsert, p.pubupdate, p.pubdelete, p.pubtruncate,
                                     p.pubviaroot)
    from wanted w, publication p
  union all
  select root, pg_catalog.concat_ws(' ', 'published', publication, entry, contents) from published
)
select w.schema::text, w.name::text,
       pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to(
         pg_catalog.string_agg(f.line, E'\\n' order by f.line collate \"C\"), 'UTF8')), 'hex') as digest,
       w.logged and w.oid in (select root from published) as published,
       p.pubinsert, p.pubupdate, p.pubdelete and p.pubtruncate as pubdelete
  from wanted w
  join fact f on f.root = w.oid
  left join publication p on true
 group by w.schema, w.name, w.oid, w.logged, p.pubinsert, p.pubupdate, p.pubdelete, p.pubtruncate";

/// Looks at these tables and how their changes are carried.
///
/// # Errors
/// [`crate::error::ErrorKind::PostgresAway`] when the connection breaks.
pub async fn look(client: &Client, carrier: &Carrier, tables: &[TableName]) -> Result<Look> {
    read(client, carrier, tables).await.map_err(|error| query_error("cannot look at the catalog", error))
}

async fn read(client: &Client, carrier: &Carrier, tables: &[TableName]) -> Result<Look, tokio_postgres::Error> {
    let version = client.query_one("select pg_catalog.current_setting('server_version_num')::int4", &[]).await?;
    let schemas_published = if version.try_get::<_, i32>(0)? >= 150_000 { SCHEMAS_PUBLISHED } else { "" };
    let (publication, published) = match carrier {
        Carrier::Publication(_) => (PUBLICATION, format!("{PUBLISHED}{schemas_published}")),
        Carrier::Outbox(schema) => (OUTBOX, FOLLOWED.replace("{schema}", &sql_identifier(schema))),
    };
    let query = QUERY
        .replace("{given}", GIVEN)
        .replace("{part}", PART)
        .replace("{publication}", publication)
        .replace("{published}", &published);
    let schemas: Vec<&str> = tables.iter().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
    let mut look = Look::default();
    look.signatures.0.extend(tables.iter().map(|table| (sql_table(table), None)));
    for row in client.query(&query, &[&schemas, &names, &carrier.name()]).await? {
        let table = TableName { schema: row.try_get("schema")?, name: row.try_get("name")? };
        look.signatures.0.insert(sql_table(&table), Some(row.try_get("digest")?));
        if row.try_get("published")? {
            let operations = Operations {
                insert: row.try_get("pubinsert")?,
                update: row.try_get("pubupdate")?,
                delete: row.try_get("pubdelete")?,
            };
            look.carried.insert(table, operations);
        }
    }
    Ok(look)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(name: &str) -> TableName {
        TableName { schema: "public".into(), name: name.into() }
    }

    #[test]
    fn a_table_differs_from_what_it_was_and_only_then() {
        let of = |stored: &str| Signatures::decode(stored.as_bytes()).expect("signatures");
        let before = of(r#"{"public.same":"1","public.other":"1","public.gone":"1","public.back":null}"#);
        let now = of(r#"{"public.same":"1","public.other":"2","public.gone":null,"public.back":"1","public.new":"1"}"#);
        let differing = ["same", "other", "gone", "back", "new"].map(|name| now.differs(&before, &table(name)));
        assert_eq!(differing, [false, true, true, true, false]);
        assert_eq!(Signatures::decode(&now.encode()), Some(now));
        assert_eq!(Signatures::decode(b"[]"), None);
    }
}
