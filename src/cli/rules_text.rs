//! Rules files as text, for the commands that write one: names, strings and whole rules, as the parser reads them.

use std::collections::HashSet;
use std::fmt;

use crate::config::TableName;

/// Lines of prose and arrays are broken here.
const WIDTH: usize = 110;
/// Names of rules stay below the parser's limit with a number behind them.
const NAME_BYTES_MAX: usize = 56;

/// A rule: its name and its fields, whose values are TOML already.
#[derive(Clone, Debug)]
pub(super) struct RuleText {
    pub(super) name: String,
    pub(super) fields: Vec<(&'static str, String)>,
}

impl RuleText {
    pub(super) fn new(name: impl Into<String>, table: &TableName) -> Self {
        RuleText { name: name.into(), fields: vec![("table", quoted(&table_written(table)))] }
    }

    pub(super) fn with(mut self, field: &'static str, value: String) -> Self {
        self.fields.push((field, value));
        self
    }
}

impl fmt::Display for RuleText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "[rule.{}]", self.name)?;
        let width = self.fields.iter().map(|(field, _)| field.len()).max().unwrap_or(0);
        self.fields.iter().try_for_each(|(field, value)| writeln!(f, "{field:width$} = {value}"))
    }
}

/// A string of TOML.
pub(super) fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// An array of strings, in one line if it is short.
pub(super) fn array<'a>(items: impl IntoIterator<Item = &'a str>) -> String {
    let items: Vec<String> = items.into_iter().map(quoted).collect();
    let line = items.join(", ");
    if line.len() <= WIDTH - "columns = []".len() {
        return format!("[{line}]");
    }
    let mut out = String::from("[");
    let mut left = 0;
    for item in items {
        if left < item.len() + 2 {
            out.push_str("\n   ");
            left = WIDTH;
        }
        left = left.saturating_sub(item.len() + 2);
        out.push_str(&format!(" {item},"));
    }
    out + "\n]"
}

/// A table of strings, in one line.
pub(super) fn inline_table<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let pairs: Vec<String> =
        pairs.into_iter().map(|(key, value)| format!("{} = {}", bare(key), quoted(value))).collect();
    format!("{{ {} }}", pairs.join(", "))
}

/// A key of TOML, in quotes if it needs them.
fn bare(key: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !key.is_empty() && key.chars().all(plain) { key.to_owned() } else { quoted(key) }
}

/// A table's name as the field `table` takes it: a part that holds a dot stands in double quotes.
fn table_written(table: &TableName) -> String {
    let part = |name: &str| {
        let plain = !name.contains('.') && !name.starts_with('"');
        if plain { name.to_owned() } else { format!("\"{}\"", name.replace('"', "\"\"")) }
    };
    format!("{}.{}", part(&table.schema), part(&table.name))
}

/// What stands in a template for a column; `None` if a template cannot name it.
pub(super) fn placeholder(column: &str) -> Option<String> {
    let nameable = !column.is_empty() && !column.contains(['{', '}', '|', '?']);
    nameable.then(|| format!("{{{column}}}"))
}

/// A text of a template that stands for itself.
pub(super) fn literal(text: &str) -> String {
    text.replace('{', "{{").replace('}', "}}")
}

/// A line of a comment. Names of tables and fields may hold line breaks, which would end it.
pub(super) fn comment(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    format!("# {}\n", text.trim_end())
}

/// Prose as comments, broken into lines.
pub(super) fn prose(text: &str) -> String {
    let mut out = String::new();
    let mut length = WIDTH;
    for word in text.split(|c: char| c == ' ' || c.is_control()) {
        if length + 1 + word.len() > WIDTH {
            out.push_str(if out.is_empty() { "#" } else { "\n#" });
            length = 1;
        }
        out.push(' ');
        out.push_str(word);
        length += 1 + word.len();
    }
    out + "\n"
}

/// TOML made a comment that a `#` less makes TOML again; prose has a blank behind its `#`.
pub(super) fn commented_out(toml: &impl fmt::Display) -> String {
    toml.to_string().lines().map(|line| format!("#{line}\n")).collect()
}

/// Names of rules, none given twice.
///
/// They begin keys too, and hold no colon. So no key of one rule, `name:…`, can be one of another, and none is among
/// keepstep's own.
#[derive(Debug)]
pub(super) struct Names(HashSet<String>);

impl Names {
    pub(super) fn new() -> Self {
        Names(HashSet::from(["keepstep".to_owned()]))
    }

    /// The name that is like the wanted one and was not given yet.
    pub(super) fn take(&mut self, wanted: &str) -> String {
        let allowed = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' };
        let plain: String = wanted.chars().map(allowed).take(NAME_BYTES_MAX).collect();
        let plain = match plain.trim_matches('-') {
            "" => "table",
            plain => plain,
        };
        let numbered = (2..).map(|number| format!("{plain}-{number}"));
        let free = std::iter::once(plain.to_owned()).chain(numbered).find(|name| !self.0.contains(name));
        let name = free.unwrap_or_else(|| plain.to_owned());
        self.0.insert(name.clone());
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_and_given_once() {
        let mut names = Names::new();
        let taken = ["orders", "orders", "Mixed Case!", "keepstep", "…", "orders-2"].map(|wanted| names.take(wanted));
        assert_eq!(taken, ["orders", "orders-2", "Mixed-Case", "keepstep-2", "table", "orders-2-2"]);
        assert!(names.take(&"x".repeat(100)).len() < 64);
    }

    #[test]
    fn strings_and_tables_are_written_as_they_are_read() {
        assert_eq!(quoted("a\"b\\c\nd"), r#""a\"b\\c\u000Ad""#);
        let table = |schema: &str, name: &str| table_written(&TableName { schema: schema.into(), name: name.into() });
        assert_eq!(table("public", "Order Lines"), "public.Order Lines");
        assert_eq!(table("public", "a.\"b"), r#"public."a.""b""#);
        assert_eq!(inline_table([("a b", "x"), ("c", "y")]), r#"{ "a b" = "x", c = "y" }"#);
        assert_eq!((placeholder("a b"), placeholder("a|b")), (Some("{a b}".to_owned()), None));
    }

    #[test]
    fn long_lines_are_broken() {
        let words = vec!["word"; 40].join(" ");
        let broken = prose(&words);
        assert!(broken.lines().all(|line| line.starts_with("# word") && line.len() <= WIDTH), "{broken}");
        assert_eq!(broken.matches("word").count(), 40);
        assert_eq!(prose("a\n[rule.b]"), "# a [rule.b]\n");
        assert_eq!(comment("  a\u{b}b\n"), "#   a b\n");
        let columns: Vec<String> = (0..40).map(|number| format!("column_{number}")).collect();
        let array = array(columns.iter().map(String::as_str));
        assert!(array.lines().count() > 3 && array.lines().all(|line| line.len() <= WIDTH + 4), "{array}");
    }
}
