//! Whether Redis holds what a batch would write; nothing is written.
//!
//! Values are fetched many at a time, and TTLs only where there can be any, because asking for one costs Redis more than
//! a value does. What does not look right is then looked at by itself.

use std::collections::BTreeMap;
use std::iter;

use redis::{Cmd, Value};

use super::super::connection::{Connection, Failure};
use super::{Writer, unexpected};
use crate::backoff::Backoff;
use crate::batch::{Batch, CacheOp, Form, Life};
use crate::cache::{Content, Differing, Held, Remaining};
use crate::error::{Error, ErrorKind, Result};

impl Writer {
    /// Waits out a server that is away, like a batch that is applied.
    pub(super) async fn find_differing(&mut self, batch: &Batch) -> Result<Vec<Differing>> {
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

    async fn try_find_differing(&mut self, batch: &Batch) -> Result<Vec<Differing>, Failure> {
        let mut connection = match (self.connection.take(), self.stored.clone()) {
            (Some(connection), _) => connection,
            (None, Some(stored)) => self.resume(Some(&stored)).await?,
            (None, None) => return Err(Failure::Final(Error::new(ErrorKind::CacheWentBack, "there is no checkpoint"))),
        };
        let ops: Vec<CacheOp<'_>> = batch.ops().map(|(_, op)| op).collect();
        let mut differing = differing_under(&mut connection, 0, &ops).await?;
        for (number, prefix) in iter::zip(1.., &self.config.also_prefix) {
            let under = |op: &CacheOp<'_>| [prefix.as_bytes(), &op.key()[self.config.prefix.len()..]].concat();
            let keys: Vec<Vec<u8>> = ops.iter().map(under).collect();
            let ops: Vec<CacheOp<'_>> = iter::zip(&ops, &keys).map(|(op, key)| op.at(key)).collect();
            differing.extend(differing_under(&mut connection, number, &ops).await?);
        }
        self.connection = Some(connection);
        self.metrics.circuit_open.set(0);
        Ok(differing)
    }
}

/// How many keys a command names: Redis does nothing else meanwhile.
const KEYS_AT_A_TIME: usize = 512;
/// How many keys are looked at by themselves in one piece.
const LOOKS_AT_A_TIME: usize = 64;
const MISSING: Held = Held { content: Content::Nothing, remaining: Remaining::Missing };
/// PTTL of each key.
const TTLS: &str = "local ttls = {} for i, key in ipairs(KEYS) do ttls[i] = redis.call('PTTL', key) end return ttls";

/// The same for one of the prefixes, which the keys bear.
async fn differing_under(
    connection: &mut Connection,
    prefix: usize,
    ops: &[CacheOp<'_>],
) -> Result<Vec<Differing>, Failure> {
    let strings: Vec<usize> = (0..ops.len()).filter(|place| is_string(&ops[*place])).collect();
    let live_on = |op: &CacheOp<'_>| matches!(op, CacheOp::Set { life: Life::Forever, .. });
    let ask_ttls = !strings.iter().all(|place| live_on(&ops[*place])) || some_expire(connection).await?;
    let questions = |places: &[usize]| iter::once(values(ops, places)).chain(ask_ttls.then(|| ttls(ops, places)));
    let replies = connection.send(strings.chunks(KEYS_AT_A_TIME).flat_map(questions)).await?;
    let mut replies = replies.into_iter();
    let mut unsure: Vec<usize> = (0..ops.len()).filter(|place| !is_string(&ops[*place])).collect();
    let mut looked_at = Vec::new();
    for places in strings.chunks(KEYS_AT_A_TIME) {
        let values = array(replies.next(), "MGET", places.len())?;
        let ttls =
            if ask_ttls { array(replies.next(), "EVAL", places.len())? } else { vec![Value::Int(-1); places.len()] };
        for (place, (value, ttl)) in iter::zip(places, iter::zip(&values, &ttls)) {
            match ttl {
                _ if is_plainly_right(&ops[*place], value, ttl) => {}
                Value::Int(-2) => looked_at.push(Differing { place: *place, prefix, held: MISSING }),
                _ => unsure.push(*place),
            }
        }
    }
    for places in unsure.chunks(LOOKS_AT_A_TIME) {
        let asked: Vec<CacheOp<'_>> = places.iter().map(|place| ops[*place]).collect();
        let held = held(connection, &asked).await?;
        looked_at.extend(iter::zip(places, held).map(|(place, held)| Differing { place: *place, prefix, held }));
    }
    Ok(looked_at)
}

/// Whether it is one of those of which many are fetched at a time.
fn is_string(op: &CacheOp<'_>) -> bool {
    matches!(op, CacheOp::Set { form: Form::String, .. })
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

fn values(ops: &[CacheOp<'_>], places: &[usize]) -> Cmd {
    let mut command = redis::cmd("MGET");
    places.iter().for_each(|place| _ = command.arg(ops[*place].key()));
    command
}

fn ttls(ops: &[CacheOp<'_>], places: &[usize]) -> Cmd {
    let mut script = redis::cmd("EVAL");
    script.arg(TTLS).arg(places.len());
    places.iter().for_each(|place| _ = script.arg(ops[*place].key()));
    script
}

fn array(reply: Option<Value>, command: &str, len: usize) -> Result<Vec<Value>, Failure> {
    match reply {
        Some(Value::Array(values)) if values.len() == len => Ok(values),
        other => Err(unexpected(command, &other.unwrap_or(Value::Nil))),
    }
}

/// Whether there is nothing to look at.
fn is_plainly_right(op: &CacheOp<'_>, value: &Value, ttl: &Value) -> bool {
    match (op, value, ttl) {
        (CacheOp::Set { value, life: Life::Forever, .. }, Value::BulkString(held), Value::Int(-1)) => held == value,
        (CacheOp::Set { value, life: Life::Ms(most), .. }, Value::BulkString(held), Value::Int(left @ 0..)) => {
            held == value && left.unsigned_abs() <= *most
        }
        _ => false,
    }
}

/// What Redis holds of each of these keys, or members.
async fn held(connection: &mut Connection, ops: &[CacheOp<'_>]) -> Result<Vec<Held>, Failure> {
    let about_key = |op: &CacheOp<'_>| [about("PTTL", op.key()), about("TYPE", op.key())];
    let replies = connection.send(ops.iter().flat_map(about_key)).await?;
    let mut known = Vec::with_capacity(ops.len());
    for replies in replies.chunks_exact(2) {
        let Value::Int(left) = replies[0] else { return Err(unexpected("PTTL", &replies[0])) };
        let Value::SimpleString(kind) = &replies[1] else { return Err(unexpected("TYPE", &replies[1])) };
        known.push((remaining(left), kind.as_str()));
    }
    let questions: Vec<Option<Cmd>> =
        iter::zip(ops, &known).map(|(op, (_, kind))| content_question(op, kind)).collect();
    let replies = connection.send(questions.iter().flatten().cloned()).await?;
    let mut replies = replies.into_iter();
    let mut all = Vec::with_capacity(ops.len());
    for (question, (remaining, kind)) in iter::zip(&questions, known) {
        let content = match question {
            Some(_) => content(kind, replies.next().unwrap_or(Value::Nil))?,
            None if kind == "none" => Content::Nothing,
            None => Content::Other(kind.to_owned()),
        };
        // It can have gone between two questions.
        let remaining = if content == Content::Nothing { Remaining::Missing } else { remaining };
        all.push(Held { content, remaining });
    }
    Ok(all)
}

fn remaining(pttl: i64) -> Remaining {
    match pttl {
        -2 => Remaining::Missing,
        -1 => Remaining::Forever,
        ms => Remaining::Ms(u64::try_from(ms).unwrap_or(0)),
    }
}

/// What to ask of a key of this type, as TYPE names it; `None` if that says it all.
fn content_question(op: &CacheOp<'_>, kind: &str) -> Option<Cmd> {
    match (op.member(), kind) {
        (Some(member), "set") => Some(about_member("SISMEMBER", op.key(), member)),
        (Some(member), "zset") => Some(about_member("ZSCORE", op.key(), member)),
        (None, "string") => Some(about("GET", op.key())),
        (None, "hash") => Some(about("HGETALL", op.key())),
        (None, "ReJSON-RL") => Some(about("JSON.GET", op.key())),
        _ => None,
    }
}

fn content(kind: &str, reply: Value) -> Result<Content, Failure> {
    Ok(match (kind, reply) {
        (_, Value::Nil) | ("set", Value::Int(0)) => Content::Nothing,
        ("set", Value::Int(_)) => Content::Member { score: None },
        ("zset", Value::BulkString(score)) => Content::Member { score: Some(score) },
        ("string", Value::BulkString(value)) => Content::String(value),
        ("ReJSON-RL", Value::BulkString(value)) => Content::Json(value),
        ("hash", reply) => {
            let fields: BTreeMap<Vec<u8>, Vec<u8>> =
                redis::from_redis_value(reply).map_err(|_| unexpected("HGETALL", &Value::Nil))?;
            if fields.is_empty() { Content::Nothing } else { Content::Hash(fields) }
        }
        (_, other) => return Err(unexpected("a question about a key", &other)),
    })
}

fn about_member(command: &str, key: &[u8], member: &[u8]) -> Cmd {
    let mut command = about(command, key);
    command.arg(member);
    command
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
        let set = |life| CacheOp::Set { key: b"k", value: b"1", form: Form::String, life, present_only: false };
        let held = |value: &str| Value::BulkString(value.into());
        assert!(is_plainly_right(&set(Life::Forever), &held("1"), &Value::Int(-1)));
        assert!(is_plainly_right(&set(Life::Ms(10)), &held("1"), &Value::Int(10)));
        for (life, value, ttl) in [
            (Life::Forever, held("2"), -1),
            (Life::Forever, held("1"), 10),
            (Life::Forever, Value::Nil, -1),
            (Life::Ms(10), held("1"), 11),
            (Life::Ms(10), held("1"), -1),
            (Life::Until(10), held("1"), 1),
        ] {
            assert!(!is_plainly_right(&set(life), &value, &Value::Int(ttl)), "{life:?} {value:?} {ttl}");
        }
    }
}
