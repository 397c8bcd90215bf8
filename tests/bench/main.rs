//! `make bench`: what keepstep costs, each figure next to its baseline from the same run, on servers of its own.
//!
//! Absolute times depend on the machine and on what else it does; the ratios are what holds. Rounds alternate between
//! keepstep and the baseline, and the median round counts; memory is measured once.
//!
//! `make bench QUICK=1` takes less of everything; `cargo bench --bench bench -- drain latency` measures just these.

#![expect(clippy::print_stdout, reason = "the table is what it is for")]

mod alone;
mod drain;
mod latency;
mod memory;
mod scaling;
mod stand;
#[expect(dead_code, reason = "the benchmarks without servers use the rest of it")]
mod stream;
mod triggers;
mod warm;

use std::time::Instant;

use serde::Serialize;

/// One measured figure.
#[derive(Debug, Serialize)]
struct Figure {
    measure: String,
    value: f64,
    baseline: f64,
    ratio: f64,
    target: String,
    /// `None` where there is no target.
    ok: Option<bool>,
}

impl Figure {
    fn new(measure: impl Into<String>, value: f64, baseline: f64, target: String, ok: impl Fn(f64) -> bool) -> Self {
        let ratio = value / baseline;
        Figure { measure: measure.into(), value, baseline, ratio, target, ok: Some(ok(ratio)) }
    }

    /// One whose value counts, not its ratio.
    fn value(measure: impl Into<String>, value: f64, baseline: f64, target: &str, ok: impl Fn(f64) -> bool) -> Self {
        Self::new(measure, value, baseline, target.to_owned(), |_| ok(value))
    }

    /// One that stands there to be looked at.
    fn shown(measure: impl Into<String>, value: f64, baseline: f64) -> Self {
        Figure { ok: None, ..Self::new(measure, value, baseline, "shown".to_owned(), |_| true) }
    }

    fn ratio_at_least(measure: impl Into<String>, value: f64, baseline: f64, least: f64) -> Self {
        Self::new(measure, value, baseline, format!(">= {least} x"), |ratio| ratio >= least)
    }

    fn ratio_at_most(measure: impl Into<String>, value: f64, baseline: f64, most: f64) -> Self {
        Self::new(measure, value, baseline, format!("<= {most} x"), |ratio| ratio <= most)
    }
}

/// keepstep and its baseline take turns so often, unless a measure says otherwise.
const ROUNDS: usize = 3;

/// The middle one.
fn median<T>(rounds: &[T], pick: impl Fn(&T) -> f64) -> f64 {
    let mut values: Vec<f64> = rounds.iter().map(pick).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Takes less of everything if it is told to be quick.
type Measure = fn(bool) -> Vec<Figure>;

/// What can be measured, in the order of the table.
const MEASURES: [(&str, Measure); 7] = [
    ("drain", drain::measure),
    ("alone", alone::measure),
    ("latency", latency::measure),
    ("warm", warm::measure),
    ("memory", memory::measure),
    ("scaling", scaling::measure),
    ("triggers", triggers::measure),
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let wanted: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();
    let known = MEASURES.map(|(name, _)| name);
    if let Some(unknown) = wanted.iter().find(|wanted| !known.contains(&wanted.as_str())) {
        eprintln!("there is no measure `{unknown}`; there are: {}", known.join(", "));
        std::process::exit(2);
    }
    let began = Instant::now();
    let mut figures = Vec::new();
    println!("{:<52} {:>12} {:>12} {:>7}  {:<10} verdict", "measure", "keepstep", "baseline", "ratio", "target");
    for (name, measure) in MEASURES {
        if wanted.is_empty() || wanted.iter().any(|wanted| *wanted == name) {
            eprintln!("{:>4.0} s  {name}", began.elapsed().as_secs_f64());
            let measured = measure(quick);
            show(&measured);
            figures.extend(measured);
        }
    }
    let json = serde_json::to_string_pretty(&figures).expect("numbers and strings");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/target/bench.json");
    std::fs::write(path, json).expect("the target folder can be written");
}

fn show(figures: &[Figure]) {
    for Figure { measure, value, baseline, ratio, target, ok } in figures {
        let verdict = ok.map_or("", |ok| if ok { "met" } else { "missed" });
        println!("{measure:<52} {value:>12.3} {baseline:>12.3} {ratio:>7.2}  {target:<10} {verdict}");
    }
}
