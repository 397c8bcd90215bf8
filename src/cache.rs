//! The Redis side: batches go in, and the checkpoint with them.
//!
//! - [`checkpoint`]: how far the cache has come, kept in the cache itself.
//! - [`commands`]: a batch as Redis commands; pure.
//! - [`connection`]: one connection to a standalone server, and what its errors mean.
//! - [`inspect`]: what the server says of itself, for `check --connect`.
//! - [`writer`]: MULTI … EXEC, the fence, and going on after a lost connection.
//! - [`record`]: commands as text, for `plan` and `run --dry-run`.
//!
//! **Architecture invariant:** nothing outside this module sends a command that writes, and every reply is looked at.

use crate::batch::Batch;
use crate::error::Result;

use checkpoint::Checkpoint;

pub mod checkpoint;
pub mod commands;
pub mod connection;
pub mod inspect;
pub mod record;
pub mod writer;

/// What became of a batch.
#[derive(Debug)]
pub struct Applied {
    /// The checkpoint as stored.
    pub checkpoint: Checkpoint,
    /// Redis was out of memory: every key was deleted, those that should have been set too.
    pub invalidated: bool,
}

/// Where batches go.
pub trait Cache {
    /// Applies the batch and stores the checkpoint with it, both or neither.
    ///
    /// Waits out a server that is away. An error means that nothing more may be written: fenced out, refused, or
    /// the cache has lost something.
    fn apply(&mut self, batch: &Batch, checkpoint: Checkpoint) -> impl Future<Output = Result<Applied>> + Send;
}
