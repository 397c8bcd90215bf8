//! `keepstep explain`: what the code of a message means, from the one list of codes.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;

use crate::config::code::{CODES, Code, Explanation};
use crate::error::{Error, ErrorKind};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  keepstep explain KS072     why it is a mistake, and an example wrong and right
  keepstep explain           every code")]
pub(super) struct Arguments {
    /// The code in the brackets of a message, as in `error[KS072]`
    code: Option<String>,
}

pub(super) fn execute(arguments: &Arguments) -> Result<ExitCode> {
    let text = match &arguments.code {
        None => list(),
        Some(text) => {
            let known = Code::parse(text).and_then(Code::explanation);
            let unknown = || {
                let error = Error::new(ErrorKind::Usage, format!("there is no code `{text}`"));
                error.hint("`keepstep explain` lists them; they are like KS012")
            };
            explained(known.ok_or_else(unknown)?)
        }
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// Every code with its title.
fn list() -> String {
    CODES.iter().map(|known| format!("{}  {}\n", known.code, known.title)).collect()
}

fn explained(known: &Explanation) -> String {
    let mut out = format!("{}: {}\n\n{}\n", known.code, known.title, known.text);
    for (name, example) in [("Wrong", known.wrong), ("Right", known.right)] {
        if !example.is_empty() {
            let indented: String = example.lines().map(indented).collect();
            out.push_str(&format!("\n{name}:\n\n{indented}"));
        }
    }
    out
}

fn indented(line: &str) -> String {
    if line.is_empty() { "\n".to_owned() } else { format!("    {line}\n") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_explained_with_an_example() {
        insta::assert_snapshot!(Code::NotInIdentity.explanation().map(explained).unwrap_or_default());
    }

    #[test]
    fn every_code_is_listed() {
        insta::assert_snapshot!(list());
    }
}
