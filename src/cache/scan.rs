//! Every key under the prefixes, some at a time.

use redis::Value;

use super::connection::Connection;
use super::writer::{into_error, scan};
use crate::config::RedisConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::rules::pattern::Pattern;
use crate::rules::template::RESERVED;

/// A SCAN under way, of one prefix after the other. It shows every key that is there from its beginning to its end, some
/// of them twice.
pub struct Scan {
    connection: Connection,
    main: String,
    /// Those that are still to be gone through, in reverse.
    prefixes: Vec<String>,
    cursor: u64,
}

impl Scan {
    /// Begins, on a connection of its own.
    pub async fn open(config: &RedisConfig) -> Result<Self> {
        let connection = Connection::open(config).await.map_err(into_error)?;
        let mut prefixes: Vec<String> = config.prefixes().map(str::to_owned).collect();
        prefixes.reverse();
        Ok(Scan { connection, main: config.prefix.clone(), prefixes, cursor: 0 })
    }

    /// Some keys, maybe none, keepstep's own left out; `None` at the end. Whatever prefix a key has, it is given as under the
    /// main one: each is written and deleted under all of them.
    pub async fn next(&mut self) -> Result<Option<Vec<Vec<u8>>>> {
        let Some(prefix) = self.prefixes.last() else { return Ok(None) };
        let glob = Pattern::beginning_with(prefix.as_bytes()).scan_glob();
        let (next, keys) = scan(&mut self.connection, self.cursor, &glob).await.map_err(into_error)?;
        let bare = |key: Vec<u8>| key.strip_prefix(prefix.as_bytes()).map(<[u8]>::to_vec);
        let rules = keys.into_iter().filter_map(bare).filter(|key| !key.starts_with(RESERVED.as_bytes()));
        let keys = rules.map(|key| [self.main.as_bytes(), &key].concat()).collect();
        self.cursor = next;
        if next == 0 {
            self.prefixes.pop();
        }
        Ok(Some(keys))
    }

    /// How many keys the database has, those of others included.
    pub async fn key_count(config: &RedisConfig) -> Result<u64> {
        let count = async { Connection::open(config).await?.send_one(redis::cmd("DBSIZE")).await };
        match count.await.map_err(into_error)? {
            Value::Int(count) => Ok(u64::try_from(count).unwrap_or(0)),
            _ => Err(Error::new(ErrorKind::Protocol, "Redis answered DBSIZE with something else than a number")),
        }
    }
}
