//! Whether Redis holds what a batch would write; nothing is written.
//!
//! Redis compares: it gets the values and names the cells that are not plainly right, and only these are read.

use redis::{Cmd, Value};

use super::super::connection::{Connection, Failure};
use super::{Writer, unexpected};
use crate::backoff::Backoff;
use crate::batch::{Batch, CacheOp};
use crate::cache::{Content, Held, Remaining};
use crate::error::{Error, ErrorKind, Result};

impl Writer {
    /// Waits out a server that is away, like a batch that is applied.
    pub(super) async fn find_differing(&mut self, batch: &Batch) -> Result<Vec<(usize, Held)>> {
        let mut backoff = Backoff::default();
        loop {
            let error = match self.try_find_differing(batch).await {
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

    async fn try_find_differing(&mut self, batch: &Batch) -> Result<Vec<(usize, Held)>, Failure> {
        let mut connection = match (self.connection.take(), self.stored.clone()) {
            (Some(connection), _) => connection,
            (None, Some(stored)) => self.resume(Some(&stored)).await?,
            (None, None) => return Err(Failure::Final(Error::new(ErrorKind::CacheWentBack, "there is no checkpoint"))),
        };
        let differing = differing(&mut connection, batch).await?;
        self.connection = Some(connection);
        self.metrics.circuit_open.set(0);
        Ok(differing)
    }
}

/// For each key a value and the longest time that it may still live in milliseconds, `-1` for ever; gives the places of
/// those that are not so, negative where there is no key.
const COMPARE: &str = "\
local differing = {}
for i, key in ipairs(KEYS) do
  local held, left, most = redis.pcall('GET', key), redis.call('PTTL', key), tonumber(ARGV[2 * i])
  local lives = most == -1 and left == -1 or left >= 0 and left <= most
  if held ~= ARGV[2 * i - 1] or not lives then differing[#differing + 1] = left == -2 and -i or i end
end
return table.concat(differing, ',')";
/// How many keys a script looks at: Redis does nothing else meanwhile.
const SCRIPT_KEYS: usize = 512;

async fn differing(connection: &mut Connection, batch: &Batch) -> Result<Vec<(usize, Held)>, Failure> {
    let ops: Vec<CacheOp<'_>> = batch.ops().map(|(_, op)| op).collect();
    let replies = connection.send(ops.chunks(SCRIPT_KEYS).map(compare)).await?;
    let mut differing = Vec::new();
    for (chunk, reply) in replies.iter().enumerate() {
        let Value::BulkString(places) = reply else { return Err(unexpected("EVAL", reply)) };
        for place in places.split(|byte| *byte == b',').filter(|place| !place.is_empty()) {
            let number = str::from_utf8(place).ok().and_then(|place| place.parse::<isize>().ok());
            let within = number.and_then(|number| number.unsigned_abs().checked_sub(1));
            let place = within.filter(|place| *place < SCRIPT_KEYS).map(|place| chunk * SCRIPT_KEYS + place);
            let (place, op) =
                place.and_then(|place| Some((place, ops.get(place)?))).ok_or_else(|| unexpected("EVAL", reply))?;
            let held = match number {
                Some(..0) => Held { content: Content::Nothing, remaining: Remaining::Missing },
                _ => held(connection, op.key()).await?,
            };
            differing.push((place, held));
        }
    }
    Ok(differing)
}

fn compare(ops: &[CacheOp<'_>]) -> Cmd {
    let mut script = redis::cmd("EVAL");
    script.arg(COMPARE).arg(ops.len());
    for op in ops {
        script.arg(op.key());
    }
    for op in ops {
        match op {
            CacheOp::Set { value, ttl_ms: Some(ttl_ms), .. } => script.arg(*value).arg(*ttl_ms),
            CacheOp::Set { value, ttl_ms: None, .. } => script.arg(*value).arg(-1),
            // No key is right: whatever is there is looked at.
            CacheOp::Delete { .. } => script.arg("").arg(0),
        };
    }
    script
}

async fn held(connection: &mut Connection, key: &[u8]) -> Result<Held, Failure> {
    let replies = connection.send([about("PTTL", key), about("TYPE", key)]).await?;
    let [remaining, kind] = replies.as_slice() else { return Err(unexpected("PTTL", &Value::Nil)) };
    let remaining = match remaining {
        Value::Int(-2) => Remaining::Missing,
        Value::Int(-1) => Remaining::Forever,
        Value::Int(ms) => Remaining::Ms(u64::try_from(*ms).unwrap_or(0)),
        other => return Err(unexpected("PTTL", other)),
    };
    let content = match kind {
        Value::SimpleString(kind) if kind == "none" => Content::Nothing,
        Value::SimpleString(kind) if kind == "string" => match connection.send_one(about("GET", key)).await? {
            Value::BulkString(value) => Content::String(value),
            Value::Nil => Content::Nothing,
            other => return Err(unexpected("GET", &other)),
        },
        Value::SimpleString(kind) => Content::Other(kind.clone()),
        other => return Err(unexpected("TYPE", other)),
    };
    // It can have gone between two questions.
    let remaining = if content == Content::Nothing { Remaining::Missing } else { remaining };
    Ok(Held { content, remaining })
}

fn about(command: &str, key: &[u8]) -> Cmd {
    let mut command = redis::cmd(command);
    command.arg(key);
    command
}
