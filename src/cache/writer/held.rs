//! What Redis holds of a batch's cells, to be compared; nothing is written.

use redis::Value;

use super::super::connection::{Connection, Failure};
use super::{Writer, unexpected};
use crate::backoff::Backoff;
use crate::batch::{Batch, CacheOp};
use crate::cache::{Held, Remaining};
use crate::error::{Error, ErrorKind, Result};

impl Writer {
    /// Waits out a server that is away, like a batch that is applied.
    pub(super) async fn read_held(&mut self, batch: &Batch) -> Result<Vec<Held>> {
        let mut backoff = Backoff::default();
        loop {
            let error = match self.try_read_held(batch).await {
                Ok(held) => return Ok(held),
                Err(Failure::Away(error)) if error.kind() == ErrorKind::RedisAway => error,
                Err(failure) => return Err(super::into_error(failure)),
            };
            self.metrics.circuit_open.set(1);
            if backoff.tries() == 0 {
                tracing::warn!(%error, "Redis is away; the comparison waits");
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }

    async fn try_read_held(&mut self, batch: &Batch) -> Result<Vec<Held>, Failure> {
        let mut connection = match (self.connection.take(), self.stored.clone()) {
            (Some(connection), _) => connection,
            (None, Some(stored)) => self.resume(Some(&stored)).await?,
            (None, None) => return Err(Failure::Final(Error::new(ErrorKind::CacheWentBack, "there is no checkpoint"))),
        };
        let held = held(&mut connection, batch).await?;
        self.connection = Some(connection);
        self.metrics.circuit_open.set(0);
        Ok(held)
    }
}

async fn held(connection: &mut Connection, batch: &Batch) -> Result<Vec<Held>, Failure> {
    let key = |(_, op): (u16, _)| match op {
        CacheOp::Set { key, .. } | CacheOp::Delete { key } => key,
    };
    let mut values = redis::cmd("MGET");
    let mut commands = Vec::with_capacity(batch.len() + 1);
    for key in batch.ops().map(key) {
        values.arg(key);
        let mut remaining = redis::cmd("PTTL");
        remaining.arg(key);
        commands.push(remaining);
    }
    commands.push(values);
    let mut replies = connection.send(commands).await?;
    let Some(Value::Array(values)) = replies.pop() else { return Err(unexpected("MGET", &Value::Nil)) };
    let pairs = values.into_iter().zip(replies);
    pairs.map(|(value, remaining)| Ok(Held { value: content(value)?, remaining: left(&remaining)? })).collect()
}

/// MGET shows a key of another type as missing.
fn content(value: Value) -> Result<Option<Vec<u8>>, Failure> {
    match value {
        Value::Nil => Ok(None),
        Value::BulkString(bytes) => Ok(Some(bytes)),
        other => Err(unexpected("MGET", &other)),
    }
}

fn left(remaining: &Value) -> Result<Remaining, Failure> {
    match remaining {
        Value::Int(-2) => Ok(Remaining::Missing),
        Value::Int(-1) => Ok(Remaining::Forever),
        Value::Int(ms) => Ok(Remaining::Ms(u64::try_from(*ms).unwrap_or(0))),
        other => Err(unexpected("PTTL", other)),
    }
}
