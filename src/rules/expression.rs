//! Expressions of the rules file: `when`, `compute`, `score`, `ttl`, `expire_at`.
//!
//! The syntax is that of CEL (<https://cel.dev>); types, NULLs and numbers are those of the table. An [`Expression`] is
//! parsed when the file is read, and becomes a [`BoundExpression`] once the table is known: columns are places in the
//! tuple then, every operand has a type, literals have been converted, patterns compiled. Evaluating one is a walk over
//! a small tree that borrows from the row, and allocates only where a value is made anew.
//!
//! # Names
//!
//! `row` is the row that the expression is about. Where a change is at hand (see [`Names`]) `old` and `new` are the row
//! before and behind it, and `op` is `"insert"`, `"update"` or `"delete"`. A column is `row.name`, or `row["a name"]`.
//!
//! # Types
//!
//! | in Postgres | here | with |
//! |---|---|---|
//! | `bool` | bool | `&& \|\| ! ?:` |
//! | `int2`, `int4`, `int8`, `oid` | int, 64 bits | `== != < <= > >= + - * / %` |
//! | `numeric`, and `1.50` here | decimal, exact, 38 digits (a literal like `1e300` that needs more is a float) | `== … + - *` |
//! | `float4`, `float8` | float | `== … + - * /` |
//! | `text`, `varchar`, `char(n)`, `name` | text, by code point | `== … +`, `size`, `startsWith`, `endsWith`, `contains`, `matches`, `lowerAscii`, `upperAscii` |
//! | `uuid`, enums, `inet` and all others | their text form | `== !=` and the functions of text |
//! | `bytea` | bytes | `== !=` with `b"…"`, `size` |
//! | `timestamptz`, `timestamp`, `date` | times, in UTC | `== … + -` with each other and `duration("1h")`; `timestamp("2024-01-01T00:00:00Z")` |
//! | `json`, `jsonb`, arrays, composite types, `hstore` | JSON, as `row_to_json` shows it | `.member`, `["member"]`, `[0]`, `in`, `has`, `size` |
//!
//! The three kinds of numbers mix. An integer that leaves 64 bits or a decimal that would need more than 38 digits is an
//! error and never a wrong number, and so is dividing by zero. Decimals are not divided, because nobody said to how many
//! digits: `double(row.price) / 3.0`. What comes out of JSON has its type in the data: `==` between different kinds is
//! false, `<` and `+` are errors, and a member that is not there is NULL.
//!
//! # NULL
//!
//! As in SQL: what touches NULL is NULL, `false && null` is false, `true || null` is true, and a condition that is NULL
//! does not hold. Unlike SQL `row.x == null` and `row.x != null` ask whether it is NULL, as people expect who write it.
//! `has(row.x)` is `row.x != null`; `has(row.data.x)` asks whether the member is there, be it null.
//!
//! # Limits
//!
//! A text of 8192 bytes, 96 operators and brackets in each other (a bracket counts as four), 24 choices in each other, 38
//! digits, a pattern that compiles into 1 MiB, joined texts of 64 MiB. Texts compare by code point, as CEL has it and the
//! collation `C`. Nothing depends on the clock, so a change that is replayed gives what it gave before.
//!
//! # Examples
//!
//! Each is a test.
//!
//! | expression | row | result |
//! |---|---|---|
//! | `row.status == "active" && row.amount > 10` | `status = active`, `amount = 10.01` | `true` |
//! | `row.price * row.qty` | `price = 19.99`, `qty = 3` | `59.97` |
//! | `row.qty / 2` | `qty = 7` | `3` |
//! | `row.name != null ? row.name : "nobody"` | `name` is NULL | `"nobody"` |
//! | `row.name.lowerAscii().startsWith("dr. ")` | `name = Dr. No` | `true` |
//! | `row.status in ["new", "paid"]` | `status = paid` | `true` |
//! | `"sale" in row.tags` | `tags = {new,sale}` | `true` |
//! | `row.data.address.city` | `data = {"address": {"city": "Ulm"}}` | `"Ulm"` |
//! | `row.created_at + duration("30d")` | `created_at = 2024-01-01 00:00:00+00` | `"2024-01-31T00:00:00+00:00"` |
//! | `row.created_at > timestamp("2024-01-01T00:00:00Z")` | `created_at = 2024-06-01 12:00:00+00` | `true` |
//! | `string(row.id) + "-" + row.status` | `id = 7`, `status = new` | `"7-new"` |

mod calls;
mod decimal;
mod evaluate;
mod instant;
mod json;
mod lexemes;
mod parse;
mod tree;
mod typing;
mod value;

#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::Range;

use evaluate::Term;
use tree::{Kind, Node};
use value::{Value, float_text};

use crate::decode::types::Types;
use crate::decode::value::ValueError;
use crate::model::{Datum, Relation, Timestamp};

/// A parsed expression, before its table is known.
#[derive(Clone, Debug, PartialEq)]
pub struct Expression {
    text: String,
    root: Node,
}

/// A column that an expression names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColumnUse<'e> {
    /// The column, exactly as in the catalog.
    pub name: &'e str,
    /// Where its name stands in the expression's text.
    pub range: Range<usize>,
    /// Whether it is `old`'s.
    pub of_old: bool,
}

impl Expression {
    /// Reads an expression.
    ///
    /// # Errors
    /// The first place that is no CEL, or a part of CEL that is not supported.
    pub fn parse(text: &str) -> Result<Self, ExpressionError> {
        Ok(Expression { text: text.to_owned(), root: parse::parse(text)? })
    }

    /// Its text, as written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The columns that it names, in the order in which they stand, as often as they do.
    pub fn columns(&self) -> Vec<ColumnUse<'_>> {
        let mut columns = Vec::new();
        collect_columns(&self.root, &mut columns);
        columns
    }
}

fn collect_columns<'e>(node: &'e Node, columns: &mut Vec<ColumnUse<'e>>) {
    if let Kind::Field(of, name) | Kind::Has(of, name) = &node.kind
        && let Kind::Name(image) = &of.kind
        && matches!(image.as_str(), "row" | "old" | "new")
    {
        columns.push(ColumnUse { name, range: node.mark.clone(), of_old: image == "old" });
    }
    node.parts().into_iter().for_each(|part| collect_columns(part, columns));
}

/// What is wrong with an expression, and where in its text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem}")]
pub struct ExpressionError {
    /// The wrong bytes of the text.
    pub range: Range<usize>,
    /// Goes on after what the expression is for: `compares text with int`.
    pub problem: String,
    /// What to say at the place; may be empty.
    pub label: String,
    /// What to do, most likely remedy first.
    pub help: Vec<String>,
}

impl ExpressionError {
    fn new(range: Range<usize>, problem: impl Into<String>) -> Self {
        ExpressionError { range, problem: problem.into(), label: String::new(), help: Vec::new() }
    }

    fn label(mut self, label: impl Into<String>) -> Self {
        self.label = label.into();
        self
    }

    fn help(mut self, help: impl Into<String>) -> Self {
        self.help.push(help.into());
        self
    }
}

/// What an expression is bound against.
#[derive(Clone, Copy, Debug)]
pub struct Scope<'a> {
    /// The table: columns and their places.
    pub relation: &'a Relation,
    /// What is known of the columns' types.
    pub types: &'a Types,
    /// Which names there are besides `row`.
    pub names: Names,
}

/// Which names an expression may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    /// `row` only: what a table shows whenever it is read.
    Row,
    /// `row`, `old`, `new` and `op`: what only a change of the row has.
    Change,
}

/// What an expression must give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A bool: [`BoundExpression::truth`].
    Condition,
    /// Anything that JSON can show: [`BoundExpression::write_json`] and [`BoundExpression::write_text`].
    Value,
    /// A number, or a duration as its seconds: [`BoundExpression::number`].
    Number,
    /// A point in time: [`BoundExpression::timestamp`].
    Timestamp,
}

/// What is known of a row at one moment, one datum for each column of the relation.
#[derive(Clone, Copy, Debug)]
pub enum Image<'a> {
    /// There is no such row, as before an INSERT or behind a DELETE: every column is NULL.
    Absent,
    /// The change does not carry it.
    Unknown,
    /// The columns of the replica identity are known, whatever the others show.
    Key(&'a [Datum<'a>]),
    /// All columns are known but for those that are [`Datum::UnchangedToast`].
    Full(&'a [Datum<'a>]),
}

/// How a row came to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// INSERT; also a row that was read from its table.
    Insert,
    /// UPDATE
    Update,
    /// DELETE
    Delete,
}

impl Operation {
    /// What `op` is.
    pub fn name(self) -> &'static str {
        match self {
            Self::Insert => "insert",
            Self::Update => "update",
            Self::Delete => "delete",
        }
    }
}

/// What an expression is evaluated on.
#[derive(Clone, Copy, Debug)]
pub struct Images<'a> {
    /// The row it is about.
    pub row: Image<'a>,
    /// The row before the change.
    pub old: Image<'a>,
    /// The row behind it.
    pub new: Image<'a>,
    /// What the change is.
    pub op: Operation,
}

impl<'a> Images<'a> {
    /// A row by itself, as a read shows it.
    pub fn of_row(row: &'a [Datum<'a>]) -> Self {
        Images { row: Image::Full(row), old: Image::Absent, new: Image::Full(row), op: Operation::Insert }
    }
}

/// An expression, ready for the rows of one relation.
#[derive(Clone, Debug)]
pub struct BoundExpression {
    root: Term,
    columns: Box<[usize]>,
    old_columns: Box<[usize]>,
}

/// Whether a condition holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Truth {
    /// It does.
    True,
    /// It does not, or it is NULL.
    False,
    /// What it depends on is not in the change.
    Unknown,
    /// It could not be evaluated.
    Failed(EvalError),
}

/// Why there is no value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unevaluated {
    /// The change does not carry a column that it needs: an unchanged TOASTed value, or one outside of the old image.
    #[error("a column that an expression needs is not in the log")]
    Unknown,
    /// The row has no such value.
    #[error(transparent)]
    Failed(#[from] EvalError),
}

impl From<ValueError> for EvalError {
    fn from(error: ValueError) -> Self {
        EvalError::Invalid(error)
    }
}

/// An expression has no value for a row. Never says what the row holds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvalError {
    /// Integers, floats and times.
    #[error("a number in an expression leaves its range")]
    Overflow,
    /// Of an integer or a float.
    #[error("an expression divides by zero")]
    DivisionByZero,
    /// Of a number out of JSON; where the types are known beforehand this is no expression.
    #[error("an expression divides a decimal: double(…) or int(…) around it says how")]
    DecimalDivision,
    /// Decimals hold 38.
    #[error("a decimal in an expression needs more than 38 digits")]
    TooManyDigits,
    /// Joined texts.
    #[error("a text in an expression grows beyond 64 MiB")]
    TooLarge,
    /// Two values out of JSON do not go together.
    #[error("`{operator}` in an expression meets {left} and {right}")]
    Mismatch {
        /// As written.
        operator: &'static str,
        /// What stands on its left.
        left: &'static str,
        /// What stands on its right.
        right: &'static str,
    },
    /// A value out of JSON is not what the function takes.
    #[error("`{function}` in an expression cannot take {kind}")]
    Argument {
        /// As written.
        function: &'static str,
        /// What it was given.
        kind: &'static str,
    },
    /// A value out of JSON stands for a condition.
    #[error("a condition is {0}")]
    NotBool(&'static str),
    /// A value out of JSON stands for a number or a time.
    #[error("an expression gives {kind} where {wanted} is needed")]
    NotWanted {
        /// What is needed.
        wanted: &'static str,
        /// What it is.
        kind: &'static str,
    },
    /// A text is no number.
    #[error("`{0}` in an expression is given a text that is no number")]
    Conversion(&'static str),
    /// A column is not of its type's text form.
    #[error("a column that an expression needs is not of the text form of {0}")]
    Malformed(&'static str),
    /// The same, where the column goes through as it is.
    #[error(transparent)]
    Invalid(ValueError),
}

/// A number that an expression gives; shown exactly.
#[derive(Clone, Copy, Debug)]
pub struct Number(Numeric);

#[derive(Clone, Copy, Debug)]
enum Numeric {
    Int(i64),
    Decimal(decimal::Decimal),
    Float(f64),
}

impl Number {
    /// The nearest float.
    pub fn to_f64(self) -> f64 {
        match self.0 {
            Numeric::Int(integer) => integer as f64,
            Numeric::Decimal(decimal) => decimal.to_f64(),
            Numeric::Float(float) => float,
        }
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Numeric::Int(integer) => integer.fmt(f),
            Numeric::Decimal(decimal) => decimal.fmt(f),
            Numeric::Float(float) => f.write_str(&float_text(float)),
        }
    }
}

/// Binds an expression to a table.
///
/// # Errors
/// Every problem, in the order of the text.
pub fn bind(
    expression: &Expression,
    scope: &Scope<'_>,
    wanted: Wanted,
) -> Result<BoundExpression, Vec<ExpressionError>> {
    typing::bind(expression, scope, wanted)
}

impl BoundExpression {
    /// The places of the columns of `row` and `new` that it reads, each once, in ascending order.
    pub fn columns(&self) -> &[usize] {
        &self.columns
    }

    /// The same of `old`.
    pub fn old_columns(&self) -> &[usize] {
        &self.old_columns
    }

    /// Those of both.
    pub fn all_columns(&self) -> Vec<usize> {
        [self.columns(), self.old_columns()].concat()
    }

    /// Whether the condition holds.
    pub fn truth(&self, images: &Images<'_>) -> Truth {
        match self.root.truth(images) {
            Ok(Some(true)) => Truth::True,
            Ok(Some(false) | None) => Truth::False,
            Err(Unevaluated::Unknown) => Truth::Unknown,
            Err(Unevaluated::Failed(error)) => Truth::Failed(error),
        }
    }

    /// Appends the value as `row_to_json` shows such a value, `null` for NULL; on an error `out` is as it was.
    ///
    /// # Errors
    /// There is no value.
    pub fn write_json(&self, images: &Images<'_>, out: &mut Vec<u8>) -> Result<(), Unevaluated> {
        let start = out.len();
        self.root.write_json(images, out).inspect_err(|_| out.truncate(start))
    }

    /// Appends the value in the text form of its type; `false`, and nothing is appended, for NULL.
    ///
    /// # Errors
    /// There is no value.
    pub fn write_text(&self, images: &Images<'_>, out: &mut Vec<u8>) -> Result<bool, Unevaluated> {
        self.root.write_text(images, out)
    }

    /// The value as a number, a duration as its seconds; `None` for NULL.
    ///
    /// # Errors
    /// There is no value, or JSON holds something else.
    pub fn number(&self, images: &Images<'_>) -> Result<Option<Number>, Unevaluated> {
        let numeric = match self.root.evaluate(images)? {
            Value::Null => return Ok(None),
            Value::Int(integer) => Numeric::Int(integer),
            Value::Decimal(decimal) => Numeric::Decimal(decimal),
            Value::Float(float) => Numeric::Float(float),
            Value::Span(us) => Numeric::Decimal(decimal::Decimal::seconds(us)),
            other => return Err(EvalError::NotWanted { wanted: "a number", kind: other.kind() }.into()),
        };
        Ok(Some(Number(numeric)))
    }

    /// The value as a point in time; `None` for NULL, and for `infinity`, which never comes.
    ///
    /// # Errors
    /// There is no value.
    pub fn timestamp(&self, images: &Images<'_>) -> Result<Option<Timestamp>, Unevaluated> {
        match self.root.evaluate(images)? {
            Value::Null => Ok(None),
            Value::Instant(instant) if instant.us == i64::MAX => Ok(None),
            Value::Instant(instant) => Ok(Some(Timestamp(instant.us))),
            other => Err(EvalError::NotWanted { wanted: "a time", kind: other.kind() }.into()),
        }
    }
}
