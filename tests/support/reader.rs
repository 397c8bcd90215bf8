//! An application that reads its cache all the time: a row's version must never go back (I3).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use redis::AsyncCommands;
use redis::aio::MultiplexedConnection;
use tokio::task::JoinHandle;

use super::{POLL, Stage, wait_for};

/// Polls one key whose value is a JSON object with an integer `version`.
pub(crate) struct Reader {
    done: Arc<AtomicBool>,
    seen: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Reader {
    /// Begins to read `key`, given without the prefix.
    pub(crate) fn follow(stage: &Stage, key: &str) -> Self {
        let (done, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let client = redis::Client::open(stage.redis.url()).unwrap();
        let task = tokio::spawn(poll(client, format!("{}{key}", Stage::PREFIX), done.clone(), seen.clone()));
        Reader { done, seen, task }
    }

    /// Whether it has stopped by itself, as it does at a version that went back.
    pub(crate) fn has_ended(&self) -> bool {
        self.task.is_finished()
    }

    /// Waits until it has seen more than one version.
    pub(crate) async fn sees_several(&self) {
        wait_for("a second version", async || {
            (self.has_ended() || self.seen.load(Ordering::Relaxed) > 1).then_some(())
        })
        .await;
    }

    /// How many different versions it has seen. Panics if one was older than another seen before it.
    pub(crate) async fn finish(self) -> u64 {
        self.done.store(true, Ordering::Relaxed);
        self.task.await.unwrap_or_else(|failed| std::panic::resume_unwind(failed.into_panic()));
        self.seen.load(Ordering::Relaxed)
    }
}

async fn poll(client: redis::Client, key: String, done: Arc<AtomicBool>, seen: Arc<AtomicU64>) {
    let mut newest = i64::MIN;
    let mut cache: Option<MultiplexedConnection> = None;
    while !done.load(Ordering::Relaxed) {
        let read = match &mut cache {
            Some(connection) => connection.get::<_, Option<String>>(&key).await,
            None => {
                // Redis may be down just now.
                cache = client.get_multiplexed_async_connection().await.ok();
                tokio::time::sleep(POLL).await;
                continue;
            }
        };
        match read {
            Ok(Some(value)) => {
                let row: serde_json::Value = serde_json::from_str(&value).unwrap();
                let version = row["version"].as_i64().unwrap();
                assert!(version >= newest, "{key} went back from version {newest} to {version}");
                seen.fetch_add(u64::from(version > newest), Ordering::Relaxed);
                newest = version;
            }
            Ok(None) => {}
            Err(_) => cache = None,
        }
        tokio::task::yield_now().await;
    }
}
