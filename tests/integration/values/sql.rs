//! Random values as SQL expressions, for the types that the test's set-up makes and those that every Postgres has.

use std::net::IpAddr;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

/// Expressions for the values of one type.
pub(super) type Sql = BoxedStrategy<String>;

/// A column's type and its values.
pub(super) type Column = (&'static str, Sql);

/// Types without parts.
pub(super) fn scalars() -> Vec<Column> {
    let of_text = |function: &'static str| text().prop_map(move |text| format!("{function}('simple', {text})")).boxed();
    vec![
        ("int4", int()),
        ("float8", float()),
        ("float4", any::<f32>().prop_map(|number| quote(format!("{number:e}"))).boxed()),
        ("numeric", "-?[0-9]{1,30}(\\.[0-9]{1,20})?(e-?[0-9]{1,2})?".prop_map(quote).boxed()),
        ("text", text()),
        ("varchar(4)", text()),
        ("char(4)", text()),
        ("name", text()),
        ("bytea", vec(any::<u8>(), 0..20).prop_map(|bytes| format!("'\\x{}'", hex(&bytes))).boxed()),
        ("json", json()),
        ("jsonb", json()),
        ("raw_doc", json()),
        ("date", date()),
        ("timestamp", timestamptz()),
        ("timestamptz", timestamptz()),
        ("interval", interval()),
        ("mood", mood()),
        ("tstzrange", span()),
        ("text_range", text_range()),
        ("uuid", any::<[u8; 16]>().prop_map(|bytes| quote(hex(&bytes))).boxed()),
        ("inet", (any::<IpAddr>(), 0..=32).prop_map(|(ip, bits)| format!("'{ip}/{bits}'")).boxed()),
        ("varbit", "[01]{0,20}".prop_map(quote).boxed()),
        ("point", (float(), float()).prop_map(|(x, y)| format!("point({x}, {y})")).boxed()),
        ("tsvector", of_text("to_tsvector")),
        ("tsquery", of_text("plainto_tsquery")),
    ]
}

/// Composites, arrays, domains over them, and each in the other.
pub(super) fn containers() -> Vec<Column> {
    vec![
        ("place", place()),
        ("known_place", place()),
        ("order_line", order_line()),
        ("alone", composite("alone", [text()])),
        ("order_line[]", array_of(order_line(), "order_line")),
        ("text[]", labels()),
        ("labels[]", array_of(labels(), "labels")),
        ("float8[]", array_of(float(), "float8")),
        ("json[]", array_of(json(), "json")),
        ("timestamp[]", array_of(timestamptz(), "timestamp")),
        ("timestamptz[]", array_of(timestamptz(), "timestamptz")),
        ("text[]", matrix_of(text(), "text")),
        ("place[]", matrix_of(place(), "place")),
    ]
}

/// What needs the extension hstore.
pub(super) fn hstores() -> Vec<Column> {
    vec![("hstore", hstore()), ("hstore[]", array_of(hstore(), "hstore"))]
}

/// The same values, or NULL.
pub(super) fn nullable(value: Sql) -> Sql {
    prop_oneof![1 => Just("null".to_owned()), 5 => value].boxed()
}

/// The same values, as values of this type.
pub(super) fn cast(value: Sql, type_name: &'static str) -> Sql {
    value.prop_map(move |value| format!("({value})::{type_name}")).boxed()
}

fn quote(text: String) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn text() -> Sql {
    any_text().prop_map(quote).boxed()
}

/// Any text that Postgres takes, mostly of the characters that some output function or JSON treats apart.
fn any_text() -> impl Strategy<Value = String> {
    const SPECIAL: &str = "\"\\{}()[],;:=> '\t\n\u{b}\u{c}\r\u{8}\u{1}\u{1f}\u{7f}\u{a0}\u{2028}/NULL";
    let special = select(SPECIAL.chars().collect::<Vec<char>>());
    let any_char = any::<char>().prop_filter("Postgres has no NUL in text", |&char| char != '\0');
    vec(prop_oneof![3 => special, 1 => any_char, 1 => proptest::char::range('a', 'e')], 0..8)
        .prop_map(String::from_iter)
}

fn json() -> Sql {
    let string = || any_text().prop_map(|text| serde_json::to_string(&text).unwrap());
    let number = "-?(0|[1-9][0-9]{0,20})(\\.[0-9]{1,5})?([eE][+-]?[0-9]{1,2})?";
    let other = select(&["null", "true", "false", " [ ] ", "{}"][..]).prop_map(str::to_owned);
    let value = prop_oneof![string(), number, other].prop_recursive(3, 12, 3, move |inner| {
        let field = (string(), inner.clone()).prop_map(|(name, value)| format!("{name} :{value}"));
        let object = vec(field, 1..4).prop_map(|fields| format!("{{{}}}", fields.join(", ")));
        prop_oneof![vec(inner, 1..4).prop_map(|items| format!("[{}]", items.join(" ,"))), object]
    });
    value.prop_map(quote).boxed()
}

fn int() -> Sql {
    any::<i32>().prop_map(|number| number.to_string()).boxed()
}

fn float() -> Sql {
    use proptest::num::f64::{ANY, SUBNORMAL};
    let number = prop_oneof![3 => ANY, 1 => SUBNORMAL, 3 => -1e6..1e6, 1 => (-1000..1000).prop_map(f64::from)];
    number.prop_map(|number| quote(format!("{number:e}"))).boxed()
}

fn date() -> Sql {
    (-2_451_500..100_000_000).prop_map(|days| format!("date '2000-01-01' + {days}")).boxed()
}

fn timestamptz() -> Sql {
    microseconds().prop_map(instant).boxed()
}

/// From 4713 BC to near the end of what a timestamp can say, half of them near 2000-01-01.
fn microseconds() -> impl Strategy<Value = i64> {
    const SECOND: i64 = 1_000_000;
    const DAY: i64 = 86_400 * SECOND;
    prop_oneof![-2_451_000 * DAY..106_000_000 * DAY, -10_000 * DAY..10_000 * DAY, -SECOND..SECOND]
}

fn instant(microseconds: i64) -> String {
    format!("timestamptz '2000-01-01' + {microseconds} * interval '1 us'")
}

fn interval() -> Sql {
    (any::<[i16; 4]>(), any::<i32>())
        .prop_map(|([years, months, days, hours], microseconds)| {
            format!("make_interval({years}, {months}, 0, {days}, {hours}, 0, {microseconds} / 1000000.0)")
        })
        .boxed()
}

fn mood() -> Sql {
    select(&["ok", "so \"so\"", "back\\slash", "{a,b}", "(c)", "NULL", " ", "ü"][..])
        .prop_map(|label| quote(label.to_owned()))
        .boxed()
}

fn span() -> Sql {
    (microseconds(), microseconds(), select(&["[]", "[)", "(]", "()"][..]))
        .prop_map(|(one, other, bounds)| {
            format!("tstzrange({}, {}, '{bounds}')", instant(one.min(other)), instant(one.max(other)))
        })
        .boxed()
}

fn text_range() -> Sql {
    (text(), text())
        .prop_map(|(one, other)| {
            let both = format!("{one} collate \"C\", {other}");
            format!("text_range(least({both}), greatest({both}), '[]')")
        })
        .boxed()
}

fn labels() -> Sql {
    array_of(text(), "text")
}

fn place() -> Sql {
    composite("place", [int(), float(), text()])
}

fn order_line() -> Sql {
    composite(
        "order_line",
        [
            any::<i64>().prop_map(|id| id.to_string()).boxed(),
            timestamptz(),
            date(),
            labels(),
            place(),
            array_of(place(), "place"),
            json(),
            array_of(json(), "jsonb"),
            any::<bool>().prop_map(|ok| ok.to_string()).boxed(),
            mood(),
            array_of(mood(), "mood"),
            labels(),
            (10..i32::MAX).prop_map(|number| number.to_string()).boxed(),
            array_of(timestamptz(), "moment"),
            span(),
        ],
    )
}

fn composite<const N: usize>(type_name: &'static str, attributes: [Sql; N]) -> Sql {
    let attributes = attributes.map(nullable).to_vec();
    attributes.prop_map(move |values| format!("row({})::{type_name}", values.join(","))).boxed()
}

fn array_of(element: Sql, type_name: &'static str) -> Sql {
    let elements = vec(nullable(cast(element, type_name)), 0..4);
    elements.prop_map(move |elements| format!("array[{}]::{type_name}[]", elements.join(","))).boxed()
}

/// Arrays of two dimensions.
fn matrix_of(element: Sql, type_name: &'static str) -> Sql {
    let element = nullable(cast(element, type_name));
    (1..4usize)
        .prop_flat_map(move |width| vec(vec(element.clone(), width), 1..4))
        .prop_map(move |rows| {
            let rows: Vec<String> = rows.iter().map(|row| format!("[{}]", row.join(","))).collect();
            format!("array[{}]::{type_name}[]", rows.join(","))
        })
        .boxed()
}

fn hstore() -> Sql {
    vec((text(), nullable(text())), 0..4)
        .prop_map(|pairs| {
            let (keys, values): (Vec<String>, Vec<String>) = pairs.into_iter().unzip();
            format!("hstore(array[{}]::text[], array[{}]::text[])", keys.join(","), values.join(","))
        })
        .boxed()
}
