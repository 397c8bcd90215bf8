//! `make bench`: what keepstep costs, each figure next to its baseline from the same run, on servers of its own.
//!
//! Absolute times depend on the machine and on what else it does; the ratios are what holds. Rounds alternate between
//! keepstep and the baseline, and the median round counts.

#![expect(clippy::print_stdout, reason = "the table is what it is for")]

mod latency;

use serde::Serialize;

/// One measured figure.
#[derive(Debug, Serialize)]
struct Figure {
    measure: String,
    value: f64,
    baseline: f64,
    ratio: f64,
    target: String,
    ok: bool,
}

fn main() {
    let figures = latency::measure();
    println!("{:<44} {:>12} {:>12} {:>7}  {:<10} verdict", "measure", "keepstep", "baseline", "ratio", "target");
    for Figure { measure, value, baseline, ratio, target, ok } in &figures {
        let verdict = if *ok { "met" } else { "missed" };
        println!("{measure:<44} {value:>12.3} {baseline:>12.3} {ratio:>7.2}  {target:<10} {verdict}");
    }
    let json = serde_json::to_string_pretty(&figures).expect("numbers and strings");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/target/bench.json");
    std::fs::write(path, json).expect("the target folder can be written");
}
