//! How fast a backlog drains into Redis, and what that costs: against `pg_recvlogical`, which writes the same backlog
//! to /dev/null.
//!
//! Each round reads from a fresh copy of the slot, so that all see the same log. A last change marks the end: keepstep
//! is done when its key is there, `pg_recvlogical` when it has passed the position behind it. Starting counts for both.

use std::time::Instant;

use redis::Commands;

use crate::stand::{Program, Stand};
use crate::stream::Replay;
use crate::{Figure, median};

const ROUNDS: usize = 3;

/// A kind of backlog.
struct Backlog {
    /// Also the name of table, publication and slot.
    name: &'static str,
    shape: &'static str,
    table: &'static str,
    /// Makes the backlog of `N` single-row changes.
    changes: &'static str,
    full: usize,
    quick: usize,
    rules: &'static [Rules],
}

/// Rules that are measured on a backlog.
struct Rules {
    title: &'static str,
    /// How often `TEXT` stands in the file, with its number for `#`.
    count: usize,
    text: &'static str,
    /// Whether this row stands for the cost in CPU time too.
    cpu: bool,
    /// Whether Redis is what it waits for: then the same without Redis is measured too.
    recorded: bool,
}

const NARROW: &str = "[rule.r#]\ntable = \"public.narrow\"\nkey = \"r#:{id}\"\nvalue = \"json\"\ncolumns = [\"*\"]\n";

const BACKLOGS: [Backlog; 3] = [
    Backlog {
        name: "narrow",
        shape: "narrow inserts",
        table: "create table narrow (id bigint primary key, n int, name text)",
        changes: "do $$ begin for i in 1..N/1000 loop \
             insert into narrow select i * 1000 + g, g, 'name ' || g from generate_series(1, 1000) g; \
             commit; end loop; end $$",
        full: 1_000_000,
        quick: 100_000,
        rules: &[
            Rules { title: "json rule", count: 1, text: NARROW, cpu: true, recorded: false },
            Rules { title: "10 json rules", count: 10, text: NARROW, cpu: false, recorded: true },
            Rules {
                title: "delete rule",
                count: 1,
                text: "[rule.r#]\ntable = \"public.narrow\"\ndelete = [\"r#:{id}\"]\n",
                cpu: false,
                recorded: false,
            },
        ],
    },
    Backlog {
        name: "accounts",
        shape: "updates, 4 a transaction",
        table: "create table accounts (id int primary key, branch int, balance int, filler char(84)); \
             insert into accounts select g, 1, 0, '' from generate_series(1, 100000) g",
        changes: "do $$ begin for i in 1..N/4 loop \
             update accounts set balance = balance + i where id = 1 + (i * 7) % 100000; \
             update accounts set balance = balance + i where id = 1 + (i * 13) % 100000; \
             update accounts set balance = balance - i where id = 1 + (i * 31) % 100000; \
             update accounts set balance = balance - i where id = 1 + i % 10; \
             commit; end loop; end $$",
        full: 1_000_000,
        quick: 100_000,
        rules: &[Rules {
            title: "json rule",
            count: 1,
            text: "[rule.r#]\ntable = \"public.accounts\"\nkey = \"r#:{id}\"\nvalue = \"json\"\ncolumns = [\"*\"]\n",
            cpu: true,
            recorded: false,
        }],
    },
    Backlog {
        name: "wide",
        shape: "1 KB rows",
        table: "create table wide (id bigint primary key, body text); alter table wide alter body set storage plain",
        changes: "do $$ begin for i in 1..N/1000 loop \
             insert into wide select i * 1000 + g, repeat(md5(g::text), 32) from generate_series(1, 1000) g; \
             commit; end loop; end $$",
        full: 1_000_000,
        quick: 50_000,
        rules: &[Rules {
            title: "json rule",
            count: 1,
            text: "[rule.r#]\ntable = \"public.wide\"\nkey = \"r#:{id}\"\nvalue = \"json\"\ncolumns = [\"*\"]\n",
            cpu: false,
            recorded: false,
        }],
    },
];

/// One round's outcome.
struct Drained {
    rows_per_s: f64,
    cpu_s_per_million: f64,
}

pub(crate) fn measure(quick: bool) -> Vec<Figure> {
    let stand = Stand::start(&[]);
    BACKLOGS.iter().flat_map(|backlog| measure_backlog(&stand, backlog, quick)).collect()
}

fn measure_backlog(stand: &Stand, backlog: &Backlog, quick: bool) -> Vec<Figure> {
    let Backlog { name, .. } = backlog;
    let rows = if quick { backlog.quick } else { backlog.full };
    stand.sql(backlog.table);
    stand.sql("create table if not exists last (id text primary key)");
    stand.sql(&format!("create publication {name} for table {name}, last"));
    stand.sql(&format!("select pg_create_logical_replication_slot('{name}', 'pgoutput')"));
    stand.sql(&backlog.changes.replace('N', &rows.to_string()));
    stand.sql(&format!("insert into last values ('{name}')"));
    let end = stand.sql("select pg_current_wal_flush_lsn()");

    let mut theirs = Vec::new();
    let mut recorded = Vec::new();
    let mut ours: Vec<Vec<Drained>> = backlog.rules.iter().map(|_| Vec::new()).collect();
    for round in 0..ROUNDS {
        let slot = format!("{name}_{round}");
        theirs.push(in_turn(stand, name, &slot, rows, |slot| recvlogical(stand, slot, &end)));
        for (rules, drained) in backlog.rules.iter().zip(&mut ours) {
            drained.push(in_turn(stand, name, &slot, rows, |slot| keepstep(stand, slot, backlog, rules)));
            if rules.recorded {
                recorded.push(in_turn(stand, name, &slot, rows, |slot| record(stand, slot, rows, rules)));
            }
        }
    }
    stand.drop_slot(name);
    stand.sql(&format!("truncate {name}"));
    let figures = backlog.rules.iter().zip(&ours).flat_map(|(rules, ours)| {
        let recorded = if rules.recorded { recorded.as_slice() } else { &[] };
        figures(stand, backlog, rules, ours, recorded, &theirs)
    });
    figures.collect()
}

/// Seconds, and seconds of CPU.
type Cost = (f64, f64);

/// Drains a copy of the slot.
fn in_turn(stand: &Stand, name: &str, copy: &str, rows: usize, drain: impl FnOnce(&str) -> Cost) -> Drained {
    stand.copy_slot(name, copy);
    let (seconds, cpu_s) = drain(copy);
    stand.drop_slot(copy);
    Drained { rows_per_s: rows as f64 / seconds, cpu_s_per_million: cpu_s * 1e6 / rows as f64 }
}

fn recvlogical(stand: &Stand, slot: &str, end: &str) -> Cost {
    let program = Program::start(stand.recvlogical(slot, "/dev/null").args(["--endpos", end]));
    program.wait_for_end();
    (program.elapsed_s(), program.cpu_s())
}

fn keepstep(stand: &Stand, slot: &str, backlog: &Backlog, rules: &Rules) -> Cost {
    let mut redis = stand.redis();
    redis::cmd("FLUSHALL").arg("SYNC").exec(&mut redis).expect("FLUSHALL");
    let last = "[rule.last]\ntable = \"public.last\"\nkey = \"last:{id}\"\nvalue = \"json\"\ncolumns = [\"*\"]\n";
    let program = stand.keepstep(slot, &(rules.text() + last));
    let last_key = format!("bench:last:{}", backlog.name);
    program.wait_until(|| redis.exists(&last_key).expect("Redis"));
    let cost = (program.elapsed_s(), program.cpu_s());
    program.end();
    cost
}

/// The same up to the commands, which nobody gets.
fn record(stand: &Stand, slot: &str, rows: usize, rules: &Rules) -> Cost {
    let (began, mut replay) = (Instant::now(), Replay::of_rules(&rules.text()));
    stand.receive(slot, &rules.text(), rows, |frame| {
        replay.take(frame);
        std::hint::black_box(replay.send_if_full());
    });
    // In this process, whose time is nobody's cost.
    (began.elapsed().as_secs_f64(), 0.0)
}

impl Rules {
    fn text(&self) -> String {
        (0..self.count).map(|number| self.text.replace('#', &number.to_string())).collect()
    }
}

/// Of the values that narrow rows become.
const VALUE_BYTES: usize = 60;

fn figures(
    stand: &Stand,
    backlog: &Backlog,
    rules: &Rules,
    ours: &[Drained],
    recorded: &[Drained],
    theirs: &[Drained],
) -> Vec<Figure> {
    let what = format!("{}, {}", backlog.shape, rules.title);
    let pick = |pick: fn(&Drained) -> f64| (median(ours, pick), median(theirs, pick));
    let (value, baseline) = pick(|drained| drained.rows_per_s);
    let mut figures = vec![Figure::ratio_at_least(format!("drain {what} (rows/s)"), value, baseline, 0.9)];
    if !recorded.is_empty() {
        let value = median(recorded, |drained| drained.rows_per_s);
        figures.push(Figure::shown("  the same, recorded and not written (rows/s)", value, baseline));
        let (keys_per_s, of_redis) =
            (rules.count as f64 * pick(|d| d.rows_per_s).0, stand.redis_benchmark(500_000, VALUE_BYTES));
        figures.push(Figure::shown("  in keys, beside redis-benchmark's (keys/s)", keys_per_s, of_redis));
    }
    if rules.cpu {
        let (value, baseline) = pick(|drained| drained.cpu_s_per_million);
        figures.push(Figure::ratio_at_most(format!("CPU, {what} (s per million)"), value, baseline, 1.5));
    }
    figures
}
