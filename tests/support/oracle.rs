//! The oracle is Postgres: what `row_to_json` gives for each row is what its key must hold, and there is no other key.

use std::collections::HashSet;
use std::pin::pin;
use std::time::Instant;

use futures_util::StreamExt;
use redis::AsyncCommands;
use redis::aio::MultiplexedConnection;

use super::{LIMIT, POLL, Sentinels, Stage};

/// A rule in SQL: which key a row has, and which columns are its value.
pub(crate) struct Mirror<'a> {
    /// The table, as in FROM.
    pub(crate) table: &'a str,
    /// An expression for the key without the prefix, as `'product:' || id`.
    pub(crate) key: &'a str,
    /// The columns, as in SELECT.
    pub(crate) columns: &'a str,
}

/// How many rows are compared at a time.
const CHUNK: usize = 1000;
/// How many differences a failing test shows.
const SHOWN: usize = 10;

/// Waits until every key under the prefix equals its row, and no row lacks its key.
pub(crate) async fn assert_in_step(stage: &Stage, mirrors: &[Mirror<'_>]) {
    let began = Instant::now();
    loop {
        let differences = differences(stage, mirrors).await;
        if differences.is_empty() {
            return;
        }
        let shown = &differences[..differences.len().min(SHOWN)];
        assert!(began.elapsed() < LIMIT, "{} differences, among them {shown:#?}", differences.len());
        tokio::time::sleep(POLL).await;
    }
}

/// Every key that is not what its row says, one line each. keepstep's own keys do not count, and sentinels stay.
pub(crate) async fn differences(stage: &Stage, mirrors: &[Mirror<'_>]) -> Vec<String> {
    let mut cache = stage.cache().await;
    let mut present = keys(&mut cache, &format!("{}*", Stage::PREFIX)).await;
    present.retain(|key| !key.starts_with(&format!("{}keepstep:", Stage::PREFIX)) && !Sentinels::include(key));
    let mut found = Vec::new();
    for mirror in mirrors {
        compare(stage, mirror, &mut cache, &mut present, &mut found).await;
    }
    found.extend(present.iter().map(|key| format!("{key}: has no row")));
    found
}

/// Compares the rows of one table, and takes their keys from those `present`.
async fn compare(
    stage: &Stage,
    Mirror { table, key, columns }: &Mirror<'_>,
    cache: &mut MultiplexedConnection,
    present: &mut HashSet<String>,
    found: &mut Vec<String>,
) {
    let sql = stage.sql().await;
    sql.batch_execute("set timezone = 'UTC'; set datestyle = 'ISO'; set intervalstyle = 'postgres'").await.unwrap();
    let query = format!(
        "select '{}' || {key}, (select row_to_json(selected)::text from (select {columns}) selected) from {table}",
        Stage::PREFIX
    );
    let rows = sql.query_raw(&query, std::iter::empty::<&str>()).await.unwrap();
    let mut chunks = pin!(rows.map(|row| row.unwrap()).chunks(CHUNK));
    while let Some(rows) = chunks.next().await {
        let keys: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        // MGET shows a key of another type as missing, which is a difference too.
        let values: Vec<Option<String>> = cache.mget(&keys).await.unwrap();
        for ((row, key), value) in rows.iter().zip(keys).zip(values) {
            let expected: &str = row.get(1);
            present.remove(&key);
            match value {
                Some(value) if value == expected => {}
                Some(value) => found.push(format!("{key}: holds {value}, its row is {expected}")),
                None => found.push(format!("{key}: is missing, its row is {expected}")),
            }
        }
    }
}

/// Every key that matches a glob pattern.
async fn keys(cache: &mut MultiplexedConnection, pattern: &str) -> HashSet<String> {
    let mut found = HashSet::new();
    let mut cursor = 0;
    loop {
        let mut scan = redis::cmd("SCAN");
        scan.arg(cursor).arg("MATCH").arg(pattern).arg("COUNT").arg(CHUNK);
        let (next, batch): (u64, Vec<String>) = scan.query_async(cache).await.unwrap();
        found.extend(batch);
        cursor = next;
        if cursor == 0 {
            return found;
        }
    }
}
