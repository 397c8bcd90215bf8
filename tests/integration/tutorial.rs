//! The tutorial of the README, run as it stands there: each command must succeed, and give what its comment says.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::support::Stage;

/// What a reader has at hand: a shell, the program, and clients that reach the servers of the test.
///
/// `gives` repeats a command until its output is as expected, since keys follow a moment later.
const SHELL: &str = r#"
set -eumo pipefail
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
redis-cli() { command redis-cli -u "$REDIS_URL" "$@"; }
gives() {
    local expected=$1 got='' deadline=$((SECONDS + 60))
    shift
    until got=$("$@") && [ "$got" = "$expected" ]; do
        [ $SECONDS -lt $deadline ] || { echo "$*: gave $got, not $expected" >&2; exit 1; }
    done
}
fails() {
    local expected=$1 status=0
    shift
    "$@" || status=$?
    [ $status -eq "$expected" ] || { echo "$*: exit status $status, not $expected" >&2; exit 1; }
}
"#;

/// The blocks of code under a heading of the README, each with its language.
fn blocks<'a>(readme: &'a str, heading: &str) -> Vec<(&'a str, &'a str)> {
    let section = readme.split("\n## ").find(|section| section.starts_with(heading)).unwrap();
    let fenced = section.split("```").skip(1).step_by(2);
    fenced.map(|block| block.split_once('\n').unwrap()).collect()
}

/// A line of the tutorial as the shell of the test runs it.
fn command(line: &str) -> String {
    let installing = line.starts_with("cargo install") || line.starts_with("export ");
    match line.rsplit_once("  # ") {
        _ if installing => String::new(),
        Some((command, comment)) => match comment.strip_prefix("exit status ") {
            Some(status) => format!("fails {status} {command}"),
            None => format!("gives '{}' {command}", comment.split(": ").next().unwrap()),
        },
        None => line.to_owned(),
    }
}

#[test]
fn the_tutorial_works_as_it_is_written() {
    let stage = Stage::set();
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let mut script = SHELL.to_owned();
    for (language, block) in blocks(&readme, "Five minutes") {
        match language {
            "toml" => {
                let admin = format!("\n[admin]\nlisten = \"127.0.0.1:{}\"\n", stage.admin);
                fs::write(stage.folder().join("keepstep.toml"), block.to_owned() + &admin).unwrap();
            }
            _ => script.extend(block.lines().map(|line| command(line) + "\n")),
        }
    }
    let program = Path::new(env!("CARGO_BIN_EXE_keepstep")).parent().unwrap();
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
    let mut shell = Command::new("bash");
    shell.arg("-c").arg(&script).current_dir(stage.folder()).env("PATH", path);
    shell.env("DATABASE_URL", stage.postgres.url("postgres")).env("REDIS_URL", stage.redis.url());
    let output = shell.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(script.contains("\nfails 78 ") && script.matches("\ngives ").count() >= 3, "{script}");
}
