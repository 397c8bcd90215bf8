//! `make instructions`: the regression guard. It counts instructions and allocations, which noise does not move.
//!
//! Each case runs itself under valgrind, once for some rounds of its stream and once for twice as many; the difference
//! is what the changes cost, without start and binding, and with buffers that have grown. Hash seeds are random, and
//! move the counts by less than a percent; compilers differ by more, so a ceiling stands about 3 % over what was
//! measured.

#![expect(clippy::print_stdout, reason = "the table is what it is for")]

use std::process::{Command, ExitCode};

use stream::{Action, NARROW, Operation, PGBENCH, Replay, Shape, Stream, WIDE};

#[expect(dead_code, reason = "the benchmark with servers uses the rest of it")]
mod stream;

/// Rounds whose cost is not counted, and as many that are.
const ROUNDS: usize = 2;
/// A ceiling that is so much higher than what it limits has to come down, or it would let a regression through.
const SLACK: f64 = 0.2;

const DECODE_CEILING: f64 = 385.0;

const CASES: &[Case] = &[
    Case { limit: Limit::Ceiling(DECODE_CEILING), work: Work::Decode, ..case("decode", NARROW) },
    Case { limit: Limit::Ceiling(3_350.0), ..case("narrow rows", NARROW) },
    Case { limit: Limit::Ceiling(4_760.0), ..case("pgbench updates", PGBENCH) },
    Case { limit: Limit::Ceiling(7_560.0), ..case("rows of 1 KB", WIDE) },
    Case { limit: Limit::Ceiling(2_175.0), ..case("delete rule", Shape { action: Action::Delete, ..NARROW }) },
    Case { limit: Limit::Ceiling(2_080.0), ..case("deleted rows", Shape { operation: Operation::Delete, ..NARROW }) },
    // No cost may grow faster than its cause.
    Case {
        cause: Cause::Rules,
        limit: Limit::Ceiling(2180.0),
        ..case("a rule of 10", Shape { rules: 10, changes: 400, ..NARROW })
    },
    Case {
        cause: Cause::Rules,
        limit: Limit::Times(1.1, "a rule of 10"),
        ..case("a rule of 1,000", Shape { rules: 1000, changes: 8, ..NARROW })
    },
    Case {
        cause: Cause::Rules,
        limit: Limit::Ceiling(5_430.0),
        ..case("a mixed rule of 10", Shape { action: Action::Mixed, rules: 10, changes: 400, ..NARROW })
    },
    Case {
        cause: Cause::Rules,
        limit: Limit::Times(1.1, "a mixed rule of 10"),
        ..case("a mixed rule of 100", Shape { action: Action::Mixed, rules: 100, changes: 40, ..NARROW })
    },
    Case {
        cause: Cause::Columns,
        limit: Limit::Ceiling(507.0),
        ..case("a column of 50", Shape { integers: 25, texts: 25, changes: 200, ..NARROW })
    },
    Case {
        cause: Cause::Columns,
        limit: Limit::Times(1.1, "a column of 50"),
        ..case("a column of 500", Shape { integers: 250, texts: 250, changes: 20, ..NARROW })
    },
    Case {
        cause: Cause::TextBytes,
        limit: Limit::Ceiling(5.87),
        ..case("a byte of 10 KB", Shape { text_bytes: 10_000, changes: 100, ..NARROW })
    },
    Case {
        cause: Cause::TextBytes,
        limit: Limit::Times(1.1, "a byte of 10 KB"),
        ..case("a byte of 1 MB", Shape { text_bytes: 1_000_000, changes: 8, ..NARROW })
    },
    Case { limit: Limit::Times(1.1, "narrow rows"), ..case("one of 1,000 tables", Shape { tables: 1000, ..NARROW }) },
    // Decoding and planning allocate nothing once the buffers have grown.
    allocations("allocations, narrow rows", NARROW),
    allocations("allocations, pgbench updates", PGBENCH),
    // What the guard is there to see, it sees.
    Case {
        limit: Limit::Broken(DECODE_CEILING),
        work: Work::DecodeCopies,
        ..case("canary: each frame copied", NARROW)
    },
    Case { limit: Limit::Broken(0.0), work: Work::DecodeCopies, ..allocations("canary: each frame allocated", NARROW) },
];

struct Case {
    name: &'static str,
    shape: Shape,
    work: Work,
    counter: Counter,
    cause: Cause,
    limit: Limit,
}

/// Instructions for each change on the whole way; the limit is up to the case.
const fn case(name: &'static str, shape: Shape) -> Case {
    Case {
        name,
        shape,
        work: Work::Everything,
        counter: Counter::Instructions,
        cause: Cause::Changes,
        limit: Limit::Ceiling(0.0),
    }
}

/// Allocations for each change while decoding and planning: none.
const fn allocations(name: &'static str, shape: Shape) -> Case {
    Case { work: Work::Plan, counter: Counter::Allocations, ..case(name, shape) }
}

#[derive(Clone, Copy)]
enum Work {
    Decode,
    /// As if each frame were copied first.
    DecodeCopies,
    /// Decode and plan.
    Plan,
    /// Decode, plan and encode.
    Everything,
}

#[derive(Clone, Copy)]
enum Counter {
    Instructions,
    Allocations,
}

/// What a cost is divided by.
#[derive(Clone, Copy)]
enum Cause {
    Changes,
    Rules,
    Columns,
    TextBytes,
}

enum Limit {
    /// At most this, and not far below.
    Ceiling(f64),
    /// At most so many times the cost of the case of that name.
    Times(f64, &'static str),
    /// A canary: more than this ceiling.
    Broken(f64),
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [flag, name, rounds] if flag == "--replay" => {
            let case = CASES.iter().find(|case| case.name == name).expect("the name of a case");
            case.replay(rounds.parse().expect("a number of rounds"));
            ExitCode::SUCCESS
        }
        _ if Command::new("valgrind").arg("--version").output().is_err() => {
            eprintln!("error: valgrind is missing\n\nhelp: apt-get install valgrind");
            ExitCode::FAILURE
        }
        _ => guard(),
    }
}

/// Measures every case and prints the table; fails with what to do about each case outside of its limit.
fn guard() -> ExitCode {
    let mut costs: Vec<(&str, f64)> = Vec::new();
    let mut mistakes = Vec::new();
    println!("{:<30} {:>12}  {:<12} {:<26} verdict", "case", "cost", "per", "limit");
    for case in CASES {
        let cost = case.cost();
        costs.push((case.name, cost));
        let of = |name: &str| costs.iter().find(|(known, _)| *known == name).expect("a case further up").1;
        let (limit, verdict) = case.limit.judge(cost, of);
        let shown = if verdict.is_ok() { "met" } else { "MISSED" };
        println!("{:<30} {cost:>12.2}  {:<12} {limit:<26} {shown}", case.name, case.cause.name());
        mistakes.extend(verdict.err().map(|mistake| format!("error: {}: {mistake}", case.name)));
    }
    mistakes.iter().for_each(|mistake| eprintln!("\n{mistake}"));
    if mistakes.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl Case {
    /// What is counted under valgrind.
    fn replay(&self, rounds: usize) {
        let stream = Stream::new(self.shape);
        let mut replay = Replay::new(&stream);
        let mut sum = 0;
        for _ in 0..rounds {
            sum += match self.work {
                Work::Decode => stream.decode(),
                Work::DecodeCopies => stream.clone().decode(),
                Work::Plan => replay.plan(&stream),
                Work::Everything => replay.run(&stream),
            };
        }
        std::hint::black_box(sum);
    }

    /// Instructions or allocations for each unit of the cause.
    fn cost(&self) -> f64 {
        let [once, twice] = std::thread::scope(|scope| {
            let runs = [ROUNDS, 2 * ROUNDS].map(|rounds| scope.spawn(move || self.count(rounds)));
            runs.map(|run| run.join().expect("a count"))
        });
        (twice - once) / (ROUNDS * self.shape.changes * self.cause.in_a_change(&self.shape)) as f64
    }

    fn count(&self, rounds: usize) -> f64 {
        let (tool, before): (&[&str], _) = match self.counter {
            Counter::Instructions => {
                (&["--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"], "refs:")
            }
            Counter::Allocations => (&["--tool=memcheck", "--undef-value-errors=no"], "total heap usage:"),
        };
        let mut command = Command::new("valgrind");
        command.args(tool).arg(std::env::current_exe().expect("this program"));
        let output = command.args(["--replay", self.name, &rounds.to_string()]).output().expect("valgrind");
        let report = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "the case failed:\n{report}");
        let number = report.split(before).nth(1).and_then(|rest| rest.split_whitespace().next());
        let number = number.and_then(|number| number.replace(',', "").parse().ok());
        number.unwrap_or_else(|| panic!("valgrind has not counted:\n{report}"))
    }
}

impl Cause {
    fn name(self) -> &'static str {
        match self {
            Cause::Changes => "change",
            Cause::Rules => "rule",
            Cause::Columns => "column",
            Cause::TextBytes => "byte",
        }
    }

    fn in_a_change(self, shape: &Shape) -> usize {
        match self {
            Cause::Changes => 1,
            Cause::Rules => shape.rules,
            Cause::Columns => shape.integers + shape.texts,
            Cause::TextBytes => shape.texts * shape.text_bytes,
        }
    }
}

impl Limit {
    /// The limit in words, and whether the cost keeps to it; if not, what to do.
    fn judge(&self, cost: f64, of: impl Fn(&str) -> f64) -> (String, Result<(), String>) {
        let check = |ok: bool, mistake: String| if ok { Ok(()) } else { Err(mistake) };
        match *self {
            Limit::Ceiling(ceiling) if cost < ceiling * (1.0 - SLACK) => {
                let lower =
                    format!("better than its ceiling of {ceiling} asks: lower the ceiling to {:.2}", cost * 1.05);
                (format!("<= {ceiling}"), Err(lower))
            }
            Limit::Ceiling(ceiling) => {
                let raise = format!(
                    "{cost:.2} is over its ceiling of {ceiling}: undo what made it dearer, or raise the ceiling to \
                     {:.2} and say in the commit what it buys",
                    cost * 1.05
                );
                (format!("<= {ceiling}"), check(cost <= ceiling, raise))
            }
            Limit::Times(factor, name) => {
                let times = cost / of(name);
                let mistake =
                    format!("{times:.2} times the cost of {name}: it grows faster than its cause, make it linear");
                (format!("<= {factor} x {name}"), check(times <= factor, mistake))
            }
            Limit::Broken(ceiling) => {
                let mistake = format!("{cost:.2} was not noticed, so the guard guards nothing: make it strict again");
                (format!("> {ceiling}"), check(cost > ceiling, mistake))
            }
        }
    }
}
