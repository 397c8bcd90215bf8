//! Text that is not TOML: every place that is wrong is named, and costs no more than its own lines.
//!
//! The parser recovers from small mistakes (a missing quote, a key given twice) by itself, but loses everything
//! behind a line that it cannot make sense of. So such lines are replaced by blanks, which leaves every span right,
//! and the text is parsed again until the rest is TOML. What was blanked out is remembered: a field that is missing
//! there may only be unreadable.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

use super::code::Code;
use super::diagnostic::Diagnostic;
use super::mask::mask;

/// After so many unreadable places the rest of the file is not looked at.
const UNREADABLE_MAX: usize = 20;

/// A text of which every line is TOML.
#[derive(Debug)]
pub(super) struct Recovered {
    /// The file's text, unreadable lines blanked out; as long as the file.
    pub(super) text: String,
    /// What was blanked out.
    pub(super) gaps: Vec<Range<usize>>,
    /// What is wrong.
    pub(super) diagnostics: Vec<Diagnostic>,
}

/// Blanks out what is not TOML and says what it is.
pub(super) fn recover(file: &str) -> Recovered {
    let mut recovered = Recovered { text: file.to_owned(), gaps: Vec::new(), diagnostics: Vec::new() };
    loop {
        let (tree, errors) = DeTable::parse_recoverable(&recovered.text);
        let stumbles: Vec<_> = errors.iter().map(|error| Stumble::new(error, &recovered.text)).collect();
        let Some(worst) = stumbles.iter().find(|stumble| !stumble.harmless) else {
            recovered.diagnostics.extend(stumbles.iter().map(|stumble| stumble.diagnostic(file)));
            return recovered;
        };
        let at = worst.span.start;
        let (gap, diagnostic) = match enclosing(tree.get_ref(), &recovered.text, at) {
            Some(value) if stumbles.iter().any(|stumble| stumble.leaves_open(&value)) => {
                never_closed(file, value.start)
            }
            Some(value) => {
                let lines = line_of(file, value.start).start..line_of(file, value.end).end;
                (lines, worst.diagnostic(file))
            }
            None => (statement_of(file, at), worst.diagnostic(file)),
        };
        recovered.diagnostics.push(diagnostic);
        let gap = if recovered.gaps.len() < UNREADABLE_MAX { gap } else { gap.start..file.len() };
        let rest = blanked(&recovered.text, &gap);
        // Where nothing was left to blank out, the parser means another place: everything is given up.
        let gap = if rest == recovered.text { 0..file.len() } else { gap };
        recovered.text = blanked(&rest, &gap);
        recovered.gaps.push(gap);
    }
}

/// A place where the parser stumbled.
#[derive(Debug)]
struct Stumble {
    span: Range<usize>,
    message: String,
    /// Whether the parser loses nothing by it.
    harmless: bool,
}

impl Stumble {
    fn new(error: &toml::de::Error, text: &str) -> Self {
        let span = error.span().unwrap_or(0..0);
        let message = error.message().to_owned();
        let harmless = match message.as_str() {
            "duplicate key" => true,
            // The value is then the rest of the line.
            unquoted if unquoted.starts_with("string values must be quoted") => {
                let behind = text[span.end..line_of(text, span.end).end].trim_start();
                !span.is_empty() && (behind.is_empty() || behind.starts_with(['#', ',', ']', '}']))
            }
            other => other.starts_with("invalid basic string") || other.starts_with("invalid literal string"),
        };
        Stumble { span, message, harmless }
    }

    /// Whether it says that this value has no end.
    fn leaves_open(&self, value: &Range<usize>) -> bool {
        let open = self.message.starts_with("unclosed") || self.message.starts_with("invalid multi-line");
        open && self.span.start == value.end
    }

    fn diagnostic(&self, file: &str) -> Diagnostic {
        let span = self.span.clone();
        if self.message == "duplicate key" {
            let title = format!("`{}` is given twice", &file[span.clone()]);
            return Diagnostic::error(Code::GivenTwice, title, span, "the second one")
                .help("remove one of them, or rename it");
        }
        if let Some(value) = unquoted(file, &line_of(file, span.start)) {
            // It may be a password, which only its surroundings show.
            let help = format!("write:  \"{}\"", &mask(file)[value.clone()]);
            return Diagnostic::error(Code::NotToml, "this is not TOML", value, "not in quotes").help(help);
        }
        let label = match self.message.as_str() {
            "invalid basic string, expected `\"`" | "invalid literal string, expected `'`" => {
                "the closing quote is missing"
            }
            other => other,
        };
        Diagnostic::error(Code::NotToml, "this is not TOML", span, label)
    }
}

/// Where the value of a `key = value` line stands, if it is a text that lacks its quotes.
fn unquoted(file: &str, line: &Range<usize>) -> Option<Range<usize>> {
    let equals = line.start + file[line.clone()].find('=')?;
    let behind = &file[equals + 1..line.end];
    let value = behind.split(" #").next().unwrap_or_default().trim();
    let plain = !value.contains(['"', '\'', '[', ',', '=', '\\']) && !value.starts_with('{');
    let start = line.end - behind.trim_start().len();
    (plain && !value.is_empty()).then_some(start..start + value.len())
}

/// The line of a bracket or quote that never ends, and what to say of it.
fn never_closed(file: &str, open: usize) -> (Range<usize>, Diagnostic) {
    let (open_text, close) = match &file[open..] {
        text if text.starts_with('[') => ("[", "]"),
        text if text.starts_with('{') => ("{", "}"),
        text if text.starts_with('"') => ("\"\"\"", "\"\"\""),
        _ => ("'''", "'''"),
    };
    let label = format!("no `{close}` closes this");
    (line_of(file, open), Diagnostic::error(Code::NotToml, "this is not TOML", open..open + open_text.len(), label))
}

/// The outermost value around `at` that may run over several lines.
fn enclosing(table: &DeTable<'_>, text: &str, at: usize) -> Option<Range<usize>> {
    table.iter().find_map(|(_, value)| {
        let span = value.span();
        let source = &text[span.clone()];
        match value.get_ref() {
            DeValue::Table(inner) if !source.starts_with('{') => enclosing(inner, text, at),
            _ => {
                let several_lines = ["[", "{", "\"\"\"", "'''"].iter().any(|open| source.starts_with(open));
                (several_lines && span.start < at && at <= span.end).then_some(span)
            }
        }
    })
}

/// The line around `at`, without its line break.
fn line_of(text: &str, at: usize) -> Range<usize> {
    let start = text[..at].rfind('\n').map_or(0, |found| found + 1);
    let end = text[at..].find('\n').map_or(text.len(), |found| at + found);
    start..end
}

/// What is unreadable when the line around `at` is: that line, or the whole table if it is a header.
fn statement_of(text: &str, at: usize) -> Range<usize> {
    let line = line_of(text, at);
    if !text[line.clone()].trim_start().starts_with('[') {
        return line;
    }
    let next_header = text[line.end..].find("\n[").map_or(text.len(), |found| line.end + found);
    line.start..next_header
}

/// The text with a range of it replaced by blanks, line breaks excepted.
fn blanked(text: &str, gap: &Range<usize>) -> String {
    let blanks: String = text[gap.clone()].bytes().map(|byte| if byte == b'\n' { '\n' } else { ' ' }).collect();
    [&text[..gap.start], &blanks, &text[gap.end..]].concat()
}
