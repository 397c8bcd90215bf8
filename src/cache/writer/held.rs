//! What Redis holds of a batch's cells, to be compared; nothing is written.

use redis::{Cmd, Value};

use super::super::connection::{Connection, Failure};
use super::{Writer, unexpected};
use crate::backoff::Backoff;
use crate::batch::{Batch, CacheOp};
use crate::cache::{Content, Held, Remaining};
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
    let keys: Vec<&[u8]> = batch.ops().map(|(_, CacheOp::Set { key, .. } | CacheOp::Delete { key })| key).collect();
    let mut values = redis::cmd("MGET");
    values.arg(&keys);
    let mut replies = connection.send(keys.iter().map(|key| about("PTTL", key)).chain([values])).await?;
    let Some(Value::Array(values)) = replies.pop() else { return Err(unexpected("MGET", &Value::Nil)) };
    let mut held = Vec::with_capacity(keys.len());
    for ((key, value), remaining) in keys.into_iter().zip(values).zip(replies) {
        let remaining = left(&remaining)?;
        let content = match (value, remaining) {
            (Value::BulkString(bytes), _) => Content::String(bytes),
            (Value::Nil, Remaining::Missing) => Content::Nothing,
            // MGET shows a key of another type as missing.
            (Value::Nil, _) => kind(&connection.send_one(about("TYPE", key)).await?)?,
            (other, _) => return Err(unexpected("MGET", &other)),
        };
        held.push(Held { content, remaining });
    }
    Ok(held)
}

fn about(command: &str, key: &[u8]) -> Cmd {
    let mut command = redis::cmd(command);
    command.arg(key);
    command
}

fn kind(reply: &Value) -> Result<Content, Failure> {
    match reply {
        Value::SimpleString(name) if name == "none" => Ok(Content::Nothing),
        Value::SimpleString(name) => Ok(Content::Other(name.clone())),
        other => Err(unexpected("TYPE", other)),
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
