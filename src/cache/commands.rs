//! A batch as Redis commands; pure.
//!
//! Inside MULTI the order of different keys does not show, so plain sets become one MSET, deletes one UNLINK, and the members
//! of a key one command: Redis parses, queues and answers a few commands instead of thousands. Members come last: what is
//! left of those of a deleted key came after that.

use std::collections::{BTreeMap, BTreeSet};
use std::iter;

use redis::Cmd;

use crate::batch::{Batch, CacheOp, Effect, Form, Life, Sweep, fields};
use crate::config::RedisConfig;

/// The commands of the batch, under each prefix; sweeps are not among them. `happens` says whether what is to happen only
/// once is still to happen to this stream or channel.
pub fn encode(batch: &Batch, redis: &RedisConfig, happens: impl Fn(&[u8]) -> bool) -> Vec<Cmd> {
    let mut encoder = Encoder::for_batch(batch, redis);
    for (_, op) in batch.ops() {
        encoder.add(op.key(), op);
    }
    let mut key = Vec::new();
    for prefix in &redis.also_prefix {
        for (_, op) in batch.ops() {
            key.clear();
            key.extend_from_slice(prefix.as_bytes());
            key.extend_from_slice(&op.key()[redis.prefix.len()..]);
            encoder.add(&key, op);
        }
    }
    let mut commands = encoder.finish();
    for effect in batch.effects() {
        let targets = targets(effect, redis).filter(|target| happens(target));
        commands.extend(targets.map(|target| happen(&target, effect)));
    }
    commands
}

/// Streams that the batch adds entries to, under each prefix.
pub(super) fn streams(batch: &Batch, redis: &RedisConfig) -> BTreeSet<Vec<u8>> {
    let appends = batch.effects().filter(|effect| matches!(effect, Effect::Append { .. }));
    appends.flat_map(|effect| targets(effect, redis)).collect()
}

fn targets<'a>(effect: Effect<'a>, redis: &'a RedisConfig) -> impl Iterator<Item = Vec<u8>> {
    let bare = &effect.target()[redis.prefix.len()..];
    redis.prefixes().map(move |prefix| [prefix.as_bytes(), bare].concat())
}

fn happen(target: &[u8], effect: Effect<'_>) -> Cmd {
    match effect {
        Effect::Publish { message, .. } => {
            let mut publish = about("PUBLISH", target);
            publish.arg(message);
            publish
        }
        Effect::Append { maxlen, entry, .. } => {
            let mut append = about("XADD", target);
            if let Some(maxlen) = maxlen {
                append.arg("MAXLEN").arg("~").arg(maxlen);
            }
            append.arg("*");
            fields(entry).for_each(|(name, value)| _ = append.arg(name).arg(value));
            append
        }
    }
}

/// The keys that go before that, for each prefix.
pub fn sweeps(batch: &Batch, redis: &RedisConfig) -> Vec<Vec<Sweep>> {
    let under =
        |prefix: &str| batch.sweeps().iter().map(|sweep| sweep.under(prefix.as_bytes(), redis.prefix.len())).collect();
    let prefixes = redis.prefixes().filter(|_| !batch.sweeps().is_empty());
    prefixes.map(under).collect()
}

/// The keys that go, under each prefix, where nothing can be written.
pub(super) fn keys(batch: &Batch, redis: &RedisConfig) -> Vec<Vec<u8>> {
    let mut keys = Vec::with_capacity(batch.len() * redis.prefixes().count());
    for prefix in redis.prefixes() {
        let under = |key: &[u8]| [prefix.as_bytes(), &key[redis.prefix.len()..]].concat();
        keys.extend(batch.keys_in_doubt().map(under));
    }
    keys
}

/// The type that the key must have for the operation's command, as TYPE names it; `None` where any is replaced.
pub(super) fn type_needed(op: &CacheOp<'_>) -> Option<&'static str> {
    match op {
        CacheOp::Set { form: Form::Json, .. } => Some("ReJSON-RL"),
        CacheOp::Add { score: None, .. } | CacheOp::Remove { sorted: false, .. } => Some("set"),
        CacheOp::Add { score: Some(_), .. } | CacheOp::Remove { sorted: true, .. } => Some("zset"),
        CacheOp::Set { .. } | CacheOp::Delete { .. } => None,
    }
}

/// What grows while operations are added.
struct Encoder {
    plain: Cmd,
    unlink: Cmd,
    others: Vec<Cmd>,
    /// By key and command, because an order by anything else would be random.
    members: BTreeMap<(Vec<u8>, &'static str), Cmd>,
}

impl Encoder {
    /// With room for all of it.
    fn for_batch(batch: &Batch, redis: &RedisConfig) -> Self {
        let (mut sets, mut set_bytes, mut deletes, mut delete_bytes) = (0, 0, 0, 0);
        for (_, op) in batch.ops() {
            match op {
                CacheOp::Delete { key } => (deletes, delete_bytes) = (deletes + 1, delete_bytes + key.len()),
                CacheOp::Set { key, value, form: Form::String, life: Life::Forever, present_only: false } => {
                    (sets, set_bytes) = (sets + 1, set_bytes + key.len() + value.len());
                }
                _ => {}
            }
        }
        let copies = redis.prefixes().count();
        // The other prefixes may be longer.
        let more = redis.also_prefix.iter().map(|prefix| prefix.len()).sum::<usize>();
        let mut plain = Cmd::with_capacity(1 + 2 * sets * copies, set_bytes * copies + sets * more + 8);
        plain.arg(if sets * copies == 1 { "SET" } else { "MSET" });
        let mut unlink = Cmd::with_capacity(1 + deletes * copies, delete_bytes * copies + deletes * more + 8);
        unlink.arg("UNLINK");
        Encoder { plain, unlink, others: Vec::new(), members: BTreeMap::new() }
    }

    /// The operation, for this key.
    fn add(&mut self, key: &[u8], op: CacheOp<'_>) {
        match op {
            CacheOp::Delete { .. } => _ = self.unlink.arg(key),
            CacheOp::Set { value, form: Form::String, life: Life::Forever, present_only: false, .. } => {
                self.plain.arg(key).arg(value);
            }
            CacheOp::Set { value, form: Form::String, life, present_only, .. } => {
                self.others.push(set(key, value, life, present_only));
            }
            CacheOp::Set { value, form: Form::Json, life, present_only, .. } => {
                self.others.push(set_json(key, value, present_only));
                // JSON.SET leaves a TTL as it is.
                self.others.extend(if life == Life::Forever { Some(about("PERSIST", key)) } else { expire(key, life) });
            }
            CacheOp::Set { value, form: Form::Hash, life, present_only, .. } => {
                self.others.extend(set_hash(key, value, life, present_only));
                self.others.extend(expire(key, life));
            }
            CacheOp::Add { member, score: None, .. } => _ = self.member(key, "SADD").arg(member),
            CacheOp::Add { member, score: Some(score), .. } => _ = self.member(key, "ZADD").arg(score).arg(member),
            CacheOp::Remove { member, sorted: false, .. } => _ = self.member(key, "SREM").arg(member),
            CacheOp::Remove { member, sorted: true, .. } => _ = self.member(key, "ZREM").arg(member),
        }
    }

    fn member(&mut self, key: &[u8], command: &'static str) -> &mut Cmd {
        self.members.entry((key.to_vec(), command)).or_insert_with(|| about(command, key))
    }

    fn finish(self) -> Vec<Cmd> {
        let Encoder { plain, unlink, mut others, members } = self;
        let many = |command: &Cmd| command.args_iter().len() > 1;
        others.extend([plain, unlink].into_iter().filter(many));
        others.extend(members.into_values());
        others
    }
}

fn set(key: &[u8], value: &[u8], life: Life, present_only: bool) -> Cmd {
    let mut set = Cmd::with_capacity(6, key.len() + value.len() + 32);
    set.arg("SET").arg(key).arg(value);
    match life {
        Life::Forever => {}
        Life::Ms(ms) => _ = set.arg("PX").arg(ms),
        Life::Until(at_ms) => _ = set.arg("PXAT").arg(at_ms),
        Life::Keep => _ = set.arg("KEEPTTL"),
    }
    if present_only {
        set.arg("XX");
    }
    set
}

fn set_json(key: &[u8], value: &[u8], present_only: bool) -> Cmd {
    let mut set = about("JSON.SET", key);
    set.arg("$").arg(value);
    if present_only {
        set.arg("XX");
    }
    set
}

/// Replaces a hash whole.
fn set_hash(key: &[u8], value: &[u8], life: Life, present_only: bool) -> Vec<Cmd> {
    let kept = life == Life::Keep;
    if kept || present_only {
        let mut set = redis::cmd("EVAL");
        set.arg(REPLACE_HASH).arg(1).arg(key).arg(u8::from(present_only)).arg(u8::from(kept));
        fields(value).for_each(|(name, value)| _ = set.arg(name).arg(value));
        return vec![set];
    }
    let mut set = about("HSET", key);
    fields(value).for_each(|(name, value)| _ = set.arg(name).arg(value));
    // A hash without fields is no key.
    let set = Some(set).filter(|set| set.args_iter().len() > 2);
    iter::once(about("UNLINK", key)).chain(set).collect()
}

/// Its arguments: whether the key must exist, whether it keeps its TTL, then fields and values. In its last millisecond a key
/// has a PTTL of 0, and a PEXPIRE of 0 would delete it.
const REPLACE_HASH: &str = "\
if ARGV[1] == '1' and redis.call('EXISTS', KEYS[1]) == 0 then return end \
local left = ARGV[2] == '1' and redis.call('PTTL', KEYS[1]) or -1 \
redis.call('UNLINK', KEYS[1]) \
for i = 3, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end \
if left >= 0 then redis.call('PEXPIRE', KEYS[1], math.max(left, 1)) end";

/// Behind a command that sets no TTL by itself.
fn expire(key: &[u8], life: Life) -> Option<Cmd> {
    let (command, at) = match life {
        Life::Forever | Life::Keep => return None,
        Life::Ms(ms) => ("PEXPIRE", ms),
        Life::Until(at_ms) => ("PEXPIREAT", at_ms),
    };
    let mut expire = about(command, key);
    expire.arg(at);
    Some(expire)
}

fn about(command: &str, key: &[u8]) -> Cmd {
    let mut command = redis::cmd(command);
    command.arg(key);
    command
}

/// The command as one would type it into `redis-cli`.
pub fn show(command: &Cmd) -> String {
    let arguments = command.args_iter().map(|argument| match argument {
        redis::Arg::Simple(bytes) => quoted(bytes),
        _ => String::new(),
    });
    arguments.collect::<Vec<_>>().join(" ")
}

/// Bare where that is unambiguous, else in double quotes with the escapes that `redis-cli` reads.
pub fn quoted(bytes: &[u8]) -> String {
    let bare = |byte: &u8| byte.is_ascii_graphic() && !b"\"'\\".contains(byte);
    if !bytes.is_empty() && bytes.iter().all(bare) {
        return bytes.iter().copied().map(char::from).collect();
    }
    let mut out = String::from("\"");
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '"' | '\\' => out.extend(['\\', c]),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                c if c.is_control() => c.to_string().bytes().for_each(|byte| out.push_str(&format!("\\x{byte:02x}"))),
                c => out.push(c),
            }
        }
        chunk.invalid().iter().for_each(|byte| out.push_str(&format!("\\x{byte:02x}")));
    }
    out + "\""
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Limits, Of};
    use crate::config::tests::redis_config;

    fn batch(ops: &[(&str, Option<&str>, Option<u64>, bool)]) -> Vec<String> {
        encode(&made(ops), &redis_config("", &[]), |_| true).iter().map(show).collect()
    }

    fn made(ops: &[(&str, Option<&str>, Option<u64>, bool)]) -> Batch {
        let mut batch = Batch::new(Limits { ops: 100, bytes: 10_000 }, 1);
        for (key, value, ttl_ms, present_only) in ops {
            let cell = batch.cell(0, |out| {
                out.extend_from_slice(key.as_bytes());
                true
            });
            let cell = cell.expect("a key");
            if let Some(value) = value {
                let render = |out: &mut Vec<u8>| {
                    out.extend_from_slice(value.as_bytes());
                    Ok::<_, ()>(())
                };
                let life = ttl_ms.map_or(Life::Forever, Life::Ms);
                batch.set(cell, Form::String, life, *present_only, render).expect("a value");
            }
        }
        batch
    }

    #[test]
    fn plain_sets_and_deletes_are_one_command_each() {
        let commands = batch(&[
            ("a", Some("1"), None, false),
            ("b", None, None, false),
            ("c", Some(r#"{"x":"y z"}"#), None, false),
            ("d", None, None, false),
        ]);
        assert_eq!(commands, [r#"MSET a 1 c "{\"x\":\"y z\"}""#, "UNLINK b d"]);
    }

    #[test]
    fn a_ttl_or_a_condition_is_a_set_of_its_own() {
        let commands = batch(&[
            ("a", Some("1"), Some(1500), false),
            ("b", Some("1"), None, true),
            ("c", Some("1"), Some(9), true),
        ]);
        assert_eq!(commands, ["SET a 1 PX 1500", "SET b 1 XX", "SET c 1 PX 9 XX"]);
    }

    #[test]
    fn each_prefix_gets_the_same() {
        let batch =
            made(&[("v1:a", Some("1"), None, false), ("v1:b", None, None, false), ("v1:c", Some("1"), Some(9), true)]);
        let redis = redis_config("v1:", &["older:", "x"]);
        let commands: Vec<String> = encode(&batch, &redis, |_| true).iter().map(show).collect();
        assert_eq!(
            commands,
            [
                "SET v1:c 1 PX 9 XX",
                "SET older:c 1 PX 9 XX",
                "SET xc 1 PX 9 XX",
                "MSET v1:a 1 older:a 1 xa 1",
                "UNLINK v1:b older:b xb"
            ]
        );
        assert_eq!(keys(&batch, &redis).concat(), b"v1:av1:bv1:colder:aolder:bolder:cxaxbxc");
        let one = encode(&made(&[("v1:a", Some("1"), None, false)]), &redis_config("v1:", &["v0:"]), |_| true);
        assert_eq!(show(&one[0]), "MSET v1:a 1 v0:a 1", "never a SET of two keys");
    }

    #[test]
    fn a_tag_stays_where_nothing_can_be_written() {
        let mut batch = made(&[("a", Some("1"), None, false)]);
        for of in [Of::Set, Of::Tag] {
            let cell = batch.cell_of(0, of, |out| {
                out.extend_from_slice(format!("{of:?}").as_bytes());
                let key_end = out.len();
                out.extend_from_slice(b"a");
                Some(key_end)
            });
            batch.delete(cell.expect("a member"));
        }
        let commands: Vec<String> = encode(&batch, &redis_config("", &[]), |_| true).iter().map(show).collect();
        assert_eq!(commands, ["SET a 1", "SREM Set a", "SREM Tag a"]);
        assert_eq!(keys(&batch, &redis_config("", &[])), [b"a".to_vec(), b"Set".to_vec()]);
    }

    #[test]
    fn nothing_to_do_is_no_command() {
        assert!(batch(&[]).is_empty());
    }

    #[test]
    fn odd_bytes_show_as_redis_cli_reads_them() {
        for (bytes, shown) in [(&b""[..], "\"\""), (b"a\"\\\n\x01", r#""a\"\\\n\x01""#), (b"\xff ", r#""\xff ""#)] {
            assert_eq!(quoted(bytes), shown);
        }
    }
}
