//! What the catalog says of the tables that the rules name.
//!
//! The stream describes a table only when it changes, and says nothing of unique indexes, partitions or what the
//! publication leaves out. So at start, and in `check --connect`, the catalog is asked: a few queries whatever the
//! number of rules, on Postgres 14 and later. From the answers come a [`Relation`] as the stream would send it, and
//! [`TableFacts`], which say whether a rule can keep its keys right (see [`crate::rules::bind`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::config::{PostgresConfig, Source, TableName};
use crate::model::{Relation, ReplicaIdentity};

mod check;
mod load;
mod matching;
pub mod signature;

pub use check::{Checked, check_rules};
pub use load::{load, row_filter};
pub use matching::{RULES_MAX, with_other_tables, with_tables};

/// What carries changes out of the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// A publication, by its name.
    Publication(String),
    /// An outbox, by its schema.
    Outbox(String),
}

impl Carrier {
    /// As the rules file says.
    pub fn of(config: &PostgresConfig) -> Self {
        match config.source {
            Source::Replication => Carrier::Publication(config.publication.clone()),
            Source::Outbox(_) => Carrier::Outbox(config.slot.clone()),
        }
    }

    /// What is read of it: where it stands is what a checkpoint is about.
    pub fn stream(config: &PostgresConfig) -> String {
        match config.source {
            Source::Replication => format!("replication slot `{}`", config.slot),
            Source::Outbox(_) => format!("outbox `{}`", config.slot),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Carrier::Publication(name) | Carrier::Outbox(name) => name,
        }
    }
}

impl fmt::Display for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Carrier::Publication(name) => write!(f, "publication `{name}`"),
            Carrier::Outbox(name) => write!(f, "outbox `{name}`"),
        }
    }
}

/// The publication and the tables, as the catalog has them at one moment.
#[derive(Clone, Debug)]
pub struct Catalog {
    /// The publication; `None` while it does not exist.
    pub publication: Option<Publication>,
    /// What it is, or stands in for it.
    pub carrier: Carrier,
    /// The tables that exist, of those asked for.
    pub tables: BTreeMap<TableName, TableFacts>,
    /// Every table of the database, for suggestions; filled only if one asked for does not exist.
    pub others: Vec<TableName>,
}

impl Catalog {
    /// The OIDs of all column types, each once, for [`crate::decode::types::Types::load`].
    pub fn type_oids(&self) -> Vec<u32> {
        let columns = self.tables.values().flat_map(|table| &table.relation.columns);
        let oids: BTreeSet<u32> = columns.map(|column| column.type_oid).collect();
        oids.into_iter().collect()
    }
}

/// `pg_publication`: which operations are published, and how partitions are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Publication {
    pub insert: bool,
    pub update: bool,
    pub delete: bool,
    pub truncate: bool,
    /// `publish_via_partition_root`: changes of partitions come under the name of their root.
    pub via_partition_root: bool,
}

/// What the catalog says of a table.
#[derive(Clone, Debug)]
pub struct TableFacts {
    /// Its name.
    pub name: TableName,
    /// What it is.
    pub kind: TableKind,
    /// Whether its rows are in the log.
    pub persistence: Persistence,
    /// The relation as the stream would describe it: published columns only.
    pub relation: Relation,
    /// Its columns that are not published.
    pub hidden: Vec<HiddenColumn>,
    /// Its unique indexes that no two rows can ever break: valid, not deferrable, not partial, on plain columns.
    pub unique: Vec<UniqueIndex>,
    /// The columns of its replica identity, published or not; every one under FULL. (A generated column counts from
    /// Postgres 18 on, where it can be published.)
    pub identity_columns: Vec<String>,
    /// Its partitions that hold rows, however deep they lie, by their OIDs.
    pub leaves: Vec<Leaf>,
    /// How its changes are published.
    pub published: Published,
    /// What does, or should.
    pub carrier: Carrier,
    /// The row filter it is published with, as SQL in parentheses.
    pub row_filter: Option<String>,
    /// Whether row security is enabled: what a read sees may be smaller than the table.
    pub row_security: bool,
}

impl TableFacts {
    /// The columns of the replica identity that are not published: with one of these Postgres refuses every UPDATE
    /// and DELETE of the table (`CheckCmdReplicaIdentity` in `src/backend/executor/execReplication.c`).
    pub fn hidden_identity(&self) -> Vec<String> {
        let is_hidden = |name: &&String| self.relation.column(name).is_none();
        self.identity_columns.iter().filter(is_hidden).cloned().collect()
    }

    /// The leaves whose old tuples hold less than their root says.
    ///
    /// With `publish_via_partition_root` the stream describes old tuples by the root's replica identity, but the log
    /// holds what the leaf's says (`logicalrep_write_update` in `src/backend/replication/logical/proto.c` gets the
    /// root, `ExtractReplicaIdentity` in `src/backend/access/heap/heapam.c` the leaf). A NULL would then stand for "not
    /// logged" in a tuple that claims to be whole.
    pub fn weak_leaves(&self) -> impl Iterator<Item = &Leaf> {
        let is_weak = |leaf: &&Leaf| match self.relation.identity {
            _ if leaf.identity == ReplicaIdentity::Full => false,
            ReplicaIdentity::Full => true,
            _ => !self.identity_columns.iter().all(|column| leaf.identity_columns.contains(column)),
        };
        self.leaves.iter().filter(is_weak)
    }
}

/// `pg_class.relkind`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableKind {
    /// An ordinary table, a partition among them.
    Ordinary,
    /// A partitioned table.
    Partitioned,
    /// A view.
    View,
    /// A materialized view.
    MaterializedView,
    /// A foreign table.
    Foreign,
}

/// `pg_class.relpersistence`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persistence {
    /// In the log.
    Permanent,
    /// `UNLOGGED`
    Unlogged,
    /// `TEMPORARY`
    Temporary,
}

/// How a table's changes are published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Published {
    /// Under its own name.
    Directly,
    /// Under the name of the partitioned table that it is a part of.
    Through(TableName),
    /// Under the names of its leaves.
    AsLeaves,
    /// Not at all.
    No,
}

/// A column that the publication leaves out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HiddenColumn {
    /// Its name.
    pub name: String,
    /// Whether it is a generated column.
    pub generated: bool,
}

/// A unique index that holds for all rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UniqueIndex {
    /// Its name.
    pub name: String,
    /// Its key columns, in order.
    pub columns: Vec<String>,
    /// Whether all of them are NOT NULL, so that it can serve as replica identity.
    pub not_null: bool,
}

/// A partition that holds rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Its OID.
    pub oid: u32,
    /// Its name.
    pub name: TableName,
    /// Its own replica identity.
    pub identity: ReplicaIdentity,
    /// The columns of it; every one under FULL.
    pub identity_columns: Vec<String>,
}

/// An identifier as SQL wants it written where a column or a relation's last name may stand: quoted unless it is plain.
///
/// Key words are quoted by the caller's choice of place: behind a dot Postgres takes them as they are (`ColLabel` in
/// `src/backend/parser/gram.y`).
pub fn sql_identifier(name: &str) -> String {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let starts = name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_');
    if starts && name.chars().all(plain) { name.to_owned() } else { format!("\"{}\"", name.replace('"', "\"\"")) }
}

/// A table's name as SQL wants it written.
pub fn sql_table(table: &TableName) -> String {
    format!("{}.{}", sql_identifier(&table.schema), sql_identifier(&table.name))
}
