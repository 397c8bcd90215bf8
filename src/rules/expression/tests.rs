//! Small cases: an expression, a row, what comes out; every message; and CEL itself as an oracle.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::{Arc, LazyLock};

use cel::Program;
use proptest::prelude::*;
use tokio_postgres::types::Type;

use super::*;
use crate::decode::types::Types;
use crate::model::{Column, ReplicaIdentity};

static TYPES: LazyLock<Types> = LazyLock::new(Types::builtin);

/// A column of each kind; `id` and `status` are the replica identity.
const COLUMNS: [(&str, Type); 25] = [
    ("id", Type::INT8),
    ("status", Type::TEXT),
    ("name", Type::VARCHAR),
    ("a name", Type::TEXT),
    ("code", Type::BPCHAR),
    ("qty", Type::INT4),
    ("rank", Type::INT2),
    ("amount", Type::NUMERIC),
    ("price", Type::NUMERIC),
    ("ratio", Type::FLOAT8),
    ("weight", Type::FLOAT4),
    ("active", Type::BOOL),
    ("deleted", Type::BOOL),
    ("token", Type::UUID),
    ("raw", Type::BYTEA),
    ("address", Type::INET),
    ("lasts", Type::INTERVAL),
    ("created_at", Type::TIMESTAMPTZ),
    ("seen_at", Type::TIMESTAMP),
    ("born", Type::DATE),
    ("data", Type::JSONB),
    ("tags", Type::TEXT_ARRAY),
    ("sizes", Type::INT4_ARRAY),
    ("prices", Type::NUMERIC_ARRAY),
    ("vector", Type::INT2_VECTOR),
];

static RELATION: LazyLock<Relation> = LazyLock::new(|| {
    let column = |(name, ty): &(&str, Type)| Column {
        name: (*name).to_owned(),
        type_oid: ty.oid(),
        type_modifier: -1,
        identity: matches!(*name, "id" | "status"),
    };
    Relation {
        oid: 1,
        schema: "public".to_owned(),
        name: "items".to_owned(),
        identity: ReplicaIdentity::Default,
        columns: COLUMNS.iter().map(column).collect(),
    }
});

fn bound(text: &str, names: Names, wanted: Wanted) -> Result<BoundExpression, Vec<ExpressionError>> {
    let expression = Expression::parse(text).map_err(|error| vec![error])?;
    bind(&expression, &Scope { relation: &RELATION, types: &TYPES, names }, wanted)
}

/// A row from `name = value` pairs; `~` is an unchanged TOASTed value, and what is not named is NULL.
fn row<'a>(pairs: &[(&str, &'a str)]) -> Vec<Datum<'a>> {
    let mut row = vec![Datum::Null; COLUMNS.len()];
    for (name, value) in pairs {
        let datum = if *value == "~" { Datum::UnchangedToast } else { Datum::Text(value.as_bytes()) };
        row[RELATION.column(name).unwrap_or_else(|| panic!("no column {name}"))] = datum;
    }
    row
}

/// The value as JSON, `unknown`, or why there is none.
fn value(text: &str, images: &Images<'_>, names: Names) -> String {
    let expression = bound(text, names, Wanted::Value).unwrap_or_else(|errors| panic!("{text}: {errors:?}"));
    let mut out = b"kept ".to_vec();
    match expression.write_json(images, &mut out) {
        Ok(()) => String::from_utf8(out).unwrap().strip_prefix("kept ").unwrap().to_owned(),
        Err(reason) => {
            assert_eq!(out, b"kept ", "{text}");
            match reason {
                Unevaluated::Unknown => "unknown".to_owned(),
                Unevaluated::Failed(error) => error.to_string(),
            }
        }
    }
}

/// Pairs as `a=1; b=2`.
fn pairs(text: &str) -> Vec<(&str, &str)> {
    text.split("; ").filter(|pair| !pair.is_empty()).map(|pair| pair.split_once('=').unwrap()).collect()
}

#[track_caller]
fn check(cases: &[(&str, &str, &str)]) {
    for (text, columns, expected) in cases {
        let row = row(&pairs(columns));
        assert_eq!(value(text, &Images::of_row(&row), Names::Row), *expected, "{text} on {columns}");
    }
}

#[test]
fn comparisons() {
    check(&[
        ("row.status == \"active\" && row.amount > 10", "status=active; amount=10.01", "true"),
        ("row.status == \"active\" && row.amount > 10", "status=active; amount=10.00", "false"),
        ("row.status == 'active'", "status=Active", "false"),
        ("row.id == 9223372036854775807", "id=9223372036854775807", "true"),
        ("row.id != -9223372036854775808", "id=-9223372036854775808", "false"),
        ("row.id < 9007199254740993.5", "id=9007199254740993", "true"),
        ("row.qty >= 0x10", "qty=16", "true"),
        ("row.amount == 0.3", "amount=0.30", "true"),
        ("row.amount == row.qty", "amount=7.000; qty=7", "true"),
        (
            "row.amount > 9999999999999999999999999999999999999.0",
            "amount=99999999999999999999999999999999999999",
            "true",
        ),
        ("row.amount > row.price", "amount=0.10000000000000000000000000000000000001; price=0.1", "true"),
        ("row.amount > 1e30", "amount=NaN", "true"),
        ("row.amount < row.price", "amount=-Infinity; price=-1", "true"),
        ("row.ratio == 0.1", "ratio=0.1", "true"),
        ("row.ratio < row.amount", "ratio=0.5; amount=0.6", "true"),
        ("row.ratio == row.ratio", "ratio=NaN", "true"),
        ("row.ratio > row.qty", "ratio=Infinity; qty=1", "true"),
        ("row.status < \"b\"", "status=abc", "true"),
        ("row.status < row.name", "status=Z; name=a", "true"),
        ("row.code == \"AB\"", "code=AB   ", "true"),
        ("row.active == true", "active=t", "true"),
        ("row.active != row.deleted", "active=t; deleted=f", "true"),
        ("row.token == \"a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11\"", "token=a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "true"),
        ("row.raw == b\"\\xde\\xad\"", "raw=\\xdead", "true"),
        ("row.address == row.status", "address=10.0.0.1/8; status=10.0.0.1/8", "true"),
        ("row[\"a name\"] == 'x'", "a name=x", "true"),
    ]);
}

#[test]
fn nulls_follow_sql() {
    check(&[
        ("row.amount > 10", "", "null"),
        ("!(row.amount > 10)", "", "null"),
        ("row.active && row.deleted", "active=f", "false"),
        ("row.deleted && row.active", "active=f", "false"),
        ("row.active && row.deleted", "active=t", "null"),
        ("row.active || row.deleted", "active=t", "true"),
        ("row.deleted || row.active", "active=t", "true"),
        ("row.active || row.deleted", "active=f", "null"),
        ("row.name == null", "", "true"),
        ("row.name != null", "", "false"),
        ("null == row.name", "name=", "false"),
        ("row.name == \"\"", "name=", "true"),
        ("null == null", "", "true"),
        ("row.qty + 1 == null", "", "true"),
        ("has(row.name)", "name=x", "true"),
        ("has(row.name)", "", "false"),
        ("row.qty in [1, 2]", "", "null"),
        ("row.qty in [1, null]", "qty=1", "true"),
        ("row.qty in [1, null]", "qty=2", "null"),
        ("row.qty in []", "qty=2", "false"),
        ("row.active ? 1 : 2", "", "2"),
        ("row.name != null ? row.name : \"nobody\"", "", "\"nobody\""),
        ("size(row.name)", "", "null"),
        ("row.name.startsWith(\"a\")", "", "null"),
        ("row.name + \"x\"", "", "null"),
        ("-row.qty", "", "null"),
        ("null", "", "null"),
    ]);
}

#[test]
fn arithmetic_is_exact_or_an_error() {
    check(&[
        ("row.price * row.qty", "price=19.99; qty=3", "59.97"),
        ("row.price + 0.1", "price=0.2", "0.3"),
        ("row.price - row.amount", "price=1.50; amount=1.5", "0.00"),
        ("row.qty + row.rank * 2", "qty=1; rank=3", "7"),
        ("(row.qty + row.rank) * 2", "qty=1; rank=3", "8"),
        ("row.qty / 2", "qty=-7", "-3"),
        ("row.qty % 3", "qty=-7", "-1"),
        ("row.ratio * 2", "ratio=0.1", "0.2"),
        ("row.ratio + row.price", "ratio=0.5; price=0.25", "0.75"),
        ("row.ratio / 4", "ratio=1", "0.25"),
        ("row.weight * 1e20", "weight=2", "2e+20"),
        ("-row.price", "price=-1.50", "1.50"),
        ("1 + 2 * 3", "", "7"),
        ("row.id + 1", "id=9223372036854775807", "a number in an expression leaves its range"),
        ("-row.id", "id=-9223372036854775808", "a number in an expression leaves its range"),
        ("row.qty / row.rank", "qty=1; rank=0", "an expression divides by zero"),
        ("row.ratio / row.ratio", "ratio=0", "an expression divides by zero"),
        ("row.ratio * 1e300", "ratio=1e300", "a number in an expression leaves its range"),
        (
            "row.price * row.price",
            "price=12345678901234567890.5",
            "a decimal in an expression needs more than 38 digits",
        ),
        ("row.ratio * 2", "ratio=NaN", "\"NaN\""),
        ("row.qty == 0 || 10 / row.qty > 1", "qty=0", "true"),
        ("10 / row.qty > 1 || row.qty == 0", "qty=0", "true"),
        ("10 / row.qty > 1 && row.qty != 0", "qty=0", "false"),
        ("1 - -1", "", "2"),
        ("(row.active ? row.qty : row.ratio) / (row.deleted ? row.ratio : 2)", "active=t; qty=7", "3.5"),
    ]);
}

#[test]
fn texts() {
    check(&[
        ("row.name.lowerAscii().startsWith(\"dr. \")", "name=Dr. No", "true"),
        ("row.name.upperAscii()", "name=straße", "\"STRAßE\""),
        ("row.name.endsWith(row.status)", "name=abc; status=bc", "true"),
        ("row.name.contains(\"ü\")", "name=Grüße", "true"),
        ("row.name.matches(\"^[a-z]+$\")", "name=abc", "true"),
        ("row.name.matches(r\"\\d\")", "name=abc", "false"),
        ("size(row.name)", "name=Grüße", "5"),
        ("row.name.size() > 2", "name=ab", "false"),
        ("size(row.raw)", "raw=\\xdead", "2"),
        ("string(row.id) + \"-\" + row.status", "id=7; status=new", "\"7-new\""),
        ("row.status + row.name", "status=a\"; name=\n", "\"a\\\"\\n\""),
        ("int(row.status) + 1", "status=41", "42"),
        ("int(row.status)", "status=4x", "`int` in an expression is given a text that is no number"),
        ("int(row.price)", "price=-7.99", "-7"),
        ("int(row.ratio)", "ratio=1e30", "a number in an expression leaves its range"),
        ("int(row.ratio)", "ratio=NaN", "a number in an expression leaves its range"),
        ("int(row.created_at)", "created_at=1970-01-01 00:00:01.5+00", "1"),
        ("double(row.status) * 2", "status=0.5", "1"),
        ("double(row.price) / 3.0", "price=1", "0.3333333333333333"),
        ("string(row.active)", "active=t", "\"true\""),
        ("string(row.price)", "price=1.50", "\"1.50\""),
        ("string(row.lasts) < \"2\"", "lasts=1 day", "true"),
        ("string(row.seen_at)", "seen_at=2024-01-01 00:00:00", "\"2024-01-01T00:00:00\""),
    ]);
}

#[test]
fn times() {
    check(&[
        ("row.created_at > timestamp(\"2024-01-01T00:00:00Z\")", "created_at=2024-06-01 12:00:00+00", "true"),
        ("row.created_at == timestamp(\"2024-01-01T01:00:00+01:00\")", "created_at=2024-01-01 00:00:00+00", "true"),
        ("row.created_at > row.seen_at", "created_at=2024-01-01 00:00:00+00; seen_at=2023-12-31 23:59:59.9", "true"),
        ("row.born <= row.created_at", "born=2024-01-01; created_at=2024-01-01 00:00:00+00", "true"),
        ("row.created_at < timestamp(\"9999-01-01T00:00:00Z\")", "created_at=infinity", "false"),
        ("row.created_at + duration(\"30d\")", "created_at=2024-01-01 00:00:00+00", "\"2024-01-31T00:00:00+00:00\""),
        ("duration(\"90m\") + row.seen_at", "seen_at=2023-12-31 23:00:00.5", "\"2024-01-01T00:30:00.5\""),
        ("row.born - duration(\"1h\")", "born=2024-01-01", "\"2023-12-31T23:00:00\""),
        ("row.created_at + duration(\"1h\")", "created_at=infinity", "\"infinity\""),
        (
            "row.created_at - row.seen_at > duration(\"1h\")",
            "created_at=2024-01-01 02:00:00+00; seen_at=2024-01-01 00:30:00",
            "true",
        ),
        (
            "string(row.created_at - row.seen_at)",
            "created_at=2024-01-01 00:00:01.5+00; seen_at=2024-01-01 00:00:00",
            "\"1.5\"",
        ),
        (
            "row.active ? row.created_at : row.created_at",
            "created_at=0044-03-15 12:00:00+00 BC",
            "\"0044-03-15T12:00:00+00:00 BC\"",
        ),
        (
            "row.created_at - row.created_at == duration(\"0s\")",
            "created_at=infinity",
            "a number in an expression leaves its range",
        ),
        (
            "row.created_at > row.created_at",
            "created_at=yesterday",
            "a column that an expression needs is not of the text form of a date or timestamp",
        ),
    ]);
}

#[test]
fn json_and_arrays() {
    let data = r#"data={"a": {"b": "Ulm", "n": 1.50, "nil": null}, "list": [1, "two", {"x": true}], "t": true}"#;
    check(&[
        ("row.data.a.b", data, "\"Ulm\""),
        ("row.data[\"a\"][\"b\"] == 'Ulm'", data, "true"),
        ("row.data.a.n * 2", data, "3.00"),
        ("row.data.a.n == 1.5", data, "true"),
        ("row.data.a.b == 1", data, "false"),
        ("row.data.a.b != 1", data, "true"),
        ("row.data.missing.deeper == 1", data, "null"),
        ("row.data.a[\"nil\"] == null", data, "true"),
        ("has(row.data.a.nil)", data, "true"),
        ("has(row.data.a.missing)", data, "false"),
        ("has(row.data.missing.x)", data, "false"),
        ("row.data.list[0] + 1", data, "2"),
        ("row.data.list[1]", data, "\"two\""),
        ("row.data.list[2].x ? 1 : 2", data, "1"),
        ("row.data.list[3]", data, "null"),
        ("row.data.list[-1]", data, "null"),
        ("row.data.list[row.qty]", "data={\"list\": [5]}; qty=0", "5"),
        ("row.data.a", data, r#"{"b": "Ulm", "n": 1.50, "nil": null}"#),
        ("'two' in row.data.list", data, "true"),
        ("'a' in row.data", data, "true"),
        ("'b' in row.data", data, "false"),
        ("size(row.data)", data, "3"),
        ("size(row.data.list)", data, "3"),
        ("row.data.a.b.startsWith(\"U\")", data, "true"),
        ("row.data.t && true", data, "true"),
        ("row.data.a.b && true", data, "a condition is a text"),
        ("row.data.a.b > 1", data, "`>` in an expression meets a text and a number"),
        ("row.data.a.b + 1", data, "`+` in an expression meets a text and a number"),
        ("row.data.a.n / 2", data, "an expression divides a decimal: double(…) or int(…) around it says how"),
        ("row.data.a == row.data", data, "`==` in an expression meets an object or array and an object or array"),
        ("row.data.a.n.contains(\"1\")", data, "`contains` in an expression meets a number and a text"),
        ("row.data.a.n.lowerAscii()", data, "`lowerAscii` in an expression cannot take a number"),
        ("row.data.x", r#"data={"x": 1, "x": "é\n\u0001\""}"#, r#""é\n\u0001\"""#),
        ("row.data == 3", "data=3", "true"),
        ("row.data", r#"data={"b" :  1}"#, r#"{"b" :  1}"#),
        ("\"sale\" in row.tags", "tags={new,sale}", "true"),
        ("\"a b\" in row.tags", "tags={\"a b\",NULL}", "true"),
        ("\"x\" in row.tags", "tags={\"a b\",NULL}", "null"),
        ("\"x\" in row.tags", "", "null"),
        ("row.status in row.tags", "status=new; tags={new,sale}", "true"),
        ("size(row.tags) == 2", "tags={new,sale}", "true"),
        ("row.tags[1]", "tags={new,sale}", "\"sale\""),
        ("row.tags", "tags={new,sale}", "[\"new\",\"sale\"]"),
        ("3 in row.sizes", "sizes={1,2,3}", "true"),
        (
            "row.sizes[0] + row.sizes[1]",
            "sizes={{1,2},{3,4}}",
            "`+` in an expression meets an object or array and an object or array",
        ),
        ("row.sizes[1][0]", "sizes={{1,2},{3,4}}", "3"),
        ("1.5 in row.prices", "prices={1.50}", "true"),
        ("2 in row.vector", "vector=1 2", "true"),
        ("row.data.x == 1", "data={\"x\": 1", "a column that an expression needs is not of the text form of JSON"),
    ]);
}

#[test]
fn a_column_or_a_choice_of_columns_goes_through_as_row_to_json_shows_it() {
    check(&[
        ("row.ratio", "ratio=1e-07", "1e-07"),
        ("row.code", "code=AB   ", "\"AB   \""),
        (
            "row.amount",
            "amount=123456789012345678901234567890123456789012345678901234567890",
            "123456789012345678901234567890123456789012345678901234567890",
        ),
        ("row.active ? row.amount : row.price", "active=t; amount=NaN", "\"NaN\""),
        ("row.created_at", "created_at=2024-01-01 00:00:00+00", "\"2024-01-01T00:00:00+00:00\""),
        ("row.lasts", "lasts=1 day", "\"1 day\""),
        ("row.raw", "raw=\\x00", "\"\\\\x00\""),
        ("row.vector", "vector=1 2", "[1,2]"),
    ]);
}

#[test]
fn what_the_change_does_not_carry_is_unknown_unless_it_does_not_matter() {
    check(&[
        ("row.name == \"a\"", "name=~", "unknown"),
        ("row.name == \"a\" && row.active", "name=~; active=f", "false"),
        ("row.active && row.name == \"a\"", "name=~; active=t", "unknown"),
        ("row.active || row.name == \"a\"", "name=~; active=t", "true"),
        ("row.name == null", "name=~", "false"),
        ("has(row.name)", "name=~", "true"),
        ("row.name", "name=~", "unknown"),
        ("row.active ? row.name : row.status", "name=~; active=f; status=x", "\"x\""),
    ]);
    let old = row(&[("id", "1"), ("status", "paid")]);
    let new = row(&[("id", "1"), ("status", "sent"), ("qty", "2")]);
    let images = |old, new, op| Images { row: Image::Full(&[]), old, new, op };
    let update = images(Image::Key(&old), Image::Full(&new), Operation::Update);
    let insert = images(Image::Absent, Image::Full(&new), Operation::Insert);
    let delete = images(Image::Full(&old), Image::Absent, Operation::Delete);
    let cases = [
        (update, "old.status == \"paid\" && new.status == \"sent\"", "true"),
        (update, "old.status + \" > \" + new.status", "\"paid > sent\""),
        (update, "old.qty == 2", "unknown"),
        (update, "op", "\"update\""),
        (insert, "old.status == null && op in [\"insert\"]", "true"),
        (delete, "new.status == old.status", "null"),
        (delete, "op == \"delete\"", "true"),
        (images(Image::Unknown, Image::Full(&new), Operation::Update), "old.id == 1", "unknown"),
    ];
    for (images, text, expected) in cases {
        assert_eq!(value(text, &images, Names::Change), expected, "{text}");
    }
}

#[test]
fn conditions_numbers_and_times_are_what_was_wanted() {
    let row =
        row(&pairs("qty=3; price=1.50; active=t; created_at=2000-01-01 00:00:01+00; data={\"x\": \"text\"}; name=~"));
    let images = Images::of_row(&row);
    let truth = |text| bound(text, Names::Row, Wanted::Condition).unwrap().truth(&images);
    assert_eq!(truth("row.qty == 3"), Truth::True);
    assert_eq!(truth("row.rank == 3"), Truth::False);
    assert_eq!(truth("!(row.rank == 3)"), Truth::False);
    assert_eq!(truth("row.name == 'x'"), Truth::Unknown);
    assert_eq!(truth("row.qty / 0 == 1"), Truth::Failed(EvalError::DivisionByZero));
    assert_eq!(truth("row.data.x"), Truth::Failed(EvalError::NotBool("a text")));

    let number = |text| {
        let number = bound(text, Names::Row, Wanted::Number).unwrap().number(&images);
        number.map(|number| number.map(|number| (number.to_string(), number.to_f64())))
    };
    assert_eq!(number("row.qty"), Ok(Some(("3".to_owned(), 3.0))));
    assert_eq!(number("row.price * 2"), Ok(Some(("3.00".to_owned(), 3.0))));
    assert_eq!(number("row.active ? duration(\"1d\") : duration(\"1h\")"), Ok(Some(("86400".to_owned(), 86400.0))));
    assert_eq!(number("duration(\"1500ms\")"), Ok(Some(("1.5".to_owned(), 1.5))));
    assert_eq!(number("row.rank"), Ok(None));
    let not_wanted = EvalError::NotWanted { wanted: "a number", kind: "a text" };
    assert_eq!(number("row.data.x"), Err(Unevaluated::Failed(not_wanted)));

    let time = |text| bound(text, Names::Row, Wanted::Timestamp).unwrap().timestamp(&images);
    assert_eq!(time("row.created_at"), Ok(Some(Timestamp(1_000_000))));
    assert_eq!(time("row.created_at + duration(\"1s\")"), Ok(Some(Timestamp(2_000_000))));
    assert_eq!(time("timestamp(\"infinity\")"), Ok(None));
    assert_eq!(time("row.born"), Ok(None));

    let text = |text| {
        let mut out = Vec::new();
        let written = bound(text, Names::Row, Wanted::Value).unwrap().write_text(&images, &mut out);
        written.map(|written| written.then(|| String::from_utf8(out).unwrap()))
    };
    assert_eq!(text("row.active"), Ok(Some("t".to_owned())));
    assert_eq!(text("!row.active"), Ok(Some("f".to_owned())));
    assert_eq!(text("row.created_at + duration(\"1s\")"), Ok(Some("2000-01-01 00:00:02+00".to_owned())));
    assert_eq!(text("row.price * 2"), Ok(Some("3.00".to_owned())));
    assert_eq!(text("row.rank"), Ok(None));
}

#[test]
fn columns_are_told() {
    let expression = Expression::parse("row.qty > old[\"a name\"] || has(row.qty) && row.data.x == new.id").unwrap();
    let told: Vec<_> = expression
        .columns()
        .iter()
        .map(|column| (column.name, &expression.text()[column.range.clone()], column.of_old))
        .collect();
    assert_eq!(
        told,
        [
            ("qty", "qty", false),
            ("a name", "\"a name\"", true),
            ("qty", "qty", false),
            ("data", "data", false),
            ("id", "id", false)
        ]
    );
    let bound = bound("row.data.x == new.id && new.id != old.qty", Names::Change, Wanted::Condition).unwrap();
    assert_eq!(bound.columns(), [0, 20]);
    assert_eq!(bound.old_columns(), [5]);
}

/// The text, what of it is underlined, the message and the help.
fn shown(text: &str, error: &ExpressionError) -> String {
    let marks = "^".repeat(text[error.range.clone()].chars().count().max(1));
    let indent = " ".repeat(text[..error.range.start].chars().count());
    let help: String = error.help.iter().map(|help| format!("help: {help}\n")).collect();
    let text = if text.len() > 100 { "…" } else { text };
    let marks = if marks.len() > 100 { "…" } else { &marks };
    format!("{text}\n{indent}{marks} {}\n`when` {}\n{help}", error.label, error.problem)
}

fn messages(texts: &[&str], wanted: Wanted) -> String {
    let shown: Vec<String> = texts
        .iter()
        .map(|text| {
            let errors = bound(text, Names::Row, wanted).expect_err(text);
            errors.iter().map(|error| shown(text, error)).collect()
        })
        .collect();
    shown.join("\n")
}

#[test]
fn messages_of_the_syntax() {
    let long = "a".repeat(9000);
    let signs = "!".repeat(97);
    let nested = format!("{}1{}", "(".repeat(25), ")".repeat(25));
    let chain = "true ? 1 : ".repeat(40) + "1";
    let shown = messages(
        &[
            "",
            "   // nothing",
            "row.status ==",
            "(row.qty + 1",
            "row.qty + 1)",
            "row.status == 'active",
            "row.status == \"\"\"active\"",
            "row.größe == 1",
            "row.qty 5",
            "row.in == 1",
            "row.for == 1 && for",
            "row.qty == 9223372036854775808",
            "row.name == '\\q'",
            "has(row)",
            "row.qty == 1u",
            "row.amount == 1.234567890123456789012345678901234567890",
            "{'a': 1}",
            "row.tags.exists(t, t == 'a')",
            "row.tags.map(t, t)",
            "Item{id: 1}",
            "row.?name",
            "row.amount == 1.5.5",
            &long,
            &signs,
            &nested,
            &chain,
        ],
        Wanted::Condition,
    );
    insta::assert_snapshot!(shown);
}

#[test]
fn messages_where_sql_was_written() {
    let shown = messages(
        &[
            "row.status = 'active'",
            "row.status <> 'active'",
            "row.active AND row.deleted",
            "row.active or row.deleted",
            "NOT row.active",
            "row.status not in ('a', 'b')",
            "row.name IS NULL",
            "row.name is not null",
            "row.name LIKE 'a%'",
            "row.qty between 1 and 9",
            "row.status in ('a', 'b')",
            "row.status IN ['a']",
            "row.qty::text == '1'",
            "case when row.active then 1 end",
            "row.created_at > now() - interval '1 day'",
            "select 1",
            "row.name == NULL",
            "row.active == TRUE",
            "coalesce(row.name, '') == ''",
            "lower(row.name) == 'a'",
            "length(row.name) > 1",
            "row.name || row.status",
            "now() > row.created_at",
        ],
        Wanted::Condition,
    );
    insta::assert_snapshot!(shown);
}

#[test]
fn messages_of_names_and_types() {
    let shown = messages(
        &[
            "row.statsu == 'active'",
            "row.zzz == 1 && row.yyy == 2",
            "status == 'active'",
            "whatever == 1",
            "row == 1",
            "old.status == 'active'",
            "op == 'insert'",
            "row.status == 5",
            "row.qty == '5'",
            "row.qty == 'five'",
            "row.qty == row.status",
            "row.active == 'true'",
            "row.active == 1",
            "row.created_at > '2024-01-01'",
            "row.created_at - row.seen_at > '1h'",
            "row.raw == 'a'",
            "row.token == 'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'",
            "row.lasts < '1 day'",
            "row.name > null",
            "row.status && row.qty || row.created_at",
            "!row.status",
            "row.status ? true : false",
            "row.status",
            "row.qty + row.status == 1",
            "row.amount / 3 == 1",
            "row.amount % 3 == 1",
            "row.created_at + 5 > row.seen_at",
            "row.active * 2 == 1",
            "row.qty + null == 1",
            "9223372036854775807 + 1 == row.id",
            "1 / 0 == row.id",
            "-row.status == 'a'",
            "row.active ? 1 : 'a'",
            "row.status.x == 1",
            "row.qty[0] == 1",
            "row.data[1.5] == 1",
            "'a' in row.status",
            "row.qty in 5",
            "row.qty in [1, 'a']",
            "[1, 2]",
            "timestamp(row.status) == row.created_at",
            "row.created_at > timestamp('yesterday')",
            "row.created_at - row.seen_at > duration('1 fortnight')",
            "row.name.matches(row.status)",
            "row.name.matches('(')",
            "row.qty.contains('1')",
            "size(row.qty) == 1",
            "size() == 1",
            "row.name.contains() == 1",
            "row.name.starsWith('a')",
            "contains(row.name, 'a')",
            "row.qty.string() == '1'",
            "substring(row.name, 1) == 'a'",
        ],
        Wanted::Condition,
    );
    insta::assert_snapshot!(shown);
}

#[test]
fn messages_of_what_is_wanted() {
    let of = |wanted, texts: &[&str]| messages(texts, wanted);
    let shown = [
        of(Wanted::Condition, &["row.qty", "row.created_at"]),
        of(Wanted::Value, &["duration(\"1h\")"]),
        of(Wanted::Number, &["row.status", "row.created_at"]),
        of(Wanted::Timestamp, &["row.qty", "\"2024-01-01\""]),
    ]
    .join("\n");
    insta::assert_snapshot!(shown);
}

/// The table of the module's documentation.
#[test]
fn the_documented_examples_hold() {
    let source = include_str!("../expression.rs");
    let lines = source.lines().skip_while(|line| *line != "//! # Examples").filter(|line| line.starts_with("//! | `"));
    let mut seen = 0;
    for line in lines {
        let cells: Vec<&str> = line.trim_start_matches("//! | `").trim_end_matches("` |").split(" | ").collect();
        let [text, columns, expected] = cells[..] else { panic!("{line}") };
        let columns = columns.replace("`name` is NULL", "").replace("`, `", "; ").replace('`', "").replace(" = ", "=");
        let row = row(&pairs(&columns));
        let shown = value(text.trim_end_matches('`'), &Images::of_row(&row), Names::Row);
        assert_eq!(shown, expected.trim_start_matches('`'), "{text}");
        seen += 1;
    }
    assert!(seen > 10);
}

/// As far as the limits go nothing overflows the stack, which tests have little of.
#[test]
fn long_chains_are_evaluated() {
    let chains = [
        format!("1{}", " + 1".repeat(96)),
        format!("row.qty{}", " - row.qty".repeat(47)),
        format!("row.data{}", ".a".repeat(95)),
        format!("row.data{}", "[0]".repeat(87)),
        format!("{}row.active", "!".repeat(95)),
        format!("{}row.qty{}", "-(".repeat(19), ")".repeat(19)),
        format!("{}row.qty{}", "(".repeat(23), ")".repeat(23)),
        format!("{}1", "row.active ? 1 : ".repeat(23)),
        format!("row.active{}", " && row.active".repeat(500)),
        format!("row.qty in [1{}]", ", 1".repeat(2000)),
    ];
    let row = row(&[("qty", "1"), ("active", "t"), ("data", "{\"a\": []}")]);
    for text in &chains {
        assert_ne!(value(text, &Images::of_row(&row), Names::Row), "", "{text}");
    }
    let beyond = [
        format!("1{}", " + 1".repeat(97)),
        format!("row.data{}", "[0]".repeat(100)),
        format!("{}row.qty{}", "(".repeat(25), ")".repeat(25)),
        format!("{}1", "row.active ? 1 : ".repeat(40)),
        format!("row.qty in [1{}]", ", 1".repeat(3000)),
    ];
    for text in &beyond {
        assert!(Expression::parse(text).is_err(), "{text}");
    }
}

/// What an expression is made of.
const TOKENS: [&str; 48] = [
    "row.id",
    "row.status",
    "row.price",
    "row.ratio",
    "row.active",
    "row.data",
    "row.tags",
    "row.created_at",
    "old.id",
    "op",
    "row",
    ".",
    "x",
    "null",
    "true",
    "1",
    "-7",
    "1.5",
    "1e300",
    "0x1",
    "'a'",
    "\"é\"",
    "b'a'",
    "r'\\'",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    "?",
    "!",
    "-",
    "+",
    "*",
    "/",
    "%",
    "==",
    "!=",
    "<",
    ">=",
    "&&",
    "||",
    "in",
    "has(",
    "size(",
];

fn tokens() -> impl Strategy<Value = String> {
    let calls =
        [".startsWith(", ".matches(", "string(", "int(", "timestamp(", "duration(", ".exists(", "AND", "=", "🦀", "'"];
    let all: Vec<&str> = TOKENS.into_iter().chain(calls).collect();
    proptest::collection::vec(proptest::sample::select(all), 0..16).prop_map(|tokens| tokens.join(" "))
}

/// What the strategies below draw from: the same variables for CEL and for us.
fn expression(depth: u32) -> BoxedStrategy<String> {
    prop_oneof![condition(depth), integer(depth), text(depth)].boxed()
}

fn integer(depth: u32) -> BoxedStrategy<String> {
    let leaf = prop_oneof![
        prop_oneof![-9_i64..10, Just(i64::MAX), Just(i64::MIN)].prop_map(|number| format!("({number})")),
        Just("row.id".to_owned()),
        Just("row.qty".to_owned()),
    ];
    if depth == 0 {
        return leaf.boxed();
    }
    let operator = prop_oneof![Just("+"), Just("-"), Just("*"), Just("/"), Just("%")];
    prop_oneof![
        leaf,
        (integer(depth - 1), operator, integer(depth - 1)).prop_map(|(l, o, r)| format!("({l} {o} {r})")),
        text(depth - 1).prop_map(|text| format!("size({text})")),
        (condition(depth - 1), integer(depth - 1), integer(depth - 1))
            .prop_map(|(c, l, r)| format!("({c} ? {l} : {r})")),
        integer(depth - 1).prop_map(|number| format!("-({number} + 0)")),
    ]
    .boxed()
}

fn text(depth: u32) -> BoxedStrategy<String> {
    let literal = "[a-cé ]{0,3}".prop_map(|text| format!("'{text}'"));
    let leaf = prop_oneof![literal, Just("row.status".to_owned()), Just("row.name".to_owned())];
    if depth == 0 {
        return leaf.boxed();
    }
    prop_oneof![
        leaf,
        (text(depth - 1), text(depth - 1)).prop_map(|(l, r)| format!("{l} + {r}")),
        integer(depth - 1).prop_map(|number| format!("string({number})")),
        (condition(depth - 1), text(depth - 1), text(depth - 1)).prop_map(|(c, l, r)| format!("({c} ? {l} : {r})")),
    ]
    .boxed()
}

fn condition(depth: u32) -> BoxedStrategy<String> {
    let leaf = prop_oneof![Just("true".to_owned()), Just("false".to_owned()), Just("row.active".to_owned())];
    if depth == 0 {
        return leaf.boxed();
    }
    let comparison = || prop_oneof![Just("=="), Just("!="), Just("<"), Just("<="), Just(">"), Just(">=")];
    let method = prop_oneof![Just("startsWith"), Just("endsWith"), Just("contains")];
    // No element may fail: CEL makes the whole list first, and we stop where the needle is found.
    let list = proptest::collection::vec(integer(0), 0..4).prop_map(|list| list.join(", "));
    prop_oneof![
        leaf,
        (integer(depth - 1), comparison(), integer(depth - 1)).prop_map(|(l, o, r)| format!("({l} {o} {r})")),
        (text(depth - 1), comparison(), text(depth - 1)).prop_map(|(l, o, r)| format!("({l} {o} {r})")),
        (condition(depth - 1), condition(depth - 1)).prop_map(|(l, r)| format!("({l} && {r})")),
        (condition(depth - 1), condition(depth - 1)).prop_map(|(l, r)| format!("({l} || {r})")),
        condition(depth - 1).prop_map(|of| format!("!({of})")),
        (text(depth - 1), method, text(depth - 1)).prop_map(|(l, m, r)| format!("({l}).{m}({r})")),
        (integer(depth - 1), list).prop_map(|(needle, list)| format!("({needle} in [{list}])")),
    ]
    .boxed()
}

/// What CEL makes of it; `None` where that is an error.
fn by_cel(text: &str, id: i64, qty: i64, status: &str, name: &str, active: bool) -> Option<String> {
    let program = Program::compile(text).unwrap();
    let mut context = cel::Context::default();
    let row: std::collections::HashMap<&str, cel::Value> = [
        ("id", cel::Value::Int(id)),
        ("qty", cel::Value::Int(qty)),
        ("status", cel::Value::String(Arc::new(status.to_owned()))),
        ("name", cel::Value::String(Arc::new(name.to_owned()))),
        ("active", cel::Value::Bool(active)),
    ]
    .into();
    context.add_variable_from_value("row", row);
    match program.execute(&context).ok()? {
        cel::Value::Int(integer) => Some(integer.to_string()),
        cel::Value::Bool(truth) => Some(truth.to_string()),
        cel::Value::String(text) => Some(serde_json::Value::from(text.as_str()).to_string()),
        other => panic!("{other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_tokens_are_evaluated_or_refused_at_a_place(text in tokens()) {
        let row = row(&pairs("id=1; status=a; price=1.5; ratio=NaN; active=t; tags={a}; data={\"x\": [1]}"));
        for wanted in [Wanted::Condition, Wanted::Value, Wanted::Number, Wanted::Timestamp] {
            match bound(&text, Names::Change, wanted) {
                Ok(bound) => drop(bound.write_json(&Images::of_row(&row), &mut Vec::new())),
                Err(errors) => prop_assert!(errors.iter().all(|error| text.get(error.range.clone()).is_some())),
            }
        }
    }

    #[test]
    fn it_agrees_with_cel_where_both_mean_the_same(
        text in expression(3),
        id in any::<i64>(),
        qty in -5_i32..5,
        status in "[a-c]{0,2}",
        name in "[a-cé]{0,2}",
        active: bool,
    ) {
        let expected = by_cel(&text, id, qty.into(), &status, &name, active);
        let (id, qty) = (id.to_string(), qty.to_string());
        let row = row(&[("id", &id), ("qty", &qty), ("status", &status), ("name", &name), ("active", if active { "t" } else { "f" })]);
        // What fails with constants alone is refused when it is bound, even where CEL never comes to it.
        if let Ok(expression) = bound(&text, Names::Row, Wanted::Value) {
            let mut out = Vec::new();
            let written = expression.write_json(&Images::of_row(&row), &mut out);
            prop_assert_eq!(written.ok().map(|()| String::from_utf8(out).unwrap()), expected, "{}", text);
        }
    }
}
