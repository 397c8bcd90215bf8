//! What a Redis server says of itself, and what stands under the prefix: for `check --connect`, and for a first start.

use std::collections::BTreeMap;

use redis::{Cmd, Value};

use crate::config::RedisConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::rules::template::RESERVED;

use super::connection::{Connection, Failure};
use super::writer::{into_error, scan};

/// Every command that keepstep sends, as an ACL names it; AUTH needs no permission.
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
        Value::BulkString(info) => Ok(RedisFacts::parse(&String::from_utf8_lossy(&info))),
        Value::VerbatimString { text, .. } => Ok(RedisFacts::parse(&text)),
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
pub fn acl_line(config: &RedisConfig) -> String {
    let commands = COMMANDS.map(|command| format!("+{command}")).join(" ");
    let keys = config.prefixes().map(|prefix| format!("~{prefix}*")).collect::<Vec<_>>().join(" ");
    format!("ACL SETUSER keepstep on >PASSWORD resetkeys {keys} resetchannels -@all {commands}")
}

/// Tries each kind of command on a key of keepstep's own that is never kept, so that a missing permission shows before
/// the first batch.
pub async fn try_commands(config: &RedisConfig) -> Result<()> {
    let attempt = async {
        let mut connection = Connection::open(config).await?;
        for prefix in config.prefixes() {
            connection.send(trial(&format!("{prefix}{RESERVED}none"))).await?;
        }
        Ok(())
    };
    attempt.await.map_err(into_error)
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
    let command = |words: &[&str]| {
        let mut command = Cmd::new();
        words.iter().for_each(|word| _ = command.arg(*word));
        command
    };
    commands.map(command).into()
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
