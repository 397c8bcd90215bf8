//! Values while an expression is evaluated, and what can be done with two of them.
//!
//! Which types meet is checked when the expression is bound. Only what comes out of json has its type in the data: two
//! values of different kinds are then unequal, and comparing them by order, or calculating with them, is an error.

use std::borrow::Cow;
use std::cmp::Ordering;

use super::EvalError;
use super::decimal::Decimal;
use super::instant::Instant;
use crate::decode::value::{ValueError, write_json_string};

/// The longest text that joining may make.
const TEXT_BYTES_MAX: usize = 64 << 20;

/// A value; borrows from the row or from the expression wherever it can.
#[derive(Clone, Debug)]
pub(super) enum Value<'a> {
    Null,
    Bool(bool),
    Int(i64),
    Decimal(Decimal),
    Float(f64),
    /// Also what shows as text: `uuid`, enums, and `bytea` in its hex form.
    Text(Cow<'a, str>),
    Instant(Instant),
    /// Microseconds.
    Span(i64),
    /// An object or an array of JSON; what json holds besides these is one of the others.
    Container(Cow<'a, str>),
}

/// `+`, `-`, `*`, `/`, `%`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arithmetic {
    Add,
    Subtract,
    Multiply,
    Divide,
    Remainder,
}

impl Arithmetic {
    pub(super) fn sign(self) -> &'static str {
        match self {
            Self::Add => "+",
            Self::Subtract => "-",
            Self::Multiply => "*",
            Self::Divide => "/",
            Self::Remainder => "%",
        }
    }
}

impl Value<'_> {
    pub(super) fn is_null(&self) -> bool {
        matches!(self, Value::Null)
    }

    /// What kind of value it is, for messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Value::Null => "null",
            Value::Bool(_) => "a bool",
            Value::Int(_) | Value::Decimal(_) | Value::Float(_) => "a number",
            Value::Text(_) => "a text",
            Value::Instant(_) => "a time",
            Value::Span(_) => "a duration",
            Value::Container(_) => "an object or array",
        }
    }

    fn as_f64(&self) -> Option<f64> {
        match self {
            Value::Int(integer) => Some(*integer as f64),
            Value::Decimal(decimal) => Some(decimal.to_f64()),
            Value::Float(float) => Some(*float),
            _ => None,
        }
    }

    fn as_decimal(&self) -> Option<Decimal> {
        match self {
            Value::Int(integer) => Some(Decimal::from(*integer)),
            Value::Decimal(decimal) => Some(*decimal),
            _ => None,
        }
    }

    /// Appends it as `row_to_json` shows such a value.
    pub(super) fn write_json(&self, out: &mut Vec<u8>) -> Result<(), EvalError> {
        match self {
            Value::Null => out.extend_from_slice(b"null"),
            Value::Bool(true) => out.extend_from_slice(b"true"),
            Value::Bool(false) => out.extend_from_slice(b"false"),
            Value::Float(float) if !float.is_finite() => write_json_string(out, float_text(*float).as_bytes())?,
            Value::Text(text) => write_json_string(out, text.as_bytes())?,
            Value::Instant(_) => write_json_string(out, self.text().as_bytes())?,
            Value::Int(_) | Value::Decimal(_) | Value::Float(_) | Value::Span(_) | Value::Container(_) => {
                out.extend_from_slice(self.text().as_bytes());
            }
        }
        Ok(())
    }

    /// Appends it as the type's output function writes it; `false` for NULL.
    pub(super) fn write_text(&self, out: &mut Vec<u8>) -> bool {
        match self {
            Value::Null => return false,
            Value::Bool(truth) => out.push(if *truth { b't' } else { b'f' }),
            Value::Instant(instant) => out.extend_from_slice(instant.text().as_bytes()),
            _ => out.extend_from_slice(self.text().as_bytes()),
        }
        true
    }

    /// What `string()` gives: numbers as Postgres writes them, times as JSON shows them, a duration in seconds.
    pub(super) fn text(&self) -> Cow<'_, str> {
        match self {
            Value::Null => Cow::Borrowed("null"),
            Value::Bool(truth) => Cow::Borrowed(if *truth { "true" } else { "false" }),
            Value::Int(integer) => Cow::Owned(integer.to_string()),
            Value::Decimal(decimal) => Cow::Owned(decimal.to_string()),
            Value::Float(float) => Cow::Owned(float_text(*float)),
            Value::Text(text) | Value::Container(text) => Cow::Borrowed(text),
            Value::Instant(instant) => Cow::Owned(instant.to_string()),
            Value::Span(us) => Cow::Owned(Decimal::seconds(*us).to_string()),
        }
    }
}

/// As `float8out` writes it: the shortest digits that read back as the same number, an exponent of two digits at least
/// where it is below -4 or above 14 (`double_to_shortest_decimal_buf` in `src/common/d2s.c`).
pub(super) fn float_text(float: f64) -> String {
    if float.is_nan() {
        return "NaN".to_owned();
    }
    if float.is_infinite() {
        return if float > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let scientific = format!("{float:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..15).contains(&exponent) && float != 0.0 => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{mantissa}e{sign}{:02}", exponent.unsigned_abs())
        }
        _ => format!("{float}"),
    }
}

/// Whether two values are equal; `None` where one is NULL.
pub(super) fn equal(left: &Value<'_>, right: &Value<'_>) -> Result<Option<bool>, EvalError> {
    match (left, right) {
        // Two texts of JSON can differ and mean the same.
        (Value::Container(_), Value::Container(_)) => Err(mismatch("==", left, right)),
        (Value::Null, _) | (_, Value::Null) => Ok(None),
        (Value::Text(left), Value::Text(right)) => Ok(Some(left == right)),
        _ => Ok(Some(order(left, right) == Some(Ordering::Equal))),
    }
}

/// Which of two values comes first; `None` where one is NULL. `sign` is the operator, for messages.
pub(super) fn compare(left: &Value<'_>, right: &Value<'_>, sign: &'static str) -> Result<Option<Ordering>, EvalError> {
    if left.is_null() || right.is_null() {
        return Ok(None);
    }
    order(left, right).map(Some).ok_or_else(|| mismatch(sign, left, right))
}

/// `None` for values of different kinds.
fn order(left: &Value<'_>, right: &Value<'_>) -> Option<Ordering> {
    match (left, right) {
        (Value::Int(left), Value::Int(right)) => Some(left.cmp(right)),
        (Value::Bool(left), Value::Bool(right)) => Some(left.cmp(right)),
        (Value::Text(left), Value::Text(right)) => Some(left.cmp(right)),
        (Value::Instant(left), Value::Instant(right)) => Some(left.us.cmp(&right.us)),
        (Value::Span(left), Value::Span(right)) => Some(left.cmp(right)),
        _ => match (left.as_decimal(), right.as_decimal()) {
            (Some(left), Some(right)) => Some(left.compare(right)),
            _ => Some(order_floats(left.as_f64()?, right.as_f64()?)),
        },
    }
}

/// Postgres's order: NaN equals NaN and is greater than everything else.
fn order_floats(left: f64, right: f64) -> Ordering {
    left.partial_cmp(&right).unwrap_or_else(|| left.is_nan().cmp(&right.is_nan()))
}

/// Calculates; NULL where an operand is NULL.
pub(super) fn calculate<'a>(
    operation: Arithmetic,
    left: &Value<'_>,
    right: &Value<'_>,
) -> Result<Value<'a>, EvalError> {
    use Arithmetic::{Add, Subtract};
    Ok(match (operation, left, right) {
        (_, Value::Null, _) | (_, _, Value::Null) => Value::Null,
        (_, Value::Int(left), Value::Int(right)) => Value::Int(integers(operation, *left, *right)?),
        (Add, Value::Text(left), Value::Text(right)) => Value::Text(Cow::Owned(joined(left, right)?)),
        (Add, Value::Instant(instant), Value::Span(span)) | (Add, Value::Span(span), Value::Instant(instant)) => {
            Value::Instant(instant.later(*span)?)
        }
        (Subtract, Value::Instant(instant), Value::Span(span)) => {
            Value::Instant(instant.later(span.checked_neg().ok_or(EvalError::Overflow)?)?)
        }
        (Subtract, Value::Instant(left), Value::Instant(right)) => Value::Span(left.since(*right)?),
        (Add, Value::Span(left), Value::Span(right)) => {
            Value::Span(left.checked_add(*right).ok_or(EvalError::Overflow)?)
        }
        (Subtract, Value::Span(left), Value::Span(right)) => {
            Value::Span(left.checked_sub(*right).ok_or(EvalError::Overflow)?)
        }
        _ => numbers(operation, left, right)?,
    })
}

fn integers(operation: Arithmetic, left: i64, right: i64) -> Result<i64, EvalError> {
    let result = match operation {
        Arithmetic::Add => left.checked_add(right),
        Arithmetic::Subtract => left.checked_sub(right),
        Arithmetic::Multiply => left.checked_mul(right),
        Arithmetic::Divide | Arithmetic::Remainder if right == 0 => return Err(EvalError::DivisionByZero),
        Arithmetic::Divide => left.checked_div(right),
        Arithmetic::Remainder => left.checked_rem(right),
    };
    result.ok_or(EvalError::Overflow)
}

/// Numbers of which at least one is no integer: exact unless one is a float.
fn numbers<'a>(operation: Arithmetic, left: &Value<'_>, right: &Value<'_>) -> Result<Value<'a>, EvalError> {
    let wrong = || mismatch(operation.sign(), left, right);
    if let (Some(left), Some(right)) = (left.as_decimal(), right.as_decimal()) {
        return Ok(Value::Decimal(match operation {
            Arithmetic::Add => left.add(right)?,
            Arithmetic::Subtract => left.add(right.negate()?)?,
            Arithmetic::Multiply => left.multiply(right)?,
            Arithmetic::Divide | Arithmetic::Remainder => return Err(EvalError::DecimalDivision),
        }));
    }
    let (left, right) = (left.as_f64().ok_or_else(wrong)?, right.as_f64().ok_or_else(wrong)?);
    let result = match operation {
        Arithmetic::Add => left + right,
        Arithmetic::Subtract => left - right,
        Arithmetic::Multiply => left * right,
        Arithmetic::Divide if right == 0.0 => return Err(EvalError::DivisionByZero),
        Arithmetic::Divide => left / right,
        Arithmetic::Remainder => return Err(wrong()),
    };
    // As Postgres does, and unlike what the processor would do.
    let overflown = result.is_infinite() && left.is_finite() && right.is_finite();
    if overflown { Err(EvalError::Overflow) } else { Ok(Value::Float(result)) }
}

fn joined(left: &str, right: &str) -> Result<String, EvalError> {
    if left.len() + right.len() > TEXT_BYTES_MAX {
        return Err(EvalError::TooLarge);
    }
    Ok([left, right].concat())
}

/// The two values do not go together; says what they are, not what they hold.
pub(super) fn mismatch(operator: &'static str, left: &Value<'_>, right: &Value<'_>) -> EvalError {
    EvalError::Mismatch { operator, left: left.kind(), right: right.kind() }
}

/// Text as the row holds it.
pub(super) fn utf8(text: &[u8]) -> Result<&str, EvalError> {
    std::str::from_utf8(text).map_err(|_| EvalError::Invalid(ValueError::NotUtf8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_postgres_writes_them() {
        let cases = [
            (0.0, "0"),
            (-0.0, "-0"),
            (0.1, "0.1"),
            (100.0, "100"),
            (123_456_789_012_345.0, "123456789012345"),
            (1e15, "1e+15"),
            (1.234_567_890_123_456_8e17, "1.2345678901234568e+17"),
            (0.0001, "0.0001"),
            (0.000_012_5, "1.25e-05"),
            (-1e-300, "-1e-300"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ];
        for (float, text) in cases {
            assert_eq!(float_text(float), text);
        }
    }
}
