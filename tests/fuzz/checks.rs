//! What must hold for any bytes whatever: the fuzz targets and the corpus test hold the parsers to it.

use std::sync::Arc;

use keepstep::decode::pgoutput;
use keepstep::decode::types::JsonType;
use keepstep::decode::value::write_json;
use keepstep::model::{Change, Datum, Event, OldTuple, Tuple};
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
