//! What a Redis server says of itself, and what stands under the prefix: for `check --connect`, and for a first start.

use std::collections::BTreeMap;

use redis::{Cmd, Value as Reply};

use crate::config::{Config, Life, RedisConfig, RowForm, Rule, Value, WriteAction};
use crate::error::{Error, ErrorKind, Result};
use crate::rules::template::RESERVED;

use super::connection::{Connection, Failure};
use super::writer::{into_error, scan};

/// The commands that any rules file needs, as an ACL names them; AUTH needs no permission.
const COMMANDS: [&str; 18] = [
    "type",
    "dbsize",
    "pttl",
    "mget",
    "select",
    "info",
    "scan",
    "get",
    "set",
    "mset",
    "unlink",
    "multi",
    "exec",
    "watch",
    "unwatch",
    "eval",
    "wait",
    "memory|usage",
];

/// What some rules need besides: the commands as an ACL names them, and a trial of each that leaves nothing behind. `KEY` stands
/// for a key, or a channel.
struct Extra {
    acl: &'static [&'static str],
    trial: &'static [&'static [&'static str]],
}

const HASH: Extra = Extra { acl: &["hset", "hgetall"], trial: &[&["HSET", "KEY", "a", ""], &["HGETALL", "KEY"]] };
const SET: Extra = Extra {
    acl: &["sadd", "srem", "sismember", "sscan"],
    trial: &[&["SADD", "KEY", "a"], &["SISMEMBER", "KEY", "a"], &["SSCAN", "KEY", "0"], &["SREM", "KEY", "a"]],
};
const SORTED_SET: Extra = Extra {
    acl: &["zadd", "zrem", "zscore", "zscan"],
    trial: &[&["ZADD", "KEY", "0", "a"], &["ZSCORE", "KEY", "a"], &["ZSCAN", "KEY", "0"], &["ZREM", "KEY", "a"]],
};
const JSON: Extra = Extra {
    acl: &["json.set", "json.get", "persist"],
    trial: &[&["JSON.SET", "KEY", "$", "1"], &["JSON.GET", "KEY"], &["PERSIST", "KEY"]],
};
const EXPIRE: Extra =
    Extra { acl: &["pexpire", "pexpireat"], trial: &[&["PEXPIRE", "KEY", "1000"], &["PEXPIREAT", "KEY", "1000"]] };
const STREAM: Extra = Extra { acl: &["xadd"], trial: &[&["XADD", "KEY", "*", "a", ""]] };
const PUBLISH: Extra = Extra { acl: &["publish"], trial: &[&["PUBLISH", "KEY", ""]] };

/// What these rules need.
fn extras(rules: &[Rule]) -> Vec<&'static Extra> {
    let values: Vec<&WriteAction> = rules.iter().filter_map(|rule| rule.write.as_ref()).collect();
    let has = |test: &dyn Fn(&Value) -> bool| values.iter().any(|write| test(&write.value));
    let form = |form| move |value: &Value| matches!(value, Value::Row(row) if row.form == form);
    let sorted =
        |sorted| move |value: &Value| matches!(value, Value::Member { score, .. } if score.is_some() == sorted);
    let composite = |write: &&&WriteAction| matches!(&write.value, Value::Row(row) if row.form != RowForm::Json);
    let needed = [
        (has(&form(RowForm::Hash)), &HASH),
        (has(&sorted(false)) || rules.iter().any(Rule::has_tags), &SET),
        (has(&sorted(true)), &SORTED_SET),
        (has(&form(RowForm::Rejson)), &JSON),
        (values.iter().filter(composite).any(|write| matches!(write.life, Life::Ttl(..) | Life::Until(_))), &EXPIRE),
        (rules.iter().any(|rule| rule.settled.stream.is_some()), &STREAM),
        (rules.iter().any(|rule| rule.settled.publish.is_some()), &PUBLISH),
    ];
    needed.into_iter().filter(|(needed, _)| *needed).map(|(_, extra)| extra).collect()
}

/// What INFO says, as far as it matters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisFacts {
    /// `Redis` or `Valkey`.
    pub product: &'static str,
    /// Its version.
    pub version: String,
    /// Whether it is the primary.
    pub is_primary: bool,
    /// Whether it is a node of a Cluster.
    pub is_cluster: bool,
    /// `maxmemory`, in bytes; 0 is no limit.
    pub maxmemory: u64,
    /// `maxmemory-policy`
    pub eviction: String,
    /// Whether an append-only file is kept.
    pub append_only: bool,
    /// Reads of keys that were there, by whomever, since the server started.
    pub hits: u64,
    /// The same of keys that were not.
    pub misses: u64,
}

impl RedisFacts {
    /// Whether this version is supported: Redis 6.2, Valkey 7.2, and later.
    pub fn is_supported(&self) -> bool {
        let mut parts = self.version.split('.').map(|part| part.parse().unwrap_or(0));
        let version: (u32, u32) = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        version >= if self.product == "Valkey" { (7, 2) } else { (6, 2) }
    }

    /// From the text of INFO.
    fn parse(info: &str) -> Self {
        let fields: BTreeMap<&str, &str> = info.lines().filter_map(|line| line.trim_end().split_once(':')).collect();
        let field = |name| fields.get(name).copied().unwrap_or_default();
        let valkey = fields.contains_key("valkey_version");
        RedisFacts {
            product: if valkey { "Valkey" } else { "Redis" },
            version: field(if valkey { "valkey_version" } else { "redis_version" }).to_owned(),
            is_primary: field("role") == "master",
            is_cluster: field("cluster_enabled") == "1",
            maxmemory: field("maxmemory").parse().unwrap_or(0),
            eviction: field("maxmemory_policy").to_owned(),
            append_only: field("aof_enabled") == "1",
            hits: field("keyspace_hits").parse().unwrap_or(0),
            misses: field("keyspace_misses").parse().unwrap_or(0),
        }
    }
}

/// Asks for INFO.
pub async fn facts(config: &RedisConfig) -> Result<RedisFacts> {
    let ask = async {
        let mut connection = Connection::open(config).await?;
        connection.send_one(redis::cmd("INFO")).await
    };
    match ask.await.map_err(into_error)? {
        Reply::BulkString(info) => Ok(RedisFacts::parse(&String::from_utf8_lossy(&info))),
        Reply::VerbatimString { text, .. } => Ok(RedisFacts::parse(&text)),
        _ => Err(Error::new(ErrorKind::Protocol, "Redis answered INFO with something else than text")),
    }
}

/// Keys under the prefix, keepstep's own left out: all of them, or at least `enough`.
pub async fn keys(config: &RedisConfig, enough: usize) -> Result<Vec<Vec<u8>>> {
    let look = async {
        let mut connection = Connection::open(config).await?;
        let (prefix, own) = (config.prefix.as_bytes(), format!("{}{RESERVED}", config.prefix));
        let mut found = Vec::new();
        let mut cursor = 0;
        loop {
            let (next, keys) = scan(&mut connection, cursor, b"*").await?;
            let ours = |key: &Vec<u8>| key.starts_with(prefix) && !key.starts_with(own.as_bytes());
            found.extend(keys.into_iter().filter(ours));
            if next == 0 || found.len() >= enough {
                return Ok::<_, Failure>(found);
            }
            cursor = next;
        }
    };
    look.await.map_err(into_error)
}

/// The ACL that lets a user do just what keepstep does.
pub fn acl_line(config: &Config) -> String {
    let more = extras(&config.rules);
    let commands = COMMANDS.iter().chain(more.iter().flat_map(|extra| extra.acl));
    let commands: Vec<String> = commands.map(|command| format!("+{command}")).collect();
    let under = |sign: char| config.redis.prefixes().map(move |prefix| format!("{sign}{prefix}*")).collect::<Vec<_>>();
    let publishes = more.iter().any(|extra| extra.acl == PUBLISH.acl);
    let channels = if publishes { under('&') } else { Vec::new() };
    let keys =
        [vec!["resetkeys".to_owned()], under('~'), vec!["resetchannels".to_owned()], channels].concat().join(" ");
    format!("ACL SETUSER keepstep on >PASSWORD {keys} -@all {}", commands.join(" "))
}

/// Tries each kind of command on a key of keepstep's own that is never kept, so that a missing permission shows before
/// the first batch.
pub async fn try_commands(config: &Config) -> Result<()> {
    let attempt = async {
        let mut connection = Connection::open(&config.redis).await?;
        for prefix in config.redis.prefixes() {
            let key = format!("{prefix}{RESERVED}none");
            connection.send(trial(&key)).await?;
            for extra in extras(&config.rules) {
                let on_key =
                    |words: &&[&str]| command(words.iter().map(|word| if *word == "KEY" { &key } else { *word }));
                let commands = extra.trial.iter().map(on_key).chain([command(["UNLINK", key.as_str()])]);
                connection.send(commands).await?;
            }
        }
        Ok(())
    };
    attempt.await.map_err(into_error)
}

fn command<'w>(words: impl IntoIterator<Item = &'w str>) -> Cmd {
    let mut command = Cmd::new();
    words.into_iter().for_each(|word| _ = command.arg(word));
    command
}

/// Every kind of command on this key, which is gone at the end.
fn trial(key: &str) -> Vec<Cmd> {
    let script = "redis.call('UNLINK', KEYS[1]) redis.call('SET', KEYS[1], '') redis.call('UNLINK', KEYS[1]) return 1";
    let commands: [&[&str]; 16] = [
        &["UNWATCH"],
        &["EVAL", script, "1", key],
        &["DBSIZE"],
        &["PTTL", key],
        &["TYPE", key],
        &["MGET", key],
        &["WATCH", key],
        &["GET", key],
        &["MULTI"],
        &["MSET", key, ""],
        &["SET", key, "", "PX", "1000"],
        &["UNLINK", key],
        &["EXEC"],
        &["WAIT", "0", "1"],
        &["SCAN", "0", "COUNT", "1"],
        &["MEMORY", "USAGE", key],
    ];
    commands.map(|words| command(words.iter().copied())).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_of_either_product() {
        let redis = RedisFacts::parse(
            "# Server\r\nredis_version:7.0.15\r\nrole:master\r\nmaxmemory:0\r\nmaxmemory_policy:noeviction\r\n",
        );
        assert_eq!((redis.product, redis.version.as_str(), redis.is_primary), ("Redis", "7.0.15", true));
        assert!(redis.is_supported());
        let valkey = RedisFacts::parse("redis_version:7.2.4\r\nvalkey_version:8.0.1\r\nrole:slave\r\n");
        assert_eq!((valkey.product, valkey.version.as_str(), valkey.is_primary), ("Valkey", "8.0.1", false));
        for (version, supported) in [("6.0.16", false), ("6.2.0", true), ("8.4.0", true), ("", false)] {
            assert_eq!(RedisFacts::parse(&format!("redis_version:{version}")).is_supported(), supported, "{version}");
        }
    }
}
