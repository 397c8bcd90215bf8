//! Key templates: `product:{id}`, `page:{url|md5}`, `{column?default}`, `{{` and `}}` for braces.
//!
//! A placeholder is `{name}`, `{name?default}`, `{name|filter|filter}` or both, `{name?default|filter}`: the default
//! stands in for NULL before the filters run, from left to right. A name is a column, exactly as in the catalog, or one
//! of the rule's `vars`; it may hold anything but `{`, `}`, `|` and `?`. What the names mean is found out when the rule
//! is bound. `{_schema}`, `{_table}` and `{_pk}` mean the table ([`crate::config::open`]).
//!
//! A key template begins with a literal, or with the table's name, so that row data cannot choose the whole key.

use std::ops::Range;

use super::filter::Filter;
use crate::config::code::Code;
use crate::suggest::nearest;

/// Stands for the schema of the table, in every template.
pub const SCHEMA: &str = "_schema";
/// Stands for the table's name.
pub const TABLE: &str = "_table";
/// Stands for the columns of its primary key, with `:` between them.
pub const PRIMARY_KEY: &str = "_pk";
/// Names that mean the table and no column of it.
pub const OF_TABLE: [&str; 3] = [SCHEMA, TABLE, PRIMARY_KEY];

/// keepstep's own keys begin with it, behind the prefix of `[redis]`.
pub const RESERVED: &str = "keepstep:";

/// The sets that are tags begin with it, behind the prefix of `[redis]`.
pub const TAG: &str = "tag:";

/// A parsed template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    text: String,
    parts: Vec<Part>,
}

/// A piece of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Stands in every key as it is; never empty, and never next to another one.
    Literal(String),
    /// Stands for a value.
    Placeholder(Placeholder),
}

/// `{name?default|filter}`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placeholder {
    /// A column or one of the rule's `vars`.
    pub name: String,
    /// What stands in for NULL.
    pub default: Option<String>,
    /// Applied from left to right, to the default too.
    pub filters: Vec<Filter>,
    /// Its bytes in the template's text, braces included.
    pub range: Range<usize>,
}

/// A text is not a template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct TemplateError {
    /// What kind of mistake it is.
    pub code: Code,
    /// The bytes of the template's text that are wrong; [`place`] finds them in the file.
    pub range: Range<usize>,
    /// What is wrong there, without a full stop.
    pub message: String,
    /// What to do, most likely remedy first.
    pub help: Vec<String>,
}

impl TemplateError {
    fn new(code: Code, range: Range<usize>, message: impl Into<String>, help: impl Into<String>) -> Self {
        TemplateError { code, range, message: message.into(), help: vec![help.into()] }
    }
}

impl Template {
    /// A template for keys: it begins with a literal of its own.
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        let template = Self::parse_free(text)?;
        match template.parts.first() {
            None => Err(TemplateError::new(
                Code::TemplateSyntax,
                0..0,
                "a key cannot be empty",
                "name the key: \"product:{id}\"",
            )),
            Some(Part::Placeholder(first)) if [SCHEMA, TABLE].contains(&first.name.as_str()) => Ok(template),
            Some(Part::Placeholder(first)) => {
                let message = "nothing stands before the first placeholder, so row data would choose the whole key";
                let help = format!("begin with a literal of its own: \"product:{}\"", &text[first.range.clone()]);
                Err(TemplateError::new(Code::NoLiteral, first.range.clone(), message, help))
            }
            Some(Part::Literal(first)) if first.starts_with(RESERVED) => {
                let message = format!("keys that begin with `{RESERVED}` are keepstep's own");
                Err(TemplateError::new(Code::ReservedKey, 0..RESERVED.len(), message, "begin with another literal"))
            }
            Some(Part::Literal(_)) => Ok(template),
        }
    }

    /// A template for what is no key by itself (`vars`): it may begin with a placeholder.
    pub fn parse_free(text: &str) -> Result<Self, TemplateError> {
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut at = 0;
        while let Some(found) = text[at..].find(['{', '}']) {
            literal.push_str(&text[at..at + found]);
            at += found;
            let rest = &text[at..];
            if rest.starts_with("{{") || rest.starts_with("}}") {
                literal.push_str(&rest[..1]);
                at += 2;
            } else if rest.starts_with('}') {
                return Err(TemplateError::new(
                    Code::TemplateSyntax,
                    at..at + 1,
                    "no `{` belongs to this `}`",
                    "for a brace write `}}`",
                ));
            } else {
                let placeholder = Placeholder::parse(text, at)?;
                at = placeholder.range.end;
                if !literal.is_empty() {
                    parts.push(Part::Literal(std::mem::take(&mut literal)));
                }
                parts.push(Part::Placeholder(placeholder));
            }
        }
        literal.push_str(&text[at..]);
        if !literal.is_empty() {
            parts.push(Part::Literal(literal));
        }
        Ok(Template { text: text.to_owned(), parts })
    }

    /// Columns, with `:` between them.
    pub fn of_columns(columns: &[String]) -> Self {
        let mut parts = Vec::new();
        for name in columns {
            if !parts.is_empty() {
                parts.push(Part::Literal(":".to_owned()));
            }
            let (name, default, filters) = (name.clone(), None, Vec::new());
            parts.push(Part::Placeholder(Placeholder { name, default, filters, range: 0..0 }));
        }
        let text = columns.iter().map(|name| format!("{{{name}}}")).collect::<Vec<_>>().join(":");
        Template { text, parts }
    }

    /// The same with what placeholders stand for, where that is said. Text and places stay those of the file.
    pub fn with(&self, stands_for: impl Fn(&Placeholder) -> Option<Vec<Part>>) -> Self {
        let mut parts: Vec<Part> = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let known = if let Part::Placeholder(placeholder) = part { stands_for(placeholder) } else { None };
            for part in known.unwrap_or_else(|| vec![part.clone()]) {
                match (parts.last_mut(), part) {
                    (Some(Part::Literal(before)), Part::Literal(text)) => before.push_str(&text),
                    (_, part) => parts.push(part),
                }
            }
        }
        Template { text: self.text.clone(), parts }
    }

    /// Its text, as written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Its pieces, in order.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Its placeholders, in order.
    pub fn placeholders(&self) -> impl Iterator<Item = &Placeholder> {
        self.parts.iter().filter_map(|part| match part {
            Part::Literal(_) => None,
            Part::Placeholder(placeholder) => Some(placeholder),
        })
    }
}

impl Placeholder {
    /// What it makes of a value.
    pub fn filtered(&self, value: &str) -> String {
        let mut out = value.as_bytes().to_vec();
        self.filters.iter().for_each(|filter| filter.apply(&mut out, 0));
        String::from_utf8_lossy(&out).into_owned()
    }

    /// The placeholder whose `{` stands at `open`.
    fn parse(text: &str, open: usize) -> Result<Self, TemplateError> {
        let inner = open + 1;
        let length = match text[inner..].find(['{', '}']) {
            Some(length) if text[inner + length..].starts_with('}') => length,
            _ => {
                let help = "close it: \"product:{id}\"; for a brace write `{{`";
                return Err(TemplateError::new(Code::TemplateSyntax, open..inner, "this `{` is not closed", help));
            }
        };
        let range = open..inner + length + 1;
        let mut pieces = text[inner..inner + length].split('|');
        let value = pieces.next().unwrap_or_default();
        let (name, default) = match value.split_once('?') {
            Some((name, default)) => (name, Some(default.to_owned())),
            None => (value, None),
        };
        if name.is_empty() {
            return Err(TemplateError::new(
                Code::TemplateSyntax,
                range,
                "this placeholder names no column",
                "name one: \"product:{id}\"",
            ));
        }
        let mut at = inner + value.len() + 1;
        let mut filters = Vec::new();
        for piece in pieces {
            filters.push(parse_filter(piece, at, name)?);
            at += piece.len() + 1;
        }
        Ok(Placeholder { name: name.to_owned(), default, filters, range })
    }
}

/// The filter `text`, which stands at `at` in the template.
fn parse_filter(text: &str, at: usize, column: &str) -> Result<Filter, TemplateError> {
    let known = Filter::from_name(text);
    known.ok_or_else(|| {
        let range = at..at + text.len();
        if let Some((filter, default)) = text.split_once('?') {
            let help = format!("write {{{column}?{default}|{filter}}}");
            return TemplateError::new(Code::TemplateSyntax, range, "a default stands before the filters", help);
        }
        let names = Filter::ALL.map(Filter::name);
        let help = match nearest(text, names) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("filters are {}", names.map(|name| format!("`{name}`")).join(", ")),
        };
        TemplateError::new(Code::UnknownFilter, range, format!("there is no filter `{text}`"), help)
    })
}

/// The bytes of the file where `part` of a template stands, given the `span` of the template's string (quotes
/// included) and its text. A string with escapes or in triple quotes is longer than its text and two quotes: then it
/// is the whole string.
pub fn place(span: &Range<usize>, text: &str, part: &Range<usize>) -> Range<usize> {
    if span.len() == text.len() + 2 { span.start + 1 + part.start..span.start + 1 + part.end } else { span.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn literal(text: &str) -> Part {
        Part::Literal(text.to_owned())
    }

    fn placeholder(name: &str, default: Option<&str>, filters: &[Filter], range: Range<usize>) -> Part {
        let default = default.map(str::to_owned);
        Part::Placeholder(Placeholder { name: name.to_owned(), default, filters: filters.to_vec(), range })
    }

    #[test]
    fn templates_are_read() {
        let cases = [
            ("feed:global", vec![literal("feed:global")]),
            ("product:{id}", vec![literal("product:"), placeholder("id", None, &[], 8..12)]),
            ("{{{id}}}:x", vec![literal("{"), placeholder("id", None, &[], 2..6), literal("}:x")]),
            ("p:{{a}}", vec![literal("p:{a}")]),
            ("é:{Grüße aus}", vec![literal("é:"), placeholder("Grüße aus", None, &[], 3..16)]),
            ("a:{b?}", vec![literal("a:"), placeholder("b", Some(""), &[], 2..6)]),
            ("a:{b?c?d}", vec![literal("a:"), placeholder("b", Some("c?d"), &[], 2..9)]),
            (
                "a:{b?none|lower|md5}{c}",
                vec![
                    literal("a:"),
                    placeholder("b", Some("none"), &[Filter::Lower, Filter::Md5], 2..20),
                    placeholder("c", None, &[], 20..23),
                ],
            ),
        ];
        for (text, parts) in cases {
            let template = Template::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(template.parts(), parts, "{text}");
            assert_eq!(template.text(), text);
        }
    }

    /// The text, what of it is underlined, the message and the help.
    fn shown(text: &str, error: &TemplateError) -> String {
        let marks = "^".repeat(text[error.range.clone()].chars().count().max(1));
        let indent = " ".repeat(text[..error.range.start].chars().count());
        format!("{text}\n{indent}{marks} {}\nhelp: {}\n", error.message, error.help.join("\nhelp: "))
    }

    #[test]
    fn mistakes_are_named_at_their_place() {
        let mistakes = [
            "",
            "{id}",
            "{id|md5}:page",
            "keepstep:checkpoint",
            "a:{id",
            "a:{",
            "a:id}",
            "a:{b{c}}",
            "a:{}",
            "a:{?x}",
            "a:{|md5}",
            "a:{id|lowercase}",
            "a:{id|md5|base64}",
            "a:{id|lower?none}",
            "a:{id|}",
        ];
        let shown: Vec<String> =
            mistakes.map(|text| shown(text, &Template::parse(text).expect_err(text))).into_iter().collect();
        insta::assert_snapshot!(shown.join("\n"));
    }

    #[test]
    fn a_var_may_begin_with_a_placeholder_or_be_empty() {
        for text in ["{id}", "", "keepstep:{id}"] {
            assert!(Template::parse_free(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn a_part_is_found_in_the_file_where_the_string_has_no_escapes() {
        let file = r#"key = "a:{id}""#;
        let placeholder = 2..6;
        assert_eq!(&file[place(&(6..14), "a:{id}", &placeholder)], "{id}");
        let escaped = r#"key = "\u0061:{id}""#;
        assert_eq!(place(&(6..escaped.len()), "a:{id}", &placeholder), 6..escaped.len());
    }
}
