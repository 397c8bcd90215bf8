//! Keys that no rule owns, next to those that rules do: nothing may ever touch them (I7).

use redis::AsyncCommands;

use super::Stage;

/// Keys that the templates `row:{id}` and `list:{bucket}` under [`Stage::PREFIX`] come close to: other prefixes, what a
/// template would make of no integer, keys that go on behind an integer, and the characters of glob patterns.
const NAMES: [&str; 17] = [
    "row:1",
    "other:row:1",
    "tes:row:1",
    "test:v2:row:1",
    "test:row",
    "test:row:",
    "test:row:x1",
    "test:row:1x",
    "test:row:1.5",
    "test:row:1:cart",
    "test:row:1\n",
    "test:row:*",
    "test:Row:1",
    "test:rows:1",
    "test:list:",
    "test:list:1:page:2",
    "test:list:[0-9]",
];

/// The keys as they were placed.
pub(crate) struct Sentinels {
    dumps: Vec<Vec<u8>>,
}

impl Sentinels {
    /// Places them anew.
    pub(crate) async fn place(stage: &Stage) -> Self {
        let mut cache = stage.cache().await;
        let mut dumps = Vec::new();
        for (name, number) in NAMES.into_iter().zip(0_usize..) {
            // A plain string, and a type that no rule writes.
            let () = cache.del(name).await.unwrap();
            let () = match number % 2 {
                0 => cache.set(name, r#"{"id":1,"version":0}"#).await.unwrap(),
                _ => cache.hset(name, "id", 1).await.unwrap(),
            };
            dumps.push(redis::cmd("DUMP").arg(name).query_async(&mut cache).await.unwrap());
        }
        Sentinels { dumps }
    }

    /// Each has the type, the content and the endless life that it was given.
    pub(crate) async fn assert_untouched(&self, stage: &Stage) {
        let mut cache = stage.cache().await;
        for (name, placed) in NAMES.into_iter().zip(&self.dumps) {
            let found: Option<Vec<u8>> = redis::cmd("DUMP").arg(name).query_async(&mut cache).await.unwrap();
            assert!(found.as_ref() == Some(placed), "{name:?} belongs to no rule, and was changed or deleted");
            let lives_ms: i64 = cache.pttl(name).await.unwrap();
            assert_eq!(lives_ms, -1, "{name:?} belongs to no rule, and was given a TTL");
        }
    }

    /// Whether this is such a key: it has no row, and that is right.
    pub(crate) fn include(key: &str) -> bool {
        NAMES.contains(&key)
    }
}
