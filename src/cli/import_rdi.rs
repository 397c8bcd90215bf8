//! `keepstep import-rdi`: the configuration and the jobs of Redis Data Integration as a rules file.
//!
//! A job says how rows become keys as a chain of steps; a rule says the same at once. What both can say is translated;
//! the rest is named with its file and line, on standard error and beside the rule. A rule that would write more than
//! its job did, because a filter or a removed field was not translated, stands in the file as a comment.

use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;

use crate::error::{Error, ErrorKind};

use super::rules_text::{Names, prose};

mod expression;
mod job;
mod pipeline;
mod yaml;

use pipeline::Pipeline;

/// How large a file may be: far beyond any job.
const FILE_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  keepstep import-rdi ./pipeline > keepstep.toml    of pipeline/config.yaml and pipeline/jobs/*.yaml
  keepstep check                                    is the result right?

What could not be translated is said on standard error, with file and line. URLs and passwords
are not copied: they stand in the result as ${DATABASE_URL} and ${REDIS_URL}. One thing is always
different: a row that leaves a filter (`when`) loses its key, where its job would have left it.")]
pub(super) struct Arguments {
    /// The folder that holds config.yaml and jobs/
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// Something that a rule cannot say, or says differently.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Remark {
    file: String,
    line: usize,
    text: String,
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.text)
    }
}

pub(super) fn execute(arguments: &Arguments) -> Result<ExitCode> {
    let jobs = job_files(&arguments.folder)?;
    let config = match read_file(&arguments.folder.join("config.yaml")) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(unreadable(&arguments.folder.join("config.yaml"), error).into()),
    };
    let mut texts = Vec::with_capacity(jobs.len());
    for path in jobs {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let text = read_file(&path).map_err(|error| unreadable(&path, error))?;
        texts.push((format!("jobs/{name}"), text));
    }
    let (rules, remarks) = translate(config.as_deref(), &texts);
    for remark in &remarks {
        eprintln!("{remark}");
    }
    std::io::stdout().write_all(rules.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// The files in `jobs/`, by name.
fn job_files(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let jobs = folder.join("jobs");
    let listed = || fs::read_dir(&jobs)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<PathBuf>>>();
    let is_yaml = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
    let mut files = listed().map_err(|error| unreadable(&jobs, error))?;
    files.retain(is_yaml);
    files.sort();
    if files.is_empty() {
        let message = format!("there is no job in {}", jobs.display());
        return Err(
            Error::new(ErrorKind::Usage, message).hint("name the folder that holds config.yaml and jobs/*.yaml")
        );
    }
    Ok(files)
}

fn unreadable(path: &Path, error: io::Error) -> Error {
    Error::new(ErrorKind::Io, format!("cannot read {}", path.display())).because(error)
}

fn read_file(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(io::Error::other(format!("it is larger than {FILE_BYTES_MAX} bytes")));
    }
    Ok(text)
}

/// The rules file of a pipeline: the text of its config.yaml, if there is one, and its jobs by name.
fn translate(config: Option<&str>, jobs: &[(String, String)]) -> (String, Vec<Remark>) {
    let mut remarks = Vec::new();
    let pipeline = match config.map(yaml::read) {
        None => Pipeline::default(),
        Some(Ok(root)) => Pipeline::read(&root, &mut remarks),
        Some(Err(fault)) => {
            remarks.push(fault_remark("config.yaml", fault));
            Pipeline::default()
        }
    };
    let mut out = "# Made by `keepstep import-rdi`. What a rule cannot say as its job did stands above the rule.\n\n\
                   [postgres]\nurl = \"${DATABASE_URL}\"\n\n[redis]\nurl = \"${REDIS_URL}\"\n"
        .to_owned();
    let mut names = Names::new();
    for (file, text) in jobs {
        match yaml::read(text) {
            Ok(root) => {
                for block in job::rules(file, &root, &pipeline, &mut names) {
                    out.push('\n');
                    out.extend(block.remarks.iter().map(|remark| prose(&remark.to_string())));
                    out.push_str(&block.text);
                    remarks.extend(block.remarks);
                }
            }
            Err(fault) => remarks.push(fault_remark(file, fault)),
        }
    }
    (out, remarks)
}

fn fault_remark(file: &str, fault: yaml::Fault) -> Remark {
    Remark { file: file.to_owned(), line: fault.line, text: fault.message }
}

#[cfg(test)]
mod tests;
