//! The words the whole program speaks: log positions, relations, tuples, changes and events.
//!
//! A change borrows from the frame it was received in; nothing here owns row data. What outlives a frame is
//! written into a [`crate::batch::Batch`].

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use snapshot::{InvalidSnapshot, Snapshot};

mod snapshot;

/// A position in Postgres's write-ahead log, in bytes (`pg_lsn`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

/// The text is not of the form `16/B374D848`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a log position of the form 16/B374D848")]
pub struct InvalidLsn(String);

impl FromStr for Lsn {
    type Err = InvalidLsn;

    fn from_str(text: &str) -> Result<Self, InvalidLsn> {
        let parse = || {
            let (high, low) = text.split_once('/')?;
            let part = |digits| u32::from_str_radix(digits, 16).ok().map(u64::from);
            Some(Lsn(part(high)? << 32 | part(low)?))
        };
        parse().ok_or_else(|| InvalidLsn(text.to_owned()))
    }
}

impl Serialize for Lsn {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// How far the stream of row changes has come, finer than a commit.
///
/// Inside a transaction it is (commit LSN, ordinal of the last change, from 1); behind a whole transaction it is
/// (end LSN, 0). The order is the order of the stream: a change is behind `applied` exactly if its position is
/// not greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    /// The commit LSN of a transaction under way, or the end LSN of a whole one.
    pub lsn: Lsn,
    /// The row changes of that transaction, as received and counted from 1.
    pub ordinal: u64,
}

impl Position {
    /// The position behind everything that committed before `lsn`.
    pub fn end(lsn: Lsn) -> Self {
        Position { lsn, ordinal: 0 }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ordinal {
            0 => write!(f, "{}", self.lsn),
            ordinal => write!(f, "{}#{ordinal}", self.lsn),
        }
    }
}

/// A transaction id as pgoutput sends it: 32 bits, without its epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Xid(pub u32);

/// A Postgres `timestamptz`: microseconds since 2000-01-01 00:00 UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// Seconds between the Unix epoch and Postgres's.
    const POSTGRES_EPOCH_UNIX_S: i64 = 946_684_800;

    /// So many microseconds after 1970-01-01 00:00 UTC.
    pub fn from_unix_us(unix_us: u64) -> Self {
        Timestamp(i64::try_from(unix_us).unwrap_or(i64::MAX).saturating_sub(Self::POSTGRES_EPOCH_UNIX_S * 1_000_000))
    }

    /// Microseconds since 1970-01-01 00:00 UTC.
    pub fn unix_us(self) -> i64 {
        self.0.saturating_add(Self::POSTGRES_EPOCH_UNIX_S * 1_000_000)
    }
}

/// What `ALTER TABLE … REPLICA IDENTITY` says: which old columns an UPDATE or DELETE carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaIdentity {
    /// The primary key, if there is one (`d`).
    Default,
    /// Nothing (`n`).
    Nothing,
    /// The whole old row (`f`).
    Full,
    /// The columns of one unique index (`i`).
    Index,
}

impl ReplicaIdentity {
    /// From `pg_class.relreplident`, the byte that Relation messages carry too.
    pub fn from_catalog(byte: u8) -> Option<Self> {
        Some(match byte {
            b'd' => Self::Default,
            b'n' => Self::Nothing,
            b'f' => Self::Full,
            b'i' => Self::Index,
            _ => return None,
        })
    }
}

/// A column as a Relation message describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name, exactly as in the catalog.
    pub name: String,
    /// The OID of its type.
    pub type_oid: u32,
    /// `pg_attribute.atttypmod`; -1 where there is none.
    pub type_modifier: i32,
    /// Whether it is part of the replica identity. Under FULL every column is.
    pub identity: bool,
}

/// A table as the stream describes it, at one moment of its history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation {
    /// `pg_class.oid`; of the root where partitions are published through it.
    pub oid: u32,
    /// Its schema, exactly as in the catalog.
    pub schema: String,
    /// Its name, exactly as in the catalog.
    pub name: String,
    /// What old tuples hold.
    pub identity: ReplicaIdentity,
    /// The published columns, in the order in which tuples carry them.
    pub columns: Vec<Column>,
}

impl Relation {
    /// The place of the column of this name in every tuple.
    pub fn column(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column.name == name)
    }
}

/// One column's value in a tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datum<'a> {
    /// SQL NULL; in an [`OldTuple::Key`] also "not part of the replica identity".
    Null,
    /// A TOASTed value that the UPDATE did not change and the log does not carry. Never a NULL.
    UnchangedToast,
    /// The text form under the session settings of the connection.
    Text(&'a [u8]),
}

/// The row data of one image, still in the form it was received in; checked when it was parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple<'a> {
    /// How many columns follow.
    pub columns: u16,
    /// TupleData behind the column count, as the protocol's "Logical Replication Message Formats" page lays it out.
    pub bytes: &'a [u8],
}

/// What the log holds of a row before it changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldTuple<'a> {
    /// Only the columns of the replica identity; every other one shows as [`Datum::Null`] and is unknown.
    Key(Tuple<'a>),
    /// The whole row (REPLICA IDENTITY FULL).
    Full(Tuple<'a>),
}

/// A change of one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// A new row.
    Insert {
        /// The row.
        new: Tuple<'a>,
    },
    /// A changed row.
    Update {
        /// What it was; without it the replica identity's columns did not change.
        old: Option<OldTuple<'a>>,
        /// What it is.
        new: Tuple<'a>,
    },
    /// A removed row.
    Delete {
        /// What it was.
        old: OldTuple<'a>,
    },
}

impl<'a> Change<'a> {
    /// The new image and the old one, as far as the change carries them.
    pub fn images(self) -> (Option<Tuple<'a>>, Option<OldTuple<'a>>) {
        match self {
            Change::Insert { new } => (Some(new), None),
            Change::Update { old, new } => (Some(new), old),
            Change::Delete { old } => (None, Some(old)),
        }
    }
}

/// What the stream says next, in commit order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// The shape of a table, before its first change and after each alteration.
    Relation(Relation),
    /// A committed transaction begins.
    Begin {
        /// Where its commit record begins.
        commit_lsn: Lsn,
        /// When it committed, by Postgres's clock.
        commit_time: Timestamp,
        /// Its transaction id.
        xid: Xid,
    },
    /// A row changed.
    Change {
        /// The OID of its table.
        relation: u32,
        /// How.
        change: Change<'a>,
    },
    /// Tables were emptied by TRUNCATE.
    Truncate {
        /// Their OIDs.
        relations: Vec<u32>,
    },
    /// The transaction ends.
    Commit {
        /// Where its commit record begins.
        commit_lsn: Lsn,
        /// Where its commit record ends: what may be acknowledged.
        end_lsn: Lsn,
    },
    /// A logical decoding message (`pg_logical_emit_message`).
    Message {
        /// Whether it belongs to the transaction around it.
        transactional: bool,
        /// Where it stands.
        lsn: Lsn,
        /// Whose it is.
        prefix: &'a [u8],
        /// Its content.
        content: &'a [u8],
    },
    /// Nothing that row changes depend on (Origin, Type).
    Other,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lsn_reads_what_it_writes() {
        for text in ["0/0", "16/B374D848", "FFFFFFFF/FFFFFFFF"] {
            assert_eq!(text.parse::<Lsn>().map(|lsn| lsn.to_string()), Ok(text.to_owned()));
        }
        for text in ["", "16", "/", "16/", "16/xyz", "100000000/0"] {
            assert!(text.parse::<Lsn>().is_err(), "{text}");
        }
    }

    #[test]
    fn positions_stand_in_the_order_of_the_stream() {
        let at = |lsn, ordinal| Position { lsn: Lsn(lsn), ordinal };
        let commit_then_next = [at(100, 1), at(100, 2), at(140, 0), at(140, 1), at(180, 0)];
        assert!(commit_then_next.is_sorted());
    }
}
