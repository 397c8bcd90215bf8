//! How fast a backlog drains into Redis, and what that costs: against `pg_recvlogical`, which writes the same backlog
//! to /dev/null.
//!
//! Each round reads from a fresh copy of the slot, so that all see the same log. A last change marks the end: keepstep
//! is done when its key is there, `pg_recvlogical` when it has passed the position behind it. Starting counts for both.

use std::time::Instant;

use crate::stand::{Program, Stand, json_rules};
use crate::stream::Replay;
use crate::{Figure, ROUNDS, median};

/// Of the values that narrow rows become: `{"id":500123,"n":123,"name":"name 123"}`.
const VALUE_BYTES: usize = 40;

/// A kind of backlog.
struct Backlog {
    /// Also the name of table, publication and slot.
    name: &'static str,
    shape: &'static str,
    table: &'static str,
    /// Makes the backlog of `{rows}` single-row changes.
    changes: &'static str,
    full: usize,
    quick: usize,
    rules: &'static [Rules],
}

/// Rules that are measured on a backlog.
struct Rules {
    title: &'static str,
    text: fn(&str) -> String,
    /// How many keys a change concerns.
    keys: usize,
    /// What else is shown of them.
    aside: Aside,
}

enum Aside {
    Nothing,
    Cpu,
    /// Redis is what it waits for: the same without Redis, and how fast Redis can be.
    Limit,
}

const JSON: Rules =
    Rules { title: "json rule", text: |table| json_rules(table, "id", 1), keys: 1, aside: Aside::Nothing };
const TEN: Rules =
    Rules { title: "10 json rules", text: |table| json_rules(table, "id", 10), keys: 10, aside: Aside::Limit };
const DELETE: Rules = Rules {
    title: "delete rule",
    text: |table| format!("[rule.stale]\ntable = \"public.{table}\"\ndelete = [\"{table}:{{id}}\"]\n"),
    ..JSON
};

const BACKLOGS: [Backlog; 3] = [
    Backlog {
        name: "narrow",
        shape: "narrow inserts",
        table: "create table narrow (id bigint primary key, n int, name text)",
        changes: "do $$ begin for i in 1..{rows}/1000 loop \
             insert into narrow select i * 1000 + g, g, 'name ' || g from generate_series(1, 1000) g; \
             commit; end loop; end $$",
        full: 1_000_000,
        quick: 100_000,
        rules: &[Rules { aside: Aside::Cpu, ..JSON }, TEN, DELETE],
    },
    Backlog {
        name: "accounts",
        shape: "updates, 4 a transaction",
        table: "create table accounts (id int primary key, branch int, balance int, filler char(84)); \
             insert into accounts select g, 1, 0, '' from generate_series(1, 100000) g",
        changes: "do $$ begin for i in 1..{rows}/4 loop \
             update accounts set balance = i where id = 1 + (i * 7) % 100000; \
             update accounts set balance = i where id = 1 + (i * 13) % 100000; \
             update accounts set balance = i where id = 1 + (i * 31) % 100000; \
             update accounts set balance = i where id = 1 + i % 10; \
             commit; end loop; end $$",
        full: 1_000_000,
        quick: 100_000,
        rules: &[Rules { aside: Aside::Cpu, ..JSON }],
    },
    Backlog {
        name: "wide",
        shape: "1 KB rows",
        table: "create table wide (id bigint primary key, body text); alter table wide alter body set storage plain",
        changes: "do $$ begin for i in 1..{rows}/1000 loop \
             insert into wide select i * 1000 + g, repeat(md5(g::text), 32) from generate_series(1, 1000) g; \
             commit; end loop; end $$",
        full: 1_000_000,
        quick: 50_000,
        rules: &[JSON],
    },
];

/// One round's outcome.
struct Drained {
    rows_per_s: f64,
    cpu_s_per_million: f64,
}

/// All rounds of some rules.
#[derive(Default)]
struct Rounds {
    drained: Vec<Drained>,
    /// For [`Aside::Limit`]: without Redis, and `redis-benchmark`'s keys a second.
    recorded: Vec<Drained>,
    redis_per_s: Vec<f64>,
}

pub(crate) fn measure(quick: bool) -> Vec<Figure> {
    let stand = Stand::start(&[]);
    BACKLOGS.iter().flat_map(|backlog| measure_backlog(&stand, backlog, quick)).collect()
}

fn measure_backlog(stand: &Stand, backlog: &Backlog, quick: bool) -> Vec<Figure> {
    let Backlog { name, .. } = backlog;
    let rows = if quick { backlog.quick } else { backlog.full };
    stand.sql(backlog.table);
    stand.publish(name, name);
    stand.sql(&backlog.changes.replace("{rows}", &rows.to_string()));
    stand.mark(name);
    let end = stand.sql("select pg_current_wal_flush_lsn()");
    let mut theirs = Vec::new();
    let mut ours: Vec<Rounds> = backlog.rules.iter().map(|_| Rounds::default()).collect();
    for _ in 0..ROUNDS {
        theirs.push(in_turn(stand, name, rows, |slot| recvlogical(stand, slot, &end)));
        for (rules, ours) in backlog.rules.iter().zip(&mut ours) {
            let text = (rules.text)(name);
            ours.drained.push(in_turn(stand, name, rows, |slot| keepstep(stand, slot, name, &text)));
            if matches!(rules.aside, Aside::Limit) {
                ours.recorded.push(in_turn(stand, name, rows, |slot| record(stand, slot, rows, &text)));
                ours.redis_per_s.push(stand.redis_benchmark(rows, VALUE_BYTES));
            }
        }
    }
    stand.drop_slot(name);
    stand.sql(&format!("truncate {name}"));
    backlog.rules.iter().zip(&ours).flat_map(|(rules, ours)| figures(backlog.shape, rules, ours, &theirs)).collect()
}

/// Seconds, and seconds of CPU.
type Cost = (f64, f64);

/// Drains a copy of the slot.
fn in_turn(stand: &Stand, slot: &str, rows: usize, drain: impl FnOnce(&str) -> Cost) -> Drained {
    let copy = format!("{slot}_copy");
    stand.copy_slot(slot, &copy);
    let (seconds, cpu_s) = drain(&copy);
    stand.drop_slot(&copy);
    Drained { rows_per_s: rows as f64 / seconds, cpu_s_per_million: cpu_s * 1e6 / rows as f64 }
}

fn recvlogical(stand: &Stand, slot: &str, end: &str) -> Cost {
    let program = Program::start(stand.recvlogical(slot, "/dev/null").args(["--endpos", end]));
    program.finish()
}

fn keepstep(stand: &Stand, slot: &str, mark: &str, rules: &str) -> Cost {
    stand.flush();
    let program = stand.keepstep(slot, rules);
    stand.wait_for_mark(&program, mark);
    let cost = (program.elapsed_s(), program.cpu_s());
    program.end();
    cost
}

/// The same up to the commands, which nobody gets.
fn record(stand: &Stand, slot: &str, rows: usize, rules: &str) -> Cost {
    let (began, mut replay) = (Instant::now(), Replay::of_rules(rules));
    stand.receive(slot, rules, rows, |frame| {
        replay.take(frame);
        std::hint::black_box(replay.send_if_full());
    });
    // In this process, whose time is nobody's cost.
    (began.elapsed().as_secs_f64(), 0.0)
}

fn figures(shape: &str, rules: &Rules, ours: &Rounds, theirs: &[Drained]) -> Vec<Figure> {
    let what = format!("{shape}, {}", rules.title);
    let rate = |rounds: &[Drained]| median(rounds, |drained| drained.rows_per_s);
    let cpu = |rounds: &[Drained]| median(rounds, |drained| drained.cpu_s_per_million);
    let (value, baseline) = (rate(&ours.drained), rate(theirs));
    let mut figures = vec![Figure::ratio_at_least(format!("drain {what} (rows/s)"), value, baseline, 0.9)];
    match rules.aside {
        Aside::Nothing => {}
        Aside::Cpu => {
            let measure = format!("CPU, {what} (s per million)");
            figures.push(Figure::ratio_at_most(measure, cpu(&ours.drained), cpu(theirs), 1.5));
        }
        Aside::Limit => {
            let recorded = rate(&ours.recorded);
            figures.push(Figure::shown("  the same, recorded and not written (rows/s)", recorded, baseline));
            let (keys_per_s, redis_per_s) = (value * rules.keys as f64, median(&ours.redis_per_s, |rate| *rate));
            figures.push(Figure::shown("  in keys, beside redis-benchmark (keys/s)", keys_per_s, redis_per_s));
        }
    }
    figures
}
