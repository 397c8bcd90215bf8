//! What files promise that no compiler reads: each example works, each name exists.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use keepstep::config::code::CODES;

/// Every file in a folder of the repository, by its extension.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let found: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|own| own == extension)).collect();
    assert!(!found.is_empty(), "no .{extension} in it");
    found
}

/// The names of metrics in a text, without the suffixes of a histogram's series.
fn metrics(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !(c.is_ascii_lowercase() || c == '_'));
    let names = words.filter(|word| word.starts_with("keepstep_"));
    names
        .map(|name| ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name))
        .collect()
}

#[test]
fn every_example_passes_check() {
    for example in files("deploy/rules", "toml") {
        let mut check = Command::new(env!("CARGO_BIN_EXE_keepstep"));
        check.arg("check").arg("-c").arg(&example);
        check.env("DATABASE_URL", "postgresql://localhost/app").env("REDIS_URL", "redis://localhost");
        let output = check.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !said.contains("warning"), "{}:\n{said}", example.display());
    }
}

#[test]
fn the_schema_is_that_of_the_reference_and_every_example_names_it() {
    let mut reference = Command::new(env!("CARGO_BIN_EXE_keepstep"));
    let schema = String::from_utf8(reference.args(["reference", "--schema"]).output().unwrap().stdout).unwrap();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/keepstep.schema.json");
    let kept = fs::read_to_string(file).unwrap_or_default();
    assert!(kept == schema, "it has changed:  keepstep reference --schema > deploy/keepstep.schema.json");
    for example in files("deploy/rules", "toml") {
        let text = fs::read_to_string(&example).unwrap();
        assert_eq!(text.lines().next(), Some("#:schema ../keepstep.schema.json"), "{}", example.display());
    }
}

#[test]
fn every_code_is_one_that_a_message_has() {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    let mut source = String::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.extension() {
                _ if path.is_dir() => folders.push(path),
                // The list itself proves nothing.
                _ if path.ends_with("config/code.rs") => {}
                Some(extension) if extension == "rs" => source.push_str(&fs::read_to_string(path).unwrap()),
                _ => {}
            }
        }
    }
    let named: BTreeSet<&str> = source.split("Code::").skip(1).map(word).collect();
    for known in CODES {
        let name = format!("{:?}", known.code);
        assert!(named.contains(name.as_str()), "no message has the code {} ({name})", known.code);
    }
}

/// The letters that a text begins with.
fn word(text: &str) -> &str {
    text.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default()
}

#[test]
fn every_metric_of_the_alerts_exists() {
    let existing = metrics(include_str!("../../src/metrics.rs"));
    for file in files("deploy/prometheus", "yaml") {
        let text = fs::read_to_string(file).unwrap();
        let named = metrics(&text);
        assert!(named.is_subset(&existing), "unknown: {:?}", named.difference(&existing));
        assert!(named.len() > 3, "hardly a metric was recognised: {named:?}");
    }
}
