//! The functions of expressions: which there are, what they take, and what to write instead of those there are not.

use regex::RegexBuilder;

use super::ExpressionError;
use super::evaluate::{Function, Term, TextTest};
use super::instant::{Form, Instant, parse_span};
use super::tree::{Kind, Node};
use super::typing::{Binder, Type, Typed};
use super::value::Value;
use crate::suggest::nearest;

/// The memory that a compiled pattern may take, in bytes.
const PATTERN_BYTES_MAX: usize = 1 << 20;

/// What is written before its argument: `size(row.name)`.
const PREFIX: [&str; 6] = ["size", "int", "double", "string", "timestamp", "duration"];

/// What is written behind the text it is about: `row.name.startsWith("a")`.
const BEHIND: [&str; 7] = ["size", "startsWith", "endsWith", "contains", "matches", "lowerAscii", "upperAscii"];

impl Binder<'_> {
    pub(super) fn call(&mut self, name: &str, of: Option<&Node>, arguments: &[Node], node: &Node) -> Option<Typed> {
        match (of, arguments, name) {
            (None, [text], "timestamp" | "duration") => self.literal(name, text, node),
            (None, [argument], _) if PREFIX.contains(&name) => self.apply(name, argument, node),
            (Some(argument), [], "size" | "lowerAscii" | "upperAscii") => self.apply(name, argument, node),
            (Some(text), [pattern], "matches") => self.matches(text, pattern, node),
            (Some(text), [part], _) if BEHIND.contains(&name) && name != "size" && !name.ends_with("Ascii") => {
                self.test(name, text, part, node)
            }
            _ => {
                let subject = of.or(arguments.first()).map_or("row.name", |node| &self.text[node.range.clone()]);
                self.wrong(no_such_call(name, of.is_some(), arguments.len(), subject, node))
            }
        }
    }

    /// `timestamp("…")` and `duration("…")`, which are constants.
    fn literal(&mut self, name: &str, text: &Node, node: &Node) -> Option<Typed> {
        let example = if name == "duration" { "duration(\"1h30m\")" } else { "timestamp(\"2024-01-01T00:00:00Z\")" };
        let Kind::Text(literal) = &text.kind else {
            let problem = format!("calls `{name}` with something else than a text in quotes");
            return self.wrong(ExpressionError::new(text.range.clone(), problem).help(format!("write {example}")));
        };
        let value = if name == "duration" {
            parse_span(literal).map(|us| (Value::Span(us), Type::Span))
        } else {
            let form = Form::TimestampTz;
            Instant::parse(literal, form).map(|instant| (Value::Instant(instant), Type::Time(form)))
        };
        let Some((value, ty)) = value else {
            let problem = format!("calls `{name}` with a text that is none");
            return self.wrong(ExpressionError::new(text.range.clone(), problem).help(format!("write {example}")));
        };
        Some(Typed::new(Term::Constant(value), ty, node))
    }

    /// A function of one value.
    fn apply(&mut self, name: &str, argument: &Node, node: &Node) -> Option<Typed> {
        let argument = self.node(argument)?;
        let accepted: (Function, fn(Type) -> bool, Type) = match name {
            "size" if argument.ty == Type::Bytes => (Function::ByteCount, |_| true, Type::Int),
            "size" => (Function::Size, Type::is_text, Type::Int),
            "int" => (Function::Int, |ty| ty.is_number() || ty.is_text() || matches!(ty, Type::Time(_)), Type::Int),
            "double" => (Function::Double, |ty| ty.is_number() || ty.is_text(), Type::Float),
            "lowerAscii" => (Function::LowerAscii, Type::is_text, Type::Text),
            "upperAscii" => (Function::UpperAscii, Type::is_text, Type::Text),
            _ => (Function::Text, |_| true, Type::Text),
        };
        let (function, accepts, ty) = accepted;
        if !argument.ty.may_be(accepts) {
            let problem = format!("calls `{name}` with {}, which it does not take", argument.type_name);
            return self.wrong(ExpressionError::new(argument.range, problem));
        }
        Some(Typed::new(Term::Apply(function, argument.boxed()), ty, node))
    }

    fn test(&mut self, name: &str, text: &Node, part: &Node, node: &Node) -> Option<Typed> {
        let test = match name {
            "startsWith" => TextTest::StartsWith,
            "endsWith" => TextTest::EndsWith,
            _ => TextTest::Contains,
        };
        let (text, part) = (self.text(text, name), self.text(part, name));
        Some(Typed::new(Term::Test(test, text?.boxed(), part?.boxed()), Type::Bool, node))
    }

    fn matches(&mut self, text: &Node, pattern: &Node, node: &Node) -> Option<Typed> {
        let text = self.text(text, "matches");
        let Kind::Text(literal) = &pattern.kind else {
            let error = ExpressionError::new(pattern.range.clone(), "matches a pattern that is no text in quotes");
            return self.wrong(error.help("write row.name.matches(\"^[a-z]+$\")"));
        };
        match RegexBuilder::new(literal).size_limit(PATTERN_BYTES_MAX).build() {
            Ok(pattern) => Some(Typed::new(Term::Matches(pattern, text?.boxed()), Type::Bool, node)),
            Err(error) => {
                // The last line says what is wrong; those before it repeat the pattern.
                let told = error.to_string();
                let reason = told.lines().last().unwrap_or_default().trim_start_matches("error: ");
                let problem = format!("has a pattern that is no regular expression: {reason}");
                self.wrong(ExpressionError::new(pattern.range.clone(), problem))
            }
        }
    }

    /// An operand of a function of texts.
    fn text(&mut self, node: &Node, name: &str) -> Option<Typed> {
        let typed = self.node(node)?;
        if typed.ty.may_be(Type::is_text) {
            return Some(typed);
        }
        let problem = format!("calls `{name}` on {}, and it takes text", typed.type_name);
        let error = ExpressionError::new(typed.range.clone(), problem);
        self.wrong(match (typed.ty, name) {
            (Type::Json, _) => error,
            _ => error.help("string(…) makes a text of it"),
        })
    }
}

/// The function does not exist, is written the other way round, or takes another number of arguments; `subject` is what
/// it was called on.
fn no_such_call(name: &str, is_behind: bool, arguments: usize, subject: &str, node: &Node) -> ExpressionError {
    let range = node.mark.clone();
    let (known, other) = if is_behind { (&BEHIND[..], &PREFIX[..]) } else { (&PREFIX[..], &BEHIND[..]) };
    if known.contains(&name) {
        let problem = format!("calls `{name}` with {arguments} arguments");
        return ExpressionError::new(range, problem).help(form(name, is_behind, subject));
    }
    let error = ExpressionError::new(range, format!("calls `{name}`, which is not supported"));
    if other.contains(&name) {
        return error.help(form(name, !is_behind, subject));
    }
    error.help(match name.to_ascii_lowercase().as_str() {
        "lower" => form("lowerAscii", true, subject),
        "upper" => form("upperAscii", true, subject),
        "length" | "len" | "char_length" | "count" => form("size", false, subject),
        "float" => form("double", false, subject),
        "str" | "text" => form("string", false, subject),
        "like" | "ilike" => form("matches", true, subject),
        "interval" => form("duration", false, subject),
        "date" => form("timestamp", false, subject),
        "coalesce" | "ifnull" | "nvl" => format!("write {subject} != null ? {subject} : \"…\""),
        "concat" => "join texts with `+`".to_owned(),
        "now" | "current_timestamp" => {
            "an expression knows the row alone; what changes with time is for `ttl` and `every`".to_owned()
        }
        _ => match nearest(name, known.iter().chain(other).copied()).filter(|near| near.len() + 2 >= name.len()) {
            Some(near) => form(near, BEHIND.contains(&near) && !PREFIX.contains(&near), subject),
            None => format!("functions are has, {}, and behind a text {}", PREFIX.join(", "), BEHIND.join(", ")),
        },
    })
}

/// How a function is written.
fn form(name: &str, is_behind: bool, subject: &str) -> String {
    match name {
        "timestamp" => "write timestamp(\"2024-01-01T00:00:00Z\")".to_owned(),
        "duration" => "write duration(\"1h30m\")".to_owned(),
        "size" | "lowerAscii" | "upperAscii" if is_behind => format!("write {subject}.{name}()"),
        _ if is_behind => format!("write {subject}.{name}(\"…\")"),
        _ => format!("write {name}({subject})"),
    }
}
