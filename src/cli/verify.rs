//! `keepstep verify`: compares keys with their rows.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;

use crate::session::orders::{PassRequest, Purpose, Report, Totals, parse_sample};

use super::{Output, block_on, load, pass};

/// The exit code where a key was not right.
const DIVERGED: u8 = 3;
/// How much of a value a line of the table shows. `-o json` shows all.
const VALUE_CHARS: usize = 60;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
The running daemon does it; without one, a session of its own does, which takes the daemon's slot meanwhile.
Exit code 3 says that a key was not right, mended or not.

Examples:
  keepstep verify                                 every row of every rule that writes keys
  keepstep verify --rule product --sample 1%      some rows of one
  keepstep verify --repair -o json                make right what differs, and say what it was")]
pub(super) struct Arguments {
    /// A rule; several times for several rules
    #[arg(long = "rule", value_name = "NAME")]
    rules: Vec<String>,
    /// How much of the rows is compared
    #[arg(long, value_name = "SHARE", default_value = "100%", value_parser = parse_sample)]
    sample: f64,
    /// Make right what differs
    #[arg(long)]
    repair: bool,
    /// How the result looks; JSON is one object a line, the last one with the totals
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

pub(super) fn execute(config: &Path, arguments: &Arguments) -> Result<ExitCode> {
    let config = load(config)?;
    let Arguments { rules, sample, repair, output } = arguments;
    let purpose = Purpose::Verify { sample: *sample, repair: *repair };
    let request = PassRequest { rules: rules.clone(), purpose, filter: None };
    let mut any = false;
    let difference = |report: &Report| {
        let first = !std::mem::replace(&mut any, true);
        let line = match output {
            Output::Json => serde_json::to_string(report)?,
            Output::Table if first => format!("{HEADER}\n{}", row(report)),
            Output::Table => row(report),
        };
        Ok(writeln!(std::io::stdout(), "{line}")?)
    };
    let totals = block_on(pass::carry_out(config, &request, difference))??;
    let line = match output {
        Output::Json => serde_json::to_string(&Report::Done(totals))?,
        Output::Table => summary(&totals),
    };
    writeln!(std::io::stdout(), "{line}")?;
    Ok(if totals.diverged == 0 { ExitCode::SUCCESS } else { ExitCode::from(DIVERGED) })
}

const HEADER: &str = "RULE             KIND     KEY                              HOLDS → SHOULD HOLD";

/// A line of the table.
fn row(report: &Report) -> String {
    let Report::Difference { rule, key, kind, holds, should, repaired } = report else { return String::new() };
    let repaired = if *repaired { "  (repaired)" } else { "" };
    let (key, holds, should) = (printable(key), value(holds.as_deref()), value(should.as_deref()));
    format!("{rule:<16} {:<8} {key:<32} {holds} → {should}{repaired}", kind.name())
}

fn value(value: Option<&str>) -> String {
    let Some(value) = value else { return "nothing".to_owned() };
    let cut = value.char_indices().nth(VALUE_CHARS).map_or(value.len(), |(end, _)| end);
    let more = if cut < value.len() { "…" } else { "" };
    format!("{}{more}", printable(&value[..cut]))
}

/// Without what a terminal would obey.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() }).collect()
}

fn summary(totals: &Totals) -> String {
    let Totals { rows, checked, diverged, expired, skipped } = totals;
    format!(
        "{rows} rows read, {checked} keys compared: {diverged} not right; {expired} had expired, \
         {skipped} were changing and are not judged"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::orders::Kind;

    #[test]
    fn a_difference_is_one_line_whatever_it_holds() {
        let difference = |kind, holds: Option<&str>, should: Option<String>, repaired| Report::Difference {
            rule: "product".to_owned(),
            key: "shop:product:\u{1b}[2J7".to_owned(),
            kind,
            holds: holds.map(str::to_owned),
            should,
            repaired,
        };
        assert_eq!(
            row(&difference(Kind::Differs, Some("a\nb"), Some("é".repeat(70)), true)),
            format!(
                "product          differs  shop:product:\\u{{1b}}[2J7          a\\nb → {}…  (repaired)",
                "é".repeat(60)
            )
        );
        assert!(row(&difference(Kind::Orphan, Some("x"), None, false)).ends_with("x → nothing"));
    }
}
