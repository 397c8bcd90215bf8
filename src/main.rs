//! Parses the arguments, runs the command, turns its error into an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    keepstep::cli::main()
}
