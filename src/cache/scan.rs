//! Every key under the prefix, some at a time.

use redis::Value;

use super::connection::Connection;
use super::writer::{into_error, scan};
use crate::config::RedisConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::rules::pattern::Pattern;
use crate::rules::template::RESERVED;

/// A SCAN under way. It shows every key that is there from its beginning to its end, some of them twice.
pub struct Scan {
    connection: Connection,
    glob: Vec<u8>,
    own: String,
    cursor: Option<u64>,
}

impl Scan {
    /// Begins, on a connection of its own.
    pub async fn open(config: &RedisConfig) -> Result<Self> {
        let connection = Connection::open(config).await.map_err(into_error)?;
        let glob = Pattern::beginning_with(config.prefix.as_bytes()).scan_glob();
        Ok(Scan { connection, glob, own: format!("{}{RESERVED}", config.prefix), cursor: Some(0) })
    }

    /// Some keys, maybe none, keepstep's own left out; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Vec<Vec<u8>>>> {
        let Some(cursor) = self.cursor else { return Ok(None) };
        let (next, mut keys) = scan(&mut self.connection, cursor, &self.glob).await.map_err(into_error)?;
        self.cursor = Some(next).filter(|next| *next != 0);
        keys.retain(|key| !key.starts_with(self.own.as_bytes()));
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
