//! Tables → the text of a rules file. Pure.

use std::path::PathBuf;

use super::super::rules_text::{Names, RuleText, array, comment, commented_out, literal, placeholder, prose, quoted};
use super::survey::{Column, Reference, Survey, Table};
use crate::catalog::{TableFacts, UniqueIndex, check_rules, sql_table};
use crate::config::code::Code;
use crate::config::diagnostic::{Diagnostic, Severity};
use crate::config::mask::is_secret_name;
use crate::config::{RulesFile, parse};

/// So much out of line is worth a word: where an UPDATE leaves such a value as it is, Postgres does not send it, and
/// keepstep reads the row.
const TOAST_BYTES_TOLD: u64 = 1 << 20;

/// A rules file.
pub(super) struct Draft {
    pub(super) text: String,
    /// How many rules in it are no comments.
    pub(super) rules: usize,
    /// Why a table has none.
    pub(super) left_out: Vec<Diagnostic>,
}

/// Writes a rule for each table.
pub(super) fn draft(survey: &Survey) -> Draft {
    let mut draft = Draft { text: header(&survey.database), rules: 0, left_out: Vec::new() };
    let mut names = Names::new();
    let named: Vec<(&Table, String)> =
        survey.tables.iter().map(|table| (table, name(table, survey, &mut names))).collect();
    for (table, name) in &named {
        let Some(facts) = survey.catalog.tables.get(&table.name) else { continue };
        draft.text.push('\n');
        draft.text.push_str(&prose(&about(table)));
        detail(table, name, facts, survey, &mut draft);
        for reference in &table.references {
            draft.text.push('\n');
            draft.text.push_str(&list(table, name, reference, survey, &mut names));
        }
    }
    if !survey.unfollowed.is_empty() {
        let list: Vec<String> = survey.unfollowed.iter().map(|(name, kind)| format!("{name} ({kind})")).collect();
        let what = "These have no changes of their own; a rule names the tables that they read from:";
        draft.text.push('\n');
        draft.text.push_str(&prose(&format!("{what} {}.", list.join(", "))));
    }
    draft
}

fn header(database: &str) -> String {
    let mut names = Names::new();
    let prefix = quoted(&format!("{}:v1:", names.take(database)));
    let title = prose(&format!("What keepstep keeps of database {database} in Redis, as `keepstep init` drafted it."));
    format!(
        "{title}#\n\
         # `keepstep reference` explains every field. For completion in an editor, make this the first line:\n\
         #     #:schema ./keepstep.schema.json\n\
         # and the file that it names:  keepstep reference --schema > keepstep.schema.json\n\
         \n\
         [postgres]\n\
         url = \"${{DATABASE_URL}}\"\n\
         \n\
         [redis]\n\
         url    = \"${{REDIS_URL}}\"\n\
         prefix = {prefix}              # stands before every key; another one is another cache\n"
    )
}

/// The name of a table's rule: the table's own, with its schema if that is not the first one asked for.
fn name(table: &Table, survey: &Survey, names: &mut Names) -> String {
    let first = survey.tables.first().map(|table| &table.name.schema);
    if first == Some(&table.name.schema) { names.take(&table.name.name) } else { names.take(&table.name.to_string()) }
}

fn about(table: &Table) -> String {
    let rows = match table.rows {
        None => "never analyzed".to_owned(),
        Some(rows) => format!("about {rows:.0} rows"),
    };
    let toast = table.toast_bytes;
    if toast < TOAST_BYTES_TOLD {
        return format!("{}: {rows}", table.name);
    }
    format!(
        "{}: {rows}, with {} MiB of values out of line (TOAST). Leave such columns out if nobody reads them: where an \
         UPDATE does not change them, keepstep must read the row.",
        table.name,
        toast >> 20
    )
}

/// The rule that writes the table's rows, or why there can be none.
fn detail(table: &Table, name: &str, facts: &TableFacts, survey: &Survey, draft: &mut Draft) {
    let Some(index) = row_index(facts) else {
        let title = format!("{} has no primary key, so no key can stand for a row", table.name);
        let remedy = format!("give it one:  ALTER TABLE {} ADD PRIMARY KEY (…);", sql_table(&table.name));
        return leave_out(draft, vec![Diagnostic::error(Code::SharedKey, title, 0..0, "").help(remedy)]);
    };
    let left: Vec<String> = table.columns.iter().filter_map(|column| left_out(column, index)).collect();
    if !left.is_empty() {
        draft.text.push_str(&prose(&format!("Left out: {}.", left.join(", "))));
    }
    let kept = table.columns.iter().filter(|column| why_left_out(column, index).is_none());
    let columns = array(kept.map(|column| column.name.as_str()));
    let rule = |key: &String| {
        let rule = RuleText::new(name, &table.name).with("key", quoted(key));
        rule.with("value", quoted("json")).with("columns", columns.clone())
    };
    let rules: Vec<RuleText> = keys(name, index).iter().map(rule).collect();
    let judged: Vec<Vec<Diagnostic>> = rules.iter().map(|rule| judge(rule, survey)).collect();
    let is_fine = |problems: &Vec<Diagnostic>| problems.iter().all(|problem| problem.severity != Severity::Error);
    if let Some((rule, warnings)) = rules.iter().zip(&judged).find(|(_, problems)| is_fine(problems)) {
        draft.text.extend(warnings.iter().map(said));
        draft.text.push_str(&rule.to_string());
        draft.rules += 1;
        return;
    }
    let unnameable = || {
        let title = format!("{} has a key column that no template can name", table.name);
        vec![
            Diagnostic::error(Code::TemplateSyntax, title, 0..0, "")
                .help("rename a column that holds one of `{`, `}`, `|`, `?`"),
        ]
    };
    leave_out(draft, judged.into_iter().next().unwrap_or_else(unnameable));
    draft.text.extend(rules.first().map(commented_out));
}

fn leave_out(draft: &mut Draft, why: Vec<Diagnostic>) {
    draft.text.extend(why.iter().map(said));
    draft.left_out.extend(why);
}

/// The unique index that names a row best: the primary key if Postgres sends it of old rows, else one that it does
/// send, else any.
fn row_index(facts: &TableFacts) -> Option<&UniqueIndex> {
    let is_sent = |index: &&UniqueIndex| index.columns.iter().all(|column| facts.identity_columns.contains(column));
    facts
        .unique
        .iter()
        .find(is_sent)
        .or_else(|| facts.unique.iter().find(|index| index.not_null))
        .or(facts.unique.first())
}

/// Templates for the key of a row, the plainest first; a text between others may need to be encoded, lest it looks like
/// what follows it.
fn keys(name: &str, index: &UniqueIndex) -> Vec<String> {
    let Some(plain) = index.columns.iter().map(|column| placeholder(column)).collect::<Option<Vec<_>>>() else {
        return Vec::new();
    };
    let encoded: Vec<String> = plain.iter().map(|column| column.replace('}', "|urlencode}")).collect();
    [plain, encoded].map(|parts| format!("{}:{}", literal(name), parts.join(":"))).into()
}

/// Why a column is not in the value.
fn why_left_out(column: &Column, key: &UniqueIndex) -> Option<&'static str> {
    match column.type_name.as_str() {
        _ if column.generated => Some("generated"),
        "bytea" => Some("bytea"),
        "tsvector" => Some("tsvector"),
        _ if is_secret_name(&column.name) && !key.columns.contains(&column.name) => Some("looks like a secret"),
        _ => None,
    }
}

fn left_out(column: &Column, key: &UniqueIndex) -> Option<String> {
    why_left_out(column, key).map(|why| format!("{} ({why})", quoted(&column.name)))
}

/// A rule, as a comment, that makes a list stale: the rows that reference the same row of another table.
fn list(table: &Table, name: &str, reference: &Reference, survey: &Survey, names: &mut Names) -> String {
    let columns: Vec<&str> = reference.columns.iter().map(String::as_str).collect();
    let Some(placeholders) = columns.iter().map(|column| placeholder(column)).collect::<Option<Vec<_>>>() else {
        return prose(&format!("A list by {} cannot be named: no template takes these columns.", columns.join(", ")));
    };
    let name = names.take(&format!("{name}-by-{}", columns.join("-")));
    let key = format!("{}:{}", literal(&name), placeholders.join(":"));
    let rule = RuleText::new(name, &table.name).with("delete", array([key.as_str()]));
    let what =
        format!("The list of these for each row of {}: stale when one of them comes, goes or changes.", reference.to);
    let needs: String = judge(&rule, survey).iter().map(said).collect();
    prose(&what) + &needs + &commented_out(&rule)
}

/// A problem as comments; what can be pasted stays in one line.
fn said(problem: &Diagnostic) -> String {
    let help = problem.help.iter().map(|help| comment(&format!("  {help}")));
    std::iter::once(prose(&format!("{}:", problem.title))).chain(help).collect()
}

/// What `check --connect` says of a rule.
fn judge(rule: &RuleText, survey: &Survey) -> Vec<Diagnostic> {
    const SERVERS: &str = "[postgres]\nurl = \"postgresql://db\"\n[redis]\nurl = \"redis://cache\"\n";
    let file = RulesFile { path: PathBuf::new(), text: format!("{SERVERS}{rule}") };
    match parse(file, &|_| None) {
        Ok((config, warnings)) => {
            let found = check_rules(&config, &survey.catalog, &survey.types).diagnostics;
            warnings.into_iter().chain(found).collect()
        }
        Err(problems) => problems.diagnostics,
    }
}
