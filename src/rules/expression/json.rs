//! Steps into JSON, read as far as the step needs and not beyond.
//!
//! What has parts is seen as `row_to_json` shows it: `json` and `jsonb`, arrays, composite types and `hstore`. A JSON
//! null is NULL.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::EvalError;
use super::decimal::Decimal;
use super::value::Value;

const MALFORMED: EvalError = EvalError::Malformed("JSON");

/// The value that a text of JSON is.
pub(super) fn value<'a>(json: Cow<'a, str>) -> Result<Value<'a>, EvalError> {
    Ok(match json.trim_ascii_start().as_bytes().first() {
        Some(b'{' | b'[') => Value::Container(json),
        Some(b'n') => Value::Null,
        Some(b't') => Value::Bool(true),
        Some(b'f') => Value::Bool(false),
        Some(b'"') => Value::Text(match json {
            Cow::Borrowed(json) => text(json)?,
            Cow::Owned(json) => Cow::Owned(text(&json)?.into_owned()),
        }),
        Some(b'-' | b'0'..=b'9') => number(json.trim_ascii())?,
        _ => return Err(MALFORMED),
    })
}

fn number<'a>(json: &str) -> Result<Value<'a>, EvalError> {
    match json.parse() {
        Ok(integer) => Ok(Value::Int(integer)),
        Err(_) => Decimal::parse(json.as_bytes()).map(Value::Decimal),
    }
}

fn text(json: &str) -> Result<Cow<'_, str>, EvalError> {
    serde_json::from_str::<Text<'_>>(json).map(|text| text.0).map_err(|_| MALFORMED)
}

/// The member of an object; `None` where there is none, or where it is an array.
pub(super) fn member<'a>(container: &Cow<'a, str>, name: &str) -> Result<Option<Value<'a>>, EvalError> {
    // Of equal names the last counts, as for Postgres's `->`.
    part(container, |json| Ok(members(json)?.into_iter().rfind(|(key, _)| key == name).map(|(_, json)| json)))
}

/// The element of an array, from 0; `None` where there is none, or where it is an object.
pub(super) fn element<'a>(container: &Cow<'a, str>, index: i64) -> Result<Option<Value<'a>>, EvalError> {
    part(container, |json| {
        let elements = elements(json)?;
        Ok(usize::try_from(index).ok().and_then(|index| elements.get(index).copied()))
    })
}

/// What `find` finds in the container: borrowed where the container is.
fn part<'a>(
    container: &Cow<'a, str>,
    find: impl for<'j> Fn(&'j str) -> Result<Option<&'j str>, EvalError>,
) -> Result<Option<Value<'a>>, EvalError> {
    match container {
        Cow::Borrowed(json) => find(json)?.map(|part| value(Cow::Borrowed(part))).transpose(),
        Cow::Owned(json) => find(json)?.map(|part| value(Cow::Owned(part.to_owned()))).transpose(),
    }
}

/// How many members or elements there are.
pub(super) fn size(container: &str) -> Result<usize, EvalError> {
    if is_array(container) { Ok(elements(container)?.len()) } else { Ok(members(container)?.len()) }
}

/// The elements of an array; an object has none.
pub(super) fn elements(container: &str) -> Result<Vec<&str>, EvalError> {
    if !is_array(container) {
        return Ok(Vec::new());
    }
    let elements: Vec<&RawValue> = serde_json::from_str(container).map_err(|_| MALFORMED)?;
    Ok(elements.into_iter().map(RawValue::get).collect())
}

pub(super) fn is_array(container: &str) -> bool {
    container.trim_ascii_start().starts_with('[')
}

fn members(container: &str) -> Result<Vec<(Cow<'_, str>, &str)>, EvalError> {
    if is_array(container) {
        return Ok(Vec::new());
    }
    let Members(members) = serde_json::from_str(container).map_err(|_| MALFORMED)?;
    Ok(members.into_iter().map(|(key, json)| (key, json.get())).collect())
}

/// A string that is copied only where it has escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// An object as a list, in its order.
struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some((Text(key), json)) = map.next_entry()? {
                    members.push((key, json));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}
