//! The Redis side: batches go in, and the checkpoint with them.
//!
//! - [`checkpoint`]: how far the cache has come, kept in the cache itself.
//! - [`claims`]: which keys it can hold of which rules, a record that outlives rules and tables.
//! - [`clear`]: deletes keys on request, by the same matcher.
//! - [`commands`]: a batch as Redis commands; pure.
//! - [`connection`]: one connection to a standalone server, and what its errors mean.
//! - [`inspect`]: what the server says of itself, for `check --connect`.
//! - `keyspace`: going through keys step by step.
//! - [`stats`]: how many keys each rule has, and how large they are.
//! - [`writer`]: MULTI … EXEC, the fence, and going on after a lost connection.
//! - [`record`]: commands as text, for `plan` and `run --dry-run`.
//! - [`scan`]: the keys under the prefix, some at a time.
//!
//! **Architecture invariant:** nothing outside this module sends a command that writes, and every reply is looked at.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::batch::Batch;
use crate::catalog::signature::Signatures;
use crate::error::Result;

use checkpoint::Checkpoint;

pub mod checkpoint;
pub mod claims;
pub mod clear;
pub mod commands;
pub mod connection;
pub mod inspect;
mod keyspace;
pub mod record;
pub mod scan;
pub mod stats;
pub mod writer;

/// What became of a batch.
#[derive(Debug)]
pub struct Applied {
    /// The checkpoint as stored.
    pub checkpoint: Checkpoint,
    /// Redis was out of memory: every key was deleted, those that should have been set too.
    pub invalidated: bool,
    /// Rules came to owe, because keys were deleted that rows outside of this batch have a part in.
    pub owed: bool,
    /// How long going through all keys took, if that was done.
    pub searched: Duration,
}

/// A cell that may not be as a batch would write it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Differing {
    /// Which of the batch's operations.
    pub place: usize,
    /// Under which of the prefixes; 0 is the main one.
    pub prefix: usize,
    /// What Redis holds.
    pub held: Held,
}

/// What Redis holds of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// What it is.
    pub content: Content,
    /// How long it will be there.
    pub remaining: Remaining,
}

/// What a key, or a member of it, is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// There is no such key, or no such member.
    Nothing,
    /// A string.
    String(Vec<u8>),
    /// A hash: its fields and their values.
    Hash(BTreeMap<Vec<u8>, Vec<u8>>),
    /// JSON, as Redis's JSON type shows it.
    Json(Vec<u8>),
    /// The member is there.
    Member {
        /// Its score in a sorted set.
        score: Option<Vec<u8>>,
    },
    /// Something else, by its type's name.
    Other(String),
}

/// The reply to PTTL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remaining {
    /// There is no such key.
    Missing,
    /// It has no TTL.
    Forever,
    /// So many milliseconds.
    Ms(u64),
}

/// Where batches go.
pub trait Cache {
    /// Applies the batch and stores the checkpoint with it, both or neither.
    ///
    /// Waits out a server that is away. An error means that nothing more may be written: fenced out, refused, or
    /// the cache has lost something.
    fn apply(&mut self, batch: &Batch, checkpoint: Checkpoint) -> impl Future<Output = Result<Applied>> + Send;

    /// The cells that may not be as the batch would write them.
    fn compare(&mut self, batch: &Batch) -> impl Future<Output = Result<Vec<Differing>>> + Send;
    /// What the catalog says of the tables now, to be stored with the next batch, whose checkpoint holds what follows
    /// from it.
    fn remember(&mut self, catalog: &Signatures);

    /// Looks whether the cache still holds what it was last seen to hold, while nothing is written to it.
    ///
    /// A server that is away is no error: it is looked at again. An error means the same as that of [`Cache::apply`].
    fn probe(&mut self) -> impl Future<Output = Result<()>> + Send;
}
