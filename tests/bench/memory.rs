//! The most memory that was ever resident; the baseline is the same daemon while it has nothing to do.

use std::process::{Command, Stdio};
use std::time::Duration;

use crate::Figure;
use crate::stand::{Program, Stand, json_rules};

const LIMIT_MIB: f64 = 64.0;

pub(crate) fn measure(quick: bool) -> Vec<Figure> {
    let stand = Stand::start(&[]);
    let large = if quick { 500_000 } else { 10_000_000 };
    let outage = Duration::from_secs(if quick { 4 } else { 60 });
    let mut figures = vec![large_transaction(&stand, large), many_rules(&stand), redis_away(outage)];
    figures.extend(reads(&stand, if quick { 200_000 } else { 2_000_000 }));
    figures
}

/// Starts the daemon with so many rules on the table; also gives what it needs while it has nothing to do.
fn start(stand: &Stand, name: &str, table: &str, key: &str, rules: usize) -> (Program, f64) {
    stand.publish(name, table);
    stand.flush();
    let program = stand.keepstep(name, &json_rules(table, key, rules));
    caught_up(stand, &program, &format!("{name}-begin"));
    let idle_mib = program.resident_mib();
    (program, idle_mib)
}

/// Waits until a change made now is in Redis.
fn caught_up(stand: &Stand, program: &Program, mark: &str) {
    stand.mark(mark);
    stand.wait_for_mark(program, mark);
}

fn figure(measure: String, program: Program, idle_mib: f64) -> Figure {
    let peak_mib = program.peak_mib();
    program.end();
    Figure::value(measure, peak_mib, idle_mib, "<= 64 MiB", |mib| mib <= LIMIT_MIB)
}

fn large_transaction(stand: &Stand, rows: usize) -> Figure {
    stand.sql("create table large (id bigint primary key, n int, name text)");
    let (program, idle_mib) = start(stand, "large", "large", "id", 1);
    stand.sql(&format!("insert into large select g, g, 'name ' || g from generate_series(1, {rows}) g"));
    caught_up(stand, &program, "large-end");
    let figure = figure(format!("memory, one transaction of {rows} rows (MiB)"), program, idle_mib);
    stand.drop_slot("large");
    stand.sql("drop table large");
    figure
}

fn many_rules(stand: &Stand) -> Figure {
    stand.sql("create table ruled (id bigint primary key, n int, name text)");
    let (program, idle_mib) = start(stand, "ruled", "ruled", "id", 1000);
    stand.sql("insert into ruled select g, g, 'name ' || g from generate_series(1, 500) g");
    caught_up(stand, &program, "ruled-end");
    let figure = figure("memory, 1000 rules on one table (MiB)".to_owned(), program, idle_mib);
    stand.drop_slot("ruled");
    figure
}

/// Redis is away while pgbench works as fast as it can.
fn redis_away(outage: Duration) -> Figure {
    // It comes back with what it had.
    let mut stand = Stand::start(&["--appendonly", "yes", "--appendfsync", "no"]);
    pgbench(&stand, &["-i", "-q", "-s", "10"]);
    let (program, idle_mib) = start(&stand, "away", "pgbench_accounts", "aid", 1);
    pgbench(&stand, &["-n", "-c", "4", "-T", "2"]);
    stand.redis.stop("TERM").expect("Redis ends");
    pgbench(&stand, &["-n", "-c", "4", "-T", &outage.as_secs().to_string()]);
    stand.redis.resume().expect("Redis starts");
    caught_up(&stand, &program, "away-end");
    figure(format!("memory, Redis away for {} s under pgbench (MiB)", outage.as_secs()), program, idle_mib)
}

/// All rows are read: to fill an empty cache, and to compare a full one, orphans included.
fn reads(stand: &Stand, rows: usize) -> [Figure; 2] {
    stand.sql("create table read (id bigint primary key, n int, name text)");
    let (program, idle_mib) = start(stand, "read", "read", "id", 1);
    program.end();
    stand.sql(&format!("insert into read select g, g, 'name ' || g from generate_series(1, {rows}) g"));
    stand.sql("vacuum analyze read");
    stand.flush();
    let rules = stand.rules_that(true, "read", &json_rules("read", "id", 1));
    ["run --until-caught-up", "verify"].map(|arguments| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keepstep"));
        command.args(arguments.split(' ')).arg("-c").arg(&rules).env("KEEPSTEP_LOG", "warn").stdout(Stdio::null());
        let peak_mib = Program::start(&mut command).peak_of_all_mib();
        let what = if arguments == "verify" { "verify" } else { "warm" };
        let measure = format!("memory, {what} of {rows} rows (MiB)");
        Figure::value(measure, peak_mib, idle_mib, "<= 64 MiB", |mib| mib <= LIMIT_MIB)
    })
}

fn pgbench(stand: &Stand, arguments: &[&str]) {
    let mut command = stand.postgres.command("pgbench");
    let status = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
    assert!(status.is_ok_and(|status| status.success()), "pgbench {arguments:?}");
}
