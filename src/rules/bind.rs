//! Rule + relation → [`BoundRule`]: column names become places in the tuple, and what Postgres will not send is found.

use std::sync::Arc;
use std::time::Duration;

use crate::config::Operations;
use crate::decode::types::JsonType;

/// A rule, ready for the changes of one relation.
#[derive(Clone, Debug)]
pub struct BoundRule {
    /// Its place in [`crate::config::Config::rules`].
    pub rule: u16,
    /// The operations that count.
    pub on: Operations,
    /// Write-through, if the rule has it.
    pub write: Option<BoundWrite>,
    /// The keys that a change makes stale.
    pub delete: Vec<BoundKey>,
    /// The places of the columns of which one must have changed for an UPDATE to count; `None` is any.
    pub changed: Option<Vec<usize>>,
}

/// Write-through, ready.
#[derive(Clone, Debug)]
pub struct BoundWrite {
    /// The key.
    pub key: BoundKey,
    /// The value; `None` while a column it needs is missing: the key is deleted instead (I9).
    pub json: Option<Vec<JsonField>>,
    /// The time to live and its jitter as a share.
    pub ttl: Option<(Duration, f64)>,
    /// Only keys that exist are refreshed.
    pub present_only: bool,
    /// A deleted row's key stays.
    pub keep_on_delete: bool,
}

/// One field of a JSON object.
#[derive(Clone, Debug)]
pub struct JsonField {
    /// What stands before the value: `{"id":` for the first, `,"name":` for every other, escaped.
    pub lead: Box<[u8]>,
    /// The place of the column in the tuple.
    pub column: usize,
    /// How `row_to_json` shows its type.
    pub json: Arc<JsonType>,
    /// Shown as a JSON string instead.
    pub as_string: bool,
}

/// A key template, ready for the tuples of one relation.
#[derive(Clone, Debug)]
pub struct BoundKey {
    /// Whether every column it uses is in the replica identity, so that an [`crate::model::OldTuple::Key`] renders it.
    pub in_identity: bool,
}
