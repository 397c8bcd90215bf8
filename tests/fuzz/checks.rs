//! What must hold for any bytes whatever: the fuzz targets and the corpus test hold the parsers to it.

use std::sync::Arc;

use keepstep::decode::pgoutput;
use keepstep::decode::types::{JsonType, Types};
use keepstep::decode::value::write_json;
use keepstep::model::{Change, Column, Datum, Event, OldTuple, Relation, ReplicaIdentity, Tuple};
use keepstep::rules::expression::{Expression, Images, Names, Scope, Wanted, bind};
use serde::de::IgnoredAny;

/// A frame is refused, or every column of its tuples can be walked over.
pub(crate) fn pgoutput(frame: &[u8]) {
    let Ok(event) = pgoutput::parse(frame) else { return };
    for tuple in tuples(&event) {
        let columns: Vec<Datum<'_>> = tuple.datums().collect();
        assert_eq!(columns.len(), usize::from(tuple.columns));
    }
}

fn tuples<'a>(event: &Event<'a>) -> Vec<Tuple<'a>> {
    let Event::Change { change, .. } = event else { return Vec::new() };
    let image = |(OldTuple::Key(tuple) | OldTuple::Full(tuple)): OldTuple<'a>| tuple;
    match *change {
        Change::Insert { new } => vec![new],
        Change::Update { old, new } => old.map(image).into_iter().chain([new]).collect(),
        Change::Delete { old } => vec![image(old)],
    }
}

/// The first byte chooses a type, the rest is a text form: it is refused and leaves no trace, or it becomes JSON.
pub(crate) fn value(input: &[u8]) {
    let Some((choice, text)) = input.split_first() else { return };
    let types = types();
    let json = &types[usize::from(choice.wrapping_sub(b'a')) % types.len()];
    let mut out = b"[".to_vec();
    match write_json(&mut out, json, text) {
        // What a json column holds goes through as it is.
        Ok(()) if *json == JsonType::Json => assert_eq!(&out[1..], text),
        Ok(()) => {
            out.push(b']');
            let parsed: Result<[IgnoredAny; 1], _> = serde_json::from_slice(&out);
            assert!(parsed.is_ok(), "{}", String::from_utf8_lossy(&out));
        }
        Err(_) => assert_eq!(out, b"["),
    }
}

/// `a` is the first in the corpus.
fn types() -> Vec<JsonType> {
    use JsonType::*;
    let array = |element, delimiter| Array { element: Arc::new(element), delimiter };
    let attribute = |name: &str, json| (name.to_owned(), Arc::new(json));
    let composite = || {
        let tags = array(Text, b',');
        let attributes = [("id", Number), ("a \"name\"", Text), ("tags", tags), ("ok", Bool)];
        Composite(attributes.map(|(name, json)| attribute(name, json)).to_vec())
    };
    vec![
        Text,
        Bool,
        Number,
        Date,
        Timestamp,
        TimestampTz,
        Json,
        Hstore,
        array(Number, b','),
        array(Text, b','),
        array(Text, b';'),
        Vector(Arc::new(Number)),
        composite(),
        array(composite(), b','),
    ]
}

/// An expression is refused with a place in its text, or it can be bound to a table, or not, and evaluated on any row.
pub(crate) fn expression(input: &[u8]) {
    // What follows a zero byte are the columns' texts.
    let mut parts = input.split(|byte| *byte == 0);
    let Some(Ok(text)) = parts.next().map(str::from_utf8) else { return };
    let in_text = |range: &std::ops::Range<usize>| assert!(text.get(range.clone()).is_some(), "{range:?} of {text}");
    let expression = match Expression::parse(text) {
        Ok(expression) => expression,
        Err(error) => return in_text(&error.range),
    };
    expression.columns().iter().for_each(|column| in_text(&column.range));
    let relation = relation();
    let row: Vec<Datum<'_>> = relation.columns.iter().map(|_| parts.next().map_or(Datum::Null, Datum::Text)).collect();
    let (types, images) = (Types::builtin(), Images::of_row(&row));
    for wanted in [Wanted::Condition, Wanted::Value, Wanted::Number, Wanted::Timestamp] {
        match bind(&expression, &Scope { relation: &relation, types: &types, names: Names::Change }, wanted) {
            Err(errors) => errors.iter().for_each(|error| in_text(&error.range)),
            Ok(bound) => {
                let mut out = b"[".to_vec();
                if bound.write_json(&images, &mut out).is_err() {
                    assert_eq!(out, b"[");
                }
                let _ = (bound.truth(&images), bound.number(&images), bound.timestamp(&images));
            }
        }
    }
}

/// A column of each kind, named after the letters from `a` on.
fn relation() -> Relation {
    /// int8, text, numeric, float8, bool, timestamptz, date, jsonb, `text[]`, bytea, bpchar, uuid.
    const TYPES: [u32; 12] = [20, 25, 1700, 701, 16, 1184, 1082, 3802, 1009, 17, 1042, 2950];
    let column = |(name, &type_oid): (char, &u32)| Column {
        name: name.to_string(),
        type_oid,
        type_modifier: -1,
        identity: name == 'a',
    };
    Relation {
        oid: 1,
        schema: "public".to_owned(),
        name: "rows".to_owned(),
        identity: ReplicaIdentity::Default,
        columns: ('a'..).zip(&TYPES).map(column).collect(),
    }
}
