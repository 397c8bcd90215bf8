//! The whole rules file: which tables there are, and each handed to whoever reads it.

use std::collections::HashMap;
use std::ops::Range;

use toml::de::{DeTable, DeValue};

use super::code::Code;
use super::diagnostic::Diagnostic;
use super::fields::Table;
use super::open::OpenRule;
use super::section::{Reader, Section, Value, homes, in_file_order};
use super::{AdminConfig, Environment, PostgresConfig, RedisConfig, Rule, RulesFile, Sources, Spanned};
use super::{include, query, rule, server, syntax};
use crate::suggest::nearest;

/// How long a rule's name may be: it is a label of metrics.
const RULE_NAME_BYTES_MAX: usize = 64;

/// What the tables say.
pub(super) struct Document {
    pub(super) postgres: PostgresConfig,
    pub(super) redis: RedisConfig,
    pub(super) admin: AdminConfig,
    pub(super) rules: Vec<Rule>,
    pub(super) open: Vec<OpenRule>,
}

/// Reads the file and what it includes; without a document if an error leaves nothing to go on with. The diagnostics are
/// in no order.
pub(super) fn read(file: RulesFile, env: &Environment<'_>) -> (Sources, Option<Document>, Vec<Diagnostic>) {
    let mut sources = Sources::from(file);
    let mut parts = vec![syntax::recover(&sources.main.text)];
    let (included, mut diagnostics) = included(&sources, &parts[0].text, env);
    // What is missing may stand in a file that could not be read.
    let mut gaps = Vec::from_iter((!diagnostics.is_empty()).then_some(0..0));
    sources.included = included;
    parts.extend(sources.included.iter().map(|file| syntax::recover(&file.text)));
    let mut roots = Vec::new();
    let mut headers = Vec::new();
    for ((start, _), part) in sources.files().zip(&parts) {
        diagnostics.extend(part.diagnostics.iter().map(|diagnostic| diagnostic.clone().moved(start)));
        gaps.extend(part.gaps.iter().map(|gap| gap.start + start..gap.end + start));
        // What the parser still finds is said already.
        let (tree, _) = DeTable::parse_recoverable(&part.text);
        let root = moved(tree.into_inner(), start);
        headers.push(start);
        headers.extend(tables_begin(&root));
        roots.push(root);
    }
    let mut reader = Reader { sources: &sources, env, diagnostics, gaps, headers };
    let document = roots.split_first().and_then(|(main, included)| read_tables(&mut reader, main, included));
    let diagnostics = reader.diagnostics;
    (sources, document, diagnostics)
}

/// The files that the rules file includes, and what is wrong with `include`.
fn included(sources: &Sources, main: &str, env: &Environment<'_>) -> (Vec<RulesFile>, Vec<Diagnostic>) {
    let (tree, _) = DeTable::parse_recoverable(main);
    let (gaps, headers) = (Vec::new(), Vec::new());
    let mut reader = Reader { sources, env, diagnostics: Vec::new(), gaps, headers };
    let mut top = Section::new(&mut reader, Table::Top, "the rules file".to_owned(), 0..0, tree.get_ref());
    let patterns = top.list("include", include::pattern).map_or_else(Vec::new, |list| list.value);
    let files = include::read(&sources.main, &patterns).unwrap_or_else(|problems| {
        reader.diagnostics.extend(problems);
        Vec::new()
    });
    (files, reader.diagnostics)
}

/// A tree whose text stands `by` bytes further behind.
fn moved(table: DeTable<'_>, by: usize) -> DeTable<'_> {
    let entries = table.into_iter().map(|(key, value)| {
        let span = key.span();
        (toml::Spanned::new(span.start + by..span.end + by, key.into_inner()), moved_value(value, by))
    });
    entries.collect()
}

fn moved_value(value: Value<'_>, by: usize) -> Value<'_> {
    let span = value.span();
    let inner = match value.into_inner() {
        DeValue::Table(table) => DeValue::Table(moved(table, by)),
        DeValue::Array(items) => DeValue::Array(items.into_iter().map(|item| moved_value(item, by)).collect()),
        plain => plain,
    };
    toml::Spanned::new(span.start + by..span.end + by, inner)
}

/// Where tables begin.
fn tables_begin(root: &DeTable<'_>) -> impl Iterator<Item = usize> {
    let inner = root.values().filter_map(|value| value.get_ref().as_table()).flat_map(|table| table.values());
    let tables = root.values().chain(inner).filter(|value| value.get_ref().is_table());
    tables.map(|table| table.span().start)
}

fn read_tables<'a>(reader: &mut Reader<'a>, root: &'a DeTable<'a>, included: &'a [DeTable<'a>]) -> Option<Document> {
    let postgres = required(reader, root, Table::Postgres).and_then(server::postgres);
    let redis = required(reader, root, Table::Redis).and_then(server::redis);
    let admin = section(reader, root, Table::Admin).map(server::admin).unwrap_or_default();
    let defaults = section(reader, root, Table::Defaults).map(rule::defaults).unwrap_or_default();
    let mut rules = rules(reader, root, included, &defaults);
    rules.extend(queries(reader, root));
    unknown(reader, root);
    included.iter().for_each(|root| more_than_rules(reader, root));
    let open: Vec<OpenRule> = rules.extract_if(.., OpenRule::is_open).map(OpenRule::new).collect();
    open.iter().flat_map(OpenRule::problems).for_each(|problem| reader.report(problem));
    Some(Document { postgres: postgres?, redis: redis?, admin, rules, open })
}

/// A table at the top of the file, if it is there.
fn section<'r, 'a>(reader: &'r mut Reader<'a>, root: &'a DeTable<'a>, table: Table) -> Option<Section<'r, 'a>> {
    let (key, value) = root.get_key_value(table.key())?;
    let entries = as_table(reader, table, table.header(), &key.span(), value)?;
    Some(Section::new(reader, table, table.header().to_owned(), value.span(), entries))
}

/// The same for one that must be there.
fn required<'r, 'a>(reader: &'r mut Reader<'a>, root: &'a DeTable<'a>, table: Table) -> Option<Section<'r, 'a>> {
    if !root.contains_key(table.key()) && !is_misspelt(root, table) {
        let variable = format!("{}_URL", if table == Table::Postgres { "DATABASE" } else { "REDIS" });
        let missing = Diagnostic::error(Code::MissingTable, format!("the file has no {}", table.header()), 0..0, "");
        reader.report_missing_anywhere(missing.help(format!("add:\n{}\nurl = \"${{{variable}}}\"", table.header())));
    }
    section(reader, root, table)
}

/// The entries of what must be a table.
fn as_table<'a>(
    reader: &mut Reader<'a>,
    table: Table,
    header: &str,
    key: &Range<usize>,
    value: &'a Value<'a>,
) -> Option<&'a DeTable<'a>> {
    let entries = value.get_ref().as_table();
    if entries.is_none() {
        let array_of_tables = reader.sources.text(&value.span()).starts_with("[[");
        let label = if array_of_tables { "this header makes a list" } else { "" };
        let span = if array_of_tables { value.span() } else { key.clone() };
        let wrong = Diagnostic::error(Code::NotATable, format!("`{}` must be a table", table.key()), span, label);
        reader.report(wrong.help(format!("write:  {header}  and its fields below")));
    }
    entries
}

/// Reads `[rule.NAME]`, in the order of the files.
fn rules<'a>(
    reader: &mut Reader<'a>,
    root: &'a DeTable<'a>,
    included: &'a [DeTable<'a>],
    defaults: &rule::Defaults,
) -> Vec<Rule> {
    const EXAMPLE: &str = "add one:\n[rule.product]\ntable = \"public.products\"\nkey = \"product:{id}\"\n\
                           value = \"json\"\ncolumns = [\"*\"]";
    let header = Table::Rule.header();
    let mut entries = Vec::new();
    let mut readable = true;
    for root in std::iter::once(root).chain(included) {
        let Some((key, value)) = root.get_key_value(Table::Rule.key()) else { continue };
        let table = as_table(reader, Table::Rule, header, &key.span(), value);
        readable &= table.is_some();
        entries.extend(table.into_iter().flat_map(in_file_order));
    }
    let queries = root.contains_key(Table::Query.key());
    if readable && entries.is_empty() && !queries && !is_misspelt(root, Table::Rule) {
        let none = Diagnostic::error(Code::MissingTable, "the file has no rule, so nothing would be done", 0..0, "");
        reader.report_missing_anywhere(none.help(EXAMPLE));
    }
    let mut rules = Vec::new();
    let mut named: HashMap<String, Range<usize>> = HashMap::new();
    for (key, value) in entries {
        let name = Spanned { value: key.get_ref().to_string(), span: key.span() };
        // Within one file it is no TOML.
        if let Some(first) = named.insert(name.value.clone(), name.span.clone()) {
            let title = format!("rule `{}` is given twice", name.value);
            let twice = Diagnostic::error(Code::GivenTwice, title, name.span.clone(), "the second one");
            reader.report(twice.context(first, "the first one").help("remove one of them, or rename it"));
            continue;
        }
        let DeValue::Table(fields) = value.get_ref() else {
            reader.report(nameless(&name, Table::Rule));
            continue;
        };
        check_name(reader, &name, Table::Rule);
        let section = Section::new(reader, Table::Rule, format!("rule `{}`", name.value), value.span(), fields);
        rules.extend(rule::rule(section, name, defaults));
    }
    rules
}

/// Reads `[query.NAME]`, in the order of the file.
fn queries<'a>(reader: &mut Reader<'a>, root: &'a DeTable<'a>) -> Vec<Rule> {
    let Some((key, value)) = root.get_key_value(Table::Query.key()) else { return Vec::new() };
    let entries = as_table(reader, Table::Query, Table::Query.header(), &key.span(), value).map(in_file_order);
    let mut rules = Vec::new();
    for (key, value) in entries.unwrap_or_default() {
        let name = Spanned { value: key.get_ref().to_string(), span: key.span() };
        let DeValue::Table(fields) = value.get_ref() else {
            reader.report(nameless(&name, Table::Query));
            continue;
        };
        check_name(reader, &name, Table::Query);
        let section = Section::new(reader, Table::Query, format!("query `{}`", name.value), value.span(), fields);
        rules.extend(query::query(section, &name));
    }
    rules
}

/// A value directly in `[rule]` or `[query]`.
fn nameless(name: &Spanned<String>, table: Table) -> Diagnostic {
    let kind = table.key();
    let title = format!("`{}` belongs to no {kind}: a {kind} has a name", name.value);
    let is_field = table.field(&name.value).is_some();
    let label = if is_field { format!("a field of {}", table.header()) } else { String::new() };
    Diagnostic::error(Code::NotATable, title, name.span.clone(), label)
        .help(format!("write:  {}  with a name of your choice", table.header()))
}

fn check_name(reader: &mut Reader<'_>, name: &Spanned<String>, table: Table) {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let plain = !name.value.is_empty() && name.value.chars().all(allowed);
    if !plain || name.value.len() > RULE_NAME_BYTES_MAX {
        let title = format!("`{}` cannot be the name of a {}", name.value, table.key());
        let help = format!("names are made of letters, digits, `-` and `_`, at most {RULE_NAME_BYTES_MAX}");
        reader.report(Diagnostic::error(Code::RuleName, title, name.span.clone(), "").help(help));
    }
}

/// Reports what stands at the top of the file and is no table of it.
fn unknown(reader: &mut Reader<'_>, root: &DeTable<'_>) {
    let known = Table::AT_TOP.map(Table::key);
    for (key, value) in in_file_order(root) {
        let name = key.get_ref().as_ref();
        if known.contains(&name) || Table::Top.field(name).is_some() {
            continue;
        }
        reader.report(stray(name, value, key.span()));
    }
}

/// That something stands above the first header, or a table that is none of the file's.
fn stray(name: &str, value: &Value<'_>, span: Range<usize>) -> Diagnostic {
    let homes = homes(name);
    match value.get_ref() {
        DeValue::Table(table) => unknown_table(name, table, span),
        _ if homes.is_empty() => {
            Diagnostic::error(Code::UnknownField, format!("unknown field `{name}`"), span, "stands in no table")
        }
        _ => {
            let title = format!("`{name}` stands in no table");
            Diagnostic::error(Code::MisplacedField, title, span, "above the first header")
                .help(format!("move it below {homes}"))
        }
    }
}

/// Reports what an included file holds besides rules.
fn more_than_rules(reader: &mut Reader<'_>, root: &DeTable<'_>) {
    for (key, value) in in_file_order(root) {
        let name = key.get_ref().as_ref();
        if name == Table::Rule.key() {
            continue;
        }
        let of_main = Table::AT_TOP.iter().any(|known| known.key() == name) || Table::Top.field(name).is_some();
        if !of_main {
            reader.report(stray(name, value, key.span()));
            continue;
        }
        let shown = if value.get_ref().is_table() { format!("[{name}]") } else { format!("`{name}`") };
        let title = format!("an included file has no {shown}: it holds rules alone");
        let more = Diagnostic::error(Code::MoreThanRules, title, key.span(), "");
        reader.report(more.help(format!("move it to {}", reader.sources.main.path.display())));
    }
}

/// The table whose name is nearest to one that is unknown.
fn meant(name: &str) -> Option<Table> {
    let near = nearest(name, Table::AT_TOP.map(Table::key))?;
    Table::AT_TOP.into_iter().find(|table| table.key() == near)
}

/// Whether the file has the table under another name: then that is what is wrong, not that it is missing.
fn is_misspelt(root: &DeTable<'_>, table: Table) -> bool {
    !root.contains_key(table.key()) && root.keys().any(|key| meant(key.get_ref()) == Some(table))
}

fn unknown_table(name: &str, table: &DeTable<'_>, span: Range<usize>) -> Diagnostic {
    let unknown = |label: String| Diagnostic::error(Code::UnknownTable, format!("unknown table `{name}`"), span, label);
    if table.contains_key("table") {
        return unknown("this looks like a rule".to_owned()).help(format!("write:  [rule.{name}]"));
    }
    match meant(name) {
        Some(near) => unknown(format!("did you mean {}?", near.header())).help(format!("write:  {}", near.header())),
        None => {
            let headers = Table::AT_TOP.map(Table::header).join(", ");
            unknown(String::new()).help(format!("the tables are {headers}"))
        }
    }
}
