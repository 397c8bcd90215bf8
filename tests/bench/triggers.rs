//! What an outbox costs who writes: pgbench on tables with its triggers, next to the same tables without.

use crate::stand::Stand;
use crate::{Figure, median};

/// How pgbench asks, its clients, and the least share of transactions that must be left. Prepared statements make the transactions cheap,
/// and so the triggers dear: that is shown, and the target is for what pgbench does unless told otherwise.
const RUNS: [(&str, usize, Option<f64>); 3] =
    [("simple", 1, Some(0.75)), ("simple", 16, Some(0.6)), ("prepared", 1, None)];
/// They take turns so often: what else the machine does shows more here than elsewhere.
const ROUNDS: usize = 9;

pub(crate) fn measure(quick: bool) -> Vec<Figure> {
    let stand = Stand::start(&[]);
    for database in ["plain", "captured"] {
        stand.sql(&format!("create database {database}"));
        pgbench(&stand, &["-i", "-q", "-s", if quick { "4" } else { "20" }, database]);
    }
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/sql/outbox.sql");
    let made = stand.postgres.command("psql").args(["-Xq", "-d", "captured", "-f", file]).output().expect("psql");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    for table in ["accounts", "branches", "tellers", "history"] {
        in_outbox(&stand, &format!("select keepstep.follow('pgbench_{table}')"));
    }
    RUNS.iter().map(|run| measured(&stand, run, if quick { "2" } else { "6" })).collect()
}

fn measured(stand: &Stand, (protocol, clients, least): &(&str, usize, Option<f64>), seconds: &str) -> Figure {
    let count = clients.to_string();
    let run = |database| pgbench(stand, &["-n", "-M", protocol, "-j", "2", "-T", seconds, "-c", &count, database]);
    let rounds: Vec<(f64, f64)> = (0..ROUNDS)
        .map(|_| {
            let pair = (transactions_per_s(&run("captured")), transactions_per_s(&run("plain")));
            // As a daemon would, so that every round begins with an empty one.
            for _ in 0..2 {
                in_outbox(stand, "select keepstep.rotate(pg_current_snapshot())");
            }
            pair
        })
        .collect();
    let (value, baseline) = (median(&rounds, |round| round.0), median(&rounds, |round| round.1));
    let clients = if *clients == 1 { "1 client".to_owned() } else { format!("{clients} clients") };
    let name = format!("pgbench -M {protocol} with triggers, {clients} (tps)");
    match least {
        Some(least) => Figure::ratio_at_least(name, value, baseline, *least),
        None => Figure::shown(name, value, baseline),
    }
}

fn in_outbox(stand: &Stand, sql: &str) {
    let output =
        stand.postgres.command("psql").args(["-XqAtv", "ON_ERROR_STOP=1", "-d", "captured", "-c", sql]).output();
    let output = output.expect("psql");
    assert!(output.status.success(), "{sql}\n{}", String::from_utf8_lossy(&output.stderr));
}

fn pgbench(stand: &Stand, arguments: &[&str]) -> String {
    let output = stand.postgres.command("pgbench").args(arguments).output().expect("pgbench");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// From its last line, `tps = 1234.5 (without initial connection time)`.
fn transactions_per_s(output: &str) -> f64 {
    let number = output.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
    number.expect("pgbench says how many")
}
