//! A bound expression, evaluated by walking it.
//!
//! Three things can keep a part from having a value. NULL is a value and follows SQL: what touches it is NULL, and `&&`,
//! `||` and `!` know three truths. A column that the change does not carry is unknown, and an operation can fail: either
//! ends the part that needs it, but `false && …` and `true || …` do not need their other side, whichever it is.

use std::borrow::Cow;
use std::sync::Arc;

use regex::Regex;

use super::decimal::Decimal;
use super::instant::{Form, Instant};
use super::json;
use super::tree::Comparison;
use super::value::{Arithmetic, Value, calculate, compare, equal, mismatch, utf8};
use super::{EvalError, Image, Images, Unevaluated};
use crate::decode::types::JsonType;
use crate::decode::value::write_json;
use crate::model::Datum;

/// A part of a bound expression.
#[derive(Clone, Debug)]
pub(super) enum Term {
    Constant(Value<'static>),
    /// `op`
    Operation,
    Column(Column),
    /// A member or an element of JSON.
    Member(Box<Term>, String),
    Element(Box<Term>, Box<Term>),
    HasMember(Box<Term>, String),
    IsNull(Box<Term>),
    Not(Box<Term>),
    Negate(Box<Term>),
    And(Box<Term>, Box<Term>),
    Or(Box<Term>, Box<Term>),
    Choice(Box<[Term; 3]>),
    Compare(Comparison, Box<Term>, Box<Term>),
    Calculate(Arithmetic, Box<Term>, Box<Term>),
    InList(Box<Term>, Box<[Term]>),
    InContainer(Box<Term>, Box<Term>),
    Apply(Function, Box<Term>),
    Test(TextTest, Box<Term>, Box<Term>),
    Matches(Regex, Box<Term>),
}

/// A function of one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Function {
    Size,
    /// The size of a `bytea`.
    ByteCount,
    Int,
    Double,
    Text,
    LowerAscii,
    UpperAscii,
}

/// A question about two texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TextTest {
    StartsWith,
    EndsWith,
    Contains,
}

/// A column of one of the images.
#[derive(Clone, Debug)]
pub(super) struct Column {
    pub(super) of: Which,
    /// Its place in the tuple.
    pub(super) place: usize,
    /// Whether it is part of the replica identity.
    pub(super) in_identity: bool,
    pub(super) load: Load,
    /// How `row_to_json` shows it.
    pub(super) json: Arc<JsonType>,
}

/// An image by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    Row,
    Old,
    New,
}

/// How a column's text form becomes a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Load {
    Bool,
    Int,
    Decimal,
    Float,
    Text,
    /// `char(n)`, without the blanks at its end, which mean nothing to SQL either.
    Padded,
    Time(Form),
    /// `json` and `jsonb`
    Json,
    /// What `row_to_json` shows as an object or an array.
    Container,
}

type Outcome<'a> = Result<Value<'a>, Unevaluated>;

impl Column {
    /// Its text form, `None` for NULL.
    fn text<'a>(&self, images: &Images<'a>) -> Result<Option<&'a [u8]>, Unevaluated> {
        match self.datum(images)? {
            Datum::Text(text) => Ok(Some(text)),
            Datum::Null => Ok(None),
            Datum::UnchangedToast => Err(Unevaluated::Unknown),
        }
    }

    fn datum<'a>(&self, images: &Images<'a>) -> Result<Datum<'a>, Unevaluated> {
        let image = match self.of {
            Which::Row => images.row,
            Which::Old => images.old,
            Which::New => images.new,
        };
        let row = match image {
            Image::Absent => return Ok(Datum::Null),
            Image::Full(row) => row,
            Image::Key(row) if self.in_identity => row,
            Image::Key(_) | Image::Unknown => return Err(Unevaluated::Unknown),
        };
        row.get(self.place).copied().ok_or(Unevaluated::Unknown)
    }

    fn value<'a>(&self, images: &Images<'a>) -> Outcome<'a> {
        let Some(text) = self.text(images)? else { return Ok(Value::Null) };
        Ok(self.load.value(&self.json, text)?)
    }
}

impl Load {
    fn value<'a>(self, json: &JsonType, text: &'a [u8]) -> Result<Value<'a>, EvalError> {
        Ok(match self {
            Load::Bool => Value::Bool(match text {
                b"t" => true,
                b"f" => false,
                _ => return Err(EvalError::Malformed("a boolean")),
            }),
            Load::Int => Value::Int(parse_integer(text).ok_or(EvalError::Malformed("an integer"))?),
            Load::Decimal => match text {
                b"NaN" | b"Infinity" | b"-Infinity" => float(text)?,
                _ => Value::Decimal(Decimal::parse(text)?),
            },
            Load::Float => float(text)?,
            Load::Text => Value::Text(Cow::Borrowed(utf8(text)?)),
            Load::Padded => Value::Text(Cow::Borrowed(utf8(text)?.trim_end_matches(' '))),
            Load::Time(form) => {
                let instant = Instant::parse(utf8(text)?, form);
                Value::Instant(instant.ok_or(EvalError::Malformed("a date or timestamp"))?)
            }
            Load::Json => json::value(Cow::Borrowed(utf8(text)?))?,
            Load::Container => {
                let mut shown = Vec::with_capacity(text.len());
                write_json(&mut shown, json, text)?;
                let shown = String::from_utf8(shown).map_err(|_| EvalError::Malformed("JSON"))?;
                json::value(Cow::Owned(shown))?
            }
        })
    }
}

fn parse_integer(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn float<'a>(text: &[u8]) -> Result<Value<'a>, EvalError> {
    utf8(text)?.parse().map(Value::Float).map_err(|_| EvalError::Malformed("a number"))
}

impl Term {
    pub(super) fn evaluate<'a>(&'a self, images: &Images<'a>) -> Outcome<'a> {
        Ok(match self {
            Term::Constant(value) => borrowed(value),
            Term::Operation => Value::Text(Cow::Borrowed(images.op.name())),
            Term::Column(column) => column.value(images)?,
            Term::Member(of, name) => match of.evaluate(images)? {
                Value::Container(json) => json::member(&json, name)?.unwrap_or(Value::Null),
                _ => Value::Null,
            },
            Term::Element(of, index) => element(of.evaluate(images)?, index.evaluate(images)?)?,
            Term::HasMember(of, name) => Value::Bool(match of.evaluate(images)? {
                Value::Container(json) => json::member(&json, name)?.is_some(),
                _ => false,
            }),
            Term::IsNull(of) => Value::Bool(of.is_null(images)?),
            Term::Not(_) | Term::And(..) | Term::Or(..) | Term::Compare(..) => {
                self.truth(images)?.map_or(Value::Null, Value::Bool)
            }
            Term::Negate(of) => negated(of.evaluate(images)?)?,
            Term::Choice(_) => self.chosen(images)?.evaluate(images)?,
            Term::Calculate(operation, left, right) => {
                calculate(*operation, &left.evaluate(images)?, &right.evaluate(images)?)?
            }
            Term::InList(needle, list) => in_list(&needle.evaluate(images)?, list, images)?,
            Term::InContainer(needle, container) => {
                in_container(&needle.evaluate(images)?, &container.evaluate(images)?)?
            }
            Term::Apply(function, of) => function.apply(of.evaluate(images)?)?,
            Term::Test(test, text, part) => {
                let (text, part) = (text.evaluate(images)?, part.evaluate(images)?);
                match (&text, &part) {
                    (Value::Null, _) | (_, Value::Null) => Value::Null,
                    (Value::Text(text), Value::Text(part)) => Value::Bool(test.holds(text, part)),
                    _ => return Err(mismatch(test.name(), &text, &part).into()),
                }
            }
            Term::Matches(pattern, of) => match of.evaluate(images)? {
                Value::Null => Value::Null,
                Value::Text(text) => Value::Bool(pattern.is_match(&text)),
                other => return Err(EvalError::Argument { function: "matches", kind: other.kind() }.into()),
            },
        })
    }

    /// Appends the value as JSON. A column, chosen or alone, goes through as `row_to_json` shows it.
    pub(super) fn write_json(&self, images: &Images<'_>, out: &mut Vec<u8>) -> Result<(), Unevaluated> {
        match self {
            Term::Column(column) => match column.text(images)? {
                Some(text) => write_json(out, &column.json, text).map_err(EvalError::Invalid)?,
                None => out.extend_from_slice(b"null"),
            },
            Term::Choice(_) => self.chosen(images)?.write_json(images, out)?,
            _ => self.evaluate(images)?.write_json(out)?,
        }
        Ok(())
    }

    /// Appends the value in Postgres's text form; `false` for NULL.
    pub(super) fn write_text(&self, images: &Images<'_>, out: &mut Vec<u8>) -> Result<bool, Unevaluated> {
        match self {
            Term::Column(column) => {
                let text = column.text(images)?;
                out.extend_from_slice(text.unwrap_or_default());
                Ok(text.is_some())
            }
            Term::Choice(_) => self.chosen(images)?.write_text(images, out),
            _ => Ok(self.evaluate(images)?.write_text(out)),
        }
    }

    /// The value of a condition; `None` for NULL.
    pub(super) fn truth(&self, images: &Images<'_>) -> Result<Option<bool>, Unevaluated> {
        match self {
            Term::Not(of) => Ok(of.truth(images)?.map(|truth| !truth)),
            Term::And(left, right) => left.joined(right, false, images),
            Term::Or(left, right) => left.joined(right, true, images),
            // Most comparisons are with a constant, which nothing has to be made of.
            Term::Compare(comparison, left, right) => match right.as_ref() {
                Term::Constant(right) => Ok(compared(*comparison, &left.evaluate(images)?, right)?),
                right => Ok(compared(*comparison, &left.evaluate(images)?, &right.evaluate(images)?)?),
            },
            _ => match self.evaluate(images)? {
                Value::Null => Ok(None),
                Value::Bool(truth) => Ok(Some(truth)),
                other => Err(EvalError::NotBool(other.kind()).into()),
            },
        }
    }

    fn is_null(&self, images: &Images<'_>) -> Result<bool, Unevaluated> {
        match self {
            // Whatever it is, a TOASTed value is no NULL.
            Term::Column(column) => Ok(column.datum(images)? == Datum::Null),
            _ => Ok(self.evaluate(images)?.is_null()),
        }
    }

    /// The side of `a ? b : c` that counts: `c` where `a` is NULL, as in SQL's CASE.
    fn chosen(&self, images: &Images<'_>) -> Result<&Term, Unevaluated> {
        match self {
            Term::Choice(parts) => {
                let [condition, then, otherwise] = parts.as_ref();
                Ok(if condition.truth(images)? == Some(true) { then } else { otherwise })
            }
            _ => Ok(self),
        }
    }

    /// `&&` and `||`: one side that is `decisive` decides, whatever the other is.
    fn joined(&self, other: &Term, decisive: bool, images: &Images<'_>) -> Result<Option<bool>, Unevaluated> {
        let first = self.truth(images);
        if matches!(first, Ok(Some(truth)) if truth == decisive) {
            return Ok(Some(decisive));
        }
        let second = other.truth(images);
        if matches!(second, Ok(Some(truth)) if truth == decisive) {
            return Ok(Some(decisive));
        }
        Ok(first?.and(second?))
    }
}

/// The same value, borrowed from the expression.
fn borrowed<'a>(value: &'a Value<'static>) -> Value<'a> {
    match value {
        Value::Text(text) => Value::Text(Cow::Borrowed(text)),
        Value::Container(json) => Value::Container(Cow::Borrowed(json)),
        Value::Null => Value::Null,
        Value::Bool(truth) => Value::Bool(*truth),
        Value::Int(integer) => Value::Int(*integer),
        Value::Decimal(decimal) => Value::Decimal(*decimal),
        Value::Float(float) => Value::Float(*float),
        Value::Instant(instant) => Value::Instant(*instant),
        Value::Span(us) => Value::Span(*us),
    }
}

fn truth_value<'a>(truth: Option<bool>) -> Value<'a> {
    truth.map_or(Value::Null, Value::Bool)
}

fn compared(comparison: Comparison, left: &Value<'_>, right: &Value<'_>) -> Result<Option<bool>, EvalError> {
    let order = || compare(left, right, comparison.sign());
    Ok(match comparison {
        Comparison::Equal => equal(left, right)?,
        Comparison::Unequal => equal(left, right)?.map(|equal| !equal),
        Comparison::Less => order()?.map(|order| order.is_lt()),
        Comparison::LessOrEqual => order()?.map(|order| order.is_le()),
        Comparison::Greater => order()?.map(|order| order.is_gt()),
        Comparison::GreaterOrEqual => order()?.map(|order| order.is_ge()),
    })
}

/// As SQL's IN: NULL where the needle is, or where only a NULL of the list could have been it.
fn in_list<'a>(needle: &Value<'_>, list: &'a [Term], images: &Images<'a>) -> Outcome<'a> {
    let mut found = Some(false);
    for element in list {
        match equal(needle, &element.evaluate(images)?)? {
            Some(true) => return Ok(Value::Bool(true)),
            Some(false) => {}
            None => found = None,
        }
    }
    Ok(truth_value(found))
}

/// Whether an array holds the needle as SQL's ANY says, or an object a member of that name.
fn in_container<'a>(needle: &Value<'_>, container: &Value<'_>) -> Result<Value<'a>, EvalError> {
    let json = match (needle, container) {
        (Value::Null, _) | (_, Value::Null) => return Ok(Value::Null),
        (_, Value::Container(json)) => json,
        _ => return Err(mismatch("in", needle, container)),
    };
    if !json::is_array(json) {
        let Value::Text(name) = needle else { return Ok(Value::Bool(false)) };
        return Ok(Value::Bool(json::member(json, name)?.is_some()));
    }
    let mut found = Some(false);
    for element in json::elements(json)? {
        match equal(needle, &json::value(Cow::Borrowed(element))?)? {
            Some(true) => return Ok(Value::Bool(true)),
            Some(false) => {}
            None => found = None,
        }
    }
    Ok(truth_value(found))
}

/// `of[index]`; NULL where there is no such part.
fn element<'a>(of: Value<'a>, index: Value<'_>) -> Result<Value<'a>, EvalError> {
    let found = match (&of, &index) {
        (Value::Container(json), Value::Int(index)) => json::element(json, *index)?,
        (Value::Container(json), Value::Text(name)) => json::member(json, name)?,
        _ => None,
    };
    Ok(found.unwrap_or(Value::Null))
}

fn negated(value: Value<'_>) -> Result<Value<'_>, EvalError> {
    Ok(match value {
        Value::Null => Value::Null,
        Value::Int(integer) => Value::Int(integer.checked_neg().ok_or(EvalError::Overflow)?),
        Value::Decimal(decimal) => Value::Decimal(decimal.negate()?),
        Value::Float(float) => Value::Float(-float),
        Value::Span(us) => Value::Span(us.checked_neg().ok_or(EvalError::Overflow)?),
        other => return Err(EvalError::Argument { function: "-", kind: other.kind() }),
    })
}

impl TextTest {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::StartsWith => "startsWith",
            Self::EndsWith => "endsWith",
            Self::Contains => "contains",
        }
    }

    fn holds(self, text: &str, part: &str) -> bool {
        match self {
            Self::StartsWith => text.starts_with(part),
            Self::EndsWith => text.ends_with(part),
            Self::Contains => text.contains(part),
        }
    }
}

impl Function {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Size | Self::ByteCount => "size",
            Self::Int => "int",
            Self::Double => "double",
            Self::Text => "string",
            Self::LowerAscii => "lowerAscii",
            Self::UpperAscii => "upperAscii",
        }
    }

    fn apply(self, value: Value<'_>) -> Result<Value<'_>, EvalError> {
        if value.is_null() {
            return Ok(Value::Null);
        }
        Ok(match (self, value) {
            (Self::Size, Value::Text(text)) => count(text.chars().count()),
            (Self::Size, Value::Container(json)) => count(json::size(&json)?),
            // Behind `\x` two digits a byte.
            (Self::ByteCount, Value::Text(hex)) => count(hex.len().saturating_sub(2) / 2),
            (Self::Int, value) => to_int(&value)?,
            (Self::Double, value) => to_double(&value)?,
            (Self::Text, Value::Text(text)) => Value::Text(text),
            (Self::Text, value) => Value::Text(Cow::Owned(value.text().into_owned())),
            (Self::LowerAscii, Value::Text(text)) => Value::Text(Cow::Owned(text.to_ascii_lowercase())),
            (Self::UpperAscii, Value::Text(text)) => Value::Text(Cow::Owned(text.to_ascii_uppercase())),
            (_, value) => return Err(EvalError::Argument { function: self.name(), kind: value.kind() }),
        })
    }
}

fn count<'a>(count: usize) -> Value<'a> {
    Value::Int(i64::try_from(count).unwrap_or(i64::MAX))
}

/// Towards zero; a time as seconds from 1970.
fn to_int<'a>(value: &Value<'_>) -> Result<Value<'a>, EvalError> {
    /// One beyond the largest and minus it the smallest that fits.
    const LIMIT: f64 = 9_223_372_036_854_775_808.0;
    Ok(Value::Int(match value {
        Value::Int(integer) => *integer,
        Value::Decimal(decimal) => decimal.truncate()?,
        Value::Float(float) if (-LIMIT..LIMIT).contains(float) => *float as i64,
        Value::Float(_) => return Err(EvalError::Overflow),
        Value::Text(text) => text.parse().map_err(|_| EvalError::Conversion("int"))?,
        Value::Instant(instant) => instant.unix_seconds()?,
        other => return Err(EvalError::Argument { function: "int", kind: other.kind() }),
    }))
}

fn to_double<'a>(value: &Value<'_>) -> Result<Value<'a>, EvalError> {
    Ok(Value::Float(match value {
        Value::Int(integer) => *integer as f64,
        Value::Decimal(decimal) => decimal.to_f64(),
        Value::Float(float) => *float,
        Value::Text(text) => text.parse().map_err(|_| EvalError::Conversion("double"))?,
        other => return Err(EvalError::Argument { function: "double", kind: other.kind() }),
    }))
}
