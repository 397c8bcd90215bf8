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
}

/// Keys, as under the main prefix.
type Page = Vec<Vec<u8>>;

impl Scan {
    /// Begins, on a connection of its own.
    pub async fn open(config: &RedisConfig) -> Result<Self> {
        let mut connection = Connection::open(config).await.map_err(into_error)?;
        let prefixes: Vec<String> = config.prefixes().map(str::to_owned).collect();
        let (sender, pages) = mpsc::channel(1);
        let task = tokio::spawn(async move {
            if let Err(failure) = walk(&mut connection, &prefixes, &sender).await {
                // Nobody listens any more if this fails.
                let _ = sender.send(Err(failure)).await;
            }
        });
        Ok(Scan { pages, task: task.abort_handle() })
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

impl Drop for Scan {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Ends early when nobody listens any more.
async fn walk(
    connection: &mut Connection,
    prefixes: &[String],
    pages: &mpsc::Sender<Result<Page, Failure>>,
) -> Result<(), Failure> {
    for prefix in prefixes {
        let glob = Pattern::beginning_with(prefix.as_bytes()).scan_glob();
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
