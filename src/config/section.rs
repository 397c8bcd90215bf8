//! Reading one table of the rules file: typed access to its fields, and a message for each that is wrong.
//!
//! A [`Section`] hands out fields by name; what was never asked for when it is finished is unknown. Every reader
//! returns `None` for a field that is absent and for one that is wrong, and has said so in the second case, so that
//! the caller goes on with its default and finds the next mistake.

use std::borrow::Cow;
use std::fmt::Display;
use std::ops::Range;
use std::time::Duration;

use toml::de::{DeTable, DeValue};

use super::code::Code;
use super::diagnostic::{Diagnostic, Severity};
use super::fields::{Fallback, Field, Kind, Table};
use super::interpolate::{fill, reference_out_of_place};
use super::mistake::Mistake;
use super::quantity::{self, duration_written, seconds_written, size_written};
use super::{Environment, Lifetime, Sources, Spanned};
use crate::rules::expression::Expression;
use crate::rules::template::{Template, TemplateError, place};
use crate::suggest::nearest;

/// What every table is read with: the files, the environment, and the problems found so far.
pub(super) struct Reader<'a> {
    pub(super) sources: &'a Sources,
    pub(super) env: &'a Environment<'a>,
    pub(super) diagnostics: Vec<Diagnostic>,
    /// What could not be read at all.
    pub(super) gaps: Vec<Range<usize>>,
    /// Where tables begin.
    pub(super) headers: Vec<usize>,
}

impl Reader<'_> {
    /// Adds a problem.
    pub(super) fn report(&mut self, diagnostic: Diagnostic) {
        self.diagnostics.push(diagnostic);
    }

    /// Adds that something is missing from the table at `header`, unless it may be in a part that is unreadable.
    pub(super) fn report_missing(&mut self, header: usize, diagnostic: Diagnostic) {
        let end = self.headers.iter().copied().filter(|start| *start > header).min().unwrap_or(self.sources.end());
        if !self.gaps.iter().any(|gap| gap.end > header && gap.start < end) {
            self.report(diagnostic);
        }
    }

    /// Adds that something is missing from the file, unless a part of it is unreadable.
    pub(super) fn report_missing_anywhere(&mut self, diagnostic: Diagnostic) {
        if self.gaps.is_empty() {
            self.report(diagnostic);
        }
    }
}

/// A value of the parsed file and where it stands.
pub(super) type Value<'a> = toml::Spanned<DeValue<'a>>;

/// A field as it was given.
#[derive(Clone, Debug)]
pub(super) struct Entry<'a> {
    pub(super) field: &'static Field,
    pub(super) value: &'a Value<'a>,
}

/// One table while it is read.
pub(super) struct Section<'r, 'a> {
    pub(super) reader: &'r mut Reader<'a>,
    pub(super) table: Table,
    /// What messages call it: `[postgres]`, or `rule `product``.
    pub(super) title: String,
    /// Where it begins.
    pub(super) header: Range<usize>,
    entries: &'a DeTable<'a>,
    read: Vec<&'static str>,
    /// Fields of this table that stand in one of its sub-tables by mistake.
    lost: Vec<(&'static str, Range<usize>)>,
    /// The problems found before this table.
    before: usize,
}

impl<'r, 'a> Section<'r, 'a> {
    pub(super) fn new(
        reader: &'r mut Reader<'a>,
        table: Table,
        title: String,
        header: Range<usize>,
        entries: &'a DeTable<'a>,
    ) -> Self {
        let before = reader.diagnostics.len();
        Section { reader, table, title, header, entries, read: Vec::new(), lost: Vec::new(), before }
    }

    /// Whether no error was found in this table so far.
    pub(super) fn is_sound(&self) -> bool {
        self.reader.diagnostics[self.before..].iter().all(|diagnostic| diagnostic.severity != Severity::Error)
    }

    /// The field as given.
    pub(super) fn entry(&mut self, name: &'static str) -> Option<Entry<'a>> {
        let field = self.table.field(name);
        debug_assert!(field.is_some(), "{name} is not in the table of fields");
        self.read.push(name);
        Some(Entry { field: field?, value: self.entries.get(name)? })
    }

    /// Where the field stands, its name included, if it was given; also where it has landed in a sub-table.
    pub(super) fn given(&self, name: &str) -> Option<Range<usize>> {
        match self.entries.get_key_value(name) {
            Some((key, value)) => Some(key.span().start..value.span().end.max(key.span().end)),
            None => self.lost.iter().find(|(lost, _)| *lost == name).map(|(_, span)| span.clone()),
        }
    }

    /// An error in this table.
    pub(super) fn error(
        &self,
        code: Code,
        problem: impl Display,
        span: Range<usize>,
        label: impl Into<String>,
    ) -> Diagnostic {
        Diagnostic::error(code, format!("{}: {problem}", self.title), span, label)
    }

    /// Adds a problem.
    pub(super) fn report(&mut self, diagnostic: Diagnostic) {
        self.reader.report(diagnostic);
    }

    /// Adds a mistake inside the string of a field.
    fn mistaken(&mut self, name: &str, mistake: Mistake, span: Range<usize>) {
        let diagnostic = self.error(mistake.code, format_args!("`{name}` {}", mistake.problem), span, mistake.label);
        self.report(Diagnostic { help: mistake.help, ..diagnostic });
    }

    /// Adds that a value is of the wrong type.
    fn wrong_type(&mut self, field: &Field, value: &Value<'_>) {
        let source = self.reader.sources.text(&value.span());
        let title = format_args!("`{}` must be {}", field.name, wanted(field.kind)).to_string();
        let label = match (field.kind, value.get_ref()) {
            (Kind::Duration { .. } | Kind::ChoiceOrDuration { .. } | Kind::Size { .. }, DeValue::Integer(_)) => {
                "a number of what?".to_owned()
            }
            (_, value) => format!("this is {}", type_name(value)),
        };
        let help = match rewritten(field.kind, value.get_ref(), source) {
            Some(rewritten) => format!("write:  {} = {rewritten}", field.name),
            None => format!("for example:  {} = {}", field.name, field.example),
        };
        let diagnostic = self.error(Code::WrongType, title, value.span(), label).help(help);
        self.report(diagnostic);
    }

    /// A string as given, references to the environment filled in where the table allows them.
    pub(super) fn text(&mut self, name: &'static str) -> Option<Spanned<Cow<'a, str>>> {
        let entry = self.entry(name)?;
        self.text_of(entry.field, entry.value)
    }

    fn text_of(&mut self, field: &'static Field, value: &'a Value<'a>) -> Option<Spanned<Cow<'a, str>>> {
        let DeValue::String(text) = value.get_ref() else {
            self.wrong_type(field, value);
            return None;
        };
        let filled = if self.table.interpolates() {
            fill(text, self.reader.env)
        } else {
            reference_out_of_place(text).map_or(Ok(Cow::Borrowed(text.as_ref())), |mistake| Err(vec![mistake]))
        };
        let span = value.span();
        match filled {
            Ok(filled) => Some(Spanned { value: filled, span }),
            Err(mistakes) => {
                for mistake in mistakes {
                    let wrong = place(&span, text, &mistake.range);
                    self.mistaken(field.name, mistake, wrong);
                }
                None
            }
        }
    }

    /// A string that `parse` reads.
    pub(super) fn parsed<T>(
        &mut self,
        name: &'static str,
        parse: impl FnOnce(&str) -> Result<T, Mistake>,
    ) -> Option<Spanned<T>> {
        let Spanned { value: text, span } = self.text(name)?;
        match parse(&text) {
            Ok(value) => Some(Spanned { value, span }),
            Err(mistake) => {
                // What was filled in is not what stands in the file: then the whole string is underlined.
                let verbatim = matches!(text, Cow::Borrowed(_));
                let wrong = if verbatim { place(&span, &text, &mistake.range) } else { span };
                self.mistaken(name, mistake, wrong);
                None
            }
        }
    }

    /// A duration; `Some(None)` is `"off"`.
    pub(super) fn duration_or_off(&mut self, name: &'static str) -> Option<Spanned<Option<Duration>>> {
        let kind = self.table.field(name)?.kind;
        self.parsed(name, |text| bounded(text, kind))
    }

    /// The same, or an expression that gives one: one that names the row.
    pub(super) fn lifetime(&mut self, name: &'static str) -> Option<Spanned<Option<Lifetime>>> {
        let kind = self.table.field(name)?.kind;
        let mut lifetime = self.parsed(name, |text| match text.contains("row") {
            true => expression(text).map(|value| Some(Lifetime::OfRow(Spanned { value, span: 0..0 }))),
            false => bounded(text, kind).map(|duration| duration.map(Lifetime::Constant)),
        })?;
        if let Some(Lifetime::OfRow(expression)) = &mut lifetime.value {
            expression.span = lifetime.span.clone();
        }
        Some(lifetime)
    }

    /// A duration that cannot be `"off"`.
    pub(super) fn duration(&mut self, name: &'static str) -> Option<Duration> {
        self.duration_or_off(name).and_then(|duration| duration.value)
    }

    /// A number of bytes.
    pub(super) fn size(&mut self, name: &'static str) -> Option<u64> {
        let Some(Kind::Size { min, max }) = self.table.field(name).map(|field| field.kind) else { return None };
        let bounds = (size_written(min), size_written(max));
        let size = self.parsed(name, |text| within(text, quantity::size(text)?, &(min..=max), &bounds))?;
        Some(size.value)
    }

    /// An integer.
    pub(super) fn count(&mut self, name: &'static str) -> Option<u64> {
        let entry = self.entry(name)?;
        let (Kind::Count { min, max }, DeValue::Integer(integer)) = (entry.field.kind, entry.value.get_ref()) else {
            self.wrong_type(entry.field, entry.value);
            return None;
        };
        let number = i128::from_str_radix(integer.as_str(), integer.radix()).unwrap_or(i128::MAX);
        let bounds = (min, max);
        let checked = within("", number, &(i128::from(min)..=i128::from(max)), &bounds);
        match checked {
            Ok(number) => u64::try_from(number).ok(),
            Err(mistake) => {
                self.mistaken(name, mistake, entry.value.span());
                None
            }
        }
    }

    /// True or false.
    pub(super) fn flag(&mut self, name: &'static str) -> Option<bool> {
        let entry = self.entry(name)?;
        let DeValue::Boolean(flag) = entry.value.get_ref() else {
            self.wrong_type(entry.field, entry.value);
            return None;
        };
        Some(*flag)
    }

    /// One of the names that the field's kind lists.
    pub(super) fn choice(&mut self, name: &'static str) -> Option<Spanned<&'static str>> {
        let Some(Kind::Choice(choices)) = self.table.field(name).map(|field| field.kind) else { return None };
        self.parsed(name, |text| chosen(text, choices))
    }

    /// One of these names, or a duration.
    pub(super) fn choice_or_duration(&mut self, name: &'static str) -> Option<Spanned<Either>> {
        let Some(Kind::ChoiceOrDuration { choices, min, max }) = self.table.field(name).map(|field| field.kind) else {
            return None;
        };
        self.parsed(name, |text| match text.starts_with(|first: char| first.is_ascii_digit()) {
            true => bounded(text, Kind::Duration { min, max, off: false })
                .map(|duration| Either::Duration(duration.unwrap_or(min))),
            false => chosen(text, choices).map(Either::Choice).map_err(|mistake| {
                let (min, max) = (duration_written(min), duration_written(max));
                mistake.help(format!("or a duration from {min} to {max}"))
            }),
        })
    }

    /// Several of the names that the field's kind lists.
    pub(super) fn choices(&mut self, name: &'static str) -> Option<Spanned<Vec<Spanned<&'static str>>>> {
        let Some(Kind::Choices(choices)) = self.table.field(name).map(|field| field.kind) else { return None };
        self.list(name, |text| chosen(text, choices))
    }

    /// An array of strings that `parse` reads: not empty, none given twice.
    pub(super) fn list<T>(
        &mut self,
        name: &'static str,
        mut parse: impl FnMut(&str) -> Result<T, Mistake>,
    ) -> Option<Spanned<Vec<Spanned<T>>>> {
        let entry = self.entry(name)?;
        let DeValue::Array(array) = entry.value.get_ref() else {
            self.wrong_type(entry.field, entry.value);
            return None;
        };
        let span = entry.value.span();
        if array.is_empty() {
            let help = format!("for example:  {name} = {}; or leave it out", entry.field.example);
            let empty = self.error(Code::Empty, format_args!("`{name}` is empty"), span.clone(), "").help(help);
            self.report(empty);
            return None;
        }
        let mut seen: Vec<Spanned<Cow<'a, str>>> = Vec::new();
        let mut values = Vec::new();
        for item in array {
            let Some(text) = self.text_of(entry.field, item) else { continue };
            if let Some(first) = seen.iter().find(|other| other.value == text.value) {
                let twice = self
                    .error(
                        Code::NamedTwice,
                        format_args!("`{name}` names `{}` twice", text.value),
                        text.span.clone(),
                        "again",
                    )
                    .context(first.span.clone(), "first here")
                    .help("remove one of them");
                self.report(twice);
                continue;
            }
            match parse(&text.value) {
                Ok(value) => values.push(Spanned { value, span: text.span.clone() }),
                Err(mistake) => {
                    let wrong = place(&text.span, &text.value, &mistake.range);
                    self.mistaken(name, mistake, wrong);
                }
            }
            seen.push(text);
        }
        Some(Spanned { value: values, span })
    }

    /// An array of column names.
    pub(super) fn columns(&mut self, name: &'static str) -> Option<Spanned<Vec<Spanned<String>>>> {
        self.list(name, |text| match text {
            "" => Err(Mistake::whole(Code::Empty, text, "has an empty column name")),
            _ => Ok(text.to_owned()),
        })
    }

    /// A table of strings that `parse` reads, in the order of the file.
    pub(super) fn pairs<T>(
        &mut self,
        name: &'static str,
        mut parse: impl FnMut(&str) -> Result<T, Mistake>,
    ) -> Vec<(Spanned<String>, Spanned<T>)> {
        let Some(entry) = self.entry(name) else { return Vec::new() };
        let DeValue::Table(table) = entry.value.get_ref() else {
            self.wrong_type(entry.field, entry.value);
            return Vec::new();
        };
        let mut pairs = Vec::new();
        for (key, item) in in_file_order(table) {
            if self.lies_in_wrong_table(name, &entry, key) {
                continue;
            }
            let DeValue::String(text) = item.get_ref() else {
                let title = format!("`{name}.{}` must be a text in quotes", key.get_ref());
                let label = format!("this is {}", type_name(item.get_ref()));
                let wrong = self.error(Code::WrongType, title, item.span(), label);
                self.report(wrong);
                continue;
            };
            match reference_out_of_place(text).map_or_else(|| parse(text), Err) {
                Ok(value) => {
                    let key = Spanned { value: key.get_ref().to_string(), span: key.span() };
                    pairs.push((key, Spanned { value, span: item.span() }));
                }
                Err(mistake) => {
                    let wrong = place(&item.span(), text, &mistake.range);
                    self.mistaken(&format!("{name}.{}", key.get_ref()), mistake, wrong);
                }
            }
        }
        pairs
    }

    /// Reports a field of this table that stands below the header of its sub-table, as
    /// `key = …` below `[rule.product.vars]`: TOML puts everything there until the next header.
    fn lies_in_wrong_table(&mut self, name: &str, entry: &Entry<'_>, key: &toml::Spanned<Cow<'_, str>>) -> bool {
        let field = key.get_ref().as_ref();
        let header = self.reader.sources.text(&entry.value.span());
        let own = self.table.field(field).filter(|field| self.given(field.name).is_none());
        let lost = own.filter(|_| header.starts_with('['));
        if let Some(lost) = lost {
            self.lost.push((lost.name, key.span()));
            let title = format!("`{field}` has landed in `{name}`");
            let wrong = self
                .error(Code::MisplacedField, title, key.span(), format!("TOML reads this as `{name}.{field}`"))
                .context(entry.value.span(), "because it stands below this header")
                .help(format!("move it above {header}, or write:  {name} = {{ … }}  in one line"));
            self.report(wrong);
        }
        lost.is_some()
    }

    /// A table inside this one.
    pub(super) fn subsection<T>(
        &mut self,
        name: &'static str,
        table: Table,
        read: impl FnOnce(&mut Section<'_, 'a>) -> Option<T>,
    ) -> Option<T> {
        let entry = self.entry(name)?;
        let DeValue::Table(entries) = entry.value.get_ref() else {
            self.wrong_type(entry.field, entry.value);
            return None;
        };
        let title = format!("{}, `{name}`", self.title);
        let mut section = Section::new(self.reader, table, title, entry.value.span(), entries);
        let read = read(&mut section);
        section.finish();
        read
    }

    /// The tables of an array of them.
    pub(super) fn subsections<T>(
        &mut self,
        name: &'static str,
        table: Table,
        mut read: impl FnMut(&mut Section<'_, 'a>) -> Option<T>,
    ) -> Vec<T> {
        let Some(entry) = self.entry(name) else { return Vec::new() };
        let items = entry.value.get_ref().as_array().filter(|items| items.iter().all(|item| item.get_ref().is_table()));
        let Some(items) = items else {
            self.wrong_type(entry.field, entry.value);
            return Vec::new();
        };
        if items.is_empty() {
            let help = format!("for example:  {name} = {}", entry.field.example);
            let empty = self.error(Code::Empty, format_args!("`{name}` is empty"), entry.value.span(), "").help(help);
            self.report(empty);
        }
        let mut found = Vec::new();
        for item in items {
            let Some(entries) = item.get_ref().as_table() else { continue };
            let title = format!("{}, `{name}`", self.title);
            let mut section = Section::new(self.reader, table, title, item.span(), entries);
            found.extend(read(&mut section));
            section.finish();
        }
        found
    }

    /// Reports every field that nobody asked for, and what the others need.
    pub(super) fn finish(mut self) {
        self.check_required();
        self.check_needs();
        for (key, _) in in_file_order(self.entries) {
            if !self.read.contains(&key.get_ref().as_ref()) {
                let unknown = self.unknown(key.get_ref(), key.span());
                self.report(unknown);
            }
        }
    }

    /// Reports fields that must be given and are not.
    fn check_required(&mut self) {
        for field in self.table.fields().filter(|field| field.default == Fallback::Required) {
            if self.given(field.name).is_none() {
                let missing = self.error(
                    Code::MissingField,
                    format_args!("`{}` is missing", field.name),
                    self.header.clone(),
                    "",
                );
                let missing = missing.help(format!("add:  {} = {}", field.name, field.example));
                self.reader.report_missing(self.header.start, missing);
            }
        }
    }

    /// Reports fields that stand without another one that they need.
    fn check_needs(&mut self) {
        for field in self.table.fields() {
            let Some(span) = self.given(field.name) else { continue };
            for need in field.needs.iter().filter_map(|need| self.table.field(need)) {
                if self.given(need.name).is_none() {
                    let problem = self
                        .error(
                            Code::MissingPartner,
                            format_args!("`{}` needs `{}`", field.name, need.name),
                            span.clone(),
                            "",
                        )
                        .help(format!("add:  {} = {}", need.name, need.example))
                        .help(format!("or leave `{}` out", field.name));
                    self.reader.report_missing(self.header.start, problem);
                }
            }
        }
    }

    fn unknown(&self, name: &str, span: Range<usize>) -> Diagnostic {
        let unknown =
            |code: Code, label: String| self.error(code, format_args!("unknown field `{name}`"), span.clone(), label);
        let homes = homes(name);
        if !homes.is_empty() {
            return unknown(Code::MisplacedField, format!("this is a field of {homes}"))
                .help(format!("move it below {homes}"));
        }
        let names = self.table.fields().map(|field| field.name);
        match nearest(name, names.clone()) {
            Some(near) => {
                unknown(Code::UnknownField, format!("did you mean `{near}`?")).help(format!("write:  {near} = …"))
            }
            None => {
                let names: Vec<_> = names.map(|name| format!("`{name}`")).collect();
                unknown(Code::UnknownField, String::new()).help(format!(
                    "{} has {}",
                    self.table.header(),
                    names.join(", ")
                ))
            }
        }
    }
}

/// See [`Section::choice_or_duration`].
pub(super) enum Either {
    Choice(&'static str),
    Duration(Duration),
}

/// A duration within the field's bounds; `None` is `"off"`.
fn bounded(text: &str, kind: Kind) -> Result<Option<Duration>, Mistake> {
    let Kind::Duration { min, max, off } = kind else { return Ok(None) };
    if off && text == "off" {
        return Ok(None);
    }
    let duration = quantity::duration(text)?;
    if off && duration.is_zero() {
        return Ok(None);
    }
    let bounds = (duration_written(min), duration_written(max));
    within(text, duration, &(min..=max), &bounds).map(Some)
}

/// The entries of a table in the order of the file.
pub(super) fn in_file_order<'a>(table: &'a DeTable<'a>) -> Vec<(&'a toml::Spanned<Cow<'a, str>>, &'a Value<'a>)> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    entries
}

/// The headers of the tables that have a field of this name, for messages.
pub(super) fn homes(name: &str) -> String {
    let tables = Table::ALL.into_iter().filter(|table| table.field(name).is_some());
    tables.map(Table::header).collect::<Vec<_>>().join(" or ")
}

/// The template that `text` is, through one of [`Template`]'s parsers.
pub(super) fn template(text: &str, parse: fn(&str) -> Result<Template, TemplateError>) -> Result<Template, Mistake> {
    parse(text).map_err(|error| Mistake {
        code: error.code,
        range: error.range,
        problem: "is not a usable template".to_owned(),
        label: error.message,
        help: error.help,
    })
}

/// One of `choices`.
fn chosen(text: &str, choices: &[&'static str]) -> Result<&'static str, Mistake> {
    if let Some(choice) = choices.iter().find(|choice| **choice == text) {
        return Ok(choice);
    }
    let list = choices.iter().map(|choice| format!("\"{choice}\"")).collect::<Vec<_>>().join(" or ");
    let mistake = Mistake::whole(Code::NotAChoice, text, format!("can only be {list}"));
    if text.eq_ignore_ascii_case("truncate") {
        return Err(mistake.help("TRUNCATE counts where \"delete\" does"));
    }
    Err(match nearest(text, choices.iter().copied()) {
        Some(near) => mistake.label(format!("did you mean \"{near}\"?")),
        None => mistake,
    })
}

/// `value`, if it is in `range`; `bounds` is the range as people write it.
fn within<T: PartialOrd, B: Display>(
    text: &str,
    value: T,
    range: &std::ops::RangeInclusive<T>,
    bounds: &(B, B),
) -> Result<T, Mistake> {
    if range.contains(&value) {
        return Ok(value);
    }
    Err(Mistake::whole(Code::OutOfRange, text, format!("must be from {} to {}", bounds.0, bounds.1)))
}

/// What a field takes, for messages.
fn wanted(kind: Kind) -> &'static str {
    match kind {
        Kind::Text | Kind::Url | Kind::Path | Kind::Address | Kind::Choice(_) => "a text in quotes",
        Kind::TableName => "a table's name in quotes",
        Kind::ChoiceOrDuration { .. } => "a word, or a duration with its unit, in quotes",
        Kind::Duration { .. } => "a duration with its unit, in quotes",
        Kind::Size { .. } => "a size with its unit, in quotes",
        Kind::Share => "a percentage in quotes",
        Kind::RowsPerSecond | Kind::SharePerMinute => "a rate with its unit, in quotes",
        Kind::Flag => "true or false",
        Kind::Count { .. } => "a whole number",
        Kind::Template => "a key template in quotes",
        Kind::Expression => "an expression in quotes",
        Kind::Templates => "an array of key templates",
        Kind::Columns => "an array of column names",
        Kind::Choices(_) | Kind::Texts => "an array of texts",
        Kind::Pairs => "a table of texts",
        Kind::Section => "a table",
        Kind::Sections => "an array of tables",
    }
}

fn type_name(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date or time",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}

/// What was probably meant, as TOML.
fn rewritten(kind: Kind, value: &DeValue<'_>, source: &str) -> Option<String> {
    match (kind, value) {
        (
            Kind::Duration { off: true, .. } | Kind::Address | Kind::RowsPerSecond | Kind::SharePerMinute,
            DeValue::Boolean(false),
        ) => Some("\"off\"".to_owned()),
        (Kind::Duration { .. } | Kind::ChoiceOrDuration { .. }, DeValue::Integer(integer)) => {
            integer.as_str().parse().ok().map(seconds_written)
        }
        (Kind::Size { .. }, DeValue::Integer(integer)) => {
            integer.as_str().parse().ok().map(|bytes| format!("\"{}\"", size_written(bytes)))
        }
        (Kind::Share, DeValue::Float(float)) => {
            let share = float.as_str().parse::<f64>().ok().filter(|share| (0.0..1.0).contains(share))?;
            Some(format!("\"{}%\"", (share * 100_000.0).round() / 1_000.0))
        }
        (Kind::Share, DeValue::Integer(integer)) => Some(format!("\"{}%\"", integer.as_str())),
        (Kind::RowsPerSecond, DeValue::Integer(integer)) => Some(format!("\"{}/s\"", integer.as_str())),
        (Kind::Flag, DeValue::String(text)) if matches!(text.as_ref(), "true" | "false") => Some(text.to_string()),
        (Kind::Templates | Kind::Columns | Kind::Texts | Kind::Choices(_), DeValue::String(_)) => {
            Some(format!("[{source}]"))
        }
        (Kind::Count { .. }, DeValue::String(text)) => text.parse::<u64>().ok().map(|number| number.to_string()),
        _ => None,
    }
}

/// The expression that `text` is.
pub(super) fn expression(text: &str) -> Result<Expression, Mistake> {
    Expression::parse(text).map_err(|error| Mistake {
        code: Code::Expression,
        range: error.range,
        problem: error.problem,
        label: error.label,
        help: error.help,
    })
}
