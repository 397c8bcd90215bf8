//! What is there, read from the catalog in four queries.

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};

use super::Wanted;
use crate::error::{Error, Result};
use crate::source::query_error;
use crate::source::slot::{SlotState, slot_state};

/// What is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) server: Server,
    pub(super) role: Role,
    pub(super) publication: Option<Publication>,
    pub(super) slot: Option<SlotState>,
    pub(super) tables: Vec<Table>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Server {
    pub(super) version: i32,
    pub(super) database: String,
    pub(super) in_recovery: bool,
    pub(super) wal_level: String,
    pub(super) slots: i64,
    pub(super) slots_max: i64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Role {
    pub(super) name: String,
    pub(super) may_replicate: bool,
    pub(super) may_create_publication: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Publication {
    pub(super) owned: bool,
    pub(super) via_root: bool,
    /// Whether it publishes INSERT, UPDATE, DELETE and TRUNCATE.
    pub(super) all_operations: bool,
    pub(super) comment: String,
    /// The tables that it names, as SQL.
    pub(super) names: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table {
    /// As SQL.
    pub(super) name: String,
    /// `pg_class.relkind`; `None` if there is no such table.
    pub(super) kind: Option<char>,
    pub(super) unlogged: bool,
    pub(super) owned: bool,
    pub(super) has_children: bool,
    pub(super) published: bool,
    /// Itself or its leaves, where no replica identity can be used.
    pub(super) unidentified: Vec<Unidentified>,
}

/// A table whose UPDATE and DELETE would fail once it is published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unidentified {
    /// As SQL.
    pub(super) name: String,
    /// What ALTER TABLE … REPLICA IDENTITY could be told, other than FULL.
    pub(super) remedy: Option<String>,
}

/// Reads what is there.
///
/// # Errors
/// [`ErrorKind::PostgresAway`] when the connection breaks.
pub(super) async fn read(client: &Client, wanted: &Wanted) -> Result<Facts> {
    let (server, role) = server_and_role(client).await?;
    Ok(Facts {
        server,
        role,
        publication: publication(client, &wanted.publication).await?,
        slot: slot_state(client, &wanted.slot).await?,
        tables: tables(client, wanted).await?,
    })
}

const DOING: &str = "cannot read the catalog";

fn failed(error: tokio_postgres::Error) -> Error {
    query_error(DOING, error)
}

async fn server_and_role(client: &Client) -> Result<(Server, Role)> {
    let sql = "
        select current_setting('server_version_num')::int4, current_database()::text, pg_is_in_recovery(),
               current_setting('wal_level'), (select count(*) from pg_replication_slots),
               current_setting('max_replication_slots')::int8, current_user::text,
               rolsuper or rolreplication
                 or exists (select from pg_roles managed where managed.rolname = 'rds_replication'
                            and pg_has_role(managed.oid, 'usage')),
               has_database_privilege(current_database(), 'create')
        from pg_roles where rolname = current_user";
    let row = client.query_typed_one(sql, &[]).await.map_err(failed)?;
    let read = || {
        let server = Server {
            version: row.try_get(0)?,
            database: row.try_get(1)?,
            in_recovery: row.try_get(2)?,
            wal_level: row.try_get(3)?,
            slots: row.try_get(4)?,
            slots_max: row.try_get(5)?,
        };
        let role =
            Role { name: row.try_get(6)?, may_replicate: row.try_get(7)?, may_create_publication: row.try_get(8)? };
        Ok((server, role))
    };
    read().map_err(failed)
}

async fn publication(client: &Client, name: &str) -> Result<Option<Publication>> {
    let sql = "
        select pg_has_role(pubowner, 'usage'), pubviaroot, pubinsert and pubupdate and pubdelete and pubtruncate,
               coalesce(obj_description(publication.oid, 'pg_publication'), ''),
               array(select format('%I.%I', nspname, relname) from pg_publication_rel
                     join pg_class c on c.oid = prrelid join pg_namespace n on n.oid = relnamespace
                     where prpubid = publication.oid)
        from pg_publication publication where pubname = $1::text";
    let row = client.query_typed_opt(sql, &[(&name, Type::TEXT)]).await.map_err(failed)?;
    let read = |row: Row| {
        Ok(Publication {
            owned: row.try_get(0)?,
            via_root: row.try_get(1)?,
            all_operations: row.try_get(2)?,
            comment: row.try_get(3)?,
            names: row.try_get(4)?,
        })
    };
    row.map(read).transpose().map_err(failed)
}

/// The wanted tables in their order. A partitioned table's replica identities are those of its leaves
/// (`CheckCmdReplicaIdentity` in src/backend/executor/execReplication.c looks at the table that holds the row).
async fn tables(client: &Client, wanted: &Wanted) -> Result<Vec<Table>> {
    let sql = "
        with wanted as (
            select place, format('%I.%I', schema, name) as name, c.oid, c.relkind, c.relpersistence, c.relowner,
                   c.relhassubclass
            from unnest($1::text[], $2::text[]) with ordinality as given(schema, name, place)
            left join pg_namespace n on n.nspname = given.schema
            left join pg_class c on c.relnamespace = n.oid and c.relname = given.name
        ), leaf as (
            select place, l.oid, l.relreplident, format('%I.%I', n.nspname, l.relname) as name from wanted
            cross join lateral (select wanted.oid where wanted.relkind = 'r'
                                union select relid from pg_partition_tree(wanted.oid) where isleaf) as tree(oid)
            join pg_class l on l.oid = tree.oid join pg_namespace n on n.oid = l.relnamespace
        ), identity as (
            select i.*, not exists (select from unnest(i.indkey) as key(attnum) left join pg_attribute a
                                    on a.attrelid = i.indrelid and a.attnum = key.attnum
                                    where not coalesce(a.attnotnull, false)) as not_null
            from pg_index i where i.indisunique and i.indisvalid and i.indimmediate and i.indpred is null
        ), unidentified as (
            select place, name,
                   (select case when indisprimary then 'DEFAULT'
                           else 'USING INDEX ' || quote_ident((select relname from pg_class where oid = indexrelid)) end
                    from identity where indrelid = leaf.oid and not_null
                    order by not indisprimary, indexrelid limit 1) as remedy
            from leaf where not case relreplident
                when 'f' then true
                when 'd' then exists (select from identity where indrelid = leaf.oid and indisprimary)
                when 'i' then exists (select from identity where indrelid = leaf.oid and indisreplident)
                else false end
        ), published as (
            select relid from pg_publication p, pg_get_publication_tables(p.pubname) where p.pubname = $3::text
            union
            select prrelid from pg_publication p join pg_publication_rel on prpubid = p.oid where p.pubname = $3::text
        )
        select w.name, w.relkind::text, coalesce(w.relpersistence <> 'p', false),
               coalesce(pg_has_role(w.relowner, 'usage'), true),
               coalesce(w.relhassubclass and w.relkind = 'r', false),
               exists (select from published
                       where relid = w.oid or relid in (select l.oid from leaf l where l.place = w.place)),
               array(select u.name from unidentified u where u.place = w.place order by u.name),
               array(select u.remedy from unidentified u where u.place = w.place order by u.name)
        from wanted w order by place";
    let schemas: Vec<&str> = wanted.tables.iter().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = wanted.tables.iter().map(|table| table.name.as_str()).collect();
    let parameters: [(&(dyn ToSql + Sync), Type); 3] =
        [(&schemas, Type::TEXT_ARRAY), (&names, Type::TEXT_ARRAY), (&wanted.publication, Type::TEXT)];
    let rows = client.query_typed(sql, &parameters).await.map_err(failed)?;
    rows.iter().map(read_table).collect::<Result<_, _>>().map_err(failed)
}

fn read_table(row: &Row) -> Result<Table, tokio_postgres::Error> {
    let unidentified: Vec<String> = row.try_get(6)?;
    let remedies: Vec<Option<String>> = row.try_get(7)?;
    let unidentified = unidentified.into_iter().zip(remedies).map(|(name, remedy)| Unidentified { name, remedy });
    Ok(Table {
        name: row.try_get(0)?,
        kind: row.try_get::<_, Option<&str>>(1)?.and_then(|kind| kind.chars().next()),
        unlogged: row.try_get(2)?,
        owned: row.try_get(3)?,
        has_children: row.try_get(4)?,
        published: row.try_get(5)?,
        unidentified: unidentified.collect(),
    })
}
