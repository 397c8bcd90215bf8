//! Transactions larger than any buffer.

use std::time::{Duration, Instant};

use redis::AsyncCommands;

use crate::support::{Daemon, Stage};

const ROWS: &str = r#"
[rule.row]
table   = "public.rows"
key     = "row:{id}"
value   = "json"
columns = ["id", "name"]
"#;

/// `KEEPSTEP_SOAK=1` makes it two million rows.
fn rows() -> u64 {
    if std::env::var_os("KEEPSTEP_SOAK").is_some() { 2_000_000 } else { 200_000 }
}

#[tokio::test]
async fn one_large_transaction_flows_through_in_constant_memory() {
    let stage = Stage::set();
    stage.execute("create table rows (id int primary key, name text)").await;
    let rules = stage.rules(ROWS);
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(&stage, &rules).await;
    let rows = rows();
    stage.execute(&format!("insert into rows select i, 'name ' || i from generate_series(1, {rows}) i")).await;
    let mut cache = stage.cache().await;
    let began = Instant::now();
    loop {
        let held: Option<String> = cache.get(format!("{}row:{rows}", Stage::PREFIX)).await.unwrap();
        if held.is_some() {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(180), "the last row did not arrive");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Every row, keepstep's own four keys (checkpoint, fence, rules, catalog), and no other.
    let keys: u64 = redis::cmd("DBSIZE").query_async(&mut cache).await.unwrap();
    assert_eq!(keys, rows + 4);
    for id in [1, 2, rows / 2, rows] {
        let held: String = cache.get(format!("{}row:{id}", Stage::PREFIX)).await.unwrap();
        assert_eq!(held, format!(r#"{{"id":{id},"name":"name {id}"}}"#));
    }
    let peak = daemon.resident_peak_kib();
    assert!(peak < 64 << 10, "{peak} KiB");
}
