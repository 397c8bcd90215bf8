//! How `row_to_json` shows each type, from the catalog.

use std::sync::Arc;

/// What `row_to_json` makes of a type's text form (`json_categorize_type` in `src/backend/utils/adt/jsonfuncs.c`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JsonType {
    /// `true` or `false`.
    Bool,
    /// A number, quoted where JSON has none for it (NaN, Infinity).
    Number,
    /// `date`: as it is, quoted.
    Date,
    /// `timestamp`: with a `T`.
    Timestamp,
    /// `timestamptz`: with a `T` and a full offset.
    TimestampTz,
    /// `json` and `jsonb`: as they are.
    Json,
    /// An array, nested to any depth.
    Array {
        /// Its elements.
        element: Arc<JsonType>,
        /// What separates them, `,` for every type but `box`.
        delimiter: u8,
    },
    /// `int2vector` and `oidvector`: space-separated.
    Vector(Arc<JsonType>),
    /// A composite type's attributes, dropped ones left out.
    Composite(Vec<(String, Arc<JsonType>)>),
    /// `hstore`: an object of strings.
    Hstore,
    /// Everything else: its text form, quoted.
    Text,
}
