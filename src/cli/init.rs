//! `keepstep init`: a first rules file, from what the catalog says of a database's tables.
//!
//! Each table gets a rule that writes its rows, judged by the same code that judges it in `check --connect`. So what is
//! written works as it is; what could not work stands in the file as a comment, with what keeps it from working.

use std::fs::OpenOptions;
use std::io::{ErrorKind as IoErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::error::{Error, ErrorKind};
use crate::source::conninfo::ConnInfo;

use super::block_on;

mod draft;
mod survey;

use draft::{Draft, draft};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  keepstep init                                            every table in `public` of $DATABASE_URL
  keepstep init --url postgresql://localhost/shop          of another database
  keepstep init --schema public --schema billing           of these schemas
  keepstep init --output -                                 to standard output

The URL is not written into the file: it stands there as ${DATABASE_URL}.")]
pub(super) struct Arguments {
    /// The database; only its catalog is read
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    url: String,
    /// A schema whose tables are followed; can be given several times
    #[arg(long = "schema", default_value = "public", value_name = "SCHEMA")]
    schemas: Vec<String>,
    /// The file to write, or `-` for standard output [default: what --config names]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Overwrite the file
    #[arg(long)]
    force: bool,
}

pub(super) fn execute(config: &Path, arguments: &Arguments) -> Result<ExitCode> {
    let path = arguments.output.as_deref().unwrap_or(config);
    let to_stdout = path == Path::new("-");
    if !to_stdout && !arguments.force && path.exists() {
        return Err(there_already(path).into());
    }
    let info = ConnInfo::parse(&arguments.url, &|name| std::env::var(name).ok())?;
    let survey = block_on(survey::survey(&info, &arguments.schemas))??;
    let draft = draft(&survey);
    if to_stdout {
        std::io::stdout().write_all(draft.text.as_bytes())?;
    } else {
        write(path, &draft.text, arguments.force)?;
    }
    report(&draft, path, to_stdout)?;
    Ok(ExitCode::SUCCESS)
}

fn there_already(path: &Path) -> Error {
    let message = format!("{} is there already", path.display());
    Error::new(ErrorKind::Usage, message).hint("name another one with --output, or overwrite it with --force")
}

fn write(path: &Path, text: &str, force: bool) -> Result<()> {
    let mut options = OpenOptions::new();
    let options = if force { options.create(true).truncate(true) } else { options.create_new(true) };
    let mut file = match options.write(true).open(path) {
        Err(error) if error.kind() == IoErrorKind::AlreadyExists => return Err(there_already(path).into()),
        opened => opened.with_context(|| format!("cannot write {}", path.display()))?,
    };
    file.write_all(text.as_bytes()).with_context(|| format!("cannot write {}", path.display()))
}

/// What was left out goes to standard error, and what was written too where the file itself is the output.
fn report(draft: &Draft, path: &Path, to_stdout: bool) -> Result<()> {
    for problem in &draft.left_out {
        eprintln!("warning: {}", problem.title);
        problem.help.iter().for_each(|help| eprintln!("hint: {help}"));
    }
    let rules = match draft.rules {
        0 => "no table can be followed as it is; the comments say what each lacks".to_owned(),
        1 => "1 rule".to_owned(),
        rules => format!("{rules} rules"),
    };
    if to_stdout {
        return Ok(());
    }
    let mut out = std::io::stdout();
    writeln!(out, "{}: {rules}", path.display())?;
    if draft.rules > 0 {
        writeln!(out, "next:  keepstep check, then keepstep setup, then keepstep check --connect")?;
    }
    Ok(())
}
