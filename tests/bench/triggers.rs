//! What an outbox costs who writes: pgbench on tables with its triggers, next to the same tables without. And how a backlog
//! drains from it, next to the same from a slot, and what it leaves.

use std::fs;
use std::process::{Command, Stdio};

use crate::stand::{Program, Stand, json_rules};
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
    let mut figures: Vec<Figure> =
        RUNS.iter().map(|run| measured(&stand, run, if quick { "2" } else { "6" })).collect();
    figures.extend(drained(if quick { 100_000 } else { 1_000_000 }));
    figures
}

/// So much may be left of an outbox that is read, in MiB: two empty indexes.
const LEFT_MIB: f64 = 0.1;
/// What both halves of the outbox take up.
const SIZE: &str = "select pg_total_relation_size('keepstep.outbox_0') + pg_total_relation_size('keepstep.outbox_1')";

fn drained(rows: usize) -> [Figure; 2] {
    let stand = Stand::start(&[]);
    stand.sql("create table narrow (id bigint primary key, n int, name text)");
    stand.publish("narrow", "narrow");
    let folder = stand.postgres.folder();
    let (postgres, redis) = (stand.postgres.url("postgres"), stand.redis.url());
    let rules = format!(
        "[postgres]\nurl = \"{postgres}\"\nsource = \"outbox\"\n[redis]\nurl = \"{redis}\"\nprefix = \"bench:\"\n\
         [admin]\nlisten = \"off\"\n[defaults]\nwarm = false\n{}{}",
        json_rules("narrow", "id", 1),
        json_rules("mark", "id", 1)
    );
    let path = folder.join("outbox.toml");
    fs::write(&path, rules).expect("the rules file");
    let keepstep = |command: &str| {
        let mut keepstep = Command::new(env!("CARGO_BIN_EXE_keepstep"));
        keepstep.arg(command).arg("-c").arg(&path).env("KEEPSTEP_LOG", "warn").stdout(Stdio::null());
        keepstep
    };
    assert!(keepstep("setup").status().is_ok_and(|status| status.success()), "keepstep setup");
    stand.sql(&format!(
        "do $$ begin for i in 1..{rows}/1000 loop \
         insert into narrow select i * 1000 + g, g, 'name ' || g from generate_series(1, 1000) g; commit; end loop; end $$"
    ));
    stand.mark("end");
    let mib = || stand.sql(SIZE).parse::<f64>().expect("a number of bytes") / f64::from(1 << 20);
    let full_mib = mib();
    let program = Program::start(&mut keepstep("run"));
    stand.wait_for_mark(&program, "end");
    let outbox_s = program.elapsed_s();
    program.wait_until(|| {
        std::thread::sleep(std::time::Duration::from_millis(200));
        mib() <= LEFT_MIB || program.elapsed_s() > 60.0 + outbox_s
    });
    let left_mib = mib();
    program.end();
    stand.flush();
    let program = stand.keepstep("narrow", &json_rules("narrow", "id", 1));
    stand.wait_for_mark(&program, "end");
    let rate = |seconds: f64| rows as f64 / seconds;
    [
        Figure::shown("drain an outbox, against a slot (rows/s)", rate(outbox_s), rate(program.elapsed_s())),
        Figure::value(
            format!("outbox of {rows} changes when drained, and before (MiB)"),
            left_mib,
            full_mib,
            "<= 0.1 MiB",
            |left| left <= LEFT_MIB,
        ),
    ]
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
