//! Commands as text instead of writes: `run --dry-run`.

use std::io::Write;
use std::time::Duration;

use crate::batch::{Batch, Members};
use crate::catalog::signature::Signatures;
use crate::config::RedisConfig;
use crate::error::{Error, ErrorKind, Result};

use super::checkpoint::Checkpoint;
use super::{Applied, Cache, Differing, commands};

/// Writes each batch's commands, one a line, and stores nothing.
pub struct Recorder<W> {
    out: W,
    redis: RedisConfig,
}

impl<W: Write + Send> Recorder<W> {
    /// Commands for this Redis go to `out`.
    pub fn new(out: W, redis: RedisConfig) -> Self {
        Recorder { out, redis }
    }

    fn write(&mut self, batch: &Batch) -> std::io::Result<()> {
        for sweep in commands::sweeps(batch, &self.redis).concat() {
            match sweep.members() {
                None => writeln!(self.out, "SCAN 0 MATCH {sweep} → UNLINK what matches")?,
                Some(Members::All) => writeln!(self.out, "SSCAN → UNLINK {sweep}")?,
                Some(_) => writeln!(self.out, "SSCAN → SREM {sweep}")?,
            }
        }
        for command in commands::encode(batch, &self.redis, |_| true) {
            writeln!(self.out, "{}", commands::show(&command))?;
        }
        self.out.flush()
    }
}

impl<W: Write + Send> Cache for Recorder<W> {
    async fn apply(&mut self, batch: &Batch, checkpoint: Checkpoint) -> Result<Applied> {
        self.write(batch).map_err(|error| Error::new(ErrorKind::Io, "cannot write to stdout").because(error))?;
        Ok(Applied { checkpoint, invalidated: false, owed: false, searched: Duration::ZERO })
    }

    /// There is no cache, so nothing is other than it should be.
    async fn compare(&mut self, _: &Batch) -> Result<Vec<Differing>> {
        Ok(Vec::new())
    }

    fn remember(&mut self, _: &Signatures) {}

    async fn probe(&mut self) -> Result<()> {
        Ok(())
    }
}
