//! How fast tables are read: to fill an empty cache, and to compare a full one.
//!
//! Filling is measured against what one would do by hand for an empty Redis: `psql` copies lines that are ready to be
//! executed into `redis-cli --pipe`. Starting counts for both.

use std::process::{Command, Stdio};
use std::time::Instant;

use crate::stand::{Program, Stand, json_rules};
use crate::{Figure, ROUNDS, median};

pub(crate) fn measure(quick: bool) -> Vec<Figure> {
    let stand = Stand::start(&[]);
    let rows = if quick { 200_000 } else { 1_000_000 };
    stand.sql("create table narrow (id bigint primary key, n int, name text)");
    stand.sql(&format!("insert into narrow select g, g, 'name ' || g from generate_series(1, {rows}) g"));
    // Rendered beforehand: psql and Postgres only copy, and a value holds nothing that COPY or Redis would escape.
    stand.sql("create table ready as select format('SET bench:narrow:%s ''%s''', id, row_to_json(narrow)) from narrow");
    stand.sql("vacuum analyze narrow");
    stand.sql("vacuum analyze ready");
    stand.publish("narrow", "narrow");
    let (mut warmed, mut piped, mut verified) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        stand.flush();
        piped.push(rows as f64 / pipe(&stand, rows));
        stand.flush();
        stand.copy_slot("narrow", "narrow_warm");
        warmed.push(rows as f64 / run(&stand, &["run", "--until-caught-up"]));
        assert_eq!(keys(&stand), rows, "every row has its key");
        verified.push(rows as f64 / run(&stand, &["verify"]));
        stand.drop_slot("narrow_warm");
    }
    let rate = |rates: &[f64]| median(rates, |rate| *rate);
    let (warmed, piped, verified) = (rate(&warmed), rate(&piped), rate(&verified));
    vec![
        Figure::ratio_at_least("warm; baseline: psql into redis-cli --pipe (rows/s)", warmed, piped, 1.0),
        Figure::ratio_at_least("verify; baseline: warm (rows/s)", verified, warmed, 1.0),
    ]
}

/// Runs keepstep to its end; gives the seconds.
fn run(stand: &Stand, arguments: &[&str]) -> f64 {
    let rules = stand.rules_that(true, "narrow_warm", &json_rules("narrow", "id", 1));
    let mut command = Command::new(env!("CARGO_BIN_EXE_keepstep"));
    command.args(arguments).arg("-c").arg(rules).env("KEEPSTEP_LOG", "warn").stdout(Stdio::null());
    Program::start(&mut command).finish().0
}

/// How many keys rows have: keepstep's own are left out.
fn keys(stand: &Stand) -> usize {
    let mut redis = stand.redis();
    let all: usize = redis::cmd("DBSIZE").query(&mut redis).expect("DBSIZE");
    let own: Vec<String> = redis::cmd("KEYS").arg("bench:keepstep:*").query(&mut redis).expect("KEYS");
    all - own.len()
}

/// `psql … | redis-cli --pipe`; gives the seconds.
fn pipe(stand: &Stand, rows: usize) -> f64 {
    let began = Instant::now();
    let mut psql = stand.postgres.command("psql");
    let copy = psql.args(["-XqAt", "-c", "copy ready to stdout"]).stdout(Stdio::piped()).spawn();
    let mut copy = copy.expect("psql");
    let mut redis = Command::new("redis-cli");
    redis.args(["-p", &stand.redis.port.to_string(), "--pipe"]).stdin(copy.stdout.take().expect("a pipe"));
    let output = redis.output().expect("redis-cli");
    let seconds = began.elapsed().as_secs_f64();
    assert!(copy.wait().is_ok_and(|status| status.success()), "psql");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains(&format!("errors: 0, replies: {rows}")), "redis-cli said {said}");
    seconds
}
