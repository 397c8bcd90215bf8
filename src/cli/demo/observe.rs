//! What the demo sees of the keys: whether they equal their rows, and how soon.

use std::fmt;
use std::pin::pin;
use std::time::Duration;

use anyhow::Result;
use futures_util::StreamExt;
use redis::AsyncCommands;
use redis::aio::MultiplexedConnection;
use tokio_postgres::Client;

use super::milliseconds;
use super::stand::PREFIX;

/// How many rows are compared at a time.
const CHUNK: usize = 1000;

/// A rule of the demo in SQL: which key a row has, and which columns are its value.
pub(super) struct Mirror {
    pub(super) table: &'static str,
    /// An expression for the key without the prefix.
    pub(super) key: &'static str,
    /// As in SELECT.
    pub(super) columns: &'static str,
}

/// How many rows the table has, and how many of them have a key that equals their `row_to_json`.
pub(super) async fn rows_in_step(
    sql: &Client,
    cache: &mut MultiplexedConnection,
    Mirror { table, key, columns }: &Mirror,
) -> Result<(usize, usize)> {
    let query = format!(
        "select '{PREFIX}' || {key}, (select row_to_json(picked)::text from (select {columns}) picked) from {table}"
    );
    let rows = sql.query_raw(&query, std::iter::empty::<&str>()).await?;
    let mut chunks = pin!(rows.chunks(CHUNK));
    let (mut total, mut equal) = (0, 0);
    while let Some(chunk) = chunks.next().await {
        let rows = chunk.into_iter().collect::<Result<Vec<_>, _>>()?;
        let keys: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
        let values: Vec<Option<String>> = cache.mget(&keys).await?;
        total += rows.len();
        equal += rows.iter().zip(values).filter(|(row, value)| value.as_deref() == row.get(1)).count();
    }
    Ok((total, equal))
}

/// Delays from commit to visible key, under one condition.
pub(super) struct Delays {
    condition: &'static str,
    measured: Vec<Duration>,
}

impl Delays {
    pub(super) fn new(condition: &'static str) -> Self {
        Delays { condition, measured: Vec::new() }
    }

    pub(super) fn add(&mut self, delay: Duration) {
        self.measured.push(delay);
    }

    /// The delay that this share of the changes does not exceed; zero where nothing was measured.
    fn percentile(&self, percent: usize) -> Duration {
        let mut sorted = self.measured.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
        sorted.get(rank).copied().unwrap_or_default()
    }
}

impl fmt::Display for Delays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (p50, p99) = (milliseconds(self.percentile(50)), milliseconds(self.percentile(99)));
        write!(f, "  {:<22}{:>10}{p50:>12}{p99:>12}", self.condition, self.measured.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_sorted_delays() {
        let mut delays = Delays::new("test");
        assert_eq!(delays.percentile(99), Duration::ZERO);
        (1..=200).rev().for_each(|ms| delays.add(Duration::from_millis(ms)));
        assert_eq!(delays.percentile(50), Duration::from_millis(100));
        assert_eq!(delays.percentile(99), Duration::from_millis(198));
        assert_eq!(delays.percentile(100), Duration::from_millis(200));
    }
}
