//! The command line: one file a command. Results go to stdout, diagnostics to stderr.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use tracing::Level;

use crate::config::{self, Config, diagnostic};
use crate::error::{Error, ErrorKind};
use crate::telemetry::{self, LogFormat};

mod check;
mod clear;
mod daemon;
mod demo;
mod explain;
mod import_rdi;
mod init;
mod pass;
mod plan;
mod reference;
mod reload;
mod rules_text;
mod run;
mod setup;
mod stats;
mod status;
mod verify;
mod warm;

/// Keeps Redis in step with Postgres.
///
/// Follows the row changes that Postgres commits, maps them to cache keys through a rules file, and writes those keys
/// through or invalidates them in Redis. The application only ever reads its cache.
#[derive(Debug, Parser)]
#[command(name = "keepstep", version, max_term_width = 100, after_help = EXAMPLES)]
struct Arguments {
    /// The rules file
    #[arg(short, long, global = true, default_value = "keepstep.toml", env = "KEEPSTEP_CONFIG", value_name = "FILE")]
    config: PathBuf,
    /// How log lines look
    #[arg(long, global = true, value_enum, default_value_t, env = "KEEPSTEP_LOG_FORMAT")]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  keepstep demo                                  see it work, on throw-away servers of its own
  keepstep init                                  write a first rules file, from the tables of $DATABASE_URL
  keepstep check --connect                       is the rules file right, for these servers?
  keepstep setup --print                         the SQL that a DBA would run
  keepstep setup && keepstep run                 make publication and slot, then keep in step
  keepstep run --until-caught-up                 drain and exit, for cron
  keepstep status -o json                        what the running daemon says
  keepstep warm                                  write every row's key
  keepstep verify --sample 1% --repair           compare some keys with their rows, and mend them

Exit codes: 0 fine, 1 failed, 2 usage, 3 verify found keys that are not right, 78 bad configuration.
Logs go to stderr; KEEPSTEP_LOG sets what is logged, as `info` or `keepstep::session=debug`.";

/// How a result looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Stream changes and keep the cache in step, until ended by SIGTERM or Ctrl-C
    Run(run::Arguments),
    /// Write a first rules file from the tables of a database
    Init(init::Arguments),
    /// Turn the jobs of Redis Data Integration into a rules file
    #[command(name = "import-rdi")]
    ImportRdi(import_rdi::Arguments),
    /// Check the rules file, and with --connect the servers too
    Check(check::Arguments),
    /// Show the Redis commands that a row change would lead to; needs no server
    Plan(plan::Arguments),
    /// Make the publication and the replication slot that the rules need
    Setup(setup::SetupArguments),
    /// Drop exactly what setup made
    Teardown(setup::TeardownArguments),
    /// Write the key of every row, whether it changes or not
    Warm(warm::Arguments),
    /// Compare keys with their rows
    Verify(verify::Arguments),
    /// Make the running daemon read its rules file again
    Reload,
    /// Show what the running daemon says of itself
    Status(status::Arguments),
    /// Count the keys of each rule and the memory they take
    Stats(stats::Arguments),
    /// Delete keys that rules own
    Clear(clear::Arguments),
    /// Describe every field of the rules file
    Reference(reference::Arguments),
    /// Tell more about a message of the rules file, by its code
    Explain(explain::Arguments),
    /// Start throw-away servers and show rows changing and their keys following
    Demo(demo::Arguments),
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

impl Command {
    /// What it logs if the environment does not say. Where a result is waited for, only what stands in its way.
    fn log_level(&self) -> Level {
        match self {
            Command::Warm(_) | Command::Verify(_) => Level::WARN,
            _ => Level::INFO,
        }
    }
}

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    // Every TLS connection uses this provider; it is only missing if another one was installed before.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let arguments = Arguments::parse();
    telemetry::start(arguments.log_format, arguments.command.log_level());
    match execute(arguments) {
        Ok(code) => code,
        Err(error) => report(&error),
    }
}

fn execute(arguments: Arguments) -> Result<ExitCode> {
    let config = arguments.config.as_path();
    match arguments.command {
        Command::Run(arguments) => run::execute(config, &arguments),
        Command::Init(arguments) => init::execute(config, &arguments),
        Command::ImportRdi(arguments) => import_rdi::execute(&arguments),
        Command::Check(arguments) => check::execute(config, &arguments),
        Command::Plan(arguments) => plan::execute(config, &arguments),
        Command::Setup(arguments) => setup::setup(config, &arguments),
        Command::Teardown(arguments) => setup::teardown(config, &arguments),
        Command::Warm(arguments) => warm::execute(config, &arguments),
        Command::Verify(arguments) => verify::execute(config, &arguments),
        Command::Reload => reload::execute(config),
        Command::Status(arguments) => status::execute(config, &arguments),
        Command::Stats(arguments) => stats::execute(config, &arguments),
        Command::Clear(arguments) => clear::execute(config, &arguments),
        Command::Reference(arguments) => reference::execute(&arguments),
        Command::Explain(arguments) => explain::execute(&arguments),
        Command::Demo(arguments) => demo::execute(&arguments),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "keepstep", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// The error, a blank line, what to do about it.
fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(Unusable(shown)) = error.downcast_ref() {
        eprint!("{shown}");
        return ExitCode::from(ErrorKind::Config.exit_code());
    }
    eprintln!("error: {error:#}");
    let Some(error) = error.downcast_ref::<Error>() else { return ExitCode::FAILURE };
    for (index, hint) in error.hints().iter().enumerate() {
        eprintln!("{}hint: {hint}", if index == 0 { "\n" } else { "" });
    }
    ExitCode::from(error.kind().exit_code())
}

/// Everything that is wrong with a rules file, as it is shown.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Unusable(String);

/// The rules file; its warnings go to stderr, its errors are the error.
fn load(path: &Path) -> Result<Config> {
    let color = std::io::stderr().is_terminal();
    let environment = |name: &str| std::env::var(name).ok();
    match config::load(path, &environment) {
        Ok((config, warnings)) => {
            eprint!("{}", diagnostic::render(&warnings, &config.file, color));
            Ok(config)
        }
        Err(problems) => Err(Unusable(diagnostic::render(&problems.diagnostics, &problems.file, color)).into()),
    }
}

/// The runtime of the commands that talk to servers. One thread: waking another would cost each change more than what is
/// to be done for it.
fn block_on<T>(future: impl Future<Output = T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(future))
}
