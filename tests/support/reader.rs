//! An application that reads its cache all the time: a row's version must never go back (I3).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use redis::aio::MultiplexedConnection;
use tokio::task::JoinHandle;

use keepstep::cache::checkpoint::Checkpoint;

use super::{POLL, Stage, wait_for};

/// Polls keys whose values are JSON objects with an integer `version`.
pub(crate) struct Reader {
    done: Arc<AtomicBool>,
    seen: Arc<AtomicU64>,
    task: JoinHandle<Result<(), String>>,
}

impl Reader {
    /// Begins to read `key`, given without the prefix. Its version may never go back, whatever happens.
    pub(crate) fn follow(stage: &Stage, key: &str) -> Self {
        Self::begin(&stage.redis.url(), Poll::of(vec![key.to_owned()], false))
    }

    /// Begins to read keys through an address that may lead to another server later. A version may go back where history
    /// does: at a new epoch, and where Redis itself is another one with older data.
    pub(crate) fn follow_within_epochs(url: &str, keys: Vec<String>) -> Self {
        Self::begin(url, Poll::of(keys, true))
    }

    fn begin(url: &str, poll: Poll) -> Self {
        let (done, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let client = redis::Client::open(url).unwrap();
        let task = tokio::spawn(poll.run(client, Arc::clone(&done), Arc::clone(&seen)));
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
        self.verdict().await.unwrap_or_else(|went_back| panic!("{went_back}"))
    }

    /// The same, with the older version as an error.
    pub(crate) async fn verdict(self) -> Result<u64, String> {
        self.done.store(true, Ordering::Relaxed);
        self.task.await.unwrap()?;
        Ok(self.seen.load(Ordering::Relaxed))
    }
}

/// One unbroken history, in which no version may go back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct History {
    /// The server's `run_id`.
    server: String,
    /// The epoch of the checkpoint; `None` while there is none.
    epoch: Option<u64>,
}

/// What is known of a key in this history.
#[derive(Clone, Debug)]
enum Known {
    /// It holds what it held when the history began: written in another one, so no measure for this one.
    Inherited(String),
    /// No older version than this may come. A key that was never seen begins at the least of all.
    Newest(i64),
}

/// The keys, and what was seen of them.
struct Poll {
    /// The checkpoint's, and those that are followed.
    keys: Vec<String>,
    known: Vec<Known>,
    /// Whether an epoch begins a new history.
    by_epoch: bool,
    history: History,
}

impl Poll {
    fn of(keys: Vec<String>, by_epoch: bool) -> Self {
        let known = vec![Known::Newest(i64::MIN); keys.len()];
        let followed = keys.into_iter().map(|key| format!("{}{key}", Stage::PREFIX));
        let keys = std::iter::once(Checkpoint::key(Stage::PREFIX)).chain(followed).collect();
        Poll { keys, known, by_epoch, history: History::default() }
    }

    async fn run(mut self, client: redis::Client, done: Arc<AtomicBool>, seen: Arc<AtomicU64>) -> Result<(), String> {
        let mut connected: Option<(MultiplexedConnection, String)> = None;
        while !done.load(Ordering::Relaxed) {
            let Some((cache, server)) = &mut connected else {
                // Redis may be down just now.
                connected = connect(&client).await;
                tokio::time::sleep(POLL).await;
                continue;
            };
            // One command, so that values and checkpoint are of one moment.
            match redis::cmd("MGET").arg(&self.keys).query_async::<Vec<Option<String>>>(cache).await {
                Ok(values) => _ = seen.fetch_add(self.take(server, &values)?, Ordering::Relaxed),
                Err(_) => connected = None,
            }
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    /// Takes what one MGET has given, and gives the number of newer versions.
    fn take(&mut self, server: &str, values: &[Option<String>]) -> Result<u64, String> {
        let [checkpoint, values @ ..] = values else { unreachable!("MGET answers for each key") };
        if self.by_epoch {
            let stored = checkpoint.as_ref().map(|stored| Checkpoint::decode(stored.as_bytes()).unwrap());
            let history = History { server: server.to_owned(), epoch: stored.map(|checkpoint| checkpoint.epoch) };
            if self.history != history {
                self.history = history;
                self.known = values.iter().map(inherited).collect();
            }
        }
        let mut newer = 0;
        for ((key, known), value) in self.keys[1..].iter().zip(&mut self.known).zip(values) {
            newer += u64::from(known.take(value.as_deref()).map_err(|(newest, version)| {
                format!("{key} went back from version {newest} to {version}, in {:?}", self.history)
            })?);
        }
        Ok(newer)
    }
}

fn inherited(value: &Option<String>) -> Known {
    value.as_ref().map_or(Known::Newest(i64::MIN), |value| Known::Inherited(value.clone()))
}

impl Known {
    /// Whether the value is of a newer version; of an older one, both are the error.
    fn take(&mut self, value: Option<&str>) -> Result<bool, (i64, i64)> {
        let (newest, value) = match (&self, value) {
            (Known::Newest(_), None) => return Ok(false),
            (Known::Inherited(held), Some(value)) if held == value => return Ok(false),
            (Known::Inherited(_), value) => (i64::MIN, value),
            (Known::Newest(newest), value) => (*newest, value),
        };
        let version = value.map_or(i64::MIN, version);
        *self = Known::Newest(version.max(newest));
        if version < newest { Err((newest, version)) } else { Ok(version > newest) }
    }
}

fn version(value: &str) -> i64 {
    let row: serde_json::Value = serde_json::from_str(value).unwrap();
    row["version"].as_i64().unwrap()
}

/// A connection, and the `run_id` of the server that it led to.
async fn connect(client: &redis::Client) -> Option<(MultiplexedConnection, String)> {
    let mut cache = client.get_multiplexed_async_connection().await.ok()?;
    let info: String = redis::cmd("INFO").arg("server").query_async(&mut cache).await.ok()?;
    let server = info.lines().find_map(|line| line.strip_prefix("run_id:"))?.to_owned();
    Some((cache, server))
}

/// It must be able to fail, and only where it should.
#[cfg(test)]
mod tests {
    use super::*;
    use keepstep::cache::checkpoint::Origin;
    use keepstep::model::{Lsn, Position};

    fn checkpoint(epoch: u64) -> String {
        let origin = Origin { system: "1".into(), timeline: 1, database: "postgres".into(), slot: "keepstep".into() };
        let (end, version) = (Position::end(Lsn(1)), Checkpoint::VERSION);
        let (rules, owing) = (String::new(), Default::default());
        let checkpoint = Checkpoint {
            version,
            origin,
            epoch,
            applied: end,
            low: Lsn(1),
            good: end,
            rules,
            written_us: 0,
            owing,
            released: Position::default(),
            progress: None,
            drains: Vec::new(),
            gap: None,
        };
        String::from_utf8(checkpoint.encode()).unwrap()
    }

    /// What it says of these moments: the server's name, the epoch, the version.
    fn read(moments: &[(&str, u64, Option<i64>)]) -> Result<u64, String> {
        let mut poll = Poll::of(vec!["row".to_owned()], true);
        moments.iter().try_fold(0, |newer, (server, epoch, version)| {
            let value = version.map(|version| format!(r#"{{"version":{version}}}"#));
            Ok(newer + poll.take(server, &[Some(checkpoint(*epoch)), value])?)
        })
    }

    #[test]
    fn within_an_epoch_a_version_may_not_go_back() {
        assert_eq!(read(&[("a", 1, None), ("a", 1, Some(1)), ("a", 1, Some(2)), ("a", 1, Some(2))]), Ok(2));
        let error = read(&[("a", 1, None), ("a", 1, Some(2)), ("a", 1, None), ("a", 1, Some(1))]).unwrap_err();
        assert!(error.starts_with("test:row went back from version 2 to 1, in History"), "{error}");
    }

    #[test]
    fn what_an_epoch_found_is_no_measure_for_what_it_writes() {
        let begun = [("a", 1, None), ("a", 1, Some(9)), ("a", 2, Some(9)), ("a", 2, Some(3)), ("a", 2, Some(4))];
        assert_eq!(read(&begun), Ok(3));
        assert!(read(&[&begun[..], &[("a", 2, Some(3))]].concat()).is_err());
        let emptied = [("a", 1, Some(9)), ("a", 2, None), ("a", 2, Some(3))];
        assert_eq!(read(&emptied), Ok(1));
        assert!(read(&[&emptied[..], &[("a", 2, Some(2))]].concat()).is_err());
    }

    #[test]
    fn another_server_may_be_an_older_one() {
        assert_eq!(read(&[("a", 1, None), ("a", 1, Some(9)), ("b", 1, Some(7)), ("b", 1, Some(8))]), Ok(2));
    }

    #[test]
    fn without_epochs_it_may_never_go_back() {
        let mut poll = Poll::of(vec!["row".to_owned()], false);
        let mut take =
            |epoch, version| poll.take("a", &[Some(checkpoint(epoch)), Some(format!(r#"{{"version":{version}}}"#))]);
        assert_eq!((take(1, 1), take(2, 2)), (Ok(1), Ok(1)));
        assert!(take(3, 1).is_err());
    }
}
