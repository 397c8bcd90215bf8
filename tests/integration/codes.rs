//! The examples of those codes that only tables can lead to, tried on a server.

use std::collections::BTreeSet;
use std::path::PathBuf;

use keepstep::catalog::{Carrier, check_rules, load, with_tables};
use keepstep::config::code::CODES;
use keepstep::config::diagnostic::{Diagnostic, render};
use keepstep::config::{RulesFile, TableName, parse};
use keepstep::decode::types::Types;
use keepstep::query::check::check_queries;

use crate::support::Stage;

const CLEAN: &str = "drop publication if exists keepstep; drop schema public cascade; create schema public";
const PUBLISH: &str = "create publication keepstep for all tables with (publish_via_partition_root = true)";

/// What is said of an example: statements, then rules. Unless it makes a publication itself, there is one of all tables.
async fn said(stage: &Stage, example: &str) -> (Vec<Diagnostic>, String) {
    let (statements, rules) = example.split_once("\n\n").unwrap();
    stage.execute(CLEAN).await;
    stage.execute(statements).await;
    if !statements.contains("PUBLICATION") {
        stage.execute(PUBLISH).await;
    }
    let servers = "[postgres]\nurl = \"postgresql://db\"\n[redis]\nurl = \"redis://cache\"\n";
    let file = RulesFile { path: PathBuf::from("keepstep.toml"), text: format!("{servers}{rules}") };
    let (config, mut found) = match parse(file, &|_| None) {
        Ok(parsed) => parsed,
        Err(problems) => panic!("{}", render(&problems.diagnostics, &problems.file, false)),
    };
    let client = stage.sql().await;
    let config = with_tables(&client, &config).await.unwrap();
    let tables: BTreeSet<TableName> = config.rules.iter().map(|rule| rule.table.value.clone()).collect();
    let tables: Vec<TableName> = tables.into_iter().collect();
    let catalog = load(&client, &Carrier::of(&config.postgres), &tables).await.unwrap();
    let types = Types::load(&client, &catalog.type_oids()).await.unwrap();
    let checked = check_rules(&config, &catalog, &types);
    found.extend(check_queries(&client, &config, &checked).await.unwrap());
    found.extend(checked.diagnostics);
    let shown = render(&found, &config.file, false);
    (found, shown)
}

#[tokio::test]
async fn the_examples_of_the_codes_are_what_they_say() {
    let stage = Stage::set();
    let with_tables: Vec<_> = CODES.iter().filter(|known| known.wrong.starts_with("CREATE")).collect();
    assert!(with_tables.len() > 10);
    for known in with_tables {
        let (found, shown) = said(&stage, known.wrong).await;
        assert!(found.iter().any(|diagnostic| diagnostic.code == known.code), "{}:\n{shown}", known.code);
        let (_, shown) = said(&stage, known.right).await;
        assert_eq!(shown, "", "{}", known.code);
    }
}
