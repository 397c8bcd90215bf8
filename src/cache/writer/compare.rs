//! Whether Redis holds what a batch would write; nothing is written.
//!
//! Values are fetched many at a time, and TTLs only where there can be any, because asking for one costs Redis more than
//! a value does. What does not look right is then looked at by itself.

use std::iter;

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

/// How many keys a command names: Redis does nothing else meanwhile.
const KEYS_AT_A_TIME: usize = 512;
/// How many keys that do not look right are read at a time.
const DIFFERING_AT_A_TIME: usize = 32;
/// PTTL of each key.
const TTLS: &str = "local ttls = {} for i, key in ipairs(KEYS) do ttls[i] = redis.call('PTTL', key) end return ttls";

async fn differing(connection: &mut Connection, batch: &Batch) -> Result<Vec<(usize, Held)>, Failure> {
    let ops: Vec<CacheOp<'_>> = batch.ops().map(|(_, op)| op).collect();
    let all_forever = !ops.iter().any(|op| matches!(op, CacheOp::Set { ttl_ms: Some(_), .. }));
    let ask_ttls = !all_forever || some_expire(connection).await?;
    let questions = |ops: &[CacheOp<'_>]| iter::once(values(ops)).chain(ask_ttls.then(|| ttls(ops)));
    let replies = connection.send(ops.chunks(KEYS_AT_A_TIME).flat_map(questions)).await?;
    let mut replies = replies.into_iter();
    let mut unsure = Vec::new();
    for (chunk, ops) in ops.chunks(KEYS_AT_A_TIME).enumerate() {
        let values = array(replies.next(), "MGET", ops.len())?;
        let ttls = if ask_ttls { array(replies.next(), "EVAL", ops.len())? } else { vec![Value::Int(-1); ops.len()] };
        for (place, (op, (value, ttl))) in ops.iter().zip(values.iter().zip(&ttls)).enumerate() {
            if !is_plainly_right(op, value, ttl) {
                unsure.push(chunk * KEYS_AT_A_TIME + place);
            }
        }
    }
    let mut differing = Vec::with_capacity(unsure.len());
    for places in unsure.chunks(DIFFERING_AT_A_TIME) {
        let keys: Vec<&[u8]> = places.iter().map(|place| ops[*place].key()).collect();
        differing.extend(iter::zip(places.iter().copied(), held(connection, &keys).await?));
    }
    Ok(differing)
}

/// Whether there can be any TTL: INFO counts the keys that have one.
async fn some_expire(connection: &mut Connection) -> Result<bool, Failure> {
    let mut info = redis::cmd("INFO");
    info.arg("keyspace");
    match connection.send_one(info).await? {
        Value::BulkString(text) => Ok(counts_expiring(&text)),
        Value::VerbatimString { text, .. } => Ok(counts_expiring(text.as_bytes())),
        other => Err(unexpected("INFO", &other)),
    }
}

/// `db0:keys=3,expires=1,avg_ttl=0`, a line for each database. What is not understood counts.
fn counts_expiring(info: &[u8]) -> bool {
    let text = String::from_utf8_lossy(info);
    let mut databases = text.lines().filter(|line| line.starts_with("db"));
    databases.any(|line| !line.split(',').any(|field| field == "expires=0"))
}

fn values(ops: &[CacheOp<'_>]) -> Cmd {
    let mut command = redis::cmd("MGET");
    ops.iter().for_each(|op| _ = command.arg(op.key()));
    command
}

fn ttls(ops: &[CacheOp<'_>]) -> Cmd {
    let mut script = redis::cmd("EVAL");
    script.arg(TTLS).arg(ops.len());
    ops.iter().for_each(|op| _ = script.arg(op.key()));
    script
}

fn array(reply: Option<Value>, command: &str, len: usize) -> Result<Vec<Value>, Failure> {
    match reply {
        Some(Value::Array(values)) if values.len() == len => Ok(values),
        other => Err(unexpected(command, &other.unwrap_or(Value::Nil))),
    }
}

/// Whether there is nothing to look at. MGET shows nothing of what is no string, so a key that should not be needs a TTL
/// that says so.
fn is_plainly_right(op: &CacheOp<'_>, value: &Value, ttl: &Value) -> bool {
    match (op, value, ttl) {
        (CacheOp::Set { value, ttl_ms: None, .. }, Value::BulkString(held), Value::Int(-1)) => held == value,
        (CacheOp::Set { value, ttl_ms: Some(most), .. }, Value::BulkString(held), Value::Int(left @ 0..)) => {
            held == value && left.unsigned_abs() <= *most
        }
        (CacheOp::Delete { .. }, Value::Nil, Value::Int(-2)) => true,
        _ => false,
    }
}

/// What Redis holds of each of these keys.
async fn held(connection: &mut Connection, keys: &[&[u8]]) -> Result<Vec<Held>, Failure> {
    let questions = |key: &&[u8]| [about("PTTL", key), about("TYPE", key)];
    let replies = connection.send(keys.iter().flat_map(questions)).await?;
    let mut all = Vec::with_capacity(keys.len());
    for (key, replies) in iter::zip(keys, replies.chunks_exact(2)) {
        let remaining = match &replies[0] {
            Value::Int(-2) => Remaining::Missing,
            Value::Int(-1) => Remaining::Forever,
            Value::Int(ms) => Remaining::Ms(u64::try_from(*ms).unwrap_or(0)),
            other => return Err(unexpected("PTTL", other)),
        };
        let content = match &replies[1] {
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
        all.push(Held { content, remaining });
    }
    Ok(all)
}

fn about(command: &str, key: &[u8]) -> Cmd {
    let mut command = redis::cmd(command);
    command.arg(key);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_count_of_zero_says_that_nothing_expires() {
        assert!(!counts_expiring(b"# Keyspace\r\n"));
        assert!(!counts_expiring(b"# Keyspace\r\ndb0:keys=2,expires=0,avg_ttl=0\r\n"));
        assert!(counts_expiring(
            b"# Keyspace\r\ndb0:keys=2,expires=0,avg_ttl=0\r\ndb1:keys=2,expires=10,avg_ttl=0\r\n"
        ));
        assert!(counts_expiring(b"db0:something else"));
    }

    #[test]
    fn what_is_plainly_right() {
        let set = |ttl_ms| CacheOp::Set { key: b"k", value: b"1", ttl_ms, present_only: false };
        let delete = CacheOp::Delete { key: b"k" };
        let held = |value: &str| Value::BulkString(value.into());
        assert!(is_plainly_right(&set(None), &held("1"), &Value::Int(-1)));
        assert!(is_plainly_right(&set(Some(10)), &held("1"), &Value::Int(10)));
        assert!(is_plainly_right(&delete, &Value::Nil, &Value::Int(-2)));
        for (op, value, ttl) in [
            (set(None), held("2"), -1),
            (set(None), held("1"), 10),
            (set(None), Value::Nil, -1),
            (set(Some(10)), held("1"), 11),
            (set(Some(10)), held("1"), -1),
            (delete, Value::Nil, -1),
            (delete, held("1"), -1),
        ] {
            assert!(!is_plainly_right(&op, &value, &Value::Int(ttl)), "{op:?} {value:?} {ttl}");
        }
    }
}
