//! Every key under the prefixes, some at a time.

use redis::Value;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::connection::{Connection, Failure};
use super::writer::{into_error, scan};
use crate::config::RedisConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::rules::pattern::Pattern;
use crate::rules::template::RESERVED;

/// A SCAN under way, of one prefix after the other. It shows every key that is there from its beginning to its end, some
/// of them twice. Redis looks for the next ones while what it found is dealt with.
pub struct Scan {
    pages: mpsc::Receiver<Result<Page, Failure>>,
    task: AbortHandle,
    /// For members, while the task looks for keys.
    connection: Connection,
    prefixes: Vec<String>,
}

/// A walk through the members of one key, under each prefix.
pub struct Members {
    connection: Connection,
    /// The keys that are still to be gone through, in reverse.
    keys: Vec<Vec<u8>>,
    sorted: bool,
    cursor: Vec<u8>,
}

/// How many members a step of the walk through a set asks for.
const MEMBERS_AT_A_TIME: usize = 1000;

/// Keys, as under the main prefix.
type Page = Vec<Vec<u8>>;

impl Scan {
    /// Begins, on a connection of its own: through the keys that begin so under the main prefix, and so behind each other one.
    pub async fn open(config: &RedisConfig, beginning: &[u8]) -> Result<Self> {
        let mut connection = Connection::open(config).await.map_err(into_error)?;
        let prefixes: Vec<String> = config.prefixes().map(str::to_owned).collect();
        let (sender, pages) = mpsc::channel(1);
        let (of_members, of_walk) = (connection.clone(), prefixes.clone());
        let bare = beginning.strip_prefix(prefixes[0].as_bytes()).unwrap_or_default().to_vec();
        let task = tokio::spawn(async move {
            if let Err(failure) = walk(&mut connection, &of_walk, &bare, &sender).await {
                // Nobody listens any more if this fails.
                let _ = sender.send(Err(failure)).await;
            }
        });
        Ok(Scan { pages, task: task.abort_handle(), connection: of_members, prefixes })
    }

    /// The members of a set, or of a sorted set.
    pub fn members(&self, key: &[u8], sorted: bool) -> Members {
        let bare = &key[self.prefixes[0].len()..];
        let keys = self.prefixes.iter().rev().map(|prefix| [prefix.as_bytes(), bare].concat()).collect();
        Members { connection: self.connection.clone(), keys, sorted, cursor: b"0".to_vec() }
    }

    /// Some keys, maybe none, keepstep's own left out; `None` at the end. Whatever prefix a key has, it is given as under the
    /// main one: each is written and deleted under all of them.
    pub async fn next(&mut self) -> Result<Option<Page>> {
        let page = self.pages.recv().await.transpose().map_err(into_error)?;
        // The question for the next ones goes out first.
        tokio::task::yield_now().await;
        Ok(page)
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

impl Members {
    /// Some members, maybe none, some of them twice; `None` at the end. A key of another type has none.
    pub async fn next(&mut self) -> Result<Option<Vec<Vec<u8>>>> {
        let Some(key) = self.keys.last() else { return Ok(None) };
        let mut scan = redis::cmd(if self.sorted { "ZSCAN" } else { "SSCAN" });
        scan.arg(key).arg(&self.cursor).arg("COUNT").arg(MEMBERS_AT_A_TIME);
        let reply = match self.connection.send_one(scan).await {
            Err(Failure::WrongType) => None,
            reply => Some(reply.map_err(into_error)?),
        };
        let page: Option<(Vec<u8>, Vec<Vec<u8>>)> =
            reply.map(redis::from_redis_value).transpose().map_err(|error| {
                let message = "Redis answered SSCAN or ZSCAN with something else than a cursor and members";
                Error::new(ErrorKind::Protocol, message).because(error)
            })?;
        let (cursor, found) = page.unwrap_or_else(|| (b"0".to_vec(), Vec::new()));
        if cursor == b"0" {
            self.keys.pop();
        }
        self.cursor = cursor;
        // Between the members of a sorted set stand their scores.
        let step = if self.sorted { 2 } else { 1 };
        Ok(Some(found.into_iter().step_by(step).collect()))
    }
}

impl Drop for Scan {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Ends early when nobody listens any more.
async fn walk(
    connection: &mut Connection,
    prefixes: &[String],
    bare: &[u8],
    pages: &mpsc::Sender<Result<Page, Failure>>,
) -> Result<(), Failure> {
    for prefix in prefixes {
        let glob = Pattern::beginning_with(&[prefix.as_bytes(), bare].concat()).scan_glob();
        let mut cursor = 0;
        loop {
            let (next, keys) = scan(connection, cursor, &glob).await?;
            let page = keys.into_iter().filter_map(|key| under_main(key, prefix, &prefixes[0])).collect();
            if pages.send(Ok(page)).await.is_err() {
                return Ok(());
            }
            cursor = next;
            if cursor == 0 {
                break;
            }
        }
    }
    Ok(())
}

/// The key as it is under the main prefix; `None` for one of keepstep's own.
fn under_main(key: Vec<u8>, prefix: &str, main: &str) -> Option<Vec<u8>> {
    let bare = key.strip_prefix(prefix.as_bytes()).filter(|bare| !bare.starts_with(RESERVED.as_bytes()))?;
    Some(if prefix == main { key } else { [main.as_bytes(), bare].concat() })
}
